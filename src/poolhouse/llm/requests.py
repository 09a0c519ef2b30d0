"""Requests: what callers of LLM ask for, checked and turned into requests of the engine."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Protocol

from poolhouse.engine.interface import OfflineEngine
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import InvalidRequest, PoolhouseError, UnsupportedDimensions, UnsupportedTask, did_you_mean
from poolhouse.inputs.content import TextOrContent
from poolhouse.inputs.labels import Labels, labels_of
from poolhouse.inputs.prompts import Prompt, PromptsInput, TextsInput, check_prompts, parse_texts
from poolhouse.params import PoolingParams, PruningParams, parse_lora_requests
from poolhouse.plans import scoring, several, sparse, zero_shot
from poolhouse.plugins import Plugin, PluginPrompt, is_data, params_of, prompts_of, task_of
from poolhouse.tasks import Task, parse_task


class NamedAdapter(Protocol):
    """An adapter for a request: `poolhouse.LoRARequest`, or vLLM's class of the same name."""

    @property
    def lora_name(self) -> str: ...


# Fields of requests that are the same for all prompts of a call: an error of theirs belongs to none of them.
_OF_ALL = frozenset(
    """
    adapter dimensions flat hypothesis_template input_type instruction labels lora_request multi_label pooling_params
    prompt_name task tasks threshold tokenization_kwargs
    """.split()  # noqa: SIM905
)


def is_of_all(error: PoolhouseError, engine: OfflineEngine) -> bool:
    """Whether an error is no single prompt's: of an option of all of them, or of an engine that is lost."""
    parameter = error.parameter if isinstance(error, InvalidRequest) else None
    return parameter in _OF_ALL or isinstance(error, UnsupportedDimensions) or not engine.alive


