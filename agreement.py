"""Does a reward model agree with people? Measured on rows that it was not trained on, printed, and drawn.

    accuracy                share of the ranked pairs in the right order, ties half, every row weighing the
                            same; its interval is over prompts: rows of one prompt are no independent trials
    length_accuracy         that of taking the longer reply, or the shorter one if that is more often right
    logprob_accuracy        that of the language model's log-probability of a reply, and per token
    bayes_accuracy          that of the true scores, where rows have them (gold): what label noise allows
    subsets, by_margin, by_probability
                            accuracy on the rows of each subset that rows name (RewardBench), by the margin,
                            and by the share of annotators who agree with the label (or how sure it is)
    calibration             where the model says 0.8, is it right 8 times of 10?
    length_correlation      of score and characters
    best_of_n               gold of the reply that the model picks of n, beside that of the best one

A model that doesn't beat length is told so: that much could be had without training.

Legend: N replies, laid end to end, P pairs.
"""
import math

import numpy as np

from data import (
    encode_group, end_to_end, per_example, ranked_pairs, ranking_accuracy, right_shares, tied_pairs,
    variance_of_mean)
from formats.rows import Row
from formats.sources import read_rows
from model import last_scores
from plumbing.flags import UserError, require
from plumbing.pictures import pyplot

ENOUGH = 2000  # demonstrations whose mean score becomes 0, at most


# ---------------------------------------------------------------------------------------------------------
# From models to numbers of replies

def score_replies(run, model, groups, budget, pad):
    """Scores (N,) (fp32, numpy) of all replies of some groups [[Example]], laid end to end.

    The same on every rank.
    """
    def read(ids, mask, lengths):
        return last_scores(model, ids, lengths, mask)

    return per_example(run, model, end_to_end(groups), budget, pad, read).numpy()


def language_baselines(run, model, groups, budget, pad):
    """By what a language model would rank replies, {name: (N,)}: its log-probability, and that per token.

    The model is moved to the run's device. Without replies {}.
    """
    examples = end_to_end(groups)
    if not examples:
        return {}
    model.to(run.device)

    def read(ids, mask, lengths):
        return model(ids, mask)[0].sum(1)

    sums = per_example(run, model, examples, budget, pad, read).numpy()
    tokens = np.array([sum(example.mask) for example in examples])
    return {"logprob": sums, "logprob_per_token": sums / tokens}


