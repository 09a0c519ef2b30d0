"""Tiny random checkpoints in each layout of quantised weights, written by the published formulas, and what they mean.

The writers pack bit by bit. That they write what the libraries read was checked once: see `test_quantised.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.parity import change_config

# The parts of a weight by what stands behind the module's name, and the numbers that they mean.
Written = tuple[dict[str, Tensor], Tensor]
_BLOCKS = re.compile(r"(encoder\.layer|(model\.)?layers)\.\d+\.(.+)\.weight")
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Layout:
    """A layout: what config.json says, and how a weight is written."""

    settings: dict[str, Any]
    write: Callable[[Tensor], Written]
    whole: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def words(codes: Tensor, bits: int) -> Tensor:
    """[rows, n] -> int32 [rows, words], the lowest bits first."""
    each = np.unpackbits(codes.numpy().astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    flat = each.reshape(len(codes), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 32)))
    return torch.from_numpy(np.packbits(flat, axis=1, bitorder="little").view("<i4").copy())


def grouped(weight: Tensor, group: int, levels: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(codes from 0 on [out, in], scales [out, groups] that float16 holds, zeros [out, groups])."""
    runs = weight.view(len(weight), -1, group)
    if symmetric:
        scales = (2 * runs.abs().amax(-1) / levels).half().float()
        zeros = torch.full_like(scales, (levels + 1) // 2)
    else:
        low, high = runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)
        scales = ((high - low) / levels).half().float()
        zeros = (-low / scales).round().clamp(0, levels)
    codes = (runs / scales[..., None] + zeros[..., None]).round().clamp(0, levels)
    return codes.flatten(1), scales, zeros


def meant(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    group = codes.shape[1] // scales.shape[1]
    return (codes - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)


def compressed(
    bits: int = 8, strategy: str = "channel", group: int = 0, symmetric: bool = True, packed: bool = False, **more: Any
) -> Layout:
    """Whole numbers of compressed-tensors."""

    def write(weight: Tensor) -> Written:
        middle, levels = 2 ** (bits - 1), 2**bits - 1
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(7))
        weight = weight[:, order] if "actorder" in more else weight
        if strategy == "tensor":
            codes, scales, zeros = grouped(weight.reshape(1, -1), weight.numel(), levels, symmetric)
            codes = codes.view(weight.shape)
            numbers = (codes - zeros) * scales
        else:
            codes, scales, zeros = grouped(weight, group or weight.shape[1], levels, symmetric)
            numbers = meant(codes, scales, zeros)
        parts = {"weight_scale": scales if strategy != "tensor" else scales.view(1)}
        if "actorder" in more:
            codes, numbers = codes[:, order.argsort()], numbers[:, order.argsort()]
            parts["weight_g_idx"] = (torch.arange(len(order)) // group).int()[order.argsort()]
        if packed:
            parts |= {"weight_packed": words(codes, bits), "weight_shape": torch.tensor(weight.shape)}
        else:
            parts["weight"] = (codes - middle).to(torch.int8)
        if not symmetric and packed:
            parts["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        elif not symmetric:
            parts["weight_zero_point"] = (zeros - middle).to(torch.int8).view(parts["weight_scale"].shape)
        return parts, numbers

    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, "dynamic": False}
    weights |= {"group_size": group or None} | more
    return Layout(
        of_groups("pack-quantized" if packed else "int-quantized", weights),
        write,
        whole=bits <= 8 and symmetric and strategy in ("channel", "tensor"),
    )


def compressed_fp8(strategy: str, **more: Any) -> Layout:
    """Float8 of compressed-tensors."""

    def write(weight: Tensor) -> Written:
        block = {"tensor": tuple(weight.shape), "channel": (1, weight.shape[1]), "block": (96, 64)}[strategy]
        numbers, scales = in_blocks(weight, *block)
        scale = scales.view(1) if strategy == "tensor" else scales
        return {"weight": numbers, "weight_scale": scale}, out_of_blocks(numbers, scales, *block)

    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True} | more
    return Layout(of_groups("float-quantized", weights), write)


def of_groups(layout: str, weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "version": "0.20.1",
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None} | group},
    }


