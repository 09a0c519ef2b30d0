"""Tokenizers that exist as Python code alone: ids, pairs and cuts are theirs, and what they cannot say is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from poolhouse import LLM, PoolingParams
from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.python_tokenizers import PythonTokenizer
from poolhouse.inputs.templates.score import ScoreTemplate
from poolhouse.inputs.tokenizer import Tokenizer
from tests.inputs.test_tokenizer_classes import auto, differences, edit

ACIDS = "<cls> <pad> <eos> <unk> L A G V S E R T I D P K Q N F Y M H W C X B U Z O . - <null_1> <mask>"
TEXTS = ["MKTAYIAK moon", "", "tôi xin <new> chào <mask>[MASK] <s> 今日", "A L G xin " * 20, "今日は" * 900]
PAIRS = [("tôi xin", "MKT " * 8), ("今日は abc " * 5, "xin"), ("MKT AL", "xin xin xin")]


def named(folder: Path, name: str, model_type: str, **more: Any) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class=name, **more)
    edit(folder / "config.json", model_type=model_type)


def esm(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(ACIDS.split()))
    named(folder, "EsmTokenizer", "esm")


def pairs_of_bytes(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        words = ["xin", "chào@@", "t", "t@@", "ô@@", "i"]
        (folder / "vocab.txt").write_text("\n".join(f"{word} 1" for word in words))
        (folder / "bpe.codes").write_text("t ô 1\nô i</w> 1\n")
        named(folder, name, "roberta")

    return make


def japanese(folder: Path, splitter: str = "basic") -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz今日は"]
    (folder / "vocab.txt").write_text("\n".join(words))
    more = {"word_tokenizer_type": splitter, "subword_tokenizer_type": "character", "do_lower_case": False}
    named(folder, "BertJapaneseTokenizer", "bert", **more)


KINDS: dict[str, Callable[[Path], None]] = {
    "EsmTokenizer": esm,
    "PhobertTokenizer": pairs_of_bytes("PhobertTokenizer"),
    "BertweetTokenizer": pairs_of_bytes("BertweetTokenizer"),
    "BertJapaneseTokenizer": japanese,
    "ByT5Tokenizer": lambda folder: named(folder, "ByT5Tokenizer", "t5"),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"truncation_side": "left"},
    {"split_special_tokens": True},
    {"extra_special_tokens": ["<new>"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_ids_pairs_and_cuts_are_those_of_auto_tokenizer(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    KINDS[name](tmp_path)
    edit(tmp_path / "tokenizer_config.json", **settings)
    ours = Tokenizer.from_folder(tmp_path)
    assert differences(ours, auto(tmp_path), TEXTS, PAIRS) == []
    assert ours.notes == (
        f"Texts are tokenised by {name}, which is Python code and slower: no other form of it exists.",
    )


@pytest.mark.parametrize("name", KINDS)
def test_ids_become_words_and_text_again(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path)
    ours, theirs = Tokenizer.from_folder(tmp_path), auto(tmp_path)
    found = theirs("tôi xin MKT")["input_ids"]
    assert ours.decoder.strings(found) == theirs.convert_ids_to_tokens(found)
    for skip in (True, False):
        assert ours.decoder.text(found, skip_special_tokens=skip) == theirs.decode(found, skip_special_tokens=skip)


def test_what_needs_places_is_refused_in_words(tmp_path: Path) -> None:
    esm(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    template = ScoreTemplate("own", "M {{ messages[0].content }} K {{ messages[1].content }} A")
    long = Prompt("L", pair="G " * 20, template=template)
    asked = [Prompt("MKT"), long, long]
    limits = [Limit(99, offsets=True), Limit(99, max_document_tokens=3), Limit(12, keep=-1)]
    words, side, whole = ours.encode(asked, limits)
    for refused in (words, side):
        assert isinstance(refused, InvalidRequest)
        assert "Where tokens stand in a text is not known: EsmTokenizer" in str(refused)
    # A whole prompt is cut by tokens: the document gives way, and the template's end stays.
    assert not isinstance(whole, InvalidRequest)
    assert whole.ids.tolist() == auto(tmp_path)("M L K" + " G" * 6 + " A")["input_ids"]


def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    japanese(tmp_path, "mecab")
    with pytest.raises(CheckpointError, match="install fugashi"):
        Tokenizer.from_folder(tmp_path)


def test_a_class_with_inputs_of_another_kind_is_refused(tmp_path: Path) -> None:
    esm(tmp_path)
    theirs = auto(tmp_path)
    theirs._encode_plus = lambda **_: {"input_ids": [1, 2, 3]}
    with pytest.raises(CheckpointError, match="EsmTokenizer is not supported: it makes inputs otherwise"):
        PythonTokenizer(theirs)


def test_a_protein_model_answers_as_in_transformers(tmp_path: Path) -> None:
    esm(tmp_path)
    torch.manual_seed(0)
    config = transformers.EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40, position_embedding_type="absolute",
    )  # fmt: skip
    model = transformers.EsmModel(config).eval()
    model.save_pretrained(tmp_path)
    # Padding that a text writes is not counted in positions, but is attended to.
    texts = ["MKTAYIAK", "M<pad>KTA Y", "LAGVSER" * 30]
    llm = LLM(str(tmp_path), pooler_config={"pooling_type": "MEAN"})
    asked = PoolingParams(truncate_prompt_tokens=-1, use_activation=False)
    outputs = llm.embed(texts, pooling_params=asked, use_tqdm=False)
    for text, output in zip(texts, outputs, strict=True):
        ids = auto(tmp_path)(text, truncation=True, max_length=llm.model.facts.max_tokens)["input_ids"]
        assert output.prompt_token_ids == ids
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert np.allclose(output.outputs.embedding, expected, atol=1e-5)
    assert any("EsmTokenizer" in note for note in llm.model.facts.notes)
