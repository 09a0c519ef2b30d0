"""ColQwen3 in all its layouts against Qwen3VLModel and the projection of the models' own code."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poolhouse import LLM
from poolhouse.errors import CheckpointError
from poolhouse.inputs.content import Content
from poolhouse.inputs.content import Image as Image_
from poolhouse.inputs.pictures import Written
from poolhouse.models.load import load
from poolhouse.models.model import Model
from poolhouse.models.plan import LoadOptions, decide
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Pictures, Tokens
from tests.models.parity import Parity, Record
from tests.models.qwen_vl import IMAGE, QwenVL, pictures, prefixed, tokenizer

HIDDEN = 32
END = "<|endoftext|>"
SLOT = "<|vision_start|><|image_pad|><|vision_end|>"
DESCRIBED = f"<|im_start|>user\n{SLOT}Describe the image.<|im_end|>{END}"


@dataclass(frozen=True)
class Layout:
    """One layout of files. names: prefixes of the text half, the tower and the generator's head.

    projection: the name of the projection and its width; None for none. config: what config.json says besides.
    examples: models of the hub. nemotron: whether the model's own code lets tokens see both sides and leaves the final norm out.
    """

    architecture: str
    model_type: str
    names: tuple[str, str, str | None]
    projection: tuple[str, int] | None
    config: dict[str, Any] = field(default_factory=dict)
    nemotron: bool = False
    examples: str = ""


TOMORO = partial(Layout, "ColQwen3", "colqwen3", config={"embed_dim": 20, "padding_side": "left"})
OPS = partial(Layout, "OpsColQwen3Model", "ops_colqwen3", projection=("custom_text_proj", HIDDEN))
LAYOUTS = {
    "tomoro": TOMORO(
        names=("vlm.model.language_model.", "vlm.model.visual.", "vlm.lm_head.weight"),
        projection=("embedding_proj_layer", 20),
        examples="TomoroAI/tomoro-colqwen3-embed-4b, TomoroAI/tomoro-colqwen3-embed-8b",
    ),
    "tomoro, tied": TOMORO(
        names=("vlm.model.language_model.", "vlm.model.visual.", None), projection=("embedding_proj_layer", 20)
    ),
    "tomoro, older": TOMORO(names=("language_model.", "visual.", None), projection=("custom_text_proj", 20)),
    "tomoro, oldest": TOMORO(names=("model.", "visual.", "lm_head.weight"), projection=("custom_text_proj", 20)),
    "ops": OPS(
        names=("language_model.", "visual.", None),
        config={"dims": HIDDEN},
        examples="OpenSearch-AI/Ops-Colqwen3-4B, OpenSearch-AI/Ops-Colqwen3-8B",
    ),
    "ops, cut": OPS(names=("language_model.", "visual.", None), config={"dims": 12}),
    "ops, in front": OPS(
        names=("base_model.model.language_model.", "base_model.model.visual.", None),
        projection=("base_model.model.custom_text_proj", HIDDEN),
        config={"dims": 12},
    ),
    "nemotron": Layout(
        "Qwen3VLNemotronEmbedModel",
        "qwen3_vl_nemotron_embed",
        ("model.language_model.", "model.visual.", "lm_head.weight"),
        None,
        {"pooling": "colbert"},
        nemotron=True,
        examples="nvidia/nemotron-colembed-vl-4b-v2, nvidia/nemotron-colembed-vl-8b-v2",
    ),
    "colpali-engine": Layout(
        "ColQwen3", "qwen3_vl", ("model.language_model.", "model.visual.", None), ("model.custom_text_proj", 20)
    ),
}
NAMES = list(LAYOUTS)


def made(layout: Layout, folder: Path, **config: Any) -> QwenVL:
    """A checkpoint in this layout, and the model that it was written from."""
    text, visual, head = layout.names
    modules = {} if layout.projection is None else {layout.projection[0]: nn.Linear(HIDDEN, layout.projection[1])}
    tiny = QwenVL.make("qwen3_vl", **modules)
    tiny.save(
        folder,
        prefixed(text, visual, head),
        architectures=[layout.architecture],
        model_type=layout.model_type,
        **layout.config,
        **config,
    )
    # As many as the limit of pixels in preprocessor_config.json allows.
    (folder / "processor_config.json").write_text(json.dumps({"max_num_visual_tokens": 16}))
    return tiny


def expected(tiny: QwenVL, layout: Layout, text: str, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
    """[tokens, width] by the formulas of the model's own code; text has a placeholder per picture."""
    model = tiny.model.model
    if layout.nemotron:
        inputs = tiny.inputs(text, images)
        ids, grids = inputs["input_ids"], inputs.get("image_grid_thw")
        # Tokens see both sides by a mask of the caller's, of four dimensions, which is taken as it is.
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        positions, _ = model.get_rope_index(ids, inputs["mm_token_type_ids"], grids)
        norm, model.language_model.norm = model.language_model.norm, nn.Identity()
        with torch.inference_mode():
            state = model(**inputs, position_ids=positions, attention_mask=mask).last_hidden_state[0]
        model.language_model.norm = norm
    else:
        state = tiny.hidden(text, images)
    for projection in tiny.modules.values():
        with torch.inference_mode():
            state = projection(state)[:, : layout.config.get("dims")]
    return F.normalize(state, dim=-1).numpy()


