"""Where and in which precision things are computed, and what becomes of freed memory."""
import contextlib
import ctypes
import os
import platform
import re
from pathlib import Path

import torch

from plumbing.flags import require


def pick_device(name):
    """torch.device for auto, cuda, mps or cpu; a UserError where it is not there.

    Under torchrun it is this rank's GPU.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    require(name in available,
            f"--device {name}: PyTorch finds no such device here; use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    index = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    require(index < count, f"local rank {index} has no GPU, this machine has {count}; lower --nproc-per-node")
    return torch.device("cuda", index)


def pick_dtype(name, device, width):
    """torch.dtype of matrix products for a --dtype flag on a device, for a model of this width."""
    if name == "auto":
        name = best_dtype(device, width)
    require(name != "float16" or device.type == "cuda",
            "--dtype float16 needs --device cuda; use bfloat16 or float32")
    return getattr(torch, name)


def best_dtype(device, width):
    """What --dtype auto means: the name of the fastest precision that trains as well as float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float16"
    # AMX multiplies in bfloat16 four times as fast; in a narrow model casting takes more than that saves.
    amx = device.type == "cpu" and "amx_bf16" in cpu_features()
    if amx and width >= 256:
        return "bfloat16"
    return "float32"


def cpu_features():
    """What Linux says that the CPU can do, as words; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return set()
    # An x86 has its features in a line that begins with "flags", an ARM in one that begins with "Features".
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", info.read_text(), re.M)
    if line is None:
        return set()
    return set(re.findall(r"\w+", line[1]))


def autocast(device, dtype):
    """Context in which matrix products run in dtype; does nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def keep_heap():
    """Make glibc keep freed memory for the next step, from now on; what is free already is given back.

    By itself it returns large blocks at once, and each time that they are taken anew the kernel zeroes all
    their pages: up to half of a step's time on a CPU. Does nothing on other systems.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    # The numbers that malloc.h has for these names.
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    # From now on no block is mapped on its own, and the end of the heap is never given back.
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)
