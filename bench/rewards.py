"""Three claims about reward models, on the embedded task: ties, the language-model term, ensembles.

    python bench/rewards.py        the tables, put into bench/RESULTS.md, and bench/rewards.png: about an
                                   hour of one processor; it resumes

Ties: what replies of equal rank teach, dropped, as soft labels and by Rao-Kupper, on few rankings and on
many. The language-model term: what it keeps of the trunk's perplexity, and at what cost in accuracy.
Ensembles: reward models that differ in their seed (the fresh head, the order of the data) learn from few
narrow rankings, so that each alone is easily fooled; best-of-n and PPO without a KL term then optimise one of
them, or all as --reward-combine makes one score of them, and the gold score says who is fooled when.

What it starts from is that of bench/family.py (--out runs/family saves making it): for each seed the task's
files, an SFT model, and 8,000 rankings by a tired annotator, one pair in ten the wrong way round. Accuracy
is measured on rankings over the held-out prompts without such noise. A command that was run once is not run
again, as long as its line is the same.
"""
import functools
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import toy  # noqa: E402
from agreement import language_baselines, score_replies  # noqa: E402
from bench.ablate import best_of_n, put, read  # noqa: E402
from bench.family import make_start, markdown, run_line  # noqa: E402
from data import (  # noqa: E402
    Example, encode_group, ranked_pairs, ranking_accuracy, right_shares, tied_pairs, variance_of_mean)
from formats.model_folder import load_model  # noqa: E402
from formats.rows import Row  # noqa: E402
from formats.sources import read_rows  # noqa: E402
from judges import combined, load_functions  # noqa: E402
from model import GPT, ScalarModel, shifted  # noqa: E402
from plumbing.disk import write_atomically, write_json  # noqa: E402
from plumbing.flags import Count  # noqa: E402
from plumbing.run import Alone, run_script  # noqa: E402
from report import pyplot  # noqa: E402
from rollout import load_prompts  # noqa: E402

FEW, MANY = 2000, 8000  # rankings to learn from
COUNTS = (FEW, MANY)  # of them in the table of ties
TIES = ("drop", "soft", "rao-kupper")
# Weights of the language-model term: on all seeds, and on the first alone.
LM_COEFS = (0.0, 1.0)
MORE_COEFS = (0.01, 0.1)
MEMBERS = 4  # reward models of an ensemble
BEST_OF = 256  # replies to a prompt
CHOSEN = 16  # the best of so many, in the table of ties
# Flags of reward.py on small sets of labels: more passes at half the learning rate.
LEARN = "--epochs 5 --lr 1e-3 --eval-every 1000000"
# Flags of PPO: nothing ties it to the start.
FOOLED = "--kl-coef 0 --lr 5e-4 --steps 40 --rollout-batch 128"
WINDOW = 4  # rollouts whose mean is a point of the figure
# {how scores of several reward models become one: (flags, what they look like in the figure)}.
ENSEMBLES = {
    "mean": ("--reward-combine mean", "C0"),
    "min": ("--reward-combine min", "C2"),
    "pessimistic, 1 deviation": ("--reward-combine pessimistic", "C1"),
    "pessimistic, 2 deviations": ("--reward-combine pessimistic --pessimism 2", "C3"),
}
ALONE = 2  # members that PPO is also run on by themselves
ONE = "one model"


@dataclass
class Config:
    out: str = "runs/family"  # folder for files and models
    seeds: Count = 3  # of the task, the models and the sampling
    debug: bool = False  # show the traceback of an error


class Place(NamedTuple):
    """The folders of one seed."""
    out: Path
    seed: int

    @property
    def start(self):
        return self.out / f"seed-{self.seed}" / "start"

    @property
    def folder(self):
        return self.out / f"seed-{self.seed}" / "rewards"


# ---------------------------------------------------------------------------------------------------------
# Running, and keeping what was found

