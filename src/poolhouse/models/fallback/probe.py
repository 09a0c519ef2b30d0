"""Probe: what a model of transformers does is tried at load: may it run on packs, is it causal, how its head pools.

transformers' own flag says yes to packing for models that then answer wrongly without any error, so only numbers count
here: two short texts are computed packed and alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poolhouse.models.fallback import attention
from poolhouse.models.fallback.backbones import Forward, hidden_states
from poolhouse.models.heads.heads import Head, LoadedHead
from poolhouse.models.roles import Role
from poolhouse.packing.pack import Segments
from poolhouse.pooling.rows import REDUCTIONS, Rows
from poolhouse.pooling.steps import Dense

# Tokens of the two probe texts; the second leaves the window below.
_LENGTHS = (5, 9)

# Tokens of the text that tells how a head pools.
_HEAD_LENGTH = 9

# Sliding windows are narrowed to this many tokens for the probe: a real one would need thousands of tokens to leave.
_WINDOW = 4

# Position tables up to this size are probed with a pack that is longer: models slice what they should look up.
_LONG_PACK = 1024

# Largest relative error of any token. Packed against alone compares two attention kernels, whose rounding grows with
# depth; one pack against another runs the same kernels, so only a leak between texts (or a router's regrouping) shows.
ALONE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
_LEAK_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass(frozen=True, slots=True)
class Verdict:
    """position_offset: where packed positions count from, or None if the model must run unpacked; why: one clause."""

    position_offset: int | None
    why: str


def may_pack(
    forward: Forward,
    ids: Sequence[int],
    pad_id: int | None,
    device: torch.device,
    seen: ProbePictures | None = None,
) -> Verdict:
    """Whether packed texts give the answers that they give alone; leaves the model's attention set accordingly.

    ids: token ids that are safe to try. seen: what stands in the midst of the texts, of a model that reads pictures.
    """
    model = forward.model
    scaled = _ropes_by_length(model.config.to_dict())
    if scaled:
        return Verdict(None, f"unpacked: rope of type '{scaled}' depends on the longest text of a pack")
    own_attention = _attention_of(model)
    texts = _Texts.draw(ids, device)
    with _narrow_windows(model):
        verdict = _try_packing(forward, texts if seen is None else texts.showing(seen), pad_id)
    _set_attention(model, own_attention if verdict.position_offset is None else attention.RUN)
    return verdict


def reads_ahead(forward: Forward, ids: Sequence[int], device: torch.device) -> bool:
    """Whether tokens see later ones: an encoder's way, not a decoder's."""
    texts = _Texts.draw(ids, device)
    changed = texts.first.clone()
    changed[-1] = texts.other_first[-1]
    before, after = (forward(text[None])[0, :-1] for text in (texts.first, changed))
    return relative_error(after, before) > _LEAK_TOLERANCE[forward.dtype]


def take_head(
    forward: Forward, role: Role, ids: Sequence[int], device: torch.device
) -> tuple[Forward, LoadedHead] | None:
    """The model without its head, and the head, if that is one linear layer over hidden states; else None.

    forward: answers with the whole model's logits, which those of each pooling are compared with.
    """
    whole = forward.model
    base = whole.base_model
    linear = _lone_linear(whole, base)
    if linear is None:
        return None
    text = torch.tensor([[ids[index * 7 % len(ids)] for index in range(_HEAD_LENGTH)]], device=device)
    base_forward = Forward(base, forward.dtype, hidden_states)
    try:
        hidden = base_forward(text)[0].float()
    except Exception:  # noqa: BLE001 - a base that gives no hidden states stays in its model
        return None
    weight, bias = linear.weight.float(), None if linear.bias is None else linear.bias.float()
    expected = forward(text)[0].float()
    pooling = _pooling_of(hidden, weight, bias, expected, role, ALONE_TOLERANCE[forward.dtype])
    if pooling is None:
        return None
    head = Head((), pooling=pooling or None)
    return base_forward, LoadedHead(head, (Dense(weight, bias),), len(weight))


@dataclass(frozen=True, slots=True, eq=False)
class ProbePictures:
    """Two pictures' rows [rows, features], and what makes embeddings of token ids."""

    embed: Callable[[Tensor], Tensor]
    first: Tensor
    second: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Texts:
    """Two probe texts, and another of the length of each that differs from it in every token.

    [tokens] each, or embeddings [tokens, features].
    """

    first: Tensor
    second: Tensor
    other_first: Tensor
    other_second: Tensor

    @classmethod
    def draw(cls, ids: Sequence[int], device: torch.device) -> _Texts:
        indices = torch.randint(len(ids), (sum(_LENGTHS),), generator=torch.Generator().manual_seed(0))
        known, cut = torch.tensor(ids), _LENGTHS[0]
        texts, others = (known[(indices + shift) % len(ids)].to(device) for shift in (0, 1))
        return cls(texts[:cut], texts[cut:], others[:cut], others[cut:])

    def showing(self, seen: ProbePictures) -> _Texts:
        """The same as embeddings, with rows of a picture between the first and the last; the others show the other one."""

        def shown(text: Tensor, rows: Tensor) -> Tensor:
            embedded = seen.embed(text)
            some = rows[: len(text) - 2]
            embedded[1 : 1 + len(some)] = some
            return embedded

        return _Texts(
            *(shown(self.first, seen.first), shown(self.second, seen.second)),
            *(shown(self.other_first, seen.second), shown(self.other_second, seen.first)),
        )


