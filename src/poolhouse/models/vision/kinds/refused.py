"""Models that read pictures, would load, and answer wrongly or not at all: each is refused by its name."""

from __future__ import annotations

from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.inputs.pictures import PictureReader
from poolhouse.models.files.checkpoint import Config
from poolhouse.models.vision.picture_model import PictureModel, named


def _no_reader(_: Config, folder: Folder) -> PictureReader:
    raise CheckpointError(f"{folder} is not served.")


def _refused(name: str, architectures: tuple[str, ...], why: str) -> PictureModel:
    return PictureModel(name, named(*architectures), _no_reader, "dense", refused=why)


REFUSED = (
    _refused(
        "Phi-3-V (the first VLM2Vec)",
        ("Phi3VForCausalLM",),
        "transformers has no class for it, only the repository's own code; VLM2Vec-V2, on Qwen2-VL, is served",
    ),
    _refused(
        "ColQwen-Omni",
        ("ColQwen2_5Omni", "ColQwenOmni"),
        "it was trained on sound and video too, which are not read; ColQwen2.5 reads the same pages and is served",
    ),
    _refused(
        "ColGemma3",
        ("ColGemma3", "BiGemma3"),
        "few use it, and nothing proves our answers yet; ColPali and ColQwen2.5 read pages alike and are served",
    ),
    _refused(
        "Llama NeMo Retriever ColEmbed",
        ("llama_NemoRetrieverColEmbed",),
        "its layout and prompts are known from its own code alone, which was not run; nvidia/nemotron-colembed-vl-4b-v2 "
        "and nvidia/llama-nemotron-embed-vl-1b-v2 are served",
    ),
)
