"""formats/model_folder.py: foreign, damaged and hostile folders are refused in one line, and nothing in them
is run."""
import itertools
import json
import math
import pickle
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from examples import TOKENIZER
from formats.model_folder import load_model, save_model
from formats.tokenizer import Tokenizer
from model import GPT
from plumbing.flags import UserError
from small_models import edit_weights, outputs, shards, tiny_of

TORCH = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])


# -- one line that names the file and the reason

def edit_config(remove=(), **changes):
    def damage(folder):
        written = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in written.items() if key not in remove}))
    return damage


def rewrite(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def too_large(folder):
    with open(folder / "config.json", "ab") as f:
        f.truncate(1 << 27)  # sparse: takes no space


def rope(kind, **fields):
    return edit_config(rope_scaling={"rope_type": kind, "factor": 4.0, **fields})


REFUSED = [
    # what is missing or damaged
    ("gpt2", lambda folder: folder.rename(folder.with_name("elsewhere")), r"no such checkpoint folder"),
    ("gpt2", lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    ("gpt2", lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    ("gpt2", lambda folder: (folder / "tokenizer.json").unlink(),
     r"tokenizer\.json is missing|needs the package tokenizers"),
    ("gpt2", rewrite("config.json", lambda raw: raw[:-20]), r"config\.json is damaged"),
    ("gpt2", rewrite("config.json", lambda raw: b"\xff" + raw), r"config\.json is damaged"),
    ("gpt2", rewrite("config.json", lambda raw: b"[]"), r"config\.json is damaged \(it holds no object\)"),
    ("gpt2", rewrite("config.json", lambda raw: b"[" * 10**6), r"config\.json is damaged"),
    ("gpt2", rewrite("config.json", lambda raw: b'{"a": ' * 10**5 + b"1" + b"}" * 10**5),
     r"config\.json is damaged"),
    ("gpt2", rewrite("config.json", lambda raw: raw.replace(b'"n_layer": 2', b'"n_layer": ' + b"9" * 5000)),
     r"config\.json"),
    ("gpt2", too_large, r"config\.json is too large"),
    ("gpt2",
     rewrite("config.json", lambda raw: b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'),
     r"config\.json is damaged or incomplete .*vocab_size"),
    ("llama3", edit_config(remove=["rms_norm_eps"]), r"config\.json is damaged or incomplete .*rms_norm_eps"),
    ("llama3", rope("llama3"), r"config\.json is damaged or incomplete .*low_freq_factor"),
    ("gpt2", rewrite("tokenizer.json", lambda raw: raw[:-20]), r"tokenizer\.json is damaged"),
    ("gpt2", rewrite("model.safetensors", lambda raw: raw[:-20]), r"model\.safetensors is damaged"),
    ("gpt2", rewrite("model.safetensors", lambda raw: raw[:20]), r"model\.safetensors is damaged"),
    ("gpt2", rewrite("model.safetensors", lambda raw: b""), r"model\.safetensors is damaged"),
    ("gpt2", rewrite("model.safetensors", lambda raw: b"\x80\x04" + raw),
     r"model\.safetensors is refused: it is a pickle"),
    ("gpt2", rewrite("model.safetensors", lambda raw: pickle.dumps({"a": 1})),
     r"model\.safetensors is refused: it is a pickle"),
    # weights that don't agree with config.json
    ("gpt2", edit_weights(lambda tensors: tensors.pop("transformer.h.1.attn.c_attn.bias")),
     r"model\.safetensors lacks transformer\.h\.1\.attn\.c_attn\.bias"),
    ("qwen2", edit_weights(lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias")),
     r"model\.safetensors lacks model\.layers\.1\.self_attn\.k_proj\.bias"),
    ("qwen2", edit_weights(lambda tensors: tensors.pop("lm_head.weight")),
     r"model\.safetensors lacks lm_head\.weight"),
    ("gpt2", edit_weights(lambda tensors: tensors.update({"transformer.ln_f.weight": torch.ones(31)})),
     r"model\.safetensors: transformer\.ln_f\.weight .*\(31,\).*\(32,\)"),
    ("gpt2", edit_config(n_positions=65),
     r"model\.safetensors: transformer\.wpe\.weight .*\(64, 32\).*\(65, 32\)"),
    ("gpt2", edit_config(vocab_size=260),
     r"model\.safetensors: transformer\.wte\.weight .*\(261, 32\).*\(260, 32\)"),
    ("llama3", edit_config(num_key_value_heads=4),
     r"model\.safetensors: transformer\.h\.0\.attn\.c_attn\.weight .*\(64, 32\).*\(96, 32\)"),
    ("llama3", edit_config(head_dim=16), r"model\.safetensors: transformer\.h\.0\.attn\.c_attn\.weight "),
    ("llama3", edit_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(())})),
     r"model\.safetensors: transformer\.ln_f\.weight .*\(\)"),
    ("llama3", edit_config(num_hidden_layers=1), r"no place for: model\.layers\.1\."),
    ("llama3",
     edit_weights(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
     r"no place for: .*q_proj\.bias"),
    ("opt", edit_weights(lambda tensors: tensors.update({"score.weight": torch.ones(1, 32)})),
     r"no place for: score\.weight"),
    ("gpt2",
     edit_weights(
         lambda tensors: tensors.update({"transformer.ln_f.weight": torch.ones(32, dtype=torch.int8)})),
     r"model\.safetensors: .*ln_f\.weight is int8"),
    # shards
    ("llama3", shards(kept=False), r"lacks model-00001-of-00001\.safetensors"),
    ("llama3", shards("../x.safetensors"), r"model\.safetensors\.index\.json is damaged"),
    ("llama3", shards("/etc/passwd"), r"model\.safetensors\.index\.json is damaged"),
    ("llama3", shards(".."), r"lacks \.\."),
    ("llama3", shards(index={}), r"model\.safetensors\.index\.json is damaged"),
    ("llama3", shards(index={"weight_map": {"a": 1}}), r"model\.safetensors\.index\.json is damaged"),
    ("llama3", shards(index=[]), r"model\.safetensors\.index\.json is damaged"),
    # kinds of models that this project doesn't compute
    ("gpt2", edit_config(model_type="mamba"),
     r"config\.json: models of type 'mamba' are not supported, only gpt2, llama"),
    ("gpt2", edit_config(model_type=["gpt2"]), r"config\.json: models of type"),
    ("gpt2", edit_config(remove=["model_type"]), r"config\.json: models of type 'None'"),
    ("gpt2", edit_config(architectures=["GPT2DoubleHeadsModel"]),
     r"config\.json: the architecture 'GPT2DoubleHeadsModel' is not supported, "
     r"only GPT2LMHeadModel and GPT2For"),
    ("llama3", edit_config(architectures=["LlamaForTokenClassification"]),
     r"config\.json: the architecture 'LlamaForTokenClassification'"),
    ("llama3", edit_config(architectures=["MistralForCausalLM"]),
     r"config\.json: the architecture 'MistralForCausalLM'"),
    ("llama3", edit_config(architectures=None), r"config\.json: the architecture 'None'"),
    ("llama3", edit_config(architectures=[{}]), r"config\.json"),
    *[("llama3", rope(kind),
       rf"config\.json: rotary positions of kind '{kind}' are not supported, only default, linear, llama3")
      for kind in ("yarn", "dynamic", "longrope")],
    ("llama3", edit_config(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
     r"config\.json: rotary positions of kind 'yarn'"),
    ("llama3", edit_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
     r"config\.json: partial_rotary_factor 0\.5 is not supported"),
    ("llama3", edit_config(partial_rotary_factor=0.5), r"config\.json: partial_rotary_factor 0\.5"),
    ("llama3", edit_config(hidden_act="gelu"), r"config\.json: hidden_act gelu is not supported, only silu"),
    ("llama3", edit_config(mlp_bias=True), r"config\.json: mlp_bias True is not supported"),
    ("llama3", edit_config(attention_bias=True), r"config\.json: attention_bias True is not supported"),
    ("qwen3", edit_config(attention_bias=True), r"config\.json: attention_bias True is not supported"),
    ("llama3", edit_config(quantization_config={"bits": 4}),
     r"config\.json: quantised checkpoints are not supported"),
    ("gpt2", edit_config(activation_function="gelu"),
     r"config\.json: activation_function gelu is not supported, only gelu_new"),
    ("gpt2", edit_config(scale_attn_by_inverse_layer_idx=True),
     r"config\.json: scale_attn_by_inverse_layer_idx True"),
    ("gpt2", edit_config(scale_attn_weights=False), r"config\.json: scale_attn_weights False"),
    ("gpt2", edit_config(add_cross_attention=True), r"config\.json: add_cross_attention True"),
    *[("opt", edit_config(**{name: value}), rf"config\.json: {name} {value} is not supported")
      for name, value in (
        ("activation_function", "gelu"), ("enable_bias", False), ("layer_norm_elementwise_affine", False),
        ("_remove_final_layer_norm", True))],
    # numbers
    ("gpt2", edit_config(n_head=3), r"config\.json: .*width 32 is not divisible by 3 heads"),
    ("llama3", edit_config(num_key_value_heads=3),
     r"config\.json: .*4 heads are not divisible by 3 key/value heads"),
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
    # 4 TiB, if made.
    ("gpt2", edit_config(n_embd=1 << 20, vocab_size=1 << 20),
     r"model\.safetensors: transformer\.wte\.weight .*\(1048576, 1048576\)"),
    ("llama3", edit_config(hidden_size=1 << 20, vocab_size=1 << 20),
     r"model\.safetensors: transformer\.wte\.weight .*\(1048576, 1048576\)"),
]


@pytest.mark.case(11, 12)
@pytest.mark.parametrize("name, damage, message", REFUSED)
def test_a_foreign_or_damaged_folder_is_refused_in_one_line(tmp_path, name, damage, message):
    folder = tmp_path / "model"
    save_model(folder, tiny_of(name=name), TOKENIZER)
    load_model(folder, GPT)
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        load_model(folder, GPT)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


def hostile(header=None, size=None, data=bytes(8), raw=b""):
    """Bytes of a safetensors file: a header (JSON or raw bytes), what its size is said to be, the tensors'
    bytes."""
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
    "a name that comes twice": hostile(raw=f'{{"a": {json.dumps(tensor(1, offsets=(0, 4)))}, "a": '
                                           f'{json.dumps(tensor(1, offsets=(4, 8)))}}}'.encode()),
    "a field that comes twice": hostile(raw=b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], '
                                            b'"data_offsets": [0, 8]}}'),
    "NaN for a size": hostile({"a": tensor(math.nan)}),
    "a number with 5000 digits":
        hostile(raw=json.dumps({"a": tensor("@")}).replace('"@"', "9" * 5000).encode()),
    "an unknown dtype": hostile({"a": tensor(2, dtype="F128")}),
    "a nested header": hostile(raw=b'{"a": ' + b"[" * 10**6),
    "a header of 101 MiB": hostile({}, size=101 << 20),
    "a header that is no UTF-8": hostile(raw=b'{"\xff": 1}'),
    "metadata that are no strings": hostile({"__metadata__": {"a": 1}}, data=b""),
}


@pytest.mark.case(11)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_are_refused_in_one_line(name, tmp_path):
    save_model(tmp_path, tiny_of(), TOKENIZER)
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


NUMBERS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "-1",
    "0",
    "0.5",
    "1e999",
    "1" + "0" * 30,
    "9" * 5000,
    '"x"',
    "null",
    "[]",
    "{}",
    "true",
    "[1]",
)


@pytest.mark.case(11)
@pytest.mark.parametrize("name", ["gpt2", "llama3", "opt-350m", "qwen3"])
def test_any_field_of_config_json_may_hold_anything(name, tmp_path, record_property):
    save_model(tmp_path, tiny_of(name=name), TOKENIZER)
    path, fields, refused = tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text()), []
    scaling = fields.get("rope_scaling", {})
    tries = list(itertools.product([*fields, *scaling], NUMBERS))
    for key, value in tries:
        changed = fields | ({"rope_scaling": scaling | {key: "@"}} if key in scaling else {key: "@"})
        path.write_text(json.dumps(changed).replace('"@"', value))
        refused += [key] if refused_or_opened(tmp_path) else []
    record_property("tries", len(tries)), record_property("survived", len(tries))
    sizes = {
        "vocab_size", "n_positions", "n_layer", "num_hidden_layers", "hidden_size", "max_position_embeddings"
    } & fields.keys()
    assert len(sizes) >= 3 and all(refused.count(size) == len(NUMBERS) for size in sizes)