def _try_packing(forward: Forward, texts: _Texts, pad_id: int | None) -> Verdict:
    model, name = forward.model, type(forward.model).__name__
    alone = torch.cat([forward(text[None])[0] for text in (texts.first, texts.second)])
    if not alone.isfinite().all():
        return Verdict(None, "unpacked: the answers to the probe at load are not finite")
    try:
        error, offset = _best_offset(forward, texts, alone, pad_id)
        if not error <= ALONE_TOLERANCE[forward.dtype]:
            return Verdict(None, f"unpacked: packed and alone differ by {error:.1g}")
        leak = _leak(forward, texts, offset)
        if not leak <= _LEAK_TOLERANCE[forward.dtype]:
            return Verdict(None, f"unpacked: texts of one pack change each other by {leak:.1g}")
        outgrown = _outgrown(model)
        if outgrown:
            repeats = outgrown // sum(_LENGTHS) + 1
            packed = _packed(forward, [texts.first, texts.second] * repeats, offset)
            error = relative_error(packed, alone.repeat(repeats, 1))
            if not error <= ALONE_TOLERANCE[forward.dtype]:
                return Verdict(None, f"unpacked: packs of more than {outgrown} tokens differ by {error:.1g}")
    except attention.PackingError as reason:
        return Verdict(None, f"unpacked: {reason}")
    except Exception as error:  # noqa: BLE001 - whatever a model raises, it is a reason not to pack it
        return Verdict(None, f"unpacked: {name} raised {type(error).__name__}: {_first_line(error)}")
    return Verdict(offset, f"packed, positions from {offset}")


def _best_offset(forward: Forward, texts: _Texts, alone: Tensor, pad_id: int | None) -> tuple[float, int]:
    """The error of packed against alone, and the position offset that it was reached with.

    RoBERTa and models like it count positions from pad_id + 1.
    """
    _take_attention(forward.model, attention.PROBE)
    offsets = [0]
    limit = getattr(forward.model.config, "max_position_embeddings", None)
    # On CUDA a position beyond its table does not raise but kills the process's device.
    if pad_id is not None and isinstance(limit, int) and 0 <= pad_id < limit - max(_LENGTHS):
        offsets.append(pad_id + 1)
    tried = []
    for offset in offsets:
        error = relative_error(_packed(forward, [texts.first, texts.second], offset), alone)
        if error <= ALONE_TOLERANCE[forward.dtype]:
            return error, offset
        tried.append((error, offset))
    return min(tried)


