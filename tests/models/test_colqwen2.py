"""ColQwen2, ColQwen2.5 and BiQwen in every layout against transformers' Qwen-VL models and a projection."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poolhouse import LLM
from poolhouse.errors import CheckpointError
from poolhouse.inputs.content import Content
from poolhouse.inputs.content import Image as Shown
from poolhouse.inputs.prompts import Role
from poolhouse.models.adapters.adapters import AdapterOptions
from poolhouse.models.load import load
from poolhouse.models.model import Model
from poolhouse.models.plan import LoadOptions
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Tokens
from poolhouse.params import PoolingParams
from poolhouse.pooling.rows import Rows
from poolhouse.tasks import Task
from tests.models.parity import Parity, Record, change_config, change_tensors, worst
from tests.models.qwen_vl import MIDDLE, NEW, OLD, SLOT, QwenVL, pictures, prefixed
from tests.models.test_colqwen3 import tokens_of

HIDDEN, WIDTH = 32, 16
END = "<|endoftext|>"
TOLERANCE = 1e-5
Names = Callable[[str], str | None]


@dataclass(frozen=True)
class Layout:
    """One layout of files. projection: its name, None for none. outer: config.json around that of the Qwen-VL model.

    suffix: behind texts. query: before them.
    """

    kind: str
    architecture: str
    names: Names
    projection: str | None = "custom_text_proj"
    flat: bool = False
    outer: Mapping[str, Any] = field(default_factory=dict)
    query: str = "Query: "
    suffix: str = END * 10
    examples: str = ""


HF = partial(
    Layout,
    architecture="ColQwen2ForRetrieval",
    projection="embedding_proj_layer",
    outer={"model_type": "colqwen2", "embedding_dim": WIDTH},
    suffix=END * 10 + "\n",
)
BI = partial(Layout, projection=None, suffix=END)
LAYOUTS = {
    "ColQwen2, 5.x": Layout("qwen2_vl", "ColQwen2", NEW, examples="vidore/colqwen2-v1.0-merged"),
    "ColQwen2, 4.x": Layout("qwen2_vl", "ColQwen2", OLD, flat=True),
    "ColQwen2.5, 5.x": Layout(
        "qwen2_5_vl", "ColQwen2_5", NEW, examples="Metric-AI/ColQwen2.5-3b-multilingual-v1.0-merged"
    ),
    "ColQwen2.5, 4.x": Layout("qwen2_5_vl", "ColQwen2_5", OLD, flat=True),
    "ColQwen2 of transformers": HF(
        "qwen2_vl", names=prefixed("vlm.language_model.", "vlm.visual."), examples="vidore/colqwen2-v1.0-hf"
    ),
    "ColQwen2 of transformers, older": HF(
        "qwen2_vl", names=prefixed("vlm.model.language_model.", "vlm.model.visual.", "vlm.lm_head.weight")
    ),
    "ColQwen2 of transformers on Qwen2.5-VL": HF("qwen2_5_vl", names=prefixed("vlm.language_model.", "vlm.visual.")),
    "BiQwen2": BI("qwen2_vl", "BiQwen2", OLD, flat=True, examples="vidore/biqwen2-v0.1"),
    "BiQwen2.5": BI("qwen2_5_vl", "BiQwen2_5", NEW),
    "BiQwen3": BI("qwen3_vl", "BiQwen3", MIDDLE, query=""),
}
COL = [name for name, layout in LAYOUTS.items() if layout.projection]
BIS = [name for name, layout in LAYOUTS.items() if not layout.projection]
# What a caller gives: parts, a number for a picture.
CONTENTS: list[tuple[Role, list[str | int]]] = [
    ("query", ["what is shown?"]),
    ("document", [0]),
    ("document", [1, 3]),
    ("query", [" "]),
    ("document", ["a caption", 2]),
    ("document", ["a text alone"]),
]


def made(layout: Layout, folder: Path, **settings: Any) -> QwenVL:
    """A checkpoint in this layout, and the model that it was written from."""
    modules = {} if layout.projection is None else {layout.projection: nn.Linear(HIDDEN, WIDTH)}
    tiny = QwenVL.make(layout.kind, settings=settings, **modules)
    tiny.save(folder, layout.names, flat=layout.flat, architectures=[layout.architecture])
    if layout.outer:
        inner = json.loads((folder / "config.json").read_text())
        outer = {"architectures": [layout.architecture], "vlm_config": inner, **layout.outer}
        (folder / "config.json").write_text(json.dumps(outer))
    return tiny


def prompt(layout: Layout, parts: Sequence[str | int]) -> str:
    """The literal prompt of what a caller gives."""
    shown, text = sum(isinstance(part, int) for part in parts), "".join(part for part in parts if isinstance(part, str))
    if not shown:
        return f"{layout.query}{text}{layout.suffix}"
    return f"<|im_start|>user\n{SLOT * shown}Describe the image.{' ' * bool(text)}{text}<|im_end|>{END}"


def shown_in(parts: Sequence[str | int]) -> list[Image.Image]:
    return [pictures()[part] for part in parts if isinstance(part, int)]


def written(model: Model, role: Role | None, parts: Sequence[str | int], instruction: str | None = None) -> str:
    """The prompt that the model's reader writes."""
    reader = model.facts.pictures
    assert reader is not None
    content = Content(tuple(part if isinstance(part, str) else Shown(part, "") for part in parts))
    wrote = reader.prompts(content, role, instruction)
    return wrote.text + wrote.tail


