"""formats/model_folder.py: folders written and read to the same bits, added tokens, adapters' files, new
tokenizers."""
import copy
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tools
import toy
from examples import TOKENIZER, VOCAB
from formats import model_folder
from formats.foreign_tokenizer import open_tokenizer
from formats.model_folder import load_model, save_model, scratch_tokenizer, texts_to_learn
from formats.tokenizer import ALL_LETTERS, CONTROLS, Tokenizer, train_bpe
from model import GPT, GPTConfig, ScalarModel, shifted
from plumbing.flags import UserError
from small_models import (
    MODELS, ROWS, adapted, adapter_flags, auto, close, edit_weights, kinds, made_by, open_with, outputs,
    peer_outputs, shards, tiny_of)
from tools import write_rows


# -- other projects' folders

def test_shards_are_read_as_one(peers, tmp_path):
    peer = made_by(peers, "llama3", GPT, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    close(outputs(load_model(tmp_path, GPT)[0]), peer_outputs(peer, GPT))


def test_bf16_weights_are_read_as_float32_and_written_as_bf16_when_asked(peers, tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "float32", tiny_of(name="qwen3"), TOKENIZER)

    def round_all(tensors):
        tensors.update({key: p.bfloat16() for key, p in tensors.items()})

    edit_weights(round_all)(tmp_path / "float32")
    model, _ = load_model(tmp_path / "float32", GPT)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    save_model(tmp_path / "bfloat16", model, TOKENIZER,
               SimpleNamespace(save_dtype="bfloat16", lora_save="merged"))
    with safe_open(tmp_path / "bfloat16" / "model.safetensors", "pt") as f:
        assert {f.get_slice(key).get_dtype() for key in f.keys()} == {"BF16"}
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    peer = open_with(auto(peers, GPT), tmp_path / "bfloat16", torch_dtype="auto")
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}
    close(peer_outputs(peer.float(), GPT), outputs(model))


# -- folders of ours

