"""Encoders of encoder-decoder models, however their files came to be: with the decoder, without it, denied by the config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from poolhouse import LLM
from poolhouse.errors import CheckpointError
from tests.models.parity import change_config, change_tensors
from tests.models.tiny import TEXTS, tokenizer

TOLERANCE = 1e-5
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 1}
LONG_T5 = T5 | {"local_radius": 4}
SIDE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
}
GEMMA: dict[str, Any] = {"encoder": SIDE, "decoder": SIDE, "vocab_size": 99}
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{family}{kind}": (family, kind, T5)
        for family in ("T5", "MT5", "UMT5")
        for kind in ("EncoderModel", "Model", "ForConditionalGeneration")
    },
    "LongT5EncoderModel": ("LongT5", "EncoderModel", LONG_T5),
    "T5GemmaEncoderModel": ("T5Gemma", "EncoderModel", GEMMA | {"is_encoder_decoder": False}),
    "T5GemmaModel": ("T5Gemma", "Model", GEMMA),
}


def save(folder: Path, row: str) -> Any:
    """A checkpoint as transformers saves it; its encoder."""
    family, kind, options = ROWS[row]
    tokenizer(folder, "bert")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.get_encoder()


def by_hand(encoder: Any, outputs: Any) -> list[np.ndarray]:
    with torch.inference_mode():
        return [
            encoder(input_ids=torch.tensor([output.prompt_token_ids])).last_hidden_state[0].numpy()
            for output in outputs
        ]


def assert_same(folder: Path, encoder: Any, **options: Any) -> None:
    with LLM(str(folder), pooler_config={"use_activation": False}, **options) as llm:
        outputs = llm.encode(TEXTS, pooling_task="token_embed", use_tqdm=False)
    for output, expected in zip(outputs, by_hand(encoder, outputs), strict=True):
        np.testing.assert_allclose(output.outputs.array, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("row", ROWS)
def test_the_encoder_is_read_from_whatever_transformers_saved(row: str, tmp_path: Path) -> None:
    encoder = save(tmp_path, row)
    assert_same(tmp_path, encoder)


@pytest.mark.parametrize("names", [("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")], ids=" and ".join)
@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5"])
def test_the_table_of_tokens_may_stand_under_either_name(family: str, names: tuple[str, ...], tmp_path: Path) -> None:
    encoder = save(tmp_path, f"{family}EncoderModel")
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("shared.weight")
    tensors |= {f"{name}.weight": table.clone() for name in names}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(tmp_path, encoder)


def test_files_of_before_name_no_encoder(tmp_path: Path) -> None:
    """sentence-t5 and gtr: transformers 4 left is_encoder_decoder true beside an encoder alone."""
    encoder = save(tmp_path, "T5EncoderModel")
    change_config(tmp_path, is_encoder_decoder=True)
    assert_same(tmp_path, encoder)
    change_config(tmp_path, is_encoder_decoder=False, architectures=None)
    assert_same(tmp_path, encoder)
    change_tensors(tmp_path, drop="encoder.block.1.layer.1.DenseReluDense.wo.weight")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, .*DenseReluDense.wo.weight"):
        LLM(str(tmp_path))


@pytest.mark.parametrize("row", ["T5EncoderModel", "MT5EncoderModel"])
def test_sentence_transformers_files_around_an_encoder(row: str, tmp_path: Path) -> None:
    save(tmp_path / "plain", row)
    modules = [Transformer(str(tmp_path / "plain")), Pooling(32, "mean"), Dense(32, 24, bias=False), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save(str(tmp_path / "described"))
    with LLM(str(tmp_path / "described")) as llm:
        np.testing.assert_allclose(llm.embed_array(TEXTS, use_tqdm=False), model.encode(TEXTS), atol=TOLERANCE)
