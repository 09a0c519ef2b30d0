"""LLM: pooling models from Python; the methods of vLLM's class of the same name, and their async versions."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import threading
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from poolhouse.engine.interface import OfflineEngine
from poolhouse.engine.replicas import start_engine
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.waiting import prompt_path
from poolhouse.errors import ConfigError, InvalidRequest, PoolhouseError, did_you_mean
from poolhouse.inputs.labels import LabelSet
from poolhouse.inputs.prompts import PromptInput, PromptsInput, TextsInput, each, parse_texts
from poolhouse.inputs.templates.score import score_template
from poolhouse.llm import calls
from poolhouse.llm.calls import Call, Described, Progress, blocking, coroutine, of_answers, read_ahead, results_of
from poolhouse.llm.requests import (
    Adapters,
    CallOptions,
    Params,
    Pruning,
    Variables,
    asked_labels,
    asked_of,
    asked_scores,
    one_for_all,
    plugin_of,
    plugin_requests,
    requests_of,
    required_task,
    score_plan,
    several_plan,
    sparse_asked,
    with_labels,
)
from poolhouse.llm.streams import Stream
from poolhouse.outputs import (
    ChunkedEmbeddingRequestOutput,
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    ExtractionRequestOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
    SparseMatrix,
    SparseRequestOutput,
    TokenClassificationRequestOutput,
)
from poolhouse.params import PoolingParams, PruningParams
from poolhouse.plans import late_chunking
from poolhouse.plans.late_chunking import Chunking, Span
from poolhouse.plans.scoring import ScoreOptions
from poolhouse.plans.sparse import SparseOptions
from poolhouse.plans.zero_shot import LabelOptions
from poolhouse.plugins import PluginPrompt
from poolhouse.settings import Settings
from poolhouse.tasks import SparseHead, Task
from poolhouse.vectors.entities import parse_strategy
from poolhouse.vectors.muvera import Muvera
from poolhouse.vectors.precision import Codes, parse_precision, quantize
from poolhouse.vectors.token_embeddings import TokenEmbeddings

if TYPE_CHECKING:
    from poolhouse.models.model import Model

T = TypeVar("T")
OutputT = TypeVar("OutputT", bound=RequestOutput[Any])

# Items of a stream that are asked together where each answer is large.
_LARGE_WINDOW = 256
# SPLADE answers with the whole vocabulary: a window of answers holds at most so many numbers (256 MB), or prompts.
_MAX_NUMBERS, _MAX_PROMPTS = 2**26, 4096


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
        self._engine: OfflineEngine | None = start_engine(self.settings)
        self._numbers = itertools.count()

    @property
    def engine(self) -> OfflineEngine:
        """What answers; of a copy, opened when it is first asked for."""
        if self._engine is None:
            self._engine = shared_engine(self._key, self.settings)
        return self._engine

    def __getstate__(self) -> dict[str, object]:
        """A copy has the settings, and opens the model again where it is used."""
        return {**self.__dict__, "_engine": None, "_numbers": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _numbers=itertools.count())

    @property
    def model(self) -> Model:
        """The model itself.

        Raises:
            ConfigError: it is in other processes.
        """
        from poolhouse.engine.engine import Engine

        if not isinstance(self.engine, Engine):
            raise ConfigError(
                f"replicas={self.settings.replicas}: the model is in other processes; this needs replicas=1."
            )
        return self.engine.model

    @blocking
    def embed(
        self,
        prompts: PromptsInput,
        *,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Adapters = None,
        task: str | None = None,
        tokenization_kwargs: Variables = None,
        input_type: str | None = None,
    ) -> Described[list[EmbeddingRequestOutput]]:
        """One vector per prompt, in input order.

        Of a model whose first task is token_embed it is a matrix per prompt, in a `PoolingRequestOutput`, as in vLLM.
        prompts: a text, token ids, TextPrompt, TokensPrompt, a pair of texts ({"text", "text_pair"}, or a tuple within
            a list), messages ({"messages"}), or many of them: a list, a pandas Series, an array of texts, a column of a
            dataset, a generator. Models that read pictures also take a PIL picture or an array [height, width, channels],
            {"content": [texts and pictures]}, which is written as the model was trained, and {"prompt", "multi_modal_data":
            {"image"}}, whose text is taken as it is and has a placeholder for each picture.
        prompt_name: a prompt stored with the checkpoint ("query", "document"), put before each text;
            None takes the checkpoint's default, "" none.
        lora_request: a LoRARequest or an adapter's name, one for all prompts or one per prompt; "" uses no adapter.
        task: a task adapter of the checkpoint ("retrieval.query"), with the prompt stored under its name.
        input_type: what the prompts are, "query" or "document": chooses the prompt where none is named.

        Raises:
            InvalidRequest: for the first prompt, in order, that could not be answered.
        """
        options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        by_token = self.engine.facts.tasks[0] == "token_embed"
        name: Task = "token_embed" if by_token else "embed"
        requests = asked_of(self.engine, prompts, name, options)
        build: Callable[[str, calls.Answered], Any] = calls.pooled(self.engine) if by_token else calls.embedded
        return Call(requests, self._each(build), name, use_tqdm)

    embed_async = coroutine(embed)

    @blocking
    def embed_array(
        self,
        prompts: PromptsInput,
        *,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Adapters = None,
        task: str | None = None,
        tokenization_kwargs: Variables = None,
        input_type: str | None = None,
        precision: str = "float32",
        muvera: Muvera | None = None,
    ) -> Described[Codes]:
        """`embed` as one matrix, [prompts, dimensions]; cuts are not reported here.

        precision: float32, float16, int8, uint8; bfloat16 and fp8_e4m3, fp8_e5m2 as bit patterns (uint16, uint8);
            binary (int8) and ubinary (uint8) with eight dimensions per byte. `poolhouse.vectors.precision.dequantize` reads them.
        muvera: make one vector of the vectors of a text's tokens, of models that have these (late interaction); `input_type`
            says whether the texts are queries or documents, which they are without it.
        """
        numbers = parse_precision(precision)
        options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        if muvera is not None:
            one_for_all(options, "muvera takes one PoolingParams for all prompts.")
            requests = asked_of(self.engine, prompts, "token_embed", options)
            encode = calls.encoding(muvera, input_type, precision, len(requests))
            return Call(requests, of_answers(encode), "embed", use_tqdm, _LARGE_WINDOW)
        requests = asked_of(self.engine, prompts, "embed", options)

        def finish(answers: Iterable[Answer]) -> Codes:
            return quantize(calls.stacked(answers, len(requests)), numbers, self.engine.facts.calibration)

        return Call(requests, of_answers(finish), "embed", use_tqdm, arrays_alone=True)

    @blocking
    def embed_sparse(
        self,
        prompts: PromptsInput,
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        use_tqdm: Progress = True,
        pooling_params: PoolingParams | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
        lora_request: Adapters = None,
        tokenization_kwargs: Variables = None,
    ) -> Described[list[SparseRequestOutput]]:
        """A sparse vector per prompt, in input order: of SPLADE models, and of BGE-M3.

        BGE-M3 weighs the text's own tokens: each once, with its largest weight, special tokens left out.
        top_k: keep so many entries, the largest. threshold: leave out entries that weigh less.
        input_type: "query" or "document", for models that treat them apart.

        Raises:
            UnsupportedTask: the model has no sparse vectors. InvalidRequest: for the first prompt that could not be answered.
        """
        options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request, input_type=input_type)
        plan, asked = sparse_asked(self.engine, prompts, options, SparseOptions(top_k=top_k, threshold=threshold))

        def finish(answers: Iterable[Answer]) -> list[SparseRequestOutput]:
            return self._outputs(map(plan.each, answers), calls.sparse_output)

        return Call(asked, of_answers(finish), "embed_sparse", use_tqdm, _window(plan.head))

    embed_sparse_async = coroutine(embed_sparse)

    @blocking
    def embed_sparse_array(
        self,
        prompts: PromptsInput,
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        use_tqdm: Progress = True,
        pooling_params: PoolingParams | None = None,
        prompt_name: str | None = None,
        input_type: str | None = None,
        lora_request: Adapters = None,
        tokenization_kwargs: Variables = None,
    ) -> Described[SparseMatrix]:
        """`embed_sparse` as one matrix in compressed rows, for a corpus; cuts are not reported here."""
        options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request, input_type=input_type)
        plan, asked = sparse_asked(self.engine, prompts, options, SparseOptions(top_k=top_k, threshold=threshold))

        def finish(answers: Iterable[Answer]) -> SparseMatrix:
            return SparseMatrix.of((plan.each(answer).vector for answer in answers), plan.head.width)

        return Call(asked, of_answers(finish), "embed_sparse", use_tqdm, _window(plan.head))

    @blocking
    def embed_tokens(
        self,
        prompts: PromptsInput,
        *,
        input_type: str | None = None,
        token_pooling_factor: float | None = None,
        precision: str = "float32",
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Adapters = None,
        task: str | None = None,
        tokenization_kwargs: Variables = None,
    ) -> Described[TokenEmbeddings]:
        """The token vectors of all prompts as one packed matrix with offsets; cuts are not reported here.

        input_type: what the prompts are, "query" or "document", for models that read them differently.
        token_pooling_factor: of documents, keep about one vector per so many, each the mean of like ones, of unit length.
        precision: as in `embed_array`; int8 and uint8 take vectors of unit length, or stored ranges.

        Raises:
            UnsupportedTask: a model without `token_embed`. InvalidRequest: for the first prompt that cannot be answered.
        """

        def describe() -> Call[TokenEmbeddings]:
            options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
            finish = calls.packing(self.engine, input_type, token_pooling_factor, precision)
            return Call(
                asked_of(self.engine, prompts, "token_embed", options), of_answers(finish), "embed_tokens", use_tqdm
            )

        return describe

    embed_tokens_async = coroutine(embed_tokens)

    def embed_tokens_in_blocks(
        self,
        prompts: Iterable[PromptInput],
        *,
        prompts_per_block: int = 1024,
        input_type: str | None = None,
        token_pooling_factor: float | None = None,
        precision: str = "float32",
        pooling_params: PoolingParams | None = None,
        prompt_name: str | None = None,
        lora_request: Adapters = None,
        task: str | None = None,
        tokenization_kwargs: Variables = None,
    ) -> Iterator[TokenEmbeddings]:
        """`embed_tokens` for more than memory holds: a packed matrix per so many prompts, in order.

        prompts: anything that gives prompts one by one, such as the lines of a file; it is read as blocks are taken, one
        block ahead, so that the engine holds at most two blocks. Leaving the loop cancels what waits.

        Raises:
            as `embed_tokens`, when it is called for wrong options, in the loop for wrong prompts.
        """
        if isinstance(prompts, str | Mapping) or type(prompts_per_block) is not int or prompts_per_block < 1:
            raise InvalidRequest(
                "embed_tokens_in_blocks takes prompts one by one, and prompts_per_block from 1, "
                f"got {type(prompts).__name__} and {prompts_per_block!r}."
            )
        options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        pack = calls.packing(self.engine, input_type, token_pooling_factor, precision)
        rest = iter(each(prompts, "prompts"))
        blocks = iter(lambda: list(itertools.islice(rest, prompts_per_block)), [])

        def requests(block: tuple[int, list[PromptInput]]) -> list[Request]:
            first, own = block
            return requests_of(self.engine, own, "token_embed", options, first)

        numbered = zip(itertools.count(0, prompts_per_block), blocks)
        return (
            pack(results_of(futures, prompt_path, first))
            for (first, _), futures in read_ahead(self.engine, numbered, requests)
        )

    @blocking
    def embed_chunks(
        self,
        texts: PromptsInput,
        *,
        chunk_size: int | None = None,
        chunks: Sequence[Span] | Sequence[Sequence[Span]] | None = None,
        separator: str | re.Pattern[str] | None = None,
        overlap: int | None = None,
        use_tqdm: Progress = True,
        pooling_params: PoolingParams | None = None,
        prompt_name: str | None = None,
        lora_request: Adapters = None,
        task: str | None = None,
        tokenization_kwargs: Variables = None,
    ) -> Described[list[ChunkedEmbeddingRequestOutput]]:
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

        def describe() -> Call[list[ChunkedEmbeddingRequestOutput]]:
            options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request, task)
            requests = requests_of(self.engine, texts, "embed", options)
            one = isinstance(texts, str | Mapping) and chunks is not None
            spans = cast("Sequence[Sequence[Span]] | None", [chunks] if one else chunks)
            chunked = late_chunking.plan(self.engine, requests, Chunking(chunk_size, spans, separator, overlap))

            def finish(answers: Iterable[Answer]) -> list[ChunkedEmbeddingRequestOutput]:
                return self._outputs(chunked.finish(list(answers)), calls.chunked)

            # A text may be read in several windows, each a request.
            return Call(chunked.requests, of_answers(finish), "embed_chunks", use_tqdm, path=lambda _: "texts")

        return describe

    embed_chunks_async = coroutine(embed_chunks, "what waits")

    @blocking
    def encode(
        self,
        prompts: PromptsInput | PluginPrompt,
        pooling_params: Params = None,
        *,
        pooling_task: str | None = None,
        use_tqdm: Progress = True,
        prompt_name: str | None = None,
        lora_request: Adapters = None,
        task: str | None = None,
        tokenization_kwargs: Variables = None,
        input_type: str | None = None,
        tasks: Sequence[str] | None = None,
    ) -> Described[list[PoolingRequestOutput]]:
        """The pooled rows of any task: one row per prompt, or one per token for the token tasks; prompts as for `embed`.

        BGE-M3's weights (token_classify) are one number per token.

        `pooling_task="plugin"` takes `{"data": ...}`, and `outputs` is what the plugin makes of it.
        `input_type`: whether the texts are queries or documents of a search, which late interaction reads differently;
        without it, all texts are documents.
        tasks: several of them from one pass, and "sparse" for sparse vectors; `outputs` is a dictionary by task then, of
        a `PoolingOutput` each, and a `SparseVector`.

        Raises:
            UnsupportedTask: the model lacks the task; the message names what it has.
        """
        options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request, task, input_type)
        if tasks is not None:
            plan = several_plan(self.engine, tasks, pooling_task, options)
            asked = replace(asked_of(self.engine, prompts, plan.first, options), further=plan.further)
            window = None if plan.sparse is None else _window(plan.sparse.head)
            return Call(asked, self._each(calls.several(self.engine, plan)), plan.first, use_tqdm, window)
        plugin = plugin_of(self.engine, prompts, pooling_task)
        if plugin is not None:
            finish = of_answers(calls.from_plugin(self.engine, plugin))
            return lambda: Call(plugin_requests(self.engine, plugin, prompts, options), finish, "plugin", use_tqdm)
        name = required_task(pooling_task, pooling_params, self.engine)
        requests = asked_of(self.engine, prompts, name, options)
        return Call(requests, self._each(calls.pooled(self.engine)), name, use_tqdm)

    encode_async = coroutine(encode)

    @blocking
    def classify(
        self,
        prompts: PromptsInput,
        *,
        labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        multi_label: bool = False,
        hypothesis_template: str | None = None,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Adapters = None,
        tokenization_kwargs: Variables = None,
    ) -> Described[list[ClassificationRequestOutput]]:
        """The probability of each label, and the name of the likeliest, per prompt in input order.

        prompts: as for `embed`, pictures too; pairs, such as premise and hypothesis, are read together, as the model was
            trained.
        labels: what the texts may be, for zero-shot classifiers; a list, or one for each text. `probs` is in their order.
        multi_label: each of them is true or false by itself; else one of them is true.
        hypothesis_template: with {} for the label, for models of entailment; by default "This example is {}."
        `PoolingParams(use_activation=False)` asks for logits instead.

        Raises:
            UnsupportedTask: the model is no classifier, or has labels of its own; the message says what to do.
        """
        options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request)
        if labels is not None:
            label_options = LabelOptions(multi_label, hypothesis_template=hypothesis_template)
            asked = asked_labels(self.engine, prompts, labels, options, label_options)

            def finish(answers: Iterable[Answer]) -> list[ClassificationRequestOutput]:
                return self._outputs(asked.finish(answers), calls.zero_shot)

            return Call(asked, of_answers(finish), "classify", use_tqdm, path=asked.path)
        if multi_label or hypothesis_template is not None:
            raise InvalidRequest("multi_label and hypothesis_template are for labels; give labels too.", "labels")
        requests = asked_of(self.engine, prompts, "classify", options)
        return Call(requests, self._each(calls.classified(self.engine)), "classify", use_tqdm)

    classify_async = coroutine(classify)

    @blocking
    def token_classify(
        self,
        prompts: PromptsInput,
        *,
        aggregation_strategy: str = "simple",
        ignore_labels: Collection[str] = ("O",),
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Adapters = None,
        tokenization_kwargs: Variables = None,
    ) -> Described[list[TokenClassificationRequestOutput]]:
        """The labels of every token, and the entities that they make, per text in input order.

        aggregation_strategy: none (each token by itself), simple (neighbours of one label), or first, average, max (the
        tokens of a word agree first); numbers as in transformers' pipeline. Offsets are characters of the text as given.

        Raises:
            UnsupportedTask: the model has no labels per token, or does not answer with a row for each.
            InvalidRequest: for the first prompt that could not be answered; token ids, which have no characters.
        """
        strategy = parse_strategy(aggregation_strategy)
        options = CallOptions(pooling_params, prompt_name, tokenization_kwargs, lora_request)
        requests = replace(asked_of(self.engine, prompts, "token_classify", options), offsets=True)
        build = calls.labelled(self.engine, strategy, ignore_labels)
        return Call(requests, self._each(build), "token_classify", use_tqdm)

    token_classify_async = coroutine(token_classify)

    @blocking
    def extract(
        self,
        texts: PromptsInput,
        labels: LabelSet | Sequence[LabelSet],
        *,
        threshold: float = 0.5,
        flat: bool = True,
        multi_label: bool = False,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
    ) -> Described[list[ExtractionRequestOutput]]:
        """The parts of each text that fit one of the labels, in input order. Offsets are characters of the text as given.

        A text over the model's limit is read in windows that overlap, unless `PoolingParams` cuts it.
        labels: what to look for, in plain words; of models that read descriptions, names with these. The same for all
            texts, or a list of them for each.
        threshold: what is found has a higher score, from 0 to 1. flat: parts do not overlap; False lets one lie within
            another. multi_label: the same part may have several labels.

        Raises:
            UnsupportedTask: the model finds no labels of the caller. InvalidRequest: for wrong options, or for the first
            text that could not be answered.
        """
        asked = asked_of(self.engine, texts, "extract", CallOptions(pooling_params))
        asked = with_labels(asked, labels, threshold, flat, multi_label)
        return Call(asked, self._each(calls.extracted), "extract", use_tqdm)

    extract_async = coroutine(extract, "the texts")

    @blocking
    def score(
        self,
        data_1: TextsInput,
        data_2: TextsInput,
        /,
        *,
        use_tqdm: Progress = True,
        pooling_params: PoolingParams | None = None,
        lora_request: Adapters = None,
        tokenization_kwargs: Variables = None,
        instruction: str | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Variables = None,
        mode: str | None = None,
        weights: Sequence[float] | None = None,
        mm_processor_kwargs: Variables = None,
        prune: Pruning = None,
    ) -> Described[list[ScoringRequestOutput]]:
        """How well each pair of texts fits: by a cross-encoder, else by cosine, else by late interaction.

        data_1, data_2: a text or many of them (queries, documents), 1:1, 1:N or N:N: lists, arrays, columns, generators.
            For models that read pictures any of them may be a picture, or {"content": [texts and pictures]}.
        instruction: what makes a document fit, for models that read one.
        chat_template: joins the two texts of a pair: a file, its text, or a built-in name; chat_template_kwargs: its
            further variables.
        mode: what is compared instead: dense, sparse or colbert answers, or their weighted mean ("weighted",
            "sparse+dense"), as FlagEmbedding does for BGE-M3. weights: of the dense, sparse and colbert scores.
        mm_processor_kwargs: settings of the picture processor, such as min_pixels and max_pixels.
        prune: keep the sentences of documents that answer their query, for models that say (Provence): a threshold from 0
            to 1, True for the model's own, or `PruningParams`. Outputs have `pruned`, `sentences` and `compression` then.

        Raises:
            InvalidRequest: lists that do not fit together. UnsupportedTask: a model that cannot score, and why.
        """
        options = CallOptions(pooling_params, None, tokenization_kwargs, lora_request)
        score_options = ScoreOptions(
            instruction=instruction,
            template=None if chat_template is None else score_template(chat_template),
            variables=chat_template_kwargs or {},
            mode=mode,
            weights=None if weights is None else tuple(weights),
            processor_options=mm_processor_kwargs or {},
            prune=PruningParams.parse(prune),
        )
        if score_options.prune is not None:
            return lambda: self._pruning(data_1, data_2, options, score_options, use_tqdm)
        window = calls.window_of(self.engine)
        asked = asked_scores(self.engine, data_1, data_2, options, score_options, window)

        def finish(answers: Iterable[Answer]) -> list[ScoringRequestOutput]:
            return self._outputs(asked.finish(answers), calls.scored)

        return Call(asked, of_answers(finish), "score", use_tqdm, path=asked.path)

    score_async = coroutine(score, "the pairs")

    def _pruning(
        self,
        data_1: TextsInput,
        data_2: TextsInput,
        options: CallOptions,
        score_options: ScoreOptions,
        use_tqdm: Progress,
    ) -> Call[list[ScoringRequestOutput]]:
        """The call of a score that prunes: how many prompts it takes depends on the tokens of all documents."""
        queries, documents = parse_texts(data_1, "data_1"), parse_texts(data_2, "data_2")
        plan = score_plan(self.engine, queries, documents, options, score_options)
        pairs = plan.pairs or []

        def finish(answers: Iterable[Answer]) -> list[ScoringRequestOutput]:
            return self._outputs(plan.finish(list(answers)), calls.scored)

        return Call(plan.requests, of_answers(finish), "score", use_tqdm, path=lambda index: f"data_2[{pairs[index]}]")

    def reward(
        self,
        prompts: PromptsInput,
        *,
        use_tqdm: Progress = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Adapters = None,
        tokenization_kwargs: Variables = None,
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

    def stream(
        self,
        items: Iterable[Any],
        task: str = "embed",
        *,
        window: int | None = None,
        on_error: str = "raise",
        **options: Any,
    ) -> Generator[RequestOutput[Any] | PoolhouseError, None, None]:
        """Outputs of items that come one by one, in order; the items are read, tokenised and computed ahead.

        items: prompts as for `embed`, or pairs (query, document) of `score`; any iterable, without an end too.
        task: embed, token_embed, classify, token_classify, extract, embed_sparse or score: outputs and options are those of the
            method of that name, for all items alike; those of token_embed are of `encode`.
        window: items that are asked together; no more than twice as many are in memory. None: 1024 or more, and 256 where
            answers are large.
        on_error: "raise" ends the stream at the first item that cannot be answered; "return" puts its error, an
            `InvalidRequest`, in the place of its output.

        Leaving the loop, or `close()` of the generator, cancels what waits.

        Raises:
            InvalidRequest, UnsupportedTask: for wrong options, at once.
        """
        described = {
            "embed": LLM.embed,
            "token_embed": partial(LLM.encode, pooling_task="token_embed"),
            "classify": LLM.classify,
            "token_classify": LLM.token_classify,
            "extract": LLM.extract,
            "embed_sparse": LLM.embed_sparse,
            "score": LLM.score,
        }
        if task not in described:
            near = did_you_mean(task, described)
            raise InvalidRequest(f"task must be one of {list(described)}, got {task!r}.{near}", "task", task)
        if isinstance(items, str | Mapping):
            raise InvalidRequest("items must be many, such as a list or a generator; embed takes one.", "items")
        describe, pairs = _description(described[task]), task == "score"

        def call_of(own: Sequence[Any]) -> Call[list[Any]]:
            if not pairs:
                if any(isinstance(one, int) for one in own):
                    # Many numbers would be the ids of one prompt.
                    raise InvalidRequest("a number is no prompt.", "prompts")
                return cast("Call[list[Any]]", describe(self, own, **options))
            ((query, document),) = [_pair(one) for one in own]
            described = describe(self, query, document, **options)
            return cast("Call[list[Any]]", described() if callable(described) else described)

        # What is wrong with the options is said before the first item is read.
        call_of([("a", "b")] if pairs else ["a"])
        if window is None:
            named = self.engine.facts.tasks[0] if task == "embed" else task
            large = named in ("token_embed", "token_classify", "embed_sparse")
            window = _LARGE_WINDOW if large else calls.window_of(self.engine)
        name = "pairs" if pairs else "prompts"
        # With labels, an item may be several requests.
        apart = pairs or options.get("labels") is not None
        return Stream(self.engine, call_of, apart, name, window, on_error).outputs(items)

    def close(self) -> None:
        """Finish what was submitted and free the engine's threads."""
        if self._engine is not None:
            self._engine.close()

    def __repr__(self) -> str:
        if self._engine is None:
            return f"LLM({self.settings.model or 'the embedded default'!r}: a copy, not open yet)"
        facts, processes = self.engine.facts, self.engine.processes
        width = f", {facts.width} dimensions" if "embed" in facts.tasks else ""
        where = f"{facts.dtype} on {facts.device if processes > 1 else self.model.facts.device}"
        by = f"{processes} replicas" if processes > 1 else self.model.facts.served_by
        state = "" if self.engine.alive else ", closed"
        return f"LLM({facts.name!r}: {', '.join(facts.tasks)}{width}, {where}, {by}{state})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(
        self, build: Callable[[str, calls.Answered], OutputT]
    ) -> Callable[[Iterable[calls.Answered]], list[OutputT]]:
        """What makes an output of each request and its answer."""
        return lambda answered: self._outputs(answered, build)

    def _outputs(self, items: Iterable[T], build: Callable[[str, T], OutputT]) -> list[OutputT]:
        """An output of each item, with the next request id."""
        return [build(str(next(self._numbers)), item) for item in items]


