"""Zero-shot classification: labels that come with the request, and how answers become a probability of each.

| model | what it is asked |
|---|---|
| reads labels with a text (GLiClass) | a text and all its labels at once |
| has a label "entailment" (natural language inference) | of each label, whether the text entails "This example is {label}." |

Offline callers wait for the answers of a plan, the server awaits them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from poolhouse.engine.interface import EngineFacts, PoolingEngine
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.labels import Labels, each_set, parse_labels
from poolhouse.inputs.prompts import Prompt
from poolhouse.outputs import Array

DEFAULT_TEMPLATE = "This example is {}."
_PLACE = "{}"


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """How labels are compared.

    multi_label: each is true or false by itself; otherwise one of them is true. use_activation: whether answers are
    probabilities, or logits. hypothesis_template: a text with {} for the label, of models of entailment.
    """

    multi_label: bool = False
    use_activation: bool = True
    hypothesis_template: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """What a text's labels are worth. array: [labels], in the order given. answers: that it comes from."""

    array: Array
    labels: tuple[str, ...]
    answers: tuple[Answer, ...]

    @property
    def label(self) -> str:
        """The best of them."""
        return self.labels[int(self.array.argmax())]


@dataclass(frozen=True, slots=True, eq=False)
class LabelPlan:
    """What is asked of the model for each text, and what its answers become.

    labels: of each text. entailment: the numbers of the labels that say that a text follows and that it does not; None of
    a model that reads labels. template: of hypotheses.
    """

    labels: Sequence[Labels]
    use_activation: bool
    entailment: tuple[int, int] | None = None
    template: str = DEFAULT_TEMPLATE

    @property
    def total(self) -> int:
        """How many requests there are."""
        return sum(map(self._count, self.labels))

    def text_of(self, request: int) -> int:
        """The number of the text that a request is of."""
        return bisect_right([*itertools.accumulate(map(self._count, self.labels))], request)

    def requests(self, texts: Iterable[Request]) -> Iterator[Request]:
        """All requests, those of each text together. texts: a request for each, without labels."""
        for request, labels in zip(texts, self.labels, strict=True):
            if self.entailment is None:
                yield replace(request, labels=labels)
            else:
                yield from self._hypotheses(request, labels.names)

    def finish(self, answers: Iterable[Answer]) -> Iterator[Labelled]:
        """The labels of the texts, in order, by the answers to all requests."""
        rest = iter(answers)
        for labels, first in zip(self.labels, rest, strict=False):
            own = (first, *itertools.islice(rest, self._count(labels) - 1))
            yield Labelled(self._values(own, labels), labels.names, own)

    def _count(self, labels: Labels) -> int:
        return 1 if self.entailment is None else len(labels.names)

    def _hypotheses(self, request: Request, labels: Sequence[str]) -> Iterator[Request]:
        """Whether the text entails each label: a pair for each."""
        params = replace(request.params, use_activation=False)
        for label in labels:
            pair = replace(request.prompt, pair=self.template.replace(_PLACE, label))
            yield replace(request, prompt=pair, params=params, future=Future())

    def _values(self, answers: Sequence[Answer], labels: Labels) -> Array:
        # A softmax of one label would say nothing.
        independent = labels.multi_label or len(labels.names) == 1
        if self.entailment is None:
            logits = answers[0].array
        else:
            rows, (follows, contradicts) = np.stack([answer.array for answer in answers]), self.entailment
            logits = rows[:, follows] - rows[:, contradicts] if independent else rows[:, follows].copy()
        if not self.use_activation:
            return logits
        return _sigmoid(logits) if independent else _softmax(logits)


def plan(engine: PoolingEngine, labels: object, texts: int, options: LabelOptions) -> LabelPlan:
    """How a classifier classifies so many texts by labels.

    labels: names, or a list of names for each text.

    Raises:
        InvalidRequest: labels or options that mean nothing. UnsupportedTask: a model that has labels of its own.
    """
    sets = _parsed(labels, texts, options.multi_label)
    if engine.facts.reads_labels:
        if options.hypothesis_template is not None:
            raise InvalidRequest(
                "hypothesis_template is for models of entailment; this one reads the labels themselves.",
                "hypothesis_template",
            )
        return LabelPlan(sets, options.use_activation)
    entailment = _entailment(engine.facts.label_names)
    if any(own.descriptions for own in sets):
        raise InvalidRequest("labels: this model reads names alone; leave out their descriptions.", "labels")
    return LabelPlan(sets, options.use_activation, entailment, _template(options.hypothesis_template))


def takes_labels(facts: EngineFacts) -> bool:
    """Whether a request may bring the labels: the model reads them, or judges entailment."""
    return facts.reads_labels or ("classify" in facts.tasks and _of_entailment(facts.label_names) is not None)


def check_text(prompt: Prompt, path: str) -> None:
    """Raise InvalidRequest for a prompt that is no plain text."""
    if prompt.text is None or prompt.pair is not None or prompt.images:
        raise InvalidRequest(f"{path}: labels are for texts, not for token ids, pairs, messages or pictures.", path)


def _parsed(labels: object, texts: int, multi_label: bool) -> Sequence[Labels]:
    """The labels of each text.

    Raises:
        InvalidRequest: neither names nor lists of names as long as the texts are; or a name twice.
    """
    if isinstance(labels, set | frozenset):
        raise InvalidRequest("labels is a set, which has no order; give a list.", "labels")
    return each_set(labels, texts, lambda own, path: _names(own, multi_label, path))


def _names(labels: object, multi_label: bool, path: str) -> Labels:
    parsed = parse_labels(labels, multi_label=multi_label, path=path)
    given = list(labels) if isinstance(labels, Iterable) else []
    if len(given) > len(parsed.names):
        twice = next(name for index, name in enumerate(given) if name in given[:index])
        raise InvalidRequest(f"{path} has {twice!r} twice; give each label once.", path, twice)
    return parsed


def _entailment(names: Mapping[int, str]) -> tuple[int, int]:
    """The numbers of the labels that say that a text follows and that it does not.

    Raises:
        UnsupportedTask: a classifier with other labels.
    """
    found = _of_entailment(names)
    if found is None:
        raise UnsupportedTask(
            f"This classifier has labels of its own: {list(names.values()) or 'without names'}; leave labels out. "
            "Labels of a request are for models that read them (GLiClass), or with a label 'entailment'.",
            "labels",
        )
    return found


def _of_entailment(names: Mapping[int, str]) -> tuple[int, int] | None:
    """The same, None where there are none.

    As in transformers' pipeline, but that a label called contradiction is found by its name, wherever it stands.
    """
    lowered = {index: name.lower() for index, name in names.items()}
    follows = next((index for index, name in lowered.items() if name.startswith("entail")), None)
    if follows is None or len(names) < 2:
        return None
    last = 0 if follows else max(names)
    return follows, next((index for index, name in lowered.items() if name.startswith("contradict")), last)


def _template(template: str | None) -> str:
    if template is None:
        return DEFAULT_TEMPLATE
    if template.count(_PLACE) != 1:
        raise InvalidRequest(
            f"hypothesis_template must hold {_PLACE} once, where the label goes, got {template!r}.",
            "hypothesis_template",
            template,
        )
    return template


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max())
    shares: Array = weights / weights.sum()
    return shares


def _sigmoid(logits: Array) -> Array:
    # The exponential of a negative number does not overflow.
    small = np.exp(-np.abs(logits))
    chances: Array = np.where(logits >= 0, 1, small) / (1 + small)
    return chances
