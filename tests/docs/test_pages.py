"""Every code block of the documents is run, or compared with what came back; `tests/docs/pages.py` says how pages mark
the few that cannot be."""

from __future__ import annotations

import ast
import gc
import io
import json
import os
import re
import shutil
import sys
import tokenize
import tomllib
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml

from poolhouse import LLM
from poolhouse.cli import process
from poolhouse.models.native import families
from poolhouse.server.process import run as server_process
from tests.cli.in_process import Run, said
from tests.docs.checkpoints import lay_out
from tests.docs.pages import OF_CLUSTERS, PAGES, ROOT, Block, blocks, commands, packages
from tests.docs.shown import compare, parse, printed
from tests.server.documented import Document
from tests.server.running import Running, served

__all__ = ["said"]  # a fixture

# A server of its own, a certificate or another program is needed.
MOST_NOT_RUN = 4
# What other programs read, or nobody.
_NOT_OURS = ("text", "mermaid", "java", "properties")
# What a comment behind a line shows: a value. Anything else is said to the reader.
_VALUE = re.compile(r"[\[('\"\d-]|(True|False|None)\b|[A-Z]\w*\(|torch\.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    lay_out(folder)
    return folder


@pytest.fixture(scope="module")
def servers(folder: Path) -> Iterator[dict[str, httpx.Client]]:
    """The servers that docs/server.md names, by their ports there; here they listen on others."""
    (block,) = (block for block in blocks("docs/server.md") if "--port 8004" in block.text)
    lines: dict[str, list[str]] = {}
    for words, _ in commands(block):
        port = words.index("--port")
        lines[words[port + 1]] = words[2:port] + words[port + 2 :]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running, ThreadPoolExecutor() as starters:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
        clients = starters.map(lambda words: running.enter_context(served(folder, *words)), lines.values())
        yield dict(zip(lines, clients, strict=True))


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(
    page: str,
    folder: Path,
    servers: dict[str, httpx.Client],
    said: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_page(page, folder, servers, said, monkeypatch, python=not packages(page))


def run_page(
    page: str,
    folder: Path,
    servers: dict[str, httpx.Client],
    said: Run,
    monkeypatch: pytest.MonkeyPatch,
    *,
    python: bool,
) -> None:
    """Run the blocks of a page one after another, and hold what comes against what is shown.

    python: whether to run those of Python, or to compile them alone.
    """
    monkeypatch.chdir(folder)
    # Another page's job.
    shutil.rmtree("vectors", ignore_errors=True)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # docs/add_a_model.md adds one.
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES)
    names: dict[str, Any] = {}

    def hold(block: Block) -> None:
        """Run a block, or compare it."""
        if block.language == "python" and (not python or block.mark == "not run"):
            compile(block.text, str(block), "exec")
        elif block.language == "python":
            _python(block, block.text, names, servers)
        elif block.language == "diff":
            _python(block, re.sub(r"^-.*|^[+ ]", "", block.text, flags=re.MULTILINE), names, servers)
        elif block.language in ("sh", "console"):
            for words, shown in commands(block):
                _command(block, words, shown, servers, said, monkeypatch)
        elif block.language == "json":
            parse(block.text)
        elif block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict)
        elif block.language == "promql":
            metrics = servers["8000"].get("/metrics").text
            for name in re.findall(r"poolhouse_\w+", block.text):
                assert re.sub("_(bucket|sum|count)$", "", name) in metrics, f"{block}: {name}"
        else:
            assert block.language in _NOT_OURS, f"{block}: a block of {block.language or 'no language'}"
            if "request_id=" in block.text:
                _log_line(block)

    wrong = []
    try:
        for block in blocks(page):
            # What comes from a file is tested there.
            if block.mark is None or (block.mark == "not run" and block.language == "python"):
                try:
                    hold(block)
                except AssertionError as error:
                    wrong.append(str(error))
    finally:
        for value in names.values():
            if isinstance(value, LLM):
                value.close()
        # Clients that a page leaves open, which others would trip over.
        names.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
    assert not wrong, "\n".join(wrong)


