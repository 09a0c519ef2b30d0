"""The embedding models that the hub has: a tiny random repository for each, in its own layout."""

from __future__ import annotations

from typing import Any

from tests.models.hub_layout import Hub, Tensors, prefixed

ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 514,
}
BERT = ENCODER | {"pad_token_id": 0}
ROBERTA = ENCODER | {"pad_token_id": 1, "type_vocab_size": 1}
DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
PLAIN_DECODER = {key: value for key, value in DECODER.items() if key != "head_dim"}
MODERN = ENCODER | {
    "pad_token_id": 0,
    "local_attention": 16,
    "cls_token_id": 2,
    "sep_token_id": 3,
    "num_hidden_layers": 4,
}
DEBERTA_V3 = ENCODER | {
    "pad_token_id": 1,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": 64,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
MIXED = ["sliding_attention", "full_attention"] * 2
QWEN3_PROMPTS = {
    "query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
    "document": "",
}
E5_PROMPTS = {"query": "query: ", "passage": "passage: "}
SNOWFLAKE_PROMPTS = {"query": "Represent this sentence for searching relevant passages: "}
GTE_PROMPTS = {"query": "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "}
GTE_WORDS: dict[str, Any] = {
    "position_embedding_type": "rope",
    "layer_norm_type": "layer_norm",
    "pack_qkv": True,
    "unpad_inputs": False,
    **dict.fromkeys(("use_memory_efficient_attention", "logn_attention_scale", "logn_attention_clip1"), False),
}
STELLA_PROMPTS = {
    "s2p_query": "Instruct: Given a web search query, retrieve relevant passages that answer the query.\nQuery: ",
    "s2s_query": "Instruct: Retrieve semantically similar text.\nQuery: ",
}
GEMMA_PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: "}


# transformers' words, which Nomic's config on the hub does not have.
NOT_NOMICS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rope_theta", "head_dim"),
    *("hidden_act", "layer_norm_eps", "max_position_embeddings"),
)


def _bert(pooling: str, **more: Any) -> Hub:
    return Hub("BertModel", "Bert", BERT, tokenizer="wordpiece", pooling=pooling, **more)


def _xlm(pooling: str, **more: Any) -> Hub:
    return Hub("XLMRobertaModel", "XLMRoberta", ROBERTA, tokenizer="unigram", pooling=pooling, **more)


def _nemotron(word: str, pooling: str) -> Hub:
    """Nvidia's bidirectional Llama: config.json says how to pool; the reference is told by sentence-transformers' files."""
    config = {"model_type": "llama_bidirec", "pooling": word, "is_causal": None, "temperature": 1.0}
    return Hub(
        "LlamaBidirectionalModel",
        "Llama",
        DECODER | {"is_causal": False},
        config=config,
        ends=(True, False),
        pooling=pooling,
        prompts={"query": "query: ", "document": "passage: "},
    )


def _nomic(**more: Any) -> dict[str, Any]:
    return {
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_inner": 48,
        "n_positions": 8192,
        "max_trained_positions": 2048,
        "rotary_emb_base": 1000,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "activation_function": "swiglu",
        "layer_norm_epsilon": 1e-12,
        "prenorm": False,
        "causal": False,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "use_rms_norm": False,
        "parallel_block": False,
        "type_vocab_size": 2,
        **dict.fromkeys(NOT_NOMICS),
        **more,
    }


def _without_head_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


