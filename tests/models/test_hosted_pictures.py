"""Models of transformers with pictures against the classes themselves, a prompt at a time: packed as alone, any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as Pillow
from PIL.Image import Image as PILImage
from safetensors.torch import save_file
from torch import Tensor, nn

from poolhouse import LLM
from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.packing.pack import PackedPictures
from poolhouse.packing.tokens import Pictures, Tokens
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
    tokenizer,
    worst,
)
from tests.models.parity import Parity, Record

TOLERANCE = 1e-4
# A picture between texts, several of different sides in one prompt, one that two prompts show.
SHARED = picture(20, 14)
PROMPTS: tuple[tuple[str | PILImage, ...], ...] = (
    ("what is packed?",),
    (picture(40, 30),),
    ("short",),
    (SHARED, picture(18, 50), "with a text"),
    (SHARED,),
)


PROMPTS_OF = {"E5-V": (*PROMPTS[:3], (SHARED,), (picture(18, 70),))}


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


def gemma() -> Hosted:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "intermediate_size": 48,
        "hidden_size_per_layer_input": 8,
        "embedding_dim": 24,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
        "max_position_embeddings": 512,
        "pad_token_id": ID["<pad>"],
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 48,
        "patch_size": 2,
        "pooling_kernel_size": 3,
        "position_embedding_size": 256,
        "standardize": True,
    }
    config = transformers.EmbeddingGemma2Config(
        text_config=transformers.EmbeddingGemma2TextConfig(**text),
        vision_config=vision,
        boi_token_id=ID["<|image>"],
        eoi_token_id=ID["<image|>"],
        image_token_id=ID["<|image|>"],
        video_token_id=ID["<|video_pad|>"],
        audio_token_id=ID["<|im_end|>"],
    )
    settings = {
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": 2,
        "max_soft_tokens": 70,
        "pooling_kernel_size": 3,
    }
    model = randomised(transformers.AutoModel.from_config(config))
    for name, buffer in model.named_buffers():
        if name.endswith(("std_bias", "std_scale")):
            nn.init.normal_(buffer, 1.0, 0.2)
    whole = {**config.to_dict(), "architectures": ["EmbeddingGemma2Model"]}
    return Hosted(model, {}, whole, settings, lambda name: name)


def colqwen3_5(contract: str) -> Hosted:
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": VOCABULARY,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 0],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_position_embeddings": 64,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, image_token_id=ID["<|image_pad|>"], video_token_id=ID["<|video_pad|>"]
    )
    model = randomised(transformers.AutoModel.from_config(config))
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 128, "longest_edge": 1024},
    }
    whole = {
        **config.to_dict(),
        "architectures": ["ColQwen3_5"],
        "dim": 12,
        "retrieval_attention_contract": contract,
    }
    return Hosted(model, {"custom_text_proj": randomised(nn.Linear(32, 12))}, whole, settings, lambda name: name)


def e5_v() -> Hosted:
    vision = {"model_type": "clip_vision_model", **SIGLIP, "num_hidden_layers": 3, "projection_dim": 24}
    config = transformers.LlavaNextConfig(
        text_config={"model_type": "llama", **LLAMA},
        vision_config=vision,
        image_token_index=ID["<image>"],
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [16, 48]],
    )
    settings = {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    model = randomised(transformers.AutoModel.from_config(config))

    def renamed(name: str) -> str:
        name = name.replace("language_model.", "language_model.model.")
        return name.replace("vision_tower.", "vision_tower.vision_model.")

    head = {"language_model.lm_head.weight": model.get_input_embeddings().weight}
    whole = {**config.to_dict(), "architectures": ["LlavaNextForConditionalGeneration"]}
    return Hosted(model, {}, whole, settings, renamed, head)


def of_squares(model: Any, tokens: Tokens) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([torch.from_numpy(one.pixels) for one in shown(tokens)])}


def of_tiles(model: Any, tokens: Tokens) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([torch.from_numpy(one.pixels) for one in shown(tokens)])[None]}


def of_soft_tokens(model: Any, tokens: Tokens) -> dict[str, Tensor]:
    """Filled up to one length, as transformers does."""
    most = 9 * 70
    pixels, positions = [], []
    for one in shown(tokens):
        empty = most - len(one.pixels)
        pixels.append(np.pad(one.pixels, ((0, empty), (0, 0))))
        positions.append(np.pad(one.more["image_position_ids"], ((0, empty), (0, 0)), constant_values=-1))
    return {
        "pixel_values": torch.from_numpy(np.stack(pixels)),
        "image_position_ids": torch.from_numpy(np.stack(positions)),
    }


def of_grids(model: Any, tokens: Tokens) -> dict[str, Tensor]:
    """With explicit positions, and every patch's frame twice."""
    grids = torch.tensor([(1, *one.grid) for one in shown(tokens)])
    pixels = torch.cat([torch.from_numpy(one.pixels).view(len(one.pixels), 3, 1, 16) for one in shown(tokens)])
    ids = torch.from_numpy(tokens.ids)[None]
    kinds = torch.from_numpy(tokens.pictures.filled)[None].int()
    positions, _ = model.get_rope_index(ids, kinds, grids)
    return {
        "pixel_values": pixels.expand(-1, -1, 2, -1).reshape(len(pixels), -1),
        "image_grid_thw": grids,
        "position_ids": positions,
    }


