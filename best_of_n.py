"""Sample n replies to every prompt, score them, keep the best: rejection sampling, and rounds of it.

    python best_of_n.py --model runs/sft --reward runs/reward --judge toy:gold

writes three files for the other scripts, and summary.json:

    sft.jsonl       the selected replies, for sft.py           prompt, completion
    pairs.jsonl     best against worst, for dpo.py             prompt, chosen, rejected
    rankings.jsonl  all with their ranks, for reward.py        prompt, completions, ranks, scores

--select best keeps each prompt's best reply (rejection sampling: Touvron et al. 2023, section 3.2; RAFT, Dong
et al. 2023), top the best share over all prompts (ReST, Gulcehre et al. 2023), and random one of each prompt
whatever its score: the control, which says what training on that many samples of one's own does by itself.

--process runs/process scores replies by a process reward model (process.py). With it --search steps looks for
a reply step by step: n continuations up to the end of their first step, the best of them by the score so far,
n continuations of that, and so on. Each prompt then has one reply.

Of n replies drawn from ref the best has

    P(reward <= r) = F(r)^n                 F: the distribution of ref's reward
    KL(best of n || ref) <= log n - (n - 1)/n          equal only where no two replies have the same reward

Of equal scores the first sampled is the best, so replies of equal reward share their probability as in ref.
k exact rounds of training on the best of n are the best of n^k.

    python best_of_n.py --reward runs/reward --rounds 3 --train-flags "--epochs 4 --lr 1e-3"
    python best_of_n.py --reward runs/reward --rounds 3 --train dpo --reference fixed

are expert iteration and iterative DPO: --rounds samples, calls sft.py or dpo.py on what was selected, and
samples again with the model that it made (OUT/round_1/model, ...). metrics.jsonl has a row for the model
before the first round and one after each: scores, judges' numbers, length, KL to the first model (the mean of
log pi - log ref over its own replies, one to each prompt, by evaluate.py), the bound on it (best of n alone
has one) and seconds. With --reference reset each round of DPO starts from the last model and refers to it,
and k rounds lead to ref exp(k r / beta) / Z; with fixed it refers to the first one, and all rounds lead to
ref exp(r / beta) / Z (Xiong et al. 2024). Both are the limits for pairs that are labelled by chance,
sigma(r_w - r_l). Best against worst, as here, is certain, and has no limit: --train-flags says when to stop.
--train quality is Quark (Lu et al. 2022): sft.py --quality tokens on the rankings of all rounds so far, which
are sorted anew each time, with the first model as ref. What it makes is sampled as of the best quantile.
--resume leaves out the rounds that are done.

    python best_of_n.py --reward runs/reward --arena runs/ppo runs/dpo --out runs/arena

Arena learning (Luo et al. 2024): on each batch of prompts the policy meets the models of --arena. In each of
n battles per prompt everyone says one reply, and the score decides. Where the policy loses, the winner's
reply goes to sft.jsonl and (winner, policy) to pairs.jsonl; all battles go to rankings.jsonl, from which
reward.py makes the model for ppo.py: the paper's three phases. No code of it was released, so this is ours:
one score in place of a language model that is asked for a verdict and its reasons, all rivals in one battle,
one set of prompts for the three phases (--part cuts it), and only as many rounds as --rounds says. On the
embedded task, against the demo's PPO and DPO, SFT on the battles lost (--n 8, then `--epochs 4 --lr 1e-3`)
takes the gold score from 0.20 to 0.92; DPO on the pairs of a second arena, with that model, to 0.90 (`--steps
60 --lr 1e-4`), but on those of the first at dpo.py's defaults to 0.16: their losers are its replies no more.

Measured on the embedded task (held-out prompts, gold score; from the demo's SFT and reward model, n 16, then
`sft.py --data OUT/sft.jsonl --epochs 8 --lr 1e-3 --warmup 10`; 2026-11-24, 2 cores of an AMD EPYC without
AMX, a minute and a half each; seed 2 on 2026-11-28, an Intel Xeon):

              SFT      best of 16    random control    PPO
    seed 0    0.175    0.875         0.044             0.949
    seed 1    0.089    0.867         0.026             0.913
    seed 2    0.094    0.837         0.137             0.910

A second round (--rounds 2 with those --train-flags) raises the score on the prompts it trains on from 1.36 to
1.42, and not the gold score: 0.91, then 0.89. KL 0.86, then 1.23 nats; bounds 1.84 and 4.55.

Replies that were cut off at --max-new-tokens, or are blank, are worse than any other and in no file: the
readers put an end token behind every reply, and the policy said none there. The files hold text, so what a
reader makes of it may be other tokens than those that were sampled.
"""
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import step_ends
from formats.model_folder import load_model
from formats.rollouts import Recorded
from generate import generate
from judges import (
    check_functions, combined, judge, load_functions, load_process, load_reward_models, models_of, score,
    source_weights, step_rewards)
