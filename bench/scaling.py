"""How do time and memory of our code grow? Random GPT-2s with 50,257 tokens, each point measured in a process of its own.

    python bench/scaling.py                            all of it: some 5 minutes on 2 free CPU cores, with 7.5 GB of memory
    python bench/scaling.py --sizes 5M 30M --write     the first series at two sizes; table and picture go to bench/

    size      1M to 350M parameters, on a GPU to 1.5B: a training step on rows of 256 tokens, and decoding, 16 prompts of 32 tokens, 32 new each
    context   30M: a training step on as many tokens in rows of 64 to 2048
    batch     30M: decoding 1 to 256 prompts of 32 tokens at once, 32 new each
    replies   30M: 1 to 16 replies to one prompt of 256 tokens, 32 new each; equal prompts share the pass over them

A lap is a training step as in sft.py, every token trained: GPT.forward(summed=True), backward pass, clipping, fused AdamW (on a CPU 2,048 tokens,
for 124M 1,024, for 350M 512, for 1.5B 256, as large models would take minutes; on a GPU 8,192), or a call of model.generate at temperature 1,
as in ppo.py, where no reply ends early and the new tokens count. After one to warm up, the median of --laps is taken.
    memory   the most that the process had at any time (resident on a CPU, allocated by PyTorch on a GPU) above what it had
             before the model was made (Python and PyTorch: 0.2 to 0.3 GiB on a CPU, nothing on a GPU)
    limit    6 x parameters operations per trained token, at the rate of the best of some matrix products
A size is skipped if 1.3 times what weights, gradient and Adam's moments take, 16 bytes per parameter, exceeds the memory that is free.
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
from model import GPT, GPTConfig  # noqa: E402
from generate import generate  # noqa: E402
from report import pyplot  # noqa: E402
from plumbing.hardware import autocast, keep_heap, pick_device  # noqa: E402
from plumbing.flags import Count, Natural, UserError, require  # noqa: E402
from plumbing.steps import adamw  # noqa: E402
from plumbing.run import run_script  # noqa: E402
from plumbing.disk import folder_of  # noqa: E402

MIB = 1 << 20
SIZES = {  # layers, heads, width, tokens of a training step on a CPU
    "tiny": (2, 2, 32, 512), "1M": (4, 1, 16, 2048), "5M": (4, 3, 96, 2048), "30M": (6, 6, 384, 2048), "124M": (12, 12, 768, 1024),
    "350M": (24, 16, 1024, 512), "1.5B": (48, 25, 1600, 256)}
GPU_TOKENS = 8192
TOKENIZER = SimpleNamespace(pad=0, stops=[-1])  # all that `generate` asks of one; nothing ends a reply


@dataclass
class Config:
    sizes: list[str] = field(default_factory=list)  # of the first series (default: 1M 5M 30M 124M 350M, on a GPU 1.5B too); tiny alone is a trial
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; weights stay float32
    laps: Count = 3  # training steps, or calls of generate, measured per point
    out: str = os.path.join(tempfile.gettempdir(), "barerlhf-scaling", "scaling.jsonl")  # file for the numbers, a line per point; the picture goes beside it
    write: bool = False  # put table and picture into bench/ (RESULTS.md; scaling.png, of a GPU scaling-cuda.png)
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
    base, contexts, batches, replies = "30M", (64, 128, 256, 512, 1024, 2048), (1, 4, 16, 64, 256), (1, 2, 4, 8, 16)
    if sizes == ["tiny"]:
        base, contexts, batches, replies = "tiny", (256,), (16,), (2,)
    tokens = {name: SIZES[name][3] if device.type == "cpu" else GPU_TOKENS for name in SIZES}
    return ([("size", point) for name in sizes for point in (Point(name, tokens[name] // 256, 256), Point(name, 16, 32, 32))]
            + [("context", Point(base, tokens[base] // length, length)) for length in contexts]
            + [("batch", Point(base, rows, 32, 32)) for rows in batches] + [("replies", Point(base, rows, 256, 32, True)) for rows in replies])


def make_model(point, device):
    layers, heads, width, _ = SIZES[point.size]
    with device:
        return GPT(GPTConfig(300 if point.size == "tiny" else 50257, max(1024, point.length + point.new), layers, heads, heads, width))


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
    """Print {seconds of the median lap, bytes before the model and at most} as the last line, or {} if memory ran out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run out, let it be this process that is killed
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    device, dtype, result = pick_device(device), getattr(torch, dtype), {}
    forget(device)
    start = peak(device)
    try:
        model = make_model(point, device)
        keep_heap()  # as every script does
        lap = lap_of(point, model, device, dtype)
        seconds = [seconds_of(lap, device) for _ in range(1 + laps)][1:]
        result = {"seconds": statistics.median(seconds), "start": start, "peak": peak(device)}
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
    print(json.dumps(result))


