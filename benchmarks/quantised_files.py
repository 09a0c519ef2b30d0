"""What quantised files of a model cost: seconds to load, and the lowest cosine of 200 texts beside the float32 original.

    python benchmarks/quantised_files.py            # shape of MiniLM; --base for that of BERT base

The checkpoint is random, and written by the makers of the tests. Random weights have no outliers, which cost trained
models more. A first load is thrown away. GGUF files of kinds that the package gguf cannot write are left out.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
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

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LAYOUTS = {
    "compressed-tensors int8": lambda: layouts.compressed(),
    "compressed-tensors packed int4": lambda: layouts.compressed(4, "group", 128, packed=True),
    "AWQ": lambda: layouts.awq(128),
    "GPTQ 4 bit": lambda: layouts.gptq(4, 128),
    "bitsandbytes int8": lambda: layouts.bitsandbytes_8bit(),
    "bitsandbytes nf4": lambda: layouts.bitsandbytes_4bit(),
}
GGUF = ("Q8_0", "Q4_0", "Q4_K")


def main() -> None:
    """Print a line per kind of file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", action="store_true", help="the shape of BERT base")
    words = files("poolhouse.data").joinpath("passages.txt").read_text("utf-8").split()
    drawn = random.Random(0)  # noqa: S311
    texts = [" ".join(drawn.choices(words, k=drawn.randint(3, 60))) for _ in range(200)]
    with tempfile.TemporaryDirectory() as folder:
        plain = made(Path(folder) / "plain", BASE if parser.parse_args().base else MINILM)
        answered(plain, texts)
        expected = report("float32", plain, texts, None)
        for name, layout in LAYOUTS.items():
            copy, out = Path(folder) / "copy", Path(folder) / "quantised"
            shutil.copytree(plain, copy)  # its maker writes there what the quantised file means
            layouts.quantise(copy, out, layout())
            report(name, out, texts, expected)
            shutil.rmtree(copy)
            shutil.rmtree(out)
        for kind in GGUF:
            path = Path(folder) / f"{kind}.gguf"
            try:
                write_gguf(path, plain, "bert", pooling="mean", kind=kind)
            except NotImplementedError:
                print(f"GGUF {kind}: not written by this package")
                continue
            report(f"GGUF {kind}", path, texts, expected)


def made(folder: Path, shape: dict[str, int]) -> Path:
    """A random BERT, whose vectors are means."""
    torch.manual_seed(0)
    BertModel(BertConfig(**shape), add_pooling_layer=False).save_pretrained(folder)  # type: ignore[arg-type]
    shutil.copy(embedded_model() / "tokenizer.json", folder)
    return folder


def answered(path: Path, texts: list[str]) -> tuple[float, np.ndarray[tuple[int, int], np.dtype[np.float32]]]:
    began = time.perf_counter()
    with LLM(str(path), pooler_config={"pooling_type": "MEAN"}) as llm:
        seconds = time.perf_counter() - began
        return seconds, np.asarray(llm.embed_array(texts, use_tqdm=False))


def report(name: str, path: Path, texts: list[str], expected: object) -> object:
    seconds, vectors = answered(path, texts)
    cosines = np.ones(1) if expected is None else (vectors * np.asarray(expected)).sum(1)
    print(f"{name}: {seconds:.2f} s to load, lowest cosine {cosines.min():.4f}", flush=True)
    return vectors


if __name__ == "__main__":
    main()
