"""`poolhouse embed`: vectors of texts from arguments, a file or standard input."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import numpy as np
import orjson
import typer

from poolhouse.cli import texts as files
from poolhouse.cli.options import with_options
from poolhouse.cli.pages import DEFAULT_DPI, Aside, Page, files_of
from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.files import GrowingMatrix
from poolhouse.inputs.prompts import role_of
from poolhouse.params import PoolingParams
from poolhouse.settings import Settings
from poolhouse.vectors import token_embeddings
from poolhouse.vectors.precision import PRECISIONS, QUANTIZED, Codes, Precision, parse_precision, quantize
from poolhouse.vectors.token_embeddings import TokenEmbeddings
from poolhouse.vectors.token_pooling import check_factor, pooled

if TYPE_CHECKING:
    from poolhouse.llm import LLM
    from poolhouse.llm.requests import CallOptions

# Texts or pages, their vectors, and which were cut.
Write = Callable[[Sequence[str | Page], Codes, Sequence[bool]], None]

# Texts whose token vectors are in memory at once, twice.
_TOKENS_AT_ONCE = 1024

# Formats of the output by the endings of its file.
_BY_ENDING = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".npy": "npy",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".arrow": "arrow",
}
_FORMATS = tuple(dict.fromkeys(_BY_ENDING.values()))
_OF_TOKENS = ("npz", "safetensors", "arrow")
# Endings of files that are not written, whatever --format says.
_NOT_WRITTEN = (".csv", ".tsv", ".parquet", ".gz", ".bz2", ".xz", ".zst", ".zip", ".pt", ".h5", ".feather")

# Arguments that may be a model of the hub, or name a file.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATH = re.compile(r"(/|\./|\.\./|~/)\S+|\S+\.(txt|jsonl|ndjson|csv|tsv|parquet|json)")


@with_options(Settings)
def embed(
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts, or PDF files, pictures and folders of them; none: read texts from --input."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; none: the embedded default.")] = None,
    source: files.Input = "-",
    input_format: files.InputFormat = None,
    column: files.Column = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; none: standard output.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            "-f",
            help="jsonl, JSON lines, or npy, one numpy matrix; with --tokens npz, safetensors or arrow; "
            "none: by the ending of --output, else jsonl.",
        ),
    ] = None,
    prompt_name: files.PromptName = None,
    dimensions: files.Dimensions = None,
    precision: Annotated[str, typer.Option(help=f"Numbers of the vectors: {', '.join(PRECISIONS)}.")] = "float32",
    input_type: Annotated[
        str | None, typer.Option(help="With --tokens: what the texts are, query or document.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="A vector per token, for late interaction.")] = False,
    token_pooling_factor: Annotated[
        float | None, typer.Option(help="With --tokens: keep about one vector per so many, each the mean of like ones.")
    ] = None,
    dpi: Annotated[float, typer.Option(min=10, max=1000, help="Dots per inch of PDF pages.")] = DEFAULT_DPI,
    *,
    options: dict[str, object],
) -> None:
    """Write the vector of each text, PDF page or picture, or with --tokens those of its tokens.

    A line or row of --input is a text, an empty one too, so that what is written has one for each. What stood in
    --output is replaced at the end, and stays as it was when something fails.
    """
    pages = files_of(texts or ())
    if texts:
        if pages is None or source != "-":
            check_are_texts(texts, source, model)
        for flag, value in (("--column", column), ("--input-format", input_format)):
            if value is not None:
                raise ConfigError(f"{flag} is for --input.")
    else:
        files.refuse_same_file(source, output)
    wanted = parse_precision(precision)
    form = _format(form, output)
    if tokens != (form in _OF_TOKENS):
        raise ConfigError(
            f"--format {form} is {'not ' if tokens else ''}for --tokens, which takes {', '.join(_OF_TOKENS)}."
        )
    for flag, setting in (("--input-type", input_type), ("--token-pooling-factor", token_pooling_factor)):
        if setting is not None and not tokens:
            raise ConfigError(f"{flag} is for --tokens.")
    if form != "jsonl" and output is None:
        raise ConfigError(f"--format {form} needs --output FILE.")
    if form == "jsonl" and wanted not in ("float32", *QUANTIZED):
        raise ConfigError(f"JSON lines cannot hold {wanted}; use --format npy.")
    # A matrix says of no row what it is.
    aside = Aside(strict=form == "npy")
    with contextlib.ExitStack() as stack:
        inputs: files.Texts[str | Page]
        if pages:
            inputs = files.of_pages(pages, dpi, aside)
        else:
            inputs = files.of_the_line(texts) if texts else files.opened(source, input_format, column, stack)
        if tokens and output is not None:
            write_tokens = stack.enter_context(token_embeddings.writer(output, f".{form}"))
            run = partial(_write_tokens, write=write_tokens, factor=token_pooling_factor)
        else:
            run = partial(_write_vectors, write=stack.enter_context(_writer(output, form)))
        from poolhouse.llm import LLM
        from poolhouse.llm.requests import CallOptions

        llm = stack.enter_context(LLM(model, **options))
        if pages and not llm.engine.facts.pictures:
            raise ConfigError(f"{llm.engine.facts.name} reads texts alone, no PDF pages or pictures.")
        if not tokens and "embed" not in llm.engine.facts.tasks and "token_embed" in llm.engine.facts.tasks:
            raise ConfigError(
                "This model gives a vector per token, not one per text: use --tokens, with --output FILE.npz."
            )
        call_options = CallOptions(PoolingParams(dimensions=dimensions), prompt_name, input_type=input_type)
        if not run(llm, inputs, call_options=call_options, precision=wanted):
            raise ConfigError("No page could be read.") if pages else files.nothing_in(source)
    if aside.count:
        raise ConfigError(f"{aside.count} files or pages were left out; all others are written.")


def _format(form: str | None, output: Path | None) -> str:
    """The format of the output, by --format and the ending of --output, which must agree.

    Raises:
        ConfigError: they do not, or neither names one.
    """
    if form is not None and form not in _FORMATS:
        raise ConfigError(f"--format {form} is not one of {', '.join(_FORMATS)}.{did_you_mean(form, _FORMATS)}")
    ordinary = output is not None and (output.is_file() or not output.exists())
    ending = output.suffix.lower() if output is not None and ordinary else ""
    by_ending = _BY_ENDING.get(ending)
    if by_ending is None and (ending in _NOT_WRITTEN or (ending and form is None)):
        raise ConfigError(
            f"--output {output}: {ending} is no format that is written; what is: {', '.join(_FORMATS)}. The ending "
            "says which, or --format."
        )
    if form is not None and by_ending not in (None, form):
        raise ConfigError(f"--format {form} contradicts the ending of --output {output}; leave one of them out.")
    return form or by_ending or "jsonl"


def check_are_texts(texts: Sequence[str], source: str, model: str | None) -> None:
    """Raise ConfigError for arguments that were meant as a file or a model, and would be read as texts themselves."""
    from poolhouse.models.files import hub

    if source != "-":
        raise ConfigError(f"Texts come as arguments or from --input {source}, not both.")
    for text in texts:
        itself = "The text itself may come on standard input."
        # For a text that cannot be a path these are false.
        if os.path.isdir(text):  # noqa: PTH112
            raise ConfigError(f"{text} is a folder. A model is named by --model {text}. {itself}")
        if os.path.exists(text) or _PATH.fullmatch(text):  # noqa: PTH110
            raise ConfigError(f"{text} names a file. Texts of a file are read by --input {text}. {itself}")
        if model is None and (_HUB_ID.fullmatch(text) or text == hub.NAME):
            raise ConfigError(f"{text} may be a model of the hub, which is named by --model {text}. {itself}")


def _write_vectors(
    llm: LLM, inputs: files.Texts[str | Page], call_options: CallOptions, precision: Precision, write: Write
) -> int:
    """A vector for each text; returns how many."""
    count = 0
    with files.progress_bar(inputs) as progress:
        for texts, answers in files.answered(llm, inputs, "embed", call_options):
            rows = quantize(np.stack([answer.array for answer in answers]), precision, llm.engine.facts.calibration)
            write(texts, rows, [answer.tokens.truncated for answer in answers])
            count += len(texts)
            progress.update(len(texts))
    return count


def _write_tokens(
    llm: LLM,
    inputs: files.Texts[str | Page],
    call_options: CallOptions,
    precision: Precision,
    write: token_embeddings.Write,
    factor: float | None,
) -> int:
    """The vectors of each text's tokens; returns how many texts. factor: about so many vectors become one."""
    if factor is not None:
        check_factor(factor, role_of(call_options.input_type))
    count = 0
    with files.progress_bar(inputs) as progress:
        for texts, answers in files.answered(llm, inputs, "token_embed", call_options, _TOKENS_AT_ONCE):
            matrices = [answer.array if factor is None else pooled(answer.array, factor) for answer in answers]
            names = [text.name for text in texts if isinstance(text, Page)] or None
            write(TokenEmbeddings.of(matrices, precision, llm.engine.facts.calibration, names))
            count += len(texts)
            progress.update(len(texts))
    return count


@contextlib.contextmanager
def _writer(output: Path | None, form: str) -> Iterator[Write]:
    """Writes texts and their vectors."""
    with (
        files.output_stream(output, form) as stream,
        (_numpy_matrix if form == "npy" else _json_lines)(stream) as write,
    ):
        yield write


@contextlib.contextmanager
def _json_lines(stream: IO[bytes]) -> Iterator[Write]:
    def write(texts: Sequence[str | Page], rows: Codes, truncated: Sequence[bool]) -> None:
        for text, row, cut in zip(texts, np.ascontiguousarray(rows), truncated, strict=True):
            what = {"text": text} if isinstance(text, str) else text.fields
            line = {**what, "embedding": row, **({"truncated": True} if cut else {})}
            stream.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))

    yield write


@contextlib.contextmanager
def _numpy_matrix(stream: IO[bytes]) -> Iterator[Write]:
    matrix = GrowingMatrix(stream)
    yield lambda _, rows, __: matrix.write(rows)
    matrix.finish()
