"""Do PPO and DPO reach the optimum? A task so small that the answer is known exactly.

Three symbols, replies of at most N tokens, two prompts, a reward table of random numbers. Every reply can be listed, so

    pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x)          (Rafailov et al. 2023, eq. 4)

and the distance of a trained policy to it, total variation averaged over the prompts, are exact. ppo.py and dpo.py run as
they are, by their own flags.

    python bench/optimum.py        every KL estimator in both places, and DPO: bench/optimum.png, in 3 minutes on 2 cores
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
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo  # noqa: E402
import ppo  # noqa: E402
from formats.model_folder import save_model  # noqa: E402
from data import pad_rows  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plumbing.flags import Natural, UserError, parse_flags  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from plumbing.disk import folder_of  # noqa: E402
from formats.tokenizer import Tokenizer  # noqa: E402
from data import encode_prompt  # noqa: E402

SYMBOLS, PROMPTS = "abc", ("a", "b")
PPO = ("--rollout-batch 512 --steps 150 --minibatches 2 --lr 3e-3 --critic-lr 3e-3 --lr-schedule linear --critic-lr-schedule constant --value-clip 0 "
       "--missing-eos subtract --missing-eos-penalty 0 --log-every 1000 --sample-every 100000")
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
    """Every reply there is: all strings of tokens, control tokens too, that end in the end token or reach the length."""
    others = [token for token in range(tokenizer.n_vocab) if token != tokenizer.eos]
    ended = [[*y, tokenizer.eos] for n in range(length) for y in itertools.product(others, repeat=n)]
    return ended + [list(y) for y in itertools.product(others, repeat=length)]


def texts_of(tokenizer, length):
    """The replies that a preference file can hold: all texts of 1 to length symbols, with the end token."""
    texts = ["".join(y) for n in range(1, length + 1) for y in itertools.product(SYMBOLS, repeat=n)]
    return [tokenizer.encode(text) + [tokenizer.eos] for text in texts]


@torch.no_grad()
def log_probabilities(model, tokenizer, replies):
    """log pi(y|x) of replies (lists of ids) to each prompt (prompts, replies): a plain log-softmax in float64."""
    model, result = copy.deepcopy(model).double().eval(), []
    for text in PROMPTS:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        ids, lengths = pad_rows([prompt + y for y in replies], tokenizer.pad)  # (N, T)
        logprobs = model.logits(model.transformer(ids)).log_softmax(-1)  # (N, T, V)
        chosen = logprobs[:, len(prompt) - 1:-1].gather(2, ids[:, len(prompt):, None]).squeeze(2)
        inside = torch.arange(len(prompt), ids.shape[1]) < lengths[:, None]
        result.append((chosen * inside).sum(1))
    return torch.stack(result)


def optimum(reference, tokenizer, replies, beta):
    """pi* over replies to each prompt (prompts, replies)."""
    texts = [tokenizer.decode(y) for y in replies]
    table = torch.tensor([reward([prompt] * len(texts), texts) for prompt in PROMPTS], dtype=torch.float64)
    return (log_probabilities(reference, tokenizer, replies) + table / beta).softmax(1)


def distance(policy, tokenizer, replies, best):
    """Total variation between a policy and pi*, both taken over these replies alone, averaged over the prompts."""
    return ((log_probabilities(policy, tokenizer, replies).softmax(1) - best).abs().sum(1) / 2).mean().item()


# ---------------------------------------------------------------------------------------------------------
# Training

def write_reference(folder, length, seed=0):
    """Write a random GPT that is far from uniform; returns it and its tokenizer (three symbols and the control tokens)."""
    tokenizer = Tokenizer("tiny", r"[\s\S]", {symbol.encode(): i for i, symbol in enumerate(SYMBOLS)})
    torch.manual_seed(seed)
    model = GPT(GPTConfig(tokenizer.n_vocab, 4 + length, 1, 2, 2, 32))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(4 if "wte" in name else 10)
    save_model(folder, model, tokenizer)
    return model, tokenizer


def write_pairs(path, tokenizer, length, times, seed=0):
    """Write all pairs of texts for each prompt, `times` each, labelled by Bradley-Terry: P(w preferred to l) = sigma(r(w) - r(l)).

    The expected share of a pair's labels is the right way round (to one in `times`, which is drawn), so that what DPO should
    reach is the optimum of the table and not that of one sample from it.
    """
    rng = np.random.default_rng(seed)
    texts = [tokenizer.decode(y) for y in texts_of(tokenizer, length)]
    rows = []
    for prompt, (a, b) in itertools.product(PROMPTS, itertools.combinations(texts, 2)):
        expected = times / (1 + np.exp(entry(prompt, b) - entry(prompt, a)))
        wins = int(expected) + (rng.random() < expected % 1)
        rows += [{"prompt": prompt, "chosen": a, "rejected": b}] * wins + [{"prompt": prompt, "chosen": b, "rejected": a}] * (times - wins)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def curve(script, folder, length, beta, flags="", every=1000):
    """Train with ppo or dpo (the module) in a new folder; returns ([step], [distance to pi*]), measured at every save."""
    reference, tokenizer = write_reference(folder / "reference", length)
    if script is ppo:
        replies = replies_of(tokenizer, length)
        (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        flags = f"{PPO} --reward-fn bench.optimum:reward --kl-coef {beta} --max-new-tokens {length} {flags}"
    else:
        replies = texts_of(tokenizer, length)
        write_pairs(folder / "data.jsonl", tokenizer, length, times=40)
        flags = f"{DPO} --beta {beta} {flags}"
    best = optimum(reference, tokenizer, replies, beta)
    distances = [distance(reference, tokenizer, replies, best)]
    words = shlex.split(f"--model {folder}/reference --data {folder}/data.jsonl --out {folder}/{script.__name__} --threads 1 --save-every {every} {flags}")
    config = parse_flags(script.Config, "", words)

    def measure(out, policy, tokenizer, flags):
        distances.append(distance(policy, tokenizer, replies, best))

    with mock.patch.object(script, "save_model", measure), contextlib.redirect_stdout(io.StringIO()):
        script.main(config)
    steps = [*range(0, config.steps, every)]
    return steps + [config.steps], distances


# ---------------------------------------------------------------------------------------------------------
# The picture

@dataclass
class Config:
    out: str = "bench/optimum.png"  # where the picture goes
    threads: Natural = 1  # CPU threads
    debug: bool = False  # show the traceback of an error


RUNS = [("k1 in the reward", "--kl k1"), ("k2 in the reward", "--kl k2"), ("k3 in the reward", "--kl k3"),
        ("k1 in the loss", "--kl k1 --kl-in loss --whiten none"), ("k2 in the loss", "--kl k2 --kl-in loss --whiten none"),
        ("k3 in the loss", "--kl k3 --kl-in loss --whiten none")]


def main(config):
    try:
        import matplotlib
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    folder_of(config.out)
    torch.set_num_threads(config.threads)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True, sharey=True)
    print(f"total variation to pi* at the end{'':12}" + "".join(f"{title:>16}" for title in ("1 token", "1 to 2 tokens")))
    table = {}
    for axes, length in zip(panels, (1, 2)):
        for i, (name, script, beta, flags) in enumerate([(f"PPO, {name}", ppo, 0.5, flags) for name, flags in RUNS] + [("DPO", dpo, 1.0, "")]):
            with tempfile.TemporaryDirectory() as folder:
                steps, distances = curve(script, Path(folder), length, beta, flags, every=10 if script is ppo else 5)
            table.setdefault(name, []).append(distances[-1])
            axes.plot(steps, distances, label=name, color="k" if script is dpo else f"C{i % 3}", ls="-" if i < 3 else "--" if i < 6 else ":",
                      lw=2 if name == "PPO, k1 in the reward" else 1.2)
            if length == 2:
                print(f"  {name:42}" + "".join(f"{value:16.4f}" for value in table[name]), flush=True)
        axes.axhline(0.02, color="k", lw=0.6)
        axes.set(yscale="log", xlabel="rollouts (DPO: optimiser steps)", title=f"replies of {'one token' if length == 1 else 'up to two tokens'}")
    panels[0].set_ylabel("total variation to the optimum")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(config.out, dpi=110)
    print(f"picture: {config.out}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
