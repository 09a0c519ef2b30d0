"""A checkpoint of a native family -> its backbone, mostly a Transformer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.models.adapters.adapters import AdapterOptions, Adapters, adapters_of, merged_into
from poolhouse.models.adapters.low_rank import Adapter, Target
from poolhouse.models.adapters.task_adapters import plain, read_task_adapters
from poolhouse.models.backbone import Backbone
from poolhouse.models.files.checkpoint import Checkpoint, Config
from poolhouse.models.native.families import Family
from poolhouse.models.native.weights import Weights, claim, find_layout, unclaimed
from poolhouse.packing.batch import Batch
from poolhouse.packing.tokens import Tokens

_NO_ADAPTERS = AdapterOptions()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A backbone, its sizes, and the tensors that were left out on purpose.

    prefix: what stands before the backbone's names in the checkpoint. token_table: name of the matrix of its tokens.
    table: that matrix, [vocabulary, features]. endless: whether positions are neither looked up nor turned into angles,
    so that texts longer than max_tokens are read in the same way. merged: the adapters that the weights hold.
    token_types: rows of its table of token types, or 0.
    """

    transformer: Backbone
    hidden_size: int
    vocabulary_size: int
    parameters: int
    max_tokens: int | None
    aside: tuple[str, ...]
    table: Tensor
    adapters: Adapters
    prefix: str = ""
    token_table: str = ""
    merged: tuple[Adapter, ...] = ()
    endless: bool = False
    token_types: int = 0


def load_transformer(
    family: Family,
    config: Config,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    options: AdapterOptions = _NO_ADAPTERS,
    others: tuple[str, ...] = (),
) -> Loaded:
    """The backbone of a checkpoint, placed and laid out for its device.

    others: names of tensors that others than the family and its heads read.

    Raises:
        CheckpointError: names that nobody claims, slots without tensors, shapes that do not fit.
    """
    tensors = plain(checkpoint.tensors)
    found = find_layout(family.layouts, tensors)
    if found is None:
        wanted = [layout.token_table + ".weight" for layout in family.layouts]
        raise CheckpointError(f"{checkpoint.folder} has no token table. Looked for {wanted}, with any prefix.")
    layout, prefix = found
    try:
        spec = family.spec(config)
    except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"The config of {checkpoint.folder} cannot be understood: {error!r}") from error
    claimed = claim(layout, prefix, spec, tensors, dtype, device)
    aside, unknown = unclaimed(claimed.left, prefix, (*family.aside, *map(re.escape, others)))
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder} has {len(unknown)} tensors that the {config.get('model_type')} family does not know: "
            f"{unknown[:5]}{' ...' if len(unknown) > 5 else ''}. "
            "Use model_impl='transformers' to load it without the native family."
        )
    tasks = read_task_adapters(checkpoint, config, family.default_adapter)
    target = Target(family, spec, {name: tuple(tensor.shape) for name, tensor in claimed.tensors.items()})
    merged = merged_into(claimed.tensors, target, options, tasks)
    aside += [name for adapter in merged for name in adapter.saved]
    build = partial(family.backbone, config, spec)
    transformer, hidden_size = _fitting(build, Weights(claimed.tensors), device)
    max_tokens = family.max_tokens(config)
    table = claimed.tensors.get("positions.weight")
    _check_positions(table, spec.position_offset, max_tokens)
    return Loaded(
        transformer=transformer,
        hidden_size=hidden_size,
        vocabulary_size=len(claimed.tensors["tokens.weight"]),
        parameters=sum(tensor.numel() for tensor in claimed.tensors.values()),
        max_tokens=max_tokens,
        aside=tuple(aside),
        table=claimed.tensors["tokens.weight"],
        adapters=adapters_of(transformer, target, options, tasks),
        prefix=prefix,
        token_table=f"{prefix}{layout.token_table}.weight",
        merged=merged,
        endless=table is None and all(layer.rope is None for layer in spec.layers),
        token_types=len(claimed.tensors.get("types.weight", ())),
    )


def _fitting(build: Callable[[Weights], Backbone], weights: Weights, device: torch.device) -> tuple[Backbone, int]:
    """The backbone and the width of its answers.

    It is tried on two tokens, so that tensors that do not fit are found now and not by a request.
    """
    try:
        backbone = build(weights)
        with torch.inference_mode():
            hidden = backbone(Batch.pack([Tokens(np.zeros(2, np.int64))], device))
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"The checkpoint's tensors do not fit together: {error}") from error
    return backbone, hidden.shape[-1]


def _check_positions(table: Tensor | None, offset: int, max_tokens: int | None) -> None:
    """Refuse a table that ends before the limit: a long request would read behind it, which no CUDA device survives."""
    if table is not None and max_tokens is not None and max_tokens > table.shape[0] - offset:
        raise CheckpointError(
            f"The config allows {max_tokens} positions, but the checkpoint has vectors for {table.shape[0] - offset}."
        )
