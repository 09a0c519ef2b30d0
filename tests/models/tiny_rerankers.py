"""Tiny random language models with tokenizers, in the layouts of published rerankers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

# As Qwen splits texts: a line break belongs to the punctuation before it, which is where tokenising apart shows.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|embed_token|>", "<|rerank_token|>", "<bos>"]
WORDS = ["yes", "no", "Yes", "No"]
CORPUS = [
    "Given a query A and a passage B, determine whether the passage contains an answer to the query.",
    "What is the capital of France? Paris is the capital of France!\nBerlin is the capital of Germany.\n",
    "You are a search relevance expert. Judge whether the Document meets the requirements.\nquery: document: what?\n",
]
QUERIES = ["What is the capital of France?", "What is the capital of France?", "bears!\n", "who wrote it"]
DOCUMENTS = ["Paris is the capital of France.", "Berlin?", "The giant panda lives in China.\n\n", "x " * 40]

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 4096,
}


def tokenizer(bos: bool = False, template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer like Qwen's; with `bos`, one that puts <bos> before each text, like Gemma's."""
    native = tokenizers.Tokenizer(models.BPE())
    native.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    native.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=[*SPECIAL, *WORDS], show_progress=False
    )
    native.train_from_iterator(CORPUS * 3, trainer)
    native.add_special_tokens(SPECIAL)
    if bos:
        native.post_processor = processors.TemplateProcessing(
            single="<bos> $A",
            pair="<bos> $A <bos> $B",
            special_tokens=[("<bos>", native.token_to_id("<bos>"))],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=native,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        bos_token="<bos>" if bos else None,
        chat_template=template,
        model_max_length=4096,
    )


def save(
    folder: Path, family: str, *, bos: bool = False, template: str | None = None, **options: Any
) -> transformers.PreTrainedTokenizerFast:
    """A causal model with large random weights, and its tokenizer."""
    torch.manual_seed(0)
    own = tokenizer(bos, template)
    config = getattr(transformers, f"{family}Config")(**(TINY | {"vocab_size": len(own)} | options))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return own


def card(folder: Path, **fields: Any) -> None:
    """A README with front matter."""
    lines = [
        f"{name}:\n" + "".join(f"- {item}\n" for item in value) if isinstance(value, list) else f"{name}: {value}\n"
        for name, value in fields.items()
    ]
    (folder / "README.md").write_text("---\n" + "".join(lines) + "---\n# A model\n")


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits behind the last token, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]
