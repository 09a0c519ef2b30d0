"""Calls: what a method of LLM runs and what its answers become, described once, then run at once or awaited.

A method describes its call; `blocking` turns the description into the method that users call, and `coroutine` into the
one that they await:

    describe(prompts, options) -> Call(requests, finish)
        blocking:   submit some requests ahead, wait for each answer in order, finish
        coroutine:  submit, await all answers, finish
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import wraps
from operator import itemgetter
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeAlias, TypeVar, cast

import numpy as np

from poolhouse.engine.interface import EngineFacts, OfflineEngine
from poolhouse.engine.queue import Caller
from poolhouse.engine.request import (
    Answer,
    LookedUp,
    PromptFields,
    Request,
    entities_of,
    pooling,
    pooling_outputs,
    prompt_fields,
    shown,
    token_fields,
)
from poolhouse.engine.waiting import gather, prompt_path, with_path
from poolhouse.errors import EngineError, InvalidRequest, UnsupportedTask
from poolhouse.inputs.prompts import role_of
from poolhouse.llm.requests import Asked, AskedLabels, AskedScores
from poolhouse.outputs import (
    Array,
    ChunkedEmbeddingRequestOutput,
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Entity,
    ExtractionOutput,
    ExtractionRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    SparseRequestOutput,
    TokenClassificationOutput,
    TokenClassificationRequestOutput,
)
from poolhouse.plans.late_chunking import Chunked, fixed_chunks
from poolhouse.plans.scoring import Score
from poolhouse.plans.several import SPARSE, SeveralPlan
from poolhouse.plans.sparse import Sparse
from poolhouse.plans.zero_shot import Labelled
from poolhouse.plugins import Plugin, task_of
from poolhouse.vectors.entities import Strategy, entities, probabilities
from poolhouse.vectors.muvera import Muvera
from poolhouse.vectors.precision import Codes, parse_precision, quantize
from poolhouse.vectors.token_embeddings import TokenEmbeddings
from poolhouse.vectors.token_pooling import check_factor
from poolhouse.vectors.token_pooling import pooled as pool_tokens

P = ParamSpec("P")
T = TypeVar("T")
Result = TypeVar("Result")
Found = TypeVar("Found")


class Submits(Protocol):
    """An engine, as far as calls need it."""

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def processes(self) -> int: ...

    def submit(
        self, requests: Sequence[Request], waits: bool = ..., caller: Caller | None = ...
    ) -> list[Future[Answer]]: ...


class HasEngine(Protocol):
    """An LLM, whose methods are described."""

    @property
    def engine(self) -> OfflineEngine: ...


Owner = TypeVar("Owner", bound=HasEngine)


# vLLM's `use_tqdm`: whether to draw progress, or a function with tqdm's parameters that does.
Progress = bool | Callable[..., Any]

# A request and its answer.
Answered = tuple[Request, Answer]

# Progress is drawn only when there is enough to wait for.
_MIN_PROMPTS_TO_DRAW = 256
# Requests that are made and submitted at a time, at least; twice as many are under way. Packs of like lengths are chosen
# from them: of 512, a text of five words takes 2 % longer. Where packs are large, half as many as a pack has tokens.
_WINDOW = 1024
# Texts that a table answers at once; fewer are submitted one by one.
_LOOKED_UP = 1024
# Texts whose token vectors become encodings together.
_ENCODED_AT_ONCE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Call(Generic[Result]):
    """What a method runs, and what its answers become.

    requests: a list, all of which is submitted at once; or what makes them on the way, a window at a time.
    finish: the result of all answers, which it gets one by one with their requests, in order.
    label, progress: the name of the progress bar, and whether or how it is drawn; coroutines draw none.
    window: how many requests are submitted at once, where their answers are large.
    path: where the caller gave the prompt of a request, for messages.
    arrays_alone: whether `finish` reads nothing of an answer but the array.
    """

    requests: list[Request] | Asked | AskedLabels | AskedScores
    finish: Callable[[Iterable[Answered]], Result]
    label: str
    progress: Progress
    window: int | None = None
    path: Callable[[int], str] = prompt_path
    arrays_alone: bool = False


# A call that takes long to prepare or to finish (a plugin's code, whole texts to tokenize) is described by a function,
# which coroutines run in a thread.
Described: TypeAlias = Call[Result] | Callable[[], Call[Result]]


def blocking(
    describe: Callable[Concatenate[Owner, P], Described[Result]],
) -> Callable[Concatenate[Owner, P], Result]:
    """The method that waits for the result of the described call: a decorator.

    The first failure, in order, is raised, and what still waits is cancelled.
    """

    @wraps(describe)
    def method(llm: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        described = describe(llm, *args, **kwargs)
        call = described() if callable(described) else described
        total = len(call.requests)
        answers = _looked_up(llm.engine, call) or _answered(llm.engine, call)
        with closing(answers) as answered:
            return call.finish(_drawn(answered, total, call.progress, call.label))

    _present(method, describe, inspect.signature(describe))
    return method


def coroutine(
    method: Callable[Concatenate[Owner, P], Result], cancels: str = "the prompts"
) -> Callable[Concatenate[Owner, P], Coroutine[Any, Any, Result]]:
    """The async version of a blocking method: `NAME_async`, without `use_tqdm`. cancels: what its docstring says of cancelling.

    For type checkers it has `use_tqdm` too, since no type can leave a keyword out.
    """
    describe = inspect.unwrap(method)
    signature = inspect.signature(describe)
    signature = signature.replace(
        parameters=[parameter for name, parameter in signature.parameters.items() if name != "use_tqdm"]
    )

    async def method_async(llm: Owner, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        for name in kwargs:
            if name not in signature.parameters:
                raise TypeError(f"{method_async.__qualname__}() got an unexpected keyword argument '{name}'")
        described: Described[Result] = describe(llm, *args, **kwargs)
        call = await asyncio.to_thread(described) if callable(described) else described
        if not isinstance(call.requests, list) and len(call.requests) > _window_of(llm.engine, call):
            return await _in_thread(llm.engine, call)
        requests = list(call.requests)
        answered = zip(requests, await gather(llm.engine.submit(requests), call.path), strict=True)
        return await asyncio.to_thread(call.finish, answered) if callable(described) else call.finish(answered)

    _present(method_async, describe, signature, "_async")
    method_async.__doc__ = f"`{describe.__name__}` for coroutines; cancelling it takes {cancels} out of the queue."
    return method_async


async def _in_thread(engine: OfflineEngine, call: Call[Result]) -> Result:
    """The result of a large call, whose windows a thread waits for; cancelling it takes what waits out of the queue."""
    stoppable = _Stoppable(engine)

    def work() -> Result:
        with closing(_answered(stoppable, call)) as answered:
            return call.finish(answered)

    try:
        return await asyncio.to_thread(work)
    except asyncio.CancelledError:
        stoppable.stop()
        raise


class _Stoppable:
    """An engine for one call, which another thread may stop: what is under way is cancelled, and no more is taken."""

    def __init__(self, engine: OfflineEngine) -> None:
        self.facts, self.processes = engine.facts, engine.processes
        self._engine = engine
        self._windows: deque[Sequence[Future[Answer]]] = deque(maxlen=2)
        self._stopped = False

    def submit(
        self, requests: Sequence[Request], waits: bool = False, caller: Caller | None = None
    ) -> list[Future[Answer]]:
        """As `Engine.submit`; a coroutine's requests are never computed by who waits for them."""
        futures = self._engine.submit(requests, False, caller)
        self._windows.append(futures)
        if self._stopped:
            self.stop()
            raise CancelledError
        return futures

    def stop(self) -> None:
        # First: what is submitted from now on is seen here, or sees this.
        self._stopped = True
        for futures in list(self._windows):
            for future in futures:
                future.cancel()


