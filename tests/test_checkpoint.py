"""checkpoint.py: every family against `transformers`, folders in and out, and whatever must be refused."""
import copy
import itertools
import json
import math
import pickle
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from formats import model_folder
from formats.families import FAMILIES
from formats.model_folder import load_model, save_model
from plumbing.flags import UserError
from model import GPT, GPTConfig, ScalarModel, last_scores, shifted
from generate import generate
from formats.tokenizer import Tokenizer
from formats.foreign_tokenizer import open_tokenizer

VOCAB = 261
TOKENIZER = Tokenizer("bytes", r"\s+|\S+", {bytes([b]): b for b in range(256)})
TORCH = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def header(model_type, **changes):
    """config.json of a tiny model."""
    gpt2 = {"vocab_size": VOCAB, "n_positions": 64, "n_layer": 2, "n_head": 4, "n_embd": 32, "bos_token_id": 256}
    llama = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
             "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "bos_token_id": 256}
    opt = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32,
           "max_position_embeddings": 64, "bos_token_id": 256}
    return {"model_type": model_type, "eos_token_id": TOKENIZER.eos, "pad_token_id": TOKENIZER.pad, **{"gpt2": gpt2, "opt": opt}.get(model_type, llama), **changes}


MODELS = {
    "gpt2": header("gpt2"),
    "gpt2-n_inner": header("gpt2", n_inner=40),
    "llama2": header("llama", num_key_value_heads=4),
    "llama3": header("llama", rope_theta=5e5, rope_scaling=LLAMA3),
    "linear": header("llama", rope_scaling={"rope_type": "linear", "factor": 4.0}, head_dim=10),
    "smollm2": header("llama", tie_word_embeddings=True, rope_theta=1e5, num_attention_heads=3, num_key_value_heads=1, hidden_size=24),
    "mistral": header("mistral", sliding_window=None, rope_theta=1e6),
    "mistral-window": header("mistral", sliding_window=50, head_dim=16),
    "qwen2": header("qwen2"),
    "qwen2.5-tied": header("qwen2", tie_word_embeddings=True, rope_theta=1e6),
    "qwen3": header("qwen3", head_dim=16),
    "opt": header("opt"),
    "opt-350m": header("opt", word_embed_proj_dim=16, do_layer_norm_before=False),
}


def tiny(kind=GPT, name="gpt2", seed=0, **changes):
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
        return last_scores(model, ids, LENGTHS) if isinstance(model, ScalarModel) else model.logits(model.transformer(ids))[ATTENTION.bool()]


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
    """The peer's model, having checked that it found all weights that it wanted and wanted all that it found."""
    model, info = peer.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def made_by(peers, name, kind, folder, **options):
    """A random model of transformers, saved to a folder with our tokenizer in it."""
    torch.manual_seed(0)
    fields = copy.deepcopy(MODELS[name])  # transformers writes into what it is given
    config = peers.AutoConfig.for_model(fields.pop("model_type"), **fields, **({} if kind is GPT else {"num_labels": 1}))
    peer = auto(peers, kind).from_config(config).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p += 0.1 * torch.randn_like(p)
    peer.save_pretrained(folder, **options)
    TOKENIZER.save(folder)
    return peer


def greedy(peer, row, number):
    ids = peer.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=number, do_sample=False, num_beams=1)
    return ids[0].tolist()


# ---------------------------------------------------------------------------------------------------------
# The families

@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write(name, peers, tmp_path):
    peer = made_by(peers, name, GPT, tmp_path / "theirs")
    model, _ = load_model(tmp_path / "theirs", GPT)
    assert {p.dtype for p in model.state_dict().values()} == {torch.float32}
    expected = peer_outputs(peer, GPT)
    assert expected.std() > 0.1
    close(outputs(model), expected)
    with torch.no_grad():
        for row in [*ROWS, torch.randint(256, (1, model.config.block_size))]:
            close(model.logits(model.transformer(row)), peer(row).logits)
    prompts = [row for row in ROWS if row.shape[1] + 32 <= model.config.block_size]
    texts = generate(model, [row[0].tolist() for row in prompts], 32, TOKENIZER, temperature=0)
    texts = [ids[:n].tolist() for ids, n in zip(texts.ids, texts.lengths)]
    save_model(tmp_path / "ours", model, TOKENIZER)
    again = open_with(auto(peers, GPT), tmp_path / "ours")
    close(peer_outputs(again, GPT), expected)
    assert (again.config.eos_token_id, again.config.pad_token_id) == (TOKENIZER.eos, TOKENIZER.pad)
    for row, text in zip(prompts, texts):
        assert greedy(peer, row, len(text) - row.shape[1]) == text == greedy(again, row, 32)


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_transformers_and_so_do_those_of_the_folder_we_write(name, peers, tmp_path):
    peer = made_by(peers, name, ScalarModel, tmp_path / "theirs")
    model, _ = load_model(tmp_path / "theirs", ScalarModel)
    expected = peer_outputs(peer, ScalarModel)
    close(outputs(model), expected)
    assert model.can_shift == (name in ("gpt2", "gpt2-n_inner", "opt"))
    save_model(tmp_path / "ours", model, TOKENIZER, change=lambda weights: shifted(weights, 0.7) if model.can_shift else weights)
    close(peer_outputs(open_with(auto(peers, ScalarModel), tmp_path / "ours"), ScalarModel), expected - 0.7 * model.can_shift)
    close(outputs(model), expected)  # what is written is changed, not the model


