"""Latency: one query at a time, in Python and over HTTP; on a quiet machine, beside busy loops, with half the cores."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product

import numpy as np

from poolhouse.bench.machine import cores
from poolhouse.bench.measure import (
    Bench,
    Crew,
    Side,
    add_embedders,
    agreement,
    ceiling_of,
    noted,
    reference_vectors,
)
from poolhouse.bench.report import Ceilings, Goal, Report, Row, SideFigures
from poolhouse.bench.servers import BusyLoops, ServerProcess, missing_servers, our_server, peer_servers
from poolhouse.bench.shapes import Written, checkpoint
from poolhouse.bench.sides import US
from poolhouse.data import passages
from poolhouse.errors import EngineError

# In MiniLM's tokens: 9 and 32, special ones included.
QUERIES = {"7 words": "what is the capital of france today", "32 tokens": ""}
# What the machine does meanwhile.
CONDITIONS = {"quiet": "", "busy": "as many busy loops as cores", "half": "half the cores"}
# How many times better than the best peer.
_LEAST = {"quiet": 1.0, "busy": 0.8, "half": 0.8}
_RUNS, _SECONDS = 100, 1.5
_PERCENTILES = (50, 95)
_HTTP = f"{US} over HTTP"


def latency(bench: Bench, shapes: Sequence[str], conditions: Sequence[str], command: str) -> Report:
    """Milliseconds of one query, by all sides in turn."""
    rows: list[Row] = []
    notes = bench.missing("sentence-transformers", "ONNX Runtime", "OpenVINO") + missing_servers(bench)
    ceilings = Ceilings({}, {})
    types = bench.possible_types(notes)
    for shape in shapes:
        written = checkpoint(shape, bench.cache, bench.layers)
        reference = reference_vectors(bench, written)
        for dtype in types:
            for condition in conditions:
                try:
                    rows += _rows(bench, written, dtype, condition, reference, ceilings)
                except EngineError as error:
                    if dtype == "float32":
                        raise
                    notes.append(f"{shape} in {dtype} is left out: {error}")
    return bench.report(command, rows, ceilings, notes)


def texts_of_queries() -> dict[str, str]:
    """The two queries: seven words, and the words of the corpus that make 32 tokens of MiniLM."""
    from tokenizers import Tokenizer

    from poolhouse.models.files.hub import embedded_model

    tokenizer = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    tokenizer.no_padding()
    words = " ".join(passages()).split()
    pieces = (" ".join(words[begin : begin + count]) for begin in range(100) for count in range(20, 31))
    return QUERIES | {"32 tokens": next(text for text in pieces if len(tokenizer.encode(text).ids) == 32)}


def _rows(
    bench: Bench,
    written: Written,
    dtype: str,
    condition: str,
    reference: tuple[object, list[str], str],
    ceilings: Ceilings,
) -> list[Row]:
    mine = cores()
    half = mine[: max(1, len(mine) // 2)] if condition == "half" else None
    queries = texts_of_queries()
    with Crew(bench.progress) as crew, ceiling_of(written, dtype) as ceiling:
        add_embedders(bench, crew, written, dtype, half)
        model = str(written.folder)
        for service in (our_server(model, dtype, name=_HTTP), *peer_servers(bench, model, dtype)):
            name = service.name
            crew.add(name, lambda service=service: ServerProcess(service, half), needed=name == _HTTP)  # type: ignore[misc]
        found = _agreement(crew, reference)
        outside: dict[str, list[float]] = {name: [] for name in queries}
        values: dict[str, dict[str, list[list[float]]]] = {name: {} for name in queries}
        for number in range(1, bench.rounds + 1):
            if condition == "quiet":
                ceiling.reading()
                for name, text in queries.items():
                    outside[name].append(crew.sides[0].process.do("outside", text=text, runs=_RUNS)["ms"])
            with BusyLoops(len(mine)) if condition == "busy" else nullcontext():
                for name, text in queries.items():
                    what = f"{written.name}, {dtype}, {condition}, {name}, {number} of {bench.rounds}"
                    figures = crew.rounds(1, lambda side, text=text: _percentiles(side, text), what)  # type: ignore[misc]
                    for side, own in figures.items():
                        kept = values[name].setdefault(side, [[] for _ in own])
                        for place, one in enumerate(own):
                            kept[place] += one
        noted(ceilings, ceiling)
        floor = ceiling.megabytes / ceiling.best["reading"] if "reading" in ceiling.best else None
        limit = floor if condition == "quiet" else None

        def row(query: str, percent: int, who: str) -> Row:
            way = ["HTTP"] if who == _HTTP else []
            while_what = [CONDITIONS[condition]] if CONDITIONS[condition] else []
            work = ", ".join([f"one query of {query}", *way, *while_what, f"p{percent}"])
            sides = _ordered(crew, values[query], _PERCENTILES.index(percent), found, who)
            goal = Goal(least=_LEAST[condition])
            weights = f"Reading the {ceiling.megabytes:.0f} MB of weights"
            notes = tuple(crew.notes)
            return Row("latency", work, written.title, dtype, "ms", sides, False, goal, limit, weights, notes)

        rows = [row(*one) for one in product(queries, _PERCENTILES, (US, _HTTP))]
        if condition == "quiet":
            rows += [_outside(written, dtype, name, spent, crew) for name, spent in outside.items()]
        return rows


def _percentiles(side: Side, text: str) -> list[float]:
    times = side.process.do("latency", text=text, runs=_RUNS, seconds=_SECONDS)["ms"]
    return [float(value) for value in np.percentile(times, _PERCENTILES)]


def _agreement(crew: Crew, reference: tuple[object, list[str], str]) -> dict[str, tuple[float, float]]:
    """Of the sides that are libraries; servers run the same models."""
    vectors, texts, _ = reference
    servers = [side for side in crew.sides if isinstance(side.process, ServerProcess)]
    crew.sides = [side for side in crew.sides if side not in servers]
    found = agreement(crew, vectors, texts)
    crew.sides += servers
    return found


def _ordered(
    crew: Crew, values: dict[str, list[list[float]]], place: int, found: dict[str, tuple[float, float]], first: str
) -> tuple[SideFigures, ...]:
    """The figures of all sides, this one of ours first."""
    sides = crew.figures(values, place, found)
    return tuple(sorted(sides, key=lambda side: side.name != first))


def _outside(written: Written, dtype: str, name: str, values: list[float], crew: Crew) -> Row:
    work = f"one query of {name}, time outside the model, p50"
    ours = crew.sides[0].figures(values, {})
    return Row("latency", work, written.title, dtype, "ms", (ours,), higher=False, goal=Goal(None, most=0.3))
