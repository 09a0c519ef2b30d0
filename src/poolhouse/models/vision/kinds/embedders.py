"""Embedders on Qwen-VL: Qwen3-VL-Embedding, GME, DSE and its kin, VLM2Vec-V2, and plain models of the three series.

They have one class for all, so names tell them apart: of the checkpoint, of its card, of the bases of its card. Source of
prompts, limits and positions: the models' own code and cards; of vdr, MTEB's.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

from poolhouse.files import DEFAULT, Folder, special_tokens
from poolhouse.inputs.content import Content
from poolhouse.inputs.conversations import ContentFormat, Conversations
from poolhouse.inputs.pictures import PictureProcessor, PicturePrompts, PictureReader, Written, plain_prompts
from poolhouse.inputs.prompts import Role
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.rerankers import stored_template
from poolhouse.models.native.families.qwen import QWEN2_VL_TEXT, QWEN3_VL_TEXT
from poolhouse.models.vision.kinds._qwen import END, HELPFUL, PICTURE, TURN, framed, pictures_first, qwen_reader
from poolhouse.models.vision.picture_model import PictureModel, named
from poolhouse.models.vision.towers.qwen_vl import QWEN2_5_VL_TOWER, QWEN2_VL_TOWER, QWEN3_VL_TOWER
from poolhouse.packing.tokens import Picture

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_PAD = "<|image_pad|>"


def _qwen3_prompt(content: Content, role: Role | None, instruction: str | None) -> Written:
    system = (instruction or "").strip() or "Represent the user's input."
    if not unicodedata.category(system[-1]).startswith("P"):
        system += "."
    return framed(system, pictures_first(content) or "NULL", TURN)


def _gme_prompt(content: Content, role: Role | None, instruction: str | None) -> Written:
    system = HELPFUL if role == "document" else instruction or HELPFUL
    return framed(system, pictures_first(content), TURN + END)


def _dse_prompt(
    content: Content, role: Role | None, instruction: str | None, *, blank: Callable[[], Picture], tail: str
) -> Written:
    """blank: the picture that texts show."""
    if content.images:
        return framed(HELPFUL, PICTURE * len(content.images) + (content.text or "What is shown in this image?"), tail)
    name = "Document" if role == "document" else "Query"
    return replace(framed(HELPFUL, f"{PICTURE}{name}: {content.text}", tail), images=(blank(),))


def _vlm2vec_prompt(content: Content, role: Role | None, instruction: str | None) -> Written:
    if not content.images:
        return Written(f"{instruction} {content.text}" if instruction else content.text)
    asked = "Represent the given image with the following question:" if content.text else "Represent the given image."
    return Written(" ".join(filter(None, (*[_PAD] * len(content.images), instruction or asked, content.text))))


def _reader(prompts: PicturePrompts, least: int, most: int, config: Config, folder: Folder) -> PictureReader:
    """least, most: picture tokens of one picture."""
    return replace(qwen_reader(config, folder, prompts, most, least), instructs=True)


@dataclass(frozen=True, slots=True)
class _ResizedBefore:
    """A processor of pictures that qwen-vl-utils has resized before: to whole cells, 4 to 16,384 of them.

    So the processor finds other sides, which may round to another number of cells. cell: its side in pixels.
    """

    processor: PictureProcessor
    cell: int

    def __call__(self, image: PILImage, options: Mapping[str, object]) -> Picture:
        size = whole_cells(image.size, self.cell)
        return self.processor(image if size == image.size else image.convert("RGB").resize(size), options)


def whole_cells(size: tuple[int, int], cell: int, least: int = 4, most: int = 16384) -> tuple[int, int]:
    """A size near that of a picture, of so many whole cells at least and at most. Source: qwen-vl-utils."""
    sides, area = [max(cell, round(side / cell) * cell) for side in size], math.prod(size)
    least, most = least * cell**2, most * cell**2
    if math.prod(sides) > most:
        shrunk = math.sqrt(area / most)
        sides = [max(cell, math.floor(side / shrunk / cell) * cell) for side in size]
    elif math.prod(sides) < least:
        grown = math.sqrt(least / area)
        sides = [math.ceil(side * grown / cell) * cell for side in size]
    return sides[0], sides[1]


def _resized_before(reader: PictureReader, config: Config) -> PictureReader:
    tower = QWEN2_VL_TOWER.config(config)
    return replace(
        reader, processor=_ResizedBefore(reader.processor, tower["patch_size"] * tower["spatial_merge_size"])
    )


def _gme_reader(config: Config, folder: Folder) -> PictureReader:
    least, most = config.get("min_image_tokens", 256), config.get("max_image_tokens", 1280)
    reader = _resized_before(_reader(_gme_prompt, least, most, config, folder), config)
    return replace(reader, axes=False)


def _dse_reader(tail: str, most: int, resized: bool, config: Config, folder: Folder) -> PictureReader:
    """resized: whether pictures are resized before."""
    reader = qwen_reader(config, folder, plain_prompts(PICTURE), most, 1)
    reader = _resized_before(reader, config) if resized else reader

    @cache
    def blank() -> Picture:
        from PIL import Image  # with the first text

        return reader.processor(Image.new("RGB", (56, 56)), {})

    return replace(reader, prompts=partial(_dse_prompt, blank=blank, tail=tail))


def _vlm2vec_reader(config: Config, folder: Folder) -> PictureReader:
    reader = qwen_reader(config, folder, _vlm2vec_prompt)
    return replace(reader, placeholder=_PAD, axes=False, instructs=True)


def _plain_reader(config: Config, folder: Folder) -> PictureReader:
    """By the chat template where sentence-transformers' files say so, else with nothing around texts and pictures."""
    settings = folder.json("sentence_bert_config.json", needed=False)
    limits = (settings.get("processing_kwargs") or {}).get("image") or {}
    templated = "message" in (settings.get("modality_config") or {})
    prompts = _templated(config, folder) if templated else plain_prompts(PICTURE)
    return replace(qwen_reader(config, folder, prompts, **limits), instructs=templated)


