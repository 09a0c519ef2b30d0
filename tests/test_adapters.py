"""Adapters through the LLM class and the server, on the embedded model."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from starlette.testclient import TestClient

from poolhouse import LLM, CheckpointError, ConfigError, InvalidRequest, LoRARequest
from poolhouse.models.files.hub import embedded_model
from poolhouse.outputs import Array
from poolhouse.params import parse_lora_modules
from poolhouse.server.app import create_app

TEXTS = ["Hello, my name is", "The capital of France is", "a longer text about the sea and its weather, " * 3]


def save_adapter(folder: Path, seed: int) -> Array:
    """A PEFT folder of sentence-transformers on the embedded model, and its vectors of TEXTS."""
    with warnings.catch_warnings():
        # peft asks transformers for what transformers deprecates.
        warnings.simplefilter("ignore")
        model = SentenceTransformer(str(embedded_model()), device="cpu")
        model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"]))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(str(folder))
    vectors: Array = model.encode(TEXTS, normalize_embeddings=True)
    return vectors


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Array]]:
    folder = tmp_path_factory.mktemp("adapters")
    vectors = {name: save_adapter(folder / name, seed) for seed, name in enumerate(("sea", "land"))}
    return {name: str(folder / name) for name in vectors}, vectors


@pytest.fixture(scope="module")
def llm(adapters: tuple[dict[str, str], dict[str, Array]]) -> Iterator[LLM]:
    with LLM(enable_lora=True, lora_modules=adapters[0], max_lora_rank=8) as llm:
        yield llm


def vectors(llm: LLM, **options: object) -> Array:
    return llm.embed_array(TEXTS, **options)  # type: ignore[arg-type]


def test_a_sentence_transformers_folder_with_an_adapter_is_a_model(
    adapters: tuple[dict[str, str], dict[str, Array]],
) -> None:
    paths, expected = adapters
    assert not (Path(paths["sea"]) / "config.json").exists()
    with LLM(paths["sea"]) as llm:
        assert np.abs(vectors(llm) - expected["sea"]).max() < 1e-5


def test_a_bare_adapter_takes_its_bases_pooling_and_tokenizer(
    adapters: tuple[dict[str, str], dict[str, Array]], tmp_path: Path
) -> None:
    paths, expected = adapters
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(paths["sea"]) / name, tmp_path / name)
    with LLM(str(tmp_path)) as llm:
        assert np.abs(vectors(llm) - expected["sea"]).max() < 1e-5
        assert llm.engine.facts.max_tokens == 256


def with_config(folder: Path, path: str, **changes: object) -> str:
    """A copy of an adapter with a changed adapter_config.json."""
    shutil.copytree(path, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return str(folder)


def test_an_adapter_on_an_adapted_model_adds_to_it(
    adapters: tuple[dict[str, str], dict[str, Array]], tmp_path: Path
) -> None:
    sea = adapters[0]["sea"]
    twice = with_config(tmp_path / "twice", sea, base_model_name_or_path=sea)
    doubled = with_config(tmp_path / "doubled", sea, lora_alpha=16)
    with LLM(twice) as one, LLM(doubled) as other:
        assert np.abs(vectors(one) - vectors(other)).max() < 1e-5
        assert [note for note in one.model.facts.notes if note.startswith("Merged")] == [
            f"Merged into the weights: the adapter {path}." for path in (sea, twice)
        ]


def test_an_adapter_without_its_base_says_what_is_missing(
    adapters: tuple[dict[str, str], dict[str, Array]], tmp_path: Path
) -> None:
    sea = adapters[0]["sea"]
    with pytest.raises(CheckpointError, match="names no base_model_name_or_path"):
        LLM(with_config(tmp_path / "none", sea, base_model_name_or_path=None))
    with pytest.raises(CheckpointError, match="/nowhere does not exist"):
        LLM(with_config(tmp_path / "lost", sea, base_model_name_or_path="/nowhere"))
    with pytest.raises(CheckpointError, match="names itself as its base"):
        LLM(with_config(tmp_path / "self", sea, base_model_name_or_path=str(tmp_path / "self")))


def test_requests_choose_adapters_by_name_prompt_by_prompt(
    llm: LLM, adapters: tuple[dict[str, str], dict[str, Array]]
) -> None:
    _, expected = adapters
    with LLM() as plain:
        without = vectors(plain)
    assert np.abs(vectors(llm) - without).max() < 1e-6
    for name in expected:
        assert np.abs(expected[name] - without).max() > 1e-2
        assert np.abs(vectors(llm, lora_request=name) - expected[name]).max() < 1e-5
    mixed = vectors(llm, lora_request=["land", None, LoRARequest("sea", 1)])
    assert np.abs(mixed - np.stack([expected["land"][0], without[1], expected["sea"][2]])).max() < 1e-5


def test_batches_side_by_side_keep_their_adapters_apart(
    adapters: tuple[dict[str, str], dict[str, Array]],
) -> None:
    folders, expected = adapters
    names = ["sea", "land"] * 20
    with (
        LLM(enable_lora=True, lora_modules=folders, lanes=2, max_num_batched_tokens=64) as llm,
        ThreadPoolExecutor(4) as callers,
    ):
        found = list(callers.map(lambda name: vectors(llm, lora_request=name), names))
    for name, got in zip(names, found, strict=True):
        np.testing.assert_allclose(got, expected[name], atol=2e-6)


def test_a_request_may_bring_its_adapter_as_vllms_do(adapters: tuple[dict[str, str], dict[str, Array]]) -> None:
    paths, expected = adapters
    with LLM() as llm:
        for _ in range(2):
            request = SimpleNamespace(lora_name="new", lora_int_id=1, lora_path=paths["land"])
            assert np.abs(vectors(llm, lora_request=request) - expected["land"]).max() < 1e-5
        with pytest.raises(InvalidRequest, match="There is an adapter 'new'"):
            vectors(llm, lora_request=LoRARequest("new", 1, paths["sea"]))
    with LLM(enable_lora=False) as llm, pytest.raises(InvalidRequest, match="switched off"):
        vectors(llm, lora_request=LoRARequest("new", 1, paths["land"]))


def test_a_merged_adapter_answers_every_request(adapters: tuple[dict[str, str], dict[str, Array]]) -> None:
    paths, expected = adapters
    with LLM(merge_adapter=paths["sea"]) as llm:
        assert np.abs(vectors(llm) - expected["sea"]).max() < 1e-5
        with pytest.raises(InvalidRequest, match="merged into the weights"):
            vectors(llm, lora_request=LoRARequest("new", 1, paths["land"]))


def test_wrong_names_say_which_adapters_there_are(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"'sae'\. Did you mean 'sea'\? It has \['land', 'sea'\]"):
        vectors(llm, lora_request="sae")
    with pytest.raises(InvalidRequest, match=r"no adapter named 'retrieval\.query'"):
        vectors(llm, task="retrieval.query")
    with pytest.raises(InvalidRequest, match="give one of them"):
        vectors(llm, task="sea", lora_request="sea")
    with pytest.raises(InvalidRequest, match="2 entries for 3 prompts"):
        vectors(llm, lora_request=["sea", "land"])
    with pytest.raises(InvalidRequest, match="name of an adapter or a LoRARequest, got int"):
        vectors(llm, lora_request=1)
    with pytest.raises(ConfigError, match="neither 'name=path'"):
        LLM(lora_modules=["sea"])
    with pytest.raises(CheckpointError, match="no adapter_config"):
        LLM(lora_modules={"sea": str(embedded_model())})


def test_models_that_transformers_serves_refuse_adapters(adapters: tuple[dict[str, str], dict[str, Array]]) -> None:
    with pytest.raises(ConfigError, match="native families"):
        LLM(model_impl="transformers", lora_modules=adapters[0])
    with LLM(model_impl="transformers") as llm, pytest.raises(InvalidRequest, match=r"no adapter named 'sea'"):
        vectors(llm, lora_request="sea")


def test_long_prompts_in_pieces_keep_their_adapter(adapters: tuple[dict[str, str], dict[str, Array]]) -> None:
    with LLM(lora_modules=adapters[0], overflow="chunk", max_model_len=16) as llm:
        (output,) = llm.embed(TEXTS[2], lora_request="sea")
        ids = output.prompt_token_ids
        assert output.chunks == len(ids) / 16 == 2
        pieces = llm.embed_array([ids[:16], ids[16:]], lora_request="sea")
        mean = pieces.mean(axis=0) / np.linalg.norm(pieces.mean(axis=0))
        assert np.abs(output.outputs.array - mean).max() < 1e-5
        assert np.abs(output.outputs.array - llm.embed(TEXTS[2])[0].outputs.array).max() > 1e-2


@pytest.fixture(scope="module")
def http(llm: LLM) -> httpx.Client:
    # Without `with`, the application's end does not close the engine that tests share.
    return TestClient(create_app([llm.engine]))


def test_the_server_lists_adapters_as_models_and_answers_through_them(
    http: httpx.Client, llm: LLM, adapters: tuple[dict[str, str], dict[str, Array]]
) -> None:
    listed = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert set(listed) == {llm.engine.facts.name, "sea", "land"}
    assert (listed["sea"]["parent"], listed[llm.engine.facts.name]["parent"]) == (llm.engine.facts.name, None)
    for field, path in (("embedding", "/v1/embeddings"), ("data", "/pooling")):
        reply = http.post(path, json={"model": "sea", "input": TEXTS, "task": "embed"}).json()
        assert reply["model"] == "sea"
        assert np.abs(np.array([item[field] for item in reply["data"]]) - adapters[1]["sea"]).max() < 1e-5
    for body in ({"adapter": "land"}, {"task": "land"}, {"model": "sea", "adapter": "land"}):
        reply = http.post("/v1/embeddings", json={"input": TEXTS, **body}).json()
        assert np.abs(np.array([item["embedding"] for item in reply["data"]]) - adapters[1]["land"]).max() < 1e-5
    reply = http.post("/v1/embeddings", json={"input": "x", "task": "retrieval.query"})
    assert reply.status_code == 400
    assert "no adapter named 'retrieval.query'" in reply.json()["message"]
    assert http.post("/v1/embeddings", json={"input": "x", "model": "sae"}).status_code == 404


def test_lora_modules_are_written_in_any_of_vllms_ways() -> None:
    expected = {"a": "x/y", "b": "z"}
    for given in (
        expected,
        "a=x/y,b=z",
        ["a=x/y", "b=z"],
        '{"name": "a", "path": "x/y"},{"name": "b", "path": "z"}',
        [{"name": "a", "path": "x/y", "base_model_name": "m"}, "b=z"],
    ):
        assert parse_lora_modules(given) == expected
    with pytest.raises(ValueError, match="twice"):
        parse_lora_modules("a=x a=y")


def test_using_an_adapter_draws_in_no_peft_and_no_transformers(
    adapters: tuple[dict[str, str], dict[str, Array]],
) -> None:
    import subprocess

    code = f"""
import sys
from poolhouse import LLM
with LLM({adapters[0]["sea"]!r}) as llm:
    llm.embed("x")
assert not {{"peft", "transformers"}} & set(sys.modules), "drawn in"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
