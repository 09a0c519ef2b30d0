"""What quantised files of a model cost: seconds to load, and the lowest cosine of 200 texts beside the float32 original.

    python benchmarks/quantised_files.py            # shape of MiniLM; --base for that of BERT base

The checkpoint is random, and written by the makers of the tests. Random weights have no outliers, which cost trained
models more. A first load is thrown away. It needs the extra `test`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.models import quantised as layouts
from tests.models.gguf_files import write_gguf

from poolhouse import LLM
from poolhouse.models.files.hub import embedded_model
from poolhouse.outputs import Array

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LAYOUTS: dict[str, Callable[[], layouts.Layout]] = {
    "compressed-tensors int8": lambda: layouts.compressed(),
    "compressed-tensors packed int4": lambda: layouts.compressed(4, "group", 128, packed=True),
    "AWQ": lambda: layouts.awq(128),
    "GPTQ 4 bit": lambda: layouts.gptq(4, 128),
    "bitsandbytes int8": lambda: layouts.bitsandbytes_8bit(),
    "bitsandbytes nf4": lambda: layouts.bitsandbytes_4bit(),
}
# The package gguf writes no Q4_K.
GGUF = ("Q8_0", "Q4_0")


def main() -> None:
    """Print a line per kind of file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", action="store_true", help="the shape of BERT base")
    shape = BASE if parser.parse_args().base else MINILM
    words = files("poolhouse.data").joinpath("passages.txt").read_text("utf-8").split()
    drawn = np.random.default_rng(0)
    texts = [" ".join(drawn.choice(words, drawn.integers(3, 61))) for _ in range(200)]
    with tempfile.TemporaryDirectory() as folder:
        plain = made(Path(folder) / "plain", shape)
        answered(plain, texts)
        expected = report("float32", plain, texts)
        for name, layout in LAYOUTS.items():
            copy, out = Path(folder) / "copy", Path(folder) / "quantised"
            shutil.copytree(plain, copy)  # its maker writes there what the quantised file means
            layouts.quantise(copy, out, layout())
            report(name, out, texts, expected)
            shutil.rmtree(copy)
            shutil.rmtree(out)
        for kind in GGUF:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, plain, "bert", pooling="mean", kind=kind)
            report(f"GGUF {kind}", path, texts, expected)


def made(folder: Path, shape: dict[str, int]) -> Path:
    """A random BERT, whose vectors are means."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**shape), add_pooling_layer=False)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    shutil.copy(embedded_model() / "tokenizer.json", folder)
    return folder


def answered(path: Path, texts: list[str]) -> tuple[float, Array]:
    """Seconds to load, and a vector of each text."""
    began = time.perf_counter()
    with LLM(str(path), pooler_config={"pooling_type": "MEAN"}) as llm:
        seconds = time.perf_counter() - began
        return seconds, llm.embed_array(texts, use_tqdm=False)


def report(name: str, path: Path, texts: list[str], expected: Array | None = None) -> Array:
    """Print what a checkpoint costs; its vectors."""
    seconds, vectors = answered(path, texts)
    cosines = np.vecdot(vectors, vectors if expected is None else expected)
    print(f"{name}: {seconds:.2f} s to load, lowest cosine {cosines.min():.5f}", flush=True)
    return vectors


if __name__ == "__main__":
    main()