def test_a_sequence_beyond_the_sliding_window_is_refused():
    model = tiny(name="mistral-window")
    assert model.config.block_size == 50
    with pytest.raises(UserError, match="51 tokens .* context of 50"):
        model.transformer(torch.zeros(1, 51, dtype=torch.long))
    assert tiny(name="qwen2", sliding_window=20, use_sliding_window=False).config.block_size == 64
    assert tiny(name="qwen2", sliding_window=20, use_sliding_window=True).config.block_size == 20


@pytest.mark.parametrize("name", ["llama2", "llama3", "linear", "qwen2.5-tied"])
def test_config_json_may_be_of_transformers_5_or_before(name, tmp_path):
    written = MODELS[name]
    theta, scaling = written.get("rope_theta", 10000.0), written.get("rope_scaling", {"rope_type": "default"})
    plain = {key: value for key, value in written.items() if not key.startswith("rope_")}
    before = {"rope_theta": theta, "torch_dtype": "float32"} | ({"rope_scaling": None} if "rope_scaling" not in written else {
        "rope_scaling": {"type" if key == "rope_type" and name == "linear" else key: value for key, value in scaling.items()}})
    after = {"rope_parameters": scaling | {"rope_theta": theta}, "dtype": "float32"}
    results = []
    for style in (before, after):
        save_model(tmp_path / "model", tiny(name=name), TOKENIZER)
        path = tmp_path / "model" / "config.json"
        path.write_text(json.dumps(plain | style | {"architectures": json.loads(path.read_text())["architectures"]}))
        results.append(outputs(load_model(tmp_path / "model", GPT)[0]))
        save_model(tmp_path / "again", load_model(tmp_path / "model", GPT)[0], TOKENIZER)
        assert torch.equal(outputs(load_model(tmp_path / "again", GPT)[0]), results[-1])
        assert "dtype" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(*results)


def test_what_config_json_leaves_out_is_as_transformers_has_it():
    gpt2, llama, opt = (tiny(name=name).config for name in ("gpt2", "qwen2", "opt"))
    assert (gpt2.tied, gpt2.n_inner, gpt2.norm_eps) == (True, 128, 1e-5)
    assert (llama.tied, llama.rope_theta, llama.rope_scaling, llama.head_dim) == (False, 10000.0, (), 8)
    assert (opt.tied, opt.norm_after, opt.embed_dim) == (True, False, 32)
    del (written := header("llama"))["num_key_value_heads"]
    assert FAMILIES["llama"].config(written)["n_kv_head"] == 4


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_old_folders_leave_out_the_trunks_name_and_hold_buffers(name, tmp_path):
    model = tiny(name=name)
    save_model(tmp_path, model, TOKENIZER)
    edit_weights(lambda tensors: [tensors.update({key.split(".", 1)[1]: tensors.pop(key)}) for key in list(tensors)])(tmp_path)
    edit_weights(lambda tensors: tensors.update({"h.0.attn.bias": torch.ones(1, 1, 64, 64), "lm_head.weight": tensors.get("wte.weight", torch.ones(1)).clone()}))(tmp_path)
    assert torch.equal(outputs(load_model(tmp_path, GPT)[0]), outputs(model))


def test_shards_are_read_as_one(peers, tmp_path):
    peer = made_by(peers, "llama3", GPT, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    close(outputs(load_model(tmp_path, GPT)[0]), peer_outputs(peer, GPT))


def test_bf16_weights_are_read_as_float32_and_written_as_bf16_when_asked(peers, tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "float32", tiny(name="qwen3"), TOKENIZER)
    edit_weights(lambda tensors: tensors.update({key: p.bfloat16() for key, p in tensors.items()}))(tmp_path / "float32")
    model, _ = load_model(tmp_path / "float32", GPT)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_model(tmp_path / "bfloat16", model, TOKENIZER, SimpleNamespace(save_dtype="bfloat16", lora_save="merged"))
    with safe_open(tmp_path / "bfloat16" / "model.safetensors", "pt") as f:
        assert {f.get_slice(key).get_dtype() for key in f.keys()} == {"BF16"}
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    peer = open_with(auto(peers, GPT), tmp_path / "bfloat16", torch_dtype="auto")
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}
    close(peer_outputs(peer.float(), GPT), outputs(model))


# ---------------------------------------------------------------------------------------------------------
# Folders of ours

