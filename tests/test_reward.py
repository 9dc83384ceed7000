"""reward.py: its losses against closed forms, slow loops and fits of others; what rows become; whole runs."""
import copy
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import reward
import tools
from data import (
    Group, collate, encode_group, encode_prompt, mean_and_deviation, ranked_pairs, targets_of, useless)
from examples import TOKENIZER
from formats.model_folder import load_model, save_model
from formats.rows import Row
from formats.sources import read_rows
from plumbing import run as runtime, steps as steps_file
from plumbing.flags import UserError
from reward import (
    Config, Levels, centering_loss, check, feedback_loss, language_loss, ranking_loss, rating_loss, tie_loss,
    verdict_loss)
from small_models import tiny, tiny_of
from tools import (
    ALL_AT_ONCE, DATA, SILENT, TORCHRUN, command, metrics, reply_logprob, rows_of, run_here, write_rows)

PAIR = ranked_pairs([Row([], ["a", "b"], [0, 1])])  # better, worse, weight, margin
LOG2 = math.log(2)


# -- the loss of rankings

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
    loss, metrics = ranking_loss(torch.zeros(2), *PAIR)
    assert loss.item() == pytest.approx(LOG2) and metrics["accuracy"].item() == 0.5
    margin = torch.tensor([0.3], requires_grad=True)
    ranking_loss(torch.tensor([1.0, 0.4]), *PAIR[:3], margin)[0].backward()
    assert margin.grad.item() == pytest.approx(torch.sigmoid(torch.tensor(0.3 - 0.6)).item(), rel=1e-5)


def test_ranking_loss_keeps_its_gradient_for_pairs_that_are_very_wrong():
    scores = torch.tensor([-60.0, 60.0], requires_grad=True)  # sigma(-120) is no float32
    loss, _ = ranking_loss(scores, *PAIR)
    loss.backward()
    assert loss.item() == pytest.approx(120) and scores.grad.tolist() == pytest.approx([-1, 1])


def test_logsigmoid_and_gap_agree_with_the_bradley_terry_probability():
    scores = torch.tensor([0.9, -0.3])
    loss, metrics = ranking_loss(scores, *PAIR)
    assert math.exp(-loss.item()) == pytest.approx(torch.softmax(scores, 0)[0].item(), rel=1e-5)
    assert metrics["gap"].item() == pytest.approx(1.2)
    assert F.logsigmoid(metrics["gap"]).item() == pytest.approx(-loss.item())


@pytest.mark.parametrize("right", [1.0, 0.8, 0.5])
def test_a_label_that_may_be_wrong_costs_what_both_labels_cost_as_often_as_they_are_right(right):
    scores = torch.tensor([0.9, -0.3], requires_grad=True)
    loss, metrics = ranking_loss(scores, *PAIR, right=torch.tensor([right]))
    loss.backward()
    p = 1 / (1 + math.exp(-1.2))
    assert loss.item() == pytest.approx(-right * math.log(p) - (1 - right) * math.log(1 - p), rel=1e-6)
    # The slope is the probability that is predicted less the one that is told: 0 where they agree.
    assert scores.grad.tolist() == pytest.approx([p - right, right - p], rel=1e-5)
    assert metrics["decided"].item() == (right != 0.5) == metrics["accuracy"].item()


# -- ties

def test_a_soft_tie_is_least_where_scores_are_equal_and_knows_no_order():
    tie = dict(right=torch.tensor([0.5]))
    assert ranking_loss(torch.zeros(2), *PAIR, **tie)[0].item() == pytest.approx(LOG2)
    for gap in (-3.0, 0.1, 7.0):
        scores = torch.tensor([gap, 0.0], requires_grad=True)
        loss, _ = ranking_loss(scores, *PAIR, **tie)
        assert loss.item() == pytest.approx(ranking_loss(scores.flip(0), *PAIR, **tie)[0].item())
        loss.backward()
        assert scores.grad[0].item() == pytest.approx(1 / (1 + math.exp(-gap)) - 0.5, rel=1e-5)


