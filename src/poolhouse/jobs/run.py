"""Run: a job from its first row to its last, or from where it was stopped; reading, computing and writing overlap.

    reader thread ─► groups of rows ─► requests ─► engine: two groups under way ─► writer thread ─► shard ─► journal

No more than a few groups are in memory, whatever the size of the input. Groups are large enough that the engine never
waits between two of them.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolhouse.engine.interface import OfflineEngine
from poolhouse.errors import ConfigError, PoolhouseError
from poolhouse.files import pyarrow_module
from poolhouse.jobs.asking import Answered, Asker, Failed, check_precision, rows_at_once
from poolhouse.jobs.job import Job, input_files, stated
from poolhouse.jobs.shards import MANIFEST, Journal, Shard, ShardFile, kinds_of, misfit
from poolhouse.jobs.source import Place, Row, Source
from poolhouse.llm.calls import read_ahead
from poolhouse.version import __version__

if TYPE_CHECKING:
    from poolhouse.llm import LLM

# Groups that are read ahead, and those that wait to be written.
_AHEAD = 2


@dataclass(slots=True)
class Progress:
    """How far a job is. share: of the input, from 0 to 1; None where its size is not known. seconds: of this run.

    rows, tokens, truncated, errors: of the whole job. new_rows, new_tokens: of this run.
    """

    rows: int = 0
    tokens: int = 0
    truncated: int = 0
    errors: int = 0
    new_rows: int = 0
    new_tokens: int = 0
    seconds: float = 0.0
    share: float | None = None
    first_share: float | None = None
    continued: bool = False

    def add(self, answered: Answered, failed: Sequence[Failed], share: float | None) -> None:
        """Count a group."""
        self.rows += len(answered.rows)
        self.new_rows += len(answered.rows)
        self.tokens += answered.tokens
        self.new_tokens += answered.tokens
        self.truncated += sum(answered.truncated)
        self.errors += len(failed)
        self.share = share

    @property
    def seconds_left(self) -> float | None:
        """By the share of the input that this run has done so far."""
        if self.share is None or self.first_share is None or self.share <= self.first_share:
            return None
        return self.seconds * (1 - self.share) / (self.share - self.first_share)


class TooManyErrors(PoolhouseError):
    """More rows had to be set aside than the job allows; what is written stays, and the job can go on."""


def run(job: Job, open_model: Callable[[], LLM], tell: Callable[[Progress], None] = lambda _: None) -> Progress:
    """Run a job to its end, or go on with it; what came of it.

    open_model: opens the job's model; called after the files are looked at. tell: hears of each group that is written.

    Raises:
        ConfigError: a job that cannot be: its files, its columns, its model, another job's folder.
        TooManyErrors: see `Job.max_errors`. EngineError: the engine was lost. OSError: nothing can be written.
    """
    check_precision(job)
    if job.form == "parquet":
        pyarrow_module("pyarrow.parquet", "Parquet files")
    files = input_files(job.inputs, job.input_form, job.out)
    source = Source(files, job.columns, job.input_form)
    source.check()
    inputs = stated(files)
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(open_model())
        # Before the journal: a job that the model cannot do begins none, and may be called again with other words.
        asker = Asker(llm.engine, job)
        journal = Journal(job.out, job.fingerprint(Path(llm.engine.facts.path)), inputs)
        stack.callback(journal.close)
        progress = _begun(journal, source)
        if (journal.out / MANIFEST).exists():
            return progress
        started, types = time.monotonic(), source.schema()
        with (
            _Writing(journal, job, types) as writing,
            contextlib.closing(_groups(source, journal.place, job)) as groups,
        ):
            fitted = _fitted(groups, journal, types, job)
            for asked, futures in read_ahead(
                llm.engine, (asker.ask(rows) for rows in fitted), lambda asked: asked.requests
            ):
                progress.seconds = time.monotonic() - started
                answered, failed = asker.answered(asked, futures)
                progress.add(answered, failed, source.share(asked.after))
                writing.put(answered, failed, asked.after)
                tell(progress)
                if job.max_errors is not None and progress.errors > job.max_errors:
                    raise TooManyErrors(_too_many(progress, job, failed[-1]))
        progress.seconds = time.monotonic() - started
        progress.share = 1.0
        journal.finish(_manifest(job, journal, progress, llm.engine, inputs))
        tell(progress)
        return progress


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would take, by a sample of its rows. rows, hours: None where the size of the input is not known."""

    sampled: int
    errors: int
    truncated: int
    tokens_per_row: float
    rows_per_second: float
    rows: int | None

    @property
    def hours(self) -> float | None:
        return None if self.rows is None else self.rows / self.rows_per_second / 3600


