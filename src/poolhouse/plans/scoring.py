"""Scores of pairs: requests to one engine, and how its answers become scores, by what its model can do.

| model | how it scores |
|---|---|
| reads all documents of a query at once | its own vectors, compared by cosine (listwise) |
| classifier with one label | reads both texts of a pair together (cross-encoder) |
| `embed` | compares two vectors (bi-encoder) |
| `token_embed` | MaxSim (late interaction) |
| prunes | a cross-encoder, which gives the sentences that stay too (see `poolhouse.plans.pruning`) |
| any, with a mode | the mean of dense, sparse and multi-vector scores (see `poolhouse.plans.combined`) |

Offline callers wait for the answers of a plan, the server awaits them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from poolhouse.engine.interface import PoolingEngine
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import InvalidRequest, UnsupportedTask
from poolhouse.inputs.content import Content, TextOrContent
from poolhouse.inputs.listwise import ListwisePrompt, PacksDocuments
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.templates.score import ScoreTemplate
from poolhouse.outputs import Array
from poolhouse.params import PoolingParams, PruningParams
from poolhouse.plans import combined, pruning
from poolhouse.tasks import Task
from poolhouse.vectors.max_sim import max_sim, max_sim_pairs

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """One pair's score, and the answers that it comes from, the query's first. pruned: its document, where that is asked."""

    score: float
    answers: tuple[Answer, ...]
    pruned: pruning.Pruned | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ScorePlan:
    """Requests to run, and how their answers, in that order, become a score per pair.

    pairs: for each request the number of its pair, where a pair may have several; else None.
    """

    requests: list[Request]
    finish: Callable[[Sequence[Answer]], list[Score]]
    pairs: list[int] | None = None


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """The options of a score, beside the texts and pictures.

    instruction: what makes a document fit, for models that read one.
    processor_options: settings of the picture processor (vLLM's mm_processor_kwargs).
    template: joins the texts of a pair, instead of the model's own. variables: what the template sees beside them.
    mode: which answers of the model are compared, see `combined.MODES`; None leaves it to the model.
    weights: of the dense, sparse and colbert scores in a mode that adds several; None: all alike.
    prune: which sentences of the documents stay; None: documents are not pruned.
    """

    params: PoolingParams = PoolingParams()
    instruction: str | None = None
    template: ScoreTemplate | None = None
    variables: Mapping[str, object] = field(default_factory=dict)
    mode: str | None = None
    weights: tuple[float, ...] | None = None
    processor_options: Mapping[str, object] = field(default_factory=dict)
    prune: PruningParams | None = None


def plan(
    engine: PoolingEngine, queries: Sequence[TextOrContent], documents: Sequence[TextOrContent], options: ScoreOptions
) -> ScorePlan:
    """Who scores these pairs, 1:1, 1:N or N:N, and how. Each side is texts, pictures, or both mixed.

    Raises:
        InvalidRequest: lists that do not fit. UnsupportedTask: a model that cannot score, and why.
    """
    check_lengths(queries, documents)
    if options.params.late_chunking_params is not None:
        raise InvalidRequest("Scores are of whole texts; late chunking makes vectors.", "late_chunking_params")
    if options.prune is not None:
        return _pruning(engine, queries, documents, options, options.prune)
    if options.mode is not None:
        _refuse_templates(options, "is asked to compare what it says of each text apart")
        _refuse_instruction(engine, options)
        return _combined(engine, queries, documents, options, options.mode)
    if options.weights is not None:
        raise InvalidRequest("weights are for mode='weighted'.", "weights", options.weights)
    if engine.facts.listwise is not None:
        _refuse_templates(options, "scores all documents in one prompt of its own")
        return _listwise(engine, engine.facts.listwise, queries, documents, options)
    if "classify" in engine.facts.tasks:
        if engine.facts.reads_labels:
            raise UnsupportedTask("This model classifies by labels of the request: use classify with labels.", "model")
        if engine.facts.labels != 1:
            raise UnsupportedTask(
                f"Scoring API is only enabled for num_labels == 1. This model has {engine.facts.labels} labels; "
                "use classify for the probability of each.",
                "model",
            )
        if engine.facts.pruning is not None and engine.facts.pruning.plain_query:
            queries = [pruning.plain_query(query) if isinstance(query, str) else query for query in queries]
        return _cross_encoder(queries, documents, options, _bound_template(engine, options))
    _refuse_templates(options, "encodes query and document apart")
    _refuse_instruction(engine, options)
    if "embed" in engine.facts.tasks:
        return _bi_encoder(engine, queries, documents, options)
    if "token_embed" in engine.facts.tasks:
        return _late_interaction(queries, documents, options, engine.facts.mean_max_sim)
    raise UnsupportedTask(
        f"This model does not support the Scoring API. Supported tasks: {list(engine.facts.tasks)}.", "model"
    )


def _pruning(
    engine: PoolingEngine,
    queries: Sequence[TextOrContent],
    documents: Sequence[TextOrContent],
    options: ScoreOptions,
    prune: PruningParams,
) -> ScorePlan:
    """The model reads both of a pair together, and says which sentences of the document stay."""
    if options.mode is not None or options.weights is not None:
        raise InvalidRequest("mode and weights compare texts that are read apart; prune reads pairs.", "mode")
    _refuse_templates(options, "prunes, which it does as it was trained")
    _refuse_instruction(engine, options)
    texts = _texts_alone(queries, "data_1"), _texts_alone(documents, "data_2")
    planned = pruning.plan(engine, *texts, options.params, prune)

    def finish(answers: Sequence[Answer]) -> list[Score]:
        return [Score(pruned.score, pruned.answers, pruned) for pruned in planned.finish(answers)]

    return ScorePlan(planned.requests, finish, planned.pairs)


def check_lengths(queries: Sequence[TextOrContent], documents: Sequence[TextOrContent]) -> None:
    """Raise InvalidRequest for lists that do not fit together."""
    if not queries:
        raise InvalidRequest("At least one text element must be given", "data_1")
    if not documents:
        raise InvalidRequest("At least one text_pair element must be given", "data_2")
    if len(queries) not in (1, len(documents)):
        raise InvalidRequest(
            f"Input lengths must be either 1:1, 1:N or N:N, got {len(queries)}:{len(documents)}", "data_1"
        )


def _bound_template(engine: PoolingEngine, options: ScoreOptions) -> ScoreTemplate | None:
    """What joins pairs, with the instruction and variables of this request; None for the tokenizer, or the model's code."""
    if engine.facts.pictures:
        _refuse_templates(options, "writes the prompt of a pair by its own code")
        return None
    template = options.template or engine.facts.score_template
    if template is not None:
        return template.bind(options.instruction, options.variables)
    if options.variables:
        raise InvalidRequest("chat_template_kwargs: this model has no score template.", "chat_template_kwargs")
    _refuse_instruction(engine, options)
    return None


def _refuse_templates(options: ScoreOptions, why: str) -> None:
    name = "chat_template" if options.template is not None else "chat_template_kwargs"
    if options.template is not None or options.variables:
        raise InvalidRequest(f"{name} is for cross-encoders; this model {why}.", name)


def _refuse_instruction(engine: PoolingEngine, options: ScoreOptions) -> None:
    # Models that read pictures write their prompts themselves, and may read one.
    if options.instruction and not engine.facts.pictures:
        raise InvalidRequest("This model reads no instruction; put it into the query.", "instruction")


def _cross_encoder(
    queries: Sequence[TextOrContent],
    documents: Sequence[TextOrContent],
    options: ScoreOptions,
    template: ScoreTemplate | None,
) -> ScorePlan:
    """The model reads both of a pair together."""
    pairs = zip(_stretched(queries, len(documents)), documents, strict=True)
    requests = [
        Request(_pair(query, document, options, template), "classify", options.params) for query, document in pairs
    ]
    return ScorePlan(requests, lambda answers: [Score(float(answer.array[0]), (answer,)) for answer in answers])


def _pair(
    query: TextOrContent, document: TextOrContent, options: ScoreOptions, template: ScoreTemplate | None
) -> Prompt:
    if isinstance(query, str) and isinstance(document, str):
        instruction = options.instruction if template is None else None
        return Prompt(query, pair=document, template=template, instruction=instruction)
    first, second = (Content((side,)) if isinstance(side, str) else side for side in (query, document))
    return Prompt(
        None,
        content=first,
        pair_content=second,
        instruction=options.instruction,
        processor_options=options.processor_options,
    )


def _listwise(
    engine: PoolingEngine,
    prompts: PacksDocuments,
    queries: Sequence[TextOrContent],
    documents: Sequence[TextOrContent],
    options: ScoreOptions,
) -> ScorePlan:
    """The model reads all documents of a query in one prompt, or in several, whose scores are made comparable."""
    queries, documents = _texts_alone(queries, "data_1"), _texts_alone(documents, "data_2")
    limit = engine.limit(options.params)
    lists = [documents] if len(queries) == 1 else [[document] for document in documents]
    groups = [prompts.pack(query, own, options.instruction, limit) for query, own in zip(queries, lists, strict=True)]
    # What is too long was cut, document by document, or refused: the prompts themselves are not to be cut.
    params = replace(options.params, truncate_prompt_tokens=None, max_tokens_per_query=None, max_tokens_per_doc=None)
    requests = [Request(Prompt(packed.prompt), "token_embed", params) for group in groups for packed in group]

    def finish(answers: Sequence[Answer]) -> list[Score]:
        rest = iter(answers)
        return [score for group in groups for score in _listwise_scores(group, [next(rest) for _ in group])]

    return ScorePlan(requests, finish)


def _texts_alone(sides: Sequence[TextOrContent], parameter: str) -> list[str]:
    texts = [side for side in sides if isinstance(side, str)]
    if len(texts) < len(sides):
        raise InvalidRequest(
            f"MultiModalParam is not supported: this model reads lists of texts, and {parameter} has pictures.",
            parameter,
        )
    return texts


def _listwise_scores(group: Sequence[ListwisePrompt], answers: Sequence[Answer]) -> list[Score]:
    """Cosines of the documents' vectors with the query's, which is the last row of each answer.

    Of several prompts, the query's vectors are averaged, each by the score of its best document; as in
    jina-reranker-v3's own code.
    """
    bests = [float((1 + _cosines(answer.array[-1], answer.array[:-1]).max()) / 2) for answer in answers]
    query = np.average([answer.array[-1] for answer in answers], axis=0, weights=bests)
    scores: list[Score] = []
    for packed, answer in zip(group, answers, strict=True):
        tokens = replace(answer.tokens, original_tokens=answer.tokens.original_tokens + packed.cut)
        scores.extend(
            Score(float(score), (replace(answer, tokens=tokens),)) for score in _cosines(query, answer.array[:-1])
        )
    return scores


def _cosines(query: Array, documents: Array) -> Array:
    lengths = np.linalg.norm(query) * np.linalg.norm(documents, axis=1)
    cosines: Array = documents @ query / np.maximum(lengths, 1e-12)
    return cosines


def _cosine(ours: Array, theirs: Array) -> Array:
    """[pairs]: the cosine of each row with its fellow, or of the one row with each."""
    ours, theirs = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (ours, theirs))
    return _dot(ours, theirs)


