"""dpo.py: its losses against closed forms, and which margins count."""
import json
import math

import pytest
import torch

from data import ranked_pairs
from dpo import preference_loss
from formats.rows import Row
from tools import run_here


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