def run_once(place, name, line):
    """Run a command whose --out is a folder of this name, unless it was run before. Returns the folder."""
    folder, record = place.folder / name, place.folder / f"{name}.json"
    line = f"{line} --out {folder}"
    if record.exists() and json.loads(record.read_text())["line"] == line:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    seconds, _ = run_line(line, place.folder / "log.txt")
    write_json(record, {"line": line, "seconds": seconds})
    print(f"  {name}, seed {place.seed}: {seconds:.0f} s", flush=True)
    return folder


def kept(path, compute):
    """What compute() returns, from a file if it stands there already."""
    if not path.exists():
        write_json(path, compute())
    return json.loads(path.read_text())


def first_rows(source, count, path):
    """Write the first rows of a file."""
    if not path.exists():
        write_atomically(path, b"".join(source.read_bytes().splitlines(keepends=True)[:count]))
    return path


def reward_model(place, name, data, flags, seed):
    """The folder of a reward model of these rankings."""
    return run_once(
        place, name,
        f"reward.py --model {place.start}/sft --data {data} "
        f"--val-data {place.start}/preferences/heldout.jsonl "
        f"--demonstrations {place.start}/toy/demonstrations.jsonl {LEARN} {flags} --seed {seed} --threads 1")


def prepare(place):
    """What all parts of a seed need: the start, and rankings over held-out prompts without noise."""
    make_start(place.start, place.seed, MANY)
    place.folder.mkdir(exist_ok=True)
    run_once(place, "truth",
             f"toy.py --model {place.start}/sft --groups 1 --heldout-groups 2000 --noise 0 "
             f"--seed {place.seed} --threads 1")


# ---------------------------------------------------------------------------------------------------------
# Measuring

def alone():
    return Alone(torch.device("cpu"), torch.float32)


@functools.cache
def heldout(place):
    """Rows of the held-out rankings without noise."""
    return read_rows(place.folder / "truth" / "heldout.jsonl", "feedback", lambda text: None)


def samples(place):
    """The SFT model's replies to every second held-out prompt, BEST_OF each.

    {prompts: N, replies, ended, gold: N x BEST_OF}.
    """
    def draw():
        policy, tokenizer = load_model(place.start / "sft", GPT)
        settings = evaluate.Config(data=f"{place.start}/toy/prompts_heldout.jsonl", samples=BEST_OF,
                                   batch=4 * BEST_OF, seed=place.seed)
        prompts = load_prompts(settings, tokenizer, policy.config.block_size, lambda text: None)[::2]
        policy.eval()
        texts, ended, _, _, _, (gold,) = evaluate.answer(
            alone(), policy, policy, [], [], load_functions("--judge", ["toy:gold"]), tokenizer, prompts,
            settings)
        shape = len(prompts), BEST_OF
        return {
            "prompts": [prompt.row.text for prompt in prompts],
            "replies": np.array(texts, object).reshape(shape).tolist(),
            "ended": ended.astype(bool).reshape(shape).tolist(),
            "gold": gold.reshape(shape).tolist(),
        }

    return kept(place.folder / "samples.json", draw)


def encode(tokenizer, prompt, reply, ended):
    """[Example] of one reply, without the end token if it never came to it."""
    example, = encode_group(tokenizer, Row(toy.ask_for(prompt), [reply], [0]))
    if not ended:
        example = Example(example.ids[:-1], example.mask[:-1])
    return [example]


def sample_scores(place, folder):
    """(N, BEST_OF): the scores of the `samples` by a reward model. Equal replies are scored once."""
    found = samples(place)

    def score():
        model, tokenizer = load_model(folder, ScalarModel)
        number, groups, places = {}, [], []
        for prompt, replies, ended in zip(found["prompts"], found["replies"], found["ended"]):
            for reply, finished in zip(replies, ended):
                key = prompt, reply, finished
                if key not in number:
                    number[key] = len(groups)
                    groups.append(encode(tokenizer, *key))
                places.append(number[key])
        scores = score_replies(alone(), model, groups, 16384, tokenizer.pad)[places]
        return scores.reshape(-1, BEST_OF).tolist()

    return np.array(kept(folder / "samples.json", score))


