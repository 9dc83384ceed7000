"""process.py and process rewards: labelled steps, where a step ends in token ids, the loss, scores."""
import importlib
import json
import math
import random
import shlex

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import judges
import process
import sums
import tools
from bench import process as bench
from data import encode_prompt, step_ends, step_offsets
from examples import TOKENIZER, user
from formats.model_folder import load_model, save_model
from formats.rows import Row
from formats.sources import read_rows
from formats.tokenizer import Tokenizer, train_bpe
from judges import step_changes, step_rewards
from model import GPT, ScalarModel, token_index
from plumbing import ranks, run as runtime
from plumbing.flags import UserError, parse_flags
from plumbing.hardware import pick_device
from plumbing.run import Alone
from process import NONE, encode_steps, step_loss
from rollout import Prompt, Rollout
from small_models import ATTENTION, IDS, open_with, outputs, tiny_of
from sums import PIECES, TOKENS
from tools import (
    SILENT, TORCHRUN, command, exit_code, rows_of, run_here, stopped_in_the_second_step, write_rows)

# Of the sums: "; " and "; so " are tokens, which hold the separator and the start of the next step.
SUMS = Tokenizer("sums", *train_bpe(TOKENS, 512, PIECES))
# Its tokens are single bytes, so that 。 is three of them.
BYTES = TOKENIZER
# Learned from a text with blank lines: \n\n is a token.
WORDS = Tokenizer("words", *train_bpe(["one step\n\nand one more\n\nand the last step"] * 3, 300))
KINDS = ("product", "min", "last")


def replied(steps, labels, **more):
    return {"prompt": "12-7+7=?", "steps": steps, "labels": labels} | more


def read(tmp_path, *rows, want="steps"):
    return read_rows(write_rows(tmp_path / "rows.jsonl", rows), want, SILENT)


# -- rows

def test_labels_may_stop_before_the_steps_do_and_may_be_signs_or_truths_or_missing(tmp_path):
    rows = read(tmp_path, replied(["a", "b", "c"], [1, -1]), replied(["a", " b"], [None, 0.0], answer=12),
                {"question": "Why?", "completions": ["a", "b"], "labels": [True, False]},
                replied(["a"], [1], finished=False))
    assert [row.labels for row in rows] == [[1, -1, None], [None, 0], [1, -1], [1]]
    assert [row.steps for row in rows] == [["a", "b", "c"], ["a", " b"], ["a", "b"], ["a"]]
    assert [row.finished for row in rows] == [True, True, True, False] and rows[1].answer == "12"
    assert all(type(label) in (int, type(None)) for row in rows for label in row.labels)
    assert [row.text for row in read(tmp_path, replied(["a"], [1]), want="prompts")] == ["12-7+7=?"]


@pytest.mark.parametrize("row, said", [
    (replied(["a"], [2]), "a label of a step is none of -1, 0 and 1"),
    (replied(["a"], ["good"]), "a label of a step is none of"),
    (replied(["a"], [1, 1]), "2 labels for 1 steps"),
    (replied("a", [1]), "steps is not a list of texts"),
    (replied(["a", 1], [1]), "steps is not a list of texts"),
    (replied(["a"], [1], finished="no"), "finished neither true nor false"),
    ({"prompt": "Why?", "completion": "a"}, "doesn't hold a prompt, the steps of a reply and their labels"),
])
def test_rows_that_are_no_labelled_steps_are_one_line_with_file_and_line(row, said, tmp_path):
    with pytest.raises(UserError, match=rf"rows.jsonl:1.*{said}"):
        read(tmp_path, row)


def test_empty_steps_and_rows_without_a_label_are_left_out_and_counted(tmp_path):
    said = []
    path = write_rows(tmp_path / "rows.jsonl", [
        replied(["a", " "], [1]), replied([], []), replied(["a"], [None]), replied(["a"], [1])])
    assert len(read_rows(path, "steps", said.append)) == 1
    assert tools.dropped(said[0]) == {"an empty step": 1, "no step has a label": 2}


def completion(text, rating):
    return {"text": text, "rating": rating, "flagged": None}


def labelled_step(*completions, chosen=None, human=None):
    return {"completions": list(completions), "chosen_completion": chosen, "human_completion": human}


def prm800k(steps, reason="solution", sampled=None):
    """A row of PRM800K, of both phases' form."""
    return {
        "labeler": "340d89bc", "timestamp": "2023-01-22T04:34:27.052924", "generation": 9,
        "is_quality_control_question": False, "is_initial_screening_question": False,
        "question": {
            "problem": "What is $1 + 2 + 3$?", "ground_truth_solution": "It is $\\boxed{6}$.",
            "ground_truth_answer": "6", "pre_generated_steps": sampled, "pre_generated_answer": "7",
            "pre_generated_verifier_score": 0.01},
        "label": {"steps": steps, "total_time": 278270, "finish_reason": reason},
    }


