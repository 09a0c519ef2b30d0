"""LLM: pooling models from Python; the methods of vLLM's class of the same name, and async twins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from poolhouse.engine.request import Answer, Request, prompt_fields
from poolhouse.engine.waiting import gather
from poolhouse.errors import UnsupportedTask
from poolhouse.inputs.prompts import PromptsInput
from poolhouse.llm.requests import Asked, Options, Params, requests_of
from poolhouse.llm.results import wait
from poolhouse.outputs import TokenClassificationOutput, TokenClassificationRequestOutput
from poolhouse.vectors.entities import Strategy, entities, parse_strategy, probabilities

if TYPE_CHECKING:
    from poolhouse.engine.engine import Engine
import asyncio
import itertools
import os
import re
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from poolhouse.engine.open import open_engine
from poolhouse.engine.request import token_fields
from poolhouse.engine.waiting import prompt_path, with_path
from poolhouse.errors import EngineError, InvalidRequest
from poolhouse.inputs.prompts import PromptInput, each, role_of
from poolhouse.llm import results
from poolhouse.llm.requests import Joining, Pruning, required_task, score_plan, sparse_plan
from poolhouse.llm.results import shown
from poolhouse.outputs import (
    ChunkedEmbeddingRequestOutput,
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
    SparseMatrix,
    SparseRequestOutput,
)
from poolhouse.params import PoolingParams
from poolhouse.plans.late_chunking import Chunked, Chunking, ChunkPlan, plan
from poolhouse.plans.sparse import Sparse, SparsePlan
from poolhouse.settings import Settings
from poolhouse.tasks import Task
from poolhouse.vectors.precision import Codes, parse_precision, quantize
from poolhouse.vectors.token_embeddings import TokenEmbeddings
from poolhouse.vectors.token_pooling import check_factor, pooled

if TYPE_CHECKING:
    from poolhouse.engine.engine import Engine
    from poolhouse.models.model import Model
from poolhouse.engine.request import pooling_outputs
from poolhouse.plugins import Plugin, is_data, params_of, prompts_of, task_of
from poolhouse.tasks import parse_task

if TYPE_CHECKING:
    from poolhouse.engine.engine import Engine


def token_classify(
    self: LLM,
    prompts: PromptsInput,
    *,
    aggregation_strategy: str = "simple",
    ignore_labels: Collection[str] = ("O",),
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: Params = None,
    prompt_name: str | None = None,
    lora_request: Any = None,
    tokenization_kwargs: Options = None,
) -> list[TokenClassificationRequestOutput]:
    """The labels of every token, and the entities that they make, per text in input order.

    aggregation_strategy: none (each token by itself), simple (neighbours of one label), or first, average, max (the
    tokens of a word agree first); numbers as in transformers' pipeline. Offsets are characters of the text as given.

    Raises:
        UnsupportedTask: the model has no labels per token, or does not answer with a row for each.
        InvalidRequest: for the first prompt that could not be answered; token ids, which have no characters.
    """
    strategy = parse_strategy(aggregation_strategy)
    requests = _label_requests(
        self.engine, prompts, Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request)
    )
    answers = wait(self.engine.submit(requests), use_tqdm, "token_classify")
    return self._outputs(zip(requests, answers, strict=True), _labelled(self.engine, strategy, ignore_labels))


async def token_classify_async(
    self: LLM,
    prompts: PromptsInput,
    *,
    aggregation_strategy: str = "simple",
    ignore_labels: Collection[str] = ("O",),
    pooling_params: Params = None,
    prompt_name: str | None = None,
    lora_request: Any = None,
    tokenization_kwargs: Options = None,
) -> list[TokenClassificationRequestOutput]:
    """`token_classify` for coroutines; cancelling it takes the prompts out of the queue."""
    strategy = parse_strategy(aggregation_strategy)
    requests = _label_requests(
        self.engine, prompts, Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request)
    )
    answers = await gather(self.engine.submit(requests))
    return self._outputs(zip(requests, answers, strict=True), _labelled(self.engine, strategy, ignore_labels))


def _label_requests(engine: Engine, prompts: PromptsInput, asked: Asked) -> Sequence[Request]:
    requests = requests_of(engine, prompts, "token_classify", asked)
    return [replace(request, offsets=True) for request in requests]


def _labelled(
    engine: Engine, strategy: Strategy, ignored: Collection[str]
) -> Callable[[str, tuple[Request, Answer]], TokenClassificationRequestOutput]:
    pipeline = engine.model.pipelines["token_classify"]

    def build(request_id: str, pair: tuple[Request, Answer]) -> TokenClassificationRequestOutput:
        request, answer = pair
        text, offsets, scores = request.prompt.text, answer.tokens.offsets, answer.array
        if engine.facts.token_weights:
            raise UnsupportedTask("This model weighs tokens, it does not label them; use embed_sparse or encode.")
        if len(scores) != len(answer.tokens):
            raise UnsupportedTask(
                "Entities need a row per token, but this model pools steps (STEP); use encode instead."
            )
        assert text is not None
        assert offsets is not None
        if not pipeline.activates(request.params):
            scores = probabilities(scores)
        found = entities(text, scores, offsets, engine.facts.label_names, strategy, ignored)
        output = TokenClassificationOutput(answer.array, tuple(found))
        return TokenClassificationRequestOutput(request_id, output, **prompt_fields(answer))

    return build


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
) -> ChunkPlan:
    alone = isinstance(texts, str | Mapping)
    spans = [chunks] if alone and chunks is not None else chunks
    requests = requests_of(llm.engine, texts, "embed", asked)
    return plan(llm.engine, requests, Chunking(chunk_size, spans, separator, overlap))


def _place(_: int) -> str:
    """A text may be read in several windows, each a request."""
    return "texts"


def _chunked(request_id: str, chunked: Chunked) -> ChunkedEmbeddingRequestOutput:
    return ChunkedEmbeddingRequestOutput(request_id, chunked.chunks, **token_fields(chunked.tokens, chunked.windows))


# SPLADE answers with the whole vocabulary: a window of answers holds at most so many numbers (256 MB), or prompts.
_MOST_NUMBERS, _MOST_PROMPTS = 2**26, 4096


def embed_sparse(
    self: LLM,
    prompts: PromptsInput,
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
    prompts: PromptsInput,
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
    prompts: PromptsInput,
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


def _streamed(engine: Engine, plan: SparsePlan, progress: bool | Callable[..., Any]) -> Iterator[Sparse]:
    """Vectors in order; the first failure is raised, and what still waits is cancelled."""
    size = max(1, min(_MOST_PROMPTS, _MOST_NUMBERS // engine.model.pipelines[plan.head.task].width))
    return iter(shown(_windows(engine, plan, size), len(plan.requests), progress, "embed_sparse"))


def _windows(engine: Engine, plan: SparsePlan, size: int) -> Iterator[Sparse]:
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
            raise with_path(error, waiting, lambda index: prompt_path(first + index)) from None
        raise


def _output(request_id: str, sparse: Sparse) -> SparseRequestOutput:
    return SparseRequestOutput(request_id, sparse.vector, **token_fields(sparse.tokens, sparse.chunks))


# While one block is packed or used by the caller, the engine reads the next.
_BLOCKS_AHEAD = 1


def embed_tokens(
    self: LLM,
    prompts: PromptsInput,
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
    prompts: PromptsInput,
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
    prompts: Iterable[PromptInput],
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
        return pack(wait(flying.popleft(), False, "", lambda index: prompt_path(first + index)))

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
        return TokenEmbeddings.of(matrices, wanted, llm.engine.facts.calibration)

    return pack


# Those of unpickled or copied LLMs by the key of the original. Kept, because a pool of processes unpickles its function,
# and an LLM with it, for every piece of work.
_copies: dict[str, Engine] = {}
_opening = threading.Lock()
T = TypeVar("T")
OutputT = TypeVar("OutputT", bound=RequestOutput[Any])


class LLM:
    """A pooling model and the engine that runs it.

    Safe from several threads at once; several may live in one process. Without `model` it takes the embedded
    default, all-MiniLM-L6-v2. Options are those of `poolhouse.settings.Settings`, by keyword.

    Raises:
        ConfigError: an option that is unknown or cannot be honoured.
        CheckpointError: model files that are missing, corrupt or not understood.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self.settings = Settings.parse(model=model, **options)
        self._key = uuid.uuid4().hex
        self._engine: Engine | None = open_engine(self.settings)
        self._numbers = itertools.count()

    @property
    def engine(self) -> Engine:
        """What answers; of a copy, opened when it is first asked for."""
        if self._engine is None:
            self._engine = _engine_of_copies(self._key, self.settings)
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the settings, and opens the model again where it is used."""
        return {**self.__dict__, "_engine": None, "_numbers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _numbers=itertools.count())

    @property
    def model(self) -> Model:
        return self.engine.model

    def embed(
        self,
        prompts: PromptsInput,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        task: str | None = None,
        tokenization_kwargs: Options = None,
        input_type: str | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt, in input order.

        Of a model whose first task is token_embed it is a matrix per prompt, in a `PoolingRequestOutput`, as in vLLM.
        prompts: a text, token ids, TextPrompt, TokensPrompt, a pair of texts ({"text", "text_pair"}, or a tuple within
            a list), or many of them: a list, a pandas Series, an array of texts, a column of a dataset, a generator.
        prompt_name: a prompt stored with the checkpoint ("query", "document"), put before each text;
            None takes the checkpoint's default, "" none.
        lora_request: a LoRARequest or an adapter's name, one for all prompts or one per prompt; "" uses no adapter.
        task: a task adapter of the checkpoint ("retrieval.query"), with the prompt stored under its name.
        input_type: what the texts are, "query" or "document": chooses the prompt where none is named.

        Raises:
            InvalidRequest: for the first prompt, in order, that could not be answered.
        """
        asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        requests = requests_of(self.engine, prompts, self._vectors, asked)
        answers = wait(self.engine.submit(requests), use_tqdm, self._vectors)
        return self._outputs(zip(requests, answers, strict=True), results.embedded(self.engine))

    async def embed_async(
        self,
        prompts: PromptsInput,
        *,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        task: str | None = None,
        tokenization_kwargs: Options = None,
        input_type: str | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """`embed` for coroutines; cancelling it takes the prompts out of the queue."""
        asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        requests = requests_of(self.engine, prompts, self._vectors, asked)
        answers = await gather(self.engine.submit(requests))
        return self._outputs(zip(requests, answers, strict=True), results.embedded(self.engine))

    def embed_array(
        self,
        prompts: PromptsInput,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        task: str | None = None,
        tokenization_kwargs: Options = None,
        input_type: str | None = None,
        precision: str = "float32",
    ) -> Codes:
        """`embed` as one matrix, [prompts, dimensions]; cuts are not reported here.

        precision: float32, float16, int8, uint8; bfloat16 and fp8_e4m3, fp8_e5m2 as bit patterns (uint16, uint8);
            binary (int8) and ubinary (uint8) with eight dimensions per byte. `poolhouse.vectors.precision.dequantize` reads them.
        """
        wanted = parse_precision(precision)
        asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        requests = requests_of(self.engine, prompts, "embed", asked)
        vectors = np.stack([answer.array for answer in wait(self.engine.submit(requests), use_tqdm, "embed")])
        return quantize(vectors, wanted, self.engine.facts.calibration)

    def encode(
        self,
        prompts: PromptsInput,
        pooling_params: Params = None,
        *,
        pooling_task: str | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        prompt_name: str | None = None,
        lora_request: Any = None,
        task: str | None = None,
        tokenization_kwargs: Options = None,
        input_type: str | None = None,
    ) -> list[PoolingRequestOutput]:
        """The pooled rows of any task: one row per prompt, or one per token for the token tasks.

        BGE-M3's weights (token_classify) are one number per token.

        `pooling_task="plugin"` takes `{"data": ...}`, and `outputs` is what the plugin makes of it.
        `input_type` says which side of a search the texts stand on: late interaction reads queries otherwise than
        documents, and takes all texts for documents unless told so.

        Raises:
            UnsupportedTask: the model lacks the task; the message names what it has.
        """
        asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        plugin = wanted(self.engine, prompts, pooling_task)
        if plugin is not None:
            return encode(self.engine, plugin, prompts, asked, use_tqdm)
        requests = requests_of(self.engine, prompts, required_task(pooling_task, pooling_params, self.engine), asked)
        answers = wait(self.engine.submit(requests), use_tqdm, str(pooling_task))
        return self._outputs(zip(requests, answers, strict=True), results.pooled(self.engine))

    async def encode_async(
        self,
        prompts: PromptsInput,
        pooling_params: Params = None,
        *,
        pooling_task: str | None = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        task: str | None = None,
        tokenization_kwargs: Options = None,
        input_type: str | None = None,
    ) -> list[PoolingRequestOutput]:
        """`encode` for coroutines; cancelling it takes the prompts out of the queue."""
        asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        plugin = wanted(self.engine, prompts, pooling_task)
        if plugin is not None:
            return await encode_async(self.engine, plugin, prompts, asked)
        requests = requests_of(self.engine, prompts, required_task(pooling_task, pooling_params, self.engine), asked)
        answers = await gather(self.engine.submit(requests))
        return self._outputs(zip(requests, answers, strict=True), results.pooled(self.engine))

    def classify(
        self,
        prompts: PromptsInput,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Options = None,
    ) -> list[ClassificationRequestOutput]:
        """The probability of each label, and the name of the likeliest, per prompt in input order.

        prompts: as for `embed`; pairs, such as premise and hypothesis, are read together, as the model was trained.
        `PoolingParams(use_activation=False)` asks for logits instead.

        Raises:
            UnsupportedTask: the model is no classifier; the message says how to make it one.
        """
        asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request)
        requests = requests_of(self.engine, prompts, "classify", asked)
        return self._outputs(
            wait(self.engine.submit(requests), use_tqdm, "classify"),
            results.classification(self.engine.facts.label_names),
        )

    async def classify_async(
        self,
        prompts: PromptsInput,
        *,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Options = None,
    ) -> list[ClassificationRequestOutput]:
        """`classify` for coroutines; cancelling it takes the prompts out of the queue."""
        asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request)
        requests = requests_of(self.engine, prompts, "classify", asked)
        return self._outputs(
            await gather(self.engine.submit(requests)), results.classification(self.engine.facts.label_names)
        )

    def score(
        self,
        data_1: Any,
        data_2: Any,
        /,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Options = None,
        instruction: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Options = None,
        mode: str | None = None,
        weights: Sequence[float] | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well each pair of texts fits: by a cross-encoder, else by cosine, else by late interaction.

        data_1, data_2: a text or many of them (queries, documents), 1:1, 1:N or N:N: lists, arrays, columns, generators.
        instruction: what makes a document fit, for rerankers that read one.
        chat_template: joins the two texts of a pair: a file, its text, or a built-in name; chat_template_kwargs: its
            further variables.
        mode: what is compared instead: dense, sparse or colbert answers, or their weighted mean ("weighted",
            "sparse+dense"), as FlagEmbedding does for BGE-M3. weights: of the dense, sparse and colbert scores.

        Raises:
            InvalidRequest: lists that do not fit together. UnsupportedTask: a model that cannot score, and why.
        """
        asked = Asked(pooling_params, None, tokenization_kwargs, lora_request)
        joining = Joining(instruction, chat_template, chat_template_kwargs, mode, weights)
        plan, place = score_plan(self.engine, data_1, data_2, asked, joining)
        answers = wait(self.engine.submit(plan.requests), use_tqdm, "score", place)
        return self._outputs(plan.finish(answers), results.scored)

    async def score_async(
        self,
        data_1: Any,
        data_2: Any,
        /,
        *,
        pooling_params: PoolingParams | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Options = None,
        instruction: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Options = None,
        mode: str | None = None,
        weights: Sequence[float] | None = None,
    ) -> list[ScoringRequestOutput]:
        """`score` for coroutines; cancelling it takes the pairs out of the queue."""
        asked = Asked(pooling_params, None, tokenization_kwargs, lora_request)
        joining = Joining(instruction, chat_template, chat_template_kwargs, mode, weights)
        plan, place = score_plan(self.engine, data_1, data_2, asked, joining)
        answers = await gather(self.engine.submit(plan.requests), place)
        return self._outputs(plan.finish(answers), results.scored)

    def reward(
        self,
        prompts: PromptsInput,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Options = None,
    ) -> list[PoolingRequestOutput]:
        """The reward of every token, or of every step for process reward models: `encode` with token_classify."""
        return self.encode(
            prompts,
            pooling_params,
            pooling_task="token_classify",
            use_tqdm=use_tqdm,
            prompt_name=prompt_name,
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
        )

    # Long enough for files of their own.
    token_classify = token_classify
    token_classify_async = token_classify_async
    embed_chunks = embed_chunks
    embed_chunks_async = embed_chunks_async
    embed_sparse = embed_sparse
    embed_sparse_async = embed_sparse_async
    embed_sparse_array = embed_sparse_array
    embed_tokens = embed_tokens
    embed_tokens_async = embed_tokens_async
    embed_tokens_in_blocks = embed_tokens_in_blocks

    def close(self) -> None:
        """Finish what was submitted and free the engine's threads."""
        if self._engine is not None:
            self._engine.close()

    def __repr__(self) -> str:
        if self._engine is None:
            return f"LLM({self.settings.model or 'the embedded default'!r}: a copy, not open yet)"
        facts, tasks = self.model.facts, ", ".join(self.engine.facts.tasks)
        width = f", {facts.width} dimensions" if "embed" in self.engine.facts.tasks else ""
        where = f"{str(facts.dtype).removeprefix('torch.')} on {facts.device}"
        state = "" if self.engine.alive else ", closed"
        return f"LLM({facts.name!r}: {tasks}{width}, {where}, {facts.served_by}{state})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _vectors(self) -> Task:
        """The task of `embed`."""
        return "token_embed" if self.engine.facts.tasks[0] == "token_embed" else "embed"

    def _outputs(self, answers: Iterable[T], build: Callable[[str, T], OutputT]) -> list[OutputT]:
        return [build(str(next(self._numbers)), answer) for answer in answers]


def _engine_of_copies(key: str, settings: Settings) -> Engine:
    """The engine that the copies of one LLM share in this process; a new one where none is open."""
    with _opening:
        engine = _copies.get(key)
        if engine is None or not engine.alive:
            engine = _copies[key] = open_engine(settings)
        return engine


def wanted(engine: Engine, prompts: Any, pooling_task: str | None) -> Plugin | None:
    """The plugin, where the call is meant for it.

    Raises:
        InvalidRequest: a plugin's data in a call for another task. UnsupportedTask: no plugin.
    """
    if pooling_task == "plugin":
        if engine.facts.plugin is None:
            parse_task("plugin", engine.facts.tasks)
        return engine.facts.plugin
    if is_data(prompts):
        raise InvalidRequest('Prompts of the form {"data": ...} are for pooling_task="plugin".', "pooling_task")
    return None


def encode(
    engine: Engine,
    plugin: Plugin,
    data: Any,
    asked: Asked,
    use_tqdm: bool | Callable[..., Any],
) -> list[PoolingRequestOutput]:
    """One output, whose `outputs` is what the plugin makes of the answers."""
    requests = _plugin_requests(engine, plugin, data, asked)
    return _processed(engine, plugin, wait(engine.submit(requests), use_tqdm, "plugin"))


async def encode_async(engine: Engine, plugin: Plugin, data: Any, asked: Asked) -> list[PoolingRequestOutput]:
    """`encode` for coroutines; the plugin's own work is done in a thread."""
    requests = await asyncio.to_thread(_plugin_requests, engine, plugin, data, asked)
    answers = await gather(engine.submit(requests))
    return await asyncio.to_thread(_processed, engine, plugin, answers)


def _plugin_requests(engine: Engine, plugin: Plugin, data: Any, asked: Asked) -> list[Request]:
    params = asked.params
    if params is not None and not isinstance(params, PoolingParams):
        raise InvalidRequest("pooling_params: a plugin takes one PoolingParams for all its prompts.", "pooling_params")
    task = parse_task(task_of(plugin, engine.facts.tasks), engine.facts.tasks)
    merged = params_of(plugin, params)
    return requests_of(engine, prompts_of(plugin, data), task, replace(asked, params=merged))


def _processed(engine: Engine, plugin: Plugin, answers: Sequence[Answer]) -> list[PoolingRequestOutput]:
    # As in vLLM: the plugin decides what `outputs` is, and the whole has no id.
    made: Any = plugin.post_process(pooling_outputs(answers, task_of(plugin, engine.facts.tasks), engine))
    return [PoolingRequestOutput("", made, [])]
