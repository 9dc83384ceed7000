"""Plumbing, and nothing that can change an objective: flags, device and precision, torchrun, optimiser
steps, metrics, progress, checkpoints to resume from.

Randomness: no generator state is ever stored. Every random draw of a run is seeded from (seed, step, rank)
when the step begins, so a resumed run draws what the uninterrupted one would have drawn.
"""
import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 2."""


def require(condition, message):
    """Raise UserError(message) unless condition holds."""
    if not condition:
        raise UserError(message)


# ---------------------------------------------------------------------------------------------------------
# Flags: a dataclass per script; type and range come from the annotation, the help from the field's comment.

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
    tokenizer: Literal["auto", "gpt2", "toy"] = "auto"  # of a model from scratch; auto: gpt2 unless the data is the toy task
    layers: Count = 2  # of a model from scratch
    heads: Count = 4  # attention heads of a model from scratch
    width: Count = 128  # of a model from scratch: size of its hidden states
    block_size: Count = 256  # context of a model from scratch, tokens
    allow_pickle: bool = False  # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    part: str = ""  # take one part of --data, by prompt: 2/4/4:1 is the first of three in the ratio 2 to 4 to 4
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
    overwrite: bool = False  # delete the run that --out holds and begin anew
    save_every: Natural = 0  # steps between checkpoints; 0 saves at the end only (and on Ctrl-C)
    log_every: Count = 1  # steps between rows of metrics.jsonl
    tensorboard: bool = False  # also write TensorBoard files to --out (needs the tensorboard package)
    wandb: str = ""  # also log to this Weights & Biases project (needs the wandb package)
    debug: bool = False  # show the traceback of an error


SCRATCH_FLAGS = ("tokenizer", "layers", "heads", "width", "block_size")  # a checkpoint folder has its own
INPUT_FLAGS = ("data", "val_data", "demonstrations", "model", "reward", "ptx_data")  # files and folders that a run is built on
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt",
                   "added_tokens.json", "tokenizer.model", "generation_config.json")
CHECKPOINT_FILES = ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES)
RUN_FILES = (*CHECKPOINT_FILES, *(f"ema/{name}" for name in CHECKPOINT_FILES), "resume.safetensors", "metrics.jsonl", "evaluation.json")  # what a run writes
PLUMBING = {"out", "device", "threads", "resume", "overwrite", "save_every", "log_every", "tensorboard", "wandb", "debug",
            "checkpoint_activations", "compile", "save_dtype", "lora_save", "allow_pickle"}  # may change on --resume


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
    parser = FlagParser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments, hints = field_comments(config_class), typing.get_type_hints(config_class, include_extras=True)
    bounds = {}
    for field in dataclasses.fields(config_class):
        flag, hint = "--" + field.name.replace("_", "-"), hints[field.name]
        if typing.get_origin(hint) is Annotated:
            hint, *bounds[field.name] = typing.get_args(hint)
        default = "" if field.default in ("", dataclasses.MISSING) else f" (default: {field.default})"
        text = (comments.get(field.name, "") + default).replace("%", "%%")
        if hint is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
        elif typing.get_origin(hint) is Literal:
            parser.add_argument(flag, choices=typing.get_args(hint), default=field.default, help=text)
        elif typing.get_origin(hint) is list:
            kind, = typing.get_args(hint)
            parser.add_argument(flag, type=kind, nargs="+", default=[], metavar=METAVARS[kind], help=text)
        else:
            parser.add_argument(flag, type=hint, default=field.default, metavar=METAVARS[hint], help=text)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].split("=")[0].replace("_", "-"), known, 1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    for name, limits in bounds.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        for limit in limits:
            sign, number = limit.split()
            if not (math.isfinite(value) and BOUNDS[sign](value, float(number))):
                parser.error(f"{flag} must be {' and '.join(limits)}, got {value}")
    return config_class(**vars(args))


def run_script(main, config_class, description, argv=None):
    """Parse flags, call main(config); turn a UserError into one line and exit code 2."""
    config, code = parse_flags(config_class, description, argv), 0
    try:
        main(config)
    except (UserError, torch.OutOfMemoryError) as error:
        if config.debug:
            raise
        code = fail(error, 2) if isinstance(error, UserError) else \
            fail("the device is out of memory; lower the token or batch flags (see --help)", 1)
    except KeyboardInterrupt:
        code = fail("interrupted", 130)
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        parallel = dist.is_initialized()
        if parallel:
            dist.destroy_process_group()
    if parallel:  # DDP keeps the group's threads alive, and one that runs while Python shuts down aborts the process
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def keep_heap():
    """Make glibc keep freed memory for the next step, from now on; what is free already is given back.

    By itself it returns large blocks at once, and each time that they are taken anew the kernel zeroes all their pages: up
    to half of a step's time on a CPU. Does nothing on other systems.
    """
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_MAX, 0)  # no block is mapped on its own
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # nor the heap's end given back


def fail(message, code):
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return code


# ---------------------------------------------------------------------------------------------------------
# Device, precision, files

def pick_device(name):
    """torch.device for auto, cuda, mps or cpu; a UserError where it is not there. Under torchrun: this rank's GPU."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in have.items() if there)
    require(have[name], f"--device {name}: PyTorch finds no such device here; use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    index, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    require(index < there, f"local rank {index} has no GPU, this machine has {there}; lower --nproc_per_node")
    return torch.device("cuda", index)


def pick_dtype(name, device, width):
    """torch.dtype of matrix products for a --dtype flag on a device, for a model of this width."""
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":  # AMX multiplies in bfloat16 four times as fast; in a narrow model casting takes more than that saves
        amx = device.type == "cpu" and "amx_bf16" in cpu_features()
        name = "bfloat16" if amx and width >= 256 else "float32"
    require(name != "float16" or device.type == "cuda", "--dtype float16 needs --device cuda; use bfloat16 or float32")
    return getattr(torch, name)


def cpu_features():
    """What Linux says that the CPU can do, as words; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    return set(re.findall(r"\w+", re.search(r"^(?:flags|Features)\s*:(.*)$|\Z", info.read_text(), re.M)[1] or "")) if info.exists() else set()


def autocast(device, dtype):
    """Context in which matrix products run in dtype; does nothing for float32."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def write_atomically(path, data):
    """Write bytes to path so that a crash leaves either the old file or the new one, never a part."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_tensors(path, tensors, metadata):
    """Write {name: tensor} as safetensors, atomically, straight from the tensors' memory; those not on the CPU are copied there first."""
    seen, host = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        host[name] = tensor.clone() if tensor.data_ptr() in seen else tensor  # the format has no shared tensors
        seen.add(tensor.data_ptr())
    temporary = Path(f"{path}.tmp")
    save_file(host, temporary, metadata)
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    """Write value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def folder_of(path):
    """The folder that a file is to be written to, made if need be; UserError if it can't be."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} can't be written: {error.strerror}") from None
    return Path(path).parent


def as_list(value):
    """A flag's values: itself if it takes several, else the one, unless that is empty."""
    return value if isinstance(value, list) else [value] if value else []


def digest(name):
    """SHA-256 of the files that a flag names: data files, or a checkpoint folder's weights; "" for anything else (toy, scratch, a hub name)."""
    path, total = Path(name), hashlib.sha256()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin") and file.name != "resume.safetensors")
    else:
        files = [path] if path.is_file() else [Path(re.sub(r":[\d.]+$", "", part)) for part in name.split(",")]  # of a mixture: a.jsonl:0.8,b.json:0.2
    files = [file for file in files if file.is_file()]
    for file in files:
        with open(file, "rb") as f:
            while block := f.read(1 << 20):
                total.update(block)
    return total.hexdigest() if files else ""


def scheduled_lr(step, steps, warmup, peak, schedule="cosine"):
    """Learning rate of a step (from 0): linear warm-up, then cosine to a tenth of peak, linear to 0, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1 - progress) if schedule == "linear" else peak


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW; matrices decay, but not norms, biases and embeddings (which are 1-D or named w?e)."""
    decay, keep = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (keep if p.ndim < 2 or name.endswith(("wte.weight", "wpe.weight")) else decay).append(p)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def reward_function(spec, device):
    """What --reward-fn module:function names, as f(prompts, replies, answers) -> scores (B,); whatever goes wrong in it is a UserError."""
    module, _, name = spec.partition(":")
    require(module and name, f"--reward-fn {spec}: write module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # found from the working directory
    try:
        function = getattr(importlib.import_module(module), name)
        wants_answers = len(inspect.signature(function).parameters) > 2
    except Exception as error:  # a module of the user's may fail in any way
        raise UserError(f"--reward-fn {spec} can't be imported ({type(error).__name__}: {error})") from None

    def scores_of(*texts):  # prompts, replies, answers
        try:
            with torch.no_grad():
                scores = torch.as_tensor(function(*texts[:3 if wants_answers else 2]), dtype=torch.float32, device=device).detach()
        except Exception as error:
            raise UserError(f"--reward-fn {spec} failed ({type(error).__name__}: {error}); it is given lists of text: prompts, replies and, if it takes three, answers") from None
        require(scores.shape == (len(texts[1]),) and scores.isfinite().all(),
                f"--reward-fn {spec} must return one finite number for each of {len(texts[1])} replies, got shape {tuple(scores.shape)}")
        return scores

    return scores_of


# ---------------------------------------------------------------------------------------------------------
# A run: one output folder, one or more processes

class Run:
    """Where and how a training script runs: device, ranks, output folder, metrics, stop signal.

    Attributes: device, dtype, rank, world_size, main (bool: rank 0, which alone writes), out (Path).
    """

    def __init__(self, config):
        self.config, self.out = config, Path(config.out)
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device, 0)  # until `begin` knows the models
        if config.threads:
            torch.set_num_threads(config.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.resume_file = self.out / "resume.safetensors"
        self._check_out()
        if self.world_size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.scalers, self.stop_signal, self.bar, self.last_line = {}, None, None, 0.0
        self.say(f"{Path(sys.argv[0]).name}: {self.device}, {self.world_size} process(es), output in {self.out}")

    def _check_out(self):
        out, config = self.out, self.config
        require(not (config.resume and config.overwrite), "--resume and --overwrite exclude each other")
        require(not out.exists() or out.is_dir(), f"--out {out} is a file; name a folder")
        checkpoint = any((out / name).exists() for name in ("config.json", "adapter_config.json"))
        holds_run = (out / "metrics.jsonl").exists() or checkpoint
        require(not holds_run or config.resume or config.overwrite,
                f"--out {out} already holds a run; add --resume to go on with it, --overwrite to replace it, or name another folder")
        for flag in ("model", "reward"):
            for folder in as_list(getattr(config, flag, "")):
                require(not config.overwrite or Path(folder).resolve() not in (out.resolve(), (out / "ema").resolve()), f"--overwrite would delete the --{flag} {folder}")
        require(config.lora_save == "merged" or (config.lora_rank > 0 and config.model != "scratch"), "--lora-save adapter needs a --lora-rank above 0 and a --model to adapt")
        require(not config.resume or not checkpoint or (out / "run.json").exists(),
                f"--resume: {out} holds a checkpoint, but no run to go on with; name another --out")

    def say(self, text):
        """Print on rank 0, without breaking the progress bar."""
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def begin(self, modules, optimizers):
        """Restore the run if --resume finds one, then create the output folder; called once every input has been checked.

        modules, optimizers: {name: object}, as for `save`. Returns (first step to do, the extra values saved).
        """
        self.dtype = pick_dtype(self.config.dtype, self.device, max(module.config.n_embd for module in modules.values()))
        self.inputs = {flag: [digest(path) for path in as_list(getattr(self.config, flag, ""))] for flag in INPUT_FLAGS}
        first, extra = self._restore(modules, optimizers) if self.config.resume and self.resume_file.exists() else (0, {})
        agreed = self.all_min(torch.tensor([first, -first], device=self.device))
        require(agreed[0] == -agreed[1], f"--resume: not every rank finds {self.resume_file}; --out must lie on a disk that all nodes share")
        values = dataclasses.asdict(self.config)
        defaults = dataclasses.asdict(type(self.config)())
        unsaid = PLUMBING | (set(SCRATCH_FLAGS) if self.config.model != "scratch" else set())
        self.say("settings: " + ", ".join(f"{k}={v}{'*' if v != defaults[k] else ''}" for k, v in values.items()
                                          if k not in unsaid) + f"  (* not the default), products in {str(self.dtype)[6:]}")
        if self.main:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                if self.config.overwrite:
                    for name in RUN_FILES:
                        (self.out / name).unlink(missing_ok=True)
                write_json(self.out / "run.json", {
                    "script": Path(sys.argv[0]).name, "config": values, "inputs_sha256": self.inputs, "torch": torch.__version__, "world_size": self.world_size,
                    "python": platform.python_version(), "machine": platform.machine(), "device": str(self.device)})
                self.metrics_file = self._open_metrics(first)
            except OSError as error:
                raise UserError(f"--out {self.out} can't be written: {error.strerror}") from None
            self.board = self._open_board()
        keep_heap()  # what loading took for a moment is free by now
        self.began = time.time()
        return first, extra

    def _open_metrics(self, step):
        """metrics.jsonl, opened to append, without the rows that a killed run logged after its last checkpoint."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept).encode())
        return open(path, "a", encoding="utf-8")

    def _open_board(self):
        boards = []
        try:
            if self.config.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(self.out)
                boards.append(lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()])
            if self.config.wandb:
                import wandb
                run = wandb.init(project=self.config.wandb, config=dataclasses.asdict(self.config), dir=self.out)
                boards.append(lambda step, row: run.log(row, step=step))
        except ImportError as error:
            raise UserError(f"{error}; install it, or leave out --tensorboard and --wandb") from None
        return boards

    # -- randomness, ranks, precision

    def seed_step(self, step):
        """Seed PyTorch for one step and return a generator on the device for sampling in it."""
        seed = (self.config.seed * 1_000_003 + step) * 1_009 + self.rank
        torch.manual_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    def autocast(self):
        return autocast(self.device, self.dtype)

    def parallel(self, module):
        """The module, on the device, wrapped in DDP when there are several ranks."""
        module = module.to(self.device)
        if self.world_size == 1:
            return module
        return torch.nn.parallel.DistributedDataParallel(module)  # without device_ids: inputs are where they should be already

    def clock(self):
        """Seconds, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def all_sum(self, tensor):
        """Sum of a tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_min(self, tensor):
        """Minimum of a tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def share(self, batch):
        """This rank's part of a step's examples, and 1.0; a rank that would get none takes the first one, with weight 0.0."""
        mine = batch[self.rank::self.world_size]
        return (mine, 1.0) if mine else (batch[:1], 0.0)

    def micro_batches(self, pieces, *modules):
        """Yield the pieces of one optimiser step; DDP exchanges gradients on the last one only."""
        for i, piece in enumerate(pieces):
            for module in modules:
                module.require_backward_grad_sync = i == len(pieces) - 1
            yield piece

    def _scaler(self, optimizer):
        """The optimiser's gradient scaler; it does nothing unless products are in float16."""
        if optimizer not in self.scalers:
            self.scalers[optimizer] = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        return self.scalers[optimizer]

    def backward(self, loss, optimizer):
        """Accumulate gradients of a loss that is divided by the GLOBAL count: DDP averages over ranks, so multiply back."""
        self._scaler(optimizer).scale(loss * self.world_size).backward()

    def optimizer_step(self, optimizer, lr, max_grad_norm):
        """Clip the gradients' global norm, step at lr, clear gradients. Returns the norm before clipping (a tensor)."""
        scaler = self.scalers[optimizer]
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    # -- the loop

    def _on_signal(self, number, frame):
        if self.stop_signal:
            sys.exit(128 + number)
        self.stop_signal = number
        if self.main:  # print would not be safe here: the signal may have come in the middle of one
            os.write(2, b"\nstopping after this step, then saving; once more stops at once\n")

    def steps(self, start, total):
        """Yield step numbers from start to total - 1 under a progress bar; ends the process after a stop signal."""
        if start >= total:
            self.say(f"{self.out}: this run is complete ({total} steps)")
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._on_signal)
        self.bar = tqdm(total=total, initial=start, disable=not (self.main and sys.stderr.isatty()), dynamic_ncols=True)
        for step in range(start, total):
            yield step
            self.bar.update()
            if self.stopping:
                self.bar.close()
                self.say(f"stopped after step {step + 1} of {total}; the same command with --resume goes on")
                raise SystemExit(128 + (self.stop_signal or signal.SIGTERM))
        self.bar.close()

    def time_to_save(self, step):
        """True after the last step, every --save-every steps, and when asked to stop (agreed by all ranks)."""
        self.stopping = self.stop_signal is not None
        if self.world_size > 1:
            self.stopping = bool(self.all_sum(torch.tensor(float(self.stopping), device=self.device)))
        every = self.config.save_every
        return self.stopping or step + 1 == self.config.steps or (every > 0 and (step + 1) % every == 0)

    def time_to_log(self, step):
        return step % self.config.log_every == 0 or step + 1 == self.config.steps

    def log(self, step, metrics, show):
        """Append metrics (floats or one-element tensors, the same on all ranks) to metrics.jsonl; `show` goes on the bar."""
        row = {"step": step + 1, **{k: float(v) for k, v in metrics.items()}}
        for k, v in row.items():
            if not math.isfinite(v) and k.endswith("loss"):
                raise UserError(f"step {step + 1}: {k} is {v}; the last checkpoint is untouched. Lower the learning rate, or look at the data")
        if not self.main:
            return
        self.metrics_file.write(json.dumps(row) + "\n")
        self.metrics_file.flush()
        for board in self.board:
            board(step + 1, row)
        text = "  ".join(f"{k} {row[k]:.4g}" for k in show if k in row)
        self.bar.set_postfix_str(text, refresh=False)
        due = time.time() - self.last_line > 10 or any(k.startswith("val_") for k in row) or step + 1 == self.config.steps
        if self.bar.disable and due:
            self.last_line = time.time()
            self.say(f"step {step + 1}/{self.config.steps}  {text}  {time.time() - self.began:.0f} s")

    # -- resuming

    def save(self, step, modules, optimizers, extra=None):
        """Write all that continuing needs to one file, atomically.

        modules, optimizers: {name: object}; extra: JSON values. Rank 0 writes; every rank holds the same state.
        """
        if not self.main:
            return
        tensors = {}
        for name, module in modules.items():
            tensors |= {f"{name}/{k}": v for k, v in module.state_dict().items()}
        for name, optimizer in optimizers.items():
            for i, values in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}/{i}/{k}": torch.as_tensor(v) for k, v in values.items()}
        bad = [k for k, v in tensors.items() if not v.isfinite().all()]
        require(not bad, f"step {step + 1}: {', '.join(bad[:3])} not finite; nothing was saved. Lower the learning rate, or look at the data")
        scalers = {name: self.scalers[o].state_dict() for name, o in optimizers.items() if o in self.scalers}
        state = {"step": step + 1, "config": dataclasses.asdict(self.config), "inputs": self.inputs, "scalers": scalers, "extra": extra or {}}
        write_tensors(self.resume_file, tensors, {"state": json.dumps(state)})

    def _restore(self, modules, optimizers):
        """Load what `save` wrote. Returns (first step to do, extra)."""
        try:
            with safe_open(self.resume_file, "pt") as f:
                state = json.loads(f.metadata()["state"])
                tensors = {k: f.get_tensor(k) for k in f.keys()}
        except Exception as error:
            raise UserError(f"{self.resume_file} is damaged ({error}); --overwrite begins anew") from None
        changed = [f"{k} was {state['config'].get(k)}, now {v}" for k, v in dataclasses.asdict(self.config).items()
                   if k not in PLUMBING and state["config"].get(k) != v]
        require(not changed, f"--resume: the run in {self.out} had other settings ({'; '.join(changed)}); name another --out for them")
        changed = [flag for flag, value in self.inputs.items() if state["inputs"].get(flag) != value]
        require(not changed, f"--resume: what --{' and --'.join(changed)} named when {self.out} began has changed since; name another --out")
        for name, module in modules.items():
            module.load_state_dict({k.removeprefix(name + "/"): v for k, v in tensors.items() if k.startswith(name + "/")})
        for name, optimizer in optimizers.items():
            saved = {}
            for key in tensors:
                if key.startswith(name + "/"):
                    _, i, field = key.rsplit("/", 2)
                    saved.setdefault(int(i), {})[field] = tensors[key]
            optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
            if self.dtype == torch.float16 and name in state["scalers"]:
                self._scaler(optimizer).load_state_dict(state["scalers"][name])
        self.say(f"resumed {self.out} after step {state['step']}")
        return state["step"], state["extra"]
