"""Pairs get the token types that their model was trained with, whatever class the tokenizer's files name."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from poolhouse import LLM
from tests.inputs.tokenizer_layouts import build

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
# The tokenizer, the model, its sizes, and whether types change its scores.
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "Albert": ("AlbertTokenizer", {**TINY, "embedding_size": 16}, True),
    "Bert": ("BertTokenizer", TINY, True),
    "BigBird": ("BigBirdTokenizer", {**TINY, "attention_type": "original_full"}, True),
    "DebertaV2": ("DebertaV2Tokenizer", {**TINY, "type_vocab_size": 2}, True),
    "DistilBert": ("BertTokenizer", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}, False),
    "Electra": ("BertTokenizer", {**TINY, "embedding_size": 32}, True),
    "Funnel": (
        "FunnelTokenizer",
        {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 48, "block_sizes": [1, 1]},
        True,
    ),
    "RemBert": ("RemBertTokenizer", {**TINY, "input_embedding_size": 32, "output_embedding_size": 32}, True),
    "Roberta": ("RobertaTokenizer", TINY, False),
    "XLNet": ("XLNetTokenizer", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}, True),
}
PAIR = ("the moon falls", "bread and ships")


def folder_of(name: str, folder: Path, **more: Any) -> Any:
    """A classifier of one label and its tokenizer; the model."""
    tokenizer = build(MODELS[name][0], folder)
    torch.manual_seed(0)
    options = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "num_labels": 1, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**options | MODELS[name][1] | more)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    model.save_pretrained(folder)
    return model


def scored(model: Any, folder: Path, typed: bool) -> float:
    """By transformers, with the types of the tokenizer's template or without."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(*PAIR, return_tensors="pt", return_token_type_ids=True)
    if not typed or "token_type_ids" not in inspect.signature(model.forward).parameters:
        del encoded["token_type_ids"]
    with torch.no_grad():
        return float(torch.sigmoid(model(**encoded).logits))


def ours(folder: Path) -> float:
    return float(LLM(str(folder)).score(*PAIR, use_tqdm=False)[0].outputs.score)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_with_the_types_of_the_template(name: str, tmp_path: Path) -> None:
    model = folder_of(name, tmp_path)
    expected = scored(model, tmp_path, typed=True)
    assert ours(tmp_path) == pytest.approx(expected, abs=1e-5)
    assert (abs(expected - scored(model, tmp_path, typed=False)) > 5e-5) == MODELS[name][2]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        *(("Albert", named) for named in (None, "PreTrainedTokenizerFast")),
        *(("Bert", named) for named in (None, "PreTrainedTokenizerFast", "DistilBertTokenizer")),
    ],
)
def test_the_class_that_is_named_does_not_decide(name: str, named: str | None, tmp_path: Path) -> None:
    model = folder_of(name, tmp_path)
    expected = scored(model, tmp_path, typed=True)
    rename(tmp_path, named)
    assert ours(tmp_path) == pytest.approx(expected, abs=1e-5)


def rename(folder: Path, named: str | None, **more: Any) -> None:
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "tokenizer_class": named, **more}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_a_model_with_one_type_and_files_that_leave_types_out_get_none(tmp_path: Path) -> None:
    model = folder_of("Bert", tmp_path / "one", type_vocab_size=1)
    assert ours(tmp_path / "one") == pytest.approx(scored(model, tmp_path / "one", typed=False), abs=1e-5)
    model = folder_of("Bert", tmp_path / "told")
    rename(tmp_path / "told", "BertTokenizer", model_input_names=["input_ids", "attention_mask"])
    assert ours(tmp_path / "told") == pytest.approx(scored(model, tmp_path / "told", typed=False), abs=1e-5)
