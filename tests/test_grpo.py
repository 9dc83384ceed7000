"""grpo.py's advantages, losses and averages: expectations by enumeration, slow loops, and edges."""
import itertools
import math

import pytest
import torch

import grpo
import ppo
import tools
from bench import estimators
from grpo import (
    Config, deal_groups, flat_groups, group_advantages, kl_loss, overlong_scores, policy_loss, token_weights)
from plumbing.flags import parse_flags

PS = (0.05, 0.3, 0.5, 0.8)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# -- what each advantage optimises

def known_weight(kind, p, G, k):
    """w of E[gradient] = w * grad p, written out."""
    if kind in ("none", "leave-one-out", "greedy"):
        return 1.0
    if kind == "mean":
        return (G - 1) / G
    if kind == "success":
        return (1 - (1 - p) ** (G - 1)) / p
    if kind == "success-fail":
        return (1 - (1 - p) ** G) / p
    if kind == "pass":
        return k * (1 - p) ** (k - 1)
    if kind == "batch":
        return 1 / math.sqrt(p * (1 - p))
    assert kind == "deviation"
    # A group with n right replies has advantages (1 - n/G) / sd and -(n/G) / sd.
    total = 0.0
    for n in range(1, G):
        chance = math.comb(G, n) * p**n * (1 - p) ** (G - n)
        share = n / G
        deviation = math.sqrt(share * (1 - share))
        of_right, of_wrong = (1 - share) / deviation, -share / deviation
        # A right reply's grad log pi is grad p / p, a wrong one's -grad p / (1 - p).
        total += chance * (share * of_right / p - (1 - share) * of_wrong / (1 - p))
    return total


@pytest.mark.parametrize("kind", estimators.KINDS)
@pytest.mark.parametrize("G, k", [(8, 4), (2, 2), (4, 1), (5, 5)])
def test_the_expected_gradient_is_the_known_weight_times_that_of_the_success_rate(kind, G, k):
    for p in PS:
        weight, _ = estimators.moments(kind, p, G, k)
        assert weight == pytest.approx(known_weight(kind, p, G, k), rel=1e-6)


def test_the_weights_of_grpo_are_those_that_were_tabulated_and_not_one_over_the_deviation():
    weights = [estimators.moments("deviation", p, 8)[0] for p in (0.05, 0.3, 0.8)]
    assert weights == pytest.approx([2.473, 1.963, 2.107], abs=5e-4)


def test_with_two_replies_grpo_and_maxrl_without_its_failures_are_reinforce():
    for p in PS:
        for kind in ("deviation", "success"):
            assert estimators.moments(kind, p, 2)[0] == pytest.approx(1, rel=1e-6)


def expected_gradient(kind, logits, rewards, G=3):
    """Mean and total variance of a group's gradient by the logits of a softmax, over all groups there are."""
    probabilities = logits.softmax(0)
    likeliest = rewards[logits.argmax()][None]
    mean, square = torch.zeros_like(logits), 0.0
    for replies in itertools.product(range(len(logits)), repeat=G):
        chosen = torch.tensor(replies)
        own = logits.clone().requires_grad_()
        logprobs = own.log_softmax(0)[chosen][:, None]
        advantages = group_advantages(rewards[chosen][None], kind, 2, likeliest).view(G, 1)
        mask = torch.ones(G, 1, dtype=torch.bool)
        weights = torch.full((G, 1), 1 / G, dtype=torch.float64)
        old = logprobs.detach()
        loss, _ = policy_loss(logprobs, old, advantages, mask, weights, "clip", "token", 0.2, 0.2)
        loss.backward()
        chance = probabilities[chosen].prod()
        mean -= chance * own.grad
        square += chance * own.grad.square().sum()
    return mean, square - mean.square().sum()


def test_leave_one_out_and_the_greedy_reply_leave_the_expected_gradient_and_lower_its_variance():
    logits, rewards = double(1.2, 0.1, -0.5, 0.4), double(1.5, 0.2, 2.0, 0.9)
    true = torch.autograd.functional.jacobian(lambda x: x.softmax(0) @ rewards, logits)
    plain, noise = expected_gradient("none", logits, rewards)
    assert torch.allclose(plain, true, atol=1e-12)
    for kind in ("leave-one-out", "greedy"):
        mean, variance = expected_gradient(kind, logits, rewards)
        assert torch.allclose(mean, true, atol=1e-12) and variance < 0.5 * noise


