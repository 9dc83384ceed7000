"""rollout.py: who gets which prompts and random numbers, and what a forward pass is given."""
import contextlib
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

import rollout
import toy
from data import encode_prompt
from formats.rows import Row
from generate import generate, uniforms
from model import GPT, GPTConfig
from plumbing.run import Alone
from rollout import Prompt, draw_prompts, join, sample

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


# -- several turns

def ending_often():
    """A tokenizer of which every sixth id ends a reply, so that an untrained policy's replies end."""
    tokenizer = copy.copy(TOKENIZER)
    tokenizer.stops = tuple(range(0, tokenizer.n_vocab, 6))
    return tokenizer


class Counter:
    """A tool that answers by how long the last reply is; by every fourth length the conversation is over."""

    def __init__(self, turns):
        self.turns, self.asked = turns, []

    def __call__(self, prompts, replies, answers, ended, dialogues):
        assert all(ended) and [talk[0]["content"] for talk in dialogues] == prompts
        assert [talk[-1] for talk in dialogues] == [{"role": "assistant", "content": own} for own in replies]
        self.asked.append(len(replies))
        return [None if len(own) % 4 == 3 else "x" * (len(own) % 4) for own in replies]


TURNS, ROOM = 4, 20


def by_hand(policy, tokenizer, prompt, uniform):
    """(ids, mask, turns, ended, why) of one conversation, each turn alone, with its numbers (1, ROOM, 2)."""
    tool, ids, mask, turns = Counter(TURNS), list(prompt.ids), [False] * len(prompt.ids), []
    for own in uniform:
        room = len(prompt.ids) + ROOM - len(ids)
        got = generate(policy, [ids], room, tokenizer, uniform=own)
        reply = got.ids[0, len(ids):].tolist()
        ids, mask = ids + reply, mask + [True] * len(reply)
        turns.append({"role": "assistant", "content": tokenizer.decode(reply)})
        if not got.ended[0]:
            return ids, mask, turns, False, "cut"
        if len(turns) == 2 * TURNS - 1:
            return ids, mask, turns, True, "turns"
        answer, = tool([prompt.row.text], [turns[-1]["content"]], [""], [True], [prompt.row.prompt + turns])
        if answer is None:
            return ids, mask, turns, True, "over"
        turn = {"role": "user", "content": answer}
        added = encode_prompt(tokenizer, [turn])
        left = len(prompt.ids) + ROOM - len(ids) - len(added)
        if left <= 0:
            return ids, mask, turns, False, "no room" if left < 0 else "no room behind it"
        ids, mask, turns = ids + added, mask + [False] * len(added), [*turns, turn]


def conversations(policy, rank=0, world_size=1, turns=TURNS, **agreed):
    """A Rollout of six prompts, four replies to each, in several turns, and what was asked of the ranks."""
    alone, seen = ranked(rank, world_size), SimpleNamespace(gathered=0, flags=[], tool=Counter(turns))
    agreed = iter(agreed.get("flags", ()))

    @contextlib.contextmanager
    def gathered(model):
        seen.gathered += 1
        yield

    def any_rank(flag):
        seen.flags.append(flag)
        return next(agreed, flag)

    alone.gathered, alone.any_rank = gathered, any_rank
    generator = torch.Generator().manual_seed(5)
    batch = sample(alone, policy, ending_often(), prompts(6)[rank::world_size], ROOM, 1.0, generator,
                   per_prompt=4, tool=seen.tool)
    seen.next = torch.rand(1, generator=generator).item()
    return batch, seen


