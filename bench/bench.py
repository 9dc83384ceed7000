"""How fast are the scripts beside others that do the same work, and how far from what the machine can do?

    bash run.sh bench                                  all of it, in float32; run.sh makes the environment with the peers
    python bench/bench.py sft dpo --dtype bfloat16     two of it, where transformers and TRL are there already
    python bench/bench.py nanogpt                      needs PyTorch alone

    sft                      TRL 1.16's SFTTrainer           8 rows of 256 tokens, every token trained
    nanogpt                  nanoGPT's training step         the same rows: all logits, clipping, AdamW as a loop, the same --dtype
    reward                   TRL 1.16's RewardTrainer        8 pairs of 256 tokens
    dpo                      TRL 1.16's DPOTrainer           4 pairs, prompt and reply 128 tokens each, the reference's part computed before
    ppo                      TRL 1.12's PPOTrainer           16 episodes, prompt and reply 64 tokens each, 4 updates: a whole step
    generate16, generate64   transformers' generate          16 or 64 prompts of 64 tokens, 128 new ones each

The model is a GPT-2 of 6 layers and width 384 with 50,257 tokens, random weights, one folder that both sides open; it never draws an end
token. Ours runs the script's own main(), stopped before every step; a peer's own train() is stopped by a callback. Where something had to
be chosen for a peer, it was what is faster: no gradient checkpointing, SDPA, no end token to look for, nothing reported, saved or evaluated.
Peers compute in float32 (but nanogpt's). A trainer's lap leaves out the loading and logging between its steps; ours has them.

The two sides are processes that live at the same time and take turns (ours, peer, ours, ...), so that what drifts hits both. A lap counts
if others took less than a tenth of the machine meanwhile; else it is done again, three times --laps at most. The first lap of each is warm-up.
    ours, peer           work per second: of the median lap; with --rows, whose laps differ, all work over all time (pairs: of average length)
    peak_mb              most memory resident from the warm-up on, Python and libraries included
    fraction_of_limit    the least time that our work could take on this machine, see `least_seconds`, over the time it took
    padding              share of the positions that went through a side's trunk which hold padding
"""
import contextlib
import dataclasses
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

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.memory import forget, peak  # noqa: E402
from formats.model_folder import load_model, save_model  # noqa: E402
from data import encode_demonstration, encode_group  # noqa: E402
from formats.sources import read_rows  # noqa: E402
from model import GPT, GPTConfig, ScalarModel, Transformer, layouts  # noqa: E402
from generate import generate  # noqa: E402
from plumbing.hardware import autocast  # noqa: E402
from plumbing.flags import Count, NonNegative, parse_flags, require  # noqa: E402
from plumbing.run import Run, run_script  # noqa: E402
from plumbing.disk import folder_of  # noqa: E402
from formats.tokenizer import Tokenizer  # noqa: E402
from data import encode_prompt, encode_text  # noqa: E402


class Task(NamedTuple):
    size: int  # rows, pairs, episodes or prompts of a lap
    unit: str
    peer: str
    rows: str = "prompts"  # what its rows are for formats/rows.py


TASKS = {
    "sft": Task(8, "tokens/s", "TRL SFTTrainer", "demonstrations"), "nanogpt": Task(8, "tokens/s", "nanoGPT's step", "demonstrations"),
    "reward": Task(8, "pairs/s", "TRL RewardTrainer", "preferences"), "dpo": Task(4, "pairs/s", "TRL DPOTrainer", "preferences"),
    "ppo": Task(16, "episodes/s", "TRL PPOTrainer"),
    "generate16": Task(16, "tokens/s", "transformers generate"), "generate64": Task(64, "tokens/s", "transformers generate")}
CONTEXT = 512
EPOCHS = 4  # of ppo
PPO_TRL = "1.12.0"
LR = 1e-8  # the weights stay what they are
NEVER = 1000000
CPU = torch.device("cpu")


