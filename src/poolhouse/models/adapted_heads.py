"""Heads that come with an adapter: tensors saved whole, or changed by low rank, in place of the checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

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
            tensors = _Overlaid(brought, tensors)
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


class _Overlaid(Mapping[str, Tensor]):
    """Some tensors in place of, or beside, those of a checkpoint."""

    def __init__(self, over: Mapping[str, Tensor], under: Mapping[str, Tensor]) -> None:
        self._over, self._under = over, under

    def __getitem__(self, name: str) -> Tensor:
        return self._over[name] if name in self._over else self._under[name]

    def __contains__(self, name: object) -> bool:
        return name in self._over or name in self._under

    def __iter__(self) -> Iterator[str]:
        yield from self._over
        yield from (name for name in self._under if name not in self._over)

    def __len__(self) -> int:
        return len(set(self._over) | set(self._under))
