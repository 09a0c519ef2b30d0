"""GPU: tokens per second for texts of one length and of ragged lengths, as a share of the matrix rate, beside sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence

from poolhouse.bench.measure import Bench, Ceiling, Crew, Side, agreement, ceiling_of, noted, reference_vectors
from poolhouse.bench.report import Ceilings, Goal, Report, Row
from poolhouse.bench.shapes import Written, checkpoint
from poolhouse.bench.sides import US, SideProcess, our_side, peer_side
from poolhouse.errors import EngineError

LENGTHS = (32, 128, 512, 2048)
_RAGGED = 0
# Tokens of one measurement, so that it takes a second or so.
_TOKENS = 2**19
_DTYPE = "bfloat16"


def cuda_device() -> str:
    """The name of the CUDA device.

    Raises:
        EngineError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise EngineError("There is no CUDA device: `poolhouse bench gpu` measures on one alone.")
    return str(torch.cuda.get_device_name())


def gpu(bench: Bench, shapes: Sequence[str], command: str) -> Report:
    """Tokens per second in bfloat16 of both sides in turn.

    Raises:
        EngineError: there is no CUDA device.
    """
    cuda_device()
    rows: list[Row] = []
    notes = bench.missing("sentence-transformers")
    ceilings = Ceilings({}, {})
    for shape in shapes:
        written = checkpoint(shape, bench.cache, bench.layers)
        with Crew(bench.progress) as crew:
            _add_sides(bench, crew, written)
            # The ceiling's process shares the device: it computes only when it is asked.
            with ceiling_of(written, _DTYPE, "gpu-ceilings", rows=16384) as ceiling:
                rows += _rows(bench, crew, ceiling, written)
                noted(ceilings, ceiling)
    return bench.report(command, rows, ceilings, notes)


def _add_sides(bench: Bench, crew: Crew, written: Written) -> None:
    model = str(written.folder)
    options = {"dtype": _DTYPE, "device": "cuda"}
    crew.add(US, lambda: SideProcess(US, our_side(model, **options)), needed=True)
    library = "sentence-transformers"
    if library in bench.libraries:
        python, version = bench.libraries[library]
        kind = written.kind
        peer = peer_side(python, library, model, **options, kind=kind)
        crew.add(f"{library} {version}", lambda: SideProcess(library, peer))


def _rows(bench: Bench, crew: Crew, ceiling: Ceiling, written: Written) -> list[Row]:
    rerank = written.kind == "rerank"
    found = {}
    if not rerank:
        vectors, texts, _ = reference_vectors(bench, written)
        found = agreement(crew, vectors, texts)
    rows = []
    for length in (_RAGGED,) if rerank else (*LENGTHS, _RAGGED):
        count = _TOKENS // length if length else bench.texts
        tokens = count * length or _counted(crew, bench, rerank)
        _find(crew, bench, length, count, rerank)

        def rate(side: Side, length: int = length, count: int = count, tokens: int = tokens) -> list[float]:
            return [tokens / _seconds(side, bench, length, count, rerank)]

        what = f"{written.name}, {length or 'ragged'}"
        values = crew.rounds(bench.rounds, rate, what)
        products = ceiling.products()
        limit = None if products is None else products * 1e9 / (2 * written.matrix_weights)
        rows.append(
            Row(
                "gpu",
                f"{count} texts of {length} tokens" if length else f"{count} ragged texts",
                written.title,
                _DTYPE,
                "tokens/s",
                crew.figures(values, 0, found),
                goal=Goal(least={512: 1.3, _RAGGED: 2.0}.get(length, 1.0)),
                ceiling=limit,
                ceiling_of="Products in bfloat16",
                notes=tuple(crew.notes),
            )
        )
    return rows


def _counted(crew: Crew, bench: Bench, rerank: bool) -> int:
    """Tokens of the ragged texts; a pair's are about those of its document."""
    return int(crew.sides[0].process.do("count", texts=bench.corpus)["tokens"])


def _seconds(side: Side, bench: Bench, length: int, count: int, rerank: bool) -> float:
    ours = US in side.name
    if rerank:
        return float(side.process.do("rerank", query="why?", documents=bench.corpus, **side.setting)["seconds"])
    if length:
        done = side.process.do("uniform", length=length, count=count, **({} if ours else side.setting))
        return float(done["seconds"])
    return float(side.process.do("throughput", texts=bench.corpus, **side.setting)["seconds"])


def _find(crew: Crew, bench: Bench, length: int, count: int, rerank: bool) -> None:
    """Warm our side, and find the batch size of the other."""

    def trial(side: Side) -> None:
        if US in side.name:
            _seconds(side, bench, length, count, rerank)
            return
        settings = side.process.do("settings")["settings"]
        seconds = []
        for setting in settings:
            side.setting = setting
            try:
                seconds.append(_seconds(side, bench, length, count, rerank))
            except EngineError:
                # Out of memory.
                seconds.append(float("inf"))
        if min(seconds) == float("inf"):
            raise EngineError("no batch size fits into the memory")
        side.setting = settings[seconds.index(min(seconds))]

    crew.each(trial)
