"""Params: options of a request (`PoolingParams`, `PruningParams`, `LoRARequest`) and of a model's pooler (`PoolerConfig`)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from poolhouse.errors import ConfigError, InvalidRequest, UnsupportedDimensions, did_you_mean
from poolhouse.packing.tokens import Ids
from poolhouse.tasks import PruningRule, Task


@dataclass(frozen=True, slots=True)
class LateChunkingParams:
    """A vector for every `chunk_size` tokens, special ones included: vLLM's late chunking."""

    chunk_size: int

    def __post_init__(self) -> None:
        if type(self.chunk_size) is not int or self.chunk_size < 1:
            raise InvalidRequest(
                f"late_chunking_params: chunk_size must be a positive integer, got {self.chunk_size!r}.",
                "late_chunking_params",
                self.chunk_size,
            )

    def spans(self, tokens: int) -> Ids:
        """[chunks, 2]: the first token of each chunk of so many tokens, and the one after its last."""
        size = min(self.chunk_size, tokens)
        starts = np.arange(0, tokens, size, dtype=np.int64)
        return np.stack((starts, np.minimum(starts + size, tokens)), axis=1)


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """Options of one request; `None` leaves a choice to the model.

    dimensions: length of the vector, for Matryoshka models.
    use_activation: normalise embeddings, or turn logits into probabilities.
    truncate_prompt_tokens: keep this many tokens; -1 keeps as many as the model takes.
    truncation_side: "right" drops the end of the prompt, "left" its beginning; None is the tokenizer's own, mostly "right".
    overflow: what to do with a longer prompt that is not cut: refuse it, cut it, or split it and average the pieces.
    step_tag_id, returned_token_ids: rows and columns kept of token_classify with STEP pooling.
    max_tokens_per_query, max_tokens_per_doc: content tokens to which each text of a pair is cut before they are joined.
    task: vLLM's callers repeat the task of the method here; it must be the same.
    late_chunking_params: of token_embed, a row per chunk instead of one per token.
    normalize, softmax, activation: former names of use_activation. extra_kwargs: vLLM's place of max_tokens_per_*.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    overflow: Literal["error", "truncate", "chunk"] | None = None
    task: str | None = None
    late_chunking_params: LateChunkingParams | None = None
    normalize: InitVar[bool | None] = None
    softmax: InitVar[bool | None] = None
    activation: InitVar[bool | None] = None
    extra_kwargs: InitVar[Mapping[str, int | None] | None] = None

    def __post_init__(
        self,
        normalize: bool | None,
        softmax: bool | None,
        activation: bool | None,
        extra_kwargs: Mapping[str, int | None] | None,
    ) -> None:
        _take_pair_limits(self, extra_kwargs or {})
        _take_former_names(self, normalize=normalize, softmax=softmax, activation=activation)
        _check_integer("dimensions", self.dimensions)
        for name in _PAIR_LIMITS:
            limit = getattr(self, name)
            _check_integer(name, limit)
            if limit is not None and limit < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {limit}", name, limit)
        _check_integer("step_tag_id", self.step_tag_id)
        _check_integer("truncate_prompt_tokens", self.truncate_prompt_tokens)
        if self.use_activation is not None and not isinstance(self.use_activation, bool):
            raise InvalidRequest(
                f"use_activation must be true, false or null, got {self.use_activation!r}", "use_activation"
            )
        if self.truncate_prompt_tokens is not None and (
            self.truncate_prompt_tokens < -1 or self.truncate_prompt_tokens == 0
        ):
            raise InvalidRequest(
                f"truncate_prompt_tokens must be -1 (the model's limit) or at least 1, "
                f"got {self.truncate_prompt_tokens}",
                "truncate_prompt_tokens",
                self.truncate_prompt_tokens,
            )
        if self.truncation_side not in (None, "left", "right"):
            raise InvalidRequest(
                f"truncation_side must be 'left', 'right' or null, got {self.truncation_side!r}", "truncation_side"
            )
        if self.overflow not in (None, "error", "truncate", "chunk"):
            raise InvalidRequest(
                f"overflow must be 'error', 'truncate', 'chunk' or null, got {self.overflow!r}", "overflow"
            )
        if self.returned_token_ids is not None:
            object.__setattr__(self, "returned_token_ids", _ids(self.returned_token_ids))
        if not isinstance(self.late_chunking_params, LateChunkingParams | None):
            raise InvalidRequest(
                f"late_chunking_params must be LateChunkingParams(chunk_size=...) or null, got "
                f"{self.late_chunking_params!r}",
                "late_chunking_params",
            )

    def for_pooler(self) -> PoolingParams:
        """The options that a pooling pipeline reads; requests with equal ones are pooled together."""
        limits = (self.truncate_prompt_tokens, self.max_tokens_per_query, self.max_tokens_per_doc, self.overflow)
        if limits == (None, None, None, None) and (self.truncation_side, self.task, self.late_chunking_params) == (
            None,
            None,
            None,
        ):
            return self
        return PoolingParams(self.dimensions, self.use_activation, self.step_tag_id, self.returned_token_ids)

    def check(
        self,
        task: Task,
        matryoshka: Matryoshka,
        model_name: str,
        further: tuple[Task, ...] = (),
        widths: Mapping[Task, int] | None = None,
    ) -> None:
        """Refuse options that neither `task` nor a further task has, and sizes that the model does not offer.

        widths: of each task's vectors, where they differ.

        Raises:
            InvalidRequest, UnsupportedDimensions: naming the field.
        """
        given = [name for name in _ALL_PARAMS if getattr(self, name) is not None]
        if not given:
            return
        tasks = (task, *further)
        known = [name for name in _ALL_PARAMS if any(name in _params_of(task) for task in tasks)]
        wrong = [name for name in given if name not in known]
        if wrong:
            who = f"Tasks {list(tasks)} only support" if further else f"Task '{task}' only supports"
            raise InvalidRequest(
                f"{who} {known} parameters, {'do' if further else 'does'} not support {wrong} parameters",
                wrong[0],
                getattr(self, wrong[0]),
            )
        if self.dimensions is not None:
            for one in tasks:
                if "dimensions" in _params_of(one):
                    matryoshka.check(self.dimensions, model_name, (widths or {}).get(one))

    def for_task(self, task: Task) -> PoolingParams:
        """The options of this task, of those of a request for several tasks."""
        known = _params_of(task)
        others: dict[str, Any] = {
            name: None for name in _ALL_PARAMS if name not in known and getattr(self, name) is not None
        }
        return replace(self, **others) if others else self


@dataclass(frozen=True, slots=True)
class PruningParams:
    """Which sentences of a document stay.

    threshold: from 0 to 1; the higher, the fewer. None: the model's own, mostly 0.1.
    keep_first: the first sentence, a title, stays wherever another one does.
    sentences: of each document, its sentences in order, as texts or as (start, end) characters; None: found by their marks.
    rule: how a sentence's tokens decide, "mean" or "votes"; see `poolhouse.tasks.PruningHead`. None: as the model's own code.
    """

    threshold: float | None = None
    keep_first: bool = False
    sentences: Sequence[Sequence[str | Sequence[int]]] | None = None
    rule: PruningRule | None = None

    def __post_init__(self) -> None:
        threshold = self.threshold
        if threshold is not None and (
            isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1
        ):
            raise InvalidRequest(f"prune: threshold must be from 0 to 1, got {threshold!r}.", "prune", threshold)
        if not isinstance(self.keep_first, bool):
            raise InvalidRequest(f"prune: keep_first must be true or false, got {self.keep_first!r}.", "prune")
        if self.rule not in (None, *get_args(PruningRule)):
            raise InvalidRequest(
                f"prune: rule must be one of {list(get_args(PruningRule))} or null, got {self.rule!r}.", "prune"
            )

    @classmethod
    def parse(cls, value: object) -> PruningParams | None:
        """From a threshold, true (the model's own threshold), a mapping of the fields, or one of these; None and false: none.

        Raises:
            InvalidRequest: another value, or a field that is unknown.
        """
        if value is None or value is False:
            return None
        if isinstance(value, cls):
            return value
        if value is True:
            return cls()
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            for name in value:
                if name not in known:
                    hint = did_you_mean(str(name), known)
                    raise InvalidRequest(f"prune has no field {name!r}.{hint} Fields: {known}.", "prune")
            return cls(**value)
        if isinstance(value, int | float):
            return cls(value)
        raise InvalidRequest(
            f"prune must be a threshold from 0 to 1, true, or an object with some of "
            f"{[field.name for field in fields(cls)]}, got {value!r}.",
            "prune",
        )


_PAIR_LIMITS = ("max_tokens_per_query", "max_tokens_per_doc")
_ALL_PARAMS = ("use_activation", "dimensions", "step_tag_id", "returned_token_ids", "late_chunking_params")
_TASK_PARAMS: dict[Task, tuple[str, ...]] = {
    "embed": ("use_activation", "dimensions"),
    "token_embed": ("use_activation", "dimensions", "late_chunking_params"),
    "classify": ("use_activation",),
    "token_classify": ("use_activation", "step_tag_id", "returned_token_ids"),
    "extract": (),
}


def _params_of(task: Task) -> tuple[str, ...]:
    return _TASK_PARAMS.get(task, _ALL_PARAMS)


@dataclass(frozen=True, slots=True)
class Matryoshka:
    """The output sizes of a model: its width only, any up to it, or a list."""

    width: int
    supported: bool = False
    dimensions: tuple[int, ...] = ()

    def check(self, dimensions: int, model_name: str, own: int | None = None) -> None:
        """Raise UnsupportedDimensions for a length that the model does not offer; it always offers whole vectors.

        own: the length of a task's whole vectors; None: of the model's first task.
        """
        if dimensions == (self.width if own is None else own):
            return
        if not self.supported:
            raise UnsupportedDimensions(
                f'Model "{model_name}" does not support matryoshka representation, '
                "changing output dimensions will lead to poor results."
            )
        if dimensions < 1:
            raise UnsupportedDimensions("Dimensions must be greater than 0")
        if self.dimensions and dimensions not in self.dimensions:
            raise UnsupportedDimensions(
                f'Model "{model_name}" only supports {list(self.dimensions)} matryoshka dimensions, '
                "use other output dimensions will lead to poor results."
            )
        if dimensions > self.width:
            raise UnsupportedDimensions(
                f'Model "{model_name}" only supports dimensions in range [1, {self.width}], got {dimensions}.'
            )


@dataclass(frozen=True, slots=True)
class PoolerConfig:
    """How a model pools, where the user wants it otherwise than its files say.

    pooling_type: shorthand for the next two; ALL and STEP concern token tasks, the others whole prompts.
    A pooling may be a concatenation, as in sentence-transformers: "CLS+MEAN".
    enable_chunked_processing: split prompts over the model's limit and average the pieces.
    max_embed_len: longest prompt in tokens; None takes any where prompts are split, else the model's limit.
    logit_mean, logit_sigma: logits are shifted and divided by these before the activation.
    step_tag_id, returned_token_ids: rows (by token id) and columns that STEP pooling keeps.
    task: what /pooling answers where a body names none; all tasks of the model stay served.
    normalize, softmax, activation: former names of use_activation. logit_bias, logit_scale: of logit_mean and of the
    inverse of logit_sigma.
    """

    pooling_type: str | None = None
    seq_pooling_type: str | None = None
    tok_pooling_type: str | None = None
    use_activation: bool | None = None
    dimensions: int | None = None
    enable_chunked_processing: bool = False
    max_embed_len: int | None = None
    logit_mean: float | None = None
    logit_sigma: float | None = None
    step_tag_id: int | None = None
    returned_token_ids: tuple[int, ...] | None = None
    task: str | None = None
    normalize: InitVar[bool | None] = None
    softmax: InitVar[bool | None] = None
    activation: InitVar[bool | None] = None
    logit_bias: InitVar[float | None] = None
    logit_scale: InitVar[float | None] = None

    def __post_init__(
        self,
        normalize: bool | None,
        softmax: bool | None,
        activation: bool | None,
        logit_bias: float | None,
        logit_scale: float | None,
    ) -> None:
        _take_former_names(self, normalize=normalize, softmax=softmax, activation=activation)
        self._check_types(logit_bias=logit_bias, logit_scale=logit_scale)
        if logit_bias is not None:
            _warn_former("logit_bias", "logit_mean")
            object.__setattr__(self, "logit_mean", logit_bias)
        if logit_scale is not None:
            _warn_former("logit_scale", "logit_sigma (its inverse)")
            if logit_scale == 0:
                raise ConfigError("pooler_config: logit_scale must not be 0.")
            object.__setattr__(self, "logit_sigma", 1 / logit_scale)
        if self.pooling_type is not None:
            if self.seq_pooling_type is not None or self.tok_pooling_type is not None:
                raise ConfigError(
                    "pooler_config: give pooling_type, or seq_pooling_type and tok_pooling_type, not both."
                )
            name = self.pooling_type.upper()
            target = "tok_pooling_type" if name in ("ALL", "STEP") else "seq_pooling_type"
            object.__setattr__(self, target, name)
        if self.seq_pooling_type is not None:
            object.__setattr__(self, "seq_pooling_type", _pooling_names(self.seq_pooling_type))
        if self.tok_pooling_type is not None:
            name = self.tok_pooling_type.upper()
            if name not in ("ALL", "STEP"):
                raise ConfigError(f"pooler_config: tok_pooling_type is ALL or STEP, got {name!r}.")
            object.__setattr__(self, "tok_pooling_type", name)
        if self.logit_sigma == 0:
            raise ConfigError("pooler_config: logit_sigma must not be 0.")
        if self.max_embed_len is not None and (type(self.max_embed_len) is not int or self.max_embed_len < 1):
            raise ConfigError(f"pooler_config: max_embed_len must be at least 1, got {self.max_embed_len!r}.")

    def _check_types(self, **further: object) -> None:
        """Raise ConfigError for a value of the wrong kind, and settle the ids. further: former names."""
        for names, kinds, wanted in _KINDS:
            for name in names:
                value = further.get(name) if name in further else getattr(self, name)
                if value is not None and type(value) not in kinds:
                    raise ConfigError(f"pooler_config: {name} must be {wanted}, got {value!r}.")
        if self.returned_token_ids is not None:
            try:
                object.__setattr__(self, "returned_token_ids", _ids(self.returned_token_ids))
            except InvalidRequest as error:
                raise ConfigError(f"pooler_config: {error}.") from None

    @classmethod
    def parse(cls, value: PoolerConfig | Mapping[str, Any] | None) -> PoolerConfig:
        """A config from what users write: a PoolerConfig, a mapping, or nothing.

        Raises:
            ConfigError: an unknown field; the message names the nearest known one.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"pooler_config must be a PoolerConfig or a mapping, got {type(value).__name__}.")
        known = [field.name for field in fields(cls)]
        for name in value:
            if name not in known and name not in _FORMER_FIELDS:
                raise ConfigError(f"pooler_config has no field '{name}'.{did_you_mean(name, known)} Fields: {known}.")
        return cls(**value)


