"""Feedback that nobody asked for: what users say of replies in conversations, made into training files.

    python feedback.py --data talks.jsonl --out runs/feedback
    python kto.py --model runs/sft --data runs/feedback/labels.jsonl --out runs/heard

In a conversation of several turns the user's next turn is often a reaction to the reply before it. Here every
reply that a user's turn follows gets one of five kinds, or none (the kinds of Don-Yehiya et al. 2024,
"Naturally occurring feedback is common, extractable and useful"):

    repeat     asks the same again, also in other words        bad
    correct    says what would have been right                 bad
    complain   says that something is wrong                    bad
    clarify    asks for what is missing                        bad
    praise     praises or thanks                               good

--data has conversations in any format that the scripts read; the turns up to the user's last one count. --by
says who decides:

    rules            English; the patterns and shared words of reactions.py
    FOLDER           a checkpoint that is asked one question on each reaction; what counts is which of the
                     letters A to F is the likeliest as the first token of its reply
    module:function  yours; it gets lists as a --tool of grpo.py does, of `replies`, `dialogues` (their last
                     turn is the reaction) and so on, and returns the name of a kind or None for each

--out gets

    labels.jsonl   for kto.py       prompt, completion, label, kind
    sft.jsonl      for sft.py       prompt, completion: the praised replies, and the repaired ones
    pairs.jsonl    for dpo.py, reward.py, with --repair: prompt, chosen (repaired), rejected (the first reply)
    summary.json   how many turns, kinds, rows and repairs there are, and the flags

    python feedback.py --data talks.jsonl --repair runs/ppo --check mine:right

With --repair a stronger checkpoint answers again what got bad feedback. A repaired reply is left out if it is
blank, cut off or the reply that it is to repair; with --check it is kept only if the function's number of it
is above one half and above that of the first reply. Where the function checks constraints (constraints.py),
that is the teacher's correction of He et al. 2024, "From complex to simple".

On the embedded task (recipes/feedback.sh) a simulated user reacts to 4 of 10 replies of the SFT model, and in
1 of 10 reactions not as the reply earned. Of 5,600 reactions, in words that the rules were not fitted to, the
rules find 0.62 as good or bad, 0.995 of them as they were meant. kto.py on these 3,500 labels (--steps 150
--batch-tokens 1024; at seed 0 --steps 120 of 4096 tokens, 54 s of processor time) and no others takes the
gold score on 508 held-out prompts from 0.168 to 0.721, from 0.152 to 0.693 and from 0.094 to 0.705 (seeds 0,
1, 2). With two constraints in each prompt, a policy that ignores them, and repairs by a stronger one that a
checker has verified, SFT takes the share that keeps both from 0.51 to 0.78 and from 0.59 to 0.75, and gold
from -0.11 to 0.57 and from -0.13 to 0.58 (seeds 0, 2; the stronger one has 0.86, 0.89 and 0.80, 0.81).
Standard errors 0.02 to 0.04 (2026-11-28, one thread of a busy Intel Xeon).

Left out: the user's own words as a reply (a correction is seldom a whole one); the reaction in what the
repairing model reads, as most small ones know single turns only; the order of the judge's letters, which
biases models; and that a follow-up question shows interest.
"""
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data import drop_long, encode_group, encode_prompt, pad_rows
from formats.families import knows_single_turns
from formats.model_folder import load_model
from formats.rows import Row
from formats.sources import read_rows
from judges import Function, Namer, check_functions, judge
from model import GPT
from plumbing.disk import folder_of, write_atomically, write_json
from plumbing.flags import Count, Natural, NonNegative, Seed, require
from plumbing.hardware import pick_device, pick_dtype
from plumbing.ranks import by_length
from plumbing.run import Alone, run_script
from reactions import KINDS, exchanges_of, kind_of
from rollout import Prompt, sample


