"""The stage that loads pictures: each once, within its memory, and one that fails alone."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImages

from poolhouse.engine.media import Media, MediaOptions
from poolhouse.engine.queue import CallerQueue
from poolhouse.engine.request import Answer, Request
from poolhouse.errors import EngineClosed, EngineError, FetchFailed, InputTooLong, InvalidRequest
from poolhouse.inputs.content import Content, Image
from poolhouse.inputs.media.fetch import FetchPolicy
from poolhouse.inputs.media.images import ImageLimits
from poolhouse.inputs.pictures import PictureReader, Written
from poolhouse.inputs.prompts import Conversation, Prompt
from poolhouse.packing.tokens import Picture, Tokens
from tests.inputs.sources import Answer as HttpAnswer
from tests.inputs.sources import source, whole

QUEUES = {0: CallerQueue()}
OPTIONS = MediaOptions(FetchPolicy(("127.0.0.1",)), threads=2)
NOTHING = Tokens(np.zeros(0, np.int64))


class Processor:
    """Three tokens and the pixels of each picture. held: while it is set, nothing is processed."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Picture]] = []
        self.options: list[Mapping[str, object]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, image: PILImages.Image, options: Mapping[str, object]) -> Picture:
        self.free.wait(10)
        if image.width == 13:
            raise InvalidRequest("The picture of 13 is unlucky.")
        if image.width == 14:
            raise RuntimeError("secret of the machine")
        picture = Picture(np.asarray(image).copy(), np.arange(3), np.ones(3, np.bool_))
        self.made.append(weakref.ref(picture))
        self.options.append(options)
        return picture

    @property
    def live_bytes(self) -> int:
        return sum(picture.nbytes for one in self.made if (picture := one()) is not None)


class Stage:
    """A stage, and what went on from it."""

    def __init__(self, options: MediaOptions = OPTIONS, max_tokens: int = 100) -> None:
        self.processor = Processor()
        reader = PictureReader(self.processor, lambda *_: Written(""), "<image>", 1)
        self.media = Media(reader, options, max_tokens)
        self.gone_on: list[Request] = []

    def submit(self, *requests: Request, answered: bool = True) -> list[Request]:
        """Submit; requests that go on are answered at once, or stay in `gone_on`. Returns the others."""

        def go_on(ready: Sequence[Request], queues: Mapping[int, CallerQueue]) -> None:
            assert queues is QUEUES
            self.gone_on.extend(ready)
            if answered:
                answer(*ready)

        return list(self.media.take(requests, QUEUES, go_on))

    def pixels(self, *requests: Request) -> list[list[np.ndarray]]:
        """Of each request, those of its pictures."""
        self.submit(*requests)
        wait([request.future for request in requests], 20)
        pictures = {request.future: request.pictures for request in self.gone_on}
        return [[picture.pixels for picture in pictures[request.future]] for request in requests]


def answer(*requests: Request) -> None:
    for request in requests:
        if request.future.set_running_or_notify_cancel():
            request.future.set_result(Answer(np.zeros(1, np.float32), NOTHING))


@pytest.fixture
def stage() -> Iterator[Stage]:
    with stage_of(OPTIONS) as made:
        yield made


@contextlib.contextmanager
def stage_of(options: MediaOptions, max_tokens: int = 100) -> Iterator[Stage]:
    made = Stage(options, max_tokens)
    try:
        yield made
    finally:
        made.processor.free.set()
        made.media.close()


def showing(*sources: object, **options: object) -> Request:
    images = tuple(Image(one, f"prompts[0].content[{index}]") for index, one in enumerate(sources))
    return Request(Prompt(None, content=Content(images)), "embed", **options)


