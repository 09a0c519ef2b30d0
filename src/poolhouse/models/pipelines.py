"""Pipelines: what a loaded model answers, by task, and the names of its labels.

Per field the first that says something wins: the user's PoolerConfig, sentence-transformers' files, the model's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.files import Folder
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.files.module_steps import read_steps
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles
from poolhouse.models.heads.heads import LoadedHead
from poolhouse.models.heads.pruning import LoadedPruner, Pruner
from poolhouse.models.model import Served
from poolhouse.models.plan import LoadPlan
from poolhouse.params import PoolerConfig
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.pooling.splade import KeepLargest, Saturate, SparseEncoder, SpladePooling, VocabularyWeights
from poolhouse.pooling.steps import (
    Activation,
    Dense,
    Every,
    Kept,
    Norm,
    Normalize,
    OfPictures,
    Probabilities,
    Reduce,
    Step,
    StepTags,
    TanhInt8,
    Truncate,
    Unit,
    WithoutEnds,
    WithoutToken,
    classifier_activation,
    probabilities,
    stated_activation,
)
from poolhouse.tasks import SparseHead, Task


def pipelines_of(plan: LoadPlan, served: Served) -> dict[Task, Pipeline]:
    """Vectors, labels, or both, as the model's head and files have it.

    Raises:
        CheckpointError, ConfigError: files or options that the model does not honour.
    """
    head, files, user, config = served.head, plan.files, plan.options.pooler, plan.config
    if plan.pruner is not None and served.pruner is not None:
        return pruner_pipelines(plan.pruner, served.pruner, user)
    if plan.role in ("classify", "token_classify") and head is not None:
        return classify_pipelines(head, config, files.activation, user, plan.options.score_compat == "files")
    if plan.role == "splade" and head is not None:
        if files.splade is None:
            return splade_pipelines(head.steps, head.labels, SpladePooling(), user)
        if files.heads:
            behind = ", ".join(step.description for step in read_steps(files.heads))
            raise CheckpointError(f"{plan.weights}: modules behind SpladePooling are not served ({behind}).")
        return splade_pipelines(head.steps, head.labels, files.splade, user, files.max_active_dims, files.normalize)
    sizes = served.sizes
    pipelines = embed_pipelines(sizes.hidden_size, user, files, plan.default_pooling or served.pooling)
    if plan.pictures is not None and plan.pictures.of_pictures:
        marks = OfPictures(config.get("vision_start_token_id", 151652), config.get("vision_end_token_id", 151653))
        embed = pipelines["embed"]
        pipelines["embed"] = replace(embed, steps=(marks, *embed.steps))
    if served.pools_itself:
        _check_no_pooling(plan)
        del pipelines["token_embed"]
    if head is not None:
        pipelines |= classify_pipelines(head, {}, None, user)
    return pipelines | _bge_m3_pipelines(plan.weights, sizes.hidden_size, sizes.vocabulary_size, config, user)


def _check_no_pooling(plan: LoadPlan) -> None:
    """Refuse a pooling of what has been pooled.

    Raises:
        ConfigError: the user's. CheckpointError: that of sentence-transformers' files.
    """
    if plan.options.pooler.seq_pooling_type is not None:
        raise ConfigError("pooler_config: this model makes one vector of each text itself; leave the pooling out.")
    if plan.files.pooling is not None:
        raise CheckpointError(
            f"{plan.weights}: a Pooling of token vectors behind a model that makes one vector of each text."
        )


def labels_of(plan: LoadPlan, served: Served) -> tuple[dict[int, str], tuple[str, ...]]:
    """The names of a classifier's labels, and a note where the config names another number of them."""
    head = served.head
    if head is None or plan.role not in ("classify", "token_classify"):
        return {}, ()
    names = {int(index): str(name) for index, name in (plan.config.get("id2label") or {}).items()}
    if names and len(names) != head.labels:
        return {}, (f"The config names {len(names)} labels, but the head has {head.labels}: they are left unnamed.",)
    return names, ()