@dataclass
class Config:
    # files of conversations: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/feedback/talks.jsonl"
    out: str = "runs/feedback/files"  # folder for the files
    # what tells the kind of a reaction: rules, the checkpoint folder of a judge, or module:function
    by: str = "rules"
    repair: str = ""  # checkpoint folder of a stronger model that answers again what got bad feedback
    # function module:function, as a --reward-fn of ppo.py, by whose numbers repaired replies are kept
    check: str = ""
    # keep only the last N user turns of each prompt, and the replies between them; 0 keeps all
    turns: Natural = 0
    part: str = ""  # of a file: one part of it, as in training (2/4/4:3)
    skip_bad: bool = False  # leave out rows of --data that can't be read, at most one in a hundred
    max_new_tokens: Count = 40  # longest repaired reply, tokens
    temperature: NonNegative = 1.0  # of sampling repaired replies; 0 takes the likeliest token
    batch: Count = 64  # replies repaired at once
    micro_batch_tokens: Count = 16384  # tokens per pass of the judge of --by
    seed: Seed = 0  # seed of the sampling
    # auto takes the first of cuda, mps, cpu that works
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    allow_pickle: bool = False
    debug: bool = False  # show the traceback of an error


def open_folder(folder, config):
    """(Alone, model, tokenizer) of a checkpoint folder, on the device."""
    device = pick_device(config.device)
    model, tokenizer = load_model(folder, GPT, allow_pickle=config.allow_pickle)
    model.to(device).eval()
    return Alone(device, pick_dtype(config.dtype, device, model.config.n_embd)), model, tokenizer


# ---------------------------------------------------------------------------------------------------------
# Kinds by a judge, or by a function

# The letters stand for KINDS in their order, and for none.
LETTERS = "ABCDEF"
QUESTION = """A user asked an assistant:
{asked}

The assistant replied:
{reply}

Then the user said:
{reaction}

What does the user say of the reply?
A: asks the same again
B: says what would have been right
C: says that something is wrong
D: asks for what is missing
E: praises or thanks
F: none of these
Answer with one letter."""


def question_on(exchange):
    """What a judge is asked, [{role, content}]."""
    text = QUESTION.format(asked=exchange.earlier[-1], reply=exchange.reply, reaction=exchange.reaction)
    return [{"role": "user", "content": text}]


def letter_ids(tokenizer):
    """The token with which a reply begins that is one of LETTERS (6,)."""
    ids = []
    for letter in LETTERS:
        example, = encode_group(tokenizer, Row([{"role": "user", "content": "Which letter?"}], [letter]))
        ids.append(example.ids[example.mask.index(True)])
    require(len(set(ids)) == len(ids),
            f"--by: the judge's tokenizer begins some of the letters {LETTERS} with the same token")
    return torch.tensor(ids)


@torch.no_grad()
def letter_logprobs(alone, model, tokenizer, prompts, budget):
    """Log-probabilities (N, 6) of LETTERS as the first token of a reply to prompts, lists of ids (N).

    budget: tokens per pass, padding included.
    """
    letters = letter_ids(tokenizer).to(alone.device)
    found = torch.zeros(len(prompts), len(LETTERS))
    lengths = [len(ids) for ids in prompts]
    pieces = by_length(range(len(prompts)), lengths, budget)
    for numbers in tqdm(pieces, desc="asking the judge", disable=None):
        ids, ends = pad_rows([prompts[i] for i in numbers], tokenizer.pad, alone.device)  # (n, T), (n,)
        # The state of a prompt's last token predicts the first one of the reply.
        last = torch.arange(len(numbers)) * ids.shape[1] + ends - 1  # (n,)
        with alone.autocast():
            logits = model.logits(model.transformer(ids, index=last))  # (n, V)
        found[numbers] = logits.float().log_softmax(-1)[:, letters].cpu()
    return found


