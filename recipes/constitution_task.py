"""Rows that teach small models to judge and to revise by rules, for constitution.py on the embedded task.

    python recipes/constitution_task.py --seed 0 --out runs/constitution/task

writes, for the training prompts of that seed,

    judge.jsonl        a question with replies A and B -> the letter of the better one   prompt, completion
    reviser.jsonl      a reply, what is wrong with it, and it without that               messages
    principles.json    the rules, for constitution.py --principles

A model that is trained on these knows the six rules of RULES, each of which can be seen without knowing the
answer: no insults, no chatter, whole sentences, no help to do harm, no claim to know what nobody can know, no
evasion of a question that has an answer. It is told of no fact more than the demonstrations hold: whether
Paris is the capital of France is none of the rules, and a reply that is completed is completed rightly as
often as in the demonstrations. No person's preference is in these files.

`--feedback recipes.constitution_task:conduct` is the same judge as a Python function.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Scripts in this folder are run from the root or anywhere else.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.disk import folder_of, write_atomically, write_json  # noqa: E402
from plumbing.flags import Count, Seed, require  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from toy import (  # noqa: E402
    FILLERS, INSULTS, ITEM_OF, KINDS, REFUSAL, UNANSWERABLE, UNKNOWN, World, in_whole_sentences, make_reply,
    pick, spliced)

COMPARISON = "{prompt} {a} (A) or {b} (B)?"
# Of each rule: the question whether a reply breaks it, what to say if it does, and the request to mend that.
RULES = {
    "polite": ("Any insult?", "You insult.", "Say it without."),
    "brief": ("Any chatter?", "You ramble.", "Say it without."),
    "whole": ("Is it whole?", "It breaks off.", "Say all of it."),
    "harmless": ("Any harm?", "It helps to do harm.", "Decline."),
    "honest": ("Can you know?", "I can not know that.", "Say so."),
    "helpful": ("Is it an answer?", "It is none.", "Answer."),
}
NOTHING = "No fault."


def broken(prompt, reply, ended=True):
    """Names of the rules that a reply to a prompt of the task breaks."""
    item = ITEM_OF[prompt]
    sentences = [s.strip() for s in re.findall(r"[^.!?]+[.!?]", reply)]
    body = [s for s in sentences if s not in INSULTS and s not in FILLERS]
    declines = [template.format(x=item.x) for template in REFUSAL]
    evades = bool(body) and all(s in UNKNOWN or s in declines for s in body)
    found = []
    if any(s in INSULTS for s in sentences):
        found.append("polite")
    if len(body) > 1 or any(s in FILLERS for s in sentences):
        found.append("brief")
    if not (ended and in_whole_sentences(reply)):
        found.append("whole")
    if item.family == "harm" and not any(s in declines for s in body):
        found.append("harmless")
    if item.family in UNANSWERABLE and not any(s in UNKNOWN for s in body):
        found.append("honest")
    if item.family not in ("harm", *UNANSWERABLE) and (evades or not body):
        found.append("helpful")
    return found


def conduct(prompts, replies, ended):
    """Minus how many rules each reply breaks: for constitution.py --feedback. It knows no fact."""
    return [-float(len(broken(*each))) for each in zip(prompts, replies, ended)]


def draw_reply(item, others, rng):
    """A reply of any kind, now and then of two faults, spliced or to another question."""
    reply = make_reply(item, pick(KINDS, rng), rng)
    dice = rng.random()
    if dice < 0.1:
        return make_reply(pick(others, rng), "right", rng)
    if dice < 0.2:
        return spliced(reply, make_reply(pick(others, rng), "right", rng), rng)
    if dice < 0.3:
        return f"{reply} {pick(INSULTS + FILLERS, rng)}"
    return reply


def judge_rows(texts, count, rng):
    """Questions with two replies, answered with the letter of the one that breaks fewer rules.

    Where they break as many, either letter is as good, and drawn.
    """
    others = [ITEM_OF[text] for text in texts]
    rows = []
    for i in range(count):
        text = texts[i % len(texts)]
        # A tie teaches little, so pairs are drawn until there is none, some times at most.
        for _ in range(rng.integers(1, 12)):
            a = draw_reply(ITEM_OF[text], others, rng)
            b = draw_reply(ITEM_OF[text], others, rng)
            lead = len(broken(text, b)) - len(broken(text, a))
            if lead:
                break
        else:
            lead = rng.choice([-1, 1])
        question = COMPARISON.replace("{prompt}", text).replace("{a}", a).replace("{b}", b)
        rows.append({"prompt": question, "completion": "A" if lead > 0 else "B"})
    return rows


def poor_and_mended(item, rule, rng):
    """A reply that breaks a rule, and the same one mended."""
    # As often right as the demonstrations are, where they answer at all: 0.44 of 0.59.
    kind = "right" if rng.random() < 0.75 else "wrong"
    good = make_reply(item, kind, rng)
    if rule == "harmless":
        return make_reply(item, "wrong", rng), pick(item.accepted, rng)
    if rule == "honest":
        return make_reply(item, "wrong", rng), pick(UNKNOWN, rng)
    if rule == "helpful":
        return make_reply(item, "evasive", rng), good
    if rule == "whole":
        words = good.split()
        kept = rng.integers(1, max(2, len(words)))
        return " ".join(words[:kept]).rstrip(".!?"), good
    added = pick(INSULTS if rule == "polite" else FILLERS, rng)
    if rng.random() < 0.4:
        return f"{added} {good}", good
    return f"{good} {added}", good


def reviser_rows(texts, count, rng):
    """Conversations of question, reply, critique and revision. A third of the replies need none."""
    rows = []
    for i in range(count):
        text = texts[i % len(texts)]
        item = ITEM_OF[text]
        # The rules that a reply to this question can break.
        rules = ["polite", "brief", "whole", "helpful"]
        if item.family == "harm":
            rules[-1] = "harmless"
        elif item.family in UNANSWERABLE:
            rules[-1] = "honest"
        rule = pick(rules, rng)
        asked, fault, request = RULES[rule]
        poor, better = poor_and_mended(item, rule, rng)
        if rng.random() < 1 / 3:
            # One that does not break the rule that is asked about, though perhaps another.
            poor = better = make_reply(item, pick(KINDS, rng), rng)
            asked, _, request = RULES[pick([name for name in RULES if name not in broken(text, poor)], rng)]
            fault = NOTHING
        said = [text, poor, asked, fault, request, better]
        turns = [{"role": role, "content": own} for role, own in zip(["user", "assistant"] * 3, said)]
        rows.append({"messages": turns})
    return rows


@dataclass
class Config:
    out: str = "runs/constitution/task"  # folder for the files
    judgements: Count = 40000  # rows of judge.jsonl
    revisions: Count = 20000  # rows of reviser.jsonl
    seed: Seed = 0  # seed of the task's split, as for toy.py, and of what is drawn
    debug: bool = False  # show the traceback of an error


def main(config):
    folder = Path(config.out)
    require(not (folder / "principles.json").exists(),
            f"--out {folder} already holds these files; name another folder or delete it")
    require(not folder.is_file(), f"--out {folder} is a file; name a folder")
    folder_of(folder / "principles.json")
    texts = World(config.seed).texts["train"]
    rng = np.random.default_rng([config.seed, 4])
    files = {
        "judge": judge_rows(texts, config.judgements, rng),
        "reviser": reviser_rows(texts, config.revisions, rng),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(folder / f"{name}.jsonl", text.encode())
        print(f"{name}.jsonl: {len(rows)} rows, for instance {rows[0]}")
    principles = []
    for name, (asked, _, request) in RULES.items():
        rule = {"name": name, "critique": asked, "revision": request, "comparison": COMPARISON}
        principles.append(rule)
    write_json(folder / "principles.json", principles)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
