"""Steps and pipelines: packed equals alone, and both equal sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from tokenizers import Tokenizer as NativeTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from poolhouse import LLM, kernels
from poolhouse.errors import CheckpointError, ConfigError
from poolhouse.files import Folder
from poolhouse.models.files.sentence_transformers import SentenceTransformersFiles, read_sentence_transformers
from poolhouse.models.pipelines import embed_pipelines
from poolhouse.packing.pack import Segments
from poolhouse.params import PoolerConfig, PoolingParams
from poolhouse.pooling.rows import REDUCTIONS, Rows, unit
from poolhouse.pooling.steps import Reduce

NO_FILES = SentenceTransformersFiles(Folder(Path()), described=False)

LENGTHS = (3, 5, 1, 7, 5)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *["the", "a", "of", "water", "bread", "moon", "ship", "sings", "falls", "under", "over"],
]
TEXTS = ["the moon falls", "a", "bread under water under the moon of bread", "the ship sings over water", ""]


def rows(skip: bool = False) -> Rows:
    torch.manual_seed(0)
    total = sum(LENGTHS)
    skipped = torch.tensor([1, 2, 0, 3, 0]) if skip else None
    return Rows(torch.randn(total, 8), Segments(LENGTHS), torch.arange(total), skipped)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("skip", [False, True])
def test_a_pack_is_pooled_like_each_text_alone(name: str, skip: bool) -> None:
    together = rows(skip)
    step = Reduce((name,), include_prompt=False)
    pooled = step(together, PoolingParams()).values
    assert pooled.shape == (len(LENGTHS), 8)
    for index, (start, end) in enumerate(zip(together.segments.starts, together.segments.ends, strict=True)):
        own_skip = None if together.skip is None else together.skip[index : index + 1]
        alone = Rows(together.values[start:end], Segments([end - start]), together.ids[start:end], own_skip)
        assert torch.allclose(step(alone, PoolingParams()).values[0], pooled[index], atol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("width", [24, 32])
def test_what_a_text_is_reduced_to_does_not_depend_on_its_company(name: str, width: int) -> None:
    lengths = (1, 24, 65, 600)
    values = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(0))
    together = REDUCTIONS[name](Rows(values, Segments(lengths), torch.arange(len(values))))
    for own, reduced in zip(values.split(lengths), together, strict=True):
        alone = REDUCTIONS[name](Rows(own, Segments([len(own)]), torch.arange(len(own))))
        assert torch.equal(alone[0], reduced)
        assert torch.equal(unit(alone)[0], unit(together)[lengths.index(len(own))])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CLS", [1.0]),
        ("LAST", [9.0]),
        ("MEAN", [4.0]),
        ("MAX", [9.0]),
        ("WEIGHTEDMEAN", [33 / 6]),
        ("MEAN_SQRT_LEN", [12 / 3**0.5]),
    ],
)
def test_reductions_by_hand(name: str, expected: list[float]) -> None:
    values = Rows(torch.tensor([[1.0], [2.0], [9.0]]), Segments([3]), torch.arange(3))
    pooled = REDUCTIONS[name](values)
    assert pooled[0].tolist() == pytest.approx([(1 + 4 + 27) / 6] if name == "WEIGHTEDMEAN" else expected)


def test_sums_are_taken_in_float32() -> None:
    # In bfloat16, 256 + 1 is 256: a sum of 1024 ones would stop there.
    ones = Rows(torch.ones(1024, 1, dtype=torch.bfloat16), Segments([512, 512]), torch.arange(1024))
    pooled = REDUCTIONS["MEAN_SQRT_LEN"](ones)
    assert pooled.dtype == torch.float32
    assert pooled[0].item() == pytest.approx(512**0.5)


@pytest.mark.parametrize("level", ["", "avx512", "avx2", "0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 48, 384, 40])
def test_means_and_unit_lengths_are_those_of_float64(
    width: int, dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if level:
        monkeypatch.setenv(kernels.VARIABLE, level)
    kernels.forget()
    try:
        lengths = (1, 63, 0, 64, 65, 5000, 0)
        wide = torch.randn(sum(lengths), width + 8, generator=torch.Generator().manual_seed(width)).to(dtype) + 3
        values = wide[:, 8:]
        means = REDUCTIONS["MEAN"](Rows(values, Segments(lengths), torch.arange(len(values))))
        expected = torch.stack([part.double().sum(0) / max(len(part), 1) for part in values.split(lengths)])
        assert means.dtype == torch.float32
        # The kernel adds 64 numbers near 3, then 79 of these sums: each addition rounds by 6e-8 of what is there, in either
        # direction. torch adds 5000 one after another.
        compiled = kernels.level() is not None and width % 16 == 0
        assert (means - expected).abs().max() < (2e-6 if compiled else 2e-5)
        rows = torch.cat([means, torch.full((1, width), torch.nan), torch.full((1, width), torch.inf)])
        units = unit(rows)
        assert (units[:-2] - torch.nn.functional.normalize(means.double())).abs().max() < 1e-6
        assert units[-2:].isnan().all()
        assert torch.equal(units[2], torch.zeros(width))
    finally:
        monkeypatch.undo()
        kernels.forget()


def test_cut_then_normalise() -> None:
    pipeline = embed_pipelines(8, PoolerConfig(), NO_FILES, "MEAN")["embed"]
    whole, cut = pipeline(rows(), PoolingParams()).values, pipeline(rows(), PoolingParams(dimensions=3)).values
    assert torch.allclose(cut, torch.nn.functional.normalize(whole[:, :3], dim=-1), atol=1e-6)
    raw = pipeline(rows(), PoolingParams(use_activation=False)).values
    assert torch.allclose(raw, rows().values.new_tensor(raw.tolist()))
    assert not torch.allclose(raw.norm(dim=-1), torch.ones(len(LENGTHS)))


def test_the_user_wins_over_files_and_files_over_the_default(tmp_path: Path) -> None:
    make(tmp_path, [Pooling(32, "max")])
    files = read_sentence_transformers(Folder(tmp_path))
    words = {
        "default": embed_pipelines(32, PoolerConfig(), NO_FILES, "CLS")["embed"].description,
        "files": embed_pipelines(32, PoolerConfig(), files, "CLS")["embed"].description,
        "user": embed_pipelines(32, PoolerConfig(pooling_type="LAST"), files, "CLS")["embed"].description,
        "user too": embed_pipelines(32, PoolerConfig(use_activation=True), files, "CLS")["embed"].description,
    }
    assert words == {
        "default": "cls > truncate > normalize",
        "files": "max > truncate > normalize on request",
        "user": "last > truncate > normalize on request",
        "user too": "max > truncate > normalize",
    }


MODULES: dict[str, list[Any]] = {
    **{mode: [("Pooling", mode)] for mode in Pooling.POOLING_MODES},
    "cls and mean": [("Pooling", ("cls", "mean"))],
    "three": [("Pooling", ("max", "lasttoken", "weightedmean"))],
    "normalised": [("Pooling", "mean"), ("Normalize",)],
    "dense": [("Pooling", "mean"), ("Dense", 32, 16, "Tanh"), ("Normalize",)],
    "two dense": [("Pooling", "mean"), ("Dense", 32, 64, "Identity"), ("Dense", 64, 32, "ReLU"), ("Normalize",)],
    "normalised, then dense": [("Pooling", "cls"), ("Normalize",), ("Dense", 32, 8, "Identity")],
    "layer norm": [("Pooling", "mean"), ("LayerNorm", 32), ("Normalize",)],
    "wide dense": [("Pooling", ("cls", "max")), ("Dense", 64, 8, "GELU")],
}


@pytest.mark.parametrize("name", MODULES)
def test_every_chain_of_modules_equals_sentence_transformers(name: str, tmp_path: Path) -> None:
    make(tmp_path, [build(*module) for module in MODULES[name]])
    assert_same(tmp_path)


@pytest.mark.parametrize(
    "generation", ["sentence_transformers.models", "sentence_transformers.sentence_transformer.modules"]
)
def test_old_and_new_type_names_are_understood(generation: str, tmp_path: Path) -> None:
    make(tmp_path, [build("Pooling", "mean"), build("Normalize")])
    path = tmp_path / "modules.json"
    modules = json.loads(path.read_text())
    for module in modules:
        module["type"] = f"{generation}.{module['type'].rsplit('.', 1)[-1]}"
    path.write_text(json.dumps(modules))
    config = next(tmp_path.glob("1_*")) / "config.json"
    config.write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    )
    files = read_sentence_transformers(Folder(tmp_path))
    assert (files.pooling, files.normalize) == (("MEAN",), True)


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "weightedmean", "lasttoken"])
def test_a_prompt_left_out_of_pooling_equals_sentence_transformers(mode: str, tmp_path: Path) -> None:
    pooling = Pooling(32, mode, include_prompt=False)
    model = make(tmp_path, [pooling], prompts={"query": "the water of "}, default_prompt_name="query")
    expected = model.encode(TEXTS[:4])
    with LLM(str(tmp_path)) as llm:
        assert torch.allclose(torch.from_numpy(llm.embed_array(TEXTS[:4])), torch.from_numpy(expected), atol=1e-5)
        plain = model.encode(TEXTS[:4], prompt="")
        assert torch.allclose(
            torch.from_numpy(llm.embed_array(TEXTS[:4], prompt_name="")), torch.from_numpy(plain), atol=1e-5
        )


def test_lower_casing_and_the_length_limit_come_from_the_files(tmp_path: Path) -> None:
    model = make(tmp_path, [build("Pooling", "mean")])
    path = tmp_path / "sentence_bert_config.json"
    path.write_text(json.dumps({"max_seq_length": 6, "do_lower_case": True}))
    expected = model.encode("the moon falls under water")
    with LLM(str(tmp_path), overflow="truncate") as llm:
        assert llm.model.facts.max_tokens == 6
        (output,) = llm.embed("THE Moon falls under WATER over the ship")
        assert output.truncated
        assert len(output.prompt_token_ids) == 6
        (whole,) = llm.embed("THE Moon falls under")
        (lower,) = llm.embed("the moon falls under")
        assert whole.prompt_token_ids == lower.prompt_token_ids
    assert expected.shape == (32,)


def test_files_that_make_no_sense_are_named(tmp_path: Path) -> None:
    make(tmp_path, [build("Pooling", "mean"), build("Dense", 32, 16, "Tanh")])
    dense = next(tmp_path.glob("*_Dense"))
    config = json.loads((dense / "config.json").read_text())

    def expect(words: str, **changes: Any) -> None:
        (dense / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=words):
            embed_pipelines(32, PoolerConfig(), read_sentence_transformers(Folder(tmp_path)), "CLS")
        (dense / "config.json").write_text(json.dumps(config))

    expect("restricted to torch.nn", activation_function="os.system")
    expect("is not one of", activation_function="torch.nn.modules.rnn.LSTM")
    expect("but config.json says", out_features=17)
    with pytest.raises(CheckpointError, match="takes 32 features, but 40 come in"):
        embed_pipelines(40, PoolerConfig(), read_sentence_transformers(Folder(tmp_path)), "CLS")
    (dense / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        embed_pipelines(32, PoolerConfig(), read_sentence_transformers(Folder(tmp_path)), "CLS")
    (dense / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        embed_pipelines(32, PoolerConfig(), read_sentence_transformers(Folder(tmp_path)), "CLS")
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[-1]["type"] = "sentence_transformers.models.LSTM"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(CheckpointError, match=r"models\.LSTM is not one that Poolhouse has"):
        read_sentence_transformers(Folder(tmp_path))
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"modules\.json cannot be read as JSON"):
        read_sentence_transformers(Folder(tmp_path))


def test_pooler_configs_that_make_no_sense_are_named() -> None:
    for given, words in (
        ({"pooling": "MEAN"}, "Did you mean 'pooling_type'"),
        ({"pooling_type": "MEEN"}, "Did you mean 'MEAN'"),
        ({"pooling_type": "MEAN", "seq_pooling_type": "CLS"}, "not both"),
        ({"logit_sigma": 0}, "must not be 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            PoolerConfig.parse(given)
    with pytest.raises(ConfigError, match="STEP pooling belongs to token_classify"):
        embed_pipelines(8, PoolerConfig(pooling_type="STEP"), NO_FILES, "CLS")


def build(kind: str, *given: Any) -> Any:
    torch.manual_seed(1)
    if kind == "Pooling":
        return Pooling(32, given[0])
    if kind == "Dense":
        activation = {
            "Tanh": torch.nn.Tanh,
            "Identity": torch.nn.Identity,
            "ReLU": torch.nn.ReLU,
            "GELU": torch.nn.GELU,
        }
        return Dense(given[0], given[1], activation_function=activation[given[2]]())
    return LayerNorm(given[0]) if kind == "LayerNorm" else Normalize()


def make(folder: Path, modules: list[Any], **options: Any) -> SentenceTransformer:
    """A sentence-transformers folder around a tiny random BERT, and the model that was saved there."""
    native = NativeTokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    native.pre_tokenizer = Whitespace()
    native.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    bare = folder / "bare"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=native, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(bare)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64,
    )  # fmt: skip
    bert = transformers.BertModel(config)
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    bert.save_pretrained(bare)
    model = SentenceTransformer(modules=[Transformer(str(bare)), *modules], device="cpu", **options)
    model.save(str(folder))
    return model


def assert_same(folder: Path) -> None:
    expected = torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))
    with LLM(str(folder)) as llm:
        got = torch.from_numpy(llm.embed_array(TEXTS))
    assert relative(got, expected) < 1e-5
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.99999


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())
