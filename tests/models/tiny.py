"""Tiny random checkpoints of whole models, heads and tokenizers included, for tests from text to answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [f"w{number}" for number in range(90)]
SPECIAL = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
IDS = {"cls": 0, "pad": 1, "sep": 2, "unk": 3}
LAYERS: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": IDS["pad"],
}
TEXTS = [
    " ".join(WORDS[(start * 13 + place * 7) % 90] for place in range(length))
    for start, length in enumerate((3, 11, 1, 20, 7, 11))
]
QUERIES, DOCUMENTS = TEXTS[:3] * 2, TEXTS[::-1]


def tokenizer(folder: Path, kind: str = "bert", most: int = 64) -> transformers.PreTrainedTokenizerFast:
    """One token per word.

    kind: "bert" gives the second text of a pair a type of its own, "roberta" two separators, "decoder" no special tokens.
    """
    vocabulary = {word: place for place, word in enumerate([*SPECIAL.values(), *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", IDS["cls"]), ("[SEP]", IDS["sep"])]
    if kind == "bert":
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    elif kind == "roberta":
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]", ends)
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if kind == "bert" else [])
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=most, model_input_names=names, **SPECIAL
    )
    whole.save_pretrained(folder)
    return whole


def save(folder: Path, model: str, config: str, options: dict[str, Any], std: float = 0.3, **labels: Any) -> Any:
    """A model with weights large enough that every part matters, and its tokenizer's kin saved apart."""
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**options, **labels)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=std)
    if hasattr(made, "tie_weights"):
        made.tie_weights()
    made.save_pretrained(folder)
    return made


def save_m3(folder: Path) -> None:
    """A BGE-M3 of two layers: dense vectors, token weights, and token vectors of 24 numbers."""
    tokenizer(folder, "roberta")
    save(folder, "XLMRobertaModel", "XLMRobertaConfig", LAYERS | {"bos_token_id": 0, "eos_token_id": 2})
    torch.save({"weight": torch.randn(1, 32), "bias": torch.randn(1)}, folder / "sparse_linear.pt")
    torch.save({"weight": torch.randn(24, 32), "bias": torch.randn(24)}, folder / "colbert_linear.pt")