def scratch(kind=GPT, **changes):
    """A random model as --model scratch makes it: without a config.json behind it."""
    torch.manual_seed(0)
    model = kind(GPTConfig(**{"vocab_size": VOCAB, "block_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 32} | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("kind", [GPT, ScalarModel])
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_models_folder_gives_the_same_bits_back_and_opens_in_transformers(tmp_path, peers, kind, bias):
    model, folder = scratch(kind, bias=bias, n_inner=40), tmp_path / "a" / "b"
    if kind is ScalarModel:
        model.load_state_dict(shifted(model.state_dict(), 0.7))
    save_model(folder, model, TOKENIZER)
    again, tokenizer = load_model(folder, kind, dropout=0.1)
    assert again.config == GPTConfig(**vars(model.config) | {"dropout": 0.1, "header": again.config.header})
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert tokenizer.same_as(TOKENIZER)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    close(peer_outputs(open_with(auto(peers, kind), folder), kind), outputs(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_every_familys_folder_gives_the_same_bits_back(name, kind, tmp_path):
    model = tiny(kind, name)
    save_model(tmp_path, model, TOKENIZER)
    again, _ = load_model(tmp_path, kind)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text()).items() >= MODELS[name].items()


@pytest.mark.case(12)
@pytest.mark.parametrize("changes", [{"n_kv_head": 2}, {"norm": "rmsnorm"}, {"mlp": "swiglu"}, {"head_dim": 10}, {"norm_eps": 1e-3}, {"tied": False}, {"block_size": 65}])
def test_a_model_that_its_config_json_would_not_describe_is_not_written(tmp_path, changes):
    model = scratch(**changes) if changes.keys() - {"norm_eps", "block_size"} else tiny()
    if changes.keys() & {"norm_eps", "block_size"}:  # of a folder, and changed since
        model.config = GPTConfig(**vars(model.config) | changes)
    with pytest.raises(UserError, match="can't hold this model"):
        save_model(tmp_path / "model", model, TOKENIZER)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = tiny()
    model.transformer.h[1].mlp.c_fc.weight.data[3, 3] = math.nan
    with pytest.raises(UserError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight is not finite"):
        save_model(tmp_path / "model", model, TOKENIZER)
    assert not (tmp_path / "model").exists()


def test_weights_are_safetensors(tmp_path):
    save_model(tmp_path, tiny(), TOKENIZER)
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    tensors = json.loads(raw[8:8 + size])
    assert tensors.pop("__metadata__") == {"format": "pt"}
    assert max(tensor["data_offsets"][1] for tensor in tensors.values()) == len(raw) - 8 - size


@pytest.mark.case(12)
@pytest.mark.parametrize("saved, asked, message", [
    (GPT, ScalarModel, "holds a language model, but a reward model is needed"),
    (ScalarModel, GPT, "holds a reward model, but a language model is needed"),
])
def test_a_folder_of_the_other_kind_is_refused(tmp_path, saved, asked, message):
    save_model(tmp_path, tiny(saved, "llama3"), TOKENIZER)
    with pytest.raises(UserError, match=f"{tmp_path} {message}"):
        load_model(tmp_path, asked)


# ---------------------------------------------------------------------------------------------------------
# What is refused: one line that names the file and the reason

def edit_config(remove=(), **changes):
    def damage(folder):
        written = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({key: value for key, value in written.items() if key not in remove}))
    return damage


def edit_weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return damage


def rewrite(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def too_large(folder):
    with open(folder / "config.json", "ab") as f:
        f.truncate(1 << 27)  # sparse: takes no space


def rope(kind, **fields):
    return edit_config(rope_scaling={"rope_type": kind, "factor": 4.0, **fields})


def shards(shard="model-00001-of-00001.safetensors", index=None, kept=True):
    """Turn the folder into one of shards. index: its JSON, instead of the right one."""
    def damage(folder):
        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors" if kept else folder / "elsewhere")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)} if index is None else index))
    return damage


REFUSED = [
    # what is missing or damaged
    ("gpt2", lambda folder: folder.rename(folder.with_name("elsewhere")), r"no such checkpoint folder"),
    ("gpt2", lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    ("gpt2", lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    ("gpt2", lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing|needs the package tokenizers"),
    ("gpt2", rewrite("config.json", lambda raw: raw[:-20]), r"config\.json is damaged"),
    ("gpt2", rewrite("config.json", lambda raw: b"\xff" + raw), r"config\.json is damaged"),
    ("gpt2", rewrite("config.json", lambda raw: b"[]"), r"config\.json is damaged \(it holds no object\)"),
    ("gpt2", rewrite("config.json", lambda raw: b"[" * 10**6), r"config\.json is damaged"),
    ("gpt2", rewrite("config.json", lambda raw: b'{"a": ' * 10**5 + b"1" + b"}" * 10**5), r"config\.json is damaged"),
    ("gpt2", rewrite("config.json", lambda raw: raw.replace(b'"n_layer": 2', b'"n_layer": ' + b"9" * 5000)), r"config\.json"),
    ("gpt2", too_large, r"config\.json is too large"),
    ("gpt2", rewrite("config.json", lambda raw: b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'), r"config\.json is damaged or incomplete .*vocab_size"),
    ("llama3", edit_config(remove=["rms_norm_eps"]), r"config\.json is damaged or incomplete .*rms_norm_eps"),
    ("llama3", rope("llama3"), r"config\.json is damaged or incomplete .*low_freq_factor"),
    ("gpt2", rewrite("tokenizer.json", lambda raw: raw[:-20]), r"tokenizer\.json is damaged"),
    ("gpt2", rewrite("model.safetensors", lambda raw: raw[:-20]), r"model\.safetensors is damaged"),
    ("gpt2", rewrite("model.safetensors", lambda raw: raw[:20]), r"model\.safetensors is damaged"),
    ("gpt2", rewrite("model.safetensors", lambda raw: b""), r"model\.safetensors is damaged"),
    ("gpt2", rewrite("model.safetensors", lambda raw: b"\x80\x04" + raw), r"model\.safetensors is refused: it is a pickle"),
    ("gpt2", rewrite("model.safetensors", lambda raw: pickle.dumps({"a": 1})), r"model\.safetensors is refused: it is a pickle"),
    # weights that don't agree with config.json
    ("gpt2", edit_weights(lambda tensors: tensors.pop("transformer.h.1.attn.c_attn.bias")), r"model\.safetensors lacks transformer\.h\.1\.attn\.c_attn\.bias"),
    ("qwen2", edit_weights(lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias")), r"model\.safetensors lacks model\.layers\.1\.self_attn\.k_proj\.bias"),
    ("qwen2", edit_weights(lambda tensors: tensors.pop("lm_head.weight")), r"model\.safetensors lacks lm_head\.weight"),
    ("gpt2", edit_weights(lambda tensors: tensors.update({"transformer.ln_f.weight": torch.ones(31)})),
     r"model\.safetensors: transformer\.ln_f\.weight .*\(31,\).*\(32,\)"),
    ("gpt2", edit_config(n_positions=65), r"model\.safetensors: transformer\.wpe\.weight .*\(64, 32\).*\(65, 32\)"),
    ("gpt2", edit_config(vocab_size=260), r"model\.safetensors: transformer\.wte\.weight .*\(261, 32\).*\(260, 32\)"),
    ("llama3", edit_config(num_key_value_heads=4), r"model\.safetensors: transformer\.h\.0\.attn\.c_attn\.weight .*\(64, 32\).*\(96, 32\)"),
    ("llama3", edit_config(head_dim=16), r"model\.safetensors: transformer\.h\.0\.attn\.c_attn\.weight "),
    ("llama3", edit_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(())})), r"model\.safetensors: transformer\.ln_f\.weight .*\(\)"),
    ("llama3", edit_config(num_hidden_layers=1), r"no place for: model\.layers\.1\."),
    ("llama3", edit_weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})), r"no place for: .*q_proj\.bias"),
    ("opt", edit_weights(lambda tensors: tensors.update({"score.weight": torch.ones(1, 32)})), r"no place for: score\.weight"),
    ("gpt2", edit_weights(lambda tensors: tensors.update({"transformer.ln_f.weight": torch.ones(32, dtype=torch.int8)})), r"model\.safetensors: .*ln_f\.weight is int8"),
    # shards
    ("llama3", shards(kept=False), r"lacks model-00001-of-00001\.safetensors"),
    ("llama3", shards("../x.safetensors"), r"model\.safetensors\.index\.json is damaged"),
    ("llama3", shards("/etc/passwd"), r"model\.safetensors\.index\.json is damaged"),
    ("llama3", shards(".."), r"lacks \.\."),
    ("llama3", shards(index={}), r"model\.safetensors\.index\.json is damaged"),
    ("llama3", shards(index={"weight_map": {"a": 1}}), r"model\.safetensors\.index\.json is damaged"),
    ("llama3", shards(index=[]), r"model\.safetensors\.index\.json is damaged"),
    # kinds of models that this project doesn't compute
    ("gpt2", edit_config(model_type="mamba"), r"config\.json: models of type 'mamba' are not supported, only gpt2, llama"),
    ("gpt2", edit_config(model_type=["gpt2"]), r"config\.json: models of type"),
    ("gpt2", edit_config(remove=["model_type"]), r"config\.json: models of type 'None'"),
    ("gpt2", edit_config(architectures=["GPT2DoubleHeadsModel"]), r"config\.json: the architecture 'GPT2DoubleHeadsModel' is not supported, only GPT2LMHeadModel and GPT2For"),
    ("llama3", edit_config(architectures=["LlamaForTokenClassification"]), r"config\.json: the architecture 'LlamaForTokenClassification'"),
    ("llama3", edit_config(architectures=["MistralForCausalLM"]), r"config\.json: the architecture 'MistralForCausalLM'"),
    ("llama3", edit_config(architectures=None), r"config\.json: the architecture 'None'"),
    ("llama3", edit_config(architectures=[{}]), r"config\.json"),
    *[("llama3", rope(kind), rf"config\.json: rotary positions of kind '{kind}' are not supported, only default, linear, llama3") for kind in ("yarn", "dynamic", "longrope")],
    ("llama3", edit_config(rope_parameters={"rope_type": "yarn", "factor": 4.0}), r"config\.json: rotary positions of kind 'yarn'"),
    ("llama3", edit_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), r"config\.json: partial_rotary_factor 0\.5 is not supported"),
    ("llama3", edit_config(partial_rotary_factor=0.5), r"config\.json: partial_rotary_factor 0\.5"),
    ("llama3", edit_config(hidden_act="gelu"), r"config\.json: hidden_act gelu is not supported, only silu"),
    ("llama3", edit_config(mlp_bias=True), r"config\.json: mlp_bias True is not supported"),
    ("llama3", edit_config(attention_bias=True), r"config\.json: attention_bias True is not supported"),
    ("qwen3", edit_config(attention_bias=True), r"config\.json: attention_bias True is not supported"),
    ("llama3", edit_config(quantization_config={"bits": 4}), r"config\.json: quantised checkpoints are not supported"),
    ("gpt2", edit_config(activation_function="gelu"), r"config\.json: activation_function gelu is not supported, only gelu_new"),
    ("gpt2", edit_config(scale_attn_by_inverse_layer_idx=True), r"config\.json: scale_attn_by_inverse_layer_idx True"),
    ("gpt2", edit_config(scale_attn_weights=False), r"config\.json: scale_attn_weights False"),
    ("gpt2", edit_config(add_cross_attention=True), r"config\.json: add_cross_attention True"),
    *[("opt", edit_config(**{name: value}), rf"config\.json: {name} {value} is not supported") for name, value in (
        ("activation_function", "gelu"), ("enable_bias", False), ("layer_norm_elementwise_affine", False), ("_remove_final_layer_norm", True))],
    # numbers
    ("gpt2", edit_config(n_head=3), r"config\.json: .*width 32 is not divisible by 3 heads"),
    ("llama3", edit_config(num_key_value_heads=3), r"config\.json: .*4 heads are not divisible by 3 key/value heads"),
    ("llama3", edit_config(head_dim=9), r"config\.json: .*even head width, not 9"),
    ("gpt2", edit_config(n_layer=10**9), r"config\.json: .*out of range .*n_layer=1000000000"),
    ("llama3", edit_config(num_hidden_layers=10**6), r"config\.json: .*1000000 layers are too many"),
    ("llama3", edit_config(hidden_size=-32), r"config\.json: .*out of range .*n_embd=-32"),
    ("opt", edit_config(max_position_embeddings=0), r"config\.json: .*out of range .*block_size=0"),
    ("gpt2", edit_config(vocab_size="many"), r"config\.json: .*out of range .*vocab_size='many'"),
    ("gpt2", edit_config(n_positions=32.0), r"config\.json: .*out of range .*block_size=32\.0"),
    ("gpt2", edit_config(vocab_size=True), r"config\.json: .*out of range .*vocab_size=True"),
    ("gpt2", edit_config(layer_norm_epsilon=math.nan), r"config\.json: .*out of range .*norm_eps=nan"),
    ("llama3", edit_config(rms_norm_eps="small"), r"config\.json: .*out of range .*norm_eps='small'"),
    ("llama3", edit_config(rope_theta=math.inf), r"config\.json: .*out of range .*rope_theta=inf"),
    ("llama3", edit_config(rope_theta=-1), r"config\.json: .*out of range .*rope_theta=-1"),
    ("llama3", rope("linear", factor=0), r"config\.json: .*out of range .*'linear', 0\.0"),
    ("llama3", edit_config(rope_scaling=[1]), r"config\.json is damaged"),
    ("llama3", edit_config(tie_word_embeddings="no"), r"config\.json: .*neither true nor false .*tied='no'"),
    ("mistral", edit_config(sliding_window="wide"), r"config\.json is damaged"),
    ("gpt2", edit_config(n_embd=1 << 20, vocab_size=1 << 20), r"model\.safetensors: transformer\.wte\.weight .*\(1048576, 1048576\)"),  # 4 TiB, if made
    ("llama3", edit_config(hidden_size=1 << 20, vocab_size=1 << 20), r"model\.safetensors: transformer\.wte\.weight .*\(1048576, 1048576\)"),
]


@pytest.mark.case(11, 12)
@pytest.mark.parametrize("name, damage, message", REFUSED)
def test_a_foreign_or_damaged_folder_is_refused_in_one_line(tmp_path, name, damage, message):
    folder = tmp_path / "model"
    save_model(folder, tiny(name=name), TOKENIZER)
    load_model(folder, GPT)
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        load_model(folder, GPT)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def hostile(header=None, size=None, data=bytes(8), raw=b""):
    """Bytes of a safetensors file: a header (JSON or raw bytes), what its size is said to be, the tensors' bytes."""
    raw = raw or json.dumps(header).encode()
    return (len(raw) if size is None else size).to_bytes(8, "little") + raw + data


def tensor(*shape, offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "a header of 2^40 bytes": hostile({}, size=1 << 40),
    "a header of 2^63 bytes": hostile({}, size=1 << 63),
    "a header longer than the file": hostile({}, size=100),
    "tensors that overlap": hostile({"a": tensor(2), "b": tensor(2, offsets=(4, 12))}, data=bytes(12)),
    "tensors with a gap": hostile({"a": tensor(2), "b": tensor(2, offsets=(12, 20))}, data=bytes(20)),
    "offsets beyond the end": hostile({"a": tensor(2)}, data=bytes(4)),
    "a tensor of 2^40 bytes": hostile({"a": tensor(1 << 38, offsets=(0, 1 << 40))}),
    "bytes behind the last tensor": hostile({"a": tensor(2)}, data=bytes(400)),
    "offsets backwards": hostile({"a": tensor(2, offsets=(8, 0))}),
    "negative offsets": hostile({"a": tensor(2, offsets=(-8, 0))}),
    "a negative shape": hostile({"a": tensor(-2)}),
    "a shape whose product overflows": hostile({"a": tensor(1 << 33, 1 << 33)}),
    "a shape that the bytes don't fill": hostile({"a": tensor(3)}),
    "a name that comes twice": hostile(raw=f'{{"a": {json.dumps(tensor(1, offsets=(0, 4)))}, "a": {json.dumps(tensor(1, offsets=(4, 8)))}}}'.encode()),
    "a field that comes twice": hostile(raw=b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 8]}}'),
    "NaN for a size": hostile({"a": tensor(math.nan)}),
    "a number with 5000 digits": hostile(raw=json.dumps({"a": tensor("@")}).replace('"@"', "9" * 5000).encode()),
    "an unknown dtype": hostile({"a": tensor(2, dtype="F128")}),
    "a nested header": hostile(raw=b'{"a": ' + b"[" * 10**6),
    "a header of 101 MiB": hostile({}, size=101 << 20),
    "a header that is no UTF-8": hostile(raw=b'{"\xff": 1}'),
    "metadata that are no strings": hostile({"__metadata__": {"a": 1}}, data=b""),
}


@pytest.mark.case(11)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_are_refused_in_one_line(name, tmp_path):
    save_model(tmp_path, tiny(), TOKENIZER)
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged") as refused:
        load_model(tmp_path, GPT)
    assert "\n" not in str(refused.value)


def refused_or_opened(folder, kind=GPT):
    """Whether a folder is refused, in one line; whatever else it may meet is an error."""
    try:
        load_model(folder, kind)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        return True
    return False


NUMBERS = ("NaN", "Infinity", "-Infinity", "-1", "0", "0.5", "1e999", "1" + "0" * 30, "9" * 5000, '"x"', "null", "[]", "{}", "true", "[1]")


@pytest.mark.case(11)
@pytest.mark.parametrize("name", ["gpt2", "llama3", "opt-350m", "qwen3"])
def test_any_field_of_config_json_may_hold_anything(name, tmp_path, record_property):
    save_model(tmp_path, tiny(name=name), TOKENIZER)
    path, fields, refused = tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text()), []
    scaling = fields.get("rope_scaling", {})
    tries = list(itertools.product([*fields, *scaling], NUMBERS))
    for key, value in tries:
        changed = fields | ({"rope_scaling": scaling | {key: "@"}} if key in scaling else {key: "@"})
        path.write_text(json.dumps(changed).replace('"@"', value))
        refused += [key] if refused_or_opened(tmp_path) else []
    record_property("tries", len(tries)), record_property("survived", len(tries))
    sizes = {"vocab_size", "n_positions", "n_layer", "num_hidden_layers", "hidden_size", "max_position_embeddings"} & fields.keys()
    assert len(sizes) >= 3 and all(refused.count(size) == len(NUMBERS) for size in sizes)


@pytest.mark.case(11)
def test_a_folder_with_random_damage_is_refused_in_one_line_or_opened(tmp_path, record_property):
    written = ("NaN", "-1", "1e999", "9" * 20, "null", '"', "{", "[", "}", ",", "\0")
    refused, tries = 0, 300
    for name in ("gpt2", "llama3", "opt"):
        save_model(tmp_path / name, tiny(name=name), TOKENIZER)
    for seed in range(tries):
        rng = random.Random(seed)
        folder = tmp_path / rng.choice(["gpt2", "llama3", "opt"])
        path = folder / rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "model.safetensors"])
        whole = path.read_bytes()
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(min(len(raw), 6000) or 1)
            part, random_bytes = slice(at, at + rng.randint(1, 200)), bytes(rng.randrange(256) for _ in range(9))
            how = rng.randrange(4)
            if how == 0 and raw:
                raw[at] ^= 1 << rng.randrange(8)
            else:
                raw[part if how == 1 else slice(at, at)] = [raw[part], b"", random_bytes, rng.choice(written).encode()][how]
        path.write_bytes(raw)
        refused += refused_or_opened(folder)
        path.write_bytes(whole)
    record_property("tries", tries), record_property("survived", tries)
    assert tries / 2 < refused < tries


