"""The scripts as their users meet them: in subprocesses and whole runs, with mistakes, interrupts and several ranks."""
import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import chat
import dpo
import evaluate
import model
import ppo
import report
import reward
import runtime
import sft
import toy
from data import encode_prompt

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "evaluate": evaluate, "chat": chat, "toy": toy, "report": report}
TRAINERS = ("sft", "reward", "ppo", "dpo")
TINY = "--layers 1 --heads 2 --width 32 --block-size 64 --threads 1"
PLAN = {"sft": "--batch-tokens 512 --eval-every 2", "reward": "--batch-tokens 512 --eval-every 2", "dpo": "--batch-tokens 512 --eval-every 2",
        "ppo": "--rollout-batch 16 --minibatches 2 --max-new-tokens 12 --sample-every 2"}


def command(script, *flags, launcher=(sys.executable,), **options):
    """Run a script in a subprocess; flags may be strings of several words."""
    words = [word for flag in flags for word in shlex.split(str(flag))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*launcher, str(ROOT / f"{script}.py"), *words], capture_output=True, text=True, env=environment, timeout=240, **options)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    return [{k: v for k, v in row.items() if "per_second" not in k} for row in rows]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with a three-step run of every stage, each in a subprocess; the outputs by stage."""
    root, said = tmp_path_factory.mktemp("chain"), {}

    def run(stage, *flags):
        done = command(stage, *flags)
        assert done.returncode == 0, f"{stage}: {done.stderr}"
        said[stage] = done.stdout

    run("sft", TINY, PLAN["sft"], f"--out {root}/sft --steps 3")
    run("toy", f"--model {root}/sft --out {root}/preferences --groups 200 --heldout-groups 40 --samples 2 --max-new-tokens 12 --threads 1")
    files = f"--data {root}/preferences/train.jsonl --val-data {root}/preferences/heldout.jsonl --model {root}/sft --threads 1 --steps 3"
    run("reward", files, PLAN["reward"], f"--demonstrations toy --out {root}/reward")
    run("ppo", f"--model {root}/sft --reward {root}/reward --threads 1 --steps 3 --out {root}/ppo", PLAN["ppo"])
    run("dpo", files, PLAN["dpo"], f"--out {root}/dpo")
    run("evaluate", f"--models {root}/sft {root}/ppo {root}/dpo --out {root}/evaluation.json --prompts 20 --max-new-tokens 12 --threads 1")
    run("report", f"--demo {root} --seconds 12")
    return root, said


@pytest.fixture
def flags(chain):
    """Flags of each trainer for runs in this process, on the chain's files."""
    root = chain[0]
    files = f"--data {root}/preferences/train.jsonl --val-data {root}/preferences/heldout.jsonl --model {root}/sft"
    inputs = {"sft": TINY, "reward": files, "dpo": files, "ppo": f"--model {root}/sft --reward {root}/reward"}
    return {name: f"{inputs[name]} {PLAN[name]} --threads 1 --steps 4" for name in TRAINERS}


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def run_here(name, *flags):
    """Run a trainer in this process."""
    script = SCRIPTS[name]
    script.main(runtime.parse_flags(script.Config, "", [word for flag in flags for word in shlex.split(str(flag))]))


# -- the whole chain

def test_every_stage_runs_and_leaves_a_checkpoint_metrics_and_a_report(chain):
    root, said = chain
    for stage in TRAINERS:
        assert {"config.json", "model.safetensors", "bpe.json", "metrics.jsonl", "run.json", "resume.safetensors"} <= {p.name for p in (root / stage).iterdir()}
        assert [row["step"] for row in metrics(root / stage)] == [1, 2, 3]
        assert not list((root / stage).glob("*.tmp"))
    summary = json.loads((root / "summary.json").read_text())
    wanted = {"sft.gold", "reward.accuracy", "reward.bayes_accuracy", "seconds.total"}
    wanted |= {f"{s}.{m}" for s in ("ppo", "dpo") for m in ("gold", "wins", "ties", "losses", "win_rate", "kl", "eos_rate")}
    assert wanted <= summary.keys()
    for stage in ("ppo", "dpo"):
        assert summary[f"{stage}.wins"] + summary[f"{stage}.ties"] + summary[f"{stage}.losses"] == pytest.approx(1)
    assert summary["sft"]["kl"] == 0 and summary["sft"]["ties"] == 1  # the reference against itself
    page = (root / "report.html").read_text()
    assert "data:image/png;base64," in page and "http://" not in page and "https://" not in page
    assert (root / "curves.png").stat().st_size > 10_000
    assert "[[" in said["sft"] and "<|endoftext|>]]" in said["sft"]  # one example with its mask is shown


