"""Where the files state another score than vLLM gives: vLLM's by default and a note, theirs by `score_compat`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from poolhouse import LLM
from tests.checkpoints import save_checkpoint

QUERY, TEXTS = "the moon falls", ["bread and ships", "the moon under water", "a"]
TOLERANCE = 1e-5
NN = "torch.nn.modules."

# What config.json states -> what vLLM's order gives, and whether that is another number than the files' word.
STATED: dict[str, tuple[int, dict[str, Any], str, bool]] = {
    "sigmoid of several": (3, {"sentence_transformers": {"activation_fn": f"{NN}activation.Sigmoid"}}, "softmax", True),
    "sigmoid of one": (1, {"sentence_transformers": {"activation_fn": f"{NN}activation.Sigmoid"}}, "sigmoid", False),
    "regression and sigmoid": (
        1,
        {"problem_type": "regression", "sentence_transformers": {"activation_fn": f"{NN}activation.Sigmoid"}},
        "raw",
        True,
    ),
    "several labels and identity": (
        1,
        {
            "problem_type": "multi_label_classification",
            "sbert_ce_default_activation_function": f"{NN}linear.Identity",
        },
        "sigmoid",
        True,
    ),
    "identity": (3, {"sentence_transformers": {"activation_fn": f"{NN}linear.Identity"}}, "raw", False),
    "nothing": (3, {}, "softmax", False),
}
FUNCTIONS = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "raw": lambda x: x}


@pytest.mark.parametrize("name", STATED)
def test_an_activation_that_the_files_state(name: str, tmp_path: Path) -> None:
    labels, stated, vllms, differs = STATED[name]
    save_checkpoint(tmp_path, "bert, wordpiece", "ForSequenceClassification", num_labels=labels)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **stated}))
    theirs = CrossEncoder(str(tmp_path), device="cpu")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = torch.stack([model(**theirs.tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS])

    def probabilities(llm: LLM) -> Any:
        return [output.outputs.probs for output in llm.classify(TEXTS)]

    with LLM(str(tmp_path)) as llm:
        assert np.abs(probabilities(llm) - FUNCTIONS[vllms](logits).numpy()).max() < TOLERANCE
        notes = [note for note in llm.model.facts.notes if "score_compat='files'" in note]
        assert bool(notes) is differs
    with LLM(str(tmp_path), score_compat="files") as llm:
        expected = theirs.activation_fn(logits).numpy() if stated else logits.softmax(-1).numpy()
        assert np.abs(probabilities(llm) - expected).max() < TOLERANCE
        assert not any("score_compat" in note for note in llm.model.facts.notes)
        if labels == 1:
            scores = [output.outputs.score for output in llm.score(QUERY, TEXTS)]
            pairs = theirs.predict([(QUERY, text) for text in TEXTS]).reshape(-1)
            assert scores == pytest.approx(pairs.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_a_similarity_that_the_files_state(similarity: Any, unit: bool, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "plain", "bert, wordpiece")
    modules = [Transformer(str(tmp_path / "plain")), Pooling(32), *([Normalize()] if unit else [])]
    theirs = SentenceTransformer(modules=modules, device="cpu", similarity_fn_name=similarity)
    theirs.save_pretrained(str(tmp_path / "saved"))
    vectors = theirs.encode([QUERY, *TEXTS])
    wanted = theirs.similarity(vectors[:1], vectors[1:])[0].tolist()
    cosines = torch.cosine_similarity(torch.tensor(vectors[:1]), torch.tensor(vectors[1:])).tolist()
    for compat, expected in (("vllm", cosines), ("files", wanted)):
        with LLM(str(tmp_path / "saved"), score_compat=compat) as llm:
            scores = [output.outputs.score for output in llm.score(QUERY, TEXTS)]
            assert scores == pytest.approx(expected, rel=1e-5, abs=TOLERANCE), compat
            told = any("score_compat='files'" in note for note in llm.model.facts.notes)
            # Of unit vectors, the dot product is the cosine.
            same = similarity == "cosine" or (similarity == "dot" and unit)
            assert told is (compat == "vllm" and not same)
