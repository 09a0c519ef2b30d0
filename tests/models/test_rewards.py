"""Reward models against transformers' backbone and a head computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from poolhouse import LLM, CheckpointError, ConfigError, InvalidRequest, PoolingParams
from tests.models.parity import Parity, Record, change_config, change_tensors, save

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 99,
}
PROMPTS = [[5, 7, 9, 11, 7, 20], [7], [30, 31, 7, 33, 7, 35, 36, 7]]
TAG = 7


def make(folder: Path, family: str, architecture: str, head: dict[str, Tensor], **config: Any) -> None:
    """A decoder's checkpoint under another architecture's name, with a head of its own."""
    save(folder, family, TINY)
    tensors = {f"model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors | head, folder / "model.safetensors")
    change_config(folder, architectures=[architecture], **config)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{n}": n for n in range(99)}, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def two_layers(labels: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {
        "score.0.weight": (32, 32),
        "score.0.bias": (32,),
        "score.2.weight": (labels, 32),
        "score.2.bias": (labels,),
    }
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def hidden(folder: Path, family: str, ids: list[int]) -> Tensor:
    """transformers' backbone, without the names and the head of the reward model."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config").from_pretrained(folder))
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in model.state_dict()})
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]


def by_hand(folder: Path, family: str, head: dict[str, Tensor], ids: list[int]) -> Tensor:
    inner = torch.relu(hidden(folder, family, ids) @ head["score.0.weight"].T + head["score.0.bias"])
    return inner @ head["score.2.weight"].T + head["score.2.bias"]


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in expected]
    return max(float((ours - theirs).abs().max()) for ours, theirs in zip(got, expected, strict=True))


def rewards(llm: LLM, prompts: list[list[int]], **params: Any) -> list[Tensor]:
    return [output.outputs.data for output in llm.reward(prompts, pooling_params=PoolingParams(**params))]


def record(
    record_parity: Record, llm: LLM, model: str, got: list[Tensor], expected: list[Tensor], examples: str
) -> None:
    alone = [rewards(llm, [prompt])[0] for prompt in PROMPTS]
    parity = Parity(
        model,
        "native",
        "transformers' backbone and the head by hand",
        worst(got, expected),
        worst(got, alone),
        llm.model.facts.architecture,
        llm.engine.facts.tasks,
        examples,
    )
    record_parity(parity)
    # Probabilities and rewards of float32 models.
    assert parity.error < 1e-4
    assert parity.packing_error < 1e-5


def test_qwen2_rewards_every_token_with_logits(tmp_path: Path, record_parity: Record) -> None:
    head = two_layers(1)
    make(tmp_path, "Qwen2", "Qwen2ForRewardModel", head)
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.facts.tasks == ("token_classify",)
        got = rewards(llm, PROMPTS)
        expected = [by_hand(tmp_path, "Qwen2", head, ids) for ids in PROMPTS]
        record(record_parity, llm, "qwen2, rewards", got, expected, "Qwen/Qwen2.5-Math-RM-72B")
        squeezed = rewards(llm, PROMPTS, use_activation=True)
        assert worst(squeezed, [torch.sigmoid(reward) for reward in got]) < 1e-6


def test_internlm2_rewards_every_token_with_one_number(tmp_path: Path, record_parity: Record) -> None:
    """Its backbone is a Llama under other names, with query heads, key and value of each group in one tensor."""
    head = {"v_head.weight": torch.randn(1, 32)}
    make(tmp_path, "Llama", "LlamaForCausalLM", head)
    logits = [hidden(tmp_path, "Llama", ids) @ head["v_head.weight"].T for ids in PROMPTS]
    to_internlm2(tmp_path)
    with LLM(str(tmp_path), trust_remote_code=True) as llm:
        assert llm.engine.facts.tasks == ("token_classify",)
        got, examples = rewards(llm, PROMPTS), "internlm/internlm2-1_8b-reward, internlm2-7b-reward"
        # vLLM: fewer than two labels, a sigmoid.
        record(record_parity, llm, "internlm2, rewards", got, [logit.sigmoid() for logit in logits], examples)
        assert worst(rewards(llm, PROMPTS, use_activation=False), logits) < 1e-4
    with LLM(str(tmp_path), pooler_config={"use_activation": False}) as llm:
        assert worst(rewards(llm, PROMPTS), logits) < 1e-4


