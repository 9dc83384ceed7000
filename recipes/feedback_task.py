"""A user of the embedded task who says now and then what they think of a reply, for recipes/feedback.sh.

    python recipes/feedback_task.py --stage talk --data runs/toy/prompts.jsonl --out runs/feedback/talks.jsonl

talk asks a policy for replies and writes conversations: questions and replies, up to --questions of them. The
user knows the truth, and is pleased with a reply whose gold score is above a half and that keeps its prompt's
constraints. They react to a share of the replies only (--reacting), and some of their reactions (--wrong) are
those that the reply did not earn. A reaction ends the conversation; else the next question follows, or small
talk. Field truth of a row has the kind of each turn behind a reply, which feedback.py does not read.

    python recipes/feedback_task.py --stage measure --data runs/feedback/talks.jsonl

measure prints how often feedback.py's rules agree with that. The phrases below were written before the rules
were, and the rules were not fitted to them.

    python recipes/feedback_task.py --stage demonstrations --data constrained.jsonl --out runs/feedback/task

demonstrations takes prompts of constraints.py, leaves out those that no right reply can keep, and writes the
others (prompts.jsonl), replies to them by somebody who doesn't read constraints (careless.jsonl) and by
somebody who does (careful.jsonl). gold is toy:gold for prompts with constraints.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

# Scripts in this folder are run from the root or anywhere else.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import constraints  # noqa: E402
import toy  # noqa: E402
from data import encode_prompt  # noqa: E402
from formats.model_folder import load_model  # noqa: E402
from formats.sources import read_rows  # noqa: E402
from model import GPT  # noqa: E402
from plumbing.disk import folder_of, write_atomically  # noqa: E402
from plumbing.flags import Count, Fraction, Seed, require  # noqa: E402
from plumbing.hardware import pick_device  # noqa: E402
from plumbing.run import Alone, run_script  # noqa: E402
from reactions import KINDS, exchanges_of, kind_of  # noqa: E402
from rollout import Prompt, sample  # noqa: E402

# What the user says. {y}: the answer; {again}: the question in other words.
PHRASES = {
    "praise": [
        "That was just what I was after.", "Lovely, cheers.", "Spot on!", "You got it.",
        "Many thanks for that.", "Yes, precisely.", "Brilliant, I will write it down.",
        "That does the trick.", "Thank you ever so much.", "Good, that is settled then.",
    ],
    "complain": [
        "I don't think so.", "You are off there.", "Hmm, that can't be it.", "This is of no use to me.",
        "That isn't an answer.", "Nonsense, if you ask me.", "You have got this mixed up.",
        "What a poor reply.", "That is not very helpful.", "Sorry, but this is wrong.",
    ],
    "correct": [
        "It ought to be {y}.", "My book says {y}.", "I would have said {y}.", "{y} would have been right.",
        "No, {y}.", "No, the right one is {y}.", "It should have been {y}.", "Actually it is {y}.",
    ],
    "clarify": [
        "Could you say a little more about that?", "I am not sure I follow.", "How do you mean?",
        "Please spell it out.", "What is that supposed to mean?", "Can you explain that?",
        "I don't quite understand.", "Are you certain?",
    ],
    "repeat": [
        "{again}", "Once again: {again}", "I will put it another way. {again}", "Let me ask again: {again}",
        "I asked you something. {again}",
    ],
    "none": [
        "Okay.", "I see.", "Let us move on.", "Right, my next question will take a moment.",
        "Hang on, the phone is ringing.", "My cat is called Perfect.", "There is no rain today.",
        "I have to write a thank you letter.",
    ],
}
# How often a user who is not pleased reacts in each of the four ways.
DISPLEASED = {"repeat": 0.25, "correct": 0.25, "complain": 0.3, "clarify": 0.2}
# Share of the turns without a reaction that are small talk; the others are the next question.
SMALL_TALK = 0.2


def question_of(prompt):
    """The question of a prompt that may have constraints behind it."""
    return prompt.partition("\n")[0]


def gold(prompts, replies, ended):
    """The gold score of each reply, whatever the constraints: for --judge recipes.feedback_task:gold."""
    return toy.gold([question_of(prompt) for prompt in prompts], replies, ended)


def is_pleased(prompt, reply, answer):
    """Whether the user is: the reply is right, and keeps the prompt's constraints, if it has any (answer)."""
    right = gold([prompt], [reply], [True])[0] > 0.5
    return right and (not answer or constraints.kept([reply], [answer])[0] == 1)


def react(prompt, pleased, rng):
    """(kind, text) of a reaction to a reply."""
    item = toy.ITEM_OF[question_of(prompt)]
    kind = "praise"
    if not pleased:
        kind = rng.choice(list(DISPLEASED), p=list(DISPLEASED.values()))
        # Of what nobody can know there is nothing to put right.
        if kind == "correct" and not item.y:
            kind = "complain"
    others = [wording for wording in item.wordings if wording != question_of(prompt)]
    again = toy.pick(others, rng) + prompt[len(question_of(prompt)):]
    text = toy.pick(PHRASES[kind], rng).format(y=item.y, again=again)
    return str(kind), text


def converse(asked, config, rng):
    """Turns of a conversation, and the kind of each of the user's turns but the first.

    asked: [(prompt, reply, answer)], as many as the user asks if nothing ends it before.
    """
    turns, truth = [], []
    for number, (prompt, reply, answer) in enumerate(asked):
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        last = number + 1 == len(asked)
        if rng.random() < config.reacting:
            pleased = is_pleased(prompt, reply, answer) != (rng.random() < config.wrong)
            kind, text = react(prompt, pleased, rng)
        elif last or rng.random() < SMALL_TALK:
            kind, text = "none", toy.pick(PHRASES["none"], rng)
        else:
            # The next question is the turn behind this reply.
            truth.append("none")
            continue
        turns.append({"role": "user", "content": text})
        return turns, truth + [kind]