def _dot(ours: Array, theirs: Array) -> Array:
    products: Array = (ours * theirs).sum(axis=1)
    return products


def _euclidean(ours: Array, theirs: Array) -> Array:
    distances: Array = np.linalg.norm(ours - theirs, axis=1)
    return -distances


def _manhattan(ours: Array, theirs: Array) -> Array:
    distances: Array = np.abs(ours - theirs).sum(axis=1)
    return -distances


# By sentence-transformers' names; the nearer, the larger.
_COMPARISONS: Mapping[str, Callable[[Array, Array], Array]] = {
    "cosine": _cosine,
    "dot": _dot,
    "euclidean": _euclidean,
    "manhattan": _manhattan,
}


def _combined(
    engine: PoolingEngine,
    queries: Sequence[TextOrContent],
    documents: Sequence[TextOrContent],
    options: ScoreOptions,
    mode: str,
) -> ScorePlan:
    """Several answers of one pass over each text, compared as the mode says; each text has its input type."""
    if engine.facts.listwise is not None:
        raise UnsupportedTask("mode is for models that read query and document apart; this one scores lists.", "mode")
    combination = combined.combination(engine, mode, options.weights)
    task, *further = combination.tasks
    params = options.params
    if params.use_activation is None and engine.facts.sparse is not None and engine.facts.sparse.unit == "token":
        # Unit vectors and positive weights, also where the pooler config turns activations off.
        params = replace(params, use_activation=True)
    options = replace(options, params=params)
    requests = [
        replace(request, further=tuple(further))
        for request in _requests(queries, documents, task, options, by_role=True)
    ]

    def finish(answers: Sequence[Answer]) -> list[Score]:
        texts = [combination.compared(answer) for answer in answers]
        ours, theirs = _stretched(texts[: len(queries)], len(documents)), texts[len(queries) :]
        scores = [combination.score(query, document) for query, document in zip(ours, theirs, strict=True)]
        return _scores(np.array(scores), answers, len(queries))

    return ScorePlan(requests, finish)