def _present(
    function: Callable[..., object], describe: Callable[..., object], signature: inspect.Signature, ending: str = ""
) -> None:
    """Let `help` and `inspect` show a method under its own name, with the result in place of the description."""
    result = str(signature.return_annotation).removeprefix("Described[").removesuffix("]")
    hints = {name: hint for name, hint in describe.__annotations__.items() if name in signature.parameters}
    function.__module__ = describe.__module__
    function.__name__, function.__qualname__ = describe.__name__ + ending, describe.__qualname__ + ending
    function.__annotations__ = {**hints, "return": result}
    function.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]


def of_answers(finish: Callable[[Iterable[Answer]], Result]) -> Callable[[Iterable[Answered]], Result]:
    """The `finish` of a call whose result needs the answers alone."""
    # Not by a loop, whose variables would keep the last request of a window.
    return lambda answered: finish(map(itemgetter(1), answered))


def stacked(answers: Iterable[Answer], count: int) -> Array:
    """Answers of one vector each as one matrix, [count, dimensions]; none of them is kept.

    Raises:
        InvalidRequest: vectors of different lengths.
    """
    matrix: Array | None = None
    for index, answer in enumerate(answers):
        row = answer.array
        if matrix is None:
            matrix = np.empty((count, *row.shape), row.dtype)
        if row.shape != matrix.shape[1:]:
            raise InvalidRequest(
                f"One matrix needs vectors of one length: prompts[0] has {matrix.shape[1]} dimensions, prompts[{index}] "
                f"{len(row)}.",
                "pooling_params",
            )
        matrix[index] = row
    assert matrix is not None
    return matrix