@pytest.mark.parametrize("nu", [1.0, 1.001, 1.7, 5.0])
@pytest.mark.parametrize("gap", [0.0, 1.3, -4.0])
def test_rao_kupper_gives_the_probabilities_of_the_paper_which_add_up_to_1(nu, gap):
    """In float64, by the formulas of the strengths exp(r)."""
    scores = torch.tensor([gap + 0.4, 0.4], dtype=torch.float64)
    one, other, weight, margin = PAIR[0], PAIR[1], torch.ones(1).double(), torch.zeros(1).double()
    cut = torch.tensor(math.log(nu), dtype=torch.float64)
    p, q = math.exp(gap + 0.4), math.exp(0.4)
    win = math.exp(-ranking_loss(scores, one, other, weight, margin, cut=cut)[0])
    lose = math.exp(-ranking_loss(scores, other, one, weight, margin, cut=cut)[0])
    tie = math.exp(-tie_loss(scores, one, other, weight, cut)) if nu > 1 else 0.0
    assert win == pytest.approx(p / (p + nu * q)) and lose == pytest.approx(q / (q + nu * p))
    assert tie == pytest.approx((nu**2 - 1) * p * q / ((p + nu * q) * (nu * p + q)))
    assert win + lose + tie == pytest.approx(1)


def test_rao_kupper_with_threshold_1_is_bradley_terry_in_value_and_gradient():
    torch.manual_seed(0)
    rows = [Row([], ["a"] * 4, [2, 0, 1, 0]), Row([], ["a"] * 2, [0, 1], margin=0.7)]
    pairs, found = ranked_pairs(rows), []
    for cut in (None, torch.tensor(math.log(1.0))):
        scores = torch.linspace(-2, 3, 6).requires_grad_()
        loss, _ = ranking_loss(scores, *pairs, **({} if cut is None else {"cut": cut}))
        loss.backward()
        found.append((loss.item(), scores.grad))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-6)


def test_the_tie_loss_has_the_gradient_of_the_formula_in_scores_and_threshold():
    for gap, nu in itertools.product((0.0, 2.0, -30.0), (1.0001, 1.5, 20.0)):
        cut = torch.tensor(math.log(nu), requires_grad=True)
        scores = torch.tensor([gap, 0.0], requires_grad=True)
        tie_loss(scores, *PAIR[:3], cut).backward()
        got = [*scores.grad.tolist(), cut.grad.item()]
        x = torch.tensor([gap, 0.0, math.log(nu)], dtype=torch.float64, requires_grad=True)
        (p, q), n = x[:2].exp(), x[2].exp()
        (-((n**2 - 1) * p * q / ((p + n * q) * (n * p + q))).log()).backward()
        assert got == pytest.approx(x.grad.tolist(), rel=1e-3, abs=1e-6)


WINS = np.array([[0, 5, 6, 2], [3, 0, 4, 7], [1, 2, 0, 3], [4, 1, 2, 0]], float)  # of the row over the column
TIES = np.array([[0, 2, 1, 3], [2, 0, 4, 1], [1, 4, 0, 2], [3, 1, 2, 0]], float)


