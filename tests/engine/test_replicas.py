"""Replicas: real processes that are killed, poisoned, renewed and orphaned, against the engine of one process."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poolhouse import (
    LLM,
    CheckpointError,
    ConfigError,
    EngineClosed,
    EngineError,
    InvalidRequest,
    LoRARequest,
    PoolingParams,
)
from poolhouse.engine import process, replicas
from poolhouse.engine.interface import Replicated
from poolhouse.engine.observing import BatchRun
from poolhouse.engine.replicas import Replicas
from poolhouse.engine.request import Answer, Request
from poolhouse.inputs.prompts import Conversation, Prompt
from poolhouse.outputs import Array
from poolhouse.settings import Settings
from tests import test_adapters
from tests.checkpoints import save_checkpoint

TEXTS = [("the moon pulls the sea " * (1 + number % 9))[: 5 + 7 * (number % 23)] for number in range(300)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("replicas")
    save_checkpoint(folder, "bert, wordpiece")
    return str(folder)


@pytest.fixture(scope="module")
def alone(checkpoint: str) -> Iterator[LLM]:
    with LLM(checkpoint, overflow="truncate") as llm:
        yield llm


@pytest.fixture(scope="module")
def llm(checkpoint: str) -> Iterator[LLM]:
    with LLM(checkpoint, replicas=2, overflow="truncate") as llm:
        yield llm


def engine_of(llm: LLM) -> Replicas:
    assert isinstance(llm.engine, Replicas)
    return llm.engine


def children() -> set[int]:
    """The processes that this one has started and that are not gone, zombies too."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name_and_rest = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(name_and_rest[1]) == os.getpid():
            found.add(int(path.parent.name))
    return found


def pids(llm: LLM) -> list[int]:
    """The processes of its replicas, by their number."""
    slots = engine_of(llm)._slots
    return [slot.replica.process.pid for slot in slots if slot.replica is not None]


def eventually(true: Callable[[], bool], what: str) -> None:
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError(f"It never came true that {what}.")


def all_up(llm: LLM) -> bool:
    return all(state.up for state in engine_of(llm).states)


def vectors(llm: LLM, texts: list[str] = TEXTS) -> Array:
    array = llm.embed_array(texts, use_tqdm=False)
    assert isinstance(array, np.ndarray)
    return array


# --- As one process ---


def test_answers_are_those_of_one_process(llm: LLM, alone: LLM) -> None:
    np.testing.assert_allclose(vectors(llm), vectors(alone), atol=2e-6)
    for one, other in zip(llm.embed(TEXTS, use_tqdm=False), alone.embed(TEXTS, use_tqdm=False), strict=True):
        assert one.prompt_token_ids == other.prompt_token_ids
        assert (one.truncated, one.original_tokens) == (other.truncated, other.original_tokens)
    rows = [each.encode(TEXTS[:40], pooling_task="token_embed", use_tqdm=False) for each in (llm, alone)]
    for mine, theirs in zip(*rows, strict=True):
        np.testing.assert_allclose(mine.outputs.array, theirs.outputs.array, atol=2e-5)
    chunks = [each.embed_chunks(TEXTS[8], chunk_size=5)[0] for each in (llm, alone)]
    for own, reference in zip(chunks[0].outputs, chunks[1].outputs, strict=True):
        np.testing.assert_allclose(own.array, reference.array, atol=2e-6)
    ours, theirs_scores = (each.score("the moon", TEXTS[:9]) for each in (llm, alone))
    assert [one.outputs.score for one in ours] == pytest.approx([one.outputs.score for one in theirs_scores], abs=1e-5)


