"""When to stop SFT: where the validation loss is least, or where a reward model likes the replies best?

InstructGPT trains 16 epochs. Its models overfit in validation loss after one, and the checkpoint is chosen by
a reward model's score (section 3.5). So here: a few hundred demonstrations of the embedded task, 16 epochs,
and at each validation the loss, the score of a reward model (`sft.py --judge`, which chooses the checkpoint)
and the gold score, which chooses nothing.

    python bench/overfitting.py        the table, put into docs/sft.md, and bench/overfitting.png: 8 minutes
                                       on one core

Before that it makes what is needed: a model pretrained on sentences of that world, without a question and its
answer side by side; and a reward model from rankings of another model's replies. Seeds draw the
demonstrations, their order and the replies.
"""
import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import toy  # noqa: E402
from bench.ablate import put, run_all  # noqa: E402
from data import collate, encode_group  # noqa: E402
from formats.model_folder import load_model  # noqa: E402
from formats.rows import Row  # noqa: E402
from model import ScalarModel, last_scores  # noqa: E402
from plumbing.disk import write_atomically  # noqa: E402
from plumbing.flags import Count  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from report import pyplot  # noqa: E402

EPOCHS = 16
COMMON = "--threads 1 --resume"
# What is measured at each validation, and how the figure and the table call it.
MEASURED = {"val_loss": "validation loss", "rm_score": "reward model's score", "gold": "gold score"}


@dataclass
class Config:
    out: str = "runs/overfitting"  # folder for files and models
    seeds: Count = 3  # of the demonstrations, their order and the replies
    demonstrations: Count = 400  # of those that toy.py writes
    debug: bool = False  # show the traceback of an error


# ---------------------------------------------------------------------------------------------------------
# The judge

@functools.cache
def reward_model():
    """What the environment names: (model, tokenizer)."""
    model, tokenizer = load_model(os.environ["REWARD_MODEL"], ScalarModel)
    return model.eval(), tokenizer


def rm_score(prompts, replies, ended):
    """The reward model's score of each reply: for --judge bench.overfitting:rm_score."""
    model, tokenizer = reward_model()
    examples = []
    for prompt, reply, finished in zip(prompts, replies, ended):
        example, = encode_group(tokenizer, Row(toy.ask_for(prompt), [reply], [0]))
        # The end token stands behind every encoded reply. This one never came to it.
        length = len(example.ids) if finished else len(example.ids) - 1
        examples.append((example.ids[:length], example.mask[:length]))
    ids, _, lengths = collate(examples, tokenizer.pad, "cpu")
    return last_scores(model, ids, lengths)


# ---------------------------------------------------------------------------------------------------------
# Files and runs

def write_sentences(path):
    """What is read in pretraining: questions and right answers, each on its own."""
    texts = toy.INSULTS + toy.FILLERS
    for item in toy.ITEMS:
        texts += item.wordings + item.accepted
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    write_atomically(path, "".join(lines).encode())


def draw_demonstrations(task, path, count, seed):
    """Write so many of the task's demonstrations."""
    lines = (task / "demonstrations.jsonl").read_text().splitlines(keepends=True)
    chosen = np.random.default_rng([seed, 21]).permutation(len(lines))[:count]
    write_atomically(path, "".join(lines[i] for i in chosen).encode())


def make_start(out):
    """The task's files, a pretrained model and a reward model, where they are not there yet."""
    task = out / "toy"
    if not (task / "tokenizer.json").exists():
        run_all([("the task's files", f"toy.py --out {task} --groups 300 --threads 1")], 1)
    write_sentences(out / "sentences.jsonl")
    demonstrations = f"--data {task}/demonstrations.jsonl --val-data {task}/demonstrations_heldout.jsonl"
    run_all([
        ("pretraining", f"sft.py --data {out}/sentences.jsonl --tokenizer {task} --val-fraction 0 "
                        f"--steps 250 {COMMON} --out {out}/pretrained"),
        ("a model to ask", f"sft.py {demonstrations} --steps 600 --eval-every 300 {COMMON} --out {out}/sft"),
    ], 1)
    if not (out / "preferences" / "train.jsonl").exists():
        run_all([("rankings", f"toy.py --model {out}/sft --out {out}/preferences --groups 8000 "
                              "--heldout-groups 500 --threads 1")], 1)
    run_all([("the reward model",
              f"reward.py --model {out}/sft --data {out}/preferences/train.jsonl "
              f"--val-data {out}/preferences/heldout.jsonl "
              f"--demonstrations {task}/demonstrations.jsonl --epochs 1 {COMMON} --out {out}/reward")], 1)


