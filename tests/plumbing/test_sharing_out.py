"""plumbing/ranks.py: every example once, in passes within the budget, and as many of them on every rank."""
import random
from types import SimpleNamespace

import pytest

from plumbing import ranks


@pytest.mark.parametrize("cut", [ranks.micro_batches, ranks.by_length])
def test_pieces_partition_the_examples_fill_the_budget_and_never_pass_it(cut):
    rng = random.Random(0)
    for trial in range(100):
        lengths = [rng.randrange(1, 30) for _ in range(40)]
        examples = rng.sample(range(40), rng.randrange(1, 40))
        pieces = cut(examples, lengths, 25)
        flat = [i for piece in pieces for i in piece]
        assert flat == (examples if cut is ranks.micro_batches else sorted(examples,
                                                                           key=lambda i: (lengths[i], i)))
        cost = lambda piece: len(piece) * max(lengths[i] for i in piece)
        assert all(cost(piece) <= 25 or len(piece) == 1 for piece in pieces)
        assert all(cost(piece + following[:1]) > 25 for piece, following in zip(pieces, pieces[1:]))


@pytest.mark.case(21)
def test_ranks_get_every_example_once_and_as_many_pieces_each_however_few_there_are():
    rng = random.Random(0)
    for trial in range(200):
        world, budget = rng.randint(1, 5), rng.choice([1, 20, 60])
        lengths = [rng.randrange(1, 30) for _ in range(40)]
        examples = rng.sample(range(40), rng.choice([1, 2, 3, rng.randrange(1, 40)]))
        shares = [
            ranks.Ranks.split(SimpleNamespace(rank=rank, world_size=world), examples, lengths, budget)
            for rank in range(world)
        ]
        assert sorted(i for share in shares for piece, weight in share
                      for i in piece * (weight > 0)) == sorted(examples)
        assert len({len(share) for share in shares}) == 1
        assert {weight for share in shares for _, weight in share} <= {0.0, 1.0}
        counts = [sum(len(piece) for piece, weight in share if weight) for share in shares]
        assert max(counts) - min(counts) <= 1 and all(piece for share in shares for piece, _ in share)
        assert all(
            len(piece) * max(lengths[i] for i in piece) <= budget or len(piece) == 1
            for share in shares
            for piece, _ in share)


@pytest.mark.case(21, 25)
def test_ranks_share_the_examples_of_a_step_and_make_as_many_passes():
    lengths = dict(zip(range(5, 10), (3, 9, 2, 4, 1)))

    def split(examples, count, budget=1000):
        return [
            ranks.Ranks.split(SimpleNamespace(rank=rank, world_size=count), examples, lengths, budget)
            for rank in range(count)
        ]

    assert split([5, 6, 7, 8, 9], 2) == [[([9, 7, 5], 1.0)], [([8, 6], 1.0)]]
    assert split([5], 3) == [[([5], 1.0)], [([5], 0.0)], [([5], 0.0)]]
    assert split([5, 6, 7, 8, 9], 2, budget=4) == [[([9, 7], 1.0), ([5], 1.0)], [([8], 1.0), ([6], 1.0)]]
    assert split([5, 6, 7], 2, budget=4) == [[([7], 1.0), ([5], 1.0)], [([6], 1.0), ([5], 0.0)]]
