"""All blocks over a few rows in one call: against transformers and block by block, with and without helpers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poolhouse import kernels
from poolhouse.models.native.transformer import Transformer
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Tokens
from tests.models.parity import load, reference, save, texts, worst

pytestmark = pytest.mark.skipif(
    not (kernels.level() or "").startswith("avx512"), reason="the kernel is for CPUs with AVX-512"
)

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "vocab_size": 99,
}
TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
MODERN = SIZES | TOKENS | {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 1}
GROUPED = SIZES | TOKENS | {"num_key_value_heads": 2, "head_dim": 32}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SIZES),
    "bert, relu": ("Bert", SIZES | {"hidden_act": "relu"}),
    "bert, gelu by tanh": ("Bert", SIZES | {"hidden_act": "gelu_new"}),
    "xlm-roberta": ("XLMRoberta", SIZES),
    "mpnet": ("MPNet", SIZES),
    "modernbert": ("ModernBert", MODERN),
    "modernbert, biases": ("ModernBert", MODERN | {"norm_bias": True, "attention_bias": True, "mlp_bias": True}),
    "nomic_bert": ("NomicBert", SIZES),
    "gte": ("Gte", SIZES),
    "qwen3": ("Qwen3", GROUPED),
    "qwen3, window": (
        "Qwen3",
        GROUPED | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "llama": ("Llama", GROUPED),
    "eurobert": ("EuroBert", GROUPED),
}


def batch(*lengths: int) -> Batch:
    random = np.random.default_rng(len(lengths))
    return Batch.pack([Tokens(random.integers(5, 99, length)) for length in lengths])


def block_by_block(transformer: Transformer, pack: Batch) -> Tensor:
    few_rows = transformer.few_rows
    transformer.__dict__["few_rows"] = None
    try:
        return transformer(pack)
    finally:
        transformer.__dict__["few_rows"] = few_rows


@pytest.fixture(autouse=True)
def on_one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("row", ROWS)
def test_each_text_equals_transformers(row: str, tmp_path: Path) -> None:
    name, options = ROWS[row]
    save(tmp_path, name, options)
    transformer = load(tmp_path).transformer
    assert transformer.few_rows is not None
    packs = [Batch.pack([text]) for text in texts()]
    assert all(transformer.few_rows.takes(pack.segments) for pack in packs)
    got = [transformer(pack) for pack in packs]
    # Both sides add the same float32 numbers in another order.
    assert worst(got, reference(tmp_path, name)) < 1e-5
    assert worst(got, [block_by_block(transformer, pack) for pack in packs]) < 1e-5


@pytest.mark.parametrize("lengths", [(1,), (6,), (7,), (3, 1, 9), (13, 16, 17), (32, 32), (64,)])
@pytest.mark.parametrize("row", ["bert", "modernbert", "qwen3"])
def test_a_pack_equals_block_by_block(row: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    save(tmp_path, *ROWS[row])
    transformer, pack = load(tmp_path).transformer, batch(*lengths)
    expected = block_by_block(transformer, pack)
    assert worst([transformer(pack)], [expected]) < 1e-5


@pytest.mark.parametrize("row", ["bert", "modernbert, biases", "mpnet", "qwen3"])
def test_in_bfloat16_it_is_nearer_to_float32_than_block_by_block(row: str, tmp_path: Path) -> None:
    """It rounds what enters a product, and not what is kept between."""
    save(tmp_path, *ROWS[row])
    exact, transformer = load(tmp_path).transformer, load(tmp_path, torch.bfloat16).transformer
    if "avx512_bf16" in kernels.cpu_flags():
        assert transformer.few_rows is not None
    elif transformer.few_rows is None:
        return  # oneDNN multiplies no bfloat16 here
    pack = batch(7, 9)
    expected, got = exact(pack), transformer(pack)
    assert got.dtype == torch.bfloat16

    def error(answer: Tensor) -> float:
        return float((answer.float() - expected).norm() / expected.norm())

    assert 0 < error(got) < error(block_by_block(transformer, pack))


@torch.inference_mode()
@pytest.mark.parametrize("row", ROWS)
def test_in_int8_it_is_block_by_block_to_the_last_bit(row: str, tmp_path: Path) -> None:
    """So a short pack and a long one answer the same: a difference in the last bit could push a number over a rounding."""
    save(tmp_path, *ROWS[row])
    transformer = load(tmp_path, int8=True).transformer
    assert transformer.few_rows is not None
    for lengths in [(1,), (6,), (7,), (3, 1, 9), (13, 16, 17), (32, 32), (64,)]:
        pack = batch(*lengths)
        assert transformer.few_rows.takes(pack.segments)
        assert torch.equal(transformer(pack), block_by_block(transformer, pack))
    # The same texts in a pack that is too long.
    texts = [Tokens(np.arange(5 + number, 15 + number)) for number in range(7)]
    together = transformer(Batch.pack(texts))
    assert not transformer.few_rows.takes(Batch.pack(texts).segments)
    assert torch.equal(together, torch.cat([transformer(Batch.pack([text])) for text in texts]))


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("row", ["bert", "modernbert", "qwen3"])
def test_helpers_change_nothing(row: str, int8: bool, tmp_path: Path) -> None:
    save(tmp_path, *ROWS[row])
    transformer, packs = load(tmp_path, int8=int8).transformer, [batch(9), batch(20, 30), batch(64)]
    alone = [transformer(pack) for pack in packs]

    def helped(number: int) -> bool:
        torch.get_num_threads()
        kernels.helpers.count = 1 + number % 3
        pack = number % 3
        return all(torch.equal(transformer(packs[pack]), alone[pack]) for _ in range(40))

    # One leads at a time; the others go without helpers.
    with ThreadPoolExecutor(3) as threads:
        assert all(threads.map(helped, range(6)))


def test_a_forked_child_makes_helpers_of_its_own(tmp_path: Path) -> None:
    save(tmp_path, *ROWS["bert"])
    transformer, pack = load(tmp_path).transformer, batch(30)
    expected = transformer(pack)
    kernels.helpers.count = 1
    try:
        transformer(pack)
        child = os.fork()
        if child == 0:  # pragma: no cover - another process
            os._exit(0 if all(torch.equal(transformer(pack), expected) for _ in range(20)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.equal(transformer(pack), expected)
    finally:
        kernels.helpers.count = 0


def test_longer_packs_and_more_threads_go_block_by_block(tmp_path: Path) -> None:
    save(tmp_path, *ROWS["bert"])
    few_rows = load(tmp_path).transformer.few_rows
    assert few_rows is not None
    assert few_rows.takes(batch(few_rows.rows).segments)
    assert not few_rows.takes(batch(few_rows.rows, 1).segments)
    torch.set_num_threads(2)
    assert not few_rows.takes(batch(4).segments)
    kernels.helpers.count = 1
    try:
        assert few_rows.takes(batch(4).segments)
    finally:
        kernels.helpers.count = 0


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Bert", SIZES | {"hidden_size": 96}),
        ("Bert", SIZES | {"intermediate_size": 200}),
        ("Bert", SIZES | {"num_attention_heads": 16}),
        ("Bert", SIZES | {"hidden_act": "mish"}),
        ("Gemma2", GROUPED | {"attn_logit_softcapping": 2.0}),
    ],
    ids=["columns", "inner columns", "narrow heads", "activation", "softcap"],
)
def test_what_the_kernel_cannot_run_goes_block_by_block(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, family, options)
    assert load(tmp_path, int8=True).transformer.few_rows is None
    transformer = load(tmp_path).transformer
    assert transformer.few_rows is None
    assert worst([transformer(Batch.pack([text])) for text in texts()], reference(tmp_path, family)) < 1e-5


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_not_a_number_stays_one(int8: bool, tmp_path: Path) -> None:
    save(tmp_path, *ROWS["bert"])
    transformer = load(tmp_path, int8=int8).transformer
    assert transformer.few_rows is not None
    transformer.tokens[7] = torch.nan
    got = transformer(Batch.pack([Tokens(np.array([5, 7, 9])), Tokens(np.array([5, 9]))]))
    assert got[:3].isnan().any(1).all()
    assert got[3:].isfinite().all()