def scratch(kind=GPT, **changes):
    """A random model as --model scratch makes it: without a config.json behind it."""
    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "block_size": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 32}
    model = kind(GPTConfig(**shape | changes)).eval()
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
    expected = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in folder.iterdir()) == expected
    close(peer_outputs(open_with(auto(peers, kind), folder), kind), outputs(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_every_familys_folder_gives_the_same_bits_back(name, kind, tmp_path):
    model = tiny_of(kind, name)
    save_model(tmp_path, model, TOKENIZER)
    again, _ = load_model(tmp_path, kind)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text()).items() >= MODELS[name].items()


@pytest.mark.case(12)
@pytest.mark.parametrize("changes", [
    {"n_kv_head": 2},
    {"norm": "rmsnorm"},
    {"mlp": "swiglu"},
    {"head_dim": 10},
    {"norm_eps": 1e-3},
    {"tied": False},
    {"block_size": 65},
])
def test_a_model_that_its_config_json_would_not_describe_is_not_written(tmp_path, changes):
    model = scratch(**changes) if changes.keys() - {"norm_eps", "block_size"} else tiny_of()
    if changes.keys() & {"norm_eps", "block_size"}:  # of a folder, and changed since
        model.config = GPTConfig(**vars(model.config) | changes)
    with pytest.raises(UserError, match="can't hold this model"):
        save_model(tmp_path / "model", model, TOKENIZER)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = tiny_of()
    model.transformer.h[1].mlp.c_fc.weight.data[3, 3] = math.nan
    with pytest.raises(UserError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight is not finite"):
        save_model(tmp_path / "model", model, TOKENIZER)
    assert not (tmp_path / "model").exists()


def test_weights_are_safetensors(tmp_path):
    save_model(tmp_path, tiny_of(), TOKENIZER)
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
    save_model(tmp_path, tiny_of(saved, "llama3"), TOKENIZER)
    with pytest.raises(UserError, match=f"{tmp_path} {message}"):
        load_model(tmp_path, asked)


def test_shards_of_ours_are_read(tmp_path):
    save_model(tmp_path, tiny_of(name="llama3"), TOKENIZER)
    shards()(tmp_path)
    assert torch.equal(outputs(load_model(tmp_path, GPT)[0]), outputs(tiny_of(name="llama3")))


# -- tokens that were added to a tokenizer

@pytest.mark.parametrize("name, vocab", [
    ("gpt2", 258),
    ("llama3", 258),
    ("qwen2.5-tied", 258),
    ("qwen2", 280),
    ("gpt2", 280),
    ("llama3", 259),
])
@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_added_tokens_get_rows_and_nothing_else_changes(tmp_path, monkeypatch, name, vocab, kind):
    """The last three of 261 tokens are new; the embedding has 258 rows, or is padded to more."""
    before = tiny_of(kind, name, vocab_size=vocab)
    tables = [lambda m: m.transformer.wte.weight]
    if getattr(before, "lm_head", None) is not None:
        tables.append(lambda m: m.lm_head.weight)
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
        assert torch.equal(new[:258], old[:258])
        assert torch.equal(new[261:], old[261:])
        assert torch.equal(new, table(again))
        assert (new[258:261] - old[:258].mean(0)).abs().max() < 0.6 * old[:258].std(0).max()
        assert len(new[258:261].unique(dim=0)) == 3
    if kind is GPT:
        assert torch.equal(outputs(model)[:, :258], outputs(before)[:, :258])
    else:
        assert torch.equal(outputs(model), outputs(before))
    save_model(tmp_path / "grown", model, TOKENIZER)
    monkeypatch.undo()
    assert torch.equal(outputs(load_model(tmp_path / "grown", kind)[0]), outputs(model))


@pytest.mark.parametrize("name", ["llama3", "qwen2.5-tied", "opt"])
def test_an_embedding_padded_beyond_the_tokenizer_stays_as_it_is(tmp_path, name):
    before = tiny_of(name=name, vocab_size=300)
    save_model(tmp_path, before, TOKENIZER)
    model, tokenizer = load_model(tmp_path, GPT)
    assert (tokenizer.n_vocab, model.config.vocab_size) == (261, 300)
    assert torch.equal(outputs(model), outputs(before))


def outputs_of(model, ids):
    with torch.no_grad():
        return model.logits(model.transformer(ids))


def test_another_projects_tokenizer_without_a_template_is_given_ours_with_rows_for_it(tmp_path, peers):
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    before = tiny_of(name="llama3", vocab_size=257, bos_token_id=256, pad_token_id=None)
    save_model(
        tmp_path / "base", before,
        SimpleNamespace(eos=256, pad=None, save=lambda folder: library.save(str(folder / "tokenizer.json"))))
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    model, tokenizer = load_model(tmp_path / "base", GPT)
    assert tokenizer.added == 4 and model.config.vocab_size == tokenizer.n_vocab == 261
    assert torch.equal(outputs_of(model, ROWS[0])[..., :257], outputs_of(before, ROWS[0]))
    save_model(tmp_path / "ours", model, tokenizer)
    again, other = load_model(tmp_path / "ours", GPT)
    assert other.added == 0
    assert other.same_as(tokenizer)
    assert torch.equal(outputs_of(again, ROWS[0]), outputs_of(model, ROWS[0]))
    close(open_with(auto(peers, GPT), tmp_path / "ours")(ROWS[0]).logits, outputs_of(model, ROWS[0]))
    assert open_tokenizer(tmp_path / "ours").same_as(tokenizer)


# -- a tokenizer for a model from scratch

def a_run(tmp_path, **flags):
    """A training script's flags, as far as the tokenizer goes."""
    plain = {"data": str(tmp_path / "rows.jsonl"), "part": "", "skip_bad": False, "val_fraction": 0.0,
             "resume": False, "out": str(tmp_path / "run")}
    return SimpleNamespace(**plain | flags)


def test_a_model_from_scratch_takes_the_tokenizer_that_is_named(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "folder")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "把这句话翻译成英文", "completion": "这句话翻译成英文"}] * 3)
    for name, expected in [(tools.TOY, toy.tokenizer()), (str(tmp_path / "folder"), tokenizer)]:
        assert scratch_tokenizer(a_run(tmp_path, tokenizer=name)).same_as(expected)
    beside = a_run(tmp_path, tokenizer="auto", data=f"{tools.TOY}/prompts.jsonl")
    assert scratch_tokenizer(beside).same_as(toy.tokenizer())
    learned = scratch_tokenizer(a_run(tmp_path, tokenizer="bpe:300"))
    assert learned.same_as(Tokenizer("bpe", *train_bpe(["把这句话翻译成英文", "这句话翻译成英文"] * 3, 300, ALL_LETTERS)))
    assert len(learned.encode("这句话翻译成英文")) == 1
    assert learned.n_vocab == len(learned.ranks) + len(CONTROLS) <= 305


@pytest.mark.parametrize("name", ["gtp2", "bpe:299", "bpe:200001", "bpe:1e3", "bpe:", "bpe:-300",
                                  "bpe:99999999999", "nowhere/folder", ""])
