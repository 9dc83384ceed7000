"""Process reward model: learn from labels which steps of a reply are good, neutral or bad.

    L = -1/n sum over labelled steps k of log softmax(z_k)[label_k]       n: labelled steps of the whole batch

z_k (3,) are the logits at the step's last token, and nowhere else is there a loss (Uesato et al. 2022;
Lightman et al. 2023, section 2.6, where the label is a token that the language model predicts there). The
score of a reply is the product of its steps' P(good), that all are good, as in Lightman et al.; or their
minimum, or that of the last (--process-score of the scripts that use it: best_of_n.py, evaluate.py, ppo.py,
grpo.py).

Where a step ends: steps are what stands between separators (--step-separator, kept in the checkpoint). The
reply is encoded whole, as the policy writes it, and a step's last token is the one that holds the last
character of its separator. That token may hold the start of the next step as well ("; so " on the sums, two
newlines where the separator is one), so its logits may have seen that much. The last step of a reply ends
with the reply's last token: its end token, or where it was cut off. So every reply has a step, without any
separator too; parts of nothing but blanks are none.

    14+4-2=?  14+4=18[; ]18-2=16[; so ]16[<end>]                the separator is ; and [ ] are last tokens

--data: rows of {"prompt", "steps": [...], "labels": [...]}, labels -1, 0 or 1 (bad, neutral, good), null for
none, and fewer than steps where labelling stopped at the first error; or PRM800K's files as they are, of both
phases. The completions that a reply of PRM800K does not go on with become rows of their own, in which the
last step alone has a label, so each rating counts once; what a person wrote in their place counts as good.

What differs between implementations:
    here                                      TRL 1.16's experimental PRMTrainer, others
    three classes                             two, neutral counts as bad (its prm800k.py)
    the reply encoded whole; labels at the    each step and separator encoded by itself, so ids are not those
      tokens that hold the separators           that a policy samples
    the last step ends with the end token     with one more separator, which no reply has
    a label counts once                       the steps before a branch count again with each branch
Left out: labels by sampling on from each step (Math-Shepherd), soft labels, neutral counted as good.

    python sums.py --steps-of runs/sft --sums 1000 --out runs/steps
    python process.py --step-separator ";" --val-data runs/steps/steps_heldout.jsonl
    python best_of_n.py --process runs/process --data runs/sums/prompts_heldout.jsonl --judge sums:right

Held-out steps of the sums judged right (1,998 replies of the SFT model of sums.py, --seed 0; 2026-11-28, one
thread of an Intel Xeon; 46 processor seconds): 0.899, where always saying good is right for 0.755, after
training on 3,996 replies (--sums 1000). On half of them it found every reply that ends too early, and a
quarter of the wrong results. Against a reward model that knows the results of the same replies (three seeds,
bench/process.py): the best of 8 replies is right in 0.69 and 0.65 of sums, of 16 in 0.57 and 0.52, where a
vote has 0.57 and 0.67; a vote weighted by either has 0.93 and 0.92. PPO with it learns the sums faster: 0.69
and 0.63 are right in rollouts 11 to 20. docs/process_rewards.md has the rest.

Legend: B replies, T tokens, N labelled steps.
"""
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import (
    context_of, describe, drop_long, encode_dialogue, endless_order, pad_rows, step_offsets, tokens_that_hold,
    with_reply)
from formats.model_folder import open_model, save_model
from formats.rows import Row
from formats.sources import read_rows, split_by_prompt
from model import GPT, ScalarModel, prepare_training, token_index
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, RunConfig, require
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr


@dataclass
class Config(RunConfig):
    # files of replies in steps with labels: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or
    # hf:org/name:split
    data: str = "runs/steps/steps.jsonl"
    val_data: str = ""  # file of held-out rows; without it --val-fraction of --data
    # checkpoint folder or hub name of a language model whose trunk to start from, or scratch
    model: str = "runs/sft"
    out: str = "runs/process"  # folder for the checkpoint and metrics.jsonl
    # what stands between the steps of a reply; \n is a newline. It is kept in the checkpoint
    step_separator: str = r"\n"
    steps: Count = 300  # optimiser steps
    epochs: Natural = 0  # passes over the data, instead of --steps; 0 goes by --steps
    # replies per optimiser step over all ranks, drawn whatever their length: labels may go by it
    batch: Count = 128
    # tokens per forward pass on one rank, at most; lower it when memory is short
    micro_batch_tokens: Count = 8192
    lr: Positive = 2e-3  # peak learning rate; falls to a tenth on a cosine
    warmup: Natural = 50  # steps of linear warm-up
    weight_decay: NonNegative = 0.01  # of matrices; norms, biases and embeddings don't decay
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    val_fraction: Fraction = 0.1  # share of a file's prompts held out
    eval_every: Count = 100  # steps between held-out losses


