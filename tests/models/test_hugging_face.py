"""The fallback: whatever transformers builds answers as transformers does text by text, packed or not."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.utils import logging as their_logging

from poolhouse.errors import CheckpointError
from poolhouse.models.fallback.load import Packed, load_hugging_face
from poolhouse.models.files.checkpoint import Checkpoint
from poolhouse.models.model import Served
from poolhouse.packing.pack import Batch
from poolhouse.packing.tokens import Tokens
from tests.models.parity import LENGTHS, Parity, Record, change_config, change_tensors, save, texts, worst

# float32 rounding of another order of operations; wrong positions or a leak between texts give 1e-3 and more.
TOLERANCE = 1e-5

# 64 positions: fewer than the 93 tokens of the test's pack.
ENCODER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
MODERN = ENCODER | SPECIAL | {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 1}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
MOE = DECODER | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LLAMA4 = DECODER | {
    "attention_chunk_size": 16,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
    "interleave_moe_layer_step": 2,
}
OWN_ATTENTION = "unpacked: its attention cannot be replaced"
DIFFER = "unpacked: packed and alone differ by"

# Family, options, how the verdict must begin, default pooling.
FAMILIES: list[tuple[str, dict[str, Any], str, str]] = [
    ("Bert", ENCODER, "packed, positions from 0", "CLS"),
    ("Roberta", ENCODER, "packed, positions from 2", "CLS"),
    ("Esm", ENCODER | {"pad_token_id": 0, "position_embedding_type": "absolute"}, "packed, positions from 1", "CLS"),
    ("Albert", ENCODER | {"embedding_size": 16}, "packed, positions from 0", "CLS"),
    ("Xmod", ENCODER | {"languages": ["en"], "default_language": "en"}, "packed, positions from 2", "CLS"),
    ("ModernBert", MODERN, "packed, positions from 0", "CLS"),
    ("OPT", ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 32}, "packed, positions from 0", "LAST"),
    ("GPT2", GPT2, "packed, positions from 0", "LAST"),
    ("Qwen3", DECODER, "packed, positions from 0", "LAST"),
    ("Qwen3Moe", MOE, "packed, positions from 0", "LAST"),
    ("Mistral", DECODER | {"sliding_window": 20}, "packed, positions from 0", "LAST"),
    ("Gemma2", DECODER | {"sliding_window": 20}, "packed, positions from 0", "LAST"),
    (
        "Gemma3Text",
        DECODER | {"sliding_window": 12, "use_bidirectional_attention": True},
        "packed, positions from 0",
        "CLS",
    ),
    ("MPNet", ENCODER, OWN_ATTENTION, "CLS"),
    ("DebertaV2", ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, OWN_ATTENTION, "CLS"),
    ("MegatronBert", ENCODER, OWN_ATTENTION, "CLS"),
    ("RoFormer", ENCODER, OWN_ATTENTION, "CLS"),
    ("ConvBert", ENCODER, OWN_ATTENTION, "CLS"),
    ("Falcon", ENCODER, OWN_ATTENTION, "LAST"),
    ("Bloom", GPT2 | {"hidden_size": 32}, OWN_ATTENTION, "LAST"),
    ("FNet", ENCODER, DIFFER, "CLS"),
    ("MobileBert", ENCODER, DIFFER, "CLS"),
    ("Lfm2", DECODER | {"layer_types": ["conv", "full_attention", "conv"]}, DIFFER, "LAST"),
    ("Mamba", {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, DIFFER, "LAST"),
    ("LayoutLM", ENCODER, "unpacked: the model makes an attention mask of its own", "CLS"),
    ("T5", T5, "unpacked: attention takes 'position_bias'", "CLS"),
    ("Bart", BART, DIFFER, "CLS"),
    ("Llama4Text", LLAMA4, "unpacked: attention is limited to 16 tokens in a way that is no sliding window", "LAST"),
]


@pytest.mark.parametrize(("family", "options", "verdict", "pooling"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_the_fallback_answers_as_transformers_does_text_by_text(
    family: str, options: dict[str, Any], verdict: str, pooling: str, tmp_path: Path, record_parity: Record
) -> None:
    save(tmp_path, family, options)
    fallback = load(tmp_path)
    expected = reference(tmp_path)
    together, alone = run(fallback, texts()), [run(fallback, [text])[0] for text in texts()]
    assert fallback.served_by.startswith(f"transformers, {verdict}")
    assert isinstance(fallback.backbone, Packed) == verdict.startswith("packed")
    assert fallback.pooling == pooling
    error = worst(together, expected)
    assert error < TOLERANCE
    assert worst(alone, expected) < TOLERANCE
    words = "packed" if isinstance(fallback.backbone, Packed) else "unpacked"
    record_parity(Parity(family, f"transformers, {words}", f"{family}Model", error, worst(together, alone)))


@pytest.mark.parametrize(
    ("family", "packed"), [("Bert", True), ("Qwen3", True), ("MobileBert", False), ("Lfm2", False)]
)
def test_the_probe_tells_the_same_in_bfloat16(family: str, packed: bool, tmp_path: Path) -> None:
    options = {"Lfm2": DECODER | {"layer_types": ["conv", "full_attention", "conv"]}, "Qwen3": DECODER}
    save(tmp_path, family, options.get(family, ENCODER))
    fallback = load(tmp_path, dtype=torch.bfloat16)
    assert isinstance(fallback.backbone, Packed) == packed
    hidden = fallback.backbone(Batch.pack(texts()))
    assert hidden.dtype == torch.bfloat16
    # Eight bits of mantissa through three layers, rounded in another order.
    assert worst(list(hidden.split(LENGTHS)), reference(tmp_path, torch.bfloat16)) < 0.05


@pytest.mark.parametrize(("family", "packed"), [("Bert", True), ("MegatronBert", False)])
def test_token_types_reach_the_model(family: str, packed: bool, tmp_path: Path) -> None:
    save(tmp_path, family, ENCODER)
    fallback = load(tmp_path)
    pair = Tokens(np.arange(10, 19), types=np.array([0, 0, 0, 0, 1, 1, 1, 1, 1]))
    got = run(fallback, [pair, *texts()])[0]
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    ids, types = torch.from_numpy(pair.ids)[None], torch.from_numpy(pair.types)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids, token_type_ids=types).last_hidden_state[0]
        untyped = model(input_ids=ids).last_hidden_state[0]
    assert isinstance(fallback.backbone, Packed) == packed
    assert worst([got], [expected]) < TOLERANCE
    assert worst([untyped], [expected]) > 100 * TOLERANCE


def test_facts_of_a_model(tmp_path: Path) -> None:
    save(tmp_path, "Roberta", ENCODER)
    fallback = load(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    assert (fallback.sizes.hidden_size, fallback.sizes.vocabulary_size) == (32, 99)
    # Two of the 64 positions stand before the first token: RoBERTa counts from the padding id, 1, plus one.
    assert fallback.sizes.positions == 62
    assert fallback.sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert fallback.pooling == "CLS"


def test_the_probe_leaves_windows_as_they_were(tmp_path: Path) -> None:
    save(tmp_path, "ModernBert", MODERN | {"local_attention": 128})
    model = load(tmp_path).backbone.forward.model
    fresh = transformers.AutoModel.from_pretrained(tmp_path)
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    assert windows == [getattr(module, "sliding_window", None) for module in fresh.modules()]
    assert model.config.sliding_window == fresh.config.sliding_window == 64


def test_ropes_that_depend_on_the_longest_text_are_not_packed(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    save(tmp_path, "Llama", DECODER | {"rope_parameters": rope, "max_position_embeddings": 16})
    fallback = load(tmp_path)
    assert fallback.served_by == "transformers, unpacked: rope of type 'dynamic' depends on the longest text of a pack"
    # Longest first: a text of 30 tokens must not change the frequencies of one that fits.
    longest_first = sorted(texts(), key=len, reverse=True)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        expected = [model(input_ids=torch.from_numpy(text.ids)[None]).last_hidden_state[0] for text in longest_first]
    assert worst(run(fallback, longest_first), expected) < TOLERANCE


def test_several_models_of_one_process_keep_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    save(folders[0], "Qwen3", DECODER)
    save(folders[1], "Gemma2", DECODER | {"sliding_window": 6})
    first, second = (load(folder) for folder in folders)
    before = run(first, texts())
    run(second, texts()[:2])
    for got, expected in zip(run(first, texts()), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_checkpoint_without_a_pooler_is_complete(tmp_path: Path) -> None:
    save(tmp_path, "Bert", ENCODER, model="BertForMaskedLM")
    fallback = load(tmp_path)
    assert any("not needed: pooler.dense" in note for note in fallback.notes)
    assert any(note.startswith("Tensors left out: cls.predictions") for note in fallback.notes)
    assert worst(run(fallback, texts()), reference(tmp_path)) < TOLERANCE


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.weight", "embeddings.token_type_embeddings.weight"])
def test_a_missing_weight_is_named(name: str, tmp_path: Path) -> None:
    save(tmp_path, "Bert", ENCODER)
    change_tensors(tmp_path, drop=name)
    with pytest.raises(CheckpointError, match=f"lacks 1 tensors, some of which BertModel needs: {name}"):
        load(tmp_path)


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    save(tmp_path, "Bert", ENCODER)
    change_config(tmp_path, intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"intermediate.dense.bias \(48,\) instead of \(40,\)"):
        load(tmp_path)


def test_the_decoder_of_an_encoder_decoder_model_is_not_needed(tmp_path: Path) -> None:
    save(tmp_path, "Bart", BART)
    change_tensors(tmp_path, drop="decoder.layers.1.fc1.weight")
    fallback = load(tmp_path)
    assert "Of this encoder-decoder model only the encoder is used." in fallback.notes
    change_tensors(tmp_path, drop="encoder.layers.1.fc1.weight")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, .* encoder.layers.1.fc1.weight"):
        load(tmp_path)


def test_an_unknown_type_is_refused_in_plain_words(tmp_path: Path) -> None:
    save(tmp_path, "Bert", ENCODER)
    change_config(tmp_path, model_type="brand-new")
    with pytest.raises(CheckpointError, match=r"model_type 'brand-new', which neither Poolhouse nor transformers 5\."):
        load(tmp_path)
    change_config(tmp_path, model_type=None)
    with pytest.raises(CheckpointError, match="names no model_type"):
        load(tmp_path)


def test_a_model_of_pictures_is_refused(tmp_path: Path) -> None:
    options = ENCODER | {"image_size": 8, "patch_size": 4}
    del options["vocab_size"], options["max_position_embeddings"]
    save(tmp_path, "ViT", options)
    with pytest.raises(CheckpointError, match="no text model"):
        load(tmp_path)


def test_a_config_may_name_several_tokens_that_end_a_text(tmp_path: Path) -> None:
    save(tmp_path, "Glm", DECODER | {"head_dim": 8, "pad_token_id": 0})
    change_config(tmp_path, eos_token_id=[1, 2, 3])
    fallback = load(tmp_path)
    assert worst(run(fallback, texts()), reference(tmp_path)) < TOLERANCE


def test_a_config_that_transformers_refuses_is_reported(tmp_path: Path) -> None:
    save(tmp_path, "Bert", ENCODER)
    change_config(tmp_path, hidden_size=30)
    with pytest.raises(CheckpointError, match=r"transformers .*30.* not a multiple of the number of attention"):
        load(tmp_path)


def test_overrides_of_the_config_count(tmp_path: Path) -> None:
    save(tmp_path, "Bert", ENCODER)
    checkpoint = Checkpoint(tmp_path)
    config = checkpoint.config | {"num_hidden_layers": 2}
    fallback = load_hugging_face(checkpoint, config, torch.float32, torch.device("cpu"))
    assert len(fallback.backbone.forward.model.encoder.layer) == 2
    assert any("encoder.layer.2" in note for note in fallback.notes)


def test_transformers_stays_as_talkative_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "Bert", ENCODER, model="BertForMaskedLM")
    capsys.readouterr()
    before = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity_info()
    with caplog.at_level(logging.DEBUG):
        load(tmp_path)
    assert their_logging.get_verbosity() == logging.INFO
    assert their_logging.is_progress_bar_enabled() == before[1]
    their_logging.set_verbosity(before[0])
    assert capsys.readouterr() == ("", "")
    assert not caplog.records


OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class HomeMadeConfig(PretrainedConfig):
    model_type = "home-made"

    def __init__(self, vocab_size=50, hidden_size=8, **rest):
        super().__init__(**rest)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size


class HomeMadeModel(PreTrainedModel):
    config_class = HomeMadeConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, input_ids, attention_mask=None):
        hidden = self.tokens(input_ids)
        return BaseModelOutput(last_hidden_state=hidden + hidden.mean(1, keepdim=True))
"""


