"""`poolhouse bench`: each row of the goals by name, beside peers; loads on servers; reports as JSON, HTML and documents."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from poolhouse.bench.load import Load
from poolhouse.bench.measure import TYPES, Bench, recorded
from poolhouse.bench.report import COLUMNS, Report, Row, cells, read_report, remarks, title
from poolhouse.bench.shapes import check_shape, default_cache
from poolhouse.cli import load as loads
from poolhouse.cli import texts as files
from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.files import whole_file

bench = typer.Typer(
    help="Measure speed, beside every peer that is installed: on your machine, with your limits.",
    epilog="`poolhouse bench` alone is `poolhouse bench compare`.",
    no_args_is_help=True,
)
_LIKE_COMPARE = "compare"

Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", help="A shape of random weights, or the folder of a model; repeat it for several."),
]
Layers = Annotated[int | None, typer.Option(min=1, help="Fewer layers than the shape has, to save time.")]
Types = Annotated[str, typer.Option("--dtype", help=f"Types with commas: {', '.join(TYPES)}.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each side is measured.")]
Peers = Annotated[
    list[Path] | None,
    typer.Option(help="A Python with peers, or its environment's folder; repeat it for several. None: our own."),
]
Cache = Annotated[Path | None, typer.Option(help="Where random checkpoints and exports are kept.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report here too.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Write a page with plots here.")]
_ALL = ",".join(TYPES)


def name_comparison(arguments: Sequence[str]) -> list[str]:
    """Arguments behind `bench` with `compare` put before them, where they name neither command nor ask for help.

    Raises:
        ConfigError: a first argument that is nearly a command, and no path of this machine.
    """
    first = arguments[0] if arguments else ""
    commands = [one.name or "" for one in bench.registered_commands]
    if first in (*commands, "--help"):
        return list(arguments)
    if not first.startswith("-") and not Path(first).exists() and (near := did_you_mean(first, commands)):
        raise ConfigError(f"No such command 'bench {first}'.{near}")
    return [_LIKE_COMPARE, *arguments]


@bench.command("compare")
def compare(
    model: Annotated[str | None, typer.Argument(help="Folder of a model; none: the embedded default.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="How many ragged texts.")] = 512,
    rounds: Rounds = 5,
    dtype: Types = "float32",
    peers: Peers = None,
    cache: Cache = None,
    output: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure throughput, one query and start-up in turn: `throughput`, `latency` and `start` in one, in float32.

    Beside sentence-transformers, which may be in our own environment, and what else is installed.
    """
    from poolhouse.bench.rows.latency import latency
    from poolhouse.bench.rows.start import start
    from poolhouse.bench.rows.throughput import throughput

    shapes = _shapes([model] if model else None, "minilm", "embed")
    line = recorded(sys.argv[1:])
    with _bench(rounds, texts, dtype, peers, cache, None) as own:
        reports = [throughput(own, shapes, line), latency(own, shapes, ["quiet"], line), start(own, shapes, (), line)]
        rows = [row for report in reports for row in report.rows]
        notes = [note for report in reports for note in report.notes]
        whole = own.report(line, rows, reports[0].ceilings, notes)
    _finish(whole, output, html)


