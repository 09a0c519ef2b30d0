"""Tokenizer: the vocabulary in a GGUF header as the tokenizer of the checkpoint that it was made from.

Three models are known by llama.cpp's names: bert (WordPiece), t5 (XLM-RoBERTa's pieces) and gpt2 (byte-level BPE, split
as `tokenizer.ggml.pre` says). Source: llama.cpp's converter, and the tokenizers that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from poolhouse.errors import CheckpointError

# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4
_SPACE = "\u2581"
_BLANK = "tokenizer.ggml."
# How Qwen 2 and Llama 3 split texts; they differ in how many digits make a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Split:
    """How a byte-level BPE splits texts, and what it puts around them where the header does not say.

    regex: of words; None for GPT-2's. composed: texts are made NFC first. whole: words that are tokens stay whole.
    ends: whether there is a token at each end. separators: behind the first text of a pair.
    """

    regex: str | None = None
    composed: bool = False
    whole: bool = False
    ends: bool = False
    separators: int = 1


_SPLITS = {
    "qwen2": _Split(_WORDS % "", composed=True),
    "llama-bpe": _Split(_WORDS % "{1,3}", whole=True),
    "gpt-2": _Split(),
    "roberta-bpe": _Split(ends=True, separators=2),
    "modern-bert": _Split(composed=True, ends=True),
}


@dataclass(frozen=True, slots=True)
class MadeTokenizer:
    """A tokenizer, its special tokens that have a name (bos_token ...), and a sentence about what was assumed."""

    tokenizer: Tokenizer
    named: Mapping[str, str]
    note: str


def make_tokenizer(path: Path, fields: Mapping[str, Any]) -> MadeTokenizer:
    """The tokenizer of a header. path: of the file, for messages.

    Raises:
        CheckpointError: a kind that is not known, or parts that are missing or do not fit together.
    """
    header = _Header(path, fields)
    model = header.needed("model")
    if model not in _MODELS:
        header.fail(f"the tokenizer is of the model {model!r}; {', '.join(_MODELS)} are read.", _BESIDE)
    try:
        tokenizer, note = _MODELS[str(model)](header)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises whatever it likes
        raise CheckpointError(f"{path}: the tokenizer of the header does not fit together: {error}") from error
    tokenizer.add_special_tokens(header.added(special=True))
    tokenizer.add_tokens(header.added(special=False))
    encoded = tokenizer.encode("x")
    words = (token if word is None else "..." for token, word in zip(encoded.tokens, encoded.word_ids, strict=True))
    return MadeTokenizer(tokenizer, header.named, f"{note} Texts become {' '.join(dict.fromkeys(words))}.")


_BESIDE = "Put the model's own tokenizer.json beside the file; it is used then."


class _Header:
    """The keys of a header that are about the tokenizer."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self._path = path
        self._fields = fields
        self.tokens: list[str] = self.needed("tokens")
        self.types = self.needed("token_type")
        if not isinstance(self.tokens, list) or not isinstance(self.types, np.ndarray):
            self.fail("tokenizer.ggml.tokens and .token_type must be lists.")
        if len(self.types) != len(self.tokens):
            self.fail(f"it has {len(self.tokens)} tokens, and types of {len(self.types)}.")
        numbers = {name: self.get(key) for name, key in _NAMED.items()}
        # As in llama.cpp, a number behind the end of the vocabulary is none.
        self.named = {
            f"{name}_token": self.tokens[number]
            for name, number in numbers.items()
            if number is not None and number < len(self.tokens)
        }

    def fail(self, message: str, also: str = "") -> NoReturn:
        raise CheckpointError(f"{self._path}: {message} {also}".rstrip())

    def get(self, key: str) -> Any:
        return self._fields.get(_BLANK + key)

    def needed(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            self.fail(f"the header lacks {_BLANK}{key}.", _BESIDE)
        return value

    def id_of(self, *keys: str, default: int | None = None) -> int | None:
        """The id under the first of these keys that is there."""
        number = next((value for key in keys if (value := self.get(key)) is not None), default)
        if number is not None and not (isinstance(number, int) and 0 <= number < len(self.tokens)):
            self.fail(f"{_BLANK}{keys[0]} is {number!r}, and there are {len(self.tokens)} tokens.")
        return number

    def end(self, *keys: str, default: int | None = None) -> int:
        """The id of a token that every text gets."""
        number = self.id_of(*keys, default=default)
        if number is None:
            self.fail(f"the header lacks {_BLANK}{keys[0]}.", _BESIDE)
        return number

    def of_type(self, kind: int) -> list[int]:
        return [int(number) for number in np.flatnonzero(self.types == kind)]

    def added(self, special: bool) -> list[AddedToken]:
        """Tokens that are found in texts before these are split."""
        numbers = sorted(self.of_type(_CONTROL) + self.of_type(_UNKNOWN)) if special else self.of_type(_USER)
        mask, of_words = self.named.get("mask_token"), self.get("model") == "bert"
        texts = [self.tokens[number] for number in numbers]
        if of_words and not special:
            texts = [_without_mark(text) for text in texts]
        return [
            AddedToken(text, special=special, normalized=of_words and not special, lstrip=text == mask and not of_words)
            for text in texts
            if text
        ]

    def around(
        self, head: int | None, tail: int | None, separators: int = 1, types: bool = False
    ) -> processors.PostProcessor:
        """The special tokens of a text and of a pair. types: the second text of a pair has a type of its own."""
        ends = [(self.tokens[number], number) for number in dict.fromkeys((head, tail)) if number is not None]
        # A name may hold what the words of a template mean, so they are written as lists.
        first = [] if head is None else [self.tokens[head]]
        last = [] if tail is None else [self.tokens[tail]]
        second = ":1" if types else ""
        middle = last * separators if tail is not None else first
        return processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *middle, f"$B{second}", *(f"{token}{second}" for token in last)],
            special_tokens=ends,
        )


