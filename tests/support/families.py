"""Tiny random models of several architectures, with every kind of dropout and noise that they have."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdkit.models import tiny

HALF = 0.5
OLD = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 1}
GROUPED = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "bos_token_id": None,
}
EXPERTS = GROUPED | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
SETTINGS = {
    "llama": GROUPED | {"attention_dropout": HALF, "tie_word_embeddings": True},
    "gpt2": OLD
    | {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}
    | {"resid_pdrop": HALF, "embd_pdrop": HALF, "attn_pdrop": HALF, "initializer_range": 0.2},
    "opt": OLD
    | {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "dropout": HALF, "attention_dropout": HALF, "layerdrop": HALF}
    | {"init_std": 0.2},
    "bloom": OLD
    | {"hidden_size": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    | {"hidden_dropout": HALF, "attention_dropout": HALF},
    "falcon": OLD
    | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"hidden_dropout": HALF, "attention_dropout": HALF, "initializer_range": 0.2},
    "mixtral": EXPERTS | {"router_jitter_noise": HALF, "attention_dropout": HALF},
    "phimoe": EXPERTS | {"router_jitter_noise": HALF, "input_jitter_noise": HALF},
    "qwen2_moe": EXPERTS
    | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    | {"decoder_sparse_step": 1},
    "gpt_oss": EXPERTS | {"head_dim": 32},
    "falcon_h1": GROUPED | {"mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 16},
    "llama4_text": EXPERTS
    | {"head_dim": 32, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1}
    | {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64},
}
EAGER = ("bloom", "gpt_oss")
"""Families without scaled-dot-product attention."""


def build(folder, family, **changes):
    """Write a tiny model of this family and the tiny model's tokenizer; returns the folder."""
    tokenizer = tiny.make_tokenizer(512)
    settings = SETTINGS[family] | {"vocab_size": len(tokenizer)} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
