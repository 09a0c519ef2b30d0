"""Every class of transformers' tokenizers, with every setting that transformers knows, gives the ids of AutoTokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.files import Folder
from poolhouse.inputs.limits import Limit
from poolhouse.inputs.plain_tokenizers import CLASSES, ENFORCED, REGISTERED, equals_auto_tokenizer
from poolhouse.inputs.prompts import Prompt
from poolhouse.inputs.tokenizer import Tokenizer
from poolhouse.packing.tokens import Tokens
from tests.inputs.tokenizer_layouts import build, classes, known_keys

TEXTS = [
    "",
    "The Moon falls",
    "naïve café Größe",
    "東京moon",
    " bread  and\tships!",
    "<s> moon [MASK] <mask>water </s>[SEP]",
    "moon<new>bread <new> moonmoon",
    "the moon falls under the water " * 6,
]
PAIRS = [("The Moon", "naïve bread"), ("the moon falls " * 5, "bread"), ("ships", "the songs of sailors " * 4)]
NEW = {"content": "<new>", "single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": True}
WORD = {**NEW, "content": "moon", "lstrip": False, "rstrip": False, "normalized": True, "special": False}

# Where a setting needs values of its own; every other key that transformers knows is tried with True and a word.
VALUES: dict[str, list[Any]] = {
    "add_bos_token": [True],
    "add_eos_token": [True],
    "add_prefix_space": [True, False, None],
    "added_tokens_decoder": [{}, {"7000": NEW}, {"1": {**WORD, "special": True}}],
    "additional_special_tokens": [["<new>"], ["moon"], [{"__type": "AddedToken", **NEW}]],
    "auto_map": [{"AutoTokenizer": ["tokenization_x.X", None]}],
    "bos_token": ["<new>", "moon", None, {"__type": "AddedToken", **NEW}],
    "cls_token": ["<new>", "</s>", "[SEP]", None],
    "do_lower_case": [True, False, None],
    "extra_special_tokens": [["<new>"], {"image_token": "<new>"}],
    "fix_mistral_regex": [True],
    "image_token": ["<new>"],
    "mask_token": ["<new>", {"__type": "AddedToken", **NEW, "content": "<mask>"}, {**NEW, "content": "<mask>"}],
    "model_max_length": [8, 1e30],
    "model_input_names": [["input_ids"], ["input_ids", "token_type_ids"]],
    "padding_side": ["left"],
    "sep_token": ["moon", "<s>", None],
    "split_special_tokens": [True, False],
    "strip_accents": [True, False],
    "tokenize_chinese_chars": [True, False],
    "tokenizer_class": ["PreTrainedTokenizerFast", "BertTokenizerFast", "RobertaTokenizer", "Unknown", "GPT2Tokenizer"],
    "trim_offsets": [True, False],
    "truncation_side": ["left", "right"],
    "unk_token": ["moon", "<new>", None],
}
MODEL_TYPES = {
    "BertTokenizer": "bert",
    "MPNetTokenizer": "mpnet",
    "Qwen2Tokenizer": "qwen3",
    "RobertaTokenizer": "roberta",
    "TokenizersBackend": "modernbert",
    "XLMRobertaTokenizer": "xlm-roberta",
}
# They take more than a text, or fill up what they make.
OTHER_INPUTS = {
    "LayoutLMv2Tokenizer",
    "LayoutLMv3Tokenizer",
    "LayoutXLMTokenizer",
    "MarkupLMTokenizer",
    "UdopTokenizer",
}
FILLS_UP = {"SeamlessM4TTokenizer"}

FOLDERS = Path(mkdtemp(prefix="tokenizers_"))


@cache
def folder_of(name: str) -> Path:
    """The folder of a class as transformers saves it."""
    folder = FOLDERS / name
    if name == "TokenizersBackend":
        build("RobertaTokenizer", folder, "modernbert")
        edit(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    else:
        build(name, folder, MODEL_TYPES.get(name))
    return folder


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **changes}))


def copy_of(name: str, place: Path) -> Path:
    return Path(shutil.copytree(folder_of(name), place, dirs_exist_ok=True))


def auto(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def differences(ours: Tokenizer, theirs: Any, texts: list[str], pairs: list[tuple[str, str]]) -> list[Any]:
    """Where ids are not those of transformers: with and without special tokens, cut, and in pairs."""
    found: list[Any] = [] if ours.truncation_side == theirs.truncation_side else ["truncation_side"]
    firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
    prompts = [Prompt(text) for text in texts] + [Prompt(first, pair=second) for first, second in pairs]
    for special in (True, False):
        for keep in (10_000, theirs.num_special_tokens_to_add(pair=True) + 5):
            asked = {"truncation": True, "max_length": keep, "add_special_tokens": special}
            wanted = theirs(texts, **asked)["input_ids"] + theirs(firsts, seconds, **asked)["input_ids"]
            limit = Limit(10_000, keep, ours.truncation_side, add_special_tokens=special)
            made = ours.encode(prompts, [limit] * len(prompts))
            for prompt, tokens, ids in zip(prompts, made, wanted, strict=True):
                if not isinstance(tokens, Tokens) or tokens.ids.tolist() != ids:
                    found.append((prompt.text, prompt.pair, special, keep, tokens, ids))
    return found


def agrees(folder: Path) -> list[Any]:
    """Differences of a folder; where transformers cannot read it, we refuse it too or say what we read instead."""
    try:
        theirs = auto(folder)
    except Exception:  # noqa: BLE001 - whatever transformers raises
        try:
            return [] if Tokenizer.from_folder(folder).notes else ["no note"]
        except CheckpointError:
            return []
    ours = Tokenizer.from_folder(folder)
    try:
        theirs(TEXTS)
    except Exception:  # noqa: BLE001 - whatever transformers raises
        made = ours.encode([Prompt(text) for text in TEXTS], [Limit(10_000)] * len(TEXTS))
        return [] if any(isinstance(tokens, InvalidRequest) for tokens in made) else ["no error"]
    return differences(ours, theirs, TEXTS, PAIRS)


KEYS = sorted({*known_keys(), *VALUES})


@pytest.mark.parametrize("key", KEYS)
def test_every_setting_of_the_commonest_classes_gives_the_ids_of_auto_tokenizer(key: str, tmp_path: Path) -> None:
    # One without values of its own means nothing to most classes: each is tried with one of them.
    names = [*MODEL_TYPES]
    for name in names if key in VALUES else [names[KEYS.index(key) % len(names)]]:
        for value in VALUES.get(key, [True, "moon"]):
            folder = copy_of(name, tmp_path)
            edit(folder / "tokenizer_config.json", **{key: value})
            assert agrees(folder) == [], (name, value)


@pytest.mark.parametrize("name", sorted(set(classes()) - OTHER_INPUTS - FILLS_UP))
def test_every_class_gives_the_ids_of_auto_tokenizer(name: str, tmp_path: Path) -> None:
    assert agrees(folder_of(name)) == []
    folder = copy_of(name, tmp_path)
    edit(
        folder / "tokenizer_config.json",
        truncation_side="left", do_lower_case=False, add_prefix_space=True, extra_special_tokens=["<new>", "moon"],
        add_eos_token=True,
    )  # fmt: skip
    assert agrees(folder) == []


def types(ours: Tokenizer, prompt: Prompt, limit: Limit) -> list[int]:
    (tokens,) = ours.encode([prompt], [limit])
    assert isinstance(tokens, Tokens)
    return [0] * len(tokens) if tokens.types is None else tokens.types.tolist()


@pytest.mark.parametrize("name", sorted(set(classes()) - OTHER_INPUTS - FILLS_UP))
def test_token_types_are_those_of_the_template_where_the_model_has_a_table(name: str) -> None:
    folder = folder_of(name)
    theirs, trained = auto(folder), Tokenizer.from_folder(folder, model_types=4)
    without = Tokenizer.from_folder(folder, model_types=1)
    for special in (True, False):
        whole = Limit(10_000, add_special_tokens=special)
        cut = Limit(10_000, keep=12, add_special_tokens=special)
        for text, other in PAIRS:
            asked = {"add_special_tokens": special, "return_token_type_ids": True}
            pair = theirs([text], [other], **asked)["token_type_ids"][0]
            assert types(trained, Prompt(text, pair=other), whole) == pair
            assert types(trained, Prompt(text), whole) == theirs(text, **asked)["token_type_ids"]
            short = theirs(text, truncation=True, max_length=12, **asked)["token_type_ids"]
            assert types(trained, Prompt(text), cut) == short
            assert not any(types(without, Prompt(text, pair=other), whole))


def old(folder: Path) -> None:
    """As transformers 4 saved it: all added tokens in tokenizer_config.json, the named ones in special_tokens_map.json."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = {str(number): token.__getstate__() for number, token in tokenizer.get_added_tokens_decoder().items()}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added, clean_up_tokenization_spaces=True)
    named = {name: value for name, value in auto(folder).special_tokens_map.items() if name.endswith("_token")}
    edit(folder / "special_tokens_map.json", **named)


