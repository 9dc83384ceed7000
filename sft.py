"""Supervised fine-tuning: make demonstrations likely.

    L = -(1/N) sum over response tokens t of log pi(y_t | x, y_<t)          (InstructGPT, section 3.5, step 1)

N counts the response tokens of the whole optimiser step (all micro-batches, all ranks), end tokens included:
every token weighs the same, however the step is cut up. In a conversation every assistant turn is a response.
Left out: packing several rows into one sequence (batches are bucketed by length instead, which wastes little).

    python sft.py --out runs/sft                       the toy task: held-out loss 0.51 after a minute on 2 cores
    python sft.py --data rows.jsonl --model scratch --out runs/mine --layers 6 --heads 6 --width 384

Legend: B rows, T tokens.
"""
from dataclasses import dataclass

import torch

import toy
from model import prepare
from formats.families import knows_single_turns
from formats.model_folder import open_model, save_model
from data import collate, count_steps, encode_demonstrations, endless_batches
from formats.sources import read_rows, split_by_prompt
from model import GPT
from rollout import show_samples
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, Probability, RunConfig, require
from plumbing.steps import adamw, scheduled_lr
from plumbing.run import Run, run_script
from data import describe


@dataclass
class Config(RunConfig):
    data: str = "toy"  # toy, or files of demonstrations or plain text: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    model: str = "scratch"  # checkpoint folder or hub name (org/model) to start from, or scratch
    out: str = "runs/sft"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 900  # optimiser steps
    epochs: Natural = 0  # passes over the data, instead of --steps; 0 goes by --steps
    batch_tokens: Count = 2048  # tokens per optimiser step over all ranks, padding included
    micro_batch_tokens: Count = 8192  # tokens per forward pass on one rank, at most; lower it when memory is short
    lr: Positive = 5e-3  # peak learning rate; falls to a tenth on a cosine
    warmup: Natural = 50  # steps of linear warm-up
    weight_decay: NonNegative = 0.1  # of matrices; norms, biases and embeddings don't decay
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    dropout: Probability = 0.0  # share of activations dropped while training
    val_fraction: Fraction = 0.05  # share of a file's prompts held out for the validation loss (toy holds out its own)
    eval_every: Count = 100  # steps between validation losses and printed samples
    max_new_tokens: Count = 40  # longest sample printed, tokens


@torch.no_grad()
def validation_loss(run, model, examples, lengths, config, pad):
    """Mean of -log pi over the response tokens of held-out examples, in nats per token."""
    model.eval()
    total = torch.zeros(2, device=run.device)
    for piece, weight in run.passes(run.split(range(len(examples)), lengths, config.micro_batch_tokens)):
        ids, mask, _ = collate([examples[i] for i in piece], pad, run.device)
        with run.autocast():
            logprob, _ = model(ids, mask, summed=True)
        total += weight * torch.stack([-logprob, mask.sum().to(run.device, non_blocking=True)])
    model.train()
    total = run.all_sum(total)
    return total[0] / total[1]


def main(config):
    run = Run(config)

    # 1. rows to token ids and masks
    if config.data == "toy":
        world = toy.World(config.seed)
        require(not config.part, "--part is for files, not for the toy task")
        rows, heldout = world.demonstrations("train"), world.demonstrations("heldout", per_prompt=2)
    else:
        rows = read_rows(config.data, "demonstrations", run.say, config.part, config.skip_bad)
        rows, heldout = split_by_prompt(rows, config.val_fraction, run.say)
        require(rows, f"--val-fraction {config.val_fraction} leaves nothing to train on")
    model, tokenizer = open_model(config, GPT, config.dropout)

    limit = min(config.max_length or model.config.block_size, model.config.block_size)
    train, val = (encode_demonstrations(tokenizer, part, limit, run.say) if part else [] for part in (rows, heldout))
    lengths, val_lengths = ([len(ids) for ids, _ in examples] for examples in (train, val))
    run.say(f"{len(train)} training and {len(val)} held-out examples, for instance\n{describe(tokenizer, *train[0])}\n([[ ]] is what is trained)")

    # 2. model and optimiser
    prepare(model, config)
    policy = run.parallel(model)
    optimizer = adamw(model, config.lr, config.weight_decay)
    config.steps = count_steps(config, lengths)
    # A model that has only ever been shown single questions can't go on with a conversation. Its folder tells
    # chat.py so. What somebody else's model has seen before is not known here.
    single = all(row.prompt for row in rows)  # plain text may hold anything
    single = single and not any(message["role"] == "assistant" for row in rows for message in row.prompt)
    single_turn = single if config.model == "scratch" or knows_single_turns(model.config) else None

    def write(folder):
        save_model(folder, model, tokenizer, config, single_turn=single_turn)

    first, _ = run.begin({"policy": model}, {"optimizer": optimizer}, {"": write}, best="-val_loss")
    batches = endless_batches(lengths, config.batch_tokens, config.seed, first)
    model.train()

    def evaluate(step):
        run.log(step, {"val_loss": validation_loss(run, model, val, val_lengths, config, tokenizer.pad)}, show=("val_loss",))
        show_samples(run, model, tokenizer, [row for row in heldout if row.prompt], config.max_new_tokens, run.seed_step(step))

    # 3. train
    for step in run.steps(first, config.steps, evaluate if val else None):
        run.seed_step(step)
        batch = next(batches)
        tokens = sum(sum(train[i][1]) for i in batch)  # response tokens of the whole step
        loss = torch.zeros((), device=run.device)
        for piece, weight in run.passes(run.split(batch, lengths, config.micro_batch_tokens), policy):
            ids, mask, _ = collate([train[i] for i in piece], tokenizer.pad, run.device)  # (B, T)
            with run.autocast():
                logprob, _ = policy(ids, mask, summed=True)  # ()
            piece_loss = -logprob * weight / tokens
            run.backward(piece_loss, optimizer)
            loss += piece_loss.detach()
        lr = scheduled_lr(step, config.steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            run.log(step + 1, {"loss": run.all_sum(loss), "lr": lr, "grad_norm": grad_norm}, show=("loss", "grad_norm"))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
