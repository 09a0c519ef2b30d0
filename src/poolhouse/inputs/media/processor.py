"""Processors: what a tower reads of a decoded picture, by transformers' image processors with their PIL back ends.

Settings stand in `processor_config.json` (under `image_processor`) or in the older `preprocessor_config.json`. The PIL back
end is taken always: torchvision's resizes to other grey levels, so numbers would depend on what is installed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from poolhouse.errors import CheckpointError, InvalidRequest, did_you_mean
from poolhouse.files import Folder, JsonObject
from poolhouse.packing.tokens import Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

# Options that would give what the tower does not read, or that say nothing about the picture.
_FIXED = {
    *("patch_size", "merge_size", "temporal_patch_size", "spatial_merge_size", "pooling_kernel_size"),
    *("return_tensors", "data_format", "input_data_format", "device", "disable_grouping"),
}
# Pixels of the longest side that a request may ask for.
_LONGEST_SIDE = 4096
# Importing transformers' classes from several threads at once may find half of a module.
_IMPORT = threading.Lock()


def image_settings(folder: Folder) -> JsonObject:
    """The settings of a checkpoint's image processor; an empty object where no file has any.

    Raises:
        CheckpointError: a file that is no JSON object.
    """
    nested = folder.json("processor_config.json", needed=False).get("image_processor")
    return nested if isinstance(nested, dict) else folder.json("preprocessor_config.json", needed=False)


class BackEnd:
    """One image processor of transformers, with settings; safe from several threads.

    kind: its class without a suffix for the back end ("Qwen2VLImageProcessor"). settings: of the checkpoint.
    defaults: of the user or of the kind of model, over these.
    """

    def __init__(self, kind: str, settings: Mapping[str, object], **defaults: object) -> None:
        self.kind = kind
        stated = _sized(settings)
        self.settings = {**stated, **_sized(defaults, stated.get("size"))}

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> dict[str, npt.NDArray[Any]]:
        """What the processor gives of one picture, by its names.

        options: of the request, over the settings; by name, or under `images_kwargs`.

        Raises:
            InvalidRequest: an option that it does not have, or a picture that it cannot read.
        """
        chosen = self._checked(options) if options else {}
        try:
            return dict(self._processor(image, return_tensors="np", **chosen))
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"The picture of {image.width} x {image.height} cannot be read: {error}") from error

    @cached_property
    def _processor(self) -> Any:
        with _IMPORT:
            from transformers.models.auto import image_processing_auto as auto

            for model_type, names in auto.IMAGE_PROCESSOR_MAPPING_NAMES.items():  # type: ignore[attr-defined]
                if self.kind in names.values():
                    module = import_module(f"transformers.models.{model_type.replace('-', '_')}")
                    return getattr(module, names["pil"]).from_dict(self.settings)
        raise CheckpointError(f"transformers has no image processor {self.kind!r}.")

    def setting(self, name: str) -> Any:
        """The value of a setting, by the files or by default."""
        return getattr(self._processor, name)

    def _checked(self, options: Mapping[str, object]) -> dict[str, object]:
        nested = options.get("images_kwargs")
        flat = {name: value for name, value in options.items() if name != "images_kwargs"}
        if isinstance(nested, Mapping):
            flat |= nested
        known = sorted(set(self._processor.valid_kwargs.__annotations__) - _FIXED)
        for name in flat:
            if name not in known:
                raise InvalidRequest(
                    f"mm_processor_kwargs: the picture processor has no option '{name}'.{did_you_mean(name, known)} "
                    f"Options: {known}",
                    "mm_processor_kwargs",
                )
        if "min_pixels" not in known:
            # Sizes are sides, not areas.
            for name in ("size", "crop_size"):
                _check_sides(name, flat.get(name), self.settings.get(name))
        return _sized(flat, self.settings.get("size"))


def _check_sides(name: str, size: object, own: object) -> None:
    """Refuse sides that would make a picture of gigabytes: a thin one whose shorter side grows has a very long other."""
    sides = size if isinstance(size, Mapping) else {"side": size}
    stated = own if isinstance(own, Mapping) else {}
    for side, pixels in sides.items():
        most = max(int(stated.get(side) or 0), 0 if side == "shortest_edge" else _LONGEST_SIDE)
        if pixels is not None and not (type(pixels) is int and 0 < pixels <= most):
            raise InvalidRequest(
                f"mm_processor_kwargs.{name}: {side} is {pixels!r}; it must be an integer from 1 to {most}.",
                "mm_processor_kwargs",
            )


def _sized(settings: Mapping[str, object], size: object = None) -> dict[str, object]:
    """Settings with limits of pixels under `size`, where transformers wants them. size: the one that they change."""
    own = dict(settings)
    least, most = own.pop("min_pixels", None), own.pop("max_pixels", None)
    if isinstance(own.get("size"), Mapping):
        own["size"] = _edges(own["size"])
    if least is None and most is None:
        return own
    edges = own.get("size", size)
    edges = dict(edges) if isinstance(edges, Mapping) else {}
    edges |= {name: value for name, value in (("shortest_edge", least), ("longest_edge", most)) if value is not None}
    return {**own, "size": edges}


def _edges(size: Any) -> dict[str, object]:
    """A size with transformers' names of its limits."""
    names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    return {names.get(name, name): value for name, value in size.items()}


