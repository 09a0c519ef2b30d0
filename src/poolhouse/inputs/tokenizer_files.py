"""Tokenizer files: the tokenizer of a folder, of whatever version, as transformers' AutoTokenizer reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import tokenizers
from tokenizers import normalizers, processors

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder, JsonObject, special_tokens
from poolhouse.inputs.pairs import Template
from poolhouse.inputs.plain_tokenizers import equals_auto_tokenizer, named_tokens
from poolhouse.inputs.python_tokenizers import PythonTokenizer

_FILES = (
    *("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model"),
    "tokenizer_config.json",
)


@dataclass(frozen=True, slots=True)
class ReadTokenizer:
    """A tokenizer, and further settings of its files.

    truncation_side: which end of a text is dropped unless the request says otherwise. clean_up: remove spaces before
    punctuation from decoded texts. hides_types: the model takes no token types.
    notes: what is unusual in the files, a sentence each.
    """

    native: tokenizers.Tokenizer | PythonTokenizer
    truncation_side: Literal["left", "right"] = "right"
    clean_up: bool = False
    hides_types: bool = False
    notes: tuple[str, ...] = ()


def read_tokenizer(folder: Folder, trust_remote_code: bool = False) -> ReadTokenizer:
    """The tokenizer of a folder, equal to that of AutoTokenizer.

    It is read from tokenizer.json alone where that is certainly the same, since the import of transformers takes a second.
    tokenizer.json is also used, with a note, where transformers fails to load it.

    Raises:
        CheckpointError: no tokenizer, or one that cannot be read.
    """
    path = folder.path / "tokenizer.json"
    settings = folder.json("tokenizer_config.json", needed=False)
    names = settings.get("model_input_names")
    hides_types = isinstance(names, list) and "token_type_ids" not in names
    if not folder.has("tokenizer.json"):
        if not any(folder.has(name) for name in _FILES):
            raise CheckpointError(f"{folder} has no tokenizer. Looked for tokenizer.json, {', '.join(_FILES)}.")
        try:
            return _by_transformers(folder, trust_remote_code, settings, hides_types)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{folder}: no tokenizer.json, and the older files cannot be converted: {error}"
            ) from error
    native = _native(folder)
    notes: tuple[str, ...] = ()
    # A tokenizer that no file holds is as it stands.
    if isinstance(native, str) or (path.is_file() and not equals_auto_tokenizer(native, folder, settings)):
        try:
            read = _by_transformers(folder, trust_remote_code, settings, hides_types)
            if not _loses_words(native, read.native):
                return read
            reason = "the class that transformers takes for this model makes a BPE of its whole words, and loses them"
        except Exception as error:
            if isinstance(native, str):
                raise CheckpointError(f"{path} cannot be read: {native}") from error
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = f"transformers cannot load its class ({why})"
        notes = (f"The tokenizer is tokenizer.json as it stands: {reason}.",)
    assert isinstance(native, tokenizers.Tokenizer)
    truncation = native.truncation or {}
    native.encode_special_tokens = settings.get("split_special_tokens") is True
    return ReadTokenizer(
        native,
        _truncation_side(settings.get("truncation_side", truncation.get("direction")), folder),
        settings.get("clean_up_tokenization_spaces") is True,
        hides_types,
        (*notes, *_about_ends(native, folder, settings, named_tokens(folder, settings))),
    )


def padding_of(folder: Folder) -> tuple[int, bool]:
    """The id of the token that fills texts up, and whether it stands on their left; for models that attend to it.

    Raises:
        CheckpointError: a tokenizer without one, or one that cannot be read.
    """
    settings = folder.json("tokenizer_config.json", needed=False)
    name, side = special_tokens(folder).get("pad_token"), settings.get("padding_side")
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        if side is not None and token.get("content") == name:
            return int(number), side == "left"
    from transformers import AutoTokenizer

    try:
        with _quiet(), _panics_as_errors():
            theirs = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: its texts are filled up, but transformers cannot read the tokenizer: {error}"
        ) from error
    if theirs.pad_token_id is None:
        raise CheckpointError(f"{folder}: its texts are filled up, but the tokenizer names no padding token.")
    return int(theirs.pad_token_id), theirs.padding_side == "left"


def _loses_words(native: tokenizers.Tokenizer | str, read: tokenizers.Tokenizer | PythonTokenizer) -> bool:
    """Whether transformers turned a vocabulary of whole words into a BPE without merges."""
    of_words = isinstance(native, tokenizers.Tokenizer) and isinstance(native.model, tokenizers.models.WordLevel)
    return of_words and isinstance(read.model, tokenizers.models.BPE)


def _native(folder: Folder) -> tokenizers.Tokenizer | str:
    """The tokenizer of a folder's tokenizer.json, or why it cannot be read."""
    path = folder.path / "tokenizer.json"
    try:
        with _panics_as_errors():
            if path.is_file():
                return tokenizers.Tokenizer.from_file(str(path))
            return tokenizers.Tokenizer.from_str(folder.text("tokenizer.json"))
    except Exception as error:  # noqa: BLE001 - the library may raise any exception
        return str(error)


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """A panic of the library's Rust code is no `Exception`; here it becomes one."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as panic:
        raise RuntimeError(str(panic)) from panic


def _truncation_side(side: object, folder: Folder) -> Literal["left", "right"]:
    """The truncation side of the files, "right" where they name none.

    Raises:
        CheckpointError: neither "left" nor "right".
    """
    if side in (None, "right"):
        return "right"
    if side != "left":
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: truncation_side must be 'left' or 'right', got {side!r}."
        )
    return "left"


def _by_transformers(folder: Folder, trust_remote_code: bool, settings: JsonObject, hides_types: bool) -> ReadTokenizer:
    """The tokenizer that AutoTokenizer builds from the files."""
    from transformers import AutoTokenizer

    with _quiet(), _panics_as_errors():
        if not folder.has("tokenizer.json") and _names_internlm2(settings):
            return ReadTokenizer(_internlm2(folder), hides_types=hides_types)
        theirs = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=trust_remote_code)
    notes: tuple[str, ...] = ()
    native = getattr(theirs, "_tokenizer", None)
    if not isinstance(native, tokenizers.Tokenizer):
        native = PythonTokenizer(theirs)
        notes = (f"Texts are tokenised by {native.name}, which is Python code and slower: no other form of it exists.",)
    elif folder.has("tokenizer.json"):
        named = {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
        notes = _about_ends(native, folder, settings, named)
    return ReadTokenizer(
        native,
        _truncation_side(theirs.truncation_side, folder),
        theirs.clean_up_tokenization_spaces is True,
        hides_types,
        notes,
    )


def _about_ends(
    native: tokenizers.Tokenizer, folder: Folder, settings: JsonObject, tokens: Mapping[str, object]
) -> tuple[str, ...]:
    """Let texts end as the checkpoint's own code ends them; notes about special tokens at the ends of texts."""
    return (*_ended(native, folder, settings, tokens), *_contradictions(native, settings, tokens))


