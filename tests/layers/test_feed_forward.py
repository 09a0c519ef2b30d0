"""Activations by transformers' words, and the feed-forward block by its formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.activations import ACT2FN

from poolhouse import kernels
from poolhouse.kernels.build import LEVELS
from poolhouse.layers.feed_forward import ACTIVATIONS, FeedForward
from poolhouse.layers.linear import Linear
from poolhouse.packing.pack import Segments

# Words of hub checkpoints with code of their own, which transformers does not have.
OURS = {"gelu_tanh": "gelu_pytorch_tanh", "identity": "linear"}


@pytest.mark.parametrize("word", sorted(ACTIVATIONS))
def test_an_activation_word_means_what_it_means_in_transformers(word: str) -> None:
    x = torch.linspace(-6, 6, 1201)
    expected = ACT2FN[OURS.get(word, word)](x)
    assert torch.allclose(ACTIVATIONS[word](x), expected, atol=1e-6)


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("word", ["gelu", "gelu_new", "relu", "silu", "relu2", "tanh"])
def test_the_inner_half_of_a_block_equals_its_formula(word: str, gated: bool, prepacked: bool) -> None:
    random = torch.Generator().manual_seed(10)
    weight, bias = torch.randn(32, 12, generator=random), torch.randn(32, generator=random)
    x = torch.randn(5, 12, generator=random)
    up = Linear(weight, bias)
    if prepacked:
        up.prepack()
    block = FeedForward(up, Linear(torch.eye(16 if gated else 32)), word, gated)
    hidden = x @ weight.T + bias
    expected = ACT2FN[word](hidden[:, :16]) * hidden[:, 16:] if gated else ACT2FN[word](hidden)
    assert torch.allclose(block._inner(x), expected, atol=2e-5)


class _Given:
    """A product that answers what it was made with."""

    in_features = out_features = 1

    def __init__(self, answer: torch.Tensor) -> None:
        self.answer = answer

    def padded_rows(self, count: int) -> int:
        return count

    def __call__(self, x: torch.Tensor, activation: str = "none", segments: Segments | None = None) -> torch.Tensor:
        return self.answer

    def add_to(self, residual: torch.Tensor, x: torch.Tensor, segments: Segments | None = None) -> torch.Tensor:
        return residual + self.answer


FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + (x / 2**0.5).erf()),
    "gelu_tanh": lambda x: x * 0.5 * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
}


@pytest.mark.parametrize("level", ["0", *(one.name for one in LEVELS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 5, 16, 48, 77])
@pytest.mark.parametrize("word", FORMULAS)
def test_a_gated_activation_equals_its_formula(
    word: str, width: int, dtype: torch.dtype, level: str, at_level: Callable[[str], None]
) -> None:
    at_level(level)
    random = torch.Generator().manual_seed(3)
    hidden = (4 * torch.randn(400, 2 * width, generator=random)).to(dtype)
    # Where powers end.
    edges = torch.tensor([0.0, -0.0, 200, -200, 1e30, -1e30, 88, -88, 3e38, -3e38])
    hidden[: len(edges), 0] = edges.to(dtype)
    gate, value = hidden.double().chunk(2, -1)
    layer = FeedForward(_Given(hidden), _Given(hidden), word, gated=True)
    with torch.inference_mode():
        got = layer._inner(hidden)
    activated = FORMULAS[word](gate.clamp(-1e9, 1e9)).where(gate.abs() < 1e9, gate.clamp(min=0))
    expected = activated * value
    # The activation within 2e-7 of the gate or a few roundings of itself, then two roundings in bfloat16.
    roundings = 1e-6 if dtype == torch.float32 else 2**-7
    assert got.dtype == dtype
    error = (got.double() - expected).abs()
    finite = expected.abs() < 1e38
    assert (error <= (2e-7 * gate.abs().clamp(max=6) + roundings * activated.abs()) * value.abs() + 1e-30)[finite].all()
    assert (got[~finite].abs() > 1e37).all()


@pytest.mark.skipif(kernels.level() is None, reason="no compiled kernels")
def test_what_is_not_a_number_stays_in_its_place() -> None:
    hidden = torch.ones(6, 40)
    hidden[2, 3], hidden[4, 20 + 7] = torch.nan, torch.nan
    with torch.inference_mode():
        for word in FORMULAS:
            got = FeedForward(_Given(hidden), _Given(hidden), word, gated=True)._inner(hidden)
            assert got.isnan().nonzero().tolist() == [[2, 3], [4, 7]]


@pytest.mark.skipif(kernels.level() is None, reason="no compiled kernels")
def test_gates_on_several_cores_are_those_on_one() -> None:
    hidden = torch.randn(1001, 600, generator=torch.Generator().manual_seed(3))
    layer = FeedForward(_Given(hidden), _Given(hidden), "silu", gated=True)
    before = torch.get_num_threads()
    with torch.inference_mode():
        torch.set_num_threads(1)
        alone = layer._inner(hidden)
        torch.set_num_threads(3)
        try:
            got = layer._inner(hidden)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(got, alone)
