"""What gives a reply a number, or a conversation its next turn: reward models, process reward models, Python
functions of yours, and models that are asked.

The baseline that a score is compared with stands in the algorithm's own file. Here they are loaded, checked,
called and combined, for training and evaluation alike.
"""
import importlib
import importlib.machinery
import inspect
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from data import encode_dialogue, next_turn, pad_rows, step_ends, with_reply
from formats.families import step_separator_of
from formats.model_folder import load_model
from formats.rows import Row
from model import ScalarModel, last_scores, token_index, unpack
from plumbing.flags import UserError, require
from plumbing.ranks import by_length

ROOT = Path(__file__).resolve().parent
# What a function may ask for, by the names of its parameters.
GIVEN = ("prompts", "replies", "answers", "ended", "dialogues")
# What the logs call something else: a --judge of such a name would hide it.
TAKEN = frozenset("""step score scores kl kl_k3 length eos_rate reward value explained_variance entropy
    ref_perplexity updates kl_coef penalty_coef lr critic_lr grad_norm critic_grad_norm ratio_error
    clip_fraction approx_kl policy_loss value_loss kl_loss ptx_loss value_clip_fraction
    prompts standard_error wins ties losses win_rate round kl_bound seconds texts
    rollout_tokens_per_second score_tokens_per_second update_tokens_per_second rollout_share score_share
    update_share score_spread flat_groups advantage_size replies loss loss_per_reply cost
    student_samples mismatch mismatch_max ess val_loss
    usable labelled confidence position_bias same_letter letters rows""".split())


# ---------------------------------------------------------------------------------------------------------
# Reward models

def load_reward_models(folders, tokenizer, model, allow_pickle):
    """[ScalarModel] of --reward folders.

    UserError if one has another tokenizer than the policy, which is called model.
    """
    reward_models = []
    for folder in folders:
        reward_model, other = load_model(folder, ScalarModel, allow_pickle=allow_pickle)
        require(other.same_as(tokenizer), f"--reward {folder} has another tokenizer than --model {model}")
        reward_models.append(reward_model)
    return reward_models


def source_weights(config, sources):
    """Weights of the sources (folders and functions) in the score: --reward-weights, or 1 each.

    UserError if there are not as many, or --reward-combine has too few reward models to combine.
    """
    weights = config.reward_weights
    models = len(sources) - len(config.reward_fn) - bool(config.process)
    require(config.reward_combine == "sum" or models > 1,
            f"--reward-combine {config.reward_combine} combines several --reward, and there are {models}")
    require(config.pessimism == 1 or config.reward_combine == "pessimistic",
            f"--pessimism is for --reward-combine pessimistic; leave it out with {config.reward_combine}")
    require(len(weights) in (0, len(sources)),
            f"{len(weights)} --reward-weights for {len(sources)} rewards ({', '.join(sources)})")
    require(all(map(math.isfinite, weights)), "--reward-weights must be finite numbers")
    return weights or [1.0] * len(sources)


# ---------------------------------------------------------------------------------------------------------
# Process rewards

class Process(NamedTuple):
    """A process reward model, and how its judgement of the steps of a reply makes a score."""
    model: ScalarModel
    tokenizer: object
    separator: str  # between the steps
    kind: str  # product, min or last: see `step_changes`


class StepRewards(NamedTuple):
    """What the steps of some replies are worth, aligned with tokens."""
    changes: torch.Tensor  # (B, T) by how much a step changes its reply's score, on its last token; else 0
    ends: torch.Tensor  # (B, T) bool, True on the last token of each step


def load_process(config, tokenizer):
    """The `Process` of --process and --process-score, None if there is none.

    UserError if it has another tokenizer than the policy, --model or the first of --models.
    """
    if not config.process:
        return None
    model, other = load_model(config.process, ScalarModel, allow_pickle=config.allow_pickle, labels=3)
    require(other.same_as(tokenizer), f"--process {config.process} has another tokenizer than the policy")
    separator = step_separator_of(model.config.header)
    return Process(model.requires_grad_(False).eval(), tokenizer, separator, config.process_score)


def models_of(process):
    """[ScalarModel] of a `Process`, none if there is none."""
    return [] if process is None else [process.model]


