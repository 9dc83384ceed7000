"""Do PPO and DPO reach the optimum? A task so small that the answer is known exactly.

Three symbols, replies of at most N tokens, two prompts, a reward table of random numbers. Every reply can be listed, so

    pi*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x)          (Rafailov et al. 2023, eq. 4)

and the distance of a trained policy to it are exact: total variation, averaged over the prompts. ppo.py and dpo.py
run as they are, from their own flags.

    python bench/optimum.py          every KL estimator in both places, and DPO: docs/optimum.png in {minutes} minutes on 2 cores
"""
import functools
import itertools
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Tokenizer, encode_prompt, pad_rows  # noqa: E402
from model import GPT, GPTConfig, load_model, save_model  # noqa: E402

SYMBOLS, PROMPTS = "abc", ("a", "b")
REWARD_FN = "bench.optimum:reward"


@functools.cache
def entry(prompt, reply):
    """One number of the reward table, standard normal over all prompts and replies."""
    return float(np.random.default_rng([7, *f"{prompt}>{reply}".encode()]).normal())


def reward(prompts, replies):
    """The reward table as a --reward-fn."""
    return [entry(prompt, reply) for prompt, reply in zip(prompts, replies)]


def start(folder, length, seed=0):
    """Write the reference, a random GPT that is far from uniform, and the prompts. Returns their paths."""
    tokenizer = Tokenizer("tiny", r"[\s\S]", {symbol.encode(): i for i, symbol in enumerate(SYMBOLS)})
    torch.manual_seed(seed)
    model = GPT(GPTConfig(tokenizer.n_vocab, 4 + length, 1, 2, 2, 32))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.mul_(4 if "wte" in name else 10)
    save_model(folder / "reference", model, tokenizer)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return folder / "reference", folder / "prompts.jsonl"


def replies_of(tokenizer, length):
    """Every reply there is: all strings of tokens, control tokens too, that end in the end token or reach the length."""
    others = [token for token in range(tokenizer.n_vocab) if token != tokenizer.eos]
    ended = [[*y, tokenizer.eos] for n in range(length) for y in itertools.product(others, repeat=n)]
    return ended + [list(y) for y in itertools.product(others, repeat=length)]


@torch.no_grad()
def log_probabilities(folder, replies):
    """Exact log pi(y|x) of replies (lists of ids) to each prompt (prompts, replies), from plain log-softmax, float64."""
    model, tokenizer = load_model(folder, GPT)
    result = []
    for text in PROMPTS:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        ids, lengths = pad_rows([prompt + y for y in replies], tokenizer.pad)  # (N, T)
        logprobs = model.eval().double().logits(model.transformer(ids)).log_softmax(-1)  # (N, T, V)
        chosen = logprobs[:, len(prompt) - 1:-1].gather(2, ids[:, len(prompt):, None]).squeeze(2)
        inside = torch.arange(len(prompt), ids.shape[1]) < lengths[:, None]
        result.append((chosen * inside).sum(1))
    return torch.stack(result)


def optimum(reference, replies, beta):
    """pi* over the replies to each prompt (prompts, replies)."""
    tokenizer = load_model(reference, GPT)[1]
    texts = [tokenizer.decode(y) for y in replies]
    table = torch.tensor([reward([prompt] * len(texts), texts) for prompt in PROMPTS], dtype=torch.float64)
    return (log_probabilities(reference, replies) + table / beta).softmax(1)


def distance(folder, best, replies):
    """Total variation between a checkpoint's policy and pi*, both taken over these replies alone, averaged over the prompts."""
    policy = log_probabilities(folder, replies).softmax(1)
    return ((policy - best).abs().sum(1) / 2).mean().item()


def texts_of(tokenizer, length):
    """What preference files can hold: every text of 1 to length symbols, with its end token."""
    texts = ["".join(y) for n in range(1, length + 1) for y in itertools.product(SYMBOLS, repeat=n)]
    return [tokenizer.encode(text) + [tokenizer.eos] for text in texts]


def write_rankings(path, tokenizer, length, number, seed=0):
    """Write rankings of all texts for each prompt, from best to worst of reward + Gumbel noise (Plackett-Luce).

    Every pair of such a ranking follows Bradley-Terry: P(w before l) = sigma(r(w) - r(l)).
    """
    rng = np.random.default_rng(seed)
    texts = [tokenizer.decode(y) for y in texts_of(tokenizer, length)]
    with open(path, "w") as f:
        for prompt in PROMPTS:
            noisy = np.array(reward([prompt] * len(texts), texts)) + rng.gumbel(size=(number, len(texts)))
            for ranks in noisy.argsort(1)[:, ::-1].argsort(1):
                f.write(json.dumps({"prompt": prompt, "completions": texts, "ranks": ranks.tolist()}) + "\n")
