"""Load a server with everything at once for long, and watch its memory, descriptors and threads.

python benchmarks/soak.py --requests 10000
python benchmarks/soak.py --minutes 10 --model path/to/model

Most requests are short. Some are lists, ragged texts, token ids, base64, token matrices of a megabyte; some are errors; some
clients hang up in the middle of their request, right after it, or in the middle of the reply. The exit status is 1 where
a reply has an unexpected status, memory leaks, or something is left at the end.

RSS says little about leaks: it swings by 10 MiB with what the allocator has freed and keeps. So the server counts, when it
rests, the bytes that are in use, by glibc's and Python's own count. A leak makes them grow in every step; a cache that fills
makes them grow in a few. The median step is judged (`--most-leak`). RSS is judged where freed memory was returned just
before, and more coarsely (`--most-growth`): it shows what no allocator knows, threads and mapped files.

On CPUs, torch keeps a matrix kernel for each number of rows, of which there are two dozen: 10 to 30 MiB that come in the
first 8,000 requests, and would hide other growth. The server is given `--kernels` of them; all fit at 1024.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit

import psutil

from poolhouse.bench.http import Connection, Target

# The first argument of the process that serves.
SERVE = "serve-and-tell"
WORDS = ("moon", "sea", "bread", "time", "stone", "river", "window", "paper", "garden", "winter")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Serve, load, print the curve, judge it."""
    options = _options()
    # Without this, SIGTERM would leave the running server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    with _served(options) as (process, url):
        soak = Soak(url, process, options.warmup, options.requests, options.minutes * 60, options.samples)
        print("  requests   seconds   RSS MiB   at rest    in use   descriptors   threads", flush=True)
        asyncio.run(soak.run(options.concurrency))
        problems = soak.problems(options.most_leak, options.most_growth)
    if process.returncode != 0:
        problems.append(f"The server's exit status is {process.returncode}.")
    print("replies by status: " + ", ".join(f"{status}: {count}" for status, count in sorted(soak.replies.items())))
    print(f"after the warm-up: {soak.leak:.3f} KiB a request in the median step, {soak.growth:.1f} MiB at rest")
    if problems:
        sys.exit("\n".join(problems))


@dataclass(frozen=True)
class Memory:
    """MiB of a process. rss: as it is found; at_rest: RSS after freed memory was returned; in_use: that no one has freed."""

    rss: float
    at_rest: float
    in_use: float


@dataclass(frozen=True)
class Sample:
    """The server at one time."""

    requests: int
    seconds: float
    memory: Memory
    descriptors: int
    threads: int


