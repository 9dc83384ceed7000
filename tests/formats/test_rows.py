"""formats/rows.py: rows of every format, read by hand-written answers."""
import json

import pytest

from examples import (
    ALPACA, ASKED, CASES, COMPLETION, COMPLETION_TURNS, HH, KTO, MESSAGES, PAIR, QUERY, RANKING, RATED,
    RAW_ULTRA, SEEDS, SHAREGPT, SHORT, chat, user)
from formats import rows as rows_file, sources as sources_file
from formats.rows import Row
from plumbing.flags import UserError
from tools import SILENT, dropped, write_rows


@pytest.mark.parametrize("want, source, form, expected", CASES)
def test_every_format_is_recognised_and_read_as_the_right_row(tmp_path, want, source, form, expected):
    said = []
    assert sources_file.read_rows(write_rows(tmp_path / "rows.json", [source]), want,
                                  said.append) == [expected]
    assert len(said) == 1 and f"1 rows ({form}), 1 kept as {want}" in said[0] and "dropped" not in said[0]
    nulls = dict.fromkeys([
        "system", "history", "messages", "label", "rating", "chosen", "question", "margin", "gold", "text",
        "instances"
    ])
    # Null is absent.
    assert sources_file.read_rows(write_rows(tmp_path / "rows.json", [nulls | source]), want,
                                  SILENT) == [expected]