def heldout_scores(place, folder):
    """(N,): the scores of the replies of the held-out rankings."""
    def score():
        model, tokenizer = load_model(folder, ScalarModel)
        groups = [encode_group(tokenizer, row) for row in heldout(place)]
        return score_replies(alone(), model, groups, 16384, tokenizer.pad).tolist()

    return np.array(kept(folder / "heldout.json", score))


def tie_ratio(scores, rows):
    """Mean distance of tied replies over that of replies that a ranking tells apart. scores (N,)."""
    tied, start = [], 0
    for row in rows:
        own = scores[start:start + len(row.replies)]
        tied += [abs(own[i] - own[j]) for i, j in tied_pairs(row.ranks)]
        start += len(row.replies)
    better, worse, _, _ = ranked_pairs(rows)
    decided = np.abs(scores[better.numpy()] - scores[worse.numpy()])
    return float(np.mean(tied) / decided.mean())


def tied_share(rows):
    """Share of all pairs of some rankings whose replies tie."""
    tied = sum(len(tied_pairs(row.ranks)) for row in rows)
    pairs = sum(math.comb(len(row.replies), 2) for row in rows)
    return tied / pairs


def accuracy_gain(scores, others, rows):
    """By how much scores (N,) order some rows better than others (N,): mean, its variance over prompts."""
    gain = right_shares(scores, rows)[0] - right_shares(others, rows)[0]  # (rows,)
    return gain.mean(), variance_of_mean(gain, rows)[0]


def gold_gain(gold, scores, others):
    """By how much the best of CHOSEN by scores (N, S) is better than that by others: mean, and its variance.

    gold (N, S). The variance is over prompts.
    """
    gain = [best_of_chosen(gold[i:i + 1], scores[i:i + 1]) - best_of_chosen(gold[i:i + 1], others[i:i + 1])
            for i in range(len(gold))]
    return np.mean(gain), np.var(gain, ddof=1) / len(gain)


def best_of_chosen(gold, scores):
    """Mean gold score of the best of CHOSEN replies. gold, scores (N, S)."""
    return best_of_n(gold, scores)[int(math.log2(CHOSEN))][2]


def over_seeds(gains):
    """Cell: mean of [(gain, its variance)] of some seeds, and half of its 95 % interval."""
    means, variances = zip(*gains)
    return f"{np.mean(means):+.3f} ± {1.96 * math.sqrt(sum(variances)) / len(gains):.3f}"


class Measured(NamedTuple):
    """Of reward models of some places, beside others that learned in the usual way. A number for each place.

    The gains are (mean, its variance).
    """
    accuracies: list
    golds: list  # of the best of CHOSEN
    accuracy_gains: list
    gold_gains: list


def measured(places, folders, usual):
    """`Measured` of the reward models in folders, beside those in the folders usual."""
    found = Measured([], [], [], [])
    for place, folder, other in zip(places, folders, usual):
        gold, rows = np.array(samples(place)["gold"]), heldout(place)
        scores, others = heldout_scores(place, folder), heldout_scores(place, other)
        of_samples, of_others = sample_scores(place, folder), sample_scores(place, other)
        found.accuracies.append(ranking_accuracy(scores, rows)[0])
        found.golds.append(best_of_chosen(gold, of_samples))
        found.accuracy_gains.append(accuracy_gain(scores, others, rows))
        found.gold_gains.append(gold_gain(gold, of_samples, of_others))
    return found


