"""Checkpoints under kill -9, damage, full disks and odd folders: whole or absent, and a resumed run ends in
the bits of an unbroken one."""
import collections
import contextlib
import fcntl
import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from plumbing import run as runtime
import sft
import tools
from plumbing.metrics import Metrics
from plumbing.checkpoints import Checkpoints, find_damage

MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
FILES = (*sorted(MODEL_FILES), "training.safetensors", "state.json", "manifest.json")


def write(checkpoints, step, value=None, text=""):
    folder = checkpoints.begin(step)
    (folder / "ema").mkdir()
    for name in ("model.safetensors", "ema/model.safetensors", "training.safetensors"):
        (folder / name).write_text(f"{name} of step {step}{text}" * 100)
    (folder / "state.json").write_text(json.dumps({"step": step}))
    checkpoints.publish(step, value)


def found(checkpoints):
    """(Step of the newest whole checkpoint, what was said)."""
    said = []
    folder, state = checkpoints.newest(said.append)
    assert folder is None or (find_damage(folder) == "" and state["step"] == int(folder.name[5:]))
    return state and state["step"], " ".join(said)


def leftovers(out):
    """What a run's folder should not hold at the end."""
    named = json.loads((out / "checkpoints" / "latest.json").read_text())
    known = {named[key] for key in ("latest", "previous", "best") if key in named} | {"latest.json"}
    unknown = [path.name for path in (out / "checkpoints").iterdir() if path.name not in known]
    return unknown + [str(path) for path in out.rglob("*.tmp")]


def cut(path, share):
    os.truncate(path, int(path.stat().st_size * share))


def flip(path):
    with open(path, "r+b") as f:
        f.seek(path.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 1]))


@pytest.fixture
def copy(unbroken, tmp_path):
    """A copy of the unbroken reward run, to be damaged."""
    return shutil.copytree(unbroken["reward"], tmp_path / "copy")


# -- what is kept

def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    values = {1: 0.1, 2: 0.5, 3: None, 4: 0.5, 5: 0.3, 6: 0.7, 7: None, 8: 0.6, 9: 0.6}
    kept = {
        1: {1},
        2: {1, 2},
        3: {2, 3},
        4: {2, 3, 4},
        5: {2, 4, 5},
        6: {5, 6},
        7: {6, 7},
        8: {6, 7, 8},
        9: {6, 8, 9},
    }
    for step, value in values.items():
        write(checkpoints, step, value)
        assert {int(name[5:]) for name in checkpoints.all()} == kept[step], step
        assert checkpoints.pointer()["latest"] == f"step_{step:06d}"
        assert not leftovers(tmp_path)
        assert found(checkpoints) == (step, "")
    expected = {"latest": "step_000009", "previous": "step_000008", "best": "step_000006", "best_value": 0.7}
    assert checkpoints.pointer() == expected
    assert (tmp_path / "model.safetensors").read_text().startswith("model.safetensors of step 9")


