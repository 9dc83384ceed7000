"""ppo.py's estimators, losses and controllers, each against a closed form, an enumeration or a slow loop.

B replies, T tokens.
"""
import math
import threading

import numpy as np
import pytest
import torch

import dpo
from dpo import Replies, pairs_of, preference_loss
from formats.rows import Row
from plumbing.steps import scheduled_lr
from ppo import (
    adapt_kl_coef, adapt_penalty, explained_variance, gae, kl_estimate, kl_loss,
    missing_eos_scores, normalise_scores, policy_loss, shaped_rewards, steps_mask, update_moments,
    value_loss, variance, whiten)


def responses(*spans, T=9):
    """A (B, T) mask with one run of True per (start, end)."""
    return torch.tensor([[start <= t < end for t in range(T)] for start, end in spans])


SPANS = ((2, 6), (1, 9), (4, 5), (3, 3))  # four tokens, up to the edge, one token, none
MASK = responses(*SPANS)


def on_ranks(number, function):
    """[function(rank, all_sum) of each rank], on threads whose all_sum adds up their tensors."""
    barrier, given, results = threading.Barrier(number, timeout=20), [None] * number, [None] * number

    def work(rank):
        def all_sum(tensor):
            given[rank] = tensor
            barrier.wait()
            total = sum(given)
            barrier.wait()
            return total
        results[rank] = function(rank, all_sum)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(number)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    return results


# -- scores

@pytest.mark.parametrize("rule, cut_off", [
    ("floor", [-2.5, -2.5]),
    ("replace", [-0.5, -0.5]),
    ("subtract", [0.5, -2.5]),
])
def test_a_missing_end_token_is_judged_by_its_rule_and_replies_that_ended_keep_their_score(rule, cut_off):
    scores, ended = torch.tensor([3.0, 1.0, -1.0, -2.0]), torch.tensor([True, False, True, False])
    got = missing_eos_scores(scores, ended, rule, penalty=0.5, lowest=torch.tensor(-2.0))
    assert got.tolist() == [3.0, cut_off[0], -1.0, cut_off[1]]
    assert torch.equal(missing_eos_scores(scores, torch.ones(4, dtype=torch.bool), rule, 0.5, scores.min()),
                       scores)
    # Another rank's reply was worse.
    lower = missing_eos_scores(scores, ended, "floor", 0.0, torch.tensor(-7.0))
    assert lower.tolist() == [3.0, -7.0, -1.0, -7.0]


@pytest.mark.parametrize("sizes", [(60,), (1,) * 60, (1, 2, 57), (20, 20, 20), (59, 1)])
def test_running_moments_are_those_of_the_whole_stream_however_it_is_cut(sizes):
    stream = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 3 + 5
    moments, seen = [0, 0.0, 0.0], 0
    for part in stream.split(sizes):
        moments, seen = update_moments(moments, part), seen + len(part)
        so_far = stream[:seen].numpy().astype(np.float64)
        assert moments[0] == seen and moments[1] == pytest.approx(so_far.mean(), rel=1e-5)
        assert moments[2] == pytest.approx(((so_far - so_far.mean()) ** 2).sum(), rel=1e-5, abs=1e-9)
    assert moments[2] / (moments[0] - 1) == pytest.approx(stream.numpy().var(ddof=1), rel=1e-5)


def test_running_moments_of_two_ranks_are_those_of_both_their_scores():
    # (Rollouts, ranks, replies).
    scores = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)) + torch.tensor([[[0.0], [4.0]]])

    def stream(rank, all_sum):
        moments = [0, 0.0, 0.0]
        for rollout in scores:
            moments = update_moments(moments, rollout[rank], all_sum)
        return moments

    mine, other = on_ranks(2, stream)
    assert mine == other and mine[0] == 30 and mine[1] == pytest.approx(scores.mean().item(), rel=1e-5)
    assert mine[2] / 29 == pytest.approx(scores.numpy().var(ddof=1), rel=1e-5)


