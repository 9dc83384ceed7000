"""Whole runs with low-rank adapters: what changes, what is saved, and what they resume from."""
import contextlib
import copy
import io
import json
import re

import pytest
import torch
from safetensors.torch import load_file

import judges
import model as model_file
import tools
import toy
from formats import model_folder
from formats.model_folder import load_model, save_model
from model import GPT, ScalarModel
from plumbing.flags import UserError
from small_models import ATTENTION, IDS, auto, close, open_with, outputs, peer_outputs, tiny_of
from tools import SAMPLERS, SCRIPTS, TRAINERS, run_here, stopped_in_the_second_step


PLAN = dict.fromkeys(
    ("sft", "reward", "dpo", "kto"),
    "--batch-tokens 256 --val-fraction 0") | {
        "process": "--step-separator ' ' --batch 4 --val-fraction 0",
        "ppo": "--rollout-batch 8 --minibatches 2 --max-new-tokens 8",
        # No reply ends: their scores are to differ all the same.
        "grpo": "--rollout-batch 8 --group 4 --max-new-tokens 8 --kl-coef 0.1 --overlong keep",
    }
DATA = {"sft": "demonstrations", "reward": "pairs", "dpo": "pairs", "kto": "pairs", "process": "steps",
        "ppo": "prompts", "grpo": "prompts"}


