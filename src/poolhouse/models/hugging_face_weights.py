"""Whether transformers filled every weight that matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poolhouse.errors import CheckpointError
from poolhouse.models.hugging_face_backbones import Forward

# Names in errors and notes; the rest is counted.
_NAMED = 5


def check_weights(
    whole: nn.Module, forward: Forward, info: Mapping[str, Any], ids: Sequence[int], folder: Path
) -> list[str]:
    """Refuse a model with random weights in what it answers; notes about the rest.

    whole: what was loaded, of which `forward` runs all or the encoder. info: transformers' account of the loading.
    ids: token ids that are safe to try.

    Raises:
        CheckpointError: naming tensors that are missing or of another shape.
    """
    model = forward.model
    used = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    names = {name for name, tensor in _tensors(whole) if id(tensor) in used}
    shapes = {name: (tuple(theirs), tuple(ours)) for name, theirs, ours in info["mismatched_keys"] if name in names}
    if shapes:
        listed = [f"{name} {theirs} instead of {ours}" for name, (theirs, ours) in sorted(shapes.items())]
        raise CheckpointError(f"{folder} has tensors of other shapes than its config asks for: {_short(listed)}.")
    notes = []
    missing = sorted(names & set(info["missing_keys"]))
    if missing:
        if _matters([tensor for name, tensor in _tensors(whole) if name in missing], forward, ids):
            raise CheckpointError(
                f"{folder} lacks {len(missing)} tensors, some of which {type(model).__name__} needs: "
                f"{_short(missing)}. It holds others that nobody claimed: {_short(sorted(info['unexpected_keys'])) or 'none'}."
            )
        notes.append(f"Not in the checkpoint, and not needed: {_short(missing)}.")
    if info["unexpected_keys"]:
        notes.append(f"Tensors left out: {_short(sorted(info['unexpected_keys']))}.")
    return notes


def _matters(tensors: Sequence[Tensor], forward: Forward, ids: Sequence[int]) -> bool:
    """Whether hidden states depend on these tensors: they are spoilt for one short run.

    They were made up by the initialisation (a pooler that a checkpoint lacks), so nothing is lost.
    """
    suspects = [tensor for tensor in tensors if tensor.is_floating_point()]
    kept = [tensor.detach().clone() for tensor in suspects]
    with torch.no_grad():
        for tensor in suspects:
            tensor.fill_(torch.nan)
        try:
            answer = forward(torch.tensor([ids[:5]]))
        except Exception:  # noqa: BLE001 - a model that cannot be asked gets no benefit of the doubt
            return True
        finally:
            for tensor, before in zip(suspects, kept, strict=True):
                tensor.copy_(before)
    return bool(answer.isnan().any())


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _short(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
