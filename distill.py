"""Distillation: give a student the distribution of a teacher over the next token, on replies of its own.

    minimise  E_{x, y} sum_t D_t,    D_t a divergence between pi(. | x, y_<t) and teacher(. | x, y_<t)

--divergence says which, over the whole vocabulary (Agarwal et al. 2023, "GKD", eq. 1, with b: --js-beta):

    reverse   KL(pi || teacher) = sum pi log(pi / teacher)      the student leaves out what it can't say
    forward   KL(teacher || pi)                                 the student covers all that the teacher says
    js        b KL(teacher || m) + (1 - b) KL(pi || m),  m = b teacher + (1 - b) pi
    nll       -log pi(y_t) alone, on the teacher's replies: sequence-level distillation (Kim and Rush 2016)

js goes to 0 at both ends of b; js / b goes to the forward KL as b goes to 0, js / (1 - b) to the reverse one
as b goes to 1. --on says whose replies y are: the student's (policy), the teacher's, or in each step either
(mix). Every reply is sampled anew and used once; who wants a fixed file of the teacher's samples gives it to
sft.py, which is nll.

No gradient goes through the sampling, as in GKD: a token answers for the divergence where it stands, and not
for where it leads. What that leaves out of the gradient of the objective above is

    E[ sum_t grad log pi(y_t) sum_{s > t} D_s ]

which --credit future adds, with the mean of the step before as a baseline. With it reverse follows the
gradient of KL(pi(y|x) || teacher(y|x)) of whole replies, and a teacher ref exp(r / beta) / Z makes that the
objective of RLHF: E[r] / beta - KL(pi || ref), up to a constant. A student that can be the teacher ends there
without it too, since then every D_t is 0; one that can't, need not.

What differs between implementations:
    here                                     GKD's paper, others                          switch
    mean over the tokens of the whole step   over each reply, then over replies           none
    all of the vocabulary                    the likeliest tokens of the teacher, or      none
                                               the sampled one alone (k1)
    both distributions at --temperature,     the student's at 1                           --temperature 1
      at which the replies are sampled
Left out: a reward beside the divergence (GKD's RL term), layers or attention of the teacher, teachers with
another tokenizer.

    python sft.py --layers 1 --width 64 --out runs/small
    python distill.py --model runs/small --teacher runs/ppo --judge toy:gold
    python distill.py --model runs/small --teacher runs/ppo --on teacher --divergence nll
    torchrun --nproc-per-node 8 distill.py --model small --teacher large --data prompts.jsonl

On the embedded task, from the demo's PPO policy (616,000 weights) to one layer of width 64 (160,000), on 508
held-out prompts, by evaluate.py --judge toy:gold (24 November 2026, one thread of a busy AMD EPYC without
AMX):
    teacher 0.949    the student after sft.py 0.092    after the second command, 21 s of CPU time: 0.957, and
    0.953 with seeds 1 and 2; KL to the teacher 0.019 nats per reply    after the third: 0.929, KL 0.137
The standard error of each is 0.014; teacher and student draw the same random numbers there, so most replies
are the same. On the sums of sums.py (seed 0, 28 November 2026, an Intel Xeon), to one layer that had 600
steps of SFT: right 0.936 by the teacher, 0.528 by the student before and 0.960 after, in 51 s of CPU time.

Legend: B replies of this rank, T tokens; n replies of a pass, W tokens of the longest; N tokens of a pass,
V vocabulary, V' the same rounded up to 64, C width of the student, C' of the teacher.
"""
import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch

from data import endless_order
from formats.model_folder import load_model, open_model, save_model
from head import (
    add_weight_gradient, block_rows, ceil_divide, float32_products, rows_of_chunks, token_logprobs,
    zeros_where_needed)
from judges import check_functions, judge, load_functions
from model import GPT, prepare_training, token_index, unpack
from plumbing.flags import Count, Fraction, Natural, Positive, RunConfig, require
from plumbing.health import shares_of_time
from plumbing.run import Run, run_script
from plumbing.steps import adamw, scheduled_lr
from rollout import SAMPLED_AS_SCORED, draw_prompts, load_prompts, sample


