"""PPO on a reward: raise the score of sampled replies without leaving the reference policy too far behind.

    maximise  E_{x, y ~ pi}[ s(x, y) - beta * log(pi(y|x) / ref(y|x)) ] + c * E_{x, y ~ D}[ log pi(y|x) ]
                                                                                        (InstructGPT, eq. 2)

whose optimum without the second term (--ptx-coef, off by default) is

    pi*(y|x) = ref(y|x) exp(s(x, y) / beta) / Z(x)

bench/optimum.py shows that this file reaches it. Four models: policy (trained, from SFT), reference (the same
weights, frozen), reward model (frozen), critic (trained, from the reward model). One step of the script:

    1. rollout     sample a reply to each prompt, at the temperature that all log-probabilities are taken at
    2. score       reward models and functions; log-probabilities of policy and reference; the critic's values
    3. rewards     r_t = -beta * kl_t, plus the score at the last token
    4. advantages  generalised advantage estimation, whitened over the batch
    5. update      some epochs of policy and value losses on minibatches
    6. control, log, save

Token t of the response is action t; all below is aligned with tokens, (B, T), zero outside the response:

    prompt | a    b    c  <eos>         logprobs[t] = log pi(token t | tokens before t)
           | r    r    r  r + score     values[t]   = V(tokens before t)

The KL divergence to the reference, with lr = log pi(a) - log ref(a) for a drawn from pi (Schulman 2020):
    k1 = lr              unbiased. In the reward its policy gradient is grad KL(pi || ref): the default.
                         In the loss its gradient is zero on average: nothing holds the policy.
    k2 = lr^2 / 2        biased as a value, and wrong in the reward. In the loss its gradient is
                         grad KL(pi || ref).
    k3 = e^-lr - 1 + lr  unbiased with less variance: the number to log. In the reward its policy gradient is
                         grad KL(pi || ref) - grad KL(ref || pi), which vanishes near ref and pushes rare
                         tokens further down. In the loss, times the probability ratio to the sampling
                         policy, it has the very gradient of k2.
A term in the loss makes each token pay for its own KL alone, not for the KL that it leads to (the reward does
both, through the advantages), and whitened advantages change its weight: its optimum is pi* only for replies
of one token and --whiten none.

What differs between implementations, and the switch that restores it (bench/parity.py checks those of
TRL 1.12 to 1e-5):
    here                                   TRL 1.12's PPOTrainer, others              switch
    KL: k1 in the reward                   k1 or k3 in the reward (OpenRLHF: both)    --kl, --kl-in
    beta constant, or led by whole         constant (OpenRLHF: led by the mean        --kl-target
      replies' KL                            per token)
    score at the end token                 one position later, but for the longest    --reward-at next
    cut-off reply: the rollout's lowest    its own score - penalty (SFD, LMHP: -1)    --missing-eos subtract
      score - 1                                                                         | replace
    scores as they are                     the same (MOSS: over their running         --reward-norm scale
                                             deviation)
    advantages over the population         the sample deviation (MOSS: of the         --whiten sample
      deviation                              minibatch)
    values clipped within 2                within 0.2                                 --value-clip 0.2
    2 epochs of 4 minibatches, token       4 of 1, means of micro-batches averaged    --epochs 4
      means of each                                                                     --minibatches 1
    learning rates fall on a cosine        on a line                                  --lr-schedule,
                                                                                        --critic-lr-schedule
    gradients clipped to norm 1            not clipped                                --max-grad-norm 1e9
    PPO-ptx: gradients summed, one step    no ptx (DeepSpeed-Chat: the same)          --ptx-coef
    an optimiser each for policy, critic   one, value loss times 0.1                  none
    old log-probabilities from training    from the sampler                           none
      passes
    a reply ends with its end token        before the first pad, perhaps that token   none
    prompts padded on the right            on the left                                none
    metrics over response tokens           approx_kl, entropy over padding too        none
Left out: a trunk shared by policy and critic, a value behind the end of cut-off replies, whitened rewards.

--process adds a process reward model (process.py) to the score. What each step of a reply adds to it, or
takes from it, lands at that step's last token; all of it together is the reply's score, as without:

    prompt | a    b ;          c    d <eos>                    P, Q  P(good) of the first and second step
           | 0    P            0    P Q - P                    --process-score product

    python ppo.py --model runs/sft --reward runs/reward --data runs/toy/prompts.jsonl --judge toy:gold
    python ppo.py --model runs/sft --reward runs/reward --reward-fn mine:brevity --reward-weights 1 0.1
    torchrun --nproc-per-node 8 ppo.py --data prompts.jsonl --model sft --reward rm --rollout-batch 512

On the embedded task the first takes the gold score from 0.1 to 0.9 in 1.5 minutes on 2 cores.

Legend: B replies on this rank, T tokens, V vocabulary; n replies of a pass, W tokens of the longest of them.
"""
import copy
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F

from data import collate, encode_demonstrations, endless_batches, endless_order
from formats.model_folder import open_model, save_model
from formats.sources import read_rows
from judges import (
    Process, check_functions, combined, judge, load_functions, load_process, load_reward_models, models_of,
    score, short_names, source_weights, step_rewards)
from model import (
    GPT, ScalarModel, copy_of, frozen_reference, prepare_training, shares_frozen, values_before)
from plumbing.flags import (
    Count, Fraction, Natural, NonNegative, Positive, Probability, RunConfig, as_list, require)
