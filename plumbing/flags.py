"""Flags: a dataclass per script; type and range come from the annotation, the help from the field's comment."""
import argparse
import dataclasses
import difflib
import inspect
import math
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
BOUNDS = {">=": lambda x, y: x >= y, "<=": lambda x, y: x <= y, ">": lambda x, y: x > y, "<": lambda x, y: x < y}


@dataclass
class RunConfig:
    """Flags of every training script that have nothing to do with its algorithm."""
    tokenizer: str = "auto"  # of a model from scratch: gpt2, a FOLDER's, or bpe:N (N learned from --data); auto: the one that lies beside --data, else gpt2
    layers: Count = 2  # of a model from scratch
    heads: Count = 4  # attention heads of a model from scratch
    width: Count = 128  # of a model from scratch: size of its hidden states
    block_size: Count = 256  # context of a model from scratch, tokens
    allow_pickle: bool = False  # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    part: str = ""  # take one part of --data, by prompt: 2/4/4:1 is the first of three in the ratio 2 to 4 to 4
    skip_bad: bool = False  # leave out rows of --data that can't be read, if they are at most one in a hundred, instead of stopping at the first
    max_length: Natural = 0  # leave out rows of --data longer than this (plain text is cut), tokens; 0: the model's context
    lora_rank: Natural = 0  # train low-rank adapters of this rank on a frozen model; 0 trains all weights
    lora_alpha: NonNegative = 16.0  # the adapters count alpha / rank times
    lora_dropout: Probability = 0.0  # share of the adapters' inputs dropped while training (sft, reward)
    lora_targets: Literal["all", "attention", "mlp"] = "all"  # the matrices that get an adapter
    lora_save: Literal["merged", "adapter"] = "merged"  # write a model with the adapters merged, or the adapters alone (a PEFT folder)
    checkpoint_activations: bool = False  # keep less in memory for the backward pass and compute it again: one more forward pass
    compile: bool = False  # let torch.compile fuse what lies between matrix products, once for all lengths: for a GPU; on a CPU it needs a C++ compiler and a minute, and gains nothing
    save_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in the checkpoint
    seed: Seed = 0  # seed of every random draw
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto takes the first of cuda, mps, cpu that works
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products, weights stay float32; auto: bfloat16 on a GPU (float16 on old ones) and, for models of width 256 upwards, on a CPU with AMX, else float32
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch; a busy machine wants 1
    resume: bool = False  # go on with the run in --out (or begin it, if there is none)
    override: bool = False  # with --resume: go on although other settings or data than at the beginning are named (but for the model's shape)
    overwrite: bool = False  # delete the run that --out holds and begin anew
    save_every: Natural = 0  # steps between checkpoints, of which the last two and the best are kept; 0 saves at the end only (and on Ctrl-C)
    log_every: Count = 1  # steps between rows of metrics.jsonl
    tensorboard: bool = False  # also write TensorBoard files to --out (needs the tensorboard package)
    wandb: str = ""  # also log to this Weights & Biases project (needs the wandb package)
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: ddp keeps a whole model on each GPU, fsdp cuts it in shards (slower, for a model that doesn't fit)
    rank_timeout: Positive = 1800.0  # seconds that a rank waits for another before the job ends
    deterministic: bool = False  # on a GPU, choose operations that repeat bit for bit; slower (a CPU always repeats)
    max_skipped: Natural = 3  # batches that may be skipped because a reward or gradient was not finite, before the run ends
    skip_sigma: NonNegative = 0.0  # also skip a batch whose gradient norm is this many standard deviations above those before it; 0 is off
    debug: bool = False  # show the traceback of an error


SCRATCH_FLAGS = ("tokenizer", "layers", "heads", "width", "block_size")  # a checkpoint folder has its own
# What a run is built on: data files, and folders of models and of a tokenizer.
DATA_FLAGS, MODEL_FLAGS = ("data", "val_data", "demonstrations", "ptx_data"), ("model", "reward")
PLUMBING = {"out", "device", "threads", "resume", "override", "overwrite", "save_every", "log_every", "tensorboard", "wandb", "debug", "parallel", "rank_timeout",
            "deterministic", "max_skipped", "checkpoint_activations", "compile", "save_dtype", "lora_save", "allow_pickle"}  # may change on --resume
SHAPE_FLAGS = (*SCRATCH_FLAGS, "lora_rank", "lora_targets")  # may not, even with --override


def field_comments(config_class):
    """{field: the comment on its line} for a dataclass and its bases, read from the source."""
    comments = {}
    for cls in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(cls):
            for line in inspect.getsource(cls).splitlines():
                if found := re.match(r"\s+(\w+): .*?  # (.+)$", line):
                    comments[found[1]] = found[2]
    return comments


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")


def parse_flags(config_class, description, argv=None):
    """A config_class instance from the command line; a bad flag or value ends in one line and exit code 2."""
    # What isn't given is left out of the result, and the dataclass fills it in.
    plain = argparse.RawDescriptionHelpFormatter
    parser = FlagParser(description=description, usage="%(prog)s [flags]", allow_abbrev=False,
                        formatter_class=plain, argument_default=argparse.SUPPRESS)
    comments, hints = field_comments(config_class), typing.get_type_hints(config_class, include_extras=True)
    bounds = {}
    # The script's own flags come first in --help, then those that it shares with others.
    own = parser.add_argument_group("flags of this script")
    common = parser.add_argument_group("flags of every training script")
    for field in dataclasses.fields(config_class):
        group = own if field.name in config_class.__annotations__ else common
        flag, hint = "--" + field.name.replace("_", "-"), hints[field.name]
        if typing.get_origin(hint) is Annotated:
            hint, *bounds[field.name] = typing.get_args(hint)
        default = "" if field.default in ("", dataclasses.MISSING) else f" (default: {field.default})"
        text = (comments.get(field.name, "") + default).replace("%", "%%")
        if hint is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif typing.get_origin(hint) is Literal:
            group.add_argument(flag, choices=typing.get_args(hint), help=text)
        elif typing.get_origin(hint) is list:
            kind, = typing.get_args(hint)
            group.add_argument(flag, type=kind, nargs="+", metavar=METAVARS[kind], help=text)
        else:
            group.add_argument(flag, type=hint, metavar=METAVARS[hint], help=text)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0].replace("_", "-"), known, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    given = vars(args)
    for name, limits in bounds.items():
        flag, value = "--" + name.replace("_", "-"), given.get(name)
        for limit in limits if name in given else ():
            sign, number = limit.split()
            if not (math.isfinite(value) and BOUNDS[sign](value, float(number))):
                parser.error(f"{flag} must be {' and '.join(limits)}, got {value}")
    # Where 0 is the default of --epochs, it takes the place of --steps; ppo.py's is something else.
    if given.get("epochs") and config_class.epochs == 0 and "steps" in given:
        parser.error(f"--steps {args.steps} and --epochs {args.epochs} both say how long to train; give one")
    return config_class(**given)