# The class of a token that ends no labelled step; else it is the label plus 1: 0 bad, 1 neutral, 2 good.
NONE = -1


class LabelledSteps(NamedTuple):
    """A reply in steps, ready to train on. It ends with its last labelled step."""
    row: Row
    ids: list  # of the prompt and the reply
    classes: list  # of each token: NONE, or the class of the step that it ends

    @property
    def mask(self):
        """[bool], True on the tokens that end a labelled step."""
        return [one != NONE for one in self.classes]


def step_loss(logits, classes, steps):
    """Cross-entropy of the labels of some steps: the sum over them, divided by steps.

    logits (N, 3) fp32, classes (N,) from 0 to 2; steps: how many the whole optimiser step has. Returns
    (scalar, {accuracy}), the likeliest class being the guess. Lightman et al. 2023, section 2.6.
    """
    right = logits.argmax(1) == classes
    return F.cross_entropy(logits, classes, reduction="sum") / steps, {"accuracy": right.sum() / steps}


# ---------------------------------------------------------------------------------------------------------
# Rows to token ids and classes

def encode_steps(tokenizer, row, separator):
    """`LabelledSteps` of a row with steps; None if its tokens say another text than its steps.

    The reply is encoded as a policy would write it, steps and separators in one text, so nothing in the ids
    shows where a step ends but that text. Behind the last step of a reply that isn't finished stands a
    separator.
    """
    parts = [step + separator for step in row.steps]
    offsets = list(itertools.accumulate(map(len, parts)))
    text = "".join(parts)
    if row.finished:
        text = text.removesuffix(separator)
        # The last step ends with the reply, whose last token says nothing.
        offsets.pop()
    ids, mask = encode_dialogue(tokenizer, with_reply(row, text), last_only=True)
    start = mask.index(True)
    reply = ids[start:start + sum(mask)]
    numbers = tokens_that_hold(tokenizer, reply, text, offsets)
    if numbers is None:
        return None
    if row.finished:
        numbers.append(len(reply) - 1)
    classes = [NONE] * len(ids)
    for number, label in zip(numbers, row.labels):
        if label is None:
            continue
        at = start + number
        # Where two steps end in one token, the worse label is its.
        classes[at] = label + 1 if classes[at] == NONE else min(classes[at], label + 1)
        last = at
    # Attention is causal: what follows could change nothing.
    return LabelledSteps(row, ids[:last + 1], classes[:last + 1])


def encode_all(tokenizer, rows, separator, limit, say):
    """[LabelledSteps] of rows with steps, at most limit tokens each; says what is odd about them."""
    encoded = [encode_steps(tokenizer, row, separator) for row in rows]
    kept = [one for one in encoded if one is not None]
    lost = len(rows) - len(kept)
    require(kept, f"--step-separator {separator!r}: no row's steps are found again in its token ids")
    if lost:
        say(f"dropped {lost} of {len(rows)} rows: their token ids say another text than their steps")
    found = [len(step_offsets(separator.join(row.steps), separator)) for row in rows]
    cut_more = sum(count != len(row.steps) - 1 for count, row in zip(found, rows))
    if cut_more:
        say(f"warning: {cut_more} of {len(rows)} rows have steps that hold --step-separator {separator!r}; a "
            "policy's reply with the same text would be cut into more steps than these")
    return drop_long(kept, [len(one.ids) for one in kept], limit, say)


def collate(examples, pad, device):
    """[LabelledSteps] -> ids (B, T) on device, mask (B, T) bool on the CPU, classes (N,) where it is True."""
    ids, _ = pad_rows([one.ids for one in examples], pad, device)  # (B, T)
    classes, _ = pad_rows([one.classes for one in examples], NONE)  # (B, T)
    mask = classes != NONE
    return ids, mask, classes[mask].to(device, non_blocking=True)


