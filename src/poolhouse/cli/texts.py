"""Texts of a command, or pages: arguments, lines and rows of files or standard input, numbered, and their answers."""

from __future__ import annotations

import contextlib
import csv
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Generic, TypeVar

import orjson
import typer

from poolhouse.cli.pages import ENDINGS as PAGES
from poolhouse.cli.pages import Aside, Page, pages_of
from poolhouse.errors import (
    ConfigError,
    InputTooLong,
    InvalidRequest,
    PoolhouseError,
    UnsupportedDimensions,
    did_you_mean,
)
from poolhouse.files import pyarrow_module, same_file, whole_file
from poolhouse.jobs.job import READ_AS, ROW_FORMS
from poolhouse.params import PoolingParams
from poolhouse.tasks import Task

if TYPE_CHECKING:
    from tqdm import tqdm

    from poolhouse.engine.request import Answer
    from poolhouse.inputs.prompts import PromptInput
    from poolhouse.llm import LLM
    from poolhouse.llm.requests import CallOptions

# Texts that are in memory at once.
_AT_ONCE = 4096

# Pages, which are pictures of some megabytes.
_PAGES_AT_ONCE = 24

# Endings of files that are not read: they hold no text per line.
_NOT_LINES = frozenset(
    """
    .7z .arrow .avro .bin .bz2 .db .doc .docx .feather .gz .h5 .json .npy .npz .ods .odt .orc .pickle .pkl .pt
    .rar .safetensors .sqlite .tar .tgz .xls .xlsx .xz .yaml .yml .zip .zst
    """.split()  # noqa: SIM905
)

# Fields of requests that are the same for all texts: an error of theirs belongs to no single text.
_OF_ALL = ("prompt_name", "input_type", "task", "adapter", "lora_request")

_HELP = f"A file with a text per line, {', '.join(ROW_FORMS)}; - is standard input."
Input = Annotated[str, typer.Option("--input", "-i", help=_HELP)]
InputFormat = Annotated[
    str | None, typer.Option(help=f"How to read --input: {', '.join(READ_AS)}; none: by the file's ending, else lines.")
]
Column = Annotated[
    str | None, typer.Option(help="Where the text stands in a row of --input, but for files of lines (text).")
]
_DEFAULT_COLUMN = "text"

PromptName = Annotated[str | None, typer.Option(help="A prompt stored with the checkpoint.")]
Dimensions = Annotated[int | None, typer.Option(help="Length of the vectors, for Matryoshka models.")]


Item_co = TypeVar("Item_co", bound="str | Page", covariant=True)


@dataclass(frozen=True, slots=True)
class Texts(Generic[Item_co]):
    """Texts, or pages, with their numbers, for messages: `unit` NUMBER of `where`. total: how many, where that is known.

    at_once: how many may be in memory, twice. aside: is told of a page that cannot be read, which is left out then.
    """

    numbered: Iterator[tuple[int, Item_co]]
    unit: str
    where: str
    total: int | None = None
    at_once: int = _AT_ONCE
    aside: Aside | None = None

    def groups(self, size: int) -> Iterator[tuple[Sequence[int], list[Item_co]]]:
        """Numbers and texts, at most `size` at once."""
        size = min(size, self.at_once)
        while group := list(itertools.islice(self.numbered, size)):
            yield [number for number, _ in group], [text for _, text in group]

    def without_blanks(self: Texts[str]) -> Texts[str]:
        """Those that are more than white space; their total is not known."""
        return Texts((item for item in self.numbered if item[1].strip()), self.unit, self.where)


def answered(
    llm: LLM, texts: Texts[Item_co], task: Task, options: CallOptions, group_size: int | None = None
) -> Iterator[tuple[list[Item_co], list[Answer]]]:
    """Groups of texts with their answers, in order; the engine works one group ahead.

    Raises:
        PoolhouseError: of the first text that could not be answered, naming its line or row.
    """
    from poolhouse.llm.calls import read_ahead
    from poolhouse.llm.requests import requests_of

    def submit(group: tuple[Sequence[int], list[Item_co]]) -> list[Future[Answer]]:
        prompts: list[PromptInput] = [text if isinstance(text, str) else text.prompt for text in group[1]]
        return llm.engine.submit(requests_of(llm.engine, prompts, task, options))

    for (numbers, group), futures in read_ahead(texts.groups(group_size or _AT_ONCE), submit):
        kept, answers = [], []
        for number, text, future in zip(numbers, group, futures, strict=True):
            try:
                answers.append(future.result())
                kept.append(text)
            except PoolhouseError as error:
                if isinstance(error, UnsupportedDimensions):
                    error.args = (f"--dimensions: {error}",)
                    raise
                parameter = getattr(error, "parameter", None)
                if parameter in _OF_ALL:
                    raise
                where = f"{texts.unit} {number} of {texts.where}" if isinstance(text, str) else text.name
                message = f"{where}: {_for_commands(error, llm).removeprefix(f'{parameter}: ')}"
                if texts.aside is None or not isinstance(error, InvalidRequest):
                    error.args = (message,)
                    raise
                texts.aside(message)
        if kept:
            yield kept, answers


