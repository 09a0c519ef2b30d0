"""How many texts a second GLiNER reads, by Poolhouse and by the gliner library: ragged texts, one process, in turns.

A random model in the shape of GLiNER small is made; random weights take as long as others. Needs an environment with both.

    taskset -c 0 python benchmarks/extraction.py
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.models import tiny_gliner as tiny

from poolhouse import LLM

TEXTS, ROUNDS, FEATURES = 48, 3, 384
LABELS = ["person", "organisation", "place", "date", "product", "event", "law", "amount"]
SHAPE = {"hidden_size": FEATURES, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}


def main() -> None:
    from gliner import GLiNER

    torch.set_num_threads(1)
    drawn = random.Random(0)  # noqa: S311
    texts = [" ".join(drawn.choices(tiny.PIECES, k=drawn.choice((5, 12, 25, 60, 150)))) for _ in range(TEXTS)]
    with tempfile.TemporaryDirectory() as folder:
        path = made(Path(folder))
        theirs = GLiNER.from_pretrained(str(path), local_files_only=True)
        with LLM(path) as llm:
            sides: dict[str, Callable[[], object]] = {
                "poolhouse": lambda: llm.extract(texts, LABELS, threshold=0.999, use_tqdm=False),
                "gliner": lambda: theirs.inference(texts, LABELS, threshold=0.999, batch_size=8),
            }
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(1 + ROUNDS):
                for name, run in sides.items():
                    begun = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - begun)
    rates = {name: TEXTS / statistics.median(own[1:]) for name, own in seconds.items()}
    print({name: round(rate, 1) for name, rate in rates.items()}, "texts/s")
    print(f"ratio {rates['poolhouse'] / rates['gliner']:.2f}")


def made(folder: Path) -> Path:
    """A checkpoint of that shape."""
    tiny.ENCODERS["deberta"] |= {**SHAPE, "max_position_embeddings": 512, "position_buckets": 256}
    return tiny.save(folder, "spans", hidden_size=FEATURES, max_width=12, max_len=384)


if __name__ == "__main__":
    main()
