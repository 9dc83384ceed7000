"""A run from its first step to its last: device and precision, ranks, metrics, signals, saving, resuming.

Randomness: no generator state is ever stored. Every random draw of a run is seeded from (seed, step),
dropout's from the rank too, when the step begins. So a resumed run draws what the uninterrupted one would
have drawn.
"""
import atexit
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from plumbing.checkpoints import VERSION, Checkpoints, bytes_needed, load_into, save_shards, training_state
from plumbing.disk import RUN_FILES, digest, model_digest, tokenizer_digest, write_json, write_tensors
from plumbing.flags import (
    DATA_FLAGS, MODEL_FLAGS, PLUMBING, SCRATCH_FLAGS, SHAPE_FLAGS, UserError, as_list, flag_of, parse_flags,
    parse_sources, require)
from plumbing.hardware import autocast, keep_heap, pick_device, pick_dtype
from plumbing.metrics import Metrics, check_boards, is_evaluation
from plumbing.ranks import by_length, local
from plumbing.steps import Steps


def today():
    """What a chat template that asks for the date is told.

    It is when the run of this process began, or the present where there is no run.
    """
    if Run.current is None:
        return datetime.datetime.now()
    return datetime.datetime.fromisoformat(Run.current.date)


class Fault(Exception):
    """Something that went wrong under way: shown as one line, exit code 1."""


# ---------------------------------------------------------------------------------------------------------
# A script: from the command line to an exit code

def run_script(main, config_class, description, argv=None):
    """Parse flags, call main(config); end in one line and exit code 2 for a UserError, 1 for a fault."""
    # A letter that the console lacks (PYTHONIOENCODING=gbk) is no reason to end.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    atexit.register(flush_output)
    config = parse_flags(config_class, description, argv)
    code = 0
    try:
        main(config)
    except KeyboardInterrupt:
        code = fail("interrupted", 130)
    except SystemExit as stopped:
        code = stopped.code or 0
    except Exception as error:
        # Nobody reads on (| head): a program ends then, by SIGPIPE. (A training run trains on, see `say`.)
        if isinstance(error, BrokenPipeError) and Run.current is None:
            sys.exit(128 + signal.SIGPIPE)
        message = explain(error, config)
        if config.debug or (not message and not dist.is_initialized()):
            raise
        code = 2 if isinstance(error, UserError) else 1
        if message:
            fail(message, code, shared=isinstance(error, (UserError, Fault)))
        else:
            traceback.print_exc()
    if dist.is_initialized():
        leave_ranks(code)
    if code:
        sys.exit(code)


def leave_ranks(code):
    """End this process of several at once, with an exit code.

    The threads of torch.distributed are still alive, and one that runs while Python shuts down aborts the
    process. So what Python does at its end is done here.
    """
    # After an error others may be gone, and would be waited for.
    if code == 0:
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def flush_output():
    """Write out what was printed. That nobody reads it (| head) is worth no traceback and no exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            # Python flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# What takes less memory, for scripts that have the flag.
SAVES_MEMORY = {
    "micro_batch_tokens": "lower --micro-batch-tokens (now {})",
    "rollout_rows": "bound --rollout-rows (now {})",
    "checkpoint_activations": "add --checkpoint-activations",
    "lora_rank": "train adapters alone (--lora-rank 16)"}
LOST_RANKS = "gloo|nccl|timed? ?out|connection|broken pipe|process group"


def explain(error, config):
    """One line for an error that the user should understand; "" for any other."""
    text = str(error)
    run = Run.current
    if isinstance(error, (UserError, Fault)):
        return text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        return out_of_memory(config)
    if "No working C++ compiler" in text:
        return ("--compile needs a C++ compiler (g++, or what CXX names), and there is none that works; "
                "install one, or leave out --compile")
    if run and run.world_size > 1 and re.search(LOST_RANKS, text, re.I):
        return run.blame()
    return ""


def out_of_memory(config):
    """What to say where memory ran out: in which pass, and which flags help."""
    where = f" in {Run.current.doing}" if Run.current else ""
    advice = []
    for name, words in SAVES_MEMORY.items():
        if hasattr(config, name):
            advice.append(words.format(getattr(config, name)))
    if not advice:
        advice = ["take a smaller model, or fewer prompts at once"]
    return f"out of memory{where}; {', '.join(advice)}"


def fail(message, code, shared=True):
    """Say why this process ends, and return code. shared: all ranks say it, so one of each machine does."""
    if not shared or os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(BrokenPipeError):
            print(f"error: {message}", file=sys.stderr)
    return code


# ---------------------------------------------------------------------------------------------------------
# What an output folder says of the run in it

def read_state(path):
    """What run.json, or the state.json of a checkpoint, says; {} if it can't be read."""
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def holds_model(folder):
    """Whether there is a model in a folder, or an adapter."""
    return (folder / "config.json").exists() or (folder / "adapter_config.json").exists()