@pytest.fixture
def home_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a model that only its own code knows."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", os.fspath(tmp_path / "modules"))
    folder = tmp_path / "home_made"
    folder.mkdir()
    (folder / "home.py").write_text(OWN_CODE)
    code = {"AutoConfig": "home.HomeMadeConfig", "AutoModel": "home.HomeMadeModel"}
    config = {"model_type": "home-made", "vocab_size": 50, "hidden_size": 8, "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file({"tokens.weight": torch.randn(50, 8)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_code_of_a_repository_is_run_only_where_the_user_says_so(home_made: Path) -> None:
    with pytest.raises(CheckpointError, match=r"home.HomeMadeModel.*use trust_remote_code=True to run it"):
        load(home_made)
    fallback = load(home_made, trust_remote_code=True)
    # It mixes all tokens that it is given, so packing would mix texts.
    assert not isinstance(fallback.backbone, Packed)
    table = Checkpoint(home_made).tensors["tokens.weight"]
    short = [Tokens(text.ids % 50) for text in texts()]
    expected = [table[text.ids] + table[text.ids].mean(0) for text in short]
    assert worst(run(fallback, short), expected) < TOLERANCE


def test_code_beside_a_known_type_is_left_aside_and_noted(tmp_path: Path) -> None:
    save(tmp_path, "Bert", ENCODER)
    change_config(tmp_path, auto_map={"AutoModel": "modeling_own.OwnBert"})
    fallback = load(tmp_path)
    assert any("modeling_own.OwnBert" in note and "trust_remote_code=True" in note for note in fallback.notes)
    with pytest.raises(CheckpointError, match=r"The code 'modeling_own.OwnBert' .* cannot be used"):
        load(tmp_path, trust_remote_code=True)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "packed"), [("Bert", True), ("Roberta", True), ("Mistral", True), ("FNet", False)])
def test_the_fallback_on_cuda(family: str, packed: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, family, DECODER | {"sliding_window": 20} if family == "Mistral" else ENCODER)
    fallback = load(tmp_path, dtype=dtype, device=torch.device("cuda"))
    assert isinstance(fallback.backbone, Packed) == packed
    got = fallback.backbone(Batch.pack(texts(), "cuda")).cpu()
    assert worst(list(got.split(LENGTHS)), reference(tmp_path)) < (0.1 if dtype == torch.bfloat16 else 1e-4)


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
) -> Served:
    checkpoint = Checkpoint(folder)
    return load_hugging_face(
        checkpoint,
        checkpoint.config,
        dtype,
        torch.device("cpu") if device is None else device,
        trust_remote_code=trust_remote_code,
    )


def run(fallback: Served, prompts: list[Tokens]) -> list[Tensor]:
    return list(fallback.backbone(Batch.pack(prompts)).split([len(prompt) for prompt in prompts]))


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """transformers by itself, text by text; the encoder of an encoder-decoder model."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    with torch.inference_mode():
        return [model(input_ids=torch.from_numpy(text.ids)[None]).last_hidden_state[0] for text in texts()]
