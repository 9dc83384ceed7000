"""label.py: items, their order, the log of votes, what votes say, files for training, the page's server."""
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import uuid
from collections import Counter
from urllib.parse import urlsplit

import numpy as np
import pytest

import label
import tools
import toy
from examples import user
from formats.sources import read_rows
from label import (
    GAP, Desk, Choice, Votes, all_votes, cohen_kappa, described, exported, find_items, krippendorff_alpha,
    make_choice, leads_of, sequence, shown_order, tally, units_of, votes_to_decide)
from plumbing.flags import UserError
from plumbing.web import BODY_LIMIT, Refused, Server, token_of
from tools import ENVIRONMENT, ROOT, SILENT, TOY, exit_code, run_here, write_rows

# -- items and their order

PAIRS = [{"prompt": f"question {i}", "completions": [f"yes {i}", f"no, and more {i}"]} for i in range(40)]


def items_of(tmp_path, rows, *flags, name="labels"):
    """(items, settings, folder) of rows."""
    write_rows(tmp_path / "rows.jsonl", rows)
    config = tools.parse_flags(label.Config, "", tools.split([f"--data {tmp_path}/rows.jsonl",
                                                              f"--out {tmp_path}/{name}", *flags]))
    return *find_items(config, tmp_path / name), config


@pytest.mark.parametrize("rows, ask, kept", [
    (PAIRS[:3], "compare", 3),
    ([{"prompt": "a", "completions": ["x", "y", "z"]}, PAIRS[0]], "rank", 2),
    ([{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": "x", "rejected": "x"}],
     "compare", 1),
    ([PAIRS[0], PAIRS[0], PAIRS[1]], "compare", 2),
])
def test_auto_asks_for_a_comparison_of_two_and_a_ranking_of_more(rows, ask, kept, tmp_path, capsys):
    items, settings, _ = items_of(tmp_path, rows)
    assert settings["ask"] == ask and len(items) == kept
    assert (f"left out {len(rows) - kept}" in capsys.readouterr().out) == (kept < len(rows))
    assert all(item.prompt[0]["role"] == "user" for item in items)


def test_any_file_that_training_reads_gives_replies_and_so_does_one_without_an_order(tmp_path):
    found = read_rows(f"{TOY}/preferences.jsonl", "replies", SILENT)
    assert len(found) > 50 and all(len(row.replies) == 4 for row in found)
    write_rows(tmp_path / "one.jsonl", [
        {"prompt": "a", "completion": "x"}, {"prompt": "b", "completions": ["y"]},
        {"prompt": "a", "completions": ["x", "x"], "verdict": "both_bad"}])
    read = read_rows(tmp_path / "one.jsonl", "replies", SILENT)
    assert [row.replies for row in read] == [["x"], ["y"], ["x", "x"]]
    with pytest.raises(UserError, match="doesn't hold a prompt and one or more replies"):
        read_rows(f"{TOY}/prompts.jsonl", "replies", SILENT)
    # Training still wants an order.
    with pytest.raises(UserError, match="doesn't hold a prompt, chosen and rejected"):
        write_rows(tmp_path / "none.jsonl", PAIRS[:1])
        read_rows(tmp_path / "none.jsonl", "feedback", SILENT)


def test_steps_are_items_of_their_own_and_marks_may_be_asked_of_one_reply(tmp_path):
    rows = [{"prompt": "a", "completion": "1+1=2; so 2"}, {"prompt": "b", "completion": "one"}]
    items, settings, _ = items_of(tmp_path, rows, "--ask steps --step-separator ;")
    assert [item.replies for item in items] == [["1+1=2", " so 2"], ["one"]] and settings["ask"] == "steps"
    items, _, _ = items_of(tmp_path, rows, "--ask rate", name="rates")
    assert [item.replies for item in items] == [["1+1=2; so 2"], ["one"]]
    with pytest.raises(UserError, match="has nothing to compare"):
        items_of(tmp_path, rows, "--ask compare", name="none")


def test_a_folder_goes_on_with_its_items_and_refuses_others(tmp_path, capsys):
    items, settings, config = items_of(tmp_path, PAIRS)
    again = tools.parse_flags(label.Config, "", ["--out", config.out, "--annotator", "ben", "--repeats", "0"])
    assert find_items(again, tmp_path / "labels") == (items, settings)
    for flags in (["--points", "5"], ["--data", f"{TOY}/preferences.jsonl"], ["--limit", "3"]):
        other = tools.parse_flags(label.Config, "", ["--out", config.out, *flags])
        with pytest.raises(UserError, match=f"made with other {flags[0]}"):
            find_items(other, tmp_path / "labels")
    (tmp_path / "labels" / "items.jsonl").write_text("{")
    with pytest.raises(UserError, match="items.jsonl is damaged"):
        find_items(again, tmp_path / "labels")
    with pytest.raises(UserError, match="holds no items yet"):
        find_items(label.Config(out=str(tmp_path / "new")), tmp_path / "new")


def test_a_limit_is_drawn_by_the_seed_and_what_training_holds_out_is_left_out(tmp_path):
    texts = []
    for number, flags in enumerate(("--limit 10", "--limit 10 --seed 1", "--val-fraction 0.5", "")):
        items, _, _ = items_of(tmp_path, PAIRS, flags, name=f"labels{number}")
        texts.append([item.prompt[0]["content"] for item in items])
    first, other, trained, whole = texts
    assert len(first) == len(other) == 10 and first != other and first != whole[:10]
    assert [text for text in whole if text in first] == first and 10 < len(trained) < 30


def test_models_whose_contexts_leave_out_other_prompts_are_refused(small, tmp_path, monkeypatch):
    right, calls = label.load_prompts, []

    def load_prompts(*args):
        calls.append(args)
        return right(*args)[len(calls):]

    monkeypatch.setattr(label, "load_prompts", load_prompts)
    with pytest.raises(UserError, match="leaves out other prompts than the first of --models"):
        run_here("label", f"--models {small}/sft {small}/sft --data {TOY}/prompts_heldout.jsonl --limit 2 "
                 f"--max-new-tokens 4 --threads 1 --out {tmp_path}/labels --by toy:gold")


def items_by_number(count, K=2):
    return [make_choice(user(f"q{i}"), [f"{i}-{k}" for k in range(K)]) for i in range(count)]


@pytest.mark.parametrize("repeats", [0.0, 0.1, 0.37, 1.0])
def test_each_item_is_asked_once_and_a_share_again_later(repeats):
    items = items_by_number(200)
    asked = sequence(items, "me", 0, repeats)
    first = {i: place for place, (i, repeat) in enumerate(asked) if not repeat}
    again = {i: place for place, (i, repeat) in enumerate(asked) if repeat}
    assert len(asked) == len(first) + len(again) and sorted(first) == list(range(200))
    assert len(again) == pytest.approx(repeats * (200 - GAP - 1), abs=1.01)
    assert all(place - first[i] > GAP for i, place in again.items())
    assert asked == sequence(items, "me", 0, repeats) != sequence(items, "you", 0, repeats)
    assert asked != sequence(items, "me", 1, repeats) and list(first) != list(range(200))


def test_replies_change_places_by_item_and_person_and_are_turned_round_the_second_time():
    items = items_by_number(300, K=3)
    orders = Counter(tuple(shown_order(item, "me", 0, 0)) for item in items)
    assert len(orders) == 6 and max(orders.values()) < 90
    assert all(shown_order(item, "me", 0, 1) == shown_order(item, "me", 0, 0)[::-1] for item in items)
    assert any(shown_order(item, "you", 0, 0) != shown_order(item, "me", 0, 0) for item in items)


# -- the log

def record(i, **fields):
    return {"v": 1, "id": f"vote-{i:04d}", "item": f"item{i}", "repeat": 0, "annotator": "me",
            "shown": [0, 1], "ms": 1000} | fields


def test_what_was_appended_is_read_again_and_an_undo_takes_back(tmp_path):
    votes = Votes(tmp_path, "me", write=True)
    for i in range(3):
        votes.append(record(i, value=i + 1))
    votes.append({"v": 1, "id": "undo-0001", "undoes": "vote-0001", "annotator": "me"})
    votes.append(record(9, item="item1", value=7))
    assert [vote["value"] for vote in votes.live().values()] == [1, 3, 7]
    assert Votes(tmp_path, "me").live() == votes.live() == all_votes(tmp_path)["me"]
    assert len((tmp_path / "votes-me.jsonl").read_text().splitlines()) == 5


def test_a_torn_last_line_is_set_aside_and_a_damaged_one_stops(tmp_path, capsys):
    path = tmp_path / "votes-me.jsonl"
    whole = json.dumps(record(0, value=1)) + "\n"
    path.write_text(whole + '{"v": 1, "id": "vo')
    # Who only reads leaves the file as it is.
    assert len(Votes(tmp_path, "me").live()) == 1 and path.read_text() != whole
    votes = Votes(tmp_path, "me", write=True)
    assert len(votes.live()) == 1 and path.read_text() == whole
    assert (tmp_path / "votes-me.torn").read_text() == '{"v": 1, "id": "vo'
    assert "torn" in capsys.readouterr().out
    votes.append(record(1, value=2))
    assert len(Votes(tmp_path, "me").live()) == 2
    path.write_text(whole + "nothing\n" + whole)
    with pytest.raises(UserError, match="votes-me.jsonl:2 is no vote"):
        Votes(tmp_path, "me")


def test_a_second_writer_is_refused_and_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    votes = Votes(tmp_path, "me", write=True)
    votes.append(record(0, value=1))
    with pytest.raises(UserError, match="another label.py writes to it"):
        Votes(tmp_path, "me", write=True)
    Votes(tmp_path, "you", write=True)
    before = votes.path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(label.os, "fsync", full)
    with pytest.raises(OSError):
        votes.append(record(1, value=1))
    assert votes.path.read_bytes() == before and len(votes.live()) == 1
    monkeypatch.undo()
    votes.append(record(1, value=1))
    assert len(Votes(tmp_path, "me").live()) == 2


# -- what votes say

COMPARE = {"ask": "compare", "points": 7}


@pytest.mark.parametrize("points, value, lead", [
    (7, 1, 1), (7, 4, 0), (7, 7, -1), (7, 3, 1 / 3), (2, 1, 1), (2, 2, -1), (8, 4, 1 / 7), (5, 2, 0.5),
])
def test_a_place_on_a_scale_is_a_lead_of_the_left_one(points, value, lead):
    settings = {"ask": "compare", "points": points}
    assert leads_of({"shown": [0, 1], "value": value}, settings) == {(0, 1): pytest.approx(lead)}
    assert leads_of({"shown": [1, 0], "value": value}, settings) == {(0, 1): pytest.approx(-lead)}


def test_verdicts_are_ties_rankings_pairs_and_what_is_skipped_says_nothing():
    assert leads_of({"shown": [1, 0], "verdict": "both_bad"}, COMPARE) == {(0, 1): 0}
    assert leads_of({"shown": [1, 0], "skipped": True}, COMPARE) == {} == units_of({"skipped": True}, COMPARE)
    ranked = leads_of({"shown": [2, 0, 1], "ranks": [0, 1, 0]}, {"ask": "rank"})
    assert ranked == {(0, 1): 1, (0, 2): 0, (1, 2): -1}
    marks = {"shown": [0, 1], "ratings": [{"a": 5, "b": 1}, {"a": 4, "b": 4}]}
    assert leads_of(marks, {"ask": "rate"}) == {(0, 1): -1}
    assert units_of(marks, {"ask": "rate"}) == {(0, "a"): 5, (0, "b"): 1, (1, "a"): 4, (1, "b"): 4}
    assert units_of({"shown": [0, 1, 2], "labels": [1, None, -1]}, {"ask": "steps"}) == {0: 1, 2: -1}


def test_agreement_of_known_tables():
    """Cohen 1960's kind of table by hand, and Krippendorff's own example, whose ordinal alpha is 0.815."""
    one = [0] * 25 + [0] * 10 + [1] * 5 + [1] * 20
    other = [0] * 25 + [1] * 10 + [0] * 5 + [1] * 20
    chance = (35 * 30 + 25 * 30) / 3600
    assert cohen_kappa(one, other) == pytest.approx((45 / 60 - chance) / (1 - chance))
    assert cohen_kappa([1, 1], [1, 1]) == 1 and cohen_kappa([0, 1], [1, 0]) == -1
    table = """1 2 3 3 2 1 4 1 2 . . .
               1 2 3 3 2 2 4 1 2 5 . 3
               . 3 3 3 2 3 4 2 2 5 1 .
               1 2 3 3 2 4 4 1 2 5 1 ."""
    rows = [line.split() for line in table.splitlines()]
    units = [[int(x) for x in column if x != "."] for column in zip(*rows)]
    assert krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha([[1], []]) is None and krippendorff_alpha([[2, 2], [2, 2, 2]]) == 1
    # Numbers in the same order agree as much.
    assert krippendorff_alpha([[10 * x for x in unit] for unit in units]) == pytest.approx(
        krippendorff_alpha(units))


def test_agreement_equals_the_peers():
    krippendorff = pytest.importorskip("krippendorff")
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    table = rng.integers(1, 6, (4, 60)).astype(float)
    table[1:] = np.where(rng.random((3, 60)) < 0.6, table[0], table[1:])
    table[rng.random(table.shape) < 0.3] = np.nan
    units = [column[~np.isnan(column)].tolist() for column in table.T]
    theirs = krippendorff.alpha(table, level_of_measurement="ordinal")
    assert krippendorff_alpha(units) == pytest.approx(theirs)
    both = ~np.isnan(table[:2]).any(0)
    one, other = table[:2, both].tolist()
    assert cohen_kappa(one, other) == pytest.approx(metrics.cohen_kappa_score(one, other))


@pytest.mark.parametrize("rate, votes", [(0.6, 10), (0.7, 5), (0.3, 5), (0.53, 100), (0.9, 50)])
def test_the_votes_that_are_missing_are_those_after_which_the_interval_leaves_out_a_half(rate, votes):
    more = votes_to_decide(rate, votes)
    low, high = label.wilson(rate, votes + more)
    assert not low <= 0.5 <= high
    if more:
        low, high = label.wilson(rate, votes + more - 1)
        assert low <= 0.5 <= high
    assert votes_to_decide(0.5, 10) is None


def test_a_summary_counts_by_hand():
    models = [["n", "m"], ["m", "n"], ["m", "n"], ["m", "n"]]
    items = [make_choice(user(f"q{i}"), ["aaaa", "b"], own) for i, own in enumerate(models)]
    ids = [item.id for item in items]

    def vote(i, value=None, shown=(0, 1), repeat=0, **fields):
        said = {} if value is None else {"value": value}
        return (ids[i], repeat), record(i, item=ids[i], shown=list(shown), repeat=repeat, **said, **fields)

    anna = dict([vote(0, 1), vote(1, 7), vote(2, verdict="tie", ms=3000), vote(3, skipped=True),
                 vote(0, 7, (1, 0), 1), vote(1, 3, (1, 0), 1)])
    ben = dict([vote(0, 6, (1, 0)), vote(1, 2), vote(2, 4)])
    found = tally(items, COMPARE, {"anna": anna, "ben": ben})
    assert found["annotators"]["anna"] == {"votes": 6, "flagged": 0, "skipped": 1, "tie": 1, "both_bad": 0,
                                           "both_good": 0, "seconds": 1.0}
    # Anna says the first reply, the second, a tie; asked again, where they are turned round, the same.
    assert found["repeats"]["share"] == 1 and found["repeats"]["of"] == 2
    # Decided: Anna the first (left), the second (right); Ben the first (right), the first (left).
    assert (found["left_wins"]["share"], found["left_wins"]["of"]) == (0.5, 4)
    assert (found["longer_wins"]["share"], found["longer_wins"]["of"]) == (0.75, 4)
    assert found["wins"] == {"m against n": {
        "wins": 1, "ties": 2, "losses": 3, "rate": pytest.approx(2 / 6),
        "interval": list(label.wilson(2 / 6, 6)), "more": votes_to_decide(2 / 6, 6)}}
    assert found["kappa"]["anna, ben"] == {"kappa": cohen_kappa([1, -1, 0], [1, 1, 0]), "of": 3}
    assert found["alpha"] == krippendorff_alpha([[1, 2 / 3], [-1, 2 / 3], [0, 0]])
    lines = "\n".join(described(found))
    assert "m against n: 1 wins, 2 ties, 3 losses, 0.33" in lines and "more votes would decide it" in lines
    assert tally(items, COMPARE, {})["alpha"] is None and described(tally(items, COMPARE, {}))


# -- files for training

def test_votes_become_rows_that_mean_what_was_said(tmp_path):
    items = [Choice(f"i{k}", user(f"q{k}"), [f"a{k}", f"b{k}"], []) for k in range(6)]
    votes = [dict(value=1), dict(value=2, shown=[1, 0]), dict(verdict="tie"),
             dict(verdict="both_bad", flagged=True), dict(verdict="both_good", note="hm"), dict(skipped=True)]
    own = {(f"i{k}", 0): record(k, item=f"i{k}", **vote) for k, vote in enumerate(votes)}
    own["i0", 1] = record(0, item="i0", repeat=1, value=7)
    files = exported(items, COMPARE, {"me": own})
    assert set(files) == {"preferences", "labels"} and len(files["preferences"]) == 5
    assert files["preferences"][3]["flagged"] and files["preferences"][4]["note"] == "hm"
    for name, rows in files.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    read = read_rows(tmp_path / "preferences.jsonl", "feedback", SILENT)
    best = [[reply for reply, rank in zip(row.replies, row.ranks) if rank == min(row.ranks)] for row in read]
    assert best == [["a0"], ["b1"], ["a2", "b2"], ["a3", "b3"], ["a4", "b4"]]
    assert [row.probability for row in read[:2]] == [1, pytest.approx(5 / 6)]
    assert [row.verdict for row in read] == ["", "", "", "both_bad", "both_good"]
    good = {row["completion"]: row["label"] for row in files["labels"]}
    assert good == {"a0": True, "b0": False, "a1": False, "b1": True, "a3": False, "b3": False, "a4": True,
                    "b4": True}


def test_two_points_are_plain_ranks_and_rankings_and_marks_and_steps_are_kept():
    item = Choice("i", user("q"), ["x", "y", "z"], [])
    two = Choice("i", user("q"), ["x", "y"], [])
    plain = exported([two], COMPARE | {"points": 2}, {"me": {("i", 0): record(0, item="i", value=2)}})
    assert plain["preferences"][0]["ranks"] == [1, 0] and "scale" not in plain["preferences"][0]
    ranked = exported([item], {"ask": "rank"}, {"me": {("i", 0): record(0, item="i", ranks=[1, 0, 2])}})
    assert ranked["preferences"][0]["ranks"] == [1, 0, 2]
    assert [(row["completion"], row["label"]) for row in ranked["labels"]] == [("y", True), ("z", False)]
    marks = [{"a": 1}, {"a": 5}, {"a": 3}]
    rated = exported([item], {"ask": "rate"}, {"me": {("i", 0): record(0, item="i", ratings=marks)}})
    assert [(row["completion"], row["ratings"]) for row in rated["ratings"]] == list(zip("xyz", marks))
    steps = exported([item], {"ask": "steps"}, {"me": {("i", 0): record(0, item="i", labels=[1, -1, None])}})
    assert (steps["steps"][0]["steps"], steps["steps"][0]["labels"]) == (["x", "y", "z"], [1, -1, None])


# -- the desk: what the page asks for and sends

@pytest.fixture
def desk(tmp_path):
    return desk_of(tmp_path, PAIRS)


def desk_of(tmp_path, rows, *flags):
    items, settings, config = items_of(tmp_path, rows, *flags)
    return Desk(config, tmp_path / "labels", items, settings)


def said(entry, **fields):
    return {"id": uuid.uuid4().hex, "item": entry["item"], "repeat": entry["repeat"], "ms": 900} | fields


def test_the_page_is_asked_one_item_after_the_other_to_the_end_and_back(desk):
    seen = []
    state = desk.next({})
    while state["entry"]:
        seen.append((state["entry"]["item"], state["entry"]["repeat"]))
        assert state["progress"]["done"] == len(seen) - 1
        state = desk.vote(said(state["entry"], value=1 + len(seen) % 7))
    assert len(seen) == len(desk.asked) == state["progress"]["done"] and len(set(seen)) == len(seen)
    for done in range(len(seen) - 1, -1, -1):
        state = desk.undo({"id": uuid.uuid4().hex})
        assert state["progress"]["done"] == done
    with pytest.raises(Refused, match="no vote to take back"):
        desk.undo({"id": uuid.uuid4().hex})
    assert state["entry"]["item"] == seen[0][0]


@pytest.mark.case(32)
def test_a_vote_sent_twice_is_one_and_another_on_the_same_item_is_refused(desk):
    entry = desk.next({})["entry"]
    vote = said(entry, value=3)
    assert desk.vote(vote) == desk.vote(vote) and len(desk.votes.records) == 1
    with pytest.raises(Refused) as refused:
        desk.vote(said(entry, value=4))
    assert refused.value.status == 409 and len(desk.votes.records) == 1
    back = {"id": uuid.uuid4().hex}
    desk.undo(back)
    assert desk.undo(back)["progress"]["done"] == 0 and len(desk.votes.records) == 2


@pytest.mark.parametrize("fields", [
    dict(value=0), dict(value=8), dict(value=True), dict(value="3"), dict(value=2.5), dict(),
    dict(ranks=[0, 1]), dict(verdict="best"), dict(value=1, ms=-1), dict(value=1, ms="1"),
    dict(value=1, note=7), dict(value=1, note="x" * 2001), dict(value=1, id="x"), dict(value=1, id=7),
    dict(value=1, id="<script>aaaa"),
])
def test_what_is_no_answer_is_refused_and_nothing_is_written(fields, desk):
    with pytest.raises(Refused) as refused:
        desk.vote(said(desk.next({})["entry"]) | fields)
    assert refused.value.status == 400 and not desk.votes.records


@pytest.mark.parametrize("ask, good, bad", [
    ("rank", dict(ranks=[2, 0, 0]),
     [dict(ranks=[0, 1]), dict(ranks=[0, 1, 3]), dict(ranks="012"), dict(value=1)]),
    ("rate", dict(ratings=[{"kind": 1, "true": 5}, {"kind": 2, "true": 4}, {"kind": 3, "true": 3}]),
     [dict(ratings=[{"kind": 1}] * 3), dict(ratings=[{"kind": 1, "true": 6}] * 3), dict(ratings=3),
      dict(verdict="tie")]),
    ("steps", dict(labels=[1, 0, -1]), [dict(labels=[1, 0]), dict(labels=[1, 0, 2]), dict(labels=None)]),
])
def test_answers_are_kept_in_the_items_own_order(ask, good, bad, tmp_path):
    rows = [{"prompt": f"q{i}", "completions": ["x", "y", "z"]} for i in range(8)]
    if ask == "steps":
        rows = [{"prompt": f"q{i}", "completion": "x\ny\nz"} for i in range(8)]
    desk = desk_of(tmp_path, rows, f"--ask {ask} --aspects kind true")
    for number in range(8):
        entry = desk.next({})["entry"]
        for fields in bad:
            with pytest.raises(Refused):
                desk.vote(said(entry, **fields))
        desk.vote(said(entry, **good))
        vote = desk.votes.records[-1]
        name, = good
        own = ["x", "y", "z"]
        shown = [own[i] for i in vote["shown"]]
        assert shown == entry["replies"]
        assert dict(zip(own, map(str, vote[name]))) == dict(zip(shown, map(str, good[name])))


def test_a_note_in_any_letters_is_kept_and_half_of_one_does_no_harm(desk, tmp_path):
    desk.vote(said(desk.next({})["entry"], value=1, note="schön \u2028 \ud800 尼"))
    desk.vote(said(desk.next({})["entry"], value=1))
    again = Votes(tmp_path / "labels", "me")
    assert len(again.live()) == 2 and next(iter(again.live().values()))["note"].startswith("schön \u2028")
    label.export(tmp_path, exported(desk.items, desk.settings, {"me": again.live()}))
    assert len(read_rows(tmp_path / "preferences.jsonl", "feedback", SILENT)) == 2


# -- the server

@pytest.fixture
def server(desk, tmp_path):
    server = Server("127.0.0.1", 0, "<p nonce=NONCE>page</p>", desk.routes, token_of(tmp_path))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method="POST", path="/next", body=b"{}", **changes):
    """(status, headers, text) of a request of the page, some headers changed; None leaves one out."""
    headers = {
        "Host": f"127.0.0.1:{server.server_port}",
        "Cookie": f"barerlhf_{server.server_port}={server.token}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body if method == "POST" else None)
    response = connection.getresponse()
    found = response.status, response.headers, response.read().decode()
    connection.close()
    return found


def test_the_address_with_its_token_gives_a_cookie_and_then_the_page(server):
    url = urlsplit(server.address)
    status, headers, _ = ask(server, "GET", f"{url.path}?{url.query}", Cookie=None)
    assert status == 303 and headers["Location"] == "/"
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and server.token in cookie
    status, headers, text = ask(server, "GET", "/", Cookie=cookie.split(";")[0])
    assert status == 200 and text == f"<p nonce={server.nonce}>page</p>"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and server.nonce in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and not headers["Access-Control-Allow-Origin"]
    assert ask(server)[0] == 200


@pytest.mark.case(32)
@pytest.mark.parametrize("method, path, changes, status", [
    ("POST", "/next", dict(Cookie=None), 403),
    ("POST", "/next", dict(Cookie="barerlhf=guess"), 403),
    ("POST", "/next", dict(Cookie="\x01;;=;"), 403),
    ("GET", "/", dict(Cookie=None), 403),
    ("GET", "/?token=guess", dict(Cookie=None), 403),
    ("GET", "/?token=%ff%ff", dict(Cookie=None), 403),
    ("POST", "/next", dict(Host="evil.example:80"), 403),
    ("POST", "/next", dict(Host="127.0.0.1"), 403),
    ("POST", "/next", dict(Host=None), 403),
    ("POST", "/next", dict(Origin="http://evil.example"), 403),
    ("POST", "/next", dict(Origin="null"), 403),
    ("POST", "/next", dict(Content_Type="text/plain"), 415),
    ("POST", "/next", dict(Content_Type=None), 415),
    ("POST", "/next", dict(Content_Length=None), 411),
    ("POST", "/next", dict(Content_Length="-5"), 411),
    ("POST", "/next", dict(Content_Length=str(BODY_LIMIT + 1)), 413),
    ("POST", "/next", dict(body=b"{"), 400),
    ("POST", "/next", dict(body=b"[1]"), 400),
    ("POST", "/next", dict(body=b"[" * 100_000), 400),
    ("POST", "/next", dict(body=b"\xff\xfe"), 400),
    ("POST", "/../label.py", {}, 404),
    ("GET", "/../label.py", {}, 404),
    ("GET", "/%2e%2e/votes-me.jsonl", {}, 404),
    ("GET", "/votes-me.jsonl", {}, 404),
    ("GET", "//evil.example/", {}, 404),
    ("POST", "/nothing", {}, 404),
    ("PUT", "/next", {}, 501),
    ("OPTIONS", "/next", {}, 501),
])
def test_attacks_are_refused_and_leave_the_votes_alone(method, path, changes, status, server, desk):
    assert ask(server, method, path, **changes)[0] == status
    assert not desk.votes.records
    assert ask(server)[0] == 200


@pytest.mark.case(32)
def test_a_body_of_ten_megabytes_is_refused_before_it_is_read(server):
    # It may find the connection closed while it is still sending.
    try:
        assert ask(server, body=b"x" * 10_000_000)[0] == 413
    except OSError:
        pass
    assert ask(server)[0] == 200


def test_a_page_of_its_own_origin_is_served_by_every_name_of_this_machine(server):
    for name in ("localhost", "127.0.0.1", "[::1]"):
        host = f"{name}:{server.server_port}"
        assert ask(server, Host=host, Origin=f"http://{host}")[0] == 200


def test_what_the_desk_refuses_and_a_full_disk_are_said_to_the_page(server, desk, monkeypatch):
    entry = desk.next({})["entry"]
    vote = json.dumps(said(entry, value=9)).encode()
    status, _, text = ask(server, path="/vote", body=vote)
    assert status == 400 and json.loads(text)["error"] == "this is no answer to compare"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    vote = json.dumps(said(entry, value=2)).encode()
    monkeypatch.setattr(label.os, "fsync", full)
    status, _, text = ask(server, path="/vote", body=vote)
    assert status == 507 and "NOT SAVED: No space left on device" in text and not desk.votes.records
    monkeypatch.undo()
    assert ask(server, path="/vote", body=vote)[0] == 200 and len(desk.votes.records) == 1


def test_a_port_that_is_taken_is_one_line_and_another_hosts_page_is_warned_of(server, tmp_path, capsys):
    with pytest.raises(UserError, match="can't be opened there"):
        Server("127.0.0.1", server.server_port, "", {}, "x")
    with pytest.raises(UserError, match="can't be opened there"):
        Server("127.0.0.1", 99999, "", {}, "x")
    token = token_of(tmp_path / "..")
    assert token == token_of(tmp_path / "..") and os.stat(tmp_path / ".." / ".token").st_mode & 0o77 == 0


# -- as a script

def started(*words):
    """(process, its address)."""
    command = [sys.executable, "-u", ROOT / "label.py", *words, "--port", "0", "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=ENVIRONMENT, start_new_session=True)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("http"):
            return process, urlsplit(line.strip())
    raise AssertionError("".join(said))


def post(url, path, body):
    """The answer, or None if the server is gone."""
    headers = {"Content-Type": "application/json",
               "Cookie": f"barerlhf_{url.port}={url.query.removeprefix('token=')}"}
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=10)
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        found = json.loads(response.read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    assert response.status == 200, found
    return found


@pytest.mark.case(32)
def test_killed_at_random_no_acknowledged_vote_is_lost_or_doubled_and_ctrl_c_ends(tmp_path):
    write_rows(tmp_path / "rows.jsonl", PAIRS)
    words = ["--out", str(tmp_path / "labels")]
    rng = random.Random(0)
    acknowledged, waiting = [], None
    for number in range(2):
        process, url = started(*words, *(["--data", str(tmp_path / "rows.jsonl")] if number == 0 else []))
        timer = threading.Timer(0.05 + 0.3 * rng.random(), os.killpg, [process.pid, signal.SIGKILL])
        timer.start()
        while True:
            if waiting is None:
                state = post(url, "/next", {})
                if state is None or state["entry"] is None:
                    break
                waiting = said(state["entry"], value=rng.randint(1, 7))
            if post(url, "/vote", waiting) is None:
                break
            acknowledged.append(waiting)
            waiting = None
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    live = Votes(tmp_path / "labels", "me").live()
    found = Counter((key, vote["value"]) for key, vote in live.items())
    assert acknowledged
    for vote in acknowledged:
        assert found[(vote["item"], vote["repeat"]), vote["value"]] == 1
    assert len(live) - len(acknowledged) in (0, 1)
    process, url = started(*words)
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and f"{len(live)} votes in" in text


@pytest.mark.parametrize("flags", ["--points 7", "--points 2", "--ask rank --n 2"])
def test_replies_of_two_models_are_voted_on_blind_and_the_export_trains_without_a_change(
        flags, small, tmp_path, capsys):
    words = (f"--models {small}/sft {small}/sft --data {TOY}/prompts_heldout.jsonl --limit 30 "
             f"--temperature 2 --max-new-tokens 6 --threads 1 --out {tmp_path}/labels {flags}")
    config = tools.parse_flags(label.Config, "", tools.split([words]))
    items, settings = find_items(config, tmp_path / "labels")
    K = 2 if settings["ask"] == "compare" else 4
    assert len(items) > 20 and len(set(items[0].models)) == 2 and len(items[0].models) == K
    assert find_items(config, tmp_path / "labels") == (items, settings)
    desk = Desk(config, tmp_path / "labels", items, settings)
    state = desk.next({})
    assert "models" not in state["entry"]
    rng = random.Random(0)
    while state["entry"]:
        fields = {"ranks": rng.sample(range(4), 4)}
        if K == 2:
            fields = {"value": rng.randint(1, int(config.points))}
        if rng.random() < 0.2:
            fields = {"verdict": rng.choice(label.VERDICTS)}
        state = desk.vote(said(state["entry"], **fields))
    desk.votes.file.close()
    run_here("label", f"--out {tmp_path}/labels --summary --export")
    text = capsys.readouterr().out
    assert "s each" in text and "against" in text and "preferences.jsonl" in text
    files = {"reward": "preferences", "dpo": "preferences", "kto": "labels"}
    for script, name in files.items():
        run_here(script, f"--model {small}/sft --data {tmp_path}/labels/{name}.jsonl --val-fraction 0",
                 f"--steps 1 --batch-tokens 500 --threads 1 --out {tmp_path}/{script}")


@pytest.mark.parametrize("flags", ["--points 7", "--ask rank --n 2"])
def test_a_function_votes_as_its_scores_say_and_goes_on_where_it_stopped(flags, small, tmp_path, capsys):
    words = (f"--models {small}/sft {small}/sft --data {TOY}/prompts_heldout.jsonl --limit 20 "
             f"--temperature 2 --max-new-tokens 6 --threads 1 --out {tmp_path}/labels {flags}")
    run_here("label", words, "--by toy:gold")
    items, settings = find_items(label.Config(), tmp_path / "labels")
    votes = all_votes(tmp_path / "labels")["gold"]
    asked = sequence(items, "gold", 0, 0.1)
    assert len(votes) == len(asked)
    for item in items:
        scores = toy.gold([item.prompt[0]["content"]] * len(item.replies), item.replies,
                          [True] * len(item.replies))
        for (i, j), lead in leads_of(votes[item.id, 0], settings).items():
            assert lead == np.sign(scores[i] - scores[j])
    before = (tmp_path / "labels" / "votes-gold.jsonl").read_bytes()
    run_here("label", words, "--by toy:gold")
    assert (tmp_path / "labels" / "votes-gold.jsonl").read_bytes() == before
    capsys.readouterr()
    run_here("label", f"--out {tmp_path}/labels --summary")
    assert "gold: " in capsys.readouterr().out


def test_the_page_ends_by_itself_when_all_has_a_vote(tmp_path):
    write_rows(tmp_path / "rows.jsonl", PAIRS[:2])
    process, url = started("--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "labels"),
                           "--until-done")
    for _ in range(2):
        post(url, "/vote", said(post(url, "/next", {})["entry"], value=1))
    text, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "2 votes in" in text


@pytest.mark.parametrize("flags, said_", [
    ("--annotator a/b", "--annotator a/b: a name is of letters"),
    ("--aspects a a", "--aspects takes 1 to 9 names, each once"),
    ("--export", "holds no items.jsonl"),
    ("--data nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--data {rows} --rubric nowhere.txt", "--rubric nowhere.txt can't be read"),
    ("--points 3", "invalid choice: '3'"),
    ("--data {rows} --ask rate --by toy:gold", "--by compares or ranks, and can't be asked to rate"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(flags, said_, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", PAIRS[:2])
    flags = flags.format(rows=tmp_path / "rows.jsonl")
    assert exit_code("label", f"--out {tmp_path}/labels --port 0 --no-browser {flags}") == 2
    shown = capsys.readouterr()
    assert said_ in shown.err + shown.out and "Traceback" not in shown.err
