"""Tiny random GLiClass checkpoints in the hub's layout, what gliclass answers for them, and its formula.

`python -m tests.models.tiny_gliclass`, in an environment with gliclass 0.1.21, stores its answers in gliclass.json. The
weights are made by numpy's frozen generator, so that they are the same there and here. The formula, with transformers'
encoder, answers for other texts and labels.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

from tests.models.tiny_gliner import filled

ANSWERS = Path(__file__).with_name("gliclass.json")
Weights = dict[str, Tensor]
LABEL, SEP, EXAMPLE = "<<LABEL>>", "<<SEP>>", "<<EXAMPLE>>"
WORDS = [f"w{number}" for number in range(90)]
TINY: dict[str, Any] = {
    "vocab_size": 94,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 1,
}
DEBERTA = TINY | {
    "model_type": "deberta-v2",
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "max_position_embeddings": 512,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
MODERN = (
    TINY
    | {"model_type": "modernbert", "local_attention": 8, "max_position_embeddings": 512}
    | {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "cls_token_id": 0,
        "sep_token_id": 2,
    }
)
BERT = TINY | {"model_type": "bert", "max_position_embeddings": 300}
# What each row has beside the defaults of a published checkpoint: its encoder, and the keys of config.json.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "deberta v3, first": (DEBERTA, {}),
    "deberta v3, mean": (DEBERTA, {"pooling_strategy": "avg"}),
    "modernbert, text first": (MODERN, {"prompt_first": False}),
    "bert, labels by their tokens": (BERT, {"class_token_pooling": "average"}),
    "labels by their tokens, text first": (BERT, {"class_token_pooling": "average", "prompt_first": False}),
    "labels by their tokens, without the mark": (BERT, {"class_token_pooling": "average", "embed_class_token": False}),
    "the token behind the mark": (BERT, {"embed_class_token": False}),
    "unit features": (BERT, {"normalize_features": True}),
    "last": (BERT, {"pooling_strategy": "last"}),
    "max": (BERT, {"pooling_strategy": "max"}),
    "text alone, first": (BERT, {"extract_text_features": True}),
    "text alone, mean": (BERT, {"extract_text_features": True, "pooling_strategy": "avg"}),
    "labels by their tokens, up to the text": (BERT, {"extract_text_features": True, "class_token_pooling": "average"}),
    "text alone, text first": (BERT, {"extract_text_features": True, "prompt_first": False}),
    "another activation": (BERT, {"projector_hidden_act": "relu"}),
    "narrow projector": (BERT, {"hidden_size": 16}),
    "weighted dot": (BERT, {"scorer_type": "weighted-dot"}),
    "mlp": (BERT, {"scorer_type": "mlp"}),
    "hopfield": (BERT, {"scorer_type": "hopfield"}),
}
# Texts and the labels of each, which gliclass answered one by one.
TEXTS = [
    " ".join(WORDS[(start * 13 + place * 7) % 90] for place in range(length))
    for start, length in enumerate((9, 40, 1, 0, 23))
]
SETS = [["w3", "w4 w5", "w6"], ["w80"], [f"w{number}" for number in range(12)], ["w7", "w8"], ["w9 w10 w11", "w1"]]


def tokenizer(folder: Path, most: int = 512) -> transformers.PreTrainedTokenizerFast:
    """One token per word, which DeBERTa's marks of words begin; and the marks of GLiClass, added as its training does."""
    vocabulary = {word: place for place, word in enumerate(["[CLS]", "[PAD]", "[SEP]", "[UNK]", *WORDS])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Strip()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 0), ("[SEP]", 2)]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    names = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=most, model_input_names=["input_ids", "attention_mask"], **names
    )
    whole.add_tokens([LABEL, SEP, EXAMPLE])
    whole.save_pretrained(folder)
    return whole


def encoder_of(options: dict[str, Any]) -> Any:
    """A random encoder of transformers."""
    config = transformers.AutoConfig.for_model(**options)
    return transformers.AutoModel.from_config(config).eval()


