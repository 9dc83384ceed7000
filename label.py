"""Collect people's preferences on a page of this machine, see how they agree, and write them for training.

    python label.py --models runs/sft runs/ppo --data runs/toy/prompts_heldout.jsonl     two models, blind
    python label.py --data runs/best_of_n/rankings.jsonl                                 replies of a file
    python label.py --out runs/labels --by toy:gold                                      a function votes
    python label.py --out runs/labels --summary
    python label.py --out runs/labels --export

--ask says what is asked of a prompt's replies, which stand in an order drawn anew for each prompt:

    compare   two replies on a scale of --points (2, 5, 7 or 8) from "the left one by far" to "the right one"
    rank      2 to 9 replies from best to worst, some perhaps equal
    rate      a mark from 1 to 5 for each of --aspects of each reply
    steps     each step of a reply good, neutral or bad; --step-separator stands between them

and always a tie, both bad, both good, skip, a flag and a note. Every action is one key, and the page moves on
by itself. Undo takes back as many votes as one likes.

--out holds items.jsonl (what is asked) and votes-NAME.jsonl of every --annotator, one line for each action,
which is on the disk before the page says "saved". Nothing in it is ever changed: an undo is a line more.
Killed and started again, label.py goes on with the first item that has no vote, and so does a page that is
still open. A share --repeats of the items comes again later, turned round, unannounced.

--summary: share of repeats with the same answer; agreement of annotators (Cohen's kappa of two,
Krippendorff's alpha of all, ordinal); how often the reply further left, and the longer one, wins; how often
each model wins, and how many more votes would decide it if things go on as they are.

--export, files that train as they are:

    preferences.jsonl   reward.py, dpo.py       a scale, a ranking, a tie or a verdict on both, one row a vote
    labels.jsonl        kto.py                  the best good, the worst bad; of "both bad" or "good" all
    ratings.jsonl       aims.py                 marks by aspect
    steps.jsonl         process.py              labels of steps

Repeats are left out there, and what was skipped. A row has the annotator, and flag and note where there are.

--by FUNCTION votes instead of a person, as an annotator of its name: it is given the lists that a --reward-fn
of ppo.py is given, and its scores compare or rank the replies. So --summary tells how it agrees with people.
"""
import fcntl
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import uuid
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import wilson
from formats.model_folder import load_model
from formats.rows import Row
from formats.sources import read_rows, split_by_prompt
from judges import judge_texts, load_functions, short_names
from model import GPT
from plumbing.disk import digest, folder_of, model_digest, write_atomically, write_json
from plumbing.flags import (
    Count, Fraction, Natural, Positive, Seed, UserError, flag_of, parse_sources, require)
from plumbing.hardware import pick_device, pick_dtype
from plumbing.run import Alone, read_state, run_script
from plumbing.web import Refused, Server, page_of, serve, token_of
from rollout import load_prompts, sample

PAGE = Path(__file__).resolve().parent / "pages" / "label.html"
GAP = 5  # a repeat comes at the earliest after so many other items
MARKS = (1, 2, 3, 4, 5)  # of --ask rate
VERDICTS = ("tie", "both_bad", "both_good")
NOTE_LIMIT = 2000  # letters


@dataclass
class Config:
    # checkpoint folders whose replies are asked about, blind: --n of each to every prompt of --data
    models: list[str] = field(default_factory=list)
    # prompts for --models; without --models a file with replies: any that training reads, or a prompt and
    # completions
    data: str = ""
    out: str = "runs/labels"  # folder for items, votes and exports; one that has them goes on
    # what is asked, see above; auto: compare if there are two replies to each prompt, else rank
    ask: Literal["auto", "compare", "rank", "rate", "steps"] = "auto"
    points: Literal["2", "5", "7", "8"] = "7"  # of the scale of --ask compare; 2 and 8 have no middle
    # what --ask rate asks of each reply
    aspects: list[str] = field(default_factory=lambda: ["helpful", "honest", "harmless"])
    step_separator: str = r"\n"  # between the steps of --ask steps; \n is a newline
    rubric: str = ""  # text file that the page keeps at hand
    annotator: str = "me"  # who votes: letters, digits, dots, dashes
    by: str = ""  # a Python function, module:function, that votes on all that is asked, instead of the page
    until_done: bool = False  # end by itself when all items have a vote
    repeats: Fraction = 0.1  # share of the items that come again, turned round
    limit: Natural = 0  # prompts, or rows, that are drawn from --data, at most; 0: all
    summary: bool = False  # print what the votes say, and end
    export: bool = False  # write the votes as files for training, and end
    n: Count = 1  # replies of each of --models
    max_new_tokens: Count = 64  # longest reply, tokens
    # leave out prompts longer than this less --max-new-tokens, tokens; 0: the models' context
    max_length: Natural = 0
    temperature: Positive = 1.0  # of sampling
    part: str = ""  # of a file: one part of it, as in training (2/4/4:3)
    val_fraction: Fraction = 0.0  # of a file: leave out the prompts that training with this holds out
    skip_bad: bool = False  # leave out rows of --data that can't be read, at most one in a hundred
    seed: Seed = 0  # seed of the sampling, of the items' order and of the replies' places
    # auto takes the first of cuda, mps, cpu that works
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    host: str = "127.0.0.1"  # address to serve on; another one lets other machines in
    port: Natural = 8642  # port to serve on, 0: any that is free
    browser: bool = True  # open the page in a browser
    allow_pickle: bool = False  # also open pickled weights, which can run code; for folders you trust
    debug: bool = False  # show the traceback of an error


