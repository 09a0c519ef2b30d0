"""Checkpoint and config -> a pipeline per task.

Per field the first that says something wins: the user's PoolerConfig, sentence-transformers' files, the model's default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import dropwhile

import torch

from poolhouse.errors import CheckpointError, ConfigError, InvalidRequest
from poolhouse.params import PoolerConfig, PoolingParams
from poolhouse.pooling.rows import Rows
from poolhouse.pooling.sentence_transformers import SentenceTransformersFiles
from poolhouse.pooling.sparse_autoencoder import Encode, KeepLargest
from poolhouse.pooling.splade import Saturate, SpladePooling, WeighVocabulary
from poolhouse.pooling.steps import (
    Activation,
    AtTokens,
    Dense,
    Every,
    Kept,
    Norm,
    Normalize,
    Probabilities,
    Reduce,
    Step,
    Steps,
    Truncate,
    Unit,
    Without,
    WithoutEnds,
)
from poolhouse.tasks import TOKEN_TASKS, SparseHead, Task


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The steps of one task.

    width: features of its answer, before Matryoshka cuts. sparse: how its answer becomes a sparse vector, if it does.
    """

    steps: tuple[Step, ...]
    width: int
    sparse: SparseHead | None = None

    @property
    def words(self) -> str:
        """The steps for people: "mean > dense 384 > truncate > normalize"."""
        return " > ".join(step.words for step in self.steps)

    def __call__(self, rows: Rows, params: PoolingParams) -> Rows:
        for step in self.steps:
            rows = step(rows, params)
        return rows

    def check(self, params: PoolingParams) -> None:
        """Raise InvalidRequest for what no step of this task can honour."""
        steps = [step for step in self.steps if isinstance(step, Steps)]
        if not steps and (params.step_tag_id is not None or params.returned_token_ids is not None):
            raise InvalidRequest(
                "step_tag_id and returned_token_ids belong to STEP pooling, which this model does not use; "
                "load it with pooler_config={'tok_pooling_type': 'STEP', ...}.",
                "step_tag_id",
            )
        for step in steps:
            step.check(params)

    def activates(self, params: PoolingParams) -> bool:
        """Whether an answer is normalised, or made of probabilities."""
        last = self.steps[-1]
        default = isinstance(last, Normalize | Probabilities) and last.default
        return default if params.use_activation is None else params.use_activation

    def of_spans(self, task: Task) -> Pipeline:
        """The same steps after the mean of each span, for late chunking (Günther et al. 2024).

        Of a token task, all tokens count: those too that get no row of their own, as in vLLM.

        Raises:
            InvalidRequest: steps that no mean can be put before.
        """
        place = next((place for place, step in enumerate(self.steps) if isinstance(step, Reduce)), 0)
        reduce, rest = self.steps[place], self.steps[place + 1 :]
        if task in TOKEN_TASKS and not any(isinstance(step, AtTokens | Steps) for step in self.steps):
            behind = dropwhile(lambda step: isinstance(step, Every | Kept | WithoutEnds), self.steps)
            return replace(self, steps=(Reduce(("MEAN",)), *behind))
        heads = [step for step in rest if isinstance(step, Dense | Norm | Encode)]
        if not isinstance(reduce, Reduce) or (len(reduce.names) > 1 and heads):
            raise InvalidRequest(
                f"Late chunking puts a mean before the model's heads; here they follow {reduce.words}."
            )
        return replace(self, steps=(*self.steps[:place], Reduce(("MEAN",)), *rest))

    def to(self, device: torch.device) -> Pipeline:
        return replace(self, steps=tuple(step.to(device) for step in self.steps))


def embed_pipelines(
    hidden_size: int, user: PoolerConfig, files: SentenceTransformersFiles | None, default_pooling: str
) -> dict[Task, Pipeline]:
    """`embed` (one vector per prompt) and `token_embed` (one per token, through the same heads).

    hidden_size: features of a hidden state. default_pooling: a name of REDUCTIONS, for models that come without files.

    Raises:
        ConfigError: a pooling that these tasks do not have. CheckpointError: a head of another width than its input.
    """
    if user.tok_pooling_type == "STEP":
        raise ConfigError("pooler_config: STEP pooling belongs to token_classify, which this model does not offer.")
    reduce, from_files = _reduction(user, files, default_pooling)
    heads: tuple[Step, ...] = () if files is None else files.heads
    before = _before(files)
    use_activation = user.use_activation
    if use_activation is None:
        use_activation = files.normalize if from_files and files is not None else True
    tail = (Truncate(), Normalize(use_activation))
    hidden_size = _width(hidden_size, before)
    width = _width(hidden_size * len(reduce.names), heads)
    sparse = SparseHead("embed", "feature", width) if heads and isinstance(heads[-1], Encode) else None
    pipelines: dict[Task, Pipeline] = {"embed": Pipeline((*before, reduce, *heads, *tail), width, sparse)}
    if len(reduce.names) == 1:
        # Token vectors are normalised unless the user says otherwise, as in vLLM.
        unit = True if user.use_activation is None else user.use_activation
        pipelines["token_embed"] = Pipeline((*(before or (Every(),)), *heads, Truncate(), Normalize(unit)), width)
    else:
        # A head made for concatenated poolings does not fit single token vectors.
        unit = True if user.use_activation is None else user.use_activation
        pipelines["token_embed"] = Pipeline((*(before or (Every(),)), Truncate(), Normalize(unit)), hidden_size)
    return pipelines


