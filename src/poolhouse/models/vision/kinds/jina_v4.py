"""jina-embeddings-v4: Qwen2.5-VL with an adapter per task, one vector and many from one pass, and vLLM's repacks of it.

Source: the model code of jinaai/jina-embeddings-v4.
"""

from __future__ import annotations

from dataclasses import replace

from poolhouse.files import Folder
from poolhouse.inputs.content import Content
from poolhouse.inputs.pictures import PictureReader, Written
from poolhouse.inputs.prompts import Role
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families.qwen import QWEN2_VL_TEXT
from poolhouse.models.vision.kinds._qwen import PICTURE, qwen_reader
from poolhouse.models.vision.picture_model import PictureModel, named, own_part
from poolhouse.models.vision.towers.qwen_vl import QWEN2_5_VL_TOWER


def _prompts(content: Content, role: Role | None, instruction: str | None) -> Written:
    """Texts are queries, unless they are documents; several pictures are shown without a word."""
    count, text = len(content.images), content.text
    if not count:
        return Written(f"{'Passage' if role == 'document' else 'Query'}: {text}")
    described = f"Describe the image. {text}".rstrip() if count == 1 or text else ""
    return Written(f"<|im_start|>user\n{PICTURE * count}{described}", "<|im_end|>\n")


def _reader(config: Config, folder: Folder) -> PictureReader:
    return replace(qwen_reader(config, folder, _prompts), alike=("text-matching",))


def _is_repacked(config: Config, _: Folder) -> bool:
    return config.get("model_type") == "qwen2_5_vl"


_WHOLE = PictureModel(
    "jina-embeddings-v4",
    named("JinaEmbeddingsV4Model"),
    _reader,
    "both",
    text=replace(QWEN2_VL_TEXT, default_adapter="retrieval"),
    # Its tasks are named beside the part about texts.
    text_config=lambda config: {**config, **own_part(config)},
    tower=QWEN2_5_VL_TOWER,
    projections=("multi_vector_projector",),
    width=lambda config: config.get("multi_vector_projector_dim", 128),
    pooling="MEAN",
    of_pictures=True,
    aside=(r"(\w+\.)*lm_head\.weight",),
    notes=("The vector of a prompt with pictures is the mean of their rows, from vision_start to vision_end.",),
)
# One task is merged into the weights, and the projector is left out.
_REPACKED = replace(
    _WHOLE,
    name="jina-embeddings-v4 for vLLM",
    matches=_is_repacked,
    named=("jina-embeddings-v4-vllm",),
    answers="dense",
    text=QWEN2_VL_TEXT,
    projections=(),
)
JINA_V4 = (_WHOLE, _REPACKED)
