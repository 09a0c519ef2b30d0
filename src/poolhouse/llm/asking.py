"""What a caller of LLM says, turned into requests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from poolhouse import scoring, sparse
from poolhouse.engine.engine import Engine
from poolhouse.engine.request import Request
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.chat import score_template
from poolhouse.inputs.prompts import Prompts, parse_prompts, parse_side
from poolhouse.llm.tokenization import Tokenization
from poolhouse.lora import parse_lora_requests
from poolhouse.params import PoolingParams
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
    """What a call of `LLM.embed_sparse` says; see `poolhouse.sparse.Options`."""

    top_k: int | None = None
    threshold: float | None = None


def requests_of(engine: Engine, prompts: Prompts, task: Task, asked: Asked, first: int = 0) -> list[Request]:
    """A request per prompt, in order. first: the number of the first one, for messages.

    Raises:
        UnsupportedTask: naming what the model can do. InvalidRequest: naming what is wrong.
    """
    if task not in engine.tasks:
        raise UnsupportedTask(f"{_cannot(task, engine.tasks)} Supported tasks: {list(engine.tasks)}")
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
) -> tuple[scoring.Plan, Callable[[int], str]]:
    """Requests and composition of `LLM.score`, and where the caller gave the text of a request.

    Raises:
        InvalidRequest, UnsupportedTask: see `poolhouse.scoring.plan`.
    """
    _check_types(asked.params, None)
    if isinstance(asked.params, Sequence):
        raise InvalidRequest("score takes one PoolingParams for all pairs.", "pooling_params")
    made = Tokenization.parse(asked.tokenization)
    if not made.add_special_tokens:
        raise InvalidRequest("add_special_tokens=False means nothing to pairs.", "add_special_tokens")
    (adapter,) = _adapters(engine, asked, 1)
    queries, documents = parse_side(data_1, "data_1"), parse_side(data_2, "data_2")
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


def sparse_plan(engine: Engine, prompts: Prompts, asked: Asked, pruning: Pruning) -> sparse.Plan:
    """Requests of `LLM.embed_sparse`, and what becomes of their answers.

    Raises:
        InvalidRequest, UnsupportedTask: see `poolhouse.sparse.plan`.
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
    return parse_task(word, engine.tasks)


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
        if parse_task(word, engine.tasks) != task:
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
