"""Reward model: learn from rankings which reply people prefer.

    L = -mean over prompts of 1/|pairs| sum over ranked pairs (w, l) of log sigma(r_w - r_l - m)

This is eq. 1 of InstructGPT. The K replies to a prompt go through the trunk once each, and all pairs that
their ranks decide sit in one batch element; a chosen/rejected pair is K = 2 (Bradley-Terry). m is the row's
margin (Llama 2, eq. 2), 0 if it has none. Ties make no pair. The score is read at the last token, which is
the end token. After training, the mean score of the demonstrations is folded into the weights, so that 0
means "as good as a demonstration" (not where the last norm is an RMSNorm, which has no bias to hold it).
Left out: a language-model term, a centring term, soft labels for ties.

    python reward.py --data runs/preferences/train.jsonl --val-data runs/preferences/heldout.jsonl
    python reward.py --data runs/toy/preferences.jsonl

The trunk is that of --model, runs/sft unless you say otherwise. The first orders 0.88 of the held-out pairs
right, where the labels' noise allows 0.90, after 2 minutes on 2 cores. The second learns from narrow
candidates: without a KL term PPO fools it.

Legend: B replies (rows), T tokens, P pairs.
"""
import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data import (
    collate, context_of, count_steps, encode_group, endless_batches, per_example, preference_groups,
    ranked_pairs, ranking_accuracy)
from formats.model_folder import open_model, save_model
from formats.rows import Row
from formats.sources import read_rows
from model import GPT, ScalarModel, last_scores, prepare_training, shifted
from plumbing.disk import write_json
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, RunConfig, require
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr

ENOUGH = 2000  # demonstrations whose mean score becomes 0, at most


@dataclass
class Config(RunConfig):
    # files of preferences: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/preferences/train.jsonl"
    val_data: str = ""  # file of held-out preferences; without it --val-fraction of --data
    # a file whose mean score becomes 0; without it: the best replies of the training rows.
    # 2000 of them at most count
    demonstrations: str = ""
    # checkpoint folder or hub name of a language model whose trunk to start from, or scratch
    model: str = "runs/sft"
    out: str = "runs/reward"  # folder for the checkpoint, metrics.jsonl and evaluation.json
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


def ranking_loss(scores, better, worse, weight, margin):
    """Sum over pairs of weight * -log sigma(scores[better] - scores[worse] - margin).

    scores (B,) fp32; better, worse (P,) positions in scores; weight, margin (P,).
    Returns (scalar, {accuracy, gap}), each metric the weighted sum over pairs; ties count half as accurate.
    Ouyang et al. 2022, eq. 1; Llama 2, eq. 2.
    """
    gap = scores[better] - scores[worse]  # (P,)
    loss = (weight * -F.logsigmoid(gap - margin)).sum()
    accuracy = (gap > 0).float() + 0.5 * (gap == 0).float()
    metrics = {
        "accuracy": (weight * accuracy).sum(),
        "gap": (weight * gap).sum(),
    }
    return loss, metrics


def end_to_end(groups):
    """[Example] of some groups [[Example]]."""
    examples = []
    for group in groups:
        examples += group
    return examples


def score_replies(run, model, groups, budget, pad):
    """Scores (N,) (fp32, numpy) of all replies of some groups [[Example]], laid end to end.

    The same on every rank.
    """
    def read(ids, mask, lengths):
        return last_scores(model, ids, lengths)

    return per_example(run, model, end_to_end(groups), budget, pad, read).numpy()


def ranking_metrics(scores, rows):
    """How well scores (N,) order the replies of held-out rows, laid end to end.

    Returns accuracy (share of ranked pairs in the right order, ties half) and its 95 % interval [low, high];
    length_accuracy (that of taking the longer reply, or the shorter one, whichever is more often right);
    bayes_accuracy (that of the true scores, where the rows have them: what label noise allows); pairs;
    calibration (see `calibration_of`); length_correlation (of score and characters).
    """
    better, worse, _, _ = ranked_pairs(rows)
    gap = scores[better.numpy()] - scores[worse.numpy()]  # (P,)
    lengths, truth = [], []  # (N,)
    for row in rows:
        lengths += [len(reply) for reply in row.replies]
        truth += row.gold or []
    lengths = np.array(lengths)
    accuracy, *interval = ranking_accuracy(scores, rows)
    by_length = ranking_accuracy(lengths, rows)[0]
    result = {
        "accuracy": accuracy,
        "accuracy_interval": interval,
        "length_accuracy": max(by_length, 1 - by_length),
        "pairs": len(better),
    }
    if all(row.gold for row in rows):
        result["bayes_accuracy"] = ranking_accuracy(np.array(truth), rows)[0]
    result["calibration"] = calibration_of(gap)
    # A correlation with what is the same everywhere is not defined.
    result["length_correlation"] = 0.0
    if scores.std() * lengths.std() > 0:
        result["length_correlation"] = float(np.corrcoef(scores, lengths)[0, 1])
    return result


