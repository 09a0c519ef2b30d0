"""Shapes: random checkpoints with the sizes of published models, written once into a cache folder.

Weights are random, and speed does not depend on them. The tokenizer is that of the embedded MiniLM, so texts have the same
tokens in every shape, and the table of tokens has its 30,522 rows: a table is only looked up.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.models.files.hub import embedded_model

_TOKENS = 30522


@dataclass(frozen=True, slots=True)
class TextShape:
    """Sizes of a model of texts.

    family: of transformers' classes. kind: what it answers: "embed", "rerank" (a cross-encoder), "colbert", or "causal" (a
    language model that reranks). options: of transformers' config. pooling: sentence-transformers' name of it.
    max_tokens: longest text. dtype: that the weights are stored in.
    """

    family: str
    options: Mapping[str, Any]
    kind: str = "embed"
    pooling: str = "mean"
    max_tokens: int = 512
    dtype: str = "float32"


def _bert(layers: int, width: int, **options: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
    return {"num_attention_heads": 12, "max_position_embeddings": 512, "pad_token_id": 0, **sizes, **options}


def _xlmr(layers: int) -> dict[str, Any]:
    # Positions begin behind the id of the padding token.
    ids = {"bos_token_id": 101, "eos_token_id": 102, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return _bert(layers, 1024, num_attention_heads=16, **(ids | {"max_position_embeddings": 8194}))


def _qwen3(layers: int, width: int, inner: int, heads: int, head_dim: int = 128) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 102,
    }


_MODERNBERT = {
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "intermediate_size": 1152,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 101,
    "cls_token_id": 101,
    "eos_token_id": 102,
    "sep_token_id": 102,
}
_LAST = {"pooling": "lasttoken", "max_tokens": 8192, "dtype": "bfloat16"}
SHAPES: Mapping[str, TextShape] = {
    # The embedded model itself, but where --layers shortens it.
    "minilm": TextShape("Bert", _bert(6, 384)),
    "bge-base": TextShape("Bert", _bert(12, 768), pooling="cls"),
    "modernbert-base": TextShape("ModernBert", _MODERNBERT, max_tokens=8192),
    "qwen3-0.6b": TextShape("Qwen3", _qwen3(28, 1024, 3072, 16), **_LAST),  # type: ignore[arg-type]
    "bge-m3": TextShape("XLMRoberta", _xlmr(24), pooling="cls", max_tokens=8192),
    "qwen3-4b": TextShape("Qwen3", _qwen3(36, 2560, 9728, 32), **_LAST),  # type: ignore[arg-type]
    "minilm-reranker": TextShape("Bert", _bert(6, 384), kind="rerank"),
    "bge-reranker-v2-m3": TextShape("XLMRoberta", _xlmr(24), kind="rerank", max_tokens=8192),
    "minilm-colbert": TextShape("Bert", _bert(6, 384), kind="colbert"),
    "qwen3-reranker-small": TextShape(
        "Qwen3", _qwen3(8, 512, 1536, 8, head_dim=64), kind="causal", max_tokens=8192, dtype="bfloat16"
    ),
}


def names_of(*kinds: str) -> list[str]:
    """The names of the shapes of these kinds."""
    return [name for name, shape in SHAPES.items() if shape.kind in kinds]


def check_shape(name: str, *kinds: str, layers: int | None = None) -> None:
    """Refuse what is neither a shape of these kinds nor the folder of a model, and more layers than a shape has.

    Raises:
        ConfigError: with what is possible.
    """
    fitting = names_of(*kinds)
    if name not in fitting and not (Path(name) / "config.json").is_file():
        raise ConfigError(
            f"--shape is {name!r}; it must be one of {', '.join(fitting)}, or the folder of a model."
            f"{did_you_mean(name, fitting)}"
        )
    _check_layers(name, layers)


def _check_layers(name: str, layers: int | None) -> None:
    if layers is None:
        return
    if name not in SHAPES:
        raise ConfigError(f"--layers shortens random weights; {name} is a model as it is.")
    whole = int(SHAPES[name].options["num_hidden_layers"])
    if not 0 < layers <= whole:
        raise ConfigError(f"--layers is {layers}; {name} has {whole}.")


def default_cache() -> Path:
    """Where checkpoints and exports are kept, by the rules of the desktop."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "poolhouse" / "bench"


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint on this machine.

    folder: its files. cache: for what peers export of it. matrix_weights: entries of its matrices, without the tables
    that are only looked up. options: of its config. kind: as a `TextShape` has it.
    """

    name: str
    folder: Path
    cache: Path
    matrix_weights: int
    layers: int
    options: Mapping[str, Any]
    kind: str = "embed"

    @property
    def title(self) -> str:
        """Its shape in words: the name, layers by width."""
        return f"{self.name} ({self.layers} x {self.options['hidden_size']})"


def checkpoint(
    name: str, cache: Path, layers: int | None = None, overrides: Mapping[str, Any] | None = None
) -> Written:
    """The checkpoint of a shape, written if it is not there. layers: fewer than the shape has. overrides: of its options.

    Raises:
        ConfigError: more layers than the shape has. CheckpointError: the embedded model is not installed.
    """
    _check_layers(name, layers)
    if name not in SHAPES:
        return _found(Path(name), cache)
    shape = SHAPES[name]
    whole = int(shape.options["num_hidden_layers"])
    options = dict(shape.options) | dict(overrides or {}) | {"num_hidden_layers": layers or whole}
    parts = [
        name,
        *([f"{layers}-layers"] if layers else []),
        *(f"{key}-{value}" for key, value in (overrides or {}).items()),
    ]
    own = cache / "-".join(parts).replace("qwen3-reranker", "Qwen3-Reranker")
    folder = own / "model"
    if name == "minilm" and layers is None and not overrides:
        folder = embedded_model()
    elif not (folder / "written").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder, shape, options)
        (folder / "written").touch()
    return Written(name, folder, own, _matrix_weights(options), int(options["num_hidden_layers"]), options, shape.kind)


def _found(folder: Path, cache: Path) -> Written:
    """A model that is there already; its matrices are counted by its tensors."""
    from safetensors import safe_open

    options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                sizes = tensors.get_slice(name).get_shape()
                if len(sizes) == 2 and "embed" not in name and "pooler" not in name:
                    count += sizes[0] * sizes[1]
    name, made = folder.resolve().name, " ".join(options.get("architectures") or ())
    ends = {"ForSequenceClassification": "rerank", "ForCausalLM": "causal"}
    kind = next((kind for end, kind in ends.items() if made.endswith(end)), "embed")
    if any(folder.glob("*_Dense")):
        kind = "colbert"
    return Written(name, folder, cache / name, count, int(options["num_hidden_layers"]), options, kind)


def _matrix_weights(options: Mapping[str, Any]) -> int:
    """Entries of the matrices of all layers."""
    width, inner = options["hidden_size"], options["intermediate_size"]
    if "head_dim" in options:  # decoders: grouped heads, and a gate
        size = options["head_dim"] * options["num_attention_heads"]
        shared = options["head_dim"] * options["num_key_value_heads"]
        layer = width * (2 * size + 2 * shared) + 3 * width * inner
    else:
        gated = 3 if "cls_token_id" in options else 2
        layer = 4 * width**2 + gated * width * inner
    return int(layer * options["num_hidden_layers"])


def _write(folder: Path, shape: TextShape, options: Mapping[str, Any]) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{shape.family}Config")(vocab_size=_TOKENS, **options)
    classes = {"rerank": "ForSequenceClassification", "causal": "ForCausalLM"}
    made = getattr(transformers, shape.family + classes.get(shape.kind, "Model"))
    if shape.kind == "rerank":
        config.num_labels = 1
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = made(config).to(getattr(torch, shape.dtype))
    model.save_pretrained(folder)
    _write_tokenizer(folder, shape)
    if shape.kind in _WRITERS:
        _WRITERS[shape.kind](folder, shape, options)


def _write_tokenizer(folder: Path, shape: TextShape) -> None:
    """The embedded model's; a language model puts nothing round its texts, and knows the marks of its template."""
    source = embedded_model()
    native = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    native |= {"truncation": None, "padding": None}
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"model_max_length": shape.max_tokens}
    if shape.kind == "causal":
        native["post_processor"] = None
        # Rows of the vocabulary that no text uses.
        for place, mark in enumerate(("<|im_start|>", "<|im_end|>", "<think>", "</think>"), start=1):
            native["model"]["vocab"][mark] = native["model"]["vocab"].pop(f"[unused{place}]")
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            native["added_tokens"].append(
                {"id": native["model"]["vocab"][mark], "content": mark, "special": True, **flags}
            )
        native["added_tokens"].sort(key=lambda token: token["id"])
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"} | {
            "model_max_length": shape.max_tokens
        }
    elif shape.family != "Bert":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    _json(folder / "tokenizer.json", native)
    _json(folder / "tokenizer_config.json", settings)