@pytest.mark.case(31)
def test_scores_are_scaled_or_standardised_by_the_moments_and_then_clipped():
    scores, moments = torch.tensor([-4.0, 2.0, 8.0]), [5, 2.0, 36.0]  # a deviation of 3
    expected = {
        ("none", 0): [-4, 2, 8],
        ("none", 5): [-4, 2, 5],
        ("scale", 0): [-4 / 3, 2 / 3, 8 / 3],
        ("scale", 1): [-1, 2 / 3, 1],
        ("standard", 0): [-2, 0, 2],
        ("standard", 1.5): [-1.5, 0, 1.5],
    }
    for (kind, clip), values in expected.items():
        assert normalise_scores(scores, moments, kind, clip).tolist() == pytest.approx(values), (kind, clip)
    assert normalise_scores(scores, [0, 0.0, 0.0], "none", 0) is scores
    # No deviation at all.
    assert normalise_scores(torch.zeros(3), [3, 0.0, 0.0], "scale", 0).tolist() == [0, 0, 0]


@pytest.mark.case(31)
def test_scores_that_are_all_equal_are_not_blown_up():
    scores = torch.ones(4)
    expected = pytest.approx([1.0] * 4)
    assert normalise_scores(scores, update_moments([0, 0.0, 0.0], scores), "scale", 0.0).tolist() == expected
    moments = update_moments([0, 0.0, 0.0], scores)
    assert normalise_scores(scores, moments, "standard", 0.0).tolist() == [0.0] * 4


@pytest.mark.case(31)
@pytest.mark.parametrize("value", [0.1, -0.3, 1e-7, 1234.567, 3e6])
@pytest.mark.parametrize("n", [1, 3, 96, 256, 1000])
def test_equal_scores_whose_mean_is_inexact_in_fp32_are_not_blown_up_either(value, n):
    """96 scores of 0.1 became 5,717,654: their fp32 mean is 0.1 and a little."""
    scores, moments = torch.full((n,), value), [0, 0.0, 0.0]
    for _ in range(3):
        moments = update_moments(moments, scores)
        assert normalise_scores(scores, moments, "scale", 0.0).tolist() == pytest.approx(scores.tolist())
        assert normalise_scores(scores, moments, "standard", 0.0).abs().max() <= 1e-6 * abs(value)
    spread = scores.clone()
    spread[0] += 1e-3 * value  # a deviation that is one
    if n > 1:
        moments = update_moments([0, 0.0, 0.0], spread)
        assert normalise_scores(spread, moments, "scale", 0.0).abs().max() > 100 * min(1, abs(value))


# -- where the score lands

@pytest.mark.case(31)
def test_the_score_lands_on_the_last_response_token_and_only_there():
    kl_per_token = torch.rand(4, 9)
    rewards = shaped_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), kl_per_token, MASK, kl_coef=0.5)
    expected = torch.zeros(4, 9)
    for b, (start, end) in enumerate(((2, 6), (1, 9), (4, 5), (3, 3))):
        for t in range(start, end):
            expected[b, t] = -0.5 * kl_per_token[b, t] + (b + 1 if t == end - 1 else 0)
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_parts_of_the_score_land_where_they_are_and_the_rest_on_the_last_token(kl_coef):
    """With parts or without them, a reply's rewards add up to its score less its KL."""
    torch.manual_seed(0)
    scores, kl = torch.tensor([1.0, -2.0, 0.5, 7.0]), torch.randn(MASK.shape)
    parts = torch.zeros(MASK.shape)
    parts[0, 3], parts[0, 5], parts[1, 1], parts[2, 4] = 0.7, -0.2, 0.4, 0.5
    rewards = shaped_rewards(scores, kl, MASK, kl_coef, parts)
    expected = torch.where(MASK, -kl_coef * kl, 0.0) + parts
    for row, (start, end) in enumerate(SPANS[:3]):
        expected[row, end - 1] += scores[row] - parts[row].sum()
    torch.testing.assert_close(rewards, expected)
    whole = shaped_rewards(scores, kl, MASK, kl_coef)
    torch.testing.assert_close(rewards.sum(1), whole.sum(1))
    # Where no parts are given, and where they are nothing, it is what it was.
    assert torch.equal(whole, shaped_rewards(scores, kl, MASK, kl_coef, torch.zeros(MASK.shape)))


