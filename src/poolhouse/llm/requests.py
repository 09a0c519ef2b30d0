"""What a caller of LLM says, turned into requests of the engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from poolhouse.engine.engine import Engine
from poolhouse.engine.request import Request
from poolhouse.errors import InvalidRequest, UnsupportedTask, did_you_mean
from poolhouse.inputs.prompts import PromptsInput, parse_prompts, parse_texts
from poolhouse.inputs.templates.score import score_template
from poolhouse.params import PoolingParams, parse_lora_requests
from poolhouse.plans import scoring, sparse
from poolhouse.tasks import Task, parse_task

Params = PoolingParams | Sequence[PoolingParams] | None
Options = Mapping[str, Any] | None
_NO_TASK = """`pooling_task` is required. Choose one of these, or use the method made for it:
- embeddings: `LLM.embed(...)` or `pooling_task="embed"`
- multi-vector retrieval: `pooling_task="token_embed"`
- classification: `LLM.classify(...)` or `pooling_task="classify"`
- rewards and token classification: `pooling_task="token_classify"`"""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call says beside its prompts.

    params: one for all prompts, or one for each. tokenization: vLLM's `tokenization_kwargs`.
    lora: vLLM's `lora_request`. adapter_task: a task adapter that came with the checkpoint.
    input_type: what the texts are ("query", "document").
    """

    params: Params = None
    prompt_name: str | None = None
    tokenization: Options = None
    lora: Any = None
    adapter_task: str | None = None
    input_type: str | None = None


@dataclass(frozen=True, slots=True)
class Joining:
    """How a call of `LLM.score` wants pairs joined, or compared; variables: vLLM's `chat_template_kwargs`."""

    instruction: str | None = None
    chat_template: str | None = None
    variables: Options = None
    mode: str | None = None
    weights: Sequence[float] | None = None


@dataclass(frozen=True, slots=True)
class Pruning:
    """What a call of `LLM.embed_sparse` says; see `poolhouse.plans.sparse.Options`."""

    top_k: int | None = None
    threshold: float | None = None


def requests_of(engine: Engine, prompts: PromptsInput, task: Task, asked: Asked, first: int = 0) -> list[Request]:
    """A request per prompt, in order. first: the number of the first one, for messages.

    Raises:
        UnsupportedTask: naming what the model can do. InvalidRequest: naming what is wrong.
    """
    if task not in engine.facts.tasks:
        raise UnsupportedTask(f"{_cannot(task, engine.facts.tasks)} Supported tasks: {list(engine.facts.tasks)}")
    params = asked.params
    _check_types(params, asked.prompt_name)
    _check_tasks(params, task, engine)
    parsed = parse_prompts(prompts, first=first)
    adapters = _adapters(engine, asked, len(parsed))
    made = Tokenization.parse(asked.tokenization)
    if params is None or isinstance(params, PoolingParams):
        one = made.params(params)
        return [
            made.applied(Request(prompt, task, one, asked.prompt_name, adapter=adapter, input_type=asked.input_type))
            for prompt, adapter in zip(parsed, adapters, strict=True)
        ]
    if len(params) != len(parsed):
        raise InvalidRequest(
            f"pooling_params has {len(params)} entries for {len(parsed)} prompts; give one, or one per prompt.",
            "pooling_params",
        )
    return [
        made.applied(
            Request(prompt, task, made.params(own), asked.prompt_name, adapter=adapter, input_type=asked.input_type)
        )
        for prompt, own, adapter in zip(parsed, params, adapters, strict=True)
    ]


def _cannot(task: Task, tasks: Sequence[Task]) -> str:
    """What is said to a caller of a method whose task the model lacks: vLLM's words where they help."""
    if task == "embed" and "token_embed" in tasks:
        return "This model gives a vector per token, not one per text: use embed_tokens, and score to compare texts."
    if task == "embed":
        return "Embedding API is not supported by this model. Try converting the model using `--convert embed`."
    if task == "classify":
        return (
            "Classification API is not supported by this model. Try converting the model using `--convert classify`, if "
            "its checkpoint has a classifier's head."
        )
    return f"Unsupported task: '{task}'"


