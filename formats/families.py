"""The families of models: what their config.json says in our terms, and what they call our parameters."""
import re
from typing import NamedTuple

import torch

from model import GPT
from plumbing.flags import require

# ---------------------------------------------------------------------------------------------------------
# What a family's config.json, the dict h, says in our terms: the arguments of `GPTConfig`


def gpt2_config(h):
    """GPT-2 (Radford et al. 2019)."""
    refuse(h,
           activation_function=("gelu_new", "gelu_pytorch_tanh"),
           scale_attn_by_inverse_layer_idx=(False,),
           scale_attn_weights=(True,),
           add_cross_attention=(False,))
    return dict(
        vocab_size=h["vocab_size"],
        block_size=h["n_positions"],
        n_layer=h["n_layer"],
        n_head=h["n_head"],
        n_kv_head=h["n_head"],
        n_embd=h["n_embd"],
        n_inner=h.get("n_inner") or 0,
        norm_eps=h.get("layer_norm_epsilon", 1e-5),
        tied=h.get("tie_word_embeddings", True),
        # A GPT-2 without biases is stored with biases of zero.
        bias=bool(own_notes(h).get("bias", True)),
    )


# The kinds of rotary positions, and the numbers that each has, in the order of `GPTConfig.rope_scaling`.
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def llama_config(h):
    """Llama 2 and 3, SmolLM2 (llama), Mistral, Qwen2 and 2.5, Qwen3.

    Qwen2 has biases on q, k and v, Qwen3 norms on q and k.
    """
    kind = h["model_type"]
    refuse(h,
           hidden_act=("silu",),
           attention_bias=(False, True) if kind == "qwen2" else (False,),
           mlp_bias=(False,),
           partial_rotary_factor=(1.0,))
    # As transformers 5 calls it, and as it was called before.
    rope = h.get("rope_parameters") or h.get("rope_scaling") or {}
    refuse(rope, partial_rotary_factor=(1.0,))
    scaling = rope_scaling(rope)
    context = h["max_position_embeddings"]
    if h.get("sliding_window") and (kind == "mistral" or h.get("use_sliding_window")):
        # Within the window its attention is the plain one.
        context = min(context, h["sliding_window"])
    return dict(
        vocab_size=h["vocab_size"],
        block_size=context,
        n_layer=h["num_hidden_layers"],
        n_head=h["num_attention_heads"],
        n_kv_head=h.get("num_key_value_heads") or h["num_attention_heads"],
        n_embd=h["hidden_size"],
        head_dim=h.get("head_dim") or 0,
        n_inner=h["intermediate_size"],
        norm="rmsnorm",
        norm_eps=h["rms_norm_eps"],
        qk_norm=kind == "qwen3",
        position="rotary",
        rope_theta=float(rope.get("rope_theta", h.get("rope_theta", 10000.0))),
        rope_scaling=scaling,
        mlp="swiglu",
        bias=False,
        qkv_bias=kind == "qwen2",
        tied=h.get("tie_word_embeddings", False),
    )


