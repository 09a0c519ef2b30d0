"""Comparison on pictures: pages and texts of a small random ColQwen3, beside colpali-engine; medians and ratios.

Both sides compute the same vectors of the same files, each in its own process, in turn.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from poolhouse.bench.made_up import Shape, write_colqwen3
from poolhouse.bench.measure import Bench, Crew, Side
from poolhouse.bench.report import Goal, Report, Row, SideFigures
from poolhouse.bench.sides import US, Commands, Result, SideProcess, seconds_of, serve_commands
from poolhouse.data import short_texts
from poolhouse.inputs.prompts import ContentInput, PromptsInput
from poolhouse.vectors.max_sim import max_sim

_BATCH_SIZES = (1, 2, 4, 8)
# Width and height of pages: A4 upright and across, a slide, a receipt, a figure, an icon; in pixels.
_SIZES = ((620, 877), (877, 620), (960, 540), (300, 1100), (448, 448), (96, 96))
_SHAPE = Shape(layers=8, width=512, tower_layers=8, tower_width=512, dimensions=128, max_tokens=768)
# MaxSim of one query with so many pages of so many rows.
_PAGES, _ROWS, _QUERY_ROWS = 1000, 1024, 32
_NAME = f"ColQwen3 ({_SHAPE.layers} x {_SHAPE.width})"
_THEM = "colpali-engine"


def compare_pictures(bench: Bench, pages: int, command: str) -> Report:
    """Pages and `bench.texts` texts per second, in turn; beside colpali-engine where it is installed.

    Raises:
        EngineError: our side does not run.
    """
    notes = bench.missing(_THEM)
    with tempfile.TemporaryDirectory() as folder, Crew(bench.progress) as crew:
        bench.progress("a model with random weights")
        model = str(write_colqwen3(Path(folder) / "model", _SHAPE))
        files = _draw_pages(Path(folder), pages)
        work: dict[str, dict[str, list[str]]] = {
            "pages": {"files": files},
            "texts": {"texts": short_texts(bench.texts, 5, 60)},
        }
        ours = [sys.executable, "-m", "poolhouse.bench.pictures", model]
        crew.add(US, lambda: SideProcess(US, ours), needed=True)
        if _THEM in bench.libraries:
            python, version = bench.libraries[_THEM]
            theirs = [str(python), "-P", str(Path(__file__).with_name("picture_peers.py")), model]
            crew.add(f"{_THEM} {version}", lambda: SideProcess(_THEM, theirs))
        rows = [_row(bench, crew, name, arguments) for name, arguments in work.items()]
        if len(crew.sides) > 1:
            lowest = _lowest_cosine(crew.sides[0], crew.sides[1], files[0])
            notes.append(f"The lowest cosine of a page's vectors with {_THEM}'s is {lowest:.6f}.")
        times = [1000 * crew.sides[0].process.do("max_sim")["seconds"] for _ in range(bench.rounds)]
    sides = (SideFigures(US, tuple(times)),)
    work_of = f"MaxSim of one query with {_PAGES} pages of {_ROWS} rows"
    rows.append(Row("pictures", work_of, "128 dimensions", "float32", "ms", sides, False, Goal(None, most=150.0)))
    return bench.report(command, rows, None, notes)


def _row(bench: Bench, crew: Crew, name: str, arguments: dict[str, list[str]]) -> Row:
    count = len(next(iter(arguments.values())))

    def trial(side: Side) -> None:
        if US in side.name:
            side.process.do(name, **arguments)  # warms it
            return
        crew.progress(f"batch sizes of {side.name}")
        seconds = {size: side.process.do(name, batch_size=size, **arguments)["seconds"] for size in _BATCH_SIZES}
        side.setting = {"batch_size": min(seconds, key=lambda size: seconds[size])}

    def rate(side: Side) -> list[float]:
        return [count / side.process.do(name, **arguments, **side.setting)["seconds"]]

    crew.each(trial)
    values = crew.rounds(bench.rounds, rate, name)
    what = f"{count} pages of six sizes" if name == "pages" else f"{count} queries"
    sides = crew.figures(values, 0)
    return Row("pictures", what, _NAME, "float32", f"{name}/s", sides, goal=Goal(least=1.3), notes=tuple(crew.notes))


def _lowest_cosine(ours: Side, theirs: Side, file: str) -> float:
    """Of a page's vectors between both sides, which resize pictures by different libraries."""
    vectors = []
    for side in (ours, theirs):
        side.process.do("vectors", file=file, output=f"{file}.npy")
        vectors.append(np.load(f"{file}.npy"))
    return float((vectors[0] * vectors[1]).sum(axis=1).min())


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

        return {"seconds": seconds_of(run), "rows": rows}

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
        return {"seconds": seconds_of(lambda: max_sim(query, documents))}

    return {"pages": pages, "texts": texts, "vectors": vectors, "max_sim": best_scores}


if __name__ == "__main__":
    serve_commands(lambda: _poolhouse(sys.argv[1]))
