"""Adapter: low-rank changes as they were trained, and which weights of a native model they change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.layers.adapted import LowRank
from poolhouse.models.native.families import Family
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Bare, Layout, Source, in_our_order, modules_of


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter, by the names of the modules that it was trained on.

    changes: module -> the change of its weight.
    saved: whole tensors that came with it (PEFT's `modules_to_save`), by their names in the model.
    source: where it was read, for messages. base: the model that it says it was made for.
    classifies: whether it was trained as a classifier, and so has a head of its own.
    """

    name: str
    changes: Mapping[str, LowRank]
    source: str
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None
    classifies: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """What adapters may change: the weights of a loaded model by our slots, each [rows, columns]."""

    family: Family
    spec: TransformerSpec
    shapes: Mapping[str, tuple[int, ...]]

    def assign(self, adapter: Adapter) -> dict[str, LowRank]:
        """The adapter's changes by slot ("layers.3.attn.qkv"); parts of one slot become one change.

        Heads are passed over; whoever builds one finds them in the adapter.

        Raises:
            CheckpointError: a module that the family does not have, or a shape of another base.
        """
        slots, unknown = self._slots(adapter)
        unknown += [
            name
            for name, tensor in adapter.saved.items()
            if not self._is_head(name) and not self._is_frozen_copy(name, tensor, slots)
        ]
        if unknown:
            raise CheckpointError(
                f"{adapter.source} changes what the {self.family.model_types[0]} family cannot take from an adapter: "
                f"{unknown[:5]}{' ...' if len(unknown) > 5 else ''}.{_made_for(adapter)}"
            )
        parts: dict[str, dict[int, LowRank]] = {}
        sources: dict[str, Source] = {}
        for module, (slot, index, source) in slots.items():
            self._check_shape(adapter, module, slot, index, source)
            parts.setdefault(slot, {})[index] = adapter.changes[module]
            sources[slot] = source
        return {
            slot: _joined(found, self._part_rows(slot, sources[slot]), sources[slot], self.spec)
            for slot, found in parts.items()
        }

    def heads(self, adapter: Adapter) -> list[str]:
        """What the adapter has for a head: names of saved tensors and changed modules."""
        changed = [module for module in adapter.changes if self._is_head(f"{module}.weight")]
        return [name for name in adapter.saved if self._is_head(name)] + changed

    def _slots(self, adapter: Adapter) -> tuple[dict[str, tuple[str, int, Source]], list[str]]:
        """Where each module goes, and modules that go nowhere, by the layout that knows most of them."""
        best: dict[str, tuple[str, int, Source]] = {}
        for layout in self.family.layouts:
            known = dict(_modules(layout, len(self.spec.layers)))
            found = {}
            for module in adapter.changes:
                name = next((tail for tail in tails(module) if tail in known), None)
                if name is not None and f"{known[name][0]}.weight" in self.shapes:
                    found[module] = known[name]
            best = max(best, found, key=len)
        return best, [
            module for module in adapter.changes if module not in best and not self._is_head(f"{module}.weight")
        ]

    def _is_head(self, name: str) -> bool:
        patterns = [re.compile(expression) for expression in self.family.aside]
        return any(pattern.fullmatch(tail) for pattern in patterns for tail in tails(name))

    def _is_frozen_copy(self, name: str, tensor: Tensor, slots: Mapping[str, tuple[str, int, Source]]) -> bool:
        """PEFT saves a token table that it changes by low rank a second time, as it was."""
        slot = slots.get(name.removesuffix(".weight"), ("", 0, ""))[0]
        return slot == "tokens" and tuple(tensor.shape) == self.shapes["tokens.weight"]

    def _check_shape(self, adapter: Adapter, module: str, slot: str, index: int, source: Source) -> None:
        wanted = (self._part_rows(slot, source)[index], self.shapes[f"{slot}.weight"][1])
        if adapter.changes[module].shape != wanted:
            raise CheckpointError(
                f"{adapter.source} is an adapter for another base: it changes {module}.weight as "
                f"{list(adapter.changes[module].shape)}, but the model's is {list(wanted)}.{_made_for(adapter)}"
            )

    def _part_rows(self, slot: str, source: Source) -> list[int]:
        """Rows of each module that a slot is made of: query, key and value by their heads, gate and up alike."""
        rows = self.shapes[f"{slot}.weight"][0]
        count = len(source) if isinstance(source, tuple) else 1
        if count == 3:
            query = self.spec.heads * self.spec.head_dim
            return [query, (rows - query) // 2, (rows - query) // 2]
        return [rows // count] * count


def merge(tensors: dict[str, Tensor], changes: Mapping[str, LowRank]) -> None:
    """Add the changes to the weights, in float32, in place of the old tensors."""
    for slot, change in changes.items():
        weight = tensors[f"{slot}.weight"]
        tensors[f"{slot}.weight"] = (weight.float() + change.delta().to(weight.device)).to(weight.dtype)


def _joined(parts: Mapping[int, LowRank], rows: list[int], source: Source, spec: TransformerSpec) -> LowRank:
    """One change of a whole slot: `down` stacked, `up` in blocks, rows in our order."""
    if len(rows) == 1:
        return LowRank(in_our_order(parts[0].up, source, spec), parts[0].down)
    up = torch.zeros(sum(rows), sum(part.up.shape[1] for part in parts.values()))
    column = 0
    for index in sorted(parts):
        part, row = parts[index], sum(rows[:index])
        up[row : row + rows[index], column : column + part.up.shape[1]] = part.up
        column += part.up.shape[1]
    return LowRank(up, torch.cat([parts[index].down for index in sorted(parts)]))


def _modules(layout: Layout, layers: int) -> Iterator[tuple[str, tuple[str, int, Source]]]:
    """Every module of a layout: its name -> our slot, which part of the slot it is, and the whole source."""
    for slot, source in layout.names.items():
        names = () if isinstance(source, Bare) else modules_of(source)
        for layer in range(layers) if "*" in slot else (0,):
            for index, name in enumerate(names):
                yield name.replace("*", str(layer)), (slot.replace("*", str(layer)), index, source)


def tails(name: str) -> Iterator[str]:
    """The name, then without its first part, and so on: training wraps models in "model." or "bert."."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _made_for(adapter: Adapter) -> str:
    return f" It says that it was made for {adapter.base}." if adapter.base else ""
