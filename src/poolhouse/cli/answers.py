"""`poolhouse classify | ner | sparse | rerank | similarity`: answers about texts, a JSON line for each."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import numpy as np
import orjson
import typer

from poolhouse.cli import texts as files
from poolhouse.cli.embed import check_are_texts
from poolhouse.cli.options import with_options
from poolhouse.errors import ConfigError
from poolhouse.settings import Settings

if TYPE_CHECKING:
    from poolhouse.jobs.asking import Answered
    from poolhouse.jobs.job import JobTask
    from poolhouse.llm import LLM


Texts = Annotated[list[str] | None, typer.Argument(help="Texts; none: read them from --input.")]
Documents = Annotated[list[str] | None, typer.Argument(help="Documents; none: read them from --input.")]


@dataclass(frozen=True, slots=True)
class _Given:
    """The options that all of these commands share: the texts of the line, or a file; the model; where answers go."""

    model: Annotated[str | None, typer.Option("--model", help="Folder or hub id; none: the embedded default.")] = None
    source: files.Input = "-"
    input_format: files.InputFormat = None
    column: files.Column = None
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write; none: standard output.")] = None

    def opened(self, texts: Sequence[str] | None, stack: contextlib.ExitStack) -> files.Texts[str]:
        """The texts; the stack closes their file."""
        if not texts:
            files.refuse_same_file(self.source, self.output)
            return files.opened(self.source, self.input_format, self.column, stack)
        check_are_texts(texts, self.source, self.model)
        for flag, value in (("--column", self.column), ("--input-format", self.input_format)):
            if value is not None:
                raise ConfigError(f"{flag} is for --input.")
        return files.of_the_line(texts)

    def all(self, texts: Sequence[str] | None, stack: contextlib.ExitStack) -> list[str]:
        """All texts, of which there is one at least."""
        found = [text for _, text in self.opened(texts, stack).numbered]
        if not found:
            raise files.nothing_in(self.source)
        return found


def _with_given(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `_Given`, which arrive as `given`."""
    own = inspect.signature(command, eval_str=True).parameters
    shared = inspect.signature(_Given, eval_str=True).parameters

    @wraps(command)
    def with_options_of_all(**values: Any) -> None:
        given = _Given(**{name: values.pop(name) for name in shared})
        command(given=given, **values)

    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        parameters += shared.values() if name == "given" else [parameter]
    with_options_of_all.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_options_of_all


MultiLabel = Annotated[
    bool, typer.Option("--multi-label", help="With --labels: a text, or a part of it, may have several.")
]

# Fields of a line, of the answers to some texts and their numbers.
Fields = Callable[["LLM", "Answered", int], Mapping[str, object]]

# Texts that are in memory at once, twice.
_AT_ONCE = 1024
# `similarity` compares each with each.
_MOST_COMPARED = 5000


@with_options(Settings)
@_with_given
def classify(
    texts: Texts = None,
    labels: Annotated[
        str | None, typer.Option(help="What texts may be, with commas; of models that classify by such labels.")
    ] = None,
    multi_label: MultiLabel = False,
    *,
    given: _Given,
    options: dict[str, object],
) -> None:
    """Write the most likely label of each text, and the probability of each label."""
    given_labels = _named(labels)

    def fields(llm: LLM, answered: Answered, index: int) -> Mapping[str, object]:
        row = _row(answered, index)
        probabilities: np.ndarray = row["probabilities"]
        names = dict(enumerate(given_labels)) or llm.engine.facts.label_names
        if names:
            named = {names.get(number, f"LABEL_{number}"): value for number, value in enumerate(probabilities)}
            return {**row, "probabilities": named}
        return row

    _answer("classify", fields, texts, given, options, labels=given_labels, multi_label=multi_label)