def step_changes(good, ends, kind):
    """By how much each step of a reply changes the reply's score so far: (B, T), zero but where ends is True.

    good (B, T): the probability that the step that ends there is good; ends (B, T) bool, True on the last
    token of each step. The score of some steps is the product of their probabilities (that all are good), the
    least of them, or that of the last (Lightman et al. 2023, section 2.6, has the product). That of no step
    is 0, so a reply's changes add up to its score.
    """
    if kind == "product":
        so_far = torch.where(ends, good, 1.0).cumprod(1)
    elif kind == "min":
        so_far = torch.where(ends, good, 1.0).cummin(1).values
    elif kind == "last":
        places = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
        latest = torch.where(ends, places, 0).cummax(1).values  # (B, T)
        so_far = good.gather(1, latest)
    else:
        raise ValueError(f"unknown score of steps {kind}")
    so_far = torch.where(ends.cumsum(1) > 0, so_far, 0.0)
    return so_far.diff(dim=1, prepend=torch.zeros_like(so_far[:, :1]))


def find_ends(process, batch):
    """Where the steps of a rollout's replies end: (B, T) bool, on the CPU. See `data.step_ends`."""
    ends = torch.zeros_like(batch.host_mask)
    for ids, mask, own in zip(batch.ids.cpu(), batch.host_mask, ends):
        numbers = step_ends(process.tokenizer, ids[mask].tolist(), process.separator)
        own[mask.nonzero().flatten()[numbers]] = True
    return ends


@torch.no_grad()
def step_rewards(run, process, batch, plan):
    """`StepRewards` of a rollout, None if there is no process reward model. plan: see `Rollout.plan`."""
    if process is None:
        return None
    ends = find_ends(process, batch)
    good = torch.zeros(ends.shape, device=run.device)
    for part in batch.passes(run, plan):
        where = part.of(ends)  # (n, W)
        index = token_index(where)  # (N,)
        with run.autocast():
            logits = process.model(part.ids.to(process.model.device), index)  # (N, 3): bad, neutral, good
        own = logits.softmax(1)[:, 2].to(run.device)
        good[part.rows, :part.width] = unpack(own, where, index.to(run.device))
    ends = ends.to(run.device)
    return StepRewards(step_changes(good, ends, process.kind), ends)


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

    def __call__(self, prompts, replies, answers, ended, dialogues=None):
        """Lists, as long as there are replies -> scores (B,) fp32 on the CPU.

        What goes wrong in it is a UserError.
        """
        scores = self.call(as_scores, prompts, replies, answers, ended, dialogues)
        require(scores.shape == (len(replies),),
                f"{self.spec} must return one finite number for each of {len(replies)} replies, "
                f"got shape {tuple(scores.shape)}")
        return scores

    def call(self, convert, *lists):
        """What convert makes of what the function returns for these lists, which are those of GIVEN."""
        given = dict(zip(GIVEN, lists))
        arguments = {name: given[name] for name in self.wanted}
        try:
            with torch.no_grad(), self.modules:
                return convert(self.function(**arguments))
        except Exception as error:
            raise UserError(f"{self.spec} failed ({type(error).__name__}: {error}); "
                            f"it is given lists: {', '.join(self.wanted)}") from None


def as_scores(numbers):
    """Numbers as a function returns them, (B,) fp32 on the CPU."""
    return torch.as_tensor(numbers, dtype=torch.float32, device="cpu").detach()


class Tool(Function):
    """A function module:name that answers a policy's replies, for a conversation of several turns.

    turns: how many replies of the policy a conversation has at most.
    """

    def __init__(self, flag, spec, turns=1):
        super().__init__(flag, spec)
        self.turns = turns

    def __call__(self, prompts, replies, answers, ended, dialogues=None):
        """Lists, as for a `Function` -> for each reply the next turn, a text; None where it is over."""
        turns = self.call(lambda turns: turns, prompts, replies, answers, ended, dialogues)
        fine = isinstance(turns, (list, tuple)) and len(turns) == len(replies)
        require(fine and all(isinstance(turn, (str, type(None))) for turn in turns),
                f"{self.spec} must return a list that has a text or None for each of {len(replies)} replies, "
                f"got {repr(turns)[:80]}")
        return list(turns)


class Namer(Function):
    """A function module:name that gives each reply one of some names, or None."""

    def __init__(self, flag, spec, names):
        super().__init__(flag, spec)
        self.names = names

    def __call__(self, prompts, replies, answers, ended, dialogues=None):
        """Lists, as for a `Function` -> for each reply a name, or None."""
        named = self.call(lambda named: named, prompts, replies, answers, ended, dialogues)
        fine = isinstance(named, (list, tuple)) and len(named) == len(replies)
        require(fine and all(name is None or name in self.names for name in named),
                f"{self.spec} must return a list that has one of {', '.join(self.names)} or None for each of "
                f"{len(replies)} replies, got {repr(named)[:80]}")
        return list(named)


def wanted_lists(spec, parameters):
    """Those of GIVEN that a function's parameters (of inspect.signature) ask for.

    UserError if it wants others.
    """
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
            f"{spec} has no parameter named replies, which it is for; it may have {', '.join(GIVEN)}")
    return list(dict.fromkeys(wanted))


