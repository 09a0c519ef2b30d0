"""Files and batches: OpenAI's own client against real servers, restarts, limits, and whose turn it is."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import SecretStr
from starlette.testclient import TestClient

from poolhouse import LLM, ConfigError
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import EngineError
from poolhouse.server.app import create_app
from poolhouse.server.batches import store as stores
from poolhouse.server.batches.lines import Line, Reply
from poolhouse.server.batches.run import Stream, run
from poolhouse.server.batches.store import Store
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from tests.checkpoints import save_checkpoint
from tests.server.documented import checked
from tests.server.running import Running, running

ENDED = ("completed", "failed", "expired", "cancelled")


def asked(number: int, **body: Any) -> dict[str, Any]:
    body = {"input": f"text {number}", **body}
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/embeddings", "body": body}


def file_of(lines: Sequence[Any]) -> bytes:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()


def lines_of(content: bytes) -> list[Any]:
    return [json.loads(line) for line in content.splitlines()]


def wait_until(done: Callable[[], Any]) -> Any:
    for _ in range(3000):
        if found := done():
            return found
        time.sleep(0.01)
    raise AssertionError("It never came.")


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def begin(http: TestClient, lines: Sequence[Any], **more: Any) -> dict[str, Any]:
    """Upload a file and begin its batch."""
    file = http.post("/v1/files", files={"file": ("in.jsonl", file_of(lines))}, data={"purpose": "batch"}).json()
    reply = http.post("/v1/batches", json={"input_file_id": file["id"], "endpoint": "/v1/embeddings", **more})
    assert reply.status_code == 200, reply.text
    batch: dict[str, Any] = reply.json()
    return batch


def ended(http: TestClient, batch: dict[str, Any]) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        now: dict[str, Any] = http.get(f"/v1/batches/{batch['id']}").json()
        return now if now["status"] in ENDED else None

    found: dict[str, Any] = wait_until(look)
    return found


def content(http: TestClient, file_id: str | None) -> list[Any]:
    return [] if file_id is None else lines_of(http.get(f"/v1/files/{file_id}/content").content)


@pytest.fixture
def http(tmp_path: Path) -> Iterator[TestClient]:
    """A server with files and batches, all of whose replies are held against its document."""
    settings = ServerSettings(batch_dir=str(tmp_path / "kept"), max_file_bytes=50_000)
    with TestClient(create_app([FakeEngine()], settings)) as http:
        checked(http)
        yield http


def test_openais_client_runs_a_batch_from_its_file_to_its_answers(tmp_path: Path) -> None:
    lines = [asked(number) for number in range(300)]
    lines[7] = asked(7, input="word " * 600)
    (tmp_path / "requests.jsonl").write_bytes(file_of(lines))
    with running(batch_dir=str(tmp_path / "kept")) as server, client(server.url) as ask:
        with (tmp_path / "requests.jsonl").open("rb") as stream:
            file = ask.files.create(file=stream, purpose="batch")
        assert (file.filename, file.bytes, file.purpose) == ("requests.jsonl", len(file_of(lines)), "batch")
        batch = ask.batches.create(
            input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"for": "tests"}
        )
        assert (batch.status, batch.metadata, batch.expires_at) == (
            "validating",
            {"for": "tests"},
            batch.created_at + 86400,
        )
        batch = wait_until(lambda: (now := ask.batches.retrieve(batch.id)).status in ENDED and now)
        assert batch.status == "completed"
        assert batch.request_counts is not None
        assert batch.request_counts.model_dump() == {"completed": 299, "failed": 1, "total": 300}
        assert batch.output_file_id is not None
        assert batch.error_file_id is not None
        answers = lines_of(ask.files.content(batch.output_file_id).content)
        assert [line["custom_id"] for line in answers] == [f"id-{number}" for number in range(300) if number != 7]
        assert len({line["id"] for line in answers}) == 299
        for line in answers[::50]:
            assert (line["error"], line["response"]["status_code"]) == (None, 200)
            live = ask.embeddings.create(
                model="fake", input=f"text {line['custom_id'].removeprefix('id-')}", encoding_format="float"
            )
            assert line["response"]["body"]["data"][0]["embedding"] == live.data[0].embedding
        (refused,) = lines_of(ask.files.content(batch.error_file_id).content)
        assert (refused["custom_id"], refused["response"]["status_code"], refused["error"]) == ("id-7", 400, None)
        assert "512 tokens" in refused["response"]["body"]["error"]["message"]
        assert [one.id for one in ask.batches.list()] == [batch.id]
        named = {one.filename for one in ask.files.list()}
        assert named == {"requests.jsonl", f"{batch.id}_output.jsonl", f"{batch.id}_error.jsonl"}
        assert ask.files.retrieve(file.id) == file
        assert ask.files.delete(file.id).deleted
        with pytest.raises(openai.NotFoundError, match=file.id):
            ask.files.retrieve(file.id)


def test_a_server_without_a_folder_says_how_to_turn_batches_on() -> None:
    with running() as server, client(server.url) as ask:
        for call in (
            lambda: ask.files.list(),
            lambda: ask.files.create(file=b"{}", purpose="batch"),
            lambda: ask.batches.retrieve("batch_1"),
        ):
            with pytest.raises(openai.NotFoundError, match="off on this server: --batch-dir FOLDER turns them on"):
                call()
        assert not [path for path in httpx.get(f"{server.url}/openapi.json").json()["paths"] if "/v1/batches" in path]


def test_what_is_no_request_is_an_error_of_its_line_alone(http: TestClient) -> None:
    wrong = {
        "no json": "not valid JSON",
        "[1]": "it is no JSON object",
        '{"custom_id": 7}': "'custom_id' must be a text",
        '{"custom_id": "a"}': "it has no 'method', which is \"POST\"",
        json.dumps({**asked(0), "method": "GET"}): "'method' must be \"POST\", got 'GET'",
        json.dumps({**asked(0), "url": "/score"}): "'url' is '/score', and the batch is for '/v1/embeddings'",
        json.dumps({**asked(0), "url": "/v1/files"}): "'url' must be the path of a route that answers POST",
        json.dumps({**asked(0), "body": "text"}): "'body' must be an object",
        json.dumps(asked(0, encoding_format="bytes")): "the reply is no JSON; ask for numbers or base64",
    }
    batch = begin(http, [asked(1), *wrong, "", "   ", asked(2)])
    batch = ended(http, batch)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 11, "completed": 2, "failed": 9}
    assert [line["custom_id"] for line in content(http, batch["output_file_id"])] == ["id-1", "id-2"]
    found = content(http, batch["error_file_id"])
    assert [line["response"] for line in found] == [None] * 9
    for number, (line, message) in enumerate(zip(found, wrong.values(), strict=True), 2):
        assert line["error"]["message"].startswith(f"Line {number}: ")
        assert message in line["error"]["message"]
    assert [line["custom_id"] for line in found] == [None, None, None, "a", "id-0", "id-0", "id-0", "id-0", "id-0"]


def test_a_file_without_lines_fails_its_batch(http: TestClient) -> None:
    batch = ended(http, begin(http, ["", " "]))
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", "empty_file")
    assert batch["failed_at"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"endpoint": "/v1/embedings"}, "Did you mean '/v1/embeddings'"),
        ({"endpoint": "/v1/files"}, "endpoint must be the path of a route that takes POST"),
        ({"endpoint": "/health"}, "endpoint must be the path of a route that takes POST"),
        ({"completion_window": "24 h"}, "completion_window"),
        ({"metadata": {"a": "b" * 600}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"input_file_id": 7}, "input_file_id"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(http: TestClient, change: dict[str, Any], message: str) -> None:
    file = http.post("/v1/files", files={"file": ("a", b"{}")}, data={"purpose": "batch"}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    reply = http.post("/v1/batches", json={**body, **change})
    assert (reply.status_code, message in reply.json()["message"]) == (400, True), reply.text
    assert http.get("/v1/batches").json()["data"] == []


def test_ids_that_are_not_there_are_not_found(http: TestClient, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    for wrong in ("file-0", "..%2F..%2Fsecret", "../../secret", "%00", "file-" + "0" * 24, "x" * 300, "lock"):
        for path in (f"/v1/files/{wrong}", f"/v1/files/{wrong}/content", f"/v1/batches/{wrong}"):
            reply = http.get(path)
            assert reply.status_code == 404, path
            assert "mine" not in reply.text
        assert http.delete(f"/v1/files/{wrong}").status_code == 404
        assert http.post(f"/v1/batches/{wrong}/cancel").status_code == 404
    body = {"input_file_id": "../../secret", "endpoint": "/v1/embeddings"}
    assert http.post("/v1/batches", json=body).status_code == 404
    assert (tmp_path / "secret").exists()


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    more = "" if filename is None else f'; filename="{filename}"'
    return f'--X\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


PURPOSE = part("purpose", b"batch")
WHOLE = PURPOSE + part("file", b"{}", "a.jsonl") + b"--X--\r\n"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (PURPOSE + b"--X--\r\n", 400, "no field 'file'"),
        (part("file", b"{}", "a") + b"--X--\r\n", 400, "purpose"),
        (part("file", b"{}", "a") + part("purpose", b"vision") + b"--X--\r\n", 400, "purpose"),
        (PURPOSE + part("file", b"{}", "a") * 2 + b"--X--\r\n", 400, "two files"),
        (PURPOSE + part("file", b"{}", "") + b"--X--\r\n", 400, "name of the file"),
        (PURPOSE + part("file", b"{}", "a\x07b") + b"--X--\r\n", 400, "name of the file"),
        (PURPOSE + part("file", b"{}", "a" * 300) + b"--X--\r\n", 400, "name of the file"),
        (PURPOSE + part("file", b"{}", "..") + b"--X--\r\n", 400, "name of the file"),
        (WHOLE[:-10], 400, "ends too early"),
        (b"", 400, "ends too early"),
        (b"no form at all", 400, "no multipart form"),
        (PURPOSE + part("file", b"x" * 50_001, "a") + b"--X--\r\n", 413, "larger than 50000 bytes (--max-file-bytes)"),
        (part("purpose", b"x" * 5000) + b"--X--\r\n", 413, "longer than 4096 bytes"),
        (WHOLE.replace(b"purpose", b"expires_after[seconds]"), 400, "expires_after[seconds]"),
    ],
)  # fmt: skip
def test_an_upload_that_is_wrong_is_refused_and_leaves_nothing(
    http: TestClient, tmp_path: Path, body: bytes, status: int, message: str
) -> None:
    reply = http.post("/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=X"})
    assert (reply.status_code, message in reply.json()["message"]) == (status, True), reply.text
    assert list((tmp_path / "kept" / "files").iterdir()) == []


def test_an_upload_says_what_it_is(http: TestClient) -> None:
    wrong = http.post("/v1/files", json={})
    assert (wrong.status_code, "must be multipart/form-data" in wrong.json()["message"]) == (400, True)
    wrong = http.post("/v1/files", content=WHOLE, headers={"content-type": "multipart/form-data"})
    assert (wrong.status_code, "names no boundary" in wrong.json()["message"]) == (400, True)
    for sent, kept in (
        ("C:\\data\\in.jsonl", "in.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("größe.jsonl", "größe.jsonl"),
    ):
        file = http.post("/v1/files", files={"file": (sent, b"{}")}, data={"purpose": "batch"}).json()
        assert file["filename"] == kept
    reply = http.get(f"/v1/files/{file['id']}/content")
    assert (reply.content, reply.headers["content-type"]) == (b"{}", "application/octet-stream")


def test_lists_come_in_pages(http: TestClient) -> None:
    ids = [
        http.post("/v1/files", files={"file": (f"{number}", b"{}")}, data={"purpose": "batch"}).json()["id"]
        for number in range(5)
    ]
    page = http.get("/v1/files", params={"limit": 2}).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([ids[4], ids[3]], True)
    page = http.get("/v1/files", params={"limit": 3, "after": page["last_id"]}).json()
    assert ([one["id"] for one in page["data"]], page["has_more"]) == ([ids[2], ids[1], ids[0]], False)
    assert [one["id"] for one in http.get("/v1/files", params={"order": "asc"}).json()["data"]] == ids
    assert http.get("/v1/files", params={"purpose": "batch_output"}).json()["data"] == []
    for wrong in ({"limit": 0}, {"limit": "many"}, {"order": "any"}):
        assert http.get("/v1/files", params=wrong).status_code == 400
    assert http.get("/v1/files", params={"after": "file-1"}).status_code == 404


def test_keys_hold(tmp_path: Path) -> None:
    with running(batch_dir=str(tmp_path), api_key=["secret"]) as server:
        with client(server.url, "wrong") as ask:
            for call in (
                lambda: ask.files.list(),
                lambda: ask.files.create(file=b"{}", purpose="batch"),
                lambda: ask.batches.list(),
                lambda: ask.batches.cancel("batch_1"),
            ):
                with pytest.raises(openai.AuthenticationError):
                    call()
        with client(server.url, "secret") as ask:
            file = ask.files.create(file=("a", file_of([asked(1)])), purpose="batch")
            batch = ask.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
            batch = wait_until(lambda: (now := ask.batches.retrieve(batch.id)).status in ENDED and now)
            # Its own requests need no key.
            assert batch.request_counts is not None
            assert batch.request_counts.completed == 1


def test_a_batch_is_cancelled_in_the_middle(tmp_path: Path) -> None:
    engine = FakeEngine(delay_seconds=0.005)
    with TestClient(create_app([engine], ServerSettings(batch_dir=str(tmp_path)))) as http:
        checked(http)
        batch = begin(http, [asked(number) for number in range(2000)])
        path = f"/v1/batches/{batch['id']}"
        wait_until(lambda: http.get(path).json()["request_counts"]["completed"] > 20)
        refused = http.delete(f"/v1/files/{batch['input_file_id']}")
        assert (refused.status_code, "cancel that first" in refused.json()["message"]) == (400, True)
        assert http.post(f"{path}/cancel").json()["status"] in ("cancelling", "cancelled")
        batch = ended(http, batch)
        assert batch["status"] == "cancelled"
        assert batch["cancelling_at"] <= batch["cancelled_at"]
        done = batch["request_counts"]["completed"]
        answers = content(http, batch["output_file_id"])
        assert 20 < done < 2000
        assert [line["custom_id"] for line in answers] == [f"id-{number}" for number in range(done)]
        # What waited has left the queue.
        wait_until(lambda: engine.pending == 0)
        assert http.post(f"{path}/cancel").status_code == 400
        assert http.delete(f"/v1/files/{batch['input_file_id']}").status_code == 200
        # At once, before its turn has come.
        other = begin(http, [asked(1)])
        http.post(f"/v1/batches/{other['id']}/cancel")
        assert ended(http, other)["status"] in ("cancelled", "completed")


def test_what_is_not_answered_in_time_expires(tmp_path: Path) -> None:
    engine = FakeEngine(delay_seconds=0.01)
    with TestClient(create_app([engine], ServerSettings(batch_dir=str(tmp_path)))) as http:
        batch = ended(http, begin(http, [asked(number) for number in range(1000)], completion_window="1s"))
        assert batch["status"] == "expired"
        counts = batch["request_counts"]
        assert counts["total"] == 1000 == counts["completed"] + counts["failed"]
        answers, left = content(http, batch["output_file_id"]), content(http, batch["error_file_id"])
        assert [line["custom_id"] for line in answers + left] == [f"id-{number}" for number in range(1000)]
        assert len(left) == counts["failed"] > 0
        assert {line["error"]["code"] for line in left} == {"batch_expired"}


def test_a_server_that_is_killed_or_stopped_goes_on_with_its_batches(tmp_path: Path) -> None:
    load = "engines = [FakeEngine('fake', delay_seconds=0.001)]"
    server = Running(load, batch_dir=str(tmp_path)).ready()
    with client(server.url) as ask:
        file = ask.files.create(file=("a", file_of([asked(number) for number in range(4000)])), purpose="batch")
        batch = ask.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")

        def more_than(count: int) -> bool:
            now = ask.batches.retrieve(batch.id).request_counts
            return now is not None and now.completed > count

        wait_until(lambda: more_than(100))
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.communicate()
    server = Running(load, batch_dir=str(tmp_path)).ready()
    with client(server.url) as ask:
        wait_until(lambda: more_than(1500))
    status, log = server.stop()
    assert (status, "Traceback" in log) == (0, False), log
    with running(batch_dir=str(tmp_path)) as server, client(server.url) as ask:
        done = wait_until(lambda: (now := ask.batches.retrieve(batch.id)).status in ENDED and now)
        assert (done.status, done.request_counts.model_dump()) == (
            "completed",
            {"completed": 4000, "failed": 0, "total": 4000},
        )
        answers = lines_of(ask.files.content(done.output_file_id).content)
        assert [line["custom_id"] for line in answers] == [f"id-{number}" for number in range(4000)]
        assert [path.suffix for path in (tmp_path / "batches").iterdir()] == [".json"]


def test_one_server_has_a_folder(tmp_path: Path) -> None:
    with running(batch_dir=str(tmp_path)):
        other = Running(batch_dir=str(tmp_path))
        log = other.process.communicate(timeout=60)[1]
        assert other.process.returncode == 1
        assert f"poolhouse: Another process writes to {tmp_path}." in log
        assert "Traceback" not in log
    (tmp_path / "no folder").write_text("")
    other = Running(batch_dir=str(tmp_path / "no folder"))
    assert "--batch-dir" in other.process.communicate(timeout=60)[1]


def test_live_requests_go_before_a_batch(tmp_path: Path) -> None:
    """Of a real engine that was held until both waited, the order of the answers tells whose turn was first."""
    save_checkpoint(tmp_path / "model", "bert, wordpiece")
    with LLM(str(tmp_path / "model"), max_num_batched_tokens=16, lanes=1) as llm:
        engine = llm.engine
        order: list[str] = []
        submit = engine.submit

        def watched(requests: Sequence[Request]) -> list[Future[Answer]]:
            for request in requests:
                request.future.add_done_callback(lambda _, text=request.prompt.text: order.append(text))
            return submit(requests)

        engine.submit = watched  # type: ignore[method-assign, assignment]
        settings = ServerSettings(batch_dir=str(tmp_path / "kept"))
        with TestClient(create_app([engine], settings)) as http, ThreadPoolExecutor(1) as thread:
            release = engine.hold(time.monotonic() + 30)
            try:
                batch = begin(http, [asked(number, priority=-5) for number in range(40)])
                wait_until(lambda: engine.pending >= 16)
                before = engine.pending
                live = thread.submit(http.post, "/v1/embeddings", json={"input": "live"})
                wait_until(lambda: engine.pending > before)
                assert http.get("/load").json()["server_load"] == 1
            finally:
                release()
            assert live.result().status_code == 200
            assert ended(http, batch)["request_counts"]["completed"] == 40
        # Before it goes what a worker had taken already: a batch of at most 16 tokens.
        assert order.index("live") <= 4
        assert len(order) == 41


def test_a_batch_takes_no_place_from_live_requests(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.open.clear()
    settings = ServerSettings(batch_dir=str(tmp_path), max_queued_prompts=2, request_timeout_seconds=0.2)
    with TestClient(create_app([engine], settings)) as http, ThreadPoolExecutor(2) as threads:
        batch = begin(http, [asked(number) for number in range(30)])
        wait_until(lambda: len(engine.received) >= 16)
        live = [threads.submit(http.post, "/v1/embeddings", json={"input": "live"}) for _ in range(2)]
        # The limit of time is that of clients, who do not wait for more than the batch does.
        assert [one.result().status_code for one in live] == [504, 504]
        engine.open.set()
        assert ended(http, batch)["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    assert {request.priority for request in engine.received if request.prompt.text != "live"} == {2**31}
    assert {request.priority for request in engine.received if request.prompt.text == "live"} == {0}


def test_a_lost_engine_leaves_a_batch_for_the_next_start(tmp_path: Path) -> None:
    engine = FakeEngine(delay_seconds=0.002)
    settings = ServerSettings(batch_dir=str(tmp_path))
    with TestClient(create_app([engine], settings)) as http:
        batch = begin(http, [asked(number) for number in range(1000)])
        wait_until(lambda: http.get(f"/v1/batches/{batch['id']}").json()["request_counts"]["completed"] > 20)
        engine.die(EngineError("The device is gone."))
        time.sleep(0.05)
        assert http.get(f"/v1/batches/{batch['id']}").json()["status"] == "in_progress"
    with TestClient(create_app([FakeEngine()], settings)) as http:
        batch = ended(http, batch)
        assert batch["request_counts"] == {"total": 1000, "completed": 1000, "failed": 0}
        answers = content(http, batch["output_file_id"])
        assert [line["custom_id"] for line in answers] == [f"id-{number}" for number in range(1000)]


def test_a_full_disk_fails_a_batch_in_words(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("poolhouse.server.batches.run.Files.write", full)
    batch = ended(http, begin(http, [asked(1)]))
    assert batch["status"] == "failed"
    assert "No space left on device" in batch["errors"]["data"][0]["message"]
    assert http.get("/health").status_code == 200


def test_files_whose_time_is_over_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_SECONDS_BETWEEN_SWEEPS", 0.01)
    settings = ServerSettings(batch_dir=str(tmp_path))
    with TestClient(create_app([FakeEngine()], settings)) as http:
        form = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        file = http.post("/v1/files", files={"file": ("a", b"{}")}, data=form).json()
        kept = http.post("/v1/files", files={"file": ("b", b"{}")}, data={"purpose": "batch"}).json()
        assert (file["expires_at"], kept["expires_at"]) == (file["created_at"] + 3600, None)
        later = time.time() + 3601
        monkeypatch.setattr(time, "time", lambda: later)
        wait_until(lambda: http.get(f"/v1/files/{file['id']}").status_code == 404)
        assert http.get(f"/v1/files/{kept['id']}").status_code == 200
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == [kept["id"], f"{kept['id']}.json"]


def test_many_batches_share_the_server(http: TestClient) -> None:
    batches = [begin(http, [asked(number) for number in range(50)]) for _ in range(6)]
    for batch in batches:
        assert ended(http, batch)["request_counts"]["completed"] == 50


def test_batches_ask_any_route_and_a_model_by_its_path(tmp_path: Path) -> None:
    settings = ServerSettings(batch_dir=str(tmp_path))
    with TestClient(create_app([FakeEngine()], settings)) as http:
        for endpoint, body in (
            ("/v1/rerank", {"query": "q", "documents": ["a", "b"]}),
            ("/embed", {"inputs": ["a"]}),
            ("/v1/score/fake", {"query": {"text": "q"}, "items": [{"text": "a"}]}),
            ("/openai/deployments/fake/embeddings", {"input": "a"}),
        ):
            line = {"custom_id": "one", "method": "POST", "url": endpoint, "body": body}
            batch = ended(http, begin(http, [line], endpoint=endpoint))
            (answer,) = content(http, batch["output_file_id"])
            live = http.post(endpoint, json=body).json()
            found = answer["response"]["body"]
            drop = {"id", "created"}
            assert type(found) is type(live)
            if isinstance(live, dict):
                assert {k: v for k, v in found.items() if k not in drop} == {
                    k: v for k, v in live.items() if k not in drop
                }
            else:
                assert found == live


@pytest.mark.parametrize(("size", "most"), [(100, 256), (20 * 2**20, 17)])
def test_few_requests_are_in_flight_where_replies_are_large(size: int, most: int) -> None:
    """The first ones come before a size is known."""
    flight, peak = 0, 0

    async def answer(line: Line) -> Reply:
        nonlocal flight, peak
        flight += 1
        peak = max(peak, flight)
        await asyncio.sleep(0)
        flight -= 1
        return Reply(b"x" * size, True)

    class Nothing:
        def write(self, _: bytes) -> None: ...
        def flush(self) -> None: ...

    class Lines:
        def __init__(self) -> None:
            self.left = 1000 if size == 100 else 60

        def seekable(self) -> bool:
            return False

        def readline(self, _: int) -> bytes:
            self.left -= 1
            return b"{}\n" if self.left >= 0 else b""

    sink = Stream(Nothing())  # type: ignore[arg-type]
    asyncio.run(run(Lines(), 1000, answer, sink))  # type: ignore[arg-type]
    assert sink.point.completed == (1000 if size == 100 else 60)
    assert peak <= most
    assert size != 100 or peak > 100


def test_a_store_that_cannot_be_read_says_which_file(tmp_path: Path) -> None:
    async def begun() -> None:
        store = Store(tmp_path, ServerSettings(), lambda: True)
        (tmp_path / "batches" / f"batch_{'0' * 24}.json").write_text("{")
        try:
            await store.start()
        finally:
            await store.stop()

    with pytest.raises(ConfigError, match=re.escape(f"batch_{'0' * 24}.json cannot be read")):
        asyncio.run(begun())


def test_the_document_describes_the_routes_where_they_are_on(tmp_path: Path) -> None:
    settings = ServerSettings(batch_dir=str(tmp_path), api_key=(SecretStr("secret"),))
    with TestClient(create_app([FakeEngine()], settings), headers={"x-api-key": "secret"}) as http:
        paths = http.get("/openapi.json").json()["paths"]
    upload = paths["/v1/files"]["post"]["requestBody"]["content"]
    assert list(upload) == ["multipart/form-data"]
    assert {method for path in paths if path.startswith("/v1/files") for method in paths[path]} == {
        "get",
        "post",
        "delete",
    }
    assert paths["/v1/batches/{batch_id}/cancel"]["post"]["parameters"][0]["description"] == "The id of a batch."
    assert "401" in paths["/v1/batches"]["post"]["responses"]


def test_uploads_at_once_and_one_that_hangs_up(tmp_path: Path) -> None:
    with running(batch_dir=str(tmp_path)) as server, client(server.url) as ask:
        content = file_of([asked(number) for number in range(20_000)])
        files: list[Any] = []
        threads = [
            threading.Thread(target=lambda: files.append(ask.files.create(file=("a", content), purpose="batch")))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {file.bytes for file in files} == {len(content)}
        assert all(ask.files.content(file.id).content == content for file in files)

        def torn() -> Iterator[bytes]:
            yield PURPOSE + part("file", b"{}", "a.jsonl")
            raise ConnectionError

        with pytest.raises(ConnectionError):
            httpx.post(
                f"{server.url}/v1/files", content=torn(), headers={"content-type": "multipart/form-data; boundary=X"}
            )
        assert len(ask.files.list().data) == 4
        wait_until(lambda: len(list((tmp_path / "files").iterdir())) == 8)
