"""Words of errors: options are named as they were typed, and what is nearly right is suggested."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import poolhouse
from poolhouse import LLM, ConfigError, PoolerConfig, UnsupportedTask
from poolhouse.cli.commands import commands as command_line
from poolhouse.cli.options import Written, as_typed, flag, on_the_line, spelled
from poolhouse.cli.sources import gather
from poolhouse.settings import OUR_NAMES, ServerSettings, Settings, useful_options
from tests.checkpoints import save_checkpoint
from tests.cli.in_process import Run, said
from tests.models.test_late_interaction import JINA, opened, repository

__all__ = ["said"]

FIELDS = {**Settings.model_fields, **ServerSettings.model_fields}
# Every option of `serve`, a command of its own, and a value that its field refuses, where it refuses any.
NAMES = sorted({*FIELDS, *OUR_NAMES} - {"model"})
REFUSED = {
    "limit_mm_per_prompt": "[1]",
    "lora_modules": "x",
    "matryoshka_dimensions": "[",
    "quantization": "int4",
    "quantization_config": "awq",
    "api_key": ",",
}


def misspelt(name: str) -> str:
    """Without a letter in its middle, or with its last one twice where it is short."""
    middle = len(name) // 2 - (name[len(name) // 2] in "_-")
    return name[:middle] + name[middle + 1 :] if len(name) > 3 else name + name[-1]


def refused_value(name: str) -> str | None:
    annotation = str(FIELDS[OUR_NAMES.get(name, name)].annotation)
    if name in REFUSED:
        return REFUSED[name]
    return "no such" if re.search(r"Literal|int|float|bool", annotation) else None


WITH_REFUSED = [name for name in NAMES if refused_value(name) is not None]


def complaint(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_option_is_named_as_typed_and_its_neighbour_suggested(name: str, said: Run, tmp_path: Path) -> None:
    wrong, ours = misspelt(name), OUR_NAMES.get(name, name)
    for typed, right in (
        (flag(wrong), flag(name)),
        (f"--{wrong}", flag(name)),
        (f"--no-{wrong}", f"--no-{flag(name)[2:]}"),
    ):
        done = said("serve", typed, "1")
        words = f"There is no option {typed}. Did you mean "
        assert (done.status, words in done.error) == (2, True), done.error
        assert f"{words}{right}?" in done.error
    file = tmp_path / "serve.yaml"
    for key, right in ((wrong.replace("_", "-"), name.replace("_", "-")), (wrong, name)):
        file.write_text(f"{key}: 1")
        assert f"{file}: there is no option '{key}'. Did you mean '{right}'?" in complaint(gather, [], {}, file, {})
    variable = f"POOLHOUSE_{wrong.upper()}"
    words = f"{variable} is no option. Did you mean POOLHOUSE_{name.upper()}?"
    assert words in complaint(gather, [], {}, None, {variable: "1"})
    if ours in Settings.model_fields:
        assert f"There is no option '{wrong}'. Did you mean '{name}'?" in complaint(Settings.parse, **{wrong: 1})
    else:
        assert f"'{ours}' is an option of the server" in complaint(Settings.parse, **{ours: 1})


@pytest.mark.parametrize("name", WITH_REFUSED)
def test_a_value_that_does_not_fit_names_the_option_as_it_was_written(name: str, said: Run, tmp_path: Path) -> None:
    value, ours = refused_value(name), OUR_NAMES.get(name, name)
    assert value is not None
    if FIELDS[ours].annotation is not bool:
        for typed in {flag(name), f"--{name}"}:
            done = said("serve", typed, value)
            assert (done.status, f"poolhouse: {typed}: " in done.error) == (2, True), done.error
    assert complaint(gather, [], {}, None, {f"POOLHOUSE_{name.upper()}": value}).startswith(
        f"POOLHOUSE_{name.upper()}: "
    )
    file = tmp_path / "serve.yaml"
    for key in {name, name.replace("_", "-")}:
        file.write_text(f"{key}: '{value}'")
        assert complaint(gather, [], {}, file, {}).startswith(f"{key} in {file}: ")
        file.write_text(f"models: [{{model: m, {key}: '{value}'}}]")
        if ours in Settings.model_fields:
            assert complaint(gather, [], {}, file, {}).startswith(f"{key} in {file}: ")
    parse = Settings.parse if ours in Settings.model_fields else ServerSettings.parse
    assert complaint(parse, **{name: value}).startswith(f"{ours}: ")


def commands() -> dict[str, list[str]]:
    """The long options of every command but `serve`, whose words are arranged first."""
    found = {}
    root: Any = get_command(command_line())
    bench = root.commands["bench"]
    for name, command in (*root.commands.items(), *((f"bench {word}", one) for word, one in bench.commands.items())):
        if name not in ("serve", "bench"):
            found[name] = [option for one in command.params for option in one.opts if option.startswith("--")]
    return found


COMMANDS = commands()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_option_of_every_command_gets_a_suggestion(command: str, said: Run) -> None:
    # The library that reads the line suggests them; how its error is shown is the same for all.
    named: Any = get_command(command_line(*command.split()[:1]))
    for word in command.split():
        named = named.commands[word]
    for option in COMMANDS[command]:
        with pytest.raises(Exception, match="No such option") as refused:
            named.make_context(command, ["--" + misspelt(option[2:]), "1"])
        assert option in refused.value.possibilities  # type: ignore[attr-defined]
    wrong = "--" + misspelt(option[2:])
    done = said(*command.split(), wrong, "1")
    words = " ".join(done.error.replace("│", " ").split())
    assert done.status == 2
    assert f"No such option: {wrong} " in words
    assert option in words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("serv", "No such command 'serv'. Did you mean 'serve'?"),
        ("--versoin", "--version"),
        ("bench serv --backend x", "No such command 'bench serv'. Did you mean 'serve'?"),
        ("bench compar", "No such command 'bench compar'. Did you mean 'compare'?"),
        ("bench serve --backend opnai-embeddings", "Did you mean 'openai-embeddings'?"),
        ("serve --pooler-confg.task embed", "There is no option --pooler-confg.task. Did you mean --pooler-config?"),
        ("serve -p 80", "There is no option -p."),
        ("serve --no-such-option", "There is no option --no-such-option."),
        ("serve --no-enable-loar", "There is no option --no-enable-loar. Did you mean --no-enable-lora?"),
        ("serve --overflow truncat", "--overflow: Input should be 'error', 'truncate' or 'chunk' (got 'truncat'). Did you mean 'truncate'?"),
        ("serve --log-level WARNNG", "Did you mean 'warning'?"),
        ("embed word --precision flaot16", "--precision flaot16 is not one of float32, float16, bfloat16, fp8_e4m3, fp8_e5m2, int8, uint8, binary, ubinary. Did you mean 'float16'?"),
        ("embed word --format jsnl", "--format jsnl is not one of jsonl, npy, npz, safetensors, arrow. Did you mean 'jsonl'?"),
        ("embed --input-format jsnl", "--input-format jsnl is not one of lines, jsonl, csv, tsv, parquet. Did you mean 'jsonl'?"),
        ("embed word --pooler-config.poling-type CLS", "--pooler-config has no field 'poling_type'. Did you mean 'pooling_type'?"),
        ("embed word --pooler-config.pooling-type MAEN", "--pooler-config: unknown pooling type 'MAEN'. Did you mean 'MEAN'?"),
        ("embed word --pooler-config.task embd", "Did you mean 'embed'?"),
        ("embed word --runner generate", "--runner generate: Poolhouse runs pooling models only; use 'pooling' or 'auto'."),
        ("embed word --int8-calibration /no/such", "/no/such cannot be read as a calibration"),
        ("embed word --quantization int4", "'fp8']; --dtype bfloat16 saves memory too"),
        ("embed word --quantization awq", "--quantization awq, but the checkpoint is not quantised; leave it out."),
        ("embed --tokens word -o o.npz --input-type qury", "Did you mean 'query'?"),
    ],
)  # fmt: skip
def test_what_is_nearly_right_is_suggested(
    line: str, words: str, said: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = said(*line.split())
    assert done.status in (1, 2)
    assert words in " ".join(done.error.replace("│", " ").split()), done.error


def test_every_key_of_a_pooler_config_is_suggested() -> None:
    for name in PoolerConfig.__dataclass_fields__:
        if name not in ("normalize", "softmax", "activation", "logit_bias", "logit_scale"):
            assert f"Did you mean '{name}'?" in complaint(PoolerConfig.parse, {misspelt(name): 1})


def test_messages_in_the_words_of_python_are_spelled_for_their_readers() -> None:
    line = on_the_line(useful_options(), {"log_level": "--uvicorn-log-level"})
    for given, expected in (
        ("dtype='int3' is not one of", "--dtype int3 is not one of"),
        ("port: too large; host: no", "--port: too large; --host: no"),
        ("the model: a port: no", "the model: a port: no"),
        ("port numbers of the host", "port numbers of the host"),
        ("hf_overrides={'is_causal': True} makes it one", """--hf-overrides '{"is_causal": true}' makes it one"""),
        ("set max_model_len, or max_model_len=8.", "set --max-model-len, or --max-model-len 8."),
        ("/tmp/max_model_len/x and my_max_model_len", "/tmp/max_model_len/x and my_max_model_len"),
        ("lora_modules.a: no", "--lora-modules.a: no"),
        ("use `pooler_config`", "use --pooler-config"),
        ("log_level: no", "--uvicorn-log-level: no"),
        ("chat_template=''", "--chat-template ''"),
    ):
        assert spelled(given, line) == expected
    elsewhere = {"port": Written("POOLHOUSE_PORT", "="), "host": Written("host", ": ", " in s.yaml")}
    assert spelled("port=8; host='a'; host: x", elsewhere) == "POOLHOUSE_PORT=8; host: a in s.yaml; host in s.yaml: x"
    assert as_typed(["m", "--max_model_len", "5", "--uvicorn-log-level=x", "--pooler-config.task", "--", "--host"]) == {
        "max_model_len": "--max_model_len", "log_level": "--uvicorn-log-level", "pooler_config": "--pooler-config",
    }  # fmt: skip


def test_the_version_is_told(said: Run) -> None:
    assert said("--version").out.decode() == f"poolhouse {poolhouse.__version__}\n"


def test_what_a_model_is_can_be_printed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "tiny", "bert, wordpiece")
    with LLM(str(tmp_path / "tiny"), served_model_name="tiny") as llm:
        words = "embed, token_embed, 32 dimensions, float32 on cpu, native bert, packed"
        assert str(llm) == f"LLM('tiny': {words})"
    assert repr(llm) == f"LLM('tiny': {words}, closed)"


def test_late_interaction_is_told_of_its_own_methods(tmp_path: Path, said: Run) -> None:
    folder = repository(tmp_path, JINA)
    with opened(folder) as llm, pytest.raises(UnsupportedTask) as caught:
        llm.embed_array("x")
    assert "a vector per token, not one per text: use embed_tokens, embed_array with muvera, and score" in str(
        caught.value
    )
    assert "convert" not in str(caught.value)
    done = said("embed", "word", "--model", folder)
    assert (done.status, "use --tokens, with --output FILE.npz" in done.error) == (2, True), done.error
