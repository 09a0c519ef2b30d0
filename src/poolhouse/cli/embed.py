"""`poolhouse embed`: vectors of texts from arguments, a file or standard input."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import orjson
import typer

from poolhouse.cli import texts as files
from poolhouse.cli.options import with_options
from poolhouse.errors import ConfigError
from poolhouse.params import PoolingParams
from poolhouse.precision import PRECISIONS, QUANTIZED, Codes, parse_precision, quantize
from poolhouse.settings import Settings


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
    precision: Annotated[str, typer.Option(help=f"Numbers of the vectors: {', '.join(PRECISIONS)}.")] = "float32",
    *,
    options: dict[str, Any],
) -> None:
    """Write the vector of each text."""
    from tqdm import tqdm

    from poolhouse.llm import LLM

    if form is Format.npy and output is None:
        raise ConfigError("--format npy needs --output FILE.")
    wanted = parse_precision(precision)
    if form is Format.jsonl and wanted not in ("float32", *QUANTIZED):
        raise ConfigError(f"JSON lines cannot hold {wanted}; use --format npy.")
    params = PoolingParams(dimensions=dimensions)
    with contextlib.ExitStack() as stack:
        lines: Iterable[str] = texts or files.lines(source, stack)
        llm = stack.enter_context(LLM(model, **options))
        # Read before the output is opened: a wrong input must not empty an old result.
        groups = files.groups(lines)
        write = stack.enter_context(_Writer(output, form))
        progress = stack.enter_context(tqdm(unit=" texts", disable=None, dynamic_ncols=True))
        count = 0
        for group in groups:
            results = llm.embed(group, use_tqdm=False, pooling_params=params, prompt_name=prompt_name)
            vectors = np.stack([result.outputs.array for result in results])
            rows = quantize(vectors, wanted, llm.engine.calibration)
            for text, row, result in zip(group, rows, results, strict=True):
                write(text, row, result.truncated)
                count += 1
                progress.update()
        if not count:
            raise files.nothing_in(source)


class _Writer:
    """Vectors to a stream, one by one."""

    def __init__(self, output: Path | None, form: Format) -> None:
        self.output = output
        self.form = form
        self.rows: list[Codes] = []

    def __enter__(self) -> _Writer:
        self.stream: IO[bytes] = sys.stdout.buffer if self.output is None else self.output.open("wb")
        return self

    def __call__(self, text: str, vector: Codes, truncated: bool) -> None:
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
