"""Runs of ppo.py: the KL term, advantages, the gradients of whole updates against the formulas written out,
networks and their rates."""
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import generate
import model
import ppo
import rollout as rollout_file
from formats.model_folder import load_model
from model import GPT, ScalarModel
from plumbing.steps import scheduled_lr
from ppo import adapt_kl_coef
from tools import (
    PTX, QUICK, TOY, network, ptx_logprobs, recorded, reply_tokens, rollout_of, rows_of, run_here,
    same_tensors, steps_of, train)


# -- what the losses are given

@pytest.mark.case(24)
def test_ppo_feeds_its_losses_what_one_row_at_a_time_gives(chain, tmp_path, monkeypatch):
    """Log-probabilities at the sampling temperature, values before each token, the score on the last one: no
    padding, by hand."""
    seen = {}

    def record(name):
        owner = rollout_file if name == "generate" else ppo
        original = getattr(owner, name)

        def recorded(*args, **options):
            out = original(*args, **options)
            seen.setdefault(name, (args, out))
            return out
        monkeypatch.setattr(owner, name, recorded)

    for name in ("generate", "shaped_rewards", "gae", "policy_loss"):
        record(name)
    root = chain[0]
    run_here(
        "ppo",
        f"--data {TOY}/prompts.jsonl --model {root}/sft --reward {root}/reward --out {tmp_path}/run",
        "--threads 1 --steps 1 --rollout-batch 8 --minibatches 1 --epochs 1 --max-new-tokens 10",
        "--temperature 0.7 --kl-coef 0.5 --whiten none --missing-eos-penalty 0 --micro-batch-tokens 10000")
    policy, _ = load_model(root / "sft", model.GPT)
    scorer, _ = load_model(root / "reward", model.ScalarModel)
    rollout = seen["generate"][1]
    values, rewards = seen["gae"][0][1], seen["gae"][0][0]
    old_logprobs = seen["policy_loss"][0][1]  # of the minibatch's rows, sorted by length
    expected_logprobs, per_row = [], []
    for ids, mask, length in zip(rollout.ids, rollout.mask, rollout.lengths):
        row = ids[:length][None]
        with torch.no_grad():
            logits = policy.eval().logits(policy.transformer(row))[0] / 0.7  # (T, V)
            heads = scorer.eval()(row)[0]  # (T,)
        per_row.append((mask.nonzero().flatten().tolist(), row[0], logits.log_softmax(-1), heads))
    floor = min(heads[-1].item() for _, _, _, heads in per_row)
    for b, (inside, row, logprobs, heads) in enumerate(per_row):
        score = heads[-1].item() if rollout.ended[b] else floor
        for t in inside:
            assert values[b, t].item() == pytest.approx(heads[t - 1].item(), abs=1e-4)
            # Policy = reference: no KL yet.
            assert rewards[b, t].item() == pytest.approx(score if t == inside[-1] else 0.0, abs=1e-4)
        expected_logprobs.append(sum(logprobs[t - 1, row[t]].item() for t in inside))
    assert sorted(old_logprobs.sum(1).tolist()) == pytest.approx(sorted(expected_logprobs), abs=1e-3)