@dataclass
class Config:
    dtype: Literal["float32", "bfloat16"] = "float32"  # of our matrix products, and of nanogpt's; the other peers compute in float32
    laps: Count = 10  # optimiser steps (ppo: rollouts with their updates; generate: calls) measured per side
    heap: Literal["default", "kept"] = "default"  # kept: glibc gives no freed memory back, on both sides (MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_)
    rows: str = ""  # take rows of real lengths, at most 512 tokens, from this file of preferences (GPT-2's tokens), instead of equal ones
    row_count: Count = 64  # how many rows to take from it
    threads: Count = 2  # CPU threads of each side
    write: bool = False  # put the table of this call into bench/RESULTS.md
    out: str = ""  # file that the printed lines are appended to
    trl_defaults: bool = False  # sft, reward, dpo: leave TRL the bfloat16 products and the gradient checkpointing that it comes with
    trl_ppo: str = ""  # folder that TRL 1.12.0 was installed to (default: trl-1.12.0 in the environment that runs this)
    others: NonNegative = 0.1  # share of the machine's CPU time that others may take during a lap that counts
    layers: Count = 6  # of the model
    width: Count = 384  # of the model; heads are 64 wide
    vocabulary: Annotated[int, ">= 261"] = 50257  # tokens of the model
    tokens: Annotated[int, ">= 32", "<= 512"] = 256  # of a row; the lengths in dpo, ppo and generate follow from it
    debug: bool = False  # show the traceback of an error


def new_tokens(what, config):
    """Tokens that each prompt gets in a lap of ppo or generate, else 0."""
    return config.tokens // 4 if what == "ppo" else config.tokens // 2 if what.startswith("generate") else 0


# ---------------------------------------------------------------------------------------------------------
# What both sides start from

