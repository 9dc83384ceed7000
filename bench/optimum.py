"""Do PPO and DPO reach the optimum? A task so small that the answer is known exactly.

Three symbols, replies of at most N tokens, two prompts, a reward table of random numbers. Every reply can be
listed, so

    pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x)          (Rafailov et al. 2023, eq. 4)

and the distance of a trained policy to it, total variation averaged over the prompts, are exact. ppo.py and
dpo.py run as they are, by their own flags.

    python bench/optimum.py        every KL estimator in both places, and DPO: bench/optimum.png, in 3 minutes
                                   on 2 cores
"""
import contextlib
import copy
import functools
import io
import itertools
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo  # noqa: E402
import ppo  # noqa: E402
from data import encode_prompt, pad_rows  # noqa: E402
from formats.model_folder import save_model  # noqa: E402
from formats.tokenizer import Tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plumbing.disk import folder_of  # noqa: E402
from plumbing.flags import Natural, parse_flags  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from report import pyplot  # noqa: E402

SYMBOLS = "abc"
PROMPTS = ("a", "b")
PPO = ("--rollout-batch 512 --steps 150 --minibatches 2 --lr 3e-3 --critic-lr 3e-3 --lr-schedule linear "
       "--critic-lr-schedule constant --value-clip 0 --missing-eos subtract --missing-eos-penalty 0 "
       "--log-every 1000 --sample-every 100000")
DPO = "--val-fraction 0 --steps 50 --batch-tokens 100000 --lr 5e-3 --warmup 5 --log-every 1000"


@functools.cache
def entry(prompt, reply):
    """One number of the reward table, standard normal over all prompts and replies."""
    return float(np.random.default_rng([7, *f"{prompt}>{reply}".encode()]).normal())


def reward(prompts, replies):
    """The reward table as a --reward-fn."""
    return [entry(prompt, reply) for prompt, reply in zip(prompts, replies)]


# ---------------------------------------------------------------------------------------------------------
# What is known exactly

def replies_of(tokenizer, length):
    """Every reply there is, as lists of ids.

    They are all strings of tokens, control tokens too, that end in the end token or reach the length.
    """
    others = [token for token in range(tokenizer.n_vocab) if token != tokenizer.eos]
    replies = []
    for n in range(length):
        for y in itertools.product(others, repeat=n):
            replies.append([*y, tokenizer.eos])
    for y in itertools.product(others, repeat=length):
        replies.append(list(y))
    return replies


def texts_of(tokenizer, length):
    """The replies that a preference file can hold: all texts of 1 to length symbols, with the end token."""
    replies = []
    for n in range(1, length + 1):
        for y in itertools.product(SYMBOLS, repeat=n):
            replies.append(tokenizer.encode("".join(y)) + [tokenizer.eos])
    return replies


@torch.no_grad()
def log_probabilities(model, tokenizer, replies):
    """log pi(y|x) of replies (lists of ids) to each prompt (prompts, replies).

    It is a plain log-softmax in float64.
    """
    model = copy.deepcopy(model).double().eval()
    result = []
    for text in PROMPTS:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        ids, lengths = pad_rows([prompt + y for y in replies], tokenizer.pad)  # (N, T)
        logprobs = model.logits(model.transformer(ids)).log_softmax(-1)  # (N, T, V)
        # The state at one token predicts the next: those before the replies' tokens, R at most.
        predicted = logprobs[:, len(prompt) - 1:-1]  # (N, R, V)
        drawn = ids[:, len(prompt):, None]  # (N, R, 1)
        chosen = predicted.gather(2, drawn).squeeze(2)  # (N, R)
        inside = torch.arange(len(prompt), ids.shape[1]) < lengths[:, None]  # (N, R)
        result.append((chosen * inside).sum(1))
    return torch.stack(result)


def optimum(reference, tokenizer, replies, beta):
    """pi* over replies to each prompt (prompts, replies)."""
    texts = [tokenizer.decode(y) for y in replies]
    rewards = [reward([prompt] * len(texts), texts) for prompt in PROMPTS]
    table = torch.tensor(rewards, dtype=torch.float64)
    return (log_probabilities(reference, tokenizer, replies) + table / beta).softmax(1)


def distance(policy, tokenizer, replies, best):
    """Total variation between a policy and pi*, averaged over the prompts.

    Both are taken over these replies alone. best: pi* (prompts, replies).
    """
    probabilities = log_probabilities(policy, tokenizer, replies).softmax(1)
    variation = (probabilities - best).abs().sum(1) / 2  # (prompts,)
    return variation.mean().item()


# ---------------------------------------------------------------------------------------------------------
# Training

def write_reference(folder, length, seed=0):
    """Write a random GPT that is far from uniform.

    Returns it and its tokenizer, of three symbols and the control tokens.
    """
    vocabulary = {symbol.encode(): i for i, symbol in enumerate(SYMBOLS)}
    tokenizer = Tokenizer("tiny", r"[\s\S]", vocabulary)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(tokenizer.n_vocab, 4 + length, 1, 2, 2, 32))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(4 if "wte" in name else 10)
    save_model(folder, model, tokenizer)
    return model, tokenizer