from model import GPT
from plumbing.disk import digest, folder_of, model_digest, write_atomically, write_json
from plumbing.flags import Count, Fraction, Natural, Positive, Seed, as_list, flag_of, parse_sources, require
from plumbing.hardware import pick_device, pick_dtype
from plumbing.run import Alone, changed_settings, read_state, run_script
from rollout import load_prompts, replay, sample


@dataclass
class Config:
    model: str = "runs/sft"  # checkpoint folder of the policy
    # files whose prompts are used: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/toy/prompts.jsonl"
    reward: list[str] = field(default_factory=list)  # checkpoint folders of reward models to score with
    reward_fn: list[str] = field(default_factory=list)  # Python functions, module:function, as for ppo.py
    # checkpoint folder of a process reward model (process.py), one more source of the score
    process: str = ""
    # score of a reply by it: the product of P(good) of its steps, the least, or that of the last
    process_score: Literal["product", "min", "last"] = "product"
    # of each --reward, then each --reward-fn, then --process (1)
    reward_weights: list[float] = field(default_factory=list)
    # how several --reward become one score: their weighted sum, the mean, the least, or the mean less
    # --pessimism deviations, which trusts less what they disagree on
    reward_combine: Literal["sum", "mean", "min", "pessimistic"] = "sum"
    pessimism: Positive = 1.0  # with --reward-combine pessimistic: deviations
    # functions whose numbers are measured and shown under their names, and decide nothing
    judge: list[str] = field(default_factory=list)
    out: str = "runs/best_of_n"  # folder for the files, or for those of all rounds and metrics.jsonl
    n: Count = 16  # replies to each prompt; with --arena: of each model; with --search steps: of each step
    # of what the n are: whole replies; or continuations up to the end of a step, of which the best by
    # --process goes on, so that each prompt has one reply
    search: Literal["replies", "steps"] = "replies"
    # the best of each prompt; the best share over all; or one of each prompt at random
    select: Literal["best", "top", "random"] = "best"
    top_share: Annotated[float, "> 0", "<= 1"] = 0.0625  # of the replies that --select top keeps
    # checkpoint folders of stronger models, which the policy meets in battles, see above
    arena: list[str] = field(default_factory=list)
    rounds: Natural = 0  # rounds of sampling and training; 0 writes the files and trains nothing
    # what --rounds calls: sft.py, dpo.py, or sft.py --quality tokens on all rounds' replies
    train: Literal["sft", "dpo", "quality"] = "sft"
    # what DPO refers to: the last round's model, or always the first one
    reference: Literal["reset", "fixed"] = "reset"
    # flags for that script, all in one pair of quotes; its defaults are for other data: say --epochs and --lr
    train_flags: str = ""
    # leave out what is done already of the run in --out (or begin it, if there is none)
    resume: bool = False
    # of a file: leave out the prompts that training with this --val-fraction holds out; rounds are measured
    # on those
    val_fraction: Fraction = 0.0
    part: str = ""  # of a file: one part of it, as in training (2/4/4:3)
    skip_bad: bool = False  # leave out rows of --data that can't be read, at most one in a hundred
    # leave out prompts longer than this less --max-new-tokens, tokens; 0: the models' context
    max_length: Natural = 0
    max_new_tokens: Count = 40  # longest reply, tokens
    temperature: Positive = 1.0  # of sampling; the KL is taken at it
    batch: Count = 32  # prompts answered at once, --n replies each
    micro_batch_tokens: Count = 16384  # tokens per scoring pass
    seed: Seed = 0  # seed of the sampling, of --select random and of the training
    # auto takes the first of cuda, mps, cpu that works
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    allow_pickle: bool = False
    debug: bool = False  # show the traceback of an error


