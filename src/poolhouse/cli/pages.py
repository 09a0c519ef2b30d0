"""Pages: PDF files, pictures and folders of them, as what `embed` reads: one page or picture at a time, with where it stands."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolhouse.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    from poolhouse.inputs.prompts import ContentInput

ENDINGS = (".pdf", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Of a PDF page, which has a size in points.
DEFAULT_DPI = 150.0
_POINTS = 72.0
# More pixels of a page are never of use, and a poster has ten times as many.
_MAX_PIXELS = 30_000_000


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a PDF file, or a picture. number: from 1; None for a picture. source: the picture, or its file."""

    file: str
    number: int | None
    source: PILImage | Path

    @property
    def name(self) -> str:
        """The file, and behind it the page as URLs have it: `scan.pdf#page=3` (RFC 8118)."""
        return self.file if self.number is None else f"{self.file}#page={self.number}"

    @property
    def prompt(self) -> ContentInput:
        return {"content": [{"type": "image", "image": self.source}]}

    @property
    def fields(self) -> dict[str, object]:
        """What a line of JSON says of it."""
        return {"file": self.file, "page": self.number}


def files_of(arguments: Sequence[str]) -> list[Path] | None:
    """The files of arguments that name PDF files, pictures or folders of them; None where they are texts.

    Raises:
        ConfigError: some name such files and others do not, or a file that does not exist.
    """
    found = [_files(argument) for argument in arguments]
    if not any(found):
        return None
    for argument, files in zip(arguments, found, strict=True):
        if not files:
            raise ConfigError(f"{argument} is no PDF file, picture or folder of them, as other arguments are.")
    return [file for files in found for file in files]


def _files(argument: str) -> list[Path]:
    """Files that an argument names: itself, or those below a folder, in the order of their names; none for a text."""
    # Of a text that cannot be a path these say no, where those of Path raise.
    if os.path.isdir(argument):  # noqa: PTH112
        found = Path(argument).rglob("*")
        return sorted(file for file in found if file.suffix.lower() in ENDINGS and file.is_file())
    exists = os.path.isfile(argument)  # noqa: PTH113
    if not argument.lower().endswith(ENDINGS) or (" " in argument and not exists):
        return []
    if not exists:
        raise ConfigError(f"There is no file {argument}.")
    return [Path(argument)]


class Aside:
    """What is told of pages that cannot be read: names them on standard error and counts them.

    strict: raises ConfigError instead, where nothing in the output would say which are missing.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.count = 0

    def __call__(self, message: str) -> None:
        if self.strict:
            raise ConfigError(message)
        self.count += 1
        print(f"poolhouse: left out: {message}", file=sys.stderr)


def pages_of(files: Sequence[Path], dpi: float, aside: Aside) -> Iterator[tuple[int, Page]]:
    """The pages and pictures of files, numbered. aside: is told of a PDF file that is encrypted or broken, or a page of it.

    Raises:
        ConfigError: there is no library to read PDF files.
    """
    number = 0
    for file in files:
        for page in _pdf_pages(file, dpi, aside) if file.suffix.lower() == ".pdf" else [Page(str(file), None, file)]:
            number += 1
            yield number, page


def _pdf_pages(file: Path, dpi: float, aside: Aside) -> Iterator[Page]:
    try:
        pdfium: Any = import_module("pypdfium2")
    except ImportError:
        raise ConfigError("PDF files need pypdfium2, which is not installed: pip install 'poolhouse[pdf]'.") from None
    try:
        document = pdfium.PdfDocument(file)
    except pdfium.PdfiumError as error:
        encrypted = error.err_code == pdfium.raw.FPDF_ERR_PASSWORD
        what = "is encrypted; save it without its password first" if encrypted else f"cannot be read as PDF: {error}"
        aside(f"{file} {what}")
        return
    with document:
        for index in range(len(document)):
            try:
                page = document[index]
                width, height = page.get_size()
                scale = min(dpi / _POINTS, math.sqrt(_MAX_PIXELS / max(width * height, 1)))
                picture = page.render(scale=scale).to_pil()
                page.close()
            except pdfium.PdfiumError as error:
                aside(f"{file}#page={index + 1} cannot be read: {error}")
                continue
            yield Page(str(file), index + 1, picture)