def test_ppo_trains_on_each_reply_once_an_epoch_and_logs_and_adapts_to_the_kl_of_whole_replies(
        small, tmp_path, monkeypatch):
    calls = recorded(monkeypatch, ppo, "kl_estimate", "policy_loss", "adapt_kl_coef")
    run_here(
        "ppo",
        f"--model {small}/sft --data {small}/prompts.json --reward {small}/reward --out {tmp_path}/run",
        "--threads 1 --steps 2 --rollout-batch 8 --epochs 2 --minibatches 4",
        "--lr 0.01 --warmup 1 --max-new-tokens 12 --kl-target 1")
    # Of each rollout: old and reference log-probabilities.
    estimates = [args for args, _ in calls["kl_estimate"] if args[2] == "k1"]
    assert len(estimates) == 2 and len(calls["policy_loss"]) == 16
    for rollout, (old, ref, _) in enumerate(estimates):
        for epoch in (0, 1):
            minibatches = [args[1] for args, _ in calls["policy_loss"][8 * rollout + 4 * epoch:][:4]]
            expected = pytest.approx(sorted(old.sum(1).tolist()), rel=1e-4)
            assert sorted(row.sum().item() for part in minibatches for row in part) == expected
        kl = sum((old - ref).sum(1).tolist()) / 8
        assert rows_of(tmp_path / "run")[rollout]["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-5)
        assert calls["adapt_kl_coef"][rollout][0][1] == pytest.approx(kl, rel=1e-4, abs=1e-5)
    assert abs(kl) > 0.01


def test_ppo_samples_at_its_temperature(small, tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch, rollout_file, "generate")["generate"]
    run_here(
        "ppo",
        f"--model {small}/sft --data {small}/prompts.json --reward {small}/reward --out {tmp_path}/run",
        f"{QUICK['ppo']} --threads 1 --steps 1 --temperature 0.001")
    policy, tokenizer = load_model(small / "sft", model.GPT)
    rollout = rollouts[0][1]
    prompts = [ids[:mask.nonzero()[0]].tolist() for ids, mask in zip(rollout.ids, rollout.mask)]
    # Near 0 the likeliest tokens alone.
    assert torch.equal(generate.generate(policy, prompts, 12, tokenizer, temperature=0).ids, rollout.ids)


# -- the KL term

@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_kl_term_stands_where_it_is_told_and_a_wrong_gradient_is_warned_of(kind, place, root, tmp_path):
    run = train(root, tmp_path / "run", f"--kl {kind} --kl-in {place} --kl-coef 0.3")
    rollout, shaped = rollout_of(run, 1), run.calls["shaped_rewards"][1]
    with torch.no_grad():
        ref, _ = reply_tokens(network(GPT, root / "sft"), rollout.ids, rollout.mask)
        policy = network(GPT, root / "sft", steps_of(run, "policy")[3].after)
        old, _ = reply_tokens(policy, rollout.ids, rollout.mask)
    log_ratio = old - ref
    expected = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": (-log_ratio).exp() - 1 + log_ratio}[kind]
    assert log_ratio.abs().max() > 0.01
    torch.testing.assert_close(shaped.kl[rollout.mask], expected, rtol=1e-3, atol=1e-5)
    assert shaped.kl_coef == (0.3 if place == "reward" else 0)
    assert torch.equal(run.calls["gae"][1].rewards, shaped.result)
    assert {call.kind for call in run.calls["kl_loss"]} == ({kind} if place == "loss" else set())
    assert ("kl_loss" in run.rows[1]) == (place == "loss")
    right = (kind == "k1") == (place == "reward")
    assert ("has the wrong gradient" in run.said) == (not right)


def test_no_gradient_is_wrong_when_there_is_no_kl_term(root, tmp_path):
    assert "has the wrong gradient" not in train(root, tmp_path / "run", "--kl k3 --kl-coef 0 --steps 1").said


def test_beta_adapts_to_the_kl_of_each_rollout_and_is_used_in_the_next(root, tmp_path):
    run = train(root, tmp_path / "run", "--kl-coef 0.3 --kl-target 0.05 --kl-horizon 40 --steps 4")
    coef = 0.3
    for row, shaped in zip(run.rows, run.calls["shaped_rewards"]):
        assert row["kl_coef"] == pytest.approx(coef) and shaped.kl_coef == pytest.approx(coef)
        coef = adapt_kl_coef(coef, row["kl"], target=0.05, replies=16, horizon=40)
    assert len({row["kl_coef"] for row in run.rows}) == 4
    assert [call.kl for call in run.calls["adapt_kl_coef"]] == [row["kl"] for row in run.rows]
    constant = train(root, tmp_path / "constant", "--kl-coef 0.3 --steps 3")
    assert {row["kl_coef"] for row in constant.rows} == {0.3}


# -- advantages

def in_first_minibatch(run, values):
    """Rows of values that belong to the first minibatch, found by old values, which no two rows share."""
    first = run.calls["value_loss"][0].old_values
    whole = run.calls["gae"][0].values[:, :first.shape[1]]
    return values[[next(i for i, row in enumerate(whole) if torch.equal(row, wanted))
                   for wanted in first], :first.shape[1]]


def test_gamma_and_lambda_reach_the_advantages(root, tmp_path, default):
    run = train(root, tmp_path / "run", "--gamma 0.9 --lam 0.3 --steps 1")
    assert (run.calls["gae"][0].gamma, run.calls["gae"][0].lam) == (0.9, 0.3)
    assert (default.calls["gae"][0].gamma, default.calls["gae"][0].lam) == (1.0, 0.95)
    assert torch.equal(run.calls["whiten"][0].x, run.calls["gae"][0].result[0])
    assert torch.equal(run.calls["value_loss"][0].old_values,
                       in_first_minibatch(run, run.calls["gae"][0].values))
    assert torch.equal(run.calls["value_loss"][0].returns,
                       in_first_minibatch(run, run.calls["gae"][0].result[1]))


def in_training_order(run, values, rollout=0):
    """Rows (B, ...) of a rollout as a minibatch of all of them has them: by length, then by number."""
    size = run.calls["steps_mask"][rollout].result.long()
    ends = (size * torch.arange(1, size.shape[1] + 1)).amax(1).tolist()
    return values[sorted(range(len(ends)), key=lambda i: (ends[i], i))]


@pytest.mark.parametrize("kind", ["population", "sample", "none"])
@pytest.mark.parametrize("clip", [0, 0.5])
def test_advantages_are_whitened_over_the_rollout_and_then_clipped(kind, clip, root, tmp_path):
    run = train(
        root, tmp_path / "run",
        f"--whiten {kind} --advantage-clip {clip} --steps 1 --minibatches 1 --micro-batch-tokens 10000")
    mask, (advantages, returns) = rollout_of(run).mask, run.calls["gae"][0].result
    inside = advantages[mask].double()
    if kind != "none":
        inside = (inside - inside.mean()) / inside.std(correction=kind == "sample")
    assert inside.abs().max() > 0.6
    clipped = inside.clamp(-clip, clip) if clip else inside
    expected = torch.zeros(mask.shape).masked_scatter(mask, clipped.float())
    for call in run.calls["policy_loss"]:
        torch.testing.assert_close(call.advantages, in_training_order(run, expected), rtol=1e-5, atol=1e-5)
    # The critic learns what was not whitened.
    assert torch.equal(run.calls["value_loss"][0].returns, in_training_order(run, returns))


# -- the objective: the gradient of a whole run against the formula written out

def clipped(q, clip=0.2):
    return -torch.minimum(q.ratio * q.advantages, q.ratio.clamp(1 - clip, 1 + clip) * q.advantages)


def kl_term(kind):
    return {
        "k1": lambda q: clipped(q) + 0.4 * q.log_ratio,
        "k2": lambda q: clipped(q) + 0.4 * q.ratio.detach() * q.log_ratio ** 2 / 2,
        "k3": lambda q: clipped(q) + 0.4 * q.ratio * ((-q.log_ratio).exp() - 1 + q.log_ratio)
    }[kind]


OBJECTIVES = {
    "": clipped,
    "--clip 0.05": lambda q: clipped(q, 0.05),
    "--dual-clip 1.01":
        lambda q: torch.where(q.advantages < 0, torch.minimum(clipped(q), -1.01 * q.advantages), clipped(q)),
    "--policy-loss penalty --penalty-coef 0.7":
        lambda q: -q.ratio * q.advantages + 0.7 * (q.ratio - 1 - q.ratio.log()),
    "--entropy-coef 0.3": lambda q: clipped(q) - 0.3 * q.entropy,
    "--kl-in loss --kl k1 --kl-coef 0.4": kl_term("k1"),
    "--kl-in loss --kl k2 --kl-coef 0.4": kl_term("k2"),
    "--kl-in loss --kl k3 --kl-coef 0.4": kl_term("k3"),
    # 0.4 in the second rollout, as the first has no KL.
    "--kl-in loss --kl k2 --kl-coef 0.5 --kl-target 5 --kl-horizon 16": kl_term("k2"),
    "--ptx-coef 0.5 " + PTX: lambda q: clipped(q) - 0.5 * q.ptx,
}


@pytest.mark.parametrize("flags", OBJECTIVES)
def test_the_policy_follows_the_gradient_of_the_objective_written_out(flags, root, tmp_path):
    """Second pass over the second rollout: the policy has left the old one, and the old one the reference.

    Advantages are the run's.
    """
    run = train(root, tmp_path / "run", flags,
                "--minibatches 1 --micro-batch-tokens 90 --temperature 0.8 --lr 0.02 --max-grad-norm 1e9")
    steps, rollout = steps_of(run, "policy"), rollout_of(run, 1)
    assert [step.rollout for step in steps] == [0, 0, 1, 1] and len(steps_of(run, "critic")) == 4
    policy = network(GPT, root / "sft", steps[3].before)
    with torch.no_grad():
        old, _ = reply_tokens(network(GPT, root / "sft", steps[2].before), rollout.ids, rollout.mask, 0.8)
        ref, _ = reply_tokens(network(GPT, root / "sft"), rollout.ids, rollout.mask, 0.8)
    logprobs, entropy = reply_tokens(policy, rollout.ids, rollout.mask, 0.8)
    advantages = run.calls["gae"][1].result[0][rollout.mask]
    q = SimpleNamespace(ratio=(logprobs - old).exp(),
                        log_ratio=logprobs - ref,
                        entropy=entropy,
                        ptx=ptx_logprobs(root, policy, 3).mean(),
                        advantages=(advantages - advantages.mean()) / advantages.std(correction=0))
    objective, other = OBJECTIVES[flags](q), clipped(q) if flags else -q.ratio * q.advantages
    assert not torch.allclose(objective, other)  # what the flag is about happens here
    objective.mean().backward()
    for name, p in policy.named_parameters():
        torch.testing.assert_close(steps[3].gradient[name],
                                   p.grad,
                                   rtol=1e-3,
                                   atol=2e-6,
                                   msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("flags, clip", [
    ("", 2.0),
    ("--value-clip 0", 1e9),
    ("--value-clip 0.05", 0.05),
    ("--reward-at next --value-clip 0.05", 0.05),
])
def test_the_critic_follows_the_gradient_of_the_value_loss_written_out(flags, clip, root, tmp_path):
    run = train(root, tmp_path / "run", flags,
                "--steps 1 --minibatches 1 --micro-batch-tokens 90 --max-grad-norm 1e9")
    steps, mask = steps_of(run, "critic"), run.calls["gae"][0].steps
    # Room for --reward-at next.
    ids = F.pad(rollout_of(run).ids, (0, mask.shape[1] - rollout_of(run).ids.shape[1]))
    critic = network(ScalarModel, root / "reward", steps[1].before)
    with torch.no_grad():
        old = network(ScalarModel, root / "reward")(ids)[:, :-1][mask[:, 1:]]
    values, returns = critic(ids)[:, :-1][mask[:, 1:]], run.calls["gae"][0].result[1][mask]
    held = old + (values - old).clamp(-clip, clip)
    # Where it clips at all, the formula below says how.
    assert clip > 1 or ((values - old).abs() > clip).any()
    (0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2)).mean().backward()
    for name, p in critic.named_parameters():
        torch.testing.assert_close(steps[1].gradient[name],
                                   p.grad,
                                   rtol=1e-3,
                                   atol=1e-5,
                                   msg=lambda text: f"{name}: {text}")
    assert ("value_clip_fraction" in run.rows[0]) == (flags != "--value-clip 0")


def test_ptx_adds_its_gradient_before_the_one_step_of_each_minibatch(root, tmp_path):
    without = train(root, tmp_path / "without", "--max-grad-norm 1e9")
    run = train(root, tmp_path / "run", "--max-grad-norm 1e9 --ptx-coef 0.5", PTX)
    # 2 rollouts, 2 epochs, 2 minibatches.
    assert [len(steps_of(r, name)) for r in (run, without) for name in ("policy", "critic")] == [8] * 4
    policy = network(GPT, root / "sft")
    logprobs = ptx_logprobs(root, policy, 0)
    (-logprobs.mean()).backward()
    for name, p in policy.named_parameters():  # the first step of both runs starts at the same weights
        total = steps_of(run, "policy")[0].gradient[name]
        alone = steps_of(without, "policy")[0].gradient[name]
        torch.testing.assert_close(total, alone + 0.5 * p.grad, rtol=0, atol=1e-6)
    one = train(root, tmp_path / "one", "--steps 1 --epochs 1 --minibatches 1 --ptx-coef 3", PTX)
    # Nats per token, without the weight.
    assert one.rows[0]["ptx_loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-4)
    assert "ptx_loss" not in without.rows[0]


# -- networks, learning rates, averages

@pytest.mark.parametrize("init, reward", [
    ("auto", True),
    ("auto", False),
    ("reward", True),
    ("sft", True),
    ("zero", True),
    ("sft", False),
])
def test_the_critic_starts_as_it_is_told(init, reward, root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine",
                        SimpleNamespace(zero=lambda prompts, replies: [0.0] * len(replies)))
    scored_by = "--reward {root}/reward" if reward else "--reward-fn mine:zero"
    run = train(root, tmp_path / "run", f"--critic-init {init} --steps 1 --seed 3", reward=scored_by)
    if init == "reward" or (init == "auto" and reward):
        expected = network(ScalarModel, root / "reward")
    else:
        torch.manual_seed(3)
        expected = ScalarModel.from_trunk(network(GPT, root / "sft"))
        if init != "sft":
            torch.nn.init.zeros_(expected.score.weight)
            assert not run.calls["gae"][0].values.any()
    assert same_tensors(run.start["critic"], expected.state_dict())
    assert not same_tensors(run.start["critic"], steps_of(run, "critic")[-1].after)


def test_critic_warmup_trains_the_critic_alone_for_its_rollouts(root, tmp_path):
    run = train(root, tmp_path / "run",
                "--critic-warmup 2 --steps 3 --ema 0.5 --ptx-coef 1 --entropy-coef 0.1", PTX)
    policy, critic = steps_of(run, "policy"), steps_of(run, "critic")
    assert [step.rollout for step in policy] == [2] * 4
    assert [step.rollout for step in critic] == [0] * 4 + [1] * 4 + [2] * 4
    assert same_tensors(policy[0].before, run.start["policy"])
    assert not same_tensors(policy[0].after, run.start["policy"])
    assert not same_tensors(critic[0].after, critic[0].before)
    first, second, third = run.rows
    for row in (first, second):
        assert row["kl"] == row["lr"] == row["grad_norm"] == 0
        assert row["value_loss"] > 0
        assert row["critic_lr"] > 0
        assert not {"policy_loss", "ptx_loss", "clip_fraction"} & row.keys()
    assert {"policy_loss", "ptx_loss", "clip_fraction"} <= third.keys() and third["lr"] > 0
    average = network(GPT, run.out / "ema").state_dict()
    for step in policy:  # the average moves with the policy's steps, not with the critic's
        run.start["policy"] = {k: 0.5 * v + 0.5 * step.after[k] for k, v in run.start["policy"].items()}
    assert all(torch.allclose(average[k], v, rtol=1e-5, atol=1e-6) for k, v in run.start["policy"].items())


def test_the_average_is_the_recursion_over_every_step_of_the_policy(root, tmp_path):
    run = train(root, tmp_path / "run", "--ema 0.8")
    average = run.start["policy"]
    for step in steps_of(run, "policy"):
        average = {k: 0.8 * v + 0.2 * step.after[k] for k, v in average.items()}
    saved = network(GPT, run.out / "ema").state_dict()
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
    assert same_tensors(network(GPT, run.out).state_dict(), steps_of(run, "policy")[-1].after)
    assert not same_tensors(saved, steps_of(run, "policy")[-1].after)
    train(root, run.out, "--overwrite")
    assert not list((run.out / "ema").iterdir())  # of the run that was replaced


@pytest.mark.parametrize("of, flag, peak", [
    ("policy", "--lr-schedule", 0.005),
    ("critic", "--critic-lr-schedule", 0.003),
])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_each_network_has_a_learning_rate_and_a_schedule_of_its_own(of, flag, peak, schedule, root, tmp_path):
    run = train(root, tmp_path / "run", f"{flag} {schedule} --critic-lr 0.003 --warmup 2 --steps 5")
    other, other_peak = ("critic", 0.003) if of == "policy" else ("policy", 0.005)
    for name, top, kind in ((of, peak, schedule), (other, other_peak, "cosine")):
        assert [step.lr for step in steps_of(run, name)] == [
            scheduled_lr(step.rollout, 5, 2, top, kind) for step in steps_of(run, name)
        ]
        assert [row["lr" if name == "policy" else "critic_lr"] for row in run.rows] == [
            scheduled_lr(i, 5, 2, top, kind) for i in range(5)
        ]