def fitted(wins, ties, soft=False):
    """Scores (4,) and threshold at the least of our losses for a table, by L-BFGS in float64."""
    kwargs = {"dtype": torch.float64}
    x = torch.zeros(5, **kwargs, requires_grad=True)
    pairs = [(i, j) for i, j in itertools.product(range(4), repeat=2) if i != j]
    better, worse = torch.tensor(pairs).T
    weight = torch.tensor([wins[i, j] for i, j in pairs], **kwargs)
    tied = torch.tensor([ties[i, j] / 2 for i, j in pairs], **kwargs)  # each is in the table twice
    zero = torch.zeros(len(pairs), **kwargs)
    solver = torch.optim.LBFGS([x], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15,
                               line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        cut = F.softplus(x[4]) if tied.sum() > 0 and not soft else 0.0
        total, _ = ranking_loss(x[:4], better, worse, weight, zero, cut=cut)
        if soft:
            total = total + ranking_loss(x[:4], better, worse, tied, zero, right=zero + 0.5)[0]
        elif tied.sum() > 0:
            total = total + tie_loss(x[:4], better, worse, tied, cut)
        total.backward()
        return total

    solver.step(loss)
    scores = x[:4].detach().numpy()
    return scores - scores.mean(), math.exp(F.softplus(x[4]).item())


def by_iteration(wins, ties, nu=None):
    """The same by the MM algorithms of Hunter 2004 (Bradley-Terry, and Rao-Kupper with its threshold)."""
    p, learns = np.ones(len(wins)), nu is None
    nu = 2.0 if learns else nu
    beats = wins + ties  # a tie is, but for (nu^2 - 1), a win of both
    for _ in range(20000):
        below = p[:, None] + nu * p  # [i, j]: p_i + nu p_j
        p = beats.sum(1) / (beats / below + nu * (beats / below).T).sum(1)
        p /= p.sum()
        if learns:
            C = (beats * p / (p[:, None] + nu * p)).sum()
            T = ties.sum() / 2
            nu = (T + math.sqrt(T**2 + C**2)) / C
    scores = np.log(p)
    return scores - scores.mean(), nu


def test_bradley_terry_and_rao_kupper_have_the_optima_of_an_independent_fit():
    scores, _ = fitted(WINS, 0 * TIES)
    assert scores == pytest.approx(by_iteration(WINS, 0 * TIES, nu=1.0)[0], abs=1e-5)
    scores, nu = fitted(WINS, TIES)
    expected, threshold = by_iteration(WINS, TIES)
    assert scores == pytest.approx(expected, abs=1e-5) and nu == pytest.approx(threshold, abs=1e-5)
    assert threshold > 1.2
    # A soft tie is half a win of each.
    half, _ = by_iteration(WINS + TIES / 2, 0 * TIES, nu=1.0)
    assert fitted(WINS, TIES, soft=True)[0] == pytest.approx(half, abs=1e-5)


def test_bradley_terry_has_the_optimum_of_choix():
    choix = pytest.importorskip("choix", reason="an independent fit of Bradley-Terry")
    data = [(i, j) for i, j in itertools.product(range(4), repeat=2) for _ in range(int(WINS[i, j]))]
    theirs = choix.opt_pairwise(4, data)
    assert fitted(WINS, 0 * TIES)[0] == pytest.approx(theirs - theirs.mean(), abs=1e-4)


# -- verdicts, ratings, centring, the language model

def test_a_verdict_is_bradley_terry_against_a_reply_that_has_the_level_for_its_score():
    scores = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    at, sign = torch.tensor([0, 1, 2]), torch.tensor([1.0, -1.0, -1.0])
    weight = torch.tensor([0.5, 0.25, 0.25])
    loss = verdict_loss(scores, at, sign, weight, 0.3)
    loss.backward()
    slow = 0.0
    virtual = torch.cat([scores.detach(), torch.tensor([0.3])])
    for reply, good, share in ((0, True, 0.5), (1, False, 0.25), (2, False, 0.25)):
        ends = torch.tensor([[reply], [3]]) if good else torch.tensor([[3], [reply]])
        slow += share * ranking_loss(virtual, *ends, torch.ones(1), torch.zeros(1))[0].item()
    assert loss.item() == pytest.approx(slow, rel=1e-6)
    sigma = lambda x: 1 / (1 + math.exp(-x))
    assert scores.grad.tolist() == pytest.approx([-0.5 * sigma(-0.7), 0.25 * sigma(-2.3), 0.25 * sigma(0.2)])


def test_ratings_and_centring_are_squares():
    scores = torch.tensor([1.0, -2.0], requires_grad=True)
    loss = rating_loss(scores, torch.tensor([1]), torch.tensor([0.5]), torch.tensor([0.25]))
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * 2.5**2) and scores.grad.tolist() == [0, pytest.approx(-1.25)]
    assert centering_loss(torch.tensor([3.0, -1.0]), *PAIR[:3]).item() == pytest.approx(4)
    assert centering_loss(torch.tensor([3.0, -3.0]), *PAIR[:3]).item() == 0


@pytest.mark.parametrize("tied", [True, False])
def test_one_pass_reads_scores_and_log_probabilities_as_two_do(tied):
    """Of replies of other lengths, in any order; the padding holds anything."""
    language_model = tiny(seed=1, tied=tied)
    scorer = model.ScalarModel.from_trunk(language_model)
    lengths = torch.tensor([9, 5, 12, 7])
    ids = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(0))
    places = torch.arange(12)
    mask = (places >= 3) & (places < lengths[:, None])
    head = None if tied else language_model.lm_head.weight
    rows = torch.tensor([2, 0])
    scores, means = model.last_scores_and_logprobs(scorer, ids, lengths, mask, rows, head)
    torch.testing.assert_close(scores, model.last_scores(scorer, ids, lengths), rtol=0, atol=1e-6)
    for row, mean in zip(rows.tolist(), means):
        alone = reply_logprob(language_model, ids[row, :lengths[row]], mask[row, :lengths[row]])
        assert mean.item() == pytest.approx(alone.item() / (lengths[row].item() - 3), rel=1e-5)
    (means.sum() + scores.sum()).backward()
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model.last_scores_and_logprobs(scorer, ids, lengths, mask, rows, head)
    assert rough.dtype == torch.float32 and (rough - scores).abs().max() < 0.3
    none, empty = model.last_scores_and_logprobs(scorer, ids, lengths, mask, rows[:0], head)
    assert len(empty) == 0
    torch.testing.assert_close(none, scores, rtol=0, atol=1e-6)


