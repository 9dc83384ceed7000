"""Policy gradient from groups of replies, without a critic: GRPO, RLOO, ReMax, MaxRL and their kin.

    maximise  E_{x, y ~ pi}[ s(x, y) ] - beta * KL(pi || ref)            beta: --kl-coef, 0 by default

The policy samples G replies (--group) to a prompt; the advantage A_i of reply i compares its score s_i with
the others', and the gradient is  1/G sum_i A_i grad log pi(y_i | x).  Where scores are 0 or 1 and a reply is
right with probability p, its expectation is w * grad p, with a weight w that tells what is optimised:

    --advantage    A_i                                   w                         optimises
    none           s_i                                   1                         the score
    mean           s_i - mean                            (G-1)/G                   the score
    leave-one-out  s_i - mean of the others              1                         the score
    greedy         s_i - s(the likeliest reply)          1                         the score
    deviation      (s_i - mean) / deviation              near 1/sqrt(p(1-p)), and  about arcsin sqrt(p)
                                                           at most sqrt(G-1)
    batch          the same over all prompts' replies    1 / their deviation       the score
    success        s_i / mean - 1                        (1-(1-p)^(G-1)) / p       about log p
    success-fail   the same, and -1 where all fail       (1-(1-p)^G) / p           about log p
    pass           k times what s_i adds to the best     k (1-p)^(k-1)             that one of k is right
                   of k - 1 others (--pass-k)

bench/estimators.py draws the weights over p. The loss of a token, with rho = pi / pi_old:

    --loss clip       max(-rho A, -clamp(rho, 1 - low, 1 + high) A)      (Schulman et al. 2017, eq. 7)
    --loss cispo      -clamp(rho, 1 - low, 1 + high) A log pi            (no gradient through the weight)
    --loss soft       -A sigmoid(tau (rho - 1)) 4 / tau,  tau by the sign of A  (--soft-positive, -negative)
    --loss reinforce  -A log pi

--ratio: rho is that of each token, of the whole reply (product), or its geometric mean over the reply's
tokens (mean). --average: over tokens; over replies, each the mean of its tokens (reply); or sums of tokens
divided by --max-new-tokens and replies (constant), so that a reply weighs as much as it is long.

    --preset   advantage      loss       ratio    average   and                 paper
    grpo       deviation      clip       token    reply                         Shao et al. 2024, eq. 3
    dr-grpo    mean           clip       token    constant                      Liu et al. 2025
    dapo       deviation      clip       token    token     --clip-high 0.28    Yu et al. 2025
                                                            --flat resample
                                                            --overlong linear
    gspo       deviation      clip       mean     reply     --clip-low 3e-4     Zheng et al. 2025, eq. 5
                                                            --clip-high 4e-4
    cispo      deviation      cispo      token    token     --clip-low 1        MiniMax 2025, eq. 4
                                                            --clip-high 4
    sapo       deviation      soft       token    reply                         Gao et al. 2025 (SAPO)
    rloo       leave-one-out  clip       product  reply                         Ahmadian et al. 2024
    remax      greedy         reinforce  token    constant                      Li et al. 2024
    reinforce  batch          reinforce  token    token                         Hu 2025 (REINFORCE++)
    maxrl      success-fail   reinforce  token    constant  --overlong keep     Tajwar et al. 2026
    passk      pass           reinforce  token    constant  --overlong keep     Walder and Karkhanis 2025

A preset is nothing but these flags, and those given beside it count. Without one: dr-grpo.

With one optimiser step per rollout (the default) rho is 1 and a group's advantages add up to 0, so the loss
is 0 where all replies weigh the same, and small else, while its gradient is not: watch the score and
grad_norm. A group whose scores are all equal teaches nothing and has advantages of exactly 0. flat_groups
counts them; --flat drop leaves them out of the averages, and resample draws other prompts in their place. By
both kl, entropy, approx_kl and clip_fraction are means over the groups that are left.

There is no KL term unless you ask for one. k1 in the reward is taken off a reply's score, summed over its
tokens; k2 and k3 in the loss have the right gradient for each token (see the top of ppo.py).

--rollouts takes replies that another engine sampled. rho is the policy's own ratio, before and behind the
update; what lies between the sampler and the policy is measured (mismatch, ess), and --importance weights
each token with policy / sampler, at most --importance-limit (Yao et al. 2025), or with that of its reply.

--tool has a function answer a reply, and the policy go on, over several turns. All that the policy sampled is
trained, its end tokens too, and nothing else; score and advantage are those of the whole conversation.

--process adds a process reward model (process.py) to the score, and its parts land at the ends of a reply's
steps, as in ppo.py. The advantage of a token is then made of the rewards of the steps that end at it or after
it (process supervision: Shao et al. 2024, section 4.1.3). They add up to what the score still gets from there
on, and that is compared with what the group's other replies get from their step of the same number on. In
the paper each step's reward is normalised by the mean and deviation of all of the group's steps, and then
added up; for rewards that are changes of a score that would favour replies of few steps. Tokens of the first
step have the advantage of the whole reply, those behind a step that spoilt everything almost none.

What differs between implementations:
    here                                     TRL 1.16's GRPOTrainer, others              switch
    population deviation, nothing added      over n - 1, plus 1e-4 (OpenRLHF 1e-9)       none
    cut-off reply: the rollout's lowest      as it is, or masked                         --overlong keep
      score - 1                                                                            | mask
    averages over the whole step             the same (nanochat: over each pass)         none
    cispo's weight up to 1 + high            up to high                                  --clip-high
    sampled as it is scored                  top-p or top-k when sampling, all of the    none
                                               softmax when scoring
    entropy: mean of -log pi of the tokens   of the whole softmax                        none
    KL in the loss times the ratio           as an option (its gradient is KL(ref||pi)'s none
                                               without)
Left out: VESPO's weights, masks by entropy, an entropy bonus.

    python grpo.py --preset rloo --model runs/sft --reward runs/reward --judge toy:gold
    torchrun --nproc-per-node 8 grpo.py --preset dapo --data gsm8k.jsonl --model sft --reward-fn mine:right

Legend: N prompts and B = N G replies of this rank, T tokens; n replies of a pass, W tokens of the longest.
"""
import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch

from data import endless_order
from formats.model_folder import open_model, save_model
from judges import (
    Process, StepRewards, check_functions, combined, judge, load_functions, load_process, load_reward_models,
    load_tool, models_of, score, short_names, source_weights, step_rewards)
from model import GPT, frozen_reference, prepare_training, shares_frozen
from plumbing.flags import (
    Count, Fraction, Natural, NonNegative, Positive, RunConfig, as_list, flag_of, require)
from plumbing.health import Totals, Watch, shares_of_time
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr
from rollout import (
    SAMPLED_AS_SCORED, Rollout, draw_prompts, join, load_prompts, load_recorded, replay, sample)


@dataclass
class Config(RunConfig):
    REFUSED: ClassVar = SAMPLED_AS_SCORED
    PRESETS: ClassVar = {
        "grpo": {"advantage": "deviation", "loss": "clip", "ratio": "token", "average": "reply"},
        "dr-grpo": {"advantage": "mean", "loss": "clip", "ratio": "token", "average": "constant"},
        "dapo": {"advantage": "deviation", "loss": "clip", "ratio": "token", "average": "token",
                 "clip_high": 0.28, "flat": "resample", "overlong": "linear"},
        "gspo": {"advantage": "deviation", "loss": "clip", "ratio": "mean", "average": "reply",
                 "clip_low": 3e-4, "clip_high": 4e-4},
        "cispo": {"advantage": "deviation", "loss": "cispo", "ratio": "token", "average": "token",
                  "clip_low": 1.0, "clip_high": 4.0},
        "sapo": {"advantage": "deviation", "loss": "soft", "ratio": "token", "average": "reply"},
        "rloo": {"advantage": "leave-one-out", "loss": "clip", "ratio": "product", "average": "reply"},
        "remax": {"advantage": "greedy", "loss": "reinforce", "average": "constant"},
        "reinforce": {"advantage": "batch", "loss": "reinforce", "average": "token"},
        "maxrl": {"advantage": "success-fail", "loss": "reinforce", "average": "constant",
                  "overlong": "keep"},
        "passk": {"advantage": "pass", "loss": "reinforce", "average": "constant", "overlong": "keep"},
    }
    # a method by its name: nothing but the flags in the table above; those that are given beside it count
    preset: Literal["", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "remax", "reinforce",
                    "maxrl", "passk"] = ""
    # files whose prompts are used: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/toy/prompts.jsonl"
    # file of replies that another engine sampled, with token ids and log-probabilities (see README.md), in
    # place of --data and sampling
    rollouts: str = ""
    # what each token of --rollouts counts: 1; or policy / sampler, of the token or of its whole reply
    importance: Literal["none", "token", "reply"] = "none"
    importance_limit: Positive = 2.0  # the most that it counts
    # checkpoint folder or hub name of the policy to start from, which is also the reference; or scratch
    model: str = "runs/sft"
    # checkpoint folders of reward models (default: runs/reward, unless there is a --reward-fn or --process)
    reward: list[str] = field(default_factory=list)
    # Python functions, module:function, which get lists (those that their parameters name: prompts, replies,
    # answers, ended, dialogues) and return one number per reply
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
    # sigmoid: take for the score the probability that the reply is preferred to a demonstration
    squash: Literal["none", "sigmoid"] = "none"
    # functions as for --reward-fn, whose numbers are measured and logged under their names, and never trained
    # on
    judge: list[str] = field(default_factory=list)
    out: str = "runs/grpo"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 80  # rollouts, each followed by an update
    # share of a file's prompts left out; take that of the other stages, and evaluate.py has prompts that none
    # has seen
    val_fraction: Fraction = 0.0
    rollout_batch: Count = 32  # prompts per rollout over all ranks
    group: Count = 8  # replies to each prompt
    # replies that a rank samples at the same time, the others wait for a place; 0: all. Lower it when keys
    # and values take too much memory
    rollout_rows: Natural = 0
    max_new_tokens: Count = 40  # longest reply, tokens; with --tool of all turns together, the tool's too
    # a function, module:function, that answers replies for a conversation of several turns: it gets lists as
    # those of --reward-fn do, and returns for each reply the next user's turn, or None where it is over
    tool: str = ""
    turns: Count = 8  # with --tool: the most replies of the policy in a conversation
    temperature: Positive = 1.0  # of sampling; all log-probabilities are taken at it
    epochs: Count = 1  # passes over each rollout
    minibatches: Count = 1  # optimiser steps per pass, each on as many prompts
    # tokens per forward pass on one rank, at most; lower it when memory is short
    micro_batch_tokens: Count = 8192
    lr: Positive = 1e-3  # peak learning rate
    # to a tenth on a cosine, to zero on a line, or constant
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Natural = 5  # rollouts of linear warm-up
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    # what a reply's score is compared with, see the table above
    advantage: Literal["none", "mean", "leave-one-out", "greedy", "batch", "deviation", "success",
                       "success-fail", "pass"] = "mean"
    pass_k: Count = 4  # k of --advantage pass
    loss: Literal["clip", "cispo", "soft", "reinforce"] = "clip"  # of a token, see above
    ratio: Literal["token", "product", "mean"] = "token"  # of what the probability ratio is
    average: Literal["token", "reply", "constant"] = "constant"  # over what the loss is averaged
    clip_low: Annotated[float, "> 0", "<= 1"] = 0.2  # the ratio counts down to 1 - this
    clip_high: Positive = 0.2  # and up to 1 + this
    soft_positive: Positive = 1.0  # how fast --loss soft lets go of a ratio that leaves 1, where A > 0
    soft_negative: Positive = 1.05  # and where A <= 0
    # groups of equal scores: they count in the averages; or not; or other prompts are drawn in their place
    flat: Literal["keep", "drop", "resample"] = "keep"
    resample_rounds: Count = 3  # how often --flat resample samples --rollout-batch prompts for one update
    # replies that were cut off: as they are; the rollout's lowest score less the penalty; less up to the
    # penalty for the last --overlong-tokens tokens of --max-new-tokens; or their tokens are not trained
    overlong: Literal["keep", "floor", "linear", "mask"] = "floor"
    overlong_penalty: NonNegative = 1.0  # for --overlong floor and linear, in units of the score
    overlong_tokens: Count = 10  # for --overlong linear: tokens over which the penalty grows
    kl: Literal["k1", "k2", "k3"] = "k3"  # estimator of the KL term
    kl_in: Literal["reward", "loss"] = "loss"  # where the KL term stands
    kl_coef: NonNegative = 0.0  # beta, score per nat; 0: no KL term
    # rollouts between measurements of the KL where there is no KL term; 0 is never
    kl_every: Natural = 10
    kl_limit: Positive = 20.0  # warn when the KL per reply is above this, nats
    sample_every: Count = 20  # rollouts between printed samples


