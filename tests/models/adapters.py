"""Adapters made by the peft library on tiny checkpoints, and what they answer there, one text at a time."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from tests.models.parity import texts


def save_adapter(base: Path, folder: Path, model: str, seed: int = 0, **options: Any) -> list[Tensor]:
    """A PEFT folder with random weights; returns the adapted model's hidden states of `texts()`."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    with_base = getattr(transformers, model).from_pretrained(base)
    with warnings.catch_warnings():
        # peft asks transformers for what transformers deprecates, and remarks on tables and tied weights.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(with_base, peft.LoraConfig(**options)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder)
    with torch.inference_mode():
        return [
            _hidden(adapted(input_ids=torch.from_numpy(text.ids)[None], output_hidden_states=True)) for text in texts()
        ]


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output.last_hidden_state if hasattr(output, "last_hidden_state") else output.hidden_states[-1]
    return hidden[0]