def estimate(job: Job, open_model: Callable[[], LLM]) -> Estimate:
    """Run the first rows of a job, and write nothing; standard input is read for it.

    Raises:
        ConfigError: as `run`; or no row can be answered.
    """
    check_precision(job)
    source = Source(input_files(job.inputs, job.input_form, job.out), job.columns, job.input_form)
    source.check()
    with open_model() as llm, contextlib.closing(_groups(source, Place(), job)) as groups:
        asker = Asker(llm.engine, job)
        rows = next(groups, [])
        # The first rows warm up what the others are measured with.
        cut = max(1, len(rows) // 8)
        seconds, parts = 0.0, []
        for part in (rows[:cut], rows[cut:]):
            if part:
                started = time.monotonic()
                asked = asker.ask(part)
                parts.append(asker.answered(asked, llm.engine.submit(asked.requests)))
                seconds = time.monotonic() - started
    count = sum(len(answered.rows) for answered, _ in parts)
    if not count:
        raise ConfigError(f"None of the first {len(rows)} rows can be answered.")
    share = source.share(rows[-1].after)
    return Estimate(
        sampled=len(rows),
        errors=sum(len(failed) for _, failed in parts),
        truncated=sum(sum(answered.truncated) for answered, _ in parts),
        tokens_per_row=sum(answered.tokens for answered, _ in parts) / count,
        rows_per_second=max(len(parts[-1][0].rows), 1) / seconds,
        rows=None if not share else round(len(rows) / share),
    )


class _Writing:
    """The writer thread: groups become shards in the order in which they come.

    Leaving the block ends the last shard, whatever it is left for: what is computed is kept. A shard that cannot be
    written is dropped.
    """

    def __init__(self, journal: Journal, job: Job, types: Mapping[str, Any]) -> None:
        self._journal, self._job, self._types = journal, job, types
        self._thread = ThreadPoolExecutor(1, "poolhouse-job-writer")
        self._under_way: deque[Future[None]] = deque()
        self._file: ShardFile | None = None
        self._shard = Shard(None, journal.place)
        self._failed = False

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            while self._under_way:
                self._under_way.popleft().result()
            if not self._failed:
                self._thread.submit(self._end).result()
        finally:
            self._thread.shutdown()
            if self._file is not None:
                self._file.drop()

    def put(self, answered: Answered, failed: Sequence[Failed], after: Place) -> None:
        """Let a group be written; waits where too many wait already.

        Raises:
            OSError: an earlier one could not be written.
        """
        self._under_way.append(self._thread.submit(self._write, answered, failed, after))
        while len(self._under_way) > _AHEAD or (self._under_way and self._under_way[0].done()):
            self._under_way.popleft().result()

    def _write(self, answered: Answered, failed: Sequence[Failed], after: Place) -> None:
        # Groups behind one that could not be written are computed again by the run that goes on.
        if self._failed:
            return
        self._failed = True
        self._append(answered, failed, after)
        self._failed = False

    def _append(self, answered: Answered, failed: Sequence[Failed], after: Place) -> None:
        if self._file is None:
            self._file = ShardFile(self._journal, self._job, self._types)
        self._file.write(answered)
        shard = self._shard
        shard.after = after
        shard.rows += len(answered.rows)
        shard.tokens += answered.tokens
        shard.truncated += sum(answered.truncated)
        shard.errors += [{"file": one.row.file, "row": one.row.number, "reason": one.reason} for one in failed]
        if shard.rows + len(answered.rows) > self._job.shard_rows or self._file.size >= self._job.shard_bytes:
            self._end()

    def _end(self) -> None:
        """The file is whole, and the next one begins."""
        if self._file is None:
            return
        shard, file = self._shard, self._file
        if shard.rows:
            shard.file = file.name
            shard.bytes, shard.sha256 = file.close()
        else:
            file.drop()
        self._journal.add(shard)
        self._file, self._shard = None, Shard(None, shard.after)


def _begun(journal: Journal, source: Source) -> Progress:
    """What is done already."""
    shards = journal.shards
    return Progress(
        rows=sum(shard.rows for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        truncated=sum(shard.truncated for shard in shards),
        errors=journal.errors,
        first_share=source.share(journal.place),
        continued=journal.continued,
    )


def _groups(source: Source, start: Place, job: Job) -> Generator[list[Row], None, None]:
    """Groups of rows, read ahead by a thread."""
    size = min(rows_at_once(job), job.shard_rows)
    waiting: queue.Queue[list[Row] | BaseException | None] = queue.Queue(_AHEAD)
    left = threading.Event()

    def hand_over(item: list[Row] | BaseException | None) -> bool:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.2)
                return True
        return False

    def read() -> None:
        try:
            rows = source.rows(start)
            while group := list(itertools.islice(rows, size)):
                if not hand_over(group):
                    return
            hand_over(None)
        except BaseException as error:  # noqa: BLE001 - it is raised where rows are asked for
            hand_over(error)

    thread = threading.Thread(target=read, name="poolhouse-job-reader", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()


def _fitted(groups: Iterator[list[Row]], journal: Journal, types: Mapping[str, Any], job: Job) -> Iterator[list[Row]]:
    """Groups in which a row whose cells do not fit the columns of those before it has that as its problem."""
    for group in groups:
        if journal.kinds is None:
            journal.fix_kinds(kinds_of(job, [row for row in group if row.problem is None], types))
        kinds = journal.kinds
        if not kinds or job.form != "parquet":
            yield group
            continue
        yield [
            replace(row, problem=why) if row.problem is None and (why := misfit(row, kinds)) else row for row in group
        ]


def _too_many(progress: Progress, job: Job, last: Failed) -> str:
    return (
        f"{progress.errors} rows had to be set aside, {job.max_errors} may be (--max-errors). The last is row "
        f"{last.row.number} of {last.row.file}: {last.reason}. {job.out}/errors.jsonl has them all; the job goes on when "
        "it is called again with a higher number."
    )


def _manifest(
    job: Job, journal: Journal, progress: Progress, engine: OfflineEngine, inputs: Sequence[Mapping[str, object]]
) -> dict[str, object]:
    facts = engine.facts
    return {
        "poolhouse": __version__,
        "model": facts.name,
        "dtype": facts.dtype,
        "job": job.fingerprint(Path(facts.path)),
        "inputs": list(inputs),
        "rows": progress.rows,
        "tokens": progress.tokens,
        "truncated": progress.truncated,
        "errors": progress.errors,
        "files": [
            {"file": shard.file, "rows": shard.rows, "bytes": shard.bytes, "sha256": shard.sha256}
            for shard in journal.shards
            if shard.file is not None
        ],
    }
