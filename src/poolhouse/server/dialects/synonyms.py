"""Fields of hosted embedding APIs at /v1/embeddings, in our words."""

from __future__ import annotations

from typing import Any

_RENAMED = {"output_dimension": "dimensions", "normalized": "use_activation"}
# Words for the numbers of a vector: Jina's embedding_type, Voyage's output_dtype, NVIDIA's embedding_type.
_PRECISIONS = ("embedding_type", "output_dtype")
_CUTS: dict[Any, dict[str, Any]] = {
    True: {"truncate_prompt_tokens": -1},
    "END": {"truncate_prompt_tokens": -1, "truncation_side": "right"},
    "START": {"truncate_prompt_tokens": -1, "truncation_side": "left"},
    False: {},
    "NONE": {},
}


def in_our_words(body: dict[str, Any]) -> dict[str, Any]:
    """The body with those fields replaced; ours win where both are given. What has no such word is left as it is."""
    made: dict[str, Any] = {}
    for theirs, ours in _RENAMED.items():
        if body.get(theirs) is not None:
            made[ours] = body[theirs]
    for name in _PRECISIONS:
        match body.get(name):
            case "base64":
                made["encoding_format"] = "base64"
            case "float":
                pass
            case str() as precision:
                made["embed_dtype"] = precision
    for name in ("truncate", "truncation"):
        cut = body.get(name)
        if isinstance(cut, str | bool) and cut in _CUTS:
            made |= _CUTS[cut]
    return {**body, **{name: value for name, value in made.items() if body.get(name) is None}} if made else body
