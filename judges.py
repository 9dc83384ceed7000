"""What gives a reply a number: reward models, and Python functions of yours.

The weighted sum that a policy is trained on, and the baseline that it is compared with, stand in the algorithm's own
file. Here they are loaded, checked and called, for training and evaluation alike.
"""
import importlib
import importlib.machinery
import inspect
import math
import os
import sys
from pathlib import Path

import torch

from formats.model_folder import load_model
from model import ScalarModel, last_scores
from plumbing.flags import UserError, require

ROOT = Path(__file__).resolve().parent
GIVEN = ("prompts", "replies", "answers", "ended")  # what a function may ask for, by the names of its parameters
# What the logs call something else: a --judge of such a name would hide it.
TAKEN = frozenset("""step score scores kl kl_k3 length eos_rate reward value explained_variance entropy ref_perplexity
    updates kl_coef penalty_coef lr critic_lr grad_norm critic_grad_norm ratio_error clip_fraction approx_kl policy_loss
    value_loss kl_loss ptx_loss value_clip_fraction prompts standard_error wins ties losses win_rate
    rollout_tokens_per_second score_tokens_per_second update_tokens_per_second rollout_share score_share
    update_share""".split())


# ---------------------------------------------------------------------------------------------------------
# Reward models

def load_reward_models(folders, tokenizer, model, allow_pickle):
    """[ScalarModel] of --reward folders. UserError if one has another tokenizer than the policy, which is called model."""
    reward_models = []
    for folder in folders:
        reward_model, other = load_model(folder, ScalarModel, allow_pickle=allow_pickle)
        require(other.same_as(tokenizer), f"--reward {folder} has another tokenizer than --model {model}")
        reward_models.append(reward_model)
    return reward_models


def source_weights(weights, sources):
    """Weights of the sources (folders and functions) in the score: --reward-weights, or 1 each."""
    require(len(weights) in (0, len(sources)),
            f"{len(weights)} --reward-weights for {len(sources)} rewards ({', '.join(sources)})")
    require(all(map(math.isfinite, weights)), "--reward-weights must be finite numbers")
    return weights or [1.0] * len(sources)


# ---------------------------------------------------------------------------------------------------------
# Functions

class Function:
    """A function module:name that a flag names. It is given those of GIVEN that its parameters are called.

    Attributes: flag, spec, name; wants_answers, whether it can't do without answers.
    """

    def __init__(self, flag, spec):
        self.flag, self.spec = flag, f"{flag} {spec}"
        module, _, self.name = spec.partition(":")
        require(module and self.name, f"{self.spec}: write module:function")
        self.modules = Modules(module)
        try:
            with self.modules:
                self.function = getattr(importlib.import_module(module), self.name)
            parameters = inspect.signature(self.function).parameters
        except Exception as error:  # a module of the user's may fail in any way
            raise UserError(f"{self.spec} can't be imported ({type(error).__name__}: {error})") from None
        self.wanted = wanted_lists(self.spec, parameters)
        answers = parameters.get("answers")
        self.wants_answers = answers is not None and answers.default is inspect.Parameter.empty

    def __call__(self, prompts, replies, answers, ended):
        """Lists, as long as there are replies -> scores (B,) fp32 on the CPU. What goes wrong in it is a UserError."""
        given = dict(zip(GIVEN, (prompts, replies, answers, ended)))
        try:
            with torch.no_grad(), self.modules:
                scores = self.function(**{name: given[name] for name in self.wanted})
                scores = torch.as_tensor(scores, dtype=torch.float32, device="cpu").detach()
        except Exception as error:
            raise UserError(f"{self.spec} failed ({type(error).__name__}: {error}); "
                            f"it is given lists: {', '.join(self.wanted)}") from None
        require(scores.shape == (len(replies),),
                f"{self.spec} must return one finite number for each of {len(replies)} replies, "
                f"got shape {tuple(scores.shape)}")
        return scores


def wanted_lists(spec, parameters):
    """Those of GIVEN that a function's parameters (of inspect.signature) ask for; UserError if it wants others."""
    wanted = []
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            wanted = list(GIVEN)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            continue
        elif name in GIVEN and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            wanted.append(name)
        else:
            require(parameter.default is not inspect.Parameter.empty,
                    f"{spec}: its parameter {name} is none of {', '.join(GIVEN)}, by which names it "
                    "is given lists; rename it, or give it a default")
    require("replies" in wanted,
            f"{spec} has no parameter named replies, so it can't judge them; it may have {', '.join(GIVEN)}")
    return list(dict.fromkeys(wanted))