def test_both_replicas_work_and_are_observed(llm: LLM) -> None:
    class Seen:
        texts = tokens = 0

        def tokenized(self, texts: int, seconds: float) -> None:
            self.texts += texts

        def ran(self, batch: BatchRun) -> None:
            self.tokens += batch.tokens

    seen = Seen()
    engine_of(llm).observe(seen)
    requests = [Request(Prompt(text), "embed") for text in TEXTS]
    futures = llm.engine.submit(requests)
    loads = {state.number: state.outstanding for state in engine_of(llm).states}
    expected = sum(len(future.result().tokens) for future in futures)
    assert min(loads.values()) > len(TEXTS) // 3, loads
    eventually(lambda: seen.tokens == expected, "all batches were seen")
    assert seen.texts == len(TEXTS)
    engine_of(llm).observe(None)


def test_the_facts_and_what_reads_tokens_are_there(llm: LLM, alone: LLM) -> None:
    assert replace(llm.engine.facts) == replace(alone.engine.facts)
    request = Request(Prompt(TEXTS[7]), "embed")
    (tokens,), (expected,) = llm.engine.tokenize([request]), alone.engine.tokenize([request])
    np.testing.assert_array_equal(tokens.ids, expected.ids)
    assert llm.engine.detokenize(tokens.ids.tolist()) == alone.engine.detokenize(tokens.ids.tolist())
    assert llm.engine.token_strings([5, 6]) == alone.engine.token_strings([5, 6])
    params = PoolingParams(truncate_prompt_tokens=9)
    assert llm.engine.limit(params) == alone.engine.limit(params)
    assert llm.engine.running == 0
    assert "2 replicas" in repr(llm)
    with pytest.raises(InvalidRequest, match="out of vocabulary"):
        llm.engine.detokenize([99_999])


def test_wrong_prompts_fail_alone_with_their_own_errors(llm: LLM, alone: LLM) -> None:
    wrong: list[Any] = [TEXTS[0], [99_999], TEXTS[1]]
    messages = []
    for each in (llm, alone):
        with pytest.raises(InvalidRequest) as raised:
            each.embed(wrong)
        messages.append((str(raised.value), raised.value.parameter))
    assert messages[0] == messages[1]
    assert len(llm.embed(TEXTS[:2])) == 2


class Unpicklable:
    def __reduce__(self) -> Any:
        raise ValueError("this one stays here")


def test_what_cannot_be_sent_fails_alone(llm: LLM) -> None:
    requests = [Request(Prompt(text), "embed") for text in TEXTS[:3]]
    requests.insert(1, Request(Prompt(None, conversation=Conversation(Unpicklable())), "embed"))
    llm.engine.submit(requests)
    for index, request in enumerate(requests):
        if index == 1:
            with pytest.raises(InvalidRequest, match="cannot be sent to a replica: this one stays here"):
                request.future.result(60)
        else:
            assert request.future.result(60).array.shape == (32,)
    with pytest.raises(InvalidRequest, match="this one stays here"):
        llm.engine.tokenize([requests[1]])


def test_threads_and_coroutines_ask_at_once(llm: LLM, alone: LLM) -> None:
    expected = vectors(alone)

    def ask(number: int) -> bool:
        own = TEXTS[number * 10 : number * 10 + 40]
        return bool(np.abs(vectors(llm, own) - expected[number * 10 : number * 10 + 40]).max() < 2e-6)

    async def many() -> list[Array]:
        asked = [llm.embed_async(text) for text in TEXTS]
        return [output[0].outputs.array for output in await asyncio.gather(*asked)]

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, number % 25) for number in range(60)]
        np.testing.assert_allclose(asyncio.run(many()), expected, atol=2e-6)
        assert all(one.result() for one in asked)
    assert llm.engine.pending == 0


def test_cancelled_requests_leave_and_lower_priorities_go_first(llm: LLM) -> None:
    many = [Request(Prompt(text), "embed", priority=5) for text in TEXTS * 20]
    urgent = [Request(Prompt(text), "embed", priority=-1) for text in TEXTS[:2]]
    futures = llm.engine.submit(many)
    llm.engine.submit(urgent)
    for request in urgent:
        request.future.result(60)
    assert llm.engine.pending > len(many) // 2, "urgent ones were answered behind most others"
    for future in futures:
        future.cancel()
    assert not wait(futures, 60).not_done
    assert llm.engine.pending == 0
    eventually(lambda: llm.engine.running == 0, "nothing runs")
    assert all(state.outstanding == 0 for state in engine_of(llm).states)
    assert sum(future.cancelled() for future in futures) > len(many) // 2


