"""Learn from preferences with the policy itself: no reward model, no sampling. DPO and its kin.

    r(y) = log pi(y|x) - log ref(y|x), summed over the reply, its end token included
    a(y) = log pi(y|x) / tokens of the reply
    K(y) = sum over the reply's tokens of KL(ref || pi), of the whole next-token distribution
    h    = beta (r(w) - r(l)), or beta (a(w) - a(l)) where there is no reference: simpo, orpo, rrhf

    --loss   of a pair: w chosen, l rejected                      paper
    dpo      -log sigma(h - m)                                    Rafailov et al. 2023, eq. 7
    robust   ((1 - e) dpo(w, l) - e dpo(l, w)) / (1 - 2 e)        Chowdhury et al. 2024 (rDPO)
    ipo      (h / beta - 1 / (2 beta))^2                          Azar et al. 2023, eq. 17
    hinge    max(0, 1 - h + m)                                    SLiC, Zhao et al. 2023, on ratios
    dpop     -log sigma(h - m - beta lambda max(0, -r(w)))        Pal et al. 2024 (Smaug)
    tdpo1    -log sigma(h - m - beta (K(l) - K(w)))               Zeng et al. 2024
    tdpo2    -log sigma(h - m - beta alpha (K(l) - stop(K(w))))   the same; no gradient through stop
    simpo    -log sigma(h - m)                                    Meng et al. 2024, eq. 6
    orpo     -beta log sigma(odds(w) - odds(l)) - a(best)         Hong et al. 2024, eq. 6 and 7
               odds = log(P / (1 - P)), P = exp(a)
    rrhf     max(0, -h) - a(best)                                 Yuan et al. 2023, of K replies

m is --gamma, with --margins plus the row's margin. best is the first in rank: -a(best) is an SFT term, which
--sft-coef adds to the other losses, too. It keeps up the chosen log-probability, which else usually falls
while the margin grows (watch chosen_logprob). A label may be wrong: where it is right with probability p, the
loss is p loss(w, l) + (1 - p) loss(l, w). p is the row's "probability", 0.5 for tied replies with --ties, and
1 otherwise. --label-smoothing e makes it (1 - e) p + e (1 - p); robust has another use for e.

    --preset   flags                                                          paper
    cdpo       --loss dpo --label-smoothing 0.1                               Mitchell 2023
    rdpo       --loss robust --label-smoothing 0.1                            Chowdhury et al. 2024
    rpo        --loss dpo --beta 0.1 --sft-coef 1                             Pang et al. 2024, eq. 1
    dpop       --loss dpop --beta 0.3 --dpop-lambda 50                        Pal et al. 2024
    tdpo1      --loss tdpo1 --beta 0.1                                        Zeng et al. 2024
    tdpo2      --loss tdpo2 --beta 0.1 --tdpo-alpha 0.5                       Zeng et al. 2024
    simpo      --loss simpo --beta 2 --gamma 1                                Meng et al. 2024
    orpo       --loss orpo --beta 0.1                                         Hong et al. 2024
    rrhf       --loss rrhf --beta 1                                           Yuan et al. 2023

A preset is nothing but these flags, and those given beside it count. Rankings of K replies count as all their
pairs, averaged over the prompt's pairs, each reply in one forward pass. ref is the model that training starts
from, or that of --reference: rounds of DPO on new replies, each from the last round's policy, may all refer
to the first model that way. Its log-probabilities are computed once, before training; K needs it in every
step, and simpo, orpo and rrhf have none.

SPIN (Chen et al. 2024) is --loss dpo on demonstrations as chosen and the policy's own samples as rejected
replies, each round from, and against, the last round's model. best_of_n.py --n 1 with any --reward-fn draws
the samples; its sft.jsonl with "label": false in each row, behind the demonstrations with "label": true, is
the --data. Where pi is the demonstrations' own distribution the loss is log 2 and the expected gradient 0.

What differs between implementations:
    here                                     TRL 1.16, others                              switch
    ipo sums log-probabilities, as its       divides each by its reply's tokens            none
      equation
    the SFT term: mean over a reply's        mean over all tokens of the batch; for orpo   none
      tokens, then over prompts                the prompt's tokens too
    simpo's gamma stands as in eq. 6         gamma / beta within (the same number)         none
    a wrong label asks for the same margin   h - m as a whole changes sign (SimPO's)       none
      the other way round
    rrhf: mean over a prompt's pairs         their sum, times 100 in its repository        --beta
    1 - P of odds from expm1, P at most      infinite where the policy is certain          none
      exp(-1e-6)
Left out: KTO (see kto.py), odds of tokens, f-divergences other than the reverse KL.

    python dpo.py --model runs/sft --data runs/preferences/train.jsonl --out runs/dpo

On the embedded task the gold score goes from 0.1 to 0.8 in 1.5 minutes on 2 cores.

Legend: B replies (rows), T tokens, P pairs; N tokens of replies, n of a chunk, C width, V vocabulary.
"""
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import (
    collate, context_of, count_steps, decided_pairs, endless_batches, per_example, preference_groups,
    ranking_accuracy, tied_pairs)
