"""Weights: a checkpoint's tensors under our names, strict both ways: no slot without a tensor, no tensor unknown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.models.files.quantised import Dequantised, check_plain
from poolhouse.models.files.quantised.stored import Whole
from poolhouse.models.native.spec import TransformerSpec


@dataclass(frozen=True, slots=True)
class Reordered:
    """Their tensor with the equal parts of its first dimension in another order (GTE stores up before gate)."""

    name: str
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bare:
    """Their tensor under a name of its own, without ".weight" behind it (Nomic's experts)."""

    name: str


@dataclass(frozen=True, slots=True)
class ByGroup:
    """Their tensor with the query heads, key and value of each key-value group together (InternLM2).

    Ours has all query heads first, then all keys, then all values.
    """

    name: str


# What one of our slots stands for: their module, several concatenated in this order, one with parts reordered, a tensor.
Source = str | tuple[str, ...] | Reordered | ByGroup | Bare


@dataclass(frozen=True, slots=True)
class Layout:
    """How one kind of checkpoint names its tensors.

    names: our slot -> their module; "*" stands for the layer. Weight and bias follow.
    optional: slots that a checkpoint may lack. Every other slot must be there, in every layer.
    varying: slots that some layers may lack (ModernBERT has no first norm in layer 0).
    outside: slots whose names never carry the prefix of the others (a projection beside the model).
    anchor: the slot whose tensor shows that a checkpoint has this layout, and which prefix.
    """

    names: Mapping[str, Source]
    optional: frozenset[str] = frozenset()
    varying: frozenset[str] = frozenset()
    outside: frozenset[str] = frozenset()
    anchor: str = "tokens"

    @property
    def token_table(self) -> str:
        """Their module of the anchor."""
        source = self.names[self.anchor]
        assert isinstance(source, str)
        return source


class Weights:
    """Tensors by our slots; `weights / "layers.3" / "attn"` narrows the view.

    int8: whether the products of blocks are to be made in int8.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "", int8: bool = False) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self.int8 = int8

    def __truediv__(self, name: str) -> Weights:
        return Weights(self._tensors, f"{self._prefix}{name}.", self.int8)

    def __bool__(self) -> bool:
        return any(name.startswith(self._prefix) for name in self._tensors)

    def get(self, kind: str) -> Tensor | None:
        return self._tensors.get(self._prefix + kind)

    @property
    def weight(self) -> Tensor:
        """Raises CheckpointError where the checkpoint has none."""
        tensor, steps = self.get("weight"), self.get("steps")
        if tensor is None:
            slot = self._prefix.removesuffix(".")
            raise CheckpointError(f"config.json asks for '{slot}', which no tensor of the checkpoint fills.")
        return tensor if steps is None else tensor * steps[:, None]

    @property
    def whole(self) -> Whole | None:
        """The weight that was claimed as whole numbers, with a step per output; None where it was not."""
        weight, steps = self.get("weight"), self.get("steps")
        return None if weight is None or steps is None else (weight, steps)

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
            # Two layers, because experts may stand in every second one only.
            names = {
                name
                for slot, source in layout.names.items()
                for layer in (0, 1)
                for name in _names(source, _prefix(layout, slot, prefix), layer, "weight")
            }
            found.append((len(names & present), layout, prefix))
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
    whole: bool = False,
) -> Claimed:
    """Tensors under our names, cast to `dtype`, on `device`.

    whole: take weights of blocks that are stored as int8 with a step per output as they are, their steps as "steps".

    Raises:
        CheckpointError: a slot that has no tensor, naming both its names.
    """
    names = set(theirs)
    ours: dict[str, Tensor] = {}
    used: set[str] = set()
    for slot, source in layout.names.items():
        # ALBERT has no layers of its own names: all share one set.
        layers = range(len(spec.layers)) if "*" in slot else (0,)
        filled = dict.fromkeys(layers, True)
        for kind in ("weight", "bias"):
            shapes: set[torch.Size] = set()
            present: dict[int, bool] = {}
            for layer in layers:
                wanted = _names(source, _prefix(layout, slot, prefix), layer, kind)
                there = [name in names for name in wanted]
                if any(there) and not all(there):
                    lost = [name for name, found in zip(wanted, there, strict=True) if not found]
                    raise CheckpointError(f"The checkpoint lacks {lost}, but has their companions.")
                present[layer] = any(there)
                if present[layer]:
                    here = slot.replace("*", str(layer))
                    stored = _whole(theirs, wanted) if whole and kind == "weight" and PRODUCT.fullmatch(slot) else None
                    if stored is None:
                        tensor = _joined([check_plain(name, theirs[name]) for name in wanted], source, spec)
                        tensor = tensor.to(device, dtype)
                    else:
                        tensor, ours[f"{here}.steps"] = (_joined(parts, source, spec) for parts in stored)
                    shapes.add(tensor.shape)
                    if len(shapes) > 1:
                        raise CheckpointError(
                            f"{wanted} ({slot}) is {list(tensor.shape)}, unlike in the layers before it."
                        )
                    ours[f"{here}.{kind}"] = tensor
                    used.update(wanted)
            if slot in layout.varying:
                # A layer may lack the whole slot, but not only its bias.
                filled = present if kind == "weight" else filled
                present = {layer: there for layer, there in present.items() if filled[layer]}
            _check_presence(slot, kind, source, present, layout, prefix)
    return Claimed(ours, sorted(set(theirs) - used))


# Slots of products that `product_of` may make int8.
PRODUCT = re.compile(r"layers\.[\w*]+\.(attn\.(qkv|out)|ffn\.(up|down))")


def _whole(theirs: Mapping[str, Tensor], names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]] | None:
    """Whole numbers and steps of these weights; None where not all are stored so."""
    if not isinstance(theirs, Dequantised):
        return None
    found = [theirs.whole(name) for name in names]
    stored = [one for one in found if one is not None]
    return None if len(stored) < len(found) else ([numbers for numbers, _ in stored], [steps for _, steps in stored])


def _joined(parts: list[Tensor], source: Source, spec: TransformerSpec) -> Tensor:
    return in_our_order(parts[0] if len(parts) == 1 else torch.cat(parts), source, spec)


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


def _prefix(layout: Layout, slot: str, prefix: str) -> str:
    return "" if slot in layout.outside else prefix


def _names(source: Source, prefix: str, layer: int, kind: str) -> list[str]:
    """The tensors of a slot in one layer."""
    if isinstance(source, Bare):
        return [prefix + source.name.replace("*", str(layer))] if kind == "weight" else []
    return [f"{prefix}{name.replace('*', str(layer))}.{kind}" for name in modules_of(source)]


def modules_of(source: Source) -> tuple[str, ...]:
    if isinstance(source, Reordered | ByGroup | Bare):
        return (source.name,)
    return (source,) if isinstance(source, str) else source


def in_our_order(rows: Tensor, source: Source, spec: TransformerSpec) -> Tensor:
    """The rows of a tensor of theirs as our slot has them."""
    if isinstance(source, ByGroup):
        return _ungrouped(rows, spec)
    if isinstance(source, Reordered):
        chunks = rows.chunk(len(source.order))
        return torch.cat([chunks[index] for index in source.order])
    return rows


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


def _check_presence(
    slot: str, kind: str, source: Source, present: Mapping[int, bool], layout: Layout, prefix: str
) -> None:
    if all(present.values()) or (kind == "weight" and slot in layout.varying):
        return
    named = [_prefix(layout, slot, prefix) + name for name in modules_of(source)]
    if any(present.values()):
        without = [layer for layer, there in present.items() if not there]
        raise CheckpointError(f"The checkpoint has {named}.{kind} in some layers but not in {without}.")
    if kind == "weight" and slot not in layout.optional:
        raise CheckpointError(f"The checkpoint lacks {named}.weight, which the model's '{slot}' needs.")
