"""Throughput: texts of ragged lengths in one call, per shape and type, beside every library that embeds."""

from __future__ import annotations

from collections.abc import Sequence

from poolhouse.bench.measure import (
    Bench,
    Ceiling,
    Crew,
    Side,
    add_embedders,
    agreement,
    ceiling_of,
    find_settings,
    noted,
    reference_vectors,
)
from poolhouse.bench.report import Ceilings, Goal, Report, Row
from poolhouse.bench.shapes import Written, checkpoint
from poolhouse.errors import EngineError

_GOALS = {"float32": 1.6, "bfloat16": 2.5, "int8": 2.0}


def throughput(bench: Bench, shapes: Sequence[str], command: str) -> Report:
    """Texts per second of all sides, `bench.rounds` times in turn."""
    rows: list[Row] = []
    notes = bench.missing("sentence-transformers", "ONNX Runtime", "OpenVINO")
    ceilings = Ceilings({}, {})
    types = bench.possible_types(notes)
    for shape in shapes:
        written = checkpoint(shape, bench.cache, bench.layers)
        reference = reference_vectors(bench, written)
        for dtype in types:
            try:
                with Crew(bench.progress) as crew, ceiling_of(written, dtype) as ceiling:
                    add_embedders(bench, crew, written, dtype)
                    rows.append(_row(bench, crew, ceiling, written, reference))
                    noted(ceilings, ceiling)
            except EngineError as error:
                if dtype == "float32":
                    raise
                notes.append(f"{shape} in {dtype} is left out: {error}")
    return bench.report(command, rows, ceilings, notes)


def _row(bench: Bench, crew: Crew, ceiling: Ceiling, written: Written, reference: tuple[object, list[str], str]) -> Row:
    texts, dtype = bench.corpus, ceiling.dtype
    find_settings(crew, "throughput", texts=texts[: max(8, len(texts) // 4)])
    tokens = crew.sides[0].process.do("count", texts=texts)["tokens"]
    vectors, compared, of = reference
    found = agreement(crew, vectors, compared)

    def rate(side: Side) -> list[float]:
        return [len(texts) / side.process.do("throughput", texts=texts, **side.setting)["seconds"]]

    limits: list[float | None] = []
    what = f"{written.name}, {dtype}"
    values: dict[str, list[list[float]]] = {}
    for number in range(1, bench.rounds + 1):
        limits.append(ceiling.products())
        for name, figures in crew.rounds(1, rate, f"{what}, {number} of {bench.rounds}").items():
            values.setdefault(name, [[]])[0].extend(figures[0])
    work = 2e-9 * written.matrix_weights * tokens / len(texts)
    limit = limits[-1]
    return Row(
        "throughput",
        f"{len(texts)} ragged texts of {tokens / len(texts):.0f} tokens on average",
        written.title,
        dtype,
        "texts/s",
        crew.figures(values, 0, found),
        goal=Goal(least=_GOALS[dtype]),
        ceiling=None if limit is None else limit / work,
        ceiling_of=f"Products in {dtype}",
        notes=(*crew.notes, f"Cosines are to {of} in float32, {len(compared)} texts."),
    )
