"""DualEncoder: texts through a Transformer, pictures through a tower, one vector for each; a pack may mix both.

A picture is a prompt of one token, which the Transformer reads too and nobody looks at:

    pack      [a text ...][picture][another text ...]
    text       t  t  t  t     -     t  t  t  t  t  t    ──pooled──►  a row per prompt  ─┐
    tower                  patches                      ──────────►  a row per picture ─┴──► the vector of its prompt, per token
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poolhouse.models.backbone import Tower
from poolhouse.models.native.transformer import Transformer
from poolhouse.packing.pack import Batch, Segments


@dataclass(frozen=True, slots=True)
class Padding:
    """To which length texts are filled up, with which token and on which side, for models that attend to it (SigLIP)."""

    length: int
    token: int
    left: bool = False

    def __call__(self, batch: Batch) -> Batch:
        """The texts of a pack, filled up; a picture stays one token."""
        shown = frozenset(() if batch.pictures is None else batch.pictures.prompts)
        lengths = [1 if prompt in shown else self.length for prompt in range(len(batch.segments))]
        segments = Segments(lengths, batch.segments.device)
        rows = batch.positions + segments.starts_tensor[batch.segments.owner]
        if self.left:
            rows += (segments.lengths_tensor - batch.segments.lengths_tensor)[batch.segments.owner]
        ids = torch.full((segments.total,), self.token, dtype=batch.ids.dtype, device=batch.ids.device)
        ids[rows] = batch.ids
        return Batch(ids, segments.positions, segments)


class DualEncoder:
    """Two towers with answers of one width.

    text: gives the vector of a text at one of its tokens. pooled: the rows of these tokens, [prompts].
    padding: of texts, where the model was trained on it.
    """

    reentrant = True
    longest_shared = 0
    picks = False

    def __init__(
        self, text: Transformer, tower: Tower, pooled: Callable[[Batch], Tensor], padding: Padding | None = None
    ) -> None:
        self.text, self.tower, self.pooled, self.padding = text, tower, pooled, padding

    def __call__(self, batch: Batch) -> Tensor:
        """[total, width]: at each token, the vector of its prompt."""
        pictures = batch.pictures
        if pictures is not None and len(pictures.prompts) == len(batch.segments):
            return pictures.taken(self.tower(pictures).rows)
        texts = replace(batch, pictures=None) if self.padding is None else self.padding(batch)
        vectors = self.text(texts)[self.pooled(texts)][batch.segments.owner]
        if pictures is not None:
            vectors[pictures.filled] = pictures.taken(self.tower(pictures).rows)
        return vectors


def last_token(batch: Batch) -> Tensor:
    """The row of each text's last token."""
    return batch.segments.last_tensor


@dataclass(frozen=True, slots=True)
class EndToken:
    """The row of the first token `eos` of each text, or of its first token where it has none.

    eos: None for the largest id of each text, which is what CLIP's first files mean.
    """

    eos: int | None

    def __call__(self, batch: Batch) -> Tensor:
        segments = batch.segments
        wanted = batch.ids if self.eos is None else (batch.ids == self.eos).long()
        # Of equal ones the first: its position counts against it.
        ranked = wanted * segments.longest + (segments.longest - 1 - segments.positions)
        best = ranked.new_full((len(segments),), -1).scatter_reduce(0, segments.owner, ranked, "amax")
        return segments.starts_tensor + segments.longest - 1 - best % segments.longest