# Relative: scores that differ by less are taken to be equal.
ROUNDING = 1e-6
# Metrics on the progress bar, besides the score and the judges' numbers.
WATCHED = ("kl", "entropy", "length", "eos_rate", "flat_groups", "grad_norm")


# ---------------------------------------------------------------------------------------------------------
# Scores to advantages

def overlong_scores(scores, ended, lengths, rule, penalty, lowest, limit, tokens):
    """Scores (B,) with those of replies that are too long changed by --overlong.

    ended (B,) bool; lengths (B,) in tokens, a tool's included; lowest: score of the rollout; limit:
    --max-new-tokens; tokens: over which the linear penalty grows (Yu et al. 2025, eq. 13).
    """
    if rule in ("keep", "mask"):
        return scores
    if rule == "floor":
        return torch.where(ended, scores, lowest - penalty)
    if rule == "linear":
        over = (lengths - (limit - tokens)) / tokens
        return scores - penalty * over.clamp(0, 1)
    raise ValueError(f"unknown rule for overlong replies {rule}")


def flat_groups(scores):
    """Which groups of scores (N, G) are all equal -> (N,) bool."""
    spread = scores.amax(1) - scores.amin(1)
    return spread <= ROUNDING * scores.abs().amax(1)


def group_advantages(scores, kind, k=1, baseline=None, kept=None, all_sum=lambda t: t):
    """Advantages (N, G) of scores (N, G): see the table at the top of the file.

    k: of pass. baseline (N,): scores of the likeliest replies, for greedy. kept (N,) bool, all_sum: the
    groups that count for batch, and the sum over all ranks.
    """
    G = scores.shape[1]
    mean = scores.mean(1, keepdim=True)  # (N, 1)
    if kind == "none":
        return scores
    if kind == "greedy":
        return scores - baseline[:, None]
    if kind == "batch":
        return over_batch(scores, kept, all_sum)
    if kind == "success-fail":
        return torch.where(mean > 0, scores / mean - 1, -1.0)
    if kind == "mean":
        advantages = scores - mean
    elif kind == "leave-one-out":
        advantages = (scores - mean) * G / (G - 1)
    elif kind == "deviation":
        advantages = (scores - mean) / (scores - mean).square().mean(1, keepdim=True).sqrt()
    elif kind == "success":
        advantages = scores / mean - 1
    elif kind == "pass":
        return over_best_of_others(scores, k)
    else:
        raise ValueError(f"unknown advantage {kind}")
    return torch.where(flat_groups(scores)[:, None], 0.0, advantages)


