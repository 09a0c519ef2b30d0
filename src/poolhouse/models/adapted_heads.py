"""Heads that come with an adapter: tensors saved whole, or changed by low rank, in place of the checkpoint's."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence

from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.models.adapter import Adapter, tails
from poolhouse.models.heads import Head, HeadModule, present


def with_heads(
    head: Head, tensors: Mapping[str, Tensor], prefix: str, adapters: Sequence[Adapter]
) -> Mapping[str, Tensor]:
    """A checkpoint's tensors, those of the head as the merged adapters have them, later ones last.

    Raises:
        CheckpointError: a low-rank change of what is no plain layer, or of another shape.
    """
    for adapter in adapters:
        brought: dict[str, Tensor] = {}
        for module in head.modules:
            brought |= _brought(module, tensors, prefix, adapter)
        if brought:
            # ChainMap reads alone here, which any mapping can.
            tensors = ChainMap(brought, tensors)  # type: ignore[arg-type]
    return tensors


def _brought(module: HeadModule, tensors: Mapping[str, Tensor], prefix: str, adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter makes of one module, under the module's plain name, which is looked up first."""
    names = (module.name, *module.also)
    brought: dict[str, Tensor] = {}
    for saved, tensor in adapter.saved.items():
        owner, _, kind = saved.rpartition(".")
        if any(tail in names for tail in tails(owner)):
            brought[f"{module.name}.{kind}"] = tensor
    change = next((change for name, change in adapter.changes.items() if set(tails(name)) & set(names)), None)
    if change is None:
        return brought
    weights = [*brought, *present([f"{name}.weight" for name in names], tensors, prefix)]
    if module.kind != "dense" or not weights:
        raise CheckpointError(f"{adapter.source} changes {module.name}, which is no plain layer of a head.")
    name = f"{module.name}.weight"
    weight = brought[name] if name in brought else tensors[weights[0]]
    if change.shape != tuple(weight.shape):
        raise CheckpointError(
            f"{adapter.source} changes {name} as {list(change.shape)}, but the model's is {list(weight.shape)}."
        )
    return brought | {name: weight.float() + change.delta()}
