"""What does each switch of ppo.py do? The toy task, one switch at a time, several seeds; and
over-optimisation.

    python bench/ablate.py                   everything below, with two seeds: an hour of CPU time, so half an
                                             hour on 2 cores
    python bench/ablate.py --only "no KL"    one variant (its name as in the table), beside the baseline

It trains an SFT model, a reward model that saw that policy's replies and a narrow one that saw the
generator's candidates alone, then PPO with each switch from the same start, at the demo's learning rate and
at three times that ("hot", where PPO falls apart without help). Seeds vary the prompts and what is sampled.
It draws bench/ablation.png (reward, gold score, KL, perplexity under the reference, entropy and length over
rollouts), bench/hot.png (the same, hot) and bench/overoptimisation.png (gold and proxy score over sqrt(KL)
for best-of-n, PPO and DPO; Gao et al. 2022, figure 1), and puts the tables into bench/RESULTS.md. Runs that
are already in --out are not repeated.
"""
import concurrent.futures
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
from formats.model_folder import load_model  # noqa: E402
from judges import load_functions  # noqa: E402
from model import GPT, ScalarModel  # noqa: E402
from plumbing.flags import Count, UserError, require  # noqa: E402
from plumbing.run import Alone, run_script  # noqa: E402
from report import pyplot  # noqa: E402
from rollout import load_prompts  # noqa: E402

# Rollouts that a run's final numbers are the mean of.
LAST = 10
BASELINE = "baseline"
# {family: {name of the variant: flags}}. The files of the toy task are those in --out.
TASK = "runs/toy"
FAMILIES = {
    "KL term": {
        "no KL": "--kl-coef 0",
        "k2 in the reward": "--kl k2",
        "k3 in the reward": "--kl k3",
        "k3 in the loss": "--kl k3 --kl-in loss",
        "adaptive KL, target 0.5": "--kl-target 0.5 --kl-horizon 640",
    },
    "reward": {
        "scaled by running deviation": "--reward-norm scale",
        "normalised": "--reward-norm standard",
        "normalised, clipped at 0.3": "--reward-norm standard --reward-clip 0.3",
        "clipped at 1": "--reward-clip 1",
        "score one token later": "--reward-at next",
        "missing EOS: subtract": "--missing-eos subtract",
    },
    "advantages and losses": {
        "advantages not whitened": "--whiten none",
        "advantages clipped at 1": "--advantage-clip 1",
        "no policy clip": "--clip 1000",
        "PPO-penalty, weight 1": "--policy-loss penalty",
        "PPO-penalty, adaptive": "--policy-loss penalty --penalty-target 0.01",
        "dual clip 3": "--dual-clip 3",
        "entropy bonus 0.01": "--entropy-coef 0.01",
        "early stop at KL 0.02": "--kl-stop 0.02",
        "lambda 1": "--lam 1",
    },
    "critic and the rest": {
        "no value clip": "--value-clip 0",
        "value clip 0.2": "--value-clip 0.2",
        "critic from SFT": "--critic-init sft",
        "critic from zero": "--critic-init zero",
        "critic warm-up 5": "--critic-warmup 5",
        "PPO-ptx 0.1": f"--ptx-coef 0.1 --ptx-data {TASK}/demonstrations.jsonl",
        "constant learning rates": "--lr-schedule constant --critic-lr-schedule constant",
    },
}
# The variants that are also run at three times the learning rate.
HOT = (
    "k3 in the reward",
    "adaptive KL, target 0.5",
    "normalised, clipped at 0.3",
    "clipped at 1",
    "advantages not whitened",
    "advantages clipped at 1",
    "PPO-penalty, weight 1",
    "PPO-penalty, adaptive",
    "entropy bonus 0.01",
    "early stop at KL 0.02",
    "critic warm-up 5",
    "PPO-ptx 0.1",
)
# {metric: its name in tables and figures}
COLUMNS = {
    "score": "score",
    "gold": "gold score",
    "kl": "KL, nats per reply",
    "ref_perplexity": "perplexity under ref",
    "entropy": "entropy, nats per token",
    "length": "tokens",
}
BEST_OF = 64  # replies per prompt
DPO_BETAS = (1.0, 0.3, 0.1, 0.03)
PPO_FOOLED = {"PPO, no KL": "--kl-coef 0 --lr 2e-3", "PPO, beta 0.1": ""}


