"""Supervised fine-tuning: make demonstrations likely.

    L = -(1/N) sum over response tokens t of log pi(y_t | x, y_<t)          (InstructGPT, section 3.5, step 1)

N counts the response tokens of the whole optimiser step (all micro-batches, all ranks), end tokens included:
every token weighs the same, however the step is cut up. In a conversation every assistant turn is a response.
Left out: packing several rows into one sequence (batches are bucketed by length instead, which wastes
little).

--quality says what to make of replies that have scores (rankings, ratings, labels, pairs, best_of_n.py's
rankings.jsonl). By default each prompt's best one is trained on, as above. The others take all of them, in a
conversation the last turn alone:

    weights   L = -(1/N) sum_i w_i log pi(y_i | x_i),    w_i = exp(r_i / b) / mean_j exp(r_j / b)
              (reward-weighted regression: Peters and Schaal 2007; b: --weight-beta). For replies drawn from
              ref it is least at pi* = ref exp(r / b) / Z, the optimum of RLHF.
    tokens    L = -(1/N) sum_i [log pi(y_i | x_i, c_i) - a sum_t KL(ref(. | x, y_<t) || pi(. | x, c, y_<t))]
              (Quark: Lu et al. 2022, eq. 2; a: --kl-coef). c_i is a token between prompt and reply which
              says in which of K quantiles of all scores the reply lies. For replies drawn from ref and a = 0
              it is least where pi under the best is ref restricted to its best K-th: KL(pi || ref) = log K,
              the mean reward that of the best K-th. Else each token has (p + a ref) / (1 + a), p being that.
    words     the same with words for tokens, which say something before they are trained (chain of hindsight:
              Liu et al. 2023)

The best quantile has no token and no words: an untouched prompt asks for the best. So the model in --out is
used as any other, and needs neither flag nor tokenizer of its own. The other quantiles' tokens live while
training lasts; no head can say them, and nothing is trained to. Equal scores share the quantile in which the
middle of their places lies, and the best quantile that occurs counts as the first. Quark's code differs from
its formula, and from this file: its KL is KL(pi || ref), its token stands before the prompt, and it cuts ties
in two.
Left out: the bonus for entropy in Quark's code (0.06); several replies in one sequence, the better behind the
worse (chain of hindsight); weights that are cut off. Rounds (sample, score, put into the pool, sort anew,
train): best_of_n.py --rounds 3 --train quality, where each begins with new tokens.

--judge has functions measure sampled replies to held-out prompts beside the validation loss, and the first of
them say which checkpoint is the best. InstructGPT's models overfit in validation loss after one epoch of 16,
got better all the same, and were chosen by a reward model's score (section 3.5). docs/sft.md tries it.

    python sft.py --out runs/sft       after `python toy.py`: held-out loss 0.51 in a minute on 2 cores
    python sft.py --data rows.jsonl --model scratch --out runs/mine --layers 6 --heads 6 --width 384
    python sft.py --model runs/sft --data runs/best_of_n/rankings.jsonl --quality tokens --epochs 4 --lr 1e-3

The last, on 8 replies to each of the embedded task's prompts (best_of_n.py --n 8), takes the gold score from
0.20 to 0.44 at a KL of 0.3 nats per reply (seed 0, 2026-11-28, an Intel Xeon).

Legend: B rows, T tokens, N tokens of a pass, C width, V vocabulary, K quantiles.
"""
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import (
    Example, collate, context_of, count_steps, describe, drop_long, encode_demonstrations, encode_groups,
    encode_prompt, endless_batches, per_example)
from formats.families import knows_single_turns
from formats.model_folder import load_model, open_model, save_model
from formats.rows import Row
from formats.sources import read_rows, split_by_prompt
from head import rows_of_chunks, token_logprobs
from judges import check_functions, judge, load_functions
from model import GPT, frozen_reference, prepare_training
from plumbing.flags import (
    Count, Fraction, Natural, NonNegative, Positive, Probability, RunConfig, flag_of, require)
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr
from rollout import Prompt, sample, show_samples


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
    # functions, module:function, whose numbers of sampled replies are measured beside the validation loss;
    # the first, and not that loss, says which checkpoint is the best (see --save-every)
    judge: list[str] = field(default_factory=list)
    judge_prompts: Count = 256  # held-out prompts, evenly spread, that replies to --judge are sampled for
    max_new_tokens: Count = 40  # longest reply sampled, tokens
    # what to make of replies that have scores: train on the best alone, or on all of them, by weight or with
    # the quality said before them; see above
    quality: Literal["best", "weights", "tokens", "words"] = "best"
    weight_beta: Positive = 1.0  # b of --quality weights, in units of the score
    quantiles: Annotated[int, ">= 2"] = 5  # K of --quality tokens
    # with --quality words: what stands before the replies of each quantile but the best, the worst one last;
    # no good reply should begin so
    words: list[str] = field(default_factory=lambda: ["Bad:"])
    kl_coef: NonNegative = 0.05  # a of --quality tokens and words; 0 needs no reference
    reference: str = ""  # checkpoint folder of ref; without it --model is the reference too