def make_models(folder, config):
    """Write folder/policy and folder/reward, random weights that never draw an end token or padding; returns the tokenizer."""
    tokenizer = Tokenizer.gpt2() if config.rows else Tokenizer("bytes", r"[\s\S]", {bytes([b]): b for b in range(256)})
    config.vocabulary = max(config.vocabulary, tokenizer.n_vocab)
    heads = max(1, config.width // 64)
    for seed, (kind, name) in enumerate(((GPT, "policy"), (ScalarModel, "reward"))):
        torch.manual_seed(seed)
        model = kind(GPTConfig(config.vocabulary, CONTEXT, config.layers, heads, heads, config.width))
        if kind is GPT:
            with torch.no_grad():  # one direction of the last state is always 1, and those two tokens point the other way
                model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0.0, 1.0
                model.transformer.wte.weight[[tokenizer.eos, tokenizer.pad], 0] = -50.0
        save_model(folder / name, model, tokenizer)
    return tokenizer


def texts_of(what, config, tokenizer):
    """Rows as the scripts read them: random letters of equal length, a token each; with --rows a fixed sample of the file's that fit."""
    if not config.rows:
        letters, prompt = random.Random(0), config.tokens // (4 if new_tokens(what, config) else 2)
        lengths = {"text": config.tokens - 2, "prompt": prompt - 2, "chosen": config.tokens - prompt - 1, "rejected": config.tokens - prompt - 1}
        rows = [{key: "".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=n)) for key, n in lengths.items()} for _ in range(8 * TASKS[what].size)]
        return [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    found = []
    for row in read_rows(config.rows, "preferences", lambda _: None):
        best, worst = (row.replies[row.ranks.index(pick(row.ranks))] for pick in (min, max))
        whole = "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in [*row.prompt, {"role": "assistant", "content": best}])
        lengths = [len(encode_text(tokenizer, whole)[0]), *(len(ids) for ids, _ in encode_group(tokenizer, row))]
        if max(lengths) <= CONTEXT and len(encode_prompt(tokenizer, row.prompt)) <= CONTEXT // 2 and best != worst:
            found.append({"text": whole, "prompt": row.prompt, "chosen": best, "rejected": worst})
    require(len(found) >= config.row_count, f"--rows {config.rows}: {len(found)} rows fit, --row-count asks for {config.row_count}")
    return random.Random(0).sample(found, config.row_count)


def write_rows(folder, what, config, tokenizer):
    """Write rows.jsonl, which our script reads, and ids.json, the same as token ids: [{prompt: its length, ids: [sequence, ...]}], the result."""
    kind = TASKS[what].rows
    keys = {"demonstrations": ["text"], "preferences": ["prompt", "chosen", "rejected"], "prompts": ["prompt"]}[kind]
    lines = [json.dumps({key: row[key] for key in keys}) + "\n" for row in texts_of(what, config, tokenizer)]
    (folder / "rows.jsonl").write_text("".join(lines))
    encode = {"demonstrations": lambda row: [encode_demonstration(tokenizer, row)], "preferences": lambda row: encode_group(tokenizer, row),
              "prompts": lambda row: [(encode_prompt(tokenizer, row.prompt), [])]}[kind]
    groups = [encode(row) for row in read_rows(folder / "rows.jsonl", kind, lambda _: None)]
    rows = [{"prompt": len(group[0][0]) - sum(group[0][1]), "ids": [ids for ids, _ in group]} for group in groups]
    (folder / "ids.json").write_text(json.dumps(rows))
    return rows


# ---------------------------------------------------------------------------------------------------------
# A side, in its own process

class Job:
    """What a side is to do, and its end of the pipes: it waits for its turn, does a lap, and says what came of it."""

    def __init__(self, what, folder, config, go, done):
        self.what, self.folder, self.config = what, Path(folder), Config(**json.loads(config))
        self.size, self.unit, self.new = TASKS[what].size, TASKS[what].unit, new_tokens(what, self.config)
        self.models, self.rows = self.folder.parent / "models", json.loads((self.folder / "ids.json").read_text())
        self.steps = 3 * self.config.laps + 9  # more than there will be laps, so that no run comes to its end
        self.go, self.done, self.ready = os.fdopen(int(go)), os.fdopen(int(done), "w"), False
        torch.set_num_threads(self.config.threads)
        self.positions = self.padded = 0

    def count(self, positions, padded):
        """Note what goes through the trunk."""
        self.positions, self.padded = self.positions + positions, self.padded + padded

    def work(self, tokens):
        """An optimiser step on so many tokens, padding not counted, in units of the task; pairs are those of average length."""
        per_row = sum(len(ids) for row in self.rows for ids in row["ids"]) / len(self.rows)
        return {"tokens/s": tokens, "pairs/s": tokens / per_row, "episodes/s": self.size}[self.unit]

    def batches(self):
        """Endless batches of row numbers, in their order."""
        numbers = itertools.cycle(range(len(self.rows)))
        while True:
            yield [next(numbers) for _ in range(self.size)]

    def begin(self):
        if not self.ready:  # everything is loaded
            forget(CPU)
            print("{}", file=self.done, flush=True)
            self.ready = True
        if not self.go.readline():  # the parent is gone
            os._exit(0)
        self.positions = self.padded = 0
        self.cpu, self.began = time.process_time(), time.perf_counter()

    def end(self, work, batch=()):
        """batch: numbers of the rows that the work was done on, where that matters."""
        lap = {"seconds": time.perf_counter() - self.began, "cpu": time.process_time() - self.cpu, "peak": peak(CPU), "work": work,
               "positions": self.positions, "padded": self.padded, "batch": batch}
        print(json.dumps(lap), file=self.done, flush=True)


def ours(job):
    """Laps of our script's main(), or of `generate`."""
    forward, pad = Transformer.forward, json.loads((job.models / "policy" / "config.json").read_text())["pad_token_id"]

    def counted(self, ids, cache=None, index=None):
        inside = layouts(*ids.shape, index, ids.device)[0].inside  # what the blocks compute, if it isn't all
        job.count(ids.numel() if inside is None else len(inside), int((ids == pad).sum()) if inside is None else 0)
        return forward(self, ids, cache, index)

    with mock.patch.object(Transformer, "forward", counted):
        our_generate(job) if job.what.startswith("generate") else our_script(job)


def our_generate(job):
    model, tokenizer = load_model(job.models / "policy", GPT)
    generator = torch.Generator().manual_seed(0)
    for batch in job.batches():
        prompts = [job.rows[i]["ids"][0] for i in batch]
        job.begin()
        with autocast(CPU, getattr(torch, job.config.dtype)):
            drawn = generate(model, prompts, job.new, tokenizer, generator=generator)
        job.end(len(batch) * job.new, batch)
        require(int(drawn.mask.sum()) == len(batch) * job.new, "a reply ended early")


def our_script(job):
    config, what = job.config, "sft" if job.what == "nanogpt" else job.what
    flags = (f"--device cpu --dtype {config.dtype} --threads {config.threads} --model {job.models}/policy --data {job.folder}/rows.jsonl"
             f" --micro-batch-tokens 2048 --val-fraction 0 --lr {LR} --warmup 1 --steps {job.steps} --out {job.folder}/run")
    if what == "ppo":
        flags += (f" --reward {job.models}/reward --rollout-batch {job.size} --max-new-tokens {job.new} --epochs {EPOCHS} --minibatches 1"
                  f" --critic-lr {LR} --sample-every {NEVER}")
    else:  # as many tokens as the peer's batch has on average
        padded = [len(row["ids"]) * max(map(len, row["ids"])) for row in job.rows]
        flags += f" --batch-tokens {math.ceil(job.size * sum(padded) / len(padded))} --eval-every {NEVER}"
    script, steps, drawn = importlib.import_module(what), Run.steps, []
    draw = script.endless_order if what == "ppo" else script.endless_batches  # what yields the numbers of rows

    def watched_draw(lengths, *args):
        require((lengths if what == "ppo" else len(lengths)) == len(job.rows), f"{what}.py did not take all {len(job.rows)} rows")
        for numbers in draw(lengths, *args):
            drawn.append(numbers)
            yield numbers

    def watched_steps(run, first, total, evaluate=None):
        for step in steps(run, first, total, evaluate):
            job.begin()
            yield step
            batch = drawn[job.size * step:job.size * (step + 1)] if what == "ppo" else drawn[step]
            job.end(job.work(sum(len(ids) for i in batch for ids in job.rows[i]["ids"])), batch)

    with mock.patch.object(Run, "steps", watched_steps), mock.patch.object(script, draw.__name__, watched_draw):
        script.main(parse_flags(script.Config, "", shlex.split(flags)))


class Plain(nn.Module):
    """A GPT-2 as nanoGPT has it: logits of all positions, and their cross-entropy."""

    def __init__(self, vocabulary, layers, width):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "norm_1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width), "project": nn.Linear(width, width),
            "norm_2": nn.LayerNorm(width), "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width)}) for _ in range(layers))
        self.norm, self.heads = nn.LayerNorm(width), max(1, width // 64)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids, targets):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in block["qkv"](block["norm_1"](x)).chunk(3, -1))
            x = x + block["project"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["norm_2"](x)), approximate="tanh"))
        logits = F.linear(self.norm(x), self.tokens.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def nanogpt(job):
    torch.manual_seed(0)
    model = Plain(job.config.vocabulary, job.config.layers, job.config.width)
    groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": 0.1 * matrix} for matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))  # on a CPU: a loop over the parameters
    for batch in job.batches():
        rows = [torch.tensor(job.rows[i]["ids"][0]) for i in batch]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        targets = nn.utils.rnn.pad_sequence([F.pad(row[1:], (0, 1), value=-1) for row in rows], batch_first=True, padding_value=-1)
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
    kind, options = ("AutoModelForCausalLM", {}) if name == "policy" else ("AutoModelForSequenceClassification", {"num_labels": 1})
    model = getattr(transformers, kind).from_pretrained(job.models / name, attn_implementation="sdpa", dtype=torch.float32, **options)

    def count(module, args, given):
        ids, mask = given["input_ids"] if "input_ids" in given else args[0], given.get("attention_mask")
        job.count(ids.numel(), 0 if mask is None else int((mask[:, -ids.shape[1]:] == 0).sum()))  # of a decoding step: the last column

    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return model


def their_generate(job):
    model = theirs(job, "policy").eval()
    model.generation_config.eos_token_id = None  # then no time goes into looking for it
    torch.manual_seed(0)
    for batch in job.batches():
        prompts = [torch.tensor(job.rows[i]["ids"][0]) for i in batch]
        ids = nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
        job.begin()
        drawn = model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=job.new,
                               use_cache=True, pad_token_id=model.config.pad_token_id)
        job.end(len(batch) * job.new)
        require(drawn.shape[1] == ids.shape[1] + job.new, "a reply ended early")