from plumbing.health import Totals, Watch, shares_of_time
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr
from rollout import SAMPLED_AS_SCORED, draw_prompts, load_prompts, load_recorded, replay, sample

Schedule = Literal["cosine", "linear", "constant"]


@dataclass
class Config(RunConfig):
    REFUSED: ClassVar = SAMPLED_AS_SCORED
    # files whose prompts are used: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/toy/prompts.jsonl"
    # file of replies that another engine sampled, with token ids and log-probabilities (see README.md), in
    # place of --data and sampling
    rollouts: str = ""
    # what each token of --rollouts counts for the policy: 1; or policy / sampler, of the token or of its
    # whole reply
    importance: Literal["none", "token", "reply"] = "none"
    importance_limit: Positive = 2.0  # the most that it counts
    # checkpoint folder or hub name of the policy to start from, which is also the reference; or scratch
    model: str = "runs/sft"
    # checkpoint folders of reward models (default: runs/reward, unless there is a --reward-fn or --process)
    reward: list[str] = field(default_factory=list)
    # Python functions, module:function, which get lists (those that their parameters name: prompts, replies,
    # answers, ended) and return one number per reply
    reward_fn: list[str] = field(default_factory=list)
    # checkpoint folder of a process reward model (process.py): one more source of the score, whose parts land
    # at the ends of a reply's steps
    process: str = ""
    # score of some steps by it: the product of P(good), the least of them, or that of the last
    process_score: Literal["product", "min", "last"] = "product"
    # weight of each --reward, then of each --reward-fn, then of --process, in the sum that is the score
    # (default: 1 each)
    reward_weights: list[float] = field(default_factory=list)
    # how several --reward become one score: their weighted sum, the mean, the least, or the mean less
    # --pessimism deviations, which trusts less what they disagree on
    reward_combine: Literal["sum", "mean", "min", "pessimistic"] = "sum"
    pessimism: Positive = 1.0  # with --reward-combine pessimistic: deviations
    # functions as for --reward-fn, whose numbers are measured and logged under their names, and never trained
    # on
    judge: list[str] = field(default_factory=list)
    out: str = "runs/ppo"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 80  # rollouts, each followed by an update
    # share of a file's prompts left out; take that of the other stages, and evaluate.py has prompts that none
    # has seen
    val_fraction: Fraction = 0.0
    rollout_batch: Count = 256  # prompts per rollout over all ranks
    # replies that a rank samples at the same time, the other prompts wait for a place; 0: all. Lower it when
    # keys and values take too much memory
    rollout_rows: Natural = 0
    max_new_tokens: Count = 40  # longest reply, tokens
    temperature: Positive = 1.0  # of sampling; all log-probabilities are taken at it
    epochs: Count = 2  # passes over each rollout
    minibatches: Count = 4  # optimiser steps per pass
    # tokens per forward pass on one rank, at most; lower it when memory is short
    micro_batch_tokens: Count = 8192
    lr: Positive = 1e-3  # peak learning rate of the policy
    critic_lr: Positive = 1e-3  # peak learning rate of the critic
    # the policy's: to a tenth on a cosine, to zero on a line, or constant
    lr_schedule: Schedule = "cosine"
    critic_lr_schedule: Schedule = "cosine"  # the critic's
    warmup: Natural = 5  # rollouts of linear warm-up, both networks
    max_grad_norm: Positive = 1.0  # gradients of policy and of critic are scaled down to this norm
    # trunk and head of the reward model; --model's trunk with a random head, or with a head of zeros; auto:
    # reward, or zero if there is none
    critic_init: Literal["auto", "reward", "sft", "zero"] = "auto"
    critic_warmup: Natural = 0  # rollouts at the start that train the critic alone
    # score of a reply cut off before its end token: the rollout's lowest less the penalty; minus the penalty;
    # its own less the penalty
    missing_eos: Literal["floor", "replace", "subtract"] = "floor"
    missing_eos_penalty: NonNegative = 1.0  # for --missing-eos, in units of the score
    # divide scores by their running deviation; or subtract the running mean first
    reward_norm: Literal["none", "scale", "standard"] = "none"
    # scores (after --reward-norm) are held within this distance of 0; 0 is off
    reward_clip: NonNegative = 0.0
    # the score counts at the last token, or one position later (as TRL has it)
    reward_at: Literal["eos", "next"] = "eos"
    kl: Literal["k1", "k2", "k3"] = "k1"  # estimator of the KL term
    kl_in: Literal["reward", "loss"] = "reward"  # where the KL term stands
    kl_coef: NonNegative = 0.1  # beta, score per nat
    # adapt beta so that the KL per reply (nats) stays near this; 0 keeps beta
    kl_target: NonNegative = 0.0
    # replies over which beta may change by a fifth (Ziegler et al. 2019)
    kl_horizon: Positive = 10000.0
    gamma: Fraction = 1.0  # discount per token
    lam: Fraction = 0.95  # GAE's lambda: 0 trusts the critic, 1 the sampled return
    # advantages to mean 0 and variance 1 over the whole rollout: which variance
    whiten: Literal["population", "sample", "none"] = "population"
    # advantages (after --whiten) are held within this distance of 0; 0 is off
    advantage_clip: NonNegative = 0.0
    policy_loss: Literal["clip", "penalty"] = "clip"  # PPO's clipped ratio, or its penalty on KL(old || new)
    clip: Positive = 0.2  # the probability ratio counts within 1 - clip and 1 + clip
    # tokens with a negative advantage lose at most this (above 1) times it; 0 is off
    dual_clip: NonNegative = 0.0
    penalty_coef: NonNegative = 1.0  # weight of KL(old || new) in --policy-loss penalty, to begin with
    # double or halve that weight to hold KL(old || new) near this, nats per token; 0 keeps it
    penalty_target: NonNegative = 0.0
    # values count within this distance of the old ones, in units of the score; 0 is off
    value_clip: NonNegative = 2.0
    entropy_coef: NonNegative = 0.0  # weight of the entropy bonus, per nat
    # end a rollout's update once KL(old || new) of a minibatch is above this, nats per token; 0 is off
    kl_stop: NonNegative = 0.0
    ptx_coef: NonNegative = 0.0  # weight of the log-likelihood of --ptx-data, per nat and token (PPO-ptx)
    ptx_data: str = ""  # a file of demonstrations or plain text, for --ptx-coef
    ptx_tokens: Count = 2048  # tokens of --ptx-data per optimiser step over all ranks, padding included
    # keep an average of the policy in OUT/ema, with this decay per optimiser step (0.992 is usual); 0 is off
    ema: Probability = 0.0
    # where reference and reward models are: with the policy, or on the CPU (slow, but leaves a GPU's memory)
    frozen_device: Literal["same", "cpu"] = "same"
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights of reference and reward models
    kl_limit: Positive = 20.0  # warn when the KL per reply is above this, nats
    kl_limit_stop: bool = False  # and end the run there
    sample_every: Count = 20  # rollouts between printed samples


