"""Every method of LLM takes pictures in every form, and answers as the model's own code does."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from poolhouse import LLM, InvalidRequest, PoolingParams
from tests.checkpoints import save_checkpoint
from tests.models.qwen_vl import OLD, SLOT, QwenVL, pictures, prefixed

END = "<|endoftext|>"
QUERY_END = END * 10
DESCRIBED = f"<|im_start|>user\n{SLOT}Describe the image.", f"<|im_end|>{END}"
CHAT = """\
{%- for message in messages -%}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content -%}
{%- if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif -%}
{%- endfor %}{% endif %}<|im_end|>
{% endfor -%}"""
FIRST, SECOND, *_ = pictures()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[QwenVL, Path]:
    """A late-interaction model in TomoroAI's layout, and its folder."""
    folder = tmp_path_factory.mktemp("colqwen3")
    model = QwenVL.make("qwen3_vl", embedding_proj_layer=nn.Linear(32, 20))
    names = prefixed("vlm.model.language_model.", "vlm.model.visual.")
    model.save(folder, names, architectures=["ColQwen3"], model_type="colqwen3", embed_dim=20)
    (folder / "chat_template.jinja").write_text(CHAT)
    FIRST.save(folder / "first.png")
    (folder / "processor_config.json").write_text(json.dumps({"max_num_visual_tokens": 16}))
    return model, folder


@pytest.fixture(scope="module")
def llm(tiny: tuple[QwenVL, Path]) -> Iterator[LLM]:
    with LLM(str(tiny[1])) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(tiny: tuple[QwenVL, Path]) -> Callable[..., np.ndarray]:
    """[tokens, 20] of a literal prompt and its pictures, by transformers and the projection."""

    def rows(text: str, *images: Image.Image) -> np.ndarray:
        with torch.inference_mode():
            state = tiny[0].modules["embedding_proj_layer"](tiny[0].hidden(text, images))
        return F.normalize(state, dim=-1).numpy()

    return rows


def described(text: str = "", pictures: int = 1) -> str:
    before, behind = DESCRIBED
    return before.replace(SLOT, SLOT * pictures) + (f" {text}" if text else "") + behind


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def close(got: Any, wanted: np.ndarray) -> None:
    got = np.asarray(got)
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()


# One picture, and nothing else.
ALONE: dict[str, Callable[[Path], Any]] = {
    "a PIL picture": lambda _: FIRST,
    "a list of them": lambda _: [FIRST],
    "an array": lambda _: np.asarray(FIRST),
    "a batch of arrays": lambda _: np.asarray(FIRST)[None],
    "content": lambda _: {"content": [{"type": "image_pil", "image_pil": FIRST}]},
    "content, a path": lambda folder: {"content": [{"type": "image", "image": folder / "first.png"}]},
    "content, a path as text": lambda folder: {"content": [{"type": "image", "image": str(folder / "first.png")}]},
    "content, bytes": lambda _: {"content": [{"image": png(FIRST)}]},
    "literal": lambda _: {"prompt": described(), "multi_modal_data": {"image": FIRST}},
    "literal, a list": lambda _: {
        "prompt": described(),
        "multi_modal_data": {"image": [FIRST]},
        "multi_modal_uuids": {"image": ["of another picture"]},
    },
}


@pytest.mark.parametrize("form", ALONE)
def test_a_picture_is_described_whatever_form_it_comes_in(
    form: str, llm: LLM, tiny: tuple[QwenVL, Path], reference: Callable[..., np.ndarray]
) -> None:
    (output,) = llm.embed(ALONE[form](tiny[1]))
    wanted = reference(described(), FIRST)
    close(output.outputs.data, wanted)
    assert len(output.prompt_token_ids) == len(wanted)


CALLS: dict[str, Callable[[LLM, Any], list[np.ndarray]]] = {
    "embed": lambda llm, prompts: [output.outputs.array for output in llm.embed(prompts)],
    "embed_async": lambda llm, prompts: [output.outputs.array for output in asyncio.run(llm.embed_async(prompts))],
    "encode": lambda llm, prompts: [output.outputs.array for output in llm.encode(prompts, pooling_task="token_embed")],
    "embed_tokens": lambda llm, prompts: [np.array(rows) for rows in llm.embed_tokens(prompts)],
    "embed_tokens_in_blocks": lambda llm, prompts: [
        np.array(rows) for block in llm.embed_tokens_in_blocks(prompts, prompts_per_block=2) for rows in block
    ],
}


