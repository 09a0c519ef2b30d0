"""Dual encoders through LLM, as the hub has them: with tokenizers, picture processors and sentence-transformers' files."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers.pre_tokenizers import ByteLevel

from poolhouse import LLM, InvalidRequest, PoolingParams
from poolhouse.errors import CheckpointError
from tests.inputs.test_tokenizer import train_sentencepiece
from tests.models.test_dual_encoders import (
    CLIP_PICTURES,
    NAFLEX_PICTURES,
    SIDE,
    SIGLIP_PICTURES,
    SIZES,
    image,
    roughened,
)

TEXTS = ["A photo of the sea", "bread!", "a photo of a cat, by night"]
TOLERANCE = 1e-5


def save_clip(folder: Path, former: bool = False) -> None:
    """A tiny CLIP with CLIP's tokenizer: bytes, each also as the end of a word.

    former: with the files and settings of 2021.
    """
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    texts = SIDE | {"vocab_size": len(tokens), "bos_token_id": 0 if former else 512, "projection_dim": 24}
    # The first files call the end of a text 2.
    texts["eos_token_id"] = 2 if former else 513
    config = transformers.CLIPConfig(text_config=texts, vision_config=CLIP_PICTURES, projection_dim=24)
    torch.manual_seed(2)
    roughened(transformers.CLIPModel(config)).save_pretrained(folder)
    pictures = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    if former:
        (folder / "processor_config.json").unlink()
        settings = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def save_siglip(folder: Path) -> None:
    """A tiny SigLIP with its tokenizer of Python code, which lowers texts and leaves punctuation out."""
    train_sentencepiece(folder / "spiece", 120, hard_vocab_limit=False, pad_id=-1, bos_id=-1, eos_id=1, unk_id=2)
    tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"))
    texts = SIDE | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    config = transformers.SiglipConfig(text_config=texts, vision_config=SIGLIP_PICTURES)
    torch.manual_seed(3)
    roughened(transformers.SiglipModel(config)).save_pretrained(folder)
    pictures = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    transformers.SiglipProcessor(pictures, tokenizer).save_pretrained(folder)


def save_siglip2(folder: Path) -> None:
    """A tiny SigLIP 2 of any grid, with Gemma's kind of tokenizer, which lowers texts."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *map(chr, range(33, 127))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = transformers.Siglip2Tokenizer(vocabulary, [], padding_side="right")
    texts = SIDE | {"vocab_size": len(tokens), "max_position_embeddings": 64}
    config = transformers.Siglip2Config(text_config=texts, vision_config=NAFLEX_PICTURES)
    torch.manual_seed(4)
    roughened(transformers.Siglip2Model(config)).save_pretrained(folder)
    pictures = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24)
    transformers.Siglip2Processor(pictures, tokenizer).save_pretrained(folder)


def png(size: tuple[int, int]) -> bytes:
    written = BytesIO()
    image(*size).save(written, "PNG")
    return written.getvalue()


def described(folder: Path, layout: str) -> None:
    """A CLIP of sentence-transformers in `folder`.

    layout: "2021" has a module of CLIP's own in a folder of its own; "today" states what reads texts and what pictures.
    """
    if layout == "today":
        save_clip(folder / "plain")
        SentenceTransformer(str(folder / "plain"), prompts={"query": "find: "}).save(str(folder))
        return
    save_clip(folder / "0_CLIPModel", former=True)
    modules = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "find: "}}))


@pytest.mark.parametrize("layout", ["2021", "today"])
def test_sentence_transformers_files_give_the_same_vectors(layout: str, tmp_path: Path) -> None:
    described(tmp_path, layout)
    theirs = SentenceTransformer(str(tmp_path))
    pictures = [image(*size) for size in SIZES]
    wanted = np.concatenate([theirs.encode(TEXTS), theirs.encode(pictures)])
    with LLM(str(tmp_path)) as llm:
        assert "native clip" in llm.model.facts.served_by
        # Nothing normalises in these files, and so nothing does here.
        found = llm.embed_array([*TEXTS, *pictures], use_tqdm=False)
        led = llm.embed_array([*TEXTS, *pictures], use_tqdm=False, prompt_name="query")
        unit = llm.embed_array(pictures, use_tqdm=False, pooling_params=PoolingParams(use_activation=True))
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * np.abs(wanted).max())
    # Prompts stand before texts alone.
    wanted = np.concatenate([theirs.encode(TEXTS, prompt_name="query"), theirs.encode(pictures, prompt_name="query")])
    np.testing.assert_allclose(led, wanted, atol=TOLERANCE * np.abs(wanted).max())
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, atol=1e-5)


