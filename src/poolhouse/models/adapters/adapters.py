"""Adapters: those of one loaded model, merged into its weights or chosen per request by name."""

from __future__ import annotations

import threading
from collections import ChainMap
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError, InvalidRequest, did_you_mean
from poolhouse.files import Folder
from poolhouse.layers.adapted import AdaptedLinear, AdaptedTable, LowRank
from poolhouse.models.adapters.low_rank import Adapter, Target, merge, tails
from poolhouse.models.adapters.peft import read_peft
from poolhouse.models.adapters.task_adapters import TaskAdapters
from poolhouse.models.backbone import Backbone
from poolhouse.models.heads.heads import Head, HeadModule, present
from poolhouse.models.native.transformer import Transformer


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """What a user may decide about adapters; see `Settings` for the names.

    merge: the adapter to merge: a name of `modules`, or a task of the checkpoint. base_merge: folders of
    adapters that belong to the model itself. allowed: whether adapters may be used at all.
    find: the folder of an adapter that a request brings, from a path or a hub id.
    classifier: whether the model has a head, which adapters chosen per request leave as it is. projections: modules
    that make the vectors of tokens, which adapters chosen per request may change by low rank.
    """

    modules: Mapping[str, Path | Folder] = field(default_factory=dict)
    merge: str | None = None
    base_merge: tuple[Path | Folder, ...] = ()
    max_rank: int | None = None
    allowed: bool = True
    find: Callable[[str], Path] = Path
    classifier: bool = False
    projections: tuple[str, ...] = ()

    @property
    def named(self) -> bool:
        """Whether any adapter was named."""
        return bool(self.modules or self.merge or self.base_merge)

    @property
    def merged_folders(self) -> tuple[Folder, ...]:
        """The folders of adapters that are merged into the weights."""
        chosen = self.modules.get(self.merge or "")
        return tuple(map(Folder.of, self.base_merge if chosen is None else (*self.base_merge, chosen)))