def test_shards_of_ours_are_read(tmp_path):
    save_model(tmp_path, tiny(name="llama3"), TOKENIZER)
    shards()(tmp_path)
    assert torch.equal(outputs(load_model(tmp_path, GPT)[0]), outputs(tiny(name="llama3")))


@pytest.mark.case(12)
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    save_model(tmp_path, tiny(), TOKENIZER)
    Tokenizer("bytes", r"\s+|\S+", TOKENIZER.ranks | {b"ab": 256}).save(tmp_path)
    with pytest.raises(UserError, match="tokenizer has 262 tokens, the model 261"):
        load_model(tmp_path, GPT)


# ---------------------------------------------------------------------------------------------------------
# Pickles

class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


NO_SAFE_UNPICKLER = pytest.mark.skipif(TORCH < (2, 10), reason="--allow-pickle needs torch 2.10")


@pytest.fixture
def folder_without_weights(tmp_path):
    save_model(tmp_path / "model", tiny(name="llama3"), TOKENIZER)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    return tmp_path / "model", tensors


@pytest.mark.case(10)
@NO_SAFE_UNPICKLER
@pytest.mark.parametrize("sharded", [False, True])
def test_a_plain_pickle_is_opened_only_when_allowed(folder_without_weights, sharded):
    folder, tensors = folder_without_weights
    torch.save(tensors, folder / ("shard.bin" if sharded else "pytorch_model.bin"))
    if sharded:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "shard.bin")}))
    with pytest.raises(UserError, match=r"\.bin is a pickle, which can run code .* --allow-pickle"):
        load_model(folder, GPT)
    model, _ = load_model(folder, GPT, allow_pickle=True)
    assert torch.equal(outputs(model), outputs(tiny(name="llama3")))


