"""A library beside us, in an environment of its own: reads pages and texts with colpali-engine. Imports nothing of ours.

PYTHON -P picture_peers.py MODEL
"""

from __future__ import annotations

import json
import os
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any


def main() -> None:
    """Run commands, a JSON object a line, until standard input ends."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = _Colpali(Path(sys.argv[1]))
    print(json.dumps({"ready": True}), file=results, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(side, command.pop("do"))(**command)), file=results, flush=True)


class _Colpali:
    """colpali-engine's ColQwen3 with the tensors of a checkpoint in TomoroAI's layout."""

    def __init__(self, folder: Path) -> None:
        _complete_torchvision()
        import torch
        from colpali_engine.models import ColQwen3, ColQwen3Processor
        from safetensors.torch import load_file
        from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLVideoProcessor

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        config = json.loads((folder / "config.json").read_text())
        tensors = {
            name.removeprefix("vlm.model.").replace("embedding_proj_layer", "custom_text_proj"): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        self.model = ColQwen3(Qwen3VLConfig(**{**config, "model_type": "qwen3_vl"})).eval()
        self.model.custom_text_proj = torch.nn.Linear(config["text_config"]["hidden_size"], config["embed_dim"])
        self.model.load_state_dict(tensors)
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        self.processor = ColQwen3Processor(
            image_processor=Qwen2VLImageProcessor(**settings),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            video_processor=Qwen3VLVideoProcessor(),
        )

    def pages(self, files: list[str], batch_size: int) -> dict[str, float]:
        """Seconds for pages, from the bytes of their files to vectors of their tokens."""
        from PIL import Image

        contents = [Path(file).read_bytes() for file in files]
        started = time.perf_counter()
        vectors = []
        for begin in range(0, len(contents), batch_size):
            images = [Image.open(BytesIO(content)) for content in contents[begin : begin + batch_size]]
            vectors += self._run(self.processor.process_images(images))
        return {"seconds": time.perf_counter() - started, "rows": sum(map(len, vectors))}

    def texts(self, texts: list[str], batch_size: int) -> dict[str, float]:
        """Seconds for texts, sorted by length, to vectors of their tokens."""
        texts = sorted(texts, key=len)
        started = time.perf_counter()
        vectors = []
        for begin in range(0, len(texts), batch_size):
            queries = [text + 10 * "<|endoftext|>" for text in texts[begin : begin + batch_size]]
            vectors += self._run(self.processor.process_texts(queries))
        return {"seconds": time.perf_counter() - started, "rows": sum(map(len, vectors))}

    def vectors(self, file: str, output: str) -> dict[str, float]:
        """Write the vectors of one page into a file of numpy's."""
        import numpy as np
        from PIL import Image

        (rows,) = self._run(self.processor.process_images([Image.open(file)]))
        np.save(output, rows)
        return {"rows": len(rows)}

    def _run(self, batch: Any) -> list[Any]:
        import torch

        with torch.inference_mode():
            rows = self.model(**batch)
        return [own[mask.bool()].numpy() for own, mask in zip(rows, batch["attention_mask"], strict=True)]


def _complete_torchvision() -> None:
    """Let torchvision's Python half be imported beside a torch that its compiled half does not fit.

    It registers fake versions of operators which only that half defines; here they are defined, and never called.
    """
    import importlib.util
    import re

    import torch

    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or torch.cuda.is_available():
        return
    text = (Path(found.origin).parent / "_meta_registrations.py").read_text()
    names = {*re.findall(r"torchvision::(\w+)", text), *re.findall(r'register_meta\("(\w+)"', text)}
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}() -> ()")
    _KEPT.append(library)


_KEPT: list[Any] = []


if __name__ == "__main__":
    main()
