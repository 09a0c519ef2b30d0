"""`poolhouse run-batch`: every line answered once, in order, whatever stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse import LLM
from tests.cli.in_process import Run, said

__all__ = ["said"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(number: int, url: str = "/v1/embeddings", **body: Any) -> str:
    body = body or {"input": f"text {number}"}
    return json.dumps({"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body}) + "\n"


def read(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_each_line_is_answered_in_order_by_any_route(place: Path, model: str, said: Run) -> None:
    texts = [f"text {number}" for number in range(40)]
    lines = [asked(number) for number in range(40)]
    lines += [
        asked(40, "/score", text_1="text 1", text_2=texts[:3]),
        asked(41, "/v2/rerank", query="text 1", documents=texts[:3]),
        asked(42, "/pooling", input="text 1", task="token_embed"),
        asked(43, "/embed", inputs=texts[:2]),
        asked(44, "/v1/embeddings", input="text 1", model="another"),
        "no json\n",
        "\n",
        asked(45, "/v1/chat/completions", messages=[{"role": "user", "content": "hello"}]),
    ]
    Path("in.jsonl").write_text("".join(lines))
    done = said("run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", model)
    assert done.status == 0, done
    assert done.out.decode().splitlines()[-1] == "out.jsonl: 47 requests, 44 answered, 3 refused."
    found = read("out.jsonl")
    assert [line["custom_id"] for line in found] == [*(f"id-{number}" for number in range(45)), None, "id-45"]
    assert [set(line) for line in found] == [{"id", "custom_id", "response", "error"}] * 47
    with LLM(model) as llm:
        expected = llm.embed_array(texts)
        score = llm.score("text 1", texts[:3])
    vectors = [line["response"]["body"]["data"][0]["embedding"] for line in found[:40]]
    assert np.abs(np.array(vectors) - expected).max() < 1e-5
    answers = [line["response"]["body"] for line in found[40:45]]
    scores = [one["score"] for one in answers[0]["data"]]
    assert scores == pytest.approx([one.outputs.score for one in score], abs=1e-5)
    assert sorted(one["index"] for one in answers[1]["results"]) == [0, 1, 2]
    assert np.abs(np.array(answers[3]) - expected[:2]).max() < 1e-5
    assert [line["response"] and line["response"]["status_code"] for line in found[44:]] == [404, None, 404]
    assert "another" in answers[4]["message"]
    assert found[45]["error"]["message"].startswith("Line 46: it is not valid JSON")
    assert sorted(path.name for path in place.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_pipes_are_read_and_written(place: Path, model: str, said: Run) -> None:
    done = said("run-batch", "-i", "-", "-o", "-", "--model", model, stdin=(asked(1) + asked(2)).encode())
    assert (done.status, done.error) == (0, "")
    assert [json.loads(line)["custom_id"] for line in done.out.splitlines()] == ["id-1", "id-2"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_lines_has_no_answers(content: bytes, place: Path, model: str, said: Run) -> None:
    Path("in.jsonl").write_bytes(content)
    done = said("run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", model)
    assert (done.status, done.out.decode()) == (0, "out.jsonl: 0 requests, 0 answered, 0 refused.\n")
    assert Path("out.jsonl").read_bytes() == b""


def test_a_line_that_is_too_long_is_passed_over(place: Path, model: str, said: Run) -> None:
    long = asked(2, input="x" * 300_000)
    Path("in.jsonl").write_text(asked(1) + long + asked(3) + long.strip())
    done = said("run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", model, "--max-body-bytes", "1000")
    assert done.status == 0
    found = read("out.jsonl")
    assert [line["custom_id"] for line in found] == ["id-1", None, "id-3", None]
    assert [line["error"]["code"] for line in found[1::2]] == ["line_too_long"] * 2
    assert [line["error"]["message"][:7] for line in found[1::2]] == ["Line 2:", "Line 4:"]


# Loads the model once; each child of it runs the batch, until it is killed at a random moment.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from poolhouse.cli import run_batch
from poolhouse.engine import open as opening
from poolhouse.settings import Settings

model, most = sys.argv[1:]
engine = opening.open_engine(Settings.parse(model=model))
opening.open_engine = lambda settings: engine
sys.argv = ["poolhouse", "run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", model]
from poolhouse.cli import main
chance = random.Random(11)
kills = 0
while kills < int(most) and not Path("out.jsonl").exists():
    child = os.fork()
    if not child:
        run_batch.run.__globals__["_SECONDS"] = 0.02
        try:
            main()
        finally:
            os._exit(0)
    time.sleep(chance.uniform(0.0, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(kills, Path("out.jsonl").exists())
"""


