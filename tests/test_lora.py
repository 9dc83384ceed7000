"""Low-rank adapters: against the base, against their merged weights, against transformers, and in whole runs of the scripts."""
import contextlib
import copy
import io
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import model_folder
import judges
import model as model_file
import tools
import toy
from formats.model_folder import load_model, save_model
from model import LORA_TARGETS, LoRALinear, merged_weights, prepare_training
from plumbing.flags import UserError
from model import GPT, ScalarModel, copy_of, shifted
from plumbing.steps import adamw
from formats.tokenizer import Tokenizer

from test_checkpoint import ATTENTION, IDS, TOKENIZER, auto, close, open_with, outputs, peer_outputs, tiny
from test_runs import SCRIPTS, TRAINERS, keep_signal_handlers, run_here, stopped_in_the_second_step  # keep_signal_handlers: a fixture of every test here, too

KINDS = [(kind, name) for kind in (GPT, ScalarModel) for name in ("gpt2", "llama3", "opt")] + [(GPT, "qwen3"), (ScalarModel, "opt-350m")]
kinds = pytest.mark.parametrize("kind, name", KINDS)


def flags(**changes):
    """What prepare_training and save_model read of a run's flags."""
    return SimpleNamespace(**{"lora_rank": 3, "lora_alpha": 6.0, "lora_dropout": 0.0, "lora_targets": "all", "checkpoint_activations": False, "compile": False, "seed": 0,
                              "save_dtype": "float32", "lora_save": "merged", "model": "base"} | changes)


def adapted(kind=GPT, name="gpt2", fresh=False, **changes):
    """A model with adapters; unless fresh, with random ones, whose B a new adapter has at zero."""
    model = tiny(kind, name)
    prepare_training(model, flags(**changes))
    if not fresh:
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith("lora_B"):
                    p += 0.1 * torch.randn_like(p)
    return model.eval()


def outputs_with_gradient(model):
    """As `outputs`, of padding too."""
    return model(IDS) if isinstance(model, ScalarModel) else model.logits(model.transformer(IDS))


# ---------------------------------------------------------------------------------------------------------
# Against the base

@kinds
def test_new_adapters_and_adapters_that_count_zero_times_are_the_base_bit_for_bit(kind, name):
    base = outputs(tiny(kind, name))
    assert torch.equal(outputs(adapted(kind, name, fresh=True)), base)
    assert torch.equal(outputs(adapted(kind, name, lora_alpha=0.0)), base)
    assert (outputs(adapted(kind, name)) - base).abs().max() > 0.01