def tokens_of(model: Model, text: str, images: Sequence[Image.Image]) -> Tokens:
    """The tokens of a literal prompt with its pictures, their axes counted as the reference's code counts them."""
    reader = model.facts.pictures
    assert reader is not None
    shown = [reader.processor(image, {}) for image in images]
    ids, filled, axes, left, start = [], [], [], iter(shown), 0
    for token in tokenizer()(text, add_special_tokens=False)["input_ids"]:
        picture = next(left) if token == IMAGE else None
        if picture is None:
            ids.append([token])
            filled.append([False])
            axes.append(np.full((3, 1), start))
            start += 1
            continue
        assert picture.extent is not None
        rows, columns = picture.extent
        ids.append(picture.ids.tolist())
        filled.append([True] * len(picture.ids))
        down, across = np.divmod(np.arange(rows * columns), columns)
        axes.append(start + np.stack((np.zeros_like(down), down, across)))
        start += max(rows, columns)
    return Tokens(
        np.concatenate(ids),
        pictures=Pictures(tuple(shown), np.concatenate(filled), np.concatenate(axes, 1)) if shown else None,
    )


def answers(model: Model, prompts: Sequence[Tokens]) -> list[Tensor]:
    """The vectors of each prompt, of one pack."""
    from poolhouse.params import PoolingParams
    from poolhouse.pooling.rows import Rows

    batch = Batch.pack(list(prompts))
    with torch.inference_mode():
        rows = Rows(model.backbone(batch), batch.segments, batch.ids)
        pooled = model.pipelines["token_embed"](rows, PoolingParams(dimensions=model.plan.files.truncate_dim))
    return list(pooled.values.split(list(batch.segments.lengths)))


PROMPTS: list[tuple[str, tuple[int, ...]]] = [
    (f"Query: what is shown?{END * 10}", ()),
    (DESCRIBED, (0,)),
    ("a text alone", ()),
    (f"{SLOT}first, then {SLOT}{SLOT} and words behind", (1, 3, 2)),
    (DESCRIBED, (3,)),
]


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_those_of_its_own_code_packed_and_alone(name: str, tmp_path: Path, record_parity: Record) -> None:
    layout, images = LAYOUTS[name], pictures()
    tiny = made(layout, tmp_path)
    model = load(tmp_path, LoadOptions("tiny"))
    prompts = [tokens_of(model, text, [images[index] for index in shown]) for text, shown in PROMPTS]
    together, error, packing = answers(model, prompts), 0.0, 0.0
    for (text, shown), own, got in zip(PROMPTS, prompts, together, strict=True):
        wanted = expected(tiny, layout, text, [images[index] for index in shown])
        assert got.shape == wanted.shape
        largest = np.abs(wanted).max()
        error = max(error, float(np.abs(got.numpy() - wanted).max() / largest))
        (alone,) = answers(model, [own])
        packing = max(packing, float((alone - got).abs().max() / largest))
    reference = "Qwen3VLModel, both sides, no final norm" if layout.nemotron else "Qwen3VLModel and the projection"
    record_parity(
        Parity(
            *(f"ColQwen3: {name}", model.facts.served_by, reference, error, packing, layout.architecture),
            *(("token_embed",), layout.examples),
        )
    )
    assert error < 1e-5
    assert packing < 1e-5