# What callers may give: parameters for all prompts or for each, adapters likewise, and vLLM's dictionaries of options.
Params = PoolingParams | Sequence[PoolingParams] | None
Adapters = str | NamedAdapter | Sequence[str | NamedAdapter | None] | None
Variables = Mapping[str, object] | None
# Which sentences of documents stay; see `PruningParams.parse`.
Pruning = bool | float | PruningParams | Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class CallOptions:
    """The options that most methods of LLM share.

    params: one for all prompts, or one for each. tokenization: vLLM's `tokenization_kwargs`.
    lora: vLLM's `lora_request`. adapter_task: a task adapter that came with the checkpoint.
    input_type: what the texts are ("query", "document").
    """

    params: Params = None
    prompt_name: str | None = None
    tokenization: Variables = None
    lora: Adapters = None
    adapter_task: str | None = None
    input_type: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """The requests of one call, checked; each is made when its turn comes.

    A request with its future and its answer takes ten times the memory of a short text, so those of a million texts are
    never there at once. params, adapters, labels: of each prompt. offsets: as in `Request`.
    """

    prompts: Sequence[str | Prompt]
    task: Task
    params: Sequence[PoolingParams]
    adapters: Sequence[str | None]
    options: CallOptions
    tokenization: Tokenization
    offsets: bool = False
    labels: Sequence[Labels] | None = None
    further: tuple[Task, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def like(self) -> Request | None:
        """What is asked of every text; None where prompts are no plain texts, or are asked for differently."""
        alike = len(set(map(id, self.params))) == len(set(self.adapters)) == 1
        if not alike or not all(type(prompt) is str for prompt in self.prompts):
            return None
        return next(iter(self.part(0, 1)))

    def part(self, first: int, last: int) -> Asked:
        """The requests of some of the prompts."""
        own = slice(first, last)
        return replace(self, prompts=self.prompts[own], params=self.params[own], adapters=self.adapters[own])

    def of(self, places: Sequence[int]) -> Asked:
        """The requests of these prompts."""
        return replace(
            self,
            prompts=[self.prompts[place] for place in places],
            params=[self.params[place] for place in places],
            adapters=[self.adapters[place] for place in places],
        )

    def __iter__(self) -> Iterator[Request]:
        """New ones, whenever they are asked for."""
        options = self.options
        labels: Sequence[Labels | None] = self.labels or [None] * len(self.prompts)
        for prompt, params, adapter, own in zip(self.prompts, self.params, self.adapters, labels, strict=True):
            yield self.tokenization.applied(
                Request(
                    Prompt(prompt) if isinstance(prompt, str) else prompt,
                    self.task,
                    params,
                    options.prompt_name,
                    adapter=adapter,
                    offsets=self.offsets,
                    input_type=options.input_type,
                    local_files=True,
                    labels=own,
                    further=self.further,
                )
            )


def with_labels(
    asked: Asked, labels: object, threshold: object = 0.5, flat: object = True, multi_label: object = False
) -> Asked:
    """The same texts with labels: for all alike, or a list of lists, one for each.

    Raises:
        InvalidRequest: naming the field that is wrong.
    """
    return replace(asked, labels=labels_of(labels, len(asked), threshold, flat, multi_label))


def requests_of(
    engine: OfflineEngine, prompts: PromptsInput, task: Task, options: CallOptions, first: int = 0
) -> list[Request]:
    """A request per prompt, in order; arguments and errors as those of `asked_of`."""
    return list(asked_of(engine, prompts, task, options, first))


def asked_of(engine: OfflineEngine, prompts: PromptsInput, task: Task, options: CallOptions, first: int = 0) -> Asked:
    """A request per prompt, in order. first: the number of the first one, for messages.

    Raises:
        UnsupportedTask: naming what the model can do. InvalidRequest: naming what is wrong.
    """
    if task not in engine.facts.tasks:
        raise UnsupportedTask(f"{_cannot(task, engine.facts.tasks)} Supported tasks: {list(engine.facts.tasks)}")
    _check_types(options.params, options.prompt_name)
    _check_tasks(options.params, task, engine)
    parsed = check_prompts(prompts, first=first)
    adapters = _adapters(engine, options, len(parsed))
    tokenization = Tokenization.parse(options.tokenization)
    if options.params is None or isinstance(options.params, PoolingParams):
        params = [tokenization.params(options.params)] * len(parsed)
    else:
        params = [tokenization.params(own) for own in options.params]
    if len(params) != len(parsed):
        raise InvalidRequest(
            f"pooling_params has {len(params)} entries for {len(parsed)} prompts; give one, or one per prompt.",
            "pooling_params",
        )
    return Asked(parsed, task, params, adapters, options, tokenization)


def _cannot(task: Task, tasks: Sequence[Task]) -> str:
    """The error for a task that the model lacks: vLLM's wording where it helps."""
    if task == "embed" and "token_embed" in tasks:
        return (
            "This model gives a vector per token, not one per text: use embed_tokens, embed_array with muvera, and score to "
            "compare texts."
        )
    if task == "embed":
        return "Embedding API is not supported by this model. Try converting the model using `--convert embed`."
    if task == "classify":
        return (
            "Classification API is not supported by this model. Try converting the model using `--convert classify`, if "
            "its checkpoint has a classifier's head."
        )
    return f"Unsupported task: '{task}'"


def score_plan(
    engine: OfflineEngine,
    queries: Sequence[TextOrContent],
    documents: Sequence[TextOrContent],
    options: CallOptions,
    score_options: scoring.ScoreOptions,
) -> scoring.ScorePlan:
    """Requests of `LLM.score`, and how their answers become scores.

    Raises:
        InvalidRequest, UnsupportedTask: see `poolhouse.plans.scoring.plan`.
    """
    tokenization = Tokenization.parse(options.tokenization)
    params = tokenization.params(one_for_all(options, "score takes one PoolingParams for all pairs."))
    if not tokenization.add_special_tokens:
        raise InvalidRequest("add_special_tokens=False means nothing to pairs.", "add_special_tokens")
    (adapter,) = _adapters(engine, options, 1)
    plan = scoring.plan(engine, queries, documents, replace(score_options, params=params))
    requests = [tokenization.applied(replace(request, adapter=adapter, local_files=True)) for request in plan.requests]
    return replace(plan, requests=requests)


class AskedScores:
    """The requests of many pairs, planned window by window; `finish` makes scores of their answers in the same windows.

    plan: of the pairs from one number to another. queries, pairs: how many there are. Where texts are read apart, the one
    query of all documents is a request in each window.
    """

    def __init__(self, plan: Callable[[int, int], scoring.ScorePlan], queries: int, pairs: int, window: int) -> None:
        self._plan, self._queries, self._pairs, self._window = plan, queries, pairs, min(window, pairs)
        # What is wrong with all pairs is found before any is asked.
        self._first: scoring.ScorePlan | None = plan(0, self._window)
        self._each = len(self._first.requests)
        self._under_way: deque[tuple[scoring.ScorePlan, int]] = deque()

    def __len__(self) -> int:
        whole, rest = divmod(self._pairs, self._window)
        return whole * self._each + (rest + self._beside(rest) if rest else 0)

    def __iter__(self) -> Iterator[Request]:
        for begin in range(0, self._pairs, self._window):
            plan, self._first = self._first or self._plan(begin, min(begin + self._window, self._pairs)), None
            requests = plan.requests
            self._under_way.append((replace(plan, requests=[]), len(requests)))
            yield from requests
            del plan, requests

    def finish(self, answers: Iterable[Answer]) -> Iterator[scoring.Score]:
        """The scores, in order; the answers of a window are let go with it."""
        rest = iter(answers)
        # Reading an answer is what makes the requests of its window.
        for answer in rest:
            plan, count = self._under_way.popleft()
            yield from plan.finish([answer, *islice(rest, count - 1)])

    def path(self, index: int) -> str:
        """Where the caller gave the text of a request; a list of documents may share one."""
        if self._each < self._window:
            return "data_2"
        number, index = divmod(index, self._each)
        begin = number * self._window
        queries = self._beside(min(self._window, self._pairs - begin))
        if index < queries:
            return f"data_1[{index if self._queries == 1 else begin + index}]"
        return f"data_2[{begin + index - queries}]"

    def _beside(self, documents: int) -> int:
        """Requests of a window beside those of its documents, which come last."""
        if self._each <= self._window:
            return 0
        return 1 if self._queries == 1 else documents


def asked_scores(
    engine: OfflineEngine,
    data_1: TextsInput,
    data_2: TextsInput,
    options: CallOptions,
    score_options: scoring.ScoreOptions,
    window: int,
) -> AskedScores:
    """The pairs of `LLM.score`; errors as those of `score_plan`. window: pairs that are planned at a time."""
    queries, documents = parse_texts(data_1, "data_1"), parse_texts(data_2, "data_2")
    scoring.check_lengths(queries, documents)
    if engine.facts.listwise is not None:
        # It reads all documents of a query together.
        window = len(documents)

    def plan(begin: int, end: int) -> scoring.ScorePlan:
        own = queries if len(queries) == 1 else queries[begin:end]
        return score_plan(engine, own, documents[begin:end], options, score_options)

    return AskedScores(plan, len(queries), len(documents), window)


class AskedLabels:
    """The requests of texts and the labels that they are classified by; `finish` makes labelled texts of their answers."""

    def __init__(self, plan: zero_shot.LabelPlan, texts: Asked) -> None:
        self._plan, self._texts = plan, texts
        self._total = plan.total

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Request]:
        return self._plan.requests(self._texts)

    def finish(self, answers: Iterable[Answer]) -> Iterator[zero_shot.Labelled]:
        """The labels of each text, in order."""
        return self._plan.finish(answers)

    def path(self, index: int) -> str:
        """Where the caller gave the text of a request."""
        return f"prompts[{self._plan.text_of(index)}]"


