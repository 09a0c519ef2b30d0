"""Sources: options of `serve` by command line, which wins over the file of --config, and that over environment."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from poolhouse.cli.options import Written, on_the_line, parsed, spelled
from poolhouse.errors import ConfigError, nearest
from poolhouse.settings import (
    DONE_ANYWAY,
    MEANINGLESS,
    OUR_NAMES,
    ServerSettings,
    Settings,
    known_options,
    split_values,
    useful_options,
    with_our_names,
)

_PREFIX = "POOLHOUSE_"
_SERVICE_NAME = re.compile(r"_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


Options = Mapping[str, object]


class Gathered(NamedTuple):
    """The server's settings, those of each model in their order, and how each option was written.

    shared: the settings of models on demand. by_name: what --models-config sets for one of them.
    """

    server: ServerSettings
    engines: tuple[Settings, ...]
    written: dict[str, Written]
    shared: Settings
    by_name: Mapping[str, Options]


def gather(
    models: Sequence[str],
    options: Mapping[str, object],
    config: Path | None,
    environment: Mapping[str, str],
    typed: Mapping[str, str] | None = None,
) -> Gathered:
    """All settings, of whatever source.

    models, options: of the command line. config: the file of --config; none: POOLHOUSE_CONFIG names it, if any.
    typed: options of the line that were not written as we would, by their names in Python.

    Raises:
        ConfigError: an unknown option, a value that does not fit, or two models of one name.
    """
    sources = [_environment(environment)]
    config = config or (Path(environment["POOLHOUSE_CONFIG"]) if environment.get("POOLHOUSE_CONFIG") else None)
    if config is not None:
        entries, shared, keys = read_config(config)
        in_file = {name: Written(key, ": ", f" in {config}") for name, key in keys.items()}
        sources.append(_Source(shared, entries, in_file))
    line = on_the_line({*options, *(OUR_NAMES[name] for name in options if name in OUR_NAMES)}, typed)
    written = on_the_line(known_options() - {"model"}, typed)
    for names in (*(source.written for source in sources), line):
        written |= names
    try:
        sources.append(_Source(with_our_names(options), [{"model": model} for model in models], line))
        server, engines, of_all = _settings(sources)
        if server.models_config and not server.models_dir:
            raise ConfigError("models_config: it is for the models of models_dir, which is missing.")
    except ConfigError as error:
        raise ConfigError(spelled(str(error), written)) from None
    by_name = read_models_config(Path(server.models_config)) if server.models_config else {}
    return Gathered(server, engines, written, of_all, by_name)


@dataclass(frozen=True, slots=True)
class _Source:
    """What one source sets, and how it writes that.

    options: of the server, and of all models. models: options of each model, with its name under `model`.
    """

    options: Options
    models: Sequence[Options]
    written: Mapping[str, Written]


# What belongs to one model, and not to all of a folder.
_OF_ONE_MODEL = (
    "model",
    "served_model_name",
    "revision",
    "tokenizer",
    "tokenizer_revision",
    "lora_modules",
    "merge_adapter",
)


def _settings(sources: Sequence[_Source]) -> tuple[ServerSettings, tuple[Settings, ...], Settings]:
    shared = {name: value for source in sources for name, value in source.options.items()}
    server = ServerSettings.parse(**{name: shared.pop(name) for name in ServerSettings.model_fields if name in shared})
    nothing: list[Options] = [] if server.models_dir else [{"model": None}]
    entries = next((source.models for source in reversed(sources) if source.models), nothing)
    # What the command line sets for all models wins over what the file sets for one.
    last = {name: value for name, value in sources[-1].options.items() if name in shared}
    if len(entries) > 1 and shared.get("served_model_name") is not None:
        entries = _one_name_each(entries, split_values(shared.pop("served_model_name")))
        last.pop("served_model_name", None)
    engines = tuple(Settings.parse(**{**shared, **entry, **last}) for entry in entries)
    _refuse_clashes(engines)
    lost = [name for name in _OF_ONE_MODEL if shared.get(name) is not None]
    if lost and not engines:
        raise ConfigError(f"{lost[0]}: it is for one model; those of models_dir have theirs in models_config.")
    of_all = {name: value for name, value in {**shared, **last}.items() if name not in _OF_ONE_MODEL}
    return server, engines, Settings.parse(**of_all) if server.models_dir else Settings()


def _one_name_each(entries: Sequence[Options], names: object) -> list[Options]:
    if not isinstance(names, list | tuple) or len(names) != len(entries):
        raise ConfigError(
            f"served_model_name: with several models it gives one name to each, in their order; got {names!r} for "
            f"{len(entries)} models. More names of one model go into its entry under models: in a --config file."
        )
    return [{"served_model_name": (name,), **entry} for name, entry in zip(names, entries, strict=True)]


def _refuse_clashes(engines: Sequence[Settings]) -> None:
    """Requests choose by name, of models and of adapters alike."""
    owners: dict[str, str] = {}
    for settings in engines:
        model = settings.model or "the embedded default"
        adapters = settings.lora_modules or {} if settings.enable_lora else {}
        for name in (*(settings.names or (model,)), *adapters):
            if name in owners:
                raise ConfigError(
                    f"Requests could not tell two models apart: '{name}' would name {owners[name]} and {model}. "
                    "Give each a --served-model-name of its own, and each adapter to one of them."
                )
            owners[name] = model


def _environment(variables: Mapping[str, str]) -> _Source:
    """POOLHOUSE_<OPTION>, and vLLM's own name for its keys; an empty variable is none, but an empty key is a mistake.

    Raises:
        ConfigError: a name that is nearly an option's.
    """
    options: dict[str, object] = {"api_key": variables["VLLM_API_KEY"]} if "VLLM_API_KEY" in variables else {}
    names = {"api_key": "VLLM_API_KEY"} if options else {}
    known = known_options() - {"model", "config"}
    for variable, value in variables.items():
        name = variable.removeprefix(_PREFIX).lower()
        if not variable.startswith(_PREFIX) or _of_kubernetes(variable, value):
            continue
        if name in known:
            if value or name == "api_key":
                options[name], names[name] = value, variable
        elif name not in ("model", "config") and (near := nearest(name, useful_options() | {"model", "config"})):
            raise ConfigError(f"{variable} is no option. Did you mean {_PREFIX}{near.upper()}?")
    model = variables.get("POOLHOUSE_MODEL")
    options = with_our_names(parsed(options, lambda name: names.get(name, name)))
    written = {OUR_NAMES.get(name, name): Written(variable, "=") for name, variable in names.items()}
    return _Source(options, [{"model": model}] if model else (), written)


def _of_kubernetes(variable: str, value: str) -> bool:
    """Whether it is the address of a service named poolhouse..., which Kubernetes and Docker's links set in every pod."""
    # Of these names only PORT is an option too, and that is then an address.
    if variable.endswith("_PORT"):
        return _SERVICE_ADDRESS.match(value) is not None or variable.endswith("_SERVICE_PORT")
    return _SERVICE_NAME.search(variable) is not None


