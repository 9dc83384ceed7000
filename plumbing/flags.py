"""Flags: a dataclass per script; type and range come from the annotation, the help from a field's comment."""
import argparse
import dataclasses
import difflib
import inspect
import math
import operator
import os
import re
import typing
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


def require(condition, message):
    """Raise UserError(message) unless condition holds."""
    if not condition:
        raise UserError(message)


Count = Annotated[int, ">= 1"]
Natural = Annotated[int, ">= 0"]
Seed = Annotated[int, ">= 0", "<= 1000000"]
Positive = Annotated[float, "> 0"]
NonNegative = Annotated[float, ">= 0"]
Fraction = Annotated[float, ">= 0", "<= 1"]
Probability = Annotated[float, ">= 0", "< 1"]
METAVARS = {int: "N", float: "X", str: "TEXT"}
BOUNDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


# ---------------------------------------------------------------------------------------------------------
# The flags that all training scripts share

@dataclass
class ResumeFlags:
    """Flags that may change on --resume: how a run is computed, watched and saved, not what it learns."""
    # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    allow_pickle: bool = False
    # write a model with the adapters merged, or the adapters alone (a PEFT folder)
    lora_save: Literal["merged", "adapter"] = "merged"
    # of the weights in the checkpoint
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    # keep less in memory for the backward pass and compute it again: one more forward pass
    checkpoint_activations: bool = False
    # let torch.compile fuse what lies between matrix products, once for all lengths: for a GPU; on a CPU it
    # needs a C++ compiler and a minute, and gains nothing
    compile: bool = False
    # auto takes the first of cuda, mps, cpu that works
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    # CPU threads, 0 leaves it to PyTorch; a busy machine wants 1
    threads: Natural = 0
    # under torchrun: ddp keeps a whole model on each GPU, fsdp cuts it in shards (slower, for a model that
    # doesn't fit)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    # seconds that a rank waits for another before the job ends
    rank_timeout: Positive = 1800.0
    # on a GPU, choose operations that repeat bit for bit; slower (a CPU always repeats)
    deterministic: bool = False
    # go on with the run in --out (or begin it, if there is none)
    resume: bool = False
    # with --resume: go on although other settings or data than at the beginning are named (but for the
    # model's shape)
    override: bool = False
    # delete the run that --out holds and begin anew
    overwrite: bool = False
    # steps between checkpoints, of which the last two and the best are kept; 0 saves at the end only (and on
    # Ctrl-C)
    save_every: Natural = 0
    # batches that may be skipped because a reward or gradient was not finite, before the run ends
    max_skipped: Natural = 3
    # steps between rows of metrics.jsonl
    log_every: Count = 1
    # also write TensorBoard files to --out (needs the tensorboard package)
    tensorboard: bool = False
    # also log to this Weights & Biases project (needs the wandb package)
    wandb: str = ""
    # show the traceback of an error
    debug: bool = False


@dataclass
class ScratchFlags:
    """Flags that describe a model from scratch; a checkpoint folder has its own tokenizer and shape."""
    # of a model from scratch: gpt2, a FOLDER's, or bpe:N (N learned from --data); auto: the one that lies
    # beside --data, else gpt2
    tokenizer: str = "auto"
    # of a model from scratch
    layers: Count = 2
    # attention heads of a model from scratch
    heads: Count = 4
    # of a model from scratch: size of its hidden states
    width: Count = 128
    # context of a model from scratch, tokens
    block_size: Count = 256


@dataclass
class RunConfig(ScratchFlags, ResumeFlags):
    """Flags of every training script that have nothing to do with its algorithm."""
    # take one part of --data, by prompt: 2/4/4:1 is the first of three in the ratio 2 to 4 to 4
    part: str = ""
    # leave out rows of --data that can't be read, if they are at most one in a hundred, instead of stopping
    # at the first
    skip_bad: bool = False
    # leave out rows of --data longer than this (plain text is cut), tokens; 0: the model's context
    max_length: Natural = 0
    # train low-rank adapters of this rank on a frozen model; 0 trains all weights
    lora_rank: Natural = 0
    # the adapters count alpha / rank times
    lora_alpha: NonNegative = 16.0
    # share of the adapters' inputs dropped while training (sft, reward)
    lora_dropout: Probability = 0.0
    # the matrices that get an adapter
    lora_targets: Literal["all", "attention", "mlp"] = "all"
    # seed of every random draw
    seed: Seed = 0
    # of matrix products, weights stay float32; auto: bfloat16 on a GPU (float16 on old ones) and, for models
    # of width 256 upwards, on a CPU with AMX, else float32
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # also skip a batch whose gradient norm is this many standard deviations above those before it; 0 is off
    skip_sigma: NonNegative = 0.0


def field_names(config_class):
    """The names of a dataclass's fields, in their order."""
    return tuple(field.name for field in dataclasses.fields(config_class))


# May change on --resume. Every script has an --out, whose default is its own.
PLUMBING = {"out", *field_names(ResumeFlags)}
SCRATCH_FLAGS = field_names(ScratchFlags)
# May not change on --resume, even with --override.
SHAPE_FLAGS = (*SCRATCH_FLAGS, "lora_rank", "lora_targets")
# What a run is built on: data files, and folders of models (and that of a tokenizer).
DATA_FLAGS = ("data", "val_data", "demonstrations", "ptx_data", "preferences")
MODEL_FLAGS = ("model", "reward", "process", "reference", "teacher")


# ---------------------------------------------------------------------------------------------------------
# From a dataclass to a command line and back

