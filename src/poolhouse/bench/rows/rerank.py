"""Rerank: one query and a hundred documents, by a cross-encoder, a ColBERT, and a causal model whose prompts share a beginning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from poolhouse.bench.measure import Bench, Crew, Side, find_settings, llm_options
from poolhouse.bench.report import Goal, Report, Row
from poolhouse.bench.shapes import Written, checkpoint
from poolhouse.bench.sides import US, SideProcess, our_side, peer_side
from poolhouse.data import passages, short_texts
from poolhouse.settings import Settings

# Tokens of a causal reranker's query.
QUERY_TOKENS = (20, 200, 1000)
KINDS = {"cross-encoder": "minilm-reranker", "colbert": "minilm-colbert", "causal": "qwen3-reranker-small"}
_QUERY = "why does the sea rise and fall twice a day"
_ALONE = f"{US} without sharing"


def rerank(bench: Bench, kinds: Sequence[str], shape: str | None, command: str) -> Report:
    """Seconds per query of all sides in turn; `bench.texts` documents. shape: instead of the kind's own."""
    rows: list[Row] = []
    notes = bench.missing("sentence-transformers", "PyLate")
    for kind in kinds:
        written = checkpoint(shape or KINDS[kind], bench.cache, bench.layers)
        for dtype in bench.possible_types(notes):
            if kind == "causal":
                rows += [_row(bench, written, kind, dtype, size) for size in QUERY_TOKENS]
            else:
                rows.append(_row(bench, written, kind, dtype))
    return bench.report(command, rows, None, notes)


def _row(bench: Bench, written: Written, kind: str, dtype: str, size: int = 0) -> Row:
    """A row of one kind. size: tokens of the query of a causal reranker."""
    query, work, goal = _QUERY, f"1 query x {bench.texts} documents", Goal(least=1.4)
    documents = bench.corpus
    if kind == "causal":
        query, documents = _query(size), short_texts(bench.texts, 20, 60)
        work = f"query of {size} tokens x {bench.texts} documents of 40 words"
        goal = Goal(_ALONE, 2.0) if size == 200 else Goal(_ALONE, 1.0)
    elif kind == "colbert":
        work += ", encoding and MaxSim"
        goal = Goal("PyLate" if "PyLate" in bench.libraries else "best", 1.5)
    with Crew(bench.progress) as crew:
        _add_sides(bench, crew, written, dtype)
        asked: dict[str, Any] = {"query": query, "documents": documents}
        find_settings(crew, "rerank", query=query, documents=documents[: max(8, len(documents) // 4)])
        scores: dict[str, list[float]] = {}

        def seconds(side: Side) -> list[float]:
            done = side.process.do("rerank", **asked, **side.setting)
            scores[side.name] = done["scores"]
            return [done["seconds"]]

        values = crew.rounds(bench.rounds, seconds, f"{written.name}, {dtype}")
        reference = next((name for name in scores if US not in name), US)
        found = {name: _agreement(own, scores[reference]) for name, own in scores.items()}
        sides = crew.figures(values, 0, found)
        notes = (*crew.notes, f"The cosine is that of the scores, centred, with those of {reference}.")
        return Row("rerank", f"{kind}, {work}", written.title, dtype, "s", sides, False, goal, notes=notes)


def _agreement(scores: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Correlation of the scores, for one query."""
    one, other = (np.asarray(values) - np.mean(values) for values in (scores, reference))
    cosine = float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-12))
    return cosine, cosine


def _add_sides(bench: Bench, crew: Crew, written: Written, dtype: str) -> None:
    model, kind, options = str(written.folder), written.kind, llm_options(dtype)
    crew.add(US, lambda: SideProcess(US, our_side(model, **options)), needed=True)
    if kind == "causal" and "prefix_sharing" in Settings.model_fields:
        command = our_side(model, **options, prefix_sharing=False)
        crew.add(_ALONE, lambda: SideProcess(_ALONE, command), needed=True)
    for library in ("sentence-transformers", "PyLate"):
        if library not in bench.libraries or dtype == "int8" or (library == "PyLate") > (kind == "colbert"):
            continue
        if kind == "colbert" and dtype != "float32":
            continue
        python, version = bench.libraries[library]
        name = f"{_NAMES.get(kind, library) if library != 'PyLate' else library} {version}"
        peer = peer_side(python, library, model, dtype=dtype, kind=kind)
        crew.add(name, lambda name=name, peer=peer: SideProcess(name, peer))  # type: ignore[misc]


# What of sentence-transformers' environment runs a kind.
_NAMES = {"rerank": "CrossEncoder", "colbert": "MultiVectorEncoder", "causal": "the card's code"}


def _query(tokens: int) -> str:
    """Words of the corpus that make about so many tokens: a word is one and a quarter."""
    words = " ".join(passages()).split()
    return " ".join(words[place % len(words)] for place in range(round(tokens / 1.25)))
