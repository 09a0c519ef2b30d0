"""Rerankers on Qwen-VL: jina-reranker-m0, Qwen3-VL-Reranker, lychee-rerank-mm and MonoQwen2-VL.

Source of prompts and limits: the models' own code; of lychee-rerank-mm, what runs it in public.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from poolhouse.errors import InvalidRequest
from poolhouse.files import Folder
from poolhouse.inputs.content import Content
from poolhouse.inputs.pictures import PairPrompts, PictureReader, Written
from poolhouse.inputs.prompts import Role
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.heads.heads import Head, HeadModule
from poolhouse.models.native.families.qwen import QWEN2_VL_TEXT, QWEN3_VL_TEXT
from poolhouse.models.vision.kinds._qwen import HELPFUL, PICTURE, TURN, framed, in_order, pictures_first, qwen_reader
from poolhouse.models.vision.picture_model import PictureModel, named
from poolhouse.models.vision.towers.qwen_vl import QWEN2_5_VL_TOWER, QWEN2_VL_TOWER, QWEN3_VL_TOWER

_LONGEST = 10240
_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)


def _alone(content: Content, role: Role | None, instruction: str | None) -> Written:
    """What is no pair: as its caller writes it."""
    return Written(in_order(content))


def _reader(
    pair: PairPrompts, instructs: bool, least: int | None = None, most: int | None = None
) -> Callable[[Config, Folder], PictureReader]:
    """The reader of a reranker. least, most: picture tokens of one picture."""

    def reader(config: Config, folder: Folder) -> PictureReader:
        found = qwen_reader(config, folder, _alone, most, least)
        return replace(found, pair=pair, instructs=instructs)

    return reader


def _m0_pair(query: Content, document: Content, instruction: str | None) -> Written:
    line = f"{instruction}\n" if instruction else ""
    return Written(
        f"{line}**Document**:\n{in_order(document)}\n**Query**:\n{in_order(query)}",
        # The token whose state is scored stands for no text.
        tail_ids=(100,),
        images=(*document.images, *query.images),
    )


def _judged(query: Content, document: Content, instruction: str | None, *, default: str) -> Written:
    """Qwen3-VL-Reranker's frame: pictures before the text of each side, NULL for an empty side."""
    asked, shown = (pictures_first(side) or "NULL" for side in (query, document))
    return framed(_JUDGE, f"<Instruct>: {instruction or default}<Query>:{asked}\n<Document>:{shown}", TURN)


def _mono_pair(query: Content, document: Content, instruction: str | None) -> Written:
    if query.images or not document.images or document.text:
        raise InvalidRequest(
            "MonoQwen2-VL compares a text with a page: the query must be a text, the document a picture.", "data_2"
        )
    return framed(
        HELPFUL,
        f"{PICTURE * len(document.images)}Assert the relevance of the previous image document to the following query, "
        f"answer True or False. The query is: {query.text}",
        TURN,
    )


_M0 = PictureModel(
    "jina-reranker-m0",
    named("JinaVLForRanking", "JinaVLForSequenceClassification"),
    _reader(_m0_pair, instructs=True, least=4, most=768),
    "score",
    text=replace(
        QWEN2_VL_TEXT,
        sequence_head=lambda _: Head(
            (HeadModule("score.0", "relu"), HeadModule("score.2")), pooling="LAST", fixed=True, mean=2.65
        ),
    ),
    tower=QWEN2_VL_TOWER,
    max_tokens=_LONGEST,
)
_QWEN3_VL = PictureModel(
    "Qwen3-VL-Reranker",
    named("Qwen3VLForConditionalGeneration", "Qwen3VLForSequenceClassification"),
    _reader(
        partial(_judged, default="Given a search query, retrieve relevant candidates that answer the query."),
        instructs=True,
        least=4,
        most=1800,
    ),
    "score",
    named=("qwen3-vl-reranker", "tag:text-ranking", "tag:reranker"),
    text=QWEN3_VL_TEXT,
    tower=QWEN3_VL_TOWER,
    tokens=("no", "yes"),
    max_tokens=_LONGEST,
)
_LYCHEE = replace(
    _QWEN3_VL,
    name="lychee-rerank-mm",
    matches=named("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLForSequenceClassification"),
    reader=_reader(
        partial(_judged, default="Given a web search query, retrieve relevant passages that answer the query"),
        instructs=True,
        least=4,
        most=1280,
    ),
    named=("lychee-rerank-mm",),
    text=QWEN2_VL_TEXT,
    tower=QWEN2_5_VL_TOWER,
    notes=(
        "Its prompt and its picture sizes are assumed: those that others run it with, which are Qwen3-VL-Reranker's.",
    ),
)
_MONO = PictureModel(
    "MonoQwen2-VL",
    named("Qwen2VLForConditionalGeneration", "Qwen2VLForSequenceClassification"),
    _reader(_mono_pair, instructs=False),
    "score",
    named=("monoqwen2-vl",),
    text=QWEN2_VL_TEXT,
    tower=QWEN2_VL_TOWER,
    tokens=("False", "True"),
)
_MM_R5 = replace(
    _LYCHEE,
    name="MM-R5",
    named=("mm-r5",),
    tokens=None,
    refused="it writes its reasoning and an order of pages; rerankers that write are no pooling models",
    notes=(),
)
RERANKERS = (_M0, _MM_R5, _QWEN3_VL, _LYCHEE, _MONO)