@pytest.mark.case(11)
def test_a_folder_with_random_damage_is_refused_in_one_line_or_opened(tmp_path, record_property):
    written = ("NaN", "-1", "1e999", "9" * 20, "null", '"', "{", "[", "}", ",", "\0")
    refused, tries = 0, 300
    for name in ("gpt2", "llama3", "opt"):
        save_model(tmp_path / name, tiny_of(name=name), TOKENIZER)
    for seed in range(tries):
        rng = random.Random(seed)
        folder = tmp_path / rng.choice(["gpt2", "llama3", "opt"])
        path = folder / rng.choice([
            "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "model.safetensors"
        ])
        whole = path.read_bytes()
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(min(len(raw), 6000) or 1)
            part = slice(at, at + rng.randint(1, 200))
            random_bytes = bytes(rng.randrange(256) for _ in range(9))
            how = rng.randrange(4)
            if how == 0 and raw:
                raw[at] ^= 1 << rng.randrange(8)
            else:
                raw[part if how == 1 else slice(at, at)] = [
                    raw[part], b"", random_bytes, rng.choice(written).encode()
                ][how]
        path.write_bytes(raw)
        refused += refused_or_opened(folder)
        path.write_bytes(whole)
    record_property("tries", tries), record_property("survived", tries)
    assert tries / 2 < refused < tries


