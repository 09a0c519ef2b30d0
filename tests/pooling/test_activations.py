"""From a checkpoint's words to the function over its logits: the rules of the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poolhouse.errors import CheckpointError
from poolhouse.pooling.steps import classifier_activation, named_activation, probabilities

NN = "torch.nn.modules"
TANH = f"{NN}.activation.Tanh"

# config.json, activation of config_sentence_transformers.json, then the names for one label and for three.
RULES: list[tuple[dict[str, Any], str | None, str, str]] = [
    ({}, None, "sigmoid", "softmax"),
    ({"problem_type": "regression"}, None, "raw", "raw"),
    ({"problem_type": "single_label_classification"}, None, "sigmoid", "softmax"),
    ({"problem_type": "multi_label_classification"}, None, "sigmoid", "sigmoid"),
    ({"problem_type": None}, None, "sigmoid", "softmax"),
    ({"problem_type": "regression"}, TANH, "raw", "raw"),
    ({"sentence_transformers": {"activation_fn": f"{NN}.linear.Identity"}}, None, "raw", "raw"),
    ({"sentence_transformers": {"activation_fn": f"{NN}.activation.Sigmoid"}}, None, "sigmoid", "softmax"),
    ({"sentence_transformers": {"activation_fn": f"{NN}.activation.Softmax"}}, None, "sigmoid", "softmax"),
    ({"sentence_transformers": {"activation_fn": TANH}}, None, "tanh", "tanh"),
    ({"sentence_transformers": {"version": "5"}}, None, "sigmoid", "softmax"),
    ({"sbert_ce_default_activation_function": f"{NN}.linear.Identity"}, None, "raw", "raw"),
    ({"sbert_ce_default_activation_function": None}, None, "sigmoid", "softmax"),
    (
        {
            "sentence_transformers": {"activation_fn": TANH},
            "sbert_ce_default_activation_function": f"{NN}.linear.Identity",
        },
        None,
        "tanh",
        "tanh",
    ),
    ({}, f"{NN}.linear.Identity", "raw", "raw"),
    ({"sbert_ce_default_activation_function": f"{NN}.linear.Identity"}, TANH, "tanh", "tanh"),
]


@pytest.mark.parametrize(("config", "from_files", "of_one", "of_three"), RULES)
def test_the_first_word_that_is_said_decides(
    config: dict[str, Any], from_files: str | None, of_one: str, of_three: str
) -> None:
    assert classifier_activation(config, 1, from_files).name == of_one
    assert classifier_activation(config, 3, from_files).name == of_three


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"sentence_transformers": {"activation_fn": "os.system"}}, "activation_fn 'os.system'"),
        ({"sbert_ce_default_activation_function": "home.made.Tanh"}, "activation_fn 'home.made.Tanh'"),
        ({"sentence_transformers": {"activation_fn": f"{NN}.transformer.Transformer"}}, "is not one of"),
        ({"sentence_transformers": {"activation_fn": "evil.Sigmoid"}}, "restricted to torch.nn.modules"),
    ],
)
def test_functions_that_are_not_torchs_own_are_refused(config: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=field):
        classifier_activation(config, 1, None)


def test_functions_do_what_their_names_say() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    assert torch.equal(probabilities(1).function(logits), logits.sigmoid())
    assert torch.equal(probabilities(0).function(logits), logits.sigmoid())
    assert torch.equal(probabilities(3).function(logits), logits.softmax(-1))
    tanh = named_activation(TANH, "here")
    assert tanh is not None
    assert torch.equal(tanh.function(logits), logits.tanh())
    assert named_activation(f"{NN}.linear.Identity", "here") is None
