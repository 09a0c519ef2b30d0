"""The file of `--config`: options as YAML."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from poolhouse.cli.options import parsed
from poolhouse.errors import ConfigError, nearest
from poolhouse.settings import ServerSettings, known_options
from poolhouse.vllm_options import DONE_ANYWAY, MEANINGLESS, OUR_NAMES, in_our_words


def read_config(path: Path) -> tuple[list[Mapping[str, Any]], dict[str, Any], dict[str, str]]:
    """The models of a file, each a mapping with its name under `model`, and the options beside them, in our names.

    Third, how the file writes each option.

    Raises:
        ConfigError: no such file, no mapping in YAML, or an option that does not exist, naming the nearest.
    """
    try:
        content = yaml.load(path.read_bytes(), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"--config: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    typed: dict[str, str] = {}
    options = _checked(path, {} if content is None else content, known_options() | {"models"}, typed)
    if "config" in options:
        raise ConfigError(f"{path}: a config file names no further one.")
    model, models = options.pop("model", None), options.pop("models", None)
    if model is not None and models is not None:
        raise ConfigError(f"{path}: give model: or models:, not both.")
    if models is None:
        models = [] if model is None else [model]
    if not isinstance(models, list):
        raise ConfigError(f"{path}: models: is a list of names, or of mappings with model: and options of its own.")
    return [_entry(path, model, typed) for model in models], in_our_words(options), typed


def _entry(path: Path, entry: Any, typed: dict[str, str]) -> Mapping[str, Any]:
    if isinstance(entry, str):
        return {"model": entry}
    options = _checked(path, entry, known_options() - set(ServerSettings.model_fields), typed)
    if not isinstance(options.get("model"), str):
        raise ConfigError(f"{path}: an entry of models: needs model: NAME; got {entry!r}.")
    return in_our_words(options)


def _checked(path: Path, options: Any, known: set[str], typed: dict[str, str]) -> dict[str, Any]:
    """The options by their names in Python; how they are written is added to `typed`."""
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: options are a mapping such as `port: 8000`, got {options!r}.")
    names = {str(key).replace("-", "_").removeprefix("__"): str(key) for key in options}
    for name, key in names.items():
        if name not in known and name in ServerSettings.model_fields:
            raise ConfigError(f"{path}: '{key}' is an option of the server, not of one model.")
        if name not in known:
            near = nearest(name, known - MEANINGLESS - DONE_ANYWAY)
            # In the spelling that the file has.
            words = near and f" Did you mean '{near.replace('_', '-') if '-' in key else near}'?"
            raise ConfigError(f"{path}: there is no option '{key}'.{words or ''}")
        typed[OUR_NAMES.get(name, name)] = key
    ours = {str(key).replace("-", "_").removeprefix("__"): value for key, value in options.items()}
    return parsed(ours, lambda name: f"{path}: {names[name]}")


# In secrets and permissions, numbers are taken as they are written: to YAML, 0123 is 83.
_NUMBERS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
_AS_WRITTEN = frozenset({"api_key", "hf_token", "ssl_keyfile_password", "uds_mode"})


class _Loader(yaml.SafeLoader):
    """YAML's safe types; a key that stands twice is an error, where YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and str(key.value).replace("-", "_") in _AS_WRITTEN:
                entries = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for entry in entries:
                    if entry.tag in _NUMBERS:
                        entry.tag = "tag:yaml.org,2002:str"
        # PyYAML has types where another package brings them.
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)  # type: ignore[no-untyped-call, unused-ignore]
        # Merged keys (<<) stand in the node too, so only plain ones are counted.
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if len(keys) > len(mapping) and twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return mapping
