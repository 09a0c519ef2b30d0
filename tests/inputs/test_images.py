"""Pictures of strangers: what is decoded, as which pixels, and what is refused by name."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageOps

from poolhouse.errors import InvalidRequest
from poolhouse.inputs.media.images import FORMATS, ImageLimits, bytes_of_base64, decoded

LIMITS = ImageLimits()
PATH = "messages[0].content[1]"


def noise(height: int = 12, width: int = 20, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def saved(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def pixels(source: object, limits: ImageLimits = LIMITS) -> np.ndarray:
    picture = decoded(source, PATH, limits)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def opened(data: bytes) -> np.ndarray:
    """As transformers' load_image reads a file."""
    return np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB"))


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_as_pil_reads_it(form: str) -> None:
    data = saved(Image.fromarray(noise()), form)
    np.testing.assert_array_equal(pixels(data), opened(data))
    np.testing.assert_array_equal(pixels(memoryview(data)), opened(data))


OF_MODES: dict[str, Callable[[], tuple[Image.Image, str]]] = {
    "palette": lambda: (Image.fromarray(noise()).quantize(16), "PNG"),
    "one bit": lambda: (Image.fromarray(noise()).convert("1"), "PNG"),
    "grey": lambda: (Image.fromarray(noise()).convert("L"), "JPEG"),
    "cmyk": lambda: (Image.fromarray(noise()).convert("CMYK"), "JPEG"),
    "16 bit grey": lambda: (Image.fromarray(noise(channels=1)[..., 0].astype(np.uint16) * 3), "PNG"),
    "32 bit grey": lambda: (Image.fromarray(noise(channels=1)[..., 0].astype(np.int32) * 2), "TIFF"),
    "floats": lambda: (Image.fromarray(noise(channels=1)[..., 0].astype(np.float32)), "TIFF"),
    "lab": lambda: (Image.fromarray(noise(), "LAB"), "TIFF"),
}


@pytest.mark.parametrize("kind", OF_MODES)
def test_modes_become_rgb_as_in_the_reference(kind: str) -> None:
    data = saved(*OF_MODES[kind]())
    np.testing.assert_array_equal(pixels(data), opened(data))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(float) / 255
    return colour * share + 255 * (1 - share)


