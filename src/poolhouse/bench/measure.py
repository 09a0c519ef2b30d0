"""Measuring: sides that take turns, round by round; their best settings, what they agree on, and the machine's ceilings."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from poolhouse.bench.machine import this_machine
from poolhouse.bench.report import Ceilings, Report, Row, SideFigures
from poolhouse.bench.shapes import Written
from poolhouse.bench.sides import US, Result, SideProcess, find_python, installed, our_side, peer_side
from poolhouse.data import ragged_texts
from poolhouse.errors import ConfigError, EngineError
from poolhouse.settings import Settings

TYPES = ("float32", "bfloat16", "int8")
# Bytes of an entry of a weight.
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
# Texts whose vectors are compared with the reference's.
_COMPARED = 64
_CALIBRATION = 200
# Sides that embed: library, its variant, and the types that it has.
_EMBEDDERS = (
    ("sentence-transformers", "", ("float32", "bfloat16")),
    ("ONNX Runtime", "", ("float32",)),
    ("ONNX Runtime", "O3", ("float32",)),
    ("ONNX Runtime", "int8", ("int8",)),
    ("OpenVINO", "", TYPES),
)


class Process(Protocol):
    """What a side runs in."""

    def do(self, command: str, **arguments: object) -> Result: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Side:
    """One side of a row, and the setting that suits it best."""

    name: str
    process: Process
    setting: dict[str, Any] = field(default_factory=dict)

    def figures(self, values: Sequence[float], agreement: Mapping[str, tuple[float, float]]) -> SideFigures:
        lowest, mean = agreement.get(self.name, (None, None))
        words = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in self.setting.items())
        return SideFigures(self.name, tuple(values), words, lowest, mean)


@dataclass(frozen=True)
class Bench:
    """What the rows of one command have in common: what the user asked for, the peers, and where things are kept."""

    rounds: int = 5
    texts: int = 256
    types: tuple[str, ...] = TYPES
    peers: tuple[Path, ...] = ()
    cache: Path = Path()
    layers: int | None = None
    progress: Callable[[str], None] = lambda _: None

    @cached_property
    def libraries(self) -> dict[str, tuple[Path, str]]:
        """The Python and the version of each library that some environment has; the first that has it counts."""
        found: dict[str, tuple[Path, str]] = {}
        for path in self.peers or (None,):
            python = find_python(path)
            for name, version in installed(python).items():
                if version is not None:
                    found.setdefault(name, (python, version))
        return found

    def missing(self, *names: str) -> list[str]:
        """A line that names those of these libraries that no environment has."""
        absent = [name for name in names if name not in self.libraries]
        return [f"Not importable, so not compared: {', '.join(absent)}."] if absent else []

    def refused(self) -> dict[str, str]:
        """The types that this version does not run, each with the reason."""
        reasons = {}
        for name in self.types:
            try:
                Settings.parse(**llm_options(name))
            except ConfigError as error:
                reasons[name] = f"{name} is left out: {error}"
        return reasons

    def possible_types(self, notes: list[str]) -> list[str]:
        """The types that this version runs; what is left out is noted."""
        refused = self.refused()
        notes += refused.values()
        return [name for name in self.types if name not in refused]

    @cached_property
    def corpus(self) -> list[str]:
        return ragged_texts(self.texts)

    def report(self, command: str, rows: Sequence[Row], ceilings: Ceilings | None, notes: Sequence[str]) -> Report:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        gpu = any(row.command == "gpu" for row in rows)
        return Report(command, today, this_machine(gpu), ceilings, tuple(rows), tuple(dict.fromkeys(notes)))


def llm_options(dtype: str) -> dict[str, str]:
    """Options of `LLM` for a type of a table: int8 is a way to quantise."""
    return {"quantization": "int8"} if dtype == "int8" else {"dtype": dtype}


class Crew:
    """The sides of one row: ours first. A peer that fails is left out, and noted; ours may not."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.sides: list[Side] = []
        self.notes: list[str] = []
        self.progress = progress
        self._open = ExitStack()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, name: str, start: Callable[[], Process], needed: bool = False) -> Side | None:
        """Start a side. needed: whether its failure is ours.

        Raises:
            EngineError: a needed side that does not start.
        """
        self.progress(f"starting {name}")
        try:
            process = start()
        except (EngineError, OSError) as error:
            if needed:
                raise
            self.notes.append(f"{name} is left out: {error}")
            return None
        self._open.callback(process.close)
        self.sides.append(Side(name, process))
        return self.sides[-1]

    def each(self, work: Callable[[Side], None]) -> None:
        """Do something with every side; peers that fail leave."""
        for side in list(self.sides):
            try:
                work(side)
            except EngineError as error:
                if US in side.name:
                    raise
                self.sides.remove(side)
                self.notes.append(f"{side.name} is left out: {error}")

    def rounds(self, count: int, measure: Callable[[Side], Sequence[float]], what: str) -> dict[str, list[list[float]]]:
        """Figures of each side by its name: for each that `measure` returns a list with one per round. Sides take turns."""
        values: dict[str, list[list[float]]] = {}

        def once(side: Side) -> None:
            for place, value in enumerate(measure(side)):
                values.setdefault(side.name, [[] for _ in range(place + 1)])
                if len(values[side.name]) <= place:
                    values[side.name].append([])
                values[side.name][place].append(value)

        for number in range(1, count + 1):
            self.progress(f"{what}: round {number} of {count}")
            self.each(once)
        return values

    def figures(
        self,
        values: Mapping[str, list[list[float]]],
        place: int,
        agreement: Mapping[str, tuple[float, float]] | None = None,
    ) -> tuple[SideFigures, ...]:
        """The figures of all sides that lasted, of the one that stands at this place."""
        return tuple(side.figures(values[side.name][place], agreement or {}) for side in self.sides)


