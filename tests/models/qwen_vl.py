"""Tiny random Qwen-VL models: in memory as transformers runs them, in files under the names of each release."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor, nn

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Answers of rerankers, one token each.
WORDS = ("yes", "no", "True", "False")
PAD, START, END, IMAGE = (
    256 + SPECIAL.index(f"<|{name}|>") for name in ("endoftext", "vision_start", "vision_end", "image_pad")
)
SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
SETTINGS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 128, "longest_edge": 1024},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 256 + len(SPECIAL) + len(WORDS),
    "max_position_embeddings": 2048,
    "bos_token_id": PAD,
    "eos_token_id": PAD,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
}
PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (
        "Qwen2VL",
        TEXT,
        {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, **PATCHES},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        TEXT,
        {
            "depth": 4,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            **PATCHES,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {**TEXT, "head_dim": 8, "rope_parameters": {**TEXT["rope_parameters"], "mrope_interleaved": True}},
        {
            "depth": 4,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
            **PATCHES,
        },
    ),
}


def tokenizer(template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """The 256 letters of a byte-level tokenizer without merges, Qwen's special tokens, and the words of rerankers."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    native = tokenizers.Tokenizer(models.BPE(letters, []))
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    native.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    native.add_tokens([AddedToken(text, normalized=False) for text in WORDS])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=native, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=template
    )


def pictures() -> list[Image.Image]:
    """Pictures of noise of several sizes, one of them small, one flat."""
    random = np.random.default_rng(0)
    sizes = ((30, 20), (16, 40), (9, 9), (64, 31))
    return [Image.fromarray(random.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with large random matrices, biases that are not zero, and norms around 1."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        norm = "norm" in name or "ln_q" in name
        nn.init.normal_(parameter, 1.0 if norm and name.endswith("weight") else 0.0, 0.15)
    return model.eval()


def config(kind: str, tied: bool = False, **text: Any) -> Any:
    """transformers' config of a tiny model. text: changes of its text half."""
    family, own, vision = KINDS[kind]
    made = getattr(transformers, f"{family}Config")(
        text_config={**own, **text},
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    made.text_config.tie_word_embeddings = tied
    return made


@dataclass
class QwenVL:
    """A tiny model of transformers, and what its processor would make of prompts.

    settings: of the picture processor. modules: further ones, by their names in files.
    """

    kind: str
    model: Any
    settings: Mapping[str, Any]
    modules: dict[str, nn.Linear]

    @classmethod
    def make(
        cls, kind: str, *, tied: bool = False, settings: Mapping[str, Any] | None = None, **modules: nn.Linear
    ) -> QwenVL:
        model = getattr(transformers, f"{KINDS[kind][0]}ForConditionalGeneration")(config(kind, tied))
        tiny = cls(kind, randomised(model), {**SETTINGS, **(settings or {})}, modules)
        for seed, module in enumerate(modules.values()):
            randomised(module, seed + 1)
        model.tie_weights()
        return tiny

    def inputs(self, text: str, images: Sequence[Image.Image] = (), tail: Sequence[int] = ()) -> dict[str, Tensor]:
        """What a model of transformers takes of a text with a placeholder per picture. tail: ids behind it."""
        processor = transformers.Qwen2VLImageProcessorPil(**self.settings)
        ids = [*tokenizer()(text, add_special_tokens=False)["input_ids"], *tail]
        if not images:
            tensor = torch.tensor([ids])
            return {"input_ids": tensor, "mm_token_type_ids": torch.zeros_like(tensor)}
        shown = processor(list(images), return_tensors="pt")
        counts = iter((shown["image_grid_thw"].prod(1) // 4).tolist())
        tensor = torch.tensor([[token for one in ids for token in [one] * (next(counts) if one == IMAGE else 1)]])
        return {
            "input_ids": tensor,
            "pixel_values": shown["pixel_values"],
            "image_grid_thw": shown["image_grid_thw"],
            "mm_token_type_ids": (tensor == IMAGE).long(),
        }

    def hidden(self, text: str, images: Sequence[Image.Image] = (), tail: Sequence[int] = ()) -> Tensor:
        """[tokens, hidden] behind the final norm, alone."""
        with torch.no_grad():
            return self.model.model(**self.inputs(text, images, tail)).last_hidden_state[0]  # type: ignore[no-any-return]

    def logits(self, text: str, images: Sequence[Image.Image] = ()) -> Tensor:
        """[vocabulary] behind the last token."""
        with torch.inference_mode():
            return self.model(**self.inputs(text, images)).logits[0, -1]  # type: ignore[no-any-return]

    def save(
        self,
        folder: Path,
        names: Callable[[str], str | None],
        flat: bool = False,
        nested: bool = False,
        **changes: Any,
    ) -> Path:
        """Write a checkpoint. names: of a tensor in the file, None leaves it out. flat: config.json as 4.x wrote it.

        nested: the picture processor's settings in processor_config.json. changes: of config.json.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {names(name): tensor for name, tensor in self.model.state_dict().items()}
        if self.model.config.tie_word_embeddings:
            tensors.pop(names("lm_head.weight"), None)
        for name, module in self.modules.items():
            tensors |= {f"{name}.{kind}": tensor for kind, tensor in module.state_dict().items()}
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items() if name},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        written = self.model.config.to_dict()
        (folder / "config.json").write_text(json.dumps((as_flat(written) if flat else written) | changes))
        tokenizer().save_pretrained(folder)
        if nested:
            (folder / "processor_config.json").write_text(json.dumps({"image_processor": dict(self.settings)}))
        else:
            (folder / "preprocessor_config.json").write_text(json.dumps(dict(self.settings)))
        return folder


def as_flat(written: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4.x wrote it: the text half at the top, sections of positions under rope_scaling."""
    text = dict(written.pop("text_config"))
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    return text | written


def prefixed(text: str, visual: str, head: str | None = None) -> Callable[[str], str | None]:
    """Names of tensors in a file: of the text half behind `text`, of the tower behind `visual`, of the generator's head."""

    def named(name: str) -> str | None:
        if name.startswith("model.language_model."):
            return text + name.removeprefix("model.language_model.")
        if name.startswith("model.visual."):
            return visual + name.removeprefix("model.visual.")
        return head

    return named


# As models without a head for generating are saved by 5.x, as by 4.x, and as by releases between.
OLD, NEW, MIDDLE = (
    prefixed("model.", "visual."),
    prefixed("language_model.", "visual."),
    prefixed("model.language_model.", "model.visual."),
)
