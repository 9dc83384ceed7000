"""Reward model: learn from rankings which reply people prefer.

    L = -mean over prompts of 1/|pairs| sum over ranked pairs (w, l) of log sigma(r_w - r_l - m)   (InstructGPT, eq. 1)

The K replies to a prompt go through the trunk once each, and all pairs that their ranks decide sit in one batch
element; a chosen/rejected pair is K = 2 (Bradley-Terry). m is the row's margin (Llama 2, eq. 2), 0 if it has none.
Ties make no pair. The score is read at the last token, which is the end token. After training, the mean score of
the demonstrations is folded into the weights, so that 0 means "as good as a demonstration" (not where the last norm is an
RMSNorm, which has no bias to hold it).
Left out: a language-model term, a centring term, soft labels for ties.

    python reward.py --model runs/sft --data runs/preferences/train.jsonl --val-data runs/preferences/heldout.jsonl
    python reward.py --model runs/sft --data toy       narrow candidates: without a KL term PPO fools it

The first orders 0.88 of the held-out pairs right, where the labels' noise allows 0.90, after 2 minutes on 2 cores.

Legend: B replies (rows), T tokens, P pairs.
"""
import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import toy
from model import prepare
from formats.model_folder import open_model, save_model
from data import collate, count_steps, encode_group, endless_batches, preference_groups, ranked_pairs, ranking_accuracy
from formats.rows import Row
from formats.sources import read_rows
from model import GPT, ScalarModel, last_scores, shifted
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, RunConfig, require
from plumbing.steps import adamw, scheduled_lr
from plumbing.run import Run, run_script
from plumbing.disk import write_json


@dataclass
class Config(RunConfig):
    data: str = "toy"  # toy, or files of preferences: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    val_data: str = ""  # file of held-out preferences; without it --val-fraction of --data (toy holds out its own)
    demonstrations: str = ""  # toy, or a file, whose mean score becomes 0; without it: the best reply of every training row
    model: str = "runs/sft"  # checkpoint folder or hub name of a language model whose trunk to start from, or scratch
    out: str = "runs/reward"  # folder for the checkpoint, metrics.jsonl and evaluation.json
    steps: Count = 1200  # optimiser steps; more than one pass over the data overfits
    epochs: Natural = 0  # passes over the data, instead of --steps; 0 goes by --steps
    batch_tokens: Count = 4096  # tokens per optimiser step over all ranks, padding included
    micro_batch_tokens: Count = 8192  # tokens per forward pass on one rank, at most; lower it when memory is short
    lr: Positive = 2e-3  # peak learning rate; falls to a tenth on a cosine
    warmup: Natural = 100  # steps of linear warm-up
    weight_decay: NonNegative = 0.01  # of matrices; norms, biases and embeddings don't decay
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    val_fraction: Fraction = 0.1  # share of a file's prompts held out
    eval_every: Count = 100  # steps between held-out accuracies


def ranking_loss(scores, better, worse, weight, margin):
    """Sum over pairs of weight * -log sigma(scores[better] - scores[worse] - margin).

    scores (B,) fp32; better, worse (P,) positions in scores; weight, margin (P,). Returns (scalar, {accuracy, gap}),
    each metric the weighted sum over pairs; ties count half as accurate. Ouyang et al. 2022, eq. 1; Llama 2, eq. 2.
    """
    gap = scores[better] - scores[worse]  # (P,)
    accuracy = (gap > 0).float() + 0.5 * (gap == 0).float()
    return (weight * -F.logsigmoid(gap - margin)).sum(), {"accuracy": (weight * accuracy).sum(), "gap": (weight * gap).sum()}


@torch.no_grad()
def score_replies(run, model, groups, budget, pad):
    """Scores (fp32, numpy) of all replies of some groups [[(ids, mask)]], laid end to end. The same on every rank."""
    examples = [example for group in groups for example in group]
    lengths = [len(ids) for ids, _ in examples]
    scores = torch.zeros(len(examples), device=run.device)
    model.eval()
    for piece, weight in run.passes(run.split(range(len(examples)), lengths, budget)):
        ids, _, ends = collate([examples[i] for i in piece], pad, run.device)
        with run.autocast():
            scores[torch.tensor(piece).to(run.device, non_blocking=True)] += weight * last_scores(model, ids, ends)
    model.train()
    return run.all_sum(scores).cpu().numpy()