def place_of(found):
    """Where a module is: its file, or the folder of a package that has no file of its own. None if neither.

    found: the module's spec, or None.
    """
    if not found:
        return None
    if found.origin:
        return found.origin
    for location in found.submodule_search_locations or []:
        return location
    return None


def without_ours(paths):
    """Those of some paths of modules that are not this project's folder."""
    return [path for path in paths if Path(path).resolve() != ROOT]


class Modules:
    """While it is entered, a user's module imports as if this project's files were not there.

    That goes for those of our files whose names theirs have. Scripts are run from this folder's files, so a
    bare `import data` or `import evaluate` would find ours first: in a function of the user's it means the
    file beside it, or the installed package.
    """

    def __init__(self, module):
        top = module.partition(".")[0]
        here = os.getcwd()
        find_spec = importlib.machinery.PathFinder.find_spec

        # The folder that the module, or the package that holds it, is imported from.
        place = place_of(find_spec(top, [here, *sys.path]))
        if place is None:
            folder = Path(here)
        else:
            folder = Path(place).resolve().parent
            if Path(place).name == "__init__.py":
                folder = folder.parent
        self.folder = str(folder)

        # Names of ours that theirs have too; a module in our own folder means ours.
        self.hidden = []
        self.theirs = {}
        if folder == ROOT:
            return
        elsewhere = [self.folder, *without_ours(sys.path)]
        ours = [path.stem for path in ROOT.glob("*.py")]
        ours += [path.parent.name for path in ROOT.glob("*/__init__.py")]
        for name in ours:
            if find_spec(name, elsewhere):
                self.hidden.append(name)

    def _take(self):
        """The loaded modules of the hidden names, which are no longer there."""
        taken = {}
        for name in list(sys.modules):
            if name.partition(".")[0] in self.hidden:
                taken[name] = sys.modules.pop(name)
        return taken

    def __enter__(self):
        self.ours = self._take()
        sys.modules.update(self.theirs)
        self.path = list(sys.path)
        sys.path[:] = [self.folder, *without_ours(self.path), str(ROOT)]
        importlib.invalidate_caches()

    def __exit__(self, *error):
        self.theirs = self._take()
        sys.modules.update(self.ours)
        sys.path[:] = self.path


def load_functions(flag, specs):
    """[Function] of a flag that names several.

    Those of --judge are logged under their names, which must be free.
    """
    functions = [Function(flag, spec) for spec in specs]
    if flag != "--judge":
        return functions
    names = [function.name for function in functions]
    for function in functions:
        require(names.count(function.name) == 1 and function.name not in TAKEN,
                f"{function.spec}: the logs have another number named {function.name}; rename the function")
    return functions


def check_functions(functions, rows, say):
    """Find out before a long run whether functions work on some rows' prompts.

    That is, whether there are answers for those that can't do without, and whether one reply gets a finite
    number.
    """
    known = [row for row in rows if row.answer]
    for function in functions:
        if function.wants_answers:
            require(known, f"{function.spec} wants answers, and no row has one "
                           "(README.md says how they may be called)")
            if len(known) < len(rows):
                say(f"warning: {len(rows) - len(known)} of {len(rows)} prompts have no answer; "
                    f"{function.spec} gets an empty text for them")
        row = known[0] if known else rows[0]
        trial = function([row.text], ["a trial"], [row.answer], [True], [with_reply(row, "a trial")])
        if not isinstance(function, Tool):
            require(trial.isfinite().all(),
                    f"{function.spec} must return one finite number for each reply, got {trial.item()}")


def load_tool(config, tokenizer, prompts, say):
    """The `Tool` of --tool and --turns, None if there is none.

    UserError if it doesn't work on a prompt [Prompt], or the chat template on several turns.
    """
    if not config.tool:
        return None
    require(config.turns > 1, f"--turns {config.turns} leaves --tool nothing to answer")
    tool = Tool("--tool", config.tool, config.turns)
    rows = [prompt.row for prompt in prompts]
    check_functions([tool], rows, say)
    next_turn(tokenizer, with_reply(rows[0], "a trial") + [{"role": "user", "content": "a trial"}])
    return tool


# ---------------------------------------------------------------------------------------------------------
# Calling them

@torch.no_grad()
def score(run, reward_models, functions, batch, plan, steps=None):
    """Scores (sources, B) of a rollout: by each reward model, then by each function, then by its steps.

    plan: see `Rollout.plan`; steps: `StepRewards`, if there are any.
    """
    sources = len(reward_models) + len(functions) + (steps is not None)
    scores = torch.zeros(sources, len(batch.texts), device=run.device)
    if reward_models:
        for part in batch.passes(run, plan):
            for source, model in enumerate(reward_models):
                with run.autocast():
                    own = last_scores(model, part.ids.to(model.device), part.lengths, part.where)  # (n,)
                scores[source, part.rows] = own.to(run.device)
    for source, function in enumerate(functions, len(reward_models)):
        scores[source] = judge(function, batch).to(run.device)
    if steps is not None:
        scores[-1] = steps.changes.sum(1)
    return scores