def answers(
    model: Model, prompts: Sequence[Tokens], task: Task, adapters: Sequence[str | None] | None = None, **params: Any
) -> list[Tensor]:
    """The answer of each prompt to a task, of one pack; a row each of a task with one vector."""
    batch = Batch.pack(list(prompts), adapters=adapters)
    with torch.inference_mode():
        rows = Rows(model.backbone(batch), batch.segments, batch.ids)
        pooled = model.pipelines[task](rows, PoolingParams(**params))
    return list(pooled.values.split(list(pooled.segments.lengths)))


def opened(folder: Path, **options: Any) -> Model:
    return load(folder, LoadOptions(str(folder), dtype="float32", **options))


def vectors(tiny: QwenVL, text: str, images: Sequence[Image.Image]) -> Tensor:
    """[tokens, width] by the formula of the models' own code."""
    with torch.no_grad():
        state = tiny.hidden(text, images)
        for projection in tiny.modules.values():
            state = projection(state)
        return F.normalize(state, dim=-1)


def compare(
    record: Record,
    name: str,
    model: Model,
    task: Task,
    prompts: Sequence[Tokens],
    expected: Sequence[Tensor],
    reference: str,
    examples: str,
    adapters: Sequence[str | None] | None = None,
) -> None:
    """Answers of one pack against those expected and against each prompt alone, as a row of docs/models.md."""
    got = answers(model, prompts, task, adapters)
    names = [None] * len(prompts) if adapters is None else adapters
    alone = [answers(model, [own], task, [adapter])[0] for own, adapter in zip(prompts, names, strict=True)]
    error, packing = worst(got, list(expected)), worst(got, alone)
    facts = model.facts
    record(Parity(name, facts.served_by, reference, error, packing, facts.architecture, model.tasks, examples))
    assert error < TOLERANCE
    assert packing < TOLERANCE


