"""Tokens equal those of transformers, cuts included, and what was cut is reported."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from poolhouse.errors import CheckpointError, InputTooLong, InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.templates.score import ScoreTemplate
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.models.files.hub import embedded_model
from poolhouse.packing.tokens import Tokens

CORPUS = [
    "the moon falls under the water",
    "bread and ships, and the songs of sailors!",
    "Größe naïve 東京 über alles",
] * 20
TEXTS = [
    "",
    " ",
    "αβγδ εζηθ ικαβ",
    "a",
    "The moon  falls",
    "bread\nand\tships",
    "東京 über",
    "naïve sailors! " * 30,
    "x" * 300,
]


def wordpiece() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def byte_bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def last_only() -> tokenizers.Tokenizer:
    """As Qwen3-Embedding: nothing before the text, an end token after it."""
    tokenizer = byte_bpe()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


def greek() -> tokenizers.Tokenizer:
    """Without Latin letters, digits or an unknown token: most texts of other alphabets have no token at all."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = [*"αβγδεζηθικ?:"]
    trainer = trainers.BpeTrainer(special_tokens=["<s>", "</s>", "<sep>"], initial_alphabet=letters, vocab_size=15)
    tokenizer.train_from_iterator(letters, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A <sep> </s>",
                pair="<s> $A <sep> $B:1 </s>:1",
                special_tokens=[("<s>", 0), ("</s>", 1), ("<sep>", 2)],
            ),
        ]
    )
    return tokenizer


KINDS = {
    "wordpiece": wordpiece,
    "byte bpe": byte_bpe,
    "unigram": unigram,
    "end token only": last_only,
    "no Latin letters": greek,
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """Our tokenizer of a folder, and transformers' of the same."""
    folder = tmp_path_factory.mktemp("tokenizer")
    native = KINDS[request.param]()
    same = tokenizers.Tokenizer.from_str(native.to_str())
    native.enable_truncation(4)
    native.enable_padding(length=9)
    native.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder), transformers.PreTrainedTokenizerFast(tokenizer_object=same)


def one(tokenizer: Tokenizer, text: str, limit: Limit, prefix: str = "") -> Tokens:
    (result,) = tokenizer.encode([Prompt(text, None, prefix)], [limit])
    if isinstance(result, InvalidRequest):
        raise result
    return result


@pytest.mark.parametrize("special", [True, False])
def test_ids_equal_transformers(pair: tuple[Tokenizer, Any], special: bool) -> None:
    ours, theirs = pair
    limits = [Limit(10_000, add_special_tokens=special)] * len(TEXTS)
    for text, tokens in zip(TEXTS, ours.encode([Prompt(text) for text in TEXTS], limits), strict=True):
        assert isinstance(tokens, Tokens)
        assert tokens.ids.tolist() == theirs(text, add_special_tokens=special)["input_ids"]
        assert not tokens.truncated


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("keep", [4, 5, 20])
def test_cuts_equal_transformers(pair: tuple[Tokenizer, Any], side: Any, keep: int) -> None:
    ours, theirs = pair
    theirs.truncation_side = side
    for text in TEXTS:
        expected = theirs(text, truncation=True, max_length=keep)["input_ids"]
        tokens = one(ours, text, Limit(10_000, keep, side))
        assert tokens.ids.tolist() == expected
        whole = len(theirs(text)["input_ids"])
        assert tokens.original_tokens == whole
        assert tokens.truncated == (whole > keep)


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["the", "moon", "falls", "under", "bread", "Größe", "東京", "\n", "", "!!", "qqqqqqqqq", "αβ"]),
        min_size=1,
    ),
    repeats=st.integers(50, 400),
    keep=st.integers(4, 40),
    side=st.sampled_from(["left", "right"]),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_a_huge_text_gives_the_tokens_of_the_whole_text(
    words: list[str], repeats: int, keep: int, side: Any, kind: str
) -> None:
    if kind == "no Latin letters":
        words = ["αβγδεζηθικ"[: 1 + len(word)] for word in words]
    text = " ".join(words * repeats)
    native = KINDS_MADE.setdefault(kind, KINDS[kind]())
    ours = Tokenizer(native)
    whole = native.encode(text).ids
    tokens = one(ours, text, Limit(10_000, keep, side))
    head, tail = ENDS[kind]
    room = keep - head - tail
    end = len(whole) - tail
    content = whole[head:end]
    expected = whole[:head] + (content[:room] if side == "right" else content[-room:]) + whole[end:]
    assert tokens.ids.tolist() == (whole if len(whole) <= keep else expected)
    assert tokens.truncated == (len(whole) > keep)