def their_trainer(job):
    """A trainer of TRL, stopped before each optimiser step; that of PPO says only when a step ends, which is where the next one begins."""
    import trl  # for ppo another one, see Side
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    what, config = job.what, job.config

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            if what == "ppo":
                job.begin()

        def on_step_begin(self, *args, **kwargs):
            job.begin()

        def on_step_end(self, *args, **kwargs):
            job.end(job.work(job.positions - job.padded))
            self.on_train_begin()

    settings = {"output_dir": str(job.folder / "trainer"), "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
                "learning_rate": LR, "per_device_train_batch_size": job.size, "max_steps": job.steps}
    if not config.trl_defaults or what == "ppo":
        settings |= {"bf16": False, "gradient_checkpointing": False}
    common = {"processing_class": AutoTokenizer.from_pretrained(job.models / "policy", padding_side="left"), "callbacks": [Turns()]}
    rows = job.rows
    if what == "sft":
        texts = Dataset.from_dict({"input_ids": [row["ids"][0] for row in rows]})
        trainer = trl.SFTTrainer(theirs(job, "policy"), trl.SFTConfig(**settings), train_dataset=texts, **common)
    elif what == "reward":
        pairs = Dataset.from_dict({f"{name}_ids": [row["ids"][i] for row in rows] for i, name in enumerate(("chosen", "rejected"))})
        trainer = trl.RewardTrainer(theirs(job, "reward"), trl.RewardConfig(**settings), train_dataset=pairs, **common)
    elif what == "dpo":
        columns = {f"{name}_ids": [row["ids"][i][row["prompt"]:] for row in rows] for i, name in enumerate(("chosen", "rejected"))}
        pairs = Dataset.from_dict(columns | {"prompt_ids": [row["ids"][0][:row["prompt"]] for row in rows]})
        args = trl.DPOConfig(**settings, precompute_ref_log_probs=True)
        with mock.patch.object(trl.DPOTrainer, "_prepare_dataset", lambda self, dataset, *_: dataset):  # it takes text alone, and these are ids
            trainer = trl.DPOTrainer(theirs(job, "policy"), None, args, train_dataset=pairs, **common)
    else:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
        args = PPOConfig(**settings, total_episodes=job.steps * job.size, response_length=job.new, num_ppo_epochs=EPOCHS, num_mini_batches=1,
                         local_rollout_forward_batch_size=job.size, temperature=1.0, stop_token="eos", num_sample_generations=0)
        prompts = Dataset.from_dict({"input_ids": [row["ids"][0] for row in rows]})
        trainer = PPOTrainer(args, model=theirs(job, "policy"), ref_model=theirs(job, "policy"), reward_model=theirs(job, "reward"),
                             value_model=theirs(job, "reward"), train_dataset=prompts, **common)
    trainer.train()


