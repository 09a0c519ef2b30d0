"""Ids of tokens that a head is made of, by their words."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from poolhouse.errors import CheckpointError


def token_ids(folder: Path, words: tuple[str, ...]) -> tuple[int, ...]:
    """The id of each word in the tokenizer of `folder`.

    Raises:
        CheckpointError: no tokenizer.json, or a word that is not one token.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises whatever it likes
        raise CheckpointError(
            f"{path} is needed to find the tokens {list(words)}, and cannot be read: {error}"
        ) from error
    return tuple(_token_id(tokenizer, word) for word in words)


def _token_id(tokenizer: tokenizers.Tokenizer, word: str) -> int:
    known = tokenizer.token_to_id(word)
    if known is not None:
        return int(known)
    ids = tokenizer.encode(word, add_special_tokens=False).ids
    unknown = {tokenizer.token_to_id(token) for token in ("[UNK]", "<unk>")} - {None}
    if len(ids) == 1 and not unknown & set(ids):
        return int(ids[0])
    near = sorted(token for token in tokenizer.get_vocab() if word.lower() == token.lstrip("Ġ▁").lower())
    also = f" It has {near}." if near else ""
    raise CheckpointError(f"{word!r} is not one token of this tokenizer: it makes {len(ids)}, or an unknown one.{also}")
