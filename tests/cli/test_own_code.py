"""`poolhouse check --trust-remote-code`: a checkpoint beside its own code, which is right, wrong, or does not run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.cli.in_process import RunText, run, said
from tests.models.embedding_rows import ROWS
from tests.models.hub_layout import write
from tests.models.parity import change_config

__all__ = ["run", "said"]

QWEN2 = "a bidirectional Qwen2"
CODE = """
from transformers import Qwen2Model

class {name}(Qwen2Model):
    def __init__(self, config):
        config.is_causal = {causal}
        super().__init__(config)
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", os.fspath(tmp_path / "modules"))


def brought(folder: Path, name: str = "QZhouModel", causal: bool = False, code: str = CODE) -> Path:
    """A repository with code of its own; the name says what we take it for, the code what it is."""
    write(ROWS[QWEN2], folder, folder.parent / "twin")
    (folder / "modeling_own.py").write_text(code.format(name=name, causal=causal))
    change_config(folder, is_causal=None, architectures=[name], auto_map={"AutoModel": f"modeling_own.{name}"})
    return folder


@pytest.mark.parametrize("files", [True, False], ids=["vectors of texts", "states of tokens"])
def test_the_own_code_of_a_checkpoint_is_the_reference(files: bool, tmp_path: Path, run: RunText) -> None:
    folder = brought(tmp_path / "own")
    if not files:
        (folder / "modules.json").unlink()
    done = run("check", str(folder), "--trust-remote-code", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    (compared,) = answer["comparisons"]
    assert compared["with"] == "the model's own code"
    assert ("texts" if files else "tokens") in compared["words"]
    assert float(compared["words"].rsplit(" ", 1)[1].rstrip(".")) > 0.99999
    assert answer["verdict"] == "OK: the model loads, and answers as the model's own code."


@pytest.mark.parametrize("files", [True, False], ids=["vectors of texts", "states of tokens"])
def test_code_that_does_something_else_fails_the_check(files: bool, tmp_path: Path, run: RunText) -> None:
    """A class that we do not know: its file looks both ways, and the native family does not."""
    folder = brought(tmp_path / "own", name="UnheardOfModel")
    if not files:
        (folder / "modules.json").unlink()
    done = run("check", str(folder), "--trust-remote-code")
    assert done.returncode == 1
    assert "code of its own (modeling_own.UnheardOfModel), which was not run" in done.stdout
    assert "The answers differ from the model's own code." in done.stderr
    assert "lowest cosine" in done.stdout


def test_own_code_runs_only_where_the_user_says_so(tmp_path: Path, run: RunText) -> None:
    mark = tmp_path / "was here"
    folder = brought(tmp_path / "own", code=f"open({os.fspath(mark)!r}, 'w').close()\n" + CODE)
    assert run("check", str(folder)).returncode == 0
    assert not mark.exists()


def test_code_that_does_not_run_is_one_clear_line(tmp_path: Path, run: RunText) -> None:
    folder = brought(tmp_path / "own", code="import no_such_package_of_it\n" + CODE)
    done = run("check", str(folder), "--trust-remote-code")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search("own code does not run: .*no_such_package_of_it", done.stderr), done.stderr


def test_another_tokenizer_of_its_own_is_named(tmp_path: Path, run: RunText) -> None:
    folder = brought(tmp_path / "own")
    (folder / "modules.json").unlink()
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizerFast(PreTrainedTokenizerFast):\n"
        "    def __call__(self, *given, **more):\n"
        "        answer = super().__call__(*given, **more)\n"
        "        return {key: value[:-1] for key, value in answer.items()}\n"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"auto_map": own, "tokenizer_class": "OwnTokenizerFast"})
    )
    done = run("check", str(folder), "--trust-remote-code")
    assert done.returncode == 1
    assert "own tokenizer makes other tokens" in done.stderr


def test_a_checkpoint_without_code_is_compared_as_ever(tmp_path: Path, run: RunText) -> None:
    write(ROWS["BAAI/bge-small-en-v1.5, bge-base-en-v1.5"], tmp_path / "plain", tmp_path / "twin")
    done = run("check", str(tmp_path / "plain"), "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "OK: the model loads, and answers as the reference, sentence-transformers."
