"""Several tasks answered from one pass: what each gets is what it gets alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from poolhouse import LLM, EngineError, InvalidRequest, NonFiniteResult, PoolingParams, UnsupportedTask
from poolhouse.engine.engine import Engine
from poolhouse.engine.request import Answer, Request
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.pack import Batch
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.tasks import Task
from tests.models.adapters import save_adapter
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

TASKS: tuple[Task, ...] = ("embed", "token_embed", "token_classify")
TOLERANCE = 1e-5
RAW = PoolingParams(use_activation=False)
BROKEN = 9  # "w5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BGE-M3, which answers three tasks."""
    folder = tmp_path_factory.mktemp("bge-m3")
    ends = {"bos_token_id": 0, "eos_token_id": 2}
    save(folder, "XLMRobertaModel", "XLMRobertaConfig", LAYERS | ends | {"max_position_embeddings": 66})
    tokenizer(folder, "roberta")
    torch.save({"weight": torch.randn(1, 32), "bias": torch.randn(1)}, folder / "sparse_linear.pt")
    torch.save({"weight": torch.randn(24, 32), "bias": torch.randn(24)}, folder / "colbert_linear.pt")
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    adapter = tmp_path_factory.mktemp("law")
    save_adapter(folder, adapter, "XLMRobertaModel", 0, target_modules=["query", "value"])
    with LLM(
        str(folder), lora_modules={"law": str(adapter)}, overflow="chunk", hf_overrides={"is_matryoshka": True}
    ) as llm:
        yield llm.engine


def answers(engine: Engine, requests: list[Request]) -> list[Answer]:
    return [future.result(60) for future in engine.submit(requests)]


def request(text: str, task: Task = "embed", *further: Task, **options: Any) -> Request:
    return Request(Prompt(text), task, options.pop("params", PoolingParams()), further=further, **options)


def arrays(answer: Answer, first: Task) -> dict[Task, np.ndarray]:
    return {first: answer.array, **answer.further}


class Counted:
    """An engine's backbone and pipelines, watched; harm: done to hidden states of packs with the token BROKEN."""

    def __init__(self, engine: Engine, **pipelines: Any) -> None:
        self.rows: list[int] = []
        self.backbone = engine.model.backbone
        model = replace(engine.model, backbone=self, pipelines=dict(engine.model.pipelines) | pipelines)
        self.engine = Engine(model, engine.tokenizer, engine.options)

    def __call__(self, batch: Batch) -> Tensor:
        self.rows.append(len(batch.ids))
        return self.backbone(batch)


@pytest.mark.parametrize("params", [PoolingParams(), RAW, PoolingParams(dimensions=16)], ids=["plain", "raw", "cut"])
@pytest.mark.parametrize("adapter", [None, "law"])
def test_answers_equal_the_separate_ones(engine: Engine, params: PoolingParams, adapter: str | None) -> None:
    texts = [*TEXTS, " ".join(TEXTS) * 3]
    for first in TASKS:
        others = tuple(task for task in TASKS if task != first)
        together = answers(engine, [request(text, first, *others, params=params, adapter=adapter) for text in texts])
        assert {answer.chunks for answer in together} > {1}
        for task in TASKS:
            own = params if task != "token_classify" else replace(params, dimensions=None)
            alone = answers(engine, [request(text, task, params=own, adapter=adapter) for text in texts])
            for ours, theirs in zip(together, alone, strict=True):
                got = arrays(ours, first)
                assert list(got) == [first, *others]
                assert got[task].shape == theirs.array.shape
                assert np.abs(got[task] - theirs.array).max() < TOLERANCE * max(1, np.abs(theirs.array).max())
                assert ours.chunks == theirs.chunks


def test_the_backbone_runs_once(engine: Engine) -> None:
    counted = Counted(engine)
    with counted.engine as watched:
        (answer,) = answers(watched, [request(TEXTS[1], "embed", "token_embed", "token_classify")])
    assert counted.rows == [len(answer.tokens)]
    assert len(answer.further) == 2


def test_requests_with_and_without_further_tasks_share_a_pack(engine: Engine) -> None:
    mixed = [
        request(TEXTS[0], "embed", "token_classify"),
        request(TEXTS[1], "token_classify"),
        request(TEXTS[2], "token_embed", "embed"),
        request(TEXTS[3], "embed"),
    ]
    together = answers(engine, mixed)
    for asked, answer in zip(mixed, together, strict=True):
        assert set(answer.further) == set(asked.further)
        for task, array in arrays(answer, asked.task).items():
            (alone,) = answers(engine, [request(str(asked.prompt.text), task)])
            assert np.abs(array - alone.array).max() < TOLERANCE * max(1, np.abs(array).max())


