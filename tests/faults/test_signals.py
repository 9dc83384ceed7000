"""SIGTERM and Ctrl-C, wherever they come: the run stops soon, loses nothing, and once resumed ends in the
bits of one that was never stopped."""
import collections
import json
import os
import random
import signal
import time

import pytest
import torch

import generate
from plumbing import run as runtime
import sft
import tools
from plumbing.checkpoints import Checkpoints

FLAGS = f"{tools.SHORT} --save-every 0"


def watch(patch, at=None, act=None):
    """List of what happens in the steps of runs from now on, as (steps done, "pass", "token", "update" or
    "save"); "evaluation pass", "save pass", ... if it is part of such.

    act is called in the middle of the first thing that equals `at`, or of the one with that number.
    """
    events, within = [], [""]

    def happens(what):
        if runtime.Run.current.bar is None:  # dpo.py scores its reference before the first step
            return
        events.append((runtime.Run.current.step, f"{within[-1]} {what}".strip()))
        if len(events) - 1 == at or (events[-1] == at and events.count(at) == 1):
            act()

    def watched(owner, name, what):
        original = getattr(owner, name)

        def call(*args, **options):
            happens(what)
            return original(*args, **options)
        patch.setattr(owner, name, call)

    def passes(self, pieces, *modules, original=runtime.Run.passes):
        for piece in original(self, pieces, *modules):
            happens("pass")
            yield piece

    def part(what, function):
        def call(*args, **options):
            within.append(what)
            try:
                return function(*args, **options)
            finally:
                within.pop()
        return call

    def steps(self, first, total, evaluate=None, original=runtime.Run.steps):
        return original(self, first, total, evaluate and part("evaluation", evaluate))

    patch.setattr(runtime.Run, "passes", passes)
    patch.setattr(runtime.Run, "steps", steps)
    patch.setattr(runtime.Run, "_save", part("save", runtime.Run._save))
    watched(generate, "sample_token", "token")
    watched(runtime.Run, "optimizer_step", "update")
    watched(Checkpoints, "publish", "end")
    return events


def send(number):
    return lambda: os.kill(os.getpid(), number)


PLACES = [  # script, where, steps done when it stops, what still happens
    ("sft", (3, "pass"), 3, set()),
    ("reward", (3, "pass"), 3, set()),
    ("ppo", (3, "token"), 3, set()),
    ("ppo", (3, "pass"), 3, set()),
    ("dpo", (3, "update"), 4, set()),
    # PPO finishes its update.
    ("ppo", (3, "update"), 4, {"pass", "update"}),
    ("reward", (6, "evaluation pass"), 6, set()),
    ("dpo", (4, "evaluation pass"), 4, set()),
    ("dpo", (4, "evaluation token"), 4, set()),
    ("kto", (3, "update"), 4, set()),
    ("kto", (4, "evaluation pass"), 4, set()),
    ("reward", (3, "save pass"), 3, set()),
    ("ppo", (3, "save end"), 3, set())
]


@pytest.mark.case(3)
@pytest.mark.parametrize("script, at, stopped, rest", PLACES)
def test_a_signal_stops_within_one_pass_or_token_and_the_resumed_run_equals_an_unbroken_one(
        script, at, stopped, rest, root, unbroken, tmp_path, monkeypatch, capfd):
    run = [script, root, tools.SHORT if at[1].startswith("save") else FLAGS, f"--out {tmp_path}/run"]
    with monkeypatch.context() as patch:
        events = watch(patch, at, send(signal.SIGTERM))
        assert tools.here(*run) == 128 + signal.SIGTERM
    assert {what for _, what in events[events.index(at) + 1:] if not what.startswith("save")} == rest
    assert json.loads((tools.latest(tmp_path / "run") / "state.json").read_text())["step"] == stopped
    shown = capfd.readouterr()
    assert f"stopped after step {stopped} of 6; the same command with --resume goes on" in shown.out
    assert "once more stops at once" in shown.err
    assert tools.here(*run, "--resume") == 0
    assert tools.same(unbroken[script], tmp_path / "run")


@pytest.mark.case(3)
@pytest.mark.long
@pytest.mark.parametrize("script", tools.TRAINERS)
def test_a_signal_at_any_moment_loses_nothing(script, root, unbroken, tmp_path, monkeypatch, record_property):
    """Signals spread over all kinds of things that happen in all steps of a run."""
    with monkeypatch.context() as patch:
        events = watch(patch)
        tools.here(script, root, tools.SHORT, f"--out {tmp_path}/whole")
    chance, survived, places = random.Random(script), 0, collections.Counter()
    kinds = list(dict.fromkeys(events))
    moments = [
        chance.choice([i for i, event in enumerate(events) if event == kind])
        for kind in chance.sample(kinds, 15)
    ]
    record_property("tries", len(moments))
    for number in moments:
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            watch(patch, number, send(signal.SIGTERM))
            code = tools.here(script, root, tools.SHORT, f"--out {out}")
        assert code == (0 if (events[number][0] == 6 and events[number][1].startswith("save")) else
                        143), (number, events[number])
        assert tools.here(script, root, tools.SHORT, f"--out {out} --resume") == 0 and tools.same(
            unbroken[script], out), (number, events[number])
        assert tools.latest(out).parent.joinpath("latest.json").read_text() == tools.latest(
            unbroken[script]).parent.joinpath("latest.json").read_text(), (number, events[number])
        survived += 1
        places[events[number][1]] += 1
        record_property("survived", survived)
    print(script, dict(places))