def test_every_want_takes_the_formats_that_can_serve_it_and_refuses_the_rest(tmp_path):
    assert {form for _, _, form, _ in CASES} == set(rows_file.FORMATS)
    for want in ("demonstrations", "preferences", "prompts"):
        for _, source, form, _ in CASES:
            path, said = write_rows(tmp_path / "rows.jsonl", [source]), []
            alone = form in ("labelled replies",
                             "rated replies") if want == "preferences" else want == "demonstrations" and (
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
        row, = sources_file.read_rows(
            write_rows(tmp_path / "a.jsonl", [{"question": "?", "answer": f"So\n{ending}"}]), "prompts",
            SILENT)
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
    path = write_rows(tmp_path / "a.jsonl", [source | fields for source in sources])
    rows = sources_file.read_rows(path, "prompts", SILENT)
    assert [row.answer for row in rows] == [answer] * len(sources)


def test_self_instruct_rows_give_a_row_for_each_instance(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl",
        [SEEDS | {"instances": [{"input": "4", "output": "64"}, {"input": "", "output": "?"}]}, SEEDS])
    assert [(row.text, *row.replies) for row in sources_file.read_rows(path, "demonstrations", SILENT)] == [
        ("Cube it.\n\n4", "64"), ("Cube it.", "?"), ("Cube it.\n\n4", "64")]


def test_labels_and_ratings_become_a_ranking_of_each_prompt(tmp_path):
    rated = lambda prompt, reply, rating: {"prompt": prompt, "completion": reply, "rating": rating}
    path, said = tmp_path / "rows.jsonl", []
    write_rows(path, [
        rated("a", "good", 5),
        rated("b", "lonely", 3),
        rated("a", "bad", 1.5),
        rated("a", "fair", 3),
        rated("c", "x", 2),
        rated("a", " good ", 2),
        rated("c", "y", 2),
        rated("a", "too", 5),
        rated("d", "", 1)
    ])
    assert sources_file.read_rows(path, "preferences", said.append) == [
        Row(user("a"), ["good", "bad", "fair", "too"], [-5, -1.5, -3, -5])
    ]
    assert "9 rows (rated replies), 1 kept as preferences, one for all replies to a prompt" in said[0]
    assert dropped(said[0]) == {"no second rating of the same prompt to compare with": 3, "empty reply": 1,
                                "the same reply to the same prompt again": 1}
    rows = sources_file.read_rows(path, "demonstrations", said.append)
    assert rows == [
        Row(user("a"), ["good"], [0]),
        Row(user("b"), ["lonely"], [0]),
        Row(user("c"), ["x"], [0])
    ]
    assert dropped(said[1]) == {"rated no higher than another reply to the same prompt": 5, "empty reply": 1}
    assert len(sources_file.read_rows(path, "prompts", SILENT)) == 9

    labels = [
        COMPLETION | {"completion": "65", "label": False},
        COMPLETION | {"label": True},
        COMPLETION | {"completion": "?", "label": False},
        COMPLETION | {"label": True, "system": "Be brief."},
        KTO,
        KTO | {"messages": chat("Hi", "Ho", "Cube 4.", "65"), "label": False},
    ]
    assert sources_file.read_rows(write_rows(path, labels), "preferences", said.append) == [
        Row(SHORT, ["65", "64", "?"], [1, 0, 1]), Row(user("Hi", "Ho", "Cube 4."), ["64", "65"], [0, 1])]
    # Another system turn, another prompt.
    assert dropped(said[2]) == {"no second rating of the same prompt to compare with": 1}
    assert [row.replies
            for row in sources_file.read_rows(path, "demonstrations", said.append)] == [["64"]] * 3
    assert dropped(said[3]) == {"label false": 3}


def test_single_labelled_or_rated_replies_are_not_taken_for_preferences(tmp_path):
    singles = [{"prompt": f"p{i}", "completion": "r", "label": i < 3} for i in range(5)]
    path = write_rows(tmp_path / "kto.jsonl", singles)
    message = (
        r"kto.jsonl holds 5 single replies with good or bad labels \(3 true, 2 false\), and no prompt with "
        r"two that .* give each prompt a chosen and a rejected reply, or a row for each of its replies; "
        r"sft.py"
    )
    with pytest.raises(UserError, match=message):
        sources_file.read_rows(path, "preferences", SILENT)
    assert len(sources_file.read_rows(path, "demonstrations", SILENT)) == 3
    write_rows(path, [{"prompt": f"p{i}", "completion": "r", "rating": i + 1} for i in range(4)])
    with pytest.raises(UserError, match="holds 4 single replies with ratings, and no prompt with two"):
        sources_file.read_rows(path, "preferences", SILENT)
    write_rows(path, [*singles, singles[0] | {"completion": "other"}])  # two replies, and both are good
    with pytest.raises(UserError, match=r"holds 6 single replies with .* labels \(4 true, 2 false\)"):
        sources_file.read_rows(path, "preferences", SILENT)
    write_rows(path, [*singles, singles[0] | {"completion": "other", "label": False}])
    assert sources_file.read_rows(path, "preferences", SILENT) == [Row(user("p0"), ["r", "other"], [0, 1])]


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


# -- feedback: what reward.py learns from besides rankings

ASK = {"prompt": "Cube 4."}
REPLIES = {"completions": ["64", "65"]}


@pytest.mark.parametrize("source, expected", [
    (PAIR, Row(SHORT, ["64", "65"], [0, 1], 2.0)),
    (RANKING, Row(SHORT, ["65", "64", "?", "63"], [1, 0, 2, 1], 0.0, [-1, 1, -0.5, -1])),
    # Ties throughout.
    (ASK | REPLIES | {"ranks": [1, 1]}, Row(SHORT, ["64", "65"], [1, 1])),
    # Likelihoods: the better by rank is the likelier one, and one half is a tie.
    (ASK | {"chosen": "64", "rejected": "65", "probability": 0.75},
     Row(SHORT, ["64", "65"], [0, 1], probability=0.75)),
    (ASK | {"chosen": "64", "rejected": "65", "probability": 0.25},
     Row(SHORT, ["64", "65"], [1, 0], probability=0.75)),
    (ASK | {"chosen": "64", "rejected": "65", "probability": 0.5}, Row(SHORT, ["64", "65"], [0, 0])),
    # Scales of 7, 5 and 8 points: the highest is the first by far.
    (ASK | REPLIES | {"scale": {"value": 7, "points": 7}}, Row(SHORT, ["64", "65"], [0, 1], strength=1.0)),
    (ASK | REPLIES | {"scale": {"value": 1, "points": 7}}, Row(SHORT, ["64", "65"], [1, 0], strength=1.0)),
    (ASK | REPLIES | {"scale": {"value": 4, "points": 7}}, Row(SHORT, ["64", "65"], [0, 0], strength=0.0)),
    (ASK | {"chosen": "64", "rejected": "65", "scale": {"value": 4, "points": 5}},
     Row(SHORT, ["64", "65"], [0, 1], probability=0.75, strength=0.5)),
    (ASK | REPLIES | {"scale": {"value": 4.5, "points": 8}}, Row(SHORT, ["64", "65"], [0, 0], strength=0.0)),
    # Verdicts on both.
    (ASK | REPLIES | {"verdict": "both_bad"}, Row(SHORT, ["64", "65"], [0, 0], verdict="both_bad")),
    (ASK | {"chosen": "64", "rejected": "65", "verdict": "both_good"},
     Row(SHORT, ["64", "65"], [0, 0], verdict="both_good")),
    # Ratings, of one aim or of several.
    (RATED, Row(SHORT, ["64"], [-4.5], ratings=[{"rating": 4.5}])),
    (ASK | {"completion": "64", "ratings": {"honest": 5, "kind": None}},
     Row(SHORT, ["64"], [0], ratings=[{"honest": 5}])),
    (RAW_ULTRA, Row(SHORT, ["65", "64", "?"], [-2.5, -4.75, -1.5],
                    ratings=[{"rating": 2.5}, {"rating": 4.75}, {"rating": 1.5}])),
    (ASK | REPLIES | {"ranks": [0, 1], "ratings": [{"honest": 1}, None]},
     Row(SHORT, ["64", "65"], [0, 1], ratings=[{"honest": 1}, {}])),
    # RewardBench.
    (ASK | {"chosen": "64", "rejected": "65", "subset": "math", "id": 3},
     Row(SHORT, ["64", "65"], [0, 1], subset="math")),
])
def test_feedback_of_every_kind_is_read(tmp_path, source, expected):
    path = write_rows(tmp_path / "a.jsonl", [source])
    assert sources_file.read_rows(path, "feedback", SILENT) == [expected]


def test_feedback_keeps_every_rating_and_ranks_those_of_one_prompt(tmp_path):
    rated = lambda prompt, reply, rating: {"prompt": prompt, "completion": reply, "rating": rating}
    path = write_rows(tmp_path / "a.jsonl", [
        rated("a", "good", 5), rated("a", "bad", 1), rated("b", "lonely", 3), rated("a", "good", 2),
        rated("c", "x", 4), rated("c", "y", 4)])
    assert sources_file.read_rows(path, "feedback", SILENT) == [
        Row(user("a"), ["good", "bad"], [-5, -1], ratings=[{"rating": 5}, {"rating": 1}]),
        Row(user("b"), ["lonely"], [-3], ratings=[{"rating": 3}]),
        Row(user("c"), ["x", "y"], [-4, -4], ratings=[{"rating": 4}, {"rating": 4}])]
    said = []
    kept = sources_file.read_rows(path, "feedback", said.append,
                                  useless=lambda row: "of no use" if len(row.replies) == 1 else "")
    assert [row.text for row in kept] == ["a", "c"] and dropped(said[0])["of no use"] == 1


def test_a_verdict_or_a_tie_on_a_scale_is_no_preference_and_a_scale_turns_chosen_round_for_others(tmp_path):
    both = write_rows(tmp_path / "a.jsonl", [PAIR | {"verdict": "both_bad"}, PAIR])
    said = []
    for want in ("preferences", "labels", "demonstrations"):
        assert len(sources_file.read_rows(both, want, said.append)) == 1
        assert dropped(said[-1]) == {"a verdict on all replies, which compares none": 1}
    assert len(sources_file.read_rows(both, "prompts", SILENT)) == 2
    turned = write_rows(tmp_path / "b.jsonl", [ASK | {"chosen": "65", "rejected": "64",
                                                      "scale": {"value": 2, "points": 7}}])
    assert sources_file.read_rows(turned, "demonstrations", SILENT)[0].replies == ["64"]
    assert sources_file.read_rows(turned, "labels", SILENT)[0].ranks == [1, 0]


@pytest.mark.parametrize("fields, said", [
    ({"scale": {"value": 0, "points": 7}}, "value 0 is not on a scale from 1 to 7"),
    ({"scale": {"value": 1, "points": 1}}, "value 1 is not on a scale from 1 to 1, of 2 points or more"),
    ({"scale": {"value": "4", "points": 7}}, 'the scale is not {"value": number, "points": number}'),
    ({"scale": {"value": 4}}, "the scale is not"),
    ({"scale": [4, 7]}, "the scale is not"),
    ({"scale": {"value": 4, "points": 7}, "probability": 0.7}, "leaves no room for a probability"),
    ({"scale": {"value": 4, "points": 7}, "ranks": [0, 1]}, "scale and ranks both say"),
    ({"scale": {"value": 4, "points": 7}, "completions": ["a", "b", "c"]}, "a scale compares two replies"),
    ({"verdict": "good"}, "the verdict is neither both_bad nor both_good"),
    ({"verdict": 1}, "the verdict is neither both_bad nor both_good"),
    ({"ranks": [0, 1], "ratings": [1]}, "ratings or scores are not one for each reply"),
    ({"ranks": [0, 1], "ratings": [1, "5"]}, "a rating is not a finite number"),
    ({"ranks": [0, 1], "ratings": {"a": 1}}, "ratings is not a list"),
])
def test_bad_feedback_ends_in_one_line_with_its_place(tmp_path, fields, said):
    path = write_rows(tmp_path / "a.jsonl", [PAIR, ASK | REPLIES | fields])
    with pytest.raises(UserError) as error:
        sources_file.read_rows(path, "feedback", SILENT)
    assert f"{path}:2: " in str(error.value) and said in str(error.value)


def test_a_csv_holds_scales_and_ratings_as_json(tmp_path):
    (tmp_path / "a.csv").write_text(
        'prompt,chosen,rejected,scale\nCube 4.,64,65,"{""value"": 4, ""points"": 5}"\nCube 4.,64,65,\n')
    rows = sources_file.read_rows(tmp_path / "a.csv", "feedback", SILENT)
    assert [(row.probability, row.strength) for row in rows] == [(0.75, 0.5), (1.0, None)]