# ---------------------------------------------------------------------------------------------------------
# Items

class Choice(NamedTuple):
    """A prompt, and the replies that are asked about."""
    id: str
    prompt: list  # of turns, see `formats.rows.Row`
    replies: list  # of str
    models: list  # what each reply is by, [] where that isn't known


def make_choice(prompt, replies, models=()):
    """An `Choice`, known by what it says."""
    text = json.dumps([prompt, replies], sort_keys=True)
    return Choice(hashlib.sha256(text.encode()).hexdigest()[:16], prompt, list(replies), list(models))


def sampled_items(config):
    """[Choice] of replies by --models."""
    device = pick_device(config.device)
    names = short_names(config.models)
    replies = defaultdict(list)  # {prompt's number: replies}
    asked = []  # texts of the prompts
    for number, (path, name) in enumerate(zip(config.models, names)):
        model, tokenizer = load_model(path, GPT, allow_pickle=config.allow_pickle)
        alone = Alone(device, pick_dtype(config.dtype, device, model.config.n_embd))
        prompts = load_prompts(config, tokenizer, model.config.block_size, alone.say)
        texts = [prompt.row.text for prompt in prompts]
        asked = asked or texts
        require(texts == asked, f"{path} leaves out other prompts than the first of --models, as its context "
                                "is another; give --max-length")
        prompts = some_of(prompts, texts, config)
        generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + number)
        model.to(device).eval()
        for start in tqdm(range(0, len(prompts), 32), desc=f"replies of {name}", disable=None):
            batch = sample(alone, model, tokenizer, prompts[start:start + 32], config.max_new_tokens,
                           config.temperature, generator, per_prompt=config.n)
            for i, text in enumerate(batch.texts):
                replies[start + i // config.n].append(text)
    models = [name for name in names for _ in range(config.n)]
    return [make_choice(prompt.row.prompt, replies[i], models) for i, prompt in enumerate(prompts)]


def items_of_rows(config):
    """[Choice] of the rows of --data."""
    rows = read_rows(config.data, "replies", print, config.part, config.skip_bad)
    rows, _ = split_by_prompt(rows, config.val_fraction)
    rows = some_of(rows, [row.text + "".join(row.replies) for row in rows], config)
    return [make_choice(row.prompt, row.replies) for row in rows]


def some_of(rows, texts, config):
    """--limit of some rows, drawn by --seed, in their order; all if it is 0. texts: what each says."""
    if not 0 < config.limit < len(rows):
        return rows
    places = sorted(range(len(rows)), key=lambda i: hashed(config.seed, "limit", i, texts[i]))
    return [rows[i] for i in sorted(places[:config.limit])]


def in_steps(items, separator):
    """Each reply an item by itself, its steps in the place of replies; those of one step too."""
    made = []
    for item in items:
        for reply in item.replies:
            steps = [part for part in reply.split(separator) if part.strip()]
            if steps:
                made.append(make_choice(item.prompt, steps))
    return made


def sizes_fit(items, ask):
    """What of some items --ask can be asked of, and why the others can't, {reason: how many}."""
    least, most = {"compare": (2, 2), "rank": (2, 9), "rate": (1, 9), "steps": (1, 10**6)}[ask]
    kept, dropped, seen = [], Counter(), set()
    for item in items:
        if not least <= len(item.replies) <= most:
            dropped[f"not {least} to {most} replies" if least < most else f"not {least} replies"] += 1
        elif ask in ("compare", "rank") and len(set(item.replies)) == 1:
            dropped["all replies are the same"] += 1
        elif item.id in seen:
            dropped["twice"] += 1
        else:
            seen.add(item.id)
            kept.append(item)
    return kept, dropped


def find_items(config, folder):
    """(items, settings) of the folder, made if there are none. settings: what was asked when they were."""
    path = folder / "items.jsonl"
    given = {name: value for name, value in asdict(config).items() if name in ASKED}
    given["points"] = int(config.points)
    inputs = {"data": [digest(file for file, _ in parse_sources(config.data))] if config.data else [],
              "models": [model_digest(path) for path in config.models]}
    if path.exists():
        state = read_state(folder / "run.json")
        require(state, f"{folder} holds items.jsonl and no run.json: name another --out")
        changed = [name for name in ASKED if getattr(config, name) != getattr(Config(), name)
                   and given[name] != state["config"].get(name)]
        changed += [name for name in inputs if inputs[name] and inputs[name] != state["inputs_sha256"][name]]
        require(not changed, f"--out {folder} holds items that were made with other "
                             f"{', '.join(map(flag_of, changed))}: name another --out, or leave that out")
        try:
            return [Choice(**json.loads(line)) for line in path.read_bytes().splitlines()], state["config"]
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged; put a copy of it there, as votes are on its items, or name "
                            "another --out") from None
    require(config.data, f"{folder} holds no items yet: --data names prompts for --models, or replies")
    items = sampled_items(config) if config.models else items_of_rows(config)
    ask = config.ask
    if ask == "auto":
        ask = "compare" if {len(item.replies) for item in items} == {2} else "rank"
    if ask == "steps":
        items = in_steps(items, config.step_separator.replace(r"\n", "\n"))
    items, dropped = sizes_fit(items, ask)
    said = "".join(f"; left out {count}: {reason}" for reason, count in dropped.items())
    print(f"{len(items)} items to {ask}{said}")
    require(items, f"--data {config.data} has nothing to {ask}")
    lines = "".join(json.dumps(item._asdict()) + "\n" for item in items)
    folder_of(path)
    write_json(folder / "run.json", {"config": given | {"ask": ask}, "inputs_sha256": inputs})
    write_atomically(path, lines.encode())
    return items, given | {"ask": ask}


