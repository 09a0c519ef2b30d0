"""Models that transformers does not have, written out from their papers and model cards: one text, plain loops."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]


def nomic_with_experts(tensors: Tensors, ids: Tensor, heads: int, theta: float, chosen: int) -> Tensor:
    """nomic-embed-text-v2-moe: experts in every second layer, each token through `chosen` of them."""
    x = tensors["embeddings.word_embeddings.weight"][ids] + tensors["embeddings.token_type_embeddings.weight"][0]
    x = _layer_norm(x, tensors, "emb_ln")
    for layer in range(_layers(tensors, "encoder.layers.")):
        here = f"encoder.layers.{layer}."
        q, k, v = _linear(x, tensors, here + "attn.Wqkv").chunk(3, -1)
        mixed = _attend(_turn(q, heads, theta), _turn(k, heads, theta), _heads(v, heads))
        x = _layer_norm(x + _linear(mixed, tensors, here + "attn.out_proj"), tensors, here + "norm1")
        if layer % 2:
            answer = torch.stack([_experts(row, tensors, here + "mlp.", chosen) for row in x])
        else:
            answer = _linear(F.gelu(_linear(x, tensors, here + "mlp.fc1")), tensors, here + "mlp.fc2")
        x = _layer_norm(x + answer, tensors, here + "norm2")
    return x


def _experts(row: Tensor, tensors: Tensors, here: str, chosen: int) -> Tensor:
    weights = (tensors[here + "router.layer.weight"] @ row).softmax(0)
    count = len(weights)
    ups = tensors[here + "experts.mlp.w1"].view(count, -1, len(row))
    downs = tensors[here + "experts.mlp.w2"].view(count, -1, len(row))
    best = sorted(range(count), key=lambda expert: float(weights[expert]))[-chosen:]
    answers = [weights[expert] * (F.gelu(ups[expert] @ row) @ downs[expert]) for expert in best]
    return sum(answers, tensors[here + "experts.bias"])


def jina_v2(tensors: Tensors, ids: Tensor, heads: int) -> Tensor:
    """jina-embeddings-v2: BERT with symmetric ALiBi and a feed-forward gated by GELU."""
    x = tensors["embeddings.word_embeddings.weight"][ids] + tensors["embeddings.token_type_embeddings.weight"][0]
    x = _layer_norm(x, tensors, "embeddings.LayerNorm")
    distance = torch.tensor([[-abs(i - j) for j in range(len(ids))] for i in range(len(ids))]).float()
    bias = torch.stack([distance * slope for slope in _slopes(heads)])
    for layer in range(_layers(tensors, "encoder.layer.")):
        here = f"encoder.layer.{layer}."
        q, k, v = (_linear(x, tensors, f"{here}attention.self.{name}") for name in ("query", "key", "value"))
        mixed = _attend(_heads(q, heads), _heads(k, heads), _heads(v, heads), bias)
        answer = _linear(mixed, tensors, here + "attention.output.dense")
        x = _layer_norm(x + answer, tensors, here + "attention.output.LayerNorm")
        gate, value = (x @ tensors[here + "mlp.gated_layers.weight"].T).chunk(2, -1)
        x = _layer_norm(x + _linear(F.gelu(gate) * value, tensors, here + "mlp.wo"), tensors, here + "mlp.layernorm")
    return x


def latent_attention(tensors: Tensors, x: Tensor, heads: int) -> Tensor:
    """NV-Embed: each hidden state asks a dictionary, then passes a feed-forward gated by GELU, the value before the gate."""
    block = "cross_attend_blocks."
    dictionary = _layer_norm(tensors["latents"], tensors, block + "0.norm_context", 1e-5)
    q = _linear(_layer_norm(x, tensors, block + "0.norm", 1e-5), tensors, block + "0.fn.to_q")
    k, v = _linear(dictionary, tensors, block + "0.fn.to_kv").chunk(2, -1)
    x = x + _linear(_attend(*(_heads(rows, heads) for rows in (q, k, v))), tensors, block + "0.fn.to_out")
    up = _linear(_layer_norm(x, tensors, block + "1.norm", 1e-5), tensors, block + "1.fn.net.0")
    value, gate = up.chunk(2, -1)
    return x + _linear(value * F.gelu(gate), tensors, block + "1.fn.net.2")


def _slopes(heads: int) -> list[float]:
    """Press et al. 2022: a geometric row from 2^(-8/n); other counts take every second slope of the next power of two."""
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8.0 / power * (head + 1)) for head in range(power)]
    return slopes if power == heads else slopes + _slopes(2 * power)[0::2][: heads - power]


def _layers(tensors: Tensors, prefix: str) -> int:
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix))


def _linear(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    return F.linear(x, tensors[name + ".weight"], tensors.get(name + ".bias"))


def _layer_norm(x: Tensor, tensors: Tensors, name: str, eps: float = 1e-12) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[name + ".weight"], tensors[name + ".bias"], eps)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(len(x), heads, -1).transpose(0, 1)


def _turn(x: Tensor, heads: int, theta: float) -> Tensor:
    """Rotary positions as complex numbers: feature i is paired with feature i + half."""
    first, second = _heads(x, heads).double().chunk(2, -1)
    half = first.shape[-1]
    angles = torch.arange(len(x)).double()[:, None] / theta ** (torch.arange(half).double() / half)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1).float()


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
