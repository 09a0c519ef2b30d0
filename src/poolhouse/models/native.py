"""A checkpoint of a native family -> Transformer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from poolhouse.batch import Batch
from poolhouse.errors import CheckpointError
from poolhouse.models.adapter import Target
from poolhouse.models.adapters import AdapterOptions, Adapters, adapters_of, merged_into
from poolhouse.models.checkpoint import Checkpoint, Config
from poolhouse.models.families import Family
from poolhouse.models.spec import TransformerSpec
from poolhouse.models.task_adapters import plain, read_task_adapters
from poolhouse.models.transformer import Transformer
from poolhouse.models.weights import Weights, claim, find_layout, unclaimed
from poolhouse.tokens import Tokens

_NO_ADAPTERS = AdapterOptions()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A Transformer, its sizes, and the tensors that were left out on purpose."""

    transformer: Transformer
    hidden_size: int
    vocabulary_size: int
    parameters: int
    max_tokens: int | None
    aside: tuple[str, ...]
    adapters: Adapters


def load_transformer(
    family: Family,
    config: Config,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    options: AdapterOptions = _NO_ADAPTERS,
) -> Loaded:
    """The backbone of a checkpoint, placed and laid out for its device.

    Raises:
        CheckpointError: names that nobody claims, slots without tensors, shapes that do not fit.
    """
    tensors = plain(checkpoint.tensors)
    found = find_layout(family.layouts, tensors)
    if found is None:
        wanted = [layout.token_table + ".weight" for layout in family.layouts]
        raise CheckpointError(f"{checkpoint.folder} has no token table. Looked for {wanted}, with any prefix.")
    layout, prefix = found
    spec = family.spec(config)
    claimed = claim(layout, prefix, len(spec.layers), tensors, dtype, device)
    aside, unknown = unclaimed(claimed.left, prefix, family.aside)
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder} has {len(unknown)} tensors that the {config.get('model_type')} family does not know: "
            f"{unknown[:5]}{' ...' if len(unknown) > 5 else ''}. "
            "Use model_impl='transformers' to load it without the native family."
        )
    tasks = read_task_adapters(checkpoint, config, family.default_adapter)
    target = Target(family, spec, {name: tuple(tensor.shape) for name, tensor in claimed.tensors.items()})
    aside += merged_into(claimed.tensors, target, options, tasks)
    transformer = _fitting(spec, claimed.tensors, device)
    vocabulary_size, width = claimed.tensors["tokens.weight"].shape
    project = claimed.tensors.get("project.weight")
    return Loaded(
        transformer=transformer,
        hidden_size=width if project is None else project.shape[0],
        vocabulary_size=vocabulary_size,
        parameters=sum(tensor.numel() for tensor in claimed.tensors.values()),
        max_tokens=family.max_tokens(config),
        aside=tuple(aside),
        adapters=adapters_of(transformer, target, options, tasks),
    )


def _fitting(spec: TransformerSpec, tensors: dict[str, Tensor], device: torch.device) -> Transformer:
    """The Transformer, tried on two tokens, so that tensors that do not fit are found now and not by a request."""
    try:
        transformer = Transformer(spec, Weights(tensors))
        with torch.inference_mode():
            transformer(Batch.pack([Tokens(np.zeros(2, np.int64))], device))
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"The checkpoint's tensors do not fit together: {error}") from error
    return transformer
