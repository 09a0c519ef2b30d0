"""`LLM.embed_tokens`, its async twin, and its form for corpora: token vectors packed, without Python lists."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from poolhouse.engine.request import Answer
from poolhouse.engine.waiting import gather, prompt_place
from poolhouse.errors import EngineError, InvalidRequest
from poolhouse.inputs.input_types import role_of
from poolhouse.inputs.prompts import PromptLike, Prompts, each
from poolhouse.llm.answering import wait
from poolhouse.llm.asking import Asked, Options, Params, requests_of
from poolhouse.precision import parse_precision
from poolhouse.token_embeddings import TokenEmbeddings
from poolhouse.token_pooling import check_factor, pooled

if TYPE_CHECKING:
    from poolhouse.llm.llm import LLM

# While one block is packed or used by the caller, the engine reads the next.
_BLOCKS_AHEAD = 1


def embed_tokens(
    self: LLM,
    prompts: Prompts,
    *,
    input_type: str | None = None,
    token_pooling_factor: float | None = None,
    precision: str = "float32",
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: Params = None,
    prompt_name: str | None = None,
    lora_request: Any = None,
    task: str | None = None,
    tokenization_kwargs: Options = None,
) -> TokenEmbeddings:
    """The token vectors of all prompts as one packed matrix with offsets; cuts are not reported here.

    input_type: what the texts are, "query" or "document", for models that read them differently.
    token_pooling_factor: of documents, keep about one vector per so many, each the mean of like ones, of unit length.
    precision: as in `embed_array`; int8 and uint8 take vectors of unit length, or stored ranges.

    Raises:
        UnsupportedTask: a model without `token_embed`. InvalidRequest: for the first prompt that cannot be answered.
    """
    asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
    pack = _packing(self, input_type, token_pooling_factor, precision)
    requests = requests_of(self.engine, prompts, "token_embed", asked)
    return pack(wait(self.engine.submit(requests), use_tqdm, "embed_tokens"))


async def embed_tokens_async(
    self: LLM,
    prompts: Prompts,
    *,
    input_type: str | None = None,
    token_pooling_factor: float | None = None,
    precision: str = "float32",
    pooling_params: Params = None,
    prompt_name: str | None = None,
    lora_request: Any = None,
    task: str | None = None,
    tokenization_kwargs: Options = None,
) -> TokenEmbeddings:
    """`embed_tokens` for coroutines; cancelling it takes the prompts out of the queue."""
    asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
    pack = _packing(self, input_type, token_pooling_factor, precision)
    requests = requests_of(self.engine, prompts, "token_embed", asked)
    answers = await gather(self.engine.submit(requests))
    return await asyncio.to_thread(pack, answers)


def embed_tokens_in_blocks(
    self: LLM,
    prompts: Iterable[PromptLike],
    *,
    prompts_per_block: int = 1024,
    input_type: str | None = None,
    token_pooling_factor: float | None = None,
    precision: str = "float32",
    pooling_params: Any = None,
    prompt_name: str | None = None,
    lora_request: Any = None,
    task: str | None = None,
    tokenization_kwargs: Options = None,
) -> Iterator[TokenEmbeddings]:
    """`embed_tokens` for more than memory holds: a packed matrix per so many prompts, in order.

    prompts: anything that gives prompts one by one, such as the lines of a file; it is read as blocks are taken, one
    block ahead, so that at most two blocks of prompts are within the engine. Leaving the loop cancels what waits.

    Raises:
        as `embed_tokens`, when it is called for wrong options, in the loop for wrong prompts.
    """
    if isinstance(prompts, str | Mapping) or type(prompts_per_block) is not int or prompts_per_block < 1:
        raise InvalidRequest(
            "embed_tokens_in_blocks takes prompts one by one, and prompts_per_block from 1, "
            f"got {type(prompts).__name__} and {prompts_per_block!r}."
        )
    asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
    pack = _packing(self, input_type, token_pooling_factor, precision)
    rest = iter(each(prompts, "prompts"))
    groups = iter(lambda: list(itertools.islice(rest, prompts_per_block)), [])
    submitted = (
        self.engine.submit(requests_of(self.engine, group, "token_embed", asked, number * prompts_per_block))
        for number, group in enumerate(groups)
    )
    return _blocks(submitted, pack, prompts_per_block)


def _blocks(
    submitted: Iterator[Sequence[Future[Answer]]],
    pack: Callable[[Sequence[Answer]], TokenEmbeddings],
    prompts_per_block: int,
) -> Iterator[TokenEmbeddings]:
    """The blocks in order. submitted: starts work on a group of prompts when it is asked for the next."""
    flying: deque[Sequence[Future[Answer]]] = deque()
    firsts = itertools.count(0, prompts_per_block)

    process = os.getpid()

    def packed() -> TokenEmbeddings:
        if os.getpid() != process:
            raise EngineError("This process was forked amid the blocks, which the other one reads: ask here anew.")
        first = next(firsts)
        return pack(wait(flying.popleft(), False, "", lambda index: prompt_place(first + index)))

    try:
        for futures in submitted:
            flying.append(futures)
            if len(flying) > _BLOCKS_AHEAD:
                yield packed()
        while flying:
            yield packed()
    finally:
        # Without names of this module: at the interpreter's end they are gone.
        for futures in flying:
            for future in futures:
                future.cancel()


def _packing(
    llm: LLM, input_type: str | None, factor: float | None, precision: str
) -> Callable[[Sequence[Answer]], TokenEmbeddings]:
    """How answers become one matrix."""
    wanted = parse_precision(precision)
    if factor is not None:
        check_factor(factor, role_of(input_type))

    def pack(answers: Sequence[Answer]) -> TokenEmbeddings:
        matrices = [answer.array for answer in answers]
        if factor is not None:
            matrices = [pooled(matrix, factor) for matrix in matrices]
        return TokenEmbeddings.of(matrices, wanted, llm.engine.calibration)

    return pack