def rope_scaling(rope):
    """`GPTConfig.rope_scaling`: the kind and its numbers, or () for plain rotary positions.

    rope: what config.json says of them, a dict.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ROPE_NUMBERS,
            f"rotary positions of kind '{kind}' are not supported, only {', '.join(ROPE_NUMBERS)}")
    numbers = [float(rope[name]) for name in ROPE_NUMBERS[kind]]
    return (kind, *numbers) if numbers else ()


def opt_config(h):
    """OPT (Zhang et al. 2022); the 350M one has its norms behind the blocks and a narrower embedding."""
    refuse(h,
           activation_function=("relu",),
           enable_bias=(True,),
           layer_norm_elementwise_affine=(True,),
           _remove_final_layer_norm=(False,))
    return dict(
        vocab_size=h["vocab_size"],
        block_size=h["max_position_embeddings"],
        n_layer=h["num_hidden_layers"],
        n_head=h["num_attention_heads"],
        n_kv_head=h["num_attention_heads"],
        n_embd=h["hidden_size"],
        n_inner=h["ffn_dim"],
        embed_dim=h.get("word_embed_proj_dim") or 0,
        norm_after=not h.get("do_layer_norm_before", True),
        position_offset=2,
        mlp="relu",
        tied=h.get("tie_word_embeddings", True),
    )


def refuse(header, **allowed):
    """UserError if a field of config.json has a value that this project doesn't compute.

    allowed: the values that it does compute, by field; a field that is not there has the first of them.
    """
    for field, values in allowed.items():
        value = header.get(field, values[0])
        known = " or ".join(map(str, values))
        require(value in values, f"{field} {header.get(field)} is not supported, only {known}")


# ---------------------------------------------------------------------------------------------------------
# What a family calls our modules. {} is the layer's number. Several names: their weights, (out, in) each,
# stand one below the other in our one matrix.

GPT2_NAMES = {
    "transformer.wte": "transformer.wte",
    "transformer.wpe": "transformer.wpe",
    "transformer.ln_f": "transformer.ln_f",
    "transformer.h.{}.ln_1": "transformer.h.{}.ln_1",
    "transformer.h.{}.attn.c_attn": "transformer.h.{}.attn.c_attn",
    "transformer.h.{}.attn.c_proj": "transformer.h.{}.attn.c_proj",
    "transformer.h.{}.ln_2": "transformer.h.{}.ln_2",
    "transformer.h.{}.mlp.c_fc": "transformer.h.{}.mlp.c_fc",
    "transformer.h.{}.mlp.c_proj": "transformer.h.{}.mlp.c_proj",
}
LLAMA_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h.{}.ln_1": "model.layers.{}.input_layernorm",
    "transformer.h.{}.ln_2": "model.layers.{}.post_attention_layernorm",
    "transformer.h.{}.attn.c_attn": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "transformer.h.{}.attn.c_proj": "model.layers.{}.self_attn.o_proj",
    "transformer.h.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "transformer.h.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "transformer.h.{}.mlp.c_fc": (
        "model.layers.{}.mlp.gate_proj",
        "model.layers.{}.mlp.up_proj",
    ),
    "transformer.h.{}.mlp.c_proj": "model.layers.{}.mlp.down_proj",
}
OPT_NAMES = {
    "transformer.wte": "model.decoder.embed_tokens",
    "transformer.wpe": "model.decoder.embed_positions",
    "transformer.ln_f": "model.decoder.final_layer_norm",
    "transformer.project_in": "model.decoder.project_in",
    "transformer.project_out": "model.decoder.project_out",
    "transformer.h.{}.ln_1": "model.decoder.layers.{}.self_attn_layer_norm",
    "transformer.h.{}.ln_2": "model.decoder.layers.{}.final_layer_norm",
    "transformer.h.{}.attn.c_attn": (
        "model.decoder.layers.{}.self_attn.q_proj",
        "model.decoder.layers.{}.self_attn.k_proj",
        "model.decoder.layers.{}.self_attn.v_proj",
    ),
    "transformer.h.{}.attn.c_proj": "model.decoder.layers.{}.self_attn.out_proj",
    "transformer.h.{}.mlp.c_fc": "model.decoder.layers.{}.fc1",
    "transformer.h.{}.mlp.c_proj": "model.decoder.layers.{}.fc2",
}


class Family(NamedTuple):
    # The start of its classes' names in transformers: <name>ForCausalLM and <name>ForSequenceClassification
    # (but GPT-2's language model is GPT2LMHeadModel).
    name: str
    config: callable  # from config.json to the arguments of `GPTConfig`
    names: dict  # of modules, ours to theirs


FAMILIES = {
    "gpt2": Family("GPT2", gpt2_config, GPT2_NAMES),
    "llama": Family("Llama", llama_config, LLAMA_NAMES),
    "mistral": Family("Mistral", llama_config, LLAMA_NAMES),
    "qwen2": Family("Qwen2", llama_config, LLAMA_NAMES),
    "qwen3": Family("Qwen3", llama_config, LLAMA_NAMES),
    "opt": Family("OPT", opt_config, OPT_NAMES),
}
# GPT-2 stores these as (in, out).
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# Tensors of old folders that are no weights.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def family_of(config):
    return config.header.get("model_type", "gpt2")


def architecture_of(family, kind):
    """The name of the class of transformers that opens a model of kind GPT or ScalarModel."""
    name = FAMILIES[family].name
    if kind is not GPT:
        return f"{name}ForSequenceClassification"
    return "GPT2LMHeadModel" if family == "gpt2" else f"{name}ForCausalLM"


def fused_rows(theirs, config):
    """How many rows of our one matrix are each of theirs, in the order of their names."""
    queries = config.n_head * config.head_dim
    keys = config.n_kv_head * config.head_dim
    if len(theirs) == 3:
        return [queries, keys, keys]
    return [config.n_inner, config.n_inner]


def stored_as(name, config):
    """What a parameter of ours, or an adapter's, is stored as: [(name, rows)].

    Those tensors, one below the other, are ours. rows: how many of ours each of them has; None if it is a
    single one, which has all.
    """
    module, end = name.rsplit(".", 1)
    layer = re.search(r"\.h\.(\d+)\.", module)
    number = layer[1] if layer else None
    key = module.replace(f".h.{number}.", ".h.{}.", 1)
    # The heads are called the same by all.
    is_head = key.split(".")[0] in ("lm_head", "score", "gate")
    theirs = key if is_head else FAMILIES[family_of(config)].names[key]
    if isinstance(theirs, str):
        theirs, rows = [theirs], [None]
    else:
        rows = fused_rows(theirs, config)
    return [(f"{part.format(number)}.{end}", n) for part, n in zip(theirs, rows)]


def to_stored(weights, config):
    """Our weights {name: tensor} under the names, and in the shapes, of the family."""
    stored = {}
    for name, weight in weights.items():
        names = stored_as(name, config)
        parts = [weight]
        if len(names) > 1:
            parts = weight.split([rows for _, rows in names])
        for (theirs, _), part in zip(names, parts):
            stored[theirs] = part
    if family_of(config) == "gpt2":
        stored = as_gpt2(stored)
    return {name: weight.contiguous() for name, weight in stored.items()}


def as_gpt2(weights):
    """Weights {name: tensor} as GPT-2 has them: matrices (in, out), biases of zero where ours has none."""
    stored = {}
    for name, weight in weights.items():
        stored[name] = weight.T if name.endswith(TRANSPOSED) else weight
    for name, weight in list(stored.items()):
        bias = name.replace("weight", "bias")
        has_bias = name.endswith("weight") and ("c_" in name or "ln_" in name)
        if has_bias and bias not in stored:
            stored[bias] = torch.zeros(weight.shape[-1])
    return stored


def own_notes(header):
    """What config.json says that is ours alone."""
    notes = header.get("barerlhf")
    return notes if isinstance(notes, dict) else {}


def knows_single_turns(config):
    """Whether a model's folder says that it has never seen a conversation go on behind a reply."""
    return own_notes(config.header).get("single_turn") is True


def step_separator_of(header):
    """What ends the steps of the replies that a process reward model judges, a text; None of another model.

    header: what its config.json says.
    """
    separator = own_notes(header).get("step_separator")
    return separator if isinstance(separator, str) and separator else None


def aims_of(header):
    """The names of the aims that a gate weighs, a tuple; () of a model without a gate.

    header: what its config.json says.
    """
    names = own_notes(header).get("aims", [])
    require(isinstance(names, list) and all(isinstance(name, str) and name for name in names),
            "barerlhf's aims is not a list of names")
    return tuple(names)


def scalar_fields(header):
    """What config.json says of a scalar model's numbers, as arguments of `GPTConfig`.

    The three of a process reward model are the logits of bad, neutral and good.
    """
    if step_separator_of(header) is not None:
        return dict(labels=3)
    aims = aims_of(header)
    if not aims:
        return {}
    gate = own_notes(header).get("gate")
    require(type(gate) is int and gate > 0, "barerlhf's gate is not its width, a whole number above 0")
    return dict(labels=len(aims), gate=gate)
