"""`poolhouse bench serve`: load on any running server, or on servers that are started for it."""

from __future__ import annotations

import math
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from poolhouse.bench.load import BACKENDS, Load, LoadReport, run_load
from poolhouse.cli import texts as files
from poolhouse.data import ragged_texts, short_texts
from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.files import whole_file

# Above this share of a core the client slows what it measures.
_BUSY_CLIENT = 0.8


class Encoding(StrEnum):
    """How vectors come."""

    float = "float"
    base64 = "base64"


BaseUrl = Annotated[str | None, typer.Option(help="Where the server listens (http://127.0.0.1:8000).")]
BackendName = Annotated[str, typer.Option(help=f"The dialect and route: {', '.join(BACKENDS)}.")]
Endpoint = Annotated[str | None, typer.Option(help="Another path than the backend's own.")]
ModelName = Annotated[str | None, typer.Option(help="`model` of the bodies; none leaves it out.")]
ApiKey = Annotated[str | None, typer.Option(help="Sent as a bearer token.")]
Requests = Annotated[int, typer.Option("--num-requests", "--num-prompts", min=1, help="How many count.")]
Concurrency = Annotated[int, typer.Option("--concurrency", "--max-concurrency", min=1, help="Most requests in flight.")]
RequestRate = Annotated[
    float, typer.Option(help="Requests per second, at random times (Poisson); inf: each as soon as one is answered.")
]
Items = Annotated[
    int, typer.Option("--items-per-request", "--random-batch-size", min=1, help="Texts, or documents, of a request.")
]
Words = Annotated[str, typer.Option(help="Words of a text: a number, a range, or `ragged` as in `bench compare`.")]
Dataset = Annotated[
    Path | None,
    typer.Option("--dataset", "--dataset-path", help="A file of texts instead, as `embed --input` reads them."),
]
EncodingFormat = Annotated[Encoding, typer.Option("--encoding-format", help="How vectors come.")]
ExtraBody = Annotated[str | None, typer.Option("--extra-body", help="A JSON object of fields for every body.")]
Warmup = Annotated[int, typer.Option("--warmup", "--num-warmups", min=0, help="Requests beforehand that do not count.")]
Seed = Annotated[int, typer.Option(help="Of the texts and of the arrivals.")]
Percentiles = Annotated[str, typer.Option("--percentiles", "--metric-percentiles", help="Of the latency, with commas.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds after which a request has failed.")]


def load_one(load: Load, texts: list[str], shares: list[float], output: Path | None) -> None:
    """Load a running server, and print what came of it; ends with status 1 when every request failed."""
    report = LoadReport.of(load, run_load(load, texts), shares)
    Console(soft_wrap=True).print(_load_table(report), *_load_lines(report), sep="\n")
    if output is not None:
        with whole_file(output) as part:
            part.write_text(report.as_json() + "\n", encoding="utf-8")
    if not report.successes:
        raise typer.Exit(1)


def known_backend(backend: str) -> str:
    """The backend of this name; others are refused."""
    if backend not in BACKENDS:
        raise ConfigError(
            f"There is no backend {backend!r}; there are: {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )
    return backend


def path_of(endpoint: str | None) -> str | None:
    """The path with its slash."""
    return endpoint if endpoint is None or endpoint.startswith("/") else f"/{endpoint}"


def rate_of(rate: float) -> float | None:
    """A rate that is more than 0; None without an end."""
    if math.isnan(rate) or rate <= 0:
        raise ConfigError(f"--request-rate is {rate:g}; it must be more than 0, or inf.")
    return None if math.isinf(rate) else rate


def object_of(text: str | None) -> dict[str, object] | None:
    """The fields of a JSON object."""
    if text is None:
        return None
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"--extra-body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError('--extra-body must be a JSON object, such as {"dimensions": 64}.')
    return fields


def percentiles_of(text: str) -> list[float]:
    """Numbers from 0 to 100, by their list."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = [math.nan]
    if not all(0 <= share <= 100 for share in shares):
        raise ConfigError(f"--percentiles is {text!r}; it must be numbers from 0 to 100, such as 50,90,99.")
    return shares


def texts_of(words: str, dataset: Path | None, count: int, seed: int) -> list[str]:
    """At most `count` texts; of a file, those that it has."""
    if dataset is not None:
        with ExitStack() as stack:
            rows = files.opened(str(dataset), None, None, stack)
            texts = [text for _, text in rows.numbered if text.strip()]
        if not texts:
            raise files.nothing_in(str(dataset))
        return texts
    if words == "ragged":
        return ragged_texts(count, seed)
    fewest, dash, largest = words.partition("-")
    try:
        low, high = int(fewest), int(largest if dash else fewest)
    except ValueError:
        low, high = 0, 0
    if not 0 < low <= high:
        raise ConfigError(f"--words is {words!r}; it must be a number, a range such as 8-16, or ragged.")
    return short_texts(count, low, high, seed)


def _load_table(report: LoadReport) -> Table:
    table = Table("measure", show_header=False)
    table.add_column(justify="right", no_wrap=True)
    rows: list[tuple[str, str]] = [
        ("answered", f"{report.successes} of {report.requests}"),
        ("duration, s", f"{report.seconds:.2f}"),
        ("requests/s", f"{report.requests_per_second:.1f}"),
        ("items/s", f"{report.items_per_second:.1f}"),
    ]
    if report.tokens:
        rows.append(("tokens/s", f"{report.tokens_per_second:.0f}"))
    if report.latency_ms is not None:
        rows.append(("latency mean, ms", f"{report.latency_ms.mean:.2f}"))
        rows += [(f"latency p{share:g}, ms", f"{value:.2f}") for share, value in report.latency_ms.percentiles]
        rows.append(("latency max, ms", f"{report.latency_ms.max:.2f}"))
    rows.append(("bytes received", str(report.bytes_received)))
    for row in rows:
        table.add_row(*row)
    return table


def _load_lines(report: LoadReport) -> list[str]:
    rate = "as fast as answered" if report.request_rate is None else f"{report.request_rate:g} requests/s"
    lines = [
        f"{report.backend} at {report.url.rstrip('/')}{report.endpoint}",
        f"{report.items_per_request} item(s) per request, at most {report.concurrency} requests at once, {rate}.",
    ]
    if report.client_load > _BUSY_CLIENT:
        lines.append(
            f"This client was busy for {100 * report.client_load:.0f} % of the time: the server may be faster than that."
        )
    lines += [f"{failed.count} failed, {failed.kind}: {failed.message}" for failed in report.failures]
    return lines