# -- advantages at their edges

@pytest.mark.parametrize("kind", ["mean", "leave-one-out", "deviation", "success"])
@pytest.mark.parametrize("score", [0.1, -3.3, 0.0, 1e6])
def test_a_group_of_equal_scores_has_advantages_of_exactly_zero(kind, score):
    scores = torch.full((2, 7), score) + torch.tensor([[0.0], [1.0]]) * torch.arange(7)
    advantages = group_advantages(scores, kind)
    assert (advantages[0] == 0).all() and (advantages[1] != 0).any() and advantages.isfinite().all()
    assert flat_groups(scores).tolist() == [True, False]
    assert not flat_groups(torch.tensor([[1e-3, 2e-3]]))


@pytest.mark.parametrize("kind", ["mean", "leave-one-out", "deviation", "success"])
def test_scores_that_differ_by_rounding_are_equal(kind):
    scores = torch.full((1, 7), 0.1) + torch.tensor([0, 1, 0, 1, 0, 0, 1]) * 1e-8
    assert scores.std() > 0 and (group_advantages(scores, kind) == 0).all()


@pytest.mark.parametrize("kind", ["mean", "leave-one-out", "deviation", "success", "success-fail", "pass"])
def test_a_group_is_compared_with_itself_alone(kind):
    scores = torch.tensor([[1.0, 2.0, 4.0], [5.0, 9.0, 1.0]])
    together = group_advantages(scores, kind, 2)
    for number in range(2):
        alone = group_advantages(scores[number:number + 1], kind, 2)
        torch.testing.assert_close(together[number:number + 1], alone)


def test_where_all_fail_maxrl_pushes_all_down_or_nothing():
    scores = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert group_advantages(scores, "success").tolist() == [[0, 0], [1, -1]]
    assert group_advantages(scores, "success-fail").tolist() == [[-1, -1], [1, -1]]


def test_over_the_batch_groups_that_were_dropped_count_for_nothing():
    scores = torch.tensor([[1.0, 3.0], [100.0, 100.0], [5.0, 7.0]])
    kept = torch.tensor([True, False, True])
    advantages = group_advantages(scores, "batch", kept=kept)[kept]
    expected = (scores[kept] - 4) / torch.tensor([1.0, 3, 5, 7]).std(correction=0)
    torch.testing.assert_close(advantages, expected)
    all_kept = torch.ones(2, dtype=torch.bool)
    nearly_equal = torch.full((2, 3), 0.1) + torch.tensor([0, 1, 0]) * 1e-8
    assert nearly_equal.std() > 0
    assert (group_advantages(nearly_equal, "batch", kept=all_kept) == 0).all()


@pytest.mark.parametrize("k", [2, 3, 5])
def test_what_a_score_adds_to_the_best_of_others_equals_a_loop_over_all_choices(k):
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    scores[1, 3] = scores[1, 0]
    for row, got in zip(scores, group_advantages(scores, "pass", k)):
        for i in range(5):
            others = [row[j].item() for j in range(5) if j != i]
            added = [max(row[i].item() - max(choice), 0) for choice in itertools.combinations(others, k - 1)]
            assert got[i].item() == pytest.approx(k * sum(added) / len(added), abs=1e-12)


def test_rules_for_overlong_replies():
    scores, ended = torch.tensor([2.0, 2.0, 2.0, 2.0]), torch.tensor([True, True, True, False])
    lengths = torch.tensor([5, 16, 18, 20])
    changed = {rule: overlong_scores(scores, ended, lengths, rule, 0.5, torch.tensor(-1.0), 20, 5).tolist()
               for rule in ("keep", "mask", "floor", "linear")}
    assert changed["keep"] == changed["mask"] == [2, 2, 2, 2]
    assert changed["floor"] == [2, 2, 2, -1.5]
    # Of 20 tokens the last five cost a tenth each.
    assert changed["linear"] == pytest.approx([2, 1.9, 1.7, 1.5])


