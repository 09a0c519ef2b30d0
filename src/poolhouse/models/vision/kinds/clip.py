"""CLIP: texts and pictures in one space, each through a Transformer of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from poolhouse.files import Folder
from poolhouse.inputs.content import Content
from poolhouse.inputs.media.processor import LonePictures, image_settings, lone_picture
from poolhouse.inputs.pictures import PictureProcessor, PictureReader, Written
from poolhouse.inputs.prompts import Role
from poolhouse.models.backbone import Backbone, Tower
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.native.families._config import NotNative, activation
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.transformer import Transformer
from poolhouse.models.native.weights import Bare, Layout, Source, Weights
from poolhouse.models.vision.dual_encoder import DualEncoder, EndToken
from poolhouse.models.vision.picture_model import PictureModel, TowerFamily
from poolhouse.models.vision.towers.vit import FirstRow, VisionTransformer
from poolhouse.packing.tokens import Picture

_TEXT_DEFAULTS = {
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Files of before August 2023 call the end of a text 2 and mean the largest id.
_WRONG_END = 2


def half(config: Config, name: str, defaults: Mapping[str, object]) -> Config:
    """One half's part of config.json over the defaults of transformers' class; its older name wins, as there."""
    return {**defaults, **(config.get(f"{name}_dict") or config.get(name) or {})}


def pre_norm(config: Config, causal: bool = False) -> TransformerSpec:
    """What the halves of CLIP and SigLIP share."""
    heads = config["num_attention_heads"]
    return TransformerSpec(
        heads=heads,
        head_dim=config["hidden_size"] // heads,
        layers=(LayerSpec(),) * config["num_hidden_layers"],
        activation=activation(config, "hidden_act", "gelu"),
        causal=causal,
        norm_eps=config["layer_norm_eps"],
    )


def names(side: str, final_norm: str) -> dict[str, Source]:
    """The tensors that the halves of CLIP and SigLIP share. side: "text_model" or "vision_model"."""
    layer = f"{side}.encoder.layers.*"
    return {
        "positions": f"{side}.embeddings.position_embedding",
        "layers.*.attn_in": f"{layer}.layer_norm1",
        "layers.*.attn.qkv": tuple(f"{layer}.self_attn.{part}_proj" for part in "qkv"),
        "layers.*.attn.out": f"{layer}.self_attn.out_proj",
        "layers.*.ffn_in": f"{layer}.layer_norm2",
        "layers.*.ffn.up": f"{layer}.mlp.fc1",
        "layers.*.ffn.down": f"{layer}.mlp.fc2",
        "final_norm": f"{side}.{final_norm}",
    }


# What trainers and savers leave in files: the temperature of the training, and positions that are counted anyhow.
ASIDE = (r"logit_(scale|bias)", r"(text|vision)_model\.embeddings\.position_ids")


def grid_of(config: Config) -> tuple[int, int]:
    """Rows and columns of patches of a tower for pictures of one size.

    Raises:
        NotNative: sizes that are not the same on both sides.
    """
    size, patch = config["image_size"], config["patch_size"]
    if not isinstance(size, int) or not isinstance(patch, int):
        raise NotNative(f"config.json: image_size {size!r} and patch_size {patch!r} must be numbers.")
    return size // patch, size // patch


def blank(config: Config) -> Picture:
    """A picture of the tower's size, or of one patch where it takes any."""
    grid = grid_of(config) if "image_size" in config else (1, 1)
    features = config["num_channels"] * config["patch_size"] ** 2
    return lone_picture(np.zeros((grid[0] * grid[1], features), np.float32), grid)


def lone_reader(processor: PictureProcessor) -> PictureReader:
    """How dual encoders read: a text as it stands, or one picture; neither stands within a prompt."""
    return PictureReader(processor, _as_it_stands, placeholder="", token=-1, max_pictures=1, alone=True)


def _as_it_stands(content: Content, role: Role | None, instruction: str | None) -> Written:
    return Written(content.text)


def _text(config: Config) -> Config:
    return half(config, "text_config", _TEXT_DEFAULTS)


def _vision(config: Config) -> Config:
    return half(config, "vision_config", _VISION_DEFAULTS)


def _matches(config: Config, _: Folder) -> bool:
    return config.get("model_type") == "clip" and architecture(config) in ("CLIPModel", "clip")


def _reader(config: Config, folder: Folder) -> PictureReader:
    vision = _vision(config)
    return lone_reader(
        LonePictures(image_settings(folder), "CLIPImageProcessor", vision["patch_size"], grid_of(vision))
    )


def _tower(_: Config, spec: TransformerSpec, weights: Weights) -> Tower:
    return VisionTransformer(spec, weights, FirstRow(spec, weights))


def _joined(config: Config, _: Folder, text: Transformer, tower: Tower) -> Backbone:
    eos = _text(config)["eos_token_id"]
    return DualEncoder(text, tower, EndToken(None if eos == _WRONG_END else eos))


_TEXT = Family(
    ("clip_text_model",),
    lambda config: pre_norm(config, causal=True),
    (
        Layout(
            {
                "tokens": "text_model.embeddings.token_embedding",
                **names("text_model", "final_layer_norm"),
                "output": "text_projection",
            }
        ),
    ),
)
_TOWER = TowerFamily(
    _vision,
    pre_norm,
    (
        Layout(
            {
                "patches": "vision_model.embeddings.patch_embedding",
                "first": Bare("vision_model.embeddings.class_embedding"),
                "embedding_norm": "vision_model.pre_layrnorm",
                **names("vision_model", "post_layernorm"),
                "project": "visual_projection",
            },
            anchor="patches",
        ),
    ),
    _tower,
    blank,
)
CLIP = PictureModel(
    "CLIP", _matches, _reader, "dense", text=_TEXT, text_config=_text, tower=_TOWER, join=_joined, aside=ASIDE
)