def test_few_blocks_are_not_run() -> None:
    left_out = {str(block): block.value for page in PAGES for block in blocks(page) if block.mark == "not run"}
    assert len(left_out) <= MOST_NOT_RUN, left_out
    assert all(left_out.values()), "each says why"


def test_links_within_the_documents_lead_somewhere() -> None:
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert anchor in {_anchor(heading) for heading in headings}, f"{page}: {target}"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _python(block: Block, text: str, names: dict[str, Any], servers: dict[str, httpx.Client]) -> None:
    """Run it after the blocks before it, and hold what it prints against the comments that show it.

    A comment behind a line shows what the line prints, or the value of its expression; comments below a line that
    prints are what it prints.
    """
    source = _there(text, servers)
    tree = ast.parse(source)
    for place, node in enumerate(tree.body):
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            shown = ast.Call(ast.Name("_show", ast.Load()), [ast.Constant(node.end_lineno), node.value], [])
            tree.body[place] = ast.Expr(shown)
    ast.increment_lineno(ast.fix_missing_locations(tree), block.line - 1)
    got: dict[int, list[str]] = defaultdict(list)

    def show(line: int, value: object) -> None:
        if value is not None:
            got[line].append(repr(value))

    def record(*values: object) -> None:
        got[sys._getframe(1).f_lineno - block.line + 1] += " ".join(map(str, values)).splitlines()

    names |= {"_show": show, "print": record, "__name__": "example"}
    with warnings.catch_warnings():
        # Such as of options that mean nothing here; former words are errors.
        warnings.simplefilter("ignore", UserWarning)
        exec(compile(tree, block.page, "exec"), names)
    for line, comments in _comments(source).items():
        for place, comment in enumerate(comments):
            lines = got[line]
            assert place < len(lines), f"{block}, line {line}: {comment!r} was not printed"
            assert printed(comment, lines[place]), f"{block}, line {line}: {comment!r} is shown, {lines[place]!r} came"


def _comments(source: str) -> dict[int, list[str]]:
    """What comments show, by the line that prints it."""
    lines = source.splitlines()
    found: dict[int, list[str]] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        comment, number = token.string.removeprefix("#").strip(), token.start[0]
        if lines[number - 1].lstrip().startswith("#"):
            above = number - 1
            while above and lines[above - 1].lstrip().startswith("#"):
                above -= 1
            if above and lines[above - 1].lstrip().startswith("print("):
                found.setdefault(above, []).append(comment)
        elif _VALUE.match(comment):
            found[number] = [comment]
    return found


