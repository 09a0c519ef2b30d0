"""Intake: requests checked, tokenised and made ready to wait for their batch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from poolhouse.engine import chunks
from poolhouse.engine.observing import Observer
from poolhouse.engine.preparation import Preparation, Prepared
from poolhouse.engine.ready import Arrival, Flow, Ready
from poolhouse.engine.request import Request, fail, start
from poolhouse.errors import InvalidRequest
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.tokens import Tokens


class Intake:
    """Makes requests ready, many per call of the tokenizer; safe from several threads at once."""

    def __init__(self, preparation: Preparation, tokenizer: Tokenizer) -> None:
        self.preparation = preparation
        self.tokenizer = tokenizer
        self.observer: Observer | None = None

    def ready(self, requests: Sequence[Request], flows: Mapping[int, Flow]) -> list[Ready]:
        """What is to be run; requests that cannot be answered fail here. flows: those of one `submit`, by priority."""
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
        encoded = self.tokenizer.encode([made.prompt for _, made in valid], [made.limit for _, made in valid])
        seconds = time.perf_counter() - begun
        if self.observer is not None:
            self.observer.tokenized(len(valid), seconds)
        arrival = Arrival(flows[valid[0][0].priority].submitted, seconds)
        ready: list[Ready] = []
        for (request, made), tokens in zip(valid, encoded, strict=True):
            if isinstance(tokens, InvalidRequest):
                fail(request.future, tokens)
            elif len(tokens) == 0:
                fail(request.future, InvalidRequest("The prompt has no tokens.", "prompt"))
            else:
                ready.extend(self._pieces(request, made, tokens, arrival, flows[request.priority]))
        return ready

    def _pieces(
        self, request: Request, made: Prepared, tokens: Tokens, arrival: Arrival, flow: Flow
    ) -> Sequence[Ready]:
        """One, or several for a prompt that is longer than the model reads at once."""
        whole = Ready(
            tokens,
            request.task,
            made.params,
            request.future,
            made.adapter,
            request.spans,
            further=made.further,
            arrival=arrival,
            flow=flow,
        )
        most = self.preparation.model.facts.max_tokens
        return chunks.pieces(request, whole, most) if len(tokens) > most else (whole,)
