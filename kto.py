"""Learn from replies that are good or bad, one by one, with no pair to compare: KTO.

    r(y)  = log pi(y|x) - log ref(y|x), summed over the reply, its end token included
    z     = max(0, mean of r(y') over mismatched pairs: the prompt of one reply, another prompt's reply)
    good  good_weight (1 - sigma(beta (r(y) - z)))
    bad   bad_weight (1 - sigma(beta (z - r(y))))             (Ethayarajh et al. 2024, eq. 8)

The loss is the mean over replies. z estimates KL(pi || ref), the point against which a reply is felt as gain
or loss. It is that of the whole optimiser step, over all ranks, of the policy as it is before the step, and
no gradient goes through it. The pairs: to each prompt the reply that stands before its own in the step, or
else the nearest before that which belongs to another prompt. Replies of no token are left out of it, what the
context can't hold is cut off, and in a step of one prompt alone z is 0. The reference's log-probabilities of
the replies are computed once, before training, those of the pairs in each step.

With g good and b bad replies, good_weight g / (bad_weight b) should be 1 or a little above (eq. 9): the
script says what it is. --data has labelled replies (label: true or false). Of pairs the chosen reply is good
and the rejected one bad; of rankings the first and the last, and those between are left out.

At the start r and z are 0, the loss is half the mean weight, and the slope of r is -beta / 4 times the weight
for good and +beta / 4 for bad ones. A reply far from z on either side teaches little, as sigma is flat there.

What it converges to is not the pi* = ref exp(r / beta) / Z of PPO and DPO. A reply that has g good and b bad
labels has the pull good_weight g - bad_weight b. With z held fixed and beta up to 1, the expected loss is
least where replies without a pull above 0 have no probability, and pi of the others is in proportion to
pull sigma'(beta (r(y) - z)): ref counts in sigma' alone.

On the task of bench/optimum.py (beta 0.9, replies of one symbol, good with probability sigma(r)) 100 steps
end at a total variation of 0.015 from that for replies drawn as the reference draws them, weights of 1 and so
a z of 0, and at 0.006 for evenly drawn ones, --good-weight 3 and so a z of 3.4. That optimum is 0.25 and
0.11 away from pi*. For replies of up to two symbols, and a reference nearer to uniform, 500 steps end at
0.003 where all pulls are above 0 (beta 0.3), but at 0.05 and 0.08 where some are not (beta 0.9). There, it
seems, what falls too far early on comes back slowly, as sigma is flat.

What differs between implementations:
    here                                     TRL 1.16, others                              switch
    z over the step, all passes and ranks    over each pass of each rank, then their       none
                                               mean (align-anything before #216: of the
                                               last pass)
    replies of another prompt                of the row before, whosever it is             none
    mismatched pairs themselves              rlhf-book: the batch's own log-ratios,        none
                                               rolled, which changes no mean
Left out: DPO's kin on pairs (see dpo.py), APO, BCO.

    python kto.py --model runs/sft --data runs/preferences/train.jsonl --steps 120 --good-weight 1.3

On the embedded task, from the demo's SFT model and preferences (seed 0), that takes the gold score on 508
held-out prompts from 0.198 to 0.807 (standard errors 0.039 and 0.024), at a KL of 0.89 nats per reply, in
95 s of CPU time (28 November 2026, one thread of a busy Xeon).

Legend: B replies (rows), T tokens.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch

from data import (
    Example, collate, context_of, count_steps, describe, drop_long, encode_group, endless_batches,
    per_example)
from formats.model_folder import load_model, open_model, save_model
from formats.rows import Row
from formats.sources import read_rows, split_by_prompt
from model import GPT, frozen_reference, prepare_training
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, RunConfig, require
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr
from rollout import show_samples


@dataclass
class Config(RunConfig):
    # files of labelled replies or preferences: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or
    # hf:org/name:split
    data: str = "runs/preferences/train.jsonl"
    val_data: str = ""  # file of held-out replies; without it --val-fraction of --data
    # checkpoint folder or hub name of the policy to start from, or scratch
    model: str = "runs/sft"
    reference: str = ""  # the same of the reference; without it --model is the reference too
    out: str = "runs/kto"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 500  # optimiser steps
    epochs: Natural = 0  # passes over the data, instead of --steps; 0 goes by --steps
    batch_tokens: Count = 4096  # tokens per optimiser step over all ranks, padding included
    # tokens per forward pass on one rank, at most; lower it when memory is short
    micro_batch_tokens: Count = 8192
    beta: Positive = 0.3  # how fast a reply's gain or loss saturates, per nat; 0.1 is usual for large models
    good_weight: Positive = 1.0  # what a good reply counts
    bad_weight: Positive = 1.0  # what a bad reply counts
    lr: Positive = 1e-3  # peak learning rate; falls to a tenth on a cosine
    warmup: Natural = 20  # steps of linear warm-up
    weight_decay: NonNegative = 0.0  # of matrices; norms, biases and embeddings don't decay
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    val_fraction: Fraction = 0.1  # share of a file's prompts held out
    eval_every: Count = 100  # steps between held-out losses and printed samples
    max_new_tokens: Count = 40  # longest sample printed, tokens


class Labelled(NamedTuple):
    """A reply and what people said of it."""
    row: Row
    example: Example
    good: bool


def kto_loss(log_ratios, good, z, weight, config):
    """Sum () over replies of weight * loss (the formulas at the top of the file).

    log_ratios (B,): log pi(y|x) - log ref(y|x), summed over each reply, fp32; good (B,) bool; z (): the KL
    point, no gradient; weight (B,).
    """
    gain = torch.where(good, log_ratios - z.detach(), z.detach() - log_ratios)  # (B,)
    value = torch.where(good, config.good_weight, config.bad_weight)  # (B,)
    return (weight * value * torch.sigmoid(-config.beta * gain)).sum()


def mismatched_pairs(batch, replies):
    """[(i, j)]: for each number i of a batch the nearest j before it, round the end, of another prompt.

    replies: [Labelled]. Those without tokens are left out, on either side.
    """
    spoken = [i for i in batch if True in replies[i].example.mask]
    pairs = []
    for place, i in enumerate(spoken):
        for back in range(1, len(spoken)):
            j = spoken[place - back]
            if replies[j].row.prompt != replies[i].row.prompt:
                pairs.append((i, j))
                break
    return pairs


def mismatched(asked, other, limit):
    """Example of one example's prompt with another's reply, cut to at most limit tokens."""
    start, begin = asked.mask.index(True), other.mask.index(True)
    ids = asked.ids[:start] + other.ids[begin:]
    mask = [False] * start + other.mask[begin:]
    return Example(ids[:limit], mask[:limit])


def kl_point(log_ratios):
    """z () of the log-ratios of mismatched pairs (N,): their mean, at least 0; 0 of none."""
    return log_ratios.sum().div(max(1, len(log_ratios))).clamp(min=0)


def reply_logprobs(run, model, examples, budget, pad):
    """Summed log-probability of each example's reply (N,), on the CPU, the same on every rank."""
    def read(ids, mask, lengths):
        logprobs, _ = model(ids, mask)  # (B, T)
        return logprobs.sum(1)

    return per_example(run, model, examples, budget, pad, read)


