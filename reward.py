"""Reward model: learn which reply people prefer from all that they say of replies.

    r(y) = the score of a reply, read at its last token, which is the end token
    d    = r(w) - r(l) - m          w ranked before l; m the row's margin (Llama 2, eq. 2), 0 if it has none
    nu   = threshold of ties, 1 or more; c = log nu
    u    = score of a reply that is just good enough

    what people say          loss                                          flag, paper
    w is better than l       -log sigma(d)                                 Ouyang et al. 2022, eq. 1
                             -log sigma(d - c)                             --ties rao-kupper (1967)
    ... with probability p   p loss(w, l) + (1 - p) loss(l, w)             "probability"; --scale soft
    ... by so much           d with more m                                 "margin"; --scale margin (Llama 2)
    both are as good         none                                          --ties drop
                             -(log sigma(d) + log sigma(-d)) / 2           --ties soft
                             -log (nu^2 - 1) sigma(d - c) sigma(-d - c)    --ties rao-kupper
    both good, both bad      -log sigma(r - u), -log sigma(u - r)          --level: u, of a virtual reply
    rated x                  (r - (x - mean) / deviation)^2                --ratings regress

    beside these             -b log pi(best) / tokens                      --lm-coef b; Zheng et al. 2023
                             a (r(w) + r(l))^2                             --center-coef a; TRL

A row's loss is the mean over its pairs or replies, the step's the mean over its rows of whatever kind. The K
replies to a prompt go through the trunk once each, and all pairs of them sit in one batch element. pi is the
trunk with the language model's head: the token embedding, or a frozen one of its own. nu and u are learned
where no number is given, by plain gradient steps; evaluation.json has them. After training, the mean score of
the demonstrations is folded into the weights, so that 0 means "as good as a demonstration" (not where the
last norm is an RMSNorm, which has no bias to hold it; --center-coef keeps scores about 0 there).
agreement.py measures the result on held-out rows. Left out: several aims at once.

    python reward.py --data runs/preferences/train.jsonl --val-data runs/preferences/heldout.jsonl
    python reward.py --data runs/toy/preferences.jsonl

The first orders 0.88 of the held-out pairs right, where the labels' noise allows 0.90, after 2 minutes on 2
cores. The second learns from narrow candidates: without a KL term PPO fools it.

Legend: B replies (rows), T tokens, P pairs, C width, V vocabulary.
"""
import functools
import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from agreement import agreement, described, draw, language_baselines, score_replies, zero_demonstrations
from data import (
    collate, context_of, count_steps, end_to_end, endless_batches, mean_and_deviation, preference_groups,
    targets_of, useless)
from formats.model_folder import open_model, save_model
from model import GPT, ScalarModel, last_scores, last_scores_and_logprobs, prepare_training, shifted
from plumbing.disk import write_json
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, RunConfig, flag_of, require
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr

RATE = 1.0  # step size of what nu and u are learned as: in either the slope of a loss is at most 2


@dataclass
class Config(RunConfig):
    # files of preferences and other feedback: a.jsonl, or several with commas, or a mixture
    # a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/preferences/train.jsonl"
    val_data: str = ""  # file of held-out feedback; without it --val-fraction of --data
    # a file whose mean score becomes 0; without it: the best replies of the training rows.
    # 2000 of them at most count
    demonstrations: str = ""
    # checkpoint folder or hub name of a language model whose trunk to start from, or scratch
    model: str = "runs/sft"
    out: str = "runs/reward"  # folder for the checkpoint, metrics.jsonl and evaluation.json
    ties: Literal["drop", "soft", "rao-kupper"] = "drop"  # what replies of equal rank teach, see above
    tie_threshold: NonNegative = 0.0  # nu of rao-kupper, above 1; 0 learns it
    scale: Literal["soft", "margin"] = "soft"  # what a comparison on a scale teaches, see above
    scale_margin: Positive = 1.0  # with --scale margin: the margin at the end of the scale
    level: str = "learned"  # u, the score that parts both_good from both_bad: learned, or a number
    # a rating orders the replies to its prompt, or is itself what the score is to be
    ratings: Literal["rank", "regress"] = "rank"
    lm_coef: NonNegative = 0.0  # weight of the language-model term, nats per token of the best reply
    center_coef: NonNegative = 0.0  # weight of the centring term (0.01 in TRL)
    steps: Count = 1200  # optimiser steps; more than one pass over the data overfits
    epochs: Natural = 0  # passes over the data, instead of --steps; 0 goes by --steps
    batch_tokens: Count = 4096  # tokens per optimiser step over all ranks, padding included
    # tokens per forward pass on one rank, at most; lower it when memory is short
    micro_batch_tokens: Count = 8192
    lr: Positive = 2e-3  # peak learning rate; falls to a tenth on a cosine
    warmup: Natural = 100  # steps of linear warm-up
    weight_decay: NonNegative = 0.01  # of matrices; norms, biases and embeddings don't decay
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    val_fraction: Fraction = 0.1  # share of a file's prompts held out
    eval_every: Count = 100  # steps between held-out accuracies


