"""data.py against slow references and hand-written answers: ids and masks, pairs, batches."""
import itertools
import math
import random
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import toy
from data import describe, encode_dialogue, encode_prompt, encode_text, ranking_accuracy
from examples import CASES, PAIR, chat, user
from formats import sources as sources_file
from formats.rows import Row
from plumbing import ranks
from plumbing.flags import UserError
from tools import SILENT, write_rows


# -- dialogues and texts to ids and masks

TURNS = [
    ("system", "Be <|user|>."),
    ("user", "Hé"),
    ("assistant", "Ho<|endoftext|>"),
    ("user", "2?"),
    ("assistant", "Yes"),
]
DIALOGUE = [{"role": role, "content": text} for role, text in TURNS]
DIALOGUE_IDS = [
    258,
    *b"Be <|user|>.",
    259,
    *"Hé".encode(),
    260,
    *b"Ho<|endoftext|>",
    256,
    259,
    *b"2?",
    260,
    *b"Yes",
    256,
]
DIALOGUE_MASK = [0] * 13 + [0] * 4 + [0] + [1] * 16 + [0] * 3 + [0] + [1] * 4


@pytest.mark.case(22, 23)
def test_template_written_out_by_hand_masks_replies_and_their_end_tokens_only(tokenizer):
    ids, mask = encode_dialogue(tokenizer, DIALOGUE)
    assert ids == DIALOGUE_IDS and mask == [bool(m) for m in DIALOGUE_MASK]
    assert [i for i, m in zip(ids, mask) if m] == [*b"Ho<|endoftext|>", 256, *b"Yes", 256]


@pytest.mark.parametrize("turns", [2, 3, 5])
def test_a_dialogue_is_its_prompt_and_its_reply_end_to_end(tokenizer, turns):
    messages = [m for m in DIALOGUE if turns > 2 or m["role"] != "system"][:turns]
    *prompt, reply = messages
    prompt_ids, reply_ids = encode_prompt(tokenizer, prompt), [*reply["content"].encode(), 256]
    ids, mask = encode_dialogue(tokenizer, messages)
    assert ids == prompt_ids + reply_ids
    assert mask[len(prompt_ids):] == [True] * len(reply_ids) and not mask[len(prompt_ids) - 1]


def test_describe_brackets_what_the_mask_selects(tokenizer):
    text = describe(tokenizer, *encode_dialogue(tokenizer, DIALOGUE[2:]))
    assert text == "<|assistant|>[[Ho<|endoftext|><|endoftext|>]]<|user|>2?<|assistant|>[[Yes<|endoftext|>]]"


def test_plain_text_stands_between_document_tokens_and_counts_from_its_first_token(tokenizer):
    assert encode_text(tokenizer, "Hé<|pad|>") == ([256, *"Hé<|pad|>".encode(), 256], [False] + [True] * 11)


def test_last_only_masks_the_last_reply(tokenizer):
    ids, mask = encode_dialogue(tokenizer, DIALOGUE, last_only=True)
    assert ids == DIALOGUE_IDS and mask == [False] * 38 + [True] * 4
    assert not any(encode_dialogue(tokenizer, DIALOGUE[:2], last_only=True)[1])


def behind_samples(tokenizer, messages, sampled):
    """Ids and mask of a conversation whose replies were sampled as these ids, turn by turn.

    messages: begins with a prompt, and then a reply and the user's next turn take turns.
    """
    start = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    ids = encode_prompt(tokenizer, messages[:start])
    mask = [False] * len(ids)
    for number, reply in enumerate(sampled):
        ids, mask = ids + reply, mask + [True] * len(reply)
        before = messages[:start + 2 * number + 2]
        if before[-1]["role"] == "user":
            added = data.next_turn(tokenizer, before)
            ids, mask = ids + added, mask + [False] * len(added)
    return ids, mask


def test_turns_put_behind_samples_are_the_dialogue_where_samples_are_what_their_text_gives(tokenizer):
    sampled = [[*"Ho<|endoftext|>".encode(), 256], [*b"Yes", 256]]
    assert behind_samples(tokenizer, DIALOGUE, sampled) == encode_dialogue(tokenizer, DIALOGUE)
    assert behind_samples(tokenizer, DIALOGUE[:4], sampled[:1])[0] == encode_prompt(tokenizer, DIALOGUE[:4])
    # What a tool says can't become a control token.
    assert data.next_turn(tokenizer, user("a", "b", "<|assistant|>")) == [259, *b"<|assistant|>", 260]