@kinds
def test_only_adapters_and_a_scalar_head_are_trained_and_each_of_them_is(kind, name):
    model = adapted(kind, name)
    outputs_with_gradient(model).square().mean().backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {key for key, _ in model.named_parameters() if re.search(r"\.h\.\d\.(attn|mlp)\.(c_attn|c_proj|c_fc)\.lora_[AB]$", key) or key == "score.weight"}
    assert trained == expected == {key for key, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == 2 * 4 * 2 + (kind is ScalarModel)
    assert sum(len(group["params"]) for group in adamw(model, 0.1, 0.1).param_groups) == len(expected)


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_the_matrices_that_targets_name_get_an_adapter(targets):
    model = adapted(lora_targets=targets)
    found = {name.split(".", 3)[-1] for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert found == {"attention": {"attn.c_attn", "attn.c_proj"}, "mlp": {"mlp.c_fc", "mlp.c_proj"},
                     "all": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}}[targets]


def test_an_adapter_is_its_formula():
    linear = torch.nn.Linear(5, 7)
    torch.manual_seed(0)
    layer, x = LoRALinear(linear, rank=2, alpha=3.0, dropout=0.0), torch.randn(4, 5)
    assert layer.lora_A.shape == (2, 5) and layer.lora_B.shape == (7, 2) and not layer.lora_B.any() and layer.lora_A.abs().max() <= 1 / math.sqrt(5)
    layer.lora_B.data.normal_()
    assert layer.weight is linear.weight and layer.bias is linear.bias
    torch.testing.assert_close(layer(x), linear(x) + 3.0 / 2 * (layer.lora_B @ layer.lora_A @ x.T).T)


def test_dropout_is_of_the_adapters_inputs_and_while_training_only():
    model, base = adapted(lora_dropout=0.5), outputs(tiny())
    assert torch.equal(outputs(model), outputs(adapted()))

    def training(model):
        return model.train().logits(model.transformer(IDS)).detach()

    assert not torch.equal(training(model), training(model))
    silent = adapted(lora_dropout=0.5, lora_alpha=0.0)
    assert torch.equal(training(silent), training(silent)) and torch.equal(outputs(silent), base)


def test_new_adapters_come_from_the_seed_alone():
    a, b, c = (adapted(fresh=True, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(9)
    assert all(torch.equal(p, b.state_dict()[key]) for key, p in a.state_dict().items())
    assert not torch.equal(a.transformer.h[0].attn.c_attn.lora_A, c.transformer.h[0].attn.c_attn.lora_A)


# ---------------------------------------------------------------------------------------------------------
# Copies that share their weights

def storages(module):
    return {p.data_ptr() for p in module.parameters()}


@kinds
def test_a_twin_that_shares_is_the_base_whatever_adapters_the_original_gets(kind, name):
    model = tiny(kind, name)
    base, shared, apart = outputs(model), copy_of(model, share=True), copy_of(model)
    assert storages(shared) == storages(model) and not storages(apart) & storages(model)
    shared.requires_grad_(False)
    prepare_training(model, flags())
    with torch.no_grad():
        for p in model.parameters():  # a training step may change whatever it trains, a scalar head too
            if p.requires_grad:
                p.normal_()
    assert not torch.equal(outputs(model), base) and torch.equal(outputs(shared), base) and torch.equal(outputs(apart), base)
    assert storages(shared.transformer) < storages(model)


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_a_scalar_model_may_share_its_trunk(name):
    model = tiny(name=name)
    shared, apart = (ScalarModel.from_trunk(model, share) for share in (True, False))
    assert storages(model.transformer) < storages(shared) and not storages(apart) & storages(model)
    prepare_training(shared, flags())
    assert not any(".lora_" in key for key in model.state_dict())
    before, lower = outputs(shared), copy_of(shared)
    assert shared.can_shift == (name == "gpt2")
    if shared.can_shift:
        lower.load_state_dict(shifted(shared.state_dict(), 1.0))
    assert torch.equal(outputs(shared), before) and torch.allclose(outputs(lower), before - float(name == "gpt2"), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# Merged, and as folders

@kinds
def test_merged_weights_compute_what_the_adapters_do_and_leave_them_alone(kind, name, tmp_path):
    model = adapted(kind, name)
    before = outputs(model)
    save_model(tmp_path, model, TOKENIZER, flags())
    again, _ = load_model(tmp_path, kind)
    close(outputs(again), before, 1e-5)
    assert torch.equal(outputs(model), before)
    assert merged_weights(model).keys() == again.state_dict().keys() == tiny(kind, name).state_dict().keys()


def peft_folder(tmp_path, kind=GPT, name="gpt2", **changes):
    """A base, and an adapter of it in the layout of PEFT. Returns (base folder, adapter folder, the model)."""
    base, folder, model = tmp_path / "base", tmp_path / "adapter", adapted(kind, name, **changes)
    trunk = tiny(kind, name)
    whole = tiny(GPT, name)
    whole.transformer.load_state_dict(trunk.transformer.state_dict())
    save_model(base, whole, TOKENIZER)
    save_model(folder, model, TOKENIZER, flags(lora_save="adapter", model=str(base), **changes))
    return base, folder, model


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_a_peft_folder_has_the_names_and_shapes_of_peft(tmp_path, targets):
    base, folder, model = peft_folder(tmp_path, name="llama3", lora_targets=targets)
    attention = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
    mlp = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
    parts = {f"self_attn.{name}": shape for name, shape in attention.items()} | ({f"mlp.{name}": shape for name, shape in mlp.items()} if targets == "all" else {})
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {key: tuple(p.shape) for key, p in tensors.items()} == {
        f"base_model.model.model.layers.{layer}.{part}.lora_{side}.weight": (3, width) if side == "A" else (height, 3)
        for layer in range(2) for part, (width, height) in parts.items() for side in "AB"}
    block = model.transformer.h[1].attn.c_attn
    q, k, v = (f"base_model.model.model.layers.1.self_attn.{letter}_proj.lora_" for letter in "qkv")
    assert all(torch.equal(tensors[f"{part}A.weight"], block.lora_A) for part in (q, k, v))
    assert torch.equal(torch.cat([tensors[f"{part}B.weight"] for part in (q, k, v)]), block.lora_B)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert written == written | {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 3, "lora_alpha": 6.0, "bias": "none",
                                 "fan_in_fan_out": False, "target_modules": sorted(parts)}
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@kinds
def test_a_peft_folder_by_pefts_formula_is_the_model_in_transformers_and_here(tmp_path, peers, kind, name):
    """W + alpha / r B A for the modules that the tensors name, done by hand to transformers' weights."""
    base, folder, model = peft_folder(tmp_path, kind, name)
    written, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    again, _ = load_model(folder, kind)
    close(outputs(again), outputs(model), 1e-5)
    peer = auto(peers, kind).from_pretrained(base, **({} if kind is GPT else {"num_labels": 1})).eval()
    touched = set()
    with torch.no_grad():
        for key, A in tensors.items():
            if key.endswith("lora_A.weight"):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                assert module.split(".", 3 if name != "opt" else 4)[-1].endswith(tuple(written["target_modules"]))
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
        path.write_text(json.dumps({key: value for key, value in (json.loads(path.read_text()) | changes).items() if value != "gone"}))
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
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors is missing"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), r"adapter_model\.safetensors is damaged"),
    (edit_tensors(lambda tensors: tensors.pop(Q + "B.weight")), r"adapter_model\.safetensors lacks .*q_proj\.lora_B"),
    (edit_tensors(lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(32)})), r"no place for: base_model\.model\.model\.norm"),
    (edit_tensors(lambda tensors: tensors.update({Q + "A.weight": torch.ones(3, 31)})), r"adapter of .* has a wrong shape"),
    (lambda folder: edit(base_model_name_or_path=str(folder))(folder), r"which is an adapter itself"),
    (lambda folder: Tokenizer("bytes", r"\S+|\s+", TOKENIZER.ranks | {b"ab": 256}).save(folder), r"tokenizer has 262 tokens, .* 261"),
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


# ---------------------------------------------------------------------------------------------------------
# Whole runs

PLAN = dict.fromkeys(("sft", "reward", "dpo"), "--batch-tokens 256 --val-fraction 0") | {"ppo": "--rollout-batch 8 --minibatches 2 --max-new-tokens 8"}
DATA = {"sft": "demonstrations", "reward": "pairs", "dpo": "pairs", "ppo": "prompts"}


def run(name, root, out, *flags, model="sft"):
    """Run a trainer on a folder's models and files; its metrics without timings."""
    words = f"--model {root}/{model} --data {root}/{DATA[name]}.json --lr 0.01 --warmup 1 --steps 3 --threads 1 --out {out} {PLAN[name]}"
    with contextlib.redirect_stdout(io.StringIO()):
        run_here(name, words, f"--reward {root}/reward" * (name == "ppo"), *flags)
    return tools.metrics(out)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a tiny GPT-2, a tiny Llama, a reward model of each, and the files to train on."""
    root = tmp_path_factory.mktemp("lora")
    prompts = [f"Say {word}." for word in ("river", "stone", "apple", "window")]
    for name, rows in {"prompts": [{"prompt": p} for p in prompts], "demonstrations": [{"instruction": p, "output": "It is good."} for p in prompts],
                       "pairs": [{"prompt": p, "chosen": "It is good.", "rejected": "No."} for p in prompts]}.items():
        (root / f"{name}.json").write_text(json.dumps(rows))
    tokenizer = toy.tokenizer()
    ids = {"vocab_size": tokenizer.n_vocab, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad, "bos_token_id": tokenizer.eos}
    for kind, suffix in ((GPT, "sft"), (ScalarModel, "reward")):
        save_model(root / suffix, tiny(kind, **ids), tokenizer)
        save_model(root / "llama" / suffix, tiny(kind, "llama3", **ids), tokenizer)
    for name in DATA.values():
        (root / "llama" / f"{name}.json").write_bytes((root / f"{name}.json").read_bytes())
    return root


def weights(folder, kind):
    return load_model(folder, kind)[0].state_dict()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_with_adapters_changes_matrices_by_their_rank_and_nothing_else(name, root, tmp_path):
    rows = run(name, root, tmp_path / "run", "--lora-rank 4")
    kind = ScalarModel if name == "reward" else GPT
    after, before = weights(tmp_path / "run", kind), weights(root / "sft", GPT)
    assert len(rows) == 3
    for key, p in before.items():
        if re.search(r"c_\w+\.weight$", key):
            values = torch.linalg.svdvals(after[key] - p)
            assert values[0] > 1e-4 and values[4] < 1e-3 * values[0], key
        elif key != "transformer.ln_f.bias" or kind is GPT:  # where a reward model's shift is
            assert torch.equal(after[key], p), key
    assert any(".lora_A" in key for key in load_file(tools.latest(tmp_path / "run") / "training.safetensors"))


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_reference_that_is_the_model_without_its_adapters_equals_one_of_its_own(name, root, tmp_path, monkeypatch):
    words = "--lora-rank 4 --lora-alpha 32 --kl-coef 0.5 --critic-init sft" if name == "ppo" else "--lora-rank 4 --lora-alpha 32"
    shared = run(name, root, tmp_path / "shared", words)
    for owner in (model_file, SCRIPTS[name]):
        if hasattr(owner, "shares_frozen"):
            monkeypatch.setattr(owner, "shares_frozen", lambda config: False)
    apart = run(name, root, tmp_path / "apart", words)
    assert all(a == pytest.approx(b, rel=1e-6, abs=1e-6) for a, b in zip(shared, apart)) and len(shared) == 3
    assert shared[-1]["margin"] > 0.01 if name == "dpo" else shared[-1]["kl"] > 0.001  # the policy has left the reference
    a, b = (weights(tmp_path / folder, GPT) for folder in ("shared", "apart"))
    assert all((a[key] - b[key]).abs().max() <= 1e-6 for key in a)


@pytest.mark.parametrize("init", ["reward", "sft"])
def test_with_adapters_every_frozen_model_goes_to_the_device_with_its_head(init, root, tmp_path, monkeypatch):
    """The reward model shares its trunk with the critic; its head is its own and has to move, too."""
    moved, to = [], torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *args, **options: moved.append((module, args)) or to(module, *args, **options))
    reward_models = []
    monkeypatch.setattr(judges, "load_model", lambda *args, **options: reward_models.append(load_model(*args, **options)) or reward_models[-1])
    run("ppo", root, tmp_path / "run", f"--lora-rank 2 --critic-init {init} --steps 1")
    (reward_model, _), = reward_models
    assert (torch.device("cpu"),) in [args for module, args in moved if module is reward_model]


def test_ppos_frozen_models_may_lie_on_the_cpu_in_bf16(root, tmp_path):
    exact = run("ppo", root, tmp_path / "exact")
    rows = run("ppo", root, tmp_path / "run", "--frozen-dtype bfloat16 --frozen-device cpu")
    assert rows[0]["score"] == pytest.approx(exact[0]["score"], abs=0.1) and rows[0]["score"] != exact[0]["score"]
    assert abs(rows[0]["kl"]) < 0.5 and {p.dtype for p in weights(tmp_path / "run", GPT).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_a_run_that_saves_adapters_resumes_as_if_it_had_never_stopped(name, root, tmp_path):
    words = "--lora-rank 4 --lora-save adapter " + {"sft": "--lora-dropout 0.1 --checkpoint-activations", "dpo": "", "ppo": "--ema 0.5"}[name]
    whole = run(name, root, tmp_path / "whole", words)
    with stopped_in_the_second_step():
        run(name, root, tmp_path / "parts", words)
    assert run(name, root, tmp_path / "parts", words, "--resume") == whole
    for folder in [""] + ["ema"] * (name == "ppo"):
        assert not (tmp_path / "whole" / folder / "model.safetensors").exists()
        a, b = (weights(tmp_path / part / folder, GPT) for part in ("whole", "parts"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    run(name, root, tmp_path / "merged", words, "--lora-save merged")
    whole, merged = (weights(tmp_path / folder, GPT) for folder in ("whole", "merged"))
    assert all((whole[key] - merged[key]).abs().max() < 1e-6 for key in whole)
    assert name != "ppo" or any((a[key] - whole[key]).abs().max() > 1e-5 for key in a)  # the average lags behind the policy


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_starts_from_a_llama_ends_in_one_that_transformers_opens(name, root, tmp_path, peers):
    rows = run(name, root / "llama", tmp_path / "run", "--steps 6")
    kind = ScalarModel if name == "reward" else GPT
    model, _ = load_model(tmp_path / "run", kind)
    peer = open_with(auto(peers, kind), tmp_path / "run")
    ids = torch.where(ATTENTION.bool(), IDS, peer.config.pad_token_id)
    close(peer_outputs(peer, kind, ids), outputs(model, ids))
    before, after = weights(root / "llama" / "sft", GPT), model.state_dict()
    assert all(not torch.equal(p, after[key]) for key, p in before.items() if key in after) and len(rows) == 6
    if name != "ppo":
        assert rows[-1]["loss"] < rows[0]["loss"]
    assert peers.AutoTokenizer.from_pretrained(tmp_path / "run")("Say river.")["input_ids"] == toy.tokenizer().encode("Say river.")


@pytest.mark.case(14, 30)
@pytest.mark.parametrize("words, message", [
    ("--lora-save adapter", "--lora-save adapter needs a --lora-rank above 0"),
    ("--lora-rank 4 --lora-save adapter --out {root}/sft --overwrite", "would delete the --model"),
])
def test_adapters_that_could_not_be_saved_are_refused_at_the_start(root, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run("sft", root, tmp_path / "run", words.format(root=root))
    assert not (tmp_path / "run").exists()


def test_adapters_cannot_be_saved_alone_where_tokens_were_added(root, tmp_path, monkeypatch):
    def added(folder):
        tokenizer = copy.copy(toy.tokenizer())  # it is one object for all
        tokenizer.added = 3
        return tokenizer

    monkeypatch.setattr(model_folder, "open_tokenizer", added)
    with pytest.raises(UserError, match="lacks control tokens, .* use --lora-save merged"):
        run("sft", root, tmp_path / "run", "--lora-rank 4 --lora-save adapter")
    assert not (tmp_path / "run").exists()
    run("sft", root, tmp_path / "run", "--lora-rank 4 --steps 1")


# ---------------------------------------------------------------------------------------------------------
# What the mutants found untested

def test_dpo_with_adapters_resumes_against_the_reference_that_it_began_with(root, tmp_path):
    whole = run("dpo", root, tmp_path / "whole", "--lora-rank 4")
    with stopped_in_the_second_step():
        run("dpo", root, tmp_path / "parts", "--lora-rank 4")
    assert run("dpo", root, tmp_path / "parts", "--lora-rank 4", "--resume") == whole and whole[-1]["margin"] > 0.001
