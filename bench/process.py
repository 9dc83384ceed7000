"""Is it worth knowing which step went wrong? Process rewards on the sums, against rewards for whole replies.

For each seed a policy learns the sums and answers them. Of the same answers a process reward model learns
which steps are right (process.py), and an outcome reward model which replies come to the right result
(reward.py). Then, on held-out sums, the best of 16 replies by either model, by a vote, and by both; and PPO
with either model as the reward.

    python bench/process.py        two tables, put into docs/process_rewards.md, and bench/process.png

What each PPO needs was tried on seed 0 (docs/process_rewards.md). What is in --out is not done again.
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import best_of_n  # noqa: E402
import sums  # noqa: E402
from bench.ablate import put  # noqa: E402
from bench.family import markdown, read_rows, run_line  # noqa: E402
from formats.model_folder import load_model  # noqa: E402
from judges import Process, score, step_rewards  # noqa: E402
from model import GPT, ScalarModel  # noqa: E402
from plumbing.disk import write_json  # noqa: E402
from plumbing.flags import Count  # noqa: E402
from plumbing.run import Alone, run_script  # noqa: E402
from report import pyplot  # noqa: E402
from rollout import load_prompts, sample  # noqa: E402

SAMPLES = 16  # replies to each held-out sum
KINDS = ("product", "min", "last")  # of --process-score
# Commands of a seed, with the name of what they make.
MACHINE = "--seed {seed} --threads 1"
TRAIN = f"--resume {MACHINE}"
LINES = {
    "sums": f"sums.py --out {{folder}}/sums {MACHINE}",
    "sft": "sft.py --data {folder}/sums/demonstrations.jsonl "
           "--val-data {folder}/sums/demonstrations_heldout.jsonl --steps 1200 "
           f"--out {{folder}}/sft {TRAIN}",
    "steps": f"sums.py --steps-of {{folder}}/sft --out {{folder}}/steps {MACHINE}",
    # Both models see some 77,000 replies: each of 32,000 two or three times.
    "process": "process.py --model {folder}/sft --data {folder}/steps/steps.jsonl --val-fraction 0.05 "
               "--step-separator ';' --batch 64 --steps 1200 --eval-every 400 "
               f"--out {{folder}}/process {TRAIN}",
    "outcome": "reward.py --model {folder}/sft --data {folder}/steps/rankings.jsonl --val-fraction 0.05 "
               f"--steps 600 --eval-every 300 --out {{folder}}/outcome {TRAIN}",
}
PPO = ("ppo.py --model {folder}/sft --data {folder}/sums/prompts.jsonl --judge sums:right --critic-init zero "
       f"--lr 3e-4 --rollout-batch 128 --steps 40 --sample-every 1000000 {TRAIN} --out {{folder}}/ppo-NAME ")
ARMS = {
    "process": "--process {folder}/process --kl-coef 0.1",
    "outcome": "--reward {folder}/outcome --kl-coef 0.5",
}
LINES |= {f"ppo-{name}": PPO.replace("NAME", name) + flags for name, flags in ARMS.items()}
DRAWN = {  # scorers in the figure, and their colours
    "process, product": "C0", "outcome": "C1", "vote": "C2", "vote weighted by process": "C4",
    "vote weighted by outcome": "C5", "any of them": "0.6"}
WINDOW = 5  # rollouts that a point of the learning curves is the mean of
LAST = 10  # rollouts at a run's ends that the table has the means of


@dataclass
class Config:
    out: str = "runs/process_bench"  # folder for files and models
    seeds: Count = 3  # of the sums, of all training and of what is sampled
    debug: bool = False  # show the traceback of an error


# ---------------------------------------------------------------------------------------------------------
# Runs

def run_seed(folder, seed):
    """Run the commands of a seed, but not those that done.json has; returns their processor seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "done.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    for line in LINES.values():
        filled = line.format(folder=folder, seed=seed)
        if filled not in seconds:
            seconds[filled] = run_line(filled, folder / "log.txt")[0]
            write_json(path, seconds)
    return seconds


def scored(folder, seed):
    """{what: (sums, SAMPLES)} of the policy's replies to held-out sums: the score by each of KINDS and by
    "outcome", the "result" (nan if there is none), and whether it is "right".
    """
    policy, tokenizer = load_model(folder / "sft", GPT)
    process, _ = load_model(folder / "process", ScalarModel, labels=3)
    outcome, _ = load_model(folder / "outcome", ScalarModel)
    for model in (policy, process, outcome):
        model.eval()
    alone = Alone(torch.device("cpu"), torch.float32)
    config = best_of_n.Config(data=f"{folder}/sums/prompts_heldout.jsonl")
    prompts = load_prompts(config, tokenizer, policy.config.block_size, print)
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for start in range(0, len(prompts), 50):
        batch = sample(alone, policy, tokenizer, prompts[start:start + 50], config.max_new_tokens, 1.0,
                       generator, per_prompt=SAMPLES)
        plan, = batch.plan(alone, [list(range(len(batch.texts)))], config.micro_batch_tokens)
        own = {}
        for kind in KINDS:
            judge = Process(process, tokenizer, sums.SEPARATOR, kind)
            own[kind] = step_rewards(alone, judge, batch, plan).changes.sum(1)
        own["outcome"] = score(alone, [outcome], [], batch, plan)[0]
        # As best_of_n.py has it: who was cut off is worse than any other.
        own = {name: torch.where(batch.ended, values, -1e9) for name, values in own.items()}
        results = [sums.result_of(text) for text in batch.texts]
        own["result"] = [math.nan if one is None else float(one) for one in results]
        own["right"] = sums.right(batch.texts, [prompt.row.answer for prompt in batch.prompts])
        for name, values in own.items():
            found.setdefault(name, []).append(np.array(values).reshape(-1, SAMPLES))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def ranked(found, n):
    """{scorer: share of right replies among the best of n}, over all SAMPLES / n groups; found: `scored`."""
    own = {name: values.reshape(-1, n) for name, values in found.items()}
    # Whether two replies come to the same result; nan is like nothing.
    same = own["result"][:, :, None] == own["result"][:, None]  # (groups, n, n)
    vote = same.mean(2)
    good = np.maximum(own["product"], 0)
    likely = np.exp(-np.logaddexp(0, -own["outcome"]))
    scores = {f"process, {kind}": own[kind] for kind in KINDS} | {
        "outcome": own["outcome"],
        "vote": vote,
        "process, product + vote": own["product"] + vote,
        "0.1 outcome + vote": 0.1 * own["outcome"] + vote,
        "vote weighted by process": (same * good[:, None]).sum(2),
        "vote weighted by outcome": (same * likely[:, None]).sum(2),
        "any of them": own["right"],
    }
    best = {name: values.argmax(1) for name, values in scores.items()}
    return {name: float(own["right"][np.arange(len(same)), at].mean()) for name, at in best.items()}