def test_after_a_fall_back_the_damaged_checkpoint_is_neither_previous_nor_best_and_is_deleted(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, value in ((2, 0.5), (4, 0.1), (6, 0.9)):
        write(checkpoints, step, value)
    flip(checkpoints.root / "step_000006" / "model.safetensors")
    checkpoints = Checkpoints(tmp_path)
    step, said = found(checkpoints)
    assert step == 4 and "step_000006 is damaged (model.safetensors has changed" in said
    write(checkpoints, 7, 0.2)
    expected = {"latest": "step_000007", "previous": "step_000004", "best": "step_000007", "best_value": 0.2}
    assert checkpoints.pointer() == expected
    assert checkpoints.all() == ["step_000007", "step_000004"] and found(Checkpoints(tmp_path)) == (7, "")


def test_what_a_damaged_checkpoint_was_is_computed_and_saved_again(tmp_path):
    for step, value in ((2, 0.5), (4, 0.1), (6, 0.9)):
        write(Checkpoints(tmp_path), step, value)
    flip(tmp_path / "checkpoints" / "step_000006" / "state.json")
    checkpoints = Checkpoints(tmp_path)
    assert found(checkpoints)[0] == 4
    write(checkpoints, 6, 0.9)
    assert found(Checkpoints(tmp_path)) == (6, "") and not leftovers(tmp_path)
    expected = {"latest": "step_000006", "previous": "step_000004", "best": "step_000006", "best_value": 0.9}
    assert checkpoints.pointer() == expected


def test_deleting_follows_no_link_and_touches_no_other_files(tmp_path):
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    checkpoints = Checkpoints(out)
    write(checkpoints, 1)
    (checkpoints.root / "step_000001" / "inside").symlink_to(mine)
    for name in ("step_000000", ".writing-step_000009", "step_000077x"):
        (checkpoints.root / name).symlink_to(mine)
    for name in ("notes", "step_12", "step_000001.bak"):
        (checkpoints.root / name).mkdir()
    for step in (2, 3, 4):
        write(checkpoints, step)
    assert not (checkpoints.root / "step_000001").exists()
    with pytest.raises(OSError):
        checkpoints.begin(9)
    checkpoints.clear()
    assert (mine / "thesis.txt").read_text() == "years of work"
    expected = {"step_000000", ".writing-step_000009", "step_000077x", "notes", "step_12", "step_000001.bak"}
    assert {path.name for path in checkpoints.root.iterdir()} == expected


def test_who_may_read_one_file_of_a_checkpoint_may_read_all(copy):
    assert len({path.stat().st_mode for path in tools.latest(copy).iterdir()}) == 1


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_output_folder_shows_the_latest_model_with_hard_links_or_without(hard_links, tmp_path,
                                                                             monkeypatch):
    def refuse(*args, **options):
        raise OSError("no hard links here")

    if not hard_links:
        monkeypatch.setattr(os, "link", refuse)
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors.tmp").write_text("left by a kill")
    for step in (1, 2, 3):
        write(checkpoints, step)
        for name in ("model.safetensors", "ema/model.safetensors"):
            shown, kept = tmp_path / name, checkpoints.root / f"step_{step:06d}" / name
            assert shown.read_bytes() == kept.read_bytes() and shown.samefile(kept) == hard_links
        expected = {"checkpoints", "ema", "model.safetensors", "notes.txt"}
        assert {path.name for path in tmp_path.iterdir()} == expected


@pytest.mark.case(2)
@pytest.mark.parametrize("again, hard_links", [(False, True), (False, False), (True, True)])
def test_a_kill_at_any_call_to_the_file_system_leaves_the_old_checkpoint_or_the_new_one(
        again, hard_links, tmp_path, monkeypatch, record_property):
    """After steps 1 (the best) and 2, step 3 is saved, or 2 again, cut off before each call that changes the
    disk."""
    start = tmp_path / "start"
    for step, value in ((1, 0.9), (2, 0.1)):
        write(Checkpoints(start), step, value)
    names = [
        (os, "rename"),
        (os, "replace"),
        (os, "fsync"),
        (os, "link"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "mkdir"),
        (shutil, "copyfile"),
        (Path, "write_bytes"),
    ]
    steps = []

    def attempt(out, limit):
        """Publish; be killed at call number limit."""
        calls = 0
        with monkeypatch.context() as patch:
            for owner, name in names:
                def call(*args, original=getattr(owner, name), name=name, **options):
                    nonlocal calls
                    calls += 1
                    if calls == limit:
                        if name == "write_bytes":
                            original(args[0], args[1][:len(args[1]) // 2])
                        raise tools.Killed
                    if name == "link" and not hard_links:
                        raise OSError("no hard links here")
                    return original(*args, **options)
                patch.setattr(owner, name, call)
            write(Checkpoints(out), 2 if again else 3, 0.5)

    for limit in range(1, 1000):
        out = shutil.copytree(start, tmp_path / str(limit))
        try:
            attempt(out, limit)
            break
        except tools.Killed:
            checkpoints = Checkpoints(out)
            step, said = found(checkpoints)
            steps.append(step)
            assert said == "", limit
            assert checkpoints.pointer()["best"] == "step_000001", limit
            assert find_damage(checkpoints.root / "step_000001") == "", limit
            for name in ("model.safetensors", "ema/model.safetensors"):
                assert (out / name).read_text() in [f"{name} of step {step}" * 100 for step in (2, 3)], limit
            checkpoints.link(checkpoints.root / f"step_{step:06d}")
            write(checkpoints, 3, 0.5, " again")
            write(checkpoints, 4, 0.1)
            assert checkpoints.all() == ["step_000004", "step_000003", "step_000001"], limit
            assert not leftovers(out) and found(checkpoints) == (4, ""), limit
    record_property("tries", limit - 1), record_property("survived", len(steps))
    assert len(steps) > 25 and steps == sorted(steps) and set(steps) == ({2} if again else {2, 3})


# -- a finished run whose checkpoints were deleted, as the README says that one may

@pytest.fixture
def slim(copy):
    """The unbroken reward run without its checkpoints."""
    shutil.rmtree(copy / "checkpoints")
    return copy


def contents(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.case(26)
@pytest.mark.parametrize("flags, code, said", [
    ("", 0, "this run is complete (6 steps)"),
    ("--steps 9", 2, "is complete after 6 steps; for 9 it needs its checkpoints/, which is gone"),
    ("--steps 9 --override", 2, "is complete after 6 steps; for 9 it needs its checkpoints/, which is gone"),
    ("--steps 3", 2, "is complete after 6 steps; for 3 it needs its checkpoints/, which is gone"),
    ("--lr 0.5", 2, "--lr was 0.002, is now 0.5"),
    ("--lr 0.5 --override", 0, "this run is complete (6 steps)")])
def test_a_finished_run_without_checkpoints_is_complete_and_stays(flags, code, said, root, slim, capsys):
    before = contents(slim)
    capsys.readouterr()
    assert tools.here("reward", root, tools.SHORT, f"--out {slim} --resume", flags) == code
    shown = capsys.readouterr()
    assert said in (shown.err if code else shown.out) and shown.err.count("\n") == (code > 0)
    assert before == contents(slim) and not (slim / "checkpoints").exists()


@pytest.mark.case(26)
@pytest.mark.parametrize("how", ["unfinished", "run.json is gone", "run.json is damaged"])
def test_a_model_of_a_run_without_checkpoints_that_may_not_be_finished_stays(how, root, slim, capsys):
    if how == "unfinished":
        about = json.loads((slim / "run.json").read_text())
        del about["finished_after"]
        (slim / "run.json").write_text(json.dumps(about))
    else:
        (slim / "run.json").unlink() if "gone" in how else (slim / "run.json").write_text("{")
    before = contents(slim)
    assert tools.here("reward", root, tools.SHORT, f"--out {slim} --resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{slim} holds a model, but its checkpoints/ is gone" in error
    assert before == contents(slim)
    assert tools.here("reward", root, tools.SHORT, f"--out {slim} --overwrite") == 0


@pytest.mark.case(26)
def test_a_finished_run_that_has_lost_its_model_too_begins_anew(root, slim, unbroken):
    for name in MODEL_FILES:
        (slim / name).unlink()
    assert tools.here("reward", root, tools.SHORT, f"--out {slim} --resume") == 0
    assert tools.same(unbroken["reward"], slim)


@pytest.mark.case(26)
def test_a_run_cannot_be_taken_back_to_fewer_steps_than_it_has_taken(root, copy, capsys):
    before = contents(copy)
    assert tools.here("reward", root, tools.SHORT, f"--out {copy} --resume --override --steps 3") == 2
    assert f"the run in {copy} is at step 6, beyond 3" in capsys.readouterr().err and before == contents(copy)
    assert tools.here("reward", root, tools.SHORT, f"--out {copy} --resume") == 0
    assert "this run is complete (6 steps)" in capsys.readouterr().out


@pytest.mark.case(14)
def test_overwrite_deletes_the_word_that_a_run_is_finished_before_its_model(root, slim, monkeypatch):
    def die_at_a_model(path, *args, original=Path.unlink, **options):
        if path.name == "config.json":
            raise tools.Killed
        return original(path, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(tools.Killed):
        patch.setattr(Path, "unlink", die_at_a_model)
        tools.here("reward", root, tools.SHORT, f"--out {slim} --overwrite")
    assert (slim / "config.json").exists() and not (slim / "run.json").exists()


# -- kill -9

@pytest.mark.case(1)
@pytest.mark.long
@pytest.mark.parametrize("script, kills", [("sft", 13), ("reward", 13), ("ppo", 12), ("dpo", 12), ("kto", 3)])
def test_kill_9_at_any_moment_costs_nothing_but_the_steps_since_the_last_checkpoint(
        script, kills, root, tmp_path, record_property):
    """A run is killed again and again, at random moments after it has opened its folder, resumed, and in the
    end equals one that was left alone."""
    flags = "--steps 60 --save-every 1 --resume"
    chance = random.Random(script)
    survived = 0
    moments = collections.Counter()
    record_property("tries", kills)
    tools.run(script, root, flags, f"--out {tmp_path}/whole")
    out = tmp_path / "killed0"
    while survived < kills:
        opened = out / "run.json"
        before = opened.stat().st_mtime_ns if opened.exists() else 0
        process = tools.start(script, root, flags, f"--out {out}")
        tools.wait_for(lambda: opened.exists() and opened.stat().st_mtime_ns > before, process)
        time.sleep(chance.uniform(0, 1.2))
        process.kill()
        text, _ = process.communicate()
        if process.returncode == 0:  # it was done before
            assert tools.same(tmp_path / "whole", out)
            out = tmp_path / f"killed{survived}"
            continue
        assert process.returncode == -9, text
        step, said = found(Checkpoints(out))
        saving = list((out / "checkpoints").glob(".writing-*"))
        moments["save" if saving else "start" if step is None else "step"] += 1
        assert said == ""
        assert step is None or (out / "model.safetensors").exists() and load_file(out / "model.safetensors")
        survived += 1
        record_property("survived", survived - 1)
    tools.run(script, root, flags, f"--out {out}")
    assert tools.same(tmp_path / "whole", out) and not leftovers(out)
    latest, expected = (json.loads((folder / "checkpoints/latest.json").read_text())
                        for folder in (out, tmp_path / "whole"))
    assert latest == expected
    record_property("survived", survived)
    print(script, dict(moments))


def check_killed_in_save(stage, out):
    """The checkpoint of step 3 counts if latest.json named it; else that of step 2 does."""
    assert found(Checkpoints(out)) == (3 if stage in tools.PUBLISHED else 2, "")
    assert load_file(out / "model.safetensors").keys() == load_file(
        tools.latest(out) / "model.safetensors").keys()


@pytest.mark.case(2)
def test_a_run_killed_before_its_last_model_was_shown_shows_it_when_resumed(root, unbroken, tmp_path,
                                                                            monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(tools.Killed):
        tools.at_stage("before the links", 6, tools.die, patch.setattr)
        tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run")
    model = tools.latest(tmp_path / "run") / "model.safetensors"
    assert not (tmp_path / "run" / model.name).samefile(model)
    assert tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run --resume") == 0
    assert (tmp_path / "run" / model.name).samefile(model)
    assert tools.same(unbroken["reward"], tmp_path / "run")


@pytest.mark.case(2)
@pytest.mark.parametrize("stage", tools.STAGES)
def test_a_run_killed_inside_a_save_goes_on_from_a_whole_checkpoint(stage, root, unbroken, tmp_path,
                                                                    monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(tools.Killed):
        tools.at_stage(stage, 3, tools.die, patch.setattr)
        tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run")
    check_killed_in_save(stage, tmp_path / "run")
    assert tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run --resume") == 0
    assert tools.same(unbroken["reward"], tmp_path / "run") and not leftovers(tmp_path / "run")


KILLED = "import os, tools\ntools.at_stage('{stage}', 3, lambda: os.kill(os.getpid(), 9))"


@pytest.mark.case(2)
@pytest.mark.long
@pytest.mark.parametrize("stage", tools.STAGES)
def test_kill_9_inside_a_save_leaves_a_whole_checkpoint_to_go_on_from(stage, root, unbroken, tmp_path):
    script = ("sft", "reward", "ppo", "dpo")[list(tools.STAGES).index(stage) % 4]
    tools.run(script, root, tools.SHORT, f"--out {tmp_path}/run", hook=KILLED.format(stage=stage), code=-9)
    check_killed_in_save(stage, tmp_path / "run")
    tools.run(script, root, tools.SHORT, f"--out {tmp_path}/run --resume")
    assert tools.same(unbroken[script], tmp_path / "run") and not leftovers(tmp_path / "run")


# -- damaged files

@pytest.mark.case(7)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_noticed_and_the_checkpoint_before_is_taken(name, share, copy):
    path = tools.latest(copy) / name
    size = path.stat().st_size
    cut(path, share)
    step, said = found(Checkpoints(copy))
    assert step == 5 and "step_000006 is damaged" in said
    expected = f"{name} has {int(size * share):,} bytes, should have {size:,}"
    if name == "manifest.json":
        expected = "manifest.json or state.json is damaged"
    assert expected in said


@pytest.mark.case(8)
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_is_noticed_and_the_checkpoint_before_is_taken(name, copy):
    flip(tools.latest(copy) / name)
    if name.endswith(".safetensors"):
        load_file(tools.latest(copy) / name)  # which notices nothing
    step, said = found(Checkpoints(copy))
    assert step == 5 and "step_000006 is damaged" in said


def change(key, value):
    def edit(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    return edit


MANIFESTS = {
    "is missing": lambda path: path.unlink(),
    "is no JSON": lambda path: path.write_text("{"),
    "is not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "is a list": lambda path: path.write_text("[]"),
    "is a number": lambda path: path.write_text("1"),
    "is nested too deeply": lambda path: path.write_text("[" * 100_000),
    "is a folder": lambda path: (path.unlink(), path.mkdir()),
    "names no files": change("files", None),
    "names strange files": change("files", {"config.json": 5}),
    "has sizes that are text": change("files", {"config.json": {"bytes": "many", "sha256": ""}}),
    "is of a later version": change("version", 2),
    "is of no version": change("version", None),
}


@pytest.mark.case(9)
@pytest.mark.parametrize("how", MANIFESTS)
def test_a_manifest_that_is_missing_damaged_or_of_another_version_is_noticed(how, copy):
    MANIFESTS[how](tools.latest(copy) / "manifest.json")
    step, said = found(Checkpoints(copy))
    assert step == 5 and "step_000006 is damaged" in said
    assert "version 2 of its layout is not known here, only 1" in said or how != "is of a later version"


@pytest.mark.case(9)
@pytest.mark.parametrize("how", ["missing", "no JSON", "edited"])
def test_a_state_that_is_missing_or_damaged_is_noticed(how, copy):
    path = tools.latest(copy) / "state.json"
    if how == "missing":
        path.unlink()
    elif how == "no JSON":
        path.write_text("{")
    else:
        change("step", 5)(path)
    step, said = found(Checkpoints(copy))
    assert step == 5 and "step_000006 is damaged (state.json" in said


@pytest.mark.case(9)
@pytest.mark.parametrize("text", [
    None,
    "",
    "{",
    "[]",
    "null",
    '{"latest": 7}',
    '{"latest": "../../step_000006"}',
    '{"latest": "step_000099"}',
    '{"best_value": "high"}',
    '{"latest": "step_000006", "best": "step_000001"}',
    '{"latest": "step_000006", "best": "step_000005", "best_value": "high"}',
])
def test_without_a_readable_latest_json_the_newest_whole_checkpoint_is_taken_and_the_next_save_mends_it(
        text, copy):
    path = copy / "checkpoints" / "latest.json"
    path.unlink() if text is None else path.write_text(text)
    checkpoints = Checkpoints(copy)
    assert found(checkpoints)[0] == 6
    write(checkpoints, 7, 0.1)
    expected = {"latest": "step_000007", "previous": "step_000006", "best": "step_000007", "best_value": 0.1}
    assert checkpoints.pointer() == expected


@pytest.mark.case(7, 8)
@pytest.mark.parametrize("break_file", [lambda path: cut(path, 0.5), flip])
def test_a_run_whose_latest_checkpoint_is_damaged_says_so_and_ends_as_if_nothing_had_happened(
        break_file, root, unbroken, tmp_path, capsys):
    assert tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run") == 0
    break_file(tools.latest(tmp_path / "run") / "training.safetensors")
    capsys.readouterr()
    assert tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run --resume") == 0
    said = capsys.readouterr().out
    assert "step_000006 is damaged (training.safetensors has" in said
    assert "looking for the one before" in said
    assert "after step 5" in said
    assert tools.same(unbroken["reward"], tmp_path / "run") and not leftovers(tmp_path / "run")


@pytest.mark.case(7, 8, 9)
@pytest.mark.parametrize("name, break_file, said", [
    ("model.safetensors", lambda path: cut(path, 0.99), "bytes, should have"),
    ("model.safetensors", flip, "SHA-256"),
    ("manifest.json", lambda path: path.unlink(), "No such file"),
    ("manifest.json", change("version", 2), "version 2"),
])
def test_where_no_checkpoint_is_whole_a_run_ends_in_one_line_and_changes_nothing(
        name, break_file, said, root, copy, capsys):
    for folder in (copy / "checkpoints").glob("step_*"):
        break_file(folder / name)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}
    capsys.readouterr()
    assert tools.here("reward", root, tools.SHORT, f"--out {copy} --resume") == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "no checkpoint in" in shown.err and "is whole" in shown.err
    assert all(f"{folder} is damaged" in shown.out for folder in (copy / "checkpoints").glob("step_*"))
    assert said in shown.out
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != ".lock"}


# -- full disks

@pytest.fixture
def disk():
    """disk(bytes): no file of this process can grow beyond; disk(): as large as may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_between(monkeypatch, disk, out, first, last, more):
    """The disk is full while these steps are taken and saved: metrics.jsonl can grow by some bytes more, and
    no file can be larger."""
    original = runtime.Run.seed_step

    def seed_step(self, step):
        if step == first:
            disk((out / "metrics.jsonl").stat().st_size + more)
        if step == last:
            disk()
        return original(self, step)

    monkeypatch.setattr(runtime.Run, "seed_step", seed_step)


@pytest.mark.case(13)
@pytest.mark.parametrize("more", [0, 10])
def test_while_the_disk_is_full_training_goes_on_and_afterwards_nothing_is_missing(
        more, root, unbroken, tmp_path, monkeypatch, disk, capsys):
    """more: bytes of a row that still fit."""
    full_between(monkeypatch, disk, tmp_path / "run", 2, 4, more)
    assert tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run") == 0
    said = capsys.readouterr().out
    for step in (3, 4):
        warning = f"warning: the checkpoint of step {step} can't be written to {tmp_path}/run/checkpoints ("
        assert warning in said
    assert said.count("Training goes on") == 2
    assert said.count("rows wait in memory") == 1
    assert "File too large" in said
    assert tools.same(unbroken["reward"], tmp_path / "run") and not leftovers(tmp_path / "run")


@pytest.mark.case(13)
def test_a_disk_that_stays_full_ends_the_run_with_a_line_and_the_old_checkpoint(
        root, unbroken, tmp_path, monkeypatch, disk, capsys):
    full_between(monkeypatch, disk, tmp_path / "run", 3, 99, 10)
    assert tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run") == 1
    disk()
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert f"error: the checkpoint of step 6 can't be written to {tmp_path}/run/checkpoints (" in shown.err
    assert "bytes, " in shown.err and "are free; the one before is untouched" in shown.err
    assert found(Checkpoints(tmp_path / "run")) == (3, "") and not leftovers(tmp_path / "run")
    monkeypatch.undo()
    assert tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run --resume") == 0
    assert tools.same(unbroken["reward"], tmp_path / "run")


@pytest.mark.case(13)
@pytest.mark.long
@pytest.mark.parametrize("script", tools.TRAINERS)
def test_a_process_that_may_write_no_large_files_trains_to_its_end_and_keeps_the_old_checkpoint(
        script, root, unbroken, tmp_path):
    hook = KILLED.format(stage="before the rename")
    tools.run(script, root, tools.SHORT, f"--out {tmp_path}/run", hook=hook, code=-9)
    text = tools.run(script, root, tools.SHORT, f"--out {tmp_path}/run --resume", code=1,
                     preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert text.count("Training goes on") == 3 and "Traceback" not in text
    assert f"error: the checkpoint of step 6 can't be written to {tmp_path}/run/checkpoints (" in text
    assert "bytes" in text
    assert found(Checkpoints(tmp_path / "run")) == (2, "") and not leftovers(tmp_path / "run")
    tools.run(script, root, tools.SHORT, f"--out {tmp_path}/run --resume")
    assert tools.same(unbroken[script], tmp_path / "run")


@pytest.mark.case(13)
def test_rows_and_what_is_printed_wait_until_the_last_checkpoint_has_room(root, unbroken, tmp_path,
                                                                          monkeypatch, disk):
    """stdout is a file on the same disk, as it is with nohup."""
    full_between(monkeypatch, disk, tmp_path / "run", 5, 99, 0)
    original = Checkpoints.begin
    monkeypatch.setattr(Checkpoints, "begin", lambda self, step: step == 6 and disk() or original(self, step))
    with open(tmp_path / "log.txt", "w") as log, contextlib.redirect_stdout(log):
        assert tools.here("reward", root, tools.SHORT, f"--out {tmp_path}/run") == 0
    assert tools.same(unbroken["reward"], tmp_path / "run")
    assert "rows wait in memory" in (tmp_path / "log.txt").read_text()
    assert "held-out accuracy" in (tmp_path / "log.txt").read_text()


@pytest.mark.case(13)
def test_rows_of_metrics_are_whole_though_the_disk_takes_some_bytes_at_a_time(tmp_path):
    written = Metrics(sft.Config(out=str(tmp_path)), 0, False)
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    file = written.file
    written.file = SimpleNamespace(write=lambda data: file.write(data[:7]))
    for number, row in enumerate(rows):
        written.write(row, pytest.fail)
        assert tools.metrics(tmp_path) == rows[:number + 1]


Usage = collections.namedtuple("Usage", "total used free")


@pytest.mark.case(13)
@pytest.mark.parametrize("flags", ["", "--overwrite", "--resume"])
def test_a_disk_known_to_be_too_small_is_refused_before_the_first_step_and_before_anything_is_deleted(
        flags, root, copy, tmp_path, monkeypatch, capsys):
    out = copy if flags else tmp_path / "new"
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    held = sum(path.stat().st_size for path in (copy / "checkpoints").rglob("*")) if flags else 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 5000, 5000))
    monkeypatch.setattr(runtime.Run, "steps", None)
    monkeypatch.setattr(runtime, "bytes_needed", lambda *args: held // 4 + 1251 if flags else 1251)
    assert tools.here("reward", root, tools.SHORT, flags, f"--out {out}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--out {out} has 5,000 bytes free" in error
    assert "more (two, the best, and one being written)" in error
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


# -- odd output folders

@pytest.mark.case(14)
def test_overwrite_leaves_nothing_of_the_run_before_even_if_killed_before_its_first_save(
        root, copy, monkeypatch):
    (copy / "notes.txt").write_text("mine")
    (copy / "checkpoints" / ".writing-step_000009").mkdir()
    with monkeypatch.context() as patch, pytest.raises(tools.Killed):
        tools.at_stage("in the model", 2, tools.die, patch.setattr)
        tools.here("reward", root, "--steps 2 --overwrite", f"--out {copy}")
    assert found(Checkpoints(copy)) == (None, "") and not (copy / "model.safetensors").exists()
    assert tools.here("reward", root, "--steps 2 --resume", f"--out {copy}") == 0
    assert Checkpoints(copy).all() == ["step_000002"]
    assert not leftovers(copy)
    assert tools.metrics(copy)[-1]["step"] == 2
    assert (copy / "notes.txt").read_text() == "mine"


@pytest.mark.case(14)
@pytest.mark.parametrize("kind, said", [
    ("a file", "is a file; name a folder"),
    ("below a file", "can't be written: Not a directory"),
    ("a link to nowhere", "can't be written: File exists"),
    ("with a file as checkpoints", "can't be written: File exists"),
    ("a run", "already holds a run; add --resume"),
    ("a model", "already holds a run; add --resume"),
    ("a model, resumed", "holds a model, but no run to go on with"),
    ("read-only", "is read-only"),
    ("in use", "another process writes to it"),
    ("in use, resumed", "another process writes to it"),
])
def test_an_output_folder_that_cannot_be_used_is_refused_before_the_first_step(
        kind, said, root, copy, tmp_path, monkeypatch, capsys):
    out = {
        "below a file": tmp_path / "file" / "run", "a file": tmp_path / "file",
        "with a file as checkpoints": tmp_path / "odd", "a link to nowhere": tmp_path / "link"
    }.get(kind, copy)
    resumed = "resumed" in kind or "read-only" in kind
    flags = "--resume" if resumed else "--overwrite" if kind == "in use" else ""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "checkpoints").write_text("mine")
    if "model" in kind:
        (copy / "metrics.jsonl").unlink(), (copy / "run.json").unlink()
    if kind == "read-only":
        monkeypatch.setattr(os, "access", lambda path, mode: not (mode == os.W_OK and str(path) == str(copy)))
    before = {
        path: path.lstat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path.name != ".lock" and path.is_file()
    }
    monkeypatch.setattr(runtime.Run, "steps", None)
    with open(copy / ".lock", "a") as lock:
        if "in use" in kind:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert tools.here("reward", root, tools.SHORT, f"--out {out}", flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error and str(out) in error
    assert before == {
        path: path.lstat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if path.name != ".lock" and path.is_file()
    }


@pytest.mark.case(14)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_an_output_folder_that_nobody_may_make_is_refused_before_the_first_step(root, monkeypatch, capsys):
    monkeypatch.setattr(runtime.Run, "steps", None)
    assert tools.here("reward", root, "--steps 2 --out /proc/run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--out /proc/run" in error
    assert "can't be written" in error or "is read-only" in error


@pytest.mark.case(14)
@pytest.mark.long
def test_two_processes_never_write_to_one_folder(root, unbroken, tmp_path):
    out = tmp_path / "run"
    first = tools.start(
        "sft",
        root,
        tools.SHORT,
        f"--out {out}",
        hook="original = sft.validation_loss\n"
             "def slow(run, *args):\n"
             "    import time\n"
             "    time.sleep(6 if run.step == 4 else 0)\n"
             "    return original(run, *args)\n"
             "sft.validation_loss = slow")
    tools.wait_for(lambda: (out / "checkpoints" / "step_000003").is_dir(), first)
    for flags in ("--resume", "--overwrite"):
        text = tools.run("sft", root, tools.SHORT, f"--out {out}", flags, code=2)
        assert "another process writes to it" in text and "Traceback" not in text
    text, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and tools.same(unbroken["sft"], out), text
