"""ViT: the vision towers of CLIP and SigLIP, a pre-norm Transformer over patches, and what is made of its rows."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from poolhouse.layers.feed_forward import FeedForward
from poolhouse.layers.linear import Linear
from poolhouse.layers.norm import LayerNorm
from poolhouse.models.backbone import PictureRows
from poolhouse.models.native.spec import TransformerSpec
from poolhouse.models.native.transformer import blocks, linear_of, norm_of
from poolhouse.models.native.weights import Weights
from poolhouse.packing.pack import PackedPictures, Segments


class VisionTransformer:
    """Patches of pictures in, what its head makes of their rows out; each picture, or tile of one, is a segment.

    The first product may be stored as the kernel of a convolution, [hidden, channels, rows, columns].
    head: from the normed rows of pictures to one vector of each, or to some.
    resizes: whether the table of positions, a square, is resized to the grid of each picture (SigLIP 2's NaFlex).
    """

    def __init__(
        self, spec: TransformerSpec, weights: Weights, head: Callable[[Tensor, Segments], Tensor], resizes: bool = False
    ) -> None:
        self.patches = Linear((weights / "patches").weight.flatten(1), (weights / "patches").bias)
        self.patches.prepack()
        self.positions = (weights / "positions").weight
        # CLIP puts a token of its own before the patches.
        self.first = (weights / "first").get("weight")
        self.embedding_norm = norm_of(weights / "embedding_norm", spec)
        self.layers = blocks(spec, weights)
        self.final_norm = norm_of(weights / "final_norm", spec)
        self.head = head
        self.resizes = resizes

    def __call__(self, pictures: PackedPictures) -> PictureRows:
        """See `Tower`. pixels: [patches, features of a patch]."""
        x = self.patches(pictures.pixels.to(self.positions.dtype))
        if self.resizes:
            grids = [picture.grid for picture in pictures.pictures if picture.grid is not None]
            segments = Segments([rows * columns for rows, columns in grids], x.device)
            x = x + self._resized(grids)
        else:
            x = x.view(-1, len(self.positions) - (self.first is not None), x.shape[1])
            if self.first is not None:
                x = torch.cat([self.first.expand(len(x), 1, -1), x], 1)
            segments = Segments([x.shape[1]] * len(x), x.device)
            x = (x + self.positions).flatten(0, 1)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        total = len(x)
        if missing := self.layers[0].attention.qkv.padded_rows(total) - total:
            # As in the text Transformer: rows that are not read.
            x = F.pad(x, (0, 0, 0, missing))
        for layer in self.layers:
            x = layer(x, segments, {}, None)
        x = x[:total]
        return PictureRows(self.head(x if self.final_norm is None else self.final_norm(x), segments))

    def _resized(self, grids: list[tuple[int, int]]) -> Tensor:
        """The positions of all patches: [total, hidden]; in float32, as CPUs resize half types without antialias."""
        side = isqrt(len(self.positions))
        table = self.positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = {
            grid: F.interpolate(table, grid, mode="bilinear", align_corners=False, antialias=True)[0].flatten(1).T
            for grid in dict.fromkeys(grids)
        }
        return torch.cat([resized[grid] for grid in grids]).to(self.positions.dtype)


class FirstRow:
    """CLIP's head: the first row of each picture, projected."""

    def __init__(self, spec: TransformerSpec, weights: Weights) -> None:
        self.project = linear_of(weights / "project")

    def __call__(self, x: Tensor, segments: Segments) -> Tensor:
        return self.project(x[segments.starts_tensor])


class Shuffled:
    """Squares of neighbouring rows side by side as one (pixel shuffle), through a norm and two layers; Nvidia's head.

    factor: rows of a square on each side.
    """

    def __init__(self, weights: Weights, factor: int) -> None:
        head = weights / "head"
        self.factor = factor
        self.norm = LayerNorm((head / "norm").weight, (head / "norm").bias, 1e-5)
        self.up, self.down = linear_of(head / "up"), linear_of(head / "down")

    def __call__(self, x: Tensor, segments: Segments) -> Tensor:
        side, factor = isqrt(segments.longest), self.factor
        squares = x.view(len(segments), side // factor, factor, side // factor, factor, -1).transpose(2, 3)
        return self.down(F.gelu(self.up(self.norm(squares.flatten(3).flatten(0, 2)))))


class AttentionPooling:
    """SigLIP's head: a learned query attends to all rows of a picture, and a feed-forward is added to what it sees."""

    def __init__(self, spec: TransformerSpec, weights: Weights) -> None:
        self.heads = spec.heads
        head = weights / "head"
        weight, bias = (head / "qkv").weight, (head / "qkv_bias").weight
        width = weight.shape[1]
        # The query is the same for all pictures, so its product is made once.
        probe = F.linear((head / "probe").weight.view(1, width), weight[:width], bias[:width])
        self.query = probe.view(1, self.heads, 1, -1)
        self.keys_values = Linear(weight[width:], bias[width:])
        self.keys_values.prepack()
        self.out = linear_of(head / "out")
        self.norm = LayerNorm((head / "norm").weight, (head / "norm").bias, spec.norm_eps)
        up, down = linear_of(head / "ffn" / "up"), linear_of(head / "ffn" / "down")
        self.feed_forward = FeedForward(up, down, spec.activation, gated=False)

    def __call__(self, x: Tensor, segments: Segments) -> Tensor:
        keys, values = self.keys_values(x).unflatten(1, (2, self.heads, -1)).unbind(1)
        runs = [(slice(start, start + count * length), count) for start, count, length, *_ in segments.runs]
        seen = torch.cat([self._attended(keys[rows], values[rows], count) for rows, count in runs])
        x = self.out(seen)
        return self.feed_forward.add_to(x, self.norm(x))

    def _attended(self, keys: Tensor, values: Tensor, count: int) -> Tensor:
        """What the query sees of each of `count` pictures of one size: [count, hidden]."""
        keys, values = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in (keys, values))
        query = self.query.expand(count, -1, -1, -1)
        return F.scaled_dot_product_attention(query, keys, values).flatten(1)
