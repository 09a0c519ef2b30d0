"""Classifiers and cross-encoders from text to probability, against transformers and sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from poolhouse import LLM, PoolingParams
from poolhouse.engine.request import Request
from poolhouse.inputs.prompts import Prompt
from tests.models.parity import Parity, Record
from tests.models.tiny import DOCUMENTS, LAYERS, QUERIES, TEXTS, save, tokenizer

# Probabilities: both sides add the same float32 numbers in another order, and heads of random weights enlarge that.
TOLERANCE = 1e-4

ENDS = {"bos_token_id": 0, "eos_token_id": 2}
GROUPED = LAYERS | {"num_key_value_heads": 2, "head_dim": 8}
DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 1}
MODERN = LAYERS | ENDS | {"local_attention": 8, "cls_token_id": 0, "sep_token_id": 2}
EURO = GROUPED | ENDS
DEBERTA = LAYERS | {
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": 32,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}

# Row: kind of tokenizer, family, options, hub models of whole texts, hub models of tokens.
Row = tuple[str, str, dict[str, Any], str, str]
ROWS: dict[str, Row] = {
    "bert": ("bert", "Bert", LAYERS, "cross-encoder/ms-marco-MiniLM-L-6-v2", "boltuix/NeuroBERT-NER"),
    "roberta": ("roberta", "Roberta", LAYERS, "cross-encoder/quora-roberta-base", ""),
    "xlm-roberta": ("roberta", "XLMRoberta", LAYERS, "BAAI/bge-reranker-v2-m3", ""),
    "camembert": ("roberta", "Camembert", LAYERS, "", ""),
    "distilbert": ("roberta", "DistilBert", DISTIL, "", ""),
    "mpnet": ("roberta", "MPNet", LAYERS, "", ""),
    "albert": ("bert", "Albert", LAYERS | {"embedding_size": 16}, "", ""),
    "electra": ("bert", "Electra", LAYERS | {"embedding_size": 16}, "cross-encoder/ms-marco-electra-base", ""),
    "modernbert, cls": (
        "roberta",
        "ModernBert",
        MODERN | {"classifier_pooling": "cls"},
        "tomaarsen/reranker-ModernBERT-base-gooaq-bce",
        "disham993/electrical-ner-ModernBERT-base",
    ),
    "modernbert, mean": (
        "roberta",
        "ModernBert",
        MODERN | {"classifier_pooling": "mean"},
        "Alibaba-NLP/gte-reranker-modernbert-base",
        "",
    ),
    "nomic_bert": ("bert", "NomicBert", LAYERS, "", ""),
    "gte": ("roberta", "Gte", LAYERS, "Alibaba-NLP/gte-multilingual-reranker-base", ""),
    "eurobert, bos": ("roberta", "EuroBert", EURO | {"classifier_pooling": "bos"}, "", ""),
    "eurobert, mean": ("roberta", "EuroBert", EURO | {"classifier_pooling": "mean"}, "", ""),
    "eurobert, late": ("roberta", "EuroBert", EURO | {"classifier_pooling": "late"}, "", ""),
    "jina_embeddings_v3": ("roberta", "JinaEmbeddingsV3", LAYERS, "", ""),
    "deberta v3": ("bert", "DebertaV2", DEBERTA, "mixedbread-ai/mxbai-rerank-base-v1", ""),
    "llama": ("decoder", "Llama", GROUPED, "Skywork/Skywork-Reward-V2-Llama-3.1-8B", ""),
    "mistral": ("decoder", "Mistral", GROUPED | {"sliding_window": 6}, "", ""),
    "qwen2": ("decoder", "Qwen2", GROUPED, "jason9693/Qwen2.5-1.5B-apeach", ""),
    "qwen3": ("decoder", "Qwen3", GROUPED, "Skywork/Skywork-Reward-V2-Qwen3-8B", "bd2lcco/Qwen3-0.6B-finetuned"),
    "gemma": ("decoder", "Gemma", GROUPED, "", ""),
    "gemma2": ("decoder", "Gemma2", GROUPED | {"sliding_window": 6, "query_pre_attn_scalar": 16}, "", ""),
    "gemma3": ("decoder", "Gemma3Text", GROUPED | {"sliding_window": 6, "query_pre_attn_scalar": 16}, "", ""),
}
# transformers has no Gemma3TextForTokenClassification.
TOKEN_ROWS = [row for row in ROWS if not row.endswith(("mean", "late")) and row != "gemma3"]


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("row", ROWS)
def test_texts_are_classified_as_transformers_and_cross_encoder_do(
    row: str, labels: int, tmp_path: Path, record_parity: Record
) -> None:
    kind, family, options, examples, _ = ROWS[row]
    tokenize = tokenizer(tmp_path, kind)
    model = save(tmp_path, f"{family}ForSequenceClassification", f"{family}Config", options, num_labels=labels)
    expected = np.stack([_logits(model, tokenize(text)["input_ids"]) for text in TEXTS])
    with LLM(str(tmp_path)) as llm:
        got = llm.classify(TEXTS)
        assert llm.model.facts.served_by == f"native {model.config.model_type}, packed"
        logits = llm.classify(TEXTS, pooling_params=PoolingParams(use_activation=False))
        alone = [llm.classify(text)[0].outputs.array for text in TEXTS]
        pairs = _pairs(llm)
        if labels == 1:
            assert [output.outputs.score for output in llm.score(QUERIES, DOCUMENTS)] == pytest.approx(pairs[:, 0])
    assert [output.outputs.label for output in got] == [f"LABEL_{place}" for place in expected.argmax(1)]
    assert np.abs([output.outputs.array for output in logits] - expected).max() < TOLERANCE * np.abs(expected).max()
    probabilities = _probabilities(expected)
    ours = np.stack([output.outputs.array for output in got])
    theirs = _cross_encoder(tmp_path, tokenize)
    parity = Parity(
        f"{row}, {labels} label{'s' if labels > 1 else ''}",
        "native",
        "transformers, CrossEncoder",
        float(
            max(np.abs(ours - probabilities).max(), np.abs(pairs - _probabilities(theirs.reshape(-1, labels))).max())
        ),
        float(np.abs(ours - alone).max()),
        f"{family}ForSequenceClassification",
        ("classify", "token_classify", *(("score",) if labels == 1 else ())),
        examples,
    )
    record_parity(parity)
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE


@pytest.mark.parametrize("row", TOKEN_ROWS)
def test_tokens_are_classified_as_transformers_does(row: str, tmp_path: Path, record_parity: Record) -> None:
    kind, family, options, _, examples = ROWS[row]
    tokenize = tokenizer(tmp_path, kind)
    model = save(tmp_path, f"{family}ForTokenClassification", f"{family}Config", options, num_labels=5)
    expected = [_logits(model, tokenize(text)["input_ids"]) for text in TEXTS]
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.tasks == ("token_classify",)
        got = [output.outputs.array for output in llm.encode(TEXTS, pooling_task="token_classify")]
        alone = [llm.encode(text, pooling_task="token_classify")[0].outputs.array for text in TEXTS]
        assert llm.reward(TEXTS)[0].outputs.array.shape == expected[0].shape
    parity = Parity(
        f"{row}, tokens",
        "native",
        "transformers",
        max(float(np.abs(g - _probabilities(e)).max()) for g, e in zip(got, expected, strict=True)),
        max(float(np.abs(g - a).max()) for g, a in zip(got, alone, strict=True)),
        f"{family}ForTokenClassification",
        ("token_classify",),
        examples,
    )
    record_parity(parity)
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_long_pairs_are_cut_as_cross_encoder_cuts_them(kind: str, tmp_path: Path) -> None:
    tokenizer(tmp_path, kind, most=16)
    family = kind.capitalize()
    save(tmp_path, f"{family}ForSequenceClassification", f"{family}Config", LAYERS, num_labels=1)
    queries, documents = [TEXTS[3], TEXTS[0], TEXTS[3], TEXTS[1]], [TEXTS[1], TEXTS[3], TEXTS[3], TEXTS[5]]
    expected = CrossEncoder(str(tmp_path), device="cpu").predict(list(zip(queries, documents, strict=True)))
    with LLM(str(tmp_path)) as llm:
        got = llm.score(queries, documents, pooling_params=PoolingParams(truncate_prompt_tokens=-1))
    assert [output.outputs.score for output in got] == pytest.approx(expected.tolist(), abs=TOLERANCE)
    assert all(output.truncated for output in got)


@pytest.mark.parametrize("row", ["nomic_bert", "gte", "jina_embeddings_v3"])
def test_the_names_of_transformers_own_modules_are_read_too(row: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    kind, family, options, _, _ = ROWS[row]
    tokenize = tokenizer(tmp_path, kind)
    model = save(tmp_path, f"{family}ForSequenceClassification", f"{family}Config", options, num_labels=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with LLM(str(tmp_path)) as llm:
        (got,) = llm.classify(TEXTS[1])
    assert np.allclose(
        got.outputs.array, _probabilities(_logits(model, tokenize(TEXTS[1])["input_ids"])), atol=TOLERANCE
    )


@pytest.mark.parametrize("name", [None, "GteNewForSequenceClassification"])
def test_gtes_own_name_on_the_hub_and_vllms_override_mean_the_same(name: str | None, tmp_path: Path) -> None:
    from tests.models.parity import change_config

    tokenize = tokenizer(tmp_path, "roberta")
    model = save(tmp_path, "GteForSequenceClassification", "GteConfig", LAYERS, num_labels=1)
    change_config(
        tmp_path,
        model_type="new",
        architectures=["NewForSequenceClassification"],
        position_embedding_type="rope",
        rope_theta=160000,
        rope_parameters=None,
    )
    with LLM(str(tmp_path), hf_overrides=name and {"architectures": [name]}) as llm:
        assert llm.model.facts.served_by == "native new, packed"
        (got,) = llm.classify(TEXTS[1])
    assert got.outputs.probs == pytest.approx(
        _probabilities(_logits(model, tokenize(TEXTS[1])["input_ids"])).tolist(), abs=TOLERANCE
    )


def _pairs(llm: LLM) -> np.ndarray:
    """Probabilities of each pair, [pairs, labels]."""
    futures = llm.engine.submit(
        [Request(Prompt(query, pair=document), "classify") for query, document in zip(QUERIES, DOCUMENTS, strict=True)]
    )
    return np.stack([future.result(60).array for future in futures])


def _cross_encoder(folder: Path, tokenize: Any) -> np.ndarray:
    """CrossEncoder's logits of each pair."""
    model = CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity())
    # transformers would make a Qwen2 tokenizer of any that lies beside a Qwen2 model.
    model[0].processor = tokenize
    scores: np.ndarray = model.predict(list(zip(QUERIES, DOCUMENTS, strict=True)), convert_to_numpy=True)
    return scores


@torch.inference_mode()
def _logits(model: Any, ids: list[int]) -> np.ndarray:
    answer: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return answer


def _probabilities(logits: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(logits)
    return (tensor.sigmoid() if logits.shape[-1] == 1 else tensor.softmax(-1)).numpy()
