"""Task adapters: those that come with a checkpoint, among its tensors (jina-embeddings-v3) or in folders (-v4, -v5).

jina-embeddings-v5 has a PEFT folder per task, `adapters/<task>`; -v4 has one for all of `task_names`, `adapters`. jina-embeddings-v3 has torch's parametrizations:
`X.parametrizations.weight.original` is the weight of X; `X.parametrizations.weight.0.lora_A` and `lora_B` hold one change
per task: [tasks, rank, in] and [tasks, out, rank] for linear layers, [tasks, ids, rank] and [tasks, rank, features] for
tables.
Source: the model code of jinaai/xlm-roberta-flash-implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError, did_you_mean
from poolhouse.files import Folder
from poolhouse.layers.adapted import LowRank
from poolhouse.models.adapters.low_rank import Adapter
from poolhouse.models.adapters.peft import is_peft_folder, read_peft, read_tasks
from poolhouse.models.files.checkpoint import Checkpoint, Config

_ORIGINAL = ".parametrizations.weight.original"
_LOW_RANK = (".parametrizations.weight.0.lora_A", ".parametrizations.weight.0.lora_B")


@dataclass(frozen=True, slots=True)
class TaskAdapters:
    """The adapters of a checkpoint.

    default: the one for requests that name none. prompts: what to put before texts, by adapter.
    """

    adapters: tuple[Adapter, ...] = ()
    default: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(adapter.name for adapter in self.adapters)


def read_task_adapters(checkpoint: Checkpoint, config: Config, default: str | None) -> TaskAdapters:
    """The task adapters of a checkpoint. default: the family's, where config.json has no `jina_task`.

    Raises:
        CheckpointError: files that do not fit together. ConfigError: a default that the checkpoint does not have.
    """
    adapters = _parametrizations(checkpoint.tensors, config, checkpoint.folder)
    if is_peft_folder(own := checkpoint.folder / "adapters"):
        adapters += read_tasks(own, config.get("task_names") or ())
    for path in sorted((checkpoint.folder / "adapters").path.glob("*")):
        if is_peft_folder(folder := checkpoint.folder / f"adapters/{path.name}"):
            adapters.append(read_peft(folder, path.name))
    names = [adapter.name for adapter in adapters]
    chosen = config.get("jina_task", default)
    if chosen is not None and chosen not in names:
        raise ConfigError(
            f"jina_task is {chosen!r}, but the adapters of {checkpoint.folder} are {names}."
            f"{did_you_mean(str(chosen), names)}"
        )
    prompts = config.get("task_instructions") or {}
    return TaskAdapters(tuple(adapters), chosen, {name: str(prompts[name]) for name in names if name in prompts})


def plain(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A checkpoint's tensors as if it had no adapters."""
    return _PlainNames(tensors) if any(name.endswith(_ORIGINAL) for name in tensors) else tensors


class _PlainNames(Mapping[str, Tensor]):
    """Tensors without those of adapters, originals under the names of plain weights."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._names = {name.replace(_ORIGINAL, ".weight"): name for name in tensors if not name.endswith(_LOW_RANK)}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _parametrizations(tensors: Mapping[str, Tensor], config: Config, folder: Folder) -> list[Adapter]:
    """The adapters among a checkpoint's tensors, one per name of `lora_adaptations`; none where there are none.

    Raises:
        CheckpointError: tensors and config.json do not agree.
    """
    modules = [{name.removesuffix(end) for name in tensors if name.endswith(end)} for end in _LOW_RANK]
    if not any(modules):
        return []
    if modules[0] != modules[1]:
        raise CheckpointError(f"{folder}: lora_A or lora_B is missing for {sorted(modules[0] ^ modules[1])[:5]}.")
    tasks = config.get("lora_adaptations")
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise CheckpointError(f"{folder}: config.json must name the task adapters in lora_adaptations, got {tasks!r}.")
    changes: dict[str, dict[str, LowRank]] = {task: {} for task in tasks}
    for module in sorted(modules[0]):
        a, b = (tensors[module + end] for end in _LOW_RANK)
        if len(a) != len(tasks) or len(b) != len(tasks):
            raise CheckpointError(f"{folder}: {module} has changes for {len(a)} tasks; lora_adaptations is {tasks}.")
        for index, task in enumerate(tasks):
            changes[task][module] = _change(module, a[index], b[index], config, folder)
    return [Adapter(task, changes[task], f"The task adapter '{task}' of {folder}") for task in tasks]


def _change(module: str, a: Tensor, b: Tensor, config: Config, folder: Folder) -> LowRank:
    rank = int(config.get("lora_rank", 4))
    scale = float(config.get("lora_alpha", 1)) / rank
    if a.shape[0] == b.shape[1] == rank:
        return LowRank(b.float() * scale, a.float())
    if a.shape[1] == b.shape[0] == rank:
        return LowRank(a.float() * scale, b.float())
    raise CheckpointError(
        f"{folder}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but config.json says rank {rank}."
    )
