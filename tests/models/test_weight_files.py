"""Files of weights: of every age of torch, whole and in shards, in variants; none of them runs code."""

from __future__ import annotations

import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from poolhouse import LLM, ConfigError
from poolhouse.errors import CheckpointError
from poolhouse.models.files.checkpoint import TensorFiles
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer(tmp_path, "bert")
    save(tmp_path, "BertModel", "BertConfig", LAYERS)
    return tmp_path


def vectors(folder: Path, **options: Any) -> np.ndarray:
    with LLM(str(folder), **options) as llm:
        return llm.embed_array(TEXTS, use_tqdm=False)


def taken(folder: Path) -> Tensors:
    """The tensors of a folder, whose file is removed."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return tensors


def sharded(write: Callable[[Tensors, Path], None], tensors: Tensors, folder: Path, shard: str, index: str) -> None:
    names = sorted(tensors)
    files = {name: shard.format(1 + (place > len(names) // 2)) for place, name in enumerate(names)}
    for file in set(files.values()):
        write({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def legacy(tensors: Tensors, path: Path) -> None:
    """As torch wrote before 1.6."""
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


# The names are those that transformers writes with save_pretrained(variant="fp16").
LAYOUTS: dict[str, tuple[str | None, Callable[[Tensors, Path], None]]] = {
    "legacy pickle": (None, lambda tensors, folder: legacy(tensors, folder / "pytorch_model.bin")),
    "pickle": (None, lambda tensors, folder: torch.save(tensors, folder / "pytorch_model.bin")),
    "legacy shards": (
        None,
        lambda tensors, folder: sharded(
            legacy, tensors, folder, "pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json"
        ),
    ),
    "variant": (
        "fp16",
        lambda tensors, folder: save_file(tensors, folder / "model.fp16.safetensors", {"format": "pt"}),
    ),
    "variant in shards": (
        "fp16",
        lambda tensors, folder: sharded(
            lambda part, path: save_file(part, path, {"format": "pt"}),
            tensors,
            folder,
            "model.fp16-0000{}-of-00002.safetensors",
            "model.safetensors.index.fp16.json",
        ),
    ),
    "variant, pickle": ("no_ema", lambda tensors, folder: torch.save(tensors, folder / "pytorch_model.no_ema.bin")),
    "variant, shards of pickles": (
        "fp16",
        lambda tensors, folder: sharded(
            legacy, tensors, folder, "pytorch_model.fp16-0000{}-of-00002.bin", "pytorch_model.bin.index.fp16.json"
        ),
    ),
}


@pytest.mark.parametrize("implementation", ["native", "transformers"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_read_from_every_layout(layout: str, implementation: str, folder: Path) -> None:
    variant, write = LAYOUTS[layout]
    expected = vectors(folder)
    write(taken(folder), folder)
    got = vectors(folder, variant=variant, model_impl=implementation)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    if variant is None:
        return
    for wrong in (None, "bf16"):
        with pytest.raises(
            CheckpointError, match=rf"has no weights.*It has the variants \['{variant}'\]: choose one by"
        ):
            vectors(folder, variant=wrong, model_impl=implementation)


def test_a_variant_stands_beside_the_plain_weights(folder: Path) -> None:
    plain = vectors(folder)
    tensors = {name: tensor.half() * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.fp16.safetensors", {"format": "pt"})
    np.testing.assert_array_equal(vectors(folder), plain)
    assert np.abs(vectors(folder, variant="fp16") - plain).max() > 0.01


def test_transformers_writes_the_names_that_are_read(tmp_path: Path) -> None:
    tokenizer(tmp_path, "bert")
    model = save(tmp_path, "BertModel", "BertConfig", LAYERS)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model.fp16-*.safetensors"))) > 1
    assert set(TensorFiles(tmp_path, "fp16")) == set(model.state_dict())


@pytest.mark.parametrize("word", ["", "../other", "fp16.safetensors", "*"])
def test_a_variant_is_a_word(word: str) -> None:
    with pytest.raises(ConfigError, match="variant: a variant is the label in the files' names"):
        LLM("somewhere", variant=word)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.proof,))


def tarred(tensors: Tensors, path: Path) -> None:
    """As torch wrote before 0.1.10."""
    part = path.with_name("storages")
    part.write_bytes(pickle.dumps(len(tensors)))
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.add(part, name)
    part.unlink()


DAMAGED: dict[str, tuple[Callable[[Tensors, Path, Path], object], str]] = {
    "code": (
        lambda tensors, path, proof: torch.save({**tensors, "x": Malicious(proof)}, path),
        "it holds Python objects .* beside tensors, and reading them could run code",
    ),
    "code in a legacy file": (
        lambda tensors, path, proof: legacy({**tensors, "x": Malicious(proof)}, path),
        "it holds Python objects .* and reading them could run code",
    ),
    "a plain pickle": (
        lambda tensors, path, proof: path.write_bytes(pickle.dumps({"x": Malicious(proof)}, protocol=2)),
        "cannot be read as plain weights",
    ),
    "a whole module": (
        lambda tensors, path, proof: torch.save(torch.nn.Linear(2, 2), path),
        "it holds Python objects .*Linear",
    ),
    "a training state": (
        lambda tensors, path, proof: torch.save({"model": tensors, "epoch": 3}, path),
        r"does not hold tensors by name, as save_pretrained writes them, but \['model', 'epoch'\]",
    ),
    "tar": (lambda tensors, path, proof: tarred(tensors, path), r"the tar format of torch before 0\.1\.10"),
    "no file of torch": (lambda tensors, path, proof: path.write_text("<html>not found</html>"), "is damaged, or no"),
    "a pointer of git": (
        lambda tensors, path, proof: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n"),
        "is damaged, or no file of torch",
    ),
    "empty": (lambda tensors, path, proof: path.write_bytes(b""), "ends too early"),
}


@pytest.mark.parametrize("implementation", ["native", "transformers"])
@pytest.mark.parametrize("row", DAMAGED)
# torch warns of pickles of a newer protocol before it refuses them.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_cannot_be_read_is_named_and_runs_nothing(row: str, implementation: str, folder: Path) -> None:
    write, words = DAMAGED[row]
    proof = folder / "proof"
    write(taken(folder), folder / "pytorch_model.bin", proof)
    with pytest.raises(CheckpointError) as refused:
        vectors(folder, model_impl=implementation)
    assert not proof.exists()
    assert "weights_only" not in str(refused.value)
    if implementation == "native":
        refused.match(words)
        refused.match("pytorch_model.bin")
