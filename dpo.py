"""Direct preference optimisation: fit preferences with the policy itself, no reward model, no sampling.

    h = beta * [ (log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x)) ]   (Rafailov et al. 2023, eq. 7)
    dpo    -(1 - e) log sigma(h) - e log sigma(-h)      e: --label-smoothing (cDPO), 0 for plain DPO
    ipo    (h / beta - 1 / (2 beta))^2                  (Azar et al. 2023, eq. 17)
    hinge  max(0, 1 - h)                                (SLiC, Zhao et al. 2023)

w is the chosen reply, l the rejected one; log-probabilities are summed over the reply, its end token
included, and for ipo too they are not averaged. beta * (log pi - log ref) is the implicit reward. Rankings
of K replies count as all their pairs, averaged over the prompt's pairs, each reply in one forward pass. The
reference's log-probabilities are computed once, before training. Both log-probabilities usually fall while
the margin grows: watch chosen_logprob. ref is the model that training starts from, or that of --reference:
rounds of DPO on new replies, each from the last round's policy, may all refer to the first model that way.
Left out: a term that holds the chosen log-probability up (DPOP, RPO), KTO and ORPO.

    python dpo.py --model runs/sft --data runs/preferences/train.jsonl --out runs/dpo

On the embedded task the gold score goes from 0.1 to 0.8 in 1.5 minutes on 2 cores.

Legend: B replies (rows), T tokens, P pairs.
"""
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from data import (
    collate, context_of, count_steps, endless_batches, per_example, preference_groups, ranked_pairs,
    ranking_accuracy)
from formats.model_folder import load_model, open_model, save_model
from model import GPT, frozen_reference, prepare_training
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, RunConfig, require
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr
from rollout import show_samples


@dataclass
class Config(RunConfig):
    # files of preferences: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/preferences/train.jsonl"
    val_data: str = ""  # file of held-out preferences; without it --val-fraction of --data
    # checkpoint folder or hub name of the policy to start from, or scratch
    model: str = "runs/sft"
    reference: str = ""  # the same of the reference; without it --model is the reference too
    out: str = "runs/dpo"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 500  # optimiser steps
    epochs: Natural = 0  # passes over the data, instead of --steps; 0 goes by --steps
    batch_tokens: Count = 4096  # tokens per optimiser step over all ranks, padding included
    # tokens per forward pass on one rank, at most; lower it when memory is short
    micro_batch_tokens: Count = 8192
    loss: Literal["dpo", "ipo", "hinge"] = "dpo"  # see the formulas above
    beta: Positive = 0.3  # strength of the tie to the reference, per nat; 0.1 is usual for large models
    # probability that a label is the wrong way round (loss dpo)
    label_smoothing: Annotated[float, ">= 0", "< 0.5"] = 0.0
    lr: Positive = 1e-3  # peak learning rate; falls to a tenth on a cosine
    warmup: Natural = 20  # steps of linear warm-up
    weight_decay: NonNegative = 0.0  # of matrices; norms, biases and embeddings don't decay
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    val_fraction: Fraction = 0.1  # share of a file's prompts held out
    eval_every: Count = 100  # steps between held-out accuracies and printed samples
    max_new_tokens: Count = 40  # longest sample printed, tokens


def preference_loss(log_ratios, better, worse, weight, beta, kind="dpo", label_smoothing=0.0):
    """Sum over pairs of weight * loss (the formulas at the top of the file).

    log_ratios (B,): log pi(y|x) - log ref(y|x), summed over each reply, fp32; better, worse (P,): the pair's
    positions in it; weight (P,). Returns (scalar, {accuracy, margin}): weighted sums; margin is that of the
    implicit rewards, and a tie (as at the start, where policy and reference are the same) counts half as
    accurate.
    """
    gap = log_ratios[better] - log_ratios[worse]  # (P,)
    h = beta * gap
    if kind == "dpo":
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    elif kind == "ipo":
        losses = (gap - 1 / (2 * beta)).square()
    elif kind == "hinge":
        losses = (1 - h).clamp(min=0)
    else:
        raise ValueError(f"unknown loss {kind}")
    accuracy = (h > 0).float() + 0.5 * (h == 0).float()
    metrics = {
        "accuracy": (weight * accuracy).sum(),
        "margin": (weight * h).sum(),
    }
    return (weight * losses).sum(), metrics


def replies_of(groups):
    """[Example] of the replies of some groups, laid end to end."""
    examples = []
    for group in groups:
        examples += group.examples
    return examples


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