@dataclass
class Config(RunConfig):
    REFUSED: ClassVar = SAMPLED_AS_SCORED
    # files whose prompts are used: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/toy/prompts.jsonl"
    model: str = "runs/small"  # checkpoint folder or hub name of the student to start from, or scratch
    teacher: str = "runs/ppo"  # checkpoint folder or hub name of the teacher, with the same tokenizer
    # Python functions, module:function, which get lists (those that their parameters name: prompts, replies,
    # answers, ended) and return one number per reply; measured and logged, never trained on
    judge: list[str] = field(default_factory=list)
    out: str = "runs/distill"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 300  # optimiser steps, each on replies sampled for it
    # share of a file's prompts left out; take that of the other stages, and evaluate.py has prompts that none
    # has seen
    val_fraction: Fraction = 0.0
    rollout_batch: Count = 64  # prompts per step over all ranks, one reply each
    # replies that a rank samples at the same time, the others wait for a place; 0: all. Lower it when keys
    # and values take too much memory
    rollout_rows: Natural = 0
    max_new_tokens: Count = 40  # longest reply, tokens
    temperature: Positive = 1.0  # of sampling, and of both distributions
    on: Literal["policy", "teacher", "mix"] = "policy"  # whose replies are trained on
    mix_share: Fraction = 0.5  # with --on mix: probability that a step's replies are the student's
    divergence: Literal["reverse", "forward", "js", "nll"] = "reverse"  # see above
    js_beta: Annotated[float, "> 0", "< 1"] = 0.5  # b of --divergence js
    # what a token answers for: the divergence where it stands, or also those that it leads to
    credit: Literal["none", "future"] = "none"
    # tokens per forward pass on one rank, at most; lower it when memory is short
    micro_batch_tokens: Count = 8192
    lr: Positive = 2e-3  # peak learning rate
    # to a tenth on a cosine, to zero on a line, or constant
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Natural = 10  # steps of linear warm-up
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    sample_every: Count = 50  # steps between printed samples


# ---------------------------------------------------------------------------------------------------------
# The divergence and its gradient: states and heads of two models to one number, never all logits at once

# Logits of the columns that fill up V': they have no probability.
LEAST = torch.finfo(torch.float32).min / 2


class Divergence(torch.autograd.Function):
    """States and heads of student and teacher to a sum of divergences, chunk by chunk; see `divergence`.

    All tokens weigh the same in the sum. So the student's gradient is computed in the forward pass, while a
    chunk's distributions are at hand, and the backward pass multiplies it with the sum's own.
    """

    @staticmethod
    def forward(ctx, states, weight, teacher_states, teacher_weight, kind, beta, dtype, learning):
        """dtype: of the products. learning: whether a backward pass may follow."""
        N, V = len(states), len(weight)
        ctx.dtypes = states.dtype, weight.dtype
        x, w = states.to(dtype), weight.to(dtype)
        teacher_x, teacher_w = teacher_states.to(dtype), teacher_weight.to(dtype)
        # In float16 a gradient would overflow that has not been divided by the number of tokens yet.
        exact = torch.float32 if dtype == torch.float16 else dtype
        gradients = [None, None]
        if learning:
            gradients = zeros_where_needed((x, w), ctx.needs_input_grad)
        of_x, of_w = gradients

        each = x.new_empty(N, dtype=torch.float32)
        # Two buffers together hold as many numbers as the head's one.
        rows, width = rows_of_chunks(N, 2 * V), 64 * ceil_divide(V, 64)
        buffers = x.new_empty(2, rows, width, dtype=torch.float32)
        for start in range(0, N, rows):
            at = slice(start, min(start + rows, N))
            log_p, log_q = buffers[:, :at.stop - start]  # (n, V') of student and teacher
            write_log_softmax(log_p, x[at], w)
            write_log_softmax(log_q, teacher_x[at], teacher_w)
            block = block_rows(log_p)
            for first in range(0, len(log_p), block):
                part = slice(first, first + block)
                each[at][part] = overwrite_with_gradient(log_p[part], log_q[part], kind, beta)
            d = log_p[:, :V].to(exact)  # (n, V)
            if of_x is not None:
                of_x[at] = d @ w.to(exact)
            if of_w is not None:
                add_weight_gradient(of_w, d, x[at].to(exact))
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    def backward(ctx, g, _):
        """g (): gradient of the sum."""
        passed_down = []
        for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes):
            passed_down.append(None if gradient is None else (gradient * g).to(dtype))
        return *passed_down, None, None, None, None, None, None


def write_log_softmax(out, x, w):
    """Write log softmax(x @ w.T) of x (n, C) and w (V, C) to out (n, V') fp32."""
    V = len(w)
    logits = out[:, :V]
    if x.dtype == torch.float32:
        torch.mm(x, w.T, out=logits)
    elif float32_products(x.device):
        torch.mm(x, w.T, out_dtype=torch.float32, out=logits)
    else:
        logits.copy_(x @ w.T)
    out[:, V:] = LEAST
    torch.log_softmax(out, -1, out=out)


