"""Routes of a sentence-transformers Router: which modules a query goes through, and which a document.

One side may be looked up instead of run: its weights are a number per token id (inference-free SPLADE, Geng et al. 2024,
arXiv 2411.04403).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.json_files import read_json
from poolhouse.outputs import Array
from poolhouse.pooling.module_tensors import module_tensors
from poolhouse.tokens import Ids

_ROLES = ("query", "document", None)


@dataclass(frozen=True, slots=True, eq=False)
class StaticWeights:
    """A weight per token id, and the folder of the tokenizer that makes the ids.

    by_token: weights by vocabulary entry, of a checkpoint that stores them so, until `with_ids` has found their ids.
    """

    weights: Array
    tokenizer_folder: Path
    by_token: Mapping[str, float] | None = None

    def vector(self, ids: Ids) -> Array:
        """[vocabulary]: the weight of each token that occurs, once however often it does."""
        present = np.zeros_like(self.weights)
        present[ids] = self.weights[ids]
        return present

    def with_ids(self, width: int, id_of: Callable[[str], int | None]) -> StaticWeights:
        """The same with `width` weights by id; tokens without one weigh nothing, as the padding of a vocabulary."""
        weights = np.zeros(width, dtype=np.float32)
        weights[: len(self.weights)] = self.weights
        for token, weight in (self.by_token or {}).items():
            found = id_of(token)
            if found is not None and found < width:
                weights[found] = weight
        return StaticWeights(weights, self.tokenizer_folder)


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Which texts are looked up.

    looked_up: the roles ("query", "document", None for no role) that go to `static`. missing: roles without a route.
    """

    static: StaticWeights | None = None
    looked_up: frozenset[str | None] = frozenset()
    missing: frozenset[str | None] = frozenset()

    def of(self, role: str | None) -> StaticWeights | None:
        """The weights to look a text of this role up in, or None where the model runs.

        Raises:
            InvalidRequest: the checkpoint has no route for it.
        """
        if role in self.missing:
            known = [other for other in _ROLES if other is not None and other not in self.missing]
            asked = "no input_type was given" if role is None else f"input_type is '{role}'"
            raise InvalidRequest(f"The model has no route for this text: {asked}, it has {known}.", "input_type", role)
        return self.static if role in self.looked_up else None


def split_routes(place: Path) -> tuple[list[dict[str, Any]], Routes]:
    """The modules of the route that runs a model, as in modules.json, and the other routes.

    place: the Router's folder, which the paths of its modules start from.

    Raises:
        CheckpointError: a description that is corrupt, or routes that run different models.
    """
    path = place / "router_config.json"
    config = read_json(path if path.is_file() else place / "config.json")
    try:
        types: Mapping[str, str] = config["types"]
        structure: Mapping[str, Sequence[str]] = config["structure"]
        mappings = {ast.literal_eval(key): route for key, route in (_parameter(config, "route_mappings") or {}).items()}
        kinds = {route: [types[name].rsplit(".", 1)[-1] for name in names] for route, names in structure.items()}
    except (KeyError, TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe routes: {error!r}") from error
    routes = {role: _route(role, structure, mappings, config) for role in _ROLES}
    used = {route for route in routes.values() if route is not None}
    static = {structure[route][0] for route in used if kinds[route] == ["SparseStaticEmbedding"]}
    runs = {tuple(structure[route]) for route in used if kinds[route] != ["SparseStaticEmbedding"]}
    if len(runs) != 1 or len(static) > 1:
        raise CheckpointError(
            f"{path}: routes {sorted(used)} of {len(runs)} encoders and {len(static)} tables; Poolhouse serves one "
            "encoder, with one SparseStaticEmbedding beside it or none."
        )
    modules = [{"type": types[name], "path": name} for name in next(iter(runs))]
    looked_up = frozenset(
        role for role, route in routes.items() if route is not None and tuple(structure[route]) not in runs
    )
    missing = frozenset(role for role, route in routes.items() if route is None)
    weights = _static(place / next(iter(static)), place) if static else None
    return modules, Routes(weights, looked_up, missing)


def _route(
    role: str | None, structure: Mapping[str, Sequence[str]], mappings: Mapping[Any, str], config: Mapping[str, Any]
) -> str | None:
    """The name of the route that a text of this role takes, by sentence-transformers' order of precedence."""
    for key in ((role, "text"), (role, None), (None, "text"), (None, None)):
        if key in mappings:
            return mappings[key]
    for name in (role, "text"):
        if name in structure:
            return name
    if role is not None:
        return None
    default: str | None = _parameter(config, "default_route")
    if default is None and _parameter(config, "allow_empty_key") is not False:
        return next(iter(structure))
    return default


def _parameter(config: Mapping[str, Any], name: str) -> Any:
    return (config.get("parameters") or {}).get(name)


def _static(place: Path, router: Path) -> StaticWeights:
    """The table of a SparseStaticEmbedding: a tensor, or a JSON file that `path` in its config names."""
    stated = read_json(place / "config.json", needed=False).get("path")
    if isinstance(stated, str) and stated.endswith(".json"):
        path = next((path for path in (place / stated, router / stated) if path.is_file()), None)
        if path is None:
            raise CheckpointError(f"{place}: config.json names {stated}, which is not there.")
        by_token = {str(token): float(weight) for token, weight in read_json(path).items()}
        return StaticWeights(np.zeros(0, dtype=np.float32), place, by_token)
    tensors = module_tensors(place)
    if "weight" not in tensors or tensors["weight"].ndim != 1:
        raise CheckpointError(f"{place}: a SparseStaticEmbedding needs a vector `weight`; there is {sorted(tensors)}.")
    return StaticWeights(tensors["weight"].float().numpy(), place)
