"""reward.py: its loss and its metrics against closed forms and slow loops, and a run's zero point."""
import math

import pytest
import torch
import torch.nn.functional as F

import model
from data import encode_prompt, ranked_pairs
from formats.model_folder import load_model
from formats.rows import Row
from formats.sources import read_rows
from reward import ranking_loss, ranking_metrics
from tools import DATA


# -- the loss

def test_ranking_loss_equals_all_pairs_forwarded_apart_in_value_and_gradient():
    torch.manual_seed(0)
    trunk = torch.nn.Linear(5, 1)
    rows = [
        Row([], ["a"] * 4, [2, 0, 1, 0]),
        Row([], ["a"] * 2, [0, 1], margin=0.7),
        Row([], ["a"] * 3, [0, 1, 2]),
    ]
    features = torch.randn(9, 5)
    better, worse, weight, margin = ranked_pairs(rows)
    loss, _ = ranking_loss(trunk(features).squeeze(1), better, worse, weight / len(rows), margin)
    loss.backward()
    got = trunk.weight.grad.clone()
    trunk.weight.grad = None
    slow, start = 0.0, 0
    for row in rows:  # every pair with two forwards of its own
        pairs = [(i, j) for i in range(len(row.ranks)) for j in range(len(row.ranks))
                 if row.ranks[i] < row.ranks[j]]
        for i, j in pairs:
            gap = trunk(features[start + i]) - trunk(features[start + j]) - row.margin
            slow = slow - torch.log(1 / (1 + torch.exp(-gap))).sum() / len(pairs) / len(rows)
        start += len(row.ranks)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-6)
    torch.testing.assert_close(got, trunk.weight.grad, rtol=1e-5, atol=1e-7)


def test_equal_scores_give_log_2_and_half_accuracy_and_margin_has_its_known_gradient():
    pair = ranked_pairs([Row([], ["a", "b"], [0, 1])])
    loss, metrics = ranking_loss(torch.zeros(2), *pair)
    assert loss.item() == pytest.approx(math.log(2)) and metrics["accuracy"].item() == 0.5
    margin = torch.tensor([0.3], requires_grad=True)
    ranking_loss(torch.tensor([1.0, 0.4]), *pair[:3], margin)[0].backward()
    assert margin.grad.item() == pytest.approx(torch.sigmoid(torch.tensor(0.3 - 0.6)).item(), rel=1e-5)


def test_ranking_loss_keeps_its_gradient_for_pairs_that_are_very_wrong():
    scores = torch.tensor([-60.0, 60.0], requires_grad=True)  # sigma(-120) is no float32
    loss, _ = ranking_loss(scores, *ranked_pairs([Row([], ["a", "b"], [0, 1])]))
    loss.backward()
    assert loss.item() == pytest.approx(120) and scores.grad.tolist() == pytest.approx([-1, 1])


def test_logsigmoid_and_gap_agree_with_the_bradley_terry_probability():
    scores = torch.tensor([0.9, -0.3])
    loss, metrics = ranking_loss(scores, *ranked_pairs([Row([], ["a", "b"], [0, 1])]))
    assert math.exp(-loss.item()) == pytest.approx(torch.softmax(scores, 0)[0].item(), rel=1e-5)
    assert metrics["gap"].item() == pytest.approx(1.2)
    assert F.logsigmoid(metrics["gap"]).item() == pytest.approx(-loss.item())


# -- metrics of held-out rankings

def test_held_out_accuracy_bayes_accuracy_and_calibration_are_counted_right():
    rows = [
        Row([], ["aa", "b"], [0, 1], gold=[1, -1]),
        Row([], ["cc", "d"], [0, 1], gold=[-1, 1]),
        Row([], ["e", "f"], [0, 1], gold=[1, 1]),
    ]
    result = ranking_metrics(torch.tensor([2.0, 0.0, 3.0, 0.0, 1.0, 1.0]).numpy(), rows)
    assert result["accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert result["bayes_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert sum(b["pairs"] for b in result["calibration"]) == 3
    top = result["calibration"][-1]
    assert top["predicted"] == pytest.approx(1 / (1 + math.exp(-3))) and top["observed"] == 1
    swapped = [Row([], r.replies, [1, 0]) for r in rows]
    assert ranking_metrics(torch.tensor([2.0, 0.0, 3.0, 0.0, 1.0, 1.0]).numpy(),
                           swapped)["accuracy"] == pytest.approx(0.5 / 3)


def test_length_alone_takes_the_longer_or_the_shorter_reply_whichever_is_more_often_right():
    for replies in (["aa", "b"], ["a", "bb"]):
        rows = [Row([], replies, [0, 1]), Row([], replies, [0, 1]), Row([], replies, [1, 0])]
        assert ranking_metrics(torch.arange(6.0).numpy(), rows)["length_accuracy"] == pytest.approx(2 / 3)


# -- whole runs

def test_reward_model_scores_demonstrations_zero_on_average(chain):
    root = chain[0]
    scorer, tokenizer = load_model(root / "reward", model.ScalarModel)
    scores = []
    rows = read_rows(DATA["sft"], "demonstrations", lambda text: None)
    # 2000 at most, evenly spread.
    for row in rows[::5]:
        ids = torch.tensor(
            [encode_prompt(tokenizer, row.prompt) + tokenizer.encode(row.replies[0]) + [tokenizer.eos]])
        with torch.no_grad():
            scores.append(scorer.eval()(ids)[0, -1].item())
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-3)
