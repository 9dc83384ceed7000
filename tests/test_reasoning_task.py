"""recipes/reasoning_task.py, with a package that stands for reasoning_gym: its files, its answers, its
checker as a reward."""
import json
import sys
from types import SimpleNamespace

import pytest

from formats.sources import read_rows
from judges import Function, Modules
from plumbing.flags import UserError, parse_flags
from tools import ROOT, SILENT, without

MARKS = "#### \\boxed{1} \\\\ \"quoted\" \n é"


@pytest.fixture
def task(monkeypatch):
    """The recipe, with a package of one task: count(1), whose answers the metadata checks."""
    def create_dataset(name, size, seed, most=50, word="follows"):
        if name != "count":
            raise ValueError(f"Dataset '{name}' not registered")
        assert most > 0, "most must be positive"
        return [{
            "question": f"What {word} {seed + i % most}?", "answer": str(seed + i % most + 1),
            "metadata": {"source_dataset": "count", "marks": MARKS, "right": str(seed + i % most + 1)}
        } for i in range(size)]

    def check(answer, entry):
        assert entry["metadata"]["marks"] == MARKS and entry["answer"] == entry["metadata"]["right"]
        if answer == "almost":
            return 1 - 1e-12
        return 1.0 if answer == entry["metadata"]["right"] else 0.25

    package = SimpleNamespace(create_dataset=create_dataset, get_score_answer_fn=lambda name: check)
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.syspath_prepend(str(ROOT))
    import recipes.reasoning_task as recipe
    yield recipe
    recipe.checker_of.cache_clear()


def write(recipe, flags, *more):
    recipe.main(parse_flags(recipe.Config, "", flags.split() + list(more)))


def questions(file):
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def test_the_checker_gets_back_what_the_files_were_given(task, tmp_path):
    write(task, f"--task count --out {tmp_path}/files --prompts 20 --heldout-prompts 5 --seed 3")
    rows = {
        end: read_rows(f"{tmp_path}/files/prompts{end}.jsonl", "prompts", SILENT)
        for end in ("", "_heldout")
    }
    assert [len(own) for own in rows.values()] == [20, 5]
    assert len({row.text for own in rows.values() for row in own}) == 25
    function = Function("--reward-fn", "recipes.reasoning_task:score")
    for row in rows[""]:
        following = str(int(row.text.removesuffix("?").split()[-1]) + 1)
        assert function([row.text] * 2, [f" {following}\n", "no"], [row.answer] * 2,
                        [True] * 2).tolist() == [1, 0.25]
    assert function(["?"], ["1"], [""], [True]).tolist() == [0]


def test_what_is_right_is_what_the_checker_gives_all_of_its_score_and_nothing_less(task, tmp_path):
    write(task, f"--task count --out {tmp_path}/files --prompts 2 --heldout-prompts 1")
    row = read_rows(f"{tmp_path}/files/prompts.jsonl", "prompts", SILENT)[0]
    answer = str(int(row.text.removesuffix("?").split()[-1]) + 1)
    replies = [f" {answer}", "almost", "no"]
    assert Function("--judge", "recipes.reasoning_task:right")(
        [row.text] * 3, replies, [row.answer] * 3, [True] * 3).tolist() == [1, 0, 0]


def test_settings_reach_the_package_and_the_suffix_every_question(task, tmp_path):
    write(task, f"--task count --out {tmp_path}/files --prompts 4 --heldout-prompts 2 --settings most=6 "
                "word=precedes --suffix", "Answer alone.")
    asked = questions(tmp_path / "files/prompts.jsonl") + questions(tmp_path / "files/prompts_heldout.jsonl")
    assert sorted(asked) == [f"What precedes {number}? Answer alone." for number in range(6)]
    for settings, said in (
            ("most=0", "--task count can't be made: most must be positive"),
            ("least=1", "--task count can't be made: .* unexpected keyword argument 'least'"),
            ("most", "--settings most is not name=value"),
            ("size=3", "--settings size is set by --prompts and --seed")):
        with pytest.raises(UserError, match=said):
            write(task, f"--task count --out {tmp_path}/new --settings {settings}")
    assert not (tmp_path / "new").exists()


def test_the_files_share_no_question_and_each_is_drawn_from_all_of_them(task, tmp_path):
    write(task, f"--task count --out {tmp_path}/files --prompts 20 --heldout-prompts 15 --demonstrations 15")
    files = [tmp_path / f"files/{name}.jsonl" for name in ("prompts", "prompts_heldout", "demonstrations")]
    numbers = [[int(text.removesuffix("?").split()[-1]) for text in questions(file)] for file in files]
    assert [len(own) for own in numbers] == [20, 15, 15]
    assert sorted(sum(numbers, [])) == list(range(50))
    # The package asks for small numbers first here.
    for own in numbers:
        assert min(own) < 15 and max(own) >= 35
    rows = read_rows(str(files[2]), "demonstrations", SILENT)
    assert [row.replies for row in rows] == [[str(number + 1)] for number in numbers[2]]


def test_the_function_is_found_from_any_folder(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Modules("recipes.reasoning_task").hidden == []
    assert Function("--judge", "recipes.reasoning_task:score").wants_answers


def test_what_cannot_be_written_is_said_in_one_line(task, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--task other can't be made: Dataset 'other' not registered"):
        write(task, f"--task other --out {tmp_path}/files")
    with pytest.raises(UserError,
                       match="--task count has 50 different questions in 400, and 100 are asked for"):
        write(task, f"--task count --out {tmp_path}/files --prompts 90 --heldout-prompts 10")
    assert not (tmp_path / "files").exists()
    write(task, f"--task count --out {tmp_path}/files --prompts 4 --heldout-prompts 1")
    with pytest.raises(UserError, match="already holds prompts"):
        write(task, f"--task count --out {tmp_path}/files --prompts 4 --heldout-prompts 1")
    without(monkeypatch, "reasoning_gym")
    with pytest.raises(UserError, match="not installed: pip install reasoning-gym"):
        write(task, f"--task count --out {tmp_path}/new")
