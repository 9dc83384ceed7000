"""PPO on a reward: raise the score of sampled replies without leaving the reference policy too far behind.

    maximise  E_{x, y ~ pi}[ s(x, y) - beta * log(pi(y|x) / ref(y|x)) ] + c * E_{x, y ~ D}[ log pi(y|x) ]   (InstructGPT, eq. 2)

whose optimum without the second term (--ptx-coef, off by default) is pi*(y|x) = ref(y|x) exp(s(x, y) / beta) / Z(x);
bench/optimum.py shows that this file reaches it. Four models: policy (trained, from SFT), reference (the same weights,
frozen), reward model (frozen), critic (trained, from the reward model). One step of the script:

    1. rollout     sample a reply to each prompt, at the temperature that all log-probabilities are taken at
    2. score       reward models and functions; log-probabilities of policy and reference; values of the critic
    3. rewards     r_t = -beta * kl_t, plus the score at the last token
    4. advantages  generalised advantage estimation, whitened over the batch
    5. update      some epochs of policy and value losses on minibatches
    6. control, log, save

Token t of the response is action t; everything below is aligned with tokens, (B, T), zero outside the response:

    prompt | a    b    c  <eos>         logprobs[t] = log pi(token t | tokens before t)
           | r    r    r  r + score     values[t]   = V(tokens before t)

The KL divergence to the reference, with lr = log pi(a) - log ref(a) for a drawn from pi (Schulman 2020):
    k1 = lr              unbiased. In the reward its policy gradient is grad KL(pi || ref): the default. In the loss its
                         gradient is zero on average: nothing holds the policy.
    k2 = lr^2 / 2        biased as a value, and wrong in the reward. In the loss its gradient is grad KL(pi || ref).
    k3 = e^-lr - 1 + lr  unbiased with less variance: the number to log. In the reward its policy gradient is grad KL(pi ||
                         ref) - grad KL(ref || pi), which vanishes near ref and pushes rare tokens further down. In the
                         loss, times the probability ratio to the sampling policy, it has the very gradient of k2.
A term in the loss makes each token pay for its own KL alone, not for the KL that it leads to (the reward does both, through
the advantages), and whitened advantages change its weight: its optimum is pi* only for replies of one token and --whiten none.

What differs between implementations, and the switch that restores it (bench/parity.py checks those of TRL 1.12 to 1e-5):
    here                                              TRL 1.12's PPOTrainer, others                   switch
    KL: k1 in the reward                              k1 or k3 in the reward (OpenRLHF: both places)  --kl, --kl-in
    beta constant, or led by the KL of whole replies  constant (OpenRLHF: led by the mean per token)  --kl-target
    score at the end token                            one position later, but for the longest reply   --reward-at next
    cut-off reply: the rollout's lowest score - 1     its own score - penalty (SFD, LMHP: -1)         --missing-eos subtract | replace
    scores as they are                                the same (MOSS: over the running deviation)     --reward-norm scale
    advantages over the population deviation          the sample deviation (MOSS: of the minibatch)   --whiten sample
    values clipped within 2                           within 0.2                                      --value-clip 0.2
    2 epochs of 4 minibatches, token means of each    4 of 1, means of micro-batches averaged         --epochs 4 --minibatches 1
    learning rates fall on a cosine                   on a line                                       --lr-schedule, --critic-lr-schedule
    gradients clipped to norm 1                       not clipped                                     --max-grad-norm 1e9
    PPO-ptx: gradients summed, one step               no ptx (DeepSpeed-Chat: a step of its own)      --ptx-coef
    an optimiser each for policy and critic           one, value loss times 0.1                       none
    old log-probabilities from the training pass      from the sampler                                none
    a reply ends with its end token                   before the first pad, which may be that token   none
    prompts padded on the right                       on the left                                     none
    metrics over response tokens                      approx_kl and entropy over padding too          none
Left out: a trunk shared by policy and critic, a value behind the end of cut-off replies, rewards per step, whitened rewards.

    python ppo.py --model runs/sft --reward runs/reward --out runs/ppo      the toy task: gold score 0.1 to 0.9 in 1.5 minutes on 2 cores
    python ppo.py --model runs/sft --reward runs/reward --reward-fn mine:brevity --reward-weights 1 0.1
    torchrun --nproc-per-node 8 ppo.py --data prompts.jsonl --model sft --reward rm --rollout-batch 512

Legend: B replies on this rank, T tokens, V vocabulary.
"""
import copy
import json
import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

import toy
from model import prepare
from formats.model_folder import load_model, open_model, save_model
from plumbing.ranks import by_length
from data import collate, drop_long, encode_demonstrations, endless_batches, endless_order
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, Probability, RunConfig, require
from formats.sources import read_rows, split_by_prompt
from judges import check_functions, reward_function, short_names
from model import GPT, ScalarModel, last_scores, twin, values_before
from generate import generate, uniforms
from plumbing.ranks import fill_up
from plumbing.steps import adamw, scheduled_lr
from plumbing.run import Run, run_script
from data import describe, encode_prompt

Schedule = Literal["cosine", "linear", "constant"]


