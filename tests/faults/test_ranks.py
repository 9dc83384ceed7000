"""Several ranks that are stopped, die and stall; checkpoints that other settings, or more or fewer ranks, go
on from."""
import copy
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from plumbing import checkpoints
import tools
from tools import TOY
from plumbing.hardware import autocast
from model import GPT, ScalarModel, last_scores
from generate import generate
from plumbing.ranks import Ranks
from examples import TOKENIZER
from small_models import ATTENTION, IDS, LENGTHS, tiny_of

RUN = "--steps 24 --save-every 8 --micro-batch-tokens 200"


def sharded(folder):
    """The training state {name: tensor} that a checkpoint has in shards."""
    import torch.distributed.checkpoint as dcp
    index = dcp.FileSystemReader(folder / "shards").read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in index.items()}
    dcp.load(tensors, checkpoint_id=folder / "shards", no_dist=True)
    return tensors


def contents(out):
    """All tensors of a run's latest checkpoint, which is whole: (training state, model)."""
    folder = tools.latest(out)
    assert checkpoints.find_damage(folder) == ""
    in_shards = (folder / "shards").is_dir()
    training = sharded(folder) if in_shards else load_file(folder / "training.safetensors")
    return training, load_file(folder / "model.safetensors")


def equal(one, other):
    return all(a.keys() == b.keys() and len(a) and all(torch.equal(a[name], b[name]) for name in a)
               for a, b in zip(one, other))


def close(rows, others, tolerance):
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others):
        assert row == pytest.approx(other, rel=tolerance, abs=tolerance)


# -- signals

SLOW = """
import time
def passes(self, *args, original=runtime.Run.passes):
    for piece in original(self, *args):
        time.sleep(0.02)
        yield piece
def safe_point(self, original=runtime.Run.safe_point):
    try:
        original(self)
    except SystemExit as stopped:
        print(f"rank {self.rank} ends with {stopped.code} after step {self.step}", flush=True)
        raise
runtime.Run.passes, runtime.Run.safe_point = passes, safe_point
"""


@pytest.mark.case(5)
@pytest.mark.long
@pytest.mark.parametrize("script, parallel", [
    ("sft", "ddp"),
    ("sft", "fsdp"),
    ("ppo", "ddp"),
    ("ppo", "fsdp"),
])
def test_two_ranks_told_to_stop_end_at_one_step_and_go_on_as_if_nothing_had_been(
        script, parallel, root, tmp_path):
    words = f"{RUN} --parallel {parallel}"
    process = tools.start(script, root, words, f"--out {tmp_path}/run", hook=SLOW, launcher=tools.TORCHRUN)
    tools.wait_for(
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(tools.metrics(tmp_path / "run")) > 4,
        process)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    ends = re.findall(r"rank (\d) ends with (\d+) after step (\d+)", said)
    assert sorted((rank, code) for rank, code, _ in ends) == [("0", "143"), ("1", "143")], said
    assert len({step for *_, step in ends}) == 1, said
    step = int(ends[0][2])
    assert 3 < step < 24
    assert process.returncode
    assert f"stopped after step {step} of 24; the same command with --resume goes on" in said
    assert "error: " not in said
    assert tools.latest(tmp_path / "run").name == f"step_{step:06d}"
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing*"))
    contents(tmp_path / "run")
    said = tools.run(script, root, words, f"--out {tmp_path}/run --resume", launcher=tools.TORCHRUN)
    assert f"after step {step}" in said
    tools.run(script, root, words, f"--out {tmp_path}/whole", launcher=tools.TORCHRUN)
    assert equal(contents(tmp_path / "run"), contents(tmp_path / "whole"))
    assert tools.metrics(tmp_path / "run") == tools.metrics(tmp_path / "whole")


# -- a rank that dies or stalls