def test_a_copy_has_replicas_of_its_own(llm: LLM) -> None:
    for attempt in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match="Pickle their LLM"):
            attempt(llm.engine)  # type: ignore[operator]
    with pickle.loads(pickle.dumps(llm)) as again:
        assert again.engine is not llm.engine
        np.testing.assert_allclose(vectors(again, TEXTS[:20]), vectors(llm, TEXTS[:20]), atol=2e-6)
        assert not set(pids(again)) & set(pids(llm))
    assert llm.engine.alive


def test_the_model_itself_is_elsewhere(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="replicas=2: the model is in other processes"):
        _ = llm.model


def test_cores_are_divided(llm: LLM) -> None:
    cores = sorted(os.sched_getaffinity(0))
    found = [sorted(os.sched_getaffinity(pid)) for pid in pids(llm)]
    if len(cores) > 1:
        assert sorted(found[0] + found[1]) == cores
    else:
        assert found == [cores, cores]


# --- Death ---


def test_a_killed_replica_loses_no_request(checkpoint: str, alone: LLM) -> None:
    with LLM(checkpoint, replicas=2, overflow="truncate") as llm:
        expected = vectors(alone)
        for victim in (1, 0):
            futures = llm.engine.submit([Request(Prompt(text), "embed") for text in TEXTS * 10])
            before = pids(llm)
            os.kill(before[victim], signal.SIGKILL)
            found = np.stack([future.result(60).array for future in futures])
            np.testing.assert_allclose(found, np.tile(expected, (10, 1)), atol=2e-6)
            eventually(lambda: all_up(llm), "both are up again")
            after = pids(llm)
            assert after[1 - victim] == before[1 - victim]
            assert after[victim] != before[victim]
        assert [state.restarts for state in engine_of(llm).states] == [1, 1]
        np.testing.assert_allclose(vectors(llm), expected, atol=2e-6)
        assert children() >= set(pids(llm))
        when_all_are_down_requests_wait_and_the_reason_is_known(llm)


def when_all_are_down_requests_wait_and_the_reason_is_known(llm: LLM) -> None:
    engine = engine_of(llm)
    assert isinstance(engine, Replicated)
    assert engine.trouble is None
    for pid in pids(llm):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: engine.trouble is not None, "both are down")
    assert engine.trouble == "replica 0 was killed by SIGKILL; replica 1 was killed by SIGKILL"
    assert engine.alive
    assert [state.up for state in engine.states] == [False, False]
    cancelled, kept = engine.submit([Request(Prompt(text), "embed") for text in TEXTS[:2]])
    assert cancelled.cancel()
    with pytest.raises(EngineError, match="No replica is up: replica 0 was killed"):
        engine.tokenize([Request(Prompt("a"), "embed")])
    assert kept.result(60).array.shape == (32,)
    eventually(lambda: engine.trouble is None and all_up(llm), "both are up again")


def test_an_adapter_that_a_request_brings_is_there_after_a_death_too(tmp_path: Path) -> None:
    expected = test_adapters.save_adapter(tmp_path, 0)
    adapter = LoRARequest("sea", 1, str(tmp_path))
    with LLM(replicas=2) as llm:
        assert np.abs(vectors(llm, test_adapters.TEXTS) - expected).max() > 0.01
        np.testing.assert_allclose(llm.embed_array(test_adapters.TEXTS, lora_request=adapter), expected, atol=1e-5)
        for pid in pids(llm):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: engine_of(llm).trouble is not None, "both are down")
        # By its name alone, which the new processes know.
        again = llm.engine.submit([Request(Prompt(text), "embed", adapter="sea") for text in test_adapters.TEXTS])
        np.testing.assert_allclose(np.stack([one.result(60).array for one in again]), expected, atol=1e-5)
        with pytest.raises(InvalidRequest, match="There is an adapter 'sea'"):
            llm.embed("a", lora_request=LoRARequest("sea", 2, str(tmp_path.parent)))


