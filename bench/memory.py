"""How much memory does each stage need, and what does each switch save? Random weights in the shapes of real
models.

    python bench/memory.py                                    all stages at 135M, 0.5B, 1.5B: an hour on
                                                              2 free cores with 24 GB
    python bench/memory.py --sizes 135M --stages sft ppo      two stages at one size

Every number is one run of sft.py, reward.py, dpo.py or ppo.py by its own flags in a process of its own: two
optimiser steps of --tokens tokens (so that the second has Adam's moments from the start), for ppo a rollout
of as many tokens with two updates.
    CPU   the most memory that the process had resident, Python and PyTorch included (0.3 GiB)
    CUDA  torch.cuda.max_memory_allocated (without the CUDA context and what the allocator holds in reserve)
from the moment that all models are loaded to the end of the last optimiser step. Where loading them took
more, that stands beside it (on a CPU the pages of the weights' file count, which the system can take back);
with --saving also what the checkpoint took. What is predicted not to fit into the memory that is free on a
CPU is not started: a machine that swaps is of no use.

The model folders (bfloat16, 4.4 GB for the three sizes) are made once in --out. The table is printed, and
goes to bench/RESULTS.md if it is of all stages (and not of the trial size).
"""
import contextlib
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import torch
from safetensors.torch import save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from formats.families import architecture_of, to_stored  # noqa: E402
from formats.model_folder import read_config  # noqa: E402
from formats.tokenizer import Tokenizer  # noqa: E402
from head import LOGITS_AT_ONCE  # noqa: E402
from model import GPT, ScalarModel  # noqa: E402
from plumbing.disk import write_json  # noqa: E402
from plumbing.flags import Count, Natural, parse_flags, require  # noqa: E402
from plumbing.hardware import pick_device  # noqa: E402
from plumbing.run import Run, run_script  # noqa: E402

GIB = 1 << 30
# Left to others when a run is started.
SPARE = GIB // 2

COMMON = {"hidden_act": "silu", "tie_word_embeddings": True, "max_position_embeddings": 8192}
QWEN2 = COMMON | {"model_type": "qwen2", "rms_norm_eps": 1e-6}
# The config.json of each size.
SIZES = {
    # Of nothing, for a trial.
    "tiny": QWEN2 | {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
        "vocab_size": 8192,
        "rope_theta": 1e4,
    },
    # Of SmolLM2-135M.
    "135M": COMMON | {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
    },
    # Of Qwen2.5-0.5B.
    "0.5B": QWEN2 | {
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "rope_theta": 1e6,
    },
    # Of Qwen2.5-1.5B.
    "1.5B": QWEN2 | {
        "num_hidden_layers": 28,
        "hidden_size": 1536,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "rope_theta": 1e6,
    },
}

CHECKPOINT = "--checkpoint-activations"
LORA = "--lora-rank 16"
OPTIONS = ("", CHECKPOINT, LORA, f"{CHECKPOINT} {LORA}")
# For ppo; with adapters nothing frozen is of its own, see there.
FROZEN = ("--frozen-dtype bfloat16", f"{CHECKPOINT} --frozen-dtype bfloat16")
FROZEN_ON_CPU = ("--frozen-device cpu", f"{CHECKPOINT} --frozen-device cpu")
STAGES = ("sft", "reward", "dpo", "ppo")
NEW_TOKENS = 32  # of a reply that ppo samples


@dataclass
class Config:
    # of the models (default: 135M 0.5B 1.5B; tiny is for a trial)
    sizes: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)  # scripts to measure (default: sft reward dpo ppo)
    tokens: Count = 1024  # per optimiser step
    row: Annotated[int, ">= 64"] = 256  # tokens of a row, prompt and reply
    # folder for models, data and results.json
    out: str = os.path.join(tempfile.gettempdir(), "barerlhf-memory")
    saving: bool = False  # let the runs save as well: slow, and it takes as many GB of disk
    resume: bool = False  # take what results.json in --out has from before (skipped runs are tried again)
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto takes the first of cuda, cpu that works
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    debug: bool = False  # show the traceback of an error


