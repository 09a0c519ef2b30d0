"""Job: what is asked of whole files, as one value that is compared when a job goes on."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, Literal, get_args

from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.vectors.muvera import Muvera
from poolhouse.vectors.precision import Precision

# What a job asks of each row; `tokens` is a vector per token, `entities` the labelled parts of a text.
JobTask = Literal["embed", "sparse", "tokens", "classify", "entities", "score"]
TASKS: tuple[JobTask, ...] = get_args(JobTask)
OutputForm = Literal["parquet", "jsonl", "npy"]
FORMS: tuple[OutputForm, ...] = get_args(OutputForm)

# How a file of rows is read, by its ending; and with those that hold a text per line.
ROW_FORMS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
INPUT_FORMS = {".txt": "lines", **ROW_FORMS}
READ_AS = tuple(dict.fromkeys(INPUT_FORMS.values()))
STANDARD_INPUT = "-"
# Columns that a task may give.
COLUMNS: Mapping[JobTask, tuple[str, ...]] = {
    "embed": ("embedding",),
    "sparse": ("sparse_indices", "sparse_values"),
    "tokens": ("token_embeddings",),
    "classify": ("label", "probabilities"),
    "entities": ("entities",),
    "score": ("score",),
}
# Other names of tasks, of the engine and of vLLM.
_ALIASES: Mapping[str, JobTask] = {
    "token_embed": "tokens",
    "token_classify": "entities",
    "ner": "entities",
    "rerank": "score",
}
# Options of the engine that change no answer: a job may go on with others.
_MAY_CHANGE = frozenset(
    """
    max_num_batched_tokens lanes tokenizer_workers device download_dir hf_token seed served_model_name
    media_connect_seconds media_seconds media_threads media_waiting_bytes media_cache_bytes enable_lora
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Job:
    """What is read, what is asked of each row, and what is written where.

    inputs: files, folders, globs, or "-". out: a folder. column: of the text; query_column: of the query, of `score`.
    image_column: of pictures: paths, URLs, bytes, or datasets' {"bytes", "path"}. id: a column that names rows; None:
    rows are named by file and number. keep: columns that come along.
    shard_rows, shard_bytes: a file of the output has no more rows than this, or is ended behind so many bytes.
    dimensions: of vectors; several are columns of their own, from one pass. muvera: makes the vector of `embed` of those
    of a text's tokens. labels: what `entities` looks for, of models that read labels with each text, or what `classify`
    classifies by, of zero-shot classifiers. threshold: of `entities`. multi_label: a text, or a part, may have several.
    max_errors: rows that may be set aside; one more stops the job. None: none stops it, any lets it end with an error.
    options: of the engine, see `poolhouse.settings.Settings`.
    """

    inputs: tuple[str, ...]
    out: Path
    model: str | None = None
    tasks: tuple[JobTask, ...] = ("embed",)
    column: str = "text"
    query_column: str = "query"
    image_column: str | None = None
    id: str | None = None
    keep: tuple[str, ...] = ()
    input_form: str | None = None
    form: OutputForm = "parquet"
    precision: Precision = "float32"
    dimensions: int | tuple[int, ...] | None = None
    muvera: Muvera | None = None
    labels: tuple[str, ...] = ()
    threshold: float = 0.5
    multi_label: bool = False
    prompt_name: str | None = None
    input_type: str | None = None
    instruction: str | None = None
    shard_rows: int = 50_000
    shard_bytes: int = 512 * 1024 * 1024
    max_errors: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigError("A job needs an input: files, folders, globs, or - for standard input.")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError(f"--task names each task once, got {', '.join(self.tasks) or 'none'}.")
        if "score" in self.tasks and len(self.tasks) > 1:
            raise ConfigError("--task score reads two columns, and stands alone.")
        if self.form == "npy" and self.tasks != ("embed",):
            raise ConfigError("--format npy is for --task embed alone; parquet and jsonl take all tasks.")
        if self.form == "npy" and (self.id or self.keep):
            raise ConfigError("--format npy holds vectors alone; --id and --keep are for parquet and jsonl.")
        if len(set(self.sizes)) != len(self.sizes) or any(type(size) is not int or size < 1 for size in self.sizes):
            raise ConfigError(f"--dimensions are different numbers from 1, got {', '.join(map(str, self.sizes))}.")
        if self.form == "npy" and len(self.sizes) > 1:
            raise ConfigError("--format npy holds one matrix per file; parquet and jsonl take several --dimensions.")
        if self.muvera is not None:
            if "embed" not in self.tasks or len(self.sizes) > 1:
                raise ConfigError("--muvera is for the task embed, and one of --dimensions.")
            self.muvera.checked(self.precision, "--precision")
        if self.labels and self.tasks not in (("entities",), ("classify",)):
            raise ConfigError("--labels is for --task entities or --task classify, each alone.")
        if self.multi_label and not self.labels:
            raise ConfigError("--multi-label is for --labels.")
        if self.by_labels and self.image_column is not None:
            raise ConfigError("--labels is for texts, not for --image-column.")
        if self.image_column is not None and ("score" in self.tasks or "entities" in self.tasks):
            raise ConfigError("--image-column is for embed, sparse, tokens and classify.")
        if min(self.shard_rows, self.shard_bytes) < 1 or (self.max_errors is not None and self.max_errors < 0):
            raise ConfigError("--shard-rows and --shard-bytes are numbers from 1, and --max-errors one from 0.")
        several = (*self.keep, *([self.id] if self.id else ()))
        if len(set(several)) != len(several):
            raise ConfigError(f"--id and --keep name each column once, got {', '.join(several)}.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of vectors; none is that of the model."""
        if self.dimensions is None:
            return ()
        return self.dimensions if isinstance(self.dimensions, tuple) else (self.dimensions,)

    @property
    def by_labels(self) -> bool:
        """Whether texts are classified by labels of the job."""
        return bool(self.labels) and "classify" in self.tasks

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that must be read, each once."""
        read = [self.column] if self.image_column is None else [self.image_column]
        if "score" in self.tasks:
            read.append(self.query_column)
        return tuple(dict.fromkeys((*read, *([self.id] if self.id else ()), *self.keep)))

    def fingerprint(self, folder: Path) -> dict[str, Any]:
        """What must be equal for a job to go on: everything that changes an answer or its place. folder: of the model."""
        value = asdict(self)
        for name in ("out", "max_errors", "shard_rows", "shard_bytes", "inputs"):
            del value[name]
        del value["options"]
        return {**_plain(value), **checkpoint(self.options, folder)}


def checkpoint(options: Mapping[str, object], folder: Path) -> dict[str, Any]:
    """What decides the answers of an engine: its options, and the files in its folder."""
    decisive = {name: _plain(one) for name, one in options.items() if name not in _MAY_CHANGE}
    return {"options": decisive, "files": _identity(folder)}


def parse_tasks(names: Iterable[str]) -> tuple[JobTask, ...]:
    """Tasks by their names, several with commas.

    Raises:
        ConfigError: there is none of that name.
    """
    found: list[JobTask] = []
    for name in (part.strip() for text in names for part in text.split(",")):
        for task in TASKS:
            if task == _ALIASES.get(name, name):
                found.append(task)
                break
        else:
            raise ConfigError(f"--task {name} is not one of {', '.join(TASKS)}.{did_you_mean(name, TASKS)}")
    return tuple(found)


def input_files(inputs: Sequence[str], input_form: str | None, out: Path) -> list[str]:
    """The files of arguments in order, each once: files, all readable ones below folders, globs; "-" by itself.

    out: a folder whose files are no input.

    Raises:
        ConfigError: nothing there, or a file that cannot be read as rows.
    """
    if STANDARD_INPUT in inputs:
        if len(inputs) > 1:
            raise ConfigError("Standard input (-) is an input by itself.")
        if sys.stdin is None:
            raise ConfigError("Standard input is closed; name files.")
        return [STANDARD_INPUT]
    found: list[str] = []
    for name in inputs:
        if os.path.isdir(name):  # noqa: PTH112 - false for what cannot be a path
            files = sorted(str(path) for path in Path(name).rglob("*") if path.is_file() and _is_read(path, input_form))
            if not files:
                raise ConfigError(f"{name}: no file below it ends with {', '.join(INPUT_FORMS)}.")
        elif os.path.exists(name):  # noqa: PTH110
            files = [name]
        else:
            files = sorted(path for path in glob(name, recursive=True) if os.path.isfile(path))  # noqa: PTH113, PTH207
            if not files:
                raise ConfigError(f"There is no file {name}.")
        found.extend(files)
    written = out.resolve()
    files = [name for name in dict.fromkeys(found) if written not in Path(name).resolve().parents]
    if not files:
        raise ConfigError(f"All of the input lies in --out {out}.")
    for name in files:
        form_of(name, input_form)
    return files


def form_of(name: str, input_form: str | None) -> str:
    """How a file is read.

    Raises:
        ConfigError: neither its ending nor --input-format says it.
    """
    if input_form is not None:
        return input_form
    if name == STANDARD_INPUT:
        return "lines"
    form = INPUT_FORMS.get(Path(name).suffix.lower())
    if form is None:
        raise ConfigError(
            f"{name}: what it holds cannot be told from its ending. These are read: {', '.join(INPUT_FORMS)}; "
            f"--input-format says what others hold: {', '.join(READ_AS)}."
        )
    return form


def stated(files: Sequence[str]) -> list[dict[str, object]]:
    """Each file with its size and the time of its last change, which tell whether it is still the same.

    Raises:
        ConfigError: a file that is gone.
    """
    if list(files) == [STANDARD_INPUT]:
        return [{"file": STANDARD_INPUT}]
    found: list[dict[str, object]] = []
    for name in files:
        try:
            status = Path(name).stat()
        except OSError as error:
            raise ConfigError(f"{name} cannot be read: {error.strerror}.") from None
        found.append({"file": name, "bytes": status.st_size, "changed": status.st_mtime_ns})
    return found


def _is_read(path: Path, input_form: str | None) -> bool:
    ending = path.suffix.lower()
    return ending in INPUT_FORMS and (input_form is None or INPUT_FORMS[ending] == input_form)


def _identity(folder: Path) -> dict[str, object]:
    """What tells one checkpoint from another: its config, and names and sizes of its weights."""
    config = folder / "config.json"
    weights = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    return {
        "config": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        "weights": {path.name: path.stat().st_size for path in weights},
    }


def _plain(value: object) -> Any:
    """The value as JSON has it; what JSON lacks by its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