def about_activation(plan: LoadPlan, served: Served) -> tuple[str, ...]:
    """A note where a classifier's files state another activation than vLLM's order of precedence gives."""
    literal = plan.options.score_compat == "files"
    if literal or served.head is None or plan.role not in ("classify", "token_classify"):
        return ()
    from_files, labels = plan.files.activation, served.head.labels
    used = classifier_activation(plan.config, labels, from_files)
    try:
        stated = stated_activation(plan.config, from_files)
    except CheckpointError as error:
        # problem_type decides, so that it is never run.
        return (f"Not used: {error}",)
    if stated is None or stated.name == used.name:
        return ()
    note = (
        f"The files state {stated.name} as the activation over the logits; {used.name} is used, by vLLM's order of "
        "precedence (problem_type first, then sigmoid of one label and softmax of several). score_compat='files' takes "
        "the files' word."
    )
    return (note,)


def refuse_steps(user: PoolerConfig) -> None:
    """Raise ConfigError for STEP pooling, of a model without labels for tokens."""
    if user.tok_pooling_type == "STEP":
        raise ConfigError("pooler_config: STEP pooling belongs to token_classify, which this model does not offer.")


def embed_pipelines(
    hidden_size: int, user: PoolerConfig, files: SentenceTransformersFiles, default_pooling: str
) -> dict[Task, Pipeline]:
    """`embed` (one vector per prompt) and `token_embed` (one per token, through the same heads).

    hidden_size: features of a hidden state. default_pooling: a name of REDUCTIONS, for models that come without files.

    Raises:
        ConfigError: a pooling that these tasks do not have. CheckpointError: a head of another width than its input.
    """
    refuse_steps(user)
    reduce, from_files = _reduction(user, files, default_pooling)
    heads = read_steps(files.heads)
    before = _before(files)
    use_activation = user.use_activation
    if use_activation is None:
        use_activation = files.normalize if from_files else True
    tail = (Truncate(), Normalize(use_activation))
    hidden_size = _width(hidden_size, before)
    width = _width(hidden_size * len(reduce.names), heads)
    sparse = SparseHead("embed", "feature", width) if heads and isinstance(heads[-1], SparseEncoder) else None
    pipelines: dict[Task, Pipeline] = {"embed": Pipeline((*before, reduce, *heads, *tail), width, sparse)}
    # A head for concatenated poolings does not fit single token vectors.
    token_heads, token_width = (heads, width) if len(reduce.names) == 1 else ((), hidden_size)
    # Token vectors are normalised unless the user says otherwise, as in vLLM.
    token_tail = (Truncate(), Normalize(user.use_activation is not False))
    pipelines["token_embed"] = Pipeline((*(before or (Every(),)), *token_heads, *token_tail), token_width)
    return pipelines


def classify_pipelines(
    loaded: LoadedHead, config: Config, activation: str | None, user: PoolerConfig, literal: bool = False
) -> dict[Task, Pipeline]:
    """`classify` (one row of labels per prompt) where the head pools, and `token_classify` (one per token).

    activation: from logits to probabilities, as sentence-transformers' files state it. literal: it is taken as stated.

    Raises:
        ConfigError: a pooling that the model does not have.
    """
    head, steps = loaded.head, loaded.steps
    stated = stated_activation(config, activation) if literal else None
    tail = Probabilities(
        stated or classifier_activation(config, loaded.labels, activation),
        head.use_activation if user.use_activation is None else user.use_activation,
        head.mean if user.logit_mean is None else user.logit_mean,
        user.logit_sigma,
    )
    pipelines: dict[Task, Pipeline] = {}
    if head.pooling is not None:
        wanted = head.pooling if head.fixed or user.seq_pooling_type is None else user.seq_pooling_type
        reduce = Reduce(tuple(wanted.split("+")))
        if len(reduce.names) > 1:
            raise ConfigError(f"pooler_config: {wanted} concatenates poolings, but the classifier was made for one.")
        whole = (Every(), *steps, reduce) if head.late else (reduce, *steps)
        pipelines["classify"] = Pipeline((*whole, tail), loaded.labels)
    if head.tokens:
        kept = _kept_steps(user, head.step_tag_id, loaded.labels, loaded.columns)
        pipelines["token_classify"] = Pipeline((Every(), *steps, *kept, tail), loaded.labels)
    return pipelines


