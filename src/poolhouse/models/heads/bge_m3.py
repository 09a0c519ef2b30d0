"""BGE-M3's two further answers from the hidden states that its dense vector comes from: sparse and multi-vector.

Source: Chen et al. 2024, BGE M3-Embedding (arXiv 2402.03216), and its authors' FlagEmbedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.models.files.checkpoint import Config
from poolhouse.params import PoolerConfig
from poolhouse.pooling.pipeline import Pipeline
from poolhouse.pooling.steps import Activation, Dense, Every, Normalize, Probabilities, Truncate, WithoutEnds
from poolhouse.tasks import SparseHead, Task

_SPARSE, _MULTI_VECTOR = "sparse_linear.pt", "colbert_linear.pt"
_RELU = Activation("relu", torch.relu)


def bge_m3_pipelines(
    folder: Folder,
    hidden_size: int,
    vocabulary_size: int,
    config: Config,
    user: PoolerConfig,
    needed: bool,
) -> dict[Task, Pipeline]:
    """`token_embed` (unit vectors, none for BOS) and `token_classify` (a weight per token, none for BOS and EOS).

    folder: where the two layers lie; without them nothing is answered. needed: whether that is an error.

    Raises:
        CheckpointError: one of the two is missing or does not fit.
    """
    present = [name for name in (_SPARSE, _MULTI_VECTOR) if folder.has(name)]
    if not present and not needed:
        return {}
    bos, eos = config.get("bos_token_id", 0), config.get("eos_token_id", 2)
    sparse, vectors = (_linear(folder.path / name, hidden_size) for name in (_SPARSE, _MULTI_VECTOR))
    unit = user.use_activation is not False
    special = frozenset((bos, eos, config.get("pad_token_id", 1)))
    return {
        "token_embed": Pipeline(
            (Every(), WithoutEnds(bos, None), vectors, Truncate(), Normalize(unit)), vectors.weight.shape[0]
        ),
        "token_classify": Pipeline(
            (Every(), WithoutEnds(bos, eos), sparse, Probabilities(_RELU, unit)),
            sparse.weight.shape[0],
            SparseHead("token_classify", "token", vocabulary_size, (bos, eos), special),
        ),
    }


def _linear(path: Path, hidden_size: int) -> Dense:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}, which BGE-M3's sparse and multi-vector answers need.")
    try:
        tensors: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        weight, bias = tensors["weight"].float(), tensors.get("bias")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as one linear layer: {error}") from error
    if weight.shape[-1] != hidden_size:
        raise CheckpointError(f"{path} takes {weight.shape[-1]} features, but hidden states have {hidden_size}.")
    return Dense(weight, None if bias is None else bias.float())