# Relative: fp32 numbers that differ by less are taken to be equal.
ROUNDING = 1e-6
# Metrics on the progress bar, besides the score and the judges' numbers.
WATCHED = ("kl", "entropy", "length", "eos_rate", "clip_fraction", "explained_variance")


def missing_eos_scores(scores, ended, rule, penalty, lowest):
    """Scores (B,) with those of replies that were cut off before their end token (ended False) set by a rule.

    floor: the lowest score of the rollout less penalty, as a reward model has not seen such replies and
    ending must never be worse; replace: -penalty; subtract: the reply's score less penalty.
    """
    if rule == "floor":
        cut_off = lowest - penalty
    elif rule == "replace":
        cut_off = torch.full_like(scores, -penalty)
    elif rule == "subtract":
        cut_off = scores - penalty
    else:
        raise ValueError(f"unknown rule for missing end tokens {rule}")
    return torch.where(ended, scores, cut_off)


def update_moments(moments, x, all_sum=lambda t: t):
    """Count, mean and sum of squared deviations of all numbers seen, with x (B,) of all ranks added (Chan et
    al. 1979).
    """
    count, total = all_sum(torch.stack([x.new_tensor(len(x)), x.sum()])).tolist()
    mean = total / count
    squares = all_sum((x - mean).square().sum()).item()
    seen, old_mean, old_squares = moments
    n, shift = seen + count, mean - old_mean
    return [n, old_mean + shift * count / n, old_squares + squares + shift**2 * seen * count / n]


def normalise_scores(scores, moments, kind, clip):
    """Scores (B,) over their running deviation (scale), or less their running mean first (standard); held
    within +-clip.

    moments as from `update_moments`; clip 0 is off. Zheng et al. 2023 (Secrets of RLHF I), eq. 17 and section
    5.3.1.
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
    """Per-token estimate of KL(pi || ref) from tokens drawn from pi, in nats: kind k1, k2 or k3, any shape.
    """
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator {kind}")


def steps_mask(mask, reward_at, all_max=lambda t: t):
    """Which positions get a reward and a value: the response, mask (B, T), and for `next` one more, but not
    for the longest replies.

    (TRL pads replies to the longest one of the rollout, and what fills that width has no room behind it.) The
    last column of mask is free. all_max: the maximum over all ranks.
    """
    if reward_at == "eos":
        return mask
    if reward_at != "next":
        raise ValueError(f"unknown place of the reward {reward_at}")
    length = mask.sum(1, keepdim=True)  # (B, 1)
    longest = all_max(length.max())
    return mask | (F.pad(mask, (1, 0))[:, :-1] & (length < longest))


def shaped_rewards(scores, kl, steps, kl_coef, parts=None):
    """r_t = -kl_coef * kl_t, plus the score at the last of a reply's steps (the end token, if there is one).

    scores (B,), kl (B, T), steps (B, T) bool -> (B, T), zero outside steps. A row without steps gets nothing.
    parts (B, T): those of the score that land elsewhere, at the ends of the steps that a process reward model
    judges; the last token then gets what they leave of it.
    """
    T = steps.shape[1]
    if parts is not None:
        return shaped_rewards(scores - parts.sum(1), kl, steps, kl_coef) + parts
    last = (steps * torch.arange(1, T + 1, device=steps.device)).argmax(1)  # (B,)
    rewards = torch.where(steps, -kl_coef * kl, 0.0)
    return rewards.scatter_add(1, last[:, None], torch.where(steps.any(1), scores, 0.0)[:, None])


def gae(rewards, values, steps, gamma, lam):
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, values, steps (B, T); a reply's steps are one run of True. The value after the last token is 0,
    for replies that were cut off too. delta_t = r_t + gamma V_t+1 - V_t;  A_t = delta_t + gamma lam A_t+1;
    return = A + V.
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
    """Shift and scale x (B, T) to mean 0 and variance 1 (population, or sample: over n - 1) over the mask of
    all ranks; zero elsewhere.
    """
    if variance not in ("population", "sample"):
        raise ValueError(f"unknown variance {variance}")
    x = torch.where(mask, x, 0.0)
    total, count = all_sum(torch.stack([x.sum(), mask.sum().to(x.dtype)]))
    mean = total / count.clamp(min=1)
    centred = torch.where(mask, x - mean, 0.0)
    squares = all_sum(centred.square().sum())
    if variance == "sample":
        count = count - 1
    return centred * torch.rsqrt(squares / count.clamp(min=1) + 1e-8)


def variance(x, mask, all_sum=lambda t: t):
    """Variance of x (B, T) over the mask of all ranks."""
    count, total = all_sum(torch.stack([mask.sum(), (x * mask).sum()]))
    return all_sum(((x - total / count).square() * mask).sum()) / count


def explained_variance(values, returns, mask, all_sum=lambda t: t):
    """Share of the returns' variance that the values explain: 1 - var(returns - values) / var(returns).

    All (B, T). 0 where the returns don't vary, beyond the rounding of their mean: then there is nothing to
    explain.
    """
    size = all_sum((returns.square() * mask).sum()) / all_sum(mask.sum()).clamp(min=1)
    spread = variance(returns, mask, all_sum)
    share = 1 - variance(returns - values, mask, all_sum) / spread
    return torch.where(spread > ROUNDING**2 * size, share, 0.0)


# The losses are sums over the mask divided by tokens: the count of the whole minibatch, over all micro-
# batches and ranks.

def policy_loss(logprobs, old_logprobs, advantages, mask, clip, tokens, kind="clip", dual_clip=0.0,
                penalty_coef=0.0, importance=1.0):
    """PPO's loss of the policy (Schulman et al. 2017).

    clip: the clipped surrogate (eq. 7); penalty: -ratio * A + penalty_coef * KL(old || new) (eq. 8).
    logprobs, old_logprobs, advantages, mask (B, T). dual_clip > 1 bounds the loss of a token with A < 0 by
    -dual_clip * A (Ye et al. 2020, eq. 5). importance (B, T): what each token counts. Returns (scalar,
    {clip_fraction, approx_kl}); approx_kl is k3 of KL(old || new), per token.
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
    loss = (loss * mask * importance).sum() / tokens
    return loss, {k: (v * mask).sum() / tokens for k, v in stats.items()}


