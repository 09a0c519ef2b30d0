"""Model: a backbone, a pipeline per task, and facts about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from poolhouse.inputs.rules import LateInteraction
from poolhouse.models.adapters.adapters import Adapters
from poolhouse.models.backbone import Backbone
from poolhouse.models.files.routes import Routes
from poolhouse.params import Matryoshka
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.tasks import SparseHead, Task


@dataclass(frozen=True, slots=True)
class ScoreRecipe:
    """How a query and a document become one prompt, where the tokenizer does not join them.

    template: the name of a built-in template, or the text of one. The rest is as in `poolhouse.inputs.templates.score`.
    """

    name: str
    template: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: bool = True
    structured: bool = False
    instruction_as_system: bool = False
    keep_last_newline: bool = True


@dataclass(frozen=True, slots=True)
class Listwise:
    """Tokens at which a listwise reranker, that reads all documents in one prompt, is asked for their vectors."""

    document_token: str
    query_token: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model is, in words and numbers that do not change after loading.

    served_by: who runs it: "native bert", or "transformers, packed" and why.
    max_tokens: longest prompt, special tokens included.
    token_types: rows of its table of token types (segments); 0 where it has none.
    width: length of an embedding before Matryoshka cuts, or the number of labels.
    plugin: the IO processor plugin that config.json names.
    labels: names of a classifier's labels; empty where the checkpoint names none.
    recipe: what rerankers make of a pair. listwise: for models that score all documents of a query together.
    late_interaction: how queries and documents are read, of models that compare token by token.
    add_special_tokens: whether texts get special tokens unless their caller says no. takes_nothing: whether a text
    without tokens has an answer. similarity: how vectors are compared in scores.
    notes: what was assumed, left out or found odd while loading, a sentence each.
    """

    name: str
    path: str
    architecture: str
    served_by: str
    max_tokens: int
    vocabulary_size: int
    hidden_size: int
    width: int
    parameters: int
    dtype: torch.dtype
    device: torch.device
    matryoshka: Matryoshka
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    token_types: int = 0
    labels: Mapping[int, str] = field(default_factory=dict)
    plugin: str | None = None
    recipe: ScoreRecipe | None = None
    listwise: Listwise | None = None
    late_interaction: LateInteraction | None = None
    add_special_tokens: bool = True
    takes_nothing: bool = False
    similarity: str = "cosine"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """One loaded model, ready to run packs.

    routes: the ways that texts go. sides: the pipelines of each route, where they are not the same for all.
    """

    backbone: Backbone
    pipelines: Mapping[Task, Pipeline]
    facts: Facts
    adapters: Adapters | None = None
    routes: Routes = Routes()
    sides: Mapping[str, Mapping[Task, Pipeline]] = field(default_factory=dict)

    def pipeline(self, task: Task, route: str | None) -> Pipeline:
        """What answers this task for texts that go this way."""
        return self.sides.get(route or "", self.pipelines)[task]

    @property
    def sparse(self) -> SparseHead | None:
        """How its answers become sparse vectors; None for a model that has none."""
        return next((pipeline.sparse for pipeline in self.pipelines.values() if pipeline.sparse is not None), None)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What it can do; the first is what a request means that names no task."""
        return tuple(self.pipelines)