def test_a_conversation_is_what_is_sampled_turn_by_turn_and_its_mask_what_the_policy_said(policy):
    batch, seen = conversations(policy)
    tokenizer, generator = ending_often(), torch.Generator().manual_seed(5)
    numbers = [uniforms(24, ROOM, generator, torch.device("cpu")) for _ in range(TURNS)]
    reasons, asked = set(), 0
    for i, prompt in enumerate(batch.prompts):
        ids, mask, turns, ended, why = by_hand(policy, tokenizer, prompt, [own[i:i + 1] for own in numbers])
        reasons.add(why)
        # Of a reply that was cut off, or is the last that there may be, the tool hears nothing.
        asked += sum(turn["role"] == "assistant" for turn in turns) - (why in ("cut", "turns"))
        length = len(ids)
        assert batch.ids[i, :length].tolist() == ids and (batch.ids[i, length:] == tokenizer.pad).all()
        assert batch.mask[i, :length].tolist() == mask and not batch.mask[i, length:].any()
        assert batch.host_lengths[i] == batch.sizes[i] == length
        assert (batch.texts[i], batch.ended[i].item()) == (turns[-1]["content"], ended)
        assert batch.turns[i] == turns and batch.dialogues[i] == prompt.row.prompt + turns
        assert batch.room_taken()[i] == length - len(prompt.ids) <= ROOM
    assert reasons == {"cut", "turns", "over", "no room", "no room behind it"}
    assert sum(seen.tool.asked) == asked
    # What is trained of those that ended is a whole number of replies, each with its end token.
    gaps = batch.mask[:, 1:].int() - batch.mask[:, :-1].int()
    assert ((gaps == 1).sum(1) > 1).any()
    assert all(batch.ids[i, t].item() in tokenizer.stops for i, t in (gaps == -1).nonzero().tolist()
               if batch.ended[i] or batch.mask[i, t + 1:].any())


def test_conversations_are_the_same_on_one_rank_and_two_and_ranks_sample_equally_often(policy):
    whole, seen = conversations(policy)
    for rank in range(2):
        own, here = conversations(policy, rank, 2, flags=seen.flags)
        expected = [i for i in range(24) if i // 4 % 2 == rank]
        assert own.turns == [whole.turns[i] for i in expected]
        assert own.ended.tolist() == whole.ended[expected].tolist()
        assert here.gathered == seen.gathered and here.next == seen.next
    # A rank of which nothing goes on takes part in what the others sample.
    idle, here = conversations(policy, flags=[True] * 20, turns=20)
    assert here.gathered == 20 and not here.flags[-1] and 0 not in here.tool.asked
    assert idle.turns == conversations(policy, turns=20)[0].turns


def test_a_tool_that_answers_nothing_changes_nothing(policy):
    silent = lambda prompts, replies, *rest: [None] * len(replies)
    silent.turns = 3
    found, after = [], []
    for tool in (None, silent):
        generator = torch.Generator().manual_seed(2)
        found.append(sample(ranked(0, 1), policy, ending_often(), prompts(6), 8, 1.0, generator, per_prompt=2,
                            room=1, tool=tool))
        after.append(torch.rand(1, generator=generator).item())
    one, other = found
    for name in ("ids", "mask", "ended", "host_mask", "host_lengths"):
        assert getattr(one, name).equal(getattr(other, name)), name
    assert one.texts == other.texts and one.sizes == other.sizes and one.dialogues == other.dialogues
    assert one.room_taken().equal(one.mask.sum(1)) and after[0] == after[1]


def test_conversations_are_cut_into_passes_joined_and_shown_as_replies_are(policy):
    batch, _ = conversations(policy)
    alone, said = ranked(0, 1), []
    plan, = batch.plan(alone, [list(range(24))], 100)
    for part in batch.passes(alone, plan):
        logprobs, _ = policy(part.ids, part.where)  # (n, W)
        for row, i in enumerate(part.numbers):
            ids = batch.ids[i, :batch.sizes[i]]
            by_token = policy.logits(policy.transformer(ids[None]))[0].log_softmax(-1)  # (T, V)
            expected = [by_token[t - 1, ids[t]].item() for t in batch.mask[i].nonzero().flatten().tolist()]
            assert logprobs[row, part.where[row]].tolist() == pytest.approx(expected, abs=1e-4)
    both = join([batch, batch])
    assert both.turns == batch.turns * 2 and both.dialogues == batch.dialogues * 2
    alone.say = said.append
    batch.show(alone, number=1)
    expected = " -> ".join(repr(turn["content"]) for turn in batch.dialogues[0])
    assert said == [f"  sample: {expected}"]
