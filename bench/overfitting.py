"""When to stop SFT: where the validation loss is least, or where a reward model likes the replies best?

InstructGPT trains 16 epochs. Its models overfit in validation loss after one, and the checkpoint is chosen by
a reward model's score (section 3.5). So here: an SFT model of the embedded task learns 400 demonstrations of
more careful people for 16 epochs, and at each epoch's end come the validation loss, the score of a reward
model (`sft.py --judge`, which chooses the checkpoint) and the gold score, which chooses nothing.

    python bench/overfitting.py        the table, put into docs/sft.md, and bench/overfitting.png

What it starts from is that of bench/family.py (--out runs/family saves making it): for each seed the task's
files, an SFT model, and a reward model.
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
from bench.ablate import put  # noqa: E402
from bench.family import make_start, run_line  # noqa: E402
from data import collate, encode_group  # noqa: E402
from formats.model_folder import load_model  # noqa: E402
from formats.rows import Row  # noqa: E402
from model import ScalarModel, last_scores  # noqa: E402
from plumbing.disk import write_atomically  # noqa: E402
from plumbing.flags import Count  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from report import pyplot  # noqa: E402

EPOCHS = 16
# Shares of toy.KINDS among the demonstrations: more right ones than those that the start has seen.
CAREFUL = (0.7, 0.1, 0.08, 0.06, 0.03, 0.03)
# What is measured at each validation, and how the figure and the table call it.
MEASURED = {"val_loss": "validation loss", "rm_score": "reward model's score", "gold": "gold score"}


@dataclass
class Config:
    out: str = "runs/family"  # folder for files and models
    seeds: Count = 3  # of the demonstrations, their order and the replies
    demonstrations: Count = 400  # to train on
    groups: Count = 8000  # rankings of four replies for the reward model
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
# Runs

def write_demonstrations(path, world, split, count, seed):
    """Write demonstrations for so many of a split's prompts, one each."""
    rng = np.random.default_rng([seed, 21, split == "train"])
    texts = world.texts[split]
    lines = []
    for i in rng.permutation(len(texts))[:count]:
        kind = toy.KINDS[rng.choice(len(toy.KINDS), p=CAREFUL)]
        reply = toy.make_reply(toy.ITEM_OF[texts[i]], kind, rng)
        lines.append(json.dumps({"prompt": texts[i], "completion": reply}) + "\n")
    write_atomically(path, "".join(lines).encode())


def train(out, config, seed):
    """One run of 16 epochs. Returns {name: array over validations} of MEASURED, and of "epoch"."""
    start = out / f"seed-{seed}" / "start"
    make_start(start, seed, config.groups)
    run = out / f"seed-{seed}" / "overfitting"
    run.mkdir(exist_ok=True)
    world = toy.World(seed)
    write_demonstrations(run / "train.jsonl", world, "train", config.demonstrations, seed)
    write_demonstrations(run / "heldout.jsonl", world, "heldout", 508, seed)
    os.environ["REWARD_MODEL"] = f"{start}/reward"
    line = (f"sft.py --model {start}/sft --data {run}/train.jsonl --val-data {run}/heldout.jsonl "
            f"--epochs {EPOCHS} --batch-tokens 512 --lr 1e-3 --warmup 5 --eval-every 14 --save-every 14 "
            f"--judge bench.overfitting:rm_score toy:gold --judge-prompts 508 --seed {seed} "
            f"--threads 1 --resume --out {run}/model")
    run_line(line, run / "log.txt")
    rows = [json.loads(line) for line in (run / "model" / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "val_loss" in row]
    found = {name: np.array([row[name] for row in measured]) for name in MEASURED}
    steps = np.array([row["step"] for row in measured])
    found["epoch"] = EPOCHS * steps / steps[-1]
    # What sft.py itself kept as the best.
    named = json.loads((run / "model" / "checkpoints" / "latest.json").read_text())
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
            axes.plot(found["epoch"], found[what], color=f"C{seed}", lw=1.2, label=f"seed {seed}")
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
    runs = [train(out, config, seed) for seed in range(config.seeds)]
    text = table(runs)
    print(text)
    put("overfitting", text, "docs/sft.md")
    draw(plt, runs, ROOT / "bench" / "overfitting.png")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
