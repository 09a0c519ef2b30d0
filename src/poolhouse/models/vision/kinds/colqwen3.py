"""ColQwen3: late interaction on Qwen3-VL, in the layouts of TomoroAI, OpenSearch-AI, Nvidia and colpali-engine.

Prompts and lengths are those of the models' own code. vLLM 0.32 reads the same files otherwise: it drops the projection's
bias, writes no prompts, and runs Nvidia's models causal and with their final norm.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.inputs.content import Content
from poolhouse.inputs.late_interaction import LateInteraction, TextRules
from poolhouse.inputs.pictures import PictureReader, Written
from poolhouse.inputs.prompts import Role
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families.llama import HEADS
from poolhouse.models.native.families.qwen import QWEN3_VL_TEXT
from poolhouse.models.native.weights import Layout
from poolhouse.models.vision.kinds._qwen import AUGMENTED, DESCRIBE, END, PICTURE, processor_settings, qwen_reader
from poolhouse.models.vision.picture_model import PictureModel, named, own_part
from poolhouse.models.vision.towers.qwen_vl import QWEN3_VL_TOWER

_HEAD = r"(\w+\.)*lm_head\.weight"
# What Tomoro's loader allows a picture unless its caller says otherwise.
_TOMORO_TOKENS = 1280


def _described(
    content: Content, role: Role | None, instruction: str | None, *, query: str, before: str, behind: str, strip: bool
) -> Written:
    """A prompt that lets pictures be described, or, of a text alone, the augmented prompt that queries have.

    query: what stands before a text. before, behind: around the caller's text where there are pictures. strip: whether
    a text loses the blanks around it.
    """
    text, count = content.text.strip() if strip else content.text, len(content.images)
    if not count:
        return Written(query + text, AUGMENTED)
    return Written(before.replace(PICTURE, PICTURE * count) + (f" {text}" if text else ""), behind)


def _reader(
    config: Config, folder: Folder, query: str = "", behind: str = "", strip: bool = False, most: int | None = None
) -> PictureReader:
    """query, behind, most: prefix of texts, suffix of pictures, and tokens of one, unless the files say otherwise."""
    settings = processor_settings(folder, config)
    stated = settings.get("query_prefix")
    prompts = partial(
        _described,
        query=query if stated is None else stated,
        before=settings.get("visual_prompt_prefix") or DESCRIBE,
        behind=settings.get("visual_prompt_suffix") or behind,
        strip=strip,
    )
    return qwen_reader(config, folder, prompts, settings.get("max_num_visual_tokens") or most)


def _tomoro(config: Config, folder: Folder) -> PictureReader:
    return _reader(config, folder, behind=f"<|im_end|>{END}", strip=True, most=_TOMORO_TOKENS)


def _engine(config: Config, folder: Folder) -> PictureReader:
    return _reader(config, folder, behind=f"<|im_end|>{END}")


def _ops(config: Config, folder: Folder) -> PictureReader:
    if config.get("mask_non_image_embeddings"):
        raise CheckpointError("config.json: mask_non_image_embeddings leaves texts without vectors; it is not served.")
    return _reader(config, folder, "Query: ", f"<|im_end|><|im_start|>assistant\n{END}")


def _chat(content: Content, role: Role | None, instruction: str | None, *, query: str, passage: str) -> Written:
    """One message of a user, where pictures come first. The doubled "Query: query: " is what the models were trained on."""
    prefix = f"Query: {query}" if role == "query" else passage
    text = f"<|im_start|>user\n{PICTURE * len(content.images)}{prefix} {content.text}"
    return Written(text, "<|im_end|>\n<|im_start|>assistant\n")


def _nemotron(config: Config, folder: Folder) -> PictureReader:
    settings = processor_settings(folder, config)
    query, passage = settings.get("query_prefix", "query:"), settings.get("passage_prefix", "passage:")
    return qwen_reader(config, folder, partial(_chat, query=query, passage=passage))


def _nemotron_rules(config: Config, folder: Folder) -> LateInteraction:
    """Longer queries and documents are cut; of one with pictures, its text."""
    settings = processor_settings(folder, config)
    return LateInteraction(
        TextRules(length=settings.get("q_max_length") or 512), TextRules(length=settings.get("p_max_length") or 4096)
    )


_TEXTS_AS_QUERIES = (
    "Documents that are texts alone are read as queries are, with ten <|endoftext|> behind them: its own code knows no "
    "other prompt of a text."
)
_TOMORO = PictureModel(
    "ColQwen3 of TomoroAI",
    named("ColQwen3", model_types=("colqwen3",)),
    _tomoro,
    "late",
    text=QWEN3_VL_TEXT,
    tower=QWEN3_VL_TOWER,
    projections=("embedding_proj_layer", "custom_text_proj"),
    width=lambda config: config.get("embed_dim"),
    aside=(_HEAD,),
    notes=(_TEXTS_AS_QUERIES,),
)
_ENGINE = replace(
    _TOMORO,
    name="ColQwen3 of colpali-engine",
    matches=named("ColQwen3", model_types=("qwen3_vl",)),
    reader=_engine,
    projections=("custom_text_proj",),
    notes=("Queries get no prefix, as colpali-engine's class has none.", _TEXTS_AS_QUERIES),
)
_OPS = replace(
    _TOMORO,
    name="ColQwen3 of OpenSearch-AI",
    matches=named("OpsColQwen3Model"),
    reader=_ops,
    projections=("custom_text_proj",),
    width=lambda config: None,
    dims=lambda config: config.get("dims"),
)
# Every token sees both sides, and vectors are hidden states before the final norm, whose weight the files hold all the same.
_NEMOTRON_TEXT = replace(
    QWEN3_VL_TEXT,
    layouts=tuple(
        Layout({slot: source for slot, source in layout.names.items() if slot != "final_norm"})
        for layout in QWEN3_VL_TEXT.layouts
    ),
    aside=(*HEADS, r"norm\.weight"),
)
_NEMOTRON = PictureModel(
    "Nemotron ColEmbed VL v2",
    named("Qwen3VLNemotronEmbedModel"),
    _nemotron,
    "late",
    text=_NEMOTRON_TEXT,
    text_config=lambda config: {**own_part(config), "is_causal": False},
    tower=QWEN3_VL_TOWER,
    rules=_nemotron_rules,
    aside=(_HEAD,),
    notes=("Tokens see both sides, and the final norm is left out, as in its own code.",),
)
COLQWEN3 = (_TOMORO, _ENGINE, _OPS, _NEMOTRON)
