"""Prompts that begin alike: waiting for one batch, running once, and answered as each alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse import LLM, PoolingParams
from poolhouse.engine.queue import CallerQueue, Lead, WaitingRequest
from poolhouse.engine.request import Answer, Request
from poolhouse.engine.scheduler import Scheduler
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.tokens import Tokens
from tests.engine.test_observing import Notes
from tests.models import tiny_rerankers
from tests.models.adapters import save_adapter
from tests.models.parity import save

BUDGET = 2048
LONG, SHORT = Lead(1, 1000), Lead(2, 200)


def ready(lead: Lead | None, own: int, queue: CallerQueue) -> WaitingRequest:
    length = own + (0 if lead is None else lead.length)
    return WaitingRequest(
        Tokens(np.zeros(length, np.int64)), "embed", PoolingParams(), Future(), queue=queue, lead=lead
    )


def submission(lead: Lead | None, *owns: int, queue: CallerQueue | None = None) -> list[WaitingRequest]:
    queue = CallerQueue() if queue is None else queue
    return [ready(lead, own, queue) for own in owns]


def taken(scheduler: Scheduler, worker: int = 0) -> list[WaitingRequest]:
    batch = scheduler.next(worker, block=False)
    assert batch
    return batch


def test_documents_behind_a_long_query_fill_few_batches() -> None:
    scheduler = Scheduler(BUDGET)
    scheduler.add(submission(LONG, *[80] * 100))
    batches = [taken(scheduler), taken(scheduler)]
    # Four times as much behind the query as it is long.
    assert [len(batch) for batch in batches] == [50, 50]
    assert len(scheduler) == 0


def test_what_lies_behind_a_beginning_is_bounded() -> None:
    scheduler = Scheduler(budget=256)
    scheduler.add(submission(LONG, *[8] * 200))
    assert len(taken(scheduler)) == 2 * 256 // 8


def test_a_short_beginning_counts_once_within_the_budget() -> None:
    scheduler = Scheduler(BUDGET)
    scheduler.add(submission(SHORT, *[84] * 60))
    assert len(taken(scheduler)) == (BUDGET - 200) // 84


def test_those_that_begin_alike_go_before_those_of_equal_length() -> None:
    scheduler = Scheduler(BUDGET)
    queue = CallerQueue()
    alike = submission(SHORT, *[50, 100] * 4, queue=queue)
    others = submission(None, *[250] * 40, queue=queue)
    scheduler.add([*alike[:1], *others, *alike[1:]])
    batch = taken(scheduler)
    # 200 + 600 tokens, and four of 250 beside them.
    assert set(batch) == {*alike, *others[:4]}
    assert [one.length for one in batch] == sorted(one.length for one in batch)


def test_each_query_of_a_caller_has_its_own_batches() -> None:
    scheduler = Scheduler(BUDGET)
    queue = CallerQueue()
    queries = [submission(Lead(number, 300), *[100] * 17, queue=queue) for number in range(3)]
    scheduler.add([request for three in zip(*queries, strict=True) for request in three])
    assert [set(taken(scheduler)) for _ in queries] == [set(query) for query in queries]


def test_a_cancelled_one_is_left_out_once() -> None:
    scheduler = Scheduler(BUDGET)
    requests = submission(SHORT, *[60] * 6)
    other = submission(None, 260)
    for request in (requests[0], requests[3]):
        request.future.cancel()
    scheduler.add([*requests, *other])
    assert set(taken(scheduler)) == {*requests[1:3], *requests[4:], *other}
    assert len(scheduler) == 0


def test_two_free_workers_share_the_documents_of_a_query() -> None:
    scheduler = Scheduler(BUDGET, workers=2)
    scheduler.add(submission(SHORT, *[80] * 20))
    assert len(taken(scheduler, 0)) == 10
    assert len(taken(scheduler, 1)) == 10


def test_a_caller_pays_for_what_runs() -> None:
    scheduler = Scheduler(BUDGET)
    reranking, texts = submission(LONG, *[80] * 200), submission(None, *[400] * 100)
    scheduler.add([*reranking, *texts])
    served = [taken(scheduler) for _ in range(6)]
    # Batches of 1000 + 4000 tokens, and of 2000: the texts have their turn after each.
    assert sum(one.lead is not None for batch in served for one in batch) >= 100
    assert sum(one.lead is None for batch in served for one in batch) >= 10


def test_other_callers_and_priorities_wait_as_before() -> None:
    scheduler = Scheduler(BUDGET)
    scheduler.add(submission(SHORT, *[80] * 500))
    taken(scheduler)
    late = submission(None, 90)
    scheduler.add(late)
    urgent = submission(SHORT, 80, queue=CallerQueue(-1))
    scheduler.add(urgent)
    assert taken(scheduler) == urgent
    assert any(late[0] in taken(scheduler) for _ in range(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    save(folder, "Qwen3", tiny_rerankers.TINY | {"vocab_size": 520})
    tiny_rerankers.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("law")
    save_adapter(folder, made, "Qwen3Model")
    return made


@pytest.fixture(scope="module")
def llm(folder: Path, adapter: Path) -> Iterator[LLM]:
    with LLM(str(folder), lora_modules={"law": str(adapter)}, lanes=1, pooler_config={"pooling_type": "LAST"}) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(folder: Path, adapter: Path) -> Iterator[LLM]:
    options: Any = {"pooler_config": {"pooling_type": "LAST"}, "enable_prefix_caching": False}
    with LLM(str(folder), lora_modules={"law": str(adapter)}, lanes=1, **options) as llm:
        yield llm


RANDOM = np.random.default_rng(0)
QUERIES = [RANDOM.integers(5, 500, length) for length in (100, 60)]


def requests() -> list[Request]:
    """Of two queries and of none, with and without an adapter, of several tasks, with spans, and two priorities."""

    def prompt(query: int, length: int) -> Prompt:
        own = RANDOM.integers(5, 500, length)
        return Prompt(None, own if query < 0 else np.concatenate([QUERIES[query], own]))

    made: list[Request] = []
    for number in range(40):
        options: dict[str, Any] = {"adapter": "law"} if number % 5 == 1 else {}
        if number % 7 == 2:
            options["spans"] = np.array([[0, 3], [2, 59]])
        elif number % 7 == 4:
            options["further"] = ("embed",)
        task: Any = "token_embed" if number % 7 in (2, 3, 4) else "embed"
        made.append(Request(prompt(number % 3 - 1, 60 + number % 4), task, priority=number % 11 == 0, **options))
    return made


def answers(llm: LLM, requests: list[Request]) -> list[Answer]:
    return [future.result(60) for future in llm.engine.submit(requests)]


def test_mixed_batches_answer_as_each_prompt_alone(llm: LLM, plain: LLM) -> None:
    notes, made = Notes(), requests()
    llm.engine.observe(notes)
    shared = answers(llm, made)
    llm.engine.observe(None)
    assert sum(batch.computed for batch in notes.batches) < 0.8 * sum(batch.tokens for batch in notes.batches)
    # What is counted for callers is what they asked.
    assert sum(batch.tokens for batch in notes.batches) == sum(len(answer.tokens) for answer in shared)
    for request, answer in zip(made, shared, strict=True):
        again = Request(
            request.prompt, request.task, adapter=request.adapter, spans=request.spans, further=request.further
        )
        (alone,) = answers(plain, [again])
        assert len(alone.tokens) == len(answer.tokens)
        for ours, theirs in zip(
            (answer.array, *answer.further.values()), (alone.array, *alone.further.values()), strict=True
        ):
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() < 1e-5


def test_it_can_be_switched_off(plain: LLM) -> None:
    notes = Notes()
    plain.engine.observe(notes)
    answers(plain, requests())
    plain.engine.observe(None)
    assert all(batch.computed == batch.tokens for batch in notes.batches)
    assert all(request.lead is None for request in plain.engine._intake.waiting(requests(), queues()))


def queues() -> dict[int, CallerQueue]:
    return {0: CallerQueue(0), 1: CallerQueue(1)}


def test_requests_of_one_call_know_what_they_begin_with(llm: LLM) -> None:
    waiting = llm.engine._intake.waiting(requests(), queues())
    leads = {(request.lead, request.adapter) for request in waiting if request.lead is not None}
    # In steps of eight tokens; the shorter query with the adapter is that of two prompts, and saves too little.
    assert {(lead.length, adapter) for lead, adapter in leads if lead} == {(56, None), (96, None), (96, "law")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reranker_scores_the_same_with_and_without_sharing(dtype: str, tmp_path: Path) -> None:
    tiny_rerankers.save(tmp_path, "Qwen3")
    tiny_rerankers.card(tmp_path, base_model=["Qwen/Qwen3-Reranker-0.6B"])
    query, documents = "What is the capital of France? " * 9, tiny_rerankers.DOCUMENTS * 5
    notes, scores = Notes(), []
    for sharing in (True, False):
        with LLM(str(tmp_path), dtype=dtype, prefix_sharing=sharing) as llm:
            llm.engine.observe(notes)
            scores.append([output.outputs.score for output in llm.score(query, documents)])
    assert sum(batch.computed for batch in notes.batches) < 0.8 * sum(batch.tokens for batch in notes.batches)
    # As packs and texts alone in these types: logits of 30 are rounded to 1/8 in bfloat16.
    assert np.abs(np.subtract(*scores)).max() < (1e-5 if dtype == "float32" else 0.04)
