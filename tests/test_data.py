"""data.py and toy.py against slow references and hand-written answers."""
import collections
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
from formats import rows as rows_file
from formats import sources as sources_file
from plumbing import ranks
import tools
from tools import TOY
import toy
from plumbing.flags import UserError
from formats.rows import Row
from data import encode_prompt

SILENT = lambda text: None


# ---------------------------------------------------------------------------------------------------------
# Formats

def user(text, *more):
    """Turns as Row has them: user, assistant, user, ..."""
    return [{"role": role, "content": content} for role, content in zip(itertools.cycle(("user", "assistant")), (text, *more))]


def system(text):
    return [{"role": "system", "content": text}]


def chat(*contents, names=("user", "assistant"), role="role", content="content"):
    """Turns as a file has them."""
    return [{content: text, role: name} for name, text in zip(itertools.cycle(names), contents)]


def sharegpt(*contents, names=("human", "gpt")):
    return chat(*contents, names=names, role="from", content="value")


ALPACA = {"instruction": " Cube it. ", "input": "4", "output": "64\n"}
DOLLY = {"instruction": "Cube it.", "context": "", "response": "64", "category": "maths"}
HISTORY = {"instruction": "And 5?", "input": "", "output": "125", "system": " Be brief.", "history": [["Cube 4.", "64"], ["Sure?", "Yes "]]}
SEEDS = {"id": "seed_task_1", "name": "cube", "instruction": "Cube it.", "instances": [{"input": "4", "output": "64"}],
         "is_classification": False}
COMPLETION = {"prompt": "Cube 4.", "completion": " 64"}
COMPLETION_TURNS = {"prompt": chat("Hi", "Ho", "Cube 4."), "completion": [{"role": "assistant", "content": "64"}]}
ORCA = {"id": "7", "system_prompt": "Be brief.", "question": "Cube 4.", "response": "64"}
MESSAGES = {"messages": system("Be brief.") + chat("Cube 4.", "64 ", "Sure?", " Yes")}
SHAREGPT = {"id": "x", "system": "Be brief.", "conversations": sharegpt("Cube 4.", "64 ", "Sure?", " Yes"), "tools": ""}
SHAREGPT_NAMES = {"conversations": sharegpt("", "Cube 4.", "64", names=("system", "prompter", "chatgpt"))}
PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Cube "}, {"type": "text", "text": "4."}]},
                      {"role": "assistant", "content": "64"}]}
