"""Serve: our server under many connections, beside the offline engine on the same texts, and beside servers of peers."""

from __future__ import annotations

from dataclasses import replace

from poolhouse.bench.load import Load, LoadReport, run_load
from poolhouse.bench.measure import Bench, llm_options
from poolhouse.bench.report import Goal, Report, Row, SideFigures
from poolhouse.bench.servers import NAME, ServerProcess, Service, missing_servers, our_server, peer_servers
from poolhouse.bench.shapes import checkpoint
from poolhouse.bench.sides import US, SideProcess, our_side
from poolhouse.errors import EngineError

_OFFLINE = f"{US} offline"
_PERCENTILES = (50, 99)
_GOALS = {_OFFLINE: 0.85, "vLLM": 3.0, "Infinity": 1.5}


def serve(bench: Bench, shape: str, load: Load, texts: list[str], command: str) -> Report:
    """Requests per second of each server, started in turn so that each has the machine to itself."""
    rows: list[Row] = []
    notes = missing_servers(bench)
    written = checkpoint(shape, bench.cache, bench.layers)
    for dtype in bench.possible_types(notes):
        model = str(written.folder)
        rates: dict[str, list[float]] = {}
        waits: dict[tuple[str, float], list[float]] = {}
        left: list[str] = []
        services = [our_server(model, dtype), *peer_servers(bench, model, dtype)]
        for number in range(1, bench.rounds + 1):
            for service in services:
                if any(line.startswith(service.name) for line in left):
                    continue
                bench.progress(f"{shape}, {dtype}, {service.name}, {number} of {bench.rounds}")
                try:
                    done = _loaded(service, load, texts)
                except EngineError as error:
                    if service.name == US:
                        raise
                    left.append(f"{service.name} is left out: {error}")
                    rates.pop(service.name, None)
                    continue
                rates.setdefault(service.name, []).append(done.items_per_second)
                assert done.latency_ms is not None
                for percent, wait in done.latency_ms.percentiles:
                    waits.setdefault((service.name, percent), []).append(wait)
                if service.name == US:
                    bench.progress(f"{shape}, {dtype}, offline, {number} of {bench.rounds}")
                    rates.setdefault(_OFFLINE, []).append(_offline(model, dtype, texts, load))
        work = f"{load.concurrency} connections, {load.items_per_request} short text(s) per request"
        sides = tuple(SideFigures(name, tuple(values)) for name, values in rates.items())
        for against, least in _GOALS.items():
            if any(side.name.startswith(against) for side in sides):
                goal = Goal(against, least)
                rows.append(Row("serve", work, written.title, dtype, "texts/s", sides, True, goal, notes=tuple(left)))
        for percent in _PERCENTILES:
            names = [name for name in rates if (name, percent) in waits]
            sides = tuple(SideFigures(name, tuple(waits[name, percent])) for name in names)
            rows.append(
                Row("serve", f"{work}, p{percent}", written.title, dtype, "ms", sides, False, notes=tuple(left))
            )
    return bench.report(command, rows, None, notes)


def _loaded(service: Service, load: Load, texts: list[str]) -> LoadReport:
    server = ServerProcess(service)
    try:
        own = replace(load, url=server.url, backend=service.backend, endpoint=service.path, model=NAME)
        report = LoadReport.of(own, run_load(own, texts), _PERCENTILES)
    finally:
        server.close()
    if report.failures:
        failed = report.failures[0]
        raise EngineError(f"{failed.count} requests failed, {failed.kind}: {failed.message}")
    return report


def _offline(model: str, dtype: str, texts: list[str], load: Load) -> float:
    """Texts per second of `LLM` on those that count."""
    warm = load.warmup * load.items_per_request
    process = SideProcess(_OFFLINE, our_side(model, **llm_options(dtype)))
    try:
        process.do("throughput", texts=texts[:warm] or texts[:8])
        counted = texts[warm:]
        return len(counted) / float(process.do("throughput", texts=counted)["seconds"])
    finally:
        process.close()