# What makes the items, and stays as it was when they were made.
ASKED = ("models", "data", "ask", "points", "aspects", "step_separator", "limit", "n", "max_new_tokens",
         "max_length", "temperature", "part", "val_fraction", "seed")


# ---------------------------------------------------------------------------------------------------------
# In which order

def hashed(*words):
    """A number in [0, 1) that depends on some words alone."""
    text = json.dumps(words).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2**48


def sequence(items, annotator, seed, repeats):
    """[(item's number, repeat: 0 or 1)]: what an annotator is asked, one after the other.

    A share of the items comes a second time, at least GAP items later.
    """
    order = sorted(range(len(items)), key=lambda i: hashed(seed, annotator, items[i].id))
    asked = []
    due = 0.0
    again = []  # what may come again, and hasn't
    for place, i in enumerate(order):
        if place > GAP:
            again.append(order[place - GAP - 1])
            due += repeats
        if due >= 1:
            due -= 1
            chosen = again.pop(int(len(again) * hashed(seed, annotator, "again", place)))
            asked.append((chosen, 1))
        asked.append((i, 0))
    return asked


def shown_order(item, annotator, seed, repeat):
    """[reply's number] from left to right. The second time they are turned round; steps keep their order."""
    order = sorted(range(len(item.replies)), key=lambda i: hashed(seed, annotator, item.id, i))
    return order[::-1] if repeat else order


# ---------------------------------------------------------------------------------------------------------
# The log of votes

