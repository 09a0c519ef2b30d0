"""`poolhouse serve`: the HTTP server."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from poolhouse.cli.options import with_options
from poolhouse.cli.sources import gather
from poolhouse.settings import ServerSettings, Settings

if TYPE_CHECKING:
    from poolhouse.engine.engine import Engine


@with_options(Settings, ServerSettings)
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL", help="Folders or hub ids, chosen by `model` in requests; none: the embedded default."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="", help="YAML file of options; what stands here wins over it.")
    ] = None,
    other_options: Annotated[str, typer.Option(hidden=True)] = "{}",
    *,
    options: dict[str, Any],
) -> None:
    """Serve models over HTTP until stopped.

    Every option may also stand in the file of --config, or in the environment as POOLHOUSE_<OPTION>.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        # Shorter than `engine/cores.py` has it: threads of torch that wait for each other keep the event loop from running.
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    server, engines = gather(models or [], {**options, **json.loads(other_options)}, config, os.environ)
    from poolhouse.server.run import serve as run

    run(lambda: _open(engines), server)


def _open(all_settings: tuple[Settings, ...]) -> list[Engine]:
    """One engine after the other; where one cannot be had, none is left."""
    from poolhouse.engine.open import open_engine

    with ExitStack() as opened:
        engines = [opened.enter_context(open_engine(settings)) for settings in all_settings]
        opened.pop_all()
    return engines
