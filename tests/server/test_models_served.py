"""`serve --models-dir` over real checkpoints: a process, sockets, and answers that are those of each model alone."""

from __future__ import annotations

import ctypes
import gc
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from poolhouse import LLM, asgi
from poolhouse.cli.serve import _models_dir
from poolhouse.cli.sources import gather
from poolhouse.errors import ConfigError
from poolhouse.server.app import create_app
from poolhouse.server.on_demand import OnDemand
from poolhouse.settings import ServerSettings
from tests.checkpoints import save_checkpoint
from tests.server.running import free_port, served
from tests.server.sockets import wait_until

NAMES = ("one", "two", "owner/three", "four & more", "fünf")
TEXT = "The moon pulls the sea."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five models with weights of their own, and what is none."""
    folder = tmp_path_factory.mktemp("models")
    for index, name in enumerate(NAMES):
        save_checkpoint(folder / name, "bert, wordpiece", intermediate_size=48 + index)
    (folder / "notes").mkdir()
    shutil.copytree(folder / "one", folder / "torn")
    (folder / "torn" / "model.safetensors").write_bytes(b"torn")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    vectors = {}
    for name in NAMES:
        with LLM(str(folder / name), device="cpu") as llm:
            vectors[name] = llm.embed_array([TEXT])[0]
    return vectors


def embed(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/embeddings", json={"input": TEXT, "model": model})


def listed(http: httpx.Client) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in http.get("/v1/models").json()["data"]}


def test_fifty_requests_for_five_models_with_memory_for_two(folder: Path, expected: dict[str, Any]) -> None:
    options = ("--models-dir", str(folder), "--memory-limit", "10MiB", "--device", "cpu")
    with served(folder.parent, *options) as http, ThreadPoolExecutor(51) as threads:
        asked = [NAMES[index % 5] for index in range(50)]
        broken = threads.submit(embed, http, "torn")
        replies = [threads.submit(embed, http, name) for name in asked]
        most = 0
        while not all(reply.done() for reply in replies):
            states = [one["state"] for one in listed(http).values()]
            most = max(most, states.count("loaded") + states.count("unloading"))
        for name, reply in zip(asked, replies, strict=True):
            body = reply.result().json()
            assert (reply.result().status_code, body["model"]) == (200, name)
            np.testing.assert_allclose(body["data"][0]["embedding"], expected[name], atol=1e-5)
        assert 1 <= most <= 2
        assert broken.result().status_code == 503
        assert "torn/model.safetensors is corrupt or no safetensors file" in broken.result().json()["message"]
        models = listed(http)
        assert set(models) == {*NAMES, "torn"}
        assert models["torn"]["state"] == "failed"
        in_memory = [one for one in models.values() if one["state"] == "loaded"]
        assert 0 < sum(one["memory_bytes"] for one in in_memory) <= 10 * 2**20
        assert http.get("/health").status_code == 200


def test_a_model_beside_the_folder_is_always_loaded_and_options_are_for_all(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("two: {max_model_len: 7}\nfünf: {dtype: bfloat16}\n")
    options = ("--models-dir", str(folder), "--models-config", str(tmp_path / "own.yaml"), "--max-model-len", "9")
    with served(folder.parent, str(folder / "one"), *options, "--served-model-name", "always") as http:
        models = listed(http)
        assert (models["always"]["state"], models["one"]["state"]) == ("loaded", "available")
        first = http.post("/v1/embeddings", json={"input": "a"}).json()
        assert first.get("model") == "always", first
        for name in ("one", "two", "fünf"):
            assert http.post("/api/embed", json={"model": name, "input": TEXT}).status_code == 200
        models = listed(http)
        lengths = {name: models[name]["max_model_len"] for name in ("always", "one", "two", "fünf", "owner/three")}
        assert lengths == {"always": 9, "one": 9, "two": 7, "fünf": 9, "owner/three": None}
        details = {one["name"]: one["details"]["quantization_level"] for one in http.get("/api/ps").json()["models"]}
        assert (details["one:latest"], details["fünf:latest"]) == ("F32", "BF16")


def test_another_server_has_them_too(folder: Path, expected: dict[str, Any]) -> None:
    app = pickle.loads(pickle.dumps(asgi(models_dir=folder, memory_limit="10MiB", device="cpu")))
    # Started twice, as servers may do.
    for _ in range(2):
        with TestClient(app) as http:
            for name in NAMES[:3]:
                vector = embed(http, name).json()["data"][0]["embedding"]
                np.testing.assert_allclose(vector, expected[name], atol=1e-5)
            assert [one["state"] for one in listed(http).values()].count("loaded") == 2


def test_a_stop_while_a_model_loads_ends_the_process(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib, poolhouse.server.process.run as run\n"
        "from poolhouse.server.models_dir import ModelsDir\n"
        "from poolhouse.settings import ServerSettings, Settings\n"
        "def never(settings):\n"
        "    print('loading', flush=True)\n"
        "    time.sleep(600)\n"
        "models = ModelsDir((pathlib.Path(sys.argv[1]),), Settings(), {}, never, lambda *_: (1, 1))\n"
        "settings = ServerSettings.parse(host='127.0.0.1', port=int(sys.argv[2]), shutdown_seconds=0.2)\n"
        "run.serve(lambda: [], settings, models)\n"
    )
    save_checkpoint(tmp_path / "slow", "bert, wordpiece")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == f"Poolhouse serves 1 model on demand on http://127.0.0.1:{port}\n"
    with ThreadPoolExecutor(1) as threads, httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        waiting = threads.submit(embed, http, "slow")
        assert process.stdout.readline() == "loading\n"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        reply = waiting.result()
        log = process.communicate(timeout=60)[1]
    assert (reply.status_code, reply.json()["message"]) == (503, "The server was stopped before it could answer.")
    assert process.returncode == 0, log
    assert time.monotonic() - began < 30
    assert "Traceback" not in log


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`, of all arenas."""

    _fields_ = (
        ("others", ctypes.c_size_t * 4),
        ("in_maps", ctypes.c_size_t),
        ("more_others", ctypes.c_size_t * 2),
        ("in_blocks", ctypes.c_size_t),
        ("rest", ctypes.c_size_t * 2),
    )