def sampled_replies(config):
    """[(prompt, reply, answer)], --samples of a policy's replies to each prompt of --data."""
    rows = read_rows(config.data, "prompts")
    device = pick_device(config.device)
    model, tokenizer = load_model(config.model, GPT)
    model.to(device).eval()
    alone = Alone(device, torch.float32)
    generator = torch.Generator(device).manual_seed(config.seed)
    prompts = [Prompt(row, encode_prompt(tokenizer, row.prompt)) for row in rows]
    found = []
    for start in range(0, len(prompts), 64):
        batch = sample(alone, model, tokenizer, prompts[start:start + 64], 40, 1.0, generator,
                       per_prompt=config.samples)
        for prompt, reply in zip(batch.prompts, batch.texts):
            if reply.strip():
                found.append((prompt.row.text, reply.strip(), prompt.row.answer))
    return found


def talk(config):
    """Conversations of the user with a policy, as rows."""
    replies = sampled_replies(config)
    rng = np.random.default_rng([config.seed, 7])
    order = rng.permutation(len(replies))
    rows = []
    # A question begins one conversation, and may come up later in some others.
    for first in order:
        others = rng.integers(len(replies), size=config.questions - 1)
        asked = [replies[i] for i in (first, *others)]
        turns, truth = converse(asked, config, rng)
        # The answer is that of the one question that there is.
        answer = asked[0][2] if config.questions == 1 else ""
        rows.append({"messages": turns, "truth": truth} | ({"answer": answer} if answer else {}))
    return rows


def measure(config):
    """Print how often the rules find what the user meant, and how often they are right where they say so."""
    truth = []
    for line in Path(config.data).read_text().splitlines():
        truth += json.loads(line)["truth"]
    exchanges = exchanges_of(read_rows(config.data, "prompts"))
    found = [kind_of(own.reply, own.reaction, own.earlier) for own in exchanges]
    require(len(found) == len(truth), f"{config.data}: {len(truth)} truths and {len(found)} turns")
    print(f"{'kind':>10}{'turns':>8}{'found':>8}{'precision':>11}{'recall':>8}")
    for kind in (*KINDS, "none"):
        said = [own == kind for own in found]
        meant = [own == kind for own in truth]
        both = sum(a and b for a, b in zip(said, meant))
        print(f"{kind:>10}{sum(meant):8}{sum(said):8}{both / max(1, sum(said)):11.3f}"
              f"{both / max(1, sum(meant)):8.3f}")
    # What the labels say is all that kto.py learns of it.
    said, meant = [[{"praise": 1, "none": 0}.get(kind, -1) for kind in own] for own in (found, truth)]
    both = sum(a == b != 0 for a, b in zip(said, meant))
    said, meant = sum(map(abs, said)), sum(map(abs, meant))
    print(f"{'label':>10}{meant:8}{said:8}{both / said:11.3f}{both / meant:8.3f}")


def demonstrations(config):
    """{name of a file: its rows} of prompts with constraints."""
    rng = np.random.default_rng([config.seed, 8])
    files = {"prompts": [], "careless": [], "careful": []}
    for row in read_rows(config.data, "prompts"):
        item = toy.ITEM_OF[question_of(row.text)]
        fitting = [reply for reply in item.accepted if constraints.kept([reply], [row.answer])[0] == 1]
        if not fitting:
            continue
        files["prompts"].append({"prompt": row.text, "answer": row.answer})
        for _ in range(config.samples):
            kind = toy.KINDS[rng.choice(len(toy.KINDS), p=toy.DEMONSTRATIONS)]
            files["careless"].append({"prompt": row.text, "completion": toy.make_reply(item, kind, rng)})
            files["careful"].append({"prompt": row.text, "completion": toy.pick(fitting, rng)})
    require(files["prompts"], f"{config.data}: no right reply keeps the constraints of any prompt")
    return files


@dataclass
class Config:
    # talk: conversations with a simulated user; measure: the rules against what it meant; demonstrations: of
    # prompts with constraints
    stage: Literal["talk", "measure", "demonstrations"] = "talk"
    model: str = "runs/sft"  # checkpoint folder of the policy that the user talks to
    data: str = "runs/toy/prompts.jsonl"  # file of prompts; for measure of conversations
    out: str = "runs/feedback/talks.jsonl"  # file for the conversations; for demonstrations a folder
    samples: Count = 8  # replies to each prompt, of the policy or of those who demonstrate
    questions: Count = 3  # questions of a conversation at most
    reacting: Fraction = 0.4  # share of the replies to which the user reacts
    wrong: Fraction = 0.1  # share of the reactions that the reply did not earn
    seed: Seed = 0  # seed of the sampling and of the user
    # auto takes the first of cuda, mps, cpu that works
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    debug: bool = False  # show the traceback of an error


def write_rows(path, rows):
    folder_of(path)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, text.encode())
    print(f"{path}: {len(rows)} rows")


def main(config):
    if config.stage == "measure":
        measure(config)
        return
    require(not Path(config.out).exists(), f"--out {config.out} is there already; name another or delete it")
    if config.stage == "talk":
        write_rows(config.out, talk(config))
    else:
        for name, rows in demonstrations(config).items():
            write_rows(Path(config.out) / f"{name}.jsonl", rows)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
