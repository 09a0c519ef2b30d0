"""vLLM's tokenization_kwargs."""

from __future__ import annotations

from typing import Any

import pytest

from poolhouse import LLM, InputTooLong, InvalidRequest, PoolingParams
from tests.checkpoints import save_checkpoint

TEXT = "The moon falls under the water"
LONG = "The moon falls under the water " * 60


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM() as llm:
        yield llm


HEAD, TAIL = "head", "tail"
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[int, str, bool]]] = {
    "nothing": (TEXT, {}, {}, (8, HEAD, False)),
    "cut to the limit": (LONG, {"truncation": True}, {}, (256, HEAD, True)),
    "longest_first": (LONG, {"truncation": "longest_first"}, {}, (256, HEAD, True)),
    "cut to max_length": (TEXT, {"truncation": True, "max_length": 5}, {}, (5, HEAD, True)),
    "max_length of a shorter text": (TEXT, {"max_length": 8}, {}, (8, HEAD, False)),
    "truncate_prompt_tokens": (TEXT, {"truncate_prompt_tokens": 4}, {}, (4, HEAD, True)),
    "it wins over max_length": (TEXT, {"truncate_prompt_tokens": 4, "max_length": 6}, {}, (4, HEAD, True)),
    "left": (TEXT, {"truncate_prompt_tokens": 4, "truncation_side": "left"}, {}, (4, TAIL, True)),
    "the side alone leaves the cut": (
        TEXT,
        {"truncation_side": "left"},
        {"truncate_prompt_tokens": 4},
        (4, TAIL, True),
    ),
    "it wins over the parameters": (
        TEXT,
        {"truncate_prompt_tokens": 5},
        {"truncate_prompt_tokens": 4},
        (5, HEAD, True),
    ),
    "not cut": (TEXT, {"truncation": False}, {"truncate_prompt_tokens": 4}, (4, HEAD, True)),
    "without special tokens": (TEXT, {"add_special_tokens": False}, {}, (6, "bare", False)),
}


@pytest.mark.parametrize("row", ROWS)
def test_options_that_are_honoured(llm: LLM, row: str) -> None:
    text, options, params, (length, part, truncated) = ROWS[row]
    (whole,) = llm.encode(
        text, PoolingParams(overflow="chunk"), pooling_task="token_embed", tokenization_kwargs={"max_length": 10**4}
    )
    ids = whole.prompt_token_ids
    expected = {"head": [*ids[: length - 1], ids[-1]], "tail": [ids[0], *ids[1 - length :]], "bare": ids[1:-1]}[part]
    (output,) = llm.embed(text, pooling_params=PoolingParams(**params), tokenization_kwargs=options)
    assert output.prompt_token_ids == expected
    assert (len(expected), output.truncated) == (length, truncated)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 7}, InputTooLong, "length is 7 tokens"),
        ({"max_length": 7, "truncation": "do_not_truncate"}, InputTooLong, "length is 7 tokens"),
        ({"max_length": "7"}, InvalidRequest, "max_length must be an integer"),
        ({"truncation": "only_second"}, InvalidRequest, "truncation must be one of"),
        ({"add_special_tokens": 1}, InvalidRequest, "must be true or false"),
        ({"do_lower_case": "yes"}, InvalidRequest, "must be true or false"),
        ({"truncation_side": "middle"}, InvalidRequest, "truncation_side must be"),
        ({"max_lenght": 3}, InvalidRequest, "Did you mean 'max_length'"),
    ],
)
def test_options_that_are_refused(llm: LLM, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        llm.embed(TEXT, tokenization_kwargs=options)


def test_options_about_padding_warn_once_and_change_nothing(llm: LLM) -> None:
    padding = {"padding": "max_length", "pad_prompt_tokens": 3, "needs_detokenization": True, "max_length": 64}
    with pytest.warns(UserWarning, match="needs_detokenization, pad_prompt_tokens, padding mean nothing") as warned:
        (output,) = llm.embed(TEXT, tokenization_kwargs=padding)
    assert len(warned) == 1
    assert len(output.prompt_token_ids) == 8


def test_lower_casing_by_request(tmp_path: Any) -> None:
    save_checkpoint(tmp_path, "roberta, byte bpe")
    with LLM(str(tmp_path)) as cased:
        lower = {"do_lower_case": True}
        (output,) = cased.embed("The MOON", tokenization_kwargs=lower)
        assert output.prompt_token_ids == cased.embed("the moon")[0].prompt_token_ids
        assert output.prompt_token_ids != cased.embed("The MOON")[0].prompt_token_ids
        (pair,) = cased.score("The MOON", "SHIPS", tokenization_kwargs=lower)
        assert pair.outputs.score == pytest.approx(cased.score("the moon", "ships")[0].outputs.score, abs=1e-6)


def test_scores_take_them_too(llm: LLM) -> None:
    (cut,) = llm.score(TEXT, TEXT + " and more", tokenization_kwargs={"truncate_prompt_tokens": 8})
    assert cut.outputs.score == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputTooLong, match="length is 7 tokens"):
        llm.score(TEXT, TEXT, tokenization_kwargs={"max_length": 7})