def classify_pipelines(
    steps: tuple[Step, ...],
    labels: int,
    user: PoolerConfig,
    activation: Activation,
    *,
    pooling: str | None,
    fixed: bool = False,
    late: bool = False,
    use_activation: bool = True,
    step_tag_id: int | None = None,
    tokens: bool = True,
    columns: tuple[int, ...] | None = None,
) -> dict[Task, Pipeline]:
    """`classify` (one row of labels per prompt) where the head pools, and `token_classify` (one per token).

    steps: from a hidden state to logits. activation: from logits to probabilities.
    pooling, fixed, late, use_activation, step_tag_id, tokens: see `poolhouse.models.heads.Head`.
    columns: the token that each label stands for; None numbers the labels.

    Raises:
        ConfigError: a pooling that the model does not have.
    """
    if user.use_activation is not None:
        use_activation = user.use_activation
    tail = Probabilities(activation, use_activation, user.logit_mean, user.logit_sigma)
    pipelines: dict[Task, Pipeline] = {}
    if pooling is not None:
        wanted = pooling if fixed or user.seq_pooling_type is None else user.seq_pooling_type
        reduce = Reduce(tuple(wanted.split("+")))
        if len(reduce.names) > 1:
            raise ConfigError(f"pooler_config: {wanted} concatenates poolings, but the classifier was made for one.")
        whole = (Every(), *steps, reduce) if late else (reduce, *steps)
        pipelines["classify"] = Pipeline((*whole, tail), labels)
    if tokens:
        keep = _steps(user, step_tag_id, labels, columns)
        pipelines["token_classify"] = Pipeline((Every(), *steps, *keep, tail), labels)
    return pipelines


def splade_pipelines(
    steps: tuple[Step, ...],
    vocabulary: int,
    pooling: SpladePooling,
    user: PoolerConfig,
    most: int | None = None,
    unit: bool = False,
) -> dict[Task, Pipeline]:
    """`embed`: a dense vector of vocabulary size per prompt; `token_embed`: one per token. Not normalised by default.

    steps: from a hidden state to logits, a Dense last; none where the rows are logits already.
    most: how many weights a prompt keeps; None keeps all. unit: whether they are normalised if nobody says otherwise.
    """
    decoder = steps[-1] if steps else None
    assert decoder is None or isinstance(decoder, Dense)
    tail = (Truncate(), Normalize(unit if user.use_activation is None else user.use_activation))
    sparse = SparseHead("embed", "vocabulary", vocabulary)
    weigh = (WeighVocabulary(decoder, pooling), *(() if most is None else (KeepLargest(most),)))
    return {
        "embed": Pipeline((Every(), *steps[:-1], *weigh, *tail), vocabulary, sparse),
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


def listwise_pipelines(projector: tuple[Step, ...], width: int, tokens: tuple[int, ...]) -> dict[Task, Pipeline]:
    """`token_embed` of a listwise reranker: projected vectors of the passages, in order, and of the query behind them.

    tokens: ids of the tokens that stand for passages and query.
    """
    return {"token_embed": Pipeline((AtTokens(tokens), Every(), *projector, Truncate(), Normalize(False)), width)}


def _before(files: SentenceTransformersFiles | None) -> tuple[Step, ...]:
    """Steps of every token before pooling; () where hidden states are pooled as they are."""
    if files is None or (not files.before and files.dropped is None):
        return ()
    dropped = () if files.dropped is None else (Without(files.dropped),)
    return (*dropped, Every(), *files.before)


def _steps(
    user: PoolerConfig, step_tag_id: int | None, labels: int, columns: tuple[int, ...] | None
) -> tuple[Steps, ...]:
    """STEP pooling where the user or the model wants it.

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
    return (Steps(tag, named, kept),)


def _reduction(
    user: PoolerConfig, files: SentenceTransformersFiles | None, default_pooling: str
) -> tuple[Reduce, bool]:
    """The reduction, and whether sentence-transformers' files describe the pooling."""
    described = files is not None and (files.pooling is not None or files.pooled)
    include_prompt = files.include_prompt if files is not None else True
    if user.seq_pooling_type is not None:
        return Reduce(tuple(user.seq_pooling_type.split("+")), include_prompt), described
    if files is not None and files.pooling is not None:
        return Reduce(files.pooling, include_prompt), True
    return Reduce((default_pooling,)), described


def _width(width: int, heads: tuple[Step, ...]) -> int:
    """The width after the heads, each checked against what comes in."""
    for head in heads:
        if isinstance(head, Dense):
            if head.weight.shape[1] != width:
                raise CheckpointError(
                    f"A Dense module takes {head.weight.shape[1]} features, but {width} come in from the step before."
                )
            width = head.weight.shape[0]
        elif isinstance(head, Encode):
            if head.weight.shape[1] != width:
                raise CheckpointError(
                    f"A SparseAutoEncoder takes {head.weight.shape[1]} features, but {width} come in."
                )
            width = head.weight.shape[0]
        elif isinstance(head, Norm) and head.weight.shape[0] != width:
            raise CheckpointError(f"A LayerNorm takes {head.weight.shape[0]} features, but {width} come in.")
        assert isinstance(head, Dense | Norm | Unit | Encode | Every | Without)
    return width
