"""Reward model of several aims: how helpful, honest, harmless a reply is, apart, then weighed (ArmoRM).

    r_j(y) = w_j . h(y)                       score of aim j; h(y): the state at the reply's last token
    x_j                                       rating of y by aim j, in deviations from its mean, or none
    g(p)                                      weights of the aims for the prompt p
    l(y)   = v . h(y)                         length of y, in deviations: one aim more, which every reply has
    r(y)   = b sum_j g_j(p) r_j(y) - c l(y)   the score

    1. trunk     minimises the mean of (r_j(y) - x_j)^2 over the ratings there are, its heads starting as 2.
                 makes them; --steps 0 leaves it as it is
    2. heads     w_j = argmin sum_y (w . h(y) - x_j)^2 + a |w|^2 over the replies that have an x_j, in closed
                 form (ridge regression); a: --ridge, or the best of seven on held-out rows
    3. weights   --weights equal           g = 1, b = 1
                 --weights honest=1,kind=2 g as given, b = 1; an aim of weight 0 or not named is left out
                 --weights learned         g = softmax(u), the same for all prompts
                 --weights gate            g = softmax(MLP(h(p))), h(p): the state at the prompt's last token
                 u, MLP and b minimise -log sigma(r(better) - r(worse)) over --preferences, or over the ranked
                 rows of --data
    4. length    --length remove: c such that r and the length in characters have no rank correlation
                 (Spearman's is 0) on the replies that it is fitted to; --length keep: c = 0
    5. export    the folder's score is r. Without a gate it is a plain reward model's, with the one head
                 b sum_j g_j w_j - c v. With a gate the heads are b w_j - c v, as g adds up to 1, and the gate
                 lies beside them: our scripts read both, transformers opens a classifier whose labels are the
                 aims and says that it leaves the gate out

Heads, weights and c are fitted to rows that the trunk was not trained on (--fit-fraction): its scores of what
it knows are too good, and weights that believe them do worse than equal ones.

Wang et al. 2024, section 3. There the trunk is a trained reward model's and stays frozen, the gate has three
layers of 1024 and a temperature of 10, and each aim has a c of its own, taken off before the gate is trained
(the published code computes them and uses none). The mean score of the demonstrations becomes 0, as in
reward.py. Left out: a trunk from a reward model's folder.

    python toy.py --model runs/sft --aims --groups 16000 --out runs/ratings
    python aims.py --val-data runs/ratings/heldout.jsonl --weights learned

The second orders 0.85 of the held-out pairs right, where the labels' noise allows 0.90 (three seeds;
2026-11-28, one thread of an Intel Xeon). The other weights and --length remove: docs/reward_models.md.

Legend: N replies, laid end to end, K aims, C width, P pairs.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from agreement import agreement, described, draw, spearman, zero_demonstrations
from data import (
    Group, collate, context_of, count_steps, decided_pairs, encode_groups, end_to_end, endless_batches,
    per_example, preference_groups)
from formats.model_folder import open_model, save_model
from formats.rows import Row
from formats.sources import read_rows, split_by_prompt, unit_hash
from model import GPT, ScalarModel, last_positions, last_scores, prepare_training, read_at, shifted
from plumbing.disk import write_json
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, Probability, RunConfig, require
from plumbing.ranks import write_weight
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr

ALPHAS = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)  # what --ridge 0 chooses from
WEIGHTS_LR = 0.03  # of Adam, for weights that are the same for all prompts


@dataclass
class Config(RunConfig):
    # files of rated replies, {"ratings": {aim: number}} for each: a.jsonl, or a mixture
    # a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/ratings/train.jsonl"
    val_data: str = ""  # file of held-out rows; without it --val-fraction of --data
    preferences: str = ""  # file that weights are learned from; without it the ranked rows of --data
    # a file whose mean score becomes 0; without it: the best replies of the training rows
    demonstrations: str = ""
    # checkpoint folder or hub name of a language model whose trunk to start from, or scratch
    model: str = "runs/sft"
    out: str = "runs/aims"  # folder for the checkpoint, metrics.jsonl and evaluation.json
    # equal, learned, gate, or of each aim name=number with commas between them, see above
    weights: str = "equal"
    gate_width: Count = 64  # units inside the gate
    gate_lr: Positive = 3e-4  # of Adam, for the gate; falls to 0 on a cosine
    # a, the penalty of the heads' closed form; 0: the best of seven on held-out rows, 1 without any
    ridge: NonNegative = 0.0
    length: Literal["keep", "remove"] = "keep"  # what the score has in common with the reply's length
    # share of --data's prompts that heads, weights and c are fitted to, and the trunk isn't trained on; with
    # --steps 0 all serve the fit
    fit_fraction: Probability = 0.25
    fit_replies: Count = 20000  # of these, as many replies at most, evenly spread
    fit_steps: Count = 300  # steps that fit learned weights or a gate, over all those replies each
    steps: Natural = 1200  # optimiser steps of the trunk; 0 leaves it as it is
    epochs: Natural = 0  # passes over the data, instead of --steps; 0 goes by --steps
    batch_tokens: Count = 4096  # tokens per optimiser step over all ranks, padding included
    # tokens per forward pass on one rank, at most; lower it when memory is short
    micro_batch_tokens: Count = 8192
    lr: Positive = 2e-3  # peak learning rate; falls to a tenth on a cosine
    warmup: Natural = 100  # steps of linear warm-up
    weight_decay: NonNegative = 0.01  # of matrices; norms, biases and embeddings don't decay
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    val_fraction: Fraction = 0.1  # share of a file's prompts held out
    eval_every: Count = 100  # steps between held-out losses


class Seen(NamedTuple):
    """Replies, laid end to end, as the fit sees them: tensors on the CPU, fp64."""
    states: torch.Tensor  # (N, C) at their last tokens
    prompts: torch.Tensor  # (N, C) at their prompts' last tokens
    ratings: torch.Tensor  # (N, K) in deviations, NaN where there is none
    lengths: torch.Tensor  # (N,) characters
    pairs: tuple  # better, worse (P,) positions; right, weight (P,), which adds up to 1


class Fitted(NamedTuple):
    """What makes one number of a state: heads (K, C) or, without a gate, (1, C)."""
    heads: torch.Tensor
    gate: nn.Module | None

    def rewards(self, replies):
        """r (N,) of `Seen`."""
        aims = replies.states @ self.heads.T  # (N, K)
        weights = 1.0 if self.gate is None else self.gate(replies.prompts).softmax(-1)
        return (weights * aims).sum(-1)

    @property
    def width(self):
        """Units inside the gate, 0 without one."""
        return 0 if self.gate is None else self.gate[0].out_features

    def into(self, weights):
        """Weights {name: tensor} of a `ScalarModel` with these heads, and the gate."""
        gate = {} if self.gate is None else self.gate.state_dict(prefix="gate.")
        made = {"score.weight": self.heads} | gate
        return weights | {name: value.float() for name, value in made.items()}


# ---------------------------------------------------------------------------------------------------------
# Fits: closed forms, and a few weights

def aims_loss(scores, ratings, count):
    """Sum of (score - rating)^2 over the ratings that are not NaN, divided by count. Both (n, K)."""
    known = ~ratings.isnan()
    return (known * (scores - ratings.nan_to_num())).square().sum() / count


def ridge(states, ratings, alpha):
    """Heads (K, C): for each aim the w that makes sum (w . h - x)^2 + alpha |w|^2 the least.

    states (N, C) h, ratings (N, K) x; replies whose rating is NaN don't count. Hoerl and Kennard 1970.
    """
    heads = []
    for x in ratings.T:
        known = ~x.isnan()
        h = states[known]
        heads.append(torch.linalg.solve(h.T @ h + alpha * torch.eye(h.shape[1]).to(h), h.T @ x[known]))
    return torch.stack(heads)


def best_ridge(train, val, alpha):
    """alpha or, if that is 0, the one of ALPHAS whose heads miss held-out ratings least; 1 without any."""
    count = (~val.ratings.isnan()).sum() if val else 0
    if alpha > 0 or count == 0:
        return alpha or 1.0
    losses = {}
    for one in ALPHAS:
        scores = val.states @ ridge(train.states, train.ratings, one).T
        losses[one] = float(aims_loss(scores, val.ratings, count))
    return min(losses, key=losses.get)


def comparison_loss(rewards, pairs):
    """Mean of -log sigma(r(better) - r(worse)), the label being right with a probability.

    rewards (N,); pairs: see `Seen`.
    """
    better, worse, right, weight = pairs
    gap = rewards[better] - rewards[worse]  # (P,)
    return -(weight * (right * F.logsigmoid(gap) + (1 - right) * F.logsigmoid(-gap))).sum()


def learn_weights(aims, prompts, pairs, config, by_prompt):
    """(gate, b): the softmax of what the gate gives are the weights.

    aims (N, K): scores of the aims; prompts (N, C), pairs: see `Seen`. First the gate's last bias alone is
    learned, and b: weights that are the same whatever the prompt. by_prompt: then all of the gate. Begun
    afresh it would make one aim's weight 1 before b has grown, and stay there.
    """
    torch.manual_seed(config.seed)
    C, K = prompts.shape[1], aims.shape[1]
    gate = nn.Sequential(nn.Linear(C, config.gate_width), nn.ReLU(), nn.Linear(config.gate_width, K))
    nn.init.zeros_(gate[2].weight)
    nn.init.zeros_(gate[2].bias)
    log_scale = torch.zeros((), requires_grad=True)
    size = prompts.square().mean(0).sqrt().clamp(min=1e-6).float()  # (C,)
    inputs = prompts.float() / size
    aims = aims.float()
    stages = [(WEIGHTS_LR, [log_scale, gate[2].bias])]
    if by_prompt:
        stages.append((config.gate_lr, [log_scale, *gate.parameters()]))
    for lr, learned in stages:
        optimizer = torch.optim.Adam(learned, lr)
        for step in range(config.fit_steps):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / config.fit_steps)) / 2
            rewards = log_scale.exp() * (gate(inputs).softmax(-1) * aims).sum(-1)  # (N,)
            loss = comparison_loss(rewards, pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    # The folder's gate takes the states as they are.
    with torch.no_grad():
        gate[0].weight /= size
    return gate.double().requires_grad_(False), float(log_scale.detach().exp())


def length_share(rewards, predicted, lengths):
    """c such that rewards - c predicted and lengths have no rank correlation; (N,) each, numpy.

    0 where no c does, as when all replies are of one length. Found by halving an interval.
    """
    def left(c):
        return spearman(rewards - c * predicted, lengths)

    if left(0.0) == 0:
        return 0.0
    sign = math.copysign(1.0, left(0.0))
    # What is predicted goes with length, so more of it taken away lowers the correlation.
    low, high = 0.0, sign * float(np.std(rewards) / max(np.std(predicted), 1e-12))
    for _ in range(20):
        if sign * left(high) <= 0:
            break
        low, high = high, 2 * high
    else:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sign * left(middle) > 0 else (low, middle)
    return high


def fit(config, train, compared, val, given):
    """(`Fitted`, {name: what is told of it}) of training and held-out `Seen` (None: there are none).

    compared: those that the weights are learned from; given: the aims' weights (K,), or None where they are
    learned.
    """
    alpha = best_ridge(train, val, config.ridge)
    heads = ridge(train.states, train.ratings, alpha)  # (K, C)
    gate, scale = None, 1.0
    if given is None:
        aims = compared.states @ heads.T  # (N, K)
        by_prompt = config.weights == "gate"
        gate, scale = learn_weights(aims, compared.prompts, compared.pairs, config, by_prompt)
        given = gate(compared.prompts).softmax(-1).mean(0)  # (K,)
    told = {"ridge": alpha, "scale": scale, "weights": given.tolist(), "heads": heads}
    heads = scale * heads
    if config.weights != "gate":
        gate, heads = None, (given @ heads)[None]
    fitted = Fitted(heads, gate)

    share = 0.0
    if config.length == "remove":
        known = (train.lengths - train.lengths.mean()) / train.lengths.std().clamp(min=1e-6)
        of_length = ridge(train.states, known[:, None], alpha)  # (1, C)
        predicted = (train.states @ of_length.T)[:, 0]
        share = length_share(fitted.rewards(train).numpy(), predicted.numpy(), train.lengths.numpy())
        told["before"] = fitted
        fitted = Fitted(heads - share * of_length, gate)
    return fitted, told | {"length_share": share}


# ---------------------------------------------------------------------------------------------------------
# Rows and states

def weights_given(text, found):
    """(aims, weights (K,) or None where they are learned) of --weights. found: names of the rows' aims."""
    if text in ("learned", "gate"):
        return found, None
    if text == "equal":
        return found, torch.ones(len(found), dtype=torch.float64)
    weights = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        require(equals and is_finite(number),
                f"--weights {text}: {part!r} is not an aim, an equals sign and a number; or write equal, "
                "learned or gate")
        require(name in found, f"--weights {text}: no reply is rated by {name!r}, only by {', '.join(found)}")
        if float(number) != 0:
            weights[name] = float(number)
    require(weights, f"--weights {text} leaves no aim")
    return tuple(weights), torch.tensor(list(weights.values()), dtype=torch.float64)


