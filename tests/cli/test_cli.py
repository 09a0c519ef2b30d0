"""The commands, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from poolhouse import LLM, ConfigError, TokenEmbeddings
from poolhouse.data import passages
from poolhouse.models.files.hub import embedded_model
from poolhouse.settings import MEANINGLESS, ServerSettings, Settings
from poolhouse.vectors.precision import Calibration, quantize
from tests.checkpoints import save_checkpoint
from tests.cli.in_process import Run, RunText, run, said
from tests.models.tiny_rerankers import save

__all__ = ["run", "said"]


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "poolhouse.cli", *arguments],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
    )  # fmt: skip


def test_embed_writes_json_lines(tmp_path: Path) -> None:
    done = process("embed", "hello world", "another text")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["hello world", "another text"]
    with LLM() as llm:
        assert np.allclose(
            [line["embedding"] for line in lines], llm.embed_array(["hello world", "another text"]), atol=1e-6
        )
    assert "embedded default" in done.stderr


def test_embed_reads_standard_input_and_files_and_writes_numpy(tmp_path: Path, run: RunText) -> None:
    texts = "one\n\ntwo\n"
    (tmp_path / "texts.txt").write_text(texts)
    assert run("embed", "--format", "npy", "--output", str(tmp_path / "a.npy"), text=texts).returncode == 0
    assert run("embed", "-i", str(tmp_path / "texts.txt"), "-f", "npy", "-o", str(tmp_path / "b.npy")).returncode == 0
    first, second = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert first.shape == (3, 384)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("form", ["npz", "safetensors", "arrow"])
def test_embed_writes_the_vectors_of_tokens(form: str, tmp_path: Path, run: RunText) -> None:
    texts = ["one", "two words", "three short words"]
    path = tmp_path / f"tokens.{form}"
    options = ("--token-pooling-factor", "2", "--input-type", "document", "--precision", "float16")
    done = run("embed", "--tokens", "-f", form, "-o", str(path), *options, text="\n".join(texts))
    assert done.returncode == 0, done.stderr
    written = TokenEmbeddings.load(path)
    with LLM() as llm:
        expected = llm.embed_tokens(texts, token_pooling_factor=2, input_type="document", precision="float16")
    assert written.precision == "float16"
    assert np.array_equal(written.offsets, expected.offsets)
    assert np.allclose(written.floats(), expected.floats(), atol=1e-3)


def test_embed_options_reach_the_model(run: RunText) -> None:
    done = run(
        "embed", "x", "--matryoshka-dimensions", "64,128", "--dimensions", "64", "--pooler-config.pooling-type", "CLS"
    )
    assert len(json.loads(done.stdout)["embedding"]) == 64, done.stderr
    long = run("embed", "word " * 400, "--overflow", "truncate")
    assert json.loads(long.stdout)["truncated"] is True


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["embed", "x", "--model", "/no/such"], "/no/such", 1),
        (["embed", "x", "--format", "npy"], "needs --output", 2),
        (["embed", "x", "--tokens", "--format", "npz"], "needs --output", 2),
        (["embed", "x", "--tokens"], "--format jsonl is not for --tokens, which takes npz, safetensors, arrow", 2),
        (["embed", "x", "--format", "arrow"], "--format arrow is for --tokens", 2),
        (["embed", "x", "--token-pooling-factor", "2"], "--token-pooling-factor is for --tokens", 2),
        (["embed", "x", "--input-type", "query"], "--input-type is for --tokens", 2),
        (["embed", "--tokens", "-f", "npz", "-o", "/tmp/none.npz", "-i", "/dev/null"], "There is no text in", 2),
        (["embed", "x", "--precision", "bfloat16"], "JSON lines cannot hold bfloat16; use --format npy", 2),
        (["embed", "x", "--precision", "int4"], "--precision int4 is not one of float32", 1),
        (["embed", "x", "--int8-calibration", "/no/such"], "/no/such cannot be read as a calibration", 2),
        (["calibrate", "--input", "/no/such.txt"], "No such file", 1),
        (["embed", "--input", "/no/such.txt"], "No such file", 1),
        (["embed", "word " * 400], "maximum context length is 256 tokens", 1),
        (["embed", "x", "--hf-overrides", "{"], "--hf-overrides is not valid JSON", 2),
        (["embed", "x", "--dtype", "int3"], "--dtype int3 is not one of", 2),
        (["embed", "x", "--overflow", "wrap"], "--overflow: Input should be 'error', 'truncate' or 'chunk'", 2),
        (["check", "/no/such"], "/no/such", 1),
        (["serve", "--log-level", "loud"], "--log-level: Input should be 'critical', 'error'", 2),
        (["sing"], "No such command", 2),
    ],
)
def test_what_goes_wrong_is_one_clear_line(arguments: list[str], words: str, status: int, run: RunText) -> None:
    done = run(*arguments)
    assert words in done.stderr
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_calibrate_writes_the_ranges_that_embed_then_uses(tmp_path: Path, run: RunText) -> None:
    texts = passages()
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    ranges, vectors = tmp_path / "ranges.safetensors", tmp_path / "vectors.npy"
    done = run("calibrate", str(embedded_model()), "--input", str(tmp_path / "texts.txt"), "--output", str(ranges))
    assert done.returncode == 0, done.stderr
    assert f"384 ranges of {len(texts)} vectors. More than 1000 would show better" in done.stderr
    with LLM() as llm:
        expected = llm.embed_array(texts)
    calibration = Calibration.load(ranges)
    # One pack or several: the vectors of two runs differ in the last digits.
    assert np.allclose(calibration.minimum, expected.min(0), atol=1e-6)
    assert np.allclose(calibration.maximum, expected.max(0), atol=1e-6)
    options = ("--int8-calibration", str(ranges), "-f", "npy", "-o", str(vectors))
    done = run("embed", texts[0], "--precision", "uint8", *options)
    assert done.returncode == 0, done.stderr
    codes = np.load(vectors)
    assert codes.dtype == np.uint8
    assert np.abs(codes - quantize(expected[:1], "uint8", calibration).astype(int)).max() <= 1


def test_calibrate_cuts_vectors_as_asked_and_needs_texts(tmp_path: Path, run: RunText) -> None:
    options = ("--matryoshka-dimensions", "64", "--dimensions", "64", "-o", str(tmp_path / "ranges"))
    assert run("calibrate", *options, text="one\ntwo\n").returncode == 0
    assert Calibration.load(tmp_path / "ranges").width == 64
    done = run("calibrate", "-o", str(tmp_path / "none"), text="\n")
    assert done.returncode == 2
    assert "There is no text in standard input" in done.stderr
    assert not (tmp_path / "none").exists()


def test_embed_writes_whole_numbers_as_json_and_others_as_numpy(tmp_path: Path, run: RunText) -> None:
    done = run("embed", "hello world", "--precision", "binary")
    with LLM() as llm:
        expected = llm.embed_array("hello world", precision="binary")
    assert json.loads(done.stdout)["embedding"] == expected[0].tolist()
    done = run("embed", "hello world", "--precision", "float16", "-f", "npy", "-o", str(tmp_path / "a.npy"))
    assert np.load(tmp_path / "a.npy").dtype == np.float16


def test_embed_names_the_line_that_is_no_utf_8(said: Run) -> None:
    done = said("embed", stdin=b"fine\n\xff\n")
    assert "Line 2 of standard input is not UTF-8" in done.error
    assert (done.status, done.out) == (2, b"")


def test_embed_without_any_text_says_so(run: RunText) -> None:
    done = run("embed", text="")
    assert "There is no text in standard input" in done.stderr
    assert done.returncode == 2


def test_check_tells_facts_pipelines_and_the_distance_to_sentence_transformers(run: RunText) -> None:
    done = run("check")
    assert done.returncode == 0, done.stderr
    for words in ("native bert, packed", "mean > truncate > normalize", "256 tokens", "22,565,376"):
        assert words in done.stdout
    line = next(line for line in done.stdout.splitlines() if "lowest cosine" in line)
    assert float(line.split("cosine ")[1].split(",")[0]) > 0.99999
    assert done.stdout.splitlines()[-1] == "OK: the model loads, and answers as the reference, sentence-transformers."


def test_check_shows_what_a_reranker_was_taken_for_and_its_prompt(tmp_path: Path, run: RunText) -> None:
    save(tmp_path / "Qwen3-Reranker", "Qwen3")
    done = run("check", str(tmp_path / "Qwen3-Reranker"))
    assert done.returncode == 0, done.stderr
    for words in (
        "score template:",
        "qwen3_reranker",
        "<Query>: QUERY",
        "<Instruct>: Given a web search query",
        "Taken for Qwen3-Reranker by its name",
        "sentence-transformers does not know the prompt",
    ):
        assert words in done.stdout


def test_check_names_the_labels_of_a_token_classifier(tmp_path: Path, run: RunText) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece", "ForTokenClassification", id2label={0: "O", 1: "PERSON"})
    done = run("check", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"labels: +O, PERSON", done.stdout)


def test_check_fails_when_the_vectors_differ(run: RunText) -> None:
    done = run("check", "--pooler-config", '{"pooling_type": "MAX"}')
    assert done.returncode == 1
    assert "differ from the reference" in done.stderr


def test_check_names_a_tensor_that_nobody_claims(tmp_path: Path, run: RunText) -> None:
    for path in embedded_model().rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(embedded_model())
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"encoder.layer.0.extra.weight": tensors["pooler.dense.bias"].clone()}, tmp_path / "model.safetensors"
    )
    done = run("check", str(tmp_path))
    assert done.returncode == 1
    assert "encoder.layer.0.extra.weight" in done.stderr


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys; from poolhouse.cli.commands import commands\n"
        "try: commands()(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'starlette'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert "--matryoshka-dimensions" in process("serve", "--help").stdout


def test_options_of_vllm_that_mean_nothing_are_one_warning() -> None:
    with pytest.warns(UserWarning, match="are ignored: enforce_eager, gpu_memory_utilization") as caught:
        settings = Settings.parse(gpu_memory_utilization=0.5, enforce_eager=True, runner="pooling")
    assert len(caught) == 1
    assert settings.runner == "pooling"
    assert not MEANINGLESS & set(Settings.model_fields)


def test_settings_say_what_does_not_fit() -> None:
    for given, words in (
        ({"gpu_memory_utilisation": 1}, "There is no option 'gpu_memory_utilisation'"),
        ({"tokeniser": "x"}, "Did you mean 'tokenizer'"),
        ({"max_model_len": "many"}, "max_model_len: Input should be a valid integer"),
        ({"overflow": "wrap"}, "'error', 'truncate' or 'chunk'"),
    ):
        with pytest.raises(ConfigError, match=words):
            Settings.parse(**given)
    assert Settings.parse(model_impl="vllm").model_impl == "native"
    assert Settings.parse(renderer_num_workers=3).tokenizer_workers == 3
    assert Settings.parse(tokenizer_workers=3).tokenizer_workers == 3
    with pytest.raises(ConfigError, match="same option"):
        Settings.parse(tokenizer_workers=3, renderer_num_workers=3)
    assert Settings.parse(matryoshka_dimensions="64, 128").matryoshka_dimensions == (64, 128)
    assert Settings.parse(hf_token=True).hf_token is None
    assert Settings.parse(limit_mm_per_prompt={"image": 2, "video": {"count": 0}}).limit_mm_per_prompt == {
        "image": 2,
        "video": 0,
    }
    for wrong in ({"images": 2}, {"image": "2"}, {"image": -1}):
        with pytest.raises(ConfigError, match=r'limit_mm_per_prompt: write {"image": N}'):
            Settings.parse(limit_mm_per_prompt=wrong)
    assert Settings.parse(allowed_media_domains="a.test,b").allowed_media_domains == ("a.test", "b")
    with pytest.raises(ConfigError, match="port"):
        ServerSettings.parse(port=99999)
