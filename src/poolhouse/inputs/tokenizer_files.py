"""The files of a tokenizer, of every generation."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import normalizers

from poolhouse.errors import CheckpointError
from poolhouse.json_files import read_json


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> tokenizers.Tokenizer:
    """The tokenizer in a folder: tokenizer.json, or older files converted by transformers.

    Raises:
        CheckpointError: no tokenizer, or one that cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _converted(folder, trust_remote_code)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


# Tokenizer classes of transformers that keep token types to themselves, whatever tokenizer.json says.
_WITHOUT_TYPES = (
    *("Albert", "Barthez", "BigBird", "Camembert", "Cohere", "DistilBert", "GPT2", "GPTNeoX", "Gemma", "Herbert"),
    *("Llama", "Luke", "MBart", "MPNet", "Qwen2", "RemBert", "Roberta", "Splinter", "T5", "XLMRoberta"),
)


def gives_types(folder: Path) -> bool:
    """Whether models see token types of pairs, by tokenizer_config.json."""
    config = read_json(folder / "tokenizer_config.json", needed=False)
    names = config.get("model_input_names")
    if names is not None:
        return "token_type_ids" in names
    return not str(config.get("tokenizer_class", "")).startswith(_WITHOUT_TYPES)


def cleans_up(folder: Path) -> bool:
    """Whether the tokenizer's authors want spaces before punctuation taken away from decoded texts."""
    return read_json(folder / "tokenizer_config.json", needed=False).get("clean_up_tokenization_spaces") is True


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
    return read_json(folder / "tokenizer_config.json", needed=False).get("tokenizer_class") in (
        "InternLM2Tokenizer",
        "InternLM2TokenizerFast",
    )


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
