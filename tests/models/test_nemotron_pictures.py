"""Nvidia's Llama Nemotron VL against the formula of its own code over transformers' halves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL.Image import Image as PILImage
from torch import Tensor, nn

from poolhouse import LLM
from poolhouse.errors import CheckpointError, InvalidRequest
from poolhouse.inputs.content import Content, Image
from poolhouse.packing.tokens import Pictures, Tokens
from tests.models.hosted import (
    ID,
    LLAMA,
    SIGLIP,
    Hosted,
    answers,
    hidden_states,
    loaded,
    picture,
    prompt,
    randomised,
    tokenizer,
    worst,
)
from tests.models.parity import Parity, Record


class NemotronVL(nn.Module):
    """SigLIP, the pixel shuffle with two layers behind it, and Llama whose tokens see both sides."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.SiglipVisionConfig(**SIGLIP)
        self.vision_model = transformers.SiglipVisionModel(config)
        self.language_model = transformers.LlamaModel(transformers.LlamaConfig(**LLAMA))
        for layer in self.language_model.layers:
            layer.self_attn.is_causal = False
        self.mlp1 = nn.Sequential(nn.LayerNorm(4 * 24), nn.Linear(4 * 24, 32), nn.GELU(), nn.Linear(32, 32))

    def shuffled(self, x: Tensor) -> Tensor:
        """Neighbouring columns side by side, then neighbouring rows."""
        count, cells, width = x.shape
        side = int(cells**0.5)
        x = x.view(count, side, side // 2, width * 2).permute(0, 2, 1, 3).contiguous()
        x = x.view(count, side // 2, side // 2, width * 4).permute(0, 2, 1, 3)
        return x.reshape(count, -1, width * 4)

    def forward(self, tokens: Tokens) -> Tensor:
        """Hidden states of one prompt."""
        embedded = self.language_model.get_input_embeddings()(torch.from_numpy(tokens.ids))
        if tokens.pictures is not None:
            patches = torch.cat([torch.from_numpy(one.pixels) for one in tokens.pictures.pictures])
            tiles = patches.view(-1, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 16, 16)
            seen = self.vision_model(pixel_values=tiles).last_hidden_state
            embedded[torch.from_numpy(tokens.pictures.filled)] = self.mlp1(self.shuffled(seen)).flatten(0, 1)
        mask = torch.zeros(1, 1, len(embedded), len(embedded))
        hidden: Tensor = self.language_model(inputs_embeds=embedded[None], attention_mask=mask).last_hidden_state[0]
        return hidden


def tiny(nested: bool = False, scores: bool = False) -> Hosted:
    """nested: under the names that transformers 4 gave the tower."""
    model = randomised(NemotronVL())
    kind = "ForSequenceClassification" if scores else "Model"
    config = {
        "architectures": [f"LlamaNemotronVL{kind}"],
        "model_type": "llama_nemotron_vl_rerank" if scores else "llama_nemotron_vl",
        "llm_config": {"model_type": "llama_bidirec", "architectures": ["LlamaBidirectionalModel"], **LLAMA},
        "vision_config": {"model_type": "siglip_vision_model", **SIGLIP},
        "force_image_size": 16,
        "downsample_ratio": 0.5,
        "pooling": "avg",
        "img_context_token_id": ID["<IMG_CONTEXT>"],
        "prompt_template": "v1",
        "num_labels": 1,
    }

    def renamed(name: str) -> str:
        name = name.replace("vision_model.", "vision_model.vision_model.", 1) if nested else name
        return f"model.{name}" if scores else name

    modules = {"score": randomised(nn.Linear(32, 1, bias=False))} if scores else {}
    return Hosted(model, modules, config, {"max_input_tiles": 4}, renamed)


PROMPTS: Sequence[tuple[tuple[str | PILImage, ...], Any]] = (
    (("what is packed?",), "query"),
    ((picture(40, 30),), None),
    (("a passage",), "document"),
    ((picture(9, 60), "with a text"), "document"),
    (("neither",), None),
)


@pytest.mark.parametrize("nested", [False, True], ids=["today's names", "older names"])
def test_vectors_equal_the_formula(nested: bool, tmp_path: Path, record_parity: Record) -> None:
    made = tiny(nested)
    made.save(tmp_path)
    model = loaded(tmp_path)
    assert model.facts.served_by == "native llama_nemotron_vl, packed"
    assert model.facts.pictures is not None
    prompts = [prompt(model.facts.pictures, *parts, role=role) for parts, role in PROMPTS]
    with torch.no_grad():
        expected = [made.model(one) for one in prompts]
    assert worst(hidden_states(model, prompts), expected) < 1e-4
    pooled = [nn.functional.normalize(hidden.mean(0, keepdim=True), dim=-1) for hidden in expected]
    got = answers(model, prompts)
    names = "older names" if nested else "today's names"
    parity = Parity(
        f"texts and pictures: Llama Nemotron Embed VL, {names}",
        model.facts.served_by,
        "its formula over transformers' halves",
        worst(got, pooled),
        worst(got, [answers(model, [one])[0] for one in prompts]),
        model.facts.architecture,
        model.tasks,
        "nvidia/llama-nemotron-embed-vl-1b-v2" if nested else "",
    )
    record_parity(parity)
    assert parity.error < 1e-4
    assert parity.packing_error < 1e-4


def test_prompts_are_those_of_the_models_code(tmp_path: Path) -> None:
    tiny().save(tmp_path)
    reader = loaded(tmp_path).facts.pictures
    assert reader is not None
    page = prompt(reader, picture(40, 30), "text")
    # Four tiles and the whole, four rows each.
    shown = "<img>" + "<IMG_CONTEXT>" * 20 + "</img>"
    assert page.ids.tolist() == tokenizer()(f"passage: {shown} text")["input_ids"]
    assert prompt(reader, "text", role="query").ids.tolist() == tokenizer()("query: text")["input_ids"]


def test_tiles_fit_a_pictures_shape_and_area(tmp_path: Path) -> None:
    tiny().save(tmp_path)
    reader = loaded(tmp_path).facts.pictures
    assert reader is not None
    rows = {(16, 16): 4, (100, 100): 20, (64, 16): 20, (16, 33): 12, (12, 90): 20}
    for sides, wanted in rows.items():
        assert reader.processor(picture(*sides), {}).rows == wanted, sides
    assert reader.processor(picture(100, 100), {"max_input_tiles": 1}).rows == 4
    with pytest.raises(InvalidRequest, match="no option 'tiles'"):
        reader.processor(picture(16, 16), {"tiles": 3})


def test_scores_equal_the_formula(tmp_path: Path, record_parity: Record) -> None:
    made = tiny(nested=True, scores=True)
    made.save(tmp_path)
    model = loaded(tmp_path)
    reader = model.facts.pictures
    assert reader is not None
    assert reader.pair is not None
    page = picture(40, 30)
    pairs = [("what?", (page,)), ("what?", ("a text",)), ("who?", (page, "and a text"))]
    prompts = []
    for query, document in pairs:
        content = Content(tuple(part if isinstance(part, str) else Image(part, "") for part in document))
        written = reader.pair(Content((query,)), content, None)
        ids = tokenizer()(written.text)["input_ids"]
        shown = [reader.processor(part, {}) for part in document if not isinstance(part, str)]
        if shown:
            at = ids.index(reader.token)
            ids[at : at + 1] = shown[0].ids.tolist()
            text = "".join(part for part in document if isinstance(part, str))
            marks = tokenizer().decode(shown[0].ids)
            assert tokenizer().decode(ids) == f"{marks} question:{query} \n \n passage:{text}"
        array = np.array(ids, np.int64)
        pictures = Pictures(tuple(shown), array == reader.token) if shown else None
        prompts.append(Tokens(array, pictures=pictures))
    with torch.no_grad():
        logits = [made.modules["score"](made.model(one).mean(0, keepdim=True)) for one in prompts]
    got = answers(model, prompts, "classify")
    parity = Parity(
        "scores of texts and pictures: Llama Nemotron Rerank VL",
        model.facts.served_by,
        "its formula over transformers' halves",
        worst(got, [torch.sigmoid(one) for one in logits]),
        worst(got, [answers(model, [one], "classify")[0] for one in prompts]),
        model.facts.architecture,
        model.tasks,
        "nvidia/llama-nemotron-rerank-vl-1b-v2",
    )
    record_parity(parity)
    assert parity.error < 1e-4
    assert parity.packing_error < 1e-4


def test_score_reads_pages(tmp_path: Path) -> None:
    tiny(scores=True).save(tmp_path)
    page = picture(40, 30)
    with LLM(tmp_path, device="cpu", dtype="float32") as llm:
        documents = [{"content": [{"type": "image_pil", "image_pil": page}]}, "a text"]
        outputs = llm.score("what?", documents, use_tqdm=False)
        reader = llm.model.facts.pictures
        assert reader is not None
        shown = reader.processor(page, {})
        text = tokenizer()(" question:what? \n \n passage:")["input_ids"]
        ids = np.array([*shown.ids, *text], np.int64)
        seen = Tokens(ids, pictures=Pictures((shown,), ids == reader.token))
        plain = Tokens(np.array(tokenizer()("question:what? \n \n passage:a text")["input_ids"], np.int64))
        expected = [one.item() for one in answers(llm.model, [seen, plain], "classify")]
    np.testing.assert_allclose([output.outputs.score for output in outputs], expected, rtol=1e-4)
    query = {"content": [{"type": "image_pil", "image_pil": page}]}
    with LLM(tmp_path, device="cpu") as llm, pytest.raises(InvalidRequest, match="the query must be a text"):
        llm.score(query, ["a text"], use_tqdm=False)


def test_a_tokenizer_without_marks_is_refused(tmp_path: Path) -> None:
    made = tiny()
    made.config["img_context_token_id"] = 5
    made.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks <img>, </img> or <IMG_CONTEXT>"):
        loaded(tmp_path)