# ---------------------------------------------------------------------------------------------------------
# Losses: sums () of scores (B,) fp32, whose weights add up to 1 over the rows of a step

def ranking_loss(scores, better, worse, weight, margin, right=1.0, cut=0.0):
    """Sum over pairs of weight * -log P(better is preferred), where the label is right with a probability.

    better, worse (P,) positions in scores; weight, margin (P,); right (P,), 1/2 for ties; cut: log nu.
    Returns (scalar, {accuracy, gap, decided}), each metric the weighted sum over pairs that are no ties;
    equal scores count half as accurate. Ouyang et al. 2022, eq. 1; Llama 2, eq. 2; Rao and Kupper 1967.
    """
    gap = scores[better] - scores[worse]  # (P,)
    as_labelled = -F.logsigmoid(gap - margin - cut)
    turned_round = -F.logsigmoid(-gap - margin - cut)
    loss = (weight * (right * as_labelled + (1 - right) * turned_round)).sum()
    accuracy = (gap > 0).float() + 0.5 * (gap == 0).float()
    decided = weight * torch.as_tensor(right != 0.5)
    metrics = {
        "accuracy": (decided * accuracy).sum(),
        "gap": (decided * gap).sum(),
        "decided": decided.sum(),
    }
    return loss, metrics


def tie_loss(scores, one, other, weight, cut):
    """Sum over ties of weight * -log P(tie), P = (nu^2 - 1) sigma(d - c) sigma(-d - c). Rao and Kupper 1967.

    one, other (P,) positions in scores; cut: c = log nu, above 0.
    """
    gap = scores[one] - scores[other]  # (P,)
    cut = torch.as_tensor(cut)
    # log(nu^2 - 1), exact also where nu is close to 1.
    room = torch.log(torch.expm1(2 * cut))
    return (weight * -(room + F.logsigmoid(gap - cut) + F.logsigmoid(-gap - cut))).sum()


def verdict_loss(scores, at, sign, weight, level):
    """Sum of weight * -log P(a reply beats one of score level), or loses to it: sign 1 or -1 (P,)."""
    return (weight * -F.logsigmoid(sign * (scores[at] - level))).sum()


def rating_loss(scores, at, rating, weight):
    """Sum of weight * (score - rating)^2; rating (P,) in deviations from the mean of the training rows."""
    return (weight * (scores[at] - rating).square()).sum()


def centering_loss(scores, better, worse, weight):
    """Sum over pairs of weight * (score + score)^2, which holds the scores about 0."""
    return (weight * (scores[better] + scores[worse]).square()).sum()


def feedback_loss(scores, targets, cut, level, config):
    """Loss () of scores (B,) under their `Targets`, but for the language-model term, and metrics.

    cut: log nu; level: u.
    """
    better, worse, margin, right, weight = targets.pairs
    loss, metrics = ranking_loss(scores, better, worse, weight, margin, right, cut)
    if len(targets.ties[0]):
        loss = loss + tie_loss(scores, *targets.ties, cut)
    if len(targets.verdicts[0]):
        loss = loss + verdict_loss(scores, *targets.verdicts, level)
    if len(targets.ratings[0]):
        loss = loss + rating_loss(scores, *targets.ratings)
    if config.center_coef > 0:
        loss = loss + config.center_coef * centering_loss(scores, better, worse, weight)
    return loss, metrics


