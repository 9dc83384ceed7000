"""dpo.py: its losses against closed forms and slow ones, its KL against float64, what a run makes of rows."""
import dataclasses
import itertools
import json
import math
import shutil

import pytest
import torch

import dpo
import head as head_file
from bench.optimum import write_reference
from data import collate, encode_group
from dpo import LOSSES, NO_REFERENCE, WITH_SFT, Pairs, Replies, forward, pairs_of, preference_loss, token_kl
from examples import TOKENIZER, VOCAB, user
from formats.model_folder import load_model
from formats.rows import Row
from formats.sources import read_rows, split_by_prompt
from model import GPT
from plumbing.flags import UserError, parse_flags
from small_models import tiny_of
from test_head import LargestTensor
from tools import TORCHRUN, command, metrics, reply_logprob, rows_of, run_here, write_rows

PAIR = Row([], ["a", "b"], [0, 1])
# Pairs, graded and with a margin, and rankings, with ties among the best and below.
ROWS = [
    PAIR,
    Row([], ["a", "b"], [1, 0], margin=0.7),
    Row([], ["a", "b", "c", "d"], [2, 0, 1, 1], margin=0.3),
    Row([], ["a", "b", "c"], [0, 0, 4], margin=-0.2),
    Row([], ["a", "b"], [0, 1], probability=0.8),
]
EVERY = pytest.mark.parametrize("kind", LOSSES)


def config_of(kind="dpo", **changes):
    """A Config with numbers that can be told apart, as far as --loss takes them."""
    numbers = {"beta": 0.7}
    if kind == "robust":
        numbers["label_smoothing"] = 0.2
    return dpo.Config(loss=kind, **numbers | changes)


