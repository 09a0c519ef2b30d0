"""Plain tokenizers: whether tokenizer.json by itself equals what AutoTokenizer builds, decided from files.

Of tokenizer.json, transformers 5 takes the vocabulary, the added tokens and mostly the post-processor. The class that the
files name builds the rest from tokenizer_config.json. The commonest of these classes are described below:

    class name (config.json, tokenizer_config.json)  ->  the parts that this class builds
                                                              == the parts of tokenizer.json?
    added tokens of all files                        ==  the added tokens of tokenizer.json?

Where both are equal, tokenizer.json is read alone, which spares the import of transformers. A class, a key or a token that
is unknown here is left to AutoTokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.decoders import Decoder
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import PostProcessor

from poolhouse.files import Folder, JsonObject

# The class that transformers registers for a model type; used where the files name none.
REGISTERED = {
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "modernbert": "TokenizersBackend",
    "mpnet": "MPNetTokenizer",
    "nomic_bert": "BertTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
}
# Model types whose files are known to name wrong classes: the registered one is always used.
ENFORCED = frozenset({"modernbert", "qwen2"})

# Keys of tokenizer_config.json that change no token id in the classes below, or are read elsewhere.
WITHOUT_EFFECT = frozenset(
    (
        *("_commit_hash", "add_bos_token", "add_eos_token", "backend", "chat_template", "clean_up_tokenization_spaces"),
        *("do_basic_tokenize", "errors", "files_loaded", "is_local", "legacy", "local_files_only", "max_len"),
        *("max_length", "model_input_names", "model_max_length", "name_or_path", "never_split", "pad_to_multiple_of"),
        *("pad_token_type_id", "padding_side", "processor_class", "sp_model_kwargs", "special_tokens_map_file"),
        *("split_special_tokens", "stride", "tokenizer_class", "tokenizer_file", "truncation_side"),
        *("truncation_strategy", "use_default_system_prompt", "use_fast"),
    )
)
# Keys that a class below reads.
READ = frozenset(("add_prefix_space", "do_lower_case", "strip_accents", "tokenize_chinese_chars", "trim_offsets"))
_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")


def equals_auto_tokenizer(native: Tokenizer, folder: Folder, settings: JsonObject) -> bool:
    """Whether AutoTokenizer would certainly build `native`, the tokenizer.json of a folder, as it is.

    settings: tokenizer_config.json.
    """
    name = _class_name(folder.json("config.json", needed=False), settings)
    if name is None or not all(_is_known(key) for key in settings):
        return False
    described = CLASSES.get(name)
    try:
        tokens = _token_entries(folder, settings)
        if tokens is None or not _same_tokens(native, folder, settings, tokens, described):
            return False
        if described is None:
            return True
        return _same_parts(native, described, {**described.defaults, **settings, **_contents(tokens)})
    except (TypeError, ValueError):
        return False  # values of a type that transformers would not take either


def named_tokens(folder: Folder, settings: JsonObject) -> JsonObject:
    """The content of each special token that has a name, such as bos_token, in the files of a folder."""
    return _contents(_token_entries(folder, settings) or {})


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts that a class builds around the vocabulary.

    model: its type. attributes: of the model. character_map: the normalizer is the one of tokenizer.json, a character map
    of sentencepiece, or none. post_processor: None where the one of tokenizer.json is kept.
    """

    model: str
    attributes: JsonObject
    pre_tokenizer: PreTokenizer
    decoder: Decoder
    normalizer: Normalizer | None = None
    character_map: bool = False
    post_processor: PostProcessor | None = None


# The content of a named token, and its id.
_TokenOf = Callable[[str], tuple[str, int]]


@dataclass(frozen=True, slots=True)
class _TokenizerClass:
    """A class of transformers. defaults: of its settings and special tokens.

    plain_tokens: special tokens have no options, such as stripping white space.
    """

    defaults: JsonObject
    build: Callable[[JsonObject, _TokenOf], _Parts]
    plain_tokens: bool = False


def _class_name(config: JsonObject, settings: JsonObject) -> str | None:
    """The class that AutoTokenizer would use; None where that is not certain."""
    if "auto_map" in settings or "model_name" in config:
        return None
    model_type = config.get("model_type")
    if config and model_type not in REGISTERED:
        return None
    registered = REGISTERED.get(str(model_type), "TokenizersBackend")
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if model_type in ENFORCED or named is None:
        return registered
    named = str(named).removesuffix("Fast")
    if named in ("PreTrainedTokenizer", "TokenizersBackend"):
        return "TokenizersBackend"
    return named if named in CLASSES else None


