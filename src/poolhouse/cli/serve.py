"""`poolhouse serve` and `poolhouse.asgi`: the HTTP server, or its application for another server."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from poolhouse.cli import process
from poolhouse.cli.options import spelled, with_options
from poolhouse.cli.sources import Gathered, gather
from poolhouse.errors import ConfigError, PoolhouseError
from poolhouse.settings import ServerSettings, Settings, known_options, with_our_names

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from poolhouse.engine.interface import PoolingEngine
    from poolhouse.server.models_dir import Checkpoint, ModelsDir


@with_options(Settings, ServerSettings)
def serve(
    context: typer.Context,
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
    options: dict[str, object],
) -> None:
    """Serve models over HTTP until stopped.

    Every option may also stand in the file of --config, or in the environment as POOLHOUSE_<OPTION>.
    """
    options = {**options, **json.loads(other_options)}
    gathered = gather(models or [], options, config, os.environ, context.obj)
    server, engines, written = gathered.server, gathered.engines, gathered.written
    if server.log_format == "json":
        # `process.begin` reads a config file only roughly, and may have missed it.
        process.speak_json()
    from poolhouse.server.process.run import serve as run

    try:
        run(lambda: _open(engines), server, _models_dir(gathered))
    except PoolhouseError as error:
        error.args = (spelled(str(error), written),)
        raise


# Options of the process around an application, which then belongs to somebody else.
_OF_THE_PROCESS = (
    *("host", "port", "uds", "uds_mode", "log_level", "log_format", "enable_ssl_refresh"),
    *("header_timeout_seconds", "keep_alive_seconds", "reply_timeout_seconds"),
    *(name for name in ServerSettings.model_fields if name.startswith("ssl_")),
)


def asgi(
    model: str | Sequence[str] | None = None, *, config: str | os.PathLike[str] | None = None, **options: object
) -> ASGIApp:
    """The HTTP application for another server: uvicorn, gunicorn, Ray Serve, or mounted in an application of yours.

    model: a folder or hub id, or several; none takes the embedded default. config: a file as of `serve --config`. Options
    are those of `serve`, by keyword; those left out here may stand in that file, or in the environment.

    Models are loaded when the server starts, or at the first request under a server without the lifespan protocol; until
    then it may be pickled, and the process forked.

    Raises:
        ConfigError: an unknown option, a value that does not fit, or an option of the process, such as `port`.
    """
    for name in with_our_names(options):
        if name in _OF_THE_PROCESS:
            raise ConfigError(f"{name}: this is for the server that runs the application; give it to that one.")
    models = [model] if isinstance(model, str) else list(model or ())
    file = None if config is None else Path(config)
    as_in_python = {name: name for name in {*options, *known_options()}}
    gathered = gather(models, options, file, os.environ, as_in_python)
    from poolhouse.server.process.loading import hosted

    return hosted(partial(_open, gathered.engines), gathered.server, _models_dir(gathered))


def _models_dir(gathered: Gathered) -> ModelsDir | None:
    """The folders of models on demand, if there are such."""
    folders = tuple(Path(folder).expanduser() for folder in gathered.server.models_dir)
    if not folders:
        return None
    from poolhouse.server.models_dir import ModelsDir

    return ModelsDir(folders, gathered.shared, gathered.by_name, _open_one, _memory_of)


def _open_one(settings: Settings) -> PoolingEngine:
    from poolhouse.engine.replicas import start_engine

    return start_engine(settings)


def _memory_of(settings: Settings, checkpoint: Checkpoint) -> tuple[int, int]:
    from poolhouse.engine.open import memory_of

    return memory_of(settings, checkpoint.config, checkpoint.numbers, checkpoint.other_bytes)


def _open(all_settings: tuple[Settings, ...]) -> list[PoolingEngine]:
    """One engine after the other; where one cannot be opened, none stays open."""
    if not all_settings:
        return []
    from poolhouse.engine.replicas import start_engine

    engines: list[PoolingEngine] = []
    with ExitStack() as opened:
        for settings in all_settings:
            engines.append(engine := start_engine(settings))
            opened.callback(engine.close)
        opened.pop_all()
    return engines