def test_the_step_after_the_last_token_exists_for_all_but_the_longest_replies():
    assert steps_mask(MASK, "eos") is MASK
    assert torch.equal(steps_mask(MASK, "next"), responses((2, 7), (1, 9), (4, 6), (3, 3)))
    # Whatever their prompts.
    found = steps_mask(responses((5, 7), (0, 2), (4, 5)), "next")
    assert torch.equal(found, responses((5, 7), (0, 2), (4, 6)))


@pytest.mark.parametrize("lam", [0.95, 0.5, 0.0, 1.0])
def test_a_score_one_step_later_changes_advantages_by_the_known_amount(lam):
    """A_t grows by (1 - lam) lam^(T - t) (V_T+1 - score): nothing at lam 1.

    The longest reply takes the score at its last token.
    """
    torch.manual_seed(0)
    scores, kl, values = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.rand(4, 9), torch.randn(4, 9)
    kl = kl * MASK  # a token of the policy's own alone has a KL
    advantages = {}
    for at in ("eos", "next"):
        steps = steps_mask(MASK, at)
        rewards = shaped_rewards(scores, kl, steps, kl_coef=0.5)
        for b, (start, end) in enumerate(SPANS):
            last = end - 1 + (at == "next" and end - start < 8)
            for t in range(9):
                expected = -0.5 * kl[b, t].item() if start <= t < end else 0.0
                if end > start and t == last:
                    expected += scores[b].item()
                assert rewards[b, t].item() == pytest.approx(expected, abs=1e-6)
        advantages[at], returns = gae(rewards, values, steps, 1.0, lam)
        assert not advantages[at][~steps].any() and not returns[~steps].any()
        if at == "next":
            # What the value of the extra step is trained on.
            assert returns[0, 6] == scores[0] and returns[2, 5] == scores[2]
    for b, (start, end) in enumerate(SPANS):
        for t in range(start, end):
            later = 0.0
            if end - start < 8:
                later = (1 - lam) * lam ** (end - 1 - t) * (values[b, end] - scores[b]).item()
            assert (advantages["next"] - advantages["eos"])[b, t].item() == pytest.approx(later, abs=1e-5)


# -- KL estimators

LOGITS = torch.tensor(
    [[1.0, 0.2, -0.7, 0.4, -1.5, 0.9], [0.1, 0.8, 0.3, -0.4, 0.5, -0.2], [-0.6, 0.5, 1.1, 0.0, 0.7, -0.9]],
    dtype=torch.float64)


def kl_between(p, q):
    return (p.exp() * (p - q)).sum()