def overwrite_with_gradient(log_p, log_q, kind, beta):
    """Divergences (n,) of p, the student's, and q, the teacher's, from their logarithms (n, V').

    log_p becomes the gradient in the student's logits z. For what is a sum over v of f(p_v), with slope
    s = df/dp, that is  p (s - sum p s),  as dp/dz = p (onehot - p):
        reverse  s = log(p / q) + 1          forward  s = -q / p          js  s = (1 - b) log(p / m)
    Constants in s cancel; in js the rest of the derivative, 1 - b q / m - (1 - b) p / m, is 0.
    """
    p = log_p.exp()
    if kind == "reverse":
        slopes = log_p - log_q
        values = torch.linalg.vecdot(p, slopes)
        torch.mul(p, slopes - values[:, None], out=log_p)
    elif kind == "forward":
        q = log_q.exp()
        values = torch.linalg.vecdot(q, log_q - log_p)
        torch.sub(p, q, out=log_p)
    elif kind == "js":
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        slopes = log_p - log_m
        of_student = torch.linalg.vecdot(p, slopes)
        of_teacher = torch.linalg.vecdot(log_q.exp(), log_q - log_m)
        values = beta * of_teacher + (1 - beta) * of_student
        torch.mul(p, (1 - beta) * (slopes - of_student[:, None]), out=log_p)
    else:
        raise ValueError(f"unknown divergence {kind}")
    return values


def divergence(states, weight, teacher_states, teacher_weight, kind, beta=0.5, temperature=1.0):
    """Sum () over tokens of the divergence between student and teacher, and each token's (N,), in nats.

    states (N, C), weight (V, C); teacher_states (N, C'), teacher_weight (V, C'). kind: see the top of the
    file; beta: of js. The sum has a gradient in states and weight; each token's has none. Where the teacher's
    vocabulary has another size (some models fill theirs up), only the first tokens count, which both have.
    """
    V = min(len(weight), len(teacher_weight))
    if len(weight) > V:
        weight = weight[:V]
    device = states.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # Of the states, not the logits, as in head.py.
    if temperature != 1:
        states, teacher_states = states / temperature, teacher_states / temperature
    with torch.autocast(device, enabled=False):
        return Divergence.apply(states, weight, teacher_states, teacher_weight[:V], kind, beta, dtype,
                                torch.is_grad_enabled())


# ---------------------------------------------------------------------------------------------------------
# The loss of a pass

def cost_to_go(divergences):
    """Sum over the tokens behind each of their divergences, of (n, W), which are 0 outside the replies."""
    return divergences.flip(1).cumsum(1).flip(1) - divergences


def distillation_loss(states, weight, targets, teacher_outputs, where, config, baseline=0.0):
    """Sum () over the tokens of a pass of what is minimised, and {loss, cost}, sums too.

    states (N, C), weight (V, C), targets (N,): of the student, as `GPT.forward` gives them to read;
    teacher_outputs: the same of the teacher; where (n, W) bool, on the CPU: the N tokens; baseline: what is
    taken off a token's cost to go, whose sum is called cost.
    """
    if config.divergence == "nll":
        logprob, _ = token_logprobs(states, weight, targets, config.temperature, summed=True)
        return -logprob, {"loss": -logprob.detach()}
    teacher_states, teacher_weight, _ = teacher_outputs
    loss, each = divergence(states, weight, teacher_states, teacher_weight, config.divergence, config.js_beta,
                            config.temperature)
    sums = {"loss": loss.detach()}
    if config.credit == "future":
        at = token_index(where).to(each.device, non_blocking=True)  # (N,)
        costs = cost_to_go(unpack(each, where, at)).flatten()[at]  # (N,)
        logprobs, _ = token_logprobs(states, weight, targets, config.temperature)  # (N,)
        loss = loss + ((costs - baseline) * logprobs).sum()
        sums["cost"] = costs.sum()
    return loss, sums


# ---------------------------------------------------------------------------------------------------------
# Before the first step, and one step

def check(config, run):
    """UserError for flags that don't go together."""
    prompts, ranks = config.rollout_batch, run.world_size
    require(prompts % ranks == 0, f"--rollout-batch {prompts} is not divisible by {ranks} ranks")
    require(config.divergence != "nll" or config.on == "teacher",
            f"--divergence nll on the student's own replies teaches nothing: --on teacher, not {config.on}")
    require(config.credit == "none" or config.on == "policy",
            f"--credit future is for replies that the student samples: --on policy, not {config.on}")


class Pair(NamedTuple):
    """All that has weights. The student is in DDP where there are several ranks (or in shards)."""
    policy: torch.nn.Module
    student: GPT  # the same without DDP: to sample with, and to save
    teacher: GPT
    optimizer: torch.optim.Optimizer


