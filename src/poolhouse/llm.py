"""LLM: pooling models from Python; the methods of vLLM's class of the same name, and async twins."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from poolhouse.engine.open import find_adapter, open_engine
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.waiting import gather
from poolhouse.errors import InvalidRequest, UnsupportedTask, did_you_mean
from poolhouse.inputs.prompts import parse_prompts
from poolhouse.lora import LoRARequest, parse_lora_requests
from poolhouse.outputs import (
    Array,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
)
from poolhouse.params import PoolingParams
from poolhouse.settings import Settings
from poolhouse.tasks import Task, parse_task

if TYPE_CHECKING:
    from poolhouse.models.model import Model

Params = PoolingParams | Sequence[PoolingParams] | None
OutputT = TypeVar("OutputT", bound=RequestOutput[Any])

# Progress is drawn only when there is enough to wait for.
_PROGRESS_FROM = 256
_NO_TASK = """`pooling_task` is required. Choose one of these, or use the method made for it:
- embeddings: `LLM.embed(...)` or `pooling_task="embed"`
- multi-vector retrieval: `pooling_task="token_embed"`
- classification: `LLM.classify(...)` or `pooling_task="classify"`
- rewards and token classification: `pooling_task="token_classify"`"""


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
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector per prompt, in input order.

        prompts: a text, token ids, TextPrompt, TokensPrompt, or a list of them.
        prompt_name: a prompt stored with the checkpoint ("query", "document"), put before each text;
            None takes the checkpoint's default, "" none.
        lora_request: a LoRARequest or an adapter's name, one for all prompts or one per prompt; "" uses no adapter.
        task: a task adapter of the checkpoint ("retrieval.query"), with the prompt stored under its name.

        Raises:
            InvalidRequest: for the first prompt, in order, that could not be answered.
        """
        requests = self._embed_requests(prompts, pooling_params, prompt_name, tokenization_kwargs, lora_request, task)
        return self._outputs(requests, _wait(self.engine.submit(requests), use_tqdm, "embed"), _embedding)

    async def embed_async(
        self,
        prompts: Any,
        *,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """`embed` for coroutines; cancelling it takes the prompts out of the queue."""
        requests = self._embed_requests(prompts, pooling_params, prompt_name, tokenization_kwargs, lora_request, task)
        return self._outputs(requests, await gather(self.engine.submit(requests)), _embedding)

    def embed_array(
        self,
        prompts: Any,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: Params = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> Array:
        """`embed` as one matrix, [prompts, dimensions] float32; cuts are not reported here."""
        requests = self._embed_requests(prompts, pooling_params, prompt_name, tokenization_kwargs, lora_request, task)
        return np.stack([answer.array for answer in _wait(self.engine.submit(requests), use_tqdm, "embed")])

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
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """The pooled rows of any task: one row per prompt, or one per token for the token tasks.

        Raises:
            UnsupportedTask: the model lacks the task; the message names what it has.
        """
        requests = self._requests(
            prompts, self._task(pooling_task), pooling_params, prompt_name, tokenization_kwargs, lora_request, task
        )
        return self._outputs(requests, _wait(self.engine.submit(requests), use_tqdm, str(pooling_task)), _pooling)

    async def encode_async(
        self,
        prompts: Any,
        pooling_params: Params = None,
        *,
        pooling_task: str | None = None,
        prompt_name: str | None = None,
        lora_request: Any = None,
        task: str | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """`encode` for coroutines; cancelling it takes the prompts out of the queue."""
        requests = self._requests(
            prompts, self._task(pooling_task), pooling_params, prompt_name, tokenization_kwargs, lora_request, task
        )
        return self._outputs(requests, await gather(self.engine.submit(requests)), _pooling)

    def close(self) -> None:
        """Finish what was submitted and free the engine's threads."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _task(self, word: str | None) -> Task:
        if word is None:
            raise InvalidRequest(_NO_TASK, "pooling_task")
        return parse_task(word, self.engine.tasks)

    def _embed_requests(
        self,
        prompts: Any,
        params: Params,
        prompt_name: str | None,
        tokenization: Mapping[str, Any] | None,
        lora_request: Any,
        adapter_task: str | None,
    ) -> list[Request]:
        if "embed" not in self.engine.tasks:
            raise UnsupportedTask(
                "Embedding API is not supported by this model. Try converting the model using `--convert embed`."
            )
        return self._requests(prompts, "embed", params, prompt_name, tokenization, lora_request, adapter_task)

    def _requests(
        self,
        prompts: Any,
        task: Task,
        params: Params,
        prompt_name: str | None,
        tokenization: Mapping[str, Any] | None,
        lora_request: Any,
        adapter_task: str | None,
    ) -> list[Request]:
        parsed = parse_prompts(prompts)
        adapters = self._adapters(lora_request, adapter_task, len(parsed))
        cut, special_tokens = _tokenization(tokenization)
        if params is None or isinstance(params, PoolingParams):
            one = _with_cut(params or PoolingParams(), cut)
            return [
                Request(prompt, task, one, prompt_name, special_tokens, adapter)
                for prompt, adapter in zip(parsed, adapters, strict=True)
            ]
        if len(params) != len(parsed):
            raise InvalidRequest(
                f"pooling_params has {len(params)} entries for {len(parsed)} prompts; give one, or one per prompt.",
                "pooling_params",
            )
        return [
            Request(prompt, task, _with_cut(own, cut), prompt_name, special_tokens, adapter)
            for prompt, own, adapter in zip(parsed, params, adapters, strict=True)
        ]

    def _adapters(self, lora_request: Any, task: str | None, prompts: int) -> list[str | None]:
        """The adapter's name for each prompt; an adapter that a request brings is loaded once."""
        if lora_request is None:
            return [task] * prompts
        if task is not None:
            raise InvalidRequest("lora_request and task both choose an adapter; give one of them.", "task", task)
        requests = parse_lora_requests(lora_request, prompts)
        for request in {request for request in requests if request and request.lora_path}:
            self._load_adapter(request)
        return [None if request is None else request.lora_name for request in requests]

    def _load_adapter(self, request: LoRARequest) -> None:
        adapters = self.model.adapters
        if adapters is None:
            raise InvalidRequest("Adapters are for models of the native families.", "lora_request", request.lora_name)
        declared = self.settings.lora_modules or {}
        if declared.get(request.lora_name) != request.lora_path:
            adapters.load(request.lora_name, find_adapter(self.settings, request.lora_path))

    def _outputs(
        self,
        requests: Sequence[Request],
        answers: Iterable[Answer],
        build: Callable[[str, Answer], OutputT],
    ) -> list[OutputT]:
        return [build(str(next(self._numbers)), answer) for answer in answers]


def _embedding(request_id: str, answer: Answer) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput(request_id, EmbeddingOutput(answer.array), **_facts(answer))


def _pooling(request_id: str, answer: Answer) -> PoolingRequestOutput:
    return PoolingRequestOutput(request_id, PoolingOutput(answer.array), **_facts(answer))


def _facts(answer: Answer) -> dict[str, Any]:
    tokens = answer.tokens
    return {
        "prompt_token_ids": tokens.ids.tolist(),
        "truncated": tokens.truncated,
        "original_tokens": tokens.original_tokens,
        "original_is_estimate": tokens.original_is_estimate,
        "chunks": answer.chunks,
    }


def _tokenization(options: Mapping[str, Any] | None) -> tuple[PoolingParams | None, bool]:
    """What `tokenization_kwargs` asks: how to cut (None: nothing said), and whether to add special tokens.

    Raises:
        InvalidRequest: an option that means nothing here.
    """
    given = dict(options or {})
    special_tokens = bool(given.pop("add_special_tokens", True))
    side = given.pop("truncation_side", "right")
    keep = given.pop("truncate_prompt_tokens", None)
    longest = given.pop("max_length", None)
    truncation = given.pop("truncation", None)
    known = ("add_special_tokens", "truncate_prompt_tokens", "truncation_side", "max_length", "truncation")
    for name in given:
        raise InvalidRequest(
            f"tokenization_kwargs has no option '{name}'.{did_you_mean(name, known)} Options: {list(known)}.", name
        )
    if keep is None and truncation not in (None, False):
        keep = longest if longest is not None else -1
    if keep is None and side == "right":
        return None, special_tokens
    return PoolingParams(truncate_prompt_tokens=keep, truncation_side=side), special_tokens


def _with_cut(params: PoolingParams, cut: PoolingParams | None) -> PoolingParams:
    if cut is None:
        return params
    return replace(params, truncate_prompt_tokens=cut.truncate_prompt_tokens, truncation_side=cut.truncation_side)


def _wait(futures: Sequence[Future[Answer]], progress: bool | Callable[..., Any], label: str) -> list[Answer]:
    """All answers in order; the first failure is raised, and what still waits is cancelled."""
    waited: Iterable[Future[Answer]] = futures
    if callable(progress):
        waited = progress(futures, total=len(futures), desc=label)
    elif progress and len(futures) >= _PROGRESS_FROM:
        from tqdm import tqdm

        waited = tqdm(futures, desc=label, unit=" prompts", dynamic_ncols=True, disable=None)
    try:
        return [future.result() for future in waited]
    except BaseException:
        for future in futures:
            future.cancel()
        raise