def open_reference(config, tokenizer):
    """The model that --reference names, never to be trained."""
    reference, other = load_model(config.reference, GPT, allow_pickle=config.allow_pickle)
    require(other.same_as(tokenizer),
            f"--reference {config.reference} has another tokenizer than --model {config.model}")
    return reference.requires_grad_(False)


def load_replies(config, tokenizer, limit, say):
    """(training, held-out) lists of Labelled from --data, --val-data and --val-fraction."""
    rows = read_rows(config.data, "labels", say, config.part, config.skip_bad)
    if config.val_data:
        held_out = read_rows(config.val_data, "labels", say)
    else:
        rows, held_out = split_by_prompt(rows, config.val_fraction, say)
    require(rows, f"--val-fraction {config.val_fraction} leaves nothing to train on")
    sides = []
    for side in (rows, held_out):
        found = []
        for row in side:
            for example, rank in zip(encode_group(tokenizer, row), row.ranks):
                found.append(Labelled(row, example, rank == 0))
        if found:
            found = drop_long(found, [len(one.example.ids) for one in found], limit, say)
        sides.append(found)
    train, val = sides
    say(f"{len(train)} replies to train on and {len(val)} held out, for instance, the reply in [[ ]],\n"
        f"{describe(tokenizer, *train[0].example)}")
    return train, val


def say_balance(train, config, say):
    """Say how the weights of good and bad replies compare."""
    good = sum(reply.good for reply in train)
    bad = len(train) - good
    say(f"{good} good and {bad} bad replies")
    if good and bad:
        balance = config.good_weight * good / (config.bad_weight * bad)
        if not 0.9 < balance < 1.6:
            say(f"good ones weigh {balance:.3g} times as much as bad ones; --good-weight "
                f"{config.bad_weight * bad / good:.3g} makes that 1")
    else:
        say("warning: all replies have the same label, so nothing says what is better")


