"""The commands, and how what goes wrong is told."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import typer

from poolhouse.cli import bench, calibrate, check, embed, serve
from poolhouse.cli.arguments import arranged, join_dotted
from poolhouse.errors import ConfigError, PoolhouseError

app = typer.Typer(
    name="poolhouse",
    help="An inference engine and server for pooling models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("serve")(serve.serve)
app.command("embed")(embed.embed)
app.command("calibrate")(calibrate.calibrate)
app.command("check")(check.check)
app.add_typer(bench.bench, name="bench")


def run(given: Sequence[str]) -> None:
    """Run the command of these arguments; what goes wrong is said in one line."""
    # A warning is for the user; where in our code it was raised is not.
    warnings.formatwarning = lambda message, *_, **__: f"poolhouse: {message}\n"
    # Here former words are a person's, whom Python would tell nothing of them.
    warnings.filterwarnings("default", r".* was re(nam|mov)ed; use ", DeprecationWarning)
    try:
        arguments = join_dotted(given)
        if arguments[:1] == ["serve"]:
            arguments[1:] = arranged(arguments[1:])
        if arguments[:1] == ["bench"]:
            arguments[1:] = bench.name_comparison(arguments[1:])
        app(arguments)
    except PoolhouseError as error:
        print(f"poolhouse: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        print(f"poolhouse: {error}", file=sys.stderr)
        sys.exit(1)


__all__ = ["app", "run"]
