"""LabelledFiles: what the files of a checkpoint that reads labels with each text say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

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