def as_list(value):
    """A flag's values: itself if it takes several, else the one, unless that is empty."""
    return value if isinstance(value, list) else [value] if value else []


def parse_sources(spec):
    """[(path, weight or None)] of a.jsonl, of several with commas, or of a mixture a.jsonl:0.8,b.json:0.2."""
    sources, pieces = [], spec.split(",")
    while pieces:
        for n in range(len(pieces), 0, -1):  # a file may have commas and colons in its name: the longest name that exists
            path, weight = ",".join(pieces[:n]).strip(), None
            if not os.path.isfile(path):
                try:
                    path, weight = path.rpartition(":")[0], float(path.rpartition(":")[2])
                except ValueError:
                    path, weight = ",".join(pieces[:n]).strip(), None
            if os.path.isfile(path):
                break
        sources.append((path, weight))
        pieces = pieces[n:]
    weights = [weight for _, weight in sources]
    require(weights.count(None) in (0, len(weights)), f"{spec}: give every file a weight (a.jsonl:0.8,b.jsonl:0.2), or none")
    require(all(weight is None or 0 < weight < math.inf for weight in weights), f"{spec}: a weight must be > 0")
    for path, n in Counter(path for path, _ in sources).items():
        require(path and n == 1, f"{spec} names {path or 'nothing'} {'twice' if path else 'between two commas'}")
    return sources
