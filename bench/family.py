"""The whole family on one page: every method from the same SFT model, on the same labels.

    python bench/family.py                      all of it: some 80 minutes of 2 cores, by the
                                                processor seconds of its parts; it resumes
    python bench/family.py --only dpo kto ppo   some methods (their names as in the table), and no pages

For each seed the toy task is made anew: its files, an SFT model, 8,000 rankings of four replies by a tired
annotator, and a reward model that learns from these. Every method starts from that SFT model. Some learn from
the rankings, and see each of them once; others sample replies, which the reward model scores, and so live on
the same labels.

What a method is sensitive to is searched: each of its tries is run on seed 3, and the one with the best gold
score there is kept. The table has seeds 0, 1 and 2, which the search never saw. Gold score, wins, ties and
losses against SFT and the KL are evaluate.py's on the held-out prompts of the seed. Seconds are processor
seconds of the method's own commands; memory is the largest of its processes, with all of PyTorch in it.

It draws bench/family.png (gold score over KL, and as a line the best of n replies of the SFT model by the
reward model's score) and puts the tables into README.md and bench/RESULTS.md. A method is done when its
folder in --out has a result.json of the same commands; what is done is not done again.
"""
import concurrent.futures
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.ablate import best_of_n, put, sampled, slug  # noqa: E402
from plumbing.disk import write_atomically, write_json  # noqa: E402
from plumbing.flags import Count, UserError, require  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from report import pyplot  # noqa: E402

SEARCH = 3  # the seed of the search
BEST_OF = 64  # replies to a prompt, for the line of the best of n
MARKED = 16  # that n of them which has a row in the table

# What stands in braces: {start}, the folder of what all start from; {run}, that of this run; {seed}; {tried},
# the flags that are searched; {machine}, flags of all training scripts; {family}/NAME/model, the model of
# another method.
LABELS = "--data {start}/preferences/train.jsonl --val-fraction 0 --epochs 1"
REWARD = "--reward {start}/reward --data {start}/toy/prompts.jsonl"
END = "--out {run}/model {machine} {tried}"
PAIRS = f"dpo.py --model {{start}}/sft {LABELS} {END}"
BEST = f"best_of_n.py --model {{start}}/sft {REWARD} --seed {{seed}} --threads 1"
GRPO = f"grpo.py --model {{start}}/sft {REWARD} {END}"
# On what best_of_n.py wrote.
SELECTED = ("sft.py --model {start}/sft --data {run}/samples/FILE.jsonl --val-fraction 0 --warmup 10 "
            f"{END}")


class Method(NamedTuple):
    name: str
    source: str  # what it learns from
    lines: tuple  # its commands
    tries: tuple = ("",)
    model: str = "model"  # folder of what comes out, within {run}
    more_samples: str = ""  # folder within {start} of replies that it takes from there
    after: bool = False  # whether it needs other methods' models


def pairs(name, flags, *tries):
    return Method(name, "labels", (f"{PAIRS} {flags}",), tries)


def on_policy(name, *tries, flags=""):
    return Method(name, "reward model", (f"{GRPO} --preset {name} {flags}",), tries)


