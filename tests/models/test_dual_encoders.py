"""Dual encoders: CLIP, SigLIP and SigLIP 2, native, against transformers' own vectors of texts and of pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from poolhouse.errors import CheckpointError, ConfigError, InvalidRequest
from poolhouse.files import Folder
from poolhouse.models.adapters.adapters import AdapterOptions
from poolhouse.models.load import load
from poolhouse.models.model import Model
from poolhouse.models.plan import LoadOptions
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Picture, Pictures, Tokens
from tests.models.parity import Parity, Record, change_config, change_tensors

# The largest difference, as a share of the largest entry: float32 rounding, in batches of other shapes.
TOLERANCE = 1e-5
SIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP_TEXT = SIDE | {
    "max_position_embeddings": 20,
    "vocab_size": 40,
    "bos_token_id": 38,
    "eos_token_id": 39,
    "projection_dim": 24,
}
CLIP_PICTURES = SIDE | {"hidden_size": 48, "image_size": 32, "patch_size": 8, "projection_dim": 24}
SIGLIP_TEXT = SIDE | {"max_position_embeddings": 12, "vocab_size": 40, "projection_size": 32}
SIGLIP_PICTURES = SIDE | {"image_size": 32, "patch_size": 8}
NAFLEX_PICTURES = SIDE | {"patch_size": 8, "num_patches": 16}
PAD = 0
# Model, options of its text half, of its picture half, of the whole, and of the picture processor.
# What the rows of docs/models.md speak for.
EXAMPLES = {
    "clip": "openai/clip-vit-base-patch32, clip-ViT-B-32",
    "siglip": "google/siglip-base-patch16-224, google/siglip2-base-patch16-224",
    "siglip 2": "google/siglip2-base-patch16-naflex",
}
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "clip": ("CLIP", CLIP_TEXT, CLIP_PICTURES, {"projection_dim": 24}, {}),
    "clip, first files": ("CLIP", CLIP_TEXT | {"eos_token_id": 2}, CLIP_PICTURES, {"projection_dim": 24}, {}),
    "clip, gelu": (
        "CLIP",
        CLIP_TEXT | {"hidden_act": "gelu"},
        CLIP_PICTURES | {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
        {"projection_dim": 24},
        {},
    ),
    "siglip": ("Siglip", SIGLIP_TEXT, SIGLIP_PICTURES, {}, {}),
    "siglip, wider": (
        "Siglip",
        SIGLIP_TEXT | {"projection_size": 48},
        SIGLIP_PICTURES | {"hidden_size": 48},
        {},
        {},
    ),
    "siglip 2": ("Siglip2", SIGLIP_TEXT, NAFLEX_PICTURES, {}, {"patch_size": 8, "max_num_patches": 24}),
}
TEXTS = [[38, 5, 7, 39], [38, 1, 2, 3, 4, 5, 6, 7, 8, 39], [38, 39], [38, 9, 39, 9, 39], [4, 4]]
SIZES = [(64, 48), (30, 30), (10, 90), (200, 41)]


def save(folder: Path, row: str, former: bool = True) -> Any:
    """The checkpoint with its picture processor, and transformers' own model of it.

    former: settings of pictures stand in preprocessor_config.json, else in processor_config.json.
    """
    family, texts, pictures, options, _ = ROWS[row]
    config = getattr(transformers, f"{family}Config")(text_config=texts, vision_config=pictures, **options)
    torch.manual_seed(1)
    model = roughened(getattr(transformers, f"{family}Model")(config))
    model.save_pretrained(folder)
    processor(row).save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    if not former:
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    # What `padding_of` reads; no tokenizer is needed where ids are given.
    stated = {"pad_token": "[PAD]", "padding_side": "right", "added_tokens_decoder": {str(PAD): {"content": "[PAD]"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return getattr(transformers, f"{family}Model").from_pretrained(folder).eval()


def roughened(model: torch.nn.Module) -> torch.nn.Module:
    """Weights so large that each one is seen in the answers: biases not zero, norms around 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    return model


def processor(row: str) -> Any:
    """transformers' picture processor of a row, by PIL."""
    family, _, _, _, options = ROWS[row]
    if family == "CLIP":
        options = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    elif family == "Siglip":
        options = {"size": {"height": 32, "width": 32}}
    return getattr(transformers, f"{family}ImageProcessorPil")(**options)


@cache
def image(width: int, height: int) -> Image.Image:
    """Coloured noise over a slope."""
    numbers = np.random.default_rng(width).integers(0, 128, (height, width, 3))
    slope = np.linspace(0, 127, width)[None, :, None]
    return Image.fromarray((numbers + slope).astype(np.uint8))


def of_texts(model: Any, texts: Sequence[Sequence[int]] = TEXTS) -> list[np.ndarray]:
    """transformers' features of texts one by one, filled up where the model was trained so."""
    features: list[np.ndarray] = []
    length = model.config.text_config.max_position_embeddings if "siglip" in model.config.model_type else 0
    with torch.inference_mode():
        for ids in texts:
            padding = [PAD] * (length - len(ids))
            found: Tensor = model.get_text_features(input_ids=torch.tensor([[*ids, *padding]])).pooler_output
            features.append(found[0].numpy())
    return features


