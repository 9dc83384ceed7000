"""How fast are the scripts beside others that do the same work, and how far from what the machine can do?

    bash run.sh bench                                  all of it, in float32; run.sh makes the environment
                                                       with the peers
    python bench/bench.py sft dpo --dtype bfloat16     two of it, where transformers and TRL are there already
    python bench/bench.py nanogpt                      needs PyTorch alone

    sft                      TRL 1.16's SFTTrainer       8 rows of 256 tokens, every token trained
    nanogpt                  nanoGPT's training step     the same rows: all logits, clipping, AdamW as a loop,
                                                         the same --dtype
    reward                   TRL 1.16's RewardTrainer    8 pairs of 256 tokens
    dpo                      TRL 1.16's DPOTrainer       4 pairs, prompt and reply 128 tokens each, the
                                                         reference's part computed before
    ppo                      TRL 1.12's PPOTrainer       16 episodes, prompt and reply 64 tokens each, 4
                                                         updates: a whole step
    grpo                     TRL 1.16's GRPOTrainer      4 prompts of 64 tokens, 4 replies of 64 to each, one
                                                         update by GRPO's loss, no KL: a whole step
    generate16, generate64   transformers' generate      16 or 64 prompts of 64 tokens, 128 new ones each
    samples8                 its num_return_sequences    8 prompts of 192 tokens, 8 replies of 64 to each

The model is a GPT-2 of 6 layers and width 384 with 50,257 tokens, random weights, one folder that both sides
open; it never draws an end token. Ours runs the script's own main(), stopped before every step; a peer's own
train() is stopped by a callback. Where something had to be chosen for a peer, it was what is faster: no
gradient checkpointing, SDPA, no end token to look for, nothing reported, saved or evaluated. Peers compute in
float32 (but nanogpt's). A trainer's lap leaves out the loading and logging between its steps; ours has them.

The two sides are processes that live at the same time and take turns (ours, peer, ours, ...), so that what
drifts hits both. A lap counts if others took less than a tenth of the machine meanwhile; else it is done
again, three times --laps at most. The first lap of each is warm-up.
    ours, peer           work per second: of the median lap; with --rows, whose laps differ, all work over all
                         time (pairs: of average length)
    peak_mb              most memory resident from the warm-up on, Python and libraries included
    fraction_of_limit    the least time that our work could take on this machine, see `least_seconds`, over
                         the time it took
    padding              share of the positions that went through a side's trunk which hold padding
"""
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.memory import forget, peak  # noqa: E402
from data import encode_demonstration, encode_group, encode_prompt, encode_text  # noqa: E402
from formats.model_folder import load_model, save_model  # noqa: E402
from formats.sources import read_rows  # noqa: E402
from formats.tokenizer import Tokenizer  # noqa: E402
from generate import generate  # noqa: E402
from model import GPT, GPTConfig, ScalarModel, Transformer, layouts  # noqa: E402
from plumbing.disk import folder_of  # noqa: E402
from plumbing.flags import Count, NonNegative, parse_flags, require  # noqa: E402
from plumbing.hardware import autocast  # noqa: E402
from plumbing.run import Run, run_script  # noqa: E402


class Task(NamedTuple):
    size: int  # rows, pairs or prompts of a lap
    unit: str
    peer: str
    rows: str = "prompts"  # what its rows are for formats/rows.py
    # Tokens of a prompt, and of each reply that is drawn to it, in quarters of --tokens.
    prompt: int = 2
    new: int = 0
    samples: int = 1  # replies to a prompt


TASKS = {
    "sft": Task(8, "tokens/s", "TRL SFTTrainer", "demonstrations"),
    "nanogpt": Task(8, "tokens/s", "nanoGPT's step", "demonstrations"),
    "reward": Task(8, "pairs/s", "TRL RewardTrainer", "preferences"),
    "dpo": Task(4, "pairs/s", "TRL DPOTrainer", "preferences"),
    "ppo": Task(16, "episodes/s", "TRL PPOTrainer", prompt=1, new=1),
    "grpo": Task(4, "episodes/s", "TRL GRPOTrainer", prompt=1, new=1, samples=4),
    "generate16": Task(16, "tokens/s", "transformers generate", prompt=1, new=2),
    "generate64": Task(64, "tokens/s", "transformers generate", prompt=1, new=2),
    "samples8": Task(8, "tokens/s", "transformers generate", prompt=3, new=1, samples=8),
}
CONTEXT = 512
EPOCHS = 4  # of ppo
PPO_TRL = "1.12.0"
LR = 1e-8  # the weights stay what they are
NEVER = 1000000  # steps
CPU = torch.device("cpu")