RATES = ("--lr 1e-3", "--lr 2e-3")
METHODS = (
    Method("sft-best", "labels", (f"sft.py --model {{start}}/sft {LABELS} --warmup 10 {END}",),
           ("--lr 3e-4", "--lr 1e-3", "--lr 3e-3")),
    Method("hindsight", "labels",
           (f"sft.py --model {{start}}/sft {LABELS} --warmup 10 --quality words {END}",),
           ("--lr 1e-3", "--lr 3e-3")),
    pairs("dpo", "", "--beta 0.1", "--beta 0.3", "--beta 1"),
    pairs("cdpo", "--preset cdpo", "--beta 0.1", "--beta 0.3"),
    pairs("rdpo", "--preset rdpo", "--beta 0.3", "--beta 1", "--beta 3"),
    pairs("ipo", "--loss ipo", "--beta 0.03", "--beta 0.1", "--beta 0.3"),
    pairs("hinge", "--loss hinge", "--beta 0.1", "--beta 0.3", "--beta 1"),
    pairs("rpo", "--preset rpo", "--beta 0.1", "--beta 0.3"),
    pairs("dpop", "--preset dpop", "--dpop-lambda 50", "--dpop-lambda 5"),
    pairs("tdpo1", "--preset tdpo1", "--beta 0.1", "--beta 0.3"),
    pairs("tdpo2", "--preset tdpo2", "--beta 0.1", "--beta 0.3"),
    pairs("simpo", "--preset simpo", "--beta 2 --gamma 1", "--beta 2 --gamma 1 --lr 3e-4",
          "--beta 10 --gamma 3", "--beta 10 --gamma 3 --lr 3e-4"),
    pairs("orpo", "--preset orpo", "--beta 0.1", "--beta 1", "--beta 3"),
    pairs("rrhf", "--preset rrhf", "--beta 1", "--beta 10"),
    Method("kto", "labels", (f"kto.py --model {{start}}/sft {LABELS} --good-weight 1.3 {END}",),
           ("--beta 0.1", "--beta 0.3", "--beta 1")),
    Method("spin", "demonstrations",
           (f"dpo.py --model {{start}}/sft --data {{start}}/spin.jsonl --val-fraction 0 --epochs 1 {END}",),
           ("--beta 0.1", "--beta 0.3"), more_samples="samples"),
    Method("best-of-n sft", "reward model",
           (f"{BEST} --n 16 --out {{run}}/samples", SELECTED.replace("FILE", "sft") + " --epochs 8"),
           ("--lr 5e-4", "--lr 1e-3")),
    Method("reward-weighted", "reward model",
           (f"{BEST} --n 8 --out {{run}}/samples",
            SELECTED.replace("FILE", "rankings") + " --quality weights --epochs 4 --lr 1e-3"),
           ("--weight-beta 0.1", "--weight-beta 0.3")),
    Method("quark", "reward model",
           (f"{BEST} --n 8 --out {{run}} --rounds 2 --train quality "
            '--train-flags "--epochs 3 --val-fraction 0 {tried}"',),
           ("--lr 1e-3", "--lr 2e-3"), model="round_2/model"),
    Method("expert iteration", "reward model",
           (f"{BEST} --n 8 --out {{run}} --rounds 2 "
            '--train-flags "--epochs 5 --val-fraction 0 --warmup 10 {tried}"',),
           ("--lr 5e-4", "--lr 1e-3"), model="round_2/model"),
    Method("iterative dpo", "reward model",
           (f"{BEST} --n 8 --out {{run}} --rounds 2 --train dpo "
            '--train-flags "--epochs 2 --val-fraction 0 {tried}"',),
           ("--lr 3e-4", "--lr 1e-3"), model="round_2/model"),
    Method("ppo", "reward model", (f"ppo.py --model {{start}}/sft {REWARD} --steps 60 {END}",),
           ("--lr 5e-4", "--lr 1e-3")),
    on_policy("grpo", *RATES),
    on_policy("dr-grpo", *RATES),
    on_policy("dapo", "--lr 5e-4", "--lr 1e-3"),
    on_policy("cispo", "--lr 5e-4", "--lr 1e-3"),
    on_policy("rloo", *RATES),
    on_policy("remax", "--lr 1e-3", "--lr 2e-3"),
    on_policy("reinforce", "--lr 1e-3", "--lr 2e-3"),
    on_policy("maxrl", "--lr 1e-3", "--lr 2e-3", flags="--squash sigmoid"),
    Method("arena", "reward model",
           (f"{BEST} --n 8 --arena {{family}}/ppo/model {{family}}/dpo/model --out {{run}}/samples",
            SELECTED.replace("FILE", "sft") + " --epochs 4 --lr 1e-3"), after=True),
    Method("distill", "the ppo model",
           ("distill.py --model {start}/sft --teacher {family}/ppo/model --data {start}/toy/prompts.jsonl "
            f"--steps 150 {END}",), after=True),
)

# Claims of papers: runs on other labels, with the flags that the search found for the method of that name.
FEW = PAIRS.replace("preferences/train.jsonl", "few/train.jsonl").replace("--epochs 1", "--epochs 20")
LONG = PAIRS.replace("preferences/train.jsonl", "long.jsonl")
CLAIMS = {
    "dpo, few exact labels": ("dpo", FEW),
    "ipo, few exact labels": ("ipo", f"{FEW} --loss ipo"),
    "dpo, half of the labels go by length": ("dpo", LONG),
    "simpo, half of the labels go by length": ("simpo", f"{LONG} --preset simpo"),
    "kto, a tenth of the bad labels": (
        "kto", f"kto.py --model {{start}}/sft {LABELS} --good-weight 0.26 --bad-weight 2 {END}".replace(
            "preferences/train.jsonl", "few_bad.jsonl")),
}
# The rows of the table of claims.
SHOWN = ("dpo", "rpo", "dpop", "ipo", "simpo", "kto", *CLAIMS)