LOST = """
import os, time
def backward(self, *args, original=runtime.Run.backward):
    if self.step == 3 and self.rank == 1:
        (self.out / "lost").touch()
        {what}
    original(self, *args)
runtime.Run.backward = backward
"""


@pytest.mark.case(6)
@pytest.mark.parametrize("script, parallel, what", [
    ("sft", "ddp", "os._exit(3)"),
    pytest.param("sft", "fsdp", "os._exit(3)", marks=pytest.mark.long),
    pytest.param("ppo", "ddp", "os._exit(3)", marks=pytest.mark.long),
    pytest.param("sft", "ddp", "time.sleep(600)", marks=pytest.mark.long),
    pytest.param("sft", "fsdp", "time.sleep(600)", marks=pytest.mark.long),
    pytest.param("ppo", "ddp", "time.sleep(600)", marks=pytest.mark.long),
])
def test_a_rank_that_is_lost_ends_the_job_soon_is_named_and_costs_only_the_steps_since_the_last_checkpoint(
        script, parallel, what, root, tmp_path):
    words = f"--steps 6 --save-every 2 --parallel {parallel} --rank-timeout 10 --out {tmp_path}/run"
    said = tools.run(script, root, words, hook=LOST.format(what=what), launcher=tools.TORCHRUN, code=1)
    # Torchrun takes 30 s to give up one that sleeps.
    assert time.time() - (tmp_path / "run" / "lost").stat().st_mtime < (20 if "exit" in what else 55)
    line, = [line for line in said.splitlines() if line.startswith("error: ")]
    expected = ("error: rank 0 has lost the others in step 4 (--rank-timeout 10 s); "
                "the rank that died or stalled: 1. --resume goes on from the last checkpoint")
    assert line == expected
    assert tools.latest(tmp_path / "run").name == "step_000002"
    contents(tmp_path / "run")
    if what == "os._exit(3)" and script == "sft" and parallel == "fsdp":
        tools.run(script, root, words, "--resume", launcher=tools.TORCHRUN)
        assert tools.metrics(tmp_path / "run")[-1]["step"] == 6


@pytest.mark.case(6, 29)
@pytest.mark.long
def test_a_rank_that_runs_out_of_memory_says_so_and_the_other_names_it(root, tmp_path):
    hook = LOST.format(what="import torch; raise torch.OutOfMemoryError('CUDA out of memory')")
    words = f"--out {tmp_path}/run --steps 6 --save-every 2 --rank-timeout 10"
    said = tools.run("sft", root, words, hook=hook, launcher=tools.TORCHRUN, code=1)
    lines = sorted(line for line in said.splitlines() if line.startswith("error: "))
    expected = r"error: out of memory in step 4, pass 1 of 1 \(of \d+ examples\); lower --micro-batch-tokens"
    assert len(lines) == 2 and re.match(expected, lines[0]), said
    assert "the rank that died or stalled: 1. " in lines[1]
    contents(tmp_path / "run")


# -- numbers that are not finite, on one rank of two

FLAWED = """
import sys, types
seen = []
def score(prompts, replies):
    seen.append(len(replies))
    scores = [float(len(reply)) for reply in replies]
    if len(seen) == 4 and runtime.Run.current.rank == 1:
        scores[1] = float("nan")
    return scores
sys.modules["flawed"] = types.SimpleNamespace(score=score)
"""
INFINITE = """
def backward(self, loss, *args, original=runtime.Run.backward):
    original(self, loss * float("inf") if self.step == 2 and self.rank == 1 else loss, *args)
runtime.Run.backward = backward
"""
NAN = """
import torch
def optimizer_step(self, *args, original=runtime.Run.optimizer_step):
    norm = original(self, *args)
    if self.step == 1:
        with torch.no_grad():
            weight = next(iter(self.modules.values())).transformer.h[0].mlp.c_fc.weight
            bad = self.rank == 1 or self.mesh is None
            getattr(weight, "_local_tensor", weight)[-1] = float("nan") if bad else 1.0
    return norm
runtime.Run.optimizer_step = optimizer_step
"""


