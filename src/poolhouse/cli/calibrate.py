"""`poolhouse calibrate`: the ranges of a model's vectors, for int8."""

from __future__ import annotations

import contextlib
import sys
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from poolhouse.cli import texts
from poolhouse.cli.options import with_options
from poolhouse.params import PoolingParams
from poolhouse.precision import Calibration
from poolhouse.settings import Settings

# Fewer vectors do not show how far the values of others reach.
_FEW = 1000


@with_options(Settings)
def calibrate(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; none: the embedded default.")] = None,
    source: Annotated[
        str, typer.Option("--input", "-i", help="A file with a text per line; - is standard input.")
    ] = "-",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write, for the option int8_calibration.")
    ] = Path("ranges.safetensors"),
    prompt_name: Annotated[str | None, typer.Option(help="A prompt stored with the checkpoint.")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Length of the vectors, for Matryoshka models.")] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Write the least and the largest value of each dimension, over the vectors of texts like those to come."""
    from tqdm import tqdm

    from poolhouse.llm import LLM

    params = PoolingParams(dimensions=dimensions)
    found: list[Calibration] = []
    count = 0
    with contextlib.ExitStack() as stack:
        lines = texts.lines(source, stack)
        llm = stack.enter_context(LLM(model, **options))
        task = "embed" if "embed" in llm.engine.tasks else "token_embed"
        progress = stack.enter_context(tqdm(unit=" texts", disable=None, dynamic_ncols=True))
        for group in texts.groups(lines):
            outputs = llm.encode(group, params, pooling_task=task, use_tqdm=False, prompt_name=prompt_name)
            vectors = np.vstack([output.outputs.array for output in outputs])
            found.append(Calibration.of(vectors))
            count += len(vectors)
            progress.update(len(group))
    if not found:
        raise texts.nothing_in(source)
    calibration = reduce(Calibration.joined, found)
    calibration.save(output)
    few = "" if count >= _FEW else f" More than {_FEW} would show better how far values reach."
    print(f"{output}: {calibration.width} ranges of {count} vectors.{few}", file=sys.stderr)
