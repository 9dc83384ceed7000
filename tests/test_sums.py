"""sums.py: the files that it writes are what the scripts read, and its checkers tell right from wrong."""
import collections
import json
import re

import numpy as np
import pytest
import torch

import sums
from formats.foreign_tokenizer import open_tokenizer
from formats.sources import read_rows
from plumbing.flags import UserError
from tools import SILENT, run_here

FEW = "--sums 600 --heldout-sums 100"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{name: the rows of a file} of the task, and its folder."""
    folder = tmp_path_factory.mktemp("sums") / "sums"
    run_here("sums", f"--out {folder} {FEW}")
    names = ("demonstrations", "demonstrations_heldout", "prompts", "prompts_heldout")
    return folder, {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in names
    }


def ways(prompt):
    """All partial sums of a prompt, by a loop over its letters."""
    totals, sign, number = [], 1, ""
    for letter in prompt:
        if letter.isdigit():
            number += letter
            continue
        totals.append((totals[-1] if totals else 0) + sign * int(number))
        if letter == "=":
            return totals
        sign, number = (-1 if letter == "-" else 1), ""


def test_answers_are_the_sums_and_no_partial_sum_leaves_its_range(written):
    for row in written[1]["prompts"] + written[1]["prompts_heldout"]:
        totals = ways(row["prompt"])
        assert str(totals[-1]) == row["answer"]
        assert len(totals) == 4
        assert 0 <= min(totals)
        assert max(totals) <= sums.LARGEST


def test_held_out_sums_are_never_trained_on_and_none_comes_twice(written):
    prompts = {name: [row["prompt"] for row in rows] for name, rows in written[1].items()}
    assert prompts["demonstrations"] == prompts["prompts"]
    assert prompts["demonstrations_heldout"] == prompts["prompts_heldout"]
    assert (len(prompts["prompts"]), len(prompts["prompts_heldout"])) == (600, 100)
    assert len({*prompts["prompts"], *prompts["prompts_heldout"]}) == 700


def test_answers_reach_functions_with_prompts_and_demonstrations_alike(written):
    folder, rows = written
    for name, want in (("prompts", "prompts"), ("prompts_heldout", "prompts"),
                       ("demonstrations", "demonstrations"), ("demonstrations", "prompts")):
        read = read_rows(str(folder / f"{name}.jsonl"), want, SILENT)
        expected = [(row["prompt"], row["answer"]) for row in rows[name]]
        assert [(row.text, row.answer) for row in read] == expected
        if want == "demonstrations":
            assert [row.replies for row in read] == [[row["completion"]] for row in rows[name]]


def test_the_stated_shares_of_demonstrations_have_a_wrong_step_and_leave_some_out(tmp_path):
    run_here("sums", f"--out {tmp_path}/sums --sums 4000 --heldout-sums 10 --wrong 0.3 --hasty 0.4")
    rows = [
        json.loads(line) for line in (tmp_path / "sums" / "demonstrations.jsonl").read_text().splitlines()
    ]
    slips, counts, ends = [], collections.Counter(), []
    for row in rows:
        *steps, end = row["completion"].split("; ")
        marks = [fine for _, fine in sums.check_steps(row["prompt"], row["completion"])][:len(steps)]
        assert marks.count(False) <= 1 and end.startswith("so ")
        slips.append(False in marks)
        counts[len(steps)] += 1
        whole = len(steps) == 3
        right, = sums.right([row["completion"]], [row["answer"]])
        if whole and slips[-1]:
            ends.append(right)
        elif whole:
            assert right and sums.steps([row["prompt"]], [row["completion"]]) == [1]
    assert np.mean(slips) == pytest.approx(0.3, abs=0.03)
    assert 1 - np.mean(ends) == pytest.approx(sums.CARRIED, abs=0.05)
    expected = pytest.approx({1: 0.2, 2: 0.2, 3: 0.6}, abs=0.03)
    assert {count: n / len(rows) for count, n in counts.items()} == expected


def test_files_repeat_by_seed_and_other_seeds_differ(written, tmp_path):
    folder, _ = written
    run_here("sums", f"--out {tmp_path}/again {FEW}")
    run_here("sums", f"--out {tmp_path}/other --seed 1 {FEW}")
    for name in ("demonstrations.jsonl", "prompts_heldout.jsonl", "tokenizer.json"):
        first, again, other = ((place / name).read_bytes()
                               for place in (folder, tmp_path / "again", tmp_path / "other"))
        assert first == again and (first == other) == (name == "tokenizer.json")


@pytest.mark.parametrize("reply, answer, right", [
    ("14+4=18; 18-2=16; so 16", "16", 1),
    ("so 16", "16", 1),
    (" so 16\n", "16", 1),
    ("so -3", "-3", 1),
    ("so 16.", "16", 0),
    ("so 16; so 17", "16", 0),
    ("16", "16", 0),
    ("so 1", "16", 0),
    ("so 016", "16", 0),
    ("also 16", "16", 0),
    ("so １６", "16", 0),
    ("", "16", 0),
    ("so " + "9" * 5000, "16", 0),
    ("so ", "", 0),
])
def test_a_reply_is_right_that_ends_in_so_and_the_answer(reply, answer, right):
    assert sums.right([reply], [answer]) == [right]


PROMPT = "14+4-2+5=?"


@pytest.mark.parametrize("reply, marks", [
    ("14+4=18; 18-2=16; 16+5=21; so 21", [1, 1, 1, 1]),
    # Carried on: the later steps follow from what it states.
    ("14+4=19; 19-2=17; 17+5=22; so 22", [0, 1, 1, 1]),
    # Forgotten: they follow from what it ought to have stated.
    ("14+4=19; 18-2=16; 16+5=21; so 21", [0, 1, 1, 1]),
    ("14+4=18; 18-2=16; 16+5=21; so 22", [1, 1, 1, 0]),
    ("14+4=18; 17-2=15; 15+5=20; so 20", [1, 0, 1, 1]),  # begins with what nobody has stated
    ("14+4=18; 18-3=15; 15+5=20; so 20", [1, 0, 1, 1]),  # another term
    ("14+4=18; 18+5=23; 23-2=21; so 21", [1, 0, 0, 1]),  # terms out of order
    ("14+4=18; 18-2=16; so 16", [1, 1, 0]),  # a step is missing
    ("14+4=18; 18-2=16; 16+5=21", [1, 1, 1]),
    ("14+4=18; 18-2=16; 16+5=21; so 21; so 21", [1, 1, 1, 1, 0]),
    ("14+4=18=18", [0]), ("14+4", [0]), ("14+4=", [0]), ("14+4=9+9", [0]),
    ("14+4=018", [0]), ("", [0]), (";", [0, 0]), ("14+4=１８", [0]),
    ("9**9**9**9=1", [0]), ("(" * 10000, [0]), ("14+4=" + "9" * 10000, [0]),
])
def test_a_step_is_right_that_follows_from_the_one_before(reply, marks):
    checked = sums.check_steps(PROMPT, reply)
    assert [fine for _, fine in checked] == marks
    assert [step for step, _ in checked] == [step.strip() for step in reply.split(";")]


def test_the_share_of_right_steps_counts_what_is_missing_and_what_is_too_much():
    replies = ["14+4=18; 18-2=16; 16+5=21; so 21", "14+4=18", "14+4=19; 18-2=16; 16+5=21; so 21",
               "14+4=18; 18-2=16; 16+5=21; so 21; so 21", ""]
    assert sums.steps([PROMPT] * 5, replies) == [1, 1 / 4, 3 / 4, 4 / 5, 0]


def test_steps_begin_below_zero_where_a_wrong_one_is_carried_on():
    expected = [("3-2=-1", False), ("-1+4=3", True), ("so 3", True)]
    assert sums.check_steps("3-2+4=?", "3-2=-1; -1+4=3; so 3") == expected


def test_prompts_of_other_tasks_are_refused_in_one_line():
    for prompt in ("What is 2+2?", "2*3=?", "1+=?", "１+2=?", "1+2", "9" * 10000 + "+1=?"):
        with pytest.raises(UserError, match="the task's prompts are of the kind"):
            sums.steps([prompt], ["so 4"])


def test_every_number_and_what_stands_between_them_is_a_token(written):
    tokenizer = open_tokenizer(written[0])
    for prompt, reply, count in (("12-7+4=?", "12-7=5; 5+4=9; so 9", 6 + 14), ("3-7=?", "3-7=-4; so -4",
                                                                               4 + 10)):
        pieces = [tokenizer.decode([i]) for text in (prompt, reply) for i in tokenizer.encode(text)]
        assert "".join(pieces) == prompt + reply
        assert [piece for piece in pieces if piece[0].isdigit()] == re.findall("[0-9]+", prompt + reply)
        assert {piece
                for piece in pieces
                if not piece[0].isdigit()} <= {"+", "-", "=", "=?", "; ", "; so ", ";", " "}


def test_what_cannot_be_written_is_refused_before_anything_is(written, tmp_path):
    folder, _ = written
    with pytest.raises(UserError, match="already holds the task's files"):
        run_here("sums", f"--out {folder} {FEW}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        run_here("sums", f"--out {tmp_path}/file {FEW}")
    with pytest.raises(UserError, match="different sums of --terms 3, and 2100 are asked for"):
        run_here("sums", f"--out {tmp_path}/new --terms 3 --sums 2000 --heldout-sums 100")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("reply, answer", [
    ("12-7=", "5"), (" 12-7= ", "5"), ("12-7", "5"), ("3-9=", "-6"), ("-6+9=", "3"), ("1/2=", "1/2"),
    ("so 5", None), ("5+7=12; so 12", None), ("so -5\n", None),
    ("12-7=5", "?"), ("so five", "?"), ("also 5", "?"), ("", "?"), ("=", "?"), ("1/0=", "?"),
    ("9**9**9=", "?"), ("__import__('os')=", "?"), ("(" * 10000, "?"), ("9" * 10000 + "=", "?"),
])
def test_the_calculator_answers_what_can_be_read_and_nothing_behind_so(reply, answer):
    assert sums.calculator([reply]) == [answer]
    assert sums.calculator(["1+1=", reply, "so 2"]) == ["2", answer, None]


def test_with_a_calculator_demonstrations_ask_for_each_step_and_it_answers_as_the_function_does(tmp_path):
    flags = "--calculator --sums 3000 --heldout-sums 10 --wrong 0.3 --hasty 0.4"
    run_here("sums", f"--out {tmp_path}/sums {flags}")
    path = tmp_path / "sums" / "demonstrations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    counts, wrongs = collections.Counter(), []
    for row in rows:
        prompt, *talk, end = row["messages"]
        terms = sums.terms_of(prompt["content"])
        assert [turn["role"] for turn in talk] == ["assistant", "user"] * (len(talk) // 2)
        asked, answers = [[turn["content"] for turn in own] for own in (talk[::2], talk[1::2])]
        assert sums.calculator(asked) == answers and sums.calculator([end["content"]]) == [None]
        counts[len(asked)] += 1
        before = [str(terms[0]), *answers]
        steps = [f"{total}{term:+d}=" for total, term in zip(before, terms[1:])]
        assert end["content"] == f"so {before[-1]}"
        wrong = sum(own != step for own, step in zip(asked, steps))
        assert wrong <= 1
        wrongs.append(wrong)
        right, = sums.right([end["content"]], [row["answer"]])
        assert len(asked) < 3 or right == (not wrong)
    assert np.mean(wrongs) == pytest.approx(0.3, abs=0.03)
    shares = {count: number / len(rows) for count, number in counts.items()}
    assert shares == pytest.approx({1: 0.2, 2: 0.2, 3: 0.6}, abs=0.03)
    read = read_rows(str(path), "demonstrations", SILENT)
    assert [row.answer for row in read] == [row["answer"] for row in rows]
    assert [row.prompt for row in read] == [row["messages"][:-1] for row in rows]


# -- a policy's replies, with labels

def test_steps_are_labelled_up_to_the_first_wrong_one_and_say_the_reply_with_their_separator():
    prompt = "12-7+7-8=?"
    for reply, labels in (
            ("12-7=5; 5+7=12; 12-8=4; so 4", [1, 1, 1, 1]), ("12-7=6; 6+7=13; 13-8=5; so 5", [-1]),
            ("12-7=5; so 5", [1, -1]), ("12-7=5; 5+7=12; 12-8=4; so 5", [1, 1, 1, -1]), ("", [-1])):
        parts, found = sums.labelled_steps(prompt, reply)
        assert found == labels and sums.SEPARATOR.join(parts) == reply
        assert len(parts) == len(sums.check_steps(prompt, reply))


def test_a_reply_has_the_share_of_the_votes_for_its_result():
    prompts = ["1+1+1=?"] * 4 + ["2+2+2=?"] * 2
    replies = ["1+1=2; so 3", "so 3", "so 4", "none", "so 3", "so 6"]
    assert sums.majority(prompts, replies) == [0.5, 0.5, 0.25, 0.0, 0.5, 0.5]


def test_steps_of_a_policy_are_its_replies_to_the_same_sums(written, small, tmp_path, monkeypatch):
    """What was sampled is what is written, but for replies that were cut off."""
    real, batches = sums.sample, []

    def recorded(*args, **options):
        batches.append(real(*args, **options))
        return batches[-1]

    monkeypatch.setattr(sums, "sample", recorded)
    run_here("sums", f"--steps-of {small}/sft --out {tmp_path}/steps {FEW} --samples 3 --max-new-tokens 12",
             "--threads 1")
    sampled = []
    for batch in batches:
        for prompt, text, ended in zip(batch.prompts, batch.texts, batch.ended.tolist()):
            if ended and text.strip():
                sampled.append((prompt.row.text, text.strip()))
    rows = []
    for end in ("_heldout", ""):
        lines = (tmp_path / "steps" / f"steps{end}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        known = {row["prompt"]: row["answer"] for row in written[1][f"prompts{end}"]}
        assert all(known[row["prompt"]] == row["answer"] for row in found)
        rows += [(row["prompt"], ";".join(row["steps"])) for row in found]
    assert rows == sampled and 100 < len(rows) < 2100 and not batches[0].ended.all()
    with pytest.raises(UserError, match="already holds the task's files"):
        run_here("sums", f"--steps-of {small}/sft --out {tmp_path}/steps {FEW}")
    with pytest.raises(UserError, match="--calculator is for demonstrations"):
        run_here("sums", f"--steps-of {small}/sft --calculator --out {tmp_path}/other {FEW}")


def test_rankings_of_a_policys_replies_know_the_result_alone(tmp_path, monkeypatch):
    def answers_of(config, policy, tokenizer, terms, device):
        yield {"prompt": "1+1+1=?", "answer": "3"}, ["1+1=2; 2+1=3; so 3", "so 3", "so 2"]
        yield {"prompt": "2+2+2=?", "answer": "6"}, ["so 6", "so 6"]  # all right

    monkeypatch.setattr(sums, "answers_of", answers_of)
    monkeypatch.setattr(sums, "load_model", lambda *args: (torch.nn.Linear(1, 1), None))
    run_here("sums", f"--steps-of nowhere --out {tmp_path}/steps {FEW} --threads 1")
    ranking, = read_rows(tmp_path / "steps" / "rankings.jsonl", "preferences", SILENT)
    assert ranking.ranks == [0, 0, 1]
    assert len(read_rows(tmp_path / "steps" / "steps.jsonl", "steps", SILENT)) == 5
