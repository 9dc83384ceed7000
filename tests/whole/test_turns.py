"""Several turns: grpo.py with a tool that answers, from files to what is learned; stopped, on two ranks, with
adapters."""
import json

import pytest
import torch

import grpo
import rollout
import tools
from formats.model_folder import load_model
from model import GPT
from plumbing.flags import UserError
from tools import exit_code, quietly, reply_logprob, rows_of, run_here, stopped_in_the_second_step

TOOL = "--reward-fn sums:right --tool sums:calculator --max-new-tokens 26 --threads 1"
FEW = f"{TOOL} --rollout-batch 4 --group 4 --minibatches 2 --kl-coef 0.05 --lr 0.003 --warmup 1"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with the task's files and a policy that has seen the demonstrations, a third of whose replies
    are right.
    """
    root = tmp_path_factory.mktemp("turns")
    with quietly():
        run_here("sums", f"--calculator --hasty 0.4 --terms 3 --sums 600 --heldout-sums 60 --out {root}/sums")
        run_here("sft", f"--data {root}/sums/demonstrations.jsonl --val-fraction 0 --batch-tokens 1024",
                 "--layers 1 --heads 2 --width 64 --block-size 48 --lr 0.01 --steps 150 --threads 1",
                 f"--out {root}/sft")
    return root


def train(root, out, *flags):
    run_here("grpo", f"--model {root}/sft --data {root}/sums/prompts.jsonl --out {out}", *flags)


def test_a_policy_learns_to_ask_the_calculator_for_every_step(task, tmp_path):
    train(task, tmp_path / "grpo", TOOL, "--lr 0.003 --steps 40 --rollout-batch 16")
    run_here("evaluate", f"--models {task}/sft {tmp_path}/grpo --data {task}/sums/prompts_heldout.jsonl",
             "--judge sums:right --tool sums:calculator --max-new-tokens 26 --samples 4 --threads 1",
             f"--out {tmp_path}/results.json")
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    before, after = (found[f"{folder}"] for folder in (task / "sft", tmp_path / "grpo"))
    assert before["right"] < 0.45 and after["right"] > before["right"] + 0.25
    # Without the calculator neither has a sum to say.
    with quietly():
        run_here("evaluate", f"--models {tmp_path}/grpo --data {task}/sums/prompts_heldout.jsonl --threads 1",
                 f"--judge sums:right --max-new-tokens 26 --out {tmp_path}/alone.json")
    alone, = json.loads((tmp_path / "alone.json").read_text())["results"].values()
    assert alone["right"] < 0.1


def test_log_probabilities_and_the_loss_are_those_of_what_the_policy_said_alone(task, tmp_path, monkeypatch):
    seen = tools.recorded(monkeypatch, grpo, "sample", "policy_loss")
    train(task, tmp_path / "run", FEW, "--steps 1 --minibatches 1 --micro-batch-tokens 100000")
    batch = seen["sample"][0][1]
    (logprobs, _, _, mask, weights, *_), _ = seen["policy_loss"][0]
    policy, tokenizer = load_model(task / "sft", GPT)
    one_by_one = [reply_logprob(policy, *row).item() for row in zip(batch.ids, batch.mask)]
    assert logprobs[mask].sum().item() == pytest.approx(sum(one_by_one), rel=1e-4)
    # Every turn of the policy counts with its end token, which only the last of a conversation may lack.
    for ids, counted, turns, ended in zip(batch.ids, batch.mask, batch.turns, batch.ended):
        said = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        own = ids[counted].tolist()
        assert tokenizer.decode(own) == "".join(said)
        assert own.count(tokenizer.eos) == len(said) or not ended
    assert mask.sum() == batch.mask.sum() and max(map(len, batch.turns)) > 3
    assert weights.unique().item() == pytest.approx(1 / (26 * 16))


@pytest.mark.parametrize("advantage", ["mean", "greedy"])
def test_resume_after_an_interrupt_equals_never_stopping(advantage, task, tmp_path):
    flags = f"{FEW} --steps 3 --advantage {advantage}"
    train(task, tmp_path / "whole", flags)
    with stopped_in_the_second_step():
        train(task, tmp_path / "parts", flags)
    train(task, tmp_path / "parts", flags, "--resume")
    assert tools.same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.case(33)
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_ranks_train_as_one_does(parallel, task, tmp_path):
    words = (f"--model {task}/sft --data {task}/sums/prompts.jsonl {FEW} --steps 2 --advantage greedy "
             "--overlong linear --epochs 2")
    two = tools.command("grpo", words, f"--out {tmp_path}/two --micro-batch-tokens 100 --parallel {parallel}",
                        launcher=tools.TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    run_here("grpo", words, f"--out {tmp_path}/one")
    for one, other in zip(tools.metrics(tmp_path / "one"), tools.metrics(tmp_path / "two"), strict=True):
        for row in (one, other):
            for key in ("clip_fraction", "ratio_error"):
                row.pop(key, None)
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
        assert one["length"] > 8


def test_adapters_are_trained_over_several_turns(task, tmp_path):
    train(task, tmp_path / "run", FEW, "--steps 3 --lora-rank 4 --lr 0.02")
    before, after = (load_model(folder, GPT)[0].state_dict() for folder in (task / "sft", tmp_path / "run"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".h." in name for name in changed)
    assert all(0 < row["length"] for row in rows_of(tmp_path / "run"))


def test_the_likeliest_reply_of_remax_has_several_turns_too(task, tmp_path, monkeypatch):
    seen = tools.recorded(monkeypatch, rollout, "sample")
    monkeypatch.setattr(grpo, "sample", rollout.sample)
    train(task, tmp_path / "run", FEW, "--preset remax --steps 1")
    sampled, likeliest = (batch for _, batch in seen["sample"])
    assert len(sampled.texts) == 16 and len(likeliest.texts) == 4
    assert max(map(len, sampled.turns)) > 1 and max(map(len, likeliest.turns)) > 1


def test_what_a_tool_takes_of_the_room_counts_as_overlong():
    """--overlong linear grows with all that --max-new-tokens bounds."""
    batch = rollout.Rollout(
        prompts=[rollout.Prompt(None, [1, 2])] * 2, texts=["", ""], ids=torch.zeros(2, 12, dtype=torch.long),
        mask=torch.tensor([[0] * 2 + [1] * 2 + [0] * 6 + [1] * 2, [0] * 2 + [1] * 4 + [0] * 6]).bool(),
        ended=torch.tensor([True, True]), host_mask=None, host_lengths=torch.tensor([12, 6]), sizes=[12, 6],
        steps=None, host_steps=None)
    config = grpo.Config(overlong="linear", max_new_tokens=10, overlong_tokens=4, overlong_penalty=1.0)
    shaped = grpo.shaped_scores(None, config, None, batch, torch.tensor([1.0, 1.0]), 0.0)
    assert shaped.tolist() == [0.0, 1.0]


MINE = """
def strange(replies):
    return ["x"] * (len(replies) + 1)

