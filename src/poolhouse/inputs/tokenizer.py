"""Tokenizer: texts to ids in batches, cut where asked, and honest about what was cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import normalizers

from poolhouse.errors import CheckpointError, InputTooLong, InvalidRequest
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.pairs import PairTemplate, encode_pairs
from poolhouse.inputs.prompts import Prompt, check_ids
from poolhouse.inputs.rendered import RenderedPairs
from poolhouse.tokens import Ids, Tokens

# A text is cut to about this many characters per token wanted before it is tokenised; more when that was too few.
_CHARACTERS_PER_TOKEN = 8
# Tokens that a shortened text must have beyond those kept, so that the cut cannot have changed the kept ones.
_SURPLUS = 32


@dataclass(frozen=True, slots=True)
class _Excerpt:
    """What is tokenised of a text: all of it, or the part that decides the tokens kept."""

    text: str
    whole: int

    @property
    def shortened(self) -> bool:
        return len(self.text) < self.whole


class Tokenizer:
    """The tokenizer of a checkpoint; safe from several threads at once.

    lower_case: lower-case texts first (sentence-transformers' do_lower_case).
    vocabulary_size: ids from here on are refused.
    pair_types: whether the second text of a pair gets token types of its own.
    """

    def __init__(
        self,
        native: tokenizers.Tokenizer,
        lower_case: bool = False,
        vocabulary_size: int | None = None,
        pair_types: bool = True,
    ) -> None:
        native.no_padding()
        native.no_truncation()
        self._native = native
        self._lower_case = lower_case
        self._pair_types = pair_types
        self.vocabulary_size = vocabulary_size or native.get_vocab_size()
        self._check_texts = native.get_vocab_size() > self.vocabulary_size
        special = native.encode("a").special_tokens_mask
        # Special tokens before and after the content: [CLS] ... [SEP].
        self._head = next((place for place, mask in enumerate(special) if not mask), len(special))
        self._tail = next((place for place, mask in enumerate(reversed(special)) if not mask), 0)
        self._prefix_tokens: dict[str, int] = {}

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        lower_case: bool = False,
        trust_remote_code: bool = False,
        vocabulary_size: int | None = None,
    ) -> Tokenizer:
        """The tokenizer in a folder: tokenizer.json, or older files converted by transformers.

        Raises:
            CheckpointError: no tokenizer, or one that cannot be read.
        """
        path = folder / "tokenizer.json"
        if path.is_file():
            try:
                native = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        else:
            native = _converted(folder, trust_remote_code)
        return cls(native, lower_case, vocabulary_size, _gives_types(folder))

    @property
    def special_tokens(self) -> int:
        """How many special tokens a text gets."""
        return self._head + self._tail

    @cached_property
    def character_bound(self) -> int:
        """Characters of the longest vocabulary entry: no token stands for more."""
        return max(map(len, self._native.get_vocab()), default=1)

    @cached_property
    def pair_template(self) -> PairTemplate:
        template = PairTemplate.of(self._native)
        return template if self._pair_types else replace(template, types=(0, 0, 0, 0, 0))

    def encode(self, prompts: Sequence[Prompt], limits: Sequence[Limit]) -> list[Tokens | InvalidRequest]:
        """Tokens of each prompt, or the error that it alone gets; texts go to the library together."""
        results: list[Tokens | InvalidRequest | None] = [None] * len(prompts)
        pairs = [index for index, prompt in enumerate(prompts) if prompt.pair is not None]
        for rendered in (False, True) if pairs else ():
            chosen = [index for index in pairs if (prompts[index].template is not None) is rendered]
            encode = self.rendered.encode if rendered else partial(encode_pairs, self.encode, self.pair_template)
            joined = encode([prompts[index] for index in chosen], [limits[index] for index in chosen])
            for index, tokens in zip(chosen, joined, strict=True):
                results[index] = tokens
        excerpts: dict[int, _Excerpt] = {}
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if prompt.pair is not None:
                continue
            try:
                if prompt.ids is not None:
                    results[index] = self._given(prompt.ids, limit)
                else:
                    excerpts[index] = self._excerpt(prompt, self._of_content(limit))
            except InvalidRequest as error:
                results[index] = error
        for special in (True, False):
            indexes = [index for index in excerpts if limits[index].add_special_tokens is special]
            encoded = self._encode([excerpts[index].text for index in indexes], special)
            for index, ids in zip(indexes, encoded, strict=True):
                try:
                    results[index] = self._fitted(prompts[index], self._of_content(limits[index]), excerpts[index], ids)
                except InvalidRequest as error:
                    results[index] = error
        return [result for result in results if result is not None]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each id."""
        return [self._native.id_to_token(int(token)) or "" for token in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        return self._native.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    @cached_property
    def rendered(self) -> RenderedPairs:
        """The same tokenizer for pairs that a template joins."""
        ids = np.array(self._native.encode("a").ids, dtype=np.int64)
        special = ids[: self._head], ids[len(ids) - self._tail :]
        known = self.vocabulary_size if self._check_texts else None
        return RenderedPairs(self._native, self._encode, special, self._lower_case, known)

    def _of_content(self, limit: Limit) -> Limit:
        """The limit of a single text, with what was asked of its content alone counted in."""
        if limit.max_query_tokens is None:
            return limit
        most = limit.max_query_tokens + (self.special_tokens if limit.add_special_tokens else 0)
        keep = limit.cut
        if keep is None:
            return limit if most > limit.max_tokens else replace(limit, keep=most)
        return replace(limit, keep=min(keep, most))

    def _encode(self, texts: list[str], special: bool) -> list[Ids | InvalidRequest]:
        if not texts:
            return []
        try:
            encodings = self._native.encode_batch_fast(texts, add_special_tokens=special)
        except Exception:  # noqa: BLE001 - one bad text fails the whole call, with whatever the library raises
            if len(texts) == 1:
                return [InvalidRequest("The text cannot be tokenised: it is no valid Unicode.", "prompt")]
            return [result for text in texts for result in self._encode([text], special)]
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def _given(self, ids: Ids, limit: Limit) -> Tokens:
        """Ids as the caller made them, cut plainly."""
        check_ids(ids, self.vocabulary_size)
        keep = limit.cut
        if keep is None and limit.most is not None and len(ids) > limit.most:
            raise _too_many_tokens(limit.most, len(ids))
        if keep is None or len(ids) <= keep:
            return Tokens(ids, original_tokens=len(ids))
        return Tokens(ids[:keep] if limit.side == "right" else ids[-keep:], original_tokens=len(ids))

    def _excerpt(self, prompt: Prompt, limit: Limit) -> _Excerpt:
        """The text to tokenise; of a text far over the limit, the part that matters."""
        assert prompt.text is not None
        text = prompt.prefix + prompt.text if prompt.prefix else prompt.text
        if self._lower_case:
            text = text.lower()
        keep = limit.cut
        if keep is None and limit.most is not None and len(text) > 4 * _CHARACTERS_PER_TOKEN * limit.most:
            most = limit.most * self.character_bound
            if len(text) > most:
                raise _too_many_characters(limit.most, len(text), most)
        if keep is None and limit.overflow == "chunk":
            return _Excerpt(text, len(text))
        return _shorten(text, (keep or limit.max_tokens) + _SURPLUS, limit.side)

    def _fitted(self, prompt: Prompt, limit: Limit, excerpt: _Excerpt, ids: Ids | InvalidRequest) -> Tokens:
        """Ids within the limit, or an error."""
        if isinstance(ids, InvalidRequest):
            raise ids
        keep, special = limit.cut, limit.add_special_tokens
        wanted = (keep or limit.max_tokens) + _SURPLUS
        while excerpt.shortened and len(ids) < wanted:
            if len(excerpt.text) > 2 * wanted * self.character_bound:
                break  # a word too long for the vocabulary: its rest would be the same unknown token
            excerpt = _shorten_to(prompt.prefix + (prompt.text or ""), 4 * len(excerpt.text), limit.side)
            if self._lower_case:
                excerpt = replace(excerpt, text=excerpt.text.lower())
            (again,) = self._encode([excerpt.text], special)
            if isinstance(again, InvalidRequest):
                raise again
            ids = again
        if self._check_texts:
            check_ids(ids, self.vocabulary_size)
        skip = self._skip(prompt.prefix, special) if prompt.prefix else 0
        if keep is None:
            if limit.most is not None and len(ids) > limit.most:
                raise _too_many_tokens(limit.most, len(ids))
            return Tokens(ids, original_tokens=len(ids), skip=skip)
        if len(ids) <= keep and not excerpt.shortened:
            return Tokens(ids, original_tokens=len(ids), skip=skip)
        original = len(ids)
        if excerpt.shortened:
            original = max(round(len(ids) * excerpt.whole / max(len(excerpt.text), 1)), keep + 1)
        return Tokens(
            self._cut(ids, keep, limit.side, special),
            original_tokens=original,
            original_is_estimate=excerpt.shortened,
            skip=min(skip, keep) if limit.side == "right" else max(0, skip - (len(ids) - keep)),
        )

    def _cut(self, ids: Ids, keep: int, side: str, special: bool) -> Ids:
        """At most `keep` ids, the special ones at both ends among them."""
        if len(ids) <= keep:
            return ids
        head, tail = (self._head, self._tail) if special else (0, 0)
        room = keep - head - tail
        if room < 1:
            raise InvalidRequest(
                f"truncate_prompt_tokens={keep} leaves no room beside the {head + tail} special tokens of each text.",
                "truncate_prompt_tokens",
                keep,
            )
        end = len(ids) - tail
        content = ids[head : head + room] if side == "right" else ids[end - room : end]
        return np.concatenate((ids[:head], content, ids[end:]))

    def _skip(self, prefix: str, special: bool) -> int:
        """Leading tokens that a prefix makes, special ones included, counted as sentence-transformers does."""
        if prefix not in self._prefix_tokens:
            text = prefix.lower() if self._lower_case else prefix
            ids = self._native.encode(text, add_special_tokens=special).ids
            self._prefix_tokens[prefix] = len(ids) - (1 if special and self._tail else 0)
        return self._prefix_tokens[prefix]


def _shorten(text: str, tokens: int, side: str) -> _Excerpt:
    return _shorten_to(text, _CHARACTERS_PER_TOKEN * tokens, side)


def _shorten_to(text: str, characters: int, side: str) -> _Excerpt:
    """At most about so many characters from one end, cut at white space where some is near."""
    if len(text) <= 2 * characters:
        return _Excerpt(text, len(text))
    if side == "right":
        space = text.rfind(" ", characters - 200, characters)
        return _Excerpt(text[: space if space > 0 else characters], len(text))
    start = len(text) - characters
    space = text.find(" ", start, start + 200)
    return _Excerpt(text[space if space > 0 else start :], len(text))


def _too_many_tokens(limit: int, found: int) -> InputTooLong:
    least = limit + 1
    return InputTooLong(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains at least {least} input "
        "tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt, "
        "or cut it with truncate_prompt_tokens=-1.",
        "input_tokens",
        found,
    )


def _too_many_characters(limit: int, found: int, most: int) -> InputTooLong:
    return InputTooLong(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains {found} characters "
        f"(more than {most} characters, which is the upper bound for {limit} input tokens). Please reduce the length of "
        "the input prompt, or cut it with truncate_prompt_tokens=-1.",
        "input_text",
        found,
    )


# Tokenizer classes of transformers that keep token types to themselves, whatever tokenizer.json says.
_WITHOUT_TYPES = (
    *("Albert", "Barthez", "BigBird", "Camembert", "Cohere", "DistilBert", "GPT2", "GPTNeoX", "Gemma", "Herbert"),
    *("Llama", "Luke", "MBart", "MPNet", "Qwen2", "RemBert", "Roberta", "Splinter", "T5", "XLMRoberta"),
)


def _gives_types(folder: Path) -> bool:
    """Whether models see token types of pairs, by tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = config.get("model_input_names")
    if names is not None:
        return "token_type_ids" in names
    return not str(config.get("tokenizer_class", "")).startswith(_WITHOUT_TYPES)


def _converted(folder: Path, trust_remote_code: bool) -> tokenizers.Tokenizer:
    """A tokenizer of older files (vocab.txt, sentencepiece models), through transformers."""
    names = (
        "vocab.txt",
        "vocab.json",
        "sentencepiece.bpe.model",
        "spiece.model",
        "spm.model",
        "tokenizer.model",
        "tokenizer_config.json",
    )
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder} has no tokenizer. Looked for tokenizer.json, {', '.join(names)}.")
    from transformers import AutoTokenizer

    try:
        if _names_internlm2(folder):
            return _internlm2(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        return tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:
        raise CheckpointError(
            f"{folder}: no tokenizer.json, and the older files cannot be converted: {error}"
        ) from error


def _names_internlm2(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config.get("tokenizer_class") in ("InternLM2Tokenizer", "InternLM2TokenizerFast")


def _internlm2(folder: Path) -> tokenizers.Tokenizer:
    """InternLM2's tokenizer, whose own class is code on the hub that transformers 5 does not run."""
    from sentencepiece import SentencePieceProcessor
    from transformers import TokenizersBackend

    made = TokenizersBackend.from_pretrained(folder, local_files_only=True)
    native = tokenizers.Tokenizer.from_str(made.backend_tokenizer.to_str())
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode("a", out_type=str)
    if pieces[0].startswith("▁"):
        # transformers leaves out the space that sentencepiece may put before a text.
        native.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), native.normalizer])
    return native