def test_ppo_logs_what_one_watches_and_starts_at_ratio_1(chain):
    row = metrics(chain[0] / "ppo")[0]
    assert {"score", "gold", "kl", "entropy", "length", "eos_rate", "clip_fraction", "approx_kl", "explained_variance", "grad_norm",
            "critic_grad_norm", "rollout_tokens_per_second", "update_tokens_per_second"} <= row.keys()
    assert row["kl"] == pytest.approx(0, abs=1e-4) and row["ratio_error"] < 1e-4  # the first rollout is the reference's


def test_reward_model_scores_demonstrations_zero_on_average(chain):
    root = chain[0]
    scorer, tokenizer = model.load_model(root / "reward", model.ScalarModel)
    scores = []
    for row in toy.World(0).demonstrations("train", per_prompt=1):
        ids = torch.tensor([encode_prompt(tokenizer, row.prompt) + tokenizer.encode(row.replies[0]) + [tokenizer.eos]])
        with torch.no_grad():
            scores.append(scorer.eval()(ids)[0, -1].item())
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-3)


def test_chat_answers_from_a_pipe_with_one_model_and_with_two(chain):
    root = chain[0]
    one = command("chat", f"--model {root}/sft --max-new-tokens 5", input="What is 1 + 2?\n\n/quit\nnot read\n")
    assert one.returncode == 0 and len(one.stdout.splitlines()) <= 2, one.stderr
    two = command("chat", f"--compare {root}/sft {root}/ppo --max-new-tokens 5 --system Hello", input="What is 1 + 2?\n")
    assert two.returncode == 0 and "sft: " in two.stdout and "ppo: " in two.stdout
    full = command("chat", f"--model {root}/sft --max-new-tokens 5", input="What is 1 + 2? " * 20 + "\n")
    assert full.returncode == 0 and "don't fit the model's context" in full.stdout


# -- learning, by outcome

