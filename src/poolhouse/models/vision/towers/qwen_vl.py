"""Qwen-VL's towers (Qwen2-VL, Qwen2.5-VL, Qwen3-VL): a packed Transformer over patches, then mergers of cells.

    pixels ─► patches (+ positions, Qwen3-VL) ─► blocks, turned by row and column ─► merger ─► a row per cell
                                                    └─► mergers behind chosen blocks (deepstack, Qwen3-VL)

A cell is 2 x 2 patches. Its patches lie together, cells lie row by row. Most blocks of Qwen2.5-VL look at windows of
cells. The cells of a window are brought together before the first block, so that windows are sequences like pictures:

    cells   0 1 │ 2        windows of 2 x 2        order    0 1 3 4 │ 2 5 │ 6 7 │ 8
            3 4 │ 5
            ────┼──
            6 7 │ 8
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.layers.feed_forward import FeedForward
from poolhouse.layers.linear import Linear
from poolhouse.layers.norm import NormKind
from poolhouse.layers.positions import RopeSpec, axial_table
from poolhouse.models.backbone import PictureRows
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.native.families._config import activation, refuse
from poolhouse.models.native.spec import LayerSpec, TransformerSpec
from poolhouse.models.native.transformer import blocks, linear_of, norm_of
from poolhouse.models.native.weights import Layout, Source, Weights
from poolhouse.models.vision.picture_model import TowerFamily
from poolhouse.packing.pack import PackedPictures, Segments
from poolhouse.packing.tokens import Picture


class QwenTower:
    """Packed pictures in, a row per cell out; safe from several threads.

    config: the tower's part of config.json, completed. spec: of its blocks.

    Raises:
        CheckpointError: tensors that do not fit the config.
    """

    def __init__(self, config: Config, spec: TransformerSpec, weights: Weights) -> None:
        kernel = (weights / "patches").weight
        # Both frames of a picture are equal, so their kernels are added up.
        self.patches = Linear(
            kernel.sum(2, dtype=torch.float32).to(kernel.dtype).flatten(1), (weights / "patches").bias
        )
        self.patches.prepack()
        self.dtype = kernel.dtype
        self.positions = _square((weights / "positions").weight) if weights / "positions" else None
        assert spec.layers[0].rope is not None
        self.rope = spec.layers[0].rope
        self.blocks = blocks(spec, weights)
        self.merger = Merger(weights / "merger", spec)
        # By the number of the block that they stand behind.
        self.deep = {
            block: Merger(weights / f"deep.{number}", spec)
            for number, block in enumerate(config.get("deepstack_visual_indexes", ()))
        }
        if weights / f"deep.{len(self.deep)}":
            raise CheckpointError("The checkpoint has more mergers than deepstack_visual_indexes of config.json names.")
        self.merge: int = config["spatial_merge_size"]
        # Cells on each side of a window, 0 for no windows; blocks that see all of a picture.
        self.window: int = config.get("window_size", 0) // (self.merge * config["patch_size"])
        self.whole = frozenset(config.get("fullatt_block_indexes", ()))
        self._rows = self.blocks[0].attention.qkv.padded_rows

    def __call__(self, pictures: PackedPictures) -> PictureRows:
        """See `Tower`; pixels: [patches, channels * patch * patch], one frame of each picture."""
        pixels, device = pictures.pixels.to(self.dtype), pictures.pixels.device
        grids = [picture.grid for picture in pictures.pictures if picture.grid is not None]
        placed = [_place(grid, self.merge, self.window, device) for grid in grids]
        whole = windows = Segments([len(own.patches) for own in placed], device)
        order = None
        if self.window:
            cell = self.merge**2
            order = torch.cat([own.order + start // cell for own, start in zip(placed, whole.starts, strict=True)])
            pixels = pixels.view(len(order), -1)[order].view(pixels.shape)
            windows = Segments([patches for own in placed for patches in own.windows], device)
        x = self.patches(pixels)
        if self.positions is not None:
            by_grid = dict(zip(grids, placed, strict=True))
            stretched = {grid: self._positions(grid, own) for grid, own in by_grid.items()}
            x = x + torch.cat([stretched[grid] for grid in grids])
        total = len(x)
        patches = torch.cat([own.patches for own in placed])
        if missing := self._rows(total) - total:
            # As in the text Transformer: rows that are not read.
            x, patches = F.pad(x, (0, 0, 0, missing)), F.pad(patches, (0, 0, 0, missing))
        ropes = {self.rope: axial_table(self.rope, patches)}
        deep: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x = block(x, whole if number in self.whole else windows, ropes, None)
            if number in self.deep:
                deep.append(self.deep[number](x[:total]))
        rows = self.merger(x[:total])
        return PictureRows(rows if order is None else torch.empty_like(rows).index_copy_(0, order, rows), tuple(deep))

    def _positions(self, grid: tuple[int, int], own: _Places) -> Tensor:
        """[patches, width], the square of positions stretched over a grid."""
        assert self.positions is not None
        stretched = F.interpolate(self.positions, grid, mode="bilinear", align_corners=True)
        down, across = own.patches.unbind(-1)
        return stretched.permute(0, 2, 3, 1).flatten(0, 2)[down * grid[1] + across].to(self.dtype)


class Merger:
    """The patches of a cell, side by side, through a feed-forward; normed before or after they are joined.

    The width of the norm says which.
    """

    def __init__(self, weights: Weights, spec: TransformerSpec) -> None:
        self.norm = norm_of(weights / "norm", spec)
        self.norm_width = len((weights / "norm").weight)
        self.feed_forward = FeedForward(linear_of(weights / "up"), linear_of(weights / "down"), "gelu", gated=False)

    def __call__(self, x: Tensor) -> Tensor:
        """[patches, width] -> [cells, width of the text model]."""
        assert self.norm is not None
        x = self.norm(x.view(-1, self.norm_width))
        return self.feed_forward(x.view(-1, self.feed_forward.up.in_features))


class _Places(NamedTuple):
    """Where the patches of one picture lie, in the order in which the tower has them.

    patches: [patches, 2], row and column. order: [cells], which cell comes when. windows: patches of each window.
    """

    patches: Tensor
    order: Tensor
    windows: tuple[int, ...]


# A page takes a quarter of a MiB here.
@lru_cache(maxsize=64)
def _place(grid: tuple[int, int], merge: int, window: int, device: torch.device) -> _Places:
    """window: cells on each side, 0 for none; windows at the borders are what remains. Large windows come first."""
    rows, columns = grid
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    cells = torch.stack((down, across), -1).view(rows // merge, merge, columns // merge, merge, 2)
    cells = cells.transpose(1, 2).reshape(-1, merge * merge, 2)
    if not window:
        return _Places(cells.flatten(0, 1).to(device), torch.arange(len(cells), device=device), (rows * columns,))
    side = merge * window
    owners = cells[:, 0, 0] // side * -(-columns // side) + cells[:, 0, 1] // side
    counts = owners.bincount()
    # Windows of one size lie together, so that one call of the kernel serves them.
    by_size = counts.argsort(descending=True, stable=True)
    order = by_size.argsort()[owners].argsort(stable=True)
    windows = tuple((counts[by_size] * merge * merge).tolist())
    return _Places(cells[order].flatten(0, 1).to(device), order.to(device), windows)


def _square(table: Tensor) -> Tensor:
    """[1, width, side, side] of a table [side * side, width], in float32, in which the reference interpolates it."""
    side = math.isqrt(len(table))
    if side * side != len(table):
        raise CheckpointError(f"The tower's table of {len(table)} positions is no square.")
    return table.float().view(1, side, side, -1).permute(0, 3, 1, 2)


def _part(defaults: Mapping[str, object]) -> Callable[[Config], Config]:
    """The tower's part of config.json over the defaults of transformers' class."""
    return lambda config: {**defaults, **config.get("vision_config", {})}


def _blocks(config: Config, width: str, norm: NormKind = "layer", gated: bool = False) -> TransformerSpec:
    """What the three towers share. width: the key of the hidden size."""
    turns = config.get("rope_parameters") or {}
    refuse(turns, {"rope_type": ("axial", "default")})
    head_dim = config[width] // config["num_heads"]
    rope = RopeSpec(head_dim, float(turns.get("rope_theta", 10000.0)))
    return TransformerSpec(
        heads=config["num_heads"],
        head_dim=head_dim,
        layers=(LayerSpec(rope=rope),) * config["depth"],
        activation=activation(config, "hidden_act", config["hidden_act"]),
        gated=gated,
        norm=norm,
        norm_eps=1e-6,
    )


def blank(config: Config) -> Picture:
    """A picture of one cell."""
    merge, features = config["spatial_merge_size"], config["in_channels"] * config["patch_size"] ** 2
    return Picture(
        pixels=np.zeros((merge * merge, features), np.float32),
        ids=np.zeros(1, np.int64),
        filled=np.ones(1, np.bool_),
        grid=(merge, merge),
        extent=(1, 1),
    )


_NAMES: dict[str, Source] = {
    "patches": "patch_embed.proj",
    "layers.*.attn_in": "blocks.*.norm1",
    "layers.*.attn.qkv": "blocks.*.attn.qkv",
    "layers.*.attn.out": "blocks.*.attn.proj",
    "layers.*.ffn_in": "blocks.*.norm2",
}
_MERGER: dict[str, Source] = {
    "merger.norm": "merger.ln_q",
    "merger.up": "merger.mlp.0",
    "merger.down": "merger.mlp.2",
}

_SHARED = {"num_heads": 16, "in_channels": 3, "spatial_merge_size": 2}

QWEN2_VL_TOWER = TowerFamily(
    config=_part(_SHARED | {"depth": 32, "embed_dim": 1280, "hidden_act": "quick_gelu", "patch_size": 14}),
    spec=partial(_blocks, width="embed_dim"),
    layouts=(
        Layout(
            _NAMES | _MERGER | {"layers.*.ffn.up": "blocks.*.mlp.fc1", "layers.*.ffn.down": "blocks.*.mlp.fc2"},
            anchor="patches",
        ),
    ),
    build=QwenTower,
    sample=blank,
)
QWEN2_5_VL_TOWER = TowerFamily(
    config=_part(
        _SHARED
        | {"depth": 32, "hidden_size": 3584, "hidden_act": "silu", "patch_size": 14}
        | {"window_size": 112, "fullatt_block_indexes": (7, 15, 23, 31)}
    ),
    spec=partial(_blocks, width="hidden_size", norm="rms", gated=True),
    layouts=(
        Layout(
            _NAMES
            | _MERGER
            | {
                "layers.*.ffn.up": ("blocks.*.mlp.gate_proj", "blocks.*.mlp.up_proj"),
                "layers.*.ffn.down": "blocks.*.mlp.down_proj",
            },
            anchor="patches",
        ),
    ),
    build=QwenTower,
    sample=blank,
)
QWEN3_VL_TOWER = TowerFamily(
    config=_part(
        _SHARED
        | {"depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "patch_size": 16}
        | {"deepstack_visual_indexes": (8, 16, 24)}
    ),
    spec=partial(_blocks, width="hidden_size"),
    layouts=(
        Layout(
            _NAMES
            | {
                "positions": "pos_embed",
                "layers.*.ffn.up": "blocks.*.mlp.linear_fc1",
                "layers.*.ffn.down": "blocks.*.mlp.linear_fc2",
                "merger.norm": "merger.norm",
                "merger.up": "merger.linear_fc1",
                "merger.down": "merger.linear_fc2",
                # As many as deepstack_visual_indexes names, of all blocks.
                "deep.*.norm": "deepstack_merger_list.*.norm",
                "deep.*.up": "deepstack_merger_list.*.linear_fc1",
                "deep.*.down": "deepstack_merger_list.*.linear_fc2",
            },
            varying=frozenset({"deep.*.norm", "deep.*.up", "deep.*.down"}),
            anchor="patches",
        ),
    ),
    build=QwenTower,
    sample=blank,
)
