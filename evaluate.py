"""Compare checkpoints on held-out prompts: sample a reply each, score it, count wins against the first.

    python evaluate.py --models runs/sft runs/ppo runs/dpo --judge toy:gold --out runs/evaluation.json
    python evaluate.py --models runs/sft runs/dpo --data rows.json --reward runs/reward        any prompts
    python evaluate.py --models runs/sft runs/ppo --data rows.json --judge mine:right
    python evaluate.py --models runs/sft --data rows.json --judge mine:right --samples 16 --pass-k 1 8
    python evaluate.py --models runs/sft --reward runs/reward --preferences heldout.jsonl --out agreement.json

The score is a reward model's, that of a Python function, or a weighted sum of several, as in ppo.py; a
judge's number stands beside it, under the function's name. win, tie and loss compare the first judge's
numbers, or else the scores, of two replies to one prompt; the win rate counts ties half. standard_error is
that of the first number, over prompts: twice it to both sides is a 95 % interval. kl is the mean over replies
of the summed log pi - log ref, in nats, where ref is the first model. Replies are sampled at temperature 1
unless you say otherwise.

With --samples S there are S replies to a prompt, and win, tie and loss compare their means. pass@k, for each
k of --pass-k, is the probability that at least one of k replies to a prompt is right, estimated without bias
from the S (Chen et al. 2021, eq. 1).

With --preferences nothing is sampled: the reward models are measured on what people said of the replies in
that file, whatever reward.py reads, RewardBench's rows too; agreement.py says how. The first of --models, if
one is named, adds the accuracy of a language model's log-probability.

Legend: N prompts, S replies to each, M = N S replies.
"""
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from agreement import agreement, described, draw, language_baselines, score_replies
from data import encode_groups
from formats.model_folder import load_model
from formats.sources import read_rows, split_by_prompt
from judges import (
    check_functions, combined, judge, load_functions, load_process, load_reward_models, load_tool, models_of,
    score, short_names, source_weights, step_rewards)
from model import GPT, ScalarModel
from plumbing.disk import folder_of, write_json
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, Seed, as_list, require
from plumbing.hardware import pick_device, pick_dtype
from plumbing.run import Alone, run_script
from rollout import load_prompts, sample


@dataclass
class Config:
    models: list[str] = field(default_factory=list)  # checkpoint folders; the first is the reference
    data: str = "runs/toy/prompts_heldout.jsonl"  # files whose prompts are used, as for ppo.py
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
    # functions whose numbers stand beside the score, under their names; the first decides who wins
    judge: list[str] = field(default_factory=list)
    # files of preferences and other feedback, as for reward.py: measure --reward on them, and sample nothing
    preferences: str = ""
    out: str = ""  # JSON file for the results, samples included; with --preferences also a picture, .png
    # of a file: only the prompts that training with this --val-fraction held out, 0 for all
    val_fraction: Fraction = 0.0
    part: str = ""  # of a file: one part of it, as in training (2/4/4:3)
    skip_bad: bool = False  # leave out rows of --data that can't be read, at most one in a hundred
    # leave out prompts longer than this less --max-new-tokens, tokens; 0: the models' context
    max_length: Natural = 0
    prompts: Natural = 0  # prompts to use at most, evenly spread, 0 for all
    samples: Count = 1  # replies to each prompt
    # for each of these k: the probability that of k replies at least one is right, pass@k. A reply is right
    # whose number by the first judge, or else whose score, is above a half
    pass_k: list[int] = field(default_factory=list)
    max_new_tokens: Count = 40  # longest reply, tokens; with --tool of all turns together, the tool's too
    tool: str = ""  # a function that answers replies for a conversation of several turns, as for grpo.py
    turns: Count = 8  # with --tool: the most replies of a model in a conversation
    temperature: NonNegative = 1.0  # of sampling; 0 takes the likeliest token, and there is no kl then
    batch: Count = 256  # replies sampled at once
    micro_batch_tokens: Count = 16384  # tokens per scoring pass
    seed: Seed = 0  # seed of the sampling
    # auto takes the first of cuda, mps, cpu that works
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    allow_pickle: bool = False
    debug: bool = False  # show the traceback of an error