@pytest.mark.parametrize("call", CALLS)
def test_texts_and_pictures_mix_in_one_call(call: str, llm: LLM, reference: Callable[..., np.ndarray]) -> None:
    prompts = [
        "who?",
        {"content": ["what it says", FIRST, SECOND]},
        SECOND,
        {"prompt": f"{SLOT}x{SLOT}", "multi_modal_data": {"image": [SECOND, FIRST]}},
        {"messages": [{"role": "user", "content": [{"image": FIRST}, {"type": "text", "text": "who?"}, SECOND]}]},
    ]
    wanted = [
        reference(f"who?{QUERY_END}"),
        reference(described("what it says", 2), FIRST, SECOND),
        reference(described(), SECOND),
        reference(f"{SLOT}x{SLOT}", SECOND, FIRST),
        reference(f"<|im_start|>user\n{SLOT}who?{SLOT}<|im_end|>\n", FIRST, SECOND),
    ]
    for got, rows in zip(CALLS[call](llm, prompts), wanted, strict=True):
        close(got, rows)


def test_a_text_is_literal_without_a_prompt(llm: LLM, reference: Callable[..., np.ndarray]) -> None:
    (output,) = llm.embed("who?", prompt_name="")
    close(output.outputs.data, reference("who?"))


def test_scores_mix_texts_and_pictures_on_both_sides(llm: LLM, reference: Callable[..., np.ndarray]) -> None:
    queries = ["who?", {"content": [FIRST, "like this"]}, SECOND]
    documents = [{"content": [{"image": FIRST}]}, "a text", {"content": [SECOND, FIRST]}]
    ours = [
        reference(f"who?{QUERY_END}"),
        reference(described("like this"), FIRST),
        reference(described(), SECOND),
    ]
    theirs = [
        reference(described(), FIRST),
        reference(f"a text{QUERY_END}"),
        reference(described(pictures=2), SECOND, FIRST),
    ]
    for pairs, wanted in (
        (llm.score(queries, documents), zip(ours, theirs, strict=True)),
        (llm.score(queries[1], documents), ((ours[1], rows) for rows in theirs)),
    ):
        expected = [float((query @ document.T).max(1).sum()) for query, document in wanted]
        assert [pair.outputs.score for pair in pairs] == pytest.approx(expected, rel=1e-4)


def test_the_settings_of_a_request_change_its_pictures_alone(llm: LLM) -> None:
    large = Image.effect_noise((64, 64), 50).convert("RGB")
    small = {"mm_processor_kwargs": {"max_pixels": 256, "min_pixels": 64}}
    whole, cut, again = llm.embed([large, {"content": [large], **small}, large])
    assert len(whole.outputs.data) - len(cut.outputs.data) == 16 - 4
    assert torch.equal(whole.outputs.data, again.outputs.data)
    (pair,) = llm.score("who?", large, mm_processor_kwargs=small["mm_processor_kwargs"])
    (other,) = llm.score("who?", large)
    assert len(other.prompt_token_ids) - len(pair.prompt_token_ids) == 16 - 4


def test_text_behind_a_picture_is_cut_on_request(llm: LLM, reference: Callable[..., np.ndarray]) -> None:
    (whole,) = llm.embed({"content": [FIRST, "words " * 20]})
    (cut,) = llm.embed({"content": [FIRST, "words " * 20]}, pooling_params=PoolingParams(truncate_prompt_tokens=60))
    assert (len(cut.prompt_token_ids), cut.truncated, cut.original_tokens) == (60, True, len(whole.prompt_token_ids))
    tail = cut.prompt_token_ids[-2:]
    assert tail == whole.prompt_token_ids[-2:]
    with pytest.raises(InvalidRequest, match="tokens that are not cut"):
        llm.embed(FIRST, pooling_params=PoolingParams(truncate_prompt_tokens=9))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"prompt": "x", "multi_modal_data": {"image": FIRST}}, "has 0 placeholders .* and 1 pictures"),
        ({"content": ["the token <|image_pad|> itself", FIRST]}, "has 2 placeholders .* and 1 pictures"),
        ("<|image_pad|>", "has 1 placeholders .* and 0 pictures"),
        (
            {"content": [{"type": "video_url", "video_url": "x"}]},
            r"prompts.content\[0\] is 'video_url': video is not read",
        ),
        ({"content": [b"bytes"]}, r"content\[0\] is bytes; it must be a text, a picture"),
    ],
)
def test_what_cannot_be_is_refused_by_name(prompt: Any, words: str, llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=words):
        llm.embed(prompt)


def test_an_instruction_is_refused_where_none_is_read(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="reads no instruction"):
        llm.score("who?", FIRST, instruction="Find it.")


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.embed(FIRST),
        lambda llm: llm.embed({"prompt": "x", "multi_modal_data": {"image": FIRST}}),
        lambda llm: llm.embed({"content": ["a", {"image_url": "https://example.org/a.png"}]}),
        lambda llm: llm.score("who?", [{"content": [FIRST]}]),
        lambda llm: llm.embed_chunks({"content": [FIRST]}, chunk_size=2),
    ],
)
def test_a_model_that_reads_texts_refuses_pictures(call: Callable[[LLM], Any], tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "bert, wordpiece")
    with LLM(str(tmp_path)) as llm, pytest.raises(InvalidRequest, match="MultiModalParam is not supported for Bert"):
        call(llm)


