"""Routes: of a sentence-transformers Router, which modules a query goes through, and which a document.

One route may be looked up instead of run: a vector per token id (StaticEmbedding), or a number per token id
(inference-free SPLADE, Geng et al. 2024, arXiv 2411.04403).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.files import Folder, JsonObject
from poolhouse.models.files.module_keys import check_keys
from poolhouse.models.files.module_steps import module_tensors
from poolhouse.outputs import Array
from poolhouse.packing.tokens import Ids
from poolhouse.params import PoolingParams

# What a text may be called where the checkpoint states no task, and inputs that are no texts.
_TASKS = (None, "query", "document")
_OTHER_MODALITIES = ("image", "audio", "video", "message")


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Which way a text goes, by what it is.

    by_task: the route of a query, of a document, of a text with another name, of one without any
    (None); a task without a route stands with None. looked_up: the routes that go to `static`.
    """

    by_task: Mapping[str | None, str | None] = field(default_factory=dict)
    static: LookedUp | None = None
    looked_up: frozenset[str] = frozenset()

    @property
    def main(self) -> str | None:
        """The route that stands for the model: the one of texts without a task."""
        return self.by_task.get(None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """What a text may be called to go a way."""
        return tuple(task for task, route in self.by_task.items() if task is not None and route is not None)

    def of(self, tasks: Sequence[str | None], role: str | None) -> str | None:
        """The name of the route of a text that is called one of `tasks`, or else is of this role; None without routes.

        Raises:
            InvalidRequest: the checkpoint has no route for it.
        """
        if not self.by_task:
            return None
        named = [task.lower() for task in tasks if task]
        task = next((task for task in self.tasks if task.lower() in named), role)
        route = self.by_task.get(task)
        if route is None:
            requested = "no input_type was given" if task is None else f"input_type is '{task}'"
            raise InvalidRequest(
                f"The model has no route for this text: {requested}, it has {list(self.tasks)}.", "input_type", task
            )
        return route


class LookedUp(Protocol):
    """A route that is looked up in a table instead of run."""

    @property
    def tokenizer_folder(self) -> Folder:
        """Where the tokenizer lies that makes its ids."""
        ...

    def vector(self, ids: Ids, params: PoolingParams) -> Array:
        """The answer to a text of these tokens."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class StaticWeights:
    """A weight per token id, and the folder of the tokenizer that makes the ids.

    by_token: weights by vocabulary entry, of a checkpoint that stores them so, until `with_ids` has found their ids.
    """

    weights: Array
    tokenizer_folder: Folder
    by_token: Mapping[str, float] | None = None

    def vector(self, ids: Ids, params: PoolingParams) -> Array:
        """[vocabulary]: the weight of each token that occurs, once however often it does."""
        present = np.zeros_like(self.weights)
        present[ids] = self.weights[ids]
        return present

    def with_ids(self, width: int, id_of: Callable[[str], int | None]) -> StaticWeights:
        """The same with `width` weights by id; tokens without an id get no weight, nor does the padding of a vocabulary."""
        weights = np.zeros(width, dtype=np.float32)
        weights[: len(self.weights)] = self.weights
        for token, weight in (self.by_token or {}).items():
            found = id_of(token)
            if found is not None and found < width:
                weights[found] = weight
        return StaticWeights(weights, self.tokenizer_folder)


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The table of a SparseStaticEmbedding in `folder`: a tensor, or a JSON file that `path` in its config names.

    router: where that path may start from too.
    """

    folder: Folder
    router: Folder

    def read(self) -> StaticWeights:
        """The weights.

        Raises:
            CheckpointError: none, or not one per token.
        """
        stated = self.folder.json("config.json", needed=False).get("path")
        if isinstance(stated, str) and stated.endswith(".json"):
            folder = next((folder for folder in (self.folder, self.router) if folder.has(stated)), None)
            if folder is None:
                raise CheckpointError(f"{self.folder}: config.json names {stated}, which is not there.")
            by_token = {str(token): float(weight) for token, weight in folder.json(stated, keep=False).items()}
            return StaticWeights(np.zeros(0, dtype=np.float32), self.folder, by_token)
        tensors = module_tensors(self.folder)
        if "weight" not in tensors or tensors["weight"].ndim != 1:
            raise CheckpointError(
                f"{self.folder}: a SparseStaticEmbedding needs a vector `weight`; there is {sorted(tensors)}."
            )
        return StaticWeights(tensors["weight"].float().numpy(), self.folder)


@dataclass(frozen=True, slots=True, eq=False)
class RouterFiles:
    """The routes of a Router, and the modules of each that a text may go, as in modules.json."""

    routes: Routes
    modules: Mapping[str, list[JsonObject]]


def read_routes(folder: Folder) -> RouterFiles:
    """What the files of a Router say. folder: its own, which the paths of its modules start from.

    Raises:
        CheckpointError: a description that is corrupt.
    """
    path = folder.path / "router_config.json"
    config = folder.json(path.name if path.is_file() else "config.json")
    check_keys("Router", config, path)
    try:
        types: Mapping[str, str] = config["types"]
        structure: Mapping[str, Sequence[str]] = config["structure"]
        check_keys("Router parameters", config.get("parameters") or {}, path)
        mappings = {ast.literal_eval(key): route for key, route in (_parameter(config, "route_mappings") or {}).items()}
        modules = {
            route: [{"type": str(types[name]), "path": str(name)} for name in names]
            for route, names in structure.items()
        }
        if not modules:
            raise ValueError("no routes")
        tasks = [task for task, kind in mappings if task is not None and kind in ("text", None)]
    except (KeyError, TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe routes: {error!r}") from error
    tasks += [name for name in structure if name not in _OTHER_MODALITIES]
    by_task = {task: _route(task, structure, mappings, config) for task in dict.fromkeys((*_TASKS, *tasks))}
    used = {route for route in by_task.values() if route is not None}
    if not used <= set(modules) or not all(modules[route] for route in used):
        raise CheckpointError(
            f"{path} does not describe routes: {sorted(used)} are named, {sorted(modules)} are there."
        )
    return RouterFiles(Routes(by_task), {route: chain for route, chain in modules.items() if route in used})


def _route(
    task: str | None, structure: Mapping[str, Sequence[str]], mappings: Mapping[object, str], config: JsonObject
) -> str | None:
    """The name of the route that a text of this task takes, by sentence-transformers' order of precedence."""
    for key in ((task, "text"), (task, None), (None, "text"), (None, None)):
        if key in mappings:
            return mappings[key]
    for name in (task, "text"):
        if name in structure:
            return name
    if task is not None:
        return None
    default: str | None = _parameter(config, "default_route")
    if default is None and _parameter(config, "allow_empty_key") is not False:
        return next(iter(structure))
    return default


def _parameter(config: JsonObject, name: str) -> Any:
    return (config.get("parameters") or {}).get(name)