def random_replies(number, seed=0, size=3.0):
    """Replies (number,) in float64; every field is a leaf that has a gradient, but for the lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(number, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, 30, (number,), generator=generator).double()
    logprobs = -lengths * (0.1 + draw().abs())
    leaves = [logprobs, lengths, logprobs + size * draw(), draw().abs()]
    return Replies(*(leaf.requires_grad_(leaf is not lengths) for leaf in leaves))


def for_loss(replies, kind):
    """The replies as a run has them: without a reference where the loss has none."""
    if kind in NO_REFERENCE:
        return replies._replace(ref_logprobs=None)
    return replies


# -- losses

def slow_pair(kind, w, l, m, config):
    """The loss of a pair of (logprob, length, ref_logprob, kl), numbers, by the paper's own formula."""
    beta = config.beta

    def log_sigma(x):
        return -math.log1p(math.exp(-x))

    def reward(y):
        return beta * math.log(math.exp(y[0] - y[2]))

    def mean(y):
        return y[0] / y[1]

    if kind == "dpo":
        return -log_sigma(reward(w) - reward(l) - m)
    if kind == "robust":
        e, plain = config.label_smoothing, dpo.Config(beta=beta)
        right, wrong = slow_pair("dpo", w, l, m, plain), slow_pair("dpo", l, w, m, plain)
        return ((1 - e) * right - e * wrong) / (1 - 2 * e)
    if kind == "ipo":
        return ((reward(w) - reward(l)) / beta - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return max(0.0, 1 - (reward(w) - reward(l) - m))
    if kind == "dpop":
        penalty = max(0.0, w[2] - w[0])
        return -log_sigma(beta * (w[0] - w[2] - (l[0] - l[2]) - config.dpop_lambda * penalty) - m)
    if kind in ("tdpo1", "tdpo2"):
        alpha = config.tdpo_alpha if kind == "tdpo2" else 1.0
        delta = beta * l[3] - beta * w[3]
        return -log_sigma(reward(w) - reward(l) - alpha * delta - m)
    if kind == "simpo":
        return -log_sigma(beta * mean(w) - beta * mean(l) - m)
    if kind == "orpo":
        odds = [math.exp(mean(y)) / (1 - math.exp(mean(y))) for y in (w, l)]
        return -beta * log_sigma(math.log(odds[0] / odds[1]))
    return beta * max(0.0, mean(l) - mean(w))


def slow_loss(kind, replies, rows, config):
    """The loss of all rows, a pair at a time: each row weighs the same, a wrong label swaps the pair."""
    total, start = 0.0, 0
    for row in rows:
        own = [[column[start + i].item() for column in replies] for i in range(len(row.ranks))]
        terms = []
        for i, j in itertools.permutations(range(len(own)), 2):
            m = config.gamma + (row.margin if config.margins else 0)
            # Of tied replies each order is half a pair, and together they are one.
            if row.ranks[i] == row.ranks[j] and config.ties and i < j:
                terms.append((slow_pair(kind, own[i], own[j], m, config)
                              + slow_pair(kind, own[j], own[i], m, config)) / 2)
            if row.ranks[i] < row.ranks[j]:
                wrong = 1 - row.probability
                if kind != "robust":
                    e = config.label_smoothing
                    wrong = wrong * (1 - e) + (1 - wrong) * e
                terms.append((1 - wrong) * slow_pair(kind, own[i], own[j], m, config)
                             + wrong * slow_pair(kind, own[j], own[i], m, config))
        best = [y for y, rank in zip(own, row.ranks) if rank == min(row.ranks)]
        coef = 1.0 if kind in WITH_SFT else config.sft_coef
        total += sum(terms) / len(terms) - coef * sum(y[0] / y[1] for y in best) / len(best)
        start += len(own)
    return total


SETTINGS = [
    {},
    {"ties": True},
    {"label_smoothing": 0.1, "ties": True},
    {"sft_coef": 0.4, "gamma": 0.6, "margins": True, "ties": True, "beta": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@EVERY
def test_every_loss_and_its_gradient_are_those_of_a_slow_one(kind, settings):
    """Gradients by differences of the slow loss, in all log-probabilities and KLs at once."""
    config = config_of(kind, **settings, dpop_lambda=2.0, tdpo_alpha=0.6)
    replies = random_replies(13)
    loss, _ = preference_loss(for_loss(replies, kind), pairs_of(ROWS, config), config)
    assert loss.item() == pytest.approx(slow_loss(kind, replies, ROWS, config), rel=1e-6)
    loss.backward()
    at = [leaf.detach() for leaf in replies]
    for field in (0, 3):
        found = replies[field].grad if replies[field].grad is not None else torch.zeros(13)
        for i in range(13):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [column.clone() for column in at]
                moved[field][i] += step
                ends.append(slow_loss(kind, Replies(*moved), ROWS, config))
            slope = (ends[0] - ends[1]) / 2e-6
            if kind == "tdpo2" and field == 3:
                continue
            assert found[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


LOG2 = math.log(2)
E, B = 0.2, 0.7  # label smoothing of robust, beta of `config_of`


@pytest.mark.parametrize("kind, settings, value, slope", [
    ("dpo", {}, LOG2, B / 2),
    ("dpo", {"label_smoothing": 0.1}, LOG2, 0.8 * B / 2),
    ("robust", {}, LOG2, B / 2 / (1 - 2 * E)),
    ("ipo", {}, 1 / (2 * B) ** 2, 1 / B),
    ("ipo", {"beta": 0.1}, 25.0, 10.0),
    ("hinge", {}, 1.0, B),
    ("dpop", {}, LOG2, B / 2),
    ("tdpo1", {}, LOG2, B / 2),
    ("tdpo2", {}, LOG2, B / 2),
    ("simpo", {"gamma": 1.5}, math.log(1 + math.exp(1.5)), B / (1 + math.exp(-1.5)) / 4),
])
def test_losses_start_at_their_known_values_and_slopes(kind, settings, value, slope):
    """Policy and reference are the same, replies of 4 tokens at equal log-probability."""
    config = config_of(kind, **settings)
    logprobs = torch.full((2,), -3.0, requires_grad=True)
    replies = Replies(logprobs, torch.full((2,), 4.0), logprobs.detach().clone(), torch.zeros(2))
    loss, found = preference_loss(for_loss(replies, kind), pairs_of([PAIR], config), config)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert found["accuracy"].item() == 0.5 and found["margin"].item() == 0
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-slope, slope], rel=1e-5)


def test_orpo_and_rrhf_start_with_their_sft_term():
    """At equal log-probability per token: NLL + beta log 2, and NLL (Hong et al. 2024, eq. 6 and 7)."""
    replies = Replies(torch.tensor([-3.0, -6.0]), torch.tensor([4.0, 8.0]))
    for kind, value in (("orpo", 0.75 + B * LOG2), ("rrhf", 0.75)):
        config = config_of(kind)
        loss, found = preference_loss(replies, pairs_of([PAIR], config), config)
        assert loss.item() == pytest.approx(value, rel=1e-6)
        assert found["sft_loss"].item() == 0.75


def test_dpo_gradient_is_that_of_the_paper():
    """-beta sigma(r_l - r_w) on w, the opposite on l (below equation 7)."""
    logprobs = torch.tensor([1.5, -0.5], requires_grad=True)
    config = config_of()
    replies = Replies(logprobs, torch.ones(2), torch.zeros(2))
    preference_loss(replies, pairs_of([PAIR], config), config)[0].backward()
    share = torch.sigmoid(torch.tensor(B * -2.0)).item()
    assert logprobs.grad.tolist() == pytest.approx([-B * share, B * share], rel=1e-5)


@pytest.mark.parametrize("kind, settings", [("dpop", {"dpop_lambda": 0.0}), ("tdpo2", {"tdpo_alpha": 0.0})])
def test_without_their_term_dpop_and_tdpo2_are_dpo(kind, settings):
    gradients = []
    for config in (config_of(kind, **settings), config_of()):
        replies = random_replies(13)
        loss, _ = preference_loss(replies, pairs_of(ROWS, config), config)
        gradients.append((loss.item(), *torch.autograd.grad(loss, replies.logprobs)[0].tolist()))
    assert gradients[0] == gradients[1]


def test_no_gradient_of_tdpo2_goes_through_the_kl_of_the_chosen_reply():
    for kind, alpha in (("tdpo1", 1.0), ("tdpo2", 0.5)):
        replies, config = random_replies(2), config_of(kind)
        loss, _ = preference_loss(replies, pairs_of([PAIR], config), config)
        loss.backward()
        # h grows by beta with a nat of log-probability, and falls by alpha beta with one of the rejected KL.
        chosen, rejected = replies.kl.grad.tolist()
        assert rejected == pytest.approx(-alpha * replies.logprobs.grad[0].item(), rel=1e-6)
        assert chosen == (pytest.approx(-rejected) if kind == "tdpo1" else 0)


def test_robust_dpo_is_dpo_of_clean_labels_in_expectation_and_cdpo_is_not():
    clean, replies = config_of(), random_replies(2)
    turned = dataclasses.replace(PAIR, ranks=[1, 0])

    def loss(config, row):
        return preference_loss(replies, pairs_of([row], config), config)[0].item()

    for kind, same in (("robust", True), ("dpo", False)):
        config = config_of(kind, label_smoothing=E)
        found = (1 - E) * loss(config, PAIR) + E * loss(config, turned)
        assert (found == pytest.approx(loss(clean, PAIR), rel=1e-6)) == same


@EVERY
def test_a_probability_is_that_of_rows_one_way_and_the_other(kind):
    """Of ten rows eight one way and two the other are as many with probability 0.8."""
    config, replies = config_of(kind), for_loss(random_replies(2), kind)
    graded, sure, turned = (
        preference_loss(replies, pairs_of([row], config), config)
        for row in (ROWS[4], PAIR, dataclasses.replace(PAIR, ranks=[1, 0])))
    # The SFT term goes by the rank alone.
    terms = [loss - found.get("sft_loss", 0) for loss, found in (graded, sure, turned)]
    assert terms[0].item() == pytest.approx((0.8 * terms[1] + 0.2 * terms[2]).item(), rel=1e-6)
    if kind == "dpo":
        smooth = dpo.Config(beta=B, label_smoothing=0.2)
        other, _ = preference_loss(replies, pairs_of([PAIR], smooth), smooth)
        assert other.item() == pytest.approx(graded[0].item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "simpo", "orpo", "tdpo1"])
def test_a_tie_asks_for_equal_rewards(kind):
    """The slope is 0 there, and on either side leads back (or nowhere: the hinge)."""
    config = config_of(kind, ties=True)
    tied = Row([], ["a", "b"], [0, 0])
    for gap, sign in ((0.0, 0), (2.0, 1), (-2.0, -1)):
        logprobs = torch.tensor([-5.0 + gap, -5.0], requires_grad=True)
        replies = Replies(logprobs, torch.full((2,), 4.0), torch.full((2,), -5.0), torch.zeros(2))
        pairs = pairs_of([tied], config)._replace(best_weight=torch.zeros(2))
        preference_loss(for_loss(replies, kind), pairs, config)[0].backward()
        slopes = logprobs.grad.tolist()
        if kind == "hinge" or gap == 0:
            assert slopes == pytest.approx([0, 0], abs=1e-6) or abs(gap) * B > 1
        else:
            assert slopes[0] * sign > 0 and slopes[1] * sign < 0


def test_rrhf_is_the_sft_term_alone_where_the_order_is_right_and_wrong_pairs_pay_their_gaps():
    rows, config = [Row([], list("abcd"), [0, 1, 2, 3])], config_of("rrhf", beta=1.0)
    lengths = torch.tensor([2.0, 4.0, 1.0, 8.0])
    for means, of_pairs in (([-1.0, -1.5, -2.0, -4.0], 0.0),
                            # d is better than b and c: gaps of 0.25 and 1 among six pairs
                            ([-1.0, -1.5, -2.25, -1.25], 1.25 / 6)):
        logprobs = (torch.tensor(means) * lengths).requires_grad_()
        loss, _ = preference_loss(Replies(logprobs, lengths), pairs_of(rows, config), config)
        assert loss.item() == pytest.approx(of_pairs + 1.0, rel=1e-6)
        loss.backward()
        if not of_pairs:
            assert logprobs.grad.tolist() == [-0.5, 0, 0, 0]


def test_pairs_of_rankings_ties_and_margins():
    rows = [Row([], list("abc"), [1, 0, 1], margin=0.5), dataclasses.replace(PAIR, probability=0.25)]
    found = pairs_of(rows, dpo.Config())
    assert found.better.tolist() == [1, 1, 3] and found.worse.tolist() == [0, 2, 4]
    assert found.weight.tolist() == [0.5, 0.5, 1] and found.right.tolist() == [1, 1, 0.25]
    assert found.wrong.tolist() == [0, 0, 0.75] and found.margin.tolist() == [0, 0, 0]
    assert found.best.tolist() == [1, 3] and found.best_weight.tolist() == [1, 1]
    found = pairs_of(rows, dpo.Config(ties=True, margins=True, gamma=2.0, label_smoothing=0.25))
    assert list(zip(found.better.tolist(), found.worse.tolist())) == [(1, 0), (1, 2), (0, 2), (3, 4)]
    assert found.weight.tolist() == pytest.approx([1 / 3] * 3 + [1])
    assert found.margin.tolist() == [2.5, 2.5, 2.5, 2.0]
    assert found.right.tolist() == pytest.approx([0.75, 0.75, 0.5, 0.375])
    both = pairs_of([Row([], list("abc"), [0, 0, 1])], dpo.Config())
    assert both.best.tolist() == [0, 1] and both.best_weight.tolist() == [0.5, 0.5]
    assert both.times(3, 2).weight.tolist() == [0.75, 0.75]
    assert both.times(3, 2).best_weight.tolist() == [0.75, 0.75]


# -- edges

@EVERY
def test_losses_and_gradients_are_finite_at_the_edges(kind):
    """Replies of no token, of one and of 500, near certain, hardly possible, and ratios that overflow exp."""
    logprobs = torch.tensor([0.0, -1e-7, -0.0, -1e4, -20.0, -5e4], requires_grad=True)
    lengths = torch.tensor([0.0, 1.0, 1.0, 500.0, 500.0, 1.0])
    ref_logprobs = torch.tensor([0.0, -300.0, 0.0, -20.0, -1e4, -0.5])
    kl = torch.tensor([0.0, 300.0, 0.0, 1e4, 0.1, 0.0], requires_grad=True)
    replies = for_loss(Replies(logprobs, lengths, ref_logprobs, kl), kind)
    rows = [dataclasses.replace(PAIR, ranks=ranks) for ranks in ([0, 1], [1, 0], [0, 1])]
    for some in (rows, rows[:1]):
        config = config_of(kind, label_smoothing=0.1, ties=True)
        part = replies.at(torch.arange(2 * len(some)))
        loss, found = preference_loss(part, pairs_of(some, config), config)
        logprobs.grad = kl.grad = None
        loss.backward()
        assert loss.isfinite() and logprobs.grad.isfinite().all()
        assert all(value.isfinite() for value in found.values())
        assert kl.grad is None or kl.grad.isfinite().all()


def test_a_very_wrong_pair_keeps_its_gradient():
    logprobs = torch.tensor([-400.0, 400.0], requires_grad=True)
    config = config_of()
    replies = Replies(logprobs, torch.ones(2), torch.zeros(2))
    loss, _ = preference_loss(replies, pairs_of([PAIR], config), config)
    loss.backward()
    assert loss.item() == pytest.approx(800 * B) and logprobs.grad.tolist() == pytest.approx([-B, B])


def test_the_log_odds_of_a_near_certain_reply_are_those_of_float64():
    for mean in (-2e-6, -1e-4, -0.1, math.log(0.5), -3.0, -20.0, -90.0):
        exact = mean - math.log(-math.expm1(mean))
        assert dpo.log_odds(torch.tensor(mean)).item() == pytest.approx(exact, rel=1e-5)
    certain = torch.tensor([0.0, -1e-7], requires_grad=True)
    dpo.log_odds(certain).sum().backward()
    assert dpo.log_odds(certain)[0].item() == pytest.approx(math.log(1e6), abs=0.1)
    assert certain.grad.isfinite().all()


# -- SPIN

def test_where_the_policy_is_the_data_spin_has_loss_log_2_and_no_expected_gradient():
    """Over all pairs of a demonstration and an own sample, by their chances (Chen et al. 2024)."""
    K, config = 5, config_of()
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(K, generator=generator, dtype=torch.float64).log_softmax(0)
    for policy, stays in ((truth, True), (truth.flip(0), False)):
        logits = policy.clone().requires_grad_()
        chosen, sampled = torch.cartesian_prod(torch.arange(K), torch.arange(K)).T
        weight = (truth[chosen] + policy[sampled]).exp()
        pairs = Pairs(chosen, sampled, weight, 0.0, 1.0, 0.0, None, None)
        replies = Replies(logits.log_softmax(0), torch.ones(K), policy)
        loss, _ = preference_loss(replies, pairs, config)
        loss.backward()
        assert loss.item() == pytest.approx(LOG2, rel=1e-9)
        assert (logits.grad.abs().max() < 1e-12) == stays
        # Else it leads from the policy towards the data.
        expected = -B / 2 * (truth.exp() - policy.exp())
        torch.testing.assert_close(logits.grad, expected, atol=1e-12, rtol=1e-9)


def test_labelled_demonstrations_and_samples_are_spins_pairs(tmp_path):
    rows = [{"prompt": "Say so.", "completion": "So.", "label": True},
            {"prompt": "Say no.", "completion": "No.", "label": True},
            {"prompt": "Say no.", "completion": "Not.", "label": False},
            {"prompt": "Say so.", "completion": "Oh.", "label": False}]
    found = read_rows(write_rows(tmp_path / "spin.jsonl", rows), "preferences", str)
    assert [(row.prompt, row.replies, row.ranks) for row in found] == [
        (user("Say so."), ["So.", "Oh."], [0, 1]), (user("Say no."), ["No.", "Not."], [0, 1])]


# -- the KL of whole distributions

def kl_inputs(N, vocabulary=VOCAB, size=0.4):
    """States (N, 16) and head of a policy, those of a wider reference (N, 24)."""
    generator = torch.Generator().manual_seed(N)
    shapes = (N, 16), (vocabulary, 16), (N, 24), (vocabulary, 24)
    states, weight, ref_states, ref_weight = (torch.randn(shape, generator=generator) for shape in shapes)
    return states, size * weight, ref_states, size * ref_weight


def in_float64(inputs, factors):
    """KL (N,), and the gradients in states and head of its sum times factors (N,)."""
    states, weight, ref_states, ref_weight = (t.double() for t in inputs)
    leaves = states.requires_grad_(), weight.requires_grad_()
    log_p = (states @ weight.T).log_softmax(-1)
    log_ref = (ref_states @ ref_weight.T).log_softmax(-1)
    kl = (log_ref.exp() * (log_ref - log_p)).sum(-1)
    return kl.detach(), torch.autograd.grad((factors * kl).sum(), leaves)


@pytest.mark.parametrize("at_once", [1 << 26, 10 * VOCAB, 1], ids=["one chunk", "chunks", "rows"])
@pytest.mark.parametrize("N", [1, 100])
def test_the_kl_of_whole_distributions_and_its_gradient_are_those_of_float64(N, at_once, monkeypatch):
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    inputs, factors = kl_inputs(N), torch.linspace(-1, 2, N)
    leaves = [t.clone().requires_grad_() for t in inputs[:2]]
    with LargestTensor() as largest:
        kl = token_kl(*leaves, *inputs[2:])
        (factors * kl).sum().backward()
    expected, gradients = in_float64(inputs, factors)
    torch.testing.assert_close(kl, expected.float(), atol=1e-5, rtol=1e-5)
    for leaf, gradient in zip(leaves, gradients):
        torch.testing.assert_close(leaf.grad, gradient.float(), atol=1e-5, rtol=1e-4)
    if at_once == 10 * VOCAB:
        # Never all logits, forward or backward: those of five rows at most, or the heads themselves.
        assert largest.numel <= max(5 * VOCAB, inputs[3].numel())


def test_the_kl_is_finite_for_confident_logits_and_of_the_tokens_that_both_have():
    """Logits of 100 and more either way, and a head that is filled up with rows of no token."""
    states, ref_states = torch.tensor([[1.0]]), torch.tensor([[-1.0]])
    weight = torch.tensor([[100.0], [-100.0], [-1e4], [0.0]])
    for part in (weight, weight[:2]):
        leaf = part.clone().requires_grad_()
        kl = token_kl(states, leaf, ref_states, part)
        kl.sum().backward()
        exact, (_, gradient) = in_float64((states, part, ref_states, part), torch.ones(1))
        assert kl.item() == pytest.approx(exact.item(), rel=1e-6) and kl.item() > 150
        torch.testing.assert_close(leaf.grad, gradient.float(), atol=1e-4, rtol=1e-5)
    wide = token_kl(states, weight, ref_states, weight[:2])
    torch.testing.assert_close(wide, token_kl(states, weight[:2], ref_states, weight[:2]))


def test_in_bf16_the_products_of_the_kl_are_rounded_and_nothing_else():
    inputs = kl_inputs(50)
    exact, _ = in_float64(inputs, torch.ones(50))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_kl(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), atol=0.05, rtol=0.02)


