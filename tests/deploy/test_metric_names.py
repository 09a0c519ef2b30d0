"""Dashboard, alerts and autoscaling ask for metrics and labels that a server has."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import promql_parser as promql
import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from tests.checkpoints import save_checkpoint
from tests.deploy.rendered import CHART, render
from tests.server.running import served

# What Prometheus adds to each series, and Kubernetes' discovery besides.
_OF_PROMETHEUS = {"job", "instance", "namespace", "pod", "service"}
_VARIABLES = {"$__rate_interval": "5m"}

Exposed = Mapping[str, set[str]]


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exposed]:
    """The names of a server's series after some requests, good and bad, with the labels of each."""
    folder = tmp_path_factory.mktemp("metrics")
    save_checkpoint(folder / "model", "bert, wordpiece", tokens=8)
    with served(folder, "model") as http:
        for body in ({"input": ["one", "two"]}, {"input": "word " * 40, "truncate_prompt_tokens": 4}, {"inputs": 1}):
            http.post("/v1/embeddings", json=body)
        yield series_of(http)


def series_of(http: httpx.Client) -> Exposed:
    labels: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def unknown(expression: str, exposed: Exposed) -> list[str]:
    """Metrics, and labels of metrics, that a query names and no server has."""
    for variable, value in _VARIABLES.items():
        expression = expression.replace(variable, value)
    found: list[str] = []
    selected: set[str] = set()
    grouped: set[str] = set()

    def visit(node: Any) -> bool:
        if isinstance(node, promql.VectorSelector):
            known = exposed.get(node.name)
            if known is None:
                found.append(node.name)
            else:
                selected.update(known)
                asked = {matcher.name for matcher in node.matchers.matchers}
                found.extend(f"{node.name}{{{label}}}" for label in sorted(asked - known - _OF_PROMETHEUS))
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)
        if isinstance(node, promql.BinaryExpr) and node.modifier is not None and node.modifier.matching is not None:
            grouped.update(node.modifier.matching.labels)
        return True

    promql.walk(promql.parse(expression), visit)
    return [*found, *(f"by {label}" for label in sorted(grouped - selected - _OF_PROMETHEUS))]


def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CHART / "files" / "dashboard.json").read_text())
    return content


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def test_the_check_finds_what_no_server_has(exposed: Exposed) -> None:
    assert unknown("sum by (modell) (rate(poolhouse_prompts_total{rout='x'}[5m])) / poolhouse_promptz", exposed) == [
        "poolhouse_prompts_total{rout}",
        "poolhouse_promptz",
        "by modell",
    ]


def test_every_panel_shows_what_a_server_counts(exposed: Exposed) -> None:
    wrong = {
        panel["title"]: missing
        for panel in panels()
        for target in panel["targets"]
        if (missing := unknown(target["expr"], exposed))
    }
    assert wrong == {}


def test_every_alert_asks_for_what_a_server_counts(exposed: Exposed) -> None:
    rules = [
        rule
        for group in yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    ]
    assert {rule["alert"]: missing for rule in rules if (missing := unknown(rule["expr"], exposed))} == {}


def test_autoscaling_follows_what_a_server_counts(exposed: Exposed) -> None:
    scaled = render({"autoscaling": {"kind": "keda"}})["ScaledObject"]["spec"]
    (trigger,) = scaled["triggers"]
    assert unknown(trigger["metadata"]["query"], exposed) == []
    (metric,) = render({"autoscaling": {"kind": "hpa"}})["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in exposed


def test_the_variables_are_filled_from_what_a_server_counts(exposed: Exposed) -> None:
    board = dashboard()
    names = {variable["name"] for variable in board["templating"]["list"]}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            query, _, label = (
                variable["query"]["query"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
            )
            assert unknown(query, exposed) == []
            series = promql.parse(query).name
            assert label in exposed[series] | _OF_PROMETHEUS
    used = {
        word.split('"')[0]
        for panel in panels()
        for target in panel["targets"]
        for word in target["expr"].split('=~"$')[1:]
    }
    assert used == names - {"datasource"}


def read_by_grafana(board: dict[str, Any]) -> dict[str, Any]:
    """What is left of a dashboard that Grafana's own classes have read."""
    plugins.register_default_plugins()
    left: dict[str, Any] = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    return left


def lost(given: Any, left: Any, place: str = "") -> list[str]:
    """Where something is missing or different."""
    if isinstance(given, dict) and isinstance(left, dict):
        return [found for name in given for found in lost(given[name], left.get(name, ...), f"{place}/{name}")]
    if isinstance(given, list) and isinstance(left, list) and len(given) == len(left):
        return [found for n, pair in enumerate(zip(given, left, strict=True)) for found in lost(*pair, f"{place}/{n}")]
    return [] if given == left else [place]


def test_grafana_knows_every_field() -> None:
    board = dashboard()
    assert lost(board, read_by_grafana(board)) == []
    board["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    board["refreshh"] = "30s"
    assert lost(board, read_by_grafana(board)) == ["/panels/1/fieldConfig/defaults/units", "/refreshh"]


def test_panels_have_a_place_of_their_own_and_are_explained() -> None:
    places: dict[tuple[int, int], str] = {}
    board = dashboard()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in places, f"{panel['title']} lies on {places[x, y]}"
                places[x, y] = panel["title"]
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in panels():
        assert panel["description"].endswith(".")
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
