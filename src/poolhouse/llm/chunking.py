"""`LLM.embed_chunks` and its async twin: late chunking."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from poolhouse.engine.answers import facts_of
from poolhouse.engine.waiting import gather
from poolhouse.late_chunking import Chunked, Chunking, Plan, plan
from poolhouse.llm.answering import wait
from poolhouse.llm.asking import Asked, Options, requests_of
from poolhouse.outputs import ChunkedEmbeddingRequestOutput
from poolhouse.params import PoolingParams

if TYPE_CHECKING:
    from poolhouse.llm.llm import LLM

Spans = Sequence[Any] | None


def embed_chunks(
    self: LLM,
    texts: Any,
    *,
    chunk_size: int | None = None,
    chunks: Spans = None,
    separator: str | re.Pattern[str] | None = None,
    overlap: int | None = None,
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: PoolingParams | None = None,
    prompt_name: str | None = None,
    lora_request: Any = None,
    task: str | None = None,
    tokenization_kwargs: Options = None,
) -> list[ChunkedEmbeddingRequestOutput]:
    """Late chunking: vectors of a text's chunks, each of which knows the text around it.

    The text is read in one pass; a chunk is the mean of its tokens' vectors, then goes through the heads and
    normalisation of `embed`. Special tokens and a prefix are read, but belong to no chunk.
    A text over the model's limit is read in windows of whole chunks, each of which begins with up to `overlap` tokens of
    what came before (an eighth of the limit by default); a chunk then knows its window only.

    chunk_size: tokens of a chunk. chunks: (start, end) characters of each chunk, a list per text.
    separator: what stands between chunks, a text or a pattern such as `re.compile(r"(?<=[.!?])\\s+")` for sentences.

    Raises:
        InvalidRequest: not one of the three; a chunk that holds no token, or more than the model reads at once.
    """
    asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task)
    made = _plan(self, texts, chunk_size, chunks, separator, overlap, asked)
    return self._outputs(
        made.finish(wait(self.engine.submit(made.requests), use_tqdm, "embed_chunks", _place)), _chunked
    )


async def embed_chunks_async(
    self: LLM,
    texts: Any,
    *,
    chunk_size: int | None = None,
    chunks: Spans = None,
    separator: str | re.Pattern[str] | None = None,
    overlap: int | None = None,
    pooling_params: PoolingParams | None = None,
    prompt_name: str | None = None,
    lora_request: Any = None,
    task: str | None = None,
    tokenization_kwargs: Options = None,
) -> list[ChunkedEmbeddingRequestOutput]:
    """`embed_chunks` for coroutines; cancelling it takes what waits out of the queue."""
    asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task)
    made = await asyncio.to_thread(_plan, self, texts, chunk_size, chunks, separator, overlap, asked)
    return self._outputs(made.finish(await gather(self.engine.submit(made.requests), _place)), _chunked)


def _plan(
    llm: LLM,
    texts: Any,
    chunk_size: int | None,
    chunks: Spans,
    separator: str | re.Pattern[str] | None,
    overlap: int | None,
    asked: Asked,
) -> Plan:
    alone = isinstance(texts, str | Mapping)
    spans = [chunks] if alone and chunks is not None else chunks
    requests = requests_of(llm.engine, texts, "embed", asked)
    return plan(llm.engine, requests, Chunking(chunk_size, spans, separator, overlap))


def _place(_: int) -> str:
    """A text may be read in several windows, each a request."""
    return "texts"


def _chunked(request_id: str, chunked: Chunked) -> ChunkedEmbeddingRequestOutput:
    return ChunkedEmbeddingRequestOutput(request_id, chunked.chunks, **facts_of(chunked.tokens, chunked.windows))
