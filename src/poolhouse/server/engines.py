"""Engines: the models of one server by name, adapters among them: those that are always loaded, and those on demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

from poolhouse.engine.interface import EngineFacts, PoolingEngine, WarmUpLevel
from poolhouse.engine.observing import Observer
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import EngineError, InvalidRequest, UnknownModel
from poolhouse.server.on_demand import OnDemand
from poolhouse.server.served import Admission, Listed, Served
from poolhouse.server.telemetry.metrics import Metrics
from poolhouse.settings import ServerSettings

# Names of models in one message, and characters of an unknown name.
_MAX_NAMES, _MAX_NAME = 20, 200


class Engines:
    """Models by the names that requests may use. Of those that are always loaded, the first is the default."""

    def __init__(
        self,
        engines: Sequence[PoolingEngine],
        settings: ServerSettings,
        metrics: Metrics,
        on_demand: OnDemand | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.started = int(time.time())
        self.on_demand = on_demand
        self.always = [Served(engine.facts.name, engine, Admission(settings.max_queued_prompts)) for engine in engines]
        self._loaded: dict[str, Served] = {}
        for served in self.always:
            for name in (served.name, *served.engine.facts.aliases):
                # Of engines that share a name, the first has it.
                self._loaded.setdefault(name, served)
        self._unlisted = {name: one for one in reversed(self.always) for name in one.engine.facts.unlisted_names}

    @property
    def load(self) -> int:
        """Prompts that wait or run."""
        return sum(one.waiting for one in {one.model: one for one in self.listed()}.values())

    @property
    def alive(self) -> bool:
        """Whether every engine can answer that is always loaded, and no device is lost."""
        lost = self.on_demand is not None and self.on_demand.fatal is not None
        return not lost and all(served.engine.alive for served in self._loaded.values())

    @property
    def only(self) -> bool:
        """Whether one model is served, without adapters; its names do not count."""
        always = {served.name for served in self._loaded.values()}
        return len(always) + (0 if self.on_demand is None else len(self.on_demand.names)) == 1

    @property
    def names(self) -> str:
        """The names that requests may use, for messages; the first of many."""
        names = [one.name for one in self.listed()]
        more = len(names) - _MAX_NAMES
        return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")

    @property
    def tasks_by_model(self) -> str:
        """The tasks of each model that is always loaded, for messages; empty where one model is served."""
        several = {served.name: served.engine.facts.tasks for served in list(self._loaded.values())[:_MAX_NAMES]}
        listed = "; ".join(f"`{name}`: {', '.join(tasks)}" for name, tasks in several.items())
        return f"Served models and their tasks: {listed}." if len(several) > 1 else ""

    def listed(self) -> Iterator[Listed]:
        """Every name that lists show: first those of models that are always loaded."""
        for name, served in self._loaded.items():
            facts = served.engine.facts
            yield Listed(
                name=name,
                model=served.name,
                facts=facts,
                state="loaded" if served.engine.alive else "failed",
                weight_bytes=facts.weight_bytes,
                waiting=served.admission.waiting,
                since=self.started,
                memory_bytes=facts.weight_bytes,
                last_used=served.last_used,
                reason=None if served.engine.alive else str(served.engine.fatal or "The engine is shut down."),
            )
        if self.on_demand is not None:
            yield from self.on_demand.listed()

    def described(self, name: str) -> Listed:
        """What lists show of a name that `find` gave; one that they leave out is shown as its model."""
        served = self._unlisted.get(name)
        by_name = {one.name: one for one in self.listed()}
        return by_name[name] if name in by_name or served is None else replace(by_name[served.name], name=name)

    async def refreshed(self) -> list[Listed]:
        """As `listed`, after a look at the folders of models on demand."""
        if self.on_demand is not None:
            await self.on_demand.rescan()
        return list(self.listed())

    async def find(self, model: str | None, any_name: bool = False) -> str:
        """A name under which `use` knows the model; without a name, the first model.

        any_name: a single model answers to every name, as in servers that have one model only.

        Raises:
            UnknownModel: no such name. InvalidRequest: none is given, and there is no first model.
        """
        name, on_demand = self._known(model, any_name), self.on_demand
        if on_demand is not None and (name is None or (name in on_demand and on_demand.failed(name))):
            await on_demand.rescan()
            name = self._known(model, any_name)
        if name is not None:
            return name
        if model:
            raise UnknownModel(f"{unknown(model)} Served models: {self.names}.", None)
        raise InvalidRequest(f"Several models are served, or none; name one by `model`: {self.names}.", "model")

    def use(self, name: str) -> Served | asyncio.Future[Served]:
        """The model of a name that `find` gave, held by this request; a future where it must be loaded first.

        Raises:
            Unavailable, Overloaded: see `OnDemand.use`.
        """
        served = self._loaded.get(name) or self._unlisted.get(name)
        if served is not None:
            return served.hold()
        assert self.on_demand is not None
        return self.on_demand.use(name)

    def has(self, name: str) -> bool:
        """Whether lists show that name."""
        return name in self._loaded or name in (self.on_demand or ())

    def keep(self, name: str, seconds: float) -> None:
        """How long a model on demand stays in memory after the request that uses it; `math.inf`: for ever."""
        if self.on_demand is not None:
            self.on_demand.keep(name, seconds)

    def unload(self, name: str) -> None:
        """Close a model on demand as soon as nobody uses it."""
        if self.on_demand is not None:
            self.on_demand.unload(name)

    def first(self, fits: Callable[[EngineFacts], bool]) -> str | None:
        """The first model that fits, of those whose facts are known; None where none does."""
        return next((one.name for one in self.listed() if one.facts is not None and fits(one.facts)), None)

    def _known(self, model: str | None, any_name: bool) -> str | None:
        on_demand = self.on_demand or ()
        if model and (model in self._loaded or model in self._unlisted or model in on_demand):
            return model
        if model and not (any_name and self.only):
            return None
        if self.always:
            return self.always[0].name
        # Of several on demand, none comes first.
        names = [] if self.on_demand is None else self.on_demand.names
        return names[0] if len(names) == 1 else None

    def check_items(self, items: int, parameter: str) -> None:
        """Raise InvalidRequest for more inputs than one request may hold."""
        max_items = self.settings.max_client_batch_size
        if items > max_items:
            raise InvalidRequest(
                f"{parameter} has {items} entries; one request may hold {max_items} (--max-client-batch-size).",
                parameter,
                items,
            )

    def check_list(self, value: object, parameter: str) -> None:
        """As `check_items`, before the inputs are parsed: parsing millions would stop the event loop for seconds."""
        if isinstance(value, list) and value and not isinstance(value[0], int):
            self.check_items(len(value), parameter)


def unknown(model: str) -> str:
    """The message for an unknown name; a long name is cut."""
    return f"The model `{model[:_MAX_NAME]}` does not exist."


def with_adapters(engines: Sequence[PoolingEngine]) -> list[PoolingEngine]:
    """The engines, and after them one more for each adapter that they have by name; engines' own names win."""
    names = {name for engine in engines for name in (engine.facts.name, *engine.facts.aliases)}
    adapted = [AdaptedEngine(engine, name) for engine in engines for name in engine.facts.adapters if name not in names]
    return [*engines, *adapted]


class AdaptedEngine:
    """An engine whose requests go through one adapter, unless they name another.

    The engine beneath is observed, warmed up and closed by itself, so these methods do nothing here.
    """

    def __init__(self, engine: PoolingEngine, adapter: str) -> None:
        self.engine = engine
        beneath = engine.facts
        self.facts = replace(
            beneath, name=adapter, aliases=(), unlisted_names=(), adapters=(), parent=beneath.name, weight_bytes=0
        )
        self.limit, self.tokenize = engine.limit, engine.tokenize
        self.detokenize, self.token_strings, self.on_fatal = engine.detokenize, engine.token_strings, engine.on_fatal

    @property
    def alive(self) -> bool:
        return self.engine.alive

    @property
    def fatal(self) -> EngineError | None:
        return self.engine.fatal

    @property
    def pending(self) -> int:
        return self.engine.pending

    @property
    def running(self) -> int:
        return self.engine.running

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]:
        name = self.facts.name
        return self.engine.submit(
            [request if request.adapter is not None else replace(request, adapter=name) for request in requests]
        )

    def observe(self, observer: Observer | None) -> None: ...

    def warm_up(self, level: WarmUpLevel) -> None: ...

    def close(self, drain_seconds: float = 30.0) -> None: ...