def kl_loss(logprobs, old_logprobs, ref_logprobs, mask, kind, tokens, importance=1.0):
    """A KL(pi || ref) term for the loss.

    For k2 and k3 its gradient is that of each token's KL, also once pi has left old.

    All (B, T) -> scalar; importance: what each token counts. E_old[ratio * k3] is the KL itself. grad k2 =
    lr * grad log pi, which has the right mean under pi, hence the constant ratio before it. k1's gradient has
    mean zero under pi, and is here to be looked at.
    """
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20).exp()
    weight = {"k1": 1.0, "k2": ratio.detach(), "k3": ratio}[kind] * importance
    return (weight * torch.where(mask, kl_estimate(logprobs, ref_logprobs, kind), 0.0)).sum() / tokens


def importance_weights(logprobs, sampler_logprobs, mask, kind, limit):
    """What tokens count that another engine sampled (B, T), as in grpo.py: policy / sampler, at most limit.
    """
    log_ratio = torch.where(mask, logprobs - sampler_logprobs, 0.0)
    if kind == "none":
        return torch.ones_like(log_ratio)
    if kind == "reply":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask)
    elif kind != "token":
        raise ValueError(f"unknown importance {kind}")
    return log_ratio.clamp(max=math.log(limit)).exp()


def value_loss(values, old_values, returns, steps, clip, tokens):
    """Half the squared error of the value, or of the value held within clip of the old one if that is worse.

    With clip 0 it is the value's own.

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
    """Proportional control of beta (Ziegler et al. 2019, section 2.2). kl: of whole replies, their mean."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * replies / horizon)


def adapt_penalty(penalty_coef, kl, target):
    """Double or halve the weight of KL(old || new) when that leaves [target / 1.5, target * 1.5].

    Schulman et al. 2017, section 4.
    """
    if kl > 1.5 * target:
        return 2.0 * penalty_coef
    if kl < target / 1.5:
        return 0.5 * penalty_coef
    return penalty_coef


# ---------------------------------------------------------------------------------------------------------
# Before the first rollout

def check(config, folders, run):
    """UserError for flags that don't go together. folders: of the reward models."""
    B, ranks = config.rollout_batch, run.world_size
    require(B % ranks == 0, f"--rollout-batch {B} is not divisible by {ranks} ranks")
    require(B // ranks % config.minibatches == 0,
            f"a rank's {B // ranks} prompts are not divisible into --minibatches {config.minibatches}")
    require(config.importance == "none" or config.rollouts, "--importance is for --rollouts")
    require(config.kl_target == 0 or config.kl_coef > 0,
            "--kl-target needs a --kl-coef above 0 to start from")
    require(config.kl_target == 0 or B <= config.kl_horizon, "--kl-horizon must be at least --rollout-batch")
    require(config.dual_clip == 0 or (config.dual_clip > 1 and config.policy_loss == "clip"),
            "--dual-clip must be above 1, and is for --policy-loss clip")
    require(config.penalty_target == 0 or (config.policy_loss == "penalty" and config.penalty_coef > 0),
            "--penalty-target is for --policy-loss penalty, with a --penalty-coef above 0 to start from")
    require(config.epochs * config.minibatches > 1 or config.penalty_target == config.kl_stop == 0,
            "--penalty-target and --kl-stop need more than one of --epochs or --minibatches")
    require((config.ptx_coef > 0) == bool(config.ptx_data), "--ptx-coef and --ptx-data go together")
    require(config.critic_warmup < config.steps,
            f"--critic-warmup {config.critic_warmup} leaves none of {config.steps} rollouts to train the "
            "policy on")
    require(config.critic_init != "reward" or folders,
            "--critic-init reward needs a --reward folder; use sft or zero")
    require(not config.process or config.reward_norm == "none" and config.reward_clip == 0,
            "--process gives rewards at the ends of steps, and --reward-norm and --reward-clip change whole "
            "scores; leave them out")
    require(not config.process or config.reward_at == "eos",
            "--process gives rewards at the ends of steps: it goes with --reward-at eos")
    if config.kl_coef > 0 and (config.kl == "k1") == (config.kl_in == "loss"):
        right = "k2 and k3 have" if config.kl_in == "loss" else "k1 has"
        run.say(f"warning: --kl {config.kl} --kl-in {config.kl_in} has the wrong gradient (see the top of "
                f"ppo.py); {right} the right one there")


