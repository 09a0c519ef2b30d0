"""Adapters as models: a request that names an adapter as its model gets the engine's answer through that adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from poolhouse.engine.about import About
from poolhouse.engine.observing import Observer
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.warming import WarmUpLevel
from poolhouse.errors import EngineError
from poolhouse.inputs.chat import ScoreTemplate
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.listwise import ListwisePrompts
from poolhouse.params import PoolingParams
from poolhouse.plugins import Plugin
from poolhouse.precision import Calibration
from poolhouse.server.serving import Engine
from poolhouse.tasks import SparseHead, Task
from poolhouse.tokens import Tokens


def with_adapters(engines: Sequence[Engine]) -> list[Engine]:
    """The engines, and after them one more for each adapter that they have by name; engines' own names win."""
    names = {name for engine in engines for name in (engine.name, *engine.aliases)}
    adapted = [AdaptedEngine(engine, name) for engine in engines for name in engine.adapters if name not in names]
    return [*engines, *adapted]


class AdaptedEngine:
    """An engine whose requests go through one adapter, unless they name another."""

    def __init__(self, engine: Engine, adapter: str) -> None:
        self.engine, self.name = engine, adapter

    @property
    def parent(self) -> str:
        """The name of the model beneath."""
        return self.engine.name

    @property
    def aliases(self) -> tuple[str, ...]:
        return ()

    @property
    def unlisted_names(self) -> tuple[str, ...]:
        return ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.engine.tasks

    @property
    def about(self) -> About:
        return self.engine.about

    @property
    def labels(self) -> int:
        return self.engine.labels

    @property
    def label_names(self) -> Mapping[int, str]:
        return self.engine.label_names

    @property
    def token_weights(self) -> bool:
        return self.engine.token_weights

    @property
    def calibration(self) -> Calibration | None:
        return self.engine.calibration

    @property
    def max_tokens(self) -> int:
        return self.engine.max_tokens

    @property
    def prompts(self) -> Mapping[str, str]:
        return self.engine.prompts

    @property
    def adapters(self) -> tuple[str, ...]:
        return ()

    @property
    def alive(self) -> bool:
        return self.engine.alive

    @property
    def fatal(self) -> EngineError | None:
        return self.engine.fatal

    @property
    def running(self) -> int:
        return self.engine.running

    @property
    def sparse(self) -> SparseHead | None:
        return self.engine.sparse

    @property
    def plugin(self) -> Plugin | None:
        return self.engine.plugin

    @property
    def similarity(self) -> str:
        return self.engine.similarity

    @property
    def routed(self) -> bool:
        return self.engine.routed

    @property
    def averages_max_sim(self) -> bool:
        return self.engine.averages_max_sim

    @property
    def score_template(self) -> ScoreTemplate | None:
        return self.engine.score_template

    @property
    def listwise(self) -> ListwisePrompts | None:
        return self.engine.listwise

    def limit(self, params: PoolingParams) -> Limit:
        return self.engine.limit(params)

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]:
        return self.engine.tokenize(requests)

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.engine.detokenize(ids, skip_special_tokens)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        return self.engine.token_strings(ids)

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]:
        return self.engine.submit(
            [request if request.adapter is not None else replace(request, adapter=self.name) for request in requests]
        )

    def observe(self, observer: Observer | None) -> None:
        """Nothing: the engine beneath tells of its work by itself."""

    def on_fatal(self, callback: Callable[[EngineError], None]) -> None:
        self.engine.on_fatal(callback)

    def warm_up(self, level: WarmUpLevel) -> None:
        """Nothing: the engine beneath is warmed up by itself."""

    def close(self, drain_seconds: float = 30.0) -> None:
        """Nothing: the engine beneath is closed by itself."""
