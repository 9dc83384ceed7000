"""Solutions of models to problems, with the first wrong step marked, from the champ-dataset package.

    pip install champ-dataset
    python recipes/champ_task.py --out runs/champ
    python process.py --data runs/champ/steps.jsonl --val-fraction 0.2 --model MODEL --out runs/champ/process
    python recipes/champ_task.py --measure runs/champ/process --out runs/champ

steps.jsonl has rows {"prompt", "steps", "labels"}: 540 solutions to 270 problems. A step is a line of a
solution that isn't blank. Those before the line in which the marked part begins are good, that line is bad,
and those behind it have no label; where nothing is marked all are good.

--measure reads the rows of --out that process.py held out (--val-fraction as there) and asks the model which
line of a wrong solution, those behind the error too, is the least likely good: how often that is the first
wrong one, beside chance, and beside the n-th line of each, with the n that is best for these solutions.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

# Scripts in this folder are run from the root or anywhere else.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from formats.model_folder import load_model  # noqa: E402
from formats.sources import read_rows, split_by_prompt  # noqa: E402
from model import ScalarModel  # noqa: E402
from plumbing.disk import folder_of, write_atomically  # noqa: E402
from plumbing.flags import Fraction, UserError, require  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from process import encode_steps  # noqa: E402


def load_problems():
    """The problems of the package's file, each {"_text", "fws_annotations": {name: annotation}}."""
    try:
        import champ_dataset
    except ImportError:
        raise UserError("the problems are those of champ_dataset, which is not installed: "
                        "pip install champ-dataset") from None
    text = (Path(champ_dataset.__file__).parent / "dataset_files/v0.json").read_text("utf-8")
    return json.loads(text)["problems"].values()


def row_of(problem, annotation):
    """The row of a solution {"text", "start_idx": where the first wrong step begins, or None}."""
    text, start = annotation["text"], annotation["start_idx"]
    if start is not None:  # what is marked may begin with the end of the line before
        start += len(text[start:]) - len(text[start:].lstrip())
    steps, labels, at = [], [], 0
    for line in text.split("\n"):
        end = at + len(line)
        if line.strip():
            steps.append(line)
            if start is None or end <= start:
                labels.append(1)
            elif at <= start:
                labels.append(-1)
        at = end + 1
    return {"prompt": problem["_text"], "steps": steps, "labels": labels}


@torch.no_grad()
def probabilities(model, tokenizer, row):
    """P(good) (S,) of all steps of a Row; None if it is too long, or two of them end in one token."""
    row.labels = [1] * len(row.steps)
    encoded = encode_steps(tokenizer, row, "\n")
    if encoded is None or sum(encoded.mask) < len(row.steps) or len(encoded.ids) > model.config.block_size:
        return None
    ends = torch.tensor(encoded.mask).nonzero().flatten()
    return model(torch.tensor([encoded.ids]), ends).float().softmax(1)[:, 2]


def found_first(good, errors):
    """{rule: share of wrong solutions whose first wrong step it names}.

    good: P(good) of all steps (S,) of each solution; errors: the number of its first wrong step.
    """
    least = sum(int(own.argmin()) == error for own, error in zip(good, errors))
    chance = sum(1 / len(own) for own in good)
    n = max(errors, key=errors.count)
    hits = {"the least P(good)": least, "chance": chance, f"line {n + 1} of each": errors.count(n)}
    return {rule: count / len(errors) for rule, count in hits.items()}


def measure(config):
    """Print what the head of this file says of the model --measure."""
    model, tokenizer = load_model(config.measure, ScalarModel, labels=3)
    rows = split_by_prompt(read_rows(f"{config.out}/steps.jsonl", "steps"), config.val_fraction)[1]
    wrong = [(row, row.labels.index(-1)) for row in rows if -1 in row.labels]
    asked = [(probabilities(model.eval(), tokenizer, row), error) for row, error in wrong]
    read = [(good, error) for good, error in asked if good is not None]
    require(read, f"--val-fraction {config.val_fraction} holds out no wrong solution that the model can read")
    found = [f"by {rule} {share:.3f}" for rule, share in found_first(*zip(*read)).items()]
    print(f"first wrong step of {len(read)} of {len(wrong)} wrong solutions found: {', '.join(found)}")


@dataclass
class Config:
    out: str = "runs/champ"  # folder for the file; with --measure, where it is
    measure: str = ""  # checkpoint folder of process.py to measure, instead of writing
    val_fraction: Fraction = 0.2  # with --measure: share of the problems that was held out
    debug: bool = False  # show the traceback of an error


def main(config):
    if config.measure:
        measure(config)
        return
    file = Path(config.out) / "steps.jsonl"
    require(not file.exists(), f"--out {config.out} already holds steps; name another or delete it")
    rows = [row_of(one, own) for one in load_problems() for own in one["fws_annotations"].values()]
    folder_of(file)
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
    print(f"{file}: {len(rows)} solutions, {sum(-1 in row['labels'] for row in rows)} of them with an error")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