class Votes:
    """An annotator's votes: a file of JSON lines that grows, and what it says now."""

    def __init__(self, folder, annotator, write=False):
        """UserError if a line is damaged, or another process writes to it. write: keep others from that."""
        self.path = folder / f"votes-{annotator}.jsonl"
        self.records, self.by_id = [], {}
        self.file = None
        if write:
            try:
                self.file = open(self.path, "a+b")
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path}: another label.py writes to it; end that one, or name another "
                                "--annotator") from None
            except OSError as error:
                raise UserError(f"{self.path} can't be written: {error.strerror}") from None
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data) and write:
            # A process that was killed while it wrote: nobody was told that this vote is saved.
            write_atomically(self.path.with_suffix(".torn"), data[whole:])
            self.file.truncate(whole)
            print(f"warning: {self.path}: its last line was torn, and is set aside in "
                  f"{self.path.with_suffix('.torn').name}")
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                self.take(record)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}:{number} is no vote; take that line out") from None

    def take(self, record):
        self.by_id[record["id"]] = record
        self.records.append(record)

    def append(self, record):
        """Write a record. When this returns it is on the disk; when it raises, the file is as before."""
        size = self.file.seek(0, os.SEEK_END)
        line = json.dumps(record).encode() + b"\n"
        try:
            self.file.write(line)
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(size)
            raise
        self.take(record)

    def live(self):
        """{(item, repeat): vote}, without those that were taken back, in the order in which they came."""
        undone = {record["undoes"] for record in self.records if "undoes" in record}
        kept = {}
        for record in self.records:
            if "undoes" not in record and record["id"] not in undone:
                kept[record["item"], record["repeat"]] = record
        return kept


def all_votes(folder):
    """{annotator: votes} of a folder."""
    paths = sorted(folder.glob("votes-*.jsonl"))
    names = [path.name.removeprefix("votes-").removesuffix(".jsonl") for path in paths]
    return {name: Votes(folder, name).live() for name in names}


# ---------------------------------------------------------------------------------------------------------
# What votes say: pairs (i, j), i < j, of replies as the item has them, and how much i is the better one

def lead_of(vote, points):
    """How much the left one of two leads, from -1 to 1, by a scale from 1, it by far, to points."""
    return (points + 1 - 2 * vote["value"]) / (points - 1)


def leads_of(vote, settings):
    """{(i, j): from -1 to 1} of a vote; {} if it compares nothing. A tie, both bad and both good are 0."""
    K = len(vote["shown"])
    pairs = list(itertools.combinations(range(K), 2))
    if vote.get("skipped") or settings["ask"] == "steps":
        return {}
    if "verdict" in vote:
        return dict.fromkeys(pairs, 0.0)
    if "value" in vote:
        lead = lead_of(vote, settings["points"])
        return {(0, 1): lead if vote["shown"][0] == 0 else -lead}
    if "ranks" in vote:
        return {(i, j): float(np.sign(vote["ranks"][j] - vote["ranks"][i])) for i, j in pairs}
    means = [np.mean(list(marks.values())) for marks in vote["ratings"]]
    return {(i, j): float(np.sign(means[i] - means[j])) for i, j in pairs}


def units_of(vote, settings):
    """{what was asked: answer} of a vote, numbers in order: marks, labels of steps, or the pairs'."""
    if vote.get("skipped"):
        return {}
    if "ratings" in vote:
        return {(i, aspect): mark
                for i, marks in enumerate(vote["ratings"]) for aspect, mark in marks.items()}
    if "labels" in vote:
        return {k: label for k, label in enumerate(vote["labels"]) if label is not None}
    return leads_of(vote, settings)


def cohen_kappa(one, other):
    """Agreement of two lists of answers beyond chance, 1 if there is no chance of another. Cohen 1960."""
    answers = sorted({*one, *other})
    table = np.zeros((len(answers), len(answers)))
    for a, b in zip(one, other):
        table[answers.index(a), answers.index(b)] += 1
    table /= table.sum()
    expected = (table.sum(0) * table.sum(1)).sum()
    return 1.0 if expected == 1 else float((np.trace(table) - expected) / (1 - expected))


def krippendorff_alpha(units):
    """Agreement of any number of annotators on numbers in order: the ordinal one of Krippendorff 2011.

    units: a list of answers for each thing that was asked; those with fewer than two don't count. None if
    none counts; 1 if all answers are the same.
    """
    units = [unit for unit in units if len(unit) > 1]
    if not units:
        return None
    values = sorted({value for unit in units for value in unit})
    place = {value: i for i, value in enumerate(values)}
    coincidences = np.zeros((len(values), len(values)))
    for unit in units:
        for a, b in itertools.permutations(unit, 2):
            coincidences[place[a], place[b]] += 1 / (len(unit) - 1)
    counts = coincidences.sum(0)  # (values,)
    # Between two values lie those between them, and half of each.
    upto = counts.cumsum() - counts / 2
    distance = (upto[:, None] - upto) ** 2
    expected = (np.outer(counts, counts) * distance).sum() / (counts.sum() - 1)
    return 1.0 if expected == 0 else float(1 - (coincidences * distance).sum() / expected)


