"""Settings: every option that a user may set, with its help text, and what vLLM's further options mean here.

`LLM(...)` and the command line read the same classes.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo

from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.params import parse_lora_modules


def option(panel: str, default: object, description: str, **constraints: Any) -> Any:
    """A field that is an option: the panel of `--help` where it stands, its default, and its help text."""
    return Field(default, description=description, json_schema_extra={"panel": panel}, **constraints)


def panel_of(field: FieldInfo) -> str:
    """The panel of an option."""
    extra = field.json_schema_extra
    return str(extra["panel"]) if isinstance(extra, dict) else "Options"


_MAX_REPLICAS = 256


class Settings(BaseModel):
    """One engine: its model, how it is loaded, and how it treats requests."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = option("Model", None, "Folder or hub id; none: the embedded all-MiniLM-L6-v2.")
    runner: Literal["auto", "generate", "pooling", "draft"] = option(
        "Model", "auto", "As vLLM's; only pooling models are run."
    )
    convert: Literal["auto", "none", "embed", "classify"] = option(
        "Model", "auto", "Make an embedder or a classifier of a model that is none."
    )
    tokenizer: str | None = option("Model", None, "Folder or hub id of the tokenizer, if not the model's.")
    tokenizer_mode: Literal["auto", "hf"] = option("Model", "auto", "How to read the tokenizer; one way exists.")
    revision: str | None = option("Model", None, "Branch, tag or commit of the model on the hub.")
    tokenizer_revision: str | None = option("Model", None, "Branch, tag or commit of the tokenizer on the hub.")
    download_dir: str | None = option("Model", None, "Where to keep files from the hub.")
    hf_token: str | None = option(
        "Model", None, "Token for the hub; none: HF_TOKEN, or the one stored by login.", repr=False
    )
    trust_remote_code: bool = option("Model", False, "Run Python code that comes with the checkpoint.")
    hf_overrides: Mapping[str, object] | Callable[[dict[str, object]], Mapping[str, object]] | None = option(
        "Model", None, "Changes to config.json, as JSON; in Python a function too."
    )
    model_impl: Literal["auto", "native", "transformers"] = option("Model", "auto", "Who runs the model.")
    variant: str | None = option(
        "Model",
        None,
        "Which of several weights of a folder: fp16 for model.fp16.safetensors; none: those without a label.",
    )
    dtype: str = option("Model", "auto", "auto, float32 (fp32, float), float16 (fp16, half) or bfloat16 (bf16).")
    device: str = option("Model", "auto", "auto (CUDA where there is one), cpu, cuda, cuda:N or mps.")
    served_model_name: tuple[str, ...] | None = option(
        "Model", None, "Names that requests may use; with several models, one each."
    )
    quantization: Literal["int8", "compressed-tensors", "awq", "gptq", "bitsandbytes", "fp8"] | None = option(
        "Model",
        None,
        "int8: products of blocks in int8, on CPUs, of native models; none, or the method of a quantised checkpoint: "
        "everything in dtype.",
    )
    quantization_config: object = option("Model", None, "Only none is taken; see quantization.")
    seed: int = option("Model", 0, "Seed of torch's random numbers.")

    pooler_config: Any = option("Pooling", None, "How to pool, as JSON; --pooler-config.FIELD sets one field.")
    chat_template: str | None = option(
        "Pooling", None, "Renders messages, and joins the texts of a pair: a file, its text, or a built-in name."
    )
    chat_template_content_format: Literal["auto", "string", "openai"] = option(
        "Pooling", "auto", "What chat templates read: texts, or lists of parts (openai)."
    )
    matryoshka_dimensions: tuple[int, ...] | None = option(
        "Pooling", None, "Vector lengths that requests may ask for: 64,128,256."
    )
    colbert_compat: Literal["reference", "vllm"] = option(
        "Pooling", "reference", "Texts of ColBERT models: as the reference reads them, or plain, as vLLM does."
    )
    score_compat: Literal["vllm", "files"] = option(
        "Pooling",
        "vllm",
        "Where sentence-transformers' files state another activation or similarity than vLLM: which one counts.",
    )
    int8_calibration: str | None = option(
        "Pooling", None, "File of `poolhouse calibrate`: the ranges of int8 and uint8 vectors."
    )
    io_processor_plugin: str | None = option(
        "Pooling", None, "Plugin that makes prompts; none: the one of config.json."
    )

    max_model_len: int | None = option(
        "Prompts and packs", None, "Longest prompt in tokens; none: the model's own limit."
    )
    overflow: Literal["error", "truncate", "chunk"] = option(
        "Prompts and packs", "error", "Longer prompts: refuse, cut and say so, or split."
    )
    max_num_batched_tokens: int | None = option(
        "Prompts and packs", None, "Tokens of one pack; none: by the device.", ge=1
    )
    prefix_sharing: bool = option(
        "Prompts and packs",
        True,
        "Let causal models run a beginning that prompts of a pack share, such as a query, once.",
    )
    lanes: int | None = option(
        "Prompts and packs",
        None,
        "Workers that run batches side by side on a CPU, sharing its cores; none: 2 for native models on 2 or 3 cores, else 1.",
        ge=1,
        le=64,
    )
    tokenizer_workers: int = option("Prompts and packs", 2, "Threads that tokenize.", ge=1, le=64)

    replicas: int | Literal["auto"] = option(
        "Replicas",
        1,
        "Processes that run the model, each on a GPU or on its share of the cores; 1: this one; auto: one per GPU, or per 8 cores.",
    )

    allowed_media_domains: tuple[str, ...] = option(
        "Pictures",
        (),
        "Hosts that pictures may be fetched from, inside ones too; none: any whose addresses are public.",
    )
    allowed_local_media_path: str | None = option(
        "Pictures", None, "Folder whose pictures requests may name; none: no files, but for callers in this process."
    )
    limit_mm_per_prompt: dict[str, int] | None = option(
        "Pictures", None, 'Pictures of one prompt, as JSON: {"image": 2}; none: as many as the model reads.'
    )
    mm_processor_kwargs: dict[str, Any] | None = option(
        "Pictures", None, 'Settings of the picture processor, as JSON: {"max_pixels": 1003520}.'
    )
    max_image_bytes: int = option("Pictures", 20 * 1024 * 1024, "Largest file of a picture.", ge=1)
    max_image_pixels: int = option("Pictures", 50_000_000, "Most pixels of a picture before it is resized.", ge=1)
    max_image_ratio: float = option("Pictures", 200.0, "Longer side of a picture over the shorter, at most.", ge=1)
    media_connect_seconds: float = option("Pictures", 5.0, "How long a picture's host may take to be reached.", gt=0)
    media_seconds: float = option("Pictures", 20.0, "How long fetching a picture may take in all.", gt=0)
    media_redirects: int = option("Pictures", 3, "Redirects of a picture's URL that are followed.", ge=0, le=20)
    media_threads: int | None = option(
        "Pictures", None, "Threads that decode and resize pictures; none: one per core, 8 at most.", ge=1, le=64
    )
    media_waiting_bytes: int = option(
        "Pictures", 512 * 1024 * 1024, "Processed pictures that wait or run at once; others are begun later.", ge=1
    )
    media_cache_bytes: int = option(
        "Pictures", 128 * 1024 * 1024, "Processed pictures that are kept for later requests.", ge=0
    )

    enable_lora: bool = option("Adapters", True, "Whether requests may use adapters.")
    lora_modules: dict[str, str] | None = option(
        "Adapters", None, "Adapters that requests may name: name=path, several with commas."
    )
    max_lora_rank: int | None = option("Adapters", None, "Refuse adapters of a higher rank.", ge=1)
    merge_adapter: str | None = option(
        "Adapters", None, "Adapter to merge into the weights: a name, a task of the checkpoint, a folder."
    )

    @field_validator("model", "tokenizer", "allowed_local_media_path", mode="before")
    @classmethod
    def _path_as_text(cls, value: object) -> object:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("variant")
    @classmethod
    def _variant_is_a_label(cls, value: str | None) -> str | None:
        if value is not None and (not value or any(sign in value for sign in "./\\*?[]")):
            raise ValueError("a variant is the label in the files' names, such as fp16 in model.fp16.safetensors")
        return value

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_by_any_name(cls, value: object) -> object:
        # torch.float16, numpy.dtype("float16") and numpy.float16 are no texts, but name themselves.
        name = value.__name__ if isinstance(value, type) else str(value or "auto")
        return name.lower().removeprefix("torch.")

    @field_validator("device", mode="before")
    @classmethod
    def _device_as_text(cls, value: object) -> object:
        # torch.device("cuda:0") writes itself so.
        return str(value or "auto")

    @field_validator("seed", mode="before")
    @classmethod
    def _vllms_former_default(cls, value: object) -> object:
        return 0 if value is None else value

    @field_validator("prefix_sharing", mode="before")
    @classmethod
    def _vllms_choice_by_model(cls, value: object) -> object:
        return True if value is None else value

    @field_validator("quantization", mode="before")
    @classmethod
    def _int8_or_as_stored(cls, value: object) -> object:
        if value in (None, "", "none", "auto"):
            return None
        methods = ("compressed-tensors", "awq", "gptq", "bitsandbytes", "fp8")
        if value == "int8" or value in methods:
            return value
        raise ValueError(
            f"possible are none, 'int8', and the method of a quantised checkpoint, one of {list(methods)}; "
            "dtype='bfloat16' saves memory too"
        )

    @field_validator("quantization_config", mode="before")
    @classmethod
    def _nothing_to_configure(cls, value: object) -> object:
        if value in (None, "", "none", "auto"):
            return None
        raise ValueError("leave it out: quantization='int8' has nothing to configure, and no other way exists")

    @field_validator("replicas", mode="before")
    @classmethod
    def _number_or_auto(cls, value: object) -> object:
        if value == "auto":
            return value
        try:
            count = 1 if value is None else int(str(value))
        except ValueError:
            count = 0
        if not 1 <= count <= _MAX_REPLICAS:
            raise ValueError(f"possible are numbers from 1 to {_MAX_REPLICAS}, and 'auto'")
        return count

    @field_validator("model_impl", mode="before")
    @classmethod
    def _native_by_vllms_name(cls, value: object) -> object:
        return "native" if value == "vllm" else value

    @field_validator("hf_token", mode="before")
    @classmethod
    def _stored_token(cls, value: object) -> object:
        # vLLM takes true for the token stored by login, which is our default.
        return None if value is True else value

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _named_paths(cls, value: object) -> object:
        return None if value is None else parse_lora_modules(value)

    @field_validator("limit_mm_per_prompt", mode="before")
    @classmethod
    def _counts(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        # vLLM's second form: {"image": {"count": 2, "width": 512}}, whose sizes are for its own profiling.
        counts = {name: one.get("count") if isinstance(one, Mapping) else one for name, one in value.items()}
        for name, count in counts.items():
            if name not in ("image", "video", "audio") or type(count) is not int or count < 0:
                raise ValueError('write {"image": N}; 0 takes no pictures')
        return counts

    @field_validator("allowed_media_domains", "matryoshka_dimensions", "served_model_name", mode="before")
    @classmethod
    def _several_in_one_text(cls, value: object) -> object:
        return split_values(value)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that requests may use; empty where the model's own name serves."""
        return self.served_model_name or ()

    @classmethod
    def parse(cls, **options: object) -> Settings:
        """Settings from keyword options, vLLM's among them.

        Raises:
            ConfigError: an unknown option, naming the nearest, or a value that does not fit.
        """
        options = with_our_names(options)
        known = {*cls.model_fields, *OUR_NAMES, *FORMER_NAMES}
        meaningless = sorted(name for name in options if name in MEANINGLESS)
        for name in options:
            if name in ServerSettings.model_fields:
                raise ConfigError(f"'{name}' is an option of the server, not of a model.")
            if name not in known and name not in MEANINGLESS | DONE_ANYWAY:
                near = did_you_mean(name, known) or did_you_mean(name, MEANINGLESS | DONE_ANYWAY)
                raise ConfigError(f"There is no option '{name}'.{near}")
        if meaningless:
            warnings.warn(
                f"These options mean nothing to Poolhouse and are ignored: {', '.join(meaningless)}.", stacklevel=3
            )
        return _validated(cls, {name: value for name, value in options.items() if name in cls.model_fields})


class ServerSettings(BaseModel):
    """The HTTP server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = option("Server", "0.0.0.0", "Address to listen on.")  # noqa: S104 - as vLLM does
    port: int = option("Server", 8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    uds: str | None = option("Server", None, "Unix socket to listen on, instead of host and port.")
    uds_mode: str = option("Server", "600", "Who may use the unix socket: its permissions, in octal.")
    root_path: str = option("Server", "", "Path prefix that a proxy strips.")
    error_format: Literal["both", "flat", "nested"] = option(
        "Server", "both", "Shape of error bodies: vLLM's of old (flat), OpenAI's (nested), or the fields of both."
    )
    shutdown_seconds: float = option("Server", 30.0, "How long a stop waits for requests in flight.", ge=0)
    warmup: Literal["none", "fast", "full"] = option(
        "Server", "fast", "Before requests are taken: run nothing, a short prompt, or full packs of every length."
    )

    batch_dir: str | None = option(
        "Batches", None, "Folder of uploaded files and batches; none: /v1/files and /v1/batches are off."
    )
    max_file_bytes: int = option("Batches", 512 * 1024 * 1024, "Largest file that may be uploaded.", ge=1)
    models_dir: tuple[str, ...] = option(
        "Models on demand", (), "Folders whose models are loaded when requests ask for them; a hub's cache is one."
    )
    models_config: str | None = option(
        "Models on demand", None, "YAML or JSON file: options of single models of these folders, by name."
    )
    memory_limit: int | None = option(
        "Models on demand", None, "Memory of all models: bytes, or 24GiB; those used least lately are closed.", ge=1
    )
    unload_after: float | None = option(
        "Models on demand", None, "Seconds after which a model that nobody uses is closed; none: never.", ge=0
    )
    load_timeout: float = option(
        "Models on demand",
        300.0,
        "How long a request waits for its model; then it gets 503, and loading goes on.",
        gt=0,
    )
    pin: tuple[str, ...] = option("Models on demand", (), "Models that are not closed once they are loaded.")

    max_body_bytes: int = option("Limits", 64 * 1024 * 1024, "Largest request body.", ge=1)
    max_json_depth: int = option("Limits", 32, "Deepest nesting of a request body.", ge=2)
    max_client_batch_size: int = option("Limits", 8192, "Most inputs, or documents, of one request.", ge=1)
    max_queued_prompts: int = option(
        "Limits", 32768, "Most prompts that wait or run at once per model; further requests get 429.", ge=1
    )
    request_timeout_seconds: float = option(
        "Limits", 600.0, "After this long a request leaves the queue and gets 504.", gt=0
    )
    body_timeout_seconds: float = option("Limits", 60.0, "How long a client may take to send its body.", gt=0)
    max_header_bytes: int = option("Limits", 64 * 1024, "Largest headers of a request, with its URL.", ge=1024)
    max_url_bytes: int = option("Limits", 8 * 1024, "Longest URL of a request.", ge=256)
    header_timeout_seconds: float = option("Limits", 15.0, "How long a client may take to send its headers.", gt=0)
    reply_timeout_seconds: float = option("Limits", 30.0, "How long a client may read nothing of its reply.", gt=0)
    keep_alive_seconds: int = option("Limits", 75, "How long an idle connection stays open.", ge=1)

    api_key: tuple[SecretStr, ...] = option(
        "Security", (), "Key that requests must show; may be repeated. POOLHOUSE_API_KEY and VLLM_API_KEY serve too."
    )
    api_key_file: str | None = option(
        "Security", None, "File with a key per line, instead of keys on the command line."
    )
    ssl_keyfile: str | None = option("Security", None, "Private key for TLS.")
    ssl_certfile: str | None = option("Security", None, "Certificate for TLS.")
    ssl_keyfile_password: SecretStr | None = option("Security", None, "Password of the private key.")
    ssl_ca_certs: str | None = option("Security", None, "Authorities whose client certificates are taken.")
    ssl_cert_reqs: int = option("Security", 0, "Client certificates: 0 none, 1 optional, 2 required.", ge=0, le=2)
    ssl_ciphers: str | None = option("Security", None, "Ciphers of TLS, by OpenSSL's names.")
    enable_ssl_refresh: bool = option("Security", False, "Take renewed certificate files without a restart.")
    allowed_origins: tuple[str, ...] = option("Security", (), "Origins (CORS) that browsers may call from; * is any.")
    allowed_methods: tuple[str, ...] = option("Security", ("*",), "Methods that CORS allows.")
    allowed_headers: tuple[str, ...] = option("Security", ("*",), "Headers that CORS allows.")
    allow_credentials: bool = option("Security", False, "Whether CORS allows credentials.")
    trust_request_chat_template: bool = option("Security", False, "Take chat templates from requests.")
    disable_fastapi_docs: bool = option("Security", False, "No /docs and no /openapi.json.")
    page: bool = option("Security", True, "The page that browsers get at /, which tries each task.")

    log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = option(
        "Observability", "info", "Level of the server's own log."
    )
    log_format: Literal["text", "json"] = option("Observability", "text", "Lines for people, or an object per line.")
    disable_access_log: bool = option("Observability", False, "No line per request in the log.")
    disable_access_log_for_endpoints: tuple[str, ...] = option(
        "Observability", (), "Paths without a line per request, such as /health,/metrics."
    )
    otlp_traces_endpoint: str | None = option(
        "Observability", None, "Where OpenTelemetry traces go; needs the extra `tracing`."
    )

    @field_validator(
        *("allowed_origins", "allowed_methods", "allowed_headers", "disable_access_log_for_endpoints"),
        *("models_dir", "pin"),
        mode="before",
    )
    @classmethod
    def _several_in_one_text(cls, value: object) -> object:
        return split_values(os.fspath(value) if isinstance(value, os.PathLike) else value)

    @field_validator("memory_limit", mode="before")
    @classmethod
    def _with_a_unit(cls, value: object) -> object:
        found = (
            re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.I) if isinstance(value, str) else None
        )
        if found is None:
            if isinstance(value, str):
                raise ValueError("write bytes, or a number with a unit such as 24GiB, 512MiB or 8GB")
            return value
        number, unit, binary = found.groups()
        return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))

    @field_validator("root_path")
    @classmethod
    def _begins_with_a_slash(cls, value: str) -> str:
        path = value.strip("/")
        return f"/{path}" if path else ""

    @field_validator("uds_mode")
    @classmethod
    def _is_octal(cls, value: str) -> str:
        digits = value.removeprefix("0o")
        digits = digits[1:] if len(digits) == 4 and digits[0] == "0" else digits
        if len(digits) != 3 or set(digits) - set("01234567"):
            raise ValueError("permissions are three octal digits, such as 660")
        return digits

    @field_validator("api_key", mode="before")
    @classmethod
    def _keys_in_one_text(cls, value: object) -> object:
        keys = split_values(value)
        # Whoever sets keys wants them: an empty value must not leave the server open.
        if not keys:
            raise ValueError("there is no key in it; leave it out where the server is to be open to all")
        return keys

    @field_validator("api_key")
    @classmethod
    def _keys_are_visible(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        return tuple(SecretStr(visible_key(key.get_secret_value())) for key in keys)

    @classmethod
    def parse(cls, **options: object) -> ServerSettings:
        """Server settings from keyword options; raises ConfigError as `Settings.parse` does."""
        return _validated(cls, with_our_names(options))


def known_options() -> set[str]:
    """Every name that `Settings` or `ServerSettings` understand."""
    return useful_options() | {*FORMER_NAMES, *MEANINGLESS, *DONE_ANYWAY}


def useful_options() -> set[str]:
    """Every name, ours or vLLM's, that changes something here and is still in use."""
    return {*Settings.model_fields, *ServerSettings.model_fields, *OUR_NAMES}


SettingsT = TypeVar("SettingsT", bound=BaseModel)


def _validated(cls: type[SettingsT], options: Mapping[str, object]) -> SettingsT:
    try:
        return cls.model_validate(options)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_url=False):
            where, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
            got = "" if where[:1] in _SECRET else f" (got {problem['input']!r})"
            choices = get_args(cls.model_fields[str(where[0])].annotation) if problem["type"] == "literal_error" else ()
            near = did_you_mean(str(problem["input"]), choices)
            problems.append(f"{'.'.join(map(str, where))}: {message}{got}{near and f'.{near}'}")
        raise ConfigError("; ".join(problems)) from None


