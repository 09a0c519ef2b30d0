"""`poolhouse check`: what a model is, who serves it, and how far it is from a reference library."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from poolhouse.cli.options import with_options
from poolhouse.errors import CheckpointError
from poolhouse.inputs.chat import SEAM
from poolhouse.settings import Settings

if TYPE_CHECKING:
    from poolhouse.llm import LLM

# Below this cosine to the reference a model must not be trusted.
_LEAST_COSINE = 0.9999


@with_options(Settings)
def check(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; none: the embedded default.")] = None,
    reference: Annotated[bool, typer.Option(help="Compare with sentence-transformers where it is installed.")] = True,
    *,
    options: dict[str, Any],
) -> None:
    """Print a model's facts and pipelines, and compare it with the reference library."""
    from poolhouse.llm import LLM

    console = Console(soft_wrap=True)
    options.setdefault("overflow", "truncate")
    with LLM(model, **options) as llm:
        console.print(_facts(llm))
        if not reference:
            return
        if "embed" not in llm.model.tasks:
            console.print("No reference: vectors of embedders are compared only.")
            return
        if find_spec("sentence_transformers") is None:
            console.print("No reference: sentence-transformers is not installed.")
            return
        if "modules.json" not in _files(llm):
            console.print(
                "No reference: the checkpoint has no modules.json, so sentence-transformers would guess its pooling."
            )
            return
        cosine, difference, count = _compare(llm)
    console.print(
        f"Against sentence-transformers on {count} texts: lowest cosine {cosine:.7f}, largest difference {difference:.1e}."
    )
    if cosine < _LEAST_COSINE:
        raise CheckpointError(f"The vectors differ from the reference: cosine {cosine:.6f} is below {_LEAST_COSINE}.")


def _facts(llm: LLM) -> Table:
    facts = llm.model.facts
    table = Table(show_header=False, box=None, pad_edge=False)
    sizes = facts.matryoshka
    matryoshka = "no"
    if sizes.supported:
        matryoshka = ", ".join(map(str, sizes.dimensions)) if sizes.dimensions else f"any up to {sizes.width}"
    rows = {
        "model": facts.name,
        "architecture": facts.architecture,
        "served by": facts.served_by,
        "parameters": f"{facts.parameters:,}",
        "dtype, device": f"{str(facts.dtype).removeprefix('torch.')}, {facts.device}",
        "longest prompt": f"{facts.max_tokens} tokens",
        "vector": f"{facts.width} numbers",
        "matryoshka": matryoshka,
        "prompts": ", ".join(facts.prompts) or "none",
    }
    template = llm.engine.score_template
    if template is not None:
        rows["score template"] = template.name
        rows["a pair becomes"] = repr(template.render("QUERY", "DOCUMENT").replace(SEAM, ""))
    for task, pipeline in llm.model.pipelines.items():
        rows[task] = pipeline.words
    for index, note in enumerate(facts.notes):
        rows[f"note {index + 1}"] = note
    for name, value in rows.items():
        table.add_row(f"{name}:", value)
    return table


def _files(llm: LLM) -> set[str]:
    from pathlib import Path

    return {path.name for path in Path(llm.model.facts.path).iterdir()}


def _compare(llm: LLM) -> tuple[float, float, int]:
    """Lowest cosine, largest difference between entries, number of texts."""
    from sentence_transformers import SentenceTransformer

    from poolhouse.data import passages, queries

    texts = [*queries(), *passages()]
    facts = llm.model.facts
    theirs = SentenceTransformer(
        facts.path, device=str(facts.device), trust_remote_code=llm.settings.trust_remote_code
    ).encode(texts, show_progress_bar=False)
    ours = llm.embed_array(texts, use_tqdm=False)
    cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    return float(cosine.min()), float(np.abs(ours - theirs).max()), len(texts)
