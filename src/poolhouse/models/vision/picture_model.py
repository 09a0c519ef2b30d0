"""PictureModel: one kind of checkpoint that reads pictures and what its files do not say.

It is served by a native text family and a TowerFamily, or Hosted by transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from poolhouse.files import Folder
from poolhouse.inputs.late_interaction import LateInteraction, TextRules
from poolhouse.inputs.pictures import PictureReader
from poolhouse.models.backbone import Backbone, Tower
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.late_interaction import LateInteractionFiles
from poolhouse.models.heads.rerankers import Reranker, TokenScore, token_ids
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.transformer import Transformer
from poolhouse.models.native.weights import Layout, Weights
from poolhouse.packing.pack import PackedPictures
from poolhouse.packing.tokens import Picture


@dataclass(frozen=True, slots=True)
class TowerFamily:
    """One kind of vision tower: what its config means and how its tensors are called.

    config: the tower's own part of config.json, completed by the defaults of transformers' class.
    spec: the behaviour of its blocks, from that part.
    layouts: how checkpoints name its tensors; the one whose `anchor` slot is present wins.
    build: the tower, of that part, its spec and its tensors.
    sample: a blank picture of the smallest size, from that part; the tower is tried on it at load.
    aside: regular expressions of tensors of it that are not used.
    """

    config: Callable[[Config], Config]
    spec: Callable[[Config], TransformerSpec]
    layouts: tuple[Layout, ...]
    build: Callable[[Config, TransformerSpec, Weights], Tower]
    sample: Callable[[Config], Picture]
    aside: tuple[str, ...] = ()


def named(*architectures: str, model_types: tuple[str, ...] = ()) -> Callable[[Config, Folder], bool]:
    """Whether config.json names one of these classes; of these model types, where several kinds share a name."""

    def matches(config: Config, _: Folder) -> bool:
        found = not set(architectures).isdisjoint(config.get("architectures") or ())
        return found and (not model_types or config.get("model_type") in model_types)

    return matches


def own_part(config: Config) -> Config:
    """The part of config.json that describes the text half; all of it in older files."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else config


def _unstated(_: Config) -> int | None:
    return None


def _no_rules(_: Config, folder: Folder) -> LateInteraction:
    return LateInteraction(TextRules(), TextRules())


@dataclass(frozen=True, slots=True)
class Hosted:
    """How transformers runs a model that reads pictures.

    rows: what its model without a head makes of the pictures of a pack, whose pixels are in the model's dtype; [rows,
    features], in their order. config: of that model, from config.json. causal: whether tokens see earlier ones only,
    where config.json decides otherwise than transformers. probe: options of the processor that keep pictures small, for
    the probe at load.
    """

    rows: Callable[[Any, PackedPictures], Tensor]
    config: Callable[[Config], Config] = lambda config: config
    causal: Callable[[Config], bool] | None = None
    probe: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PictureModel:
    """One row of the table of models that read pictures.

    name: for people ("ColQwen3 of TomoroAI"). matches: whether a checkpoint is one, by its config.json and its folder.
    reader: how it reads pictures and writes prompts, from config.json and the folder of its processor's files.
    named: parts of names, one of which a checkpoint or a base of its card has to have, of kinds that files do not tell;
    "tag:..." is a tag of its card.
    answers: "late" for token vectors that are compared one by one, "dense" for one vector, "both", "score" for a reranker.
    text, tower: its native halves; None where transformers runs it, as `hosted` says. text_config: the part that the
    text family reads.
    join: makes the backbone of both halves, with the tokenizer's folder, where prompts are texts or pictures, never both,
    and each gets one vector (CLIP); None where the tower's rows stand among the text model's tokens.
    projections: modules from a hidden state to a token's vector, the first that is there (weight, and bias if there);
    () where vectors are hidden states. width: features of these vectors as config.json states them, to be checked.
    rules: lengths of queries and documents of "late", from the processor's folder.
    dims: how many of them answers have unless the request says otherwise, of models that were trained to be cut.
    pooling: of one vector, where no file says it. of_pictures: whether that of a prompt with pictures is made of their
    rows alone, marks included. tokens: those whose logits make a score, no and yes; where there are none, the text half
    has a head. max_tokens: of a prompt, in its own code. aside: regular expressions of tensors that neither half has a use for.
    refused: why models of this kind are not served. notes: what is assumed, printed at load.
    """

    name: str
    matches: Callable[[Config, Folder], bool]
    reader: Callable[[Config, Folder], PictureReader]
    answers: Literal["late", "dense", "both", "score"]
    named: tuple[str, ...] = ()
    text: Family | None = None
    text_config: Callable[[Config], Config] = own_part
    tower: TowerFamily | None = None
    join: Callable[[Config, Folder, Transformer, Tower], Backbone] | None = None
    hosted: Hosted | None = None
    projections: tuple[str, ...] = ()
    width: Callable[[Config], int | None] = _unstated
    dims: Callable[[Config], int | None] = _unstated
    rules: Callable[[Config, Folder], LateInteraction] = _no_rules
    pooling: str | None = None
    of_pictures: bool = False
    tokens: tuple[str, str] | None = None
    max_tokens: int | None = None
    aside: tuple[str, ...] = ()
    refused: str = ""
    notes: tuple[str, ...] = ()

    def late(self, config: Config, folder: Folder) -> LateInteractionFiles | None:
        """What is known of its token vectors, where it compares them. folder: of its processor's files."""
        if self.answers not in ("late", "both"):
            return None
        return LateInteractionFiles(
            self.rules(config, folder) if self.answers == "late" else None,
            heads=None if self.projections else (),
            dimensions=self.width(config),
            projections=self.projections,
        )

    def reranker(self, config: Config, folder: Folder) -> Reranker:
        """What its score is read from; its prompts are written by its reader. folder: of its tokenizer."""
        texts = config.get("classifier_from_token") or self.tokens
        tokens = None if texts is None else TokenScore(token_ids(folder, tuple(texts)), difference=True)
        return Reranker(tokens, max_tokens=self.longest(config))

    def longest(self, config: Config) -> int | None:
        """The longest prompt by its own code, but no longer than its positions; None where that states none."""
        if self.text is None or self.max_tokens is None:
            return None
        return min(self.max_tokens, self.text.max_tokens(self.text_config(config)) or self.max_tokens)