def over_batch(scores, kept, all_sum):
    """Scores (N, G) less the mean, over the deviation, of the kept groups of all ranks."""
    counts = kept[:, None].expand_as(scores)
    total, count = all_sum(torch.stack([(scores * counts).sum(), counts.sum()]))
    mean = total / count.clamp(min=1)
    centred = scores - mean
    variance = all_sum((centred.square() * counts).sum()) / count.clamp(min=1)
    spread = variance.sqrt()
    return torch.where(spread > ROUNDING * mean.abs(), centred / spread, 0.0)


def over_best_of_others(scores, k):
    """k times what each score (N, G) adds to the best of k - 1 others, the mean over all choices of them.

    The best of no others is 0. For scores 0 or 1 the gradient is that of pass@k (Walder and Karkhanis 2025).
    """
    N, G = scores.shape
    if k == 1:
        return scores
    apart = ~torch.eye(G, dtype=torch.bool, device=scores.device)
    others = scores[:, None].expand(N, G, G)[:, apart].view(N, G, G - 1)
    others = others.sort(2).values  # (N, G, G - 1)
    # The one in place m is the best of C(m, k - 2) of the C(G - 1, k - 1) choices.
    shares = [math.comb(m, k - 2) / math.comb(G - 1, k - 1) for m in range(G - 1)]
    added = (scores[:, :, None] - others).clamp(min=0)  # (N, G, G - 1)
    return k * added @ scores.new_tensor(shares)


