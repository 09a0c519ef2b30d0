"""Tokenizer: texts and pairs to token ids in batches, cut to their limits, and ids back to texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models

from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.files import Folder
from poolhouse.inputs.limits import (
    CHARACTERS_PER_TOKEN,
    SURPLUS,
    Excerpt,
    Limit,
    excerpt,
    too_many_characters,
    too_many_tokens,
)
from poolhouse.inputs.offsets import offsets_of
from poolhouse.inputs.pairs import Encode, Template, encode_pairs, longest_first, longest_first_of_python
from poolhouse.inputs.prompts import Prompt, check_ids, is_unicode
from poolhouse.inputs.python_tokenizers import PythonEncoding, PythonTokenizer
from poolhouse.inputs.template_pairs import RenderedPairs
from poolhouse.inputs.tokenizer_files import ReadTokenizer, read_tokenizer
from poolhouse.packing.tokens import Ids, ShortTexts, Tokens

_Encoding = tokenizers.Encoding | PythonEncoding


@dataclass(frozen=True, slots=True, eq=False)
class Words:
    """The tokens of a text that is split into words. numbers: [tokens], the word of each, rising."""

    ids: Ids
    numbers: Ids


class Tokenizer:
    """The tokenizer of a checkpoint; safe from several threads at once.

    read: the content of its files, or just a tokenizer of the tokenizers library.
    lower_case: lower-case texts first (sentence-transformers' do_lower_case).
    vocabulary_size: larger ids are refused, and this one too.
    model_types: rows of the model's table of token types; None where it is not known.
    one_separator: two texts are joined by what ends one of them, whatever the tokenizer puts between two.
    by_characters: a text may also have no more characters than its limit of tokens times the median length of a
    vocabulary entry, as in model2vec.
    """

    def __init__(
        self,
        read: ReadTokenizer | tokenizers.Tokenizer,
        lower_case: bool = False,
        vocabulary_size: int | None = None,
        model_types: int | None = None,
        one_separator: bool = False,
        by_characters: bool = False,
    ) -> None:
        if isinstance(read, tokenizers.Tokenizer):
            read = ReadTokenizer(read)
        native = read.native
        native.no_padding()
        native.no_truncation()
        self.truncation_side = read.truncation_side
        self.notes = read.notes
        self._native = native
        self._shorten = longest_first_of_python if isinstance(native, PythonTokenizer) else longest_first
        self._lower_case = lower_case
        self._types = 1 if read.hides_types else model_types
        self._one_separator = one_separator
        self.vocabulary_size = vocabulary_size or native.get_vocab_size()
        self.decoder = Decoder(native, read.clean_up, self.vocabulary_size)
        # Characters for each token that a text may have; None: any.
        self._characters = int(np.median(list(map(len, native.get_vocab())))) if by_characters else None
        self._check_texts = native.get_vocab_size() > self.vocabulary_size
        # Special tokens before and after the content: [CLS] ... [SEP].
        self._template = self._typed(Template.of(native, 1))
        self._head, self._tail = len(self._template.head), len(self._template.tail)
        self._prefix_tokens: dict[tuple[str, bool], int] = {}

    @classmethod
    def from_folder(
        cls,
        folder: Path | Folder,
        *,
        lower_case: bool = False,
        trust_remote_code: bool = False,
        vocabulary_size: int | None = None,
        model_types: int | None = None,
        one_separator: bool = False,
        by_characters: bool = False,
    ) -> Tokenizer:
        """The tokenizer in a folder: tokenizer.json, or older files converted by transformers.

        Raises:
            CheckpointError: no tokenizer, or one that cannot be read.
        """
        read = read_tokenizer(Folder.of(folder), trust_remote_code)
        return cls(read, lower_case, vocabulary_size, model_types, one_separator, by_characters)

    @property
    def special_tokens(self) -> int:
        """How many special tokens a text gets."""
        return self._head + self._tail

    @property
    def special_ends(self) -> tuple[int, int]:
        """How many special tokens stand before a text, and how many behind it."""
        return self._head, self._tail

    @cached_property
    def character_bound(self) -> int:
        """Characters of the longest vocabulary entry: no token has more."""
        return max(map(len, self._native.get_vocab()), default=1)

    @cached_property
    def _marks_words(self) -> bool:
        """Whether tokens inside a word are marked as such, as in WordPiece."""
        return bool(getattr(self._native.model, "continuing_subword_prefix", None))

    @cached_property
    def unknown(self) -> int | None:
        """The id of the unknown token, if there is one."""
        names = (getattr(self._native.model, "unk_token", None), "<unk>", "[UNK]")
        return next((found for name in names if name and (found := self._native.token_to_id(name)) is not None), None)

    @cached_property
    def pair_templates(self) -> tuple[Template, Template]:
        """How two texts are joined, without special tokens and with them."""
        plain, whole = (self._typed(Template.of(self._native, 2, special)) for special in (False, True))
        return plain, self._template.of_pairs() if self._one_separator else whole

    def _typed(self, template: Template) -> Template:
        """The template with the token types that the model was trained with: none where it has no table of them."""
        fits = self._types is None or template.highest_type < self._types
        return template if fits else template.without_types()

    def encode(self, prompts: Sequence[Prompt], limits: Sequence[Limit]) -> list[Tokens | InvalidRequest]:
        """Tokens of each prompt, or an error for it alone; texts go to the library together."""
        if all(prompt.pair is None for prompt in prompts):
            return self._encode_single(prompts, limits)
        groups: dict[Encode, list[int]] = {}
        for index, prompt in enumerate(prompts):
            if prompt.pair is None:
                encode = self._encode_single
            else:
                encode = self._encode_pairs if prompt.template is None else self._encode_rendered
            groups.setdefault(encode, []).append(index)
        results: dict[int, Tokens | InvalidRequest] = {}
        for encode_group, own in groups.items():
            tokens = encode_group([prompts[index] for index in own], [limits[index] for index in own])
            results.update(zip(own, tokens, strict=True))
        return [results[index] for index in range(len(prompts))]

    def encode_short(self, texts: Sequence[str], limit: Limit) -> ShortTexts | None:
        """Those of many texts that need no early cut and no error, if there are any.

        Raises:
            InvalidRequest: a limit that cannot be, or an id out of the vocabulary.
        """
        keep = limit.cut
        most = min(limit.max_tokens, (limit.max_uncut_tokens or limit.max_tokens) if keep is None else keep)
        if limit.max_query_tokens is not None or limit.offsets or self._lower(limit) is not None:
            return None
        longest = CHARACTERS_PER_TOKEN * (most + SURPLUS) if self._characters is None else self._characters * most
        tried = [place for place, text in enumerate(texts) if len(text) <= longest]
        encoded = self._encode([texts[place] for place in tried], limit.add_special_tokens, offsets=False)
        places, listed, originals = list[int](), list[list[int]](), list[int]()
        for place, encoding in zip(tried, encoded, strict=True):
            if isinstance(encoding, InvalidRequest) or (len(own := encoding.ids) > most and most != keep):
                continue
            places.append(place)
            originals.append(len(own))
            if len(own) > most:
                own = [own[index] for index in self._kept_indices(len(own), most, limit.side, limit.add_special_tokens)]
            listed.append(own)
        if not places:
            return None
        lengths = list(map(len, listed))
        ids = np.fromiter(chain.from_iterable(listed), np.int64, sum(lengths))
        if self._check_texts:
            check_ids(ids, self.vocabulary_size)
        return ShortTexts(places, ids, lengths, originals)

    def _encode_pairs(self, prompts: Sequence[Prompt], limits: Sequence[Limit]) -> list[Tokens | InvalidRequest]:
        """`encode` for pairs that the tokenizer joins."""
        return encode_pairs(self._encode_single, self.pair_templates, self._shorten, prompts, limits)

    def _encode_rendered(self, prompts: Sequence[Prompt], limits: Sequence[Limit]) -> list[Tokens | InvalidRequest]:
        """`encode` for pairs that a template joins."""
        return self.rendered.encode(prompts, limits)

    def _encode_single(self, prompts: Sequence[Prompt], limits: Sequence[Limit]) -> list[Tokens | InvalidRequest]:
        """`encode` for prompts of one text, or of token ids."""
        results: dict[int, Tokens | InvalidRequest] = {}
        excerpts: dict[int, Excerpt] = {}
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            try:
                if prompt.ids is not None:
                    results[index] = self._of_ids(prompt.ids, limit)
                else:
                    excerpts[index] = self._excerpt(prompt, self._single_limit(limit))
            except InvalidRequest as error:
                results[index] = error
        # One call of the library for all texts with the same options.
        groups: dict[tuple[bool, bool], list[int]] = {}
        for index in excerpts:
            groups.setdefault((limits[index].add_special_tokens, limits[index].offsets), []).append(index)
        for (special, offsets), indices in groups.items():
            encoded = self._encode([excerpts[index].text for index in indices], special, offsets)
            for index, encoding in zip(indices, encoded, strict=True):
                try:
                    limit = self._single_limit(limits[index])
                    results[index] = self._within_limit(prompts[index], limit, excerpts[index], encoding)
                except InvalidRequest as error:
                    results[index] = error
        return [results[index] for index in range(len(prompts))]

    def words(self, texts: Sequence[Sequence[str]]) -> list[Words | InvalidRequest]:
        """The tokens of texts that are split into words, without special tokens; each word is read by itself.

        Raises:
            CheckpointError: a tokenizer that is run in Python, which knows no words.
        """
        if isinstance(self._native, PythonTokenizer):
            raise CheckpointError("Texts are read by words here, which needs a tokenizer.json.")
        try:
            encoded = self._native.encode_batch(list(texts), is_pretokenized=True, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 - one bad text fails the whole call, with any exception of the library
            if len(texts) == 1:
                return [_untokenised(error, " ".join(texts[0]))]
            return [result for text in texts for result in self.words([text])]
        results: list[Words | InvalidRequest] = []
        for encoding in encoded:
            ids: Ids = np.array(encoding.ids, dtype=np.int64)
            if self._check_texts:
                check_ids(ids, self.vocabulary_size)
            results.append(Words(ids, np.array(encoding.word_ids, dtype=np.int64)))
        return results

    @property
    def special_around(self) -> tuple[Ids, Ids]:
        """The special tokens before a text, and those behind it."""
        return self._template.head, self._template.tail

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry; None where there is none."""
        found: int | None = self._native.token_to_id(token)
        return found

    @cached_property
    def rendered(self) -> RenderedPairs:
        """The same tokenizer for pairs that are joined by a template."""
        special = self._template.head, self._template.tail
        known = self.vocabulary_size if self._check_texts else None
        return RenderedPairs(self._native, self._ids, special, self._lower_case, self._lowered, known)

    def _single_limit(self, limit: Limit) -> Limit:
        """The limit of a single text: max_query_tokens, which counts no special tokens, becomes part of `keep`."""
        if limit.max_query_tokens is None:
            return limit
        keep, max_tokens = limit.cut, limit.max_query_tokens + (self.special_tokens if limit.add_special_tokens else 0)
        if keep is not None:
            return replace(limit, keep=min(keep, max_tokens))
        if limit.max_uncut_tokens is not None and max_tokens > limit.max_uncut_tokens:
            return limit
        return replace(limit, keep=max_tokens)

    def _encode(self, texts: list[str], special: bool, offsets: bool) -> list[_Encoding | InvalidRequest]:
        # The fast call returns no offsets.
        encode = self._native.encode_batch if offsets else self._native.encode_batch_fast
        try:
            return list(encode(texts, add_special_tokens=special))
        except Exception as error:  # noqa: BLE001 - one bad text fails the whole call, with any exception of the library
            if len(texts) == 1:
                return [_untokenised(error, texts[0])]
            return [result for text in texts for result in self._encode([text], special, offsets)]

    def _ids(self, texts: list[str], special: bool) -> list[Ids | InvalidRequest]:
        return [
            encoding if isinstance(encoding, InvalidRequest) else np.array(encoding.ids, dtype=np.int64)
            for encoding in self._encode(texts, special, offsets=False)
        ]

    def _of_ids(self, ids: Ids, limit: Limit) -> Tokens:
        """Token ids of the caller, cut at one end; special tokens are not told apart."""
        check_ids(ids, self.vocabulary_size)
        if limit.offsets:
            raise InvalidRequest("Character offsets need a text; token ids have none.", "prompt_token_ids")
        keep = limit.cut
        if keep is None and limit.max_uncut_tokens is not None and len(ids) > limit.max_uncut_tokens:
            raise too_many_tokens(limit.max_uncut_tokens, len(ids))
        if keep is None or len(ids) <= keep:
            return Tokens(ids, original_tokens=len(ids))
        return Tokens(ids[:keep] if limit.side == "right" else ids[-keep:], original_tokens=len(ids))

    def _excerpt(self, prompt: Prompt, limit: Limit) -> Excerpt:
        """What is tokenised of the text: the early cut of `poolhouse.inputs.limits`."""
        assert prompt.text is not None
        text = prompt.prefix + prompt.text if prompt.prefix else prompt.text
        keep = limit.cut
        wanted = limit.max_uncut_tokens if keep is None else keep
        if wanted is None:
            return excerpt(text, None, limit.side, self._lower(limit))
        if self._characters is not None:
            most = wanted * self._characters
            if keep is None and len(text) > most:
                raise too_many_characters(wanted, len(text), most)
            return excerpt(text, most, limit.side, self._lower(limit), exactly=True)
        if keep is None and len(text) > 4 * CHARACTERS_PER_TOKEN * wanted:
            max_characters = wanted * self.character_bound
            if len(text) > max_characters:
                raise too_many_characters(wanted, len(text), max_characters)
        return excerpt(text, CHARACTERS_PER_TOKEN * (wanted + SURPLUS), limit.side, self._lower(limit))

    def _lower(self, limit: Limit) -> Callable[[str], str] | None:
        """Lower-cases a text, where the request or else the model wants that."""
        wanted = self._lower_case if limit.lower_case is None else limit.lower_case
        return self._lowered if wanted else None

    def _lowered(self, text: str) -> str:
        """The text in lower case, except for special tokens in it, as with transformers' normalizer."""
        if self._case_sensitive is None:
            return text.lower()
        # Odd parts are the special tokens.
        parts = self._case_sensitive.split(text)
        return "".join(part if index % 2 else part.lower() for index, part in enumerate(parts))

    @cached_property
    def _case_sensitive(self) -> re.Pattern[str] | None:
        """Finds the special tokens that lower case would change."""
        added = self._native.get_added_tokens_decoder().values()
        names = [token.content for token in added if token.special and token.content != token.content.lower()]
        pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        return re.compile(f"({pattern})") if pattern else None

    def _within_limit(
        self, prompt: Prompt, limit: Limit, part: Excerpt, encoding: _Encoding | InvalidRequest
    ) -> Tokens:
        """Tokens within the limit.

        Raises:
            InvalidRequest: a text that cannot be tokenised, or is too long and may not be cut.
        """
        if isinstance(encoding, InvalidRequest):
            raise encoding
        keep, special = limit.cut, limit.add_special_tokens
        part, encoding = self._long_enough(prompt, limit, part, encoding)
        ids: Ids = np.array(encoding.ids, dtype=np.int64)
        if self._check_texts:
            check_ids(ids, self.vocabulary_size)
        offsets = offsets_of(encoding, part, prompt, self._marks_words, self.unknown) if limit.offsets else None
        skip = self._skip(prompt.prefix, special, self._lower(limit)) if prompt.prefix else 0
        if keep is None:
            if limit.max_uncut_tokens is not None and len(ids) > limit.max_uncut_tokens:
                raise too_many_tokens(limit.max_uncut_tokens, len(ids))
            return Tokens(ids, self._single_types(ids, special), original_tokens=len(ids), skip=skip, offsets=offsets)
        if len(ids) <= keep and not part.shortened:
            return Tokens(ids, self._single_types(ids, special), original_tokens=len(ids), skip=skip, offsets=offsets)
        original = len(ids)
        if part.shortened:
            original = max(round(len(ids) * part.whole / max(len(part.raw), 1)), min(keep, len(ids)) + 1)
        kept = self._kept_indices(len(ids), keep, limit.side, special)
        types = self._single_types(ids, special)
        return Tokens(
            ids[kept],
            None if types is None else types[kept],
            original_tokens=original,
            original_is_estimate=part.shortened,
            skip=min(skip, keep) if limit.side == "right" else max(0, skip - (len(ids) - keep)),
            offsets=None if offsets is None else offsets.take(kept),
        )

    def _single_types(self, ids: Ids, special: bool) -> Ids | None:
        """Token types of a single text; None where all are 0, as in nearly all models."""
        template = self._template
        return template.types(len(ids) - self.special_tokens) if special and template.highest_type else None

    def _long_enough(
        self, prompt: Prompt, limit: Limit, part: Excerpt, encoding: _Encoding
    ) -> tuple[Excerpt, _Encoding]:
        """An excerpt with `SURPLUS` tokens beyond those that are kept: this one, or a longer one."""
        wanted = (limit.cut or limit.max_uncut_tokens or 0) + SURPLUS
        while part.shortened and self._characters is None and len(encoding.ids) < wanted:
            if len(part.raw) > 2 * wanted * self.character_bound:
                break  # a word too long for the vocabulary: its rest belongs to the same unknown token
            text = prompt.prefix + (prompt.text or "")
            part = excerpt(text, 4 * len(part.raw), limit.side, self._lower(limit))
            (again,) = self._encode([part.text], limit.add_special_tokens, limit.offsets)
            if isinstance(again, InvalidRequest):
                raise again
            encoding = again
        return part, encoding

    def _kept_indices(self, length: int, keep: int, side: str, special: bool) -> Ids:
        """Which of so many tokens are kept: the special ones at both ends, and as many others as there is room for."""
        tokens = np.arange(length)
        if length <= keep:
            return tokens
        head, tail = (self._head, self._tail) if special else (0, 0)
        room = keep - head - tail
        if room < 1:
            raise InvalidRequest(
                f"truncate_prompt_tokens={keep} leaves no room beside the {head + tail} special tokens of each text.",
                "truncate_prompt_tokens",
                keep,
            )
        end = length - tail
        content = tokens[head : head + room] if side == "right" else tokens[end - room : end]
        return np.concatenate((tokens[:head], content, tokens[end:]))

    def _skip(self, prefix: str, special: bool, lower: Callable[[str], str] | None) -> int:
        """Leading tokens of a prefix, special ones included, counted as sentence-transformers does."""
        key = (prefix if lower is None else lower(prefix), special)
        if key not in self._prefix_tokens:
            ids = self._native.encode(key[0], add_special_tokens=special).ids
            self._prefix_tokens[key] = len(ids) - (1 if special and self._tail else 0)
        return self._prefix_tokens[key]


def _untokenised(error: Exception, text: str) -> InvalidRequest:
    """What is wrong with a text that the library does not take."""
    why = str(error) if is_unicode(text) else "it is no valid Unicode."
    return InvalidRequest(f"The text cannot be tokenised: {why}", "prompt")


# The replacements of transformers' clean_up_tokenization_spaces, in its order.
_CLEANER = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")),
    *((" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


class Decoder:
    """Token ids back to texts.

    clean_up: remove spaces before punctuation, where the tokenizer's config wants it; not for BPE, whose spaces are
    tokens, as in transformers. vocabulary_size: larger ids are refused, and this one too.
    """

    def __init__(self, native: tokenizers.Tokenizer | PythonTokenizer, clean_up: bool, vocabulary_size: int) -> None:
        self._native = native
        self._cleans = clean_up and not isinstance(native.model, models.BPE)
        self._vocabulary_size = vocabulary_size

    def text(self, ids: Sequence[int] | Ids, skip_special_tokens: bool = False) -> str:
        """The text of ids.

        Raises:
            InvalidRequest: an id out of the vocabulary.
        """
        text = self._native.decode(self._checked(ids), skip_special_tokens=skip_special_tokens)
        for found, cleaner in _CLEANER if self._cleans else ():
            text = text.replace(found, cleaner)
        return text

    def strings(self, ids: Sequence[int] | Ids) -> list[str]:
        """The vocabulary entry of each id; "" for an id of the model without an entry.

        Raises:
            InvalidRequest: an id out of the vocabulary.
        """
        return [self._native.id_to_token(token) or "" for token in self._checked(ids)]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens."""
        return frozenset(token for token, added in self._native.get_added_tokens_decoder().items() if added.special)

    def _checked(self, ids: Sequence[int] | Ids) -> list[int]:
        try:
            checked: list[int] = (found := np.asarray(ids, dtype=np.int64)).tolist()
        except OverflowError:
            raise InvalidRequest("A token id is out of vocabulary", "tokens") from None
        check_ids(found, self._vocabulary_size, "tokens")
        return checked
