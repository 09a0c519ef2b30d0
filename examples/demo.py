"""The main job, twice: search a small corpus from Python, then over HTTP, and compare. Then a search in pictures.

make demo
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from openai import OpenAI
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from poolhouse import LLM
from poolhouse.bench.made_up import write_colqwen3
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
    search_pictures()


def search_pictures() -> None:
    """Score drawn pages against a text and against one of them, by late interaction."""
    console.print(
        "\n[bold]In pictures[/]: a ColQwen3 in the layout of the hub, tiny, whose weights are random: "
        "it shows the way, and its ranks of a text mean nothing."
    )
    pages = {colour: draw_page(colour) for colour in ("red", "green", "blue")}
    with tempfile.TemporaryDirectory() as folder, LLM(write_colqwen3(Path(folder))) as llm:
        started = time.perf_counter()
        documents = [{"content": [page]} for page in pages.values()]
        of_text = llm.score("a green page", documents)
        of_page = llm.score({"content": [pages["green"]]}, documents)
        seconds = time.perf_counter() - started
    table = Table("page", title=f"\nScores of pages (MaxSim), both searches in {seconds:.1f} s")
    table.add_column("for the text 'a green page'", justify="right")
    table.add_column("for the green page itself", justify="right")
    for colour, text, page in zip(pages, of_text, of_page, strict=True):
        table.add_row(colour, f"{text.outputs.score:.3f}", f"{page.outputs.score:.3f}")
    console.print(table)
    if max(of_page, key=lambda output: output.outputs.score) is not of_page[1]:
        sys.exit("A page is not the nearest to itself.")


def draw_page(colour: str) -> Image.Image:
    """A page with lines of one colour."""
    page = Image.new("RGB", (240, 320), "white")
    draw = ImageDraw.Draw(page)
    for line in range(20, 300, 20):
        draw.rectangle((20, line, 120 + line // 3, line + 8), fill=colour)
    return page


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