def load_pair(config, run):
    """(Pair, tokenizer)."""
    student, tokenizer = open_model(config, GPT)
    teacher, other = load_model(config.teacher, GPT, allow_pickle=config.allow_pickle)
    require(other.same_as(tokenizer),
            f"--teacher {config.teacher} has another tokenizer than --model {config.model}, so their "
            "distributions can't be compared")
    teacher = run.parallel(teacher.requires_grad_(False).eval())
    prepare_training(student, config)
    # No dropout: what is compared is the distribution that samples.
    policy = run.parallel(student).eval()
    return Pair(policy, student, teacher, adamw(student, config.lr)), tokenizer


def student_samples(config, generator):
    """Whether the replies of this step are the student's: the same on all ranks."""
    if config.on == "mix":
        return torch.rand((), generator=generator, device=generator.device).item() < config.mix_share
    return config.on == "policy"


def train_on(run, config, pair, batch, numbers, baseline):
    """One optimiser step on the replies of a rollout, to the prompts of these numbers.

    Returns ({loss, cost: mean over tokens}, norm of the gradient, lr).
    """
    tokens = run.all_sum(batch.mask.sum())  # of the whole step
    plan, = batch.plan(run, [list(range(len(batch.texts)))], config.micro_batch_tokens)
    totals = {}
    for part in batch.passes(run, plan, pair.policy):
        def read(*outputs):
            return distillation_loss(*outputs, taught, part.where, config, baseline)

        with run.autocast():
            taught = None
            if config.divergence != "nll":
                with torch.no_grad():
                    taught = pair.teacher(part.ids, part.where, read=lambda *outputs: outputs)
            loss, sums = pair.policy(part.ids, part.where, read=read)
        # A pass that only keeps the ranks in step counts 0 times.
        run.backward(loss * part.counts / tokens, pair.optimizer)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value * part.counts / tokens
    lr = scheduled_lr(run.step, config.steps, config.warmup, config.lr, config.lr_schedule)
    grad_norm = run.optimizer_step(pair.optimizer, lr, config.max_grad_norm, numbers)
    return {name: run.all_sum(total).item() for name, total in totals.items()}, grad_norm, lr


def main(config):
    run = Run(config)
    check(config, run)
    judges = load_functions("--judge", config.judge)
    pair, tokenizer = load_pair(config, run)
    context = min(pair.student.config.block_size, pair.teacher.config.block_size)
    prompts = load_prompts(config, tokenizer, context, run.say)
    check_functions(judges, [prompt.row for prompt in prompts], run.say)
    for name, model in (("student", pair.student), ("teacher", pair.teacher)):
        run.say(f"{name}: {sum(p.numel() for p in model.parameters()):,} weights")

    def write(folder):
        save_model(folder, pair.student, tokenizer, config)

    modules, optimizers = {"policy": pair.student}, {"optimizer": pair.optimizer}
    first, state = run.begin(modules, optimizers, {"": write}, best="-loss")
    # Prompts drawn so far, and the mean cost to go of the step before.
    state |= {"drawn": 0, "cost": 0.0} | state
    order = endless_order(len(prompts), config.seed, state["drawn"])

    for step in run.steps(first, config.steps):
        generator = run.seed_step(step)
        clock = [run.clock()]

        # 1. rollout
        drawn = draw_prompts(run, prompts, order, config.rollout_batch)
        asked = [prompts[i] for i in drawn]
        own = student_samples(config, generator)
        batch = sample(run, pair.student if own else pair.teacher, tokenizer, asked,
                       config.max_new_tokens, config.temperature, generator, config.rollout_rows)
        clock.append(run.clock())

        # 2. what the judges say, which trains nothing
        judged = {function.name: judge(function, batch).to(run.device) for function in judges}
        clock.append(run.clock())

        # 3. update
        means, grad_norm, lr = train_on(run, config, pair, batch, drawn, state["cost"])
        clock.append(run.clock())

        # 4. log, save
        lengths = batch.mask.sum(1)  # (B,)
        if run.time_to_log(step):
            metrics = {"length": lengths.float().mean(), "eos_rate": batch.ended.float().mean()}
            metrics |= {name: numbers.mean() for name, numbers in judged.items()}
            sums = run.all_sum(torch.stack(list(metrics.values()))) / run.world_size
            row = means | dict(zip(metrics, sums.tolist()))
            row |= {"loss_per_reply": row["loss"] * row["length"], "lr": lr, "grad_norm": grad_norm}
            if config.on == "mix":
                row["student_samples"] = float(own)
            row |= shares_of_time(clock, run.all_sum(lengths.sum()).item(), 1)
            run.log(step + 1, row, show=("loss", *judged, "length", "eos_rate", "grad_norm"))
        if (step + 1) % config.sample_every == 0 or step + 1 == config.steps:
            batch.show(run)
        # What is saved changes here alone: a run that is stopped on the way begins the step anew.
        state["drawn"] += config.rollout_batch
        state["cost"] = means.get("cost", 0.0)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