@pytest.mark.case(10)
@pytest.mark.parametrize("write", [
    lambda tensors, evil, path: torch.save(tensors | {"more": evil}, path),
    lambda tensors, evil, path: path.write_bytes(pickle.dumps(evil)),
    lambda tensors, evil, path: torch.save(evil, path),
    lambda tensors, evil, path: torch.save(list(tensors.values()), path),
    lambda tensors, evil, path: torch.save(tensors | {"more": "text"}, path),
    lambda tensors, evil, path: path.write_bytes(b"\x80\x04"),
])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_hostile_or_odd_pickle_is_refused_and_runs_nothing(folder_without_weights, tmp_path, write, name):
    folder, tensors = folder_without_weights
    write(tensors, Evil(tmp_path / "made"), folder / name)
    for allowed in (False, True):
        with pytest.raises(UserError, match=name) as refused:
            load_model(folder, GPT, allow_pickle=allowed)
        assert "\n" not in str(refused.value) and not (tmp_path / "made").exists()


@pytest.mark.case(10)
def test_an_old_torch_opens_no_pickle_at_all(folder_without_weights, monkeypatch):
    folder, tensors = folder_without_weights
    torch.save(tensors, folder / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(UserError, match="needs torch 2.10"):
        load_model(folder, GPT, allow_pickle=True)


# ---------------------------------------------------------------------------------------------------------
# Names on the hub

@pytest.mark.parametrize("allowed", [False, True])
def test_a_hub_name_is_fetched_and_pickles_only_when_allowed(tmp_path, monkeypatch, allowed):
    save_model(tmp_path / "cache", tiny(name="llama3"), TOKENIZER)
    asked = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(
        snapshot_download=lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path / "cache")))
    monkeypatch.chdir(tmp_path)
    model, _ = load_model("org/a-model_1.5B", GPT, allow_pickle=allowed)
    assert torch.equal(outputs(model), outputs(tiny(name="llama3")))
    (name, patterns), = asked
    assert name == "org/a-model_1.5B" and any(".bin" in pattern for pattern in patterns) == allowed and not any(pattern.endswith(".py") for pattern in patterns)


