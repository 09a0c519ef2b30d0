"""Backbones around a model of transformers: on a whole pack, or on prompts of equal length at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poolhouse.packing.pack import Batch, PackedPictures, Segments


class Packed:
    """Runs a model on a whole pack, as one row of tokens."""

    # Modules of transformers may keep what they computed last, such as the frequencies of a rope that grows.
    reentrant = False
    longest_shared = 0
    picks = False

    def __init__(self, forward: Forward, position_offset: int, shown: Shown | None = None) -> None:
        self.forward = forward
        self.position_offset = position_offset
        self.shown = shown

    def __call__(self, batch: Batch) -> Tensor:
        """[total, hidden]."""
        types = None if batch.types is None else batch.types[None]
        # Models that count from behind the pad id do not count padding, which a text may write.
        positions = batch.positions_without(self.position_offset - 1) if self.position_offset else batch.positions
        if batch.pictures is not None and batch.pictures.axes is not None:
            positions = batch.pictures.axes
        positions = (positions + self.position_offset)[..., None, :]
        read = batch.ids if self.shown is None else self.shown(batch)
        return self.forward(read[None], positions, types, batch.segments)[0]


class Unpacked:
    """Runs prompts of one shape together: no padding, so each is computed as if it were alone.

    A mask is passed only where not all tokens are attended to, and positions only where they have three axes.
    """

    reentrant = False
    longest_shared = 0
    picks = False

    def __init__(self, forward: Forward, hidden_size: int, shown: Shown | None = None) -> None:
        self.forward = forward
        self.hidden_size = hidden_size
        self.shown = shown

    def __call__(self, batch: Batch) -> Tensor:
        """[total, hidden]."""
        segments = batch.segments
        starts_by_shape: dict[tuple[int, int], list[int]] = {}
        shapes = zip(segments.lengths, segments.attended or segments.lengths, strict=True)
        for start, shape in zip(segments.starts, shapes, strict=True):
            starts_by_shape.setdefault(shape, []).append(start)
        read = batch.ids if self.shown is None else self.shown(batch)
        axes = None if batch.pictures is None else batch.pictures.axes
        hidden = torch.empty(batch.segments.total, self.hidden_size, dtype=self.forward.dtype, device=batch.ids.device)
        for (length, attended), starts in starts_by_shape.items():
            rows = torch.tensor(starts)[:, None] + torch.arange(length)
            rows = rows.to(batch.ids.device)
            types = None if batch.types is None else batch.types[rows]
            seen = None if attended == length else (torch.arange(length) < attended).expand(len(starts), -1)
            positions = None if axes is None else axes[:, rows]
            hidden[rows] = self.forward(read[rows], positions, types=types, seen=seen)
        return hidden


class Shown:
    """What a model reads of a batch with pictures: the embeddings of its tokens, and pictures' rows in their places.

    rows: what the model makes of the pictures of a pack; [rows, features], in their order. together: whether it may
    take them at once.
    """

    def __init__(self, model: Any, rows: Callable[[Any, PackedPictures], Tensor], dtype: torch.dtype) -> None:
        self.model = model
        self.together = True
        self._rows = rows
        self.dtype = dtype
        self._table = model.get_input_embeddings()

    def __call__(self, batch: Batch) -> Tensor:
        """[total, features]."""
        if batch.pictures is None:
            return self.embed(batch.ids)
        filled, source = batch.pictures.filled, batch.pictures.source
        rows = self.rows(batch.pictures)
        # The ids of pictures may lie outside the table.
        embedded = self.embed(batch.ids.index_fill(0, filled, 0))
        embedded[filled] = rows if source is None else rows[source]
        return embedded

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """[tokens, features]."""
        embedded: Tensor = self._table(ids)
        return embedded.to(self.dtype)

    @torch.no_grad()
    def rows(self, pictures: PackedPictures) -> Tensor:
        """[rows, features], of each distinct picture once."""
        cast = replace(pictures, pixels=pictures.pixels.to(self.dtype))
        parts = (cast,) if self.together else cast.each()
        return torch.cat([self._rows(self.model, part).to(self.dtype) for part in parts])


def hidden_states(answer: Any, ids: Tensor) -> Tensor:
    """[rows, length, hidden] of what a model without a head answers."""
    found: Tensor | None = getattr(answer, "last_hidden_state", None)
    return answer[0] if found is None else found


def logits(answer: Any, ids: Tensor) -> Tensor:
    """[rows, length, labels]; the answer to a whole text is repeated at each of its tokens."""
    found: Tensor = answer.logits
    return found[:, None].expand(-1, ids.shape[1], -1) if found.ndim == 2 else found


def text_features(answer: Any, ids: Tensor) -> Tensor:
    """[rows, length, features] of a model that answers with one vector per text: the same at each of its tokens."""
    found: Tensor = answer.text_embeds if hasattr(answer, "text_embeds") else answer.pooler_output
    return found if found.ndim == 3 else found[:, None].expand(-1, ids.shape[1], -1)


@dataclass(frozen=True, slots=True)
class Padding:
    """To which length texts are filled up, with which token and where, for models that attend to it (SigLIP)."""

    length: int
    token: int
    left: bool = False

    def __call__(self, ids: Tensor) -> Tensor:
        missing = self.length - ids.shape[1]
        return torch.nn.functional.pad(ids, (missing, 0) if self.left else (0, missing), value=self.token)


class Forward:
    """One call of a transformers model, with only the keywords that it takes.

    read: takes from its answer the row of each token. method: what is called. padding: of ids, where needed.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        read: Callable[[Any, Tensor], Tensor] = hidden_states,
        method: str = "__call__",
        padding: Padding | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self._read = read
        self._call = getattr(model, method)
        self._padding = padding
        self._takes = frozenset(inspect.signature(model.forward if method == "__call__" else self._call).parameters)

    @torch.inference_mode()
    def __call__(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        types: Tensor | None = None,
        segments: Segments | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """ids, positions, types: [rows, length] -> [rows, length, hidden]. seen: as ids, the tokens attended to.

        ids: those of tokens, or their embeddings [rows, length, features]. positions may have axes in front.
        """
        name = "inputs_embeds" if ids.is_floating_point() else "input_ids"
        keywords: dict[str, Any] = {name: ids if self._padding is None else self._padding(ids)}
        if seen is not None:
            keywords["attention_mask"] = seen.long().to(ids.device)
        optional = {"position_ids": positions, "token_type_ids": types, "use_cache": False}
        keywords |= {name: value for name, value in optional.items() if value is not None and name in self._takes}
        if segments is not None:
            keywords["segments"] = segments
        hidden = self._read(self._call(**keywords), ids)
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != ids.shape[:2]:
            raise ValueError("the model does not answer with one hidden state per token")
        return hidden.to(self.dtype)