# ---------------------------------------------------------------------------------------------------------
# Models and data

def make_models(folder, header):
    """Write folder/policy and folder/reward, random weights in bfloat16. header: what config.json says.

    Each layer is a shard, so that little memory is needed.
    """
    generator = torch.Generator().manual_seed(0)
    for kind, name in ((GPT, "policy"), (ScalarModel, "reward")):
        here = folder / name
        index = here / "model.safetensors.index.json"
        if index.exists():
            continue
        here.mkdir(parents=True, exist_ok=True)
        # A token per character.
        Tokenizer("bytes", r"[\s\S]", {bytes([b]): b for b in range(256)}).save(here)
        architecture = architecture_of(header["model_type"], kind)
        write_json(here / "config.json", header | {"architectures": [architecture]})
        stored = shapes(here, kind)
        shards = shards_of(stored)
        for file, keys in shards.items():
            trunk = folder / "policy" / file
            if kind is ScalarModel and trunk.exists():
                # The trunk is the same.
                (here / file).unlink(missing_ok=True)
                (here / file).symlink_to(Path("..") / "policy" / file)
                continue
            tensors = {key: random_tensor(key, stored[key].shape, generator) for key in keys}
            save_file(tensors, here / file, {"format": "pt"})
        # Last: where it is, the rest is.
        write_json(index, {"weight_map": {key: file for file, keys in shards.items() for key in keys}})


def shards_of(names):
    """{file: names of its tensors}: one file for each layer, and for each tensor outside of the layers."""
    shards = {}
    for name in names:
        layer = re.search(r"layers\.(\d+)\.", name)
        stem = f"layer-{layer[1]}" if layer else name
        shards.setdefault(f"{stem}.safetensors", []).append(name)
    return shards


def shapes(folder, kind):
    """{stored name: meta tensor} of the model that a folder's config.json describes."""
    config, _ = read_config(folder)
    with torch.device("meta"):
        return to_stored(kind(config).state_dict(), config)


def random_tensor(name, shape, generator):
    if len(shape) > 1:
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    return torch.ones(shape, dtype=torch.bfloat16)


