"""Texts over the limit: what PoolerConfig and requests say of them, for every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse import LLM, ConfigError, InputTooLong, InvalidRequest, NoStep, PoolingParams
from tests.checkpoints import save_checkpoint

TEXT = "the moon falls under the water and the songs of sailors " * 10
CHUNKED = {"enable_chunked_processing": True}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("classifier")
    save_checkpoint(folder, "bert, wordpiece", "ForSequenceClassification", num_labels=3)
    return folder


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("embedder")
    save_checkpoint(folder, "bert, wordpiece")
    return folder


def slices(ids: list[int]) -> tuple[list[list[int]], np.ndarray]:
    """Raw slices of the model's 64 tokens, and their shares of the whole."""
    parts = [ids[start : start + 64] for start in range(0, len(ids), 64)]
    return parts, np.array([len(part) for part in parts], np.float32)[:, None] / len(ids)


@pytest.mark.parametrize("pooling", ["MEAN", "CLS", "LAST"])
def test_vectors_are_weighted_and_of_unit_length_again(embedder: Path, pooling: str) -> None:
    with LLM(str(embedder), pooler_config=CHUNKED | {"pooling_type": pooling}) as llm:
        (output,) = llm.embed(TEXT)
        parts, shares = slices(output.prompt_token_ids)
        assert output.chunks == len(parts) > 1
        assert not output.truncated
        mean = (llm.embed_array(parts) * shares).sum(axis=0)
        assert output.outputs.array == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)
        raw = PoolingParams(use_activation=False)
        (output,) = llm.embed(TEXT, pooling_params=raw)
        mean = (llm.embed_array(parts, pooling_params=raw) * shares).sum(axis=0)
        assert output.outputs.array == pytest.approx(mean, abs=1e-4)


def test_probabilities_are_weighted_and_stay_probabilities(classifier: Path) -> None:
    with LLM(str(classifier), pooler_config=CHUNKED) as llm:
        (output,) = llm.classify(TEXT)
        parts, shares = slices(output.prompt_token_ids)
        each = np.stack([part.outputs.array for part in llm.classify(parts)])
        assert output.chunks == len(parts)
        assert output.outputs.array == pytest.approx((each * shares).sum(axis=0), abs=1e-5)
        assert sum(output.outputs.probs) == pytest.approx(1, abs=1e-5)
        (rows,) = llm.encode(TEXT, pooling_task="token_classify")
        alone = np.concatenate([part.outputs.array for part in llm.encode(parts, pooling_task="token_classify")])
        assert rows.outputs.array == pytest.approx(alone, abs=1e-5)


def test_a_request_may_choose_for_itself(embedder: Path) -> None:
    with LLM(str(embedder)) as llm:
        with pytest.raises(InputTooLong):
            llm.embed(TEXT)
        assert llm.embed(TEXT, pooling_params=PoolingParams(overflow="chunk"))[0].chunks > 1
        (cut,) = llm.embed(TEXT, pooling_params=PoolingParams(overflow="truncate"))
        assert (cut.truncated, len(cut.prompt_token_ids)) == (True, 64)
    with LLM(str(embedder), pooler_config=CHUNKED) as llm:
        with pytest.raises(InputTooLong):
            llm.embed(TEXT, pooling_params=PoolingParams(overflow="error"))
        (cut,) = llm.embed(TEXT, pooling_params=PoolingParams(truncate_prompt_tokens=-1))
        assert (len(cut.prompt_token_ids), cut.chunks) == (64, 1)
        (cut,) = llm.embed(TEXT, pooling_params=PoolingParams(truncate_prompt_tokens=100))
        assert (len(cut.prompt_token_ids), cut.chunks, cut.truncated) == (100, 2, True)
    with pytest.raises(InvalidRequest, match="overflow must be"):
        PoolingParams(overflow="split")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{"max_embed_len": 20}, CHUNKED | {"max_embed_len": 100}])
def test_max_embed_len_is_the_limit(embedder: Path, config: dict[str, Any]) -> None:
    most = config["max_embed_len"]
    with LLM(str(embedder), pooler_config=config) as llm:
        within = [5] * most
        assert llm.embed([within])[0].chunks == (2 if most > 64 else 1)
        for prompt in ([[*within, 5]], TEXT, TEXT * 1000):
            with pytest.raises(InputTooLong, match=f"maximum context length is {most} tokens"):
                llm.embed(prompt)
        (cut,) = llm.embed(TEXT, pooling_params=PoolingParams(truncate_prompt_tokens=-1))
        assert len(cut.prompt_token_ids) == min(most, 64)


def test_steps_may_stand_in_some_pieces_only(classifier: Path) -> None:
    steps = {"tok_pooling_type": "STEP", "step_tag_id": 9}
    with LLM(str(classifier), pooler_config=CHUNKED | steps) as llm:
        (output,) = llm.encode([[5] * 100 + [9]], pooling_task="token_classify")
        assert output.outputs.array.shape == (1, 3)
        for ids in ([5] * 100, [5] * 10):
            with pytest.raises(NoStep, match="no step tag"):
                llm.encode([ids], pooling_task="token_classify")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "truncate", "pooler_config": CHUNKED}, "choose one"),
        ({"pooler_config": {"max_embed_len": 0}}, "at least 1"),
        ({"pooler_config": {"max_embed_len": "many"}}, "at least 1"),
    ],
)
def test_options_that_contradict_are_refused(embedder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(embedder), **options)
