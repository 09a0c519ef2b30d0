"""Results: the outputs that callers of LLM get, built from the answers of the engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from poolhouse.engine.engine import Engine
from poolhouse.engine.request import Answer, Request, pooling, pooling_outputs, prompt_fields, token_fields
from poolhouse.errors import UnsupportedTask
from poolhouse.inputs.prompts import role_of
from poolhouse.outputs import (
    ChunkedEmbeddingRequestOutput,
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    SparseRequestOutput,
    TokenClassificationOutput,
    TokenClassificationRequestOutput,
)
from poolhouse.plans.late_chunking import Chunked, fixed_chunks
from poolhouse.plans.scoring import Score
from poolhouse.plans.sparse import Sparse
from poolhouse.plugins import Plugin, task_of
from poolhouse.vectors.entities import Strategy, entities, probabilities
from poolhouse.vectors.precision import parse_precision
from poolhouse.vectors.token_embeddings import TokenEmbeddings
from poolhouse.vectors.token_pooling import check_factor
from poolhouse.vectors.token_pooling import pooled as pool_tokens

# A request and its answer.
Answered = tuple[Request, Answer]


def pooled(engine: Engine) -> Callable[[str, Answered], PoolingRequestOutput]:
    """The rows of any task, and what each stands for where they are those of chunks."""

    def build(request_id: str, answered: Answered) -> PoolingRequestOutput:
        request, answer = answered
        output = pooling(request.task, engine)(request_id, answer)
        chunking = request.params.late_chunking_params
        return output if chunking is None else replace(output, late_chunking=fixed_chunks(chunking, answer.tokens))

    return build


def embedded(request_id: str, answered: Answered) -> EmbeddingRequestOutput:
    """The vector of a prompt."""
    _, answer = answered
    return EmbeddingRequestOutput(request_id, EmbeddingOutput(answer.array), **prompt_fields(answer))


def classified(engine: Engine) -> Callable[[str, Answered], ClassificationRequestOutput]:
    """The probabilities of a prompt, and the name of the likeliest label."""
    labels = engine.facts.label_names

    def build(request_id: str, answered: Answered) -> ClassificationRequestOutput:
        _, answer = answered
        output = ClassificationOutput(answer.array, labels.get(int(answer.array.argmax())))
        return ClassificationRequestOutput(request_id, output, **prompt_fields(answer))

    return build


def labelled(
    engine: Engine, strategy: Strategy, ignored: Collection[str]
) -> Callable[[str, Answered], TokenClassificationRequestOutput]:
    """The labels of a prompt's tokens, and the entities that they make."""
    pipeline = engine.model.pipelines["token_classify"]

    def build(request_id: str, answered: Answered) -> TokenClassificationRequestOutput:
        request, answer = answered
        text, offsets, scores = request.prompt.text, answer.tokens.offsets, answer.array
        if engine.facts.token_weights:
            raise UnsupportedTask("This model weighs tokens, it does not label them; use embed_sparse or encode.")
        if len(scores) != len(answer.tokens):
            raise UnsupportedTask(
                "Entities need a row per token, but this model pools steps (STEP); use encode instead."
            )
        assert text is not None
        assert offsets is not None
        if not pipeline.activates(request.params):
            scores = probabilities(scores)
        found = entities(text, scores, offsets, engine.facts.label_names, strategy, ignored)
        output = TokenClassificationOutput(answer.array, tuple(found))
        return TokenClassificationRequestOutput(request_id, output, **prompt_fields(answer))

    return build


def scored(request_id: str, score: Score) -> ScoringRequestOutput:
    """A pair's score; its token ids are those of all prompts that were run for it."""
    prompts = [prompt_fields(answer) for answer in score.answers]
    return ScoringRequestOutput(
        request_id,
        ScoringOutput(score.score),
        prompt_token_ids=[token for own in prompts for token in own["prompt_token_ids"]],
        truncated=any(own["truncated"] for own in prompts),
        original_tokens=sum(own["original_tokens"] for own in prompts),
        original_is_estimate=any(own["original_is_estimate"] for own in prompts),
    )


def chunked(request_id: str, text: Chunked) -> ChunkedEmbeddingRequestOutput:
    """A text's chunks and their vectors."""
    return ChunkedEmbeddingRequestOutput(request_id, text.chunks, **token_fields(text.tokens, text.windows))


def sparse(request_id: str, text: Sparse) -> SparseRequestOutput:
    """A prompt's sparse vector."""
    return SparseRequestOutput(request_id, text.vector, **token_fields(text.tokens, text.chunks))


def packing(
    engine: Engine, input_type: str | None, factor: float | None, precision: str
) -> Callable[[Iterable[Answer]], TokenEmbeddings]:
    """How answers become one packed matrix of token vectors; see `LLM.embed_tokens`.

    Raises:
        InvalidRequest: options that are unknown or cannot be honoured.
    """
    parsed = parse_precision(precision)
    if factor is not None:
        check_factor(factor, role_of(input_type))

    def pack(answers: Iterable[Answer]) -> TokenEmbeddings:
        matrices = [answer.array if factor is None else pool_tokens(answer.array, factor) for answer in answers]
        return TokenEmbeddings.of(matrices, parsed, engine.facts.calibration)

    return pack


def from_plugin(engine: Engine, plugin: Plugin) -> Callable[[Iterable[Answer]], list[PoolingRequestOutput]]:
    """One output, whose `outputs` is what the plugin makes of the answers and which has no id, as in vLLM."""

    def finish(answers: Iterable[Answer]) -> list[PoolingRequestOutput]:
        outputs = pooling_outputs(list(answers), task_of(plugin, engine.facts.tasks), engine)
        return [PoolingRequestOutput("", plugin.post_process(outputs), [])]

    return finish
