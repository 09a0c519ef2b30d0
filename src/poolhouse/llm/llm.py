"""LLM: pooling models from Python; the methods of vLLM's class of the same name, and async twins."""

from __future__ import annotations

import itertools
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from poolhouse.engine.open import open_engine
from poolhouse.engine.waiting import gather
from poolhouse.inputs.prompts import Prompts
from poolhouse.llm import answering, chunking, labelling, multi_vector, plugging, weighing
from poolhouse.llm.answering import wait
from poolhouse.llm.asking import Asked, Joining, Options, Params, requests_of, required_task, score_plan
from poolhouse.outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from poolhouse.params import PoolingParams
from poolhouse.precision import Codes, parse_precision, quantize
from poolhouse.settings import Settings
from poolhouse.tasks import Task

if TYPE_CHECKING:
    from poolhouse.engine.engine import Engine
    from poolhouse.models.model import Model

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
        prompts: Prompts,
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
        return self._outputs(zip(requests, answers, strict=True), answering.embedded(self.engine))

    async def embed_async(
        self,
        prompts: Prompts,
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
        return self._outputs(zip(requests, answers, strict=True), answering.embedded(self.engine))

    def embed_array(
        self,
        prompts: Prompts,
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
            binary (int8) and ubinary (uint8) with eight dimensions per byte. `poolhouse.precision.dequantize` reads them.
        """
        wanted = parse_precision(precision)
        asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        requests = requests_of(self.engine, prompts, "embed", asked)
        vectors = np.stack([answer.array for answer in wait(self.engine.submit(requests), use_tqdm, "embed")])
        return quantize(vectors, wanted, self.engine.calibration)

    def encode(
        self,
        prompts: Prompts,
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
        plugin = plugging.wanted(self.engine, prompts, pooling_task)
        if plugin is not None:
            return plugging.encode(self.engine, plugin, prompts, asked, use_tqdm)
        requests = requests_of(self.engine, prompts, required_task(pooling_task, pooling_params, self.engine), asked)
        answers = wait(self.engine.submit(requests), use_tqdm, str(pooling_task))
        return self._outputs(zip(requests, answers, strict=True), answering.pooled(self.engine))

    async def encode_async(
        self,
        prompts: Prompts,
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
        plugin = plugging.wanted(self.engine, prompts, pooling_task)
        if plugin is not None:
            return await plugging.encode_async(self.engine, plugin, prompts, asked)
        requests = requests_of(self.engine, prompts, required_task(pooling_task, pooling_params, self.engine), asked)
        answers = await gather(self.engine.submit(requests))
        return self._outputs(zip(requests, answers, strict=True), answering.pooled(self.engine))

    def classify(
        self,
        prompts: Prompts,
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
            wait(self.engine.submit(requests), use_tqdm, "classify"), answering.classification(self.engine.label_names)
        )

    async def classify_async(
        self,
        prompts: Prompts,
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
            await gather(self.engine.submit(requests)), answering.classification(self.engine.label_names)
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
        return self._outputs(plan.finish(answers), answering.scored)

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
        return self._outputs(plan.finish(answers), answering.scored)

    def reward(
        self,
        prompts: Prompts,
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
    token_classify = labelling.token_classify
    token_classify_async = labelling.token_classify_async
    embed_chunks = chunking.embed_chunks
    embed_chunks_async = chunking.embed_chunks_async
    embed_sparse = weighing.embed_sparse
    embed_sparse_async = weighing.embed_sparse_async
    embed_sparse_array = weighing.embed_sparse_array
    embed_tokens = multi_vector.embed_tokens
    embed_tokens_async = multi_vector.embed_tokens_async
    embed_tokens_in_blocks = multi_vector.embed_tokens_in_blocks

    def close(self) -> None:
        """Finish what was submitted and free the engine's threads."""
        if self._engine is not None:
            self._engine.close()

    def __repr__(self) -> str:
        if self._engine is None:
            return f"LLM({self.settings.model or 'the embedded default'!r}: a copy, not open yet)"
        facts, tasks = self.model.facts, ", ".join(self.engine.tasks)
        width = f", {facts.width} dimensions" if "embed" in self.engine.tasks else ""
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
        return "token_embed" if self.engine.tasks[0] == "token_embed" else "embed"

    def _outputs(self, answers: Iterable[T], build: Callable[[str, T], OutputT]) -> list[OutputT]:
        return [build(str(next(self._numbers)), answer) for answer in answers]


def _engine_of_copies(key: str, settings: Settings) -> Engine:
    """The engine that the copies of one LLM share in this process; a new one where none is open."""
    with _opening:
        engine = _copies.get(key)
        if engine is None or not engine.alive:
            engine = _copies[key] = open_engine(settings)
        return engine
