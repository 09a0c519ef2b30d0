"""Streams: prompts that come one by one, their outputs in order, and no more than two windows of them in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, get_args

from poolhouse.engine.interface import OfflineEngine
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import InvalidRequest, PoolhouseError
from poolhouse.llm.calls import Call, read_ahead
from poolhouse.llm.requests import is_of_all
from poolhouse.outputs import RequestOutput

Output = RequestOutput[Any]
OnError = Literal["raise", "return"]
# The call of a method of LLM for some prompts; its `finish` takes the answers of any of them.
Describe = Callable[[Sequence[Any]], Call[list[Any]]]


@dataclass(frozen=True, slots=True)
class Stream:
    """How the items of an iterable become outputs.

    describe: the call for some items. apart: whether each item needs a call of its own, as a pair does.
    name: what messages call an item. window: items that are asked together; twice as many are under way.
    on_error: whether what is wrong with an item is raised in its turn, or takes the place of its output.
    """

    engine: OfflineEngine
    describe: Describe
    apart: bool
    name: str
    window: int
    on_error: str

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise InvalidRequest(f"window must be a number from 1, got {self.window!r}.", "window", self.window)
        if self.on_error not in get_args(OnError):
            raise InvalidRequest(
                f"on_error must be one of {list(get_args(OnError))}, got {self.on_error!r}.", "on_error", self.on_error
            )

    def outputs(self, items: Iterable[Any]) -> Generator[Output | PoolhouseError, None, None]:
        """The output of each item, in order. Leaving it cancels what waits, and reads no more items.

        Raises:
            PoolhouseError: of an option, of a lost engine, or of an item. Otherwise what reading the items raises.
        """
        for group, futures in read_ahead(self.engine, self._groups(items), _requests):
            rest = iter(futures)
            for item in group:
                yield self._output(item, list(itertools.islice(rest, len(item.requests))))
            # Before another window is asked for.
            del group, futures, rest, item

    def _output(self, item: _Item, futures: Sequence[Future[Answer]]) -> Output | PoolhouseError:
        if item.failure is not None:
            raise item.failure
        try:
            if item.error is not None:
                raise item.error
            assert item.finish is not None
            return item.finish([future.result() for future in futures])
        except PoolhouseError as error:
            if is_of_all(error, self.engine):
                raise
            named = self._named(error, item.number)
            if self.on_error == "raise":
                raise named from None
            return named

    def _groups(self, items: Iterable[Any]) -> Iterator[list[_Item]]:
        """Windows of items. Where reading one fails, those before it have their turn first."""
        rest, first, failure = iter(items), 0, None
        while failure is None:
            own: list[Any] = []
            try:
                own.extend(itertools.islice(rest, self.window))
            except Exception as error:  # noqa: BLE001 - it is raised in its turn
                failure = error
            group = self._asked(own, first) if own else []
            if failure is not None:
                group.append(_Item(first + len(own), failure=failure))
            if not group:
                return
            first += len(own)
            del own
            yield group
            del group

    def _asked(self, own: Sequence[Any], first: int) -> list[_Item]:
        """Their requests, one by one where some of them are no prompts."""
        if self.apart and len(own) > 1:
            return self._one_by_one(own, first)
        try:
            call = self.describe(own)
        except InvalidRequest as error:
            if is_of_all(error, self.engine):
                raise
            return [_Item(first, error=error)] if len(own) == 1 else self._one_by_one(own, first)
        requests = list(call.requests)
        if self.apart:
            return [_Item(first, requests, _finish(call, requests))]
        return [_Item(first + place, (request,), _finish(call, (request,))) for place, request in enumerate(requests)]

    def _one_by_one(self, own: Sequence[Any], first: int) -> list[_Item]:
        return [item for number, one in enumerate(own, first) for item in self._asked([one], number)]

    def _named(self, error: PoolhouseError, number: int) -> PoolhouseError:
        """The error, which says of which item it is."""
        if not isinstance(error, InvalidRequest):
            return error
        where, text = f"{self.name}[{number}]", str(error)
        text = text.replace(f"{self.name}[0]", where, 1) if f"{self.name}[0]" in text else f"{where}: {text}"
        return type(error)(text, error.parameter, error.value)


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """An item: its requests and what their answers become; or what is wrong with it, or with reading it."""

    number: int
    requests: Sequence[Request] = ()
    finish: Callable[[Sequence[Answer]], Output] | None = None
    error: PoolhouseError | None = None
    failure: Exception | None = None


def _requests(group: Sequence[_Item]) -> list[Request]:
    return [request for item in group for request in item.requests]


def _finish(call: Call[list[Any]], requests: Sequence[Request]) -> Callable[[Sequence[Answer]], Output]:
    """The one output of these requests."""

    def finish(answers: Sequence[Answer]) -> Output:
        output: Output = call.finish(zip(requests, answers, strict=True))[0]
        return output

    return finish