def kinds_by_judge(exchanges, config):
    """A kind or "none" of each Exchange, by the checkpoint --by."""
    alone, model, tokenizer = open_folder(config.by, config)
    prompts = [encode_prompt(tokenizer, question_on(exchange)) for exchange in exchanges]
    context = model.config.block_size
    fits = [i for i, ids in enumerate(prompts) if len(ids) <= context]
    if len(fits) < len(prompts):
        print(f"warning: {len(prompts) - len(fits)} of {len(prompts)} questions are longer than the judge's "
              f"context of {context} tokens; those have no kind")
    require(fits, f"--by {config.by}: no question fits into its context of {context} tokens")
    logprobs = letter_logprobs(alone, model, tokenizer, [prompts[i] for i in fits], config.micro_batch_tokens)
    kinds = ["none"] * len(prompts)
    for i, letter in zip(fits, logprobs.argmax(1).tolist()):
        kinds[i] = (*KINDS, "none")[letter]
    return kinds


def kinds_of(exchanges, config):
    """One of KINDS, or "none", of each Exchange, as --by says."""
    if config.by == "rules":
        reading = tqdm(exchanges, desc="reading", disable=None)
        return [kind_of(own.reply, own.reaction, own.earlier) for own in reading]
    if ":" in config.by and not Path(config.by).exists():
        kinds = call_on_replies(Namer("--by", config.by, (*KINDS, "none")), exchanges)
        return [kind or "none" for kind in kinds]
    return kinds_by_judge(exchanges, config)


def call_on_replies(function, exchanges):
    """What a Function says of the replies of exchanges."""
    prompts = [Row(own.before).text for own in exchanges]
    replies = [own.reply for own in exchanges]
    answers = [own.answer for own in exchanges]
    dialogues = [own.dialogue for own in exchanges]
    return function(prompts, replies, answers, [True] * len(replies), dialogues)


# ---------------------------------------------------------------------------------------------------------
# Repair

def cut_turns(prompt, turns):
    """The end of a prompt that has at most so many of the user's turns (0: all), behind its system turn."""
    users = [i for i, turn in enumerate(prompt) if turn["role"] == "user"]
    if turns == 0 or len(users) <= turns:
        return prompt
    system = [turn for turn in prompt[:1] if turn["role"] == "system"]
    return system + prompt[users[-turns]:]


def answers_again(exchanges, config, opened, function):
    """{number: repaired reply} of those exchanges whose repair is kept. opened: see `open_folder`.

    function: the `Function` of --check, or None.
    """
    alone, model, tokenizer = opened
    prompts = []
    for own in exchanges:
        prompts.append(Prompt(Row(own.before, answer=own.answer), encode_prompt(tokenizer, own.before)))
    context = model.config.block_size - config.max_new_tokens
    require(context > 0, f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in the "
                         f"context of {model.config.block_size}")
    numbers = drop_long(range(len(prompts)), [len(prompt.ids) for prompt in prompts], context, alone.say)
    generator = torch.Generator(alone.device).manual_seed(config.seed)
    kept = {}
    for start in tqdm(range(0, len(numbers), config.batch), desc="answering again", disable=None):
        part = numbers[start:start + config.batch]
        batch = sample(alone, model, tokenizer, [prompts[i] for i in part], config.max_new_tokens,
                       config.temperature, generator)
        first = [exchanges[i] for i in part]
        better = [True] * len(part)
        if function:
            new, old = judge(function, batch), call_on_replies(function, first)  # (n,) each
            require(torch.stack([new, old]).isfinite().all(),
                    f"{function.spec} gave a reply a number that is not finite")
            better = ((new > 0.5) & (new > old)).tolist()
        for i, text, ended, good, own in zip(part, batch.texts, batch.ended.tolist(), better, first):
            text = text.strip()
            if good and ended and text and text != own.reply:
                kept[i] = text
    return kept


# ---------------------------------------------------------------------------------------------------------
# Files