def test_every_loss_is_finite_where_scores_are_far_apart():
    scores = torch.tensor([-60.0, 60.0], requires_grad=True)
    one, sign = torch.ones(1), -torch.ones(1)
    total = tie_loss(scores, *PAIR[:3], torch.tensor(0.4)) + verdict_loss(scores, PAIR[1], sign, one, 0.0)
    total = total + language_loss(torch.tensor([-1e3]), one) + rating_loss(scores, PAIR[0], one, one)
    total = total + centering_loss(scores, *PAIR[:3])
    total.backward()
    assert total.isfinite() and scores.grad.isfinite().all() and scores.grad.abs().max() > 1


# -- what rows become

def read(tmp_path, *rows):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi"} | row for row in rows])
    return read_rows(path, "feedback", SILENT)


def loss_of(rows, **flags):
    """Of scores 0.7, -0.4, 0.2, ... of some rows' replies, a mean over rows."""
    config = Config(**flags)
    standard = mean_and_deviation([Group(row, []) for row in rows])
    targets = targets_of(rows, config, standard).times(1, len(rows))
    count = sum(len(row.replies) for row in rows)
    scores = torch.tensor([0.7, -0.4, 0.2] * count)[:count]
    levels = Levels(config, {}, "cpu", [])
    return feedback_loss(scores, targets, levels.values()[0], 0.25, config)[0].item()


TWO = {"completions": ["a", "b"]}


def test_a_scale_is_a_tie_in_its_middle_a_pair_at_its_end_and_a_margin_if_told(tmp_path):
    scale = lambda value: TWO | {"scale": {"value": value, "points": 7}}
    middle, end, other_end, six = read(tmp_path, scale(4), scale(7), scale(1), scale(6))
    tie, pair, turned = read(tmp_path, *(TWO | {"ranks": ranks} for ranks in ([0, 0], [0, 1], [1, 0])))
    for ties in ("soft", "rao-kupper"):
        assert loss_of([middle], ties=ties) == loss_of([tie], ties=ties)
        assert loss_of([end], ties=ties) == loss_of([pair], ties=ties)
        assert loss_of([other_end], ties=ties) == loss_of([turned], ties=ties)
    sure = loss_of([pair]), loss_of([turned])
    assert loss_of([six]) == pytest.approx(5 / 6 * sure[0] + 1 / 6 * sure[1])
    by_margin = loss_of([six], scale="margin", scale_margin=3.0)
    assert by_margin == pytest.approx(-math.log(1 / (1 + math.exp(-(1.1 - 3 * 2 / 3)))))
    assert loss_of([Row([], ["a", "b"], [0, 1], margin=2.0)]) == pytest.approx(by_margin)


def test_a_probability_below_a_half_is_one_above_it_of_the_other_order(tmp_path):
    pair = {"chosen": "a", "rejected": "b"}
    row, turned = read(tmp_path, pair | {"probability": 0.2}, pair | {"probability": 0.8})
    assert (row.ranks, row.probability) == ([1, 0], 0.8)
    assert loss_of([row]) == pytest.approx(0.2 * loss_of([Row([], ["a", "b"], [0, 1])])
                                           + 0.8 * loss_of([Row([], ["a", "b"], [1, 0])]))
    assert loss_of([turned]) != pytest.approx(loss_of([row]))
    half, = read(tmp_path, pair | {"probability": 0.5})
    assert half.ranks == [0, 0] and loss_of([half], ties="soft") == pytest.approx(
        loss_of([Row([], ["a", "b"], [0, 0])], ties="soft"))


def test_a_row_weighs_as_much_as_any_other_whatever_it_says(tmp_path):
    rows = read(tmp_path, {"completions": list("abcd"), "ranks": [0, 1, 1, 2]}, TWO | {"verdict": "both_bad"},
                {"prompt": "Rated", "completion": "a", "rating": 3},
                {"prompt": "Rated", "completion": "b", "rating": 5}, {"chosen": "a", "rejected": "b"})
    assert [row.verdict for row in rows] == ["", "both_bad", "", ""] and len(rows[3].ratings) == 2
    for ties in ("drop", "soft", "rao-kupper"):
        targets = targets_of(rows, Config(ties=ties, ratings="regress"), (4.0, 1.0))
        tied = 1 / 6 if ties == "rao-kupper" else 0
        by_kind = [part[-1].sum().item() for part in targets]
        assert by_kind == pytest.approx([2 - tied, tied, 1, 1, 2])
    assert targets.ratings[1].tolist() == [-1, 1]