def _ended(
    native: tokenizers.Tokenizer, folder: Folder, settings: JsonObject, tokens: Mapping[str, object]
) -> tuple[str, ...]:
    """Put the end token behind each text where code of the checkpoint does so, and not tokenizer.json; a note of it.

    gte-Qwen2 and what was trained from it have a tokenizer class of their own for this, NV-Embed does it in its model.
    """
    own = (settings.get("auto_map") or {}).get("AutoTokenizer")
    by_class = own is not None and settings.get("add_eos_token") is True
    config = folder.json("config.json", needed=False)
    by_model = config.get("model_type") == "nvembed" and config.get("add_eos") is not False
    end = tokens.get("eos_token")
    if not (by_class or by_model) or not isinstance(end, str):
        return ()
    number = native.token_to_id(end)
    if number is None or number in Template.of(native, 1).tail:
        return ()
    single, pair = (_ending(native, Template.of(native, texts), end) for texts in (1, 2))
    kept = {*Template.of(native, 1).around, *Template.of(native, 2).around}
    known = [(str(native.id_to_token(one)), one) for one in {*kept, number}]
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=known)
    # One that puts nothing around texts may still trim offsets.
    before = native.post_processor
    native.post_processor = template if kept or before is None else processors.Sequence([before, template])
    who = "the checkpoint's own tokenizer class" if by_class else "the model's own code"
    return (f"Each text ends in {end}, which {who} puts there. tokenizer.json alone does not.",)


def _ending(native: tokenizers.Tokenizer, template: Template, end: str) -> list[str]:
    """The pieces of a template with `end` behind each text, in the words of the tokenizers library."""
    pieces: list[str] = []
    texts = [f"${name}:{kind}" for name, kind in zip("AB", template.text_types, strict=False)]
    for number, (ids, kinds) in enumerate(zip(template.parts, template.part_types, strict=True)):
        around = [f"{native.id_to_token(one)}:{kind}" for one, kind in zip(ids.tolist(), kinds.tolist(), strict=True)]
        last = number == len(texts)
        if number and not last:
            pieces.append(f"{end}:{template.text_types[number - 1]}")
        pieces += around
        pieces.append(f"{end}:{template.text_types[-1]}" if last else texts[number])
    return pieces


def _contradictions(
    native: tokenizers.Tokenizer, settings: JsonObject, tokens: Mapping[str, object]
) -> tuple[str, ...]:
    """Notes where tokenizer_config.json and tokenizer.json differ about a special token at an end of each text.

    transformers 5 follows the post-processor of tokenizer.json.
    """
    template = Template.of(native, 1)
    notes = []
    for key, name, ends in (
        ("add_bos_token", "bos_token", template.head),
        ("add_eos_token", "eos_token", template.tail),
    ):
        token = tokens.get(name)
        wanted = settings.get(key)
        if not isinstance(wanted, bool) or not isinstance(token, str):
            continue
        found = native.token_to_id(token) in ends
        if wanted != found:
            end = "start" if key == "add_bos_token" else "end"
            does = "puts" if found else "puts no"
            notes.append(
                f"tokenizer_config.json says {key}: {str(wanted).lower()}, but the post-processor of tokenizer.json "
                f"{does} {token} at the {end} of a text. That is what is done, as in transformers 5; "
                "transformers 4 may have done as tokenizer_config.json says."
            )
    return tuple(notes)


@contextmanager
def _quiet() -> Iterator[None]:
    """No log of transformers; our errors and notes have what matters."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _names_internlm2(settings: JsonObject) -> bool:
    return settings.get("tokenizer_class") in ("InternLM2Tokenizer", "InternLM2TokenizerFast")


def _internlm2(folder: Folder) -> tokenizers.Tokenizer:
    """InternLM2's tokenizer, whose own class is code on the hub that transformers 5 does not run."""
    from sentencepiece import SentencePieceProcessor
    from transformers import TokenizersBackend

    backend = TokenizersBackend.from_pretrained(folder.path, local_files_only=True)
    native = tokenizers.Tokenizer.from_str(backend.backend_tokenizer.to_str())
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode("a", out_type=str)
    ours = native.encode("a", add_special_tokens=False).tokens
    if pieces[0].startswith("▁") and not ours[0].startswith("▁"):
        # transformers before 5.24 leaves out the space that sentencepiece may put before a text.
        native.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), native.normalizer])
    return native