ROOT = Path(__file__).resolve().parent
# Flags that all scripts have, those that evaluate.py has too, and all of sampling.
MACHINE = ("seed", "device", "dtype", "threads", "allow_pickle")
SHARED = ("data", "reward", "reward_fn", "process", "process_score", "reward_weights", "reward_combine",
          "pessimism", "judge", "val_fraction", "part", "skip_bad", "max_length", "max_new_tokens",
          "temperature", "micro_batch_tokens")
SAMPLING = (*SHARED, *MACHINE, "n", "search", "select", "top_share", "arena", "batch")
# What --rounds itself says to the training script.
GIVEN = ("--model", "--data", "--out", "--reference", "--resume", "--overwrite")


class Samples(NamedTuple):
    """N groups of n replies that are compared with each other: those to one prompt, or those of a battle."""
    rows: list  # of Row (N,), the prompts
    texts: np.ndarray  # (N, n) of str
    usable: np.ndarray  # (N, n) bool: not blank, and not cut off, so that it may stand in a file
    numbers: dict  # {name: (N, n)} of the judges, the score and the length (tokens)


# ---------------------------------------------------------------------------------------------------------
# Which replies

def select(scores, usable, kind, share, rng):
    """Which replies to keep of scores (N, n) -> (N, n) bool.

    usable (N, n) bool: those that may be kept. best and random keep one of each group that has one; top a
    share of all usable ones, and at least one; battles the winner's of those groups whose first reply, the
    policy's, loses. Of equal scores the first is the best.
    """
    kept = np.zeros(scores.shape, bool)
    if kind == "top":
        order = np.argsort(-np.where(usable, scores, -np.inf), axis=None, kind="stable")
        count = round(share * usable.sum())
        kept.flat[order[:max(1, count)]] = True
        return kept & usable
    if kind == "random":
        scores = rng.random(scores.shape)
    elif kind not in ("best", "battles"):
        raise ValueError(f"unknown selection {kind}")
    winner = np.where(usable, scores, -np.inf).argmax(1)  # (N,)
    kept[np.arange(len(kept)), winner] = True
    if kind == "battles":
        kept[:, 0] = False
    return kept & usable


def kl_bound(n):
    """The most that KL(best of n || ref) can be, nats: what it is where no two replies score the same."""
    return math.log(n) - (n - 1) / n


def same_for_the_same(texts, usable, scores):
    """Scores (N, n) in which a reply that its group has twice has its first score twice.

    texts (N, n); usable (N, n) bool: the same text, cut off, is another reply. A reward model's score depends
    a little on the batch that a reply was padded with, and that is no preference.
    """
    result = scores.copy()
    for own, *replies in zip(result, texts, usable):
        first = {}
        for i, reply in enumerate(zip(*replies)):
            own[i] = first.setdefault(reply, own[i])
    return result


# ---------------------------------------------------------------------------------------------------------
# Files

def rows_to_write(samples, chosen, arena):
    """{name of a file: its rows}. chosen (N, n) bool: the selected replies."""
    scores = samples.numbers["score"]
    usable = samples.usable
    best = np.where(usable, scores, -np.inf).argmax(1)  # (N,)
    worst = np.where(usable, scores, np.inf).argmin(1)  # (N,)
    if arena:
        # The policy's own reply.
        worst = np.zeros_like(best)
    files = {"sft": [], "rankings": [], "pairs": []}
    for group, row in enumerate(samples.rows):
        texts = samples.texts[group]
        own = scores[group]
        # As the readers take it: text, or turns where there are several.
        prompt = row.text if len(row.prompt) == 1 else row.prompt
        for text in texts[chosen[group]]:
            files["sft"].append({"prompt": prompt, "completion": text})
        some = usable[group]
        if some.sum() > 1:
            # As in sports: how many are better.
            ranks = (own[some][:, None] < own[some]).sum(1).tolist()
            # Scores, unlike ranks, can be compared with those of other prompts.
            files["rankings"].append({"prompt": prompt, "completions": texts[some].tolist(), "ranks": ranks,
                                      "scores": own[some].tolist()})
        high, low = best[group], worst[group]
        if some[high] and some[low] and own[high] > own[low]:
            files["pairs"].append({"prompt": prompt, "chosen": texts[high], "rejected": texts[low]})
    return files