def in_blocks(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(float8 numbers, a scale for each block)."""
    numbers = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            place = slice(row * rows, (row + 1) * rows), slice(column * columns, (column + 1) * columns)
            scales[row, column] = weight[place].abs().max() / 448
            numbers[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
    return numbers, scales


def out_of_blocks(numbers: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    """What these mean, a number at a time."""
    row, column = (torch.arange(size) // side for size, side in zip(numbers.shape, (rows, columns), strict=True))
    return numbers.float() * scales[row[:, None], column[None, :]]


def fp8(block: int = 0) -> Layout:
    """Method fp8: blocks, or one scale, beside that of activations."""

    def write(weight: Tensor) -> Written:
        sides = (block, block) if block else tuple(weight.shape)
        numbers, scales = in_blocks(weight, *sides)
        name = "weight_scale_inv" if block else "weight_scale"
        parts = {"weight": numbers, name: scales if block else scales.view(())}
        return parts | ({} if block else {"input_scale": torch.ones(1)}), out_of_blocks(numbers, scales, *sides)

    settings: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic" if block else "static"}
    settings |= {"fmt": "e4m3", "weight_block_size": [block, block]} if block else {"ignored_layers": ["lm_head"]}
    return Layout(settings, write)


def awq(group: int) -> Layout:
    def write(weight: Tensor) -> Written:
        codes, scales, zeros = grouped(weight, group if group > 0 else weight.shape[1], 15, False)
        parts = {"qweight": in_awq_order(codes.T), "qzeros": in_awq_order(zeros.T), "scales": scales.T.half()}
        return {name: part.contiguous() for name, part in parts.items()}, meant(codes, scales, zeros)

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Layout(settings | {"modules_to_not_convert": None}, write)


def in_awq_order(codes: Tensor) -> Tensor:
    """[rows, columns] -> [rows, columns / 8]: nibble k of a word holds column AWQ_COLUMNS[k] of its eight."""
    return words(codes.unflatten(1, (-1, 8))[:, :, AWQ_COLUMNS].flatten(1), 4)


def gptq(
    bits: int, group: int, symmetric: bool = True, order: bool = False, version: int = 1, with_order: bool = True
) -> Layout:
    def write(weight: Tensor) -> Written:
        size = group if group > 0 else weight.shape[1]
        chosen = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(7))
        chosen = chosen if order else torch.arange(weight.shape[1])
        codes, scales, zeros = grouped(weight[:, chosen], size, 2**bits - 1, symmetric)
        numbers, in_place, group_of = torch.empty_like(weight), torch.empty_like(codes), torch.empty(len(chosen)).int()
        numbers[:, chosen], in_place[:, chosen] = meant(codes, scales, zeros), codes
        group_of[chosen] = (torch.arange(len(chosen)) // size).int()
        parts = {
            "qweight": words(in_place, bits).T,
            "qzeros": before(zeros.T, bits) if version == 1 else words(zeros.T, bits),
            "scales": scales.T.half(),
            "g_idx": group_of,
        }
        kept = {name: part.contiguous() for name, part in parts.items() if with_order or name != "g_idx"}
        return kept, numbers

    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": order,
        "sym": symmetric,
    }
    settings |= {"checkpoint_format": "gptq" if version == 1 else "gptq_v2", "damp_percent": 0.01, "meta": {"x": 1}}
    return Layout(settings, write)


def before(zeros: Tensor, bits: int) -> Tensor:
    """Zeros as GPTQ's first format stores them: one less, where 0 borrows from the number behind it, but not with 3 bits."""
    if bits == 3:
        return words((zeros - 1) % 8, bits)
    ones = np.array(sum(1 << place for place in range(0, 32, bits)), np.uint32)
    return torch.from_numpy((words(zeros, bits).numpy().view(np.uint32) - ones).view(np.int32))


NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(sign * number for sign in (1, -1) for number in (0.0, 0.0052083334, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25))


def bitsandbytes_4bit(
    kind: str = "nf4", block: int = 64, nested: bool = False, storage: torch.dtype = torch.uint8
) -> Layout:
    table = torch.tensor(NF4 if kind == "nf4" else FP4)

    def write(weight: Tensor) -> Written:
        flat = weight.flatten()
        blocks = -(-len(flat) // block)
        runs = torch.nn.functional.pad(flat, (0, blocks * block - len(flat))).view(blocks, block)
        largest = runs.abs().amax(1)
        state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
        parts = {"weight.quant_map": table}
        if nested:
            offset = float(largest.mean())
            means, around = torch.linspace(-1, 1, 256), largest - offset
            outer = torch.stack([run.abs().max() for run in around.split(256)])
            spread = outer.repeat_interleave(256)[:blocks]
            chosen = ((around / spread)[:, None] - means).abs().argmin(1)
            largest = means[chosen] * spread + offset
            parts |= {"weight.absmax": chosen.to(torch.uint8), "weight.nested_absmax": outer}
            parts["weight.nested_quant_map"] = means
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            parts["weight.absmax"] = largest
        codes = ((runs / largest[:, None])[..., None] - table).abs().argmin(-1)
        numbers = (table[codes] * largest[:, None]).flatten()[: len(flat)].view(weight.shape)
        nibbles = codes.flatten()[: len(flat)].view(-1, 2)
        octets = (nibbles[:, 0] * 16 + nibbles[:, 1]).to(torch.uint8)
        text = json.dumps(state).encode()
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        return parts | {"weight": octets.view(storage)[:, None]}, numbers

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    settings |= {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested, "llm_int8_threshold": 6.0}
    settings |= {"bnb_4bit_quant_storage": str(storage).removeprefix("torch."), "bnb_4bit_compute_dtype": "float32"}
    return Layout(settings, write)


def bitsandbytes_8bit() -> Layout:
    def write(weight: Tensor) -> Written:
        largest = weight.abs().amax(1)
        numbers = (weight * 127 / largest[:, None]).round().to(torch.int8)
        parts = {"weight": numbers, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return parts, numbers * (largest / 127)[:, None]

    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    settings |= {"_load_in_8bit": True, "llm_int8_threshold": 6.0, "bnb_4bit_quant_type": "fp4"}
    return Layout(settings, write, whole=True)


LAYOUTS: dict[str, Layout] = {
    "int8 per channel": compressed(),
    "int8 per tensor": compressed(strategy="tensor"),
    "int8 per channel, asymmetric": compressed(symmetric=False),
    "int8 in groups of 32": compressed(strategy="group", group=32),
    "fp8 per channel": compressed_fp8("channel"),
    "fp8 per tensor": compressed_fp8("tensor"),
    "fp8 in blocks": compressed_fp8("block", block_structure=[96, 64]),
    "packed 4 bit, groups of 32": compressed(4, "group", 32, packed=True),
    "packed 4 bit, groups of 128, asymmetric": compressed(4, "group", 128, symmetric=False, packed=True),
    "packed 4 bit per channel": compressed(4, packed=True),
    "packed 3 bit, groups of 32, asymmetric": compressed(3, "group", 32, symmetric=False, packed=True),
    "packed 8 bit per channel": compressed(8, packed=True),
    "packed 4 bit, act order": compressed(4, "group", 32, symmetric=False, packed=True, actorder="group"),
    "awq, groups of 32": awq(32),
    "awq, groups of 128": awq(128),
    "awq, one group": awq(-1),
    "gptq 4 bit, groups of 32": gptq(4, 32),
    "gptq 4 bit, groups of 128, asymmetric": gptq(4, 128, symmetric=False),
    "gptq 4 bit, act order": gptq(4, 32, symmetric=False, order=True),
    "gptq 4 bit, one group, without g_idx": gptq(4, -1, with_order=False),
    "gptq_v2 4 bit": gptq(4, 32, symmetric=False, version=2),
    "gptq 8 bit": gptq(8, 128),
    "gptq 3 bit": gptq(3, 32, symmetric=False),
    "gptq 3 bit, act order": gptq(3, 128, order=True),
    "gptq 2 bit": gptq(2, 32),
    "bitsandbytes nf4": bitsandbytes_4bit(),
    "bitsandbytes nf4, double": bitsandbytes_4bit(nested=True),
    "bitsandbytes fp4": bitsandbytes_4bit("fp4"),
    "bitsandbytes fp4, blocks of 128, stored as bfloat16": bitsandbytes_4bit("fp4", 128, storage=torch.bfloat16),
    "bitsandbytes int8": bitsandbytes_8bit(),
    "fp8, blocks of 128": fp8(128),
    "fp8, one scale": fp8(),
}


def quantise(plain: Path, folder: Path, layout: Layout, skip: str = "-") -> None:
    """Copy a checkpoint with its products quantised, and write into the first one what these mean.

    skip: leave modules as they are whose names hold this.
    """
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not _BLOCKS.fullmatch(name) or tensor.dim() != 2 or skip in name:
            stored[name] = tensor
            continue
        parts, tensors[name] = layout.write(tensor)
        stored |= {f"{name.removesuffix('weight')}{part}": one.contiguous() for part, one in parts.items()}
    save_file({name: tensor.clone() for name, tensor in stored.items()}, folder / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, plain / "model.safetensors")
    change_config(folder, quantization_config=layout.settings)