def write_pairs(path, tokenizer, length, times, seed=0):
    """Write all pairs of texts for each prompt, `times` each.

    They are labelled by Bradley-Terry: P(w preferred to l) = sigma(r(w) - r(l)). The expected share of a
    pair's labels is the right way round (to one in `times`, which is drawn), so that what DPO should reach is
    the optimum of the table and not that of one sample from it.
    """
    rng = np.random.default_rng(seed)
    texts = [tokenizer.decode(y) for y in texts_of(tokenizer, length)]
    rows = []
    for prompt, (a, b) in itertools.product(PROMPTS, itertools.combinations(texts, 2)):
        expected = times / (1 + np.exp(entry(prompt, b) - entry(prompt, a)))
        wins = int(expected) + (rng.random() < expected % 1)
        rows += [{"prompt": prompt, "chosen": a, "rejected": b}] * wins
        rows += [{"prompt": prompt, "chosen": b, "rejected": a}] * (times - wins)
    write_lines(path, rows)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def curve(script, folder, length, beta, flags="", every=1000):
    """Train with ppo or dpo (the module) in a new folder.

    Returns ([step], [distance to pi*]), measured at every save.
    """
    reference, tokenizer = write_reference(folder / "reference", length)
    data = folder / "data.jsonl"
    if script is ppo:
        replies = replies_of(tokenizer, length)
        write_lines(data, [{"prompt": prompt} for prompt in PROMPTS])
        own = (f"{PPO} --reward-fn bench.optimum:reward --kl-coef {beta} "
               f"--max-new-tokens {length} {flags}")
    else:
        replies = texts_of(tokenizer, length)
        write_pairs(data, tokenizer, length, times=40)
        own = f"{DPO} --beta {beta} {flags}"
    best = optimum(reference, tokenizer, replies, beta)
    distances = [distance(reference, tokenizer, replies, best)]
    common = (f"--model {folder}/reference --data {data} --out {folder}/{script.__name__} --threads 1 "
              f"--save-every {every}")
    config = parse_flags(script.Config, "", shlex.split(f"{common} {own}"))

    def measure(out, policy, tokenizer, flags):
        distances.append(distance(policy, tokenizer, replies, best))

    with mock.patch.object(script, "save_model", measure), contextlib.redirect_stdout(io.StringIO()):
        script.main(config)
    steps = [*range(0, config.steps, every), config.steps]
    return steps, distances


# ---------------------------------------------------------------------------------------------------------
# The picture

@dataclass
class Config:
    out: str = "bench/optimum.png"  # where the picture goes
    threads: Natural = 1  # CPU threads
    debug: bool = False  # show the traceback of an error


class Method(NamedTuple):
    """A line of the picture, and what it takes."""
    name: str
    script: ModuleType
    beta: float
    flags: str
    every: int  # steps between measurements
    style: dict  # of the line


METHODS = (
    Method("PPO, k1 in the reward", ppo, 0.5, "--kl k1", 10, {"color": "C0", "ls": "-", "lw": 2}),
    Method("PPO, k2 in the reward", ppo, 0.5, "--kl k2", 10, {"color": "C1", "ls": "-", "lw": 1.2}),
    Method("PPO, k3 in the reward", ppo, 0.5, "--kl k3", 10, {"color": "C2", "ls": "-", "lw": 1.2}),
    Method("PPO, k1 in the loss", ppo, 0.5, "--kl k1 --kl-in loss --whiten none", 10,
           {"color": "C0", "ls": "--", "lw": 1.2}),
    Method("PPO, k2 in the loss", ppo, 0.5, "--kl k2 --kl-in loss --whiten none", 10,
           {"color": "C1", "ls": "--", "lw": 1.2}),
    Method("PPO, k3 in the loss", ppo, 0.5, "--kl k3 --kl-in loss --whiten none", 10,
           {"color": "C2", "ls": "--", "lw": 1.2}),
    Method("DPO", dpo, 1.0, "", 5, {"color": "k", "ls": ":", "lw": 1.2}),
)
TITLES = {1: "replies of one token", 2: "replies of up to two tokens"}


def main(config):
    # If it is missing, that is said now.
    plt = pyplot()
    folder_of(config.out)
    torch.set_num_threads(config.threads)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True, sharey=True)
    print(f"total variation to pi* at the end{'':12}{'1 token':>16}{'1 to 2 tokens':>16}")
    ends = {}
    for axes, (length, title) in zip(panels, TITLES.items()):
        for method in METHODS:
            with tempfile.TemporaryDirectory() as folder:
                steps, distances = curve(method.script, Path(folder), length, method.beta, method.flags,
                                         method.every)
            axes.plot(steps, distances, label=method.name, **method.style)
            if length == 1:
                ends[method.name] = distances[-1]
            else:
                print(f"  {method.name:42}{ends[method.name]:16.4f}{distances[-1]:16.4f}", flush=True)
        axes.axhline(0.02, color="k", lw=0.6)
        axes.set(yscale="log", xlabel="rollouts (DPO: optimiser steps)", title=title)
    panels[0].set_ylabel("total variation to the optimum")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(config.out, dpi=110)
    print(f"picture: {config.out}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