def is_finite(text):
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def ratings_of(groups, aims):
    """Ratings (N, K) of the replies of some groups, NaN where there is none."""
    rows = []
    for group in groups:
        known = group.row.ratings or [{}] * len(group.examples)
        rows += [[of_one.get(aim, math.nan) for aim in aims] for of_one in known]
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(aims))


def comparisons_of(groups):
    """`Seen.pairs` of some groups."""
    pairs = []
    start = 0  # where the group's replies begin
    for row, examples in groups:
        found = decided_pairs(row.ranks) if len(examples) > 1 and not row.verdict else []
        pairs += [(start + i, start + j, row.probability, 1 / len(found)) for i, j in found]
        start += len(examples)
    better, worse, right, weight = zip(*pairs) if pairs else [()] * 4
    right, weight = torch.tensor(right, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64)
    return torch.tensor(better), torch.tensor(worse), right, weight / weight.sum()


def keep_back(groups, share):
    """(groups for the trunk, groups for the fit): about this share of the prompts is for the fit."""
    for_fit = [unit_hash(group.row.text, "fit") < share for group in groups]
    return ([group for group, kept in zip(groups, for_fit) if not kept],
            [group for group, kept in zip(groups, for_fit) if kept])


def spread(groups, most):
    """Of some groups as many as have at most so many replies together, evenly spread."""
    replies = sum(len(group.examples) for group in groups)
    return groups[::math.ceil(replies / most)] if groups else groups