class Models(NamedTuple):
    """All that has weights. Policy and critic are in DDP where there are several ranks (or in shards)."""
    policy: torch.nn.Module
    critic: torch.nn.Module
    policy_model: GPT  # the same without DDP: to sample with, and to save
    critic_model: ScalarModel
    reference: GPT
    reward_models: list
    process: Process | None
    average: GPT | None  # of the policy's weights, for --ema
    policy_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer


def load_models(config, folders, run):
    """(Models, tokenizer): policy, reference, reward models from their folders, critic."""
    policy_model, tokenizer = open_model(config, GPT)
    reference = frozen_reference(policy_model, config)
    reward_models = load_reward_models(folders, tokenizer, config.model, config.allow_pickle)
    process = load_process(config, tokenizer)
    critic_init = config.critic_init
    if critic_init == "auto":
        critic_init = "reward" if folders else "zero"
    critic_model = start_critic(critic_init, policy_model, reward_models, config)
    # With adapters, what is frozen is shared: the reference is the policy without them, and the reward model
    # the critic without its own.
    shared = []
    if shares_frozen(config):
        shared = [reference]
        if critic_init == "reward":
            shared.append(reward_models[0])
    for model in [reference, *reward_models, *models_of(process)]:
        model.requires_grad_(False).eval()
        if any(model is other for other in shared):
            # Its weights are the trained model's; what it has alone, a head, has to move as well.
            model.to(run.device)
            continue
        model.to(getattr(torch, config.frozen_dtype))
        if config.frozen_device == "same":
            run.parallel(model)
    prepare_training(policy_model, config)
    prepare_training(critic_model, config)
    average = average_of(policy_model, shares_frozen(config)) if config.ema > 0 else None
    policy, critic = run.parallel(policy_model), run.parallel(critic_model)
    if average:
        average = run.parallel(average)
    policy_optimizer = adamw(policy_model, config.lr, eps=1e-5)
    critic_optimizer = adamw(critic_model, config.critic_lr, eps=1e-5)
    models = Models(policy, critic, policy_model, critic_model, reference, reward_models, process, average,
                    policy_optimizer, critic_optimizer)
    return models, tokenizer


def trained(models, tokenizer, config):
    """(modules, optimizers, how to save) of what training changes: see `Run.begin`."""
    modules = {"policy": models.policy_model, "critic": models.critic_model}
    optimizers = {"policy_optimizer": models.policy_optimizer, "critic_optimizer": models.critic_optimizer}
    save = {"": lambda folder: save_model(folder, models.policy_model, tokenizer, config)}
    if models.average:
        modules["ema"] = models.average
        save["ema"] = lambda folder: save_model(folder, models.average, tokenizer, config)
    return modules, optimizers, save


def start_critic(init, policy_model, reward_models, config):
    """The critic before training: a copy of the first reward model, or the policy's trunk with a new head."""
    if init == "reward":
        return copy_of(reward_models[0], shares_frozen(config))
    if init not in ("sft", "zero"):
        raise ValueError(f"unknown start of the critic {init}")
    torch.manual_seed(config.seed)
    critic = ScalarModel.from_trunk(policy_model, shares_frozen(config))
    if init == "zero":
        torch.nn.init.zeros_(critic.score.weight)
    return critic


def average_of(policy, shares):
    """A copy of the policy to average its weights in. shares: what is frozen stays the policy's own."""
    frozen = {id(p): p for p in policy.parameters() if shares and not p.requires_grad}
    return copy.deepcopy(policy, frozen).requires_grad_(False)


class Demonstrations:
    """The examples of --ptx-data, and the batch of each optimiser step (PPO-ptx)."""

    def __init__(self, config, tokenizer, context, say):
        rows = read_rows(config.ptx_data, "demonstrations", say)
        self.examples = encode_demonstrations(tokenizer, rows, context, say)
        self.lengths = [len(ids) for ids, _ in self.examples]
        self.config, self.pad = config, tokenizer.pad

    def start(self, done):
        """Begin behind so many optimiser steps."""
        self.batches = endless_batches(self.lengths, self.config.ptx_tokens, self.config.seed, done)

    def draw(self, number):
        """Draw the batches of so many optimiser steps."""
        self.drawn = [next(self.batches) for _ in range(number)]


# ---------------------------------------------------------------------------------------------------------
# The phases that take more than a few lines