def test_any_other_tokenizer_is_refused_with_those_that_there_are(tmp_path, name):
    message = (rf"^--tokenizer {re.escape(name)}: write auto, gpt2, a checkpoint's or tokenizer's folder .*, "
               r"or bpe:N to learn N tokens from --data, N from 300 to 200000$")
    with pytest.raises(UserError, match=message):
        scratch_tokenizer(a_run(tmp_path, tokenizer=name))
    with pytest.raises(UserError, match="rows.jsonl: no such file"):
        scratch_tokenizer(a_run(tmp_path, tokenizer="bpe:400"))


def test_a_vocabulary_is_learned_from_the_rows_that_are_trained_on(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i}", "completion": f"r{i}", "label": i % 5 > 0} for i in range(300)]
    write_rows(tmp_path / "rows.jsonl", rows)
    texts = texts_to_learn(a_run(tmp_path, val_fraction=0.5, part="1/1:1"))
    assert 40 < len(texts) / 2 < 90 and {text[0] for text in texts} == {"p", "r"}
    assert not {"p0", "p5"} & set(texts)
    assert set(texts[::2]) < set(texts_to_learn(a_run(tmp_path, part="1/1:1")))
    write_rows(tmp_path / "rows.jsonl",
               [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}])
    assert texts_to_learn(a_run(tmp_path)) == ["s", "u"]
    write_rows(tmp_path / "rows.jsonl", [{"text": "x" * 60}, {"text": "y" * 30}])
    monkeypatch.setattr("formats.model_folder.LEARNED_FROM", 30)
    assert texts_to_learn(a_run(tmp_path)) == ["x" * 20, "y" * 10]


def test_a_learned_vocabulary_is_the_runs_own_to_the_end(tmp_path):
    rows = [{"prompt": f"Translate the number {i}.", "completion": f"这是数字{i}。"} for i in range(12)]
    write_rows(tmp_path / "rows.jsonl", rows)
    words = f"--data {tmp_path}/rows.jsonl --block-size 64 --val-fraction 0 --batch-tokens 200 --save-every 1"
    run = f"{words} --tokenizer bpe:320 --out {tmp_path}/run"
    assert tools.here("sft", tmp_path, run, "--steps 2") == 0
    learned = open_tokenizer(tmp_path / "run")
    assert learned.same_as(scratch_tokenizer(a_run(tmp_path, tokenizer="bpe:320")))
    assert 256 < len(learned.ranks) <= 320
    write_rows(tmp_path / "rows.jsonl", [row | {"completion": "Something else."} for row in rows])
    assert tools.here("sft", tmp_path, run, "--steps 3 --resume --override") == 0
    assert open_tokenizer(tmp_path / "run").same_as(learned)
    assert tools.here("sft", tmp_path, words,
                      f"--steps 1 --tokenizer {tmp_path}/run --out {tmp_path}/other") == 0
    assert open_tokenizer(tmp_path / "other").same_as(learned)


# -- adapters' folders

def peft_folder(tmp_path, kind=GPT, name="gpt2", **changes):
    """(Base folder, folder of an adapter of it in the layout of PEFT, the model)."""
    base, folder, model = tmp_path / "base", tmp_path / "adapter", adapted(kind, name, **changes)
    trunk = tiny_of(kind, name)
    whole = tiny_of(GPT, name)
    whole.transformer.load_state_dict(trunk.transformer.state_dict())
    save_model(base, whole, TOKENIZER)
    save_model(folder, model, TOKENIZER, adapter_flags(lora_save="adapter", model=str(base), **changes))
    return base, folder, model


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_a_peft_folder_has_the_names_and_shapes_of_peft(tmp_path, targets):
    base, folder, model = peft_folder(tmp_path, name="llama3", lora_targets=targets)
    attention = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
    mlp = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
    parts = {f"self_attn.{name}": shape for name, shape in attention.items()}
    if targets == "all":
        parts |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = {}
    for layer in range(2):
        for part, (width, height) in parts.items():
            name = f"base_model.model.model.layers.{layer}.{part}"
            expected[f"{name}.lora_A.weight"] = (3, width)
            expected[f"{name}.lora_B.weight"] = (height, 3)
    assert {key: tuple(p.shape) for key, p in tensors.items()} == expected
    block = model.transformer.h[1].attn.c_attn
    q, k, v = (f"base_model.model.model.layers.1.self_attn.{letter}_proj.lora_" for letter in "qkv")
    assert all(torch.equal(tensors[f"{part}A.weight"], block.lora_A) for part in (q, k, v))
    assert torch.equal(torch.cat([tensors[f"{part}B.weight"] for part in (q, k, v)]), block.lora_B)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written == written | {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 3,
        "lora_alpha": 6.0, "bias": "none", "fan_in_fan_out": False, "target_modules": sorted(parts)
    }
    expected = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in folder.iterdir()) == expected