def asked_labels(
    engine: OfflineEngine,
    prompts: PromptsInput,
    labels: object,
    options: CallOptions,
    label_options: zero_shot.LabelOptions,
) -> AskedLabels:
    """Texts and the labels that `LLM.classify` was given for them.

    Raises:
        InvalidRequest, UnsupportedTask: see `asked_of` and `poolhouse.plans.zero_shot.plan`.
    """
    params = one_for_all(options, "classify with labels takes one PoolingParams for all prompts.")
    logits = params is not None and params.use_activation is False
    texts = asked_of(engine, prompts, "classify", options)
    plan = zero_shot.plan(engine, labels, len(texts), replace(label_options, use_activation=not logits))
    for index, prompt in enumerate(texts.prompts):
        if not isinstance(prompt, str):
            zero_shot.check_text(prompt, f"prompts[{index}]")
    return AskedLabels(plan, texts)


def several_plan(
    engine: OfflineEngine, tasks: object, pooling_task: str | None, options: CallOptions
) -> several.SeveralPlan:
    """What the tasks of a call of `LLM.encode` run.

    Raises:
        InvalidRequest: they are no list of names, or `pooling_task` or parameters for each prompt are there too.
        UnsupportedTask: the model lacks one.
    """
    if pooling_task is not None:
        raise InvalidRequest("Give pooling_task or tasks, not both.", "tasks")
    if not isinstance(tasks, list | tuple) or not tasks or not all(isinstance(name, str) for name in tasks):
        raise InvalidRequest(f"tasks must be a list of names of tasks, got {tasks!r}.", "tasks", tasks)
    params = one_for_all(options, "Several tasks take one PoolingParams for all prompts.")
    return several.plan(engine, tasks, sparse.SparseOptions(), params)


def sparse_asked(
    engine: OfflineEngine, prompts: PromptsInput, options: CallOptions, sparse_options: sparse.SparseOptions
) -> tuple[sparse.SparsePlan, Asked]:
    """Requests of `LLM.embed_sparse`, and what becomes of their answers.

    Raises:
        InvalidRequest, UnsupportedTask: see `poolhouse.plans.sparse.plan`.
    """
    tokenization = Tokenization.parse(options.tokenization)
    params = tokenization.params(one_for_all(options, "embed_sparse takes one PoolingParams for all prompts."))
    parsed = check_prompts(prompts)
    plan = sparse.plan(engine, (), replace(sparse_options, params=params))
    adapters = _adapters(engine, options, len(parsed))
    return plan, Asked(parsed, plan.head.task, [plan.params] * len(parsed), adapters, options, tokenization)