def calibration_of(gap):
    """For ten bins of sigma(|gap|): the mean prediction, and the share that came true.

    gap (P,): of the ranked pairs.
    """
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    calibration = []
    for number in range(10):
        inside = bins == number
        if inside.any():
            calibration.append({
                "predicted": float(confidence[inside].mean()),
                "observed": float((gap[inside] > 0).mean()),
                "pairs": int(inside.sum()),
            })
    return calibration


def zero_demonstrations(config, tokenizer, train, limit, say):
    """[[Example]]: the demonstrations whose mean score is to be 0.

    They come from --demonstrations, or else from the training groups.
    """
    if config.demonstrations:
        rows = read_rows(config.demonstrations, "demonstrations", say)
        rows = [row for row in rows if row.prompt]
    else:
        rows = []
        for row, _ in train:
            best = row.replies[int(np.argmin(row.ranks))]
            rows.append(Row(row.prompt, [best], [0]))
    # Evenly spread, if there are more than enough.
    rows = rows[::-(-len(rows) // ENOUGH)]
    groups = [encode_group(tokenizer, row) for row in rows]
    groups = [group for group in groups if len(group[0].ids) <= limit]
    require(groups, f"--demonstrations {config.demonstrations}: every row is longer than {limit} tokens")
    return groups


def main(config):
    run = Run(config)
    language_model, tokenizer = open_model(config, GPT)
    torch.manual_seed(config.seed)
    model = ScalarModel.from_trunk(language_model, share=True)
    del language_model

    # 1. rows to groups of encoded replies
    limit = context_of(config, model)
    train, val = preference_groups(config, tokenizer, limit, run.say)
    costs = [group.longest for group in train]
    replies = [len(group.examples) for group in train]
    uncertain = sum(group.row.probability != 1 for group in train)
    if uncertain:
        run.say(f"warning: {uncertain} rows have a probability, which only dpo.py uses; "
                "here their labels are certain")
    shifts = model.can_shift and config.lora_save == "merged"
    if shifts:
        demonstrations = zero_demonstrations(config, tokenizer, train, limit, run.say)
    else:
        run.say("scores stay as they are: an adapter, or a last norm without bias (RMSNorm), "
                "has no weight that could make 0 mean a demonstration")

    # 2. model and optimiser
    prepare_training(model, config)
    reward = run.parallel(model)
    optimizer = adamw(model, config.lr, config.weight_decay)
    steps = count_steps(config, costs, replies)
    budget = config.micro_batch_tokens
    pad = tokenizer.pad
    val_rows = [group.row for group in val]
    val_examples = [group.examples for group in val]
    result = {}  # of the last evaluation

    def write(folder):
        centre = {}
        if shifts:
            # Training goes on unshifted, so saving can't change it.
            scores = score_replies(run, model, demonstrations, budget, pad)
            shift = functools.partial(shifted, amount=float(scores.mean()))
            save_model(folder, model, tokenizer, config, shift)
            centre["demonstrations_mean_before"] = float(scores.mean())
            centre["demonstrations_std"] = float(scores.std())
        else:
            save_model(folder, model, tokenizer, config)
        if run.main and run.step == steps and val:
            write_json(folder / "evaluation.json", result | centre)

    def validate(step):
        scores = score_replies(run, model, val_examples, budget, pad)
        result.update(ranking_metrics(scores, val_rows))
        metrics = {"val_accuracy": result["accuracy"]}
        if "bayes_accuracy" in result:
            metrics["val_bayes_accuracy"] = result["bayes_accuracy"]
        run.log(step, metrics, show=("val_accuracy",))

    modules = {"reward": model}
    optimizers = {"optimizer": optimizer}
    first, _ = run.begin(modules, optimizers, {"": write}, best="val_accuracy", steps=steps)
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
            ids, _, lengths = collate(examples, pad, run.device)  # (B, T)
            pairs = ranked_pairs([group.row for group in groups])
            better, worse, weight, margin = (t.to(run.device, non_blocking=True) for t in pairs)  # (P,)
            with run.autocast():
                scores = last_scores(reward, ids, lengths)  # (B,)
            weight = weight * counts / len(batch)
            loss, metrics = ranking_loss(scores, better, worse, weight, margin)
            run.backward(loss, optimizer)
            metrics["loss"] = loss
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value.detach()
        lr = scheduled_lr(step, steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            metrics = {name: run.all_sum(value) for name, value in totals.items()}
            metrics["lr"] = lr
            metrics["grad_norm"] = grad_norm
            run.log(step + 1, metrics, show=("loss", "accuracy", "gap"))
    if result:
        say_result(run, result)


def say_result(run, result):
    bayes = ""
    if "bayes_accuracy" in result:
        bayes = f", Bayes {result['bayes_accuracy']:.3f}"
    low, high = result["accuracy_interval"]
    run.say(f"held-out accuracy {result['accuracy']:.3f} (95 %: {low:.3f} to {high:.3f}), "
            f"by length alone {result['length_accuracy']:.3f}{bayes}")
    bins = []
    for one in result["calibration"]:
        bins.append(f"{one['predicted']:.2f} -> {one['observed']:.2f}")
    run.say("calibration (predicted -> came true): " + "  ".join(bins))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
