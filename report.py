"""The demo's last step, from what the stages left in a folder.

Writes summary.json, curves.png, ppo_metrics.png and report.html.

    python report.py --demo runs/demo
    python report.py --curves runs/smollm2       any folder of runs (sft, reward, dpo, ppo, grpo): its curves
"""
import base64
import html
import json
import math
from dataclasses import dataclass
from pathlib import Path

from plumbing.disk import write_atomically, write_json
from plumbing.flags import NonNegative, require
from plumbing.pictures import pyplot
from plumbing.run import run_script

STAGES = {"sft": "SFT", "ppo": "PPO", "dpo": "DPO"}
TRY_NEXT = [
    ("talk to it", "python chat.py --compare runs/demo/sft runs/demo/ppo"),
    ("over-optimisation: a reward model that saw few kinds of reply and no KL term, "
     "so the score rises and gold falls",
     "python reward.py --model runs/demo/sft --data runs/demo/toy/preferences.jsonl --out runs/try/reward && "
     "python ppo.py --model runs/demo/sft --reward runs/try/reward --data runs/demo/toy/prompts.jsonl "
     "--judge toy:gold --kl-coef 0 --lr 3e-3 --out runs/try/ppo"),
    ("see what the wrong KL estimator does",
     "python ppo.py --model runs/demo/sft --reward runs/demo/reward --data runs/demo/toy/prompts.jsonl "
     "--judge toy:gold --kl k3 --out runs/try/k3"),
    ("another seed: other demonstrations, another split", "bash run.sh --seed 1"),
    ("your own data, README.md has the formats", "python sft.py --data rows.jsonl --out runs/try/own"),
]


@dataclass
class Config:
    demo: str = "runs/demo"  # folder that holds sft, reward, ppo, dpo and evaluation.json
    # folder that holds some of sft, reward, dpo, ppo, grpo, on any data: draw their curves alone
    curves: str = ""
    seconds: NonNegative = 0.0  # wall time of the whole demo, for the summary; 0 keeps the one that is there
    debug: bool = False  # show the traceback of an error


def read_json(path):
    """A JSON file of a stage; UserError if the stage has not run."""
    require(path.is_file(), f"{path} is missing: run the stage that writes it (bash run.sh runs all of them)")
    return json.loads(path.read_bytes())


def read_metrics(folder):
    """{metric: ([step], [value])} from a run's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    require(path.is_file(), f"{path} is missing: run that stage first")
    series = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(row["step"])
            values.append(value)
    return series


def summarise(evaluation, reward, seconds):
    """The headline numbers of summary.json, `stage.metric`, and all numbers of each stage under its name."""
    results = {Path(folder).name: result for folder, result in evaluation["results"].items()}
    summary = {
        "sft.gold": results["sft"]["gold"],
        "reward.accuracy": reward["accuracy"],
        "reward.bayes_accuracy": reward["bayes_accuracy"],
    }
    for stage in ("ppo", "dpo"):
        for name in ("gold", "wins", "ties", "losses", "win_rate", "kl", "eos_rate"):
            summary[f"{stage}.{name}"] = results[stage][name]
    summary["seconds.total"] = seconds
    summary["prompts"] = results["sft"]["prompts"]
    summary.update(results)
    summary["reward"] = reward
    return summary


def draw(demo, evaluation, reward, path):
    """Nine panels, from supervised loss to the gold score of each model, into a PNG."""
    plt = pyplot()
    sft = read_metrics(demo / "sft")
    rm = read_metrics(demo / "reward")
    ppo = read_metrics(demo / "ppo")
    dpo = read_metrics(demo / "dpo")
    figure, grid = plt.subplots(3, 3, figsize=(12, 9), constrained_layout=True)
    draw_sft(grid[0, 0], sft)
    draw_reward(grid[0, 1], grid[0, 2], rm, reward)
    draw_ppo_panels(grid[1], ppo)
    draw_dpo(grid[2, 0], grid[2, 1], dpo)
    draw_gold(grid[2, 2], evaluation["results"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def panel(axes, title, ylabel, xlabel="step"):
    """Finish a panel: its title, its axes' names, and a legend if lines have labels."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def plot(axes, series, name, label=None, **style):
    axes.plot(*series[name], label=label, **style)


