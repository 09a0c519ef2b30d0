"""`poolhouse bench`: speed, of this engine beside sentence-transformers and of any running server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from poolhouse.bench.compare import Report, compare
from poolhouse.cli import bench_serve
from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.whole_files import whole_file

bench = typer.Typer(
    help="Measure speed: `compare` this engine with sentence-transformers, or load a running server with `serve`.",
    epilog="`poolhouse bench` alone is `poolhouse bench compare`.",
    no_args_is_help=True,
)


_COMMANDS = ("compare", "serve")


def name_comparison(arguments: Sequence[str]) -> list[str]:
    """Arguments behind `bench` with `compare` put before them, where they name neither command nor ask for help.

    Raises:
        ConfigError: a first word that is nearly a command and no model of this machine.
    """
    first = arguments[0] if arguments else ""
    if first in (*_COMMANDS, "--help"):
        return list(arguments)
    if not first.startswith("-") and not Path(first).exists() and (near := did_you_mean(first, _COMMANDS)):
        raise ConfigError(f"No such command 'bench {first}'.{near}")
    return ["compare", *arguments]


@bench.command("compare")
def compare_command(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; none: the embedded default.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="How many ragged texts.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side is measured.")] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="Write the report here too.")] = None,
) -> None:
    """Measure throughput, latency and start-up beside sentence-transformers, in turn, each in its own process."""
    with Console(stderr=True).status("starting") as status:
        report = compare(model, texts, rounds, status.update)
    Console(soft_wrap=True).print(_table(report), *_words(report), sep="\n")
    if output is not None:
        with whole_file(output) as part:
            part.write_text(report.as_json() + "\n", encoding="utf-8")


bench.command("serve")(bench_serve.serve)


def _table(report: Report) -> Table:
    table = Table("measure", "unit")
    for heading in ("Poolhouse", "reference", "times better", "lowest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in report.figures:
        table.add_row(
            figure.name,
            figure.unit,
            f"{figure.ours:.2f}",
            f"{figure.theirs:.2f}",
            f"{figure.ratio:.2f}",
            f"{figure.lowest_ratio:.2f}",
        )
    return table


def _words(report: Report) -> list[str]:
    reached = 100 * report.figures[0].ours / report.ceiling_texts_per_second
    ceiling = (
        f"float32 matrix products here: {report.gemm_gflops:.0f} GFLOP/s by torch.mm, {report.prepacked_gflops:.0f} with "
        f"a prepacked weight; at the better rate the model's matrices alone would allow "
        f"{report.ceiling_texts_per_second:.0f} texts/s, and Poolhouse reaches {reached:.0f} % of that."
    )
    return [
        f"{report.texts} texts of {report.mean_tokens:.0f} tokens on average, {report.rounds} rounds, float32; medians.",
        f"The reference is sentence-transformers at its best batch size, {report.batch_size}; 'lowest' is the ratio of our worst round.",
        ceiling,
    ]
