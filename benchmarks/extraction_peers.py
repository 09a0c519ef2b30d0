"""gliner, gliner2 and gliclass, in an environment of their own: one side a process. Imports nothing of ours.

PYTHON -P extraction_peers.py LIBRARY MODEL
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    """Run commands, a JSON object a line, until standard input ends; without a model, print the library's version."""
    library, *model = sys.argv[1:]
    if not model:
        print(importlib.metadata.version(library))
        return
    warnings.simplefilter("ignore")
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    side = _SIDES[library](Path(model[0]))
    print(json.dumps({"ready": True}), file=results, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        del command["do"]
        begun, used = time.perf_counter(), time.process_time()
        found = side.run(**command)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - used
        print(json.dumps({"seconds": seconds, "cpu": cpu, "found": found}), file=results, flush=True)


class _Gliner:
    """What `inference` finds: label, first character and the one after the last, of each text."""

    def __init__(self, folder: Path) -> None:
        from gliner import GLiNER

        self.model = GLiNER.from_pretrained(str(folder), local_files_only=True)

    def run(self, texts: list[str], labels: list[str], threshold: float, batch_size: int) -> list[Any]:
        found = self.model.inference(texts, labels, threshold=threshold, batch_size=batch_size)
        return [[(one["label"], one["start"], one["end"]) for one in own] for own in found]


class _Gliner2:
    """The same of `batch_extract_entities`."""

    def __init__(self, folder: Path) -> None:
        from gliner2 import GLiNER2

        self.model = GLiNER2.from_pretrained(str(folder))

    def run(self, texts: list[str], labels: list[str], threshold: float, batch_size: int) -> list[Any]:
        found = self.model.batch_extract_entities(texts, labels, batch_size, threshold, include_spans=True)
        return [
            [(label, one["start"], one["end"]) for label, own in answer["entities"].items() for one in own]
            for answer in found
        ]


class _Gliclass:
    """The likeliest label of each text, by the pipeline."""

    def __init__(self, folder: Path) -> None:
        import gliclass
        from gliclass.pipeline import ZeroShotClassificationPipeline
        from transformers import AutoTokenizer

        model, tokenizer = gliclass.GLiClassModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.pipeline = ZeroShotClassificationPipeline(
            model, tokenizer, device="cpu", progress_bar=False, classification_type="single-label"
        )

    def run(self, texts: list[str], labels: list[str], threshold: float, batch_size: int) -> list[Any]:
        return [own[0]["label"] for own in self.pipeline(texts, labels, threshold, batch_size)]


_SIDES: dict[str, Any] = {"gliner": _Gliner, "gliner2": _Gliner2, "gliclass": _Gliclass}


if __name__ == "__main__":
    main()
