"""Over-long prompts: split before the model, joined after it."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from poolhouse.engine.intake import chunks_of, join, split
from poolhouse.engine.queue import WaitingRequest
from poolhouse.engine.request import Answer, Request, Timing
from poolhouse.errors import NoStep
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.tokens import Flags, Tokens
from poolhouse.params import PoolingParams


def test_slices_keep_every_token_in_order() -> None:
    pieces = split(Tokens(np.arange(10), original_tokens=10, skip=5), 4)
    assert [piece.ids.tolist() for piece in pieces] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [piece.skip for piece in pieces] == [4, 1, 0]
    assert not any(piece.truncated for piece in pieces)


def test_unit_vectors_join_to_their_weighted_mean_of_unit_length() -> None:
    one, two = np.array([1.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)
    joined = join([one, two], [3, 1], "embed")
    assert joined == pytest.approx(np.array([3, 1]) / np.sqrt(10), abs=1e-6)


def test_raw_vectors_join_to_their_weighted_mean() -> None:
    one, two = np.array([4.0, 0.0], np.float32), np.array([0.0, 8.0], np.float32)
    assert join([one, two], [1, 3], "embed") == pytest.approx([1.0, 6.0])


def test_token_rows_are_joined_end_to_end() -> None:
    rows = [np.ones((2, 3), np.float32), np.zeros((1, 3), np.float32)]
    assert join(rows, [2, 1], "token_embed").shape == (3, 3)


def test_sure_probabilities_are_not_stretched_to_unit_length() -> None:
    """Nearly all of a sure classifier's probability lies on one label, yet its answer is no vector."""
    one, two = np.array([0.9999, 0.0001], np.float32), np.array([0.0001, 0.9999], np.float32)
    assert join([one, two], [3, 1], "classify") == pytest.approx([0.74995, 0.25005], abs=1e-5)


def test_a_text_in_chunks_took_as_long_as_the_last_of_them() -> None:
    request = Request(Prompt("text"), "embed", further=("token_embed",))
    tokens = Tokens(np.arange(5), original_tokens=5)
    further = (("token_embed", PoolingParams()),)
    whole = WaitingRequest(tokens, "embed", PoolingParams(), request.future, further=further)
    parts = chunks_of(request, whole, split(tokens, 2))
    assert all(part.further == further for part in parts)
    for part, timing in zip(parts, (Timing(1, 2, 3), Timing(1, 7, 1), Timing(1, 1, 1)), strict=True):
        rows = np.ones((part.length, 3), np.float32)
        part.future.set_result(Answer(rows[0], part.tokens, further={"token_embed": rows}, timing=timing))
    answer = request.future.result(0)
    assert answer.timing == Timing(1, 7, 1)
    assert (answer.chunks, answer.array.shape, answer.further["token_embed"].shape) == (3, (3,), (5, 3))


@pytest.mark.parametrize(("kept", "error"), [(np.zeros(4, np.bool_), None), (None, NoStep)])
def test_no_row_is_an_answer_of_a_text_in_chunks_whose_tokens_are_all_skipped(
    kept: Flags | None, error: type[Exception] | None
) -> None:
    request = Request(Prompt("text"), "token_embed")
    whole = WaitingRequest(
        Tokens(np.arange(4), original_tokens=4, kept=kept), "token_embed", PoolingParams(), request.future
    )
    for part in chunks_of(request, whole, split(whole.tokens, 2)):
        part.future.set_result(Answer(np.ones((0, 3), np.float32), part.tokens))
    if error is None:
        assert request.future.result(0).array.shape == (0, 3)
    else:
        assert isinstance(request.future.exception(0), error)


@pytest.mark.parametrize("count", [1, 3])
def test_a_cancelled_text_takes_its_chunks_along(count: int) -> None:
    request = Request(Prompt("text"), "embed", future=Future())
    tokens = Tokens(np.arange(count))
    whole = WaitingRequest(tokens, "embed", PoolingParams(), request.future)
    parts = chunks_of(request, whole, split(tokens, 1))
    assert request.future.cancel()
    assert [part.future.cancelled() for part in parts] == [True] * count