def score_plan(
    engine: Engine, data_1: Any, data_2: Any, asked: Asked, joining: Joining
) -> tuple[scoring.ScorePlan, Callable[[int], str]]:
    """Requests and composition of `LLM.score`, and where the caller gave the text of a request.

    Raises:
        InvalidRequest, UnsupportedTask: see `poolhouse.plans.scoring.plan`.
    """
    _check_types(asked.params, None)
    if isinstance(asked.params, Sequence):
        raise InvalidRequest("score takes one PoolingParams for all pairs.", "pooling_params")
    made = Tokenization.parse(asked.tokenization)
    if not made.add_special_tokens:
        raise InvalidRequest("add_special_tokens=False means nothing to pairs.", "add_special_tokens")
    (adapter,) = _adapters(engine, asked, 1)
    queries, documents = parse_texts(data_1, "data_1"), parse_texts(data_2, "data_2")
    template = None if joining.chat_template is None else score_template(joining.chat_template)
    params = made.params(asked.params)
    weights = None if joining.weights is None else tuple(joining.weights)
    said = scoring.Asked(params, joining.instruction, template, joining.variables or {}, joining.mode, weights)
    plan = scoring.plan(engine, queries, documents, said)
    requests = [made.applied(replace(request, adapter=adapter)) for request in plan.requests]
    lead = len(requests) - len(documents)

    def place(index: int) -> str:
        """Requests of documents come last; a list of documents may share one."""
        if lead < 0:
            return "data_2"
        return f"data_1[{index}]" if index < lead else f"data_2[{index - lead}]"

    return replace(plan, requests=requests), place


def sparse_plan(engine: Engine, prompts: PromptsInput, asked: Asked, pruning: Pruning) -> sparse.SparsePlan:
    """Requests of `LLM.embed_sparse`, and what becomes of their answers.

    Raises:
        InvalidRequest, UnsupportedTask: see `poolhouse.plans.sparse.plan`.
    """
    _check_types(asked.params, asked.prompt_name)
    if isinstance(asked.params, Sequence):
        raise InvalidRequest("embed_sparse takes one PoolingParams for all prompts.", "pooling_params")
    made = Tokenization.parse(asked.tokenization)
    parsed = parse_prompts(prompts)
    options = sparse.Options(
        made.params(asked.params), asked.prompt_name, asked.input_type, pruning.top_k, pruning.threshold
    )
    plan = sparse.plan(engine, parsed, options)
    adapters = _adapters(engine, asked, len(parsed))
    requests = [
        made.applied(replace(request, adapter=adapter))
        for request, adapter in zip(plan.requests, adapters, strict=True)
    ]
    return replace(plan, requests=requests)


def required_task(word: str | None, params: Params, engine: Engine) -> Task:
    """The task that `LLM.encode` was told, by itself or within its parameters.

    Raises:
        InvalidRequest: none was; the message lists them.
    """
    if word is None and isinstance(params, PoolingParams):
        word = params.task
    if word is None:
        raise InvalidRequest(_NO_TASK, "pooling_task")
    return parse_task(word, engine.facts.tasks)


def _adapters(engine: Engine, asked: Asked, prompts: int) -> list[str | None]:
    """The adapter's name for each prompt; an adapter that a request brings is loaded once.

    Raises:
        InvalidRequest: two ways to choose one, or a model that takes none.
    """
    if asked.lora is None:
        return [asked.adapter_task] * prompts
    if asked.adapter_task is not None:
        raise InvalidRequest("lora_request and task both choose an adapter; give one of them.", "task")
    requests = parse_lora_requests(asked.lora, prompts)
    for request in {request for request in requests if request and request.lora_path}:
        adapters = engine.model.adapters
        if adapters is None:
            raise InvalidRequest("Adapters are for models of the native families.", "lora_request", request.lora_name)
        adapters.load(request.lora_name, request.lora_path)
    return [None if request is None else request.lora_name for request in requests]


