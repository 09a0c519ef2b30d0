"""ColQwen2 and ColQwen2.5, whole or as adapters, in two layouts, and BiQwen, the same models with one vector.

Prompts are those that the published models were trained with. colpali-engine's classes have put no "Query: " in front since
0.3.11; MTEB and transformers' processor do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from poolhouse.files import Folder
from poolhouse.inputs.content import Content
from poolhouse.inputs.media.processor import image_settings
from poolhouse.inputs.pictures import PictureReader, Written
from poolhouse.inputs.prompts import Role
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.native.families.qwen import QWEN2_VL_TEXT, QWEN3_VL_TEXT
from poolhouse.models.vision.kinds._qwen import AUGMENTED, DESCRIBE, END, PICTURE, processor_settings, qwen_reader
from poolhouse.models.vision.picture_model import PictureModel, TowerFamily, named, own_part
from poolhouse.models.vision.towers.qwen_vl import QWEN2_5_VL_TOWER, QWEN2_VL_TOWER, QWEN3_VL_TOWER

# Of one picture, where no file says how many.
_LEAST_TOKENS, _MOST_TOKENS = 4, 768


def _prompts(
    content: Content, role: Role | None, instruction: str | None, *, query: str, behind: str, picture: str
) -> Written:
    """query, behind: around a text alone. picture: the prompt of a picture, whose turn a caller's text ends."""
    if not content.images:
        return Written(query + content.text, behind)
    text = f" {content.text}" if content.text else ""
    before, *end = picture.partition("<|im_end|>")
    return Written(before.replace(PICTURE, PICTURE * len(content.images)) + text, "".join(end))


def _reader(config: Config, folder: Folder, query: str = "Query: ", behind: str = AUGMENTED) -> PictureReader:
    stated, settings = processor_settings(folder), image_settings(folder)
    most, least = stated.get("max_num_visual_tokens"), None
    if "max_pixels" not in settings and "size" not in settings:
        most, least = most or _MOST_TOKENS, _LEAST_TOKENS
    prompts = partial(
        _prompts,
        query=stated.get("query_prefix", query),
        behind=behind,
        picture=stated.get("visual_prompt_prefix") or f"{DESCRIBE}<|im_end|>{END}",
    )
    return qwen_reader(config, folder, prompts, most, least)


_TEXTS_AS_QUERIES = (
    "Documents that are texts alone are read as queries are, prefix and suffix included: the model's own code knows no "
    "other prompt of a text."
)
_COLQWEN2 = PictureModel(
    "ColQwen2",
    named("ColQwen2"),
    _reader,
    "late",
    text=QWEN2_VL_TEXT,
    tower=QWEN2_VL_TOWER,
    projections=("custom_text_proj",),
    aside=(r"(\w+\.)*lm_head\.weight",),
    notes=(
        'Texts are read with "Query: " in front, as the model was trained, unless its processor\'s files say otherwise.',
        _TEXTS_AS_QUERIES,
    ),
)
_COLQWEN2_5 = replace(_COLQWEN2, name="ColQwen2.5", matches=named("ColQwen2_5"), tower=QWEN2_5_VL_TOWER)
# Adapters on a plain Qwen-VL, so that their names alone tell.
_PLAIN_2, _PLAIN_2_5 = (
    named(f"{series}ForConditionalGeneration", f"{series}Model") for series in ("Qwen2VL", "Qwen2_5_VL")
)
_ON_QWEN2 = replace(_COLQWEN2, matches=_PLAIN_2, named=("colqwen2",))
_ON_QWEN2_5 = replace(_COLQWEN2_5, matches=_PLAIN_2_5, named=("colqwen2.5", "colnomic"))


def _inner(config: Config) -> Config:
    """The Qwen-VL model within transformers' ColQwen2ForRetrieval."""
    inner: Config = config.get("vlm_config") or {}
    return inner


def _of_transformers(model_type: str, tower: TowerFamily) -> PictureModel:
    """transformers' layout of a ColQwen2, around a Qwen-VL model of this type."""

    def matches(config: Config, _: Folder) -> bool:
        inner = _inner(config).get("model_type", "qwen2_vl")
        return architecture(config) == "ColQwen2ForRetrieval" and inner == model_type

    return replace(
        _COLQWEN2,
        name="ColQwen2 of transformers",
        matches=matches,
        # Its processor ends texts with a line break.
        reader=lambda config, folder: _reader(_inner(config), folder, behind=f"{AUGMENTED}\n"),
        text_config=lambda config: own_part(_inner(config)),
        tower=replace(tower, config=lambda config: tower.config(_inner(config))),
        projections=("embedding_proj_layer",),
        width=lambda config: config.get("embedding_dim", 128),
    )


_BIQWEN2 = replace(
    _COLQWEN2,
    name="BiQwen2",
    matches=named("BiQwen2"),
    reader=partial(_reader, behind=END),
    answers="dense",
    projections=(),
    pooling="LAST",
)
_BIQWEN2_5 = replace(_BIQWEN2, name="BiQwen2.5", matches=named("BiQwen2_5"), tower=QWEN2_5_VL_TOWER)
_NOMIC = replace(_BIQWEN2_5, name="nomic-embed-multimodal", matches=_PLAIN_2_5, named=("nomic-embed-multimodal",))
_BIQWEN3 = replace(
    _BIQWEN2,
    name="BiQwen3",
    matches=named("BiQwen3"),
    reader=partial(_reader, query="", behind=END),
    text=QWEN3_VL_TEXT,
    tower=QWEN3_VL_TOWER,
    notes=("Texts get no prefix, as colpali-engine's class has none.", _TEXTS_AS_QUERIES),
)
COLQWEN2 = (
    _COLQWEN2,
    _COLQWEN2_5,
    _ON_QWEN2,
    _ON_QWEN2_5,
    _of_transformers("qwen2_vl", QWEN2_VL_TOWER),
    _of_transformers("qwen2_5_vl", QWEN2_5_VL_TOWER),
    _BIQWEN2,
    _BIQWEN2_5,
    _NOMIC,
    _BIQWEN3,
)