def test_a_hub_name_that_can_not_be_fetched_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("401 Client Error\nlong\ntrace")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fail))
    with pytest.raises(UserError, match=r"^org/model: .*could not be fetched from the hub \(OSError: 401 Client Error\)$"):
        load_model("org/model", GPT)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^org/model: .*pip install -r requirements-hf\.txt$"):
        load_model("org/model", GPT)


@pytest.mark.parametrize("name", ["runs/x", "./x", "../x", "/nowhere/at/all", "x", "a/b/c", ""])
def test_a_folder_that_is_not_there_is_no_hub_name(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=lambda *a, **k: pytest.fail("asked the hub")))
    with pytest.raises(UserError, match="no such checkpoint folder$|is not a checkpoint folder"):
        load_model(name, GPT)


@pytest.mark.parametrize("name, command", [
    ("runs/sft", "; python sft.py --out runs/sft makes one"),
    ("runs/reward/", "; python reward.py --out runs/reward makes one"),
    ("runs/ppo", "; python ppo.py --out runs/ppo makes one"),
    ("runs/dpo", "; python dpo.py --out runs/dpo makes one"),
    ("runs/demo/sft", "; bash run.sh makes it"), ("runs/demo/dpo", "; bash run.sh makes it"),
    ("runs/sft2", ""), ("runs/my/sft", "")])
