"""The files of examples/ run as users run them, and say what `LLM` says; those of further packages are in tests/stores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from poolhouse import LLM
from poolhouse.data import passages, queries, queries_with_answers
from tests.docs.checkpoints import recogniser
from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"
# As examples print a find: its score, its number, and how its text begins.
FOUND = re.compile(r"^  (-?\d+\.\d{3}) \[(\d+)\] (.*)$", re.MULTILINE)


def run(name: str, *arguments: object) -> str:
    """What an example prints."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def by_question(said: str) -> list[list[tuple[float, int]]]:
    """The finds of each question, a score and a number each; their texts are held against the corpus."""
    corpus, parts = passages(), []
    for question in queries():
        begin = said.index(f"\n{question}\n")
        part = said[begin + len(question) + 2 :].partition("\n\n")[0]
        found = FOUND.findall(part)
        assert all(corpus[int(number)].startswith(text) for _, number, text in found), part
        parts.append([(float(score), int(number)) for score, number, _ in found])
    return parts


@pytest.mark.parametrize("name", ["langchain_search.py", "llamaindex_search.py"])
def test_a_framework_finds_what_llm_finds(name: str) -> None:
    said = by_question(run(name))
    with LLM() as llm:
        scores = llm.embed_array(queries()) @ llm.embed_array(passages()).T
    for found, (_, answer), row in zip(said, queries_with_answers(), scores, strict=True):
        assert [number for _, number in found] == np.argsort(-row)[:2].tolist()
        assert np.allclose([score for score, _ in found], np.sort(row)[::-1][:2], atol=1e-3)
        assert found[0][1] == answer


def test_the_entities_of_a_file_are_found_and_counted(tmp_path: Path) -> None:
    recogniser(tmp_path / "ner")
    texts = ["Nobody was there.", "", "Marie Curie was born in Warsaw.", "Warsaw lies on a river."]
    (tmp_path / "notes.txt").write_text("\n".join(texts))
    said = run("entities.py", tmp_path / "notes.txt", "--model", tmp_path / "ner")
    lines = [re.sub(r" \(.*\)$", "", line) for line in said.splitlines()]
    assert lines[:3] == ["2:0-11 PER Marie Curie", "2:24-30 LOC Warsaw", "3:0-6 LOC Warsaw"]
    assert lines[3:] == ["", "Most often:", "  2 x LOC Warsaw", "  1 x PER Marie Curie"]


def test_the_documents_answer_a_question(tmp_path: Path) -> None:
    said = run("docs_search.py", "Is Milvus Lite a file or a server?", "--folder", ROOT / "docs" / "stores")
    assert re.match(r"\d\d+ paragraphs of stores\.", said), said[:200]
    assert re.search(r"^\d\.\d{3} milvus\.md, ", said, re.MULTILINE), said
    (tmp_path / "sub").mkdir()
    code = "```sh\nhow does bread rise, and why does yeast make bread rise at all\n```"
    (tmp_path / "bread.md").write_text(
        f"# Bread\n\nYeast turns sugar into gas, and the gas lifts the dough.\n\n{code}\n"
    )
    (tmp_path / "sub" / "sea.md").write_text(
        "# Sea\n\n## Tides\nThe moon pulls the water of the sea towards it.\n\nShort.\n"
    )
    for question, place in (("Why does bread rise?", "bread.md, Bread"), ("Why are there tides?", "sub/sea.md, Tides")):
        said = run("docs_search.py", question, "--folder", tmp_path, "--top", 1)
        first, _, best, text = said.splitlines()
        assert first.startswith("2 paragraphs of")
        assert best.split(" ", 1)[1] == place
        assert not text.startswith("  ```")


def test_a_page_of_a_pdf_file_is_nearest_to_itself(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (200, 300), colour) for colour in ("red", "green", "blue", "white")]
    pages[0].save(tmp_path / "colours.pdf", save_all=True, append_images=pages[1:])
    for arguments, count in (((), 3), ((tmp_path / "colours.pdf", "Which page is red?"), 4)):
        said = run("pdf_pages.py", *arguments)
        _, by_text, by_page = said.split("\n\n")
        assert sorted(re.findall(r"page (\d+)$", by_text, re.MULTILINE)) == [str(page + 1) for page in range(count)]
        scores = [float(score) for score in re.findall(r"^  (\S+) page", by_page, re.MULTILINE)]
        assert scores == sorted(scores, reverse=True)
        assert by_page.splitlines()[1].endswith("page 1")
