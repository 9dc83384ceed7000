"""Compare checkpoints on held-out prompts: sample one reply each, score it, and count wins against the first model.

    python evaluate.py --models runs/sft runs/ppo runs/dpo --out runs/evaluation.json              toy task, gold judge
    python evaluate.py --models runs/sft runs/dpo --data rows.json --reward runs/reward            any prompts

win, tie and loss compare the gold score (toy) or else the reward model's score of two replies to the same prompt;
the win rate counts ties half. kl is the mean over replies of the summed log pi - log ref, in nats, where ref is the
first model. Replies are sampled at temperature 1 unless you say otherwise.
"""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import toy
from checkpoint import load_model
from data import by_length, drop_long
from formats import read_rows, split_by_prompt
from model import GPT, ScalarModel, generate, last_scores
from flags import Count, Fraction, Natural, NonNegative, Seed, require
from hardware import autocast, pick_device, pick_dtype
from runtime import run_script
from saving import folder_of, write_json
from tokenizer import encode_prompt


@dataclass
class Config:
    models: list[str] = field(default_factory=list)  # checkpoint folders; the first is the reference
    data: str = "toy"  # toy, or files whose prompts are used, as for ppo.py
    reward: str = ""  # checkpoint folder of a reward model to score with (toy has its gold judge)
    out: str = ""  # JSON file for the results, samples included
    val_fraction: Fraction = 0.0  # of a file: only the prompts that training with this --val-fraction held out, 0 for all
    part: str = ""  # of a file: one part of it, as in training (2/4/4:3)
    max_length: Natural = 0  # leave out prompts longer than this less --max-new-tokens, tokens; 0: the models' context
    prompts: Natural = 0  # prompts to use at most, evenly spread, 0 for all
    max_new_tokens: Count = 40  # longest reply, tokens
    temperature: NonNegative = 1.0  # of sampling; 0 takes the likeliest token (the KL is then taken at temperature 1)
    batch: Count = 256  # replies sampled at once
    micro_batch_tokens: Count = 16384  # tokens per scoring pass
    seed: Seed = 0  # seed of the sampling, and of the toy task's split: take the one of the training
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto takes the first of cuda, mps, cpu that works
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    allow_pickle: bool = False  # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    debug: bool = False  # show the traceback of an error


@torch.no_grad()
def answer(model, reference, reward, tokenizer, prompts, config, device):
    """One reply per prompt (lists of ids). Returns texts, and per reply (numpy): ended, length, kl, score (or None)."""
    texts, rows = [], []
    generator = torch.Generator(device).manual_seed(config.seed)
    for start in range(0, len(prompts), config.batch):
        got = generate(model, prompts[start:start + config.batch], config.max_new_tokens, tokenizer, config.temperature, generator=generator)
        texts += got.texts(tokenizer)
        lengths, mask = got.lengths.cpu(), got.mask.cpu()
        size = lengths.tolist()
        kl, score = (torch.zeros(len(size), device=device) for _ in range(2))
        for piece in by_length(range(len(size)), size, config.micro_batch_tokens):
            rows_here, T = torch.tensor(piece).to(device, non_blocking=True), max(size[i] for i in piece)
            ids, part_mask = got.ids[rows_here, :T], mask[piece, :T]
            temperature = config.temperature or 1.0
            kl[rows_here] = (model(ids, part_mask, temperature)[0] - reference(ids, part_mask, temperature)[0]).sum(1)
            if reward is not None:
                score[rows_here] = last_scores(reward, ids, lengths[piece])
        rows.append(torch.stack([got.ended.float(), got.mask.sum(1).float(), kl, score], 1).cpu())
    ended, length, kl, score = torch.cat(rows).numpy().T
    return texts, ended, length, kl, score if reward is not None else None