def cell(values, form="{:.3f}"):
    """A mean over seeds; if there are several, the smallest and the largest too."""
    mean, low, high = (form.format(value) for value in (np.mean(values), np.min(values), np.max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


# ---------------------------------------------------------------------------------------------------------
# 1. Ties

def rankings(place, count):
    """The file of the first so many of the tired annotator's rankings."""
    whole = place.start / "preferences" / "train.jsonl"
    return whole if count == MANY else first_rows(whole, count, place.folder / f"few-{count}.jsonl")


def tied_model(place, count, ties):
    """The folder of a reward model; that which the start has already is one of them."""
    if (count, ties) == (MANY, "drop"):
        return place.start / "reward"
    flags = "" if ties == "drop" else f"--ties {ties}"
    return reward_model(place, f"{ties}-{count}", rankings(place, count), flags, place.seed)


def ties_table(places):
    """Markdown."""
    names = ["rankings", "`--ties`", "accuracy", "less that of drop", f"gold of the best of {CHOSEN}",
             "less that of drop", "distance of tied replies", "nu"]
    lines = []
    for count in COUNTS:
        usual = [tied_model(place, count, "drop") for place in places]
        for ties in TIES:
            folders = [tied_model(place, count, ties) for place in places]
            found = measured(places, folders, usual)
            ratios, thresholds = [], []
            for place, folder in zip(places, folders):
                ratios.append(tie_ratio(heldout_scores(place, folder), heldout(place)))
                told = json.loads((folder / "evaluation.json").read_text())
                thresholds.append(told.get("tie_threshold", 0))
            is_drop = ties == "drop"
            lines.append([
                f"{count:,}",
                ties,
                cell(found.accuracies),
                "" if is_drop else over_seeds(found.accuracy_gains),
                cell(found.golds, "{:.2f}"),
                "" if is_drop else over_seeds(found.gold_gains),
                cell(ratios, "{:.2f}"),
                cell(thresholds, "{:.2f}") if ties == "rao-kupper" else "",
            ])
    return markdown(names, lines)


# ---------------------------------------------------------------------------------------------------------
# 2. The language-model term

def lm_model(place, coef):
    """The folder of a reward model of few rankings; without the term it is one of the table of ties."""
    if coef == 0:
        return tied_model(place, FEW, "drop")
    return reward_model(place, f"lm-{coef:g}", rankings(place, FEW), f"--lm-coef {coef:g}", place.seed)


def language_model_of(folder, start):
    """A reward model's trunk as a language model: GPT. start: the folder of the one that it was made of.

    What made 0 the mean score of the demonstrations, in the bias of the last norm, is undone if there is a
    folder's evaluation.json to say by how much.
    """
    language_model, tokenizer = load_model(start, GPT)
    scalar, _ = load_model(folder, ScalarModel)
    told = json.loads((folder / "evaluation.json").read_text())
    weights = shifted(scalar.state_dict(), -told["demonstrations_mean_before"])
    weights.pop("score.weight")
    language_model.load_state_dict(weights)
    return language_model, tokenizer


def perplexities(place, language_model, tokenizer):
    """{what: perplexity}, of held-out demonstrations and of the best replies of held-out rankings."""
    best = []
    for row in heldout(place):
        best += [Row(row.prompt, [reply], [0]) for reply, rank in zip(row.replies, row.ranks)
                 if rank == min(row.ranks)]
    demonstrations = place.start / "toy" / "demonstrations_heldout.jsonl"
    files = {
        "demonstrations": read_rows(demonstrations, "demonstrations", lambda text: None),
        "best replies": best,
    }
    found = {}
    for name, rows in files.items():
        groups = [encode_group(tokenizer, row) for row in rows]
        told = language_baselines(alone(), language_model, groups, 16384, tokenizer.pad)
        tokens = told["logprob"] / told["logprob_per_token"]
        found[name] = math.exp(-told["logprob"].sum() / tokens.sum())
    return found


def lm_table(places):
    """Markdown."""
    names = ["`--lm-coef`", "seeds", "perplexity of demonstrations", "of best replies", "accuracy",
             "less that without", f"gold of the best of {CHOSEN}", "less that without"]
    before = []
    for place in places:
        before.append(kept(place.folder / "perplexity.json",
                           lambda: perplexities(place, *load_model(place.start / "sft", GPT))))
    lines = [["the SFT model", len(places), *perplexity_cells(before)]]
    for coef in sorted(LM_COEFS + MORE_COEFS):
        used = places if coef in LM_COEFS else places[:1]
        folders = [lm_model(place, coef) for place in used]
        found = measured(used, folders, [lm_model(place, 0) for place in used])
        after = []
        for place, folder in zip(used, folders):
            after.append(kept(folder / "perplexity.json", lambda: perplexities(
                place, *language_model_of(folder, place.start / "sft"))))
        lines.append([
            f"{coef:g}",
            len(used),
            *perplexity_cells(after),
            cell(found.accuracies),
            over_seeds(found.accuracy_gains) if coef else "",
            cell(found.golds, "{:.2f}"),
            over_seeds(found.gold_gains) if coef else "",
        ])
    return markdown(names, [[str(word) for word in line] for line in lines])


def perplexity_cells(found):
    """A cell for each thing that the perplexity was measured of. found: `perplexities` of each seed."""
    return [cell([one[name] for one in found], "{:.2f}") for name in found[0]]


# ---------------------------------------------------------------------------------------------------------
# 3. Ensembles

def members(place):
    """Folders of the reward models of an ensemble, on the same few of the generator's rankings."""
    narrow = first_rows(place.start / "toy" / "preferences.jsonl", FEW, place.folder / "narrow.jsonl")
    return [reward_model(place, f"member-{k}", narrow, "", 10 * place.seed + k) for k in range(MEMBERS)]


def together(scores, flags):
    """Scores (N, S) that flags of --reward-combine make of those of some models (members, N, S)."""
    words = flags.split()
    kind, pessimism = words[1], float(words[3]) if len(words) > 2 else 1.0
    config = SimpleNamespace(reward_combine=kind, pessimism=pessimism, reward_fn=[], process="")
    flat = scores.reshape(len(scores), -1)
    return combined(flat, np.ones(len(scores)), config).reshape(scores.shape[1:])


def curve_of(place, scores):
    """[(sqrt(KL), proxy, gold score)] of the best of n = 1, 2, 4, ... `samples`. scores (N, BEST_OF)."""
    return best_of_n(np.array(samples(place)["gold"]), scores)


def best_of_n_curves(place):
    """{scorer: (points, 3)}, as `curve_of`; of one model the mean over all of them."""
    scores = np.array([sample_scores(place, folder) for folder in members(place)])  # (members, N, BEST_OF)
    curves = {ONE: np.mean([curve_of(place, own) for own in scores], 0)}
    for name, (flags, _) in ENSEMBLES.items():
        curves[name] = np.array(curve_of(place, together(scores, flags)))
    return curves


def ppo_curves(place):
    """{scorer: (points, 3)}: (sqrt(KL), proxy score, gold score), means of rollouts that follow each other.

    Of one model a list of several such.
    """
    folders = members(place)
    line = (f"ppo.py --model {place.start}/sft --data {place.start}/toy/prompts.jsonl --judge toy:gold "
            f"{FOOLED} --seed {place.seed} --threads 1")
    runs = {ONE: []}
    for k in range(ALONE):
        runs[ONE].append(points_of(run_once(place, f"ppo-member-{k}", f"{line} --reward {folders[k]}")))
    everyone = " ".join(map(str, folders))
    for name, (flags, _) in ENSEMBLES.items():
        slug = "ppo-" + flags.removeprefix("--reward-combine ").replace(" --pessimism ", "-")
        runs[name] = [points_of(run_once(place, slug, f"{line} --reward {everyone} {flags}"))]
    return runs


def points_of(folder):
    """(points, 3) of a PPO run, see `ppo_curves`."""
    told = read(folder)
    means = []
    for metric in ("kl", "score", "gold"):
        whole = len(told[metric]) // WINDOW * WINDOW
        means.append(told[metric][:whole].reshape(-1, WINDOW).mean(1))
    kl, score, gold = means
    return np.stack([np.sqrt(np.maximum(0, kl)), score, gold], 1)


def ensembles_table(best, ppo):
    """Markdown. best, ppo: what `best_of_n_curves` and `ppo_curves` gave, for each seed."""
    names = ["score", "best of n: most gold", "at n", f"gold at n = {BEST_OF}", "PPO: most gold",
             "at rollout", "at KL", "gold at the end", "KL at the end"]
    lines = []
    for name in best[0]:
        line = [name]
        golds = np.array([curves[name][:, 2] for curves in best])  # (seeds, points)
        line += [cell(golds.max(1), "{:.2f}"), ", ".join(str(2**k) for k in golds.argmax(1)),
                 cell(golds[:, -1], "{:.2f}")]
        runs = np.array([run for curves in ppo for run in curves[name]])  # (runs, points, 3)
        golds, kls = runs[:, :, 2], runs[:, :, 0] ** 2
        top = golds.argmax(1)
        line += [cell(golds.max(1), "{:.2f}"), cell(WINDOW * (top + 1), "{:.0f}"),
                 cell(kls[np.arange(len(top)), top], "{:.1f}"), cell(golds[:, -1], "{:.2f}"),
                 cell(kls[:, -1], "{:.1f}")]
        lines.append(line)
    return markdown(names, lines)


def draw(plt, best, ppo, path):
    """Gold score, and the score that is optimised, over n and over rollouts; KL, and gold over it.

    Means over runs, and in the background all that they range over.
    """
    figure, grid = plt.subplots(2, 3, figsize=(14, 7), constrained_layout=True)
    (of_n, of_rollouts, kls), (proxy_of_n, proxy_of_rollouts, over_kl) = grid
    colours = {ONE: "k"} | {name: colour for name, (_, colour) in ENSEMBLES.items()}
    for name, colour in colours.items():
        curves = np.array([found[name] for found in best])  # (seeds, points, 3)
        runs = np.array([run for found in ppo for run in found[name]])  # (runs, points, 3)
        n = 2 ** np.arange(curves.shape[1])
        rollouts = WINDOW * np.arange(1, runs.shape[1] + 1)
        panels = (
            (of_n, n, curves[:, :, 2]),
            (proxy_of_n, n, curves[:, :, 1]),
            (of_rollouts, rollouts, runs[:, :, 2]),
            (proxy_of_rollouts, rollouts, runs[:, :, 1]),
            (kls, rollouts, runs[:, :, 0] ** 2),
        )
        for axes, x, y in panels:
            axes.plot(x, y.mean(0), color=colour, lw=1.4, label=name)
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.07, lw=0)
        over_kl.plot(runs[:, :, 0].mean(0), runs[:, :, 2].mean(0), color=colour, lw=1.2, marker=".")
    of_n.set(title="best of n: gold score", xlabel="n")
    proxy_of_n.set(title="best of n: the score that chooses", xlabel="n")
    of_rollouts.set(title="PPO, no KL term: gold score", xlabel="rollout")
    proxy_of_rollouts.set(title="PPO, no KL term: the score that it learns from", xlabel="rollout")
    kls.set(title="PPO, no KL term: KL to SFT, nats per reply", xlabel="rollout", yscale="symlog")
    over_kl.set(title="PPO, no KL term: gold score", xlabel="sqrt(KL)")
    for axes in (of_n, proxy_of_n):
        axes.set_xscale("log", base=2)
    of_n.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------

def seconds_of(places):
    """{part: processor seconds of its commands}, by the first word of their names."""
    parts = {}
    for place in places:
        for record in sorted(place.folder.glob("*.json")):
            told = json.loads(record.read_text())
            if "seconds" in told:
                part = record.stem.partition("-")[0]
                parts[part] = parts.get(part, 0) + told["seconds"]
    return parts


def main(config):
    # If it is missing, that is said now.
    plt = pyplot()
    torch.set_num_threads(1)
    out = Path(config.out).resolve()
    places = [Place(out, seed) for seed in range(config.seeds)]
    for place in places:
        prepare(place)

    text = ties_table(places)
    print(text)
    put("reward ties", text)
    text = lm_table(places)
    print(text)
    put("reward language", text)
    best = [best_of_n_curves(place) for place in places]
    ppo = [ppo_curves(place) for place in places]
    text = ensembles_table(best, ppo)
    print(text)
    put("reward ensembles", text)
    draw(plt, best, ppo, ROOT / "bench" / "rewards.png")
    print("processor seconds:", seconds_of(places))


if __name__ == "__main__":
    run_script(main, Config, __doc__)