def _description(method: Any) -> Callable[..., object]:
    """What a method describes its calls by."""
    if isinstance(method, partial):
        return partial(inspect.unwrap(method.func), *method.args, **method.keywords)
    described: Callable[..., object] = inspect.unwrap(method)
    return described


def _pair(item: Any) -> tuple[Any, Any]:
    """The query and the document of a pair.

    Raises:
        InvalidRequest: it is none.
    """
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InvalidRequest("a pair is a tuple of a query and a document.", "pairs")
    return item[0], item[1]


def _window(head: SparseHead) -> int:
    """How many answers are in memory at once, where each of them may be as wide as a vocabulary."""
    width = 1 if head.unit == "token" else head.width
    return max(1, min(_MAX_PROMPTS, _MAX_NUMBERS // width))


# Engines of unpickled or copied LLMs by the key of the original, and of `poolhouse.batch` by its options. Kept, because a
# pool of processes unpickles its function, and an LLM with it, for every piece of work.
_copies: dict[str, OfflineEngine] = {}
_opening = threading.Lock()


def shared_engine(key: str, settings: Settings) -> OfflineEngine:
    """The engine of this process that all with this key share, such as copies of one LLM; a new one where none is open."""
    with _opening:
        engine = _copies.get(key)
        if engine is None or not engine.alive:
            engine = _copies[key] = start_engine(settings)
        return engine