@dataclass
class Config:
    # of our matrix products, and of nanogpt's; the other peers compute in float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    # optimiser steps (ppo, grpo: rollouts with their updates; generate, samples8: calls) measured per side
    laps: Count = 10
    # kept: glibc gives no freed memory back, on both sides (MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_)
    heap: Literal["default", "kept"] = "default"
    # take rows of real lengths, at most 512 tokens, from this file of preferences (GPT-2's tokens), instead
    # of equal ones
    rows: str = ""
    row_count: Count = 64  # how many rows to take from it
    threads: Count = 2  # CPU threads of each side
    # put the table of this call into bench/RESULTS.md, in place of one of the same rows and flags
    write: bool = False
    out: str = ""  # file that the printed lines are appended to
    # sft, reward, dpo, grpo: leave TRL the bfloat16 products and the gradient checkpointing that it comes
    # with
    trl_defaults: bool = False
    # folder that TRL 1.12.0 was installed to (default: trl-1.12.0 in the environment that runs this)
    trl_ppo: str = ""
    # share of the machine's CPU time that others may take during a lap that counts
    others: NonNegative = 0.1
    layers: Count = 6  # of the model
    width: Count = 384  # of the model; heads are 64 wide
    vocabulary: Annotated[int, ">= 261"] = 50257  # tokens of the model
    # of a row; the lengths of prompts and replies follow from it
    tokens: Annotated[int, ">= 32", "<= 512"] = 256
    debug: bool = False  # show the traceback of an error


def new_tokens(what, config):
    """Tokens of each reply that is drawn in a lap, 0 where none is."""
    return config.tokens * TASKS[what].new // 4


def draws_alone(what):
    """Whether nothing is trained."""
    return TASKS[what].peer == "transformers generate"


def places(replies):
    """The reward of grpo: cheap, and never the same for all of a group, whatever random weights say."""
    return [float(i) for i in range(len(replies))]


# ---------------------------------------------------------------------------------------------------------
# What both sides start from