def _is_known(key: str) -> bool:
    return key in WITHOUT_EFFECT or key in READ or key in (*_TOKEN_LISTS, "added_tokens_decoder") or _is_token(key)


def _is_token(key: str) -> bool:
    return key.endswith("_token") and not key.startswith("add_")


def _token_entries(folder: Folder, settings: JsonObject) -> JsonObject | None:
    """Special tokens by name, as the files write them; None where special_tokens_map.json has more than tokens."""
    tokens = {key: value for key, value in settings.items() if _is_token(key) or key in _TOKEN_LISTS}
    if "added_tokens_decoder" in settings:
        return tokens
    beside = folder.json("special_tokens_map.json", needed=False)
    if not all(_is_token(key) or key in _TOKEN_LISTS for key in beside):
        return None
    lists = [value for part in (tokens, beside) for key in _TOKEN_LISTS for value in _listed(part.get(key))]
    return {**tokens, **beside, "extra_special_tokens": lists}


def _listed(value: Any) -> list[Any]:
    """The tokens of a list, or of a dict by name."""
    return list(value.values() if isinstance(value, dict) else value or ())


def _content(token: Any) -> Any:
    """The text of a token that is written as a text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _contents(tokens: JsonObject) -> JsonObject:
    return {key: _content(value) for key, value in tokens.items() if key not in _TOKEN_LISTS}


def _same_tokens(
    native: Tokenizer, folder: Folder, settings: JsonObject, tokens: JsonObject, described: _TokenizerClass | None
) -> bool:
    """Whether the other files add no token to those of tokenizer.json, and change no options or ids of one."""
    known: dict[int, AddedToken] = native.get_added_tokens_decoder()
    if "added_tokens_decoder" in settings:
        stated = settings["added_tokens_decoder"].items()
        if {int(number): AddedToken(**token) for number, token in stated} != known:
            return False
    by_content = {token.content: token for token in known.values()}
    added = folder.json("added_tokens.json", needed=False).items()
    if any(token not in by_content or native.token_to_id(token) != number for token, number in added):
        return False
    # An object in tokenizer_config.json is a token only with this type.
    stated_tokens = [token for key, token in settings.items() if _is_token(key)]
    if any(isinstance(token, dict) and token.get("__type") != "AddedToken" for token in stated_tokens):
        return False
    named = {**({} if described is None else described.defaults), **tokens}
    wanted = [_content(value) for key, value in named.items() if _is_token(key) and value is not None]
    if any(token not in by_content or not by_content[token].special for token in wanted):
        return False
    if any(_content(token) not in by_content for key in _TOKEN_LISTS for token in _listed(tokens.get(key))):
        return False
    if described is None:
        return True
    if described.plain_tokens and any(by_content[token] != AddedToken(token, special=True) for token in wanted):
        return False
    # Tokens that the vocabulary of the model lacks get new ids, in their order.
    following = native.get_vocab_size(with_added_tokens=False)
    for number, token in sorted(known.items(), key=lambda item: item[0]):
        expected = native.model.token_to_id(token.content)
        if expected is None:
            expected, following = following, following + 1
        if number != expected:
            return False
    return True


def _same_parts(native: Tokenizer, described: _TokenizerClass, settings: JsonObject) -> bool:
    """Whether a class builds the parts that tokenizer.json has."""

    def token_of(key: str) -> tuple[str, int]:
        token = native.token_to_id(settings[key])
        if token is None:
            raise ValueError(f"no token {settings[key]!r}")
        return settings[key], token

    parts = described.build(settings, token_of)
    if type(native.model).__name__ != parts.model:
        return False
    if parts.model == "Unigram":
        # Its attributes are seen only in its serialised form.
        state = native.model.__getstate__()
        if not (state.startswith(b'{"type":"Unigram","unk_id":3,') and state.endswith(b',"byte_fallback":false}')):
            return False
    # A model may have "" where the class has None; both mean that nothing is put there.
    if any((getattr(native.model, name, None) or "") != (value or "") for name, value in parts.attributes.items()):
        return False
    if parts.character_map:
        if native.normalizer is not None and b'"type":"Precompiled"' not in native.normalizer.__getstate__():
            return False
    elif _state(native.normalizer) != _state(parts.normalizer):
        return False
    return (
        _state(native.pre_tokenizer) == _state(parts.pre_tokenizer)
        and _state(native.decoder) == _state(parts.decoder)
        and (parts.post_processor is None or _state(native.post_processor) == _state(parts.post_processor))
    )


def _state(part: Any) -> bytes | str | None:
    """The serialised form of a part, without options that have no effect in it."""
    if part is None:
        return None
    if type(part).__name__ == "ByteLevel" and isinstance(part, Decoder):
        return "ByteLevel"
    state: bytes = part.__getstate__()
    if isinstance(part, PreTokenizer):
        state = state.replace(b',"trim_offsets":false', b"").replace(b',"trim_offsets":true', b"")
    return state


_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _wordpiece(settings: JsonObject, post_processor: PostProcessor) -> _Parts:
    return _Parts(
        "WordPiece",
        {"unk_token": settings["unk_token"], "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(prefix="##"),
        normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=settings["tokenize_chinese_chars"],
            strip_accents=settings["strip_accents"],
            lowercase=settings["do_lower_case"],
        ),
        post_processor=post_processor,
    )


def _bert(settings: JsonObject, token_of: _TokenOf) -> _Parts:
    cls, sep = settings["cls_token"], settings["sep_token"]
    return _wordpiece(
        settings,
        processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[token_of("cls_token"), token_of("sep_token")],
        ),
    )


def _mpnet(settings: JsonObject, token_of: _TokenOf) -> _Parts:
    ends = token_of("sep_token"), token_of("cls_token")
    return _wordpiece(settings, processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False))


_BPE = {
    "unk_token": None,
    "dropout": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def _roberta(settings: JsonObject, token_of: _TokenOf) -> _Parts:
    space = settings["add_prefix_space"]
    return _Parts(
        "BPE",
        _BPE,
        pre_tokenizers.ByteLevel(add_prefix_space=space),
        decoders.ByteLevel(),
        post_processor=processors.RobertaProcessing(
            token_of("sep_token"), token_of("cls_token"), settings["trim_offsets"], space
        ),
    )


def _xlm_roberta(settings: JsonObject, token_of: _TokenOf) -> _Parts:
    bos, eos = settings["bos_token"], settings["eos_token"]
    scheme = "always" if settings["add_prefix_space"] else "never"
    return _Parts(
        "Unigram",
        {},
        pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)]
        ),
        decoders.Metaspace(replacement="▁", prepend_scheme=scheme),
        character_map=True,
        post_processor=processors.TemplateProcessing(
            single=[bos, "$A", eos],
            pair=[bos, "$A", eos, eos, "$B", eos],
            special_tokens=[token_of("bos_token"), token_of("eos_token")],
        ),
    )


def _qwen2(settings: JsonObject, _: _TokenOf) -> _Parts:
    space = bool(settings["add_prefix_space"])
    return _Parts(
        "BPE",
        _BPE,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
            ]
        ),
        decoders.ByteLevel(),
        normalizers.NFC(),
    )


_BERT_DEFAULTS = {
    "do_lower_case": True,
    "strip_accents": None,
    "tokenize_chinese_chars": True,
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_ROBERTA_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_END_OF_TEXT = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
CLASSES: dict[str, _TokenizerClass | None] = {
    "BertTokenizer": _TokenizerClass(_BERT_DEFAULTS, _bert),
    "DistilBertTokenizer": _TokenizerClass(_BERT_DEFAULTS, _bert),
    "MPNetTokenizer": _TokenizerClass({**_BERT_DEFAULTS, **_ROBERTA_TOKENS, "unk_token": "[UNK]"}, _mpnet),
    "Qwen2Tokenizer": _TokenizerClass({"add_prefix_space": None, **_END_OF_TEXT}, _qwen2, plain_tokens=True),
    "RobertaTokenizer": _TokenizerClass({"add_prefix_space": False, "trim_offsets": True, **_ROBERTA_TOKENS}, _roberta),
    "TokenizersBackend": None,
    "XLMRobertaTokenizer": _TokenizerClass({"add_prefix_space": True, **_ROBERTA_TOKENS}, _xlm_roberta),
}