def test_targets_of_every_kind_written_out_by_hand():
    rows = [
        Row([], ["a", "b", "c"], [0, 1, 1], margin=0.25),
        Row([], ["a", "b"], [0, 0], verdict="both_good"),
        Row([], ["a", "b"], [-4, -1], ratings=[{"rating": 4}, {"rating": 1}]),
        Row([], ["a", "b"], [1, 0], margin=0.5, probability=0.75, strength=0.5),
        Row([], ["a", "b"], [0, 0]),
        Row([], ["a"], [0], verdict="both_bad"),
    ]
    third = pytest.approx(1 / 3)
    decided = [(0, 1, 0.25, 1, third), (0, 2, 0.25, 1, third)]
    verdicts, ratings = [(3, 1, 0.5), (4, 1, 0.5), (11, -1, 1)], [(5, 0.5, 0.5), (6, -1, 0.5)]
    best = [(0, 1), (8, 1), (9, 0.5), (10, 0.5)]
    found = {}
    for ties, scale in (("soft", "margin"), ("rao-kupper", "soft")):
        config = Config(ties=ties, scale=scale, scale_margin=2.0, ratings="regress")
        found[ties] = [[*zip(*(column.tolist() for column in part))]
                       for part in targets_of(rows, config, (3.0, 2.0))]
    soft = decided + [(1, 2, 0, 0.5, third), (8, 7, 1.5, 1, 1), (9, 10, 0, 0.5, 1)]
    assert found["soft"] == [soft, [], verdicts, ratings, best]
    assert found["rao-kupper"] == [decided + [(8, 7, 0.5, 0.75, 1)], [(1, 2, third), (9, 10, 1)], verdicts,
                                   ratings, best]
    half = targets_of(rows, Config(ties="soft"), (0.0, 1.0)).times(1, 2)
    assert half.pairs[-1].sum().item() == pytest.approx(4 / 2) and half.verdicts[-1].sum().item() == 1


def test_what_teaches_nothing_is_left_out_and_said(tmp_path):
    tie, pair, verdict, lone = read(
        tmp_path, TWO | {"ranks": [0, 0]}, {"chosen": "a", "rejected": "b"}, TWO | {"verdict": "both_good"},
        {"prompt": "b", "completion": "a", "rating": 1})
    for ties, ratings in itertools.product(("drop", "soft"), ("rank", "regress")):
        config = Config(ties=ties, ratings=ratings)
        assert [useless(row, config) for row in (tie, pair, verdict, lone)] == [
            "all replies tied" if ties == "drop" else "", "", "",
            "no second rating of the same prompt to compare with" if ratings == "rank" else ""]


@pytest.mark.parametrize("flags, said", [
    ({"tie_threshold": 1.5}, "--tie-threshold is for --ties rao-kupper; leave it out with drop"),
    ({"tie_threshold": 1.0, "ties": "rao-kupper"}, "--tie-threshold 1 must be above 1, or 0 to learn it"),
    ({"tie_threshold": 0.5, "ties": "rao-kupper"}, "--tie-threshold 0.5 must be above 1"),
    ({"scale_margin": 2.0}, "--scale-margin is for --scale margin; leave it out with soft"),
    ({"level": "high"}, "--level high is neither a number nor learned"),
    ({"level": "nan"}, "--level nan is neither a number nor learned"),
])
def test_flags_that_nothing_reads_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        check(Config(**flags))
    check(Config(level="-1.5"))
    check(Config(ties="rao-kupper", tie_threshold=1.5))


# -- levels that are learned

def test_levels_go_to_the_optimum_of_what_they_are_learned_from():
    """Scores stand still: u is where as many are good as bad, c that of an independent fit."""
    rows = [Row([], ["a", "b"], [0, 0], verdict=verdict)
            for verdict in ["both_good"] * 3 + ["both_bad"]]
    rows += [Row([], ["a", "b"], ranks) for ranks in [[0, 1]] * 3 + [[0, 0]] * 2]
    config = Config(ties="rao-kupper")
    levels = Levels(config, {}, "cpu", [Group(row, []) for row in rows])
    targets = targets_of(rows, config).times(1, len(rows))
    scores = torch.zeros(2 * len(rows))
    scores[1::2] = torch.tensor([0.0] * 4 + [-0.5] * 5)
    for _ in range(3000):
        loss, _ = feedback_loss(scores, targets, *levels.values(), config)
        levels.add(loss)
        levels.step(runtime.Alone("cpu", None), 1.0)
    cut, level = levels.numbers()
    # All verdicts are on replies of score 0, of which three in four are good.
    assert level == pytest.approx(-math.log(3), abs=1e-4)
    best = min(np.linspace(0.01, 3, 30000), key=lambda c: 3 * math.log1p(math.exp(c - 0.5)) - 2 * (
        math.log(math.expm1(2 * c)) - math.log1p(math.exp(c - 0.5)) - math.log1p(math.exp(c + 0.5))))
    assert cut == pytest.approx(best, abs=1e-3)
    assert levels.described(0.5) == {"tie_threshold": pytest.approx(math.exp(cut)),
                                     "level": pytest.approx(level - 0.5)}
    again = Levels(config, json.loads(json.dumps(levels.state)), "cpu", [Group(row, []) for row in rows])
    assert torch.equal(again.learned, levels.learned)


