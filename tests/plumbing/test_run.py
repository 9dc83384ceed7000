"""plumbing/run.py: the random numbers of steps and ranks."""
from types import SimpleNamespace

import torch

from plumbing import run as runtime


def test_every_step_and_rank_draws_from_a_seed_of_its_own_and_the_generator_from_one_of_the_step():
    def draw(seed, step, rank):
        generator = runtime.Run.seed_step(
            SimpleNamespace(config=SimpleNamespace(seed=seed), rank=rank, device=torch.device("cpu")), step)
        return torch.rand(1, generator=generator).item(), torch.rand(1).item()

    draws = {(seed, step, rank): draw(seed, step, rank) for seed in range(3) for step in range(5)
             for rank in range(4)}
    assert len({b for _, b in draws.values()}) == 60 and draw(2, 4, 3) == draws[2, 4, 3]
    # The generator is for all ranks.
    assert len({a for a, _ in draws.values()}) == 15
    assert all(a == draws[seed, step, 0][0] for (seed, step, _), (a, _) in draws.items())