def test_prompts_in_every_form_and_their_tokens(tmp_path: Path) -> None:
    save_clip(tmp_path)
    model = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path)
    with torch.inference_mode():
        pixels = processor(images=[image(*size) for size in SIZES], return_tensors="pt")
        features = model.get_image_features(**pixels).pooler_output.numpy()
        own = processor(text=TEXTS[:1], return_tensors="pt")
        words = model.get_text_features(**own).pooler_output.numpy()
    picture = image(*SIZES[0])
    forms: list[Any] = [
        picture,
        np.asarray(picture),
        {"prompt": "", "multi_modal_data": {"image": picture}},
        {"content": [{"type": "image_pil", "image_pil": picture}]},
        {"content": [{"type": "image", "image": png(SIZES[0])}]},
    ]
    with LLM(str(tmp_path)) as llm:
        answers = llm.embed([TEXTS[0], *forms, image(*SIZES[1])], use_tqdm=False)
        raw = llm.embed_array([TEXTS[0], *forms], use_tqdm=False, pooling_params=PoolingParams(use_activation=False))
    unit = [words[0], *[features[0]] * len(forms), features[1]]
    wanted = np.stack([vector / np.linalg.norm(vector) for vector in unit])
    np.testing.assert_allclose([answer.outputs.embedding for answer in answers], wanted, atol=TOLERANCE)
    np.testing.assert_allclose(raw, unit[:-1], atol=TOLERANCE * np.abs(unit).max())
    # A picture is one token, as in vLLM.
    counts = [len(answer.prompt_token_ids) for answer in answers]
    assert counts == [own["input_ids"].shape[1], *[1] * len(forms), 1]


@pytest.mark.parametrize("save", [save_siglip, save_siglip2])
def test_siglips_own_processor_and_ours_read_alike(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    own = {"max_num_patches": 24, "patch_size": 8} if save is save_siglip2 else {}
    with torch.inference_mode():
        words = processor(text=TEXTS, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
        assert words.shape == (len(TEXTS), 64)
        seen = [processor(images=image(*size), return_tensors="pt", **own) for size in SIZES]
        features = [model.get_image_features(**one).pooler_output[0] for one in seen]
        wanted = torch.cat([model.get_text_features(input_ids=words).pooler_output, torch.stack(features)])
    with LLM(str(tmp_path)) as llm:
        prompts = [*TEXTS, *(image(*size) for size in SIZES)]
        found = llm.embed_array(prompts, use_tqdm=False, pooling_params=PoolingParams(use_activation=False))
        counts = [len(answer.prompt_token_ids) for answer in llm.embed(prompts, use_tqdm=False)]
    np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE * float(wanted.abs().max()))
    # What fills texts up is not counted.
    assert max(counts[: len(TEXTS)]) < 40
    assert counts[len(TEXTS) :] == [1] * len(SIZES)


def test_texts_and_pictures_are_compared_by_their_angle(tmp_path: Path) -> None:
    save_clip(tmp_path)
    pictures = [image(*size) for size in SIZES]
    with LLM(str(tmp_path)) as llm:
        vectors = llm.embed_array([*TEXTS, *pictures], use_tqdm=False)
        texts, seen = vectors[: len(TEXTS)], vectors[len(TEXTS) :]
        across = [answer.outputs.score for answer in llm.score(TEXTS[0], pictures, use_tqdm=False)]
        np.testing.assert_allclose(across, (seen @ texts[0]), atol=1e-5)
        among = llm.score([{"content": [picture]} for picture in pictures[:2]], pictures[2:], use_tqdm=False)
        np.testing.assert_allclose([answer.outputs.score for answer in among], (seen[:2] * seen[2:]).sum(1), atol=1e-5)
        mixed = llm.score(pictures[0], [*TEXTS, pictures[1]], use_tqdm=False)
        np.testing.assert_allclose(
            [answer.outputs.score for answer in mixed], np.stack([*texts, seen[1]]) @ seen[0], atol=1e-5
        )


def test_what_a_prompt_cannot_be_is_said(tmp_path: Path) -> None:
    save_clip(tmp_path)
    picture = image(*SIZES[0])
    with LLM(str(tmp_path)) as llm:
        for both in (
            {"prompt": "a cat", "multi_modal_data": {"image": picture}},
            {"content": ["a cat", {"type": "image_pil", "image_pil": picture}]},
        ):
            with pytest.raises(InvalidRequest, match="accepts text-only or image-only inputs, not both"):
                llm.embed(both, use_tqdm=False)
        with pytest.raises(InvalidRequest, match=r"At most 1 image"):
            llm.embed({"prompt": "", "multi_modal_data": {"image": [picture, picture]}}, use_tqdm=False)
        with pytest.raises(InvalidRequest, match="maximum context length is 77"):
            llm.embed("sea " * 100, use_tqdm=False)
        assert (
            len(llm.embed("sea " * 100, use_tqdm=False, tokenization_kwargs={"truncation": True})[0].prompt_token_ids)
            == 77
        )
        with pytest.raises(InvalidRequest, match="reads pictures of 32 x 32 pixels"):
            llm.embed(
                {
                    "prompt": "",
                    "multi_modal_data": {"image": picture},
                    "mm_processor_kwargs": {"crop_size": {"height": 16, "width": 16}},
                },
                use_tqdm=False,
            )


def test_a_method_of_other_pictures_is_refused(tmp_path: Path) -> None:
    described(tmp_path, "today")
    path = tmp_path / "sentence_bert_config.json"
    settings = json.loads(path.read_text())
    settings["modality_config"]["image"]["method"] = "get_multimodal_features"
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="reads pictures by the method 'get_multimodal_features'"):
        LLM(str(tmp_path))
