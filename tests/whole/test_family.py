"""bench/family.py: its commands are right, it counts what runs cost, keeps the best try, and goes on where it
stopped."""
import importlib
import json
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bench import family
from plumbing.flags import UserError, parse_flags

FOLDERS = {"start": "S", "family": "F", "run": "R", "seed": 0, "machine": "--seed 0 --threads 1"}


def commands():
    """(name, command line) of all that is run for one seed."""
    for method in family.METHODS:
        for tried in method.tries:
            for line in method.lines:
                yield f"{method.name} {tried}", line.format(**FOLDERS, tried=tried)
    for name, (_, line) in family.CLAIMS.items():
        yield name, line.format(**FOLDERS, tried="")
    for line in family.start_lines("S", 0, 100):
        yield "start", line


@pytest.mark.parametrize("name, line", list(commands()))
def test_every_flag_is_one_of_its_script_and_none_is_given_twice(name, line):
    script, *words = shlex.split(line)
    parse_flags(importlib.import_module(script.removesuffix(".py")).Config, "", words)
    flags = [word for word in words if word.startswith("--")]
    # Of two the last would count, and the search might search nothing.
    assert len(flags) == len(set(flags))


def test_there_are_at_least_eighteen_methods_and_what_claims_need_is_among_them():
    names = [method.name for method in family.METHODS]
    assert len(names) == len(set(names)) >= 18
    assert {method for method, _ in family.CLAIMS.values()} <= set(names)
    assert set(family.SHOWN) <= {*names, *family.CLAIMS}
    # Who needs others' models runs after them, with flags that nobody searches.
    assert {method.name for method in family.METHODS if "{family}" in "".join(method.lines)} == {
        method.name for method in family.METHODS if method.after}
    assert all(len(method.tries) == 1 for method in family.METHODS if method.after)


def test_other_labels():
    row = {"prompt": "q", "completions": ["aa", "b", "ccc"], "ranks": [0, 1, 2]}
    rng = np.random.default_rng(0)
    assert family.by_length([row], 0.0, rng) == [row]
    assert family.by_length([row], 1.0, rng) == [row | {"ranks": [-2, -1, -3]}]
    equal = row | {"completions": ["a", "b", "c"]}
    assert family.by_length([equal], 1.0, rng) == []
    assert family.good_and_bad([row], 1.0, rng) == [
        {"prompt": "q", "completion": "aa", "label": True},
        {"prompt": "q", "completion": "ccc", "label": False}]
    labelled = family.good_and_bad([row] * 1000, 0.1, rng)
    bad = sum(not row["label"] for row in labelled)
    assert len(labelled) - bad == 1000 and 70 < bad < 130