def test_prm800k_gives_the_labelled_reply_and_each_completion_that_it_does_not_go_on_with(tmp_path):
    """Each rating counts once; what a person wrote is good."""
    row = prm800k([
        labelled_step(completion("I add.", 0), completion("I guess.", -1), chosen=0),
        labelled_step(completion("It is 4.", -1), completion("It is 5.", -1),
                      human={"text": "1 + 2 = 3.", "rating": None, "source": "human"}),
        labelled_step(completion("3 + 3 = 6.\n\n# Answer\n\n6", 1), chosen=0),
    ])
    rows = read(tmp_path, row)
    end = "3 + 3 = 6.\n\n# Answer\n\n6"
    assert [(one.steps, one.labels, one.finished) for one in rows] == [
        (["I add.", "1 + 2 = 3.", end], [0, 1, 1], True),
        (["I guess."], [-1], False),
        (["I add.", "It is 4."], [None, -1], False),
        (["I add.", "It is 5."], [None, -1], False),
    ]
    assert {one.text for one in rows} == {"What is $1 + 2 + 3$?"} and {one.answer for one in rows} == {"6"}
    assert len(read(tmp_path, row, want="prompts")) == 1


def test_prm800k_stops_at_the_first_error_and_the_sampled_steps_go_on_without_labels(tmp_path):
    sampled = ["I add.", "1 + 2 = 4.", "4 + 3 = 7.\n\n# Answer\n\n7"]
    steps = [labelled_step(completion("I add.", 0), chosen=0),
             labelled_step(completion("1 + 2 = 4.", -1), completion("1 + 2 = 3.", 1),
                           completion("Hm.", None))]
    rows = read(tmp_path, prm800k(steps, "found_error", sampled))
    assert [(one.steps, one.labels, one.finished) for one in rows] == [
        (sampled, [0, -1, None], True), (["I add.", "1 + 2 = 3."], [None, 1], False)]
    # A broken problem has no labels, and of one that was given up those before that count.
    with pytest.raises(UserError, match="no usable row"):
        read(tmp_path, prm800k(steps, "bad_problem", sampled))
    given_up, = read(tmp_path, prm800k([steps[0], labelled_step()], "give_up", sampled))
    assert (given_up.steps, given_up.labels) == (sampled, [0, None, None])


@pytest.mark.parametrize("label, said", [
    ({"steps": "none", "finish_reason": "solution"}, "label.steps is not a list of objects"),
    ({"steps": [labelled_step(completion("a", 1), chosen=3)]}, "chosen_completion 3 of 1"),
    ({"steps": [{"completions": ["a"], "chosen_completion": 0}]}, "the completions of a step are not a list"),
    ({"steps": [labelled_step({"rating": 1}, chosen=0)]}, "steps is not a list of texts"),
    ({"steps": [labelled_step(completion("a", "good"), chosen=0)]}, "a label of a step is none of"),
])
def test_a_damaged_row_of_prm800k_is_one_line(label, said, tmp_path):
    with pytest.raises(UserError, match=rf"rows.jsonl:1.*{said}"):
        read(tmp_path, prm800k([]) | {"label": label})


# -- where a step ends in token ids

def slow_ends(tokenizer, ids, separator):
    """By adding one token after another: the first with which a step and its separator have been said."""
    text = tokenizer.decode(ids)
    parts = text.split(separator)
    behind, start = [], 0
    for number, part in enumerate(parts):
        start += len(part) + len(separator)
        if part.strip() and any(later.strip() for later in parts[number + 1:]):
            behind.append(start)
    found = []
    for place in behind:
        count = next(n for n in range(len(ids) + 1) if tokenizer.decode(ids[:n])[:place] == text[:place])
        found.append(count - 1)
    return sorted({*found, len(ids) - 1}) if ids else []


@pytest.mark.parametrize("tokenizer, separator, letters", [
    (SUMS, ";", ["12", "7", "=", "; ", "; so ", ";", " "]),
    (SUMS, "; ", ["12", "7", "=", "; ", "; so ", ";", " "]),
    (BYTES, "。", ["好", "a", "。", " ", "\n"]),
    (WORDS, "\n", ["one", " step", "\n", "\n\n", " "]),
    (WORDS, "\n\n", ["one", " step", "\n", "\n\n", "\n\n\n", " "]),
    (WORDS, "step", ["one", " step", "st", "ep", "\n\n"]),
])
def test_steps_end_where_adding_one_token_after_another_finds_their_separators(tokenizer, separator, letters):
    rng = random.Random(0)
    for size in [*range(9), *range(5, 30)]:
        text = "".join(rng.choice(letters) for _ in range(size))
        ids = tokenizer.encode(text) + [tokenizer.eos] * (size % 2)
        assert step_ends(tokenizer, ids, separator) == slow_ends(tokenizer, ids, separator), text


def test_a_token_that_holds_the_start_of_the_next_step_ends_the_one_before_it():
    ids = SUMS.encode("12-7=5; 5+7=12; so 12") + [SUMS.eos]
    ends = step_ends(SUMS, ids, ";")
    assert [SUMS.show(ids[i]) for i in ends] == ["; ", "; so ", "<|endoftext|>"]


@pytest.mark.parametrize("text, offsets", [
    ("a", []), ("", []), ("\n", []), ("a\n", []), ("a\n\n", []), ("a\nb", [2]), ("a\n\nb", [2]),
    ("\na\nb\n", [3]),
    ("a\n \nb", [2]), ("a\nb\nc", [2, 4]),
])
def test_parts_of_nothing_but_blanks_are_no_steps(text, offsets):
    assert step_offsets(text, "\n") == offsets