# Fields of PoolerConfig that are checked where they are read first, before anything is made of them.
_KINDS: tuple[tuple[tuple[str, ...], tuple[type, ...], str], ...] = (
    (("pooling_type", "seq_pooling_type", "tok_pooling_type", "task"), (str,), "a word"),
    (("step_tag_id",), (int,), "an integer"),
    (("logit_mean", "logit_sigma", "logit_bias", "logit_scale"), (int, float), "a number"),
    (("enable_chunked_processing",), (bool,), "true or false"),
)
_FORMER_FIELDS = ("normalize", "softmax", "activation", "logit_bias", "logit_scale")
# The poolings of vLLM and of sentence-transformers, under one name each: the keys of pooling's REDUCTIONS.
_SEQUENCE_POOLINGS = ("CLS", "LAST", "MEAN", "MAX", "WEIGHTEDMEAN", "MEAN_SQRT_LEN")


def _pooling_names(text: str) -> str:
    names = [name.strip().upper() for name in text.split("+")]
    for name in names:
        if name not in _SEQUENCE_POOLINGS:
            raise ConfigError(
                f"pooler_config: unknown pooling type {name!r}.{did_you_mean(name, _SEQUENCE_POOLINGS)} "
                f"Pooling types: {list(_SEQUENCE_POOLINGS)}, joined by '+' to concatenate, and ALL or STEP for tokens."
            )
    return "+".join(names)