def compare(values, baseline):
    """Shares of prompts on which values beat, equal and fall behind baseline (arrays of one score per prompt).

    Scores within 1e-4 tie: a reply's score depends that much on the batch it was padded with.
    """
    wins, losses = float(np.mean(values > baseline + 1e-4)), float(np.mean(values < baseline - 1e-4))
    ties = max(0.0, 1.0 - wins - losses)
    return {"wins": wins, "ties": ties, "losses": losses, "win_rate": wins + ties / 2}


def main(config):
    require(config.models, "--models: name one checkpoint folder or more")
    if config.out:
        require(not Path(config.out).is_dir(), f"--out {config.out} is a folder; name a .json file")
        folder_of(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    loaded = [load_model(folder, GPT, allow_pickle=config.allow_pickle) for folder in config.models]
    models, tokenizer = [model.to(device).eval() for model, _ in loaded], loaded[0][1]
    dtype = pick_dtype(config.dtype, device, models[0].config.n_embd)
    reward = None
    if config.reward:
        reward, reward_tokenizer = load_model(config.reward, ScalarModel, allow_pickle=config.allow_pickle)
        reward = reward.to(device).eval()
        loaded.append((reward, reward_tokenizer))
    for (_, other), folder in zip(loaded, config.models + [config.reward]):
        require(other.same_as(tokenizer), f"{folder} has another tokenizer than {config.models[0]}")
    world = toy.World(config.seed) if config.data == "toy" else None
    require(world or reward is not None, "--data without gold scores needs --reward to score with")

    rows = world.prompts("heldout") if world else read_rows(config.data, "prompts", part=config.part)
    if config.val_fraction and not world:
        rows = split_by_prompt(rows, config.val_fraction)[1]
    context = min(model.config.block_size for model, _ in loaded)
    context = min(config.max_length or context, context) - config.max_new_tokens
    prompts = [(row.text, encode_prompt(tokenizer, row.prompt)) for row in rows]
    require(context > 0, f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in the models' context")
    require(prompts, f"--val-fraction {config.val_fraction} holds out no prompt of {config.data}")
    prompts = drop_long(prompts, [len(ids) for _, ids in prompts], context)
    if 0 < config.prompts < len(prompts):
        prompts = [prompts[i * len(prompts) // config.prompts] for i in range(config.prompts)]

    results, replies = {}, {}
    for folder, model in zip(config.models, models):
        with autocast(device, dtype):
            texts, ended, length, kl, score = answer(model, models[0], reward, tokenizer, [ids for _, ids in prompts], config, device)
        scores = {}
        if world:
            scores["gold"] = np.array([world.gold(p, text, bool(e)) for (p, _), text, e in zip(prompts, texts, ended)])
        if reward is not None:
            scores["score"] = score
        judged = next(iter(scores.values()))
        if not results:  # the first model is the one to beat
            baseline = judged
        result = {"prompts": len(prompts), **{name: float(np.mean(v)) for name, v in scores.items()}}
        result |= {"standard_error": float(np.std(judged) / len(judged) ** 0.5), **compare(judged, baseline),
                   "kl": float(np.mean(kl)), "length": float(np.mean(length)), "eos_rate": float(np.mean(ended))}
        results[folder] = result
        replies[folder] = [{"prompt": p, "reply": text, "score": float(s)} for (p, _), text, s in zip(prompts, texts, judged)]

    names = ["gold"] * bool(world) + ["score"] * (reward is not None) + ["wins", "ties", "losses", "win_rate", "kl", "length", "eos_rate"]
    print(f"{len(prompts)} prompts, temperature {config.temperature:g}; wins, ties and losses against {config.models[0]}")
    print(f"{'':24}" + "".join(f"{name:>10}" for name in names))
    for folder, result in results.items():
        print(f"{Path(folder).name[:23]:24}" + "".join(f"{result[name]:10.3f}" for name in names))
    if config.out:
        write_json(config.out, {"results": results, "replies": replies})


if __name__ == "__main__":
    run_script(main, Config, __doc__)