def _bytes_in_use() -> int:
    gc.collect()
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Heap
    heap = library.mallinfo2()
    return int(heap.in_blocks) + int(heap.in_maps)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_memory_goes_back_however_often_a_model_is_loaded(tmp_path: Path) -> None:
    # 13 MB of weights in its layers, which are laid out anew, and so lie in the heap.
    save_checkpoint(tmp_path / "large", "bert, wordpiece", hidden_size=512, intermediate_size=2048)
    gathered = gather([], {"models_dir": str(tmp_path), "device": "cpu"}, None, {})
    on_demand = OnDemand(_models_dir(gathered), gathered.server)  # type: ignore[arg-type]
    after: list[int] = []
    with TestClient(create_app([], gathered.server, on_demand=on_demand)) as http:
        for _ in range(20):
            before = _bytes_in_use()
            reply = http.post("/api/embed", json={"model": "large", "input": [TEXT] * 20, "keep_alive": -1})
            assert reply.status_code == 200
            assert _bytes_in_use() - before > 10e6
            http.post("/api/embed", json={"model": "large", "keep_alive": 0})
            wait_until(lambda: on_demand.memory_bytes == 0 and not on_demand.busy, "the model is closed")
            after.append(_bytes_in_use())
    # The first rounds leave what stays for good: modules, compiled kernels. A kept model would be 13 MB a round.
    assert after[-1] - after[4] < 2e6, after


@pytest.mark.parametrize(
    ("options", "file", "words"),
    [
        ({}, '{"one": {"dtyp": "float32"}}', "there is no option 'dtyp'. Did you mean 'dtype'?"),
        ({}, '{"one": {"max_num_batched_tokens": 0}}', "one: max_num_batched_tokens: Input should be greater"),
        ({}, '{"one": {"port": 9}}', "'port' is an option of the server, not of one model."),
        ({}, '{"one": 5}', "options are a mapping such as"),
        ({}, "[1]", "it is a mapping of a model's name to its options, got [1]."),
        ({}, "one: {", "is not valid YAML"),
        ({}, None, "--models-config: [Errno 2] No such file"),
        ({"models_dir": None}, "{}", "--models-config: it is for the models of --models-dir, which is missing."),
        ({"lora_modules": "law=x"}, "{}", "--lora-modules: it is for one model; those of --models-dir have theirs"),
        ({"served_model_name": "x"}, "{}", "--served-model-name: it is for one model"),
        ({"memory_limit": "much"}, "{}", "--memory-limit: write bytes, or a number with a unit such as 24GiB"),
        ({"memory_limit": "0"}, "{}", "--memory-limit: Input should be greater than or equal to 1"),
        ({"unload_after": "-1"}, "{}", "--unload-after: Input should be greater than or equal to 0"),
    ],
)
def test_options_are_refused_by_name(tmp_path: Path, options: dict[str, Any], file: str | None, words: str) -> None:
    if file is not None:
        (tmp_path / "own.yaml").write_text(file)
    given = {"models_dir": str(tmp_path), "models_config": str(tmp_path / "own.yaml"), **options}
    with pytest.raises(ConfigError, match=re.escape(words)):
        gather([], {name: value for name, value in given.items() if value is not None}, None, {})


@pytest.mark.parametrize(
    ("written", "count"),
    [("512", 512), ("24GiB", 24 * 2**30), ("1.5Gi", 3 * 2**29), ("8GB", 8 * 10**9), ("300 MiB", 300 * 2**20)],
)
def test_a_limit_of_memory_may_have_a_unit(written: str, count: int) -> None:
    assert ServerSettings.parse(memory_limit=written).memory_limit == count


def test_a_folder_that_is_missing_stops_the_start(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "poolhouse.cli", "serve", "--models-dir", str(tmp_path / "missing"), "--port", "0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    said = process.stderr.splitlines()[-1]
    assert said.startswith("poolhouse: --models-dir: [Errno 2] No such file or directory")