def truncating(folder: Path) -> None:
    """tokenizer.json cuts and pads by itself, on the left."""
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4, direction="left")
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))


def changed(file: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, **values)


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def changed_part(part: str, **values: Any) -> Callable[[Path], None]:
    """A part of tokenizer.json that the class would build otherwise."""

    def change(folder: Path) -> None:
        described = json.loads((folder / "tokenizer.json").read_text())
        edit(folder / "tokenizer.json", **{part: {**(described[part] or {}), **values}})

    return change


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "of transformers 4": old,
    "cuts by itself": truncating,
    "a token in added_tokens.json": changed("added_tokens.json", **{"<new>": 5000}),
    "a word in added_tokens.json": changed("added_tokens.json", moon=20),
    "a token with properties beside": changed("special_tokens_map.json", mask_token={**NEW, "content": "<mask>"}),
    "another separator beside": changed("special_tokens_map.json", sep_token="moon"),
    "more tokens beside": changed("special_tokens_map.json", additional_special_tokens=["<new>", "moon"]),
    "a setting beside": changed("special_tokens_map.json", do_lower_case=False, add_prefix_space=True),
    "a class in config.json": changed("config.json", tokenizer_class="GPT2Tokenizer"),
    "an unknown model type": changed("config.json", model_type="of tomorrow"),
    "an enforced class": changed("config.json", model_type="qwen2"),
    "no config.json": without("config.json"),
    "no tokenizer_config.json": without("tokenizer_config.json"),
    "another model": changed_part("model", unk_token="moon", fuse_unk=True, max_input_chars_per_word=3),
    "another normalizer": changed_part("normalizer", type="Lowercase"),
    "another pre-tokenizer": changed_part("pre_tokenizer", type="WhitespaceSplit"),
    "a byte-level post-processor": changed_part(
        "post_processor", type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True
    ),
    "a token that is no special one": lambda folder: edit(
        folder / "tokenizer.json",
        added_tokens=[
            {**token, "special": False} for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        ],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_contradict_each_other_give_the_ids_of_auto_tokenizer(layout: str, tmp_path: Path) -> None:
    for name in MODEL_TYPES:
        folder = copy_of(name, tmp_path / name)
        LAYOUTS[layout](folder)
        assert agrees(folder) == [], name


@pytest.mark.parametrize("layout", ["as saved", "of transformers 4"])
@pytest.mark.parametrize("name", [*MODEL_TYPES, "DistilBertTokenizer"])
def test_the_commonest_layouts_need_no_transformers(name: str, layout: str, tmp_path: Path) -> None:
    folder = copy_of("BertTokenizer" if name.startswith("Distil") else name, tmp_path)
    if name.startswith("Distil"):
        edit(folder / "tokenizer_config.json", tokenizer_class=name)
    if layout == "of transformers 4":
        old(folder)
    native = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert equals_auto_tokenizer(native, Folder(folder), json.loads((folder / "tokenizer_config.json").read_text()))
    assert agrees(folder) == []


def test_a_panic_of_the_librarys_is_a_clear_error(tmp_path: Path) -> None:
    folder = copy_of("TokenizersBackend", tmp_path)
    changed_part("model", continuing_subword_prefix="@@")(folder)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: slice index"):
        Tokenizer.from_folder(folder)


def test_model_types_have_the_classes_that_transformers_registers() -> None:
    for model_type, name in REGISTERED.items():
        assert TOKENIZER_MAPPING_NAMES[model_type] == name
        assert (model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS) == (model_type in ENFORCED)
    assert set(REGISTERED.values()) <= set(CLASSES)


@cache
def loaded(name: str, left: bool, split: bool, lower: bool) -> tuple[Tokenizer, Any]:
    folder = copy_of(name, FOLDERS / f"{name}-{left}-{split}-{lower}")
    side = "left" if left else "right"
    edit(folder / "tokenizer_config.json", truncation_side=side, split_special_tokens=split, do_lower_case=lower)
    return Tokenizer.from_folder(folder), auto(folder)


PIECES = [
    "moon",
    "The",
    "Größe",
    "東京",
    " ",
    "  ",
    "\n",
    "!",
    "<s>",
    "[MASK]",
    "<mask>",
    "</s>",
    "Ω",
    "é",
    "🙂",
    "\u200b",
]


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([*MODEL_TYPES, "AlbertTokenizer", "GemmaTokenizer", "DebertaV2Tokenizer", "XLNetTokenizer"]),
    left=st.booleans(),
    split=st.booleans(),
    lower=st.booleans(),
    text=st.one_of(st.text(max_size=30), st.lists(st.sampled_from(PIECES)).map("".join)),
    other=st.lists(st.sampled_from(PIECES), min_size=1).map("".join),
)
def test_any_text_gives_the_ids_of_auto_tokenizer(
    name: str, left: bool, split: bool, lower: bool, text: str, other: str
) -> None:
    ours, theirs = loaded(name, left, split, lower)
    assert differences(ours, theirs, [text], [(text, other)]) == []