@dataclass
class Config(RunConfig):
    data: str = "toy"  # toy, or files whose prompts are used: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    model: str = "runs/sft"  # checkpoint folder or hub name of the policy to start from, which is also the reference; or scratch
    reward: list[str] = field(default_factory=list)  # checkpoint folders of reward models (default: runs/reward, unless there is a --reward-fn)
    reward_fn: list[str] = field(default_factory=list)  # Python functions, module:function, called with lists of prompts and replies (and, if it takes three, of the answers in --data) for one number per reply
    reward_weights: list[float] = field(default_factory=list)  # weight of each --reward, then of each --reward-fn, in the sum that is the score (default: 1 each)
    out: str = "runs/ppo"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 80  # rollouts, each followed by an update
    val_fraction: Fraction = 0.0  # share of a file's prompts left out; take that of the other stages, and evaluate.py has prompts that none has seen
    rollout_batch: Count = 256  # prompts per rollout over all ranks
    rollout_rows: Natural = 0  # replies that a rank samples at the same time, the other prompts wait for a place; 0: all. Lower it when keys and values take too much memory
    max_new_tokens: Count = 40  # longest reply, tokens
    temperature: Positive = 1.0  # of sampling; all log-probabilities are taken at it
    epochs: Count = 2  # passes over each rollout
    minibatches: Count = 4  # optimiser steps per pass
    micro_batch_tokens: Count = 8192  # tokens per forward pass on one rank, at most; lower it when memory is short
    lr: Positive = 1e-3  # peak learning rate of the policy
    critic_lr: Positive = 1e-3  # peak learning rate of the critic
    lr_schedule: Schedule = "cosine"  # the policy's: to a tenth on a cosine, to zero on a line, or constant
    critic_lr_schedule: Schedule = "cosine"  # the critic's
    warmup: Natural = 5  # rollouts of linear warm-up, both networks
    max_grad_norm: Positive = 1.0  # gradients of policy and of critic are scaled down to this norm
    critic_init: Literal["auto", "reward", "sft", "zero"] = "auto"  # trunk and head of the reward model; --model's trunk with a random head, or with a head of zeros; auto: reward, or zero if there is none
    critic_warmup: Natural = 0  # rollouts at the start that train the critic alone
    missing_eos: Literal["floor", "replace", "subtract"] = "floor"  # score of a reply cut off before its end token: the rollout's lowest less the penalty; minus the penalty; its own less the penalty
    missing_eos_penalty: NonNegative = 1.0  # for --missing-eos, in units of the score
    reward_norm: Literal["none", "scale", "standard"] = "none"  # divide scores by their running deviation; or subtract the running mean first
    reward_clip: NonNegative = 0.0  # scores (after --reward-norm) are held within this distance of 0; 0 is off
    reward_at: Literal["eos", "next"] = "eos"  # the score counts at the last token, or one position later (as TRL has it)
    kl: Literal["k1", "k2", "k3"] = "k1"  # estimator of the KL term
    kl_in: Literal["reward", "loss"] = "reward"  # where the KL term stands
    kl_coef: NonNegative = 0.1  # beta, score per nat
    kl_target: NonNegative = 0.0  # adapt beta so that the KL per reply (nats) stays near this; 0 keeps beta
    kl_horizon: Positive = 10000.0  # replies over which beta may change by a fifth (Ziegler et al. 2019)
    gamma: Fraction = 1.0  # discount per token
    lam: Fraction = 0.95  # GAE's lambda: 0 trusts the critic, 1 the sampled return
    whiten: Literal["population", "sample", "none"] = "population"  # advantages to mean 0 and variance 1 over the whole rollout: which variance
    advantage_clip: NonNegative = 0.0  # advantages (after --whiten) are held within this distance of 0; 0 is off
    policy_loss: Literal["clip", "penalty"] = "clip"  # PPO's clipped ratio, or its penalty on KL(old || new)
    clip: Positive = 0.2  # the probability ratio counts within 1 - clip and 1 + clip
    dual_clip: NonNegative = 0.0  # tokens with a negative advantage lose at most this (above 1) times it; 0 is off
    penalty_coef: NonNegative = 1.0  # weight of KL(old || new) in --policy-loss penalty, to begin with
    penalty_target: NonNegative = 0.0  # double or halve that weight to hold KL(old || new) near this, nats per token; 0 keeps it
    value_clip: NonNegative = 2.0  # values count within this distance of the old ones, in units of the score; 0 is off
    entropy_coef: NonNegative = 0.0  # weight of the entropy bonus, per nat
    kl_stop: NonNegative = 0.0  # end a rollout's update once KL(old || new) of a minibatch is above this, nats per token; 0 is off
    ptx_coef: NonNegative = 0.0  # weight of the log-likelihood of --ptx-data, per nat and token (PPO-ptx)
    ptx_data: str = ""  # toy, or a file of demonstrations or plain text, for --ptx-coef
    ptx_tokens: Count = 2048  # tokens of --ptx-data per optimiser step over all ranks, padding included
    ema: Probability = 0.0  # keep an average of the policy in OUT/ema, with this decay per optimiser step (0.992 is usual); 0 is off
    frozen_device: Literal["same", "cpu"] = "same"  # where reference and reward models are: with the policy, or on the CPU (slow, but leaves a GPU's memory)
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights of reference and reward models
    kl_limit: Positive = 20.0  # warn when the KL per reply is above this, nats
    kl_limit_stop: bool = False  # and end the run there
    sample_every: Count = 20  # rollouts between printed samples


