"""ColQwen3 in all its layouts against Qwen3VLModel and the projection of the models' own code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poolhouse.errors import CheckpointError
from poolhouse.models.load import load
from poolhouse.models.model import Model
from poolhouse.models.plan import LoadOptions, decide
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Pictures, Tokens
from tests.models.qwen_vl import IMAGE, QwenVL, pictures, prefixed, tokenizer

HIDDEN = 32
END = "<|endoftext|>"
SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
DESCRIBED = f"<|im_start|>user\n{SLOT}Describe the image.<|im_end|>{END}"


@dataclass(frozen=True)
class Layout:
    """One layout of files. names: prefixes of the text half, the tower and the generator's head.

    projection: the name of the projection and its width; None for none. config: what config.json says besides.
    own: whether the model's own code lets tokens see both sides and leaves the final norm out.
    """

    architecture: str
    model_type: str
    names: tuple[str, str, str | None]
    projection: tuple[str, int] | None
    config: dict[str, Any] = field(default_factory=dict)
    nemotron: bool = False


TOMORO = partial(Layout, "ColQwen3", "colqwen3", config={"embed_dim": 20, "padding_side": "left"})
OPS = partial(Layout, "OpsColQwen3Model", "ops_colqwen3", projection=("custom_text_proj", HIDDEN))
LAYOUTS = {
    "tomoro": TOMORO(
        names=("vlm.model.language_model.", "vlm.model.visual.", "vlm.lm_head.weight"),
        projection=("embedding_proj_layer", 20),
    ),
    "tomoro, tied": TOMORO(
        names=("vlm.model.language_model.", "vlm.model.visual.", None), projection=("embedding_proj_layer", 20)
    ),
    "tomoro, older": TOMORO(names=("language_model.", "visual.", None), projection=("custom_text_proj", 20)),
    "tomoro, oldest": TOMORO(names=("model.", "visual.", "lm_head.weight"), projection=("custom_text_proj", 20)),
    "ops": OPS(names=("language_model.", "visual.", None), config={"dims": HIDDEN}),
    "ops, cut": OPS(names=("language_model.", "visual.", None), config={"dims": 12}),
    "ops, in front": OPS(
        names=("base_model.model.language_model.", "base_model.model.visual.", None),
        projection=("base_model.model.custom_text_proj", HIDDEN),
        config={"dims": 12},
    ),
    "nemotron": Layout(
        "Qwen3VLNemotronEmbedModel",
        "qwen3_vl_nemotron_embed",
        ("model.language_model.", "model.visual.", "lm_head.weight"),
        None,
        {"pooling": "colbert"},
        nemotron=True,
    ),
    "colpali-engine": Layout(
        "ColQwen3", "qwen3_vl", ("model.language_model.", "model.visual.", None), ("model.custom_text_proj", 20)
    ),
}
NAMES = list(LAYOUTS)


def made(layout: Layout, folder: Path, **config: Any) -> QwenVL:
    """A checkpoint in this layout, and the model that it was written from."""
    text, visual, head = layout.names
    modules = {} if layout.projection is None else {layout.projection[0]: nn.Linear(HIDDEN, layout.projection[1])}
    tiny = QwenVL.make("qwen3_vl", **modules)
    tiny.save(
        folder,
        prefixed(text, visual, head),
        architectures=[layout.architecture],
        model_type=layout.model_type,
        **layout.config,
        **config,
    )
    return tiny


def expected(tiny: QwenVL, layout: Layout, text: str, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
    """[tokens, width] by the formulas of the model's own code; text has a placeholder per picture."""
    model = tiny.model.model
    if layout.nemotron:
        for block in model.language_model.layers:
            block.self_attn.is_causal = False
        norm, model.language_model.norm = model.language_model.norm, nn.Identity()
        inputs = tiny.inputs(text, images)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            # A mask of the caller's, four-dimensional, is taken as it is.
            state = model(**inputs, attention_mask=torch.zeros(1, 1, length, length)).last_hidden_state[0]
        model.language_model.norm = norm
    else:
        state = tiny.hidden(text, images)
    for projection in tiny.modules.values():
        with torch.inference_mode():
            state = projection(state)[:, : layout.config.get("dims")]
    return F.normalize(state, dim=-1).numpy()


def tokens_of(model: Model, text: str, images: Sequence[Image.Image]) -> Tokens:
    """The tokens of a literal prompt with its pictures, their axes counted as the reference's code counts them."""
    reader = model.facts.pictures
    assert reader is not None
    shown = [reader.processor(image, {}) for image in images]
    ids, filled, axes, left, start = [], [], [], iter(shown), 0
    for token in tokenizer()(text, add_special_tokens=False)["input_ids"]:
        picture = next(left) if token == IMAGE else None
        if picture is None:
            ids.append([token])
            filled.append([False])
            axes.append(np.full((3, 1), start))
            start += 1
            continue
        assert picture.extent is not None
        rows, columns = picture.extent
        ids.append(picture.ids.tolist())
        filled.append([True] * len(picture.ids))
        down, across = np.divmod(np.arange(rows * columns), columns)
        axes.append(start + np.stack((np.zeros_like(down), down, across)))
        start += max(rows, columns)
    return Tokens(
        np.concatenate(ids),
        pictures=Pictures(tuple(shown), np.concatenate(filled), np.concatenate(axes, 1)) if shown else None,
    )


def answers(model: Model, prompts: Sequence[Tokens]) -> list[Tensor]:
    """The vectors of each prompt, of one pack."""
    from poolhouse.params import PoolingParams
    from poolhouse.pooling.rows import Rows

    batch = Batch.pack(list(prompts))
    with torch.inference_mode():
        rows = Rows(model.backbone(batch), batch.segments, batch.ids)
        pooled = model.pipelines["token_embed"](rows, PoolingParams(dimensions=model.plan.files.truncate_dim))
    return list(pooled.values.split(list(batch.segments.lengths)))


PROMPTS: list[tuple[str, tuple[int, ...]]] = [
    (f"Query: what is shown?{END * 10}", ()),
    (DESCRIBED, (0,)),
    ("a text alone", ()),
    (f"{SLOT}first, then {SLOT}{SLOT} and words behind", (1, 3, 2)),
    (DESCRIBED, (3,)),
]


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_those_of_its_own_code_packed_and_alone(name: str, tmp_path: Path) -> None:
    layout, images = LAYOUTS[name], pictures()
    tiny = made(layout, tmp_path)
    model = load(tmp_path, LoadOptions("tiny"))
    assert model.facts.served_by.startswith("native") and "packed" in model.facts.served_by
    prompts = [tokens_of(model, text, [images[index] for index in shown]) for text, shown in PROMPTS]
    together = answers(model, prompts)
    for (text, shown), own, got in zip(PROMPTS, prompts, together, strict=True):
        wanted = expected(tiny, layout, text, [images[index] for index in shown])
        assert got.shape == wanted.shape
        assert np.abs(got.numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()
        (alone,) = answers(model, [own])
        assert (alone - got).abs().max() < 1e-5
