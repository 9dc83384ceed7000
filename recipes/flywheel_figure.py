"""Draw what the rounds of recipes/flywheel.sh have come to, as far as they go: gold score over labels.

    python recipes/flywheel_figure.py --out runs/flywheel                  flywheel.png in it, and the numbers
    python recipes/flywheel_figure.py --out runs/a runs/b runs/c           each a line, into the first

Each --out has folders round_1, round_2, ... with labels/preferences.jsonl and evaluation.json, of the SFT model
and then of the round's own.
"""
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# Scripts in this folder are run from the root or anywhere else.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.flags import require  # noqa: E402
from plumbing.pictures import pyplot  # noqa: E402
from plumbing.run import run_script  # noqa: E402


@dataclass
class Config:
    out: list[str] = field(default_factory=lambda: ["runs/flywheel"])  # folders of the recipe
    debug: bool = False  # show the traceback of an error


def rounds_of(folder):
    """[(labels so far, gold score, its standard error)] of a folder's rounds; at 0 labels the SFT model."""
    points, labels = [], 0
    for number in range(1, 1000):
        here = Path(folder) / f"round_{number}"
        if not (here / "evaluation.json").exists():
            break
        results = json.loads((here / "evaluation.json").read_text("utf-8"))["results"]
        first, own = results.values()
        if not points:
            points.append((0, first["gold"], first["standard_error"]))
        with open(here / "labels" / "preferences.jsonl", encoding="utf-8") as file:
            labels += sum(1 for _ in file)
        points.append((labels, own["gold"], own["standard_error"]))
    return points


def main(config):
    found = {folder: rounds_of(folder) for folder in config.out}
    missing = [folder for folder, points in found.items() if not points]
    require(not missing, f"--out {' '.join(missing)}: no round has ended there")
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for folder, points in found.items():
        labels, gold, error = np.array(points).T
        axes.errorbar(labels, gold, yerr=1.96 * error, marker="o", ms=4, capsize=3, label=Path(folder).name)
        for number, (count, score, deviation) in enumerate(points):
            print(f"{folder}: round {number}, {count:.0f} labels, gold {score:.3f} "
                  f"(standard error {deviation:.3f})")
    axes.set_xlabel("votes so far")
    axes.set_ylabel("gold score of held-out prompts")
    if len(found) > 1:
        axes.legend(frameon=False)
    path = Path(config.out[0]) / "flywheel.png"
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
