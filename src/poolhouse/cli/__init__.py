"""The command line: `poolhouse serve | embed | calibrate | check | bench`."""

from __future__ import annotations

import signal
import sys
import warnings
from typing import NoReturn

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


def main() -> None:
    """Run the command line; what goes wrong is said in one line."""
    # A warning is for the user; where in our code it was raised is not.
    warnings.formatwarning = lambda message, *_, **__: f"poolhouse: {message}\n"
    # Here former words are a person's, whom Python would tell nothing of them.
    warnings.filterwarnings("default", r".* was re(nam|mov)ed; use ", DeprecationWarning)
    try:
        arguments = join_dotted(sys.argv[1:])
        if arguments[:1] == ["serve"]:
            arguments[1:] = arranged(arguments[1:])
        if arguments[:1] == ["bench"]:
            arguments[1:] = bench.name_comparison(arguments[1:])
        if arguments[:1] != ["serve"]:
            _let_signals_end()
        app(arguments)
    except PoolhouseError as error:
        print(f"poolhouse: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        print(f"poolhouse: {error}", file=sys.stderr)
        sys.exit(1)


def _let_signals_end() -> None:
    """Let a command that is told to stop tidy up first, as it does when interrupted; `serve` stops in its own way."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        # Windows has no SIGHUP; who runs a command under nohup wants it ignored.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


__all__ = ["app", "main"]
