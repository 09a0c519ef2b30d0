"""`poolhouse embed`: vectors of texts from arguments, a file or standard input."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import orjson
import typer

from poolhouse.cli.options import with_options
from poolhouse.errors import ConfigError
from poolhouse.params import PoolingParams
from poolhouse.settings import Settings

# Texts that are in memory at once.
_AT_ONCE = 4096


class Format(StrEnum):
    """How vectors are written."""

    jsonl = "jsonl"
    npy = "npy"


@with_options(Settings)
def embed(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: read them from --input.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; none: the embedded default.")] = None,
    source: Annotated[
        str, typer.Option("--input", "-i", help="A file with a text per line; - is standard input.")
    ] = "-",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; none: standard output.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", "-f", help="JSON lines, or one numpy matrix.")] = Format.jsonl,
    prompt_name: Annotated[str | None, typer.Option(help="A prompt stored with the checkpoint.")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Length of the vectors, for Matryoshka models.")] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Write the vector of each text."""
    from tqdm import tqdm

    from poolhouse.llm import LLM

    if form is Format.npy and output is None:
        raise ConfigError("--format npy needs --output FILE.")
    params = PoolingParams(dimensions=dimensions)
    with contextlib.ExitStack() as stack:
        lines: Iterable[str] = texts or _lines(source, stack)
        llm = stack.enter_context(LLM(model, **options))
        # Read before the output is opened: a wrong input must not empty an old result.
        groups = _groups(lines)
        write = stack.enter_context(_Writer(output, form))
        progress = stack.enter_context(tqdm(unit=" texts", disable=None, dynamic_ncols=True))
        count = 0
        for group in groups:
            for text, result in zip(
                group, llm.embed(group, use_tqdm=False, pooling_params=params, prompt_name=prompt_name), strict=True
            ):
                write(text, result.outputs.array, result.truncated)
                count += 1
                progress.update()
        if not count:
            raise ConfigError(f"There is no text in {'standard input' if source == '-' else source}.")


class _Writer:
    """Vectors to a stream, one by one."""

    def __init__(self, output: Path | None, form: Format) -> None:
        self.output = output
        self.form = form
        self.rows: list[np.ndarray[Any, np.dtype[np.float32]]] = []

    def __enter__(self) -> _Writer:
        self.stream: IO[bytes] = sys.stdout.buffer if self.output is None else self.output.open("wb")
        return self

    def __call__(self, text: str, vector: np.ndarray[Any, np.dtype[np.float32]], truncated: bool) -> None:
        if self.form is Format.npy:
            self.rows.append(vector)
            return
        line: dict[str, Any] = {"text": text, "embedding": np.ascontiguousarray(vector)}
        if truncated:
            line["truncated"] = True
        self.stream.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))

    def __exit__(self, *error: object) -> None:
        if self.rows and error[0] is None:
            np.save(self.stream, np.stack(self.rows))
        self.stream.flush()
        if self.output is not None:
            self.stream.close()


def _lines(source: str, stack: contextlib.ExitStack) -> Iterator[str]:
    stream: IO[bytes] = sys.stdin.buffer if source == "-" else stack.enter_context(Path(source).open("rb"))  # noqa: SIM115 - the stack closes it
    for number, line in enumerate(stream, start=1):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            place = "standard input" if source == "-" else source
            raise ConfigError(f"Line {number} of {place} is not UTF-8: {error}") from None
        if text.strip():
            yield text


def _groups(lines: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(lines)
    while group := list(itertools.islice(rest, _AT_ONCE)):
        yield group
