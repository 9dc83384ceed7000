"""Tiny models of every family, with and without adapters, and inputs for them."""
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples import TOKENIZER, VOCAB
from formats.families import FAMILIES
from model import GPT, GPTConfig, ScalarModel, last_scores, prepare_training

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def header(model_type, **changes):
    """config.json of a tiny model."""
    gpt2 = {
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "bos_token_id": 256,
    }
    llama = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 256,
    }
    opt = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
        "bos_token_id": 256,
    }
    common = {"model_type": model_type, "eos_token_id": TOKENIZER.eos, "pad_token_id": TOKENIZER.pad}
    return common | {"gpt2": gpt2, "opt": opt}.get(model_type, llama) | changes


MODELS = {
    "gpt2": header("gpt2"),
    "gpt2-n_inner": header("gpt2", n_inner=40),
    "llama2": header("llama", num_key_value_heads=4),
    "llama3": header("llama", rope_theta=5e5, rope_scaling=LLAMA3),
    "linear": header("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}, head_dim=10),
    "smollm2": header("llama", tie_word_embeddings=True, rope_theta=1e5, num_attention_heads=3,
                      num_key_value_heads=1, hidden_size=24),
    "mistral": header("mistral", sliding_window=None, rope_theta=1e6),
    "mistral-window": header("mistral", sliding_window=50, head_dim=16),
    "qwen2": header("qwen2"),
    "qwen2.5-tied": header("qwen2", tie_word_embeddings=True, rope_theta=1e6),
    "qwen3": header("qwen3", head_dim=16),
    "opt": header("opt"),
    "opt-350m": header("opt", word_embed_proj_dim=16, do_layer_norm_before=False),
}


def tiny_of(kind=GPT, name="gpt2", seed=0, **changes):
    """A random model of ours, every weight and bias large enough to matter."""
    torch.manual_seed(seed)
    written = MODELS[name] | changes
    model = kind(GPTConfig(**FAMILIES[written["model_type"]].config(written), header=written)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


LENGTHS = torch.tensor([17, 5, 30, 1])
IDS = torch.randint(256, (4, 30), generator=torch.Generator().manual_seed(1))
IDS[torch.arange(30) >= LENGTHS[:, None]] = TOKENIZER.pad
ATTENTION = (torch.arange(30) < LENGTHS[:, None]).long()
ROWS = [IDS[b:b + 1, :n] for b, n in enumerate(LENGTHS.tolist())]


def outputs(model, ids=IDS):
    """Of one of ours: logits (N, V) of the batch's real positions, or scores (B,)."""
    with torch.no_grad():
        model.eval()
        if isinstance(model, ScalarModel):
            return last_scores(model, ids, LENGTHS)
        return model.logits(model.transformer(ids))[ATTENTION.bool()]


def peer_outputs(peer, kind, ids=IDS):
    """The same of a model of transformers."""
    with torch.no_grad():
        out = peer(ids, attention_mask=ATTENTION).logits
    return out.squeeze(-1) if kind is ScalarModel else out[ATTENTION.bool()]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def auto(peers, kind):
    return peers.AutoModelForCausalLM if kind is GPT else peers.AutoModelForSequenceClassification


def open_with(peer, folder, **options):
    """The peer's model, which found all weights that it wanted and wanted all that it found."""
    model, info = peer.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def made_by(peers, name, kind, folder, **options):
    """A random model of transformers, saved to a folder with our tokenizer in it."""
    torch.manual_seed(0)
    fields = copy.deepcopy(MODELS[name])  # transformers writes into what it is given
    config = peers.AutoConfig.for_model(fields.pop("model_type"), **fields,
                                        **({} if kind is GPT else {"num_labels": 1}))
    peer = auto(peers, kind).from_config(config).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p += 0.1 * torch.randn_like(p)
    peer.save_pretrained(folder, **options)
    TOKENIZER.save(folder)
    return peer


def edit_weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return damage


def shards(shard="model-00001-of-00001.safetensors", index=None, kept=True):
    """Turn the folder into one of shards. index: its JSON, instead of the right one."""
    def damage(folder):
        names = list(load_file(folder / "model.safetensors"))
        new_name = "model-00001-of-00001.safetensors" if kept else "elsewhere"
        (folder / "model.safetensors").rename(folder / new_name)
        written = {"weight_map": dict.fromkeys(names, shard)} if index is None else index
        (folder / "model.safetensors.index.json").write_text(json.dumps(written))
    return damage


KINDS = [(kind, name) for kind in (GPT, ScalarModel) for name in ("gpt2", "llama3", "opt")]
KINDS += [(GPT, "qwen3"), (ScalarModel, "opt-350m")]
kinds = pytest.mark.parametrize("kind, name", KINDS)


def adapter_flags(**changes):
    """What prepare_training and save_model read of a run's flags."""
    flags = {
        "lora_rank": 3,
        "lora_alpha": 6.0,
        "lora_dropout": 0.0,
        "lora_targets": "all",
        "lora_save": "merged",
        "checkpoint_activations": False,
        "compile": False,
        "seed": 0,
        "save_dtype": "float32",
        "model": "base",
    }
    return SimpleNamespace(**flags | changes)


def adapted(kind=GPT, name="gpt2", fresh=False, **changes):
    """A model with adapters; unless fresh, with random ones, whose B a new adapter has at zero."""
    model = tiny_of(kind, name)
    prepare_training(model, adapter_flags(**changes))
    if not fresh:
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith("lora_B"):
                    p += 0.1 * torch.randn_like(p)
    return model.eval()


def tiny(kind=GPT, seed=0, **changes):
    """A random model, every weight and bias large enough to matter."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "block_size": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 32}
    model = kind(GPTConfig(**shape | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


BATCH_LENGTHS = torch.tensor([9, 5, 12, 7])


def rows_alone(ids):
    """(row number, that row's ids (1, n) without padding)."""
    return [(b, ids[b:b + 1, :n]) for b, n in enumerate(BATCH_LENGTHS.tolist())]


LLAMA = {
    "norm": "rmsnorm",
    "position": "rotary",
    "mlp": "swiglu",
    "bias": False,
    "n_kv_head": 2,
    "n_inner": 48,
}
OPT = {"mlp": "relu", "position_offset": 2, "n_inner": 48}
NORM_AFTER = OPT | {"norm_after": True, "embed_dim": 16}
DIALECTS = [
    {},
    {"n_kv_head": 2},
    {"n_kv_head": 1, "bias": False},
    {"bias": False},
    LLAMA,
    OPT,
    NORM_AFTER,
    LLAMA | {
        "tied": False, "qk_norm": True, "head_dim": 10, "qkv_bias": True,
        "rope_scaling": ("llama3", 8.0, 1.0, 4.0, 16.0)
    },
]
