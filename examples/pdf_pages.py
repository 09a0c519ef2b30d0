"""Visual search: the pages of a PDF file that answer a question, read as pictures by late interaction.

pip install 'poolhouse[pdf]'
python examples/pdf_pages.py report.pdf "What did we earn in May?" --model TomoroAI/tomoro-colqwen3-embed-4b
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pypdfium2
from PIL import Image, ImageDraw

from poolhouse import LLM
from poolhouse.bench.made_up import write_colqwen3


def main() -> None:
    """Rank the pages for the question; then ask with the first page itself, which must be nearest to itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="a PDF file; a made one without it")
    parser.add_argument("question", nargs="?", default="How did sales go?")
    parser.add_argument("--model", help="a model of pages; a tiny one with random weights without it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        pages = drawn(given.file or write_pdf(Path(made) / "made.pdf"))
        documents = [{"content": [page]} for page in pages]
        if given.model is None:
            print("The weights of the tiny model are random: its ranks for a text mean nothing.")
        with LLM(given.model or write_colqwen3(Path(made) / "model")) as llm:
            for asked, query in ((given.question, given.question), ("page 1 itself", documents[0])):
                scores = [output.outputs.score for output in llm.score(query, documents)]
                print(f"\n{asked}")
                for number in sorted(range(len(pages)), key=lambda number: -scores[number]):
                    print(f"  {scores[number]:.3f} page {number + 1}")


def drawn(file: Path, dpi: int = 100) -> list[Image.Image]:
    """The pages as pictures."""
    document = pypdfium2.PdfDocument(file)
    try:
        return [page.render(scale=dpi / 72).to_pil() for page in document]
    finally:
        document.close()


def write_pdf(file: Path) -> Path:
    """Three pages: lines of text, bars, and a circle."""
    pages = [Image.new("RGB", (300, 400), "white") for _ in range(3)]
    text, bars, circle = map(ImageDraw.Draw, pages)
    for line in range(30, 370, 20):
        text.text((30, line), "Sales went up in May, and down in June.", fill="black")
    for number, height in enumerate((120, 260, 180, 310)):
        bars.rectangle((40 + 60 * number, 370 - height, 80 + 60 * number, 370), fill="navy")
    circle.ellipse((50, 100, 250, 300), fill="darkred")
    pages[0].save(file, save_all=True, append_images=pages[1:])
    return file


if __name__ == "__main__":
    main()
