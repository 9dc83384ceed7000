"""bench/bench.py: both sides of a comparison run, its numbers fit together, and it ends what it started;
bench/scaling.py."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import bench, scaling

SCRIPT = Path(bench.__file__)
TINY = "--laps 2 --layers 1 --width 32 --vocabulary 300 --tokens 32 --threads 1 --others 1e9"


def run(*words, **environment):
    return subprocess.run([sys.executable, SCRIPT, *words, *TINY.split()],
                          env=os.environ | environment,
                          capture_output=True,
                          text=True)


def test_a_comparison_prints_numbers_that_fit_together(tmp_path):
    done = run("nanogpt", "--out", str(tmp_path / "deep" / "lines.jsonl"))
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line == json.loads((tmp_path / "deep" / "lines.jsonl").read_text())
    numbers = [
        "ours", "peer", "ratio", "peak_mb", "peer_peak_mb", "fraction_of_limit", "gemm_gflops", "copy_gbs",
    ]
    assert all(math.isfinite(line[name]) and line[name] > 0 for name in numbers)
    assert line["ratio"] == pytest.approx(line["ours"] / line["peer"], rel=1e-3)
    expected = ("nanogpt", "uniform", "tokens/s", 32)
    assert (line["what"], line["shape"], line["unit"], line["mean_length"]) == expected
    assert (line["laps"], line["peer_laps"], line["dropped"], line["padding"],
            line["peer_padding"]) == (2, 2, 0, 0, 0)


def test_a_side_that_dies_is_shown_and_the_other_one_ended(tmp_path):
    (tmp_path / "trl.py").write_text("raise RuntimeError('not today')")
    done = run("sft", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert "not today" in done.stderr and done.stderr.splitlines()[-1].startswith("error: sft, peer: ")


def test_an_unknown_comparison_ends_in_one_line():
    done = run("sft", "speed")
    assert (done.returncode, done.stdout) == (2, "")
    said, = done.stderr.splitlines()
    assert said == "error: speed: there is only sft, nanogpt, reward, dpo, ppo, generate16, generate64"


def test_operations_and_least_seconds_by_hand():
    config = bench.Config(layers=2, width=8, vocabulary=100, tokens=32)
    # A token meets 2 blocks of 8 x 24 + 8 x 8 + 8 x 32 + 32 x 8 = 768 weights: 2 x 1536 operations each.
    # Of 10 tokens, 4 are scored by a head of 8 x 100.
    # Q K^T and the sum of V: half of 10 x 10 pairs, 8 wide, in 2 blocks, twice, 2 operations each.
    assert bench.forward_flops(config, 10) == 10 * 2 * 1536 + 2 * 2 * 2 * 50 * 8
    assert bench.forward_flops(config, 10, 4) == bench.forward_flops(config, 10) + 4 * 2 * 800
    pair = {"prompt": 6, "ids": [[0] * 10, [0] * 12]}
    passes = 3 * (bench.forward_flops(config, 10, 4) + bench.forward_flops(config, 12, 6))
    assert bench.least_seconds("dpo", config, [pair], 1e6, 1.0) == pytest.approx(passes / 1e6)
    expected = pytest.approx((passes - 3 * 10 * 2 * 800) / 1e6)
    assert bench.least_seconds("reward", config, [pair], 1e6, 1.0) == expected
    # 16 new tokens to one prompt of 8: then 15 steps, each reads 4 bytes of every weight and of the keys and
    # values (2 blocks, 8 wide) seen so far.
    prompt = [{"prompt": 8, "ids": [[0] * 8]}]
    read = 4 * (15 * (1536 + 800) + sum(2 * 2 * 8 * (8 + step) for step in range(1, 16)))
    assert bench.least_seconds("generate16", config, prompt, 1e30, 1e6) == pytest.approx(read / 1e6)
    attended = sum(2 * 2 * 2 * 8 * (8 + step) for step in range(1, 16))
    done = 2 * 15 * (1536 + 800) + attended + bench.forward_flops(config, 8, 1)
    assert bench.least_seconds("generate16", config, prompt, 1e6, 1e30) == pytest.approx(done / 1e6)


def test_scaling_measures_every_panel_and_draws_it(tmp_path, capsys, monkeypatch):
    train, decode = scaling.Point("tiny", 2, 256), scaling.Point("tiny", 2, 64, 32, True)
    panels = [("size", train), ("size", decode), ("context", train), ("batch", decode), ("replies", decode)]
    assert [series for series, _ in scaling.points(["tiny"], bench.CPU)] == [series for series, _ in panels]
    monkeypatch.setattr(scaling, "points", lambda *_: panels)  # two processes instead of three
    scaling.main(
        scaling.Config(sizes=["tiny"],
                       laps=1,
                       threads=1,
                       device="cpu",
                       out=str(tmp_path / "deep" / "lines.jsonl")))
    lines = [json.loads(line) for line in (tmp_path / "deep" / "lines.jsonl").read_text().splitlines()]
    assert [(line["series"], line["what"]) for line in lines] == [("size", "training"), ("size", "decoding"),
                                                                  ("context", "training"),
                                                                  ("batch", "decoding"),
                                                                  ("replies", "decoding")]
    for line in lines:
        last = "fraction_of_limit" if line["what"] == "training" else "seconds_per_reply"
        assert all(
            math.isfinite(line[name]) and line[name] > 0
            for name in ("parameters", "seconds", "tokens_per_second", "memory_mib", "gemm_gflops", last))
        expected = pytest.approx(line["rows"] * (line["new"] or line["length"]) / line["seconds"])
        assert line["tokens_per_second"] == expected
    # Embeddings of 300 tokens and 1024 positions, 2 blocks of 12 x 32^2 weights, 9 x 32 biases and two norms,
    # and one norm at the end
    expected = {(300 + 1024) * 32 + 2 * (12 * 32**2 + 9 * 32 + 4 * 32) + 2 * 32}
    assert {line["parameters"] for line in lines} == expected
    assert (tmp_path / "deep" / "lines.png").stat().st_size > 10000
    assert capsys.readouterr().out.count("\n| ") == 1 + len(lines)