def language_loss(logprobs, weight):
    """Sum of weight * -log pi per token, (Q,), of the best replies. Zheng et al. 2023, eq. 4."""
    return (weight * -logprobs).sum()


class Levels:
    """c = log nu and u, given or learned; state, the run's, keeps them. used: which of them the loss has."""

    def __init__(self, config, state, device, groups):
        self.config, self.state = config, state
        has = {"tie_threshold": config.ties == "rao-kupper",
               "level": any(group.row.verdict for group in groups)}
        self.used = [name for name, is_there in has.items() if is_there]
        learns = [getattr(config, name) in (0, "learned") for name in self.used]
        # c is the softplus of the first; it starts at 1/2.
        start = state.get("levels", [math.log(math.expm1(0.5)), 0.0])
        self.learned = torch.tensor(start, device=device, requires_grad=any(learns))
        self.slope = torch.zeros_like(self.learned, requires_grad=False)

    def values(self):
        """(c, u), each () or a number."""
        cut, level = 0.0, self.learned[1]
        if "tie_threshold" in self.used:
            nu = self.config.tie_threshold
            cut = math.log(nu) if nu else F.softplus(self.learned[0])
        if self.config.level != "learned":
            level = float(self.config.level)
        return cut, level

    @torch.no_grad()
    def numbers(self):
        return tuple(map(float, self.values()))

    def add(self, loss):
        """Take note of the slope of a pass's loss."""
        if self.learned.requires_grad:
            slope, = torch.autograd.grad(loss, self.learned, retain_graph=True, allow_unused=True)
            if slope is not None:
                self.slope += slope

    def step(self, run, rate):
        """Go down the slope of all passes and ranks, unless it is not finite."""
        if self.learned.requires_grad:
            slope = run.all_sum(self.slope)  # (2,)
            self.learned.data -= rate * torch.where(slope.isfinite().all(), slope, 0.0)
            self.slope = torch.zeros_like(slope)
            self.state["levels"] = self.learned.tolist()

    def described(self, shift):
        """{tie_threshold, level} as far as they are used, of scores that are lower by shift."""
        cut, level = self.numbers()
        found = {"tie_threshold": math.exp(cut), "level": level - shift}
        return {name: found[name] for name in self.used}


# ---------------------------------------------------------------------------------------------------------
# A run

def check(config):
    """UserError for flags that the others have no use for, or that are no numbers."""
    for name, user, kind in (("tie_threshold", "ties", "rao-kupper"), ("scale_margin", "scale", "margin")):
        given = getattr(config, name) != getattr(Config, name)
        require(not given or getattr(config, user) == kind,
                f"{flag_of(name)} is for {flag_of(user)} {kind}; leave it out with {getattr(config, user)}")
    require(config.tie_threshold == 0 or config.tie_threshold > 1,
            f"--tie-threshold {config.tie_threshold:g} must be above 1, or 0 to learn it; 1 allows no ties, "
            "which is --ties drop")
    number = re.fullmatch(r"learned|[-+]?(\d+\.?\d*|\.\d+)", config.level)
    require(number, f"--level {config.level} is neither a number nor learned")


def shares(totals):
    """Metrics of a step, those of pairs as means over pairs that are no ties, NaN where there are none."""
    decided = totals.pop("decided")
    return totals | {name: totals[name] / decided for name in ("accuracy", "gap")}