def pruner_pipelines(pruner: Pruner, loaded: LoadedPruner, user: PoolerConfig) -> dict[Task, Pipeline]:
    """`classify`, the score of a pair, and `token_classify`, [drop, keep] for each token."""
    refuse_steps(user)
    score, keep = loaded.score, loaded.keep
    reduce = Reduce((score.head.pooling or "CLS",))
    # The mean is one of rows behind the norm.
    first = (reduce, *loaded.norm) if reduce.names == ("CLS",) else (Every(), *loaded.norm, reduce)
    activates = not pruner.raw if user.use_activation is None else user.use_activation
    of_pair = Probabilities(probabilities(1), activates, user.logit_mean, user.logit_sigma)
    of_tokens = Probabilities(probabilities(2), user.use_activation is not False)
    return {
        "classify": Pipeline((*first, *score.steps, of_pair), 1),
        "token_classify": Pipeline((Every(), *keep.steps, of_tokens), 2),
    }


def splade_pipelines(
    steps: tuple[Step, ...],
    vocabulary: int,
    pooling: SpladePooling,
    user: PoolerConfig,
    count: int | None = None,
    unit: bool = False,
) -> dict[Task, Pipeline]:
    """`embed`: a dense vector of vocabulary size per prompt; `token_embed`: one per token. Not normalised by default.

    steps: from a hidden state to logits, a Dense last; none where the rows are logits already.
    count: how many weights a prompt keeps; None keeps all. unit: whether they are normalised by default.
    """
    decoder = steps[-1] if steps else None
    assert decoder is None or isinstance(decoder, Dense)
    tail = (Truncate(), Normalize(unit if user.use_activation is None else user.use_activation))
    sparse = SparseHead("embed", "vocabulary", vocabulary)
    weights = (VocabularyWeights(decoder, pooling), *(() if count is None else (KeepLargest(count),)))
    return {
        "embed": Pipeline((Every(), *steps[:-1], *weights, *tail), vocabulary, sparse),
        "token_embed": Pipeline((Every(), *steps, Saturate(pooling.logarithms), *tail), vocabulary),
    }


def late_interaction_pipelines(
    heads: tuple[Step, ...], hidden_size: int, unit: bool, user: PoolerConfig
) -> dict[Task, Pipeline]:
    """`token_embed` of a late-interaction model. unit: whether vectors have unit length unless the user says otherwise.

    Raises:
        CheckpointError: a projection of another width than its input.
    """
    if user.use_activation is not None:
        unit = user.use_activation
    width = _width(hidden_size, heads)
    return {"token_embed": Pipeline((Kept(), Every(), *heads, Truncate(), Normalize(unit)), width)}


def _before(files: SentenceTransformersFiles) -> tuple[Step, ...]:
    """Steps of every token before pooling; () where hidden states are pooled as they are."""
    if not files.before and files.dropped is None:
        return ()
    dropped = () if files.dropped is None else (WithoutToken(files.dropped),)
    return (*dropped, Every(), *read_steps(files.before))


def _kept_steps(
    user: PoolerConfig, step_tag_id: int | None, labels: int, columns: tuple[int, ...] | None
) -> tuple[StepTags, ...]:
    """STEP pooling where the user or the model asks for it.

    Raises:
        ConfigError: STEP without saying which rows or columns, or columns that are not there.
    """
    if user.tok_pooling_type == "ALL" or (user.tok_pooling_type is None and step_tag_id is None):
        return ()
    tag = step_tag_id if user.step_tag_id is None else user.step_tag_id
    kept = None if columns is not None else user.returned_token_ids
    if tag is None and kept is None:
        raise ConfigError("pooler_config: STEP pooling needs step_tag_id, returned_token_ids, or both.")
    named = columns or tuple(range(labels))
    if not set(kept or ()) <= set(named):
        raise ConfigError(f"pooler_config: returned_token_ids {list(kept or ())} are not all among {list(named)}.")
    return (StepTags(tag, named, kept),)