def unrated(row):
    """Why a row teaches nothing of any aim, "" if it does."""
    return "" if any(row.ratings) else "no rating"


def standard_of(ratings):
    """Mean and deviation (K,) of ratings (N, K) that are not NaN; deviation 1 where all are the same."""
    mean = ratings.nanmean(0)
    deviation = (ratings - mean).square().nanmean(0).sqrt()
    return mean, torch.where(deviation > 0, deviation, 1.0)


class Rows(NamedTuple):
    """Lists of Group, and what their ratings are of."""
    aims: list  # names
    given: torch.Tensor | None  # weights (K,), see `weights_given`
    mean: torch.Tensor  # (K,) of the ratings of all training rows
    deviation: torch.Tensor  # (K,)
    for_trunk: list  # what the trunk is trained on
    for_fit: list  # what heads and c are fitted to
    compared: list  # what weights are learned from
    val: list  # held out, rated
    val_compared: list  # held out, ranked

    def ratings(self, groups):
        """(N, K) of the replies of some groups, in deviations; NaN where there is none."""
        return (ratings_of(groups, self.aims) - self.mean) / self.deviation


def read_groups(config, tokenizer, limit, say):
    """`Rows` from --data, --val-data and --preferences."""
    train, val = preference_groups(config, tokenizer, limit, say, "feedback", unrated)
    found = sorted({aim for group in train for known in group.row.ratings for aim in known})
    aims, given = weights_given(config.weights, found)
    ratings = ratings_of(train, aims)
    counts = (~ratings.isnan()).sum(0).tolist()
    say(f"aims: {', '.join(f'{aim} ({count} ratings)' for aim, count in zip(aims, counts))}")
    trunk, fit = train, train
    if config.steps or config.epochs:
        trunk, fit = keep_back(train, config.fit_fraction)
        require(trunk and fit, f"--fit-fraction {config.fit_fraction} leaves the trunk {len(trunk)} of "
                               f"{len(train)} rows, and the fit {len(fit)}")
    compared, val_compared = fit, val
    if config.preferences:
        ranked = read_rows(config.preferences, "preferences", say)
        ranked, held_out = split_by_prompt(ranked, config.val_fraction, say)
        compared = encode_groups(tokenizer, ranked, limit, say)
        val_compared = encode_groups(tokenizer, held_out, limit, say)
    require(given is not None or len(comparisons_of(compared)[0]),
            f"--weights {config.weights} learns from preferences, and --data ranks no replies; name "
            "--preferences, or give the weights")
    return Rows(aims, given, *standard_of(ratings), trunk, fit, compared, val, val_compared)