def of_shapes(model: Any, tokens: Tokens) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.cat([torch.from_numpy(one.pixels) for one in shown(tokens)]),
        "image_sizes": torch.from_numpy(np.concatenate([one.more["image_sizes"] for one in shown(tokens)])),
    }


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
    "EmbeddingGemma 2": (gemma, of_soft_tokens),
    "ColQwen3.5, causal": (lambda: colqwen3_5("causal"), of_grids),
    "ColQwen3.5, bidirectional": (lambda: colqwen3_5("bidirectional"), of_grids),
    "E5-V": (e5_v, of_shapes),
}


def reference(tiny: Hosted, reading: Reading, tokens: Tokens) -> Tensor:
    """Hidden states of one prompt, by the class itself with its own attention; without a mask where nothing is hidden."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if tiny.config.get("retrieval_attention_contract") == "bidirectional":
            patch.setattr("transformers.models.qwen3_5.modeling_qwen3_5.create_causal_mask", lambda **_: None)
            tiny.model.set_attn_implementation({"text_config": "eager"})
        more = reading(tiny.model, tokens) if shown(tokens) else {}
        found: Tensor = tiny.model(input_ids=torch.from_numpy(tokens.ids)[None], **more).last_hidden_state[0]
        return found


# Published models of each kind, where there are some.
EXAMPLES = {
    "ColPali of transformers": "vidore/colpali-v1.3-hf",
    "ColPali of colpali-engine": "vidore/colpali-v1.3-merged",
    "ColModernVBERT of transformers": "ModernVBERT/colmodernvbert-merged",
    "EmbeddingGemma 2": "google/embeddinggemma-2",
    "ColQwen3.5, bidirectional": "athrael-soju/colqwen3.5-4.5B-v3",
    "E5-V": "royokong/e5-v",
}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_prompts_with_pictures_equal_the_class_alone(kind: str, tmp_path: Path, record_parity: Record) -> None:
    make, reading = KINDS[kind]
    tiny = make()
    tiny.save(tmp_path)
    model = loaded(tmp_path)
    way = "unpacked: packed and alone differ" if kind.startswith("ColQwen3.5") else "packed, positions from 0"
    assert model.facts.served_by.startswith(f"transformers, {way}"), model.facts.served_by
    assert model.facts.pictures is not None
    prompts = [prompt(model.facts.pictures, *parts) for parts in PROMPTS_OF.get(kind, PROMPTS)]
    expected = [reference(tiny, reading, one) for one in prompts]
    assert worst(hidden_states(model, prompts), expected) < TOLERANCE
    pooled = {"MEAN": lambda rows: rows.mean(0, keepdim=True), "LAST": lambda rows: rows[-1:]}
    reduce = pooled.get(model.plan.default_pooling or "", lambda rows: rows)
    got = answers(model, prompts)
    parity = Parity(
        f"texts and pictures: {kind}",
        model.facts.served_by,
        "transformers' class, a prompt at a time",
        worst(got, [tiny.projected(reduce(hidden)) for hidden in expected]),
        worst(got, [answers(model, [one])[0] for one in prompts]),
        model.facts.architecture,
        model.tasks,
        EXAMPLES.get(kind, ""),
    )
    record_parity(parity)
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE


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


def processor(tiny: Hosted) -> Any:
    """transformers' own, of the kind."""
    settings = {name: value for name, value in tiny.settings.items() if name != "image_processor_type"}
    name = str(tiny.settings["image_processor_type"])
    images, tokens = getattr(transformers, f"{name}Pil")(**settings), tokenizer()
    if name == "SiglipImageProcessor":
        images.image_seq_length = 16
        kind = "ColPali" if tiny.config["model_type"] == "colpali" else "PaliGemma"
        return getattr(transformers, f"{kind}Processor")(images, tokens)
    kind, rows = ("ColModernVBert", 4) if "vlm_config" in tiny.config else ("Idefics3", 4)
    return getattr(transformers, f"{kind}Processor")(images, tokens, image_seq_len=rows)


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("ColPali of transformers", None),
        ("ColPali of colpali-engine", "<image><bos>Describe the image."),
        ("ColIdefics3", "<|im_start|>User:<image>Describe the image.<end_of_utterance>\nAssistant:"),
        ("ColModernVBERT of transformers", None),
        (
            "ColModernVBERT of colpali-engine",
            "<|begin_of_text|>User:<image>Describe the image.<end_of_utterance>\nAssistant:",
        ),
    ],
)
def test_prompts_are_those_of_the_processor(kind: str, shown: str | None, tmp_path: Path) -> None:
    tiny = KINDS[kind][0]()
    tiny.save(tmp_path)
    reader, theirs = loaded(tmp_path).facts.pictures, processor(tiny)
    assert reader is not None
    for image in (picture(40, 30), picture(9, 60), picture(12, 12)):
        if shown is None:
            wanted = theirs.process_images([image])
        else:
            wanted = theirs(text=[shown], images=[image], return_tensors="np")
        own = prompt(reader, image)
        assert own.ids.tolist() == wanted["input_ids"][0].tolist()
        assert own.pictures is not None
        pixels = own.pictures.pictures[0].pixels
        np.testing.assert_array_equal(pixels, np.asarray(wanted["pixel_values"]).reshape(pixels.shape))
    if shown is None:
        query = theirs.process_queries(["what is packed?"])["input_ids"][0].tolist()
        assert prompt(reader, "what is packed?", role="query").ids.tolist() == query


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("Phi3VForCausalLM", r"Phi-3-V .*, which is not served: .*; VLM2Vec-V2, on Qwen2-VL, is served"),
        ("ColQwen2_5Omni", r"ColQwen-Omni, which is not served: .* sound and video"),
        ("ColGemma3", r"ColGemma3, which is not served: .* ColPali and ColQwen2\.5"),
        ("llama_NemoRetrieverColEmbed", r"ColEmbed, which is not served: .* nvidia/nemotron-colembed-vl-4b-v2"),
    ],
)
def test_what_is_not_served_is_refused_by_name(architecture: str, why: str, tmp_path: Path) -> None:
    tiny = idefics3("ColIdefics3")
    tiny.config["architectures"] = [architecture]
    tiny.save(tmp_path)
    with pytest.raises(CheckpointError, match=why):
        loaded(tmp_path)