@pytest.mark.case(15)
@pytest.mark.long
@pytest.mark.parametrize("script, parallel, hook, code, named, steps", [
    ("ppo", "ddp", FLAWED, 0, "the score", [3]),
    ("ppo", "fsdp", FLAWED, 0, "the score", [3]),
    ("sft", "ddp", INFINITE, 0, "the gradient of policy.", [3]),
    ("reward", "fsdp", INFINITE, 0, "the gradient of reward.", [3]),
    ("sft", "ddp", NAN, 1, "the weight policy.transformer.h.0.mlp.c_fc.weight", [3, 4]),
    ("dpo", "fsdp", NAN, 1, "the weight policy.transformer.h.0.mlp.c_fc.weight", [3, 4]),
])
def test_what_is_not_finite_on_one_rank_is_skipped_by_both_and_named_wherever_it_is(
        script, parallel, hook, code, named, steps, root, tmp_path):
    words = "--reward-fn flawed:score" if script == "ppo" else "--eval-every 100"
    words = f"--out {tmp_path}/run --steps 6 --max-skipped 1 --parallel {parallel} {words}"
    said = tools.run(script, root, words, hook=hook, launcher=tools.TORCHRUN, code=code)
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps, rows
    assert all(row["why"].startswith(named) and row["examples"] for row in rows), rows
    assert len(re.findall("^warning: step", said, re.M)) == len(steps) and said.count("error: ") == code
    if code == 0:
        assert all(tensor.isfinite().all() for part in contents(tmp_path / "run") for tensor in part.values())
        assert tools.latest(tmp_path / "run").name == "step_000006"
    else:
        assert "and more than --max-skipped 1 batches were skipped" in said
        assert not (tmp_path / "run" / "model.safetensors").exists()


# -- other settings

@pytest.mark.case(26)
@pytest.mark.parametrize("script", [
    "sft",
    "ppo",
    *(pytest.param(script, marks=pytest.mark.long) for script in ("reward", "dpo", "kto")),
])
def test_resuming_with_other_settings_or_data_lists_them_all_and_takes_none_of_another_shape(
        script, root, tmp_path, capsys):
    rows = (root / "preferences.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:100]))
    batch = "--rollout-batch 16" if script == "ppo" else "--batch-tokens 512"
    words = f"--out {tmp_path}/run --data {tmp_path}/rows.jsonl --save-every 2"
    if script == "sft":
        words += f" --tokenizer {TOY}"
    assert tools.here(script, root, words, batch, "--steps 2") == 0

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = files()

    def refused(*said, without=(), change=""):
        capsys.readouterr()
        assert tools.here(script, root, words, batch, "--resume", change) == 2 and files() == before
        line, = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: --resume: "), line
        assert all(text in line for text in said), line
        assert not any(text in line for text in without), line

    both = (
        "--lr was",
        "is now 0.5",
        "--seed was 0, is now 3",
        f"{batch.split()[0]} was {batch.split()[1]}, is now 1024",
        "--steps was 2, is now 4",
    )
    many = f"--lr 0.5 --seed 3 --steps 4 {batch.split()[0]} 1024"
    refused(*both, "accept it with --override", change=many)
    change = "--max-grad-norm 2 --steps 2"
    refused("--max-grad-norm was 1.0, is now 2.0", without=("--lr", "--seed"), change=change)
    shape = "--width 64 --heads 4" if script == "sft" else "--lora-rank 2"
    shaped = ["--lora-rank was 0, is now 2"]
    if script == "sft":
        shaped = ["--width was 32, is now 64", "--heads was 2, is now 4"]
    for override in ("", "--override"):
        change = f"{shape} {many} {override}"
        refused("has another model: ", *shaped, "name another --out", without=("accept it",), change=change)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:99]))
    refused("what --data names has changed", without=("--lr",), change="--steps 2")
    refused("what --data names has changed", *both, change=many)
    assert tools.here(script, root, words, batch, "--resume --override", many) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in (*both, "what --data names has changed", "resumed", "after step 2"))
    assert tools.metrics(tmp_path / "run")[-1]["step"] == 4
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["lr"] == 0.5


