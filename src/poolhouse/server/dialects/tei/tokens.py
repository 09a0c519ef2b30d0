"""Tokens: TEI's /tokenize and /decode."""

from __future__ import annotations

from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.tokens import Tokens
from poolhouse.server.call import Call
from poolhouse.server.dialects.tei.fields import DecodeFields, TokenizeFields
from poolhouse.server.wire.encoding import dumps


async def tokenize(call: Call, fields: TokenizeFields) -> Response:
    """The tokens of each text, with the characters that each stands for."""
    engine = await call.use(fields.model)
    texts = fields.texts()
    call.engines.check_items(len(texts), "inputs")
    call.note_items(len(texts))
    prompt_name, prefix = _prompt(engine, fields.prompt_name)
    # TEI's offsets count the prefix too.
    prefixed = [prefix + text for text in texts]
    requests = [
        EngineRequest(
            Prompt(text),
            engine.facts.tasks[0],
            prompt_name=prompt_name,
            add_special_tokens=fields.add_special_tokens,
            offsets=True,
        )
        for text in prefixed
    ]

    def render() -> bytes:
        tokens = engine.tokenize(requests)
        return dumps([_shown(engine, text, one) for text, one in zip(prefixed, tokens, strict=True)])

    return await call.compute(render, sum(map(len, prefixed)))


async def decode(call: Call, fields: DecodeFields) -> Response:
    """The text of each list of ids."""
    engine = await call.use(fields.model)
    lists = fields.lists()
    call.engines.check_items(len(lists), "ids")
    call.note_items(len(lists))
    skip = fields.skip_special_tokens
    return await call.compute(lambda: dumps([engine.detokenize(ids, skip) for ids in lists]), sum(map(len, lists)))


def _prompt(engine: PoolingEngine, name: str | None) -> tuple[str, str]:
    """The name for the engine, which refuses an unknown one, and the prefix that is put before texts here."""
    name = engine.facts.default_prompt_name if name is None else name
    if not name:
        return "", ""
    return ("", engine.facts.prompts[name]) if name in engine.facts.prompts else (name, "")


def _shown(engine: PoolingEngine, text: str, tokens: Tokens) -> list[Token]:
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


class Token(TypedDict):
    """A token, and the characters that it stands for; special ones stand for none."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


TokenizeReply = list[list[Token]]
DecodeReply = list[str]
