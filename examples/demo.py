"""The main job, twice: search a small corpus from Python, then over HTTP, and compare.

make demo
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from poolhouse import LLM
from poolhouse.data import passages, queries

console = Console(width=120)


def main() -> None:
    """Embed, search, serve, search again."""
    corpus, questions = passages(), queries()

    started = time.perf_counter()
    with LLM() as llm:
        console.print(f"\n[bold]From Python[/]: {llm.model.facts.name}, {llm.model.facts.served_by}")
        passage_vectors, question_vectors = llm.embed_array(corpus), llm.embed_array(questions)
        offline = question_vectors @ passage_vectors.T
    console.print(
        f"Embedded {len(corpus)} passages and {len(questions)} questions in {time.perf_counter() - started:.1f} s."
    )

    console.print("\n[bold]Over HTTP[/]: poolhouse serve, asked by the openai client")
    server, address = start_server()
    try:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        online = embed(client, questions) @ embed(client, corpus).T
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    console.print(f"The server stopped with status {status}.")

    show(questions, corpus, offline, online)
    largest = float(np.abs(offline - online).max())
    console.print(f"Largest difference between a score from Python and over HTTP: {largest:.1e}")
    if largest > 1e-5 or status != 0:
        sys.exit("The two sides do not agree.")


def start_server() -> tuple[subprocess.Popen[str], str]:
    """The server on a free port, and its address once it answers."""
    command = [
        sys.executable,
        "-m",
        "poolhouse.cli",
        "serve",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--log-level",
        "warning",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline().strip()
    if not line:
        sys.exit("The server did not start.")
    console.print(line)
    return server, line.rsplit(" ", 1)[1]


def embed(client: OpenAI, texts: list[str]) -> np.ndarray:
    """[texts, dimensions]."""
    reply = client.embeddings.create(model="all-MiniLM-L6-v2", input=texts)
    return np.array([item.embedding for item in reply.data], dtype=np.float32)


def show(questions: list[str], corpus: list[str], offline: np.ndarray, online: np.ndarray) -> None:
    """The best three passages of each question, both scores side by side."""
    table = Table("question and passages", title="\nRanked passages")
    table.add_column("from Python", justify="right")
    table.add_column("over HTTP", justify="right")
    for row, question in enumerate(questions):
        table.add_row(f"[bold]{question}[/]")
        for best in np.argsort(-offline[row])[:3]:
            words = corpus[best] if len(corpus[best]) < 85 else corpus[best][:82] + "..."
            table.add_row(f"  {words}", f"{offline[row, best]:.4f}", f"{online[row, best]:.4f}")
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
