"""The process of `serve`: signals before anything is imported, streams that nobody reads, and JSON in every line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from poolhouse.cli.process import wants_json
from tests.server.running import Running, free_port
from tests.server.test_running import WAITING

# What Python itself brings along; everything else takes time.
OURS = ("poolhouse", "poolhouse.cli", "poolhouse.cli.process")
HEARD_FIRST = f"""
import os, signal, sys
# As it is for the first process of a container.
signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Told:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in sys.stdlib_module_names and name not in {OURS}:
            os.kill(os.getpid(), signal.SIGTERM)
            sys.exit(f"{{name}} was imported before anybody heard a signal")

sys.meta_path.insert(0, Told())
sys.argv = ["poolhouse", "serve"]
from poolhouse.cli import main
main()
"""


def run(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_a_signal_is_heard_before_anything_is_imported() -> None:
    ended = run(HEARD_FIRST)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_importing_the_package_changes_no_signal_and_imports_nothing() -> None:
    script = """
import signal, sys
before = [signal.getsignal(number) for number in signal.valid_signals()]
import poolhouse, poolhouse.cli
assert [signal.getsignal(number) for number in signal.valid_signals()] == before
assert not set(sys.modules) & {"numpy", "pydantic", "typer", "torch"}
assert poolhouse.errors.ConfigError is poolhouse.ConfigError
assert not hasattr(poolhouse, "nothing")
assert set(poolhouse.__all__) <= set(dir(poolhouse))
"""
    ended = run(script)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_standard_stream_that_was_closed_is_no_sockets() -> None:
    script = """