@dataclass
class Soak:
    """What is asked, how much of it was asked, and what was seen.

    most: requests, or any number where `seconds` are given. Samples are taken after every `most / samples` requests.
    """

    url: str
    process: subprocess.Popen[str]
    warmup: int
    most: int
    seconds: float
    samples: int
    curve: list[Sample] = field(default_factory=list)
    replies: Counter[str] = field(default_factory=Counter)
    surprises: Counter[str] = field(default_factory=Counter)
    asked: int = 0

    @property
    def leak(self) -> float:
        """KiB in use that a request leaves, in the median step from one sample to the next."""
        return statistics.median(
            (later.memory.in_use - earlier.memory.in_use) * 1024 / max(1, later.requests - earlier.requests)
            for earlier, later in pairwise(self.curve)
        )

    @property
    def growth(self) -> float:
        """MiB at rest between the warm-up and the end."""
        return self.curve[-1].memory.at_rest - self.curve[0].memory.at_rest

    async def run(self, concurrency: int) -> None:
        """Ask from many connections at once, then wait until the server rests."""
        self.started = time.monotonic()
        await self._until(self.warmup, None, concurrency)
        self._look()
        begun, steps = time.monotonic(), self.samples
        for step in range(1, steps + 1):
            if self.seconds:
                await self._until(None, begun + self.seconds * step / steps, concurrency)
            else:
                await self._until(self.warmup + (self.most - self.warmup) * step // steps, None, concurrency)
            self._look()

    def problems(self, most_leak: float, most_growth: float) -> list[str]:
        """What must not be, in sentences."""
        found = [f"Unexpected, {count} times: {what}" for what, count in self.surprises.items()]
        if self.leak > most_leak:
            found.append(f"Each request left {self.leak:.2f} KiB in the median step, {most_leak:g} were allowed.")
        if self.growth > most_growth:
            found.append(f"Memory grew by {self.growth:.1f} MiB, {most_growth:g} were allowed.")
        if self.curve[-1].descriptors > self.curve[0].descriptors + 2:
            found.append(f"Descriptors grew from {self.curve[0].descriptors} to {self.curve[-1].descriptors}.")
        if self.curve[-1].threads > self.curve[0].threads + 40:
            found.append(f"Threads grew from {self.curve[0].threads} to {self.curve[-1].threads}.")
        return found

    async def _until(self, most: int | None, end: float | None, concurrency: int) -> None:
        await asyncio.gather(*(self._client(number, most, end) for number in range(concurrency)))
        await self._rested()

    async def _client(self, number: int, most: int | None, end: float | None) -> None:
        """One client after the other: each keeps its connection until it is cut."""
        chance = random.Random(f"{number} {self.asked}")  # noqa: S311 - of texts, not of keys
        client = Client(self.url)
        while self.asked < most if most is not None else time.monotonic() < (end or 0):
            self.asked += 1
            kind = chance.choices(KINDS, [kind.weight for kind in KINDS])[0]
            try:
                status = await asyncio.wait_for(kind.ask(client, chance), 120)
            except Exception as error:  # noqa: BLE001 - every failure is a result
                self.surprises[f"{kind.ask.__name__}: {error!r}"] += 1
                continue
            self.replies[status] += 1
            if status != kind.expected:
                self.surprises[f"{kind.ask.__name__}: {status} instead of {kind.expected}"] += 1
        client.connection.close()

    async def _rested(self) -> None:
        """Wait until nothing waits or runs in the server."""
        for _ in range(600):
            if _load(self.url) == 0:
                await asyncio.sleep(0.5)  # until closed connections are noticed
                return
            await asyncio.sleep(0.1)
        self.surprises[f"/load stays at {_load(self.url)}"] += 1

    def _look(self) -> None:
        process, seconds = psutil.Process(self.process.pid), time.monotonic() - self.started
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        memory = Memory(**json.loads(self.process.stdout.readline()))
        sample = Sample(self.asked, seconds, memory, process.num_fds(), process.num_threads())
        self.curve.append(sample)
        row = (sample.requests, seconds, memory.rss, memory.at_rest, memory.in_use, sample.descriptors, sample.threads)
        print("{:10d}{:10.1f}{:10.1f}{:10.1f}{:10.1f}{:14d}{:10d}".format(*row), flush=True)


class Client:
    """A kept connection, and others that are cut."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.paths: dict[str, Target] = {}
        self.connection = Connection(self._target("/v1/embeddings"))

    async def post(self, path: str, body: object) -> str:
        """The status of the reply."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        reply = await self.connection.ask(self._target(path).request(content))
        return str(reply.status)

    async def cut(self, path: str, body: object, sent: float, read: int) -> str:
        """Hang up after this part of the request was sent, and so many bytes of the reply were read."""
        reader, writer = await asyncio.open_connection(urlsplit(self.url).hostname, urlsplit(self.url).port)
        content = self._target(path).request(json.dumps(body).encode())
        writer.write(content[: int(len(content) * sent)])
        await writer.drain()
        if read:
            await reader.readexactly(read)
        writer.transport.abort()
        return "cut"

    def _target(self, path: str) -> Target:
        if path not in self.paths:
            self.paths[path] = Target.of(self.url + path, {})
        return self.paths[path]


def _text(chance: random.Random, fewest: int = 3, most: int = 12) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(fewest, most)))


def _texts(chance: random.Random, count: int) -> list[str]:
    return [_text(chance) for _ in range(count)]


async def short(client: Client, chance: random.Random) -> str:
    return await client.post("/v1/embeddings", {"input": _text(chance)})


async def base64(client: Client, chance: random.Random) -> str:
    return await client.post("/v1/embeddings", {"input": _texts(chance, 4), "encoding_format": "base64"})


async def token_ids(client: Client, chance: random.Random) -> str:
    return await client.post("/pooling", {"input": [chance.randint(5, 30) for _ in range(9)], "task": "embed"})


async def ragged(client: Client, chance: random.Random) -> str:
    body = {"input": [_text(chance, 1, 150), _text(chance)], "truncate_prompt_tokens": -1}
    return await client.post("/v1/embeddings", body)


async def matrices(client: Client, chance: random.Random) -> str:
    return await client.post("/pooling", {"input": _texts(chance, 16), "task": "token_embed"})


async def score(client: Client, chance: random.Random) -> str:
    return await client.post("/score", {"text_1": _text(chance), "text_2": _texts(chance, 3)})


async def rerank(client: Client, chance: random.Random) -> str:
    return await client.post("/rerank", {"query": _text(chance), "documents": _texts(chance, 5), "top_n": 2})


async def no_json(client: Client, chance: random.Random) -> str:
    return await client.post("/v1/embeddings", b'{"input": ' + _text(chance).encode())


async def no_such_model(client: Client, chance: random.Random) -> str:
    return await client.post("/v1/embeddings", {"input": "x", "model": f"model {chance.random()}"})


async def no_such_token(client: Client, chance: random.Random) -> str:
    return await client.post("/pooling", {"input": [[5, 6], [10**9 + chance.randint(0, 10**6)]]})


