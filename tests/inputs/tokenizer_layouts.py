"""Tiny tokenizers of every class of transformers that can be built, as folders on the hub have them."""

from __future__ import annotations

import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

CORPUS = [
    "the moon falls under the water, and THE Moon rises",
    "bread and ships, and the songs of sailors!",
    "Größe naïve 東京 über alles café",
] * 20
SPECIAL = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    *("<|endoftext|>", "<bos>", "<eos>", "<cls>", "<sep>"),
)


@cache
def vocabulary(model: str) -> dict[str, Any]:
    """What a class builds its model from, by the kind of model."""
    if model == "WordPiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=[*SPECIAL], show_progress=False)
    elif model == "Unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        # <unk> stands where XLM-RoBERTa's class takes it for granted.
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.UnigramTrainer(
            vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[*SPECIAL],
            show_progress=False,
        )  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    described = json.loads(made.to_str())["model"]
    if model == "Unigram":
        return {"vocab": [tuple(entry) for entry in described["vocab"]]}
    if model == "WordPiece":
        return {"vocab": described["vocab"]}
    return {"vocab": described["vocab"], "merges": [tuple(merge) for merge in described["merges"]]}


def classes() -> dict[str, type]:
    """Classes with a backend of the tokenizers library, by name."""
    found = {}
    for name in sorted({name for name in TOKENIZER_MAPPING_NAMES.values() if name}):
        made = tokenizer_class_from_name(name)
        if made is not None and issubclass(made, transformers.TokenizersBackend) and made.model is not None:
            found[name] = made
    return found


def build(name: str, folder: Path, model_type: str | None = None) -> Any:
    """A tokenizer of a class, saved with the config.json of its model type."""
    kind = classes()[name]
    tokenizer = kind(**vocabulary(kind.model.__name__))
    tokenizer.save_pretrained(folder)
    registered = (key for key, value in TOKENIZER_MAPPING_NAMES.items() if value == name)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type or next(registered)}))
    return tokenizer


def known_keys() -> set[str]:
    """Keys of tokenizer_config.json that transformers reads, by its own code."""
    base, backend = transformers.PreTrainedTokenizerBase, transformers.TokenizersBackend
    code = (
        base.__init__,
        base.from_pretrained,
        base._from_pretrained,
        backend.__init__,
        backend.convert_to_native_format,
    )
    reads = r"""(?:kwargs|config)(?:\.(?:pop|get|setdefault)\(\s*|\[)["'](\w+)["']"""
    keys = {key for part in code for key in re.findall(reads, inspect.getsource(part))}
    keys |= set(base.SPECIAL_TOKENS_ATTRIBUTES)
    for kind in classes().values():
        keys |= set(inspect.signature(kind.__init__).parameters)
    return keys - {"self", "args", "kwargs"}