def field_comments(config_class):
    """{field: its help} for a dataclass and its bases, read from the source.

    The help is the comment on the field's own line, or else the comment lines that stand directly above it.
    A comment with a blank line below is a heading, and no help.
    """
    comments = {}
    for cls in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        above = []
        for line in inspect.getsource(cls).splitlines():
            if line.strip().startswith("#"):
                above.append(line.strip().removeprefix("#").strip())
                continue
            field = re.match(r"\s+(\w+): ", line)
            beside = re.search(r"  # (.+)$", line)
            if field and beside:
                comments[field[1]] = beside[1]
            elif field and above:
                comments[field[1]] = " ".join(above)
            above = []
    return comments


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def flag_of(name):
    """How a field is called on the command line."""
    return "--" + name.replace("_", "-")


def add_flag(group, flag, hint, text):
    """Add a flag to a group of a parser. hint: the field's type, without its bounds; text: its help."""
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif typing.get_origin(hint) is Literal:
        group.add_argument(flag, choices=typing.get_args(hint), help=text)
    elif typing.get_origin(hint) is list:
        kind, = typing.get_args(hint)
        group.add_argument(flag, type=kind, nargs="+", metavar=METAVARS[kind], help=text)
    else:
        group.add_argument(flag, type=hint, metavar=METAVARS[hint], help=text)


def unknown_argument(parser, argument, refused):
    """What to say of an argument that the parser doesn't know: the nearest flag, if one is near.

    refused: {flag: why there is none}.
    """
    if argument.split("=")[0] in refused:
        return f"{argument}: {refused[argument.split('=')[0]]}"
    known = []
    for action in parser._actions:
        known += action.option_strings
    name = argument.split("=")[0].replace("_", "-")
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"unknown argument {argument}; did you mean {near[0]}?"
    return f"unknown argument {argument}; see --help"


def within(value, limits):
    """Whether a number is finite and within all limits, such as [">= 0", "< 1"]."""
    for limit in limits:
        sign, number = limit.split()
        holds = BOUNDS[sign](value, float(number))
        if not (math.isfinite(value) and holds):
            return False
    return True


def parse_flags(config_class, description, argv=None):
    """A config_class instance from the command line; a bad flag or value ends in one line and exit code 2."""
    # What isn't given is left out of the result, and the dataclass fills it in.
    parser = FlagParser(description=description, usage="%(prog)s [flags]", allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter,
                        argument_default=argparse.SUPPRESS)
    # The script's own flags come first in --help, then those that it shares with others.
    own = parser.add_argument_group("flags of this script")
    common = parser.add_argument_group("flags of every training script")

    comments = field_comments(config_class)
    hints = typing.get_type_hints(config_class, include_extras=True)
    bounds = {}
    for field in dataclasses.fields(config_class):
        group = own if field.name in config_class.__annotations__ else common
        hint = hints[field.name]
        if typing.get_origin(hint) is Annotated:
            hint, *bounds[field.name] = typing.get_args(hint)
        text = comments.get(field.name, "")
        if field.default not in ("", dataclasses.MISSING):
            text += f" (default: {field.default})"
        # argparse puts values in where it sees a percent sign.
        add_flag(group, flag_of(field.name), hint, text.replace("%", "%%"))

    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(unknown_argument(parser, unknown[0], getattr(config_class, "REFUSED", {})))
    given = vars(args)
    for name, limits in bounds.items():
        if name in given and not within(given[name], limits):
            parser.error(f"{flag_of(name)} must be {' and '.join(limits)}, got {given[name]}")
    # A preset is nothing but flags; those that are given beside it count.
    if given.get("preset"):
        given = config_class.PRESETS[given["preset"]] | given
    # Where 0 is the default of --epochs, it takes the place of --steps; ppo.py's is something else.
    if given.get("epochs") and config_class.epochs == 0 and "steps" in given:
        parser.error(f"--steps {args.steps} and --epochs {args.epochs} both say how long to train; give one")
    return config_class(**given)


# ---------------------------------------------------------------------------------------------------------
# Values of flags

def as_list(value):
    """A flag's values: itself if it takes several, else the one, unless that is empty."""
    if isinstance(value, list):
        return value
    if value:
        return [value]
    return []


def path_and_weight(text):
    """(path, weight or None) of a file's name, or of a name, a colon and a weight."""
    if os.path.isfile(text):
        return text, None
    path, _, number = text.rpartition(":")
    try:
        return path, float(number)
    except ValueError:
        return text, None


def first_source(pieces):
    """(path, weight or None, how many pieces they are) of the file that pieces of a list begin with.

    A file may have commas and colons in its name, so the longest name that exists is taken.
    """
    for n in range(len(pieces), 0, -1):
        path, weight = path_and_weight(",".join(pieces[:n]).strip())
        if os.path.isfile(path):
            break
    return path, weight, n


def parse_sources(spec):
    """[(path, weight or None)] of a.jsonl, of several with commas, or of a mixture a.jsonl:0.8,b.json:0.2."""
    sources = []
    pieces = spec.split(",")
    while pieces:
        path, weight, n = first_source(pieces)
        sources.append((path, weight))
        pieces = pieces[n:]

    paths = [path for path, _ in sources]
    weights = [weight for _, weight in sources]
    require(weights.count(None) in (0, len(weights)),
            f"{spec}: give every file a weight (a.jsonl:0.8,b.jsonl:0.2), or none")
    for weight in weights:
        require(weight is None or 0 < weight < math.inf, f"{spec}: a weight must be > 0")
    for path, times in Counter(paths).items():
        require(path, f"{spec} names nothing between two commas")
        require(times == 1, f"{spec} names {path} twice")
    return sources
