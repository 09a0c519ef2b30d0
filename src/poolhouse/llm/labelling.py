"""`LLM.token_classify` and its async twin: a row of labels per token, and the entities that they make."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from poolhouse.engine.answers import facts
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.waiting import gather
from poolhouse.errors import UnsupportedTask
from poolhouse.inputs.prompts import Prompts
from poolhouse.llm.answering import wait
from poolhouse.llm.asking import Asked, Options, Params, requests_of
from poolhouse.outputs import TokenClassificationOutput, TokenClassificationRequestOutput
from poolhouse.spans import Strategy, entities, parse_strategy, probabilities

if TYPE_CHECKING:
    from poolhouse.engine.engine import Engine
    from poolhouse.llm.llm import LLM


def token_classify(
    self: LLM,
    prompts: Prompts,
    *,
    aggregation_strategy: str = "simple",
    ignore_labels: Collection[str] = ("O",),
    use_tqdm: bool | Callable[..., Any] = True,
    pooling_params: Params = None,
    prompt_name: str | None = None,
    lora_request: Any = None,
    tokenization_kwargs: Options = None,
) -> list[TokenClassificationRequestOutput]:
    """The labels of every token, and the entities that they make, per text in input order.

    aggregation_strategy: none (each token by itself), simple (neighbours of one label), or first, average, max (the
    tokens of a word agree first); numbers as in transformers' pipeline. Places are characters of the text as given.

    Raises:
        UnsupportedTask: the model has no labels per token, or does not answer with a row for each.
        InvalidRequest: for the first prompt that could not be answered; token ids, which have no characters.
    """
    strategy = parse_strategy(aggregation_strategy)
    requests = _requests(self.engine, prompts, Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request))
    answers = wait(self.engine.submit(requests), use_tqdm, "token_classify")
    return self._outputs(zip(requests, answers, strict=True), _labelled(self.engine, strategy, ignore_labels))


async def token_classify_async(
    self: LLM,
    prompts: Prompts,
    *,
    aggregation_strategy: str = "simple",
    ignore_labels: Collection[str] = ("O",),
    pooling_params: Params = None,
    prompt_name: str | None = None,
    lora_request: Any = None,
    tokenization_kwargs: Options = None,
) -> list[TokenClassificationRequestOutput]:
    """`token_classify` for coroutines; cancelling it takes the prompts out of the queue."""
    strategy = parse_strategy(aggregation_strategy)
    requests = _requests(self.engine, prompts, Asked(pooling_params, prompt_name, tokenization_kwargs, lora_request))
    answers = await gather(self.engine.submit(requests))
    return self._outputs(zip(requests, answers, strict=True), _labelled(self.engine, strategy, ignore_labels))


def _requests(engine: Engine, prompts: Prompts, asked: Asked) -> Sequence[Request]:
    requests = requests_of(engine, prompts, "token_classify", asked)
    return [replace(request, places=True) for request in requests]


def _labelled(
    engine: Engine, strategy: Strategy, ignored: Collection[str]
) -> Callable[[str, tuple[Request, Answer]], TokenClassificationRequestOutput]:
    pipeline = engine.model.pipelines["token_classify"]

    def build(request_id: str, pair: tuple[Request, Answer]) -> TokenClassificationRequestOutput:
        request, answer = pair
        text, places, scores = request.prompt.text, answer.tokens.places, answer.array
        if engine.token_weights:
            raise UnsupportedTask("This model weighs tokens, it does not label them; use embed_sparse or encode.")
        if len(scores) != len(answer.tokens):
            raise UnsupportedTask(
                "Entities need a row per token, but this model pools steps (STEP); use encode instead."
            )
        assert text is not None
        assert places is not None
        if not pipeline.activates(request.params):
            scores = probabilities(scores)
        found = entities(text, scores, places, engine.label_names, strategy, ignored)
        output = TokenClassificationOutput(answer.array, tuple(found))
        return TokenClassificationRequestOutput(request_id, output, **facts(answer))

    return build