import os, socket, sys
os.close(1); os.close(0)
from poolhouse.cli import process
process.begin(["serve"])
assert socket.socket().fileno() > 2
print("nobody hears this")
"""
    ended = run(script)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@contextlib.contextmanager
def nobody(kind: str) -> Iterator[Any]:
    """A file to write to that takes nothing."""
    if kind == "full":
        with Path("/dev/full").open("w") as file:
            yield file
    else:
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as file:
            yield file


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("kind", ["full", "gone"])
def test_a_server_whose_words_nobody_takes_serves_and_ends_well(tmp_path: Path, kind: str, log_format: str) -> None:
    with nobody(kind) as output:
        server = Running(log_format=log_format, stdout=output, stderr=output)
    for _ in range(1200):
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health/ready", trust_env=False).status_code == 200:
                break
        assert server.process.poll() is None
        time.sleep(0.05)
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        for _ in range(20):
            assert client.post("/v1/embeddings", json={"input": "x"}).status_code == 200
    server.process.terminate()
    assert server.process.wait(60) == 0


def test_the_log_says_that_the_start_is_complete_when_it_is(tmp_path: Path) -> None:
    words = "Application startup complete."
    with (tmp_path / "log").open("w") as log:
        server = Running(WAITING.format(str(tmp_path / "go")), stderr=log).listening()
    before = (tmp_path / "log").read_text()
    assert "Listening on" in before
    assert words not in before
    (tmp_path / "go").touch()
    server.ready()
    assert (tmp_path / "log").read_text().count(words) == 1
    server.process.terminate()
    assert server.process.wait(60) == 0
    assert server.process.stdout is not None
    server.process.stdout.close()


def test_who_is_open_to_all_is_told_once_and_others_are_not(tmp_path: Path) -> None:
    words = "There is no key, and every address of this machine is listened on"
    for options, times in (
        ({"host": "0.0.0.0"}, 1),
        ({"host": "0.0.0.0", "api_key": "k"}, 0),
        ({"host": "127.0.0.1"}, 0),
        ({"uds": str(tmp_path / "socket")}, 0),
    ):
        _, log = Running(**options).ready().stop()
        assert log.count(words) == times, options


def serve(*words: str, **environment: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of `serve` with these words, and the lines of its standard error, each of them an object."""
    ended = subprocess.run(
        [sys.executable, "-m", "poolhouse.cli", "serve", "--port", str(free_port()), "--host", "127.0.0.1", *words],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert all(isinstance(line, dict) and {"time", "level", "logger", "message"} <= set(line) for line in lines)
    return ended.returncode, lines


@pytest.mark.parametrize(
    ("words", "environment", "file", "said"),
    [
        (["--log-format", "json", "./nosuch", "--enforce-eager"], {}, None, "nosuch does not exist"),
        (["--log-format=json", "--no-such-option", "5"], {}, None, "no"),
        (["--log_format", "json", "--max-json-depth", "many"], {}, None, "--max-json-depth"),
        ([], {"POOLHOUSE_LOG_FORMAT": "json", "POOLHOUSE_API_KEY": ""}, None, "POOLHOUSE_API_KEY"),
        ([], {}, "log-format: json\nport: [", "is not valid YAML"),
        ([], {}, "log_format: 'json'\nprot: 5", "Did you mean 'port'?"),
        (["--log-format", "json", "--config", "nowhere.yaml"], {}, None, "nowhere.yaml"),
    ],
)
def test_a_start_that_fails_says_so_in_json(
    tmp_path: Path, words: list[str], environment: dict[str, str], file: str | None, said: str
) -> None:
    if file is not None:
        (tmp_path / "serve.yaml").write_text(file)
        words = [*words, "--config", str(tmp_path / "serve.yaml")]
    status, lines = serve(*words, **environment)
    assert status in (1, 2)
    assert [line["level"] for line in lines if said in line["message"]] == ["error"], lines
    if "--enforce-eager" in words:
        assert [line["level"] for line in lines if "enforce_eager" in line["message"]] == ["warning"]


def test_whatever_is_written_to_standard_error_becomes_json() -> None:
    script = r"""
import logging, sys, threading, warnings
from poolhouse.cli import process
process.speak_json()
process.speak_json()
warnings.warn("a warning\nof two lines")
logging.getLogger("stranger").warning("a log of %s", "somebody")
sys.stderr.write("part, ")
print("and the rest\nnext\n\n", file=sys.stderr)
print("{not json}", '{"whole": 1}', "[1]", "\udce9\"", sep="\n", file=sys.stderr)
print("10 %\r20 %\r30 %", file=sys.stderr)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
class Bad:
    def __del__(self): raise KeyError("late")
Bad()
sys.stderr.write("no line end")
raise RuntimeError("the end\nof it")
"""
    ended = run(script, env={**os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape"})
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert all(isinstance(line, dict) for line in lines)
    assert [line.get("message") for line in lines] == [
        "a warning\nof two lines",
        "a log of somebody",
        "part, and the rest",
        "next",
        "{not json}",
        None,
        "[1]",
        '\udce9"',
        "30 %",
        "ZeroDivisionError: division by zero",
        "KeyError: 'late'",
        "RuntimeError: the end\nof it",
        "no line end",
    ]
    assert ["Traceback" in line["error"] for line in lines if "error" in line] == [True] * 3
    assert ended.returncode == 1


@pytest.mark.parametrize(
    ("words", "environment", "file", "wanted"),
    [
        ([], {}, None, False),
        (["--log-format", "json"], {}, None, True),
        (["--log-format", "text", "--log-format=json"], {}, None, True),
        (["--log-format"], {}, None, False),
        (["--log-format", "text"], {"POOLHOUSE_LOG_FORMAT": "json"}, "log-format: json", False),
        ([], {"POOLHOUSE_LOG_FORMAT": "json"}, None, True),
        ([], {"POOLHOUSE_LOG_FORMAT": "json"}, "port: 1", True),
        ([], {"POOLHOUSE_LOG_FORMAT": "json"}, "log-format: text", False),
        ([], {}, 'log_format  : "json"', True),
        ([], {}, "# log-format: json", False),
    ],
)
def test_the_format_is_known_before_options_are_read(
    tmp_path: Path, words: list[str], environment: dict[str, str], file: str | None, wanted: bool
) -> None:
    if file is not None:
        (tmp_path / "serve.yaml").write_text(file)
        environment = {**environment, "POOLHOUSE_CONFIG": str(tmp_path / "serve.yaml")}
    assert wants_json(words, environment) is wanted


def test_torch_is_loaded_beside_other_imports() -> None:
    script = """
import sys, threading
from poolhouse.cli import process
process.begin(["serve"])
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join()
assert "torch" not in sys.modules
if sys.platform == "linux":
    assert "libtorch_cpu.so" in open("/proc/self/maps").read()
import torch
assert torch.ones(3).sum() == 3
process.begin(["serve"])
"""
    ended = run(script)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_garbage_is_collected_again_once_models_are_there() -> None:
    script = """
import gc
from poolhouse.cli import process
process.begin(["serve"])
assert not gc.isenabled()
from poolhouse.server.process.run import _Server
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
_Server(lambda: [FakeEngine()], ServerSettings(host="127.0.0.1", port=0))._load()
assert gc.isenabled()
assert gc.get_freeze_count() > 10000
"""
    ended = run(script)
    assert (ended.returncode, ended.stderr) == (0, "")