@kinds
def test_a_peft_folder_by_pefts_formula_is_the_model_in_transformers_and_here(tmp_path, peers, kind, name):
    """W + alpha / r B A for the modules that the tensors name, done by hand to transformers' weights."""
    base, folder, model = peft_folder(tmp_path, kind, name)
    written = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    again, _ = load_model(folder, kind)
    close(outputs(again), outputs(model), 1e-5)
    peer = auto(peers, kind).from_pretrained(base, **({} if kind is GPT else {"num_labels": 1})).eval()
    touched = set()
    with torch.no_grad():
        for key, A in tensors.items():
            if key.endswith("lora_A.weight"):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                assert module.split(".", 3 if name != "opt" else 4)[-1].endswith(
                    tuple(written["target_modules"]))
                delta = written["lora_alpha"] / written["r"] * tensors[key.replace("lora_A", "lora_B")] @ A
                weight = peer.get_submodule(module).weight
                weight += delta.T if written["fan_in_fan_out"] else delta
                touched.add(module)
        if kind is ScalarModel:
            assert written["modules_to_save"] == ["score"] and written["task_type"] == "SEQ_CLS"
            peer.score.weight.copy_(tensors["base_model.model.score.weight"])
    assert len(touched) == 2 * (4 if name == "gpt2" else 6 if name.startswith("opt") else 7)
    close(peer_outputs(peer, kind), outputs(model))


def edit(**changes):
    def damage(folder):
        path = folder / "adapter_config.json"
        written = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in written.items() if value != "gone"}))
    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    return damage


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.case(11, 12)
@pytest.mark.parametrize("damage, message", [
    (edit(use_dora=True), r"adapter_config\.json: use_dora is not supported"),
    (edit(peft_type="IA3"), r"adapter_config\.json: peft_type is not supported"),
    (edit(rank_pattern={"q_proj": 8}), r"adapter_config\.json: rank_pattern is not supported"),
    (edit(bias="all"), r"adapter_config\.json: bias is not supported"),
    (edit(task_type="SEQ_CLS"), r"holds an adapter for SEQ_CLS, but one for CAUSAL_LM is needed"),
    (edit(r="gone"), r"adapter_config\.json is damaged"),
    (edit(r=0), r"adapter_config\.json is damaged"),
    (edit(lora_alpha=math.nan), r"adapter_config\.json is damaged"),
    (edit(base_model_name_or_path=None), r"adapter_config\.json is damaged"),
    (edit(base_model_name_or_path="nowhere"), r"nowhere: no such checkpoint folder"),
    (edit(r=4), r"adapter of .*c_attn\.weight has a wrong shape"),
    (lambda folder: (folder / "adapter_config.json").write_text("[]"), r"adapter_config\.json is damaged"),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(),
     r"adapter_model\.safetensors is missing"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
     r"adapter_model\.safetensors is damaged"),
    (edit_tensors(lambda tensors: tensors.pop(Q + "B.weight")),
     r"adapter_model\.safetensors lacks .*q_proj\.lora_B"),
    (edit_tensors(lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(32)})),
     r"no place for: base_model\.model\.model\.norm"),
    (edit_tensors(lambda tensors: tensors.update({Q + "A.weight": torch.ones(3, 31)})),
     r"adapter of .* has a wrong shape"),
    (lambda folder: edit(base_model_name_or_path=str(folder))(folder), r"which is an adapter itself"),
    (lambda folder: Tokenizer("bytes", r"\S+|\s+", TOKENIZER.ranks | {b"ab": 256}).save(folder),
     r"tokenizer has 262 tokens, .* 261"),
])
def test_a_damaged_or_foreign_adapter_is_refused_in_one_line(tmp_path, damage, message):
    _, folder, _ = peft_folder(tmp_path, name="llama3")
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        load_model(folder, GPT)
    assert "\n" not in str(refused.value)


@pytest.mark.case(12)
def test_a_reward_models_adapter_without_its_head_is_refused(tmp_path):
    _, folder, _ = peft_folder(tmp_path, ScalarModel, "llama3")
    edit_tensors(lambda tensors: tensors.pop("base_model.model.score.weight"))(folder)
    with pytest.raises(UserError, match="adapter_model.safetensors lacks base_model.model.score.weight"):
        load_model(folder, ScalarModel)


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(tmp_path):
    _, folder, model = peft_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    again, tokenizer = load_model(folder, GPT)
    assert tokenizer.same_as(TOKENIZER)
    close(outputs(again), outputs(model), 1e-5)
