"""LoRA adapters as users name them: vLLM's `LoRARequest` and `lora_modules`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poolhouse.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter for a request, with the fields of vLLM's class of the same name.

    lora_path: a PEFT folder or hub id, loaded the first time. lora_int_id means nothing here: names tell adapters apart.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""

    @classmethod
    def parse(cls, given: Any) -> LoRARequest:
        """A request from what callers write: a name, a LoRARequest, or vLLM's.

        Raises:
            InvalidRequest: none of these.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls(given)
        name = getattr(given, "lora_name", None)
        if not isinstance(name, str):
            raise InvalidRequest(
                f"lora_request must be the name of an adapter or a LoRARequest, got {type(given).__name__}.",
                "lora_request",
            )
        return cls(name, lora_path=str(getattr(given, "lora_path", "") or getattr(given, "path", "") or ""))


def parse_lora_modules(given: Any) -> dict[str, str]:
    """Adapters as name -> folder or hub id, from a mapping, "name=path" words, or vLLM's JSON objects.

    Raises:
        ValueError: in words for the user.
    """
    if isinstance(given, Mapping):
        return _checked(given.items())
    if isinstance(given, str):
        text = given.strip()
        if text.startswith("["):
            given = json.loads(text)
        else:
            given = json.loads(f"[{text}]") if text.startswith("{") else text.replace(",", " ").split()
    pairs = []
    for module in given:
        if isinstance(module, str) and "=" in module:
            pairs.append(tuple(module.split("=", 1)))
        elif isinstance(module, Mapping) and {"name", "path"} <= set(module):
            pairs.append((module["name"], module["path"]))
        else:
            raise ValueError(f"lora_modules: {module!r} is neither 'name=path' nor an object with name and path")
    return _checked(pairs)


def _checked(pairs: Any) -> dict[str, str]:
    modules: dict[str, str] = {}
    for name, path in pairs:
        if not name or not path:
            raise ValueError(f"lora_modules: {name!r}={path!r} lacks its name or its path")
        if name in modules:
            raise ValueError(f"lora_modules names {name!r} twice")
        modules[str(name)] = str(path)
    return modules


def parse_lora_requests(given: Any, prompts: int) -> list[LoRARequest | None]:
    """One entry per prompt from what callers give: nothing, one for all, or a list.

    Raises:
        InvalidRequest: a list of another length, or an entry that is no adapter.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        return [None if given is None else LoRARequest.parse(given)] * prompts
    if len(given) != prompts:
        raise InvalidRequest(
            f"lora_request has {len(given)} entries for {prompts} prompts; give one, or one per prompt.", "lora_request"
        )
    return [None if entry is None else LoRARequest.parse(entry) for entry in given]
