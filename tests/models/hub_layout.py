"""Checkpoint folders as repositories of the hub have them: files, config words, tensor names, a tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

Tensors = dict[str, Tensor]
Kind = Literal["wordpiece", "roberta", "unigram", "bpe", "qwen"]

# How Qwen2's tokenizer splits texts; transformers insists on it for this model_type, whatever tokenizer.json says.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = [
    "How do I reset my password?",
    "Paris",
    "The Eiffel Tower is 330 metres tall and stands in Paris, France.",
    "Ünïcode, 数字 and UPPER CASE: it's all one text.",
    "To reset your password, open Settings and choose Reset password. " * 3,
    "a b",
]


@dataclass(frozen=True)
class Hub:
    """What a repository holds.

    made: name of transformers' config and model classes (Llama); head: of the model class, where it has a head.
    options: of the config. config: what config.json says on the hub instead; None removes a key.
    tensors: from transformers' names to the hub's. ends: special tokens before and after a text (decoders).
    pooling, dense, normalize: the modules of sentence-transformers; no pooling: no such files.
    """

    architecture: str
    made: str
    options: Mapping[str, Any]
    head: str = "Model"
    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[Tensors], Tensors] = dict
    tokenizer: Kind = "bpe"
    ends: tuple[bool, bool] = (False, True)
    pooling: str | None = "lasttoken"
    dense: tuple[tuple[int, int], ...] = ()
    normalize: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    max_seq_length: int | None = 512


def write(hub: Hub, folder: Path, twin: Path) -> None:
    """The repository in `folder`, and the same model in transformers' own words in `twin`."""
    vocabulary = write_tokenizer(twin, hub.tokenizer, hub.ends)
    torch.manual_seed(0)
    config = getattr(transformers, f"{hub.made}Config")(**{"vocab_size": vocabulary, **hub.options})
    model = getattr(transformers, _stem(hub) + hub.head)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    model.save_pretrained(twin)
    if hub.pooling is not None:
        write_modules(twin, config.hidden_size, hub)
    shutil.copytree(twin, folder)
    words = {
        **_older(json.loads((folder / "config.json").read_text())),
        "architectures": [hub.architecture],
        **hub.config,
    }
    (folder / "config.json").write_text(json.dumps({key: word for key, word in words.items() if word is not None}))
    tensors = hub.tensors(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """Norms near one, small biases, tokens far apart: what a text says must outweigh what all texts share."""
    if "norm" in name.lower() or name.endswith("bias"):
        return float(name.endswith("weight")) + 0.1 * torch.randn(shape)
    return torch.randn(shape) * (1.0 if "embed" in name and "type" not in name else 0.3)


def write_tokenizer(folder: Path, kind: Kind, ends: tuple[bool, bool]) -> int:
    """A tokenizer trained on the spot; returns the size of its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if kind == "wordpiece" else ["<s>", "<pad>", "</s>", "<unk>"]
    first, last = ("[CLS]", "[SEP]") if kind == "wordpiece" else ("<s>", "</s>")
    native = _trained(kind, special)
    wanted = ends if kind in ("bpe", "qwen") else (True, True)
    single = " ".join([first] * wanted[0] + ["$A"] + [last] * wanted[1])
    if any(wanted):
        native.post_processor = processors.TemplateProcessing(
            single=single,
            pair=f"{single} $B",
            special_tokens=[(token, native.token_to_id(token)) for token in (first, last)],
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=native,
        unk_token="[UNK]" if kind == "wordpiece" else "<unk>",
        pad_token="[PAD]" if kind == "wordpiece" else "<pad>",
        model_max_length=512,
    )
    fast.save_pretrained(folder)
    return native.get_vocab_size()


def _trained(kind: Kind, special: list[str]) -> tokenizers.Tokenizer:
    trainer: Any
    if kind == "wordpiece":
        native = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        native.normalizer = normalizers.BertNormalizer(lowercase=True)
        native.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    elif kind == "unigram":
        native = tokenizers.Tokenizer(models.Unigram())
        native.pre_tokenizer = pre_tokenizers.Metaspace()
        native.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        native = tokenizers.Tokenizer(models.BPE())
        native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "qwen":
            native.normalizer = normalizers.NFC()
            split = pre_tokenizers.Split(tokenizers.Regex(_QWEN_WORDS), behavior="isolated")
            bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            native.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
        native.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    native.train_from_iterator(TEXTS, trainer)
    return native


def write_modules(folder: Path, width: int, hub: Hub) -> None:
    """modules.json and what it names, in the words that sentence-transformers 2 to 5 wrote."""
    kinds = ["Transformer", "Pooling", *["Dense"] * len(hub.dense), *["Normalize"] * hub.normalize]
    places = ["" if kind == "Transformer" else f"{place}_{kind}" for place, kind in enumerate(kinds)]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(zip(kinds, places, strict=True))
    ]
    _json(folder / "modules.json", modules)
    for path, kind in zip(places, kinds, strict=True):
        (folder / path).mkdir(exist_ok=True)
        if kind == "Pooling":
            modes = (
                "cls_token",
                "mean_tokens",
                "max_tokens",
                "mean_sqrt_len_tokens",
                "weightedmean_tokens",
                "lasttoken",
            )
            word = {"cls": "cls_token", "mean": "mean_tokens"}.get(hub.pooling or "", hub.pooling)
            flags = {f"pooling_mode_{mode}": mode == word for mode in modes}
            _json(folder / path / "config.json", {"word_embedding_dimension": width, **flags, "include_prompt": True})
    for number, (into, out) in enumerate(hub.dense, start=2):
        config = {"in_features": into, "out_features": out, "bias": False}
        _json(
            folder / f"{number}_Dense" / "config.json",
            {**config, "activation_function": "torch.nn.modules.linear.Identity"},
        )
        save_file(
            {"linear.weight": torch.randn(out, into) / into**0.5}, folder / f"{number}_Dense" / "model.safetensors"
        )
    _json(folder / "sentence_bert_config.json", {"max_seq_length": hub.max_seq_length, "do_lower_case": False})
    _json(
        folder / "config_sentence_transformers.json",
        {"prompts": dict(hub.prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def prefixed(prefix: str, *heads: str) -> Callable[[Tensors], Tensors]:
    """The same tensors under a prefix, beside heads that the model does not need."""

    def rename(tensors: Tensors) -> Tensors:
        return {prefix + name: tensor for name, tensor in tensors.items()} | {head: torch.ones(3) for head in heads}

    return rename


def _stem(hub: Hub) -> str:
    return hub.made.removesuffix("Text") if hub.head != "Model" else hub.made


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """The words of transformers 4, in which the hub's configs are written."""
    rope = config.pop("rope_parameters", None)
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    if rope is None:
        return config
    if "sliding_attention" in rope:
        near, whole = rope["sliding_attention"], rope["full_attention"]
        names = ("rope_local_base_freq", "rope_theta")
        if config["model_type"] == "modernbert":
            names = ("local_rope_theta", "global_rope_theta")
        return config | dict(zip(names, (near["rope_theta"], whole["rope_theta"]), strict=True))
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return config | kept | {"rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling}


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))