ENDS = {
    "wordpiece": (1, 1),
    "byte bpe": (1, 1),
    "unigram": (1, 1),
    "end token only": (0, 1),
    "no Latin letters": (1, 2),
}
KINDS_MADE: dict[str, tokenizers.Tokenizer] = {}


def test_of_a_text_of_50_megabytes_only_the_part_that_counts_is_tokenised() -> None:
    ours = Tokenizer.from_folder(embedded_model())
    text = "the weather in the mountains is cold " * 1_350_000
    assert len(text) > 49_000_000
    tokens = one(ours, text, Limit(256, -1))
    assert tokens.ids.tolist() == one(ours, text[:4000], Limit(256, -1)).ids.tolist()
    assert tokens.original_is_estimate
    assert tokens.original_tokens == pytest.approx(1_350_000 * 7, rel=0.02)
    with pytest.raises(InputTooLong, match=r"contains \d{8} characters \(more than 4608 characters"):
        one(ours, text, Limit(256))
    # One endless word is a single unknown token, and must not be read in full again and again.
    assert len(one(ours, "x" * 5_000_000, Limit(256, -1))) == 3


def test_overflow_policies() -> None:
    ours = Tokenizer(wordpiece())
    text = "the moon falls " * 10
    with pytest.raises(InputTooLong, match=r"maximum context length is 12 tokens.*at least 13 input tokens") as error:
        one(ours, text, Limit(12))
    assert (error.value.parameter, error.value.value) == ("input_tokens", 32)
    assert len(one(ours, text, Limit(12, overflow="truncate"))) == 12
    assert len(one(ours, text, Limit(12, overflow="chunk"))) == 32
    with pytest.raises(InvalidRequest, match="greater than max_model_len"):
        one(ours, text, Limit(12, 13))
    with pytest.raises(InvalidRequest, match="leaves no room beside the 2 special tokens"):
        one(ours, text, Limit(12, 2))


def test_ids_are_cut_plainly_and_checked() -> None:
    ours = Tokenizer(wordpiece(), vocabulary_size=50)
    import numpy as np

    def ids(values: list[int], limit: Limit) -> Tokens | InvalidRequest:
        return ours.encode([Prompt(None, np.array(values))], [limit])[0]

    cut = ids([5, 6, 7, 8], Limit(3, -1))
    assert isinstance(cut, Tokens)
    assert (cut.ids.tolist(), cut.original_tokens) == ([5, 6, 7], 4)
    left = ids([5, 6, 7, 8], Limit(10, 2, "left"))
    assert isinstance(left, Tokens)
    assert left.ids.tolist() == [7, 8]
    assert isinstance(ids([5, 6, 7, 8], Limit(3)), InputTooLong)
    wrong = ids([5, 50], Limit(3))
    assert isinstance(wrong, InvalidRequest)
    assert str(wrong) == "Token id 50 is out of vocabulary"


def test_a_bad_text_fails_alone() -> None:
    ours = Tokenizer(wordpiece())
    prompts = [Prompt("the moon"), Prompt("\ud800 lone"), Prompt("the\x00moon"), Prompt("bread")]
    first, bad, nul, last = ours.encode(prompts, [Limit(100)] * 4)
    assert isinstance(first, Tokens)
    assert isinstance(last, Tokens)
    assert isinstance(nul, Tokens)
    assert isinstance(bad, InvalidRequest)
    assert "no valid Unicode" in str(bad)