def _answered(engine: Submits, call: Call[Result]) -> Generator[Answered, None, None]:
    """The answers in order; those of a window are let go before another is submitted."""
    first, total = 0, len(call.requests)
    for window, futures in read_ahead(engine, _windows(engine, call), lambda window: window, True):
        yield from zip(window, results_of(futures, call.path, first, total > 1), strict=True)
        first += len(futures)
        del window, futures


def _looked_up(engine: OfflineEngine, call: Call[Result]) -> Generator[Answered, None, None] | None:
    """The answers of a table to many plain texts, by many at once; None where that cannot be.

    A request for each of them, and its future, take twice as long as to look them up.
    """
    asked = call.requests
    if not isinstance(asked, Asked) or asked.task != "embed" or len(asked) < _LOOKED_UP:
        return None

    def look_up(first: int) -> Future[LookedUp | None] | None:
        like = (part := asked.part(first, first + _LOOKED_UP)).like
        return None if like is None else engine.look_up(cast("Sequence[str]", part.prompts), like)

    # Whether the model is a table, before all prompts are looked at.
    opening = look_up(0)
    if opening is None:
        return None

    def start(first: int) -> list[Future[LookedUp | None]]:
        future = look_up(first) if first else opening
        return [] if future is None else [future]

    def generate() -> Generator[Answered, None, None]:
        for first, futures in _ahead(range(0, len(asked), _LOOKED_UP), start):
            part, found = asked.part(first, first + _LOOKED_UP), futures[0].result() if futures else None
            answers = [None] * len(part) if found is None else found.answers(len(part), not call.arrays_alone)
            # Those that need more care are submitted; for all others one request stands.
            places = [place for place, answer in enumerate(answers) if answer is None]
            like, rest = next(iter(part)), list(part.of(places))
            paths = [call.path(first + place) for place in places]
            futures_of_rest = engine.submit(rest, True) if rest else ()
            answered = zip(rest, results_of(futures_of_rest, paths.__getitem__), strict=True)
            for answer in answers:
                yield next(answered) if answer is None else (like, answer)

    return generate()


