"""`poolhouse embed` of PDF files, pictures and folders of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pypdfium2
import pytest
from PIL import Image

from poolhouse import LLM, TokenEmbeddings
from tests.checkpoints import save_checkpoint
from tests.cli.in_process import Run, said
from tests.models import test_colqwen3, test_qwen_embedders
from tests.models.qwen_vl import pictures

__all__ = ["said"]

# RC4 with a user's password, as qpdf writes it: a document that cannot be opened without one.
ENCRYPTED = b"""%PDF-1.4
1 0 obj <</Type/Catalog/Pages 2 0 R>> endobj
2 0 obj <</Type/Pages/Kids[3 0 R]/Count 1>> endobj
3 0 obj <</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]>> endobj
4 0 obj <</Filter/Standard/V 1/R 2/P -4/O<0101010101010101010101010101010101010101010101010101010101010101>
/U<0202020202020202020202020202020202020202020202020202020202020202>>> endobj
trailer <</Root 1 0 R/Encrypt 4 0 R/ID[<03030303030303030303030303030303><03030303030303030303030303030303>]>>
"""


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of late interaction."""
    folder = tmp_path_factory.mktemp("late")
    test_colqwen3.made(test_colqwen3.LAYOUTS["tomoro"], folder)
    return str(folder)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dense") / "Qwen3-VL-Embedding-2B"
    test_qwen_embedders.made(test_qwen_embedders.KINDS["Qwen3-VL-Embedding"], folder)
    return str(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """scan.pdf of two pages; folder/a.png, folder/deep/B.JPG, folder/notes.txt; encrypted.pdf and broken.pdf."""
    document = pypdfium2.PdfDocument.new()
    for index, picture in enumerate(pictures()[:2]):
        page = document.new_page(*(24 * (index + 1), 36))
        image = pypdfium2.PdfImage.new(document)
        bitmap = pypdfium2.PdfBitmap.from_pil(picture)
        image.set_bitmap(bitmap)
        image.set_matrix(pypdfium2.PdfMatrix().scale(24, 30))
        page.insert_obj(image)
        page.gen_content()
    document.save(tmp_path / "scan.pdf")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    pictures()[2].save(tmp_path / "folder" / "a.png")
    pictures()[3].save(tmp_path / "folder" / "deep" / "B.JPG")
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    (tmp_path / "encrypted.pdf").write_bytes(ENCRYPTED)
    (tmp_path / "broken.pdf").write_bytes((tmp_path / "scan.pdf").read_bytes()[:50])
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAMES = ("scan.pdf#page=1", "scan.pdf#page=2", "folder/a.png", "folder/deep/B.JPG")


def shown(dpi: float = 150) -> list[Image.Image]:
    """What a reader sees of scan.pdf and the folder."""
    pages = [page.render(scale=dpi / 72).to_pil() for page in pypdfium2.PdfDocument("scan.pdf")]
    return [*pages, Image.open("folder/a.png"), Image.open("folder/deep/B.JPG")]


@pytest.mark.parametrize("ending", ["npz", "safetensors", "arrow"])
def test_token_vectors_have_a_row_set_and_a_name_per_page(ending: str, said: Run, place: Path, late: str) -> None:
    done = said("embed", "scan.pdf", "folder", "--model", late, "--tokens", "-o", f"out.{ending}")
    assert done.status == 0, done.error
    with LLM(late) as llm:
        expected = llm.encode(shown(), pooling_task="token_embed", use_tqdm=False)
    found = TokenEmbeddings.load(f"out.{ending}")
    assert found.names == NAMES
    for rows, output in zip(found, expected, strict=True):
        np.testing.assert_allclose(rows, output.outputs.data, atol=1e-5)


def test_lines_say_file_and_page(said: Run, place: Path, dense: str) -> None:
    done = said("embed", "scan.pdf", "folder", "--model", dense, "--dpi", "90")
    assert done.status == 0, done.error
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [(line["file"], line["page"]) for line in lines] == [
        ("scan.pdf", 1),
        ("scan.pdf", 2),
        ("folder/a.png", None),
        ("folder/deep/B.JPG", None),
    ]
    with LLM(dense) as llm:
        expected = llm.embed(shown(90), use_tqdm=False)
    for line, output in zip(lines, expected, strict=True):
        assert sorted(line) == ["embedding", "file", "page"]
        np.testing.assert_allclose(line["embedding"], output.outputs.embedding, atol=1e-5)


def test_many_pages_are_read_in_groups(said: Run, place: Path, late: str) -> None:
    document = pypdfium2.PdfDocument.new()
    for index in range(60):
        document.new_page(20 + index, 40)
    document.save("many.pdf")
    done = said("embed", "many.pdf", "--model", late, "--tokens", "-o", "out.npz")
    assert done.status == 0, done.error
    assert TokenEmbeddings.load("out.npz").names == tuple(f"many.pdf#page={page}" for page in range(1, 61))


def test_what_cannot_be_read_is_named_and_left_out(said: Run, place: Path, late: str, dense: str) -> None:
    Path("folder/bad.png").write_bytes(b"no picture")
    files = ("encrypted.pdf", "broken.pdf", "folder")
    done = said("embed", *files, "--model", late, "--tokens", "-o", "out.npz")
    assert done.status == 2
    assert TokenEmbeddings.load("out.npz").names == NAMES[2:]
    for words in (
        "left out: encrypted.pdf is encrypted; save it without its password first",
        "left out: broken.pdf cannot be read as PDF",
        "left out: folder/bad.png: these 10 bytes are no picture",
        "3 files or pages were left out; all others are written.",
    ):
        assert words in done.error
    # A matrix does not say which rows are missing.
    done = said("embed", "folder", "--model", dense, "-o", "out.npy")
    assert done.status == 2
    assert "folder/bad.png: these 10 bytes are no picture" in done.error
    assert not Path("out.npy").exists()
    done = said("embed", "encrypted.pdf", "--model", late, "--tokens", "-o", "none.npz")
    assert "No page could be read." in done.error
    assert not Path("none.npz").exists()


def test_wrong_arguments_are_told_apart(said: Run, place: Path, tmp_path: Path, late: str) -> None:
    save_checkpoint(tmp_path / "bert", "bert, wordpiece")
    for arguments, words in (
        (("scan.pdf", "--model", str(tmp_path / "bert")), "reads texts alone, no PDF pages or pictures"),
        (("scan.pdf", "--model", late), "use --tokens"),
        (("scan.pdf", "a text"), "a text is no PDF file, picture or folder of them, as other arguments are"),
        (("none.pdf",), "There is no file none.pdf"),
        (("bert",), "is a folder. A model is named by --model bert"),
        (("scan.pdf", "--input", "x"), "Texts come as arguments or from --input x, not both"),
        (("--input", "scan.pdf"), "are no --input but arguments: poolhouse embed scan.pdf"),
        (("scan.pdf", "--dpi", "1"), "--dpi"),
    ):
        done = said("embed", *arguments)
        assert done.status == 2
        assert words in " ".join(done.error.split()), done.error


def test_pdf_files_need_their_library(said: Run, place: Path, late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    done = said("embed", "scan.pdf", "--model", late, "--tokens", "-o", "out.npz")
    assert "pip install 'poolhouse[pdf]'" in done.error


def test_a_text_that_ends_like_a_file_is_a_text(said: Run, dense: str) -> None:
    done = said("embed", "where is the photo.png", "--model", dense)
    assert done.status == 0, done.error
    assert json.loads(done.out)["text"] == "where is the photo.png"