class QwenPictures:
    """Pictures for the towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

    A picture is resized to whole merged patches within limits of its area. Of the two equal frames that its patches
    would have only one is kept; the towers' first product is folded likewise.

    token: the id of picture tokens. settings: of the checkpoint; see `image_settings`. limits: `size`, `min_pixels` or
    `max_pixels` of the kind of model, over these.
    """

    def __init__(self, settings: Mapping[str, object], token: int, **limits: object) -> None:
        # The class's own limits, which a file or a request may change by one alone.
        size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
        self._back_end = BackEnd("Qwen2VLImageProcessor", {"size": size, **settings}, **limits)
        self._token = token

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> Picture:
        values = self._back_end(image, options)
        _, rows, columns = (int(count) for count in values["image_grid_thw"][0])
        merge, frames = self._back_end.setting("merge_size"), self._back_end.setting("temporal_patch_size")
        patches = values["pixel_values"].reshape(rows * columns, 3, frames, -1)
        tokens = rows * columns // merge**2
        return Picture(
            pixels=np.ascontiguousarray(patches[:, :, 0], np.float32).reshape(rows * columns, -1),
            ids=np.full(tokens, self._token, np.int64),
            filled=np.ones(tokens, np.bool_),
            grid=(rows, columns),
            extent=(rows // merge, columns // merge),
        )


class LonePictures:
    """Pictures for towers that answer each with one vector (CLIP, SigLIP). A picture is one token, as in vLLM.

    settings: of the checkpoint. kind: the image processor where they name none; see `BackEnd`. patch: rows and columns of
    a patch. grid: rows and columns of patches that the tower has positions for; None for any, which is SigLIP 2's NaFlex.
    """

    def __init__(self, settings: Mapping[str, object], kind: str, patch: int, grid: tuple[int, int] | None) -> None:
        named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or kind
        kind = str(named).removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
        self._back_end = BackEnd(kind, settings)
        self._patch, self._grid = patch, grid

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> Picture:
        values = self._back_end(image, options)
        pixels = values["pixel_values"][0]
        if "spatial_shapes" in values:
            # Patches already, and empty ones behind them, up to a fixed number.
            rows, columns = (int(count) for count in values["spatial_shapes"][0])
            return lone_picture(pixels[: rows * columns], (rows, columns))
        channels, height, width = pixels.shape
        grid = height // self._patch, width // self._patch
        if self._grid is not None and grid != self._grid:
            wanted, found = (" x ".join(str(count * self._patch) for count in sides) for sides in (self._grid, grid))
            raise InvalidRequest(
                f"This model reads pictures of {wanted} pixels; its picture processor made one of {found}.",
                "mm_processor_kwargs",
            )
        patches = pixels[:, : grid[0] * self._patch, : grid[1] * self._patch]
        patches = patches.reshape(channels, grid[0], self._patch, grid[1], self._patch).transpose(1, 3, 0, 2, 4)
        return lone_picture(patches.reshape(grid[0] * grid[1], -1), grid)


def lone_picture(patches: npt.NDArray[Any], grid: tuple[int, int]) -> Picture:
    """A picture that is a prompt by itself: one token, of an id that every vocabulary has."""
    return Picture(
        pixels=np.ascontiguousarray(patches, np.float32),
        ids=np.zeros(1, np.int64),
        filled=np.ones(1, np.bool_),
        grid=grid,
    )
