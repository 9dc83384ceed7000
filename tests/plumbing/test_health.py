"""What a run's metrics say of its health, and that it is said once, with a switch that the script has."""
import json
from types import SimpleNamespace

import pytest

import grpo
import judges
import ppo
from plumbing.health import Watch, diagnose, switches

FLAGS = ppo.Config()


def history(rollouts=20, **changed):
    """Metrics of a healthy run; changed: {metric: its value as a function of the rollout's number}."""
    healthy = {
        "kl": lambda i: min(6, 0.3 * i),
        "explained_variance": lambda i: 0.7 - 1 / (i + 1),
        "eos_rate": lambda i: 0.95 + 0.01 * (i % 3),
        "entropy": lambda i: 0.5 + 1 / (i + 1),
        "score": lambda i: 0.1 * i,
        "gold": lambda i: min(0.9, 0.08 * i) - 0.05 * (i % 2),
    }
    return [{name: value(i) for name, value in (healthy | changed).items()} for i in range(rollouts)]


def test_a_healthy_run_shows_no_symptom_however_long():
    for rollouts in (1, 5, 10, 15, 20, 40):
        assert diagnose(history(rollouts), FLAGS, ["gold"]) == {}
    # Both fall: no over-optimisation.
    assert diagnose(history(gold=lambda i: 0.8 - 0.05 * i, score=lambda i: -0.1 * i), FLAGS, ["gold"]) == {}
    # The critic has got there.
    assert diagnose(history(explained_variance=lambda i: -1.0 if i < 18 else 0.1), FLAGS) == {}
    too_early = history(9,
                        explained_variance=lambda i: -1.0,
                        eos_rate=lambda i: 1 - 0.1 * i,
                        entropy=lambda i: 0.1 ** i)
    assert diagnose(too_early, FLAGS) == {}
    without_gold = [{k: v for k, v in row.items() if k != "gold"} for row in history()]
    assert diagnose(without_gold, FLAGS) == {}


@pytest.mark.case(17)
@pytest.mark.parametrize("symptom, changed", [
    ("kl", {"kl": lambda i: 20.1 if i == 19 else 5.0}),
    ("critic", {"explained_variance": lambda i: 0.5 if i < 10 else -0.1}),
    ("eos", {"eos_rate": lambda i: 0.95 - 0.01 * i}),
    ("entropy", {"entropy": lambda i: 2.0 * 0.8**i}),
    ("gold", {"gold": lambda i: 0.08 * i if i < 10 else 0.8 - 0.06 * (i - 10)}),
])
def test_each_symptom_is_found_alone_and_its_advice_names_a_switch(symptom, changed):
    found = diagnose(history(**changed), FLAGS, ["gold"])
    assert found.keys() == {symptom} and "--" in found[symptom] and "\n" not in found[symptom]


@pytest.mark.parametrize("script", [ppo, grpo])
def test_advice_names_flags_that_the_script_has(script):
    sick = history(kl=lambda i: 50.0, eos_rate=lambda i: 0.95 - 0.01 * i, entropy=lambda i: 2.0 * 0.8**i)
    for row in sick:
        del row["explained_variance"]
    found = diagnose(sick, script.Config(), ["gold"])
    assert found.keys() == {"kl", "eos", "entropy"}
    flags = {word.strip(",:;()") for line in found.values() for word in line.split() if word.startswith("--")}
    assert flags and {flag[2:].replace("-", "_") for flag in flags} <= vars(script.Config()).keys()


def test_switches_are_listed_as_one_says_them():
    assert switches(FLAGS, "lr") == "--lr" and switches(FLAGS, "lr", "nothing") == "--lr"
    assert switches(FLAGS, "lr", "kl_coef", "clip") == "--lr, --kl-coef or --clip"


def test_a_judge_that_is_new_on_resume_has_no_past_to_be_compared_with(tmp_path):
    rows = [{"score": 1, "kl": 1, "entropy": 1, "eos_rate": 1, "step": step} for step in (1, 2)]
    rows[1]["gold"] = 0.5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = SimpleNamespace(out=tmp_path, step=2, main=True)
    assert Watch(run, FLAGS, judges.load_functions("--judge", ["toy:gold"])).history == rows[1:]
    assert Watch(run, FLAGS, []).history == rows
    run.step = 0
    assert Watch(run, FLAGS, []).history == []
