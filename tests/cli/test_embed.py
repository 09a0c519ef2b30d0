"""What `embed` and its neighbours do with people's files."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from poolhouse import LLM, ConfigError, TokenEmbeddings
from poolhouse.files import whole_file
from poolhouse.vectors.precision import Calibration
from tests.cli.in_process import Run, said

__all__ = ["said"]

OLD = b"what stood there\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Bytes of a file, and the texts in it.
LINES: dict[str, tuple[bytes, list[str]]] = {
    "an empty line": (b"one\n\ntwo\n", ["one", "", "two"]),
    "blanks": (b"one\n  \n\t\n", ["one", "  ", "\t"]),
    "nothing but ends": (b"\n\n", ["", ""]),
    "no last end": (b"one\ntwo", ["one", "two"]),
    "CRLF": (b"one\r\n\r\ntwo\r\n", ["one", "", "two"]),
    "both ends": (b"one\r\ntwo\nthree\r\r\n", ["one", "two", "three\r"]),
    "a lone CR": (b"one\rstill one\ntwo\n", ["one\rstill one", "two"]),
    "form feed, vertical tab": (b"a\x0cb\x0bc\nd\n", ["a\x0cb\x0bc", "d"]),
    "ends of Unicode": ("a\u2028b\u2029c\u0085d\ne\n".encode(), ["a\u2028b\u2029c\u0085d", "e"]),
    "separators of ASCII": (b"a\x1cb\x1dc\x1ed\ne\n", ["a\x1cb\x1dc\x1ed", "e"]),
    "a BOM": (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
    "a BOM within": (b"one\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
    "NUL": (b"a\0b\nc\n", ["a\0b", "c"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINES)
def test_every_line_is_a_text_of_its_own(kind: str, said: Run, place: Path, model: str) -> None:
    content, texts = LINES[kind]
    Path("texts.txt").write_bytes(content)
    for source in (("-i", "texts.txt"), ()):
        done = said("embed", *source, "--model", model, stdin=b"" if source else content)
        assert [json.loads(line)["text"] for line in done.out.splitlines()] == texts, done.error
    assert said("embed", "-i", "texts.txt", "-o", "rows.npy", "--model", model).status == 0
    tokens = said("embed", "--tokens", "-i", "texts.txt", "-o", "tokens.npz", "--model", model)
    assert tokens.status == 0, tokens.error
    with LLM(model) as llm:
        expected = llm.embed_array(texts)
    assert np.allclose(np.load("rows.npy"), expected, atol=1e-6)
    assert len(TokenEmbeddings.load("tokens.npz")) == len(texts)


ROWS = ["plain", "", 'two\nlines, and a "quote"', "a\u2028b", "x" * 200_000]


def rows_of(form: str, path: Path, column: str = "text") -> None:
    """ROWS as a file of this form, beside a column of numbers."""
    cells = list(enumerate(ROWS))
    if form == "parquet":
        table = pyarrow.table({"id": [number for number, _ in cells], column: ROWS})
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif form in ("csv", "tsv"):
        mark = "," if form == "csv" else "\t"
        quoted = ['"' + text.replace('"', '""') + '"' for text in ROWS]
        lines = [
            f"id{mark}{column}",
            *(f"{number}{mark}{text}" for number, text in zip(range(9), quoted, strict=False)),
        ]
        path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    else:
        path.write_text("".join(json.dumps({"id": number, column: text}) + "\n" for number, text in cells))


@pytest.mark.parametrize(("name", "form"), [("a.jsonl", "jsonl"), ("a.ndjson", "jsonl"), ("a.CSV", "csv"), ("a.tsv", "tsv"), ("a.parquet", "parquet")])  # fmt: skip
def test_files_of_rows_are_read_as_what_they_are(name: str, form: str, said: Run, place: Path, model: str) -> None:
    for column, options in (("text", ()), ("body", ("--column", "body"))):
        rows_of(form, Path(name), column)
        done = said("embed", "-i", name, "--model", model, "--overflow", "truncate", *options)
        assert [json.loads(line)["text"] for line in done.out.splitlines()] == ROWS, done.error
    Path(name).rename("anything")
    done = said(
        "embed",
        "-i",
        "anything",
        "--input-format",
        form,
        "--model",
        model,
        "--overflow",
        "truncate",
        "--column",
        "body",
    )
    assert len(done.out.splitlines()) == len(ROWS), done.error
    assert "no c" in said("embed", "-i", "anything", "--input-format", form, "--model", model).error or form == "jsonl"


def test_a_line_of_json_may_be_a_text_alone(said: Run, place: Path, model: str) -> None:
    done = said("embed", "--input-format", "jsonl", "--model", model, stdin=b'"one"\n{"text": ""}\n')
    assert [json.loads(line)["text"] for line in done.out.splitlines()] == ["one", ""]


# A file's name and bytes, and what is said of it.
WRONG: dict[str, tuple[str, bytes, str]] = {
    "no UTF-8": ("a.txt", b"one\n\xff\n", "Line 2 of a.txt is not UTF-8"),
    "no UTF-8 in JSON": ("a.jsonl", b'"one"\n"\xff"\n', "Line 2 of a.jsonl is not UTF-8"),
    "no UTF-8 in a table": ("a.csv", b"text\none\n\xff\n", "Line 3 of a.csv is not UTF-8"),
    "UTF-16": ("a.txt", "one\ntwo\n".encode("utf-16"), "a.txt is not UTF-8; it looks like UTF-16"),
    "UTF-16 without a mark": ("a.txt", "one\ntwo\n".encode("utf-16-le"), "a.txt is not UTF-8; it looks like UTF-16"),
    "UTF-16, high bytes first": ("a.txt", "one\ntwo\n".encode("utf-16-be"), "a.txt is not UTF-8; it looks like UTF-16"),
    "lines that end with CR": ("a.txt", b"one\rtwo\rthree\r", "a.txt ends its lines with \\r alone"),
    "nothing": ("a.txt", b"", "There is no text in a.txt"),
    "nothing but a head": ("a.csv", b"id,text\n", "There is no text in a.csv"),
    "too long": ("a.txt", b"one\n" + b"word " * 500 + b"\n", "Line 2 of a.txt: This model's maximum context length is 64 tokens"),
    "too long a row": ("a.csv", b'text\n"o\nn\ne"\n' + b"word " * 500 + b"\n", "Line 5 of a.csv: This model's maximum"),
    "no JSON": ("a.jsonl", b'"one"\n{"text": 1\n', "Line 2 of a.jsonl is not JSON"),
    "an empty line of JSON": ("a.jsonl", b'"one"\n\n"two"\n', "Line 2 of a.jsonl is not JSON"),
    "half a character": ("a.jsonl", b'"one"\n{"text": "\\ud800"}\n', "Line 2 of a.jsonl is not JSON"),
    "no field": ("a.jsonl", b'{"txt": "one"}\n', "Line 1 of a.jsonl has no field 'text'. --column names one of: txt. Did you mean 'txt'?"),
    "a number": ("a.jsonl", b'{"text": 1}\n', "Line 1 of a.jsonl: 'text' is no text but 1"),
    "null": ("a.jsonl", b'{"text": null}\n', "Line 1 of a.jsonl: 'text' is no text but null"),
    "a list": ("a.jsonl", b'["one"]\n', 'Line 1 of a.jsonl is no text but ["one"]'),
    "no column": ("a.csv", b"id;text\n1;one\n", "a.csv has no column 'text' in its first line. --column names one of: id;text"),
    "a column twice": ("a.csv", b"text,text\none,two\n", "a.csv has two columns 'text'"),
    "a short row": ("a.csv", b"id,text\n1,one\n2\n", "Line 3 of a.csv has 1 cells; the first line has 2"),
    "an empty row": ("a.csv", b"id,text\n1,one\n\n", "Line 3 of a.csv has 0 cells"),
    "an open quote": ("a.csv", b'id,text\n1,"one\n2,two\n', "Line 2 of a.csv cannot be read as a row"),
    "no Parquet": ("a.parquet", b"one\n", "a.parquet cannot be read as Parquet"),
    "an array of JSON": ("a.json", b'["one"]', "files that end with .json are not read"),
    "packed": ("a.txt.gz", b"\x1f\x8b", "files that end with .gz are not read"),
    "packed, without an ending": ("a", b"\x1f\x8b\n", "Line 1 of a is not UTF-8"),
}  # fmt: skip


OUTPUTS: list[tuple[str, *tuple[str, ...]]] = [
    ("o.jsonl",), ("o.npy",), ("o.npz", "--tokens"), ("o.arrow", "--tokens"),
]  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_in_a_file_is_said_with_its_place_and_harms_nothing(
    kind: str, said: Run, place: Path, model: str
) -> None:
    name, content, words = WRONG[kind]
    Path(name).write_bytes(content)
    # A text that is too long is found while others are written; all else is found as it is read.
    for output, *options in OUTPUTS if kind == "too long" else OUTPUTS[:1]:
        Path(output).write_bytes(OLD)
        done = said("embed", "-i", name, "-o", output, "--model", model, *options)
        assert done.status in (1, 2)
        assert words in done.error, done.error
        assert "truncate_prompt_tokens" not in done.error
        assert "output tokens" not in done.error
        assert Path(output).read_bytes() == OLD
    assert {path.name for path in place.iterdir()} <= {name, *(output for output, *_ in OUTPUTS)}
    Path("o.npy").write_bytes(OLD)
    done = said("calibrate", model, "-i", name, "-o", "o.npy")
    assert words in done.error
    assert Path("o.npy").read_bytes() == OLD


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"text": ["a", None]}, "Row 2 of a.parquet: 'text' is no text but None"),
        ({"text": [1, 2]}, "a.parquet: 'text' holds no texts but int64"),
        ({"texts": ["a"]}, "a.parquet has no column 'text'. --column names one of: texts. Did you mean 'texts'?"),
    ],
)
def test_what_is_wrong_in_a_parquet_file_is_said(
    column: dict[str, Any], words: str, said: Run, place: Path, model: str
) -> None:
    pyarrow.parquet.write_table(pyarrow.table(column), "a.parquet")
    done = said("embed", "-i", "a.parquet", "-o", "o.npy", "--model", model)
    assert (done.status, words in done.error) == (2, True), done.error
    assert not Path("o.npy").exists()


def test_parquet_without_pyarrow_says_what_to_install(
    said: Run, place: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of("parquet", Path("a.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install 'poolhouse[arrow]'" in said("embed", "-i", "a.parquet", "--model", model).error


def test_json_lines_that_are_read_as_texts_are_a_warning(said: Run, place: Path, model: str) -> None:
    done = said("embed", "--model", model, stdin=b'{"text": "one"}\n')
    assert json.loads(done.out)["text"] == '{"text": "one"}'
    assert "standard input is read as lines, although the first is a JSON object; --input-format jsonl" in done.error


@pytest.mark.parametrize(
    ("output", "options", "words"),
    [
        ("v.npy", (), None),
        ("v.NPY", (), None),
        ("v.jsonl", (), None),
        ("v", (), None),
        ("v", ("-f", "npy"), None),
        ("v.dat", ("-f", "npy"), None),
        ("v.safetensors", ("--tokens",), None),
        ("v.arrow", ("--tokens",), None),
        ("v.npy", ("-f", "jsonl"), "--format jsonl contradicts the ending of --output v.npy"),
        ("v.jsonl", ("-f", "npy"), "--format npy contradicts the ending of --output v.jsonl"),
        ("v.npz", ("--tokens", "-f", "arrow"), "--format arrow contradicts the ending of --output v.npz"),
        ("v.npz", (), "--format npz is for --tokens"),
        ("v.npy", ("--tokens",), "--format npy is not for --tokens"),
        ("v.csv", (), ".csv is no format that is written; what is: jsonl, npy"),
        ("v.parquet", ("-f", "npy"), ".parquet is no format that is written"),
        ("v.jsonl.gz", ("-f", "jsonl"), ".gz is no format that is written"),
        ("v.txt", (), ".txt is no format that is written"),
        ("v", ("-f", "jsnl"), "--format jsnl is not one of jsonl, npy, npz, safetensors, arrow. Did you mean 'jsonl'?"),
    ],
)  # fmt: skip
def test_the_format_follows_the_ending_and_never_contradicts_it(
    output: str, options: tuple[str, ...], words: str | None, said: Run, place: Path, model: str
) -> None:
    done = said("embed", "-o", output, "--model", model, *options, stdin=b"one\ntwo\n")
    if words is not None:
        assert (done.status, words in done.error) == (2, True), done.error
        assert not Path(output).exists()
        return
    assert done.status == 0, done.error
    if "--tokens" in options:
        assert len(TokenEmbeddings.load(output)) == 2
    elif "npy" in output.lower() or "npy" in options:
        assert np.load(output).shape == (2, 32)
    else:
        assert len([json.loads(line) for line in Path(output).read_text().splitlines()]) == 2


@pytest.mark.parametrize("other", ["same", "./same", "hard", "soft", "folder/../same"])
@pytest.mark.parametrize("command", ["embed", "embed --tokens", "calibrate", "bench serve"])
def test_what_is_read_is_not_written(command: str, other: str, said: Run, place: Path, model: str) -> None:
    Path("same").write_bytes(b"one\ntwo\n")
    Path("hard").hardlink_to("same")
    Path("soft").symlink_to("same")
    Path("folder").mkdir()
    rest = {
        "embed": ("-i", "same", "-o", other, "--model", model),
        "embed --tokens": ("-i", "same", "-o", other, "--model", model, "-f", "npz"),
        "calibrate": (model, "-i", "same", "-o", other),
        "bench serve": ("--dataset", "same", "--json", other),
    }
    done = said(*command.split(), *rest[command])
    assert (done.status, "is both what is read and what would be written" in done.error) == (2, True), done.error
    assert Path("same").read_bytes() == b"one\ntwo\n"


def test_standard_input_and_output_are_not_one_file(place: Path, model: str) -> None:
    Path("same").write_bytes(b"one\ntwo\n")
    for arguments in (["-i", "same"], [], ["-o", "same"]):
        with Path("same").open("rb") as source, Path("same").open("ab") as sink:
            done = subprocess.run(
                [sys.executable, "-m", "poolhouse.cli", "embed", "--model", model, *arguments],
                stdin=source, stdout=sink if "-o" not in arguments else subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
            )  # fmt: skip
        assert (done.returncode, b"is both what is read" in done.stderr) == (2, True), done.stderr
        assert Path("same").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize(
    ("words", "options", "said_of_it"),
    [
        (["folder"], (), "folder is a folder. A model is named by --model folder"),
        (["texts"], (), "texts names a file. Texts of a file are read by --input texts"),
        (["one", "texts"], (), "texts names a file"),
        (["./nothing"], (), "./nothing names a file"),
        (["/no/such"], (), "/no/such names a file"),
        (["nothing.jsonl"], (), "nothing.jsonl names a file"),
        (["BAAI/bge-m3"], (), "BAAI/bge-m3 may be a model of the hub, which is named by --model BAAI/bge-m3"),
        (["all-MiniLM-L6-v2"], (), "all-MiniLM-L6-v2 may be a model"),
        (["one"], ("-i", "texts"), "Texts come as arguments or from --input texts, not both"),
        (["one"], ("--column", "x"), "--column is for --input"),
        (["one"], ("--input-format", "csv"), "--input-format is for --input"),
    ],
)
def test_a_file_or_a_model_is_not_embedded_as_words(
    words: list[str], options: tuple[str, ...], said_of_it: str, said: Run, place: Path
) -> None:
    Path("folder").mkdir()
    Path("texts").touch()
    done = said("embed", *words, *options)
    assert (done.status, said_of_it in done.error, done.out) == (2, True, b""), done.error


def test_words_that_look_like_a_model_are_texts_where_the_model_is_named(said: Run, place: Path, model: str) -> None:
    texts = ["TCP/IP", "km/h", "a/b/c", "and / or", "", "word " * 100, "x" * 5000, "a\0b"]
    done = said("embed", *texts, "--model", model, "--overflow", "truncate")
    assert [json.loads(line)["text"] for line in done.out.splitlines()] == texts, done.error


SLOW = """
import sys, time
from poolhouse.cli import main, texts
answered = texts.answered
def slowly(*arguments):
    for group in answered(*arguments):
        yield group
        print("halfway", file=sys.stderr, flush=True)
        time.sleep(60)
