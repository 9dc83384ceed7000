"""How much memory does each stage need, and what does each switch save? Random weights in the shapes of real models.

    python bench/memory.py                                       all stages at 135M, 0.5B, 1.5B: an hour on 2 free cores with 24 GB
    python bench/memory.py --sizes 135M --stages sft ppo         two stages at one size

Every number is one run of sft.py, reward.py, dpo.py or ppo.py by its own flags in a process of its own: two optimiser steps
of --tokens tokens (so that the second has Adam's moments from the start), for ppo a rollout of as many tokens with two updates.
    CPU   the most memory that the process had resident, Python and PyTorch included (0.3 GiB)
    CUDA  torch.cuda.max_memory_allocated (without the CUDA context and what the allocator holds in reserve)
from the moment that all models are loaded to the end of the last optimiser step. Where loading them took more, that stands beside
it (on a CPU the pages of the weights' file count, which the system can take back); with --saving also what the checkpoint took.
What is predicted not to fit into the memory that is free on a CPU is not started: a machine that swaps is of no use.

The model folders (bfloat16, 4.4 GB for the three sizes) are made once in --out. The table is printed, and goes to bench/RESULTS.md
if it is of all stages (and not of the trial size).
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
from head import LOGITS_AT_ONCE  # noqa: E402
from model import GPT, ScalarModel  # noqa: E402
from plumbing.hardware import pick_device  # noqa: E402
from plumbing.flags import Count, Natural, parse_flags, require  # noqa: E402
from plumbing.run import Run, run_script  # noqa: E402
from plumbing.disk import write_json  # noqa: E402
from formats.tokenizer import Tokenizer  # noqa: E402

GIB = 1 << 30
SPARE = GIB // 2  # left to others when a run is started
COMMON = {"hidden_act": "silu", "tie_word_embeddings": True, "max_position_embeddings": 8192}
SIZES = {  # config.json: of nothing, for a trial; of SmolLM2-135M; of Qwen2.5-0.5B; of Qwen2.5-1.5B
    "tiny": COMMON | {"model_type": "qwen2", "num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
                      "intermediate_size": 1024, "vocab_size": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "135M": COMMON | {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
                      "intermediate_size": 1536, "vocab_size": 49152, "rms_norm_eps": 1e-5, "rope_theta": 1e5},
    "0.5B": COMMON | {"model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
                      "intermediate_size": 4864, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "1.5B": COMMON | {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2,
                      "intermediate_size": 8960, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6}}
CHECKPOINT, LORA = "--checkpoint-activations", "--lora-rank 16"
OPTIONS = ("", CHECKPOINT, LORA, f"{CHECKPOINT} {LORA}")
FROZEN = ("--frozen-dtype bfloat16", f"{CHECKPOINT} --frozen-dtype bfloat16")  # with adapters nothing frozen is of its own: see ppo.py
FROZEN_ON_CPU = ("--frozen-device cpu", f"{CHECKPOINT} --frozen-device cpu")
STAGES = ("sft", "reward", "dpo", "ppo")
NEW_TOKENS = 32  # of a reply that ppo samples


@dataclass
class Config:
    sizes: list[str] = field(default_factory=list)  # of the models (default: 135M 0.5B 1.5B; tiny is for a trial)
    stages: list[str] = field(default_factory=list)  # scripts to measure (default: sft reward dpo ppo)
    tokens: Count = 1024  # per optimiser step
    row: Annotated[int, ">= 64"] = 256  # tokens of a row, prompt and reply
    out: str = os.path.join(tempfile.gettempdir(), "barerlhf-memory")  # folder for models, data and results.json
    saving: bool = False  # let the runs save as well: slow, and it takes as many GB of disk
    resume: bool = False  # take what results.json in --out has from before (skipped runs are tried again)
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto takes the first of cuda, cpu that works
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    debug: bool = False  # show the traceback of an error


# ---------------------------------------------------------------------------------------------------------
# Models and data

def make_models(folder, header):
    """Write folder/policy and folder/reward: random weights in bfloat16, a shard per layer, so that little memory is needed."""
    generator = torch.Generator().manual_seed(0)
    for kind, name in ((GPT, "policy"), (ScalarModel, "reward")):
        here, index = folder / name, folder / name / "model.safetensors.index.json"
        if index.exists():
            continue
        here.mkdir(parents=True, exist_ok=True)
        Tokenizer("bytes", r"[\s\S]", {bytes([b]): b for b in range(256)}).save(here)  # a token per character
        write_json(here / "config.json", header | {"architectures": [architecture_of(header["model_type"], kind)]})
        stored, shards = shapes(here, kind), {}
        for key in stored:
            layer = re.search(r"layers\.(\d+)\.", key)
            shards.setdefault(f"{f'layer-{layer[1]}' if layer else key}.safetensors", []).append(key)
        for file, keys in shards.items():
            if (folder / "policy" / file).exists() and kind is ScalarModel:  # the trunk is the same
                (here / file).unlink(missing_ok=True)
                (here / file).symlink_to(Path("..") / "policy" / file)
                continue
            save_file({key: random_tensor(key, stored[key].shape, generator) for key in keys}, here / file, {"format": "pt"})
        write_json(index, {"weight_map": {key: file for file, keys in shards.items() for key in keys}})  # last: where it is, the rest is


def shapes(folder, kind):
    """{stored name: meta tensor} of the model that a folder's config.json describes."""
    config, _ = read_config(folder)
    with torch.device("meta"):
        return to_stored(kind(config).state_dict(), config)


