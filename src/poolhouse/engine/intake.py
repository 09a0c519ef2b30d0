"""Intake: requests checked, tokenised and made ready to wait for their batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from poolhouse.engine import chunks
from poolhouse.engine.observing import Observer
from poolhouse.engine.preparation import Preparation, Prepared
from poolhouse.engine.ready import Arrival, Flow, Ready
from poolhouse.engine.request import Answer, Request, fail, start
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.late_interaction import SideTokens
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.tokens import Tokens


class Intake:
    """Makes requests ready, many per call of the tokenizer; safe from several threads at once.

    static_tokenizer: of the side that is looked up instead of run, where the model has one.
    sides: what late interaction makes of queries and documents, where the model does it.
    """

    def __init__(
        self,
        preparation: Preparation,
        tokenizer: Tokenizer,
        static_tokenizer: Tokenizer | None = None,
        sides: SideTokens | None = None,
    ) -> None:
        self.preparation = preparation
        self.tokenizer = tokenizer
        self.static_tokenizer = static_tokenizer
        self.sides = sides
        self.observer: Observer | None = None

    def ready(self, requests: Sequence[Request], flows: Mapping[int, Flow]) -> list[Ready]:
        """What is to be run. flows: those of one `submit`, by priority.

        Requests that are looked up are answered here, and those that cannot be answered fail here.
        """
        valid: list[tuple[Request, Prepared]] = []
        for request in requests:
            if request.future.cancelled():
                start(request.future)
                continue
            try:
                valid.append((request, self.preparation.of(request)))
            except InvalidRequest as error:
                fail(request.future, error)
        if not valid:
            return []
        begun = time.perf_counter()
        encoded = self.encoded([made for _, made in valid])
        seconds = time.perf_counter() - begun
        if self.observer is not None:
            self.observer.tokenized(len(valid), seconds)
        arrival = Arrival(flows[valid[0][0].priority].submitted, seconds)
        ready: list[Ready] = []
        for (request, made), tokens in zip(valid, encoded, strict=True):
            if isinstance(tokens, InvalidRequest):
                fail(request.future, tokens)
            elif made.static is not None:
                if start(request.future):
                    timing = arrival.timing(begun + seconds, time.perf_counter())
                    request.future.set_result(
                        Answer(made.static.vector(tokens.ids, made.params), tokens, timing=timing)
                    )
            elif len(tokens) == 0 and not self.preparation.model.facts.takes_nothing:
                fail(request.future, InvalidRequest("The prompt has no tokens.", "prompt"))
            elif request.params.late_chunking_params is not None and tokens.places is None:
                words = "Late chunking needs the places of tokens, which this model's tokenizer does not know."
                fail(request.future, InvalidRequest(words, "late_chunking_params"))
            else:
                ready.extend(self._pieces(request, made, tokens, arrival, flows[request.priority]))
        return ready

    def encoded(self, prepared: Sequence[Prepared], whole: bool = False) -> list[Tokens | InvalidRequest]:
        """Tokens of each prompt, or its error, by the tokenizer of its side.

        whole: late interaction does not cut a text to the length of its side.
        """
        if self.sides is not None:
            return _encoded_sides(self.sides, self.tokenizer, prepared, whole)
        looked_up = [place for place, made in enumerate(prepared) if made.static is not None]
        if self.static_tokenizer is None or not looked_up:
            return _encoded(self.tokenizer, prepared)
        run = [place for place, made in enumerate(prepared) if made.static is None]
        results: dict[int, Tokens | InvalidRequest] = {}
        for tokenizer, places in ((self.tokenizer, run), (self.static_tokenizer, looked_up)):
            results.update(zip(places, _encoded(tokenizer, [prepared[place] for place in places]), strict=True))
        return [results[place] for place in range(len(prepared))]

    def _pieces(
        self, request: Request, made: Prepared, tokens: Tokens, arrival: Arrival, flow: Flow
    ) -> Sequence[Ready]:
        """One, or several for a prompt that is longer than the model reads at once."""
        chunking = request.params.late_chunking_params
        spans = request.spans if chunking is None else chunking.spans(len(tokens))
        whole = Ready(
            tokens,
            request.task,
            made.params,
            request.future,
            made.adapter,
            spans,
            further=made.further,
            route=made.route,
            arrival=arrival,
            flow=flow,
        )
        most = self.preparation.model.facts.max_tokens
        return chunks.pieces(request, whole, most) if len(tokens) > most else (whole,)


def _encoded(tokenizer: Tokenizer, prepared: Sequence[Prepared]) -> list[Tokens | InvalidRequest]:
    return tokenizer.encode([made.prompt for made in prepared], [made.limit for made in prepared])


def _encoded_sides(
    sides: SideTokens, tokenizer: Tokenizer, prepared: Sequence[Prepared], whole: bool
) -> list[Tokens | InvalidRequest]:
    """Texts as their side reads them; all else as it stands."""
    limits = [made.limit if made.side is None or whole else sides.limit(made.limit, made.side) for made in prepared]
    return [
        sides.finished(tokens, made.side, made.limit.add_special_tokens)
        if made.side is not None and isinstance(tokens, Tokens)
        else tokens
        for made, tokens in zip(prepared, tokenizer.encode([made.prompt for made in prepared], limits), strict=True)
    ]
