"""The Helm chart: what it renders fits Kubernetes, and fits the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import helm_python
import httpx
import jsonschema_rs
import pytest
import yaml
from starlette.testclient import TestClient

from poolhouse.cli.sources import gather
from poolhouse.server.app import create_app
from poolhouse.server.process.run import _SECONDS_TO_REFUSE
from poolhouse.settings import ServerSettings
from poolhouse.testing import FakeEngine
from poolhouse.version import __version__
from tests.checkpoints import save_checkpoint
from tests.deploy.rendered import CHART, DEPLOY, VERSIONS, Manifest, check, config_of, pod_of, render, server_of
from tests.server.running import free_port

MONITORED = {
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "rules": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboard": {"enabled": True},
}
PEERS = [{"namespaceSelector": {"matchLabels": {"team": "search"}}}]
# Every branch of every template is in one of them.
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one replica, nothing around it": {
        "replicas": 1,
        "preStopSeconds": 0,
        "podDisruptionBudget": {"enabled": False},
        "config": {"log_format": None, "disable_access_log_for_endpoints": None},
    },
    "closed": {
        "apiKey": {"existingSecret": "keys"},
        "tls": {"existingSecret": "certificate"},
        "networkPolicy": {"enabled": True, "from": PEERS, "egress": [{"to": PEERS, "ports": [{"port": 4318}]}]},
        "serviceAccount": {"name": "texts"},
        "metrics": MONITORED,
    },
    "isolated": {"networkPolicy": {"enabled": True}, "metrics": MONITORED},
    "hpa": {"autoscaling": {"kind": "hpa", "minReplicas": 1, "maxReplicas": 3}},
    "keda": {"autoscaling": {"kind": "keda", "queuedPrompts": 500}, "fullnameOverride": "vectors"},
    "gpu": {
        "gpu": {"count": 1, "runtimeClassName": "nvidia"},
        "rollout": {"maxSurge": 0, "maxUnavailable": 1},
        "nodeSelector": {"accelerator": "h200"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "resources": {"requests": {"cpu": 4}, "limits": {"memory": "16Gi"}},
    },
    "downloaded": {"download": {"enabled": True, "repository": "intfloat/e5-small", "tokenSecret": "hub"}},
    "downloaded into a volume": {
        "download": {"enabled": True, "repository": "intfloat/e5-small", "revision": "abc"},
        "modelVolume": {"persistentVolumeClaim": {"claimName": "models"}},
        "networkPolicy": {"enabled": True, "egress": [{}]},
    },
    "placed": {
        "nameOverride": "pool",
        "image": {"digest": f"sha256:{'0' * 64}", "pullSecrets": [{"name": "registry"}], "pullPolicy": "Always"},
        "models": ["/models/a", {"model": "/models/b", "dtype": "bfloat16"}],
        "modelVolume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}},
        "service": {"type": "LoadBalancer", "port": 80, "annotations": {"example.com/internal": "true"}},
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "topologySpreadConstraints": [{"topologyKey": "rack", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}],
        "podAnnotations": {"example.com/a": "b"},
        "podLabels": {"team": "search"},
        "env": [{"name": "OMP_NUM_THREADS", "value": "2"}],
    },
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_helm_finds_no_fault(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_fits_its_kind(version: str) -> None:
    for values in VALUES.values():
        for manifest in render(values).values():
            check(manifest, version)


@pytest.mark.parametrize(
    ("kind", "break_it"),
    [
        ("Deployment", lambda one: one["spec"]["template"]["spec"]["containers"][0].update(readOnlyRoot=True)),
        ("ServiceMonitor", lambda one: one["spec"]["endpoints"][0].update(intervall="15s")),
        ("PrometheusRule", lambda one: one["spec"]["groups"][0]["rules"][0].update({"for": "soon"})),
        ("NetworkPolicy", lambda one: one["spec"].update(policyTypes="Ingress")),
    ],
)
def test_the_check_finds_what_does_not_fit(kind: str, break_it: Any) -> None:
    manifest = render(VALUES["closed"])[kind]
    check(manifest, VERSIONS[0])
    break_it(manifest)
    with pytest.raises(jsonschema_rs.ValidationError, match=r"intervall|readOnlyRoot|soon|Ingress"):
        check(manifest, VERSIONS[0])


def test_each_part_is_there_when_it_is_asked_for() -> None:
    kinds = {name: set(render(values)) - {"Deployment", "Service", "ConfigMap"} for name, values in VALUES.items()}
    monitored = {"ServiceMonitor", "PrometheusRule", "Dashboard"}
    assert kinds == {
        "defaults": {"PodDisruptionBudget"},
        "one replica, nothing around it": set(),
        "closed": {"PodDisruptionBudget", "NetworkPolicy", *monitored},
        "isolated": {"PodDisruptionBudget", "NetworkPolicy", *monitored},
        # A budget that never lets the only replica go would keep its node for ever.
        "hpa": {"HorizontalPodAutoscaler"},
        "keda": {"PodDisruptionBudget", "ScaledObject"},
        "gpu": {"PodDisruptionBudget"},
        "downloaded": {"PodDisruptionBudget"},
        "downloaded into a volume": {"PodDisruptionBudget", "NetworkPolicy"},
        "placed": {"PodDisruptionBudget"},
    }


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_whatever_selects_pods_selects_these(values: dict[str, Any]) -> None:
    objects = render(values)
    spec = objects["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"].items()
    selectors = [spec["selector"]["matchLabels"], objects["Service"]["spec"]["selector"]]
    selectors += [
        objects[kind]["spec"][field]["matchLabels"]
        for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector"))
        if kind in objects
    ]
    if "ServiceMonitor" in objects:
        # It selects services.
        assert (
            objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
            <= objects["Service"]["metadata"]["labels"].items()
        )
    for selector in selectors:
        assert selector
        assert selector.items() <= labels
    name = objects["Deployment"]["metadata"]["name"]
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        if kind in objects:
            assert objects[kind]["spec"]["scaleTargetRef"]["name"] == name
            # Two that set the number of replicas would fight.
            assert "replicas" not in spec
    ports = {port["name"]: port["containerPort"] for port in server_of(objects)["ports"]}
    assert [port["targetPort"] for port in objects["Service"]["spec"]["ports"]] == list(ports)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_server_takes_its_config(values: dict[str, Any], tmp_path: Path) -> None:
    objects = render(values)
    config = tmp_path / "config.yaml"
    config.write_text(config_of(objects))
    server, models, *_ = gather([], {}, config, {})
    container, pod = server_of(objects), pod_of(objects)
    (port,) = container["ports"]
    assert server.port == port["containerPort"]
    assert server.host == "0.0.0.0"
    assert [model.model for model in models]
    # The pod is given the time that the server takes.
    waits = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert pod["terminationGracePeriodSeconds"] > waits + server.shutdown_seconds + _SECONDS_TO_REFUSE
    # What it reads is mounted, for the number that it runs as.
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    for file, secret in ((server.api_key_file, "apiKey"), (server.ssl_certfile, "tls"), (server.ssl_keyfile, "tls")):
        wanted = values.get(secret, {}).get("existingSecret")
        assert (file is not None) == (wanted is not None)
        if file is not None:
            source = volumes[mounts[str(Path(file).parent)]]["secret"]
            assert source["secretName"] == wanted
            assert source["defaultMode"] == 0o440
            assert Path(file).name in [item["path"] for item in source["items"]]
    assert container["args"][2].startswith(tuple(mounts))
    if "modelVolume" in values or "download" in values:
        assert all(Path(str(model.model)).is_relative_to("/models") for model in models)
        assert mounts["/models"] == "models"


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_every_container_runs_with_few_rights(values: dict[str, Any]) -> None:
    pod = pod_of(render(values))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in (*pod["containers"], *pod.get("initContainers", ())):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"confg": {}}, "confg"),
        ({"image": {"tags": "1"}}, "tags"),
        ({"replicas": -1}, "/replicas"),
        ({"replicas": "two"}, "/replicas"),
        ({"models": []}, "/models"),
        ({"config": {"port": 9000}}, "port"),
        ({"config": {"api-key": "secret"}}, "api-key"),
        ({"config": {"shutdown_seconds": 5}}, "shutdown_seconds"),
        ({"gpu": {"count": -1}}, "/gpu/count"),
        ({"autoscaling": {"kind": "vpa"}}, "/autoscaling/kind"),
        ({"image": {"digest": "sha256:1"}}, "/image/digest"),
        ({"download": {"enabled": True}}, "download.repository"),
        (
            {"download": {"enabled": True, "repository": "a/b"}, "networkPolicy": {"enabled": True}},
            "networkPolicy.egress",
        ),
    ],
)
def test_values_that_do_not_fit_are_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=said):
        render(values)


def test_large_numbers_stay_whole(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(config_of(render({"config": {"max_body_bytes": 1_073_741_824, "request_timeout_seconds": 0.5}})))
    server, *_ = gather([], {}, config, {})
    assert (server.max_body_bytes, server.request_timeout_seconds) == (1_073_741_824, 0.5)


def test_another_config_is_another_pod() -> None:
    def checksum(**values: Any) -> str:
        template = render(values)["Deployment"]["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum(replicas=5)
    assert len({checksum(), checksum(config={"dtype": "bfloat16"}), checksum(shutdownSeconds=31)}) == 3


def test_a_gpu_is_asked_for_beside_what_else_is() -> None:
    assert server_of(render(VALUES["gpu"]))["resources"] == {
        "requests": {"cpu": 4, "memory": "2Gi"},
        "limits": {"cpu": "2", "memory": "16Gi", "nvidia.com/gpu": 1},
    }


def test_the_model_runs_on_each_gpu_of_a_pod(tmp_path: Path) -> None:
    def replicas(**values: Any) -> object:
        (tmp_path / "config.yaml").write_text(config_of(render(values)))
        _, (model, *_), *_ = gather([], {}, tmp_path / "config.yaml", {})
        return model.replicas

    assert replicas(gpu={"count": 8}) == 8
    assert server_of(render({"gpu": {"count": 8}}))["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert replicas(gpu={"count": 8}, config={"replicas": 2}) == 2
    assert replicas(gpu={"count": 1}) == replicas()


@pytest.mark.parametrize("name", ["closed", "defaults"])
def test_probes_and_prometheus_ask_what_the_server_answers(name: str) -> None:
    objects = render({**VALUES[name], "metrics": MONITORED})
    container = server_of(objects)
    closed = name == "closed"
    app = create_app([FakeEngine()], ServerSettings.parse(**({"api_key": "secret"} if closed else {})))
    with TestClient(app) as http:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            assert asked["scheme"] == ("HTTPS" if closed else "HTTP")
            assert asked["port"] == container["ports"][0]["name"]
            assert http.get(asked["path"]).status_code == 200
        (endpoint,) = objects["ServiceMonitor"]["spec"]["endpoints"]
        assert endpoint["scheme"] == ("https" if closed else "http")
        assert http.get(endpoint["path"]).status_code == (401 if closed else 200)
        assert ("authorization" in endpoint) == closed
        shown = {"Authorization": f"{endpoint.get('authorization', {}).get('type')} secret"}
        assert http.get(endpoint["path"], headers=shown).status_code == 200


def test_loading_may_take_as_long_as_is_said() -> None:
    container = server_of(render({"probes": {"startupSeconds": 601, "livenessSeconds": 25}}))
    times = {
        name: container[name]["periodSeconds"] * container[name]["failureThreshold"]
        for name in ("startupProbe", "livenessProbe")
    }
    assert times == {"startupProbe": 605, "livenessProbe": 30}


def test_the_container_serves_until_it_is_stopped(tmp_path: Path) -> None:
    """The container's own words start a server, with its mounts as folders; it answers its probes, and ends in time."""
    save_checkpoint(tmp_path / "models" / "model", "bert, wordpiece")
    (tmp_path / "keys").write_text("# who may ask\nsecret\n")
    objects = render({"apiKey": {"existingSecret": "keys"}})
    container, pod = server_of(objects), pod_of(objects)
    port = free_port()
    config = tmp_path / "config.yaml"
    placed = config_of(objects).replace("/models/", f"{tmp_path}/models/")
    config.write_text(placed.replace("/etc/poolhouse/keys/api-keys", str(tmp_path / "keys")))
    words = [str(config) if word.startswith("/etc/poolhouse") else word for word in container["args"]]
    process = subprocess.Popen(
        [sys.executable, "-m", "poolhouse.cli", *words, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Poolhouse serves"), process.communicate()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert http.get(container[probe]["httpGet"]["path"]).status_code == 200
            body = {"input": "The moon pulls the sea."}
            assert http.post("/v1/embeddings", json=body).status_code == 401
            reply = http.post("/v1/embeddings", json=body, headers={"Authorization": "Bearer secret"})
            assert len(reply.json()["data"]) == 1
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=pod["terminationGracePeriodSeconds"])
        assert process.returncode == 0, log
        assert time.monotonic() - start < pod["terminationGracePeriodSeconds"]
        # As `log_format` says; probes and metrics leave no lines.
        routes = [record.get("route") for record in map(json.loads, log.splitlines()) if "status" in record]
        assert routes == ["/v1/embeddings"] * 2
    finally:
        process.kill()


def test_every_value_is_in_the_schema_and_the_other_way_round() -> None:
    def names(schema: Manifest) -> dict[str, Any]:
        return {
            name: names(inner) if inner.get("additionalProperties") is False else None
            for name, inner in schema["properties"].items()
            if name != "global"
        }

    def shape(values: Any, known: Any) -> Any:
        return {name: shape(values[name], known[name]) for name in known} if known is not None else None

    known = names(json.loads((CHART / "values.schema.json").read_text()))
    # Claims of resources have no default.
    del known["resources"]["claims"]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert shape(values, known) == known
    assert set(values) == set(known)


def test_the_versions_are_those_of_the_project() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__


def test_the_files_of_the_chart_are_whole(tmp_path: Path) -> None:
    objects = render(VALUES["isolated"])
    assert json.loads(objects["Dashboard"]["data"]["poolhouse.json"]) == json.loads(
        (CHART / "files" / "dashboard.json").read_text()
    )
    rules = yaml.safe_load((DEPLOY / "chart" / "files" / "alerts.yaml").read_text())
    assert objects["PrometheusRule"]["spec"] == rules
    archive = helm_python.package(CHART, destination=str(tmp_path))
    with helm_python.Chart.load(str(archive)) as chart:
        assert {file["name"] for file in chart.files} >= {"files/alerts.yaml", "files/dashboard.json"}