async def no_such_path(client: Client, chance: random.Random) -> str:
    return await client.post(f"/nothing/{chance.random()}", {})


async def cut_within_the_body(client: Client, chance: random.Random) -> str:
    return await client.cut("/v1/embeddings", {"input": _texts(chance, 50)}, 0.7, 0)


async def cut_while_waiting(client: Client, chance: random.Random) -> str:
    return await client.cut("/v1/embeddings", {"input": _texts(chance, 50)}, 1.0, 0)


async def cut_within_the_reply(client: Client, chance: random.Random) -> str:
    return await client.cut("/pooling", {"input": _texts(chance, 16), "task": "token_embed"}, 1.0, 64)


@dataclass(frozen=True)
class Kind:
    """A kind of request, how many of a hundred it is, and what is expected of it."""

    ask: Callable[[Client, random.Random], Awaitable[str]]
    weight: int
    expected: str = "200"


KINDS = (
    Kind(short, 50),
    Kind(base64, 8),
    Kind(token_ids, 8),
    Kind(ragged, 5),
    Kind(matrices, 3),
    Kind(score, 4),
    Kind(rerank, 4),
    Kind(no_json, 3, "400"),
    Kind(no_such_model, 3, "404"),
    Kind(no_such_token, 3, "400"),
    Kind(no_such_path, 3, "404"),
    Kind(cut_within_the_body, 2, "cut"),
    Kind(cut_while_waiting, 2, "cut"),
    Kind(cut_within_the_reply, 2, "cut"),
)


def _load(url: str) -> int:
    with urllib.request.urlopen(f"{url}/load", timeout=60) as reply:
        count: int = json.load(reply)["server_load"]
        return count


@contextlib.contextmanager
def _served(options: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`poolhouse serve` in a process of its own, which tells of its memory, and where it answers."""
    command = [sys.executable, __file__, SERVE, *([options.model] if options.model else [])]
    command += ["--host", "127.0.0.1", "--port", "0", "--log-level", "critical"]
    kernels = dict.fromkeys(("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), str(options.kernels))
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**OFFLINE, **kernels})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("Poolhouse serves"):
            sys.exit("The server did not start.")
        yield process, line.rsplit(" ", 1)[1].strip()
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def serve() -> None:
    """`poolhouse serve`, which writes its memory as a line of JSON whenever it reads a line."""
    from poolhouse.cli import main as command_line

    threading.Thread(target=_tell, daemon=True).start()
    command_line()


def _tell() -> None:
    for _ in sys.stdin:
        print(json.dumps(asdict(_memory())), flush=True)


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`, of all arenas; in_blocks, in_maps: bytes in use."""

    _fields_ = (
        ("others", ctypes.c_size_t * 4),
        ("in_maps", ctypes.c_size_t),
        ("more_others", ctypes.c_size_t * 2),
        ("in_blocks", ctypes.c_size_t),
        ("rest", ctypes.c_size_t * 2),
    )


def _memory() -> Memory:
    """This process's, where nothing runs in it; without glibc 2.33 or newer, RSS stands for all of it."""
    process, libc = psutil.Process(), ctypes.CDLL(None)
    rss = process.memory_info().rss
    gc.collect()
    if not hasattr(libc, "mallinfo2"):
        return Memory(rss / 2**20, rss / 2**20, rss / 2**20)
    libc.malloc_trim(0)
    libc.mallinfo2.restype = _Heap
    heap = libc.mallinfo2()
    in_use = heap.in_blocks + heap.in_maps + _python_objects()
    return Memory(rss / 2**20, process.memory_info().rss / 2**20, in_use / 2**20)


def _python_objects() -> int:
    """Bytes of small objects of Python, which has an allocator of its own for them."""
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            sys._debugmallocstats()  # noqa: SLF001 - there is no other way
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        found = re.search(rb"# bytes in allocated blocks *= *([0-9,]+)", file.read())
    return int(found[1].replace(b",", b"")) if found else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="path or hub id; the embedded model without it")
    parser.add_argument("--requests", type=int, default=10_000, help="requests, warm-up included")
    parser.add_argument("--minutes", type=float, default=0, help="how long to go on after the warm-up, instead")
    parser.add_argument("--warmup", type=int, default=2000, help="requests before memory is judged")
    parser.add_argument("--samples", type=int, default=8, help="rows of the curve after the warm-up")
    parser.add_argument("--concurrency", type=int, default=32, help="connections")
    parser.add_argument(
        "--kernels", type=int, default=2, help="matrix kernels that torch keeps; its own number is 1024"
    )
    parser.add_argument("--most-leak", type=float, default=0.5, help="KiB that a request may leave, in the median step")
    parser.add_argument("--most-growth", type=float, default=16.0, help="MiB that memory at rest may grow by")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == [SERVE]:
        sys.argv[1] = "serve"
        serve()
    else:
        main()