def draw_sft(axes, sft):
    plot(axes, sft, "loss", "training", lw=0.8, alpha=0.7)
    plot(axes, sft, "val_loss", "held out", marker="o", ms=3)
    panel(axes, "SFT: loss", "nats per response token")


def draw_reward(axes, calibration_axes, rm, reward):
    plot(axes, rm, "val_accuracy", "reward model", marker="o", ms=3)
    axes.axhline(reward["bayes_accuracy"], color="k", ls="--", lw=1, label="best that noisy labels allow")
    panel(axes, "Reward model: held-out accuracy", "share of pairs")

    axes = calibration_axes
    predicted = [bucket["predicted"] for bucket in reward["calibration"]]
    observed = [bucket["observed"] for bucket in reward["calibration"]]
    axes.plot([0.5, 1], [0.5, 1], "k--", lw=1, label="calibrated")
    axes.plot(predicted, observed, marker="o", ms=3, label="reward model")
    panel(axes, "Reward model: calibration", "share that came true", "predicted probability")


def draw_ppo_panels(row, ppo):
    """Three panels: score and gold, KL, health."""
    axes = row[0]
    plot(axes, ppo, "gold", "gold judge", color="tab:green")
    axes.set_ylim(-1, 1.05)
    twin = axes.twinx()
    plot(twin, ppo, "score", "reward model", color="tab:orange", lw=1)
    twin.set_ylabel("reward model's score")
    twin.grid(False)
    handles = axes.get_legend_handles_labels()[0] + twin.get_legend_handles_labels()[0]
    panel(axes, "PPO: what it is paid for, and the truth", "gold score", "rollout")
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")

    axes = row[1]
    plot(axes, ppo, "kl", "k1, summed over the reply")
    plot(axes, ppo, "kl_k3", "k3 (spikes cut)", lw=1)
    # One very unlikely token makes k3 huge, so k1 says how high the panel is.
    values = ppo["kl"][1]
    axes.set_ylim(min(0, *values), 3 * max(0.1, *values))
    panel(axes, "PPO: KL to the reference", "nats per reply", "rollout")

    axes = row[2]
    plot(axes, ppo, "entropy", "entropy (nats per token)")
    plot(axes, ppo, "explained_variance", "critic's explained variance")
    plot(axes, ppo, "clip_fraction", "clip fraction")
    axes.set_ylim(-0.25, 1.6)
    panel(axes, "PPO: health", "", "rollout")


def draw_dpo(axes, logprob_axes, dpo):
    plot(axes, dpo, "accuracy", "training", lw=0.8, alpha=0.7)
    plot(axes, dpo, "val_accuracy", "held out", marker="o", ms=3)
    panel(axes, "DPO: implicit reward's accuracy", "share of pairs")

    axes = logprob_axes
    plot(axes, dpo, "chosen_logprob", "chosen")
    plot(axes, dpo, "rejected_logprob", "rejected")
    panel(axes, "DPO: log-probability of replies", "nats per reply")