def test_llm_answers_several_tasks_from_one_pass(folder: Path) -> None:
    with LLM(str(folder)) as llm:
        together = llm.encode(TEXTS, tasks=["sparse", "embed", "token_embed"])
        sparse, dense, rows = llm.embed_sparse(TEXTS), llm.embed(TEXTS), llm.encode(TEXTS, pooling_task="token_embed")
        for one, *alone in zip(together, sparse, dense, rows, strict=True):
            got: Any = one.outputs
            assert list(got) == ["sparse", "embed", "token_embed"]
            assert got["sparse"].indices == alone[0].outputs.indices
            assert np.allclose(got["sparse"].weights, alone[0].outputs.weights, atol=TOLERANCE)
            assert np.abs(got["embed"].array - alone[1].outputs.array).max() < TOLERANCE
            assert np.abs(got["token_embed"].array - alone[2].outputs.array).max() < TOLERANCE
            assert one.prompt_token_ids == alone[1].prompt_token_ids
        (weighed,) = llm.encode(TEXTS[1], tasks=["token_classify"])
        (alone_weighed,) = llm.encode(TEXTS[1], pooling_task="token_classify")
        weights: Any = weighed.outputs
        assert np.array_equal(weights["token_classify"].array, alone_weighed.outputs.array)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tasks": []}, InvalidRequest, "tasks must be a list of names"),
        ({"tasks": "embed"}, InvalidRequest, "tasks must be a list of names"),
        ({"tasks": [3]}, InvalidRequest, "tasks must be a list of names"),
        ({"tasks": ["embedd"]}, InvalidRequest, "Unknown task: 'embedd'"),
        ({"tasks": ["embed", "classify"]}, UnsupportedTask, "Unsupported task: 'classify'"),
        ({"tasks": ["embed", "embed"]}, InvalidRequest, "task 'embed' is asked for twice"),
        ({"tasks": ["sparse", "sparse"]}, InvalidRequest, "task 'sparse' is asked for twice"),
        ({"tasks": ["embed"], "pooling_task": "embed"}, InvalidRequest, "pooling_task or tasks, not both"),
        ({"tasks": ["embed"], "pooling_params": [RAW] * len(TEXTS)}, InvalidRequest, "one PoolingParams for all"),
        ({"tasks": ["extract"]}, UnsupportedTask, "Unsupported task: 'extract'"),
        ({"tasks": ["plugin"]}, UnsupportedTask, "No IOProcessor plugin"),
    ],
)
def test_llm_refuses_tasks_that_cannot_be(
    folder: Path, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with LLM(str(folder)) as llm, pytest.raises(error, match=match):
        llm.encode(TEXTS, **options)


@pytest.mark.parametrize(
    ("further", "params", "error", "match"),
    [
        (("embed",), PoolingParams(), InvalidRequest, "task 'embed' is asked for twice"),
        (("token_embed", "token_embed"), PoolingParams(), InvalidRequest, "task 'token_embed' is asked for twice"),
        (("classify",), PoolingParams(), UnsupportedTask, "Unsupported task: 'classify'"),
        (("embedd",), PoolingParams(), InvalidRequest, "Unknown task: 'embedd'"),
        (("token_embed",), PoolingParams(step_tag_id=3), InvalidRequest, r"do not support \['step_tag_id'\]"),
        (("token_classify",), PoolingParams(step_tag_id=3), InvalidRequest, "belong to STEP pooling"),
        (("token_classify",), PoolingParams(dimensions=999), InvalidRequest, r"range \[1, 32\]"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    engine: Engine, further: Any, params: PoolingParams, error: type[Exception], match: str
) -> None:
    bad, good = engine.submit([request(TEXTS[0], "embed", *further, params=params), request(TEXTS[0])])
    with pytest.raises(error, match=match):
        bad.result(60)
    assert good.result(60).array.shape == (32,)


def test_a_further_task_without_rows_is_as_empty_as_it_is_alone(engine: Engine) -> None:
    ids = np.array([0, 2])
    alone = Request(Prompt(None, ids), "token_classify")
    beside = Request(Prompt(None, ids), "embed", further=("token_classify",))
    first, second = (future.result(60) for future in engine.submit([alone, beside]))
    assert first.array.shape == second.further["token_classify"].shape == (0, 1)


def broken_steps(engine: Engine, task: Task, harm: Any) -> Pipeline:
    """The task's pipeline with a first step that does harm to packs that hold BROKEN."""

    class Step:
        description = "harm"

        def __call__(self, rows: Any, params: PoolingParams) -> Any:
            return harm(rows) if bool((rows.ids == BROKEN).any()) else rows

        def to(self, device: torch.device) -> Any:
            return self

    pipeline = engine.model.pipelines[task]
    return replace(pipeline, steps=(Step(), *pipeline.steps))


def raise_error(rows: Any) -> Any:
    raise RuntimeError("broken pipeline")


def not_finite(rows: Any) -> Any:
    return rows.with_values(torch.where((rows.ids == BROKEN)[:, None], torch.nan, rows.values))


@pytest.mark.parametrize(
    ("harm", "error", "match"),
    [(raise_error, EngineError, "broken pipeline"), (not_finite, NonFiniteResult, "NaN or infinity")],
)
def test_a_failing_further_task_fails_its_request_alone(
    engine: Engine, harm: Any, error: type[Exception], match: str
) -> None:
    assert engine.token_strings([BROKEN]) == ["w5"]
    counted = Counted(engine, token_classify=broken_steps(engine, "token_classify", harm))
    with counted.engine as hurt:
        texts = ["w1 w2", "w5 w2", "w3 w4"]
        first, bad, last = hurt.submit([request(text, "embed", "token_classify", "token_embed") for text in texts])
        (other,) = hurt.submit([request("w5 w2", "embed", "token_embed")])
        for future in (first, last):
            assert set(future.result(60).further) == {"token_classify", "token_embed"}
        with pytest.raises(error, match=match):
            bad.result(60)
        assert set(other.result(60).further) == {"token_embed"}
        assert hurt.alive
        assert hurt.pending == 0