def make_models(folder, config):
    """Write folder/policy and folder/reward, random weights; returns the tokenizer.

    The policy never draws an end token or padding.
    """
    if config.rows:
        tokenizer = Tokenizer.gpt2()
    else:
        tokenizer = Tokenizer("bytes", r"[\s\S]", {bytes([b]): b for b in range(256)})
    config.vocabulary = max(config.vocabulary, tokenizer.n_vocab)
    heads = max(1, config.width // 64)
    shape = GPTConfig(config.vocabulary, CONTEXT, config.layers, heads, heads, config.width)
    for seed, (kind, name) in enumerate(((GPT, "policy"), (ScalarModel, "reward"))):
        torch.manual_seed(seed)
        model = kind(shape)
        if kind is GPT:
            # One direction of the last state is always 1, and those two tokens point the other way.
            trunk = model.transformer
            with torch.no_grad():
                trunk.ln_f.weight[0] = 0.0
                trunk.ln_f.bias[0] = 1.0
                trunk.wte.weight[[tokenizer.eos, tokenizer.pad], 0] = -50.0
        save_model(folder / name, model, tokenizer)
    return tokenizer


def texts_of(what, config, tokenizer):
    """Rows as the scripts read them, for all kinds of files: {text, prompt, chosen, rejected}."""
    if config.rows:
        return real_texts(config, tokenizer)
    return random_texts(what, config)


def random_texts(what, config):
    """Random letters of equal length, a token each."""
    letters = random.Random(0)
    prompt = config.tokens * TASKS[what].prompt // 4
    reply = config.tokens - prompt
    # Less the control tokens.
    lengths = {"text": config.tokens - 2, "prompt": prompt - 2, "chosen": reply - 1, "rejected": reply - 1}
    rows = []
    for _ in range(8 * TASKS[what].size):
        row = {}
        for key, length in lengths.items():
            row[key] = "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=length))
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        rows.append(row)
    return rows


def real_texts(config, tokenizer):
    """A fixed sample of the rows of --rows that fit."""
    found = []
    for row in read_rows(config.rows, "preferences", lambda _: None):
        best = row.replies[row.ranks.index(min(row.ranks))]
        worst = row.replies[row.ranks.index(max(row.ranks))]
        turns = []
        for turn in [*row.prompt, {"role": "assistant", "content": best}]:
            turns.append(f"{turn['role'].capitalize()}: {turn['content']}")
        whole = "\n\n".join(turns)
        lengths = [len(encode_text(tokenizer, whole)[0])]
        lengths += [len(ids) for ids, _ in encode_group(tokenizer, row)]
        prompt = len(encode_prompt(tokenizer, row.prompt))
        if max(lengths) <= CONTEXT and prompt <= CONTEXT // 2 and best != worst:
            found.append({"text": whole, "prompt": row.prompt, "chosen": best, "rejected": worst})
    require(len(found) >= config.row_count,
            f"--rows {config.rows}: {len(found)} rows fit, --row-count asks for {config.row_count}")
    return random.Random(0).sample(found, config.row_count)


# What a file of each kind has in a row.
KEYS = {"demonstrations": ["text"], "preferences": ["prompt", "chosen", "rejected"], "prompts": ["prompt"]}


def write_rows(folder, what, config, tokenizer):
    """Write rows.jsonl, which our script reads, and ids.json, the same as token ids, which it returns.

    That is [{prompt: its length, ids: [sequence, ...]}].
    """
    kind = TASKS[what].rows
    with open(folder / "rows.jsonl", "w") as file:
        for row in texts_of(what, config, tokenizer):
            kept = {key: row[key] for key in KEYS[kind]}
            file.write(json.dumps(kept) + "\n")
    rows = []
    for row in read_rows(folder / "rows.jsonl", kind, lambda _: None):
        if kind == "demonstrations":
            group = [encode_demonstration(tokenizer, row)]
        elif kind == "preferences":
            group = encode_group(tokenizer, row)
        else:
            group = [(encode_prompt(tokenizer, row.prompt), [])]
        ids, mask = group[0]
        rows.append({"prompt": len(ids) - sum(mask), "ids": [ids for ids, _ in group]})
    (folder / "ids.json").write_text(json.dumps(rows))
    return rows


# ---------------------------------------------------------------------------------------------------------
# A side, in its own process

class Job:
    """What a side is to do, and its end of the pipes.

    It waits for its turn, does a lap, and says what came of it.
    """

    def __init__(self, what, folder, config, go, done):
        self.what = what
        self.folder = Path(folder)
        self.config = Config(**json.loads(config))
        self.size = TASKS[what].size
        self.unit = TASKS[what].unit
        self.samples = TASKS[what].samples
        self.new = new_tokens(what, self.config)
        self.models = self.folder.parent / "models"
        self.rows = json.loads((self.folder / "ids.json").read_text())
        # More than there will be laps, so that no run comes to its end.
        self.steps = 3 * self.config.laps + 9
        self.go = os.fdopen(int(go))
        self.done = os.fdopen(int(done), "w")
        self.ready = False
        self.positions = self.padded = 0
        torch.set_num_threads(self.config.threads)

    def count(self, positions, padded):
        """Note what goes through the trunk."""
        self.positions += positions
        self.padded += padded

    def tokens(self, batch):
        """Tokens of some rows, given by their numbers."""
        return sum(len(ids) for i in batch for ids in self.rows[i]["ids"])

    def work(self, tokens):
        """An optimiser step on so many tokens, padding not counted, in units of the task.

        Pairs are those of average length.
        """
        if self.unit == "tokens/s":
            return tokens
        if self.unit == "episodes/s":
            return self.size * self.samples
        per_row = self.tokens(range(len(self.rows))) / len(self.rows)
        return tokens / per_row

    def batches(self):
        """Endless batches of row numbers, in their order."""
        numbers = itertools.cycle(range(len(self.rows)))
        while True:
            yield [next(numbers) for _ in range(self.size)]

    def begin(self):
        if not self.ready:
            # Everything is loaded.
            forget(CPU)
            print("{}", file=self.done, flush=True)
            self.ready = True
        if not self.go.readline():
            # The parent is gone.
            os._exit(0)
        self.positions = self.padded = 0
        self.cpu = time.process_time()
        self.began = time.perf_counter()

    def end(self, work, batch=()):
        """batch: numbers of the rows that the work was done on, where that matters."""
        lap = {
            "seconds": time.perf_counter() - self.began,
            "cpu": time.process_time() - self.cpu,
            "peak": peak(CPU),
            "work": work,
            "positions": self.positions,
            "padded": self.padded,
            "batch": batch,
        }
        print(json.dumps(lap), file=self.done, flush=True)


def ours(job):
    """Laps of our script's main(), or of `generate`."""
    forward = Transformer.forward
    pad = json.loads((job.models / "policy" / "config.json").read_text())["pad_token_id"]

    def counted(self, ids, cache=None, index=None):
        # What the blocks compute, if it isn't all.
        inside = layouts(*ids.shape, index, ids.device)[0].inside
        if inside is None:
            job.count(ids.numel(), int((ids == pad).sum()))
        else:
            job.count(len(inside), 0)
        return forward(self, ids, cache, index)

    with mock.patch.object(Transformer, "forward", counted):
        if draws_alone(job.what):
            our_generate(job)
        else:
            our_script(job)


def our_generate(job):
    model, tokenizer = load_model(job.models / "policy", GPT)
    generator = torch.Generator().manual_seed(0)
    for batch in job.batches():
        prompts = [job.rows[i]["ids"][0] for i in batch for _ in range(job.samples)]
        job.begin()
        with autocast(CPU, getattr(torch, job.config.dtype)):
            drawn = generate(model, prompts, job.new, tokenizer, generator=generator)
        job.end(len(prompts) * job.new, batch)
        require(int(drawn.mask.sum()) == len(prompts) * job.new, "a reply ended early")


def script_flags(job, what):
    """The flags of our script."""
    config = job.config
    flags = (f"--device cpu --dtype {config.dtype} --threads {config.threads} --model {job.models}/policy "
             f"--data {job.folder}/rows.jsonl --micro-batch-tokens 2048 --val-fraction 0 --lr {LR} "
             f"--warmup 1 --steps {job.steps} --out {job.folder}/run")
    if what == "ppo":
        return (f"{flags} --reward {job.models}/reward --rollout-batch {job.size} "
                f"--max-new-tokens {job.new} --epochs {EPOCHS} --minibatches 1 --critic-lr {LR} "
                f"--sample-every {NEVER}")
    if what == "grpo":
        # Every reply is cut off, and keeps its score. As the peer, it has no reference to measure a KL with.
        return (f"{flags} --preset grpo --overlong keep --kl-every 0 --reward-fn {__name__}:places "
                f"--rollout-batch {job.size} --group {job.samples} --max-new-tokens {job.new} "
                f"--sample-every {NEVER}")
    # As many tokens as the peer's batch has on average.
    padded = [len(row["ids"]) * max(map(len, row["ids"])) for row in job.rows]
    tokens = math.ceil(job.size * sum(padded) / len(padded))
    return f"{flags} --batch-tokens {tokens} --eval-every {NEVER}"


def our_script(job):
    what = "sft" if job.what == "nanogpt" else job.what
    script = importlib.import_module(what)
    steps = Run.steps
    # What yields the numbers of rows.
    by_row = what in ("ppo", "grpo")
    draw = script.endless_order if by_row else script.endless_batches
    drawn = []

    def watched_draw(lengths, *args, **named):
        number = lengths if by_row else len(lengths)
        require(number == len(job.rows), f"{what}.py did not take all {len(job.rows)} rows")
        for numbers in draw(lengths, *args, **named):
            drawn.append(numbers)
            yield numbers

    def watched_steps(run, first, total, evaluate=None):
        for step in steps(run, first, total, evaluate):
            job.begin()
            yield step
            if by_row:
                batch = drawn[job.size * step:job.size * (step + 1)]
            else:
                batch = drawn[step]
            job.end(job.work(job.tokens(batch)), batch)

    config = parse_flags(script.Config, "", shlex.split(script_flags(job, what)))
    with (mock.patch.object(Run, "steps", watched_steps),
          mock.patch.object(script, draw.__name__, watched_draw)):
        script.main(config)


class Plain(nn.Module):
    """A GPT-2 as nanoGPT has it: logits of all positions, and their cross-entropy."""

    def __init__(self, vocabulary, layers, width):
        super().__init__()
        self.heads = max(1, width // 64)
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(self.block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    @staticmethod
    def block(width):
        return nn.ModuleDict({
            "norm_1": nn.LayerNorm(width),
            "qkv": nn.Linear(width, 3 * width),
            "project": nn.Linear(width, width),
            "norm_2": nn.LayerNorm(width),
            "up": nn.Linear(width, 4 * width),
            "down": nn.Linear(4 * width, width),
        })

    def attend(self, block, x):
        """x (B, T, C) -> (B, T, C)"""
        parts = block["qkv"](block["norm_1"](x)).chunk(3, -1)  # (B, T, C) each
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, heads, T, D)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return block["project"](mixed.transpose(1, 2).flatten(2))

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))  # (B, T, C)
        for block in self.blocks:
            x = x + self.attend(block, x)
            x = x + block["down"](F.gelu(block["up"](block["norm_2"](x)), approximate="tanh"))
        logits = F.linear(self.norm(x), self.tokens.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def nanogpt(job):
    torch.manual_seed(0)
    model = Plain(job.config.vocabulary, job.config.layers, job.config.width)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    # On a CPU: a loop over the parameters.
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    for batch in job.batches():
        rows = [torch.tensor(job.rows[i]["ids"][0]) for i in batch]
        next_tokens = [F.pad(row[1:], (0, 1), value=-1) for row in rows]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
        targets = nn.utils.rnn.pad_sequence(next_tokens, batch_first=True, padding_value=-1)  # (B, T)
        job.begin()
        with autocast(CPU, getattr(torch, job.config.dtype)):
            loss = model(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(map(len, rows))
        job.count(ids.numel(), ids.numel() - tokens)
        job.end(tokens)


def theirs(job, name):
    """A folder opened by transformers; what goes through its trunk is counted."""
    import transformers
    options = {"attn_implementation": "sdpa", "dtype": torch.float32}
    if name == "policy":
        kind = transformers.AutoModelForCausalLM
    else:
        kind = transformers.AutoModelForSequenceClassification
        options["num_labels"] = 1
    model = kind.from_pretrained(job.models / name, **options)

    def count(module, args, given):
        ids = given["input_ids"] if "input_ids" in given else args[0]
        mask = given.get("attention_mask")
        padded = 0
        if mask is not None:
            # Of a decoding step: the last column.
            padded = int((mask[:, -ids.shape[1]:] == 0).sum())
        job.count(ids.numel(), padded)

    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return model


def their_generate(job):
    model = theirs(job, "policy").eval()
    # Then no time goes into looking for it.
    model.generation_config.eos_token_id = None
    pad_left = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    torch.manual_seed(0)
    for batch in job.batches():
        prompts = [torch.tensor(job.rows[i]["ids"][0]) for i in batch]
        ids = pad_left(prompts)  # (B, T)
        mask = pad_left([torch.ones_like(prompt) for prompt in prompts])  # (B, T)
        job.begin()
        drawn = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=job.new, num_return_sequences=job.samples, use_cache=True,
            pad_token_id=model.config.pad_token_id)
        job.end(len(batch) * job.samples * job.new)
        require(drawn.shape[1] == ids.shape[1] + job.new, "a reply ended early")


def their_trainer(job):
    """A trainer of TRL, stopped before each optimiser step."""
    makers = {"sft": their_sft, "reward": their_reward, "dpo": their_dpo, "ppo": their_ppo,
              "grpo": their_grpo}
    makers[job.what](job).train()


def their_settings(job):
    """What the configurations of all trainers have in common."""
    settings = {
        "output_dir": str(job.folder / "trainer"),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": LR,
        "per_device_train_batch_size": job.size * job.samples,
        "max_steps": job.steps,
    }
    if not job.config.trl_defaults or job.what == "ppo":
        settings |= {"bf16": False, "gradient_checkpointing": False}
    return settings


def given_to_all(job):
    """What all trainers are given."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(job.models / "policy", padding_side="left")
    return {"processing_class": tokenizer, "callbacks": [turns(job)]}


def turns(job):
    """A callback that waits for its turn before each optimiser step.

    The trainer of PPO says only when a step ends, which is where the next one begins.
    """
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            if job.what == "ppo":
                job.begin()

        def on_step_begin(self, *args, **kwargs):
            job.begin()

        def on_step_end(self, *args, **kwargs):
            job.end(job.work(job.positions - job.padded))
            self.on_train_begin()

    return Turns()


def their_sft(job):
    import trl
    from datasets import Dataset
    texts = Dataset.from_dict({"input_ids": [row["ids"][0] for row in job.rows]})
    args = trl.SFTConfig(**their_settings(job))
    return trl.SFTTrainer(theirs(job, "policy"), args, train_dataset=texts, **given_to_all(job))


def their_reward(job):
    import trl
    from datasets import Dataset
    columns = {"chosen_ids": [], "rejected_ids": []}
    for row in job.rows:
        chosen, rejected = row["ids"]
        columns["chosen_ids"].append(chosen)
        columns["rejected_ids"].append(rejected)
    pairs = Dataset.from_dict(columns)
    args = trl.RewardConfig(**their_settings(job))
    return trl.RewardTrainer(theirs(job, "reward"), args, train_dataset=pairs, **given_to_all(job))


def their_dpo(job):
    import trl
    from datasets import Dataset
    columns = {"chosen_ids": [], "rejected_ids": [], "prompt_ids": []}
    for row in job.rows:
        chosen, rejected = row["ids"]
        prompt = row["prompt"]
        columns["chosen_ids"].append(chosen[prompt:])
        columns["rejected_ids"].append(rejected[prompt:])
        columns["prompt_ids"].append(chosen[:prompt])
    pairs = Dataset.from_dict(columns)
    args = trl.DPOConfig(**their_settings(job), precompute_ref_log_probs=True)

    def as_it_is(self, dataset, *_):
        return dataset

    # It takes text alone, and these are ids.
    with mock.patch.object(trl.DPOTrainer, "_prepare_dataset", as_it_is):
        return trl.DPOTrainer(theirs(job, "policy"), None, args, train_dataset=pairs, **given_to_all(job))


def their_ppo(job):
    # Of another version of TRL than the others, see `Side`.
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    prompts = Dataset.from_dict({"input_ids": [row["ids"][0] for row in job.rows]})
    args = PPOConfig(
        **their_settings(job), total_episodes=job.steps * job.size, response_length=job.new,
        num_ppo_epochs=EPOCHS, num_mini_batches=1, local_rollout_forward_batch_size=job.size,
        temperature=1.0, stop_token="eos", num_sample_generations=0)
    return PPOTrainer(
        args, model=theirs(job, "policy"), ref_model=theirs(job, "policy"),
        reward_model=theirs(job, "reward"), value_model=theirs(job, "reward"),
        train_dataset=prompts, **given_to_all(job))


def their_grpo(job):
    import trl
    from datasets import Dataset
    # It takes text alone, and these are ids: the text is the row's number, which is looked up.
    prompts = Dataset.from_dict({"prompt": [str(i) for i in range(len(job.rows))]})
    args = trl.GRPOConfig(
        **their_settings(job), num_generations=job.samples, max_completion_length=job.new, beta=0.0,
        loss_type="grpo", scale_rewards="group", temperature=1.0, top_p=1.0, top_k=0,
        generation_kwargs={"eos_token_id": None})
    policy = theirs(job, "policy")
    # With the above: no time goes into looking for it.
    policy.generation_config.eos_token_id = None

    def reward(completions, **_):
        return places(completions)

    trainer = trl.GRPOTrainer(policy, reward, args, train_dataset=prompts, **given_to_all(job))

    def look_up(numbers):
        # No images, nor anything else.
        return [job.rows[int(number)]["ids"][0] for number in numbers], None, {}

    trainer._tokenize_prompts = look_up
    return trainer


# ---------------------------------------------------------------------------------------------------------
# Turns, in the parent

class Side:
    """One side of a comparison: its process, a pipe to it and one from it, and its laps."""

    def __init__(self, side, what, folder, config):
        self.name = f"{what}, {side}"
        self.log = folder / f"{side}.log"
        self.laps = []
        self.dropped = self.peak = 0
        go, my_go = os.pipe()
        my_done, done = os.pipe()
        settings = json.dumps(dataclasses.asdict(config))
        words = [sys.executable, __file__, "child", side, what, str(folder), settings, str(go), str(done)]
        environment = os.environ | self.variables(side, what, folder, config)
        # A session of its own: Ctrl-C goes to the parent, which ends it.
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                words, env=environment, pass_fds=(go, done), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        os.close(go)
        os.close(done)
        self.go = os.fdopen(my_go, "w")
        self.done = os.fdopen(my_done)

    @staticmethod
    def variables(side, what, folder, config):
        """What its environment has besides ours."""
        found = {
            "OMP_NUM_THREADS": str(config.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            # What a library leaves behind when it is killed goes with the folder.
            "TMPDIR": str(folder),
        }
        if config.heap == "kept":
            found["MALLOC_MMAP_MAX_"] = "0"
            found["MALLOC_TRIM_THRESHOLD_"] = str(16 << 30)
        if side == "peer" and what == "ppo":
            found["PYTHONPATH"] = config.trl_ppo
        return found

    def hear(self):
        line = self.done.readline()
        if not line:
            said = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            code = self.process.wait()
            print(f"{said}\nerror: {self.name}: its process ended ({code}), see above", file=sys.stderr)
            raise SystemExit(1)
        return json.loads(line)

    def lap(self, allowed):
        """Let it do a lap, which counts if others took no more than the allowed share of the machine."""
        before = busy_seconds()
        # If the pipe is broken, `hear` says why.
        with contextlib.suppress(BrokenPipeError):
            print("go", file=self.go, flush=True)
        lap = self.hear()
        others = busy_seconds() - before - lap["cpu"]
        self.peak = lap["peak"]
        # The system counts in hundredths of a second.
        if others <= allowed * lap["seconds"] * os.cpu_count() + 0.02:
            self.laps.append(lap)
        else:
            self.dropped += 1

    def stop(self):
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.go.close()
        self.done.close()

    def total(self, key):
        return sum(lap[key] for lap in self.laps)

    def seconds(self, ragged):
        """Time of all laps that count; where they are all the same: as if each had taken the median."""
        if ragged:
            return self.total("seconds")
        return len(self.laps) * statistics.median(lap["seconds"] for lap in self.laps)

    def rate(self, ragged):
        """Work per second."""
        return self.total("work") / self.seconds(ragged)

    def padding(self):
        return self.total("padded") / self.total("positions")


def busy_seconds():
    """CPU time that the whole machine has spent, that taken from it by its host included.

    It is 0 where the machine doesn't say, and all laps count.
    """
    with contextlib.suppress(OSError):
        words = Path("/proc/stat").read_text().split("\n")[0].split()
        user, nice, system, _, _, irq, softirq, steal = map(int, words[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return 0.0


def take_turns(what, folder, config):
    """(our `Side`, the peer's), both ended, with the laps that count."""
    sides = []
    try:
        for name in ("ours", "peer"):
            sides.append(Side(name, what, folder, config))
        for side in sides:
            # It is ready.
            side.hear()
        for side in sides:
            side.lap(math.inf)
            side.laps.clear()
        for _ in range(3 * config.laps):
            for side in sides:
                if len(side.laps) < config.laps:
                    side.lap(config.others)
    finally:
        for side in sides:
            side.stop()
    return sides


def compare(what, root, config, tokenizer):
    """One line of the result."""
    folder = root / what
    folder.mkdir()
    rows = write_rows(folder, what, config, tokenizer)
    ragged = bool(config.rows)
    # Before and after: neighbours may have been at work.
    before = machine_rates(config)
    mine, peer = take_turns(what, folder, config)
    after = machine_rates(config)
    gemm, copy = map(max, before, after)
    require(mine.laps and peer.laps,
            f"{what}: others kept the machine busy during every lap; wait, or raise --others")
    least = 0
    for lap in mine.laps:
        least += least_seconds(what, config, [rows[i] for i in lap["batch"]], gemm, copy)
    lengths = [len(ids) for row in rows for ids in row["ids"]]
    result = {
        "what": what,
        "shape": "ragged" if ragged else "uniform",
        "dtype": config.dtype,
        "peer_dtype": peer_dtype(what, config),
        "heap": config.heap,
        "ours": mine.rate(ragged),
        "peer": peer.rate(ragged),
        "ratio": mine.rate(ragged) / peer.rate(ragged),
        "unit": TASKS[what].unit,
        "peak_mb": mine.peak >> 20,
        "peer_peak_mb": peer.peak >> 20,
        "fraction_of_limit": least / mine.seconds(ragged),
        "gemm_gflops": gemm / 1e9,
        "copy_gbs": copy / 1e9,
        "padding": mine.padding(),
        "peer_padding": peer.padding(),
        "laps": len(mine.laps),
        "peer_laps": len(peer.laps),
        "dropped": mine.dropped,
        "peer_dropped": peer.dropped,
        "threads": config.threads,
        "layers": config.layers,
        "width": config.width,
        "vocabulary": config.vocabulary,
        "rows": TASKS[what].size,
        "samples": TASKS[what].samples,
        "mean_length": sum(lengths) / len(lengths),
        "new_tokens": new_tokens(what, config),
        "trl_defaults": config.trl_defaults,
    }
    if what in ("ppo", "grpo"):
        result |= parts_of_step(folder / "run" / "metrics.jsonl")
    for key, value in result.items():
        if isinstance(value, float):
            result[key] = float(f"{value:.5g}")
    return result


def peer_dtype(what, config):
    """Of the peer's matrix products."""
    if what == "nanogpt":
        return config.dtype
    if config.trl_defaults and what in ("sft", "reward", "dpo", "grpo"):
        return "bfloat16"
    return "float32"


def parts_of_step(metrics):
    """{metric: its median} of the parts of our step, as far as a file of metrics tells.

    The first step is warm-up.
    """
    if not metrics.exists():
        return {}
    rows = [json.loads(line) for line in metrics.read_text().splitlines()][1:]
    found = {}
    for key in rows[0] if rows else ():
        if key.endswith(("_seconds", "_per_second", "_share")):
            found[key] = statistics.median(row[key] for row in rows)
    return found


# ---------------------------------------------------------------------------------------------------------
# What the machine can do, and what the work needs

def machine_rates(config):
    """(operations per second, bytes per second), each of the best of some.

    They are 2048 x 2048 matrix products, and copies of 256 MB, whose bytes are both read and written.
    """
    def best(function):
        times = [time.perf_counter()]
        for _ in range(8):
            function()
            times.append(time.perf_counter())
        return min(after - before for before, after in itertools.pairwise(times))

    torch.set_num_threads(config.threads)
    n = 2048
    dtype = getattr(torch, config.dtype)
    a, b, out = (torch.randn(n, n).to(dtype) for _ in range(3))
    source = torch.zeros(1 << 26)
    target = torch.ones(1 << 26)
    product = best(lambda: torch.mm(a, b, out=out))
    copy = best(lambda: target.copy_(source))
    return 2 * n**3 / product, 2 * 4 * len(source) / copy


def forward_flops(config, length, scored=0):
    """Operations of one sequence's forward pass, a multiplication and an addition counted as two.

    The matrices of a block have 12 C^2 weights; causal attention needs half of T x T, once for Q K^T and
    once for the weighted sum of V; the head is needed where a token is scored. A backward pass takes twice
    as many.
    """
    L, C, V = config.layers, config.width, config.vocabulary
    return 24 * L * C**2 * length + 2 * L * C * length**2 + 2 * C * V * scored


def least_seconds(what, config, batch, gemm, copy):
    """The least time that a lap on these rows could take on this machine.

    Its operations run at the rate of the best matrix product. While it decodes, a step takes no longer than
    those or than one reading of weights and cache at the rate of a copy.
    """
    new = new_tokens(what, config)
    samples = TASKS[what].samples
    if not new:
        operations = 0
        for row in batch:
            for ids in row["ids"]:
                scored = 0 if what == "reward" else len(ids) - row["prompt"]
                operations += 3 * forward_flops(config, len(ids), scored)
        return operations / gemm

    prompts = [len(row["ids"][0]) for row in batch]
    total = decoding_seconds(config, prompts, new, gemm, copy, samples)
    if what == "ppo":
        # Reference, critic and reward model see it all once; policy and critic train on it; only policy and
        # reference have a head.
        headed = sum(forward_flops(config, length + new, new) for length in prompts)
        bare = sum(forward_flops(config, length + new) for length in prompts)
        total += (headed + 2 * bare + 3 * EPOCHS * (headed + bare)) / gemm
    if what == "grpo":
        # The policy trains on each reply behind its prompt; nothing else sees them.
        headed = sum(forward_flops(config, length + new, new) for length in prompts)
        total += samples * 3 * headed / gemm
    return total


def decoding_seconds(config, prompts, new, gemm, copy, samples=1):
    """The least time that it takes to draw some replies of so many new tokens to each prompt.

    prompts: their lengths. The replies to a prompt need one pass over it, and one reading of its keys and
    values per step.
    """
    L, C, V, B = config.layers, config.width, config.vocabulary, samples * len(prompts)
    size = 2 if config.dtype == "bfloat16" else 4  # bytes of a number
    total = sum(forward_flops(config, length, 1) for length in prompts) / gemm
    for step in range(1, new):
        seen = samples * sum(prompts) + B * step  # positions that are attended to, over all rows
        held = sum(prompts) + B * step  # those in the cache
        operations = B * (24 * L * C**2 + 2 * C * V) + 4 * L * C * seen
        numbers = 12 * L * C**2 + C * V + 2 * L * C * held
        total += max(operations / gemm, size * numbers / copy)
    return total


# ---------------------------------------------------------------------------------------------------------

def table(results, config):
    """The results as they stand in bench/RESULTS.md."""
    lines = [
        f"{heading(results[0], config)}.",
        "",
        "| | peer | its precision | ours | peer | ratio | memory, MB | peer's | share of the limit | "
        "padding | peer's | laps |",
        "|---" * 12 + "|",
    ]
    for r in results:
        cells = [
            r["what"],
            TASKS[r["what"]].peer,
            r["peer_dtype"],
            f"{three_digits(r['ours'])} {r['unit']}",
            three_digits(r["peer"]),
            f"{r['ratio']:.2f}",
            str(r["peak_mb"]),
            str(r["peer_peak_mb"]),
            f"{r['fraction_of_limit']:.2f}",
            f"{r['padding']:.2f}",
            f"{r['peer_padding']:.2f}",
            f"{r['laps']}, {r['peer_laps']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def three_digits(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def heading(result, config):
    """The command, and what it ran on."""
    def version(name):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
        return f"no {name}"

    command = shlex.join(["python", "bench/bench.py", *sys.argv[1:]])
    for path in filter(None, (config.rows, config.out)):
        command = command.replace(path, Path(path).name)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = re.search(r"model name\s*: (.+)", info)
    cpu = named[1] if named else "an unnamed CPU"
    amx = "with" if "amx_tile" in info else "no"
    versions = ", ".join(version(name) for name in ("torch", "transformers", "trl"))
    return (f"`{command}`, {time.strftime('%Y-%m-%d')}: "
            f"{result['threads']} threads on {os.cpu_count()} cores of {cpu} ({amx} AMX), "
            f"matrix products {result['gemm_gflops']:.0f} GFLOP/s, copies {result['copy_gbs']:.1f} GB/s; "
            f"{versions} (PPO: {PPO_TRL})")


def put_or_append(name, text):
    """Put text between the markers `name` of bench/RESULTS.md.

    If there are none, they are made at its end.
    """
    from bench.ablate import put
    page = ROOT / "bench" / "RESULTS.md"
    written = page.read_text()
    if f"<!-- {name} -->" not in written:
        title = "" if "\n## Speed\n" in written else "\n## Speed\n"
        with open(page, "a", encoding="utf-8") as f:
            f.write(f"{title}\n<!-- {name} -->\n<!-- /{name} -->\n")
    put(name, text)


def main(what, config):
    """what: names of comparisons, all if it is empty."""
    odd = [word for word in what if word not in TASKS]
    require(not odd, f"{' '.join(odd)}: there is only {', '.join(TASKS)}")
    what = list(dict.fromkeys(what)) or list(TASKS)
    config.trl_ppo = str(Path(config.trl_ppo or Path(sys.prefix) / f"trl-{PPO_TRL}").resolve())
    there = "ppo" not in what or (Path(config.trl_ppo) / "trl").is_dir()
    require(there, f"--trl-ppo {config.trl_ppo} holds no TRL {PPO_TRL}; bash run.sh bench installs it")
    out = os.devnull
    if config.out:
        out = folder_of(config.out) / Path(config.out).name
    results = []
    with tempfile.TemporaryDirectory() as name, open(out, "a") as file:
        root = Path(name)
        tokenizer = make_models(root / "models", config)
        for one in what:
            results.append(compare(one, root, config, tokenizer))
            line = json.dumps(results[-1])
            print(line, flush=True)
            print(line, file=file, flush=True)
    if config.write:
        defaults = " trl-defaults" if config.trl_defaults else ""
        shape = results[0]["shape"]
        # Some rows get a table of their own: those of one table were measured by one call.
        some = [name for name in TASKS if name in what]
        only = "" if some == list(TASKS) else f" of {' '.join(some)}"
        put_or_append(f"speed {config.dtype} {shape} {config.heap}{defaults}{only}", table(results, config))


def child(side, what, *rest):
    """A side's process."""
    job = Job(what, *rest)
    if side == "ours":
        ours(job)
    elif what == "nanogpt":
        nanogpt(job)
    elif draws_alone(what):
        their_generate(job)
    else:
        their_trainer(job)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        # So that what was started is ended.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
        flags = sys.argv[1 + len(words):]
        run_script(lambda config: main(words, config), Config, __doc__, flags)