def _leak(forward: Forward, texts: _Texts, offset: int) -> float:
    """How much each text's answer depends on its neighbour in the pack."""
    _take_attention(forward.model, attention.RUN)
    packed = _packed(forward, [texts.first, texts.second], offset)
    after = _packed(forward, [texts.first, texts.other_second], offset)
    before = _packed(forward, [texts.other_first, texts.second], offset)
    cut = _LENGTHS[0]
    return max(relative_error(after[:cut], packed[:cut]), relative_error(before[cut:], packed[cut:]))


def _ropes_by_length(config: Any) -> str | None:
    """The kind of rope, anywhere in a config, whose frequencies change once a text is long."""
    if not isinstance(config, dict):
        return None
    kind = config.get("rope_type", config.get("type"))
    if kind in ("dynamic", "longrope"):
        return str(kind)
    return next(filter(None, map(_ropes_by_length, config.values())), None)


def _outgrown(model: nn.Module) -> int:
    """The length of buffers with an entry per position; 0 if there are none or if they are long."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit > _LONG_PACK:
        return 0
    return limit if any(limit in buffer.shape for buffer in model.buffers()) else 0


def _packed(forward: Forward, texts: list[Tensor], offset: int) -> Tensor:
    segments = Segments([len(text) for text in texts], texts[0].device)
    return forward(torch.cat(texts)[None], (segments.positions + offset)[None], segments=segments)[0]


def _take_attention(model: Any, name: str) -> None:
    _set_attention(model, name)
    if _attention_of(model) != name:
        raise attention.PackingError("its attention cannot be replaced")


def _attention_of(model: Any) -> str:
    """The name of the attention that runs over the tokens."""
    name: str = model.config.get_text_config()._attn_implementation  # noqa: SLF001 - transformers has no public name for it
    return name


def _set_attention(model: Any, name: str) -> None:
    """Set it; towers of pictures, whose lengths are not the pack's, keep theirs."""
    model.set_attn_implementation({"text_config": name} if "text_config" in model.config.sub_configs else name)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The largest relative error of any row."""
    got, expected = got.float(), expected.float()
    return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)).max())


def _lone_linear(whole: nn.Module, base: nn.Module) -> nn.Linear | None:
    """The only module with weights outside the base, if it is linear."""
    inside = set(base.modules())
    others = [
        module
        for module in whole.modules()
        if module not in inside and any(True for _ in module.parameters(recurse=False))
    ]
    return others[0] if len(others) == 1 and isinstance(others[0], nn.Linear) else None


def _pooling_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, expected: Tensor, role: Role, tolerance: float
) -> str | None:
    """The pooling that leads to the expected logits, "" for none of it; None if no pooling does."""
    if role != "classify":
        tried = {"": hidden}
    else:
        rows = Rows(hidden, Segments([len(hidden)], hidden.device), torch.empty(len(hidden), device=hidden.device))
        tried = {name: REDUCTIONS[name](rows) for name in ("LAST", "CLS", "MEAN")}
    errors = {
        name: relative_error(nn.functional.linear(rows, weight, bias).expand_as(expected), expected)
        for name, rows in tried.items()
    }
    best = min(errors, key=lambda name: errors[name])
    return best if errors[best] <= tolerance else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


@contextmanager
def _narrow_windows(model: nn.Module) -> Iterator[None]:
    """Make every sliding window smaller by the same number of tokens, so that the probe's second text leaves it.

    Windows stand in configs, read when masks are made, and in layers, read by attention functions; where the two
    disagree (ModernBERT's layers count the token itself) the difference is kept.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    everyone: list[Any] = [*configs.values(), *model.modules()]
    holders = [
        (holder, int(holder.sliding_window))
        for holder in everyone
        if isinstance(getattr(holder, "sliding_window", None), int)
    ]
    less = max(min((window for _, window in holders), default=0) - _WINDOW, 0)
    try:
        for holder, window in holders:
            holder.sliding_window = window - less
        yield
    finally:
        for holder, window in holders:
            holder.sliding_window = window