def test_spin_sets_each_sample_below_the_demonstrations_of_its_prompt():
    shown = [{"prompt": "p", "completion": "x"}, {"prompt": "q", "completion": "y"}]
    shown.append({"prompt": "p", "completion": "z"})
    samples = [{"prompt": "p", "completion": "z"}, {"prompt": "q", "completion": "w"}]
    assert family.spin_rows(shown, samples) == [
        {"prompt": "p", "chosen": "x", "rejected": "z"}, {"prompt": "q", "chosen": "y", "rejected": "w"}]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_samples_are_counted_as_each_script_says_it(tmp_path):
    write(tmp_path / "samples" / "summary.json", json.dumps({"groups": 10, "config": {"n": 8, "arena": []}}))
    write(tmp_path / "arena" / "summary.json", json.dumps({"groups": 10, "config": {"n": 8, "arena": ["a"]}}))
    for folder, config, rows in (
            ("ppo", {"rollout_batch": 4}, [{"step": 1}, {"step": 3}]),
            ("grpo", {"rollout_batch": 4}, [{"step": 1, "replies": 32.0}, {"step": 2, "replies": 96.0}]),
            ("dpo", {}, [{"step": 7}])):
        write(tmp_path / folder / "run.json", json.dumps({"config": config}))
        write(tmp_path / folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert family.samples_of(tmp_path) == 10 * 8 + 10 * 2 + 3 * 4 + 96


def test_margins_are_those_of_the_last_steps_against_the_first(tmp_path):
    write(tmp_path / "run.json", json.dumps({"script": "dpo.py", "config": {"beta": 0.5}}))
    rows = [{"chosen_logprob": -10.0, "margin": 0.0}] * 5 + [{"val_loss": 1.0}]
    rows += [{"chosen_logprob": -14.0, "margin": 3.0}] * 20
    write(tmp_path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert family.margins_of(tmp_path) == {"chosen": -4.0, "gap": 6.0}
    write(tmp_path / "run.json", json.dumps({"script": "sft.py", "config": {}}))
    assert family.margins_of(tmp_path) == {}


BUSY = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"


def test_a_command_costs_what_it_and_its_children_take_and_a_failure_is_one_line(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', '''{BUSY}'''])\n{BUSY}")
    seconds, peak = family.run_line(str(script), tmp_path / "log.txt")
    assert 0.6 <= seconds < 5
    # In MB. A process counts what its parent held as it was started, and that is this test's.
    assert 3 < peak < 10_000
    script.write_text("import sys\nprint('much')\nsys.exit('what went wrong')")
    with pytest.raises(UserError, match="parent.py failed: what went wrong; all .* is in .*log.txt"):
        family.run_line(str(script), tmp_path / "log.txt")


def test_what_is_done_is_not_done_again_unless_its_commands_change(tmp_path, monkeypatch):
    called = []

    def run_line(line, log):
        called.append(line)
        if line.startswith("evaluate.py"):
            results = {str(tmp_path / "run" / "model"): {"gold": 0.5}}
            (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"results": results}))
        return len(called), 100 * len(called)

    monkeypatch.setattr(family, "run_line", run_line)
    for lines in (["a.py", "b.py"], ["a.py", "b.py"], ["a.py", "c.py"]):
        family.run_method(lines, "model", tmp_path / "run", tmp_path / "start", 0)
    asked = [line.split()[0] for line in called]
    assert asked == ["a.py", "b.py", "evaluate.py", "a.py", "c.py", "evaluate.py"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    # The costs of a.py and c.py; the evaluation is not the method's.
    assert (result["gold"], result["seconds"], result["memory"]) == (0.5, 4 + 5, 500)


def test_the_search_keeps_the_best_try_and_the_table_names_it(tmp_path, monkeypatch):
    methods = [family.Method("one", "labels", ("x.py {tried}",), ("--a 1", "--a 2", "--a 3")),
               family.Method("two", "reward model", ("y.py",))]
    golds = {"one-a-1": 0.3, "one-a-2": 0.9, "one-a-3": 0.6, "one": 0.8, "two": 0.7}

    def run_method(lines, model, folder, start, seed):
        numbers = {"wins": 0.5, "ties": 0.4, "losses": 0.1, "kl": 1.0}
        numbers |= {"seconds": 10, "memory": 300, "samples": 7, "lines": lines}
        numbers["gold"] = golds[folder.name] + seed / 100
        write(folder / "result.json", json.dumps(numbers))

    monkeypatch.setattr(family, "run_method", run_method)
    config = SimpleNamespace(seeds=2, lanes=1)
    found = family.search(tmp_path, methods, config)
    assert found == {"one": pytest.approx({"--a 1": 0.33, "--a 2": 0.93, "--a 3": 0.63})}
    assert "| one | `--a 1` 0.33, **`--a 2` 0.93**, `--a 3` 0.63 |" in family.search_table(found)
    best = {"one": "--a 2", "two": ""}
    family.run_all(family.final_jobs(tmp_path, methods, best, config), 1)
    assert json.loads((tmp_path / "seed-1" / "one" / "result.json").read_text())["lines"] == ["x.py --a 2"]
    for seed in range(2):
        write(tmp_path / f"seed-{seed}" / "start" / "result.json", json.dumps({"labels": 1000}))
    points = {1: (0.0, [0.1, 0.2]), 16: (1.8, [0.8, 0.9])}
    table = family.family_table(tmp_path, methods, best, points, config)
    lines = table.splitlines()
    assert lines[2].startswith("| SFT | demonstrations | 0.10 | 0.20 |")
    assert lines[4].startswith("| one | labels | 0.80 | 0.81 | 0.50 | 0.40 | 0.10 | 1.00 | 1,000 | 7 | 10 |")
    assert lines[4].endswith("| 300 | `--a 2` |")
    assert len({line.count("|") for line in lines}) == 1


def test_an_unknown_method_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["family.py"])
    config = family.Config(out=str(tmp_path), only=["dpo", "dop"])
    with pytest.raises(UserError, match="--only dop: no such method; there are sft-best, .*distill"):
        family.main(config)