def _write_pooling(folder: Path, shape: TextShape, options: Mapping[str, Any]) -> None:
    kinds = "sentence_transformers.models."
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    _json(
        folder / "modules.json",
        [
            {"idx": place, "name": str(place), "path": path, "type": kinds + kind}
            for place, (path, kind) in enumerate(modules)
        ],
    )
    (folder / "1_Pooling").mkdir()
    names = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
    modes = {f"pooling_mode_{value}": name == shape.pooling for name, value in names.items()}
    _json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": options["hidden_size"], **modes})
    (folder / "2_Normalize").mkdir()
    _json(folder / "sentence_bert_config.json", {"max_seq_length": shape.max_tokens, "do_lower_case": False})


def _write_colbert(folder: Path, shape: TextShape, options: Mapping[str, Any]) -> None:
    """PyLate's layout: a projection to 128, and markers that Bert's vocabulary has."""
    import string

    import torch
    from safetensors.torch import save_file

    width = options["hidden_size"]
    dense = folder / "1_Dense"
    dense.mkdir()
    function = "torch.nn.modules.linear.Identity"
    sizes = {"in_features": width, "out_features": 128, "bias": False, "use_residual": False}
    _json(dense / "config.json", {**sizes, "activation_function": function})
    save_file({"linear.weight": torch.randn(128, width) / width**0.5}, dense / "model.safetensors")
    _json(
        folder / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
        ],
    )
    _json(folder / "sentence_bert_config.json", {"max_seq_length": 255, "do_lower_case": False})
    words = {"query_prefix": "[unused0]", "document_prefix": "[unused1]", "query_length": 32, "document_length": 256}
    switches = {"attend_to_expansion_tokens": False, "do_query_expansion": True, "similarity_fn_name": "MaxSim"}
    _json(
        folder / "config_sentence_transformers.json",
        {"model_type": "ColBERT", "prompts": {}, "skiplist_words": list(string.punctuation), **words, **switches},
    )


def _write_card(folder: Path, *_: object) -> None:
    (folder / "README.md").write_text("---\npipeline_tag: text-ranking\n---\n# Random weights\n", encoding="utf-8")


_WRITERS: Mapping[str, Callable[[Path, TextShape, Mapping[str, Any]], None]] = {
    "embed": _write_pooling,
    "colbert": _write_colbert,
    "causal": _write_card,
}


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
