"""Extraction: scored spans of words that fit labels, from the hidden states of texts that hold both.

Two kinds of scorers. `SpanScores` makes a vector of every span of up to so many words from its first and its last word,
and compares it with those of the labels. `TokenScores` says of every word and label whether a span begins, ends or goes on
there. The answer of a prompt has a row for each span above its threshold: first word, last word, label, score.

Source: GLiNER (Zaratiana et al. 2024); of `TokenScores`, its library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from poolhouse.packing.pack import PackedMarks, Segments
from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import Rows
from poolhouse.pooling.steps import Step

# Numbers of spans, or of pairs of words and labels, that are computed at once; on CPUs as many as caches hold.
_MAX_NUMBERS, _MAX_NUMBERS_ON_CPU = 2**22, 2**19


@dataclass(frozen=True, slots=True, eq=False)
class TwoLayers(Step):
    """second(relu(first(values)))."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    @property
    def description(self) -> str:
        return f"dense {len(self.first)} relu > dense {len(self.second)}"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values(self.of(rows.values))

    def of(self, values: Tensor) -> Tensor:
        """Vectors of vectors, [rows, features] both."""
        return F.linear(F.linear(values, self.first, self.first_bias).relu_(), self.second, self.second_bias)


@dataclass(frozen=True, slots=True, eq=False)
class Among(Step):
    """Vectors of labels that know the other labels of their prompt: by a narrow Transformer, and dense layers on both.

    into, into_bias: to the Transformer's width. out: weights and biases of three layers, relu between them.
    """

    into: Tensor
    into_bias: Tensor
    transformer: nn.TransformerEncoder
    out: tuple[tuple[Tensor, Tensor], ...]

    @property
    def description(self) -> str:
        return f"labels among themselves, {len(self.into)} wide"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values(self.of(rows.values, rows.segments))

    def of(self, values: Tensor, of_labels: Segments) -> Tensor:
        """[labels, features] both. Neighbouring prompts with as many labels go together."""
        narrow, begin = F.linear(values, self.into, self.into_bias), 0
        parts: list[Tensor] = []
        for count, alike in groupby(of_labels.lengths):
            end = begin + count * sum(1 for _ in alike)
            parts.append(self.transformer(narrow[begin:end].unflatten(0, (-1, count))).flatten(0, 1))
            begin = end
        mixed = torch.cat((torch.cat(parts), values), dim=1)
        for number, (weight, bias) in enumerate(self.out):
            mixed = F.linear(mixed.relu() if number else mixed, weight, bias)
        return mixed

    def to(self, device: torch.device) -> Self:
        moved = Step.to(self, device)
        out = tuple((weight.to(device), bias.to(device)) for weight, bias in moved.out)
        return replace(moved, transformer=moved.transformer.to(device), out=out)


@dataclass(frozen=True, slots=True, eq=False)
class Counted(Step):
    """Vectors of labels as GLiNER2 has them: none where the model counts nothing in the text, by the vector of its task.

    counts: of a task's vector, how likely each count is. step, state, state_bias: one step of a GRU from a label's own
    vector; `step` is what its input adds, [3 x features]. labels: of the GRU's and the own vector side by side, or of
    their sum.
    """

    counts: TwoLayers
    step: Tensor
    state: Tensor
    state_bias: Tensor
    labels: TwoLayers | Among

    @property
    def description(self) -> str:
        return "labels by gru, where any is counted"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values(self.of(rows.values, rows.segments))

    def of(self, values: Tensor, of_labels: Segments) -> Tensor:
        """[labels, features] both. of_labels: which are of one prompt."""
        reset, update, new = self.step.chunk(3)
        own_reset, own_update, own_new = F.linear(values, self.state, self.state_bias).chunk(3, 1)
        keep = torch.sigmoid(update + own_update)
        after = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
        after = after + keep * (values - after)
        if isinstance(self.labels, Among):
            return self.labels.of(after + values, of_labels)
        return self.labels.of(torch.cat((after, values), dim=1))

    def any(self, tasks: Tensor) -> Tensor:
        """[prompts], whether a text holds anything. tasks: [prompts, features]."""
        return self.counts.of(tasks).argmax(1) > 0


