"""What each advantage of grpo.py optimises: w in  E[gradient] = w * grad p,  over the success rate p.

Scores are 0 or 1, a reply is right with probability p, and a group has G replies. The expectation over all
groups is a sum that can be written out, and the gradient of each group comes from grpo.py's own functions.
w = 1 is the gradient of p itself, w = 1 / p that of log p.

    python bench/estimators.py        the table and bench/estimators.png: some seconds
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo  # noqa: E402
from plumbing.flags import Count  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from report import pyplot  # noqa: E402

# In the order of the table in grpo.py.
KINDS = ("none", "mean", "leave-one-out", "greedy", "deviation", "batch", "success", "success-fail", "pass")
MANY = 1000  # replies of a batch of many prompts


@dataclass
class Config:
    group: Count = 8  # replies to a prompt
    pass_k: Count = 4  # k of pass@k
    out: str = "bench/estimators.png"  # the picture
    debug: bool = False  # show the traceback of an error


def gradient(kind, theta, right, k, baseline):
    """Gradient of a group's objective by theta, where p = sigmoid(theta).

    right (G,) of 0 and 1: a reply is one token, whose probability is p or 1 - p.
    """
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    G = len(right)
    sign = 2 * right - 1
    logprobs = torch.nn.functional.logsigmoid(sign * theta)[:, None]  # (G, 1)
    kept = torch.ones(1, dtype=torch.bool)
    advantages = grpo.group_advantages(right[None], kind, k, baseline, kept).view(G, 1)
    mask = torch.ones(G, 1, dtype=torch.bool)
    weights = grpo.token_weights(mask.sum(1), "constant", replies=G, tokens=G, limit=1).double()
    loss, _ = grpo.policy_loss(
        logprobs, logprobs.detach(), advantages, mask, weights, "clip", "token", 0.2, 0.2)
    loss.backward()
    return -theta.grad.item()


def moments(kind, p, G, k=4):
    """(w, variance): of a group's gradient over that of p, its mean and its variance.

    batch: of many prompts, of which a share p succeeds, so that there is nothing to add up.
    """
    theta = math.log(p / (1 - p))
    of_p = p * (1 - p)  # gradient of p by theta
    # The likeliest reply is right if more than half of them are.
    baseline = torch.tensor([float(p > 0.5)], dtype=torch.float64)
    if kind == "batch":
        right = (torch.arange(MANY) < round(p * MANY)).double()
        return gradient(kind, theta, right, k, baseline) / of_p, float("nan")
    mean = square = 0.0
    for successes in range(G + 1):
        chance = math.comb(G, successes) * p**successes * (1 - p)**(G - successes)
        right = (torch.arange(G) < successes).double()
        own = gradient(kind, theta, right, k, baseline) / of_p
        mean += chance * own
        square += chance * own**2
    return mean, square - mean**2


def draw(config, ps, weights):
    """Write the picture: w over p. weights: {kind: [w]}."""
    plt = pyplot()
    names = {"deviation": "deviation: GRPO", "mean": "mean: Dr. GRPO", "leave-one-out": "leave-one-out: RLOO",
             "greedy": "greedy: ReMax", "none": "none: REINFORCE", "batch": "batch: REINFORCE++",
             "success": "success", "success-fail": "success-fail: MaxRL", "pass": f"pass@{config.pass_k}"}
    # Lines that lie on each other are drawn as wide ones below narrow ones.
    styles = {
        "none": {"lw": 7, "alpha": 0.25},
        "leave-one-out": {"lw": 4, "alpha": 0.5},
        "greedy": {"lw": 1.5, "ls": ":"},
    }
    figure, axes = plt.subplots(figsize=(8, 4.6))
    for kind, line in weights.items():
        axes.plot(ps, line, label=names[kind], **{"lw": 2} | styles.get(kind, {}))
    axes.plot(ps, [1 / p for p in ps], "k--", lw=1, label="1 / p: log p")
    axes.set(xlabel="success rate p", ylabel="w:  expected gradient = w * grad p", ylim=(0, 8), xlim=(0, 1))
    axes.set_title(f"What is optimised, groups of {config.group} replies, scores 0 or 1", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(config.out, dpi=150)


def main(config):
    shown = (0.05, 0.3, 0.5, 0.8, 0.95)
    print(f"w, and in brackets the variance of a group's gradient; groups of {config.group}")
    print("| --advantage | " + " | ".join(f"p = {p}" for p in shown) + " |")
    print("|---|" + "---|" * len(shown))
    for kind in KINDS:
        cells = []
        for p in shown:
            mean, variance = moments(kind, p, config.group, config.pass_k)
            cells.append(f"{mean:.3f}" + (f" ({variance:.3g})" if variance == variance else ""))
        print(f"| {kind} | " + " | ".join(cells) + " |")
    ps = [i / 100 for i in range(1, 100)]
    weights = {kind: [moments(kind, p, config.group, config.pass_k)[0] for p in ps] for kind in KINDS}
    draw(config, ps, weights)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