def test_levels_that_are_given_stay_and_those_that_nobody_needs_are_not_learned():
    given = Levels(Config(ties="rao-kupper", tie_threshold=1.5, level="-0.25"), {}, "cpu", [])
    assert given.values() == (math.log(1.5), -0.25) and not given.learned.requires_grad
    none = Levels(Config(), {}, "cpu", [])
    assert none.numbers() == (0, 0) and none.described(0) == {} and not none.learned.requires_grad


# -- whole runs

FEEDBACK = [
    {"completions": ["It is good.", "No.", "It is sad, and so it is."], "ranks": [0, 1, 1], "margin": 0.3},
    {"completions": ["It is good.", "No.", "It is sad."], "ranks": [0, 0, 0]},
    {"completions": ["No.", "It is good."], "scale": {"value": 2, "points": 5}, "margin": 0.2},
    {"completions": ["No.", "It is sad."], "verdict": "both_bad"},
    {"completions": ["It is good.", "It is good, and so it is."], "verdict": "both_good"},
    {"chosen": "It is good.", "rejected": "No.", "probability": 0.8},
    {"completion": "It is good.", "rating": 4}, {"completion": "No.", "rating": 1},
    {"completion": "It is sad.", "rating": 2.5},
]
EVERYTHING = ("--ties rao-kupper --ratings regress --scale margin --scale-margin 2 --lm-coef 0.5 "
              "--center-coef 0.1")


@pytest.fixture(scope="module")
def feedback(tmp_path_factory):
    """A file with rows of all kinds, each about a prompt of its own but for two ratings."""
    rows = [{"prompt": f"Say {'please ' * (i % 3)}{min(i, 7)}."} | row for i, row in enumerate(FEEDBACK)]
    return write_rows(tmp_path_factory.mktemp("feedback") / "rows.json", rows)


def slowly(network, language_model, rows, tokenizer, config, standard, nu, level):
    """The loss of rows, every reply alone, by the formulas at the top of reward.py."""
    total = 0.0
    for row in rows:
        examples = [(torch.tensor(ids), torch.tensor(mask)) for ids, mask in encode_group(tokenizer, row)]
        r = [network(ids[None])[0, -1] for ids, _ in examples]
        terms = []
        if row.verdict:
            for score in r:
                d = score - level if row.verdict == "both_good" else level - score
                terms.append((1 + torch.exp(-d)).log())
        elif row.ratings and config.ratings == "regress":
            for score, known in zip(r, row.ratings):
                terms.append((score - (known["rating"] - standard[0]) / standard[1]) ** 2)
        else:
            for i, j in itertools.combinations(range(len(r)), 2):
                p, q = r[i].exp(), r[j].exp()
                if row.ranks[i] == row.ranks[j]:
                    if config.ties == "rao-kupper":
                        tie = (nu**2 - 1) * p * q / ((p + nu * q) * (nu * p + q))
                        terms.append(-tie.log())
                    elif config.ties == "soft":
                        terms.append(-0.5 * (p / (p + q)).log() - 0.5 * (q / (p + q)).log())
                        terms[-1] = terms[-1] + config.center_coef * (r[i] + r[j]) ** 2
                    continue
                w, l = (i, j) if row.ranks[i] < row.ranks[j] else (j, i)
                margin, right = row.margin, row.probability
                if row.strength is not None and config.scale == "margin":
                    margin, right = margin + config.scale_margin * row.strength, 1.0
                bar = nu * math.exp(margin) if config.ties == "rao-kupper" else math.exp(margin)
                win, lose = r[w].exp(), r[l].exp()
                term = -right * (win / (win + bar * lose)).log()
                term = term - (1 - right) * (lose / (lose + bar * win)).log()
                terms.append(term + config.center_coef * (r[i] + r[j]) ** 2)
            if config.lm_coef:
                best = [i for i, rank in enumerate(row.ranks) if rank == min(row.ranks)]
                means = [reply_logprob(language_model, *examples[i]) / examples[i][1].sum() for i in best]
                total = total - config.lm_coef * sum(means) / len(means) / len(rows)
        total = total + sum(terms) / len(terms) / len(rows)
    return total


@pytest.mark.parametrize("flags", [
    "--ties soft", EVERYTHING, f"{EVERYTHING} --tie-threshold 1.5 --level 0.3"])