from formats.model_folder import load_model, open_model, save_model
from head import rows_of_chunks, token_logprobs
from model import GPT, frozen_reference, prepare_training, token_index, unpack
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, RunConfig, flag_of, require
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr
from rollout import show_samples

NO_REFERENCE = ("simpo", "orpo", "rrhf")
WITH_KL = ("tdpo1", "tdpo2")
WITH_SFT = ("orpo", "rrhf")
WITHOUT_MARGIN = ("ipo", "orpo", "rrhf")


@dataclass
class Config(RunConfig):
    PRESETS: ClassVar = {
        "cdpo": {"loss": "dpo", "label_smoothing": 0.1},
        "rdpo": {"loss": "robust", "label_smoothing": 0.1},
        "rpo": {"loss": "dpo", "beta": 0.1, "sft_coef": 1.0},
        "dpop": {"loss": "dpop", "beta": 0.3, "dpop_lambda": 50.0},
        "tdpo1": {"loss": "tdpo1", "beta": 0.1},
        "tdpo2": {"loss": "tdpo2", "beta": 0.1, "tdpo_alpha": 0.5},
        "simpo": {"loss": "simpo", "beta": 2.0, "gamma": 1.0},
        "orpo": {"loss": "orpo", "beta": 0.1},
        "rrhf": {"loss": "rrhf", "beta": 1.0},
    }
    # a method by its name: nothing but the flags in the table above; those that are given beside it count
    preset: Literal["", "cdpo", "rdpo", "rpo", "dpop", "tdpo1", "tdpo2", "simpo", "orpo", "rrhf"] = ""
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
    # see the formulas above
    loss: Literal["dpo", "robust", "ipo", "hinge", "dpop", "tdpo1", "tdpo2", "simpo", "orpo", "rrhf"] = "dpo"
    # strength of the tie to the reference, per nat (0.1 is usual for large models); without a reference the
    # weight of what compares replies
    beta: Positive = 0.3
    # probability that a label is the wrong way round
    label_smoothing: Annotated[float, ">= 0", "< 0.5"] = 0.0
    sft_coef: NonNegative = 0.0  # weight of the SFT term, -log pi per token of the best reply
    gamma: NonNegative = 0.0  # by how much the chosen reply is to win, in units of h
    margins: bool = False  # add the row's own margin to that
    ties: bool = False  # in a ranking tied replies make a pair, too, that is right with probability 0.5
    dpop_lambda: NonNegative = 50.0  # weight of the chosen reply's fall below the reference (loss dpop)
    tdpo_alpha: NonNegative = 0.5  # weight of the KL's difference (loss tdpo2)
    lr: Positive = 1e-3  # peak learning rate; falls to a tenth on a cosine
    warmup: Natural = 20  # steps of linear warm-up
    weight_decay: NonNegative = 0.0  # of matrices; norms, biases and embeddings don't decay
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    val_fraction: Fraction = 0.1  # share of a file's prompts held out
    eval_every: Count = 100  # steps between held-out accuracies and printed samples
    max_new_tokens: Count = 40  # longest sample printed, tokens


# ---------------------------------------------------------------------------------------------------------
# Replies and pairs

