"""The demo's last step: summary.json, curves.png, ppo_metrics.png and report.html from what the stages left in a folder.

    python report.py --demo runs/demo
    python report.py --curves runs/smollm2       any folder of runs (sft, reward, dpo, ppo): its curves alone
"""
import base64
import html
import json
import math
from dataclasses import dataclass
from pathlib import Path

from plumbing.flags import NonNegative, UserError, require
from plumbing.run import run_script
from plumbing.disk import write_atomically, write_json

STAGES = {"sft": "SFT", "ppo": "PPO", "dpo": "DPO"}
TRY_NEXT = [
    ("talk to it", "python chat.py --compare runs/demo/sft runs/demo/ppo"),
    ("over-optimisation: a reward model that saw few kinds of reply and no KL term, so the score rises and gold falls",
     "python reward.py --model runs/demo/sft --demonstrations toy --out runs/try/reward && "
     "python ppo.py --model runs/demo/sft --reward runs/try/reward --kl-coef 0 --lr 3e-3 --out runs/try/ppo"),
    ("see what the wrong KL estimator does",
     "python ppo.py --model runs/demo/sft --reward runs/demo/reward --kl k3 --out runs/try/k3"),
    ("another seed: other demonstrations, another split", "bash run.sh --seed 1"),
    ("your own data, README.md has the formats", "python sft.py --data rows.jsonl --out runs/try/own"),
]


@dataclass
class Config:
    demo: str = "runs/demo"  # folder that holds sft, reward, ppo, dpo and evaluation.json
    curves: str = ""  # folder that holds some of sft, reward, dpo, ppo, on any data: draw their curves alone
    seconds: NonNegative = 0.0  # wall time of the whole demo, for the summary; 0 keeps the one that is there
    debug: bool = False  # show the traceback of an error


def read_json(path):
    """A JSON file of a stage; UserError if the stage has not run."""
    require(path.is_file(), f"{path} is missing: run the stage that writes it (bash run.sh runs all of them)")
    return json.loads(path.read_bytes())


def read_metrics(folder):
    """{metric: ([step], [value])} from a run's metrics.jsonl."""
    series = {}
    require((folder / "metrics.jsonl").is_file(), f"{folder}/metrics.jsonl is missing: run that stage first")
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(value)
    return series


def summarise(evaluation, reward, seconds):
    """The flat headline numbers of summary.json, `stage.metric`, and all numbers of each stage under its name."""
    results = {Path(folder).name: result for folder, result in evaluation["results"].items()}
    summary = {"sft.gold": results["sft"]["gold"], "reward.accuracy": reward["accuracy"], "reward.bayes_accuracy": reward["bayes_accuracy"]}
    for stage in ("ppo", "dpo"):
        summary |= {f"{stage}.{name}": results[stage][name] for name in ("gold", "wins", "ties", "losses", "win_rate", "kl", "eos_rate")}
    return summary | {"seconds.total": seconds, "prompts": results["sft"]["prompts"], **results, "reward": reward}