@dataclass(frozen=True, slots=True, eq=False)
class Vectors(Step):
    """Where the vectors of words and labels come from.

    subtokens: which of a word's tokens make its vector: first, last, mean, max. projection, projection_bias: of hidden
    states; None: as they are. recurrent: both directions of an LSTM over a text's words; None without one.
    """

    subtokens: str
    projection: Tensor | None = None
    projection_bias: Tensor | None = None
    recurrent: nn.LSTM | None = None

    @property
    def description(self) -> str:
        return f"words by {self.subtokens} token" + ("" if self.recurrent is None else " > lstm")

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        return rows.with_values(self.words(rows.values.float(), _marks_of(rows)))

    def of(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """[words, features] and [labels, features] of all prompts."""
        values, marks = rows.values.float(), _marks_of(rows)
        return self.words(values, marks), self.projected(values[marks.labels[:, 0]])

    def projected(self, values: Tensor) -> Tensor:
        return values if self.projection is None else F.linear(values, self.projection, self.projection_bias)

    def words(self, values: Tensor, marks: PackedMarks) -> Tensor:
        """[words, features] of hidden states, [rows, features]."""
        if not len(marks.words):
            return self.projected(values[:0])
        first, after = marks.words.T
        if self.subtokens in ("first", "last"):
            words = self.projected(values[first if self.subtokens == "first" else after - 1])
        else:
            lengths = after - first
            begins = (first - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
            rows = self.projected(values[begins + torch.arange(len(begins), device=begins.device)])
            words = torch.segment_reduce(rows, self.subtokens, lengths=lengths)
        return words if self.recurrent is None else self._run(self.recurrent, words, marks.of_words)

    def _run(self, recurrent: nn.LSTM, words: Tensor, texts: Segments) -> Tensor:
        """What an LSTM makes of the words of each text. It takes those of all texts step by step, the longest text first."""
        lengths = np.array(texts.lengths, dtype=np.int64)
        rank = np.empty_like(lengths)
        rank[np.argsort(-lengths, kind="stable")] = np.arange(len(lengths))
        position = np.arange(texts.total) - np.repeat(np.array(texts.starts, dtype=np.int64), lengths)
        order = np.lexsort((np.repeat(rank, lengths), position))
        sizes = torch.from_numpy(np.bincount(position))
        rows = torch.from_numpy(order).to(words.device, non_blocking=True)
        after, _ = recurrent(PackedSequence(words[rows], sizes))
        return torch.empty_like(after.data).index_copy_(0, rows, after.data)

    def to(self, device: torch.device) -> Self:
        moved = Step.to(self, device)
        return moved if moved.recurrent is None else replace(moved, recurrent=moved.recurrent.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class SpanScores(Step):
    """Spans of up to so many words, by the likeness of their vectors to those of labels.

    A span's vector is `spans` of its two ends side by side, `starts` of its first word and `ends` of its last. The first
    layer of `spans` is computed once for each word, and its second on the side of the labels, which are few.
    labels: the vectors of labels that spans are compared with.
    """

    vectors: Vectors
    starts: TwoLayers
    ends: TwoLayers
    spans: TwoLayers
    labels: TwoLayers | Counted
    max_width: int

    @property
    def description(self) -> str:
        return f"{self.vectors.description} > spans of up to {self.max_width} words by label"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        marks = _marks_of(rows)
        words, labels = self.vectors.of(rows)
        if isinstance(self.labels, Counted):
            labels = self.labels.of(labels, marks.of_labels)
            # Nothing is above a threshold where nothing is counted.
            some = self.labels.any(rows.values[marks.points].float())
            marks = replace(marks, thresholds=torch.where(some, marks.thresholds, torch.inf))
        else:
            labels = self.labels.of(labels)
        found = Spans.of(marks.of_words, self.max_width)
        scores = self.logits(words, labels, found, marks.of_labels).sigmoid_()
        return found.above(scores, marks)

    def logits(self, words: Tensor, labels: Tensor, spans: Spans, of_labels: Segments) -> Tensor:
        """[spans x labels of each prompt, one after another]. labels: what spans are compared with."""
        half = words.shape[1]
        begins = F.linear(self.starts.of(words).relu_(), self.spans.first[:, :half])
        ends = F.linear(self.ends.of(words).relu_(), self.spans.first[:, half:], self.spans.first_bias)
        weights, offsets = labels @ self.spans.second, labels @ self.spans.second_bias
        most = max(1, _most_numbers(words) // begins.shape[1])
        logits: list[Tensor] = []
        for start, end, first, last in zip(
            spans.of_spans.starts, spans.of_spans.ends, of_labels.starts, of_labels.ends, strict=True
        ):
            weight, offset = weights[first:last].T, offsets[first:last]
            for block in range(start, end, most):
                own = slice(block, min(block + most, end))
                ends_met = begins[spans.first[own]].add_(ends[spans.last[own]]).relu_()
                logits.append(torch.addmm(offset, ends_met, weight).flatten())
        return torch.cat(logits) if logits else words.new_zeros(0)


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores(Step):
    """Spans of any length, by words that may begin, end or be inside one of a label.

    A pair of word and label is three numbers, by `pairs` of a vector of each and the product of two others.
    word, label: to the two vectors of each, [2 x features, features].
    """

    vectors: Vectors
    word: Tensor
    word_bias: Tensor
    label: Tensor
    label_bias: Tensor
    pairs: TwoLayers

    @property
    def description(self) -> str:
        return f"{self.vectors.description} > begin, end, inside by label"

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        marks = _marks_of(rows)
        words, labels = self.vectors.of(rows)
        return runs_above(self.logits(words, labels, marks).sigmoid_(), marks)

    def logits(self, words: Tensor, labels: Tensor, marks: PackedMarks) -> Tensor:
        """[labels x words of each prompt, one after another; 3]: begin, end, inside."""
        width = words.shape[1]
        word, word_factor = F.linear(words, self.word, self.word_bias).chunk(2, 1)
        label, label_factor = F.linear(labels, self.label, self.label_bias).chunk(2, 1)
        first = self.pairs.first
        word = F.linear(word, first[:, :width], self.pairs.first_bias)
        label = F.linear(label, first[:, width : 2 * width])
        logits: list[Tensor] = []
        for start, end, begin, stop in zip(
            marks.of_words.starts, marks.of_words.ends, marks.of_labels.starts, marks.of_labels.ends, strict=True
        ):
            most = max(1, _most_numbers(words) // (len(first) * max(end - start, 1)))
            for block in range(begin, stop, most):
                own = slice(block, min(block + most, stop))
                met = F.linear(label_factor[own, None] * word_factor[start:end], first[:, 2 * width :])
                met.add_(label[own, None]).add_(word[start:end]).relu_()
                logits.append(F.linear(met, self.pairs.second, self.pairs.second_bias).flatten(0, 1))
        return torch.cat(logits)


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """All spans of the words of each prompt, by first word, then by length.

    first, last: [spans] int64, words of the pack. of_spans: how many each prompt has.
    """

    first: Tensor
    last: Tensor
    of_spans: Segments

    @classmethod
    def of(cls, texts: Segments, max_width: int) -> Spans:
        """Spans of up to so many words."""
        lengths = np.array(texts.lengths, dtype=np.int64)
        last_words = np.repeat(np.array(texts.ends, dtype=np.int64), lengths)
        widths = np.minimum(last_words - np.arange(texts.total), max_width)
        first = np.repeat(np.arange(texts.total), widths)
        last = first + np.arange(len(first)) - np.repeat(widths.cumsum() - widths, widths)
        bounds = np.concatenate(([0], widths.cumsum()))
        counts = bounds[np.array(texts.ends, dtype=np.int64)] - bounds[np.array(texts.starts, dtype=np.int64)]
        return cls(_on(first, texts.device), _on(last, texts.device), Segments(counts.tolist(), texts.device))

    def above(self, scores: Tensor, marks: PackedMarks) -> Rows:
        """The spans of each prompt whose score is above its threshold. scores: as those of `SpanScores.logits`."""
        labels = marks.of_labels.lengths_tensor
        cells = self.of_spans.lengths_tensor * labels
        kept = (scores > marks.thresholds.repeat_interleave(cells, output_size=len(scores))).nonzero()[:, 0]
        ends = cells.cumsum(0)
        owner = torch.searchsorted(ends, kept, right=True)
        place = kept - (ends - cells)[owner]
        span = self.of_spans.starts_tensor[owner] + place // labels[owner]
        return _answer(self.first[span], self.last[span], place % labels[owner], scores[kept], owner, marks)


def runs_above(scores: Tensor, marks: PackedMarks) -> Rows:
    """The runs of words of each prompt and label that begin, go on and end above the threshold; the least counts.

    scores: as those of `TokenScores.logits`, from 0 to 1.
    """
    start, end, inside = scores.T
    device = scores.device
    lengths = np.repeat(np.array(marks.of_words.lengths, dtype=np.int64), marks.of_labels.lengths)
    prompt = np.repeat(np.arange(len(marks.of_words)), marks.of_labels.lengths)
    # One line for each label of each prompt, of all its words.
    lines = Segments(lengths.tolist(), device)
    prompts = _on(prompt, device)
    threshold = marks.thresholds[prompts][lines.owner]
    within = inside >= threshold
    index = torch.arange(len(scores), device=device)
    breaks = torch.where(within, len(scores), index).flip(0).cummin(0).values.flip(0)
    stops = torch.minimum(breaks, lines.last_tensor[lines.owner] + 1)
    begins = ((start > threshold) & within).nonzero()[:, 0]
    ends = ((end > threshold) & within).nonzero()[:, 0]
    lowest = torch.searchsorted(ends, begins)
    counts = torch.searchsorted(ends, stops[begins]) - lowest
    first = begins.repeat_interleave(counts)
    last = ends[
        (lowest - counts.cumsum(0) + counts).repeat_interleave(counts) + torch.arange(len(first), device=device)
    ]
    score = torch.minimum(torch.minimum(start[first], end[last]), _least(inside, first, last))
    line = lines.owner[first]
    owner, base = prompts[line], lines.starts_tensor[line]
    label = line - marks.of_labels.starts_tensor[owner]
    words = marks.of_words.starts_tensor[owner]
    # As the reference: by first word, then by label, then by last word.
    order = torch.argsort(first - base + words, stable=True)
    first, last = first - base + words, last - base + words
    return _answer(first[order], last[order], label[order], score[order], owner[order], marks)


def _least(values: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The least of values[first : last + 1], of each pair: that of two runs of a power of 2, which may overlap."""
    level = (last - first + 1).to(torch.float64).log2().floor().long()
    tables = [values]
    for power in range(int(level.max()) if len(level) else 0):
        before = tables[-1]
        step = 2**power
        tables.append(torch.cat((torch.minimum(before[:-step], before[step:]), before[-step:])))
    table = torch.stack(tables)
    return torch.minimum(table[level, first], table[level, last + 1 - 2**level])


def _answer(first: Tensor, last: Tensor, label: Tensor, score: Tensor, owner: Tensor, marks: PackedMarks) -> Rows:
    """Found spans as rows. first, last: words of the pack. owner: the prompt of each, ascending."""
    base = marks.of_words.starts_tensor[owner]
    values = torch.stack([part.float() for part in (first - base, last - base, label, score)], dim=1)
    counts = torch.bincount(owner, minlength=len(marks.of_words))
    return Rows(values, Segments(counts.tolist(), score.device), label)


def _most_numbers(values: Tensor) -> int:
    return _MAX_NUMBERS_ON_CPU if values.device.type == "cpu" else _MAX_NUMBERS


def _marks_of(rows: Rows) -> PackedMarks:
    assert rows.marks is not None, "prompts without labels"
    return rows.marks


def _on(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
