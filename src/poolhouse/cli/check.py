"""`poolhouse check`: what a model is, who serves it, and how far it is from a reference library."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from poolhouse.cli.golden import Compared, compare, golden_values, measure
from poolhouse.cli.options import with_options
from poolhouse.data import passages, queries
from poolhouse.engine.request import Request
from poolhouse.errors import CheckpointError
from poolhouse.inputs.chat import SEAM
from poolhouse.inputs.prompts import Prompt
from poolhouse.params import PoolingParams
from poolhouse.settings import Settings

if TYPE_CHECKING:
    from poolhouse.llm import LLM

# Below this cosine to the reference a model must not be trusted.
_LEAST_COSINE = 0.9999
# Relative to the largest logit.
_LARGEST_LOGIT_DIFFERENCE = 1e-3


@with_options(Settings)
def check(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; none: the embedded default.")] = None,
    reference: Annotated[
        bool, typer.Option(help="Compare with published numbers, and sentence-transformers where it is installed.")
    ] = True,
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
        values = golden_values(llm.settings.model, llm.model.facts.path)
        if values:
            _judge(console, compare(values, measure(llm, values)), "published numbers")
        if find_spec("sentence_transformers") is None:
            console.print("No reference: sentence-transformers is not installed.")
            return
        compared = _compare(llm)
    if isinstance(compared, str):
        console.print(f"No reference: {compared}")
        return
    _judge(console, compared, "the reference's")


def _judge(console: Console, compared: Compared, whose: str) -> None:
    """Print what a comparison found.

    Raises:
        CheckpointError: too large a difference.
    """
    console.print(compared.words)
    if not compared.close:
        raise CheckpointError(f"The answers differ from {whose}. {compared.words}")


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
        **({"vector": f"{facts.width} numbers", "matryoshka": matryoshka} if "embed" in llm.engine.tasks else {}),
        **({"labels": _labels(llm)} if llm.engine.labels or llm.engine.label_names else {}),
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


def _labels(llm: LLM) -> str:
    names = llm.engine.label_names
    return ", ".join(names.values()) if names else f"{llm.engine.labels}, unnamed"


def _compare(llm: LLM) -> Compared | str:
    """The difference to sentence-transformers, or why there is nothing to compare with."""
    if "embed" in llm.engine.tasks:
        if not (Path(llm.model.facts.path) / "modules.json").is_file():
            return "the checkpoint has no modules.json, so sentence-transformers would guess its pooling."
        return _compare_vectors(llm)
    template = llm.engine.score_template
    if template is not None and not template.instruction_as_system:
        return f"sentence-transformers does not know the prompt of this model ({template.name})."
    if "classify" in llm.engine.tasks:
        return _compare_pairs(llm)
    return f"sentence-transformers has no {' or '.join(llm.engine.tasks)}."


def _compare_vectors(llm: LLM) -> Compared:
    from sentence_transformers import SentenceTransformer

    texts = [*queries(), *passages()]
    theirs = SentenceTransformer(**_loading(llm)).encode(texts, show_progress_bar=False)
    ours = llm.embed_array(texts, use_tqdm=False)
    cosines = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    lowest, largest = float(cosines.min()), float(np.abs(ours - theirs).max())
    words = (
        f"Against sentence-transformers on {len(texts)} texts: lowest cosine {lowest:.7f}, "
        f"largest difference {largest:.1e}."
    )
    return Compared(words, lowest >= _LEAST_COSINE)


def _compare_pairs(llm: LLM) -> Compared:
    """Logits of pairs beside those of a CrossEncoder."""
    import torch
    from sentence_transformers import CrossEncoder

    pairs = [(question, passage) for question in queries()[:4] for passage in passages()[:12]]
    theirs = CrossEncoder(**_loading(llm)).predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    prompts = [Prompt(question, pair=passage, template=llm.engine.score_template) for question, passage in pairs]
    raw = PoolingParams(use_activation=False)
    futures = llm.engine.submit([Request(prompt, "classify", raw) for prompt in prompts])
    ours = np.stack([future.result().array for future in futures])
    largest = float(np.abs(ours - theirs.reshape(ours.shape)).max())
    words = f"Against sentence-transformers on {len(pairs)} pairs: largest difference of a logit {largest:.1e}."
    return Compared(words, largest <= _LARGEST_LOGIT_DIFFERENCE * max(1.0, float(np.abs(theirs).max())))


def _loading(llm: LLM) -> dict[str, Any]:
    facts = llm.model.facts
    return {
        "model_name_or_path": facts.path,
        "device": str(facts.device),
        "trust_remote_code": llm.settings.trust_remote_code,
    }
