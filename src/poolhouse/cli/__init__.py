"""The command line: `poolhouse serve | embed | calibrate | check | bench`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; what goes wrong is said in one line."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve"]:
        from poolhouse.cli import process

        process.begin(arguments)
    # This takes a second.
    from poolhouse.cli.commands import run

    run(arguments)


__all__ = ["main"]
