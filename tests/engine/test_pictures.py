"""Pictures on their way through an engine: of one batch, of a failing one, and of the warm-up."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from poolhouse import LLM
from poolhouse.engine.engine import Engine
from poolhouse.engine.observing import BatchRun
from poolhouse.engine.request import Request
from poolhouse.errors import EngineError
from poolhouse.inputs.content import Content
from poolhouse.inputs.content import Image as Given
from poolhouse.inputs.prompts import Prompt
from poolhouse.packing.pack import Batch
from tests.models.test_colqwen3 import DESCRIBED, END, LAYOUTS, expected, made, pictures

TOMORO = LAYOUTS["tomoro"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tomoro")
    made(TOMORO, folder)
    return folder


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), max_num_batched_tokens=512) as llm:
        yield llm


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def shown(*images: Image.Image, text: str = "") -> Request:
    parts = tuple(Given(png(image), f"content[{index}]") for index, image in enumerate(images))
    return Request(Prompt(None, content=Content((*parts, *([text] if text else ())))), "token_embed")


def query(text: str) -> Request:
    return Request(Prompt(text), "token_embed", input_type="query")


class Notes:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.batches: list[BatchRun] = []

    def tokenized(self, texts: int, seconds: float) -> None: ...

    def ran(self, batch: BatchRun) -> None:
        self.batches.append(batch)


def test_texts_and_pictures_of_all_sizes_share_batches(llm: LLM, tmp_path: Path) -> None:
    tiny, images = made(TOMORO, tmp_path), pictures()
    notes = Notes()
    llm.engine.observe(notes)
    requests = [shown(images[0]), query("what?"), shown(images[3]), shown(images[1], images[2], text="and so on")]
    answers = [future.result(60) for future in llm.engine.submit(requests)]
    several = DESCRIBED.replace("Describe", "<|vision_start|><|image_pad|><|vision_end|>Describe")
    wanted = [
        expected(tiny, TOMORO, DESCRIBED, images[:1]),
        expected(tiny, TOMORO, f"what?{END * 10}", []),
        expected(tiny, TOMORO, DESCRIBED, images[3:4]),
        expected(tiny, TOMORO, several.replace("image.<", "image. and so on<"), images[1:3]),
    ]
    for answer, rows in zip(answers, wanted, strict=True):
        assert answer.array.shape == rows.shape
        assert np.abs(answer.array - rows).max() < 1e-4 * np.abs(rows).max()
    assert sum(batch.pictures for batch in notes.batches) == 4
    assert sum(batch.sequences for batch in notes.batches) == 4
    # Merged patches are tokens, a quarter as many as the tower runs over.
    filled = sum(int(answer.tokens.pictures.filled.sum()) for answer in answers if answer.tokens.pictures is not None)
    tokens = sum(len(answer.tokens) for answer in answers)
    assert sum(batch.tokens for batch in notes.batches) == tokens + 4 * filled


def test_answers_keep_no_pixels(llm: LLM) -> None:
    (answer,) = [future.result(60) for future in llm.engine.submit([shown(pictures()[0])])]
    assert answer.tokens.pictures is not None
    assert answer.tokens.pictures.filled.any()
    assert sum(picture.nbytes for picture in answer.tokens.pictures.pictures) == 0


def test_a_picture_that_several_prompts_show_runs_once(llm: LLM) -> None:
    notes = Notes()
    llm.engine.observe(notes)
    image = pictures()[2]
    answers = [future.result(60) for future in llm.engine.submit([shown(image, text=f"n{n}") for n in range(5)])]
    assert len({answer.array.shape for answer in answers}) == 1
    assert sum(batch.pictures for batch in notes.batches) == len(notes.batches)


def test_a_picture_that_breaks_the_model_fails_alone(llm: LLM) -> None:
    backbone = llm.engine.model.backbone
    broken = Image.new("RGB", (24, 24), (1, 2, 3))

    class Fragile:
        reentrant = True

        def __call__(self, batch: Batch) -> Tensor:
            flat = () if batch.pictures is None else batch.pictures.pictures
            if any(picture.pixels.std(0).max() < 1e-5 for picture in flat):
                raise RuntimeError("no memory for this picture")
            return backbone(batch)

    with Engine(replace(llm.engine.model, backbone=Fragile()), llm.engine.tokenizer, llm.engine.options) as engine:
        good = pictures()
        futures = engine.submit([shown(good[0]), query("what?"), shown(broken), shown(good[1])])
        with pytest.raises(EngineError, match="no memory for this picture"):
            futures[2].result(60)
        for future in (*futures[:2], futures[3]):
            assert np.isfinite(future.result(60).array).all()


@pytest.mark.parametrize("options", [{}, {"max_model_len": 24}, {"limit_mm_per_prompt": {"image": 0}}])
def test_a_full_warm_up_shows_a_page(folder: Path, options: dict[str, Any]) -> None:
    with LLM(str(folder), **options) as llm:
        notes = Notes()
        llm.engine.observe(notes)
        llm.engine.warm_up("full")
        assert llm.engine.pending == 0
    assert sum(batch.pictures for batch in notes.batches) == (0 if options else 1)