class Old(NamedTuple):
    """What the losses call old, and the reference: of the forward pass that trains, not of the sampler."""
    logprobs: torch.Tensor  # (B, T)
    ref_logprobs: torch.Tensor  # (B, T)
    values: torch.Tensor  # (B, T)
    entropy: torch.Tensor  # (B, T) nats


@torch.no_grad()
def forward(run, models, batch, plan, temperature):
    """`Old` of a rollout. plan: see `Rollout.plan`."""
    old = Old(*(torch.zeros(batch.ids.shape, device=run.device) for _ in Old._fields))
    reference = models.reference
    for part in batch.passes(run, plan):
        with run.autocast():
            logprobs, entropy = models.policy_model(part.ids, part.where, temperature, with_entropy=True)
            ref_logprobs, _ = reference(part.ids.to(reference.device), part.where, temperature)
            values = values_before(models.critic_model, part.ids, part.of(batch.host_steps))
        here = part.rows, slice(part.width)
        old.logprobs[here], old.entropy[here] = logprobs, entropy
        old.ref_logprobs[here], old.values[here] = ref_logprobs.to(run.device), values
    return old


def deal(replies, minibatches, epochs, run, generator):
    """Numbers of this rank's replies in each minibatch: epochs * minibatches lists.

    A rank's replies lie in lanes, as many as a minibatch takes from the rank; each lane gives one reply to
    every minibatch, in a random order. Ranks own whole lanes, so all have as many in each minibatch, and the
    number of ranks changes nothing. Of 8 replies on 2 ranks, for 2 minibatches:

        lane    rank 0: 0  1    rank 1: 0  1
                        0  1            0  1    the first minibatch takes one of each column,
                        2  3            2  3    the second the other
    """
    lanes = replies // minibatches
    all_lanes = lanes * run.world_size
    drawn = torch.rand(epochs, minibatches, all_lanes, generator=generator, device=run.device)
    # Which reply of its lane each minibatch takes.
    order = drawn.argsort(1).cpu().flatten(0, 1)  # (epochs * minibatches, all lanes)
    own = order[:, run.rank::run.world_size]  # (epochs * minibatches, lanes)
    return (own * lanes + torch.arange(lanes)).tolist()


class Update(NamedTuple):
    """What came of the update on a rollout."""
    totals: dict  # {metric: () sum of this rank}, as from `Totals`
    begun: int  # minibatches
    stopped: bool  # by --kl-stop, so that the last of them changed nothing
    old_new_kl: float  # KL(old || new) of the last minibatch, where a flag asks for it
    ratio_error: torch.Tensor  # () largest |log ratio| of the first minibatch
    grad_norm: torch.Tensor
    critic_grad_norm: torch.Tensor
    lr: float
    critic_lr: float


def update(run, config, models, batch, old, advantages, returns, coefs, generator, drawn, demonstrations):
    """Some epochs of minibatches over a rollout.

    advantages, returns (B, T). coefs: {kl_coef, penalty_coef}. drawn: numbers of this rank's prompts;
    demonstrations: `Demonstrations`, or None. Returns an `Update`.
    """
    updates = config.epochs * config.minibatches
    totals, ratio_error, old_new_kl, stopped = Totals(updates), torch.zeros((), device=run.device), 0.0, False
    step, warm = run.step, config.critic_warmup
    lr = scheduled_lr(max(0, step - warm), config.steps - warm, config.warmup, config.lr, config.lr_schedule)
    critic_lr = scheduled_lr(step, config.steps, config.warmup, config.critic_lr, config.critic_lr_schedule)
    train_policy = step >= warm
    grad_norm = critic_grad_norm = torch.zeros(())
    minibatches = deal(len(batch.texts), config.minibatches, config.epochs, run, generator)
    plans = batch.plan(run, minibatches, config.micro_batch_tokens)
    importance = torch.ones_like(old.logprobs)  # (B, T)
    if batch.sampler_logprobs is not None:
        importance = importance_weights(old.logprobs, batch.sampler_logprobs, batch.mask, config.importance,
                                        config.importance_limit)

    for number, picked in enumerate(minibatches):
        # Counts of the whole minibatch: a short reply weighs by its tokens.
        own = torch.stack([batch.host_mask[picked].sum(), batch.host_steps[picked].sum()])
        tokens, value_tokens = run.all_sum(own.to(run.device, non_blocking=True))
        approx_kl = torch.zeros((), device=run.device)
        if demonstrations and train_policy:
            ptx_pass(run, config, models, demonstrations, demonstrations.drawn[number], totals)
        for part in batch.passes(run, plans[number], models.policy, models.critic):
            old_logprobs = part.of(old.logprobs)  # (n, W)
            if train_policy:
                with run.autocast():
                    logprobs, entropy = models.policy(part.ids, part.where, config.temperature,
                                                      with_entropy=config.entropy_coef > 0)
                objective, stats = policy_loss(
                    logprobs, old_logprobs, part.of(advantages), part.mask, config.clip, tokens,
                    config.policy_loss, config.dual_clip, coefs["penalty_coef"], part.of(importance))
                totals.add({"policy_loss": objective, **stats})
                approx_kl += stats["approx_kl"]
                if config.entropy_coef > 0:
                    objective = objective - config.entropy_coef * (entropy * part.mask).sum() / tokens
                if config.kl_in == "loss":
                    ref_logprobs = part.of(old.ref_logprobs)
                    kl = kl_loss(logprobs, old_logprobs, ref_logprobs, part.mask, config.kl, tokens,
                                 part.of(importance))
                    totals.add({"kl_loss": kl})
                    objective = objective + coefs["kl_coef"] * kl
                if number == 0:
                    # Nothing has been updated yet, so the ratio to the old policy must be 1.
                    ratio_error = torch.maximum(ratio_error, (logprobs.detach() - old_logprobs).abs().max())
                run.backward(objective, models.policy_optimizer)
            with run.autocast():
                values = values_before(models.critic, part.ids, part.of(batch.host_steps))  # (n, W)
            part_steps = part.of(batch.steps) & part.counts
            loss, stats = value_loss(values, part.of(old.values), part.of(returns), part_steps,
                                     config.value_clip, value_tokens)
            totals.add({"value_loss": loss, **stats})
            run.backward(loss, models.critic_optimizer)
        if config.kl_stop > 0 or config.penalty_target > 0:
            old_new_kl = run.all_sum(approx_kl).item()
        stopped = config.kl_stop > 0 and old_new_kl > config.kl_stop
        if stopped:
            models.policy_optimizer.zero_grad()
            models.critic_optimizer.zero_grad()
            break
        examples = [drawn[i] for i in picked]
        if train_policy:
            grad_norm = run.optimizer_step(models.policy_optimizer, lr, config.max_grad_norm, examples)
            if models.average:
                follow(models.average, models.policy_model, 1 - config.ema)
        critic_grad_norm = run.optimizer_step(models.critic_optimizer, critic_lr, config.max_grad_norm,
                                              examples)
    return Update(totals, number + 1, stopped, old_new_kl, ratio_error, grad_norm, critic_grad_norm,
                  lr * train_policy, critic_lr)


