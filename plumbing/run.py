"""Plumbing, and nothing that can change an objective: device and precision, ranks, optimiser steps, metrics, signals, resuming.

Randomness: no generator state is ever stored. Every random draw of a run is seeded from (seed, step), dropout's from the rank too,
when the step begins, so a resumed run draws what the uninterrupted one would have drawn.
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

from plumbing.checkpoints import VERSION, Checkpoints, fill, room, save_shards, training_state
from plumbing.disk import RUN_FILES, digest, model_digest, tokenizer_digest, write_json, write_tensors
from plumbing.flags import (
    DATA_FLAGS, MODEL_FLAGS, PLUMBING, SCRATCH_FLAGS, SHAPE_FLAGS, UserError, as_list, parse_flags,
    parse_sources, require)
from plumbing.hardware import autocast, keep_heap, pick_device, pick_dtype
from plumbing.metrics import Metrics, check_boards
from plumbing.ranks import local
from plumbing.steps import Optimizing


def today():
    """What a chat template that asks for the date is told: when the run of this process began, outside of one now."""
    if Run.current is None:
        return datetime.datetime.now()
    return datetime.datetime.fromisoformat(Run.current.date)


class Fault(Exception):
    """Something that went wrong under way: shown as one line, exit code 1."""


def run_script(main, config_class, description, argv=None):
    """Parse flags, call main(config); end in one line and exit code 2 for a UserError, 1 for a fault."""
    # A letter that the console lacks (PYTHONIOENCODING=gbk) is no reason to end.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    atexit.register(flush_output)
    config, code = parse_flags(config_class, description, argv), 0
    try:
        main(config)
    except (KeyboardInterrupt, SystemExit) as stopped:
        code = (stopped.code or 0) if isinstance(stopped, SystemExit) else fail("interrupted", 130)
    except Exception as error:
        # Nobody reads on (| head): a program ends then, by SIGPIPE. (A training run trains on, see `say`.)
        if isinstance(error, BrokenPipeError) and Run.current is None:
            sys.exit(128 + signal.SIGPIPE)
        message = explain(error, config)
        if config.debug or (not message and not dist.is_initialized()):
            raise
        code = 2 if isinstance(error, UserError) else 1
        fail(message, code, isinstance(error, (UserError, Fault))) if message else traceback.print_exc()
    if dist.is_initialized():  # its threads are still alive, and one that runs while Python shuts down aborts the process
        if code == 0:  # else others may be gone, and would be waited for
            dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def flush_output():
    """Write out what was printed. That nobody reads it (| head) is worth no traceback and no exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            # Python flushes once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def explain(error, config):
    """One line for an error that the user should understand; "" for any other."""
    text, run = str(error), Run.current
    if isinstance(error, (UserError, Fault)):
        return text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
        knobs = {"micro_batch_tokens": "lower --micro-batch-tokens (now {})", "rollout_rows": "bound --rollout-rows (now {})",
                 "checkpoint_activations": "add --checkpoint-activations", "lora_rank": "train adapters alone (--lora-rank 16)"}
        advice = [knob.format(getattr(config, flag)) for flag, knob in knobs.items() if hasattr(config, flag)]
        return f"out of memory{' in ' + run.doing if run else ''}; {', '.join(advice) or 'take a smaller model, or fewer prompts at once'}"
    if "No working C++ compiler" in text:
        return "--compile needs a C++ compiler (g++, or what CXX names), and there is none that works; install one, or leave out --compile"
    if run and run.world_size > 1 and re.search("gloo|nccl|timed? ?out|connection|broken pipe|process group", text, re.I):
        return run.blame()
    return ""


def fail(message, code, shared=True):
    """Say why this process ends; what all ranks say (shared), once per machine."""
    if not shared or os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(BrokenPipeError):
            print(f"error: {message}", file=sys.stderr)
    return code


# ---------------------------------------------------------------------------------------------------------
# A run: one output folder, one or more processes

def read_state(path):
    """What run.json, or the state.json of a checkpoint, says; {} if it can't be read."""
    try:
        state = json.loads(path.read_bytes())
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def changed_settings(config, inputs, state):
    """{flag: one line} for what has changed since the run began. inputs: {flag: [{file: SHA-256}, ...]}."""
    changed, before = {}, state.get("config", {})
    for name, value in dataclasses.asdict(config).items():
        flag = "--" + name.replace("_", "-")
        now = inputs.get(name, [])
        then = state.get("inputs_sha256", {}).get(name, now)  # an older version did not look at all of them
        if name not in PLUMBING and before.get(name) != value:
            changed[name] = f"{flag} was {before.get(name)}, is now {value}"
        elif then != now:
            changed[name] = f"what {flag} names has changed"
    return changed