def evaluate(scores, rows):
    """How well scores order the replies of held-out rows.

    Returns accuracy (share of ranked pairs in the right order, ties half) and its 95 % interval [low, high];
    length_accuracy (that of taking the longer reply, or the shorter one, whichever is more often right); bayes_accuracy
    (that of the true scores, where the rows have them: what label noise allows); pairs; calibration (for ten bins of
    sigma(|difference|), the mean prediction and the share that came true); length_correlation (of score and characters).
    """
    better, worse, _, _ = (t.numpy() for t in ranked_pairs(rows))
    replies = np.array([len(reply) for row in rows for reply in row.replies])
    accuracy, *interval = ranking_accuracy(scores, rows)
    by_length_alone = ranking_accuracy(replies, rows)[0]
    result = {"accuracy": accuracy, "accuracy_interval": interval, "length_accuracy": max(by_length_alone, 1 - by_length_alone), "pairs": len(better)}
    if all(row.gold for row in rows):
        result["bayes_accuracy"] = ranking_accuracy(np.array([g for row in rows for g in row.gold]), rows)[0]
    gap = scores[better] - scores[worse]
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    result["calibration"] = [{"predicted": float(confidence[bins == b].mean()), "observed": float((gap[bins == b] > 0).mean()),
                              "pairs": int((bins == b).sum())} for b in range(10) if (bins == b).any()]
    result["length_correlation"] = float(np.corrcoef(scores, replies)[0, 1]) if scores.std() * replies.std() > 0 else 0.0
    return result


def main(config):
    run = Run(config)
    language_model, tokenizer = open_model(config, GPT)
    torch.manual_seed(config.seed)
    model = ScalarModel.from_trunk(language_model, share=True)
    del language_model

    # 1. rows to groups of encoded replies
    limit = min(config.max_length or model.config.block_size, model.config.block_size)
    train, val = preference_groups(config, tokenizer, limit, run.say)
    lengths = [max(len(ids) for ids, _ in group) for _, group in train]
    replies = [len(group) for _, group in train]
    shifts = model.can_shift and config.lora_save == "merged"
    if not shifts:
        run.say("scores stay as they are: an adapter, or a last norm without bias (RMSNorm), has no weight that could make 0 mean a demonstration")
        demonstrations = []
    elif config.demonstrations == "toy":
        demonstrations = toy.World(config.seed).demonstrations("train", per_prompt=1)
    elif config.demonstrations:
        demonstrations = [row for row in read_rows(config.demonstrations, "demonstrations", run.say) if row.prompt]
    else:
        demonstrations = [Row(row.prompt, [row.replies[int(np.argmin(row.ranks))]], [0]) for row, _ in train[:2000]]
    demonstrations = [group for group in (encode_group(tokenizer, row) for row in demonstrations) if len(group[0][0]) <= limit]
    require(demonstrations or not shifts, f"--demonstrations {config.demonstrations}: every row is longer than {limit} tokens")

    # 2. model and optimiser
    prepare(model, config)
    reward = run.parallel(model)
    optimizer = adamw(model, config.lr, config.weight_decay)
    config.steps = count_steps(config, lengths, replies)
    result = {}  # of the last evaluation

    def write(folder):
        change, centre = (lambda weights: weights), {}
        if shifts:  # training goes on unshifted, so saving can't change it
            scores = score_replies(run, model, demonstrations, config.micro_batch_tokens, tokenizer.pad)
            change = functools.partial(shifted, amount=float(scores.mean()))
            centre = {"demonstrations_mean_before": float(scores.mean()), "demonstrations_std": float(scores.std())}
        save_model(folder, model, tokenizer, config, change)
        if run.main and run.step == config.steps and val:
            write_json(folder / "evaluation.json", result | centre)

    def evaluate_now(step):
        result.update(evaluate(score_replies(run, model, [g for _, g in val], config.micro_batch_tokens, tokenizer.pad), [r for r, _ in val]))
        run.log(step, {f"val_{name}": result[name] for name in ("accuracy", "bayes_accuracy") if name in result}, show=("val_accuracy",))

    first, _ = run.begin({"reward": model}, {"optimizer": optimizer}, {"": write}, best="val_accuracy")
    batches = endless_batches(lengths, config.batch_tokens, config.seed, first, replies)
    model.train()

    # 3. train
    for step in run.steps(first, config.steps, evaluate_now if val else None):
        run.seed_step(step)
        batch = next(batches)
        totals = {}
        for piece, share in run.passes(run.split(batch, lengths, config.micro_batch_tokens, replies), reward):
            ids, _, ends = collate([example for i in piece for example in train[i][1]], tokenizer.pad, run.device)  # (B, T)
            better, worse, weight, margin = (t.to(run.device, non_blocking=True) for t in ranked_pairs([train[i][0] for i in piece]))
            with run.autocast():
                scores = last_scores(reward, ids, ends)  # (B,)
            loss, metrics = ranking_loss(scores, better, worse, weight * share / len(batch), margin)
            run.backward(loss, optimizer)
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0) + value.detach()
        lr = scheduled_lr(step, config.steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            run.log(step + 1, {name: run.all_sum(value) for name, value in totals.items()} | {"lr": lr, "grad_norm": grad_norm}, show=("loss", "accuracy", "gap"))
    if result:
        bayes = f", Bayes {result['bayes_accuracy']:.3f}" if "bayes_accuracy" in result else ""
        low, high = result["accuracy_interval"]
        run.say(f"held-out accuracy {result['accuracy']:.3f} (95 %: {low:.3f} to {high:.3f}), "
                f"by length alone {result['length_accuracy']:.3f}{bayes}")
        run.say("calibration (predicted -> came true): " + "  ".join(f"{b['predicted']:.2f} -> {b['observed']:.2f}" for b in result["calibration"]))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