@pytest.mark.case(3)
def test_an_evaluation_that_was_cut_short_still_decides_which_checkpoint_is_the_best(
        root, tmp_path, monkeypatch):
    losses, cut = {0: 3.0, 4: 1.0, 6: 2.0}, [4]

    def validation_loss(run, *args):
        if run.step in cut:
            cut.remove(run.step)
            os.kill(os.getpid(), signal.SIGTERM)
            run.safe_point()
        return torch.tensor(losses[run.step])

    monkeypatch.setattr(sft, "validation_loss", validation_loss)
    run = ["sft", root, f"{tools.SHORT} --save-every 2 --out {tmp_path}/run"]
    assert tools.here(*run) == 143 and tools.here(*run, "--resume") == 0
    assert json.loads((tmp_path / "run/checkpoints/latest.json").read_text()) == {
        "latest": "step_000006", "previous": "step_000004", "best": "step_000004", "best_value": -1.0}


@pytest.mark.case(3)
def test_a_last_evaluation_that_was_cut_short_is_made_up_for_in_the_reward_models_folder(
        root, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        watch(patch, (6, "evaluation pass"), send(signal.SIGTERM))
        assert tools.here("reward", root, FLAGS, f"--out {tmp_path}/run") == 143
    assert tools.here("reward", root, FLAGS, f"--out {tmp_path}/run --resume") == 0
    for folder in (tmp_path / "run", tools.latest(tmp_path / "run")):
        assert (folder / "evaluation.json").read_text() == (unbroken["reward"]
                                                            / "evaluation.json").read_text()


@pytest.mark.case(3)
def test_a_signal_is_obeyed_where_nothing_can_be_printed(root, tmp_path, monkeypatch):
    def refuse(*args):
        raise BrokenPipeError

    watch(monkeypatch, (3, "pass"), send(signal.SIGTERM))
    monkeypatch.setattr(os, "write", refuse)
    assert tools.here("reward", root, FLAGS, f"--out {tmp_path}/run") == 143
    assert Checkpoints(tmp_path / "run").newest(pytest.fail)[1]["step"] == 3


# -- a second signal

def end_at_once(code):
    raise tools.Killed(code)


@pytest.mark.case(4)
@pytest.mark.parametrize("script, at, whole", [
    ("ppo", (3, "update"), 3),
    ("ppo", (3, "token"), 3),
    ("dpo", (4, "evaluation token"), 3),
    ("reward", (3, "save end"), 2),
])
def test_a_second_ctrl_c_ends_the_run_at_once_and_leaves_whole_files(script, at, whole, root, unbroken,
                                                                     tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(os, "_exit", end_at_once)
        events = watch(patch, at, twice)
        with pytest.raises(tools.Killed) as ended:
            tools.here(script, root, tools.SHORT, f"--out {tmp_path}/run")
    assert ended.value.args == (128 + signal.SIGINT,) and events[-1] == at
    folder, state = Checkpoints(tmp_path / "run").newest(pytest.fail)
    assert state["step"] == whole
    assert tools.here(script, root, tools.SHORT, f"--out {tmp_path}/run --resume") == 0
    assert tools.same(unbroken[script], tmp_path / "run")


SLOW = """
import time
original = runtime.Run.optimizer_step
def optimizer_step(self, *args):
    if self.step == 3 and not "--resume" in sys.argv:
        print("updating", flush=True)
        time.sleep(1)
    return original(self, *args)
runtime.Run.optimizer_step = optimizer_step
"""


@pytest.mark.case(4)
@pytest.mark.long
@pytest.mark.parametrize("signals, code, seconds", [
    ([signal.SIGINT], 130, (2, 20)),
    ([signal.SIGINT, signal.SIGINT], 130, (0, 2)),
    ([signal.SIGTERM, signal.SIGINT], 130, (0, 2)),
    ([signal.SIGINT, signal.SIGTERM], 143, (0, 2)),
])
def test_one_signal_waits_for_ppos_update_and_two_do_not(signals, code, seconds, root, unbroken, tmp_path):
    """The eight parts of the update take a second each."""
    process = tools.start("ppo", root, tools.SHORT, f"--out {tmp_path}/run", hook=SLOW)
    for line in process.stdout:
        if "updating" in line:
            break
    began = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert seconds[0] < time.monotonic() - began < seconds[1]
    assert "Traceback" not in text
    assert ("stopped after step 4" in text) == (len(signals) == 1)
    folder, state = Checkpoints(tmp_path / "run").newest(pytest.fail)
    assert state["step"] == (4 if len(signals) == 1 else 3)
    tools.run("ppo", root, tools.SHORT, f"--out {tmp_path}/run --resume")
    assert tools.same(unbroken["ppo"], tmp_path / "run")


@pytest.mark.case(3)
@pytest.mark.long
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("script", tools.TRAINERS)
def test_a_signal_from_outside_ends_a_process_with_its_exit_code_and_no_traceback(
        script, number, code, root, unbroken, tmp_path):
    process = tools.start(script, root, FLAGS, "--steps 5000", f"--out {tmp_path}/run")
    file = tmp_path / "run" / "metrics.jsonl"
    tools.wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") > 8, process)
    process.send_signal(number)
    began = time.monotonic()
    text, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - began < 10
    assert "Traceback" not in text
    assert "--resume goes on" in text
    assert Checkpoints(tmp_path / "run").newest(pytest.fail)[1]["step"] > 0


@pytest.mark.case(15)
def test_a_batch_is_skipped_where_nothing_can_be_printed(root, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise BrokenPipeError

    def backward(run, loss, optimizer):
        original(run, loss * (float("inf") if run.step == 1 else 1), optimizer)

    original = runtime.Run.backward
    monkeypatch.setattr(runtime.Run, "backward", backward)
    monkeypatch.setattr("plumbing.steps.tqdm.write", refuse)
    assert tools.here("reward", root, FLAGS, f"--steps 3 --out {tmp_path}/run") == 0
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 1
