"""Own code: a model's vectors beside those of the code that its repository brings, which runs in a process of its own.

poolhouse check MODEL --trust-remote-code
    |  asks: folder, type of numbers, texts by the prompt before them          (standard input, JSON)
    '--> python -m poolhouse.cli.own_code ANSWERS  -->  matrices, token ids    (a file of numpy)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from poolhouse.data import passages, queries
from poolhouse.errors import CheckpointError
from poolhouse.files import Folder
from poolhouse.models.files.module_keys import PACKAGES
from poolhouse.models.files.own_classes import own_code_of
from poolhouse.params import PoolingParams

if TYPE_CHECKING:
    from poolhouse.llm import LLM

# Seconds that the other process may take, loading included.
_LONGEST = 3600.0
# Lines of its last words that an error repeats.
_LAST_WORDS = 3
_TEXTS = 6


@dataclass(frozen=True, slots=True)
class Distance:
    """lowest: the lowest cosine. count, what: of how many, and of what. prompts: the names of prompts that were tried."""

    lowest: float
    count: int
    what: str
    prompts: tuple[str, ...]

    @property
    def summary(self) -> str:
        """For people."""
        named = ", ".join(name or "none" for name in self.prompts)
        return f"Against the model's own code on {self.count} {self.what} (prompts: {named}): lowest cosine {self.lowest:.7f}."


def brings_code(folder: Folder) -> bool:
    """Whether a checkpoint brings code for its model, or for a module of sentence-transformers' files."""
    modules = folder.any_json("modules.json") if folder.has("modules.json") else None
    listed = modules if isinstance(modules, list) else []
    kinds = [str(module.get("type")) for module in listed if isinstance(module, dict)]
    return own_code_of(folder.json("config.json", needed=False)) is not None or any(
        not kind.startswith(PACKAGES) for kind in kinds
    )


def compare(llm: LLM) -> Distance:
    """The distance of vectors of texts; without sentence-transformers' files, of the hidden states of tokens.

    Raises:
        CheckpointError: the code does not run, or lacks a package; or it makes other tokens of a text.
    """
    facts, plan = llm.model.facts, llm.model.plan
    whole = plan.folder.has("modules.json")
    if whole and find_spec("sentence_transformers") is None:
        raise CheckpointError(
            "The model's own code was not run: sentence-transformers is not installed, which its modules.json needs: "
            "pip install sentence-transformers."
        )
    # At most four, those of queries and documents first.
    names = sorted(facts.prompts, key=lambda name: name not in ("query", "document"))[:4] if whole else []
    texts = [*queries()[:_TEXTS], *passages()[:_TEXTS]]
    prompts = {"": "", **{name: facts.prompts[name] for name in names}}
    asked = {
        "folder": str(plan.folder.path if whole else plan.weights.path),
        "whole": whole,
        "dtype": str(facts.dtype).removeprefix("torch."),
        "device": str(facts.device),
        "texts": texts,
        "prompts": prompts,
    }
    theirs = _asked(asked)
    if whole:
        ours = [llm.embed_array(texts, prompt_name=name, use_tqdm=False) for name in prompts]
        rows = [theirs[f"vectors {number}"] for number in range(len(prompts))]
        return _distance(np.concatenate(ours), np.concatenate(rows), "texts", tuple(prompts))
    raw = PoolingParams(use_activation=False)
    outputs = llm.encode(texts, raw, pooling_task="token_embed", use_tqdm=False)
    for number, output in enumerate(outputs):
        if not np.array_equal(output.prompt_token_ids, theirs[f"ids {number}"]):
            raise CheckpointError(
                f"The model's own tokenizer makes other tokens of {texts[number][:40]!r}: "
                f"{theirs[f'ids {number}'].tolist()[:12]} ..., here {list(output.prompt_token_ids)[:12]} ..."
            )
    states = np.concatenate([np.asarray(output.outputs.data, np.float32) for output in outputs])
    rows = [theirs[f"states {number}"] for number in range(len(texts))]
    return _distance(states, np.concatenate(rows), "tokens", ("",))


def _distance(
    ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any], what: str, prompts: tuple[str, ...]
) -> Distance:
    if ours.shape != theirs.shape:
        raise CheckpointError(f"The model's own code answers {list(theirs.shape)}, and here it is {list(ours.shape)}.")
    sizes = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = (ours * theirs).sum(1) / np.maximum(sizes, 1e-12)
    return Distance(float(cosines.min()), len(ours), what, prompts)


def _asked(asked: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """What the other process answers.

    Raises:
        CheckpointError: with its last words, where it fails.
    """
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "answers.npz"
        command = [sys.executable, "-m", "poolhouse.cli.own_code", str(path)]
        try:
            done = subprocess.run(  # noqa: S603 - this Python, and a module of ours
                command, input=orjson.dumps(asked), capture_output=True, timeout=_LONGEST, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise CheckpointError(f"The model's own code did not answer within {_LONGEST:.0f} seconds.") from error
        if done.returncode != 0 or not path.is_file():
            lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
            raise CheckpointError(f"The model's own code does not run: {' '.join(lines[-_LAST_WORDS:])[-600:]}")
        with np.load(path) as file:
            return dict(file)


def _vectors(asked: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """A matrix for each prompt, by sentence-transformers with the repository's code; one text at a time."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        asked["folder"],
        device=asked["device"],
        trust_remote_code=True,
        model_kwargs={"dtype": asked["dtype"]},
    )
    texts: list[str] = asked["texts"]
    matrices = (
        model.encode(texts, prompt=prompt, batch_size=1, show_progress_bar=False)
        for prompt in asked["prompts"].values()
    )
    return {f"vectors {number}": np.asarray(matrix, np.float32) for number, matrix in enumerate(matrices)}


def _states(asked: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The token ids and hidden states of each text, by transformers with the repository's code."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    trusted = {"trust_remote_code": True, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"], **trusted)
    model = AutoModel.from_pretrained(asked["folder"], dtype=asked["dtype"], **trusted).eval().to(asked["device"])
    answers: dict[str, np.ndarray[Any, Any]] = {}
    for number, text in enumerate(asked["texts"]):
        given = {key: torch.tensor([value], device=asked["device"]) for key, value in tokenizer(text).items()}
        given.pop("token_type_ids", None)
        with torch.inference_mode():
            answer = model(**given)
        states = answer["last_hidden_state"] if "last_hidden_state" in answer else answer[0]
        answers[f"ids {number}"] = given["input_ids"][0].cpu().numpy()
        answers[f"states {number}"] = states[0].float().cpu().numpy()
    return answers


if __name__ == "__main__":
    request = orjson.loads(sys.stdin.buffer.read())
    content: dict[str, Any] = _vectors(request) if request["whole"] else _states(request)
    np.savez(sys.argv[1], **content)