# ---------------------------------------------------------------------------------------------------------
# Turns, in the parent

class Side:
    """One side of a comparison: its process, a pipe to it and one from it, and its laps."""

    def __init__(self, side, what, folder, config):
        environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error",
                                    "TMPDIR": str(folder)}  # what a library leaves behind when it is killed goes with the folder
        environment |= dict.fromkeys(["HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE", "TRL_EXPERIMENTAL_SILENCE"], "1")
        if config.heap == "kept":
            environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
        if (side, what) == ("peer", "ppo"):
            environment["PYTHONPATH"] = config.trl_ppo
        self.name, self.log, self.laps, self.dropped, self.peak = f"{what}, {side}", folder / f"{side}.log", [], 0, 0
        (go, my_go), (my_done, done) = os.pipe(), os.pipe()
        words = [sys.executable, __file__, "child", side, what, str(folder), json.dumps(dataclasses.asdict(config)), str(go), str(done)]
        with open(self.log, "w") as log:  # a session of its own: Ctrl-C goes to the parent, which ends it
            self.process = subprocess.Popen(words, env=environment, pass_fds=(go, done), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            start_new_session=True)
        os.close(go), os.close(done)
        self.go, self.done = os.fdopen(my_go, "w"), os.fdopen(my_done)

    def hear(self):
        line = self.done.readline()
        if not line:
            said = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            print(f"{said}\nerror: {self.name}: its process ended ({self.process.wait()}), see above", file=sys.stderr)
            raise SystemExit(1)
        return json.loads(line)

    def lap(self, allowed):
        """Let it do a lap, which counts if others took no more than the allowed share of the machine meanwhile."""
        before = busy_seconds()
        with contextlib.suppress(BrokenPipeError):  # `hear` says why
            print("go", file=self.go, flush=True)
        lap = self.hear()
        others, self.peak = busy_seconds() - before - lap["cpu"], lap["peak"]
        if others <= allowed * lap["seconds"] * os.cpu_count() + 0.02:  # the system counts in hundredths of a second
            self.laps.append(lap)
        else:
            self.dropped += 1

    def stop(self):
        self.process.kill(), self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.go.close()
        self.done.close()

    def total(self, key):
        return sum(lap[key] for lap in self.laps)

    def seconds(self, ragged):
        """Time of all laps that count; where they are all the same: as if each had taken the median."""
        return self.total("seconds") if ragged else len(self.laps) * statistics.median(lap["seconds"] for lap in self.laps)


