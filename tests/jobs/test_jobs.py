"""Jobs over real files with tiny models: every row once, with the answers of `LLM`, whatever stops the job."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from poolhouse import LLM, ConfigError, PoolingParams
from poolhouse.jobs.job import Job, input_files, parse_tasks
from poolhouse.jobs.run import Progress, TooManyErrors, estimate, run
from poolhouse.jobs.source import Place, Source
from tests.models import tiny_gliclass, tiny_gliner
from tests.models.tiny import LAYERS, WORDS, save, save_m3, tokenizer

# Sums of a pack come in another order than those of one text, in float32.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder")
    tokenizer(folder)
    save(folder, "BertModel", "BertConfig", LAYERS)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder)) as opened:
        yield opened


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("m3")
    save_m3(folder)
    with LLM(str(folder)) as opened:
        yield opened


class Kept(LLM):
    """A model that stays open when a job is done with it."""

    def __init__(self, llm: LLM) -> None:
        self.__dict__.update(llm.__dict__)

    def close(self) -> None:
        pass


def go(job: Job, llm: LLM) -> Progress:
    return run(job, lambda: Kept(llm))


def words(number: int) -> str:
    return " ".join(WORDS[(number * 13 + place * 7) % 90] for place in range(1 + number % 9))


def texts(count: int) -> list[str]:
    return [words(number) for number in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as the file that its ending names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix in (".csv", ".tsv"):
        separator = "," if path.suffix == ".csv" else "\t"
        lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
        path.write_text("".join(f"{line}\n" for line in lines))
    else:
        path.write_text("".join(row["text"] + "\n" for row in rows))
    return str(path)


def made(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"id": number, "text": words(number), "views": number * 10} for number in range(first, first + count)]


def read(out: Path) -> list[dict[str, Any]]:
    """All rows of an output, in order."""
    rows: list[dict[str, Any]] = []
    for path in sorted(out.glob("part-*")):
        if path.suffix == ".parquet":
            rows += pq.read_table(path).to_pylist()
        else:
            rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def close(found: Any, expected: Any) -> bool:
    ours, theirs = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    return ours.shape == theirs.shape and bool((np.abs(ours - theirs) < TOLERANCE).all())


def errors(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "tsv", "txt"])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_each_row_of_each_kind_of_file_gets_the_vector_of_llm(ending: str, form: Any, llm: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / f"in.{ending}", made(60))
    named = {"id": "id", "keep": ("views",)} if ending != "txt" else {}
    progress = go(Job((name,), tmp_path / "out", form=form, shard_rows=25, **named), llm)  # type: ignore[arg-type]
    rows = read(tmp_path / "out")
    assert (progress.rows, progress.errors, len(rows)) == (60, 0, 60)
    assert close([row["embedding"] for row in rows], llm.embed_array(texts(60)))
    if ending == "txt":
        assert [(row["file"], row["row"]) for row in rows] == [(name, number) for number in range(1, 61)]
    else:
        of_text = ending in ("csv", "tsv")
        expected = [(str(n), str(n * 10)) if of_text else (n, n * 10) for n in range(60)]
        assert [(row["id"], row["views"]) for row in rows] == expected
    assert len(list((tmp_path / "out").glob(f"part-*.{form}"))) == 3


def test_folders_globs_and_several_files_are_read_in_order_each_once(tmp_path: Path, llm: LLM) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    first = write(tmp_path / "in" / "a.jsonl", made(5))
    second = write(tmp_path / "in" / "deep" / "b.parquet", made(5, 5))
    (tmp_path / "in" / "notes.md").write_text("not read")
    assert input_files([str(tmp_path / "in")], None, tmp_path / "out") == [first, second]
    assert input_files([str(tmp_path / "in" / "*.jsonl"), first], None, tmp_path / "out") == [first]
    # The output may lie in the folder that is read.
    job = Job((str(tmp_path / "in"),), tmp_path / "in" / "out", id="id", shard_rows=4)
    go(job, llm)
    assert [row["id"] for row in read(job.out)] == list(range(10))
    assert go(job, llm).new_rows == 0


def test_one_pass_answers_all_tasks_of_bge_m3(m3: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / "in.parquet", made(20))
    go(Job((name,), tmp_path / "out", tasks=("embed", "sparse", "tokens")), m3)
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[32]"
    assert "list<element: fixed_size_list<element: float>[24]>" in str(table.schema.field("token_embeddings").type)
    rows = table.to_pylist()
    assert close([row["embedding"] for row in rows], m3.embed_array(texts(20)))
    for row, tokens, vector in zip(rows, m3.embed_tokens(texts(20)), m3.embed_sparse(texts(20)), strict=True):
        assert close(row["token_embeddings"], tokens)
        assert row["sparse_indices"] == vector.outputs.indices
        assert close(row["sparse_values"], vector.outputs.values)


def test_classes_entities_and_scores(tmp_path: Path) -> None:
    name = write(tmp_path / "in.jsonl", [{**row, "query": words(row["id"] + 3)} for row in made(12)])
    for kind, config in (("one", {"num_labels": 1}), ("many", {"id2label": {0: "bad", 1: "good", 2: "odd"}})):
        tokenizer(tmp_path / kind)
        save(tmp_path / kind, "BertForSequenceClassification", "BertConfig", LAYERS, **config)
    tokenizer(tmp_path / "tokens")
    labels = {0: "O", 1: "B-PER", 2: "I-PER"}
    save(tmp_path / "tokens", "BertForTokenClassification", "BertConfig", LAYERS, id2label=labels)
    with LLM(str(tmp_path / "many")) as llm:
        go(Job((name,), tmp_path / "classes", tasks=("classify",)), llm)
        for row, output in zip(read(tmp_path / "classes"), llm.classify(texts(12)), strict=True):
            assert close(row["probabilities"], output.outputs.probs)
            assert row["label"] == output.outputs.label
    with LLM(str(tmp_path / "one")) as llm:
        go(Job((name,), tmp_path / "scores", tasks=("score",)), llm)
        queries = [words(number + 3) for number in range(12)]
        scores = [output.outputs.score for output in llm.score(queries, texts(12))]
        assert close([row["score"] for row in read(tmp_path / "scores")], scores)
    with LLM(str(tmp_path / "tokens")) as llm:
        go(Job((name,), tmp_path / "entities", tasks=parse_tasks(["ner"])), llm)
        found = [row["entities"] for row in read(tmp_path / "entities")]
        expected = [output.outputs.entities for output in llm.token_classify(texts(12))]
        assert any(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert [(one["label"], one["start"], one["end"], one["text"]) for one in ours] == [
                (one.label, one.start, one.end, one.text) for one in theirs
            ]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float16", "halffloat"), ("int8", "int8"), ("ubinary", "uint8"), ("bfloat16", "uint16")]
)
def test_vectors_of_every_precision_and_length(precision: Any, dtype: str, llm: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / "in.txt", made(9))
    with LLM(str(llm.model.facts.path), matryoshka_dimensions=[16, 32]) as cut:
        go(Job((name,), tmp_path / "out", precision=precision, dimensions=16), cut)
        expected = cut.embed_array(texts(9), pooling_params=PoolingParams(dimensions=16), precision=precision)
    column = pq.read_table(tmp_path / "out" / "part-00000.parquet")["embedding"]
    assert str(column.type.value_type) == dtype
    assert np.array_equal(np.array([np.array(row, expected.dtype) for row in column.to_pylist()]), expected)


def test_npy_shards_are_memory_maps(llm: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / "in.txt", made(50))
    go(Job((name,), tmp_path / "out", form="npy", shard_rows=20), llm)
    parts = [np.load(path, mmap_mode="r") for path in sorted((tmp_path / "out").glob("part-*.npy"))]
    assert [len(part) for part in parts] == [20, 20, 10]
    assert close(np.concatenate(parts), llm.embed_array(texts(50)))


def test_rows_that_cannot_be_answered_are_set_aside_and_all_others_written(llm: LLM, tmp_path: Path) -> None:
    lines = [json.dumps(row).encode() for row in made(30)]
    lines[3] = b"{broken"
    lines[5] = b'{"id": 5, "views": 1}'
    lines[7] = b'{"id": 7, "text": null, "views": 1}'
    lines[9] = json.dumps({"id": 9, "text": words(1) * 200, "views": 1}).encode()
    lines[11] = b'{"id": 11, "text": "w1", "views": "many"}'
    lines[13] = b'{"id": 13, "text": "\xff", "views": 1}'
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    job = Job((str(path),), tmp_path / "out", id="id", keep=("views",), shard_rows=8)
    progress = go(job, llm)
    left_out = {3, 5, 7, 9, 11, 13}
    assert (progress.rows, progress.errors) == (24, 6)
    assert [row["id"] for row in read(job.out)] == [number for number in range(30) if number not in left_out]
    said = {error["row"] - 1: error["reason"] for error in errors(job.out)}
    assert set(said) == left_out
    assert {error["file"] for error in errors(job.out)} == {str(path)}
    assert "not JSON" in said[3]
    assert said[5] == "there is no field 'text'; fields: id, views"
    assert said[7] == "'text' is no text but None"
    assert "maximum context length" in said[9]
    assert said[11] == "'views' is 'many', where rows before it have int64"
    manifest = json.loads((job.out / "manifest.json").read_text())
    assert (manifest["rows"], manifest["errors"]) == (24, 6)
    for file in manifest["files"]:
        assert hashlib.sha256((job.out / file["file"]).read_bytes()).hexdigest() == file["sha256"]


def test_broken_rows_of_tables(llm: LLM, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'id,text\n1,w1\n2,w2,w3\n3,"w4\nw5"\n4,\xff\n5,w6\n')
    job = Job((str(path),), tmp_path / "out", id="id")
    go(job, llm)
    assert [row["id"] for row in read(job.out)] == ["1", "3", "5"]
    assert [(error["row"], error["reason"]) for error in errors(job.out)] == [
        (3, "the row has 3 cells, and the first line 2"),
        (6, "the row is not UTF-8"),
    ]


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_several_sizes_come_from_one_pass(form: Any, precision: Any, llm: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / "in.jsonl", made(30))
    with LLM(str(llm.model.facts.path), matryoshka_dimensions=[8, 16, 32]) as cut:
        passes = 0
        observed = cut.engine.submit

        def counted(requests: Any, *rest: Any) -> Any:
            nonlocal passes
            passes += len(requests)
            return observed(requests, *rest)

        cut.engine.submit = counted  # type: ignore[method-assign]
        job = Job((name,), tmp_path / "out", form=form, precision=precision, dimensions=(16, 32, 8), id="id")
        go(job, cut)
        assert passes == 30
        rows = read(job.out)
        assert list(rows[0]) == ["id", "embedding_16", "embedding_32", "embedding_8", "truncated"]
        for size in (8, 16, 32):
            params = PoolingParams(dimensions=size)
            for number in (0, 7, 29):
                # One by one.
                (expected,) = cut.embed_array([words(number)], pooling_params=params, precision=precision)
                found = np.asarray(rows[number][f"embedding_{size}"])
                # A number on the edge of a step may fall to either side of it.
                assert np.abs(found - np.asarray(expected, np.float64)).max() <= (1 if precision == "int8" else 1e-5)


def test_sizes_of_vectors_that_are_not_of_unit_length_are_only_cut(llm: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / "in.jsonl", made(9))
    options: dict[str, Any] = {"matryoshka_dimensions": [8, 32], "pooler_config": {"use_activation": False}}
    with LLM(str(llm.model.facts.path), **options) as cut:
        job = Job((name,), tmp_path / "out", tasks=("embed", "tokens"), dimensions=(32, 8), id="id", form="jsonl")
        go(job, cut)
        rows = read(job.out)
        for size in (8, 32):
            params = PoolingParams(dimensions=size)
            expected = cut.embed_array(texts(9), pooling_params=params)
            assert close([row[f"embedding_{size}"] for row in rows], expected)
            tokens = cut.encode(texts(9), pooling_task="token_embed", pooling_params=params)
            for row, output in zip(rows, tokens, strict=True):
                assert close(row[f"token_embeddings_{size}"], output.outputs.data)


def test_too_many_errors_stop_a_job_that_can_go_on(llm: LLM, tmp_path: Path) -> None:
    rows = [{**row, "text": None if row["id"] % 5 == 0 else row["text"]} for row in made(40)]
    name = write(tmp_path / "in.jsonl", rows)
    job = Job((name,), tmp_path / "out", id="id", shard_rows=10, max_errors=3)
    with pytest.raises(TooManyErrors, match=r"4 rows had to be set aside, 3 may be .*'text' is no text but None"):
        go(job, llm)
    assert len(errors(job.out)) == 4
    assert not (job.out / "manifest.json").exists()
    progress = go(replace(job, max_errors=8), llm)
    assert (progress.errors, progress.rows, progress.continued) == (8, 32, True)
    assert [row["id"] for row in read(job.out)] == [number for number in range(40) if number % 5]


# Loads the model once; each child of it runs the job, until it is killed at a random moment.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from poolhouse import LLM
from poolhouse.jobs.job import Job
from poolhouse.jobs.run import run
from poolhouse.jobs.source import Source

folder, source, out, most = sys.argv[1:]
llm = LLM(folder)
llm.embed(["w1 w2"])
job = Job((source,), Path(out), id="id", keep=("views",), shard_rows=150)
chance = random.Random(7)
kills = ends = 0
while kills < int(most):
    child = os.fork()
    if not child:
        try:
            run(job, lambda: llm)
        finally:
            os._exit(0 if (Path(out) / "manifest.json").exists() else 1)
    time.sleep(chance.uniform(0.0, 0.25))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    kills += os.WIFSIGNALED(status)
    if (Path(out) / "manifest.json").exists():
        ends += 1
        break
run(job, lambda: llm)
print(kills, ends)
"""