def of_pictures(model: Any, row: str) -> list[np.ndarray]:
    """transformers' features of pictures one by one."""
    theirs = processor(row)
    with torch.inference_mode():
        answers = [model.get_image_features(**theirs(image(*size), return_tensors="pt")) for size in SIZES]
    return [answer.pooler_output[0].numpy() for answer in answers]


def opened(folder: Path, **options: Any) -> Model:
    return load(folder, LoadOptions(str(folder), **options))


def shown(model: Model, sides: tuple[int, int], **options: object) -> Tokens:
    """A prompt of one picture."""
    assert model.facts.pictures is not None
    return of_picture(model.facts.pictures.processor(image(*sides), options))


def of_picture(picture: Picture) -> Tokens:
    return Tokens(picture.ids, pictures=Pictures((picture,), picture.filled))


def text(ids: Sequence[int]) -> Tokens:
    return Tokens(np.array(ids))


def run(model: Model, prompts: Sequence[Tokens]) -> list[np.ndarray]:
    """The vector of each prompt of a pack, as the tower made it."""
    batch = Batch.pack(prompts)
    with torch.inference_mode():
        rows = model.backbone(batch)
    starts, ends = batch.segments.starts, batch.segments.ends
    for start, end in zip(starts, ends, strict=True):
        assert torch.equal(rows[start:end], rows[start : start + 1].expand(end - start, -1))
    return [rows[start].numpy() for start in starts]