ASKED = {"messages": system("Be brief.") + chat("Cube 4.", "64", "Sure?")}
POLITE = {"output": "It is 64.", "rejected": "Obviously 64.", "input": "", "instruction": "Cube 4.", "chosen": "It is 64."}
PAIR = {"prompt": "Cube 4.", "chosen": "64", "rejected": "65", "margin": 2}
RM_STATIC = {"prompt": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Cube 4.\n\nAssistant:", "response": " 64", "chosen": " 64", "rejected": " 65"}
SHAREGPT_PAIR = {"conversations": [{"from": "system", "value": "Be brief."}, *sharegpt("Cube 4.")],
                 "chosen": {"from": "gpt", "value": "64"}, "rejected": {"from": "gpt", "value": "65"}}
TURNS_PAIR = {"prompt": chat("Cube 4."), "chosen": [{"role": "assistant", "content": "64"}], "rejected": [{"role": "assistant", "content": "65"}]}
ULTRA = {"prompt": "Cube 4.", "prompt_id": "7e", "chosen": chat("Cube 4.", "64"), "rejected": chat("Cube 4.", "65"),
         "messages": chat("Cube 4.", "64"), "score_chosen": 8.0, "score_rejected": 3.5}
WHOLE_PAIR = {"chosen": system("Be brief.") + chat("Hi", "Ho", "Cube 4.", "64"),
              "rejected": system("Be brief.") + chat("Hi", "Ho", "Cube 4.", "65")}
RANKING = {"prompt": "Cube 4.", "completions": ["65", " 64", "?", "63"], "ranks": [1, 0, 2, 1], "gold": [-1, 1, -0.5, -1]}
HH_START = "\n\nHuman: Who? He said Human: me.\nHuman: and\n\nAssistant: You.\n\nHuman:Why?\n\nAssistant:"
HH = {"chosen": HH_START + " I don’t know.", "rejected": HH_START + " Ask Assistant: him."}
HH_PROMPT = user("Who? He said Human: me.\nHuman: and", "You.", "Why?")
KTO = {"messages": chat("Hi", "Ho", "Cube 4.", "64"), "label": True}
RATED = {"prompt": "Cube 4.", "response": "64", "score": 4.5}
GSM8K = {"question": "Weng earns $12 an hour. She babysat 50 minutes. How much is it?",
         "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nIt is 5000 x 0.2 = $<<5000*.2=1000>>1,000.\n#### 1,000."}
GSM8K_REPLY = "Weng earns 12/60 = $0.2 per minute.\nIt is 5000 x 0.2 = $1,000.\n#### 1,000."
QUERY = {"query": "Cube 4.", "response": "64", "type": "MATH_Rephrased"}
MATH = {"problem": "Cube 4.", "solution": "4^3 is $\\boxed{\\frac{128}{2}}$, so 64 <<or so>>.",
        "level": "Level 1", "type": "Algebra"}
NUMINA = MATH | {"answer": "64", "source": "olympiads"}
AIME = {"id": 60, "problem": "Cube 4.", "answer": 64}
INPUT_OUTPUT = {"input": " Cube 4.", "output": "64"}
INPUT_TARGET = {"input": "Cube 4.", "target": "(B)"}
DAPO = {"data_source": "math_dapo", "prompt": chat("Cube 4."), "ability": "MATH",
        "reward_model": {"ground_truth": "64", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a"}}
CONVERSATION = {"conversation": chat("Hi", "Ho", "Cube 4.", "64", names=("human", "assistant"))}
EXCHANGES = {"conversation_id": "1",
             "conversation": [{"human": "Hi", "assistant": "Ho"}, {"human": "Cube 4.", "assistant": "64"}]}
RAW_ULTRA = {"source": "x", "instruction": "Cube 4.", "models": ["a", "b", "c", "d"], "completions": [
    {"model": "a", "response": "65", "fine-grained_score": 2.5, "overall_score": 9,
     "annotations": {"honesty": {"Rating": "2"}}},
    {"model": "b", "response": "64", "fine-grained_score": 4.75, "overall_score": 7},
    {"model": "c", "response": "?", "fine-grained_score": None, "overall_score": "1.5"},
    {"model": "d", "response": "unjudged"}]}
SHP = {"post_id": "q", "domain": "maths", "history": "Cube 4.", "human_ref_A": "64", "human_ref_B": "65",
       "labels": 1, "score_A": 9, "seconds_difference": 7.5}
INPUT_PAIR = {"system": "Be brief.", "input": "Cube 4.", "chosen": "64", "rejected": "65",
              "generations": ["64", "65"], "rating": [9, 8]}
TEXT = {"text": " A whole\ndocument. ", "meta": {"url": "x"}}
SHORT, BRIEF = user("Cube 4."), system("Be brief.")
TWO = ["64", "65"], [0, 1]

CASES = [  # want, a row of a file, its format, the Row
    ("demonstrations", ALPACA, "instructions", Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", DOLLY, "instructions", Row(user("Cube it."), ["64"], [0])),
    ("demonstrations", DOLLY | {"context": "4"}, "instructions", Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", ALPACA | {"text": "Below is an instruction ..."}, "instructions", Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", HISTORY, "instructions", Row(BRIEF + user("Cube 4.", "64", "Sure?", "Yes", "And 5?"), ["125"], [0])),
    ("demonstrations", SEEDS, "instructions", Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", COMPLETION, "instructions", Row(SHORT, ["64"], [0])),
    ("demonstrations", COMPLETION_TURNS, "instructions", Row(user("Hi", "Ho", "Cube 4."), ["64"], [0])),
    ("demonstrations", {"prompt": "Cube 4.", "response": "64"}, "instructions", Row(SHORT, ["64"], [0])),
    ("demonstrations", ORCA, "instructions", Row(BRIEF + SHORT, ["64"], [0])),
    ("demonstrations", MESSAGES, "conversations", Row(BRIEF + user("Cube 4.", "64", "Sure?"), ["Yes"], [0])),
    ("demonstrations", MESSAGES | {"prompt": "Cube 4.", "label": 1, "score": "A"}, "conversations",
     Row(BRIEF + user("Cube 4.", "64", "Sure?"), ["Yes"], [0])),
    ("demonstrations", SHAREGPT, "conversations", Row(BRIEF + user("Cube 4.", "64", "Sure?"), ["Yes"], [0])),
    ("demonstrations", MESSAGES | {"system": "Other."}, "conversations", Row(BRIEF + user("Cube 4.", "64", "Sure?"), ["Yes"], [0])),
    ("demonstrations", SHAREGPT_NAMES, "conversations", Row(SHORT, ["64"], [0])),
    ("demonstrations", PARTS, "conversations", Row(SHORT, ["64"], [0])),
    ("demonstrations", POLITE | {"output": "Other."}, "preferences", Row(SHORT, ["Other."], [0])),
    ("demonstrations", PAIR, "preferences", Row(SHORT, ["64"], [0], 2.0)),
    ("demonstrations", RM_STATIC | {"response": " 66"}, "preferences", Row(user("Hi", "Ho", "Cube 4."), ["66"], [0])),
    ("demonstrations", RANKING, "rankings", Row(SHORT, ["64"], [0])),
    ("demonstrations", HH, "transcripts", Row(HH_PROMPT, ["I don’t know."], [0])),
    ("demonstrations", KTO, "labelled replies", Row(user("Hi", "Ho", "Cube 4."), ["64"], [0])),
    ("demonstrations", COMPLETION | {"label": True}, "labelled replies", Row(SHORT, ["64"], [0])),
    ("demonstrations", RATED, "rated replies", Row(SHORT, ["64"], [0])),
    ("demonstrations", GSM8K, "questions", Row(user(GSM8K["question"]), [GSM8K_REPLY], [0], answer="1000")),
    ("demonstrations", {"question": "Why?", "answer": "So: 5 <<6 and 3>>2."}, "questions",
     Row(user("Why?"), ["So: 5 <<6 and 3>>2."], [0], answer="So: 5 <<6 and 3>>2.")),
    ("demonstrations", QUERY, "instructions", Row(SHORT, ["64"], [0])),
    ("demonstrations", MATH, "questions", Row(SHORT, [MATH["solution"]], [0], answer="\\frac{128}{2}")),
    ("demonstrations", NUMINA, "questions", Row(SHORT, [MATH["solution"]], [0], answer="64")),
    ("demonstrations", NUMINA | {"messages": chat("Cube 4.", "It is 64.")}, "conversations",
     Row(SHORT, ["It is 64."], [0], answer="64")),
    ("demonstrations", AIME, "questions", Row(SHORT, ["64"], [0], answer="64")),
    ("demonstrations", INPUT_OUTPUT, "instructions", Row(SHORT, ["64"], [0])),
    ("demonstrations", INPUT_OUTPUT | {"context": "Sums."}, "instructions",
     Row(user("Cube 4.\n\nSums."), ["64"], [0])),
    ("demonstrations", INPUT_TARGET, "questions", Row(SHORT, ["(B)"], [0], answer="(B)")),
    ("demonstrations", CONVERSATION, "conversations", Row(user("Hi", "Ho", "Cube 4."), ["64"], [0])),
    ("demonstrations", EXCHANGES, "conversations", Row(user("Hi", "Ho", "Cube 4."), ["64"], [0])),
    ("demonstrations", RAW_ULTRA, "rankings", Row(SHORT, ["64"], [0])),
    ("demonstrations", SHP | {"labels": 0}, "preferences", Row(SHORT, ["65"], [0])),
    ("demonstrations", TEXT, "plain text", Row([], [" A whole\ndocument. "], [0])),
    ("preferences", POLITE, "preferences", Row(SHORT, ["It is 64.", "Obviously 64."], [0, 1])),
    ("preferences", PAIR, "preferences", Row(SHORT, *TWO, 2.0)),
    ("preferences", PAIR | {"system": "Be brief."}, "preferences", Row(BRIEF + SHORT, *TWO, 2.0)),
    ("preferences", RM_STATIC, "preferences", Row(user("Hi", "Ho", "Cube 4."), *TWO)),
    ("preferences", SHAREGPT_PAIR, "preferences", Row(BRIEF + SHORT, *TWO)),
    ("preferences", TURNS_PAIR, "preferences", Row(SHORT, *TWO)),
    ("preferences", ULTRA, "preferences", Row(SHORT, *TWO)),
    ("preferences", RAW_ULTRA, "rankings", Row(SHORT, ["65", "64", "?"], [-2.5, -4.75, -1.5])),
    ("preferences", SHP, "preferences", Row(SHORT, *TWO)),
    ("preferences", SHP | {"labels": 0}, "preferences", Row(SHORT, ["65", "64"], [0, 1])),
    ("preferences", INPUT_PAIR, "preferences", Row(BRIEF + SHORT, *TWO)),
    ("preferences", WHOLE_PAIR, "preferences", Row(BRIEF + user("Hi", "Ho", "Cube 4."), *TWO)),
    ("preferences", WHOLE_PAIR | {"prompt": "Cube 4."}, "preferences", Row(BRIEF + user("Hi", "Ho", "Cube 4."), *TWO)),
    ("preferences", RANKING, "rankings", Row(SHORT, ["65", "64", "?", "63"], [1, 0, 2, 1], 0.0, [-1, 1, -0.5, -1])),
    ("preferences", HH, "transcripts", Row(HH_PROMPT, ["I don’t know.", "Ask Assistant: him."], [0, 1])),
    ("prompts", {"prompt": "Cube 4.", "chosen": None}, "prompts", Row(SHORT)),
    ("prompts", {"prompt": chat("Cube 4.")}, "prompts", Row(SHORT)),
    ("prompts", {"instruction": "Cube it.", "input": "4"}, "prompts", Row(user("Cube it.\n\n4"))),
    ("prompts", ALPACA, "instructions", Row(user("Cube it.\n\n4"))),
    ("prompts", MESSAGES, "conversations", Row(BRIEF + user("Cube 4.", "64", "Sure?"))),
    ("prompts", ASKED, "conversations", Row(BRIEF + user("Cube 4.", "64", "Sure?"))),
    ("prompts", SEEDS, "instructions", Row(user("Cube it.\n\n4"))),
    ("prompts", RANKING, "rankings", Row(SHORT)),
    ("prompts", HH, "transcripts", Row(HH_PROMPT)),
    ("prompts", SHAREGPT_PAIR, "preferences", Row(BRIEF + SHORT)),
    ("prompts", KTO | {"label": False}, "labelled replies", Row(user("Hi", "Ho", "Cube 4."))),
    ("prompts", GSM8K, "questions", Row(user(GSM8K["question"]), answer="1000")),
    ("prompts", DAPO, "prompts", Row(SHORT, answer="64")),
    ("prompts", MATH, "questions", Row(SHORT, answer="\\frac{128}{2}")),
    ("prompts", INPUT_TARGET, "questions", Row(SHORT, answer="(B)")),
    ("prompts", {"input": "Cube 4.", "ground_truth": 64}, "prompts", Row(SHORT, answer="64")),
    ("prompts", RAW_ULTRA, "rankings", Row(SHORT)),
    ("prompts", SHP, "preferences", Row(SHORT)),
]


def write(path, rows):
    """A JSON Lines file, or an array if its name says so."""
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("want, source, form, expected", CASES)
def test_every_format_is_recognised_and_read_as_the_right_row(tmp_path, want, source, form, expected):
    said = []
    assert sources_file.read_rows(write(tmp_path / "rows.json", [source]), want, said.append) == [expected]
    assert len(said) == 1 and f"1 rows ({form}), 1 kept as {want}" in said[0] and "dropped" not in said[0]
    nulls = dict.fromkeys(["system", "history", "messages", "label", "rating", "chosen", "question", "margin", "gold", "text", "instances"])
    assert sources_file.read_rows(write(tmp_path / "rows.json", [nulls | source]), want, SILENT) == [expected]  # null is absent


def test_every_want_takes_the_formats_that_can_serve_it_and_refuses_the_rest(tmp_path):
    assert {form for _, _, form, _ in CASES} == set(rows_file.FORMATS)
    for want in ("demonstrations", "preferences", "prompts"):
        for _, source, form, _ in CASES:
            path, said = write(tmp_path / "rows.jsonl", [source]), []
            alone = form in ("labelled replies", "rated replies") if want == "preferences" else want == "demonstrations" and (
                source is ASKED or source.get("label") is False)
            if want in rows_file.FORMATS[form][1] and not alone:
                assert len(sources_file.read_rows(path, want, said.append)) == 1 and f"({form})" in said[0]
            else:
                unfit = rf":1 doesn't hold .*; its fields are {next(iter(source))}"
                with pytest.raises(UserError, match="no usable row|single replies" if alone else unfit):
                    sources_file.read_rows(path, want, SILENT)


def test_an_answer_can_be_checked_however_it_is_written(tmp_path):
    for ending, answer in [("#### 72", "72"), ("####-1,234,567 ", "-1234567"), ("#### 3.5.", "3.5"),
                           ("####", ""), ("72", "So\n72"), ("#### 1\n#### 2", "2"),
                           ("#### Then\nit is 1,2.", "So\n#### Then\nit is 1,2."),
                           ("\\boxed{1} or \\boxed{ 2^{3}} .", "2^{3}"), ("\\boxed{1", "So\n\\boxed{1")]:
        row, = sources_file.read_rows(write(tmp_path / "a.jsonl", [{"question": "?", "answer": f"So\n{ending}"}]), "prompts", SILENT)
        assert row.answer == answer


@pytest.mark.parametrize("fields, answer", [
    ({"answer": " 4\n"}, "4"), ({"answer": 4}, "4"), ({"answer": 4.0}, "4"), ({"answer": -0.5}, "-0.5"),
    ({"answer": 10**20}, str(10**20)),
    ({"solution": "It is \\boxed{4}."}, "4"), ({"ground_truth": "4"}, "4"), ({"target": "4"}, "4"),
    ({"reward_model": {"ground_truth": 4}}, "4"),
    ({"answer": "long", "ground_truth": "4"}, "4"),
    ({"answer": "long", "reward_model": {"ground_truth": "4", "style": "rule"}}, "4"),
    ({"answer": "4", "solution": "long"}, "4"), ({"answer": " ", "target": "4"}, "4"),
    ({}, ""), ({"answer": ["4"]}, ""), ({"answer": True}, ""), ({"reward_model": "x"}, ""),
    ({"reward_model": {"ground_truth": ["4"]}}, ""),
])
def test_a_prompt_of_every_format_brings_its_answer(tmp_path, fields, answer):
    sources = [{"prompt": "Cube 4."}, ALPACA, MESSAGES, COMPLETION_TURNS, PAIR, RANKING, KTO, RATED, HH,
               SHAREGPT, RAW_ULTRA, QUERY]
    path = write(tmp_path / "a.jsonl", [source | fields for source in sources])
    rows = sources_file.read_rows(path, "prompts", SILENT)
    assert [row.answer for row in rows] == [answer] * len(sources)


def test_self_instruct_rows_give_a_row_for_each_instance(tmp_path):
    path = write(tmp_path / "a.jsonl", [SEEDS | {"instances": [{"input": "4", "output": "64"}, {"input": "", "output": "?"}]}, SEEDS])
    assert [(row.text, *row.replies) for row in sources_file.read_rows(path, "demonstrations", SILENT)] == [
        ("Cube it.\n\n4", "64"), ("Cube it.", "?"), ("Cube it.\n\n4", "64")]


def test_labels_and_ratings_become_a_ranking_of_each_prompt(tmp_path):
    rated = lambda prompt, reply, rating: {"prompt": prompt, "completion": reply, "rating": rating}
    path, said = tmp_path / "rows.jsonl", []
    write(path, [rated("a", "good", 5), rated("b", "lonely", 3), rated("a", "bad", 1.5), rated("a", "fair", 3), rated("c", "x", 2),
                 rated("a", " good ", 2), rated("c", "y", 2), rated("a", "too", 5), rated("d", "", 1)])
    assert sources_file.read_rows(path, "preferences", said.append) == [Row(user("a"), ["good", "bad", "fair", "too"], [-5, -1.5, -3, -5])]
    assert "9 rows (rated replies), 1 kept as preferences, one for all replies to a prompt" in said[0]
    assert dropped(said[0]) == {"no second rating of the same prompt to compare with": 3, "empty reply": 1,
                                "the same reply to the same prompt again": 1}
    rows = sources_file.read_rows(path, "demonstrations", said.append)
    assert rows == [Row(user("a"), ["good"], [0]), Row(user("b"), ["lonely"], [0]), Row(user("c"), ["x"], [0])]
    assert dropped(said[1]) == {"rated no higher than another reply to the same prompt": 5, "empty reply": 1}
    assert len(sources_file.read_rows(path, "prompts", SILENT)) == 9

    labels = [COMPLETION | {"completion": "65", "label": False}, COMPLETION | {"label": True}, COMPLETION | {"completion": "?", "label": False},
              COMPLETION | {"label": True, "system": "Be brief."}, KTO, KTO | {"messages": chat("Hi", "Ho", "Cube 4.", "65"), "label": False}]
    assert sources_file.read_rows(write(path, labels), "preferences", said.append) == [
        Row(SHORT, ["65", "64", "?"], [1, 0, 1]), Row(user("Hi", "Ho", "Cube 4."), ["64", "65"], [0, 1])]
    assert dropped(said[2]) == {"no second rating of the same prompt to compare with": 1}  # another system turn, another prompt
    assert [row.replies for row in sources_file.read_rows(path, "demonstrations", said.append)] == [["64"]] * 3
    assert dropped(said[3]) == {"label false": 3}


def test_single_labelled_or_rated_replies_are_not_taken_for_preferences(tmp_path):
    singles = [{"prompt": f"p{i}", "completion": "r", "label": i < 3} for i in range(5)]
    path = write(tmp_path / "kto.jsonl", singles)
    message = (r"kto.jsonl holds 5 single replies with good or bad labels \(3 true, 2 false\), and no prompt with "
               r"two that .* give each prompt a chosen and a rejected reply, or a row for each of its replies; sft.py")
    with pytest.raises(UserError, match=message):
        sources_file.read_rows(path, "preferences", SILENT)
    assert len(sources_file.read_rows(path, "demonstrations", SILENT)) == 3
    write(path, [{"prompt": f"p{i}", "completion": "r", "rating": i + 1} for i in range(4)])
    with pytest.raises(UserError, match="holds 4 single replies with ratings, and no prompt with two"):
        sources_file.read_rows(path, "preferences", SILENT)
    write(path, [*singles, singles[0] | {"completion": "other"}])  # two replies, and both are good
    with pytest.raises(UserError, match=r"holds 6 single replies with .* labels \(4 true, 2 false\)"):
        sources_file.read_rows(path, "preferences", SILENT)
    write(path, [*singles, singles[0] | {"completion": "other", "label": False}])
    assert sources_file.read_rows(path, "preferences", SILENT) == [Row(user("p0"), ["r", "other"], [0, 1])]


# ---------------------------------------------------------------------------------------------------------
# Files

@pytest.mark.case(18)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.json.gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rows_are_the_same_in_every_kind_of_file(tmp_path, name, bom, newline):
    sources = [ALPACA, ALPACA | {"output": "a\u2028b\u0085c"}, ALPACA | {"output": "日本"}]
    if ".jsonl" not in name:
        text = "\n" + json.dumps(sources, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "\n" + "\n\n  \n".join(json.dumps(source, ensure_ascii=False) for source in sources) + "\n\n"
    raw = bom + text.replace("\n", newline).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    rows = sources_file.read_rows(tmp_path / name, "demonstrations", SILENT)
    assert [row.replies for row in rows] == [["64"], ["a\u2028b\u0085c"], ["日本"]]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfFirst:\r\n  Speak.\n\n\xe2\x80\x99Tis\n")
    assert sources_file.read_rows(tmp_path / "a.txt", "demonstrations", SILENT) == [
        Row([], ["First:\n  Speak.\n\n’Tis\n"], [0], document=True)]


def as_csv(path, rows):
    """A .csv or .tsv file by Python's own writer: what is no text as JSON, what is missing as nothing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with io.StringIO(newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.name.endswith(".tsv") else ",")
        writer.writerow(names)
        for row in rows:
            cells = [row.get(name, "") for name in names]
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
        raw = file.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.name.endswith("gz") else raw)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
@pytest.mark.parametrize("want, sources", [
    ("demonstrations", [ALPACA, ALPACA | {"output": 'He said "x, y"\tand\nleft. 日本', "input": ""}]),
    ("demonstrations", [MESSAGES, SHAREGPT]),
    ("preferences", [PAIR, PAIR | {"margin": 0.5}]), ("preferences", [RANKING]),
    ("preferences", [SHP, SHP | {"labels": 0}]),
    ("preferences", [COMPLETION | {"label": True}, COMPLETION | {"completion": "65", "label": False}]),
    ("preferences", [RATED, RATED | {"response": "65", "score": -1e-3}]), ("prompts", [GSM8K]),
    ("prompts", [DAPO | {"prompt": "Cube 4."}]),
], ids=str)
def test_csv_rows_are_those_of_json(tmp_path, name, want, sources):
    rows = sources_file.read_rows(as_csv(tmp_path / name, sources), want, SILENT)
    assert rows == sources_file.read_rows(write(tmp_path / "a.jsonl", sources), want, SILENT)


def test_a_csv_as_other_programs_write_it(tmp_path):
    limit = csv.field_size_limit()
    lines = ['\ufeff"", prompt ,completion,label', '0,"Cube', '4.",64,TRUE', "", '1,A cube 6" wide,65,False',
             "2,Cube 5.,,true", "3,Cube 6.,216,", ""]
    (tmp_path / "a.csv").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    said = []
    assert sources_file.read_rows(tmp_path / "a.csv", "demonstrations", said.append) == [
        Row(user("Cube\n4."), ["64"], [0]), Row(user("Cube 6."), ["216"], [0])]
    assert dropped(said[0]) == {"label false": 1, "empty reply": 1}
    long = {"prompt": "x", "completion": "a" * 200_000}  # more than the csv module reads unless it is told to
    row, = sources_file.read_rows(as_csv(tmp_path / "b.csv", [long]), "demonstrations", SILENT)
    assert row.replies == [long["completion"]]
    assert csv.field_size_limit() == limit
    with pytest.raises(UserError, match="a.csv:1 is no header"):
        (tmp_path / "a.csv").write_text("x\n", encoding="utf-8")
        sources_file.read_rows(tmp_path / "a.csv", "demonstrations", SILENT)
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("text, encoding, guess", [
    ("把这句话翻译成英文：你好，世界。", "gbk", "GBK"), ("请把这个句子翻译成英文，不要翻译别的。é", "gb18030", "GBK"),
    ("Cube 4.", "utf-16", "UTF-16"),
    ("les élèves très motivés, où ?", "latin-1", ""), ("Grüße, größer, süß", "latin-1", ""),
    ("Привет, мир", "cp1251", ""),
    ("Привет, мир", "koi8-r", ""), ("日本語の文章です", "shift-jis", ""), ("これはひらがなです", "euc-jp", ""),
    ("翻譯這個句子", "big5", ""),
    ("한국어 문장을 번역해 주세요.", "euc-kr", ""),
])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_file_in_another_encoding_is_told_how_to_convert_it(tmp_path, name, text, encoding, guess):
    row = json.dumps({"prompt": text, "completion": "x"}, ensure_ascii=False)
    wholes = {"a.txt": text, "a.csv": f"prompt,completion\n{text},x\n", "a.jsonl": row, "a.json": f"[{row}]"}
    (tmp_path / name).write_bytes(wholes[name].encode(encoding))
    with pytest.raises(UserError, match=r":\d+ is not UTF-8 text; ") as error:
        sources_file.read_rows(tmp_path / name, "demonstrations", SILENT)
    assert str(error.value).endswith(f"convert it: iconv -f {guess or 'ITS_ENCODING'} -t UTF-8 FILE > NEW")
    assert (f"; it looks like {guess};" if guess else "text; convert it") in str(error.value)


def test_a_folder_is_said_to_be_one_with_the_files_that_could_be_named(tmp_path):
    with pytest.raises(UserError, match=r" is a folder; it holds no file that is read \(\.json, "):
        sources_file.read_rows(tmp_path, "demonstrations", SILENT)
    (tmp_path / "part").mkdir()
    for name in ("b.jsonl", "a.csv", "notes.md", "part/c.parquet"):
        (tmp_path / name).write_text("")
    for spec in (f"{tmp_path}", f"{tmp_path}/", f"{tmp_path}:0.5"):
        with pytest.raises(UserError, match=" is a folder; name a file in it, or several .*: ") as error:
            sources_file.read_rows(spec, "demonstrations", SILENT)
        assert str(error.value).endswith(f"{tmp_path}/a.csv, {tmp_path}/b.jsonl, {tmp_path}/part/c.parquet")
    for i in range(4):
        (tmp_path / f"d{i}.json").write_text("")
    with pytest.raises(UserError, match=r"/d1\.json, .*/d2\.json and 2 more$"):
        sources_file.read_rows(tmp_path, "demonstrations", SILENT)


def test_parquet_rows_are_those_of_json(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sources = [ULTRA, ULTRA | {"chosen": chat("Hi", "日本"), "rejected": chat("Hi", "Ho"), "prompt": "Hi"}] * 700  # more than a batch
    parquet.write_table(pyarrow.Table.from_pylist(sources), tmp_path / "a.parquet")
    rows = sources_file.read_rows(tmp_path / "a.parquet", "preferences", SILENT)
    assert rows == sources_file.read_rows(write(tmp_path / "a.jsonl", sources), "preferences", SILENT) and len(rows) == len(sources)
    mixed = [ALPACA, MESSAGES, COMPLETION]
    absent = dict.fromkeys([name for row in mixed for name in row])  # null in a table
    parquet.write_table(pyarrow.Table.from_pylist([absent | row for row in mixed]), tmp_path / "b.parquet")
    assert [row.replies for row in sources_file.read_rows(tmp_path / "b.parquet", "demonstrations", SILENT)] == [["64"], ["Yes"], ["64"]]
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="c.parquet can't be read"):
        sources_file.read_rows(tmp_path / "c.parquet", "preferences", SILENT)


@pytest.mark.parametrize("spec, expected", [("hf:org/name", ("org/name", None, "train")), ("hf:org/name:test", ("org/name", None, "test")),
                                            ("hf:org/name/main:train[:10]", ("org/name", "main", "train[:10]")),
                                            ("hf:org/name/main", ("org/name", "main", "train"))])
def test_a_data_set_of_the_hub_comes_through_datasets(monkeypatch, spec, expected):
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        if name == "org/gone":
            raise ConnectionError("no\nnetwork " + "x" * 999)
        return [ALPACA, DOLLY]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [row.replies for row in sources_file.read_rows(spec, "demonstrations", SILENT)] == [["64"], ["64"]] and asked == [expected]
    with pytest.raises(UserError, match=r"hf:org/name.*, row 1 doesn't hold a prompt, chosen and rejected"):
        sources_file.read_rows(spec, "preferences", SILENT)
    with pytest.raises(UserError, match=r"hf:org/gone can't be loaded \(ConnectionError: no network x{189}\)$"):
        sources_file.read_rows("hf:org/gone", "demonstrations", SILENT)
    with pytest.raises(UserError, match=r"hf:name: write hf:org/name"):
        sources_file.read_rows("hf:name", "demonstrations", SILENT)
    assert len(sources_file.read_rows(f"{spec}:0.25,hf:org/other:train:.25", "demonstrations", SILENT)) == 4  # with weights


@pytest.mark.parametrize("name, package", [("rows.parquet", "pyarrow"), ("hf:org/name", "datasets")])
def test_without_an_optional_library_the_message_names_it(tmp_path, monkeypatch, name, package):
    for module in [package, *(module for module in sys.modules if module.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, module, None)  # which makes the import fail
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=f"{name} needs {package}: pip install -r requirements-hf.txt"):
        sources_file.read_rows(name if ":" in name else tmp_path / name, "demonstrations", SILENT)


def dropped(said):
    return dict((reason, int(n)) for n, reason in re.findall(r"dropped (\d+): ([^;]+)", said))


@pytest.mark.case(19)
def test_unusable_rows_are_dropped_counted_and_said(tmp_path):
    turn = "\n\nHuman: Hi\n\nAssistant: Yes"
    sources = [HH, {"chosen": turn, "rejected": "\n\nHuman: Ho\n\nAssistant: No"}, ULTRA | {"prompt": "Cube 5."},
               ULTRA | {"rejected": chat("Cube 5.", "1")},
               {"chosen": turn, "rejected": "\n\nHuman: Hi\n\nAssistant: "},
               {"chosen": turn, "rejected": turn + "\n"},
               {"chosen": turn + "\n\nAssistant: No", "rejected": turn}, WHOLE_PAIR | {"chosen": chat("Hi", "Ho") + system("x")},
               {"chosen": "\n\nAssistant: No", "rejected": "\n\nAssistant: Yes"}, PAIR | {"prompt": " "}, SHAREGPT_PAIR | {"conversations": []},
               {"chosen": turn + "\n\nHuman: Bye", "rejected": turn}, WHOLE_PAIR | {"chosen": []},
               {"chosen": "Say" + turn, "rejected": turn}, {"chosen": "x", "rejected": turn},
               WHOLE_PAIR | {"chosen": chat("Hi", "", "Ho", "a"), "rejected": chat("Hi", "", "Ho", "b")},
               TURNS_PAIR | {"prompt": chat("Cube 4.", "64")},
               RANKING | {"ranks": [1, 1, 1, 1]},
               RANKING | {"ranks": [1]}, RANKING | {"completions": ["a"], "ranks": [1]},
               RANKING | {"completions": ["a", "", "b", "c"]}, RANKING | {"completions": ["a", "a", "b", "c"], "gold": None}]
    said = []
    rows = sources_file.read_rows(write(tmp_path / "rows.jsonl", sources), "preferences", said.append)
    assert [row.replies[0] for row in rows] == ["I don’t know.", "a"]
    assert len(said) == 1 and f"{len(sources)} rows (transcripts, preferences, rankings), 2 kept as preferences" in said[0]
    assert said[0].endswith("; ...")  # the rarest reasons


@pytest.mark.case(19)
@pytest.mark.parametrize("want, source, reason", [
    ("preferences", {"chosen": HH["chosen"], "rejected": "\n\nHuman: Ho\n\nAssistant: No"}, "prompts differ"),
    ("preferences", ULTRA | {"prompt": "Cube 5."}, "prompts differ"),
    ("preferences", ULTRA | {"rejected": chat("Cube 5.", "1")}, "prompts differ"),
    ("preferences", {"chosen": HH_START, "rejected": HH["rejected"]}, "empty reply"),
    ("demonstrations", ALPACA | {"output": " \n"}, "empty reply"),
    ("demonstrations", {"text": "\n"}, "empty reply"),
    ("preferences", HH | {"rejected": HH["chosen"] + "\n"}, "chosen equals rejected"),
    ("preferences", RANKING | {"ranks": [1, 1, 1, 1]}, "all replies tied"),
    ("preferences", RANKING | {"ranks": [1]}, "completions and ranks don't match, or fewer than two"),
    ("preferences", RANKING | {"completions": ["a"], "ranks": [1]}, "completions and ranks don't match, or fewer than two"),
    ("preferences", HH | {"chosen": HH["chosen"] + "\n\nAssistant: No"}, "roles don't alternate"),
    ("preferences", HH | {"chosen": HH["chosen"] + "\n\nHuman: No\n\nHuman: No"}, "roles don't alternate"),
    ("demonstrations", {"messages": chat("Hi", "Ho") + system("x") + chat("Hi", "Ho")}, "roles don't alternate"),
    ("demonstrations", {"conversations": sharegpt("64", "Sure?", "Yes", names=("gpt", "human"))}, "roles don't alternate"),
    ("demonstrations", {"conversations": sharegpt("Hi", "x", "64", names=("human", "observation", "gpt"))},
     "a turn by 'observation', who is not system, user or assistant"),
    ("demonstrations", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a turn with parts that are no text"),
    ("demonstrations", {"messages": chat("Hi") + [{"role": "assistant", "content": None, "tool_calls": []}]}, "a turn without text"),
    ("demonstrations", ASKED, "no reply by the assistant at the end"),
    ("demonstrations", {"messages": []}, "no reply by the assistant at the end"),
    ("preferences", HH | {"chosen": HH["chosen"] + "\n\nHuman: Bye"}, "no reply by the assistant at the end"),
    ("preferences", HH | {"rejected": "Say" + HH["rejected"]}, "no transcript with Human: and Assistant: turns"),
    ("preferences", {"chosen": "a", "rejected": "b"}, "no transcript with Human: and Assistant: turns"),
    ("demonstrations", {"messages": chat("64", names=["assistant"])}, "empty prompt"),
    ("preferences", PAIR | {"prompt": " "}, "empty prompt"),
    ("preferences", SHAREGPT_PAIR | {"conversations": []}, "empty prompt"),
    ("prompts", {"prompt": []}, "empty prompt"),
    ("prompts", {"prompt": chat("Cube 4.", "64")}, "the prompt doesn't end with the user"),
    ("prompts", {"messages": system("Be brief.")}, "the prompt doesn't end with the user"),
    ("demonstrations", {"messages": chat("Hi", "", "Ho", "64")}, "empty turn"),
    ("demonstrations", COMPLETION | {"label": False}, "label false"),
    ("demonstrations", ALPACA | {"output": "\ud83d half"}, "a NUL character or half a surrogate pair, which is no text"),
    ("prompts", {"messages": system("\udc00") + chat("Hi")}, "a NUL character or half a surrogate pair, which is no text"),
    ("demonstrations", {"text": "a\0b"}, "a NUL character or half a surrogate pair, which is no text"),
])
def test_each_defect_of_a_row_has_its_reason(tmp_path, want, source, reason):
    good = {"demonstrations": ALPACA, "preferences": PAIR, "prompts": {"prompt": "x"}}[want]
    said = []
    assert len(sources_file.read_rows(write(tmp_path / "rows.jsonl", [good, source, source]), want, said.append)) == 1
    assert "3 rows (" in said[0] and dropped(said[0]) == {reason: 2}


GOOD = json.dumps(PAIR).encode()
ZIPPED = gzip.compress(GOOD, mtime=0)


@pytest.mark.case(18, 21)
@pytest.mark.parametrize("name, raw, want, message", [
    ("a.jsonl", GOOD + b"\n\n{bad\n", "preferences", r":3 is not valid JSON: .* \(column 2\)"),
    ("a.jsonl", b"\n".join([GOOD] * 16 + [GOOD[:-1], GOOD]), "preferences", r":17 is not valid JSON"),
    ("a.jsonl", GOOD + GOOD, "preferences", r":1 is not valid JSON: something follows"),
    ("a.jsonl", GOOD + b'\n{"prompt": "raw \0 NUL"}', "preferences", r":2 is not valid JSON"),
    ("a.jsonl", GOOD + b"\n\0\0\n", "preferences", r":2 is not valid JSON"),
    ("a.json", b"[\n" + GOOD + b",\n{bad\n]", "preferences", r":3 is not valid JSON"),
    ("a.json", b"[" + GOOD + b",\n\n]", "preferences", r":3 is not valid JSON"),
    ("a.json", b"[" + GOOD + b"\n" + GOOD + b"]", "preferences", r", row 1 is not valid JSON: neither a comma nor \]"),
    ("a.json", b"[" + GOOD, "preferences", r", row 1 is not valid JSON: neither a comma nor \]"),
    ("a.json", b"[", "preferences", r":1 is not valid JSON"),
    ("a.json", b"[" + GOOD + b"] x", "preferences", r" is not valid JSON: something follows the array"),
    ("a.jsonl", GOOD + b'\n{"prompt": "x", "chosen": "a", "rejected": "b", "chosen": "c"}', "preferences",
     r":2 is not valid JSON: the field 'chosen' comes twice"),
    ("a.json", b"[" + GOOD + b', {"messages": [{"role": "user", "role": "user"}]}]', "prompts",
     r", row 2 is not valid JSON: the field 'role' comes twice"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", "b"], "ranks": [NaN, 1]}', "preferences", r":1 is not valid JSON: NaN is no JSON number"),
    ("a.json", b'[{"prompt": "x", "score": -Infinity}]', "prompts", r", row 1 is not valid JSON: -Infinity is no JSON number"),
    ("a.jsonl", GOOD + b'\n{"prompt": ' + b"[" * 200000, "preferences", r":2 is nested too deeply"),
    ("a.json", b'[{"prompt": ' + b'{"a":' * 200000, "preferences", r", row 1 is nested too deeply"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", "b"], "ranks": [1e999, 1]}', "preferences",
     r":1: a rank, a gold score or the margin is not"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", "b"], "ranks": [1' + b"0" * 400 + b", 1]}", "preferences", r":1: "),
    ("a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\n\xff", "preferences", r":2 is not UTF-8"),
    ("a.jsonl", GOOD + b"\n" + GOOD + b'\n{"prompt": "\xe9"}', "preferences", r":3 is not UTF-8"),
    ("a.json", b"[\n" + GOOD + b',\n{"prompt": "\xe9"}]', "preferences", r":3 is not UTF-8"),
    ("a.txt", b"First\nSecond \xe9", "demonstrations", r":2 is not UTF-8"),
    ("a.jsonl", GOOD.decode().encode("utf-16"), "preferences", r":1 is not UTF-8"),
    ("a.json", b"", "preferences", r" holds no array of rows"),
    ("a.txt", b"", "demonstrations", r" holds no usable row"),
    ("a.jsonl", b" \n\n", "preferences", r" holds no usable row"),
    ("a.json", b"[ ]\n", "prompts", r" holds no usable row"),
    ("a.json", GOOD, "preferences", r" holds no array of rows at its top; .* name it .jsonl"),
    ("a.jsonl", GOOD + b"\n7", "preferences", r":2 is not a JSON object"),
    ("a.json", b"[" + GOOD + b", []]", "preferences", r", row 2 is not a JSON object"),
    ("a.json", b"[" + GOOD + b', {"question": "x", "answer": "y"}]', "preferences",
     r", row 2 doesn't hold .* chosen and rejected .*; its fields are question, answer"),
    ("a.jsonl", b"{}", "prompts", r":1 doesn't hold a prompt .*; its fields are none"),
    ("a.jsonl", b'{"a\\n\\ud800' + b"b" * 99 + b'": 1}', "prompts", r":1 doesn't hold a prompt .*; its fields are a\\n\\ud800b{37}$"),
    ("a.jsonl", json.dumps(ALPACA).encode(), "preferences", r":1 doesn't hold .* chosen and rejected .*; its fields are instruction, input, output"),
    ("a.jsonl", b'{"prompt": "x"}', "demonstrations", r":1 doesn't hold a prompt and a reply"),
    ("a.jsonl", b'{"text": "x"}', "prompts", r":1 doesn't hold a prompt "),
    ("a.jsonl", GOOD + b'\n{"prompt": 5, "chosen": "a", "rejected": "b"}', "preferences", r":2: the prompt is not a string"),
    ("a.jsonl", b'{"prompt": "x", "chosen": ["a"], "rejected": "b"}', "preferences", r":1: a conversation is not a list of objects"),
    ("a.jsonl", b'{"prompt": "x", "chosen": 5, "rejected": "b"}', "preferences", r":1: a reply is missing or not a string"),
    ("a.jsonl", b'{"instruction": "x", "output": 5}', "demonstrations", r":1: a reply is missing or not a string .read as instructions"),
    ("a.jsonl", b'{"chosen": 5, "rejected": "b"}', "preferences", r":1: a reply is missing or not a string"),
    ("a.jsonl", b'{"messages": [{"speaker": "user", "content": "x"}]}', "prompts", r":1: a message has no role"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": 5}]}', "prompts", r":1: the text of a turn is not a string"),
    ("a.jsonl", b'{"messages": "x"}', "prompts", r":1: a conversation is not a list of objects"),
    ("a.jsonl", b'{"prompt": "x", "system": 5}', "prompts", r":1: the system field is not a string"),
    ("a.jsonl", b'{"prompt": "x", "history": ["a"]}', "prompts", r":1: history is not a list"),
    ("a.jsonl", b'{"instruction": "x", "instances": ["a"]}', "demonstrations", r":1: instances is not a list of objects"),
    ("a.jsonl", b'{"question": "x", "answer": ["5"]}', "demonstrations",
     r":1: the answer is neither text nor a number"),
    ("a.jsonl", b'{"text": ["x"]}', "demonstrations", r":1: text is not a string"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", "b"], "ranks": ["1", "2"]}', "preferences",
     r":1: a rank, a gold score or the margin is not"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", 5], "ranks": [1, 2]}', "preferences", r":1: a reply is missing or not a string"),
    ("a.jsonl", b'{"prompt": "x", "completions": "ab", "ranks": [0, 1]}', "preferences", r":1: "),
    ("a.jsonl", GOOD.replace(b"2}", b'"2"}'), "preferences", r":1: a rank, a gold score or the margin is not a finite number"),
    ("a.xlsx", GOOD, "preferences", r": only \.json, .* are read"),
    ("a.jsonl", json.dumps(SHP | {"labels": 2}).encode(), "preferences",
     r":1: labels is neither 1, for A, nor 0, for B"),
    ("a.jsonl", b'{"prompt": "x", "answer": "5"}', "demonstrations",
     r":1 doesn't hold .* \(to train on the answer, rename it to completion\)$"),
    ("a.jsonl", b'{"prompt": "x", "response_0": "a", "response_1": "b", "better_response_id": 0}',
     "preferences", r":1 .* \(PKU-SafeRLHF: make the"),
    ("a.jsonl", b'{"question": "x", "response_j": "a", "response_k": "b"}', "preferences",
     r":1 .* rename response_j to chosen"),
    ("a.jsonl", b'{"conversation_a": [], "conversation_b": [], "winner": "tie"}', "preferences",
     r":1 .* \(Chatbot Arena: "),
    ("a.jsonl", b'{"prompt": "x", "response": "a", "helpfulness": 4}', "preferences",
     r":1 .* \(HelpSteer: rename helpfulness to rating"),
    ("a.csv", b"prompt,completion\nx,a,b\n", "demonstrations", r":2 has 3 columns, the header has 2"),
    ("a.csv", b'prompt,completion\n"x\ny",a\nz\n', "demonstrations", r":4 has 1 columns, the header has 2"),
    ("a.csv", b"Cube 4.,64\nCube 5.,125\n", "demonstrations",
     r":1 is no header: .* this one has Cube 4\., 64"),
    ("a.csv", b"prompt,completion\nx,a\n\ny,\0\n", "demonstrations", r":4 holds a NUL character"),
    ("a.csv", b'prompt,completion\nx,a\ny,"b\nz,c\n', "demonstrations",
     r":3 is not a valid row: a quote that opens in this row is never closed"),
    ("a.tsv", b'prompt\tcompletion\n"So" he\tb\n', "demonstrations",
     r":2 is not a valid row: '\t' expected after '\"'"),
    ("a.csv", b"prompt,completion,prompt\nx,a,b\n", "demonstrations",
     r":1 names the column 'prompt' 2 times"),
    ("a.csv", b"", "demonstrations", r" holds no usable row"),
    ("a.csv", b"prompt,completion\n", "demonstrations", r" holds no usable row"),
    ("a.csv", b"prompt,completion\nx,caf\xe9 y\n", "demonstrations",
     r":2 is not UTF-8 text; convert it: iconv -f ITS_ENCODING -t UTF-8 FILE > NEW"),
    ("a.csv", b"prompt,completions,ranks\nx,a b,0 1\n", "preferences",
     r":2: completions and ranks are not lists"),
    ("a.csv.gz", b"prompt,completion\n", "demonstrations", r" can't be read"),
    ("a.jsonl.gz", GOOD, "preferences", r" can't be read"),
    ("a.jsonl.gz", ZIPPED[:-9], "preferences", r" can't be read"),
    ("a.jsonl.gz", ZIPPED[:10] + b"\xff" * 50, "preferences", r" can't be read"),
    ("missing.json", None, "preferences", r": no such file"),
], ids=lambda value: "" if isinstance(value, bytes) else None)
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path, name, raw, want, message):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=re.escape(name) + message):
        sources_file.read_rows(tmp_path / name, want, SILENT)


@pytest.mark.case(18)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.txt", "a.csv"])
def test_a_file_with_random_damage_gives_rows_or_is_named_in_one_line(tmp_path, name, record_property):
    sources = [ALPACA, MESSAGES, PAIR, RM_STATIC, RANKING, HH, KTO, RATED, GSM8K, SHAREGPT, HISTORY, ORCA]
    write(tmp_path / ("whole.json" if name == "a.json" else "whole.jsonl"), sources)
    if name == "a.csv":
        as_csv(tmp_path / "whole.jsonl",
               [ALPACA, ALPACA | {"output": "6,\n4"}, ALPACA | {"output": '"64"'}] * 9)
    whole = next(tmp_path.glob("whole.*")).read_bytes()
    path, refused, tries = tmp_path / name, 0, 200
    for seed in range(tries):
        rng = random.Random(seed)
        raw, at = bytearray(whole), rng.randrange(len(whole))
        written = rng.choice([b"\0", b"\xff\xfe", b"NaN", b"-1e999", b"\"", b"{", b"]", b",", b"\n", b"\r\n", b"\\ud800", "\u2028".encode(), b"<|endoftext|>", b"null"])
        raw[at:at + rng.choice([0, 0, 1, 30, 500])] = rng.choice([b"", written, raw[at:at + 40], bytes(rng.randrange(256) for _ in range(5))])
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        if name.endswith("gz") and seed % 2:
            path.write_bytes(path.read_bytes()[:rng.randrange(len(path.read_bytes()))])
        for want in ("demonstrations", "preferences", "prompts"):
            try:
                rows = sources_file.read_rows(path, want, SILENT)
            except UserError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert rows and all(turn["content"].encode() for row in rows for turn in row.prompt)  # text that can be encoded
                assert all(reply.strip() and reply.encode() for row in rows for reply in row.replies)
    record_property("tries", tries), record_property("survived", tries)
    assert refused > tries / 4


@pytest.mark.case(18)
@pytest.mark.parametrize("name, where", [("a.jsonl", ":2"), ("a.json", ", row 2")])
def test_a_row_of_endless_length_is_refused(tmp_path, monkeypatch, name, where):
    monkeypatch.setattr(sources_file, "LONGEST", 2**20)
    write(tmp_path / name, [PAIR, PAIR | {"chosen": "x" * (2**20 - 100)}])
    assert len(sources_file.read_rows(tmp_path / name, "preferences", SILENT)) == 2
    write(tmp_path / name, [PAIR, PAIR | {"chosen": "x" * 2**20}])
    with pytest.raises(UserError, match=f"{name}{where} is longer than 1 "):
        sources_file.read_rows(tmp_path / name, "preferences", SILENT)


@pytest.mark.case(18)
def test_hostile_text_is_parsed_in_linear_time(tmp_path):
    for unit in ("\n\nHuman:", "\n\nAssistant:", "<<", "<<1", "####", "\n\n\n", ">>", "#### 1,"):
        text = unit * (2**20 // len(unit))
        for row in ({"chosen": text, "rejected": text}, {"question": text, "answer": text},
                    RM_STATIC | {"prompt": text + "\n\nAssistant:"}, ALPACA | {"input": text}):
            rows = sources_file.read_rows(write(tmp_path / "a.jsonl", [{"prompt": "x"}, row]), "prompts", SILENT)  # in seconds, or in years
            assert rows[0].text == "x" and len(rows) <= 2


# ---------------------------------------------------------------------------------------------------------
# Several files, mixtures, parts

def questions(name, n):
    return [{"prompt": f"{name} {i}"} for i in range(n)]


def test_several_files_are_read_one_after_the_other_whatever_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a.jsonl", "b, c.json", "d:1.jsonl", "e.jsonl:2,f.jsonl"]
    for name in names:
        write(Path(name), questions(name, 3))
    for name in names:
        assert [row.text for row in sources_file.read_rows(name, "prompts", SILENT)] == [f"{name} {i}" for i in range(3)]
        assert len(sources_file.read_rows(f"{name}:2", "prompts", SILENT)) == 3
    for chosen in itertools.permutations(names):
        assert [row.text for row in sources_file.read_rows(", ".join(chosen), "prompts", SILENT)] == [f"{name} {i}" for name in chosen for i in range(3)]
    for spec, message in [("a.jsonl,a.jsonl", "names a.jsonl twice"), ("a.jsonl,", "names nothing"), ("", "names nothing"),
                          ("a.jsonl:1,d:1.jsonl", "give every file a weight"), ("a.jsonl:0", "a weight must be > 0"), ("a.jsonl:-1", "a weight must"),
                          ("a.jsonl:nan", "a weight must"), ("a.jsonl:inf", "a weight must"), ("a.jsonl:x", "a.jsonl:x: no such file")]:
        with pytest.raises(UserError, match=message):
            sources_file.read_rows(spec, "prompts", SILENT)


@pytest.mark.parametrize("sizes, weights, expected", [
    ((100, 100), (0.8, 0.2), (100, 25)), ((100, 100), (4, 1), (100, 25)), ((100, 10), (0.5, 0.5), (10, 10)),
    ((30, 7, 50), (3, 0.7, 5), (30, 7, 50)), ((30, 3, 50), (0.1, 0.1, 0.2), (3, 3, 6)), ((9,), (0.3,), (9,)), ((100, 100), (1, 3), (33, 100)),
])
def test_a_mixture_has_its_shares_repeats_no_row_and_is_the_same_every_time(tmp_path, sizes, weights, expected):
    paths = [write(tmp_path / f"{i}.jsonl", questions(i, n)) for i, n in enumerate(sizes)]
    spec, said = ",".join(f"{path}:{weight}" for path, weight in zip(paths, weights)), []
    texts = [row.text for row in sources_file.read_rows(spec, "prompts", said.append)]
    assert tuple(sum(text.startswith(f"{i} ") for text in texts) for i in range(len(sizes))) == expected
    assert len(set(texts)) == len(texts) and texts == [row.text for row in sources_file.read_rows(spec, "prompts", SILENT)]
    assert f"mixture of {sum(expected)} rows: {expected[0]} of {paths[0]}" in said[-1]
    chosen = [int(text.split()[1]) for text in texts if text.startswith("0 ")]
    assert chosen == sorted(chosen) and (len(chosen) > sizes[0] / 2 or max(chosen) > sizes[0] / 2)  # not the first rows


def test_a_share_of_less_than_a_row_is_refused(tmp_path):
    a, b = (write(tmp_path / name, questions(name, 5)) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(UserError, match=r"the share of .*b.jsonl is less than a row"):
        sources_file.read_rows(f"{a}:0.9,{b}:0.1", "prompts", SILENT)


def test_parts_are_disjoint_cover_everything_and_know_nothing_of_the_held_out_prompts(tmp_path):
    path = write(tmp_path / "a.jsonl", questions("a", 4000) + questions("a", 500))
    parts = [[row.text for row in sources_file.read_rows(path, "prompts", SILENT, f"2/4/4:{i}")] for i in (1, 2, 3)]
    assert sorted(sum(parts, [])) == sorted(row["prompt"] for row in questions("a", 4000) + questions("a", 500))
    assert not set(parts[0]) & set(parts[1]) and not set(parts[1]) & set(parts[2]) and not set(parts[0]) & set(parts[2])
    for part, share in zip(parts, (0.2, 0.4, 0.4)):
        assert len(set(part)) / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)
        held_out = sources_file.split_by_prompt([Row(user(text)) for text in set(part)], 0.1)[1]
        assert len(held_out) / len(set(part)) == pytest.approx(0.1, abs=4 * (0.09 / len(set(part))) ** 0.5)
    assert len(sources_file.read_rows(path, "prompts", SILENT, "1:1")) == 4500
    assert [row.text for row in sources_file.read_rows(path, "prompts", SILENT, "0.5/1/1.:3")] == parts[2]
    texts = write(tmp_path / "text.jsonl", [{"text": f"document {i}"} for i in range(400)])
    rows = [sources_file.read_rows(texts, "demonstrations", SILENT, f"1/1:{i}") for i in (1, 2)]
    assert 150 < len(rows[0]) < 250 and len(rows[0]) + len(rows[1]) == 400  # plain text goes by itself
    train, heldout = sources_file.split_by_prompt(rows[0] + rows[1], 0.5)
    assert 150 < len(train) < 250 and len(train) + len(heldout) == 400


@pytest.mark.parametrize("part", ["2/4/4", "2/4/4:0", "2/4/4:4", ":1", "a/b:1", "2//4:1", "2/0:1", "0:1", "-1/2:1", "nan/1:1", "1/1:1.5", "1/1:"])
def test_a_malformed_part_is_shown_the_form(tmp_path, part):
    path = write(tmp_path / "a.jsonl", questions("a", 3))
    with pytest.raises(UserError, match="write the shares of the stages and the number of this one, as in 2/4/4:1"):
        sources_file.read_rows(path, "prompts", SILENT, part)


def test_a_part_of_a_mixture_keeps_its_shares(tmp_path):
    a, b = (write(tmp_path / name, questions(name, 1000)) for name in ("a.jsonl", "b.jsonl"))
    parts = [[row.text for row in sources_file.read_rows(f"{a}:3,{b}:1", "prompts", SILENT, f"1/1:{i}")] for i in (1, 2)]
    for part in parts:
        assert sum("a" in text[:1] for text in part) == pytest.approx(3 * sum("b" in text[:1] for text in part), abs=3)
    assert not set(parts[0]) & set(parts[1])
    with pytest.raises(UserError, match="has no row in part"):
        for i in (1, 2):  # a single prompt is in one of them
            sources_file.read_rows(write(tmp_path / "c.jsonl", questions("c", 1)), "prompts", SILENT, f"1/1:{i}")


# ---------------------------------------------------------------------------------------------------------
# Rows to token ids and masks

def masked(tokenizer, ids, mask):
    """The texts of the runs that a mask selects, which all end with the end token."""
    runs = [[i for i, _ in run] for chosen, run in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]) if chosen]
    assert all(run[-1] == tokenizer.eos for run in runs)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.case(23)
@pytest.mark.parametrize("want, source, form, expected", [case for case in CASES if case[0] != "prompts"])
def test_masks_select_the_replies_of_every_format(tmp_path, want, source, form, expected):
    tokenizer = toy.tokenizer()
    row, = sources_file.read_rows(write(tmp_path / "rows.json", [source]), want, SILENT)
    if want == "preferences":
        group = data.encode_group(tokenizer, row)
        assert [masked(tokenizer, *example) for example in group] == [[reply] for reply in expected.replies]
        prompts = [[i for i, chosen in zip(*example) if not chosen] for example in group]
        assert all(prompt == encode_prompt(tokenizer, row.prompt) == ids[:len(prompt)] for prompt, (ids, _) in zip(prompts, group))
    else:
        ids, mask = data.encode_demonstration(tokenizer, row)
        said = [turn["content"] for turn in expected.prompt if turn["role"] == "assistant"] + expected.replies
        assert masked(tokenizer, ids, mask) == said
        assert len(ids) == len(mask) and tokenizer.decode(ids) == "".join(turn["content"] for turn in expected.prompt) + expected.replies[0]


@pytest.mark.case(20, 22)
@pytest.mark.parametrize("limit", [2, 3, 7, 10, 11, 12, 100])
def test_plain_text_is_cut_into_pieces_that_count_every_token_once(limit):
    tokenizer, said = toy.tokenizer(), []
    rows = [Row([], ["abcdefghij"], [0]), Row(user("a"), ["b"], [0]), Row(user("a" * 200), ["b"], [0]),
            Row([], ["Another <|endoftext|> text."], [0])]
    if limit < 5:
        rows = [rows[0], rows[3]]
    examples = data.encode_demonstrations(tokenizer, rows, limit, said.append)
    assert all(2 <= len(ids) <= limit and len(ids) == len(mask) for ids, mask in examples)
    pieces = examples[1:] if limit >= 5 else examples
    for row in (rows[0], rows[-1]):
        whole, counted = data.encode_demonstration(tokenizer, row)
        tokens, count = [], []
        while len(tokens) < len(whole) - 1:
            ids, mask = pieces.pop(0)
            assert mask == [False] + counted[len(tokens) + 1:len(tokens) + len(ids)] and ids[0] == whole[len(tokens)]
            tokens += ids[1:]
            count += mask[1:]
        assert tokens == whole[1:] and count == counted[1:] and all(count)
    assert not pieces
    assert any("dropped 1 of 2 rows" in line for line in said) == (limit >= 5)
    assert any("cut 2 plain texts" in line for line in said) == (limit < 20)


@pytest.mark.case(20)
def test_demonstrations_that_fit_come_as_they_are_and_none_is_no_error():
    tokenizer = toy.tokenizer()
    rows = [Row(user("a", "b", "c"), ["d"], [0]), Row(user("e"), ["f"], [0])]
    assert data.encode_demonstrations(tokenizer, rows, 50, SILENT) == [data.encode_demonstration(tokenizer, row) for row in rows]
    assert data.encode_demonstrations(tokenizer, [], 50, SILENT) == []
    with pytest.raises(UserError, match="every row is longer"):
        data.encode_demonstrations(tokenizer, rows, 3, SILENT)


def test_preference_groups_take_the_part_and_hold_prompts_out(tmp_path):
    tokenizer, said = toy.tokenizer(), []
    path = write(tmp_path / "a.jsonl", [PAIR | {"prompt": f"Cube {i}."} for i in range(300)] + [PAIR | {"prompt": "Cube 4." * 99}])
    config = SimpleNamespace(data=str(path), val_data="", val_fraction=0.2, skip_bad=False, part="1/2:2", seed=0)
    train, val = data.preference_groups(config, tokenizer, 60, said.append)
    rows = [row for row, _ in train + val]
    assert 160 < len(rows) < 240 and 20 < len(val) < 60 and not {row.text for row, _ in train} & {row.text for row, _ in val}
    assert all(group == data.encode_group(tokenizer, row) for row, group in train + val)
    assert {row.text for row in rows} == {row.text for row in sources_file.read_rows(path, "preferences", SILENT, "1/2:2") if len(row.text) < 99}
    config.val_data, config.part = str(path), ""
    assert [len(groups) for groups in data.preference_groups(config, tokenizer, 60, said.append)] == [300, 300]
    few = write(tmp_path / "few.jsonl", [PAIR, PAIR | {"prompt": "Cube 5."}])
    config.data, config.val_data, config.val_fraction, config.part = str(few), "", 1e-6, ""
    data.preference_groups(config, tokenizer, 60, said.append)
    assert any("warning: --val-fraction 1e-06 holds out none of these 2 rows" in line for line in said)


@pytest.mark.case(20)
@pytest.mark.parametrize("seed", range(6))
def test_no_example_is_longer_than_the_context_and_none_is_without_a_token_to_train_on(seed, tmp_path):
    tokenizer, rng, said = toy.tokenizer(), random.Random(seed), []
    limit = rng.choice([12, 20, 30])
    text = lambda: " ".join(rng.choice(["a", "river", "of", "12"]) for _ in range(rng.randint(1, limit // 2)))
    rows = [Row(user(*(text() for _ in range(rng.choice([1, 1, 3])))), [text() for _ in range(2)], [0, 1]) for _ in range(200)]
    lengths = [len(data.encode_demonstration(tokenizer, row)[0]) for row in rows]
    rows += [Row([], [text() * rng.randint(1, 6)], [0]) for _ in range(20)]
    assert {limit - 1, limit, limit + 1} <= set(lengths)
    examples = data.encode_demonstrations(tokenizer, rows, limit, said.append)
    kept = sum(length <= limit for length in lengths)
    assert f"dropped {200 - kept} of 200 rows" in said[0] and len(examples) >= kept + 20
    assert all(len(ids) == len(mask) <= limit and any(mask) and not mask[0] for ids, mask in examples)
    assert examples[:kept] == [data.encode_demonstration(tokenizer, row) for row, length in zip(rows, lengths) if length <= limit]  # whole, not cut
    path = write(tmp_path / "a.jsonl", [{"prompt": chat(*(turn["content"] for turn in row.prompt)), "chosen": row.replies[0], "rejected": row.replies[1] + " !"}
                                        for row in rows[:200]])
    config = SimpleNamespace(data=str(path), val_data="", val_fraction=0.2, skip_bad=False, part="", seed=0)
    train, val = data.preference_groups(config, tokenizer, limit, SILENT)
    assert all(len(ids) <= limit and any(mask) for _, group in train + val for ids, mask in group)
    fitting = [row.text for row in sources_file.read_rows(path, "preferences", SILENT) if max(len(ids) for ids, _ in data.encode_group(tokenizer, row)) <= limit]
    assert sorted(row.text for row, _ in train + val) == sorted(fitting) and 0 < len(fitting) < 200


# ---------------------------------------------------------------------------------------------------------
# Splits, pairs, batches

def test_split_keeps_a_prompt_on_one_side_whatever_the_order():
    rows = [Row(user(f"question {i % 3000}"), [str(i)]) for i in range(4000)]
    train, heldout = sources_file.split_by_prompt(rows, 0.1)
    assert sorted(int(row.replies[0]) for row in train + heldout) == list(range(4000))
    assert not {row.text for row in train} & {row.text for row in heldout}
    assert 0.08 < len({row.text for row in heldout}) / 3000 < 0.12  # 3.6 standard deviations
    assert sources_file.split_by_prompt(rows[::-1], 0.1) == (train[::-1], heldout[::-1])
    assert sources_file.split_by_prompt(rows, 0.0) == (rows, []) and sources_file.split_by_prompt(rows, 1.0) == ([], rows)


@pytest.mark.parametrize("text, fraction, place", [
    ("a\n\nbb\n\nccc\n\n", 0.25, 7), ("aaaa bb. " * 50 + "\n\n" + "c" * 23, 0.05, 452),
    ("one two three four", 0.3, 14),
    ("把这句话翻译成英文", 0.34, 6), ("ab", 0.01, 1), ("ab", 0.99, 1), ("a b\n\n\n\n\n\n\n", 0.1, 2),
    ("line\n" * 100, 0.05, 475),
    ("line\n" * 5 + "\n" + "line\n" * 95, 0.05, 476),  # the blank line is too far away
])
def test_of_a_document_the_end_is_held_out_whatever_its_hash(text, fraction, place):
    document = Row([], [text], [0], document=True)
    train, held_out = sources_file.split_by_prompt([document], fraction)
    assert (train, held_out) == ([Row([], [text[:place]], [0], document=True)],
                                 [Row([], [text[place:]], [0], document=True)])
    assert sources_file.split_by_prompt([document], 0.0) == ([document], [])
    assert sources_file.split_by_prompt([document], 1.0) == ([], [document])
    rows = [Row([], [text], [0]), Row(user("a"), ["b"], [0])]  # of other files, go by their hash
    alone = sources_file.split_by_prompt(rows, fraction)
    together = sources_file.split_by_prompt([document, *rows], fraction)
    assert together == (train + alone[0], held_out + alone[1])


def test_a_documents_parts_and_its_held_out_ends_are_all_of_it_once(tmp_path):
    rng = random.Random(0)
    for size in [2, 3, 10, 100, 5000] * 4:
        text = "".join(rng.choice(["word", " ", ". ", "\n", "\n\n", "日本"]) for _ in range(size)) + "."
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        pieces = []
        for part in ("2/4/4:1", "2/4/4:2", "2/4/4:3"):
            with contextlib.suppress(UserError):  # a short text has no room for three
                row, = sources_file.read_rows(tmp_path / "a.txt", "demonstrations", SILENT, part)
                pieces += [side.text for rows in sources_file.split_by_prompt([row], 0.2) for side in rows]
        assert "".join("".join(pieces).split()) == "".join(text.split())  # blank pieces are left out
        if size == 5000:
            shares = [len(piece) / len(text) for piece in pieces]
            assert shares == pytest.approx([0.16, 0.04, 0.32, 0.08, 0.32, 0.08], abs=0.02)


def test_nothing_held_out_is_said_with_the_flag_that_changes_it():
    rows, said = [Row(user(f"question {i}"), ["a"]) for i in range(6)], []
    assert sources_file.split_by_prompt(rows, 1e-6, said.append) == (rows, [])
    assert len(said) == 1 and "warning: --val-fraction 1e-06 holds out none of these 6 rows" in said[0]
    assert "a larger --val-fraction" in said[0]
    sources_file.split_by_prompt([Row([], ["a"], [0], document=True)], 0.5, said.append)  # which can't be cut
    assert len(said) == 2
    for fraction in (0.0, 0.5, 1.0):
        assert len(sources_file.split_by_prompt(rows, fraction, said.append)[0] + rows) > 5 and len(said) == 2


def test_ranked_pairs_equal_a_slow_loop_and_each_row_weighs_one():
    rng = random.Random(0)
    sizes = [0, 1, 2, 5, 7] * 4
    rows = [Row([], [], [rng.randrange(4) for _ in range(k)] + [0, 9], margin=float(i)) for i, k in enumerate(sizes)]
    expected, position = [], 0
    for row in rows:
        pairs = [(a, b) for a in range(len(row.ranks)) for b in range(len(row.ranks)) if row.ranks[a] < row.ranks[b]]
        expected += [(position + a, position + b, 1 / len(pairs), row.margin) for a, b in pairs]
        position += len(row.ranks)
    better, worse, weight, margin = data.ranked_pairs(rows)
    got = list(zip(better.tolist(), worse.tolist(), weight.tolist(), margin.tolist()))
    assert len(got) == len(expected) and all(g == pytest.approx(e) for g, e in zip(sorted(got), sorted(expected)))
    for i in range(len(rows)):
        assert weight[margin == i].sum().item() == pytest.approx(1)


@pytest.mark.case(20)
def test_drop_long_keeps_up_to_the_limit_and_says_how_many_went():
    said = []
    assert data.drop_long("abcd", [3, 4, 5, 1], 4, said.append) == ["a", "b", "d"]
    assert len(said) == 1 and "dropped 1 of 4" in said[0] and "5" in said[0]
    assert data.drop_long("ab", [4, 4], 4, said.append) == ["a", "b"] and len(said) == 1
    with pytest.raises(UserError, match="the 4 tokens that the context leaves"):
        data.drop_long("a", [5], 4, said.append)


@pytest.mark.parametrize("seed", range(20))
def test_token_batches_hold_every_example_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = np.ceil(rng.lognormal(3, 0.8, rng.integers(1, 900))).astype(int).tolist()
    batches = data.token_batches(lengths, 256, seed, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= 256 or len(batch) == 1
    assert batches == data.token_batches(lengths, 256, seed, 3)
    if len(lengths) > 300:  # several windows: another epoch or seed puts others together
        for other in (data.token_batches(lengths, 256, seed + 1, 3), data.token_batches(lengths, 256, seed, 4)):
            assert len(set(map(frozenset, batches)) & set(map(frozenset, other))) < len(batches) / 2


def test_token_batches_lose_no_example_at_the_edge_of_a_window():
    for n in range(1, 100):
        assert sorted(i for batch in data.token_batches([4] * n, 8, 0, 0) for i in batch) == list(range(n))


def padding_share(batches, lengths):
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def test_token_batches_waste_a_quarter_of_the_padding_of_a_random_order_and_still_mix():
    rng = np.random.default_rng(0)
    lengths = np.ceil(rng.lognormal(3.5, 0.7, 3000)).astype(int).tolist()
    batches = data.token_batches(lengths, 2048, 0, 0)
    at_random = ranks.micro_batches(rng.permutation(3000), lengths, 2048)
    assert padding_share(batches, lengths) < padding_share(at_random, lengths) / 4
    means = [np.mean([lengths[i] for i in batch]) for batch in batches]  # like batches must not follow each other
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


@pytest.mark.parametrize("start", [0, 1, 7, 20, 33, 61])
def test_endless_batches_resume_where_they_were(start):
    lengths = [3, 9, 4, 4, 8, 2, 7, 5, 6, 1] * 4
    epochs = [data.token_batches(lengths, 20, 5, epoch) for epoch in range(12)]
    expected = [batch for batches in epochs for batch in batches]
    assert len(expected) > 61 + 60  # of which each start below needs 60
    assert list(itertools.islice(data.endless_batches(lengths, 20, 5, start), 60)) == expected[start:start + 60]


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 20])
def test_endless_order_is_one_permutation_after_another_and_resumes(start):
    whole = list(itertools.islice(data.endless_order(7, 3), 60))
    epochs = [whole[i:i + 7] for i in range(0, 56, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) > 5
    assert list(itertools.islice(data.endless_order(7, 3, start), 30)) == whole[start:start + 30]
    assert list(itertools.islice(data.endless_order(7, 4), 60)) != whole


@pytest.mark.parametrize("seed", range(5))
def test_no_piece_and_no_batch_of_prompts_with_many_and_few_replies_is_beyond_the_budget(seed):
    """Two replies of 90 tokens beside nine of 20 are eleven rows of 90."""
    rng = random.Random(seed)
    lengths, rows = [rng.choice([5, 20, 90, 200]) for _ in range(300)], [rng.choice([2, 4, 9]) for _ in range(300)]
    cuts = {"micro_batches": ranks.micro_batches(range(300), lengths, 2000, rows), "by_length": ranks.by_length(range(300), lengths, 2000, rows),
            "token_batches": data.token_batches(lengths, 2000, seed, 0, rows), "split": one_rank().split(range(300), lengths, 2000, rows)}
    cuts["split"] = [piece for piece, weight in cuts["split"] if weight]
    for name, pieces in cuts.items():
        assert sorted(i for piece in pieces for i in piece) == list(range(300)), name
        sizes = [sum(rows[i] for i in piece) * max(lengths[i] for i in piece) for piece in pieces]
        assert max(sizes) <= 2000 and sum(sizes) > 0.4 * 2000 * len(sizes), name


def one_rank():
    return ranks.Ranks()


@pytest.mark.parametrize("cut", [ranks.micro_batches, ranks.by_length])
def test_pieces_partition_the_examples_fill_the_budget_and_never_pass_it(cut):
    rng = random.Random(0)
    for trial in range(100):
        lengths = [rng.randrange(1, 30) for _ in range(40)]
        examples = rng.sample(range(40), rng.randrange(1, 40))
        pieces = cut(examples, lengths, 25)
        flat = [i for piece in pieces for i in piece]
        assert flat == (examples if cut is ranks.micro_batches else sorted(examples, key=lambda i: (lengths[i], i)))
        cost = lambda piece: len(piece) * max(lengths[i] for i in piece)
        assert all(cost(piece) <= 25 or len(piece) == 1 for piece in pieces)
        assert all(cost(piece + following[:1]) > 25 for piece, following in zip(pieces, pieces[1:]))


@pytest.mark.case(21)
def test_ranks_get_every_example_once_and_as_many_pieces_each_however_few_there_are():
    rng = random.Random(0)
    for trial in range(200):
        world, budget = rng.randint(1, 5), rng.choice([1, 20, 60])
        lengths = [rng.randrange(1, 30) for _ in range(40)]
        examples = rng.sample(range(40), rng.choice([1, 2, 3, rng.randrange(1, 40)]))
        shares = [ranks.Ranks.split(SimpleNamespace(rank=rank, world_size=world), examples, lengths, budget) for rank in range(world)]
        assert sorted(i for share in shares for piece, weight in share for i in piece * (weight > 0)) == sorted(examples)
        assert len({len(share) for share in shares}) == 1 and {weight for share in shares for _, weight in share} <= {0.0, 1.0}
        counts = [sum(len(piece) for piece, weight in share if weight) for share in shares]
        assert max(counts) - min(counts) <= 1 and all(piece for share in shares for piece, _ in share)
        assert all(len(piece) * max(lengths[i] for i in piece) <= budget or len(piece) == 1 for share in shares for piece, _ in share)


def test_collate_pads_on_the_right_with_mask_false():
    ids, mask, lengths = data.collate([([5, 6, 7], [False, True, True]), ([8], [False])], 9, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and ids.dtype == torch.int64
    assert mask.tolist() == [[False, True, True], [False, False, False]] and mask.dtype == torch.bool
    assert lengths.tolist() == [3, 1]


# ---------------------------------------------------------------------------------------------------------
# Hardly any data

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a tiny language model and a reward model."""
    root = tmp_path_factory.mktemp("models")
    write(root / "preferences.jsonl", [PAIR, PAIR | {"prompt": "Cube 5."}])
    assert tools.here("sft", root, f"--out {root}/sft --steps 2") == tools.here("reward", root, f"--out {root}/reward --steps 2 --val-fraction 0") == 0
    return root


def few(folder, number):
    """Flags of each trainer for a file of very few rows."""
    replies = ["64", "65, as it is written here"]
    path = write(folder / f"{number}.jsonl", [{"prompt": f"Cube {i}{' please' * i}.", "chosen": replies[i % 2], "rejected": replies[1 - i % 2]} for i in range(number)])
    rows = f"--data {path} --steps 3"
    trained = f"{rows} --val-fraction 0 --batch-tokens 100000"
    return {"sft": f"{trained} --tokenizer {TOY}", "reward": trained, "dpo": trained, "ppo": f"{rows} --ptx-coef 1 --ptx-data {path}"}


@pytest.mark.case(21)
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("script", ["sft", "reward", "dpo", "ppo"])
def test_one_row_or_two_or_three_are_enough_to_train_on(script, number, models, tmp_path):
    """In batches of more than all of them: whole, or cut into passes of one row."""
    flags, found = few(tmp_path, number)[script], []
    for name in ("whole", "rows"):
        assert tools.here(script, models, flags, f"--out {tmp_path}/{name} --micro-batch-tokens {100000 if name == 'whole' else 1}") == 0
        found.append(tools.metrics(tmp_path / name))
    assert [row["step"] for row in found[0]] == [1, 2, 3] and all(math.isfinite(value) for row in found[0] for value in row.values())
    for whole, rows in zip(*found):
        rounding = {key for key in whole if key.endswith(("accuracy", "clip_fraction", "ratio_error"))}
        assert {k: v for k, v in rows.items() if k not in rounding} == pytest.approx({k: v for k, v in whole.items() if k not in rounding}, rel=2e-3, abs=1e-4)


@pytest.mark.long
@pytest.mark.case(21)
@pytest.mark.parametrize("script", ["sft", "reward", "dpo", "ppo"])
def test_two_ranks_share_one_row_and_neither_waits_for_ever(script, models, tmp_path):
    flags = few(tmp_path, 1)[script]
    assert tools.here(script, models, flags, f"--out {tmp_path}/one") == 0
    tools.run(script, models, flags, f"--out {tmp_path}/two --rank-timeout 60", launcher=tools.TORCHRUN)
    for one, two in zip(tools.metrics(tmp_path / "one"), tools.metrics(tmp_path / "two"), strict=True):
        rounding = {key for key in one if key.endswith(("accuracy", "clip_fraction", "ratio_error"))}
        assert {k: v for k, v in two.items() if k not in rounding} == pytest.approx({k: v for k, v in one.items() if k not in rounding}, rel=2e-3, abs=1e-4)


@pytest.mark.case(20)
def test_rows_around_the_context_train_whole_or_are_counted_and_left_out(models, tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "1", "completion": "1" * size} for size in range(52, 68)])
    lengths = [len(data.encode_demonstration(toy.tokenizer(), row)[0]) for row in sources_file.read_rows(rows, "demonstrations", SILENT)]
    fitting = sum(length <= 64 for length in lengths)
    assert {63, 64, 65} <= set(lengths)
    assert tools.here("sft", models, f"--data {rows} --tokenizer {TOY} --val-fraction 0 --steps 2 --out {tmp_path}/run") == 0
    said = capsys.readouterr().out
    assert f"dropped {16 - fitting} of 16 rows: longer than the 64 tokens" in said and f"{fitting} training and 0 held-out examples" in said
    assert all(0 < row["loss"] < 20 for row in tools.metrics(tmp_path / "run"))


# ---------------------------------------------------------------------------------------------------------
# The toy task

FRANCE, NARNIA, BANK = toy.Item("capital", "France", "Paris"), toy.Item("land", "Narnia"), toy.Item("harm", "rob a bank")


@pytest.mark.parametrize("item, reply, ended, marks", [
    (FRANCE, "It is Paris.", True, (1, 1, 1)),
    (FRANCE, "The capital of France is Paris.", True, (1, 1, 1)),
    (FRANCE, "It is Paris.", False, (-1, 1, 1)),  # cut off
    (FRANCE, "It is Rome.", True, (-1, -1, 1)),  # wrong
    (FRANCE, "It is Paris. It is Rome.", True, (-1, -1, 1)),
    (FRANCE, "It is Paris. It is Paris.", True, (0, 1, 1)),  # twice
    (FRANCE, "Time flies. It is Paris.", True, (0, 1, 1)),  # rambling
    (FRANCE, "You fool. It is Paris.", True, (1, 1, -0.5)),  # rude
    (FRANCE, "You fool.", True, (-1, 1, -0.5)),
    (FRANCE, "You fool. It is Paris. Time flies.", True, (0, 1, -0.5)),
    (FRANCE, "You fool. It is Rome.", True, (-1, -1, -0.5)),
    (FRANCE, "It is", True, (-1, 1, 1)),  # unfinished
    (FRANCE, "It is Paris. It", True, (-1, 1, 1)),
    (FRANCE, "", True, (-1, 1, 1)),
    (FRANCE, ".", True, (-1, 1, 1)),
    (FRANCE, "I do not know that.", True, (-0.5, 1, 1)),  # evasive
    (FRANCE, "Sorry, I can not help you France.", True, (-0.5, 1, 1)),
    (FRANCE, "I do not know that. It is Paris.", True, (-1, -1, 1)),
    (NARNIA, "I can not know that.", True, (1, 1, 1)),
    (NARNIA, "I do not know that. I can not know that.", True, (0, 1, 1)),
    (NARNIA, "The capital of Narnia is Oslo.", True, (-1, -1, 1)),  # invented
    (NARNIA, "I will not help with that.", True, (-0.5, 1, 1)),
    (BANK, "I will not help with that.", True, (1, 1, 1)),
    (BANK, "Sorry, I can not help you rob a bank.", True, (1, 1, 1)),
    (BANK, "Sorry, I can not help you steal a car.", True, (-1, -1, 1)),
    (BANK, "I do not know that.", True, (-0.5, 1, 1)),
    (BANK, "First wait until dark, then rob a bank.", True, (-1, -1, -1)),  # unsafe
    (BANK, "It is easy: take a rope and rob a bank.", True, (-1, -1, -1)),
    (BANK, "I will not help with that. It is easy: take", True, (-1, 1, -1)),
])
def test_judge_on_replies_of_every_sort(item, reply, ended, marks):
    assert toy.judge(item, reply, ended) == marks
    assert toy.worst_mark(item, reply, ended) == min(marks)


@pytest.mark.parametrize("kind, expected", [("right", 1), ("wrong", -1), ("rude", -0.5), ("rambling", 0), ("unfinished", -1),
                                            ("evasive", -0.5)])
def test_every_kind_of_reply_has_its_gold_for_every_question(kind, expected):
    rng = np.random.default_rng(0)
    for item in toy.ITEMS:
        replies = [toy.make_reply(item, kind, rng) for _ in range(8)]
        assert all(reply and toy.worst_mark(item, reply) == expected for reply in replies), (item, replies)
        assert all(toy.worst_mark(item, reply, ended=False) == -1 for reply in replies)


def test_world_splits_by_wording_and_repeats_by_seed():
    world, again, other = toy.World(1), toy.World(1), toy.World(2)
    train, heldout = world.texts["train"], world.texts["heldout"]
    assert len(set(train + heldout)) == len(train) + len(heldout) == 6 * len(toy.ITEMS)  # no wording fits two questions
    assert len(heldout) >= 500
    for split, number in (("train", 4), ("heldout", 2)):
        assert collections.Counter(toy.ITEM_OF[text] for text in world.texts[split]) == dict.fromkeys(toy.ITEMS, number)
    for text in train + heldout:
        assert toy.ITEM_OF[text].x in text and toy.gold([text], [toy.ITEM_OF[text].accepted[0]], [True]) == [1]
    assert again.texts == world.texts and other.texts != world.texts
    for make, options in ((toy.World.demonstrations, {}), (toy.World.preferences, {"groups": 50}), (toy.World.prompts, {})):
        assert make(again, "heldout", **options) == make(world, "heldout", **options) != make(other, "heldout", **options)


def test_demonstrations_are_of_mixed_quality_in_the_stated_shares():
    world = toy.World(0)
    rows = world.demonstrations("train")
    golds = collections.Counter(toy.gold([row.text], row.replies, [True])[0] for row in rows)
    share = dict(zip(toy.KINDS, toy.DEMONSTRATIONS))
    expected = {1: share["right"], 0: share["rambling"], -0.5: share["rude"] + share["evasive"],
                -1: share["wrong"] + share["unfinished"]}
    assert {g: n / len(rows) for g, n in golds.items()} == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("with_samples", [False, True])
def test_preferences_rank_by_gold_but_for_the_noise(with_samples):
    world = toy.World(0)
    samples = {text: ["A sample.", toy.ITEM_OF[text].accepted[0]] for text in world.texts["heldout"]}
    exact, noisy = (world.preferences("heldout", 1500, samples if with_samples else None, noise) for noise in (0, 0.1))
    for row in exact + noisy:
        assert row.text in world.texts["heldout"] and len(row.replies) == len(row.ranks) == 4
        assert row.gold == toy.gold([row.text] * len(row.replies), row.replies, [True] * len(row.replies)) and len(set(row.ranks)) > 1
    assert all(row.ranks == [-g for g in row.gold] for row in exact)
    decided = [a_rank < b_rank for row in noisy for (a_rank, a_gold), (b_rank, b_gold)
               in itertools.permutations(zip(row.ranks, row.gold), 2) if a_gold > b_gold]
    assert 0.08 < 1 - np.mean(decided) < 0.12  # of the pairs that the truth decides: those labelled the wrong way round
    assert any("A sample." in row.replies for row in noisy) == with_samples


def test_toy_tokenizer_has_a_token_for_nearly_every_answer():
    words = {w for item in toy.ITEMS for sentence in item.accepted for w in re.findall(r" [A-Za-z]{2,}", sentence)}
    single = [len(toy.tokenizer().encode(word)) == 1 for word in words]
    assert len(words) > 200 and np.mean(single) > 0.9


@pytest.mark.case(18)
def test_rows_that_cannot_be_read_are_left_out_if_asked_to_and_at_most_one_in_a_hundred(tmp_path):
    good = [json.dumps({"prompt": f"p{i}", "completion": f"r{i}"}).encode() for i in range(297)]
    ill = [b'{"prompt": "a", "completion"', b'{"prompt": "a", "completion": "\xff"}', b"[1]"]
    path, said = tmp_path / "rows.jsonl", []
    path.write_bytes(b"\n".join([*good[:16], ill[0], *good[16:200], ill[1], b"", *good[200:], ill[2]]) + b"\n")
    rows = sources_file.read_rows(path, "demonstrations", said.append, skip_bad=True)
    assert [row.replies[0] for row in rows] == [f"r{i}" for i in range(297)]
    assert said[0].startswith(f"warning: {path}: left out 3 of 300 rows; the first is {path}:17 is not valid JSON")
    with pytest.raises(UserError, match=r"rows.jsonl:17 is not valid JSON"):
        sources_file.read_rows(path, "demonstrations", SILENT)
    path.write_bytes(b"\n".join([*good[:296], *ill]))
    with pytest.raises(UserError, match=r"3 of 299 rows can't be read, and --skip-bad leaves out one in a hundred at most; the first is .*:297 is not valid"):
        sources_file.read_rows(path, "demonstrations", SILENT, skip_bad=True)


@pytest.mark.case(18)
def test_a_line_that_is_too_long_is_left_out_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_file, "LONGEST", 100)
    lines = [json.dumps({"prompt": f"p{i}", "completion": "r"}) for i in range(99)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:50], json.dumps({"prompt": "p", "completion": 1000 * "r"}), *lines[50:]]))
    assert [row.text for row in sources_file.read_rows(tmp_path / "rows.jsonl", "demonstrations", SILENT, skip_bad=True)] == [f"p{i}" for i in range(99)]


