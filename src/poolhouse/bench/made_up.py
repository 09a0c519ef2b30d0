"""Made-up checkpoints: a small ColQwen3 with random weights, in the layout of the hub, to measure and to show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>"),
)
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif -%}
{%- endfor -%}
{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a made-up model. layers, width: of the text model; tower_layers, tower_width: of the vision tower.

    dimensions: of a token's vector. patch: side of a patch in pixels. max_tokens: picture tokens of one picture at most.
    """

    layers: int = 2
    width: int = 64
    tower_layers: int = 2
    tower_width: int = 64
    dimensions: int = 32
    patch: int = 16
    max_tokens: int = 256


def write_colqwen3(folder: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """A ColQwen3 in TomoroAI's layout with random weights, biases among them; returns the folder.

    Its tokenizer knows the 256 bytes and the marks of Qwen, and merges nothing.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3VLConfig, Qwen3VLModel

    folder.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(folder)
    heads = max(shape.width // 64, 2)
    head_dim = shape.width // heads
    sections = [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections, "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(heads // 2, 1),
            "head_dim": head_dim,
            "intermediate_size": 3 * shape.width,
            "vocab_size": len(ids),
            "max_position_embeddings": 32768,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": shape.tower_layers,
            "hidden_size": shape.tower_width,
            "num_heads": max(shape.tower_width // 64, 2),
            "intermediate_size": 4 * shape.tower_width,
            "out_hidden_size": shape.width,
            "patch_size": shape.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 48 * 48,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen3VLModel(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            value = torch.randn_like(tensor) * tensor[0].numel() ** -0.5
        else:
            value = torch.randn_like(tensor) * 0.1 + float("norm" in name and name.endswith("weight"))
        tensors[f"vlm.model.{name}"] = value
    tensors["embedding_proj_layer.weight"] = torch.randn(shape.dimensions, shape.width) * shape.width**-0.5
    tensors["embedding_proj_layer.bias"] = torch.randn(shape.dimensions) * 0.1
    save_file(tensors, folder / "model.safetensors")
    stated = config.to_dict()
    del stated["transformers_version"]
    stated |= {
        "architectures": ["ColQwen3"],
        "model_type": "colqwen3",
        "embed_dim": shape.dimensions,
        "padding_side": "left",
        "dtype": "float32",
    }
    _write(folder / "config.json", stated)
    unit = shape.patch * 2
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": 4 * unit**2, "longest_edge": shape.max_tokens * unit**2},
            "patch_size": shape.patch,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
    )
    return folder


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level tokenizer without merges; returns the ids of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2TokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 32768,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    return tokenizer.get_vocab()


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
