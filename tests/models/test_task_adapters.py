"""Checkpoints that come with an adapter per task: jina-embeddings-v3 and -v5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poolhouse import LLM
from poolhouse.errors import CheckpointError, ConfigError, InvalidRequest
from poolhouse.models.files.hub import embedded_model
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Tokens
from tests.models.adapters import save_adapter
from tests.models.parity import LENGTHS, Parity, Record, change_config, packed, reference, save, worst
from tests.models.test_adapters import ROWS, load, run
from tests.models.test_encoders import TINY

V3_TASKS = ["retrieval.query", "retrieval.passage", "separation", "classification", "text-matching"]
V5_TASKS = ["retrieval", "text-matching", "clustering", "classification"]
RANK, ALPHA = 4, 2


def save_v3(folder: Path, **more: Any) -> dict[str, list[Tensor]]:
    """A checkpoint in the hub's layout; returns what transformers answers with each task's changes added in."""
    save(folder / "plain", "JinaEmbeddingsV3", TINY | more)
    plain = load_file(folder / "plain" / "model.safetensors")
    torch.manual_seed(1)
    stored: dict[str, Tensor] = {}
    changed: list[dict[str, Tensor]] = [dict(plain) for _ in V3_TASKS]
    for name, weight in plain.items():
        if weight.ndim != 2:
            stored[f"roberta.{name}"] = weight
            continue
        module, (rows, columns), table = f"roberta.{name.removesuffix('.weight')}", weight.shape, "embeddings" in name
        a = torch.randn(len(V3_TASKS), *((rows, RANK) if table else (RANK, columns))) * 0.3
        b = torch.randn(len(V3_TASKS), *((RANK, columns) if table else (rows, RANK))) * 0.3
        stored[f"{module}.parametrizations.weight.original"] = weight
        stored[f"{module}.parametrizations.weight.0.lora_A"] = a
        stored[f"{module}.parametrizations.weight.0.lora_B"] = b
        for task in range(len(V3_TASKS)):
            delta = a[task] @ b[task] if table else b[task] @ a[task]
            changed[task][name] = weight + delta * (ALPHA / RANK)
    answers = {"": reference(folder / "plain", "JinaEmbeddingsV3")}
    for task, tensors in zip(V3_TASKS, changed, strict=True):
        save_file(tensors, folder / "plain" / "model.safetensors", {"format": "pt"})
        answers[task] = reference(folder / "plain", "JinaEmbeddingsV3")
    save_file(stored, folder / "plain" / "model.safetensors")
    (folder / "plain").rename(folder / "v3")
    change_config(
        folder / "v3",
        model_type="xlm-roberta",
        position_embedding_type="rotary",
        rope_parameters=None,
        rotary_emb_base=20000.0,
        lora_adaptations=V3_TASKS,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        task_instructions={task: f"{task}: " for task in V3_TASKS},
    )
    return answers


def test_jina_v3_answers_by_task_in_one_pack(tmp_path: Path, record_parity: Record) -> None:
    answers = save_v3(tmp_path)
    loaded = load(tmp_path / "v3")
    assert loaded.adapters.names == tuple(V3_TASKS)
    assert worst(answers["separation"], answers[""]) > 1e-2
    chosen = [None, *V3_TASKS]
    expected = [answers[task or ""][index] for index, task in enumerate(chosen)]
    got = run(loaded, chosen)
    alone = [run(loaded, [task] * len(LENGTHS))[index] for index, task in enumerate(chosen)]
    parity = Parity(
        "jina_embeddings_v3, five tasks in a pack",
        "native",
        "JinaEmbeddingsV3Model with the changes added in",
        worst(got, expected),
        worst(got, alone),
        "XLMRobertaModel",
        ("embed", "token_embed"),
        "jinaai/jina-embeddings-v3",
    )
    record_parity(parity)
    assert parity.error < 1e-5
    assert parity.packing_error < 1e-5
    assert worst(packed(load(tmp_path / "v3", merge="separation").transformer), answers["separation"]) < 1e-5


def test_jina_v3_takes_a_task_and_its_prompt_together(tmp_path: Path) -> None:
    save_v3(tmp_path)
    adapters = load(tmp_path / "v3").adapters
    prompts = dict(adapters.prompts)
    assert prompts["separation"] == "separation: "
    assert adapters.choose(None, None, prompts) == (None, None)
    assert adapters.choose("separation", None, prompts) == ("separation", "separation")
    assert adapters.choose(None, "separation", prompts) == ("separation", "separation")
    assert adapters.choose("separation", "", prompts) == ("separation", "")
    assert adapters.choose("", None, prompts) == (None, None)
    change_config(tmp_path / "v3", jina_task="text-matching")
    assert load(tmp_path / "v3").adapters.choose(None, None, prompts) == ("text-matching", "text-matching")
    merged = load(tmp_path / "v3", merge="separation").adapters
    assert merged.choose(None, None, prompts) == (None, "separation")
    assert merged.choose("separation", None, prompts) == (None, "separation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_adaptations": None}, "lora_adaptations, got None"),
        ({"lora_adaptations": ["a", "b"]}, r"changes for 5 tasks; lora_adaptations is \['a', 'b'\]"),
        ({"lora_rank": 8}, "says rank 8"),
    ],
)
def test_jina_v3_files_that_disagree_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    save_v3(tmp_path)
    change_config(tmp_path / "v3", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "v3")


def test_jina_v3_with_half_a_change_is_refused(tmp_path: Path) -> None:
    save_v3(tmp_path)
    tensors = load_file(tmp_path / "v3" / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("lora_B"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "v3" / "model.safetensors")
    with pytest.raises(CheckpointError, match="lora_A or lora_B is missing"):
        load(tmp_path / "v3")


def save_v5(folder: Path, row: str, **more: Any) -> dict[str, list[Tensor]]:
    """A checkpoint as on the hub: config.json in Jina's words, a PEFT folder per task."""
    name, options = ROWS[row]
    save(folder, name, options | more)
    answers = {"": reference(folder, name)}
    for seed, task in enumerate(V5_TASKS):
        answers[task] = save_adapter(folder, folder / "adapters" / task, name + "Model", seed, lora_alpha=4)
    change_config(folder, model_type="jina_embeddings_v5", architectures=["JinaEmbeddingsV5Model"], task_names=V5_TASKS)
    if row == "eurobert":
        change_config(folder, is_decoder=False)
    return answers


