"""Losses and estimators against closed forms, enumeration and slow loops. B replies, T tokens, P pairs."""
import math
import resource

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import ranked_pairs, ranking_accuracy
from formats.rows import Row
from dpo import preference_loss
from plumbing.steps import scheduled_lr
from ppo import adapt_kl_coef, gae, missing_eos_scores, kl_estimate, kl_loss, normalise_scores, policy_loss, shaped_rewards
from ppo import steps_mask, value_loss, whiten
from reward import ranking_loss, ranking_metrics

torch.set_default_dtype(torch.float32)


def responses(*spans, T=9):
    """A (B, T) mask with one run of True per (start, end)."""
    return torch.tensor([[start <= t < end for t in range(T)] for start, end in spans])


MASK = responses((2, 6), (1, 9), (4, 5), (3, 3))  # four tokens, up to the edge, one token, none


# -- reward model and DPO

def test_ranking_loss_equals_all_pairs_forwarded_apart_in_value_and_gradient():
    torch.manual_seed(0)
    trunk = torch.nn.Linear(5, 1)
    rows = [Row([], ["a"] * 4, [2, 0, 1, 0]), Row([], ["a"] * 2, [0, 1], margin=0.7), Row([], ["a"] * 3, [0, 1, 2])]
    features = torch.randn(9, 5)
    better, worse, weight, margin = ranked_pairs(rows)
    loss, _ = ranking_loss(trunk(features).squeeze(1), better, worse, weight / len(rows), margin)
    loss.backward()
    got = trunk.weight.grad.clone()
    trunk.weight.grad = None
    slow, start = 0.0, 0
    for row in rows:  # every pair with two forwards of its own
        pairs = [(i, j) for i in range(len(row.ranks)) for j in range(len(row.ranks)) if row.ranks[i] < row.ranks[j]]
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


