"""From the name of a model to a folder, without a network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.errors import CheckpointError
from poolhouse.models.files.hub import embedded_model, locate
from poolhouse.server.app import create_app
from poolhouse.settings import ServerSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache that holds owner/name on its branch main."""
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache"


def test_a_folder_is_used_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "../nothing", "~/nothing", "a/b/c", "models/"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(path: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{path} does not exist"):
        locate(path)


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(CheckpointError, match="name of the model is empty"):
        locate("")


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a file"):
        locate(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("weights", ["model.safetensors", "0_Transformer/model.safetensors", "pytorch_model.bin"])
def test_a_cached_hub_id_is_found_without_a_network(weights: str, cache: Path) -> None:
    snapshot = cache / "models--owner--name" / "snapshots" / COMMIT
    (snapshot / weights).parent.mkdir(exist_ok=True)
    (snapshot / weights).touch()
    assert locate("owner/name", download_dir=str(cache)) == snapshot
    assert locate("owner/name", download_dir=str(cache), revision=COMMIT) == snapshot


def test_a_hub_id_that_is_not_cached_says_so(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="owner/other is not in the cache, and HF_HUB_OFFLINE is set"):
        locate("owner/other", download_dir=str(cache))
    with pytest.raises(CheckpointError, match="owner/name at revision 'v2' is not in the cache"):
        locate("owner/name", download_dir=str(cache), revision="v2")


@pytest.mark.parametrize("name", ["owner/na me", "owner/name--more", "-name"])
def test_a_name_that_is_no_hub_id_says_what_one_looks_like(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}' is neither a folder here nor a hub id"):
        locate(name)


def test_importing_the_module_does_not_import_the_hub_client() -> None:
    code = "import sys, poolhouse.models.files.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


REPOSITORIES = {
    "owner/safe": (
        *("config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin"),
        *("README.md", "tokenizer.json", "vocab.txt", "chat_template.jinja", "model.safetensors"),
        *("pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.xml"),
        *("model.gguf", "consolidated.safetensors", "original/params.json", "training_args.bin"),
    ),
    "owner/pickled": ("config.json", "pytorch_model.bin", "sparse_linear.pt", "onnx/model.onnx_data", "optimizer.pt"),
    "owner/one-gguf": ("README.md", "config.json", "name-Q8_0.gguf"),
    "owner/ggufs": ("README.md", "name-Q8_0.gguf", "gguf/name.Q4_K_M.gguf", "name-f16.gguf"),
}
REFUSALS = {"owner/closed": (403, "GatedRepo"), "owner/nothing": (404, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for; each file holds its own name."""

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name in REFUSALS:
            status, code = REFUSALS[name]
            self.answer(status, b"", {"X-Error-Code": code})
        elif parts[0] != "api":
            body = "/".join(parts[4:]).encode()
            self.answer(200, body, {"ETag": hashlib.sha1(body).hexdigest(), "X-Repo-Commit": COMMIT})
        elif parts[4] == "revision" and parts[5] != "main":
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif parts[4] == "revision":
            self.answer(
                200,
                json.dumps(
                    {
                        "id": name,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": path} for path in REPOSITORIES.get(name, ())],
                    }
                ).encode(),
                {},
            )
        else:
            files = [
                {"type": "file", "path": path, "size": len(path), "oid": hashlib.sha1(path.encode()).hexdigest()}
                for path in REPOSITORIES[name]
            ]
            self.answer(200, json.dumps(files).encode(), {})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header in (headers | {"Content-Length": str(len(body)), "Content-Type": "application/json"}).items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_takes_what_a_model_needs_and_says_what_went_wrong(hub: str, tmp_path: Path) -> None:
    code = """
import sys
from poolhouse.errors import CheckpointError
from poolhouse.models.files.hub import locate
for model, revision in (
    ("owner/safe", None), ("owner/pickled", None), ("owner/closed", None), ("owner/nothing", None), ("owner/safe", "v9")
):
    try:
        print(locate(model, revision=revision, download_dir=sys.argv[1]))
    except CheckpointError as error:
        print(error)
"""
    # The client reads its environment when it is imported, so it gets a process of its own.
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    safe, pickled, closed, nothing, revision = ran.stdout.splitlines()
    assert files_in(safe) == {
        *("config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin"),
        *("README.md", "tokenizer.json", "vocab.txt", "chat_template.jinja", "model.safetensors"),
    }
    assert files_in(pickled) == {"config.json", "pytorch_model.bin", "sparse_linear.pt"}
    assert "owner/closed is gated" in closed
    assert "hf_token" in closed
    assert "owner/nothing is neither a folder here nor a repository on the hub" in nothing
    assert "not at revision 'v9'" in revision


def test_gguf_files_of_a_repository_are_chosen_by_a_colon(hub: str, tmp_path: Path) -> None:
    code = """
import sys
from poolhouse.errors import CheckpointError
from poolhouse.models.files.hub import locate
for model in ("owner/one-gguf", "owner/ggufs:Q4_K_M", "owner/ggufs", "owner/ggufs:Q5_0", "owner/nothing:Q8_0"):
    try:
        print(locate(model, download_dir=sys.argv[1]).name)
    except CheckpointError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for offline in ("0", "1"):
        ran = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**environment, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        one, chosen, several, none, unknown = ran.stdout.splitlines()
        assert (one, chosen) == ("name-Q8_0.gguf", "name.Q4_K_M.gguf")
        if offline == "0":
            assert "several GGUF files; there are" in several
            assert "owner/ggufs:Q8_0" in several
        assert "no GGUF file of the kind Q5_0" in none
        assert "owner/nothing" in unknown


def files_in(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", HUB_NAME])
def test_the_embedded_model_is_found_by_its_hub_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert locate(name, download_dir=str(tmp_path)) == embedded_model()
    assert locate(name, download_dir=str(tmp_path), revision="main") == embedded_model()
    with pytest.raises(CheckpointError, match=f"{HUB_NAME} at revision 'v2' is not in the cache"):
        locate(name, download_dir=str(tmp_path), revision="v2")
    # A folder of that name wins, and so does the cache, if it has the weights.
    snapshot = tmp_path / "models--sentence-transformers--all-MiniLM-L6-v2" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    assert locate(name, download_dir=str(tmp_path)) == embedded_model()
    (snapshot / "model.safetensors").touch()
    assert locate(name, download_dir=str(tmp_path)).samefile(snapshot)
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    assert locate(name, download_dir=str(tmp_path)) == Path(name)


def test_without_its_package_the_hub_name_is_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poolhouse.models.files.hub.find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=f"{HUB_NAME} is not in the cache"):
        locate("all-MiniLM-L6-v2", download_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("model", "served", "name", "others"),
    [
        (None, None, "all-MiniLM-L6-v2", {HUB_NAME}),
        (HUB_NAME, None, HUB_NAME, {"all-MiniLM-L6-v2"}),
        (HUB_NAME, ("mine", "ours"), "mine", {"ours"}),
    ],
)
def test_the_server_answers_to_every_name_of_the_embedded_model(
    model: str | None, served: Any, name: str, others: set[str], tmp_path: Path
) -> None:
    with (
        LLM(model, served_model_name=served, download_dir=str(tmp_path)) as llm,
        TestClient(create_app([llm.engine], ServerSettings())) as client,
    ):
        assert llm.engine.facts.name == name
        for asked in ("all-MiniLM-L6-v2", HUB_NAME, "mine", "ours"):
            reply = client.post("/v1/embeddings", json={"input": "x", "model": asked})
            known = asked in {name, *others}
            assert reply.status_code == (200 if known else 404), asked
            assert not known or reply.json()["model"] == name
        listed = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
    assert listed == list(served or [name])
