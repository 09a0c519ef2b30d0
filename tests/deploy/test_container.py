"""The image's Dockerfile, and the compose file: they fit the project, the chart and the server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from poolhouse.cli.sources import gather
from tests.deploy.rendered import DEPLOY, pod_of, render, server_of
from tests.server.running import Running, free_port, running

ROOT = DEPLOY.parent
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(name: str) -> Iterator[str]:
    """What stands behind an instruction, its lines joined, stage after stage."""
    lines = re.sub(r"\\\n(\s*#[^\n]*\n)*\s*", "", DOCKERFILE).splitlines()
    yield from (line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} "))


def test_hadolint_finds_no_fault() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = subprocess.run([hadolint, "-"], input="FROM python\nUSER\n", capture_output=True, text=True, check=False)
    assert wrong.returncode != 0


def test_what_is_copied_is_there_and_reaches_the_build() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignored[0] == "*"
    let_through = {line[1:] for line in ignored if line.startswith("!")}
    copied = [name for words in instructions("COPY") if "--from" not in words for name in shlex.split(words)[:-1]]
    assert set(copied) == let_through
    assert all((ROOT / name).exists() for name in copied)
    # What the build of the wheel reads.
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]
    assert {hook["custom"]["path"], PROJECT["readme"], "src", "pyproject.toml"} <= let_through


def test_the_arguments_of_the_build_fit_the_project() -> None:
    defaults = dict(words.split("=", 1) for words in instructions("ARG"))
    assert set(defaults["EXTRAS"].split(",")) <= set(PROJECT["optional-dependencies"])
    (version,) = re.findall(r"^python:(3\.\d+)-", defaults["PYTHON_IMAGE"])
    assert tuple(map(int, version.split("."))) >= tuple(
        map(int, PROJECT["requires-python"].removeprefix(">=").split("."))
    )
    assert re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert json.loads(list(instructions("ENTRYPOINT"))[-1]) == ["poolhouse"]
    assert "poolhouse" in PROJECT["scripts"]


def test_the_image_runs_as_the_chart_says() -> None:
    objects = render({})
    (user,) = instructions("USER")
    security = pod_of(objects)["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    command, *models = json.loads(list(instructions("CMD"))[-1])
    assert command == server_of(objects)["args"][0] == "serve"
    assert models == yaml.safe_load((DEPLOY / "chart" / "values.yaml").read_text())["models"]
    assert list(instructions("EXPOSE")) == [str(server_of(objects)["ports"][0]["containerPort"])]


def health_check(port: int) -> int:
    """What the image's own check ends with, for a server on this port."""
    (words,) = re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", DOCKERFILE.replace("\\\n", ""), re.MULTILINE)
    _, *arguments = json.loads(words)
    assert "8000" in arguments[-1]
    arguments[-1] = arguments[-1].replace("8000", str(port))
    return subprocess.run([sys.executable, *arguments], stderr=subprocess.DEVNULL, timeout=60, check=False).returncode


def test_the_image_knows_whether_its_server_is_well() -> None:
    assert health_check(free_port()) != 0
    with running(api_key="secret") as server:
        assert health_check(server.port) == 0
    loading = Running("time.sleep(60); engines = []").listening()
    try:
        assert health_check(loading.port) != 0
    finally:
        loading.process.kill()
        loading.process.communicate()


def composed(**environment: str) -> str:
    """The compose file with its variables filled in."""
    text = (DEPLOY / "compose.yaml").read_text()
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: environment.get(found[1], found[2]), text)


def services() -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = yaml.safe_load(composed())["services"]
    return content


def test_the_compose_file_is_one() -> None:
    # Its parts are put together here: the checker knows no merge keys, which compose does.
    text = yaml.safe_dump(yaml.safe_load(composed()))
    assert sorted(compose_spec.PyCompose.from_yaml(text).service_names()) == ["cpu", "gpu", "grafana", "prometheus"]
    for right, wrong in (("40s", "40 parsecs"), ("read_only: true", "read_only: 7"), ("count: 1", "count: [1]")):
        assert right in text
        with pytest.raises(ValueError, match=r"services|duration|cpu|gpu"):
            compose_spec.PyCompose.from_yaml(text.replace(right, wrong))


def test_what_compose_mounts_and_builds_is_there() -> None:
    for name, service in services().items():
        for volume in service.get("volumes", ()):
            source, target, *_ = volume.split(":")
            if source.startswith("./") and source != "./models":
                assert (DEPLOY / source).is_file(), f"{name}: {source}"
            assert target.startswith("/")
        if "build" in service:
            build = service["build"]
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
            declared = {words.split("=")[0] for words in instructions("ARG")}
            assert set(build.get("args", {})) <= declared


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_compose_gives_the_server_options_that_it_has_and_time_to_stop(name: str) -> None:
    service = services()[name]
    server, (settings,), *_ = gather(service["command"][1:], {}, None, service["environment"])
    assert settings.model == "/models/model"
    assert float(service["stop_grace_period"].removesuffix("s")) > server.shutdown_seconds + 5
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    (published,) = service["ports"]
    # This machine alone, until the user says otherwise: there is no key.
    assert published == f"127.0.0.1:8000:{server.port}"


def test_prometheus_and_grafana_of_compose_find_each_other() -> None:
    parts = services()
    (scrape,) = yaml.safe_load((DEPLOY / "compose" / "prometheus.yaml").read_text())["scrape_configs"]
    assert scrape["job_name"] == "poolhouse"
    (target,) = scrape["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert all(host in parts[name]["networks"]["default"]["aliases"] for name in ("cpu", "gpu"))
    assert port == "8000"
    (source,) = yaml.safe_load((DEPLOY / "compose" / "grafana-datasource.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((DEPLOY / "compose" / "grafana-dashboards.yaml").read_text())["providers"]
    mounted = [volume.split(":")[1] for volume in parts["grafana"]["volumes"]]
    home = parts["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home in mounted
    assert str(Path(home).parent) == provider["options"]["path"]


def unit() -> str:
    return (DEPLOY / "poolhouse.service").read_text()


def test_systemd_takes_the_unit_and_leaves_it_few_rights(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze, of Debian's package systemd")
    path = tmp_path / "poolhouse.service"
    path.write_text(unit().replace("/opt/poolhouse/bin/poolhouse", sys.executable))

    def verify() -> subprocess.CompletedProcess[str]:
        return subprocess.run([analyze, "verify", path], capture_output=True, text=True, timeout=60, check=False)

    done = verify()
    assert (done.returncode, done.stderr) == (0, "")
    rated = subprocess.run(
        [analyze, "security", "--offline=true", "--threshold=20", path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert rated.returncode == 0, rated.stdout[-2000:]
    path.write_text(path.read_text().replace("Type=exec", "Type=execute"))
    assert "execute" in verify().stderr


def test_the_unit_waits_for_the_server_and_reads_no_key_from_its_command() -> None:
    fields = dict(re.findall(r"^(\w+)=(.*)$", unit(), re.MULTILINE))
    _, command, *words = shlex.split(fields["ExecStart"])
    assert (command, words[0]) == ("serve", "--config")
    server, *_ = gather([], {}, None, {})
    assert int(fields["TimeoutStopSec"]) > server.shutdown_seconds + 5
    assert fields["DynamicUser"] == "yes"
    # The server does not speak sd_notify.
    assert fields["Type"] == "exec"