@dataclass
class Config:
    out: str = "runs/family"  # folder for checkpoints and results
    seeds: Count = 3  # of the table: 0, 1, ...
    groups: Count = 8000  # rankings of four replies
    only: list[str] = field(default_factory=list)  # names of methods; without it all of them, and the pages
    lanes: Count = 2  # runs at the same time, one thread each
    debug: bool = False  # show the traceback of an error


# ---------------------------------------------------------------------------------------------------------
# Running

def run_line(line, log):
    """Run a command line of ours, what it says into a file. Returns (processor seconds, MB at its peak)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with open(log, "a") as file:
        process = subprocess.Popen([sys.executable, *shlex.split(line)], cwd=ROOT, env=environment,
                                   stdout=file, stderr=subprocess.STDOUT)
        # Of the process and of those that it waited for.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = Path(log).read_text().strip().splitlines() or ["nothing was said"]
        raise UserError(f"{line.split()[0]} failed: {said[-1]}; all that it said is in {log}")
    peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return usage.ru_utime + usage.ru_stime, peak


def run_all(jobs, lanes):
    """Run [(name, function)] on some lanes, in order; the first that fails ends everything."""
    with concurrent.futures.ThreadPoolExecutor(lanes) as pool, tqdm(total=len(jobs), disable=None) as bar:
        futures = {pool.submit(function): name for name, function in jobs}
        for future in concurrent.futures.as_completed(futures):
            try:
                future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            bar.update()
            bar.set_postfix_str(futures[future])
            if bar.disable:
                print(f"  {futures[future]}", flush=True)


def start_lines(folder, seed, groups):
    """The commands that make what every method of a seed starts from."""
    machine = "--threads 1 --resume"
    toy = f"{folder}/toy"
    ask = f"toy.py --model {folder}/sft --heldout-groups 500 --seed {seed} --threads 1"
    return (
        f"toy.py --out {toy} --seed {seed} --threads 1",
        f"sft.py --data {toy}/demonstrations.jsonl --val-data {toy}/demonstrations_heldout.jsonl "
        f"--eval-every 1000000 --seed {seed} --out {folder}/sft {machine}",
        f"{ask} --groups {groups} --out {folder}/preferences",
        f"{ask} --groups 400 --noise 0 --out {folder}/few",
        f"best_of_n.py --model {folder}/sft --data {toy}/prompts.jsonl --reward-fn toy:gold --n 1 "
        f"--out {folder}/samples --seed {seed} --threads 1",
        f"reward.py --model {folder}/sft --data {folder}/preferences/train.jsonl "
        f"--val-data {folder}/preferences/heldout.jsonl --demonstrations {toy}/demonstrations.jsonl "
        f"--epochs 5 --lr 1e-3 --eval-every 1000000 --seed {seed} --out {folder}/reward {machine}",
    )


def make_start(folder, seed, groups):
    """What every method of a seed starts from, unless it is there."""
    lines = start_lines(folder, seed, groups)
    if done(folder, lines):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for line in lines:
        run_line(line, folder / "log.txt")
    toy = folder / "toy"
    rows = read_rows(folder / "preferences" / "train.jsonl")
    rng = np.random.default_rng(seed)
    write_rows(folder / "long.jsonl", by_length(rows, 0.5, rng))
    write_rows(folder / "few_bad.jsonl", good_and_bad(rows, 0.1, rng))
    spin = spin_rows(read_rows(toy / "demonstrations.jsonl"), read_rows(folder / "samples" / "sft.jsonl"))
    write_rows(folder / "spin.jsonl", spin)
    write_json(folder / "result.json", {"lines": lines, "labels": len(rows)})


def done(folder, lines):
    """Whether a folder has a result.json of these commands."""
    path = folder / "result.json"
    return path.exists() and json.loads(path.read_text())["lines"] == list(lines)


def read_rows(path):
    return [json.loads(line) for line in open(path)]


def write_rows(path, rows):
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def by_length(rows, share, rng):
    """Rankings of which a share goes by length, the longest reply first."""
    changed = []
    for row in rows:
        if rng.random() < share:
            row = row | {"ranks": [-len(reply) for reply in row["completions"]]}
        # Replies of one length tie.
        if len(set(row["ranks"])) > 1:
            changed.append(row)
    return changed


def good_and_bad(rows, share, rng):
    """Of each ranking the first reply, labelled good, and of a share of them the last one, labelled bad."""
    labelled = []
    for row in rows:
        order = np.argsort(row["ranks"], kind="stable")
        best, worst = row["completions"][order[0]], row["completions"][order[-1]]
        labelled.append({"prompt": row["prompt"], "completion": best, "label": True})
        if rng.random() < share:
            labelled.append({"prompt": row["prompt"], "completion": worst, "label": False})
    return labelled


def spin_rows(demonstrations, samples):
    """SPIN's pairs: each sample below the demonstrations for the same prompt."""
    chosen = {}
    for row in demonstrations:
        chosen.setdefault(row["prompt"], []).append(row["completion"])
    rows = []
    for row in samples:
        for reply in chosen[row["prompt"]]:
            if reply != row["completion"]:
                rows.append({"prompt": row["prompt"], "chosen": reply, "rejected": row["completion"]})
    return rows