class Poison:
    """Ends the process that reads it."""

    def __reduce__(self) -> Any:
        return signal.raise_signal, (signal.SIGKILL,)


def test_poison_kills_two_replicas_and_no_third(checkpoint: str) -> None:
    with LLM(checkpoint, replicas=2, overflow="truncate") as llm:
        engine = engine_of(llm)
        innocent = engine.submit([Request(Prompt(text), "embed") for text in TEXTS])
        poison = Request(Prompt(None, conversation=Conversation(Poison())), "embed")
        engine.submit([poison])
        with pytest.raises(EngineError, match=r"Two replicas died while they had this request.*SIGKILL"):
            poison.future.result(60)
        # Those that were tried again beside it may share its end, and no others.
        ends = [future.exception(60) for future in innocent]
        failed = [error for error in ends if error is not None]
        assert len(failed) < 8
        assert all("Two replicas died" in str(error) for error in failed)
        eventually(lambda: all_up(llm), "both are up again")
        assert sum(state.restarts for state in engine.states) == 2
        assert vectors(llm).shape == (len(TEXTS), 32)


def test_what_cannot_be_started_again_ends_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece")
    monkeypatch.setattr(replicas, "_MAX_FAILED_STARTS", 2)
    with LLM(str(tmp_path), replicas=2) as llm:
        engine = engine_of(llm)
        told: list[EngineError] = []
        engine.on_fatal(told.append)
        (tmp_path / "config.json").write_text("{")
        for pid in pids(llm):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: engine.trouble is not None, "both are down")
        (future,) = engine.submit([Request(Prompt("a"), "embed")])
        with pytest.raises(EngineError, match=r"No replica can be started: replica 0 .*config\.json"):
            future.result(120)
        eventually(lambda: bool(told), "it was told")
        assert not engine.alive
        assert told == [engine.fatal]
        with pytest.raises(EngineError, match="No replica can be started"):
            llm.embed("a")
    assert "Next try in" in caplog.text


# --- Renewal ---


def test_a_rolling_restart_loses_no_request(checkpoint: str, alone: LLM) -> None:
    with LLM(checkpoint, replicas=2, overflow="truncate") as llm:
        expected, before, ended = vectors(alone), pids(llm), threading.Event()

        def load() -> int:
            rounds = 0
            while not ended.is_set():
                np.testing.assert_allclose(vectors(llm), expected, atol=2e-6)
                rounds += 1
                # New replicas need the cores too, to start.
                time.sleep(0.05)
            return rounds

        with ThreadPoolExecutor(4) as pool:
            loads = [pool.submit(load) for _ in range(4)]
            try:
                engine_of(llm).restart()
            finally:
                ended.set()
            assert all(one.result() > 0 for one in loads)
        after = pids(llm)
        assert len(after) == 2
        assert not set(before) & set(after)
        assert [state.restarts for state in engine_of(llm).states] == [0, 0]
        eventually(lambda: not set(before) & children(), "the old ones are gone")


def test_where_memory_is_short_the_old_one_goes_first(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, alone: LLM
) -> None:
    with LLM(checkpoint, replicas=2, overflow="truncate") as llm:
        before = pids(llm)
        most: list[int] = []
        launch = Replicas._launch

        def counted(self: Replicas, slot: Any) -> Any:
            most.append(len(self._alive))
            return launch(self, slot)

        monkeypatch.setattr(Replicas, "_launch", counted)
        monkeypatch.setattr(process, "spare_memory", lambda: 1)
        engine_of(llm).restart()
        assert most == [1, 1]
        assert not set(before) & set(pids(llm))
        np.testing.assert_allclose(vectors(llm), vectors(alone), atol=2e-6)