@with_options(Settings)
@_with_given
def ner(
    texts: Texts = None,
    labels: Annotated[
        str | None, typer.Option(help="What to look for, with commas; of models that read labels with each text.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="With --labels: what is found has a higher score, 0 to 1.")] = 0.5,
    multi_label: MultiLabel = False,
    *,
    given: _Given,
    options: dict[str, object],
) -> None:
    """Write the entities of each text: label, text, score, and where it begins and ends, in characters."""
    _answer(
        "entities",
        lambda _, answered, index: _row(answered, index),
        texts,
        given,
        options,
        labels=_named(labels),
        threshold=threshold,
        multi_label=multi_label,
    )


@with_options(Settings)
@_with_given
def sparse(
    texts: Texts = None,
    prompt_name: files.PromptName = None,
    input_type: Annotated[str | None, typer.Option(help="What the texts are, query or document.")] = None,
    *,
    given: _Given,
    options: dict[str, object],
) -> None:
    """Write the sparse vector of each text: vocabulary entries, their numbers and weights, the heaviest first."""

    def fields(llm: LLM, answered: Answered, index: int) -> Mapping[str, object]:
        row = _row(answered, index)
        ids, weights = np.asarray(row["sparse_indices"]), np.asarray(row["sparse_values"])
        order = np.argsort(-weights, kind="stable")
        ids, weights = ids[order], weights[order]
        return {"tokens": llm.engine.token_strings(ids.tolist()), "indices": ids, "values": weights}

    asked = {"prompt_name": prompt_name, "input_type": input_type}
    _answer("sparse", fields, texts, given, options, **asked)


@with_options(Settings)
@_with_given
def rerank(
    query: Annotated[str, typer.Argument(help="What is looked for.")],
    documents: Documents = None,
    top_n: Annotated[int | None, typer.Option("--top-n", "-n", min=1, help="Write the best so many alone.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What makes a document fit, for models that read one.")
    ] = None,
    prune: Annotated[
        float | None,
        typer.Option(help="Write too what is left of each text by this threshold, 0 to 1, for models that prune."),
    ] = None,
    *,
    given: _Given,
    options: dict[str, object],
) -> None:
    """Write documents from the best to the worst for a query: score, index from 0, and text."""
    with contextlib.ExitStack() as stack:
        found = given.all(documents, stack)
        llm = stack.enter_context(_opened(given.model, options))
        stream = stack.enter_context(files.output_stream(given.output))
        outputs = [one.outputs for one in llm.score(query, found, instruction=instruction, prune=prune)]
        scores = np.array([one.score for one in outputs])
        for index in np.argsort(-scores, kind="stable")[:top_n].tolist():
            line = {"score": scores[index], "index": index, "text": found[index]}
            one = outputs[index]
            _write_line(
                stream, line if prune is None else {**line, "pruned": one.pruned, "compression": one.compression}
            )


@with_options(Settings)
@_with_given
def similarity(
    texts: Texts = None,
    prompt_name: files.PromptName = None,
    dimensions: files.Dimensions = None,
    *,
    given: _Given,
    options: dict[str, object],
) -> None:
    """Write how alike texts are: for each its text and the cosine with every text, in order."""
    with contextlib.ExitStack() as stack:
        found = given.all(texts, stack)
        if len(found) > _MOST_COMPARED:
            raise ConfigError(
                f"There are {len(found)} texts; similarity compares each with each, up to {_MOST_COMPARED}."
            )
        llm = stack.enter_context(_opened(given.model, options))
        stream = stack.enter_context(files.output_stream(given.output))
        from poolhouse.params import PoolingParams

        params = PoolingParams(dimensions=dimensions)
        rows = llm.embed_array(found, pooling_params=params, prompt_name=prompt_name)
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        for text, row in zip(found, rows, strict=True):
            _write_line(stream, {"text": text, "similarity": rows @ row})


def _named(labels: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in labels.split(",")) if labels else ()


def _answer(
    task: JobTask,
    fields: Fields,
    texts: Sequence[str] | None,
    given: _Given,
    options: dict[str, object],
    **asked: object,
) -> None:
    """A line for each text, by a task of jobs. asked: what all texts are asked with, see `Job`."""
    from poolhouse.jobs.asking import Asker
    from poolhouse.jobs.job import Job
    from poolhouse.jobs.source import Place, Row
    from poolhouse.llm.calls import read_ahead

    with contextlib.ExitStack() as stack:
        inputs = given.opened(texts, stack)
        llm = stack.enter_context(_opened(given.model, options))
        asker = Asker(llm.engine, Job((given.source,), Path(), tasks=(task,), **asked))  # type: ignore[arg-type]
        stream = stack.enter_context(files.output_stream(given.output))
        progress = stack.enter_context(files.progress_bar(inputs))

        def groups() -> Iterator[Any]:
            for numbers, group in inputs.groups(_AT_ONCE):
                rows = [
                    Row(inputs.where, number, Place(), {"text": text})
                    for number, text in zip(numbers, group, strict=True)
                ]
                yield asker.ask(rows)

        count = 0
        for asked_rows, futures in read_ahead(llm.engine, groups(), lambda one: one.requests):
            answered, failed = asker.answered(asked_rows, futures)
            for one in failed[:1]:
                raise ConfigError(f"{inputs.unit} {one.row.number} of {inputs.where}: {one.reason}")
            for index, (row, cut) in enumerate(zip(answered.rows, answered.truncated, strict=True)):
                line = {"text": row.values["text"], **fields(llm, answered, index)}
                _write_line(stream, {**line, "truncated": True} if cut else line)
            count += len(answered.rows)
            progress.update(len(answered.rows))
        if not count:
            raise files.nothing_in(given.source)


def _row(answered: Answered, index: int) -> dict[str, Any]:
    return {column.name: column.values[index] for column in answered.columns}


def _opened(model: str | None, options: dict[str, object]) -> LLM:
    from poolhouse.llm import LLM

    return LLM(model, **options)


def _write_line(stream: IO[bytes], line: Mapping[str, object]) -> None:
    stream.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