@bench.command("throughput")
def throughput_command(
    shape: Shapes = None,
    layers: Layers = None,
    dtype: Types = _ALL,
    texts: Annotated[int, typer.Option(min=1, help="How many ragged texts.")] = 256,
    rounds: Rounds = 5,
    peers: Peers = None,
    cache: Cache = None,
    output: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure texts per second for ragged texts, per shape and type, beside every library that embeds."""
    from poolhouse.bench.rows.throughput import throughput

    shapes = _shapes(shape, "minilm", "embed", layers=layers)
    with _bench(rounds, texts, dtype, peers, cache, layers) as own:
        report = throughput(own, shapes, recorded(sys.argv[1:]))
    _finish(report, output, html)


@bench.command("latency")
def latency_command(
    shape: Shapes = None,
    layers: Layers = None,
    dtype: Types = _ALL,
    under: Annotated[
        str, typer.Option(help="With commas: quiet; busy (a busy loop per core); half (of the cores).")
    ] = "quiet,busy,half",
    rounds: Rounds = 5,
    peers: Peers = None,
    cache: Cache = None,
    output: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure one query of 7 words and of 32 tokens, by `LLM.embed_array` and over HTTP."""
    from poolhouse.bench.rows.latency import CONDITIONS, latency

    shapes = _shapes(shape, "minilm", "embed", layers=layers)
    conditions = _several(under, "--under", tuple(CONDITIONS))
    with _bench(rounds, 1, dtype, peers, cache, layers) as own:
        report = latency(own, shapes, conditions, recorded(sys.argv[1:]))
    _finish(report, output, html)


@bench.command("start")
def start_command(
    shape: Shapes = None,
    layers: Layers = None,
    dtype: Types = "float32",
    earlier: Annotated[
        str | None, typer.Option(help="Command of an earlier version, to compare `serve` with: 'path/to/poolhouse'.")
    ] = None,
    rounds: Rounds = 5,
    peers: Peers = None,
    cache: Cache = None,
    output: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure a fresh process until its first vector: `LLM`, and `serve` over HTTP."""
    from poolhouse.bench.rows.start import start

    shapes = _shapes(shape, "minilm", "embed", layers=layers)
    with _bench(rounds, 1, dtype, peers, cache, layers) as own:
        report = start(own, shapes, shlex.split(earlier or ""), recorded(sys.argv[1:]))
    _finish(report, output, html)


@bench.command("rerank")
def rerank_command(
    kind: Annotated[
        str, typer.Option(help="With commas: cross-encoder, colbert, causal (with a beginning that prompts share).")
    ] = "cross-encoder,colbert,causal",
    shape: Annotated[str | None, typer.Option(help="Another shape, or the folder of a model, for one kind.")] = None,
    layers: Layers = None,
    dtype: Types = "float32",
    texts: Annotated[int, typer.Option(min=2, help="How many documents.")] = 100,
    rounds: Rounds = 5,
    peers: Peers = None,
    cache: Cache = None,
    output: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure one query with many documents, beside CrossEncoder, PyLate and the code of a card."""
    from poolhouse.bench.rows.rerank import KINDS, rerank

    kinds = _several(kind, "--kind", tuple(KINDS))
    if shape is not None:
        if len(kinds) > 1:
            raise ConfigError("--shape is for one --kind.")
        check_shape(shape, {"cross-encoder": "rerank"}.get(kinds[0], kinds[0]))
    with _bench(rounds, texts, dtype, peers, cache, layers) as own:
        report = rerank(own, kinds, shape, recorded(sys.argv[1:]))
    _finish(report, output, html)


@bench.command("memory")
def memory_command(
    shape: Shapes = None,
    layers: Layers = None,
    dtype: Types = "float32",
    budgets: Annotated[
        str, typer.Option(help="Tokens of a pack (`max_num_batched_tokens`), with commas.")
    ] = "2048,8192,32768",
    texts: Annotated[int, typer.Option(min=1, help="How many ragged texts.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="A third of how often the texts are read.")] = 3,
    cache: Cache = None,
    output: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure the resident memory of our process before and after loading, at its peak, and how it grows."""
    from poolhouse.bench.rows.memory import memory

    shapes = _shapes(shape, "minilm", "embed", layers=layers)
    try:
        sizes = [int(size) for size in budgets.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise ConfigError(f"--budgets is {budgets!r}; it must be numbers from 1, such as 2048,32768.")
    with _bench(rounds, texts, dtype, None, cache, layers) as own:
        report = memory(own, shapes, sizes, recorded(sys.argv[1:]))
    _finish(report, output, html)


@bench.command("gpu")
def gpu_command(
    shape: Shapes = None,
    layers: Layers = None,
    texts: Annotated[int, typer.Option(min=1, help="How many ragged texts.")] = 4096,
    rounds: Rounds = 5,
    peers: Peers = None,
    cache: Cache = None,
    output: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure tokens per second on CUDA in bfloat16, for texts of 32 to 2,048 tokens and ragged ones.

    Exits with status 1 where there is no CUDA device.
    """
    from poolhouse.bench.rows.gpu import cuda_device, gpu

    shapes = _shapes(shape, "minilm", "embed", "rerank", layers=layers)
    cuda_device()
    with _bench(rounds, texts, "bfloat16", peers, cache, layers) as own:
        report = gpu(own, shapes, recorded(sys.argv[1:]))
    _finish(report, output, html)


@bench.command("pictures")
def pictures(
    peers: Peers = None,
    pages: Annotated[int, typer.Option(min=1, help="How many pages, of six sizes.")] = 24,
    texts: Annotated[int, typer.Option(min=1, help="How many queries.")] = 128,
    rounds: Rounds = 5,
    output: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Measure pages and queries per second on a small ColQwen3 with random weights, beside colpali-engine.

    Its model has 8 layers of 512 features in each half. Also times MaxSim of one query against 1,000 pages.
    """
    from poolhouse.bench.pictures import compare_pictures

    with _bench(rounds, texts, "float32", peers, None, None) as own:
        report = compare_pictures(own, pages, recorded(sys.argv[1:]))
    _finish(report, output, html)


@bench.command("serve")
def serve(
    base_url: loads.BaseUrl = None,
    backend: loads.BackendName = "openai-embeddings",
    endpoint: loads.Endpoint = None,
    model: loads.ModelName = None,
    api_key: loads.ApiKey = None,
    requests: loads.Requests = 1000,
    concurrency: loads.Concurrency = 32,
    request_rate: loads.RequestRate = float("inf"),
    items: loads.Items = 1,
    words: loads.Words = "8-16",
    dataset: loads.Dataset = None,
    encoding: loads.EncodingFormat = loads.Encoding.float,
    extra: loads.ExtraBody = None,
    warmup: loads.Warmup = 64,
    seed: loads.Seed = 0,
    percentiles: loads.Percentiles = "50,90,99",
    timeout: loads.Timeout = 60.0,
    start: Annotated[
        bool, typer.Option("--start", help="Start servers instead: ours, Infinity's, vLLM's, TEI's; and compare them.")
    ] = False,
    shape: Annotated[str, typer.Option(help="With --start: a shape, or the folder of a model.")] = "minilm",
    layers: Layers = None,
    dtype: Types = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="With --start: how often each server is started and loaded.")] = 3,
    peers: Peers = None,
    cache: Cache = None,
    output: JsonFile = None,
    html: HtmlFile = None,
) -> None:
    """Load a running server of any dialect, and report rates, latencies and failures; or start servers and compare.

    Exits with status 1 when every request failed. With a rate, latency counts from when a request was due.
    """
    shares = loads.percentiles_of(percentiles)
    if dataset is not None and output is not None:
        files.refuse_same_file(str(dataset), output)
    asked = Load(
        url=base_url or "http://127.0.0.1:8000",
        backend=loads.known_backend(backend),
        endpoint=loads.path_of(endpoint),
        model=model,
        api_key=api_key,
        requests=requests,
        concurrency=concurrency,
        requests_per_second=loads.rate_of(request_rate),
        items_per_request=items,
        encoding=encoding,
        extra=loads.object_of(extra),
        warmup=warmup,
        seconds_to_wait=timeout,
        seed=seed,
    )
    texts = loads.texts_of(words, dataset, (warmup + requests) * items, seed)
    if not start:
        if html is not None or peers is not None:
            raise ConfigError("--peers and --html belong to --start, which starts servers and compares them.")
        loads.load_one(asked, texts, shares, output)
        return
    if base_url is not None:
        raise ConfigError("--start starts servers of its own; leave --base-url out.")
    check_shape(shape, "embed", layers=layers)
    from poolhouse.bench.rows import serve as row

    with _bench(rounds, requests, dtype, peers, cache, layers) as own:
        report = row.serve(own, shape, asked, texts, recorded(sys.argv[1:]))
    _finish(report, output, html)


@bench.command("report")
def report_command(
    reports: Annotated[list[Path], typer.Argument(help="JSON files that --json wrote.")],
    html: HtmlFile = None,
    docs: Annotated[Path | None, typer.Option(help="Write a document of Markdown, and its plots beside it.")] = None,
    readme: Annotated[Path | None, typer.Option(help="A file whose table between the marks is written anew.")] = None,
) -> None:
    """Put reports together: print them, and write a page, a document, or the table of a README."""
    from poolhouse.bench.documents import write_document, write_table
    from poolhouse.bench.page import page

    read = [read_report(path) for path in reports]
    if docs is not None:
        write_document(read, docs)
    if readme is not None:
        write_table(read, readme, docs)
    for report in read:
        _print(report)
    if html is not None:
        with whole_file(html) as part:
            part.write_text(page(read), encoding="utf-8")


def _shapes(given: Sequence[str] | None, default: str, *kinds: str, layers: int | None = None) -> list[str]:
    shapes = list(given or (default,))
    for shape in shapes:
        check_shape(shape, *kinds, layers=layers)
    return shapes


def _several(text: str, option: str, possible: Sequence[str]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in possible:
            raise ConfigError(
                f"{option} is {text!r}; it must be some of {', '.join(possible)}, with commas.{did_you_mean(name, possible)}"
            )
    return names


@contextmanager
def _bench(
    rounds: int, texts: int, dtype: str, peers: Sequence[Path] | None, cache: Path | None, layers: int | None
) -> Iterator[Bench]:
    """What all rows need, while a line on standard error says what is being done."""
    types = _several(dtype, "--dtype", TYPES)
    with Console(stderr=True).status("starting") as status:
        progress: Callable[[str], None] = status.update
        own = Bench(rounds, texts, types, tuple(peers or ()), cache or default_cache(), layers, progress)
        _ = own.libraries  # a wrong --peers fails here
        yield own


def _finish(report: Report, output: Path | None, html: Path | None) -> None:
    """Print a report, and write it where that was asked for."""
    _print(report)
    if output is not None:
        with whole_file(output) as part:
            part.write_text(report.as_json() + "\n", encoding="utf-8")
    if html is not None:
        from poolhouse.bench.page import page

        with whole_file(html) as part:
            part.write_text(page([report]), encoding="utf-8")


def _print(report: Report) -> None:
    console = Console(soft_wrap=True)
    console.print(*report.machine.lines(), sep="\n")
    for row in report.rows:
        console.print("", _table(row), *remarks(row), sep="\n", highlight=False)
    if report.ceilings is not None:
        found = [f"products in {dtype} {rate:.0f} GFLOP/s" for dtype, rate in report.ceilings.products.items()]
        found += [f"reading {size} MB {rate:.1f} GB/s" for size, rate in report.ceilings.reading.items()]
        console.print("", f"This machine: {', '.join(found)}.", sep="\n", highlight=False)
    console.print(*report.notes, sep="\n", highlight=False)


def _table(row: Row) -> Table:
    table = Table(title=title(row), title_justify="left")
    for name, justify in COLUMNS:
        table.add_column(name, justify=justify, no_wrap=name in ("side", "figure"))
    for line in cells(row):
        table.add_row(*line)
    return table