@torch.no_grad()
def follow(average, policy, share):
    """Move the averaged weights this share of the way to the policy's."""
    torch._foreach_lerp_(list(average.parameters()), list(policy.parameters()), share)


def ptx_pass(run, config, models, demonstrations, numbers, totals):
    """Add the gradient of -ptx_coef * log-likelihood of a batch of demonstrations to PPO's, for one step."""
    examples = demonstrations.examples
    tokens = sum(sum(examples[i][1]) for i in numbers)
    pieces = run.split(numbers, demonstrations.lengths, config.micro_batch_tokens)
    for picked, weight in run.passes(pieces, models.policy, more=True):
        ids, mask, _ = collate([examples[i] for i in picked], demonstrations.pad, run.device)  # (n, W)
        with run.autocast():
            logprob, _ = models.policy(ids, mask, summed=True)  # ()
        loss = -logprob * weight * config.ptx_coef / tokens
        run.backward(loss, models.policy_optimizer)
        totals.add({"ptx_loss": loss / config.ptx_coef})


def metrics_of(run, batch, old, scores, source_scores, rewards, explained, judged, done):
    """A rollout's row of metrics, and its response tokens, over all ranks.

    scores (B,); source_scores {name: (B,)} where there are several; rewards (B, T); judged {name: (B,)};
    done: `Update`.
    """
    log_ratio = old.logprobs - old.ref_logprobs  # (B, T)
    k3 = kl_estimate(old.logprobs, old.ref_logprobs, "k3")  # (B, T)
    lengths = batch.mask.sum(1).float()  # (B,)
    tokens = run.all_sum(batch.mask.sum())
    # Means over replies; those of entropy, value and ref_nll are over tokens, of all ranks.
    ranks = run.world_size
    metrics = {
        "score": scores.mean(), "kl": log_ratio.sum(1).mean(), "length": lengths.mean(),
        "eos_rate": batch.ended.float().mean(), "kl_k3": k3.sum(1).mean(), "reward": rewards.sum(1).mean(),
        "explained_variance": explained, "entropy": old.entropy.sum() / tokens * ranks,
        "value": old.values.sum() / tokens * ranks, "ref_nll": -old.ref_logprobs.sum() / tokens * ranks}
    metrics |= {f"score_{name}": own.mean() for name, own in source_scores.items()}
    metrics |= {name: numbers.mean() for name, numbers in judged.items()}
    sums = run.all_sum(torch.stack(list(metrics.values()))) / run.world_size
    row = dict(zip(metrics, sums.tolist()))
    sums = run.all_sum(torch.stack(list(done.totals.values())))
    for name, value in zip(done.totals, sums.tolist()):
        row[name] = value * done.totals.updates / done.begun
    row["ref_perplexity"] = math.exp(min(row.pop("ref_nll"), 700.0))
    row["updates"] = done.begun - done.stopped
    return row, tokens.item()


