"""What holds for every trainer: a step by its formula, however it is cut; parts of files; losses that are not
finite."""
import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import model
import tools
from data import encode_group
from formats.model_folder import load_model
from formats.sources import read_rows, split_by_prompt
from plumbing import ranks, run as runtime, steps as steps_file
from plumbing.flags import UserError
from tools import (
    ALL_AT_ONCE, QUICK, SAMPLERS, SCRIPTS, TINY_RUN, TOY, TRAINERS, command, reply_logprob, rows_of, run_here)


# -- whole steps, by hand

def formula(name, network, reference, tokenizer, folder):
    """The loss of a whole data file, every reply alone."""
    rows = read_rows(folder / ("demonstrations.json" if name == "sft" else "rankings.json"),
                     "demonstrations" if name == "sft" else "preferences", str)
    groups = [[(torch.tensor(ids), torch.tensor(mask)) for ids, mask in encode_group(tokenizer, row)]
              for row in rows]
    if name == "sft":
        tokens = sum(group[0][1].sum() for group in groups)
        return -sum(reply_logprob(network, *group[0]) for group in groups) / tokens
    total = 0.0
    for row, group in zip(rows, groups):
        if name == "reward":
            scores, margin = [network(ids[None])[0, -1] for ids, _ in group], row.margin
        else:
            scores = [
                0.3 * (reply_logprob(network, *example) - reply_logprob(reference, *example).detach())
                for example in group
            ]
            margin = 0.0
        pairs = [(w, l) for w, a in zip(scores, row.ranks) for l, b in zip(scores, row.ranks) if a < b]
        total = total + sum((1 + torch.exp(l - w + margin)).log() for w, l in pairs) / len(pairs) / len(rows)
    return total