def test_kl_estimators_have_their_known_expectations_by_enumeration():
    log_pi, log_ref = LOGITS[:2].log_softmax(-1)
    expected = {
        kind: (log_pi.exp() * kl_estimate(log_pi, log_ref, kind)).sum()
        for kind in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(expected["k1"], kl_between(log_pi, log_ref))
    torch.testing.assert_close(expected["k3"], kl_between(log_pi, log_ref))
    assert abs(expected["k2"] - kl_between(log_pi, log_ref)) > 0.01  # biased
    assert (kl_estimate(log_pi, log_ref, "k3") >= 0).all()


def test_policy_gradient_of_each_estimator_in_the_reward_by_enumeration():
    """E[grad log pi(a) * estimate(a)]: k1 gives grad KL(pi, ref), k3 that minus grad KL(ref, pi)."""
    logits = LOGITS[0].clone().requires_grad_()
    log_ref = LOGITS[1].log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    log_pi = logits.log_softmax(-1)
    forward, backward = gradient(kl_between(log_pi, log_ref)), gradient(kl_between(log_ref, log_pi))
    score_function = {
        kind: gradient((log_pi.detach().exp() * log_pi * kl_estimate(log_pi, log_ref, kind).detach()).sum())
        for kind in ("k1", "k2", "k3")
    }
    torch.testing.assert_close(score_function["k1"], forward)
    torch.testing.assert_close(score_function["k3"], forward - backward)
    assert (score_function["k2"] - forward).abs().max() > 1e-3


def test_kl_controller_moves_by_a_fifth_of_the_share_at_most_and_settles_on_the_target():
    expected = pytest.approx(0.1 * (1 + 0.2 * 500 / 10000))
    assert adapt_kl_coef(0.1, kl=12, target=6, replies=500, horizon=10000) == expected
    expected = pytest.approx(0.1 * (1 - 0.2 * 500 / 10000))
    assert adapt_kl_coef(0.1, kl=0, target=6, replies=500, horizon=10000) == expected
    for start in (0.001, 10.0):  # a world where the KL falls as beta grows
        coef = start
        for _ in range(3000):
            coef = adapt_kl_coef(coef, kl=1 / coef, target=6, replies=500, horizon=10000)
        assert 1 / coef == pytest.approx(6, rel=0.05)


ONE = torch.ones(1, 1, dtype=torch.bool)


def expectation(drawn_from, value):
    """Sum over six actions of their probability times value(action): exact."""
    return sum(p * value(a) for a, p in enumerate(drawn_from.exp()))


@pytest.mark.parametrize("off_policy", [False, True])
def test_gradient_of_each_kl_estimator_in_the_loss_by_enumeration(off_policy):
    """k2 and k3 give grad KL(pi || ref) exactly, also for tokens of an older policy; k1 zero on average."""
    logits, log_ref = LOGITS[0].clone().requires_grad_(), LOGITS[1].log_softmax(-1)
    log_pi = logits.log_softmax(-1)
    log_old = LOGITS[2].log_softmax(-1) if off_policy else log_pi.detach()
    true, = torch.autograd.grad(kl_between(log_pi, log_ref), logits, retain_graph=True)

    def loss(kind):
        return expectation(
            log_old, lambda a: kl_loss(log_pi[a].view(1, 1), log_old[a].view(1, 1), log_ref[a].view(1, 1),
                                       ONE, kind, 1))

    for kind in ("k2", "k3"):
        torch.testing.assert_close(torch.autograd.grad(loss(kind), logits, retain_graph=True)[0], true)
    torch.testing.assert_close(loss("k3"), kl_between(log_pi, log_ref))
    k1, = torch.autograd.grad(loss("k1"), logits, retain_graph=True)
    if not off_policy:
        torch.testing.assert_close(k1, torch.zeros(6, dtype=torch.float64))
        torch.testing.assert_close(loss("k1"), kl_between(log_pi, log_ref))
    assert (k1 - true).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_loss_is_a_sum_over_reply_tokens_divided_by_the_count_given(kind):
    torch.manual_seed(3)
    logprobs, old, ref = torch.randn(3, 4, 9) * MASK
    weight = torch.ones(4, 9) if kind == "k1" else (logprobs - old).exp()
    expected = sum(
        (weight * kl_estimate(logprobs, ref, kind))[b, t].item() for b, t in MASK.nonzero().tolist()) / 20
    assert kl_loss(logprobs, old, ref, MASK, kind, 20).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_of_the_penalty_is_that_of_the_kl_from_the_old_policy_by_enumeration():
    logits, log_old = LOGITS[0].clone().requires_grad_(), LOGITS[1].log_softmax(-1)
    log_pi, zero = logits.log_softmax(-1), torch.zeros(1, 1, dtype=torch.float64)
    true, = torch.autograd.grad(0.7 * kl_between(log_old, log_pi), logits, retain_graph=True)
    loss = expectation(
        log_old, lambda a: policy_loss(log_pi[a].view(1, 1), log_old[a].view(1, 1), zero, ONE, 0.2, 1,
                                       "penalty", 0.0, 0.7)[0])
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], true)
    torch.testing.assert_close(loss, 0.7 * kl_between(log_old, log_pi.detach()), check_dtype=False)


# -- advantages

@pytest.mark.case(31)
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.97, 0.0), (0.97, 1.0)])
def test_gae_equals_the_double_sum_of_its_definition(gamma, lam):
    torch.manual_seed(2)
    rewards, values = torch.randn(4, 9) * 3, torch.randn(4, 9) * 3  # padding holds noise on purpose
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    expected = torch.zeros(4, 9)
    for b in range(4):
        inside = MASK[b].nonzero().flatten().tolist()
        for t in inside:
            for s in [s for s in inside if s >= t]:
                following = values[b, s + 1].item() if s + 1 in inside else 0.0
                error = rewards[b, s].item() + gamma * following - values[b, s].item()
                expected[b, t] += (gamma * lam) ** (s - t) * error
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)
    expected_returns = torch.where(MASK, expected + values, torch.zeros(()))
    torch.testing.assert_close(returns, expected_returns, rtol=1e-4, atol=1e-5)