def fails(replies):
    if replies != ["a trial"]:
        raise ValueError("no calculator today")
    return [None]

def asked(replies, dialogues):
    return [float(sum(turn["role"] == "assistant" for turn in talk)) for talk in dialogues]
"""


def test_functions_get_whole_conversations_of_at_most_as_many_turns_as_are_asked_for(
        task, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    for turns in (2, 3):
        train(task, tmp_path / f"run{turns}", FEW, f"--steps 2 --judge mine:asked --turns {turns}")
        assert all(1 < row["asked"] <= turns for row in rows_of(tmp_path / f"run{turns}"))
    assert rows_of(tmp_path / "run3")[0]["asked"] > 2


@pytest.mark.parametrize("flags, message", [
    ("--tool mine:strange", "--tool mine:strange must return a list that has a text or None for each of 1"),
    ("--tool mine:fails", "--tool mine:fails failed (ValueError: no calculator today)"),
    ("--tool mine:missing", "--tool mine:missing can't be imported"),
    ("--tool sums", "--tool sums: write module:function"),
    ("--tool sums:calculator --turns 1", "--turns 1 leaves --tool nothing to answer"),
    ("--tool sums:calculator --rollouts replies.jsonl", "--tool is for replies sampled here"),
])
def test_a_tool_that_cannot_be_used_ends_the_run_in_one_line(
        flags, message, task, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    words = f"--model {task}/sft --data {task}/sums/prompts.jsonl --out {tmp_path}/run {FEW} --steps 1"
    assert exit_code("grpo", words, flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1] and "Traceback" not in "".join(error)
    assert not (tmp_path / "run" / "model.safetensors").exists()
