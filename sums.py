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

It writes demonstrations, of which many have a wrong step, and prompts, each with a file of held-out sums
beside it, and the tokenizer. All rows have the answer in a field of their own. sums:right and sums:steps are
functions for --reward-fn and --judge; check_steps says of each step of a reply whether it is right.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from checkers import value_of
from formats.tokenizer import Tokenizer, train_bpe
from plumbing.disk import folder_of, write_atomically
from plumbing.flags import Count, Fraction, Seed, require
from plumbing.run import run_script

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

def right(replies, answers):
    """1 where a reply ends in "so" and the answer, else 0."""
    scores = []
    for reply, answer in zip(replies, answers):
        end = re.search(rf"\bso ({WHOLE})$", reply.strip())
        scores.append(float(end is not None and end[1] == answer))
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
    for number, step in enumerate(reply.strip().split(";"), 1):
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
    seed: Seed = 0  # seed of the sums and of what is wrong with their demonstrations
    debug: bool = False  # show the traceback of an error


def main(config):
    folder = Path(config.out)
    require(not (folder / "tokenizer.json").exists(),
            f"--out {folder} already holds the task's files; name another folder or delete it")
    require(not folder.is_file(), f"--out {folder} is a file; name a folder")
    splits = draw_sums(config)
    folder_of(folder / "tokenizer.json")
    for split, end in (("train", ""), ("heldout", "_heldout")):
        rng = np.random.default_rng([config.seed, 2, split == "train"])
        prompts, demonstrations = [], []
        for terms in splits[split]:
            wrong, hasty = rng.random() < config.wrong, rng.random() < config.hasty
            asked = {"prompt": prompt_of(terms), "answer": str(sum(terms))}
            prompts.append(asked)
            if config.calculator:
                talk = talk_through(terms, rng, wrong, hasty)
                demonstrations.append({"messages": talk, "answer": asked["answer"]})
            else:
                reply = work_out(terms, rng, wrong, hasty)
                demonstrations.append(asked | {"completion": reply})
        for name, rows in (("demonstrations", demonstrations), ("prompts", prompts)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(folder / f"{name}{end}.jsonl", text.encode())
        print(f"{split}: {len(demonstrations)} demonstrations and prompts")
    # Where the tokenizer is, all files are.
    Tokenizer("sums", *train_bpe(TOKENS, 512, PIECES)).save(folder)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
