"""plumbing/hardware.py: the precision that `auto` settles on."""
import os
from pathlib import Path

import pytest
import torch

from plumbing import hardware
from plumbing.flags import UserError
from tools import TOY, run_here


GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("features, width, expected", [
    ({"avx2", "avx512_bf16"}, 4096, torch.float32),
    (set(), 4096, torch.float32),
    ({"amx_tile", "amx_int8"}, 4096, torch.float32),
    ({"amx_tile", "amx_bf16"}, 255, torch.float32),
    ({"amx_bf16"}, 0, torch.float32),
    ({"amx_bf16"}, 256, torch.bfloat16),
    ({"amx_bf16"}, 4096, torch.bfloat16),
])
def test_auto_is_bfloat16_on_a_cpu_that_multiplies_in_it_and_for_wide_models_alone(
        monkeypatch, features, width, expected):
    monkeypatch.setattr(hardware, "cpu_features", lambda: features)
    assert hardware.pick_dtype("auto", CPU, width) == expected
    assert hardware.pick_dtype("auto", torch.device("mps"), width) == torch.float32
    for name in ("float32", "bfloat16"):
        assert hardware.pick_dtype(name, CPU, width) == hardware.pick_dtype(name, GPU, width) == getattr(
            torch, name)
    with pytest.raises(UserError, match="float16 needs --device cuda"):
        hardware.pick_dtype("float16", CPU, width)


@pytest.mark.parametrize("supported", [True, False])
def test_auto_on_a_gpu_is_bfloat16_where_that_is_not_emulated(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation: supported and not including_emulation)
    monkeypatch.setattr(hardware, "cpu_features", lambda: {"amx_bf16"})
    expected = [torch.bfloat16 if supported else torch.float16] * 2
    assert [hardware.pick_dtype("auto", GPU, width) for width in (32, 4096)] == expected


def test_cpu_features_are_the_words_of_proc_cpuinfo(monkeypatch):
    info = Path("/proc/cpuinfo")
    if info.exists():
        line = next((line for line in info.read_text().splitlines()
                     if line.split(":")[0].strip() in ("flags", "Features")), ":")
        assert hardware.cpu_features() == set(line.split(":")[1].split())
        assert hardware.cpu_features() or os.uname().machine not in ("x86_64", "aarch64")
    for text, expected in (("processor\t: 0\nflags\t\t: fpu amx_bf16\nvmx flags\t: x\nflags\t\t: fpu\n", {
            "fpu", "amx_bf16"
    }), ("Features\t: fp asimd\n", {"fp", "asimd"}), ("cpu\t: POWER9\n", set()), ("", set())):
        monkeypatch.setattr(Path, "exists", lambda self: True)
        monkeypatch.setattr(Path, "read_text", lambda self: text)
        assert hardware.cpu_features() == expected
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert hardware.cpu_features() == set()


def test_a_run_settles_on_the_precision_that_its_widest_model_wants(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "cpu_features", lambda: {"amx_bf16"})
    for width, dtype in ((32, "float32"), (256, "bfloat16")):
        run_here(
            "sft",
            f"--layers 1 --heads 2 --width {width} --block-size 64 --threads 1 --batch-tokens 256 --steps 1 "
            f"--data {small}/demonstrations.json --tokenizer {TOY} "
            f"--model scratch --val-fraction 0 --out {tmp_path}/{width}")
        assert f"products in {dtype}" in capsys.readouterr().out