def test_a_replys_last_step_ends_with_its_last_token_whatever_it_is():
    eos = SUMS.eos
    whole = SUMS.encode("12-7=5; so 5")
    assert step_ends(SUMS, whole + [eos], ";") == [5, 7]
    assert step_ends(SUMS, whole, ";") == [5, 6]  # cut off behind a step
    assert step_ends(SUMS, whole[:6], ";") == [5]  # with its separator
    assert step_ends(SUMS, whole[:3], ";") == [2]  # within its first step
    assert step_ends(SUMS, SUMS.encode("so 5") + [eos], ";") == [len(SUMS.encode("so 5"))]
    assert step_ends(SUMS, [eos], ";") == [0] and step_ends(SUMS, [], ";") == []


def places(one):
    return [i for i, label in enumerate(one.classes) if label != NONE]


@pytest.mark.parametrize("tokenizer, separator, steps", [
    (SUMS, ";", ["12-7=5", " 5+7=12", " so 12"]),
    (SUMS, "; ", ["12-7=5", "5+7=12", "so 12"]),
    (BYTES, "。", ["好", "a b", "c"]),
    (WORDS, "\n\n", ["one step", "and one\nmore", "and the last step"]),
])
def test_labels_of_a_row_lie_where_scoring_finds_the_ends_of_the_same_reply(tokenizer, separator, steps):
    row = Row(user("12-7+7=?"), steps=steps, labels=[1, 0, -1])
    one = encode_steps(tokenizer, row, separator)
    ids = encode_prompt(tokenizer, row.prompt)
    reply = tokenizer.encode(separator.join(steps)) + [tokenizer.eos]
    assert one.ids == ids + reply
    assert places(one) == [len(ids) + i for i in step_ends(tokenizer, reply, separator)]
    assert [one.classes[i] for i in places(one)] == [2, 1, 0]
    # Labels that stop early, and those that are missing, leave the others where they are.
    few = encode_steps(tokenizer, Row(row.prompt, steps=steps, labels=[None, -1, None]), separator)
    assert places(few) == places(one)[1:2] and few.ids == one.ids[:places(one)[1] + 1]
    # Of a reply that goes on, the last step ends with its separator, and has no end token behind it.
    begun = Row(row.prompt, steps=steps[:2], labels=[1, -1], finished=False)
    open_end = encode_steps(tokenizer, begun, separator)
    assert len(places(open_end)) == 2 and tokenizer.eos not in open_end.ids
    assert tokenizer.decode(open_end.ids[len(ids):]).startswith(separator.join(steps[:2]) + separator)


def test_where_two_steps_end_in_one_token_the_worse_label_counts():
    tokenizer = Tokenizer("one", r"[^a]+|a", train_bpe(["b;c;"] * 9, 300, r"[^a]+")[1])
    assert len(tokenizer.encode("b;c;")) == 1
    for labels in ([-1, 1], [1, -1]):
        one = encode_steps(tokenizer, Row(user("Why?"), steps=["b", "c", "a"], labels=labels), ";")
        assert [one.classes[i] for i in places(one)] == [0]


def test_a_row_whose_tokens_say_another_text_is_left_out_and_counted(monkeypatch):
    said = []
    rows = [Row(user("Why?"), steps=["a", "b"], labels=[1, 1]),
            Row(user("How?"), steps=["a", "\0b", "c"], labels=[1, 1])]
    real = process.encode_dialogue
    monkeypatch.setattr(process, "encode_dialogue", lambda tokenizer, talk, last_only: real(
        tokenizer, [turn | {"content": turn["content"].replace("\0", "")} for turn in talk], last_only))
    kept = process.encode_all(BYTES, rows, ";", 64, said.append)
    assert len(kept) == 1 and "dropped 1 of 2 rows: their token ids say another text" in said[0]
    with pytest.raises(UserError, match="no row's steps are found again"):
        process.encode_all(BYTES, rows[1:], ";", 64, said.append)


def test_steps_that_hold_the_separator_are_said(capsys):
    said = []
    rows = [Row(user("Why?"), steps=[step, "b"], labels=[1, 1]) for step in ("a;a", "a")]
    one = process.encode_all(BYTES, rows, ";", 64, said.append)[0]
    assert "warning: 1 of 2 rows have steps that hold --step-separator ';'" in said[0]
    assert len(places(one)) == 2


# -- the loss

def test_the_loss_is_the_mean_cross_entropy_of_a_slow_loop():
    torch.manual_seed(0)
    classes = torch.tensor([0, 1, 2, 2, 0, 1, 2])
    logits = torch.randn(7, 3) + 3 * torch.nn.functional.one_hot(classes, 3)
    logits[0, 1] = 9.0
    logits.requires_grad_()
    slow = 0.0
    for own, label in zip(logits, classes):
        slow += (torch.log(sum(torch.exp(own[j]) for j in range(3))) - own[label]) / 9
    loss, metrics = step_loss(logits, classes, 9)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-6)
    right = sum(int(max(range(3), key=lambda j: logits[i, j]) == classes[i]) for i in range(7))
    assert metrics["accuracy"].item() == pytest.approx(right / 9)
    loss.backward()
    expected = (logits.detach().softmax(1) - torch.nn.functional.one_hot(classes, 3)) / 9
    torch.testing.assert_close(logits.grad, expected)


