"""`LLM.embed_sparse`, its async twin, and the same for a corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from poolhouse.engine.answers import facts_of
from poolhouse.engine.request import Answer
from poolhouse.engine.waiting import gather, located, prompt_place
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.prompts import Prompts
from poolhouse.llm.answering import shown
from poolhouse.llm.asking import Asked, Options, Pruning, sparse_plan
from poolhouse.outputs import SparseMatrix, SparseRequestOutput
from poolhouse.params import PoolingParams
from poolhouse.sparse import Plan, Sparse

if TYPE_CHECKING:
    from poolhouse.engine.engine import Engine
    from poolhouse.llm.llm import LLM

# SPLADE answers with the whole vocabulary: a window of answers holds at most so many numbers (256 MB), or prompts.
_MOST_NUMBERS, _MOST_PROMPTS = 2**26, 4096


def embed_sparse(
    self: LLM,
    prompts: Prompts,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: PoolingParams | None = None,
    prompt_name: str | None = None,
    input_type: str | None = None,
    lora_request: Any = None,
    tokenization_kwargs: Options = None,
) -> list[SparseRequestOutput]:
    """A sparse vector per prompt, in input order: of SPLADE models, and of BGE-M3.

    BGE-M3 weighs the text's own tokens: each once, with its largest weight, special tokens left out.
    top_k: keep so many entries, the largest. threshold: leave out entries that weigh less.
    input_type: "query" or "document", for models that treat them apart.

    Raises:
        UnsupportedTask: the model has no sparse vectors. InvalidRequest: for the first prompt that could not be answered.
    """
    asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, input_type=input_type)
    plan = sparse_plan(self.engine, prompts, asked, Pruning(top_k, threshold))
    return self._outputs(_streamed(self.engine, plan, use_tqdm), _output)


async def embed_sparse_async(
    self: LLM,
    prompts: Prompts,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    pooling_params: PoolingParams | None = None,
    prompt_name: str | None = None,
    input_type: str | None = None,
    lora_request: Any = None,
    tokenization_kwargs: Options = None,
) -> list[SparseRequestOutput]:
    """`embed_sparse` for coroutines; cancelling it takes the prompts out of the queue."""
    asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, input_type=input_type)
    plan = sparse_plan(self.engine, prompts, asked, Pruning(top_k, threshold))
    return self._outputs(plan.finish(await gather(self.engine.submit(plan.requests))), _output)


def embed_sparse_array(
    self: LLM,
    prompts: Prompts,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: PoolingParams | None = None,
    prompt_name: str | None = None,
    input_type: str | None = None,
    lora_request: Any = None,
    tokenization_kwargs: Options = None,
) -> SparseMatrix:
    """`embed_sparse` as one matrix in compressed rows, for a corpus; cuts are not reported here."""
    asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, input_type=input_type)
    plan = sparse_plan(self.engine, prompts, asked, Pruning(top_k, threshold))
    vectors = (sparse.vector for sparse in _streamed(self.engine, plan, use_tqdm))
    return SparseMatrix.of(vectors, plan.head.width)


def _streamed(engine: Engine, plan: Plan, progress: bool | Callable[..., Any]) -> Iterator[Sparse]:
    """Vectors in order; the first failure is raised, and what still waits is cancelled."""
    size = max(1, min(_MOST_PROMPTS, _MOST_NUMBERS // engine.model.pipelines[plan.head.task].width))
    return iter(shown(_windows(engine, plan, size), len(plan.requests), progress, "embed_sparse"))


def _windows(engine: Engine, plan: Plan, size: int) -> Iterator[Sparse]:
    """Vectors in order. The next window is under way while one is read; both let go of their answers afterwards."""
    requests = plan.requests[::-1]
    plan.requests.clear()
    waiting: list[Future[Answer]] = []
    ahead: list[Future[Answer]] = []
    first = 0
    try:
        while waiting or requests:
            ahead = engine.submit([requests.pop() for _ in range(min(size, len(requests)))])
            yield from (plan.each(future.result()) for future in waiting)
            first += len(waiting)
            waiting, ahead = ahead, []
    except BaseException as error:
        for future in (*waiting, *ahead):
            future.cancel()
        if isinstance(error, InvalidRequest):
            raise located(error, waiting, lambda index: prompt_place(first + index)) from None
        raise


def _output(request_id: str, sparse: Sparse) -> SparseRequestOutput:
    return SparseRequestOutput(request_id, sparse.vector, **facts_of(sparse.tokens, sparse.chunks))
