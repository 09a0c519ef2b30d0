"""Golden values: published numbers of well-known checkpoints, which `poolhouse check` compares with what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolhouse.llm import LLM

# Published numbers were computed in half precision and rounded; both in the score's own unit and relative.
_RELATIVE, _ABSOLUTE = 0.01, 1e-3


@dataclass(frozen=True, slots=True)
class Golden:
    """A published number: the score of two texts in a mode, or the sparse weight of a token of one.

    token: its id. mode: see `poolhouse.combined.MODES`.
    """

    value: float
    text: str
    other: str = ""
    mode: str = ""
    token: int | None = None

    @property
    def words(self) -> str:
        if self.token is not None:
            return f"sparse weight of token {self.token} in {self.text!r}"
        return f"{self.mode} score of {self.text!r} and {self.other[:24]!r}"


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison found, in words, whether it is as close as rounding allows, and with what."""

    words: str
    close: bool
    reference: str = "published numbers"


_M3, _BM25 = "What is BGE M3?", "Definition of BM25"
_ABOUT_M3 = "BGE M3 is an embedding model supporting dense retrieval, lexical matching and multi-vector interaction."
_ABOUT_BM25 = (
    "BM25 is a bag-of-words retrieval function that ranks a set of documents based on the query terms appearing in "
    "each document"
)

# By hub id. BGE-M3: its model card, and vLLM's test of the same texts.
GOLDEN: Mapping[str, tuple[Golden, ...]] = {
    "BAAI/bge-m3": (
        Golden(0.6259, _M3, _ABOUT_M3, "dense"),
        Golden(0.3474, _M3, _ABOUT_BM25, "dense"),
        Golden(0.3309, _BM25, _ABOUT_M3, "dense"),
        Golden(0.6734, _BM25, _ABOUT_BM25, "dense"),
        Golden(0.19555, _M3, _ABOUT_M3, "sparse"),
        Golden(0.0, _M3, _BM25, "sparse"),
        Golden(0.7797, _M3, _ABOUT_M3, "colbert"),
        Golden(0.4620, _M3, _ABOUT_BM25, "colbert"),
        Golden(0.26711, "Hi", token=2673),
    )
}


def golden_values(model: str | None, path: str) -> tuple[Golden, ...]:
    """Those of a checkpoint; none for a checkpoint without.

    model: a hub id or a folder. path: the folder; of a hub's cache it tells the id.
    """
    places = {place.removeprefix("models--").replace("--", "/", 1) for place in PurePath(path).parts}
    return next((values for name, values in GOLDEN.items() if model == name or name in places), ())


def measure(llm: LLM, values: Sequence[Golden]) -> list[float]:
    """What the model computes for each."""
    return [_measured(llm, value) for value in values]


def compare(values: Sequence[Golden], measured: Sequence[float]) -> Compared:
    """How far the numbers are from the published ones, and which of them too far."""
    gaps = [abs(got - golden.value) for golden, got in zip(values, measured, strict=True)]
    far = [
        f"{golden.words} is {got:.5f}, published as {golden.value}"
        for golden, got, gap in zip(values, measured, gaps, strict=True)
        # Written so that NaN is far.
        if not gap <= max(_ABSOLUTE, _RELATIVE * abs(golden.value))
    ]
    words = f"Against {len(values)} published numbers: largest difference {max(gaps):.1e}."
    return Compared(" ".join([words, *(f"{one}." for one in far)]), not far)


def _measured(llm: LLM, golden: Golden) -> float:
    if golden.token is not None:
        (output,) = llm.embed_sparse(golden.text, use_tqdm=False)
        return output.outputs.as_dict().get(golden.token, 0.0)
    (pair,) = llm.score(golden.text, golden.other, mode=golden.mode, use_tqdm=False)
    return pair.outputs.score
