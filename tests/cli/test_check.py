"""The verdict of `check`, its exit status, and its JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poolhouse import kernels
from poolhouse.cli import check
from poolhouse.cli.check import Golden
from tests.checkpoints import save_checkpoint
from tests.cli.in_process import Run, said
from tests.models.test_colqwen3 import DESCRIBED, END, LAYOUTS, made

__all__ = ["said"]


def test_a_model_that_answers_is_well_and_what_it_was_not_compared_with_is_said(said: Run, model: str) -> None:
    done = said("check", model)
    assert done.status == 0
    words = "OK: the model loads and answers. It was compared with nothing: the checkpoint has no modules.json"
    assert done.out.decode().splitlines()[-1].startswith(words)
    asked = said("check", model, "--no-reference")
    assert (asked.status, asked.out.decode().splitlines()[-1]) == (
        0, "OK: the model loads and answers. It was compared with nothing: --no-reference was asked for.",
    )  # fmt: skip


def test_json_tells_what_the_table_tells(said: Run, model: str) -> None:
    done = said("check", model, "--json")
    told = json.loads(done.out)
    assert (done.status, told["ok"], told["comparisons"]) == (0, True, [])
    assert told["verdict"].startswith("OK: ")
    assert "modules.json" in told["not_compared"]
    assert (told["model"], told["width"], told["dtype"], told["device"]) == (str(model), 32, "float32", "cpu")
    assert told["compiled_kernels"] == (kernels.level() or "none")
    assert list(told["tasks"]) == ["embed", "token_embed"]
    assert isinstance(told["notes"], list)
    assert (told["decision"]["runner"], told["decision"]["pooling"]) == ("native family bert", "CLS (its family)")
    table = said("check", model).out.decode()
    for words in (
        told["served_by"],
        told["architecture"],
        f"{told['parameters']:,}",
        *told["tasks"].values(),
        *told["notes"],
        told["decision"]["pooling"],
    ):
        assert words in table


def test_the_prompts_around_pictures_are_told(said: Run, tmp_path: Path) -> None:
    made(LAYOUTS["ops"], tmp_path)
    done = said("check", tmp_path, "--json")
    told = json.loads(done.out)
    assert (done.status, told["decision"]["pictures"]) == (0, "ColQwen3 of OpenSearch-AI")
    assert told["a_query_becomes"] == f"Query: QUERY{END * 10}"
    assert told["a_picture_becomes"] == DESCRIBED.replace(END, f"<|im_start|>assistant\n{END}")
    assert "a query becomes:" in said("check", tmp_path).out.decode()


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_difference_is_a_verdict_and_a_status(
    options: tuple[str, ...], said: Run, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = (Golden(2.0, "one", "two", "dense"),)
    monkeypatch.setitem(check.GOLDEN, str(model), values)  # type: ignore[arg-type]
    done = said("check", model, *options)
    words = "The answers differ from published numbers. Against 1 published numbers: largest difference"
    assert done.status == 1
    assert words in done.error
    if options:
        told = json.loads(done.out)
        assert (told["ok"], told["comparisons"][0]["close"], told["comparisons"][0]["with"]) == (
            False,
            False,
            "published numbers",
        )
        assert words in told["verdict"]
    else:
        assert words in done.out.decode().splitlines()[-1]
        assert "OK" not in done.out.decode()


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_answers_that_are_no_numbers_are_not_well(options: tuple[str, ...], said: Run, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece")
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embeddings.LayerNorm.weight"))
    save_file(
        tensors | {name: torch.full_like(tensors[name], torch.nan)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    done = said("check", tmp_path, "--no-reference", *options)
    assert done.status == 1
    assert "NaN" in done.error
    if options:
        assert json.loads(done.out)["ok"] is False


def test_a_model_that_does_not_load_is_not_well(said: Run) -> None:
    done = said("check", "/no/such", "--json")
    assert (done.status, json.loads(done.out)["ok"]) == (1, False)
    assert "/no/such does not exist" in json.loads(done.out)["verdict"]


def test_a_reference_that_cannot_be_run_is_said(said: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("not today\nnor tomorrow")

    monkeypatch.setattr(check, "_compare_vectors", fails)
    done = said("check")
    assert done.status == 0
    last = done.out.decode().splitlines()[-1]
    assert last.endswith(
        "compared with nothing: sentence-transformers cannot run it: RuntimeError: not today nor tomorrow"
    )


@pytest.mark.parametrize(
    ("ending", "options", "words"),
    [
        ("Model", ("--hf-overrides", "{}"), r"on \d+ texts: lowest cosine 0\.99\d+, mean 0\.99\d+"),
        ("ForSequenceClassification", (), r"on 48 pairs: largest difference of a score 0\.\d+, mean 0\.\d+"),
        ("ForTokenClassification", (), r"on \d+ texts: largest difference of a score 0\.\d+, mean 0\.\d+"),
        (
            "Model",
            ("--pooler-config", '{"task": "token_embed"}'),
            r"on \d+ tokens of \d+ texts: lowest cosine 0\.9\d+, mean 0\.99\d+",
        ),
    ],
)
def test_int8_is_compared_with_float32(
    ending: str, options: tuple[str, ...], words: str, said: Run, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece", ending)
    done = said("check", tmp_path, "--quantization", "int8", *options)
    lines = done.out.decode().splitlines()
    assert done.status == 0
    assert re.search(f"^Int8 against float32 {words}\\.$", done.out.decode(), re.MULTILINE), lines
    assert lines[-1] == "OK: the model loads, and answers as float32."
    assert any(line.startswith("quantization:") for line in lines)
    assert "Int8 products are computed by" in " ".join(done.out.decode().split())


def test_int8_that_is_far_from_float32_is_a_verdict(said: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_LEAST_INT8_COSINE", 0.999999)
    done = said("check", model, "--quantization", "int8")
    assert done.status == 1
    assert "The answers differ from float32. Int8 against float32 on" in done.error
    # Nothing is compared where that was asked for.
    assert said("check", model, "--quantization", "int8", "--no-reference").status == 0


def test_a_quantisation_that_is_not_there_is_named_as_typed(said: Run, model: str) -> None:
    done = said("check", model, "--quantization", "int4")
    assert (done.status, done.error.count("--quantization: possible are none, 'int8'")) == (2, 1)
    done = said("check", model, "--quantization", "int8", "--dtype", "bfloat16")
    assert "--dtype bfloat16 beside --quantization int8" in done.error