class Replies(NamedTuple):
    """What the losses know of B replies, (B,) each, fp32: sums over a reply's tokens."""
    logprobs: torch.Tensor  # log pi(y|x)
    lengths: torch.Tensor  # tokens, the end token included
    ref_logprobs: torch.Tensor | None = None  # log ref(y|x), for losses with a reference
    kl: torch.Tensor | None = None  # KL(ref || pi) of the next token, for tdpo

    def at(self, rows):
        """Those at some positions (P,), in that order."""
        return Replies(*(None if numbers is None else numbers[rows] for numbers in self))

    @property
    def ratios(self):
        return self.logprobs - self.ref_logprobs

    @property
    def means(self):
        """Log-probability per token; 0 of a reply without any."""
        return self.logprobs / self.lengths.clamp(min=1)

    @property
    def scores(self):
        """By what replies are compared: beta times this is the implicit reward."""
        return self.means if self.ref_logprobs is None else self.ratios


class Pairs(NamedTuple):
    """P pairs of some replies, and the Q best replies."""
    better: torch.Tensor  # (P,) positions of the chosen replies
    worse: torch.Tensor  # (P,)
    weight: torch.Tensor  # (P,) those of a row add up to 1
    margin: torch.Tensor  # (P,) by how much the chosen one is to win
    right: torch.Tensor  # (P,) probability of the label
    wrong: torch.Tensor  # (P,) 1 - right
    best: torch.Tensor  # (Q,) positions of each row's first in rank
    best_weight: torch.Tensor  # (Q,) those of a row add up to 1

    def times(self, numerator, denominator):
        """With all weights times a fraction."""
        weight = self.weight * numerator / denominator
        return self._replace(weight=weight, best_weight=self.best_weight * numerator / denominator)


def pairs_of(rows, config):
    """`Pairs` of the replies of some rows laid end to end, on the CPU."""
    pairs, best = [], []
    start = 0  # where the row's replies begin
    e = config.label_smoothing if config.loss != "robust" else 0.0
    for row in rows:
        found = [(i, j, row.probability) for i, j in decided_pairs(row.ranks)]
        if config.ties:
            found += [(i, j, 0.5) for i, j in tied_pairs(row.ranks)]
        margin = config.gamma + (row.margin if config.margins else 0.0)
        for i, j, p in found:
            right = (1 - e) * p + e * (1 - p)
            pairs.append((start + i, start + j, 1 / len(found), margin, right, 1 - right))
        top = [i for i, rank in enumerate(row.ranks) if rank == min(row.ranks)]
        best += [(start + i, 1 / len(top)) for i in top]
        start += len(row.ranks)
    columns = [*zip(*pairs), *zip(*best)]
    return Pairs(*(torch.tensor(column) for column in columns))


# ---------------------------------------------------------------------------------------------------------
# Losses (P,) of pairs, from h (P,), w and l (`Replies` (P,)) and m (P,): the formulas at the top of the file

def logistic_loss(h, w, l, m, config):
    return -F.logsigmoid(h - m)


def robust_loss(h, w, l, m, config):
    """Its expectation over labels of which a share e is wrong is the logistic loss of right ones."""
    e = config.label_smoothing
    return (-(1 - e) * F.logsigmoid(h - m) + e * F.logsigmoid(-h - m)) / (1 - 2 * e)


def ipo_loss(h, w, l, m, config):
    gap = w.ratios - l.ratios
    return (gap - 1 / (2 * config.beta)).square()


def hinge_loss(h, w, l, m, config):
    return (1 + m - h).clamp(min=0)


def dpop_loss(h, w, l, m, config):
    # Nats by which the chosen reply has become less likely. Training starts at the kink, where the slope is
    # 0, but for what rounding makes of two equal models.
    fallen = F.relu(-w.ratios)
    return -F.logsigmoid(h - m - config.beta * config.dpop_lambda * fallen)


def tdpo1_loss(h, w, l, m, config):
    return -F.logsigmoid(h - m - config.beta * (l.kl - w.kl))


def tdpo2_loss(h, w, l, m, config):
    further = l.kl - w.kl.detach()
    return -F.logsigmoid(h - m - config.beta * config.tdpo_alpha * further)


def log_odds(means):
    """log(P / (1 - P)) of P = exp(means), finite also where P rounds to 1."""
    means = means.clamp(max=-1e-6)
    return means - torch.log(-torch.expm1(means))


def orpo_loss(h, w, l, m, config):
    return -config.beta * F.logsigmoid(log_odds(w.means) - log_odds(l.means))


def rrhf_loss(h, w, l, m, config):
    return F.relu(-h)


LOSSES = {
    "dpo": logistic_loss,
    "robust": robust_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "dpop": dpop_loss,
    "tdpo1": tdpo1_loss,
    "tdpo2": tdpo2_loss,
    "simpo": logistic_loss,
    "orpo": orpo_loss,
    "rrhf": rrhf_loss,
}