def to_internlm2(folder: Path) -> None:
    """Rewrite a Llama's folder in the words of internlm/internlm2-1_8b-reward."""
    theirs = load_file(folder / "model.safetensors")
    words = {
        "model.embed_tokens": "model.tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    ours = {}
    for name, tensor in theirs.items():
        for word, other in words.items():
            name = name.replace(word, other)  # noqa: PLW2901
        ours[name] = tensor
    for layer in range(3):
        place = f"model.layers.{layer}.self_attn."
        query, key, value = (ours.pop(f"{place}{part}_proj.weight") for part in "qkv")
        groups = [
            torch.cat(
                (query[group * 16 : group * 16 + 16], key[group * 8 : group * 8 + 8], value[group * 8 : group * 8 + 8])
            )
            for group in range(2)
        ]
        ours[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat(groups)
    save_file(ours, folder / "model.safetensors")
    change_config(folder, architectures=["InternLM2ForRewardModel"], model_type="internlm2", reward_token_id=92527)


def test_qwen2_process_rewards_stand_at_the_tags(tmp_path: Path, record_parity: Record) -> None:
    head = two_layers(2)
    make(tmp_path, "Qwen2", "Qwen2ForProcessRewardModel", head)
    with LLM(str(tmp_path), pooler_config={"step_tag_id": TAG, "pooling_type": "STEP"}) as llm:
        expected = [by_hand(tmp_path, "Qwen2", head, ids).softmax(-1)[torch.tensor(ids) == TAG] for ids in PROMPTS]
        record(record_parity, llm, "qwen2, steps", rewards(llm, PROMPTS), expected, "Qwen/Qwen2.5-Math-PRM-7B")
        columns = rewards(llm, PROMPTS, returned_token_ids=[1], use_activation=False)
        raw = [by_hand(tmp_path, "Qwen2", head, ids)[torch.tensor(ids) == TAG][:, 1:] for ids in PROMPTS]
        assert worst(columns, raw) < 1e-4


def test_the_tag_of_qwens_process_rewards_is_known(tmp_path: Path) -> None:
    make(tmp_path, "Qwen2", "Qwen2ForProcessRewardModel", two_layers(2))
    with LLM(str(tmp_path)) as llm:
        assert llm.model.pipelines["token_classify"].description.endswith("rows of token 151651 > softmax")
        other = PoolingParams(step_tag_id=TAG)
        assert [len(output.outputs.array) for output in llm.reward(PROMPTS, pooling_params=other)] == [2, 1, 3]


def test_a_text_without_a_tag_is_an_error_for_it_alone(tmp_path: Path) -> None:
    make(tmp_path, "Qwen2", "Qwen2ForProcessRewardModel", two_layers(2))
    with LLM(str(tmp_path), pooler_config={"step_tag_id": TAG}) as llm:
        with pytest.raises(InvalidRequest, match="holds no step tag"):
            llm.reward([[5, 6]])
        with pytest.raises(InvalidRequest, match=r"returned_token_ids: 2 is not one of \[0, 1\]"):
            llm.reward([[TAG]], pooling_params=PoolingParams(returned_token_ids=[2]))
        assert len(llm.reward([[TAG]])) == 1


@pytest.mark.parametrize(("family", "tied"), [("Llama", False), ("Llama", True), ("Mistral", False)])
def test_a_language_model_judges_steps_by_the_words_it_would_go_on_with(
    family: str, tied: bool, tmp_path: Path, record_parity: Record
) -> None:
    matrix = torch.randn(99, 32)
    make(tmp_path, family, f"{family}ForCausalLM", {} if tied else {"lm_head.weight": matrix}, tie_word_embeddings=tied)
    if tied:
        matrix = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    pooler = {"pooling_type": "STEP", "step_tag_id": TAG, "returned_token_ids": [40, 12]}
    with LLM(str(tmp_path), pooler_config=pooler) as llm:
        expected = [
            (hidden(tmp_path, family, ids) @ matrix.T)[:, [40, 12]].softmax(-1)[torch.tensor(ids) == TAG]
            for ids in PROMPTS
        ]
        model = f"{family.lower()}, steps ({'tied' if tied else 'own matrix'})"
        record(record_parity, llm, model, rewards(llm, PROMPTS), expected, "peiyi9979/math-shepherd-mistral-7b-prm")
        only = rewards(llm, PROMPTS, returned_token_ids=[12], use_activation=False)
        assert [len(reward) for reward in only] == [2, 1, 3]
    for wrong in ({"pooling_type": "STEP", "step_tag_id": TAG}, pooler | {"returned_token_ids": [99]}):
        with pytest.raises(ConfigError, match="returned_token_ids"):
            LLM(str(tmp_path), pooler_config=wrong)


def test_a_reward_model_without_its_head_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "Qwen2", "Qwen2ForRewardModel", two_layers(1))
    change_tensors(tmp_path, drop="score.2.weight")
    with pytest.raises(CheckpointError, match=r"lacks score\.2\.weight, which Qwen2ForRewardModel needs"):
        LLM(str(tmp_path))