def pyplot():
    """matplotlib's, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    return plt


def draw(demo, evaluation, reward, path):
    """Nine panels, from supervised loss to the gold score of each model, into a PNG."""
    plt = pyplot()
    sft, rm, ppo, dpo = (read_metrics(demo / name) for name in ("sft", "reward", "ppo", "dpo"))
    figure, grid = plt.subplots(3, 3, figsize=(12, 9), constrained_layout=True)

    def panel(axes, title, ylabel, xlabel="step"):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)

    def plot(axes, series, name, label=None, **style):
        axes.plot(*series[name], label=label, **style)

    axes = grid[0, 0]
    plot(axes, sft, "loss", "training", lw=0.8, alpha=0.7)
    plot(axes, sft, "val_loss", "held out", marker="o", ms=3)
    panel(axes, "SFT: loss", "nats per response token")

    axes = grid[0, 1]
    plot(axes, rm, "val_accuracy", "reward model", marker="o", ms=3)
    axes.axhline(reward["bayes_accuracy"], color="k", ls="--", lw=1, label="best that noisy labels allow")
    panel(axes, "Reward model: held-out accuracy", "share of pairs")

    axes = grid[0, 2]
    axes.plot([0.5, 1], [0.5, 1], "k--", lw=1, label="calibrated")
    axes.plot([b["predicted"] for b in reward["calibration"]], [b["observed"] for b in reward["calibration"]], marker="o", ms=3, label="reward model")
    panel(axes, "Reward model: calibration", "share that came true", "predicted probability")

    axes = grid[1, 0]
    plot(axes, ppo, "gold", "gold judge", color="tab:green")
    axes.set_ylim(-1, 1.05)
    twin = axes.twinx()
    plot(twin, ppo, "score", "reward model", color="tab:orange", lw=1)
    twin.set_ylabel("reward model's score")
    twin.grid(False)
    handles = axes.get_legend_handles_labels()[0] + twin.get_legend_handles_labels()[0]
    panel(axes, "PPO: what it is paid for, and the truth", "gold score", "rollout")
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")

    axes = grid[1, 1]
    plot(axes, ppo, "kl", "k1, summed over the reply")
    plot(axes, ppo, "kl_k3", "k3 (spikes cut)", lw=1)
    axes.set_ylim(min(0, *ppo["kl"][1]), 3 * max(0.1, *ppo["kl"][1]))  # one very unlikely token makes k3 huge
    panel(axes, "PPO: KL to the reference", "nats per reply", "rollout")

    axes = grid[1, 2]
    plot(axes, ppo, "entropy", "entropy (nats per token)")
    plot(axes, ppo, "explained_variance", "critic's explained variance")
    plot(axes, ppo, "clip_fraction", "clip fraction")
    axes.set_ylim(-0.25, 1.6)
    panel(axes, "PPO: health", "", "rollout")

    axes = grid[2, 0]
    plot(axes, dpo, "accuracy", "training", lw=0.8, alpha=0.7)
    plot(axes, dpo, "val_accuracy", "held out", marker="o", ms=3)
    panel(axes, "DPO: implicit reward's accuracy", "share of pairs")

    axes = grid[2, 1]
    plot(axes, dpo, "chosen_logprob", "chosen")
    plot(axes, dpo, "rejected_logprob", "rejected")
    panel(axes, "DPO: log-probability of replies", "nats per reply")

    axes = grid[2, 2]
    results = list(evaluation["results"].items())
    golds, errors = [r["gold"] for _, r in results], [r["standard_error"] for _, r in results]
    bars = axes.bar([STAGES.get(Path(f).name, f) for f, _ in results], golds, yerr=errors, color=["tab:gray", "tab:green", "tab:blue"][:len(results)])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axhline(0, color="k", lw=0.8)
    axes.set_ylim(-1, 1.15)
    axes.grid(False)
    panel(axes, f"Gold score on {results[0][1]['prompts']} held-out prompts", "mean, from -1 to 1", "sampled at temperature 1")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ppo(series, path):
    """Every metric that ppo.py logs, one small panel each: what a healthy run looks like."""
    plt = pyplot()
    names = [name for name in series if name not in ("step", "lr", "critic_lr", "kl_coef", "updates") and not name.endswith(("_per_second", "_share"))]
    figure, grid = plt.subplots(math.ceil(len(names) / 5), 5, figsize=(12, 1.7 * math.ceil(len(names) / 5)), constrained_layout=True)
    for axes in grid.flat[len(names):]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names):
        axes.plot(*series[name], lw=1)
        axes.set_title(name, fontsize=9, loc="left")
        if name == "kl_k3":  # one very unlikely token makes k3 huge
            axes.set_ylim(0, 3 * max(0.1, *series["kl"][1]))
        elif name == "eos_rate":
            axes.set_ylim(0, 1.05)
    figure.savefig(path, dpi=80)
    plt.close(figure)


CURVES = [("sft", "loss", "val_loss"), ("reward", "loss"), ("reward", "accuracy", "val_accuracy"), ("dpo", "accuracy", "val_accuracy"),
          ("dpo", "chosen_logprob", "rejected_logprob"), ("ppo", "score"), ("ppo", "kl"), ("ppo", "entropy"), ("ppo", "length"), ("ppo", "explained_variance")]


def draw_curves(folder, path):
    """The main metrics of whichever stages have run in a folder, one panel each; noisy ones with their mean over a tenth of the run."""
    plt = pyplot()
    found = {stage: read_metrics(folder / stage) for stage in ("sft", "reward", "dpo", "ppo") if (folder / stage / "metrics.jsonl").is_file()}
    panels = [(stage, *names) for stage, *names in CURVES if stage in found]
    require(panels, f"--curves {folder} holds no run (sft, reward, dpo, ppo)")
    figure, grid = plt.subplots(math.ceil(len(panels) / 5), 5, figsize=(14, 2.6 * math.ceil(len(panels) / 5)), constrained_layout=True, squeeze=False)
    for axes in grid.flat[len(panels):]:
        axes.set_visible(False)
    for axes, (stage, *names) in zip(grid.flat, panels):
        for name, colour in zip(names, ("tab:blue", "tab:orange")):
            steps, values = found[stage].get(name, ([], []))
            if name.startswith("val_") or len(values) < 10:
                axes.plot(steps, values, "o-", color=colour, ms=4, lw=1, label="held out" if name.startswith("val_") else name)
                continue
            window = max(1, len(values) // 10)
            smooth = [sum(values[max(0, i - window + 1):i + 1]) / len(values[max(0, i - window + 1):i + 1]) for i in range(len(values))]
            axes.plot(steps, values, color=colour, lw=0.7, alpha=0.4)
            axes.plot(steps, smooth, color=colour, lw=1.5, label=name)
        axes.set_title(f"{stage}: {names[0].removesuffix('_logprob')}" + (" and rejected" if names[0] == "chosen_logprob" else ""), fontsize=9, loc="left")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7)
        axes.set_xlabel("rollout" if stage == "ppo" else "step", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def pick_questions(evaluation, number=3):
    """Evenly spread prompts, whatever the models made of them: [(prompt, {stage: (reply, score)})]."""
    columns = {Path(folder).name: rows for folder, rows in evaluation["replies"].items()}
    size = len(columns["sft"])
    places = [(2 * part + 1) * size // (2 * number) for part in range(number)]
    return [(columns["sft"][i]["prompt"], {name: (rows[i]["reply"], rows[i]["score"]) for name, rows in columns.items()}) for i in places]


def main(config):
    if config.curves:
        # The curves.png of a demo is another picture, of which its report is a part.
        folder = Path(config.curves)
        path = folder / ("stages.png" if (folder / "summary.json").exists() else "curves.png")
        draw_curves(folder, path)
        print(path)
        return
    demo = Path(config.demo)
    evaluation, reward = read_json(demo / "evaluation.json"), read_json(demo / "reward" / "evaluation.json")
    seconds = config.seconds
    if not seconds and (demo / "summary.json").exists():
        seconds = read_json(demo / "summary.json").get("seconds.total", 0.0)
    summary = summarise(evaluation, reward, seconds)
    draw(demo, evaluation, reward, demo / "curves.png")
    draw_ppo(read_metrics(demo / "ppo"), demo / "ppo_metrics.png")
    questions = pick_questions(evaluation)

    names = ("gold", "wins", "ties", "losses", "win_rate", "kl", "length", "eos_rate")
    cells = []
    for stage in STAGES:
        numbers = [summary[stage][name] for name in names]
        # Greedy replies have no KL.
        cells.append([STAGES[stage], *("" if number is None else f"{number:.3f}" for number in numbers)])

    def table(head, rows):
        return "<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>" + "".join(
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows) + "</table>"

    picture = base64.b64encode((demo / "curves.png").read_bytes()).decode()
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>bareRLHF demo</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }} img {{ width: 100% }}
table {{ border-collapse: collapse; margin: 1em 0 }} th, td {{ border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: left }}
code {{ background: #f3f3f3; padding: .1em .3em; overflow-wrap: anywhere }}</style>
<h1>From demonstrations to a policy people prefer</h1>
<p>A small GPT was fine-tuned on mixed demonstrations (SFT), a reward model learned from noisy rankings, and PPO and DPO improved
the policy. The gold judge knows the truth of this closed world: it stood behind the rankings, one pair in ten of which is the wrong way
round, and measured the result. Replies are sampled at temperature 1 on {summary['prompts']} held-out prompts;
wins, ties and losses are against SFT. Total wall time: {seconds:.0f} s.</p>
{table(["", *names], cells)}
<p>Reward model: held-out accuracy {reward['accuracy']:.3f}; the noise of the labels allows {reward['bayes_accuracy']:.3f}.</p>
<img alt="training curves of all stages" src="data:image/png;base64,{picture}">
<h2>Three questions (gold score in brackets)</h2>
{table(["question", *STAGES.values()], [[q, *(f"{r} ({s:+.1f})" for r, s in replies.values())] for q, replies in questions])}
<h2>What to try next</h2><ul>{"".join(f"<li>{html.escape(what)}<br><code>{html.escape(command)}</code></li>" for what, command in TRY_NEXT)}</ul></html>
"""
    write_atomically(demo / "report.html", page.encode())
    write_json(demo / "summary.json", summary)
    print(f"\n{'':8}" + "".join(f"{name:>10}" for name in names)
          + f"   ({summary['prompts']} held-out prompts, wins against SFT)")
    for row in cells:
        print(f"{row[0]:8}" + "".join(f"{cell:>10}" for cell in row[1:]))
    print(f"reward model: held-out accuracy {reward['accuracy']:.3f}; "
          f"the labels' noise allows {reward['bayes_accuracy']:.3f}\n")
    for prompt, replies in questions:
        print(prompt)
        for stage, (reply, score) in replies.items():
            print(f"  {STAGES[stage]} ({score:+.1f}): {reply}")
    print("\nWhat to try next:" + "".join(f"\n  {what}:\n    {command}" for what, command in TRY_NEXT))
    print(f"\nPicture: {demo}/curves.png   Every metric of PPO: {demo}/ppo_metrics.png   Report: {demo}/report.html   Numbers: {demo}/summary.json")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