texts.answered = slowly
sys.argv = ["poolhouse", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_run_leaves_what_stood_there(number: signal.Signals, place: Path, model: str) -> None:
    Path("o.npy").write_bytes(OLD)
    line = [sys.executable, "-c", SLOW, "embed", "-o", "o.npy", "--model", model]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b"one\ntwo\n")
    process.stdin.close()
    assert b"halfway" in iter(process.stderr.readline, b"").__next__()
    assert len(list(place.iterdir())) == 2
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert [(path.name, path.read_bytes()) for path in place.iterdir()] == [("o.npy", OLD)]


@pytest.mark.parametrize(
    ("output", "options"),
    [("o.jsonl", ()), ("o.npy", ()), ("o.npz", ("--tokens",)), ("o.safetensors", ("--tokens",)), ("o.arrow", ("--tokens",))],
)  # fmt: skip
def test_a_full_disk_leaves_what_stood_there(
    output: str, options: tuple[str, ...], said: Run, place: Path, model: str
) -> None:
    """A limit on the size of files stands for the disk."""
    Path(output).write_bytes(OLD)
    Path("texts").write_text("one two three\n" * 200)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        done = said("embed", "-i", "texts", "-o", output, "--model", model, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.status == 1
    assert "File too large" in done.error
    assert output in done.error
    assert Path(output).read_bytes() == OLD
    assert len(list(place.iterdir())) == 2


def test_a_device_that_is_full_is_an_error(said: Run, model: str) -> None:
    assert "No space left" in said("embed", "one", "-o", "/dev/full", "--model", model).error
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "poolhouse.cli", "embed", "one", "--model", model],
            stdout=full, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert (done.returncode, b"No space left" in done.stderr, b"Traceback" in done.stderr) == (1, True, False)


