"""The commands, and how what goes wrong is told."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer

import poolhouse
from poolhouse.cli import bench, calibrate, check, embed, serve
from poolhouse.cli.options import Written, arranged, as_typed, join_dotted, on_the_line, spelled
from poolhouse.errors import ConfigError, PoolhouseError
from poolhouse.settings import MEANINGLESS

app = typer.Typer(
    name="poolhouse",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("serve")(serve.serve)
app.command("embed")(embed.embed)
app.command("calibrate")(calibrate.calibrate)
app.command("check")(check.check)
app.add_typer(bench.bench, name="bench")


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"poolhouse {poolhouse.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An inference engine and server for pooling models."""


def run(given: Sequence[str]) -> None:
    """Run the command of these arguments; what goes wrong is said in one line, with options as they were typed."""
    arguments = list(given)
    typed = as_typed(arguments)
    options = _options_of(arguments, typed)
    # A warning is for the user; where in our code it was raised is not.
    warnings.formatwarning = lambda message, *_, **__: f"poolhouse: {spelled(str(message), options)}\n"
    # Here former words are a person's, whom Python would tell nothing of them.
    warnings.filterwarnings("default", r".* was re(nam|mov)ed; use ", DeprecationWarning)
    try:
        arguments = join_dotted(arguments)
        if arguments[:1] == ["serve"]:
            arguments[1:] = arranged(arguments[1:])
            # What goes wrong names options already as they were written there, on the line or elsewhere.
            options = {}
        else:
            _let_signals_end()
        if arguments[:1] == ["bench"]:
            arguments[1:] = bench.name_comparison(arguments[1:])
        app(arguments, obj=typed)
    except PoolhouseError as error:
        print(f"poolhouse: {spelled(str(error), options)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        print(f"poolhouse: {error}", file=sys.stderr)
        sys.exit(1)


def _options_of(arguments: Sequence[str], typed: Mapping[str, str]) -> dict[str, Written]:
    """The options of the command that a line names, by their names in Python."""
    command: Any = typer.main.get_command(app)
    for word in arguments:
        command = getattr(command, "commands", {}).get(word, command)
    long = {
        parameter.name: name
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--") and parameter.name
    }
    names = {name: typed.get(name, written) for name, written in long.items()}
    return on_the_line({*names, *MEANINGLESS}, names)


def _let_signals_end() -> None:
    """Let a command that is told to stop tidy up first, as it does when interrupted; `serve` stops in its own way."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        # Windows has no SIGHUP; who runs a command under nohup wants it ignored.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


__all__ = ["app", "run"]