@torch.no_grad()
def validation_metrics(run, model, examples, budget, pad):
    """{val_loss, nats per step; val_accuracy; val_majority, that of the commonest label} of held-out rows."""
    classes = torch.tensor([one for example in examples for one in example.classes if one != NONE])
    totals = torch.zeros(2, device=run.device)
    was_training = model.training
    model.eval()
    pieces = run.split(range(len(examples)), [len(example.ids) for example in examples], budget)
    for piece, counts in run.passes(pieces):
        ids, mask, targets = collate([examples[i] for i in piece], pad, run.device)
        with run.autocast():
            logits = model(ids, token_index(mask))  # (N, 3)
        loss, metrics = step_loss(logits, targets, len(classes))
        totals += counts * torch.stack([loss, metrics["accuracy"]])
    model.train(was_training)
    loss, accuracy = run.all_sum(totals).tolist()
    majority = classes.bincount().max().item() / len(classes)
    return {"val_loss": loss, "val_accuracy": accuracy, "val_majority": majority}


def describe_labels(examples):
    """How many labels of each kind some examples have, as a part of a sentence."""
    counts = [sum(example.classes.count(one) for example in examples) for one in range(3)]
    return f"{sum(counts)} labels ({counts[0]} bad, {counts[1]} neutral, {counts[2]} good)"


def main(config):
    run = Run(config)
    separator = config.step_separator.replace(r"\n", "\n")
    require(separator, "--step-separator is empty")
    require(config.lora_save == "merged",
            "--lora-save adapter: a PEFT folder has no place for what a process reward model is (three "
            "labels and --step-separator); use --lora-save merged")
    language_model, tokenizer = open_model(config, GPT)
    torch.manual_seed(config.seed)
    model = ScalarModel.from_trunk(language_model, share=True, labels=3)
    del language_model

    # 1. rows to token ids and classes
    rows = read_rows(config.data, "steps", run.say, config.part, config.skip_bad)
    if config.val_data:
        held_out = read_rows(config.val_data, "steps", run.say)
    else:
        rows, held_out = split_by_prompt(rows, config.val_fraction, run.say)
    require(rows, f"--val-fraction {config.val_fraction} leaves nothing to train on")
    limit = context_of(config, model)
    train = encode_all(tokenizer, rows, separator, limit, run.say)
    val = encode_all(tokenizer, held_out, separator, limit, run.say) if held_out else []
    lengths = [len(example.ids) for example in train]
    labels = [sum(example.mask) for example in train]
    run.say(f"{len(train)} replies with {describe_labels(train)} to train on and {len(val)} held out, for "
            f"instance, the ends of labelled steps in [[ ]],\n"
            f"{describe(tokenizer, train[0].ids, train[0].mask)}")

    # 2. model and optimiser
    prepare_training(model, config)
    process = run.parallel(model)
    optimizer = adamw(model, config.lr, config.weight_decay)
    steps = math.ceil(config.epochs * len(train) / config.batch) or config.steps

    def write(folder):
        save_model(folder, model, tokenizer, config, step_separator=separator)

    def validate(step):
        metrics = validation_metrics(run, model, val, config.micro_batch_tokens, tokenizer.pad)
        run.log(step, metrics, show=("val_loss", "val_accuracy"))

    modules = {"process": model}
    optimizers = {"optimizer": optimizer}
    first, _ = run.begin(modules, optimizers, {"": write}, best="-val_loss", steps=steps)
    order = endless_order(len(train), config.seed, first * config.batch)
    model.train()

    # 3. train
    for step in run.steps(first, steps, validate if val else None):
        run.seed_step(step)
        batch = [next(order) for _ in range(config.batch)]
        # Labelled steps of the whole optimiser step.
        count = sum(labels[i] for i in batch)
        totals = {}
        pieces = run.split(batch, lengths, config.micro_batch_tokens)
        for piece, counts in run.passes(pieces, process):
            ids, mask, classes = collate([train[i] for i in piece], tokenizer.pad, run.device)  # (B, T)
            with run.autocast():
                logits = process(ids, token_index(mask))  # (N, 3)
            loss, metrics = step_loss(logits, classes, count)
            run.backward(counts * loss, optimizer)
            for name, value in (metrics | {"loss": loss}).items():
                totals[name] = totals.get(name, 0) + counts * value.detach()
        lr = scheduled_lr(step, steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            metrics = {name: run.all_sum(value) for name, value in totals.items()}
            run.log(step + 1, metrics | {"lr": lr, "grad_norm": grad_norm}, show=("loss", "accuracy"))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
