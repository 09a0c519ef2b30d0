"""What the documents say of deployment: commands name files, arguments and objects that are there, and values fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from poolhouse.cli.sources import gather
from poolhouse.settings import known_options
from tests.deploy.rendered import CHART, DEPLOY, config_of, render
from tests.docs.pages import OF_CLUSTERS, PAGES, Block, blocks, commands

ROOT = DEPLOY.parent
PAGE = "docs/deploy.md"


def _docker(words: list[str]) -> None:
    flags = {flag: value for flag, value in pairwise(words) if flag.startswith("-")}
    if "-f" in flags:
        assert (ROOT / flags["-f"]).is_file()
    if words[0] == "build":
        text = (DEPLOY / "Dockerfile").read_text()
        for argument in (value for flag, value in pairwise(words) if flag == "--build-arg"):
            assert f"ARG {argument.split('=')[0]}" in text
        assert words[-1] == "."
    elif words[0] == "run":
        _, *line = words[next(place for place, word in enumerate(words) if word.split(":")[0] == "poolhouse") :]
        assert line[0] in ("serve", "run")
        assert {word[2:].replace("-", "_") for word in line if word.startswith("--")} <= known_options()
    else:
        assert words[0] == "compose"
        services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
        if "--profile" in flags:
            assert flags["--profile"] in {profile for one in services.values() for profile in one.get("profiles", ())}
        assert set(words[words.index("up") + 1 :]) <= set(services)


def _helm(words: list[str]) -> None:
    assert words[:2] == ["upgrade", "--install"]
    assert (ROOT / words[3] / "Chart.yaml").is_file()
    assert words[4:] in ([], ["-f", "values.yaml"])


def _kubectl(words: list[str]) -> None:
    """Objects are those of the release that the page installs."""
    (release,) = (words[3] for block in blocks(PAGE) for words in lines_of(block) if words[0] == "helm")
    (values,) = (block for block in blocks(PAGE) if block.text.startswith("# values.yaml"))
    objects = render(yaml.safe_load(values.text), name=release)
    for kind, name in re.findall(r"\b(deployment|service)/(\S+)", " ".join(words)):
        assert objects[kind.capitalize()]["metadata"]["name"] == name
    if words[0] == "create":
        settings = yaml.safe_load((CHART / "values.yaml").read_text())["apiKey"] | yaml.safe_load(values.text)["apiKey"]
        assert words[1:4] == ["secret", "generic", settings["existingSecret"]]
        entries = {word.split("=")[1] for word in words if word.startswith("--from-file")}
        assert entries == {settings["key"], settings["metricsKey"]}
    else:
        assert words[0] in ("rollout", "port-forward", "apply", "wait")
    files = [word for flag, word in pairwise(words) if flag == "-f"]
    assert all((ROOT / file).is_file() for file in files)
    job = yaml.safe_load((DEPLOY / "job.yaml").read_text())["metadata"]["name"]
    assert set(re.findall(r"\bjob/(\S+)", " ".join(words))) <= {job}


_CHECKS: dict[str, Callable[[list[str]], None]] = {"docker": _docker, "helm": _helm, "kubectl": _kubectl}


def lines_of(block: Block) -> list[list[str]]:
    return [words for words, _ in commands(block)] if block.language in ("sh", "console") else []


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_is_there(page: str) -> None:
    for block in blocks(page):
        for program, *words in lines_of(block):
            if program in OF_CLUSTERS:
                _CHECKS[program](words)


def test_the_values_of_the_page_fit_the_chart(tmp_path: Path) -> None:
    (values,) = (yaml.safe_load(block.text) for block in blocks(PAGE) if block.text.startswith("# values.yaml"))
    objects = render(values)
    config = tmp_path / "config.yaml"
    config.write_text(config_of(objects))
    _, (settings,), *_ = gather([], {}, config, {})
    assert settings.dtype == values["config"]["dtype"]
    text = (ROOT / PAGE).read_text()
    known = yaml.safe_load((CHART / "values.yaml").read_text())
    for name in re.findall(r"`((?:metrics|probes|autoscaling|apiKey|networkPolicy|resources|image)\.\w[\w.]*)`", text):
        place: Any = known
        for part in name.split("."):
            assert part in place, name
            place = place[part]


def test_the_config_of_the_unit_fits_the_server(tmp_path: Path) -> None:
    (block,) = (block for block in blocks(PAGE) if block.text.startswith("# config.yaml"))
    config = tmp_path / "config.yaml"
    config.write_text(block.text)
    server, *_ = gather([], {}, config, {})
    # Where systemd puts the credentials of a unit of this name.
    unit = (DEPLOY / "poolhouse.service").read_text()
    (name,) = re.findall(r"^LoadCredential=(\w+):", unit, re.MULTILINE)
    assert server.api_key_file == f"/run/credentials/poolhouse.service/{name}"
    (read,) = re.findall(r"^ExecStart=.* --config (\S+)$", unit, re.MULTILINE)
    assert f" {read}\n" in (ROOT / PAGE).read_text()


def test_every_alert_is_explained() -> None:
    alerts = {rule["alert"] for group in yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
              for rule in group["rules"]}  # fmt: skip
    assert set(re.findall(r"^\| `(Poolhouse\w+)` \|", (ROOT / PAGE).read_text(), re.MULTILINE)) == alerts


def test_costs_are_those_of_the_measured_rates() -> None:
    """The table of costs follows from docs/performance.md, and the formula from the table."""
    figures = (ROOT / "docs" / "performance.md").read_text()
    rows = re.findall(r"^\| (float32|bfloat16|int8) \| ([\d.]+) \| ([\d,]+) \| (\d+) \|$", (ROOT / PAGE).read_text(), re.MULTILINE)  # fmt: skip
    assert [row[0] for row in rows] == ["float32", "bfloat16", "int8"]
    for dtype, texts, tokens, hours in rows:
        work = re.escape(f"ragged texts of 96 tokens on average, minilm (6 x 384), texts/s | {dtype} | {texts} |")
        assert re.search(rf"^\| \d+ {work}", figures, re.MULTILINE)
        per_core = float(texts) * 96 / 2
        assert abs(per_core - int(tokens.replace(",", ""))) < 6
        assert round(100e6 * 96 / per_core / 3600) == int(hours)