@pytest.mark.parametrize(("closed", "words"), [("<&-", "Standard input is closed"), (">&-", "Standard output is closed"), ("| head -c 1", "")])  # fmt: skip
def test_closed_ends_are_no_traceback(closed: str, words: str, model: str) -> None:
    line = f"yes text | head -3000 | '{sys.executable}' -m poolhouse.cli embed --model '{model}'"
    if closed == "<&-":
        line = line.partition("| ")[2].partition("| ")[2]
    done = subprocess.run(["/bin/bash", "-c", f"{line} {closed}"], capture_output=True, text=True, check=False)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_file_keeps_its_permissions_and_a_link_stays_one(place: Path) -> None:
    Path("kept").write_bytes(OLD)
    Path("kept").chmod(0o640)
    Path("link").symlink_to("kept")
    Path("dangling").symlink_to("made")
    for name in ("link", "dangling", "fresh"):
        with whole_file(name) as part:
            part.write_bytes(b"new")
    assert stat.S_IMODE(Path("kept").stat().st_mode) == 0o640
    assert [Path(name).read_bytes() for name in ("kept", "made", "fresh")] == [b"new"] * 3
    assert [Path(name).is_symlink() for name in ("link", "dangling", "fresh")] == [True, True, False]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(Path("fresh").stat().st_mode) == 0o666 & ~mask