def _check_tasks(params: Params, task: Task, engine: Engine) -> None:
    """Raise InvalidRequest for parameters that name another task than the call."""
    several = params if isinstance(params, Sequence) else (params,)
    for word in {one.task for one in several if one is not None and one.task is not None}:
        if parse_task(word, engine.facts.tasks) != task:
            raise InvalidRequest(f"You cannot overwrite task='{word}' of pooling_params with '{task}'.", "task", word)


def _check_types(params: object, prompt_name: object) -> None:
    if prompt_name is not None and not isinstance(prompt_name, str):
        raise InvalidRequest(f"prompt_name must be a text or None, got {prompt_name!r}.", "prompt_name", prompt_name)
    several = params if isinstance(params, list | tuple) else (params,)
    for one in several:
        if not isinstance(one, PoolingParams | None):
            raise InvalidRequest(
                f"pooling_params must be PoolingParams, or a list of them with one per prompt, got {one!r}.",
                "pooling_params",
                one,
            )


_KNOWN = (
    *("add_special_tokens", "do_lower_case", "max_length"),
    *("truncate_prompt_tokens", "truncation", "truncation_side"),
)
# Nothing is padded or decoded here, so these change no number.
_MEANINGLESS = ("needs_detokenization", "pad_prompt_tokens", "padding")
_CUTS = (True, "longest_first")
_DOES_NOT_CUT = (None, False, "do_not_truncate")


@dataclass(frozen=True, slots=True)
class Tokenization:
    """How to make tokens; None leaves it to the parameters or the model.

    keep, side: see `PoolingParams`. max_tokens: refuse longer prompts.
    """

    keep: int | None = None
    side: Literal["left", "right"] | None = None
    max_tokens: int | None = None
    lower_case: bool | None = None
    add_special_tokens: bool = True

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Tokenization:
        """Options as vLLM reads them: max_length is what `truncation` cuts to, and a limit without it.

        Raises:
            InvalidRequest: an option that is unknown or cannot be honoured.
        """
        if not options:
            return cls()
        _check(options)
        longest, truncation = options.get("max_length"), options.get("truncation")
        keep = options.get("truncate_prompt_tokens")
        if truncation in _CUTS and keep is None:
            keep = -1 if longest is None else longest
        return cls(
            keep=keep,
            side=options.get("truncation_side"),
            max_tokens=longest if keep is None else None,
            lower_case=options.get("do_lower_case"),
            add_special_tokens=options.get("add_special_tokens", True),
        )

    def params(self, params: PoolingParams | None) -> PoolingParams:
        """The caller's parameters, cut as was asked here."""
        params = params or PoolingParams()
        if self.keep is None and self.side is None:
            return params
        return replace(
            params,
            truncate_prompt_tokens=params.truncate_prompt_tokens if self.keep is None else self.keep,
            truncation_side=self.side or params.truncation_side,
        )

    def applied(self, request: Request) -> Request:
        """The request with everything else that was asked here."""
        if (self.max_tokens, self.lower_case, self.add_special_tokens) == (None, None, True):
            return request
        return replace(
            request,
            max_tokens=self.max_tokens,
            lower_case=self.lower_case,
            add_special_tokens=self.add_special_tokens,
        )


def _check(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _KNOWN and name not in _MEANINGLESS:
            raise InvalidRequest(
                f"tokenization_kwargs has no option '{name}'.{did_you_mean(name, _KNOWN)} Options: {list(_KNOWN)}.",
                name,
            )
    ignored = [name for name in _MEANINGLESS if name in options]
    if ignored:
        warnings.warn(
            f"tokenization_kwargs: {', '.join(ignored)} mean nothing here and are ignored; prompts are never padded.",
            stacklevel=5,
        )
    for name in ("add_special_tokens", "do_lower_case"):
        if not isinstance(options.get(name, True), bool):
            raise InvalidRequest(f"{name} must be true or false, got {options[name]!r}", name, options[name])
    longest = options.get("max_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise InvalidRequest(f"max_length must be an integer from 1, got {longest!r}", "max_length", longest)
    truncation = options.get("truncation")
    if truncation not in (*_CUTS, *_DOES_NOT_CUT):
        raise InvalidRequest(
            f"truncation must be one of {[*_CUTS, *_DOES_NOT_CUT]}, got {truncation!r}", "truncation", truncation
        )