def training_rows(exchanges, kinds, repaired):
    """{name of a file: its rows}. repaired: {number of an exchange: the reply that repairs it}, or None."""
    files = {"labels": [], "sft": []} | ({} if repaired is None else {"pairs": []})
    for i, (own, kind) in enumerate(zip(exchanges, kinds)):
        if kind == "none":
            continue
        # As the readers take it: text, or turns where there are several.
        prompt = own.before if len(own.before) > 1 else own.before[0]["content"]
        good = kind == "praise"
        files["labels"].append({"prompt": prompt, "completion": own.reply, "label": good, "kind": kind})
        better = own.reply if good else (repaired or {}).get(i)
        if better:
            files["sft"].append({"prompt": prompt, "completion": better})
        if better and not good:
            files["pairs"].append({"prompt": prompt, "chosen": better, "rejected": own.reply})
    return files


def check(config, out):
    """UserError unless the flags go together and --out may be written to."""
    require(os.environ.get("WORLD_SIZE", "1") == "1", "feedback.py is one process: leave out torchrun")
    require(config.repair or not config.check, "--check is for replies that --repair gives")
    require(not out.is_file(), f"--out {out} is a file; name a folder")
    for name in ("labels.jsonl", "sft.jsonl", "pairs.jsonl", "summary.json"):
        require(not (out / name).exists(), f"--out {out} already holds {name}; name another or delete it")


def main(config):
    out = Path(config.out)
    check(config, out)
    # SIGTERM is as Ctrl-C: nothing is left half-written.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if config.threads:
        torch.set_num_threads(config.threads)

    # 1. conversations to replies with a reaction
    rows = read_rows(config.data, "prompts", part=config.part, skip_bad=config.skip_bad)
    exchanges = exchanges_of(rows)
    require(exchanges, f"{config.data}: no reply is followed by a turn of the user's")
    # The reactions are judged with all turns in view; the files have as many as --turns says.
    short = [own._replace(before=cut_turns(own.before, config.turns)) for own in exchanges]
    function = Function("--check", config.check) if config.check else None
    if function:
        check_functions([function], [Row(own.before, answer=own.answer) for own in short], print)
    opened = open_folder(config.repair, config) if config.repair else None
    folder_of(out / "summary.json")

    # 2. kinds of the reactions
    kinds = kinds_of(exchanges, config)
    counts = {kind: kinds.count(kind) for kind in (*KINDS, "none")}
    print(f"{len(exchanges)} replies with a turn of the user's behind them: "
          + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    require(counts["none"] < len(kinds), f"{config.data}: no turn behind a reply is feedback")

    # 3. other replies in place of the bad ones
    repaired = None
    if opened:
        bad = [i for i, kind in enumerate(kinds) if kind not in ("praise", "none")]
        several = sum(len(short[i].earlier) > 1 for i in bad)
        if several and knows_single_turns(opened[1].config):
            print(f"warning: {config.repair} knows single turns only, and {several} of {len(bad)} prompts "
                  "have several; --turns 1 keeps the last one")
        again = answers_again([short[i] for i in bad], config, opened, function) if bad else {}
        repaired = {bad[k]: text for k, text in again.items()}
        print(f"{len(repaired)} of {len(bad)} replies with bad feedback are repaired")

    # 4. files; the summary comes last: where it is, all are
    files = training_rows(short, kinds, repaired)
    for name, found in files.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        write_atomically(out / f"{name}.jsonl", text.encode())
    turns = Counter(turn["role"] for row in rows for turn in row.prompt)
    write_json(out / "summary.json", {
        "conversations": len(rows),
        "turns": {"user": turns["user"], "assistant": turns["assistant"]},
        "kinds": counts,
        "bad": len(kinds) - counts["none"] - counts["praise"],
        "repaired": None if repaired is None else len(repaired),
        "rows": {name: len(found) for name, found in files.items()},
        "config": asdict(config),
    })
    print(f"{out}: " + ", ".join(f"{len(found)} rows in {name}.jsonl" for name, found in files.items()))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
