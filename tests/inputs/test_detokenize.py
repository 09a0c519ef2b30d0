"""Ids become the text that transformers makes of them, and tokens the pieces of the caller's text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Tokens
from tests.inputs.test_tokenizer import CORPUS, byte_bpe, unigram, wordpiece

TEXTS = [
    "the moon  falls , it 's bread ! isn 't it ?",
    "Größe naïve 東京 🚢",
    " sailors' songs\n",
    "",
    "[SEP] <s> x</s>",
]


def wordpiece_decoding() -> tokenizers.Tokenizer:
    tokenizer = wordpiece()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def unigram_decoding() -> tokenizers.Tokenizer:
    tokenizer = unigram()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def metaspace_bpe() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma: pieces of sentencepiece, with bytes for what has no piece."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator([*CORPUS, " ".join(bytes_of)], trainer)
    stored = json.loads(tokenizer.to_str())
    vocabulary = stored["model"]["vocab"]
    for name in bytes_of:
        vocabulary.setdefault(name, len(vocabulary))
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "wordpiece": wordpiece_decoding,
    "byte bpe": byte_bpe,
    "unigram": unigram_decoding,
    "metaspace bpe": metaspace_bpe,
}


@pytest.fixture(scope="module", params=[(kind, clean) for kind in KINDS for clean in (False, True)], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Our tokenizer of a folder, and transformers' of the same."""
    kind, clean = request.param
    folder = tmp_path_factory.mktemp("tokenizer")
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), clean_up_tokenization_spaces=clean)
    saved.save_pretrained(folder)
    return Tokenizer.from_folder(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [False, True])
def test_decoded_texts_and_strings_are_those_of_transformers(
    text: str, skip: bool, pair: tuple[Tokenizer, Any], recwarn: pytest.WarningsRecorder
) -> None:
    ours, theirs = pair
    ids = theirs(text)["input_ids"]
    assert ours.decoder.text(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decoder.text(np.array(ids, dtype=np.int64), skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decoder.strings(ids) == theirs.convert_ids_to_tokens(ids)


def test_spaces_before_punctuation_go_where_the_config_says_so(tmp_path: Path) -> None:
    tokenizer = wordpiece_decoding()
    ids = tokenizer.encode("ships , and songs !", add_special_tokens=False).ids
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).decoder.text(ids) == "ships , and songs !"
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    assert Tokenizer.from_folder(tmp_path).decoder.text(ids) == "ships, and songs!"


@pytest.mark.parametrize("wrong", [-1, 999999, 2**31, 2**40, 2**70])
def test_ids_out_of_the_vocabulary_are_refused(wrong: int) -> None:
    decoder = Tokenizer(wordpiece_decoding()).decoder
    for method in (decoder.text, decoder.strings):
        with pytest.raises(InvalidRequest, match="out of vocabulary") as raised:
            method([5, wrong])
        assert raised.value.parameter == "tokens"
    if wrong == 999999:
        assert str(raised.value) == "Token id 999999 is out of vocabulary"


def test_an_id_that_has_a_vector_and_no_word_is_empty() -> None:
    native = wordpiece_decoding()
    most = native.get_vocab_size()
    decoder = Tokenizer(native, vocabulary_size=most + 8).decoder
    assert decoder.strings([5, most + 7]) == [native.id_to_token(5), ""]
    assert decoder.text([5, most + 7]) == native.decode([5])
    with pytest.raises(InvalidRequest):
        decoder.text([most + 8])


def test_nothing_decodes_to_nothing() -> None:
    decoder = Tokenizer(wordpiece_decoding()).decoder
    assert decoder.text([]) == ""
    assert decoder.strings([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_the_text_and_special_tokens_are_told_apart(kind: str) -> None:
    native = KINDS[kind]()
    tokenizer = Tokenizer(native)
    text = "the naïve moon, 東京"
    (tokens,) = tokenizer.encode([Prompt(text)], [Limit(64, offsets=True)])
    assert isinstance(tokens, Tokens)
    assert tokens.offsets is not None
    encoding = native.encode(text)
    assert tokens.offsets.special.tolist() == [mask == 1 for mask in encoding.special_tokens_mask]
    assert tokens.offsets.special.any()
    assert tokenizer.decoder.special_ids >= set(tokens.ids[tokens.offsets.special].tolist())
    for (start, end), mask, offsets in zip(
        tokens.offsets.bounds.tolist(), tokens.offsets.special, encoding.offsets, strict=True
    ):
        assert (start, end) == ((0, 0) if mask else offsets)
    covered = {place for start, end in tokens.offsets.bounds.tolist() for place in range(start, end)}
    assert covered >= {place for place, character in enumerate(text) if character != " "}


def test_special_tokens_of_a_cut_text_stay_marked() -> None:
    tokenizer = Tokenizer(wordpiece_decoding())
    (tokens,) = tokenizer.encode([Prompt("the moon falls under the water")], [Limit(64, keep=5, offsets=True)])
    assert isinstance(tokens, Tokens)
    assert tokens.offsets is not None
    assert tokens.offsets.special.tolist() == [True, False, False, False, True]
