"""The models that the documents name: tiny ones of the same kinds, in folders of those names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import models, normalizers, pre_tokenizers, processors

from poolhouse.bench.made_up import write_colqwen3
from poolhouse.models.files.hub import embedded_model
from tests import checkpoints
from tests.docs.pages import blocks
from tests.models import colbert_layouts, pruners, tiny_gliclass, tiny_gliner, tiny_rerankers

# Entities that the recogniser knows, by the labels of their words.
_LABELS = ["O", "B-PER", "I-PER", "B-LOC"]
_KNOWN = {"marie": 1, "curie": 2, "warsaw": 3}
# Words that the other models know.
_WORDS = (
    "hello",
    "world",
    "a",
    "the",
    "moon",
    "pulls",
    "sea",
    "towards",
    "it",
    "yeast",
    "makes",
    "bread",
    "rise",
    "what",
    "fine",
    "day",
    ".",
    "?",
    "why",
    "are",
    "there",
    "tides",
)
_PLUGIN_ENTRY = "[poolhouse.io_processor_plugins]\nlines = lines_plugin:Lines\n"


def lay_out(folder: Path) -> None:
    """The folder in which the examples run: `path/to/...` and files that they name."""
    at = folder / "path" / "to"
    at.mkdir(parents=True)
    for name in ("model", "one", "two"):
        (at / name).symlink_to(embedded_model())
    _with_prompts(at / "with-prompts")
    for seed, name in enumerate(("law", "medicine")):
        _adapter(at / name, seed)
    labels = dict(enumerate(("calm", "angry", "glad")))
    _bert(at / "classifier", "ForSequenceClassification", id2label=labels, label2id={b: a for a, b in labels.items()})
    verdicts = dict(enumerate(("contradiction", "neutral", "entailment")))
    _bert(at / "nli", "ForSequenceClassification", id2label=verdicts, label2id={b: a for a, b in verdicts.items()})
    tiny_gliner.save(at / "gliner", "spans")
    (at / "gliclass").mkdir()
    tiny_gliclass.save(at / "gliclass", "deberta v3, first")
    _bert(at / "reranker", "ForSequenceClassification", num_labels=1)
    recogniser(at / "ner")
    _m3(at / "bge-m3")
    _bert(at / "splade", "ForMaskedLM")
    _json(
        at / "splade" / "modules.json",
        [
            _module(0, "", "sentence_transformers.sparse_encoder.models.MLMTransformer"),
            _module(1, "1_SpladePooling", "sentence_transformers.sparse_encoder.models.SpladePooling"),
        ],
    )
    _json(at / "splade" / "1_SpladePooling" / "config.json", {"pooling_strategy": "max"})
    colbert = next(layout for name, layout in colbert_layouts.ROWS.items() if "colbertv2.0" in name)
    colbert_layouts.write(colbert, at / "colbert")
    tiny_rerankers.save(at / "Qwen3-Reranker-tiny", "Qwen3")
    tiny_rerankers.save(at / "Qwen3-Embedding-tiny", "Qwen3")
    tiny_rerankers.save(at / "prm", "Llama")
    write_colqwen3(at / "colqwen3")
    (at / "provence").mkdir()
    pruners.Pruner(at / "provence", "provence")
    e5 = folder / "intfloat" / "e5-small"
    e5.parent.mkdir()
    e5.symlink_to(embedded_model())
    _plugin(folder)
    _files(folder)


def _with_prompts(folder: Path) -> None:
    shutil.copytree(embedded_model(), folder)
    prompts = {"query": "query: ", "document": "document: "}
    _json(folder / "config_sentence_transformers.json", {"prompts": prompts})


def _adapter(folder: Path, seed: int) -> None:
    """An adapter of the embedded model, as PEFT saves it."""
    torch.manual_seed(seed)
    words = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}
    _json(folder / "adapter_config.json", {**words, "base_model_name_or_path": str(embedded_model())})
    stem = "base_model.model.encoder.layer.{}.attention.self.{}.lora_{}.weight"
    shapes = {"A": (4, 384), "B": (384, 4)}
    tensors = {
        stem.format(layer, name, half): 0.05 * torch.randn(shape)
        for layer in range(6)
        for name in ("query", "value")
        for half, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def _bert(folder: Path, head: str, words: tuple[str, ...] = _WORDS, **options: Any) -> Any:
    """A random BERT over whole words, the same at each run."""
    known = _words(folder, _BERT, words)
    model = _random(f"Bert{head}", "BertConfig", vocab_size=len(known), **options)
    model.save_pretrained(folder)
    return model


def recogniser(folder: Path) -> None:
    """A BERT whose layers pass the vectors of words on as they are, and whose head reads the label from them."""
    labels = dict(enumerate(_LABELS))
    model = _bert(
        folder, "ForTokenClassification", tuple(_KNOWN), id2label=labels, label2id={b: a for a, b in labels.items()}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.fill_(1)
            else:
                parameter.zero_()
        for number, label in enumerate([0] * len(_BERT) + [*_KNOWN.values()]):
            model.bert.embeddings.word_embeddings.weight[number, label] = 1
        for label in range(len(_LABELS)):
            model.classifier.weight[label, label] = 3
    model.save_pretrained(folder)


def _m3(folder: Path) -> None:
    known = _words(folder, _ROBERTA, _WORDS)
    model = _random("XLMRobertaModel", "XLMRobertaConfig", vocab_size=len(known), pad_token_id=1)
    model.save_pretrained(folder)
    torch.save({"weight": torch.randn(1, 32), "bias": torch.randn(1)}, folder / "sparse_linear.pt")
    torch.save({"weight": torch.randn(24, 32), "bias": torch.randn(24)}, folder / "colbert_linear.pt")


def _random(model: str, config: str, **options: Any) -> Any:
    torch.manual_seed(1)
    made = getattr(transformers, model)(getattr(transformers, config)(**checkpoints.TINY, **options))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


# Special tokens by their ids: padding, an unknown word, and what stands before and behind a text.
_BERT = {"[PAD]": "pad", "[UNK]": "unk", "[CLS]": "cls", "[SEP]": "sep"}
_ROBERTA = {"<s>": "cls", "<pad>": "pad", "</s>": "sep", "<unk>": "unk"}


def _words(folder: Path, special: dict[str, str], words: tuple[str, ...]) -> dict[str, int]:
    """A tokenizer of whole words, and its vocabulary."""
    known = {word: number for number, word in enumerate([*special, *words])}
    tokens = {f"{role}_token": token for token, role in special.items()}
    first, last = tokens["cls_token"], tokens["sep_token"]
    native = tokenizers.Tokenizer(models.WordPiece(known, unk_token=tokens["unk_token"]))
    native.normalizer = normalizers.BertNormalizer()
    native.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(first, known[first]), (last, known[last])]
    native.post_processor = processors.TemplateProcessing(f"{first} $A {last}", f"{first} $A {last} $B {last}", ends)
    transformers.PreTrainedTokenizerFast(tokenizer_object=native, model_max_length=128, **tokens).save_pretrained(
        folder
    )
    return known


def _plugin(folder: Path) -> None:
    """The plugin of docs/offline.md, as pip would install it."""
    (block,) = (block for block in blocks("docs/offline.md") if block.text.startswith("class Lines:"))
    (folder / "lines_plugin.py").write_text(block.text)
    about = folder / "lines_plugin-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lines-plugin\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(_PLUGIN_ENTRY)


def _files(folder: Path) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input": "The moon pulls the sea."}}
    (folder / "in.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "texts.txt").write_text("The moon pulls the sea.\nBread needs yeast.\nThere are tides.\n")
    template = "{% for message in messages %}[CLS] {{ message.content }} [SEP]{% endfor %}"
    (folder / "template.jinja").write_text(template)
    for name, colour in (("page", "red"), ("page1", "green"), ("page2", "blue")):
        Image.new("RGB", (96, 64), colour).save(folder / f"{name}.png")
    Image.new("RGB", (96, 64), "white").save(folder / "report.pdf")
    for block in blocks("docs/server.md"):
        if block.language == "yaml":
            (folder / "serve.yaml").write_text(block.text)


def _module(number: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": kind}


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


__all__ = ["lay_out", "recogniser"]
