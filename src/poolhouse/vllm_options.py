"""vLLM's options under other names, former names among them, and those that mean nothing here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from poolhouse.errors import ConfigError, did_you_mean

# vLLM's name: ours.
OUR_NAMES = {
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


def in_our_words(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with vLLM's names turned into ours, with a warning for each former one.

    Raises:
        ConfigError: a former task that cannot be served, or one option under two names.
    """
    options = dict(given)
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
        word = options.pop("task")
        if word not in _FORMER_TASKS:
            near = did_you_mean(str(word), _FORMER_TASKS)
            raise ConfigError(f"task={word!r}: Poolhouse runs pooling models only: {sorted(_FORMER_TASKS)}.{near}")
        _warn_former("task")
        # A model that has the task already is not converted: auto would do for it too.
        options.setdefault("convert", _FORMER_TASKS[word])
    return options


def is_switch(name: str) -> bool:
    """Whether an option of MEANINGLESS or DONE_ANYWAY takes no value on the command line."""
    return name.startswith(("enable_", "disable_", "skip_", "use_", "no_")) or name in _OTHER_SWITCHES


def _warn_former(word: str) -> None:
    warnings.warn(
        f"The option `{word}` was renamed; use `{FORMER_NAMES[word]}` instead.", DeprecationWarning, stacklevel=5
    )


# What Poolhouse does without being told: ids in replies' headers, stack traces in the log.
DONE_ANYWAY = frozenset({"enable_request_id_headers", "log_error_stack"})

# Options of vLLM's constructor and server that steer what Poolhouse does not have: a key-value cache, generation,
# compilation, parallel workers. They are accepted, with one warning, so that callers need not change.
MEANINGLESS = frozenset(
    """
    additional_config aggregate_engine_logging allowed_local_media_path allowed_media_domains api_server_count
    async_scheduling attention_backend attention_config block_size calculate_kv_scales
    code_revision compilation_config config_format cpu_offload_gb cudagraph_capture_sizes cudagraph_metrics
    data_parallel_address data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb data_parallel_rank
    data_parallel_rpc_port data_parallel_size data_parallel_size_local data_parallel_start_rank
    decode_context_parallel_size default_mm_loras disable_cascade_attn disable_custom_all_reduce disable_log_requests
    disable_log_stats disable_sliding_window distributed_executor_backend enable_auto_tool_choice enable_chunked_prefill
    enable_expert_parallel enable_flash_late_interaction enable_force_include_usage enable_log_deltas enable_log_outputs
    enable_log_requests enable_lora_bias enable_offline_docs enable_prefix_caching enable_prompt_embeds
    enable_prompt_tokens_details enable_server_load_tracking enable_sleep_mode enable_tokenizer_info_endpoint
    enforce_eager exclude_tools_when_tool_choice_none fully_sharded_loras generation_config gpu_memory_utilization
    h11_max_header_count headless ignore_patterns interleave_mm_strings kernel_config kv_cache_dtype
    kv_cache_memory_bytes kv_transfer_config language_model_only limit_mm_per_prompt load_format logits_processors
    long_prefill_token_threshold lora_dtype master_addr master_port max_cpu_loras max_log_len max_logprobs
    max_long_partial_prefills max_loras max_num_partial_prefills max_num_seqs max_parallel_loading_workers
    max_seq_len_to_capture mm_encoder_tp_mode mm_processor_cache_gb mm_processor_cache_type mm_processor_kwargs
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