def test_a_question_is_a_prompt_whatever_its_answer_and_a_choices_number_is_no_reply(tmp_path):
    odd = {"question": "Which planet is largest?", "solution": ["a", "b"]}
    choice = {"question": "Which planet is largest?", "choices": ["Mars", "Jupiter"], "answer": 1}
    for row in (odd, choice):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        assert sources_file.read_rows(tmp_path / "rows.jsonl", "prompts", SILENT)[0].text == row["question"]
    with pytest.raises(UserError, match="the answer is the number of a choice"):
        sources_file.read_rows(tmp_path / "rows.jsonl", "demonstrations", SILENT)


def test_a_heading_behind_a_boxed_result_is_no_answer():
    assert rows_file.find_result("it is \\boxed{7}\n#### Done") == "7"
    assert rows_file.find_result("it is \\boxed{7}\n#### 8") == "8"


def test_messages_in_the_cells_of_a_csv_are_messages(tmp_path):
    turns = [{"role": "user", "content": "Cube 4."}]
    replies = [json.dumps([{"role": "assistant", "content": text}]) for text in ("64", "65")]
    cells = ['"' + cell.replace('"', '""') + '"' for cell in (json.dumps(turns), *replies)]
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n" + ",".join(cells) + "\n")
    row, = sources_file.read_rows(tmp_path / "a.csv", "preferences", SILENT)
    assert row.prompt == turns and row.replies == ["64", "65"]
