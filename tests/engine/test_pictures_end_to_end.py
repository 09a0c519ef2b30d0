"""The engine with pictures: through LLM and over HTTP, from strangers' sources too."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from poolhouse import LLM
from poolhouse.errors import ConfigError, InvalidRequest
from poolhouse.server.app import create_app
from tests.inputs.sources import source, whole
from tests.models.qwen_vl import pictures
from tests.models.test_colqwen3 import LAYOUTS, made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colqwen3")
    made(LAYOUTS["tomoro"], folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, allowed_media_domains="127.0.0.1") as made:
        yield made


def test_a_picture_has_the_same_vectors_from_every_source(llm: LLM, tmp_path: Path) -> None:
    picture = pictures()[0]
    file = tmp_path / "a.png"
    picture.save(file)
    with source({"/a.png": file.read_bytes()}) as served:
        sources = [
            picture,
            np.asarray(picture),
            file.read_bytes(),
            str(file),
            file,
            file.as_uri(),
            served.url("/a.png"),
        ]
        prompts = [{"content": [{"type": "image", "image": one}]} for one in sources]
        outputs = llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
    for output in outputs:
        np.testing.assert_array_equal(output.outputs.data, outputs[0].outputs.data)


def test_pictures_of_a_call_of_many_are_those_of_calls_of_one(llm: LLM) -> None:
    prompts = [{"content": [picture, "words", picture.rotate(90)]} for picture in pictures()] + ["a text"]
    together = llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = llm.encode([prompt], pooling_task="token_embed", use_tqdm=False)
        np.testing.assert_allclose(output.outputs.data, alone.outputs.data, atol=1e-5)


def test_an_error_names_the_item_once(llm: LLM) -> None:
    prompts = ["a text", {"content": ["words", {"type": "image", "image": b"no picture"}]}]
    with pytest.raises(InvalidRequest, match=r"^prompts\[1\]\.content\[1\]: these 10 bytes are no picture"):
        llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)


def test_options_reach_the_stage(folder: Path) -> None:
    picture = pictures()[0]
    with LLM(folder, limit_mm_per_prompt={"image": 1}, mm_processor_kwargs={"max_pixels": 128}) as small:
        (output,) = small.encode([picture], pooling_task="token_embed", use_tqdm=False)
        with pytest.raises(InvalidRequest, match="At most 1 image"):
            small.encode([{"content": [picture, picture]}], pooling_task="token_embed", use_tqdm=False)
    with LLM(folder) as large:
        (other,) = large.encode([picture], pooling_task="token_embed", use_tqdm=False)
    assert len(output.outputs.data) < len(other.outputs.data)
    for options, reason in (
        ({"mm_processor_kwargs": {"max_pixel": 1}}, "no option 'max_pixel'. Did you mean 'max_pixels'"),
        ({"allowed_local_media_path": folder / "none"}, "there is no folder"),
        ({"allowed_media_domains": "http://host"}, "allowed_media_domains: 'http://host' is no host name"),
    ):
        with pytest.raises(ConfigError, match=reason):
            LLM(folder, **options)


def test_memory_stays_flat_over_800_pictures_of_urls(folder: Path) -> None:
    """Of 300 kB each, as files and decoded, with answers kept."""
    picture = np.random.default_rng(0).integers(0, 256, (320, 320, 3), np.uint8)

    def bitmap(handler: BaseHTTPRequestHandler) -> None:
        own = picture.copy()
        own[0, 0] = list(int(handler.path.partition("?")[2]).to_bytes(3))
        stream = BytesIO()
        Image.fromarray(own).save(stream, "BMP")
        whole(stream.getvalue())(handler)

    # A process of its own: one that ran other tests keeps gigabytes, and moves them about.
    with source({"/": bitmap}) as served:
        command = [sys.executable, "-c", _READ_PICTURES, str(folder), served.url("/?")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        answers, *used = map(int, done.stdout.split())
        assert len(served.asked) == answers == 800
    # Kept files, or pixels, would be 180 MB. The first rounds fill what the allocator keeps, and single rounds vary by it.
    assert min(used[-3:]) - used[1] < 60_000_000


_READ_PICTURES = """
import sys, psutil
from poolhouse import LLM
from poolhouse.engine.process import release_freed_memory
folder, url = sys.argv[1:]
outputs, used = [], []
with LLM(folder, allowed_media_domains="127.0.0.1", media_waiting_bytes=4_000_000, media_cache_bytes=0) as llm:
    for first in range(0, 800, 100):
        urls = [f"{url}{number}" for number in range(first, first + 100)]
        prompts = [{"content": [{"type": "image_url", "image_url": {"url": url}}]} for url in urls]
        outputs += llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        # What is freed and kept by the allocator depends on when it was last given back.
        release_freed_memory()
        used.append(psutil.Process().memory_info().rss)
