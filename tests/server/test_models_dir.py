"""Folders of checkpoints: what is found in them, how large it is, and what is left out."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from poolhouse.engine.open import memory_of, open_engine
from poolhouse.errors import ConfigError
from poolhouse.server.models_dir import ModelsDir
from poolhouse.settings import Settings
from tests.checkpoints import save_checkpoint


def never(*_: object) -> NoReturn:
    raise AssertionError("A scan opens nothing.")


def scanner(*folders: Path, by_name: Mapping[str, Mapping[str, object]] | None = None, **settings: Any) -> ModelsDir:
    return ModelsDir(folders, Settings.parse(**settings), by_name or {}, never, never)


def names(*folders: Path) -> list[str]:
    return list(scanner(*folders).scan({}, {}))


def write(folder: Path, config: str = "config.json", weights: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    (folder / config).write_text("{}")
    (folder / weights).parent.mkdir(exist_ok=True)
    tensors = {"weight": torch.zeros(3, 4), "ids": torch.zeros(5, dtype=torch.int64)}
    if weights.endswith(".bin"):
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights)
    return folder


def test_models_are_found_by_their_folders_names(tmp_path: Path) -> None:
    write(tmp_path / "plain")
    write(tmp_path / "two words, ü & 模型")
    write(tmp_path / "owner" / "inner")
    write(tmp_path / "static", "modules.json", "0_StaticEmbedding/model.safetensors")
    write(tmp_path / "adapter", "adapter_config.json", "adapter_model.safetensors")
    write(tmp_path / "pickled", weights="pytorch_model.bin")
    write(tmp_path / "elsewhere" / "deep" / "deeper")
    (tmp_path / "linked").symlink_to(tmp_path / "plain")
    found = ["adapter", "linked", "owner/inner", "pickled", "plain", "static", "two words, ü & 模型"]
    assert names(tmp_path) == found


def test_a_cache_of_the_hub_is_such_a_folder(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    for commit in ("aaa", "bbb"):
        write(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    write(tmp_path / "models--lone" / "snapshots" / "ccc")
    (tmp_path / "models--empty" / "refs").mkdir(parents=True)
    write(tmp_path / "models--torn" / "snapshots" / "a")
    write(tmp_path / "models--torn" / "snapshots" / "b")
    found = scanner(tmp_path).scan({}, {})
    assert {name: one.folder.name for name, one in found.items()} == {"lone": "ccc", "owner/name": "bbb"}


def test_what_is_no_model_is_logged_once_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text.txt").write_text("no folder")
    write(tmp_path / ".hidden")
    write(tmp_path / "new\nline")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    write(tmp_path / "one" / "same")
    write(tmp_path / "two" / "same")
    skipped: dict[str, str] = {}
    dirs = scanner(tmp_path, tmp_path / "one", tmp_path / "two")
    with caplog.at_level(logging.INFO, "poolhouse"):
        found = dirs.scan({}, skipped)
        assert list(dirs.scan(found, skipped)) == list(found)
    assert list(found) == ["one/same", "two/same", "same"]
    assert found["same"].folder == tmp_path / "one" / "same"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(skipped) == 4
    for part in (
        "nothing is skipped: it holds no model: none of config.json, modules.json, adapter_config.json, gliner_config.json.",
        "bare is skipped: it has no weights; looked for model.safetensors,",
        r"new\nline' is skipped: its name cannot be written in a request.",
        f"two/same is skipped: the name same is taken by {tmp_path}/one/same.",
    ):
        assert any(part in line for line in told), part


def test_sizes_are_those_of_the_tensors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "whole", "bert, wordpiece")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    shards = write(tmp_path / "shards", weights="other.safetensors")
    weight_map = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor.half()}, shards / f"model-{index}.safetensors")
        weight_map[name] = f"model-{index}.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write(tmp_path / "both")
    found = scanner(tmp_path).scan({}, {})
    count = sum(tensor.numel() for tensor in tensors.values())
    assert found["whole"].numbers == found["shards"].numbers == count
    assert found["whole"].weight_bytes == (tmp_path / "whole" / "model.safetensors").stat().st_size
    assert (found["both"].numbers, found["both"].other_bytes) == (12, 40)
    # On CPUs they become float32.
    for name in ("whole", "shards"):
        weights, packs = memory_of(Settings(device="cpu"), found["whole"].config, found[name].numbers, 0)
        assert weights == 4 * count
    with open_engine(Settings(model=str(tmp_path / "whole"), device="cpu")) as engine:
        # The pooler of BERT is left aside, and a second copy is kept of small weights on some processors.
        assert 0.8 * weights < engine.facts.weight_bytes < 2 * weights
    half = memory_of(Settings(device="cpu", dtype="bfloat16"), found["whole"].config, count, 7)
    assert half == (2 * count + 7, packs // 2)
    more = memory_of(Settings(device="cpu", max_num_batched_tokens=4096), found["whole"].config, count, 0)
    assert more == (weights, packs * 2)


@pytest.mark.parametrize("content", [b"", b"x" * 5, b"\xff" * 100, (10).to_bytes(8, "little") + b"[1, 2, 3]  "])
def test_damaged_weights_are_told_by_the_load(tmp_path: Path, content: bytes) -> None:
    (write(tmp_path / "torn") / "model.safetensors").write_bytes(content)
    found = scanner(tmp_path).scan({}, {})
    assert (found["torn"].weight_bytes, found["torn"].numbers) == (len(content), len(content) // 4)


def test_only_what_changed_is_read_again(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    dirs = scanner(tmp_path)
    before = dirs.scan({}, {})
    (tmp_path / "two" / "config.json").write_text('{"changed": true}')
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    after = dirs.scan(before, {})
    assert after["one"] is before["one"]
    assert after["two"] is not before["two"]
    assert after["two"].stamp != before["two"].stamp
    assert list(after) == ["one", "three", "two"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models_dir: .*No such file"):
        names(tmp_path / "missing")


def test_settings_of_a_model_are_those_of_all_and_its_own(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    dirs = scanner(tmp_path, by_name={"two": {"dtype": "bfloat16", "max_model_len": 9}}, dtype="float32", seed=4)
    found = dirs.scan({}, {})
    one, two = (dirs.settings_of(found[name]) for name in ("one", "two"))
    assert (one.model, one.names, one.dtype, one.max_model_len, one.seed) == (
        str(tmp_path / "one"), ("one",), "float32", None, 4,
    )  # fmt: skip
    assert (two.names, two.dtype, two.max_model_len, two.seed) == (("two",), "bfloat16", 9, 4)


def test_a_variant_is_what_is_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "one")
    save_file({"weight": torch.zeros(7, dtype=torch.float16)}, folder / "model.fp16.safetensors")
    assert scanner(tmp_path, variant="fp16").scan({}, {})["one"].numbers == 7
    skipped: dict[str, str] = {}
    assert scanner(tmp_path, variant="int8").scan({}, skipped) == {}
    assert "it has no weights of the variant 'int8'" in skipped[str(folder)]


def test_a_scan_needs_no_torch(tmp_path: Path) -> None:
    write(tmp_path / "one")
    script = (
        "import sys, pathlib; from poolhouse.cli.serve import _models_dir; from poolhouse.cli.sources import gather\n"
        "from poolhouse.server.process import run; from poolhouse.server.on_demand import OnDemand\n"
        "gathered = gather([], {'models_dir': sys.argv[1]}, None, {})\n"
        "assert OnDemand(_models_dir(gathered), gathered.server).names == ['one']\n"
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout == "[]\n"