@pytest.mark.case(26)
def test_what_only_says_how_and_where_to_compute_may_change_without_a_word(root, tmp_path, capsys):
    words = f"--out {tmp_path}/run --data {root}/preferences.jsonl --tokenizer {TOY}"
    assert tools.here("sft", root, words, "--steps 4 --save-every 2") == 0
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    (tmp_path / "other" / "checkpoints" / "latest.json").write_text('{"latest": "step_000002"}')
    other = "--save-every 1 --log-every 2 --checkpoint-activations --max-skipped 9 --rank-timeout 5"
    assert tools.here("sft", root, words, f"--out {tmp_path}/other --steps 4 --resume", other) == 0
    assert "going on with other settings" not in capsys.readouterr().out
    assert equal(contents(tmp_path / "run"), contents(tmp_path / "other"))


# -- other ranks

STOP_AT_ONCE = """
import signal
def begin(self, *args, original=runtime.Run.begin, **options):
    begun = original(self, *args, **options)
    self.saved, self.stop_signal = None, signal.SIGTERM
    return begun
runtime.Run.begin = begin
"""


@pytest.mark.case(27)
@pytest.mark.long
@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_a_checkpoint_goes_from_shards_to_one_process_and_back_without_losing_a_bit(script, root, tmp_path):
    """Each run resumes a copy of what the one before saved, and is stopped before its first step: what it
    saves is what it has read."""
    words = "--steps 6 --micro-batch-tokens 200"
    tools.run(script, root, words, f"--out {tmp_path}/0 --parallel fsdp --steps 3", launcher=tools.TORCHRUN)
    launchers = {
        "one": ({}, ""),
        "fsdp": ({"launcher": tools.TORCHRUN}, "--parallel fsdp"),
        "ddp": ({"launcher": tools.TORCHRUN}, ""),
    }
    for number, kind in enumerate(("one", "fsdp", "one", "fsdp", "ddp", "fsdp"), start=1):
        shutil.copytree(tmp_path / str(number - 1), tmp_path / str(number))
        options, flag = launchers[kind]
        resumed = f"--out {tmp_path}/{number} --resume --override {flag}"
        tools.run(script, root, words, resumed, hook=STOP_AT_ONCE, code=None, **options)
        assert (tools.latest(tmp_path / str(number)) / "shards").is_dir() == (kind == "fsdp")
        same = equal(contents(tmp_path / str(number)), contents(tmp_path / "0"))
        assert same, f"{kind} has changed something"
    assert sum(tensor.abs().sum() > 0 for name, tensor in contents(tmp_path / "0")[0].items()
               if "exp_avg" in name) > 20


@pytest.mark.case(26, 27)
@pytest.mark.long
@pytest.mark.parametrize("script", ["sft", "ppo"])
def test_training_goes_on_across_other_numbers_of_ranks_as_if_there_had_been_one(script, root, tmp_path):
    words = "--steps 8 --micro-batch-tokens 200 --save-every 4"
    two = {"launcher": tools.TORCHRUN}
    kinds = {"one": ({}, ""), "ddp": (two, ""), "fsdp": (two, "--parallel fsdp")}
    for kind, (options, flag) in kinds.items():
        tools.run(script, root, words, flag, f"--out {tmp_path}/{kind}", **options)
    for before, after in (("fsdp", "one"), ("one", "fsdp"), ("ddp", "one"), ("one", "ddp"), ("ddp", "fsdp")):
        out, (options, flag) = tmp_path / f"{before}-{after}", kinds[after]
        shutil.copytree(tmp_path / before, out)
        (out / "checkpoints" / "latest.json").write_text('{"latest": "step_000004"}')
        said = tools.run(script, root, words, flag, f"--out {out} --resume", **options)
        count = {"one": 1}
        changed = f"going on with other settings: {count.get(before, 2)} processes, now {count.get(after, 2)}"
        assert (changed in said) == (count.get(before, 2) != count.get(after, 2)) and "after step 4" in said
        close(tools.metrics(out), tools.metrics(tmp_path / "one"), 2e-4)


