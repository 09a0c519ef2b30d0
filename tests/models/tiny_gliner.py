"""Tiny random GLiNERs and GLiNER2s in the layout of the hub, and what their libraries answer for them.

`python -m tests.models.tiny_gliner`, in an environment with gliner 0.2.29 and gliner2 2.1.0, stores the answers
that gliner.json lacks. The weights are made by numpy's frozen generator, so that they are the same there and here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

ANSWERS = Path(__file__).with_name("gliner.json")
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
MARKS = ("[FLERT]", "<<ENT>>", "<<SEP>>")
MARKS_2 = (
    *("[SEP_STRUCT]", "[SEP_TEXT]", "[P]", "[C]", "[E]", "[R]", "[L]", "[EXAMPLE]", "[OUTPUT]", "[DESCRIPTION]"),
)
LETTERS = [chr(code) for code in range(33, 127)] + list(
    dict.fromkeys("éüñßЖвгдемиإبتثجحدرسعقكلمناوي中国北京東日本語銀行ー")
)
PIECES = ["the", "bank", "of", "eng", "land", "per", "son", "loc", "ation", "new", "york", "rate", "ing", "org"]
WIDTH = 32
_SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
ENCODERS: dict[str, dict[str, Any]] = {
    "deberta": {
        "model_type": "deberta-v2",
        **_SHAPE,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "max_position_embeddings": 64,
        "max_relative_positions": -1,
        "type_vocab_size": 0,
    },
    "bert": {"model_type": "bert", **_SHAPE, "max_position_embeddings": 96},
    "modernbert": {
        "model_type": "modernbert",
        **_SHAPE,
        "num_hidden_layers": 3,
        "max_position_embeddings": 256,
        "local_attention": 8,
        **dict(zip(("pad_token_id", "cls_token_id", "sep_token_id"), range(3), strict=True)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
_CLASSES = {"deberta-v2": "DebertaV2", "bert": "Bert", "modernbert": "ModernBert"}

# What is tried: the encoder, the tokenizer, and keys of gliner_config.json.
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "spans": ("deberta", "unigram", {}),
    "spans without lstm": ("deberta", "unigram", {"num_rnn_layers": 0}),
    "two lstms": ("bert", "wordpiece", {"num_rnn_layers": 2}),
    "names of labels": ("bert", "wordpiece", {"embed_ent_token": False}),
    "mean of tokens": ("modernbert", "unigram", {"subtoken_pooling": "mean"}),
    "largest of tokens": ("bert", "wordpiece", {"subtoken_pooling": "max"}),
    "last token, narrow": ("deberta", "wordpiece", {"subtoken_pooling": "last", "hidden_size": 16}),
    "tokens": ("deberta", "unigram", {"span_mode": "token_level"}),
    "tokens without lstm": ("bert", "wordpiece", {"span_mode": "token_level", "num_rnn_layers": 0}),
}
# The same of GLiNER2, with keys of its config.json.
KINDS_2: dict[str, tuple[str, str, dict[str, Any]]] = {
    "schema": ("deberta", "unigram", {}),
    "schema, mean of tokens": ("modernbert", "wordpiece", {"token_pooling": "mean", "span_head": {"max_width": 3}}),
    "schema, labels among themselves": ("deberta", "unigram", {"counting_layer": "count_lstm_v2"}),
}
TEXTS = [
    "The bank of England raised rates.",
    "New York",
    "x",
    "بنك مصر المركزي في القاهرة",
    "中国银行 in 北京, 東京 and 日本",
    "cafe\u0301 Zu\u0308rich, nin\u0303o",
    "a 😀 b\r\n  c-d_e \t «f»  👧 end",
    "the land of the bank-rate, person_location and the rest of it: one two three four five six",
]
# Its combining marks are words without tokens where accents are stripped; gliner then takes other words for those behind.
ACCENTED = TEXTS[5]
LABELS = ["person", "location", "org.\nname"]
MANY = [f"n{number}" for number in range(200)]


def tokenizer(folder: Path, kind: str, marks: tuple[str, ...] = MARKS) -> int:
    """Saved with the tokens that mark labels; how many tokens it has."""
    if kind == "wordpiece":
        known = dict.fromkeys([*SPECIAL, *PIECES, *LETTERS, *(f"##{part}" for part in (*LETTERS, *PIECES))])
        made = Tokenizer(models.WordPiece({word: place for place, word in enumerate(known)}, unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        known = dict.fromkeys([*SPECIAL, "▁", *(f"▁{part}" for part in PIECES), *LETTERS])
        made = Tokenizer(models.Unigram([(piece, -1 - place / 100) for place, piece in enumerate(known)], unk_id=3))
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = [(token, made.token_to_id(token)) for token in SPECIAL[1:3]]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), SPECIAL, strict=True))
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)
    whole.add_tokens(list(marks), special_tokens=True)
    whole.save_pretrained(folder)
    return len(whole)


def save(folder: Path, kind: str, **changes: Any) -> Path:
    """A checkpoint of one of `KINDS`. changes: further keys of its config."""
    encoder, words, keys = KINDS[kind]
    size = tokenizer(folder, words)
    config: dict[str, Any] = {
        "model_name": encoder,
        "hidden_size": WIDTH,
        "max_width": 4,
        "max_len": 40,
        "num_rnn_layers": 1,
        "vocab_size": size,
        "class_token_index": size - 2,
        "span_mode": "markerV0",
        "embed_ent_token": True,
        "encoder_config": {**ENCODERS[encoder], "vocab_size": size},
        **keys,
        **changes,
    }
    (folder / "gliner_config.json").write_text(json.dumps(config))
    save_file(tensors(config, seed_of(kind)), folder / "model.safetensors")
    return folder


def tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Random tensors under gliner's names, so large that scores are spread over all that is between 0 and 1."""
    own, width = config["encoder_config"], config["hidden_size"]
    found = {f"token_rep_layer.bert_layer.model.{key}": value for key, value in encoder(own).items()}
    if width != own["hidden_size"]:
        found |= _linear("token_rep_layer.projection", width, own["hidden_size"])
    if config["num_rnn_layers"]:
        lstm = torch.nn.LSTM(width, width // 2, config["num_rnn_layers"], bidirectional=True)
        found |= {f"rnn.lstm.{key}": value for key, value in lstm.state_dict().items()}
    if config["span_mode"] == "token_level":
        found |= _linear("scorer.proj_token", 2 * width, width) | _linear("scorer.proj_label", 2 * width, width)
        found |= _linear("scorer.out_mlp.0", 4 * width, 3 * width) | _linear("scorer.out_mlp.3", 3, 4 * width)
    else:
        found |= spans("span_rep_layer.span_rep_layer.", width)
        found |= _linear("prompt_rep_layer.0", 4 * width, width) | _linear("prompt_rep_layer.3", width, 4 * width)
    return filled(found, seed)


def save_2(folder: Path, kind: str, **changes: Any) -> Path:
    """A checkpoint of one of `KINDS_2`. changes: further keys of its config."""
    name, words, keys = KINDS_2[kind]
    size = tokenizer(folder, words, MARKS_2)
    own = {**ENCODERS[name], "vocab_size": size}
    config = {"model_type": "extractor", "model_name": name, "max_width": 4, "architectures": ["SpanExtractorModel"]}
    (folder / "config.json").write_text(json.dumps({**config, **keys, **changes}))
    (folder / "encoder_config").mkdir()
    (folder / "encoder_config" / "config.json").write_text(json.dumps(own))
    found = {f"encoder.{key}": value for key, value in encoder(own).items()} | spans("span_rep.span_rep_layer.", WIDTH)
    for part, rows in (("classifier", 1), ("count_pred", 20)):
        found |= _linear(f"{part}.0", 2 * WIDTH, WIDTH) | _linear(f"{part}.2", rows, 2 * WIDTH)
    if keys.get("counting_layer") == "count_lstm_v2":
        found |= {f"count_embed.transformer.{key}": value for key, value in _among().items()}
    else:
        found |= _linear("count_embed.projector.0", 4 * WIDTH, 2 * WIDTH)
        found |= _linear("count_embed.projector.2", WIDTH, 4 * WIDTH)
    found["count_embed.pos_embedding.weight"] = torch.empty(20, WIDTH)
    found |= {f"count_embed.gru.{key}": value for key, value in torch.nn.GRU(WIDTH, WIDTH).state_dict().items()}
    save_file(filled(found, seed_of(kind)), folder / "model.safetensors")
    return folder


def _among() -> dict[str, Tensor]:
    """A Transformer over labels, 128 wide."""
    layer = torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    whole = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    found = {f"transformer.{key}": value for key, value in whole.state_dict().items()}
    found |= _linear("in_projector", 128, WIDTH) | _linear("out_projector.0", WIDTH, 128 + WIDTH)
    return found | _linear("out_projector.2", WIDTH, WIDTH) | _linear("out_projector.4", WIDTH, WIDTH)


def encoder(config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an encoder, by transformers' names."""
    name = _CLASSES[config["model_type"]]
    made = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    found: dict[str, Tensor] = made.state_dict()
    return found


def spans(name: str, width: int) -> dict[str, Tensor]:
    """What makes vectors of spans."""
    found: dict[str, Tensor] = {}
    for part in ("project_start", "project_end"):
        found |= _linear(f"{name}{part}.0", 4 * width, width) | _linear(f"{name}{part}.3", width, 4 * width)
    found |= _linear(f"{name}out_project.0", 4 * width, 2 * width)
    return found | _linear(f"{name}out_project.3", width, 4 * width)


def filled(found: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same names with random numbers, the same everywhere."""
    random = np.random.RandomState(seed)
    for key in sorted(found):
        if "position_ids" not in key:
            norm = "norm" in key.lower() and key.endswith("weight")
            numbers = random.standard_normal(tuple(found[key].shape)) * 0.2 + norm
            found[key] = torch.from_numpy(numbers.astype(np.float32))
    return found


def _linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.empty(rows, columns), f"{name}.bias": torch.empty(rows)}


# What is asked of each checkpoint: options of the library, and the labels.
ASKED: dict[str, tuple[dict[str, bool | float], list[str]]] = {
    "flat": ({}, LABELS),
    "nested": ({"flat_ner": False, "threshold": 0.3}, LABELS),
    "several labels": ({"multi_label": True, "threshold": 0.2}, LABELS),
    "nested, several labels": ({"flat_ner": False, "multi_label": True, "threshold": 0.3}, LABELS),
    "one label": ({"threshold": 0.4}, LABELS[:1]),
    "nearly all": ({"threshold": 0.001, "flat_ner": False}, LABELS[:2]),
    "none": ({"threshold": 1.0}, LABELS),
}


# What is asked of GLiNER2: a threshold, and the labels, with descriptions or without.
ASKED_2: dict[str, tuple[float, list[str] | dict[str, str]]] = {
    "names": (0.5, LABELS),
    "low": (0.2, LABELS),
    "described": (0.3, {"person": "a human being", "location": "", "org": "firms, банк"}),
}


def seed_of(kind: str) -> int:
    """The seed of the weights of that kind, with which some parts of the texts are found, and others are not."""
    return SEEDS[kind] if kind in SEEDS else int(json.loads(ANSWERS.read_text())[kind]["seed"])


# Those that are tried while answers are recorded.
SEEDS: dict[str, int] = {}
Answers = list[list[tuple[Any, ...]]]


def record() -> None:
    """Write what the libraries answer: of each text the label, score, first character and the one after the last."""
    found: dict[str, dict[str, Any]] = json.loads(ANSWERS.read_text()) if ANSWERS.is_file() else {}
    for kinds, asked, opened in ((KINDS, ASKED, _gliner), (KINDS_2, ASKED_2, _gliner2)):
        for kind in [kind for kind in kinds if kind not in found]:
            several: list[int] = []
            for SEEDS[kind] in range(4):
                with tempfile.TemporaryDirectory() as folder:
                    answers = opened(Path(folder), kind)(next(iter(asked)))
                several.append(sum(min(len(own), 6) for own in answers))
            SEEDS[kind] = several.index(max(several))
            with tempfile.TemporaryDirectory() as folder:
                ask = opened(Path(folder), kind)
                found[kind] = {"seed": SEEDS[kind], **{what: ask(what) for what in asked}}
            print(kind, several, flush=True)  # noqa: T201
            ANSWERS.write_text(json.dumps(found, ensure_ascii=False, separators=(",", ":")) + "\n")


def _gliner(folder: Path, kind: str) -> Callable[[str], Answers]:
    from gliner import GLiNER  # type: ignore[import-not-found]

    model = GLiNER.from_pretrained(save(folder, kind), local_files_only=True)

    def ask(what: str) -> Answers:
        options, labels = ASKED[what]
        answers = model.inference(TEXTS, labels, batch_size=len(TEXTS), **{"threshold": 0.5, **options})
        return [[(one["label"], round(one["score"], 6), one["start"], one["end"]) for one in own] for own in answers]

    return ask


def _gliner2(folder: Path, kind: str) -> Callable[[str], Answers]:
    from gliner2 import GLiNER2  # type: ignore[import-not-found]

    model = GLiNER2.from_pretrained(str(save_2(folder, kind)))

    def ask(what: str) -> Answers:
        threshold, labels = ASKED_2[what]
        found: Answers = []
        for text in TEXTS:
            answer = model.extract_entities(text, labels, threshold, include_confidence=True, include_spans=True)
            parts = ((label, one) for label, own in answer["entities"].items() for one in own)
            found.append([(label, round(one["confidence"], 6), one["start"], one["end"]) for label, one in parts])
        return found

    return ask


if __name__ == "__main__":
    record()
