"""OpenAPI: the document of all routes, read from their rows: models of bodies, types of replies and errors."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema
from starlette.responses import Response

from poolhouse.server.call import Call
from poolhouse.server.routing import Dialect, Endpoint, Route, endpoints
from poolhouse.server.security import OPEN_PATHS, api_keys
from poolhouse.server.wire.contract import BothError, Errors, FlatError, NestedError, OurError, Refusal
from poolhouse.settings import ServerSettings
from poolhouse.version import __version__

Json = dict[str, Any]

_HEADERS = {
    "X-Request-Id": "The id of the request: the one that it came with, or a new one.",
    "X-Poolhouse-Truncated": "How many inputs were cut, where any was.",
    "Retry-After": "Seconds after which to ask again.",
}
# Of refusals before any dialect gets the request.
_BEFORE = (401, 414, 431)
_SCHEMES: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
}
# The parameters of paths.
_IN_PATH = {"file_id": "The id of a file.", "batch_id": "The id of a batch."}
_MODEL = "The name of a served model; it may hold slashes."
# How pydantic names a type where others have the same name: by its module.
_QUALIFIED = re.compile(r"poolhouse__\w+")


def dialect(dialects: Sequence[Dialect], settings: ServerSettings) -> Dialect:
    """/openapi.json of these dialects, and /docs, which draws it; the page needs nothing from elsewhere."""
    page = Path(__file__).with_name("docs.html").read_bytes()
    written: list[bytes] = []

    async def schema(_: Call) -> Response:
        if not written:
            written.append(await asyncio.to_thread(lambda: orjson.dumps(document(dialects, settings))))
        return Response(written[0], media_type="application/json")

    async def docs(_: Call) -> Response:
        return Response(page, media_type="text/html; charset=utf-8")

    return Dialect(
        "documents",
        (Route("GET", "/openapi.json", schema, hidden=True), Route("GET", "/docs", docs, hidden=True)),
    )


def document(dialects: Iterable[Dialect], settings: ServerSettings) -> Json:
    """OpenAPI 3.1 of these dialects, on a server with these settings."""
    documented = [one for one in endpoints(dialects) if one.documented]
    our_error = {"both": BothError, "flat": FlatError, "nested": NestedError}[settings.error_format]
    types = _Types([one.route for one in documented], [_errors(one) for one in documented], our_error)
    keys = bool(api_keys(settings))
    paths: dict[str, Json] = {}
    for one in documented:
        paths.setdefault(one.openapi_path, {})[one.route.method.lower()] = _operation(one, types, keys)
    secured: Json = {"security": [{name: []} for name in _SCHEMES]} if keys else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Poolhouse", "version": __version__},
        "servers": [{"url": settings.root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": types.definitions,
            "headers": {name: _header(text) for name, text in _HEADERS.items()},
            "securitySchemes": _SCHEMES if keys else {},
        },
        **secured,
    }


def _errors(endpoint: Endpoint) -> tuple[Errors, ...]:
    route = endpoint.route
    if route.errors is not None:
        return route.errors
    return () if route.body is None else endpoint.dialect.errors


class _Types:
    """The schemas of all bodies and replies, which share their definitions."""

    def __init__(self, routes: Sequence[Route], errors: Sequence[Sequence[Errors]], our_error: Any) -> None:
        self.our_error = our_error
        bodies = [body for route in routes for body in _bodies(route)]
        replies = [reply for route in routes for reply in route.replies]
        replies += [one.body for several in errors for one in several if one.body is not None] + [our_error, Refusal]
        adapters: list[tuple[Any, JsonSchemaMode, TypeAdapter[Any]]] = [
            *((body, "validation", TypeAdapter(body)) for body in dict.fromkeys(bodies)),
            *(
                (reply, "serialization", TypeAdapter(reply))
                for reply in dict.fromkeys(replies)
                if reply is not OurError
            ),
        ]
        schemas, definitions = TypeAdapter.json_schemas(
            adapters, ref_template="#/components/schemas/{model}", schema_generator=_Exact
        )
        self.schemas: Mapping[Any, Json] = {kind: _in_short(schema) for (kind, _), schema in schemas.items()}
        self.definitions: Json = _in_short(definitions["$defs"])
        for body in dict.fromkeys(bodies):
            name = self.schemas[body].get("$ref", "").rsplit("/", 1)[-1]
            if name in self.definitions:
                self.definitions[name] = _with_null_for_default(self.definitions[name])

    def any_of(self, kinds: Iterable[Any]) -> Json:
        """The schema of what is of one of these types."""
        kinds = [self.our_error if kind is OurError else kind for kind in kinds]
        schemas = [self.schemas[kind] for kind in dict.fromkeys(kinds)]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _with_null_for_default(body: Json) -> Json:
    """The schema of a body; null means the default in all that may be left out, see `body.read_json`."""
    required, properties = body.get("required", ()), body.get("properties", {})
    return {
        **body,
        "properties": {
            name: schema if name in required or _takes_null(schema) else _or_null(schema)
            for name, schema in properties.items()
        },
    }


def _takes_null(schema: Json) -> bool:
    """Whether null is among the types; a schema without types takes anything."""
    kinds = [one.get("type") for one in schema.get("anyOf", [schema])]
    return "null" in kinds or not ({"type", "anyOf", "$ref", "enum", "const", "allOf", "oneOf"} & schema.keys())


def _or_null(schema: Json) -> Json:
    about: Json = {name: schema[name] for name in ("title", "description", "default") if name in schema}
    rest = {name: value for name, value in schema.items() if name not in about}
    return {"anyOf": [*(rest["anyOf"] if set(rest) == {"anyOf"} else [rest]), {"type": "null"}], **about}


class _Exact(GenerateJsonSchema):
    """Replies have the fields of their type and no others."""

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> JsonSchemaValue:
        return {**super().typed_dict_schema(schema), "additionalProperties": False}


def _in_short(schema: Json) -> Json:
    """With short names for types that pydantic names by their module: `TeiEmbedFields`, by the dialect alone."""

    def name(found: re.Match[str]) -> str:
        *modules, kind = found[0].split("__")
        if "dialects" not in modules:
            return kind
        dialect = modules[modules.index("dialects") + 1].split("_")[0].capitalize()
        return kind if kind.startswith(dialect) else dialect + kind

    short: Json = orjson.loads(_QUALIFIED.sub(name, orjson.dumps(schema).decode()))
    return short


def _bodies(route: Route) -> tuple[type[BaseModel], ...]:
    """The models that may read a route's body."""
    if route.body is None:
        return () if route.form is None else (route.form,)
    return route.body if isinstance(route.body, tuple) else (route.body,)


