"""NVIDIA: ranking with logits, at /v1/ranking and at the path of its hosted API, which names the model.

Its embeddings are OpenAI's, which understand NVIDIA's fields.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.content import TextOrContent
from poolhouse.server.call import Call
from poolhouse.server.dialects import _hosted
from poolhouse.server.dialects._fields import Items, Strict
from poolhouse.server.routing import Dialect, Route
from poolhouse.server.wire.encoding import dumps


class Text(Strict):
    text: str


class Passage(Strict):
    """A text, a picture, or both."""

    text: str | None = None
    image: str | None = Field(None, description="A data URI.")

    def content(self, path: str) -> TextOrContent:
        """What it holds, the picture first. path: where it stands in the body.

        Raises:
            InvalidRequest: neither a text nor a picture.
        """
        if self.image is None:
            if self.text is None:
                raise InvalidRequest(f"{path} needs text or image.", path)
            return self.text
        return _hosted.with_text([_hosted.picture(self.image, f"{path}.image")], self.text)


class RankingFields(Strict):
    """The body of POST /v1/ranking."""

    model: str | None = None
    query: Text
    passages: Items[Passage] = Field(min_length=1)
    truncate: Literal["NONE", "END"] = "NONE"
    top_k: int | None = Field(None, ge=1, description="How many of the best to give; LiteLLM asks for it.")


async def ranking(call: Call, fields: RankingFields) -> Response:
    """Passages by how well they answer a query, best first."""
    await call.use(fields.model)
    return await _rank(call, fields)


async def reranking(call: Call, fields: RankingFields) -> Response:
    """The same of the model that the path names, where the body names none."""
    await call.use(fields.model or call.path_params["model"])
    return await _rank(call, fields)


async def _rank(call: Call, fields: RankingFields) -> Response:
    passages = [passage.content(f"passages[{index}]") for index, passage in enumerate(fields.passages)]
    truncate = fields.truncate == "END"
    scored = await _hosted.rerank(call, fields.query.text, passages, truncate=truncate, use_activation=False)
    rankings: list[Ranking] = [{"index": index, "logit": score} for index, score in scored.best(fields.top_k)]
    return await call.write(lambda: dumps({"rankings": rankings}), scored.answers)


class Ranking(TypedDict):
    """A passage's index and logit."""

    index: int
    logit: float


class RankingReply(TypedDict):
    """The reply of /v1/ranking, best first."""

    rankings: list[Ranking]


DIALECT = Dialect(
    "nvidia",
    (
        Route("POST", "/v1/ranking", ranking, RankingFields, (RankingReply,)),
        Route("POST", "/v1/retrieval/{model:path}/reranking", reranking, RankingFields, (RankingReply,)),
    ),
)
