"""Tiny random models with pictures that transformers runs: in memory, and in files under the names of several releases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image as Pillow
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor, nn

from poolhouse.inputs.content import Content, Image
from poolhouse.inputs.pictures import PictureReader, axes_of, placed
from poolhouse.models.load import load
from poolhouse.models.model import Model
from poolhouse.models.plan import LoadOptions
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Pictures, Tokens
from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import Rows

SPECIAL = (
    *("<pad>", "<bos>", "<eos>", "<image>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"),
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>"),
    *("<|vision_end|>", "<|video_pad|>", "<|image>", "<image|>", "<|image|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)
ID = {token: 256 + index for index, token in enumerate(SPECIAL)}
VOCABULARY = 256 + len(SPECIAL)
SIGLIP: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "pad_token_id": ID["<pad>"],
}
TILES = {
    "image_processor_type": "Idefics3ImageProcessor",
    "size": {"longest_edge": 32},
    "max_image_size": {"longest_edge": 16},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SQUARES = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 16, "width": 16},
    "image_seq_length": 16,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The 256 letters of a byte-level tokenizer without merges, and the special tokens of all kinds."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    native = tokenizers.Tokenizer(models.BPE(letters, []))
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    native.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=native, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )


def randomised(model: nn.Module) -> nn.Module:
    """The model with large random matrices, biases that are not zero, and norms around 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = float("norm" in name and name.endswith("weight"))
        nn.init.normal_(parameter, centre, 0.15)
    return model.eval().requires_grad_(False)


def picture(width: int, height: int) -> Pillow.Image:
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    return Pillow.fromarray(noise)


@dataclass
class Hosted:
    """A tiny checkpoint of one kind.

    model: transformers' model without a head. modules: what stands on top, by its name in files. config: config.json.
    settings: of the picture processor. renamed: the file's name of one of the model's tensors. more: further tensors.
    """

    model: Any
    modules: dict[str, nn.Linear]
    config: dict[str, Any]
    settings: Mapping[str, Any]
    renamed: Callable[[str], str]
    more: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        tensors = {self.renamed(name): tensor for name, tensor in self.model.state_dict().items()}
        for name, module in self.modules.items():
            tensors |= {f"{name}.{part}": tensor for part, tensor in module.state_dict().items()}
        save_file(
            {name: tensor.clone() for name, tensor in {**tensors, **self.more}.items()}, folder / "model.safetensors"
        )
        files = {"config.json": self.config, "preprocessor_config.json": self.settings, **self.files}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content))
        tokenizer().save_pretrained(folder)

    def projected(self, hidden: Tensor) -> Tensor:
        """Vectors of unit length."""
        for module in self.modules.values():
            hidden = module(hidden)
        return nn.functional.normalize(hidden, dim=-1)


def loaded(folder: Path, **options: Any) -> Model:
    return load(folder, LoadOptions(str(folder), device="cpu", **options))


def prompt(
    reader: PictureReader, *parts: str | Pillow.Image, role: Any = None, options: Mapping[str, object] | None = None
) -> Tokens:
    """A prompt as the input stage makes it: written, tokenised, with pictures in the places of their placeholders."""
    shown = [part for part in parts if not isinstance(part, str)]
    content = Content(tuple(part if isinstance(part, str) else Image(part, "") for part in parts))
    written = reader.prompts(content, role, None)
    pictures = [reader.processor(image, options or {}) for image in shown]
    coded = tokenizer()(written.text, add_special_tokens=written.add_special_tokens)["input_ids"]
    coded += tokenizer()(written.tail, add_special_tokens=False)["input_ids"]
    ids = np.array(coded, np.int64)
    if not pictures:
        return Tokens(ids)
    ids, filled = placed(ids, np.flatnonzero(ids == reader.token), pictures)
    axes = axes_of(filled, pictures) if reader.axes else None
    return Tokens(ids, pictures=Pictures(tuple(pictures), filled, axes))


def hidden_states(model: Model, prompts: Sequence[Tokens]) -> list[Tensor]:
    """Of each prompt, from one pack."""
    with torch.inference_mode():
        batch = Batch.pack(prompts)
        return list(model.backbone(batch).split([len(one) for one in prompts]))


def answers(model: Model, prompts: Sequence[Tokens], task: Any = None) -> list[Tensor]:
    """What the model's pipeline makes of each prompt, from one pack."""
    with torch.inference_mode():
        batch = Batch.pack(prompts)
        pipeline = model.pipelines[task or model.tasks[0]]
        rows = pipeline(Rows(model.backbone(batch).float(), batch.segments, batch.ids), PoolingParams())
    return list(rows.values.split(list(rows.segments.lengths)))


def worst(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    assert [tuple(one.shape) for one in got] == [tuple(one.shape) for one in expected]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(got, expected, strict=True))