@pytest.mark.parametrize(("ending", "most"), [("parquet", 20), ("jsonl", 5), ("csv", 5)])
def test_a_job_that_is_killed_at_any_moment_has_every_row_once(
    ending: str, most: int, folder: Path, llm: LLM, tmp_path: Path
) -> None:
    count = 12_000
    name = write(tmp_path / f"in.{ending}", made(count))
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(folder), name, str(out), str(most)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    kills, ends = map(int, done.stdout.split())
    assert kills == most or ends
    rows = read(out)
    assert [int(row["id"]) for row in rows] == list(range(count))
    sample = range(0, count, 997)
    assert close([rows[number]["embedding"] for number in sample], llm.embed_array([words(n) for n in sample]))
    assert not list(out.glob(".part-*"))


def test_a_journal_that_is_torn_anywhere_loses_and_repeats_nothing(llm: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / "in.parquet", made(64))
    job = Job((name,), tmp_path / "out", id="id", shard_rows=8)
    go(job, llm)
    whole = (job.out / "journal.jsonl").read_bytes()
    for cut in range(0, len(whole), 37):
        (job.out / "journal.jsonl").write_bytes(whole[:cut])
        (job.out / "manifest.json").unlink()
        go(job, llm)
        assert [row["id"] for row in read(job.out)] == list(range(64)), cut


