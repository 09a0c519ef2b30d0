"""`poolhouse calibrate`: measures the ranges of a model's vectors, for int8 and uint8."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from poolhouse.cli import texts
from poolhouse.cli.options import Model, with_options
from poolhouse.files import whole_file
from poolhouse.params import PoolingParams
from poolhouse.settings import Settings
from poolhouse.tasks import Task
from poolhouse.vectors.precision import Calibration

# Fewer vectors do not show how far the values of others reach.
_FEW = 1000


@with_options(Settings)
def calibrate(
    model: Model = None,
    source: texts.Input = "-",
    input_format: texts.InputFormat = None,
    column: texts.Column = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write, for the option int8_calibration.")
    ] = Path("ranges.safetensors"),
    prompt_name: texts.PromptName = None,
    dimensions: texts.Dimensions = None,
    *,
    options: dict[str, object],
) -> None:
    """Write the least and the largest value of each dimension, over the vectors of texts like those to come.

    Blank texts are left out.
    """
    texts.refuse_same_file(source, output)
    calibration: Calibration | None = None
    count = 0
    with contextlib.ExitStack() as stack:
        inputs = texts.opened(source, input_format, column, stack)
        part = stack.enter_context(whole_file(output))
        from poolhouse.llm import LLM
        from poolhouse.llm.requests import CallOptions

        llm = stack.enter_context(LLM(model, **options))
        task: Task = "embed" if "embed" in llm.engine.facts.tasks else "token_embed"
        call_options = CallOptions(PoolingParams(dimensions=dimensions), prompt_name)
        progress = stack.enter_context(texts.progress_bar(inputs))
        for group, answers in texts.answered(llm, inputs.without_blanks(), task, call_options):
            vectors = np.vstack([answer.array for answer in answers])
            found = Calibration.of(vectors)
            calibration = found if calibration is None else calibration.joined(found)
            count += len(vectors)
            progress.update(len(group))
        if calibration is None:
            raise texts.nothing_in(source)
        calibration.save(part)
    few = "" if count >= _FEW else f" More than {_FEW} would show better how far values reach."
    print(f"{output}: {calibration.width} ranges of {count} vectors.{few}", file=sys.stderr)