def changed_settings(config, inputs, state):
    """{flag: one line} for what has changed since the run began. inputs: {flag: [{file: SHA-256}, ...]}."""
    old_config = state.get("config", {})
    old_inputs = state.get("inputs_sha256", {})
    changed = {}
    for name, value in dataclasses.asdict(config).items():
        flag = flag_of(name)
        hashes = inputs.get(name, [])
        # An older version did not look at all of the inputs.
        old_hashes = old_inputs.get(name, hashes)
        if name not in PLUMBING and old_config.get(name) != value:
            changed[name] = f"{flag} was {old_config.get(name)}, is now {value}"
        elif old_hashes != hashes:
            changed[name] = f"what {flag} names has changed"
    return changed


def due(step, every):
    """Whether a step is one of those at which something is done every so many steps; 0 is never."""
    return every > 0 and step > 0 and step % every == 0


def one_line(error):
    """The message of an error in one line that is not too long."""
    return " ".join(str(error).split())[:200]


def try_to(part):
    """Do a part of a save. Returns why it failed, in one line, or "" if it did not."""
    try:
        part()
    except (OSError, SafetensorError, UserError) as error:
        # UserError: a weight of the model to write is not finite.
        return one_line(error)
    return ""


class Alone:
    """What sampling and scoring ask of a run, for a script that trains nothing.

    One process, no folder, no signals.
    """
    rank, world_size, step = 0, 1, 0

    def __init__(self, device, dtype):
        self.device, self.dtype, self.doing = device, dtype, ""

    def say(self, text):
        """Print. That nobody reads it is no reason to end before the work is done."""
        with contextlib.suppress(OSError):
            print(text, flush=True)

    def autocast(self):
        return autocast(self.device, self.dtype)

    def gathered(self, module):
        return contextlib.nullcontext()

    def all_max(self, tensor):
        return tensor

    def all_sum(self, tensor):
        return tensor

    def split(self, examples, lengths, budget, rows=None):
        return [(piece, 1.0) for piece in by_length(examples, lengths, budget, rows)]

    def any_rank(self, flag):
        return flag

    def passes(self, pieces):
        return pieces

    def asked_to_stop(self):
        return False

    def safe_point(self):
        pass


# ---------------------------------------------------------------------------------------------------------
# A run: one output folder, one or more processes

