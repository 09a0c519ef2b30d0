"""LabelledFiles: what the files of a checkpoint that reads labels with each text say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import JsonObject
from poolhouse.inputs.labels import ReadsLabels
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.tasks import Task

# Of the tensors of a checkpoint and the width of the encoder's hidden states: what the model answers, by task.
ReadHead = Callable[[Mapping[str, Tensor], int], dict[Task, Pipeline]]


@dataclass(frozen=True, slots=True)
class LabelledFiles:
    """What the files of such a checkpoint say.

    name: its kind, for people. encoder: the config of the encoder, with its model type.
    reader: how texts and labels are read. head: reads what answers, strictly.
    own: a regular expression over the names of the tensors that the head reads.
    """

    name: str
    encoder: JsonObject
    reader: ReadsLabels
    head: ReadHead
    own: str

    def used(self, tensors: Mapping[str, Tensor]) -> frozenset[str]:
        """The names of the head's tensors."""
        return frozenset(filter(re.compile(self.own).fullmatch, tensors))


class HeadTensors:
    """Reads the tensors of a head strictly, in float32: each that is missing or of another shape is an error.

    name: what the model is called, for messages.
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.tensors = tensors
        self._name = name
        self._taken: set[str] = set()

    def take(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """A tensor. shape: None stands for any length.

        Raises:
            CheckpointError: it is missing, or has another shape.
        """
        if name not in self.tensors:
            raise CheckpointError(f"The checkpoint lacks {name}, which {self._name} needs; a head is never made up.")
        tensor = self.tensors[name].float()
        if len(tensor.shape) != len(shape) or any(
            wanted not in (None, found) for wanted, found in zip(shape, tensor.shape, strict=True)
        ):
            raise CheckpointError(
                f"{self._name}: {name} is {list(tensor.shape)}, but {['any' if n is None else n for n in shape]} fits."
            )
        self._taken.add(name)
        return tensor

    def linear(self, name: str, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer. width: of what it takes."""
        weight = self.take(f"{name}.weight", (None, width))
        return weight, self.take(f"{name}.bias", (len(weight),))

    def check_all_read(self, own: str) -> None:
        """Raise CheckpointError for tensors of the head that nobody took. own: a regular expression over their names."""
        left = sorted(set(filter(re.compile(own).fullmatch, self.tensors)) - self._taken)
        if left:
            raise CheckpointError(f"{self._name}: the checkpoint's head has {len(left)} tensors too many: {left[:5]}.")
