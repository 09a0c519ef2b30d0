"""Loading a folder: who serves it, what its limits are, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.models.files.hub import embedded_model
from poolhouse.models.load import load
from poolhouse.models.plan import LoadOptions, device_of, dtype_of
from poolhouse.settings import Settings

BERT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    transformers.BertModel(transformers.BertConfig(**BERT)).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def options(**given: Any) -> LoadOptions:
    return LoadOptions(name="tiny", device="cpu", **given)


def test_the_embedded_model_in_facts() -> None:
    model = load(embedded_model(), LoadOptions(name="minilm", device="cpu"))
    facts = model.facts
    assert (facts.served_by, facts.architecture) == ("native bert, packed", "BertModel")
    assert (facts.max_tokens, facts.sizes.hidden_size, facts.width, facts.sizes.vocabulary_size) == (
        256,
        384,
        384,
        30522,
    )
    assert facts.dtype == torch.float32
    assert model.tasks == ("embed", "token_embed")
    assert model.pipelines["embed"].description == "mean > truncate > normalize"
    assert any("pooler.dense" in note for note in facts.notes)


def test_a_plain_bert_pools_cls_and_normalises(tiny: Path) -> None:
    model = load(tiny, options())
    assert model.pipelines["embed"].description == "cls > truncate > normalize"
    assert model.facts.max_tokens == 64


def test_the_tokenizer_may_lower_the_limit(tiny: Path) -> None:
    (tiny / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 40}))
    assert load(tiny, options()).facts.max_tokens == 40
    (tiny / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1e30}))
    assert load(tiny, options()).facts.max_tokens == 64


def test_the_user_may_lower_the_limit_but_not_raise_it(tiny: Path) -> None:
    assert load(tiny, options(max_tokens=10)).facts.max_tokens == 10
    assert load(tiny, options(max_tokens=-1)).facts.max_tokens == 64
    with pytest.raises(ConfigError, match="max_model_len=65 is more than the 64 positions"):
        load(tiny, options(max_tokens=65))
    with pytest.raises(ConfigError, match="at least 1"):
        load(tiny, options(max_tokens=0))


def test_a_config_that_the_family_does_not_honour_goes_to_transformers(tiny: Path) -> None:
    change_config(tiny, model_type="bert", is_decoder=True)
    model = load(tiny, options())
    assert model.facts.served_by.startswith("transformers")
    assert "is_decoder" in " ".join(model.facts.notes)
    with pytest.raises(CheckpointError, match="is_decoder is True"):
        load(tiny, options(implementation="native"))


def test_an_unknown_activation_is_refused_by_name(tiny: Path) -> None:
    change_config(tiny, hidden_act="warble")
    with pytest.raises(CheckpointError, match="hidden_act is 'warble'"):
        load(tiny, options(implementation="native"))


def test_native_and_transformers_agree(tiny: Path) -> None:
    from poolhouse.packing.pack import Batch
    from poolhouse.packing.tokens import Tokens

    ids = torch.randint(5, 99, (17,)).numpy()
    native, fallback = (load(tiny, options(implementation=kind)) for kind in ("native", "transformers"))
    batch = Batch.pack([Tokens(ids), Tokens(ids[:5])])
    assert torch.allclose(native.backbone(batch), fallback.backbone(batch), atol=1e-5)


def test_a_missing_folder_config_or_weights_is_named(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path / "nothing", options())
    (tiny / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights\. Looked for model\.safetensors"):
        load(tiny, options())


def test_a_tensor_that_nobody_claims_is_an_error(tiny: Path) -> None:
    change_tensors(tiny, lambda tensors: tensors.update({"encoder.layer.0.gate.weight": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\.gate\.weight"):
        load(tiny, options())


def test_a_position_table_that_ends_before_the_limit_is_an_error(tiny: Path) -> None:
    change_config(tiny, max_position_embeddings=128)
    with pytest.raises(CheckpointError, match="allows 128 positions, but the checkpoint has vectors for 64"):
        load(tiny, options())


def test_a_config_of_wrong_types_is_an_error(tiny: Path) -> None:
    change_config(tiny, num_hidden_layers="2")
    with pytest.raises(CheckpointError, match="cannot be understood"):
        load(tiny, options())


def test_an_index_that_names_a_missing_shard_is_an_error(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "other.safetensors")
    index = {"weight_map": {"embeddings.word_embeddings.weight": "model-1.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks \['model-1\.safetensors'\]"):
        load(tiny, options())


@pytest.mark.parametrize("damage", ["empty", "random", "flipped header", "text"])
def test_a_damaged_safetensors_file_is_an_error_that_names_it(tiny: Path, damage: str) -> None:
    file = tiny / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "random": bytes(range(256)) * 10,
            "flipped header": b"\xff" * 8 + whole[8:],
            "text": b"version https://git-lfs.github.com/spec/v1",
        }[damage]
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt"):
        load(tiny, options())


def test_a_lost_tensor_is_an_error(tiny: Path) -> None:
    change_tensors(tiny, lambda tensors: tensors.pop("encoder.layer.1.attention.output.LayerNorm.weight"))
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.\*\.attention\.output\.LayerNorm"):
        load(tiny, options())


def test_corrupt_files_are_errors_that_name_the_file(tiny: Path, tmp_path: Path) -> None:
    (tiny / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt"):
        load(tiny, options())
    (tiny / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        load(tiny, options())


def test_a_pickle_with_code_is_refused(tiny: Path) -> None:
    touched = tiny / "touched"

    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (touched,)

    (tiny / "model.safetensors").unlink()
    for write in (
        lambda path: path.write_bytes(pickle.dumps(Malice())),
        lambda path: torch.save({"embeddings.word_embeddings.weight": Malice()}, path),
    ):
        write(tiny / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="cannot be read as plain weights"):
            load(tiny, options())
    assert not touched.exists()


def test_overrides_change_the_config(tiny: Path) -> None:
    by_dict = load(tiny, options(overrides={"matryoshka_dimensions": [8, 16]}))
    assert by_dict.facts.matryoshka.dimensions == (8, 16)
    by_call = load(tiny, options(overrides=lambda config: {**config, "is_matryoshka": True}))
    assert by_call.facts.matryoshka.supported
    with pytest.raises(ConfigError, match="64 is not a whole number from 1 to 32"):
        load(tiny, options(matryoshka_dimensions=(64,)))


@pytest.mark.parametrize(
    ("word", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("half", torch.float16)]
)
def test_dtype_words(tiny: Path, word: str, dtype: torch.dtype) -> None:
    assert load(tiny, options(dtype=word)).facts.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float32, ["float32", "fp32", "float", "FP32", "torch.float32", torch.float32, np.float32]),
        (torch.float16, ["float16", "fp16", "half", "torch.float16", torch.half, np.float16, np.dtype("float16")]),
        (torch.bfloat16, ["bfloat16", "bf16", "BF16", "torch.bfloat16", torch.bfloat16]),
    ],
)
def test_a_dtype_has_many_names(dtype: torch.dtype, words: list[Any]) -> None:
    cpu = torch.device("cpu")
    assert dtype_of(Settings.parse(dtype=None).dtype, {}, None, cpu) == torch.float32
    for word in words:
        assert dtype_of(Settings.parse(dtype=word).dtype, {}, None, cpu) == dtype


@pytest.mark.parametrize("word", ["int8", "fp8", "float64", torch.int8, 16])
def test_a_dtype_that_models_do_not_run_in_names_those_they_do(word: Any) -> None:
    with pytest.raises(ConfigError, match=r"is not one of \['auto', 'float32', 'fp32', .*'bf16'\]"):
        dtype_of(Settings.parse(dtype=word).dtype, {}, None, torch.device("cpu"))


def test_mps_is_taken_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device_of("mps") == device_of(Settings.parse(device=torch.device("mps")).device) == torch.device("mps")
    assert dtype_of("auto", {}, None, torch.device("mps")) == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device='mps', but this torch sees no Metal device") as refused:
        device_of("mps")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("word", ["meta", "xpu", "vulkan:0"])
def test_devices_that_no_model_runs_on_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"device='{word}' is not .*; try 'auto', 'cpu', 'cuda', 'cuda:0' or 'mps'"):
        device_of(word)


def test_wrong_dtype_and_device_words_are_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="dtype='int3' is not one of"):
        load(tiny, options(dtype="int3"))
    with pytest.raises(ConfigError, match="device='warp' is not a device"):
        load(tiny, LoadOptions(name="tiny", device="warp"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            load(tiny, LoadOptions(name="tiny", device="cuda"))
