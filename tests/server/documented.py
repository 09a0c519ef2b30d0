"""Replies held against the OpenAPI document of the server that gave them."""

from __future__ import annotations

import re
from typing import Any

import httpx
from jsonschema_rs import Draft202012Validator
from starlette.testclient import TestClient

# Paths that the document leaves out, and those that it describes in their place.
TWINS = {
    "/": "/embed",
    "/tei": "/embed",
    "/tei/": "/embed",
    "/tei/vertex": "/embed",
    "/tei/embeddings": "/tei/v1/embeddings",
    "/extract": "/v1/extract",
    "/v1/classify": "/classify",
    "/v1/score": "/score",
    "/v1/rerank": "/rerank",
    "/v1/reranking": "/reranking",
    "/vectors/": "/vectors",
    "/weaviate/vectors/": "/weaviate/vectors",
    "/vertex": "/embed",
}
# The same of those that read no body; a path may end where the name of a model would stand.
LISTS = {"/openai/models": "/openai/v1/models", "/openai/models/": "/openai/v1/models", "/v1/models/": "/v1/models"}
# Of these only the errors are like their twin's.
SEVERAL = ("/", "/tei", "/tei/", "/vertex", "/tei/vertex")


class Document:
    """A server's OpenAPI document."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self._validators: dict[tuple[str, str, int], Draft202012Validator | None] = {}

    @property
    def posts(self) -> list[str]:
        """The paths that read a body; where the name of a model stands, a served one."""
        templates = [path for path, operations in self.content["paths"].items() if "post" in operations]
        return [re.sub("{[^}]*}", "embedder", path) for path in templates]

    def check(self, reply: httpx.Response) -> None:
        """Assert that status, content type and JSON are among those that the document gives the route."""
        path = str(reply.request.url.path)
        if path in ("/openapi.json", "/docs", "/ping") or "/.well-known/" in path:
            return
        told, method = self.told(path), reply.request.method.lower()
        if reply.status_code in (404, 405) and method not in self.content["paths"].get(told, {}):
            return
        responses = self.content["paths"][told][method]["responses"]
        if path in SEVERAL and reply.status_code == 200:
            return
        said = f"{path} {reply.status_code} {reply.text[:500]}"
        assert str(reply.status_code) in responses, said
        content = responses[str(reply.status_code)].get("content", {})
        kind = reply.headers.get("content-type", "").partition(";")[0]
        assert kind in content or not (kind or content), said
        if kind == "application/json":
            problems = [
                error.message for error in self._validator(told, method, reply.status_code).iter_errors(reply.json())
            ]
            assert not problems, f"{said}: {problems}"

    def told(self, path: str) -> str:
        """The path as the document has it; the name of a model may stand within."""
        path = (TWINS | LISTS).get(path, path.replace("/openai/models/", "/openai/v1/models/"))
        if path in self.content["paths"]:
            return path
        templates = (known for known in self.content["paths"] if "{" in known)
        return next((known for known in templates if re.fullmatch(re.sub("{[^}]*}", ".+", known), path)), path)

    def _validator(self, path: str, method: str, status: int) -> Draft202012Validator:
        place = (path, method, status)
        if place not in self._validators:
            response = self.content["paths"][path][method]["responses"][str(status)]
            schema = response["content"]["application/json"]["schema"]
            self._validators[place] = Draft202012Validator({**schema, "components": self.content["components"]})
        return self._validators[place]


def checked(http: TestClient) -> Document:
    """From here on, every reply that this client gets is held against the document of its server."""
    document = Document(http.get("/openapi.json").json())

    def check(reply: httpx.Response) -> None:
        reply.read()
        document.check(reply)

    http.event_hooks = {"request": [], "response": [check]}
    return document
