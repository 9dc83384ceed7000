"""dpo.py: its losses against closed forms, and which margins count."""
import json
import math
import shutil

import pytest
import torch

from bench.optimum import write_reference
from data import encode_group, ranked_pairs
from dpo import preference_loss
from formats.model_folder import load_model
from formats.rows import Row
from formats.sources import read_rows, split_by_prompt
from model import GPT
from plumbing.flags import UserError
from tools import reply_logprob, rows_of, run_here


# -- losses

@pytest.mark.parametrize("kind, at_start", [("dpo", math.log(2)), ("ipo", 25.0), ("hinge", 1.0)])
def test_dpo_losses_start_at_their_known_values(kind, at_start):
    pair = ranked_pairs([Row([], ["a", "b"], [0, 1])])[:3]
    loss, metrics = preference_loss(torch.zeros(2), *pair, beta=0.1, kind=kind)
    assert loss.item() == pytest.approx(at_start, rel=1e-6)
    assert metrics["accuracy"].item() == 0.5 and metrics["margin"].item() == 0


def test_dpo_gradient_is_that_of_the_paper():
    beta = 0.3  # equation 7's gradient: -beta * sigma(r_l - r_w) on w, the opposite on l
    for log_ratios, label in ((torch.zeros(2), 0.5), (torch.tensor([1.5, -0.5]), None)):
        log_ratios = log_ratios.clone().requires_grad_()
        preference_loss(log_ratios, *ranked_pairs([Row([], ["a", "b"], [0, 1])])[:3], beta)[0].backward()
        share = torch.sigmoid(beta * (log_ratios[1] - log_ratios[0])).item()
        assert label is None or share == label
        assert log_ratios.grad.tolist() == pytest.approx([-beta * share, beta * share], rel=1e-5)


def test_dpo_losses_equal_their_formulas_and_label_smoothing_is_the_expected_loss():
    torch.manual_seed(1)
    chosen, rejected, beta = torch.randn(6) * 4, torch.randn(6) * 4, 0.2
    better, worse, weight = torch.arange(6), torch.arange(6) + 6, torch.full((6,), 1 / 6)
    both = torch.cat([chosen, rejected])

    def loss(kind, ratios=both, e=0.0):
        return preference_loss(ratios, better, worse, weight, beta, kind, e)[0].item()

    h = [beta * (c - r) for c, r in zip(chosen.tolist(), rejected.tolist())]
    assert loss("dpo") == pytest.approx(sum(math.log(1 + math.exp(-x)) for x in h) / 6, rel=1e-5)
    assert loss("ipo") == pytest.approx(sum((x / beta - 1 / (2 * beta)) ** 2 for x in h) / 6, rel=1e-5)
    assert loss("hinge") == pytest.approx(sum(max(0, 1 - x) for x in h) / 6, rel=1e-5)
    swapped = loss("dpo", torch.cat([rejected, chosen]))
    assert loss("dpo", e=0.2) == pytest.approx(0.8 * loss("dpo") + 0.2 * swapped, rel=1e-5)


# -- whole runs

def test_dpo_says_that_margins_count_for_nothing_and_the_reward_model_uses_them(small, tmp_path, capsys):
    rows = [{"prompt": f"Cube {i}.", "chosen": "Yes.", "rejected": "No.", "margin": 0.5 * (i % 2)}
            for i in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    inputs = f"--model {small}/sft --data {tmp_path}/rows.json"
    words = f"{inputs} --val-fraction 0 --steps 1 --batch-tokens 500 --threads 1"
    for name, said in (("dpo", True), ("reward", False)):
        run_here(name, words, f"--out {tmp_path}/{name}")
        assert ("warning: 4 rows have a margin, which only reward.py uses" in capsys.readouterr().out) == said


def test_dpo_refers_to_the_model_that_it_starts_from_or_to_that_of_reference(small, tmp_path):
    """At step 0 the loss is log 2 without --reference, with it what both models' ratios give."""
    words = (
        f"--model {small}/sft --data {small}/rankings.json --val-fraction 0.5 --steps 1 --batch-tokens 500 "
        "--max-new-tokens 8 --threads 1 --beta 0.7")
    starts = {}
    for name, flags in (("itself", ""), ("other", f"--reference {small}/other"),
                        ("same", f"--reference {small}/sft"), ("adapted", "--lora-rank 2"),
                        ("adapted other", f"--lora-rank 2 --reference {small}/other")):
        run_here("dpo", words, flags, f"--out {tmp_path}/run --overwrite")
        starts[name] = rows_of(tmp_path / "run")[0]
    for name in ("itself", "same", "adapted"):
        assert starts[name]["val_loss"] == pytest.approx(math.log(2), abs=1e-5)

    policy, tokenizer = load_model(small / "sft", GPT)
    reference, _ = load_model(small / "other", GPT)
    _, held_out = split_by_prompt(read_rows(f"{small}/rankings.json", "preferences", str), 0.5)
    loss = 0.0
    for row in held_out:
        ratios = []
        for ids, mask in encode_group(tokenizer, row):
            reply = torch.tensor(ids), torch.tensor(mask)
            with torch.no_grad():
                ratios.append(reply_logprob(policy, *reply) - reply_logprob(reference, *reply))
        loss += preference_loss(torch.stack(ratios), *ranked_pairs([row])[:3], 0.7)[0].item() / len(held_out)
    assert abs(loss - math.log(2)) > 0.01
    for name in ("other", "adapted other"):
        assert starts[name]["val_loss"] == pytest.approx(loss, abs=1e-4)


def test_dpo_refuses_a_reference_with_another_tokenizer_and_notices_that_it_has_changed(small, tmp_path):
    words = (
        f"--model {small}/sft --data {small}/rankings.json --val-fraction 0 --steps 1 --batch-tokens 500 "
        f"--threads 1 --out {tmp_path}/run")
    write_reference(tmp_path / "foreign", 2)
    with pytest.raises(UserError, match="foreign has another tokenizer than --model"):
        run_here("dpo", words, f"--reference {tmp_path}/foreign")
    shutil.copytree(small / "sft", tmp_path / "reference")
    run_here("dpo", words, f"--reference {tmp_path}/reference")
    shutil.copy(small / "other" / "model.safetensors", tmp_path / "reference" / "model.safetensors")
    with pytest.raises(UserError, match="what --reference names has changed"):
        run_here("dpo", words, f"--reference {tmp_path}/reference --resume")
