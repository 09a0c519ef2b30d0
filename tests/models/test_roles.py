"""What a checkpoint is run as, by its architecture's name and the user's wish."""

from __future__ import annotations

import pytest

from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.models.files.config import architecture
from poolhouse.models.roles import Convert, Role, role_of
from poolhouse.params import PoolerConfig

NO_WISH = PoolerConfig()

# Architecture, then what it is under convert auto, embed and classify; the endings are the contract's.
TABLE: list[tuple[str, Role, Role, Role]] = [
    ("Qwen3ForCausalLM", "embed", "embed", "classify"),
    ("Qwen2VLForConditionalGeneration", "embed", "embed", "classify"),
    ("TeleChatModel", "embed", "embed", "classify"),
    ("GPT2LMHeadModel", "embed", "embed", "classify"),
    ("XForTextEncoding", "embed", "embed", "classify"),
    ("BgeM3EmbeddingModel", "embed", "embed", "classify"),
    ("BertForSequenceClassification", "classify", "embed", "classify"),
    ("BertForTokenClassification", "token_classify", "embed", "token_classify"),
    ("XForAudioClassification", "classify", "embed", "classify"),
    ("XForImageClassification", "classify", "embed", "classify"),
    ("XForVideoClassification", "classify", "embed", "classify"),
    ("XClassificationModel", "classify", "embed", "classify"),
    ("XForRewardModeling", "embed", "embed", "classify"),
    ("XRewardModel", "embed", "embed", "classify"),
    ("Qwen2ForRewardModel", "token_classify", "embed", "token_classify"),
    ("BertModel", "embed", "embed", "classify"),
    ("BertForMaskedLM", "masked_lm", "embed", "classify"),
    ("BertSpladeSparseEmbeddingModel", "splade", "embed", "splade"),
]


@pytest.mark.parametrize(("name", "auto", "embed", "classify"), TABLE)
def test_an_ending_says_what_a_model_is_for(name: str, auto: Role, embed: Role, classify: Role) -> None:
    config = {"architectures": [name]}
    wishes: list[tuple[Convert, Role]] = [("auto", auto), ("embed", embed), ("classify", classify)]
    for convert, role in wishes:
        assert role_of(config, convert, False, NO_WISH) == role


@pytest.mark.parametrize("name", [row[0] for row in TABLE])
def test_a_described_pooling_makes_an_embedder_of_everything(name: str) -> None:
    assert role_of({"architectures": [name]}, "auto", True, NO_WISH) == "embed"


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "XForConditionalGeneration", "XChatModel", "GPT2LMHeadModel"])
def test_a_generator_that_must_not_be_converted_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} does not support `--runner pooling`.*--convert <embed\|classify>"):
        role_of({"architectures": [name]}, "none", False, NO_WISH)
    assert role_of({"architectures": [name]}, "none", True, NO_WISH) == "embed"


def test_pooling_models_need_no_conversion() -> None:
    assert role_of({"architectures": ["BertForSequenceClassification"]}, "none", False, NO_WISH) == "classify"
    assert role_of({"architectures": ["BertModel"]}, "none", False, NO_WISH) == "embed"


def test_without_an_architecture_the_model_type_stands_in() -> None:
    assert architecture({"model_type": "bert"}) == "bert"
    assert architecture({"model_type": "bert", "architectures": []}) == "bert"
    assert role_of({"model_type": "bert"}, "auto", False, NO_WISH) == "embed"


def test_scores_of_pictures_are_refused_and_not_taken_for_embeddings() -> None:
    name = "Qwen3VLForSequenceClassification"
    with pytest.raises(CheckpointError, match=f"{name} is not served"):
        role_of({"architectures": [name]}, "auto", False, PoolerConfig())
    assert role_of({"architectures": [name]}, "embed", False, PoolerConfig()) == "embed"
