"""Beginnings that prompts share: found by their ids, run once, and answered as each prompt alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from poolhouse.models.native.transformer import Transformer
from poolhouse.packing.pack import NO_PREFIX, Batch
from poolhouse.packing.prefixes import SharedPack, common_beginnings
from poolhouse.packing.tokens import Ids, Picture, Pictures, Tokens
from tests.models import parity
from tests.models.test_decoders import FACTORS, LONG, MIXED, TINY

RANDOM = np.random.default_rng(0)
FIRST, SECOND = RANDOM.integers(5, 99, 30), RANDOM.integers(5, 99, 12)


def made(*parts: int | Ids) -> Tokens:
    """A prompt of these ids, and of as many random ones as a number says."""
    return Tokens(np.concatenate([RANDOM.integers(5, 99, part) if isinstance(part, int) else part for part in parts]))


# Two beginnings, of which one holds a part of the other; rests of equal and other lengths; two equal prompts; a text
# that is a beginning; texts without.
PROMPTS = (
    *(
        made(FIRST, 7),
        made(SECOND, 20),
        made(FIRST, 7),
        made(4),
        made(SECOND, 20),
        made(FIRST, 1),
        made(25),
        made(FIRST, 3),
    ),
    *[made(FIRST, SECOND)] * 2,
    *(made(FIRST[:20], 9), Tokens(SECOND), made(FIRST, 12), made(SECOND, 33)),
)

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "one kv head": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "short window": ("Mistral", {"sliding_window": 6}),
    "window beyond some": ("Mistral", {"sliding_window": 40}),
    "qwen3": ("Qwen3", {}),
    "softcap": ("Gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "two ropes and windows": ("Gemma3Text", {"sliding_window": 6, "query_pre_attn_scalar": 16, "layer_types": MIXED}),
    "dynamic": ("Llama", {"max_position_embeddings": 40, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}),
    "longrope": (
        "Llama",
        {"rope_parameters": {"rope_type": "longrope", **FACTORS, **LONG, "original_max_position_embeddings": 40}},
    ),
}


def row(name: str) -> tuple[str, dict[str, Any]]:
    family, options = ROWS[name]
    if "rope_parameters" in options:
        options = options | {"rope_parameters": {"rope_theta": 10000.0, **options["rope_parameters"]}}
    return family, TINY | options


def shared(prompts: Sequence[Tokens], transformer: Transformer, **options: Any) -> list[Tensor]:
    """Hidden states of each prompt, of a pack that holds common beginnings once."""
    pack = SharedPack.of(prompts, max_tokens=transformer.longest_shared, **options)
    assert pack is not None
    assert pack.saved > 0
    return list(transformer(pack.batch)[pack.rows].split([len(prompt) for prompt in prompts]))


def alone(prompts: Sequence[Tokens], transformer: Transformer) -> list[Tensor]:
    return [transformer(Batch.pack([prompt])) for prompt in prompts]


def by_transformers(folder: Path, family: str, dtype: torch.dtype) -> list[Tensor]:
    model = getattr(transformers, f"{family}Model").from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(prompt.ids)[None]).last_hidden_state[0] for prompt in PROMPTS]


@pytest.mark.parametrize("kernels", ["0", None])
@pytest.mark.parametrize("name", ROWS)
def test_a_shared_beginning_equals_each_prompt_alone(
    name: str, kernels: str | None, tmp_path: Path, at_level: Callable[[str], None]
) -> None:
    if kernels is not None:
        at_level(kernels)
    family, options = row(name)
    parity.save(tmp_path, family, options)
    transformer = parity.load(tmp_path).transformer
    got = shared(PROMPTS, transformer)
    # As packs without shared beginnings.
    assert parity.worst(got, alone(PROMPTS, transformer)) < 1e-5
    assert parity.worst(got, by_transformers(tmp_path, family, torch.float32)) < 1e-5


@pytest.mark.parametrize("kernels", ["0", None])
@pytest.mark.parametrize("name", ["qwen3", "short window"])
def test_a_shared_beginning_is_as_near_in_bfloat16(
    name: str, kernels: str | None, tmp_path: Path, at_level: Callable[[str], None]
) -> None:
    if kernels is not None:
        at_level(kernels)
    family, options = row(name)
    parity.save(tmp_path, family, options)
    exact = parity.load(tmp_path).transformer
    rounded = parity.load(tmp_path, torch.bfloat16).transformer
    whole = alone(PROMPTS, exact)
    # Alone is 0.04 from float32 at most; the shares of two rounded answers may add as much as one more rounding.
    assert parity.worst(alone(PROMPTS, rounded), whole) < 0.06
    assert parity.worst(shared(PROMPTS, rounded), whole) < 0.06


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = tmp_path_factory.mktemp("qwen3")
    parity.save(folder, "Qwen3", TINY | {"num_hidden_layers": 2})
    return parity.load(folder).transformer


# Few ids, so that prompts often agree for a while by chance too.
beginning = st.lists(st.integers(5, 7), max_size=24)
prompts = st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(5, 8), min_size=1, max_size=14)), max_size=14)


@given(st.tuples(beginning, beginning, beginning, beginning), prompts, st.randoms())
def test_random_prompts_with_random_common_beginnings_equal_each_alone(
    qwen3: Transformer, beginnings: tuple[list[int], ...], ends: list[tuple[int, list[int]]], random: Any
) -> None:
    made = [Tokens(np.array(beginnings[number] + end)) for number, end in ends]
    adapters = [random.choice([None, "a"]) for _ in made]
    pack = SharedPack.of(made, adapters=adapters)
    if pack is None:
        return
    hidden = qwen3(pack.batch)[pack.rows].split([len(prompt) for prompt in made])
    assert parity.worst(list(hidden), alone(made, qwen3)) < 1e-5
    assert pack.ids.tolist() == [token for prompt in made for token in prompt.ids]
    assert torch.equal(pack.batch.ids[pack.rows], pack.ids)
    # An adapter's prompts lie in its rows alone.
    of_adapter = {row for _, start, end in pack.batch.segments.adapter_rows for row in range(start, end)}
    for adapter, rows in zip(adapters, pack.rows.split([len(prompt) for prompt in made]), strict=True):
        assert {int(place) in of_adapter for place in rows} == {adapter == "a"}


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), max_size=9))
def test_the_beginnings_that_save_most_are_shared(tails: list[list[int]]) -> None:
    lead = [7] * 12
    ids = [np.array(lead + tail) for tail in tails]
    found = common_beginnings(ids, range(len(ids)))
    members = [number for one in found for number in one.members]
    assert len(members) == len(set(members))
    for one in found:
        assert len({tuple(ids[number][: one.length]) for number in one.members}) == 1
        assert all(len(ids[number]) > one.length for number in one.members)
    assert sum(one.length * (len(one.members) - 1) for one in found) == most_saved(sorted(map(tuple, ids)))


def most_saved(ids: Sequence[tuple[int, ...]]) -> int:
    """By trying every way to cut the sorted prompts into groups."""
    best = [0]
    for end in range(1, len(ids) + 1):
        savings = [best[end - 1]]
        for first in range(end - 1):
            lasts = range(1, min(len(ids[first]), len(ids[end - 1])))
            length = max((n for n in lasts if ids[first][:n] == ids[end - 1][:n]), default=0)
            saved = length * (end - 1 - first)
            savings.append(best[first] + (saved if saved >= 64 and length >= 8 else 0))
        best.append(max(savings))
    return best[-1]


def test_prompts_lie_behind_their_beginnings() -> None:
    prompts = [made(FIRST, 2), made(3), made(SECOND, 40), *[made(FIRST, 4)] * 3]
    pack = SharedPack.of(prompts)
    assert pack is not None
    assert pack.batch.segments.lengths == (30, 2, 4, 4, 4, 3, 52)
    assert pack.batch.segments.prefixes == (NO_PREFIX, *[(0, 30)] * 4, NO_PREFIX, NO_PREFIX)
    assert pack.batch.positions.tolist() == [*range(30), 30, 31, *[30, 31, 32, 33] * 3, *range(3), *range(52)]
    assert pack.segments.lengths == (32, 3, 52, 34, 34, 34)
    assert pack.saved == 90


@pytest.mark.parametrize(
    ("lengths", "why"),
    [((7, 30), "a beginning of less than 8 tokens"), ((20, 4), "less than 64 tokens saved"), ((30, 1), "one prompt")],
)
def test_what_saves_little_is_not_shared(lengths: tuple[int, int], why: str) -> None:
    length, count = lengths
    assert SharedPack.of([made(FIRST[:length], 9) for _ in range(count)]) is None, why


def test_what_may_not_be_shared_is_not() -> None:
    ids = [prompt.ids for prompt in (made(FIRST, 9), made(FIRST, 9), made(FIRST, 9), made(FIRST, 9))]
    plain = [Tokens(one) for one in ids]
    assert SharedPack.of(plain) is not None
    assert SharedPack.of(plain, max_tokens=38) is None
    assert SharedPack.of(plain, adapters=["a", "b", "c", None]) is None
    assert SharedPack.of([Tokens(one, types=np.zeros_like(one)) for one in ids]) is None
    assert SharedPack.of([Tokens(one, attended=3) for one in ids]) is None
    picture = Picture(np.zeros((1, 4), np.float32), np.array([1]), np.array([True]))
    filled = np.arange(len(ids[0])) == len(ids[0]) - 1
    assert SharedPack.of([*plain[1:], Tokens(ids[0], pictures=Pictures((picture,), filled))]) is None


@pytest.mark.parametrize(
    ("family", "options", "longest"),
    [
        ("Llama", {"is_causal": False}, 0),
        ("Bert", {"head_dim": None}, 0),
        ("Qwen3", {}, True),
        ("Llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope", **FACTORS, **LONG}}, 16),
    ],
)
def test_only_causal_models_share_and_no_prompt_whose_length_turns_its_rope(
    family: str, options: dict[str, Any], longest: int, tmp_path: Path
) -> None:
    parity.save(tmp_path, family, TINY | options)
    transformer = parity.load(tmp_path).transformer
    assert transformer.longest_shared == longest or (longest is True and transformer.longest_shared > 2**32)