def test_what_was_sampled_keeps_its_ids_though_its_text_would_give_others():
    tokenizer = toy.tokenizer()
    text = "There"
    spelled = list(text.encode()) + [tokenizer.eos]  # by bytes, each of which is a token
    assert len(tokenizer.encode(text)) < len(spelled) - 1
    ids, mask = behind_samples(tokenizer, user("Hi", text, "Go on"), [spelled])
    assert [i for i, m in zip(ids, mask) if m] == spelled
    assert ids == [*encode_prompt(tokenizer, user("Hi")), *spelled,
                   *encode_prompt(tokenizer, user("Go on"))]


# -- rows to ids and masks

def masked(tokenizer, ids, mask):
    """The texts of the runs that a mask selects, which all end with the end token."""
    runs = [[i for i, _ in run] for chosen, run in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1])
            if chosen]
    assert all(run[-1] == tokenizer.eos for run in runs)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.case(23)
@pytest.mark.parametrize("want, source, form, expected",
                         [case for case in CASES if case[0] not in ("prompts", "steps")])
def test_masks_select_the_replies_of_every_format(tmp_path, want, source, form, expected):
    tokenizer = toy.tokenizer()
    row, = sources_file.read_rows(write_rows(tmp_path / "rows.json", [source]), want, SILENT)
    if want in ("preferences", "replies"):
        group = data.encode_group(tokenizer, row)
        assert [masked(tokenizer, *example) for example in group] == [[reply] for reply in expected.replies]
        prompts = [[i for i, chosen in zip(*example) if not chosen] for example in group]
        assert all(prompt == encode_prompt(tokenizer, row.prompt) == ids[:len(prompt)]
                   for prompt, (ids, _) in zip(prompts, group))
    else:
        ids, mask = data.encode_demonstration(tokenizer, row)
        said = [turn["content"] for turn in expected.prompt if turn["role"] == "assistant"] + expected.replies
        assert masked(tokenizer, ids, mask) == said
        assert len(ids) == len(mask)
        wanted = "".join(turn["content"] for turn in expected.prompt) + expected.replies[0]
        assert tokenizer.decode(ids) == wanted


@pytest.mark.case(20, 22)
@pytest.mark.parametrize("limit", [2, 3, 7, 10, 11, 12, 100])
def test_plain_text_is_cut_into_pieces_that_count_every_token_once(limit):
    tokenizer, said = toy.tokenizer(), []
    rows = [Row([], ["abcdefghij"], [0]), Row(user("a"), ["b"], [0]), Row(user("a" * 200), ["b"], [0]),
            Row([], ["Another <|endoftext|> text."], [0])]
    if limit < 5:
        rows = [rows[0], rows[3]]
    examples = data.encode_demonstrations(tokenizer, rows, limit, said.append)
    assert all(2 <= len(ids) <= limit and len(ids) == len(mask) for ids, mask in examples)
    pieces = examples[1:] if limit >= 5 else examples
    for row in (rows[0], rows[-1]):
        whole, counted = data.encode_demonstration(tokenizer, row)
        tokens, count = [], []
        while len(tokens) < len(whole) - 1:
            ids, mask = pieces.pop(0)
            assert mask == [False] + counted[len(tokens) + 1:len(tokens) + len(ids)]
            assert ids[0] == whole[len(tokens)]
            tokens += ids[1:]
            count += mask[1:]
        assert tokens == whole[1:] and count == counted[1:] and all(count)
    assert not pieces
    assert any("dropped 1 of 2 rows" in line for line in said) == (limit >= 5)
    assert any("cut 2 plain texts" in line for line in said) == (limit < 20)


@pytest.mark.case(20)
def test_demonstrations_that_fit_come_as_they_are_and_none_is_no_error():
    tokenizer = toy.tokenizer()
    rows = [Row(user("a", "b", "c"), ["d"], [0]), Row(user("e"), ["f"], [0])]
    expected = [data.encode_demonstration(tokenizer, row) for row in rows]
    assert data.encode_demonstrations(tokenizer, rows, 50, SILENT) == expected
    assert data.encode_demonstrations(tokenizer, [], 50, SILENT) == []
    with pytest.raises(UserError, match="every row is longer"):
        data.encode_demonstrations(tokenizer, rows, 3, SILENT)


