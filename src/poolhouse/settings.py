"""Every option that a user may set, once, with its help text; `LLM(...)` and the command line read the same class."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from poolhouse.errors import ConfigError, did_you_mean
from poolhouse.lora import parse_lora_modules


class Settings(BaseModel):
    """One engine: its model, how it is loaded, and how it treats requests."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str | None = Field(None, description="Folder or hub id; without one, the embedded default all-MiniLM-L6-v2.")
    runner: Literal["auto", "generate", "pooling", "draft"] = Field(
        "auto", description="Only pooling models are run; 'auto' and 'pooling' mean the same."
    )
    convert: Literal["auto", "none", "embed", "classify"] = Field(
        "auto", description="Make an embedder or a classifier of a model that is none; auto goes by its architecture."
    )
    tokenizer: str | None = Field(None, description="Folder or hub id of the tokenizer, if not the model's.")
    tokenizer_mode: Literal["auto", "hf"] = Field("auto", description="How to read the tokenizer; one way exists.")
    revision: str | None = Field(None, description="Branch, tag or commit of the model on the hub.")
    tokenizer_revision: str | None = Field(None, description="Branch, tag or commit of the tokenizer on the hub.")
    download_dir: str | None = Field(None, description="Where to keep files from the hub.")
    hf_token: str | None = Field(None, description="Token for the hub; none: the one stored by login, if any.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")
    hf_overrides: Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]] | None = Field(
        None, description="Changes to config.json: a mapping, or a function from config to config."
    )
    model_impl: Literal["auto", "native", "transformers"] = Field(
        "auto", description="Who runs the model: the native families, transformers, or whichever can."
    )
    dtype: str = Field("auto", description="auto, float32, float16 (half) or bfloat16; auto is float32 on CPUs.")
    device: str = Field("auto", description="auto (CUDA where there is one), cpu, cuda or cuda:N.")
    pooler_config: Any = Field(None, description="How to pool, where the model's files should not decide.")
    chat_template: str | None = Field(
        None, description="Template that joins a query and a document to score: a file, its text, or a built-in name."
    )
    matryoshka_dimensions: tuple[int, ...] | None = Field(
        None, description="Vector lengths that requests may ask for, e.g. 64,128,256."
    )
    colbert_compat: Literal["reference", "vllm"] = Field(
        "reference",
        description="Late-interaction models: read queries and documents as the reference does (markers, filled-up "
        "queries, skipped punctuation), or as plain texts, as vLLM does.",
    )
    max_model_len: int | None = Field(None, description="Longest prompt in tokens; -1 or none: the model's own limit.")
    overflow: Literal["error", "truncate", "chunk"] = Field(
        "error", description="What to do with longer prompts: refuse, cut (and say so), or split and average."
    )
    served_model_name: str | tuple[str, ...] | None = Field(
        None, description="Name or names (with commas) that requests may use; replies give the first."
    )
    enable_lora: bool = Field(True, description="Whether requests may use adapters; needs no switching on.")
    lora_modules: dict[str, str] | None = Field(
        None,
        description="Adapters that requests may name: name=path, several with commas; a path is a PEFT folder or hub id.",
    )
    max_lora_rank: int | None = Field(None, ge=1, description="Refuse adapters of a higher rank; none: any rank.")
    merge_adapter: str | None = Field(
        None,
        description="Adapter to merge into the weights at load, so that it costs nothing: a name of lora_modules, "
        "a task of the checkpoint, or a PEFT folder or hub id.",
    )
    max_num_batched_tokens: int | None = Field(None, ge=1, description="Tokens of one pack; none: by the device.")
    tokenizer_workers: int = Field(
        2, ge=1, le=64, alias="renderer_num_workers", description="Threads that tokenise.", validate_default=True
    )
    io_processor_plugin: str | None = Field(
        None, description="Plugin that turns its own data into prompts; none: the one that config.json names, if any."
    )
    quantization: str | None = Field(None, description="Nothing is quantised: only none is taken.")
    quantization_config: Any = Field(None, description="As quantization.")
    seed: int = Field(0, description="Seed of torch's random numbers.")

    @field_validator("seed", mode="before")
    @classmethod
    def _vllms_former_default(cls, value: Any) -> Any:
        return 0 if value is None else value

    @field_validator("quantization", "quantization_config", mode="before")
    @classmethod
    def _nothing_is_quantised(cls, value: Any) -> Any:
        if value in (None, "", "none", "auto"):
            return None
        raise ValueError(
            "Poolhouse does not quantise weights; leave it out, or ask for dtype='bfloat16' to save memory"
        )

    @field_validator("model_impl", mode="before")
    @classmethod
    def _native_in_vllms_word(cls, value: Any) -> Any:
        return "native" if value == "vllm" else value

    @field_validator("hf_token", mode="before")
    @classmethod
    def _stored_token(cls, value: Any) -> Any:
        # vLLM takes true for the token stored by login, which is our default.
        return None if value is True else value

    @field_validator("lora_modules", mode="before")
    @classmethod
    def _named_paths(cls, value: Any) -> Any:
        return None if value is None else parse_lora_modules(value)

    @field_validator("matryoshka_dimensions", mode="before")
    @classmethod
    def _sizes_in_one_word(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @property
    def names(self) -> tuple[str, ...]:
        """The names that requests may use; empty where the model's own name serves."""
        if self.served_model_name is None:
            return ()
        return (self.served_model_name,) if isinstance(self.served_model_name, str) else self.served_model_name

    @classmethod
    def parse(cls, **options: Any) -> Settings:
        """Settings from keyword options, vLLM's among them.

        Raises:
            ConfigError: an unknown option, naming the nearest, or a value that does not fit.
        """
        options = _with_former_words(options)
        known = [*cls.model_fields, *(field.alias for field in cls.model_fields.values() if field.alias)]
        meaningless = sorted(name for name in options if name in MEANINGLESS)
        for name in options:
            if name not in known and name not in MEANINGLESS:
                raise ConfigError(f"There is no option '{name}'.{did_you_mean(name, [*known, *MEANINGLESS])}")
        if meaningless:
            warnings.warn(
                f"These options mean nothing to Poolhouse and are ignored: {', '.join(meaningless)}.", stacklevel=3
            )
        return _validated(cls, {name: value for name, value in options.items() if name not in MEANINGLESS})


class ServerSettings(BaseModel):
    """The HTTP server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("0.0.0.0", description="Address to listen on.")  # noqa: S104 - as vLLM does
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    root_path: str = Field("", description="Path prefix that a proxy strips.")
    error_format: Literal["flat", "nested"] = Field("flat", description="Shape of error bodies; nested is OpenAI's.")
    shutdown_seconds: float = Field(30.0, ge=0, description="How long a stop waits for requests in flight.")
    warmup: Literal["none", "fast", "full"] = Field(
        "fast", description="Before requests are taken: run nothing, a short prompt, or full packs of every length."
    )

    # Limits
    max_body_bytes: int = Field(64 * 1024 * 1024, ge=1, description="Largest request body.")
    max_json_depth: int = Field(32, ge=2, description="Deepest nesting of a request body.")
    max_client_batch_size: int = Field(8192, ge=1, description="Most inputs, or documents, of one request.")
    max_queued_prompts: int = Field(
        32768, ge=1, description="Most prompts that wait or run at once per model; further requests hear 429."
    )
    request_timeout_seconds: float = Field(
        600.0, gt=0, description="After this long a request leaves the queue and hears 504."
    )
    body_timeout_seconds: float = Field(60.0, gt=0, description="How long a client may take to send its body.")

    # Security
    api_key: tuple[str, ...] | None = Field(
        None, description="Key or keys (with commas) that requests must show; else POOLHOUSE_API_KEY or VLLM_API_KEY."
    )
    api_key_file: str | None = Field(None, description="File with a key per line, instead of keys on the command line.")
    ssl_keyfile: str | None = Field(None, description="Private key for TLS.")
    ssl_certfile: str | None = Field(None, description="Certificate for TLS.")
    ssl_ca_certs: str | None = Field(None, description="Authorities whose client certificates are taken.")
    ssl_cert_reqs: int = Field(0, ge=0, le=2, description="Client certificates: 0 none, 1 optional, 2 required.")
    allowed_origins: tuple[str, ...] = Field((), description="Origins (CORS) that browsers may call from; * is any.")
    allowed_methods: tuple[str, ...] = Field(("*",), description="Methods that CORS allows.")
    allowed_headers: tuple[str, ...] = Field(("*",), description="Headers that CORS allows.")
    allow_credentials: bool = Field(False, description="Whether CORS allows credentials.")
    trust_request_chat_template: bool = Field(False, description="Take chat templates from requests.")
    disable_fastapi_docs: bool = Field(False, description="No /docs and no /openapi.json.")

    # Observability
    log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = Field(
        "info", description="Level of the server's own log."
    )
    log_format: Literal["text", "json"] = Field("text", description="Lines for people, or an object per line.")
    disable_access_log: bool = Field(False, description="No line per request in the log.")
    otlp_traces_endpoint: str | None = Field(
        None, description="Where OpenTelemetry traces go; needs the extra `tracing`."
    )

    @field_validator("api_key", "allowed_origins", "allowed_methods", "allowed_headers", mode="before")
    @classmethod
    def _several_in_one_word(cls, value: Any) -> Any:
        """Several words with commas, or a JSON list, as vLLM takes them."""
        if not isinstance(value, str):
            return value
        if value.startswith("["):
            return json.loads(value)
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @classmethod
    def parse(cls, **options: Any) -> ServerSettings:
        """Server settings from keyword options; raises ConfigError in plain words."""
        return _validated(cls, options)


# What vLLM's former option `task` meant, in terms of `convert`.
_FORMER_TASKS = {
    **dict.fromkeys(("embed", "embedding", "encode"), "embed"),
    "classify": "classify",
    # Every kind of model can score or reward as what it is: score falls back to cosines.
    **dict.fromkeys(("auto", "reward", "score"), "auto"),
}


def _with_former_words(options: dict[str, Any]) -> dict[str, Any]:
    """Options with vLLM's former names turned into today's, with a warning for each.

    Raises:
        ConfigError: a former task that cannot be served.
    """
    options = dict(options)
    if "override_pooler_config" in options:
        _warn_former("override_pooler_config", "pooler_config")
        options.setdefault("pooler_config", options.pop("override_pooler_config"))
    if "task" in options:
        word = options.pop("task")
        if word not in _FORMER_TASKS:
            raise ConfigError(f"task={word!r}: Poolhouse runs pooling models only: {sorted(_FORMER_TASKS)}.")
        _warn_former("task", "runner='pooling' and convert")
        # A model that has the task already is not converted: auto would do for it too.
        options.setdefault("convert", _FORMER_TASKS[word])
    return options


def _warn_former(word: str, today: str) -> None:
    warnings.warn(f"The option `{word}` was renamed; use `{today}` instead.", DeprecationWarning, stacklevel=5)


SettingsT = TypeVar("SettingsT", bound=BaseModel)


def _validated(cls: type[SettingsT], options: Mapping[str, Any]) -> SettingsT:
    try:
        return cls.model_validate(options)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})"
            for problem in error.errors(include_url=False)
        ]
        raise ConfigError("; ".join(problems)) from None


# Options of vLLM's constructor and server that steer what Poolhouse does not have: a key-value cache, generation,
# compilation, parallel workers. They are accepted, with one warning, so that callers need not change.
MEANINGLESS = frozenset(
    """
    additional_config allowed_local_media_path allowed_media_domains api_server_count async_scheduling attention_backend
    attention_config block_size calculate_kv_scales code_revision compilation_config config_format cpu_offload_gb
    data_parallel_backend data_parallel_size disable_cascade_attn disable_custom_all_reduce disable_log_requests
    disable_log_stats disable_sliding_window distributed_executor_backend enable_chunked_prefill enable_expert_parallel
    default_mm_loras enable_prefix_caching enable_sleep_mode enforce_eager fully_sharded_loras generation_config
    gpu_memory_utilization ignore_patterns
    kernel_config kv_cache_dtype kv_cache_memory_bytes kv_transfer_config limit_mm_per_prompt load_format
    logits_processors long_prefill_token_threshold lora_dtype max_cpu_loras max_loras max_logprobs
    max_long_partial_prefills
    max_num_partial_prefills max_num_seqs max_parallel_loading_workers max_seq_len_to_capture mm_processor_cache_gb
    mm_processor_kwargs model_loader_extra_config num_gpu_blocks_override num_scheduler_steps observability_config
    optimization_level override_attention_dtype override_generation_config pipeline_parallel_size
    preemption_mode prefix_caching_hash_algo profiler_config ray_workers_use_nsight reasoning_parser
    scheduler_cls scheduler_delay_factor scheduling_policy skip_tokenizer_init speculative_config
    structured_outputs_config swap_space tensor_parallel_size use_tqdm_on_load worker_cls worker_extension_cls
    """.split()  # noqa: SIM905 - a list of a hundred names reads better so
)
