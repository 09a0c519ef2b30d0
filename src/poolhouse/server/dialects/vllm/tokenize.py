"""vLLM's /tokenize and /detokenize; the first is TEI's too, told by its `inputs`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Request as EngineRequest
from poolhouse.errors import InvalidRequest, UnknownModel
from poolhouse.inputs.prompts import Conversation, Prompt
from poolhouse.server.dialects import _replies, tei
from poolhouse.server.dialects._fields import Lenient, Many, body_schema, check_chat_template, refuse_media_options
from poolhouse.server.engines import Serving, unknown
from poolhouse.server.routing import direct_router
from poolhouse.server.wire.body import read_json
from poolhouse.server.wire.encoding import dumps
from poolhouse.server.wire.errors import speak


class TokenizeFields(Lenient):
    """The body of POST /tokenize: a text, or a conversation."""

    model: str | None = Field(None, description="A served model; none takes the first.")
    prompt: str | None = None
    messages: list[Any] | None = Field(None, description="A conversation that the chat template renders.")
    add_special_tokens: bool | None = Field(None, description="Default: true; false for messages.")
    return_token_strs: bool = Field(False, description="Whether to give the vocabulary entry of each token.")
    add_generation_prompt: bool = Field(True, description="Of messages: begin an answer after the last one.")
    continue_final_message: bool = Field(False, description="Of messages: leave the last one open.")
    chat_template: str | None = Field(None, description="Refused unless --trust-request-chat-template.")
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = Field(None, description="Refused: no model here takes media options.")
    media_io_kwargs: dict[str, Any] | None = Field(None, description="Refused: no model here takes media options.")

    def request(self, serving: Serving, engine: PoolingEngine) -> EngineRequest:
        """What is to be tokenised.

        Raises:
            InvalidRequest: neither a prompt nor messages, or both; a template or options that are not for requests.
        """
        refuse_media_options(self)
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Give prompt (a text) or messages (a conversation).", "prompt")
        task = engine.facts.tasks[0]
        if self.messages is None:
            special = self.add_special_tokens is not False
            return EngineRequest(Prompt(self.prompt), task, prompt_name="", add_special_tokens=special)
        check_chat_template(serving, self.chat_template)
        conversation = Conversation(
            self.messages,
            self.add_generation_prompt,
            self.continue_final_message,
            self.chat_template,
            self.chat_template_kwargs or {},
            bool(self.add_special_tokens),
        )
        return EngineRequest(Prompt(None, conversation=conversation), task)


class DetokenizeFields(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = Field(None, description="A served model; none takes the first.")
    tokens: Many[int]


def router(serving: Serving) -> APIRouter:
    routes = direct_router("tokens")

    @routes.post("/tokenize", openapi_extra=body_schema(TokenizeFields, tei.TokenizeFields))
    async def tokenize(http: Request) -> Response:
        """The token ids of a text or a conversation, however long."""
        body = await read_json(http, serving.settings)
        if "inputs" in body:
            speak(http, tei.shape)
            return await tei.answer_tokenize(serving, http, serving.parse(body, tei.TokenizeFields))
        return await _tokenize(serving, http, serving.parse(body, TokenizeFields))

    @routes.post("/detokenize", openapi_extra=body_schema(DetokenizeFields))
    async def detokenize(http: Request) -> Response:
        """The text of token ids, special tokens included."""
        fields = await serving.read(http, DetokenizeFields)
        engine = _engine(serving, http, fields.model)
        return await _replies.made(lambda: dumps({"prompt": engine.detokenize(fields.tokens)}), len(fields.tokens))

    return routes


async def _tokenize(serving: Serving, http: Request, fields: TokenizeFields) -> Response:
    engine = _engine(serving, http, fields.model)
    request = fields.request(serving, engine)

    def make() -> bytes:
        (tokens,) = engine.tokenize([request])
        strings = engine.token_strings(tokens.ids.tolist()) if fields.return_token_strs else None
        body = {
            "count": len(tokens),
            "max_model_len": engine.facts.max_tokens,
            "tokens": tokens.ids,
            "token_strs": strings,
        }
        return dumps(body)

    # A template may make any number of characters of its messages.
    return await _replies.made(make, None if fields.prompt is None else len(fields.prompt))


def _engine(serving: Serving, http: Request, model: str | None) -> PoolingEngine:
    """The engine of that name; an unknown one is answered with those there are, as vLLM does on these routes alone."""
    try:
        engine = serving.engine(model)
    except UnknownModel:
        raise UnknownModel(f"{unknown(str(model))} Valid aliases: {serving.names}.", "model") from None
    http.state.model, http.state.items = engine.facts.name, 1
    return engine
