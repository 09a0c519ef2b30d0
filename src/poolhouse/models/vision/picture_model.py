"""PictureModel: one kind of checkpoint that reads pictures and what its files do not say; TowerFamily: its vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from poolhouse.files import Folder
from poolhouse.inputs.pictures import PictureReader
from poolhouse.models.backbone import Backbone, Tower
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.transformer import Transformer
from poolhouse.models.native.weights import Layout, Weights


@dataclass(frozen=True, slots=True)
class TowerFamily:
    """One kind of vision tower: what its config means and how its tensors are called.

    config: the tower's own part of config.json, completed by the defaults of transformers' class.
    spec: the behaviour of its blocks, from that part.
    layouts: how checkpoints name its tensors; the one whose `anchor` slot is present wins.
    build: the tower, of that part, its spec and its tensors.
    aside: regular expressions of tensors of it that are not used.
    """

    config: Callable[[Config], Config]
    spec: Callable[[Config], TransformerSpec]
    layouts: tuple[Layout, ...]
    build: Callable[[Config, TransformerSpec, Weights], Tower]
    aside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PictureModel:
    """One row of the table of models that read pictures.

    name: for people ("ColQwen3 of TomoroAI"). matches: whether a checkpoint is one, by its config.json, the names of its
    tensors and its other files. reader: how it reads pictures and writes prompts, from config.json and its folder.
    answers: "late" for token vectors that are compared one by one, "dense" for one vector, "score" for a reranker.
    text, tower: its native halves; None where transformers runs it. text_config: the part that the text family reads.
    join: makes the backbone of both halves where prompts are texts or pictures, never both, and each gets one vector
    (CLIP); None where the tower's rows stand among the text model's tokens.
    projections: modules from a hidden state to a token's vector, under one of these names (weight, and bias if there).
    pooling: of "dense", where no file says it. notes: what is assumed, printed at load.
    """

    name: str
    matches: Callable[[Config, Folder], bool]
    reader: Callable[[Config, Folder], PictureReader]
    answers: Literal["late", "dense", "score"]
    text: Family | None = None
    text_config: Callable[[Config], Config] = lambda config: config
    tower: TowerFamily | None = None
    join: Callable[[Config, Folder, Transformer, Tower], Backbone] | None = None
    projections: tuple[str, ...] = ()
    pooling: str | None = None
    notes: tuple[str, ...] = ()
