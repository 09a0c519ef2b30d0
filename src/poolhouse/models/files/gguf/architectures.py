"""Architectures: what the keys and tensors of a GGUF file are called in the checkpoint that it was made from.

Source of the names and of what the conversion changes: llama.cpp's converter and the graphs of its architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from poolhouse.errors import CheckpointError, did_you_mean
from poolhouse.files import JsonObject
from poolhouse.models.files.gguf.header import GgufFile

# Makes a tensor of the checkpoint of those of the file.
Make = Callable[[], Tensor]
_POOLINGS = {0: None, 1: "MEAN", 2: "CLS", 3: "LAST", 4: "RANK"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture of llama.cpp as the checkpoint of one of our families.

    keys: of the header, without the architecture before them -> of config.json. optional: those that may be missing.
    config: what config.json says besides. values: other keys, and the values with which they change no number.
    names: their module -> the checkpoint's; "*" stands for the layer. qkv: the checkpoint's query, key and value, or one
    module of all three. pooled: the class of a classifier, and its head: their module -> the checkpoint's.
    """

    keys: Mapping[str, str]
    names: Mapping[str, str]
    qkv: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    classifier: str = ""
    head: Mapping[str, str] = field(default_factory=dict)


_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}
_PLAIN: dict[str, tuple[Any, ...]] = {
    "normalize_embeddings": (True,),
    "rope.scaling.type": ("none",),
    "expert_count": (0,),
    "expert_used_count": (0,),
}
_ENCODER = _PLAIN | {"attention.causal": (False,)}
_EMBEDDINGS = {
    "token_embd": "embeddings.word_embeddings",
    "token_types": "embeddings.token_type_embeddings",
}
_BERT_LAYERS = {
    "token_embd_norm": "embeddings.LayerNorm",
    "blk.*.attn_output": "encoder.layer.*.attention.output.dense",
    "blk.*.attn_output_norm": "encoder.layer.*.attention.output.LayerNorm",
}
_BERT_QKV = tuple(f"encoder.layer.*.attention.self.{name}" for name in ("query", "key", "value"))
_BERT = Architecture(
    keys=_SIZES | _NORM,
    config={"model_type": "bert", "architectures": ["BertModel"]},
    values=_ENCODER,
    names=_EMBEDDINGS
    | _BERT_LAYERS
    | {
        "position_embd": "embeddings.position_embeddings",
        "blk.*.ffn_up": "encoder.layer.*.intermediate.dense",
        "blk.*.ffn_down": "encoder.layer.*.output.dense",
        "blk.*.layer_output_norm": "encoder.layer.*.output.LayerNorm",
    },
    qkv=_BERT_QKV,
    classifier="BertForSequenceClassification",
    head={"cls": "pooler.dense", "cls.output": "classifier"},
)
_ROBERTA = replace(
    _BERT,
    config={"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"]},
    classifier="XLMRobertaForSequenceClassification",
    head={"cls": "classifier.dense", "cls.output": "classifier.out_proj"},
)
_JINA_V2 = Architecture(
    keys=_SIZES | _NORM,
    config={
        "model_type": "bert",
        "architectures": ["JinaBertModel"],
        "position_embedding_type": "alibi",
        "feed_forward_type": "geglu",
    },
    values=_ENCODER,
    names=_EMBEDDINGS
    | _BERT_LAYERS
    | {
        "blk.*.ffn_up": "encoder.layer.*.mlp.gated_layers",
        "blk.*.ffn_down": "encoder.layer.*.mlp.wo",
        "blk.*.layer_output_norm": "encoder.layer.*.mlp.layernorm",
    },
    qkv=_BERT_QKV,
)
_NOMIC = Architecture(
    keys={
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "context_length": "n_positions",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "rope.freq_base": "rotary_emb_base",
    },
    config={"model_type": "nomic_bert", "architectures": ["NomicBertModel"], "activation_function": "swiglu"},
    values=_ENCODER,
    names=_EMBEDDINGS
    | {
        "token_embd_norm": "emb_ln",
        "blk.*.attn_output": "encoder.layers.*.attn.out_proj",
        "blk.*.attn_output_norm": "encoder.layers.*.norm1",
        "blk.*.ffn_up": "encoder.layers.*.mlp.fc11",
        "blk.*.ffn_gate": "encoder.layers.*.mlp.fc12",
        "blk.*.ffn_down": "encoder.layers.*.mlp.fc2",
        "blk.*.layer_output_norm": "encoder.layers.*.norm2",
    },
    qkv=("encoder.layers.*.attn.Wqkv",),
)
_MODERN = Architecture(
    keys={**_SIZES, "attention.layer_norm_epsilon": "norm_eps"}
    | {
        "rope.freq_base": "global_rope_theta",
        "rope.freq_base_swa": "local_rope_theta",
        "attention.sliding_window": "local_attention",
        "attention.sliding_window_pattern": "global_attn_every_n_layers",
        "hidden_activation": "hidden_activation",
    },
    # Files from before these keys mean ModernBERT's own values, which are the defaults of its config too.
    optional=frozenset({"rope.freq_base_swa", "attention.sliding_window_pattern", "hidden_activation"}),
    config={"model_type": "modernbert", "architectures": ["ModernBertModel"]},
    values=_ENCODER,
    names={
        "token_embd": "embeddings.tok_embeddings",
        "token_embd_norm": "embeddings.norm",
        "blk.*.attn_norm": "layers.*.attn_norm",
        "blk.*.attn_output": "layers.*.attn.Wo",
        "blk.*.ffn_norm": "layers.*.mlp_norm",
        "blk.*.ffn_up": "layers.*.mlp.Wi",
        "blk.*.ffn_down": "layers.*.mlp.Wo",
        "output_norm": "final_norm",
    },
    qkv=("layers.*.attn.Wqkv",),
    classifier="ModernBertForSequenceClassification",
    head={"cls": "head.dense", "cls.norm": "head.norm", "cls.output": "classifier"},
)
_DECODER = Architecture(
    keys=_SIZES
    | {
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.key_length": "head_dim",
        "rope.freq_base": "rope_theta",
        "attention.causal": "is_causal",
    },
    optional=frozenset({"attention.key_length", "attention.causal"}),
    values=_PLAIN,
    names={
        "token_embd": "embed_tokens",
        "blk.*.attn_norm": "layers.*.input_layernorm",
        "blk.*.attn_q_norm": "layers.*.self_attn.q_norm",
        "blk.*.attn_k_norm": "layers.*.self_attn.k_norm",
        "blk.*.attn_output": "layers.*.self_attn.o_proj",
        "blk.*.ffn_norm": "layers.*.post_attention_layernorm",
        "blk.*.ffn_gate": "layers.*.mlp.gate_proj",
        "blk.*.ffn_up": "layers.*.mlp.up_proj",
        "blk.*.ffn_down": "layers.*.mlp.down_proj",
        "output_norm": "norm",
        "output": "lm_head",
    },
    qkv=tuple(f"layers.*.self_attn.{name}_proj" for name in "qkv"),
)
_QWEN3 = replace(
    _DECODER,
    config={"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    classifier="Qwen3ForSequenceClassification",
    head={"cls.output": "score"},
)
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "nomic-bert": _NOMIC,
    "jina-bert-v2": _JINA_V2,
    "modern-bert": _MODERN,
    "eurobert": replace(
        _DECODER,
        keys={key: ours for key, ours in _DECODER.keys.items() if key != "attention.causal"},
        values=_ENCODER,
        config={"model_type": "eurobert", "architectures": ["EuroBertModel"]},
    ),
    "qwen2": replace(_DECODER, config={"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}),
    "qwen3": _QWEN3,
}
_GATED = ("blk.*.ffn_gate", "blk.*.ffn_up")
# Keys that say again what tensors show, or that are read below.
_UNREAD = frozenset(
    (
        *("vocab_size", "pooling_type", "classifier.output_labels", "classifier.pooling_type"),
        *("attention.head_count_kv", "attention.value_length", "attention.key_length", "rope.dimension_count"),
        # The conversion writes ModernBERT's epsilon under both names.
        "attention.layer_norm_rms_epsilon",
    )
)


@dataclass(frozen=True, slots=True)
class Converted:
    """A file as a checkpoint: config.json, and its tensors by the checkpoint's names, each made when it is asked for.

    pooling: by the header; None where it does not say.
    """

    config: JsonObject
    tensors: Mapping[str, Make]
    pooling: str | None


def converted(file: GgufFile) -> Converted:
    """What a file was made from.

    Raises:
        CheckpointError: an architecture, a key or a tensor that is not understood, or one that is missing.
    """
    return _Conversion(file).result()


class _Conversion:
    """One file on its way."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._name = self._checked_name()
        self._kind = ARCHITECTURES[self._name]
        if self._name == "bert" and file.fields.get("tokenizer.ggml.model") != "bert":
            self._kind = _ROBERTA

    def result(self) -> Converted:
        config = self._config()
        pooling = self._pooling()
        tensors = self._tensors()
        if pooling == "RANK" or any(name.startswith("cls.") for name in self._file):
            self._as_classifier(config, tensors)
            pooling = None
        if self._kind is _ROBERTA:
            self._with_padding_rows(config, tensors)
        return Converted(config, tensors, pooling)

    def _fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self._file.path}: {message}")

    def _checked_name(self) -> str:
        fields = self._file.fields
        kind, name = fields.get("general.type", "model"), fields.get("general.architecture")
        if kind != "model":
            self._fail(f"the file is a GGUF of type {kind!r}, and no model.")
        if fields.get("split.count", 0) > 1:
            self._fail("the file is one of several parts. Merge them by llama.cpp's `llama-gguf-split --merge`.")
        if name not in ARCHITECTURES:
            near = did_you_mean(str(name), ARCHITECTURES)
            self._fail(
                f"the architecture {name!r} is not served from GGUF files; {', '.join(ARCHITECTURES)} are.{near} "
                "Use the folder or hub id that the file was made from."
            )
        return str(name)

    def _key(self, key: str) -> Any:
        return self._file.fields.get(f"{self._name}.{key}")

    def _config(self) -> JsonObject:
        """config.json, by keys of which each is understood."""
        kind, prefix = self._kind, f"{self._name}."
        config: JsonObject = dict(kind.config)
        for key, ours in kind.keys.items():
            value = self._key(key)
            if value is None and key not in kind.optional:
                self._fail(f"the header lacks {prefix}{key}.")
            if isinstance(value, np.ndarray | list):
                self._fail(f"{prefix}{key} is a list; layers that differ in it are not served from GGUF files.")
            if value is not None:
                config[ours] = value
        for name, value in self._file.fields.items():
            key = name.removeprefix(prefix)
            if key == name or key in kind.keys or key in _UNREAD:
                continue
            if key not in kind.values:
                self._fail(f"the header has {name}, which is not known here and may change numbers.")
            if isinstance(value, np.ndarray) or value not in kind.values[key]:
                self._fail(f"{name} is {value!r}; served is {' or '.join(map(repr, kind.values[key]))}.")
        self._check_heads(config)
        config["tie_word_embeddings"] = "output.weight" not in self._file
        return config

    def _check_heads(self, config: JsonObject) -> None:
        """Refuse heads of sizes that the family does not have."""
        features, heads = self._key("embedding_length"), self._key("attention.head_count")
        if not isinstance(heads, int) or not isinstance(features, int) or heads < 1:
            self._fail(f"{self._name}.attention.head_count and .embedding_length must be whole numbers.")
        width = config.get("head_dim", features // heads)
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            if self._key(key) not in (None, width):
                self._fail(f"{self._name}.{key} is {self._key(key)}, and heads are {width} wide.")
        if "num_key_value_heads" not in self._kind.keys.values() and self._key("attention.head_count_kv") not in (
            None,
            heads,
        ):
            self._fail(f"{self._name}.attention.head_count_kv differs from the {heads} heads of the queries.")

    def _pooling(self) -> str | None:
        number = self._key("pooling_type")
        if number is not None and number not in _POOLINGS:
            self._fail(f"{self._name}.pooling_type is {number!r}, which is none of 0 to 4.")
        return None if number is None else _POOLINGS[number]

    def _tensors(self) -> dict[str, Make]:
        """The tensors of the backbone, by the checkpoint's names; those of a head under their own."""
        file, made = self._file, dict[str, Make]()
        for name in file:
            module, _, kind = name.rpartition(".")
            layer = module.split(".")[1] if module.startswith("blk.") else ""
            pattern = f"blk.*.{module.split('.', 2)[2]}" if layer and module.count(".") > 1 else module
            if pattern in ("blk.*.attn_q", "blk.*.attn_k", "blk.*.attn_v", "blk.*.attn_qkv"):
                made |= self._qkv(layer, kind)
            elif self._kind is _JINA_V2 and f"blk.{layer}.ffn_gate.{kind}" in file and pattern in _GATED:
                both = [f"blk.{layer}.{part}.{kind}" for part in ("ffn_gate", "ffn_up")]
                self._check_present(both)
                # The gate stands first in the checkpoint.
                made[f"encoder.layer.{layer}.mlp.gated_layers.{kind}"] = partial(self._together, both)
            elif pattern in self._kind.names:
                made[f"{self._kind.names[pattern].replace('*', layer)}.{kind}"] = partial(file.__getitem__, name)
            elif not (module == "cls" or module.startswith("cls.")):
                self._fail(f"the tensor {name} is not known to the architecture {self._name}.")
        return made

    def _qkv(self, layer: str, kind: str) -> dict[str, Make]:
        """Query, key and value of a layer: in three or in one, as the checkpoint has them."""
        ours = [f"{name.replace('*', layer)}.{kind}" for name in self._kind.qkv]
        fused = f"blk.{layer}.attn_qkv.{kind}"
        apart = [f"blk.{layer}.attn_{part}.{kind}" for part in "qkv"]
        if fused not in self._file:
            self._check_present(apart)
        if len(ours) == 1:
            source = partial(self._together, [fused] if fused in self._file else apart)
            return {ours[0]: source}
        if fused not in self._file:
            return {name: partial(self._file.__getitem__, theirs) for name, theirs in zip(ours, apart, strict=True)}
        return {name: partial(self._part_of_qkv, fused, part) for part, name in enumerate(ours)}

    def _part_of_qkv(self, fused: str, part: int) -> Tensor:
        heads = self._key("attention.head_count")
        shared = self._key("attention.head_count_kv") or heads
        width = self._key("attention.key_length") or self._key("embedding_length") // heads
        whole = self._file[fused]
        if len(whole) != (heads + 2 * shared) * width:
            self._fail(f"{fused} has {len(whole)} rows, not those of {heads} and twice {shared} heads {width} wide.")
        parts: tuple[Tensor, ...] = torch.split(whole, [heads * width, shared * width, shared * width])
        return parts[part]

    def _together(self, names: list[str]) -> Tensor:
        return torch.cat([self._file[name] for name in names])

    def _check_present(self, names: list[str]) -> None:
        missing = [name for name in names if name not in self._file]
        if missing:
            self._fail(f"the file lacks the tensors {missing}, but has their companions.")

    def _as_classifier(self, config: JsonObject, tensors: dict[str, Make]) -> None:
        """The config and the head of a model that ranks or labels."""
        kind, file = self._kind, self._file
        found = {name for name in file if name == "cls" or name.startswith("cls.")}
        if not kind.head:
            self._fail(f"heads ({sorted(found)}) of the architecture {self._name} are not served from GGUF files.")
        missing = [module for module in kind.head if f"{module}.weight" not in file]
        if missing:
            also = " The conversion leaves out BERT's pooler, without which its head means nothing." if found else ""
            self._fail(f"the head lacks {missing}.{also} Use the folder or hub id that the file was made from.")
        labels = [str(label) for label in self._key("classifier.output_labels") or ()]
        config["architectures"] = [kind.classifier]
        for name in sorted(found):
            module, _, end = name.rpartition(".")
            if module not in kind.head:
                self._fail(f"the tensor {name} is not known to heads of the architecture {self._name}.")
            tensors[f"{kind.head[module]}.{end}"] = partial(file.__getitem__, name)
        rows = file.stored["cls.output.weight"].shape[0]
        if kind is _QWEN3:
            tensors["score.weight"], rows = self._difference(labels), 1
            labels = []
        if kind is _MODERN:
            # llama.cpp takes the mean where a file does not say.
            pooling = _POOLINGS.get(self._key("classifier.pooling_type") or 1)
            config["classifier_pooling"] = str(pooling).lower()
        if labels and len(labels) != rows:
            self._fail(f"{self._name}.classifier.output_labels are {len(labels)}, and cls.output has {rows} rows.")
        config["id2label"] = dict(enumerate(labels or map("LABEL_{}".format, range(rows))))

    def _difference(self, labels: list[str]) -> Make:
        """Qwen3-Reranker's head as one row: yes less no, whose sigmoid is the probability of yes."""
        if sorted(labels) != ["no", "yes"] or self._file.stored["cls.output.weight"].shape[0] != 2:
            self._fail(f"the head of a Qwen3 reranker has the labels yes and no; the header says {labels}.")

        def row() -> Tensor:
            rows = self._file["cls.output.weight"].float()
            return rows[labels.index("yes")][None] - rows[labels.index("no")][None]

        return row

    def _with_padding_rows(self, config: JsonObject, tensors: dict[str, Make]) -> None:
        """Put rows before the table of positions, which the conversion has cut off up to that of the padding."""
        padding = self._file.fields.get("tokenizer.ggml.padding_token_id", 1)
        name = "embeddings.position_embeddings.weight"
        config["pad_token_id"] = padding
        config["max_position_embeddings"] += padding + 1
        table = tensors.get(name)
        if table is None:
            self._fail("the file lacks position_embd.weight.")

        def whole() -> Tensor:
            rows = table()
            return torch.cat([rows.new_zeros(padding + 1, rows.shape[1]), rows])

        tensors[name] = whole