print(len(outputs), *used)
"""


def body(url: str) -> dict[str, object]:
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "tiny", "task": "token_embed", "messages": [{"role": "user", "content": parts}]}


def test_strangers_are_answered_with_status_and_item(folder: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text if p.type == 'text' else '<|image_pad|>' }}{% endfor %}{% endfor %}"
    file = tmp_path / "a.png"
    pictures()[0].save(file)
    options = {"chat_template": template, "chat_template_content_format": "openai", "served_model_name": "tiny"}
    with source({"/a.png": file.read_bytes(), "/text": b"a secret"}) as served:
        for domains, cases in (
            (
                ("127.0.0.1",),
                {
                    served.url("/a.png"): (200, "", ""),
                    served.url("/none?key=hidden"): (422, "UnprocessableEntityError", "127.0.0.1: HTTP 404 error"),
                    served.url("/text"): (400, "BadRequestError", "these 8 bytes are no picture"),
                    "http://127.0.0.1:9/hidden": (422, "UnprocessableEntityError", "no connection"),
                },
            ),
            (
                (),
                {
                    served.url("/a.png"): (400, "BadRequestError", "on other ports"),
                    "http://127.0.0.1/hidden": (400, "BadRequestError", "an address that is not public"),
                    "http://169.254.169.254/hidden": (400, "BadRequestError", "an address that is not public"),
                    file.as_uri(): (400, "BadRequestError", "files are not read"),
                    str(file): (400, "BadRequestError", "files are not read"),
                    "ftp://127.0.0.1/hidden": (
                        400,
                        "BadRequestError",
                        "The URL must be either a HTTP, data or file URL",
                    ),
                    "data:image/png,abc": (400, "BadRequestError", "a data URI of a picture is written"),
                },
            ),
        ):
            with (
                LLM(folder, allowed_media_domains=domains, **options) as llm,
                TestClient(create_app([llm.engine])) as http,
            ):
                for url, (status, kind, reason) in cases.items():
                    reply = http.post("/pooling", json=body(url))
                    assert reply.status_code == status, reply.text
                    if status == 200:
                        continue
                    error = reply.json()["error"]
                    assert error["type"] == kind
                    assert error["param"] == "messages[0].content[1]"
                    assert error["message"].startswith("messages[0].content[1]: ")
                    assert reason in error["message"]
                    assert "hidden" not in reply.text
                    assert "secret" not in reply.text


# What a process does while it waits for a source that never answers; {port} is its.
ENDS = {
    "exits": "llm.engine.submit(slow)",
    "is interrupted": """
threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try: llm.encode(url, pooling_task="token_embed", use_tqdm=False)
except KeyboardInterrupt: pass
""",
    "forks": """
futures = llm.engine.submit(slow)
child = os.fork()
if child == 0:
    (output,) = llm.encode([picture], pooling_task="token_embed", use_tqdm=False)
    os._exit(0 if (output.outputs.data == before.outputs.data).all() else 1)
assert os.waitpid(child, 0)[1] == 0
(after,) = llm.encode([picture], pooling_task="token_embed", use_tqdm=False)
assert (after.outputs.data == before.outputs.data).all()
""",
    "closes": """
futures = llm.engine.submit(slow)
llm.engine.close(0.1)
assert "shut down" in str(futures[0].exception(5))
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_although_a_source_does_not_answer(end: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    pictures()[0].save(file)
    with source({"/": lambda _: time.sleep(150)}) as served:
        code = f"""
import os, signal, threading
from poolhouse import LLM
from poolhouse.engine.request import Request
from poolhouse.inputs.content import Content, Image
from poolhouse.inputs.prompts import Prompt
llm = LLM({str(folder)!r}, allowed_media_domains="127.0.0.1")
picture = {{"content": [{{"type": "image", "image": {str(file)!r}}}]}}
(before,) = llm.encode([picture], pooling_task="token_embed", use_tqdm=False)
url = {{"content": [{{"type": "image_url", "image_url": {{"url": {served.url("/")!r}}}}}]}}
slow = [Request(Prompt(None, content=Content((Image({served.url("/")!r}, "x"),))), "token_embed")]
{ENDS[end]}
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
