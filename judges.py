"""What gives a reply a number besides reward models: Python functions of the user's."""
import importlib
import inspect
import os
import sys

import torch

from plumbing.flags import UserError, require

TEXTS = ("prompts", "replies", "answers")  # what a function may ask for, by the names of its parameters


def reward_function(spec, device):
    """What --reward-fn module:function names, as f(prompts, replies, answers) -> scores (B,) in fp32.

    The function itself is given those of the three lists of text that its parameters name, as keywords; with
    **kwargs all of them. f.wants_answers: whether it can't do without answers. What goes wrong in it is a UserError.
    """
    module, _, name = spec.partition(":")
    require(module and name, f"--reward-fn {spec}: write module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # found from the working directory
    try:
        function = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(function).parameters
    except Exception as error:  # a module of the user's may fail in any way
        raise UserError(f"--reward-fn {spec} can't be imported ({type(error).__name__}: {error})") from None
    wanted = wanted_texts(spec, parameters)

    def scores_of(prompts, replies, answers):
        given = dict(zip(TEXTS, (prompts, replies, answers)))
        try:
            with torch.no_grad():
                scores = function(**{text: given[text] for text in wanted})
                scores = torch.as_tensor(scores, dtype=torch.float32, device=device).detach()
        except Exception as error:
            raise UserError(f"--reward-fn {spec} failed ({type(error).__name__}: {error}); "
                            f"it is given lists of text: {', '.join(wanted)}") from None
        require(scores.shape == (len(replies),),
                f"--reward-fn {spec} must return one finite number for each of {len(replies)} replies, "
                f"got shape {tuple(scores.shape)}")
        return scores

    answers = parameters.get("answers")
    scores_of.wants_answers = answers is not None and answers.default is inspect.Parameter.empty
    return scores_of


def wanted_texts(spec, parameters):
    """Those of TEXTS that a function's parameters (of inspect.signature) ask for; UserError if it wants others."""
    wanted = []
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            wanted = list(TEXTS)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            continue
        elif name in TEXTS and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            wanted.append(name)
        else:
            require(parameter.default is not inspect.Parameter.empty,
                    f"--reward-fn {spec}: its parameter {name} is none of {', '.join(TEXTS)}, by which names it "
                    "is given lists of text; rename it, or give it a default")
    require("replies" in wanted,
            f"--reward-fn {spec} has no parameter named replies, so it can't judge them; "
            f"it may have {', '.join(TEXTS)}")
    return list(dict.fromkeys(wanted))


def check_functions(specs, functions, rows, say):
    """Find out before a long run whether functions from `reward_function` work on some rows' prompts: whether
    there are answers for those that can't do without, and whether one reply gets a finite number."""
    known = [row for row in rows if row.answer]
    for spec, function in zip(specs, functions):
        if function.wants_answers:
            require(known, f"--reward-fn {spec} wants answers, and no row has one (README.md says how they "
                           "may be called)")
            if len(known) < len(rows):
                say(f"warning: {len(rows) - len(known)} of {len(rows)} prompts have no answer; "
                    f"--reward-fn {spec} gets an empty text for them")
        row = known[0] if known else rows[0]
        trial = function([row.text], ["a trial"], [row.answer])
        require(trial.isfinite().all(),
                f"--reward-fn {spec} must return one finite number for each reply, got {trial.item()}")


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