def rate_of(wins, of):
    """{share, interval, of} of a number of trials, None without any."""
    if of == 0:
        return None
    return {"share": wins / of, "interval": list(wilson(wins / of, of)), "of": of}


def votes_to_decide(rate, votes):
    """How many more votes until the 95 % interval of a win rate leaves out 1/2, if the rate stays as it is.

    Wilson's interval leaves it out where n > (z / 2)^2 / (rate - 1/2)^2. None if it never does.
    """
    if rate == 0.5:
        return None
    return max(0, int((1.96 / 2) ** 2 / (rate - 0.5) ** 2) + 1 - votes)


def tally(items, settings, votes):
    """What --summary tells, as {name: value}. votes: {annotator: votes}, see `all_votes`."""
    by_id = {item.id: item for item in items}
    # Of a scale that one of them is better counts as an answer; alpha alone looks at how much.
    category = np.sign if settings["ask"] == "compare" else float
    annotators = {}
    answers = defaultdict(dict)  # {what was asked: {annotator: answer}}
    same, left, longer, wins = Counter(), Counter(), Counter(), defaultdict(Counter)
    for annotator, own in votes.items():
        own = {key: vote for key, vote in own.items() if key[0] in by_id}
        annotators[annotator] = counts_of(own.values())
        for (item, repeat), vote in own.items():
            units = units_of(vote, settings)
            if repeat:
                first = units_of(own[item, 0], settings) if (item, 0) in own else {}
                both = first.keys() & units.keys()
                same.update(category(first[unit]) == category(units[unit]) for unit in both)
                continue
            for unit, answer in units.items():
                answers[item, unit][annotator] = answer
            for (i, j), lead in leads_of(vote, settings).items():
                count_pair(by_id[item], vote, i, j, lead, left, longer, wins)
    kappa = {}
    for one, other in itertools.combinations(votes, 2):
        both = [(category(unit[one]), category(unit[other])) for unit in answers.values()
                if {one, other} <= unit.keys()]
        if both:
            kappa[f"{one}, {other}"] = {"kappa": cohen_kappa(*zip(*both)), "of": len(both)}
    return {
        "items": len(items),
        "annotators": annotators,
        "repeats": rate_of(same[True], same.total()),
        "left_wins": rate_of(left[True], left.total()),
        "longer_wins": rate_of(longer[True], longer.total()),
        "kappa": kappa,
        "alpha": krippendorff_alpha([list(unit.values()) for unit in answers.values()]),
        "wins": {f"{one} against {other}": win_rate(counts) for (one, other), counts in wins.items()},
    }


def counts_of(votes):
    """{what: how many} of an annotator's votes, and the median of the seconds that one takes."""
    kinds = Counter("skipped" if vote.get("skipped") else vote.get("verdict") for vote in votes)
    seconds = [vote["ms"] / 1000 for vote in votes if not vote.get("skipped")]
    counts = {"votes": len(votes), "flagged": sum(bool(vote.get("flagged")) for vote in votes)}
    return counts | {name: kinds[name] for name in ("skipped", *VERDICTS)} | {
        "seconds": float(np.median(seconds)) if seconds else None}


def win_rate(counts):
    """How often one of two wins, from {1: wins, 0: ties, -1: losses}; ties count half."""
    of = counts.total()
    rate = (counts[1] + counts[0] / 2) / of
    return {"wins": counts[1], "ties": counts[0], "losses": counts[-1], "rate": rate,
            "interval": list(wilson(rate, of)), "more": votes_to_decide(rate, of)}


def count_pair(item, vote, i, j, lead, left, longer, wins):
    """Add a pair's answer to the counts of a summary."""
    sign = int(np.sign(lead))
    if sign:
        i_is_left = vote["shown"].index(i) < vote["shown"].index(j)
        left[i_is_left == (sign > 0)] += 1
        letters = len(item.replies[i]) - len(item.replies[j])
        if letters:
            longer[(letters > 0) == (sign > 0)] += 1
    if item.models and item.models[i] != item.models[j]:
        # Each two models in one order.
        if item.models[i] > item.models[j]:
            i, j, sign = j, i, -sign
        wins[item.models[i], item.models[j]][sign] += 1


