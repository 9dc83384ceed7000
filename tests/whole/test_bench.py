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


@pytest.mark.long
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


def laps_of_ours(what, folder, number):
    """Laps of our side alone, which needs none of the peers."""
    config = bench.Config(laps=number, layers=1, width=32, vocabulary=300, tokens=32, threads=1)
    (folder / what).mkdir()
    tokenizer = bench.make_models(folder / "models", config)
    bench.write_rows(folder / what, what, config, tokenizer)
    side = bench.Side("ours", what, folder / what, config)
    try:
        side.hear()
        for _ in range(number):
            side.lap(math.inf)
    finally:
        side.stop()
    return side.laps


def test_a_lap_of_grpo_samples_groups_and_trains_on_every_reply_once(tmp_path):
    laps = laps_of_ours("grpo", tmp_path, 2)
    for lap in laps:
        assert lap["work"] == 16 and len(lap["batch"]) == 4
        # 4 prompts of 8 tokens are passed over once, 16 replies get 8 tokens each, and all but the last token
        # of 16 rows of prompt and reply are what the update sees: no pass before it, no reference.
        assert (lap["positions"], lap["padded"]) == (4 * 8 + 16 * 8 + 16 * 15, 0)
    assert laps[0]["batch"] != laps[1]["batch"]
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "run" / "metrics.jsonl").open()]
    for row in rows:
        # Every group teaches something: its scores are four numbers in a row, 1.25 ** 0.5 their deviation.
        assert row["flat_groups"] == 0 and row["score_spread"] == pytest.approx(1.25**0.5)
        assert row["advantage_size"] > 0.5 and row["length"] == 8 and "kl" not in row


def test_samples_of_a_prompt_share_the_pass_over_it(tmp_path):
    lap, = laps_of_ours("samples8", tmp_path, 1)
    assert lap["work"] == 64 * 8 and len(lap["batch"]) == 8
    # 8 prompts of 24 tokens, and 64 replies of 8.
    assert (lap["positions"], lap["padded"]) == (8 * 24 + 64 * 8, 0)


@pytest.mark.long
@pytest.mark.parametrize("what, peer, unit, samples", [("samples8", "transformers", "tokens/s", 8),
                                                       ("grpo", "trl", "episodes/s", 4)])
def test_both_sides_draw_as_many_replies_to_a_prompt(what, peer, unit, samples):
    pytest.importorskip(peer)
    done = run(what)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert (line["what"], line["unit"], line["samples"], line["new_tokens"]) == (what, unit, samples, 8)
    assert line["ratio"] == pytest.approx(line["ours"] / line["peer"], rel=1e-3)
    assert 0 < line["fraction_of_limit"] < 1
    assert (line["laps"], line["peer_laps"], line["padding"], line["peer_padding"]) == (2, 2, 0, 0)


def test_a_side_that_dies_is_shown_and_the_other_one_ended(tmp_path):
    (tmp_path / "trl.py").write_text("raise RuntimeError('not today')")
    done = run("sft", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert "not today" in done.stderr and done.stderr.splitlines()[-1].startswith("error: sft, peer: ")


def test_an_unknown_comparison_ends_in_one_line():
    done = run("sft", "speed")
    assert (done.returncode, done.stdout) == (2, "")
    said, = done.stderr.splitlines()
    assert said == f"error: speed: there is only {', '.join(bench.TASKS)}"


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


def test_least_seconds_of_groups_by_hand():
    # As above: 2 blocks of 768 weights, a head of 800. Replies of 8 tokens to one prompt of 24.
    config = bench.Config(layers=2, width=8, vocabulary=100, tokens=32)
    row = [{"prompt": 24, "ids": [[0] * 24]}]
    # 8 rows go through 7 steps; the prompt is passed over once, and what is kept of it is read once a step.
    read = 4 * sum(1536 + 800 + 2 * 2 * 8 * (24 + 8 * step) for step in range(1, 8))
    assert bench.least_seconds("samples8", config, row, 1e30, 1e6) == pytest.approx(read / 1e6)
    # But each row attends to it.
    attended = sum(2 * 2 * 2 * 8 * 8 * (24 + step) for step in range(1, 8))
    done = 8 * 2 * 7 * (1536 + 800) + attended + bench.forward_flops(config, 24, 1)
    assert bench.least_seconds("samples8", config, row, 1e6, 1e30) == pytest.approx(done / 1e6)
    # grpo draws 4 replies of 8 tokens, and goes through each behind its prompt forward and backward.
    row = [{"prompt": 8, "ids": [[0] * 8]}]
    drawn = bench.decoding_seconds(config, [8], 8, 1e6, 1e9, 4)
    trained = 4 * 3 * bench.forward_flops(config, 16, 8) / 1e6
    assert bench.least_seconds("grpo", config, row, 1e6, 1e9) == pytest.approx(drawn + trained)


def test_rows_measured_by_themselves_leave_the_table_of_all_alone(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(bench, "make_models", lambda *_: None)
    monkeypatch.setattr(bench, "compare", lambda what, *_: {"what": what, "shape": "uniform"})
    monkeypatch.setattr(bench, "table", lambda results, _: [result["what"] for result in results])
    monkeypatch.setattr(bench, "put_or_append", lambda *given: written.append(given))
    (tmp_path / "trl").mkdir()
    config = bench.Config(write=True, trl_ppo=str(tmp_path))
    bench.main(["samples8", "grpo"], config)
    bench.main([], config)
    assert written == [("speed float32 uniform default of grpo samples8", ["samples8", "grpo"]),
                       ("speed float32 uniform default", list(bench.TASKS))]


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
