"""Options of `serve` from everywhere: the command line wins over the file of --config, and that over the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolhouse.cli.config_file import read_config
from poolhouse.cli.options import parsed
from poolhouse.cli.spelling import Written, on_the_line, spelled
from poolhouse.errors import ConfigError, nearest
from poolhouse.settings import ServerSettings, Settings, known_options, several_words, useful_options
from poolhouse.vllm_options import OUR_NAMES, in_our_words

_PREFIX = "POOLHOUSE_"
_SERVICE_NAME = re.compile(r"_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$")
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://", re.IGNORECASE)


def gather(
    models: Sequence[str],
    options: Mapping[str, Any],
    config: Path | None,
    environment: Mapping[str, str],
    typed: Mapping[str, str] | None = None,
) -> tuple[ServerSettings, tuple[Settings, ...], dict[str, Written]]:
    """The server's settings and those of each model, in their order; and how each option was written.

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
        sources.append(_Source(in_our_words(options), [{"model": model} for model in models], line))
        return *_settings(sources), written
    except ConfigError as error:
        raise ConfigError(spelled(str(error), written)) from None


@dataclass(frozen=True, slots=True)
class _Source:
    """What one place says, and how it writes it.

    options: of the server, and of all models. models: options of each model, `model` its name.
    """

    options: Mapping[str, Any]
    models: Sequence[Mapping[str, Any]]
    written: Mapping[str, Written]


def _settings(sources: Sequence[_Source]) -> tuple[ServerSettings, tuple[Settings, ...]]:
    shared = {name: value for source in sources for name, value in source.options.items()}
    server = ServerSettings.parse(**{name: shared.pop(name) for name in ServerSettings.model_fields if name in shared})
    entries = next((source.models for source in reversed(sources) if source.models), [{"model": None}])
    # What the command line says of all models stands above what the file says of one.
    last = {name: value for name, value in sources[-1].options.items() if name in shared}
    if len(entries) > 1 and shared.get("served_model_name") is not None:
        entries = _one_name_each(entries, several_words(shared.pop("served_model_name")))
        last.pop("served_model_name", None)
    engines = tuple(Settings.parse(**{**shared, **entry, **last}) for entry in entries)
    _refuse_clashes(engines)
    return server, engines


def _one_name_each(entries: Sequence[Mapping[str, Any]], names: Any) -> list[Mapping[str, Any]]:
    if not isinstance(names, (list, tuple)) or len(names) != len(entries):
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
    options: dict[str, Any] = {"api_key": variables["VLLM_API_KEY"]} if "VLLM_API_KEY" in variables else {}
    places = {"api_key": "VLLM_API_KEY"} if options else {}
    known = known_options() - {"model", "config"}
    for variable, value in variables.items():
        name = variable.removeprefix(_PREFIX).lower()
        if not variable.startswith(_PREFIX) or _of_kubernetes(variable, value):
            continue
        if name in known:
            if value or name == "api_key":
                options[name], places[name] = value, variable
        elif name not in ("model", "config") and (near := nearest(name, useful_options() | {"model", "config"})):
            raise ConfigError(f"{variable} is no option. Did you mean {_PREFIX}{near.upper()}?")
    model = variables.get("POOLHOUSE_MODEL")
    options = in_our_words(parsed(options, lambda name: places.get(name, name)))
    written = {OUR_NAMES.get(name, name): Written(variable, "=") for name, variable in places.items()}
    return _Source(options, [{"model": model}] if model else (), written)


def _of_kubernetes(variable: str, value: str) -> bool:
    """Whether it tells of a service whose name begins with poolhouse, as Kubernetes and Docker's links do in every pod."""
    # Of these names only PORT is an option too, and that is then an address.
    if variable.endswith("_PORT"):
        return _SERVICE_ADDRESS.match(value) is not None or variable.endswith("_SERVICE_PORT")
    return _SERVICE_NAME.search(variable) is not None
