"""Own classes: code that checkpoints bring for a model of a known type, and what it does otherwise than that type.

Of a plain type (`mistral`, `qwen2`, `llama`) config.json does not say that tokens see both sides, the code beside it does.
Code of checkpoints is not run here, so it is known by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolhouse.models.files.checkpoint import Config


@dataclass(frozen=True, slots=True)
class OwnClass:
    """A class whose tokens see both sides.

    named: a part of its name, in `architectures` or `auto_map` of config.json.
    pooling, include_prompt, prompts: where no other file says; include_prompt: whether a mean takes in the prompt's tokens.
    """

    named: str
    pooling: str | None = None
    include_prompt: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)


# Sources: the model cards, and the code that encodes there. GritLM's: the package gritlm, which leaves out what stands
# before a text, and puts a mark there if there is no instruction either.
OWN_CLASSES = (
    OwnClass("Bidirectional"),
    OwnClass("QZhouModel", "MEAN"),
    OwnClass("PPLXQwen3Model", "MEAN"),
    OwnClass("ReasonIRModel", "MEAN", include_prompt=False),
    OwnClass("NVEmbedModel", "MEAN", include_prompt=False),
    OwnClass(
        "modeling_gritlm", "MEAN", include_prompt=False,
        prompts={"query": "<|embed|>\n", "document": "<|embed|>\n"},
    ),
)  # fmt: skip


def own_class_of(config: Config) -> OwnClass | None:
    """The class that a config names, if it is one of these."""
    names = names_of_code(config)
    return next((own for own in OWN_CLASSES if any(own.named in name for name in names)), None)


def names_of_code(config: Config) -> tuple[str, ...]:
    """What config.json calls the class of a model without a head, in either of the two places."""
    own = own_code_of(config)
    return (*(config.get("architectures") or ()), *(() if own is None else (own,)))


def own_code_of(config: Config) -> str | None:
    """The code that a checkpoint brings for its model without a head; None where it brings none."""
    code = (config.get("auto_map") or {}).get("AutoModel")
    return None if code is None else str(code)
