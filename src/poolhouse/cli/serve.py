"""`poolhouse serve`: the HTTP server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from poolhouse.cli.options import extra_options, with_options
from poolhouse.settings import ServerSettings, Settings


@with_options(Settings, ServerSettings)
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder or hub id; none: the embedded default.")] = None,
    *,
    options: dict[str, Any],
) -> None:
    """Serve a model over HTTP until stopped."""
    from poolhouse.engine.open import open_engine
    from poolhouse.server.run import serve as run

    options |= extra_options(context.args)
    server = ServerSettings.parse(
        **{name: options.pop(name) for name in list(options) if name in ServerSettings.model_fields}
    )
    settings = Settings.parse(model=model, **options)
    run([open_engine(settings)], server)
