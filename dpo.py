"""Direct preference optimisation: fit preferences with the policy itself, no reward model, no sampling.

    h = beta * [ (log pi(w|x) - log ref(w|x)) - (log pi(l|x) - log ref(l|x)) ]       (Rafailov et al. 2023, eq. 7)
    dpo    -(1 - e) log sigma(h) - e log sigma(-h)      e: --label-smoothing (cDPO), 0 for plain DPO
    ipo    (h / beta - 1 / (2 beta))^2                  (Azar et al. 2023, eq. 17), log-probabilities summed, not averaged
    hinge  max(0, 1 - h)                                (SLiC, Zhao et al. 2023)

w is the chosen reply, l the rejected one; log-probabilities are summed over the reply, its end token included.
beta * (log pi - log ref) is the implicit reward. Rankings of K replies count as all their pairs, averaged over the
prompt's pairs, each reply in one forward pass. The reference's log-probabilities are computed once, before training.
Both log-probabilities usually fall while the margin grows: watch chosen_logprob.
Left out: a term that holds the chosen log-probability up (DPOP, RPO), KTO and ORPO.

    python dpo.py --model runs/sft --data runs/preferences/train.jsonl --out runs/dpo      gold score 0.1 to 0.8 in 1.5 minutes on 2 cores

Legend: B replies (rows), T tokens, P pairs.
"""
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from model import prepare
from formats.model_folder import open_model, save_model
from data import collate, count_steps, endless_batches, preference_groups, ranked_pairs, ranking_accuracy
from model import GPT, twin
from rollout import show_samples
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, RunConfig, require
from plumbing.steps import adamw, scheduled_lr
from plumbing.run import Run, run_script


@dataclass
class Config(RunConfig):
    data: str = "toy"  # toy, or files of preferences: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    val_data: str = ""  # file of held-out preferences; without it --val-fraction of --data (toy holds out its own)
    model: str = "runs/sft"  # checkpoint folder or hub name of the policy to start from, which is also the reference; or scratch
    out: str = "runs/dpo"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 500  # optimiser steps
    epochs: Natural = 0  # passes over the data, instead of --steps; 0 goes by --steps
    batch_tokens: Count = 4096  # tokens per optimiser step over all ranks, padding included
    micro_batch_tokens: Count = 8192  # tokens per forward pass on one rank, at most; lower it when memory is short
    loss: Literal["dpo", "ipo", "hinge"] = "dpo"  # see the formulas above
    beta: Positive = 0.3  # strength of the tie to the reference, per nat; 0.1 is usual for large models
    label_smoothing: Annotated[float, ">= 0", "< 0.5"] = 0.0  # probability that a label is the wrong way round (loss dpo)
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
    positions in it; weight (P,). Returns (scalar, {accuracy, margin}): weighted sums; margin is that of the implicit
    rewards, and a tie (as at the start, where policy and reference are the same) counts half as accurate.
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
    return (weight * losses).sum(), {"accuracy": (weight * accuracy).sum(), "margin": (weight * h).sum()}


@torch.no_grad()
def reply_logprobs(run, model, examples, budget, pad):
    """Summed log-probability of each example's reply (N,), on the CPU, the same on every rank."""
    model.eval()
    lengths = [len(ids) for ids, _ in examples]
    sums = torch.zeros(len(examples), device=run.device)
    for piece, weight in run.passes(run.split(range(len(examples)), lengths, budget)):
        ids, mask, _ = collate([examples[i] for i in piece], pad, run.device)
        with run.autocast():
            sums[torch.tensor(piece).to(run.device, non_blocking=True)] += weight * model(ids, mask)[0].sum(1)
    return run.all_sum(sums).cpu()