class Adapters:
    """The adapters of one model.

    task_names, default: of the adapters that came with the checkpoint.
    merged: the adapter that the weights already hold; requests may name it still.
    sources: where each of the others came from, by name.
    """

    def __init__(self, backbone: Backbone, target: Target, options: AdapterOptions, tasks: TaskAdapters) -> None:
        self.merged = options.merge
        self.task_names, self.default, self.prompts = tasks.names, tasks.default, tasks.prompts
        if self.merged is not None:
            self.task_names = tuple(name for name in tasks.names if name == self.merged)
            self.default = next(iter(self.task_names), None)
        self._backbone, self._target, self._options = backbone, target, options
        self.sources: dict[str, str] = {}
        self._heads: dict[str, dict[str, LowRank]] = {}
        self._adding = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that requests may use."""
        return tuple(dict.fromkeys([*([self.merged] if self.merged else []), *self.sources]))

    @property
    def declared(self) -> tuple[str, ...]:
        """The names that are no tasks of the checkpoint."""
        return tuple(name for name in self.names if name not in self.task_names)

    def of_head(self, module: str) -> Mapping[str, LowRank]:
        """What adapters change in a module behind the backbone, by adapter; those added later appear in it."""
        return self._heads.setdefault(module.rpartition(".")[2], {})

    def choose(
        self, name: str | None, prompt_name: str | None, prompts: Container[str]
    ) -> tuple[str | None, str | None]:
        """The adapter and the prompt for a request; a task adapter and the prompt of its name go together.

        name: the adapter's; "" is none, None the default one. prompts: names of the model's prompts.

        Raises:
            InvalidRequest: no adapter of that name.
        """
        if name is None:
            name = prompt_name if prompt_name in self.task_names else self.default
        elif name and name not in self.names:
            raise unknown_adapter(name, self.names)
        if prompt_name is None and name in self.task_names and name in prompts:
            prompt_name = name
        return (None if name == self.merged else name or None), prompt_name

    def load(self, name: str, source: str) -> None:
        """Make a PEFT folder or hub id available under `name`; a no-op if that very folder is.

        Raises:
            InvalidRequest: the name is taken, or adapters cannot be added to this model. CheckpointError: the files.
        """
        folder = self._options.find(source)
        if self.sources.get(name) == str(folder):
            return
        if not self._options.allowed:
            raise InvalidRequest("Adapters are switched off (enable_lora=False).", "lora_request", name)
        if self.merged is not None:
            raise InvalidRequest(
                f"'{self.merged}' is merged into the weights; no adapter can be added.", "lora_request"
            )
        if name in self.sources:
            raise InvalidRequest(f"There is an adapter '{name}' from {self.sources[name]}.", "lora_request", name)
        self.add(read_peft(folder, name, self._options.max_rank), str(folder))

    def add(self, adapter: Adapter, source: str) -> None:
        """Make an adapter available; batches that run meanwhile do not see it.

        Raises:
            CheckpointError: it does not fit the model, or has a head of its own.
        """
        changes = self._target.assign(adapter)
        heads = self._target.heads(adapter)
        replaced = any(
            name.rpartition(".")[0].rpartition(".")[2] in self._options.projections for name in adapter.saved
        )
        if heads and (self._options.classifier or adapter.classifies or replaced):
            raise CheckpointError(
                f"{adapter.source} has a head of its own ({', '.join(heads[:3])}), and heads cannot be chosen per "
                f"request. Merge it: merge_adapter={adapter.name!r}, or name its folder as the model."
            )
        transformer = self._backbone
        if not isinstance(transformer, Transformer):
            raise CheckpointError(
                f"{adapter.source} cannot be chosen per request: the {self._target.family.model_types[0]} family takes "
                "adapters by merging only (merge_adapter)."
            )
        weights = transformer.tokens
        with self._adding:
            for slot, change in changes.items():
                layer = _adapted(transformer, slot, adapter)
                layer.changes[adapter.name] = change.to(weights.device, weights.dtype)
            for module in adapter.changes.keys() & set(heads):
                # Heads are computed in float32.
                of_head = self._heads.setdefault(module.rpartition(".")[2], {})
                of_head[adapter.name] = adapter.changes[module].to(weights.device, torch.float32)
            self.sources[adapter.name] = source


def merged_into(
    tensors: dict[str, Tensor], target: Target, options: AdapterOptions, tasks: TaskAdapters
) -> tuple[Adapter, ...]:
    """Merge what `options` say into a model's tensors; the adapters, for what they have of heads.

    Raises:
        CheckpointError: an adapter that does not fit. ConfigError: options that contradict each other.
    """
    _check_options(options, tasks.names)
    adapters = [read_peft(folder, Folder.of(folder).path.name) for folder in options.base_merge]
    if options.merge is not None:
        own = next((adapter for adapter in tasks.adapters if adapter.name == options.merge), None)
        adapters.append(own or read_peft(options.modules[options.merge], options.merge, options.max_rank))
    for adapter in adapters:
        merge(tensors, target.assign(adapter))
    return tuple(adapters)


def adapters_of(backbone: Backbone, target: Target, options: AdapterOptions, tasks: TaskAdapters) -> Adapters:
    """The adapters that requests may choose; none but the merged one, where one was merged."""
    adapters = Adapters(backbone, target, options, tasks)
    if options.merge is None:
        for adapter in tasks.adapters:
            adapters.add(adapter, adapter.source)
        for name, folder in options.modules.items():
            adapters.add(read_peft(folder, name, options.max_rank), str(folder))
    return adapters


def unknown_adapter(name: str, names: Sequence[str]) -> InvalidRequest:
    known = f"It has {sorted(names)}." if names else "It has none."
    return InvalidRequest(
        f"The model has no adapter named '{name}'.{did_you_mean(name, names)} {known}", "adapter", name
    )


def _check_options(options: AdapterOptions, tasks: Sequence[str]) -> None:
    """Raise ConfigError for options that contradict each other or the checkpoint."""
    if not options.allowed and options.modules:
        raise ConfigError("lora_modules names adapters, but enable_lora is False.")
    taken = sorted(set(options.modules) & set(tasks))
    if taken:
        raise ConfigError(f"lora_modules: the checkpoint has task adapters named {taken}; choose other names.")
    if options.merge is None:
        return
    known = [*options.modules, *tasks]
    if options.merge not in known:
        raise ConfigError(
            f"merge_adapter={options.merge!r} is neither a name of lora_modules nor a task of the checkpoint."
            f"{did_you_mean(options.merge, known)} There are {known}."
        )
    others = sorted(set(options.modules) - {options.merge})
    if others:
        raise ConfigError(f"merge_adapter={options.merge!r} changes the weights that {others} were made for.")


def _adapted(transformer: Transformer, slot: str, adapter: Adapter) -> AdaptedLinear | AdaptedTable:
    """The adapted layer of a slot, which replaces the plain one the first time."""
    if slot in ("tokens", "types", "positions"):
        return transformer.adapted_tables.setdefault(slot, AdaptedTable())
    owner, attribute = _owner(transformer, slot, adapter)
    layer = getattr(owner, attribute)
    if not isinstance(layer, AdaptedLinear):
        layer = AdaptedLinear(layer)
        setattr(owner, attribute, layer)
    return layer


_ATTRIBUTES = {
    "attn.qkv": ("attention", "qkv"),
    "attn.out": ("attention", "out"),
    "ffn.up": ("feed_forward", "up"),
    "ffn.down": ("feed_forward", "down"),
}


def _owner(transformer: Transformer, slot: str, adapter: Adapter) -> tuple[object, str]:
    if slot == "project":
        return transformer, "project"
    _, layer, rest = slot.split(".", 2) if slot.startswith("layers.") else ("", "", "")
    if rest not in _ATTRIBUTES:
        raise CheckpointError(f"{adapter.source} changes '{slot}', which is possible by merging only (merge_adapter).")
    part, attribute = _ATTRIBUTES[rest]
    return getattr(transformer.layers[0 if layer == "shared" else int(layer)], part), attribute


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
