"""Options from the command line, the file of --config and the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from poolhouse import kernels
from poolhouse.cli.sources import _of_kubernetes, gather
from poolhouse.errors import ConfigError
from poolhouse.settings import ServerSettings, Settings, known_options
from tests.checkpoints import save_checkpoint
from tests.server.running import free_port

FILE = """
# What `poolhouse serve --config` reads.
port: 1111
max-body-bytes: 2000
allowed_origins: [https://a.example, https://b.example]
dtype: float32
max-model-len: 64
models:
  - one
  - {model: two, served-model-name: zwei, pooler-config: {pooling_type: CLS}, max_model_len: 32}
  - model: three
    served_model_name: [drei, tres]
    renderer-num-workers: 3
    hf_overrides:
      is_matryoshka: true
"""


def gathered(
    tmp_path: Path,
    file: str | None = None,
    models: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
    **options: Any,
) -> tuple[ServerSettings, tuple[Settings, ...]]:
    if file is not None:
        (tmp_path / "serve.yaml").write_text(file)
    return gather(models, options, tmp_path / "serve.yaml" if file is not None else None, environment or {})[:2]


def test_a_file_says_what_the_line_could(tmp_path: Path) -> None:
    server, (one, two, three) = gathered(tmp_path, FILE)
    assert (server.port, server.max_body_bytes) == (1111, 2000)
    assert server.allowed_origins == ("https://a.example", "https://b.example")
    assert [model.model for model in (one, two, three)] == ["one", "two", "three"]
    assert [model.max_model_len for model in (one, two, three)] == [64, 32, 64]
    assert [model.names for model in (one, two, three)] == [(), ("zwei",), ("drei", "tres")]
    assert two.pooler_config == {"pooling_type": "CLS"}
    assert (three.tokenizer_workers, three.hf_overrides) == (3, {"is_matryoshka": True})
    assert {model.dtype for model in (one, two, three)} == {"float32"}


def test_the_line_wins_over_the_file_and_that_over_the_environment(tmp_path: Path) -> None:
    environment = {
        "POOLHOUSE_PORT": "3333", "POOLHOUSE_HOST": "h", "POOLHOUSE_MAX_MODEL_LEN": "9", "POOLHOUSE_SEED": "5",
        "POOLHOUSE_MODEL": "env", "POOLHOUSE_POOLER_CONFIG": '{"pooling_type": "MEAN"}', "POOLHOUSE_LOG_FORMAT": "",
        "POOLHOUSE_DISABLE_ACCESS_LOG": "1",
    }  # fmt: skip
    server, engines = gathered(tmp_path, FILE, environment=environment, port="2222", max_model_len="16")
    assert (server.port, server.host, server.log_format, server.disable_access_log) == (2222, "h", "text", True)
    assert [engine.max_model_len for engine in engines] == [16, 16, 16]
    assert [engine.seed for engine in engines] == [5, 5, 5]
    assert [engine.pooler_config["pooling_type"] for engine in engines] == ["MEAN", "CLS", "MEAN"]
    assert [engine.model for engine in gathered(tmp_path, FILE, ("line",))[1]] == ["line"]
    assert [engine.model for engine in gathered(tmp_path, environment=environment)[1]] == ["env"]
    assert [engine.model for engine in gathered(tmp_path, "model: filed", environment=environment)[1]] == ["filed"]
    assert [engine.model for engine in gathered(tmp_path, "")[1]] == [None]


def keys(server: ServerSettings) -> list[str]:
    return [key.get_secret_value() for key in server.api_key]


def test_keys_come_from_the_environment_under_two_names(tmp_path: Path) -> None:
    both = {"VLLM_API_KEY": "theirs", "POOLHOUSE_API_KEY": "ours,also"}
    assert keys(gathered(tmp_path, environment={"VLLM_API_KEY": "theirs"})[0]) == ["theirs"]
    assert keys(gathered(tmp_path, environment=both)[0]) == ["ours", "also"]
    assert keys(gathered(tmp_path, environment=both, api_key="line")[0]) == ["line"]
    assert keys(gathered(tmp_path, environment={"POOLHOUSE_API_KEY": "\ufeffk \r\n"})[0]) == ["k"]
    # Whoever names a key elsewhere is not open to all.
    assert keys(gathered(tmp_path, environment={"VLLM_API_KEY": ""}, api_key="line")[0]) == ["line"]


@pytest.mark.parametrize(
    ("environment", "file"),
    [
        *(({variable: value}, None) for variable in ("VLLM_API_KEY", "POOLHOUSE_API_KEY") for value in ("", " ", ",", "[]")),
        *(({}, f"api-key: {value}") for value in ("", "''", "[]", "[k, '']", "~", "[k, ~]", "' '", "{}", "yes")),
        ({}, "api_key:\n  -\n"),
    ],
)  # fmt: skip
def test_no_key_where_one_was_meant_opens_no_server(
    tmp_path: Path, environment: dict[str, str], file: str | None
) -> None:
    with pytest.raises(ConfigError, match=r"api[-_]key(\.\d)? in |API_KEY|--api-key"):
        gathered(tmp_path, file, environment=environment)


@pytest.mark.parametrize(
    ("written", "read"),
    [("12345", ["12345"]), ("0123", ["0123"]), ("1e3", ["1e3"]), ("[1_000, 0x1f]", ["1_000", "0x1f"]),
     ("2024-01-31", ["2024-01-31"]), ('"a b"', ["a b"]), ("a,b", ["a", "b"])],
)  # fmt: skip
def test_a_key_of_a_file_is_taken_as_it_is_written(tmp_path: Path, written: str, read: list[str]) -> None:
    assert keys(gathered(tmp_path, f"api-key: {written}")[0]) == read


@pytest.mark.parametrize("protocol", ["tcp", "udp", "sctp"])
@pytest.mark.parametrize("service", ["POOLHOUSE", "POOLHOUSE_API", "POOLHOUSE_MAX_MODEL"])
def test_what_kubernetes_writes_of_a_service_is_no_option(tmp_path: Path, protocol: str, service: str) -> None:
    port = f"{service}_PORT_80_{protocol.upper()}"
    variables = {
        f"{service}_SERVICE_HOST": "10.0.0.1",
        f"{service}_SERVICE_PORT": "80",
        f"{service}_SERVICE_PORT_HTTP_METRICS": "80",
        f"{service}_PORT": f"{protocol}://10.0.0.1:80",
        port: f"{protocol}://10.0.0.1:80",
        f"{port}_PROTO": protocol,
        f"{port}_PORT": "80",
        f"{port}_ADDR": "10.0.0.1",
    }
    nothing = gathered(tmp_path)
    assert gathered(tmp_path, environment=variables) == nothing
    # An option beside them is read nevertheless.
    assert gathered(tmp_path, environment={**variables, "POOLHOUSE_HOST": "h"})[0].host == "h"


def test_no_option_is_taken_for_a_service(tmp_path: Path) -> None:
    for name in known_options():
        assert not _of_kubernetes(f"POOLHOUSE_{name.upper()}", "8000"), name


def test_a_misspelt_variable_is_refused(tmp_path: Path) -> None:
    words = "POOLHOUSE_MAX_MODEL_LENG is no option. Did you mean POOLHOUSE_MAX_MODEL_LEN?"
    with pytest.raises(ConfigError, match=words):
        gathered(tmp_path, environment={"POOLHOUSE_MAX_MODEL_LENG": "5"})
    with pytest.raises(ConfigError, match="POOLHOUSE_API_KY is no option"):
        gathered(tmp_path, environment={"POOLHOUSE_API_KY": "secret"})
    for name in ("POOLHOUSE_OF_OUR_OWN", kernels.VARIABLE):
        assert gathered(tmp_path, environment={name: "0"}) == gathered(tmp_path)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("prot: 80", "serve.yaml: there is no option 'prot'. Did you mean 'port'?"),
        ("models: [{model: m, max-model-leng: 5}]", "there is no option 'max-model-leng'. Did you mean 'max-model-len'?"),
        ("models: [{model: m, port: 5}]", "'port' is an option of the server, not of one model"),
        ("models: [{dtype: auto}]", "needs model: NAME"),
        ("models: [5]", "options are a mapping"),
        ("models: m", "models: is a list"),
        ("model: a\nmodels: [b]", "model: or models:, not both"),
        ("config: other.yaml", "no option 'config'"),
        ("- port", "options are a mapping"),
        ("port: [", "is not valid YAML"),
        ("port: 1\nport: 2", "port stands twice"),
        ("a: !!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("port: 99999", "port in "),
        ("hf-overrides: '{'", "serve.yaml: hf-overrides is not valid JSON"),
        ("models: [a, b]\nserved-model-name: x", "with several models it gives one name to each"),
        ("models: [a, {model: b, served-model-name: a}]", "'a' would name a and b"),
        ("models: [a, a]", "'a' would name a and a"),
        ("models: [a, b]\nlora-modules: {law: x}", "'law' would name a and b"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path: Path, file: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gathered(tmp_path, file)
    assert words in str(caught.value)


def test_a_wrong_value_of_a_variable_is_said_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^POOLHOUSE_PORT: Input should be a valid integer"):
        gathered(tmp_path, environment={"POOLHOUSE_PORT": "eighty"})
    with pytest.raises(ConfigError, match="POOLHOUSE_HF_OVERRIDES is not valid JSON"):
        gathered(tmp_path, environment={"POOLHOUSE_HF_OVERRIDES": "{"})


def test_names_go_to_several_models_in_order(tmp_path: Path) -> None:
    _, engines = gathered(tmp_path, models=("a", "b"), served_model_name="x,y")
    assert [(engine.model, engine.names) for engine in engines] == [("a", ("x",)), ("b", ("y",))]
    with pytest.raises(ConfigError, match=r"got \('x',\) for 2 models. More names of one model go into its entry"):
        gathered(tmp_path, models=("a", "b"), served_model_name="x")
    _, (one,) = gathered(tmp_path, models=("a",), served_model_name="x,y")
    assert one.names == ("x", "y")


def test_several_models_are_chosen_by_name(tmp_path: Path) -> None:
    """A file, the environment and the line at once, around real models and a real socket."""
    save_checkpoint(tmp_path / "tiny", "bert, wordpiece")
    port = free_port()
    (tmp_path / "serve.yaml").write_text(
        f"host: 127.0.0.1\nport: 1\nmodels:\n  - {{model: {tmp_path / 'tiny'}, served-model-name: [tiny, small], convert: embed}}\n"
        f"  - {{model: {tmp_path / 'tiny'}, served-model-name: labels, hf-overrides: {{architectures: [BertModel]}}}}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "poolhouse.cli", "serve", "--config", str(tmp_path / "serve.yaml"), "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": "k"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == f"Poolhouse serves tiny, labels on http://127.0.0.1:{port}\n"
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"api-key": "k"}, trust_env=False) as http:
        assert httpx.get(http.base_url.join("/v1/models"), trust_env=False).status_code == 401
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny", "small", "labels"]
        for name, said in (("tiny", "tiny"), ("small", "tiny"), ("labels", "labels")):
            reply = http.post("/v1/embeddings", json={"input": "hello", "model": name})
            assert (reply.status_code, reply.json()["model"]) == (200, said)
        assert http.post("/v1/embeddings", json={"input": "x", "model": "none"}).status_code == 404
    process.terminate()
    log = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "Traceback" not in log
