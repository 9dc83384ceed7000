"""judges.py: whose modules a user's function gets, what it is given, and the names that are taken."""
import json
import sys

import pytest

import judges
import sft
import tools
from examples import GRADERS
from judges import short_names
from plumbing.flags import UserError
from tools import TOY

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
