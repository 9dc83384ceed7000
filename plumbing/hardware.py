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
    """torch.device for auto, cuda, mps or cpu; a UserError where it is not there. Under torchrun: this rank's GPU."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in have.items() if there)
    require(have[name], f"--device {name}: PyTorch finds no such device here; use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    index, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    require(index < there, f"local rank {index} has no GPU, this machine has {there}; lower --nproc-per-node")
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
