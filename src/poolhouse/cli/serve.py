"""`poolhouse serve`: the HTTP server."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from poolhouse.cli.options import with_options
from poolhouse.settings import ServerSettings, Settings


@with_options(Settings, ServerSettings)
def serve(
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; none: the embedded default.")] = None,
    other_options: Annotated[str, typer.Option(hidden=True)] = "{}",
    *,
    options: dict[str, Any],
) -> None:
    """Serve a model over HTTP until stopped."""
    from poolhouse.engine.open import open_engine
    from poolhouse.server.run import serve as run

    options |= json.loads(other_options)
    server = ServerSettings.parse(
        **{name: options.pop(name) for name in list(options) if name in ServerSettings.model_fields}
    )
    settings = Settings.parse(model=model, **options)
    run([open_engine(settings)], server)
