"""Models dir: the checkpoints that lie in folders, each with its name, its size and when it changed, read without torch."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from poolhouse.engine.interface import PoolingEngine
from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.files import Folder, weight_files
from poolhouse.settings import Settings

log = logging.getLogger("poolhouse")

# What says that a folder holds a model, or an adapter that names its model.
_SIGNS = ("config.json", "modules.json", "adapter_config.json", "gliner_config.json")
# Where sentence-transformers may keep the weights of its first module, and where a hub's cache has a repository.
_FIRST_MODULE = "0_"
_OF_THE_HUB = "models--"
# A header of safetensors is no longer.
_LONGEST_HEADER = 100 * 1024 * 1024
# Its names of the types that a model is run in.
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that holds a model.

    stamp: changes when one of its files does. weight_bytes: of its weights, as they are stored.
    numbers: how many floating-point numbers these are; other_bytes: of all other tensors.
    """

    name: str
    folder: Path
    stamp: tuple[tuple[str, int, int], ...]
    weight_bytes: int
    numbers: int
    other_bytes: int

    @property
    def config(self) -> Mapping[str, object]:
        """config.json; empty where there is none that can be read."""
        try:
            return Folder(self.folder).json("config.json", needed=False)
        except CheckpointError:
            return {}


@dataclass(frozen=True, slots=True)
class ModelsDir:
    """Folders of checkpoints, and how one of them is opened. May be pickled.

    settings: those of all, and `by_name` what differs for one. open_engine: loads a model.
    memory: bytes that the weights of a model will take, and packs of prompts beside them.
    """

    folders: tuple[Path, ...]
    settings: Settings
    by_name: Mapping[str, Mapping[str, object]]
    open_engine: Callable[[Settings], PoolingEngine]
    memory: Callable[[Settings, Checkpoint], tuple[int, int]]

    def settings_of(self, checkpoint: Checkpoint) -> Settings:
        """The settings of one model.

        Raises:
            ConfigError: a value that does not fit.
        """
        shared = {name: getattr(self.settings, name) for name in self.settings.model_fields_set}
        own = {"model": str(checkpoint.folder), "served_model_name": (checkpoint.name,)}
        return Settings.parse(**{**shared, **self.by_name.get(checkpoint.name, {}), **own})

    def scan(self, known: Mapping[str, Checkpoint], skipped: dict[str, str]) -> dict[str, Checkpoint]:
        """The checkpoints that are there now, by name.

        known: those that were found before; of these, files that did not change are not read again.
        skipped: folders that hold no model, and why; each is logged once.

        Raises:
            ConfigError: a folder that cannot be read.
        """
        found: dict[str, Checkpoint] = {}
        left_out: dict[str, str] = {}
        for name, folder in _candidates(self.folders, left_out):
            if name in found:
                left_out[str(folder)] = f"the name {name} is taken by {found[name].folder}"
                continue
            variant = self.by_name.get(name, {}).get("variant", self.settings.variant)
            try:
                found[name] = _read(name, folder, known.get(name), variant if isinstance(variant, str) else None)
            except (CheckpointError, OSError, ValueError) as error:
                left_out[str(folder)] = str(error)
        for path, reason in left_out.items():
            if skipped.get(path) != reason:
                log.info("%s is skipped: %s.", path, reason.rstrip("."))
        skipped.clear()
        skipped.update(left_out)
        return found