def test_preference_groups_take_the_part_and_hold_prompts_out(tmp_path):
    tokenizer, said = toy.tokenizer(), []
    pairs = [PAIR | {"prompt": f"Cube {i}."} for i in range(300)]
    path = write_rows(tmp_path / "a.jsonl", [*pairs, PAIR | {"prompt": "Cube 4." * 99}])
    config = SimpleNamespace(
        data=str(path), val_data="", val_fraction=0.2, skip_bad=False, part="1/2:2", seed=0)
    train, val = data.preference_groups(config, tokenizer, 60, said.append)
    rows = [row for row, _ in train + val]
    assert 160 < len(rows) < 240
    assert 20 < len(val) < 60
    assert not {row.text for row, _ in train} & {row.text for row, _ in val}
    assert all(group == data.encode_group(tokenizer, row) for row, group in train + val)
    expected = sources_file.read_rows(path, "preferences", SILENT, "1/2:2")
    assert {row.text for row in rows} == {row.text for row in expected if len(row.text) < 99}
    config.val_data, config.part = str(path), ""
    train, val = data.preference_groups(config, tokenizer, 60, said.append)
    assert len(train) == len(val) == 300
    few = write_rows(tmp_path / "few.jsonl", [PAIR, PAIR | {"prompt": "Cube 5."}])
    config.data, config.val_data, config.val_fraction, config.part = str(few), "", 1e-6, ""
    data.preference_groups(config, tokenizer, 60, said.append)
    assert any("warning: --val-fraction 1e-06 holds out none of these 2 rows" in line for line in said)


