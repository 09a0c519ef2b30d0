"""Our server beside vLLM's on the same model, and beside our own engine without a server.

python benchmarks/serve_against_vllm.py --vllm path/to/bin/vllm

Each round starts one side after the other, so that each has the machine to itself, and loads it with `poolhouse bench
serve`: short texts, one per request. vLLM needs some 50 s to start on a small machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from poolhouse.data import short_texts
from poolhouse.models.files.hub import embedded_model

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}
SECONDS_TO_START = 300
WORDS = (8, 16)
WARMUP = 256


def main() -> None:
    """Measure round by round, then print medians and their ratios."""
    options = _options()
    # Without this, SIGTERM would leave the running server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if options.embed_only:
        print(json.dumps({"texts_per_second": _texts_per_second(options.model, options.requests)}))
        return
    served = ["--served-model-name", "measured", "--host", "127.0.0.1", "--port"]
    ours = [sys.executable, "-m", "poolhouse.cli", "serve", options.model, *shlex.split(options.poolhouse_options)]
    theirs = [options.vllm, "serve", options.model, "--runner", "pooling", *shlex.split(options.vllm_options)]
    rounds: list[dict[str, Any]] = []
    for number in range(1, options.rounds + 1):
        measured: dict[str, Any] = {
            "poolhouse": _measured([*ours, *served], options),
            "offline": _embedded(options),
            "vllm": _measured([*theirs, *served], options),
        }
        rounds.append(measured)
        print(f"round {number} of {options.rounds}: {_line(measured)}", flush=True)
    _print_medians(rounds, options.concurrency)
    if options.json is not None:
        options.json.write_text(json.dumps(rounds, indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default="vllm", help="vLLM's command")
    parser.add_argument("--model", help="a folder; default: the embedded all-MiniLM-L6-v2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=32)
    # On CPUs this is a share of the main memory, and 0.92 of it is seldom free.
    parser.add_argument("--vllm-options", default="--gpu-memory-utilization 0.3", help="more options of `vllm serve`")
    parser.add_argument("--poolhouse-options", default="", help="more options of `poolhouse serve`")
    parser.add_argument("--json", type=Path, help="write all rounds here")
    parser.add_argument("--embed-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or str(embedded_model())
    return options


def _measured(command: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The report of `poolhouse bench serve` on a server that is started for it."""
    with _server(command) as url, tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        load = ["--base-url", url, "--model", "measured", "--words", "-".join(map(str, WORDS))]
        size = ["--num-requests", str(options.requests), "--concurrency", str(options.concurrency)]
        rest = ["--warmup", str(WARMUP), "--json", str(report)]
        subprocess.run(
            [sys.executable, "-m", "poolhouse.cli", "bench", "serve", *load, *size, *rest],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        facts: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    if facts["failures"]:
        sys.exit(f"{command[0]}: {facts['failures']}")
    return facts


@contextlib.contextmanager
def _server(command: Sequence[str]) -> Iterator[str]:
    """The address of a server in a process group of its own, once it is healthy."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, str(port)], stdout=log, stderr=log, env=OFFLINE, start_new_session=True)
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    sys.exit(f"{shlex.join(command)} did not start:\n{log.read().decode(errors='replace')[-4000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            # Workers that outlived their server would slow the next one.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _embedded(options: argparse.Namespace) -> dict[str, float]:
    """Texts per second of `LLM.embed`, in a process of its own."""
    command = [sys.executable, __file__, "--embed-only", "--model", options.model, "--requests", str(options.requests)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=OFFLINE)
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts


def _texts_per_second(model: str, count: int) -> float:
    from poolhouse import LLM

    texts = short_texts(WARMUP + count, *WORDS)
    with LLM(model) as llm:
        llm.embed(texts[:WARMUP], use_tqdm=False)
        started = time.perf_counter()
        llm.embed(texts[WARMUP:], use_tqdm=False)
        return count / (time.perf_counter() - started)


def _line(measured: Mapping[str, Any]) -> str:
    ours, theirs = measured["poolhouse"]["requests_per_second"], measured["vllm"]["requests_per_second"]
    return f"Poolhouse {ours:.0f} requests/s, vLLM {theirs:.0f}, offline {measured['offline']['texts_per_second']:.0f} texts/s"


def _print_medians(rounds: Sequence[Mapping[str, Any]], concurrency: int) -> None:
    def middle(side: str, *path: str) -> float:
        values = []
        for measured in rounds:
            value: Any = measured[side]
            for name in path:
                value = value[name]
            values.append(value)
        return median(values)

    table = Table("medians", title=f"{concurrency} requests at once, one short text each, {len(rounds)} rounds")
    for heading in ("Poolhouse", "vLLM", "times better"):
        table.add_column(heading, justify="right")
    ours, theirs = (middle(side, "requests_per_second") for side in ("poolhouse", "vllm"))
    table.add_row("requests/s", f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}")
    for percentile in ("p50", "p99"):
        fast, slow = (middle(side, "latency_ms", percentile) for side in ("poolhouse", "vllm"))
        table.add_row(f"{percentile}, ms", f"{fast:.1f}", f"{slow:.1f}", f"{slow / fast:.2f}")
    console = Console()
    console.print(table)
    offline = middle("offline", "texts_per_second")
    console.print(
        f"LLM.embed on the same texts: {offline:.0f} texts/s; the server reaches {100 * ours / offline:.0f} %."
    )


if __name__ == "__main__":
    main()