def test_a_folder_that_is_not_there_comes_with_the_command_that_makes_it(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load_model(name, GPT)
    assert str(refused.value) == f"{name}: no such checkpoint folder{command}"


# ---------------------------------------------------------------------------------------------------------
# Tokens that were added to a tokenizer

@pytest.mark.parametrize("name, vocab", [("gpt2", 258), ("llama3", 258), ("qwen2.5-tied", 258), ("qwen2", 280), ("gpt2", 280), ("llama3", 259)])
@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_added_tokens_get_rows_and_nothing_else_changes(tmp_path, monkeypatch, name, vocab, kind):
    """The last three of 261 tokens are new; the embedding has 258 rows, or is padded to more."""
    before = tiny(kind, name, vocab_size=vocab)
    tables = [lambda m: m.transformer.wte.weight] + ([lambda m: m.lm_head.weight] if getattr(before, "lm_head", None) is not None else [])
    for table in tables:
        table(before).data += 2.0  # a mean to be seen
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.added = 3
    save_model(tmp_path, before, TOKENIZER)
    monkeypatch.setattr(model_folder, "open_tokenizer", lambda folder: tokenizer)
    model, again = (load_model(tmp_path, kind)[0] for _ in range(2))
    assert model.config.vocab_size == model.transformer.config.vocab_size == max(vocab, 261)
    for table in tables:
        old, new = table(before).detach(), table(model).detach()
        assert new.shape == (max(vocab, 261), old.shape[1]) and table(model).requires_grad
        assert torch.equal(new[:258], old[:258]) and torch.equal(new[261:], old[261:]) and torch.equal(new, table(again))
        assert (new[258:261] - old[:258].mean(0)).abs().max() < 0.6 * old[:258].std(0).max() and len(new[258:261].unique(dim=0)) == 3
    if kind is GPT:
        assert torch.equal(outputs(model)[:, :258], outputs(before)[:, :258])
    else:
        assert torch.equal(outputs(model), outputs(before))
    save_model(tmp_path / "grown", model, TOKENIZER)
    monkeypatch.undo()
    assert torch.equal(outputs(load_model(tmp_path / "grown", kind)[0]), outputs(model))


@pytest.mark.parametrize("name", ["llama3", "qwen2.5-tied", "opt"])
def test_an_embedding_padded_beyond_the_tokenizer_stays_as_it_is(tmp_path, name):
    before = tiny(name=name, vocab_size=300)
    save_model(tmp_path, before, TOKENIZER)
    model, tokenizer = load_model(tmp_path, GPT)
    assert (tokenizer.n_vocab, model.config.vocab_size) == (261, 300) and torch.equal(outputs(model), outputs(before))


def test_another_projects_tokenizer_without_a_template_is_given_ours_with_rows_for_it(tmp_path, peers):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    library.pre_tokenizer, library.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    before = tiny(name="llama3", vocab_size=257, bos_token_id=256, pad_token_id=None)
    save_model(tmp_path / "base", before, SimpleNamespace(eos=256, pad=None, save=lambda folder: library.save(str(folder / "tokenizer.json"))))
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    model, tokenizer = load_model(tmp_path / "base", GPT)
    assert tokenizer.added == 4 and model.config.vocab_size == tokenizer.n_vocab == 261
    assert torch.equal(outputs_of(model, ROWS[0])[..., :257], outputs_of(before, ROWS[0]))
    save_model(tmp_path / "ours", model, tokenizer)
    again, other = load_model(tmp_path / "ours", GPT)
    assert other.added == 0 and other.same_as(tokenizer) and torch.equal(outputs_of(again, ROWS[0]), outputs_of(model, ROWS[0]))
    close(open_with(auto(peers, GPT), tmp_path / "ours")(ROWS[0]).logits, outputs_of(model, ROWS[0]))
    assert open_tokenizer(tmp_path / "ours").same_as(tokenizer)


def outputs_of(model, ids):
    with torch.no_grad():
        return model.logits(model.transformer(ids))
