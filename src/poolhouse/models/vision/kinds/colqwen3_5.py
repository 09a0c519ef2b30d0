"""ColQwen3.5: late interaction on a hybrid model, whose linear attention runs from left to right through a whole pack.

So it is run unpacked. Whether its full attention looks both ways is told by `retrieval_attention_contract`, which
colpali-engine, whose models are causal, does not write.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.inputs.pictures import PictureReader
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.vision.kinds._hosted import TEXTS_AS_QUERIES, described
from poolhouse.models.vision.kinds._qwen import AUGMENTED, END, PICTURE, processor_settings, qwen_reader
from poolhouse.models.vision.picture_model import Hosted, PictureModel, named
from poolhouse.packing.pack import PackedPictures

_CONTRACT = "retrieval_attention_contract"


def _causal(config: Config) -> bool:
    stated = config.get(_CONTRACT)
    if stated not in ("causal", "bidirectional"):
        raise CheckpointError(
            f"config.json: {_CONTRACT} is {stated!r}, but must say how ColQwen3.5 was trained. Add it with "
            f"hf_overrides={{'{_CONTRACT}': 'causal'}}, as colpali-engine trains, or 'bidirectional'."
        )
    return bool(stated == "causal")


def _reader(config: Config, folder: Folder) -> PictureReader:
    prompts = described("", AUGMENTED, "<|im_start|>user\n{}Describe the image.", f"<|im_end|>{END}", picture=PICTURE)
    return qwen_reader(config, folder, prompts, processor_settings(folder).get("max_num_visual_tokens"))


def _rows(model: Any, pictures: PackedPictures) -> Tensor:
    patches = len(pictures.pixels)
    # Our processor keeps one of the equal frames of a patch.
    frames = model.config.vision_config.temporal_patch_size
    pixels = pictures.pixels.view(patches, 3, 1, -1).expand(-1, -1, frames, -1).reshape(patches, -1)
    grids = [(1, *picture.grid) for picture in pictures.pictures if picture.grid is not None]
    answer = model.get_image_features(pixels, torch.tensor(grids, device=pixels.device))
    return torch.cat(list(answer.pooler_output))


COLQWEN3_5 = (
    PictureModel(
        "ColQwen3.5",
        named("ColQwen3_5"),
        _reader,
        "late",
        hosted=Hosted(_rows, causal=_causal),
        projections=("custom_text_proj",),
        width=lambda config: config.get("dim"),
        aside=(r"mtp\..*",),
        notes=("Queries get no prefix, as colpali-engine's class has none.", TEXTS_AS_QUERIES),
    ),
)