def test_only_ends_of_labelled_steps_have_a_gradient_and_every_other_position_has_exactly_none():
    scorer = process_model()
    rows = [Row(user("12-7+7=?"), steps=["12-7=5", " 5+7=12", " so 12"], labels=labels)
            for labels in ([1, -1, None], [1, 1, 1])]
    examples = [encode_steps(SUMS, row, ";") for row in rows]
    ids, mask, classes = process.collate(examples, SUMS.pad, "cpu")
    logits = scorer(ids)  # (B, T, 3): of all positions
    logits.retain_grad()
    loss, _ = step_loss(logits[mask], classes, len(classes))
    loss.backward()
    touched = logits.grad.abs().sum(2) > 0
    assert torch.equal(touched, mask) and mask.sum() == 5
    # And what the script computes, at these positions alone, is that.
    own, _ = step_loss(scorer(ids, token_index(mask)), classes, len(classes))
    assert own.item() == pytest.approx(loss.item(), rel=1e-6)


# -- the model and its folder

def process_model(seed=0):
    """A tiny process reward model for the tokenizer of the sums."""
    torch.manual_seed(seed)
    language_model = tiny_of(GPT, "gpt2", seed, vocab_size=SUMS.n_vocab)
    return ScalarModel.from_trunk(language_model, labels=3).eval()


@pytest.mark.parametrize("name", ["gpt2", "llama3", "opt", "opt-350m"])
def test_a_folder_of_a_process_model_opens_in_transformers_with_three_labels(name, peers, tmp_path):
    scorer = ScalarModel.from_trunk(tiny_of(GPT, name), labels=3).eval()
    save_model(tmp_path, scorer, TOKENIZER, step_separator="\n\n")
    peer = open_with(peers.AutoModelForSequenceClassification, tmp_path)
    assert peer.config.id2label == {0: "bad", 1: "neutral", 2: "good"} and peer.num_labels == 3
    with torch.no_grad():
        theirs = peer(IDS, attention_mask=ATTENTION).logits
    torch.testing.assert_close(outputs(scorer), theirs, atol=1e-4, rtol=0)
    again, _ = load_model(tmp_path, ScalarModel, labels=3)
    assert tools.same_tensors(again.state_dict(), scorer.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["barerlhf"]["step_separator"] == "\n\n"


def test_a_reward_model_is_written_as_ever_and_neither_is_taken_for_the_other(small, tmp_path):
    save_model(tmp_path / "process", process_model(), SUMS, step_separator=";")
    header = json.loads((small / "reward" / "config.json").read_text())
    assert header["id2label"] == {"0": "LABEL_0"} and header["label2id"] == {"LABEL_0": 0}
    assert "step_separator" not in header.get("barerlhf", {})
    assert load_file(small / "reward" / "model.safetensors")["score.weight"].shape[0] == 1
    with pytest.raises(UserError, match="holds a process reward model, but a reward model is needed here"):
        load_model(tmp_path / "process", ScalarModel)
    with pytest.raises(UserError, match="holds a reward model, but a process reward model is needed here"):
        load_model(small / "reward", ScalarModel, labels=3)
    with pytest.raises(UserError, match="holds a language model, but a process reward model is needed here"):
        load_model(small / "sft", ScalarModel, labels=3)
    with pytest.raises(UserError, match="holds a process reward model, but a language model is needed here"):
        load_model(tmp_path / "process", GPT)


# -- scores of steps

def slow_changes(good, ends, kind):
    """(B, T) by a loop over steps."""
    changes = torch.zeros(good.shape)
    for b in range(len(good)):
        judged, before = [], 0.0
        for t in range(good.shape[1]):
            if ends[b, t]:
                judged.append(good[b, t].item())
                score = {"product": math.prod(judged), "min": min(judged), "last": judged[-1]}[kind]
                changes[b, t] = score - before
                before = score
    return changes


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_the_score_equal_a_slow_loop_and_add_up_to_the_score(kind):
    torch.manual_seed(0)
    good, ends = torch.rand(6, 12), torch.rand(6, 12) < 0.4
    ends[0] = False
    ends[1] = torch.arange(12) == 5
    got = step_changes(good, ends, kind)
    torch.testing.assert_close(got, slow_changes(good, ends, kind), atol=1e-6, rtol=0)
    assert not got[~ends].any()
    for b in range(6):
        judged = good[b][ends[b]].tolist()
        score = 0.0
        if judged:
            score = {"product": math.prod(judged), "min": min(judged), "last": judged[-1]}[kind]
        assert got[b].sum().item() == pytest.approx(score, abs=1e-6)
    # What stands where no step ends counts for nothing.
    assert torch.equal(got, step_changes(torch.where(ends, good, math.nan), ends, kind))


def test_an_unknown_score_is_an_error():
    with pytest.raises(ValueError, match="unknown score of steps mean"):
        step_changes(torch.rand(1, 2), torch.ones(1, 2, dtype=torch.bool), "mean")


def rollout_of(texts, cut=()):
    """A `Rollout` of replies to one prompt; those numbered in cut have no end token."""
    prompt = Prompt(Row(user("12-7+7=?")), encode_prompt(SUMS, user("12-7+7=?")))
    rows = [SUMS.encode(text) + [SUMS.eos] * (i not in cut) for i, text in enumerate(texts)]
    lengths = torch.tensor([len(prompt.ids) + len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max()) + 2), SUMS.pad)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, :lengths[i]] = torch.tensor(prompt.ids + row)
        mask[i, len(prompt.ids):lengths[i]] = True
    return Rollout(prompts=[prompt] * len(rows), texts=texts, ids=ids, mask=mask,
                   ended=torch.tensor([i not in cut for i in range(len(rows))]), host_mask=mask,
                   host_lengths=lengths, sizes=lengths.tolist(), steps=mask, host_steps=mask)


