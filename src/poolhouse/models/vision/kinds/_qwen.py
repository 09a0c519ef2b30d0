"""Qwen-VL's kin: what their readers share, the placeholder of a picture and the settings of its processor."""

from __future__ import annotations

from poolhouse.files import Folder, JsonObject
from poolhouse.inputs.content import Content
from poolhouse.inputs.media.processor import QwenPictures, image_settings
from poolhouse.inputs.pictures import PicturePrompts, PictureReader, Written
from poolhouse.models.files.checkpoint import Config

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
# Queries end in ten of these, whose rows are compared as well (query augmentation).
DESCRIBE = f"<|im_start|>user\n{PICTURE}Describe the image."
END = "<|endoftext|>"
AUGMENTED = END * 10
HELPFUL = "You are a helpful assistant."
# Where the answer begins.
TURN = "<|im_end|>\n<|im_start|>assistant\n"
_OVERRIDABLE = frozenset(
    (
        *("query_prefix", "passage_prefix", "visual_prompt_prefix", "visual_prompt_suffix"),
        *("max_num_visual_tokens", "q_max_length", "p_max_length"),
    )
)


def framed(system: str, user: str, tail: str) -> Written:
    """A system message and the user's."""
    return Written(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}", tail)


def in_order(content: Content) -> str:
    """Texts and pictures as the caller has them."""
    return "".join(part if isinstance(part, str) else PICTURE for part in content.parts)


def pictures_first(content: Content) -> str:
    """Pictures, then texts."""
    return PICTURE * len(content.images) + content.text


def processor_settings(folder: Folder, config: Config | None = None) -> JsonObject:
    """What a checkpoint's processor says of prompts and lengths, by either file.

    config: config.json, where the user's hf_overrides may say otherwise.
    """
    names = ("preprocessor_config.json", "processor_config.json")
    stated = {key: value for name in names for key, value in folder.json(name, needed=False).items()}
    return stated | {key: value for key, value in (config or {}).items() if key in _OVERRIDABLE}


def qwen_reader(
    config: Config,
    folder: Folder,
    prompts: PicturePrompts,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    **limits: int,
) -> PictureReader:
    """A reader with the processor of Qwen-VL.

    max_tokens, min_tokens: of one picture, over what its files say. limits: `min_pixels`, `max_pixels`, likewise.
    """
    settings, token = image_settings(folder), config.get("image_token_id", 151655)
    vision = config.get("vision_config") or {}
    patch = settings.get("patch_size") or vision.get("patch_size") or 16
    merge = settings.get("merge_size") or vision.get("spatial_merge_size") or 2
    for name, tokens in (("max_pixels", max_tokens), ("min_pixels", min_tokens)):
        if tokens is not None:
            limits[name] = tokens * (patch * merge) ** 2
    return PictureReader(QwenPictures(settings, token, **limits), prompts, PICTURE, token, axes=True)