def random_tensor(name, shape, generator):
    if len(shape) > 1:
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02
    return torch.zeros(shape, dtype=torch.bfloat16) if name.endswith("bias") else torch.ones(shape, dtype=torch.bfloat16)


def write_rows(out, config):
    """Write rows.jsonl (pairs of replies, of which sft takes the chosen one) and prompts.jsonl.

    A prompt with its reply is exactly --row tokens long, control tokens included.
    """
    letters, number = torch.Generator().manual_seed(0), 2 * config.tokens // config.row

    def text(length):
        return "".join(chr(97 + i) for i in torch.randint(26, (length,), generator=letters).tolist())

    prompt, reply = config.row // 2 - 2, config.row - config.row // 2 - 1
    rows = [{"prompt": text(prompt), "chosen": text(reply), "rejected": text(reply)} for _ in range(number)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text(config.row - NEW_TOKENS - 2)}) + "\n" for _ in range(number)))


def command(stage, size, options, config, out, device):
    """The flags of a run."""
    models, tokens = f"{out}/{size}", config.tokens
    flags = (f"--device {device} --threads {config.threads} --model {models}/policy --micro-batch-tokens {tokens} --val-fraction 0"
             " --lr 1e-6 --warmup 1")
    if stage == "ppo":
        flags += (f" --data {out}/prompts.jsonl --reward {models}/reward --rollout-batch {tokens // config.row}"
                  f" --max-new-tokens {NEW_TOKENS} --steps 1 --epochs 2 --minibatches 1 --critic-lr 1e-6")
    else:
        flags += f" --data {out}/rows.jsonl --batch-tokens {tokens} --steps 2"
    return f"{flags} {options}"


# ---------------------------------------------------------------------------------------------------------
# Measuring: in the child

