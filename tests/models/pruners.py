"""Tiny random pruners in the layouts of the hub, and their answers by their published formulas over transformers' encoders.

The formulas are those of naver/bergen (scripts/provence) and of hotchpotch/open_provence at 623f621, neither of which can be
installed here. `hidden_states[-1]` of OpenProvence's ModernBERT was read once from transformers 4.57.1, with which it is
trained: the rows before the last norm, equal to these within 1e-6.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from tests.models.tiny import IDS, LAYERS, SPECIAL, save

# Queries have small letters, documents large ones: before a small one no sentence ends.
WORDS = [f"{letter}{number}" for letter in "wW" for number in range(40)]
MARKS = [".", "?", "!", ",", "。"]
VOCABULARY = {word: place for place, word in enumerate([*SPECIAL.values(), *MARKS, *WORDS])}
DEBERTA = LAYERS | {
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "max_position_embeddings": 64,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
    "pooler_hidden_size": 32,
    "pooler_hidden_act": "gelu",
}
MODERN = LAYERS | {"local_attention": 8, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2}


@dataclass(frozen=True)
class Kind:
    """One layout. separators: between query and document. plain: whether queries are read without punctuation."""

    model: str
    options: dict[str, Any]
    architecture: str
    examples: str = ""
    separators: int = 1
    wrapped: bool = False

    @property
    def family(self) -> str:
        return self.model.removesuffix("ForSequenceClassification")


KINDS = {
    "provence": Kind("DebertaV2ForSequenceClassification", DEBERTA, "Provence", "naver/provence-reranker-debertav3-v1"),
    "provence, as trained": Kind(
        "DebertaV2ForSequenceClassification", DEBERTA, "DebertaV2ForCompressionAndRanking", "naver/bergen's own"
    ),
    "xprovence": Kind(
        "XLMRobertaForSequenceClassification",
        LAYERS | {"max_position_embeddings": 66},
        "XProvence",
        "naver/xprovence-reranker-bgem3-v1, -v2",
    ),
    "openprovence, modernbert": Kind(
        "ModernBertForSequenceClassification",
        MODERN | {"classifier_pooling": "cls"},
        "OpenProvenceForSequenceClassification",
        "hotchpotch/open-provence-reranker-v1",
        wrapped=True,
    ),
    "openprovence, modernbert, mean": Kind(
        "ModernBertForSequenceClassification",
        MODERN | {"classifier_pooling": "mean"},
        "OpenProvenceForSequenceClassification",
        "hotchpotch/open-provence-reranker-v1-gte-modernbert-base",
        wrapped=True,
    ),
    "openprovence, xlm-roberta": Kind(
        "XLMRobertaForSequenceClassification",
        LAYERS | {"max_position_embeddings": 66},
        "OpenProvenceForSequenceClassification",
        separators=2,
        wrapped=True,
    ),
}


def save_tokenizer(folder: Path, separators: int) -> transformers.PreTrainedTokenizerFast:
    """A token for each word and each mark; two separators between texts for XLM-R, whose pruner takes one of them."""
    made = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    between = " ".join(["[SEP]"] * separators)
    ends = [("[CLS]", IDS["cls"]), ("[SEP]", IDS["sep"])]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", f"[CLS] $A {between} $B [SEP]", ends)
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=64, model_input_names=["input_ids", "attention_mask"], **SPECIAL
    )
    whole.save_pretrained(folder)
    return whole


@dataclass(frozen=True)
class Written:
    """What the published code answers to one pair: the score, and a probability for each token of the document."""

    score: float
    keep: list[float]


class Pruner:
    """A saved checkpoint, and its answers by hand."""

    def __init__(self, folder: Path, row: str) -> None:
        self.kind = kind = KINDS[row]
        # XLM-R's tokenizer puts two separators between texts, for XProvence too.
        self.tokenize = save_tokenizer(folder, 2 if kind.family == "XLMRoberta" else 1)
        options = kind.options | {"vocab_size": len(VOCABULARY)}
        self.model = save(folder, kind.model, f"{kind.family}Config", options, num_labels=1)
        torch.manual_seed(5)
        self.weight, self.bias = torch.randn(2, options["hidden_size"]) * 0.5, torch.randn(2) * 0.3
        with torch.no_grad():
            # Norms of ones would hide on which side of one a head stands.
            for name, parameter in self.model.named_parameters():
                if "final_norm" in name:
                    torch.nn.init.uniform_(parameter, 0.2, 3.0)
        self.model.save_pretrained(folder)
        _dress(folder, kind, self.weight, self.bias)

    def answer(self, query: str, document: list[int]) -> Written:
        """One window of a document."""
        asked = self.tokenize(_plain(query) if not self.kind.wrapped else query, add_special_tokens=False)["input_ids"]
        ids = [IDS["cls"], *asked, *[IDS["sep"]] * self.kind.separators, *document, IDS["sep"]]
        before: list[Tensor] = []
        norm = getattr(self.model.base_model, "final_norm", None)
        hook = None if norm is None else norm.register_forward_hook(lambda _, inputs, __: before.append(inputs[0]))
        with torch.inference_mode():
            whole = self.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        if hook is not None:
            hook.remove()
        rows = before[0][0] if before else whole.hidden_states[-1][0]
        keep = torch.softmax(rows @ self.weight.T + self.bias, dim=-1)[:, 1]
        logit = whole.logits[0, 0]
        first = len(ids) - 1 - len(document)
        score = torch.sigmoid(logit) if self.kind.wrapped else logit
        return Written(float(score), keep[first : first + len(document)].tolist())

    def sentences(self, query: str, pieces: Sequence[str], room: int | None = None) -> tuple[float, list[list[float]]]:
        """The score, and the probabilities of each piece's tokens. room: tokens of a window, whole pieces where they fit."""
        tokens = [self.tokenize(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
        windows: list[list[tuple[int, int]]] = [[]]
        for number, own in enumerate(tokens):
            if room is not None and windows[-1] and len(windows[-1]) + len(own) > room:
                windows.append([])
            for token in own:
                if room is not None and len(windows[-1]) == room:
                    windows.append([])
                windows[-1].append((number, token))
        keep: list[list[float]] = [[] for _ in pieces]
        scores = []
        for window in windows:
            answer = self.answer(query, [token for _, token in window])
            scores.append(answer.score)
            for (number, _), probability in zip(window, answer.keep, strict=True):
                keep[number].append(probability)
        return max(scores), keep


def _plain(query: str) -> str:
    return " ".join("".join(letter for letter in query.lower() if letter not in ".,?!").split())


def _dress(folder: Path, kind: Kind, weight: Tensor, bias: Tensor) -> None:
    """The names and the config of the published checkpoints, around a classifier of transformers."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if kind.wrapped:
        tensors = {f"ranking_model.{name}": tensor for name, tensor in tensors.items()}
        keep = "pruning_head.classifier"
        config = {
            "architectures": [kind.architecture],
            "model_type": "open_provence",
            "mode": "reranking_pruning",
            "base_model_config": config,
            "pruning_config": {
                "hidden_size": 32,
                "num_labels": 2,
                "sentence_pooling": "mean",
                "classifier_dropout": 0.1,
            },
            "max_length": 64,
            "num_labels": 1,
            "num_pruning_labels": 2,
            "default_threadshold": 0.2,
        }
    else:
        keep = "token_classifier"
        config["architectures"] = [kind.architecture]
        if not kind.architecture.startswith("Deberta"):
            config["model_type"] = kind.architecture
    tensors |= {f"{keep}.weight": weight, f"{keep}.bias": bias}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