TEXTS = ["12-7=5; 5+7=12; so 12", "so 12", "12-7=5; 5+7", "", "12-7=5; ; ;so 1;", "; ; "]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("kind", KINDS)
def test_rewards_of_steps_equal_one_reply_at_a_time_however_it_is_padded_or_passed(kind, dtype, tolerance):
    scorer = process_model()
    judge = judges.Process(scorer, SUMS, ";", kind)
    batch = rollout_of(TEXTS, cut=(2, 5))
    alone = Alone(pick_device("cpu"), dtype)
    expected = torch.zeros(batch.ids.shape)
    for b, text in enumerate(TEXTS):
        start = int(batch.mask[b].long().argmax())
        length = int(batch.host_lengths[b])
        ids = batch.ids[b, :length]
        with torch.no_grad():
            good = scorer(ids[None])[0].softmax(1)[:, 2]  # (T,)
        ends = torch.zeros(1, length, dtype=torch.bool)
        ends[0, [start + i for i in slow_ends(SUMS, ids[start:].tolist(), ";")]] = True
        expected[b, :length] = slow_changes(good[None], ends, kind)[0]
    for budget in (1, 60, 10_000):
        plan, = batch.plan(alone, [list(range(len(TEXTS)))], budget)
        got = step_rewards(alone, judge, batch, plan)
        torch.testing.assert_close(got.changes, expected, atol=tolerance, rtol=0)
        assert got.ends.any(1).all() and got.changes.dtype == torch.float32
    assert step_rewards(alone, None, batch, plan) is None
    total = judges.score(alone, [], [], batch, plan, got)
    torch.testing.assert_close(total, got.changes.sum(1)[None])


# -- whole runs