@torch.no_grad()
def replies_alone(policy, reference, examples):
    """`Replies` of examples in float64, each by itself and from the whole softmax."""
    policy, reference = policy.double(), reference.double()
    columns = []
    for ids, mask in examples:
        reply = torch.tensor(ids), torch.tensor(mask)
        log_p, log_ref = (model.logits(model.transformer(reply[0][None]))[0].log_softmax(-1)
                          for model in (policy, reference))
        kl = (log_ref.exp() * (log_ref - log_p)).sum(-1)
        tokens = reply[1].nonzero().flatten()
        columns.append((reply_logprob(policy, *reply), len(tokens), reply_logprob(reference, *reply),
                        kl[tokens - 1].sum()))
    return Replies(*(torch.tensor([float(x) for x in column]) for column in zip(*columns)))


@EVERY
def test_neither_padding_nor_passes_nor_a_slow_forward_change_a_loss_by_more_than_1e_6(kind):
    """All rows in one pass, row by row with other padding, and each reply by itself in float64."""
    rows = [Row(user("Hi"), ["Ho.", "It is so, and it is good."], [1, 0], margin=0.2),
            Row(user("Say no, will you?"), ["No.", "Yes", "It is sad."], [0, 1, 1]),
            Row(user("And?"), ["No, no, no, no.", "I"], [0, 1], probability=0.7)]
    policy, reference = (tiny_of(name="gpt2", seed=seed).eval() for seed in (0, 1))
    config = config_of(kind, ties=True)

    def loss_of(some):
        examples = [example for row in some for example in encode_group(TOKENIZER, row)]
        ids, mask, _ = collate(examples, TOKENIZER.pad, "cpu")
        logprobs, kl = forward(policy, reference, ids, mask, config)
        with torch.no_grad():
            ref_logprobs = reference(ids, mask)[0].sum(1)
        replies = for_loss(Replies(logprobs, mask.sum(1).float(), ref_logprobs, kl), kind)
        return preference_loss(replies, pairs_of(some, config).times(1, len(rows)), config)[0]

    whole = loss_of(rows)
    apart = sum(loss_of([row]) for row in rows)
    size = max(1, whole.item())
    assert abs(whole - apart).item() < 1e-6 * size
    assert (kind not in dpo.WITH_KL) or forward(policy, reference, *batch_of(rows), config)[1].min() > 0.01
    examples = [example for row in rows for example in encode_group(TOKENIZER, row)]
    slow = for_loss(replies_alone(policy, reference, examples), kind)
    expected, _ = preference_loss(slow, pairs_of(rows, config).times(1, len(rows)), config)
    assert abs(whole - expected).item() < 2e-6 * size


