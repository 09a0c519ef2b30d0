"""Label scores: steps from the rows of a text and its labels to a logit for each label, as GLiClass has them.

    rows of a prompt     [CLS] <<LABEL>> good <<LABEL>> bad <<SEP>> the text [SEP]
    TextAndLabels        text | label 0          a row for each label, the vector of its text before its own
                         text | label 1
    a scorer             logit 0, logit 1

Source: Stepanov et al. 2025, GLiClass (arXiv 2508.07662).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.packing.pack import PackedMarks
from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import REDUCTIONS, Rows
from poolhouse.pooling.steps import Dense, Step


@dataclass(frozen=True, slots=True, eq=False)
class Projector(Step):
    """Two dense layers."""

    first: Dense
    second: Dense

    @property
    def description(self) -> str:
        return f"{self.first.description} > {self.second.description}"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return self.second(self.first(rows, params), params)


@dataclass(frozen=True, slots=True, eq=False)
class TextAndLabels(Step):
    """A row for each label of a prompt: the projected vector of its text, and behind it that of the label.

    pooling: what makes a text's vector of its rows, a key of REDUCTIONS. average: a label's vector is the mean of all its
    rows; else it has one. unit: vectors have unit length. over_all: a mean is over as many rows as the whole prompt has,
    whatever it leaves out.
    """

    pooling: str
    average: bool
    unit: bool
    over_all: bool
    text: Projector
    label: Projector

    @property
    def description(self) -> str:
        label = "mean" if self.average else "row"
        unit = " > unit length" if self.unit else ""
        return f"{self.pooling.lower()} of text > {self.text.description}{unit}, {label} of label likewise"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        assert rows.marks is not None
        texts = REDUCTIONS[self.pooling](rows)
        if self.over_all:
            texts = _over_all(texts, rows)
        labels = _means(rows.values, rows.marks) if self.average else rows.values[rows.marks.labels[:, 0]].float()
        texts = self.text(rows.with_values(texts), params).values
        labels = self.label(rows.with_values(labels), params).values
        if self.unit:
            texts, labels = _unit(texts), _unit(labels)
        of_labels = rows.marks.of_labels
        return Rows(torch.cat((texts[of_labels.owner], labels), -1), of_labels, rows.ids[rows.marks.labels[:, 0]])


def _unit(vectors: Tensor) -> Tensor:
    # As the model was trained; a zero vector stays one.
    units: Tensor = vectors / (torch.linalg.vector_norm(vectors, dim=-1, keepdim=True) + 1e-8)
    return units


def _over_all(means: Tensor, rows: Rows) -> Tensor:
    """Means of the rows that are not left out, over the number of all rows instead."""
    if rows.skip is None:
        return means
    lengths = rows.segments.lengths_tensor
    return means * ((lengths - rows.skip.to(lengths.device)) / lengths)[:, None]


def _means(values: Tensor, marks: PackedMarks) -> Tensor:
    """[labels, features]: the mean of the rows of each label, which lie one behind the other; 0 for a label without."""
    starts, ends = marks.labels.T.contiguous()
    row = torch.arange(len(values), device=values.device)
    label = torch.searchsorted(starts, row, right=True) - 1
    inside = (label >= 0) & (row < ends[label.clamp(min=0)])
    # Rows of no label are added to a sum that nobody reads.
    sums = values.new_zeros(len(starts) + 1, values.shape[1], dtype=torch.float32)
    sums.index_add_(0, torch.where(inside, label, len(starts)), values.float())
    means: Tensor = sums[:-1] / (ends - starts).clamp(min=1)[:, None]
    return means


@dataclass(frozen=True, slots=True)
class Dot(Step):
    """The dot product of the two vectors of each row."""

    description = "dot product"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        text, label = rows.values.chunk(2, -1)
        return rows.with_values((text * label).sum(-1, keepdim=True))


@dataclass(frozen=True, slots=True, eq=False)
class WeightedDot(Step):
    """Of both vectors a half as it is, then the product of the other halves; each projected to two halves first."""

    text: Dense
    label: Dense

    @property
    def description(self) -> str:
        return f"{self.text.description} each > weighted dot"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        given = zip((self.text, self.label), rows.values.chunk(2, -1), strict=True)
        text, label = (dense(rows.with_values(half), params).values.chunk(2, -1) for dense, half in given)
        return rows.with_values(torch.cat((text[0], label[0], text[1] * label[1]), -1))


@dataclass(frozen=True, slots=True, eq=False)
class Hopfield(Step):
    """Labels with a share of their text's vector, the larger the more a label asks for it beside the others of its text.

    query, key, value: [features, features]. Source: Ramsauer et al. 2020, Hopfield Networks is All You Need.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    beta: float = 4.0
    description = "hopfield"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        text, label = rows.values.chunk(2, -1)
        asked = self.beta * (F.linear(label, self.query) * F.linear(text, self.key)).sum(-1)
        owner, texts = rows.segments.owner, len(rows.segments)
        most = asked.new_full((texts,), -torch.inf).scatter_reduce_(0, owner, asked, "amax")
        weights = (asked - most[owner]).exp()
        sums = weights.new_zeros(texts).index_add_(0, owner, weights)
        shares = weights / sums[owner]
        return rows.with_values(label + shares[:, None] * F.linear(text, self.value))


@dataclass(frozen=True, slots=True)
class OneEach(Step):
    """The only number of each row, by a factor."""

    factor: float = 1.0

    @property
    def description(self) -> str:
        return "logit" if self.factor == 1 else f"logit by {self.factor:g}"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values(rows.values[:, 0] * self.factor)