def run_method(lines, model, folder, start, seed):
    """Run a method's commands, evaluate what comes out and write result.json, unless it is there."""
    if done(folder, lines):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    costs = [run_line(line, log) for line in lines]
    model = folder / model
    run_line(f"evaluate.py --models {start}/sft {model} --data {start}/toy/prompts_heldout.jsonl "
             f"--judge toy:gold --reward {start}/reward --seed {seed} --threads 1 "
             f"--out {folder}/evaluation.json", log)
    result = json.loads((folder / "evaluation.json").read_text())["results"][str(model)]
    result |= {
        "lines": lines,
        "seconds": sum(seconds for seconds, _ in costs),
        "memory": max(peak for _, peak in costs),
        "samples": samples_of(folder),
    }
    write_json(folder / "result.json", result | margins_of(model))


def samples_of(folder):
    """How many replies were sampled to train on, by all runs in a folder."""
    count = 0
    for path in folder.rglob("summary.json"):
        summary = json.loads(path.read_text())
        arena = summary["config"]["arena"]
        count += summary["groups"] * (1 + len(arena) if arena else summary["config"]["n"])
    for path in folder.rglob("metrics.jsonl"):
        run = path.parent / "run.json"
        batch = json.loads(run.read_text())["config"].get("rollout_batch") if run.exists() else None
        if batch:
            last = json.loads(path.read_text().splitlines()[-1])
            count += int(last.get("replies", last["step"] * batch))
    return count


def margins_of(model):
    """Of dpo.py's log: the change of the chosen log-probability, and the last gap of log-ratios, in nats.

    {} of other runs.
    """
    run = model / "run.json"
    if not run.exists() or json.loads(run.read_text())["script"] != "dpo.py":
        return {}
    rows = read_rows(model / "metrics.jsonl")
    chosen = [row["chosen_logprob"] for row in rows if "chosen_logprob" in row]
    margins = [row["margin"] for row in rows if "margin" in row]
    beta = json.loads(run.read_text())["config"]["beta"]
    # Warm-up has just begun in the first steps, so the policy is near its start there.
    return {"chosen": np.mean(chosen[-20:]) - np.mean(chosen[:5]), "gap": np.mean(margins[-20:]) / beta}


# ---------------------------------------------------------------------------------------------------------
# Searching and measuring

class Place(NamedTuple):
    """The folders of one seed."""
    out: Path
    seed: int

    @property
    def family(self):
        return self.out / f"seed-{self.seed}"

    @property
    def start(self):
        return self.family / "start"

    def folder(self, name, tried):
        return self.family / slug(f"{name} {tried}" if self.seed == SEARCH else name)

    def job(self, name, lines, tried, model="model"):
        """(name, function) of a run with these commands."""
        folder = self.folder(name, tried)
        facts = {
            "start": self.start,
            "family": self.family,
            "run": folder,
            "seed": self.seed,
            "tried": tried,
            "machine": f"--seed {self.seed} --threads 1",
        }
        filled = [line.format(**facts) for line in lines]
        what = f"{name} {tried}, seed {self.seed}"
        return what, lambda: run_method(filled, model, folder, self.start, self.seed)

    def result(self, name, tried=""):
        """The result.json of a run."""
        return json.loads((self.folder(name, tried) / "result.json").read_text())


