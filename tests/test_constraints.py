"""constraints.py: every constraint by replies that keep and break it, no contradictions, and its files."""
import json
import re

import numpy as np
import pytest

import constraints
from constraints import ENDINGS, KINDS, OPENINGS, agree, draw_constraints, in_words, kept, share, topics_of
from examples import user
from formats.sources import read_rows
from judges import Function
from plumbing.flags import UserError
from tools import SILENT, exit_code, run_here, write_rows

# (kind, value, replies that keep it, replies that break it)
EDGES = [
    ("at_most", 3, ["It is Paris.", "Paris", "don't — well-known, 'so'", "1 2 3", "巴黎"],
     ["It is Paris, yes.", "a b c d", "a-b c d e"]),
    ("at_least", 3, ["It is Paris.", "a b c d", "l'été, c'est là"],
     ["Paris", "It's Paris.", "- - a b", "a-b-c d"]),
    ("mentions", "Paris", ["It is Paris.", "PARIS!", "paris-based", "(Paris's)", "¿paris"],
     ["It is Rome.", "Parisian", "comparis on", "Par is"]),
    ("mentions", "café", ["A cafe\u0301.", "CAFÉ", "the café's"], ["cafe", "cafés"]),
    ("avoids", "Paris", ["It is Rome.", "Parisian", "Par is"],
     ["Paris", "in PARIS.", "paris-based", "Paris's"]),
    ("avoids", "straße", ["eine Gasse"], ["STRASSE", "die Straße."]),
    ("one_sentence", None,
     ["It is Paris.", "It is Paris", "Paris!?", "It is 3.5 m.", "He said \"no.\"", "Why?...", "巴黎。",
      "\nParis.\n"],
     ["It is. Yes.", "Paris! Rome", "Paris\nRome", "He said \"no.\" Then he left.", "巴黎。罗马。", "Hm… Yes."]),
    ("begins_with", "Well", ["Well, yes.", "well", "- Well", "“WELL” he said"],
     ["Wellness", "Oh well", "Well-known"]),
    ("ends_with", "That is all", ["Yes. That is all.", "that is all", "THAT IS ALL!!!", "\"That is  all.\""],
     ["That is all of it.", "is all", "all", "That's all."]),
    ("lower_case", None, ["it is paris.", "3 + 4 = 7", "été", "巴黎"], ["It is", "é É", "pariS"]),
    ("upper_case", None, ["IT IS PARIS.", "3 + 4 = 7", "ÉTÉ", "巴黎"], ["IT is", "STRAßE", "PARIs"]),
    ("no_comma", None, ["It is Paris.", "a; b"], ["a, b", "巴黎，罗马", "1,000", "a،b", "一、二"]),
    ("no_digit", None, ["It is Paris.", "seven"], ["7", "x²", "٣", "７", "a1b"]),
    ("bullets", 2, ["- a\n- b", "Two:\n* a\n\n  • b\nDone.", "- a - b\n- c"],
     ["- a", "- a\n- b\n- c", "a - b - c", "-a\n-b", "- a\n-  ", "1. a\n2. b"]),
]


@pytest.mark.parametrize("kind, value, keeping, breaking", EDGES, ids=[f"{own[0]}-{own[1]}" for own in EDGES])
def test_a_constraint_is_kept_by_some_replies_and_broken_by_others(kind, value, keeping, breaking):
    answer = json.dumps([[kind, value]])
    for replies, right in ((keeping, 1.0), (breaking, 0.0)):
        for reply in replies:
            assert kept([reply], [answer]) == share([reply], [answer]) == [right], reply


def test_there_is_an_edge_for_each_of_a_dozen_kinds():
    assert {own[0] for own in EDGES} == KINDS.keys() and len(KINDS) == 12


@pytest.mark.parametrize("kind, value", [(own[0], own[1]) for own in EDGES])
@pytest.mark.parametrize("reply", ["", "  \n ", "...", "- ", "!?"])
def test_a_reply_without_words_keeps_nothing(kind, value, reply):
    answer = json.dumps([[kind, value]])
    assert kept([reply], [answer]) == share([reply], [answer]) == [0.0]