def _take_pair_limits(params: PoolingParams, extra: Mapping[str, int | None]) -> None:
    """Take the limits of a pair's texts from vLLM's extra_kwargs.

    Raises:
        InvalidRequest: another key in it.
    """
    for name, limit in extra.items():
        if name not in _PAIR_LIMITS:
            raise InvalidRequest(
                f"extra_kwargs has no '{name}'.{did_you_mean(name, _PAIR_LIMITS)} It takes {list(_PAIR_LIMITS)}.",
                "extra_kwargs",
            )
        object.__setattr__(params, name, limit or None)


def _take_former_names(params: object, **names: bool | None) -> None:
    """Let vLLM's former names set use_activation, with a warning for each."""
    for name, value in names.items():
        if value is not None:
            _warn_former(name, "use_activation")
            object.__setattr__(params, "use_activation", value)


def _warn_former(name: str, current: str) -> None:
    warnings.warn(f"`{name}` was renamed; use `{current}` instead.", DeprecationWarning, stacklevel=5)


def _ids(ids: object) -> tuple[int, ...]:
    """Token ids as a tuple; raises InvalidRequest for another value."""
    if not isinstance(ids, list | tuple) or not all(type(value) is int for value in ids):
        raise InvalidRequest(
            f"returned_token_ids must be a list of integers or null, got {ids!r}", "returned_token_ids", ids
        )
    return tuple(ids)