def preference_loss(replies, pairs, config):
    """Sum () over pairs of weight * expected loss, plus the SFT term.

    replies: `Replies` (B,); pairs: `Pairs` of them. Returns (scalar, {accuracy, margin, and with an SFT term
    sft_loss}): weighted sums; margin is that of the implicit rewards, and a tie (as at the start, where
    policy and reference are the same) counts half as accurate. KeyError for an unknown --loss.
    """
    loss_of = LOSSES[config.loss]
    w, l = replies.at(pairs.better), replies.at(pairs.worse)  # (P,)
    h = config.beta * (w.scores - l.scores)  # (P,)
    as_labelled = loss_of(h, w, l, pairs.margin, config)
    turned_round = loss_of(-h, l, w, pairs.margin, config)
    losses = pairs.right * as_labelled + pairs.wrong * turned_round
    loss = (pairs.weight * losses).sum()
    accuracy = (h > 0).float() + 0.5 * (h == 0).float()
    metrics = {
        "accuracy": (pairs.weight * accuracy).sum(),
        "margin": (pairs.weight * h).sum(),
    }
    sft_coef = 1.0 if config.loss in WITH_SFT else config.sft_coef
    if sft_coef > 0:
        sft_loss = -(pairs.best_weight * replies.means[pairs.best]).sum()
        loss = loss + sft_coef * sft_loss
        metrics["sft_loss"] = sft_loss
    return loss, metrics


# ---------------------------------------------------------------------------------------------------------
# From models to replies

def token_kl(states, weight, ref_states, ref_weight):
    """KL(ref || pi) (N,) of whole next-token distributions, in nats, from states (N, C) and heads (V, C).

    Chunk by chunk, and each again in the backward pass, so that the logits (N, V) never exist at once. Where
    one vocabulary is filled up further than the other, the tokens count that both have.
    """
    V = min(len(weight), len(ref_weight))

    def of_chunk(x, ref_x):
        log_p = F.linear(x, weight[:V]).float().log_softmax(-1)  # (n, V)
        log_ref = F.linear(ref_x, ref_weight[:V]).float().log_softmax(-1)  # (n, V)
        return (log_ref.exp() * (log_ref - log_p)).sum(-1)

    rows = rows_of_chunks(len(states), 2 * V)
    found = []
    for start in range(0, len(states), rows):
        at = slice(start, start + rows)
        found.append(checkpoint(of_chunk, states[at], ref_states[at], use_reentrant=False,
                                preserve_rng_state=False))
    return torch.cat(found)


def forward(policy, reference, ids, mask, config):
    """Of replies (B, T): summed log-probabilities (B,), and for tdpo KL(ref || pi) (B,), else None."""
    if config.loss not in WITH_KL:
        return policy(ids, mask)[0].sum(1), None
    with torch.no_grad():
        ref_states, ref_weight, _ = reference(ids, mask, read=lambda *outputs: outputs)

    def read(states, weight, targets):
        logprobs, _ = token_logprobs(states, weight, targets)
        return logprobs, token_kl(states, weight, ref_states, ref_weight)

    at = token_index(mask).to(ids.device, non_blocking=True)  # (N,)
    logprobs, kl = policy(ids, mask, read=read)  # (N,)
    return unpack(logprobs, mask, at).sum(1), unpack(kl, mask, at).sum(1)


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


def check(config, say):
    """UserError for flags that --loss has no use for, or needs."""
    if config.preset:
        flags = [f"{flag_of(name)} {value}" for name, value in config.PRESETS[config.preset].items()]
        say(f"--preset {config.preset} is {' '.join(flags)}; other flags given beside it count")
    without = {"reference": NO_REFERENCE, "sft_coef": WITH_SFT, "gamma": WITHOUT_MARGIN,
               "margins": WITHOUT_MARGIN}
    users = {name: [loss for loss in LOSSES if loss not in others] for name, others in without.items()}
    users |= {"dpop_lambda": ["dpop"], "tdpo_alpha": ["tdpo2"]}
    for name, losses in users.items():
        given = getattr(config, name) != getattr(Config, name)
        require(not given or config.loss in losses,
                f"{flag_of(name)} is for --loss {', '.join(losses)}; leave it out with {config.loss}")
    require(config.loss != "robust" or config.label_smoothing > 0,
            "--loss robust needs the share of wrong labels, --label-smoothing above 0; with 0 it is dpo")