def noise(seed: int = 0, height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(array: np.ndarray) -> bytes:
    stream = BytesIO()
    PILImages.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def data_uri(array: np.ndarray) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(png(array)).decode()


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def error_of(request: Request) -> BaseException:
    error = request.future.exception(20)
    assert error is not None
    return error


def test_texts_do_not_pass_through_it(stage: Stage) -> None:
    before = threading.active_count()
    texts = [Request(Prompt("a"), "embed"), Request(Prompt(None, content=Content(("a", "b"))), "embed")]
    loaded = replace(showing(noise()), pictures=(Picture(noise(), np.arange(3), np.ones(3, np.bool_)),))
    picture = showing(noise())
    assert stage.submit(*texts) == texts
    assert stage.submit(texts[0], loaded, picture, texts[1]) == [texts[0], loaded, texts[1]]
    picture.future.result(10)
    assert [len(request.pictures) for request in stage.gone_on] == [1]
    # One for the picture.
    assert threading.active_count() <= before + 1


def test_every_kind_of_source_is_read(stage: Stage, tmp_path: Path) -> None:
    array = noise()
    file = tmp_path / "a.png"
    file.write_bytes(png(array))
    with source({"/a.png": png(array)}) as served:
        sources = [array, PILImages.fromarray(array), png(array), bytearray(png(array)), data_uri(array), file]
        (pixels,) = stage.pixels(showing(*sources, served.url("/a.png")))
        (named,) = stage.pixels(showing(str(file), file.as_uri(), local_files=True))
    assert len(pixels) == 7
    for one in (*pixels, *named):
        np.testing.assert_array_equal(one, array)
    refused = showing(str(file))
    stage.submit(refused)
    assert "files are not read" in str(error_of(refused))


def test_pictures_keep_their_order(stage: Stage) -> None:
    def slow(handler: object) -> None:
        time.sleep(0.2)
        whole(png(noise(0)))(handler)  # type: ignore[arg-type]

    answers: dict[str, bytes | HttpAnswer] = {"/0": slow}
    with source(answers) as served:
        requests = [showing(served.url("/0"), noise(1), noise(2)), showing(noise(3)), showing(noise(1), noise(0))]
        pixels = stage.pixels(*requests)
    expected = [[0, 1, 2], [3], [1, 0]]
    for found, seeds in zip(pixels, expected, strict=True):
        for one, seed in zip(found, seeds, strict=True):
            np.testing.assert_array_equal(one, noise(seed))


def test_both_sides_of_a_pair_and_literal_prompts_show_pictures(stage: Stage) -> None:
    first, second = (Content(("text", Image(noise(seed), "x"))) for seed in range(2))
    pair = Request(Prompt(None, content=first, pair_content=second), "classify")
    literal = Request(Prompt("<image> <image>", images=(Image(noise(2), "y"), Image(noise(3), "y"))), "embed")
    pixels = stage.pixels(pair, literal)
    for found, seeds in zip(pixels, ([0, 1], [2, 3]), strict=True):
        for one, seed in zip(found, seeds, strict=True):
            np.testing.assert_array_equal(one, noise(seed))


# --- Once ---


def test_a_source_is_asked_once_and_its_picture_is_one_object(stage: Stage) -> None:
    with source({"/a.png": png(noise())}) as served:
        url = served.url("/a.png")
        stage.processor.free.clear()
        requests = [showing(url, url), showing(url), showing(noise(1))]
        stage.submit(*requests, answered=False)
        stage.processor.free.set()
        until(lambda: len(stage.gone_on) == 3)
        assert len(served.asked) == 1
    shown = [picture for request in stage.gone_on for picture in request.pictures]
    assert len({id(picture) for picture in shown}) == 2
    assert len(stage.processor.made) == 2


def test_a_content_is_processed_once_whatever_holds_it(stage: Stage) -> None:
    array = noise()
    stage.processor.free.clear()
    requests = [showing(png(array)), showing(data_uri(array), data_uri(array)), showing(bytearray(png(array)))]
    stage.submit(*requests[:2], answered=False)
    stage.submit(requests[2], answered=False)
    time.sleep(0.05)
    stage.processor.free.set()
    until(lambda: len(stage.gone_on) == 3)
    assert len(stage.processor.made) == 1
    assert len({id(picture) for request in stage.gone_on for picture in request.pictures}) == 1


def test_equal_pixels_of_arrays_and_pil_pictures_are_one_picture(stage: Stage) -> None:
    stage.pixels(showing(noise(), noise(), PILImages.fromarray(noise())))
    assert len(stage.processor.made) == 1
    # As many pixels, in another shape.
    stage.pixels(showing(noise().reshape(12, 8, 3)))
    assert len(stage.processor.made) == 2


def test_later_requests_find_a_picture_by_its_content_and_settings() -> None:
    options = replace(OPTIONS, processor={"max_pixels": 9})
    with stage_of(options) as stage:
        first = showing(png(noise()))
        stage.pixels(first)
        stage.pixels(showing(data_uri(noise())))
        assert stage.processor.options == [{"max_pixels": 9}]
        other = replace(
            first, prompt=replace(first.prompt, processor_options={"max_pixels": 4}), future=showing().future
        )
        stage.pixels(other)
        assert stage.processor.options == [{"max_pixels": 9}, {"max_pixels": 4}]


def test_a_url_whose_picture_changes_is_never_anothers(stage: Stage) -> None:
    """Neither a URL nor the caller's uuid is a key of what is kept."""
    answers: dict[str, bytes | HttpAnswer] = {"/a.png": png(noise(0))}
    with source(answers) as served:
        ((before,),) = stage.pixels(showing(served.url("/a.png")))
        answers["/a.png"] = png(noise(1))
        ((after,),) = stage.pixels(showing(served.url("/a.png")))
    np.testing.assert_array_equal(before, noise(0))
    np.testing.assert_array_equal(after, noise(1))


@pytest.mark.parametrize(("cache_bytes", "made"), [(0, 6), (3 * 288, 3), (2 * 288, 6)])
def test_the_latest_pictures_are_kept_within_their_bytes(cache_bytes: int, made: int) -> None:
    with stage_of(replace(OPTIONS, cache_bytes=cache_bytes, threads=1)) as stage:
        for _ in range(2):
            for seed in range(3):
                stage.pixels(showing(noise(seed)))
                stage.gone_on.clear()
                until(lambda: stage.processor.live_bytes <= cache_bytes)
        assert len(stage.processor.made) == made


# --- Failures ---


def test_one_that_fails_fails_alone_and_names_its_item(stage: Stage) -> None:
    with source({"/a.png": png(noise())}) as served:
        good = [showing(noise(1)), showing(served.url("/a.png"), noise(2))]
        bad = {
            "cannot be decoded": showing(noise(3), png(noise())[:-40]),
            "not valid base64": showing(noise(3), "data:;base64,###"),
            "The picture of 13 is unlucky.": showing(noise(3), noise(4, width=13)),
            "HTTP 404 error": showing(noise(3), served.url("/none?key=secret")),
            "not one of allowed_media_domains": showing(noise(3), "http://10.0.0.1/secret"),
        }
        stage.submit(*good, *bad.values())
        for request in good:
            assert request.future.result(20) is not None
        for reason, request in bad.items():
            error = error_of(request)
            assert isinstance(error, InvalidRequest)
            assert isinstance(error, FetchFailed) == ("404" in reason)
            assert str(error).startswith("prompts[0].content[1]: ")
            assert reason in str(error)
            assert error.parameter == "prompts[0].content[1]"
            assert "secret" not in str(error)


def test_sharers_of_a_picture_that_fails_name_their_own_item(stage: Stage) -> None:
    array = noise(width=13)
    requests = [showing(array), showing(noise(), array), showing(noise(), noise(), array.copy())]
    stage.submit(*requests)
    for index, request in enumerate(requests):
        assert str(error_of(request)) == f"prompts[0].content[{index}]: The picture of 13 is unlucky."


def test_a_processor_that_breaks_tells_the_log_and_not_the_caller(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    broken = showing(noise(width=14))
    stage.submit(broken)
    error = error_of(broken)
    assert isinstance(error, EngineError)
    assert "secret" not in str(error)
    assert "secret of the machine" in caplog.text
    stage.pixels(showing(noise()))


def test_limits_of_pixels_sides_and_count() -> None:
    options = replace(OPTIONS, limits=ImageLimits(max_pixels=100, max_ratio=3), max_pictures=2)
    with stage_of(options) as stage:
        cases = {
            "at most 100 are read": showing(noise(height=10, width=11)),
            "side ratio of over 3": showing(noise(height=2, width=7)),
            "At most 2 image(s) may be provided in one prompt.": showing(*[noise()] * 3),
        }
        stage.submit(*cases.values())
        for reason, request in cases.items():
            assert reason in str(error_of(request))
        stage.pixels(showing(*[noise()] * 2))


def test_pictures_of_more_tokens_than_the_model_reads_are_refused_early() -> None:
    with stage_of(replace(OPTIONS, threads=1), max_tokens=7) as stage:
        request = showing(*map(noise, range(20)))
        stage.submit(request)
        assert isinstance(error_of(request), InputTooLong)
        stage.pixels(showing(noise(), noise(1)))
        assert len(stage.processor.made) <= 5


# --- Memory ---


def test_memory_stays_flat_over_2000_pictures() -> None:
    """However slowly those that went on are answered."""
    size = noise().nbytes
    with stage_of(replace(OPTIONS, waiting_bytes=20 * size, cache_bytes=5 * size)) as stage:
        # So that what is expected of the first is not the default.
        stage.media._room._usual = size
        requests = [showing(noise(seed)) for seed in range(2000)]
        stage.submit(*requests, answered=False)
        most = 0
        for number in range(len(requests)):
            until(lambda: bool(stage.gone_on))
            answer(stage.gone_on.pop(0))
            most = max(most, stage.processor.live_bytes if number % 50 == 0 else 0)
        assert most <= (20 + 5 + 2) * size
        assert len(stage.processor.made) == 2000
        until(lambda: not stage.media._room._held and not any(stage.media._room._reserved.values()))
        assert not stage.media._open
        until(lambda: stage.processor.live_bytes <= 5 * size)


def test_a_request_of_more_than_all_room_still_goes_on() -> None:
    with stage_of(replace(OPTIONS, waiting_bytes=1)) as stage:
        stage.pixels(*[showing(noise(seed), noise(seed + 1)) for seed in range(20)])


def test_a_shared_picture_takes_its_room_once() -> None:
    size = noise().nbytes
    with stage_of(replace(OPTIONS, waiting_bytes=3 * size)) as stage:
        stage.media._room._usual = 0
        stage.submit(*[showing(noise()) for _ in range(25)], answered=False)
        until(lambda: len(stage.gone_on) == 25)
        assert stage.media._room._held == size
        answer(*stage.gone_on)
        until(lambda: stage.media._room._held == 0)


def test_a_small_submission_does_not_wait_for_all_of_a_huge_one() -> None:
    with stage_of(replace(OPTIONS, threads=1)) as stage:
        huge = [showing(noise(seed)) for seed in range(500)]
        stage.processor.free.clear()
        stage.submit(*huge)
        small = showing(noise(1000))
        stage.submit(small)
        stage.processor.free.set()
        small.future.result(10)
        assert sum(request.future.done() for request in huge) < 250
        wait([request.future for request in huge], 20)


# --- Ends ---


def asked_and_gone(path: str = "/") -> tuple[threading.Event, threading.Event, dict[str, bytes | HttpAnswer]]:
    """A source that never answers: when it was asked, and when its caller went."""
    asked, gone = threading.Event(), threading.Event()

    def answer(handler: object) -> None:
        asked.set()
        if handler.connection.recv(1) == b"":  # type: ignore[attr-defined]
            gone.set()

    return asked, gone, {path: answer}


def test_a_cancelled_request_stops_its_fetch_unless_another_waits_for_it(stage: Stage) -> None:
    asked, gone, answers = asked_and_gone()
    with source(answers) as served:
        first, second = (showing(served.url("/")) for _ in range(2))
        stage.submit(first, second)
        assert asked.wait(5)
        first.future.cancel()
        assert not gone.wait(0.2)
        second.future.cancel()
        assert gone.wait(5)
        assert len(served.asked) == 1
    until(lambda: not stage.media._remote.begun and not stage.media._open)
    assert not any(stage.media._room._reserved.values())
    stage.pixels(showing(noise()))


def test_cancelled_requests_that_wait_are_not_begun() -> None:
    with stage_of(replace(OPTIONS, threads=1)) as stage:
        stage.processor.free.clear()
        requests = [showing(noise(seed)) for seed in range(200)]
        stage.submit(*requests)
        for request in requests:
            request.future.cancel()
        stage.processor.free.set()
        wait([request.future for request in requests], 10)
        stage.pixels(showing(noise(1000)))
        assert len(stage.processor.made) < 40
        assert not stage.media._open


def test_slow_sources_do_not_hold_up_others(stage: Stage) -> None:
    asked, _, answers = asked_and_gone()
    with source(answers) as served:
        slow = [showing(served.url("/?" + str(number))) for number in range(200)]
        stage.submit(*slow)
        assert asked.wait(5)
        begun = time.monotonic()
        stage.pixels(*[showing(noise(seed)) for seed in range(50)])
        assert time.monotonic() - begun < 5
        for request in slow:
            request.future.cancel()


def test_closing_fails_what_waits_and_ends_all_threads() -> None:
    before = set(threading.enumerate())
    stage = Stage()
    asked, gone, answers = asked_and_gone()
    with source(answers) as served:
        stage.processor.free.clear()
        waiting = [showing(noise()), showing(served.url("/")), *(showing(noise(seed)) for seed in range(100))]
        stage.submit(*waiting)
        assert asked.wait(5)
        stage.media.close(EngineClosed("The engine is shut down."))
        assert all(isinstance(error_of(request), EngineClosed) for request in waiting)
        assert gone.wait(5)
    stage.processor.free.set()
    until(lambda: not {thread for thread in threading.enumerate() if "poolhouse" in thread.name} - before)
    late = showing(noise())
    stage.submit(late)
    assert isinstance(error_of(late), EngineClosed)


def test_pictures_are_loaded_by_the_calling_thread_where_only_tokens_are_asked_for(stage: Stage) -> None:
    with source({"/a.png": png(noise())}) as served:
        request = stage.media.loaded(showing(served.url("/a.png"), noise(1), png(noise())))
    np.testing.assert_array_equal(request.pictures[0].pixels, noise())
    assert request.pictures[0] is request.pictures[2]
    with pytest.raises(InvalidRequest, match=r"content\[0\]: .* not valid base64"):
        stage.media.loaded(showing("data:;base64,###"))
    text = Request(Prompt("a"), "embed")
    assert stage.media.loaded(text) is text


def test_invalid_messages_are_left_to_intake(stage: Stage) -> None:
    conversation = Conversation([{"role": "user", "content": [{"type": "video", "video": "x"}]}])
    request = Request(Prompt(None, conversation=conversation), "embed")
    assert stage.submit(request, showing(noise())) == [request]
