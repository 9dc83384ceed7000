"""Compare checkpoints on held-out prompts: sample one reply each, score it, and count wins against the first model.

    python evaluate.py --models runs/sft runs/ppo runs/dpo --out runs/evaluation.json              toy task, gold judge
    python evaluate.py --models runs/sft runs/dpo --data rows.json --reward runs/reward            any prompts
    python evaluate.py --models runs/sft runs/ppo --data rows.json --reward-fn mine:right

The score is a reward model's, that of a Python function, or a weighted sum of several, as in ppo.py. win,
tie and loss compare the gold score (toy) or else that score of two replies to one prompt; the win rate counts
ties half. kl is the mean over replies of the summed log pi - log ref, in nats, where ref is the first model.
Replies are sampled at temperature 1 unless you say otherwise.
"""
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import toy
from formats.model_folder import load_model
from plumbing.ranks import by_length
from data import drop_long
from formats.sources import read_rows, split_by_prompt
from judges import check_functions, reward_function, short_names
from model import GPT, ScalarModel, last_scores
from generate import generate
from plumbing.flags import Count, Fraction, Natural, NonNegative, Seed, require
from plumbing.hardware import autocast, pick_device, pick_dtype
from plumbing.run import run_script
from plumbing.disk import folder_of, write_json
from data import encode_prompt


@dataclass
class Config:
    models: list[str] = field(default_factory=list)  # checkpoint folders; the first is the reference
    data: str = "toy"  # toy, or files whose prompts are used, as for ppo.py
    reward: list[str] = field(default_factory=list)  # checkpoint folders of reward models to score with
    reward_fn: list[str] = field(default_factory=list)  # Python functions, module:function, as for ppo.py
    reward_weights: list[float] = field(default_factory=list)  # of each --reward, then each --reward-fn (1)
    out: str = ""  # JSON file for the results, samples included
    val_fraction: Fraction = 0.0  # of a file: only the prompts that training with this --val-fraction held out, 0 for all
    part: str = ""  # of a file: one part of it, as in training (2/4/4:3)
    skip_bad: bool = False  # leave out rows of --data that can't be read, at most one in a hundred
    max_length: Natural = 0  # leave out prompts longer than this less --max-new-tokens, tokens; 0: the models' context
    prompts: Natural = 0  # prompts to use at most, evenly spread, 0 for all
    max_new_tokens: Count = 40  # longest reply, tokens
    temperature: NonNegative = 1.0  # of sampling; 0 takes the likeliest token, and there is no kl then
    batch: Count = 256  # replies sampled at once
    micro_batch_tokens: Count = 16384  # tokens per scoring pass
    seed: Seed = 0  # seed of the sampling, and of the toy task's split: take the one of the training
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto takes the first of cuda, mps, cpu that works
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    allow_pickle: bool = False  # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    debug: bool = False  # show the traceback of an error


@torch.no_grad()
def answer(model, reference, reward_models, tokenizer, prompts, config, device):
    """One reply per prompt (lists of ids). Returns texts, and numpy arrays (N,): ended, length, kl, [scores].

    scores: an array for each reward model. At temperature 0 a reply is no sample, so there is no KL: kl is 0.
    """
    texts, rows = [], []
    generator = torch.Generator(device).manual_seed(config.seed)
    for start in range(0, len(prompts), config.batch):
        got = generate(model, prompts[start:start + config.batch], config.max_new_tokens, tokenizer, config.temperature, generator=generator)
        texts += got.texts(tokenizer)
        lengths, mask = got.lengths.cpu(), got.mask.cpu()
        size = lengths.tolist()
        kl = torch.zeros(len(size), device=device)
        scores = torch.zeros(len(reward_models), len(size), device=device)
        for piece in by_length(range(len(size)), size, config.micro_batch_tokens):
            rows_here, T = torch.tensor(piece).to(device, non_blocking=True), max(size[i] for i in piece)
            ids, part_mask = got.ids[rows_here, :T], mask[piece, :T]
            if config.temperature > 0:
                logprobs = model(ids, part_mask, config.temperature)[0]
                ref_logprobs = reference(ids, part_mask, config.temperature)[0]
                kl[rows_here] = (logprobs - ref_logprobs).sum(1)
            for source, reward_model in enumerate(reward_models):
                scores[source, rows_here] = last_scores(reward_model, ids, lengths[piece])
        rows.append(torch.stack([got.ended.float(), got.mask.sum(1).float(), kl, *scores], 1).cpu())
    ended, length, kl, *scores = torch.cat(rows).numpy().T
    return texts, ended, length, kl, scores


def compare(values, baseline):
    """Shares of prompts on which values beat, equal and fall behind baseline (arrays of one score per prompt).

    Scores within 1e-4 tie: a reply's score depends that much on the batch it was padded with.
    """
    wins, losses = float(np.mean(values > baseline + 1e-4)), float(np.mean(values < baseline - 1e-4))
    ties = max(0.0, 1.0 - wins - losses)
    return {"wins": wins, "ties": ties, "losses": losses, "win_rate": wins + ties / 2}