@dataclass
class Config:
    out: str = "runs/ablate"  # folder for checkpoints and metrics
    seeds: Count = 2  # PPO runs per variant
    steps: Count = 30  # rollouts per run
    rollout_batch: Count = 128  # prompts per rollout
    # names of variants to run, beside the baseline; without it all of them and over-optimisation
    only: list[str] = field(default_factory=list)
    lanes: Count = 2  # runs at the same time, one thread each
    debug: bool = False  # show the traceback of an error


def variants():
    """{name: flags} of all families."""
    found = {}
    for family in FAMILIES.values():
        found |= family
    return found


# ---------------------------------------------------------------------------------------------------------
# Running

def run_all(jobs, lanes):
    """Run [(name, command line)] on some lanes, in order.

    A job that fails ends everything with what it said last.
    """
    from tqdm import tqdm
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

    def run(job):
        name, line = job
        words = [sys.executable, *shlex.split(line)]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        return name, done

    with concurrent.futures.ThreadPoolExecutor(lanes) as pool, tqdm(total=len(jobs), disable=None) as bar:
        futures = [pool.submit(run, job) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            name, done = future.result()
            if done.returncode:
                pool.shutdown(cancel_futures=True)
                said = done.stderr.strip().splitlines() or ["nothing was said"]
                raise UserError(f"{name} failed: {said[-1]}")
            bar.update()
            bar.set_postfix_str(name)
            if bar.disable:
                print(f"  {name}", flush=True)


def read(folder):
    """{metric: array over rollouts} of a run."""
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    names = {name for row in rows for name in row}
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def slug(name):
    return re.sub(r"\W+", "-", name).strip("-")


# ---------------------------------------------------------------------------------------------------------
# The ablation: table and figures

def summary(out, name, seeds):
    """{metric: (mean over seeds, standard deviation)} of the last rollouts of a variant."""
    runs = [read(out / f"{slug(name)}-{seed}") for seed in range(seeds)]
    result = {}
    for metric in [*COLUMNS, "explained_variance"]:
        finals = [np.nanmean(run[metric][-LAST:]) for run in runs]
        spread = np.std(finals, ddof=1 if seeds > 1 else 0)
        result[metric] = np.mean(finals), spread
    return result


def table(out, names, seeds, prefix=""):
    """Markdown: one row per variant.

    Gold is bold where it differs from the baseline's by more than twice the standard error of the difference.
    """
    base_gold, base_spread = summary(out, prefix + BASELINE, seeds)["gold"]
    flags = {BASELINE: ""} | variants()
    lines = [
        "| variant | flags | " + " | ".join(COLUMNS.values()) + " | explained variance |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for name in names:
        row = summary(out, prefix + name, seeds)
        cells = [f"{mean:.2f} ± {spread:.2f}" for mean, spread in row.values()]
        gold, spread = row["gold"]
        error = math.sqrt((spread**2 + base_spread**2) / seeds)
        if name != BASELINE and abs(gold - base_gold) > 2 * error:
            cells[1] = f"**{cells[1]}**"
        code = f"`{flags[name]}`" if flags[name] else ""
        lines.append(f"| {name} | {code} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(plt, out, rows, seeds, path, prefix=""):
    """One row of panels per family of variants, one column per metric; means over seeds.

    rows: {family: names of its variants}. The baseline is in each row, in black.
    """
    size = (17, 2.9 * len(rows))
    figure, grid = plt.subplots(len(rows), len(COLUMNS), figsize=size, constrained_layout=True, squeeze=False)
    for axes_row, (family, names) in zip(grid, rows.items()):
        for axes, (metric, title) in zip(axes_row, COLUMNS.items()):
            for i, name in enumerate([BASELINE, *names]):
                runs = [read(out / f"{slug(prefix + name)}-{seed}") for seed in range(seeds)]
                curves = np.array([run[metric] for run in runs])  # (seeds, rollouts)
                steps = np.arange(1, curves.shape[1] + 1)
                if name == BASELINE:
                    colour, width = "k", 2
                else:
                    colour, width = f"C{i - 1}", 1.1
                axes.plot(steps, curves.mean(0), label=name, color=colour, lw=width)
                axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.08, lw=0)
            if metric in ("kl", "ref_perplexity"):
                axes.set_yscale("symlog", linthresh=1)
            axes.set_title(title, fontsize=9, loc="left")
        axes_row[0].set_ylabel(family, fontweight="bold")
        axes_row[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in grid[-1]:
        axes.set_xlabel("rollout")
    figure.savefig(path, dpi=75)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------
# Over-optimisation

def best_of_n(gold, score):
    """Of the best of n replies by proxy, n = 1, 2, 4, ...: [(sqrt(KL), mean proxy score, mean gold score)].

    gold, score (prompts, N). All N replies are used for each n: the k-th best of N is the best of n of them
    with probability C(N - k, n - 1) / C(N, n). KL = log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3).
    """
    N = score.shape[1]
    order = np.argsort(-score, 1)
    gold = np.take_along_axis(gold, order, 1)
    score = np.take_along_axis(score, order, 1)
    points = []
    for power in range(int(math.log2(N)) + 1):
        n = 2**power
        weights = np.array([math.comb(N - k, n - 1) / math.comb(N, n) for k in range(1, N + 1)])  # (N,)
        kl = math.log(n) - (n - 1) / n
        points.append((math.sqrt(kl), (score @ weights).mean(), (gold @ weights).mean()))
    return points


def sampled(folder, reference, reward, data, per_prompt=1, every=1):
    """Replies of a checkpoint to every second, third, ... prompt of a file of the toy task.

    Returns gold score and score (prompts, per_prompt), and the mean KL to the reference.
    """
    policy, tokenizer = load_model(folder, GPT)
    reference, _ = load_model(reference, GPT)
    reward, _ = load_model(reward, ScalarModel)
    settings = evaluate.Config(micro_batch_tokens=8192, data=str(data))
    prompts = load_prompts(settings, tokenizer, policy.config.block_size, print)[::every]
    prompts = [prompt for prompt in prompts for _ in range(per_prompt)]
    alone = Alone(torch.device("cpu"), torch.float32)
    judges = load_functions("--judge", ["toy:gold"])
    _, _, _, kl, (score,), (gold,) = evaluate.answer(
        alone, policy.eval(), reference.eval(), [reward.eval()], [], judges, tokenizer, prompts, settings)
    return gold.reshape(-1, per_prompt), score.reshape(-1, per_prompt), float(kl.mean())


def over_optimisation(plt, out):
    """Draw gold and proxy over sqrt(KL); returns a Markdown table."""
    lines = points_of_methods(out)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    rows = [
        "| method | KL, nats | proxy score | gold score | best gold on the way |",
        "|---|---|---|---|---|",
    ]
    for i, (name, points) in enumerate(lines.items()):
        root, proxy, gold = (np.array(values) for values in zip(*points))
        for panel, (x, y) in zip(axes, ((root, proxy), (root, gold), (proxy, gold))):
            panel.plot(x, y, marker="o", ms=3, lw=1.2, label=name, color=f"C{i}")
        best = gold.argmax()
        rows.append(f"| {name} | {root[-1] ** 2:.1f} | {proxy[-1]:.2f} | {gold[-1]:.2f} | "
                    f"{gold[best]:.2f} at KL {root[best] ** 2:.1f} |")
    distance = "sqrt(KL to SFT, nats per reply)"
    proxy = "proxy: narrow reward model"
    axes[0].set(xlabel=distance, ylabel=proxy)
    axes[1].set(xlabel=distance, ylabel="gold score")
    axes[2].set(xlabel=proxy, ylabel="gold score")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "bench" / "overoptimisation.png", dpi=90)
    plt.close(figure)
    return "\n".join(rows)


def points_of_methods(out):
    """{method: [(sqrt(KL), proxy score, gold score)]}, from the start on; for DPO a point per beta."""
    rest = out / "sft", out / "narrow", out / "toy" / "prompts.jsonl"
    gold, score, _ = sampled(out / "sft", *rest, BEST_OF, every=2)
    lines = {"best of n": best_of_n(gold, score)}
    start = lines["best of n"][0]

    # Means over so many rollouts that follow each other.
    window = 4
    for name in PPO_FOOLED:
        run = read(out / slug(name))
        means = {}
        for metric in ("kl", "score", "gold"):
            whole = len(run[metric]) // window * window
            means[metric] = run[metric][:whole].reshape(-1, window).mean(1)
        lines[name] = []
        for kl, score, gold in zip(means["kl"], means["score"], means["gold"]):
            lines[name].append((math.sqrt(max(0, kl)), score, gold))

    points = [start]
    for beta in DPO_BETAS:
        gold, score, kl = sampled(out / f"dpo-{beta:g}", *rest, every=2)
        points.append((math.sqrt(max(0, kl)), score.mean(), gold.mean()))
    lines["DPO, beta " + ", ".join(f"{beta:g}" for beta in DPO_BETAS)] = points
    return lines


def put(name, text, page="bench/RESULTS.md"):
    """Replace what stands between the markers `name` of a page."""
    path = ROOT / page
    page = path.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    require(begin in page and end in page, f"{path} has lost its markers {begin} and {end}")
    head = page[:page.index(begin) + len(begin)]
    path.write_text(head + f"\n{text}\n" + page[page.index(end):])


# ---------------------------------------------------------------------------------------------------------

def make_start(out, task, narrow, common, config):
    """What every run starts from, where it is not there yet: the task's files, SFT and reward models.

    narrow: the flags that name the generator's preferences; common: flags of every training script.
    """
    if not Path(task, "tokenizer.json").exists():
        run_all([("the task's files", f"toy.py --out {task} --threads 1")], 1)
    sft = f"sft.py --data {task}/demonstrations.jsonl --val-data {task}/demonstrations_heldout.jsonl"
    run_all([("SFT", f"{sft} --out {out}/sft {common}")], 1)
    if not (out / "preferences" / "train.jsonl").exists():
        ask = f"toy.py --model {out}/sft --out {out}/preferences --threads 1"
        run_all([("preferences", ask)], 1)
    wide = f"--data {out}/preferences/train.jsonl --val-data {out}/preferences/heldout.jsonl"
    reward = (f"reward.py --model {out}/sft --demonstrations {task}/demonstrations.jsonl "
              f"--steps 600 {common}")
    jobs = [("reward model", f"{reward} {wide} --out {out}/reward")]
    if not config.only:
        jobs.append(("narrow reward model", f"{reward} {narrow} --out {out}/narrow"))
    run_all(jobs, config.lanes)


def ppo_jobs(out, task, narrow, common, config, chosen):
    """[(name, command line)] of all PPO and DPO runs. chosen: {name: flags}; the rest as for `make_start`."""
    hot = {}
    for name, flags in chosen.items():
        if name in HOT or name == BASELINE:
            hot["hot " + name] = "--lr 3e-3 " + flags
    batch = f"--rollout-batch {config.rollout_batch}"
    start = f"ppo.py --model {out}/sft --data {task}/prompts.jsonl --judge toy:gold {common}"
    jobs = []
    for seed in range(config.seeds):
        for name, flags in (chosen | hot).items():
            line = (f"{start} --reward {out}/reward --steps {config.steps} {batch} --seed {seed} "
                    f"--out {out}/{slug(name)}-{seed} {flags.replace(TASK, task)}")
            jobs.append((f"{name}, seed {seed}", line))
    if config.only:
        return jobs
    for name, flags in PPO_FOOLED.items():
        line = (f"{start} --reward {out}/narrow --steps {2 * config.steps} {batch} "
                f"--out {out}/{slug(name)} {flags}")
        jobs.append((name, line))
    for beta in DPO_BETAS:
        line = (f"dpo.py --model {out}/sft {narrow} --steps 300 --beta {beta} "
                f"--out {out}/dpo-{beta:g} {common}")
        jobs.append((f"DPO, beta {beta:g}", line))
    return jobs


def main(config):
    # If it is missing, that is said now.
    plt = pyplot()
    plt.rcParams["font.size"] = 8
    unknown = set(config.only) - set(variants())
    require(not unknown,
            f"--only {', '.join(sorted(unknown))}: no such variant; there are {'; '.join(variants())}")
    chosen = {BASELINE: ""}
    for name, flags in variants().items():
        if not config.only or name in config.only:
            chosen[name] = flags
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    task = f"{out}/toy"
    common = "--threads 1 --resume"
    narrow = f"--data {task}/preferences.jsonl --val-data {task}/preferences_heldout.jsonl"

    # 1. what every run starts from
    make_start(out, task, narrow, common, config)

    # 2. PPO, one switch at a time
    run_all(ppo_jobs(out, task, narrow, common, config, chosen), config.lanes)

    # 3. tables and figures
    results = table(out, chosen, config.seeds)
    print(results)
    if config.only:
        return
    draw(plt, out, FAMILIES, config.seeds, ROOT / "bench" / "ablation.png")
    half = len(HOT) // 2
    halves = {"hot": HOT[:half], "hot, continued": HOT[half:]}
    draw(plt, out, halves, config.seeds, ROOT / "bench" / "hot.png", "hot ")
    hot_results = table(out, [BASELINE, *HOT], config.seeds, "hot ")
    print(hot_results)
    fooled = over_optimisation(plt, out)
    print(fooled)
    put("ablation", results)
    put("hot", hot_results)
    put("overoptimisation", fooled)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