def lap_of(point, model, device, dtype):
    """A function that draws point.new tokens for each prompt, or does an optimiser step of sft.py."""
    ids, mask = torch.randint(model.config.vocab_size, (point.rows, point.length)), torch.ones(point.rows, point.length, dtype=torch.bool)
    mask[:, 0] = False  # nothing predicts it
    if point.new:
        prompts, generator = (ids[:1].expand_as(ids) if point.same else ids).tolist(), torch.Generator(device).manual_seed(0)
    else:
        optimizer, tokens, ids = adamw(model.train(), 1e-5, 0.1), int(mask.sum()), ids.to(device)

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
    return 2 * n**3 / min(seconds_of(lambda: torch.mm(a, b, out=out), device) for _ in range(4))


def measure(point, config, device):
    """What a child prints; {} if it ran out of memory. Any other failure is shown and ends everything."""
    words = [sys.executable, __file__, "child", json.dumps([point, config.laps, config.dtype, device.type, config.threads])]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True)  # on Ctrl-C it ends the child
    if done.returncode == -9:  # killed for its memory
        return {}
    said = (done.stderr.strip() or f"it ended with {done.returncode} and said nothing").splitlines()[-1]
    require(done.returncode == 0 and done.stdout.strip().endswith("}"), f"{point}: {said}")
    return json.loads(done.stdout.splitlines()[-1])


def line_of(series, point, parameters, result, gemm):
    """A point's line of --out."""
    tokens, seconds = point.rows * (point.new or point.length), result["seconds"]
    line = {"series": series, "what": "decoding" if point.new else "training", **point._asdict(), "parameters": parameters, "seconds": seconds,
            "tokens_per_second": tokens / seconds, "memory_mib": (result["peak"] - result["start"]) / MIB, "before_mib": result["start"] / MIB}
    return line | ({"seconds_per_reply": seconds / point.rows} if point.new else {"fraction_of_limit": 6 * parameters * tokens / seconds / gemm})


def table(lines, skipped, gemm, machine, config):
    """The results as they stand in bench/RESULTS.md."""
    command = shlex.join(["python", "bench/scaling.py", *sys.argv[1:]]).replace(config.out, Path(config.out).name)
    text = [f"`{command}`, {time.strftime('%Y-%m-%d')}: {config.dtype} on {machine}, matrix products {gemm / 1e9:,.0f} GFLOP/s; torch {torch.__version__}. "
            f"A lap is a training step or a call of `generate`, its time the median of {config.laps}. Memory is the process's peak above what it had before "
            f"the model was made ({statistics.median(x['before_mib'] for x in lines):.0f} MiB). The limit is 6 x parameters operations per trained token at the "
            "rate of the products.", "",
            "| series | | model | parameters, M | a lap | seconds | tokens/s | seconds per reply | of the limit | memory, MiB |", "|---" * 10 + "|"]
    for x in lines:
        lap = f"{x['rows']} x {x['length']}" + (f" + {x['new']} tokens" if x["new"] else " tokens") + (", one prompt" if x["same"] else "")
        reply, share = (f"{x[key]:.2g}" if key in x else "" for key in ("seconds_per_reply", "fraction_of_limit"))
        text.append(f"| {x['series']} | {x['what']} | {x['size']} | {x['parameters'] / 1e6:.3g} | {lap} | {x['seconds']:.3g} | {x['tokens_per_second']:,.0f} | "
                    f"{reply} | {share} | {x['memory_mib']:,.0f} |")
    return "\n".join(text + [""] * bool(skipped) + skipped)


