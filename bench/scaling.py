"""How do time and memory of our code grow? Random GPT-2s with 50,257 tokens, each point measured in a process
of its own.

    python bench/scaling.py                            all of it: some 5 minutes on 2 free CPU cores, with
                                                       7.5 GB of memory
    python bench/scaling.py --sizes 5M 30M --write     the first series at two sizes; table and picture go to
                                                       bench/

    size      1M to 350M parameters, on a GPU to 1.5B: a training step on rows of 256 tokens, and decoding,
              16 prompts of 32 tokens, 32 new each
    context   30M: a training step on as many tokens in rows of 64 to 2048
    batch     30M: decoding 1 to 256 prompts of 32 tokens at once, 32 new each
    replies   30M: 1 to 16 replies to one prompt of 256 tokens, 32 new each; equal prompts share the pass over
              them

A lap is a training step as in sft.py, every token trained: GPT.forward(summed=True), backward pass,
clipping, fused AdamW (on a CPU 2,048 tokens, for 124M 1,024, for 350M 512, for 1.5B 256, as large models
would take minutes; on a GPU 8,192), or a call of model.generate at temperature 1, as in ppo.py, where no
reply ends early and the new tokens count. After one to warm up, the median of --laps is taken.
    memory   the most that the process had at any time (resident on a CPU, allocated by PyTorch on a GPU)
             above what it had before the model was made (Python and PyTorch: 0.2 to 0.3 GiB on a CPU, nothing
             on a GPU)
    limit    6 x parameters operations per trained token, at the rate of the best of some matrix products
A size is skipped if 1.3 times what weights, gradient and Adam's moments take, 16 bytes per parameter,
exceeds the memory that is free.
"""
import contextlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.ablate import put  # noqa: E402
from bench.memory import forget, memory, peak  # noqa: E402
from generate import generate  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plumbing.disk import folder_of  # noqa: E402
from plumbing.flags import Count, Natural, UserError, require  # noqa: E402
from plumbing.hardware import autocast, keep_heap, pick_device  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from plumbing.steps import adamw  # noqa: E402
from report import pyplot  # noqa: E402

MIB = 1 << 20
GIB = 1 << 30


class Size(NamedTuple):
    layers: int
    heads: int
    width: int
    tokens: int  # of a training step on a CPU


SIZES = {
    "tiny": Size(2, 2, 32, 512),
    "1M": Size(4, 1, 16, 2048),
    "5M": Size(4, 3, 96, 2048),
    "30M": Size(6, 6, 384, 2048),
    "124M": Size(12, 12, 768, 1024),
    "350M": Size(24, 16, 1024, 512),
    "1.5B": Size(48, 25, 1600, 256),
}
GPU_TOKENS = 8192
# All that `generate` asks of a tokenizer; nothing ends a reply.
TOKENIZER = SimpleNamespace(pad=0, stops=[-1])


@dataclass
class Config:
    # of the first series (default: 1M 5M 30M 124M 350M, on a GPU 1.5B too); tiny alone is a trial
    sizes: list[str] = field(default_factory=list)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights stay float32
    laps: Count = 3  # training steps, or calls of generate, measured per point
    # file for the numbers, a line per point; the picture goes beside it
    out: str = os.path.join(tempfile.gettempdir(), "barerlhf-scaling", "scaling.jsonl")
    # put table and picture into bench/ (RESULTS.md; scaling.png, of a GPU scaling-cuda.png)
    write: bool = False
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto takes the first of cuda, cpu that works
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    debug: bool = False  # show the traceback of an error


class Point(NamedTuple):
    """What a process does in a lap."""
    size: str
    rows: int
    length: int  # of a row that is trained, or of a prompt
    new: int = 0  # tokens that each prompt gets; 0: a training step
    same: bool = False  # the prompts are equal


