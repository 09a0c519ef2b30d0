"""Late-interaction checkpoints as Stanford's ColBERT, PyLate and sentence-transformers leave them, tiny and random."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from tokenizers import AddedToken, models, pre_tokenizers, processors

from tests.models.hub_layout import random_tensor
from tests.models.parity import change_config, change_tensors

# Shorter and longer than both sides' lengths; with a word nobody knows; nothing but punctuation; empty.
QUERIES = ["how do i reset it?", "paris", "", "who? " * 9, "the tower ~ stands (tall), in paris", "a b c d e f g h"]
DOCUMENTS = [
    "Open settings, and choose: reset!",
    "The tower is tall. It stands in Paris; so it does.",
    "?!... --",
    "",
    "one, two. " * 14,
    "a ~ b",
]
QUERY_LENGTH, DOCUMENT_LENGTH = 14, 24

# No model knows "~": it stands for the unknown token, which is not skipped as punctuation.
_PUNCTUATION = [character for character in string.punctuation if character != "~"]
_WORDS = [
    *"abcdefgh",
    *("reset", "how", "do", "i", "it", "paris", "the", "tower", "is", "tall", "stands", "in", "so", "does"),
    *("one", "two", "who", "open", "settings", "choose", "and"),
]

WIDTH = 32
LAYERS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
}


@dataclass(frozen=True)
class Layout:
    """What a folder holds.

    made: name of transformers' config and model classes. options: of the config. config: words of config.json changed.
    write: lays the files that make it a late-interaction model beside the model's, in the reference's words and ours.
    markers: tokens of the tokenizer for both sides. mask: whether the tokenizer has a mask token.
    """

    made: str
    options: Mapping[str, Any]
    write: Callable[[Path], None]
    markers: tuple[str, ...] = ()
    mask: bool = True
    lower: bool = True
    config: Mapping[str, Any] = field(default_factory=dict)


def write(layout: Layout, folder: Path) -> None:
    vocabulary = write_tokenizer(folder, layout.markers, layout.mask, layout.lower)
    torch.manual_seed(0)
    config = getattr(transformers, f"{layout.made}Config")(vocab_size=vocabulary, pad_token_id=0, **layout.options)
    model = getattr(transformers, f"{layout.made}Model")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, tuple(parameter.shape)))
    model.save_pretrained(folder)
    change_config(folder, **layout.config)
    layout.write(folder)


def write_tokenizer(folder: Path, markers: tuple[str, ...], mask: bool, lower: bool) -> int:
    """A token per word and per punctuation mark; returns the size of the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["[MASK]"] * mask]
    # Bert's own unused tokens are plain entries of its vocabulary, the markers of others are added tokens.
    plain = [marker for marker in markers if marker.startswith("[unused")]
    vocabulary = {word: place for place, word in enumerate([*special, *plain, *_WORDS, *_PUNCTUATION])}
    native = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    if lower:
        native.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    native.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    native.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    native.add_tokens([AddedToken(marker, normalized=False) for marker in markers if marker not in plain])
    names: dict[str, Any] = {"mask_token": "[MASK]"} if mask else {"eos_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=native, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "attention_mask"], **names,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return int(native.get_vocab_size())


def stanford(prefix: str = "bert.", dim: int = 16, **metadata: Any) -> Callable[[Path], None]:
    """Weights under `bert.`, `linear.weight` among them, and artifact.metadata."""

    def lay(folder: Path) -> None:
        change_config(folder, architectures=["HF_ColBERT"])
        tensors = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        projection = {"linear.weight": torch.randn(dim, WIDTH) / WIDTH**0.5}
        save_file(tensors | projection, folder / "model.safetensors", {"format": "pt"})
        words = {
            "query_maxlen": QUERY_LENGTH, "doc_maxlen": DOCUMENT_LENGTH, "dim": dim, "similarity": "cosine",
            "query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_token": "[Q]", "doc_token": "[D]",
        }  # fmt: skip
        (folder / "artifact.metadata").write_text(json.dumps(words | metadata))

    return lay


def pylate(dense: tuple[Mapping[str, Any], ...] = ({},), **words: Any) -> Callable[[Path], None]:
    """modules.json with PyLate's Dense, and its words in config_sentence_transformers.json; None takes one away."""

    def lay(folder: Path) -> None:
        modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        width = WIDTH
        for number, own in enumerate(dense, start=1):
            place = folder / f"{number}_Dense"
            place.mkdir()
            config = {
                "in_features": width, "out_features": 16, "bias": False, "use_residual": False,
                "activation_function": "torch.nn.modules.linear.Identity", **own,
            }  # fmt: skip
            (place / "config.json").write_text(json.dumps(config))
            shape = config["out_features"], width
            tensors = {"linear.weight": torch.randn(shape) / width**0.5}
            if config["bias"]:
                tensors["linear.bias"] = torch.randn(shape[0])
            if config["use_residual"] and shape[0] != width:
                tensors["residual.weight"] = torch.randn(shape) / width**0.5
            save_file(tensors, place / "model.safetensors")
            modules.append(
                {"idx": number, "name": str(number), "path": place.name, "type": "pylate.models.Dense.Dense"}
            )
            width = shape[0]
        (folder / "modules.json").write_text(json.dumps(modules))
        # The length of whichever side PyLate read last.
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 13, "do_lower_case": false}')
        known = {
            "model_type": "ColBERT", "prompts": {}, "default_prompt_name": None, "similarity_fn_name": "MaxSim",
            "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": QUERY_LENGTH,
            "document_length": DOCUMENT_LENGTH, "attend_to_expansion_tokens": False, "do_query_expansion": True,
            "skiplist_words": list(string.punctuation),
        } | words  # fmt: skip
        kept = {key: word for key, word in known.items() if word is not None}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(kept))

    return lay


