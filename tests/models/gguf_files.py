"""GGUF files as llama.cpp's converter writes them: its names and keys, by the package gguf, of a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType, TokenType, quants
from safetensors.torch import load_file, save_file
from torch import Tensor

# The key of the header -> that of config.json, for what all architectures have.
SIZES = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "rope.freq_base": ("rope_theta", "rotary_emb_base", "global_rope_theta"),
    "rope.freq_base_swa": ("local_rope_theta",),
    "attention.sliding_window": ("local_attention",),
    "attention.sliding_window_pattern": ("global_attn_every_n_layers",),
}
POOLINGS = {"mean": 1, "cls": 2, "lasttoken": 3, "rank": 4}
# Tables that stay float32 in quantised files.
_FLOAT = ("position_embd", "token_types")
KINDS = {kind.name: kind for kind in GGMLQuantizationType}


def write_gguf(
    path: Path,
    folder: Path,
    architecture: str,
    *,
    tokenizer: str = "bert",
    pre: str | None = None,
    pooling: str | None = None,
    kind: str = "F32",
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors,
) -> None:
    """The checkpoint in `folder` as a GGUF file.

    tokenizer, pre: llama.cpp's names. keys: others, without the architecture before them where a dot leads; None removes
    one. tensors: instead of the folder's. change: of tensors by llama.cpp's names.
    """
    config = json.loads((folder / "config.json").read_text())
    config |= {key: value for key, value in (config.get("rope_parameters") or {}).items() if key == "rope_theta"}
    own = load_file(folder / "model.safetensors") if tensors is None else tensors
    fields: dict[str, Any] = {
        **{f".{key}": next((config[name] for name in names if name in config), None) for key, names in SIZES.items()},
        ".attention.causal": None if architecture.startswith("qwen") else False,
        ".pooling_type": None if pooling is None else POOLINGS[pooling],
        **_vocabulary(folder, tokenizer, pre),
        **(keys or {}),
    }
    if ".context_length" not in (keys or {}):
        fields[".context_length"] -= _cut(config)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if value is not None:
            _add(writer, architecture + key if key.startswith(".") else key, value)
    for name, tensor in change(_renamed(own, architecture, config)).items():
        chosen = kind_of(name, tensor, kind)
        packed = quants.quantize(tensor.float().numpy(), chosen)
        writer.add_tensor(name, packed, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def kind_of(name: str, tensor: Tensor, kind: str) -> GGMLQuantizationType:
    """The kind of blocks that a tensor gets in a file of this kind."""
    of_kind = KINDS[kind]
    small = tensor.ndim < 2 or tensor.shape[-1] % gguf.GGML_QUANT_SIZES[of_kind][0] or name.startswith(_FLOAT)
    return GGMLQuantizationType.F32 if small else of_kind


def round_as(folder: Path, architecture: str, kind: str) -> None:
    """Let the checkpoint in `folder` hold the numbers that are left of its own in a file of this kind."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        (called,) = _renamed({name: tensor}, architecture, config) or ("",)
        chosen = kind_of(called, tensor, kind)
        if called and chosen != GGMLQuantizationType.F32:
            packed = quants.quantize(tensor.float().numpy(), chosen)
            tensors[name] = torch.from_numpy(quants.dequantize(packed, chosen)).reshape(tensor.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _renamed(tensors: Mapping[str, Tensor], architecture: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by llama.cpp's names, positions cut as its converter cuts them; without a pooler and heads of training."""
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, 64)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(("pooler.", "lm_head.bias", "cls.", "embeddings.position_ids")):
            continue
        called = names.get_name(name.removeprefix("roberta."), (".weight", ".bias"))
        assert called is not None, name
        found[called] = tensor[_cut(config) if called == "position_embd.weight" else 0 :].contiguous()
    return found


def _cut(config: dict[str, Any]) -> int:
    """Rows of the table of positions that the converter cuts off."""
    return int(config["pad_token_id"]) + 1 if "roberta" in config["model_type"] else 0


def _vocabulary(folder: Path, model: str, pre: str | None) -> dict[str, Any]:
    """The keys of a tokenizer.json, as llama.cpp's converter has them."""
    own = json.loads((folder / "tokenizer.json").read_text())
    native = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    native.no_padding()
    native.no_truncation()
    added = native.get_added_tokens_decoder()
    tokens = [str(native.id_to_token(number)) for number in range(native.get_vocab_size())]
    types = [
        (TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        if number in added
        else TokenType.NORMAL
        for number in range(len(tokens))
    ]
    unknown = next(number for number, token in enumerate(tokens) if token in ("[UNK]", "<unk>", "<|endoftext|>"))
    padding = next(number for number, token in enumerate(tokens) if token in ("[PAD]", "<pad>", "<|endoftext|>"))
    whole = native.encode("a")
    ends = [number for number, word in zip(whole.ids, whole.word_ids, strict=True) if word is None]
    first = ends[0] if whole.word_ids[0] is None else None
    last = ends[-1] if whole.word_ids[-1] is None else None
    fields: dict[str, Any] = {
        "model": model,
        "pre": pre,
        "token_type": [int(kind) for kind in types],
        "unknown_token_id": unknown,
        "padding_token_id": padding,
        "bos_token_id": first,
        "eos_token_id": last,
        "seperator_token_id": last,
        "add_bos_token": first is not None,
        "add_eos_token": last is not None,
        "tokens": tokens,
    }
    if model == "bert":
        fields["tokens"] = [
            token if kind == TokenType.CONTROL else token[2:] if token.startswith("##") else f"\u2581{token}"
            for token, kind in zip(tokens, types, strict=True)
        ]
    if model == "gpt2":
        merges = own["model"]["merges"]
        fields["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    if model == "t5":
        fields["scores"] = [score for _, score in own["model"]["vocab"]]
        fields["token_type"][unknown] = int(TokenType.UNKNOWN)
        characters = (own["normalizer"] or {}).get("precompiled_charsmap")
        if characters is not None:
            import base64

            fields["precompiled_charsmap"] = list(base64.b64decode(characters))
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