def _templated(config: Config, folder: Folder) -> PicturePrompts:
    """Prompts by the chat template that sentence-transformers would render: one message of a user.

    An instruction is the system message.
    """
    stored = stored_template(folder, config)
    assert stored is not None
    variables = dict(stored.variables)
    generates = bool(variables.pop("add_generation_prompt", False))
    form: ContentFormat = "openai" if stored.structured else "string"
    conversations = Conversations({DEFAULT: stored.text}, special_tokens(folder), form, PICTURE)

    def prompts(content: Content, role: Role | None, instruction: str | None) -> Written:
        # The template looks at no picture.
        parts = [part if isinstance(part, str) else {"type": "image", "image": b""} for part in content.parts]
        messages: list[object] = [{"role": "user", "content": parts}]
        if instruction:
            messages.insert(0, {"role": "system", "content": instruction})
        rendered = conversations.prompt(messages, add_generation_prompt=generates, variables=variables).text or ""
        last = next((part for part in content.parts[-1:] if isinstance(part, str)), "")
        # What the template writes behind the text stays, whatever is cut.
        before, text, behind = rendered.rpartition(last) if last else ("", rendered, "")
        return Written(before + text, behind, add_special_tokens=False)

    return prompts


_QWEN2 = ("Qwen2VLForConditionalGeneration", "Qwen2VLModel")
_QWEN2_5 = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")
_QWEN3 = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")

_AS_GIVEN = (
    "No embedder is known by this checkpoint's names: texts are read as they are, pictures before them, unless "
    "sentence-transformers' files name a chat template."
)
_PLAIN_QWEN2 = PictureModel(
    "Qwen2-VL",
    named(*_QWEN2),
    _plain_reader,
    "dense",
    text=QWEN2_VL_TEXT,
    tower=QWEN2_VL_TOWER,
    pooling="LAST",
    aside=(r"(\w+\.)*lm_head\.weight",),
    notes=(_AS_GIVEN,),
)
_PLAIN_QWEN2_5 = replace(_PLAIN_QWEN2, name="Qwen2.5-VL", matches=named(*_QWEN2_5), tower=QWEN2_5_VL_TOWER)
_PLAIN_QWEN3 = replace(_PLAIN_QWEN2, name="Qwen3-VL", matches=named(*_QWEN3), text=QWEN3_VL_TEXT, tower=QWEN3_VL_TOWER)
_QWEN3_VL_EMBEDDING = replace(
    _PLAIN_QWEN3,
    name="Qwen3-VL-Embedding",
    matches=named(*_QWEN3, "Qwen3VLForEmbedding"),
    named=("qwen3-vl-embedding",),
    reader=partial(_reader, _qwen3_prompt, 4, 1800),
    max_tokens=8192,
    notes=(),
)
_GME = replace(
    _PLAIN_QWEN2,
    name="GME-Qwen2-VL",
    matches=named(*_QWEN2, "GmeQwen2VL", "GmeQwen2VLForVision2Seq"),
    named=("gme-qwen2-vl",),
    reader=_gme_reader,
    max_tokens=1800,
    notes=("Pictures take plain positions: GME's own code gives its text half none that count rows and columns.",),
)
_QUERIES = 'Texts are queries ("Query: ") unless the request says that they are documents, and show a blank picture.'
_DSE = replace(
    _PLAIN_QWEN2,
    name="DSE-Qwen2",
    named=("dse-qwen2",),
    reader=partial(_dse_reader, TURN + END, 2560, True),
    notes=(_QUERIES,),
)
_VDR = replace(_DSE, name="vdr-2b", named=("vdr-2b",), reader=partial(_dse_reader, f"<|im_end|>\n{END}", 768, False))
_VLM2VEC = replace(
    _PLAIN_QWEN2,
    name="VLM2Vec-V2",
    named=("vlm2vec",),
    reader=_vlm2vec_reader,
    notes=("Pictures take plain positions: without <|vision_start|> the model's own code counts no rows and columns.",),
)
EMBEDDERS = (_QWEN3_VL_EMBEDDING, _GME, _DSE, _VDR, _VLM2VEC, _PLAIN_QWEN2, _PLAIN_QWEN2_5, _PLAIN_QWEN3)
