"""`poolhouse bench`: measures this engine beside sentence-transformers, or any running server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from poolhouse.bench.compare import Figure, Report, compare
from poolhouse.bench.load import BACKENDS, Load, LoadReport, run_load
from poolhouse.bench.pictures import PicturesReport, compare_pictures
from poolhouse.cli import texts as files
from poolhouse.cli.options import Model
from poolhouse.data import ragged_texts, short_texts
from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.files import whole_file

bench = typer.Typer(
    help="Measure speed: `compare` this engine with sentence-transformers, or load a running server with `serve`.",
    epilog="`poolhouse bench` alone is `poolhouse bench compare`.",
    no_args_is_help=True,
)
_COMMANDS = ("compare", "pictures", "serve")
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report here too.")]


def name_comparison(arguments: Sequence[str]) -> list[str]:
    """Arguments behind `bench` with `compare` put before them, where they name neither command nor ask for help.

    Raises:
        ConfigError: a first argument that is nearly a command, and no path of this machine.
    """
    first = arguments[0] if arguments else ""
    if first in (*_COMMANDS, "--help"):
        return list(arguments)
    if not first.startswith("-") and not Path(first).exists() and (near := did_you_mean(first, _COMMANDS)):
        raise ConfigError(f"No such command 'bench {first}'.{near}")
    return ["compare", *arguments]


@bench.command("compare")
def compare_command(
    model: Model = None,
    texts: Annotated[int, typer.Option(min=1, help="How many ragged texts.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side is measured.")] = 5,
    output: JsonFile = None,
) -> None:
    """Measure throughput, latency and start-up beside sentence-transformers, in turn, each in its own process."""
    with Console(stderr=True).status("starting") as status:
        report = compare(model, texts, rounds, status.update)
    Console(soft_wrap=True).print(_figures(report.figures), *_lines(report), sep="\n")
    _write(report, output)


@bench.command("pictures")
def pictures(
    peers: Annotated[
        Path | None, typer.Option(help="The Python of an environment with colpali-engine, to compare with.")
    ] = None,
    pages: Annotated[int, typer.Option(min=1, help="How many pages, of six sizes.")] = 24,
    texts: Annotated[int, typer.Option(min=1, help="How many queries.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side is measured.")] = 5,
    output: JsonFile = None,
) -> None:
    """Measure pages and queries per second on a small ColQwen3 with random weights, beside colpali-engine.

    Its model has 8 layers of 512 features in each half. Also times MaxSim of one query against 1,000 pages.
    """
    with Console(stderr=True).status("starting") as status:
        report = compare_pictures(peers, pages, texts, rounds, status.update)
    Console(soft_wrap=True).print(_figures(report.figures), *_picture_lines(report, peers is not None), sep="\n")
    _write(report, output)


def _picture_lines(report: PicturesReport, compared: bool) -> list[str]:
    lines = [
        f"{report.pages} pages with {report.rows} vectors, {report.texts} queries, {report.rounds} rounds, float32; medians.",
        f"MaxSim of one query with 1,000 pages of 1,024 rows: {report.max_sim_ms:.0f} ms.",
    ]
    if compared:
        lines.append(
            f"The reference is colpali-engine at its best batch sizes, {report.batch_sizes[0]} and "
            f"{report.batch_sizes[1]}; the lowest cosine of a page's vectors is {1 - report.difference:.6f}."
        )
    return lines


def _write(report: Report | LoadReport | PicturesReport, output: Path | None) -> None:
    if output is not None:
        with whole_file(output) as part:
            part.write_text(report.as_json() + "\n", encoding="utf-8")


def _figures(figures: Sequence[Figure]) -> Table:
    table = Table("measure", "unit")
    for heading in ("Poolhouse", "reference", "times better", "lowest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in figures:
        table.add_row(
            figure.name,
            figure.unit,
            f"{figure.ours:.2f}",
            f"{figure.theirs:.2f}",
            f"{figure.ratio:.2f}",
            f"{figure.lowest_ratio:.2f}",
        )
    return table


def _lines(report: Report) -> list[str]:
    reached = 100 * report.figures[0].ours / report.ceiling_texts_per_second
    ceiling = (
        f"float32 matrix products here: {report.gemm_gflops:.0f} GFLOP/s by torch.mm, {report.prepacked_gflops:.0f} with "
        f"a prepacked weight; at the better rate the model's matrices alone would allow "
        f"{report.ceiling_texts_per_second:.0f} texts/s, and Poolhouse reaches {reached:.0f} % of that."
    )
    return [
        f"{report.texts} texts of {report.mean_tokens:.0f} tokens on average, {report.rounds} rounds, float32; medians.",
        f"The reference is sentence-transformers at its best batch size, {report.batch_size}; 'lowest' is the ratio of our worst round.",
        ceiling,
    ]


# Above this share of a core the client slows what it measures.
_BUSY_CLIENT = 0.8


class Encoding(StrEnum):
    """How vectors come."""

    float = "float"
    base64 = "base64"


@bench.command("serve")
def serve(
    base_url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:8000",
    backend: Annotated[str, typer.Option(help=f"The dialect and route: {', '.join(BACKENDS)}.")] = "openai-embeddings",
    endpoint: Annotated[str | None, typer.Option(help="Another path than the backend's own.")] = None,
    model: Annotated[str | None, typer.Option(help="`model` of the bodies; none leaves it out.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.")] = None,
    requests: Annotated[int, typer.Option("--num-requests", "--num-prompts", min=1, help="How many count.")] = 1000,
    concurrency: Annotated[
        int, typer.Option("--concurrency", "--max-concurrency", min=1, help="Most requests in flight.")
    ] = 32,
    request_rate: Annotated[
        float,
        typer.Option(help="Requests per second, at random times (Poisson); inf: each as soon as one is answered."),
    ] = math.inf,
    items: Annotated[
        int,
        typer.Option("--items-per-request", "--random-batch-size", min=1, help="Texts, or documents, of a request."),
    ] = 1,
    words: Annotated[
        str, typer.Option(help="Words of a text: a number, a range, or `ragged` as in `bench compare`.")
    ] = "8-16",
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", "--dataset-path", help="A file of texts instead, as `embed --input` reads them."),
    ] = None,
    encoding: Annotated[Encoding, typer.Option("--encoding-format", help="How vectors come.")] = Encoding.float,
    extra: Annotated[str | None, typer.Option("--extra-body", help="A JSON object of fields for every body.")] = None,
    warmup: Annotated[
        int, typer.Option("--warmup", "--num-warmups", min=0, help="Requests beforehand that do not count.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Of the texts and of the arrivals.")] = 0,
    percentiles: Annotated[
        str, typer.Option("--percentiles", "--metric-percentiles", help="Of the latency, with commas.")
    ] = "50,90,99",
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request has failed.")] = 60.0,
    output: JsonFile = None,
) -> None:
    """Load a running server of any dialect, and report rates, latencies and failures.

    Exits with status 1 when every request failed. With a rate, latency counts from when a request was due.
    """
    shares = _percentiles(percentiles)
    if dataset is not None and output is not None:
        files.refuse_same_file(str(dataset), output)
    load = Load(
        url=base_url,
        backend=_known(backend),
        endpoint=_path(endpoint),
        model=model,
        api_key=api_key,
        requests=requests,
        concurrency=concurrency,
        requests_per_second=_rate(request_rate),
        items_per_request=items,
        encoding=encoding,
        extra=_object(extra),
        warmup=warmup,
        seconds_to_wait=timeout,
        seed=seed,
    )
    texts = _texts(words, dataset, (warmup + requests) * items, seed)
    report = LoadReport.of(load, run_load(load, texts), shares)
    Console(soft_wrap=True).print(_load_table(report), *_load_lines(report), sep="\n")
    _write(report, output)
    if not report.successes:
        raise typer.Exit(1)


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ConfigError(
            f"There is no backend {backend!r}; there are: {', '.join(BACKENDS)}.{did_you_mean(backend, BACKENDS)}"
        )
    return backend


def _path(endpoint: str | None) -> str | None:
    return endpoint if endpoint is None or endpoint.startswith("/") else f"/{endpoint}"


def _rate(rate: float) -> float | None:
    if math.isnan(rate) or rate <= 0:
        raise ConfigError(f"--request-rate is {rate:g}; it must be more than 0, or inf.")
    return None if math.isinf(rate) else rate


def _object(text: str | None) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        fields = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"--extra-body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError('--extra-body must be a JSON object, such as {"dimensions": 64}.')
    return fields


def _percentiles(text: str) -> list[float]:
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = [math.nan]
    if not all(0 <= share <= 100 for share in shares):
        raise ConfigError(f"--percentiles is {text!r}; it must be numbers from 0 to 100, such as 50,90,99.")
    return shares


def _texts(words: str, dataset: Path | None, count: int, seed: int) -> list[str]:
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