def busy_seconds():
    """CPU time that the whole machine has spent, that taken from it by its host included; 0 where it doesn't say, and all laps count."""
    with contextlib.suppress(OSError):
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return 0.0


def compare(what, root, config, tokenizer):
    """One line of the result."""
    folder = root / what
    folder.mkdir()
    rows, rates, ragged, sides = write_rows(folder, what, config, tokenizer), machine_rates(config), bool(config.rows), []
    try:
        for name in ("ours", "peer"):
            sides.append(Side(name, what, folder, config))
        for side in sides:
            side.hear()  # it is ready
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
    gemm, copy = map(max, rates, machine_rates(config))  # before and after: neighbours may have been at work
    require(all(side.laps for side in sides), f"{what}: others kept the machine busy during every lap; wait, or raise --others")
    mine, peer = sides
    rates = [side.total("work") / side.seconds(ragged) for side in sides]
    least = sum(least_seconds(what, config, [rows[i] for i in lap["batch"]], gemm, copy) for lap in mine.laps)
    lengths = [len(ids) for row in rows for ids in row["ids"]]
    result = {
        "what": what, "shape": "ragged" if ragged else "uniform", "dtype": config.dtype,
        "peer_dtype": config.dtype if what == "nanogpt" else "bfloat16" if config.trl_defaults and what in ("sft", "reward", "dpo") else "float32",
        "heap": config.heap, "ours": rates[0], "peer": rates[1], "ratio": rates[0] / rates[1], "unit": TASKS[what].unit, "peak_mb": mine.peak >> 20,
        "peer_peak_mb": peer.peak >> 20, "fraction_of_limit": least / mine.seconds(ragged), "gemm_gflops": gemm / 1e9, "copy_gbs": copy / 1e9,
        "padding": mine.total("padded") / mine.total("positions"), "peer_padding": peer.total("padded") / peer.total("positions"),
        "laps": len(mine.laps), "peer_laps": len(peer.laps), "dropped": mine.dropped, "peer_dropped": peer.dropped, "threads": config.threads,
        "layers": config.layers, "width": config.width, "vocabulary": config.vocabulary, "rows": TASKS[what].size,
        "mean_length": sum(lengths) / len(lengths), "new_tokens": new_tokens(what, config), "trl_defaults": config.trl_defaults}
    metrics = folder / "run" / "metrics.jsonl"
    logged = [json.loads(line) for line in metrics.read_text().splitlines()][1:] if what == "ppo" and metrics.exists() else []
    for key in logged[0] if logged else ():  # the parts of our step, as far as it tells
        if key.endswith(("_seconds", "_per_second")):
            result[key] = statistics.median(row[key] for row in logged)
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in result.items()}