def described(summary):
    """A summary as lines of text."""
    lines = [f"{summary['items']} items"]
    for name, own in summary["annotators"].items():
        pace = "" if own["seconds"] is None else f", {own['seconds']:.1f} s each"
        lines.append(f"{name}: {own['votes']} votes{pace}; {own['tie']} ties, {own['both_bad']} both bad, "
                     f"{own['both_good']} both good, {own['skipped']} skipped, {own['flagged']} flagged")
    named = {"repeats": "the same answer when asked again", "left_wins": "the one further left wins",
             "longer_wins": "the longer one wins"}
    for name, words in named.items():
        if summary[name]:
            low, high = summary[name]["interval"]
            found = summary[name]
            lines.append(f"{words}: {found['share']:.2f} ({low:.2f} to {high:.2f}) of {found['of']}")
    for pair, own in summary["kappa"].items():
        lines.append(f"Cohen's kappa of {pair}: {own['kappa']:.2f} on {own['of']}")
    if summary["alpha"] is not None:
        lines.append(f"Krippendorff's alpha (ordinal): {summary['alpha']:.2f}")
    for pair, own in summary["wins"].items():
        low, high = own["interval"]
        more = own["more"]
        decided = ("undecided: even so far" if more is None else "decided" if more == 0
                   else f"about {more} more votes would decide it")
        lines.append(f"{pair}: {own['wins']} wins, {own['ties']} ties, {own['losses']} losses, "
                     f"{own['rate']:.2f} ({low:.2f} to {high:.2f}); {decided}")
    return lines


# ---------------------------------------------------------------------------------------------------------
# Votes as files for training

def exported(items, settings, votes):
    """{name of a file: its rows}."""
    files = {"preferences": [], "labels": [], "ratings": [], "steps": []}
    by_id = {item.id: item for item in items}
    for annotator, own in votes.items():
        for (item, repeat), vote in own.items():
            if repeat or vote.get("skipped") or item not in by_id:
                continue
            item = by_id[item]
            row = Row(item.prompt)
            common = {"prompt": row.text if len(item.prompt) == 1 else item.prompt}
            about = {"annotator": annotator}
            if vote.get("flagged"):
                about["flagged"] = True
            if vote.get("note"):
                about["note"] = vote["note"]
            for name, fields in rows_of(item, vote, settings):
                files[name].append(common | fields | about)
    return {name: rows for name, rows in files.items() if rows}


def rows_of(item, vote, settings):
    """Yield (name of a file, fields of a row) for a vote."""
    if "labels" in vote:
        yield "steps", {"steps": item.replies, "labels": vote["labels"]}
        return
    if "ratings" in vote:
        for reply, marks in zip(item.replies, vote["ratings"]):
            yield "ratings", {"completion": reply, "ratings": marks}
        return
    replies = {"completions": item.replies}
    verdict = vote.get("verdict")
    if verdict in ("both_bad", "both_good"):
        yield "preferences", replies | {"verdict": verdict}
        for reply in item.replies:
            yield "labels", {"completion": reply, "label": verdict == "both_good"}
        return
    if verdict == "tie":
        yield "preferences", replies | {"ranks": [0] * len(item.replies)}
        return
    ranks = vote.get("ranks")
    if ranks is None:
        points = settings["points"]
        lead = lead_of(vote, points)
        left, right = vote["shown"]
        # A file's scale goes up towards its first reply.
        value = points + 1 - vote["value"]
        if points == 2:
            ranks = [0, 0]
            ranks[right if lead > 0 else left] = 1
            yield "preferences", replies | {"ranks": ranks}
        else:
            shown = [item.replies[left], item.replies[right]]
            yield "preferences", {"completions": shown, "scale": {"value": value, "points": points}}
            ranks = [0, 0]
            ranks[left] = int(lead < 0)
            ranks[right] = int(lead > 0)
    else:
        yield "preferences", replies | {"ranks": ranks}
    if len(set(ranks)) > 1:
        for reply, rank in zip(item.replies, ranks):
            if rank in (min(ranks), max(ranks)):
                yield "labels", {"completion": reply, "label": rank == min(ranks)}


def export(folder, files):
    """Write the files of `exported`."""
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(folder / f"{name}.jsonl", lines.encode("utf-8", "replace"))
        print(f"{folder / name}.jsonl: {len(rows)} rows")
    require(files, f"{folder} has no votes to write yet")


# ---------------------------------------------------------------------------------------------------------
# The page

