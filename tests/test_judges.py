"""judges.py: whose modules a user's function gets, what it is given, and the names that are taken."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import best_of_n
import evaluate
import grpo
import judges
import ppo
import sft
import tools
from examples import GRADERS
from judges import short_names
from plumbing.flags import UserError
from tools import TOY, recorded, rows_of, run_here

MINE = """
import data
import evaluate
from formats import secret

def score(replies):
    import model
    return [data.NUMBER + evaluate.NUMBER + secret.NUMBER + model.NUMBER] * len(replies)

def own(replies):
    import sft
    return [float(hasattr(sft, "validation_loss"))] * len(replies)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with files that are called like ours."""
    (tmp_path / "mine.py").write_text(MINE)
    for number, name in enumerate(("data", "evaluate", "model")):
        (tmp_path / f"{name}.py").write_text(f"NUMBER = {10 ** number}\n")
    (tmp_path / "formats").mkdir()
    (tmp_path / "formats" / "__init__.py").write_text("")
    (tmp_path / "formats" / "secret.py").write_text("NUMBER = 1000\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_function_gets_the_files_beside_it_and_not_ours_of_the_same_name(folder):
    import data
    import formats
    before, path = dict(sys.modules), list(sys.path)
    function = judges.Function("--reward-fn", "mine:score")
    assert function(["?"], ["a", "b"], [""], [True]).tolist() == [1111.0, 1111.0]
    assert sys.modules["data"] is data is before["data"] and sys.modules["formats"] is formats
    assert sys.path == path and not hasattr(formats, "secret")
    import model
    assert hasattr(model, "GPT")


def test_what_lies_nowhere_else_is_ours(folder):
    function = judges.Function("--judge", "mine:own")
    assert function(["?"], ["a"], [""], [True]).tolist() == [1.0]
    assert sys.modules["sft"] is sft


def test_a_judge_of_a_name_that_the_logs_have_is_refused(folder):
    (folder / "mine.py").write_text("def kl(replies): return [0.0] * len(replies)\n")
    with pytest.raises(UserError, match="the logs have another number named kl; rename the function"):
        judges.load_functions("--judge", ["mine:kl"])
    assert [function.name
            for function in judges.load_functions("--reward-fn", ["mine:kl", "mine:kl"])] == ["kl"] * 2


@pytest.mark.parametrize("script, own", [
    ("ppo", "--policy-loss penalty --ptx-coef 1 --ptx-data {toy}/demonstrations.jsonl "
            "--missing-eos subtract"),
    ("grpo", "--kl-coef 0.1"),
])
def test_no_number_that_is_logged_is_free_for_a_judge(script, own, tmp_path):
    words = ("--steps 1 --rollout-batch 4 --minibatches 1 --max-new-tokens 4 --judge toy:gold --kl-in loss "
             f"--kl k2 {own.format(toy=TOY)}")
    assert tools.here("sft", tmp_path, f"--steps 1 --out {tmp_path}/sft --eval-every 100") == 0
    zero = "def zero(replies): return [0.0] * len(replies)\n"
    (tmp_path / "zeros.py").write_text(zero)
    sys.path.insert(0, str(tmp_path))
    try:
        inputs = f"--model {tmp_path}/sft --data {TOY}/prompts.jsonl"
        flags = f"{inputs} --reward-fn zeros:zero {words} --out {tmp_path}/run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tools, "PLAN", {script: ""})
            assert tools.here(script, tmp_path, flags) == 0
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("zeros", None)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "gold" in row and row.keys() - {"gold"} <= judges.TAKEN


def test_sources_are_named_by_as_much_of_their_path_as_tells_them_apart():
    assert short_names(["runs/reward", "runs/other/", "mine:brief"]) == ["reward", "other", "mine:brief"]
    assert short_names(["a/sft", "b/sft", "c/x/sft"]) == ["a/sft", "b/sft", "x/sft"]
    assert short_names(["sft", "b/sft"]) == ["sft", "b/sft"]
    assert short_names(["a/sft", "a/sft", "a/ppo"]) == ["a/sft#1", "a/sft#2", "ppo"]


@pytest.mark.parametrize("name, given", [
    ("least", 3),
    ("by_name", ["7"]),
    ("everything", ["answers", "dialogues", "ended", "prompts"]),
    ("perhaps", ["7"]),
])
def test_a_reward_function_gets_what_its_parameters_name_whatever_their_number(
        name, given, tmp_path, monkeypatch):
    (tmp_path / "graders.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(tmp_path)
    function = judges.Function("--reward-fn", f"graders:{name}")
    function(["What?"], ["The 7."], ["7"], [True])
    assert sys.modules.pop("graders").calls == [given] and function.wants_answers == (name == "by_name")


TOOLS = """
def fine(replies, dialogues):
    return [None if reply == "no" else reply + dialogues[0][-1]["content"] for reply in replies]

def text(replies):
    return "a" * len(replies)

def short(replies):
    return [None] * (len(replies) - 1)

def number(replies):
    return [1] * len(replies)

def nothing(replies):
    return None

def fails(replies):
    return 1 / 0