@torch.no_grad()
def answer(alone, model, reference, reward_models, functions, judges, tokenizer, prompts, config, tool=None,
           process=None):
    """--samples replies to each [Prompt]; those to one prompt are neighbours. tool: of --tool; process: of
    --process.

    Returns M texts, and numpy arrays: ended, length, kl (M,), scores (sources, M), judged (judges, M).
    At temperature 0 a reply is no sample, so there is no KL: kl is 0.
    """
    texts = []
    columns = []
    generator = torch.Generator(alone.device).manual_seed(config.seed)
    # Prompts at once.
    at_once = config.batch // config.samples
    for start in range(0, len(prompts), at_once):
        asked = prompts[start:start + at_once]
        batch = sample(
            alone, model, tokenizer, asked, config.max_new_tokens, config.temperature, generator,
            per_prompt=config.samples, tool=tool)
        texts += batch.texts
        everyone = list(range(len(batch.texts)))
        plan, = batch.plan(alone, [everyone], config.micro_batch_tokens)
        # The first model is its own reference, so its own is 0.
        kl = torch.zeros(len(everyone), device=alone.device)
        if config.temperature > 0 and model is not reference:
            for part in batch.passes(alone, plan):
                with alone.autocast():
                    logprobs = model(part.ids, part.where, config.temperature)[0]  # (n, W)
                    ref_logprobs = reference(part.ids, part.where, config.temperature)[0]
                kl[part.rows] = (logprobs - ref_logprobs).sum(1)
        steps = step_rewards(alone, process, batch, plan)
        scores = score(alone, reward_models, functions, batch, plan, steps)
        judged = [judge(function, batch)[None] for function in judges]
        length = batch.mask.sum(1)
        facts = torch.stack([batch.ended.float(), length.float(), kl])
        columns.append(torch.cat([facts.cpu(), scores.cpu(), *judged]))
    ended, length, kl, *rest = torch.cat(columns, 1).numpy()
    sources = len(reward_models) + len(functions) + (process is not None)
    scores = np.array(rest[:sources])
    judged = np.array(rest[sources:])
    return texts, ended, length, kl, scores, judged


def by_prompt(numbers, samples):
    """Means (N,) of numbers (M,) over the replies to each prompt."""
    return numbers.reshape(-1, samples).mean(1)


def pass_at(rights, k):
    """Share of prompts of which one of k replies is right, from the right ones of S replies each (N, S) bool.

    Of S replies, c of them right, C(S - c, k) of the C(S, k) choices of k hold no right one.
    """
    samples = rights.shape[1]
    shares = []
    for count in rights.sum(1).tolist():
        failing = math.comb(samples - count, k) / math.comb(samples, k)
        shares.append(1 - failing)
    return float(np.mean(shares))


def compare(values, baseline):
    """Shares of prompts on which values beat, equal and fall behind baseline (arrays: one score per prompt).

    Scores within 1e-4 tie: a reply's score depends that much on the batch it was padded with.
    """
    wins = float(np.mean(values > baseline + 1e-4))
    losses = float(np.mean(values < baseline - 1e-4))
    ties = max(0.0, 1.0 - wins - losses)
    return {"wins": wins, "ties": ties, "losses": losses, "win_rate": wins + ties / 2}


def summary(config, sources, columns, source_scores, ended, length, kl, baseline):
    """One model's results, {name: number}.

    columns: {name: numbers (M,)}, of the judges and of the score. The first is compared with baseline (N,).
    """
    first = next(iter(columns.values()))
    compared = by_prompt(first, config.samples)
    result = {"prompts": len(compared)}
    for name, numbers in columns.items():
        result[name] = float(np.mean(numbers))
    if len(sources) > 1:
        result["scores"] = {}
        for name, numbers in zip(short_names(sources), source_scores):
            result["scores"][name] = float(np.mean(numbers))
    rights = first.reshape(-1, config.samples) > 0.5
    for k in config.pass_k:
        result[f"pass@{k}"] = pass_at(rights, k)
    # Replies to one prompt are alike, so it is prompts that are counted.
    error = np.std(compared) / len(compared) ** 0.5
    result["standard_error"] = float(error)
    result |= compare(compared, baseline)
    result["kl"] = float(np.mean(kl)) if config.temperature > 0 else None
    result["length"] = float(np.mean(length))
    result["eos_rate"] = float(np.mean(ended))
    return result


