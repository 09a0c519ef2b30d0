"""Tokenize: vLLM's /tokenize and /detokenize; a body with `inputs` gets TEI's reply."""

from __future__ import annotations

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnknownModel
from poolhouse.inputs.prompts import Conversation, Prompt, images_of
from poolhouse.server.call import Call, JsonObject
from poolhouse.server.dialects import tei
from poolhouse.server.dialects._fields import (
    Lenient,
    Many,
    Strict,
    check_chat_template,
    processor_options,
    refuse_media_io,
)
from poolhouse.server.engines import Engines, unknown
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.contract import Errors
from poolhouse.server.wire.encoding import dumps


class TokenizeFields(Lenient):
    """The body of POST /tokenize: a text, or a conversation."""

    model: str | None = Field(None, description="A served model; none takes the first.")
    prompt: str | None = None
    messages: list[object] | None = Field(None, description="A conversation that the chat template renders.")
    add_special_tokens: bool | None = Field(None, description="Default: true; false for messages.")
    return_token_strs: bool = Field(False, description="Whether to give the vocabulary entry of each token.")
    add_generation_prompt: bool = Field(True, description="Of messages: begin an answer after the last one.")
    continue_final_message: bool = Field(False, description="Of messages: leave the last one open.")
    chat_template: str | None = Field(None, description="Refused unless --trust-request-chat-template.")
    chat_template_kwargs: dict[str, object] | None = None
    mm_processor_kwargs: dict[str, object] | None = Field(None, description="Without effect: pictures are refused.")
    media_io_kwargs: dict[str, object] | None = Field(None, description="Refused.")

    def request(self, engines: Engines, engine: PoolingEngine) -> EngineRequest:
        """What is to be tokenised.

        Raises:
            InvalidRequest: neither a prompt nor messages, or both; pictures; a template or options that are not for
                requests.
        """
        refuse_media_io(self.media_io_kwargs)
        processor_options(self.mm_processor_kwargs)
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Give prompt (a text) or messages (a conversation).", "prompt")
        task = engine.facts.tasks[0]
        if self.messages is None:
            special = self.add_special_tokens is not False
            return EngineRequest(Prompt(self.prompt), task, prompt_name="", add_special_tokens=special)
        check_chat_template(engines, self.chat_template)
        conversation = Conversation(
            self.messages,
            self.add_generation_prompt,
            self.continue_final_message,
            self.chat_template,
            self.chat_template_kwargs or {},
            bool(self.add_special_tokens),
        )
        prompt = Prompt(None, conversation=conversation)
        if images_of(prompt):
            raise InvalidRequest("Pictures are not tokenized here; usage of /pooling counts their tokens.", "messages")
        return EngineRequest(prompt, task)


class DetokenizeFields(Strict):
    """The body of POST /detokenize."""

    model: str | None = Field(None, description="A served model; none takes the first.")
    tokens: Many[int]


async def tokenize(call: Call, body: JsonObject) -> Response:
    """The token ids of a text or a conversation, however long."""
    if "inputs" in body:
        call.speak(tei.shape)
        return await tei.tokenize(call, call.parse(body, tei.TokenizeFields))
    fields = call.parse(body, TokenizeFields)
    engine = await _engine(call, fields.model)
    request = fields.request(call.engines, engine)

    def make() -> bytes:
        (tokens,) = engine.tokenize([request])
        strings = engine.token_strings(tokens.ids.tolist()) if fields.return_token_strs else None
        reply = {
            "count": len(tokens),
            "max_model_len": engine.facts.max_tokens,
            "tokens": tokens.ids,
            "token_strs": strings,
        }
        return dumps(reply)

    # A template may make any number of characters of its messages.
    return await call.compute(make, None if fields.prompt is None else len(fields.prompt))


async def detokenize(call: Call, fields: DetokenizeFields) -> Response:
    """The text of token ids, special tokens included."""
    engine = await _engine(call, fields.model)
    return await call.compute(lambda: dumps({"prompt": engine.detokenize(fields.tokens)}), len(fields.tokens))


async def _engine(call: Call, model: str | None) -> PoolingEngine:
    """The engine of that name; an unknown one is answered with those there are, as vLLM does on these routes alone."""
    try:
        engine = await call.use(model)
    except UnknownModel:
        raise UnknownModel(f"{unknown(str(model))} Valid aliases: {call.engines.names}.", "model") from None
    call.note_items(1)
    return engine


class TokenizeReply(TypedDict):
    """The reply of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(TypedDict):
    """The reply of /detokenize."""

    prompt: str


DIALECT = Dialect(
    "tokens",
    (
        Route(
            "POST",
            "/tokenize",
            tokenize,
            (TokenizeFields, tei.TokenizeFields),
            (TokenizeReply, tei.TokenizeReply),
            errors=(Errors(), tei.ERRORS),
        ),
        Route("POST", "/detokenize", detokenize, DetokenizeFields, (DetokenizeReply,)),
    ),
)