def _operation(endpoint: Endpoint, types: _Types, keys: bool) -> Json:
    route, bodies = endpoint.route, _bodies(endpoint.route)
    name = route.answer.__name__
    open_to_all = endpoint.path in OPEN_PATHS
    operation: Json = {
        "tags": [endpoint.dialect.tag],
        "summary": name.replace("_", " ").capitalize(),
        "description": inspect.getdoc(route.answer) or "",
        "operationId": re.sub(r"\W", "_", f"{name}{endpoint.openapi_path}") + f"_{route.method.lower()}",
        "responses": _responses(route, _errors(endpoint), types, keys and not open_to_all),
    }
    parameters = [
        {
            "name": parameter,
            "in": "path",
            "required": True,
            "description": _IN_PATH.get(parameter, _MODEL),
            "schema": {"type": "string", "minLength": 1},
        }
        for parameter in endpoint.parameters
    ] + [
        {"name": parameter, "in": "query", "description": text, "schema": {"type": "string"}}
        for parameter, text in route.query.items()
    ]
    if parameters:
        operation["parameters"] = parameters
    if bodies:
        kind = "application/json" if route.form is None else "multipart/form-data"
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": types.any_of(bodies)}}}
    return operation | ({"security": []} if keys and open_to_all else {})


def _responses(route: Route, refusals: Sequence[Errors], types: _Types, guarded: bool) -> Json:
    """The responses of a route by status."""
    shapes: dict[int, list[Any]] = {status: [Refusal] for status in _BEFORE if guarded or status != 401}
    for errors in refusals:
        for status in errors.statuses:
            shapes.setdefault(status, []).extend([] if errors.body is None else [errors.body])
    if 503 in shapes:
        # While models load, no dialect answers.
        shapes[503].append(OurError)
    headers = {name: _header(text) for name, text in route.headers.items()}
    content: Json = {medium: {} for medium in route.media}
    if route.replies:
        content = {"application/json": {"schema": types.any_of(route.replies)}, **content}
    responses = {"200": _response(200, content, ([] if route.body is None else ["X-Poolhouse-Truncated"]), headers)}
    for status, kinds in sorted(shapes.items()):
        content = {"application/json": {"schema": types.any_of(kinds)}} if kinds else {}
        responses[str(status)] = _response(status, content, ["Retry-After"] if status in (429, 503) else [])
    return responses


def _response(status: int, content: Json, named: Sequence[str], headers: Mapping[str, Json] | None = None) -> Json:
    """One response; an empty body has no content. named: the shared headers that it may have, besides the id."""
    shared = {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-Id", *named)}
    response: Json = {"description": HTTPStatus(status).phrase, "headers": {**shared, **(headers or {})}}
    return response | ({"content": content} if content else {})


def _header(description: str) -> Json:
    return {"description": description, "schema": {"type": "string"}}
