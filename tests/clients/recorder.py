"""A server that writes down what it is asked, and answers as the peer would that a client was made for.

It needs the standard library alone, so that clients which cannot live beside us can be recorded in an environment of
their own.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# Only what a server could look at; the rest changes with versions and machines.
_HEADERS = ("accept", "api-key", "authorization", "content-encoding", "content-type", "x-client-name")
_VECTOR = [0.5, -0.5, 0.5, -0.5]
_SCORES = [0.75, 0.5, 0.25, 0.125]
_USAGE = {"prompt_tokens": 9, "total_tokens": 9}


class Recorder:
    """Answers every path that ends in a route of `_ANSWERS`, on a port of its own, until it is left."""

    def __enter__(self) -> Recorder:
        self.seen: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _scribe(self.seen))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def record(self, calls: Iterable[tuple[str, Callable[[str], object]]]) -> list[dict[str, Any]]:
        """What each named call of a client sends to a URL, and what it was answered."""
        recorded = []
        for name, call in calls:
            self.seen.clear()
            call(self.url)
            recorded += [{"call": name, **exchange} for exchange in self.seen]
        return recorded


def _scribe(seen: list[dict[str, Any]]) -> type[BaseHTTPRequestHandler]:
    class Scribe(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self._body()))

        def log_message(self, *_: object) -> None:
            """Nothing: tests are silent."""

        def _body(self) -> bytes:
            if self.headers.get("transfer-encoding") != "chunked":
                return self.rfile.read(int(self.headers["content-length"]))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self, body: Any) -> None:
            route = self.path.partition("?")[0]
            reply = next(make(body) for known, make in _ANSWERS if re.search(known, route))
            headers = {name: self.headers[name] for name in _HEADERS if name in self.headers}
            asked = {"method": self.command, "path": self.path, "headers": headers, "body": body}
            seen.append({**asked, "reply": reply})
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Scribe


def _rows(body: Any, field: str) -> list[list[float]]:
    return [_VECTOR] * (1 if isinstance(body[field], str) else len(body[field]))


def _openai(body: Any) -> Any:
    packed = base64.b64encode(struct.pack("<4f", *_VECTOR)).decode()
    data = [
        {"object": "embedding", "index": index, "embedding": packed if body.get("encoding_format") == "base64" else row}
        for index, row in enumerate(_rows(body, "input"))
    ]
    return {"object": "list", "data": data, "model": body["model"], "usage": dict(_USAGE)}


def _infinity(kind: str, **own: Any) -> Any:
    return {"object": kind, **own, "usage": dict(_USAGE), "id": "infinity-0", "created": 1_700_000_000}


def _voyage_embeddings(body: Any) -> Any:
    return {**_openai(body), "usage": {"total_tokens": 9}}


def _cohere_meta(version: str, **units: int) -> Any:
    return {"api_version": {"version": version}, "billed_units": units}


def _cohere_embed(version: str, body: Any) -> Any:
    rows = _rows(body, "texts") if body.get("texts") else _rows(body, "inputs")
    head = {"id": "0", "texts": body.get("texts") or [], "meta": _cohere_meta(version, input_tokens=9)}
    kinds = body.get("embedding_types") or ([] if version == "1" else ["float"])
    if not kinds:
        return {**head, "embeddings": rows, "response_type": "embeddings_floats"}
    forms: dict[str, Any] = {
        "float": rows,
        "base64": [base64.b64encode(struct.pack("<4f", *_VECTOR)).decode()] * len(rows),
    }
    forms |= dict.fromkeys(("int8", "uint8", "binary", "ubinary"), [[64, 0, 64, 0]] * len(rows))
    return {**head, "embeddings": {kind: forms[kind] for kind in kinds}, "response_type": "embeddings_by_type"}


def _ranked(body: Any) -> list[tuple[int, float]]:
    most = body.get("top_n") or body.get("top_k") or len(_SCORES)
    documents = body.get("documents") or body["texts"]
    return list(zip(reversed(range(len(documents))), _SCORES, strict=False))[:most]


def _results(body: Any) -> list[dict[str, Any]]:
    return [{"index": index, "relevance_score": score} for index, score in _ranked(body)]


def _documents(body: Any) -> list[dict[str, Any]]:
    return [{**result, "document": {"text": body["documents"][result["index"]]}} for result in _results(body)]


def _rerank(body: Any) -> Any:
    """TEI's where the body speaks of texts, else vLLM's."""
    if "texts" in body:
        texts = [{"text": text} if body.get("return_text") else {} for text in body["texts"]]
        return [{"index": index, "score": score, **texts[index]} for index, score in _ranked(body)]
    return {"id": "score-0", "model": body["model"], "usage": dict(_USAGE), "results": _documents(body)}


def _infinity_rerank(body: Any) -> Any:
    texts = body["documents"] if body.get("return_documents") else [None] * len(body["documents"])
    results = [{**result, "document": texts[result["index"]]} for result in _results(body)]
    return _infinity("rerank", model=body["model"], results=results)


def _voyage_rerank(body: Any) -> Any:
    texts = [{"document": text} if body.get("return_documents") else {} for text in body["documents"]]
    data = [{**result, **texts[result["index"]]} for result in _results(body)]
    return {"object": "list", "data": data, "model": body["model"], "usage": {"total_tokens": 9}}


def _cohere_v1_rerank(body: Any) -> Any:
    results = _documents(body) if body.get("return_documents") else _results(body)
    return {"id": "0", "results": results, "meta": _cohere_meta("1", search_units=1)}


def _cohere_v2_rerank(body: Any) -> Any:
    return {"id": "0", "results": _results(body), "meta": _cohere_meta("2", search_units=1)}


def _labels(_: Any) -> Any:
    return [{"score": 0.75, "label": "good"}, {"score": 0.25, "label": "bad"}]


def _models(_: Any) -> Any:
    return {"object": "list", "data": [{"id": "a-model", "object": "model", "created": 0, "owned_by": "somebody"}]}


def _ollama_embed(body: Any) -> Any:
    spent = {"total_duration": 14_143_917, "load_duration": 1_019_500, "prompt_eval_count": 8}
    return {"model": body["model"], "embeddings": _rows(body, "input"), **spent}


def _ollama_listed(**more: Any) -> Any:
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": "bert",
        "families": ["bert"],
        "parameter_size": "23M",
        "quantization_level": "F16",
    }
    times = {"modified_at": "2025-08-05T02:07:44.993271Z"}
    named = {"name": "a-model:latest", "model": "a-model:latest", **times, "size": 45_960_996, "digest": "1b226e2802db"}
    return {"models": [{**named, "details": details, **more}]}


def _ollama_show(_: Any) -> Any:
    (listed,) = _ollama_listed()["models"]
    facts = {"general.architecture": "bert"}
    return {
        "modelfile": "",
        "template": "",
        "details": listed["details"],
        "model_info": facts,
        "capabilities": ["embedding"],
    }


def _infinity_models(_: Any) -> Any:
    stats = {"queue_fraction": 0.0, "queue_absolute": 0, "results_pending": 0, "batch_size": 32}
    own = {"stats": stats, "owned_by": "infinity", "backend": "torch", "capabilities": ["embed"]}
    return {"object": "list", "data": [{"id": "a-model", "object": "model", "created": 0, **own}]}


# What is answered at the first route that the end of a path matches.
_ANSWERS: list[tuple[str, Callable[[Any], Any]]] = [
    ("/api/embed$", _ollama_embed),
    ("/api/embeddings$", lambda _: {"embedding": _VECTOR}),
    ("/api/tags$", lambda _: _ollama_listed()),
    ("/api/ps$", lambda _: _ollama_listed(expires_at="2025-08-05T02:07:44Z", size_vram=0, context_length=256)),
    ("/api/show$", _ollama_show),
    ("/infinity/embeddings$", lambda body: _infinity("list", model=body["model"], data=_openai(body)["data"])),
    ("/infinity/rerank$", _infinity_rerank),
    (
        "/infinity/classify$",
        lambda body: _infinity("classify", model=body["model"], data=[_labels(0)] * len(body["input"])),
    ),
    ("/infinity/models$", _infinity_models),
    ("/infinity/health$", lambda _: {"unix": 0.0}),
    ("/voyage/v1/embeddings$", _voyage_embeddings),
    ("/voyage/v1/rerank$", _voyage_rerank),
    ("/v1/embed$", lambda body: _cohere_embed("1", body)),
    ("/v2/embed$", lambda body: _cohere_embed("2", body)),
    ("/cohere/v1/rerank$", _cohere_v1_rerank),
    ("/v2/rerank$", _cohere_v2_rerank),
    ("/rerank$", _rerank),
    ("/embeddings$", _openai),
    ("/similarity$", lambda body: _SCORES[: len(body["inputs"]["sentences"])]),
    ("/predict$", _labels),
    ("/v1/models$", _models),
    ("/models/[^/]*$", lambda _: _models(None)["data"][0]),
    ("(/embed|/)$", lambda body: _rows(body, "inputs")),
]
