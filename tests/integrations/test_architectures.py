"""Hessians of transformers' architectures beside dense ones of their own losses."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import spectra
from spectra.errors import DoubleBackwardError, LossError

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 13, 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 4}
EXPERTS = {"num_experts_per_tok": 2}
CAUSAL = {
    "GPT2LMHead": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "n_inner": 10},
    "LlamaForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "GemmaForCausalLM": GROUPED,
    "Gemma2ForCausalLM": GROUPED,
    "Gemma3ForCausalLM": GROUPED,
    "Phi3ForCausalLM": {**SIZES, "num_key_value_heads": 1, "pad_token_id": 0},
    "GPTNeoXForCausalLM": SIZES,
    "OPTForCausalLM": {**SIZES, "ffn_dim": 10, "word_embed_proj_dim": 8},
    "MixtralForCausalLM": {**GROUPED, **EXPERTS, "num_local_experts": 3},
    "Qwen3MoeForCausalLM": {**GROUPED, **EXPERTS, "num_experts": 3, "moe_intermediate_size": 5},
}