"""


def test_a_tool_returns_a_turn_or_none_for_each_reply_and_anything_else_names_it(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TOOLS)
    monkeypatch.chdir(tmp_path)
    lists = (["?"] * 2, ["no", "yes"], [""] * 2, [True] * 2, [[{"role": "user", "content": "!"}]] * 2)
    assert judges.Tool("--tool", "mine:fine", 2)(*lists) == [None, "yes!"]
    for name in ("text", "short", "number", "nothing"):
        with pytest.raises(UserError, match=f"--tool mine:{name} must return a list .* each of 2 replies"):
            judges.Tool("--tool", f"mine:{name}", 2)(*lists)
    with pytest.raises(UserError, match="--tool mine:fails failed .ZeroDivisionError"):
        judges.Tool("--tool", "mine:fails", 2)(*lists)


# -- several reward models

# Of three models and a function.
SCORES = [[1.0, -2.0, 0.5], [3.0, -2.5, 0.5], [2.0, 4.0, 0.5], [10.0, 20.0, 30.0]]
WEIGHTS = [1.0, 2.0, 1.0, 0.1]


def together(kind, pessimism=1.0):
    return SimpleNamespace(reward_combine=kind, pessimism=pessimism, reward_fn=["mine:f"], process="",
                           reward_weights=[])


@pytest.mark.parametrize("kind, pessimism, of_models", [
    ("sum", 1, [9.0, -3.0, 2.0]),
    ("mean", 1, [3.0, -1.0, 2 / 3]),
    ("min", 1, [1.0, -5.0, 0.5]),
    # Deviations (not variances) of the three weighted scores about their mean.
    ("pessimistic", 1, [3 - (14 / 3) ** 0.5, -1 - 14**0.5, 2 / 3 - (1 / 18) ** 0.5]),
    ("pessimistic", 2, [3 - 2 * (14 / 3) ** 0.5, -1 - 2 * 14**0.5, 2 / 3 - 2 * (1 / 18) ** 0.5]),
])
def test_reward_models_become_one_score_before_those_of_functions_are_added(kind, pessimism, of_models):
    config = together(kind, pessimism)
    expected = pytest.approx([x + y for x, y in zip(of_models, [1, 2, 3])], rel=1e-6)
    assert judges.combined(np.array(SCORES), np.array(WEIGHTS), config).tolist() == expected
    assert judges.combined(torch.tensor(SCORES), torch.tensor(WEIGHTS), config).tolist() == expected


def test_by_default_the_score_is_the_weighted_sum_bit_for_bit():
    scores, weights = torch.randn(4, 50), torch.randn(4)
    assert torch.equal(judges.combined(scores, weights, together("sum")), weights @ scores)
    for config in (ppo.Config(), grpo.Config(), best_of_n.Config(), evaluate.Config()):
        assert (config.reward_combine, config.pessimism) == ("sum", 1)
    with pytest.raises(ValueError, match="unknown combination median"):
        judges.combined(scores, weights, together("median"))


def test_models_that_agree_have_the_score_of_one_and_a_score_that_is_no_number_stays_one():
    scores = torch.tensor([[1.0, 2.0], [1.0, float("nan")]])
    config = SimpleNamespace(reward_combine="pessimistic", pessimism=3.0, reward_fn=[], process="")
    for kind in ("mean", "min", "pessimistic"):
        config.reward_combine = kind
        one, other = judges.combined(scores, torch.ones(2), config).tolist()
        assert one == 1 and other != other


def test_flags_of_an_ensemble_that_is_none_are_refused():
    for flags, sources, said in (
            ({"reward_combine": "mean"}, ["a", "mine:f"], "--reward-combine mean combines several .* are 1"),
            ({"pessimism": 2.0}, ["a", "b", "mine:f"], "--pessimism is for --reward-combine pessimistic")):
        config = together("sum")
        vars(config).update(flags)
        with pytest.raises(UserError, match=said):
            judges.source_weights(config, sources)
    assert judges.source_weights(together("min"), ["a", "b", "mine:f"]) == [1, 1, 1]


@pytest.mark.parametrize("script", ["ppo", "grpo", "best_of_n", "evaluate"])
def test_every_script_that_scores_takes_the_pessimistic_score_of_two_reward_models(
        script, small, tmp_path, monkeypatch):
    calls = recorded(monkeypatch, tools.SCRIPTS[script], "combined")["combined"]
    run_here("reward", f"{tools.ALL_AT_ONCE} --model {small}/sft --data {small}/rankings.json --seed 1",
             f"--steps 1 --lr 0.01 --out {tmp_path}/second")
    model = f"--models {small}/sft" if script == "evaluate" else f"--model {small}/sft"
    out = "run.json" if script == "evaluate" else "run"
    own = {"ppo": "--rollout-batch 6 --minibatches 2 --steps 1", "best_of_n": "--n 2", "evaluate": "",
           "grpo": "--rollout-batch 6 --group 2 --steps 1"}[script]
    run_here(script, f"{model} --reward {small}/reward {tmp_path}/second --reward-combine pessimistic {own}",
             f"--pessimism 2 --data {small}/prompts.json --max-new-tokens 8 --threads 1",
             f"--out {tmp_path}/{out}")
    assert calls
    for (scores, weights, config), result in calls:
        scores, result = np.array(scores.tolist()), result.tolist()
        assert scores.shape == (2, len(result)) and config.pessimism == 2
        expected = scores.mean(0) - 2 * scores.std(0)
        assert result == pytest.approx(expected, abs=1e-4)
        assert scores.std(0).max() > 1e-3
    if script == "ppo":
        assert {"score", "score_reward", "score_second"} <= rows_of(tmp_path / "run")[0].keys()
