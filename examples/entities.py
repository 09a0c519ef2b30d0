"""Entities of a file: names, places and organisations of each line, and how often each of them is there.

python examples/entities.py notes.txt --model dslim/bert-base-NER
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import poolhouse.data
from poolhouse import LLM

PASSAGES = Path(poolhouse.data.__file__).with_name("passages.txt")


def main() -> None:
    """Print each line's entities while the file is read, and their counts at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "file", nargs="?", type=Path, default=PASSAGES, help="a text per line; empty lines do not count"
    )
    parser.add_argument("--model", default="dslim/bert-base-NER", help="a token classifier")
    given = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    # The file is read a window of lines at a time, so it may be of any size.
    with LLM(given.model, overflow="truncate") as llm, given.file.open(encoding="utf-8") as lines:
        texts = (line.strip() for line in lines if line.strip())
        for number, output in enumerate(llm.stream(texts, "token_classify"), 1):
            for entity in output.outputs.entities:
                print(f"{number}:{entity.start}-{entity.end} {entity.label} {entity.text} ({entity.score:.2f})")
                counts[entity.label, entity.text] += 1
    print("\nMost often:")
    for (label, text), count in counts.most_common(10):
        print(f"  {count} x {label} {text}")


if __name__ == "__main__":
    main()
