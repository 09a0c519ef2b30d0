"""Every key that sentence-transformers writes or reads: decided upon in one table, and each does what the table says."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.modules import Normalize, Router, Transformer
from sentence_transformers.base.modules.module import Module
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, WeightedLayerPooling
from transformers.processing_utils import TextKwargs

from poolhouse import LLM, CheckpointError
from poolhouse.files import Folder
from poolhouse.models.files.module_keys import IGNORED, KEYS, READ
from poolhouse.models.files.module_steps import read_steps
from poolhouse.models.files.sentence_transformers import read_sentence_transformers
from tests.checkpoints import save_checkpoint

TEXTS = ["The Moon pulls the sea towards it, and lets it go again.", "Yeast makes bread rise", "Why"]

# Modules that are refused by name, so that their keys need no decision.
REFUSED = {
    *("BoW", "CNN", "LSTM", "WordEmbeddings", "WordWeights", "TokenPooling", "HierarchicalTokenPooling"),
    "LambdaTokenPooling",
}
# Served under the keys of another.
SAME = {"MLMTransformer": "Transformer", "CLIPModel": "Transformer"}
# Arguments of constructors that no file holds: they come from the caller.
CALLERS = {"self", "model_name_or_path", "init_weight", "init_bias", "layer_weights", "tokenizer", "weight", "kwargs"}


def module_classes() -> Iterator[type[Module]]:
    packages = [f"sentence_transformers.{name}.modules" for name in (
        "base", "sentence_transformer", "sparse_encoder", "cross_encoder", "multi_vector_encoder"
    )]  # fmt: skip
    seen: dict[str, type[Module]] = {}
    for package in packages:
        root = importlib.import_module(package)
        for found in pkgutil.walk_packages(root.__path__, f"{package}."):
            module = importlib.import_module(found.name)
            kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == found.name]
            seen |= {kind.__name__: kind for kind in kinds if issubclass(kind, Module) and not inspect.isabstract(kind)}
    yield from seen.values()


def keys_of(kind: type[Module]) -> set[str]:
    """What its config may hold: what it saves, former names, and what its constructor takes of it."""
    named = {*kind.config_keys, *kind.config_key_renames}
    return named | (set(inspect.signature(kind.__init__).parameters) - CALLERS)


CLASSES = {kind.__name__: kind for kind in module_classes() if kind.__name__ not in REFUSED}


def test_the_walk_finds_the_modules() -> None:
    assert {"Transformer", "Pooling", "Dense", "Router", "StaticEmbedding", "SpladePooling"} <= set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_of_a_module_is_decided_upon(name: str) -> None:
    known = KEYS[SAME.get(name, name)]
    if name == "Router":
        known = KEYS["Router parameters"]
    left = {"StaticEmbedding": {"embedding_weights", "embedding_dim"}, "Router": {"sub_modules"}}
    assert keys_of(CLASSES[name]) - set(known) - left.get(name, set()) - {"args", "_from_auto_load"} == set()


@pytest.mark.parametrize("kind", [SentenceTransformer, SparseEncoder, CrossEncoder, MultiVectorEncoder])
def test_every_key_of_a_models_own_file_is_decided_upon(kind: type) -> None:
    found: set[str] = set()
    for owner in kind.__mro__:
        for name in ("_get_model_config", "_parse_model_config"):
            if name in vars(owner):
                source = inspect.getsource(vars(owner)[name])
                found |= set(re.findall(r"config(?:\.get\(|\[)\"(\w+)\"", source))
                found |= set(re.findall(r"\"(\w+)\" (?:not )?in model_config", source))
                written = (node for node in ast.walk(ast.parse(textwrap.dedent(source))) if isinstance(node, ast.Dict))
                first = next(written, None) if name == "_get_model_config" else None
                found |= {str(key.value) for key in (first.keys if first else ()) if isinstance(key, ast.Constant)}
    assert "prompts" in found
    assert found - set(KEYS["config_sentence_transformers.json"]) == set()


def test_every_word_for_texts_is_decided_upon() -> None:
    assert set(Transformer._VALID_PROCESSING_KWARGS_KEYS) == set(KEYS["processing_kwargs"])
    assert set(TextKwargs.__annotations__) - set(KEYS["processing_kwargs text"]) == set()


def make(folder: Path, modules: list[Any] = [], **options: Any) -> Path:  # noqa: B006
    save_checkpoint(folder / "plain", "roberta, byte bpe")
    parts = [Transformer(str(folder / "plain")), *(modules or [Pooling(32, "mean")])]
    SentenceTransformer(modules=parts, device="cpu", **options).save_pretrained(str(folder / "saved"))
    return folder / "saved"


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))


def theirs(folder: Path, **options: Any) -> torch.Tensor:
    return torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS, **options))


def ours(folder: Path, **options: Any) -> torch.Tensor:
    with LLM(str(folder), overflow="truncate") as llm:
        return torch.from_numpy(llm.embed_array(TEXTS, **options))


# Changes to sentence_bert_config.json that change the answer, or that must not.
TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
LOGITS = {"text": {"method": "forward", "method_output_name": "logits"}}
READ_KEYS: dict[str, dict[str, Any]] = {
    "max_seq_length": {"max_seq_length": 6},
    "do_lower_case": {"do_lower_case": True},
    "add_special_tokens": {"processing_kwargs": {"text": {"add_special_tokens": False}}},
    "max_length": {"processing_kwargs": {"text": {"max_length": 7, "truncation": True}}},
    "max_length of all kinds of inputs": {
        "processing_kwargs": {"text": {"max_length": 9}, "common": {"max_length": 6}},
        "max_seq_length": 12,
    },
    "model_max_length": {"processor_kwargs": {"model_max_length": 6}, "max_seq_length": 12},
    "model_max_length, by its former name": {"tokenizer_args": {"model_max_length": 6}},
    "config_kwargs": {"config_kwargs": {"layer_norm_eps": 0.5}},
    "config_args": {"config_args": {"hidden_act": "relu"}},
    "an inner layer": {
        "modality_config": {"text": {"method": "forward", "method_output_name": ["hidden_states", -2]}},
        "module_output_name": "token_embeddings",
    },
    "the embeddings": {
        "modality_config": {"text": {"method": "forward", "method_output_name": ["hidden_states", 0]}},
        "module_output_name": "token_embeddings",
    },
}
IGNORED_KEYS: dict[str, dict[str, Any]] = {
    "unpad_inputs": {"unpad_inputs": False},
    "padding": {"processing_kwargs": {"text": {"padding": "max_length", "pad_to_multiple_of": 8}}},
    "pictures": {"processing_kwargs": {"image": {"size": 3}}},
    "attention": {"model_args": {"attn_implementation": "eager"}},
    "the same output": {"modality_config": TEXT, "module_output_name": "token_embeddings"},
}
REFUSED_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "a key of tomorrow": ({"pooling_of_tomorrow": 1}, "pooling_of_tomorrow"),
    "a key misspelt": ({"max_seq_lenght": 6}, "Did you mean 'max_seq_length'"),
    "a pooled output": (
        {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}},
         "module_output_name": "sentence_embedding"},
        "'pooler_output'",
    ),
    "another method": (
        {"modality_config": {"text": {"method": "embed", "method_output_name": None}},
         "module_output_name": "token_embeddings"},
        "the method 'embed'",
    ),
    "messages": ({"modality_config": {**TEXT, "message": TEXT["text"]}, "module_output_name": "token_embeddings"}, "message"),
    "no texts": ({"modality_config": {"image": TEXT["text"]}, "module_output_name": "token_embeddings"}, "no texts"),
    "a task": ({"transformer_task": "retrieval"}, "transformer_task"),
    "logits": ({"transformer_task": "fill-mask", "modality_config": LOGITS}, "SpladePooling"),
    "generation": (
        {"transformer_task": "text-generation", "modality_config": LOGITS, "module_output_name": "causal_logits"},
        "write .*causal_logits",
    ),
    "a length of queries": ({"query_length": 6}, "query_length"),
    "an unknown word for texts": ({"processing_kwargs": {"text": {"split": True}}}, "split"),
    "no truncation": ({"processing_kwargs": {"text": {"truncation": False}}}, "truncation"),
    "words split before": ({"processing_kwargs": {"common": {"is_split_into_words": True}}}, "is_split_into_words"),
    "kinds of inputs": ({"processing_kwargs": {"texts": {"max_length": 6}}}, "Did you mean 'text'"),
    "the tokenizer's loading": ({"tokenizer_args": {"add_prefix_space": True}}, "add_prefix_space"),
    "the model's loading": ({"model_args": {"ignore_mismatched_sizes": True}}, "ignore_mismatched_sizes"),
    "another tokenizer": ({"tokenizer_name_or_path": "other"}, "tokenizer_name_or_path"),
    "a length that is none": ({"max_seq_length": 0}, "max_seq_length is 0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def settings(saved: Path) -> Iterator[Path]:
    """The file of the Transformer, as it was again afterwards."""
    path = saved / "sentence_bert_config.json"
    before = path.read_text()
    yield path
    path.write_text(before)


@pytest.mark.parametrize("name", READ_KEYS)
def test_a_key_that_is_read_changes_our_answer_as_theirs(name: str, settings: Path) -> None:
    before = theirs(settings.parent)
    change(settings, **READ_KEYS[name])
    expected = theirs(settings.parent)
    assert not torch.allclose(expected, before, atol=1e-4), "the change is to change something"
    assert torch.allclose(ours(settings.parent), expected, atol=1e-5)


@pytest.mark.parametrize("name", IGNORED_KEYS)
def test_a_key_without_effect_changes_nothing(name: str, settings: Path) -> None:
    change(settings, **IGNORED_KEYS[name])
    expected = theirs(settings.parent)
    assert torch.allclose(ours(settings.parent), expected, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED_KEYS)
def test_what_is_not_served_is_refused_by_name(name: str, settings: Path) -> None:
    changes, words = REFUSED_KEYS[name]
    change(settings, **changes)
    with pytest.raises(CheckpointError, match=words):
        LLM(str(settings.parent))


@pytest.mark.parametrize("former", ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_former_names_of_the_file_are_read(former: str, saved: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(saved, tmp_path / "former")
    (folder / "sentence_bert_config.json").unlink()
    change(folder / f"sentence_{former}_config.json", max_seq_length=6, do_lower_case=True)
    with LLM(str(folder)) as llm:
        assert llm.model.facts.max_tokens == 6
    change(folder / f"sentence_{former}_config.json", max_tokens=6)
    with pytest.raises(CheckpointError, match=f"sentence_{former}_config"):
        LLM(str(folder))


def test_keys_that_sentence_transformers_drops_are_told_of(saved: Path) -> None:
    path = saved / "config_sentence_transformers.json"
    before = path.read_text()
    change(path, scale_of_tomorrow=2)
    with LLM(str(saved)) as llm:
        assert [note for note in llm.model.facts.notes if "scale_of_tomorrow" in note]
    path.write_text(before)


@pytest.mark.parametrize(
    ("prompts", "name", "prefix"),
    [({"a": "the water of "}, "a", "the water of "), ({}, "query", ""), ({"document": "x "}, "query", "")],
)
def test_a_default_prompt_is_one_that_is_there(prompts: dict[str, str], name: str, prefix: str, saved: Path) -> None:
    path = saved / "config_sentence_transformers.json"
    before = path.read_text()
    path.write_text(json.dumps({"prompts": prompts, "default_prompt_name": name}))
    expected = theirs(saved)
    assert torch.allclose(ours(saved), expected, atol=1e-5)
    assert torch.allclose(expected, theirs(saved, prompt=prefix), atol=1e-6)
    change(path, default_prompt_name="A")
    with pytest.raises(ValueError, match="'A' not found"):
        theirs(saved)
    with pytest.raises(CheckpointError, match="default_prompt_name is 'A'"):
        LLM(str(saved))
    path.write_text(before)


CHAINS: dict[str, list[Any]] = {
    "a Dense of every token": [("Dense", "token_embeddings", None, 16), ("Pooling", ("mean", "max"), 16)],
    "two of every token": [
        ("Dense", "token_embeddings", None, 48),
        ("Dense", "token_embeddings", "token_embeddings", 32, 48),
        ("Normalize", "token_embeddings", None),
        ("Pooling", "cls", 32),
    ],
    "a side branch": [("Pooling", "mean"), ("Dense", "sentence_embedding", "projected", 8)],
    "a side branch that comes back": [
        ("Pooling", "mean"),
        ("Dense", "sentence_embedding", "projected", 8),
        ("Normalize", "projected", "sentence_embedding"),
    ],
    "pooled twice": [
        ("Pooling", "mean"),
        ("Dense", "sentence_embedding", None, 8),
        ("Pooling", "max"),
        ("Normalize", "sentence_embedding", None),
    ],
    "what is not there is not normalised": [("Pooling", "mean"), ("Normalize", "nothing", None)],
}


def chained(name: str) -> list[Any]:
    torch.manual_seed(1)
    built: list[Any] = []
    for kind, first, *rest in CHAINS[name]:
        if kind == "Pooling":
            built.append(Pooling(rest[0] if rest else 32, first))
        elif kind == "Normalize":
            built.append(Normalize(first, rest[0]))
        else:
            output, width, *width_in = rest
            built.append(Dense(*(width_in or [32]), width, module_input_name=first, module_output_name=output))
    return built


@pytest.mark.parametrize("name", CHAINS)
def test_modules_are_followed_by_what_they_read_and_write(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, chained(name))
    expected = theirs(folder)
    assert torch.allclose(ours(folder), expected, atol=1e-5)
    with LLM(str(folder)) as llm:
        told = [note for note in llm.model.facts.notes if "projected" in note]
    assert bool(told) is (name == "a side branch")


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([Dense(32, 8)], "reads module_input_name 'sentence_embedding'"),
        ([Pooling(32), Dense(32, 8, module_input_name="projected")], "reads module_input_name 'projected'"),
        ([Dense(32, 8, module_input_name="token_embeddings", module_output_name="sentence_embedding")], "of tokens"),
        ([Dense(32, 8, module_input_name="token_embeddings"), Pooling(8), Dense(9, 4)], "takes 9 features, but 8"),
    ],
)
def test_modules_that_do_not_fit_together_are_refused(modules: list[Any], words: str, tmp_path: Path) -> None:
    folder = make(tmp_path, modules)
    with pytest.raises(CheckpointError, match=words):
        LLM(str(folder))


@pytest.mark.parametrize("kind", ["latent.Pooling", "custom_st.Transformer", "sentence_transformers_of_mine.Pooling"])
def test_a_class_of_another_package_is_not_taken_for_the_standard_one(kind: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0 if kind.endswith("Transformer") else 1]["type"] = kind
    (folder / "modules.json").write_text(json.dumps(modules))
    for trusted in (False, True):
        with pytest.raises(CheckpointError, match=kind):
            LLM(str(folder), trust_remote_code=trusted)


def weighed(folder: Path, start: int, layers: int = 2, shown: bool = True) -> Path:
    weigh = WeightedLayerPooling(32, num_hidden_layers=layers, layer_start=start)
    weigh.layer_weights.data = torch.tensor([0.3, 2.0, 0.7][start:])
    saved = make(folder, [weigh, Pooling(32)])
    change(saved / "config.json", output_hidden_states=shown)
    return saved


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("kind", ["bert, wordpiece", "roberta, byte bpe", "modernbert, byte bpe"])
def test_layers_are_weighed_as_in_sentence_transformers(kind: str, start: int, tmp_path: Path) -> None:
    folder = weighed(tmp_path, start)
    save_checkpoint(folder, kind)
    change(folder / "config.json", output_hidden_states=True)
    expected = theirs(folder)
    assert torch.allclose(ours(folder), expected, atol=1e-5)
    if start < 2:
        change(folder / "config.json", output_hidden_states=False)
        assert not torch.allclose(theirs(folder), expected, atol=1e-3)
        assert torch.allclose(ours(folder), theirs(folder), atol=1e-5)
        with LLM(str(folder)) as llm:
            assert any("WeightedLayerPooling has no effect" in note for note in llm.model.facts.notes)


def test_layers_that_nobody_gives_are_refused(tmp_path: Path) -> None:
    folder = weighed(tmp_path, 1)
    with pytest.raises(CheckpointError, match="served of native families alone"):
        LLM(str(folder), model_impl="transformers")
    settings = next(folder.glob("*WeightedLayerPooling")) / "config.json"
    for changes, words in (
        ({"num_hidden_layers": 3}, "layer_weights must be 3 numbers"),
        ({"num_hidden_layers": 3, "layer_start": 2}, "from number 2 on, but the model has 3"),
        ({"layers": 1}, "'layers'|layers is not a key"),
    ):
        before = settings.read_text()
        change(settings, **changes)
        with pytest.raises(CheckpointError, match=words):
            LLM(str(folder))
        settings.write_text(before)


def test_the_table_says_what_is_done() -> None:
    for keys in KEYS.values():
        assert all(use in (READ, IGNORED) or isinstance(use, tuple) for use in keys.values())
    assert sentence_transformers.__version__.split(".", maxsplit=1)[0] == "6"


ODD = (None, [], {"a": 1}, -1, "x", [["a"]], {"text": 3}, {"text": {"method": 1}})


def test_values_of_the_wrong_kind_are_errors_that_name_the_file(tmp_path: Path) -> None:
    folder = make(tmp_path, [Dense(32, 16, module_input_name="token_embeddings"), Pooling(16), Normalize()])
    sides = {"query": [Dense(32, 8)], "document": [Dense(32, 8)]}
    routed = make(tmp_path / "routed", [Pooling(32), Router(sides, default_route="query")])
    places = {
        "Transformer": folder / "sentence_bert_config.json",
        "config_sentence_transformers.json": folder / "config_sentence_transformers.json",
        "Dense": next(folder.glob("*_Dense")) / "config.json",
        "Pooling": next(folder.glob("*_Pooling")) / "config.json",
        "Normalize": next(folder.glob("*_Normalize")) / "config.json",
        "Router": next(routed.glob("*_Router")) / "router_config.json",
    }
    for kind, path in places.items():
        described = routed if kind == "Router" else folder
        before = path.read_text()
        for key in KEYS[kind]:
            for value in ODD:
                change(path, **{key: value})
                refused = ""
                try:
                    files = read_sentence_transformers(Folder(described))
                    read_steps(files.heads)
                except CheckpointError as error:
                    refused = str(error)
                assert not refused or key in refused or str(path.parent) in refused, (kind, key, value)
                path.write_text(before)
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    for key in KEYS["modules.json"]:
        for value in ODD:
            path.write_text(json.dumps([*modules[:1], {**modules[1], key: value}, *modules[2:]]))
            with contextlib.suppress(CheckpointError):
                read_sentence_transformers(Folder(folder))
