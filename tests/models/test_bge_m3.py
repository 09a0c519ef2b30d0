"""BGE-M3: three answers of one model, against the published formulas over transformers' hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from poolhouse import LLM, CheckpointError, LateChunkingParams, PoolingParams
from poolhouse.plans.combined import MODES
from tests.models.parity import Parity, Record
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

TOLERANCE = 1e-4
OVERRIDE = {"hf_overrides": {"architectures": ["BgeM3EmbeddingModel"]}}
ENDS = {"bos_token_id": 0, "eos_token_id": 2}
SPECIAL_IDS = range(4)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    made = save(tmp_path, "XLMRobertaModel", "XLMRobertaConfig", LAYERS | ENDS)
    tokenizer(tmp_path, "roberta")
    torch.save({"weight": torch.randn(1, 32), "bias": torch.randn(1)}, tmp_path / "sparse_linear.pt")
    torch.save({"weight": torch.randn(24, 32), "bias": torch.randn(24)}, tmp_path / "colbert_linear.pt")
    return made


def test_dense_sparse_and_multi_vector_come_from_one_model(model: Any, tmp_path: Path, record_parity: Record) -> None:
    sparse, vectors = (torch.load(tmp_path / f"{kind}_linear.pt") for kind in ("sparse", "colbert"))
    worst = [0.0, 0.0]
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.tasks == ("embed", "token_embed", "token_classify")
        dense = llm.embed(TEXTS)
        many = [output.outputs.array for output in llm.encode(TEXTS, pooling_task="token_embed")]
        weights = [output.outputs.array for output in llm.encode(TEXTS, pooling_task="token_classify")]
        raw = llm.encode(TEXTS[1], PoolingParams(use_activation=False), pooling_task="token_classify")[0].outputs.array
        for place, output in enumerate(dense):
            with torch.inference_mode():
                hidden = model(input_ids=torch.tensor([output.prompt_token_ids])).last_hidden_state[0]
            expected = (
                F.normalize(hidden[0], dim=-1),
                F.normalize(F.linear(hidden[1:], vectors["weight"], vectors["bias"]), dim=-1),
                F.linear(hidden[1:-1], sparse["weight"], sparse["bias"]).relu()[:, 0],
            )
            got = (output.outputs.array, many[place], weights[place])
            assert [part.shape for part in got] == [tuple(part.shape) for part in expected]
            # Weights of tokens are large numbers here: their size counts.
            scale = float(expected[2].max().clamp(min=1))
            differences = [np.abs(g - e.numpy()).max() for g, e in zip(got, expected, strict=True)]
            worst[0] = max(worst[0], differences[0], differences[1], differences[2] / scale)
            alone = (
                llm.encode(TEXTS[place], pooling_task="token_embed")[0].outputs.array,
                llm.encode(TEXTS[place], pooling_task="token_classify")[0].outputs.array / scale,
            )
            packed = (many[place], weights[place] / scale)
            worst[1] = max(worst[1], *(float(np.abs(g - a).max()) for g, a in zip(packed, alone, strict=True)))
    assert (raw < 0).any()
    record_parity(
        Parity(
            "xlm-roberta with BGE-M3's two layers",
            "native",
            "formulas over XLMRobertaModel",
            worst[0],
            worst[1],
            "BgeM3EmbeddingModel",
            ("embed", "token_embed", "token_classify"),
            "BAAI/bge-m3",
        )
    )
    assert worst[0] < TOLERANCE
    assert worst[1] < TOLERANCE


@pytest.mark.parametrize("size", [1, 3, 99])
def test_chunks_count_the_tokens_that_have_no_row_of_their_own(model: Any, tmp_path: Path, size: int) -> None:
    vectors = torch.load(tmp_path / "colbert_linear.pt")
    with LLM(str(tmp_path)) as llm:
        params = PoolingParams(late_chunking_params=LateChunkingParams(size))
        (output,) = llm.encode(TEXTS[1], params, pooling_task="token_embed")
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([output.prompt_token_ids])).last_hidden_state[0]
        means = torch.stack([part.mean(0) for part in hidden.split(size)])
        expected = F.normalize(F.linear(means, vectors["weight"], vectors["bias"]), dim=-1).numpy()
        assert np.abs(output.outputs.array - expected).max() < TOLERANCE


def test_tokens_without_special_ones_all_stay(model: Any, tmp_path: Path) -> None:
    with LLM(str(tmp_path)) as llm:
        for task in ("token_embed", "token_classify"):
            (output,) = llm.encode(TEXTS[0], pooling_task=task, tokenization_kwargs={"add_special_tokens": False})
            assert len(output.outputs.array) == len(output.prompt_token_ids) == 3


def test_a_prompt_of_special_tokens_alone_has_no_weights(model: Any, tmp_path: Path) -> None:
    with LLM(str(tmp_path)) as llm:
        (output,) = llm.encode("", pooling_task="token_classify")
        assert output.outputs.array.shape == (0,)


def test_the_architectures_name_demands_both_layers(model: Any, tmp_path: Path) -> None:
    with LLM(str(tmp_path), **OVERRIDE) as llm:
        assert llm.engine.facts.tasks == ("embed", "token_embed", "token_classify")
    (tmp_path / "sparse_linear.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has no sparse_linear\.pt"):
        LLM(str(tmp_path))
    (tmp_path / "colbert_linear.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has no sparse_linear\.pt"):
        LLM(str(tmp_path), **OVERRIDE)
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.tasks == ("embed", "token_embed")


def test_a_layer_that_does_not_fit_is_named(model: Any, tmp_path: Path) -> None:
    torch.save({"weight": torch.randn(1, 31)}, tmp_path / "sparse_linear.pt")
    with pytest.raises(CheckpointError, match=r"sparse_linear\.pt takes 31 features"):
        LLM(str(tmp_path))
    torch.save([1, 2], tmp_path / "sparse_linear.pt")
    with pytest.raises(CheckpointError, match=r"sparse_linear\.pt cannot be read as one linear layer"):
        LLM(str(tmp_path))


WEIGHTS = (0.4, 0.2, 0.4)


def made_of(model: Any, folder: Path, ids: list[int]) -> tuple[torch.Tensor, dict[int, float], torch.Tensor]:
    """The dense vector, the weight of each token id and the unit vectors of a text, by the published formulas."""
    sparse, vectors = (torch.load(folder / f"{kind}_linear.pt") for kind in ("sparse", "colbert"))
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    weights: dict[int, float] = {}
    for token, weight in zip(
        ids, F.linear(hidden, sparse["weight"], sparse["bias"])[:, 0].relu().tolist(), strict=True
    ):
        if token not in SPECIAL_IDS and weight > 0:
            weights[token] = max(weight, weights.get(token, 0.0))
    many = F.normalize(F.linear(hidden[1:], vectors["weight"], vectors["bias"]), dim=-1)
    return F.normalize(hidden[0], dim=-1), weights, many


@pytest.mark.parametrize("options", [{}, OVERRIDE], ids=["found by its files", "the seed's override"])
def test_sparse_vectors_and_scores_by_mode_follow_the_published_formulas(
    options: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    # Weights of about 0.3, half of them above 0.
    torch.save({"weight": 0.1 * torch.randn(1, 32), "bias": torch.tensor([0.3])}, tmp_path / "sparse_linear.pt")
    texts = [*TEXTS[:4], *(f"w1 w1 unknown {text} w2 w1" for text in TEXTS[:4]), ""]
    with LLM(str(tmp_path), **options) as llm:
        outputs = llm.embed_sparse(texts)
        made = [made_of(model, tmp_path, output.prompt_token_ids) for output in outputs]
        scale = max(max(weights.values(), default=0.0) for _, weights, _ in made)
        assert scale > 0
        for output, (_, weights, _) in zip(outputs, made, strict=True):
            assert output.outputs.indices == sorted(weights)
            assert output.outputs.as_dict() == pytest.approx(weights, abs=TOLERANCE * scale)
        assert len(outputs[-1].outputs) == 0
        queries, documents = made[:4], made[4:8]
        dense = np.array([float(one @ other) for (one, _, _), (other, _, _) in zip(queries, documents, strict=True)])
        sparse = np.array(
            [
                sum(weight * theirs.get(token, 0.0) for token, weight in ours.items())
                for (_, ours, _), (_, theirs, _) in zip(queries, documents, strict=True)
            ]
        )
        colbert = np.array(
            [
                float((ours @ theirs.T).amax(1).mean())
                for (_, _, ours), (_, _, theirs) in zip(queries, documents, strict=True)
            ]
        )
        assert sparse.max() > 0
        expected = {
            "dense": dense,
            "sparse": sparse,
            "colbert": colbert,
            "sparse+dense": (0.4 * dense + 0.2 * sparse) / 0.6,
            "colbert+sparse+dense": 0.4 * dense + 0.2 * sparse + 0.4 * colbert,
            "weighted": 0.4 * dense + 0.2 * sparse + 0.4 * colbert,
        }
        for mode, scores in expected.items():
            weights = WEIGHTS if len(MODES[mode]) > 1 else None
            got = [output.outputs.score for output in llm.score(texts[:4], texts[4:8], mode=mode, weights=weights)]
            assert got == pytest.approx(scores.tolist(), abs=TOLERANCE * max(1.0, scale**2))
        # What is not asked for stays the cosine of dense vectors.
        default = [output.outputs.score for output in llm.score(texts[:4], texts[4:8])]
        assert default == pytest.approx(dense.tolist(), abs=TOLERANCE)
