"""TEI's /tokenize and /decode."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, Field

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.tokens import Tokens
from poolhouse.server.dialects import _replies
from poolhouse.server.dialects._fields import Many
from poolhouse.server.dialects.tei.errors import EmptyInput
from poolhouse.server.engines import Serving
from poolhouse.server.wire.encoding import dumps


class TokenizeFields(BaseModel):
    """The body of POST /tokenize."""

    model_config = ConfigDict(extra="ignore", strict=True)

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


class DecodeFields(BaseModel):
    """The body of POST /decode."""

    model_config = ConfigDict(extra="ignore", strict=True)

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


async def answer_tokenize(serving: Serving, http: Request, fields: TokenizeFields) -> Response:
    """The tokens of each text, with the characters that each stands for."""
    engine = serving.engine(fields.model)
    texts = fields.texts()
    serving.check_items(len(texts), "inputs")
    http.state.model, http.state.items = engine.facts.name, len(texts)
    prompt_name, prefix = _prompt(engine, fields.prompt_name)
    # The prefix counts as text here: TEI's places are those in the whole.
    whole = [prefix + text for text in texts]
    requests = [
        EngineRequest(
            Prompt(text),
            engine.facts.tasks[0],
            prompt_name=prompt_name,
            add_special_tokens=fields.add_special_tokens,
            offsets=True,
        )
        for text in whole
    ]

    def render() -> bytes:
        tokens = engine.tokenize(requests)
        return dumps([_shown(engine, text, one) for text, one in zip(whole, tokens, strict=True)])

    return await _replies.made(render, sum(map(len, whole)))


async def answer_decode(serving: Serving, http: Request, fields: DecodeFields) -> Response:
    """The text of each list of ids."""
    engine = serving.engine(fields.model)
    lists = fields.lists()
    serving.check_items(len(lists), "ids")
    http.state.model, http.state.items = engine.facts.name, len(lists)
    skip = fields.skip_special_tokens
    return await _replies.made(lambda: dumps([engine.detokenize(ids, skip) for ids in lists]), sum(map(len, lists)))


def _prompt(engine: PoolingEngine, name: str | None) -> tuple[str, str]:
    """The name to ask the engine for, which refuses an unknown one, and what is put before texts here."""
    name = engine.facts.default_prompt_name if name is None else name
    if not name:
        return "", ""
    return ("", engine.facts.prompts[name]) if name in engine.facts.prompts else (name, "")


def _shown(engine: PoolingEngine, text: str, tokens: Tokens) -> list[dict[str, Any]]:
    offsets = tokens.offsets
    assert offsets is not None
    special = offsets.special.tolist()
    ids = tokens.ids.tolist()
    names = iter(engine.token_strings([token for token, added in zip(ids, special, strict=True) if added]))
    return [
        {"id": token, "text": next(names), "special": True, "start": None, "stop": None}
        if added
        else {"id": token, "text": text[start:stop], "special": False, "start": start, "stop": stop}
        for token, added, (start, stop) in zip(ids, special, offsets.bounds.tolist(), strict=True)
    ]
