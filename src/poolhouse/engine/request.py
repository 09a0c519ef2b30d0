"""Request: what one prompt asks of the engine, and the future of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition
from typing import TypedDict

import numpy as np

from poolhouse.inputs.labels import Labels
from poolhouse.inputs.prompts import Prompt
from poolhouse.outputs import Array, Entity, PoolingOutput, PoolingRequestOutput
from poolhouse.packing.tokens import Ids, Picture, ShortTexts, Tokens
from poolhouse.params import PoolingParams
from poolhouse.tasks import Task
from poolhouse.vectors.entities import fitting


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time between `submit` and the answer went, in seconds; texts that went through together share one.

    tokenize: the tokenizer call. queue: waiting, for a tokenizer thread and for a batch.
    run: the batch, from its launch to its answers; of a prompt in chunks, that of the last one.
    """

    tokenize_seconds: float = 0.0
    queue_seconds: float = 0.0
    run_seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The result of one prompt.

    array: [features] for embed and classify, [tokens, features] for token tasks, [spans, features] for requests of spans,
    [found, 4] for extract: the first and the last word of what was found, the number of its label, its score.
    tokens: the prompt as the model saw it (whole, when it was split into chunks).
    further: the arrays of the request's further tasks, from the same pass.
    """

    array: Array
    tokens: Tokens
    chunks: int = 1
    further: Mapping[Task, Array] = field(default_factory=dict)
    timing: Timing = Timing()


@dataclass(frozen=True, slots=True, eq=False)
class LookedUp:
    """Texts that a table answered at once: the ids and [texts, features] vectors of those that needed no special care."""

    texts: ShortTexts
    vectors: Array
    timing: Timing

    def answers(self, count: int, tokens: bool = True) -> list[Answer | None]:
        """The answer of each of so many texts; None of those that need more care. tokens: whether anybody reads these."""
        found: list[Answer | None] = [None] * count
        texts, own = self.texts, Tokens(np.zeros(0, np.int64))
        ends = np.cumsum(texts.lengths).tolist()
        columns = texts.places, self.vectors, texts.lengths, texts.originals, ends
        for place, vector, length, original, end in zip(*columns, strict=True):
            if tokens:
                own = Tokens(texts.ids[end - length : end], original_tokens=original)
            found[place] = Answer(vector, own, timing=self.timing)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt, its task and parameters.

    prompt_name: name of a prompt stored with the checkpoint, put before the text; None takes the default one.
    input_type: what the text is ("query", "document"), which chooses the prompt where none is named.
    adapter: name of an adapter of the model; None takes the model's default, if it has one, "" takes none.
    lower_case: None leaves it to the model. max_tokens: refuse longer prompts than this.
    offsets: whether the answer's tokens say where in the text they stand.
    spans: [spans, 2], token ranges to embed instead of the whole, each by the mean of its tokens (late chunking).
    pictures: those of its prompt, once they are loaded: of `content` and `pair_content`, or of `images`, in order.
    local_files: whether texts among its images may name any file, as those of callers in this process may.
    further: tasks that are answered from the same pass. priority: lower ones go first.
    labels: what is looked for in the text, or what it may be, of models that read labels with each text.
    """

    prompt: Prompt
    task: Task
    params: PoolingParams = field(default_factory=PoolingParams)
    prompt_name: str | None = None
    add_special_tokens: bool = True
    adapter: str | None = None
    lower_case: bool | None = None
    max_tokens: int | None = None
    offsets: bool = False
    spans: Ids | None = None
    input_type: str | None = None
    further: tuple[Task, ...] = ()
    priority: int = 0
    pictures: tuple[Picture, ...] = ()
    local_files: bool = False
    labels: Labels | None = None
    future: Future[Answer] = field(default_factory=Future)


def start(future: Future[Answer]) -> bool:
    """Mark a future as being answered, so that it cannot be cancelled any more; False where nobody waits for it.

    A cancelled one is marked as noticed, which `concurrent.futures.wait` waits for.
    """
    if future.running() or (future.done() and not future.cancelled()):
        return False
    try:
        return future.set_running_or_notify_cancel()
    except RuntimeError:
        # Its request was submitted twice, and its end was noticed already.
        return False


def fail(future: Future[Answer], error: BaseException) -> None:
    """Give a future its error, whatever state it is in."""
    if future.running() or start(future):
        future.set_exception(error)


def shown(array: Array, task: str, token_weights: bool) -> Array:
    """The array as callers see it: a number per token where `token_classify` weighs tokens, as vLLM has it.

    token_weights: whether it does; see `EngineFacts`.
    """
    return array[:, 0] if task == "token_classify" and token_weights else array


def entities_of(request: Request, answer: Answer) -> tuple[Entity, ...]:
    """What was found in the text of a request of the task `extract`, in order of the first characters."""
    text, labels, marks = request.prompt.text, request.labels, answer.tokens.marks
    assert text is not None
    assert labels is not None
    assert marks is not None
    rows = answer.array[fitting(answer.array, labels.flat, labels.multi_label, marks.apart)]
    first, last, label = rows[:, :3].astype(np.int64).T
    starts, ends = marks.bounds[first, 0].tolist(), marks.bounds[last, 1].tolist()
    parts = zip(label.tolist(), rows[:, 3].tolist(), starts, ends, strict=True)
    return tuple(
        Entity(labels.names[number], score, start, end, text[start:end])
        for number, score, start, end in parts
        # The mark that a reader puts behind a text is no part of it.
        if start < end
    )


def pooling_outputs(answers: Sequence[Answer], task: str, token_weights: bool) -> list[PoolingRequestOutput]:
    """The answers of a task, numbered in order."""
    build = pooling(task, token_weights)
    return [build(str(index), answer) for index, answer in enumerate(answers)]


def pooling(task: str, token_weights: bool) -> Callable[[str, Answer], PoolingRequestOutput]:
    """Answers of a task as `LLM.encode` gives them."""

    def build(request_id: str, answer: Answer) -> PoolingRequestOutput:
        return PoolingRequestOutput(
            request_id, PoolingOutput(shown(answer.array, task, token_weights)), **prompt_fields(answer)
        )

    return build


class PromptFields(TypedDict):
    """What every output says about its prompt: fields of `PoolingRequestOutput` and its like."""

    prompt_token_ids: list[int]
    truncated: bool
    original_tokens: int
    original_is_estimate: bool
    chunks: int


def prompt_fields(answer: Answer) -> PromptFields:
    """What an output says about the prompt of an answer."""
    return token_fields(answer.tokens, answer.chunks)


def token_fields(tokens: Tokens, chunks: int) -> PromptFields:
    """What an output says about these tokens, read in so many pieces."""
    return {
        "prompt_token_ids": tokens.ids.tolist(),
        "truncated": tokens.truncated,
        "original_tokens": tokens.original_tokens,
        "original_is_estimate": tokens.original_is_estimate,
        "chunks": chunks,
    }


class Pending:
    """Counts requests from their acceptance until their futures are done, whichever way."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = Condition()

    def add(self, requests: Sequence[Request]) -> None:
        with self._changed:
            self.count += len(requests)
        for request in requests:
            request.future.add_done_callback(self._one_done)

    def wait(self, seconds: float) -> None:
        """Wait until there are none, for at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self.count == 0, seconds)

    def _one_done(self, _: Future[Answer]) -> None:
        with self._changed:
            self.count -= 1
            if self.count == 0:
                self._changed.notify_all()