def test_a_file_of_the_longest_name_can_be_written(place: Path) -> None:
    name = "n" * 255
    with whole_file(name) as part:
        part.write_bytes(b"new")
    assert Path(name).read_bytes() == b"new"


def test_pipes_and_devices_are_written(said: Run, place: Path, model: str) -> None:
    for form in ("jsonl", "npy"):
        os.mkfifo(form)
        reader = subprocess.Popen(["/bin/cat", form], stdout=subprocess.PIPE)
        done = said("embed", "one", "two", "--model", model, "-f", form, "-o", form)
        assert done.status == 0, done.error
        got = reader.communicate()[0]
        rows = np.load(io.BytesIO(got)) if form == "npy" else got.splitlines()
        assert len(rows) == 2
        assert stat.S_ISFIFO(Path(form).stat().st_mode)
    assert said("embed", "one", "-f", "npy", "-o", "/dev/null", "--model", model).status == 0


@pytest.mark.parametrize("output", ["folder", "nowhere/o.npy", "locked/o.npy"])
def test_a_place_that_cannot_be_written_is_said_before_the_work(output: str, said: Run, place: Path) -> None:
    Path("folder").mkdir()
    Path("locked").write_bytes(b"")
    done = said("embed", "one", "-f", "npy", "-o", output, "--model", "/no/model")
    assert output in done.error
    assert "/no/model" not in done.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_refused(place: Path) -> None:
    Path("kept").write_bytes(OLD)
    Path("kept").chmod(0o444)
    with pytest.raises(ConfigError, match="kept may not be written"), whole_file("kept"):
        pass