def main(config):
    run = Run(config)
    require(config.label_smoothing == 0 or config.loss == "dpo",
            f"--label-smoothing is for --loss dpo; {config.loss} has no probability of a label to smooth")
    model, tokenizer = open_model(config, GPT)
    shared = config.lora_rank > 0 and config.parallel == "ddp"  # shards have one owner
    reference = twin(model, shared).requires_grad_(False)  # without the adapters that the policy gets
    prepare(model, config)

    # 1. rows to groups of encoded replies
    train, val = preference_groups(config, tokenizer, min(config.max_length or model.config.block_size, model.config.block_size), run.say)
    lengths = [max(len(ids) for ids, _ in group) for _, group in train]
    replies = [len(group) for _, group in train]
    with_margin = sum(row.margin != 0 for row, _ in train)
    if with_margin:
        run.say(f"warning: {with_margin} rows have a margin, which only reward.py uses; here it counts for nothing")

    # 2. model, optimiser, reference log-probabilities of the prompts that the steps will visit
    policy, reference = run.parallel(model), run.parallel(reference)
    optimizer = adamw(model, config.lr, config.weight_decay)
    config.steps = count_steps(config, lengths, replies)
    first, _ = run.begin({"policy": model}, {"optimizer": optimizer}, {"": lambda folder: save_model(folder, model, tokenizer, config)}, best="-val_loss")
    batches = endless_batches(lengths, config.batch_tokens, config.seed, rows=replies)
    plan = [next(batches) for _ in range(config.steps)]
    visited = sorted({i for batch in plan for i in batch})
    run.say(f"computing the reference's log-probabilities of {len(visited)} prompts' replies")
    flat = reply_logprobs(run, reference, [example for i in visited for example in train[i][1]], config.micro_batch_tokens, tokenizer.pad)
    ref_logprobs = dict(zip(visited, flat.split([len(train[i][1]) for i in visited])))
    val_examples = [example for _, group in val for example in group]
    val_pairs = ranked_pairs([row for row, _ in val])[:3] if val else None
    ref_val = reply_logprobs(run, reference, val_examples, config.micro_batch_tokens, tokenizer.pad) if val else None
    del reference
    model.eval()  # no dropout: the policy must start equal to the reference

    def evaluate(step):
        ratios = reply_logprobs(run, model, val_examples, config.micro_batch_tokens, tokenizer.pad) - ref_val
        loss, result = preference_loss(ratios, *val_pairs[:2], val_pairs[2] / len(val), config.beta, config.loss, config.label_smoothing)
        accuracy, low, high = ranking_accuracy(ratios.numpy(), [row for row, _ in val])
        metrics = {"val_loss": loss, "val_accuracy": accuracy, "val_accuracy_low": low, "val_accuracy_high": high}
        run.log(step, metrics | {"val_margin": result["margin"]}, show=("val_accuracy",))
        show_samples(run, model, tokenizer, [row for row, _ in val], config.max_new_tokens, run.seed_step(step))

    # 3. train
    for step in run.steps(first, config.steps, evaluate if val else None):
        run.seed_step(step)
        batch = plan[step]
        totals = {}
        for piece, share in run.passes(run.split(batch, lengths, config.micro_batch_tokens, replies), policy):
            ids, mask, _ = collate([example for i in piece for example in train[i][1]], tokenizer.pad, run.device)  # (B, T)
            better, worse, weight, _ = (t.to(run.device, non_blocking=True) for t in ranked_pairs([train[i][0] for i in piece]))
            weight = weight * share / len(batch)
            reference_sums = torch.cat([ref_logprobs[i] for i in piece]).to(run.device, non_blocking=True)  # (B,)
            with run.autocast():
                logprobs = policy(ids, mask)[0].sum(1)  # (B,)
            loss, metrics = preference_loss(logprobs - reference_sums, better, worse, weight, config.beta, config.loss, config.label_smoothing)
            run.backward(loss, optimizer)
            metrics |= {"loss": loss, "chosen_logprob": (weight * logprobs[better]).sum(), "rejected_logprob": (weight * logprobs[worse]).sum()}
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value.detach()
        lr = scheduled_lr(step, config.steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            run.log(step + 1, {name: run.all_sum(value) for name, value in totals.items()} | {"lr": lr, "grad_norm": grad_norm},
                    show=("loss", "accuracy", "margin", "chosen_logprob", "rejected_logprob"))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
