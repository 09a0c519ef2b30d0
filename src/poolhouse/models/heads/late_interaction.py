"""Late interaction as checkpoints describe it: the projection of token vectors, and the rules of queries and documents.

Sources: Stanford's ColBERT (`artifact.metadata`), PyLate and sentence-transformers' MultiVectorEncoder
(`config_sentence_transformers.json` and the modules' configs).
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder, JsonObject, special_tokens
from poolhouse.inputs.late_interaction import Expansion, LateInteraction, TextRules
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.files.module_steps import StoredStep, read_steps
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles
from poolhouse.pooling.steps import Dense, Step

# vLLM's names for late-interaction models; the first is what the hub's own files say.
ARCHITECTURES = ("HF_ColBERT", "ColBERTModernBertModel", "ColBERTJinaRobertaModel", "ColBERTLfm2Model", "ColBERTModel")

# Names of the projection where it lies among the model's tensors.
PROJECTIONS = ("linear", "colbert_linear")
# What training and savers put in front of it.
_WRAPPERS = ("", "model.", "base_model.model.", "base_model.model.model.", "vlm.")

_PUNCTUATION = tuple(string.punctuation)


@dataclass(frozen=True, slots=True)
class LateInteractionFiles:
    """What files say of late interaction.

    rules: None where texts are read alike for one vector and for many. heads: from a hidden state to the vector of a token; None where the projection lies among the model's own tensors.
    unit: whether vectors have unit length. dimensions: length of a projected vector as files state it.
    projections: names that the projection may have among the model's own tensors.
    """

    rules: LateInteraction | None
    heads: tuple[Step | StoredStep, ...] | None = None
    unit: bool = True
    dimensions: int | None = None
    projections: tuple[str, ...] = PROJECTIONS

    def read(self, tensors: Mapping[str, Tensor], config: Config, folder: Folder) -> tuple[Step, ...]:
        """The steps from a hidden state to the vector of a token. tensors: of the checkpoint in `folder`.

        Raises:
            CheckpointError: a projection that is missing or of another width than stated.
        """
        if self.heads is not None:
            return read_steps(self.heads)
        name = self.projection(tensors)
        if name is None:
            raise CheckpointError(
                f"{folder} has no projection, which {architecture(config)} needs; it is never made up. "
                f"Looked for {' and '.join(f'{module}.weight' for module in self.projections)} among its tensors, and for "
                "modules.json with a Dense module."
            )
        weight, bias = tensors[f"{name}.weight"].float(), tensors.get(f"{name}.bias")
        if weight.ndim != 2 or self.dimensions not in (None, weight.shape[0]):
            raise CheckpointError(
                f"{folder}: {name}.weight is {list(weight.shape)}, but its files state vectors of {self.dimensions}."
            )
        return (Dense(weight, None if bias is None else bias.float()),)

    def used(self, tensors: Mapping[str, Tensor]) -> frozenset[str]:
        """The names of the projection's tensors where they lie among the model's."""
        name = None if self.heads is not None else self.projection(tensors)
        return frozenset(part for part in (f"{name}.weight", f"{name}.bias") if part in tensors)

    def projection(self, tensors: Mapping[str, Tensor]) -> str | None:
        """The name of the projection among the model's tensors."""
        names = (f"{wrapper}{module}" for wrapper in _WRAPPERS for module in self.projections)
        return next((name for name in names if f"{name}.weight" in tensors), None)

    @property
    def fills_unseen(self) -> bool:
        """Whether queries are filled up with tokens that none attends to."""
        expansion = None if self.rules is None else self.rules.expansion
        return expansion is not None and not expansion.attended

    @property
    def longest_side(self) -> int | None:
        """Tokens of the longer side; None where one is limited by the model alone."""
        if self.rules is None:
            return None
        lengths = [side.length for side in (self.rules.query, self.rules.document) if side.length is not None]
        return max(lengths) if len(lengths) == 2 else None