def prompts_of(model: Model, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of the prompts of CONTENTS."""
    return [tokens_of(model, text, shown_in(parts)) for text, (_, parts) in zip(texts, CONTENTS, strict=True)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_vectors_are_those_of_transformers_packed_and_alone(name: str, tmp_path: Path, record_parity: Record) -> None:
    layout = LAYOUTS[name]
    tiny = made(layout, tmp_path)
    model = opened(tmp_path)
    assert model.tasks == (("token_embed",) if layout.projection else ("embed", "token_embed"))
    texts = [prompt(layout, parts) for _, parts in CONTENTS]
    assert [written(model, role, parts) for role, parts in CONTENTS] == texts
    expected = [vectors(tiny, text, shown_in(parts)) for text, (_, parts) in zip(texts, CONTENTS, strict=True)]
    tokens = prompts_of(model, texts)
    if layout.projection:
        reference = "transformers' Qwen-VL and a projection"
        compare(
            record_parity,
            f"late interaction: {name}",
            model,
            "token_embed",
            tokens,
            expected,
            reference,
            layout.examples,
        )
    else:
        reference, last = "transformers' Qwen-VL, its last token", [rows[-1:] for rows in expected]
        compare(record_parity, f"one vector: {name}", model, "embed", tokens, last, reference, layout.examples)


def test_transformers_own_class_agrees_where_it_is_given_positions(tmp_path: Path) -> None:
    layout = LAYOUTS["ColQwen2 of transformers"]
    tiny = made(layout, tmp_path)
    theirs = transformers.ColQwen2ForRetrieval.from_pretrained(tmp_path, dtype=torch.float32).eval()
    text, images = prompt(layout, [0, 1]), shown_in([0, 1])
    inputs = tiny.inputs(text, images)
    token_types = inputs.pop("mm_token_type_ids")
    positions, _ = theirs.vlm.get_rope_index(inputs["input_ids"], token_types, image_grid_thw=inputs["image_grid_thw"])
    # It takes the patches of each picture padded to the longest.
    counts = inputs["image_grid_thw"].prod(1).tolist()
    inputs["pixel_values"] = nn.utils.rnn.pad_sequence(list(inputs["pixel_values"].split(counts)), batch_first=True)
    with torch.inference_mode():
        with_positions = theirs(**inputs, position_ids=positions).embeddings[0]
        without = theirs(**inputs).embeddings[0]
    model = opened(tmp_path)
    (got,) = answers(model, [tokens_of(model, text, images)], "token_embed")
    assert worst([got], [with_positions]) < TOLERANCE
    # Its plain call counts positions of pictures like those of text.
    assert worst([got], [without]) > 0.1


@pytest.mark.parametrize("name", ["ColQwen2, 4.x", "BiQwen2.5"])
def test_pages_are_scored_from_python(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    tiny = made(layout, tmp_path)
    sides: list[list[str | int]] = [["what is shown?"], [0], [1, 3], ["a text alone"], [2, "and a caption"]]
    rows = [vectors(tiny, prompt(layout, side), shown_in(side)) for side in sides]
    if layout.projection is None:
        rows = [own[-1:] for own in rows]
    expected = [float((rows[0] @ own.T).max(1).values.sum()) for own in rows[1:]]
    pages = [{"content": [part if isinstance(part, str) else pictures()[part] for part in side]} for side in sides[1:]]
    with LLM(str(tmp_path), dtype="float32") as llm:
        got = llm.score("what is shown?", pages, use_tqdm=False)
        assert [one.outputs.score for one in got] == pytest.approx(expected, abs=1e-4)


def test_a_picture_is_limited_to_768_tokens_where_no_file_says_more(tmp_path: Path) -> None:
    def tokens(folder: Path) -> int:
        reader = opened(folder).facts.pictures
        assert reader is not None
        return len(reader.processor(Image.new("RGB", (1500, 1500)), {}).ids)

    made(LAYOUTS["ColQwen2, 5.x"], tmp_path)
    assert tokens(tmp_path) == 16
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del settings["size"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert tokens(tmp_path) == 27 * 27
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"max_num_visual_tokens": 100}))
    assert tokens(tmp_path) == 100


def adapted(tiny: QwenVL, base: Path, folder: Path, names: Names, **changes: Any) -> QwenVL:
    """A PEFT folder on a checkpoint, made by the peft library, and the model with it merged by peft, in place of `tiny`.

    names: of tensors in the file; changes: of adapter_config.json.
    """
    whole = nn.Module()
    whole.model = tiny.model.model
    for name, module in tiny.modules.items():
        whole.add_module(name, module)
    targets = "|".join((r".*language_model.*(down|gate|up|q|k|v|o)_proj", *tiny.modules))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=f"({targets})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(whole, config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    front = "base_model.model."
    tensors = {
        front + (names(own) or own): tensor.clone()
        for name, tensor in peft.get_peft_model_state_dict(model).items()
        for own in [name.removeprefix(front)]
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    merged = model.merge_and_unload()
    return QwenVL(tiny.kind, tiny.model, tiny.settings, {name: getattr(merged, name) for name in tiny.modules})


ADAPTED = {
    "ColQwen2, 4.x": (OLD, "vidore/colqwen2-v1.0"),
    "ColQwen2.5, 4.x": (OLD, "vidore/colqwen2.5-v0.2, nomic-ai/colnomic-embed-multimodal-3b, -7b"),
    "ColQwen2.5, 5.x": (NEW, ""),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_are_merged_as_peft_merges_them(name: str, tmp_path: Path, record_parity: Record) -> None:
    layout, (names, examples) = LAYOUTS[name], ADAPTED[name]
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny = made(layout, base)
    plain = vectors(tiny, prompt(layout, [0]), shown_in([0]))
    merged = adapted(tiny, base, folder, names)
    model = opened(folder)
    texts = [prompt(layout, parts) for _, parts in CONTENTS]
    tokens = prompts_of(model, texts)
    expected = [vectors(merged, text, shown_in(parts)) for text, (_, parts) in zip(texts, CONTENTS, strict=True)]
    assert worst([plain], [expected[1]]) > 0.1
    title, reference = (
        f"late interaction: {name}, as an adapter",
        "peft's merge, transformers' Qwen-VL and a projection",
    )
    compare(record_parity, title, model, "token_embed", tokens, expected, reference, examples)
    # An adapter that a request chooses changes the projection of its own rows alone.
    chosen = opened(base, adapters=AdapterOptions(modules={"own": folder}))
    mixed = answers(chosen, [tokens[1], tokens[0], tokens[1]], "token_embed", [None, "own", "own"])
    assert worst(mixed, [plain, expected[0], expected[1]]) < TOLERANCE


def test_a_projection_may_come_whole_with_an_adapter_that_a_name_tells(tmp_path: Path) -> None:
    layout, base, folder = LAYOUTS["ColQwen2.5, 4.x"], tmp_path / "base", tmp_path / "colnomic-embed-multimodal-3b"
    tiny = made(layout, base)
    merged = adapted(tiny, base, folder, OLD)
    # As peft saves modules_to_save; the base is a plain Qwen2.5-VL.
    tensors = {
        name: tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        if "text_proj" not in name
    }
    whole = {
        f"base_model.model.custom_text_proj.{kind}": tensor
        for kind, tensor in merged.modules["custom_text_proj"].state_dict().items()
    }
    save_file(tensors | whole, folder / "adapter_model.safetensors")
    for kind in ("weight", "bias"):
        change_tensors(base, drop=f"custom_text_proj.{kind}")
    change_config(base, architectures=["Qwen2_5_VLForConditionalGeneration"])
    model = opened(folder)
    assert model.tasks == ("token_embed",)
    text = prompt(layout, [0])
    (got,) = answers(model, [tokens_of(model, text, shown_in([0]))], "token_embed")
    assert worst([got], [vectors(merged, text, shown_in([0]))]) < TOLERANCE


def test_prompts_are_those_of_the_processors_files_where_they_state_some(tmp_path: Path) -> None:
    made(LAYOUTS["ColQwen2 of transformers"], tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    stated = {"query_prefix": "Question: ", "visual_prompt_prefix": f"{SLOT}See.<|im_end|>!"}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings, **stated}))
    model = opened(tmp_path)
    assert written(model, "query", ["who?"]) == f"Question: who?{END * 10}\n"
    assert written(model, "document", [0, 1, "a page"]) == f"{SLOT}{SLOT}See. a page<|im_end|>!"


def test_an_adapter_on_a_base_without_a_projection_is_refused(tmp_path: Path) -> None:
    layout = LAYOUTS["ColQwen2, 4.x"]
    tiny = made(layout, tmp_path / "base")
    adapted(tiny, tmp_path / "base", tmp_path / "adapter", OLD)
    change_tensors(tmp_path / "base", drop="custom_text_proj.weight")
    with pytest.raises(CheckpointError, match="custom_text_proj"):
        opened(tmp_path / "adapter")


def test_a_nomic_embedder_is_found_by_the_name_of_its_adapter(tmp_path: Path, record_parity: Record) -> None:
    tiny = QwenVL.make("qwen2_5_vl")
    base = tiny.save(tmp_path / "base", lambda name: name, architectures=["Qwen2_5_VLForConditionalGeneration"])
    folder = tmp_path / "nomic-embed-multimodal-3b"
    merged = adapted(tiny, base, folder, OLD)
    model = opened(folder)
    layout = LAYOUTS["BiQwen2.5"]
    assert any("nomic-embed-multimodal" in note for note in model.facts.notes)
    texts = [prompt(layout, parts) for _, parts in CONTENTS]
    assert [written(model, role, parts) for role, parts in CONTENTS] == texts
    expected = [vectors(merged, text, shown_in(parts))[-1:] for text, (_, parts) in zip(texts, CONTENTS, strict=True)]
    title, reference = (
        "one vector: nomic-embed-multimodal, an adapter",
        "peft's merge, transformers' Qwen-VL, its last token",
    )
    examples = "nomic-ai/nomic-embed-multimodal-3b, -7b"
    compare(record_parity, title, model, "embed", prompts_of(model, texts), expected, reference, examples)