# ---------------------------------------------------------------------------------------------------------
# What the machine can do, and what the work needs

def machine_rates(config):
    """(operations per second of the best of some 2048 x 2048 matrix products, bytes per second read and written by the best copy of 256 MB)."""
    def best(function):
        times = [time.perf_counter()]
        for _ in range(8):
            function()
            times.append(time.perf_counter())
        return min(after - before for before, after in itertools.pairwise(times))

    torch.set_num_threads(config.threads)
    a, b, out = (torch.randn(2048, 2048).to(getattr(torch, config.dtype)) for _ in range(3))
    source, target = torch.zeros(1 << 26), torch.ones(1 << 26)
    return 2 * 2048**3 / best(lambda: torch.mm(a, b, out=out)), 2 * 4 * len(source) / best(lambda: target.copy_(source))


def forward_flops(config, length, scored=0):
    """Operations of one sequence's forward pass, a multiplication and an addition counted as two.

    The matrices of a block have 12 C^2 weights; causal attention needs half of T x T, once for Q K^T and once for the weighted sum of V;
    the head is needed where a token is scored. A backward pass takes twice as many.
    """
    L, C, V = config.layers, config.width, config.vocabulary
    return 24 * L * C**2 * length + 2 * L * C * length**2 + 2 * C * V * scored


def least_seconds(what, config, batch, gemm, copy):
    """The time that a lap on these rows would take if its operations ran at the rate of the best matrix product and, while it decodes,
    a step took no longer than those or than one reading of weights and cache at the rate of a copy."""
    L, C, V, B, new = config.layers, config.width, config.vocabulary, len(batch), new_tokens(what, config)
    if not new:
        lengths = [(len(ids), 0 if what == "reward" else len(ids) - row["prompt"]) for row in batch for ids in row["ids"]]
        return 3 * sum(forward_flops(config, *length) for length in lengths) / gemm
    prompts, size = [len(row["ids"][0]) for row in batch], 2 if config.dtype == "bfloat16" else 4
    total = sum(forward_flops(config, length, 1) for length in prompts) / gemm
    for step in range(1, new):
        seen = sum(prompts) + B * step  # positions in the cache, over all rows
        total += max((B * (24 * L * C**2 + 2 * C * V) + 4 * L * C * seen) / gemm, size * (12 * L * C**2 + C * V + 2 * L * C * seen) / copy)
    if what == "ppo":  # reference, critic and reward model see it all once; policy and critic train on it; only policy and reference have a head
        headed, bare = (sum(forward_flops(config, length + new, scored) for length in prompts) for scored in (new, 0))
        total += (headed + 2 * bare + 3 * EPOCHS * (headed + bare)) / gemm
    return total