def points(sizes, device):
    """[(series, Point)]; what two series share is measured once."""
    base = "30M"
    contexts = (64, 128, 256, 512, 1024, 2048)
    batches = (1, 4, 16, 64, 256)
    replies = (1, 2, 4, 8, 16)
    if sizes == ["tiny"]:
        base, contexts, batches, replies = "tiny", (256,), (16,), (2,)

    def tokens(size):
        return SIZES[size].tokens if device.type == "cpu" else GPU_TOKENS

    found = []
    for size in sizes:
        found.append(("size", Point(size, tokens(size) // 256, 256)))
        found.append(("size", Point(size, 16, 32, 32)))
    for length in contexts:
        found.append(("context", Point(base, tokens(base) // length, length)))
    for rows in batches:
        found.append(("batch", Point(base, rows, 32, 32)))
    for rows in replies:
        found.append(("replies", Point(base, rows, 256, 32, True)))
    return found


def make_model(point, device):
    size = SIZES[point.size]
    vocabulary = 300 if point.size == "tiny" else 50257
    context = max(1024, point.length + point.new)
    with device:
        return GPT(GPTConfig(vocabulary, context, size.layers, size.heads, size.heads, size.width))


def seconds_of(function, device):
    """How long a call takes, until the device has done all that it was given."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------
# In the child

def child(point, laps, dtype, device, threads):
    """Print {seconds of the median lap, bytes before the model and at most} as the last line.

    If memory ran out, it is {}.
    """
    # Should memory run out, let it be this process that is killed.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    device = pick_device(device)
    dtype = getattr(torch, dtype)
    result = {}
    forget(device)
    start = peak(device)
    try:
        model = make_model(point, device)
        keep_heap()  # as every script does
        lap = lap_of(point, model, device, dtype)
        # The first is warm-up.
        seconds = [seconds_of(lap, device) for _ in range(1 + laps)][1:]
        result = {"seconds": statistics.median(seconds), "start": start, "peak": peak(device)}
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
    print(json.dumps(result))


def lap_of(point, model, device, dtype):
    """A function that draws point.new tokens for each prompt, or does an optimiser step of sft.py."""
    ids = torch.randint(model.config.vocab_size, (point.rows, point.length))  # (B, T)
    mask = torch.ones(point.rows, point.length, dtype=torch.bool)
    # Nothing predicts the first token.
    mask[:, 0] = False
    if point.new:
        prompts = (ids[:1].expand_as(ids) if point.same else ids).tolist()
        generator = torch.Generator(device).manual_seed(0)
    else:
        optimizer = adamw(model.train(), 1e-5, 0.1)
        tokens = int(mask.sum())
        ids = ids.to(device)

    def decode():
        with autocast(device, dtype):
            generate(model, prompts, point.new, TOKENIZER, generator=generator)

    def train():
        with autocast(device, dtype):
            logprob, _ = model(ids, mask, summed=True)
        (-logprob / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return decode if point.new else train


# ---------------------------------------------------------------------------------------------------------
# In the parent

def gemm_rate(device, dtype):
    """Operations per second of the best of some matrix products."""
    n = 2048 if device.type == "cpu" else 8192
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    best = min(seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(4))
    return 2 * n**3 / best


def measure(point, config, device):
    """What a child prints; {} if it ran out of memory. Any other failure is shown and ends everything."""
    task = json.dumps([point, config.laps, config.dtype, device.type, config.threads])
    words = [sys.executable, __file__, "child", task]
    # Without our stdin, so that on Ctrl-C it is this process that ends the child.
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    # Killed for its memory.
    if done.returncode == -9:
        return {}
    said = done.stderr.strip() or f"it ended with {done.returncode} and said nothing"
    require(done.returncode == 0 and done.stdout.strip().endswith("}"), f"{point}: {said.splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def line_of(series, point, parameters, result, gemm):
    """A point's line of --out."""
    seconds = result["seconds"]
    tokens = point.rows * (point.new or point.length)
    line = {
        "series": series,
        "what": "decoding" if point.new else "training",
        **point._asdict(),
        "parameters": parameters,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "memory_mib": (result["peak"] - result["start"]) / MIB,
        "before_mib": result["start"] / MIB,
    }
    if point.new:
        line["seconds_per_reply"] = seconds / point.rows
    else:
        line["fraction_of_limit"] = 6 * parameters * tokens / seconds / gemm
    return line


def table(lines, skipped, gemm, machine, config):
    """The results as they stand in bench/RESULTS.md."""
    command = shlex.join(["python", "bench/scaling.py", *sys.argv[1:]])
    command = command.replace(config.out, Path(config.out).name)
    before = statistics.median(line["before_mib"] for line in lines)
    text = [
        f"`{command}`, {time.strftime('%Y-%m-%d')}: {config.dtype} on {machine}, matrix products "
        f"{gemm / 1e9:,.0f} GFLOP/s; torch {torch.__version__}. "
        f"A lap is a training step or a call of `generate`, its time the median of {config.laps}. "
        f"Memory is the process's peak above what it had before the model was made ({before:.0f} MiB). "
        "The limit is 6 x parameters operations per trained token at the rate of the products.",
        "",
        "| series | | model | parameters, M | a lap | seconds | tokens/s | seconds per reply | "
        "of the limit | memory, MiB |",
        "|---" * 10 + "|",
    ]
    text += [table_row(line) for line in lines]
    if skipped:
        text += ["", *skipped]
    return "\n".join(text)


def table_row(line):
    lap = f"{line['rows']} x {line['length']}"
    if line["new"]:
        lap += f" + {line['new']}"
    lap += " tokens"
    if line["same"]:
        lap += ", one prompt"
    reply = share = ""
    if "seconds_per_reply" in line:
        reply = f"{line['seconds_per_reply']:.2g}"
    if "fraction_of_limit" in line:
        share = f"{line['fraction_of_limit']:.2g}"
    cells = [
        line["series"],
        line["what"],
        line["size"],
        f"{line['parameters'] / 1e6:.3g}",
        lap,
        f"{line['seconds']:.3g}",
        f"{line['tokens_per_second']:,.0f}",
        reply,
        share,
        f"{line['memory_mib']:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def draw(lines, gemm, title, path):
    """Four panels into a PNG."""
    plt = pyplot()
    figure, grid = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    # None of a series may have fitted.
    base = next((line["size"] for line in lines if line["series"] == "context"), "")
    draw_size(grid[0, 0], grid[0, 1], lines, gemm)
    draw_context(grid[1, 0], lines, base)
    draw_batch(grid[1, 1], lines, base)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot(axes, lines, series, what, x, y, label, color):
    """Draw the key y of a series over the key x; returns the x."""
    points = []
    for line in lines:
        if line["series"] == series and line["what"] == what:
            points.append((line[x], line[y]))
    points.sort()
    xs = [x for x, _ in points]
    axes.plot(xs, [y for _, y in points], marker="o", ms=4, label=label, color=color)
    return xs


def panel(axes, title, xlabel, ylabel, ticks=(), twin=None):
    """Finish a panel: its title, its axes' names and ticks, and the legend, of a second y axis too."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    if ticks:
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    handles, _ = axes.get_legend_handles_labels()
    if twin:
        handles += twin.get_legend_handles_labels()[0]
    axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13),
                ncols=3)


def draw_size(speed_axes, memory_axes, lines, gemm):
    """Tokens per second and memory over the parameters, each with its limit."""
    for axes, y in ((speed_axes, "tokens_per_second"), (memory_axes, "memory_mib")):
        sizes = plot(axes, lines, "size", "training", "parameters", y, "training", "tab:blue")
        plot(axes, lines, "size", "decoding", "parameters", y, "decoding, 16 at once", "tab:orange")
        if axes is speed_axes:
            limit = [gemm / (6 * n) for n in sizes]
            name = "limit: 6 operations a parameter"
        else:
            limit = [16 * n / MIB for n in sizes]
            name = "16 bytes per parameter"
        axes.plot(sizes, limit, "k--", lw=1, label=name)
        axes.set_yscale("log")
    panel(speed_axes, "Model size: speed", "parameters", "tokens per second")
    panel(memory_axes, "Model size: memory", "parameters", "MiB above Python and PyTorch")


def draw_context(axes, lines, base):
    lengths = plot(axes, lines, "context", "training", "length", "tokens_per_second", f"training {base}",
                   "tab:blue")
    axes.set_ylim(bottom=0)
    panel(axes, "Context: as many tokens in longer rows", "tokens per row", "tokens per second", lengths)


def draw_batch(axes, lines, base):
    """Tokens per second of decoding, and on an axis of its own the seconds per reply to one prompt."""
    twin = axes.twinx()
    rows = plot(axes, lines, "batch", "decoding", "rows", "tokens_per_second",
                "tokens per second, prompts of 32", "tab:orange")
    rows += plot(twin, lines, "replies", "decoding", "rows", "seconds_per_reply",
                 "seconds per reply, one prompt of 256", "tab:green")
    axes.set_yscale("log")
    twin.set(yscale="log", ylabel="seconds per reply")
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    panel(axes, f"Batch: decoding {base}, 32 new tokens each", "replies at once", "tokens per second",
          sorted(set(rows)), twin)


def machine_name(device):
    """The processor, and of a CPU how many threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    threads = torch.get_num_threads()
    return f"{name[1] if name else 'an unnamed CPU'}, {threads} thread{'s' if threads > 1 else ''}"


def free_memory(device):
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return memory(device)[1]


def main(config):
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = pick_device(device)
    odd = [name for name in config.sizes if name not in SIZES]
    require(not odd, f"--sizes {' '.join(odd)}: there is only {', '.join(SIZES)}")
    sizes = list(dict.fromkeys(config.sizes))
    if not sizes:
        sizes = ["1M", "5M", "30M", "124M", "350M"]
        if device.type == "cuda":
            sizes.append("1.5B")
    require(not config.write or "tiny" not in sizes,
            "--write: a trial's numbers (--sizes tiny) are not for bench/")
    # If it is missing, that is said now.
    pyplot()
    torch.set_num_threads(config.threads or torch.get_num_threads())
    folder_of(config.out)
    try:
        out = open(config.out, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {config.out} can't be written: {error.strerror}") from None
    with out:
        measured = measure_all(points(sizes, device), out, config, device)
    write(measured, config, device)


class Measured(NamedTuple):
    """What came of all points."""
    lines: list  # of --out
    skipped: list  # sentences about points without a number
    gemm: float  # operations per second


def measure_all(found, out, config, device):
    """Measure [(series, Point)], a line to the file `out` for each; returns `Measured`."""
    gemm = gemm_rate(device, getattr(torch, config.dtype))
    lines, skipped = [], []
    results = {}
    settings = {
        "dtype": config.dtype,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "laps": config.laps,
        "gemm_gflops": gemm / 1e9,
    }
    for series, point in tqdm(found, disable=None):
        parameters = sum(p.numel() for p in make_model(point, torch.device("meta")).parameters())
        need = 1.3 * 16 * parameters
        free = free_memory(device)
        if point not in results:
            results[point] = measure(point, config, device) if need <= free else {}
        what = "decoding" if point.new else "training"
        name = f"{series}, {what} {point.size}, {point.rows} x {point.length} + {point.new}"
        if not results[point]:
            why = "ran out of memory"
            if need > free:
                why = f"skipped, as it might need {need / GIB:.1f} GiB and {free / GIB:.1f} are free"
            skipped.append(f"{name}: {why}.")
            tqdm.write(skipped[-1])
            continue
        line = line_of(series, point, parameters, results[point], gemm)
        lines.append(line | settings)
        print(json.dumps(lines[-1]), file=out, flush=True)
        tqdm.write(f"{name}: {line['tokens_per_second']:,.0f} tokens/s, {line['memory_mib']:,.0f} MiB")
    require(lines, "nothing was measured")
    return Measured(lines, skipped, gemm)


def write(measured, config, device):
    """Print the table and draw the picture; with --write, both into bench/."""
    lines, skipped, gemm = measured
    machine = machine_name(device)
    text = table(lines, skipped, gemm, machine, config)
    file = "scaling.png" if device.type == "cpu" else "scaling-cuda.png"
    picture = Path(config.out).with_suffix(".png")
    if config.write:
        picture = ROOT / "bench" / file
    draw(lines, gemm, f"{config.dtype} on {machine}", picture)
    print(f"{text}\n\npicture: {picture}   numbers: {config.out}")
    if config.write:
        page = ROOT / "bench" / "RESULTS.md"
        name = f"scaling {device.type}"
        if f"<!-- {name} -->" not in page.read_text():
            section = (f"\n## Scaling, on {device.type}\n\n![time and memory]({file})\n\n"
                       f"<!-- {name} -->\n<!-- /{name} -->\n")
            with open(page, "a", encoding="utf-8") as f:
                f.write(section)
        put(name, text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        point, *rest = json.loads(sys.argv[2])
        child(Point(*point), *rest)
    else:
        # So that a child is ended.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run_script(main, Config, __doc__)
