"""Commands: the table of them, and errors in one line, with options as they were typed."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from poolhouse.cli.options import Written, arranged, as_typed, join_dotted, on_the_line, spelled
from poolhouse.errors import ConfigError, PoolhouseError
from poolhouse.settings import MEANINGLESS
from poolhouse.version import __version__


def _print_version(requested: bool) -> None:
    if requested:
        print(f"poolhouse {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An inference engine and server for pooling models."""


# The module and the function, or the app, of each command, in the order in which --help lists them.
_COMMANDS = {
    "serve": "serve.serve",
    "embed": "embed.embed",
    "run": "jobs.run_job",
    "run-batch": "run_batch.run_batch",
    "rerank": "answers.rerank",
    "classify": "answers.classify",
    "ner": "answers.ner",
    "sparse": "answers.sparse",
    "similarity": "answers.similarity",
    "compare": "compare.compare",
    "models": "download.models",
    "download": "download.download",
    "calibrate": "calibrate.calibrate",
    "check": "check.check",
    "bench": "bench.bench",
}


def commands(first: str | None = None) -> typer.Typer:
    """The command line whose first argument is this: the command of that name alone, which starts sooner, else all."""
    names = [first] if first in _COMMANDS else [*_COMMANDS]
    app = typer.Typer(
        name="poolhouse", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=len(names) > 1
    )
    app.callback()(_root)
    for name in names:
        module, _, attribute = _COMMANDS[name].partition(".")
        command = getattr(import_module(f"poolhouse.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def run(arguments: Sequence[str]) -> None:
    """Run the command of these arguments; an error becomes one line, with options as they were typed."""
    arguments = list(arguments)
    typed = as_typed(arguments)
    if arguments[:1] == ["embed"] and any(argument.partition("=")[0] == "--out" for argument in arguments):
        # Whole files into a folder, which is a job.
        arguments[0] = "run"
    command_line = typer.main.get_command(commands(*arguments[:1]))
    options = _options_of(command_line, arguments, typed)
    # A warning is for the user; the line of our code that raised it is not.
    warnings.formatwarning = lambda message, *_, **__: f"poolhouse: {spelled(str(message), options)}\n"
    # Here former names were typed by a person, to whom Python would not show these warnings.
    warnings.filterwarnings("default", r".* was re(nam|mov)ed; use ", DeprecationWarning)
    try:
        arguments = join_dotted(arguments)
        if arguments[:1] == ["serve"]:
            arguments[1:] = arranged(arguments[1:])
            # Errors of `serve` name options already as they were written, on the line or elsewhere.
            options = {}
        else:
            _let_signals_end()
        if arguments[:1] == ["bench"]:
            from poolhouse.cli.bench import name_comparison

            arguments[1:] = name_comparison(arguments[1:])
        command_line(arguments, obj=typed)
    except PoolhouseError as error:
        print(f"poolhouse: {spelled(str(error), options)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except OSError as error:
        print(f"poolhouse: {error}", file=sys.stderr)
        sys.exit(1)


def _options_of(command: Any, arguments: Sequence[str], typed: Mapping[str, str]) -> dict[str, Written]:
    """The options of the command that a line names, by their names in Python."""
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument, command)
    long = {
        parameter.name: name
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--") and parameter.name
    }
    names = {name: typed.get(name, written) for name, written in long.items()}
    return on_the_line({*names, *MEANINGLESS}, names)


def _let_signals_end() -> None:
    """Let a command tidy up when it is stopped, as it does when interrupted; `serve` stops in its own way."""

    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        # Windows has no SIGHUP; who runs a command under nohup wants it ignored.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)


__all__ = ["commands", "run"]
