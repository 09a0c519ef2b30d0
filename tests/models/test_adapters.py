"""LoRA adapters on native families, merged and per request, against the peft library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.models.adapters.adapters import AdapterOptions
from poolhouse.models.files.checkpoint import Checkpoint
from poolhouse.models.load_native import Loaded, load_transformer
from poolhouse.models.native.families import family_of, spec_of
from poolhouse.packing.pack import Batch
from tests.models.adapters import save_adapter
from tests.models.parity import LENGTHS, Parity, Record, packed, reference, save, texts, worst
from tests.models.test_decoders import ROWS as DECODERS
from tests.models.test_decoders import TINY as DECODER
from tests.models.test_encoders import ROWS as ENCODERS

ROWS = {
    **{row: ENCODERS[row] for row in ("bert", "roberta", "distilbert", "mpnet", "albert", "electra", "modernbert")},
    **{row: ENCODERS[row] for row in ("nomic_bert", "gte", "jina_embeddings_v3", "eurobert")},
    **{
        row: (DECODERS[row][0], DECODER | DECODERS[row][1])
        for row in ("llama, one kv head", "qwen2", "qwen3", "mistral, window", "gemma2", "gemma3")
    },
}


def load(folder: Path, **options: Any) -> Loaded:
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config)
    assert family is not None
    spec = spec_of(family, checkpoint.config, checkpoint.folder)
    cpu = torch.device("cpu")
    return load_transformer(family, spec, checkpoint.config, checkpoint, torch.float32, cpu, AdapterOptions(**options))


def run(loaded: Loaded, adapters: list[str | None]) -> list[Tensor]:
    return list(loaded.transformer(Batch.pack(texts(), adapters=adapters)).split(LENGTHS))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save(tmp_path / "base", *ENCODERS["bert"])
    return tmp_path / "base"


@pytest.mark.parametrize("row", ROWS)
def test_an_adapter_on_every_linear_layer_answers_as_in_peft(row: str, tmp_path: Path, record_parity: Record) -> None:
    name, options = ROWS[row]
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save(base, name, options)
    plain = reference(base, name)
    expected = save_adapter(base, folder, name + "Model")
    assert worst(expected, plain) > 1e-2

    merged = packed(load(base, base_merge=(folder,)).transformer)
    loaded = load(base, modules={"mine": folder})
    chosen = run(loaded, ["mine"] * len(LENGTHS))
    alone = [loaded.transformer(Batch.pack([text], adapters=["mine"])) for text in texts()]
    parity = Parity(
        f"{row} with a LoRA adapter", "native", f"peft on {name}Model", worst(chosen, expected), worst(chosen, alone)
    )
    record_parity(parity)
    # Both sides add the same float32 numbers in another order.
    assert parity.error < 2e-5
    assert parity.packing_error < 2e-5
    assert worst(merged, expected) < 2e-5
    assert worst(run(loaded, [None] * len(LENGTHS)), plain) < 1e-5


def test_a_pack_may_mix_adapters(base: Path, tmp_path: Path) -> None:
    plain = reference(base, "Bert")
    answers = {None: plain}
    for seed, name in enumerate(("first", "second")):
        answers[name] = save_adapter(base, tmp_path / name, "BertModel", seed, r=2 + seed)
    loaded = load(base, modules={"first": tmp_path / "first", "second": tmp_path / "second"})
    assert loaded.adapters.names == ("first", "second")
    chosen = [None, "first", "first", "second", None, "second"]
    expected = [answers[name][index] for index, name in enumerate(chosen)]
    assert worst(run(loaded, chosen), expected) < 1e-5
    assert worst(run(loaded, chosen[::-1]), expected) > 1e-2


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ("bert", {"target_modules": ["query", "value"]}),
        ("bert", {"target_modules": ["word_embeddings", "token_type_embeddings", "position_embeddings", "key"]}),
        ("bert", {"target_modules": ["key"], "use_rslora": True}),
        ("bert", {"rank_pattern": {"query": 2, "1.attention.self.key": 8}, "alpha_pattern": {"value": 3}}),
        ("bert", {"target_modules": ["dense"], "layers_to_transform": [1, 3], "layers_pattern": "layer"}),
        ("bert", {"modules_to_save": ["pooler"]}),
        ("gte", {"target_modules": ["up_proj"]}),
        ("eurobert", {"target_modules": ["k_proj", "up_proj"]}),
        ("gemma3", {"target_modules": ["embed_tokens", "v_proj"]}),
    ],
)
def test_what_an_adapter_says_of_itself_is_honoured(row: str, options: dict[str, Any], tmp_path: Path) -> None:
    name, base_options = ROWS[row]
    base, folder = tmp_path / "base", tmp_path / "adapter"
    save(base, name, base_options)
    expected = save_adapter(base, folder, name + "Model", **options)
    assert worst(expected, reference(base, name)) > 1e-3
    assert worst(packed(load(base, base_merge=(folder,)).transformer), expected) < 2e-5
    assert worst(run(load(base, modules={"a": folder}), ["a"] * len(LENGTHS)), expected) < 2e-5


def test_an_adapter_of_a_classifier_leaves_its_head_to_whoever_builds_heads(base: Path, tmp_path: Path) -> None:
    expected = save_adapter(base, tmp_path / "a", "BertForSequenceClassification", task_type="SEQ_CLS")
    assert any("classifier" in name for name in load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert worst(packed(load(base, base_merge=(tmp_path / "a",)).transformer), expected) < 1e-5


def test_an_adapter_saved_as_a_pickle_is_read_too(base: Path, tmp_path: Path) -> None:
    expected = save_adapter(base, tmp_path / "a", "BertModel")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
    assert worst(packed(load(base, base_merge=(tmp_path / "a",)).transformer), expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": 8}, r"lora_A \[4, 32\] and lora_B \[32, 4\].*rank 8"),
    ],
)
def test_another_kind_of_adapter_is_refused_by_name(
    changes: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    save_adapter(base, tmp_path / "a", "BertModel")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        load(base, modules={"a": tmp_path / "a"})


def test_an_adapter_for_another_base_is_named_with_its_shapes(base: Path, tmp_path: Path) -> None:
    save(tmp_path / "wide", "Bert", ENCODERS["bert"][1] | {"hidden_size": 64})
    save_adapter(tmp_path / "wide", tmp_path / "a", "BertModel")
    with pytest.raises(CheckpointError, match=r"another base.*layer\.0.*\[64, 64\].*\[32, 32\].*made for .*wide"):
        load(base, modules={"a": tmp_path / "a"})
    save(tmp_path / "deep", "Bert", ENCODERS["bert"][1] | {"num_hidden_layers": 6})
    save_adapter(tmp_path / "deep", tmp_path / "b", "BertModel")
    with pytest.raises(CheckpointError, match=r"layer\.4\.attention"):
        load(base, modules={"b": tmp_path / "b"})
    save(tmp_path / "llama", "Llama", DECODER)
    save_adapter(tmp_path / "llama", tmp_path / "c", "LlamaModel")
    with pytest.raises(CheckpointError, match=r"bert family.*self_attn"):
        load(base, modules={"c": tmp_path / "c"})


def test_lost_and_strange_tensors_are_named(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "a", "BertModel")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, path)
    with pytest.raises(CheckpointError, match="lora_A without its companion"):
        load(base, modules={"a": tmp_path / "a"})
    save_file(tensors | {"base_model.model.embeddings.LayerNorm.weight": torch.ones(32)}, path)
    with pytest.raises(CheckpointError, match=r"embeddings\.LayerNorm\.weight"):
        load(base, modules={"a": tmp_path / "a"})
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="corrupt"):
        load(base, modules={"a": tmp_path / "a"})
    path.unlink()
    with pytest.raises(CheckpointError, match="no adapter weights"):
        load(base, modules={"a": tmp_path / "a"})
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        load(base, modules={"a": tmp_path / "a"})


def test_options_that_contradict_each_other_are_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "a", "BertModel")
    modules = {"a": tmp_path / "a", "b": tmp_path / "a"}
    with pytest.raises(ConfigError, match="made for"):
        load(base, modules=modules, merge="a")
    with pytest.raises(ConfigError, match="neither a name"):
        load(base, modules=modules, merge="c")
    with pytest.raises(ConfigError, match="enable_lora is False"):
        load(base, modules=modules, allowed=False)
    with pytest.raises(CheckpointError, match="max_lora_rank=2"):
        load(base, modules=modules, max_rank=2)