def test_the_share_counts_each_constraint_and_all_of_them_make_a_one():
    answer = json.dumps([["at_most", 3], ["mentions", "Paris"], ["no_comma", None], ["lower_case", None]])
    replies = ["paris", "Paris", "Paris, yes", "well, it is rome", "Rome, it is so"]
    assert share(replies, [answer] * 5) == [1, 3 / 4, 2 / 4, 1 / 4, 0]
    assert kept(replies, [answer] * 5) == [1, 0, 0, 0, 0]
    assert share(["Paris"] * 2, ["", answer]) == [0, 3 / 4]


@pytest.mark.parametrize("answer", ["72", "{}", "[]", '[["at_moist", 3]]', "no JSON", '["at_most"]', "[3]"])
def test_an_answer_that_holds_no_constraints_is_one_clear_line(answer):
    with pytest.raises(UserError, match="failed .*an answer must hold constraints, as constraints.py writes"):
        Function("--check", "constraints:kept")(["a"], ["b"], [answer], [True])


# -- drawing

def witness(chosen, filler):
    """A reply that keeps all of some constraints, built part by part.

    filler: a word that is not to be avoided.
    """
    value = dict(chosen)
    marks = "!" if "lower_case" in value else ""
    first = [value["begins_with"]] if "begins_with" in value else []
    middle = [value["mentions"]] if "mentions" in value else []
    last = value["ends_with"].split() if "ends_with" in value else []
    points = value.get("bullets", 0)
    missing = max(value.get("at_least", 1), points + len(first + middle + last)) - len(first + middle + last)
    words = first + middle + [filler] * missing + last
    lines = []
    # Each point but the last takes a word, so the last has at least as many as the ending.
    for _ in range(points - 1):
        lines.append(f"- {words.pop(0)}")
    lines.append(f"{'- ' if points else ''}{' '.join(words)}{marks}")
    text = "\n".join(lines)
    if "lower_case" in value:
        return text.lower()
    return text.upper() if "upper_case" in value else text