def test_the_pipeline_learns_what_is_preferred(tmp_path):
    """Demonstrations say yes or no at even odds, people prefer yes: PPO and DPO say yes, and stop."""
    words = ["river", "stone", "apple", "window", "garden", "pencil", "candle", "bridge"]
    prompts = [f"Say {word}." for word in words]
    demonstrations = [{"instruction": p, "output": reply} for p in prompts for reply in ("It is good.", "It is sad.")]
    pairs = [{"prompt": p, "chosen": "It is good.", "rejected": "It is sad."} for p in prompts]
    for name, rows in (("sft", demonstrations), ("pairs", pairs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    common = "--threads 1 --log-every 50"
    run_here("sft", common, f"--layers 2 --heads 2 --width 64 --block-size 64 --tokenizer toy --data {tmp_path}/sft.json --out {tmp_path}/sft --steps 150 --batch-tokens 256 --lr 0.01 --val-fraction 0 --warmup 5")
    run_here("reward", common, f"--data {tmp_path}/pairs.json --val-fraction 0 --model {tmp_path}/sft --out {tmp_path}/reward --steps 30 --batch-tokens 256")
    run_here("dpo", common, f"--data {tmp_path}/pairs.json --val-fraction 0 --model {tmp_path}/sft --out {tmp_path}/dpo --steps 60 --batch-tokens 256 --lr 0.0005 --beta 0.3")
    run_here("ppo", common, f"--data {tmp_path}/pairs.json --model {tmp_path}/sft --reward {tmp_path}/reward --out {tmp_path}/ppo --steps 30 "
             "--rollout-batch 32 --max-new-tokens 12 --lr 0.0005 --kl-coef 0.3")

    def share_good(name):
        policy, tokenizer = model.load_model(tmp_path / name, model.GPT)
        ids = [encode_prompt(tokenizer, [{"role": "user", "content": p}]) for p in prompts for _ in range(25)]
        got = model.generate(policy, ids, 12, tokenizer, generator=torch.Generator().manual_seed(1))
        return sum(text == "It is good." for text in got.texts(tokenizer)) / len(ids), got.ended.float().mean().item()

    before, stops = share_good("sft")
    assert 0.3 < before < 0.7 and stops > 0.95
    for name in ("ppo", "dpo"):
        after, stops = share_good(name)
        assert after > 0.9 and stops > 0.95, f"{name}: {after:.2f} say good, {stops:.2f} stop"


# -- identities of whole runs

@pytest.mark.parametrize("name", TRAINERS)
def test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit(name, flags, tmp_path, monkeypatch):
    run_here(name, flags[name], f"--out {tmp_path}/whole")
    original = runtime.Run.time_to_save

    def stop_after_second(self, step):
        self.stop_signal = signal.SIGTERM if step == 1 else None
        return original(self, step)

    monkeypatch.setattr(runtime.Run, "time_to_save", stop_after_second)
    with pytest.raises(SystemExit) as stopped:
        run_here(name, flags[name], f"--out {tmp_path}/parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "loss": 9.9}\n{"step": 4, "lo')  # what a kill leaves behind
    run_here(name, flags[name], f"--out {tmp_path}/parts --resume")
    for file in ("model.safetensors", "config.json", "bpe.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert timeless(metrics(tmp_path / "parts")) == timeless(metrics(tmp_path / "whole"))


@pytest.mark.parametrize("name", TRAINERS)
def test_micro_batches_change_neither_loss_nor_gradient_nor_metrics(name, flags, tmp_path):
    """One forward per step or a dozen, with other padding in each: the same numbers."""
    for budget in (100, 10_000):
        run_here(name, flags[name], f"--out {tmp_path}/{budget} --micro-batch-tokens {budget} --steps 2")
    for small, large in zip(timeless(metrics(tmp_path / "100")), timeless(metrics(tmp_path / "10000"))):
        for row in (small, large):  # what rounding decides: ties, and the size of rounding itself
            for key in [key for key in row if key.endswith(("accuracy", "clip_fraction", "ratio_error"))]:
                del row[key]
        assert small == pytest.approx(large, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("name", TRAINERS)
def test_two_ranks_train_as_one_does(name, flags, tmp_path):
    """SFT, reward and DPO: the same metrics and weights. PPO's ranks sample with their own seeds: it has to run and agree on one checkpoint."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = command(name, flags[name], f"--out {tmp_path}/two --steps 2", launcher=launcher)
    assert two.returncode == 0, two.stderr[-2000:]
    rows = metrics(tmp_path / "two")
    assert [row["step"] for row in rows] == [1, 2]
    if name != "ppo":
        run_here(name, flags[name], f"--out {tmp_path}/one --steps 2")
        for a, b in zip(rows, metrics(tmp_path / "one")):
            if name == "dpo":  # policy and reference tie at first, and rounding breaks the ties
                a.pop("accuracy"), b.pop("accuracy")
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_ctrl_c_saves_and_resume_goes_on(tmp_path):
    words = shlex.split(f"{TINY} --batch-tokens 512 --steps 100000 --out {tmp_path}/run")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(ROOT / "sft.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline = time.time() + 120
    while time.time() < deadline and not ((tmp_path / "run" / "metrics.jsonl").exists() and len(metrics(tmp_path / "run")) > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume goes on" in said and "Traceback" not in said
    step = metrics(tmp_path / "run")[-1]["step"]
    model.load_model(tmp_path / "run", model.GPT)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    for change, said in (("--lr 0.1", "lr was 0.005, now 0.1"), ("--heads 1", "heads was 2, now 1"), ("--layers 2", "layers was 1, now 2")):
        run = command("sft", TINY, f"--batch-tokens 512 --steps 100000 --out {tmp_path}/run --resume", change)
        assert run.returncode == 2 and said in run.stderr and metrics(tmp_path / "run")[-1]["step"] == step
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}


# -- mistakes: one line, exit code 2, nothing written

@pytest.mark.parametrize("script, flags, said", [
    ("sft", "--stepz 5", "did you mean --steps?"),
    ("sft", "--steps 0", "--steps must be >= 1, got 0"),
    ("sft", "--lr -1", "--lr must be > 0, got -1.0"),
    ("sft", "--lr nan", "--lr must be > 0, got nan"),
    ("sft", "--lr fast", "invalid float value: 'fast'"),
    ("sft", "--device cuda", "PyTorch finds no such device"),
    ("sft", "--dtype float16", "--dtype float16 needs --device cuda"),
    ("sft", "--data nowhere.json", "nowhere.json: no such file"),
    ("sft", "--data {tmp}/rows.txt", "only .json, .jsonl and .jsonl.gz are read"),
    ("sft", "--data {tmp}/broken.jsonl --tokenizer toy", "broken.jsonl:2 is not valid JSON"),
    ("sft", "--data {tmp}/keys.jsonl --tokenizer toy", "its fields are question, reply"),
    ("sft", "--model {tmp}", "is not a checkpoint folder of this project: config.json is missing"),
    ("sft", "--model {root}/reward", "holds a reward model, but a language model is needed"),
    ("sft", "--width 30 --heads 4", "width 30 is not divisible by 4 heads"),
    ("sft", "--block-size 5", "every row is longer than the 5 tokens that the context leaves"),
    ("sft", "--out {root}/sft", "already holds a run; add --resume to go on with it"),
    ("sft", "--out {tmp}/rows.txt", "is a file; name a folder"),
    ("reward", "--model {root}/sft --data {tmp}/instructions.json", "doesn't hold a prompt, chosen and rejected"),
    ("ppo", "--model {root}/sft --reward {root}/sft", "holds a language model, but a reward model is needed"),
    ("ppo", "--model {root}/sft --reward {root}/reward --max-new-tokens 64", "leaves no room for a prompt"),
    ("ppo", "--model {root}/sft --reward {root}/reward --rollout-batch 10 --minibatches 3", "10 prompts are not divisible into --minibatches 3"),
    ("ppo", "--kl k4", "invalid choice: 'k4'"),
    ("ppo", "--model {root}/sft --reward {root}/reward --kl-target 6 --kl-coef 0", "--kl-target needs a --kl-coef above 0"),
    ("ppo", "--model {root}/sft --reward {root}/reward --width 64", "--width is for --model scratch"),
    ("ppo", "--model {root}/sft --reward {root}/reward --out {root}/reward --overwrite", "--overwrite would delete the --reward"),
    ("reward", "--model {root}/sft --data {tmp}/ranks.jsonl", "ranks.jsonl:1: a rank, a gold score or the margin is not a finite number"),
    ("evaluate", "--models {root}/sft --max-new-tokens 100", "leaves no room for a prompt"),
    ("evaluate", "--models {root}/sft --out {tmp}", "is a folder; name a .json file"),
    ("toy", "--model {root}/sft --out {tmp}/rows.txt", "is a file; name a folder"),
    ("dpo", "--model {root}/nowhere", "no such checkpoint folder"),
    ("dpo", "--label-smoothing 0.7", "--label-smoothing must be >= 0 and < 0.5, got 0.7"),
    ("evaluate", "", "--models: name one checkpoint folder or more"),
    ("evaluate", "--models {root}/sft --data {tmp}/instructions.json", "needs --reward to score with"),
    ("chat", "--model {root}/sft --max-new-tokens 64", "fills the context of 64"),
    ("toy", "--model {root}/sft --out {root}/preferences", "already holds preferences"),
    ("report", "--demo {tmp}", "is missing: run the stage that writes it"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(script, flags, said, chain, tmp_path, capsys):
    (tmp_path / "rows.txt").write_text("text")
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    (tmp_path / "keys.jsonl").write_text('{"question": "a", "reply": "b"}\n')
    (tmp_path / "instructions.json").write_text('[{"instruction": "a", "output": "b"}]')
    (tmp_path / "ranks.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"], "ranks": [NaN, 1]}\n')
    words = shlex.split(flags.format(tmp=tmp_path, root=chain[0]))
    if script in TRAINERS and "--out" not in words:
        words += ["--out", str(tmp_path / "out")]
    before = {p: p.stat().st_mtime_ns for p in chain[0].rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        runtime.run_script(SCRIPTS[script].main, SCRIPTS[script].Config, "", words)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and said in errors[-1] and errors[-1].startswith("error: ")
    assert not (tmp_path / "out").exists() and before == {p: p.stat().st_mtime_ns for p in chain[0].rglob("*")}


def test_a_mistake_in_a_subprocess_shows_no_traceback():
    wrong = command("sft", "--data nowhere.json --tokenizer toy")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr


def test_a_damaged_resume_file_is_refused(flags, tmp_path, capsys):
    run_here("sft", flags["sft"], f"--out {tmp_path}/run --steps 1")
    path = tmp_path / "run" / "resume.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(runtime.UserError, match="is damaged"):
        run_here("sft", flags["sft"], f"--out {tmp_path}/run --steps 1 --resume")


def test_resume_refuses_inputs_that_have_changed_since(flags, tmp_path):
    rows = [{"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = f"{TINY} --tokenizer toy --data {tmp_path}/rows.json --val-fraction 0 --steps 2 --out {tmp_path}/run"
    run_here("sft", words)
    (tmp_path / "rows.json").write_text(json.dumps(rows[:3]))
    with pytest.raises(runtime.UserError, match="what --data named .* has changed since"):
        run_here("sft", words, "--resume")


def test_overwrite_replaces_a_run_and_deletes_neither_its_inputs_nor_other_files(flags, tmp_path):
    run_here("sft", flags["sft"], f"--out {tmp_path}/run --steps 2")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(runtime.UserError, match="no such file"):
        run_here("sft", TINY, f"--out {tmp_path}/run --overwrite --data nowhere.json")
    with pytest.raises(runtime.UserError, match="would delete the --model"):
        run_here("sft", f"--out {tmp_path}/run --overwrite --model {tmp_path}/run")
    assert len(metrics(tmp_path / "run")) == 2
    run_here("sft", flags["sft"], f"--out {tmp_path}/run --steps 1 --overwrite")
    assert len(metrics(tmp_path / "run")) == 1 and (tmp_path / "run" / "notes.txt").exists()


def test_replies_cut_off_before_their_end_never_earn_more_than_any_that_ended(chain, tmp_path, monkeypatch):
    seen = []
    original = ppo.shaped_rewards
    monkeypatch.setattr(ppo, "shaped_rewards", lambda scores, *rest: seen.append(scores.clone()) or original(scores, *rest))
    root = chain[0]
    run_here("ppo", f"--model {root}/sft --reward {root}/reward --threads 1 --steps 1 --rollout-batch 32 --max-new-tokens 8 --out {tmp_path}/run")
    share_ended = metrics(tmp_path / "run")[0]["eos_rate"]
    assert share_ended < 1  # a three-step policy rarely ends
    ordered = seen[0].sort().values
    cut_off = round(32 * (1 - share_ended))
    assert (ordered[:cut_off] == ordered[0]).all()
    if cut_off < 32:
        assert ordered[cut_off] >= ordered[0] + 1 - 1e-5


def test_ppo_feeds_its_losses_what_one_row_at_a_time_gives(chain, tmp_path, monkeypatch):
    """Log-probabilities at the sampling temperature, values before each token, the score on the last one: no padding, by hand."""
    seen = {}

    def record(name):
        original = getattr(ppo, name)

        def recorded(*args, **options):
            out = original(*args, **options)
            seen.setdefault(name, (args, out))
            return out
        monkeypatch.setattr(ppo, name, recorded)

    for name in ("generate", "shaped_rewards", "gae", "policy_loss"):
        record(name)
    root = chain[0]
    run_here("ppo", f"--model {root}/sft --reward {root}/reward --threads 1 --steps 1 --rollout-batch 8 --minibatches 1 --epochs 1 --max-new-tokens 10 "
             f"--temperature 0.7 --kl-coef 0.5 --whiten none --missing-eos-penalty 0 --micro-batch-tokens 10000 --out {tmp_path}/run")
    policy, _ = model.load_model(root / "sft", model.GPT)
    scorer, _ = model.load_model(root / "reward", model.ScalarModel)
    rollout = seen["generate"][1]
    values, rewards = seen["gae"][0][1], seen["gae"][0][0]
    old_logprobs = seen["policy_loss"][0][1]  # of the minibatch's rows, sorted by length
    expected_logprobs, per_row = [], []
    for ids, mask, length in zip(rollout.ids, rollout.mask, rollout.lengths):
        row = ids[:length][None]
        with torch.no_grad():
            logits = policy.eval().logits(policy.transformer(row))[0] / 0.7  # (T, V)
            heads = scorer.eval()(row)[0]  # (T,)
        per_row.append((mask.nonzero().flatten().tolist(), row[0], logits.log_softmax(-1), heads))
    floor = min(heads[-1].item() for _, _, _, heads in per_row)
    for b, (inside, row, logprobs, heads) in enumerate(per_row):
        score = heads[-1].item() if rollout.ended[b] else floor
        for t in inside:
            assert values[b, t].item() == pytest.approx(heads[t - 1].item(), abs=1e-4)
            assert rewards[b, t].item() == pytest.approx(score if t == inside[-1] else 0.0, abs=1e-4)  # policy = reference: no KL yet
        expected_logprobs.append(sum(logprobs[t - 1, row[t]].item() for t in inside))
    assert sorted(old_logprobs.sum(1).tolist()) == pytest.approx(sorted(expected_logprobs), abs=1e-3)


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(flags, tmp_path):
    with pytest.raises(runtime.UserError, match="loss is (nan|inf)"):
        run_here("sft", flags["sft"], f"--out {tmp_path}/run --lr 1e30 --warmup 1 --max-grad-norm 1e30")
    assert not (tmp_path / "run" / "model.safetensors").exists()


# -- the promises of the code base

@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_flag_and_every_field_is_read(name):
    config_class = SCRIPTS[name].Config
    comments = runtime.field_comments(config_class)
    sources = inspect.getsource(SCRIPTS[name]) + "".join(inspect.getsource(m) for m in (runtime, model, importlib.import_module("data")))
    for field in dataclasses.fields(config_class):
        assert len(comments.get(field.name, "")) > 8, f"--{field.name} has no help"
        assert re.search(rf"config\.{field.name}\b", sources), f"--{field.name} is never read"
    shown = command(name, "--help")
    assert shown.returncode == 0
    assert all("--" + field.name.replace("_", "-") in shown.stdout for field in dataclasses.fields(config_class))


def test_importing_any_module_does_nothing(tmp_path):
    modules = ", ".join(p.stem for p in ROOT.glob("*.py"))
    code = f"import torch; state = torch.get_rng_state(), torch.get_num_threads()\nimport {modules}\n" \
           "assert torch.equal(state[0], torch.get_rng_state()) and state[1] == torch.get_num_threads()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not list(tmp_path.iterdir())


def test_the_readme_has_no_gaps_and_no_dead_links():
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"@[A-Z]+@", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)


def readme_commands():
    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [line.split("#")[0].strip() for line in blocks.splitlines() if re.search(r"\b(python|torchrun|bash)\b", line)]


def test_commands_of_the_readme_and_of_the_scripts_exist_with_their_flags():
    lines = readme_commands()
    for script in SCRIPTS.values():
        lines += [re.split(r"\s{4,}", line.strip())[0] for line in script.__doc__.splitlines() if re.match(r"\s+(python|torchrun) ", line)]
    checked = 0
    for line in lines:
        words = [w for w in shlex.split(line.split("|")[-1]) if not re.match(r"[A-Z_]+=", w)]
        file = next(w for w in words if w.endswith((".py", ".sh")))
        assert (ROOT / file).exists(), line
        if file.endswith(".py") and file[:-3] in SCRIPTS:
            runtime.parse_flags(SCRIPTS[file[:-3]].Config, "", words[words.index(file) + 1:])
            checked += 1
    assert checked > 15


def test_run_sh_refuses_wrong_arguments():
    for words in (["--sed", "1"], ["--seed"], ["--seed", "x"]):
        done = subprocess.run(["bash", str(ROOT / "run.sh"), *words], capture_output=True, text=True)
        assert done.returncode == 2 and "error: " in done.stderr
