"""How many texts a second are read with labels: by Poolhouse and by gliner, gliner2 and gliclass; and what pruning costs.

    python benchmarks/extraction.py --peers PEERS [--work gliner,gliner2,gliclass,pruning] [--json FILE]

PEERS is an environment with gliner 0.2.29, gliner2 2.1.0 and gliclass 0.1.21, or its Python. Texts are ragged, of 5 to
200 words. Models are random DeBERTas with MiniLM's tokenizer, in float32. Sides take turns, each in a process of its own;
a peer gets the best batch size of a short trial. `poolhouse bench report FILE` writes the tables of documents.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from safetensors.torch import load_file, save_file

from poolhouse.bench.measure import Bench, Crew, Side
from poolhouse.bench.report import Goal, Row, number
from poolhouse.bench.sides import US, Commands, Result, SideProcess, find_python, seconds_of, serve_commands
from poolhouse.data import short_texts
from poolhouse.models.files.hub import embedded_model

LABELS = ["person", "organisation", "place", "date", "product", "event", "law", "amount"]
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
# Parts that are found in a hundred words, by the threshold that is sought for it.
FOUND = 5.0
WITHOUT = f"{US}, scores alone"
WORDS = {
    "gliner": "texts, 8 labels, parts of texts (GLiNER)",
    "gliner2": "texts, 8 labels, parts of texts (GLiNER2)",
    "gliclass": "texts, 8 labels, the likeliest (GLiClass)",
    "pruning": "documents of one query, scores and kept sentences (Provence)",
}


def main() -> None:
    if sys.argv[1:2] == ["--side"]:
        serve_commands(lambda: ours(*sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--work", default=",".join(WORDS))
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    python = find_python(asked.peers)
    texts = short_texts(asked.texts, 5, 200)
    bench = Bench(asked.rounds, progress=lambda what: print(what, file=sys.stderr, flush=True))
    rows = []
    for work in asked.work.split(","):
        with tempfile.TemporaryDirectory() as folder:
            made(Path(folder), work, asked.width, asked.layers)
            scale(Path(folder) / "model.safetensors")
            rows.append(row_of(bench, work, Path(folder), python, texts, f"DeBERTa ({asked.layers} x {asked.width})"))
        others = "; ".join(
            f"{side.name} {number(side.median)}, ratio {rows[-1].ratio:.2f}" for side in rows[-1].sides[1:]
        )
        print(f"{rows[-1].work}: Poolhouse {number(rows[-1].ours.median)} {rows[-1].unit}; {others}", flush=True)
        print(*rows[-1].notes, sep="\n", flush=True)
    arguments = [word for word in sys.argv[1:] if word not in ("--peers", str(asked.peers), "--json", str(asked.json))]
    command = " ".join(["python benchmarks/extraction.py", *(["--peers PEERS"] if asked.peers else []), *arguments])
    if asked.json is not None:
        asked.json.write_text(bench.report(command, rows, None, ()).as_json() + "\n")


def row_of(bench: Bench, work: str, folder: Path, python: Path, texts: list[str], shape: str) -> Row:
    """One kind of work by all sides, in turn."""
    script = str(Path(__file__).resolve())
    with Crew(bench.progress) as crew:
        mine = crew.add(US, lambda: SideProcess(US, [sys.executable, script, "--side", work, str(folder)]), needed=True)
        assert mine is not None
        asked: dict[str, Any] = {"texts": texts, "labels": LABELS}
        if work == "pruning":
            crew.add(
                WITHOUT, lambda: SideProcess(WITHOUT, [sys.executable, script, "--side", "scores", str(folder)]), True
            )
        else:
            peer = [str(python), "-P", str(Path(script).with_name("extraction_peers.py")), work]
            version = subprocess.run(peer, capture_output=True, text=True, check=True).stdout.strip()
            crew.add(f"{work} {version}", lambda: SideProcess(work, [*peer, str(folder)]), needed=True)
            asked["threshold"] = mine.process.do("threshold", texts=texts[:24], labels=LABELS)["threshold"]
        found = {side.name: trial(side, asked, bench.progress) for side in crew.sides}

        def rates(side: Side) -> list[float]:
            done = side.process.do("run", **asked, **side.setting)
            return [len(texts) / done["seconds"], len(texts) / done["cpu"]]

        values = crew.rounds(bench.rounds, rates, work)
        by_cpu = [ours / theirs for ours, theirs in zip(*(values[side.name][1] for side in crew.sides), strict=True)]
        return Row(
            "extraction",
            f"{len(texts)} {WORDS[work]}",
            shape,
            "float32",
            "texts/s",
            crew.figures(values, 0),
            goal=None if work == "pruning" else Goal(least=2.0),
            notes=(*agreement(work, found), f"By seconds of CPU the ratio is {statistics.median(by_cpu):.2f}."),
        )


def trial(side: Side, asked: dict[str, Any], progress: Callable[[str], None]) -> list[Any]:
    """What a side finds, while it warms; a peer is given its best batch size by a quarter of the texts."""
    if US not in side.name:
        progress(f"{side.name}: its best batch size")
        part = {**asked, "texts": asked["texts"][::4]}
        seconds = {size: side.process.do("run", **part, batch_size=size)["seconds"] for size in BATCH_SIZES}
        side.setting = {"batch_size": min(seconds, key=lambda size: seconds[size])}
    found: list[Any] = side.process.do("run", **asked, **side.setting)["found"]
    return found


def agreement(work: str, found: dict[str, list[Any]]) -> list[str]:
    """How far both sides find the same, in words."""
    if work == "pruning":
        return []
    us, them = ([_parts(own) for own in side] for side in found.values())
    both, either = (sum(map(len, map(kind, us, them))) for kind in (set.intersection, set.union))
    return [
        f"{list(found)[1]} reads texts in the order given. Of {either} answers of either side {both} are those of both."
    ]


def _parts(own: Any) -> set[Any]:
    return {own} if isinstance(own, str) else set(map(tuple, own))


def ours(work: str, folder: str) -> Commands:
    """What our side is asked to do."""
    from poolhouse import LLM

    llm = LLM(folder, dtype="float32")

    def extract(texts: list[str], labels: list[str], threshold: float) -> list[Any]:
        outputs = llm.extract(texts, labels, threshold=threshold, use_tqdm=False)
        return [[(one.label, one.start, one.end) for one in output.outputs.entities] for output in outputs]

    def classify(texts: list[str], labels: list[str], threshold: float) -> list[Any]:
        return [output.outputs.label for output in llm.classify(texts, labels=labels, use_tqdm=False)]

    def prune(texts: list[str], labels: list[str]) -> list[Any]:
        outputs = llm.score(labels[0], texts, use_tqdm=False, prune=0.1 if work == "pruning" else None)
        return [output.outputs.score for output in outputs]

    do: Callable[..., list[Any]] = {"gliclass": classify, "pruning": prune, "scores": prune}.get(work, extract)

    def run(**asked: Any) -> Result:
        found: list[Any] = []
        used = time.process_time()
        seconds = seconds_of(lambda: found.extend(do(**asked)))
        return {"seconds": seconds, "cpu": time.process_time() - used, "found": found}

    def threshold(texts: list[str], labels: list[str]) -> Result:
        """The one by which so many parts are found: the best are chosen first, whatever it is."""
        if do is not extract:
            return {"threshold": 0.5}
        wanted = int(FOUND * sum(len(text.split()) for text in texts) / 100)
        outputs = llm.extract(texts, labels, threshold=0.0, use_tqdm=False)
        scores = sorted((one.score for output in outputs for one in output.outputs.entities), reverse=True)
        return {"threshold": (scores[wanted] + scores[wanted + 1]) / 2}

    return {"run": run, "threshold": threshold}


def made(folder: Path, work: str, width: int, layers: int) -> None:
    """A checkpoint for the work: the tiny ones of the tests, wider."""
    from tests.models import pruners, tiny_gliclass, tiny_gliner

    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    shape |= {"intermediate_size": 4 * width, "max_position_embeddings": 512, "position_buckets": 256}
    if work in ("gliner", "gliner2"):
        tiny_gliner.ENCODERS["deberta"] |= shape
        tiny_gliner.WIDTH = width
        tiny_gliner.tokenizer = lambda folder, _, marks=tiny_gliner.MARKS: len(tokenizer(folder, marks))
        tiny_gliner.SEEDS |= {"spans": 0, "schema": 0}
        if work == "gliner":
            tiny_gliner.save(folder, "spans", hidden_size=width, max_width=12, max_len=384)
        else:
            tiny_gliner.save_2(folder, "schema", max_width=8)
    elif work == "gliclass":
        tiny_gliclass.ROWS["wide"] = (tiny_gliclass.DEBERTA | shape | {"pad_token_id": 0}, {})
        tiny_gliclass.tokenizer = lambda folder: tokenizer(
            folder, (tiny_gliclass.LABEL, tiny_gliclass.SEP, tiny_gliclass.EXAMPLE)
        )
        tiny_gliclass.save(folder, "wide")
    else:
        kind = pruners.KINDS["provence"]
        options = pruners.DEBERTA | shape | {"pooler_hidden_size": width}
        pruners.KINDS["wide"] = dataclasses.replace(kind, options=options)
        pruners.save_tokenizer = lambda folder, _: tokenizer(folder, ())
        pruners.VOCABULARY = range(len(tokenizer(folder, ())))
        pruners.Pruner(folder, "wide")


def scale(file: Path) -> None:
    """Make the matrices as small as those of models before they are trained, so that scores differ."""
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.ndim > 1:
            tensor.mul_(0.02 / tensor.std())
    save_file(tensors, file, {"format": "pt"})


def tokenizer(folder: Path, marks: tuple[str, ...]) -> Any:
    """MiniLM's, with further tokens; saved."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    native = Tokenizer.from_file(str(embedded_model() / "tokenizer.json"))
    native.no_padding()
    native.no_truncation()
    names = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "cls_token", "sep_token", "unk_token")}
    whole = PreTrainedTokenizerFast(
        tokenizer_object=native, model_max_length=512, model_input_names=["input_ids", "attention_mask"], **names
    )
    whole.add_tokens(list(marks), special_tokens=True)
    whole.save_pretrained(folder)
    return whole


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