_NAMED = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}


def _without_mark(token: str) -> str:
    """A token of WordPiece as vocab.txt has it; there, words begin plainly, and what goes on with a word by ##."""
    return token[1:] if token.startswith(_SPACE) else f"##{token}"


def _wordpiece(header: _Header) -> tuple[Tokenizer, str]:
    tokens, types = header.tokens, header.types
    # Ids that llama.cpp takes where a header names none are those of the first BERT.
    unknown, first, last = (
        header.end("unknown_token_id", default=100),
        header.end("cls_token_id", "bos_token_id", default=101),
        header.end("seperator_token_id", "eos_token_id", default=102),
    )
    whole = {unknown, first, last, *header.of_type(_CONTROL), *header.of_type(_UNKNOWN)}
    if any(token.startswith(2 * _SPACE) and len(token) > 2 for token in tokens):
        header.fail("its WordPiece was made of a sentencepiece vocabulary, whose merges are lost.", _BESIDE)
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(tokens):
        text = token if number in whole else _without_mark(token)
        if text in vocabulary:
            header.fail(f"the tokens {vocabulary[text]} and {number} are both {text!r}.", _BESIDE)
        vocabulary[text] = number
    lower, why = header.get("normalizer.lowercase"), "as the header says"
    if not isinstance(lower, bool):
        capital = any(
            token[:1] == _SPACE and token[1:2] != token[1:2].lower()
            for token, kind in zip(tokens, types, strict=True)
            if kind == _NORMAL
        )
        lower, why = not capital, f"since {'some' if capital else 'no'} words of its vocabulary begin with a capital"
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=tokens[unknown]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lower, strip_accents=header.get("normalizer.strip_accents")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = header.around(first, last, types=True)
    return tokenizer, f"The tokenizer is a WordPiece, {'lower-cased' if lower else 'cased'}, {why}."


def _unigram(header: _Header) -> tuple[Tokenizer, str]:
    scores, characters = header.needed("scores"), header.get("precompiled_charsmap")
    if not isinstance(scores, np.ndarray) or len(scores) != len(header.tokens):
        header.fail(f"it has {len(header.tokens)} tokens, and not as many scores.")
    if header.get("add_space_prefix") is False:
        header.fail("add_space_prefix is false, which XLM-RoBERTa's pieces do not know.", _BESIDE)
    unknown = header.id_of("unknown_token_id", default=next(iter(header.of_type(_UNKNOWN)), None))
    pieces = list(zip(header.tokens, scores.astype(float).tolist(), strict=True))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    if characters is not None:
        tokenizer.normalizer = normalizers.Precompiled(np.asarray(characters).astype(np.uint8).tobytes())
    spaces = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.post_processor = header.around(*_ends(header, True), separators=2)
    return tokenizer, "The tokenizer is that of XLM-RoBERTa, with the pieces of the header."


def _byte_level(header: _Header) -> tuple[Tokenizer, str]:
    name = header.needed("pre")
    if name not in _SPLITS:
        header.fail(f"texts are split as {name!r} ({_BLANK}pre); {', '.join(_SPLITS)} are known.", _BESIDE)
    split = _SPLITS[str(name)]
    # Bytes that stand for blanks are no blanks here, so the first blank behind a letter parts the two.
    merges = [(text[: (at := text.find(" ", 1))], text[at + 1 :]) for text in header.needed("merges")]
    vocabulary = {token: number for number, token in enumerate(header.tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole))
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.regex is None)
    words = [] if split.regex is None else [pre_tokenizers.Split(Regex(split.regex), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words, in_bytes]) if words else in_bytes
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = header.around(*_ends(header, split.ends), separators=split.separators)
    return tokenizer, f"The tokenizer is a byte-level BPE that splits texts as {name!r}."


def _ends(header: _Header, default: bool) -> tuple[int | None, int | None]:
    """The tokens before and behind a text. default: whether there are some where the header does not say."""

    def wanted(key: str) -> bool:
        value = header.get(key)
        return default if value is None else bool(value)

    head = header.end("bos_token_id", "cls_token_id") if wanted("add_bos_token") else None
    return head, header.end("eos_token_id", "seperator_token_id") if wanted("add_eos_token") else None


_MODELS: dict[str, Callable[[_Header], tuple[Tokenizer, str]]] = {
    "bert": _wordpiece,
    "t5": _unigram,
    "gpt2": _byte_level,
}
