"""Masked language models: tokens by vocabulary, and SPLADE, against transformers and SparseEncoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling

from poolhouse import LLM, CheckpointError, PoolingParams
from tests.models.parity import Parity, Record, change_tensors
from tests.models.test_classifiers import ROWS
from tests.models.tiny import LAYERS, TEXTS, save, tokenizer

TOLERANCE = 1e-4
SPLADE = {"hf_overrides": {"architectures": ["BertSpladeSparseEmbeddingModel"]}}
MASKED = [row for row in ROWS if ROWS[row][0] != "decoder" and not row.endswith(("mean", "late"))]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("row", MASKED)
def test_a_masked_language_model_embeds_and_gives_every_token_its_vocabulary(
    row: str, tied: bool, tmp_path: Path, record_parity: Record
) -> None:
    kind, family, options, _, _ = ROWS[row]
    tokenize = tokenizer(tmp_path, kind)
    model = save(tmp_path, f"{family}ForMaskedLM", f"{family}Config", options | {"tie_word_embeddings": tied})
    expected = [_logits(model, tokenize(text)["input_ids"]) for text in TEXTS]
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.tasks == ("embed", "token_embed", "token_classify")
        assert llm.model.facts.notes == ()
        decoder, table = llm.model.pipelines["token_classify"].steps[-2], llm.model.backbone.tokens  # type: ignore[attr-defined]
        # A tied decoder is the table itself: no second copy of a large matrix.
        assert (decoder.weight.data_ptr() == table.data_ptr()) is (tied and "lm_head.weight" not in _names(tmp_path))
        raw = llm.encode(TEXTS, PoolingParams(use_activation=False), pooling_task="token_classify")
        alone = [
            llm.encode(text, PoolingParams(use_activation=False), pooling_task="token_classify")[0] for text in TEXTS
        ]
        probabilities = llm.encode(TEXTS, pooling_task="token_classify")[1].outputs.array
        assert llm.embed_array(TEXTS).shape == (len(TEXTS), 32)
    error = max(_relative(g.outputs.array, e) for g, e in zip(raw, expected, strict=True))
    packing = max(_relative(g.outputs.array, a.outputs.array) for g, a in zip(raw, alone, strict=True))
    if tied:
        examples = "google-bert/bert-base-uncased" if row == "bert" else ""
        tasks = ("embed", "token_embed", "token_classify")
        record_parity(Parity(row, "native", "transformers", error, packing, f"{family}ForMaskedLM", tasks, examples))
    assert error < TOLERANCE
    assert packing < TOLERANCE
    assert np.allclose(probabilities, torch.from_numpy(expected[1]).softmax(-1), atol=TOLERANCE)


def test_without_its_head_a_masked_language_model_only_embeds_and_says_so(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    save(tmp_path, "BertForMaskedLM", "BertConfig", LAYERS)
    change_tensors(tmp_path, drop="cls.predictions.transform.dense.weight")
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.tasks == ("embed", "token_embed")
        assert any("cls.predictions.transform.dense.weight" in note for note in llm.model.facts.notes)
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.transform\.dense\.weight"):
        LLM(str(tmp_path), **SPLADE)


def test_the_first_berts_call_norms_gamma_and_beta(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tokenizer(tmp_path)
    save(tmp_path, "BertForMaskedLM", "BertConfig", LAYERS)
    with LLM(str(tmp_path)) as llm:
        expected = llm.encode(TEXTS, pooling_task="token_classify")
    path = tmp_path / "model.safetensors"
    former = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in load_file(path).items()
    }
    assert "bert.embeddings.LayerNorm.gamma" in former
    path.unlink()
    torch.save(former, tmp_path / "pytorch_model.bin")
    for _ in ("pickle", "safetensors"):
        with LLM(str(tmp_path)) as llm:
            got = llm.encode(TEXTS, pooling_task="token_classify")
        assert all(np.array_equal(g.outputs.array, e.outputs.array) for g, e in zip(got, expected, strict=True))
        save_file(former, path)
        (tmp_path / "pytorch_model.bin").unlink(missing_ok=True)


@pytest.mark.parametrize(("strategy", "word"), [("max", "relu"), ("sum", "relu"), ("max", "log1p_relu")])
@pytest.mark.parametrize("row", ["bert", "distilbert", "modernbert, cls", "xlm-roberta"])
def test_a_sparse_encoder_answers_as_sentence_transformers_does(
    row: str, strategy: Any, word: Any, tmp_path: Path, record_parity: Record
) -> None:
    kind, family, options, _, _ = ROWS[row]
    plain, described = tmp_path / "plain", tmp_path / "described"
    tokenizer(plain, kind)
    save(plain, f"{family}ForMaskedLM", f"{family}Config", options)
    encoder = SparseEncoder(
        modules=[Transformer(str(plain), transformer_task="fill-mask"), SpladePooling(strategy, word)], device="cpu"
    )
    encoder.save_pretrained(str(described))
    tokenizer(described, kind)
    expected = encoder.encode(TEXTS, convert_to_sparse_tensor=False).cpu().numpy()
    with LLM(str(described)) as llm:
        assert llm.engine.facts.tasks == ("embed", "token_embed")
        got = llm.embed_array(TEXTS)
        alone = np.stack([llm.embed_array(text)[0] for text in TEXTS])
        tokens = llm.encode(TEXTS[1], pooling_task="token_embed")[0].outputs.array
    reduced = tokens.max(0) if strategy == "max" else tokens.sum(0)
    assert np.allclose(reduced, expected[1], atol=TOLERANCE * expected.max())
    error, packing = _relative(got, expected), _relative(got, alone)
    if (strategy, word) == ("max", "relu"):
        with LLM(str(plain), **SPLADE) as llm:
            assert _relative(llm.embed_array(TEXTS), expected) < TOLERANCE
        examples = "naver/splade-v3" if row == "bert" else ""
        record_parity(
            Parity(
                f"{row}, SPLADE",
                "native",
                "SparseEncoder",
                error,
                packing,
                f"{family}ForMaskedLM",
                ("embed", "token_embed"),
                examples,
            )
        )
    assert error < TOLERANCE
    assert packing < TOLERANCE


def test_the_legacy_module_name_of_sparse_encoders_is_understood(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    save(tmp_path, "BertForMaskedLM", "BertConfig", LAYERS)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.sparse_encoder.models.MLMTransformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Splade",
            "type": "sentence_transformers.sparse_encoder.models.SpladePooling",
        },
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Splade").mkdir()
    config = tmp_path / "1_Splade" / "config.json"
    config.write_text(json.dumps({"pooling_strategy": "max", "activation_function": "relu"}))
    with LLM(str(tmp_path)) as llm:
        assert llm.model.pipelines["embed"].description.endswith(
            "dense 99 > relu > log1p > max > truncate > normalize on request"
        )
    config.write_text(json.dumps({"pooling_strategy": "median"}))
    with pytest.raises(CheckpointError, match="unknown SPLADE pooling 'median'"):
        LLM(str(tmp_path))


def test_a_sparse_encoder_without_a_native_family_runs_in_transformers(tmp_path: Path) -> None:
    tokenize = tokenizer(tmp_path)
    model = save(tmp_path, "BigBirdForMaskedLM", "BigBirdConfig", LAYERS)
    with LLM(str(tmp_path), **SPLADE) as llm:
        assert llm.model.facts.served_by.startswith("transformers, unpacked")
        got = llm.embed_array(TEXTS)
    expected = [np.log1p(_logits(model, tokenize(text)["input_ids"]).clip(0)).max(0) for text in TEXTS]
    assert _relative(got, np.stack(expected)) < TOLERANCE


def _names(folder: Path) -> set[str]:
    from safetensors.torch import load_file

    return set(load_file(folder / "model.safetensors"))


@torch.inference_mode()
def _logits(model: Any, ids: list[int]) -> np.ndarray:
    answer: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return answer


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())
