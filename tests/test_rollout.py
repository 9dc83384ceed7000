"""rollout.py: who gets which prompts and random numbers, and what a forward pass is given."""
import itertools
from types import SimpleNamespace

import pytest
import torch

import rollout
import toy
from formats.rows import Row
from model import GPT, GPTConfig
from plumbing.run import Alone
from rollout import Prompt, draw_prompts, sample

TOKENIZER = toy.tokenizer()


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    return GPT(GPTConfig(TOKENIZER.n_vocab, 64, 1, 2, 2, 32)).eval()


def prompts(number):
    rows = [Row([{"role": "user", "content": "word " * (i % 3 + 1) + str(i)}]) for i in range(number)]
    return [Prompt(row, rollout.encode_prompt(TOKENIZER, row.prompt)) for row in rows]


def ranked(rank, world_size):
    alone = Alone(torch.device("cpu"), torch.float32)
    alone.rank, alone.world_size = rank, world_size
    return alone


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_replies_belong_to_their_prompts_whatever_the_number_of_ranks(policy, per_prompt):
    found, generator = prompts(6), lambda: torch.Generator().manual_seed(3)
    whole = sample(ranked(0, 1), policy, TOKENIZER, found, 8, 1.0, generator(), per_prompt=per_prompt)
    expected = [p.row.text for p in found for _ in range(per_prompt)]
    assert [prompt.row.text for prompt in whole.prompts] == expected
    by_prompt = list(zip(*[iter(whole.texts)] * per_prompt))
    for rank in range(2):
        mine = sample(ranked(rank, 2),
                      policy,
                      TOKENIZER,
                      found[rank::2],
                      8,
                      1.0,
                      generator(),
                      per_prompt=per_prompt)
        assert list(zip(*[iter(mine.texts)] * per_prompt)) == by_prompt[rank::2]
    assert per_prompt == 1 or len(set(by_prompt[0])) > 1


def test_ranks_draw_the_same_prompts_and_share_them_by_length():
    found = prompts(9)
    drawn = [draw_prompts(ranked(rank, 2), found, itertools.cycle(range(9)), 8) for rank in range(2)]
    assert sorted(drawn[0] + drawn[1]) == list(range(8))
    lengths = [[len(found[i].ids) for i in own] for own in drawn]
    assert all(a <= b for a, b in zip(*lengths)) and lengths[0] == sorted(lengths[0])


@pytest.mark.parametrize("room", [0, 1])
def test_passes_cover_each_reply_once_and_a_filler_counts_nothing(policy, room):
    alone = ranked(0, 1)
    batch = sample(alone, policy, TOKENIZER, prompts(5), 8, 1.0, torch.Generator().manual_seed(0), room=room)
    assert batch.ids.shape[1] == max(batch.sizes) + room
    # As if another rank had two passes more.
    alone.all_max = lambda counts: counts + 2
    plan, = batch.plan(alone, [[4, 2, 0, 1, 3]], 30)
    parts = list(batch.passes(alone, plan))
    real = [part for part in parts if part.counts]
    assert sorted(i for part in real for i in part.numbers) == [0, 1, 2, 3, 4] and len(parts) == len(real) + 2
    for part in parts:
        assert part.ids.equal(batch.ids[part.numbers][:, :part.width]) and part.where.any(1).all()
        assert part.mask.equal(part.where if part.counts else torch.zeros_like(part.where))
        assert part.of(batch.mask).equal(part.where)
        assert part.lengths.tolist() == [batch.sizes[i] for i in part.numbers]
        assert len(part.numbers) == 1 or part.width * len(part.numbers) <= 30


def test_prompts_that_are_held_out_are_those_that_training_leaves(tmp_path):
    rows = "".join(f'{{"prompt": "Say {i}."}}\n' for i in range(200))
    (tmp_path / "rows.jsonl").write_text(rows)
    config = SimpleNamespace(data=str(tmp_path / "rows.jsonl"), part="", skip_bad=False, val_fraction=0.3,
                             max_length=0, max_new_tokens=8)
    sides = [rollout.load_prompts(config, TOKENIZER, 64, print, held_out) for held_out in (False, True)]
    texts = [{prompt.row.text for prompt in side} for side in sides]
    assert 30 < len(texts[1]) < 90 and not texts[0] & texts[1] and len(texts[0] | texts[1]) == 200
    config.val_fraction = 0.0
    assert len(rollout.load_prompts(config, TOKENIZER, 64, print, held_out=True)) == 200
