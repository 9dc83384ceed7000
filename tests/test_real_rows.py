"""recipes/chitchat_task.py and recipes/champ_task.py, with packages that stand for those of the data: what
their records become, and that the scripts read it."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from examples import TOKENIZER
from formats.rows import Row
from formats.sources import read_rows
from model import GPT, GPTConfig, ScalarModel
from plumbing.flags import UserError, parse_flags
from process import encode_steps
from reactions import exchanges_of
from tools import ROOT, SILENT, without


def dialogue(*groups, **more):
    """A record of chitchat_dataset: each group (sender, *texts)."""
    return {"messages": [[{"text": text, "sender": own[0]} for text in own[1:]] for own in groups]} | more


RATED = {"witty": "7", "interesting": 5, "upbeat": 9}
TALK = dialogue(("a", "Hi", "you there?"), ("b", "Yes."), ("a", "Good."), ("b", "Why?"), ("a", "Bye."),
                ratings=RATED)


@pytest.fixture
def chitchat(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import recipes.chitchat_task as recipe
    return recipe


def stand_in(monkeypatch, dialogues):
    package = SimpleNamespace(Dataset=lambda: dict(enumerate(dialogues)))
    monkeypatch.setitem(sys.modules, "chitchat_dataset", package)


def write(recipe, flags):
    recipe.main(parse_flags(recipe.Config, "", flags.split()))


# -- dialogues

def test_what_one_sends_in_a_row_is_a_turn_and_the_first_to_write_is_the_user(chitchat):
    assert chitchat.turns_of(TALK)[:2] == [
        {"role": "user", "content": "Hi\nyou there?"}, {"role": "assistant", "content": "Yes."}]
    # A blank turn is none, and those around it are one.
    quiet = dialogue(("b", "Hello."), ("a", "  "), ("b", "Anyone?"), ("a", "Me."))
    assert chitchat.turns_of(quiet) == [
        {"role": "user", "content": "Hello.\nAnyone?"}, {"role": "assistant", "content": "Me."}]
    assert [turn["role"] for turn in chitchat.turns_of(dialogue(("a", " "), ("b", "Hm."), ("a", "Oh.")))] == [
        "user", "assistant"]


def test_whom_nobody_answered_has_no_dialogue_and_neither_have_three(chitchat):
    assert chitchat.turns_of(dialogue(("a", "Hello?"), ratings=RATED)) == []
    assert chitchat.turns_of(dialogue(("a", "Hello?"), ("b", " "))) == []
    assert chitchat.turns_of(dialogue(("a", "Hello?"), ("b", "Hi."), ("c", "Hi."))) == []


@pytest.mark.parametrize("most, said", [
    (0, ["Hi\nyou there?", "Yes.", "Good.", "Why?"]), (2, ["Good.", "Why?"]), (3, ["Good.", "Why?"]),
    (4, ["Hi\nyou there?", "Yes.", "Good.", "Why?"]), (9, ["Hi\nyou there?", "Yes.", "Good.", "Why?"])])
def test_a_rated_dialogue_ends_with_the_assistant_and_begins_with_the_user(chitchat, most, said):
    kept = chitchat.up_to_a_reply(chitchat.turns_of(TALK), most)
    assert [turn["content"] for turn in kept] == said
    assert [turn["role"] for turn in kept] == ["user", "assistant"] * (len(said) // 2)


def test_files_hold_ratings_by_aim_and_alone_and_the_talks_whole(chitchat, tmp_path, monkeypatch):
    short = dialogue(("a", "Hi."), ("b", "Oh."), ratings=RATED)
    unrated = dialogue(("a", "One."), ("b", "Two."), ("a", "No, three."))
    stand_in(monkeypatch, [TALK, short, unrated, dialogue(("a", "Hm."), ratings=RATED)])
    write(chitchat, f"--out {tmp_path}/files --turns 2")
    rated = read_rows(f"{tmp_path}/files/rated.jsonl", "feedback", SILENT)
    assert [row.ratings for row in rated] == [[{"witty": 7, "interesting": 5, "upbeat": 9}]] * 2
    assert [(row.text, *row.replies) for row in rated] == [("Good.", "Why?"), ("Hi.", "Oh.")]
    for aim, rating in (("witty", 7), ("interesting", 5), ("upbeat", 9)):
        alone = read_rows(f"{tmp_path}/files/{aim}.jsonl", "feedback", SILENT)
        assert [row.ratings for row in alone] == [[{"rating": rating}]] * 2
    talks = exchanges_of(read_rows(f"{tmp_path}/files/talks.jsonl", "prompts", SILENT))
    assert [(own.reply, own.reaction) for own in talks] == [
        ("Yes.", "Good."), ("Why?", "Bye."), ("Two.", "No, three.")]


def test_what_dialogues_cannot_be_written_is_said_in_one_line(chitchat, tmp_path, monkeypatch):
    stand_in(monkeypatch, [TALK])
    with pytest.raises(UserError, match="--turns 1 holds no turn of the user's with a reply"):
        write(chitchat, f"--out {tmp_path}/files --turns 1")
    write(chitchat, f"--out {tmp_path}/files")
    with pytest.raises(UserError, match="already holds dialogues"):
        write(chitchat, f"--out {tmp_path}/files")
    with pytest.raises(UserError, match="rated.jsonl is a file; name a folder"):
        write(chitchat, f"--out {tmp_path}/files/rated.jsonl")
    without(monkeypatch, "chitchat_dataset")
    with pytest.raises(UserError, match="not installed: pip install chitchat-dataset"):
        write(chitchat, f"--out {tmp_path}/new")


# -- solutions

TEXT = "Add 1.\n\nSo 2.\nThen 3. But 5.\n \nDone."


@pytest.fixture
def champ(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import recipes.champ_task as recipe
    return recipe


def labels_from(champ, start):
    row = champ.row_of({"_text": "How many?"}, {"text": TEXT, "start_idx": start})
    assert row["prompt"] == "How many?"
    assert row["steps"] == ["Add 1.", "So 2.", "Then 3. But 5.", "Done."]
    return row["labels"]


@pytest.mark.parametrize("start, labels", [
    (None, [1, 1, 1, 1]), (0, [-1]), (TEXT.index("So"), [1, -1]), (TEXT.index("2."), [1, -1]),
    (TEXT.index("Then"), [1, 1, -1]), (TEXT.index("But"), [1, 1, -1]), (TEXT.index("Done"), [1, 1, 1, -1]),
    (len(TEXT) - 1, [1, 1, 1, -1]),
    # What is marked begins with the end of the line before, or with blank lines.
    (TEXT.index("\n\nSo"), [1, -1]), (TEXT.index("\nThen"), [1, 1, -1]),
    (TEXT.index("\n \n"), [1, 1, 1, -1])])
def test_lines_are_good_up_to_the_one_in_which_the_marked_part_begins(champ, start, labels):
    assert labels_from(champ, start) == labels


def test_the_first_wrong_step_is_the_one_least_likely_good(champ):
    good = [torch.tensor(own) for own in ([0.9, 0.2], [0.1, 0.5, 0.6, 0.7], [0.9, 0.8])]
    assert champ.found_first(good, [1, 2, 1]) == pytest.approx(
        {"the least P(good)": 2 / 3, "chance": (1 / 2 + 1 / 4 + 1 / 2) / 3, "line 2 of each": 2 / 3})


@pytest.fixture
def solutions(champ, tmp_path, monkeypatch):
    """The folder of a file of 40 problems of two solutions, one of them wrong."""
    problems = {}
    for number in range(40):
        problems[str(number)] = {"_text": f"What is {number}?", "fws_annotations": {
            "A": {"text": f"{number}.\nSo 1.", "start_idx": 4}, "B": {"text": "2.\nYes.", "start_idx": None}}}
    (tmp_path / "dataset_files").mkdir()
    (tmp_path / "dataset_files/v0.json").write_text(json.dumps({"problems": problems}))
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sys.modules, "champ_dataset", package)
    write(champ, f"--out {tmp_path}/champ")
    return tmp_path / "champ"


def test_process_reads_the_solutions(solutions):
    rows = read_rows(f"{solutions}/steps.jsonl", "steps", SILENT)
    assert len(rows) == 80 and {tuple(row.labels) for row in rows} == {(1, -1), (1, 1)}


def test_probabilities_are_those_at_the_ends_of_all_steps(champ):
    torch.manual_seed(0)
    trunk = GPT(GPTConfig(
        vocab_size=TOKENIZER.n_vocab, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, block_size=64))
    model = ScalarModel.from_trunk(trunk, labels=3)
    torch.nn.init.normal_(model.score.weight)
    row = Row([{"role": "user", "content": "Sum?"}], steps=["a b", "c"], labels=[1, None])
    good = champ.probabilities(model.eval(), TOKENIZER, row)
    ids = encode_steps(TOKENIZER, row, "\n").ids
    ends = [max(i for i, one in enumerate(ids) if TOKENIZER.decode([one]) == "\n"), len(ids) - 1]
    logits = model(torch.tensor([ids]), torch.tensor(ends))
    assert torch.allclose(good, logits.softmax(1)[:, 2]) and good[0] != good[1]
    row.steps, row.labels = ["a" * 70], [1]
    assert champ.probabilities(model, TOKENIZER, row) is None


def test_the_measure_is_of_held_out_wrong_solutions(champ, solutions, capsys, monkeypatch):
    asked = []

    def probabilities(model, tokenizer, row):
        asked.append(row.text)
        return torch.tensor([0.1, 0.9])

    model = SimpleNamespace(eval=lambda: None)
    monkeypatch.setattr(champ, "load_model", lambda *a, **k: (model, None))
    monkeypatch.setattr(champ, "probabilities", probabilities)
    write(champ, f"--out {solutions} --measure model --val-fraction 0.3")
    assert 3 < len(asked) < 25 and len(set(asked)) == len(asked)
    said = capsys.readouterr().out
    assert f"first wrong step of {len(asked)} of {len(asked)} wrong solutions found: by the least" in said


def test_what_solutions_cannot_be_written_or_measured_is_said_in_one_line(champ, solutions, monkeypatch):
    with pytest.raises(UserError, match="already holds steps"):
        write(champ, f"--out {solutions}")
    monkeypatch.setattr(champ, "load_model", lambda *a, **k: (SimpleNamespace(eval=lambda: None), None))
    monkeypatch.setattr(champ, "probabilities", lambda *a: None)
    with pytest.raises(UserError, match="holds out no wrong solution that the model can read"):
        write(champ, f"--out {solutions} --measure model")
    without(monkeypatch, "champ_dataset")
    with pytest.raises(UserError, match="not installed: pip install champ-dataset"):
        write(champ, f"--out {solutions}/new")
