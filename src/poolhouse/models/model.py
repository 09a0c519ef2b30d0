"""Model: a backbone that is ready to run, a pipeline per task, and facts about them."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType

import torch
from torch import Tensor

from poolhouse.inputs.labels import ReadsLabels
from poolhouse.inputs.late_interaction import LateInteraction
from poolhouse.inputs.listwise import ListwiseTokens
from poolhouse.inputs.pictures import PictureReader
from poolhouse.inputs.templates.score import ScoreTemplate
from poolhouse.models.adapters.adapters import Adapters
from poolhouse.models.adapters.low_rank import Adapter
from poolhouse.models.backbone import Backbone
from poolhouse.models.files.routes import Routes
from poolhouse.models.heads.heads import LoadedHead
from poolhouse.models.heads.pruning import LoadedPruner
from poolhouse.models.plan import LoadPlan
from poolhouse.params import Matryoshka
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.tasks import SparseHead, Task


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One loaded model, ready to run packs.

    plan: what was decided before it was built.
    routes: the ways that texts go. by_route: the pipelines of each route, where they are not the same for all.
    """

    backbone: Backbone
    pipelines: Mapping[Task, Pipeline]
    facts: Facts
    plan: LoadPlan
    adapters: Adapters | None = None
    routes: Routes = Routes()
    by_route: Mapping[str, Mapping[Task, Pipeline]] = field(default_factory=dict)

    def pipeline(self, task: Task, route: str | None) -> Pipeline:
        """What answers this task for texts that go this way."""
        return self.by_route.get(route or "", self.pipelines)[task]

    @property
    def sparse(self) -> SparseHead | None:
        """How its answers become sparse vectors; None for a model that has none."""
        return next((pipeline.sparse for pipeline in self.pipelines.values() if pipeline.sparse is not None), None)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What it can do; the first is what a request means that names no task."""
        return tuple(self.pipelines)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors that it holds, each once, however many layers share it."""
        seen: set[int] = set()
        found: dict[object, int] = {}
        waiting: list[object] = [self]
        while waiting:
            one = waiting.pop()
            if id(one) in seen or isinstance(one, type | ModuleType | FunctionType):
                continue
            seen.add(id(one))
            if not isinstance(one, Tensor):
                waiting += gc.get_referents(one)
            elif one.is_mkldnn:
                found[id(one)] = one.numel() * one.element_size()
            else:
                storage = one.untyped_storage()
                found[storage.device, storage.data_ptr()] = storage.nbytes()
        return sum(found.values())


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model is, in names and numbers that do not change after loading.

    served_by: who runs it: "native bert, packed", or "transformers, unpacked" and why.
    max_tokens: longest prompt, special tokens included.
    width: length of an embedding before Matryoshka cuts, or the number of labels.
    plugin: the IO processor plugin that config.json names.
    labels: names of a classifier's labels; empty where the checkpoint names none.
    score_template: what makes one prompt of a pair, of rerankers. listwise: for models that score all documents of a
    query together.
    late_interaction: how queries and documents are read, of models that compare token by token.
    pictures: how it reads pictures and writes prompts around them, of models that do.
    labelled: how it reads a text with the labels of its request, of models that do.
    add_special_tokens: whether texts get special tokens unless their caller says no. takes_nothing: whether a text
    without tokens has an answer. similarity: how vectors are compared in scores.
    longest_shared, picks: those of its backbone.
    notes: what was assumed, left out or found odd while loading, a sentence each.
    """

    name: str
    path: str
    architecture: str
    served_by: str
    sizes: Sizes
    max_tokens: int
    width: int
    dtype: torch.dtype
    device: torch.device
    matryoshka: Matryoshka
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    plugin: str | None = None
    score_template: ScoreTemplate | None = None
    listwise: ListwiseTokens | None = None
    late_interaction: LateInteraction | None = None
    pictures: PictureReader | None = None
    labelled: ReadsLabels | None = None
    add_special_tokens: bool = True
    takes_nothing: bool = False
    similarity: str = "cosine"
    longest_shared: int = 0
    picks: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the tensors say.

    hidden_size: features of a hidden state. positions: tokens that the backbone takes at most; None without a limit.
    token_types: rows of its table of token types (segments), or 0.
    """

    hidden_size: int
    vocabulary_size: int
    parameters: int
    positions: int | None = None
    token_types: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A backbone with its tensors, as native loading, transformers or a static table give it.

    pooling: the default where no file says. head: of a classifier or masked language model. pruner: the two of a pruner,
    in place of it.
    endless: whether no table of positions ends, so that the user may ask for more than `sizes.positions`.
    pools_itself: whether the rows of a text are all the same, its vector. merged: adapters that the weights hold.
    """

    backbone: Backbone
    served_by: str
    sizes: Sizes
    pooling: str
    head: LoadedHead | None = None
    pruner: LoadedPruner | None = None
    adapters: Adapters | None = None
    endless: bool = False
    pools_itself: bool = False
    merged: tuple[Adapter, ...] = ()
    notes: tuple[str, ...] = ()