def add_embedders(bench: Bench, crew: Crew, written: Written, dtype: str, cores: Sequence[int] | None = None) -> None:
    """Start our side and every peer that embeds in this type.

    Raises:
        EngineError: ours does not start.
    """
    model = str(written.folder)
    crew.add(US, lambda: SideProcess(US, our_side(model, **llm_options(dtype)), cores), needed=True)
    for library, variant, types in _EMBEDDERS:
        if library not in bench.libraries or dtype not in types:
            continue
        python, version = bench.libraries[library]
        name = " ".join(part for part in (library, variant, version) if part)
        options: dict[str, object] = {"dtype": dtype, "variant": variant, "cache": str(written.cache)}
        options["calibration"] = ragged_texts(_CALIBRATION, seed=1) if library != "sentence-transformers" else []
        command = peer_side(python, library, model, **options)
        crew.add(name, lambda name=name, command=command: SideProcess(name, command, cores))  # type: ignore[misc]


def find_settings(crew: Crew, command: str, **arguments: object) -> None:
    """Give each peer that has settings the quickest of them, by one short run each."""

    def trial(side: Side) -> None:
        if US in side.name:
            side.process.do(command, **arguments)  # warms it, as the others are
            return
        crew.progress(f"{side.name}: its best setting")
        tried = side.process.do("settings")["settings"]
        seconds = [side.process.do(command, **arguments, **setting)["seconds"] for setting in tried]
        side.setting = tried[seconds.index(min(seconds))]

    crew.each(trial)


def agreement(crew: Crew, reference: Any, texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Lowest and mean cosine of each side's vectors with the reference's, by its name."""
    found: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "vectors.npy"

        def compare(side: Side) -> None:
            side.process.do("vectors", texts=list(texts), output=str(output))
            cosines = _cosines(np.load(output), reference)
            found[side.name] = (float(cosines.min()), float(cosines.mean()))

        crew.each(compare)
    return found


def _cosines(one: Any, other: Any) -> Any:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / np.maximum(lengths, 1e-12)


def reference_vectors(bench: Bench, written: Written) -> tuple[Any, list[str], str]:
    """Vectors in float32, the texts that they are of, and whose they are: sentence-transformers', else our own."""
    texts, model = ragged_texts(_COMPARED), str(written.folder)
    name, command = US, our_side(model, dtype="float32")
    if "sentence-transformers" in bench.libraries:
        name = "sentence-transformers"
        command = peer_side(bench.libraries[name][0], name, model, dtype="float32")
    bench.progress(f"vectors of {name} in float32")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "vectors.npy"
        process = SideProcess(name, command)
        try:
            process.do("vectors", texts=texts, output=str(output))
        finally:
            process.close()
        return np.load(output), texts, name


class Ceiling:
    """A process that measures what the machine can do with a model's own sizes; the best of several times counts."""

    def __init__(self, written: Written, dtype: str, side: str = "ceilings", rows: int = 1024) -> None:
        sizes = {"width": written.options["hidden_size"], "inner": written.options["intermediate_size"], "rows": rows}
        self.written, self.dtype, self.best = written, dtype, dict[str, float]()
        self.process = SideProcess("ceilings", our_side("", side=side, **sizes))

    @property
    def megabytes(self) -> float:
        """Of the matrices in this type."""
        return self.written.matrix_weights * _BYTES[self.dtype] / 1e6

    def products(self) -> float | None:
        """GFLOP/s; None where the machine, or torch, has no products of this type."""
        return self._measure("products", dtype=self.dtype)

    def reading(self) -> float | None:
        """GB/s of reading as much as the matrices hold."""
        return self._measure("reading", megabytes=self.megabytes)

    def _measure(self, name: str, **arguments: object) -> float | None:
        try:
            rate = self.process.do(name, **arguments)["rate"]
        except EngineError:
            return None
        self.best[name] = max(rate, self.best.get(name, 0.0))
        return self.best[name]


@contextmanager
def ceiling_of(written: Written, dtype: str, side: str = "ceilings", rows: int = 1024) -> Iterator[Ceiling]:
    ceiling = Ceiling(written, dtype, side, rows)
    try:
        yield ceiling
    finally:
        ceiling.process.close()


def noted(ceilings: Ceilings, ceiling: Ceiling) -> None:
    """Keep what one process found among the ceilings of a report."""
    products, reading = ceiling.best.get("products"), ceiling.best.get("reading")
    if products:
        ceilings.products[ceiling.dtype] = max(products, ceilings.products.get(ceiling.dtype, 0.0))
    if reading:
        ceilings.reading[f"{ceiling.megabytes:.0f}"] = reading


def recorded(arguments: Sequence[str]) -> str:
    """A command line as a report keeps it: without the paths of this machine.

    Environments of peers become PEERS; where things are kept and written is left out.
    """
    words, kept = iter(arguments), ["poolhouse"]
    for word in words:
        name, equals, _ = word.partition("=")
        if name in ("--cache", "--json", "--html", "--earlier"):
            if not equals:
                next(words, None)
        elif name == "--peers":
            if not equals:
                next(words, None)
            kept += ["--peers", "PEERS"]
        else:
            kept.append(json.dumps(word) if " " in word else word)
    return " ".join(kept)