def test_files_that_broke_leave_the_old_ones_at_work(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece")
    with LLM(str(tmp_path), replicas=2) as llm:
        before = pids(llm)
        # Not in place: the old ones have the weights mapped.
        (tmp_path / "new").write_bytes(b"no weights")
        (tmp_path / "new").replace(tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="safetensors"):
            engine_of(llm).restart()
        assert pids(llm) == before
        assert llm.embed("the moon")[0].outputs.array.shape == (32,)


# --- The end ---


def test_closing_answers_what_was_accepted_and_leaves_nothing(checkpoint: str) -> None:
    open_files, running, threads = set(Path("/proc/self/fd").iterdir()), children(), set(threading.enumerate())
    llm = LLM(checkpoint, replicas=2, overflow="truncate")
    futures = llm.engine.submit([Request(Prompt(text), "embed") for text in TEXTS * 4])
    llm.close()
    assert all(future.result(0).array.shape == (32,) for future in futures)
    assert children() == running
    assert set(Path("/proc/self/fd").iterdir()) == open_files
    with pytest.raises(EngineClosed, match=r"^The engine is shut down\.$"):
        llm.embed("a")
    llm.close()
    assert not [thread for thread in set(threading.enumerate()) - threads if "replica" in thread.name]


def test_without_time_to_drain_the_rest_is_told(checkpoint: str) -> None:
    llm = LLM(checkpoint, replicas=2, overflow="truncate")
    futures = llm.engine.submit([Request(Prompt(text), "embed") for text in TEXTS * 40])
    llm.engine.close(0)
    ends: list[BaseException | None] = [future.exception(0) for future in futures]
    assert any(isinstance(error, EngineClosed) for error in ends)
    assert all(error is None or isinstance(error, EngineClosed) for error in ends)


def test_an_llm_that_is_let_go_ends_its_replicas(checkpoint: str) -> None:
    running = children()
    llm = LLM(checkpoint, replicas=2)
    vectors(llm, ["a"])
    assert len(children() - running) == 2
    del llm
    eventually(lambda: children() == running, "they are gone")


PROGRAM = """
import os, signal, sys, threading, time
from poolhouse import LLM
TEXTS = ["the moon", "the sea " * 9, "bread"] * 40
llm = LLM(MODEL, replicas=2)
vectors = llm.embed_array(TEXTS, use_tqdm=False)
assert vectors.shape == (120, 32)
print(*(replica.process.pid for replica in llm.engine._alive), flush=True)
"""
ENDINGS = {
    "left open": ("", 0),
    "in a daemon thread that goes on": (
        """
        def loop():
            while True:
                llm.embed(TEXTS, use_tqdm=False)
        threading.Thread(target=loop, daemon=True).start()
        time.sleep(0.3)
        """,
        0,
    ),
    "forked": (
        """
        child = os.fork()
        if child == 0:
            try:
                llm.embed("the moon")
            except Exception as error:
                assert "was forked from the one that started the replicas" in str(error), error
                llm.close()
                sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert len(llm.embed(TEXTS, use_tqdm=False)) == len(TEXTS)
        """,
        0,
    ),
    "killed amid work": (
        """
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        while True:
            llm.embed(TEXTS, use_tqdm=False)
        """,
        -9,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_script_without_a_main_guard_ends_and_its_replicas_with_it(
    checkpoint: str, tmp_path: Path, ending: str
) -> None:
    ends, status = ENDINGS[ending]
    script = tmp_path / "script.py"
    script.write_text(f"MODEL = {checkpoint!r}\n{PROGRAM}{textwrap.dedent(ends)}")
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (status, "")
    replicas_of_it = [Path(f"/proc/{pid}") for pid in done.stdout.split()]
    assert len(replicas_of_it) == 2
    eventually(lambda: not any(path.exists() for path in replicas_of_it), "they are gone")


# --- Settings ---


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such model": ({"model": "/no/such/model"}, "/no/such/model"),
    "an option that does not fit": ({"max_model_len": 100_000}, "max_model_len"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_told_as_in_one_process(checkpoint: str, case: str) -> None:
    options, words = WRONG[case]
    errors = []
    running = children()
    for count in (1, 2):
        with pytest.raises((ConfigError, CheckpointError), match=words) as raised:
            LLM(**{"model": checkpoint, **options}, replicas=count)
        errors.append((type(raised.value), str(raised.value)))
    assert errors[0] == errors[1]
    assert children() == running


def smoother(config: dict[str, object]) -> dict[str, object]:
    return {**config, "layer_norm_eps": 1.0}


def test_functions_go_along_where_they_can_be_imported(checkpoint: str) -> None:
    with pytest.raises(ConfigError, match="hf_overrides must stand in a module"):
        LLM(checkpoint, replicas=2, hf_overrides=lambda config: {})
    with LLM(checkpoint, replicas=2, hf_overrides=smoother) as two, LLM(checkpoint, hf_overrides=smoother) as one:
        np.testing.assert_allclose(vectors(two, TEXTS[:9]), vectors(one, TEXTS[:9]), atol=2e-6)


@pytest.mark.parametrize("value", [0, -1, "many", 257, 1.5, True])
def test_replicas_are_a_number_or_auto(value: object) -> None:
    with pytest.raises(ConfigError, match="replicas: possible are numbers from 1 to 256, and 'auto'"):
        Settings.parse(replicas=value)


def test_vllms_name_means_the_same() -> None:
    assert Settings.parse(data_parallel_size="3").replicas == 3
    assert Settings.parse(replicas="auto").replicas == "auto"


PLACES = [
    ("auto", "auto", 2, ["cuda:0", "cuda:1"]),
    (5, "cuda", 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]),
    (2, "cuda:1", 4, ["cuda:1", "cuda:1"]),
    (3, "cpu", 4, ["cpu", "cpu", "cpu"]),
    ("auto", "cpu", 4, ["cpu", "cpu"]),
]


@pytest.mark.parametrize(("count", "device", "gpus", "expected"), PLACES)
def test_each_replica_has_its_device(
    monkeypatch: pytest.MonkeyPatch, count: Any, device: str, gpus: int, expected: list[str]
) -> None:
    monkeypatch.setattr(replicas, "_gpus", lambda: gpus)
    monkeypatch.setattr(process, "usable_cores", lambda: 16)
    found: list[str] = []

    def started(settings: Settings, count: int, gpus: int) -> Any:
        slots = replicas._slots(settings, count, gpus)
        found.extend(slot.settings.device for slot in slots)
        assert all(slot.settings.replicas == 1 and bool(slot.cores) == (device == "cpu") for slot in slots)

    monkeypatch.setattr(replicas, "Replicas", started)
    replicas.start_engine(Settings.parse(replicas=count, device=device))
    assert found == expected


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8, 20])
def test_all_cores_are_shared_out_evenly(monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    monkeypatch.setattr(process, "_affinity", lambda: [0, 1, 2, 3, 8, 9, 10, 11])
    # As on a machine whose cores have two threads each: 0 and 8 are one core.
    monkeypatch.setattr(process, "_place_of", lambda core: (0, core % 8, core))
    shares = process.shares_of_cores(processes)
    assert len(shares) == processes
    if processes <= 8:
        assert sorted(core for share in shares for core in share) == [0, 1, 2, 3, 8, 9, 10, 11]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    else:
        assert {core for share in shares for core in share} == {0, 1, 2, 3, 8, 9, 10, 11}
    if processes == 4:
        assert shares == [(0, 8), (1, 9), (2, 10), (3, 11)]


def test_futures_of_other_kinds_are_not_waited_for_twice(llm: LLM) -> None:
    """One request object that is submitted twice ends once."""
    request = Request(Prompt("the moon"), "embed")
    future: Future[Answer] = request.future
    llm.engine.submit([request])
    llm.engine.submit([request])
    assert future.result(60).array.shape == (32,)
    eventually(lambda: llm.engine.pending == 0, "nothing is pending")