@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder of the sums with a policy of one layer, labelled steps, and a process reward model."""
    root = tmp_path_factory.mktemp("process")
    with tools.signal_handlers_kept():
        run_here("sums", f"--out {root}/sums --sums 300 --heldout-sums 40 --hasty 0.6 --wrong 0.4")
        run_here("sft", f"{tools.TINY_RUN} --data {root}/sums/demonstrations.jsonl --val-fraction 0",
                 f"--steps 60 --batch-tokens 2000 --lr 0.01 --warmup 5 --out {root}/sft")
        (root / "steps").mkdir()
        for end in ("", "_heldout"):
            lines = (root / "sums" / f"demonstrations{end}.jsonl").read_text().splitlines()
            rows = []
            for row in map(json.loads, lines[:60]):
                parts, labels = sums.labelled_steps(row["prompt"], row["completion"])
                rows.append({"prompt": row["prompt"], "steps": parts, "labels": labels})
            write_rows(root / "steps" / f"steps{end}.jsonl", rows)
        run_here("process", FLAGS.format(root=root), f"--steps 3 --out {root}/process")
    return root


FLAGS = ("--model {root}/sft --data {root}/steps/steps.jsonl --val-data {root}/steps/steps_heldout.jsonl "
         "--step-separator ; --batch 24 --eval-every 2 --threads 1 --warmup 1")


def test_a_step_of_the_script_follows_the_formula_however_it_is_cut_and_on_two_ranks(task, tmp_path):
    """The losses of two steps, in passes of one row or all, on one rank or two: within 1e-6."""
    words = FLAGS.format(root=task) + " --steps 2 --lr 0.003 --batch 25"
    for name, budget in (("one", 100_000), ("many", 30)):
        run_here("process", words, f"--micro-batch-tokens {budget} --out {tmp_path}/{name}")
    two = command("process", words, f"--micro-batch-tokens 30 --out {tmp_path}/two", launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    one, many, both = (tools.metrics(tmp_path / name) for name in ("one", "many", "two"))
    assert [row["step"] for row in one] == [0, 1, 2, 2]
    for other in (many, both):
        for row, expected in zip(other, one, strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # The first, by the formula, one reply at a time.
    torch.manual_seed(0)
    trunk, tokenizer = load_model(task / "sft", GPT)
    torch.manual_seed(0)
    scorer = ScalarModel.from_trunk(trunk, labels=3)
    rows = read_rows(task / "steps" / "steps.jsonl", "steps", SILENT)
    order = process.endless_order(len(rows), 0)
    losses = []
    for _ in range(25):
        example = encode_steps(tokenizer, rows[next(order)], ";")
        logits = scorer(torch.tensor([example.ids]))[0].log_softmax(1)
        losses += [-logits[i, example.classes[i]].item() for i in places(example)]
    assert one[1]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_held_out_numbers_are_those_of_a_loop_over_replies(task, tmp_path):
    run_here("process", FLAGS.format(root=task), f"--steps 1 --micro-batch-tokens 100 --out {tmp_path}/run")
    scorer, tokenizer = load_model(tmp_path / "run", ScalarModel, labels=3)
    losses, right, labels = [], [], []
    for row in read_rows(task / "steps" / "steps_heldout.jsonl", "steps", SILENT):
        example = encode_steps(tokenizer, row, ";")
        logits = scorer(torch.tensor([example.ids]))[0].log_softmax(1)
        for i in places(example):
            losses.append(-logits[i, example.classes[i]].item())
            right.append(logits[i].argmax().item() == example.classes[i])
            labels.append(example.classes[i])
    found = rows_of(tmp_path / "run")[-1]
    assert found["val_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["val_majority"] == pytest.approx(max(map(labels.count, labels)) / len(labels))


def test_a_rank_that_gets_no_examples_adds_nothing(task, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.Run, "split", lambda _, examples, *rest: ranks.fill_up([], 2, examples[:1]))
    run_here("process", FLAGS.format(root=task), f"--steps 1 --out {tmp_path}/run")
    rows = rows_of(tmp_path / "run")
    assert rows[1]["loss"] == rows[1]["grad_norm"] == rows[0]["val_loss"] == 0


def test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit(task, tmp_path):
    words = FLAGS.format(root=task) + " --steps 4"
    run_here("process", words, f"--out {tmp_path}/whole")
    with stopped_in_the_second_step():
        run_here("process", words, f"--out {tmp_path}/parts")
    run_here("process", words, f"--out {tmp_path}/parts --resume")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert tools.same(tmp_path / "parts", tmp_path / "whole")


def test_adapters_and_bfloat16_train_and_the_folder_is_whole(task, tmp_path):
    words = FLAGS.format(root=task) + " --steps 2 --lr 0.003"
    run_here("process", words, f"--out {tmp_path}/plain")
    for name, own in (("lora", "--lora-rank 2"), ("half", "--dtype bfloat16")):
        run_here("process", words, own, f"--out {tmp_path}/{name}")
        scorer, _ = load_model(tmp_path / name, ScalarModel, labels=3)
        assert rows_of(tmp_path / name)[1]["loss"] == pytest.approx(
            rows_of(tmp_path / "plain")[1]["loss"], rel=2e-2)
    trunk, _ = load_model(task / "sft", GPT)
    lora, _ = load_model(tmp_path / "lora", ScalarModel, labels=3)
    assert torch.equal(lora.transformer.wte.weight, trunk.transformer.wte.weight)
    assert not torch.equal(lora.transformer.h[0].mlp.c_fc.weight, trunk.transformer.h[0].mlp.c_fc.weight)


@pytest.mark.parametrize("flags, said", [
    ("--lora-rank 2 --lora-save adapter", "a PEFT folder has no place for what a process reward model is"),
    ("--step-separator ''", "--step-separator is empty"),
    ("--data {root}/sums/prompts.jsonl", "doesn't hold a prompt, the steps of a reply and their labels"),
    ("--data runs/steps/steps.jsonl",
     "no such file; python sums.py --steps-of runs/sft --out runs/steps writes it"),
    ("--model {root}/process", "holds a process reward model, but a language model is needed here"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(flags, said, task, tmp_path, capsys):
    words = FLAGS.format(root=task)
    assert exit_code("process", words, flags.format(root=task), f"--out {tmp_path}/out") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1] and errors[-1].startswith("error: ") and not (tmp_path / "out").exists()


def test_a_newline_is_the_default_and_is_kept_in_the_folder(task, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [replied(["a", "b"], [1, -1])])
    run_here("process", f"--model {task}/sft --data {path} --val-fraction 0 --steps 1 --batch 1 --threads 1",
             f"--out {tmp_path}/run")
    scorer, tokenizer = load_model(tmp_path / "run", ScalarModel, labels=3)
    assert scorer.config.header["barerlhf"]["step_separator"] == "\n"
    config = type("Config", (), {"process": f"{tmp_path}/run", "process_score": "min", "allow_pickle": False})
    loaded = judges.load_process(config, tokenizer)
    assert (loaded.separator, loaded.kind) == ("\n", "min")


SAMPLED = ("--model {root}/sft --data {root}/sums/prompts.jsonl --threads 1 --steps 2 --rollout-batch 8 "
           "--max-new-tokens 16")


def watched(monkeypatch, script, *names):
    return tools.recorded(monkeypatch, tools.SCRIPTS[script], *names)


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_gives_each_step_its_change_at_its_own_last_token_and_the_sum_is_the_score(
        kind, task, tmp_path, monkeypatch):
    calls = watched(monkeypatch, "ppo", "step_rewards", "shaped_rewards", "sample", "score")
    run_here("ppo", SAMPLED.format(root=task), f"--process {task}/process --process-score {kind}",
             "--minibatches 1 --reward-fn sums:right --reward-weights 0.5 2",
             f"--missing-eos subtract --missing-eos-penalty 0 --kl-coef 0.1 --out {tmp_path}/run")
    assert len(calls["step_rewards"]) == 2
    for number, (_, steps) in enumerate(calls["step_rewards"]):
        batch = calls["sample"][number][1]
        # The call within the call, for what is left of the scores, comes before the whole.
        (scores, kl, mask, coef, *_), rewards = calls["shaped_rewards"][2 * number + 1]
        right, by_process = calls["score"][number][1]
        torch.testing.assert_close(by_process, steps.changes.sum(1))
        torch.testing.assert_close(scores, 0.5 * right + 2 * by_process)
        torch.testing.assert_close((rewards + coef * kl * mask).sum(1), scores, atol=1e-5, rtol=0)
        last = batch.host_lengths - 1
        landed = rewards + coef * kl * mask - 2 * steps.changes  # what lands beyond the steps' own
        landed[torch.arange(8), last] -= 0.5 * right
        torch.testing.assert_close(landed, torch.zeros_like(landed), atol=1e-5, rtol=0)
    row = rows_of(tmp_path / "run")[0]
    assert row["score"] == pytest.approx(0.5 * row["score_sums:right"] + 2 * row["score_process"], abs=1e-5)


@pytest.mark.parametrize("advantage", ["none", "mean", "leave-one-out", "deviation"])
def test_grpo_trains_with_advantages_of_tokens(advantage, task, tmp_path, monkeypatch):
    calls = watched(monkeypatch, "grpo", "step_advantages", "policy_loss")
    run_here("grpo", SAMPLED.format(root=task), f"--group 4 --advantage {advantage} --process {task}/process",
             f"--micro-batch-tokens 200 --kl-coef 0.1 --kl k1 --kl-in reward --out {tmp_path}/run")
    whole = calls["step_advantages"][0][1]
    assert len(calls["policy_loss"]) > 2
    seen = [arguments[2] for arguments, _ in calls["policy_loss"]]
    assert all(own.shape[1] > 1 for own in seen)
    rows = rows_of(tmp_path / "run")
    assert all(math.isfinite(value) for row in rows for value in row.values()) and whole.abs().max() > 0


@pytest.mark.parametrize("script, flags, said", [
    ("ppo", "--reward-norm scale", "--process gives rewards at the ends of steps, and --reward-norm"),
    ("ppo", "--reward-clip 1", "and --reward-clip change whole scores"),
    ("ppo", "--reward-at next", "it goes with --reward-at eos"),
    ("grpo", "--advantage batch", "with --advantage none, mean, leave-one-out, deviation, not batch"),
    ("grpo", "--preset remax", "not greedy"),
    ("grpo", "--squash sigmoid", "--process doesn't go with --squash sigmoid, --flat resample or --tool"),
    ("grpo", "--flat resample", "--process doesn't go with"),
    ("grpo", "--tool sums:calculator", "--process doesn't go with"),
    ("ppo", "--reward-weights 1 2", "2 --reward-weights for 1 rewards"),
    ("ppo", "--process {root}/sft", "holds a language model, but a process reward model is needed here"),
    ("grpo", "--model {toy}/sft", "has another tokenizer than the policy"),
])
def test_flags_that_do_not_go_with_process_rewards_are_refused(
        script, flags, said, task, small, tmp_path, capsys):
    words = SAMPLED.format(root=task) + f" --process {task}/process --out {tmp_path}/out"
    assert exit_code(script, words, flags.format(root=task, toy=small)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["ppo", "grpo"])
def test_two_ranks_with_process_rewards_train_as_one_does_and_a_stopped_run_resumes(script, task, tmp_path):
    words = SAMPLED.format(root=task) + f" --process {task}/process --warmup 1 --lr 0.003"
    run_here(script, words, f"--out {tmp_path}/one")
    two = command(script, words, f"--micro-batch-tokens 100 --out {tmp_path}/two", launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    for one, other in zip(tools.metrics(tmp_path / "one"), tools.metrics(tmp_path / "two"), strict=True):
        for row in (one, other):
            for key in [key for key in row if key.endswith(("clip_fraction", "ratio_error"))]:
                del row[key]
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    with stopped_in_the_second_step():
        run_here(script, words, f"--out {tmp_path}/parts")
    run_here(script, words, f"--out {tmp_path}/parts --resume")
    assert tools.same_tensors(load_file(tmp_path / "parts" / "model.safetensors"),
                              load_file(tmp_path / "one" / "model.safetensors"))


def test_best_of_n_takes_a_process_score(task, tmp_path, monkeypatch):
    """They are those of the sampled ids, one reply at a time; of a text that comes twice, of the first."""
    calls = watched(monkeypatch, "best_of_n", "sample")
    run_here("best_of_n", f"--model {task}/sft --process {task}/process --max-new-tokens 24 --threads 1",
             f"--data {task}/sums/prompts_heldout.jsonl --n 4 --judge sums:right --out {tmp_path}/out")
    scorer, tokenizer = load_model(task / "process", ScalarModel, labels=3)
    known = {}
    for _, batch in calls["sample"]:
        for b, prompt in enumerate(batch.prompts):
            ids = batch.ids[b, :batch.host_lengths[b]].tolist()
            start = len(prompt.ids)
            ends = [start + i for i in slow_ends(tokenizer, ids[start:], ";")]
            with torch.no_grad():
                good = scorer.eval()(torch.tensor([ids]))[0, ends].softmax(1)[:, 2]
            if batch.ended[b]:
                known.setdefault((prompt.row.text, batch.texts[b]), good.prod().item())
    rows = [json.loads(line) for line in (tmp_path / "out" / "rankings.jsonl").read_text().splitlines()]
    assert len(rows) > 10
    for row in rows:
        for reply, score in zip(row["completions"], row["scores"]):
            assert score == pytest.approx(known[row["prompt"], reply], abs=1e-5)


def test_a_search_by_steps_goes_on_from_the_best_continuation(task, tmp_path, monkeypatch):
    calls = watched(monkeypatch, "best_of_n", "generate", "step_rewards")
    run_here("best_of_n", f"--model {task}/sft --process {task}/process --search steps --n 3 --batch 5",
             f"--threads 1 --data {task}/sums/prompts_heldout.jsonl --max-new-tokens 16 --out {tmp_path}/out")
    scorer, tokenizer = load_model(task / "process", ScalarModel, labels=3)
    kept = {}  # {ids of a prompt: ids of it and its reply so far}
    # The score of what a search ends with is asked for as well, in batches of five.
    searched = [call for call in calls["step_rewards"] if len(call[0][2].texts) != 5]
    rounds = list(zip(calls["generate"], searched))
    for (asked, _), ((_, _, batch, _), steps) in rounds[:4]:
        questions, limits = asked[1], asked[2]
        for first in range(0, len(questions), 3):
            prompt = tuple(batch.prompts[first].ids)
            before = kept.get(prompt, list(prompt))
            assert questions[first:first + 3] == [before] * 3
            assert limits[first:first + 3] == [16 - (len(before) - len(prompt))] * 3
            scores = steps.changes[first:first + 3].sum(1).tolist()
            best = first + scores.index(max(scores))
            kept[prompt] = batch.ids[best, :batch.host_lengths[best]].tolist()
            for b in range(first, first + 3):
                ids = batch.ids[b, :batch.host_lengths[b]].tolist()
                said = ids[len(prompt):]
                ends = slow_ends(tokenizer, said, ";")
                # One step more than before, and it is the end.
                assert ids[:len(before)] == before and ends[-1] == len(said) - 1
                assert not any(len(before) - len(prompt) <= end < len(said) - 1 for end in ends)
                with torch.no_grad():
                    good = scorer.eval()(torch.tensor([ids]))[0].softmax(1)[:, 2]
                expected = math.prod(good[len(prompt) + end].item() for end in ends)
                assert scores[b - first] == pytest.approx(expected, abs=1e-5)
    assert len(kept) >= 5 and len(rounds) > 8
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["groups"] == 40 and summary["kl_bound"] is None and summary["rows"]["rankings"] == 0


@pytest.mark.parametrize("flags", ["--select top", "--train dpo", "--arena {root}/sft"])
def test_a_search_by_steps_leaves_nothing_to_select_or_compare(flags, task, tmp_path, capsys):
    words = f"--model {task}/sft --process {task}/process --search steps --out {tmp_path}/out"
    assert exit_code("best_of_n", words, flags.format(root=task)) == 2
    assert "--search steps goes by --process" in capsys.readouterr().err
    assert exit_code("best_of_n", f"--model {task}/sft --reward-fn sums:right --search steps") == 2


def test_evaluation_takes_a_process_score_beside_others(task, tmp_path, capsys):
    run_here("evaluate", f"--models {task}/sft --process {task}/process --process-score min --threads 1",
             f"--reward-fn sums:right --reward-weights 1 0.5 --data {task}/sums/prompts_heldout.jsonl",
             f"--max-new-tokens 24 --out {tmp_path}/results.json")
    found = json.loads((tmp_path / "results.json").read_text())["results"][f"{task}/sft"]
    assert found["score"] == pytest.approx(
        found["scores"]["sums:right"] + 0.5 * found["scores"]["process"], abs=1e-5)
    assert exit_code("evaluate", f"--models {task}/sft --process {task}/process --tool sums:calculator") == 2
    assert "it doesn't go with --tool" in capsys.readouterr().err


# -- what bench/process.py measures

@pytest.mark.parametrize("name", bench.LINES)
def test_every_flag_of_the_bench_is_one_of_its_script_and_none_is_given_twice(name):
    script, *words = shlex.split(bench.LINES[name].format(folder="F", seed=0))
    parse_flags(importlib.import_module(script.removesuffix(".py")).Config, "", words)
    flags = [word for word in words if word.startswith("--")]
    assert len(flags) == len(set(flags))


def test_a_vote_among_n_counts_them_alone_and_a_weighted_one_their_scores():
    found = {
        "product": [[0.9, 0.2, 0.3, 0.1]], "min": [[0.1, 0.2, 0.9, 0.1]], "last": [[0.1, 0.2, 0.3, 0.4]],
        "outcome": [[-9.0, 2.0, 1.0, 2.5]], "result": [[7.0, 5.0, 5.0, math.nan]],
        "right": [[0.0, 1.0, 1.0, 0.0]],
    }
    found = {name: np.array(values) for name, values in found.items()}
    assert bench.ranked(found, 4) == {
        "process, product": 0, "process, min": 1, "process, last": 0, "outcome": 0, "vote": 1,
        "process, product + vote": 0, "0.1 outcome + vote": 1, "vote weighted by process": 0,
        "vote weighted by outcome": 1, "any of them": 1}
    # In groups of two 7 and 5 have a vote each, and so the first has it; then 5 stands beside no result.
    assert bench.ranked(found, 2)["vote"] == 0.5 and bench.ranked(found, 2)["any of them"] == 1
    assert bench.ranked(found, 1)["any of them"] == bench.ranked(found, 1)["vote"] == 0.5