def _reduction(user: PoolerConfig, files: SentenceTransformersFiles, default_pooling: str) -> tuple[Reduce, bool]:
    """The reduction, and whether sentence-transformers' files describe the pooling."""
    described = files.pooling is not None or files.pooled
    if user.seq_pooling_type is not None:
        return Reduce(tuple(user.seq_pooling_type.split("+")), files.include_prompt), described
    if files.pooling is not None:
        return Reduce(files.pooling, files.include_prompt), True
    return Reduce((default_pooling,), files.include_prompt), described


def _width(width: int, heads: tuple[Step, ...]) -> int:
    """The width after the heads, each checked against what comes in."""
    for head in heads:
        if isinstance(head, Dense):
            if head.weight.shape[1] != width:
                raise CheckpointError(
                    f"A Dense module takes {head.weight.shape[1]} features, but {width} come in from the step before."
                )
            width = head.weight.shape[0]
        elif isinstance(head, SparseEncoder):
            if head.weight.shape[1] != width:
                raise CheckpointError(
                    f"A SparseAutoEncoder takes {head.weight.shape[1]} features, but {width} come in."
                )
            width = head.weight.shape[0]
        elif isinstance(head, Norm) and head.weight.shape[0] != width:
            raise CheckpointError(f"A LayerNorm takes {head.weight.shape[0]} features, but {width} come in.")
        assert isinstance(head, Dense | Norm | Unit | SparseEncoder | Every | WithoutToken | TanhInt8)
    return width


_SPARSE, _MULTI_VECTOR = "sparse_linear.pt", "colbert_linear.pt"
_RELU = Activation("relu", torch.relu)


def _bge_m3_pipelines(
    folder: Folder,
    hidden_size: int,
    vocabulary_size: int,
    config: Config,
    user: PoolerConfig,
) -> dict[Task, Pipeline]:
    """BGE-M3's `token_embed` (unit vectors, none for BOS) and `token_classify` (a weight per token, none for BOS and EOS).

    Source: Chen et al. 2024, BGE M3-Embedding (arXiv 2402.03216), and its authors' FlagEmbedding.
    folder: where the two layers lie; without them nothing is answered, but that its own architecture needs them.

    Raises:
        CheckpointError: one of the two is missing or does not fit.
    """
    present = [name for name in (_SPARSE, _MULTI_VECTOR) if folder.has(name)]
    if not present and architecture(config) != "BgeM3EmbeddingModel":
        return {}
    bos, eos = config.get("bos_token_id", 0), config.get("eos_token_id", 2)
    sparse, vectors = (_bge_m3_linear(folder.path / name, hidden_size) for name in (_SPARSE, _MULTI_VECTOR))
    unit = user.use_activation is not False
    special = frozenset((bos, eos, config.get("pad_token_id", 1)))
    return {
        "token_embed": Pipeline(
            (Every(), WithoutEnds(bos, None), vectors, Truncate(), Normalize(unit)), vectors.weight.shape[0]
        ),
        "token_classify": Pipeline(
            (Every(), WithoutEnds(bos, eos), sparse, Probabilities(_RELU, unit)),
            sparse.weight.shape[0],
            SparseHead("token_classify", "token", vocabulary_size, (bos, eos), special),
        ),
    }


def _bge_m3_linear(path: Path, hidden_size: int) -> Dense:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}, which BGE-M3's sparse and multi-vector answers need.")
    try:
        tensors: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        weight, bias = tensors["weight"].float(), tensors.get("bias")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as one linear layer: {error}") from error
    if weight.shape[-1] != hidden_size:
        raise CheckpointError(f"{path} takes {weight.shape[-1]} features, but hidden states have {hidden_size}.")
    return Dense(weight, None if bias is None else bias.float())
