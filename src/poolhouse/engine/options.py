"""Options: how an engine works, and the facts that follow from its model and its options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from poolhouse.engine.interface import EngineFacts
from poolhouse.engine.media import MediaOptions
from poolhouse.inputs.conversations import Conversations
from poolhouse.inputs.listwise import ListwisePrompts
from poolhouse.inputs.templates.score import ScoreTemplate
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.models.model import Model
from poolhouse.params import PoolingParams
from poolhouse.plugins import Plugin
from poolhouse.tasks import PruningHead, SparseHead
from poolhouse.vectors.precision import Calibration


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine works, as opposed to what its model is.

    max_batch_tokens: tokens of one pack. workers: batches that run at a time.
    one_core_tokens: a batch of no more is computed on one core, by its caller where that is possible.
    overflow: what to do with prompts over the model's limit.
    max_prompt_tokens: another limit of prompts; with overflow "chunk" the only one.
    default_params: what the model's owner wants where a request says nothing.
    score_template: what joins a query and a document, where the tokenizer does not.
    conversations: the chat templates that messages go through.
    aliases: names beside the model's own that requests may use. unlisted_names: further ones, which no list shows.
    truncation_side: which end of a prompt is dropped where a request does not say.
    calibration: the ranges of int8 vectors, of the task `embed`, or of `token_embed` where the model has no other.
    media: how pictures are loaded.
    prefix_sharing: whether a beginning that several prompts have runs once for all of them, where the model can.
    """

    max_batch_tokens: int
    overflow: Literal["error", "truncate", "chunk"] = "error"
    max_prompt_tokens: int | None = None
    tokenizer_threads: int = 2
    workers: int = 1
    one_core_tokens: int = 0
    default_params: PoolingParams = PoolingParams()
    score_template: ScoreTemplate | None = None
    conversations: Conversations = Conversations()
    aliases: tuple[str, ...] = ()
    unlisted_names: tuple[str, ...] = ()
    truncation_side: Literal["left", "right"] = "right"
    calibration: Calibration | None = None
    media: MediaOptions = MediaOptions()
    prefix_sharing: bool = True


def engine_facts(model: Model, tokenizer: Tokenizer, options: EngineOptions, plugin: Plugin | None) -> EngineFacts:
    """What is known of an engine that runs this model so."""
    facts = model.facts
    embed, classify = (model.pipelines.get(task) for task in ("embed", "classify"))
    rules, listwise = facts.late_interaction, facts.listwise
    return EngineFacts(
        name=facts.name,
        aliases=options.aliases,
        unlisted_names=options.unlisted_names,
        tasks=model.tasks,
        labels=0 if classify is None else classify.width,
        label_names=facts.labels,
        max_tokens=facts.max_tokens,
        width=None if embed is None else embed.width,
        pooling=None if embed is None else embed.steps[0].description,
        prompts=facts.prompts,
        default_prompt_name=facts.default_prompt_name,
        adapters=() if model.adapters is None else model.adapters.declared,
        sparse=_sparse(model, tokenizer),
        similarity=facts.similarity,
        mean_max_sim=rules is not None and rules.mean,
        routed=bool(model.routes.by_task),
        pictures=facts.pictures is not None,
        reads_labels=facts.labelled is not None,
        score_template=options.score_template,
        listwise=None if listwise is None else ListwisePrompts(tokenizer, listwise),
        pruning=_pruning(model, tokenizer),
        plugin=plugin,
        calibration=options.calibration,
        dtype=str(facts.dtype).removeprefix("torch."),
        device=facts.device.type,
        weight_bytes=model.weight_bytes,
        max_batch_tokens=options.max_batch_tokens,
        tokenizer_threads=options.tokenizer_threads,
        path=facts.path,
        matryoshka=facts.matryoshka,
        widths={
            task: options.default_params.dimensions or pipeline.width for task, pipeline in model.pipelines.items()
        },
        activated=frozenset(
            task for task, pipeline in model.pipelines.items() if pipeline.activates(options.default_params)
        ),
    )


def _sparse(model: Model, tokenizer: Tokenizer) -> SparseHead | None:
    """How answers become sparse vectors; weights of tokens leave out the unknown one."""
    head, unknown = model.sparse, tokenizer.unknown
    if head is None or head.unit != "token" or unknown is None:
        return head
    return replace(head, left_out=head.left_out | {unknown})


def _pruning(model: Model, tokenizer: Tokenizer) -> PruningHead | None:
    """How answers choose sentences, with what the tokenizer puts around query and document."""
    pruner = model.plan.pruner
    if pruner is None or not model.plan.prunes:
        return None
    _, whole = tokenizer.pair_templates
    return replace(pruner.head, parts=tuple(tuple(part.tolist()) for part in whole.parts))
