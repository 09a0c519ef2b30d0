"""Comparison on pictures: pages and texts of a small random ColQwen3, beside colpali-engine; medians and ratios.

Both sides compute the same vectors of the same files, each in its own process, in turn.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from poolhouse.bench.compare import US, Commands, Figure, Result, SideProcess, figure, serve_commands, timed
from poolhouse.bench.made_up import Shape, write_colqwen3
from poolhouse.data import short_texts
from poolhouse.errors import ConfigError
from poolhouse.inputs.prompts import ContentInput, PromptsInput
from poolhouse.vectors.max_sim import max_sim

_BATCH_SIZES = (1, 2, 4, 8)
# Width and height of pages: A4 upright and across, a slide, a receipt, a figure, an icon; in pixels.
_SIZES = ((620, 877), (877, 620), (960, 540), (300, 1100), (448, 448), (96, 96))
_SHAPE = Shape(layers=8, width=512, tower_layers=8, tower_width=512, dimensions=128, max_tokens=768)
# MaxSim of one query with so many pages of so many rows.
_PAGES, _ROWS, _QUERY_ROWS = 1000, 1024, 32


@dataclass(frozen=True, slots=True)
class PicturesReport:
    """What was measured.

    rows: vectors of all pages. batch_sizes: the best of the other side, for pages and for texts; 0 without another side.
    difference: of a page's vectors between both sides, one minus the lowest cosine; the sides resize pictures by different
    libraries. max_sim_ms: one query against 1,000 pages of 1,024 rows, all in memory.
    """

    pages: int
    texts: int
    rows: int
    rounds: int
    batch_sizes: tuple[int, int]
    difference: float
    max_sim_ms: float
    figures: tuple[Figure, ...]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def compare_pictures(
    peers: Path | None, pages: int, texts: int, rounds: int, progress: Callable[[str], None]
) -> PicturesReport:
    """Measure pages and texts per second, `rounds` times; beside colpali-engine where `peers` is a Python that has it.

    Raises:
        ConfigError: `peers` is no file. EngineError: a side that does not run.
    """
    if peers is not None and not peers.is_file():
        raise ConfigError(f"--peers is {str(peers)!r}; it must be the Python of an environment with colpali-engine.")
    with tempfile.TemporaryDirectory() as folder:
        progress("a model with random weights")
        model = write_colqwen3(Path(folder) / "model", _SHAPE)
        files = _draw_pages(Path(folder), pages)
        queries = short_texts(texts, 5, 60)
        ours = SideProcess(US, str(model), [sys.executable, "-m", "poolhouse.bench.pictures", str(model)])
        theirs = None
        if peers is not None:
            script = Path(__file__).with_name("picture_peers.py")
            theirs = SideProcess("colpali-engine", str(model), [str(peers), "-P", str(script), str(model)])
        try:
            return _measured(ours, theirs, files, queries, rounds, progress)
        finally:
            for side in (ours, theirs):
                if side is not None:
                    side.close()


def _measured(
    ours: SideProcess,
    theirs: SideProcess | None,
    files: list[str],
    queries: list[str],
    rounds: int,
    progress: Callable[[str], None],
) -> PicturesReport:
    work: dict[str, dict[str, object]] = {"pages": {"files": files}, "texts": {"texts": queries}}
    sizes = dict.fromkeys(work, 0)
    rows = {name: ours.do(name, **arguments)["rows"] for name, arguments in work.items()}  # and warms it
    if theirs is not None:
        progress("batch sizes of colpali-engine")
        for name, arguments in work.items():
            seconds = {size: theirs.do(name, batch_size=size, **arguments)["seconds"] for size in _BATCH_SIZES}
            sizes[name] = min(seconds, key=lambda size: seconds[size])
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}")
        for name, arguments in work.items():
            count = len(next(iter(arguments.values())))  # type: ignore[arg-type]
            us = count / ours.do(name, **arguments)["seconds"]
            them = us if theirs is None else count / theirs.do(name, batch_size=sizes[name], **arguments)["seconds"]
            pairs[name].append((us, them))
    return PicturesReport(
        pages=len(files),
        texts=len(queries),
        rows=int(rows["pages"]),
        rounds=rounds,
        batch_sizes=(sizes["pages"], sizes["texts"]),
        difference=0.0 if theirs is None else _difference(ours, theirs, files[0]),
        max_sim_ms=1000 * ours.do("max_sim")["seconds"],
        figures=tuple(figure(name, f"{name}/s", pairs[name], lambda us, them: us / them) for name in work),
    )


def _difference(ours: SideProcess, theirs: SideProcess, file: str) -> float:
    vectors = []
    for side in (ours, theirs):
        side.do("vectors", file=file, output=f"{file}.npy")
        vectors.append(np.load(f"{file}.npy"))
    return float(1 - (vectors[0] * vectors[1]).sum(axis=1).min())


def _draw_pages(folder: Path, count: int) -> list[str]:
    """Files of pages with grey lines, of mixed sizes."""
    from PIL import Image

    random, files = np.random.default_rng(0), []
    for number in range(count):
        width, height = _SIZES[number % len(_SIZES)]
        page = np.full((height, width, 3), 255, np.uint8)
        for line in range(8, height - 12, 14):
            page[line : line + 8, 8 : 8 + random.integers(width // 4, width - 8)] = random.integers(0, 160, 3)
        files.append(str(folder / f"page{number}.png"))
        Image.fromarray(page).save(files[-1])
    return files


def _poolhouse(model: str) -> Commands:
    from poolhouse.llm import LLM

    # Nothing is kept: each round reads its pictures anew.
    llm = LLM(model, dtype="float32", media_cache_bytes=0)
    llm.encode("warm", pooling_task="token_embed", use_tqdm=False)

    def pages(files: list[str]) -> Result:
        contents: list[ContentInput] = [
            {"content": [{"type": "image", "image": Path(file).read_bytes()}]} for file in files
        ]
        return _encoded(contents, "document")

    def texts(texts: list[str]) -> Result:
        return _encoded(texts, "query")

    def _encoded(prompts: PromptsInput, input_type: str) -> Result:
        rows = 0

        def run() -> None:
            nonlocal rows
            answers = llm.encode(prompts, pooling_task="token_embed", input_type=input_type, use_tqdm=False)
            rows = sum(len(answer.outputs.data) for answer in answers)

        return {**timed(run), "rows": rows}

    def vectors(file: str, output: str) -> Result:
        content: ContentInput = {"content": [{"type": "image", "image": file}]}
        (answer,) = llm.encode(content, pooling_task="token_embed", use_tqdm=False)
        np.save(output, answer.outputs.data.numpy())
        return {"rows": len(answer.outputs.data)}

    def best_scores() -> Result:
        random = np.random.default_rng(0)
        query = random.standard_normal((_QUERY_ROWS, _SHAPE.dimensions), np.float32)
        documents = [random.standard_normal((_ROWS, _SHAPE.dimensions), np.float32) for _ in range(_PAGES)]
        max_sim(query, documents)
        return timed(lambda: max_sim(query, documents))

    return {"pages": pages, "texts": texts, "vectors": vectors, "max_sim": best_scores}


if __name__ == "__main__":
    serve_commands(lambda: _poolhouse(sys.argv[1]))
