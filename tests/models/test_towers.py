"""Vision towers against transformers' own, on tiny random ones: packed as alone, at any grid."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.models.backbone import PictureRows
from poolhouse.models.native.weights import Weights, claim, find_layout, unclaimed
from poolhouse.models.vision.picture_model import TowerFamily
from poolhouse.models.vision.towers.qwen_vl import QWEN2_5_VL_TOWER, QWEN2_VL_TOWER, QWEN3_VL_TOWER, QwenTower
from poolhouse.packing.pack import PackedPictures
from poolhouse.packing.tokens import Picture, Pictures, Tokens

CPU = torch.device("cpu")
# Ragged, two of them equal, one of a single cell, some larger than a table of 8 x 8 positions, odd windows at borders.
GRIDS = ((4, 6), (2, 2), (10, 14), (4, 6), (8, 2), (6, 18))


@dataclass(frozen=True)
class Kind:
    family: TowerFamily
    model: str
    config: str
    options: dict[str, Any]


BLOCKS = {"num_heads": 4, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
KINDS = {
    "qwen2-vl": Kind(
        QWEN2_VL_TOWER,
        "qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        "qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig",
        BLOCKS | {"depth": 3, "embed_dim": 32, "hidden_size": 24, "mlp_ratio": 2},
    ),
    "qwen2.5-vl": Kind(
        QWEN2_5_VL_TOWER,
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        "qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig",
        BLOCKS
        | {"depth": 4, "hidden_size": 32, "intermediate_size": 44, "out_hidden_size": 24}
        | {"window_size": 16, "fullatt_block_indexes": [1, 3]},
    ),
    "qwen3-vl": Kind(
        QWEN3_VL_TOWER,
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
        "qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig",
        BLOCKS
        | {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24}
        | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
    ),
}


def reference_of(kind: Kind) -> tuple[dict[str, Any], Any]:
    """The config as its file would have it, and transformers' tower."""
    torch.manual_seed(0)
    package = transformers.models
    module, config_class = _named(package, kind.config)(**kind.options), _named(package, kind.model)
    made = config_class(module).eval()
    for name, parameter in made.named_parameters():
        centre = float("norm" in name or "ln_q" in name) * float(name.endswith("weight"))
        torch.nn.init.normal_(parameter, mean=centre, std=0.2)
    return {"vision_config": module.to_dict()}, made


def tower_of(
    kind: Kind,
    config: dict[str, Any],
    state: dict[str, Tensor],
    prefix: str = "model.visual.",
    dtype: Any = torch.float32,
) -> QwenTower:
    part = kind.family.config(config)
    spec = kind.family.spec(part)
    tensors = {prefix + name: tensor for name, tensor in state.items()} | {"lm_head.weight": torch.zeros(1)}
    found = find_layout(kind.family.layouts, tensors)
    assert found is not None
    layout, found_prefix = found
    assert found_prefix == prefix
    claimed = claim(layout, prefix, spec, tensors, dtype, CPU)
    assert unclaimed(claimed.left, prefix, kind.family.aside) == ([], ["lm_head.weight"])
    tower = kind.family.build(part, spec, Weights(claimed.tensors))
    assert isinstance(tower, QwenTower)
    assert len(run(tower, [kind.family.sample(part)])[0]) == 1
    return tower


def _named(package: Any, path: str) -> Any:
    for name in path.split("."):
        package = getattr(package, name)
    return package


def picture(grid: tuple[int, int], seed: int) -> Picture:
    """One frame of noise: 4 x 4 pixels of three colours in each patch."""
    pixels = np.random.default_rng(seed).normal(size=(grid[0] * grid[1], 48)).astype(np.float32)
    cells = len(pixels) // 4
    return Picture(pixels, ids=np.zeros(cells, np.int64), filled=np.ones(cells, bool), grid=grid)


PICTURES = [picture(grid, seed) for seed, grid in enumerate(GRIDS)]


def packed(pictures: list[Picture]) -> PackedPictures:
    prompts = [Tokens(one.ids, pictures=Pictures((one,), one.filled)) for one in pictures]
    pack = PackedPictures.of(prompts, CPU)
    assert pack is not None
    return pack