def _bi_encoder(
    engine: PoolingEngine, queries: Sequence[TextOrContent], documents: Sequence[TextOrContent], options: ScoreOptions
) -> ScorePlan:
    """The cosine of two vectors, or what else the model compares them by; a query of many documents is embedded once."""
    facts = engine.facts
    # A sparse encoder may look queries up and run documents; models that read pictures write a prompt for each side.
    by_role = facts.routed or facts.pictures or (facts.sparse is not None and facts.sparse.unit == "vocabulary")
    compare = _COMPARISONS[facts.similarity]

    def finish(answers: Sequence[Answer]) -> list[Score]:
        vectors = np.stack([answer.array for answer in answers])
        return _scores(compare(vectors[: len(queries)], vectors[len(queries) :]), answers, len(queries))

    return ScorePlan(_requests(queries, documents, "embed", options, by_role), finish)


def _late_interaction(
    queries: Sequence[TextOrContent], documents: Sequence[TextOrContent], options: ScoreOptions, mean: bool
) -> ScorePlan:
    """MaxSim: each vector of the query finds its best vector of the document, and their products are added.

    mean: divide by the number of the query's vectors.
    """

    def finish(answers: Sequence[Answer]) -> list[Score]:
        vectors = [answer.array for answer in answers]
        ours, theirs = vectors[: len(queries)], vectors[len(queries) :]
        sums = max_sim(ours[0], theirs) if len(ours) == 1 else max_sim_pairs(ours, theirs)
        if mean:
            lengths = [max(len(query), 1) for query in _stretched(ours, len(documents))]
            sums /= np.array(lengths, dtype=np.float32)
        return _scores(sums, answers, len(queries))

    return ScorePlan(_requests(queries, documents, "token_embed", options, by_role=True), finish)