def multi_vector(
    expansion: dict[str, Any] | None, normalize: bool = True, skipped: tuple[str, ...] = ("document",), **options: Any
) -> Callable[[Path], None]:
    """What sentence-transformers' MultiVectorEncoder saves."""

    def lay(folder: Path) -> None:
        backbone = Transformer(str(folder), query_expansion=expansion, document_length=DOCUMENT_LENGTH)
        modules: list[Any] = [
            backbone,
            Dense(WIDTH, 16, bias=True, activation_function=torch.nn.Tanh(), module_input_name="token_embeddings"),
            MultiVectorMask(skiplist_words=list(_PUNCTUATION), skiplist_tasks=list(skipped)),
        ]
        if normalize:
            modules.append(Normalize(module_input_name="token_embeddings"))
        prompts = {"query": "[Q] ", "document": "[D] "}
        MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu", **options).save_pretrained(str(folder))

    return lay


def jina(folder: Path) -> None:
    """jina-colbert-v2: the names and config words of Jina's own code, which transformers saves without a prefix."""
    stanford("roberta.", query_token_id="[QueryMarker]", doc_token_id="[DocumentMarker]", attend_to_mask_tokens=True)(
        folder
    )
    change_config(
        folder,
        model_type="xlm-roberta",
        position_embedding_type="rotary",
        rotary_emb_base=20000.0,
        rope_parameters=None,
    )
    change_tensors(folder, add={"roberta.pooler.dense.weight": torch.randn(WIDTH, WIDTH)})


def as_transformers_reads_jina(folder: Path) -> None:
    """The same model in words that transformers knows."""
    change_config(folder, model_type="jina_embeddings_v3")
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("roberta."): tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


_STANFORD = ("[unused0]", "[unused1]")
_PYLATE = ("[Q] ", "[D] ")
# A window that mask tokens far behind a short query look out of.
_MODERN = LAYERS | {
    "local_attention": 4,
    "global_attn_every_n_layers": 2,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_RELU = "torch.nn.modules.activation.ReLU"
_LFM2 = {
    "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "layer_types": ["conv", "full_attention", "conv"], "max_position_embeddings": 96,
}  # fmt: skip

ROWS: dict[str, Layout] = {
    "colbert-ir/colbertv2.0, answerdotai/answerai-colbert-small-v1": Layout("Bert", LAYERS, stanford(), _STANFORD),
    "attends to mask tokens": Layout("Bert", LAYERS, stanford(attend_to_mask_tokens=True), _STANFORD),
    "keeps punctuation": Layout("Bert", LAYERS, stanford(mask_punctuation=False), _STANFORD),
    "lightonai/GTE-ModernColBERT-v1": Layout("ModernBert", _MODERN, pylate(model_type=None, do_query_expansion=None), _PYLATE),
    "PyLate, attends to mask tokens": Layout("ModernBert", _MODERN, pylate(attend_to_expansion_tokens=True), _PYLATE),
    "PyLate, queries not filled up": Layout("Bert", LAYERS, pylate(do_query_expansion=False), _PYLATE),
    "PyLate, no markers": Layout("Bert", LAYERS, pylate(query_prefix="", document_prefix="")),
    "PyLate, three Dense modules": Layout(
        "XLMRoberta", LAYERS,
        pylate(
            (
                {"out_features": 48, "activation_function": _RELU, "bias": True},
                {"out_features": 48, "use_residual": True},
                {"out_features": 16, "use_residual": True},
            ),
            skiplist_words=["(", "tower"],
        ), _PYLATE,
    ),
    "PyLate, DeBERTa": Layout("DebertaV2", LAYERS | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, pylate(), _PYLATE),
    "LiquidAI/LFM2-ColBERT-350M": Layout("Lfm2", _LFM2, pylate(), _PYLATE, mask=False),
    "MultiVectorEncoder, fixed": Layout(
        "Bert", LAYERS, multi_vector({"strategy": "fixed", "length": QUERY_LENGTH}), _PYLATE
    ),
    "MultiVectorEncoder, min": Layout(
        "ModernBert", _MODERN, multi_vector({"strategy": "min", "length": 8, "attend": True, "token": "[SEP]"}), _PYLATE
    ),
    "MultiVectorEncoder, not of unit length, mean": Layout(
        "Bert", LAYERS,
        multi_vector(None, normalize=False, skipped=("query", "document"), similarity_fn_name="meanmaxsim"),
        _PYLATE,
    ),
    "jinaai/jina-colbert-v2": Layout("JinaEmbeddingsV3", LAYERS, jina, ("[QueryMarker]", "[DocumentMarker]")),
}  # fmt: skip
