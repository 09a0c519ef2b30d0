"""LLMs in other processes: forked, pickled, copied; and what is left when the interpreter ends.

Each situation is a program of its own, as users write it.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from poolhouse import LLM, EngineClosed, SparseVector, errors
from tests.checkpoints import save_checkpoint

START = """
import os, signal, sys, threading, time, warnings
signal.alarm(100)
warnings.simplefilter("ignore")
import numpy as np
from poolhouse import LLM
TEXTS = ["the moon", "the sea " * 9, "bread"] * 40
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("processes")
    save_checkpoint(folder, "bert, wordpiece")
    return str(folder)


def ran(checkpoint: str, program: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A program, run to its end; MODEL is its model."""
    file = folder / "program.py"
    file.write_text(START + f"MODEL = {checkpoint!r}\n" + textwrap.dedent(program))
    return subprocess.run(
        [sys.executable, str(file)],
        check=False,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


FORKS = """
llm = LLM(MODEL)
expected = llm.embed_array(TEXTS, use_tqdm=False)
blocks = llm.embed_tokens_in_blocks(TEXTS, prompts_per_block=40)
next(blocks)
closed = LLM(MODEL)
closed.close()
ended = False

def busy():
    while not ended:
        llm.embed(TEXTS, use_tqdm=False)

threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()

def child(number):
    assert llm.engine.alive and llm.engine.pending == 0 and llm.engine.fatal is None
    if number == 0:  # never asked
        llm.close()
        return
    assert np.abs(llm.embed_array(TEXTS, use_tqdm=False) - expected).max() < 1e-5
    assert np.abs(llm.embed_array(TEXTS[:1], use_tqdm=False) - expected[:1]).max() < 1e-5
    import asyncio
    assert len(asyncio.run(llm.embed_async(TEXTS))) == len(TEXTS)
    if number == 1:
        from poolhouse import EngineClosed, EngineError
        for ask, error, words in (
            (lambda: next(blocks), EngineError, "forked"), (lambda: closed.embed("x"), EngineClosed, "shut down")
        ):
            try:
                ask()
            except error as refusal:
                assert words in str(refusal), refusal
            else:
                raise AssertionError(words)
        llm.close()

for number in range(4):
    process = os.fork()
    if process == 0:
        signal.alarm(60)
        child(number)
        sys.exit(0)
    if os.waitpid(process, 0)[1] != 0:
        os._exit(1)
ended = True
for thread in threads:
    thread.join()
assert np.abs(llm.embed_array(TEXTS, use_tqdm=False) - expected).max() < 1e-5
assert sum(len(block) for block in blocks) == 80
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize("parallelism", ["true", None], ids=["tokenizers told to be parallel", "told nothing"])
def test_a_forked_llm_answers_also_when_it_was_busy(checkpoint: str, tmp_path: Path, parallelism: str | None) -> None:
    environment = {} if parallelism is None else {"TOKENIZERS_PARALLELISM": parallelism}
    done = ran(checkpoint, FORKS, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_pools_of_processes_take_an_llm_and_its_methods(checkpoint: str, tmp_path: Path) -> None:
    done = ran(
        checkpoint,
        """
        from concurrent.futures import ProcessPoolExecutor
        import multiprocessing

        def embed(llm):
            return llm.embed_array(TEXTS, use_tqdm=False), id(llm.engine)

        if __name__ == "__main__":
            llm = LLM(MODEL)
            expected = llm.embed_array(TEXTS, use_tqdm=False)
            for method in ("fork", "spawn"):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
                    answers = list(pool.map(embed, [llm] * 3))
                    assert all(np.abs(got - expected).max() < 1e-5 for got, _ in answers)
                    assert len({engine for _, engine in answers}) == 1, "the model is opened once per process"
                    assert np.abs(pool.submit(llm.embed, "the moon").result()[0].outputs.array - expected[0]).max() < 1e-5
                    try:
                        pool.submit(llm.embed, [3.5]).result()
                    except ValueError as error:
                        assert "prompts[0]" in str(error)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_copy_opens_the_model_again_where_it_is_used(checkpoint: str) -> None:
    with LLM(checkpoint, overflow="truncate") as llm:
        expected = llm.embed_array(["the moon"])
        one, other = pickle.loads(pickle.dumps(llm)), copy.deepcopy(llm)
        assert one.settings == llm.settings
        np.testing.assert_allclose(one.embed_array(["the moon"]), expected, atol=1e-6)
        assert one.engine is other.engine
        assert one.engine is not llm.engine
        one.close()
        with pytest.raises(EngineClosed):
            one.embed("the moon")
        np.testing.assert_allclose(llm.embed_array(["the moon"]), expected, atol=1e-6)
        with pickle.loads(pickle.dumps(other)) as again:
            assert again.embed("the moon")[0].request_id == "0"
        copy.copy(llm).close()  # of one that was never used


def test_an_engine_says_what_to_pickle_instead(checkpoint: str) -> None:
    with LLM(checkpoint) as llm:
        for attempt in (pickle.dumps, copy.deepcopy, copy.copy):
            with pytest.raises(TypeError, match=r"Pickle its LLM"):
                attempt(llm.engine)  # type: ignore[operator]


def every_error(kind: type[errors.PoolhouseError]) -> list[type[errors.PoolhouseError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in every_error(child))]


@pytest.mark.parametrize("kind", every_error(errors.PoolhouseError))
def test_errors_come_back_from_other_processes(kind: type[errors.PoolhouseError]) -> None:
    """A pool whose worker raises an error that cannot be unpickled waits for ever."""
    error = kind("what is wrong")
    error.__dict__["note"] = 1
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.__dict__) == (kind, str(error), error.__dict__)


def test_sparse_vectors_are_pickled_with_the_names_of_their_entries() -> None:
    names = {3: "moon", 5: "sea"}
    vector = SparseVector(np.array([3, 5]), np.array([1.0, 2.0], np.float32), lambda ids: [names[i] for i in ids])
    again = pickle.loads(pickle.dumps(vector))
    assert again.as_tokens() == vector.as_tokens() == {"moon": 1.0, "sea": 2.0}
    unnamed = SparseVector(np.array([3]), np.array([1.0], np.float32))
    assert pickle.loads(pickle.dumps(unnamed)).as_dict() == {3: 1.0}


ENDINGS = {
    "left open": ("llm.embed(TEXTS, use_tqdm=False)", 0),
    "in a thread that goes on": (
        "threading.Thread(target=lambda: [llm.embed(TEXTS, use_tqdm=False) for _ in range(20)]).start()",
        0,
    ),
    "in daemon threads that never end": (
        """
        def loop():
            while True:
                llm.embed(TEXTS * 3, use_tqdm=False)
        for _ in range(3):
            threading.Thread(target=loop, daemon=True).start()
        time.sleep(0.3)
        """,
        0,
    ),
    "amid the blocks of a corpus": (
        "blocks = llm.embed_tokens_in_blocks(TEXTS, prompts_per_block=10)\nnext(blocks)",
        0,
    ),
    "sys.exit": ("sys.exit(3)", 3),
    "a cancelled coroutine": (
        """
        import asyncio
        async def main():
            asyncio.create_task(llm.embed_async(TEXTS * 100))
            await asyncio.sleep(0.1)
        asyncio.run(main())
        """,
        0,
    ),
    "asked while it ends": (
        """
        import atexit
        atexit.register(lambda: llm.embed("the moon", use_tqdm=False))
        """,
        0,
    ),
    "collected in a thread of its own": (
        """
        from poolhouse.engine.request import Request
        from poolhouse.inputs.prompts import Prompt
        engine, seen = llm.engine, threading.Event()
        request = Request(Prompt("the moon"), "embed")
        request.future.add_done_callback(lambda _: (engine.close(), seen.set()))
        engine.submit([request])
        assert seen.wait(20)
        """,
        0,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_without_a_word(checkpoint: str, tmp_path: Path, ending: str) -> None:
    program, status = ENDINGS[ending]
    done = ran(checkpoint, "llm = LLM(MODEL)\n" + textwrap.dedent(program), tmp_path)
    assert (done.returncode, done.stderr) == (status, "")