@pytest.mark.case(12)
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    save_model(tmp_path, tiny_of(), TOKENIZER)
    Tokenizer("bytes", r"\s+|\S+", TOKENIZER.ranks | {b"ab": 256}).save(tmp_path)
    with pytest.raises(UserError, match="tokenizer has 262 tokens, the model 261"):
        load_model(tmp_path, GPT)


# -- pickles

NO_SAFE_UNPICKLER = pytest.mark.skipif(TORCH < (2, 10), reason="--allow-pickle needs torch 2.10")


@pytest.fixture
def folder_without_weights(tmp_path):
    save_model(tmp_path / "model", tiny_of(name="llama3"), TOKENIZER)
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
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(tensors, "shard.bin")}))
    with pytest.raises(UserError, match=r"\.bin is a pickle, which can run code .* --allow-pickle"):
        load_model(folder, GPT)
    model, _ = load_model(folder, GPT, allow_pickle=True)
    assert torch.equal(outputs(model), outputs(tiny_of(name="llama3")))


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


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


# -- names on the hub, and folders that are not there

@pytest.mark.parametrize("allowed", [False, True])
def test_a_hub_name_is_fetched_and_pickles_only_when_allowed(tmp_path, monkeypatch, allowed):
    save_model(tmp_path / "cache", tiny_of(name="llama3"), TOKENIZER)
    asked = []
    monkeypatch.setitem(
        sys.modules, "huggingface_hub",
        SimpleNamespace(snapshot_download=lambda name, allow_patterns: asked.append(
            (name, allow_patterns)) or str(tmp_path / "cache")))
    monkeypatch.chdir(tmp_path)
    model, _ = load_model("org/a-model_1.5B", GPT, allow_pickle=allowed)
    assert torch.equal(outputs(model), outputs(tiny_of(name="llama3")))
    (name, patterns), = asked
    assert name == "org/a-model_1.5B"
    assert any(".bin" in pattern for pattern in patterns) == allowed
    assert not any(pattern.endswith(".py") for pattern in patterns)


