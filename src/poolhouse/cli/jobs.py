"""`poolhouse run`: whole files through a model, into a folder; a job that was stopped goes on where it was."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from poolhouse.cli.options import with_options
from poolhouse.cli.texts import PromptName, check_input_format
from poolhouse.errors import ConfigError, InvalidRequest, did_you_mean
from poolhouse.jobs.job import FORMS, READ_AS, TASKS, Job, OutputForm, parse_tasks
from poolhouse.settings import Settings, split_values
from poolhouse.vectors.muvera import Muvera
from poolhouse.vectors.precision import PRECISIONS, parse_precision

if TYPE_CHECKING:
    from poolhouse.jobs.run import Estimate, Progress
    from poolhouse.llm import LLM

# Without a terminal, how often a line says how far the job is.
_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_UPDATES = 0.2
# Fields of a job that are named otherwise on the command line and in a job's file.
_NAMES = {"task": "tasks", "format": "form", "input_format": "input_form"}


@with_options(Settings)
def run_job(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, globs, - for standard input; or one job file (.yaml, .json) with these options."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the output.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id; none: the embedded default.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(TASKS)}; several at once from one pass, with commas. (embed)")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column or field with the text. (text)")] = None,
    query_column: Annotated[str | None, typer.Option(help="With --task score: that with the query. (query)")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of pictures, instead of texts.")] = None,
    id: Annotated[str | None, typer.Option(help="Column that names rows; none: file and row number.")] = None,  # noqa: A002
    keep: Annotated[list[str] | None, typer.Option(help="Columns that come along, with commas.")] = None,
    input_format: Annotated[str | None, typer.Option(help=f"{', '.join(READ_AS)}; none: by each ending.")] = None,
    form: Annotated[str | None, typer.Option("--format", "-f", help=f"{', '.join(FORMS)}. (parquet)")] = None,
    precision: Annotated[str | None, typer.Option(help=f"Of vectors: {', '.join(PRECISIONS)}. (float32)")] = None,
    dimensions: Annotated[
        str | None,
        typer.Option(help="Length of the vectors, for Matryoshka models; several, with commas, are a column each."),
    ] = None,
    muvera: Annotated[
        str | None,
        typer.Option(
            help="With --task embed, of models with a vector per token: one vector of a text by MUVERA; `default`, or "
            "k_sim=5,repetitions=20,projection=16,dimension=10240,seed=42."
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(help="What --task entities looks for, or --task classify classifies by, with commas."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="With --task entities: what is found has a higher score, 0 to 1. (0.5)")
    ] = None,
    multi_label: Annotated[
        bool | None, typer.Option("--multi-label", help="With --labels: a text, or a part, may have several.")
    ] = None,
    prompt_name: PromptName = None,
    input_type: Annotated[str | None, typer.Option(help="What the texts are, query or document.")] = None,
    instruction: Annotated[str | None, typer.Option(help="With --task score: of rerankers that read one.")] = None,
    shard_rows: Annotated[int | None, typer.Option(help="Most rows of a file. (50000)")] = None,
    shard_bytes: Annotated[int | None, typer.Option(help="A file ends behind so many bytes. (512 MiB)")] = None,
    max_errors: Annotated[
        int | None,
        typer.Option(help="Rows that may be set aside; one more stops the job. None: any number, then status 1."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the job would take, by a sample.")] = False,
    *,
    options: dict[str, object],
) -> None:
    """Run all rows of files through a model into files of a folder. `poolhouse embed IN... --out DIR` is the same.

    Called again with the same words, a job that was stopped or killed goes on: no row is lost or twice there. Rows that
    cannot be answered stand in DIR/errors.jsonl, with file, row and reason.
    """
    line: dict[str, object] = {
        "out": out, "model": model, "task": task, "column": column, "query_column": query_column,
        "image_column": image_column, "id": id, "keep": keep, "input_format": input_format, "format": form,
        "precision": precision, "dimensions": dimensions, "muvera": muvera, "labels": labels, "threshold": threshold,
        "multi_label": multi_label, "prompt_name": prompt_name, "input_type": input_type,
        "instruction": instruction, "shard_rows": shard_rows, "shard_bytes": shard_bytes, "max_errors": max_errors,
    }  # fmt: skip
    given = {name: value for name, value in line.items() if value is not None} | options
    job = _job(inputs, given)
    from poolhouse.jobs.run import estimate, run

    def open_model() -> LLM:
        from poolhouse.llm import LLM

        return LLM(job.model, **job.options)

    if dry_run:
        _print_estimate(estimate(job, open_model))
        return
    display = _Display()
    progress = run(job, open_model, display)
    display.close()
    _print_end(job, progress)
    if progress.errors and job.max_errors is None:
        raise ConfigError(
            f"{progress.errors} rows were set aside, see {job.out / 'errors.jsonl'}; all others are written. "
            "--max-errors N forgives so many."
        )


def _job(inputs: Sequence[str], given: Mapping[str, object]) -> Job:
    """The job of a command line, or of a file that the line changes."""
    values: dict[str, Any] = {"inputs": inputs}
    if len(inputs) == 1 and (path := Path(inputs[0])).suffix.lower() in (".yaml", ".yml", ".json"):
        values = _read(path)
    values |= given
    fields = set(Job.__slots__) - {"options"}
    names = [_NAMES.get(name, name) for name in values]
    if len(set(names)) != len(names):
        raise ConfigError("A job's file names an option twice: by its name here, and by its name in Python.")
    values = dict(zip(names, values.values(), strict=True))
    options = {name: value for name, value in values.items() if name not in fields}
    unknown = [name for name in options if name not in Settings.model_fields]
    if unknown:
        known = (*(_name_of(field) for field in fields), *Settings.model_fields)
        raise ConfigError(f"A job has no option '{unknown[0]}'.{did_you_mean(unknown[0], known)}")
    values = {name: value for name, value in values.items() if name in fields}
    if values.get("out") is None:
        raise ConfigError("A job needs --out DIR, the folder that its files go to.")
    for name in ("inputs", "tasks", "keep", "labels"):
        if name in values:
            values[name] = _several(values[name], name)
    if "tasks" in values:
        values["tasks"] = parse_tasks(values["tasks"])
    if "precision" in values:
        values["precision"] = parse_precision(values["precision"])
    form: OutputForm | None = next((one for one in FORMS if one == values.get("form", "parquet")), None)
    if form is None:
        raise ConfigError(f"--format {values['form']} is not one of {', '.join(FORMS)}.")
    check_input_format(values.get("input_form"))
    if values.get("dimensions") is not None:
        values["dimensions"] = _sizes(values["dimensions"])
    if values.get("muvera") is not None:
        values["muvera"] = _muvera(values["muvera"])
    for name in ("shard_rows", "shard_bytes", "max_errors"):
        if name in values and type(values[name]) is not int:
            raise ConfigError(f"--{name.replace('_', '-')} must be a whole number, got {values[name]!r}.")
    return Job(**{**values, "out": Path(values["out"]), "form": form}, options=options)


def _read(path: Path) -> dict[str, Any]:
    """A job's file; names with - or _."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no job: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} is no job: it must hold options, such as `inputs: [texts.parquet]` and `out: vectors`."
        )
    if "inputs" not in value:
        raise ConfigError(f"{path} names no inputs.")
    return {str(name).replace("-", "_"): one for name, one in value.items()}


