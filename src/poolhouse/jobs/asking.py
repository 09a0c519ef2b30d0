"""Asking: rows of a job become requests, and their answers become columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from poolhouse.engine.interface import OfflineEngine
from poolhouse.engine.request import Answer, Request, entities_of
from poolhouse.errors import ConfigError, InvalidRequest, PoolhouseError, UnsupportedDimensions, UnsupportedTask
from poolhouse.inputs.labels import Labels, parse_labels
from poolhouse.inputs.prompts import PromptInput, role_of
from poolhouse.jobs.job import Job, JobTask
from poolhouse.jobs.source import Place, Row
from poolhouse.llm.calls import entity_finder
from poolhouse.llm.requests import CallOptions, is_of_all, requests_of, score_plan
from poolhouse.outputs import Array
from poolhouse.params import PoolingParams
from poolhouse.plans import sparse, zero_shot
from poolhouse.plans.scoring import ScoreOptions, ScorePlan
from poolhouse.plans.zero_shot import Labelled, LabelOptions, LabelPlan
from poolhouse.tasks import Task
from poolhouse.vectors.muvera import Muvera
from poolhouse.vectors.precision import QUANTIZED, Codes, quantize

# Rows that are asked and answered together; pictures are megabytes each, and answers of tokens hundreds of kilobytes.
_ROWS, _TOKEN_ROWS, _PICTURE_ROWS = 2048, 512, 32


@dataclass(frozen=True, slots=True, eq=False)
class Column:
    """What a task gives for each row.

    values: [rows, width] numbers, a list of [vectors, width] numbers, or a list with a value per row.
    like: of a list of arrays one without a row, which says what they hold where there is none.
    """

    name: str
    values: Codes | Sequence[Any]
    like: Codes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """Rows that were answered, what each is, and how many tokens they have."""

    rows: Sequence[Row]
    columns: Sequence[Column]
    truncated: Sequence[bool]
    tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A row that was set aside, and why."""

    row: Row
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A group of rows on its way. failed: those that cannot be asked. plans: one per row, of scores.

    requests: as many for each row, in order. after: where reading goes on behind the group.
    """

    rows: list[Row]
    failed: list[Failed]
    requests: list[Request]
    plans: list[ScorePlan]
    after: Place


class Asker:
    """What a job asks of one engine.

    Raises:
        ConfigError: the model cannot do a task of the job.
    """

    def __init__(self, engine: OfflineEngine, job: Job) -> None:
        self.engine, self.job = engine, job
        # Smaller sizes are cut of the largest.
        params = PoolingParams(dimensions=max(job.sizes, default=None))
        self.options = CallOptions(params, job.prompt_name, input_type=job.input_type)
        self.tasks = () if "score" in job.tasks else tuple(dict.fromkeys(self._task(task) for task in job.tasks))
        if job.image_column is not None and not engine.facts.pictures:
            raise ConfigError(f"{engine.facts.name} reads texts alone, no pictures; leave --image-column out.")
        if job.sizes and "embed" not in self.tasks and "token_embed" not in self.tasks:
            raise ConfigError("--dimensions is for the tasks embed and tokens.")
        if len(job.sizes) > 1:
            self._check_sizes()
        self.labels, self.label_plan = self._labels(job), self._label_plan(job)
        if job.muvera is not None:
            job.muvera.length(self._width("token_embed"))
        if job.instruction is not None and "score" not in job.tasks:
            raise ConfigError(
                "--instruction is for --task score; --prompt-name and --input-type choose prompts of others."
            )
        if "score" in job.tasks:
            self._plan("a query", "a document")

    def ask(self, rows: Sequence[Row]) -> Asked:
        """The requests of a group of rows; those that have no text are failed already.

        Raises:
            PoolhouseError: an option that the model does not take.
        """
        failed: list[Failed] = []
        kept: list[Row] = []
        for row in rows:
            reason = row.problem or self._problem(row)
            if reason is None:
                kept.append(row)
            else:
                failed.append(Failed(row, reason))
        if self.tasks:
            prompts = [self._prompt(row) for row in kept]
            try:
                requests = self._requests(prompts)
            except InvalidRequest as error:
                if is_of_all(error, self.engine):
                    raise
                kept, requests = self._one_by_one(kept, prompts, failed)
            return Asked(kept, failed, requests, [], rows[-1].after)
        plans = [self._plan(row.values[self.job.query_column], row.values[self.job.column]) for row in kept]
        return Asked(kept, failed, [request for plan in plans for request in plan.requests], plans, rows[-1].after)

    def answered(self, asked: Asked, futures: Sequence[Future[Answer]]) -> tuple[Answered, list[Failed]]:
        """The answers of a group, waited for; and the rows that failed.

        Raises:
            PoolhouseError: of an option of all rows, or an engine that is lost.
        """
        failed = list(asked.failed)
        rows: list[Row] = []
        requests: list[Request] = []
        answers: list[list[Answer]] = []
        scores: list[float] = []
        labelled: list[Labelled] = []
        each = len(futures) // max(len(asked.rows), 1)
        for number, row in enumerate(asked.rows):
            try:
                own = [future.result() for future in futures[number * each : (number + 1) * each]]
                if asked.plans:
                    scores.append(asked.plans[number].finish(own)[0].score)
                if self.label_plan is not None:
                    labelled += self.label_plan.finish(own)
                answers.append(own)
                rows.append(row)
                requests.append(asked.requests[number * each])
            except PoolhouseError as error:
                if isinstance(error, UnsupportedDimensions):
                    error.args = (f"--dimensions: {error}",)
                    raise
                if is_of_all(error, self.engine):
                    raise
                failed.append(Failed(row, _reason(error)))
        if self.label_plan is not None:
            columns = _labelled(labelled, len(self.job.labels))
        elif self.tasks:
            columns = self._columns(requests, [own[0] for own in answers])
        else:
            columns = [Column("score", np.asarray(scores, np.float32))]
        truncated = [any(answer.tokens.truncated for answer in own) for own in answers]
        tokens = sum(len(answer.tokens.ids) for own in answers for answer in own)
        return Answered(rows, columns, truncated, tokens), sorted(failed, key=lambda one: one.row.after)

    def _labels(self, job: Job) -> Labels | None:
        """What all texts are read with by a model that finds parts of them; None of all others."""
        reads = "extract" in self.tasks
        if reads != (bool(job.labels) and not job.by_labels):
            raise ConfigError(
                "This model looks for what --labels names: give it a list, such as person,city."
                if reads
                else f"--labels: {self.engine.facts.name} reads no labels with a text."
            )
        try:
            return parse_labels(job.labels, job.threshold, multi_label=job.multi_label) if reads else None
        except InvalidRequest as error:
            raise ConfigError(f"--labels and --threshold: {error}") from None

    def _label_plan(self, job: Job) -> LabelPlan | None:
        """How a text is classified by labels of the job; None without."""
        if "classify" in self.tasks and self.engine.facts.reads_labels and not job.labels:
            raise ConfigError("This model classifies by what --labels names: give it a list, such as sports,politics.")
        try:
            return zero_shot.plan(self.engine, job.labels, 1, LabelOptions(job.multi_label)) if job.by_labels else None
        except InvalidRequest as error:
            raise ConfigError(f"--labels: {error}") from None

    def _task(self, task: JobTask) -> Task:
        """The engine's task for one of the job's."""
        facts = self.engine.facts
        if task == "entities" and "extract" in facts.tasks:
            return "extract"
        if task == "sparse":
            try:
                return sparse.head_of(self.engine).task
            except UnsupportedTask as error:
                raise ConfigError(f"--task sparse: {error}") from None
        names: Mapping[JobTask, Task] = {"tokens": "token_embed", "entities": "token_classify"}
        if self.job.muvera is not None:
            names = {**names, "embed": "token_embed"}
        wanted: Task = names.get(task, task)  # type: ignore[arg-type]
        if wanted not in facts.tasks or (task == "entities" and facts.token_weights):
            raise ConfigError(f"--task {task}: this model does not do that. Its tasks: {', '.join(facts.tasks)}.")
        if task == "entities" and not facts.label_names:
            raise ConfigError("--task entities: this model's labels have no names.")
        return wanted

    def _problem(self, row: Row) -> str | None:
        """What is wrong with the row's cells; None where nothing is."""
        if self.job.image_column is not None:
            value = row.values[self.job.image_column]
            if isinstance(value, Mapping):
                value = value.get("bytes") or value.get("path")
            if not isinstance(value, str | bytes) or not value:
                return f"'{self.job.image_column}' is no picture but {_shown(row.values[self.job.image_column])}"
            return None
        for column in (self.job.column, *([self.job.query_column] if not self.tasks else ())):
            if not isinstance(row.values[column], str):
                return f"'{column}' is no text but {_shown(row.values[column])}"
        return None

    def _prompt(self, row: Row) -> PromptInput:
        if self.job.image_column is None:
            return row.values[self.job.column]  # type: ignore[no-any-return]
        value = row.values[self.job.image_column]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value["path"]
        return {"content": [{"type": "image", "image": value}]}

    def _requests(self, prompts: Sequence[PromptInput]) -> list[Request]:
        """A request per prompt, which asks for all tasks at once; as many for each, where labels need several."""
        if not prompts:
            return []
        first, *further = self.tasks
        requests = requests_of(self.engine, list(prompts), first, self.options)
        if self.label_plan is not None:
            return [one for request in requests for one in self.label_plan.requests([request])]
        offsets = "token_classify" in self.tasks and "entities" in self.job.tasks
        if not further and not offsets and self.labels is None:
            return requests
        return [replace(request, further=tuple(further), offsets=offsets, labels=self.labels) for request in requests]

    def _one_by_one(
        self, rows: Sequence[Row], prompts: Sequence[PromptInput], failed: list[Failed]
    ) -> tuple[list[Row], list[Request]]:
        """The rows whose prompts are right; `failed` gets the others."""
        kept, requests = [], []
        for row, prompt in zip(rows, prompts, strict=True):
            try:
                requests += self._requests([prompt])
                kept.append(row)
            except InvalidRequest as error:
                failed.append(Failed(row, _reason(error)))
        return kept, requests

    def _plan(self, query: str, document: str) -> ScorePlan:
        try:
            options = ScoreOptions(instruction=self.job.instruction)
            return score_plan(self.engine, [query], [document], self.options, options)
        except UnsupportedTask as error:
            raise ConfigError(f"--task score: {error}") from None

    def _columns(self, requests: Sequence[Request], answers: Sequence[Answer]) -> list[Column]:
        columns: list[Column] = []
        for task in self.job.tasks:
            wanted = self._task(task)
            arrays = [answer.array if wanted == self.tasks[0] else answer.further[wanted] for answer in answers]
            if task == "embed":
                columns += self._embeddings(arrays)
            elif task == "tokens":
                columns += self._tokens(arrays)
            elif task == "sparse":
                columns += self._sparse(answers, arrays)
            elif task == "classify":
                columns += self._classes(arrays)
            else:
                columns += self._entities(requests, answers, arrays)
        return columns

    def _embeddings(self, arrays: Sequence[Array]) -> list[Column]:
        if self.job.muvera is not None:
            return [Column("embedding", self._quantized(self._encodings(self.job.muvera, arrays)))]
        rows = np.stack(arrays) if arrays else self._no_vectors("embed")
        return [
            Column(name, self._quantized(self._cut(rows, size, "embed")))
            for name, size in self._named_sizes("embedding")
        ]

    def _encodings(self, muvera: Muvera, arrays: Sequence[Array]) -> Array:
        """[rows, length]: an encoding of each row's vectors."""
        if not arrays:
            return np.zeros((0, muvera.length(self._width("token_embed"))), np.float32)
        return muvera.encode(arrays, queries=role_of(self.job.input_type) == "query")

    def _tokens(self, arrays: Sequence[Array]) -> list[Column]:
        columns = []
        for name, size in self._named_sizes("token_embeddings"):
            none, *cut = (self._cut(rows, size, "token_embed") for rows in (self._no_vectors("token_embed"), *arrays))
            columns.append(Column(name, [self._quantized(rows) for rows in cut], self._quantized(none)))
        return columns

    def _quantized(self, vectors: Array) -> Codes:
        return quantize(vectors, self.job.precision, self.engine.facts.calibration)

    def _no_vectors(self, task: Task) -> Array:
        """[0, width] of a task."""
        return np.zeros((0, self._width(task)), np.float32)

    def _width(self, task: Task) -> int:
        """Numbers of a vector of this task."""
        return max(self.job.sizes, default=self.engine.facts.widths[task])

    def _named_sizes(self, name: str) -> list[tuple[str, int | None]]:
        """Columns of vectors and the size of each; None: as they came."""
        sizes = self.job.sizes
        return [(f"{name}_{size}", size) for size in sizes] if len(sizes) > 1 else [(name, None)]

    def _cut(self, rows: Array, size: int | None, task: Task) -> Array:
        """Vectors cut to a size, of unit length where the model's are: as its pipeline does, whose last two steps these are."""
        if size is None or size == rows.shape[-1]:
            return rows
        cut = np.ascontiguousarray(rows[..., :size])
        if task not in self.engine.facts.activated:
            return cut
        unit: Array = cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), np.float32(1e-12))
        return unit

    def _check_sizes(self) -> None:
        """Raise ConfigError for a size that the model does not offer."""
        facts = self.engine.facts
        if facts.matryoshka is None:
            return
        for size in self.job.sizes:
            try:
                facts.matryoshka.check(size, facts.name)
            except UnsupportedDimensions as error:
                raise ConfigError(f"--dimensions: {error}") from None

    def _sparse(self, answers: Sequence[Answer], arrays: Sequence[Array]) -> list[Column]:
        head = sparse.head_of(self.engine)
        vectors = [
            sparse.vector_of(self.engine, head, array, answer.tokens)
            for answer, array in zip(answers, arrays, strict=True)
        ]
        return [
            Column("sparse_indices", [vector.ids for vector in vectors], np.zeros(0, np.int32)),
            Column("sparse_values", [vector.weights for vector in vectors], np.zeros(0, np.float32)),
        ]

    def _classes(self, arrays: Sequence[Array]) -> list[Column]:
        names = self.engine.facts.label_names
        none = np.zeros((0, self.engine.facts.labels), np.float32)
        columns = [Column("probabilities", np.stack(arrays) if arrays else none)]
        if names and self.engine.facts.labels > 1:
            best = [int(array.argmax()) for array in arrays]
            columns.insert(0, Column("label", [names.get(index, f"LABEL_{index}") for index in best]))
        return columns

    def _entities(
        self, requests: Sequence[Request], answers: Sequence[Answer], arrays: Sequence[Array]
    ) -> list[Column]:
        if self.labels is not None:
            parts = [entities_of(request, answer) for request, answer in zip(requests, answers, strict=True)]
            return [Column("entities", [[asdict(entity) for entity in own] for own in parts])]
        find = entity_finder(self.engine)
        found = [
            find((request, replace(answer, array=array)))
            for request, answer, array in zip(requests, answers, arrays, strict=True)
        ]
        return [Column("entities", [[asdict(entity) for entity in own] for own in found])]


def _labelled(found: Sequence[Labelled], labels: int) -> list[Column]:
    """Columns of texts that are classified by so many labels."""
    none = np.zeros((0, labels), np.float32)
    rows = np.stack([one.array for one in found]) if found else none
    return [Column("label", [one.label for one in found]), Column("probabilities", rows)]


def rows_at_once(job: Job) -> int:
    """How many rows are asked together."""
    of_tokens = "tokens" in job.tasks or job.muvera is not None
    return _PICTURE_ROWS if job.image_column else _TOKEN_ROWS if of_tokens else _ROWS


def check_precision(job: Job) -> None:
    """Raise ConfigError for a precision that the output cannot hold."""
    if job.precision != "float32" and not {"embed", "tokens"} & set(job.tasks):
        raise ConfigError("--precision is for the tasks embed and tokens.")
    if job.form == "jsonl" and job.precision not in ("float32", *QUANTIZED):
        raise ConfigError(f"JSON lines cannot hold {job.precision}; use --format parquet.")


def _reason(error: PoolhouseError) -> str:
    parameter = getattr(error, "parameter", None)
    return str(error).removeprefix(f"{parameter}: ")


def _shown(value: object) -> str:
    return repr(value)[:40]