def test_a_step_on_feedback_of_all_kinds_follows_the_formulas_taken_one_reply_at_a_time(
        flags, feedback, small, tmp_path, monkeypatch):
    """Loss and gradient of the second step; a batch is all rows, in several pieces."""
    networks, steps, levels = [], [], []
    original, values = runtime.Run.optimizer_step, Levels.values

    def adamw(network, *args):
        networks.append(network)
        return steps_file.adamw(network, *args)

    def optimizer_step(self, *args):
        gradient = {key: copy.deepcopy(p.grad) for key, p in networks[0].named_parameters()}
        steps.append((copy.deepcopy(networks[0].state_dict()), gradient, levels[-1]))
        return original(self, *args)

    def recorded(self):
        if torch.is_grad_enabled():
            levels.append(self.numbers())
        return values(self)

    monkeypatch.setattr(reward, "adamw", adamw)
    monkeypatch.setattr(runtime.Run, "optimizer_step", optimizer_step)
    monkeypatch.setattr(Levels, "values", recorded)
    run_here("reward", f"{ALL_AT_ONCE} --model {small}/sft --data {feedback} --out {tmp_path}/run {flags}",
             "--micro-batch-tokens 60 --lr 0.01 --steps 2")
    config = runtime.Run.current.config
    (weights, gradient, (cut, level)), network = steps[1], networks[0].eval()
    assert len(steps) == 2
    network.load_state_dict(weights)
    language_model, tokenizer = load_model(small / "sft", model.GPT)
    language_model.transformer = network.transformer
    rows = read_rows(feedback, "feedback", SILENT)
    if "regress" not in flags:
        rows = [row for row in rows if len(row.replies) > 1]
    numbers = [4, 1, 2.5]
    standard = (np.mean(numbers), np.std(numbers))
    loss = slowly(network, language_model, rows, tokenizer, config, standard, math.exp(cut), level)
    loss.backward()
    row = rows_of(tmp_path / "run")[1]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert ("lm_loss" in row) == ("--lm-coef" in flags) and 0 <= row["accuracy"] <= 1
    for key, p in network.named_parameters():
        torch.testing.assert_close(gradient[key], p.grad, rtol=1e-3, atol=1e-5)


def test_micro_batches_change_no_loss_by_more_than_a_millionth(feedback, small, tmp_path):
    found = []
    for budget in (60, 10_000):
        run_here("reward", f"{ALL_AT_ONCE} --model {small}/sft --data {feedback} {EVERYTHING}",
                 f"--out {tmp_path}/{budget} --micro-batch-tokens {budget} --lr 0.01 --steps 1")
        found.append(rows_of(tmp_path / str(budget))[0])
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], abs=1e-6)
    assert found[0]["lm_loss"] == pytest.approx(found[1]["lm_loss"], abs=1e-6)


