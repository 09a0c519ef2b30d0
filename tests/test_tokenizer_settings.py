"""What a tokenizer's files say holds from Python and over HTTP: the side that is cut, special tokens, notes, start-up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from starlette.testclient import TestClient

from poolhouse import LLM, PoolingParams
from poolhouse.server.app import create_app
from tests.inputs.test_tokenizer_classes import edit
from tests.models.tiny import LAYERS, WORDS, save, tokenizer

LONG = " ".join(WORDS[:40])
OTHER = " ".join(WORDS[50:56])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-encoder whose files cut texts on the left, to 16 tokens."""
    place = tmp_path_factory.mktemp("left")
    tokenizer(place)
    save(place, "BertForSequenceClassification", "BertConfig", LAYERS, num_labels=1)
    edit(place / "tokenizer_config.json", truncation_side="left", model_max_length=16)
    return place


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), overflow="truncate") as llm:
        yield llm


def theirs(folder: Path, *texts: str, side: str = "left") -> list[int]:
    made = transformers.AutoTokenizer.from_pretrained(folder)
    made.truncation_side = side
    ids: list[int] = made(*texts, truncation=True, max_length=16)["input_ids"]
    return ids


def test_the_files_say_which_end_is_cut_and_a_request_may_say_otherwise(llm: LLM, folder: Path) -> None:
    (plain,) = llm.classify(LONG, use_tqdm=False)
    assert plain.prompt_token_ids == theirs(folder, LONG)
    assert (plain.truncated, plain.original_tokens) == (True, 42)
    for side in ("left", "right"):
        asked = PoolingParams(truncate_prompt_tokens=-1, truncation_side=side)
        (cut,) = llm.classify(LONG, pooling_params=asked, use_tqdm=False)
        assert cut.prompt_token_ids == theirs(folder, LONG, side=side)
    (pair,) = llm.score(LONG, OTHER, use_tqdm=False)
    assert pair.prompt_token_ids == theirs(folder, LONG, OTHER)
    # Of a text that is far too long only the end is read.
    (far,) = llm.classify("w80 " * 100_000 + LONG, use_tqdm=False)
    assert far.prompt_token_ids == theirs(folder, LONG)
    assert far.original_is_estimate


@pytest.mark.parametrize(
    ("path", "body", "side"),
    [
        ("/classify", {"input": LONG}, "left"),
        ("/classify", {"input": LONG, "truncate_prompt_tokens": -1}, "left"),
        ("/classify", {"input": LONG, "truncate_prompt_tokens": -1, "truncation_side": "right"}, "right"),
        ("/predict", {"inputs": LONG, "truncate": True}, "left"),
        ("/predict", {"inputs": LONG, "truncate": True, "truncation_direction": "Right"}, "right"),
        ("/predict", {"inputs": LONG, "truncate": True, "truncation_direction": "Left"}, "left"),
    ],
)
def test_the_side_holds_over_http(llm: LLM, folder: Path, path: str, body: dict[str, Any], side: str) -> None:
    http = TestClient(create_app([llm.engine]))
    answered = http.post(path, json=body).json()
    found = answered["data"][0]["probs"][0] if "data" in answered else answered[0]["score"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    ids = torch.tensor([theirs(folder, LONG, side=side)])
    with torch.no_grad():
        assert found == pytest.approx(float(torch.sigmoid(model(ids).logits)), abs=1e-5)


def test_special_tokens_in_texts_are_split_where_the_files_say_so(tmp_path: Path) -> None:
    tokenizer(tmp_path)
    save(tmp_path, "BertModel", "BertConfig", LAYERS)
    text = "w1 [SEP] w2[CLS]"
    for split in (True, False):
        edit(tmp_path / "tokenizer_config.json", split_special_tokens=split)
        expected = transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
        with LLM(str(tmp_path)) as llm:
            assert llm.embed(text, use_tqdm=False)[0].prompt_token_ids == expected
            http = TestClient(create_app([llm.engine]))
            assert http.post("/tokenize", json={"prompt": text}).json()["tokens"] == expected


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
def test_a_note_says_where_the_files_contradict_each_other_about_ends(key: str, wanted: bool, tmp_path: Path) -> None:
    from tokenizers import processors

    made = tokenizer(tmp_path, "decoder")
    # [CLS] stands before each text, nothing behind it.
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 0)])
    made.save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", bos_token="[CLS]", eos_token="[SEP]", **{key: wanted})
    save(tmp_path, "BertModel", "BertConfig", LAYERS)
    with LLM(str(tmp_path)) as llm:
        notes = [note for note in llm.model.facts.notes if key in note]
        ids = llm.embed("w1", use_tqdm=False)[0].prompt_token_ids
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path)("w1")["input_ids"]
    assert len(notes) == ((key == "add_bos_token") != wanted)
    assert all(f"{key}: {str(wanted).lower()}, but the post-processor of tokenizer.json puts" in note for note in notes)


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Camembert", "MPNet", "Data2VecText"])
def test_padding_that_a_text_writes_is_not_counted_in_positions(name: str, tmp_path: Path) -> None:
    made = tokenizer(tmp_path, "roberta")
    model = save(tmp_path, f"{name}Model", f"{name}Config", LAYERS)
    texts = ["w1 [PAD] w2 w3 [PAD] [PAD] w4", "w5 w6", "[PAD] w7"]
    with LLM(str(tmp_path), pooler_config={"pooling_type": "MEAN"}) as llm:
        asked = PoolingParams(use_activation=False)
        found = llm.embed_array(texts, pooling_params=asked, use_tqdm=False)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([made(text)["input_ids"]])).last_hidden_state[0].mean(0)
        assert vector == pytest.approx(expected.numpy(), abs=1e-4)


def test_the_embedded_model_is_tokenised_without_transformers() -> None:
    code = (
        "import sys; from poolhouse.inputs.tokenizer import Tokenizer; "
        "from poolhouse.models.files.hub import embedded_model; Tokenizer.from_folder(embedded_model()); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
