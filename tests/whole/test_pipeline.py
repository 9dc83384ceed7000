"""Every stage, one after the other, as the README has them: what they leave behind, and that they learn."""
import json

import pytest
import torch

import generate
import model
import tools
from data import encode_prompt
from formats.model_folder import load_model
from tools import SAMPLERS, TOY, TRAINERS, rows_of, run_here


def test_every_stage_runs_and_leaves_a_checkpoint_metrics_and_a_report(chain):
    root, said = chain
    for stage in TRAINERS:
        latest = tools.latest(root / stage)
        assert latest.name == "step_000003"
        assert {path.name for path in latest.parent.iterdir()} == {"latest.json", latest.name}
        assert {"training.safetensors", "state.json",
                "manifest.json"} <= {path.name for path in latest.iterdir()}
        assert {"metrics.jsonl", "run.json"} <= {path.name for path in (root / stage).iterdir()}
        assert not list((root / stage).rglob("*.tmp"))
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            assert (root / stage / name).samefile(latest / name)
        steps = {
            held_out: [
                row["step"]
                for row in rows_of(root / stage)
                if any(key.startswith("val_") for key in row) == held_out
            ]
            for held_out in (False, True)
        }
        # The held-out loss before training, too.
        assert steps == {False: [1, 2, 3], True: [] if stage in SAMPLERS else [0, 2, 3]}
    summary = json.loads((root / "summary.json").read_text())
    wanted = {"sft.gold", "reward.accuracy", "reward.bayes_accuracy", "seconds.total"}
    wanted |= {
        f"{s}.{m}"
        for s in ("ppo", "dpo")
        for m in ("gold", "wins", "ties", "losses", "win_rate", "kl", "eos_rate")
    }
    assert wanted <= summary.keys()
    for stage in ("ppo", "dpo"):
        expected = pytest.approx(1)
        assert summary[f"{stage}.wins"] + summary[f"{stage}.ties"] + summary[f"{stage}.losses"] == expected
    assert summary["sft"]["kl"] == 0 and summary["sft"]["ties"] == 1  # the reference against itself
    page = (root / "report.html").read_text()
    assert "data:image/png;base64," in page and "http://" not in page and "https://" not in page
    assert all((root / name).stat().st_size > 10_000 for name in ("curves.png", "ppo_metrics.png"))
    assert "[[" in said["sft"] and "<|endoftext|>]]" in said["sft"]  # one example with its mask is shown


def test_ppo_logs_what_one_watches_and_starts_at_ratio_1(chain):
    row = rows_of(chain[0] / "ppo")[0]
    assert {
        "score", "gold", "kl", "entropy", "length", "eos_rate", "clip_fraction", "approx_kl",
        "explained_variance", "grad_norm", "critic_grad_norm", "rollout_tokens_per_second",
        "score_tokens_per_second", "update_tokens_per_second"
    } <= row.keys()
    # The first rollout is the reference's.
    assert row["kl"] == pytest.approx(0, abs=1e-4) and row["ratio_error"] < 1e-4


def test_the_pipeline_learns_what_is_preferred(tmp_path):
    """Demonstrations say yes or no at even odds, people prefer yes: PPO and DPO say yes, and stop."""
    words = ["river", "stone", "apple", "window", "garden", "pencil", "candle", "bridge"]
    prompts = [f"Say {word}." for word in words]
    demonstrations = [{"instruction": p, "output": reply} for p in prompts
                      for reply in ("It is good.", "It is sad.")]
    pairs = [{"prompt": p, "chosen": "It is good.", "rejected": "It is sad."} for p in prompts]
    for name, rows in (("sft", demonstrations), ("pairs", pairs)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    common = "--threads 1 --log-every 50"
    pairs = f"--data {tmp_path}/pairs.json --model {tmp_path}/sft"
    run_here("sft", common, f"--data {tmp_path}/sft.json --out {tmp_path}/sft",
             f"--tokenizer {TOY} --layers 2 --heads 2 --width 64 --block-size 64",
             "--steps 150 --batch-tokens 256 --lr 0.01 --val-fraction 0 --warmup 5")
    run_here("reward", common, pairs, f"--out {tmp_path}/reward",
             "--steps 30 --batch-tokens 256 --val-fraction 0")
    run_here("dpo", common, pairs, f"--out {tmp_path}/dpo",
             "--steps 60 --batch-tokens 256 --lr 0.0005 --beta 0.3 --val-fraction 0")
    run_here("ppo", common, pairs, f"--reward {tmp_path}/reward --out {tmp_path}/ppo",
             "--steps 15 --rollout-batch 32 --max-new-tokens 12 --lr 0.0005 --kl-coef 0.3")

    def share_good(name):
        policy, tokenizer = load_model(tmp_path / name, model.GPT)
        ids = [encode_prompt(tokenizer, [{"role": "user", "content": p}]) for p in prompts for _ in range(25)]
        got = generate.generate(policy, ids, 12, tokenizer, generator=torch.Generator().manual_seed(1))
        good = sum(text == "It is good." for text in got.texts(tokenizer))
        return good / len(ids), got.ended.float().mean().item()

    before, stops = share_good("sft")
    assert 0.3 < before < 0.7 and stops > 0.95
    for name in ("ppo", "dpo"):
        after, stops = share_good(name)
        assert after > 0.9 and stops > 0.95, f"{name}: {after:.2f} say good, {stops:.2f} stop"
