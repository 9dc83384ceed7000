"""The families of models: what their config.json says in our terms, and what they call our parameters."""
import re
from typing import NamedTuple

import torch

from model import GPT
from plumbing.flags import require

# ---------------------------------------------------------------------------------------------------------
# The families: what their config.json says in our terms, and what they call our parameters ({} is the layer)


def gpt2_config(h):
    """GPT-2 (Radford et al. 2019)."""
    refuse(h, activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_by_inverse_layer_idx=(False,), scale_attn_weights=(True,),
           add_cross_attention=(False,))
    # A GPT-2 without biases is stored with biases of zero.
    own = {"bias": bool(own_notes(h).get("bias", True))}
    return dict(vocab_size=h["vocab_size"], block_size=h["n_positions"], n_layer=h["n_layer"], n_head=h["n_head"], n_kv_head=h["n_head"],
                n_embd=h["n_embd"], n_inner=h.get("n_inner") or 0, norm_eps=h.get("layer_norm_epsilon", 1e-5),
                tied=h.get("tie_word_embeddings", True), **own)


def llama_config(h):
    """Llama 2 and 3, SmolLM2 (llama), Mistral, Qwen2 and 2.5 (biases on q, k, v), Qwen3 (norms on q and k)."""
    kind = h["model_type"]
    refuse(h, hidden_act=("silu",), attention_bias=(False,) if kind != "qwen2" else (False, True), mlp_bias=(False,), partial_rotary_factor=(1.0,))
    rope = h.get("rope_parameters") or h.get("rope_scaling") or {}  # transformers 5, and before
    refuse(rope, partial_rotary_factor=(1.0,))
    rope_kind = rope.get("rope_type", rope.get("type", "default"))
    fields = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    require(rope_kind in fields, f"rotary positions of kind '{rope_kind}' are not supported, only {', '.join(fields)}")
    context = h["max_position_embeddings"]
    if h.get("sliding_window") and (kind == "mistral" or h.get("use_sliding_window")):
        context = min(context, h["sliding_window"])  # within the window its attention is the plain one
    return dict(vocab_size=h["vocab_size"], block_size=context, n_layer=h["num_hidden_layers"], n_head=h["num_attention_heads"],
                n_kv_head=h.get("num_key_value_heads") or h["num_attention_heads"], n_embd=h["hidden_size"], head_dim=h.get("head_dim") or 0,
                n_inner=h["intermediate_size"], norm="rmsnorm", norm_eps=h["rms_norm_eps"], qk_norm=kind == "qwen3", position="rotary",
                rope_theta=float(rope.get("rope_theta", h.get("rope_theta", 10000.0))),
                rope_scaling=(rope_kind, *(float(rope[name]) for name in fields[rope_kind])) if fields[rope_kind] else (),
                mlp="swiglu", bias=False, qkv_bias=kind == "qwen2", tied=h.get("tie_word_embeddings", False))


def opt_config(h):
    """OPT (Zhang et al. 2022); the 350M one has its norms behind the blocks and a narrower embedding."""
    refuse(h, activation_function=("relu",), enable_bias=(True,), layer_norm_elementwise_affine=(True,), _remove_final_layer_norm=(False,))
    return dict(vocab_size=h["vocab_size"], block_size=h["max_position_embeddings"], n_layer=h["num_hidden_layers"],
                n_head=h["num_attention_heads"], n_kv_head=h["num_attention_heads"], n_embd=h["hidden_size"], n_inner=h["ffn_dim"],
                embed_dim=h.get("word_embed_proj_dim") or 0, norm_after=not h.get("do_layer_norm_before", True), position_offset=2,
                mlp="relu", tied=h.get("tie_word_embeddings", True))


def refuse(header, **allowed):
    """UserError if a field of config.json has a value that this project doesn't compute."""
    for field, values in allowed.items():
        require(header.get(field, values[0]) in values, f"{field} {header.get(field)} is not supported, only {' or '.join(map(str, values))}")


GPT2_NAMES = {ours: ours for ours in ("transformer.wte", "transformer.wpe", "transformer.ln_f", *(
    f"transformer.h.{{}}.{part}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")))}
