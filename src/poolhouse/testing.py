"""Test doubles: an engine without a model, for tests of what stands around engines."""

from __future__ import annotations

import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from poolhouse.engine.health import Faults
from poolhouse.engine.interface import EngineFacts, WarmUpLevel
from poolhouse.engine.observing import BatchRun, Guarded, Observer
from poolhouse.engine.request import Answer, Pending, Request, Timing, fail, start
from poolhouse.errors import EngineClosed, EngineError, InputTooLong, InvalidRequest
from poolhouse.inputs.content import Image
from poolhouse.inputs.conversations import Conversations
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt, check_ids, images_of
from poolhouse.outputs import Array
from poolhouse.packing.tokens import Ids, Marks, Offsets, Picture, Pictures, Tokens
from poolhouse.params import Matryoshka, PoolingParams
from poolhouse.tasks import TOKEN_TASKS, SparseHead, Task, parse_task
from poolhouse.vectors.precision import Calibration


class FakeEngine:
    """An engine that makes its answers of the text alone, one request after the other.

    The same text always gets the same vector of unit length, another text another one. Words are its tokens.
    delay_seconds: time that each request takes. failure: what every request fails with.
    conversations: what renders messages; one line per message, `role: content`, unless set.
    sparse: how its answers become sparse vectors. dimensions: the Matryoshka sizes it offers.
    label_names: of `classify`, whose answers are as wide. pictures: whether prompts may hold pictures, which are not
    looked at: the same source is the same picture, of four tokens. Of `extract`, a word that is a label is found, with a
    score of 0.9. `received` holds every request it was given.
    Clear `open` to let requests wait until it is set again; set `alive` to False to let the engine be dead, or call `die`
    to let it die of an error. `warmed_up` holds the levels that it was warmed up with.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        tasks: tuple[Task, ...] = ("embed", "token_embed"),
        width: int = 8,
        max_tokens: int = 512,
        prompts: Mapping[str, str] | None = None,
        dimensions: tuple[int, ...] = (),
        label_names: Mapping[int, str] | None = None,
        calibration: Calibration | None = None,
        sparse: SparseHead | None = None,
        pictures: bool = False,
        delay_seconds: float = 0.0,
        failure: Exception | None = None,
    ) -> None:
        self.facts = EngineFacts(
            name=name,
            tasks=tasks,
            max_tokens=max_tokens,
            labels=len(label_names or {}),
            label_names=label_names or {},
            width=width,
            pooling="mean",
            prompts=prompts or {},
            sparse=sparse,
            pictures=pictures,
            reads_labels="extract" in tasks,
            calibration=calibration,
            max_batch_tokens=2048,
            tokenizer_threads=1,
        )
        self.width = width
        self.matryoshka = Matryoshka(width, bool(dimensions), dimensions)
        self.delay_seconds = delay_seconds
        self.failure = failure
        self.alive = True
        self.open = threading.Event()
        self.open.set()
        self.received: list[Request] = []
        self.conversations = Conversations({"default": _CHAT_TEMPLATE})
        self._words: dict[int, str] = {}
        self.warmed_up: list[WarmUpLevel] = []
        self._running = False
        self._pending = Pending()
        self._faults = Faults()
        self._observer: Observer | None = None
        self._thread = ThreadPoolExecutor(1, "poolhouse-fake")

    def describe(self, **facts: Any) -> None:
        """Change what is known of it."""
        self.facts = replace(self.facts, **facts)

    @property
    def pending(self) -> int:
        """How many accepted requests have neither answer nor error yet."""
        return self._pending.count

    @property
    def fatal(self) -> EngineError | None:
        """What the engine died of; None while it has not."""
        return self._faults.fatal

    @property
    def running(self) -> int:
        """1 while a request is being answered: each is a batch of its own."""
        return int(self._running)

    def on_fatal(self, callback: Callable[[EngineError], None]) -> None:
        """Call back when the engine dies; at once if it is dead."""
        self._faults.on_fatal(callback)

    def die(self, error: EngineError) -> None:
        """Refuse all that comes, fail all that waits, and call back those who asked."""
        self.alive = False
        self._faults.die(error)
        self.open.set()
        self._thread.shutdown()
        self._faults.notify()

    def observe(self, observer: Observer | None) -> None:
        """Tell `observer` of the work from now on: each request is a tokenizer call and a batch of its own."""
        self._observer = None if observer is None else Guarded(observer)

    def warm_up(self, level: WarmUpLevel) -> None:
        """Only remembered, in `warmed_up`."""
        self.warmed_up.append(level)

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]:
        """Start work on requests; each future gets its answer or its error."""
        self.received.extend(requests)
        if self.alive:
            self._pending.add(requests)
        for request in requests:
            if self.alive:
                self._thread.submit(self._work, request)
            else:
                fail(request.future, self.fatal or EngineClosed("The engine is shut down."))
        return [request.future for request in requests]

    def limit(self, params: PoolingParams) -> Limit:
        """How long a prompt may be."""
        return Limit(self.facts.max_tokens, params.truncate_prompt_tokens, params.truncation_side or "right")

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]:
        """The tokens of prompts, however long they are."""
        return [self._all_tokens(request) for request in requests]

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The words of ids that this engine made before, and a space between them."""
        return " ".join(self.token_strings(ids))

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The word of each id that this engine made before."""
        for token in ids:
            if token not in self._words:
                raise InvalidRequest(f"Token id {token} is out of vocabulary", "tokens")
        return [self._words[token] for token in ids]

    def conversation(self, messages: object, **options: Any) -> Prompt:
        """The prompt of a conversation; options as those of `Conversations.prompt`."""
        return self.conversations.prompt(messages, **options)

    def close(self, drain_seconds: float = 30.0) -> None:
        """Answer what was accepted, then stop."""
        self.alive = False
        self.open.set()
        self._thread.shutdown()

    def _work(self, request: Request) -> None:
        self.open.wait()
        if not start(request.future):
            return
        self._running = True
        time.sleep(self.delay_seconds)
        try:
            failure = self.fatal or self.failure
            if failure is not None:
                raise failure
            answer = self._answer(request)
            self._running = False
            request.future.set_result(answer)
        except Exception as error:  # noqa: BLE001 - as an engine does: every failure is the future's
            self._running = False
            request.future.set_exception(error)

    def _answer(self, request: Request) -> Answer:
        for task in (request.task, *request.further):
            parse_task(task, self.facts.tasks)
        request.params.check(request.task, self.matryoshka, self.facts.name, request.further)
        chunking = request.params.late_chunking_params
        if chunking is not None:
            request = replace(request, offsets=True)
        tokens = self._tokens(request)
        if chunking is not None:
            request = replace(request, spans=chunking.spans(len(tokens)))
        if self._observer is not None:
            self._observer.tokenized(1, self.delay_seconds)
            waits, count = ((0.0, 1),), len(tokens)
            self._observer.ran(
                BatchRun(1, count, self.facts.max_tokens, waits, self.delay_seconds, 0.0, computed=count)
            )
        return Answer(
            self._array(request, request.task, tokens),
            tokens,
            further={task: self._array(request, task, tokens) for task in request.further},
            timing=Timing(run_seconds=self.delay_seconds),
        )

    def _array(self, request: Request, task: Task, tokens: Tokens) -> Array:
        if task == "extract":
            return self._found(request)
        width = self.facts.labels if task == "classify" else request.params.for_task(task).dimensions or self.width
        if request.spans is not None:
            return np.stack(
                [_vector(zlib.crc32(tokens.ids[start:end].tobytes()), width) for start, end in request.spans]
            )
        if task in TOKEN_TASKS:
            return np.stack([_vector(int(token), width) for token in tokens.ids])
        return _vector(zlib.crc32(tokens.ids.tobytes()), width)

    def _found(self, request: Request) -> Array:
        """[found, 4], the words that are labels."""
        if request.labels is None:
            raise InvalidRequest("This model reads labels with each text; name what is looked for.", "labels")
        words, names = re.findall(r"\S+", request.prompt.text or ""), request.labels.names
        rows = [(at, at, names.index(word), 0.9) for at, word in enumerate(words) if word in names]
        above = [row for row in rows if row[3] > request.labels.threshold]
        return np.array(above, np.float32).reshape(-1, 4)

    def _tokens(self, request: Request) -> Tokens:
        tokens, keep = self._all_tokens(request), request.params.truncate_prompt_tokens
        if keep is None and len(tokens) > self.facts.max_tokens:
            raise InputTooLong(
                f"The limit is {self.facts.max_tokens} tokens, got {len(tokens)}.", "input_tokens", len(tokens)
            )
        kept = len(tokens) if keep is None else self.facts.max_tokens if keep == -1 else keep
        return replace(tokens, ids=tokens.ids[:kept])

    def _all_tokens(self, request: Request) -> Tokens:
        prompt = request.prompt
        if prompt.ids is not None:
            check_ids(prompt.ids, _VOCABULARY_SIZE)
            return Tokens(prompt.ids, original_tokens=len(prompt.ids))
        if request.prompt_name and request.prompt_name not in self.facts.prompts:
            raise InvalidRequest(f"The model has no prompt named '{request.prompt_name}'.", "prompt_name")
        images = images_of(prompt)
        if images and not self.facts.pictures:
            raise InvalidRequest(
                f"MultiModalParam is not supported for {self.facts.name}: this model reads texts.", images[0].path
            )
        if prompt.text is None and prompt.conversation is not None:
            prompt = self.conversations.rendered(prompt.conversation)
        prefix = self.facts.prompts.get(request.prompt_name or "", "")
        contents = [content.text for content in (prompt.content, prompt.pair_content) if content is not None]
        text = prefix + (prompt.text or " ".join(contents)) + ("" if prompt.pair is None else f" {prompt.pair}")
        words = list(re.finditer(r"\S+", text)) or list(re.finditer("", ""))
        ids = np.array([zlib.crc32(word.group().encode()) for word in words], dtype=np.int64)
        self._words.update(zip(ids.tolist(), (word.group() for word in words), strict=True))
        offsets = None
        if request.offsets:
            bounds = np.maximum(np.array([word.span() for word in words], dtype=np.int64) - len(prefix), 0)
            offsets = Offsets(bounds, np.arange(len(ids)), np.zeros(len(ids), np.bool_))
        if images:
            ids, pictures = _with_pictures(images, ids)
            return Tokens(ids, original_tokens=len(ids), pictures=pictures)
        marks = None
        if request.labels is not None:
            bounds = np.array([word.span() for word in words], np.int64)
            each = np.stack([np.arange(len(ids)), np.arange(1, len(ids) + 1)], axis=1)
            marks = Marks(np.zeros((0, 2), np.int64), each, bounds, np.zeros(0, np.int64))
        return Tokens(ids, original_tokens=len(ids), offsets=offsets, marks=marks)


_PICTURE_TOKENS = 4
# A word's id is a checksum of 32 bits.
_VOCABULARY_SIZE = 2**32
_CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def _with_pictures(images: Sequence[Image], ids: Ids) -> tuple[Ids, Pictures]:
    """The ids of pictures before those of a text, and where they stand; see `FakeEngine`."""
    shown = []
    for image in images:
        source = image.source if isinstance(image.source, str | bytes) else repr(image.source)
        number = zlib.crc32(source.encode() if isinstance(source, str) else source)
        tokens = np.full(_PICTURE_TOKENS, number, np.int64)
        shown.append(Picture(np.zeros((_PICTURE_TOKENS, 1), np.float32), tokens, np.ones(_PICTURE_TOKENS, np.bool_)))
    whole = np.concatenate([*(picture.ids for picture in shown), ids])
    filled = np.arange(len(whole)) < _PICTURE_TOKENS * len(shown)
    return whole, Pictures(tuple(shown), filled)


def _vector(seed: int, width: int) -> Array:
    numbers = np.random.default_rng(seed).standard_normal(width, dtype=np.float32)
    unit: Array = numbers / np.linalg.norm(numbers)
    return unit
