"""AWQ and GPTQ: weights of a few bits in words of 32, [in, out], with a scale and a zero per group of inputs and output.

    GPTQ   qweight [in * bits / 32, out]   numbers of a column end to end, the lowest bits first
           qzeros [groups, out * bits / 32], scales [groups, out], g_idx [in]: the group of each input
    AWQ    qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; eight columns lie in a word as _ORDER says

    weight = scale * (number - zero)
    GPTQ's first format stores zero - 1, taken off whole words (a borrow runs on into the next number), with 3 bits off
    each number.
Sources: AutoAWQ 0.2.9 (utils/packing_utils.py), GPTQModel 7.7.0 (utils/model_dequant.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from poolhouse.errors import CheckpointError
from poolhouse.models.files.quantised.stored import (
    SCALES,
    Quantised,
    Settings,
    Stored,
    choice,
    refuse_unknown,
    scaled,
    unpacked,
)

# Where the columns of a word of AWQ lie.
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# How weights were found, by which tool, and how others are to compute with them.
_HOW = frozenset(
    (
        *("bits", "group_size", "quant_method", "backend", "modules_to_not_convert", "meta", "dataset", "tokenizer"),
        *("model_seqlen", "batch_size", "pad_token_id", "max_input_length", "exllama_config", "version", "format"),
    )
)
_AWQ = _HOW | {"zero_point", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "w_bit", "q_group_size"}
_GPTQ = _HOW | {
    *("method", "checkpoint_format", "pack_dtype", "dynamic", "sym", "desc_act", "static_groups", "true_sequential"),
    *("damp_percent", "damp_auto_increment", "act_group_aware", "hyb_act", "mse", "lm_head", "model_name_or_path"),
    *("model_file_base_name", "block_name_to_quantize", "module_name_preceding_first_block", "cache_block_outputs"),
    *("modules_in_block_to_quantize", "use_cuda_fp16", "use_exllama", "disable_exllama", "quantizer"),
}


def awq(settings: Settings) -> Quantised:
    """Weights of AutoAWQ, 4 bits, of its layout "gemm"."""
    refuse_unknown(settings, _AWQ)
    choice(settings, "bits", settings.get("w_bit", 4), (4,))
    choice(settings, "backend", "autoawq", ("autoawq", "auto", "gptqmodel"))
    choice(settings, "version", "gemm", ("gemm",))
    choice(settings, "format", "gemm", ("gemm",))
    size = _group_size(settings, settings.get("q_group_size", 128))

    def weight(stored: Stored) -> Tensor:
        return _awq(stored, size)

    return Quantised("awq", f"4 bits, {_grouped(size)}", ("qweight", "qzeros", "scales"), weight)


def _awq(stored: Stored, size: int | None) -> Tensor:
    words = stored.matrix("qweight", torch.int32)
    inputs, outputs = words.shape[0], words.shape[1] * 8
    scales = stored.matrix("scales", *SCALES)
    groups = _groups(stored, scales, inputs, outputs, size)
    zeros = _in_order(stored.shaped("qzeros", groups, outputs // 8, dtypes=(torch.int32,)))
    return scaled(_in_order(words).T, scales.T, zeros.T).contiguous()


def _in_order(words: Tensor) -> Tensor:
    """[rows, words] -> [rows, words * 8]."""
    eights = unpacked(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    return eights[:, :, _ORDER].flatten(1)


def gptq(settings: Settings) -> Quantised:
    """Weights of GPTQModel, AutoGPTQ and their kin, of 2, 3, 4 or 8 bits."""
    refuse_unknown(settings, _GPTQ)
    bits = choice(settings, "bits", None, (4, 8, 3, 2))
    choice(settings, "pack_dtype", "int32", ("int32",))
    layout = choice(settings, "checkpoint_format", settings.get("format") or "gptq", ("gptq", "gptq_v2"))
    ordered = bool(choice(settings, "desc_act", False, (False, True)))
    # `dynamic` gives some modules other sizes, which their tensors tell.
    size = None if settings.get("dynamic") else _group_size(settings, 128)

    def weight(stored: Stored) -> Tensor:
        if ordered:
            stored.get("g_idx")
        return _gptq(stored, bits, size, first=layout == "gptq")

    # Old files have an order of inputs only where it is not plain.
    parts = ("qweight", "qzeros", "scales", "g_idx")
    return Quantised("gptq", f"{bits} bits, {_grouped(size)}", parts, weight)


def _gptq(stored: Stored, bits: int, size: int | None, first: bool) -> Tensor:
    words = stored.matrix("qweight", torch.int32)
    if size is None and "g_idx" in stored.parts:
        inputs = max(len(stored.get("g_idx")), 1)
        if len(words) * 32 / inputs not in (2, 3, 4, 8):
            raise stored.wrong(f"qweight is {list(words.shape)}, which does not fit {inputs} inputs")
        bits = len(words) * 32 // inputs
    inputs, outputs = len(words) * 32 // bits, words.shape[1]
    scales = stored.matrix("scales", *SCALES)
    groups = _groups(stored, scales, inputs, outputs, size)
    group_of = stored.groups("g_idx", inputs, groups)
    zeros = _zeros(
        stored.shaped("qzeros", groups, -(-outputs * bits // 32), dtypes=(torch.int32,)), bits, outputs, first
    )
    return scaled(unpacked(words.T, bits, inputs), scales.T, zeros.T, group_of)


def _zeros(words: Tensor, bits: int, count: int, first: bool) -> Tensor:
    """[groups, count]. first: whether they are stored as in the first format."""
    if not first:
        return unpacked(words, bits, count)
    if bits == 3:
        return unpacked(words, bits, count).add_(1).bitwise_and_(7)
    ones = sum(1 << place for place in range(0, 32, bits))
    return unpacked((words.long() + ones).to(torch.int32), bits, count)


def _groups(stored: Stored, scales: Tensor, inputs: int, outputs: int, size: int | None) -> int:
    """The number of groups, each of which has a scale per output. size: inputs of one, where config.json says it.

    Raises:
        CheckpointError: scales that do not fit.
    """
    groups, columns = scales.shape
    fits = groups > 0 and inputs % groups == 0 and size in (None, -1 if groups == 1 else None, inputs // groups)
    if columns != outputs or not fits:
        raise stored.wrong(
            f"scales is {list(scales.shape)}, which does not fit {inputs} inputs, {outputs} outputs, and "
            f"{_grouped(size)}"
        )
    return groups


def _group_size(settings: Settings, default: int) -> int:
    size = settings.get("group_size", default)
    if not isinstance(size, int) or isinstance(size, bool) or (size <= 0 and size != -1):
        raise CheckpointError(f"config.json: quantization_config.group_size is {size!r}; a number of inputs, or -1.")
    return size


def _grouped(size: int | None) -> str:
    return "groups of their own sizes" if size is None else "a group" if size == -1 else f"groups of {size}"
