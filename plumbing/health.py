"""What is unhealthy in a run that samples, said in one line with the switch to try; where its time goes."""
import json

import torch

from plumbing.flags import flag_of

WINDOW = 5  # rollouts whose mean is compared with that of others
# The largest |log ratio| that rounding explains.
RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


class Watch:
    """Looks at a run's metrics, one row a rollout, and warns; of one thing at most every 20 rollouts."""

    def __init__(self, run, config, judges):
        """judges: those whose numbers are logged; on resume the rows before are read."""
        self.run, self.config = run, config
        self.judges = [judge.name for judge in judges]
        self.needed = {"score", "entropy", "eos_rate", *self.judges}
        self.history = []
        self.warned = {}
        if run.step and run.main:
            self.history = self.read_history()

    def read_history(self):
        """The rows of a resumed run's metrics that have all the numbers that are read."""
        with open(self.run.out / "metrics.jsonl") as file:
            rows = [json.loads(line) for line in file]
        return [row for row in rows if self.needed <= row.keys()]

    def look(self, row):
        """Warn of what the row of this rollout shows.

        One without an update, as no group taught anything, has no entropy, and is passed over.
        """
        if not self.needed <= row.keys():
            return
        # The first rollouts are kept to compare with.
        self.history.append(row)
        self.history = self.history[:WINDOW] + self.history[WINDOW:][-295:]
        step = self.run.step
        for symptom, advice in diagnose(self.history, self.config, self.judges).items():
            if step - self.warned.get(symptom, -20) >= 20:
                self.warned[symptom] = step
                self.run.say(f"warning: step {step + 1}: {advice}")

    def check_ratio(self, ratio_error):
        """Warn where the ratio to the old policy, before anything was updated, is not 1."""
        if ratio_error > RATIO_TOLERANCE[self.run.dtype]:
            self.run.say(f"warning: step {self.run.step + 1}: log-probabilities of an unchanged policy moved "
                         f"by {ratio_error:.2g}; the ratio should be 1, so something differs between the two "
                         "passes (dropout? --dtype float32 tells whether it is rounding)")


def mean(name, rows):
    return sum(row[name] for row in rows) / len(rows)


def switches(config, *names):
    """Those of some flags that a script has: "--a, --b or --c"."""
    flags = [flag_of(name) for name in names if hasattr(config, name)]
    if len(flags) < 2:
        return "".join(flags)
    return f"{', '.join(flags[:-1])} or {flags[-1]}"


def diagnose(history, config, judges=()):
    """What is unhealthy in a run's rows of metrics so far, oldest first.

    judges: names of their numbers. Returns {symptom: one line with the switch to try}.
    """
    found, last = {}, history[-1]
    if last.get("kl", 0) > config.kl_limit:
        raised = switches(config, "kl_coef", "kl_target")
        found["kl"] = (f"the KL to the reference, {last['kl']:.1f} nats per reply, is beyond --kl-limit "
                       f"{config.kl_limit:g}: raise {raised}, or lower --lr")
    if last.get("ess", 1) < 0.5:
        found["ess"] = (f"weighted by policy / sampler, the replies of --rollouts are worth "
                        f"{last['ess']:.0%} of their number: sample anew with this policy; if nothing has "
                        "been trained yet, the sampler had other weights, another temperature or another "
                        "chat template")
    if len(history) >= 2 * WINDOW:
        found |= diagnose_trends(history, config)
    if len(history) >= 3 * WINDOW:
        for name in judges:
            if fell := over_optimised(history, name):
                before, late = fell
                found[name] = (f"the score rises while the {name} score fell from {before:.2f} to {late:.2f} "
                               "(over-optimisation): raise --kl-coef, stop earlier, or train the reward "
                               "model on replies of this policy")
    return found


def diagnose_trends(history, config):
    """The part of `diagnose` that compares a run's end with its beginning."""
    found, early, late = {}, history[:WINDOW], history[-WINDOW:]
    rollouts = 2 * WINDOW
    # 0 where there is no critic.
    if all(row.get("explained_variance", 0) < 0 for row in history[-rollouts:]):
        found["critic"] = (f"the critic has explained nothing of the returns for {rollouts} rollouts: "
                           f"try --critic-warmup {rollouts}, another --critic-lr or --critic-init")
    ended_before, ended = mean("eos_rate", early), mean("eos_rate", late)
    if ended < ended_before - 0.1:
        raised = switches(config, "missing_eos_penalty", "overlong_penalty", "max_new_tokens")
        found["eos"] = (f"replies that end by themselves fell from {ended_before:.2f} to {ended:.2f}: "
                        f"raise {raised}; is there an end token in the data?")
    entropy = mean("entropy", late)
    if entropy < 0.05 * mean("entropy", early):
        found["entropy"] = (f"entropy fell to {entropy:.2g} nats per token, a twentieth of what it was: "
                            f"raise {switches(config, 'kl_coef', 'entropy_coef')}, or lower --lr")
    return found


def over_optimised(history, name):
    """(best, last) mean of a judge's number, if that fell since its best while the score rose; else None."""
    windows = [history[end - WINDOW:end] for end in range(WINDOW, len(history) + 1)]
    best, late = max(windows, key=lambda rows: mean(name, rows)), history[-WINDOW:]
    fell = mean(name, late) < mean(name, best) - 0.1
    if fell and mean("score", late) > mean("score", best):
        return mean(name, best), mean(name, late)
    return None


class Totals(dict):
    """Sums of metrics over an update, each divided by the optimiser steps that it has."""

    def __init__(self, updates):
        super().__init__()
        self.updates = updates

    def add(self, metrics):
        for name, value in metrics.items():
            self[name] = self.get(name, 0) + value.detach() / self.updates


def shares_of_time(clock, tokens, passes):
    """Of rollout, score and update the part of the step's seconds, and tokens per second: {metric: number}.

    clock: seconds before each of them, and at the end; passes: epochs of the update.
    """
    row = {}
    for name, before, after in zip(("rollout", "score", "update"), clock, clock[1:]):
        seconds, times = after - before, passes if name == "update" else 1
        row[f"{name}_tokens_per_second"] = tokens * times / seconds
        row[f"{name}_share"] = seconds / (clock[-1] - clock[0])
    return row
