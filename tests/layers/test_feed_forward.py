"""Activations by transformers' words, and the feed-forward block by its formula."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from poolhouse.layers.feed_forward import ACTIVATIONS, FeedForward
from poolhouse.layers.linear import Linear

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