@pytest.mark.parametrize("call", [
    lambda: group_advantages(torch.ones(1, 2), "median"),
    lambda: overlong_scores(torch.ones(1), torch.ones(1), torch.ones(1), "cut", 1, 0, 1, 1),
    lambda: token_weights(torch.ones(1), "group", 1, 1, 1),
    lambda: policy_loss(*torch.zeros(3, 1, 1), torch.ones(1, 1) > 0, 1, "clip", "word", 0.2, 0.2),
    lambda: policy_loss(*torch.zeros(3, 1, 1), torch.ones(1, 1) > 0, 1, "hinge", "token", 0.2, 0.2)])
def test_an_unknown_choice_is_an_error(call):
    with pytest.raises(ValueError, match="unknown"):
        call()


def test_scores_below_0_are_no_shares_of_success_and_are_refused(small, tmp_path, capsys):
    words = f"--steps 1 --group 2 --advantage success --overlong keep --reward {small}/reward"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "score", lambda run, reward_models, functions, batch, plan, steps:
                      torch.full((1, len(batch.texts)), -0.5))
        assert tools.here("grpo", small, words, f"--out {tmp_path}/run") == 2
    assert "is for scores of 0 and more, and one is -0.5; --squash sigmoid" in capsys.readouterr().err
    assert tools.here("grpo", small, words, f"--squash sigmoid --out {tmp_path}/squashed") == 0


@pytest.mark.parametrize("flat", ["drop", "resample"])
def test_a_run_goes_on_where_no_group_teaches_anything(flat, small, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "score", lambda run, reward_models, functions, batch, plan, steps:
                        torch.ones(1, len(batch.texts)))
    words = f"--steps 11 --group 2 --overlong keep --flat {flat} --resample-rounds 2 --reward {small}/reward"
    assert tools.here("grpo", small, words, f"--out {tmp_path}/run") == 0
    rows = tools.metrics(tmp_path / "run")
    assert len(rows) == 11 and all(row["flat_groups"] == 1 and row["grad_norm"] == 0 for row in rows)
    assert rows[-1]["replies"] == 11 * 8 * 2 * (2 if flat == "resample" else 1)


# -- losses and averages

MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]) > 0  # three tokens, two, none


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    old, step = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    return -old.abs(), 0.3 * step, double(1.5, -0.7, 2.0)[:, None]


@pytest.mark.parametrize("kind", ["clip", "cispo", "soft", "reinforce"])
@pytest.mark.parametrize("ratio", ["token", "product", "mean"])
def test_the_loss_and_its_gradient_equal_a_loop_over_tokens(kind, ratio):
    old, step, advantages = drawn()
    logprobs = (old + step).requires_grad_()
    weights = double(0.2, 0.5, 3.0)[:, None]
    loss, stats = policy_loss(logprobs, old, advantages, MASK, weights, kind, ratio, 0.2, 0.25, (0.9, 1.3))
    gradient, = torch.autograd.grad(loss, logprobs)

    slow = (old + step).requires_grad_()
    total, clipped = 0.0, 0
    for b, t in MASK.nonzero().tolist():
        places = [u for u in range(4) if MASK[b, u]]
        log_ratio = sum(slow[b, u] - old[b, u] for u in places)
        if ratio == "token":
            log_ratio = slow[b, t] - old[b, t]
        elif ratio == "mean":
            log_ratio = log_ratio / len(places)
        rho, A = log_ratio.exp(), advantages[b, 0]
        held = min(max(rho.item(), 0.8), 1.25)
        clipped += held != rho.item()
        if kind == "reinforce":
            own = -A * slow[b, t]
        elif kind == "soft":
            tau = 0.9 if A > 0 else 1.3
            own = -A * 4 / tau / (1 + (-tau * (rho - 1)).exp())
        elif kind == "cispo":
            own = -held * A * slow[b, t]
        else:
            # No gradient where clipping lowers the objective.
            own = -A * (held if A * held < A * rho.item() else rho)
        total = total + own * weights[b, 0]
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)
    expected, = torch.autograd.grad(total, slow)
    torch.testing.assert_close(gradient, expected)
    assert ratio != "token" or 0 < clipped < 5
    assert stats["clip_fraction"].item() == clipped and gradient[2].abs().sum() == 0
    assert stats["entropy"].item() == pytest.approx(-logprobs[MASK].sum().item())