def progress_bar(texts: Texts[str | Page]) -> tqdm:
    """A progress bar of texts on standard error, where that is a terminal."""
    from tqdm import tqdm

    unit = " pages" if texts.unit == "Page" else " texts"
    bar: tqdm = tqdm(total=texts.total, unit=unit, disable=None, dynamic_ncols=True)
    return bar


def _for_commands(error: PoolhouseError, llm: LLM) -> str:
    """The message of an error, with options of the command instead of fields of requests."""
    if not isinstance(error, InputTooLong):
        return str(error)
    most = llm.engine.limit(PoolingParams()).max_uncut_tokens
    return (
        f"This model's maximum context length is {most} tokens, and the text has more. --overflow truncate cuts such "
        "texts, --overflow chunk splits them and takes the mean of the pieces."
    )


def of_the_line(texts: Sequence[str]) -> Texts[str]:
    """Texts that are arguments."""
    return Texts(iter(enumerate(texts, start=1)), "Text", "the command line", len(texts))


def of_pages(files: Sequence[Path], dpi: float, aside: Aside) -> Texts[Page]:
    """The pages of PDF files, and pictures."""
    pages = pages_of(files, dpi, aside)
    return Texts(pages, "Page", "the command line", at_once=_PAGES_AT_ONCE, aside=aside)


def opened(source: str, form: str | None, column: str | None, stack: contextlib.ExitStack) -> Texts[str]:
    """The texts of a file, or of standard input ("-"); the stack closes it.

    A line ends with \\n or \\r\\n, and an empty one is an empty text. form: one of READ_AS; None goes by the ending.

    Raises:
        ConfigError: what cannot be read so, now or while it is read, naming the line or row.
    """
    form = _form(source, form)
    where = "standard input" if source == "-" else source
    if form == "lines" and column is not None:
        raise ConfigError(f"--column is for rows, and {where} is read as lines; see --input-format.")
    column = column or _DEFAULT_COLUMN
    if form == "parquet":
        return _parquet(source, column, stack)
    if source != "-":
        stream: IO[bytes] = stack.enter_context(Path(source).open("rb"))  # noqa: SIM115 - the stack closes it
    elif sys.stdin is None:
        raise ConfigError("Standard input is closed; give texts, or --input FILE.")
    else:
        if sys.stdin.isatty():
            print("Reading texts from the terminal, one a line; Ctrl-D ends them.", file=sys.stderr)
        stream = sys.stdin.buffer
    total = None
    if source != "-" and form in ("lines", "jsonl") and sys.stderr is not None and sys.stderr.isatty():
        total = _count_lines(Path(source))
    lines = _decoded(stream, where)
    if form == "lines":
        return Texts(_of_lines(lines, where), "Line", where, total)
    if form == "jsonl":
        return Texts(_of_json(lines, where, column), "Line", where, total)
    return Texts(_of_table(lines, where, column, "," if form == "csv" else "\t"), "Line", where)


@contextlib.contextmanager
def output_stream(output: Path | None, form: str = "jsonl") -> Iterator[IO[bytes]]:
    """Where answers go: to a file that appears at the end, or to standard output, a pipe or a device as they come."""
    if output is None and sys.stdout is None:
        raise ConfigError("Standard output is closed; give --output FILE.")
    special = output is not None and output.exists() and not (output.is_file() or output.is_dir())
    with contextlib.ExitStack() as stack:
        if output is None:
            stream: IO[bytes] = sys.stdout.buffer
        elif special and form == "jsonl":
            # There is nothing that a pipe or a device could lose.
            stream = stack.enter_context(output.open("wb"))
        else:
            stream = stack.enter_context(stack.enter_context(whole_file(output)).open("wb"))
        yield stream
        stream.flush()


def refuse_same_file(source: str, output: Path | None) -> None:
    """Raise ConfigError where what is read would be written. output: None is standard output."""
    if same_file(0 if source == "-" else source, 1 if output is None else output):
        raise ConfigError(f"{source if output is None else output} is both what is read and what would be written.")


def nothing_in(source: str) -> ConfigError:
    """The error for a source without any text."""
    return ConfigError(f"There is no text in {'standard input' if source == '-' else source}.")


def check_input_format(form: str | None) -> None:
    """Raise ConfigError for a form of files that there is not; None is any."""
    if form is not None and form not in READ_AS:
        raise ConfigError(f"--input-format {form} is not one of {', '.join(READ_AS)}.{did_you_mean(form, READ_AS)}")