# Values that no message may show.
_SECRET = [("api_key",), ("hf_token",), ("ssl_keyfile_password",)]


def visible_key(key: str) -> str:
    """A key without what editors and shells leave around it: blanks, line ends, a byte order mark.

    Raises:
        ValueError: nothing visible is left, or something invisible is within.
    """
    visible = key.strip().strip("\ufeff").strip()
    if not visible or not visible.isprintable():
        raise ValueError("a key is of visible characters, at least one")
    return visible


def split_values(value: object) -> object:
    """The values of an option that takes several, written as `a,b` or as vLLM's JSON list; other types stay as they are."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"not a JSON list: {error}") from None
    return tuple(part.strip() for part in value.split(",") if part.strip())


# vLLM's name: ours.
OUR_NAMES = {
    "data_parallel_size": "replicas",
    "enable_prefix_caching": "prefix_sharing",
    "renderer_num_workers": "tokenizer_workers",
    "uvicorn_log_level": "log_level",
    "disable_uvicorn_access_log": "disable_access_log",
    "h11_max_incomplete_event_size": "max_header_bytes",
}
# Former name: what to use today.
FORMER_NAMES = {"override_pooler_config": "pooler_config", "task": "runner='pooling' and convert"}
# What vLLM's former option `task` meant, in terms of `convert`.
_FORMER_TASKS = {
    **dict.fromkeys(("embed", "embedding", "encode"), "embed"),
    "classify": "classify",
    # Every kind of model can score or reward as what it is: score falls back to cosines.
    **dict.fromkeys(("auto", "reward", "score"), "auto"),
}


def with_our_names(options: Mapping[str, object]) -> dict[str, object]:
    """Options with vLLM's names replaced by ours, with a warning for each former one.

    Raises:
        ConfigError: a former task that cannot be served, or one option under two names.
    """
    options = dict(options)
    for theirs, ours in OUR_NAMES.items():
        if theirs in options:
            value = options.pop(theirs)
            if ours in options:
                raise ConfigError(f"'{theirs}' and '{ours}' are the same option; give one of them.")
            options[ours] = value
    if "override_pooler_config" in options:
        _warn_former("override_pooler_config")
        value = options.pop("override_pooler_config")
        options.setdefault("pooler_config", value)
    if "task" in options:
        task = str(options.pop("task"))
        if task not in _FORMER_TASKS:
            near = did_you_mean(task, _FORMER_TASKS)
            raise ConfigError(f"task={task!r}: Poolhouse runs pooling models only: {sorted(_FORMER_TASKS)}.{near}")
        _warn_former("task")
        # A model that has the task already is not converted: auto would do for it too.
        options.setdefault("convert", _FORMER_TASKS[task])
    return options


def is_switch(name: str) -> bool:
    """Whether an option of MEANINGLESS or DONE_ANYWAY takes no value on the command line."""
    return name.startswith(("enable_", "disable_", "skip_", "use_", "no_")) or name in _OTHER_SWITCHES


def _warn_former(name: str) -> None:
    warnings.warn(
        f"The option `{name}` was renamed; use `{FORMER_NAMES[name]}` instead.", DeprecationWarning, stacklevel=5
    )


# What Poolhouse always does: ids in replies' headers, stack traces in the log.
DONE_ANYWAY = frozenset({"enable_request_id_headers", "log_error_stack"})
# Options of vLLM's constructor and server that steer what Poolhouse does not have: a key-value cache, generation,
# compilation, parallel workers. They are accepted, with one warning, so that callers need not change.
MEANINGLESS = frozenset(
    """
    additional_config aggregate_engine_logging api_server_count async_scheduling attention_backend attention_config
    block_size calculate_kv_scales code_revision compilation_config config_format cpu_offload_gb cudagraph_capture_sizes cudagraph_metrics
    data_parallel_address data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb data_parallel_rank
    data_parallel_rpc_port data_parallel_size_local data_parallel_start_rank
    decode_context_parallel_size default_mm_loras disable_cascade_attn disable_custom_all_reduce disable_log_requests
    disable_log_stats disable_sliding_window distributed_executor_backend enable_auto_tool_choice enable_chunked_prefill
    enable_expert_parallel enable_flash_late_interaction enable_force_include_usage enable_log_deltas enable_log_outputs
    enable_log_requests enable_lora_bias enable_offline_docs enable_prompt_embeds
    enable_prompt_tokens_details enable_server_load_tracking enable_sleep_mode enable_tokenizer_info_endpoint
    enforce_eager exclude_tools_when_tool_choice_none fully_sharded_loras generation_config gpu_memory_utilization
    h11_max_header_count headless ignore_patterns interleave_mm_strings kernel_config kv_cache_dtype
    kv_cache_memory_bytes kv_transfer_config language_model_only load_format logits_processors
    long_prefill_token_threshold lora_dtype master_addr master_port max_cpu_loras max_log_len max_logprobs
    max_long_partial_prefills max_loras max_num_partial_prefills max_num_seqs max_parallel_loading_workers
    max_seq_len_to_capture mm_encoder_tp_mode mm_processor_cache_gb mm_processor_cache_type
    model_loader_extra_config nnodes node_rank num_gpu_blocks_override num_scheduler_steps observability_config
    optimization_level override_attention_dtype override_generation_config pipeline_parallel_size preemption_mode
    prefix_caching_hash_algo profiler_config ray_workers_use_nsight reasoning_parser response_role
    return_tokens_as_token_ids scheduler_cls scheduler_delay_factor scheduling_policy skip_tokenizer_init
    speculative_config stream_interval structured_outputs_config swap_space tensor_parallel_size tool_call_parser
    tool_parser_plugin tool_server trust_request_mm_kwargs use_tqdm_on_load worker_cls worker_extension_cls
    """.split()  # noqa: SIM905 - a list of a hundred names reads better so
)
_OTHER_SWITCHES = frozenset(
    """
    aggregate_engine_logging async_scheduling calculate_kv_scales data_parallel_external_lb data_parallel_hybrid_lb
    enforce_eager exclude_tools_when_tool_choice_none fully_sharded_loras headless language_model_only log_error_stack
    interleave_mm_strings ray_workers_use_nsight return_tokens_as_token_ids trust_request_mm_kwargs
    """.split()  # noqa: SIM905
)
