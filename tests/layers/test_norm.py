"""Norm variants against transformers' modules, the order of casts included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from poolhouse.kernels.build import LEVELS
from poolhouse.layers.norm import LayerNorm, NormKind, RMSNorm

THEIRS = {"rms": LlamaRMSNorm, "rms_float": Olmo2RMSNorm, "rms_plus_1": GemmaRMSNorm}


def rows(dtype: torch.dtype) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    return (3 * torch.randn(64, 96, generator=random)).to(dtype)


def theirs(kind: str, dtype: torch.dtype) -> nn.Module:
    module: nn.Module = THEIRS[kind](96, eps=1e-5)
    nn.init.normal_(module.weight, 0.7, 0.3, generator=torch.Generator().manual_seed(6))
    return module.to(dtype)


levels = pytest.mark.parametrize("level", ["0", *(one.name for one in LEVELS)])
AtLevel = Callable[[str], None]


@levels
@pytest.mark.parametrize("kind", THEIRS)
def test_rms_norms_equal_transformers_in_float32(kind: NormKind, level: str, at_level: AtLevel) -> None:
    at_level(level)
    module = theirs(kind, torch.float32)
    x = rows(torch.float32)
    with torch.inference_mode():
        assert torch.allclose(RMSNorm(module.weight, 1e-5, kind)(x), module(x), atol=1e-5)


@levels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", THEIRS)
def test_rms_norms_equal_transformers_bit_for_bit_in_half_types(
    kind: NormKind, dtype: torch.dtype, level: str, at_level: AtLevel
) -> None:
    at_level(level)
    module = theirs(kind, dtype)
    # So many that sums in another order would change some of them.
    x = torch.cat([scale * rows(dtype) for scale in torch.linspace(0.1, 9, 200).to(dtype)])
    with torch.inference_mode():
        assert torch.equal(RMSNorm(module.weight, 1e-5, kind)(x), module(x))
        # Heads, as views of a wider row.
        heads = x.view(-1, 4, 96)[:, 1:3]
        assert torch.equal(RMSNorm(module.weight, 1e-5, kind)(heads), module(heads))


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_normed_where_they_lie(dtype: torch.dtype, level: str, at_level: AtLevel) -> None:
    at_level(level)
    norm = RMSNorm(torch.linspace(0.5, 2, 32).to(dtype), 1e-5, "rms")
    product = torch.randn(70, 8 * 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    product[4, 7], product[9, 40] = torch.nan, torch.inf
    before = product.clone()
    heads = product.split([3 * 32, 5 * 32], -1)[1].view(70, 5, 32)
    with torch.inference_mode():
        got = norm(heads)
        alone = torch.stack([torch.stack([norm(row[None])[0] for row in rows]) for rows in heads.contiguous()])
        turned = norm(heads.transpose(0, 1)).transpose(0, 1)
    assert got.is_contiguous()
    assert torch.equal(got.nan_to_num(7), alone.nan_to_num(7))
    assert torch.equal(turned.nan_to_num(7), alone.nan_to_num(7))
    assert torch.equal(product.nan_to_num(7), before.nan_to_num(7))


def test_the_order_of_casts_changes_bfloat16_numbers() -> None:
    module = theirs("rms", torch.bfloat16)
    x = rows(torch.bfloat16)
    after, before = (RMSNorm(module.weight, 1e-5, kind)(x) for kind in ("rms", "rms_float"))
    assert (after != before).float().mean() > 0.1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_equals_its_formula(dtype: torch.dtype, bias: bool) -> None:
    random = torch.Generator().manual_seed(7)
    weight = torch.randn(96, generator=random).to(dtype)
    offset = torch.randn(96, generator=random).to(dtype) if bias else None
    x = rows(dtype)
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    if offset is not None:
        expected = expected + offset.double()
    got = LayerNorm(weight, offset, 1e-5)(x)
    assert got.dtype == dtype
    # bfloat16 keeps 8 bits of results up to 16.
    assert (got.double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.04)
