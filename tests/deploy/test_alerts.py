"""The alerts, by Prometheus' own tool: they can be read, and fire when they should. `.ci/promtool` fetches it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.deploy.rendered import CHART, DEPLOY

ALERTS = CHART / "files" / "alerts.yaml"
TESTS = Path(__file__).parent / "alerts_test.yaml"
PROMTOOL = shutil.which("promtool") or shutil.which("promtool", path=str(Path(sys.executable).parent))

with_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, which .ci/promtool fetches")


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)


@with_promtool
def test_alerts_fire_when_they_should() -> None:
    done = promtool("test", "rules", TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


@with_promtool
def test_prometheus_reads_alerts_and_config(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "compose" / "prometheus.yaml", tmp_path / "prometheus.yml")
    shutil.copy(ALERTS, tmp_path)
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 rules found" in done.stdout


@with_promtool
def test_a_wrong_alert_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "deploy" / "chart" / "files").mkdir(parents=True)
    (tmp_path / "tests" / "deploy").mkdir(parents=True)
    text = ALERTS.read_text()
    assert "> 0.02" in text
    (tmp_path / "deploy" / "chart" / "files" / "alerts.yaml").write_text(text.replace("> 0.02", "> 0.2"))
    shutil.copy(TESTS, tmp_path / "tests" / "deploy")
    done = promtool("test", "rules", tmp_path / "tests" / "deploy" / TESTS.name)
    assert done.returncode != 0
    assert "PoolhouseErrors" in done.stdout + done.stderr


def test_each_alert_has_a_time_that_deserves_it_and_one_that_does_not() -> None:
    alerts = [rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    asked = [test for case in yaml.safe_load(TESTS.read_text())["tests"] for test in case["alert_rule_test"]]
    for alert in alerts:
        fires = {bool(test.get("exp_alerts")) for test in asked if test["alertname"] == alert}
        assert fires == {True, False}, alert
    assert {test["alertname"] for test in asked} == set(alerts)


def test_each_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("critical", "warning", "info")
            assert set(rule["annotations"]) == {"summary", "description"}
            assert rule["for"]