def draw_gold(axes, results):
    """The mean gold score of each model as a bar. results: {folder: its numbers}."""
    names = [STAGES.get(Path(folder).name, folder) for folder in results]
    golds = [result["gold"] for result in results.values()]
    errors = [result["standard_error"] for result in results.values()]
    prompts = [result["prompts"] for result in results.values()]
    colours = ["tab:gray", "tab:green", "tab:blue"][:len(results)]
    bars = axes.bar(names, golds, yerr=errors, color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axhline(0, color="k", lw=0.8)
    axes.set_ylim(-1, 1.15)
    axes.grid(False)
    title = f"Gold score on {prompts[0]} held-out prompts"
    panel(axes, title, "mean, from -1 to 1", "sampled at temperature 1")


def grid_of_panels(plt, number, width, height):
    """A figure of that many panels, five in a row, and the panels. width, height: of a row, in inches."""
    rows = math.ceil(number / 5)
    size = (width, height * rows)
    figure, grid = plt.subplots(rows, 5, figsize=size, constrained_layout=True, squeeze=False)
    for axes in grid.flat[number:]:
        axes.set_visible(False)
    return figure, grid.flat[:number]


def draw_ppo(series, path):
    """Every metric that ppo.py logs, one small panel each: what a healthy run looks like."""
    plt = pyplot()
    names = []
    for name in series:
        is_setting = name in ("step", "lr", "critic_lr", "kl_coef", "updates")
        if not is_setting and not name.endswith(("_per_second", "_share")):
            names.append(name)
    figure, panels = grid_of_panels(plt, len(names), 12, 1.7)
    for axes, name in zip(panels, names):
        axes.plot(*series[name], lw=1)
        axes.set_title(name, fontsize=9, loc="left")
        if name == "kl_k3":
            # One very unlikely token makes k3 huge.
            axes.set_ylim(0, 3 * max(0.1, *series["kl"][1]))
        elif name == "eos_rate":
            axes.set_ylim(0, 1.05)
    figure.savefig(path, dpi=80)
    plt.close(figure)


# The panels of --curves: a stage, and its metrics that one panel shows.
CURVES = [
    ("sft", "loss", "val_loss"),
    ("reward", "loss"),
    ("reward", "accuracy", "val_accuracy"),
    ("dpo", "accuracy", "val_accuracy"),
    ("dpo", "chosen_logprob", "rejected_logprob"),
    ("ppo", "score"),
    ("ppo", "kl"),
    ("ppo", "entropy"),
    ("ppo", "length"),
    ("ppo", "explained_variance"),
    ("grpo", "score"),
    ("grpo", "flat_groups"),
    ("grpo", "kl"),
    ("grpo", "entropy"),
    ("grpo", "length"),
]
# Stages whose steps are rollouts.
ROLLOUTS = ("ppo", "grpo")


def draw_curves(folder, path):
    """The main metrics of whichever stages have run in a folder, one panel each."""
    plt = pyplot()
    found = {}
    for stage in dict(curve[:2] for curve in CURVES):
        if (folder / stage / "metrics.jsonl").is_file():
            found[stage] = read_metrics(folder / stage)
    curves = [curve for curve in CURVES if curve[0] in found]
    require(curves, f"--curves {folder} holds no run (sft, reward, dpo, ppo, grpo)")
    figure, panels = grid_of_panels(plt, len(curves), 14, 2.6)
    for axes, (stage, *names) in zip(panels, curves):
        for name, colour in zip(names, ("tab:blue", "tab:orange")):
            steps, values = found[stage].get(name, ([], []))
            draw_curve(axes, name, steps, values, colour)
        title = f"{stage}: {names[0]}"
        if names[0] == "chosen_logprob":
            title = f"{stage}: chosen and rejected"
        axes.set_title(title, fontsize=9, loc="left")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7)
        axes.set_xlabel("rollout" if stage in ROLLOUTS else "step", fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_curve(axes, name, steps, values, colour):
    """One metric: few values as points; many as a pale line, and as a thick one their running mean."""
    held_out = name.startswith("val_")
    if held_out or len(values) < 10:
        label = "held out" if held_out else name
        axes.plot(steps, values, "o-", color=colour, ms=4, lw=1, label=label)
        return
    # The mean is over a tenth of the run.
    window = len(values) // 10
    smooth = []
    for i in range(len(values)):
        recent = values[max(0, i - window + 1):i + 1]
        smooth.append(sum(recent) / len(recent))
    axes.plot(steps, values, color=colour, lw=0.7, alpha=0.4)
    axes.plot(steps, smooth, color=colour, lw=1.5, label=name)


def pick_questions(evaluation, number=3):
    """Evenly spread prompts, whatever the models made of them: [(prompt, {stage: (reply, score)})]."""
    columns = {Path(folder).name: rows for folder, rows in evaluation["replies"].items()}
    total = len(columns["sft"])
    questions = []
    for part in range(number):
        # The middle of each of `number` equal parts.
        i = (2 * part + 1) * total // (2 * number)
        replies = {stage: (rows[i]["reply"], rows[i]["score"]) for stage, rows in columns.items()}
        questions.append((columns["sft"][i]["prompt"], replies))
    return questions


COLUMNS = ("gold", "wins", "ties", "losses", "win_rate", "kl", "length", "eos_rate")


def table_of_stages(summary):
    """One row of words per stage: its name, and what it has of COLUMNS."""
    rows = []
    for stage, title in STAGES.items():
        row = [title]
        for name in COLUMNS:
            # Greedy replies have no KL.
            number = summary[stage][name]
            row.append("" if number is None else f"{number:.3f}")
        rows.append(row)
    return rows


def html_table(head, rows):
    """A table of words, escaped."""
    lines = [html_row("th", head)]
    for row in rows:
        lines.append(html_row("td", row))
    return "<table>" + "".join(lines) + "</table>"


def html_row(tag, words):
    cells = [f"<{tag}>{html.escape(word)}</{tag}>" for word in words]
    return "<tr>" + "".join(cells) + "</tr>"


def html_page(summary, stages, questions, picture):
    """The report as one page. stages: see `table_of_stages`; picture: the bytes of curves.png."""
    reward = summary["reward"]
    picture = base64.b64encode(picture).decode()
    answers = []
    for question, replies in questions:
        said = [f"{reply} ({score:+.1f})" for reply, score in replies.values()]
        answers.append([question, *said])
    ideas = []
    for what, command in TRY_NEXT:
        ideas.append(f"<li>{html.escape(what)}<br><code>{html.escape(command)}</code></li>")
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>bareRLHF demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }}
img {{ width: 100% }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: left }}
code {{ background: #f3f3f3; padding: .1em .3em; overflow-wrap: anywhere }}
</style>
<h1>From demonstrations to a policy people prefer</h1>
<p>A small GPT was fine-tuned on mixed demonstrations (SFT), a reward model learned from noisy rankings, and
PPO and DPO improved the policy. The gold judge knows the truth of this closed world: it stood behind the
rankings, one pair in ten of which is the wrong way round, and measured the result. Replies are sampled at
temperature 1 on {summary['prompts']} held-out prompts; wins, ties and losses are against SFT.
Total wall time: {summary['seconds.total']:.0f} s.</p>
{html_table(["", *COLUMNS], stages)}
<p>Reward model: held-out accuracy {reward['accuracy']:.3f}; the noise of the labels allows
{reward['bayes_accuracy']:.3f}.</p>
<img alt="training curves of all stages" src="data:image/png;base64,{picture}">
<h2>Three questions (gold score in brackets)</h2>
{html_table(["question", *STAGES.values()], answers)}
<h2>What to try next</h2><ul>{"".join(ideas)}</ul></html>
"""


def print_report(demo, summary, stages, questions):
    reward = summary["reward"]
    head = "".join(f"{name:>10}" for name in COLUMNS)
    print(f"\n{'':8}{head}   ({summary['prompts']} held-out prompts, wins against SFT)")
    for title, *cells in stages:
        print(f"{title:8}" + "".join(f"{cell:>10}" for cell in cells))
    print(f"reward model: held-out accuracy {reward['accuracy']:.3f}; "
          f"the labels' noise allows {reward['bayes_accuracy']:.3f}\n")
    for prompt, replies in questions:
        print(prompt)
        for stage, (reply, score) in replies.items():
            print(f"  {STAGES[stage]} ({score:+.1f}): {reply}")
    print("\nWhat to try next:")
    for what, command in TRY_NEXT:
        print(f"  {what}:\n    {command}")
    print(f"\nPicture: {demo}/curves.png   Every metric of PPO: {demo}/ppo_metrics.png   "
          f"Report: {demo}/report.html   Numbers: {demo}/summary.json")


def main(config):
    if config.curves:
        # The curves.png of a demo is another picture, of which its report is a part.
        folder = Path(config.curves)
        path = folder / ("stages.png" if (folder / "summary.json").exists() else "curves.png")
        draw_curves(folder, path)
        print(path)
        return
    demo = Path(config.demo)
    evaluation = read_json(demo / "evaluation.json")
    reward = read_json(demo / "reward" / "evaluation.json")
    seconds = config.seconds
    if not seconds and (demo / "summary.json").exists():
        seconds = read_json(demo / "summary.json").get("seconds.total", 0.0)
    summary = summarise(evaluation, reward, seconds)
    draw(demo, evaluation, reward, demo / "curves.png")
    draw_ppo(read_metrics(demo / "ppo"), demo / "ppo_metrics.png")

    stages = table_of_stages(summary)
    questions = pick_questions(evaluation)
    page = html_page(summary, stages, questions, (demo / "curves.png").read_bytes())
    write_atomically(demo / "report.html", page.encode())
    write_json(demo / "summary.json", summary)
    print_report(demo, summary, stages, questions)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