def train(out, config, seed):
    """One run of 16 epochs. Returns {name: array over validations} of MEASURED, and of "epoch"."""
    task, run = out / "toy", out / f"seed-{seed}"
    draw_demonstrations(task, out / f"demonstrations-{seed}.jsonl", config.demonstrations, seed)
    line = (f"sft.py --model {out}/pretrained --data {out}/demonstrations-{seed}.jsonl "
            f"--val-data {task}/demonstrations_heldout.jsonl --epochs {EPOCHS} --batch-tokens 512 "
            f"--lr 2e-3 --warmup 10 --eval-every 14 --save-every 14 "
            f"--judge bench.overfitting:rm_score toy:gold --judge-prompts 508 --seed {seed} {COMMON} "
            f"--out {run}")
    run_all([(f"{EPOCHS} epochs, seed {seed}", line)], 1)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "val_loss" in row]
    found = {name: np.array([row[name] for row in measured]) for name in MEASURED}
    steps = np.array([row["step"] for row in measured])
    found["epoch"] = EPOCHS * steps / steps[-1]
    # What sft.py itself kept as the best.
    named = json.loads((run / "checkpoints" / "latest.json").read_text())
    found["kept"] = int(named["best"].removeprefix("step_"))
    found["step"] = steps
    return found


# ---------------------------------------------------------------------------------------------------------
# Table and figure

def choices(found):
    """{how a checkpoint is chosen: its number among the validations}."""
    return {
        "least validation loss": int(found["val_loss"].argmin()),
        "best by the reward model (`--judge`)": found["step"].tolist().index(found["kept"]),
        f"after {EPOCHS} epochs": len(found["step"]) - 1,
    }


def cell(own):
    """A mean over seeds; if there are several, the smallest and the largest too."""
    bounds = f" ({own.min():.2f} to {own.max():.2f})" if len(own) > 1 else ""
    return f"{own.mean():.2f}{bounds}"


def table(runs):
    """Markdown."""
    lines = [
        "| checkpoint | epochs | " + " | ".join(MEASURED.values()) + " |",
        "|---" * (len(MEASURED) + 2) + "|",
    ]
    for name in choices(runs[0]):
        cells = []
        for what in ("epoch", *MEASURED):
            cells.append(cell(np.array([found[what][choices(found)[name]] for found in runs])))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(plt, runs, path):
    """A panel for each number, a line for each seed, and where each would stop."""
    figure, panels = plt.subplots(1, len(MEASURED), figsize=(12, 3.4), constrained_layout=True)
    for axes, (what, title) in zip(panels, MEASURED.items()):
        for seed, found in enumerate(runs):
            # Before the first step nothing has been learned of how to answer.
            axes.plot(found["epoch"][1:], found[what][1:], color=f"C{seed}", lw=1.2, label=f"seed {seed}")
            least, liked, _ = choices(found).values()
            axes.plot(found["epoch"][least], found[what][least], "v", color=f"C{seed}", ms=8)
            axes.plot(found["epoch"][liked], found[what][liked], "*", color=f"C{seed}", ms=12)
        axes.set(title=title, xlabel="epochs")
    panels[1].plot([], [], "kv", ms=8, label="least validation loss")
    panels[1].plot([], [], "k*", ms=12, label="best by the reward model")
    panels[1].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(config):
    # If it is missing, that is said now.
    plt = pyplot()
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["REWARD_MODEL"] = f"{out}/reward"
    make_start(out)
    runs = [train(out, config, seed) for seed in range(config.seeds)]
    text = table(runs)
    print(text)
    put("overfitting", text, "docs/sft.md")
    draw(plt, runs, ROOT / "bench" / "overfitting.png")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