def batch_of(rows):
    """ids and mask (B, T) of all replies of some rows."""
    examples = [example for row in rows for example in encode_group(TOKENIZER, row)]
    ids, mask, _ = collate(examples, TOKENIZER.pad, "cpu")
    return ids, mask


# -- whole runs

def test_dpo_uses_margins_with_its_flag_alone_and_the_reward_model_always(small, tmp_path, capsys):
    rows = [{"prompt": f"Cube {i}.", "chosen": "Yes.", "rejected": "No.", "margin": 0.5 * (i % 2)}
            for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    inputs = f"--model {small}/sft --data {tmp_path}/rows.json"
    words = f"{inputs} --val-fraction 0 --steps 1 --batch-tokens 500 --threads 1"
    starts = {}
    for name, flags, said in (("dpo", "", True), ("dpo", "--margins", False), ("reward", "", False)):
        run_here(name, words, flags, f"--out {tmp_path}/run --overwrite")
        starts[flags] = rows_of(tmp_path / "run")[0]["loss"]
        warned = "warning: 4 rows have a margin, which counts for nothing without --margins"
        assert (warned in capsys.readouterr().out) == said
    # Half of the rows have a margin of a half.
    assert starts["--margins"] == pytest.approx((LOG2 + math.log(1 + math.exp(0.5))) / 2, rel=1e-5)


def test_dpo_refers_to_the_model_that_it_starts_from_or_to_that_of_reference(small, tmp_path):
    """At step 0 the loss is log 2 without --reference, with it what both models' ratios give."""
    words = (
        f"--model {small}/sft --data {small}/rankings.json --val-fraction 0.5 --steps 1 --batch-tokens 500 "
        "--max-new-tokens 8 --threads 1 --beta 0.7")
    starts = {}
    for name, flags in (("itself", ""), ("other", f"--reference {small}/other"),
                        ("same", f"--reference {small}/sft"), ("adapted", "--lora-rank 2"),
                        ("adapted other", f"--lora-rank 2 --reference {small}/other")):
        run_here("dpo", words, flags, f"--out {tmp_path}/run --overwrite")
        starts[name] = rows_of(tmp_path / "run")[0]
    for name in ("itself", "same", "adapted"):
        assert starts[name]["val_loss"] == pytest.approx(math.log(2), abs=1e-5)

    policy, tokenizer = load_model(small / "sft", GPT)
    reference, _ = load_model(small / "other", GPT)
    _, held_out = split_by_prompt(read_rows(f"{small}/rankings.json", "preferences", str), 0.5)
    loss = 0.0
    for row in held_out:
        ratios = []
        for ids, mask in encode_group(tokenizer, row):
            reply = torch.tensor(ids), torch.tensor(mask)
            with torch.no_grad():
                ratios.append(reply_logprob(policy, *reply) - reply_logprob(reference, *reply))
        replies = Replies(torch.stack(ratios), torch.ones(len(ratios)), torch.zeros(len(ratios)))
        config = dpo.Config(beta=0.7)
        loss += preference_loss(replies, pairs_of([row], config), config)[0].item() / len(held_out)
    assert abs(loss - math.log(2)) > 0.01
    for name in ("other", "adapted other"):
        assert starts[name]["val_loss"] == pytest.approx(loss, abs=1e-4)


def test_dpo_refuses_a_reference_with_another_tokenizer_and_notices_that_it_has_changed(small, tmp_path):
    words = (
        f"--model {small}/sft --data {small}/rankings.json --val-fraction 0 --steps 1 --batch-tokens 500 "
        f"--threads 1 --out {tmp_path}/run")
    write_reference(tmp_path / "foreign", 2)
    with pytest.raises(UserError, match="foreign has another tokenizer than --model"):
        run_here("dpo", words, f"--reference {tmp_path}/foreign")
    shutil.copytree(small / "sft", tmp_path / "reference")
    run_here("dpo", words, f"--reference {tmp_path}/reference")
    shutil.copy(small / "other" / "model.safetensors", tmp_path / "reference" / "model.safetensors")
    with pytest.raises(UserError, match="what --reference names has changed"):
        run_here("dpo", words, f"--reference {tmp_path}/reference --resume")


RUN = ("--model {root}/sft --data {root}/rankings.json --val-data {root}/rankings.json --batch-tokens 600 "
       "--max-new-tokens 4 --threads 1 --lr 0.002 --warmup 1")


@pytest.mark.parametrize("preset", [name for name in dpo.Config.PRESETS])
def test_every_preset_trains_however_a_step_is_cut(preset, small, tmp_path, capsys):
    """Micro-batches change nothing, the loss falls, and a reference is computed where there is one."""
    words = RUN.format(root=small)
    if preset == "dpop":
        # Where policy and reference are the same, rounding decides on which side of its kink a reply is.
        words += f" --reference {small}/other"
    for budget in (60, 5000):
        run_here("dpo", words, f"--preset {preset} --ties --steps 3 --out {tmp_path}/{budget}",
                 f"--micro-batch-tokens {budget}")
    said = capsys.readouterr().out
    for few, many in zip(metrics(tmp_path / "60"), metrics(tmp_path / "5000"), strict=True):
        for row in (few, many):
            for key in [key for key in row if "accuracy" in key]:
                del row[key]
        assert few == pytest.approx(many, rel=1e-3, abs=1e-5)
    config = parse_flags(dpo.Config, "", ["--preset", preset])
    assert ("computing the reference's" in said) == (config.loss not in NO_REFERENCE)
    losses = [row["val_loss"] for row in rows_of(tmp_path / "60") if "val_loss" in row]
    assert losses[-1] < losses[0]
    assert ("sft_loss" in rows_of(tmp_path / "60")[1]) == (preset in ("rpo", "orpo", "rrhf"))


def test_a_preset_is_nothing_but_its_flags():
    for name, changes in dpo.Config.PRESETS.items():
        found = parse_flags(dpo.Config, "", ["--preset", name, "--seed", "3"])
        assert found == dpo.Config(preset=name, seed=3, **changes)
        said = []
        dpo.check(found, said.append)
        assert all(f"--{key.replace('_', '-')} {value}" in said[0] for key, value in changes.items())
    assert parse_flags(dpo.Config, "", ["--preset", "simpo", "--beta", "9"]).beta == 9


@pytest.mark.parametrize("flags", ["--preset tdpo2 --sft-coef 0.3 --margins", "--preset rrhf"])
def test_two_ranks_take_the_steps_of_one(flags, small, tmp_path):
    words = f"{RUN.format(root=small)} {flags} --ties --steps 2"
    two = command("dpo", words, f"--out {tmp_path}/two --micro-batch-tokens 60", launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    run_here("dpo", words, f"--out {tmp_path}/one")
    # Of the first step alone: the same weights, so what differs is the order of sums.
    one, other = (rows_of(tmp_path / name)[1] for name in ("one", "two"))
    for key in ("loss", "sft_loss", "margin", "chosen_logprob", "rejected_logprob"):
        assert other[key] == pytest.approx(one[key], rel=1e-6, abs=1e-6)


def test_the_kl_of_tdpo_has_a_live_reference_with_adapters_too_and_resumes_bit_for_bit(small, tmp_path):
    words = f"{RUN.format(root=small)} --preset tdpo1 --lora-rank 2 --save-every 1 --steps 3"
    run_here("dpo", words, f"--out {tmp_path}/whole")
    rows = metrics(tmp_path / "whole")
    assert rows[0]["val_loss"] == pytest.approx(LOG2, abs=1e-5)
    last = tmp_path / "whole" / "checkpoints" / "step_000003"
    shutil.copytree(tmp_path / "whole", tmp_path / "part", symlinks=True)
    shutil.rmtree(tmp_path / "part" / "checkpoints" / last.name)
    run_here("dpo", words, f"--out {tmp_path}/part --resume")
    assert metrics(tmp_path / "part") == rows


def test_probabilities_are_read_with_pairs_and_refused_elsewhere(tmp_path):
    pair = {"prompt": "Hi", "chosen": "Ho.", "rejected": "No.", "probability": 0.75}
    path = write_rows(tmp_path / "rows.jsonl", [pair])
    assert [row.probability for row in read_rows(path, "preferences", str)] == [0.75]
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected,probability\nHi,Ho.,No.,0.5\nHi,Ho.,Na.,\n")
    assert [row.probability for row in read_rows(tmp_path / "rows.csv", "preferences", str)] == [0.5, 1.0]
    three = {"prompt": "Hi", "completions": ["a", "b", "c"], "ranks": [0, 1, 2], "probability": 0.5}
    for row, said in (({**pair, "probability": 1.5}, "the probability is not a number between 0 and 1"),
                      ({**pair, "probability": "high"}, "the probability is not a number between 0 and 1"),
                      (three, "a probability is that of a pair, and there are more than two replies")):
        with pytest.raises(UserError, match=said):
            read_rows(write_rows(tmp_path / "bad.jsonl", [row]), "preferences", str)


def test_a_scale_is_the_probability_that_the_first_is_better(tmp_path):
    pair = {"prompt": "Hi", "chosen": "Ho.", "rejected": "No."}
    rows = [pair | {"scale": {"value": value, "points": 7}} for value in (7, 4, 2.5)]
    read = read_rows(write_rows(tmp_path / "rows.jsonl", rows), "preferences", str)
    assert [(row.ranks, row.probability) for row in read] == [([0, 1], 1), ([0, 1], 0.5), ([0, 1], 0.25)]