class Alone:
    """What sampling and scoring ask of a run, for a script that trains nothing: one process, no folder, no signals."""
    rank, world_size, step = 0, 1, 0

    def __init__(self, device, dtype):
        self.device, self.dtype, self.doing = device, dtype, ""

    def autocast(self):
        return autocast(self.device, self.dtype)

    def gathered(self, module):
        return contextlib.nullcontext()

    def all_max(self, tensor):
        return tensor

    def passes(self, pieces):
        return pieces

    def asked_to_stop(self):
        return False

    def safe_point(self):
        pass


class Run(Optimizing):
    """Where and how a training script runs: device, ranks, output folder, metrics, signals, checkpoints.

    Attributes: device, dtype, out (Path), step (how many are done), and those of `Ranks`.
    """
    current = None  # the one of this process

    def __init__(self, config, reads=None):
        """reads: {flag: what it names}, where that is not what the configuration says."""
        super().__init__()
        Run.current = self
        self.reads = reads or {}
        self.config, self.out, self.checkpoints = config, Path(config.out), Checkpoints(config.out)
        self.step, self.saved, self.doing = 0, None, "loading"  # saved: the step of the checkpoint that is there
        self.evaluated = True  # unless this step's evaluation is still to come
        self.lock = None
        self.stop_signal, self.signalled, self.bar, self.shown, self.last_line, self.value = None, 0.0, None, {}, 0.0, (None, None)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device, 0)  # until `begin` knows the models
        sharded = config.parallel == "fsdp"
        require(not sharded or (self.device.type != "mps" and self.dtype != torch.float16), "--parallel fsdp needs --device cuda or cpu, and --dtype bfloat16 or float32")
        if config.threads:
            torch.set_num_threads(config.threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        self._check_out()
        if self.main:
            check_boards(config)
        self.join(sharded, config.rank_timeout)
        # A chat template may write the date: the beginning's, or a run resumed another day had other ids.
        self.date = self._from_main(self._find_date)
        self.say(f"{Path(sys.argv[0]).name}: {self.device}, {self.world_size} process(es), output in {self.out}")

    def _check_out(self):
        out, config = self.out, self.config
        require(not (config.resume and config.overwrite), "--resume and --overwrite exclude each other")
        require(config.resume or not config.override, "--override is for --resume")
        require(not out.exists() or out.is_dir(), f"--out {out} is a file; name a folder")
        there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        require(os.access(there, os.W_OK), f"--out {out}: {there} is read-only")
        model = any((out / name).exists() for name in ("config.json", "adapter_config.json"))
        run = (out / "metrics.jsonl").exists() or (out / "run.json").exists()
        require(not (model or run) or config.resume or config.overwrite,
                f"--out {out} already holds a run; add --resume to go on with it, --overwrite to replace it, or name another folder")
        for flag in ("model", "reward"):
            for folder in self._named(flag):
                ours = (out.resolve(), (out / "ema").resolve(), *(out / "checkpoints").resolve().glob("*"))
                require(not config.overwrite or Path(folder).resolve() not in ours, f"--overwrite would delete the --{flag} {folder}")
        require(config.lora_save == "merged" or (config.lora_rank > 0 and config.model != "scratch"), "--lora-save adapter needs a --lora-rank above 0 and a --model to adapt")
        require(not config.resume or not model or run, f"--resume: {out} holds a model, but no run to go on with; name another --out")
        if run and self.main:
            self._lock()

    def _named(self, flag):
        """The files or folders that a flag names."""
        return self.reads.get(flag) or as_list(getattr(self.config, flag, ""))

    def _lock(self):
        """Keep other processes from writing to the output folder, as long as this one lives."""
        if self.lock:
            return
        try:
            self.lock = open(self.out / ".lock", "a")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.out}: another process writes to it; wait for that one, or name another folder") from None
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
        states = [self.checkpoints.root / name / "state.json" for name in self.checkpoints.all()]
        for path in [*states, self.out / "run.json"] if self.config.resume else []:
            with contextlib.suppress(ValueError, TypeError):
                date = read_state(path).get("date")
                datetime.datetime.fromisoformat(date)
                return date
        return datetime.datetime.now().isoformat(timespec="seconds")

    def say(self, text):
        """Print on rank 0, without breaking the progress bar. What can't be printed (to a file on a full disk) must not end the run."""
        if self.main:
            with contextlib.suppress(OSError):
                tqdm.write(text)
                sys.stdout.flush()

    def begin(self, modules, optimizers, models, best="", steps=None):
        """Restore the run if --resume finds one, then open the output folder; called once every input has been checked.

        modules, optimizers: {name: what training changes}. models: {"": f}, where f(folder) writes the trained model to a folder,
        on all ranks together; more of them under the names of subfolders. best: name of the metric whose best checkpoint is kept,
        after a minus if low is good. Returns (steps done, state): state is a dict of JSON values that is saved and restored, for the script to fill.
        steps: of the whole run, where --steps does not say it.
        """
        self.modules, self.optimizers, self.models, self.best = modules, optimizers, models, best
        self.total = steps or self.config.steps
        self.parameter_names = {p: f"{owner}.{name}" for owner, module in modules.items() for name, p in module.named_parameters()}
        self.dtype = pick_dtype(self.config.dtype, self.device, max(module.config.n_embd for module in modules.values()))
        named = {flag: self._named(flag) for flag in (*DATA_FLAGS, *MODEL_FLAGS)}
        self.inputs = {flag: [model_digest(folder) for folder in named[flag]] for flag in MODEL_FLAGS}
        self.inputs["tokenizer"] = [tokenizer_digest(self.config.tokenizer)]
        for flag in DATA_FLAGS:
            self.inputs[flag] = [digest(path for path, _ in parse_sources(spec)) for spec in named[flag]]
        self.state = {}
        if self.config.resume:
            self._restore()
        config, defaults = dataclasses.asdict(self.config), dataclasses.asdict(type(self.config)())
        unsaid = PLUMBING | (set(SCRATCH_FLAGS) if self.config.model != "scratch" else set())
        self.say("settings: " + ", ".join(f"{k}={v}{'*' if v != defaults[k] else ''}" for k, v in config.items()
                                          if k not in unsaid) + f"  (* not the default), products in {str(self.dtype)[6:]}")
        self.about = {
            "script": Path(sys.argv[0]).name, "config": config, "inputs_sha256": self.inputs, "torch": torch.__version__, "world_size": self.world_size,
            "python": platform.python_version(), "machine": platform.machine(), "device": str(self.device),
            "date": self.date}
        self.finished = False
        if self.main:
            try:
                self._open()
            except OSError as error:
                raise UserError(f"--out {self.out} can't be written: {error.strerror}") from None
        keep_heap()  # what loading took for a moment is free by now
        self.began = time.time()
        return self.step, self.state

    def _open(self):
        """Make the output folder ready: room, no old run, run.json, metrics.jsonl without the rows that a killed run logged after its last checkpoint."""
        self.checkpoints.root.mkdir(parents=True, exist_ok=True)
        self._lock()
        held = sum(path.stat().st_size for path in self.checkpoints.root.rglob("*") if path.is_file())
        need, free = room(self.modules, self.optimizers) * (4 if self.config.save_every else 1) - held, shutil.disk_usage(self.checkpoints.root).free
        require(need <= free, f"--out {self.out} has {free:,} bytes free, but its checkpoints will take up to {need:,} more (two, the best, and one being written); "
                "free some, or name a folder on another disk")
        if self.config.overwrite:
            self.checkpoints.clear()
            for name in RUN_FILES:
                (self.out / name).unlink(missing_ok=True)
        if self.step:
            self.checkpoints.link(self.checkpoints.root / f"step_{self.step:06d}")
        path = self.out / "run.json"
        self.finished = read_state(path).get("finished_after") == self.step > 0
        write_json(path, self.about | ({"finished_after": self.step} if self.finished else {}))
        self.metrics = Metrics(self.config, self.step, self.finished)

    # -- randomness, ranks, precision

    def seed_step(self, step):
        """Seed PyTorch for one step, differently on each rank, and return a generator on the device that draws the same on all ranks."""
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
        """Yield the pieces of one optimiser step, or of an evaluation; DDP exchanges gradients of these modules on the last one only.

        pieces: [(examples, weight)]; more: others follow in this step, so that there is nothing to exchange yet.
        (FSDP does on each: keeping those of whole blocks would take the memory that shards save.)
        """
        for i, piece in enumerate(pieces):
            self.safe_point()
            self.doing = f"step {self.step + 1}, pass {i + 1} of {len(pieces)} (of {len(piece[0])} examples)"
            for module in modules:
                module.require_backward_grad_sync = not more and i == len(pieces) - 1
            yield piece

    # -- the loop

    def asked_to_stop(self):
        """Whether this rank has been sent a signal. Before what it cuts short is used, `safe_point` must be passed."""
        return self.stop_signal is not None

    def _on_signal(self, number, frame):
        now = time.monotonic()
        if self.stop_signal and (self.world_size == 1 or now - self.signalled > 1):  # torchrun may send the terminal's a second time
            os._exit(128 + number)
        if not self.stop_signal and self.main:  # print would not be safe here: the signal may have come in the middle of one
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping as soon as nothing is lost; once more stops at once\n")
        self.stop_signal, self.signalled = number, now

    def safe_point(self):
        """Save and end the process if any rank has been asked to: where nothing that is saved has changed since the step began. All ranks come by equally often."""
        if self.clean and self.any_rank(self.asked_to_stop()):
            self._save(last=True)
            self.bar.close()
            self.say(f"stopped after step {self.step} of {self.total}; the same command with --resume goes on")
            raise SystemExit(128 + (self.stop_signal or signal.SIGTERM))

    def steps(self, first, total, evaluate=None):
        """Yield step numbers from first to total - 1 under a progress bar; saves what is due, calls evaluate(steps done) before and after.

        Ends the process after a stop signal, or when too many steps had to be skipped.
        """
        if self.any_rank(self.finished and first == total):
            self.say(f"{self.out}: this run is complete ({total} steps)")
            return
        self.total, every = total, self.config.save_every
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._on_signal)
        self.bar = tqdm(total=total, initial=first, disable=not (self.main and sys.stderr.isatty()), dynamic_ncols=True)
        for step in range(first, total + 1):
            self.step, self.clean = step, True
            self.evaluated = not evaluate or (step % self.config.eval_every > 0 and step < total)
            self.safe_point()
            if not self.evaluated:
                evaluate(step)
                self.evaluated = True
            if step == total or self.problem or (every > 0 and step > 0 and step % every == 0):
                self._save(last=step == total)
            if self.any_rank(bool(self.problem)):
                raise Fault(self.problem or "another rank had to stop")
            if step < total:
                self.clean = True
                yield step
                if self.time_to_log(step) or (every > 0 and (step + 1) % every == 0):
                    self._look()
                self.bar.update()
        self.bar.close()
        if self.main:
            write_json(self.out / "run.json", self.about | {"finished_after": total})

    def time_to_log(self, step):
        return step % self.config.log_every == 0 or step + 1 == self.total

    def log(self, step, metrics, show):
        """Append metrics (floats or one-element tensors, the same on all ranks) after so many steps to metrics.jsonl; `show` goes on the bar."""
        row = {"step": step, **{k: float(v) for k, v in metrics.items()}}
        row = {k: v for k, v in row.items() if math.isfinite(v)}  # JSON has no other numbers
        name = self.best.lstrip("-")
        if name in row:
            self.value = step, -row[name] if self.best[0] == "-" else row[name]
        if not self.main:
            return
        self.metrics.write(row, self.say)
        self.shown |= {k: (row[k], step) for k in show if k in row}
        # What was measured after another step, as the last evaluation was, says after which.
        text = "  ".join(f"{k} {v:.4g}" + f" (step {at})" * (at != step) for k, (v, at) in self.shown.items())
        self.bar.set_postfix_str(text, refresh=False)
        due = time.time() - self.last_line > 10 or any(k.startswith("val_") for k in row) or step == self.total
        if self.bar.disable and due:
            self.last_line = time.time()
            self.say(f"step {step}/{self.total}  {text}  {time.time() - self.began:.0f} s")

    # -- resuming

    def _save(self, last):
        """Write a checkpoint; all ranks together. If it can't be written, that is a Fault when there will be no other chance."""
        if self.saved == self.step:
            return
        self.clean, problem, tensors = False, "", training_state(self.modules, self.optimizers)  # not clean: writing may evaluate, which must not stop to save
        broken = [name for name, tensor in tensors.items() if not local(tensor).isfinite().all()]
        if self.any_rank(bool(broken)):
            raise Fault(self.problem or f"step {self.step}: {', '.join(broken[:3]) or 'something'} is not finite, so nothing was saved; lower the learning rate, or look at the data")
        folder, value = self.checkpoints.writing(self.step), self.value[1] if self.value[0] == self.step else None
        state = self.about | {"version": VERSION, "step": self.step, "evaluated": self.evaluated, "extra": self.state,
                              "scalers": {name: self.scalers[o].state_dict() for name, o in self.optimizers.items() if o in self.scalers}}

        def finish():
            write_json(folder / "state.json", state)
            if self.mesh is None:
                write_tensors(folder / "training.safetensors", tensors, {"format": "pt"})
            self.checkpoints.publish(self.step, value)

        work = [functools.partial(self.checkpoints.begin, self.step)] if self.main else [bool]  # bool(): nothing to do
        if self.mesh is not None:
            work.append(functools.partial(save_shards, tensors, folder / "shards"))
        work += [functools.partial(write, folder / name) for name, write in self.models.items()] + [finish if self.main else bool]
        for part in work:  # the ranks agree after each, so that none waits for one that has failed
            try:
                part()
            except (OSError, SafetensorError, UserError) as error:  # UserError: a weight is not finite
                problem = " ".join(str(error).split())[:200]
            if self.any_rank(bool(problem)):
                break
        else:
            self.saved = self.step
            if self.main:
                self.metrics.flush(self.say)
            return
        if self.main:
            self.checkpoints.discard(folder)
        text = (f"the checkpoint of step {self.step} can't be written to {self.checkpoints.root} ({problem or 'on another rank'}): "
                f"it takes about {room(self.modules, self.optimizers):,} bytes, {shutil.disk_usage(self.out).free:,} are free; the one before is untouched")
        if last:
            raise Fault(text)
        self.say(f"warning: {text}. Training goes on")

    def _restore(self):
        """Go on from the newest whole checkpoint, if there is one. A finished run without one ends here."""
        folder, state = self._from_main(functools.partial(self.checkpoints.newest, self.say))
        if folder is None:
            state = self._from_main(functools.partial(read_state, self.out / "run.json"))
            done, steps = state.get("finished_after"), self.total
            names = ("config.json", "adapter_config.json")
            model = self._from_main(lambda: any((self.out / name).exists() for name in names))
            require(done or not model,
                    f"--resume: {self.out} holds a model, but its checkpoints/ is gone, and it can't go on "
                    "without; name another --out, or begin anew with --overwrite")
            if not model:
                return
            require(done == steps,
                    f"--resume: the run in {self.out} is complete after {done} steps; for {steps} it needs "
                    f"its checkpoints/, which is gone; start another one with --model {self.out}")
        else:
            require(folder.is_dir(), f"--resume: rank {self.rank} does not find {folder}; "
                                     "--out must lie on a disk that all nodes share")
        changed = changed_settings(self.config, self.inputs, state)
        shapes = [text for k, text in changed.items() if k in SHAPE_FLAGS]
        require(not shapes, f"--resume: the run in {self.out} has another model: {'; '.join(shapes)}; name another --out")
        require(not changed or self.config.override, f"--resume: since the run in {self.out} began, {'; '.join(changed.values())}; name another --out, or accept it with --override")
        if folder is None:
            self.say(f"{self.out}: this run is complete ({steps} steps)")
            raise SystemExit(0)
        require(state["step"] <= self.total,
                f"--resume: the run in {self.out} is at step {state['step']}, beyond {self.total}")
        if changed or state["world_size"] != self.world_size:
            self.say("going on with other settings: " + "; ".join([*changed.values(), *[f"{state['world_size']} processes, now {self.world_size}"] * (state["world_size"] != self.world_size)]))
        try:
            with torch.no_grad():
                fill(training_state(self.modules, self.optimizers), folder)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise UserError(f"--resume: {folder} does not fit this run ({' '.join(str(error).split())[:200]}); name another --out") from None
        for name, optimizer in self.optimizers.items():
            if self.dtype == torch.float16 and name in state["scalers"]:
                self._scaler(optimizer).load_state_dict(state["scalers"][name])
        self.step = state["step"]
        self.saved = self.step if state["evaluated"] else None
        self.state.update(state["extra"])
        self.say(f"resumed {self.out} after step {self.step}")