def png(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize("name", ["tomoro", "ops, cut", "nemotron"])
def test_texts_and_pictures_are_encoded_and_scored_by_its_own_prompts(name: str, tmp_path: Path) -> None:
    layout, images = LAYOUTS[name], pictures()
    tiny = made(layout, tmp_path)
    query, text, picture, _ = (text.removeprefix("find: ") for text in WRITTEN[name.partition(",")[0]])
    wanted = {
        "query": expected(tiny, layout, query, []),
        "text": expected(tiny, layout, text, []),
        "picture": expected(tiny, layout, picture, images[:1]),
    }
    shown = {"content": [{"type": "image_url", "image_url": {"url": png(images[0])}}]}
    literal, several = PROMPTS[3]
    with LLM(str(tmp_path)) as llm:
        outputs = llm.encode(" who? ", pooling_task="token_embed", input_type="query")
        outputs += llm.encode([" who? ", shown], pooling_task="token_embed")
        for output, rows in zip(outputs, wanted.values(), strict=True):
            assert output.outputs.data.shape == rows.shape
            assert np.abs(output.outputs.array - rows).max() < 1e-4 * np.abs(rows).max()
        prompt = {"prompt": literal, "multi_modal_data": {"image": [images[index] for index in several]}}
        (output,) = llm.encode(prompt, pooling_task="token_embed")
        rows = expected(tiny, layout, literal, [images[index] for index in several])
        assert np.abs(output.outputs.array - rows).max() < 1e-4 * np.abs(rows).max()
        assert len(output.prompt_token_ids) == len(rows)
        scores = [output.outputs.score for output in llm.score(" who? ", [shown, " who? "])]
    by_hand = [float((wanted["query"] @ wanted[role].T).max(1).sum()) for role in ("picture", "text")]
    assert scores == pytest.approx(by_hand, rel=1e-4)


def test_files_in_the_words_of_transformers_4_are_read(tmp_path: Path) -> None:
    layout, images = LAYOUTS["ops"], pictures()
    tiny = made(layout, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    turns = text.pop("rope_parameters")
    text |= {"rope_theta": turns.pop("rope_theta"), "rope_scaling": turns, "torch_dtype": "float32"}
    change_json(tmp_path / "config.json", text_config=text)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    size = settings.pop("size")
    settings |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    (tmp_path / "processor_config.json").unlink()
    model = load(tmp_path, LoadOptions("tiny"))
    for image in images:
        (got,) = answers(model, [tokens_of(model, DESCRIBED, [image])])
        wanted = expected(tiny, layout, DESCRIBED, [image])
        assert got.shape == wanted.shape
        assert np.abs(got.numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_an_adapter_changes_the_text_half_and_the_projection(tmp_path: Path) -> None:
    layout, images = LAYOUTS["tomoro"], pictures()
    tiny = made(layout, tmp_path / "base")
    weights = dict(tiny.model.named_parameters())
    changed = {
        "vlm.model.language_model.layers.1.self_attn.q_proj": weights[
            "model.language_model.layers.1.self_attn.q_proj.weight"
        ],
        "vlm.model.language_model.layers.2.mlp.up_proj": weights["model.language_model.layers.2.mlp.up_proj.weight"],
        "embedding_proj_layer": tiny.modules["embedding_proj_layer"].weight,
    }
    low_rank: dict[str, Tensor] = {}
    for module, weight in changed.items():
        a, b = torch.randn(4, weight.shape[1]) * 0.2, torch.randn(weight.shape[0], 4) * 0.2
        low_rank |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        with torch.no_grad():
            weight.add_(2 * b @ a)
    (tmp_path / "adapter").mkdir()
    save_file(low_rank, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    model = load(tmp_path / "adapter", LoadOptions("tiny"))
    (got,) = answers(model, [tokens_of(model, DESCRIBED, images[:1])])
    wanted = expected(tiny, layout, DESCRIBED, images[:1])
    assert np.abs(got.numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_options_change_what_files_say(tmp_path: Path) -> None:
    layout, images = LAYOUTS["ops, cut"], pictures()
    tiny = made(layout, tmp_path)
    model = load(tmp_path, LoadOptions("tiny", dtype="bfloat16", overrides={"dims": 8}))
    (got,) = answers(model, [tokens_of(model, DESCRIBED, images[:1])])
    wanted = expected(tiny, replace(layout, config={"dims": 8}), DESCRIBED, images[:1])
    assert got.shape == wanted.shape
    assert np.abs(got.numpy() - wanted).max() < 6e-2 * np.abs(wanted).max()


ONE = Content((Image_(None, "picture"),))
WITH_TEXT = Content((" what it says ", Image_(None, "picture"), Image_(None, "another")))
TEXT = Content((" who? ",))
# By the model's own code: a query, a text as a document, a picture, and a text with two pictures.
WRITTEN: dict[str, tuple[str, str, str, str]] = {
    "tomoro": (
        f"find: who?{END * 10}",
        f"find: who?{END * 10}",
        f"<|im_start|>user\n{SLOT}Describe the image.<|im_end|>{END}",
        f"<|im_start|>user\n{SLOT}{SLOT}Describe the image. what it says<|im_end|>{END}",
    ),
    "colpali-engine": (
        f" who? {END * 10}",
        f" who? {END * 10}",
        f"<|im_start|>user\n{SLOT}Describe the image.<|im_end|>{END}",
        f"<|im_start|>user\n{SLOT}{SLOT}Describe the image.  what it says <|im_end|>{END}",
    ),
    "ops": (
        f"Query:  who? {END * 10}",
        f"Query:  who? {END * 10}",
        f"<|im_start|>user\n{SLOT}Describe the image.<|im_end|><|im_start|>assistant\n{END}",
        f"<|im_start|>user\n{SLOT}{SLOT}Describe the image.  what it says <|im_end|><|im_start|>assistant\n{END}",
    ),
    "nemotron": (
        "<|im_start|>user\nQuery: query:  who? <|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\npassage:  who? <|im_end|>\n<|im_start|>assistant\n",
        f"<|im_start|>user\n{SLOT}passage: <|im_end|>\n<|im_start|>assistant\n",
        f"<|im_start|>user\n{SLOT}{SLOT}passage:  what it says <|im_end|>\n<|im_start|>assistant\n",
    ),
}


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_prompts_are_those_of_its_own_code(name: str, tmp_path: Path) -> None:
    made(LAYOUTS[name], tmp_path)
    if name == "tomoro":
        change_json(tmp_path / "processor_config.json", query_prefix="find: ")
    plan = decide(tmp_path, LoadOptions("tiny"))
    assert plan.pictures is not None
    prompts = plan.pictures.reader(plan.config, plan.picture_folder).prompts
    asked = ((TEXT, "query"), (TEXT, "document"), (ONE, "document"), (WITH_TEXT, None))
    written = [prompts(content, role, None) for content, role in asked]
    assert [one.text + one.tail for one in written] == list(WRITTEN[name])
    # The caller's text is all that may be cut.
    assert written[0].text.rstrip().endswith("who?")


def test_prefixes_may_be_overridden(tmp_path: Path) -> None:
    made(LAYOUTS["colpali-engine"], tmp_path)
    model = load(tmp_path, LoadOptions("tiny", overrides={"query_prefix": "Query: "}))
    assert model.facts.pictures is not None
    assert model.facts.pictures.prompts(TEXT, "query", None).whole == f"Query:  who? {END * 10}"


def test_vllms_plain_prompts_are_an_option(tmp_path: Path) -> None:
    made(LAYOUTS["tomoro"], tmp_path)
    model = load(tmp_path, LoadOptions("tiny", colbert_compat="vllm"))
    assert model.facts.late_interaction is None
    assert model.facts.pictures is not None
    written = model.facts.pictures.prompts(WITH_TEXT, "query", None)
    assert written == Written(f"{SLOT}{SLOT} what it says ")
    assert "Read as ColQwen3 of TomoroAI, with vLLM's plain prompts (colbert_compat='vllm')." in model.facts.notes


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [({}, 1280), ({"max_num_visual_tokens": 9}, 9)],
)
def test_tomoros_loader_limits_the_tokens_of_a_picture(settings: dict[str, int], tokens: int, tmp_path: Path) -> None:
    made(LAYOUTS["tomoro"], tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    reader = load(tmp_path, LoadOptions("tiny")).facts.pictures
    assert reader is not None
    picture = reader.processor(Image.new("RGB", (600, 600)), {})
    side = math.isqrt(tokens)
    assert picture.extent == (side, side)


def test_vectors_of_ops_are_cut_to_dims_unless_a_request_says_otherwise(tmp_path: Path) -> None:
    made(LAYOUTS["ops, cut"], tmp_path)
    model = load(tmp_path, LoadOptions("tiny"))
    assert (model.facts.width, model.plan.files.truncate_dim) == (HIDDEN, 12)
    model.facts.matryoshka.check(5, "tiny")


def test_the_plan_names_the_kind_and_what_is_assumed(tmp_path: Path) -> None:
    made(LAYOUTS["nemotron"], tmp_path)
    described = decide(tmp_path, LoadOptions("tiny")).described()
    assert described["pictures"] == "Nemotron ColEmbed VL v2"
    assert described["runner"] == "native family qwen3_vl_text"
    assert any("the final norm is left out" in note for note in described["notes"])


SPOILT: dict[str, tuple[dict[str, Tensor | None], dict[str, Any], str]] = {
    "another width": ({}, {"embed_dim": 24}, r"embedding_proj_layer.weight is \[20, 32\], .* vectors of 24"),
    "no projection": (
        {"embedding_proj_layer.weight": None, "embedding_proj_layer.bias": None},
        {},
        "has no projection, which ColQwen3 needs",
    ),
    "no tower": ({"vlm.model.visual.": None}, {}, "has no vision tower. Looked for .*patch_embed.proj.weight"),
    "half a tower": ({"vlm.model.visual.blocks.1.mlp.linear_fc1.bias": None}, {}, "linear_fc1.*in some layers"),
    "a tensor too many": ({"vlm.model.visual.head.weight": torch.ones(2)}, {}, "1 tensors that .* does not know"),
    "another grid": ({"vlm.model.visual.pos_embed.weight": torch.ones(63, 32)}, {}, "table of 63 positions"),
    "another text width": (
        {
            "vlm.model.visual.merger.linear_fc2.weight": torch.ones(24, 128),
            "vlm.model.visual.merger.linear_fc2.bias": torch.ones(24),
        },
        {},
        "vision tower do not fit together",
    ),
}


@pytest.mark.parametrize("name", sorted(SPOILT))
def test_a_spoilt_checkpoint_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    changes, config, message = SPOILT[name]
    made(LAYOUTS["tomoro"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for prefix, tensor in changes.items():
        tensors = {own: held for own, held in tensors.items() if not own.startswith(prefix)}
        if tensor is not None:
            tensors[prefix] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    change_json(tmp_path / "config.json", **config)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, LoadOptions("tiny"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