def plugin_of(engine: OfflineEngine, prompts: object, pooling_task: str | None) -> Plugin | None:
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


def plugin_requests(
    engine: OfflineEngine, plugin: Plugin, data: PromptsInput | PluginPrompt, options: CallOptions
) -> list[Request]:
    """Requests for the prompts that a plugin builds from the caller's data.

    Raises:
        InvalidRequest: data that the plugin does not understand, or several parameters.
    """
    params = one_for_all(options, "pooling_params: a plugin takes one PoolingParams for all its prompts.")
    task = parse_task(task_of(plugin, engine.facts.tasks), engine.facts.tasks)
    options = replace(options, params=params_of(plugin, params))
    return requests_of(engine, prompts_of(plugin, data), task, options)


_NO_TASK = """`pooling_task` is required. Choose one of these, or use the method for it:
- embeddings: `LLM.embed(...)` or `pooling_task="embed"`
- multi-vector retrieval: `pooling_task="token_embed"`
- classification: `LLM.classify(...)` or `pooling_task="classify"`
- rewards and token classification: `pooling_task="token_classify"`"""


def required_task(name: str | None, params: Params, engine: OfflineEngine) -> Task:
    """The task of a call of `LLM.encode`, by its `pooling_task` or by its parameters.

    Raises:
        InvalidRequest: neither names one; the message lists them.
    """
    if name is None and isinstance(params, PoolingParams):
        name = params.task
    if name is None:
        raise InvalidRequest(_NO_TASK, "pooling_task")
    return parse_task(name, engine.facts.tasks)


def one_for_all(options: CallOptions, error: str) -> PoolingParams | None:
    """The parameters of a call that takes the same for all prompts."""
    _check_types(options.params, options.prompt_name)
    if isinstance(options.params, Sequence):
        raise InvalidRequest(error, "pooling_params")
    return options.params


def _adapters(engine: OfflineEngine, options: CallOptions, prompts: int) -> list[str | None]:
    """The adapter's name for each prompt; an adapter that a request brings is loaded once.

    Raises:
        InvalidRequest: two ways to choose one, or a model that takes none.
    """
    if options.lora is None:
        return [options.adapter_task] * prompts
    if options.adapter_task is not None:
        raise InvalidRequest("lora_request and task both choose an adapter; give one of them.", "task")
    requests = parse_lora_requests(options.lora, prompts)
    for request in {request for request in requests if request and request.lora_path}:
        engine.load_adapter(request.lora_name, request.lora_path)
    return [None if request is None else request.lora_name for request in requests]


def _check_tasks(params: Params, task: Task, engine: OfflineEngine) -> None:
    """Raise InvalidRequest for parameters that name another task than the call."""
    several = params if isinstance(params, Sequence) else (params,)
    for name in {one.task for one in several if one is not None and one.task is not None}:
        if parse_task(name, engine.facts.tasks) != task:
            raise InvalidRequest(f"You cannot overwrite task='{name}' of pooling_params with '{task}'.", "task", name)


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
_WITHOUT_EFFECT = ("needs_detokenization", "pad_prompt_tokens", "padding")
_CUTS = (True, "longest_first")
_DOES_NOT_CUT = (None, False, "do_not_truncate")


@dataclass(frozen=True, slots=True)
class Tokenization:
    """How to tokenize; None leaves it to the parameters or the model.

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
        """The caller's parameters with these limits."""
        params = params or PoolingParams()
        if self.keep is None and self.side is None:
            return params
        return replace(
            params,
            truncate_prompt_tokens=params.truncate_prompt_tokens if self.keep is None else self.keep,
            truncation_side=self.side or params.truncation_side,
        )

    def applied(self, request: Request) -> Request:
        """The request with the other options."""
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
        if name not in _KNOWN and name not in _WITHOUT_EFFECT:
            raise InvalidRequest(
                f"tokenization_kwargs has no option '{name}'.{did_you_mean(name, _KNOWN)} Options: {list(_KNOWN)}.",
                name,
            )
    ignored = [name for name in _WITHOUT_EFFECT if name in options]
    if ignored:
        warnings.warn(
            f"tokenization_kwargs: {', '.join(ignored)} mean nothing here and are ignored; prompts are never padded.",
            stacklevel=6,
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