def _candidates(folders: Sequence[Path], left_out: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Names and folders of what may be models: folders themselves, those of an owner, and repositories of a hub's cache."""
    for folder in folders:
        try:
            inner = _folders_of(folder)
        except OSError as error:
            raise ConfigError(f"models_dir: {error}") from None
        for path in inner:
            if path.name.startswith(_OF_THE_HUB):
                yield from _of_the_hub(path, left_out)
            elif not path.name.isprintable():
                left_out[repr(str(path))] = "its name cannot be written in a request"
            elif _holds_a_model(path):
                yield path.name, path
            else:
                yield from _of_an_owner(path, left_out)


def _of_an_owner(owner: Path, left_out: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Models that lie as `owner/name`."""
    try:
        inner = [path for path in _folders_of(owner) if path.name.isprintable() and _holds_a_model(path)]
    except OSError as error:
        left_out[str(owner)] = f"it cannot be read: {error.strerror}"
        return
    if not inner:
        left_out[str(owner)] = f"it holds no model: none of {', '.join(_SIGNS)}"
    for path in inner:
        yield f"{owner.name}/{path.name}", path


def _of_the_hub(repository: Path, left_out: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """The snapshot of a repository in a hub's cache: that of its main branch, else the only one."""
    name = repository.name.removeprefix(_OF_THE_HUB).replace("--", "/")
    snapshots = repository / "snapshots"
    try:
        main = repository / "refs" / "main"
        found = [snapshots / main.read_text().strip()] if main.is_file() else _folders_of(snapshots)
    except OSError:
        found = []
    if len(found) == 1 and _holds_a_model(found[0]):
        yield name, found[0]
    else:
        left_out[str(repository)] = "the cache has no snapshot of its main branch that holds a model"


def _folders_of(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _holds_a_model(folder: Path) -> bool:
    return any((folder / sign).is_file() for sign in _SIGNS)


def _read(name: str, folder: Path, known: Checkpoint | None, variant: str | None) -> Checkpoint:
    """The checkpoint in a folder; the one that is known, if no file has changed.

    Raises:
        CheckpointError: no weights, or damaged ones. OSError: files that cannot be read.
    """
    stamp = tuple(_stamps(folder))
    if known is not None and known.folder == folder and known.stamp == stamp:
        return known
    # Damaged files, and shards that are missing, are told by the load.
    files = [file for file in _weights_of(folder, variant) if file.is_file()]
    counted = [_counted(file) if file.suffix == ".safetensors" else None for file in files]
    sizes = [file.stat().st_size for file in files]
    numbers = sum(size // 4 if one is None else one[0] for one, size in zip(counted, sizes, strict=True))
    others = sum(one[1] for one in counted if one is not None)
    return Checkpoint(name, folder, stamp, sum(sizes), numbers, others)


def _stamps(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of each file of a folder, and of the folders in it."""
    for inside in (folder, *_folders_of(folder)):
        with os.scandir(inside) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_file():
                    about = entry.stat()
                    yield f"{inside.name}/{entry.name}", about.st_size, about.st_mtime_ns


def _weights_of(folder: Path, variant: str | None) -> list[Path]:
    """The files of a model's weights, or of an adapter's.

    Raises:
        CheckpointError: there are none.
    """
    modules = [path for path in _folders_of(folder) if path.name.startswith(_FIRST_MODULE)]
    for place in (folder, *modules):
        for name in weight_files(variant):
            path = place / name
            if path.is_file():
                return _shards(path) if path.suffix == ".json" else [path]
    adapters = [path for path in folder.glob("adapter_model.*") if path.suffix in (".safetensors", ".bin")]
    if not adapters:
        label = f" of the variant {variant!r}" if variant else ""
        raise CheckpointError(f"it has no weights{label}; looked for {', '.join(weight_files(variant))}")
    return adapters


def _shards(index: Path) -> list[Path]:
    weight_map = Folder(index.parent).json(index.name, keep=False).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index.name} has no weight_map")
    return [index.parent / str(name) for name in sorted(set(weight_map.values()))]


def _counted(file: Path) -> tuple[int, int] | None:
    """How many floating-point numbers a file of safetensors holds, and the bytes of its other tensors; None: it is none."""
    floats = others = 0
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                return None
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            if tensor["dtype"] in _FLOATS:
                floats += math.prod(tensor["shape"])
            else:
                begin, end = tensor["data_offsets"]
                others += end - begin
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return floats, others