def expected(reference: Any, pictures: list[Picture]) -> tuple[Tensor, ...]:
    """The merged rows and those of deepstack, by transformers: each patch has its frame twice."""
    frames = [np.repeat(one.pixels.reshape(-1, 3, 1, 16), 2, axis=2).reshape(-1, 96) for one in pictures]
    grids = torch.tensor([(1, *one.grid) for one in pictures if one.grid])
    with torch.inference_mode():
        answer = reference(torch.from_numpy(np.concatenate(frames)).to(reference.dtype), grid_thw=grids)
    return (answer.pooler_output, *getattr(answer, "deepstack_features", ()))


def run(tower: QwenTower, pictures: list[Picture]) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        answer: PictureRows = tower(packed(pictures))
    return (answer.rows, *answer.deep)


def difference(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """The largest, relative to the largest number of the same rows."""
    assert [rows.shape for rows in ours] == [rows.shape for rows in theirs]
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", "vlm.model.visual.", "base_model.model.visual."])
def test_rows_are_those_of_transformers(kind: Kind, prefix: str) -> None:
    config, reference = reference_of(kind)
    tower = tower_of(kind, config, reference.state_dict(), prefix)
    assert difference(run(tower, PICTURES), expected(reference, PICTURES)) < 1e-5


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_pictures_in_a_pack_are_as_alone(kind: Kind) -> None:
    config, reference = reference_of(kind)
    tower = tower_of(kind, config, reference.state_dict())
    alone = [run(tower, [one]) for one in PICTURES]
    together = tuple(torch.cat(rows) for rows in zip(*alone, strict=True))
    assert difference(run(tower, PICTURES), together) < 1e-5
    assert (
        difference(run(tower, PICTURES[::-1]), tuple(torch.cat(rows) for rows in zip(*alone[::-1], strict=True))) < 1e-5
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_as_near_as_those_of_transformers(kind: Kind, dtype: torch.dtype) -> None:
    config, reference = reference_of(kind)
    exact = expected(reference, PICTURES)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    theirs = difference(expected(reference.to(dtype), PICTURES), exact)
    ours = difference(run(tower_of(kind, config, state, dtype=dtype), PICTURES), exact)
    # Rounding errors of one size; which of the two is smaller is chance.
    assert ours < 2 * theirs


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_several_threads_share_a_tower(kind: Kind) -> None:
    config, reference = reference_of(kind)
    tower = tower_of(kind, config, reference.state_dict())
    alone = [run(tower, [one]) for one in PICTURES]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: run(tower, [one]), PICTURES * 4))
    assert all(difference(answer, alone[number % len(alone)]) == 0 for number, answer in enumerate(answers))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_config_as_short_as_old_files_have_it_means_the_same(kind: Kind) -> None:
    config, reference = reference_of(kind)
    short = {name: value for name, value in config["vision_config"].items() if name in kind.options}
    tower = tower_of(kind, {"vision_config": short}, reference.state_dict())
    assert difference(run(tower, PICTURES), expected(reference, PICTURES)) < 1e-5


def test_defaults_are_those_of_transformers() -> None:
    for kind in KINDS.values():
        default = _named(transformers.models, kind.config)()
        part = kind.family.config({})
        assert {name: getattr(default, name) for name in part} == {
            name: list(value) if isinstance(value, tuple) and isinstance(getattr(default, name), list) else value
            for name, value in part.items()
        }


def test_deepstack_mergers_and_their_blocks_must_be_as_many() -> None:
    kind = KINDS["qwen3-vl"]
    config, reference = reference_of(kind)
    for blocks, message in (([0, 1, 2], "deep.2.norm"), ([0], "more mergers")):
        config["vision_config"]["deepstack_visual_indexes"] = blocks
        with pytest.raises(CheckpointError, match=message):
            tower_of(kind, config, reference.state_dict())


def test_a_table_of_positions_must_be_square() -> None:
    kind = KINDS["qwen3-vl"]
    config, reference = reference_of(kind)
    state = reference.state_dict() | {"pos_embed.weight": torch.zeros(60, 32)}
    with pytest.raises(CheckpointError, match="60 positions is no square"):
        tower_of(kind, config, state)
