"""Comparison with sentence-transformers: both measured in turn, each in its own process; medians and ratios."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from poolhouse.data import ragged_texts
from poolhouse.errors import EngineError

US, THEM = "poolhouse", "sentence-transformers"
# What a command measured, by name.
Result = dict[str, float]

_BATCH_SIZES = (8, 16, 32, 64)
_LATENCY_RUNS = 50


@dataclass(frozen=True, slots=True)
class Figure:
    """One measure of both sides, as medians over the rounds.

    ratio: how many times better ours is; lowest_ratio: that of the worst round.
    """

    name: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    lowest_ratio: float


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, and on what."""

    model: str
    texts: int
    mean_tokens: float
    rounds: int
    batch_size: int
    gemm_gflops: float
    prepacked_gflops: float
    ceiling_texts_per_second: float
    figures: tuple[Figure, ...]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


class SideProcess:
    """One side in a process of its own, and how long it took to its first vector.

    command: what runs it; by default this module, with the side's name and the model.
    """

    def __init__(self, side: str, model: str, command: Sequence[str] | None = None) -> None:
        started = time.perf_counter()
        self.process = subprocess.Popen(  # noqa: S603 - our own module, or one that the user names
            command or [sys.executable, "-m", "poolhouse.bench.compare", side, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            text=True,
        )
        self.side = side
        self._result()
        self.start_seconds = time.perf_counter() - started

    def do(self, command: str, **arguments: object) -> Result:
        """Run a command there and wait for its result.

        Raises:
            EngineError: the process died.
        """
        assert self.process.stdin is not None
        print(json.dumps({"do": command, **arguments}), file=self.process.stdin, flush=True)
        return self._result()

    def close(self) -> None:
        self.process.communicate()

    def _result(self) -> Result:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(f"The {self.side} side of the benchmark died; is the library installed?")
        result: Result = json.loads(line)
        return result


def compare(model: str | None, texts: int, rounds: int, progress: Callable[[str], None]) -> Report:
    """Measure both sides in turn, `rounds` times; only one side computes at a time."""
    corpus = ragged_texts(texts)
    named = model or "default"
    gemm = SideProcess("gemm", named)
    ceilings: list[Result] = []
    ours, theirs = SideProcess(US, named), SideProcess(THEM, named)
    sample = corpus[: max(1, texts // 4)]
    progress("batch sizes of sentence-transformers")
    batch_size = min(_BATCH_SIZES, key=lambda size: theirs.do("throughput", texts=sample, batch_size=size)["seconds"])
    facts = ours.do("facts", texts=corpus)

    speeds: list[tuple[float, float]] = []
    latencies: list[tuple[float, float]] = []
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}")
        ceilings.append(gemm.do("gemm"))
        speeds.append(
            _both(ours, theirs, lambda side: texts / _seconds(side, "throughput", texts=corpus, batch_size=batch_size))
        )
        latencies.append(_both(ours, theirs, lambda side: 1000 * _seconds(side, "latency", runs=_LATENCY_RUNS)))
    for process in (gemm, ours, theirs):
        process.close()
    # Other programs on the machine can only lower it.
    ceiling = {kind: max(round_[kind] for round_ in ceilings) for kind in ("plain", "prepacked")}

    starts: list[tuple[float, float]] = []
    for number in range(1, rounds + 1):
        progress(f"start {number} of {rounds}")
        starts.append((_start(US, named), _start(THEM, named)))

    work = 2e-9 * facts["matrix_weights"] * facts["tokens"] / texts
    return Report(
        model=named,
        texts=texts,
        mean_tokens=facts["tokens"] / texts,
        rounds=rounds,
        batch_size=batch_size,
        gemm_gflops=ceiling["plain"],
        prepacked_gflops=ceiling["prepacked"],
        ceiling_texts_per_second=max(ceiling.values()) / work,
        figures=(
            figure("throughput", "texts/s", speeds, lambda us, them: us / them),
            figure("one query", "ms", latencies, lambda us, them: them / us),
            figure("first vector", "s", starts, lambda us, them: them / us),
        ),
    )


def _both(ours: SideProcess, theirs: SideProcess, measure: Callable[[SideProcess], float]) -> tuple[float, float]:
    return measure(ours), measure(theirs)


def _seconds(side: SideProcess, command: str, **arguments: object) -> float:
    return side.do(command, **arguments)["seconds"]


def _start(side: str, model: str) -> float:
    process = SideProcess(side, model)
    process.close()
    return process.start_seconds


def figure(name: str, unit: str, pairs: list[tuple[float, float]], better: Callable[[float, float], float]) -> Figure:
    ratios = [better(*pair) for pair in pairs]
    return Figure(
        name, unit, median(pair[0] for pair in pairs), median(pair[1] for pair in pairs), median(ratios), min(ratios)
    )


QUERY = "what is the capital of france"
# What a side can be asked to do, by name.
Commands = dict[str, Callable[..., Result]]


def main() -> None:
    """The other end of a `SideProcess`."""
    name, model = sys.argv[1], sys.argv[2]
    serve_commands(lambda: _SIDES[name](model))


def serve_commands(start: Callable[[], Commands]) -> None:
    """Run commands of standard input, a JSON object a line, until it ends."""
    # Libraries print to standard output now and then; the results keep a channel of their own.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = start()
    print(json.dumps({"ready": True}), file=results, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(side[command.pop("do")](**command)), file=results, flush=True)


def _poolhouse(model: str) -> Commands:
    from poolhouse.llm import LLM

    llm = LLM(None if model == "default" else model, overflow="truncate", dtype="float32")
    llm.embed(QUERY)

    def throughput(texts: list[str], batch_size: int) -> Result:
        return timed(lambda: llm.embed(texts, use_tqdm=False))

    def latency(runs: int) -> Result:
        return _median_of(runs, lambda: llm.embed(QUERY))

    def facts(texts: list[str]) -> Result:
        tokens = sum(len(output.prompt_token_ids) for output in llm.embed(texts, use_tqdm=False))
        known = llm.model.facts.sizes
        return {"tokens": tokens, "matrix_weights": known.parameters - known.vocabulary_size * known.hidden_size}

    return {"throughput": throughput, "latency": latency, "facts": facts}


def _sentence_transformers(model: str) -> Commands:
    from sentence_transformers import SentenceTransformer

    if model == "default":
        from poolhouse.models.files.hub import embedded_model

        model = str(embedded_model())
    encoder = SentenceTransformer(model)
    encoder.encode(QUERY)

    def throughput(texts: list[str], batch_size: int) -> Result:
        return timed(lambda: encoder.encode(texts, batch_size=batch_size, show_progress_bar=False))

    def latency(runs: int) -> Result:
        return _median_of(runs, lambda: encoder.encode(QUERY, show_progress_bar=False))

    return {"throughput": throughput, "latency": latency}


def _gemm(_: str) -> Commands:
    """The machine's float32 matrix product, by torch.mm and by a weight in oneDNN's own layout."""
    import torch

    from poolhouse.layers.linear import Linear

    size = 1536
    left, right = torch.randn(size, size), torch.randn(size, size)
    linear = Linear(right)
    linear.prepack()

    @torch.inference_mode()
    def gemm() -> Result:
        work = 2 * size**3 / 1e9
        plain = _median_of(9, lambda: left @ right)["seconds"]
        prepacked = _median_of(9, lambda: linear(left))["seconds"]
        return {"plain": work / plain, "prepacked": work / prepacked}

    gemm()
    return {"gemm": gemm}


def timed(call: Callable[[], object]) -> Result:
    started = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - started}


def _median_of(runs: int, call: Callable[[], object]) -> Result:
    return {"seconds": median(timed(call)["seconds"] for _ in range(runs))}


_SIDES = {"poolhouse": _poolhouse, "sentence-transformers": _sentence_transformers, "gemm": _gemm}
if __name__ == "__main__":
    main()
