"""Stored: the tensors that stand for one quantised weight, each checked when it is read, and what turns them into numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.errors import CheckpointError

# The object `quantization_config` of config.json.
Settings = Mapping[str, Any]
# Whole numbers of int8 [out, in], and what a step of each output is worth, float32 [out].
Whole = tuple[Tensor, Tensor]

SCALES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Stored:
    """The parts of one quantised weight.

    module: whose weight it is. tensors: of the checkpoint. parts: what stands behind the module's name.
    """

    module: str
    tensors: Mapping[str, Tensor]
    parts: frozenset[str]

    def get(self, part: str, *dtypes: torch.dtype) -> Tensor:
        """A part that must be there, of one of these types; of any where none is given.

        Raises:
            CheckpointError: it is missing, or of another type.
        """
        if part not in self.parts:
            raise self.wrong(f"its companions are there ({sorted(self.parts)}), but {self.module}.{part} is not")
        tensor = self.tensors[f"{self.module}.{part}"]
        if dtypes and tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self.wrong(f"{part} is {str(tensor.dtype).removeprefix('torch.')} instead of {wanted}")
        return tensor

    def shaped(self, part: str, *shape: int, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
        """The same of a part that must have this shape."""
        tensor = self.get(part, *dtypes)
        if tensor.shape != shape:
            raise self.wrong(f"{part} is {list(tensor.shape)} instead of {list(shape)}")
        return tensor

    def matrix(self, part: str, *dtypes: torch.dtype) -> Tensor:
        """The same of a part that must have two dimensions."""
        tensor = self.get(part, *dtypes)
        if tensor.dim() != 2:
            raise self.wrong(f"{part} is {list(tensor.shape)}, which is no matrix")
        return tensor

    def groups(self, part: str, columns: int, groups: int) -> Tensor | None:
        """The group of each column, [columns] int64; None where the checkpoint does not say.

        Raises:
            CheckpointError: a group that does not exist.
        """
        if part not in self.parts:
            return None
        found = self.shaped(part, columns, dtypes=(torch.int32, torch.int64)).long()
        if bool((found == -1).all()):
            return None  # as it was made, and never filled
        if int(found.min()) < 0 or int(found.max()) >= groups:
            raise self.wrong(f"{part} names groups up to {int(found.max())}, but there are scales of {groups}")
        return found

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"The quantised weight of {self.module}: {what}.")


@dataclass(frozen=True, slots=True)
class Quantised:
    """How the weights of a checkpoint are quantised.

    method: as config.json calls it. what: for people. parts: what stands behind a module's name in its tensors.
    unused: the same of tensors that are left out, since they say nothing of weights.
    weight: the numbers, float32 [out, in]. whole: the same as whole numbers with a step per output, of weights that are
    stored so. activations: whether the files say that inputs of products are quantised too. notes: a sentence each.
    """

    method: str
    what: str
    parts: tuple[str, ...]
    weight: Callable[[Stored], Tensor]
    whole: Callable[[Stored], Whole | None] = lambda _: None
    unused: tuple[str, ...] = ()
    activations: bool = False
    notes: tuple[str, ...] = ()


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """[rows, words] int32 -> [rows, count] int16: numbers of so many bits, end to end, the lowest bits first."""
    # A number of up to eight bits lies in two bytes.
    octets = words.contiguous().view(torch.uint8).to(torch.int16)
    pairs = F.pad(octets[:, 1:], (0, 1)).bitwise_left_shift_(8).bitwise_or_(octets)
    starts = torch.arange(count) * bits
    return pairs[:, starts // 8].bitwise_right_shift_((starts % 8).to(torch.int16)).bitwise_and_(2**bits - 1)


def scaled(codes: Tensor, scales: Tensor, zeros: Tensor | None = None, group_of: Tensor | None = None) -> Tensor:
    """(codes - zeros) * scales, float32.

    codes: [out, in]. scales, zeros: [out, groups]. group_of: [in], the group of each column; None: equal runs of columns.
    """
    out, groups = scales.shape
    numbers = codes.to(torch.float32)
    if group_of is not None:
        if zeros is not None:
            numbers -= zeros.to(torch.float32)[:, group_of]
        return numbers.mul_(scales.to(torch.float32)[:, group_of])
    runs = numbers.view(out, groups, -1)
    if zeros is not None:
        runs -= zeros.to(torch.float32)[:, :, None]
    return runs.mul_(scales.to(torch.float32)[:, :, None]).view(codes.shape)


def scaled_by_block(numbers: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """numbers [out, in] times the scale of each block of so many rows and columns, float32; the last may be smaller."""
    spread = scales.to(torch.float32).repeat_interleave(block[1], 1)[:, : numbers.shape[1]]
    return numbers.to(torch.float32).mul_(spread.repeat_interleave(block[0], 0)[: len(numbers)])


def blocks_of(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a matrix has, down and across."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def pair(settings: Settings, key: str) -> tuple[int, int]:
    """The sides of a block.

    Raises:
        CheckpointError: no two positive numbers.
    """
    value = settings.get(key)
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise CheckpointError(f"config.json: quantization_config.{key} is {value!r}, not two positive numbers.")
    return value[0], value[1]


def choice(settings: Settings, key: str, default: Any, possible: tuple[Any, ...]) -> Any:
    """The value of a key that has few.

    Raises:
        CheckpointError: another one.
    """
    value = settings.get(key)
    value = default if value is None else value
    value = value.lower() if isinstance(value, str) else value
    if value not in possible or isinstance(value, bool) != isinstance(possible[0], bool):
        raise CheckpointError(f"config.json: quantization_config.{key} is {value!r}; read are {list(possible)}.")
    return value


def refuse_unknown(settings: Settings, known: frozenset[str], within: str = "quantization_config") -> None:
    """Raise CheckpointError for a key that nobody reads, and that says something."""
    for key, value in settings.items():
        if key not in known and value not in (None, False, "", [], {}):
            raise CheckpointError(
                f"config.json: {within}.{key} is {value!r}, which is not known here and may change numbers. "
                "hf_overrides can set it to null, if it does not."
            )