@pytest.mark.parametrize("row", ["qwen3", "eurobert"])
def test_jina_v5_answers_by_task_in_one_pack(row: str, tmp_path: Path, record_parity: Record) -> None:
    answers = save_v5(tmp_path, row)
    loaded = load(tmp_path)
    assert set(loaded.adapters.names) == set(V5_TASKS)
    chosen = [None, *V5_TASKS, "retrieval"]
    expected = [answers[task or ""][index] for index, task in enumerate(chosen)]
    got = run(loaded, chosen)
    alone = [run(loaded, [task] * len(LENGTHS))[index] for index, task in enumerate(chosen)]
    parity = Parity(
        f"jina_embeddings_v5 on {row}, four tasks in a pack",
        "native",
        f"peft on {ROWS[row][0]}Model",
        worst(got, expected),
        worst(got, alone),
        "JinaEmbeddingsV5Model",
        ("embed", "token_embed"),
        f"jinaai/jina-embeddings-v5-text-{'small' if row == 'qwen3' else 'nano'}",
    )
    record_parity(parity)
    assert parity.error < 1e-5
    assert parity.packing_error < 1e-5


def test_jina_v5_defaults_to_retrieval_unless_jina_task_says_otherwise(tmp_path: Path) -> None:
    answers = save_v5(tmp_path, "eurobert")
    prompts = ["query", "document"]
    assert load(tmp_path).adapters.choose(None, "query", prompts) == ("retrieval", "query")
    change_config(tmp_path, jina_task="clustering")
    assert load(tmp_path).adapters.choose(None, None, prompts) == ("clustering", None)
    assert worst(packed(load(tmp_path, merge="clustering").transformer), answers["clustering"]) < 1e-5
    change_config(tmp_path, jina_task="clusterin")
    with pytest.raises(ConfigError, match=r"'clusterin'.*Did you mean 'clustering'"):
        load(tmp_path)


def test_a_name_of_a_task_is_not_free_for_another_adapter(tmp_path: Path) -> None:
    save_v5(tmp_path, "eurobert")
    with pytest.raises(ConfigError, match=r"task adapters named \['retrieval'\]"):
        load(tmp_path, modules={"retrieval": tmp_path / "adapters" / "retrieval"})


def test_jina_v5_through_the_llm_takes_task_prompt_and_last_token(tmp_path: Path) -> None:
    save_v5(tmp_path, "eurobert", vocab_size=30522)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (embedded_model() / name).is_file():
            shutil.copy(embedded_model() / name, tmp_path / name)
    modules = [{"idx": 0, "name": "transformer", "path": "", "type": "custom_st.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    prompts = {"prompts": {"query": "Query: ", "document": "Document: "}, "default_prompt_name": "document"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    transformer = load(tmp_path).transformer

    def expected(task: str, ids: list[int]) -> Any:
        last = transformer(Batch.pack([Tokens(np.array(ids))], adapters=[task]))[-1]
        return (last / last.norm()).numpy()

    def ids(llm: LLM, text: str) -> list[int]:
        return llm.embed(text, prompt_name="")[0].prompt_token_ids

    with LLM(str(tmp_path)) as llm:
        for options, task, prefix in (
            ({}, "retrieval", "Document: "),
            ({"task": "clustering"}, "clustering", "Document: "),
            ({"task": "text-matching", "prompt_name": "query"}, "text-matching", "Query: "),
            ({"lora_request": "retrieval", "prompt_name": ""}, "retrieval", ""),
            # What a text is may be a task too; a query is one of the task's prompts.
            ({"input_type": "text-matching"}, "text-matching", "Document: "),
            ({"input_type": "Clustering", "prompt_name": ""}, "clustering", ""),
            ({"input_type": "retrieval.query"}, "retrieval", "Query: "),
            ({"input_type": "clustering", "task": "classification"}, "classification", "Document: "),
        ):
            (got,) = llm.embed_array("the sea", **options)  # type: ignore[arg-type]
            assert np.abs(got - expected(task, ids(llm, prefix + "the sea"))).max() < 1e-5, options
        with pytest.raises(InvalidRequest, match=r"'separation'.*'clustering', 'document', 'query', 'retrieval'"):
            llm.embed_array("the sea", input_type="separation")
    with LLM(str(tmp_path), hf_overrides={"jina_task": "classification"}) as llm:
        assert (
            np.abs(llm.embed_array("the sea")[0] - expected("classification", ids(llm, "Document: the sea"))).max()
            < 1e-5
        )
    with LLM(str(tmp_path), merge_adapter="clustering") as llm:
        assert (
            np.abs(
                llm.embed_array("the sea", task="clustering")[0] - expected("clustering", ids(llm, "Document: the sea"))
            ).max()
            < 1e-5
        )