def test_a_batch_that_is_killed_at_any_moment_has_every_line_once(place: Path, model: str) -> None:
    count = 6000
    Path("in.jsonl").write_text("".join(asked(number) for number in range(count)))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, model, "20"], capture_output=True, text=True, timeout=280, check=False,
        env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-2]) > 3, done.stdout
    found = read("out.jsonl")
    assert [line["custom_id"] for line in found] == [f"id-{number}" for number in range(count)]
    assert len({line["id"] for line in found}) == count
    assert not [path for path in place.iterdir() if path.suffix in (".part", ".journal")]


def test_going_on_needs_the_same_words(place: Path, model: str, said: Run, tmp_path: Path) -> None:
    Path("in.jsonl").write_text("".join(asked(number) for number in range(50)))
    words = ("run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", model)
    assert said(*words).status == 0
    whole = read("out.jsonl")
    # As if it had been killed behind 30 lines, with a torn one behind them.
    kept = Path("out.jsonl").read_bytes().splitlines(keepends=True)[:30]
    state = Path("in.jsonl").stat()
    inputs = [{"file": "in.jsonl", "bytes": state.st_size, "changed": state.st_mtime_ns}]
    from poolhouse.jobs.job import checkpoint

    point = {"read": sum(len(asked(number)) for number in range(30)), "lines": 30, "answers": len(b"".join(kept)),
             "errors": 0, "completed": 30, "failed": 0}  # fmt: skip
    head = {"inputs": inputs, **checkpoint({}, Path(model))}
    journal = json.dumps(head) + "\n" + json.dumps({"point": point}) + "\n" + '{"point": {"re'

    def left() -> None:
        Path("out.jsonl.part").write_bytes(b"".join(kept) + b'{"id": "torn')
        Path("out.jsonl.journal").write_text(journal)

    left()
    refused = said(*words, "--max-model-len", "32")
    assert refused.status == 2
    assert "begun otherwise: options was {}, now {--max-model-len: '32'}" in refused.error
    assert said(*words, "--lanes", "1").status == 0
    left()
    Path("in.jsonl").touch()
    assert "begun otherwise: inputs was" in said(*words).error
    os.utime("in.jsonl", ns=(state.st_atime_ns, state.st_mtime_ns))
    Path("out.jsonl.part").write_bytes(b"")
    assert "shorter than its journal says" in said(*words).error
    left()
    done = said(*words)
    assert (done.status, "Going on behind 30 requests that are answered." in done.error) == (0, True), done
    again = read("out.jsonl")
    assert again[:30] == whole[:30]
    assert [line["custom_id"] for line in again] == [line["custom_id"] for line in whole]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-i", "nowhere.jsonl", "-o", "out.jsonl"), "nowhere.jsonl cannot be read: No such file"),
        (("-i", "in.jsonl", "-o", "in.jsonl"), "is both what is read and what would be written"),
        (("-i", "in.jsonl", "-o", "no/folder/out.jsonl"), "is no file that can be made"),
        (("-i", "in.jsonl", "-o", "."), "is no file that can be made"),
        (("-i", "in.jsonl", "-o", "out.jsonl", "--model", "nowhere"), "nowhere"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_in_words(
    words: tuple[str, ...], message: str, place: Path, said: Run
) -> None:
    Path("in.jsonl").write_text(asked(1))
    done = said("run-batch", *words)
    assert done.status in (1, 2)
    assert message in done.error
    assert sorted(path.name for path in place.iterdir()) == ["in.jsonl"]


def test_one_process_at_a_time_writes_a_file(place: Path, model: str, said: Run) -> None:
    from poolhouse.journal import JournalFile

    Path("in.jsonl").write_text(asked(1))
    journal = JournalFile(Path("out.jsonl.journal"))
    try:
        done = said("run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", model)
        assert (done.status, done.error) == (2, "poolhouse: Another process writes to out.jsonl.\n")
    finally:
        journal.close()
