"""The job that takes a corpus through a model on a cluster: Kubernetes takes it, and its words do the work of a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkpoints import save_checkpoint
from tests.cli.in_process import Run, said
from tests.deploy.rendered import DEPLOY, VERSIONS, check, pod_of, render, server_of

__all__ = ["said"]  # a fixture

JOB: dict[str, Any] = yaml.safe_load((DEPLOY / "job.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_the_job(version: str) -> None:
    check(JOB, version)


def test_it_has_no_more_rights_than_the_server() -> None:
    objects = render({})
    assert POD["securityContext"] == pod_of(objects)["securityContext"]
    assert CONTAINER["securityContext"] == server_of(objects)["securityContext"]
    assert CONTAINER["image"] == server_of(objects)["image"]
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


def test_its_words_take_a_part_through_the_model_and_no_other(tmp_path: Path, said: Run) -> None:
    save_checkpoint(tmp_path / "models" / "model", "bert, wordpiece")
    for part in ("0", "1"):
        (tmp_path / "corpus" / part).mkdir(parents=True)
        (tmp_path / "corpus" / part / "texts.txt").write_text(
            f"The moon pulls the sea.\n{'word ' * 100}\nPart {part}.\n"
        )
    writable = {mount["mountPath"] for mount in CONTAINER["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/vectors", "/tmp"}

    def run(part: str) -> int:
        words = [word.replace("$(JOB_COMPLETION_INDEX)", part) for word in CONTAINER["args"]]
        for mount in ("/corpus", "/models", "/vectors"):
            words = [word.replace(f"{mount}/", f"{tmp_path}{mount}/") for word in words]
        return said(*words).status

    assert run("1") == 0
    assert [path.name for path in (tmp_path / "vectors").iterdir()] == ["1"]
    # Again, as after a node was taken away: it is done, and stays so.
    assert run("1") == 0
    manifest = json.loads((tmp_path / "vectors" / "1" / "manifest.json").read_text())
    assert manifest["rows"] == 3
    # A part without a folder ends with the status that is not tried again.
    (never,) = (rule for rule in JOB["spec"]["podFailurePolicy"]["rules"] if rule["action"] == "FailIndex")
    assert never["onExitCodes"]["containerName"] == CONTAINER["name"]
    assert run("7") in never["onExitCodes"]["values"]