def _several(value: object, name: str) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{_name_of(name)} must be a text or a list of texts, got {value!r}.")
    if name == "inputs":
        return tuple(value)
    return tuple(part for one in value for part in split_values(one) or ())  # type: ignore[attr-defined]


def _sizes(value: object) -> int | tuple[int, ...]:
    """One size or several: of a line as a text, of a job's file as a number or a list."""
    listed = value if isinstance(value, list | tuple) else str(value).split(",")
    try:
        sizes = tuple(int(str(one)) for one in listed)
    except ValueError:
        raise ConfigError(f"--dimensions must be numbers, such as 256 or 256,64, got {value!r}.") from None
    return sizes[0] if len(sizes) == 1 else sizes


def _muvera(value: object) -> Muvera:
    """How encodings are made: of a line as a text, of a job's file also as an object."""
    if value == "default":
        return Muvera()
    if isinstance(value, str):
        words = {"true": True, "false": False, "none": None}
        pairs = [part.replace(" ", "").partition("=") for part in value.split(",")]
        value = {name: int(one) if one.isdecimal() and len(one) < 20 else words.get(one, one) for name, _, one in pairs}
    if not isinstance(value, dict):
        raise ConfigError(f"--muvera is `default` or numbers by name, such as k_sim=4,repetitions=10, got {value!r}.")
    try:
        return Muvera.of(value)
    except InvalidRequest as error:
        raise ConfigError(f"--muvera: {error}") from None


def _name_of(field: str) -> str:
    return next((name for name, other in _NAMES.items() if other == field), field)


class _Display:
    """How far a job is: a line that is drawn again on a terminal, else a line a minute, on standard error."""

    def __init__(self) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._next = time.monotonic() + (0 if self._terminal else _SECONDS_BETWEEN_LINES)
        self._begun = False

    def __call__(self, progress: Progress) -> None:
        if not self._begun:
            self._begun = True
            if progress.continued and sys.stderr is not None:
                before = progress.rows - progress.new_rows
                print(f"Going on behind {before:,} rows that are written.", file=sys.stderr)
        now = time.monotonic()
        if now < self._next or sys.stderr is None:
            return
        self._next = now + (_SECONDS_BETWEEN_UPDATES if self._terminal else _SECONDS_BETWEEN_LINES)
        print(f"\r\x1b[K{_said(progress)}" if self._terminal else _said(progress), end="" if self._terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def close(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _said(progress: Progress) -> str:
    seconds = max(progress.seconds, 1e-9)
    parts = [
        f"{progress.rows:,} rows",
        *([] if progress.share is None else [f"{progress.share:.0%}"]),
        f"{progress.new_rows / seconds:,.0f} rows/s",
        f"{progress.new_tokens / seconds:,.0f} tokens/s",
        f"{progress.truncated / max(progress.rows, 1):.1%} cut",
        *([f"{progress.errors:,} set aside"] if progress.errors else []),
        *([f"{_time(progress.seconds_left)} left"] if progress.seconds_left else []),
    ]
    return ", ".join(parts)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _print_end(job: Job, progress: Progress) -> None:
    if not progress.new_rows and progress.continued:
        print(f"{job.out}: {progress.rows:,} rows were written before; nothing was left to do.")
        return
    print(f"{job.out}: {_said(progress)}, in {_time(progress.seconds)}.")


def _print_estimate(found: Estimate) -> None:
    known = "an unknown number of" if found.rows is None else f"about {found.rows:,}"
    total = "" if found.rows is None else f", about {found.rows * found.tokens_per_row:,.0f} tokens in all"
    print(f"{known} rows; {found.tokens_per_row:.0f} tokens a row{total}.")
    cut, aside = found.truncated / found.sampled, found.errors / found.sampled
    print(f"Of {found.sampled:,} rows that were tried, {cut:.1%} are cut and {aside:.1%} cannot be answered.")
    hours = "" if found.hours is None else f": {_time(found.hours * 3600)} on this machine"
    print(f"{found.rows_per_second:,.0f} rows/s{hours}.")
