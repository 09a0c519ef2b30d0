"""jina-embeddings-v4: one vector and many from one pass, by task, against Qwen2.5-VL and the formulas of its own code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from poolhouse import LLM
from poolhouse.errors import CheckpointError
from poolhouse.inputs.prompts import Role
from poolhouse.models.model import Model
from poolhouse.packing.tokens import Tokens
from tests.models.parity import Record, worst
from tests.models.qwen_vl import END, MIDDLE, OLD, SLOT, START, QwenVL, pictures
from tests.models.test_colqwen2 import TOLERANCE, answers, compare, opened, shown_in, written
from tests.models.test_colqwen3 import tokens_of

TASKS = ["retrieval", "text-matching", "code"]
RANK, ALPHA = 4, 8
PROJECTOR = "multi_vector_projector"
REFERENCE = "transformers' Qwen2.5-VL with the changes added in, its own code's formulas"
Changes = dict[str, tuple[Tensor, Tensor]]
PROMPTS: list[tuple[Role | None, list[str | int], str]] = [
    ("query", ["what is shown?"], "Query: what is shown?"),
    ("document", ["a text"], "Passage: a text"),
    (None, ["a text"], "Query: a text"),
    ("document", [0], f"<|im_start|>user\n{SLOT}Describe the image.<|im_end|>\n"),
    ("document", [1, 3], f"<|im_start|>user\n{SLOT}{SLOT}<|im_end|>\n"),
    ("document", [2, "a caption"], f"<|im_start|>user\n{SLOT}Describe the image. a caption<|im_end|>\n"),
]


def made(folder: Path, **config: Any) -> tuple[QwenVL, dict[str, Changes]]:
    """A checkpoint, and what the adapter of each task changes."""
    tiny = QwenVL.make("qwen2_5_vl", **{PROJECTOR: nn.Linear(32, 16)})
    tiny.save(
        folder,
        MIDDLE,
        architectures=["JinaEmbeddingsV4Model"],
        multi_vector_projector_dim=16,
        matryoshka_dims=[8, 16, 32],
        task_names=TASKS,
        **config,
    )
    weights = {
        name.removesuffix(".weight"): tensor
        for name, tensor in tiny.model.model.named_parameters()
        if name.startswith("language_model.layers.") and name.endswith("_proj.weight")
    }
    weights[PROJECTOR] = tiny.modules[PROJECTOR].weight
    torch.manual_seed(3)
    changes: dict[str, Changes] = {}
    for task in TASKS:
        changes[task] = {
            name: (torch.randn(RANK, weight.shape[1]) * 0.2, torch.randn(weight.shape[0], RANK) * 0.2)
            for name, weight in weights.items()
        }
    return tiny, changes


def save_tasks(folder: Path, changes: Mapping[str, Changes]) -> None:
    """The adapters of all tasks in one PEFT folder, under the names that they were trained with."""
    tensors = {}
    for task, modules in changes.items():
        for name, (a, b) in modules.items():
            own = f"base_model.model.{name.replace('language_model.', 'model.')}"
            tensors |= {f"{own}.lora_A.{task}.weight": a.clone(), f"{own}.lora_B.{task}.weight": b.clone()}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "exclude_modules": ".*visual.*"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge(tiny: QwenVL, changes: Changes, sign: int = 1) -> None:
    """Add the changes of a task to the reference, or take them away again."""
    with torch.no_grad():
        for name, (a, b) in changes.items():
            owner = tiny.modules[name] if name == PROJECTOR else tiny.model.model.get_submodule(name)
            owner.weight.add_(sign * b @ a * (ALPHA / RANK))


def expected(
    tiny: QwenVL, changes: Changes, text: str, images: Sequence[Image.Image], size: int = 32
) -> tuple[Tensor, Tensor]:
    """The vector and the vectors of a prompt with one task's changes, by the formulas of the model's own code."""
    merge(tiny, changes)
    with torch.no_grad():
        state = tiny.hidden(text, images)
        many = F.normalize(tiny.modules[PROJECTOR](state), dim=-1)
    merge(tiny, changes, -1)
    ids = tiny.inputs(text, images)["input_ids"][0].tolist()
    within, kept = False, []
    for token in ids:
        within = within or token == START
        kept.append(within or not images)
        within = within and token != END
    one = F.normalize(state[torch.tensor(kept)].mean(0, keepdim=True), dim=-1)
    return F.normalize(one[:, :size], dim=-1), many


def tokens(model: Model) -> list[Tokens]:
    return [tokens_of(model, text, shown_in(parts)) for _, parts, text in PROMPTS]


def test_one_and_many_vectors_by_task_in_one_pack(tmp_path: Path, record_parity: Record) -> None:
    tiny, changes = made(tmp_path)
    save_tasks(tmp_path / "adapters", changes)
    model = opened(tmp_path)
    assert model.tasks == ("embed", "token_embed")
    assert model.facts.late_interaction is None
    assert (model.facts.width, model.pipelines["token_embed"].width) == (32, 16)
    assert model.facts.matryoshka.dimensions == (8, 16, 32)
    assert model.adapters is not None
    assert model.adapters.default == "retrieval"
    for role, parts, text in PROMPTS:
        assert written(model, role, parts) == text
    chosen = [TASKS[index % len(TASKS)] for index in range(len(PROMPTS))]
    pairs = [
        expected(tiny, changes[task], text, shown_in(parts))
        for task, (_, parts, text) in zip(chosen, PROMPTS, strict=True)
    ]
    for task, index in (("embed", 0), ("token_embed", 1)):
        title, wanted = f"jina-embeddings-v4, {task} of three tasks in a pack", [pair[index] for pair in pairs]
        examples = "jinaai/jina-embeddings-v4"
        compare(record_parity, title, model, task, tokens(model), wanted, REFERENCE, examples, chosen)
    # Tasks differ, in the vector as in the vectors.
    for index in (0, 1):
        other = expected(tiny, changes["code"], PROMPTS[0][2], [])[index]
        assert worst([other], [pairs[0][index]]) > 0.1


def test_its_vector_may_be_cut(tmp_path: Path) -> None:
    tiny, changes = made(tmp_path)
    save_tasks(tmp_path / "adapters", changes)
    model = opened(tmp_path)
    _, parts, text = PROMPTS[3]
    wanted, _ = expected(tiny, changes["code"], text, shown_in(parts), size=8)
    (got,) = answers(model, tokens(model)[3:4], "embed", ["code"], dimensions=8)
    assert worst([got], [wanted]) < TOLERANCE


def test_a_task_may_be_merged(tmp_path: Path) -> None:
    from poolhouse.models.adapters.adapters import AdapterOptions

    tiny, changes = made(tmp_path)
    save_tasks(tmp_path / "adapters", changes)
    model = opened(tmp_path, adapters=AdapterOptions(merge="text-matching"))
    for index, (_, parts, text) in enumerate(PROMPTS):
        one, many = expected(tiny, changes["text-matching"], text, shown_in(parts))
        (got,) = answers(model, tokens(model)[index : index + 1], "embed")
        assert worst([got], [one]) < TOLERANCE
        (got,) = answers(model, tokens(model)[index : index + 1], "token_embed")
        assert worst([got], [many]) < TOLERANCE


def test_a_tensor_of_an_unknown_task_is_refused(tmp_path: Path) -> None:
    _, changes = made(tmp_path)
    save_tasks(tmp_path / "adapters", {**changes, "poetry": changes["code"]})
    with pytest.raises(CheckpointError, match=r"poetry.*none of the tasks \['retrieval', 'text-matching', 'code'\]"):
        opened(tmp_path)


def test_a_repack_for_vllm_answers_with_one_vector(tmp_path: Path, record_parity: Record) -> None:
    tiny, changes = made(tmp_path / "whole")
    merge(tiny, changes["retrieval"])
    projector = tiny.modules.pop(PROJECTOR)
    folder = tmp_path / "jina-embeddings-v4-vllm-retrieval"
    tiny.save(folder, OLD, flat=True, architectures=["Qwen2_5_VLForConditionalGeneration"])
    tiny.modules[PROJECTOR] = projector
    merge(tiny, changes["retrieval"], -1)
    model = opened(folder)
    assert model.tasks == ("embed", "token_embed")
    assert any("jina-embeddings-v4 for vLLM" in note for note in model.facts.notes)
    wanted = [expected(tiny, changes["retrieval"], text, shown_in(parts))[0] for _, parts, text in PROMPTS]
    examples = "jinaai/jina-embeddings-v4-vllm-retrieval, -text-matching, -code"
    title = "jina-embeddings-v4 for vLLM, a task merged"
    compare(record_parity, title, model, "embed", tokens(model), wanted, REFERENCE, examples)


def test_requests_choose_tasks_and_sides_by_their_input_type(tmp_path: Path) -> None:
    tiny, changes = made(tmp_path)
    save_tasks(tmp_path / "adapters", changes)

    def close(got: object, wanted: Tensor) -> bool:
        return float(np.abs(np.asarray(got) - wanted.numpy()).max()) < 1e-5

    picture = pictures()[0]
    described = f"<|im_start|>user\n{SLOT}Describe the image.<|im_end|>\n"
    with LLM(str(tmp_path), dtype="float32") as llm:
        cases: list[tuple[dict[str, str], str, str]] = [
            ({}, "retrieval", "Query: a text"),
            ({"input_type": "retrieval.passage"}, "retrieval", "Passage: a text"),
            ({"input_type": "code.query"}, "code", "Query: a text"),
            ({"input_type": "code.passage"}, "code", "Passage: a text"),
            ({"input_type": "text-matching"}, "text-matching", "Query: a text"),
            # Both sides of this task are alike.
            ({"input_type": "document", "task": "text-matching"}, "text-matching", "Query: a text"),
        ]
        for options, task, text in cases:
            (output,) = llm.embed("a text", use_tqdm=False, **options)  # type: ignore[arg-type]
            assert close(output.outputs.embedding, expected(tiny, changes[task], text, [])[0][0]), options
        prompts = ["a text", {"content": [picture]}]
        outputs = llm.encode(prompts, pooling_task="token_embed", input_type="code.query", use_tqdm=False)
        assert close(outputs[0].outputs.data, expected(tiny, changes["code"], "Query: a text", [])[1])
        assert close(outputs[1].outputs.data, expected(tiny, changes["code"], described, [picture])[1])
        assert len(outputs[1].prompt_token_ids) == len(outputs[1].outputs.data)
        score = llm.score("a text", {"content": [picture]}, use_tqdm=False)[0].outputs.score
        query, page = (
            expected(tiny, changes["retrieval"], text, images)[0][0]
            for text, images in (("Query: a text", []), (described, [picture]))
        )
        assert score == pytest.approx(float(query @ page), abs=1e-5)
    with LLM(str(tmp_path), dtype="float32", merge_adapter="text-matching") as llm:
        (output,) = llm.embed("a text", input_type="document", use_tqdm=False)
        assert close(output.outputs.embedding, expected(tiny, changes["text-matching"], "Query: a text", [])[0][0])
