"""What callers may ask of pruning, and what they get; numbers are in tests/models/test_pruners.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from poolhouse import LLM, InvalidRequest, PoolingParams, PruningParams, Sentence, UnsupportedTask
from poolhouse.outputs import ScoringOutput
from tests.checkpoints import save_checkpoint
from tests.models.parity import change_config, change_tensors
from tests.models.pruners import Pruner

QUERY = "w1 w2 w3"
TEXT = "W4 W5 W6. W7 W8! W9 W10 W11."


@pytest.fixture(scope="module")
def provence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("provence")
    Pruner(folder, "provence")
    with LLM(str(folder)) as llm:
        yield llm


def pruned(llm: LLM, text: str = TEXT, **options: Any) -> ScoringOutput:
    return llm.score(QUERY, text, prune=PruningParams(**options))[0].outputs


def found(output: ScoringOutput) -> tuple[Sentence, ...]:
    assert output.sentences is not None
    return output.sentences


def test_the_ends_of_the_scale_keep_all_and_nothing(provence: LLM) -> None:
    everything, nothing = pruned(provence, threshold=0), pruned(provence, threshold=1)
    assert everything.pruned == TEXT
    assert everything.compression == 0.0
    assert nothing.pruned == ""
    assert nothing.compression == 1.0
    assert not any(sentence.kept for sentence in found(nothing))
    assert everything.score == nothing.score == provence.score(QUERY, TEXT)[0].outputs.score


def test_a_call_that_does_not_prune_says_so(provence: LLM) -> None:
    for prune in (None, False):
        output = provence.score(QUERY, TEXT, prune=prune)[0].outputs
        assert (output.pruned, output.sentences, output.compression) == (None, None, None)


def test_a_title_stays_where_another_sentence_does(provence: LLM) -> None:
    means = np.array([sentence.probability for sentence in found(pruned(provence, rule="mean"))])
    # The first sentence is the least likely of three in this order.
    pieces = np.array(["W4 W5 W6. ", "W7 W8! ", "W9 W10 W11. "])
    text = "".join(pieces[np.argsort(means)])
    means = np.array([sentence.probability for sentence in found(pruned(provence, text, rule="mean"))])
    between = float(np.sort(means)[1:].mean())
    usual = pruned(provence, text, threshold=between, rule="mean")
    titled = pruned(provence, text, threshold=between, rule="mean", keep_first=True)
    assert sum(sentence.kept for sentence in found(usual)) == 1
    assert [s.kept for s in found(titled)] == [index == 0 or s.kept for index, s in enumerate(found(usual))]
    assert pruned(provence, text, threshold=1, keep_first=True).pruned == ""


def test_tokens_vote_or_give_their_mean(provence: LLM) -> None:
    """Between them lie sentences with a few sure tokens: by votes at 0.1 they stay, by their mean they go."""
    text = " ".join(f"W{number} W{number * 7 % 40} W{number * 3 % 40}." for number in range(12))
    means = [sentence.probability for sentence in found(pruned(provence, text))]
    at = float(np.median(means))
    by_mean, by_votes = (pruned(provence, text, threshold=at, rule=rule) for rule in ("mean", "votes"))
    assert [sentence.kept for sentence in found(by_mean)] == [mean > at for mean in means]
    assert [sentence.probability for sentence in found(by_votes)] == means
    assert pruned(provence, text, threshold=at) == by_votes
    assert by_votes.pruned != by_mean.pruned


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("W4", 1),
        ("   ", 1),
        ("W4.", 1),
        ("吾輩は猫である。W5 W6。🙂 é", 3),
        ("W4\r\n\r\nW5", 2),
        ("\u200b", 1),
    ],
)
def test_any_text_is_read(provence: LLM, text: str, count: int) -> None:
    output = pruned(provence, text, threshold=0)
    assert len(found(output)) == count
    assert output.score == pytest.approx(provence.score(QUERY, text)[0].outputs.score, abs=1e-6)
    assert "".join(text[sentence.start : sentence.end] for sentence in found(output)) == text


def test_many_pairs_and_queries_of_their_own(provence: LLM) -> None:
    queries = [f"w{number}" for number in range(30)]
    texts = [" ".join(f"W{number}." for number in range(1, count + 1)) for count in range(1, 31)]
    together = provence.score(queries, texts, prune=0.4)
    assert [len(found(output.outputs)) for output in together] == list(range(1, 31))
    for query, text, output in zip(queries[::7], texts[::7], together[::7], strict=True):
        (alone,) = provence.score(query, text, prune=0.4)
        assert alone.outputs.score == pytest.approx(output.outputs.score, abs=1e-5)
        assert alone.outputs.pruned == output.outputs.pruned


def test_sentences_may_be_texts_or_characters(provence: LLM) -> None:
    own = pruned(provence, threshold=0)
    spans = [(sentence.start, sentence.end) for sentence in found(own)]
    assert pruned(provence, threshold=0, sentences=[spans]) == own
    bare = [TEXT[start:end].strip() for start, end in spans]
    by_text = pruned(provence, threshold=0, sentences=[bare])
    assert by_text.pruned == TEXT
    assert [sentence.probability for sentence in found(by_text)] == [sentence.probability for sentence in found(own)]
    # What stands in none is read, and is never kept.
    assert pruned(provence, threshold=0, sentences=[[spans[0], spans[2]]]).pruned == "W4 W5 W6. W9 W10 W11."
    assert pruned(provence, threshold=0, sentences=[[]]).pruned == ""


def test_a_query_may_be_cut(provence: LLM) -> None:
    long = "w1 " * 200
    with pytest.raises(InvalidRequest, match="The query has 200 tokens"):
        provence.score(long, TEXT, prune=0.1)
    params = PoolingParams(max_tokens_per_query=5)
    (cut,) = provence.score(long, TEXT, prune=0.1, pooling_params=params)
    (same,) = provence.score("w1 " * 5, TEXT, prune=0.1)
    assert cut.outputs.score == pytest.approx(same.outputs.score, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prune": -0.1}, "threshold must be from 0 to 1"),
        ({"prune": float("nan")}, "threshold must be from 0 to 1"),
        ({"prune": "0.1"}, "prune must be a threshold"),
        ({"prune": {"keep_title": True}}, "has no field 'keep_title'"),
        ({"prune": {"keep_first": 1}}, "keep_first"),
        ({"prune": {"rule": "max"}}, "rule must be one of"),
        ({"prune": {"sentences": [["W4"], ["W5"]]}}, "for each of the 1 documents"),
        ({"prune": {"sentences": ["W4"]}}, "for each of the 1 documents"),
        ({"prune": {"sentences": [["W7", "W4"]]}}, r"sentences\[0\]\[1\] is 'W4'"),
        ({"prune": {"sentences": [[""]]}}, r"sentences\[0\]\[0\] is ''"),
        ({"prune": {"sentences": [[(0, 5), (4, 9)]]}}, r"sentences\[0\]\[1\] is \(4, 9\)"),
        ({"prune": {"sentences": [[(0, 500)]]}}, r"sentences\[0\]\[0\]"),
        ({"prune": {"sentences": [[True]]}}, r"sentences\[0\]\[0\]"),
        ({"prune": 0.1, "mode": "dense"}, "mode"),
        ({"prune": 0.1, "chat_template": "{{ query }}{{ document }}"}, "chat_template"),
        ({"prune": 0.1, "instruction": "shortly"}, "instruction"),
        ({"prune": 0.1, "tokenization_kwargs": {"truncate_prompt_tokens": 8}}, "truncate_prompt_tokens beside prune"),
        ({"prune": 0.1, "pooling_params": PoolingParams(max_tokens_per_doc=3)}, "max_tokens_per_doc beside prune"),
    ],
)
def test_what_is_wrong_is_named(provence: LLM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        provence.score(QUERY, TEXT, **options)


def test_a_bad_document_is_named(provence: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"data_2\[1\]"):
        provence.score(QUERY, [TEXT, "\ud800"], prune=0.1)


def test_a_model_that_does_not_prune_says_so() -> None:
    with LLM() as llm, pytest.raises(UnsupportedTask, match="has no head for pruning"):
        llm.score("a", "b", prune=0.1)


def test_streams_and_coroutines_prune(provence: LLM) -> None:
    pairs = [(QUERY, TEXT), ("w5", "W9. " * 60), (QUERY, "")]
    streamed = [output.outputs.pruned for output in provence.stream(pairs, "score", prune=0.4)]  # type: ignore[union-attr]
    assert streamed == [provence.score(query, text, prune=0.4)[0].outputs.pruned for query, text in pairs]
    awaited = asyncio.run(provence.score_async(QUERY, [TEXT, TEXT], prune=0.4))
    assert [output.outputs.pruned for output in awaited] == [streamed[0]] * 2


@pytest.mark.parametrize("kind", ["xlm-roberta, unigram", "modernbert, byte bpe"])
def test_tokens_that_hold_the_blank_before_them_belong_to_their_word(kind: str, tmp_path: Path) -> None:
    """A sentence has the tokens of its words, although offsets of these tokens begin within the sentence before."""
    save_checkpoint(tmp_path, kind, "ForSequenceClassification", tokens=190, num_labels=1)
    pieces = ["The moon pulls the sea. ", "Bread rises. ", "Ships sail! ", "Sailors follow the tides."]
    change_tensors(
        tmp_path, add={"token_classifier.weight": torch.randn(2, 32), "token_classifier.bias": torch.zeros(2)}
    )
    # Any encoder may have been trained by Provence's code.
    change_config(tmp_path, architectures=["EncoderForCompressionAndRanking"])
    with LLM(str(tmp_path)) as llm:
        (output,) = llm.score("moon", "".join(pieces), prune=0.4)
        assert len(output.prompt_token_ids) < 190
        labels = llm.encode([{"prompt_token_ids": output.prompt_token_ids}], pooling_task="token_classify")
    text = "".join(pieces)
    offsets = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text, add_special_tokens=False).offsets
    # Where the letters of a token begin; a blank alone belongs to the sentence before it.
    begins = [end - len(text[start:end].lstrip() or text[start:end]) for start, end in offsets]
    keep = labels[0].outputs.array[-1 - len(begins) : -1, 1]
    spans = [(sentence.start, sentence.end) for sentence in found(output.outputs)]
    means = [
        float(np.mean([value for value, begin in zip(keep, begins, strict=True) if start <= begin < end]))
        for start, end in spans
    ]
    assert [text[start:end] for start, end in spans] == pieces
    assert [sentence.probability for sentence in found(output.outputs)] == pytest.approx(means, abs=1e-6)