def test_a_full_disk_stops_a_job_that_goes_on_when_there_is_room(folder: Path, tmp_path: Path) -> None:
    name = write(tmp_path / "in.jsonl", made(3000))
    out = tmp_path / "out"
    # No file may be larger than this: a write beyond it fails as on a full disk.
    limited = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    limited += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    start = "import sys; from poolhouse.cli import main; main()"
    arguments = ["run", name, "--out", str(out), "--model", str(folder), "--format", "jsonl", "--shard-rows", "1000"]
    done = subprocess.run(
        [sys.executable, "-c", limited + start, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", start, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [row["row"] for row in read(out)] == list(range(1, 3001))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_folder_that_vanishes_is_what_the_error_says(llm: LLM, tmp_path: Path, form: str) -> None:
    name = write(tmp_path / "in.jsonl", made(3000))
    job = Job((name,), tmp_path / "out", form=form, shard_rows=1000)

    def remove(_: object) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    with pytest.raises(OSError, match="part-0000"):
        run(job, lambda: Kept(llm), remove)


def test_a_job_goes_on_with_the_same_words_only(llm: LLM, m3: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / "in.jsonl", made(20))
    job = Job((name,), tmp_path / "out")
    go(job, llm)
    with pytest.raises(ConfigError, match="other options: precision was 'float32', now 'float16'"):
        go(replace(job, precision="float16"), llm)
    with pytest.raises(ConfigError, match="other options: files was"):
        go(job, m3)
    assert go(replace(job, options={"max_num_batched_tokens": 64}), llm).new_rows == 0
    write(tmp_path / "in.jsonl", made(21))
    with pytest.raises(ConfigError, match=r"in.jsonl has changed since the job"):
        go(job, llm)
    (tmp_path / "in.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"There is no file .*in.jsonl"):
        go(job, llm)
    write(tmp_path / "in.jsonl", made(2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        go(Job((name,), tmp_path / "other"), llm)


def test_entities_of_labels_are_found_in_whole_files(tmp_path: Path) -> None:
    tiny_gliner.save(tmp_path / "finder", "spans")
    said = [" ".join(["the bank of england", "person", "new york"][: 1 + number % 3]) for number in range(20)]
    name = write(tmp_path / "in.jsonl", [{"id": number, "text": text} for number, text in enumerate([*said, ""])])
    with LLM(str(tmp_path / "finder")) as llm:
        job = Job((name,), tmp_path / "out", tasks=("entities",), labels=("person", "location"), threshold=0.3)
        go(job, llm)
        expected = llm.extract([*said, ""], ["person", "location"], threshold=0.3, use_tqdm=False)
        found = [row["entities"] for row in read(job.out)]
        assert [[part["text"] for part in own] for own in found] == [
            [part.text for part in one.outputs.entities] for one in expected
        ]
        assert any(found)
        with pytest.raises(ConfigError, match="--labels names"):
            go(replace(job, out=tmp_path / "none", labels=()), llm)
        with pytest.raises(ConfigError, match="threshold must be a number from 0 to 1"):
            go(replace(job, out=tmp_path / "none", threshold=2.0), llm)
        # What the model cannot do begins no job.
        assert not (tmp_path / "none").exists()
        with pytest.raises(ConfigError, match="with other options"):
            go(replace(job, threshold=0.4), llm)
    with pytest.raises(ConfigError, match="--labels is for --task entities or --task classify, each alone"):
        Job((name,), tmp_path / "none", labels=("person",))
    with pytest.raises(ConfigError, match="--multi-label is for --labels"):
        Job((name,), tmp_path / "none", tasks=("classify",), multi_label=True)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", ["reads labels", "entailment"])
def test_whole_files_are_classified_by_labels(kind: str, multi_label: bool, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    if kind == "reads labels":
        tiny_gliclass.save(model, "bert, labels by their tokens")
        said, labels = [f"w{number} w{number + 1}" for number in range(20)], ("w3", "w4 w5", "w6")
    else:
        tokenizer(model)
        names = {0: "contradiction", 1: "entailment"}
        save(model, "BertForSequenceClassification", "BertConfig", LAYERS, id2label=names)
        said, labels = texts(20), ("red", "green", "blue")
    name = write(tmp_path / "in.jsonl", [{"text": text} for text in (*said[:7], 5, *said[7:])])
    with LLM(str(model)) as llm:
        job = Job((name,), tmp_path / "out", tasks=("classify",), labels=labels, multi_label=multi_label, shard_rows=9)
        progress = go(job, llm)
        expected = llm.classify(said, labels=list(labels), multi_label=multi_label, use_tqdm=False)
        rows = read(job.out)
        assert (progress.rows, progress.errors) == (20, 1)
        assert [row["label"] for row in rows] == [one.outputs.label for one in expected]
        np.testing.assert_allclose(
            [row["probabilities"] for row in rows], [one.outputs.probs for one in expected], atol=1e-6
        )
        with pytest.raises(ConfigError, match="--labels: labels has 'a' twice"):
            go(replace(job, out=tmp_path / "none", labels=("a", "a")), llm)
        if kind == "reads labels":
            with pytest.raises(ConfigError, match="This model classifies by what --labels names"):
                go(replace(job, out=tmp_path / "none", labels=(), multi_label=False), llm)
        assert not (tmp_path / "none").exists()


def test_one_process_at_a_time_writes_to_a_folder(llm: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / "in.jsonl", made(20))
    job = Job((name,), tmp_path / "out")
    seen: list[str] = []

    def second(_: Progress) -> None:
        if not seen:
            with pytest.raises(ConfigError) as caught:
                go(job, llm)
            seen.append(str(caught.value))

    run(job, lambda: Kept(llm), second)
    assert seen == [f"Another process writes to {job.out}."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "txt"}, "has no column 'txt'; it has: id, text, views. Did you mean 'text'"),
        ({"keep": ("vews",)}, "has no column 'vews'"),
        ({"tasks": ("sparse",)}, "--task sparse: This model has no sparse vectors"),
        ({"tasks": ("classify",)}, "--task classify: this model does not do that. Its tasks: embed, token_embed"),
        ({"image_column": "text"}, "reads texts alone, no pictures"),
        ({"precision": "int8", "tasks": ("tokens",), "form": "npy"}, "--format npy is for --task embed alone"),
        ({"dimensions": 7}, "--dimensions"),
        ({"dimensions": (32, 7)}, "--dimensions"),
        ({"dimensions": (8, 8)}, "--dimensions are different numbers from 1, got 8, 8"),
        ({"dimensions": (8, 0)}, "--dimensions are different numbers from 1"),
        ({"dimensions": (16, 8), "form": "npy"}, "--format npy holds one matrix per file"),
        ({"instruction": "x"}, "--instruction is for --task score"),
        ({"inputs": ("nowhere.parquet",)}, "There is no file nowhere.parquet"),
        ({"tasks": ()}, "--task names each task once"),
        ({"tasks": ("score", "embed")}, "stands alone"),
    ],
)
def test_a_job_that_cannot_be_is_refused_in_words(
    change: dict[str, Any], message: str, llm: LLM, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"inputs": (write(tmp_path / "in.parquet", made(3)),), "out": tmp_path / "out"}
    with pytest.raises(Exception, match=message.replace("(", r"\(").replace("[", r"\[")):
        go(Job(**values | change), llm)
    assert not list(tmp_path.glob("out/part-*"))


def test_pages_and_pictures_of_a_column(tmp_path: Path) -> None:
    from PIL import Image

    from poolhouse.bench.made_up import write_colqwen3

    path = tmp_path / "red.png"
    Image.new("RGB", (64, 48), "red").save(path)
    rows = [
        {"id": 0, "picture": {"bytes": path.read_bytes(), "path": None}},
        {"id": 1, "picture": {"bytes": None, "path": str(path)}},
        {"id": 2, "picture": {"bytes": b"not a picture", "path": None}},
        {"id": 3, "picture": None},
    ]
    name = write(tmp_path / "in.parquet", rows)
    job = Job((name,), tmp_path / "out", tasks=("tokens",), image_column="picture", id="id")
    with LLM(str(write_colqwen3(tmp_path / "model"))) as llm:
        go(job, llm)
        content: Any = {"content": [{"type": "image", "image": str(path)}]}
        (expected,) = llm.embed_tokens([content])
    found = read(job.out)
    assert [row["id"] for row in found] == [0, 1]
    for row in found:
        assert close(row["token_embeddings"], expected)
    assert [error["row"] for error in errors(job.out)] == [3, 4]


def test_an_estimate_counts_rows_and_tokens_and_writes_nothing(llm: LLM, tmp_path: Path) -> None:
    name = write(tmp_path / "in.parquet", made(5000))
    found = estimate(Job((name,), tmp_path / "out"), lambda: Kept(llm))
    assert found.rows is not None
    assert abs(found.rows - 5000) < 100
    assert found.tokens_per_row == pytest.approx(7, abs=0.1)
    assert found.hours is not None
    assert not (tmp_path / "out").exists()


def test_reading_goes_on_from_any_place(tmp_path: Path) -> None:
    for ending in ("parquet", "jsonl", "csv", "txt"):
        files = [write(tmp_path / f"{part}.{ending}", made(20, part * 20)) for part in range(2)]
        source = Source(files, ["text"], None)
        rows = list(source.rows(Place()))
        assert [row.values["text"] for row in rows] == texts(40)
        for number, row in enumerate(rows):
            rest = list(source.rows(row.after))
            assert [one.values["text"] for one in rest] == texts(40)[number + 1 :], (ending, number)
            share = source.share(row.after)
            assert share is not None
            assert 0 < share <= 1


def test_memory_does_not_grow_with_the_input(folder: Path, tmp_path: Path) -> None:
    # Rows of 2 KB: were they kept, the second job would take 40 MB more than the first.
    script = """
import resource, sys
from pathlib import Path
from poolhouse import LLM
from poolhouse.jobs.job import Job
from poolhouse.jobs.run import run
llm = LLM(sys.argv[1], overflow="truncate", max_model_len=16)
peaks = []
for name in sys.argv[2:]:
    run(Job((name,), Path(name + ".out"), shard_rows=4000), lambda: type("Kept", (), {
        "engine": llm.engine, "model": llm.model, "__enter__": lambda s: s, "__exit__": lambda *_: None})())
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(*peaks)
"""
    line = "w1 " * 670 + "\n"
    names = []
    for count in (4_000, 24_000):
        path = tmp_path / f"{count}.txt"
        path.write_text(line * count)
        names.append(str(path))
    command = [sys.executable, "-c", script, str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    assert large - small < 20
