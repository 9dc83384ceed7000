"""Prompts with several constraints whose keeping can be checked, and the checkers.

    python constraints.py --data runs/toy/prompts.jsonl --count 2 --out runs/constrained.jsonl

puts --count constraints in words behind each prompt ("Use at most 20 words. Do not use commas."), composed as
by He et al. 2024, "From complex to simple", and writes the prompts with the constraints, as JSON, in the
field answer. Those of a prompt never contradict each other: of twelve kinds each comes once at most. The
words to mention or to avoid are the prompt's own. constraints:kept is 1 where a reply keeps all,
constraints:share the share that it keeps; both go by the answer, and are for --reward-fn, --judge, and
--check of feedback.py.

    python grpo.py --data runs/constrained.jsonl --reward-fn constraints:share --judge constraints:kept
    python feedback.py --data talks.jsonl --repair runs/ppo --check constraints:kept

A reply without words keeps none of them, though there is no comma in it. Words are runs of letters and
digits, inner apostrophes and hyphens included, and are compared without regard to capitals. Left out: what
only a model can judge (style, tone, roles), and other languages than English: sentences end in . ! ? or with
a line, so abbreviations end them too.
"""
import functools
import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.sources import read_rows
from plumbing.disk import folder_of, write_atomically
from plumbing.flags import Count, Seed, require
from plumbing.run import run_script

OPENINGS = ("Well", "Sure", "Indeed", "Honestly")
ENDINGS = ("That is all", "I hope this helps", "Take care")
WORD = r"\w+(?:['’-]\w+)*"


# ---------------------------------------------------------------------------------------------------------
# The kinds

def plain(text):
    """A text in one of the ways to write its letters, and small ones."""
    return unicodedata.normalize("NFC", text).casefold()


def words_of(text):
    """The words of a text in small letters: runs of letters and digits, as in don't and well-known."""
    return re.findall(WORD, plain(text))


def sentences_in(text):
    """How many sentences a text has. They end in . ! ? before a blank, and with a line."""
    ends = r"[.!?…]+[\"'”’)\]]*(?:\s+|$)|[。！？]+|\n+"
    parts = re.split(ends, text)
    return sum(bool(words_of(part)) for part in parts)


def has_word(text, word):
    """Whether a text has a word, also as a part of one with a hyphen or an apostrophe."""
    return re.search(rf"(?<!\w){re.escape(plain(word))}(?!\w)", plain(text)) is not None


def bullets_in(text):
    """How many of a text's lines are bullet points."""
    return len(re.findall(r"^[ \t]*[-*•][ \t]+\S", text, re.M))


class Kind(NamedTuple):
    words: str  # what the prompt says; {} is the value
    kept: object  # function (reply, value) -> bool
    # What the value is drawn from: "numbers" (--words), "words" (of the prompt), or some values.
    values: object = (None,)


def begins_with(reply, word):
    return words_of(reply)[:1] == [plain(word)]


def ends_with(reply, words):
    end = words_of(words)
    return words_of(reply)[-len(end):] == end


KINDS = {
    "at_most": Kind("Use at most {} words.", lambda reply, n: len(words_of(reply)) <= n, "numbers"),
    "at_least": Kind("Use at least {} words.", lambda reply, n: len(words_of(reply)) >= n, "numbers"),
    "mentions": Kind("Mention the word {}.", has_word, "words"),
    "avoids": Kind("Do not use the word {}.", lambda reply, word: not has_word(reply, word), "words"),
    "one_sentence": Kind("Answer in one sentence.", lambda reply, _: sentences_in(reply) == 1),
    "begins_with": Kind("Begin with the word {}.", begins_with, OPENINGS),
    "ends_with": Kind("End with the words: {}.", ends_with, ENDINGS),
    "lower_case": Kind("Use small letters only.", lambda reply, _: not any(c.isupper() for c in reply)),
    "upper_case": Kind("Use capital letters only.", lambda reply, _: not any(c.islower() for c in reply)),
    "no_comma": Kind("Do not use commas.", lambda reply, _: not re.search("[,，、،]", reply)),
    "no_digit": Kind("Do not use digits.", lambda reply, _: not any(c.isdigit() for c in reply)),
    "bullets": Kind("Use exactly {} bullet points.", lambda reply, n: bullets_in(reply) == n, (2, 3, 4)),
}
# Kinds of which a prompt has one at most.
EITHER = ({"lower_case", "upper_case"}, {"one_sentence", "bullets"})


# ---------------------------------------------------------------------------------------------------------
# Drawing them

# Words that are in any question, and would be odd to ask for.
COMMON = frozenset("""a an the of to in on at for from with by as and or but not is are was were be been do
    does did can could would will shall may might must you your me my i we our us it its this that these those
    there what which who whom whose when where why how please tell name give write say""".split())


def topics_of(prompt):
    """The words of a prompt that it may be asked to mention or to avoid: of letters alone, each once."""
    found = dict.fromkeys(re.findall(WORD, prompt))
    return [word for word in found if word.isalpha() and len(word) > 2 and word.lower() not in COMMON]