def summary_of(samples, chosen, files, config):
    """What summary.json says. chosen (N, n) bool: the selected replies."""
    scores = samples.numbers["score"]
    tied = [len(set(own)) < len(own) for own in scores]
    exact = config.select == "best" and config.search == "replies" and not config.arena
    lost = (scores > scores[:, :1]).mean(0)  # (n,)
    result = {
        "groups": len(scores),
        "groups_with_ties": float(np.mean(tied)),
        "unusable": float(1 - samples.usable.mean()),
        "rows": {name: len(rows) for name, rows in files.items()},
        "lost_to": dict(zip(config.arena, lost[1:].tolist())),
        "kl_bound": kl_bound(config.n) if exact else None,
        "all": {},
        "selected": {},
    }
    for name, values in samples.numbers.items():
        own = values[:, 0] if config.arena else values
        result["all"][name] = float(own.mean())
        result["selected"][name] = float(values[chosen].mean()) if chosen.any() else None
    return result


def aligned(rows):
    """Rows {name: text, number or None} as lines below their names."""
    lines = ["".join(f"{name:>12}" for name in rows[0])]
    for row in rows:
        cells = []
        for value in row.values():
            text = "" if value is None else value
            cells.append(f"{value:12.3f}" if isinstance(value, float) else f"{text:>12}")
        lines.append("".join(cells))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Sampling

def sample_all(alone, models, tokenizer, prompts, facts_of, config, process):
    """Samples: --n replies of each model, the policy first, to each [Prompt]; with --search steps one.

    facts_of(rollout) -> {name: (B,)}: texts, usable, and numbers. process: of --process, or None.
    """
    arena = len(models) > 1
    by_step = config.search == "steps"
    # One column for each reply to a prompt or, in the arena, for each model.
    columns = 1 if by_step else config.n
    if arena:
        columns = len(models)
    generator = torch.Generator(alone.device).manual_seed(config.seed)
    parts = {}  # {name: [(groups, columns) of a batch]}
    for start in tqdm(range(0, len(prompts), config.batch), desc="sampling", disable=None):
        asked = prompts[start:start + config.batch]
        facts = []  # of each model
        for model in models:
            if by_step:
                batch = search_steps(alone, model, tokenizer, asked, process, generator, config)
            else:
                batch = sample(alone, model, tokenizer, asked, config.max_new_tokens, config.temperature,
                               generator, per_prompt=config.n)
            facts.append(facts_of(batch))
        for name in facts[0]:
            values = np.stack([own[name] for own in facts], -1)  # (prompts * n, models)
            parts.setdefault(name, []).append(values.reshape(-1, columns))
    numbers = {name: np.concatenate(found) for name, found in parts.items()}
    texts = numbers.pop("texts")
    usable = numbers.pop("usable")
    numbers["score"] = same_for_the_same(texts, usable, numbers["score"])
    each = config.n if arena else 1  # groups of a prompt
    rows = [prompt.row for prompt in prompts for _ in range(each)]
    return Samples(rows, texts, usable, numbers)


