"""How long a prompt may be: only positions that the model was made for bind the user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from poolhouse import LLM, ConfigError
from tests.models.parity import change_config
from tests.models.tiny import LAYERS, save, tokenizer

GPT = {"vocab_size": 99, "hidden_size": 32, "n_layer": 1, "n_head": 2, "pad_token_id": 1}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "pad_token_id": 1}
MPT = {"vocab_size": 99, "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64}
XLNET = {"vocab_size": 99, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48, "pad_token_id": 1}
MAMBA = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": 1}
BART = {
    "vocab_size": 99,
    "d_model": 32,
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 1), ("ffn_dim", 48))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "pad_token_id": 1,
}
DEBERTA = LAYERS | {
    "max_position_embeddings": 64,
    "relative_attention": True,
    "position_buckets": 16,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
SHORT = LAYERS | {"max_position_embeddings": 64}
# Model, config and the positions that the model has; None where it counts distances, or reads in order.
ROWS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "T5": ("T5EncoderModel", T5, None),
    "Bloom": ("BloomModel", GPT, None),
    "XLNet": ("XLNetModel", XLNET, None),
    "Mamba": ("MambaModel", MAMBA, None),
    "Falcon, ALiBi": ("FalconModel", LAYERS | {"alibi": True}, None),
    "DeBERTa v3": ("DebertaV2Model", DEBERTA, None),
    "MPT, whose table of distances ends": ("MptModel", MPT, 64),
    "BERT": ("BertModel", SHORT, 64),
    "RoBERTa": ("RobertaModel", SHORT, 62),
    "I-BERT": ("IBertModel", SHORT, 62),
    "LED": ("LEDModel", BART | {"max_encoder_position_embeddings": 64, "attention_window": 8}, 64),
}


def made(folder: Path, row: str) -> None:
    model, options, _ = ROWS[row]
    tokenizer(folder, "bert", most=int(1e30))
    config = model.replace("EncoderModel", "Config").replace("Model", "Config")
    save(folder, model, config, options)


@pytest.mark.parametrize("row", ROWS)
def test_the_users_limit_ends_where_the_models_positions_end(row: str, tmp_path: Path) -> None:
    made(tmp_path, row)
    positions = ROWS[row][2]
    if positions is None:
        with LLM(str(tmp_path), max_model_len=300) as llm:
            assert llm.engine.facts.max_tokens == 300
            assert np.isfinite(llm.embed("w1 " * 298, use_tqdm=False)[0].outputs.array).all()
        return
    with LLM(str(tmp_path), max_model_len=positions) as llm:
        assert np.isfinite(llm.embed("w1 " * (positions - 2), use_tqdm=False)[0].outputs.array).all()
    with pytest.raises(ConfigError, match=rf"max_model_len={positions + 1} is more than the {positions} positions"):
        LLM(str(tmp_path), max_model_len=positions + 1)


@pytest.mark.parametrize("row", ["T5", "Bloom", "DeBERTa v3"])
def test_longer_texts_are_read_as_transformers_reads_them(row: str, tmp_path: Path) -> None:
    made(tmp_path, row)
    model = transformers.AutoModelForTextEncoding if row == "T5" else transformers.AutoModel
    reference = model.from_pretrained(tmp_path).eval()
    ids = np.arange(400) % 90 + 5
    with torch.inference_mode():
        expected = reference(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0].numpy()
    with LLM(str(tmp_path), max_model_len=400, pooler_config={"use_activation": False}) as llm:
        (output,) = llm.encode({"prompt_token_ids": ids}, pooling_task="token_embed", use_tqdm=False)
    np.testing.assert_allclose(output.outputs.array, expected, atol=1e-5 * np.abs(expected).max())


def test_without_any_limit_a_default_holds_that_the_user_may_raise(tmp_path: Path) -> None:
    made(tmp_path, "T5")
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.max_tokens == 2048
    with LLM(str(tmp_path), max_model_len=4096) as llm:
        assert llm.engine.facts.max_tokens == 4096


def test_a_tokenizers_limit_is_a_default(tmp_path: Path) -> None:
    made(tmp_path, "T5")
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 512}))
    for wanted, limit in ((None, 512), (-1, 512), (100, 100), (4096, 4096)):
        with LLM(str(tmp_path), max_model_len=wanted) as llm:
            assert llm.engine.facts.max_tokens == limit


def test_what_the_config_states_is_the_default_of_a_model_without_an_end(tmp_path: Path) -> None:
    made(tmp_path, "DeBERTa v3")
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.max_tokens == 64
    change_config(tmp_path, max_position_embeddings=100)
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.max_tokens == 100