def test_late_chunking_says_that_it_reads_plain_texts(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="a vector per token"):
        llm.embed_chunks({"content": [FIRST]}, chunk_size=2)


def test_a_reranker_reads_pictures_on_either_side(tmp_path: Path) -> None:
    tiny = QwenVL.make("qwen3_vl")
    names = prefixed("model.language_model.", "model.visual.", "lm_head.weight")
    folder = tiny.save(tmp_path / "Qwen3-VL-Reranker-2B", names, architectures=["Qwen3VLForConditionalGeneration"])
    tiny.settings = {**tiny.settings, "size": {"shortest_edge": 4 * 64, "longest_edge": 1800 * 64}}
    judge = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: Find it.<Query>:'
    )
    turn = "<|im_end|>\n<|im_start|>assistant\n"
    pairs = [
        ("who?", "a text", f"who?\n<Document>:a text{turn}", ()),
        ("who?", {"content": [FIRST, "words"]}, f"who?\n<Document>:{SLOT}words{turn}", (FIRST,)),
        (SECOND, FIRST, f"{SLOT}\n<Document>:{SLOT}{turn}", (SECOND, FIRST)),
    ]
    words = [tiny.model.config.text_config.vocab_size - 4 + index for index in (1, 0)]
    with LLM(str(folder)) as llm:
        got = llm.score([pair[0] for pair in pairs], [pair[1] for pair in pairs], instruction="Find it.")
    for output, (_, _, text, images) in zip(got, pairs, strict=True):
        logits = tiny.logits(judge + text, images)[words]
        assert output.outputs.score == pytest.approx(float(torch.softmax(logits, 0)[1]), abs=1e-5)


def test_of_a_pair_that_is_too_long_the_document_is_cut(tmp_path: Path) -> None:
    tiny = QwenVL.make("qwen2_vl", **{"score.0": nn.Linear(32, 32), "score.2": nn.Linear(32, 1)})
    folder = tiny.save(tmp_path, OLD, flat=True, architectures=["JinaVLForRanking"])
    document = {"content": [FIRST, "words " * 200]}
    with LLM(str(folder)) as llm:
        prompts = {
            name: llm.engine.detokenize(llm.score("who?", document, pooling_params=params)[0].prompt_token_ids)
            for name, params in {
                "whole": PoolingParams(),
                "cut": PoolingParams(truncate_prompt_tokens=100),
                "document": PoolingParams(max_tokens_per_doc=12),
                "query": PoolingParams(max_tokens_per_query=2, max_tokens_per_doc=12),
            }.items()
        }
        (cut,) = llm.score("who?", document, pooling_params=PoolingParams(truncate_prompt_tokens=100))
    parts = {
        name: prompt.partition("<|vision_end|>")[2].partition("\n**Query**:\n") for name, prompt in prompts.items()
    }
    assert [len(parts[name][0]) for name in ("whole", "document", "query")] == [1200, 12, 12]
    assert [parts[name][2][:4] for name in ("whole", "cut", "document")] == ["who?"] * 3
    assert parts["query"][2][:3] == "wh" + parts["whole"][2][4:5]
    assert (len(cut.prompt_token_ids), cut.truncated) == (100, True)


def test_late_chunking_knows_the_texts_within_the_models_own_prompts(tmp_path: Path) -> None:
    tiny = QwenVL.make("qwen3_vl")
    names = prefixed("model.language_model.", "model.visual.", "lm_head.weight")
    folder = tiny.save(tmp_path / "Qwen3-VL-Embedding-2B", names, architectures=["Qwen3VLForConditionalGeneration"])
    text, before = "The moon.The sea.", "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\n"
    with LLM(str(folder)) as llm:
        (output,) = llm.embed_chunks(text, chunks=[(0, 9), (9, 17)])
        with pytest.raises(InvalidRequest, match="of texts alone, without pictures"):
            llm.embed_chunks({"content": [FIRST, "words"]}, chunk_size=2)
    assert [chunk.text for chunk in output.outputs] == ["The moon.", "The sea."]
    rows = tiny.hidden(f"{before}{text}<|im_end|>\n<|im_start|>assistant\n").numpy()
    # The special tokens are one token each, letters too.
    start = len(before.replace("<|im_start|>", "x").replace("<|im_end|>", "x"))
    for chunk, (first, last) in zip(output.outputs, ((0, 9), (9, 17)), strict=True):
        mean = rows[start + first : start + last].mean(0)
        close(chunk.array, mean / np.linalg.norm(mean))