def zero_demonstrations(config, tokenizer, train, limit, say):
    """[[Example]]: the demonstrations whose mean score is to be 0.

    They come from --demonstrations, or else from the training groups.
    """
    if config.demonstrations:
        rows = read_rows(config.demonstrations, "demonstrations", say)
        rows = [row for row in rows if row.prompt]
    else:
        rows = []
        for row, _ in train:
            if row.verdict == "both_bad":
                continue
            best = row.replies[int(np.argmin(row.ranks))]
            rows.append(Row(row.prompt, [best], [0]))
    # Evenly spread, if there are more than enough.
    rows = rows[::-(-len(rows) // ENOUGH)]
    groups = [encode_group(tokenizer, row) for row in rows]
    groups = [group for group in groups if len(group[0].ids) <= limit]
    require(groups, f"--demonstrations {config.demonstrations}: no row of up to {limit} tokens")
    return groups


# ---------------------------------------------------------------------------------------------------------
# Measures

def agreement(scores, rows, baselines=None):
    """What the head of this file lists, as {name: number, list or dict}, of scores (N,) of rows' replies.

    baselines: {name: (N,)}, see `language_baselines`. What rows don't have is left out; without a ranked pair
    that is nearly all.
    """
    ends = np.cumsum([0] + [len(row.replies) for row in rows])
    decided = [i for i, row in enumerate(rows) if len(set(row.ranks)) > 1]
    result = of_other_feedback(scores, rows, ends)
    if not decided:
        return result
    kept = [rows[i] for i in decided]
    own = replies_of(scores, ends, decided)
    result = of_rankings(own, kept) | result
    for name, values in (baselines or {}).items():
        result[f"{name}_accuracy"] = ranking_accuracy(replies_of(values, ends, decided), kept)[0]
    named = {row.subset for row in kept}
    if named != {""}:
        result["subsets"] = accuracy_by(own, kept, [row.subset for row in kept])
    for name in ("margin", "probability"):
        numbers = [getattr(row, name) for row in kept]
        if len(set(numbers)) > 1:
            result[f"by_{name}"] = accuracy_by(own, kept, binned(numbers))
    return result


def replies_of(values, ends, rows):
    """Those of values (N,) that belong to the replies of some rows' numbers."""
    return np.concatenate([values[ends[i]:ends[i + 1]] for i in rows])


def of_rankings(scores, rows):
    """How well scores (N,) order the replies of rows that all rank some."""
    better, worse, _, _ = ranked_pairs(rows)
    gap = scores[better.numpy()] - scores[worse.numpy()]  # (P,)
    lengths, truth = [], []  # (N,)
    for row in rows:
        lengths += [len(reply) for reply in row.replies]
        truth += row.gold or []
    lengths = np.array(lengths)
    accuracy, *interval = ranking_accuracy(scores, rows)
    by_length = ranking_accuracy(lengths, rows)[0]
    result = {
        "accuracy": accuracy,
        "accuracy_interval": interval,
        "length_accuracy": max(by_length, 1 - by_length),
        "length_rule": "longer" if by_length >= 0.5 else "shorter",
        "pairs": len(better),
        "prompts": len({row.text for row in rows}),
    }
    sign = 1 if by_length >= 0.5 else -1
    result["over_length"], *result["over_length_interval"] = difference(scores, sign * lengths, rows)
    if all(row.gold for row in rows):
        result["bayes_accuracy"] = ranking_accuracy(np.array(truth), rows)[0]
        result["best_of_n"] = best_of_n(scores, rows)
    result["calibration"] = calibration_of(gap)
    # A correlation with what is the same everywhere is not defined.
    result["length_correlation"] = 0.0
    if scores.std() * lengths.std() > 0:
        result["length_correlation"] = float(np.corrcoef(scores, lengths)[0, 1])
    return result


def midranks(x):
    """Ranks (N,) from 0, equal numbers sharing the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def spearman(x, y):
    """Rank correlation of x and y (N,); 0 where one of them is the same everywhere."""
    ranks = np.stack([midranks(x), midranks(y)])
    return float(np.corrcoef(ranks)[0, 1]) if ranks.std(1).min() > 0 else 0.0


def difference(scores, others, rows):
    """Accuracy of scores (N,) less that of others (N,) on the same rows, and its 95 % interval."""
    gain = right_shares(scores, rows)[0] - right_shares(others, rows)[0]  # (rows,)
    variance, _ = variance_of_mean(gain, rows)
    half = 1.96 * math.sqrt(variance)
    return float(gain.mean()), float(gain.mean() - half), float(gain.mean() + half)


def calibration_of(gap):
    """For ten bins of sigma(|gap|): the mean prediction, and the share that came true.

    gap (P,): of the ranked pairs.
    """
    confidence = 1 / (1 + np.exp(-np.abs(gap)))
    bins = np.minimum(((confidence - 0.5) * 20).astype(int), 9)
    calibration = []
    for number in range(10):
        inside = bins == number
        if inside.any():
            calibration.append({
                "predicted": float(confidence[inside].mean()),
                "observed": float((gap[inside] > 0).mean()),
                "pairs": int(inside.sum()),
            })
    return calibration


def accuracy_by(scores, rows, names):
    """{name: accuracy, its interval, pairs} on the rows of each name (rows,), in their order."""
    ends = np.cumsum([0] + [len(row.replies) for row in rows])
    found = {}
    for name in sorted(set(names)):
        inside = [i for i, own in enumerate(names) if own == name]
        part = [rows[i] for i in inside]
        accuracy, *interval = ranking_accuracy(replies_of(scores, ends, inside), part)
        pairs = len(ranked_pairs(part)[0])
        found[name] = {"accuracy": accuracy, "accuracy_interval": interval, "pairs": pairs}
    return found


def binned(numbers):
    """Names for numbers (n,): themselves if there are up to four, else the quarter that they lie in."""
    numbers = np.asarray(numbers, float)
    distinct = np.unique(numbers)
    if len(distinct) <= 4:
        return [f"{number:.3g}" for number in numbers]
    cuts = np.unique(np.quantile(numbers, [0, 0.25, 0.5, 0.75, 1]))
    bins = np.searchsorted(cuts[1:-1], numbers, side="right")
    return [f"{cuts[i]:.3g} to {cuts[i + 1]:.3g}" for i in bins]


def best_of_n(scores, rows):
    """[{n, gold, best}] for n up to the replies that every row has.

    gold: mean gold score of the reply of the highest score (N,) among n of a row's K, over all choices of n;
    best: that of the best one among them.
    """
    most = min(len(row.replies) for row in rows)
    curve = []
    for n in range(1, most + 1):
        picked, best, start = [], [], 0
        for row in rows:
            K = len(row.replies)
            gold = np.array(row.gold)
            # In ascending order the k-th (from 0) is the highest of n in C(k, n - 1) choices of C(K, n).
            share = np.array([math.comb(k, n - 1) for k in range(K)]) / math.comb(K, n)  # (K,)
            order = np.argsort(scores[start:start + K], kind="stable")
            picked.append(gold[order] @ share)
            best.append(np.sort(gold) @ share)
            start += K
        curve.append({"n": n, "gold": float(np.mean(picked)), "best": float(np.mean(best))})
    return curve


def of_other_feedback(scores, rows, ends):
    """What scores (N,) make of ties, ratings and verdicts, as far as there are any.

    ends: where each row's replies begin, and the last one's end. tie_gap: mean difference of tied replies;
    rating_correlation: of score and rating; verdict_accuracy: probability that a reply of a row that is all
    good has a higher score than one of a row that is all bad.
    """
    gaps, rated, verdicts = [], [], {"both_good": [], "both_bad": []}
    for row, start in zip(rows, ends):
        own = scores[start:start + len(row.replies)]
        if row.verdict:
            verdicts[row.verdict] += own.tolist()
            continue
        gaps += [abs(own[i] - own[j]) for i, j in tied_pairs(row.ranks)]
        rated += [(score, known["rating"]) for score, known in zip(own, row.ratings) if "rating" in known]
    result = {}
    if gaps:
        result["tie_gap"] = float(np.mean(gaps))
    if len(rated) > 1 and np.ptp(np.array(rated), 0).min() > 0:
        result["rating_correlation"] = float(np.corrcoef(np.array(rated).T)[0, 1])
    good, bad = map(np.array, verdicts.values())
    if len(good) and len(bad):
        above = (good[:, None] > bad) + 0.5 * (good[:, None] == bad)
        result["verdict_accuracy"] = float(above.mean())
    return result


# ---------------------------------------------------------------------------------------------------------
# Telling

def described(result):
    """What a result of `agreement` says, as lines of text."""
    lines = []
    if "accuracy" in result:
        lines = describe_rankings(result)
    named = {
        "tie_gap": "mean difference of tied replies",
        "rating_correlation": "correlation of score and rating",
        "verdict_accuracy": "replies called good above those called bad",
    }
    lines += [f"{words} {result[name]:.3f}" for name, words in named.items() if name in result]
    return lines


def describe_rankings(result):
    """The lines on rankings: accuracy beside what is had without training, calibration, parts, best of n."""
    low, high = result["accuracy_interval"]
    by_length = f"by length alone {result['length_accuracy']:.3f} (the {result['length_rule']} one)"
    beside = [by_length]
    named = {"logprob": "by log-probability", "logprob_per_token": "per token", "bayes": "Bayes"}
    for name, words in named.items():
        if f"{name}_accuracy" in result:
            beside.append(f"{words} {result[f'{name}_accuracy']:.3f}")
    lines = [f"held-out accuracy {result['accuracy']:.3f} (95 %: {low:.3f} to {high:.3f}), "
             f"{', '.join(beside)}; {result['pairs']} pairs of {result['prompts']} prompts"]
    low, high = result["over_length_interval"]
    if low <= 0:
        verdict = "does not beat" if result["over_length"] <= 0 else "is not shown to beat"
        lines.append(
            f"warning: this reward model {verdict} taking the {result['length_rule']} reply: accuracy "
            f"{result['accuracy']:.3f} to {result['length_accuracy']:.3f} (the difference, 95 %: {low:+.3f} "
            f"to {high:+.3f})")
    bins = [f"{one['predicted']:.2f} -> {one['observed']:.2f}" for one in result["calibration"]]
    lines.append("calibration (predicted -> came true): " + "  ".join(bins))
    lines.append(f"correlation of score and length {result['length_correlation']:.3f}")
    for name, part in parts_of(result).items():
        low, high = part["accuracy_interval"]
        lines.append(f"{name}: {part['accuracy']:.3f} ({low:.3f} to {high:.3f}), {part['pairs']} pairs")
    if "best_of_n" in result:
        points = [f"{one['n']}: {one['gold']:.2f} ({one['best']:.2f})" for one in result["best_of_n"]]
        lines.append("gold of the best of n (and the most it could be): " + "  ".join(points))
    return lines


def parts_of(result):
    """{name: its numbers} of the subsets, margins and probabilities that a result is broken down by."""
    parts = {}
    for kind, word in (("subsets", "subset"), ("by_margin", "margin"), ("by_probability", "probability")):
        for name, part in result.get(kind, {}).items():
            parts[f"{word} {name or 'none'}"] = part
    return parts


def draw(result, path, say):
    """A picture of a result of `agreement`; without matplotlib or anything to draw a line that says so."""
    if "accuracy" not in result:
        return
    try:
        plt = pyplot()
    except UserError as error:
        say(f"{path} is not drawn: {error}")
        return
    panels = [draw_accuracies, draw_calibration]
    if parts_of(result):
        panels.append(draw_parts)
    if len(result.get("best_of_n", [])) > 1:
        panels.append(draw_best_of_n)
    figure, grid = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.4), constrained_layout=True)
    for panel, axes in zip(panels, grid):
        panel(axes, result)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def bars(axes, parts, title):
    """A bar for each part {name: {accuracy, accuracy_interval or None}}, the first on top."""
    names = list(parts)
    for place, part in enumerate(parts.values()):
        axes.barh(place, part["accuracy"], color="tab:blue" if place == 0 else "tab:gray", height=0.7)
        if part.get("accuracy_interval"):
            axes.plot(part["accuracy_interval"], [place, place], color="k", lw=1.2)
    axes.axvline(0.5, color="k", lw=0.8, ls=":")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title(title, fontsize=10, loc="left")


def draw_accuracies(axes, result):
    parts = {"reward model": result}
    named = {"length": f"the {result['length_rule']} one", "logprob": "log-probability",
             "logprob_per_token": "the same per token", "bayes": "what noise allows"}
    for name, words in named.items():
        if f"{name}_accuracy" in result:
            parts[words] = {"accuracy": result[f"{name}_accuracy"]}
    bars(axes, parts, f"Accuracy on {result['pairs']} pairs")


def draw_parts(axes, result):
    bars(axes, parts_of(result), "Accuracy by part")


def draw_calibration(axes, result):
    predicted = [one["predicted"] for one in result["calibration"]]
    observed = [one["observed"] for one in result["calibration"]]
    axes.plot([0.5, 1], [0.5, 1], "k--", lw=1)
    axes.plot(predicted, observed, marker="o", ms=3)
    axes.set_title("Share that came true over the probability", fontsize=10, loc="left")


def draw_best_of_n(axes, result):
    n = [one["n"] for one in result["best_of_n"]]
    axes.plot(n, [one["best"] for one in result["best_of_n"]], "k--", lw=1, label="the best one")
    axes.plot(n, [one["gold"] for one in result["best_of_n"]], marker="o", ms=3, label="by the reward model")
    axes.set_xticks(n)
    axes.set_xlabel("n")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("Gold score of the best of n", fontsize=10, loc="left")
