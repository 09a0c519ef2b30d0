"""Models of transformers with pictures against the classes themselves, a prompt at a time: packed as alone, any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL.Image import Image as PILImage
from torch import Tensor, nn

from poolhouse.errors import CheckpointError
from poolhouse.packing.tokens import Tokens
from tests.models.hosted import (
    ID,
    LLAMA,
    SIGLIP,
    SQUARES,
    TILES,
    VOCABULARY,
    Hosted,
    answers,
    hidden_states,
    loaded,
    picture,
    prompt,
    randomised,
    worst,
)

# A picture between texts, several of different sides in one prompt, one that two prompts show.
SHARED = picture(20, 14)
PROMPTS: tuple[tuple[str | PILImage, ...], ...] = (
    ("what is packed?",),
    (picture(40, 30),),
    ("short",),
    (SHARED, picture(18, 50), "with a text"),
    (SHARED,),
)


def paligemma(layout: str) -> Hosted:
    text = {
        "model_type": "gemma",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": VOCABULARY,
        "pad_token_id": ID["<pad>"],
    }
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
        projection_dim=32,
        image_token_index=ID["<image>"],
    )
    model = randomised(transformers.AutoModel.from_config(config))
    projection = randomised(nn.Linear(32, 12))
    if layout == "transformers":
        whole = {"vlm_config": config.to_dict(), "embedding_dim": 12, "model_type": "colpali"}
        return Hosted(
            model,
            {"embedding_proj_layer": projection},
            {"architectures": ["ColPaliForRetrieval"], **whole},
            SQUARES,
            lambda name: "vlm." + name,
        )
    older = layout == "older names"

    def renamed(name: str) -> str:
        if older:
            name = name.replace("language_model.", "language_model.model.")
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        return "model." + name

    table = model.get_input_embeddings().weight
    dense = layout == "BiPali"
    return Hosted(
        model,
        {} if dense else {"custom_text_proj": projection},
        {**config.to_dict(), "architectures": ["BiPali" if dense else "ColPali"]},
        SQUARES,
        renamed,
        {"model.language_model.lm_head.weight": table} if older else {},
    )


def idefics3(architecture: str) -> Hosted:
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **LLAMA},
        vision_config=SIGLIP,
        scale_factor=2,
        image_token_id=ID["<image>"],
        pad_token_id=ID["<pad>"],
    )
    return Hosted(
        randomised(transformers.AutoModel.from_config(config)),
        {"linear": randomised(nn.Linear(32, 12))} if architecture.startswith("Col") else {},
        {**config.to_dict(), "architectures": [architecture]},
        TILES,
        lambda name: "model." + name,
    )


def modernvbert(layout: str) -> Hosted:
    text = {
        "model_type": "modernbert",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "local_attention": 8,
        "max_position_embeddings": 512,
        "pad_token_id": ID["<pad>"],
    }
    config = transformers.ModernVBertConfig(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", **SIGLIP, "patch_size": 2},
        pixel_shuffle_factor=4,
        image_token_id=ID["<image>"],
    )
    model, projection = randomised(transformers.AutoModel.from_config(config)), randomised(nn.Linear(32, 12))
    if layout == "transformers":
        whole = {"vlm_config": config.to_dict(), "embedding_dim": 12, "model_type": "colmodernvbert"}
        return Hosted(
            model,
            {"embedding_proj_layer": projection},
            {"architectures": ["ColModernVBertForRetrieval"], **whole},
            TILES,
            lambda name: "vlm." + name,
        )

    def renamed(name: str) -> str:
        wrapped = layout == "like an adapter" and name.startswith("text_model.")
        return ("base_model.model.model." if wrapped else "model.") + name

    dense = layout == "BiModernVBert"
    place = "base_model.model.custom_text_proj" if layout == "like an adapter" else "custom_text_proj"
    return Hosted(
        model,
        {} if dense else {place: projection},
        {**config.to_dict(), "architectures": ["BiModernVBert" if dense else "ColModernVBert"]},
        TILES,
        renamed,
    )


def of_squares(model: Any, tokens: Tokens) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([torch.from_numpy(one.pixels) for one in shown(tokens)])}


def of_tiles(model: Any, tokens: Tokens) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([torch.from_numpy(one.pixels) for one in shown(tokens)])[None]}


def shown(tokens: Tokens) -> tuple[Any, ...]:
    return () if tokens.pictures is None else tokens.pictures.pictures


Reading = Callable[[Any, Tokens], dict[str, Tensor]]
KINDS: dict[str, tuple[Callable[[], Hosted], Reading]] = {
    "ColPali of transformers": (lambda: paligemma("transformers"), of_squares),
    "ColPali of colpali-engine": (lambda: paligemma("engine"), of_squares),
    "ColPali with older names": (lambda: paligemma("older names"), of_squares),
    "BiPali": (lambda: paligemma("BiPali"), of_squares),
    "ColIdefics3": (lambda: idefics3("ColIdefics3"), of_tiles),
    "BiIdefics3": (lambda: idefics3("BiIdefics3"), of_tiles),
    "ColModernVBERT of transformers": (lambda: modernvbert("transformers"), of_tiles),
    "ColModernVBERT of colpali-engine": (lambda: modernvbert("engine"), of_tiles),
    "ColModernVBERT that looks like an adapter": (lambda: modernvbert("like an adapter"), of_tiles),
    "BiModernVBERT": (lambda: modernvbert("BiModernVBert"), of_tiles),
}


def reference(tiny: Hosted, reading: Reading, tokens: Tokens) -> Tensor:
    """Hidden states of one prompt, by the class itself with its own attention."""
    with torch.no_grad():
        more = reading(tiny.model, tokens) if shown(tokens) else {}
        found: Tensor = tiny.model(input_ids=torch.from_numpy(tokens.ids)[None], **more).last_hidden_state[0]
        return found


@pytest.mark.parametrize("kind", KINDS)
def test_packed_prompts_with_pictures_equal_the_class_alone(kind: str, tmp_path: Path) -> None:
    make, reading = KINDS[kind]
    tiny = make()
    tiny.save(tmp_path)
    model = loaded(tmp_path)
    assert model.facts.served_by.startswith("transformers, packed"), model.facts.served_by
    assert model.facts.pictures is not None
    prompts = [prompt(model.facts.pictures, *parts) for parts in PROMPTS]
    expected = [reference(tiny, reading, one) for one in prompts]
    assert worst(hidden_states(model, prompts), expected) < 1e-4
    for one, hidden in zip(prompts, expected, strict=True):
        assert worst(hidden_states(model, [one]), [hidden]) < 1e-4
    pooled = {"MEAN": lambda rows: rows.mean(0, keepdim=True), "LAST": lambda rows: rows[-1:]}
    reduce = pooled.get(model.plan.default_pooling or "", lambda rows: rows)
    assert worst(answers(model, prompts), [tiny.projected(reduce(hidden)) for hidden in expected]) < 1e-4


def test_a_tensor_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    tiny = idefics3("ColIdefics3")
    tiny.more = {"model.text_model.layers.0.mlp.extra.weight": torch.ones(2)}
    tiny.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 tensors that transformers' Idefics3Model does not have: .*extra"):
        loaded(tmp_path)


def test_a_missing_tensor_is_never_made_up(tmp_path: Path) -> None:
    tiny = idefics3("ColIdefics3")
    tiny.renamed = lambda name: "model." + name.replace("connector.modality", "connector.another")
    tiny.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that the model needs: connector\.modality"):
        loaded(tmp_path)