def search(out, methods, config):
    """{name of a method: {flags tried: gold score}}, of those with more than one try."""
    place = Place(out, SEARCH)
    methods = [method for method in methods if len(method.tries) > 1]
    jobs = []
    for method in methods:
        for tried in method.tries:
            jobs.append(place.job(method.name, method.lines, tried, method.model))
    run_all(jobs, config.lanes)
    found = {}
    for method in methods:
        found[method.name] = {tried: place.result(method.name, tried)["gold"] for tried in method.tries}
    return found


def final_jobs(out, methods, best, config):
    """[(name, function)] of methods with their best flags, on each seed of the table."""
    jobs = []
    for seed in range(config.seeds):
        for method in methods:
            place = Place(out, seed)
            jobs.append(place.job(method.name, method.lines, best[method.name], method.model))
    return jobs


def frontier(out, config):
    """Of the best of n replies of the SFT models: {n: (KL, [gold score by seed])}; kept in a file."""
    path = out / "best_of_n.json"
    if not path.exists():
        lines = []
        for seed in range(config.seeds):
            start = Place(out, seed).start
            gold, score, _ = sampled(start / "sft", start / "sft", start / "reward",
                                     start / "toy" / "prompts_heldout.jsonl", BEST_OF)
            lines.append([(float(root) ** 2, float(mean)) for root, _, mean in best_of_n(gold, score)])
        write_json(path, lines)
    curves = json.loads(path.read_text())
    points = {}
    for power, of_seeds in enumerate(zip(*curves)):
        points[2**power] = of_seeds[0][0], [gold for _, gold in of_seeds]
    return points


# ---------------------------------------------------------------------------------------------------------
# Tables and the figure

def mean(results, name):
    """Mean over runs of a number of theirs; None if they have none."""
    values = [result.get(name) for result in results]
    return None if None in values else float(np.mean(values))


def cell(value, form="{:.2f}"):
    return "" if value is None else form.format(value)


def results_of(out, name, config):
    return [Place(out, seed).result(name) for seed in range(config.seeds)]


def family_table(out, methods, best, points, config):
    """Markdown: a row per method, by what it learns from and then by gold score."""
    seeds = [f"{'gold, seed ' if seed == 0 else ''}{seed}" for seed in range(config.seeds)]
    names = ["method", "learns from", *seeds, "wins", "ties", "losses", "KL", "labels", "samples", "seconds",
             "MB", "flags found"]
    places = [Place(out, seed) for seed in range(config.seeds)]
    labels = np.mean([json.loads((place.start / "result.json").read_text())["labels"] for place in places])
    kl, gold = points[1]
    rows = [["SFT", "demonstrations", *(cell(value) for value in gold), "", "", "", cell(kl)]]
    kl, gold = points[MARKED]
    rows.append([f"best of {MARKED}, no training", "reward model", *(cell(value) for value in gold), "", "",
                 "", cell(kl), f"{labels:,.0f}", f"{MARKED} a reply"])
    sources = list(dict.fromkeys(method.source for method in methods))
    order = {}
    for method in methods:
        results = results_of(out, method.name, config)
        order[method.name] = sources.index(method.source), -mean(results, "gold")
    for method in sorted(methods, key=lambda method: order[method.name]):
        results = results_of(out, method.name, config)
        flags = f"`{best[method.name]}`" if best[method.name] else ""
        samples = mean(results, "samples")
        if method.more_samples:
            samples += np.mean([samples_of(place.start / method.more_samples) for place in places])
        rows.append([
            method.name,
            method.source,
            *(cell(result["gold"]) for result in results),
            *(cell(mean(results, name)) for name in ("wins", "ties", "losses", "kl")),
            "0" if method.source == "demonstrations" else f"{labels:,.0f}",
            f"{samples:,.0f}",
            f"{mean(results, 'seconds'):.0f}",
            f"{max(result['memory'] for result in results):.0f}",
            flags,
        ])
    return markdown(names, rows)


def markdown(names, rows):
    lines = [names, ["---"] * len(names), *rows]
    filled = [[*line, *[""] * (len(names) - len(line))] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in filled)