def main(config):
    run = Run(config)
    require(config.label_smoothing == 0 or config.loss == "dpo",
            f"--label-smoothing is for --loss dpo; {config.loss} has no probability of a label to smooth")
    model, tokenizer = open_model(config, GPT)
    reference = frozen_reference(model, config)
    if config.reference:
        reference = open_reference(config, tokenizer)
    prepare_training(model, config)

    # 1. rows to groups of encoded replies
    limit = min(context_of(config, model), reference.config.block_size)
    train, val = preference_groups(config, tokenizer, limit, run.say)
    costs = [group.longest for group in train]
    replies = [len(group.examples) for group in train]
    with_margin = sum(group.row.margin != 0 for group in train)
    if with_margin:
        run.say(f"warning: {with_margin} rows have a margin, which only reward.py uses; "
                "here it counts for nothing")

    # 2. model, optimiser, reference log-probabilities of the prompts that the steps will visit
    policy = run.parallel(model)
    reference = run.parallel(reference)
    optimizer = adamw(model, config.lr, config.weight_decay)
    steps = count_steps(config, costs, replies)

    def write(folder):
        save_model(folder, model, tokenizer, config)

    modules = {"policy": model}
    optimizers = {"optimizer": optimizer}
    first, _ = run.begin(modules, optimizers, {"": write}, best="-val_loss", steps=steps)
    batches = endless_batches(costs, config.batch_tokens, config.seed, rows=replies)
    plan = [next(batches) for _ in range(steps)]
    visited = set()
    for batch in plan:
        visited.update(batch)
    visited = sorted(visited)
    run.say(f"computing the reference's log-probabilities of {len(visited)} prompts' replies")
    budget = config.micro_batch_tokens
    pad = tokenizer.pad
    examples = replies_of([train[i] for i in visited])
    flat = reply_logprobs(run, reference, examples, budget, pad)  # (replies of all visited,)
    sizes = [replies[i] for i in visited]
    ref_logprobs = dict(zip(visited, flat.split(sizes)))
    val_rows = [group.row for group in val]
    val_examples = replies_of(val)
    if val:
        ref_val = reply_logprobs(run, reference, val_examples, budget, pad)
    del reference
    # No dropout: without --reference the policy must start equal to the reference.
    model.eval()

    def validate(step):
        logprobs = reply_logprobs(run, model, val_examples, budget, pad)  # (N,)
        log_ratios = logprobs - ref_val
        better, worse, weight, _ = ranked_pairs(val_rows)
        weight = weight / len(val)
        loss, result = preference_loss(
            log_ratios, better, worse, weight, config.beta, config.loss, config.label_smoothing)
        accuracy, low, high = ranking_accuracy(log_ratios.numpy(), val_rows)
        metrics = {
            "val_loss": loss,
            "val_accuracy": accuracy,
            "val_accuracy_low": low,
            "val_accuracy_high": high,
            "val_margin": result["margin"],
        }
        run.log(step, metrics, show=("val_accuracy",))
        show_samples(run, model, tokenizer, val_rows, config.max_new_tokens, run.seed_step(step))

    # 3. train
    for step in run.steps(first, steps, validate if val else None):
        run.seed_step(step)
        batch = plan[step]
        totals = {}
        pieces = run.split(batch, costs, budget, replies)
        for piece, counts in run.passes(pieces, policy):
            groups = [train[i] for i in piece]
            ids, mask, _ = collate(replies_of(groups), pad, run.device)  # (B, T)
            pairs = ranked_pairs([group.row for group in groups])
            better, worse, weight, _ = (t.to(run.device, non_blocking=True) for t in pairs)  # (P,)
            weight = weight * counts / len(batch)
            reference_sums = torch.cat([ref_logprobs[i] for i in piece])  # (B,)
            reference_sums = reference_sums.to(run.device, non_blocking=True)
            with run.autocast():
                logprobs = policy(ids, mask)[0].sum(1)  # (B,)
            log_ratios = logprobs - reference_sums
            loss, metrics = preference_loss(
                log_ratios, better, worse, weight, config.beta, config.loss, config.label_smoothing)
            run.backward(loss, optimizer)
            metrics["loss"] = loss
            metrics["chosen_logprob"] = (weight * logprobs[better]).sum()
            metrics["rejected_logprob"] = (weight * logprobs[worse]).sum()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value.detach()
        lr = scheduled_lr(step, steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            metrics = {name: run.all_sum(value) for name, value in totals.items()}
            metrics["lr"] = lr
            metrics["grad_norm"] = grad_norm
            shown = ("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob")
            run.log(step + 1, metrics, show=shown)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
