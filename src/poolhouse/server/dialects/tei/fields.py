"""Fields: the bodies of TEI's routes."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import Prompt, images_of, parse_prompts
from poolhouse.params import PoolingParams
from poolhouse.server.dialects import openai
from poolhouse.server.dialects._fields import INPUT_SCHEMA, Many, Nested, Strict
from poolhouse.server.dialects.tei.errors import EmptyInput

_TRUNCATION_SIDES: dict[str, Literal["left", "right"]] = {
    "right": "right",
    "Right": "right",
    "left": "left",
    "Left": "left",
}
_TRUNCATION_FIELDS = ("truncate", "truncation", "truncate_prompt_tokens")


class TeiFields(Nested):
    """What all routes take; `model` is ours, for servers of several models."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = Field(None, description="A served model; none takes the first.")
    truncate: bool | None = Field(None, description="Cut texts over the limit; none cuts too, as TEI does.")
    truncation_direction: Literal["right", "left", "Right", "Left"] | None = Field(
        None, description="Which end of a long text is dropped; none is the end that the model's tokenizer drops."
    )
    prompt_name: str | None = None

    def params(self) -> PoolingParams:
        """How to cut."""
        return PoolingParams(
            truncate_prompt_tokens=None if self.truncate is False else -1,
            overflow="error" if self.truncate is False else None,
            truncation_side=_TRUNCATION_SIDES.get(self.truncation_direction or ""),
        )

    def prompts(self) -> list[Prompt]:
        """The prompts of `inputs`, where the route has them."""
        raise NotImplementedError


class TokenFields(TeiFields):
    """The body of POST /embed_all and /embed_sparse."""

    inputs: object = Field(description="A text, token ids, or a list of both.", json_schema_extra=INPUT_SCHEMA)

    def prompts(self) -> list[Prompt]:
        """One prompt per text or list of ids.

        Raises:
            EmptyInput: no text. InvalidRequest: neither texts nor ids, or pictures.
        """
        _refuse_nothing(self.inputs, "inputs")
        prompts = parse_prompts(self.inputs, "inputs")
        if any(map(images_of, prompts)):
            raise InvalidRequest("TEI's API has no pictures; /v1/embeddings and /pooling read them.", "inputs")
        return prompts


class OpenAIFields(openai.EmbeddingFields):
    """The body of POST /tei/v1/embeddings; texts over the limit are cut by default, as in TEI."""

    @model_validator(mode="before")
    @classmethod
    def _cut(cls, body: object) -> object:
        if not isinstance(body, dict) or any(body.get(name) is not None for name in _TRUNCATION_FIELDS):
            return body
        return {**body, "truncate_prompt_tokens": -1}

    def refuse_nothing(self) -> None:
        """Raise EmptyInput for no text, or an empty one."""
        _refuse_nothing(self.input, "input")


class EmbedFields(TokenFields):
    """The body of POST /embed."""

    normalize: bool | None = Field(
        None, description="Scale vectors to length 1; none does, but for SPLADE, which refuses it."
    )
    dimensions: int | None = None


class PredictFields(TeiFields):
    """The body of POST /predict; a list of two texts is a pair."""

    inputs: object = Field(description='"a", ["a"], ["a", "b"] (a pair), or a list of such lists.')
    raw_scores: bool = False

    def texts(self) -> tuple[list[tuple[str, str | None]], bool]:
        """Texts, each with its second one or None, and whether it is a single one.

        Raises:
            EmptyInput: no text. InvalidRequest: another form.
        """
        inputs = self.inputs
        if inputs == []:
            raise EmptyInput("inputs")
        if not isinstance(inputs, str | list):
            raise InvalidRequest('inputs must be "a", ["a"], ["a", "b"], or a list of such lists.', "inputs")
        single = isinstance(inputs, str) or all(isinstance(text, str) for text in inputs)
        texts = (
            [_pair(inputs, "inputs")]
            if single
            else [_pair(texts, f"inputs[{index}]") for index, texts in enumerate(inputs)]
        )
        if any(not text and not pair for text, pair in texts):
            raise EmptyInput("inputs")
        return texts, single


class Sentences(Strict):
    """What is compared."""

    source_sentence: str
    sentences: Many[str]


class SimilarityFields(Strict):
    """The body of POST /similarity."""

    model: str | None = None
    inputs: Sentences
    parameters: TeiFields = Field(default_factory=TeiFields)


class RerankFields(TeiFields):
    """The body of POST /rerank."""

    query: str
    texts: Many[str]
    raw_scores: bool = False
    return_text: bool = False


class TokenizeFields(Strict):
    """The body of POST /tokenize."""

    model: str | None = Field(None, description="A served model; none takes the first.")
    inputs: str | Many[str]
    add_special_tokens: bool = True
    prompt_name: str | None = Field(None, description="A prompt of the checkpoint, put before each text.")

    def texts(self) -> list[str]:
        """The texts.

        Raises:
            EmptyInput: none, or an empty one.
        """
        texts = [self.inputs] if isinstance(self.inputs, str) else self.inputs
        if not texts or "" in texts:
            raise EmptyInput("inputs")
        return texts


class DecodeFields(Strict):
    """The body of POST /decode."""

    model: str | None = Field(None, description="A served model; none takes the first.")
    ids: Many[int] | Many[Many[int]] = Field(description="Token ids of a text, or of each of several.")
    skip_special_tokens: bool = True

    def lists(self) -> list[list[int]]:
        """The ids of each text.

        Raises:
            EmptyInput: no ids.
        """
        if not self.ids:
            raise EmptyInput("ids")
        lists = [ids for ids in self.ids if isinstance(ids, list)]
        return lists or [[token for token in self.ids if isinstance(token, int)]]


def _refuse_nothing(inputs: object, name: str) -> None:
    if inputs in ("", []) or (isinstance(inputs, list) and "" in inputs):
        raise EmptyInput(name)


def _pair(texts: object, path: str) -> tuple[str, str | None]:
    if isinstance(texts, str):
        return texts, None
    if not isinstance(texts, list) or len(texts) not in (1, 2) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"{path} must be a text, or a list of one or two texts.", path)
    return texts[0], texts[1] if len(texts) == 2 else None