def look_at(run, model, rows, budget, pad, groups):
    """`Seen` of some groups; None without groups. rows: `Rows`."""
    if not groups:
        return None
    C = model.config.embed_dim

    def read(ids, mask, lengths):
        index, places = read_at(*last_positions(ids, lengths, mask))
        states = model(ids, index, lambda states, head, embedding: states)
        return torch.cat([states[place.to(ids.device)].float() for place in places], 1)  # (n, 2 C)

    examples = end_to_end([group.examples for group in groups])
    states = per_example(run, model, examples, budget, pad, read, (2 * C,)).double()
    lengths = torch.tensor([len(reply) for group in groups for reply in group.row.replies]).double()
    return Seen(*states.split(C, 1), rows.ratings(groups), lengths, comparisons_of(groups))


def measures(aims, fitted, told, val, compared, rows):
    """What evaluation.json says: agreement on held-out rows that are compared, and of each aim.

    val, compared: held-out `Seen` for the aims' ratings, and those of rows; `Fitted`, told: see `fit`.
    """
    rewards = fitted.rewards(compared).numpy()
    lengths = compared.lengths.numpy()
    result = agreement(rewards, rows) | {"length_spearman": spearman(rewards, lengths)}
    if "before" in told:
        before = told["before"].rewards(compared).numpy()
        accuracy = agreement(before, rows).get("accuracy")
        result["with_length"] = {"length_spearman": spearman(before, lengths), "accuracy": accuracy}
    result |= {name: told[name] for name in ("ridge", "scale", "length_share")}
    result["aims"] = {}
    scores = val.states @ told["heads"].T  # (N, K)
    for aim, weight, score, rating in zip(aims, told["weights"], scores.T, val.ratings.T):
        known = ~rating.isnan()
        pair = torch.stack([score[known], rating[known]])
        varies = known.sum() > 1 and pair.std(1).min() > 0
        correlation = float(pair.corrcoef()[0, 1]) if varies else None
        result["aims"][aim] = {"weight": weight, "correlation": correlation, "ratings": int(known.sum())}
    return result