def draw(lines, gemm, title, path):
    """Four panels into a PNG."""
    plt = pyplot()
    figure, grid = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)

    def plot(axes, series, what, x, y, label, color):
        chosen = sorted((line[x], line[y]) for line in lines if line["series"] == series and line["what"] == what)
        axes.plot([x for x, _ in chosen], [y for _, y in chosen], marker="o", ms=4, label=label, color=color)
        return [x for x, _ in chosen]

    def panel(axes, title, xlabel, ylabel, ticks=(), twin=None):
        axes.set_title(title, fontsize=10, loc="left")
        axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
        if ticks:
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        handles = [handle for one in (axes, twin) if one for handle in one.get_legend_handles_labels()[0]]
        axes.legend(handles=handles, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)

    for axes, y, limit, name in ((grid[0, 0], "tokens_per_second", lambda n: gemm / (6 * n), "limit: 6 operations a parameter"),
                                 (grid[0, 1], "memory_mib", lambda n: 16 * n / MIB, "16 bytes per parameter")):
        xs = plot(axes, "size", "training", "parameters", y, "training", "tab:blue")
        plot(axes, "size", "decoding", "parameters", y, "decoding, 16 at once", "tab:orange")
        axes.plot(xs, [limit(x) for x in xs], "k--", lw=1, label=name)
        axes.set_yscale("log")
    panel(grid[0, 0], "Model size: speed", "parameters", "tokens per second")
    panel(grid[0, 1], "Model size: memory", "parameters", "MiB above Python and PyTorch")
    base, (axes, more) = "".join({line["size"] for line in lines if line["series"] == "context"}), grid[1]
    xs = plot(axes, "context", "training", "length", "tokens_per_second", f"training {base}", "tab:blue")
    axes.set_ylim(bottom=0)
    panel(axes, "Context: as many tokens in longer rows", "tokens per row", "tokens per second", xs)
    twin = more.twinx()
    xs = plot(more, "batch", "decoding", "rows", "tokens_per_second", "tokens per second, prompts of 32", "tab:orange")
    xs += plot(twin, "replies", "decoding", "rows", "seconds_per_reply", "seconds per reply, one prompt of 256", "tab:green")
    more.set_yscale("log")
    twin.set(yscale="log", ylabel="seconds per reply")
    twin.grid(False)
    twin.spines["right"].set_visible(True)
    panel(more, f"Batch: decoding {base}, 32 new tokens each", "replies at once", "tokens per second", sorted(set(xs)), twin)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(config):
    device = pick_device(("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device)
    odd = [name for name in config.sizes if name not in SIZES]
    require(not odd, f"--sizes {' '.join(odd)}: there is only {', '.join(SIZES)}")
    sizes = list(dict.fromkeys(config.sizes)) or [name for name in SIZES if name != "tiny" and (name != "1.5B" or device.type == "cuda")]
    require(not config.write or "tiny" not in sizes, "--write: a trial's numbers (--sizes tiny) are not for bench/")
    pyplot()  # if it is missing, that is said now
    torch.set_num_threads(config.threads or torch.get_num_threads())
    folder_of(config.out)
    try:
        out = open(config.out, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {config.out} can't be written: {error.strerror}") from None
    cpu = re.search(r"model name\s*: (.+)|\Z", Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "")[1] or "an unnamed CPU"
    threads = torch.get_num_threads()
    machine = f"{cpu}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else torch.cuda.get_device_name()

    gemm, lines, skipped, measured = gemm_rate(device, getattr(torch, config.dtype)), [], [], {}
    with out, tqdm(points(sizes, device), disable=None) as bar:
        for series, point in bar:
            parameters = sum(p.numel() for p in make_model(point, torch.device("meta")).parameters())
            need, free = 1.3 * 16 * parameters, memory(device)[1] if device.type == "cpu" else torch.cuda.mem_get_info()[0]
            if point not in measured:
                measured[point] = measure(point, config, device) if need <= free else {}
            name = f"{series}, {'decoding' if point.new else 'training'} {point.size}, {point.rows} x {point.length} + {point.new}"
            if not measured[point]:
                why = "ran out of memory" if need <= free else f"skipped, as it might need {need / (1 << 30):.1f} GiB and {free / (1 << 30):.1f} are free"
                skipped.append(f"{name}: {why}.")
                tqdm.write(skipped[-1])
                continue
            line = line_of(series, point, parameters, measured[point], gemm)
            lines.append(line | {"dtype": config.dtype, "device": device.type, "threads": threads, "laps": config.laps, "gemm_gflops": gemm / 1e9})
            print(json.dumps(lines[-1]), file=out, flush=True)
            tqdm.write(f"{name}: {line['tokens_per_second']:,.0f} tokens/s, {line['memory_mib']:,.0f} MiB")
    require(lines, "nothing was measured")
    text, file = table(lines, skipped, gemm, machine, config), "scaling.png" if device.type == "cpu" else "scaling-cuda.png"
    picture = ROOT / "bench" / file if config.write else Path(config.out).with_suffix(".png")
    draw(lines, gemm, f"{config.dtype} on {machine}", picture)
    print(f"{text}\n\npicture: {picture}   numbers: {config.out}")
    if config.write:
        page, name = ROOT / "bench" / "RESULTS.md", f"scaling {device.type}"
        if f"<!-- {name} -->" not in page.read_text():
            with open(page, "a", encoding="utf-8") as f:
                f.write(f"\n## Scaling, on {device.type}\n\n![time and memory]({file})\n\n<!-- {name} -->\n<!-- /{name} -->\n")
        put(name, text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        point, *rest = json.loads(sys.argv[2])
        child(Point(*point), *rest)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a child is ended
        run_script(main, Config, __doc__)