def _form(source: str, form: str | None) -> str:
    check_input_format(form)
    ending = "" if source == "-" else Path(source).suffix.lower()
    if form is None and ending in PAGES:
        raise ConfigError(f"{source}: PDF files and pictures are no --input but arguments: poolhouse embed {source}")
    if form is None and ending in _NOT_LINES:
        raise ConfigError(
            f"{source}: files that end with {ending} are not read. What is: a text per line, {', '.join(ROW_FORMS)}. "
            f"--input-format says what a file holds, whatever its name."
        )
    return form or ROW_FORMS.get(ending, "lines")


def _count_lines(path: Path) -> int:
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _decoded(stream: IO[bytes], where: str) -> Iterator[str]:
    """Lines with their ends, without the mark of UTF-8 at the beginning."""
    for number, line in enumerate(stream, start=1):
        if number == 1 and (line[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0\0" in (line[:4:2], line[1:4:2])):
            raise ConfigError(f"{where} is not UTF-8; it looks like UTF-16. Convert it first, such as by iconv.")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"Line {number} of {where} is not UTF-8: {error}") from None


def _of_lines(lines: Iterable[str], where: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        if number == 1 and not line.endswith("\n") and "\r" in line:
            raise ConfigError(f"{where} ends its lines with \\r alone; they must end with \\n, or \\r\\n.")
        if number == 1 and line.startswith("{") and _is_json(line):
            warnings.warn(
                f"{where} is read as lines, although the first is a JSON object; --input-format jsonl reads its fields.",
                stacklevel=2,
            )
        yield number, _without_end(line)


def _without_end(line: str) -> str:
    return line[:-2] if line.endswith("\r\n") else line.removesuffix("\n")


def _is_json(line: str) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _of_json(lines: Iterable[str], where: str, column: str) -> Iterator[tuple[int, str]]:
    """A line is a JSON string, or an object with the text under `column`."""
    for number, line in enumerate(lines, start=1):
        subject = f"Line {number} of {where}"
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ConfigError(f"{subject} is not JSON: {error}.") from None
        if isinstance(value, dict):
            if column not in value:
                raise ConfigError(f"{subject} has no field '{column}'. {_columns(column, list(value))}")
            subject, value = f"{subject}: '{column}'", value[column]
        if not isinstance(value, str):
            raise ConfigError(f"{subject} is no text but {orjson.dumps(value)[:40].decode(errors='replace')}.")
        yield number, value


def _of_table(lines: Iterable[str], where: str, column: str, separator: str) -> Iterator[tuple[int, str]]:
    """Rows below a first one with the names of the columns, each numbered by the line where it begins."""
    # The module refuses longer cells than 131,072 characters.
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    began = 0
    try:
        header = next(reader, [])
        if header.count(column) != 1:
            found = "two columns" if column in header else "no column"
            raise ConfigError(f"{where} has {found} '{column}' in its first line. {_columns(column, header)}")
        index = header.index(column)
        began = reader.line_num
        for row in reader:
            cells = row or [""]
            if len(cells) != len(header):
                raise ConfigError(
                    f"Line {began + 1} of {where} has {len(row)} cells; the first line has {len(header)}."
                )
            yield began + 1, cells[index]
            began = reader.line_num
    except csv.Error as error:
        raise ConfigError(f"Line {began + 1} of {where} cannot be read as a row: {error}.") from None


def _parquet(source: str, column: str, stack: contextlib.ExitStack) -> Texts[str]:
    if source == "-":
        raise ConfigError("Parquet is read from a file, not from standard input.")
    parquet = pyarrow_module("pyarrow.parquet", "Parquet files")
    stream = stack.enter_context(Path(source).open("rb"))  # noqa: SIM115 - the stack closes it
    try:
        file = stack.enter_context(parquet.ParquetFile(stream))
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - of pyarrow's own kinds
        raise ConfigError(f"{source} cannot be read as Parquet: {error}") from None
    names = file.schema_arrow.names
    if names.count(column) != 1:
        found = "two columns" if column in names else "no column"
        raise ConfigError(f"{source} has {found} '{column}'. {_columns(column, names)}")
    if "string" not in str(file.schema_arrow.field(column).type):
        raise ConfigError(f"{source}: '{column}' holds no texts but {file.schema_arrow.field(column).type}.")

    def rows() -> Iterator[tuple[int, str]]:
        cells = (
            cell for batch in file.iter_batches(_AT_ONCE, columns=[column]) for cell in batch.column(0).to_pylist()
        )
        for number, cell in enumerate(cells, start=1):
            if not isinstance(cell, str):
                raise ConfigError(f"Row {number} of {source}: '{column}' is no text but {cell!r}.")
            yield number, cell

    return Texts(rows(), "Row", source, file.metadata.num_rows)


def _columns(wanted: str, names: Sequence[str]) -> str:
    shown = ", ".join(name[:40] for name in names[:20]) or "none"
    return f"--column names one of: {shown}.{did_you_mean(wanted, names)}"