def main(config):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    require(processes == 1, f"evaluate.py is one process, not {processes}: start it without torchrun")
    require(config.models, "--models: name one checkpoint folder or more")
    places = [Path(folder).resolve() for folder in config.models]
    for folder, place in zip(config.models, places):
        require(places.count(place) == 1, f"--models names {folder} twice")
    if config.out:
        require(not Path(config.out).is_dir(), f"--out {config.out} is a folder; name a .json file")
        folder_of(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)

    # what judges: the toy task's own judge, reward models, functions
    world = toy.World(config.seed) if config.data == "toy" else None
    require(not (world and config.part), "--part is for files, not for the toy task")
    sources, weights = config.reward + config.reward_fn, config.reward_weights
    require(world or sources, "--data without gold scores needs --reward or --reward-fn to score with")
    require(len(weights) in (0, len(sources)),
            f"{len(weights)} --reward-weights for {len(sources)} rewards ({', '.join(sources)})")
    require(all(map(math.isfinite, weights)), "--reward-weights must be finite numbers")
    weights = np.array(weights or [1.0] * len(sources))
    functions = [reward_function(spec, device) for spec in config.reward_fn]

    # the models
    loaded = [load_model(folder, GPT, allow_pickle=config.allow_pickle) for folder in config.models]
    loaded += [load_model(folder, ScalarModel, allow_pickle=config.allow_pickle) for folder in config.reward]
    tokenizer = loaded[0][1]
    for (network, other), folder in zip(loaded, config.models + config.reward):
        require(other.same_as(tokenizer), f"{folder} has another tokenizer than {config.models[0]}")
        network.to(device).eval()
    networks = [network for network, _ in loaded]
    models, reward_models = networks[:len(config.models)], networks[len(config.models):]
    dtype = pick_dtype(config.dtype, device, models[0].config.n_embd)

    # the prompts
    if world:
        rows = world.prompts("heldout")
    else:
        rows = read_rows(config.data, "prompts", part=config.part, skip_bad=config.skip_bad)
    if config.val_fraction and not world:
        rows = split_by_prompt(rows, config.val_fraction)[1]
    context = min(network.config.block_size for network in networks)
    context = min(config.max_length or context, context) - config.max_new_tokens
    require(context > 0, f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in the models' context")
    require(rows, f"--val-fraction {config.val_fraction} holds out no prompt of {config.data}")
    prompts = [(row, encode_prompt(tokenizer, row.prompt)) for row in rows]
    prompts = drop_long(prompts, [len(ids) for _, ids in prompts], context)
    if 0 < config.prompts < len(prompts):
        prompts = [prompts[i * len(prompts) // config.prompts] for i in range(config.prompts)]
    check_functions(config.reward_fn, functions, [row for row, _ in prompts], print)
    questions, answers = [row.text for row, _ in prompts], [row.answer for row, _ in prompts]

    results, replies = {}, {}
    for folder, model in zip(config.models, models):
        with autocast(device, dtype):
            texts, ended, length, kl, parts = answer(model, models[0], reward_models, tokenizer,
                                                     [ids for _, ids in prompts], config, device)
        parts += [function(questions, texts, answers).cpu().numpy() for function in functions]
        for source, part in zip(sources, parts):
            require(np.isfinite(part).all(), f"{source} gave a reply of {folder} a score that is not finite")
        scores = {}
        if world:
            gold = [world.gold(*reply) for reply in zip(questions, texts, map(bool, ended))]
            scores["gold"] = np.array(gold)
        if sources:
            scores["score"] = weights @ np.stack(parts)
        judged = next(iter(scores.values()))
        if not results:  # the first model is the one to beat
            baseline = judged
        result = {"prompts": len(prompts), **{name: float(np.mean(v)) for name, v in scores.items()}}
        if len(sources) > 1:
            result["scores"] = {name: float(np.mean(part)) for name, part in zip(short_names(sources), parts)}
        result |= {"standard_error": float(np.std(judged) / len(judged) ** 0.5), **compare(judged, baseline)}
        result["kl"] = float(np.mean(kl)) if config.temperature > 0 else None
        result |= {"length": float(np.mean(length)), "eos_rate": float(np.mean(ended))}
        results[folder] = result
        replies[folder] = [{"prompt": question, "reply": text, "score": float(score)}
                           for question, text, score in zip(questions, texts, judged)]

    if config.out:
        write_json(config.out, {"results": results, "replies": replies})
    print(f"{len(prompts)} prompts, temperature {config.temperature:g}; "
          f"wins, ties and losses against {config.models[0]}")
    print(table(short_names(config.models), list(results.values())))


def table(labels, results):
    """The results of models, one a line below the names of the columns; blank where there is no number."""
    rows = []
    for result in results:
        rows.append(result | {f"score_{name}": score for name, score in result.get("scores", {}).items()})
    names = [name for name in ("gold", "score") if name in rows[0]]
    names += [name for name in rows[0] if name.startswith("score_")]
    names += ["wins", "ties", "losses", "win_rate", "kl", "length", "eos_rate"]
    first = max(24, *(len(label) + 1 for label in labels))
    lines = [" " * first, *(label.ljust(first) for label in labels)]
    for name in names:
        cells = [name, *("" if row[name] is None else f"{row[name]:.3f}" for row in rows)]
        width = max(10, len(name) + 2)
        lines = [line + cell.rjust(width) for line, cell in zip(lines, cells)]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
