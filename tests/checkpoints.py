"""Tiny random checkpoints with tokenizers, as the hub lays them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers, processors

from tests.inputs.test_tokenizer import byte_bpe, unigram, wordpiece

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 200,
}
MARKS = {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}


def untrimmed() -> tokenizers.Tokenizer:
    """As ModernBERT: byte-level tokens that hold the blank before them."""
    tokenizer = byte_bpe()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def xlm_unigram() -> tokenizers.Tokenizer:
    """As XLM-R: white space splits words before pieces are made."""
    tokenizer = unigram()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return tokenizer


KINDS: dict[str, tuple[str, Callable[[], tokenizers.Tokenizer], str, dict[str, Any]]] = {
    "bert, wordpiece": ("Bert", wordpiece, "[UNK]", {}),
    "roberta, byte bpe": ("Roberta", byte_bpe, "<unk>", {}),
    "modernbert, byte bpe": ("ModernBert", untrimmed, "<unk>", MARKS),
    "xlm-roberta, unigram": ("XLMRoberta", xlm_unigram, "<unk>", {}),
}


def save_checkpoint(folder: Path, kind: str, model: str = "Model", tokens: int = 64, **config: Any) -> None:
    """A model of one of KINDS with its tokenizer.

    model: the ending of its class, such as "ForTokenClassification". tokens: the longest prompt.
    """
    family, make, unknown, options = KINDS[kind]
    tokenizer = make()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        pad_token="[PAD]" if family == "Bert" else "<pad>",
        model_max_length=tokens,
        model_input_names=["input_ids", "attention_mask"],
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(3)
    settings = TINY | {"vocab_size": len(wrapped), "pad_token_id": wrapped.pad_token_id} | options | config
    made = getattr(transformers, family + model)(getattr(transformers, family + "Config")(**settings))
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            # Tokens must differ more than their places do.
            torch.nn.init.normal_(parameter, std=0.02 if "position" in name or "type" in name else 0.3)
    made.save_pretrained(folder)