def write_rows(out, config):
    """Write rows.jsonl (pairs of replies, of which sft takes the chosen one) and prompts.jsonl.

    A prompt with its reply is exactly --row tokens long, control tokens included.
    """
    letters = torch.Generator().manual_seed(0)
    number = 2 * config.tokens // config.row

    def text(length):
        drawn = torch.randint(26, (length,), generator=letters).tolist()
        return "".join(chr(97 + i) for i in drawn)

    prompt = config.row // 2 - 2
    reply = config.row - config.row // 2 - 1
    rows, prompts = [], []
    for _ in range(number):
        rows.append({"prompt": text(prompt), "chosen": text(reply), "rejected": text(reply)})
    for _ in range(number):
        prompts.append({"prompt": text(config.row - NEW_TOKENS - 2)})
    for name, lines in (("rows", rows), ("prompts", prompts)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def command(stage, size, options, config, out, device):
    """The flags of a run."""
    models = f"{out}/{size}"
    tokens = config.tokens
    flags = (f"--device {device} --threads {config.threads} --model {models}/policy "
             f"--micro-batch-tokens {tokens} --val-fraction 0 --lr 1e-6 --warmup 1")
    if stage == "ppo":
        flags += (f" --data {out}/prompts.jsonl --reward {models}/reward"
                  f" --rollout-batch {tokens // config.row} --max-new-tokens {NEW_TOKENS}"
                  " --steps 1 --epochs 2 --minibatches 1 --critic-lr 1e-6")
    else:
        flags += f" --data {out}/rows.jsonl --batch-tokens {tokens} --steps 2"
    return f"{flags} {options}"


# ---------------------------------------------------------------------------------------------------------
# Measuring: in the child

def peak(device):
    """The most bytes used since `forget`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Unlike getrusage, which hands a parent's peak down to its children.
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) << 10
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def forget(device):
    """Begin a new peak at what is used now.

    Where the system can't, `peak` goes on from the start of the process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def child(stage, saving, words):
    """Run a script's main; print {phase: peak in bytes} as the last line, or {} if memory ran out."""
    # Should memory run out, let it be this process that is killed.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    script = importlib.import_module(stage)
    config = parse_flags(script.Config, "", words)
    device = pick_device(config.device)
    begin, save = Run.begin, Run._save
    peaks = {}

    def loaded(run, *args, **named):
        result = begin(run, *args, **named)
        peaks["loading"] = peak(device)
        forget(device)
        return result

    def saved(run, last):
        peaks["training"] = peak(device)
        if not saving:
            raise SystemExit
        forget(device)
        save(run, last)

    watched = mock.patch.multiple(Run, begin=loaded, _save=saved)
    try:
        with watched, contextlib.suppress(SystemExit):
            script.main(config)
        if saving:
            peaks["saving"] = peak(device)
    except (torch.OutOfMemoryError, MemoryError):
        peaks = {}
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        peaks = {}
    print(json.dumps(peaks))


# ---------------------------------------------------------------------------------------------------------
# In the parent

def memory(device):
    """(all, free) bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, None
    info = Path("/proc/meminfo")
    if info.exists():
        values = dict(re.findall(r"(\w+):\s+(\d+) kB", info.read_text()))
        return int(values["MemTotal"]) << 10, int(values["MemAvailable"]) << 10
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages, pages


def predicted(stage, size, options, config, out):
    """About how many bytes a run takes on a CPU, in float32.

    Counted are weights, gradients, Adam's moments, and what the backward pass needs.
    """
    h = SIZES[size]
    P = sum(p.numel() for p in shapes(out / size / "policy", GPT).values())
    C = h["hidden_size"]
    I = h["intermediate_size"]
    V = h["vocab_size"]
    layers = h["num_hidden_layers"]
    D = C // h["num_attention_heads"]
    lora = LORA in options

    trained = P
    if lora:
        # In plus out of a block's matrices.
        sides = (2 * C + 2 * h["num_key_value_heads"] * D, 2 * C, C + 2 * I, I + C)
        trained = 16 * sum(sides) * layers
    # Weights and moments, and what comes with the backward pass.
    still = 4 * P + 8 * trained
    gradients = 4 * trained

    # What a block keeps for the backward pass.
    block = 4 * config.tokens * (14 * C + 4 * I)
    if CHECKPOINT in options:
        kept = 4 * config.tokens * C * layers + block
    else:
        kept = block * layers
    if stage != "reward":
        kept += 4 * min(LOGITS_AT_ONCE, config.tokens // 2 * V)
        if not lora:
            # The embedding is the head too, so its gradient comes in two parts.
            kept += 2 * 4 * C * V
    total = still + max(kept, gradients)

    if stage == "ppo":
        # The critic; and reference and reward model, which have weights of their own.
        total += still + gradients
        if not lora:
            total += 2 * P * (2 if "bfloat16" in options else 4)
    if stage == "reward" or (stage == "dpo" and not lora):
        # Two copies for a moment.
        total = max(total, 8 * P)
    if config.saving:
        # A copy of weights and moments, and two more as bytes.
        total = max(total, 4.4 * still * (2 if stage == "ppo" else 1))
    return total + 0.35 * GIB


def measure(stage, size, options, config, out, device):
    """{phase: bytes} of one run; {} if it ran out of memory.

    Any other failure is shown and ends everything.
    """
    with tempfile.TemporaryDirectory(dir=out) as folder:
        flags = shlex.split(command(stage, size, options, config, out, device))
        words = ["child", stage, str(int(config.saving)), *flags, "--out", folder]
        done = subprocess.run([sys.executable, __file__, *words], cwd=ROOT, capture_output=True, text=True)
    # Killed for its memory.
    if done.returncode == -9:
        return {}
    said = done.stderr.strip() or done.stdout.strip() or "nothing was said"
    require(done.returncode == 0 and done.stdout.strip().endswith("}"),
            f"{stage}.py {options} at {size} failed: {said.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def cell(peaks):
    """A table's entry: GiB of training, and of other phases that took more."""
    text = f"{peaks['training'] / GIB:.1f}"
    more = []
    for phase in ("loading", "saving"):
        if peaks.get(phase, 0) > 1.05 * peaks["training"]:
            more.append(f"{phase} {peaks[phase] / GIB:.1f}")
    return f"{text} ({', '.join(more)})" if more else text


def runs(stages, device):
    """[(stage, options)] that are measured at each size."""
    rows = []
    for stage in STAGES:
        if stage not in stages:
            continue
        options = OPTIONS
        if stage == "ppo":
            options += FROZEN
            if device == "cuda":
                options += FROZEN_ON_CPU
        rows += [(stage, option) for option in options]
    return rows


def table(cells, sizes):
    """Markdown: one row per run. cells: {(stage, options): [entry of each size]}."""
    lines = [
        "| stage | flags | " + " | ".join(sizes) + " |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for (stage, options), entries in cells.items():
        code = f"`{options}`" if options else ""
        lines.append(f"| {stage} | {code} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def main(config):
    config.sizes = config.sizes or ["135M", "0.5B", "1.5B"]
    config.stages = config.stages or list(STAGES)
    for given, known, flag in ((config.sizes, SIZES, "sizes"), (config.stages, STAGES, "stages")):
        odd = [name for name in given if name not in known]
        require(not odd, f"--{flag} {' '.join(odd)}: there is only {', '.join(known)}")
    require(config.tokens % (2 * config.row) == 0,
            f"--tokens {config.tokens} must be a multiple of {2 * config.row}, "
            f"two rows of --row {config.row}")
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = pick_device(device).type
    total, _ = memory(torch.device(device))
    results = out / "results.json"
    known = {}
    if config.resume and results.exists():
        known = json.loads(results.read_text())

    # 1. what the runs start from
    for size in config.sizes:
        make_models(out / size, SIZES[size])
    write_rows(out, config)

    # 2. the runs
    rows = runs(config.stages, device)
    cells = {row: [] for row in rows}
    with tqdm(total=len(rows) * len(config.sizes), disable=None) as bar:
        for size in config.sizes:
            for stage, options in rows:
                began = time.time()
                key = f"{device} {size} {stage} {options} {config.tokens} {config.row} {config.saving}"
                need = predicted(stage, size, options, config, out)
                _, free = memory(torch.device(device))
                if key not in known and free is not None and need > free - SPARE:
                    text = f"does not fit ({need / GIB:.0f})"
                else:
                    peaks = known.get(key)
                    if peaks is None:
                        peaks = measure(stage, size, options, config, out, device)
                    text = f"> {total / GIB:.0f}"
                    if peaks:
                        text = cell(peaks)
                        known[key] = peaks
                        write_json(results, known)
                cells[stage, options].append(text)
                guess = f", predicted {need / GIB:.1f}" if device == "cpu" else ""
                run = " ".join([size, stage, *options.split()])
                tqdm.write(f"{run}: {text} GiB{guess}, {time.time() - began:.0f} s")
                bar.update()

    # 3. the table
    where = "a CPU, float32" if device == "cpu" else torch.cuda.get_device_name()
    text = (f"Peak in GiB with {config.tokens} tokens in a forward pass; {where}, {total / GIB:.1f} GiB. "
            "In brackets: what took more than the training, or what a run that was not started would take, "
            f"as predicted.\n\n{table(cells, config.sizes)}")
    print(text)
    if tuple(config.stages) == STAGES and "tiny" not in config.sizes:
        put_or_append(f"memory {device}", text)


def put_or_append(name, text):
    """Put text between the markers `name` of bench/RESULTS.md.

    If there are none, a section at its end gets them.
    """
    from bench.ablate import put
    page = ROOT / "bench" / "RESULTS.md"
    if f"<!-- {name} -->" not in page.read_text():
        section = (f"\n## Memory, on {name.split()[1]}\n\n`python bench/memory.py`\n\n"
                   f"<!-- {name} -->\n<!-- /{name} -->\n")
        with open(page, "a", encoding="utf-8") as f:
            f.write(section)
    put(name, text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3] == "1", sys.argv[4:])
    else:
        run_script(main, Config, __doc__)