def test_gae_with_lambda_1_is_return_minus_value_and_with_0_the_temporal_difference():
    torch.manual_seed(3)
    rewards, values, mask = torch.randn(1, 4), torch.randn(1, 4), torch.ones(1, 4, dtype=torch.bool)
    monte_carlo = torch.tensor(
        [[sum(0.9 ** (s - t) * rewards[0, s].item() for s in range(t, 4)) for t in range(4)]])
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 1.0)[0], monte_carlo - values)
    following = torch.cat([values[:, 1:], torch.zeros(1, 1)], 1)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * following - values)


@pytest.mark.case(31)
def test_whiten_uses_the_masked_tokens_alone_and_survives_the_edges():
    torch.manual_seed(4)
    x = torch.randn(4, 9) * 5 + 3
    inside = x[MASK]
    expected = torch.where(MASK, (x - inside.mean()) / inside.std(unbiased=False), torch.zeros(()))
    torch.testing.assert_close(whiten(x, MASK), expected, rtol=1e-4, atol=1e-5)
    noisy = torch.where(MASK, x, torch.tensor(float("nan")))  # what padding holds can't matter
    torch.testing.assert_close(whiten(noisy, MASK), expected, rtol=1e-4, atol=1e-5)
    for mask in (responses((2, 3)), responses((0, 0))):  # one token; none
        assert torch.equal(whiten(torch.full((1, 9), 7.0), mask), torch.zeros(1, 9))
    assert torch.equal(whiten(torch.full((1, 9), 7.0), responses((0, 9))), torch.zeros(1, 9))  # all equal


@pytest.mark.case(31)
@pytest.mark.parametrize("variance", ["population", "sample"])
def test_whitening_divides_by_the_variance_it_names_over_all_ranks(variance):
    torch.manual_seed(1)
    x = torch.randn(2, 4, 9) * 5 + 3  # rank, reply, token
    masks = torch.stack([MASK, responses((0, 3), (0, 0), (0, 0), (5, 6))])
    inside = x[masks].numpy().astype(np.float64)
    expected = (inside - inside.mean()) / inside.std(ddof=variance == "sample")
    got = torch.stack(on_ranks(2, lambda rank, all_sum: whiten(x[rank], masks[rank], all_sum, variance)))
    assert got[masks].tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    assert not got[~masks].any()
    for few in (responses((2, 3)), responses((0, 0))):  # one token, none: no variance to divide by
        assert not whiten(torch.full((1, 9), 7.0), few, variance=variance).any()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_variance_is_that_of_all_tokens_of_all_ranks(ranks):
    torch.manual_seed(3)
    x = torch.randn(ranks, 4, 9) * 5 + torch.arange(ranks)[:, None, None] * 4 + 3  # the ranks' means differ
    masks = torch.stack([
        MASK.roll(rank, 0) if rank != 1 else responses((0, 3), (0, 0), (0, 0), (5, 6))
        for rank in range(ranks)
    ])
    found = on_ranks(ranks, lambda rank, all_sum: variance(x[rank], masks[rank], all_sum).item())
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(torch.var(x[masks].double(), correction=0).item(), rel=1e-5)
    shuffled = torch.where(masks, x, 1e4 * torch.randn(x.shape))  # what padding holds doesn't count
    again = on_ranks(ranks, lambda rank, all_sum: variance(shuffled[rank], masks[rank], all_sum).item())
    assert again == pytest.approx(found)


@pytest.mark.case(31)
def test_variance_of_one_token_and_of_equal_ones_is_zero():
    for mask in (responses((2, 3)), responses((0, 9))):
        assert variance(torch.full((1, 9), 7.0), mask).item() == 0


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5])
def test_nothing_is_explained_of_returns_that_do_not_vary(value):
    returns = torch.where(MASK, value, 0.0)
    for values in (returns, torch.randn(4, 9) * MASK):
        assert explained_variance(values, returns, MASK).item() == 0
    returns = torch.randn(4, 9) * MASK
    half = returns[MASK].mean() + 0.5 * (returns - returns[MASK].mean())
    assert explained_variance(half, returns, MASK).item() == pytest.approx(0.75, abs=1e-5)
    assert explained_variance(returns, returns, MASK).item() == pytest.approx(1)


