"""PEFT: a folder with adapter_config.json and adapter_model.safetensors -> Adapter.

Source of names and meanings: the peft library's LoRA. What changes numbers and is not computed here is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder, JsonObject
from poolhouse.layers.adapted import LowRank
from poolhouse.models.adapters.low_rank import Adapter
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.roles import Role

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Keys of adapter_config.json that another computation hides behind, and the values that mean ours.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(
        (
            *("use_dora", "use_qalora", "lora_bias", "layer_replication", "trainable_token_indices"),
            *("target_parameters", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config"),
            *("velora_config", "monteclora_config"),
        ),
        (None, False),
    ),
}
# The values of `task_type` that make a classifier.
_ROLES: Mapping[object, Role] = {"SEQ_CLS": "classify", "TOKEN_CLS": "token_classify"}
_LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<table>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")


def is_peft_folder(folder: Folder) -> bool:
    return folder.has(CONFIG)


def base_of(folder: Folder) -> str:
    """The model that the adapter in `folder` was made for: a path or a hub id.

    Raises:
        CheckpointError: it does not say.
    """
    base = folder.json(CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder} holds an adapter, and its {CONFIG} names no base_model_name_or_path. "
            "Name the base as the model, and the adapter with merge_adapter or lora_modules."
        )
    return base


def trained_role(folders: Sequence[Folder]) -> Role | None:
    """What the last of these adapters was trained as whose `task_type` names a classifier."""
    types = [folder.json(CONFIG).get("task_type") for folder in folders if is_peft_folder(folder)]
    return next((_ROLES[name] for name in reversed(types) if name in _ROLES), None)


def trained_labels(folders: Sequence[Folder]) -> JsonObject:
    """What a config.json beside the last of these adapters says of its labels, if there is one."""
    config = folders[-1].json("config.json", needed=False)
    return {key: config[key] for key in ("id2label", "label2id", "problem_type") if key in config}


def read_peft(folder: Path | Folder, name: str, max_rank: int | None = None) -> Adapter:
    """The adapter in `folder`, under a name of the caller's choice. max_rank: refuse adapters of a higher rank.

    Raises:
        CheckpointError: files missing or corrupt, or a kind of adapter that is not low-rank addition.
    """
    folder = Folder.of(folder)
    return _adapter(folder, name, _tensors(_checked(folder)), max_rank)


def read_tasks(folder: Folder, tasks: Sequence[str]) -> list[Adapter]:
    """The adapters in a folder that holds one per task, `X.lora_A.<task>.weight` (jina-embeddings-v4).

    Raises:
        CheckpointError: as `read_peft`; a tensor of none of these tasks.
    """
    by_task: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
    for name, tensor in _tensors(_checked(folder)).items():
        module, _, task = name.removesuffix(".weight").rpartition(".")
        if task not in by_task:
            raise CheckpointError(f"{folder}: {name} is of none of the tasks {list(tasks)} that config.json names.")
        by_task[task][f"{module}.weight"] = tensor
    return [_adapter(folder, task, tensors) for task, tensors in by_task.items()]


def _adapter(folder: Folder, name: str, tensors: Mapping[str, Tensor], max_rank: int | None = None) -> Adapter:
    config = folder.json(CONFIG)
    pairs: dict[str, dict[str, Tensor]] = {}
    tables: set[str] = set()
    saved: dict[str, Tensor] = {}
    for tensor_name, tensor in tensors.items():
        own = tensor_name.removeprefix("base_model.model.")
        found = _LOW_RANK.fullmatch(own)
        if found is None:
            saved[_saved_name(own)] = tensor
            continue
        pairs.setdefault(found["module"], {})[found["side"]] = tensor
        if found["table"]:
            tables.add(found["module"])
    if not pairs:
        raise CheckpointError(f"{folder} holds no lora_A and lora_B tensors.")
    return Adapter(
        name=name,
        changes={
            module: _change(module, pair, module in tables, config, folder, max_rank) for module, pair in pairs.items()
        },
        source=f"The adapter '{name}' in {folder}",
        saved=saved,
        base=config.get("base_model_name_or_path"),
        classifies=config.get("task_type") in _ROLES,
    )


def _checked(folder: Folder) -> Folder:
    """The folder, if it says that it holds an adapter that can be computed.

    Raises:
        CheckpointError: it does not.
    """
    if not is_peft_folder(folder):
        raise CheckpointError(f"{folder} has no {CONFIG}. An adapter is a folder as the peft library saves it.")
    config = folder.json(CONFIG)
    for key, values in _NEUTRAL.items():
        if key in config and config[key] not in values and config[key] != {} and config[key] != []:
            raise CheckpointError(f"{folder / CONFIG}: {key} is {config[key]!r}; only {list(values)} can be computed.")
    return folder


def _change(
    module: str, pair: Mapping[str, Tensor], table: bool, config: Config, folder: Folder, max_rank: int | None
) -> LowRank:
    if set(pair) != {"A", "B"}:
        raise CheckpointError(f"{folder}: {module} has lora_{min(pair)} without its companion.")
    a, b = pair["A"].float(), pair["B"].float()
    rank = int(_by_pattern(config, "r", "rank_pattern", module))
    alpha = _by_pattern(config, "lora_alpha", "alpha_pattern", module)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise CheckpointError(
            f"{folder}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, but {CONFIG} says rank {rank}."
        )
    if max_rank is not None and rank > max_rank:
        raise CheckpointError(f"{folder}: rank {rank} of {module} is more than max_lora_rank={max_rank}.")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    # A table of vectors is stored the other way round: its weight is [ids, features].
    return LowRank(a.T * scale, b.T) if table else LowRank(b * scale, a)


def _by_pattern(config: Config, key: str, patterns: str, module: str) -> float:
    """The number for a module: the first pattern that matches the end of its name, else the one for all."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    value = config.get(key, 8)
    if not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"{CONFIG}: {key} is {value!r}; it must be a number above 0.")
    return float(value)


def _saved_name(name: str) -> str:
    return name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")


def _tensors(folder: Folder) -> dict[str, Tensor]:
    for path in (folder.path / name for name in _WEIGHTS):
        if not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is corrupt or no safetensors file: {error}") from error
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read as plain weights: {error}") from error
        return tensors
    raise CheckpointError(f"{folder} has no adapter weights. Looked for {' and '.join(_WEIGHTS)}.")
