"""Start: a fresh process to its first vector, of the library and of the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from poolhouse.bench.measure import Bench, llm_options
from poolhouse.bench.report import Goal, Report, Row, SideFigures
from poolhouse.bench.servers import ServerProcess, missing_servers, our_server, peer_servers
from poolhouse.bench.shapes import Written, checkpoint
from poolhouse.bench.sides import US, SideProcess, our_side, peer_side
from poolhouse.errors import EngineError

_EARLIER = f"earlier {US}"
Start = Callable[[], "SideProcess | ServerProcess"]


def start(bench: Bench, shapes: Sequence[str], earlier: Sequence[str], command: str) -> Report:
    """Seconds from the start of a process to its first vector.

    earlier: the command of an earlier version, to which `serve ...` is added; none is not compared.
    """
    rows: list[Row] = []
    notes = bench.missing("sentence-transformers") + missing_servers(bench)
    types = bench.possible_types(notes)
    for shape in shapes:
        written = checkpoint(shape, bench.cache, bench.layers)
        for dtype in types:
            rows += [_library(bench, written, dtype), _server(bench, written, dtype, earlier)]
    return bench.report(command, rows, None, notes)


def _library(bench: Bench, written: Written, dtype: str) -> Row:
    model = str(written.folder)
    starts: dict[str, Start] = {US: lambda: SideProcess(US, our_side(model, **llm_options(dtype)))}
    if "sentence-transformers" in bench.libraries and dtype != "int8":
        python, version = bench.libraries["sentence-transformers"]
        name = f"sentence-transformers {version}"
        starts[name] = lambda: SideProcess(name, peer_side(python, "sentence-transformers", model, dtype=dtype))
    return _row(bench, written, dtype, "LLM, fresh process to first vector", starts, Goal("sentence-transformers", 3.0))


def _server(bench: Bench, written: Written, dtype: str, earlier: Sequence[str]) -> Row:
    services = [our_server(str(written.folder), dtype)]
    if earlier:
        services.append(our_server(str(written.folder), dtype, earlier, _EARLIER))
    services += peer_servers(bench, str(written.folder), dtype)
    starts: dict[str, Start] = {one.name: (lambda one=one: ServerProcess(one)) for one in services}  # type: ignore[misc]
    return _row(bench, written, dtype, "serve, fresh process to first vector over HTTP", starts, Goal(_EARLIER, 2.0))


def _row(bench: Bench, written: Written, dtype: str, work: str, starts: dict[str, Start], goal: Goal) -> Row:
    values: dict[str, list[float]] = {name: [] for name in starts}
    notes: list[str] = []
    for number in range(1, bench.rounds + 1):
        for name, begin in starts.items():
            if name not in values:
                continue
            bench.progress(f"{written.name}, {dtype}, start of {name}, {number} of {bench.rounds}")
            try:
                process = begin()
            except EngineError as error:
                if name == US:
                    raise
                notes.append(f"{name} is left out: {error}")
                del values[name]
                continue
            values[name].append(process.start_seconds)
            process.close()
    sides = tuple(SideFigures(name, tuple(seconds)) for name, seconds in values.items())
    return Row("start", work, written.title, dtype, "s", sides, higher=False, goal=goal, notes=tuple(notes))