def is_whole(x, least, most):
    """Whether x is a whole number from least to most; True and False are none."""
    return type(x) is int and least <= x <= most


class Desk:
    """What the page asks of an annotator, and what it does with the answers."""

    def __init__(self, config, folder, items, settings):
        self.config, self.folder, self.items, self.settings = config, folder, items, settings
        self.votes = Votes(folder, config.annotator, write=True)
        self.seed = settings["seed"]
        self.asked = sequence(items, config.annotator, self.seed, config.repeats)
        self.rubric = ""
        if config.rubric:
            try:
                self.rubric = Path(config.rubric).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--rubric {config.rubric} can't be read: {error}") from None
        # Called when the last item has its vote.
        self.done = lambda: None
        self.routes = {"/begin": self.begin, "/next": self.next, "/vote": self.vote, "/undo": self.undo,
                       "/summary": self.summary}

    def begin(self, body):
        """What the page is for."""
        named = {name: self.settings[name] for name in ("ask", "aspects")}
        return named | {"points": self.settings["points"], "annotator": self.config.annotator,
                        "rubric": self.rubric, "marks": MARKS}

    def order(self, item, repeat):
        if self.settings["ask"] == "steps":
            return list(range(len(item.replies)))
        return shown_order(item, self.config.annotator, self.seed, repeat)

    def next(self, body):
        """The first item without a vote, None if there is none, and how far one is."""
        live = self.votes.live()
        done = sum((self.items[i].id, repeat) in live for i, repeat in self.asked)
        pace = counts_of(list(live.values())[-20:])["seconds"]
        progress = {"done": done, "of": len(self.asked), "seconds": pace}
        for item, repeat in self.open_entries():
            replies = [item.replies[at] for at in self.order(item, repeat)]
            entry = {"item": item.id, "repeat": repeat, "prompt": item.prompt, "replies": replies}
            return {"entry": entry, "progress": progress}
        return {"entry": None, "progress": progress}

    def open_entries(self):
        """Yield (item, repeat) of what is asked and has no vote."""
        live = self.votes.live()
        for i, repeat in self.asked:
            if (self.items[i].id, repeat) not in live:
                yield self.items[i], repeat

    def vote(self, body):
        """Save a vote, and say what comes next. The same vote once more changes nothing."""
        vote_id = self.id_of(body)
        if vote_id not in self.votes.by_id:
            item, repeat = self.entry_of(body)
            if (item.id, repeat) in self.votes.live():
                raise Refused(409, "this item has a vote already, perhaps from another tab; reload the page")
            self.votes.append({"v": 1, "id": vote_id, "item": item.id, "repeat": repeat,
                               "annotator": self.config.annotator, "shown": self.order(item, repeat)}
                              | self.answer_of(body, item, repeat)
                              | {"time": datetime.now(timezone.utc).isoformat(timespec="seconds")})
        state = self.next(body)
        if state["entry"] is None:
            self.done()
        return state

    def undo(self, body):
        """Take back the last vote that stands, and say what comes next, which is its item."""
        undo_id = self.id_of(body)
        if undo_id not in self.votes.by_id:
            live = list(self.votes.live().values())
            if not live:
                raise Refused(409, "there is no vote to take back")
            self.votes.append({"v": 1, "id": undo_id, "undoes": live[-1]["id"],
                               "annotator": self.config.annotator,
                               "time": datetime.now(timezone.utc).isoformat(timespec="seconds")})
        return self.next(body)

    def summary(self, body):
        """Lines on all votes so far."""
        return {"lines": described(tally(self.items, self.settings, all_votes(self.folder)))}

    def id_of(self, body):
        """What the page calls a vote, so that one that is sent twice is one."""
        vote_id = body.get("id")
        if not (isinstance(vote_id, str) and re.fullmatch(r"[A-Za-z0-9-]{8,64}", vote_id)):
            raise Refused(400, "a vote has an id of 8 to 64 letters and digits")
        return vote_id

    def entry_of(self, body):
        """(item, repeat) that a vote is on."""
        for i, repeat in self.asked:
            if self.items[i].id == body.get("item") and repeat == body.get("repeat"):
                return self.items[i], repeat
        raise Refused(409, "this item is not asked; reload the page")

    def answer_of(self, body, item, repeat):
        """The fields of a vote that say something, checked; those of replies in the item's own order."""
        note, ms = body.get("note", ""), body.get("ms")
        if not (isinstance(note, str) and len(note) <= NOTE_LIMIT and is_whole(ms, 0, 10**10)):
            raise Refused(400, f"a vote has a note of at most {NOTE_LIMIT} letters, and milliseconds")
        answer = {"ms": ms, "note": note, "flagged": body.get("flagged") is True}
        order = self.order(item, repeat)
        ask, K = self.settings["ask"], len(order)
        if body.get("skipped") is True:
            return answer | {"skipped": True}
        if body.get("verdict") in VERDICTS and ask in ("compare", "rank"):
            return answer | {"verdict": body["verdict"]}
        if ask == "compare" and is_whole(body.get("value"), 1, self.settings["points"]):
            return answer | {"value": body["value"]}
        if ask == "rank" and is_list(body.get("ranks"), K, lambda x: is_whole(x, 0, K - 1)):
            return answer | {"ranks": unshown(body["ranks"], order)}
        if ask == "rate" and is_list(body.get("ratings"), K, self.is_rating):
            return answer | {"ratings": unshown(body["ratings"], order)}
        if ask == "steps" and is_list(body.get("labels"), K, lambda x: x is None or is_whole(x, -1, 1)):
            return answer | {"labels": body["labels"]}
        raise Refused(400, f"this is no answer to {ask}")

    def is_rating(self, marks):
        aspects = self.settings["aspects"]
        return (isinstance(marks, dict) and list(sorted(marks)) == sorted(aspects)
                and all(is_whole(mark, MARKS[0], MARKS[-1]) for mark in marks.values()))