@pytest.mark.case(24, 25)
@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_a_step_follows_the_formula_taken_one_reply_at_a_time(name, small, tmp_path, monkeypatch):
    """Loss and gradient of the second step; a batch is all rows, in several pieces."""
    networks, steps, original = [], [], runtime.Run.optimizer_step

    def adamw(network, *args):
        networks.append(network)
        return steps_file.adamw(network, *args)

    def optimizer_step(self, *args):
        steps.append((copy.deepcopy(networks[0].state_dict()), {
            key: copy.deepcopy(p.grad)
            for key, p in networks[0].named_parameters()
        }))
        return original(self, *args)

    monkeypatch.setattr(SCRIPTS[name], "adamw", adamw)
    monkeypatch.setattr(runtime.Run, "optimizer_step", optimizer_step)
    file = "demonstrations" if name == "sft" else "rankings"
    run_here(name, f"{ALL_AT_ONCE} --model {small}/sft --data {small}/{file}.json --out {tmp_path}/run",
             "--micro-batch-tokens 80 --lr 0.01 --steps 2")
    (weights, gradient), network = steps[1], networks[0].eval()
    network.load_state_dict(weights)
    loss = formula(name, network, *load_model(small / "sft", model.GPT), small)
    loss.backward()
    assert rows_of(tmp_path / "run")[1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for key, p in network.named_parameters():
        torch.testing.assert_close(gradient[key],
                                   p.grad,
                                   rtol=1e-3,
                                   atol=1e-5,
                                   msg=lambda text: f"{key}: {text}")


@pytest.mark.case(21, 25)
@pytest.mark.parametrize("name, lost", [
    ("sft", ("loss", "grad_norm")),
    ("reward", ("loss", "grad_norm")),
    ("dpo", ("loss", "grad_norm")),
    ("ppo", ("ptx_loss",)),
    ("kto", ("loss", "grad_norm")),
])
def test_a_rank_that_gets_no_examples_adds_nothing(name, lost, small, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.Run, "split", lambda _, examples, *rest: ranks.fill_up([], 2, examples[:1]))
    flags = {
        "sft": f"{ALL_AT_ONCE} --data {small}/demonstrations.json",
        "reward": f"{ALL_AT_ONCE} --data {small}/rankings.json",
        "ppo": f"--data {small}/prompts.json --reward {small}/reward {QUICK['ppo']} --ptx-coef 1 --ptx-data "
               f"{small}/demonstrations.json --threads 1",
    }
    run_here(name, flags.get(name, flags["reward"]), f"--model {small}/sft --steps 1 --out {tmp_path}/run")
    row, = rows_of(tmp_path / "run")
    assert all(row[key] == 0 for key in lost)


# -- however a step is cut

@pytest.mark.case(25)
@pytest.mark.parametrize("name", TRAINERS)
def test_micro_batches_change_neither_loss_nor_gradient_nor_metrics(name, flags, tmp_path):
    """One forward per step or a dozen, with other padding in each: the same numbers."""
    for budget in (100, 10_000):
        run_here(name, flags[name], f"--out {tmp_path}/{budget} --micro-batch-tokens {budget} --steps 2")
    for small, large in zip(tools.metrics(tmp_path / "100"), tools.metrics(tmp_path / "10000"), strict=True):
        for row in (small, large):  # what rounding decides: ties, and the size of rounding itself
            for key in [key for key in row if key.endswith(("accuracy", "clip_fraction", "ratio_error"))]:
                del row[key]
        assert small == pytest.approx(large, rel=2e-3, abs=2e-5)


@pytest.mark.case(25)
# The gradients of all of them are compared in tests/faults/test_equivalence.py every time.
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", [
    name if name in ("sft", "ppo") else pytest.param(name, marks=pytest.mark.long) for name in TRAINERS
])
def test_two_ranks_train_as_one_does(name, parallel, flags, small, tmp_path):
    """PPO: the least score, the moments, the whitening and all counts are those of both ranks, and a reply
    hangs on its own draws alone."""
    words = flags[name]
    if name in SAMPLERS:
        own = {"ppo": "--critic-lr 0.01 --reward-norm scale --entropy-coef 0.01",
               "grpo": "--group 3 --preset dapo --epochs 2 --kl-coef 0.1 --overlong floor"}[name]
        words = (f"--model {small}/sft --data {small}/prompts.json --reward {small}/reward --threads 1 "
                 f"--rollout-batch 8 --minibatches 2 --warmup 1 --lr 0.01 --max-new-tokens 8 {own}")
    two = command(
        name,
        words,
        f"--out {tmp_path}/two --steps 2 --micro-batch-tokens {30 if name in SAMPLERS else 100} "
        f"--parallel {parallel}",
        launcher=tools.TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    run_here(name, words, f"--out {tmp_path}/one --steps 2")
    rows = tools.metrics(tmp_path / "one")
    assert [row["step"] for row in rows] == [1, 2] if name in SAMPLERS else [0, 1, 2, 2]
    for one, other in zip(rows, tools.metrics(tmp_path / "two"), strict=True):
        # What rounding decides: ties (policy and reference at first), and the size of rounding itself.
        for row in (one, other):
            for key in [
                    key for key in row if key.endswith(("accuracy", "accuracy_low", "accuracy_high",
                                                        "clip_fraction", "ratio_error"))
            ]:
                del row[key]
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert name not in SAMPLERS or 0 < one["eos_rate"] < 1


# -- losses that are not finite, folders that are there, parts of files

@pytest.mark.case(15)
def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_the_second_time_if_one_may_be_skipped(
        flags, tmp_path, capsys):
    message = ("step 3: the gradient of policy.* is not finite, "
               "and more than --max-skipped 1 batches were skipped")
    with pytest.raises(runtime.Fault, match=message):
        run_here(
            "sft", flags["sft"],
            f"--out {tmp_path}/run --lr 1e30 --warmup 1 --max-grad-norm 1e30 --max-skipped 1 --save-every 1")
    assert capsys.readouterr().out.count("this batch changed nothing") == 2
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [2, 3] and all(row["examples"] for row in skipped)
    assert tools.latest(tmp_path / "run").name == "step_000003"
    before, after = (load_file(tmp_path / "run" / "checkpoints" / f"step_00000{step}" / "model.safetensors")
                     for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.case(14)
def test_overwrite_replaces_a_run_and_deletes_neither_its_inputs_nor_other_files(flags, tmp_path):
    run_here("sft", flags["sft"], f"--out {tmp_path}/run --steps 2")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no such file"):
        run_here("sft", TINY_RUN, f"--out {tmp_path}/run --overwrite --data nowhere.json")
    with pytest.raises(UserError, match="would delete the --model"):
        run_here("sft", f"--out {tmp_path}/run --overwrite --model {tmp_path}/run")
    assert rows_of(tmp_path / "run")[-1]["step"] == 2
    run_here("sft", flags["sft"], f"--out {tmp_path}/run --steps 1 --overwrite")
    assert rows_of(tmp_path / "run")[-1]["step"] == 1 and (tmp_path / "run" / "notes.txt").exists()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_000001"]


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_training_takes_its_part_of_a_file_and_holds_prompts_out(name, tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps([{"prompt": f"Cube {i}.", "chosen": "Yes.", "rejected": "No."} for i in range(60)]))
    run_here(name, f"{TINY_RUN} --tokenizer {TOY} --model scratch --data {path} --out {tmp_path}/run",
             "--part 1/2:2 --val-fraction 0.3 --steps 1 --batch-tokens 100")
    rows = split_by_prompt(read_rows(path, "preferences", str, "1/2:2"), 0.3)
    kept, held_out = map(len, rows)
    assert 5 < held_out < kept < 45
    said = capsys.readouterr().out
    trained = f"{kept} training and {held_out} held-out examples"
    sampled = f"{kept} prompts to train on and {held_out} held out"
    assert trained in said or sampled in said