def test_transparency_is_flattened_on_white() -> None:
    rgba = noise(channels=4)
    expected = on_white(rgba[..., :3], rgba[..., 3:])
    np.testing.assert_allclose(pixels(saved(Image.fromarray(rgba))), expected, atol=1)
    grey = noise(channels=2)
    found = pixels(saved(Image.fromarray(grey, "LA")))
    np.testing.assert_allclose(found, np.repeat(on_white(grey[..., :1], grey[..., 1:]), 3, 2), atol=1)


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_one_transparent_colour_is_white(mode: str) -> None:
    picture = Image.new(mode, (4, 3))
    if mode == "P":
        picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 1), 1 if mode != "RGB" else (1, 1, 1))
    found = pixels(saved(picture, transparency=0 if mode != "RGB" else (0, 0, 0)))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[1, 1].tolist() == {"P": [40, 50, 60], "RGB": [1, 1, 1], "L": [1, 1, 1]}[mode]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(noise()), "PNG", exif=exif)
    found = pixels(data)
    assert found.shape == ((12, 20, 3) if orientation < 5 else (20, 12, 3))
    np.testing.assert_array_equal(found, opened(data))


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_frame_is_read(form: str) -> None:
    frames = [Image.fromarray(noise(seed=seed)).quantize(16).convert("RGB") for seed in range(3)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 3
    np.testing.assert_array_equal(pixels(data), np.asarray(frames[0]))


def test_arrays_and_pil_pictures_are_read_as_files_are() -> None:
    rgb = noise()
    np.testing.assert_array_equal(pixels(rgb), rgb)
    np.testing.assert_array_equal(pixels(rgb[..., 0]), np.repeat(rgb[..., :1], 3, 2))
    np.testing.assert_array_equal(pixels(rgb[..., :1]), np.repeat(rgb[..., :1], 3, 2))
    rgba = noise(channels=4)
    np.testing.assert_array_equal(pixels(rgba), pixels(saved(Image.fromarray(rgba))))
    np.testing.assert_array_equal(pixels(Image.fromarray(rgba)), pixels(rgba))
    np.testing.assert_array_equal(pixels(Image.open(BytesIO(saved(Image.fromarray(rgb))))), rgb)


def test_the_smallest_picture_is_read() -> None:
    assert pixels(saved(Image.new("RGB", (1, 1), "red"))).tolist() == [[[255, 0, 0]]]


def png_header(width: int, height: int) -> bytes:
    """A PNG of so many pixels, without any."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PNG = saved(Image.fromarray(noise(64, 64)))
REFUSED: dict[str, tuple[object, str]] = {
    "nothing": (b"", "these 0 bytes are no picture of a format that is read: PNG, JPEG, WEBP, GIF, BMP, TIFF"),
    "a text": (b"<html>not found</html>", "no picture of a format that is read"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of a format that is read"),
    "eps": (saved(Image.fromarray(noise()), "EPS"), "no picture of a format that is read"),
    "pdf": (saved(Image.fromarray(noise()), "PDF"), "no picture of a format that is read"),
    "ppm": (saved(Image.fromarray(noise()), "PPM"), "no picture of a format that is read"),
    "cut in its data": (PNG[: len(PNG) // 2], "cannot be decoded: image file is truncated"),
    "cut in its header": (PNG[:20], "cannot be decoded|no picture of a format"),
    "half a jpeg": (saved(Image.fromarray(noise(64, 64)), "JPEG")[:-300], "cannot be decoded: image file is truncated"),
    "half a webp": (saved(Image.fromarray(noise(64, 64)), "WEBP")[:-300], "cannot be decoded|no picture"),
    "wrong data": (PNG[:60] + bytes(100) + PNG[160:], "cannot be decoded"),
    "a bomb": (png_header(20_000, 20_000), r"cannot be decoded|has 20000 x 20000 pixels"),
    "too large": (png_header(7_200, 7_000), r"7200 x 7000 pixels; at most 50000000 are read \(max_image_pixels\)"),
    "too thin": (saved(Image.new("RGB", (401, 2))), r"401 x 2 has a side ratio of over 200 \(max_image_ratio\)"),
    "an array of floats": (noise().astype(np.float32), r"not float32 \[12, 20, 3\]"),
    "channels first": (noise().transpose(2, 0, 1), r"with 1, 3 or 4 of them, not uint8 \[3, 12, 20\]"),
    "an empty array": (np.zeros((0, 4, 3), np.uint8), r"the picture is empty \(4 x 0\)"),
    "a number": (7, "a PIL picture, not int"),
    "nothing at all": (None, "a PIL picture, not NoneType"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_what_is_no_picture_is_refused_by_name(kind: str) -> None:
    source, reason = REFUSED[kind]
    with pytest.raises(InvalidRequest, match=rf"^messages\[0\]\.content\[1\]: .*({reason})") as raised:
        decoded(source, PATH, LIMITS)
    assert raised.value.parameter == PATH


def test_pixels_are_counted_before_any_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(InvalidRequest, match="at most 100 are read"):
        decoded(PNG, PATH, ImageLimits(max_pixels=100))


@pytest.mark.parametrize("limit", [None, 10, 10**9])
def test_pils_own_limit_is_neither_needed_nor_touched(limit: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if limit == 10:
        with pytest.raises(InvalidRequest, match="cannot be decoded"):
            decoded(PNG, PATH, LIMITS)
    else:
        with pytest.raises(InvalidRequest, match="max_image_pixels"):
            decoded(png_header(20_000, 20_000), PATH, LIMITS)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_base64_is_strict() -> None:
    text = base64.b64encode(PNG).decode()
    assert bytes_of_base64(text, PATH, len(PNG)) == PNG
    for wrong in (text[:-1], text[:8] + "\n" + text[8:], text + "==*", text.replace(text[4], "-"), "päng", "*"):
        with pytest.raises(InvalidRequest, match=r"^messages\[0\]\.content\[1\]: the picture is not valid base64"):
            bytes_of_base64(wrong, PATH, len(PNG))
    with pytest.raises(InvalidRequest, match=rf"has more than {len(PNG) - 1} bytes \(max_image_bytes\)"):
        bytes_of_base64(text, PATH, len(PNG) - 1)
