"""PoolingEngine: what everybody else may use of an engine, and EngineFacts, what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from poolhouse.engine.observing import Observer
from poolhouse.engine.queue import Caller
from poolhouse.engine.request import Answer, LookedUp, Request
from poolhouse.errors import EngineError
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.listwise import PacksDocuments
from poolhouse.inputs.templates.score import ScoreTemplate
from poolhouse.packing.tokens import Tokens
from poolhouse.params import Matryoshka, PoolingParams
from poolhouse.plugins import Plugin
from poolhouse.tasks import PruningHead, SparseHead, Task
from poolhouse.vectors.precision import Calibration

WarmUpLevel = Literal["none", "fast", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What is known of an engine, and does not change while it lives.

    name: the name that replies give, whichever the request used. aliases: further names that requests may use.
    unlisted_names: names that requests may use, and no list shows. parent: the model beneath an adapter.
    tasks: the first is what a request means that names none. labels: how many numbers `classify` answers with; 0 where
    the model does not classify.
    max_tokens: the longest prompt. width: the length of a vector of `embed` before Matryoshka cuts, None where the model
    has none. pooling: what makes one vector of a text's rows ("mean"); None where no task does.
    prompts: prefixes by name. adapters: those beside the model, each a model of its own to those who ask by name.
    sparse: how answers become sparse vectors; None for a model that has none. token_weights: whether `token_classify`
    weighs tokens for sparse retrieval, as BGE-M3 does.
    similarity: how scores compare two vectors. mean_max_sim: a late-interaction score is a mean over the query's vectors,
    not a sum. routed: queries and documents go separate ways through the model.
    pictures: whether it reads pictures. reads_labels: whether requests bring the labels that are looked for.
    score_template: what joins pairs, where the tokenizer does not. listwise: makes the prompts of a model that scores all
    documents of a query together. pruning: how a reranker's answers choose sentences; None for one that does not prune.
    calibration: the stored ranges of int8 vectors; None where a fixed range serves.
    dtype, device: of the weights, by torch's names ("float32", "cpu"). weight_bytes: what they take in memory; 0 where
    nobody knows. max_batch_tokens: tokens of one pack.
    activated: the tasks that answer probabilities, or vectors of unit length, where a request says nothing.
    path: the folder of its files. matryoshka: to which sizes vectors may be cut. widths: of a row of each task,
    where a request says nothing.
    """

    name: str
    tasks: tuple[Task, ...]
    max_tokens: int
    aliases: tuple[str, ...] = ()
    unlisted_names: tuple[str, ...] = ()
    parent: str | None = None
    labels: int = 0
    label_names: Mapping[int, str] = field(default_factory=dict)
    width: int | None = None
    pooling: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    adapters: tuple[str, ...] = ()
    sparse: SparseHead | None = None
    similarity: str = "cosine"
    mean_max_sim: bool = False
    routed: bool = False
    pictures: bool = False
    reads_labels: bool = False
    score_template: ScoreTemplate | None = None
    listwise: PacksDocuments | None = None
    pruning: PruningHead | None = None
    plugin: Plugin | None = None
    calibration: Calibration | None = None
    dtype: str = "float32"
    device: str = "cpu"
    weight_bytes: int = 0
    max_batch_tokens: int | None = None
    tokenizer_threads: int | None = None

    activated: frozenset[Task] = frozenset()
    matryoshka: Matryoshka | None = None
    widths: Mapping[Task, int] = field(default_factory=dict)
    path: str = ""

    token_weights: bool = field(init=False)

    def __post_init__(self) -> None:
        weighs = self.sparse is not None and self.sparse.task == "token_classify"
        object.__setattr__(self, "token_weights", weighs)


class PoolingEngine(Protocol):
    """One model that answers requests; `poolhouse.engine.engine.Engine` and `poolhouse.testing.FakeEngine` are two."""

    @property
    def facts(self) -> EngineFacts: ...

    @property
    def alive(self) -> bool:
        """Whether requests can still be answered."""
        ...

    @property
    def fatal(self) -> EngineError | None:
        """What the engine died of; None while it has not."""
        ...

    @property
    def pending(self) -> int:
        """How many accepted requests have neither answer nor error yet."""
        ...

    @property
    def running(self) -> int:
        """Sequences of the batches on the device."""
        ...

    def submit(self, requests: Sequence[Request]) -> list[Future[Answer]]:
        """Start work on requests; each future gets its answer or its error."""
        ...

    def limit(self, params: PoolingParams) -> Limit:
        """How long a prompt with these parameters may be."""
        ...

    def tokenize(self, requests: Sequence[Request]) -> list[Tokens]:
        """The tokens of prompts, however long they are, without running them."""
        ...

    def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """The text of token ids."""
        ...

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each id."""
        ...

    def observe(self, observer: Observer | None) -> None:
        """Tell `observer` of the work from now on; None tells nobody."""
        ...

    def on_fatal(self, callback: Callable[[EngineError], None]) -> None:
        """Call back, in a thread of the engine, when it dies; at once if it is dead."""
        ...

    def warm_up(self, level: WarmUpLevel) -> None:
        """Run made-up prompts, so that the first real ones find everything warm."""
        ...

    def close(self, drain_seconds: float = ...) -> None:
        """Answer what was accepted, for at most `drain_seconds`, then stop; the rest fails with EngineClosed."""
        ...


class OfflineEngine(PoolingEngine, Protocol):
    """What `LLM` uses too; `Engine`, in this process, and `poolhouse.engine.replicas.Replicas`, in others, are two."""

    @property
    def processes(self) -> int:
        """How many processes run the model."""
        ...

    def submit(
        self, requests: Sequence[Request], waits: bool = ..., caller: Caller | None = ...
    ) -> list[Future[Answer]]:
        """Start work on requests; see `Engine.submit`."""
        ...

    def look_up(self, texts: Sequence[str], like: Request) -> Future[LookedUp | None] | None:
        """The vectors of many texts at once, where the model is a table of this process; see `Engine.look_up`."""
        ...

    def load_adapter(self, name: str, source: str) -> None:
        """Make the adapter of a folder or hub id available under a name."""
        ...


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One replica, as metrics show it. outstanding: prompts that it has and did not answer yet."""

    number: int
    up: bool
    restarts: int
    outstanding: int


@runtime_checkable
class Replicated(Protocol):
    """An engine whose model runs in several processes, each of which may die and be started again."""

    @property
    def states(self) -> tuple[ReplicaState, ...]: ...

    @property
    def trouble(self) -> str | None:
        """Why no replica can answer at present; None while one can."""
        ...

    def restart(self) -> None:
        """Replace the processes one after the other, without losing a request; returns when all are new."""
        ...