# -- losses

@pytest.mark.parametrize("call", [
    lambda: preference_loss(Replies(*torch.zeros(3, 2)),
                            pairs_of([Row([], ["a", "b"], [0, 1])], dpo.Config()), dpo.Config(loss="new")),
    lambda: kl_estimate(torch.zeros(2), torch.zeros(2), "new"),
    lambda: policy_loss(*torch.zeros(3, 1, 2), torch.ones(1, 2).bool(), 0.2, 2, kind="new"),
    lambda: kl_loss(*torch.zeros(3, 1, 2), torch.ones(1, 2).bool(), "new", 2),
    lambda: whiten(torch.randn(2, 3), torch.ones(2, 3).bool(), variance="new"),
    lambda: normalise_scores(torch.zeros(2), [2, 0.0, 1.0], "new", 0.0),
    lambda: missing_eos_scores(torch.zeros(2), torch.ones(2).bool(), "new", 1.0, torch.zeros(())),
    lambda: steps_mask(torch.ones(1, 2).bool(), "new"),
    lambda: scheduled_lr(5, 10, 1, 1.0, "new"),
])
def test_a_choice_that_has_no_branch_is_an_error_and_nothing_else_instead(call):
    with pytest.raises((ValueError, KeyError), match="new"):
        call()


def slow_losses(logprobs, old, advantages, values, old_values, returns, clip, value_clip):
    """Policy loss, value loss, clip fraction and k3 KL of PPO, one token at a time."""
    pg = vf = clipped = approx = count = 0.0
    for b in range(MASK.shape[0]):
        for t in range(MASK.shape[1]):
            if MASK[b, t]:
                ratio = math.exp(logprobs[b, t] - old[b, t])
                pg -= min(ratio * advantages[b, t].item(),
                          min(max(ratio, 1 - clip), 1 + clip) * advantages[b, t].item())
                v, v_old, r = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
                held = min(max(v, v_old - value_clip), v_old + value_clip)
                vf += 0.5 * max((v - r) ** 2, (held - r) ** 2)
                clipped += abs(ratio - 1) > clip
                approx += ratio - 1 - math.log(ratio)
                count += 1
    return pg / count, vf / count, clipped / count, approx / count


def test_ppo_losses_equal_a_loop_over_tokens_whatever_padding_holds():
    torch.manual_seed(5)
    logprobs, old, advantages, values, old_values, returns = torch.randn(6, 4, 9) * 0.5
    tokens = MASK.sum()
    expected = slow_losses(logprobs, old, advantages, values, old_values, returns, 0.2, 0.3)
    for padding in (0.0, 50.0, -1e4):
        fill = [torch.where(MASK, x, torch.tensor(padding)) for x in (logprobs, values)]
        pg, stats = policy_loss(fill[0], old, advantages, MASK, 0.2, tokens)
        vf, _ = value_loss(fill[1], old_values, returns, MASK, 0.3, tokens)
        got = (pg.item(), vf.item(), stats["clip_fraction"].item(), stats["approx_kl"].item())
        assert got == pytest.approx(expected, rel=1e-4)


def test_ppo_gradient_at_ratio_1_is_that_of_reinforce():
    torch.manual_seed(6)
    logprobs, advantages = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    loss, stats = policy_loss(logprobs, logprobs.detach(), advantages, MASK, 0.2, MASK.sum())
    loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages * MASK / MASK.sum())
    assert stats["clip_fraction"] == 0 and stats["approx_kl"] == 0
    assert loss.item() == pytest.approx(-(advantages * MASK).sum().item() / MASK.sum().item(), rel=1e-5)


@pytest.mark.parametrize("advantage, log_ratio, flows", [
    (1, 0.5, False),
    (1, -0.5, True),
    (-1, -0.5, False),
    (-1, 0.5, True),
])
def test_clipping_stops_the_gradient_only_where_the_step_has_gone_far_enough(advantage, log_ratio, flows):
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), one, 0.2, 1)[0].backward()
    assert (logprobs.grad.item() != 0) == flows


