"""MaxSim of one query with ragged documents: packed, beside what others do, in alternating rounds of one process.

    python benchmarks/max_sim.py [--documents 1000] [--rounds 7] [--threads N]

padded: `torch.einsum` over documents padded to the longest, masked, as PyLate and colpali do it; the padding is part
of it, since engines answer with one matrix per text. Prints medians in milliseconds, and how many times ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from poolhouse.outputs import Array
from poolhouse.vectors.max_sim import max_sim, max_sim_packed, max_sim_tensors, row_offsets
from poolhouse.vectors.precision import quantize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--longest", type=int, default=580, help="lengths are uniform from 20 to this")
    parser.add_argument("--query-rows", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch; of numpy: OPENBLAS_NUM_THREADS"
    )
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    lengths = np.random.default_rng(0).integers(20, asked.longest, asked.documents)
    query, documents = _unit_rows(asked.query_rows, asked.width, 1), [_unit_rows(n, asked.width, n) for n in lengths]
    sides = _sides(query, documents)
    expected = sides["ours, a list"]()
    for name, side in sides.items():
        difference = np.abs(side() - expected).max()
        print(f"{name:32} largest difference {difference:.1e}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(asked.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - start)
    ours = statistics.median(times["ours, a list"])
    print(f"\n{asked.documents} documents, {lengths.sum()} rows of {asked.width}, query of {asked.query_rows} rows")
    for name, own in times.items():
        median = statistics.median(own)
        print(f"{name:32} {median * 1000:9.1f} ms {median / ours:6.2f} x ours")


def _sides(query: Array, documents: list[Array]) -> dict[str, Callable[[], Array]]:
    values, offsets = np.concatenate(documents), row_offsets([len(document) for document in documents])
    halves, codes, bits = (quantize(values, precision) for precision in ("float16", "int8", "binary"))
    tensors = [torch.from_numpy(document) for document in documents]
    mine, packed, bounds = torch.from_numpy(query), torch.from_numpy(values), torch.from_numpy(offsets)
    sides: dict[str, Callable[[], Array]] = {
        "ours, a list": lambda: max_sim(query, documents),
        "ours, packed": lambda: max_sim_packed(query, values, offsets),
        "ours, tensors": lambda: max_sim_tensors(mine, packed, bounds).numpy(),
        "padded einsum": lambda: _padded(mine, tensors).numpy(),
        "a loop of numpy": lambda: np.array([(query @ document.T).max(axis=1).sum() for document in documents]),
        "ours, packed float16": lambda: max_sim_packed(query, halves, offsets, "float16"),
        "ours, packed int8": lambda: max_sim_packed(query, codes, offsets, "int8"),
        "ours, packed binary": lambda: max_sim_packed(query, bits, offsets, "binary"),
    }
    try:
        from sentence_transformers.util import maxsim
    except ImportError:
        return sides
    sides["sentence-transformers' maxsim"] = lambda: maxsim([mine], tensors)[0].numpy()
    return sides


def _padded(query: torch.Tensor, documents: list[torch.Tensor]) -> torch.Tensor:
    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    lengths = torch.tensor([len(document) for document in documents])
    mask = torch.arange(padded.shape[1])[None] < lengths[:, None]
    products = torch.einsum("sh,dth->dst", query, padded).masked_fill(~mask[:, None], -torch.inf)
    return products.amax(-1).sum(-1)


def _unit_rows(rows: int, width: int, seed: int) -> Array:
    numbers = np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
    unit: Array = numbers / np.linalg.norm(numbers, axis=1, keepdims=True)
    return unit


if __name__ == "__main__":
    main()