def main(config):
    run = Run(config)
    check(config, run.say)
    model, tokenizer = open_model(config, GPT)
    reference = None
    if config.reference:
        reference = open_reference(config, tokenizer)
    elif config.loss not in NO_REFERENCE:
        reference = frozen_reference(model, config)
    prepare_training(model, config)

    # 1. rows to groups of encoded replies
    limit = context_of(config, model)
    if reference is not None:
        limit = min(limit, reference.config.block_size)
    train, val = preference_groups(config, tokenizer, limit, run.say)
    costs = [group.longest for group in train]
    replies = [len(group.examples) for group in train]
    with_margin = sum(group.row.margin != 0 for group in train)
    if with_margin and not config.margins:
        run.say(f"warning: {with_margin} rows have a margin, which counts for nothing without --margins")

    # 2. model, optimiser, reference log-probabilities of the prompts that the steps will visit
    policy = run.parallel(model)
    if reference is not None:
        reference = run.parallel(reference).eval()
    optimizer = adamw(model, config.lr, config.weight_decay)
    steps = count_steps(config, costs, replies)

    def write(folder):
        save_model(folder, model, tokenizer, config)

    modules = {"policy": model}
    optimizers = {"optimizer": optimizer}
    first, _ = run.begin(modules, optimizers, {"": write}, best="-val_loss", steps=steps)
    batches = endless_batches(costs, config.batch_tokens, config.seed, rows=replies)
    plan = [next(batches) for _ in range(steps)]
    budget = config.micro_batch_tokens
    pad = tokenizer.pad
    val_rows = [group.row for group in val]
    val_examples = replies_of(val)
    ref_logprobs, ref_val = {}, None
    if reference is not None:
        visited = set()
        for batch in plan:
            visited.update(batch)
        visited = sorted(visited)
        run.say(f"computing the reference's log-probabilities of {len(visited)} prompts' replies")
        examples = replies_of([train[i] for i in visited])
        flat = reply_logprobs(run, reference, examples, budget, pad)  # (replies of all visited,)
        sizes = [replies[i] for i in visited]
        ref_logprobs = dict(zip(visited, flat.split(sizes)))
        if val:
            ref_val = reply_logprobs(run, reference, val_examples, budget, pad)
    if config.loss not in WITH_KL:
        reference = None
    # No dropout: without --reference the policy must start equal to the reference.
    model.eval()

    def validate(step):
        """Log the loss and what goes with it on held-out replies, and print samples."""
        def kl_of(ids, mask, lengths):
            return forward(model, reference, ids, mask, config)[1]

        logprobs = reply_logprobs(run, model, val_examples, budget, pad)  # (N,)
        lengths = torch.tensor([float(sum(example.mask)) for example in val_examples])
        kl = None
        if config.loss in WITH_KL:
            kl = per_example(run, model, val_examples, budget, pad, kl_of)
        known = Replies(logprobs, lengths, ref_val, kl)
        pairs = pairs_of(val_rows, config).times(1, len(val))
        loss, result = preference_loss(known, pairs, config)
        accuracy, low, high = ranking_accuracy(known.scores.numpy(), val_rows)
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
            pairs = pairs_of([group.row for group in groups], config)  # (P,)
            pairs = Pairs(*(numbers.to(run.device, non_blocking=True) for numbers in pairs))
            pairs = pairs.times(counts, len(batch))
            lengths = mask.sum(1).float().to(run.device, non_blocking=True)  # (B,)
            reference_sums = None
            if ref_logprobs:
                reference_sums = torch.cat([ref_logprobs[i] for i in piece])  # (B,)
                reference_sums = reference_sums.to(run.device, non_blocking=True)
            with run.autocast():
                logprobs, kl = forward(policy, reference, ids, mask, config)  # (B,)
            known = Replies(logprobs, lengths, reference_sums, kl)
            loss, metrics = preference_loss(known, pairs, config)
            run.backward(loss, optimizer)
            metrics["loss"] = loss
            metrics["chosen_logprob"] = (pairs.weight * logprobs[pairs.better]).sum()
            metrics["rejected_logprob"] = (pairs.weight * logprobs[pairs.worse]).sum()
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