def step_advantages(scores, changes, ends, kind, G):
    """Advantages (B, T) of tokens, from the rewards of the steps that end at a token or after it.

    scores (B,): of groups of G replies; changes (B, T): the parts of them that land at the ends of steps;
    ends (B, T) bool. What a score has beyond its changes lands at the end. The n replies of a group that have
    a k-th step are compared with each other by what they still get from there on; deviation is that of the
    group's scores. So the tokens of the first step have the advantages of `group_advantages`.
    """
    number = ends.cumsum(1) - ends.long()  # (B, T) how many steps ended before each token
    K = int(ends.sum(1).max().clamp(min=1))
    number = number.clamp(max=K - 1)
    by_step = scores.new_zeros(len(scores), K)
    there = by_step.scatter_add(1, number, ends.to(scores.dtype)) > 0  # (B, K)
    by_step = by_step.scatter_add(1, number, changes)  # (B, K)
    to_come = scores[:, None] - (by_step.cumsum(1) - by_step)  # (B, K)
    if kind == "none":
        return to_come.gather(1, number)
    there = there.view(-1, G, K)
    to_come = to_come.view(-1, G, K)
    n = there.sum(1, keepdim=True).clamp(min=1)  # (N, 1, K)
    centred = to_come - (to_come * there).sum(1, keepdim=True) / n  # (N, G, K)
    groups = scores.view(-1, G, 1)
    if kind == "leave-one-out":
        centred = centred * n / (n - 1).clamp(min=1)
    elif kind == "deviation":
        centred = centred / (groups - groups.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()
    elif kind != "mean":
        raise ValueError(f"no advantage by steps of kind {kind}")
    centred = torch.where(flat_groups(groups[..., 0])[:, None, None], 0.0, centred)
    return centred.reshape(-1, K).gather(1, number)


# ---------------------------------------------------------------------------------------------------------
# Losses: sums over tokens, each times what it counts in the whole optimiser step

def token_weights(lengths, average, replies, tokens, limit):
    """What each token counts in the loss, of replies of these lengths (n,) -> (n, 1) fp32.

    replies, tokens: of the whole optimiser step, on all ranks; limit: the longest that a reply may be.
    """
    if average == "token":
        weights = torch.ones_like(lengths, dtype=torch.float32) / tokens
    elif average == "reply":
        weights = 1 / (lengths.clamp(min=1).float() * replies)
    elif average == "constant":
        weights = torch.ones_like(lengths, dtype=torch.float32) / (limit * replies)
    else:
        raise ValueError(f"unknown average {average}")
    return weights[:, None]


def policy_loss(logprobs, old_logprobs, advantages, mask, weights, kind, ratio, clip_low, clip_high,
                soft=(1.0, 1.05)):
    """The loss of the policy: see the top of the file.

    logprobs, old_logprobs, mask (n, W); advantages, weights (n, 1) or (n, W); soft: tau where A > 0, and
    elsewhere.
    Returns (scalar, {clip_fraction, approx_kl, entropy}), the latter sums over tokens. approx_kl is k3 of
    KL(old || new).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)  # (n, W)
    held = log_ratio.detach().clamp(-20, 20)
    stats = {"approx_kl": torch.expm1(held) - held, "entropy": -logprobs.detach()}
    if ratio == "product":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask)
    elif ratio == "mean":
        length = mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / length).expand_as(mask)
    elif ratio != "token":
        raise ValueError(f"unknown ratio {ratio}")
    rho = log_ratio.clamp(-20, 20).exp()
    clamped = rho.clamp(1 - clip_low, 1 + clip_high)
    if kind == "clip":
        losses = torch.maximum(-advantages * rho, -advantages * clamped)
    elif kind == "cispo":
        losses = -clamped.detach() * advantages * logprobs
    elif kind == "soft":
        tau = torch.where(advantages > 0, *(advantages.new_tensor(number) for number in soft))
        losses = -advantages * torch.sigmoid(tau * (rho - 1)) * 4 / tau
    elif kind == "reinforce":
        losses = -advantages * logprobs
    else:
        raise ValueError(f"unknown policy loss {kind}")
    stats["clip_fraction"] = (rho != clamped).float()
    sums = {name: (numbers * mask).sum() for name, numbers in stats.items()}
    return (torch.where(mask, losses, 0.0) * weights).sum(), sums


def importance_weights(logprobs, sampler_logprobs, mask, kind, limit):
    """What tokens count (B, T) that another engine sampled: policy / sampler, at most limit; none: 1.

    token: of each token alone, biased, as the tokens before it were sampled elsewhere too; reply: of its
    whole reply, unbiased but for the limit (Ionides 2008). logprobs, sampler_logprobs, mask (B, T).
    """
    log_ratio = torch.where(mask, logprobs - sampler_logprobs, 0.0)
    if kind == "none":
        return torch.ones_like(log_ratio)
    if kind == "reply":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask)
    elif kind != "token":
        raise ValueError(f"unknown importance {kind}")
    return log_ratio.clamp(max=math.log(limit)).exp()


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


def kl_loss(logprobs, old_logprobs, ref_logprobs, mask, kind, weights):
    """A KL(pi || ref) term for the loss, as that of ppo.py. All (n, W), weights (n, 1) -> scalar."""
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20).exp()
    factor = {"k1": 1.0, "k2": ratio.detach(), "k3": ratio}[kind]
    kl = torch.where(mask, kl_estimate(logprobs, ref_logprobs, kind), 0.0)
    return (factor * kl * weights).sum()


# ---------------------------------------------------------------------------------------------------------
# Before the first rollout

def check(config, run):
    """UserError for flags that don't go together."""
    prompts, ranks = config.rollout_batch, run.world_size
    require(prompts % ranks == 0, f"--rollout-batch {prompts} is not divisible by {ranks} ranks")
    require(config.minibatches <= prompts,
            f"--minibatches {config.minibatches}, but only {prompts} prompts (--rollout-batch)")
    compares = config.advantage not in ("none", "greedy", "batch")
    require(config.group > 1 or not compares, f"--advantage {config.advantage} needs a --group of 2 or more")
    require(config.importance == "none" or config.rollouts, "--importance is for --rollouts")
    require(not config.tool or not config.rollouts, "--tool is for replies sampled here, not for --rollouts")
    require(config.advantage != "pass" or config.pass_k <= config.group,
            f"--pass-k {config.pass_k} needs as many replies in a --group, which has {config.group}")
    if config.process:
        by_step = ("none", "mean", "leave-one-out", "deviation")
        require(config.advantage in by_step,
                f"--process gives each token an advantage of its own, with --advantage {', '.join(by_step)}, "
                f"not {config.advantage}")
        require(config.squash == "none" and config.flat != "resample" and not config.tool,
                "--process doesn't go with --squash sigmoid, --flat resample or --tool")
    require(config.overlong_tokens <= config.max_new_tokens or config.overlong != "linear",
            "--overlong-tokens is beyond --max-new-tokens")
    if config.preset:
        flags = [f"{flag_of(name)} {value}" for name, value in config.PRESETS[config.preset].items()]
        run.say(f"--preset {config.preset} is {' '.join(flags)}; other flags given beside it count")
    if config.kl_coef == 0:
        run.say("no KL term: nothing holds the policy near the reference (--kl-coef)")
    elif (config.kl == "k1") == (config.kl_in == "loss"):
        right = "k2 and k3 have" if config.kl_in == "loss" else "k1 has"
        run.say(f"warning: --kl {config.kl} --kl-in {config.kl_in} has the wrong gradient (see the top of "
                f"ppo.py); {right} the right one there")


class Models(NamedTuple):
    """All that has weights. The policy is in DDP where there are several ranks (or in shards)."""
    policy: torch.nn.Module
    policy_model: GPT  # the same without DDP: to sample with, and to save
    reference: GPT
    reward_models: list
    process: Process | None
    optimizer: torch.optim.Optimizer


def load_models(config, folders, run):
    """(Models, tokenizer). The reference is there where a KL is asked for, else None."""
    policy_model, tokenizer = open_model(config, GPT)
    reference = None
    if config.kl_coef > 0 or config.kl_every > 0:
        reference = frozen_reference(policy_model, config).eval()
        # With adapters it shares the policy's frozen weights.
        if shares_frozen(config):
            reference.to(run.device)
        else:
            run.parallel(reference)
    reward_models = load_reward_models(folders, tokenizer, config.model, config.allow_pickle)
    process = load_process(config, tokenizer)
    for model in [*reward_models, *models_of(process)]:
        run.parallel(model.requires_grad_(False).eval())
    prepare_training(policy_model, config)
    # No dropout: the ratio to the old policy must be 1 where nothing has changed.
    policy = run.parallel(policy_model).eval()
    optimizer = adamw(policy_model, config.lr, eps=1e-5)
    return Models(policy, policy_model, reference, reward_models, process, optimizer), tokenizer


# ---------------------------------------------------------------------------------------------------------
# The phases that take more than a few lines

class Groups(NamedTuple):
    """Groups of replies to N prompts of this rank, and their scores."""
    drawn: list  # (N,) numbers of the prompts
    batch: Rollout  # of B = N * G replies
    source_scores: torch.Tensor  # (sources, B) by each reward model and function
    scores: torch.Tensor  # (B,) their weighted sum
    likeliest: Rollout | None  # of N replies, one to each prompt, for --advantage greedy
    likeliest_scores: torch.Tensor  # (N,) zeros unless there are any
    steps: StepRewards | None  # of the replies, with --process


def sample_groups(run, config, models, functions, weights, prompts, recorded, order, generator, tokenizer,
                  tool):
    """`Groups` of the next --rollout-batch prompts of all ranks; None if a score was not finite.

    recorded: the replies of --rollouts to each of the prompts, else None; tool: of --tool, else None.
    """
    def scored(batch):
        plan, = batch.plan(run, [list(range(len(batch.texts)))], config.micro_batch_tokens)
        steps = step_rewards(run, models.process, batch, plan)
        by_source = score(run, models.reward_models, functions, batch, plan, steps)  # (sources, B)
        total = combined(by_source, weights, config)  # (B,)
        return by_source, total.sigmoid() if config.squash == "sigmoid" else total, steps

    drawn = draw_prompts(run, prompts, order, config.rollout_batch)
    asked = [prompts[i] for i in drawn]
    if recorded:
        batch = replay(run, tokenizer, asked, [recorded[i] for i in drawn])  # ids, mask (B, T)
    else:
        batch = sample(run, models.policy_model, tokenizer, asked, config.max_new_tokens, config.temperature,
                       generator, config.rollout_rows, per_prompt=config.group, tool=tool)  # ids, mask (B, T)
    source_scores, scores, steps = scored(batch)
    likeliest, likeliest_scores = None, torch.zeros(len(drawn), device=run.device)
    if config.advantage == "greedy":
        likeliest = sample(run, models.policy_model, tokenizer, asked, config.max_new_tokens, 0.0, generator,
                           config.rollout_rows, tool=tool)
        _, likeliest_scores, _ = scored(likeliest)
    repeated = [i for i in drawn for _ in range(config.group)]
    if not run.finite("the score", torch.cat([scores, likeliest_scores]), repeated + drawn):
        return None
    return Groups(drawn, batch, source_scores, scores, likeliest, likeliest_scores, steps)


def join_groups(rounds):
    """Several `Groups` as one."""
    drawn, batches, source_scores, scores, likeliest, likeliest_scores, steps = zip(*rounds)
    # With --process there is one round.
    return Groups(
        sum(drawn, []), join(batches), torch.cat(source_scores, 1), torch.cat(scores),
        join(likeliest) if likeliest[0] else None, torch.cat(likeliest_scores), steps[0])


def of_all_ranks(run, own):
    """Numbers (N,) of this rank's groups -> (N * ranks,) of all: group j of rank r is in place j * ranks + r.
    """
    everyone = own.new_zeros(len(own), run.world_size)
    everyone[:, run.rank] = own
    return run.all_sum(everyone).flatten()


def deal_groups(kept, minibatches, epochs, generator):
    """Places of the groups, of all ranks, that each optimiser step takes: epochs * minibatches lists.

    kept: places of those that take part. Which groups meet does not depend on the number of ranks.
    """
    steps = []
    for _ in range(epochs):
        order = torch.rand(len(kept), generator=generator, device=generator.device).argsort().tolist()
        for number in range(minibatches):
            steps.append([kept[i] for i in order[number::minibatches]])
    return steps


@torch.no_grad()
def forward(run, model, batch, config):
    """Log-probabilities (B, T) of a rollout's replies under a model."""
    plan, = batch.plan(run, [list(range(len(batch.texts)))], config.micro_batch_tokens)
    logprobs = torch.zeros(batch.ids.shape, device=run.device)
    for part in batch.passes(run, plan):
        with run.autocast():
            own, _ = model(part.ids, part.where, config.temperature)  # (n, W)
        logprobs[part.rows, :part.width] = own
    return logprobs


class Old(NamedTuple):
    """What is known of a rollout before its update."""
    logprobs: torch.Tensor | None  # (B, T) None where the update's own first pass has them
    ref_logprobs: torch.Tensor | None  # (B, T) None where no KL is asked for
    importance: torch.Tensor | None  # (B, T) what tokens count that were sampled elsewhere; None: 1


def look_back(run, config, models, batch):
    """`Old` of a rollout, and {metric: number} of how far its sampler was from the policy."""
    logprobs = ref_logprobs = importance = None
    mismatch = {}
    kl_in_reward = config.kl_coef > 0 and config.kl_in == "reward"
    recorded = batch.sampler_logprobs is not None
    if config.epochs * config.minibatches > 1 or kl_in_reward or recorded:
        logprobs = forward(run, models.policy_model, batch, config)
    if config.kl_coef > 0 or (config.kl_every and run.step % config.kl_every == 0):
        ref_logprobs = forward(run, models.reference, batch, config)
    if recorded:
        mismatch = batch.mismatch(run, logprobs)
        importance = importance_weights(logprobs, batch.sampler_logprobs, batch.mask, config.importance,
                                        config.importance_limit)
    return Old(logprobs, ref_logprobs, importance), mismatch


def shaped_scores(run, config, models, batch, scores, lowest, old=None):
    """Scores (B,) of a rollout after --overlong and, where it stands in the reward, the KL of each reply.

    lowest: score of the whole rollout; old: `Old`, if it is known already.
    """
    scores = overlong_scores(scores, batch.ended, batch.room_taken(), config.overlong,
                             config.overlong_penalty, lowest, config.max_new_tokens, config.overlong_tokens)
    if config.kl_coef == 0 or config.kl_in == "loss":
        return scores
    if old is None:
        old, _ = look_back(run, config, models, batch)
    return scores - config.kl_coef * kl_estimate(old.logprobs, old.ref_logprobs, config.kl).sum(1)


class Update(NamedTuple):
    """What came of the update on a rollout."""
    totals: dict  # {metric: () sum of this rank}, as from `Totals`
    ratio_error: torch.Tensor  # () largest |log ratio| of the first optimiser step
    grad_norm: torch.Tensor
    lr: float


def update(run, config, models, groups, old, advantages, trained, kept, generator):
    """Some epochs of minibatches over a rollout.

    advantages (B, 1) or (B, T); trained (B, T) bool: tokens that count; kept: places of the groups that take
    part. Returns an `Update`.
    """
    batch, G = groups.batch, config.group
    steps = deal_groups(kept, config.minibatches, config.epochs, generator)
    # This rank's replies of each step.
    picked = []
    for places in steps:
        own = [place // run.world_size for place in places if place % run.world_size == run.rank]
        picked.append([number * G + i for number in own for i in range(G)])
    plans = batch.plan(run, picked, config.micro_batch_tokens)
    lengths = trained.sum(1)  # (B,)
    totals, ratio_error = Totals(len(steps)), torch.zeros((), device=run.device)
    lr = scheduled_lr(run.step, config.steps, config.warmup, config.lr, config.lr_schedule)
    grad_norm = torch.zeros(())

    for number, places in enumerate(steps):
        if not places:
            continue
        # Counts of the whole optimiser step.
        replies = len(places) * G
        tokens = run.all_sum(lengths[picked[number]].sum()).clamp(min=1)
        for part in batch.passes(run, plans[number], models.policy):
            with run.autocast():
                logprobs, _ = models.policy(part.ids, part.where, config.temperature)  # (n, W)
            old_logprobs = logprobs.detach() if old.logprobs is None else part.of(old.logprobs)
            mask = part.mask & part.of(trained)
            weights = token_weights(lengths[part.rows], config.average, replies, tokens,
                                    config.max_new_tokens)  # (n, 1)
            if old.importance is not None:
                weights = weights * part.of(old.importance)  # (n, W)
            loss, sums = policy_loss(logprobs, old_logprobs, part.of(advantages), mask, weights,
                                     config.loss, config.ratio, config.clip_low, config.clip_high,
                                     (config.soft_positive, config.soft_negative))
            totals.add({"policy_loss": loss} | {name: total / tokens for name, total in sums.items()})
            if old.ref_logprobs is not None:
                ref_logprobs = part.of(old.ref_logprobs)
                totals.add({"kl": (old_logprobs - ref_logprobs)[part.mask].sum() / replies})
                if config.kl_coef > 0 and config.kl_in == "loss":
                    kl = kl_loss(logprobs, old_logprobs, ref_logprobs, mask, config.kl, weights)
                    totals.add({"kl_loss": kl})
                    loss = loss + config.kl_coef * kl
            if number == 0:
                # Nothing has been updated yet, so the ratio to the old policy must be 1.
                ratio_error = torch.maximum(ratio_error, (logprobs.detach() - old_logprobs).abs().max())
            run.backward(loss, models.optimizer)
        examples = [groups.drawn[i // G] for i in picked[number]]
        grad_norm = run.optimizer_step(models.optimizer, lr, config.max_grad_norm, examples)
    return Update(totals, ratio_error, grad_norm, lr)


def metrics_of(run, config, groups, flat, advantages, named, judged, done):
    """A rollout's row of metrics over all ranks.

    flat (N,) bool; advantages (B, 1) or (B, T); named and judged {name: (B,)}; done: `Update`.
    """
    batch = groups.batch
    by_group = groups.scores.view(-1, config.group)  # (N, G)
    sizes = advantages.abs()
    if groups.steps is not None:
        # Of each reply, the mean over its tokens.
        sizes = (sizes * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1)
    metrics = {
        "score": groups.scores.mean(), "score_spread": by_group.std(1, correction=0).mean(),
        "length": batch.mask.sum(1).float().mean(), "eos_rate": batch.ended.float().mean(),
        "flat_groups": flat.float().mean(), "advantage_size": sizes.mean()}
    metrics |= {f"score_{name}": own.mean() for name, own in named.items()}
    metrics |= {name: numbers.mean() for name, numbers in judged.items()}
    sums = run.all_sum(torch.stack(list(metrics.values()))) / run.world_size
    row = dict(zip(metrics, sums.tolist()))
    if done.totals:
        sums = run.all_sum(torch.stack(list(done.totals.values())))
        row |= dict(zip(done.totals, sums.tolist()))
    return row


def main(config):
    folders = config.reward or ([] if config.reward_fn or config.process else ["runs/reward"])
    run = Run(config, reads={"reward": folders, "data": as_list(config.rollouts)})
    sources = folders + config.reward_fn + as_list(config.process)
    check(config, run)
    weights = torch.tensor(source_weights(config, sources), device=run.device)  # (sources,)
    functions = load_functions("--reward-fn", config.reward_fn)
    judges = load_functions("--judge", config.judge)
    models, tokenizer = load_models(config, folders, run)
    networks = [models.policy_model, *models.reward_models, *models_of(models.process)]
    context = min(model.config.block_size for model in networks)
    recorded = None
    if config.rollouts:
        prompts, recorded = load_recorded(config, tokenizer, context, run.say, config.group)
    else:
        prompts = load_prompts(config, tokenizer, context, run.say)
    # A mistake in a function should show before anything is written.
    check_functions(functions + judges, [prompt.row for prompt in prompts], run.say)
    tool = load_tool(config, tokenizer, prompts, run.say)

    def write(folder):
        save_model(folder, models.policy_model, tokenizer, config)

    modules, optimizers = {"policy": models.policy_model}, {"optimizer": models.optimizer}
    first, state = run.begin(modules, optimizers, {"": write}, best="score")
    # Prompts drawn and replies sampled so far.
    state |= {"drawn": 0, "replies": 0} | state
    order = endless_order(len(prompts), config.seed, state["drawn"])
    G = config.group
    watch = Watch(run, config, judges)

    for step in run.steps(first, config.steps):
        generator = run.seed_step(step)
        clock = [run.clock()]

        # 1. rollout and score, once more where too many groups teach nothing
        rounds, useful = [], 0
        while None not in rounds and useful < config.rollout_batch and len(rounds) < config.resample_rounds:
            rounds.append(sample_groups(run, config, models, functions, weights, prompts, recorded, order,
                                        generator, tokenizer, tool))
            if config.flat != "resample":
                break
            if rounds[-1]:
                useful += int(run.all_sum((~flat_groups(rounds[-1].scores.view(-1, G))).sum()))
        drawn = state["drawn"] + len(rounds) * config.rollout_batch
        if None in rounds:
            state["drawn"] = drawn
            continue
        groups = join_groups(rounds)
        batch, scores = groups.batch, groups.scores
        clock.append(run.clock())

        # 2. log-probabilities before the update, where they are needed
        old, mismatch = look_back(run, config, models, batch)

        # 3. advantages
        lowest = run.all_min(scores.min())
        shaped = shaped_scores(run, config, models, batch, scores, lowest, old)  # (B,)
        baseline = groups.likeliest_scores  # (N,)
        if groups.likeliest:
            baseline = shaped_scores(run, config, models, groups.likeliest, baseline, lowest)
        if config.advantage in ("success", "success-fail"):
            require(run.all_min(shaped.min()) >= 0,
                    f"--advantage {config.advantage} is for scores of 0 and more, and one is "
                    f"{shaped.min():.3g}; --squash sigmoid and --overlong keep make them so")
        flat = flat_groups(scores.view(-1, G))  # (N,)
        kept = torch.ones_like(flat) if config.flat == "keep" else ~flat
        advantages = group_advantages(shaped.view(-1, G), config.advantage, config.pass_k, baseline, kept,
                                      run.all_sum).reshape(-1, 1)  # (B, 1)
        if groups.steps is not None:
            changes = weights[-1] * groups.steps.changes  # (B, T)
            advantages = step_advantages(shaped, changes, groups.steps.ends, config.advantage, G)  # (B, T)
        trained = batch.mask & batch.ended[:, None] if config.overlong == "mask" else batch.mask
        clock.append(run.clock())

        # 4. update
        places = of_all_ranks(run, kept.long()).nonzero().flatten().tolist()[:config.rollout_batch]
        done = update(run, config, models, groups, old, advantages, trained, places, generator)

        # 5. log, save
        named = dict(zip(short_names(sources), groups.source_scores)) if len(sources) > 1 else {}
        judged = {function.name: judge(function, batch).to(run.device) for function in judges}
        row = metrics_of(run, config, groups, flat, advantages, named, judged, done) | mismatch
        clock.append(run.clock())
        watch.check_ratio(-run.all_min(-done.ratio_error))
        watch.look(row)
        replies = state["replies"] + len(rounds) * config.rollout_batch * G
        if run.time_to_log(step):
            row |= {"lr": done.lr, "grad_norm": done.grad_norm, "replies": replies}
            tokens = run.all_sum(batch.mask.sum()).item()
            row |= shares_of_time(clock, tokens, config.epochs)
            run.log(step + 1, row, show=("score", *judged, *WATCHED))
        if (step + 1) % config.sample_every == 0 or step + 1 == config.steps:
            batch.show(run, scores)
        # What is saved changes here alone: a run that is stopped on the way begins the step anew.
        state["drawn"], state["replies"] = drawn, replies


if __name__ == "__main__":
    run_script(main, Config, __doc__)
