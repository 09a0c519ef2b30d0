"""Processors of pictures: the settings of files and of requests, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from poolhouse.errors import InvalidRequest
from poolhouse.files import Folder
from poolhouse.inputs.media.processor import BackEnd, QwenPictures, image_settings

SIDES = ((1240, 1754), (64, 64), (1, 1), (300, 40), (801, 333))
LIMITS: dict[str, dict[str, Any]] = {
    "by default": {},
    "as areas": {"size": {"shortest_edge": 65536, "longest_edge": 1310720}, "patch_size": 16},
    "in older names": {"min_pixels": 784, "max_pixels": 602112},
    "in older names within size": {"size": {"min_pixels": 784, "max_pixels": 602112}},
    "one alone": {"max_pixels": 200704},
}


def picture(width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_patches_are_those_of_transformers(limits: dict[str, Any], sides: tuple[int, int]) -> None:
    area = {"shortest_edge": 3136, "longest_edge": 1003520}
    names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    stated = limits | limits.get("size", {})
    area |= {edge: stated[name] for name, edge in names.items() if name in stated}
    area |= {edge: stated[edge] for edge in names.values() if edge in stated}
    theirs = Qwen2VLImageProcessorPil(size=area, patch_size=limits.get("patch_size", 14))
    expected = theirs(picture(*sides), return_tensors="np")
    ours = QwenPictures(limits, token=7)(picture(*sides), {})
    assert ours.grid == tuple(expected["image_grid_thw"][0, 1:])
    frames = expected["pixel_values"].reshape(len(ours.pixels), 3, 2, -1)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    np.testing.assert_array_equal(ours.pixels, frames[:, :, 0].reshape(len(ours.pixels), -1))
    assert set(ours.ids.tolist()) == {7}
    assert len(ours.ids) == ours.rows == len(ours.pixels) // 4


def test_a_request_may_change_one_limit() -> None:
    processor = QwenPictures({"max_pixels": 1003520}, token=7)
    assert processor(picture(560, 560), {}).grid == (40, 40)
    assert processor(picture(560, 560), {"max_pixels": 50176}).grid == (16, 16)
    assert processor(picture(56, 56), {"images_kwargs": {"min_pixels": 50176}}).grid == (16, 16)


def test_a_kind_of_model_may_change_one_limit_of_its_files() -> None:
    limits = {"min_pixels": 50176, "max_pixels": 1003520}
    for stated in (limits, {"size": limits}):
        processor = QwenPictures(stated, token=7, max_pixels=200704)
        assert processor(picture(560, 560), {}).grid == (32, 32)
        assert processor(picture(56, 56), {}).grid == (16, 16)


def test_a_picture_that_is_too_thin_names_its_sides() -> None:
    with pytest.raises(InvalidRequest, match="3000 x 2 cannot be read"):
        QwenPictures({}, token=7)(picture(3000, 2), {})


@pytest.mark.parametrize("name", ["patch_size", "merge_size", "return_tensors", "sise"])
def test_options_that_would_not_fit_the_tower_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"no option '{name}'"):
        QwenPictures({}, token=7)(picture(64, 64), {name: 8})


@pytest.mark.parametrize(
    "options",
    [
        # A thin picture of so long a shorter side has a longer one of millions.
        {"size": {"shortest_edge": 4096}},
        {"size": {"height": 100_000, "width": 2}},
        {"size": {"height": 0, "width": 2}},
        {"crop_size": 99_999},
        {"size": "large"},
        {"min_pixels": 10**7},
    ],
    ids=str,
)
def test_sides_that_fill_the_memory_are_refused(options: dict[str, object]) -> None:
    back_end = BackEnd("CLIPImageProcessor", {"size": {"shortest_edge": 224}, "crop_size": 224})
    with pytest.raises(InvalidRequest, match="mm_processor_kwargs"):
        back_end(picture(40, 80), options)
    assert back_end(picture(40, 80), {"size": {"shortest_edge": 200}})["pixel_values"].shape == (1, 3, 224, 224)


def test_settings_stand_in_either_file(tmp_path: Path) -> None:
    assert image_settings(Folder(tmp_path)) == {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert image_settings(Folder(tmp_path)) == {"patch_size": 14}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"patch_size": 16}}))
    assert image_settings(Folder(tmp_path)) == {"patch_size": 16}