def agree(chosen):
    """Whether one reply can keep all constraints [(kind, value)], of each kind one."""
    value = dict(chosen)
    if any(value.keys() >= kinds for kinds in EITHER):
        return False
    wanted = []
    for kind in ("mentions", "begins_with", "ends_with"):
        wanted += words_of(value.get(kind, ""))
    if "avoids" in value and plain(value["avoids"]) in wanted:
        return False
    # At worst a bullet point has a word that is none of those wanted.
    needed = max(value.get("at_least", 0), len(wanted) + value.get("bullets", 0))
    return needed <= value.get("at_most", needed)


def draw_constraints(prompt, kinds, count, numbers, rng):
    """count constraints [(kind, value)] for a prompt (text) that agree; None if there are not so many."""
    chosen = []
    for kind in rng.permutation(kinds).tolist():
        options = KINDS[kind].values
        if options == "numbers":
            options = numbers
        elif options == "words":
            options = topics_of(prompt)
        fitting = [value for value in options if agree([*chosen, (kind, value)])]
        if fitting and len(chosen) < count:
            chosen.append((kind, fitting[rng.integers(len(fitting))]))
    return chosen if len(chosen) == count else None


def in_words(chosen):
    """What a prompt says of its constraints [(kind, value)]."""
    return " ".join(KINDS[kind].words.format(value) for kind, value in chosen)


# ---------------------------------------------------------------------------------------------------------
# Checking replies

@functools.lru_cache(10_000)
def read_answer(answer):
    """The constraints [(kind, value)] that the answer of a row holds."""
    try:
        chosen = [(kind, value) for kind, value in json.loads(answer)]
    except (ValueError, TypeError):
        chosen = []
    require(chosen and all(kind in KINDS for kind, _ in chosen),
            f"an answer must hold constraints, as constraints.py writes them, got {answer[:60]!r}")
    return chosen


def share(replies, answers):
    """The share that each reply keeps of the constraints in its answer; 0 for a row without an answer."""
    shares = []
    for reply, answer in zip(replies, answers):
        if not answer or not words_of(reply):
            shares.append(0.0)
            continue
        chosen = read_answer(answer)
        held = [KINDS[kind].kept(reply, value) for kind, value in chosen]
        shares.append(sum(held) / len(held))
    return shares


def kept(replies, answers):
    """1 where a reply keeps all constraints in its answer, else 0."""
    return [float(own == 1) for own in share(replies, answers)]


# ---------------------------------------------------------------------------------------------------------
# Writing prompts

@dataclass
class Config:
    # files whose prompts are used: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/toy/prompts.jsonl"
    out: str = "runs/constrained.jsonl"  # file for the prompts with constraints
    count: Count = 2  # constraints of a prompt
    variants: Count = 1  # prompts made of each one, with constraints of their own
    # kinds to draw from, of those in the file's table (all of them)
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    # numbers of words that at_most and at_least are drawn from (20, 50 and 100)
    words: list[int] = field(default_factory=lambda: [20, 50, 100])
    skip_bad: bool = False  # leave out rows of --data that can't be read, at most one in a hundred
    seed: Seed = 0  # seed of the constraints
    debug: bool = False  # show the traceback of an error


def main(config):
    out = Path(config.out)
    require(out.suffix == ".jsonl", f"--out {out} must end in .jsonl")
    require(not out.exists(), f"--out {out} is there already; name another or delete it")
    for kind in config.kinds:
        require(kind in KINDS and config.kinds.count(kind) == 1,
                f"--kinds {kind} must be one of {', '.join(KINDS)}, and named once")
    require(min(config.words) > 0, f"--words {min(config.words)} must be above 0")
    rows = read_rows(config.data, "prompts", skip_bad=config.skip_bad)
    rng = np.random.default_rng(config.seed)
    found = []
    for row in rows:
        *before, last = row.prompt
        for _ in range(config.variants):
            chosen = draw_constraints(last["content"], config.kinds, config.count, config.words, rng)
            if chosen is None:
                continue
            text = f"{last['content']}\n{in_words(chosen)}"
            # As the readers take it: text, or turns where there are several.
            prompt = [*before, {"role": "user", "content": text}] if before else text
            found.append({"prompt": prompt, "answer": json.dumps(chosen)})
    require(found, f"--count {config.count}: no prompt of {config.data} can have as many of these kinds")
    left = len(rows) * config.variants - len(found)
    if left:
        print(f"left out {left}: there are no {config.count} constraints of these kinds that agree")
    replaced = sum(bool(row.answer) for row in rows)
    if replaced:
        print(f"warning: {replaced} prompts had an answer, which is no longer there")
    folder_of(out)
    write_atomically(out, "".join(json.dumps(row) + "\n" for row in found).encode())
    print(f"{out}: {len(found)} prompts, for instance {found[0]['prompt']!r:.200}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