def search_steps(alone, model, tokenizer, asked, process, generator, config):
    """The `Rollout` of one reply to each [Prompt], found step by step.

    Behind each prompt, and then behind what is kept, n continuations are sampled and cut behind their first
    step; the one with the best process score so far is kept (of equal ones the first), until it has ended or
    is --max-new-tokens long.
    """
    kept = [[] for _ in asked]  # ids of the replies so far
    going = list(range(len(asked)))
    while going:
        questions, limits = [], []
        for i in going:
            questions += [asked[i].ids + kept[i]] * config.n
            limits += [config.max_new_tokens - len(kept[i])] * config.n
        with alone.autocast():
            got = generate(model, questions, limits, tokenizer, config.temperature, generator=generator)
        candidates = []
        for number, (ids, length) in enumerate(zip(got.ids.tolist(), got.lengths.tolist())):
            i = going[number // config.n]
            reply = ids[len(asked[i].ids):length]
            ends = step_ends(tokenizer, reply, process.separator)
            end = next(end for end in ends if end >= len(kept[i]))
            candidates.append(reply[:end + 1])
        batch = rollout_of(alone, tokenizer, [asked[i] for i in going for _ in range(config.n)], candidates)
        plan, = batch.plan(alone, [list(range(len(candidates)))], config.micro_batch_tokens)
        scores = step_rewards(alone, process, batch, plan).changes.sum(1)  # (going * n,)
        best = scores.view(-1, config.n).argmax(1).tolist()
        for place, i in enumerate(going):
            kept[i] = candidates[place * config.n + best[place]]
        going = [i for i in going
                 if kept[i][-1] not in tokenizer.stops and len(kept[i]) < config.max_new_tokens]
    return rollout_of(alone, tokenizer, asked, kept)


def rollout_of(alone, tokenizer, prompts, replies):
    """The `Rollout` of a reply, ids, to each [Prompt]."""
    recorded = [[Recorded("", prompt.row, prompt.ids, ids, [0.0] * len(ids))]
                for prompt, ids in zip(prompts, replies)]
    return replay(alone, tokenizer, prompts, recorded)


def load_and_sample(config):
    """Samples of --model, and of the models of --arena."""
    sources = config.reward + config.reward_fn + as_list(config.process)
    weights = torch.tensor(source_weights(config, sources))
    functions = load_functions("--reward-fn", config.reward_fn)
    judges = load_functions("--judge", config.judge)
    models = []
    tokenizer = None  # of the policy, and so of all
    for folder in (config.model, *config.arena):
        model, other = load_model(folder, GPT, allow_pickle=config.allow_pickle)
        tokenizer = tokenizer or other
        require(other.same_as(tokenizer), f"{folder} has another tokenizer than {config.model}")
        models.append(model)
    reward_models = load_reward_models(config.reward, tokenizer, config.model, config.allow_pickle)
    process = load_process(config, tokenizer)
    networks = models + reward_models + models_of(process)
    device = pick_device(config.device)
    for network in networks:
        network.to(device).eval()
    alone = Alone(device, pick_dtype(config.dtype, device, models[0].config.n_embd))
    context = min(network.config.block_size for network in networks)
    prompts = load_prompts(config, tokenizer, context, alone.say)
    check_functions(functions + judges, [prompt.row for prompt in prompts], alone.say)

    def facts_of(batch):
        plan, = batch.plan(alone, [list(range(len(batch.texts)))], config.micro_batch_tokens)
        steps = step_rewards(alone, process, batch, plan)
        source_scores = score(alone, reward_models, functions, batch, plan, steps).cpu()  # (sources, B)
        judged = [judge(function, batch) for function in judges]
        for source, values in zip(sources + config.judge, [*source_scores, *judged]):
            require(values.isfinite().all(), f"{source} gave a reply a score that is not finite")
        blank = torch.tensor([not text.strip() for text in batch.texts])
        return {
            "texts": np.array(batch.texts, dtype=object),
            "usable": batch.ended.cpu() & ~blank,
            **{function.name: values for function, values in zip(judges, judged)},
            "score": combined(source_scores, weights, config),
            "length": batch.host_mask.sum(1).float(),
        }

    return sample_all(alone, models, tokenizer, prompts, facts_of, config, process)


def one_round(config, out):
    """Sample, select, and write the files to a folder; or see that they are those that it has."""
    inputs = {"data": [digest(file for file, _ in parse_sources(config.data))]}
    for flag in ("model", "reward", "process", "arena"):
        inputs[flag] = [model_digest(folder) for folder in as_list(getattr(config, flag))]
    path = out / "summary.json"
    if path.exists():
        changed = changed_settings(config, inputs, read_state(path))
        require(not changed,
                f"--resume: since {out} was written, {'; '.join(changed.values())}; name another --out")
        print(f"{out}: this is done")
        return
    samples = load_and_sample(config)
    require(samples.usable.any(), f"every reply is blank or beyond --max-new-tokens {config.max_new_tokens}")
    kind = "battles" if config.arena else config.select
    rng = np.random.default_rng(config.seed)
    chosen = select(samples.numbers["score"], samples.usable, kind, config.top_share, rng)
    files = rows_to_write(samples, chosen, bool(config.arena))
    summary = summary_of(samples, chosen, files, config)
    # The summary comes last: where it is, all are.
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(out / f"{name}.jsonl", text.encode())
    write_json(path, summary | {"config": asdict(config), "inputs_sha256": inputs})
    print(aligned([{"replies": which} | summary[which] for which in ("all", "selected")]))
    print(f"{out}: rows {summary['rows']}; {summary['groups_with_ties']:.0%} of the groups have ties")


# ---------------------------------------------------------------------------------------------------------
# Rounds

def flags_of(config, names):
    """The flags that say what these fields of config say, for another script."""
    words = []
    for name in names:
        value = getattr(config, name)
        if value:
            words.append(flag_of(name))
            words += [] if value is True else as_list(value)
    return words


def call(script, *words):
    """Run one of the scripts in a process of its own."""
    print(f"== {script}", flush=True)
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    # In a session of its own Ctrl-C reaches it through us, once: it saves, and --resume goes on from there.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    # What went wrong it has said itself.
    if code:
        sys.exit(code)


def row_after(config, rounds, policy):
    """A row of metrics.jsonl: what evaluate.py says of a policy after so many rounds."""
    path = Path(config.out) / f"round_{rounds}" / "evaluation.json"
    # Each model once: before the first round the policy is the first one.
    models = dict.fromkeys((config.model, policy))
    call("evaluate.py", "--models", *models, "--out", path, *flags_of(config, (*SHARED, *MACHINE)))
    result = json.loads(path.read_text())["results"][policy]
    judges = [spec.partition(":")[2] for spec in config.judge]
    names = (*judges, "score", "win_rate", "kl", "length", "eos_rate")
    row = {"round": rounds} | {name: result[name] for name in names}
    exact = config.select == "best" and config.search == "replies" and config.train == "sft"
    exact = exact and not config.arena
    return row | {"kl_bound": kl_bound(config.n**rounds) if exact else None}


def all_rounds(config, out):
    """Rounds of sampling and training, and rows of metrics.jsonl: before the first one and after each.

    All of it by scripts, which know themselves with --resume what they have done already.
    """
    quality = config.train == "quality"
    script = "sft.py" if quality else f"{config.train}.py"
    given = [*flags_of(config, MACHINE), *config.train_flags.split(), "--resume"]
    if quality:
        given += ["--quality", "tokens"]
    if config.reference == "fixed" or quality:
        given += ["--reference", config.model]
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    policy = config.model
    for number in range(config.rounds + 1):
        began = time.time()
        folder = out / f"round_{number}"
        if number:
            # The seed of a round's samples is its own.
            seed = (config.seed * 1009 + number) % 1_000_001
            call("best_of_n.py", "--model", policy, "--out", folder, "--resume",
                 *flags_of(config, SAMPLING), "--seed", seed)
            file = {"sft": "sft.jsonl", "dpo": "pairs.jsonl", "quality": "rankings.jsonl"}[config.train]
            data = folder / file
            if quality:
                data = ",".join(str(out / f"round_{k}" / file) for k in range(1, number + 1))
            call(script, "--model", policy, "--data", data, "--out", folder / "model", *given)
            policy = str(folder / "model")
        if number == len(rows):
            row = row_after(config, number, policy)
            rows.append(row | {"seconds": time.time() - began})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(path, text.encode())
    print(aligned(rows))


def check(config, out):
    """UserError unless the flags go together and --out may be written to."""
    require(os.environ.get("WORLD_SIZE", "1") == "1", "best_of_n.py is one process: leave out torchrun")
    require(config.reward or config.reward_fn or config.process,
            "name what to score with: --reward, --reward-fn or --process")
    require(config.search == "replies" or config.process and config.select == "best"
            and config.train == "sft" and not config.arena,
            "--search steps goes by --process, and leaves one reply to each prompt: not with --select, "
            "--arena, --train dpo or --train quality")
    require(not config.arena or config.select == "best", "--arena has a selection of its own, not --select")
    require(config.rounds or not config.train_flags, "--train-flags is for --rounds")
    require(config.train == "dpo" or config.reference == "reset", "--reference fixed is for --train dpo")
    for word in config.train_flags.split():
        flag = word.partition("=")[0]
        require(flag not in GIVEN, f"--train-flags: {flag} is what best_of_n.py itself says")
    require(not out.is_file(), f"--out {out} is a file; name a folder")
    there = (out / "summary.json").exists() or (out / "round_0").exists()
    require(config.resume or not there, f"--out {out} already holds samples: add --resume, or name another")
    folder_of(out / "summary.json")


def main(config):
    out = Path(config.out)
    check(config, out)
    # SIGTERM is as Ctrl-C: nothing is left half-written, and a script that was called is told.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if config.threads:
        torch.set_num_threads(config.threads)
    work = all_rounds if config.rounds else one_round
    work(config, out)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