def assert_same(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The largest difference, as a share of the largest entry."""
    largest = max(np.abs(vector).max() for vector in wanted)
    error = max(float(np.abs(ours - theirs).max() / largest) for ours, theirs in zip(found, wanted, strict=True))
    assert error < TOLERANCE
    # Else a vector that does not depend on its prompt would pass.
    assert all(np.abs(one - wanted[0]).max() > 1000 * TOLERANCE * largest for one in wanted[1:])
    return error


@pytest.mark.parametrize("former", [True, False], ids=["preprocessor_config", "processor_config"])
@pytest.mark.parametrize("row", ROWS)
def test_texts_and_pictures_become_what_transformers_makes_of_them(
    row: str, former: bool, tmp_path: Path, record_parity: Record
) -> None:
    theirs = save(tmp_path, row, former)
    model = opened(tmp_path)
    assert model.facts.served_by == f"native {theirs.config.model_type}, packed"
    assert model.tasks == ("embed",)
    assert model.plan.described()["pooling"] == "by the model itself"
    assert model.facts.sizes.parameters >= theirs.num_parameters() - 2
    assert model.facts.max_tokens == theirs.config.text_config.max_position_embeddings
    texts, pictures = [text(ids) for ids in TEXTS], [shown(model, size) for size in SIZES]
    mixed = [texts[0], pictures[0], pictures[1], texts[1], texts[2], pictures[2], texts[3], texts[4], pictures[3]]
    wanted_texts, wanted_pictures = of_texts(theirs), of_pictures(theirs, row)
    wanted = [*wanted_texts[:1], *wanted_pictures[:2], *wanted_texts[1:3], wanted_pictures[2]]
    wanted += [*wanted_texts[3:], wanted_pictures[3]]
    packed, alone = run(model, mixed), [run(model, [prompt])[0] for prompt in mixed]
    error = max(assert_same(packed, wanted), assert_same(alone, wanted))
    packing_error = assert_same(packed, alone)
    assert_same(run(model, pictures), wanted_pictures)
    assert_same(run(model, texts), wanted_texts)
    if row in EXAMPLES and former:
        parity = Parity(
            model=f"{theirs.config.model_type}, texts and pictures",
            path=model.facts.served_by,
            reference=f"transformers {type(theirs).__name__}",
            error=error,
            packing_error=packing_error,
            architecture=model.facts.architecture,
            tasks=model.tasks,
            examples=EXAMPLES[row],
        )
        record_parity(parity)


def test_a_picture_of_several_prompts_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = save(tmp_path, "clip")
    model = opened(tmp_path)
    one, other = shown(model, SIZES[0]), shown(model, SIZES[1])
    batch = Batch.pack([one, text(TEXTS[0]), other, one])
    assert batch.pictures is not None
    assert [len(batch.pictures.pictures), batch.pictures.pixels.shape[0]] == [2, 2 * 16]
    first, second = of_pictures(theirs, "clip")[:2]
    found = run(model, [one, text(TEXTS[0]), other, one])
    np.testing.assert_array_equal(found[0], found[3])
    assert_same([found[0], found[2]], [first, second])


def test_padding_on_the_left_is_kept(tmp_path: Path) -> None:
    theirs = save(tmp_path, "siglip")
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    model = opened(tmp_path)
    filled = [[PAD] * (12 - len(ids)) + ids for ids in TEXTS]
    assert_same(run(model, [text(ids) for ids in TEXTS] + [shown(model, SIZES[0])])[:-1], of_texts(theirs, filled))


def test_a_grid_of_patches_follows_the_request(tmp_path: Path) -> None:
    theirs = save(tmp_path, "siglip 2")
    model = opened(tmp_path)
    prompts = [shown(model, size, max_num_patches=count) for size in SIZES for count in (4, 40)]
    grids = [prompt.pictures.pictures[0].grid for prompt in prompts if prompt.pictures is not None]
    assert len(set(grids)) > 5
    wanted = []
    for size in SIZES:
        for count in (4, 40):
            own = processor("siglip 2")(image(*size), max_num_patches=count, return_tensors="pt")
            with torch.inference_mode():
                wanted.append(theirs.get_image_features(**own).pooler_output[0].numpy())
    assert_same(run(model, prompts), wanted)


def test_settings_of_the_first_files_are_read(tmp_path: Path) -> None:
    theirs = save(tmp_path, "clip")
    settings = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model = opened(tmp_path)
    assert_same(run(model, [shown(model, size) for size in SIZES]), of_pictures(theirs, "clip"))


def test_texts_of_half_configs_are_completed(tmp_path: Path) -> None:
    """laion's files hold what differs from the defaults, twice; the older name wins."""
    theirs = save(tmp_path, "clip, first files")
    config = json.loads((tmp_path / "config.json").read_text())
    for half in ("text_config", "vision_config"):
        own = config[half]
        config[f"{half}_dict"] = own
        config[half] = own | {"num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = opened(tmp_path)
    assert_same(run(model, [text(ids) for ids in TEXTS]), of_texts(theirs))


def test_a_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "siglip")
    model = opened(tmp_path)
    with pytest.raises(InvalidRequest, match=r"reads pictures of 32 x 32 pixels; .* made one of 48 x 64"):
        shown(model, SIZES[0], size={"height": 48, "width": 64})
    with pytest.raises(InvalidRequest, match=r"no option 'sise'\. Did you mean 'size'"):
        shown(model, SIZES[0], sise={"height": 48, "width": 64})


@pytest.mark.parametrize("row", ["clip", "siglip", "siglip 2"])
def test_tensors_are_claimed_strictly(row: str, tmp_path: Path) -> None:
    save(tmp_path, row)
    change_tensors(tmp_path, drop="vision_model.encoder.layers.1.mlp.fc1.weight")
    with pytest.raises(CheckpointError, match=r"vision_model.encoder.layers.\*.mlp.fc1.*not in \[1\]"):
        opened(tmp_path)
    save(tmp_path, row)
    change_tensors(tmp_path, add={"vision_model.surprise.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"does not know: .'vision_model.surprise.weight'"):
        opened(tmp_path)
    save(tmp_path, row)
    change_config(tmp_path, vision_config=ROWS[row][2] | {"num_attention_heads": 5})
    with pytest.raises(CheckpointError, match="do not fit together"):
        opened(tmp_path)


def test_what_no_tower_of_ours_does_is_left_to_transformers(tmp_path: Path) -> None:
    save(tmp_path, "siglip")
    change_config(tmp_path, vision_config=ROWS["siglip"][2] | {"vision_use_head": False})
    with pytest.raises(CheckpointError, match="vision_use_head"):
        opened(tmp_path, implementation="native")


def test_adapters_of_half_a_model_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    adapters = AdapterOptions({"one": Folder(tmp_path)})
    with pytest.raises(ConfigError, match="Adapters are not served of CLIP"):
        opened(tmp_path, adapters=adapters)


NO_TEXTS = {
    "ViTForImageClassification": "is a classifier of pictures, which is not served",
    "SiglipForImageClassification": "is a classifier of pictures, which is not served",
    "CLIPVisionModelWithProjection": "has no text half and no tokenizer; load the whole model",
    "SiglipVisionModel": "has no text half and no tokenizer; load the whole model",
    "NomicVisionModel": r"\(nomic-embed-vision\), which is not served",
}


@pytest.mark.parametrize("architecture", NO_TEXTS)
def test_models_of_pictures_alone_are_refused_by_name(architecture: str, tmp_path: Path) -> None:
    save(tmp_path, "clip")
    model_type = "nomic_bert" if architecture.startswith("Nomic") else "vit"
    change_config(tmp_path, architectures=[architecture], model_type=model_type)
    with pytest.raises(CheckpointError, match=NO_TEXTS[architecture]):
        opened(tmp_path)


def test_jinas_clip_names_the_code_that_it_needs(tmp_path: Path) -> None:
    save(tmp_path, "clip")
    code = {"AutoModel": "jinaai/jina-clip-implementation--modeling_clip.JinaCLIPModel"}
    change_config(tmp_path, architectures=["JinaCLIPModel"], model_type="jina_clip", auto_map=code)
    with pytest.raises(CheckpointError, match=r"code of its own for it .*JinaCLIPModel"):
        opened(tmp_path)