def claims_table(out, config):
    """Markdown: what the claims of papers are about, of runs on the usual labels and on others."""
    names = ["run", "gold", "lowest, highest of the seeds", "KL", "tokens of a reply",
             "change of the chosen log-probability", "gap of the log-ratios"]
    rows = []
    for name in SHOWN:
        results = results_of(out, name, config)
        gold = [result["gold"] for result in results]
        rows.append([name, cell(np.mean(gold)), f"{min(gold):.2f}, {max(gold):.2f}",
                     cell(mean(results, "kl")), cell(mean(results, "length"), "{:.1f}"),
                     cell(mean(results, "chosen"), "{:+.1f}"), cell(mean(results, "gap"), "{:.1f}")])
    return markdown(names, rows)


def search_table(found):
    """Markdown: the gold score of each try; the best of a method in bold."""
    rows = []
    for name, golds in found.items():
        best = max(golds, key=golds.get)
        tries = []
        for tried, gold in golds.items():
            text = f"`{tried}` {gold:.2f}"
            tries.append(f"**{text}**" if tried == best else text)
        rows.append([name, ", ".join(tries)])
    return markdown(["method", f"flags tried, and their gold score on seed {SEARCH}"], rows)


def draw(plt, out, methods, points, config):
    """Gold score over KL: methods as numbers, by colour of what they learn from; the best of n as a line.

    What lies far below SFT or far away is not in the picture, but said in the list beside it.
    """
    figure, axes = plt.subplots(figsize=(11, 6.5), constrained_layout=True)
    axes.set(xlabel="KL to SFT, nats per reply", ylabel="gold score", xlim=(-0.05, 2), ylim=(0, 0.95))
    kl, gold = zip(*((kl, np.mean(gold)) for kl, gold in points.values()))
    axes.plot(kl, gold, color="0.6", marker=".", zorder=1)
    for n, (x, y) in points.items():
        if x < 2:
            axes.annotate(f"best of {n}" if n > 1 else "SFT", (x, np.mean(y)), xytext=(4, -11), fontsize=8,
                          textcoords="offset points", color="0.4")
    sources = list(dict.fromkeys(method.source for method in methods))
    for number, method in enumerate(methods, 1):
        results = results_of(out, method.name, config)
        x, y = mean(results, "kl"), mean(results, "gold")
        inside = x < 2 and y > 0
        label = method.name if inside else f"{method.name} ({y:.2f} at {x:.1f})"
        colour = f"C{sources.index(method.source)}"
        axes.plot(x, y, "o", ms=10, color=colour, alpha=0.8, zorder=3, label=f"{number}  {label}")
        if inside:
            axes.annotate(str(number), (x, y), color="w", fontsize=7, ha="center", va="center", zorder=4)
    for place, source in enumerate(sources):
        axes.text(0.98, 0.04 + 0.035 * place, f"learns from {source}", color=f"C{place}", ha="right",
                  fontsize=9, transform=axes.transAxes)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=0.7)
    figure.savefig(ROOT / "bench" / "family.png", dpi=100)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------

def main(config):
    plt = pyplot()  # if it is missing, that is said now
    names = [method.name for method in METHODS]
    unknown = set(config.only) - set(names)
    require(not unknown, f"--only {', '.join(sorted(unknown))}: no such method; there are {', '.join(names)}")
    methods = [method for method in METHODS if not config.only or method.name in config.only]
    out = Path(config.out).resolve()

    # 1. what every method starts from
    starts = []
    for seed in (SEARCH, *range(config.seeds)):
        place = Place(out, seed)
        starts.append((f"start, seed {seed}",
                       lambda place=place: make_start(place.start, place.seed, config.groups)))
    run_all(starts, config.lanes)

    # 2. the search, then all methods with what it found; those that need others' models come last
    found = search(out, methods, config)
    best = {method.name: method.tries[0] for method in METHODS}
    best |= {name: max(golds, key=golds.get) for name, golds in found.items()}
    first = [method for method in methods if not method.after]
    run_all(final_jobs(out, first, best, config), config.lanes)
    if config.only:
        print(family_table(out, first, best, frontier(out, config), config))
        return
    last = [method for method in methods if method.after]
    run_all(final_jobs(out, last, best, config), config.lanes)

    # 3. claims
    claims = []
    for name, (method, line) in CLAIMS.items():
        for seed in range(config.seeds):
            claims.append(Place(out, seed).job(name, [line], best[method]))
    run_all(claims, config.lanes)

    # 4. tables and the figure
    points = frontier(out, config)
    table = family_table(out, methods, best, points, config)
    print(table)
    draw(plt, out, methods, points, config)
    put("family", table, "README.md")
    put("family claims", claims_table(out, config))
    put("family search", search_table(found))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