def main(config):
    folders = config.reward or ([] if config.reward_fn or config.process else ["runs/reward"])
    run = Run(config, reads={"reward": folders, "data": as_list(config.rollouts)})
    sources = folders + config.reward_fn + as_list(config.process)
    check(config, folders, run)
    weights = torch.tensor(source_weights(config, sources), device=run.device)  # (sources,)
    functions = load_functions("--reward-fn", config.reward_fn)
    judges = load_functions("--judge", config.judge)
    models, tokenizer = load_models(config, folders, run)
    policy_model, reward_models = models.policy_model, models.reward_models
    networks = [policy_model, models.critic_model, *reward_models, *models_of(models.process)]
    context = min(model.config.block_size for model in networks)
    recorded = None
    if config.rollouts:
        prompts, recorded = load_recorded(config, tokenizer, context, run.say)
    else:
        prompts = load_prompts(config, tokenizer, context, run.say)
    demonstrations = None
    if config.ptx_coef > 0:
        limit = min(config.max_length or context, context)
        demonstrations = Demonstrations(config, tokenizer, limit, run.say)
    # A mistake in a function should show before anything is written.
    check_functions(functions + judges, [prompt.row for prompt in prompts], run.say)

    first, state = run.begin(*trained(models, tokenizer, config), best="reward")
    fresh = {"kl_coef": config.kl_coef, "penalty_coef": config.penalty_coef, "moments": [0, 0.0, 0.0]}
    state |= fresh | state
    moments = state["moments"]
    updates = config.epochs * config.minibatches
    if demonstrations:
        demonstrations.start(first * updates)
    order = endless_order(len(prompts), config.seed, first * config.rollout_batch)
    # No dropout: the ratio to the old policy must be 1 where nothing has changed.
    models.policy.eval()
    models.critic.eval()
    watch = Watch(run, config, judges)

    for step in run.steps(first, config.steps):
        generator = run.seed_step(step)
        clock = [run.clock()]

        # 1. rollout
        if demonstrations:
            # In rollouts that are skipped, too: a step's batches go by its number alone.
            demonstrations.draw(updates)
        drawn = draw_prompts(run, prompts, order, config.rollout_batch)
        room = 1 if config.reward_at == "next" else 0
        asked = [prompts[i] for i in drawn]
        if recorded:
            batch = replay(run, tokenizer, asked, [recorded[i] for i in drawn], room)  # ids, mask (B, T)
        else:
            batch = sample(run, policy_model, tokenizer, asked, config.max_new_tokens, config.temperature,
                           generator, config.rollout_rows, room=room)  # ids, mask (B, T)
        steps = steps_mask(batch.mask, config.reward_at, run.all_max)  # (B, T)
        batch.count_steps(steps)
        clock.append(run.clock())

        # 2. score
        plan, = batch.plan(run, [list(range(len(drawn)))], config.micro_batch_tokens)
        old = forward(run, models, batch, plan, config.temperature)  # (B, T) each
        step_parts = step_rewards(run, models.process, batch, plan)
        source_scores = score(run, reward_models, functions, batch, plan, step_parts)  # (sources, B)
        scores = combined(source_scores, weights, config)  # (B,)
        if not run.finite("the score", scores, drawn):
            continue

        # 3. rewards
        lowest = run.all_min(scores.min())
        adjusted = missing_eos_scores(scores, batch.ended, config.missing_eos, config.missing_eos_penalty,
                                      lowest)
        if config.reward_norm != "none":
            moments = update_moments(moments, adjusted, run.all_sum)
        adjusted = normalise_scores(adjusted, moments, config.reward_norm, config.reward_clip)
        kl = kl_estimate(old.logprobs, old.ref_logprobs, config.kl)  # (B, T)
        in_reward = {"reward": state["kl_coef"], "loss": 0.0}[config.kl_in]
        parts = None if step_parts is None else weights[-1] * step_parts.changes  # (B, T)
        rewards = shaped_rewards(adjusted, kl, steps, in_reward, parts)  # (B, T)

        # 4. advantages
        advantages, returns = gae(rewards, old.values, steps, config.gamma, config.lam)  # (B, T)
        explained = explained_variance(old.values, returns, steps, run.all_sum)
        if config.whiten != "none":
            advantages = whiten(advantages, batch.mask, run.all_sum, config.whiten)
        if config.advantage_clip > 0:
            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
        clock.append(run.clock())

        # 5. update
        done = update(run, config, models, batch, old, advantages, returns, state, generator, drawn,
                      demonstrations)

        # 6. control, log, save
        named = dict(zip(short_names(sources), source_scores)) if len(sources) > 1 else {}
        judged = {function.name: judge(function, batch).to(run.device) for function in judges}
        row, tokens = metrics_of(run, batch, old, scores, named, rewards, explained, judged, done)
        if recorded:
            row |= batch.mismatch(run, old.logprobs)
        clock.append(run.clock())
        # The largest of all ranks.
        ratio_error = -run.all_min(-done.ratio_error)
        watch.check_ratio(ratio_error)
        watch.look(row)
        if run.time_to_log(step):
            row |= {"kl_coef": state["kl_coef"], "lr": done.lr, "critic_lr": done.critic_lr,
                    "grad_norm": done.grad_norm, "critic_grad_norm": done.critic_grad_norm,
                    "ratio_error": ratio_error}
            if config.policy_loss == "penalty":
                row["penalty_coef"] = state["penalty_coef"]
            row |= shares_of_time(clock, tokens, config.epochs * done.begun / updates)
            run.log(step + 1, row, show=("score", *judged, *WATCHED))
        if (step + 1) % config.sample_every == 0 or step + 1 == config.steps:
            batch.show(run, scores)
        # What is saved changes here alone: a run that is stopped on the way begins the step anew.
        state["moments"] = moments
        train_policy = step >= config.critic_warmup
        if config.kl_target > 0 and train_policy:
            state["kl_coef"] = adapt_kl_coef(state["kl_coef"], row["kl"], config.kl_target,
                                             config.rollout_batch, config.kl_horizon)
        if config.penalty_target > 0 and train_policy:
            state["penalty_coef"] = adapt_penalty(state["penalty_coef"], done.old_new_kl,
                                                  config.penalty_target)
        if config.kl_limit_stop and row["kl"] > config.kl_limit:
            run.problem = (f"step {step + 1}: the KL per reply, {row['kl']:.1f} nats, is beyond --kl-limit "
                           f"{config.kl_limit:g}, and --kl-limit-stop was asked for")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