def test_pieces_of_a_minibatch_add_up_to_the_whole():
    torch.manual_seed(7)
    logprobs, old, advantages, values, old_values, returns = torch.randn(6, 4, 9)
    tokens = MASK.sum()
    whole = policy_loss(logprobs, old, advantages, MASK, 0.2, tokens)[0]
    whole = whole + value_loss(values, old_values, returns, MASK, 0.2, tokens)[0]
    pieces = 0.0
    for rows in ([0, 2], [1], [3]):
        pieces = pieces + policy_loss(logprobs[rows], old[rows], advantages[rows], MASK[rows], 0.2, tokens)[0]
        parts = (part[rows] for part in (values, old_values, returns, MASK))
        pieces = pieces + value_loss(*parts, 0.2, tokens)[0]
    torch.testing.assert_close(whole, pieces)


@pytest.mark.parametrize("kind, clip, dual_clip, penalty_coef", [
    ("clip", 0.2, 0.0, 9.0),
    ("clip", 0.2, 1.5, 9.0),
    ("clip", 0.5, 3.0, 9.0),
    ("penalty", 0.2, 0.0, 0.7),
    ("penalty", 0.1, 0.0, 0.0),
])
def test_policy_losses_equal_a_loop_over_tokens_whatever_padding_holds(kind, clip, dual_clip, penalty_coef):
    torch.manual_seed(2)
    logprobs, old, advantages = torch.randn(3, 4, 9)
    total = clipped = kl = bounded = 0
    for b, t in MASK.nonzero().tolist():
        ratio, A = math.exp(logprobs[b, t] - old[b, t]), advantages[b, t].item()
        loss = -ratio * A + penalty_coef * (ratio - 1 - math.log(ratio))
        if kind == "clip":
            loss = -min(ratio * A, min(max(ratio, 1 - clip), 1 + clip) * A)
            if dual_clip and A < 0:
                bounded += loss > -dual_clip * A
                loss = min(loss, -dual_clip * A)
        total, clipped, kl = total + loss, clipped + (abs(ratio - 1) > clip), kl + ratio - 1 - math.log(ratio)
    assert bool(bounded) == bool(dual_clip)
    for padding in (0.0, 50.0, -1e4):
        noisy = torch.where(MASK, logprobs, padding)
        loss, stats = policy_loss(noisy, old, advantages, MASK, clip, 13, kind, dual_clip, penalty_coef)
        expected = pytest.approx((total / 13, clipped / 13, kl / 13), rel=1e-4)
        assert (loss.item(), stats["clip_fraction"].item(), stats["approx_kl"].item()) == expected


@pytest.mark.parametrize("advantage, ratio, flows", [
    (-1, 4.0, False),
    (-1, 2.0, True),
    (1, 1.1, True),
    (1, 4.0, False),
])
def test_dual_clip_stops_the_gradient_of_a_bad_token_that_became_far_likelier(advantage, ratio, flows):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    advantages = torch.tensor([[float(advantage)]])
    policy_loss(logprobs, torch.zeros(1, 1), advantages, one, 0.2, 1, dual_clip=3.0)[0].backward()
    assert (logprobs.grad.item() != 0) == flows


@pytest.mark.parametrize("clip", [0.0, 0.3, 1e9])
def test_value_loss_equals_a_loop_and_clip_0_is_the_plain_squared_error(clip):
    torch.manual_seed(4)
    values, old, returns = torch.randn(3, 4, 9)
    total = outside = 0
    for b, t in MASK.nonzero().tolist():
        v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
        held = min(max(v, o - clip), o + clip) if clip else v
        total += 0.5 * max((v - r) ** 2, (held - r) ** 2)
        outside += clip > 0 and abs(v - o) > clip
    loss, stats = value_loss(values, old, returns, MASK, clip, 13)
    assert loss.item() == pytest.approx(total / 13, rel=1e-5)
    expected = {"value_clip_fraction": pytest.approx(outside / 13)} if clip else {}
    assert {name: value.item() for name, value in stats.items()} == expected


# -- control

def test_the_penalty_doubles_halves_or_stays():
    kls = {0.0: 0.5, 0.0666: 0.5, 0.0667: 1, 0.1: 1, 0.1499: 1, 0.1501: 2, 5.0: 2}
    assert {kl: adapt_penalty(3.0, kl, target=0.1) / 3 for kl in kls} == kls
