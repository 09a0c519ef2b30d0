"""SigLIP and SigLIP 2: texts and pictures in one space; texts are filled up, and an attention pools pictures.

SigLIP 2 has two forms. Files of the fixed size are SigLIP's; NaFlex takes patches of any grid.
"""

from __future__ import annotations

from dataclasses import replace

from poolhouse.files import Folder
from poolhouse.inputs.media.processor import LonePictures, image_settings
from poolhouse.inputs.pictures import PictureReader
from poolhouse.inputs.tokenizer_files import padding_of
from poolhouse.models.backbone import Backbone, Tower
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.files.config import architecture
from poolhouse.models.native.families._config import refuse
from poolhouse.models.native.families.family import Family
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.transformer import Transformer
from poolhouse.models.native.weights import Bare, Layout, Weights
from poolhouse.models.vision.dual_encoder import DualEncoder, Padding, last_token
from poolhouse.models.vision.kinds.clip import ASIDE, blank, grid_of, half, lone_reader, names, pre_norm
from poolhouse.models.vision.picture_model import PictureModel, TowerFamily
from poolhouse.models.vision.towers.vit import AttentionPooling, VisionTransformer

_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_TEXT_DEFAULTS = {**_DEFAULTS, "max_position_embeddings": 64}
_NAFLEX_DEFAULTS = {**_DEFAULTS, "num_channels": 3, "patch_size": 16}
VISION_DEFAULTS = {**_NAFLEX_DEFAULTS, "image_size": 224}


def _text(config: Config) -> Config:
    return half(config, "text_config", _TEXT_DEFAULTS)


def _vision(config: Config) -> Config:
    return half(config, "vision_config", VISION_DEFAULTS)


def _naflex_vision(config: Config) -> Config:
    return half(config, "vision_config", _NAFLEX_DEFAULTS)


def _tower_spec(config: Config) -> TransformerSpec:
    refuse(config, {"vision_use_head": (True,)})
    return pre_norm(config)


def _matches(config: Config, _: Folder) -> bool:
    return config.get("model_type") == "siglip" and architecture(config) in ("SiglipModel", "siglip")


def _matches_naflex(config: Config, _: Folder) -> bool:
    return config.get("model_type") == "siglip2" and architecture(config) in ("Siglip2Model", "siglip2")


def _reader(config: Config, folder: Folder) -> PictureReader:
    vision = _vision(config)
    return lone_reader(
        LonePictures(image_settings(folder), "SiglipImageProcessor", vision["patch_size"], grid_of(vision))
    )


def _naflex_reader(config: Config, folder: Folder) -> PictureReader:
    patch = _naflex_vision(config)["patch_size"]
    return lone_reader(LonePictures(image_settings(folder), "Siglip2ImageProcessor", patch, None))


def _tower(_: Config, spec: TransformerSpec, weights: Weights) -> Tower:
    return VisionTransformer(spec, weights, AttentionPooling(spec, weights))


def _naflex_tower(_: Config, spec: TransformerSpec, weights: Weights) -> Tower:
    return VisionTransformer(spec, weights, AttentionPooling(spec, weights), resizes=True)


def _joined(config: Config, folder: Folder, text: Transformer, tower: Tower) -> Backbone:
    token, left = padding_of(folder)
    return DualEncoder(text, tower, last_token, Padding(_text(config)["max_position_embeddings"], token, left))


_TEXT = Family(
    ("siglip_text_model", "siglip2_text_model"),
    pre_norm,
    (
        Layout(
            {
                "tokens": "text_model.embeddings.token_embedding",
                **names("text_model", "final_layer_norm"),
                "output": "text_model.head",
            }
        ),
    ),
)
_HEAD = "vision_model.head"
_TOWER = TowerFamily(
    _vision,
    _tower_spec,
    (
        Layout(
            {
                "patches": "vision_model.embeddings.patch_embedding",
                **names("vision_model", "post_layernorm"),
                "head.probe": Bare(f"{_HEAD}.probe"),
                "head.qkv": Bare(f"{_HEAD}.attention.in_proj_weight"),
                "head.qkv_bias": Bare(f"{_HEAD}.attention.in_proj_bias"),
                "head.out": f"{_HEAD}.attention.out_proj",
                "head.norm": f"{_HEAD}.layernorm",
                "head.ffn.up": f"{_HEAD}.mlp.fc1",
                "head.ffn.down": f"{_HEAD}.mlp.fc2",
            },
            anchor="patches",
        ),
    ),
    _tower,
    blank,
)
_SIGLIP = PictureModel(
    "SigLIP", _matches, _reader, "dense", text=_TEXT, text_config=_text, tower=_TOWER, join=_joined, aside=ASIDE
)
_NAFLEX = replace(
    _SIGLIP,
    name="SigLIP 2 (NaFlex)",
    matches=_matches_naflex,
    reader=_naflex_reader,
    tower=replace(_TOWER, config=_naflex_vision, build=_naflex_tower),
)
SIGLIP = (_SIGLIP, _NAFLEX)
