"""A checkpoint's tensors under our names, strict both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.models.spec import TransformerSpec


@dataclass(frozen=True, slots=True)
class Reordered:
    """Their tensor with the equal parts of its first dimension in another order (GTE stores up before gate)."""

    name: str
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ByGroup:
    """Their tensor with the query heads, key and value of each key-value group together (InternLM2).

    Ours has all query heads first, then all keys, then all values.
    """

    name: str


# What one of our slots stands for: their module, several concatenated in this order, or one with parts reordered.
Source = str | tuple[str, ...] | Reordered | ByGroup


@dataclass(frozen=True, slots=True)
class Layout:
    """How one kind of checkpoint names its tensors.

    names: our slot -> their module; "*" stands for the layer. Weight and bias follow.
    optional: slots that a checkpoint may lack. Every other slot must be there, in every layer.
    varying: slots that some layers may lack (ModernBERT has no first norm in layer 0).
    """

    names: Mapping[str, Source]
    optional: frozenset[str] = frozenset()
    varying: frozenset[str] = frozenset()

    @property
    def token_table(self) -> str:
        source = self.names["tokens"]
        assert isinstance(source, str)
        return source


class Weights:
    """Tensors by our slots; `weights / "layers.3" / "attn"` narrows the view."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors = tensors
        self._prefix = prefix

    def __truediv__(self, name: str) -> Weights:
        return Weights(self._tensors, f"{self._prefix}{name}.")

    def __bool__(self) -> bool:
        return any(name.startswith(self._prefix) for name in self._tensors)

    def get(self, kind: str) -> Tensor | None:
        return self._tensors.get(self._prefix + kind)

    @property
    def weight(self) -> Tensor:
        tensor = self.get("weight")
        if tensor is None:
            slot = self._prefix.removesuffix(".")
            raise CheckpointError(f"config.json asks for '{slot}', which no tensor of the checkpoint fills.")
        return tensor

    @property
    def bias(self) -> Tensor | None:
        return self.get("bias")


@dataclass(slots=True)
class Claimed:
    """The outcome of `claim`: tensors under our names, and what was left aside."""

    tensors: dict[str, Tensor]
    left: list[str] = field(default_factory=list)


def find_layout(layouts: Iterable[Layout], names: Iterable[str]) -> tuple[Layout, str] | None:
    """The layout that fits the checkpoint's names best, and the prefix that stands before them.

    A layout fits only if its token table is there.
    """
    present = set(names)
    found: list[tuple[int, Layout, str]] = []
    for layout in layouts:
        table = f"{layout.token_table}.weight"
        prefixes = [name.removesuffix(table) for name in present if name == table or name.endswith("." + table)]
        for prefix in prefixes[:1]:
            modules = [module for source in layout.names.values() for module in _modules(source)]
            known = sum(f"{prefix}{module.replace('*', '0')}.weight" in present for module in modules)
            found.append((known, layout, prefix))
    if not found:
        return None
    _, layout, prefix = max(found, key=lambda candidate: candidate[0])
    return layout, prefix


def claim(
    layout: Layout,
    prefix: str,
    spec: TransformerSpec,
    theirs: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Claimed:
    """Tensors under our names, cast to `dtype`, on `device`.

    Raises:
        CheckpointError: a slot that has no tensor, naming both its names.
    """
    names = set(theirs)
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    for slot, source in layout.names.items():
        starred = "*" in slot
        # ALBERT has no layers of its own names: all share one set.
        for kind in ("weight", "bias"):
            present: list[bool] = []
            shapes: set[torch.Size] = set()
            for layer in range(len(spec.layers)) if starred else (0,):
                sources = [f"{prefix}{name.replace('*', str(layer))}.{kind}" for name in _modules(source)]
                there = [name in names for name in sources]
                if any(there) and not all(there):
                    lost = [name for name, found in zip(sources, there, strict=True) if not found]
                    raise CheckpointError(f"The checkpoint lacks {lost}, but has their companions.")
                present.append(all(there))
                if all(there):
                    parts = [theirs[name] for name in sources]
                    tensor = _join(parts, source, spec)
                    shapes.add(tensor.shape)
                    if len(shapes) > 1:
                        raise CheckpointError(
                            f"{sources} ({slot}) is {list(tensor.shape)}, unlike in the layers before it."
                        )
                    ours[f"{slot.replace('*', str(layer))}.{kind}"] = tensor.to(device, dtype)
                    used.update(sources)
            _check_presence(slot, kind, source, present, layout, prefix)
    return Claimed(ours, sorted(names - used))


def unclaimed(left: Iterable[str], prefix: str, known: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split names that no slot claimed into (known and left out on purpose, known to nobody).

    known: regular expressions over names, with or without the model's prefix.
    """
    pattern = re.compile("|".join(f"(?:{expression})" for expression in known) or r"(?!)")
    aside: list[str] = []
    unknown: list[str] = []
    for name in left:
        found = pattern.fullmatch(name) or pattern.fullmatch(name.removeprefix(prefix))
        (aside if found else unknown).append(name)
    return aside, unknown


def _modules(source: Source) -> tuple[str, ...]:
    if isinstance(source, Reordered | ByGroup):
        return (source.name,)
    return (source,) if isinstance(source, str) else source


def _join(parts: list[Tensor], source: Source, spec: TransformerSpec) -> Tensor:
    if isinstance(source, ByGroup):
        return _ungrouped(parts[0], spec)
    if isinstance(source, Reordered):
        chunks = parts[0].chunk(len(source.order))
        return torch.cat([chunks[index] for index in source.order])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _ungrouped(tensor: Tensor, spec: TransformerSpec) -> Tensor:
    """Queries, keys and values one after another, from groups of (queries ..., key, value)."""
    heads, rest = divmod(len(tensor), spec.head_dim)
    groups = (heads - spec.heads) // 2
    if rest or groups < 1 or heads != spec.heads + 2 * groups or spec.heads % groups:
        raise CheckpointError(
            f"A tensor of {len(tensor)} rows cannot hold {spec.heads} query heads {spec.head_dim} wide, "
            "and keys and values that they share."
        )
    grouped = tensor.unflatten(0, (groups, -1, spec.head_dim))
    parts = (grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1])
    return torch.cat(parts).flatten(0, 1)


def _check_presence(slot: str, kind: str, source: Source, present: list[bool], layout: Layout, prefix: str) -> None:
    if all(present) or slot in layout.varying:
        return
    named = [prefix + name for name in _modules(source)]
    if any(present):
        raise CheckpointError(
            f"The checkpoint has {named}.{kind} in some layers but not in {[i for i, p in enumerate(present) if not p]}."
        )
    if kind == "weight" and slot not in layout.optional:
        raise CheckpointError(f"The checkpoint lacks {named}.weight, which the model's '{slot}' needs.")