# The examples that each stands for -> the repository. All are compared with sentence-transformers.
ROWS: dict[str, Hub] = {
    # BERT and its kin
    "BAAI/bge-small-en-v1.5, bge-base-en-v1.5": _bert("cls"),
    "sentence-transformers/all-MiniLM-L6-v2": _bert("mean", max_seq_length=20),
    "intfloat/e5-small-v2, e5-base": _bert(
        "mean", prompts=E5_PROMPTS, tensors=prefixed("bert.", "cls.predictions.bias")
    ),
    "Snowflake/snowflake-arctic-embed-xs": _bert("cls", prompts=SNOWFLAKE_PROMPTS),
    "Snowflake/snowflake-arctic-embed-m-v1.5": _bert("cls", prompts=SNOWFLAKE_PROMPTS),
    "MongoDB/mdbr-leaf-ir": _bert("mean", dense=((32, 48),), prompts=SNOWFLAKE_PROMPTS),
    "sentence-transformers/all-roberta-large-v1": Hub(
        "RobertaForMaskedLM", "Roberta", ROBERTA, head="ForMaskedLM", tokenizer="roberta", pooling="mean"
    ),
    "intfloat/multilingual-e5-small, -base, -large": _xlm("mean", prompts=E5_PROMPTS),
    "BAAI/bge-m3 (dense)": _xlm("cls", tensors=prefixed("0.auto_model.")),
    "Snowflake/snowflake-arctic-embed-l-v2.0": _xlm("cls", prompts={"query": "query: "}),
    "sentence-transformers/all-mpnet-base-v2": Hub(
        "MPNetForMaskedLM",
        "MPNet",
        ENCODER | {"pad_token_id": 1},
        head="ForMaskedLM",
        tokenizer="roberta",
        pooling="mean",
    ),
    "sentence-transformers/msmarco-distilbert-base-v4": Hub(
        "DistilBertModel",
        "DistilBert",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0},
        tokenizer="wordpiece",
        pooling="mean",
        normalize=False,
    ),
    "sentence-transformers/paraphrase-albert-small-v2": Hub(
        "AlbertModel", "Albert", BERT | {"embedding_size": 16}, tokenizer="wordpiece", pooling="mean", normalize=False
    ),
    "google/electra-small with sentence-transformers' files": Hub(
        "ElectraForPreTraining",
        "Electra",
        BERT | {"embedding_size": 16},
        head="ForPreTraining",
        tokenizer="wordpiece",
        pooling="mean",
    ),
    # Rotary encoders
    "Snowflake/snowflake-arctic-embed-m-v2.0": Hub(
        "GteModel",
        "Gte",
        ENCODER | {"pad_token_id": 1},
        tokenizer="unigram",
        pooling="cls",
        prompts={"query": "query: "},
        config=GTE_WORDS,
    ),
    "Alibaba-NLP/gte-multilingual-base": Hub(
        "NewModel",
        "Gte",
        ENCODER | {"pad_token_id": 1},
        tokenizer="unigram",
        pooling="cls",
        tensors=prefixed("new.", "classifier.weight", "classifier.bias"),
        config=GTE_WORDS | {"model_type": "new"},
    ),
    # Its flags choose how the hub's code computes, not what.
    "NovaSearch/stella_en_400M_v5": Hub(
        "NewModel",
        "Gte",
        ENCODER | {"pad_token_id": 0},
        tokenizer="wordpiece",
        pooling="mean",
        dense=((32, 48),),
        normalize=False,
        prompts=STELLA_PROMPTS,
        tensors=prefixed("new."),
        config=GTE_WORDS | {"model_type": "new", "unpad_inputs": True, "use_memory_efficient_attention": True},
    ),
    "nomic-ai/nomic-embed-text-v1.5": Hub(
        "NomicBertModel", "NomicBert", BERT, tokenizer="wordpiece", pooling="mean", config=_nomic(), normalize=False
    ),
    "Snowflake/snowflake-arctic-embed-m-long": Hub(
        "NomicBertModel",
        "NomicBert",
        BERT,
        tokenizer="wordpiece",
        pooling="cls",
        prompts=SNOWFLAKE_PROMPTS,
        config=_nomic(qkv_proj_bias=False),
    ),
    "Alibaba-NLP/gte-modernbert-base": Hub(
        "ModernBertModel", "ModernBert", MODERN, tokenizer="bpe", ends=(True, True), pooling="cls"
    ),
    "nomic-ai/modernbert-embed-base": Hub(
        "ModernBertModel",
        "ModernBert",
        MODERN,
        head="ForMaskedLM",
        ends=(True, True),
        pooling="mean",
        prompts={"query": "search_query: ", "document": "search_document: "},
    ),
    "EuroBERT/EuroBERT-210m with sentence-transformers' files": Hub(
        "EuroBertForMaskedLM", "EuroBert", DECODER, head="ForMaskedLM", ends=(True, True), pooling="mean"
    ),
    # Decoders
    "google/embeddinggemma-300m": Hub(
        "Gemma3TextModel",
        "Gemma3Text",
        DECODER
        | {"use_bidirectional_attention": True, "sliding_window": 16, "layer_types": MIXED, "query_pre_attn_scalar": 8},
        ends=(True, True),
        pooling="mean",
        dense=((32, 64), (64, 32)),
        prompts=GEMMA_PROMPTS,
    ),
    "microsoft/harrier-oss-v1-270m, -27b": Hub(
        "Gemma3TextModel",
        "Gemma3Text",
        DECODER | {"sliding_window": 16, "layer_types": MIXED, "query_pre_attn_scalar": 8},
        ends=(True, True),
        prompts={"web_search_query": "Instruct: Given a web search query, retrieve passages\nQuery: "},
    ),
    "BAAI/bge-multilingual-gemma2": Hub(
        "Gemma2Model",
        "Gemma2",
        DECODER | {"sliding_window": 16, "query_pre_attn_scalar": 8},
        ends=(True, True),
        prompts={"web_search_query": "<instruct>Given a web search query, retrieve passages.\n<query>"},
    ),
    "intfloat/e5-mistral-7b-instruct": Hub(
        "MistralModel",
        "Mistral",
        DECODER | {"sliding_window": 16},
        ends=(True, True),
        prompts={"web_search_query": "Instruct: Given a web search query, retrieve passages\nQuery: "},
    ),
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct, -7B-instruct": Hub(
        "Qwen2ForCausalLM",
        "Qwen2",
        PLAIN_DECODER | {"is_causal": False},
        head="ForCausalLM",
        prompts=GTE_PROMPTS,
        tokenizer="qwen",
        config={"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}},
    ),
    "ssmits/Qwen2-7B-Instruct-embed-base": Hub(
        "Qwen2ForCausalLM",
        "Qwen2",
        PLAIN_DECODER,
        ends=(False, False),
        tokenizer="qwen",
        pooling="mean",
        normalize=False,
        tensors=_without_head_prefix,
    ),
    "Qwen/Qwen3-Embedding-0.6B, -4B, -8B": Hub(
        "Qwen3ForCausalLM", "Qwen3", DECODER | {"tie_word_embeddings": True}, prompts=QWEN3_PROMPTS
    ),
    "a bidirectional Qwen2": Hub(
        "Qwen2BidirectionalModel",
        "Qwen2",
        PLAIN_DECODER | {"is_causal": False},
        pooling="mean",
        tokenizer="qwen",
        config={"is_causal": None},
    ),
    "a bidirectional Qwen3": Hub(
        "Qwen3BidirectionalModel", "Qwen3", DECODER | {"is_causal": False}, pooling="mean", config={"is_causal": None}
    ),
    "a Llama embedder": Hub("LlamaModel", "Llama", DECODER, ends=(True, True)),
    "a Llama with its language head": Hub("LlamaForCausalLM", "Llama", DECODER, head="ForCausalLM", ends=(True, False)),
    "a Gemma embedder": Hub("GemmaModel", "Gemma", DECODER, ends=(True, True)),
    "a GPT-2 embedder": Hub(
        "GPT2Model",
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 0, "eos_token_id": 2},
    ),
    "sentence-transformers/gtr-t5-base, sentence-t5-base": Hub(
        "T5EncoderModel",
        "T5",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        head="EncoderModel",
        tokenizer="unigram",
        pooling="mean",
        dense=((32, 48),),
    ),
    "an ERNIE embedder": Hub("ErnieModel", "Ernie", BERT, tokenizer="wordpiece", pooling="cls"),
    "a DeBERTa v1 embedder": Hub("DebertaModel", "Deberta", BERT, tokenizer="wordpiece", pooling="mean"),
    "a DeBERTa v3 embedder": Hub("DebertaV2Model", "DebertaV2", DEBERTA_V3, tokenizer="unigram", pooling="mean"),
    "an Aquila embedder": Hub("AquilaModel", "Llama", PLAIN_DECODER, config={"model_type": "aquila"}),
    "nvidia/llama-nemotron-embed-1b-v2": _nemotron("avg", "mean"),
    "nvidia/llama-nemotron-embed, pooling cls": _nemotron("cls", "cls"),
    "nvidia/llama-nemotron-embed, pooling last": _nemotron("last", "lasttoken"),
    "nvidia/Nemotron-3-Embed-1B-BF16, -8B-BF16": Hub(
        "Ministral3BidirectionalModel",
        "Ministral3",
        DECODER
        | {
            "is_causal": False,
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 128,
                "llama_4_scaling_beta": 0.1,
            },
        },
        ends=(True, False),
        pooling="mean",
        prompts={"query": "query: ", "document": "passage: "},
    ),
    "a Phi-3 embedder": Hub("Phi3ForCausalLM", "Phi3", PLAIN_DECODER, head="ForCausalLM"),
    "a GLM-4 embedder": Hub(
        "GlmForCausalLM", "Glm", DECODER | {"partial_rotary_factor": 0.5, "attention_bias": True}, head="ForCausalLM"
    ),
    "a bidirectional DeepSeek-V3": Hub(
        "DeepseekV3BidirectionalModel",
        "DeepseekV3",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "qk_nope_head_dim": 8,
            "first_k_dense_replace": 1,
            "max_position_embeddings": 512,
            "pad_token_id": None,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "is_causal": False,
        },
        pooling="mean",
    ),
}