def main(config):
    run = Run(config)
    model, tokenizer = open_model(config, GPT)
    if config.reference:
        reference = open_reference(config, tokenizer)
    else:
        reference = frozen_reference(model, config)
    prepare_training(model, config)

    # 1. rows to labelled replies
    limit = min(context_of(config, model), reference.config.block_size)
    train, val = load_replies(config, tokenizer, limit, run.say)
    say_balance(train, config, run.say)
    costs = [len(reply.example.ids) for reply in train]

    # 2. model, optimiser, reference log-probabilities of all that the steps will visit
    policy = run.parallel(model)
    reference = run.parallel(reference)
    optimizer = adamw(model, config.lr, config.weight_decay)
    steps = count_steps(config, costs)

    def write(folder):
        save_model(folder, model, tokenizer, config)

    modules = {"policy": model}
    optimizers = {"optimizer": optimizer}
    first, _ = run.begin(modules, optimizers, {"": write}, best="-val_loss", steps=steps)
    batches = endless_batches(costs, config.batch_tokens, config.seed)
    plan = [next(batches) for _ in range(steps)]
    budget = config.micro_batch_tokens
    pad = tokenizer.pad
    visited = sorted({i for batch in plan for i in batch})
    run.say(f"computing the reference's log-probabilities of {len(visited)} replies")
    flat = reply_logprobs(run, reference, [train[i].example for i in visited], budget, pad)  # (visited,)
    ref_logprobs = dict(zip(visited, flat))
    val_examples = [reply.example for reply in val]
    if val:
        ref_val = reply_logprobs(run, reference, val_examples, budget, pad)
    # No dropout: without --reference the policy must start equal to the reference.
    model.eval()

    def z_of(batch, replies):
        pairs = mismatched_pairs(batch, replies)
        examples = [mismatched(replies[i].example, replies[j].example, limit) for i, j in pairs]
        logprobs = reply_logprobs(run, model, examples, budget, pad)  # (N,)
        return kl_point(logprobs - reply_logprobs(run, reference, examples, budget, pad))

    def validate(step):
        """Log the loss and what goes with it on held-out replies, and print samples."""
        log_ratios = reply_logprobs(run, model, val_examples, budget, pad) - ref_val  # (N,)
        good = torch.tensor([reply.good for reply in val])
        z = z_of(range(len(val)), val)
        loss = kto_loss(log_ratios, good, z, torch.full_like(log_ratios, 1 / len(val)), config)
        rewards = config.beta * log_ratios
        margin = rewards[good].sum() / max(1, good.sum()) - rewards[~good].sum() / max(1, (~good).sum())
        run.log(step, {"val_loss": loss, "val_kl": z, "val_margin": margin}, show=("val_loss", "val_margin"))
        rows = [reply.row for reply in val]
        show_samples(run, model, tokenizer, rows, config.max_new_tokens, run.seed_step(step))

    # 3. train
    for step in run.steps(first, steps, validate if val else None):
        run.seed_step(step)
        batch = plan[step]
        z = z_of(batch, train).to(run.device)
        goods = sum(train[i].good for i in batch)  # on all ranks
        totals = {"kl": z / run.world_size}
        pieces = run.split(batch, costs, budget)
        for piece, counts in run.passes(pieces, policy):
            replies = [train[i] for i in piece]
            ids, mask, _ = collate([reply.example for reply in replies], pad, run.device)  # (B, T)
            good = torch.tensor([reply.good for reply in replies]).to(run.device, non_blocking=True)
            reference_sums = torch.stack([ref_logprobs[i] for i in piece]).to(run.device, non_blocking=True)
            with run.autocast():
                logprobs = policy(ids, mask)[0].sum(1)  # (B,)
            log_ratios = logprobs - reference_sums
            weight = torch.full_like(log_ratios, counts / len(batch))
            loss = kto_loss(log_ratios, good, z, weight, config)
            run.backward(loss, optimizer)
            metrics = {"loss": loss}
            for name, chosen, number in (("good", good, goods), ("bad", ~good, len(batch) - goods)):
                share = chosen * counts / max(1, number)  # (B,)
                metrics[f"{name}_reward"] = config.beta * (share * log_ratios).sum()
                metrics[f"{name}_logprob"] = (share * logprobs).sum()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value.detach()
        lr = scheduled_lr(step, steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            metrics = {name: run.all_sum(value) for name, value in totals.items()}
            metrics["lr"] = lr
            metrics["grad_norm"] = grad_norm
            run.log(step + 1, metrics, show=("loss", "kl", "good_reward", "bad_reward"))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