def test_texts_alone_are_read_of_a_model_that_is_not_served_with_pictures(tmp_path: Path) -> None:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **LLAMA},
        vision_config={"model_type": "clip_vision_model", **SIGLIP, "projection_dim": 24},
        image_token_index=ID["<image>"],
    )
    whole = {**config.to_dict(), "architectures": ["LlavaForConditionalGeneration"]}
    tiny = Hosted(randomised(transformers.AutoModel.from_config(config)), {}, whole, {}, lambda name: name)
    tiny.save(tmp_path)
    model = loaded(tmp_path)
    assert model.facts.pictures is None
    assert "Texts alone are read: LlavaModel is not served with pictures." in model.facts.notes
    texts = [Tokens(np.array(ids, np.int64)) for ids in ([5, 9, 7], [70, 4, 8, 31, 6])]
    expected = [reference(tiny, of_squares, text) for text in texts]
    assert worst(hidden_states(model, texts), expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["ColPali of colpali-engine", "ColIdefics3"])
def test_an_adapter_is_merged_into_its_base(kind: str, tmp_path: Path, record_parity: Record) -> None:
    make, reading = KINDS[kind]
    tiny = make()
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    tiny.save(base)
    text = "language_model" if "ColPali" in kind else "text_model"
    (projection,) = tiny.modules
    changed = {
        f"model.{text}.model.layers.1.self_attn.q_proj": tiny.model.get_submodule(f"{text}.layers.1.self_attn.q_proj"),
        f"model.{text}.model.layers.0.mlp.down_proj": tiny.model.get_submodule(f"{text}.layers.0.mlp.down_proj"),
        projection: tiny.modules[projection],
    }
    torch.manual_seed(1)
    tensors = {}
    for name, module in changed.items():
        a, b = torch.randn(4, module.in_features) * 0.2, torch.randn(module.out_features, 4) * 0.2
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        module.weight += b @ a * (8 / 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    model = loaded(folder)
    assert f"Merged into the weights: the adapter {folder}." in model.facts.notes
    assert model.facts.pictures is not None
    prompts = [prompt(model.facts.pictures, *parts) for parts in PROMPTS[:3]]
    got = answers(model, prompts)
    parity = Parity(
        f"texts and pictures: {kind}, as an adapter",
        model.facts.served_by,
        "peft's formula, transformers' class, a prompt at a time",
        worst(got, [tiny.projected(reference(tiny, reading, one)) for one in prompts]),
        worst(got, [answers(model, [one])[0] for one in prompts]),
        model.facts.architecture,
        model.tasks,
        "vidore/colpali-v1.3" if "ColPali" in kind else "vidore/colSmol-256M",
    )
    record_parity(parity)
    assert parity.error < TOLERANCE
    assert parity.packing_error < TOLERANCE


def test_e5_vs_rows_are_as_many_as_its_processors(tmp_path: Path) -> None:
    tiny = e5_v()
    tiny.save(tmp_path)
    reader = loaded(tmp_path).facts.pictures
    settings = {name: value for name, value in tiny.settings.items() if name != "image_processor_type"}
    images = transformers.LlavaNextImageProcessorPil(
        **settings, image_grid_pinpoints=tiny.config["image_grid_pinpoints"]
    )
    # Its class counts a CLS token that "default" takes off again.
    theirs = transformers.LlavaNextProcessor(
        images, tokenizer(), patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    assert reader is not None
    for image in (picture(16, 16), picture(100, 7), picture(31, 90), picture(33, 64), picture(3, 2)):
        wanted = theirs(text=["<image>"], images=[image], return_tensors="np")
        own = reader.processor(image, {})
        assert own.ids.tolist() == wanted["input_ids"][0].tolist(), image.size
        np.testing.assert_array_equal(own.pixels, wanted["pixel_values"][0])


def test_e5_v_reads_a_text_or_a_picture(tmp_path: Path) -> None:
    e5_v().save(tmp_path)
    reader = loaded(tmp_path).facts.pictures
    assert reader is not None
    with pytest.raises(InvalidRequest, match="a text or a picture, not both"):
        prompt(reader, picture(16, 16), "text")


def test_a_contract_of_attention_is_asked_for(tmp_path: Path) -> None:
    tiny = colqwen3_5("causal")
    del tiny.config["retrieval_attention_contract"]
    tiny.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"retrieval_attention_contract is None.*hf_overrides="):
        loaded(tmp_path)
    assert loaded(tmp_path, overrides={"retrieval_attention_contract": "causal"}).facts.pictures is not None


def test_a_tile_that_is_zero_everywhere_is_refused(tmp_path: Path) -> None:
    tiny = idefics3("ColIdefics3")
    tiny.settings = {**TILES, "image_mean": [0.0, 0.0, 0.0]}
    tiny.save(tmp_path)
    reader = loaded(tmp_path).facts.pictures
    assert reader is not None
    black = Pillow.new("RGB", (32, 32))
    with pytest.raises(InvalidRequest, match="zero everywhere"):
        reader.processor(black, {})


def test_a_tower_that_does_not_fit_its_processor_is_refused(tmp_path: Path) -> None:
    tiny = paligemma("engine")
    tiny.settings = {**SQUARES, "size": {"height": 12, "width": 12}}
    tiny.save(tmp_path)
    with pytest.raises(CheckpointError, match="files make them cannot be read: This model reads pictures of 16 x 16"):
        loaded(tmp_path)


def test_a_picture_that_prompts_share_is_read_once(tmp_path: Path) -> None:
    idefics3("ColIdefics3").save(tmp_path)
    model = loaded(tmp_path)
    reader = model.facts.pictures
    assert reader is not None
    page = reader.processor(picture(40, 30), {})
    tokens = Tokens(page.ids, pictures=Pictures((page,), page.filled))
    pack = PackedPictures.of([tokens, tokens, tokens], "cpu")
    assert pack is not None
    assert len(pack.pixels) == len(page.pixels)
    first, second, third = hidden_states(model, [tokens, tokens, tokens])
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("name", ["ColPali", "ColModernVBert"])
def test_a_model_that_transformers_saved_answers_as_its_class(name: str, tmp_path: Path) -> None:
    tiny = paligemma("transformers") if name == "ColPali" else modernvbert("transformers")
    config = getattr(transformers, f"{name}Config")(vlm_config=tiny.config["vlm_config"], embedding_dim=12)
    theirs = randomised(getattr(transformers, f"{name}ForRetrieval")(config))
    tiny.save(tmp_path)
    theirs.save_pretrained(tmp_path)
    model = loaded(tmp_path)
    assert model.facts.pictures is not None
    prompts = [prompt(model.facts.pictures, *parts) for parts in PROMPTS[:3]]
    reading = of_squares if name == "ColPali" else of_tiles
    with torch.no_grad():
        expected = [
            theirs(
                input_ids=torch.from_numpy(one.ids)[None],
                attention_mask=torch.ones(1, len(one), dtype=torch.long),
                **(reading(None, one) if shown(one) else {}),
            ).embeddings[0]
            for one in prompts
        ]
    assert worst(answers(model, prompts), expected) < TOLERANCE


def test_pages_are_ranked_by_their_tokens(tmp_path: Path) -> None:
    tiny = idefics3("ColIdefics3")
    tiny.save(tmp_path)
    pages = [picture(40, 30), picture(18, 50)]
    with LLM(tmp_path, device="cpu", dtype="float32") as llm:
        documents = [{"content": [{"type": "image_pil", "image_pil": page}]} for page in pages]
        outputs = llm.score("what is packed?", documents, use_tqdm=False)
        reader = llm.model.facts.pictures
    assert reader is not None
    query, *seen = (
        tiny.projected(reference(tiny, of_tiles, prompt(reader, part))) for part in ("what is packed?", *pages)
    )
    expected = [float((query @ page.T).max(1).values.sum()) for page in seen]
    np.testing.assert_allclose([output.outputs.score for output in outputs], expected, rtol=1e-4)


def test_a_named_prompt_stands_before_content(tmp_path: Path) -> None:
    tiny = gemma()
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    seen = dict.fromkeys(("text", "image", "message"), output)
    tiny.files = {
        "config_sentence_transformers.json": {"prompts": {"retrieval": "task: search | query: "}},
        "modules.json": [
            {"idx": int(name), "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
            for name, path, kind in modules
        ],
        "sentence_bert_config.json": {"transformer_task": "feature-extraction", "modality_config": seen},
        "1_Pooling/config.json": {"embedding_dimension": 24, "pooling_mode": "mean"},
    }
    (tmp_path / "1_Pooling").mkdir()
    tiny.save(tmp_path)
    page = picture(40, 30)
    content = {"content": ["of ", {"type": "image_pil", "image_pil": page}]}
    with LLM(tmp_path, device="cpu", dtype="float32") as llm:
        (output,) = llm.encode([content], pooling_task="embed", prompt_name="retrieval", use_tqdm=False)
        reader = llm.model.facts.pictures
    assert reader is not None
    written = tokenizer()("task: search | query: of ")["input_ids"]
    assert output.prompt_token_ids == [*written, *reader.processor(page, {}).ids.tolist()]
