"""The chart as Helm renders it, and what a cluster would check of each object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import helm_python
import jsonschema_rs
import yaml

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
CHART = DEPLOY / "chart"
# From the first version that the chart allows to the last that the package knows.
VERSIONS = tuple(f"1.{minor}" for minor in range(30, 38))
# Kinds that operators bring: schemas made of their custom resource definitions (prometheus-operator 0.80, KEDA 2.16).
_OF_OPERATORS = Path(__file__).parent / "schemas"

Manifest = dict[str, Any]


def render(values: Mapping[str, Any], *, name: str = "search", namespace: str = "texts") -> dict[str, Manifest]:
    """The objects of a release by their kinds, the dashboard as "Dashboard"; each kind occurs once.

    Raises:
        HelmError: the values do not fit.
    """
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        files = chart.render(dict(values), name=name, namespace=namespace)
    objects: dict[str, Manifest] = {}
    for path, text in files.items():
        if path.endswith(".txt"):
            continue
        for manifest in yaml.safe_load_all(text):
            if manifest is not None:
                kind = "Dashboard" if path.endswith("dashboard.yaml") else manifest["kind"]
                assert kind not in objects, f"{path}: a second {kind}"
                objects[kind] = manifest
    return objects


def check(manifest: Manifest, version: str) -> None:
    """Hold an object against the schema of its kind in that version of Kubernetes; unknown fields are refused.

    Raises:
        ValidationError: of jsonschema_rs; it says where.
    """
    _validator(manifest["apiVersion"], manifest["kind"], version).validate(manifest)


@cache
def _validator(api: str, kind: str, version: str) -> jsonschema_rs.Validator:
    own = _OF_OPERATORS / f"{kind}.json"
    if own.is_file():
        return jsonschema_rs.validator_for(json.loads(own.read_text()))
    folder = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    group, _, of_group = api.rpartition("/")
    name = "-".join([kind.lower(), *([group.partition(".")[0]] if group else []), of_group])
    return jsonschema_rs.validator_for(
        json.loads((folder / f"{name}.json").read_text()),
        retriever=lambda uri: json.loads((folder / uri.rpartition("/")[2]).read_text()),
    )


def config_of(objects: Mapping[str, Manifest]) -> str:
    """The file of --config."""
    text: str = objects["ConfigMap"]["data"]["config.yaml"]
    return text


def pod_of(objects: Mapping[str, Manifest]) -> Manifest:
    """The pod's spec."""
    pod: Manifest = objects["Deployment"]["spec"]["template"]["spec"]
    return pod


def server_of(objects: Mapping[str, Manifest]) -> Manifest:
    """The container of the server."""
    (container,) = pod_of(objects)["containers"]
    return dict(container)
