"""Fields that the pooling routes share, with vLLM's names and defaults."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from poolhouse.engine.request import Request
from poolhouse.inputs.prompts import parse_prompts
from poolhouse.params import PoolingParams
from poolhouse.precision import Precision
from poolhouse.server.encoding import EncodingFormat, Endianness
from poolhouse.tasks import Task

# vLLM's for use_activation.
_FORMER_WORDS = ("normalize", "softmax", "activation")
_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
INPUT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}


class Fields(BaseModel):
    """What every pooling route understands. Unknown fields are ignored, as OpenAI's servers do."""

    model_config = ConfigDict(extra="ignore", strict=True)

    # Checked by parse_prompts: a schema union over thousands of texts would be slower than answering them.
    input: Any = Field(
        description="A text, a list of texts, token ids, or a list of them.", json_schema_extra=INPUT_SCHEMA
    )
    model: str | None = Field(None, description="A served model; none takes the first.")
    user: str | None = None
    encoding_format: EncodingFormat = Field(
        "float", description="Numbers, base64, or a body of nothing but bytes, described in the header or not at all."
    )
    embed_dtype: Precision = Field(
        "float32", description="Numbers of base64 and bytes; int8, uint8, binary and ubinary hold in JSON too."
    )
    endianness: Endianness = Field("native", description="Byte order of base64 and bytes; native is the server's.")
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description="Cut prompts to this many tokens; -1 cuts to the model's limit; none refuses longer ones.",
    )
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool = True
    use_activation: bool | None = Field(None, description="Normalise embeddings; none leaves it to the model.")
    prompt_name: str | None = Field(None, description='A prompt of the checkpoint ("query"); "" uses none.')
    adapter: str | None = Field(None, description='An adapter of the model; "" uses none.')
    dimensions: int | None = Field(None, description="Length of the vectors, for Matryoshka models.")
    request_id: str | None = None
    priority: int = 0

    @model_validator(mode="before")
    @classmethod
    def _understand_former_words(cls, body: Any) -> Any:
        given = [word for word in _FORMER_WORDS if isinstance(body, dict) and body.get(word) is not None]
        for word in given:
            warnings.warn(
                f"Parameter `{word}` was renamed; use `use_activation` instead.", DeprecationWarning, stacklevel=1
            )
            if body.get("use_activation") is None:
                body = {**body, "use_activation": body[word]}
        return body

    def requests(self, task: Task) -> list[Request]:
        """One engine request per prompt.

        Raises:
            InvalidRequest: naming the field.
        """
        params = PoolingParams(
            dimensions=self.dimensions,
            use_activation=self.use_activation,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side or "right",
        )
        return [
            Request(prompt, task, params, self.prompt_name, self.add_special_tokens, self.adapter)
            for prompt in parse_prompts(self.input, "input")
        ]


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What OpenAPI says of a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}