def test_no_prompt_of_two_thousand_has_constraints_that_contradict_each_other():
    rng = np.random.default_rng(0)
    prompts = ["Tell me how well the help on all trees is.", "Take care of that sure thing", "a 1 22"]
    seen = set()
    for i in range(2000):
        count = 1 + i % 6
        numbers = [[2, 3, 5, 8], [20, 50, 100], [1, 4]][i % 3]
        chosen = draw_constraints(prompts[i // 3 % 3], list(KINDS), count, numbers, rng)
        if chosen is None:
            # No words to mention, and small numbers that rule out what needs more of them.
            assert count > 2
            continue
        assert len({kind for kind, _ in chosen}) == count
        seen |= {(kind, other) for kind, _ in chosen for other, _ in chosen}
        reply = witness(chosen, "xyzzy")
        assert kept([reply], [json.dumps(chosen)]) == [1.0], (chosen, reply)
        assert all(KINDS[kind].words.split("{")[0] in in_words(chosen) for kind, _ in chosen)
    # All pairs come up but those that exclude each other.
    never = {(a, b) for a in KINDS for b in KINDS} - seen
    assert never == {("lower_case", "upper_case"), ("upper_case", "lower_case"),
                     ("one_sentence", "bullets"), ("bullets", "one_sentence")}


@pytest.mark.parametrize("chosen, fine", [
    ([("at_most", 5), ("at_least", 5)], True), ([("at_most", 4), ("at_least", 5)], False),
    ([("mentions", "tree"), ("avoids", "Tree")], False), ([("mentions", "tree"), ("avoids", "trees")], True),
    ([("begins_with", "Well"), ("avoids", "well")], False),
    ([("ends_with", "Take care"), ("avoids", "care")], False),
    ([("at_most", 3), ("ends_with", "That is all")], True),
    ([("at_most", 2), ("ends_with", "That is all")], False),
    ([("at_most", 4), ("ends_with", "That is all"), ("mentions", "tree"), ("begins_with", "Well")], False),
    ([("at_most", 5), ("ends_with", "That is all"), ("mentions", "tree"), ("begins_with", "Well")], True),
    ([("at_most", 3), ("bullets", 3)], True), ([("at_most", 3), ("bullets", 4)], False),
    ([("at_most", 3), ("bullets", 3), ("mentions", "tree")], False),
    ([("lower_case", None), ("upper_case", None)], False),
    ([("lower_case", None), ("mentions", "Paris")], True),
    ([("one_sentence", None), ("bullets", 2)], False),
    ([("one_sentence", None), ("ends_with", "That is all")], True)])
def test_constraints_agree_where_one_reply_can_keep_all(chosen, fine):
    assert agree(chosen) == agree(chosen[::-1]) == fine


def test_words_to_mention_are_those_that_a_prompt_is_about():
    assert topics_of("What is the capital of France, and don't say 42 of_it?") == ["capital", "France"]
    assert topics_of("Is it so? 1 + 2") == []
    assert topics_of("Größe, größe und été") == ["Größe", "größe", "und", "été"]


def test_drawing_finds_as_many_as_there_are_and_says_where_there_are_too_few():
    rng = np.random.default_rng(0)
    assert draw_constraints("1 + 2", ["mentions"], 1, [3], rng) is None
    assert draw_constraints("river", ["mentions", "avoids"], 2, [3], rng) is None
    assert len(draw_constraints("river stone", ["mentions", "avoids"], 2, [3], rng)) == 2
    values = set()
    for _ in range(60):
        chosen = draw_constraints("river", ["begins_with", "ends_with"], 2, [3], rng)
        values |= {value for _, value in chosen}
    assert values == {*OPENINGS, *ENDINGS}


# -- files

def test_prompts_are_written_with_their_constraints_in_words_and_in_the_answer(tmp_path, capsys):
    rows = [{"prompt": "Say river."}, {"messages": user("Say stone.", "No.", "Please name the stone.")},
            {"question": "What is 1 + 2?", "answer": "So.\n#### 3"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    flags = f"--data {tmp_path}/rows.jsonl --words 4 9 --variants 40 --count 3"
    run_here("constraints", f"{flags} --out {tmp_path}/a.jsonl")
    said = capsys.readouterr().out
    assert "warning: 1 prompts had an answer, which is no longer there" in said
    found = read_rows(f"{tmp_path}/a.jsonl", "prompts", SILENT)
    assert len(found) == 120 and len({row.answer for row in found}) > 60
    questions = ["Say river."] * 40 + ["Please name the stone."] * 40 + ["What is 1 + 2?"] * 40
    for row, asked in zip(found, questions):
        chosen = constraints.read_answer(row.answer)
        assert len(chosen) == 3 and agree(chosen)
        assert row.prompt[-1]["content"] == f"{asked}\n{in_words(chosen)}"
        assert all(value in (4, 9) for kind, value in chosen if kind in ("at_most", "at_least"))
    assert found[40].prompt[:2] == user("Say stone.", "No.") and len(found[0].prompt) == 1
    # The same seed gives the same, another one others, and what is there is kept.
    run_here("constraints", f"{flags} --out {tmp_path}/b.jsonl")
    run_here("constraints", f"{flags} --seed 1 --out {tmp_path}/c.jsonl")
    a, b, c = ((tmp_path / f"{name}.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_prompts_that_cannot_have_as_many_are_left_out_and_counted(tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "1 + 2"}, {"prompt": "Say river."}])
    flags = f"--data {tmp_path}/rows.jsonl --kinds mentions no_comma"
    run_here("constraints", f"{flags} --out {tmp_path}/a.jsonl")
    assert "left out 1: there are no 2 constraints of these kinds" in capsys.readouterr().out
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("flags, said", [
    ("--kinds at_most rhymes", "--kinds rhymes must be one of at_most, at_least, mentions"),
    ("--kinds at_most at_most", "--kinds at_most must be one of .*, and named once"),
    ("--words 0 4", "--words 0 must be above 0"),
    ("--count 0", "--count must be >= 1, got 0"),
    ("--count 13", "--count 13: no prompt of .* can have as many of these kinds"),
    ("--out {tmp}/rows.jsonl", "is there already; name another or delete it"),
    ("--out {tmp}/folder", "must end in .jsonl"),
    ("--data {tmp}/nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--kind at_most", "did you mean --kinds?"),
])
def test_what_cannot_be_is_one_clear_line_and_nothing_is_written(flags, said, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "Say river."}])
    code = exit_code("constraints", f"--data {tmp_path}/rows.jsonl --out {tmp_path}/new.jsonl",
                     flags.format(tmp=tmp_path))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("error: ")
    assert re.search(said, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
