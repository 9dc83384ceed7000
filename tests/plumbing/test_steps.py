"""plumbing/steps.py: learning rates, what is decayed, and what an optimiser step does to its gradients."""
import math
from types import SimpleNamespace

import pytest
import torch

import model
from plumbing import run as runtime, steps as steps_file
from plumbing.steps import scheduled_lr


def test_learning_rates_warm_up_and_follow_their_schedule():
    peak, warmup, steps = 0.8, 4, 14
    for step in range(steps):
        share = (step - warmup) / (steps - warmup)
        expected = {
            "cosine": peak * (0.55 + 0.45 * math.cos(math.pi * share)),
            "linear": peak * (1 - share),
            "constant": peak,
        }
        for schedule, value in expected.items():
            value = peak * (step + 1) / warmup if step < warmup else value
            assert scheduled_lr(step, steps, warmup, peak, schedule) == pytest.approx(value), (schedule, step)
    assert scheduled_lr(5, 14, 4, 0.8) == scheduled_lr(5, 14, 4, 0.8, "cosine")
    assert scheduled_lr(0, 1, 1, 0.8, "linear") == 0.8  # a run that is all warm-up


@pytest.mark.case(15, 16)
@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_step_clips_the_norm_of_all_gradients_and_clears_them_and_takes_none_that_is_not_finite(
        fused):
    a, b = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=99.0, fused=fused)
    run = object.__new__(runtime.Run)
    run.scalers = {}
    run.device = torch.device("cpu")
    run.dtype = torch.float32
    run.world_size = 1
    run.attempts = []
    run.config = SimpleNamespace(skip_sigma=0.0)
    at = torch.zeros(2)
    for size, kept in ((1.0, 1 / 5), (0.1, 1.0)):  # norms 5 and 0.5
        run.backward(size * 3 * a + size * 4 * b, optimizer)
        expected = pytest.approx(5 * size)
        assert run.optimizer_step(optimizer, 0.5, max_grad_norm=1.0, batch=[]).item() == expected
        at = at - 0.5 * size * kept * torch.tensor([3.0, 4.0])
        assert [a.item(), b.item()] == pytest.approx(at.tolist(), rel=1e-4) and a.grad is b.grad is None
    for size in (math.nan, math.inf):
        run.backward(3 * a + size * b, optimizer)
        assert not math.isfinite(run.optimizer_step(optimizer, 0.5, max_grad_norm=1.0, batch=[7]).item())
        assert [a.item(), b.item()] == pytest.approx(at.tolist(), rel=1e-4) and a.grad is b.grad is None
    found = [(bool(attempt.bad), attempt.batch) for attempt in run.attempts]
    assert found == [(False, []), (False, []), (True, [7]), (True, [7])]


def test_weight_decay_is_of_matrices_but_not_of_embeddings():
    network = model.GPT(model.GPTConfig(11, 8, 1, 2, 2, 4))
    name_of = {p: name for name, p in network.named_parameters()}
    decay, keep = steps_file.adamw(network, 0.1, weight_decay=0.3).param_groups
    expected = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert {name_of[p].split(".", 3)[-1] for p in decay["params"]} == expected
    assert len(decay["params"]) + len(keep["params"]) == len(name_of)
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.3, 0)
