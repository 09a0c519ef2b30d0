"""`poolhouse embed`: vectors of texts from arguments, a file or standard input."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import numpy as np
import orjson
import typer

from poolhouse.cli import texts as files
from poolhouse.cli.options import with_options
from poolhouse.errors import ConfigError
from poolhouse.params import PoolingParams
from poolhouse.precision import PRECISIONS, QUANTIZED, Codes, Precision, parse_precision, quantize
from poolhouse.settings import Settings

if TYPE_CHECKING:
    from poolhouse.llm import LLM


class Format(StrEnum):
    """How vectors are written."""

    jsonl = "jsonl"
    npy = "npy"
    npz = "npz"
    safetensors = "safetensors"
    arrow = "arrow"


_OF_TOKENS = (Format.npz, Format.safetensors, Format.arrow)


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
    form: Annotated[
        Format,
        typer.Option(
            "--format", "-f", help="JSON lines, or one numpy matrix; with --tokens npz, safetensors or arrow."
        ),
    ] = Format.jsonl,
    prompt_name: Annotated[str | None, typer.Option(help="A prompt stored with the checkpoint.")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Length of the vectors, for Matryoshka models.")] = None,
    precision: Annotated[str, typer.Option(help=f"Numbers of the vectors: {', '.join(PRECISIONS)}.")] = "float32",
    input_type: Annotated[
        str | None, typer.Option(help="With --tokens: what the texts are, query or document.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="A vector per token, for late interaction.")] = False,
    token_pooling_factor: Annotated[
        float | None, typer.Option(help="With --tokens: keep about one vector per so many, each the mean of like ones.")
    ] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Write the vector of each text, or with --tokens those of its tokens."""
    from poolhouse.llm import LLM

    wanted = parse_precision(precision)
    if tokens != (form in _OF_TOKENS):
        raise ConfigError(
            f"--format {form} is {'not ' if tokens else ''}for --tokens, which takes {', '.join(_OF_TOKENS)}."
        )
    for flag, value in (("--input-type", input_type), ("--token-pooling-factor", token_pooling_factor)):
        if value is not None and not tokens:
            raise ConfigError(f"{flag} is for --tokens.")
    if form is not Format.jsonl and output is None:
        raise ConfigError(f"--format {form} needs --output FILE.")
    if form is Format.jsonl and wanted not in ("float32", *QUANTIZED):
        raise ConfigError(f"JSON lines cannot hold {wanted}; use --format npy.")
    asked: dict[str, Any] = {"pooling_params": PoolingParams(dimensions=dimensions), "prompt_name": prompt_name}
    with contextlib.ExitStack() as stack:
        lines: Iterable[str] = texts or files.lines(source, stack)
        llm = stack.enter_context(LLM(model, **options))
        if tokens and output is not None:
            asked |= {"input_type": input_type, "token_pooling_factor": token_pooling_factor, "precision": precision}
            count = _write_tokens(llm, lines, output, form, asked)
        else:
            count = _write_vectors(llm, lines, output, form, wanted, asked)
        if not count:
            raise files.nothing_in(source)


def _write_vectors(
    llm: LLM, lines: Iterable[str], output: Path | None, form: Format, precision: Precision, asked: dict[str, Any]
) -> int:
    """A vector for each text; returns how many."""
    # Read before the output is opened: a wrong input must not empty an old result.
    groups = files.groups(lines)
    count = 0
    with _Writer(output, form) as write, _progress() as progress:
        for group in groups:
            results = llm.embed(group, use_tqdm=False, **asked)
            rows = quantize(np.stack([result.outputs.array for result in results]), precision, llm.engine.calibration)
            for text, row, result in zip(group, rows, results, strict=True):
                write(text, row, result.truncated)
                count += 1
                progress.update()
    return count


def _write_tokens(llm: LLM, lines: Iterable[str], output: Path, form: Format, asked: dict[str, Any]) -> int:
    """The vectors of each text's tokens; returns how many texts."""
    from poolhouse import token_files

    count = 0
    with token_files.writer(output, f".{form}") as write, _progress() as progress:
        for block in llm.embed_tokens_in_blocks(lines, **asked):
            write(block)
            count += len(block)
            progress.update(len(block))
    return count


def _progress() -> Any:
    from tqdm import tqdm

    return tqdm(unit=" texts", disable=None, dynamic_ncols=True)


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