def test_held_out_accuracy_bayes_accuracy_and_calibration_are_counted_right():
    rows = [Row([], ["aa", "b"], [0, 1], gold=[1, -1]), Row([], ["cc", "d"], [0, 1], gold=[-1, 1]), Row([], ["e", "f"], [0, 1], gold=[1, 1])]
    result = ranking_metrics(torch.tensor([2.0, 0.0, 3.0, 0.0, 1.0, 1.0]).numpy(), rows)
    assert result["accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert result["bayes_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert sum(b["pairs"] for b in result["calibration"]) == 3
    top = result["calibration"][-1]
    assert top["predicted"] == pytest.approx(1 / (1 + math.exp(-3))) and top["observed"] == 1
    swapped = [Row([], r.replies, [1, 0]) for r in rows]
    assert ranking_metrics(torch.tensor([2.0, 0.0, 3.0, 0.0, 1.0, 1.0]).numpy(), swapped)["accuracy"] == pytest.approx(0.5 / 3)


def test_the_interval_of_an_accuracy_is_over_prompts_and_does_not_collapse():
    """Wilson's for 34 of 34 is 0.8985 to 1 (by hand: 1 / (1 + 1.96^2 / 34)); the same prompt again and again is one trial."""
    prompts = [[{"role": "user", "content": str(i)}] for i in range(34)]
    rows = [Row(prompt, ["a", "b"], [0, 1]) for prompt in prompts]
    scores = torch.tensor([1.0, 0.0] * 34).numpy()
    assert ranking_accuracy(scores, rows) == pytest.approx((1, 34 / (34 + 1.96**2), 1))
    assert ranking_accuracy(-scores, rows) == pytest.approx((0, 0, 1.96**2 / (34 + 1.96**2)))
    again = [row for row in rows for _ in range(5)]
    assert ranking_accuracy(torch.tensor([1.0, 0.0] * 170).numpy(), again)[1:] == pytest.approx((34 / (34 + 1.96**2), 1))
    one = [Row(prompts[0], ["a", "b"], [0, 1])] * 34
    assert ranking_accuracy(scores, one)[1] == pytest.approx(1 / (1 + 1.96**2))
    half = torch.tensor([1.0, 0.0] * 17 + [0.0, 1.0] * 17).numpy()
    accuracy, low, high = ranking_accuracy(half, rows)  # 17 of 34 by Wilson, but for 33 in place of 34
    assert (accuracy, low) == pytest.approx((0.5, 1 - high)) and high - 0.5 == pytest.approx(0.5 * 1.96 / math.sqrt(33 + 1.96**2), rel=1e-6)


def test_one_long_prompt_costs_an_accuracy_no_memory():
    """As an array of text, these prompts would take 2 GB."""
    rows = [Row([{"role": "user", "content": "x" * (100_000 if i == 0 else 10) + str(i)}], ["a", "b"], [0, 1]) for i in range(5000)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ranking_accuracy(np.arange(10_000.0), rows)[0] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("prompts, right, k", [(34, 0.97, 2), (40, 0.85, 4), (100, 0.6, 2)])
def test_the_interval_of_an_accuracy_holds_the_truth_in_19_of_20_cases(prompts, right, k):
    """Prompts differ in how hard they are, and have one to three rows each; the pairs of a row hang together."""
    rng = np.random.default_rng(0)
    hit = 0
    for _ in range(400):
        rows, values = [], []
        for i in range(prompts):
            hard = rng.beta(4 * right, 4 * (1 - right))
            for _ in range(rng.integers(1, 4)):
                rows.append(Row([{"role": "user", "content": str(i)}], [str(j) for j in range(k)], list(range(k))))
                values += list(-np.arange(k)) if rng.random() < hard else list(np.arange(k))
        accuracy, low, high = ranking_accuracy(np.array(values, float), rows)
        hit += low <= right <= high
        assert low <= accuracy <= high
    assert hit / 400 > 0.92


def test_length_alone_takes_the_longer_or_the_shorter_reply_whichever_is_more_often_right():
    for replies in (["aa", "b"], ["a", "bb"]):
        rows = [Row([], replies, [0, 1]), Row([], replies, [0, 1]), Row([], replies, [1, 0])]
        assert ranking_metrics(torch.arange(6.0).numpy(), rows)["length_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind, at_start", [("dpo", math.log(2)), ("ipo", 25.0), ("hinge", 1.0)])
def test_dpo_losses_start_at_their_known_values(kind, at_start):
    pair = ranked_pairs([Row([], ["a", "b"], [0, 1])])[:3]
    loss, metrics = preference_loss(torch.zeros(2), *pair, beta=0.1, kind=kind)
    assert loss.item() == pytest.approx(at_start, rel=1e-6)
    assert metrics["accuracy"].item() == 0.5 and metrics["margin"].item() == 0


@pytest.mark.parametrize("call", [
    lambda: preference_loss(torch.zeros(2), *ranked_pairs([Row([], ["a", "b"], [0, 1])])[:3], beta=0.1, kind="new"),
    lambda: kl_estimate(torch.zeros(2), torch.zeros(2), "new"),
    lambda: policy_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool(), 0.2, 2, kind="new"),
    lambda: kl_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2).bool(), "new", 2),
    lambda: whiten(torch.randn(2, 3), torch.ones(2, 3).bool(), variance="new"),
    lambda: normalise_scores(torch.zeros(2), [2, 0.0, 1.0], "new", 0.0),
    lambda: missing_eos_scores(torch.zeros(2), torch.ones(2).bool(), "new", 1.0, torch.zeros(())),
    lambda: steps_mask(torch.ones(1, 2).bool(), "new"),
    lambda: scheduled_lr(5, 10, 1, 1.0, "new")])
def test_a_choice_that_has_no_branch_is_an_error_and_nothing_else_instead(call):
    with pytest.raises((ValueError, KeyError), match="new"):
        call()


