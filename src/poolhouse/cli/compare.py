"""`poolhouse compare A B`: how far two models, or two types of one, agree about texts, and which is quicker."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import orjson
import typer
from rich.console import Console
from rich.table import Table

from poolhouse.cli import texts as files
from poolhouse.cli.options import with_options
from poolhouse.data import passages, queries
from poolhouse.errors import ConfigError
from poolhouse.settings import Settings

if TYPE_CHECKING:
    from poolhouse.llm import LLM
    from poolhouse.outputs import Array

# What may stand behind `@`.
_TYPES: dict[str, dict[str, object]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int8": {"quantization": "int8"},
}
# Each with each is compared.
_MOST = 2000
_NEIGHBOURS = 10
_ROUNDS = 5


@with_options(Settings)
def compare(
    first: Annotated[
        str, typer.Argument(metavar="A", help=f"Folder or hub id, and a type if need be: MODEL@{', @'.join(_TYPES)}.")
    ],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one; @TYPE alone: A in that type.")],
    texts: Annotated[
        str | None, typer.Option("--texts", "-i", help="A file of texts, as `embed --input` reads them; none: ours.")
    ] = None,
    input_format: files.InputFormat = None,
    column: files.Column = None,
    prompt_name: files.PromptName = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each reads the texts, in turn.")] = _ROUNDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    *,
    options: dict[str, object],
) -> None:
    """Print how far A and B agree about texts: cosines, ranks, nearest neighbours; and texts per second of each.

    Cosines of vectors mean something for two types, or a model and its quantised twin; ranks and neighbours for any two.
    """
    names = (first, first.partition("@")[0] + second if second.startswith("@") else second)
    with contextlib.ExitStack() as stack:
        if texts is None:
            found = [*queries(), *passages()]
        else:
            found = [text for _, text in files.opened(texts, input_format, column, stack).numbered]
        if not 3 <= len(found) <= _MOST:
            raise ConfigError(
                f"--texts has {len(found)} texts; compare takes 3 to {_MOST}, each is compared with each."
            )
        from poolhouse.llm import LLM

        models = [stack.enter_context(LLM(model, **{**options, **kind})) for model, kind in map(_read, names)]
        for name, llm in zip(names, models, strict=True):
            if "embed" not in llm.engine.facts.tasks:
                tasks = ", ".join(llm.engine.facts.tasks)
                raise ConfigError(
                    f"{name} gives no vector per text, so there is nothing to compare. Its tasks: {tasks}."
                )
        vectors, rates = _measured(models, found, prompt_name, rounds)
    report = {"a": names[0], "b": names[1], "texts": len(found), **_agreement(*vectors)}
    report |= {"a_texts_per_second": rates[0], "b_texts_per_second": rates[1], "b_is_quicker_by": rates[1] / rates[0]}
    if as_json:
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in report.items():
        shown = f"{value:.4f}" if isinstance(value, float) and abs(value) <= 1 else value
        table.add_row(f"{name.replace('_', ' ')}:", f"{shown:.4g}" if isinstance(shown, float) else str(shown))
    Console(soft_wrap=True).print(table)


def _read(name: str) -> tuple[str, dict[str, object]]:
    """MODEL@TYPE: the model, and the options of the type. `@` may be a part of a folder's name."""
    model, at, kind = name.rpartition("@")
    if at and kind in _TYPES and not Path(name).exists():
        return model, _TYPES[kind]
    return name, {}


def _measured(
    models: list[LLM], texts: list[str], prompt_name: str | None, rounds: int
) -> tuple[list[Array], list[float]]:
    """The vectors of each, of length 1, and texts per second: medians of rounds in turn, behind one that does not count."""
    vectors = [llm.embed_array(texts, prompt_name=prompt_name, use_tqdm=False) for llm in models]
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds):
        for llm, own in zip(models, seconds, strict=True):
            began = time.perf_counter()
            llm.embed_array(texts, prompt_name=prompt_name, use_tqdm=False)
            own.append(time.perf_counter() - began)
    lengths = [np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in vectors]
    unit = [(rows / length).astype(np.float32) for rows, length in zip(vectors, lengths, strict=True)]
    return unit, [len(texts) / statistics.median(own) for own in seconds]


def _agreement(a: Array, b: Array) -> dict[str, Any]:
    """cosine: of both vectors of a text, where they are of one length. rank_correlation: Spearman's, of the similarities
    of all pairs of texts. neighbours: the share of each text's nearest ones that both name."""
    found: dict[str, Any] = {}
    if a.shape == b.shape:
        cosines = (a * b).sum(1)
        found |= {"lowest_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
    similar = [rows @ rows.T for rows in (a, b)]
    above = np.triu_indices(len(a), 1)
    ranks = [matrix[above].argsort().argsort().astype(np.float64) for matrix in similar]
    found["rank_correlation"] = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    count = min(_NEIGHBOURS, len(a) - 1)
    for matrix in similar:
        np.fill_diagonal(matrix, -np.inf)
    nearest = [np.argpartition(-matrix, count - 1, axis=1)[:, :count] for matrix in similar]
    shared = [len(np.intersect1d(one, other)) for one, other in zip(*nearest, strict=True)]
    found[f"shared_of_{count}_neighbours"] = float(np.mean(shared)) / count
    return found