def test_a_prefix_counts_the_tokens_to_skip() -> None:
    ours = Tokenizer(wordpiece())
    tokens = one(ours, "moon", Limit(100), prefix="the bread ")
    assert tokens.ids.tolist() == one(ours, "the bread moon", Limit(100)).ids.tolist()
    assert tokens.skip == len(one(ours, "the bread", Limit(100))) - 1


def test_an_alphabet_without_latin_letters_keeps_its_special_tokens(tmp_path: Path) -> None:
    greek().save(str(tmp_path / "tokenizer.json"))
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.PreTrainedTokenizerFast(tokenizer_object=greek())
    # sentence-transformers takes one token off the end of the prefix, however many special ones stand there.
    assert one(ours, "αβ", Limit(100), prefix="γδ ").skip == 4
    (pair,) = ours.encode([Prompt("αβγ", pair="δεζ" * 9)], [Limit(100, 12)])
    assert isinstance(pair, Tokens)
    assert pair.ids.tolist() == theirs("αβγ", "δεζ" * 9, truncation=True, max_length=12)["input_ids"]
    assert pair.types is not None
    assert pair.types.tolist() == [0] * 5 + [1] * 7
    # The end of a template stays, where documents are cut.
    template = ScoreTemplate("own", "α : {{ messages[0].content }} : {{ messages[1].content }} ? ικ")
    (cut,) = ours.encode([Prompt("β", pair="γδ " * 30, template=template)], [Limit(100, 14)])
    assert isinstance(cut, Tokens)
    assert cut.ids.tolist() == theirs("α:β:" + "γδγδ" + "?ικ")["input_ids"]


def test_folders_without_a_tokenizer_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer. Looked for tokenizer\.json, vocab\.txt"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_older_files_are_converted(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "moon", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert one(Tokenizer.from_folder(tmp_path), "The moons", Limit(100)).ids.tolist() == [2, 5, 6, 7, 3]


def test_several_threads_may_share_a_tokenizer() -> None:
    ours = Tokenizer(wordpiece())
    texts = [" ".join(random.Random(n).choices(["the", "moon", "bread", "ships"], k=n % 30 + 1)) for n in range(200)]
    expected = [one(ours, text, Limit(20, -1)).ids.tolist() for text in texts]
    wrong: list[int] = []

    def ask(start: int) -> None:
        wrong.extend(
            index
            for index in range(start, 200, 4)
            if one(ours, texts[index], Limit(20, -1)).ids.tolist() != expected[index]
        )

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_internlm2s_sentencepiece_model_needs_no_code_of_the_hub(dummy_prefix: bool, tmp_path: Path) -> None:
    train_sentencepiece(
        tmp_path / "tokenizer", 400, model_type="bpe", byte_fallback=True, add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "tokenizer_class": "InternLM2Tokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {"400": {"content": "<|reward|>", "special": True, "normalized": False}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "internlm2"}')
    ours = Tokenizer.from_folder(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in [*filter(None, TEXTS), "  two  spaces ", "a smile 🙂"]:
        assert one(ours, text, Limit(10_000)).ids.tolist() == [1, *theirs.encode(text)]
    assert one(ours, "the moon<|reward|>", Limit(100)).ids.tolist() == [1, *theirs.encode("the moon"), 400]


def test_debertas_sentencepiece_model_is_converted(tmp_path: Path) -> None:
    special = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    train_sentencepiece(
        tmp_path / "spm", 100, model_type="unigram", hard_vocab_limit=False,
        **{f"{name}_piece": piece for name, piece in special.items()},
        **{f"{name}_id": number for number, name in enumerate(special)},
    )  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "deberta-v2"}')
    ours = Tokenizer.from_folder(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    for text in TEXTS:
        assert one(ours, text, Limit(10_000)).ids.tolist() == [1, *theirs.encode(text), 2]


def train_sentencepiece(prefix: Path, vocabulary: int, **options: Any) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(prefix), vocab_size=vocabulary, minloglevel=2, **options
    )