def window_of(engine: Submits) -> int:
    """How many requests of a call are submitted at a time, by the tokens of a pack and the processes that have packs."""
    return engine.processes * max(_WINDOW, (engine.facts.max_batch_tokens or 0) // 2)


def _windows(engine: Submits, call: Call[Result]) -> Iterator[list[Request]]:
    """The requests, so many at a time."""
    if isinstance(call.requests, list):
        yield call.requests
        return
    asked, size = iter(call.requests), _window_of(engine, call)
    while window := list(itertools.islice(asked, size)):
        yield window


def _window_of(engine: Submits, call: Call[Result]) -> int:
    return call.window or window_of(engine)


def read_ahead(
    engine: Submits, groups: Iterable[T], requests_of: Callable[[T], Sequence[Request]], waits: bool = False
) -> Iterator[tuple[T, Sequence[Future[Answer]]]]:
    """Groups in order, each with the futures of its answers: while one is read, the next is under way.

    All groups share the engine with other calls as one caller. waits: see `Engine.submit`. Leaving the loop, by an error
    or otherwise, cancels what still waits.
    """
    caller = Caller()
    return _ahead(groups, lambda group: engine.submit(requests_of(group), waits, caller))


def _ahead(
    groups: Iterable[T], start: Callable[[T], Sequence[Future[Found]]]
) -> Iterator[tuple[T, Sequence[Future[Found]]]]:
    """Groups in order, each with what was started for it: while one is read, the next is under way."""
    rest = iter(groups)
    started: deque[tuple[T, Sequence[Future[Found]]]] = deque()
    process = os.getpid()
    try:
        while True:
            for group in itertools.islice(rest, 2 - len(started)):
                started.append((group, start(group)))
            if not started:
                return
            yield started[0]
            if os.getpid() != process:
                raise EngineError(
                    "This process was forked while it read answers, which its parent goes on to read: start over here."
                )
            started.popleft()
    finally:
        # Without names of this module: at the interpreter's end they are gone.
        for _, futures in started:
            for future in futures:
                future.cancel()


def results_of(
    futures: Sequence[Future[Answer]], path: Callable[[int], str], first: int = 0, several: bool = True
) -> Iterator[Answer]:
    """The answers of these futures, waited for in order.

    path, first: where the caller gave the prompt of a request, and how many requests were before these.
    several: whether there are others, so that an error says which one it is about.

    Raises:
        PoolhouseError: the first failure; of a wrong prompt, with its path.
    """
    try:
        for future in futures:
            yield future.result()
    except InvalidRequest as error:
        raise with_path(error, futures, lambda index: path(first + index), several) from None


def _drawn(answered: Iterable[Answered], total: int, progress: Progress, label: str) -> Iterable[Answered]:
    """The answers, drawn as progress where that is wanted and there is enough to wait for."""
    if callable(progress):
        drawn: Iterable[Answered] = progress(answered, total=total, desc=label)
    elif not progress or total < _MIN_PROMPTS_TO_DRAW:
        drawn = answered
    else:
        from tqdm import tqdm

        drawn = tqdm(answered, total=total, desc=label, unit=" prompts", dynamic_ncols=True, disable=None)
    return drawn


def pooled(engine: OfflineEngine) -> Callable[[str, Answered], PoolingRequestOutput]:
    """The rows of any task, and what each stands for where they are those of chunks."""

    def build(request_id: str, answered: Answered) -> PoolingRequestOutput:
        request, answer = answered
        output = pooling(request.task, engine.facts.token_weights)(request_id, answer)
        chunking = request.params.late_chunking_params
        return output if chunking is None else replace(output, late_chunking=fixed_chunks(chunking, answer.tokens))

    return build


def several(engine: OfflineEngine, plan: SeveralPlan) -> Callable[[str, Answered], PoolingRequestOutput]:
    """The rows of several tasks and the sparse vector of a prompt, by task."""
    weights = engine.facts.token_weights

    def build(request_id: str, answered: Answered) -> PoolingRequestOutput:
        _, answer = answered
        outputs: Any = {
            task: plan.vector(answer)
            if task == SPARSE
            else PoolingOutput(shown(plan.array(answer, task), task, weights))
            for task in plan.tasks
        }
        return PoolingRequestOutput(request_id, outputs, **prompt_fields(answer))

    return build


def embedded(request_id: str, answered: Answered) -> EmbeddingRequestOutput:
    """The vector of a prompt."""
    _, answer = answered
    return EmbeddingRequestOutput(request_id, EmbeddingOutput(answer.array), **prompt_fields(answer))


def classified(engine: OfflineEngine) -> Callable[[str, Answered], ClassificationRequestOutput]:
    """The probabilities of a prompt, and the name of the likeliest label."""
    labels = engine.facts.label_names

    def build(request_id: str, answered: Answered) -> ClassificationRequestOutput:
        _, answer = answered
        output = ClassificationOutput(answer.array, labels.get(int(answer.array.argmax())))
        return ClassificationRequestOutput(request_id, output, **prompt_fields(answer))

    return build


def zero_shot(request_id: str, text: Labelled) -> ClassificationRequestOutput:
    """The labels of a text, by one answer or several."""
    output = ClassificationOutput(text.array, text.label)
    return ClassificationRequestOutput(request_id, output, **_fields_of(text.answers))


def entity_finder(
    engine: OfflineEngine, strategy: Strategy = "simple", ignored: Collection[str] = ("O",)
) -> Callable[[Answered], list[Entity]]:
    """What finds the entities of a text that was asked for the labels of its tokens and for offsets.

    It raises UnsupportedTask where the model's rows are no labels of tokens.
    """

    def find(answered: Answered) -> list[Entity]:
        request, answer = answered
        text, offsets, scores = request.prompt.text, answer.tokens.offsets, answer.array
        if engine.facts.token_weights:
            raise UnsupportedTask("This model weighs tokens, it does not label them; use embed_sparse or encode.")
        if len(scores) != len(answer.tokens):
            raise UnsupportedTask(
                "Entities need a row per token, but this model pools steps (STEP); use encode instead."
            )
        assert text is not None
        assert offsets is not None
        activates = request.params.use_activation
        if not ("token_classify" in engine.facts.activated if activates is None else activates):
            scores = probabilities(scores)
        return entities(text, scores, offsets, engine.facts.label_names, strategy, ignored)

    return find


def labelled(
    engine: OfflineEngine, strategy: Strategy, ignored: Collection[str]
) -> Callable[[str, Answered], TokenClassificationRequestOutput]:
    """The labels of a prompt's tokens, and the entities that they make."""
    find = entity_finder(engine, strategy, ignored)

    def build(request_id: str, answered: Answered) -> TokenClassificationRequestOutput:
        _, answer = answered
        output = TokenClassificationOutput(answer.array, tuple(find(answered)))
        return TokenClassificationRequestOutput(request_id, output, **prompt_fields(answer))

    return build


def extracted(request_id: str, answered: Answered) -> ExtractionRequestOutput:
    """What was found in a text."""
    request, answer = answered
    output = ExtractionOutput(entities_of(request, answer))
    return ExtractionRequestOutput(request_id, output, **prompt_fields(answer))


def scored(request_id: str, score: Score) -> ScoringRequestOutput:
    """A pair's score."""
    pruned = score.pruned
    output = (
        ScoringOutput(score.score)
        if pruned is None
        else ScoringOutput(score.score, pruned.text, pruned.sentences, pruned.compression)
    )
    return ScoringRequestOutput(request_id, output, **_fields_of(score.answers))


def _fields_of(answers: Sequence[Answer]) -> PromptFields:
    """What an output says about all prompts that were run for it; its token ids are those of all."""
    prompts = [prompt_fields(answer) for answer in answers]
    return {
        "prompt_token_ids": [token for own in prompts for token in own["prompt_token_ids"]],
        "truncated": any(own["truncated"] for own in prompts),
        "original_tokens": sum(own["original_tokens"] for own in prompts),
        "original_is_estimate": any(own["original_is_estimate"] for own in prompts),
        "chunks": max(own["chunks"] for own in prompts),
    }


def chunked(request_id: str, text: Chunked) -> ChunkedEmbeddingRequestOutput:
    """A text's chunks and their vectors."""
    return ChunkedEmbeddingRequestOutput(request_id, text.chunks, **token_fields(text.tokens, text.windows))


def sparse_output(request_id: str, text: Sparse) -> SparseRequestOutput:
    """A prompt's sparse vector."""
    return SparseRequestOutput(request_id, text.vector, **token_fields(text.tokens, text.chunks))


def packing(
    engine: OfflineEngine, input_type: str | None, factor: float | None, precision: str
) -> Callable[[Iterable[Answer]], TokenEmbeddings]:
    """How answers become one packed matrix of token vectors; see `LLM.embed_tokens`.

    Raises:
        InvalidRequest: options that are unknown or cannot be honoured.
    """
    parsed = parse_precision(precision)
    if factor is not None:
        check_factor(factor, role_of(input_type))

    def pack(answers: Iterable[Answer]) -> TokenEmbeddings:
        matrices = [answer.array if factor is None else pool_tokens(answer.array, factor) for answer in answers]
        return TokenEmbeddings.of(matrices, parsed, engine.facts.calibration)

    return pack


def encoding(muvera: Muvera, input_type: str | None, precision: str, count: int) -> Callable[[Iterable[Answer]], Codes]:
    """How answers of token vectors become one matrix with an encoding each; see `LLM.embed_array`.

    Raises:
        InvalidRequest: a precision that encodings cannot have.
    """
    parsed, queries = muvera.checked(parse_precision(precision)), role_of(input_type) == "query"

    def encode(answers: Iterable[Answer]) -> Codes:
        arrays = (answer.array for answer in answers)
        matrix, first = None, 0
        while block := list(itertools.islice(arrays, _ENCODED_AT_ONCE)):
            codes = quantize(muvera.encode(block, queries=queries), parsed)
            if matrix is None:
                matrix = np.empty((count, codes.shape[1]), codes.dtype)
            matrix[first : first + len(block)] = codes
            first += len(block)
        assert matrix is not None
        return matrix

    return encode


def from_plugin(engine: OfflineEngine, plugin: Plugin) -> Callable[[Iterable[Answer]], list[PoolingRequestOutput]]:
    """One output, whose `outputs` is what the plugin makes of the answers and which has no id, as in vLLM."""

    def finish(answers: Iterable[Answer]) -> list[PoolingRequestOutput]:
        outputs = pooling_outputs(list(answers), task_of(plugin, engine.facts.tasks), engine.facts.token_weights)
        return [PoolingRequestOutput("", plugin.post_process(outputs), [])]

    return finish