def validation_loss(run, model, examples, config, pad):
    """Mean of -log pi over the response tokens of held-out examples, in nats per token."""
    def read(ids, mask, lengths):
        logprobs, _ = model(ids, mask)  # (B, T)
        return logprobs.sum(1)

    logprobs = per_example(run, model, examples, config.micro_batch_tokens, pad, read)  # (N,)
    tokens = sum(sum(example.mask) for example in examples)
    return -logprobs.sum() / tokens


# Replies to --judge that are decoded at once, on one rank.
AT_ONCE = 256


def prompts_to_judge(config, tokenizer, rows, limit, say):
    """[Prompt] of held-out rows that replies are sampled for: --judge-prompts of them, each once.

    limit: tokens of prompt and reply.
    """
    found = {}
    for row in rows:
        # Plain text has no prompt.
        if row.prompt:
            ids = encode_prompt(tokenizer, row.prompt)
            found.setdefault(tuple(ids), Prompt(row, ids))
    require(found, "--judge is asked about replies to held-out prompts, and there are none: name --val-data, "
                   "or a --val-fraction above 0")
    lengths = [len(prompt.ids) for prompt in found.values()]
    prompts = drop_long(list(found.values()), lengths, limit - config.max_new_tokens, say)
    count = min(config.judge_prompts, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def judged_means(run, model, tokenizer, prompts, judges, config, generator):
    """{name: mean of a judge's numbers} over one reply to each [Prompt], sampled at temperature 1."""
    # All ranks sample equally many. The filler behind the last prompt counts for nothing.
    filler = -len(prompts) % run.world_size
    asked = (prompts * run.world_size)[:len(prompts) + filler]
    counts = torch.arange(run.rank, len(asked), run.world_size) < len(prompts)  # (B,)
    batch = sample(run, model, tokenizer, asked[run.rank::run.world_size], config.max_new_tokens,
                   temperature=1.0, generator=generator, rows=AT_ONCE)
    means = {}
    for function in judges:
        total = judge(function, batch)[counts].sum().to(run.device)
        means[function.name] = run.all_sum(total).item() / len(prompts)
    return means


# ---------------------------------------------------------------------------------------------------------
# Learning from quality

# The flags that belong to some kinds of --quality.
BELONGS = {
    "weight_beta": ("weights",),
    "quantiles": ("tokens",),
    "words": ("words",),
    "kl_coef": ("tokens", "words"),
    "reference": ("tokens", "words"),
}


def check(config):
    """UserError for flags that don't go together."""
    for name, kinds in BELONGS.items():
        unchanged = getattr(config, name) == getattr(Config(), name)
        require(unchanged or config.quality in kinds,
                f"{flag_of(name)} is for --quality {' and '.join(kinds)}, not {config.quality}")
    require(all(word.strip() for word in config.words), "--words: one of them is blank")
    if config.quality in ("tokens", "words"):
        require(config.model != "scratch" or config.reference or config.kl_coef == 0,
                "--model scratch is no reference: name one with --reference, or say --kl-coef 0")


def quantiles_of(ranks, K):
    """Which of K quantiles each of ranks (N,), lower is better, lies in (N,): 0 is the best."""
    ranks = np.asarray(ranks, dtype=float)
    places = np.sort(ranks)
    # Equal ranks stand side by side, and go by the middle of their places.
    first = np.searchsorted(places, ranks, "left")
    last = np.searchsorted(places, ranks, "right") - 1
    quantiles = K * (first + last) // (2 * len(ranks))
    return quantiles - quantiles.min()


def weights_of(ranks, beta):
    """exp(score / beta) over its mean, of all replies (N,). ranks (N,): the scores' negatives."""
    scores = -torch.tensor(ranks, dtype=torch.float64)
    return len(ranks) * torch.softmax(scores / beta, 0).float()


def labels_of(config, tokenizer, model):
    """What stands before the replies of each quantile, lists of ids, the best quantile first."""
    if config.quality == "words":
        return [[], *(tokenizer.encode(word, "special") for word in config.words)]
    size = len(model.transformer.wte.weight)
    return [[], *([size + k] for k in range(config.quantiles - 1))]


def with_label(example, label):
    """An Example with a label, ids, between prompt and reply. Nobody learns to say it."""
    start = example.mask.index(True)
    ids = example.ids[:start] + label + example.ids[start:]
    return Example(ids, example.mask[:start] + [False] * len(label) + example.mask[start:])


def encode_scored(config, tokenizer, rows, labels, limit, say):
    """All replies of rows, at most limit tokens each.

    Returns [Example] with their labels, [Example] without, and weights (N,), or None where labels say it.
    """
    groups = encode_groups(tokenizer, rows, limit - max(map(len, labels)), say)
    plain = [example for group in groups for example in group.examples]
    ranks = [rank for group in groups for rank in group.row.ranks]
    require(len(set(ranks)) > 1,
            f"--quality {config.quality}: all {len(ranks)} replies have the same score, which says nothing")
    if config.quality == "weights":
        return plain, plain, weights_of(ranks, config.weight_beta)
    quantiles = quantiles_of(ranks, len(labels))
    counts = np.bincount(quantiles, minlength=len(labels)).tolist()
    say(f"replies in the quantiles of their scores, the best one first: {counts}")
    return [with_label(example, labels[q]) for example, q in zip(plain, quantiles)], plain, None


class QualityTokens(nn.Embedding):
    """An embedding with some more rows behind those that it shares with the head: nothing can say them."""

    def __init__(self, table, count):
        super().__init__(*table.weight.shape, _weight=table.weight)
        self.weight = table.weight  # (V, C), the very parameter
        # The name ends as that of the embedding does, and so neither decays.
        self.quality_wte = nn.Embedding(count, table.weight.shape[1], device=table.weight.device)
        generator = torch.Generator().manual_seed(0)
        # As for new tokens (Hewitt 2021).
        noise = torch.randn(self.quality_wte.weight.shape, generator=generator).to(table.weight.device)
        known = table.weight.detach()
        self.quality_wte.weight.data.copy_(known.mean(0) + 0.1 * known.std(0) * noise)

    def forward(self, ids):
        """ids (...) -> (..., C)."""
        last = len(self.weight) - 1
        known = F.embedding(ids.clamp(max=last), self.weight)
        added = self.quality_wte((ids - last - 1).clamp(min=0))
        return torch.where((ids > last)[..., None], added, known)


def load_reference(config, model, tokenizer):
    """ref, never to be trained. It must be made before the model gets adapters and quality tokens."""
    if not config.reference:
        return frozen_reference(model, config).eval()
    reference, other = load_model(config.reference, GPT, allow_pickle=config.allow_pickle)
    require(other.same_as(tokenizer),
            f"--reference {config.reference} has another tokenizer than --model {config.model}")
    return reference.requires_grad_(False).eval()


def kl_from_reference(states, head, ref_states, ref_head):
    """Sum () over tokens of KL(ref || pi) over all of the vocabulary.

    states (N, C), head (V, C); ref's may have another C. Some tokens at a time, whose logits are computed
    again in the backward pass, so that they never exist all at once.
    """
    def kl(x, ref_x):
        log_p = F.linear(x, head).float().log_softmax(-1)  # (n, V)
        log_ref = F.linear(ref_x, ref_head).float().log_softmax(-1)  # (n, V)
        return F.kl_div(log_p, log_ref, reduction="sum", log_target=True)

    rows = rows_of_chunks(len(states), 4 * len(head))
    total = states.new_zeros((), dtype=torch.float32)
    for x, ref_x in zip(states.split(rows), ref_states.split(rows)):
        total = total + checkpoint(kl, x, ref_x, use_reentrant=False)
    return total


def labelled_logprob(policy, reference, batch, plain, kl_coef):
    """Of labelled replies: sum () of log pi - a KL(ref || pi), and of the KL alone.

    batch: ids (B, T) and mask of the replies with their labels; plain: the same without, for the reference.
    """
    with torch.no_grad():
        ref_states, ref_head, _ = reference(*plain, read=lambda *outputs: outputs)

    def read(states, head, targets):
        logprob, _ = token_logprobs(states, head, targets, summed=True)
        kl = kl_from_reference(states, head, ref_states, ref_head)
        return logprob - kl_coef * kl, kl.detach()

    return policy(*batch, read=read)


# ---------------------------------------------------------------------------------------------------------
# The run

def main(config):
    run = Run(config)
    check(config)
    judges = load_functions("--judge", config.judge)
    scored = config.quality != "best"
    labelled = config.quality in ("tokens", "words")

    # 1. rows to token ids and masks
    kind = "scored" if scored else "demonstrations"
    rows = read_rows(config.data, kind, run.say, config.part, config.skip_bad)
    if config.val_data:
        held_out = read_rows(config.val_data, "demonstrations", run.say)
    else:
        rows, held_out = split_by_prompt(rows, config.val_fraction, run.say)
    require(rows, f"--val-fraction {config.val_fraction} leaves nothing to train on")
    model, tokenizer = open_model(config, GPT, config.dropout)
    limit = context_of(config, model)
    reference = weights = None
    if labelled and config.kl_coef:
        reference = load_reference(config, model, tokenizer)
        limit = min(limit, reference.config.block_size)
    if scored:
        labels = labels_of(config, tokenizer, model) if labelled else [[]]
        train, plain, weights = encode_scored(config, tokenizer, rows, labels, limit, run.say)
    else:
        train = encode_demonstrations(tokenizer, rows, limit, run.say)
    val = []
    if held_out:
        if scored:
            held_out = [best_reply(row) for row in held_out]
        val = encode_demonstrations(tokenizer, held_out, limit, run.say)
    if judges:
        asked = prompts_to_judge(config, tokenizer, held_out, limit, run.say)
        check_functions(judges, [prompt.row for prompt in asked], run.say)
    lengths = [len(example.ids) for example in train]
    run.say(f"{len(train)} training and {len(val)} held-out examples, for instance\n"
            f"{describe(tokenizer, *train[0])}\n([[ ]] is what is trained)")

    # 2. model and optimiser
    prepare_training(model, config)
    if config.quality == "tokens":
        model.transformer.wte = QualityTokens(model.transformer.wte, config.quantiles - 1)
    policy = run.parallel(model)
    if reference is not None:
        reference = run.parallel(reference)
    optimizer = adamw(model, config.lr, config.weight_decay)
    steps = count_steps(config, lengths)
    single_turn = has_single_turns(rows, model, config)

    def write(folder):
        save_model(folder, model, tokenizer, config, without_quality_tokens, single_turn=single_turn)

    modules = {"policy": model}
    optimizers = {"optimizer": optimizer}
    best = judges[0].name if judges else "-val_loss"
    first, _ = run.begin(modules, optimizers, {"": write}, best=best, steps=steps)
    batches = endless_batches(lengths, config.batch_tokens, config.seed, first)
    model.train()

    def validate(step):
        metrics = {"val_loss": validation_loss(run, model, val, config, tokenizer.pad)}
        if judges:
            metrics |= judged_means(run, model, tokenizer, asked, judges, config, run.seed_step(step))
        run.log(step, metrics, show=metrics)
        prompted = [row for row in held_out if row.prompt]
        show_samples(run, model, tokenizer, prompted, config.max_new_tokens, run.seed_step(step))

    # 3. train
    for step in run.steps(first, steps, validate if val else None):
        run.seed_step(step)
        batch = next(batches)
        # Response tokens of the whole step.
        tokens = sum(sum(train[i].mask) for i in batch)
        loss = torch.zeros((), device=run.device)
        kl = torch.zeros((), device=run.device)
        pieces = run.split(batch, lengths, config.micro_batch_tokens)
        for piece, counts in run.passes(pieces, policy):
            examples = [train[i] for i in piece]
            ids, mask, _ = collate(examples, tokenizer.pad, run.device)  # (B, T)
            with run.autocast():
                if weights is not None:
                    logprobs, _ = policy(ids, mask)  # (B, T)
                    logprob = weights[piece].to(run.device) @ logprobs.sum(1)  # ()
                elif reference is not None:
                    unlabelled, where, _ = collate([plain[i] for i in piece], tokenizer.pad, run.device)
                    logprob, piece_kl = labelled_logprob(
                        policy, reference, (ids, mask), (unlabelled, where), config.kl_coef)
                    kl += piece_kl * counts / tokens
                else:
                    logprob, _ = policy(ids, mask, summed=True)  # ()
            piece_loss = -logprob * counts / tokens
            run.backward(piece_loss, optimizer)
            loss += piece_loss.detach()
        lr = scheduled_lr(step, steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            metrics = {"loss": run.all_sum(loss), "lr": lr, "grad_norm": grad_norm}
            if reference is not None:
                metrics["kl"] = run.all_sum(kl)
            run.log(step + 1, metrics, show=("loss", "grad_norm"))


def best_reply(row):
    """A Row with the best of its replies alone."""
    return Row(row.prompt, [row.replies[row.ranks.index(min(row.ranks))]], [0])


def without_quality_tokens(weights):
    """{name: weight} of a model without what lives while training lasts."""
    return {name: weight for name, weight in weights.items() if ".quality_wte." not in name}


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
