"""The text side of models of pictures or sounds and texts, through transformers: as its get_text_features gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from poolhouse import LLM, ConfigError, InvalidRequest
from poolhouse.errors import CheckpointError
from tests.inputs.test_tokenizer import wordpiece
from tests.models.parity import change_config, change_tensors

TEXTS = ["the moon", "why are there tides in the sea?", "a", "bread rises slowly, and the sea is far away " * 2]
# float32 rounding of batches of other shapes.
TOLERANCE = 1e-5
SIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 24,
}
PICTURES = SIDE | {"image_size": 32, "patch_size": 16}
CLIP = SIDE | {"max_position_embeddings": 77, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
BERT = SIDE | {"max_position_embeddings": 80, "type_vocab_size": 2, "pad_token_id": 0}
SOUNDS = {
    "hidden_size": 64,
    "patch_embeds_hidden_size": 8,
    "depths": [1, 1],
    "num_attention_heads": [2, 2],
    "spec_size": 32,
    "window_size": 4,
    "num_mel_bins": 16,
    "projection_dim": 24,
}
EFFICIENT = {"image_size": 32, "depth_coefficient": 0.1, "width_coefficient": 0.1, "hidden_dim": 32}
# Model, options of its text and of its other side, options of the whole.
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "clip": ("CLIP", CLIP, PICTURES, {"projection_dim": 24}),
    # The first files call the end 2, and mean the largest id.
    "clip, first files": ("CLIP", CLIP | {"eos_token_id": 2}, PICTURES, {"projection_dim": 24}),
    "metaclip 2": ("MetaClip2", CLIP, PICTURES, {"projection_dim": 24}),
    "chinese clip": ("ChineseCLIP", BERT, PICTURES, {"projection_dim": 24}),
    "altclip": ("AltCLIP", BERT | {"project_dim": 24}, PICTURES, {"projection_dim": 24}),
    "siglip": ("Siglip", SIDE | {"max_position_embeddings": 40}, PICTURES, {}),
    "siglip 2": ("Siglip2", SIDE | {"max_position_embeddings": 40}, SIDE | {"num_patches": 4, "patch_size": 4}, {}),
    "clap": ("Clap", BERT, SOUNDS, {"projection_dim": 24}),
    "align": ("Align", BERT, EFFICIENT, {"projection_dim": 32}),
    "clipseg": ("CLIPSeg", CLIP, PICTURES, {"projection_dim": 24}),
    "x-clip": ("XCLIP", CLIP, PICTURES | {"mit_hidden_size": 32, "mit_num_attention_heads": 2}, {"projection_dim": 24}),
}


def save(folder: Path, row: str) -> Any:
    """The checkpoint with a tokenizer, and transformers' own model of it."""
    family, texts, others, options = ROWS[row]
    tokenizer = saved_tokenizer(folder)
    config_class = getattr(transformers, f"{family}Config")
    other = "audio_config" if family == "Clap" else "vision_config"
    texts = texts | {"vocab_size": len(tokenizer)}
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}Model")(config_class(text_config=texts, **{other: others}, **options))
    roughen(model)
    model.save_pretrained(folder)
    return getattr(transformers, f"{family}Model").from_pretrained(folder).eval()


def saved_tokenizer(folder: Path) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=wordpiece(), unk_token="[UNK]", pad_token="[PAD]", model_input_names=["input_ids"]
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def roughen(model: torch.nn.Module) -> None:
    """Weights so large that another row, or other padding, gives another vector."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "text" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def expected(model: Any, folder: Path) -> np.ndarray:
    """Unit vectors of texts one by one, padded where the model was trained so."""
    vectors: list[Tensor] = []
    with torch.inference_mode():
        for ids in token_ids(folder):
            filled = filled_up(ids, folder) if type(model).__name__.startswith("Siglip") else ids
            vectors.append(model.get_text_features(input_ids=torch.tensor([filled])).pooler_output[0])
    return np.stack([(vector / vector.norm()).numpy() for vector in vectors])


def filled_up(ids: list[int], folder: Path) -> list[int]:
    """Token ids up to SigLIP's length, which its tokenizer fills on a side of its own."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padding = [tokenizer.pad_token_id] * (40 - len(ids))
    return padding + ids if tokenizer.padding_side == "left" else ids + padding


def token_ids(folder: Path) -> list[list[int]]:
    """Not of AutoTokenizer: of the tokenizers that some of these models insist on, ours is none."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("row", ROWS)
def test_texts_become_what_transformers_makes_of_them(row: str, tmp_path: Path) -> None:
    model = save(tmp_path, row)
    with LLM(str(tmp_path), model_impl="transformers") as llm:
        vectors = llm.embed_array(token_ids(tmp_path), use_tqdm=False)
        assert llm.engine.facts.tasks == ("embed",)
        # RoBERTa's positions begin behind the padding id.
        lost = row in ("altclip", "clap")
        assert llm.model.facts.max_tokens == model.config.text_config.max_position_embeddings - lost
        texts = sum(parameter.numel() for parameter in model.text_model.parameters())
        assert texts <= llm.model.facts.sizes.parameters < model.num_parameters()
    np.testing.assert_allclose(vectors, expected(model, tmp_path), atol=TOLERANCE)
    assert np.abs(vectors[0] - vectors[1]).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("projected", [True, False])
def test_a_text_side_alone_keeps_its_projection(projected: bool, tmp_path: Path) -> None:
    tokenizer = saved_tokenizer(tmp_path)
    made = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    model = made(transformers.CLIPTextConfig(**CLIP | {"vocab_size": len(tokenizer)})).eval()
    roughen(model)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        answers = [model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]) for text in TEXTS]
    vectors = [(answer.text_embeds if projected else answer.pooler_output)[0] for answer in answers]
    with LLM(str(tmp_path)) as llm:
        found = llm.embed_array(TEXTS, use_tqdm=False)
    assert found.shape[1] == (24 if projected else 32)
    np.testing.assert_allclose(found, np.stack([(v / v.norm()).numpy() for v in vectors]), atol=TOLERANCE)


def test_what_the_text_side_cannot_do_is_said(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    with LLM(str(tmp_path), model_impl="transformers") as llm:
        assert any("only the text side is used" in note for note in llm.model.facts.notes)
        with pytest.raises(InvalidRequest, match="multi_modal_data"):
            llm.embed({"prompt": "", "multi_modal_data": {"image": object()}})
        with pytest.raises(InvalidRequest, match="maximum context length is 77"):
            llm.embed("sea " * 100, use_tqdm=False)
    with pytest.raises(ConfigError, match="makes one vector of each text itself"):
        LLM(str(tmp_path), model_impl="transformers", pooler_config={"pooling_type": "MEAN"})
    change_tensors(tmp_path, drop="text_model.encoder.layers.1.mlp.fc1.weight")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, .*mlp.fc1.weight"):
        LLM(str(tmp_path), model_impl="transformers")


def test_a_picture_side_that_lacks_tensors_is_not_needed(tmp_path: Path) -> None:
    model = save(tmp_path, "clip")
    change_tensors(tmp_path, drop="vision_model.encoder.layers.1.mlp.fc1.weight")
    with LLM(str(tmp_path), model_impl="transformers") as llm:
        found = llm.embed_array(TEXTS, use_tqdm=False)
    np.testing.assert_allclose(found, expected(model, tmp_path), atol=TOLERANCE)
    change_config(tmp_path, architectures=["CLIPVisionModelWithProjection"], model_type="clip_vision_model")
    with pytest.raises(CheckpointError, match=r"no text model|without a head|cannot load|lacks"):
        LLM(str(tmp_path))