ROUNDING = 1e-6  # relative: fp32 numbers that differ by less are taken to be equal
RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}  # largest |log ratio| that rounding explains


def judge_missing_eos(scores, ended, rule, penalty, lowest):
    """Scores (B,) with those of replies that were cut off before their end token (ended False) set by a rule.

    floor: the lowest score of the rollout less penalty, as a reward model has not seen such replies and ending must
    never be worse; replace: -penalty; subtract: the reply's score less penalty.
    """
    cut_off = {"floor": lowest - penalty, "replace": torch.full_like(scores, -penalty), "subtract": scores - penalty}[rule]
    return torch.where(ended, scores, cut_off)


def update_moments(moments, x, all_sum=lambda t: t):
    """Count, mean and sum of squared deviations of all numbers seen, with x (B,) of all ranks added (Chan et al. 1979)."""
    count, total = all_sum(torch.stack([x.new_tensor(len(x)), x.sum()])).tolist()
    mean = total / count
    squares = all_sum((x - mean).square().sum()).item()
    seen, old_mean, old_squares = moments
    n, shift = seen + count, mean - old_mean
    return [n, old_mean + shift * count / n, old_squares + squares + shift**2 * seen * count / n]


def normalise_scores(scores, moments, kind, clip):
    """Scores (B,) over their running deviation (scale), or less their running mean first (standard); held within +-clip.

    moments as from `update_moments`; clip 0 is off. Zheng et al. 2023 (Secrets of RLHF I), eq. 17 and section 5.3.1.
    """
    if kind not in ("none", "scale", "standard"):
        raise ValueError(f"unknown normalisation {kind}")
    if kind != "none":
        count, mean, squares = moments
        deviation = math.sqrt(squares / max(1, count - 1))
        # All scores have been equal so far, and their mean in fp32 is not quite theirs.
        if deviation <= ROUNDING * abs(mean):
            deviation = 1.0
        scores = (scores - (mean if kind == "standard" else 0.0)) / (deviation + 1e-8)
    return scores.clamp(-clip, clip) if clip > 0 else scores


def kl_estimate(logprobs, ref_logprobs, kind):
    """Per-token estimate of KL(pi || ref) from tokens drawn from pi, in nats: kind k1, k2 or k3, any shape."""
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator {kind}")


def steps_mask(mask, reward_at, all_max=lambda t: t):
    """Which positions get a reward and a value: the response, mask (B, T), and for `next` one more, but not for the longest replies.

    (TRL pads replies to the longest one of the rollout, and what fills that width has no room behind it.) The last
    column of mask is free. all_max: the maximum over all ranks.
    """
    if reward_at == "eos":
        return mask
    if reward_at != "next":
        raise ValueError(f"unknown place of the reward {reward_at}")
    length = mask.sum(1, keepdim=True)  # (B, 1)
    longest = all_max(length.max())
    return mask | (F.pad(mask, (1, 0))[:, :-1] & (length < longest))


def shaped_rewards(scores, kl, steps, kl_coef):
    """r_t = -kl_coef * kl_t, plus the score at the last of a reply's steps (the end token, if there is one).

    scores (B,), kl (B, T), steps (B, T) bool -> (B, T), zero outside steps. A row without steps gets nothing.
    """
    T = steps.shape[1]
    last = (steps * torch.arange(1, T + 1, device=steps.device)).argmax(1)  # (B,)
    rewards = torch.where(steps, -kl_coef * kl, 0.0)
    return rewards.scatter_add(1, last[:, None], torch.where(steps.any(1), scores, 0.0)[:, None])