def peak(device):
    """The most bytes used since `forget`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, which hands a parent's peak down to its children
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) << 10
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def forget(device):
    """Begin a new peak at what is used now; where the system can't, `peak` goes on from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def child(stage, saving, words):
    """Run a script's main; print {phase: peak in bytes} as the last line, or {} if memory ran out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run out, let it be this process that is killed
    script, peaks = importlib.import_module(stage), {}
    config = parse_flags(script.Config, "", words)
    device, begin, save = pick_device(config.device), Run.begin, Run._save

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

    try:
        with mock.patch.object(Run, "begin", loaded), mock.patch.object(Run, "_save", saved), contextlib.suppress(SystemExit):
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
    """About how many bytes a run takes on a CPU, in float32: weights, gradients, Adam's moments, what the backward pass needs."""
    h = SIZES[size]
    P = sum(p.numel() for p in shapes(out / size / "policy", GPT).values())
    C, I, layers, lora = h["hidden_size"], h["intermediate_size"], h["num_hidden_layers"], LORA in options
    D = C // h["num_attention_heads"]
    sides = (2 * C + 2 * h["num_key_value_heads"] * D, 2 * C, C + 2 * I, I + C)  # in plus out of a block's matrices
    trained = 16 * sum(sides) * layers if lora else P
    block = 4 * config.tokens * (14 * C + 4 * I)  # kept by a block for the backward pass
    kept = 4 * config.tokens * C * layers + block if CHECKPOINT in options else block * layers
    if stage != "reward":  # the embedding is the head too, so its gradient comes in two parts
        kept += 4 * min(LOGITS_AT_ONCE, config.tokens // 2 * h["vocab_size"]) + (0 if lora else 2 * 4 * C * h["vocab_size"])
    still, gradients = 4 * P + 8 * trained, 4 * trained
    total = still + max(kept, gradients)
    if stage == "ppo":
        total += still + gradients + (0 if lora else 2 * P * (2 if "bfloat16" in options else 4))
    if stage == "reward" or (stage == "dpo" and not lora):
        total = max(total, 8 * P)  # two copies for a moment
    if config.saving:
        # a copy of weights and moments, and two more as bytes
        total = max(total, 4.4 * still * (2 if stage == "ppo" else 1))
    return total + 0.35 * GIB


def measure(stage, size, options, config, out, device):
    """{phase: bytes} of one run; {} if it ran out of memory. Any other failure is shown and ends everything."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        words = shlex.split(command(stage, size, options, config, out, device)) + ["--out", folder]
        child_words = [sys.executable, __file__, "child", stage, str(int(config.saving)), *words]
        done = subprocess.run(child_words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == -9:  # killed for its memory
        return {}
    said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
    require(done.returncode == 0 and done.stdout.strip().endswith("}"), f"{stage}.py {options} at {size} failed: {said}")
    return json.loads(done.stdout.splitlines()[-1])


def cell(peaks):
    """A table's entry: GiB of training, and of other phases that took more."""
    more = [f"{phase} {peaks[phase] / GIB:.1f}" for phase in ("loading", "saving") if peaks.get(phase, 0) > 1.05 * peaks["training"]]
    return f"{peaks['training'] / GIB:.1f}" + (f" ({', '.join(more)})" if more else "")


def main(config):
    config.sizes, config.stages = config.sizes or ["135M", "0.5B", "1.5B"], config.stages or list(STAGES)
    for given, known, flag in ((config.sizes, SIZES, "sizes"), (config.stages, STAGES, "stages")):
        odd = [name for name in given if name not in known]
        require(not odd, f"--{flag} {' '.join(odd)}: there is only {', '.join(known)}")
    require(config.tokens % (2 * config.row) == 0,
            f"--tokens {config.tokens} must be a multiple of {2 * config.row}, two rows of --row {config.row}")
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = pick_device(("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device).type
    total, _ = memory(torch.device(device))
    results = out / "results.json"
    known = json.loads(results.read_text()) if config.resume and results.exists() else {}

    # 1. what the runs start from
    for size in config.sizes:
        make_models(out / size, SIZES[size])
    write_rows(out, config)

    # 2. the runs
    rows = [(stage, options) for stage in STAGES if stage in config.stages
            for options in OPTIONS + (FROZEN if stage == "ppo" else ()) + (FROZEN_ON_CPU if stage == "ppo" and device == "cuda" else ())]
    table = {row: [] for row in rows}
    with tqdm(total=len(rows) * len(config.sizes), disable=None) as bar:
        for size in config.sizes:
            for stage, options in rows:
                key, began = f"{device} {size} {stage} {options} {config.tokens} {config.row} {config.saving}", time.time()
                need, (_, free) = predicted(stage, size, options, config, out), memory(torch.device(device))
                if key not in known and free is not None and need > free - SPARE:
                    text = f"does not fit ({need / GIB:.0f})"
                else:
                    peaks = known[key] if key in known else measure(stage, size, options, config, out, device)
                    text = cell(peaks) if peaks else f"> {total / GIB:.0f}"
                    if peaks:
                        known[key] = peaks
                        write_json(results, known)
                table[stage, options].append(text)
                guess = f", predicted {need / GIB:.1f}" if device == "cpu" else ""
                tqdm.write(f"{size} {' '.join([stage, *options.split()])}: {text} GiB{guess}, {time.time() - began:.0f} s")
                bar.update()

    # 3. the table
    lines = ["| stage | flags | " + " | ".join(config.sizes) + " |", "|---" * (len(config.sizes) + 2) + "|"]
    lines += [f"| {stage} | {f'`{options}`' if options else ''} | " + " | ".join(cells) + " |" for (stage, options), cells in table.items()]
    where = "a CPU, float32" if device == "cpu" else torch.cuda.get_device_name()
    text = (f"Peak in GiB with {config.tokens} tokens in a forward pass; {where}, {total / GIB:.1f} GiB. "
            "In brackets: what took more than the training, or what a run that was not started would take, as predicted.\n\n" + "\n".join(lines))
    print(text)
    if tuple(config.stages) == STAGES and "tiny" not in config.sizes:
        put_or_append(f"memory {device}", text)


def put_or_append(name, text):
    """Put text between the markers `name` of bench/RESULTS.md, which a section at its end gets if there are none."""
    from bench.ablate import put
    page = ROOT / "bench" / "RESULTS.md"
    if f"<!-- {name} -->" not in page.read_text():
        with open(page, "a", encoding="utf-8") as f:
            f.write(f"\n## Memory, on {name.split()[1]}\n\n`python bench/memory.py`\n\n<!-- {name} -->\n<!-- /{name} -->\n")
    put(name, text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3] == "1", sys.argv[4:])
    else:
        run_script(main, Config, __doc__)