def measure_agreement(config, device):
    """What --preferences asks for: {folder: result of `agreement`}, of several also of their score."""
    require(config.reward, "--preferences measures reward models: name one or more with --reward")
    require(not config.reward_fn and not config.judge,
            "--preferences measures reward models alone: leave out --reward-fn and --judge")
    weights = np.array(source_weights(config, config.reward))
    named = config.models[0] if config.models else config.reward[0]
    language_model, tokenizer = load_model(named, GPT if config.models else ScalarModel,
                                           allow_pickle=config.allow_pickle)
    reward_models = load_reward_models(config.reward, tokenizer, named, config.allow_pickle)
    networks = [language_model, *reward_models]
    for network in networks:
        network.to(device).eval()
    alone = Alone(device, pick_dtype(config.dtype, device, reward_models[0].config.n_embd))

    rows = read_rows(config.preferences, "feedback", alone.say, config.part, config.skip_bad)
    if config.val_fraction > 0:
        rows = split_by_prompt(rows, config.val_fraction)[1]
        require(rows, f"--val-fraction {config.val_fraction} holds out none of the rows of --preferences")
    context = min(network.config.block_size for network in networks)
    limit = min(config.max_length or context, context)
    groups = encode_groups(tokenizer, rows, limit, alone.say)
    rows = [group.row for group in groups]
    examples = [group.examples for group in groups]
    budget, pad = config.micro_batch_tokens, tokenizer.pad
    baselines = {}
    if config.models:
        baselines = language_baselines(alone, language_model, examples, budget, pad)
    scores = [score_replies(alone, model, examples, budget, pad) for model in reward_models]
    for folder, own in zip(config.reward, scores):
        require(np.isfinite(own).all(), f"{folder} gave a reply a score that is not finite")
    columns = dict(zip(short_names(config.reward), scores))
    if len(scores) > 1:
        columns[config.reward_combine] = combined(np.array(scores), weights, config)
    return {name: agreement(own, rows, baselines) for name, own in columns.items()}


def tell_agreement(config, results):
    """Print, write and draw what `measure_agreement` found; of several the picture shows the score of all."""
    for name, result in results.items():
        print(f"{name}:")
        for line in described(result):
            print(f"  {line}")
    if config.out:
        write_json(config.out, {"agreement": results})
        draw(result, Path(config.out).with_suffix(".png"), print)