def run(name, root, out, *flags, model="sft"):
    """Run a trainer on a folder's models and files; its metrics without timings."""
    inputs = f"--model {root}/{model} --data {root}/{DATA[name]}.json"
    words = f"{inputs} --lr 0.01 --warmup 1 --steps 3 --threads 1 --out {out} {PLAN[name]}"
    with contextlib.redirect_stdout(io.StringIO()):
        run_here(name, words, f"--reward {root}/reward" * (name in SAMPLERS), *flags)
    return tools.metrics(out)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a tiny GPT-2, a tiny Llama, a reward model of each, and the files to train on."""
    root = tmp_path_factory.mktemp("lora")
    prompts = [f"Say {word}." for word in ("river", "stone", "apple", "window")]
    for name, rows in {
            "prompts": [{"prompt": p} for p in prompts],
            "demonstrations": [{"instruction": p, "output": "It is good."} for p in prompts],
            "pairs": [{"prompt": p, "chosen": "It is good.", "rejected": "No."} for p in prompts],
            "steps": [{"prompt": p, "steps": ["It", "is", "good."], "labels": [1, 0, -1]} for p in prompts]
    }.items():
        (root / f"{name}.json").write_text(json.dumps(rows))
    tokenizer = toy.tokenizer()
    ids = {
        "vocab_size": tokenizer.n_vocab,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "bos_token_id": tokenizer.eos,
    }
    for kind, suffix in ((GPT, "sft"), (ScalarModel, "reward")):
        save_model(root / suffix, tiny_of(kind, **ids), tokenizer)
        save_model(root / "llama" / suffix, tiny_of(kind, "llama3", **ids), tokenizer)
    for name in DATA.values():
        (root / "llama" / f"{name}.json").write_bytes((root / f"{name}.json").read_bytes())
    return root


def kind_of(name):
    """Class and labels of what a trainer makes."""
    return {"reward": (ScalarModel, 1), "process": (ScalarModel, 3)}.get(name, (GPT, 1))


def weights(folder, kind, labels=1):
    return load_model(folder, kind, labels=labels)[0].state_dict()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_with_adapters_changes_matrices_by_their_rank_and_nothing_else(name, root, tmp_path):
    rows = run(name, root, tmp_path / "run", "--lora-rank 4")
    kind, labels = kind_of(name)
    after, before = weights(tmp_path / "run", kind, labels), weights(root / "sft", GPT)
    assert len(rows) == 3
    for key, p in before.items():
        if re.search(r"c_\w+\.weight$", key):
            values = torch.linalg.svdvals(after[key] - p)
            assert values[0] > 1e-4 and values[4] < 1e-3 * values[0], key
        elif key != "transformer.ln_f.bias" or kind is GPT:  # where a reward model's shift is
            assert torch.equal(after[key], p), key
    assert any(".lora_A" in key for key in load_file(tools.latest(tmp_path / "run") / "training.safetensors"))


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_a_reference_that_is_the_model_without_its_adapters_equals_one_of_its_own(
        name, root, tmp_path, monkeypatch):
    words = "--lora-rank 4 --lora-alpha 32"
    if name == "ppo":
        words += " --kl-coef 0.5 --critic-init sft"
    shared = run(name, root, tmp_path / "shared", words)
    for owner in (model_file, SCRIPTS[name]):
        if hasattr(owner, "shares_frozen"):
            monkeypatch.setattr(owner, "shares_frozen", lambda config: False)
    apart = run(name, root, tmp_path / "apart", words)
    assert all(a == pytest.approx(b, rel=1e-6, abs=1e-6) for a, b in zip(shared, apart)) and len(shared) == 3
    # The policy has left the reference.
    assert shared[-1]["margin"] > 0.01 if name == "dpo" else shared[-1]["kl"] > 0.001
    a, b = (weights(tmp_path / folder, GPT) for folder in ("shared", "apart"))
    assert all((a[key] - b[key]).abs().max() <= 1e-6 for key in a)


@pytest.mark.parametrize("init", ["reward", "sft"])
def test_with_adapters_every_frozen_model_goes_to_the_device_with_its_head(init, root, tmp_path, monkeypatch):
    """The reward model shares its trunk with the critic; its head is its own and has to move, too."""
    moved, to = [], torch.nn.Module.to
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda module, *args, **options: moved.append(
            (module, args)) or to(module, *args, **options))
    reward_models = []
    monkeypatch.setattr(
        judges, "load_model",
        lambda *args, **options: reward_models.append(load_model(*args, **options)) or reward_models[-1])
    run("ppo", root, tmp_path / "run", f"--lora-rank 2 --critic-init {init} --steps 1")
    (reward_model, _), = reward_models
    assert (torch.device("cpu"),) in [args for module, args in moved if module is reward_model]


def test_ppos_frozen_models_may_lie_on_the_cpu_in_bf16(root, tmp_path):
    exact = run("ppo", root, tmp_path / "exact")
    rows = run("ppo", root, tmp_path / "run", "--frozen-dtype bfloat16 --frozen-device cpu")
    assert rows[0]["score"] == pytest.approx(exact[0]["score"], abs=0.1)
    assert rows[0]["score"] != exact[0]["score"]
    assert abs(rows[0]["kl"]) < 0.5
    assert {p.dtype for p in weights(tmp_path / "run", GPT).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["sft", "dpo", "ppo"])
def test_a_run_that_saves_adapters_resumes_as_if_it_had_never_stopped(name, root, tmp_path):
    words = "--lora-rank 4 --lora-save adapter " + {
        "sft": "--lora-dropout 0.1 --checkpoint-activations", "dpo": "", "ppo": "--ema 0.5"
    }[name]
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
    # The average lags behind the policy.
    assert name != "ppo" or any((a[key] - whole[key]).abs().max() > 1e-5 for key in a)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_that_starts_from_a_llama_ends_in_one_that_transformers_opens(name, root, tmp_path, peers):
    rows = run(name, root / "llama", tmp_path / "run", "--steps 6")
    kind, labels = kind_of(name)
    model, _ = load_model(tmp_path / "run", kind, labels=labels)
    peer = open_with(auto(peers, kind), tmp_path / "run")
    ids = torch.where(ATTENTION.bool(), IDS, peer.config.pad_token_id)
    close(peer_outputs(peer, kind, ids), outputs(model, ids))
    before, after = weights(root / "llama" / "sft", GPT), model.state_dict()
    assert all(not torch.equal(p, after[key]) for key, p in before.items() if key in after) and len(rows) == 6
    if name not in SAMPLERS:
        assert rows[-1]["loss"] < rows[0]["loss"]
    assert peers.AutoTokenizer.from_pretrained(
        tmp_path / "run")("Say river.")["input_ids"] == toy.tokenizer().encode("Say river.")


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


def test_dpo_with_adapters_resumes_against_the_reference_that_it_began_with(root, tmp_path):
    whole = run("dpo", root, tmp_path / "whole", "--lora-rank 4")
    with stopped_in_the_second_step():
        run("dpo", root, tmp_path / "parts", "--lora-rank 4")
    assert run("dpo", root, tmp_path / "parts", "--lora-rank 4", "--resume") == whole
    assert whole[-1]["margin"] > 0.001