LLAMA_NAMES = {
    "transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm",
    "transformer.h.{}.ln_1": "model.layers.{}.input_layernorm", "transformer.h.{}.ln_2": "model.layers.{}.post_attention_layernorm",
    "transformer.h.{}.attn.c_attn": tuple(f"model.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "transformer.h.{}.attn.c_proj": "model.layers.{}.self_attn.o_proj",
    "transformer.h.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm", "transformer.h.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "transformer.h.{}.mlp.c_fc": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "transformer.h.{}.mlp.c_proj": "model.layers.{}.mlp.down_proj"}
OPT_NAMES = {
    "transformer.wte": "model.decoder.embed_tokens", "transformer.wpe": "model.decoder.embed_positions",
    "transformer.ln_f": "model.decoder.final_layer_norm",
    "transformer.project_in": "model.decoder.project_in", "transformer.project_out": "model.decoder.project_out",
    "transformer.h.{}.ln_1": "model.decoder.layers.{}.self_attn_layer_norm", "transformer.h.{}.ln_2": "model.decoder.layers.{}.final_layer_norm",
    "transformer.h.{}.attn.c_attn": tuple(f"model.decoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    "transformer.h.{}.attn.c_proj": "model.decoder.layers.{}.self_attn.out_proj",
    "transformer.h.{}.mlp.c_fc": "model.decoder.layers.{}.fc1", "transformer.h.{}.mlp.c_proj": "model.decoder.layers.{}.fc2"}


class Family(NamedTuple):
    name: str  # of its classes in transformers: <name>ForCausalLM (GPT-2: GPT2LMHeadModel), <name>ForSequenceClassification
    config: callable
    names: dict


FAMILIES = {"gpt2": Family("GPT2", gpt2_config, GPT2_NAMES), "llama": Family("Llama", llama_config, LLAMA_NAMES),
            "mistral": Family("Mistral", llama_config, LLAMA_NAMES), "qwen2": Family("Qwen2", llama_config, LLAMA_NAMES),
            "qwen3": Family("Qwen3", llama_config, LLAMA_NAMES), "opt": Family("OPT", opt_config, OPT_NAMES)}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores these as (in, out)
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # tensors of old folders that are no weights


def family_of(config):
    return config.header.get("model_type", "gpt2")


def architecture_of(family, kind):
    """The class of transformers that opens a model of kind GPT or ScalarModel."""
    return "GPT2LMHeadModel" if (family, kind) == ("gpt2", GPT) else FAMILIES[family].name + ("ForCausalLM" if kind is GPT else "ForSequenceClassification")


def stored_as(name, config):
    """What a parameter of ours, or an adapter's, is stored as: [(name, rows)], whose tensors stacked by rows are ours."""
    module, end = name.rsplit(".", 1)
    layer = re.search(r"\.h\.(\d+)\.", module)
    key = module.replace(f".h.{layer[1]}.", ".h.{}.", 1) if layer else module
    theirs = {"lm_head": "lm_head", "score": "score", **FAMILIES[family_of(config)].names}[key]
    if isinstance(theirs, str):
        rows = [None]  # all of them
    else:
        rows = [config.n_head * config.head_dim, *[config.n_kv_head * config.head_dim] * 2] if len(theirs) == 3 else [config.n_inner] * 2
    theirs = [theirs] if isinstance(theirs, str) else theirs
    return [(f"{t.format(layer[1]) if layer else t}.{end}", n) for t, n in zip(theirs, rows)]


def to_stored(weights, config):
    """Our weights {name: tensor} under the names, and in the shapes, of the family."""
    stored = {}
    for name, p in weights.items():
        names = stored_as(name, config)
        parts = [p] if len(names) == 1 else p.split([n for _, n in names])
        stored |= {theirs: part for (theirs, _), part in zip(names, parts)}
    if family_of(config) == "gpt2":
        stored = {name: p.T if name.endswith(TRANSPOSED) else p for name, p in stored.items()}
        for name, p in list(stored.items()):
            bias = name.replace("weight", "bias")
            if name.endswith("weight") and ("c_" in name or "ln_" in name) and bias not in stored:
                stored[bias] = torch.zeros(p.shape[-1])  # GPT-2 always has biases
    return {name: p.contiguous() for name, p in stored.items()}


def own_notes(header):
    """What config.json says that is ours alone."""
    notes = header.get("barerlhf")
    return notes if isinstance(notes, dict) else {}


def knows_single_turns(config):
    """Whether a model's folder says that it has never seen a conversation go on behind a reply."""
    return own_notes(config.header).get("single_turn") is True
