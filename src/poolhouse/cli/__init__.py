"""The command line: `poolhouse serve | embed | run | calibrate | check | bench | --version`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; an error becomes one line."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve"]:
        from poolhouse.cli import process

        process.begin(arguments)
    # This import takes a second.
    from poolhouse.cli.commands import run

    run(arguments)


__all__ = ["main"]
