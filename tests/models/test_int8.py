"""Models in int8: every family against the formula of int8 and against float32, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from poolhouse import LLM
from poolhouse.data import passages, queries
from poolhouse.errors import ConfigError
from poolhouse.layers import int8
from poolhouse.layers.adapted import AdaptedLinear
from poolhouse.layers.feed_forward import Experts
from poolhouse.layers.int8 import Int8Linear
from poolhouse.layers.linear import Linear
from poolhouse.models.files.hub import embedded_model
from poolhouse.models.plan import LoadOptions, decide
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Tokens
from tests.layers.test_int8 import PLAIN, TOLERANCE, by_formula, far
from tests.models import qwen_vl
from tests.models.adapters import save_adapter
from tests.models.parity import alone, load, packed, save, worst
from tests.models.test_deberta import ROWS as DEBERTA
from tests.models.test_decoders import ROWS as DECODERS
from tests.models.test_decoders import TINY as DECODER
from tests.models.test_embedding_models import MOE, Hub, moe_shapes, write_random
from tests.models.test_encoders import ROWS as ENCODERS
from tests.models.test_qwen_embedders import KINDS
from tests.models.test_qwen_embedders import made as save_reader
from tests.models.test_static import save_described
from tests.models.tiny import LAYERS, tokenizer
from tests.models.tiny import save as save_whole

ROWS = {
    **{
        row: ENCODERS[row]
        for row in ("bert", "xlm-roberta", "distilbert", "mpnet", "albert", "modernbert", "gte", "jina_embeddings_v3")
    },
    **{row: ENCODERS[row] for row in ("nomic_bert", "eurobert")},
    **{
        row: (DECODERS[row][0], DECODER | DECODERS[row][1])
        for row in ("llama", "mistral, window", "qwen2", "qwen3", "gemma2", "gemma3")
    },
    "deberta v3": ("DebertaV2", DEBERTA["deberta v3"]),
}


class Watched(Int8Linear):
    """An int8 layer that keeps how far each answer was from the formula."""

    worst: ClassVar[list[float]] = []

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self.plain = weight.clone(), bias

    def __call__(self, x: Tensor, activation: str = "none", segments: Any = None) -> Tensor:
        got = super().__call__(x, activation, segments)
        self.worst.append(far(got, PLAIN[activation](by_formula(x, *self.plain))))
        return got

    def add_to(self, residual: Tensor, x: Tensor, segments: Any = None) -> Tensor:
        got = super().add_to(residual, x, segments)
        self.worst.append(far(got, residual + by_formula(x, *self.plain)))
        return got


def products(backbone: Any) -> Iterator[Any]:
    """Those of blocks."""
    for layer in backbone.layers:
        yield from (layer.attention.qkv, layer.attention.out)
        inner = layer.feed_forward
        for one in inner.experts if isinstance(inner, Experts) else [inner]:
            yield from (one.up, one.down)


@pytest.mark.parametrize("row", ROWS)
def test_a_family_in_int8_is_the_formula(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, *ROWS[row])
    monkeypatch.setattr("poolhouse.models.native.transformer.Int8Linear", Watched)
    quantised = load(tmp_path, int8=True)
    assert {type(product) for product in products(quantised.transformer)} == {Watched}
    sizes = {id(one): one.out_features * one.in_features for one in products(quantised.transformer)}
    assert quantised.int8 == sum(sizes.values())
    Watched.worst.clear()
    got = packed(quantised.transformer)  # type: ignore[arg-type]
    assert len(Watched.worst) >= 4 * len(quantised.transformer.layers)  # type: ignore[attr-defined]
    # As in tests/layers/test_int8.py.
    assert max(Watched.worst) < TOLERANCE
    plain = packed(load(tmp_path).transformer)  # type: ignore[arg-type]
    cosines = torch.cat([torch.cosine_similarity(a, b) for a, b in zip(got, plain, strict=True)])
    # A number is off by 1 / 510 of its row's range at most: 0.998 was seen in a token, and 0.9997 on average.
    assert cosines.min() > 0.995
    assert cosines.mean() > 0.9995
    assert cosines.min() < 0.999999
    # A row is quantised by itself. Attention may add the same float32 numbers in another order, whose last bit could push a
    # number over the edge of a rounding; here it never does.
    assert worst(got, alone(quantised.transformer)) < 1e-5  # type: ignore[arg-type]


def test_experts_are_int8_and_their_router_is_not(tmp_path: Path) -> None:
    write_random(tmp_path, Hub("NomicBertModel", "", {}, tokenizer="unigram"), MOE, moe_shapes())
    transformer = load(tmp_path, int8=True).transformer
    with_experts = [layer for layer in transformer.layers if isinstance(layer.feed_forward, Experts)]  # type: ignore[attr-defined]
    assert with_experts
    assert all(isinstance(layer.feed_forward.router, Linear) for layer in with_experts)
    assert {type(product) for product in products(transformer)} == {Int8Linear}
    prompt = Batch.pack([Tokens(np.arange(len(transformer.tokens)))])  # type: ignore[attr-defined]
    cosines = torch.cosine_similarity(transformer(prompt), load(tmp_path).transformer(prompt))
    # A token whose experts are nearly equal may choose another.
    assert cosines.median() > 0.995


def test_what_lies_beside_the_blocks_stays_in_float32(tmp_path: Path) -> None:
    save(tmp_path, *ENCODERS["albert"])
    transformer = load(tmp_path, int8=True).transformer
    assert isinstance(transformer.project, Linear)  # type: ignore[attr-defined]
    assert transformer.tokens.dtype == torch.float32  # type: ignore[attr-defined]


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "per request"])
def test_adapters_change_int8_models(merged: bool, tmp_path: Path) -> None:
    tokenizer(tmp_path / "base")
    save_whole(tmp_path / "base", "BertModel", "BertConfig", LAYERS | {"max_position_embeddings": 64})
    save_adapter(tmp_path / "base", tmp_path / "adapter", "BertModel")
    chosen: dict[str, Any] = {"lora_modules": {"a": str(tmp_path / "adapter")}}
    chosen |= {"merge_adapter": "a"} if merged else {}
    request = {} if merged else {"lora_request": "a"}
    with (
        LLM(str(tmp_path / "base"), **chosen) as plain,
        LLM(str(tmp_path / "base"), **chosen, quantization="int8") as llm,
    ):
        products_of = {type(product) for product in products(llm.model.backbone)}
        assert products_of == ({Int8Linear} if merged else {AdaptedLinear})
        texts = ["w1 w2 w3", "w9", "w4 w7 w7 w30 w2"]
        expected, got = (one.embed_array(texts, use_tqdm=False, **request) for one in (plain, llm))
        without = llm.embed_array(texts, use_tqdm=False)
    assert (expected * got).sum(1).min() > 0.999
    if not merged:
        assert (expected * without).sum(1).max() < 0.99


def test_the_text_half_of_a_model_that_reads_pictures_is_int8_and_its_tower_is_not(tmp_path: Path) -> None:
    save_reader(KINDS["Qwen3-VL"], tmp_path)
    page = {"content": [{"type": "image_pil", "image_pil": qwen_vl.pictures()[0]}]}
    with LLM(str(tmp_path)) as plain, LLM(str(tmp_path), quantization="int8") as llm:
        backbone: Any = llm.model.backbone
        assert {type(product) for product in products(backbone)} == {Int8Linear}
        tower = {
            type(product) for block in backbone.tower.blocks for product in (block.attention.qkv, block.attention.out)
        }
        assert tower == {Linear}
        expected, got = (one.embed_array([page, "a text"], use_tqdm=False) for one in (plain, llm))
    assert (expected * got).sum(1).min() > 0.995


def test_the_embedded_model_is_close_to_float32_and_packed_is_alone() -> None:
    texts = [*queries(), *passages()]
    with LLM(overflow="truncate") as plain, LLM(overflow="truncate", quantization="int8") as llm:
        expected, got = (one.embed_array(texts, use_tqdm=False) for one in (plain, llm))
        single = np.concatenate([llm.embed_array([text], use_tqdm=False) for text in texts])
        notes, decision = " ".join(llm.model.facts.notes), llm.model.plan.described()
    # What is promised; 0.998 was seen here with 255 steps.
    assert (expected * got).sum(1).min() > 0.99
    # Rows are quantised by themselves. A number that the last bit of float32 pushes over the edge of a rounding is one of
    # 384 that are off by 1 / 255 of the range.
    assert (got * single).sum(1).min() > 0.9999
    assert (
        "Int8: 10.6 MB of weights instead of 42.5 MB; tables, norms and what else stays in float32 take 47.8 MB."
        in notes
    )
    assert int8.described() in notes
    assert decision["quantization"].startswith("int8: ")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"dtype": "bfloat16"}, r"dtype='bfloat16' beside quantization='int8': .* use 'auto' or 'float32'"),
        ({"dtype": "half"}, r"dtype='half' beside quantization='int8'"),
        ({"implementation": "transformers"}, r"quantization='int8' is for models of the native families; .*model_impl"),
        ({"overrides": {"position_embedding_type": "relative_key"}}, "quantization='int8' is for models of the native"),
    ],
)
def test_what_cannot_be_int8_is_refused_by_name(chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        decide(embedded_model(), LoadOptions("m", quantization="int8", **chosen))


def test_cuda_and_machines_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poolhouse.models.plan.device_of", lambda _: torch.device("cuda"))
    with pytest.raises(ConfigError, match="quantization='int8' is for CPUs, and the device is cuda"):
        decide(embedded_model(), LoadOptions("m", quantization="int8"))
    monkeypatch.undo()
    monkeypatch.setattr("poolhouse.models.plan.possible", lambda: False)
    with pytest.raises(ConfigError, match="neither compiled kernels nor a torch with oneDNN"):
        decide(embedded_model(), LoadOptions("m", quantization="int8"))


def test_a_table_of_vectors_has_no_products(tmp_path: Path) -> None:
    save_described(tmp_path)
    with pytest.raises(ConfigError, match=r"quantization='int8': .* holds static embeddings"):
        LLM(str(tmp_path), quantization="int8")


def test_a_classifiers_head_stays_in_float32(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    save_whole(
        tmp_path, "BertForSequenceClassification", "BertConfig", LAYERS | {"max_position_embeddings": 64}, num_labels=3
    )
    texts = ["w1 w2 w3", "w9", "w4 w7 w7 w30 w2"]
    with LLM(str(tmp_path)) as plain, LLM(str(tmp_path), quantization="int8") as llm:
        expected, got = (
            np.stack([output.outputs.probs for output in one.classify(texts, use_tqdm=False)]) for one in (plain, llm)
        )
    # Logits of up to 10 from hidden states that are off by a hundredth.
    assert 0 < np.abs(expected - got).max() < 0.1
