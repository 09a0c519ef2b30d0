"""Nvidia's Llama Nemotron VL: SigLIP, squares of four rows as one, and a Llama whose tokens see both sides.

It embeds or scores. A picture is read in tiles, of a number and shape that fit its sides, and once as a whole.
Prompts and tiles are those of the models' own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from poolhouse.errors import CheckpointError, InvalidRequest, did_you_mean
from poolhouse.files import Folder
from poolhouse.inputs.content import Content
from poolhouse.inputs.pictures import PictureReader, Written
from poolhouse.inputs.prompts import Role
from poolhouse.inputs.tokenizer_files import read_tokenizer
from poolhouse.models.backbone import Tower
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import refuse
from poolhouse.models.native.families.llama import LLAMA_BIDIRECTIONAL
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.weights import Layout, Weights
from poolhouse.models.vision.kinds._qwen import processor_settings
from poolhouse.models.vision.kinds.clip import half, names, pre_norm
from poolhouse.models.vision.kinds.siglip import VISION_DEFAULTS
from poolhouse.models.vision.picture_model import PictureModel, TowerFamily, named
from poolhouse.models.vision.towers.vit import Shuffled, VisionTransformer
from poolhouse.packing.tokens import Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_PICTURE = "<IMG_CONTEXT>"
_OPTIONS = ("max_input_tiles", "use_thumbnail")
# A shape that covers this share of a picture's area is good enough.
_COVERED = 0.6


class NemotronPictures:
    """Pictures as tiles of one size, and in one tile behind them where there are several.

    side, patch: of a tile and of a patch, in pixels. rows: that a tile becomes. ids: of the marks before and after a
    picture, and of its rows. settings: how many tiles, and whether there is one of the whole.
    """

    def __init__(
        self, side: int, patch: int, rows: int, ids: tuple[int, int, int], settings: Mapping[str, object]
    ) -> None:
        self._side, self._patch, self._rows, self._ids, self._settings = side, patch, rows, ids, settings

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> Picture:
        for name in options:
            if name not in _OPTIONS:
                raise InvalidRequest(
                    f"mm_processor_kwargs: the picture processor has no option '{name}'."
                    f"{did_you_mean(name, _OPTIONS)} Options: {list(_OPTIONS)}",
                    "mm_processor_kwargs",
                )
        chosen = {**self._settings, **options}
        most, whole = chosen["max_input_tiles"], chosen["use_thumbnail"]
        if not isinstance(most, int) or most < 1:
            raise InvalidRequest(f"mm_processor_kwargs: max_input_tiles must be 1 or more, got {most!r}.")
        across, down = _shape(image.width, image.height, most, self._side)
        pixels = self._cut(image, across, down)
        if whole and across * down > 1:
            pixels = np.concatenate([pixels, self._cut(image, 1, 1)])
        before, after, row = self._ids
        ids = np.array([before, *[row] * (self._rows * len(pixels)), after], np.int64)
        return Picture(pixels.reshape(-1, pixels.shape[-1]), ids, ids == row)

    def _cut(self, image: PILImage, across: int, down: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """[tiles, patches, features], tiles row by row."""
        side, patch = self._side, self._patch
        resized = np.asarray(image.convert("RGB").resize((across * side, down * side)), np.float32)
        cells = side // patch
        tiles = resized.reshape(down, cells, patch, across, cells, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        return np.ascontiguousarray(tiles).reshape(down * across, cells**2, -1) / 127.5 - 1


def _shape(width: int, height: int, most: int, side: int) -> tuple[int, int]:
    """Tiles across and down, of at most so many: near to the picture's shape, and to most of its area."""

    def fits(shape: tuple[int, int]) -> float:
        area, aspect = prod(shape) * side**2 / (width * height), shape[0] / shape[1] * height / width
        return min(area, _COVERED) * min(aspect, 1 / aspect)

    # Of equally good ones the first, in the order in which the models' own code goes through them.
    shapes = {(i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= most}
    return max(sorted(shapes, key=prod), key=fits)


def _vision(config: Config) -> Config:
    """The tower's part, with what the picture's rows are made by."""
    vision = half(config, "vision_config", VISION_DEFAULTS)
    refuse(config, {"select_layer": (None, -1)})
    size = config.get("force_image_size") or vision["image_size"]
    return {**vision, "image_size": size, "factor": _factor(config)}


def _text(config: Config) -> Config:
    part: Config = config["llm_config"]
    return {**part, "is_causal": False}


def _factor(config: Config) -> int:
    """Patches of a row, on each side."""
    ratio: float = config.get("downsample_ratio", 0.5)
    return round(1 / ratio)


def _reader(config: Config, folder: Folder, *, tiles: int) -> PictureReader:
    """tiles: of a picture at most, where no file says."""
    settings, vision = processor_settings(folder), _vision(config)
    native = read_tokenizer(folder).native
    row = config.get("img_context_token_id", 128258)
    before, after = native.token_to_id("<img>"), native.token_to_id("</img>")
    if before is None or after is None or native.id_to_token(row) != _PICTURE:
        raise CheckpointError(f"{folder}: the tokenizer lacks <img>, </img> or {_PICTURE}, the marks of pictures.")
    pictures = NemotronPictures(
        vision["image_size"],
        vision["patch_size"],
        (vision["image_size"] // vision["patch_size"] // _factor(config)) ** 2,
        (before, after, row),
        {
            "max_input_tiles": settings.get("max_input_tiles") or config.get("max_input_tiles") or tiles,
            "use_thumbnail": settings.get("use_thumbnail", True),
        },
    )
    prefixes = {role: settings.get(name) or default for role, name, default in _PREFIXES}
    prompts = partial(_prompt, prefixes=prefixes)
    template = settings.get("prompt_template") or config.get("prompt_template")
    return PictureReader(pictures, prompts, _PICTURE, row, pair=partial(_pair, named=template == "v1"))


_PREFIXES = (("query", "query_prefix", "query:"), ("document", "passage_prefix", "passage:"))


def _prompt(content: Content, role: Role | None, instruction: str | None, *, prefixes: Mapping[str, str]) -> Written:
    """A query, or a document, as pictures are; a text of neither role as it stands."""
    text = f"{_PICTURE} " * len(content.images) + content.text
    found = role or ("document" if content.images else None)
    return Written(text if found is None else f"{prefixes[found]} {text}")


def _pair(query: Content, document: Content, instruction: str | None, *, named: bool) -> Written:
    """named: whether both sides are named, as config.json's `prompt_template` "v1" says."""
    if query.images:
        raise InvalidRequest(
            "Nemotron's reranker compares a text with a text or a page: the query must be a text.", "data_1"
        )
    sides = f"question:{query.text} \n \n passage:{document.text}" if named else f"{query.text} \n {document.text}"
    return Written(f"{_PICTURE} " * len(document.images) + sides)


def _tower(config: Config, spec: TransformerSpec, weights: Weights) -> Tower:
    return VisionTransformer(spec, weights, Shuffled(weights, config["factor"]))


def _blank(config: Config) -> Picture:
    """One tile."""
    cells = config["image_size"] // config["patch_size"]
    ids = np.zeros((cells // config["factor"]) ** 2, np.int64)
    return Picture(np.zeros((cells**2, 3 * config["patch_size"] ** 2), np.float32), ids, np.ones(len(ids), np.bool_))


_TOWER = TowerFamily(
    _vision,
    pre_norm,
    tuple(
        Layout(
            {
                "patches": f"{side}.embeddings.patch_embedding",
                **names(side, "post_layernorm"),
                "head.norm": "mlp1.0",
                "head.up": "mlp1.1",
                "head.down": "mlp1.3",
            },
            anchor="patches",
        )
        for side in ("vision_model.vision_model", "vision_model")
    ),
    _tower,
    _blank,
)
_EMBED = PictureModel(
    "Llama Nemotron Embed VL",
    named("LlamaNemotronVLModel"),
    partial(_reader, tiles=6),
    "dense",
    text=LLAMA_BIDIRECTIONAL,
    text_config=_text,
    tower=_TOWER,
    # An attention that pools pictures, which nobody asks.
    aside=(r"(.*\.)?vision_model\.head\..*",),
    notes=("Texts that are neither queries nor documents are read as they stand, without a prefix.",),
)
_RERANK = replace(
    _EMBED,
    name="Llama Nemotron Rerank VL",
    matches=named("LlamaNemotronVLForSequenceClassification"),
    reader=partial(_reader, tiles=2),
    answers="score",
    notes=(),
)
NEMOTRON = (_EMBED, _RERANK)