def save(folder: Path, row: str, **more: Any) -> None:
    """A checkpoint of a row of ROWS. more: further keys of its config."""
    encoder_options, options = ROWS[row]
    own = tokenizer(folder)
    encoder_options = encoder_options | {"vocab_size": len(own)}
    width = options.get("hidden_size", encoder_options["hidden_size"])
    config = {
        "architectures": ["GLiClassModel"],
        "model_type": "GLiClass",
        "architecture_type": "uni-encoder",
        "encoder_config": encoder_options,
        "encoder_model_name": "somebody/encoder",
        "hidden_size": width,
        "vocab_size": len(own),
        "class_token_index": own.convert_tokens_to_ids(LABEL),
        "text_token_index": own.convert_tokens_to_ids(SEP),
        "example_token_index": own.convert_tokens_to_ids(EXAMPLE),
        "problem_type": "multi_label_classification",
        "pooling_strategy": "first",
        "class_token_pooling": "first",
        "scorer_type": "simple",
        "prompt_first": True,
        "embed_class_token": True,
        "extract_text_features": False,
        "normalize_features": False,
        "projector_hidden_act": "gelu",
        "logit_scale_init_value": 2.6592,
        "max_num_classes": 25,
        "dropout": 0.1,
        "dtype": "float32",
    }
    config |= options | more
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    encoder = encoder_of(encoder_options)
    tensors = {f"model.encoder_model.{name}": tensor.clone() for name, tensor in encoder.state_dict().items()}
    tensors |= {f"model.{name}": tensor for name, tensor in _heads(config).items()}
    tensors = filled(tensors, 0) | {"model.logit_scale": torch.tensor(1.7)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _heads(config: dict[str, Any]) -> Weights:
    wide, narrow = config["encoder_config"]["hidden_size"], config["hidden_size"]
    sizes = {}
    for side in ("text", "classes"):
        sizes |= {f"{side}_projector.linear_1": (narrow, wide), f"{side}_projector.linear_2": (wide, narrow)}
    kind = config["scorer_type"]
    mlp = {"scorer.mlp.2": (128, 256), "scorer.mlp.4": (1, 128)}
    if kind == "weighted-dot":
        sizes |= {f"scorer.proj_{side}": (2 * wide, wide) for side in ("text", "label")}
        sizes |= {"scorer.out_mlp.0": (4 * wide, 3 * wide), "scorer.out_mlp.3": (1, 4 * wide)}
    elif kind == "mlp":
        sizes |= {"scorer.mlp.0": (256, 2 * wide), **mlp}
    elif kind == "hopfield":
        sizes |= {"scorer.mlp.0": (256, wide), **mlp}
    tensors: Weights = {}
    for name, size in sizes.items():
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.empty(size), torch.empty(size[0])
    if kind == "hopfield":
        tensors |= {f"scorer.{name}_proj.weight": torch.empty(wide, wide) for name in "qkv"}
    return tensors


def written(config: dict[str, Any], text: str, labels: Sequence[str]) -> str:
    """A text and its labels as the model was trained with them."""
    prompt = "".join(f"{LABEL}{label}" for label in labels) + SEP
    return prompt + text if config["prompt_first"] else text + prompt


@torch.inference_mode()
def logits(folder: Path, text: str, labels: Sequence[str]) -> Tensor:
    """[labels] of one text, by the formula."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    weights = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    encoder = encoder_of(config["encoder_config"])
    prefix = "encoder_model."
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    own = transformers.AutoTokenizer.from_pretrained(folder)
    ids = own(written(config, text, labels), return_tensors="pt")["input_ids"]
    hidden, ids = encoder(ids).last_hidden_state[0], ids[0]
    marks = (ids == config["class_token_index"]).nonzero()[:, 0].tolist()
    text_start = int((ids == config["text_token_index"]).nonzero()[0, 0])
    behind = not config["embed_class_token"]
    if config["class_token_pooling"] == "average":
        end = text_start if config["extract_text_features"] else len(ids)
        bounds = zip(marks, [*marks[1:], end], strict=True)
        rows = torch.stack([hidden[start + behind : stop].mean(0) for start, stop in bounds])
    else:
        rows = hidden[[mark + behind for mark in marks]]
    read = hidden[text_start:] if config["extract_text_features"] else hidden
    pooled = {
        "first": read[0],
        "last": read[-1],
        "max": read.amax(0),
        # Over as many tokens as the whole prompt has.
        "avg": read.sum(0) / len(hidden),
    }[config["pooling_strategy"]]
    pooled, rows = _projected(weights, "text", config, pooled), _projected(weights, "classes", config, rows)
    if config["normalize_features"]:
        pooled, rows = pooled / (pooled.norm() + 1e-8), rows / (rows.norm(dim=-1, keepdim=True) + 1e-8)
    found = _scores(weights, config["scorer_type"], pooled.expand_as(rows), rows)
    return found * weights["logit_scale"] if config["normalize_features"] else found


def _linear(weights: Weights, name: str, values: Tensor) -> Tensor:
    return torch.nn.functional.linear(values, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _projected(weights: Weights, side: str, config: dict[str, Any], values: Tensor) -> Tensor:
    activate = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}[config["projector_hidden_act"]]
    return _linear(
        weights, f"{side}_projector.linear_2", activate(_linear(weights, f"{side}_projector.linear_1", values))
    )


def _scores(weights: Weights, kind: str, text: Tensor, labels: Tensor) -> Tensor:
    if kind == "simple":
        return (text * labels).sum(-1)
    if kind == "weighted-dot":
        ours = _linear(weights, "scorer.proj_text", text).chunk(2, -1)
        theirs = _linear(weights, "scorer.proj_label", labels).chunk(2, -1)
        values = _linear(weights, "scorer.out_mlp.0", torch.cat([ours[0], theirs[0], ours[1] * theirs[1]], -1))
        return _linear(weights, "scorer.out_mlp.3", torch.relu(values))[:, 0]
    if kind == "hopfield":
        heat = 4 * (_linear(weights, "scorer.q_proj", labels) * _linear(weights, "scorer.k_proj", text)).sum(-1)
        values = labels + heat.softmax(0)[:, None] * _linear(weights, "scorer.v_proj", text)
    else:
        values = torch.cat([text, labels], -1)
    for place in (0, 2):
        values = torch.relu(_linear(weights, f"scorer.mlp.{place}", values))
    return _linear(weights, "scorer.mlp.4", values)[:, 0]


def record() -> None:
    """Write what gliclass answers to each text alone: logits, probabilities of each label, and the likeliest by a softmax."""
    found = {}
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), row)
            found[row] = _answers(Path(folder))
            formula = [logits(Path(folder), text, labels) for text, labels in zip(TEXTS, SETS, strict=True)]
        theirs = torch.tensor([logit for answer in found[row] for logit in answer["logits"]])
        sys.stdout.write(f"{row:45} {(torch.cat(formula) - theirs).abs().max() / theirs.abs().max():.1g}\n")
    ANSWERS.write_text(json.dumps(found, separators=(",", ":")) + "\n")


def _answers(folder: Path) -> list[dict[str, Any]]:
    import gliclass
    from gliclass.pipeline import ZeroShotClassificationPipeline

    model = gliclass.GLiClassModel.from_pretrained(folder).eval()
    own = transformers.AutoTokenizer.from_pretrained(folder)
    pipe = ZeroShotClassificationPipeline(model, own, device="cpu", progress_bar=False)
    found = []
    for text, labels in zip(TEXTS, SETS, strict=True):
        inputs = pipe.pipe.prepare_inputs([text], labels, True)
        with torch.inference_mode():
            raw = model(**inputs, max_num_classes=len(labels)).logits[0].tolist()
        (several,) = pipe([text], labels, threshold=0.0, classification_type="multi-label")
        ((best,),) = pipe([text], labels, classification_type="single-label")
        assert [one["label"] for one in several] == labels
        multi = [one["score"] for one in several]
        found.append({"logits": raw, "multi": multi, "best": [best["label"], best["score"]]})
    return found


if __name__ == "__main__":
    record()