def _command(
    block: Block,
    words: list[str],
    shown: str,
    servers: dict[str, httpx.Client],
    said: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, *arguments = words
    if program == "curl":
        _curl(block, arguments, shown, servers)
    elif program == "poolhouse":
        _poolhouse(block, [_there(word, servers) for word in arguments], shown, said, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets), f"{block}: {words}"
    elif program in ("pip", ".venv/bin/pip"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"\[([\w,-]+)\]", " ".join(arguments)):
            assert set(extra.split(",")) <= set(extras), f"{block}: {words}"
    elif program not in OF_CLUSTERS:
        # Programs of the repository: their files are there, and know their options.
        assert program in ("python", ".venv/bin/python", ".venv/bin/ruff", ".venv/bin/pre-commit"), f"{block}: {words}"
        for word in arguments:
            assert not re.match(r"(tests|benchmarks|examples|src)/", word) or (ROOT / word).exists(), f"{block}: {word}"
        if arguments[0].startswith("benchmarks/"):
            script = (ROOT / arguments[0]).read_text()
            for option in (word for word in arguments if word.startswith("--")):
                assert f'"{option}"' in script, f"{block}: {option}"


def _poolhouse(block: Block, arguments: list[str], shown: str, said: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command; of those that would serve or measure for long, read the options alone."""
    with monkeypatch.context() as patch:
        if arguments[0] == "serve":
            patch.setattr(process, "begin", lambda _: None)
            patch.setattr(server_process, "serve", lambda *_: None)
        elif arguments[0] == "bench":
            patch.setattr(typer.core.TyperCommand, "invoke", lambda *_: None)
        done = said(*arguments)
    if shown.startswith("poolhouse: "):
        assert (done.status != 0, done.error) == (True, shown), block
    elif not (arguments[0] == "serve" and shown.startswith("Poolhouse serves all-MiniLM-L6-v2 on http://")):
        assert done.status == 0, f"{block}: {arguments}: {done.error}"
        got = done.out.decode().splitlines()
        for line, expected in enumerate(shown.splitlines()):
            if expected.startswith("{"):
                compare(parse(expected), json.loads(got[line]), numbers=True)
            else:
                assert printed(expected, got[line]), f"{block}: {expected!r} is shown, {got[line]!r} came"


def _curl(block: Block, arguments: list[str], shown: str, servers: dict[str, httpx.Client]) -> None:
    """Ask the server, hold its reply against its OpenAPI document, and against what is shown."""
    method, headers, body, url, head = "GET", {}, None, "", False
    words = iter(arguments)
    for word in words:
        if word == "-H":
            name, _, value = next(words).partition(":")
            headers[name] = value.strip()
        elif word == "-d":
            method, body = "POST", next(words)
        elif word == "-X":
            method = next(words)
        elif word in ("-D", "-o"):
            head = True
            next(words)
        elif word.startswith("-"):
            assert set(word) <= set("-si"), f"{block}: curl {word}"
            head = head or "i" in word
        else:
            url = word
    port, path = re.fullmatch(r"(?:http://)?localhost:(\d+)(/.*)", url).groups()  # type: ignore[union-attr]
    client = servers[port]
    reply = client.request(method, path, content=body, headers=headers)
    _document(client).check(reply)
    if head:
        shown = _headers(block, reply, shown)
    if shown.strip():
        content = json.loads(reply.content)
        try:
            compare(parse(shown), content, numbers=port in ("8000", "8003", "8004"))
        except AssertionError as error:
            raise AssertionError(f"{block}: {path}: {error}\n{reply.text[:1000]}") from None
    else:
        assert reply.is_success, f"{block}: {reply.text}"


def _headers(block: Block, reply: httpx.Response, shown: str) -> str:
    """Hold the headers against those that are shown; what is shown of the body is left."""
    first, *lines = shown.splitlines()
    assert first == f"HTTP/1.1 {reply.status_code} {reply.reason_phrase}", block
    # A long header goes on in lines that begin with a blank.
    unfolded = "\n".join(lines).replace("\n ", " ").splitlines()
    for number, line in enumerate(unfolded):
        if line == "..." or line.startswith(("{", "[")):
            return "\n".join(unfolded[number + (line == "...") :])
        name, _, value = line.partition(": ")
        got = reply.headers[name]
        if value.startswith("{"):
            compare(parse(value), json.loads(got), numbers=True)
        else:
            assert got.isdigit() if name.endswith("-time") else got == value, f"{block}: {name}: {got}"
    return ""


def _log_line(block: Block) -> None:
    """A request leaves such a line."""
    server = Running("engines = [FakeEngine('all-MiniLM-L6-v2')]").ready()
    body, headers = {"input": ["a", "b"]}, {"X-Request-Id": "order-66"}
    httpx.post(f"{server.url}/v1/embeddings", json=body, headers=headers, trust_env=False)
    (line,) = (line for line in server.stop()[1].splitlines() if "request_id=order-66" in line)
    shown, got = (
        re.sub(r"\d+", "#", re.sub(r"(client|tokens)=\S+", r"\1=", text.strip())) for text in (block.text, line)
    )
    assert shown == got, block


def _there(text: str, servers: dict[str, httpx.Client]) -> str:
    """The text with the addresses where the servers listen here."""
    return re.sub(
        r"http://localhost:(\d+)",
        lambda found: str(servers[found[1]].base_url).rstrip("/") if found[1] in servers else found[0],
        text,
    )


@cache
def _document(client: httpx.Client) -> Document:
    return Document(client.get("/openapi.json").json())