def test_a_hub_name_that_can_not_be_fetched_is_one_line(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError("401 Client Error\nlong\ntrace")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=fail))
    with pytest.raises(
            UserError,
            match=r"^org/model: .*could not be fetched from the hub \(OSError: 401 Client Error\)$"):
        load_model("org/model", GPT)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^org/model: .*pip install -r requirements-hf\.txt$"):
        load_model("org/model", GPT)


@pytest.mark.parametrize("name", ["runs/x", "./x", "../x", "/nowhere/at/all", "x", "a/b/c", ""])
def test_a_folder_that_is_not_there_is_no_hub_name(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setitem(sys.modules, "huggingface_hub",
                        SimpleNamespace(snapshot_download=lambda *a, **k: pytest.fail("asked the hub")))
    with pytest.raises(UserError, match="no such checkpoint folder$|is not a checkpoint folder"):
        load_model(name, GPT)


@pytest.mark.parametrize("name, command", [
    ("runs/sft", "; python sft.py --out runs/sft makes one"),
    ("runs/reward/", "; python reward.py --out runs/reward makes one"),
    ("runs/ppo", "; python ppo.py --out runs/ppo makes one"),
    ("runs/dpo", "; python dpo.py --out runs/dpo makes one"),
    ("runs/demo/sft", "; bash run.sh makes it"),
    ("runs/demo/dpo", "; bash run.sh makes it"),
    ("runs/sft2", ""),
    ("runs/my/sft", ""),
])
def test_a_folder_that_is_not_there_comes_with_the_command_that_makes_it(name, command, tmp_path,
                                                                         monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load_model(name, GPT)
    assert str(refused.value) == f"{name}: no such checkpoint folder{command}"