def test_averages_count_tokens_replies_or_a_constant():
    lengths = torch.tensor([3, 2, 0])
    assert torch.allclose(token_weights(lengths, "token", 3, 5, 10), torch.full((3, 1), 1 / 5))
    of_replies = token_weights(lengths, "reply", 3, 5, 10)
    assert torch.allclose(of_replies, torch.tensor([[1 / 9], [1 / 6], [1 / 3]]))
    assert torch.allclose(token_weights(lengths, "constant", 3, 5, 10), torch.full((3, 1), 1 / 30))


def test_of_replies_of_one_length_all_averages_are_alike_but_for_a_constant():
    lengths = torch.full((4,), 6)
    weights = [token_weights(lengths, average, 4, 24, 10) for average in ("token", "reply", "constant")]
    assert torch.allclose(weights[0], weights[1]) and torch.allclose(weights[0] * 0.6, weights[2])


def test_a_ratio_that_is_huge_stays_finite():
    logprobs = torch.zeros(1, 3, requires_grad=True)
    old = torch.full((1, 3), -100.0)
    for ratio in ("token", "product", "mean"):
        loss, _ = policy_loss(logprobs, old, -torch.ones(1, 1), torch.ones(1, 3) > 0, torch.ones(1, 1),
                              "clip", ratio, 0.2, 0.2)
        gradient, = torch.autograd.grad(loss, logprobs)
        assert loss.isfinite() and gradient.isfinite().all()


# -- advantages where the score comes step by step

STEP_KINDS = ("none", "mean", "leave-one-out", "deviation")
ENDS = (  # of two groups of three replies: several steps, one, and one that ends in the first column
    (2, 5, 7), (3, 7), (6,), (0, 1), (4,), (0, 3, 4, 6))


def steps_drawn():
    """scores (6,), changes and ends (6, 9). The scores have more than their steps give."""
    torch.manual_seed(1)
    ends = torch.zeros(6, 9, dtype=torch.bool)
    for row, places in enumerate(ENDS):
        ends[row, list(places)] = True
    changes = torch.where(ends, torch.randn(6, 9, dtype=torch.float64), 0.0)
    return changes.sum(1) + torch.randn(6, dtype=torch.float64), changes, ends


