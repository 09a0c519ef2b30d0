"""Recorded exchanges: clients still send what was recorded, and the server answers it in the form they were made for."""

from __future__ import annotations

from typing import Any

import httpx
import huggingface_hub
import pytest

from tests.clients.record import APART, CLIENTS, exchanges, recorded

# Words that clients read, whereas ids and names differ between servers.
_WORDS = (".object", ".response_type", ".version")
EXCHANGES = [(client, exchange) for client in (CLIENTS | APART) for exchange in recorded(client)]


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_send_what_was_recorded(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert exchanges(client) == recorded(client)


@pytest.mark.parametrize(
    ("client", "exchange"), EXCHANGES, ids=[f"{client}: {exchange['call']}" for client, exchange in EXCHANGES]
)
def test_the_server_answers_in_the_form_of_the_dialect(
    client: str, exchange: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(_who_can(exchange))
    with httpx.Client(base_url=url, timeout=60) as http:
        # The headers are the recorded ones alone: what a client does not say, the server must do without.
        asked = httpx.Request(exchange["method"], url + exchange["path"], headers=exchange["headers"])
        if exchange["body"] is not None:
            asked = httpx.Request(
                exchange["method"],
                url + exchange["path"],
                headers=exchange["headers"],
                content=httpx.Request("POST", url, json=exchange["body"]).content,
            )
        reply = http.send(asked)
    assert reply.status_code == 200, reply.text
    assert _difference(exchange["reply"], reply.json() if reply.content else None) is None


def _who_can(exchange: dict[str, Any]) -> str:
    route = exchange["path"].rsplit("/", 1)[-1]
    return {"rerank": "reranker", "classify": "classifier", "predict": "classifier"}.get(route, "embedder")


def _difference(theirs: Any, ours: Any, where: str = "reply") -> str | None:
    """Where our reply lacks what theirs has, or has it in another form; None where it does not. More is welcome."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        lacking = [f"{where}.{key} is not there" for key in theirs if key not in ours]
        deeper = [_difference(theirs[key], ours[key], f"{where}.{key}") for key in theirs if key in ours]
        return next(filter(None, lacking + deeper), None)
    if isinstance(theirs, list) and isinstance(ours, list) and theirs and ours:
        return _difference(theirs[0], ours[0], f"{where}[0]")
    if where.endswith(_WORDS) or theirs == "infinity":
        return None if ours == theirs else f"{where} is {ours!r}, not {theirs!r}"
    kinds = [(bool,), (int, float), (str,), (list,), (dict,), (type(None),)]
    kind = next(kind for kind in kinds if isinstance(theirs, kind))
    return None if isinstance(ours, kind) else f"{where} is {ours!r}, not like {theirs!r}"