def read_late_interaction(
    folder: Folder, weights: Folder, config: Config, files: SentenceTransformersFiles
) -> LateInteractionFiles | None:
    """What the files in `folder` say of late interaction; None where the model has none.

    weights: the folder of config.json. files: what sentence-transformers' files say.

    Raises:
        CheckpointError: no projection, or rules that are not understood.
    """
    if files.of_tokens:
        stated = folder.json("config_sentence_transformers.json", needed=False)
        mean = stated.get("similarity_fn_name") == "meanmaxsim"
        if stated.get("model_type") == "MultiVectorEncoder" and "query_prefix" not in stated:
            return LateInteractionFiles(_multi_vector(stated, weights, files, mean), files.heads, files.normalize)
        if not files.heads:
            raise CheckpointError(
                f"{folder / 'modules.json'} names no Dense module, the projection that late interaction needs; "
                "it is never made up."
            )
        return LateInteractionFiles(_pylate(stated, weights, mean), files.heads)
    if architecture(config) in ARCHITECTURES:
        return _stanford(weights)
    return None


def _stanford(folder: Folder) -> LateInteractionFiles:
    stated = folder.json("artifact.metadata", needed=False)
    if stated.get("similarity", "cosine") != "cosine":
        raise CheckpointError(f"artifact.metadata: similarity {stated['similarity']!r} is not supported; 'cosine' is.")
    rules = LateInteraction(
        query=TextRules(stated.get("query_token_id") or "[unused0]", stated.get("query_maxlen") or 32),
        document=TextRules(
            stated.get("doc_token_id") or "[unused1]",
            stated.get("doc_maxlen") or 220,
            _PUNCTUATION if stated.get("mask_punctuation", True) else (),
        ),
        expansion=Expansion(
            stated.get("query_maxlen") or 32, bool(stated.get("attend_to_mask_tokens")), _mask_tokens(folder)
        ),
    )
    return LateInteractionFiles(rules, dimensions=stated.get("dim"))


# What PyLate's older versions did not write.
_PYLATE_DEFAULTS: JsonObject = {
    "query_length": 32,
    "document_length": 180,
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "do_query_expansion": True,
    "attend_to_mask_tokens": False,
    "skiplist_words": _PUNCTUATION,
}


def _pylate(stated: JsonObject, folder: Folder, mean: bool) -> LateInteraction:
    rules = {**_PYLATE_DEFAULTS, **{name: value for name, value in stated.items() if value is not None}}
    expansion = None
    if rules["do_query_expansion"]:
        attended = bool(rules.get("attend_to_expansion_tokens", rules["attend_to_mask_tokens"]))
        expansion = Expansion(rules["query_length"], attended, _mask_tokens(folder))
    return LateInteraction(
        query=TextRules(rules["query_prefix"], rules["query_length"]),
        document=TextRules(rules["document_prefix"], rules["document_length"], tuple(rules["skiplist_words"])),
        expansion=expansion,
        mean=mean,
    )


def _multi_vector(stated: JsonObject, folder: Folder, files: SentenceTransformersFiles, mean: bool) -> LateInteraction:
    """sentence-transformers' rules; its markers are prompts, which stand in `files`."""
    transformer = {**stated, **files.transformer_folder.json("sentence_bert_config.json", needed=False)}
    query_length, expansion = transformer.get("query_length"), transformer.get("query_expansion")
    filled = None
    if expansion is not None:
        filled = _expansion(expansion, folder)
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


def _expansion(stated: JsonObject, folder: Folder) -> Expansion:
    length, strategy = stated.get("length"), stated.get("strategy")
    if strategy not in ("fixed", "min") or not isinstance(length, int) or length < 1:
        raise CheckpointError(f"query_expansion {dict(stated)} needs a strategy, 'fixed' or 'min', and a length.")
    token = stated.get("token")
    return Expansion(length, bool(stated.get("attend")), (token,) if token else _mask_tokens(folder))


def _mask_tokens(folder: Folder) -> tuple[str, ...]:
    """What queries are filled up with: the mask token, else that ends a text (decoders)."""
    tokens = special_tokens(folder)
    # Classes of tokenizers have mask tokens that their files need not name.
    names = (tokens.get("mask_token"), "[MASK]", "<mask>", tokens.get("eos_token"))
    return tuple(token for token in names if token)