@pytest.mark.case(20)
@pytest.mark.parametrize("seed", range(6))
def test_no_example_is_longer_than_the_context_and_none_is_without_a_token_to_train_on(seed, tmp_path):
    tokenizer, rng, said = toy.tokenizer(), random.Random(seed), []
    limit = rng.choice([12, 20, 30])
    text = lambda: " ".join(rng.choice(["a", "river", "of", "12"]) for _ in range(rng.randint(1, limit // 2)))
    rows = [
        Row(user(*(text() for _ in range(rng.choice([1, 1, 3])))), [text() for _ in range(2)], [0, 1])
        for _ in range(200)
    ]
    lengths = [len(data.encode_demonstration(tokenizer, row)[0]) for row in rows]
    rows += [Row([], [text() * rng.randint(1, 6)], [0]) for _ in range(20)]
    assert {limit - 1, limit, limit + 1} <= set(lengths)
    examples = data.encode_demonstrations(tokenizer, rows, limit, said.append)
    kept = sum(length <= limit for length in lengths)
    assert f"dropped {200 - kept} of 200 rows" in said[0] and len(examples) >= kept + 20
    assert all(len(ids) == len(mask) <= limit and any(mask) and not mask[0] for ids, mask in examples)
    # Whole, not cut.
    assert examples[:kept] == [
        data.encode_demonstration(tokenizer, row) for row, length in zip(rows, lengths) if length <= limit
    ]
    pairs = []
    for row in rows[:200]:
        prompt = chat(*(turn["content"] for turn in row.prompt))
        pairs.append({"prompt": prompt, "chosen": row.replies[0], "rejected": row.replies[1] + " !"})
    path = write_rows(tmp_path / "a.jsonl", pairs)
    config = SimpleNamespace(data=str(path), val_data="", val_fraction=0.2, skip_bad=False, part="", seed=0)
    train, val = data.preference_groups(config, tokenizer, limit, SILENT)
    assert all(len(ids) <= limit and any(mask) for _, group in train + val for ids, mask in group)
    fitting = [
        row.text for row in sources_file.read_rows(path, "preferences", SILENT)
        if max(len(ids) for ids, _ in data.encode_group(tokenizer, row)) <= limit
    ]
    assert sorted(row.text for row, _ in train + val) == sorted(fitting) and 0 < len(fitting) < 200


# -- ranked pairs and their accuracy

def test_ranked_pairs_equal_a_slow_loop_and_each_row_weighs_one():
    rng = random.Random(0)
    sizes = [0, 1, 2, 5, 7] * 4
    rows = [
        Row([], [], [rng.randrange(4) for _ in range(k)] + [0, 9], margin=float(i))
        for i, k in enumerate(sizes)
    ]
    expected, position = [], 0
    for row in rows:
        pairs = [(a, b) for a in range(len(row.ranks)) for b in range(len(row.ranks))
                 if row.ranks[a] < row.ranks[b]]
        expected += [(position + a, position + b, 1 / len(pairs), row.margin) for a, b in pairs]
        position += len(row.ranks)
    better, worse, weight, margin = data.ranked_pairs(rows)
    got = list(zip(better.tolist(), worse.tolist(), weight.tolist(), margin.tolist()))
    assert len(got) == len(expected)
    assert all(g == pytest.approx(e) for g, e in zip(sorted(got), sorted(expected)))
    for i in range(len(rows)):
        assert weight[margin == i].sum().item() == pytest.approx(1)


def test_the_interval_of_an_accuracy_is_over_prompts_and_does_not_collapse():
    """Wilson's for 34 of 34 is 0.8985 to 1 (by hand: 1 / (1 + 1.96^2 / 34)); the same prompt again and again
    is one trial."""
    prompts = [[{"role": "user", "content": str(i)}] for i in range(34)]
    rows = [Row(prompt, ["a", "b"], [0, 1]) for prompt in prompts]
    scores = torch.tensor([1.0, 0.0] * 34).numpy()
    assert ranking_accuracy(scores, rows) == pytest.approx((1, 34 / (34 + 1.96**2), 1))
    assert ranking_accuracy(-scores, rows) == pytest.approx((0, 0, 1.96**2 / (34 + 1.96**2)))
    again = [row for row in rows for _ in range(5)]
    expected = pytest.approx((34 / (34 + 1.96**2), 1))
    assert ranking_accuracy(torch.tensor([1.0, 0.0] * 170).numpy(), again)[1:] == expected
    one = [Row(prompts[0], ["a", "b"], [0, 1])] * 34
    assert ranking_accuracy(scores, one)[1] == pytest.approx(1 / (1 + 1.96**2))
    half = torch.tensor([1.0, 0.0] * 17 + [0.0, 1.0] * 17).numpy()
    accuracy, low, high = ranking_accuracy(half, rows)  # 17 of 34 by Wilson, but for 33 in place of 34
    assert (accuracy, low) == pytest.approx((0.5, 1 - high))
    assert high - 0.5 == pytest.approx(0.5 * 1.96 / math.sqrt(33 + 1.96**2), rel=1e-6)


def test_one_long_prompt_costs_an_accuracy_no_memory():
    """As an array of text, these prompts would take 2 GB."""
    rows = [
        Row([{"role": "user", "content": "x" * (100_000 if i == 0 else 10) + str(i)}], ["a", "b"], [0, 1])
        for i in range(5000)
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert ranking_accuracy(np.arange(10_000.0), rows)[0] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("prompts, right, k", [(34, 0.97, 2), (40, 0.85, 4), (100, 0.6, 2)])
def test_the_interval_of_an_accuracy_holds_the_truth_in_19_of_20_cases(prompts, right, k):
    """Prompts differ in how hard they are, and have one to three rows each; a row's pairs hang together."""
    rng = np.random.default_rng(0)
    hit = 0
    for _ in range(400):
        rows, values = [], []
        for i in range(prompts):
            hard = rng.beta(4 * right, 4 * (1 - right))
            for _ in range(rng.integers(1, 4)):
                rows.append(
                    Row([{"role": "user", "content": str(i)}], [str(j) for j in range(k)], list(range(k))))
                values += list(-np.arange(k)) if rng.random() < hard else list(np.arange(k))
        accuracy, low, high = ranking_accuracy(np.array(values, float), rows)
        hit += low <= right <= high
        assert low <= accuracy <= high
    assert hit / 400 > 0.92


# -- batches

@pytest.mark.case(20)
def test_drop_long_keeps_up_to_the_limit_and_says_how_many_went():
    said = []
    assert data.drop_long("abcd", [3, 4, 5, 1], 4, said.append) == ["a", "b", "d"]
    assert len(said) == 1 and "dropped 1 of 4" in said[0] and "5" in said[0]
    assert data.drop_long("ab", [4, 4], 4, said.append) == ["a", "b"] and len(said) == 1
    with pytest.raises(UserError, match="the 4 tokens that the context leaves"):
        data.drop_long("a", [5], 4, said.append)


@pytest.mark.parametrize("seed", range(20))
def test_token_batches_hold_every_example_once_within_the_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = np.ceil(rng.lognormal(3, 0.8, rng.integers(1, 900))).astype(int).tolist()
    batches = data.token_batches(lengths, 256, seed, 3)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= 256 or len(batch) == 1
    assert batches == data.token_batches(lengths, 256, seed, 3)
    if len(lengths) > 300:  # several windows: another epoch or seed puts others together
        others = [data.token_batches(lengths, 256, seed + 1, 3), data.token_batches(lengths, 256, seed, 4)]
        for other in others:
            assert len(set(map(frozenset, batches)) & set(map(frozenset, other))) < len(batches) / 2


def test_token_batches_lose_no_example_at_the_edge_of_a_window():
    for n in range(1, 100):
        assert sorted(i for batch in data.token_batches([4] * n, 8, 0, 0) for i in batch) == list(range(n))


def padding_share(batches, lengths):
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / padded


def test_token_batches_waste_a_quarter_of_the_padding_of_a_random_order_and_still_mix():
    rng = np.random.default_rng(0)
    lengths = np.ceil(rng.lognormal(3.5, 0.7, 3000)).astype(int).tolist()
    batches = data.token_batches(lengths, 2048, 0, 0)
    at_random = ranks.micro_batches(rng.permutation(3000), lengths, 2048)
    assert padding_share(batches, lengths) < padding_share(at_random, lengths) / 4
    # Like batches must not follow each other.
    means = [np.mean([lengths[i] for i in batch]) for batch in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


@pytest.mark.parametrize("start", [0, 1, 7, 20, 33, 61])
def test_endless_batches_resume_where_they_were(start):
    lengths = [3, 9, 4, 4, 8, 2, 7, 5, 6, 1] * 4
    epochs = [data.token_batches(lengths, 20, 5, epoch) for epoch in range(12)]
    expected = [batch for batches in epochs for batch in batches]
    assert len(expected) > 61 + 60  # of which each start below needs 60
    wanted = expected[start:start + 60]
    assert list(itertools.islice(data.endless_batches(lengths, 20, 5, start), 60)) == wanted


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 20])
def test_endless_order_is_one_permutation_after_another_and_resumes(start):
    whole = list(itertools.islice(data.endless_order(7, 3), 60))
    epochs = [whole[i:i + 7] for i in range(0, 56, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) > 5
    assert list(itertools.islice(data.endless_order(7, 3, start), 30)) == whole[start:start + 30]
    assert list(itertools.islice(data.endless_order(7, 4), 60)) != whole


def one_rank():
    return ranks.Ranks()


@pytest.mark.parametrize("seed", range(5))
def test_no_piece_and_no_batch_of_prompts_with_many_and_few_replies_is_beyond_the_budget(seed):
    """Two replies of 90 tokens beside nine of 20 are eleven rows of 90."""
    rng = random.Random(seed)
    lengths = [rng.choice([5, 20, 90, 200]) for _ in range(300)]
    rows = [rng.choice([2, 4, 9]) for _ in range(300)]
    cuts = {
        "micro_batches": ranks.micro_batches(range(300), lengths, 2000, rows),
        "by_length": ranks.by_length(range(300), lengths, 2000, rows),
        "token_batches": data.token_batches(lengths, 2000, seed, 0, rows),
        "split": one_rank().split(range(300), lengths, 2000, rows),
    }
    cuts["split"] = [piece for piece, weight in cuts["split"] if weight]
    for name, pieces in cuts.items():
        assert sorted(i for piece in pieces for i in piece) == list(range(300)), name
        sizes = [sum(rows[i] for i in piece) * max(lengths[i] for i in piece) for piece in pieces]
        assert max(sizes) <= 2000 and sum(sizes) > 0.4 * 2000 * len(sizes), name


def test_collate_pads_on_the_right_with_mask_false():
    ids, mask, lengths = data.collate([([5, 6, 7], [False, True, True]), ([8], [False])], 9, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and ids.dtype == torch.int64
    assert mask.tolist() == [[False, True, True], [False, False, False]] and mask.dtype == torch.bool
    assert lengths.tolist() == [3, 1]