def ranking_of(folder, seed):
    """{n: {scorer: share right}} of a seed, kept in a file."""
    path = folder / "ranking.json"
    if not path.exists():
        found = scored(folder, seed)
        sizes = [n for n in range(1, SAMPLES + 1) if SAMPLES % n == 0]
        write_json(path, {n: ranked(found, n) for n in sizes})
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------------------
# Tables and the figure

def cells(numbers):
    """A mean over seeds, and in brackets what each has."""
    return f"{np.mean(numbers):.3f} ({', '.join(f'{number:.3f}' for number in numbers)})"


def ranking_table(rankings):
    """Markdown. rankings: of each seed {n: {scorer: share}}."""
    *few, most = list(rankings[0])[1:]
    rows = []
    for name in rankings[0][most]:
        means = [f"{np.mean([own[n][name] for own in rankings]):.3f}" for n in few]
        rows.append([name, *means, cells([own[most][name] for own in rankings])])
    return markdown(["the best by", *(f"of {n}" for n in few), f"of {most} (seeds)"], rows)


def ppo_table(curves):
    """Markdown. curves {name: of each seed its rows of metrics.jsonl}."""
    rows = []
    for name, runs in curves.items():
        def means(what, where):
            return [np.mean([row[what] for row in run[where]]) for run in runs]
        first, middle, last = slice(0, LAST), slice(LAST, 2 * LAST), slice(-LAST, None)
        scores = " to ".join(f"{np.mean(means('score', where)):.2f}" for where in (first, last))
        rows.append([name, *(cells(means("right", where)) for where in (first, middle, last)), scores,
                     f"{np.mean(means('kl', last)):.2f}"])
    names = [f"right, rollouts 1 to {LAST}", f"{LAST + 1} to {2 * LAST}", f"the last {LAST} of 40"]
    return markdown(["reward", *names, "score, first to last", "KL, nats"], rows)


def band(axes, x, lines, **style):
    """The mean of some lines, and the space between the lowest and the highest."""
    lines = np.array(lines)
    axes.plot(x, lines.mean(0), **style)
    axes.fill_between(x, lines.min(0), lines.max(0), color=style["color"], alpha=0.15, lw=0)


def draw(plt, rankings, curves, path):
    """Right answers over the number of replies by each scorer, and over the rollouts of each PPO."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    sizes = [int(n) for n in rankings[0]]
    for name, colour in DRAWN.items():
        lines = [[numbers[name] for numbers in own.values()] for own in rankings]
        band(left, sizes, lines, color=colour, label=name, marker=".")
    left.set(xscale="log", xlabel="replies to a held-out sum", ylabel="the best of them is right")
    left.set_xticks(sizes, sizes)
    left.minorticks_off()
    for colour, (name, runs) in zip(("C0", "C1"), curves.items()):
        smooth = np.ones(WINDOW) / WINDOW
        lines = [np.convolve([row["right"] for row in run], smooth, mode="valid") for run in runs]
        band(right, np.arange(WINDOW, len(runs[0]) + 1), lines, color=colour, label=name)
    right.set(xlabel="rollouts of PPO, 128 replies each", ylabel=f"right answers, mean of {WINDOW} rollouts")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9, loc="upper left")
        axes.grid(alpha=0.2)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(config):
    # If it is missing, that is said now.
    plt = pyplot()
    torch.set_num_threads(1)
    rankings, curves = [], {name: [] for name in ARMS}
    for seed in range(config.seeds):
        folder = Path(config.out).resolve() / f"seed-{seed}"
        seconds = run_seed(folder, seed)
        print(f"seed {seed}: {sum(seconds.values()):.0f} processor seconds")
        rankings.append(ranking_of(folder, seed))
        for name in ARMS:
            curves[name].append(read_rows(folder / f"ppo-{name}" / "metrics.jsonl"))
    ranking, learning = ranking_table(rankings), ppo_table(curves)
    print(f"{ranking}\n\n{learning}")
    put("ranking", ranking, "docs/process_rewards.md")
    put("ppo", learning, "docs/process_rewards.md")
    draw(plt, rankings, curves, ROOT / "bench" / "process.png")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