def test_dpo_gradient_is_that_of_the_paper():
    beta = 0.3  # equation 7's gradient: -beta * sigma(r_l - r_w) on w, the opposite on l
    for log_ratios, label in ((torch.zeros(2), 0.5), (torch.tensor([1.5, -0.5]), None)):
        log_ratios = log_ratios.clone().requires_grad_()
        preference_loss(log_ratios, *ranked_pairs([Row([], ["a", "b"], [0, 1])])[:3], beta)[0].backward()
        share = torch.sigmoid(beta * (log_ratios[1] - log_ratios[0])).item()
        assert label is None or share == label
        assert log_ratios.grad.tolist() == pytest.approx([-beta * share, beta * share], rel=1e-5)


def test_dpo_losses_equal_their_formulas_and_label_smoothing_is_the_expected_loss():
    torch.manual_seed(1)
    chosen, rejected, beta = torch.randn(6) * 4, torch.randn(6) * 4, 0.2
    better, worse, weight = torch.arange(6), torch.arange(6) + 6, torch.full((6,), 1 / 6)
    both = torch.cat([chosen, rejected])

    def loss(kind, ratios=both, e=0.0):
        return preference_loss(ratios, better, worse, weight, beta, kind, e)[0].item()

    h = [beta * (c - r) for c, r in zip(chosen.tolist(), rejected.tolist())]
    assert loss("dpo") == pytest.approx(sum(math.log(1 + math.exp(-x)) for x in h) / 6, rel=1e-5)
    assert loss("ipo") == pytest.approx(sum((x / beta - 1 / (2 * beta)) ** 2 for x in h) / 6, rel=1e-5)
    assert loss("hinge") == pytest.approx(sum(max(0, 1 - x) for x in h) / 6, rel=1e-5)
    swapped = loss("dpo", torch.cat([rejected, chosen]))
    assert loss("dpo", e=0.2) == pytest.approx(0.8 * loss("dpo") + 0.2 * swapped, rel=1e-5)


# -- KL estimators

LOGITS = torch.tensor([[1.0, 0.2, -0.7, 0.4, -1.5, 0.9], [0.1, 0.8, 0.3, -0.4, 0.5, -0.2]], dtype=torch.float64)


def kl(p, q):
    return (p.exp() * (p - q)).sum()


def test_kl_estimators_have_their_known_expectations_by_enumeration():
    log_pi, log_ref = LOGITS.log_softmax(-1)
    expected = {kind: (log_pi.exp() * kl_estimate(log_pi, log_ref, kind)).sum() for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(expected["k1"], kl(log_pi, log_ref))
    torch.testing.assert_close(expected["k3"], kl(log_pi, log_ref))
    assert abs(expected["k2"] - kl(log_pi, log_ref)) > 0.01  # biased
    assert (kl_estimate(log_pi, log_ref, "k3") >= 0).all()


def test_policy_gradient_of_each_estimator_in_the_reward_by_enumeration():
    """E[grad log pi(a) * estimate(a)]: k1 gives grad KL(pi, ref); k3 gives grad KL(pi, ref) - grad KL(ref, pi)."""
    logits = LOGITS[0].clone().requires_grad_()
    log_ref = LOGITS[1].log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    log_pi = logits.log_softmax(-1)
    forward, backward = gradient(kl(log_pi, log_ref)), gradient(kl(log_ref, log_pi))
    score_function = {kind: gradient((log_pi.detach().exp() * log_pi * kl_estimate(log_pi, log_ref, kind).detach()).sum()) for kind in ("k1", "k2", "k3")}
    torch.testing.assert_close(score_function["k1"], forward)
    torch.testing.assert_close(score_function["k3"], forward - backward)
    assert (score_function["k2"] - forward).abs().max() > 1e-3


def test_kl_controller_moves_by_a_fifth_of_the_share_at_most_and_settles_on_the_target():
    assert adapt_kl_coef(0.1, kl=12, target=6, replies=500, horizon=10000) == pytest.approx(0.1 * (1 + 0.2 * 500 / 10000))
    assert adapt_kl_coef(0.1, kl=0, target=6, replies=500, horizon=10000) == pytest.approx(0.1 * (1 - 0.2 * 500 / 10000))
    for start in (0.001, 10.0):  # a world where the KL falls as beta grows
        coef = start
        for _ in range(3000):
            coef = adapt_kl_coef(coef, kl=1 / coef, target=6, replies=500, horizon=10000)
        assert 1 / coef == pytest.approx(6, rel=0.05)


# -- rewards and advantages

@pytest.mark.case(31)
def test_the_score_lands_on_the_last_response_token_and_only_there():
    kl_per_token = torch.rand(4, 9)
    rewards = shaped_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), kl_per_token, MASK, kl_coef=0.5)
    expected = torch.zeros(4, 9)
    for b, (start, end) in enumerate(((2, 6), (1, 9), (4, 5), (3, 3))):
        for t in range(start, end):
            expected[b, t] = -0.5 * kl_per_token[b, t] + (b + 1 if t == end - 1 else 0)
    torch.testing.assert_close(rewards, expected)


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
                expected[b, t] += (gamma * lam) ** (s - t) * (rewards[b, s].item() + gamma * following - values[b, s].item())
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(returns, torch.where(MASK, expected + values, torch.zeros(())), rtol=1e-4, atol=1e-5)