def test_two_ranks_learn_from_feedback_as_one_does(feedback, small, tmp_path):
    words = (f"--model {small}/sft --data {feedback} --val-data {feedback} {EVERYTHING} --threads 1 "
             "--warmup 1 --batch-tokens 200 --steps 3 --lr 0.01")
    two = command("reward", words, f"--out {tmp_path}/two --micro-batch-tokens 60", launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    run_here("reward", words, f"--out {tmp_path}/one")
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert {k: v for k, v in other.items() if "accuracy" not in k} == pytest.approx(
            {k: v for k, v in one.items() if "accuracy" not in k}, rel=1e-3, abs=1e-5)
    ends = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    for name in ("tie_threshold", "level", "tie_gap", "rating_correlation"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=1e-3, abs=1e-5)


def test_a_run_with_learned_levels_is_resumed_bit_for_bit(feedback, small, tmp_path):
    words = (f"--model {small}/sft --data {feedback} --val-data {feedback} {EVERYTHING} --threads 1 "
             f"--batch-tokens 200 --save-every 1 --steps 4 --warmup 1")
    run_here("reward", words, f"--out {tmp_path}/whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part", symlinks=True)
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step_000004")
    run_here("reward", words, f"--out {tmp_path}/part --resume")
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    assert tools.same(tmp_path / "part", tmp_path / "whole")
    state = json.loads((tools.latest(tmp_path / "part") / "state.json").read_text())
    assert state["extra"]["levels"][1] != 0


@pytest.mark.parametrize("ties", ["soft", "rao-kupper"])
def test_a_file_of_ties_alone_drives_differences_of_scores_to_zero(ties, small, tmp_path):
    rows = [{"prompt": f"Say {word}.", "completions": ["It is good.", "No."], "ranks": [0, 0]}
            for word in tools.WORDS]
    path = write_rows(tmp_path / "ties.json", rows)
    words = (f"{ALL_AT_ONCE} --model {small}/sft --data {path} --val-data {path} --ties {ties} "
             "--eval-every 100")
    gaps = []
    for steps, lr in ((1, 1e-9), (40, 0.01)):
        run_here("reward", words, f"--out {tmp_path}/{steps} --steps {steps} --lr {lr}")
        found = json.loads((tmp_path / str(steps) / "evaluation.json").read_text())
        assert "accuracy" not in found
        gaps.append(found["tie_gap"])
    assert gaps[1] < 0.03 < 0.1 < gaps[0]
    # The run is judged by its loss: there is no pair to be right about.
    assert rows_of(tmp_path / "40")[-1]["val_loss"] < rows_of(tmp_path / "40")[0]["val_loss"]


def test_the_language_model_term_keeps_the_best_replies_likely(small, tmp_path):
    likelihoods = []
    rows = read_rows(f"{small}/rankings.json", "preferences", SILENT)
    for coefficient in (0, 1):
        run_here("reward", f"{ALL_AT_ONCE} --model {small}/sft --data {small}/rankings.json --lr 0.01",
                 f"--out {tmp_path}/{coefficient} --steps 20 --lm-coef {coefficient}")
        scorer, tokenizer = load_model(tmp_path / str(coefficient), model.ScalarModel)
        examples = [encode_group(tokenizer, row)[row.ranks.index(0)] for row in rows]
        ids, mask, lengths = collate(examples, tokenizer.pad, "cpu")
        with torch.no_grad():
            _, means = model.last_scores_and_logprobs(scorer, ids, lengths, mask, torch.arange(len(ids)))
        likelihoods.append(means.mean().item())
    assert likelihoods[1] > likelihoods[0] + 0.5


def test_ratings_that_are_learned_are_found_again(small, tmp_path):
    rows = [{"prompt": f"Say {word}.", "completion": reply, "rating": rating}
            for word in tools.WORDS for reply, rating in (("It is good.", 5), ("No.", 1), ("It is sad.", 2))]
    path = write_rows(tmp_path / "rated.json", rows)
    run_here("reward", f"{ALL_AT_ONCE} --model {small}/sft --data {path} --val-data {path} --ratings regress",
             f"--steps 60 --lr 0.003 --warmup 10 --out {tmp_path}/run")
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["rating_correlation"] > 0.9 and found["accuracy"] == 1


def test_centring_holds_the_scores_of_a_family_whose_zero_cannot_be_moved(tmp_path):
    """Llama's last norm is an RMSNorm: no bias could hold the zero."""
    base = tiny_of(model.GPT, "llama3")
    save_model(tmp_path / "base", base, TOKENIZER, None)
    rows = [{"prompt": f"Say {i}.", "chosen": "Good.", "rejected": "Bad, bad."} for i in range(6)]
    path = write_rows(tmp_path / "rows.json", rows)
    sizes = []
    for coefficient in (0, 1):
        run_here("reward", f"{ALL_AT_ONCE} --model {tmp_path}/base --data {path} --center-coef {coefficient}",
                 f"--steps 25 --lr 0.01 --out {tmp_path}/{coefficient}")
        scorer, tokenizer = load_model(tmp_path / str(coefficient), model.ScalarModel)
        groups = [encode_group(tokenizer, row) for row in read_rows(path, "preferences", SILENT)]
        with torch.no_grad():
            scores = [[scorer(torch.tensor([ids]))[0, -1].item() for ids, _ in group] for group in groups]
        sizes.append(np.mean([abs(sum(own)) for own in scores]))
    assert sizes[1] < 0.2 and sizes[1] < sizes[0]


@pytest.mark.parametrize("row, said", [
    ({"completions": ["a", "b"], "scale": {"value": 8, "points": 7}},
     ":2: value 8 is not on a scale from 1 to 7"),
    ({"completions": ["a", "b"], "scale": 3}, ":2: the scale is not "),
    ({"completions": ["a", "b"], "verdict": "bad"}, ":2: the verdict is neither both_bad nor both_good"),
    ({"completion": "a", "ratings": {"honest": "5"}}, ":2: a rating is not a finite number"),
])
def test_a_bad_row_ends_in_one_line_with_its_place(row, said, small, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi", "chosen": "a", "rejected": "b"},
                                                {"prompt": "Hi"} | row])
    assert tools.exit_code("reward", f"--model {small}/sft --data {path} --out {tmp_path}/run") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and said in errors[0] and not (tmp_path / "run").exists()


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