def vote_by(function, desk):
    """Have a `Function` vote on all that is asked: the higher score is better by far, equal ones tie."""
    ask = desk.settings["ask"]
    require(ask in ("compare", "rank"), f"--by compares or ranks, and can't be asked to {ask}")
    left = [(item, repeat) for item, repeat in desk.open_entries()]
    rows = [Row(item.prompt) for item, _ in left for _ in item.replies]
    replies = [reply for item, _ in left for reply in item.replies]
    scores = iter(judge_texts(function, rows, replies, [True] * len(replies)) if left else [])
    for item, repeat in tqdm(left, desc=function.name, disable=None):
        own = [next(scores) for _ in item.replies]
        shown = [own[at] for at in desk.order(item, repeat)]
        if len(set(shown)) == 1:
            said = {"verdict": "tie"}
        elif ask == "compare":
            said = {"value": 1 if shown[0] > shown[1] else desk.settings["points"]}
        else:
            levels = sorted(set(shown), reverse=True)
            said = {"ranks": [levels.index(score) for score in shown]}
        desk.vote({"id": uuid.uuid4().hex, "item": item.id, "repeat": repeat, "ms": 0} | said)


def is_list(x, length, fits):
    """Whether x is a list of so many things that fit."""
    return isinstance(x, list) and len(x) == length and all(map(fits, x))


def unshown(answers, order):
    """Answers from left to right, in the item's own order. order: `shown_order`."""
    own = [None] * len(order)
    for answer, at in zip(answers, order):
        own[at] = answer
    return own


def main(config):
    require(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", config.annotator),
            f"--annotator {config.annotator}: a name is of letters, digits, dots and dashes")
    require(len(set(config.aspects)) == len(config.aspects) <= 9 and all(config.aspects),
            "--aspects takes 1 to 9 names, each once")
    folder = Path(config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    require(not (config.summary or config.export) or (folder / "items.jsonl").exists(),
            f"{folder} holds no items.jsonl: --out names a folder that label.py has written to")
    items, settings = find_items(config, folder)
    if config.summary or config.export:
        votes = all_votes(folder)
        if config.summary:
            print("\n".join(described(tally(items, settings, votes))))
        if config.export:
            export(folder, exported(items, settings, votes))
        return
    if config.by:
        function, = load_functions("--by", [config.by])
        desk = Desk(replace(config, annotator=function.name), folder, items, settings)
        vote_by(function, desk)
        print(f"{len(desk.votes.live())} votes in {desk.votes.path}")
        return
    desk = Desk(config, folder, items, settings)
    server = Server(config.host, config.port, page_of(PAGE), desk.routes, token_of(folder))
    if config.until_done:
        # Not from the thread that serves, which would wait for itself.
        desk.done = lambda: threading.Thread(target=server.shutdown).start()
    serve(server, config.browser and sys.stdout.isatty())
    print(f"\n{len(desk.votes.live())} votes in {desk.votes.path}; --summary says what they say, --export "
          "writes them for training")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
