"""Supervised fine-tuning: make demonstrations likely.

    L = -(1/N) sum over response tokens t of log pi(y_t | x, y_<t)          (InstructGPT, section 3.5, step 1)

N counts the response tokens of the whole optimiser step (all micro-batches, all ranks), end tokens included:
every token weighs the same, however the step is cut up. In a conversation every assistant turn is a response.
Left out: packing several rows into one sequence (batches are bucketed by length instead, which wastes
little).

    python sft.py --out runs/sft       after `python toy.py`: held-out loss 0.51 in a minute on 2 cores
    python sft.py --data rows.jsonl --model scratch --out runs/mine --layers 6 --heads 6 --width 384

Legend: B rows, T tokens.
"""
from dataclasses import dataclass

import torch

from data import (
    collate, context_of, count_steps, describe, encode_demonstrations, endless_batches, per_example)
from formats.families import knows_single_turns
from formats.model_folder import open_model, save_model
from formats.sources import read_rows, split_by_prompt
from model import GPT, prepare_training
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, Probability, RunConfig, require
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr
from rollout import show_samples


@dataclass
class Config(RunConfig):
    # files of demonstrations or plain text: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2,
    # or hf:org/name:split
    data: str = "runs/toy/demonstrations.jsonl"
    val_data: str = ""  # file of held-out demonstrations; without it --val-fraction of --data
    model: str = "scratch"  # checkpoint folder or hub name (org/model) to start from, or scratch
    out: str = "runs/sft"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 900  # optimiser steps
    epochs: Natural = 0  # passes over the data, instead of --steps; 0 goes by --steps
    batch_tokens: Count = 2048  # tokens per optimiser step over all ranks, padding included
    # tokens per forward pass on one rank, at most; lower it when memory is short
    micro_batch_tokens: Count = 8192
    lr: Positive = 5e-3  # peak learning rate; falls to a tenth on a cosine
    warmup: Natural = 50  # steps of linear warm-up
    weight_decay: NonNegative = 0.1  # of matrices; norms, biases and embeddings don't decay
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    dropout: Probability = 0.0  # share of activations dropped while training
    val_fraction: Fraction = 0.05  # share of a file's prompts held out for the validation loss
    eval_every: Count = 100  # steps between validation losses and printed samples
    max_new_tokens: Count = 40  # longest sample printed, tokens


def validation_loss(run, model, examples, config, pad):
    """Mean of -log pi over the response tokens of held-out examples, in nats per token."""
    def read(ids, mask, lengths):
        logprobs, _ = model(ids, mask)  # (B, T)
        return logprobs.sum(1)

    logprobs = per_example(run, model, examples, config.micro_batch_tokens, pad, read)  # (N,)
    tokens = sum(sum(example.mask) for example in examples)
    return -logprobs.sum() / tokens


def main(config):
    run = Run(config)

    # 1. rows to token ids and masks
    rows = read_rows(config.data, "demonstrations", run.say, config.part, config.skip_bad)
    if config.val_data:
        held_out = read_rows(config.val_data, "demonstrations", run.say)
    else:
        rows, held_out = split_by_prompt(rows, config.val_fraction, run.say)
    require(rows, f"--val-fraction {config.val_fraction} leaves nothing to train on")
    model, tokenizer = open_model(config, GPT, config.dropout)
    limit = context_of(config, model)
    train = encode_demonstrations(tokenizer, rows, limit, run.say)
    val = []
    if held_out:
        val = encode_demonstrations(tokenizer, held_out, limit, run.say)
    lengths = [len(example.ids) for example in train]
    run.say(f"{len(train)} training and {len(val)} held-out examples, for instance\n"
            f"{describe(tokenizer, *train[0])}\n([[ ]] is what is trained)")

    # 2. model and optimiser
    prepare_training(model, config)
    policy = run.parallel(model)
    optimizer = adamw(model, config.lr, config.weight_decay)
    steps = count_steps(config, lengths)
    single_turn = has_single_turns(rows, model, config)

    def write(folder):
        save_model(folder, model, tokenizer, config, single_turn=single_turn)

    modules = {"policy": model}
    optimizers = {"optimizer": optimizer}
    first, _ = run.begin(modules, optimizers, {"": write}, best="-val_loss", steps=steps)
    batches = endless_batches(lengths, config.batch_tokens, config.seed, first)
    model.train()

    def validate(step):
        loss = validation_loss(run, model, val, config, tokenizer.pad)
        run.log(step, {"val_loss": loss}, show=("val_loss",))
        prompted = [row for row in held_out if row.prompt]
        show_samples(run, model, tokenizer, prompted, config.max_new_tokens, run.seed_step(step))

    # 3. train
    for step in run.steps(first, steps, validate if val else None):
        run.seed_step(step)
        batch = next(batches)
        # Response tokens of the whole step.
        tokens = sum(sum(train[i].mask) for i in batch)
        loss = torch.zeros((), device=run.device)
        pieces = run.split(batch, lengths, config.micro_batch_tokens)
        for piece, counts in run.passes(pieces, policy):
            examples = [train[i] for i in piece]
            ids, mask, _ = collate(examples, tokenizer.pad, run.device)  # (B, T)
            with run.autocast():
                logprob, _ = policy(ids, mask, summed=True)  # ()
            piece_loss = -logprob * counts / tokens
            run.backward(piece_loss, optimizer)
            loss += piece_loss.detach()
        lr = scheduled_lr(step, steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            metrics = {"loss": run.all_sum(loss), "lr": lr, "grad_norm": grad_norm}
            run.log(step + 1, metrics, show=("loss", "grad_norm"))


def has_single_turns(rows, model, config):
    """What the model's folder is to tell chat.py.

    True for one that has only ever been shown single questions, and so can't go on with a conversation.
    None: what somebody else's model has seen before is not known here.
    """
    if config.model != "scratch" and not knows_single_turns(model.config):
        return None
    for row in rows:
        # Plain text may hold anything.
        if not row.prompt or any(message["role"] == "assistant" for message in row.prompt):
            return False
    return True


if __name__ == "__main__":
    run_script(main, Config, __doc__)
