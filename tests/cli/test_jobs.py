"""`poolhouse run`, and `poolhouse embed` into a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from poolhouse import LLM
from tests.cli.in_process import Run, said

__all__ = ["said"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": n, "text": f"text {n}"}) + "\n" for n in range(9)))
    return tmp_path


def test_embed_with_a_folder_for_its_output_is_a_job(place: Path, model: str, said: Run) -> None:
    done = said("embed", "in.jsonl", "--out", "vectors", "--model", model, "--id", "id")
    assert (done.status, done.out.decode().splitlines()[-1].startswith("vectors: 9 rows, 100%, ")) == (0, True), done
    table = pq.read_table("vectors/part-00000.parquet")
    assert table["id"].to_pylist() == list(range(9))
    with LLM(model) as llm:
        expected = llm.embed_array([f"text {n}" for n in range(9)])
    assert np.abs(np.array(table["embedding"].to_pylist(), np.float32) - expected).max() < 1e-5
    again = said("run", "in.jsonl", "--out=vectors", "--model", model, "--id", "id")
    assert again.out.decode().splitlines()[-1] == "vectors: 9 rows were written before; nothing was left to do."


def test_standard_input_is_read_as_lines_and_a_job_of_it_goes_on(place: Path, model: str, said: Run) -> None:
    options = ("--out", "v", "--model", model, "--format", "jsonl", "--shard-rows", "2")
    done = said("run", "-", *options, stdin=b"one\ntwo\n\nfour\n")
    assert done.status == 0, done
    rows = [json.loads(line) for path in sorted(Path("v").glob("part*")) for line in path.read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in rows] == [("-", 1), ("-", 2), ("-", 3), ("-", 4)]
    # As if it had been killed behind its first file.
    journal = Path("v/journal.jsonl").read_text().splitlines(keepends=True)
    Path("v/journal.jsonl").write_text("".join(journal[:3]))
    Path("v/manifest.json").unlink()
    done = said("run", "-", *options, stdin=b"one\ntwo\n\nfour\n")
    assert "Going on behind 2 rows that are written." in done.error
    again = [json.loads(line) for path in sorted(Path("v").glob("part*")) for line in path.read_text().splitlines()]
    assert [row["row"] for row in again] == [1, 2, 3, 4]


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_a_job_is_a_file_that_the_line_may_change(ending: str, place: Path, model: str, said: Run) -> None:
    job = {
        "inputs": ["in.jsonl"],
        "out": "a",
        "model": model,
        "task": "embed,tokens",
        "keep": ["id"],
        "overflow": "truncate",
    }
    # JSON is YAML too.
    Path(f"job.{ending}").write_text(json.dumps({name.replace("_", "-"): value for name, value in job.items()}))
    done = said("run", f"job.{ending}", "--out", "b", "--precision", "float16")
    assert done.status == 0, done
    table = pq.read_table("b/part-00000.parquet")
    assert {"id", "embedding", "token_embeddings"} <= set(table.column_names)
    assert str(table["embedding"].type.value_type) == "halffloat"
    assert not Path("a").exists()


def test_rows_set_aside_decide_the_status(place: Path, model: str, said: Run) -> None:
    with Path("in.jsonl").open("a") as stream:
        stream.write("broken\n" * 2)
    done = said("run", "in.jsonl", "--out", "a", "--model", model)
    assert done.status == 2
    assert "2 rows were set aside, see a/errors.jsonl; all others are written." in done.error
    assert pq.read_table("a/part-00000.parquet").num_rows == 9
    assert said("run", "in.jsonl", "--out", "b", "--model", model, "--max-errors", "2").status == 0
    done = said("run", "in.jsonl", "--out", "c", "--model", model, "--max-errors", "1")
    assert (done.status, "2 rows had to be set aside, 1 may be" in done.error) == (1, True), done


def test_a_dry_run_says_rows_tokens_and_time(place: Path, model: str, said: Run) -> None:
    done = said("run", "in.jsonl", "--out", "a", "--model", model, "--dry-run")
    first, second, third = done.out.decode().splitlines()[-3:]
    assert first.startswith("about 9 rows; ")
    assert second == "Of 9 rows that were tried, 0.0% are cut and 0.0% cannot be answered."
    assert "rows/s: " in third
    assert not Path("a").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl"], "A job needs --out DIR"),
        (["in.jsonl", "--out", "a", "--task", "embd"], "--task embd is not one of embed, sparse"),
        (["in.jsonl", "--out", "a", "--format", "csv"], "--format csv is not one of parquet, jsonl, npy."),
        (["in.jsonl", "--out", "a", "--input-format", "xml"], "--input-format xml is not one of lines, jsonl"),
        (["in.jsonl", "--out", "a", "--shard-rows", "0"], "--shard-rows and --shard-bytes are numbers from 1"),
        (["nothing.jsonl", "--out", "a"], "There is no file nothing.jsonl."),
        (["in.bin", "--out", "a"], "what it holds cannot be told from its ending"),
        (["in.jsonl", "--out", "in.jsonl"], "--out in.jsonl is no folder that can be made"),
        (["job.yaml", "--out", "a"], "job.yaml cannot be read"),
        (["list.yaml", "--out", "a"], "list.yaml is no job: it must hold options"),
        (["odd.yaml", "--out", "a"], "A job has no option 'colunm'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    arguments: list[str], message: str, place: Path, model: str, said: Run
) -> None:
    Path("in.bin").write_bytes(b"\0")
    Path("list.yaml").write_text("- a\n")
    Path("odd.yaml").write_text("inputs: in.jsonl\ncolunm: text\n")
    done = said("run", *arguments, "--model", model)
    assert done.status == 2
    assert message in done.error
    assert done.error.count("\n") == 1


def test_several_sizes_are_written_with_commas(place: Path, model: str, said: Run) -> None:
    words = ("run", "in.jsonl", "--model", model, "--matryoshka-dimensions", "8,32", "--format", "jsonl")
    done = said(*words, "--out", "a", "--dimensions", "32,8")
    assert done.status == 0, done
    row = json.loads(Path("a/part-00000.jsonl").read_text().splitlines()[0])
    assert (len(row["embedding_32"]), len(row["embedding_8"])) == (32, 8)
    done = said(*words, "--out", "b", "--dimensions", "8")
    assert len(json.loads(Path("b/part-00000.jsonl").read_text().splitlines()[0])["embedding"]) == 8
    done = said(*words, "--out", "c", "--dimensions", "8,x")
    assert (done.status, "--dimensions must be numbers, such as 256 or 256,64" in done.error) == (2, True)