class Run(Steps):
    """Where and how a training script runs: device, ranks, output folder, metrics, signals, checkpoints.

    Attributes: device, dtype, out (Path), step (how many are done), and those of `Ranks`.
    """
    # The run of this process, if it has one.
    current = None

    def __init__(self, config, reads=None):
        """reads: {flag: what it names}, where that is not what the configuration says."""
        super().__init__()
        Run.current = self
        self.reads = reads or {}
        self.config = config
        self.out = Path(config.out)
        self.checkpoints = Checkpoints(config.out)
        # The open file that keeps other processes out of the folder.
        self.lock = None

        self.step = 0
        # What the run is doing, for a message that memory ran out.
        self.doing = "loading"
        # The step whose checkpoint is there: to save it again would change nothing.
        self.saved = None
        # False while this step's evaluation is still to come.
        self.evaluated = True

        # The signal that asked this run to stop, and when it came.
        self.stop_signal = None
        self.signalled = 0.0

        # The progress bar; what stands in it, {name: (value, step)}; when a line was printed in its place.
        self.bar = None
        self.shown = {}
        self.last_line = 0.0
        # (step, value) of the metric whose best checkpoint is kept, higher being better.
        self.value = (None, None)

        self._set_up_device()
        self._check_out()
        if self.main:
            check_boards(config)
        self.join(config.parallel == "fsdp", config.rank_timeout)
        # A chat template may write the date: the beginning's, or a run resumed another day had other ids.
        self.date = self._from_main(self._find_date)
        script = Path(sys.argv[0]).name
        self.say(f"{script}: {self.device}, {self.world_size} process(es), output in {self.out}")

    def _set_up_device(self):
        """Choose the device and the precision, and set PyTorch up for them."""
        config = self.config
        self.device = pick_device(config.device)
        # For the narrowest of models; `begin` knows those of this run.
        self.dtype = pick_dtype(config.dtype, self.device, 0)
        shards_work = self.device.type != "mps" and self.dtype != torch.float16
        require(config.parallel != "fsdp" or shards_work,
                "--parallel fsdp needs --device cuda or cpu, and --dtype bfloat16 or float32")
        if config.threads:
            torch.set_num_threads(config.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)

    # -- the output folder

    def _check_out(self):
        """UserError if --out can't be used as the other flags say. Changes nothing."""
        out, config = self.out, self.config
        require(not (config.resume and config.overwrite), "--resume and --overwrite exclude each other")
        require(config.resume or not config.override, "--override is for --resume")
        require(not out.exists() or out.is_dir(), f"--out {out} is a file; name a folder")
        # Of the folder and those above it, the first that is there.
        existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        require(os.access(existing, os.W_OK), f"--out {out}: {existing} is read-only")

        model = holds_model(out)
        run = (out / "metrics.jsonl").exists() or (out / "run.json").exists()
        require(not (model or run) or config.resume or config.overwrite,
                f"--out {out} already holds a run; add --resume to go on with it, --overwrite to replace it, "
                "or name another folder")
        if config.overwrite:
            self._check_overwrite()
        adapts = config.lora_rank > 0 and config.model != "scratch"
        require(config.lora_save == "merged" or adapts,
                "--lora-save adapter needs a --lora-rank above 0 and a --model to adapt")
        require(not config.resume or not model or run,
                f"--resume: {out} holds a model, but no run to go on with; name another --out")
        if run and self.main:
            self._lock()

    def _check_overwrite(self):
        """UserError if --overwrite would delete a model that this run needs."""
        out = self.out.resolve()
        deleted = [out, (self.out / "ema").resolve(), *(self.out / "checkpoints").resolve().glob("*")]
        for flag in MODEL_FLAGS:
            for folder in self._named(flag):
                require(Path(folder).resolve() not in deleted,
                        f"--overwrite would delete the --{flag} {folder}")

    def _lock(self):
        """Keep other processes from writing to the output folder, as long as this one lives."""
        if self.lock:
            return
        try:
            self.lock = open(self.out / ".lock", "a")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.out}: another process writes to it; "
                            "wait for that one, or name another folder") from None
        except OSError as error:
            raise UserError(f"--out {self.out} can't be written: {error.strerror}") from None

    def _from_main(self, read):
        """What read() returns on rank 0, on all ranks."""
        found = [read() if self.main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(found, 0, self.control)
        return found[0]

    def _find_date(self):
        """When the run in --out began, if --resume goes on with one; else now."""
        states = []
        if self.config.resume:
            states = [self.checkpoints.root / name / "state.json" for name in self.checkpoints.all()]
            states.append(self.out / "run.json")
        for path in states:
            # One of these errors means that there is no date, or none that can be read.
            with contextlib.suppress(ValueError, TypeError):
                date = read_state(path).get("date")
                datetime.datetime.fromisoformat(date)
                return date
        return datetime.datetime.now().isoformat(timespec="seconds")

    def say(self, text):
        """Print on rank 0, without breaking the progress bar.

        What can't be printed (to a file on a full disk) must not end the run.
        """
        if self.main:
            with contextlib.suppress(OSError):
                tqdm.write(text)
                sys.stdout.flush()

    def _named(self, flag):
        """The files or folders that a flag names."""
        return self.reads.get(flag) or as_list(getattr(self.config, flag, ""))

    def begin(self, modules, optimizers, models, best="", steps=None):
        """Restore the run if --resume finds one, then open the output folder.

        Called once every input has been checked.

        modules, optimizers: {name: what training changes}.
        models: {"": f}, where f(folder) writes the trained model to a folder, on all ranks together; more of
        them under the names of subfolders.
        best: name of the metric whose best checkpoint is kept, after a minus if low is good.
        steps: of the whole run, where --steps does not say it.
        Returns (steps done, state): state is a dict of JSON values that is saved and restored, for the script
        to fill.
        """
        self.modules, self.optimizers, self.models, self.best = modules, optimizers, models, best
        self.total = steps or self.config.steps
        self.parameter_names = {}
        for owner, module in modules.items():
            for name, p in module.named_parameters():
                self.parameter_names[p] = f"{owner}.{name}"
        widest = max(module.config.n_embd for module in modules.values())
        self.dtype = pick_dtype(self.config.dtype, self.device, widest)
        self.inputs = self._hash_inputs()
        self.state = {}
        if self.config.resume:
            self._restore()
        self._say_settings()
        self.about = {
            "script": Path(sys.argv[0]).name,
            "config": dataclasses.asdict(self.config),
            "inputs_sha256": self.inputs,
            "torch": torch.__version__,
            "world_size": self.world_size,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": str(self.device),
            "date": self.date}
        self.finished = False
        if self.main:
            try:
                self._open()
            except OSError as error:
                raise UserError(f"--out {self.out} can't be written: {error.strerror}") from None
        # What loading took for a moment is free by now.
        keep_heap()
        self.began = time.time()
        return self.step, self.state

    def _hash_inputs(self):
        """{flag: [{file: SHA-256}, ...]} of all that the run is built on."""
        config = self.config
        inputs = {}
        for flag in MODEL_FLAGS:
            inputs[flag] = [model_digest(folder) for folder in self._named(flag)]
        inputs["tokenizer"] = [tokenizer_digest(config.tokenizer)]
        for flag in DATA_FLAGS:
            inputs[flag] = []
            for spec in self._named(flag):
                paths = [path for path, _ in parse_sources(spec)]
                inputs[flag].append(digest(paths))
        return inputs

    def _say_settings(self):
        """Print the settings that can change what is learned, those marked that are not the default."""
        settings = dataclasses.asdict(self.config)
        defaults = dataclasses.asdict(type(self.config)())
        shown = []
        for name, value in settings.items():
            described = name in SCRATCH_FLAGS and self.config.model != "scratch"
            if name not in PLUMBING and not described:
                mark = "*" if value != defaults[name] else ""
                shown.append(f"{name}={value}{mark}")
        products = str(self.dtype).removeprefix("torch.")
        self.say(f"settings: {', '.join(shown)}  (* not the default), products in {products}")

    def _open(self):
        """Make the output folder ready: room, no old run, run.json, the metrics of steps that are done."""
        self.checkpoints.root.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._require_room()
        if self.config.overwrite:
            self.checkpoints.clear()
            for name in RUN_FILES:
                (self.out / name).unlink(missing_ok=True)
        # A run that was killed may not have come to show the model of its last checkpoint.
        if self.step:
            self.checkpoints.link(self.checkpoints.root / f"step_{self.step:06d}")
        path = self.out / "run.json"
        finished_after = read_state(path).get("finished_after")
        self.finished = self.step > 0 and finished_after == self.step
        if self.finished:
            write_json(path, self.about | {"finished_after": self.step})
        else:
            write_json(path, self.about)
        self.metrics = Metrics(self.config, self.step, self.finished)

    def _require_room(self):
        """UserError if the disk has no room for the checkpoints that this run will write."""
        root = self.checkpoints.root
        held = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        most = 4 if self.config.save_every else 1
        need = most * bytes_needed(self.modules, self.optimizers) - held
        free = shutil.disk_usage(root).free
        require(need <= free,
                f"--out {self.out} has {free:,} bytes free, "
                f"but its checkpoints will take up to {need:,} more "
                "(two, the best, and one being written); free some, or name a folder on another disk")

    # -- randomness, ranks, precision

    def seed_step(self, step):
        """Seed PyTorch for one step, differently on each rank.

        Returns a generator on the device that draws the same on all ranks.
        """
        seed = (self.config.seed * 1_000_003 + step) * 1_009
        torch.manual_seed(seed + 1 + self.rank)
        return torch.Generator(self.device).manual_seed(seed)

    def autocast(self):
        return autocast(self.device, self.dtype)

    def clock(self):
        """Seconds, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # -- forward passes of a step

    def passes(self, pieces, *modules, more=False):
        """Yield the pieces of one optimiser step, or of an evaluation.

        pieces: [(examples, weight)], see `split`. DDP exchanges gradients of these modules on the last one
        only, or not yet where more pieces of the same step follow. (FSDP does on each: keeping those of whole
        blocks would take the memory that shards save.)
        """
        for i, piece in enumerate(pieces):
            self.safe_point()
            examples, _ = piece
            self.doing = f"step {self.step + 1}, pass {i + 1} of {len(pieces)} (of {len(examples)} examples)"
            for module in modules:
                module.require_backward_grad_sync = not more and i == len(pieces) - 1
            yield piece

    # -- the loop

    def asked_to_stop(self):
        """Whether this rank has been sent a signal. Before what it cuts short is used, pass `safe_point`."""
        return self.stop_signal is not None

    def _on_signal(self, number, frame):
        """Remember that a signal came; at the second one, end at once."""
        now = time.monotonic()
        # torchrun may send the terminal's signal once more, a moment later; that is nobody's second wish.
        meant = self.world_size == 1 or now - self.signalled > 1
        if self.stop_signal and meant:
            os._exit(128 + number)
        if not self.stop_signal and self.main:
            # print would not be safe here: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping as soon as nothing is lost; once more stops at once\n")
        self.stop_signal, self.signalled = number, now

    def safe_point(self):
        """Save and end the process if any rank has been asked to; all ranks come by equally often.

        Nothing happens while the step has changed some of what is saved and not all of it (`clean` is False).
        """
        if self.clean and self.any_rank(self.asked_to_stop()):
            self._save(last=True)
            self.bar.close()
            self.say(f"stopped after step {self.step} of {self.total}; "
                     "the same command with --resume goes on")
            raise SystemExit(128 + (self.stop_signal or signal.SIGTERM))

    def steps(self, first, total, evaluate=None):
        """Yield step numbers from first to total - 1 under a progress bar.

        Saves what is due, and calls evaluate(steps done) before and after. Ends the process after a stop
        signal, or when too many steps had to be skipped.
        """
        if self.any_rank(self.finished and first == total):
            self.say(f"{self.out}: this run is complete ({total} steps)")
            return
        self.total = total
        save_every = self.config.save_every
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._on_signal)
        shows_bar = self.main and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=first, disable=not shows_bar, dynamic_ncols=True)
        for step in range(first, total + 1):
            # What belongs to the end of the step before: evaluate, save, or end.
            self.step, self.clean = step, True
            to_evaluate = evaluate and (step % self.config.eval_every == 0 or step == total)
            self.evaluated = not to_evaluate
            self.safe_point()
            if to_evaluate:
                evaluate(step)
                self.evaluated = True
            if step == total or self.problem or due(step, save_every):
                self._save(last=step == total)
            if self.any_rank(bool(self.problem)):
                raise Fault(self.problem or "another rank had to stop")
            if step == total:
                break

            self.clean = True
            yield step
            # To look which steps were skipped is to wait for the device, so it is done where there is a wait
            # anyway.
            if self.time_to_log(step) or due(step + 1, save_every):
                self._report_skipped()
            self.bar.update()
        self.bar.close()
        if self.main:
            write_json(self.out / "run.json", self.about | {"finished_after": total})

    def time_to_log(self, step):
        return step % self.config.log_every == 0 or step + 1 == self.total

    def log(self, step, metrics, show):
        """Append metrics after so many steps to metrics.jsonl; those named in `show` go on the bar.

        metrics: {name: float or one-element tensor}, the same on all ranks.
        """
        row = {"step": step}
        for name, metric in metrics.items():
            value = float(metric)
            # JSON has no other numbers.
            if math.isfinite(value):
                row[name] = value
        name = self.best.removeprefix("-")
        if name in row:
            value = -row[name] if self.best.startswith("-") else row[name]
            self.value = (step, value)
        if not self.main:
            return
        self.metrics.write(row, self.say)
        for name in show:
            if name in row:
                self.shown[name] = (row[name], step)
        text = self._shown_text(step)
        self.bar.set_postfix_str(text, refresh=False)
        waited = time.time() - self.last_line > 10
        if self.bar.disable and (waited or is_evaluation(row) or step == self.total):
            self.last_line = time.time()
            self.say(f"step {step}/{self.total}  {text}  {time.time() - self.began:.0f} s")

    def _shown_text(self, step):
        """The numbers on the bar after a step."""
        words = []
        for name, (value, measured) in self.shown.items():
            word = f"{name} {value:.4g}"
            # What was measured after another step, as the last evaluation was, says after which.
            if measured != step:
                word += f" (step {measured})"
            words.append(word)
        return "  ".join(words)

    # -- saving

    def _save(self, last):
        """Write a checkpoint; all ranks together.

        If it can't be written, that is a Fault when there will be no other chance (last).
        """
        if self.saved == self.step:
            return
        # Writing may evaluate, and that must not stop in order to save.
        self.clean = False
        tensors = training_state(self.modules, self.optimizers)
        self._require_finite(tensors)
        for part in self._parts_of_save(tensors):
            problem = try_to(part)
            # The ranks agree after each part, so that none waits for one that has failed.
            if self.any_rank(bool(problem)):
                self._save_failed(problem, last)
                return
        self.saved = self.step
        if self.main:
            self.metrics.flush(self.say)

    def _require_finite(self, tensors):
        """Fault if any of {name: tensor} is not finite on any rank: such a checkpoint is worth nothing."""
        broken = [name for name, tensor in tensors.items() if not local(tensor).isfinite().all()]
        if self.any_rank(bool(broken)):
            names = ", ".join(broken[:3]) or "something"
            raise Fault(self.problem or f"step {self.step}: {names} is not finite, so nothing was saved; "
                                        "lower the learning rate, or look at the data")

    def _parts_of_save(self, tensors):
        """What a save consists of: functions to be called one after another, as many on all ranks."""
        folder = self.checkpoints.writing(self.step)
        scalers = {}
        for name, optimizer in self.optimizers.items():
            if optimizer in self.scalers:
                scalers[name] = self.scalers[optimizer].state_dict()
        state = self.about | {"version": VERSION, "step": self.step, "evaluated": self.evaluated,
                              "extra": self.state, "scalers": scalers}
        measured, value = self.value
        if measured != self.step:
            value = None

        def begin():
            if self.main:
                self.checkpoints.begin(self.step)

        def finish():
            if not self.main:
                return
            write_json(folder / "state.json", state)
            if self.mesh is None:
                write_tensors(folder / "training.safetensors", tensors, {"format": "pt"})
            self.checkpoints.publish(self.step, value)

        parts = [begin]
        if self.mesh is not None:
            parts.append(functools.partial(save_shards, tensors, folder / "shards"))
        for name, write in self.models.items():
            parts.append(functools.partial(write, folder / name))
        parts.append(finish)
        return parts

    def _save_failed(self, problem, last):
        """Delete the part of a checkpoint that was written, and say why there is no whole one."""
        if self.main:
            self.checkpoints.discard(self.checkpoints.writing(self.step))
        need = bytes_needed(self.modules, self.optimizers)
        free = shutil.disk_usage(self.out).free
        text = (f"the checkpoint of step {self.step} can't be written to {self.checkpoints.root} "
                f"({problem or 'on another rank'}): it takes about {need:,} bytes, {free:,} are free; "
                "the one before is untouched")
        if last:
            raise Fault(text)
        self.say(f"warning: {text}. Training goes on")

    # -- resuming

    def _restore(self):
        """Go on from the newest whole checkpoint, if there is one. A finished run without one ends here."""
        total = self.total
        folder, state = self._from_main(functools.partial(self.checkpoints.newest, self.say))
        if folder is None:
            state = self._state_without_checkpoint()
            if state is None:
                return
        else:
            require(folder.is_dir(), f"--resume: rank {self.rank} does not find {folder}; "
                                     "--out must lie on a disk that all nodes share")
        changed = changed_settings(self.config, self.inputs, state)
        self._refuse(changed)
        if folder is None:
            self.say(f"{self.out}: this run is complete ({total} steps)")
            raise SystemExit(0)
        require(state["step"] <= total,
                f"--resume: the run in {self.out} is at step {state['step']}, beyond {total}")

        news = list(changed.values())
        if state["world_size"] != self.world_size:
            news.append(f"{state['world_size']} processes, now {self.world_size}")
        if news:
            self.say("going on with other settings: " + "; ".join(news))

        self._load(folder)
        for name, optimizer in self.optimizers.items():
            if self.dtype == torch.float16 and name in state["scalers"]:
                self._scaler(optimizer).load_state_dict(state["scalers"][name])
        self.step = state["step"]
        # One that was saved before its evaluation is saved once more after it.
        self.saved = self.step if state["evaluated"] else None
        self.state.update(state["extra"])
        self.say(f"resumed {self.out} after step {self.step}")

    def _state_without_checkpoint(self):
        """What run.json says of a finished run without checkpoints; None where a run is to begin."""
        state = self._from_main(functools.partial(read_state, self.out / "run.json"))
        done, total = state.get("finished_after"), self.total
        model = self._from_main(functools.partial(holds_model, self.out))
        require(done or not model,
                f"--resume: {self.out} holds a model, but its checkpoints/ is gone, and it can't go on "
                "without; name another --out, or begin anew with --overwrite")
        if not model:
            return None
        require(done == total,
                f"--resume: the run in {self.out} is complete after {done} steps; for {total} it needs "
                f"its checkpoints/, which is gone; start another one with --model {self.out}")
        return state

    def _refuse(self, changed):
        """UserError if settings have changed that may not. changed: {flag: one line}."""
        shapes = [line for name, line in changed.items() if name in SHAPE_FLAGS]
        require(not shapes, f"--resume: the run in {self.out} has another model: {'; '.join(shapes)}; "
                            "name another --out")
        require(not changed or self.config.override,
                f"--resume: since the run in {self.out} began, {'; '.join(changed.values())}; "
                "name another --out, or accept it with --override")

    def _load(self, folder):
        """Read the training state of a checkpoint; a UserError if it is that of another run."""
        try:
            with torch.no_grad():
                load_into(training_state(self.modules, self.optimizers), folder)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise UserError(f"--resume: {folder} does not fit this run ({one_line(error)}); "
                            "name another --out") from None
