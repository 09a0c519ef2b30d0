"""Search in a folder of Markdown: the paragraphs of Poolhouse's own documents that answer a question.

python examples/docs_search.py "How do I limit the memory of the server?"
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np

from poolhouse import LLM

DOCS = Path(__file__).parent.parent / "docs"
FENCED = re.compile(r"^```.*?^```$|^<!--.*?-->$", re.MULTILINE | re.DOTALL)
# Between two paragraphs, and before an item of a list.
BREAK = re.compile(r"\n\n|\n(?=- )")


def main() -> None:
    """Embed all paragraphs, and print the best with the place of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--folder", type=Path, default=DOCS)
    parser.add_argument("--model", help="an embedder; the embedded one without it")
    parser.add_argument("--top", type=int, default=3)
    given = parser.parse_args()
    found = [
        (f"{path.relative_to(given.folder)}, {heading}", text)
        for path in sorted(given.folder.rglob("*.md"))
        for heading, text in paragraphs(path.read_text(encoding="utf-8"))
    ]
    # A paragraph over the model's limit is read in pieces, whose mean it gets.
    with LLM(given.model, overflow="chunk") as llm:
        vectors = llm.embed_array([f"{place}: {text}" for place, text in found], input_type="document")
        scores = vectors @ llm.embed_array(given.question, input_type="query")[0]
    print(f"{len(found)} paragraphs of {given.folder.name}. {given.question}")
    for number in np.argsort(-scores)[: given.top]:
        place, text = found[number]
        print(f"\n{scores[number]:.3f} {place}\n  {text[:300]}")


def paragraphs(page: str) -> list[tuple[str, str]]:
    """The paragraphs and items of a page without its code blocks and tables, each with the heading that it is under."""
    heading, found = "", []
    for block in BREAK.split(FENCED.sub("", page)):
        lines = block.strip()
        if lines.startswith("#"):
            first, _, lines = lines.partition("\n")
            heading = first.strip("# ")
        if len(lines) > 40 and not lines.startswith("|"):
            found.append((heading, " ".join(lines.split())))
    return found


if __name__ == "__main__":
    main()
