"""LLM: pooling models from Python; the methods of vLLM's class of the same name, and async twins."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from poolhouse.engine.answers import pooling
from poolhouse.engine.open import open_engine
from poolhouse.engine.waiting import gather
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

if TYPE_CHECKING:
    from poolhouse.models.model import Model

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

    def __init__(self, model: str | None = None, **options: Any) -> None:
        self.settings = Settings.parse(model=model, **options)
        self.engine = open_engine(self.settings)
        self._numbers = itertools.count()
        weakref.finalize(self, self.engine.close)

    @property
    def model(self) -> Model:
        return self.engine.model

    def embed(
        self,
        prompts: Any,
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

        prompts: a text, token ids, TextPrompt, TokensPrompt, or a list of them.
        prompt_name: a prompt stored with the checkpoint ("query", "document"), put before each text;
            None takes the checkpoint's default, "" none.
        lora_request: a LoRARequest or an adapter's name, one for all prompts or one per prompt; "" uses no adapter.
        task: a task adapter of the checkpoint ("retrieval.query"), with the prompt stored under its name.
        input_type: what the texts are, "query" or "document": chooses the prompt where none is named.

        Raises:
            InvalidRequest: for the first prompt, in order, that could not be answered.
        """
        asked = Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        requests = requests_of(self.engine, prompts, "embed", asked)
        return self._outputs(wait(self.engine.submit(requests), use_tqdm, "embed"), answering.embedding)

    async def embed_async(
        self,
        prompts: Any,
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
        requests = requests_of(self.engine, prompts, "embed", asked)
        return self._outputs(await gather(self.engine.submit(requests)), answering.embedding)

    def embed_array(
        self,
        prompts: Any,
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
        prompts: Any,
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
        return self._outputs(wait(self.engine.submit(requests), use_tqdm, str(pooling_task)), pooling)

    async def encode_async(
        self,
        prompts: Any,
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
        return self._outputs(await gather(self.engine.submit(requests)), pooling)

    def classify(
        self,
        prompts: Any,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        tokenization_kwargs: Options = None,
    ) -> list[ClassificationRequestOutput]:
        """The probability of each label, and the name of the likeliest, per prompt in input order.

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
        prompts: Any,
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

        data_1, data_2: a text or a list of them (queries, documents), 1:1, 1:N or N:N.
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
        plan = score_plan(self.engine, data_1, data_2, asked, joining)
        return self._outputs(plan.finish(wait(self.engine.submit(plan.requests), use_tqdm, "score")), answering.scored)

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
        plan = score_plan(self.engine, data_1, data_2, asked, joining)
        return self._outputs(plan.finish(await gather(self.engine.submit(plan.requests))), answering.scored)

    def reward(
        self,
        prompts: Any,
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
        self.engine.close()

    def __repr__(self) -> str:
        facts, tasks = self.model.facts, ", ".join(self.engine.tasks)
        width = f", {facts.width} dimensions" if "embed" in self.engine.tasks else ""
        where = f"{str(facts.dtype).removeprefix('torch.')} on {facts.device}"
        state = "" if self.engine.alive else ", closed"
        return f"LLM({facts.name!r}: {tasks}{width}, {where}, {facts.served_by}{state})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _outputs(self, answers: Iterable[T], build: Callable[[str, T], OutputT]) -> list[OutputT]:
        return [build(str(next(self._numbers)), answer) for answer in answers]