def main(config):
    run = Run(config)
    check(config)
    language_model, tokenizer = open_model(config, GPT)
    torch.manual_seed(config.seed)
    model = ScalarModel.from_trunk(language_model, share=True)

    # 1. rows to groups of encoded replies
    limit = context_of(config, model)
    drop = functools.partial(useless, config=config)
    train, val = preference_groups(config, tokenizer, limit, run.say, "feedback", drop)
    costs = [group.longest for group in train]
    replies = [len(group.examples) for group in train]
    standard = mean_and_deviation(train)
    val_rows = [group.row for group in val]
    val_examples = [group.examples for group in val]
    val_targets = targets_of(val_rows, config, standard).times(1, max(1, len(val)))
    shifts = model.can_shift and config.lora_save == "merged"
    if shifts:
        demonstrations = zero_demonstrations(config, tokenizer, train, limit, run.say)
    else:
        run.say("scores stay as they are: an adapter, or a last norm without bias (RMSNorm), has no weight "
                "that could make 0 mean a demonstration; --center-coef holds scores about 0")

    # 2. what the language model itself would prefer; model and optimiser
    budget, pad = config.micro_batch_tokens, tokenizer.pad
    baselines = {}
    if config.model != "scratch" and config.parallel == "ddp":
        baselines = language_baselines(run, language_model, val_examples, budget, pad)
    head = None if language_model.lm_head is None else language_model.lm_head.weight.detach().to(run.device)
    del language_model
    prepare_training(model, config)
    reward = run.parallel(model)
    optimizer = adamw(model, config.lr, config.weight_decay)
    steps = count_steps(config, costs, replies)
    result = {}  # of the last evaluation

    def write(folder):
        centre = levels.described(0.0)
        if shifts:
            # Training goes on unshifted, so saving can't change it.
            scores = score_replies(run, model, demonstrations, budget, pad)
            shift = functools.partial(shifted, amount=float(scores.mean()))
            save_model(folder, model, tokenizer, config, shift)
            centre = levels.described(float(scores.mean()))
            centre["demonstrations_mean_before"] = float(scores.mean())
            centre["demonstrations_std"] = float(scores.std())
        else:
            save_model(folder, model, tokenizer, config)
        if run.main and run.step == steps and val:
            write_json(folder / "evaluation.json", result | centre)

    def validate(step):
        scores = score_replies(run, model, val_examples, budget, pad)
        result.update(agreement(scores, val_rows, baselines))
        loss, _ = feedback_loss(torch.from_numpy(scores), val_targets, *levels.numbers(), config)
        metrics = {f"val_{name}": result[name] for name in ("accuracy", "bayes_accuracy") if name in result}
        run.log(step, {"val_loss": loss} | metrics, show=("val_accuracy",))

    ranked = any(len(set(row.ranks)) > 1 for row in val_rows)
    first, state = run.begin({"reward": model}, {"optimizer": optimizer}, {"": write},
                             best="val_accuracy" if ranked or not val else "-val_loss", steps=steps)
    levels = Levels(config, state, run.device, train)
    batches = endless_batches(costs, config.batch_tokens, config.seed, first, replies)
    model.train()

    # 3. train
    for step in run.steps(first, steps, validate if val else None):
        run.seed_step(step)
        batch = next(batches)
        totals = {}
        pieces = run.split(batch, costs, budget, replies)
        for piece, counts in run.passes(pieces, reward):
            groups = [train[i] for i in piece]
            examples = end_to_end([group.examples for group in groups])
            ids, mask, lengths = collate(examples, pad, run.device)  # (B, T)
            told = targets_of([group.row for group in groups], config, standard)
            with run.autocast():
                if config.lm_coef > 0:
                    read = (ids, lengths, mask, told.best[0])
                    scores, logprobs = last_scores_and_logprobs(reward, *read, head)  # (B,), (Q,)
                else:
                    scores = last_scores(reward, ids, lengths)  # (B,)
            targets = told.to(run.device).times(counts, len(batch))
            loss, metrics = feedback_loss(scores, targets, *levels.values(), config)
            if config.lm_coef > 0:
                metrics["lm_loss"] = language_loss(logprobs, targets.best[1])
                loss = loss + config.lm_coef * metrics["lm_loss"]
            levels.add(loss)
            run.backward(loss, optimizer)
            metrics["loss"] = loss
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value.detach()
        lr = scheduled_lr(step, steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        levels.step(run, scheduled_lr(step, steps, config.warmup, RATE))
        if run.time_to_log(step):
            metrics = shares({name: run.all_sum(value) for name, value in totals.items()})
            metrics["lr"] = lr
            metrics["grad_norm"] = grad_norm
            run.log(step + 1, metrics, show=("loss", "accuracy", "gap"))
    for line in described(result):
        run.say(line)
    if run.main:
        draw(result, run.out / "evaluation.png", run.say)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