def combined(source_scores, weights, config):
    """The score (B,) that scores (sources, B), of reward models, then functions, then steps, add up to.

    --reward-combine sum: their sum, weighted (sources,). Else the weighted scores of the reward models become
    one before the others are added: their mean, the least, or the mean less --pessimism standard
    deviations (Coste et al. 2024, who take variances). All tensors, or all numpy arrays.
    """
    if config.reward_combine == "sum":
        return weights @ source_scores
    weighted = weights[:, None] * source_scores
    models = len(weights) - len(config.reward_fn) - bool(config.process)
    ensemble, others = weighted[:models], weighted[models:].sum(0)
    mean = ensemble.mean(0)  # (B,)
    if config.reward_combine == "mean":
        return mean + others
    if config.reward_combine == "min":
        least = ensemble.argmin(0)  # (B,)
        return ensemble[least, list(range(len(least)))] + others
    if config.reward_combine == "pessimistic":
        deviation = ((ensemble - mean) ** 2).mean(0) ** 0.5  # (B,)
        return mean - config.pessimism * deviation + others
    raise ValueError(f"unknown combination {config.reward_combine}")


def judge(function, batch):
    """A function's numbers (B,) for a rollout, on the CPU."""
    prompts = [prompt.row.text for prompt in batch.prompts]
    answers = [prompt.row.answer for prompt in batch.prompts]
    return function(prompts, batch.texts, answers, batch.ended.tolist(), batch.dialogues)


def judge_texts(function, rows, replies, ended):
    """The same for replies to the prompts of rows, all lists, as a list of finite numbers."""
    dialogues = [with_reply(row, reply) for row, reply in zip(rows, replies)]
    numbers = function([row.text for row in rows], replies, [row.answer for row in rows], ended, dialogues)
    require(numbers.isfinite().all(), f"{function.spec} gave a reply a number that is not finite")
    return numbers.tolist()


class Question(NamedTuple):
    """What a model is asked that answers with one of two letters."""
    ids: list  # up to the letter
    letters: list  # the tokens of A and of B there


def encode_question(tokenizer, text):
    """The Question that a text asks.

    The letters' tokens are those of the conversation that they answer: behind a chat template that writes a
    blank first, A is another token than at the beginning of a text. Up to where the two answers part, as in
    that blank, they belong to the question.
    """
    ask = Row([{"role": "user", "content": text}])
    answered = [encode_dialogue(tokenizer, with_reply(ask, letter), last_only=True)[0] for letter in "AB"]
    apart = [i for i, (a, b) in enumerate(zip(*answered)) if a != b]
    require(apart, "the tokenizer of the model that is asked does not tell A from B")
    at = apart[0]
    return Question(answered[0][:at], [ids[at] for ids in answered])


@torch.no_grad()
def letter_logprobs(run, model, questions, pad, budget):
    """Log-probabilities (N, 2) of A and B after each Question, of the whole softmax, fp32, on the CPU.

    budget: tokens per pass.
    """
    result = torch.zeros(len(questions), 2)
    lengths = [len(question.ids) for question in questions]
    for numbers in by_length(range(len(questions)), lengths, budget):
        part = [questions[i] for i in numbers]
        ids, sizes = pad_rows([question.ids for question in part], pad, run.device)  # (n, T), (n,)
        # Flat positions of the last tokens.
        last = torch.arange(len(part)) * ids.shape[1] + sizes - 1  # (n,)
        with run.autocast():
            logits = model.logits(model.transformer(ids, index=last))  # (n, V)
        letters = torch.tensor([question.letters for question in part], device=run.device)  # (n, 2)
        result[numbers] = logits.float().log_softmax(-1).gather(1, letters).cpu()
    return result


def short_names(paths):
    """The last part of each path, or as many as tell it from the others; a path named twice gets a number."""
    parts = [path.rstrip("/").split("/") for path in paths]
    names = []
    for i, own in enumerate(parts):
        others = parts[:i] + parts[i + 1:]
        kept = 1
        while kept < len(own) and own[-kept:] in [other[-kept:] for other in others]:
            kept += 1
        names.append("/".join(own[-kept:]))
    for i, own in enumerate(parts):
        if parts.count(own) > 1:
            number = parts[:i].count(own) + 1
            names[i] = f"{names[i]}#{number}"
    return names