# ---------------------------------------------------------------------------------------------------------

def table(results, config):
    """The results as they stand in bench/RESULTS.md."""
    def rate(x):
        return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"

    def version(name):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
        return f"no {name}"

    info, r = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "", results[0]
    cpu = re.search(r"model name\s*: (.+)", info)
    command = shlex.join(["python", "bench/bench.py", *sys.argv[1:]])
    for path in filter(None, (config.rows, config.out)):
        command = command.replace(path, Path(path).name)
    lines = [f"`{command}`, {time.strftime('%Y-%m-%d')}: {r['threads']} threads on {os.cpu_count()} cores of "
             f"{cpu[1] if cpu else 'an unnamed CPU'} ({'with' if 'amx_tile' in info else 'no'} AMX), matrix products {r['gemm_gflops']:.0f} GFLOP/s, "
             f"copies {r['copy_gbs']:.1f} GB/s; {', '.join(map(version, ('torch', 'transformers', 'trl')))} (PPO: {PPO_TRL}).", "",
             "| | peer | its precision | ours | peer | ratio | memory, MB | peer's | share of the limit | padding | peer's | laps |",
             "|---" * 12 + "|"]
    for r in results:
        lines.append(f"| {r['what']} | {TASKS[r['what']].peer} | {r['peer_dtype']} | {rate(r['ours'])} {r['unit']} | {rate(r['peer'])} | "
                     f"{r['ratio']:.2f} | {r['peak_mb']} | {r['peer_peak_mb']} | {r['fraction_of_limit']:.2f} | {r['padding']:.2f} | "
                     f"{r['peer_padding']:.2f} | {r['laps']}, {r['peer_laps']} |")
    return "\n".join(lines)


def put_or_append(name, text):
    """Put text between the markers `name` of bench/RESULTS.md, at whose end they are made if there are none."""
    from bench.ablate import put
    page = ROOT / "bench" / "RESULTS.md"
    if f"<!-- {name} -->" not in page.read_text():
        with open(page, "a", encoding="utf-8") as f:
            f.write(("" if "\n## Speed\n" in page.read_text() else "\n## Speed\n") + f"\n<!-- {name} -->\n<!-- /{name} -->\n")
    put(name, text)


def main(what, config):
    odd = [word for word in what if word not in TASKS]
    require(not odd, f"{' '.join(odd)}: there is only {', '.join(TASKS)}")
    what, results = list(dict.fromkeys(what)) or list(TASKS), []
    config.trl_ppo = str(Path(config.trl_ppo or Path(sys.prefix) / f"trl-{PPO_TRL}").resolve())
    there = "ppo" not in what or (Path(config.trl_ppo) / "trl").is_dir()
    require(there, f"--trl-ppo {config.trl_ppo} holds no TRL {PPO_TRL}; bash run.sh bench installs it")
    with tempfile.TemporaryDirectory() as name, open(folder_of(config.out) / Path(config.out).name if config.out else os.devnull, "a") as out:
        tokenizer = make_models(Path(name) / "models", config)
        for one in what:
            results.append(compare(one, Path(name), config, tokenizer))
            for file in (sys.stdout, out):
                print(json.dumps(results[-1]), file=file, flush=True)
    if config.write:
        defaults = " trl-defaults" if config.trl_defaults else ""
        put_or_append(f"speed {config.dtype} {results[0]['shape']} {config.heap}{defaults}", table(results, config))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        side, what, *rest = sys.argv[2:]
        peer = nanogpt if what == "nanogpt" else their_generate if what.startswith("generate") else their_trainer
        (ours if side == "ours" else peer)(Job(what, *rest))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
        words = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
        run_script(lambda config: main(words, config), Config, __doc__, sys.argv[1 + len(words):])
