"""`poolhouse download` fetches models; `poolhouse models` says which ones are here, and how each would be served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

from poolhouse.errors import ConfigError, PoolhouseError
from poolhouse.models.files import hub

if TYPE_CHECKING:
    from poolhouse.models.plan import LoadPlan

DEMO = "demo"


def download(
    names: Annotated[list[str], typer.Argument(help=f"Hub ids, OWNER/NAME; or {DEMO}, the embedded default.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    download_dir: Annotated[str | None, typer.Option(help="Cache to use instead of Hugging Face's own.")] = None,
    hf_token: Annotated[str | None, typer.Option(help="For gated and private models; else HF_TOKEN.")] = None,
    variant: Annotated[str | None, typer.Option(help="Of the weights, such as fp16.")] = None,
) -> None:
    """Fetch models, once, and print the folder of each. Later commands then need no network."""
    for name in names:
        if name == DEMO:
            print(hub.install_embedded())
            continue
        if Path(name).expanduser().exists():
            raise ConfigError(f"{name} is here already; models of the hub are named OWNER/NAME.")
        print(hub.locate(name, revision=revision, download_dir=download_dir, token=hf_token, variant=variant))


def models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Folders or hub ids; none: all of the cache, and the embedded one.")
    ] = None,
    download_dir: Annotated[str | None, typer.Option(help="Cache to use instead of Hugging Face's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object per model.")] = False,
) -> None:
    """Print which models are here, and how each would be served; no weights are read.

    `poolhouse check MODEL` says more of one, and tries it.
    """
    rows = list(_rows(names, download_dir))
    if as_json:
        for row in rows:
            print(orjson.dumps(row).decode())
        return
    if not rows:
        print(
            "There is no model here: `poolhouse download OWNER/NAME` fetches one, `poolhouse download demo` the default."
        )
        return
    table = Table(box=None, pad_edge=False)
    columns = ("model", "served by", "role", "pooling", "size")
    for title in columns:
        table.add_column(title, overflow="fold", justify="right" if title == "size" else "left")
    for row in rows:
        if "error" in row:
            table.add_row(row["model"], f"not served: {row['error']}", "", "", _megabytes(row["bytes"]))
        else:
            table.add_row(row["model"], row["runner"], row["role"], row.get("pooling", ""), _megabytes(row["bytes"]))
    Console(soft_wrap=not Console().is_terminal).print(table)


def _rows(names: Sequence[str] | None, download_dir: str | None) -> Iterator[dict[str, Any]]:
    """What is known of each model, by its files."""
    from poolhouse.models.plan import LoadOptions, decide

    for name, folder in _here(names, download_dir):
        row: dict[str, Any] = {"model": name, "folder": str(folder), "bytes": _weights_bytes(folder)}
        if not row["bytes"]:
            yield row | {"error": "its weights are not here."}
            continue
        try:
            plan: LoadPlan = decide(folder, LoadOptions(name, device="cpu"))
            yield row | plan.described()
        except (PoolhouseError, OSError) as error:
            yield row | {"error": str(error)}


def _here(names: Sequence[str] | None, download_dir: str | None) -> Iterator[tuple[str, Path]]:
    """Models that are on this machine, or those of these names."""
    if names:
        for name in names:
            if name == DEMO:
                yield hub.NAME, hub.embedded_model()
            else:
                yield name, hub.locate(name, download_dir=download_dir)
        return
    embedded = hub.find_embedded()
    if embedded is not None:
        yield hub.NAME, embedded
    yield from hub.cached(download_dir)


def _weights_bytes(folder: Path) -> int:
    """Of the files that hold weights, those of one format."""
    if folder.is_file():
        return folder.stat().st_size
    for pattern in ("*.safetensors", "*.bin"):
        found = sum(path.stat().st_size for path in folder.rglob(pattern))
        if found:
            return found
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
