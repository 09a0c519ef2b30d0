"""Labels: what a request looks for in its text, and how models read a text together with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.prompts import is_unicode
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Tokens

# Names, or names with descriptions.
LabelSet = Sequence[str] | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of one request, and what counts as found.

    names: each once. descriptions: one for each name ("" for none), or none at all.
    threshold: what is found has a higher score, from 0 to 1. flat: what is found does not overlap; else one part may lie
    within another. multi_label: the same part may have several labels.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...] = ()
    threshold: float = 0.5
    flat: bool = True
    multi_label: bool = False


class LabelledTokens(Protocol):
    """Makes the prompts of one model; safe from several threads at once."""

    def encode(
        self, texts: Sequence[str], labels: Sequence[Labels], limits: Sequence[Limit]
    ) -> list[Tokens | InvalidRequest]:
        """The tokens of each text and its labels, with marks, or an error for it alone."""
        ...

    def windows(self, tokens: Tokens) -> Sequence[Tokens]:
        """The prompts in which a text is read that was encoded whole, each with the same labels; one where it fits."""
        ...


class ReadsLabels(Protocol):
    """How a model reads texts with labels, as its files say.

    describes: whether it reads descriptions of labels. windows: whether a text over the limit is read in windows where
    the request says nothing of its length.
    """

    @property
    def describes(self) -> bool: ...

    @property
    def windows(self) -> bool: ...

    def tokens(self, tokenizer: Tokenizer, max_tokens: int) -> LabelledTokens:
        """What makes its prompts.

        Raises:
            CheckpointError: the tokenizer lacks a token that marks labels.
        """
        ...


def label_sets(labels: object, texts: int) -> Sequence[LabelSet]:
    """The labels of each of so many texts: the same for all, or a list of lists, one for each.

    Raises:
        InvalidRequest: naming the field.
    """
    if isinstance(labels, str):
        raise InvalidRequest(f"labels must be a list of names, got one text: [{labels!r}] is a list of one.", "labels")
    if isinstance(labels, Mapping):
        return [labels] * texts
    if not isinstance(labels, Iterable):
        raise InvalidRequest(f"labels must be a list of names, got {type(labels).__name__}.", "labels")
    listed = list(labels)
    if not listed or isinstance(listed[0], str) or not isinstance(listed[0], Iterable):
        return [listed] * texts
    if len(listed) != texts:
        raise InvalidRequest(
            f"labels has {len(listed)} lists for {texts} texts; give one list of names, or one per text.", "labels"
        )
    return [
        own if isinstance(own, Mapping | str) else list(own) if isinstance(own, Iterable) else own for own in listed
    ]


def labels_of(
    labels: object, texts: int, threshold: object = 0.5, flat: object = True, multi_label: object = False
) -> list[Labels]:
    """The labels of each of so many texts; of all that share a set they are one object.

    Raises:
        InvalidRequest: as `label_sets` and `parse_labels`.
    """
    return each_set(labels, texts, lambda own, path: parse_labels(own, threshold, flat, multi_label, path))


def each_set(labels: object, texts: int, parse: Callable[[LabelSet, str], Labels]) -> list[Labels]:
    """What `parse` makes of the labels of each text and their path; one value for all that share a set.

    Raises:
        InvalidRequest: as `label_sets` and `parse`.
    """
    sets = label_sets(labels, texts)
    if all(own is sets[0] for own in sets):
        return [parse(sets[0], "labels")] * texts if sets else []
    return [parse(own, f"labels[{index}]") for index, own in enumerate(sets)]


def parse_labels(
    labels: object,
    threshold: object = 0.5,
    flat: object = True,
    multi_label: object = False,
    path: str = "labels",
) -> Labels:
    """The labels of one request. labels: names, or names with descriptions; a name that comes again is left out.

    Raises:
        InvalidRequest: naming the field that is wrong, and what is possible.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise InvalidRequest(f"threshold must be a number from 0 to 1, got {threshold!r}.", "threshold", threshold)
    for name, value in (("flat", flat), ("multi_label", multi_label)):
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} must be true or false, got {value!r}.", name, value)
    if isinstance(labels, str) or not isinstance(labels, Iterable):
        raise InvalidRequest(f"{path} must be a list of names, got {type(labels).__name__}.", path)
    described = labels if isinstance(labels, Mapping) else {}
    names = tuple(dict.fromkeys(_text(name, f"{path}[{index}]") for index, name in enumerate(labels)))
    if not names:
        raise InvalidRequest(f"{path} is empty; name at least one label.", path)
    descriptions = tuple(_text(described[name] or "", f"{path}[{name!r}]", True) for name in names if described)
    return Labels(names, descriptions if any(descriptions) else (), float(threshold), bool(flat), bool(multi_label))


def _text(value: object, path: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{path} must be a text, got {type(value).__name__}.", path)
    if not is_unicode(value):
        raise InvalidRequest(f"{path} is no valid Unicode.", path)
    if not may_be_empty and not value.strip():
        raise InvalidRequest(f"{path} is empty; a label needs a name.", path)
    return value