# -- shards in a GPU's precision

FAMILIES = ("gpt2", "llama3", "smollm2", "mistral", "qwen2", "qwen3", "opt", "opt-350m")

@pytest.fixture
def alone():
    """The ranks of a run with --parallel fsdp --dtype bfloat16 that is one process."""
    ranks = Ranks()
    ranks.device, ranks.dtype, ranks.step = torch.device("cpu"), torch.bfloat16, 0
    ranks.join(sharded=True, timeout=60)
    yield ranks
    dist.destroy_process_group()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.case(25)
@pytest.mark.parametrize("name", FAMILIES)
def test_shards_gathered_in_bfloat16_train_and_generate_as_if_the_weights_were_rounded(name, alone):
    model = tiny_of(GPT, name)
    rounded, sharded = copy.deepcopy(model), alone.parallel(copy.deepcopy(model))
    with torch.no_grad():
        for p in rounded.transformer.h.parameters():
            p.copy_(p.bfloat16())
    mask = ATTENTION.bool()
    mask[:, 0] = False
    logprobs, gradients, replies = {}, {}, {}
    for kind, one in (("exact", model), ("rounded", rounded), ("sharded", sharded)):
        with autocast(alone.device, alone.dtype):
            logprobs[kind] = one(IDS, mask)[0]
        (-logprobs[kind].sum() / mask.sum()).backward()
        gradients[kind] = torch.cat([whole(p.grad).flatten() for p in one.parameters()])
        with alone.gathered(one), autocast(alone.device, alone.dtype):
            replies[kind] = generate(one, [[3, 1, 4], [1], [5, 9, 2, 6]], 12, TOKENIZER, temperature=0).ids
    assert {p.dtype for p in sharded.parameters()} == {gradients["sharded"].dtype} == {torch.float32}
    torch.testing.assert_close(logprobs["sharded"], logprobs["rounded"], atol=1e-5, rtol=0)
    assert replies["sharded"].equal(replies["rounded"])
    # Rounding the weights is all that happened to them: eight bits are good for a two-hundredth.
    assert (logprobs["sharded"] - logprobs["exact"]).abs().max() < 0.1
    for kind, most in (("rounded", 0.01), ("exact", 0.1)):
        assert (gradients["sharded"] - gradients[kind]).norm() < most * gradients[kind].norm()


@pytest.mark.case(25)
@pytest.mark.parametrize("name", ["gpt2", "llama3", "opt-350m"])
def test_shards_gathered_in_bfloat16_score_as_if_the_weights_were_rounded(name, alone):
    model = tiny_of(ScalarModel, name)
    sharded = alone.parallel(copy.deepcopy(model))
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            p.copy_(p.bfloat16())
        with autocast(alone.device, alone.dtype):
            scores, expected = (last_scores(one, IDS, LENGTHS) for one in (sharded, model))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.case(25)
def test_a_pytorch_whose_shards_add_up_wrongly_on_a_cpu_is_refused(root, tmp_path):
    older = "from torch.distributed.fsdp import FSDPModule\ndel FSDPModule.set_force_sum_reduction_for_comms"
    said = tools.run("sft", root, f"--out {tmp_path}/run --steps 2 --parallel fsdp", hook=older, code=2)
    assert re.fullmatch(r"error: --parallel fsdp on a CPU needs PyTorch 2\.8 or newer, this is .*\n", said)
    assert not (tmp_path / "run").exists()
