"""The second embedded task: sums of several steps, written out, whose results and steps can be checked.

    12-7+7-8=?    ->    12-7=5; 5+7=12; 12-8=4; so 4

    python sums.py
    python sft.py --data runs/sums/demonstrations.jsonl --val-fraction 0 --steps 1200
    python grpo.py --data runs/sums/prompts.jsonl --reward-fn sums:right --lr 5e-4 --steps 250
    python evaluate.py --models runs/sft runs/grpo --data runs/sums/prompts_heldout.jsonl --judge sums:right

Right of 500 held-out sums at temperature 1 (2026-11-28, one thread of an Intel Xeon; --seed is that of the
files, of SFT, of GRPO and of the evaluation; processor seconds, on a machine that was busy otherwise; SFT had
--val-data runs/sums/demonstrations_heldout.jsonl in place of --val-fraction 0, which trains on the same):

    seed                            0         1         2
    SFT                             0.372     0.438     0.412
    GRPO                            0.936     0.976     0.954
    seconds of SFT, of GRPO         161, 128  179, 127  186, 130

With --calculator the steps are done by a calculator, sums:calculator, that answers in between, and the policy
has to ask for each of them: 12-7+7-8=? -> 12-7= -> 5 -> 5+7= -> 12 -> 12-8= -> 4 -> so 4. Right of the
held-out sums (seed 0, 2026-11-28; as above, but SFT of 300 steps and GRPO of 60): 0.402 and 0.936.

    python sums.py --calculator --hasty 0.4 --out runs/calculator
    python grpo.py --data runs/calculator/prompts.jsonl --reward-fn sums:right --tool sums:calculator

    python sums.py --steps-of runs/sft --out runs/steps

has a policy answer the same sums, --samples times each, and writes what process.py and reward.py learn from:
the replies in steps with a label for each (1 right, -1 wrong; those behind the first wrong one have none, as
in PRM800K, where people stop there), and, for the same replies, rankings that only know whether the result is
right. Replies that were cut off are left out.

It writes demonstrations, of which many have a wrong step, and prompts, each with a file of held-out sums
beside it, and the tokenizer. All rows have the answer in a field of their own. sums:right and sums:steps are
functions for --reward-fn and --judge; check_steps says of each step of a reply whether it is right.
sums:majority, as the --reward-fn of best_of_n.py, is a majority vote among the replies to a prompt.
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from checkers import value_of
from data import encode_prompt
from formats.model_folder import load_model
from formats.rows import Row
from formats.tokenizer import Tokenizer, train_bpe
from model import GPT
from plumbing.disk import folder_of, write_atomically
from plumbing.flags import Count, Fraction, Natural, Seed, require
from plumbing.hardware import pick_device
from plumbing.run import Alone, run_script
from rollout import Prompt, sample

# No partial sum of a prompt is above this.
LARGEST = 12
# Each of these is a token, and so are all bytes. Numbers are cut off from what stands around them.
TOKENS = [*map(str, range(10, 2 * LARGEST)), "=?", "; ", "; so "]
PIECES = r"[0-9]+|[^0-9]+"
# By how much a wrong step misses.
MISSES = (-2, -1, 1, 2)
# Share of the wrong steps whose result the next step goes on with. The others are forgotten again, and the
# reply ends right.
CARRIED = 0.8
WHOLE = r"-?[0-9]{1,9}"
# What stands between the steps of a reply. The blank behind it belongs to the next one.
SEPARATOR = ";"


# ---------------------------------------------------------------------------------------------------------
# Sums and their working

def draw_terms(count, rng):
    """The terms of a sum, [14, 4, -2]: no partial sum is below 0 or above LARGEST."""
    terms = [int(rng.integers(1, LARGEST + 1))]
    while len(terms) < count:
        total = sum(terms)
        fitting = [term for term in range(-9, 10) if term and 0 <= total + term <= LARGEST]
        terms.append(fitting[rng.integers(len(fitting))])
    return terms


def prompt_of(terms):
    """The prompt that asks for a sum."""
    return "".join([str(terms[0]), *(f"{term:+d}" for term in terms[1:])]) + "=?"


def asked_row(terms):
    """A sum as a row has it: its prompt and answer."""
    return {"prompt": prompt_of(terms), "answer": str(sum(terms))}


def terms_of(prompt):
    """The terms of the sum that a prompt asks for."""
    require(re.fullmatch(r"[0-9]{1,9}([+-][0-9]{1,9})+=\?", prompt),
            f"the task's prompts are of the kind 14+4-2=?, not {prompt[:60]!r}")
    return [int(term) for term in re.findall(r"[+-]?[0-9]+", prompt)]


def draw_sums(config):
    """{split: different sums, each a list of terms}. No sum is in both splits."""
    rng = np.random.default_rng([config.seed, 1])
    wanted = config.sums + config.heldout_sums
    drawn = {}
    # Where there are hardly more sums than are wanted, the last ones take many draws.
    for _ in range(20 * wanted):
        if len(drawn) == wanted:
            break
        terms = draw_terms(config.terms, rng)
        drawn[tuple(terms)] = terms
    require(len(drawn) == wanted,
            f"there are about {len(drawn)} different sums of --terms {config.terms}, and {wanted} are asked "
            "for (--sums and --heldout-sums)")
    sums = list(drawn.values())
    return {"heldout": sums[:config.heldout_sums], "train": sums[config.heldout_sums:]}


def draw_habits(terms, rng, wrong, hasty):
    """How many steps of a sum are done, and the number of the wrong one, from 1 on, or None."""
    count = rng.integers(1, len(terms) - 1) if hasty else len(terms) - 1
    missed = rng.integers(1, count + 1) if wrong else None
    return count, missed


def work_out(terms, rng, wrong=False, hasty=False):
    """The reply that works out a sum.

    wrong: one of its steps has a wrong result. hasty: it leaves out the last of them, or several.
    """
    count, missed = draw_habits(terms, rng, wrong, hasty)
    steps = []
    total = terms[0]
    for number, term in enumerate(terms[1:count + 1], 1):
        stated = total + term
        if number == missed:
            stated += int(rng.choice(MISSES))
        steps.append(f"{total}{term:+d}={stated}")
        carried = rng.random() < CARRIED
        total = stated if carried else total + term
    return "; ".join([*steps, f"so {total}"])


def talk_through(terms, rng, wrong=False, hasty=False):
    """The conversation that works out a sum: each step is asked of the calculator, which answers in between.

    wrong: one of the steps that are asked has a wrong term. hasty: as for `work_out`.
    """
    count, missed = draw_habits(terms, rng, wrong, hasty)
    messages = [{"role": "user", "content": prompt_of(terms)}]
    total = terms[0]
    for number, term in enumerate(terms[1:count + 1], 1):
        if number == missed:
            term += int(rng.choice(MISSES))
        messages.append({"role": "assistant", "content": f"{total}{term:+d}="})
        total += term
        messages.append({"role": "user", "content": str(total)})
    return [*messages, {"role": "assistant", "content": f"so {total}"}]


# ---------------------------------------------------------------------------------------------------------
# Checking replies

def result_of(reply):
    """What a reply comes to, behind the "so" at its end; None if it has none."""
    end = re.search(rf"\bso ({WHOLE})$", reply.strip())
    return end[1] if end else None


def right(replies, answers):
    """1 where a reply ends in "so" and the answer, else 0."""
    scores = []
    for reply, answer in zip(replies, answers):
        result = result_of(reply)
        scores.append(float(result == answer))
    return scores


def check_steps(prompt, reply):
    """[(step, whether it is right)] of a reply to a prompt of the task: its parts between semicolons.

    A step is right that adds the prompt's next term to what the step before it states, or ought to have
    stated, and comes to the right sum; at the end, one that says so. A wrong step makes no later step wrong,
    whether that goes on with the wrong result or not.
    """
    terms = terms_of(prompt)
    stated = true = terms[0]
    checked = []
    for number, step in enumerate(reply.strip().split(SEPARATOR), 1):
        step = step.strip()
        begin, equals, end = step.partition("=")
        if number < len(terms):
            term = terms[number]
            ways = (f"{stated}{term:+d}", f"{true}{term:+d}")
            whole = re.fullmatch(WHOLE, end)
            fine = begin in ways and whole is not None and value_of(begin) == value_of(end)
            true += term
            stated = int(end) if whole else true
        else:
            fine = number == len(terms) and step in (f"so {stated}", f"so {true}")
        checked.append((step, fine))
    return checked


def labelled_steps(prompt, reply):
    """(steps, labels) of a reply: its parts between semicolons as they are, and for each 1, right, or -1.

    Labels end with the first wrong step.
    """
    labels = []
    for _, fine in check_steps(prompt, reply):
        labels.append(1 if fine else -1)
        if not fine:
            break
    return reply.strip().split(SEPARATOR), labels


def steps(prompts, replies):
    """Share of right steps of each reply, see `check_steps`.

    Those that are missing count as wrong, and so do those that are too many.
    """
    shares = []
    for prompt, reply in zip(prompts, replies):
        checked = check_steps(prompt, reply)
        count = max(len(checked), len(terms_of(prompt)))
        shares.append(sum(fine for _, fine in checked) / count)
    return shares


def majority(prompts, replies):
    """The share of the replies to the same prompt, as far as they are given, that come to a reply's result; 0
    for one that comes to none. (Self-consistency: Wang et al. 2022.)
    """
    results = [(prompt, result_of(reply)) for prompt, reply in zip(prompts, replies)]
    counts = Counter(results)
    asked = Counter(prompts)
    return [counts[one] / asked[one[0]] if one[1] else 0.0 for one in results]


def calculator(replies):
    """For --tool: the value of each reply that asks for one (12-7=), ? if it can't be read, None behind "so".
    """
    answers = []
    for reply in replies:
        reply = reply.strip()
        value = value_of(reply.removesuffix("="))
        if re.search(rf"\bso {WHOLE}$", reply):
            answers.append(None)
        else:
            answers.append("?" if value is None else str(value))
    return answers


# ---------------------------------------------------------------------------------------------------------
# Writing files

@dataclass
class Config:
    out: str = "runs/sums"  # folder for the files
    terms: Annotated[int, ">= 3", "<= 9"] = 4  # how many numbers a sum adds up
    sums: Count = 8000  # different sums to train on, each with one demonstration
    heldout_sums: Count = 500  # different sums that are held out
    wrong: Fraction = 0.1  # share of the demonstrations that have a step with a wrong result
    hasty: Fraction = 0.5  # share of those that leave out the last steps
    calculator: bool = False  # demonstrations in which a calculator, sums:calculator, does the steps
    # checkpoint folder of a policy: write its replies in steps with labels, and as rankings, instead
    steps_of: str = ""
    samples: Count = 4  # replies to each sum, at temperature 1 (with --steps-of)
    max_new_tokens: Count = 40  # of a reply, at most (with --steps-of)
    seed: Seed = 0  # seed of the sums, of what is wrong with their demonstrations, and of samples
    # auto takes the first of cuda, mps, cpu that works
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    debug: bool = False  # show the traceback of an error


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, text.encode())


def write_sums(config, folder, splits):
    """Demonstrations and prompts of both splits, and the tokenizer."""
    folder_of(folder / "tokenizer.json")
    for split, end in (("train", ""), ("heldout", "_heldout")):
        rng = np.random.default_rng([config.seed, 2, split == "train"])
        prompts, demonstrations = [], []
        for terms in splits[split]:
            wrong, hasty = rng.random() < config.wrong, rng.random() < config.hasty
            asked = asked_row(terms)
            prompts.append(asked)
            if config.calculator:
                talk = talk_through(terms, rng, wrong, hasty)
                demonstrations.append({"messages": talk, "answer": asked["answer"]})
            else:
                reply = work_out(terms, rng, wrong, hasty)
                demonstrations.append(asked | {"completion": reply})
        write_rows(folder / f"demonstrations{end}.jsonl", demonstrations)
        write_rows(folder / f"prompts{end}.jsonl", prompts)
        print(f"{split}: {len(demonstrations)} demonstrations and prompts")
    # Where the tokenizer is, all files are.
    Tokenizer("sums", *train_bpe(TOKENS, 512, PIECES)).save(folder)


def write_labels(config, folder, splits):
    """Replies of --steps-of to the sums of both splits: in steps with labels, and as rankings by result."""
    if config.threads:
        torch.set_num_threads(config.threads)
    policy, tokenizer = load_model(config.steps_of, GPT)
    device = pick_device(config.device)
    policy.to(device).eval()
    folder_of(folder / "steps.jsonl")
    for split, end in (("heldout", "_heldout"), ("train", "")):
        labelled, rankings = [], []
        for asked, replies in answers_of(config, policy, tokenizer, splits[split], device):
            for reply in replies:
                parts, labels = labelled_steps(asked["prompt"], reply)
                labelled.append(asked | {"steps": parts, "labels": labels})
            ranks = [int(1 - one) for one in right(replies, [asked["answer"]] * len(replies))]
            # Replies that are all right, or all wrong, say nothing.
            if len(set(ranks)) == 2:
                rankings.append(asked | {"completions": replies, "ranks": ranks})
        write_rows(folder / f"rankings{end}.jsonl", rankings)
        write_rows(folder / f"steps{end}.jsonl", labelled)
        print(f"{split}: {len(labelled)} replies in steps, {len(rankings)} rankings")


def answers_of(config, policy, tokenizer, sums, device):
    """Yield (prompt and answer as in a row, the replies to it that ended) for sums, each a list of terms."""
    alone = Alone(device, torch.float32)
    generator = torch.Generator(device).manual_seed(config.seed)
    for start in range(0, len(sums), 64):
        asked, prompts = [], []
        for terms in sums[start:start + 64]:
            asked.append(asked_row(terms))
            turns = [{"role": "user", "content": prompt_of(terms)}]
            prompts.append(Prompt(Row(turns), encode_prompt(tokenizer, turns)))
        batch = sample(alone, policy, tokenizer, prompts, config.max_new_tokens, 1.0, generator,
                       per_prompt=config.samples)
        ended = batch.ended.tolist()
        for number, own in enumerate(asked):
            places = range(number * config.samples, (number + 1) * config.samples)
            yield own, [batch.texts[i].strip() for i in places if ended[i] and batch.texts[i].strip()]


def main(config):
    folder = Path(config.out)
    last = "steps.jsonl" if config.steps_of else "tokenizer.json"
    require(not (folder / last).exists(),
            f"--out {folder} already holds the task's files; name another folder or delete it")
    require(not folder.is_file(), f"--out {folder} is a file; name a folder")
    require(not (config.steps_of and config.calculator), "--calculator is for demonstrations")
    splits = draw_sums(config)
    write = write_labels if config.steps_of else write_sums
    write(config, folder, splits)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
