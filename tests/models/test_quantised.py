"""Quantised checkpoints: each layout against the plain checkpoint that it means, and what is refused.

The layouts are written by `quantised.py`. Once, its tensors were read by compressed-tensors 0.20.1, bitsandbytes 0.50.2 and
the code of AutoAWQ 0.2.9 and GPTQModel 7.7.0, which gave the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poolhouse import LLM
from poolhouse.engine.open import memory_of
from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.layers.int8 import Int8Linear, quantised
from poolhouse.models.files.checkpoint import Checkpoint
from poolhouse.models.files.quantised import read_quantised
from poolhouse.models.load import load
from poolhouse.models.plan import LoadOptions
from poolhouse.settings import Settings
from tests.models import tiny_rerankers
from tests.models.adapters import save_adapter
from tests.models.parity import alone, change_config, packed, reference, worst
from tests.models.quantised import LAYOUTS, Layout, bitsandbytes_8bit, compressed, gptq, of_groups, quantise
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {"num_key_value_heads": 2, "head_dim": 32, "rope_theta": 10000.0}
# Large enough that every part matters, small enough that sums of 256 numbers stay within a few digits.
STD = 0.1


def bert(folder: Path) -> None:
    tokenizer(folder)
    save(folder, "BertModel", "BertConfig", LAYERS | SIZES | {"max_position_embeddings": 64}, STD)


def qwen(folder: Path) -> None:
    tokenizer(folder, "decoder")
    save(folder, "Qwen3Model", "Qwen3Config", LAYERS | SIZES | DECODER, STD)


MODELS: dict[str, tuple[str, Callable[[Path], None]]] = {"BERT": ("Bert", bert), "Qwen3": ("Qwen3", qwen)}


def made(tmp_path: Path, layout: Layout, model: str = "BERT", skip: str = "-") -> tuple[Path, Path]:
    """(the quantised checkpoint, the plain one that it means)."""
    plain, folder = tmp_path / "plain", tmp_path / "quantised"
    MODELS[model][1](plain)
    quantise(plain, folder, layout, skip)
    return folder, plain


def backbone(folder: Path, **options: Any) -> Any:
    return load(folder, LoadOptions("m", **options)).backbone


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_means_what_it_says(layout: str, model: str, tmp_path: Path) -> None:
    folder, plain = made(tmp_path, LAYOUTS[layout], model)
    tensors = Checkpoint(folder, quantised=read_quantised(Checkpoint(folder).config)).tensors
    expected = load_file(plain / "model.safetensors")
    assert set(tensors) == set(expected)
    assert len(tensors) == len(expected)
    for name, tensor in expected.items():
        # A product of two numbers of float32, in either order.
        assert torch.allclose(tensors[name], tensor, rtol=1e-6, atol=0), name
        assert tensors[name].dtype == torch.float32
    transformer = backbone(folder)
    got = packed(transformer)
    assert worst(got, reference(plain, MODELS[model][0])) < 1e-5
    assert worst(got, alone(transformer)) < 1e-5


@pytest.mark.parametrize(
    "layout", ["int8 per channel", "gptq 4 bit, act order", "bitsandbytes nf4", "fp8, blocks of 128"]
)
def test_a_reranker_scores_as_the_plain_one(layout: str, tmp_path: Path) -> None:
    tiny_rerankers.save(tmp_path / "Qwen3-Reranker", "Qwen3", **SIZES | DECODER)
    tiny_rerankers.card(tmp_path / "Qwen3-Reranker", base_model="Qwen/Qwen3-Reranker-0.6B", pipeline_tag="text-ranking")
    quantise(tmp_path / "Qwen3-Reranker", tmp_path / "Qwen3-Reranker-quantised", LAYOUTS[layout])
    scores = []
    for folder in ("Qwen3-Reranker", "Qwen3-Reranker-quantised"):
        with LLM(str(tmp_path / folder)) as llm:
            answers = llm.score(tiny_rerankers.QUERIES, tiny_rerankers.DOCUMENTS, use_tqdm=False)
            scores.append([answer.outputs.score for answer in answers])
    assert np.ptp(scores[0]) > 0.01
    assert np.allclose(*scores, rtol=0, atol=1e-5)


def test_texts_go_through_and_notes_and_the_plan_say_what_was_done(tmp_path: Path) -> None:
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    layout = compressed()
    layout.settings["config_groups"]["group_0"]["input_activations"] = activations
    layout.settings["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    folder, plain = made(tmp_path, layout)
    name = "encoder.layer.0.attention.self.k_scale"
    save_file(load_file(folder / "model.safetensors") | {name: torch.ones(1)}, folder / "model.safetensors")
    with LLM(str(folder)) as llm, LLM(str(plain)) as expected:
        assert np.abs(llm.embed_array(TEXTS) - expected.embed_array(TEXTS)).max() < 1e-6
        notes, described = " ".join(llm.model.facts.notes), llm.model.plan.described()
    assert (
        "is quantised by compressed-tensors (int8, a scale per channel). Its 12 weights are multiplied out to" in notes
    )
    assert "The files quantise activations too; here they are not." in notes
    assert "(kv_cache_scheme)" in notes
    assert f"left out: {name}." in notes
    assert described["checkpoint"] == "compressed-tensors, int8, a scale per channel"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_numbers_are_rounded_once_to_the_type_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    folder, plain = made(tmp_path, LAYOUTS["awq, groups of 32"], "Qwen3")
    got, expected = (packed(backbone(one, dtype=dtype)) for one in (folder, plain))
    assert worst(got, expected) == 0


def test_modules_that_are_not_converted_stay_as_they_are(tmp_path: Path) -> None:
    layout = bitsandbytes_8bit()
    layout.settings["llm_int8_skip_modules"] = ["query"]
    folder, plain = made(tmp_path, layout, skip="query")
    assert worst(packed(backbone(folder)), packed(backbone(plain))) < 1e-6


def test_groups_of_modules_have_schemes_of_their_own(tmp_path: Path) -> None:
    layout, other = compressed(), compressed(4, "group", 32, packed=True)
    groups = layout.settings["config_groups"]
    groups["group_1"] = other.settings["config_groups"]["group_0"] | {"format": "pack-quantized"}
    groups["group_0"] |= {"targets": [r"re:.*output\.dense"], "format": "int-quantized"}
    layout.settings["format"] = "mixed-precision"
    folder, plain = made(tmp_path, layout, skip="attention.self")
    changed, means = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    for name in [name for name in changed if "attention.self" in name and name.endswith("weight")]:
        parts, means[name] = other.write(changed.pop(name))
        changed |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    for name in [name for name in changed if "intermediate" in name and "weight" in name]:
        del changed[name]
    for name in [name for name in means if "intermediate.dense.weight" in name]:
        parts, means[name] = other.write(means[name])
        changed |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(changed, folder / "model.safetensors")
    save_file(means, plain / "model.safetensors")
    change_config(folder, quantization_config=layout.settings)
    assert worst(packed(backbone(folder)), packed(backbone(plain))) < 1e-6
    groups["group_1"]["targets"] = ["re:decoder.*"]
    change_config(folder, quantization_config=layout.settings)
    with pytest.raises(CheckpointError, match="no group of config_groups names it; their targets are"):
        backbone(folder)


def test_dynamic_modules_of_gptq_have_their_own_bits(tmp_path: Path) -> None:
    layout = gptq(4, 32)
    layout.settings["dynamic"] = {r"+:.*intermediate.*": {"bits": 8, "group_size": 128}}
    folder, plain = made(tmp_path, layout)
    changed, means = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    for name in [name for name in means if "intermediate.dense.weight" in name]:
        parts, means[name] = gptq(8, 128).write(means[name])
        changed |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
    save_file(changed, folder / "model.safetensors")
    save_file(means, plain / "model.safetensors")
    assert worst(packed(backbone(folder)), packed(backbone(plain))) < 1e-6


WHOLE = [name for name, layout in LAYOUTS.items() if layout.whole]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", WHOLE)
def test_int8_uses_the_whole_numbers_of_the_checkpoint(
    layout: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = made(tmp_path, LAYOUTS[layout], model)
    taken: list[tuple[Tensor, Tensor]] = []

    class Watched(Int8Linear):
        def __init__(self, weight: Tensor, bias: Tensor | None = None, steps: Tensor | None = None) -> None:
            assert steps is not None
            taken.append((weight, steps))
            super().__init__(weight, bias, steps)

    monkeypatch.setattr("poolhouse.models.native.transformer.Int8Linear", Watched)
    whole = load(folder, LoadOptions("m", quantization="int8"))
    assert len(taken) == 8
    assert {numbers.dtype for numbers, _ in taken} == {torch.int8}
    got, expected = packed(whole.backbone), packed(backbone(plain))  # type: ignore[arg-type]
    cosines = torch.cat([torch.cosine_similarity(a, b) for a, b in zip(got, expected, strict=True)])
    # As in tests/models/test_int8.py: what remains are activations in int8.
    assert cosines.min() > 0.995
    assert worst(got, alone(whole.backbone)) < 1e-5  # type: ignore[arg-type]
    # Whose scales are the largest number over 127, these are equal to weights that are quantised anew.
    for numbers, steps in taken:
        anew, sizes = quantised(numbers * steps[:, None])
        same = numbers.int().abs().amax(1) == 127
        assert torch.equal(anew[same], numbers[same])
        assert torch.allclose(sizes[same], steps[same], rtol=1e-6)
    assert f"products of blocks ({len(taken)}) use its whole numbers" in " ".join(whole.facts.notes)
    assert whole.facts.sizes == load(plain, LoadOptions("m")).facts.sizes


def test_where_scales_agree_int8_answers_the_same(tmp_path: Path) -> None:
    folder, plain = made(tmp_path, bitsandbytes_8bit())
    direct, anew = (packed(backbone(one, quantization="int8")) for one in (folder, plain))
    assert worst(direct, anew) < 1e-5


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "per request"])
def test_adapters_change_quantised_models(merged: bool, tmp_path: Path) -> None:
    folder, plain = made(tmp_path, bitsandbytes_8bit())
    save_adapter(plain, tmp_path / "adapter", "BertModel")
    chosen: dict[str, Any] = {"lora_modules": {"a": str(tmp_path / "adapter")}} | (
        {"merge_adapter": "a"} if merged else {}
    )
    request = {} if merged else {"lora_request": "a"}
    vectors = []
    for one, options in ((plain, {}), (folder, {}), (folder, {"quantization": "int8"})):
        with LLM(str(one), **chosen, **options) as llm:
            vectors.append(llm.embed_array(TEXTS, use_tqdm=False, **request))
    assert np.abs(vectors[1] - vectors[0]).max() < 1e-5
    assert (vectors[2] * vectors[0]).sum(1).min() > 0.995


def test_what_has_no_whole_numbers_is_multiplied_out_and_quantised_anew(tmp_path: Path) -> None:
    folder, plain = made(tmp_path, LAYOUTS["awq, groups of 32"])
    direct, anew = (packed(backbone(one, quantization="int8")) for one in (folder, plain))
    assert worst(direct, anew) < 1e-5


REFUSED = {
    "torchao": "by 'torchao' .* are not read; read are",
    "hqq": "by 'hqq'",
    "mxfp4": "by 'mxfp4'",
    "modelopt": "by 'modelopt'",
}


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_are_not_read_are_refused_by_name(method: str, tmp_path: Path) -> None:
    bert(tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=rf"{REFUSED[method]}.*model_impl='transformers'"):
        load(tmp_path, LoadOptions("m"))


AWQ, GPTQ, BNB, BLOCKS = (
    LAYOUTS[name].settings
    for name in ("awq, groups of 32", "gptq 4 bit, groups of 32", "bitsandbytes nf4", "fp8, blocks of 128")
)
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
WRONG_SETTINGS: list[tuple[dict[str, Any], str]] = [
    (AWQ | {"version": "gemv"}, r"quantization_config.version is 'gemv'; read are \['gemm'\]"),
    (AWQ | {"bits": 8}, r"quantization_config.bits is 8; read are \[4\]"),
    (AWQ | {"backend": "llm-awq"}, "quantization_config.backend is 'llm-awq'"),
    (AWQ | {"rotation": "hadamard"}, "quantization_config.rotation is 'hadamard', which is not known .* hf_overrides"),
    (AWQ | {"group_size": "all"}, "quantization_config.group_size is 'all'; a number of inputs, or -1"),
    (GPTQ | {"bits": 5}, r"quantization_config.bits is 5"),
    (GPTQ | {"bits": None}, r"quantization_config.bits is None"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True"),
    (GPTQ | {"adapter": {"rank": 4}}, "quantization_config.adapter is"),
    (BNB | {"load_in_4bit": "yes"}, "load_in_4bit is 'yes'"),
    (BNB | {"outliers": [1]}, r"quantization_config.outliers is \[1\]"),
    (BLOCKS | {"weight_block_size": 128}, "weight_block_size is 128, not two positive numbers"),
    (BLOCKS | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
    (BLOCKS | {"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
    (of_groups("nvfp4-pack-quantized", INT8), "format 'nvfp4-pack-quantized' is not read. Read are"),
    (of_groups("marlin-24", INT8), "format 'marlin-24'"),
    (of_groups("fakequant", INT8), "format 'fakequant'"),
    (of_groups("int-quantized", INT8) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask'"),
    (of_groups("int-quantized", INT8) | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is not"),
    (of_groups("int-quantized", INT8) | {"config_groups": {"W8A8": ["Linear"]}}, "Each group must be an object"),
    (of_groups("int-quantized", INT8) | {"config_groups": None}, "config_groups None is not read"),
    (of_groups("int-quantized", INT8 | {"rounding": "up"}), "group_0.weights.rounding is 'up'"),
    (of_groups("int-quantized", INT8 | {"num_bits": 4}), "num_bits 4 of int-quantized"),
    (of_groups("int-quantized", INT8 | {"strategy": "tensor_group"}), "strategy is 'tensor_group'"),
    (of_groups("int-quantized", INT8 | {"strategy": "group"}), "group_size None is not read. A number of inputs"),
    (of_groups("int-quantized", INT8 | {"strategy": "block"}), "block_structure is None, not two"),
    (of_groups("int-quantized", INT8, hidden=1), "group_0.hidden is 1"),
    (of_groups("int-quantized", INT8) | {"sparsity_config": "dense"}, "cannot be understood"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG_SETTINGS, ids=[words[:40] for _, words in WRONG_SETTINGS])
def test_settings_that_change_numbers_are_named(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    bert(tmp_path)
    change_config(tmp_path, quantization_config=settings)
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path, LoadOptions("m"))


FIRST = "encoder.layer.0.attention.self.query"
State = "weight.quant_state.bitsandbytes__nf4"


def cut(tensor: Tensor) -> Tensor:
    return tensor[: len(tensor) // 2].clone()


def octets(text: str) -> Callable[[Tensor], Tensor]:
    return lambda _: torch.tensor(list(text.encode()), dtype=torch.uint8)


BROKEN: list[tuple[str, str, Callable[[Tensor], Tensor] | None, str]] = [
    ("int8 per channel", "weight_scale", None, "weight is stored as int8, but its scales are not there"),
    ("int8 per channel", "weight_scale", cut, r"weight_scale is \[64, 1\], not 128 numbers, one per channel"),
    ("int8 per channel", "weight", Tensor.float, "weight is float32 instead of int8"),
    ("int8 per channel", "weight", Tensor.flatten, r"weight is \[16384\], which is no matrix"),
    ("int8 in groups of 32", "weight_scale", cut, r"weight_scale is \[64, 4\] instead of \[128, 4\]"),
    ("packed 4 bit, groups of 32", "weight_shape", None, "weight_shape is not"),
    ("packed 4 bit, groups of 32", "weight_packed", cut, r"weight_packed is \[64, 16\] instead of \[128, 16\]"),
    ("packed 4 bit, act order", "weight_g_idx", None, "weight_g_idx is not"),
    ("packed 4 bit, groups of 128, asymmetric", "weight_zero_point", None, "weight_zero_point is not"),
    ("fp8 in blocks", "weight_scale", cut, r"weight_scale is \[1, 2\] instead of \[2, 2\]"),
    ("awq, groups of 32", "scales", cut, r"scales is \[2, 128\], which does not fit 128 inputs, .* groups of 32"),
    ("awq, groups of 32", "qzeros", None, "qzeros is not"),
    ("awq, groups of 32", "qweight", Tensor.long, "qweight is int64 instead of int32"),
    ("gptq 4 bit, groups of 32", "qweight", None, "qweight is not"),
    ("gptq 4 bit, groups of 32", "scales", cut, r"scales is \[2, 128\]"),
    (
        "gptq 4 bit, act order",
        "g_idx",
        lambda order: order + 1,
        "g_idx names groups up to 4, but there are scales of 4",
    ),
    ("gptq 4 bit, act order", "g_idx", None, "g_idx is not"),
    ("gptq 4 bit, act order", "g_idx", cut, r"g_idx is \[64\] instead of \[128\]"),
    ("bitsandbytes int8", "SCB", None, "SCB is not"),
    ("bitsandbytes int8", "weight_format", lambda _: torch.tensor(2, dtype=torch.uint8), "laid out for a GPU"),
    ("bitsandbytes nf4", State, None, "quant_state.bitsandbytes__nf4 is not"),
    ("bitsandbytes nf4", State, octets("{"), "bitsandbytes__nf4 cannot be understood"),
    ("bitsandbytes nf4", State, octets('{"shape": [128], "blocksize": 64}'), "cannot be understood"),
    ("bitsandbytes nf4", State, octets('{"shape": [128, 64], "blocksize": 64}'), "bytes, which do not fit"),
    ("bitsandbytes nf4", "weight.absmax", cut, r"weight.absmax is \[128\] instead of \[256\]"),
    ("bitsandbytes nf4", "weight.quant_map", cut, r"weight.quant_map is \[8\] instead of \[16\]"),
    ("bitsandbytes nf4, double", "weight.nested_absmax", None, "weight.nested_absmax is not"),
    ("fp8, blocks of 128", "weight_scale_inv", lambda scale: scale.repeat(2, 1), r"\[2, 1\] instead of \[1, 1\]"),
    ("fp8, one scale", "weight_scale", lambda scale: scale.repeat(3), r"weight_scale is \[3\], neither one number"),
]


@pytest.mark.parametrize(("layout", "part", "change", "words"), BROKEN, ids=[f"{row[0]}: {row[3]}" for row in BROKEN])
def test_broken_files_are_named(
    layout: str, part: str, change: Callable[[Tensor], Tensor] | None, words: str, tmp_path: Path
) -> None:
    folder, _ = made(tmp_path, LAYOUTS[layout])
    tensors = load_file(folder / "model.safetensors")
    before = tensors.pop(f"{FIRST}.{part}")
    if change is not None:
        tensors[f"{FIRST}.{part}"] = change(before).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=words) as error:
        load(folder, LoadOptions("m"))
    assert FIRST in str(error.value)


def test_scales_of_a_module_that_nobody_knows_are_an_error(tmp_path: Path) -> None:
    folder, _ = made(tmp_path, LAYOUTS["int8 per channel"])
    added = {"encoder.gate.weight": torch.ones(2, 2, dtype=torch.int8), "encoder.gate.weight_scale": torch.ones(2, 1)}
    save_file(load_file(folder / "model.safetensors") | added, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not know: \['encoder.gate.weight'\]"):
        load(folder, LoadOptions("m"))


@pytest.mark.parametrize("layout", ["int8 per channel", "fp8, one scale"])
def test_whole_numbers_without_a_word_in_the_config_are_no_weights(layout: str, tmp_path: Path) -> None:
    folder, _ = made(tmp_path, LAYOUTS[layout])
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"query.weight is stored as .* no quantization_config"):
        load(folder, LoadOptions("m"))


def test_the_option_names_the_method_of_the_checkpoint(tmp_path: Path) -> None:
    folder, plain = made(tmp_path, LAYOUTS["awq, groups of 32"])
    assert worst(packed(backbone(folder, quantization="awq")), packed(backbone(plain))) < 1e-6
    with pytest.raises(
        ConfigError, match="quantization='gptq', but the checkpoint is quantised by 'awq'; leave it out"
    ):
        backbone(folder, quantization="gptq")
    with pytest.raises(ConfigError, match="quantization='awq', but the checkpoint is not quantised"):
        backbone(plain, quantization="awq")


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "hqq"])
def test_a_model_that_transformers_serves_needs_the_package_of_its_method(method: str, tmp_path: Path) -> None:
    bert(tmp_path)
    settings = {"gptq": GPTQ, "compressed-tensors": of_groups("int-quantized", INT8)}.get(method)
    change_config(tmp_path, quantization_config=settings or {"quant_method": method})
    with pytest.raises(
        CheckpointError, match=f"transformers cannot load .* quantised by '{method}', which transformers"
    ):
        load(tmp_path, LoadOptions("m", implementation="transformers"))


def test_memory_is_asked_for_as_it_will_be_taken(tmp_path: Path) -> None:
    config = {"hidden_size": 128, "quantization_config": AWQ}
    weights, _ = memory_of(Settings(device="cpu"), config, 1000, 500)
    assert weights == 4 * (1000 + 500 * 2)