def _check_integer(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidRequest(f"{name} must be an integer or null, got {value!r}", name, value)


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter for a request, with the fields of vLLM's class of the same name.

    lora_path: a PEFT folder or hub id, loaded at the first request. lora_int_id: has no effect; adapters differ by name.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""

    @classmethod
    def parse(cls, value: object) -> LoRARequest:
        """A request from a name, a LoRARequest, or vLLM's.

        Raises:
            InvalidRequest: none of these.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        name = getattr(value, "lora_name", None)
        if not isinstance(name, str):
            raise InvalidRequest(
                f"lora_request must be the name of an adapter or a LoRARequest, got {type(value).__name__}.",
                "lora_request",
            )
        return cls(name, lora_path=str(getattr(value, "lora_path", "") or getattr(value, "path", "") or ""))


def parse_lora_requests(adapters: object, prompts: int) -> list[LoRARequest | None]:
    """One entry per prompt. adapters: nothing, one adapter for all prompts, or one for each; unchecked.

    Raises:
        InvalidRequest: a list of another length, or an entry that is no adapter.
    """
    if not isinstance(adapters, Sequence) or isinstance(adapters, str):
        return [None if adapters is None else LoRARequest.parse(adapters)] * prompts
    if len(adapters) != prompts:
        raise InvalidRequest(
            f"lora_request has {len(adapters)} entries for {prompts} prompts; give one, or one per prompt.",
            "lora_request",
        )
    return [None if entry is None else LoRARequest.parse(entry) for entry in adapters]


def parse_lora_modules(value: object) -> dict[str, str]:
    """Adapters as name -> folder or hub id, from a mapping, texts "name=path", or vLLM's JSON objects.

    Raises:
        ValueError: another form, or a name without a path, or twice.
    """
    if isinstance(value, Mapping):
        return _modules(value.items())
    modules: Any = value
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            modules = json.loads(text)
        else:
            modules = json.loads(f"[{text}]") if text.startswith("{") else text.replace(",", " ").split()
    pairs: list[tuple[object, object]] = []
    for module in modules:
        if isinstance(module, str) and "=" in module:
            name, _, path = module.partition("=")
            pairs.append((name, path))
        elif isinstance(module, Mapping) and {"name", "path"} <= set(module):
            pairs.append((module["name"], module["path"]))
        else:
            raise ValueError(f"lora_modules: {module!r} is neither 'name=path' nor an object with name and path")
    return _modules(pairs)


def _modules(pairs: Iterable[tuple[object, object]]) -> dict[str, str]:
    """Paths by name, each name once."""
    modules: dict[str, str] = {}
    for name, path in pairs:
        if not name or not path:
            raise ValueError(f"lora_modules: {name!r}={path!r} lacks its name or its path")
        if name in modules:
            raise ValueError(f"lora_modules names {name!r} twice")
        modules[str(name)] = str(path)
    return modules