class Modules:
    """While it is entered, a user's module imports as if this project's files were not there, where theirs have the names.

    Scripts are run from this folder's files, so a bare `import data` or `import evaluate` would find ours first: in a
    function of the user's it means the file beside it, or the installed package.
    """

    def __init__(self, module):
        top = module.partition(".")[0]
        here = os.getcwd()
        found = importlib.machinery.PathFinder.find_spec(top, [here, *sys.path])
        places = [found.origin] if found and found.origin else list(found.submodule_search_locations or []) if found else []
        folder = Path(places[0]).resolve().parent if places else Path(here)
        if Path(places[0] if places else "").name == "__init__.py":
            folder = folder.parent
        self.folder = str(folder)
        self.hidden, self.theirs = [], {}
        if folder == ROOT:
            return
        elsewhere = [self.folder, *(path for path in sys.path if Path(path).resolve() != ROOT)]
        ours = [path.stem for path in ROOT.glob("*.py")] + [path.parent.name for path in ROOT.glob("*/__init__.py")]
        self.hidden = [name for name in ours if importlib.machinery.PathFinder.find_spec(name, elsewhere)]

    def _take(self):
        """The loaded modules of the hidden names, which are no longer there."""
        names = [name for name in sys.modules if name.partition(".")[0] in self.hidden]
        return {name: sys.modules.pop(name) for name in names}

    def __enter__(self):
        self.ours = self._take()
        sys.modules.update(self.theirs)
        self.path = list(sys.path)
        sys.path[:] = [self.folder, *(path for path in self.path if Path(path).resolve() != ROOT), str(ROOT)]
        importlib.invalidate_caches()

    def __exit__(self, *error):
        self.theirs = self._take()
        sys.modules.update(self.ours)
        sys.path[:] = self.path


def load_functions(flag, specs):
    """[Function] of a flag that names several. Those of --judge are logged under their names, which must be free."""
    functions = [Function(flag, spec) for spec in specs]
    for function in functions if flag == "--judge" else []:
        same = [other for other in functions if other.name == function.name]
        require(len(same) == 1 and function.name not in TAKEN,
                f"{function.spec}: the logs have another number named {function.name}; rename the function")
    return functions


def check_functions(functions, rows, say):
    """Find out before a long run whether functions work on some rows' prompts: whether there are answers for those
    that can't do without, and whether one reply gets a finite number."""
    known = [row for row in rows if row.answer]
    for function in functions:
        if function.wants_answers:
            require(known, f"{function.spec} wants answers, and no row has one (README.md says how they may be called)")
            if len(known) < len(rows):
                say(f"warning: {len(rows) - len(known)} of {len(rows)} prompts have no answer; "
                    f"{function.spec} gets an empty text for them")
        row = known[0] if known else rows[0]
        trial = function([row.text], ["a trial"], [row.answer], [True])
        require(trial.isfinite().all(),
                f"{function.spec} must return one finite number for each reply, got {trial.item()}")


# ---------------------------------------------------------------------------------------------------------
# Calling them

@torch.no_grad()
def score(run, reward_models, functions, batch, plan):
    """Scores (sources, B) of a rollout: by each reward model, then by each function. plan: see `Rollout.plan`."""
    scores = torch.zeros(len(reward_models) + len(functions), len(batch.texts), device=run.device)
    if reward_models:
        for part in batch.passes(run, plan):
            for source, model in enumerate(reward_models):
                with run.autocast():
                    own = last_scores(model, part.ids.to(model.device), part.lengths)  # (n,)
                scores[source, part.rows] = own.to(run.device)
    for source, function in enumerate(functions, len(reward_models)):
        scores[source] = judge(function, batch).to(run.device)
    return scores


def judge(function, batch):
    """A function's numbers (B,) for a rollout, on the CPU."""
    rows = [prompt.row for prompt in batch.prompts]
    return function([row.text for row in rows], batch.texts, [row.answer for row in rows], batch.ended.tolist())


def short_names(paths):
    """The last part of each path, or as many as tell it from the others; a path named twice gets a number."""
    parts = [path.rstrip("/").split("/") for path in paths]
    names = []
    for i, own in enumerate(parts):
        others = [other for j, other in enumerate(parts) if j != i]
        ends = (n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        names.append("/".join(own[-next(ends, len(own)):]))
    for i, name in enumerate(names):
        if parts.count(parts[i]) > 1:
            names[i] = f"{name}#{parts[:i].count(parts[i]) + 1}"
    return names
