"""`poolhouse run-batch`: a file of requests, as OpenAI's batches have them, through the routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated

import typer

from poolhouse.cli.options import with_options
from poolhouse.cli.texts import refuse_same_file
from poolhouse.errors import ConfigError
from poolhouse.jobs.job import STANDARD_INPUT, checkpoint, stated
from poolhouse.journal import JournalFile, differences
from poolhouse.server.batches.run import Files, Point, Sink, Stream, run
from poolhouse.settings import ServerSettings, Settings

_SECONDS_BETWEEN_LINES = 60.0


@with_options(Settings)
def run_batch(
    source: Annotated[
        str, typer.Option("--input-file", "-i", help="JSON lines: custom_id, method, url, body; - is standard input.")
    ],
    output: Annotated[str, typer.Option("--output-file", "-o", help="Where to write; - is standard output.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id; none: the embedded default.")] = None,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, help="Largest body of a request.")
    ] = ServerSettings.model_fields["max_body_bytes"].default,
    *,
    options: dict[str, object],
) -> None:
    """Answer a file of requests to any POST route of `poolhouse serve`, line by line and in order, without a server.

    Called again with the same words, one that was stopped or killed goes on. A line that is no request, or is refused, is
    answered with what is wrong; the others go on.
    """
    if source == STANDARD_INPUT and sys.stdin is None:
        raise ConfigError("Standard input is closed; name a file.")
    target = None if output == STANDARD_INPUT else Path(output)
    refuse_same_file(source, target)
    inputs = stated([source])
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise ConfigError(f"--output-file {output} is no file that can be made.")
    from poolhouse.engine.open import open_engine
    from poolhouse.server.app import requester

    settings = ServerSettings.parse(max_body_bytes=max_body_bytes)
    with (
        open_engine(Settings.parse(model=model, **options)) as engine,
        _opened(source) as stream,
        _sink(target, {"inputs": inputs, **checkpoint(options, Path(engine.model.facts.path))}) as sink,
    ):
        if sink.point.total and sys.stderr is not None:
            print(f"Going on behind {sink.point.total:,} requests that are answered.", file=sys.stderr)
        tell = _Display(sink.point.total)
        asyncio.run(run(stream, settings.max_body_bytes, requester([engine], settings).reply, sink, tell))
        point = sink.point
    if target is not None:
        _finish(target)
        print(f"{output}: {point.total:,} requests, {point.completed:,} answered, {point.failed:,} refused.")


@contextlib.contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    if source == STANDARD_INPUT:
        yield sys.stdin.buffer
    else:
        with Path(source).open("rb") as stream:
            yield stream


def _part(target: Path) -> Path:
    """The output, while it grows."""
    return target.with_name(f"{target.name}.part")


def _journal(target: Path) -> Path:
    return target.with_name(f"{target.name}.journal")


@contextlib.contextmanager
def _sink(target: Path | None, head: dict[str, object]) -> Iterator[Sink]:
    """Where replies go: standard output, or a file that goes on where it was.

    Raises:
        ConfigError: it was begun with another input, model or options.
    """
    if target is None:
        if sys.stdout is None:
            raise ConfigError("Standard output is closed; name a file.")
        yield Stream(sys.stdout.buffer)
        return
    journal = JournalFile(_journal(target), target)
    if journal.entries and (said := differences(journal.entries[0], head)):
        journal.close()
        raise ConfigError(
            f"{_journal(target)} is of a batch that was begun otherwise: {said}. Remove it to begin anew, or name another output."
        )
    with Files(journal, head, _part(target)) as sink:
        yield sink


def _finish(target: Path) -> None:
    """Give the output its name."""
    # First: without the other, a journal could not go on.
    _journal(target).unlink()
    _part(target).replace(target)


class _Display:
    """A line a minute on standard error."""

    def __init__(self, before: int) -> None:
        self._before, self._begun = before, time.monotonic()
        self._next = self._begun + _SECONDS_BETWEEN_LINES

    def __call__(self, point: Point) -> None:
        now = time.monotonic()
        if now >= self._next and sys.stderr is not None:
            self._next = now + _SECONDS_BETWEEN_LINES
            rate = (point.total - self._before) / (now - self._begun)
            print(f"{point.total:,} requests, {rate:,.0f}/s, {point.failed:,} refused", file=sys.stderr, flush=True)