def _requests(
    queries: Sequence[TextOrContent],
    documents: Sequence[TextOrContent],
    task: Task,
    options: ScoreOptions,
    by_role: bool = False,
) -> list[Request]:
    """All queries, then all documents, each with its own limit. by_role: requests say which they are."""
    params = options.params
    ours, theirs = _alone(params, params.max_tokens_per_query), _alone(params, params.max_tokens_per_doc)
    query_type, document_type = ("query", "document") if by_role else (None, None)
    requests = [
        Request(_prompt(query, options, options.instruction), task, ours, input_type=query_type) for query in queries
    ]
    return requests + [
        Request(_prompt(document, options), task, theirs, input_type=document_type) for document in documents
    ]


def _prompt(side: TextOrContent, options: ScoreOptions, instruction: str | None = None) -> Prompt:
    if isinstance(side, str):
        return Prompt(side, instruction=instruction)
    return Prompt(None, content=side, instruction=instruction, processor_options=options.processor_options)


def _alone(params: PoolingParams, max_tokens: int | None) -> PoolingParams:
    """The parameters of a text that is a prompt of its own: the limit of the first text of a pair is its limit."""
    return replace(params, max_tokens_per_query=max_tokens, max_tokens_per_doc=None)


def _scores(scores: Array, answers: Sequence[Answer], queries: int) -> list[Score]:
    documents = answers[queries:]
    ours = _stretched(answers[:queries], len(documents))
    return [
        Score(float(score), (query, document)) for score, query, document in zip(scores, ours, documents, strict=True)
    ]


def _stretched(items: Sequence[T], count: int) -> list[T]:
    return list(items) * count if len(items) == 1 else list(items)
