"""Late interaction as checkpoints describe it: the projection of token vectors, and the rules of both sides.

Sources: Stanford's ColBERT (`artifact.metadata`), PyLate and sentence-transformers' MultiVectorEncoder
(`config_sentence_transformers.json` and the modules' configs).
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolhouse.errors import CheckpointError
from poolhouse.files import read_json
from poolhouse.inputs.rules import Expansion, LateInteraction, TextRules
from poolhouse.models.files.checkpoint import Checkpoint, Config
from poolhouse.models.files.config import architecture
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles
from poolhouse.pooling.steps import Dense, Step

# vLLM's names for late-interaction models; the first is what the hub's own files say.
ARCHITECTURES = ("HF_ColBERT", "ColBERTModernBertModel", "ColBERTJinaRobertaModel", "ColBERTLfm2Model", "ColBERTModel")

# Names of the projection where it lies among the model's tensors.
PROJECTIONS = ("linear.weight", "colbert_linear.weight")

_PUNCTUATION = tuple(string.punctuation)


@dataclass(frozen=True, slots=True)
class Projected:
    """heads: from a hidden state to the vector of a token. unit: whether vectors have unit length.

    used: names of the tensors of the checkpoint that it took.
    """

    rules: LateInteraction
    heads: tuple[Step, ...]
    unit: bool = True
    used: frozenset[str] = frozenset()

    @property
    def fills_unseen(self) -> bool:
        """Whether queries are filled up with tokens that none attends to."""
        return self.rules.expansion is not None and not self.rules.expansion.attended

    @property
    def longest_side(self) -> int | None:
        """Tokens of the longer side; None where one is limited by the model alone."""
        lengths = [side.length for side in (self.rules.query, self.rules.document) if side.length is not None]
        return max(lengths) if len(lengths) == 2 else None


def read_late_interaction(
    folder: Path, checkpoint: Checkpoint, config: Config, files: SentenceTransformersFiles | None
) -> Projected | None:
    """What the files in `folder` say of late interaction; None where the model has none.

    files: what sentence-transformers' files there say.

    Raises:
        CheckpointError: a projection that is missing or of another width than stated, or rules that are not understood.
    """
    if files is not None and files.of_tokens:
        words = read_json(folder / "config_sentence_transformers.json", needed=False)
        mean = words.get("similarity_fn_name") == "meanmaxsim"
        if words.get("model_type") == "MultiVectorEncoder" and "query_prefix" not in words:
            return Projected(_multi_vector(words, checkpoint, files, mean), files.heads, files.normalize)
        if not files.heads:
            raise CheckpointError(
                f"{folder / 'modules.json'} names no Dense module, the projection that late interaction needs; "
                "it is never made up."
            )
        return Projected(_pylate(words, checkpoint, mean), files.heads)
    if architecture(config) in ARCHITECTURES:
        return _stanford(checkpoint, config)
    return None


def _stanford(checkpoint: Checkpoint, config: Config) -> Projected:
    words = read_json(checkpoint.folder / "artifact.metadata", needed=False)
    name = next((name for name in PROJECTIONS if name in checkpoint.tensors), None)
    if name is None:
        raise CheckpointError(
            f"{checkpoint.folder} has no projection, which {architecture(config)} needs; it is never made up. "
            f"Looked for {' and '.join(PROJECTIONS)} among its tensors, and for modules.json with a Dense module."
        )
    weight = checkpoint.tensors[name].float()
    stated = words.get("dim", weight.shape[0])
    if weight.ndim != 2 or weight.shape[0] != stated:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is {list(weight.shape)}, but artifact.metadata says dim {stated}."
        )
    if words.get("similarity", "cosine") != "cosine":
        raise CheckpointError(f"artifact.metadata: similarity {words['similarity']!r} is not supported; 'cosine' is.")
    rules = LateInteraction(
        query=TextRules(words.get("query_token_id") or "[unused0]", words.get("query_maxlen") or 32),
        document=TextRules(
            words.get("doc_token_id") or "[unused1]",
            words.get("doc_maxlen") or 220,
            _PUNCTUATION if words.get("mask_punctuation", True) else (),
        ),
        expansion=Expansion(
            words.get("query_maxlen") or 32, bool(words.get("attend_to_mask_tokens")), _mask_tokens(checkpoint.folder)
        ),
    )
    return Projected(rules, (Dense(weight),), used=frozenset({name}))


def _pylate(words: Mapping[str, Any], checkpoint: Checkpoint, mean: bool) -> LateInteraction:
    """PyLate's rules, with its defaults for what older versions did not write."""

    def stated(name: str, default: Any) -> Any:
        return default if words.get(name) is None else words[name]

    length, expansion = stated("query_length", 32), None
    if stated("do_query_expansion", True):
        attended = bool(stated("attend_to_expansion_tokens", stated("attend_to_mask_tokens", False)))
        expansion = Expansion(length, attended, _mask_tokens(checkpoint.folder))
    skipped = tuple(stated("skiplist_words", _PUNCTUATION))
    return LateInteraction(
        query=TextRules(stated("query_prefix", "[Q] "), length),
        document=TextRules(stated("document_prefix", "[D] "), stated("document_length", 180), skipped),
        expansion=expansion,
        mean=mean,
    )


def _multi_vector(
    words: Mapping[str, Any], checkpoint: Checkpoint, files: SentenceTransformersFiles, mean: bool
) -> LateInteraction:
    """sentence-transformers' rules; its markers are prompts, which stand in `files`."""
    transformer = {**words, **read_json(files.transformer_folder / "sentence_bert_config.json", needed=False)}
    query_length, expansion = transformer.get("query_length"), transformer.get("query_expansion")
    filled = None
    if expansion is not None:
        filled = _expansion(expansion, checkpoint.folder)
        if expansion["strategy"] == "fixed":
            query_length = filled.length
        elif query_length is not None:
            query_length = max(query_length, filled.length)
        if files.scored is None and not filled.attended:
            filled = None  # Nobody sees these tokens, and without a mask they get no vectors.
    scored = files.scored or {}
    skipped = tuple(scored.get("skiplist_words") or ())
    tasks = scored.get("skiplist_tasks") or ["document"]
    return LateInteraction(
        query=TextRules(length=query_length, skipped=skipped if "query" in tasks else ()),
        document=TextRules(
            length=transformer.get("document_length"),
            skipped=skipped if "document" in tasks else (),
            only=tuple(scored.get("keep_only_token_ids") or ()),
        ),
        expansion=filled,
        mean=mean,
    )


def _expansion(words: Mapping[str, Any], folder: Path) -> Expansion:
    length, strategy = words.get("length"), words.get("strategy")
    if strategy not in ("fixed", "min") or not isinstance(length, int) or length < 1:
        raise CheckpointError(f"query_expansion {dict(words)} needs a strategy, 'fixed' or 'min', and a length.")
    token = words.get("token")
    return Expansion(length, bool(words.get("attend")), (token,) if token else _mask_tokens(folder))


def _mask_tokens(folder: Path) -> tuple[str, ...]:
    """What queries are filled up with: the mask token, else that ends a text (decoders)."""
    words = {
        **read_json(folder / "special_tokens_map.json", needed=False),
        **read_json(folder / "tokenizer_config.json", needed=False),
    }
    mask, end = (_content(words.get(name)) for name in ("mask_token", "eos_token"))
    # Classes of tokenizers have mask tokens that their files need not name.
    return tuple(token for token in (mask, "[MASK]", "<mask>", end) if token)


def _content(token: Any) -> str | None:
    """The text of a special token, which files write as a word or as an object."""
    return token.get("content") if isinstance(token, Mapping) else token