def read_config(path: Path) -> tuple[list[Options], dict[str, object], dict[str, str]]:
    """The models of a file, each a mapping with its name under `model`, and the options beside them, in our names.

    Third, how the file writes each option.

    Raises:
        ConfigError: no such file, no mapping in YAML, or an option that does not exist, naming the nearest.
    """
    content = _loaded(path, "--config")
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
    return [_entry(path, model, typed) for model in models], with_our_names(options), typed


def read_models_config(path: Path) -> Mapping[str, Options]:
    """Options of models on demand, by the names of these, from a file in YAML or JSON.

    Raises:
        ConfigError: no such file, no mapping of names, an option that does not exist, or a value that does not fit.
    """
    content = _loaded(path, "--models-config")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: it is a mapping of a model's name to its options, got {content!r}.")
    known = known_options() - set(ServerSettings.model_fields) - {"model", "served_model_name"}
    found = {str(name): with_our_names(_checked(path, options or {}, known, {})) for name, options in content.items()}
    for name, options in found.items():
        try:
            Settings.parse(**options)
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from None
    return found


def _loaded(path: Path, option: str) -> object:
    """The value of a file in YAML. option: the one that names the file, for errors."""
    try:
        return yaml.load(path.read_bytes(), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"{option}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None


def _entry(path: Path, entry: object, typed: dict[str, str]) -> Options:
    if isinstance(entry, str):
        return {"model": entry}
    options = _checked(path, entry, known_options() - set(ServerSettings.model_fields), typed)
    if not isinstance(options.get("model"), str):
        raise ConfigError(f"{path}: an entry of models: needs model: NAME; got {entry!r}.")
    return with_our_names(options)


def _checked(path: Path, options: object, known: set[str], typed: dict[str, str]) -> dict[str, object]:
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
            hint = near and f" Did you mean '{near.replace('_', '-') if '-' in key else near}'?"
            raise ConfigError(f"{path}: there is no option '{key}'.{hint or ''}")
        typed[OUR_NAMES.get(name, name)] = key
    return parsed({name: options[key] for name, key in names.items()}, lambda name: f"{path}: {names[name]}")


# In secrets and permissions, numbers are taken as they are written: to YAML, 0123 is 83.
_NUMBERS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))
_AS_WRITTEN = frozenset({"api_key", "hf_token", "ssl_keyfile_password", "uds_mode"})


class _Loader(yaml.SafeLoader):
    """YAML's safe types; a key that stands twice is an error, where YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and str(key.value).replace("-", "_") in _AS_WRITTEN:
                entries = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for entry in entries:
                    if entry.tag in _NUMBERS:
                        entry.tag = "tag:yaml.org,2002:str"
        # PyYAML has types where another package brings them.
        mapping: dict[Hashable, object] = super().construct_mapping(node, deep)  # type: ignore[no-untyped-call, unused-ignore]
        # Merged keys (<<) stand in the node too, so only plain ones are counted.
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if len(keys) > len(mapping) and twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return mapping
