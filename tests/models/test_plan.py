"""The decision about a model: made from files alone, each read once, and printable."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from poolhouse import LLM
from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.models.files.hub import embedded_model
from poolhouse.models.load import build
from poolhouse.models.plan import LoadOptions, decide
from poolhouse.params import PoolerConfig
from tests.models.tiny import LAYERS, save
from tests.models.tiny_rerankers import save as save_reranker

_OPENED: list[list[str]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _OPENED:
        _OPENED[-1].append(str(arguments[0]))


@cache
def _listen() -> None:
    """From the first use on, since a hook cannot be taken away."""
    sys.addaudithook(_hear)


@contextmanager
def opened() -> Iterator[list[str]]:
    """The names of files that Python opens meanwhile."""
    _listen()
    _OPENED.append([])
    try:
        yield _OPENED[-1]
    finally:
        _OPENED.pop()


def options(**chosen: Any) -> LoadOptions:
    return LoadOptions(name="tiny", device="cpu", **chosen)


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A BERT with a Pooling and a Dense of sentence-transformers, and prompts; no file holds a tensor."""
    save(tmp_path, "BertModel", "BertConfig", LAYERS | {"max_position_embeddings": 64})
    (tmp_path / "model.safetensors").unlink()
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" * (kind != "Transformer"),
         "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]  # fmt: skip
    for name, content in {
        "modules.json": modules,
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}},
        "sentence_bert_config.json": {"max_seq_length": 20},
        "1_Pooling/config.json": {"pooling_mode": "max"},
        "2_Dense/config.json": {"in_features": 32, "out_features": 8, "bias": True},
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return tmp_path


def test_opening_the_embedded_model_reads_each_json_file_once() -> None:
    folder = str(embedded_model())
    with opened() as names, LLM():
        pass
    counts = Counter(name for name in names if name.startswith(folder) and name.endswith(".json"))
    assert {Path(name).name for name in counts} >= {"config.json", "modules.json", "tokenizer_config.json"}
    assert set(counts.values()) == {1}, counts


def test_a_folder_and_those_within_it_read_a_file_once(described: Path) -> None:
    folder = Folder(described)
    with opened() as names:
        for _ in range(2):
            assert (folder / "1_Pooling").json("config.json") == {"pooling_mode": "max"}
            assert folder.json("1_Pooling/config.json") == {"pooling_mode": "max"}
            assert folder.json("nothing.json", needed=False) == {}
    assert len(names) == 1
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        folder.json("modules.json")


def test_a_plan_is_made_without_a_tensor(described: Path) -> None:
    plan = decide(described, options())
    assert plan.described() == {
        "weights": str(described),
        "tokenizer": str(described),
        "runner": "native family bert",
        "role": "embed",
        "pooling": "MAX (sentence-transformers' files)",
        "prompts": ["query"],
        "dtype": "float32",
        "device": "cpu",
    }
    with pytest.raises(CheckpointError, match="has no weights"):
        build(plan)


@pytest.mark.parametrize(
    ("chosen", "config", "pooling", "runner"),
    [
        ({"pooler": PoolerConfig("LAST")}, {}, "LAST (pooler_config)", "native family bert"),
        ({"implementation": "transformers"}, {}, "MAX (sentence-transformers' files)",
         "transformers (model_impl='transformers')"),
        ({}, {"is_decoder": True}, "MAX (sentence-transformers' files)",
         "transformers (config.json: is_decoder is True; the native family handles only (False,).)"),
        ({}, {"model_type": "xlm"}, "MAX (sentence-transformers' files)",
         "transformers (no native family serves model_type 'xlm')"),
    ],
)  # fmt: skip
def test_a_plan_says_who_serves_and_who_said_how_to_pool(
    chosen: dict[str, Any], config: dict[str, Any], pooling: str, runner: str, described: Path
) -> None:
    path = described / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    decision = decide(described, options(**chosen)).described()
    assert (decision["pooling"], decision["runner"]) == (pooling, runner)


def test_without_files_of_sentence_transformers_the_family_says_how_to_pool(described: Path) -> None:
    (described / "modules.json").unlink()
    assert decide(described, options()).described()["pooling"] == "CLS (its family)"
    plan = decide(described, options(implementation="transformers"))
    assert "seen when the model is built" in plan.described()["pooling"]


def test_the_plan_of_a_reranker_names_its_template_and_its_tokens(tmp_path: Path) -> None:
    own = save_reranker(tmp_path / "Qwen3-Reranker", "Qwen3")
    own.save_pretrained(tmp_path / "Qwen3-Reranker")
    decision = decide(tmp_path / "Qwen3-Reranker", options()).described()
    ids = own.convert_tokens_to_ids(["no", "yes"])
    assert (decision["role"], decision["score"]) == ("classify", f"logits of the tokens {ids}")
    assert decision["score_template"] == "qwen3_reranker"
    assert any("Taken for Qwen3-Reranker" in note for note in decision["notes"])