def main(config):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    require(processes == 1, f"evaluate.py is one process, not {processes}: start it without torchrun")
    require(config.models or config.preferences, "--models: name one checkpoint folder or more")
    places = [Path(folder).resolve() for folder in config.models]
    for folder, place in zip(config.models, places):
        require(places.count(place) == 1, f"--models names {folder} twice")
    if config.out:
        require(not Path(config.out).is_dir(), f"--out {config.out} is a folder; name a .json file")
        folder_of(config.out)
    require(config.samples <= config.batch,
            f"--samples {config.samples}: all replies to a prompt are sampled at once, but --batch is "
            f"{config.batch}")
    require(config.samples == 1 or config.temperature > 0,
            f"--samples {config.samples} are all the same at --temperature 0")
    for k in config.pass_k:
        require(1 <= k <= config.samples,
                f"--pass-k {k} must be 1 or more, and takes as many --samples, of which there are "
                f"{config.samples}")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    if config.preferences:
        tell_agreement(config, measure_agreement(config, device))
        return

    # What judges: reward models and functions.
    sources = config.reward + config.reward_fn + as_list(config.process)
    require(sources or config.judge, "name what to judge with: --judge, --reward, --reward-fn or --process")
    require(not config.process or not config.tool,
            "--process judges the steps of one reply: it doesn't go with --tool")
    weights = np.array(source_weights(config, sources))
    functions = load_functions("--reward-fn", config.reward_fn)
    judges = load_functions("--judge", config.judge)

    # The models.
    models = []
    tokenizer = None  # of the first, and so of all
    for folder in config.models:
        model, other = load_model(folder, GPT, allow_pickle=config.allow_pickle)
        tokenizer = tokenizer or other
        require(other.same_as(tokenizer), f"{folder} has another tokenizer than {config.models[0]}")
        models.append(model)
    reward_models = load_reward_models(config.reward, tokenizer, config.models[0], config.allow_pickle)
    process = load_process(config, tokenizer)
    networks = models + reward_models + models_of(process)
    for network in networks:
        network.to(device).eval()
    dtype = pick_dtype(config.dtype, device, models[0].config.n_embd)
    alone = Alone(device, dtype)

    # The prompts, and from them as many as are asked for, evenly spread.
    context = min(network.config.block_size for network in networks)
    prompts = load_prompts(config, tokenizer, context, alone.say, held_out=True)
    if 0 < config.prompts < len(prompts):
        chosen = [i * len(prompts) // config.prompts for i in range(config.prompts)]
        prompts = [prompts[i] for i in chosen]
    check_functions(functions + judges, [prompt.row for prompt in prompts], alone.say)
    tool = load_tool(config, tokenizer, prompts, alone.say)

    results = {}
    replies = {}
    baseline = None
    for folder, model in zip(config.models, models):
        texts, ended, length, kl, source_scores, judged = answer(
            alone, model, models[0], reward_models, functions, judges, tokenizer, prompts, config, tool,
            process)
        for source, numbers in zip(sources + config.judge, [*source_scores, *judged]):
            require(np.isfinite(numbers).all(),
                    f"{source} gave a reply of {folder} a score that is not finite")
        columns = {}
        for function, numbers in zip(judges, judged):
            columns[function.name] = numbers
        if sources:
            columns["score"] = combined(source_scores, weights, config)
        # The first column is compared, and the first model is the one to beat.
        first = next(iter(columns.values()))
        if baseline is None:
            baseline = by_prompt(first, config.samples)
        results[folder] = summary(
            config, sources, columns, source_scores, ended, length, kl, baseline)
        replies[folder] = []
        repeated = [prompt for prompt in prompts for _ in range(config.samples)]
        for prompt, text, number in zip(repeated, texts, first):
            reply = {"prompt": prompt.row.text, "reply": text, "score": float(number)}
            replies[folder].append(reply)

    if config.out:
        write_json(config.out, {"results": results, "replies": replies})
    replies_each = f", {config.samples} replies to each" if config.samples > 1 else ""
    print(f"{len(prompts)} prompts{replies_each}, temperature {config.temperature:g}; "
          f"wins, ties and losses against {config.models[0]}")
    labels = short_names(config.models)
    judge_names = [function.name for function in judges]
    print(table(labels, list(results.values()), judge_names))


def table(labels, results, judges):
    """The results of models, one a line below the names of the columns; blank where there is no number."""
    rows = []
    for result in results:
        row = dict(result)
        for name, number in result.get("scores", {}).items():
            row[f"score_{name}"] = number
        rows.append(row)
    names = [name for name in (*judges, "score") if name in rows[0]]
    names.insert(1, "standard_error")
    names += [name for name in rows[0] if name.startswith(("score_", "pass@"))]
    names += ["wins", "ties", "losses", "win_rate", "kl", "length", "eos_rate"]

    first = 24
    for label in labels:
        first = max(first, len(label) + 1)
    lines = [" " * first]
    for label in labels:
        lines.append(label.ljust(first))
    for name in names:
        cells = [name]
        for row in rows:
            cells.append("" if row[name] is None else f"{row[name]:.3f}")
        width = max(10, len(name) + 2)
        lines = [line + cell.rjust(width) for line, cell in zip(lines, cells)]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