def gae(rewards, values, steps, gamma, lam):
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, values, steps (B, T); a reply's steps are one run of True. The value after the last token is 0, for replies
    that were cut off too. delta_t = r_t + gamma V_t+1 - V_t;  A_t = delta_t + gamma lam A_t+1;  return = A + V.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(steps[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(steps[:, t], values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(steps, advantages + values, 0.0)


def whiten(x, mask, all_sum=lambda t: t, variance="population"):
    """Shift and scale x (B, T) to mean 0 and variance 1 (population, or sample: over n - 1) over the mask of all ranks; zero elsewhere."""
    if variance not in ("population", "sample"):
        raise ValueError(f"unknown variance {variance}")
    x = torch.where(mask, x, 0.0)
    total, count = all_sum(torch.stack([x.sum(), mask.sum().to(x.dtype)]))
    mean = total / count.clamp(min=1)
    centred = torch.where(mask, x - mean, 0.0)
    squares = all_sum(centred.square().sum())
    return centred * torch.rsqrt(squares / (count if variance == "population" else count - 1).clamp(min=1) + 1e-8)


def variance(x, mask, all_sum=lambda t: t):
    """Variance of x (B, T) over the mask of all ranks."""
    count, total = all_sum(torch.stack([mask.sum(), (x * mask).sum()]))
    return all_sum(((x - total / count).square() * mask).sum()) / count


def explained_variance(values, returns, mask, all_sum=lambda t: t):
    """Share of the returns' variance that the values explain: 1 - var(returns - values) / var(returns).

    All (B, T). 0 where the returns don't vary, beyond the rounding of their mean: then there is nothing to explain.
    """
    size = all_sum((returns.square() * mask).sum()) / all_sum(mask.sum()).clamp(min=1)
    spread = variance(returns, mask, all_sum)
    share = 1 - variance(returns - values, mask, all_sum) / spread
    return torch.where(spread > ROUNDING**2 * size, share, 0.0)


# The losses are sums over the mask divided by tokens: the count of the whole minibatch, over all micro-batches and ranks.

def policy_loss(logprobs, old_logprobs, advantages, mask, clip, tokens, kind="clip", dual_clip=0.0, penalty_coef=0.0):
    """clip: the clipped surrogate (Schulman et al. 2017, eq. 7); penalty: -ratio * A + penalty_coef * KL(old || new) (eq. 8).

    logprobs, old_logprobs, advantages, mask (B, T). dual_clip > 1 bounds the loss of a token with A < 0 by -dual_clip * A
    (Ye et al. 2020, eq. 5). Returns (scalar, {clip_fraction, approx_kl}); approx_kl is k3 of KL(old || new), per token.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    kl = torch.expm1(log_ratio) - log_ratio  # unbiased, in its gradient too: the tokens were drawn from old
    if kind == "penalty":
        loss = -advantages * ratio + penalty_coef * kl
    elif kind != "clip":
        raise ValueError(f"unknown policy loss {kind}")
    else:
        loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
        if dual_clip > 0:
            loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    clipped = (ratio.detach() - 1).abs() > clip
    stats = {"clip_fraction": clipped, "approx_kl": kl.detach()}
    return (loss * mask).sum() / tokens, {k: (v * mask).sum() / tokens for k, v in stats.items()}


def kl_loss(logprobs, old_logprobs, ref_logprobs, mask, kind, tokens):
    """A KL(pi || ref) term for the loss; for k2 and k3 its gradient is that of each token's KL, also once pi has left old.

    All (B, T) -> scalar. E_old[ratio * k3] is the KL itself. grad k2 = lr * grad log pi, which has the right mean under pi,
    hence the constant ratio before it. k1's gradient has mean zero under pi, and is here to be looked at.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20).exp()
    weight = {"k1": 1.0, "k2": ratio.detach(), "k3": ratio}[kind]
    return (weight * torch.where(mask, kl_estimate(logprobs, ref_logprobs, kind), 0.0)).sum() / tokens


def value_loss(values, old_values, returns, steps, clip, tokens):
    """Half the squared error, the worse of the value and of the value held within clip of the old one (clip 0: of the value).

    values, old_values, returns, steps (B, T) -> (sum over the steps / tokens, {value_clip_fraction}).
    """
    losses = (values - returns).square()
    stats = {}
    if clip > 0:
        held = old_values + (values - old_values).clamp(-clip, clip)
        losses = torch.maximum(losses, (held - returns).square())
        stats = {"value_clip_fraction": (((values - old_values).abs() > clip) & steps).sum() / tokens}
    return 0.5 * (losses * steps).sum() / tokens, stats


def adapt_kl_coef(kl_coef, kl, target, replies, horizon):
    """Proportional control of beta (Ziegler et al. 2019, section 2.2); kl: mean over replies of the sum over tokens."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * replies / horizon)


def adapt_penalty(penalty_coef, kl, target):
    """Double or halve the weight of KL(old || new) when it leaves [target / 1.5, target * 1.5] (Schulman et al. 2017, section 4)."""
    return penalty_coef * (2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0)


def diagnose(history, kl_limit):
    """What is unhealthy in a run's rows of metrics so far, oldest first: {symptom: one line with the switch to try}."""
    found, last, window = {}, history[-1], 5

    def mean(name, rows):
        return sum(row[name] for row in rows) / len(rows)

    if last["kl"] > kl_limit:
        found["kl"] = f"the KL to the reference, {last['kl']:.1f} nats per reply, is beyond --kl-limit {kl_limit:g}: raise --kl-coef (or set --kl-target), or lower --lr"
    if len(history) >= 2 * window:
        early, late = history[:window], history[-window:]
        if all(row["explained_variance"] < 0 for row in history[-2 * window:]):
            found["critic"] = f"the critic has explained nothing of the returns for {2 * window} rollouts: try --critic-warmup {2 * window}, another --critic-lr or --critic-init"
        if mean("eos_rate", late) < mean("eos_rate", early) - 0.1:
            found["eos"] = (f"replies that end by themselves fell from {mean('eos_rate', early):.2f} to {mean('eos_rate', late):.2f}: "
                            "raise --missing-eos-penalty or --max-new-tokens; is there an end token in the data?")
        if mean("entropy", late) < 0.05 * mean("entropy", early):
            found["entropy"] = f"entropy fell to {mean('entropy', late):.2g} nats per token, a twentieth of what it was: raise --kl-coef or --entropy-coef, or lower --lr"
    if "gold" in last and len(history) >= 3 * window:
        ends = range(window, len(history) + 1)
        best = max(ends, key=lambda end: mean("gold", history[end - window:end]))
        before, late = history[best - window:best], history[-window:]
        if mean("gold", late) < mean("gold", before) - 0.1 and mean("score", late) > mean("score", before):
            found["gold"] = (f"the score rises while the gold score fell from {mean('gold', before):.2f} to {mean('gold', late):.2f} (over-optimisation): "
                             "raise --kl-coef, stop earlier, or train the reward model on replies of this policy")
    return found


def average_of(policy, shares):
    """A copy of the policy to average its weights in. shares: what is frozen stays the policy's own."""
    frozen = {id(p): p for p in policy.parameters() if shares and not p.requires_grad}
    return copy.deepcopy(policy, frozen).requires_grad_(False)


def main(config):
    config.reward = config.reward or ([] if config.reward_fn else ["runs/reward"])
    run = Run(config)
    require(config.rollout_batch % run.world_size == 0, f"--rollout-batch {config.rollout_batch} is not divisible by {run.world_size} ranks")
    share = config.rollout_batch // run.world_size  # prompts per rollout on this rank
    require(share % config.minibatches == 0, f"a rank's {share} prompts are not divisible into --minibatches {config.minibatches}")
    require(config.kl_target == 0 or config.kl_coef > 0, "--kl-target needs a --kl-coef above 0 to start from")
    require(config.kl_target == 0 or config.rollout_batch <= config.kl_horizon, "--kl-horizon must be at least --rollout-batch")
    require(config.dual_clip == 0 or (config.dual_clip > 1 and config.policy_loss == "clip"), "--dual-clip must be above 1, and is for --policy-loss clip")
    require(config.penalty_target == 0 or (config.policy_loss == "penalty" and config.penalty_coef > 0),
            "--penalty-target is for --policy-loss penalty, with a --penalty-coef above 0 to start from")
    updates = config.epochs * config.minibatches  # optimiser steps per rollout
    require(updates > 1 or config.penalty_target == config.kl_stop == 0, "--penalty-target and --kl-stop need more than one of --epochs or --minibatches")
    require((config.ptx_coef > 0) == bool(config.ptx_data), "--ptx-coef and --ptx-data go together")
    require(config.critic_warmup < config.steps, f"--critic-warmup {config.critic_warmup} leaves none of {config.steps} rollouts to train the policy on")
    if config.kl_coef > 0 and (config.kl == "k1") == (config.kl_in == "loss"):
        run.say(f"warning: --kl {config.kl} --kl-in {config.kl_in} has the wrong gradient (see the top of ppo.py); "
                f"{'k2 and k3 have' if config.kl_in == 'loss' else 'k1 has'} the right one there")

    # the models: policy, reference, what scores, critic
    policy_model, tokenizer = open_model(config, GPT)
    # With adapters, what is frozen is shared: the reference is the policy without them, and the reward model the
    # critic without its own. (Shards have one owner, so there each model is whole.)
    shares = config.lora_rank > 0 and config.parallel == "ddp"
    reference = twin(policy_model, shares)
    sources = config.reward + config.reward_fn
    require(len(config.reward_weights) in (0, len(sources)),
            f"{len(config.reward_weights)} --reward-weights for {len(sources)} rewards ({', '.join(sources)})")
    require(all(map(math.isfinite, config.reward_weights)), "--reward-weights must be finite numbers")
    weights = torch.tensor(config.reward_weights or [1.0] * len(sources), device=run.device)  # (sources,)
    reward_fns = [reward_function(spec, run.device) for spec in config.reward_fn]
    reward_models = []
    for folder in config.reward:
        reward_model, reward_tokenizer = load_model(folder, ScalarModel, allow_pickle=config.allow_pickle)
        require(reward_tokenizer.same_as(tokenizer), f"--reward {folder} has another tokenizer than --model {config.model}")
        reward_models.append(reward_model)
    critic_init = config.critic_init
    if critic_init == "auto":
        critic_init = "reward" if config.reward else "zero"
    require(critic_init != "reward" or config.reward, "--critic-init reward needs a --reward folder; use sft or zero")
    if critic_init == "reward":
        critic_model = twin(reward_models[0], shares)
    elif critic_init not in ("sft", "zero"):
        raise ValueError(f"unknown start of the critic {critic_init}")
    else:
        torch.manual_seed(config.seed)
        critic_model = ScalarModel.from_trunk(policy_model, shares)
        if critic_init == "zero":
            torch.nn.init.zeros_(critic_model.score.weight)
    sharing = []
    if shares:
        sharing = [reference] + (reward_models[:1] if critic_init == "reward" else [])
    for model in [reference, *reward_models]:
        model.requires_grad_(False).eval()
        if any(model is other for other in sharing):
            # Its weights are the trained model's; what it has alone, a head, has to move as well.
            model.to(run.device)
            continue
        model.to(getattr(torch, config.frozen_dtype))
        if config.frozen_device == "same":
            run.parallel(model)
    prepare(policy_model, config)
    prepare(critic_model, config)
    ema = average_of(policy_model, shares) if config.ema > 0 else None
    policy, critic = run.parallel(policy_model), run.parallel(critic_model)
    policy_optimizer = adamw(policy_model, config.lr, eps=1e-5)
    critic_optimizer = adamw(critic_model, config.critic_lr, eps=1e-5)
    modules = {"policy": policy_model, "critic": critic_model}
    optimizers = {"policy_optimizer": policy_optimizer, "critic_optimizer": critic_optimizer}
    save = {"": lambda folder: save_model(folder, policy_model, tokenizer, config)}
    if ema:
        modules["ema"] = run.parallel(ema)
        save["ema"] = lambda folder: save_model(folder, ema, tokenizer, config)

    # prompts, and demonstrations for PPO-ptx
    world = toy.World(config.seed) if config.data == "toy" else None
    require(not (world and config.part), "--part is for files, not for the toy task")
    rows = world.prompts("train") if world else split_by_prompt(read_rows(config.data, "prompts", run.say, config.part, config.skip_bad), config.val_fraction)[0]
    require(rows, f"--val-fraction {config.val_fraction} leaves no prompt")
    prompts = [(row, encode_prompt(tokenizer, row.prompt)) for row in rows]
    context = min(model.config.block_size for model in [policy_model, critic_model, *reward_models])
    context = min(config.max_length or context, context)
    require(config.max_new_tokens < context, f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in the context of {context}")
    prompts = drop_long(prompts, [len(ids) for _, ids in prompts], context - config.max_new_tokens, run.say)
    run.say(f"{len(prompts)} prompts, for instance\n{describe(tokenizer, prompts[0][1], [False] * len(prompts[0][1]))}")
    if config.ptx_coef > 0:
        rows = toy.World(config.seed).demonstrations("train") if config.ptx_data == "toy" else read_rows(config.ptx_data, "demonstrations", run.say)
        ptx = encode_demonstrations(tokenizer, rows, context, run.say)
        ptx_lengths = [len(ids) for ids, _ in ptx]

    # a mistake in a function should show before anything is written
    check_functions(config.reward_fn, reward_fns, [row for row, _ in prompts], run.say)
    first, state = run.begin(modules, optimizers, save, best="reward")
    kl_coef, penalty_coef, moments = (state.get(name, start) for name, start in
                                      (("kl_coef", config.kl_coef), ("penalty_coef", config.penalty_coef), ("moments", [0, 0.0, 0.0])))
    order = endless_order(len(prompts), config.seed, first * config.rollout_batch)
    if config.ptx_coef > 0:
        ptx_batches = endless_batches(ptx_lengths, config.ptx_tokens, config.seed, first * updates)
    policy.eval(), critic.eval()  # no dropout: the ratio to the old policy must be 1 where nothing has changed
    rows = [json.loads(line) for line in open(run.out / "metrics.jsonl")] if first and run.main else []
    history, warned = [row for row in rows if {"score", "kl", "entropy", "eos_rate", "explained_variance"} <= row.keys()], {}  # the finite ones

    for step in run.steps(first, config.steps):
        generator = run.seed_step(step)
        clock = [run.clock()]

        # 1. rollout
        chosen = sorted((next(order) for _ in range(config.rollout_batch)), key=lambda i: len(prompts[i][1]))[run.rank::run.world_size]  # equal work for all ranks
        ptx_drawn = [next(ptx_batches) for _ in range(updates)] if config.ptx_coef > 0 else []  # in rollouts that are skipped, too
        uniform = uniforms(config.rollout_batch, config.max_new_tokens, generator, run.device)[run.rank::run.world_size]  # replies don't depend on the ranks
        run.doing = f"step {step + 1}, sampling {config.rollout_rows or share} replies at once"
        with run.gathered(policy_model), run.autocast():
            rollout = generate(policy_model, [prompts[i][1] for i in chosen], config.max_new_tokens, tokenizer,
                               config.temperature, rows=config.rollout_rows, uniform=uniform, interrupted=run.asked_to_stop)
        run.safe_point()
        ids, mask, lengths, ended = rollout  # (B, T), (B, T), (B,), (B,)
        texts, questions = rollout.texts(tokenizer), [prompts[i][0].text for i in chosen]
        if config.reward_at == "next":
            ids, mask = F.pad(ids, (0, 1), value=tokenizer.pad), F.pad(mask, (0, 1))
        steps = steps_mask(mask, config.reward_at, run.all_max)  # (B, T)
        size = (lengths + steps.sum(1) - mask.sum(1)).tolist()
        host_mask, host_steps, host_lengths = mask.cpu(), steps.cpu(), lengths.cpu()  # see token_index
        clock.append(run.clock())

        # 2. score: what the losses call old is computed here, by the forward pass that trains, not by the sampler
        old_logprobs, ref_logprobs, old_values, entropy = (torch.zeros(ids.shape, device=run.device) for _ in range(4))  # (B, T)
        parts = torch.zeros(len(sources), share, device=run.device)
        with torch.no_grad(), run.autocast():
            pieces = by_length(range(share), size, config.micro_batch_tokens)
            for piece, _ in run.passes(fill_up(pieces, int(run.all_max(torch.tensor(len(pieces), device=run.device))), pieces[0])):
                rows, T = torch.tensor(piece).to(run.device, non_blocking=True), max(size[i] for i in piece)
                part, part_mask = ids[rows, :T], host_mask[piece, :T]
                old_logprobs[rows, :T], entropy[rows, :T] = policy_model(part, part_mask, config.temperature, with_entropy=True)
                ref_logprobs[rows, :T] = reference(part.to(reference.device), part_mask, config.temperature)[0].to(run.device)
                old_values[rows, :T] = values_before(critic_model, part, host_steps[piece, :T])
                for source, reward_model in enumerate(reward_models):
                    parts[source, rows] = last_scores(reward_model, part.to(reward_model.device), host_lengths[piece]).to(run.device)
        for source, function in enumerate(reward_fns, len(reward_models)):
            parts[source] = function(questions, texts, [prompts[i][0].answer for i in chosen])
        scores = weights @ parts  # (B,)
        if not run.finite("the score", scores, chosen):
            continue

        # 3. rewards
        judged = judge_missing_eos(scores, ended, config.missing_eos, config.missing_eos_penalty, run.all_min(scores.min()))
        if config.reward_norm != "none":
            moments = update_moments(moments, judged, run.all_sum)
        judged = normalise_scores(judged, moments, config.reward_norm, config.reward_clip)
        kl = kl_estimate(old_logprobs, ref_logprobs, config.kl)  # (B, T)
        rewards = shaped_rewards(judged, kl, steps, {"reward": kl_coef, "loss": 0.0}[config.kl_in])

        # 4. advantages
        advantages, returns = gae(rewards, old_values, steps, config.gamma, config.lam)
        explained = explained_variance(old_values, returns, steps, run.all_sum)
        if config.whiten != "none":
            advantages = whiten(advantages, mask, run.all_sum, config.whiten)
        if config.advantage_clip > 0:
            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
        clock.append(run.clock())

        # 5. update
        totals, off_by, stopped = {}, torch.zeros((), device=run.device), False
        lr = scheduled_lr(max(0, step - config.critic_warmup), config.steps - config.critic_warmup, config.warmup, config.lr, config.lr_schedule)
        critic_lr = scheduled_lr(step, config.steps, config.warmup, config.critic_lr, config.critic_lr_schedule)
        train_policy = step >= config.critic_warmup
        # replies lie in as many lanes as a minibatch has rows, and each lane gives one to every minibatch in a random order: so the
        lanes = share // config.minibatches  # ranks, which own whole lanes, have equally many in each, and their number changes nothing
        picks = torch.rand(config.epochs, config.minibatches, lanes * run.world_size, generator=generator, device=run.device).argsort(1)
        batches = (picks.cpu().flatten(0, 1)[:, run.rank::run.world_size] * lanes + torch.arange(lanes)).tolist()  # (epochs * minibatches, lanes) replies of this rank
        plans = [by_length(picked, size, config.micro_batch_tokens) for picked in batches]
        counts = run.all_max(torch.tensor([len(plan) for plan in plans], device=run.device)).tolist()
        grad_norm = critic_grad_norm = torch.zeros(())

        def add(name, value):  # to the mean over the update
            totals[name] = totals.get(name, 0) + value.detach() / updates

        for number, picked in enumerate(batches):
            # of the whole minibatch: short replies weigh by their tokens
            own = torch.stack([host_mask[picked].sum(), host_steps[picked].sum()])
            tokens, value_tokens = run.all_sum(own.to(run.device, non_blocking=True))
            old_new_kl = torch.zeros((), device=run.device)  # of this minibatch, per token
            pieces = [("ppo", *piece) for piece in fill_up(plans[number], counts[number], picked[:1])]
            if ptx_drawn and train_policy:
                pieces = [("ptx", *piece) for piece in run.split(ptx_drawn[number], ptx_lengths, config.micro_batch_tokens)] + pieces
            for kind, piece, weight in run.passes(pieces, policy, critic):
                if kind == "ptx":  # its gradients are summed with those of PPO: one step for both
                    part, part_mask, _ = collate([ptx[i] for i in piece], tokenizer.pad, run.device)
                    with run.autocast():
                        ptx_loss = -policy(part, part_mask, summed=True)[0] * weight * config.ptx_coef / sum(sum(ptx[i][1]) for i in ptx_drawn[number])
                    run.backward(ptx_loss, policy_optimizer)
                    add("ptx_loss", ptx_loss / config.ptx_coef)
                    continue
                rows, T = torch.tensor(piece).to(run.device, non_blocking=True), max(size[i] for i in piece)
                part, part_mask, part_steps, old = ids[rows, :T], mask[rows, :T] & (weight > 0), steps[rows, :T] & (weight > 0), old_logprobs[rows, :T]
                losses, stats = {}, {}
                if train_policy:
                    with run.autocast():
                        logprobs, H = policy(part, host_mask[piece, :T], config.temperature, with_entropy=config.entropy_coef > 0)
                    losses["policy_loss"], stats = policy_loss(logprobs, old, advantages[rows, :T], part_mask, config.clip, tokens,
                                                               config.policy_loss, config.dual_clip, penalty_coef)
                    objective = losses["policy_loss"]
                    if config.entropy_coef > 0:
                        objective = objective - config.entropy_coef * (H * part_mask).sum() / tokens
                    if config.kl_in == "loss":
                        losses["kl_loss"] = kl_loss(logprobs, old, ref_logprobs[rows, :T], part_mask, config.kl, tokens)
                        objective = objective + kl_coef * losses["kl_loss"]
                    if number == 0:  # nothing has been updated yet, so the ratio to the old policy must be 1
                        off_by = torch.maximum(off_by, (logprobs.detach() - old).abs().max())
                    run.backward(objective, policy_optimizer)
                with run.autocast():
                    values = values_before(critic, part, host_steps[piece, :T])
                losses["value_loss"], value_stats = value_loss(values, old_values[rows, :T], returns[rows, :T], part_steps, config.value_clip, value_tokens)
                run.backward(losses["value_loss"], critic_optimizer)
                for name, value in {**losses, **stats, **value_stats}.items():
                    add(name, value)
                old_new_kl += stats.get("approx_kl", 0)
            if config.kl_stop > 0 or config.penalty_target > 0:
                old_new_kl = run.all_sum(old_new_kl).item()
            stopped = config.kl_stop > 0 and old_new_kl > config.kl_stop
            if stopped:
                policy_optimizer.zero_grad(), critic_optimizer.zero_grad()
                break
            if train_policy:
                grad_norm = run.optimizer_step(policy_optimizer, lr, config.max_grad_norm, [chosen[i] for i in picked])
                if ema:
                    with torch.no_grad():
                        torch._foreach_lerp_(list(ema.parameters()), list(policy_model.parameters()), 1 - config.ema)
            critic_grad_norm = run.optimizer_step(critic_optimizer, critic_lr, config.max_grad_norm, [chosen[i] for i in picked])

        # 6. control, log, save
        log_ratio = old_logprobs - ref_logprobs  # (B, T)
        all_tokens = run.all_sum(mask.sum())
        replies = {  # means over the replies; entropy, value and ref_nll are means over their tokens
            "score": scores.mean(), "kl": log_ratio.sum(1).mean(), "length": mask.sum(1).float().mean(), "eos_rate": ended.float().mean(),
            "kl_k3": kl_estimate(old_logprobs, ref_logprobs, "k3").sum(1).mean(), "reward": rewards.sum(1).mean(), "explained_variance": explained,
            "entropy": entropy.sum() / all_tokens * run.world_size, "value": old_values.sum() / all_tokens * run.world_size,
            "ref_nll": -ref_logprobs.sum() / all_tokens * run.world_size}
        if len(sources) > 1:
            replies |= {f"score_{name}": part.mean() for name, part in zip(short_names(sources), parts)}
        if world:
            gold = [world.gold(*reply) for reply in zip(questions, texts, ended.tolist())]
            replies["gold"] = torch.tensor(gold, device=run.device).mean()
        names, values = zip(*replies.items())
        means = dict(zip(names, (run.all_sum(torch.stack(values)) / run.world_size).tolist()))
        names, values = zip(*totals.items())
        means |= {name: value * updates / (number + 1) for name, value in zip(names, run.all_sum(torch.stack(values)).tolist())}
        means |= {"ref_perplexity": math.exp(min(means.pop("ref_nll"), 700.0)), "updates": number + 1 - stopped}
        clock.append(run.clock())
        seconds = {name: after - before for name, before, after in zip(("rollout", "score", "update"), clock, clock[1:])}
        tokens, off_by = all_tokens.item(), -run.all_min(-off_by)  # the largest of all ranks
        if off_by > RATIO_TOLERANCE[run.dtype]:
            run.say(f"warning: step {step + 1}: log-probabilities of an unchanged policy moved by {off_by:.2g}; the ratio should be 1, so something "
                    "differs between the two passes (dropout? --dtype float32 tells whether it is rounding)")
        history.append(means)
        if len(history) > 300:
            del history[5]  # the first five stay, to compare with
        for symptom, advice in diagnose(history, config.kl_limit).items():
            if step - warned.get(symptom, -20) >= 20:
                warned[symptom] = step
                run.say(f"warning: step {step + 1}: {advice}")
        if run.time_to_log(step):
            run.log(step + 1, means | {"kl_coef": kl_coef, "lr": lr * train_policy, "critic_lr": critic_lr, "grad_norm": grad_norm, "critic_grad_norm": critic_grad_norm,
                                   "ratio_error": off_by}
                    | {f"{name}_tokens_per_second": tokens * (config.epochs * (number + 1) / updates if name == "update" else 1) / s for name, s in seconds.items()}
                    | {f"{name}_share": s / (clock[-1] - clock[0]) for name, s in seconds.items()}
                    | ({"penalty_coef": penalty_coef} if config.policy_loss == "penalty" else {}),
                    show=("score", "gold", "kl", "entropy", "length", "eos_rate", "clip_fraction", "explained_variance"))
        if (step + 1) % config.sample_every == 0 or step + 1 == config.steps:
            for i in range(0, share, max(1, share // 3))[:3]:
                run.say(f"  sample: {questions[i]!r} -> {texts[i]!r} (score {scores[i]:.2f})")
        if config.kl_target > 0 and train_policy:
            kl_coef = adapt_kl_coef(kl_coef, means["kl"], config.kl_target, config.rollout_batch, config.kl_horizon)
        if config.penalty_target > 0 and train_policy:
            penalty_coef = adapt_penalty(penalty_coef, old_new_kl, config.penalty_target)
        state |= {"kl_coef": kl_coef, "penalty_coef": penalty_coef, "moments": moments}
        if config.kl_limit_stop and means["kl"] > config.kl_limit:
            run.problem = f"step {step + 1}: the KL per reply, {means['kl']:.1f} nats, is beyond --kl-limit {config.kl_limit:g}, and --kl-limit-stop was asked for"


if __name__ == "__main__":
    run_script(main, Config, __doc__)
