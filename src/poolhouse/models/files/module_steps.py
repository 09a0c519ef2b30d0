"""Module steps: modules of sentence-transformers that have tensors, described first, read when the model is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder, JsonObject
from poolhouse.pooling.splade import SparseEncoder
from poolhouse.pooling.steps import Activation, Dense, Norm, Step, named_activation


@dataclass(frozen=True, slots=True, eq=False)
class StoredStep:
    """A step whose tensors lie in the folder of a module.

    kind: the class of the module: Dense, LayerNorm or SparseAutoEncoder. config: its config.json. count: features that an autoencoder keeps; None: as many as its config says.
    """

    kind: str
    folder: Folder
    config: JsonObject
    count: int | None = None

    def read(self) -> Step:
        """The step with its tensors, in float32.

        Raises:
            CheckpointError: tensors that are missing, or that do not fit together or the config.
        """
        if self.kind == "LayerNorm":
            return _layer_norm(self.folder)
        if self.kind == "Dense":
            return _dense(self.config, self.folder)
        return _autoencoder(self.config, self.folder, self.count)


def read_steps(steps: Iterable[Step | StoredStep]) -> tuple[Step, ...]:
    """The steps, those of modules with their tensors."""
    return tuple(step.read() if isinstance(step, StoredStep) else step for step in steps)


@dataclass(frozen=True, slots=True)
class LayerMean:
    """Token vectors that are a mean of hidden states: of `count` layers, the first of which is `start`.

    folder: of the module that holds the weights of the mean; None for one layer alone.
    """

    start: int
    count: int = 1
    folder: Folder | None = None

    def shares(self) -> tuple[float, ...]:
        """The weight of each layer; their sum is 1.

        Raises:
            CheckpointError: not as many numbers as there are layers.
        """
        if self.folder is None:
            return (1.0,)
        weights = module_tensors(self.folder).get("layer_weights")
        if weights is None or tuple(weights.shape) != (self.count,):
            raise CheckpointError(
                f"{self.folder}: layer_weights must be {self.count} numbers, one from layer {self.start} on."
            )
        return tuple((weights.float() / weights.float().sum()).tolist())


def module_tensors(folder: Folder) -> dict[str, Tensor]:
    """The tensors in a module's folder by name.

    Raises:
        CheckpointError: no weights, or none that can be read.
    """
    safe, pickle = folder.path / "model.safetensors", folder.path / "pytorch_model.bin"
    try:
        if safe.is_file():
            return load_file(safe)
        if pickle.is_file():
            tensors: dict[str, Tensor] = torch.load(pickle, map_location="cpu", weights_only=True)
            return tensors
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{folder}: {pickle.name} cannot be read as plain weights: {error}") from error
    raise CheckpointError(f"{folder} has no weights. Looked for {safe.name} and {pickle.name}.")


def tensor_names(folder: Folder) -> list[str]:
    """The names in model.safetensors; none where there is no such file.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    if not folder.has("model.safetensors"):
        return []
    try:
        with safe_open(folder.path / "model.safetensors", framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read: {error}") from error


def _layer(tensors: Mapping[str, Tensor], folder: Folder, needs_bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a module's only layer, whatever the layer is called, in float32.

    Raises:
        CheckpointError: one that is needed and not there.
    """
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        name = next(
            (name for name in (f"linear.{kind}", f"dense.{kind}", f"norm.{kind}", kind) if name in tensors), None
        )
        if name is not None:
            found[kind] = tensors[name].float()
        elif kind == "weight" or needs_bias:
            raise CheckpointError(f"{folder}: no {kind} among the tensors {sorted(tensors)}.")
    return found["weight"], found.get("bias")


def _dense(config: JsonObject, folder: Folder) -> Dense:
    tensors = module_tensors(folder)
    weight, bias = _layer(tensors, folder, bool(config.get("bias", True)))
    shape = (config.get("out_features"), config.get("in_features"))
    if tuple(weight.shape) != shape:
        raise CheckpointError(f"{folder}: the weight is {list(weight.shape)}, but config.json says {list(shape)}.")
    residual = None
    if config.get("use_residual"):
        residual = tensors.get("residual.weight", torch.empty(0)).float()
    return Dense(weight, bias, _activation(config, folder), residual)


def _activation(config: JsonObject, folder: Folder) -> Activation | None:
    path = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    return named_activation(path, f"{folder / 'config.json'}: activation_function")


def _layer_norm(folder: Folder) -> Norm:
    return Norm(*_layer(module_tensors(folder), folder))


def _autoencoder(config: JsonObject, folder: Folder, count: int | None) -> SparseEncoder:
    """The encoder of a SparseAutoEncoder; its decoder serves training only."""
    tensors = module_tensors(folder)
    # The decoder is the encoder transposed, and a file holds one of the two names.
    tensors.setdefault("encoder.weight", tensors.get("decoder.linear.weight", torch.empty(0)))
    names = ("encoder.weight", "latent_bias", "pre_bias")
    missing = [name for name in names if name not in tensors or not tensors[name].numel()]
    if missing:
        raise CheckpointError(f"{folder}: a SparseAutoEncoder needs {missing}; there is {sorted(tensors)}.")
    weight, bias, shift = (tensors[name].float() for name in names)
    if weight.shape != (len(bias), len(shift)):
        raise CheckpointError(f"{folder}: encoder.weight is {list(weight.shape)}, beside {len(bias)} and {len(shift)}.")
    stated = config.get("k", 8)
    if type(stated) is not int or stated < 1:
        raise CheckpointError(f"{folder}: k must be at least 1, got {stated!r}.")
    return SparseEncoder(weight, bias, shift, count or stated, bool(config.get("normalize", False)))