def slow_step_advantages(scores, changes, kind, G=3):
    """By a loop: what a reply still gets from a step on, against the group's replies that have that step."""
    advantages = torch.zeros(6, 9, dtype=torch.float64)
    for row, places in enumerate(ENDS):
        group = range(row // G * G, row // G * G + G)
        for t in range(places[-1] + 1):
            k = sum(place < t for place in places)  # steps that ended before this token

            def to_come(other):
                got = sum(changes[other, place] for place in ENDS[other][:k])
                return scores[other] - got

            others = [to_come(other) for other in group if len(ENDS[other]) > k]
            n, own = len(others), to_come(row)
            mean = sum(others) / n
            spread = torch.stack([scores[other] for other in group]).std(correction=0)
            advantages[row, t] = {
                "none": own, "mean": own - mean, "deviation": (own - mean) / spread,
                "leave-one-out": (own - mean) * n / (n - 1) if n > 1 else 0.0}[kind]
    return advantages


@pytest.mark.parametrize("kind", STEP_KINDS)
def test_a_token_is_compared_by_what_the_steps_that_end_at_it_or_later_give(kind):
    scores, changes, ends = steps_drawn()
    got = grpo.step_advantages(scores, changes, ends, kind, 3)
    expected = slow_step_advantages(scores, changes, kind)
    for row, places in enumerate(ENDS):
        torch.testing.assert_close(got[row, :places[-1] + 1], expected[row, :places[-1] + 1])
    # What was earned before is nobody's: more for the first step changes no later token's advantage.
    more = changes.clone()
    more[0, 2] += 5
    again = grpo.step_advantages(scores + torch.tensor([5.0, 0, 0, 0, 0, 0]), more, ends, "none", 3)
    torch.testing.assert_close(again[0, 3:], grpo.step_advantages(scores, changes, ends, "none", 3)[0, 3:])


@pytest.mark.parametrize("kind", STEP_KINDS)
def test_tokens_of_first_steps_have_the_advantages_of_whole_replies(kind):
    """So replies of one step are trained as by their scores."""
    scores, changes, ends = steps_drawn()
    got = grpo.step_advantages(scores, changes, ends, kind, 3)
    whole = group_advantages(scores.view(2, 3), kind).reshape(6)
    torch.testing.assert_close(got[:, 0], whole)
    for row, places in enumerate(ENDS):
        torch.testing.assert_close(got[row, :places[0] + 1], whole[row].expand(places[0] + 1))
    single = torch.zeros(6, 9, dtype=torch.bool)
    single[:, 8] = True
    got = grpo.step_advantages(scores, torch.where(single, scores[:, None], 0.0), single, kind, 3)
    torch.testing.assert_close(got, whole[:, None].expand(6, 9))


@pytest.mark.parametrize("kind", ["mean", "leave-one-out", "deviation"])
def test_equal_scores_teach_no_step_anything_and_a_step_alone_is_compared_with_nothing(kind):
    scores, changes, ends = steps_drawn()
    scores[:3] = 0.1
    got = grpo.step_advantages(scores, changes, ends, kind, 3)
    assert not got[:3].any() and got[3:].isfinite().all()
    assert not got[5, 4:].any()  # its third and fourth step, which no other reply of its group has


def test_an_advantage_that_steps_have_not_is_an_error():
    with pytest.raises(ValueError, match="no advantage by steps of kind batch"):
        grpo.step_advantages(*steps_drawn(), "batch", 3)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_terms_are_those_of_ppo(kind):
    old, step, _ = drawn(1)
    ref = old - step / 2
    assert torch.equal(grpo.kl_estimate(old, ref, kind), ppo.kl_estimate(old, ref, kind))
    ours = kl_loss(old + step, old, ref, MASK, kind, torch.full((3, 1), 1 / 7, dtype=torch.float64))
    assert ours.item() == pytest.approx(ppo.kl_loss(old + step, old, ref, MASK, kind, 7).item(), rel=1e-12)


def test_with_a_ratio_of_each_token_the_clipped_loss_is_that_of_ppo():
    old, step, advantages = drawn(2)
    weights = torch.full((3, 1), 1 / 7, dtype=torch.float64)
    ours, _ = policy_loss(old + step, old, advantages, MASK, weights, "clip", "token", 0.2, 0.2)
    theirs, _ = ppo.policy_loss(old + step, old, advantages.expand(3, 4), MASK, 0.2, 7)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


# -- dealing, presets

def test_every_epoch_deals_each_group_once_in_steps_of_equal_size():
    kept = [0, 2, 3, 5, 6, 8, 9]
    steps = deal_groups(kept, 3, 2, torch.Generator().manual_seed(0))
    assert sorted(sum(steps[:3], [])) == sorted(sum(steps[3:], [])) == kept
    assert sorted(map(len, steps[:3])) == [2, 2, 3] and steps[:3] != steps[3:]
    assert deal_groups([], 2, 1, torch.Generator()) == [[], []]


@pytest.mark.parametrize("name", Config.PRESETS)
def test_a_preset_is_its_flags_and_those_given_beside_it_count(name):
    flags = Config.PRESETS[name]
    config = parse_flags(Config, "", ["--preset", name])
    assert {field: getattr(config, field) for field in flags} == flags
    words = [word for field, value in flags.items() for word in ("--" + field.replace("_", "-"), str(value))]
    assert vars(parse_flags(Config, "", words)) | {"preset": name} == vars(config)
    assert parse_flags(Config, "", ["--preset", name, "--advantage", "none"]).advantage == "none"
    # The table of the header says the same.
    row = next(line for line in grpo.__doc__.splitlines() if line.split()[:1] == [name])
    assert {flags["advantage"], flags["loss"], flags["average"]} <= set(row.split())


def test_the_choices_of_preset_are_the_presets():
    assert {""} | Config.PRESETS.keys() == set(Config.__annotations__["preset"].__args__)