def test_calibrations_and_token_vectors_saved_from_python_are_whole(place: Path) -> None:
    vectors = np.ones((3, 4), np.float32)
    for save, name in (
        (Calibration.of(vectors).save, "ranges"),
        (TokenEmbeddings.of([vectors]).save, "tokens.npz"),
        (TokenEmbeddings.of([vectors]).save, "tokens.safetensors"),
        (TokenEmbeddings.of([vectors]).save, "tokens.arrow"),
    ):
        Path(name).write_bytes(OLD)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            with pytest.raises(OSError, match="too large"):
                save(name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert Path(name).read_bytes() == OLD
    assert len(list(place.iterdir())) == 4


def test_rows_of_several_groups_are_one_matrix(
    said: Run, place: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("poolhouse.cli.texts._AT_ONCE", 3)
    texts = [f"text {'and more ' * number}" for number in range(10)]
    Path("texts").write_text("\n".join(texts))
    done = said("embed", "-i", "texts", "-o", "o.npy", "--model", model)
    assert done.status == 0, done.error
    with LLM(model) as llm:
        assert np.allclose(np.load("o.npy"), llm.embed_array(texts), atol=1e-6)
    Path("texts").write_text("\n".join([*texts, "word " * 500]))
    assert "Line 11 of texts: " in said("embed", "-i", "texts", "-o", "o.npy", "--model", model).error