def described_aims(result):
    """The lines on what `measures` adds to an agreement."""
    lines = []
    for aim, one in result["aims"].items():
        found = "unknown" if one["correlation"] is None else f"{one['correlation']:.3f}"
        lines.append(f"aim {aim}: weight {one['weight']:.3f} on average, correlation of score and rating "
                     f"{found} ({one['ratings']} held-out ratings)")
    line = f"rank correlation of score and length {result['length_spearman']:.3f}"
    if "with_length" in result:
        before = result["with_length"]
        line += f", {before['length_spearman']:.3f} before it was removed"
        if before["accuracy"] is not None:
            line += f"; accuracy {result['accuracy']:.3f}, {before['accuracy']:.3f} before"
    return [*lines, line]


def main(config):
    run = Run(config)
    require(config.lora_save == "merged",
            "--lora-save adapter: the heads are fitted to the trunk as it is in the end, and a PEFT folder "
            "has no place for a gate; use --lora-save merged")
    language_model, tokenizer = open_model(config, GPT)

    # 1. rows to groups of encoded replies, and their ratings
    limit = context_of(config, language_model)
    rows = read_groups(config, tokenizer, limit, run.say)
    aims, train, val = rows.aims, rows.for_trunk, rows.val
    ratings, val_ratings = rows.ratings(train), rows.ratings(val)  # (N, K)
    demonstrations = zero_demonstrations(config, tokenizer, train, limit, run.say)
    demonstrations = [Group(Row([], [""] * len(examples)), examples) for examples in demonstrations]

    # 2. model and optimiser
    torch.manual_seed(config.seed)
    model = ScalarModel.from_trunk(language_model, share=True, labels=len(aims))
    shifts = model.can_shift
    del language_model
    prepare_training(model, config)
    reward = run.parallel(model)
    optimizer = adamw(model, config.lr, config.weight_decay)
    costs = [group.longest for group in train]
    replies = [len(group.examples) for group in train]
    begins = np.cumsum([0, *replies])
    steps = count_steps(config, costs, replies)
    budget, pad = config.micro_batch_tokens, tokenizer.pad
    look = functools.partial(look_at, run, model, rows, budget, pad)
    result = {}  # of the last evaluation

    @functools.lru_cache(1)
    def fitted_at(step):
        """(`Fitted`, what is told of it, held-out `Seen`) after so many steps."""
        seen = look(spread(rows.for_fit, config.fit_replies))
        own = look(spread(rows.compared, config.fit_replies)) if config.preferences else seen
        held_out = look(val)
        return *fit(config, seen, own, held_out, rows.given), held_out

    def write(folder):
        fitted, _, _ = fitted_at(run.step)
        kept = dataclasses.replace(model.config, labels=len(fitted.heads), gate=fitted.width)
        zero = float(fitted.rewards(look(demonstrations)).mean()) if shifts else 0.0

        def change(weights):
            weights = fitted.into(weights)
            return shifted(weights, zero) if shifts else weights

        notes = {"aims": list(aims), "gate": fitted.width} if fitted.gate else {}
        save_model(folder, model, tokenizer, config, change, config=kept, **notes)
        if run.main and run.step == steps and val:
            write_json(folder / "evaluation.json", result)

    def validate(step):
        def read(ids, mask, lengths):
            return last_scores(model, ids, lengths).view(-1, len(aims))

        examples = end_to_end([group.examples for group in val])
        scores = per_example(run, model, examples, budget, pad, read, (len(aims),))  # (N, K)
        count = (~val_ratings.isnan()).sum()
        run.log(step, {"val_loss": aims_loss(scores, val_ratings, count)}, show=("val_loss",))
        if step == steps:
            fitted, told, held_out = fitted_at(step)
            compared = look(rows.val_compared) if config.preferences else held_out
            ranked = [group.row for group in rows.val_compared]
            result.update(measures(aims, fitted, told, held_out, compared, ranked))

    modules, optimizers = {"aims": model}, {"optimizer": optimizer}
    first, _ = run.begin(modules, optimizers, {"": write}, best="-val_loss", steps=steps)
    if first == 0 < steps:
        start = look(spread(rows.for_fit, config.fit_replies))
        heads = ridge(start.states, start.ratings, config.ridge or 1.0)
        write_weight(model, "score.weight", heads)
    known = [int((~ratings[i:j].isnan()).sum()) for i, j in zip(begins, begins[1:])]  # of each group
    batches = endless_batches(costs, config.batch_tokens, config.seed, first, replies)
    model.train()

    # 3. train
    for step in run.steps(first, steps, validate if val else None):
        run.seed_step(step)
        batch = next(batches)
        count = sum(known[i] for i in batch)
        pieces = run.split(batch, costs, budget, replies)
        total = 0
        for piece, counts in run.passes(pieces, reward):
            examples = end_to_end([train[i].examples for i in piece])
            ids, mask, lengths = collate(examples, pad, run.device)  # (B, T)
            targets = torch.cat([ratings[begins[i]:begins[i + 1]] for i in piece]).float()  # (B, K)
            with run.autocast():
                scores = last_scores(reward, ids, lengths).view(-1, len(aims))  # (B, K)
            loss = counts * aims_loss(scores, targets.to(run.device, non_blocking=True), count)
            run.backward(loss, optimizer)
            total = total + loss.detach()
        lr = scheduled_lr(step, steps, config.warmup, config.lr)
        grad_norm = run.optimizer_step(optimizer, lr, config.max_grad_norm, batch)
        if run.time_to_log(step):
            run.log(step + 1, {"loss": run.all_sum(total), "lr": lr, "grad_norm": grad_norm}, show=("loss",))
    for line in [*described(result), *described_aims(result)] if result else []:
        run.say(line)
    if run.main:
        draw(result, run.out / "evaluation.png", run.say)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