def test_gae_with_lambda_1_is_return_minus_value_and_with_0_the_temporal_difference():
    torch.manual_seed(3)
    rewards, values, mask = torch.randn(1, 4), torch.randn(1, 4), torch.ones(1, 4, dtype=torch.bool)
    monte_carlo = torch.tensor([[sum(0.9 ** (s - t) * rewards[0, s].item() for s in range(t, 4)) for t in range(4)]])
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


# -- PPO's losses

def slow_losses(logprobs, old, advantages, values, old_values, returns, clip, value_clip):
    """Policy loss, value loss, clip fraction and k3 KL of PPO, one token at a time."""
    pg = vf = clipped = approx = count = 0.0
    for b in range(MASK.shape[0]):
        for t in range(MASK.shape[1]):
            if MASK[b, t]:
                ratio = math.exp(logprobs[b, t] - old[b, t])
                pg -= min(ratio * advantages[b, t].item(), min(max(ratio, 1 - clip), 1 + clip) * advantages[b, t].item())
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


@pytest.mark.parametrize("advantage, log_ratio, flows", [(1, 0.5, False), (1, -0.5, True), (-1, -0.5, False), (-1, 0.5, True)])
def test_clipping_stops_the_gradient_only_where_the_step_has_gone_far_enough(advantage, log_ratio, flows):
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[float(advantage)]]), one, 0.2, 1)[0].backward()
    assert (logprobs.grad.item() != 0) == flows


def test_pieces_of_a_minibatch_add_up_to_the_whole():
    torch.manual_seed(7)
    logprobs, old, advantages, values, old_values, returns = torch.randn(6, 4, 9)
    tokens = MASK.sum()
    whole = policy_loss(logprobs, old, advantages, MASK, 0.2, tokens)[0] + value_loss(values, old_values, returns, MASK, 0.2, tokens)[0]
    pieces = 0.0
    for rows in ([0, 2], [1], [3]):
        pieces = pieces + policy_loss(logprobs[rows], old[rows], advantages[rows], MASK[rows], 0.2, tokens)[0]
        pieces = pieces + value_loss(values[rows], old_values[rows], returns[rows], MASK[rows], 0.2, tokens)[0]
    torch.testing.assert_close(whole, pieces)


def test_logsigmoid_and_gap_agree_with_the_bradley_terry_probability():
    scores = torch.tensor([0.9, -0.3])
    loss, metrics = ranking_loss(scores, *ranked_pairs([Row([], ["a", "b"], [0, 1])]))
    assert math.exp(-loss.item()) == pytest.approx(torch.softmax(scores, 0)[0].item(), rel=1e-5)
    assert metrics["gap"].item() == pytest.approx(1.2) and F.logsigmoid(metrics["gap"]).item() == pytest.approx(-loss.item())
