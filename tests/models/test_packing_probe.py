"""The probe on models that go wrong in ways of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from poolhouse.models.fallback.backbones import Forward
from poolhouse.models.fallback.load import register_attention
from poolhouse.models.fallback.probe import Verdict, may_pack, reads_ahead

OPTIONS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
PLAIN_IDS = range(5, 99)
CPU = torch.device("cpu")


class Plain(transformers.BertModel):
    """Nothing wrong with it."""


class Sliced(transformers.BertModel):
    """Takes the first entries of a table of 64, so that packs of more tokens do not fit."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **rest: Any) -> Any:
        types = self.embeddings.token_type_ids[:, : input_ids.shape[1]]
        return super().forward(input_ids, position_ids=position_ids, token_type_ids=types, **rest)


class Leaky(transformers.BertModel):
    """Mixes a little of the whole pack's mean into every token: too little to tell packed from alone."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **rest: Any) -> Any:
        answer = super().forward(input_ids, position_ids=position_ids, **rest)
        answer.last_hidden_state = answer.last_hidden_state + 5e-3 * answer.last_hidden_state.mean(1, keepdim=True)
        return answer


class Deaf(transformers.BertModel):
    """Does not hand extra keywords on."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **_: Any) -> Any:
        return super().forward(input_ids, position_ids=position_ids)


class Overflowing(transformers.BertModel):
    """Answers with infinity."""

    def forward(self, input_ids: Tensor, **rest: Any) -> Any:
        answer = super().forward(input_ids, **rest)
        answer.last_hidden_state = answer.last_hidden_state * torch.inf
        return answer


@pytest.mark.parametrize(
    ("family", "verdict"),
    [
        (Plain, "packed, positions from 0"),
        (Sliced, "unpacked: Sliced raised RuntimeError"),
        (Leaky, "unpacked: texts of one pack change each other by"),
        (Deaf, "unpacked: the model does not hand extra keywords on to its attention"),
        (Overflowing, "unpacked: the answers to the probe at load are not finite"),
    ],
)
def test_only_a_model_that_keeps_texts_apart_is_packed(family: type[transformers.BertModel], verdict: str) -> None:
    forward = made(family)
    answer = probe(forward)
    assert answer.why.startswith(verdict)
    assert (answer.position_offset is None) == verdict.startswith("unpacked")


@pytest.mark.parametrize("family", [Deaf, Sliced])
def test_a_refused_model_gets_its_own_attention_back(family: type[transformers.BertModel]) -> None:
    forward = made(family)
    ids = torch.arange(5, 20)[None]
    before, attention = forward(ids), forward.model.config._attn_implementation
    assert probe(forward).position_offset is None
    assert forward.model.config._attn_implementation == attention
    torch.testing.assert_close(forward(ids), before, rtol=0, atol=0)


def test_a_decoder_does_not_read_ahead() -> None:
    assert reads_ahead(made(Plain), PLAIN_IDS, CPU)
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    decoder = transformers.GPT2Model(transformers.GPT2Config(**options)).eval()
    assert not reads_ahead(Forward(decoder, torch.float32), PLAIN_IDS, CPU)


def made(family: type[transformers.BertModel]) -> Forward:
    torch.manual_seed(0)
    model = family(transformers.BertConfig(**OPTIONS)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Forward(model, torch.float32)


def probe(forward: Forward) -> Verdict:
    register_attention()
    return may_pack(forward, PLAIN_IDS, 0, CPU)
