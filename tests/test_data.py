"""tokenizer.py, data.py and toy.py against slow references and hand-written answers."""
import collections
import gzip
import itertools
import json
import random
import re

import numpy as np
import pytest
import tiktoken
import torch

import data
import toy
from data import Row
from runtime import UserError
from tokenizer import CONTROLS, Tokenizer, describe, encode_dialogue, encode_prompt, encode_reply, train_bpe

ODD_TEXTS = ["", " ", "a", "\n\n \t\r\n", "e\u0301", "naïve café", "日本語、中文。", "👩‍👩‍👧‍👦 🏳️‍🌈",
             "\u202eright to left", "\x00\x1c\x7f", "a  b   c ", "$1,234.56 isn't 2e-3", "Human: a\n\nHuman: b", "[[ ]] \\n"]
SILENT = lambda text: None


@pytest.fixture
def tokenizer():
    """Every byte is a token and nothing else is, so that ids can be written down by hand."""
    return Tokenizer("bytes", r"\s+|\S+", {bytes([b]): b for b in range(256)})


def random_texts(number, seed=0):
    """Strings in which pieces of control tokens, ordinary words and odd characters meet at random."""
    rng = random.Random(seed)
    pieces = [*CONTROLS, "<|", "|>", "<", "|", "endoftext", " ", "\n", "é", "🙂", "word"]
    return ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(number)]


# ---------------------------------------------------------------------------------------------------------
# Tokenizer

@pytest.mark.parametrize("make", ["bytes", "trained", "toy"])
def test_any_text_survives_encode_and_decode_and_never_gives_a_control_id(make, tokenizer):
    if make == "toy":
        tokenizer = toy.tokenizer()
    elif make == "trained":
        tokenizer = Tokenizer("trained", *train_bpe(ODD_TEXTS * 3 + list(CONTROLS) * 9, 400))
    for text in ODD_TEXTS + list(CONTROLS) + random_texts(300):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < len(tokenizer.ranks) for i in ids)
        assert b"".join(tokenizer.encoding.decode_single_token_bytes(i) for i in ids) == text.encode()


def test_control_ids_follow_the_ranks_and_are_left_out_when_decoding(tokenizer):
    t = tokenizer
    assert (t.eos, t.pad, t.system, t.user, t.assistant, t.n_vocab) == (256, 257, 258, 259, 260, 261)
    assert t.decode([t.user, *b"Hi", t.eos, t.pad]) == "Hi"
    assert [t.show(i) for i in (t.eos, t.pad, t.system, t.user, t.assistant, ord("a"))] == [*CONTROLS, "a"]


def test_a_saved_tokenizer_loads_as_the_same(tmp_path):
    before = Tokenizer("trained", *train_bpe(["low lower lowest naïve", "new newer 日本"], 280))
    before.save(tmp_path / "bpe.json")
    after = Tokenizer.load(tmp_path / "bpe.json")
    assert vars(after) | {"encoding": 0} == vars(before) | {"encoding": 0}
    assert all(after.encode(text) == before.encode(text) for text in ODD_TEXTS + ["lowest newer naïve"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x"}', '{"name": "x", "pattern": "a", "ranks": ["?"]}'])
def test_a_damaged_tokenizer_file_is_named(tmp_path, text):
    (tmp_path / "bpe.json").write_text(text)
    with pytest.raises(UserError, match="bpe.json is damaged"):
        Tokenizer.load(tmp_path / "bpe.json")


def test_gpt2_without_cache_or_network_says_what_to_do(monkeypatch):
    def offline(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.named("gpt2")


def slow_merge(parts, pair):
    out = []
    for part in parts:
        if out and (out[-1], part) == pair and not merged:
            out[-1], merged = out[-1] + part, True  # what was just merged can't be the left half of the same pair
        else:
            out, merged = out + [part], False
    return out


def slow_bpe(texts, n_vocab, pattern):
    """Byte-pair encoding, straight from its definition: count all pairs of the whole text anew for every merge."""
    corpus = [[bytes([b]) for b in piece.encode()] for text in texts for piece in re.findall(pattern, text)]
    vocabulary, merges = [bytes([b]) for b in range(256)], []
    while len(vocabulary) < n_vocab:
        pairs = [pair for parts in corpus for pair in zip(parts, parts[1:])]
        if not pairs:
            break
        most = max(pairs.count(pair) for pair in set(pairs))
        merges.append(min(pair for pair in set(pairs) if pairs.count(pair) == most))
        vocabulary.append(b"".join(merges[-1]))
        corpus = [slow_merge(parts, merges[-1]) for parts in corpus]
    return vocabulary, merges


@pytest.mark.parametrize("texts, n_vocab", [
    (["low lower lowest, new newer newest; wide wider widest 10 100 1000"] * 2, 290),
    (["the then cat car cab can cap" + 9 * " the", "the"], 275),  # how often a word comes counts
    (["aaaaaaa aaa aaaaa abababab", "日本 日本語 naïve"], 300),  # overlaps, several bytes a letter, and more room than pairs
])
def test_train_bpe_equals_the_naive_algorithm_and_repeats(texts, n_vocab):
    pattern, ranks = train_bpe(texts, n_vocab)
    vocabulary, merges = slow_bpe(texts, n_vocab, pattern)
    assert ranks == {token: i for i, token in enumerate(vocabulary)}
    assert (pattern, ranks) == train_bpe(texts, n_vocab)
    tokenizer = Tokenizer("t", pattern, ranks)
    for text in texts + ["the lowest newt waa", "aaaa ba 本語"]:
        expected = []
        for piece in re.findall(pattern, text):
            parts = [bytes([b]) for b in piece.encode()]
            for pair in merges:
                parts = slow_merge(parts, pair)
            expected += [ranks[part] for part in parts]
        assert tokenizer.encode(text) == expected


# ---------------------------------------------------------------------------------------------------------
# Template

TURNS = [("system", "Be <|user|>."), ("user", "Hé"), ("assistant", "Ho<|endoftext|>"), ("user", "2?"), ("assistant", "Yes")]
DIALOGUE = [{"role": role, "content": text} for role, text in TURNS]
DIALOGUE_IDS = [258, *b"Be <|user|>.", 259, *"Hé".encode(), 260, *b"Ho<|endoftext|>", 256, 259, *b"2?", 260, *b"Yes", 256]
DIALOGUE_MASK = [0] * 13 + [0] * 4 + [0] + [1] * 16 + [0] * 3 + [0] + [1] * 4


def test_template_written_out_by_hand_masks_replies_and_their_end_tokens_only(tokenizer):
    ids, mask = encode_dialogue(tokenizer, DIALOGUE)
    assert ids == DIALOGUE_IDS and mask == [bool(m) for m in DIALOGUE_MASK]
    assert [i for i, m in zip(ids, mask) if m] == [*b"Ho<|endoftext|>", 256, *b"Yes", 256]


@pytest.mark.parametrize("turns", [2, 3, 5])
def test_a_dialogue_is_its_prompt_and_its_reply_end_to_end(tokenizer, turns):
    messages = [m for m in DIALOGUE if turns > 2 or m["role"] != "system"][:turns]
    *prompt, reply = messages
    prompt_ids, reply_ids = encode_prompt(tokenizer, prompt), encode_reply(tokenizer, reply["content"])
    ids, mask = encode_dialogue(tokenizer, messages)
    assert ids == prompt_ids + reply_ids
    assert mask[len(prompt_ids):] == [True] * len(reply_ids) and not mask[len(prompt_ids) - 1]
    other_reply = "Other"
    group = data.encode_group(tokenizer, Row(prompt, [reply["content"], other_reply]))
    assert [i for i, _ in group] == [ids, prompt_ids + [*b"Other", 256]]
    assert [m for _, m in group] == [[False] * len(prompt_ids) + [True] * n for n in (len(reply_ids), 6)]


def test_describe_brackets_what_the_mask_selects(tokenizer):
    text = describe(tokenizer, *encode_dialogue(tokenizer, DIALOGUE[2:]))
    assert text == "<|assistant|>[[Ho<|endoftext|><|endoftext|>]]<|user|>2?<|assistant|>[[Yes<|endoftext|>]]"


# ---------------------------------------------------------------------------------------------------------
# Readers

def user(text):
    return [{"role": "user", "content": text}]


ALPACA = {"instruction": " Cube it. ", "input": "4", "output": "64\n"}
DOLLY = {"instruction": "Cube it.", "context": "", "response": "64", "category": "maths"}
RATED = {"output": "It is 64.", "rejected": "Obviously 64.", "input": "", "instruction": "Cube 4.", "chosen": "It is 64."}
PAIR = {"prompt": "Cube 4.", "chosen": "64", "rejected": "65", "margin": 2}
RANKING = {"prompt": "Cube 4.", "completions": ["65", " 64", "?", "63"], "ranks": [1, 0, 2, 1], "gold": [-1, 1, -0.5, -1]}
HH_START = "\n\nHuman: Who? He said Human: me.\nHuman: and\n\nAssistant: You.\n\nHuman:Why?\n\nAssistant:"
HH = {"chosen": HH_START + " I don’t know.", "rejected": HH_START + " Ask Assistant: him."}
HH_PROMPT = user("Who? He said Human: me.\nHuman: and") + [{"role": "assistant", "content": "You."}] + user("Why?")


@pytest.mark.parametrize("want, source, expected", [
    ("demonstrations", ALPACA, Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", DOLLY, Row(user("Cube it."), ["64"], [0])),
    ("demonstrations", DOLLY | {"context": "4"}, Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", RATED | {"output": "Other."}, Row(user("Cube 4."), ["Other."], [0])),
    ("demonstrations", PAIR, Row(user("Cube 4."), ["64"], [0], 2.0)),
    ("demonstrations", RANKING, Row(user("Cube 4."), ["64"], [0])),
    ("demonstrations", HH, Row(HH_PROMPT, ["I don’t know."], [0])),
    ("preferences", RATED, Row(user("Cube 4."), ["It is 64.", "Obviously 64."], [0, 1])),
    ("preferences", PAIR, Row(user("Cube 4."), ["64", "65"], [0, 1], 2.0)),
    ("preferences", RANKING, Row(user("Cube 4."), ["65", "64", "?", "63"], [1, 0, 2, 1], 0.0, [-1, 1, -0.5, -1])),
    ("preferences", HH, Row(HH_PROMPT, ["I don’t know.", "Ask Assistant: him."], [0, 1])),
    ("prompts", {"prompt": "Cube 4.", "chosen": None}, Row(user("Cube 4."))),
    ("prompts", {"instruction": "Cube it.", "input": "4"}, Row(user("Cube it.\n\n4"))),
    ("prompts", ALPACA, Row(user("Cube it.\n\n4"))),
    ("prompts", RANKING, Row(user("Cube 4."))),
    ("prompts", HH, Row(HH_PROMPT)),
])
def test_every_format_is_recognised_and_read_as_the_right_row(tmp_path, want, source, expected):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([source]))
    assert data.read_rows(path, want, SILENT) == [expected]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rows_are_the_same_in_every_kind_of_file(tmp_path, name, bom, newline):
    sources = [ALPACA, ALPACA | {"output": "a\u2028b\u0085c"}, ALPACA | {"output": "日本"}]
    if name == "rows.json":
        text = json.dumps(sources, ensure_ascii=False, indent=1)
    else:
        text = "\n" + "\n\n  \n".join(json.dumps(source, ensure_ascii=False) for source in sources) + "\n\n"
    raw = bom + text.replace("\n", newline).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    rows = data.read_rows(tmp_path / name, "demonstrations", SILENT)
    assert [row.replies for row in rows] == [["64"], ["a\u2028b\u0085c"], ["日本"]]


def test_unusable_rows_are_dropped_counted_and_said(tmp_path):
    turn = "\n\nHuman: Hi\n\nAssistant: Yes"
    sources = [HH, {"chosen": turn, "rejected": "\n\nHuman: Ho\n\nAssistant: No"},  # prompts differ
               {"chosen": turn, "rejected": "\n\nHuman: Hi\n\nAssistant: "},  # empty
               {"chosen": turn, "rejected": turn + "\n"},  # equal
               {"chosen": turn + "\n\nAssistant: No", "rejected": turn}, {"chosen": "\n\nAssistant: No", "rejected": turn},
               {"chosen": turn + "\n\nHuman: Bye", "rejected": turn}, {"chosen": "Say" + turn, "rejected": turn},
               {"chosen": "x", "rejected": turn}, PAIR | {"prompt": " "}, RANKING | {"ranks": [1, 1, 1, 1]},
               RANKING | {"ranks": [1]}, RANKING | {"completions": ["a"], "ranks": [1]},
               RANKING | {"completions": ["a", "", "b", "c"]}, RANKING | {"completions": ["a", "a", "b", "c"], "gold": None}]
    path, said = tmp_path / "rows.jsonl", []
    path.write_text("\n".join(map(json.dumps, sources)))
    rows = data.read_rows(path, "preferences", said.append)
    assert [row.replies[0] for row in rows] == ["I don’t know.", "a"]
    assert len(said) == 1 and f"{len(sources)} rows (transcripts, pair, ranking), 2 kept as preferences" in said[0]
    counts = dict((reason, int(n)) for n, reason in re.findall(r"dropped (\d+): ([^;]+)", said[0]))
    assert counts == {"prompts differ": 1, "empty reply": 2, "chosen equals rejected": 1, "roles don't alternate": 2,
                      "empty prompt": 1, "transcript doesn't end with the assistant": 3, "all replies tied": 1,
                      "completions and ranks don't match, or fewer than two": 2}


GOOD = json.dumps(PAIR).encode()
ZIPPED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize("name, raw, want, message", [
    ("a.jsonl", GOOD + b"\n\n{bad\n", "preferences", r":3 is not valid JSON"),
    ("a.json", b"[\n" + GOOD + b",\n{bad\n]", "preferences", r":3 is not valid JSON"),
    ("a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\n\xff", "preferences", r":2 is not UTF-8"),
    ("a.jsonl", GOOD + b"\n" + GOOD + b'\n{"prompt": "\xe9"}', "preferences", r":3 is not UTF-8"),
    ("a.json", b"", "preferences", r":1 is not valid JSON"),
    ("a.jsonl", b" \n\n", "preferences", r" holds no usable row"),
    ("a.json", b"[]", "prompts", r" holds no usable row"),
    ("a.json", GOOD, "preferences", r" holds no array of rows"),
    ("a.jsonl", GOOD + b"\n7", "preferences", r":2 is not a JSON object"),
    ("a.json", b"[" + GOOD + b", []]", "preferences", r", row 2 is not a JSON object"),
    ("a.json", b"[" + GOOD + b', {"question": "x", "answer": "y"}]', "preferences",
     r", row 2 doesn't hold .* chosen and rejected; .* question, answer"),
    ("a.jsonl", b"{}", "prompts", r":1 doesn't hold a prompt"),
    ("a.jsonl", json.dumps(ALPACA).encode(), "preferences",
     r":1 doesn't hold .* chosen and rejected; .* instruction, input, output"),
    ("a.jsonl", b'{"prompt": "x"}', "demonstrations", r":1 doesn't hold a prompt and a reply"),
    ("a.jsonl", GOOD + b'\n{"prompt": 5, "chosen": "a", "rejected": "b"}', "preferences", r":2: the prompt is not a string"),
    ("a.jsonl", b'{"prompt": "x", "chosen": ["a"], "rejected": "b"}', "preferences", r":1: a reply .* not a string"),
    ("a.jsonl", b'{"chosen": 5, "rejected": "b"}', "preferences", r":1: "),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", "b"], "ranks": ["1", "2"]}', "preferences", r":1: a rank, a gold score or the margin is not"),
    ("a.jsonl", b'{"prompt": "x", "completions": "ab", "ranks": [0, 1]}', "preferences", r":1: "),
    ("a.jsonl", GOOD.replace(b"2}", b'"2"}'), "preferences", r":1: a rank, a gold score or the margin is not a finite number"),
    ("a.txt", GOOD, "preferences", r": only \.json, \.jsonl and \.jsonl\.gz"),
    ("a.jsonl.gz", GOOD, "preferences", r" can't be read"),
    ("a.jsonl.gz", ZIPPED[:-9], "preferences", r" can't be read"),
    ("a.jsonl.gz", ZIPPED[:10] + b"\xff" * 50, "preferences", r" can't be read"),
    ("missing.json", None, "preferences", r": no such file"),
], ids=lambda value: "" if isinstance(value, bytes) else None)
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path, name, raw, want, message):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=re.escape(name) + message):
        data.read_rows(tmp_path / name, want, SILENT)


# ---------------------------------------------------------------------------------------------------------
# Splits, pairs, batches

def test_split_keeps_a_prompt_on_one_side_whatever_the_order():
    rows = [Row(user(f"question {i % 3000}"), [str(i)]) for i in range(4000)]
    train, heldout = data.split_by_prompt(rows, 0.1)
    assert sorted(int(row.replies[0]) for row in train + heldout) == list(range(4000))
    assert not {row.text for row in train} & {row.text for row in heldout}
    assert 0.08 < len({row.text for row in heldout}) / 3000 < 0.12  # 3.6 standard deviations
    assert data.split_by_prompt(rows[::-1], 0.1) == (train[::-1], heldout[::-1])
    assert data.split_by_prompt(rows, 0.0) == (rows, []) and data.split_by_prompt(rows, 1.0) == ([], rows)


def test_ranked_pairs_equal_a_slow_loop_and_each_row_weighs_one():
    rng = random.Random(0)
    sizes = [0, 1, 2, 5, 7] * 4
    rows = [Row([], [], [rng.randrange(4) for _ in range(k)] + [0, 9], margin=float(i)) for i, k in enumerate(sizes)]
    expected, position = [], 0
    for row in rows:
        pairs = [(a, b) for a in range(len(row.ranks)) for b in range(len(row.ranks)) if row.ranks[a] < row.ranks[b]]
        expected += [(position + a, position + b, 1 / len(pairs), row.margin) for a, b in pairs]
        position += len(row.ranks)
    better, worse, weight, margin = data.ranked_pairs(rows)
    got = list(zip(better.tolist(), worse.tolist(), weight.tolist(), margin.tolist()))
    assert len(got) == len(expected) and all(g == pytest.approx(e) for g, e in zip(sorted(got), sorted(expected)))
    for i in range(len(rows)):
        assert weight[margin == i].sum().item() == pytest.approx(1)


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
        for other in (data.token_batches(lengths, 256, seed + 1, 3), data.token_batches(lengths, 256, seed, 4)):
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
    at_random = data.micro_batches(rng.permutation(3000), lengths, 2048)
    assert padding_share(batches, lengths) < padding_share(at_random, lengths) / 4
    means = [np.mean([lengths[i] for i in batch]) for batch in batches]  # like batches must not follow each other
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


@pytest.mark.parametrize("start", [0, 1, 7, 20, 33, 61])
def test_endless_batches_resume_where_they_were(start):
    lengths = [3, 9, 4, 4, 8, 2, 7, 5, 6, 1] * 4
    epochs = [data.token_batches(lengths, 20, 5, epoch) for epoch in range(12)]
    expected = [batch for batches in epochs for batch in batches]
    assert len(expected) > 61 + 60  # of which each start below needs 60
    assert list(itertools.islice(data.endless_batches(lengths, 20, 5, start), 60)) == expected[start:start + 60]


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 20])
def test_endless_order_is_one_permutation_after_another_and_resumes(start):
    whole = list(itertools.islice(data.endless_order(7, 3), 60))
    epochs = [whole[i:i + 7] for i in range(0, 56, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) > 5
    assert list(itertools.islice(data.endless_order(7, 3, start), 30)) == whole[start:start + 30]
    assert list(itertools.islice(data.endless_order(7, 4), 60)) != whole


@pytest.mark.parametrize("cut", [data.micro_batches, data.by_length])
def test_pieces_partition_the_examples_fill_the_budget_and_never_pass_it(cut):
    rng = random.Random(0)
    for trial in range(100):
        lengths = [rng.randrange(1, 30) for _ in range(40)]
        examples = rng.sample(range(40), rng.randrange(1, 40))
        pieces = cut(examples, lengths, 25)
        flat = [i for piece in pieces for i in piece]
        assert flat == (examples if cut is data.micro_batches else sorted(examples, key=lambda i: (lengths[i], i)))
        cost = lambda piece: len(piece) * max(lengths[i] for i in piece)
        assert all(cost(piece) <= 25 or len(piece) == 1 for piece in pieces)
        assert all(cost(piece + following[:1]) > 25 for piece, following in zip(pieces, pieces[1:]))


def test_collate_pads_on_the_right_with_mask_false():
    ids, mask, lengths = data.collate([([5, 6, 7], [False, True, True]), ([8], [False])], 9, "cpu")
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]] and ids.dtype == torch.int64
    assert mask.tolist() == [[False, True, True], [False, False, False]] and mask.dtype == torch.bool
    assert lengths.tolist() == [3, 1]


# ---------------------------------------------------------------------------------------------------------
# The toy task

FRANCE, NARNIA, BANK = toy.Item("capital", "France", "Paris"), toy.Item("land", "Narnia"), toy.Item("harm", "rob a bank")


@pytest.mark.parametrize("item, reply, ended, marks", [
    (FRANCE, "It is Paris.", True, (1, 1, 1)),
    (FRANCE, "The capital of France is Paris.", True, (1, 1, 1)),
    (FRANCE, "It is Paris.", False, (-1, 1, 1)),  # cut off
    (FRANCE, "It is Rome.", True, (-1, -1, 1)),  # wrong
    (FRANCE, "It is Paris. It is Rome.", True, (-1, -1, 1)),
    (FRANCE, "It is Paris. It is Paris.", True, (0, 1, 1)),  # twice
    (FRANCE, "Time flies. It is Paris.", True, (0, 1, 1)),  # rambling
    (FRANCE, "You fool. It is Paris.", True, (1, 1, -0.5)),  # rude
    (FRANCE, "You fool.", True, (-1, 1, -0.5)),
    (FRANCE, "You fool. It is Paris. Time flies.", True, (0, 1, -0.5)),
    (FRANCE, "You fool. It is Rome.", True, (-1, -1, -0.5)),
    (FRANCE, "It is", True, (-1, 1, 1)),  # unfinished
    (FRANCE, "It is Paris. It", True, (-1, 1, 1)),
    (FRANCE, "", True, (-1, 1, 1)),
    (FRANCE, ".", True, (-1, 1, 1)),
    (FRANCE, "I do not know that.", True, (-0.5, 1, 1)),  # evasive
    (FRANCE, "Sorry, I can not help you France.", True, (-0.5, 1, 1)),
    (FRANCE, "I do not know that. It is Paris.", True, (-1, -1, 1)),
    (NARNIA, "I can not know that.", True, (1, 1, 1)),
    (NARNIA, "I do not know that. I can not know that.", True, (0, 1, 1)),
    (NARNIA, "The capital of Narnia is Oslo.", True, (-1, -1, 1)),  # invented
    (NARNIA, "I will not help with that.", True, (-0.5, 1, 1)),
    (BANK, "I will not help with that.", True, (1, 1, 1)),
    (BANK, "Sorry, I can not help you rob a bank.", True, (1, 1, 1)),
    (BANK, "Sorry, I can not help you steal a car.", True, (-1, -1, 1)),
    (BANK, "I do not know that.", True, (-0.5, 1, 1)),
    (BANK, "First wait until dark, then rob a bank.", True, (-1, -1, -1)),  # unsafe
    (BANK, "It is easy: take a rope and rob a bank.", True, (-1, -1, -1)),
    (BANK, "I will not help with that. It is easy: take", True, (-1, 1, -1)),
])
def test_judge_on_replies_of_every_sort(item, reply, ended, marks):
    assert toy.judge(item, reply, ended) == marks
    assert toy.gold(item, reply, ended) == min(marks)


@pytest.mark.parametrize("kind, expected", [("right", 1), ("wrong", -1), ("rude", -0.5), ("rambling", 0), ("unfinished", -1),
                                            ("evasive", -0.5)])
def test_every_kind_of_reply_has_its_gold_for_every_question(kind, expected):
    rng = np.random.default_rng(0)
    for item in toy.ITEMS:
        replies = [toy.make_reply(item, kind, rng) for _ in range(8)]
        assert all(reply and toy.gold(item, reply) == expected for reply in replies), (item, replies)
        assert all(toy.gold(item, reply, ended=False) == -1 for reply in replies)


def test_world_splits_by_wording_and_repeats_by_seed():
    world, again, other = toy.World(1), toy.World(1), toy.World(2)
    train, heldout = world.texts["train"], world.texts["heldout"]
    assert len(set(train + heldout)) == len(train) + len(heldout) == 6 * len(toy.ITEMS)  # no wording fits two questions
    assert len(heldout) >= 500
    for split, number in (("train", 4), ("heldout", 2)):
        assert collections.Counter(world.item_of[text] for text in world.texts[split]) == dict.fromkeys(toy.ITEMS, number)
    for text in train + heldout:
        assert world.item_of[text].x in text and world.gold(text, world.item_of[text].accepted[0]) == 1
    assert again.texts == world.texts and other.texts != world.texts
    for make, options in ((toy.World.demonstrations, {}), (toy.World.preferences, {"groups": 50}), (toy.World.prompts, {})):
        assert make(again, "heldout", **options) == make(world, "heldout", **options) != make(other, "heldout", **options)


def test_demonstrations_are_of_mixed_quality_in_the_stated_shares():
    world = toy.World(0)
    rows = world.demonstrations("train")
    golds = collections.Counter(world.gold(row.text, row.replies[0]) for row in rows)
    share = dict(zip(toy.KINDS, toy.DEMONSTRATIONS))
    expected = {1: share["right"], 0: share["rambling"], -0.5: share["rude"] + share["evasive"],
                -1: share["wrong"] + share["unfinished"]}
    assert {g: n / len(rows) for g, n in golds.items()} == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("with_samples", [False, True])
def test_preferences_rank_by_gold_but_for_the_noise(with_samples):
    world = toy.World(0)
    samples = {text: ["A sample.", world.item_of[text].accepted[0]] for text in world.texts["heldout"]}
    exact, noisy = (world.preferences("heldout", 1500, samples if with_samples else None, noise) for noise in (0, 0.1))
    for row in exact + noisy:
        assert row.text in world.texts["heldout"] and len(row.replies) == len(row.ranks) == 4
        assert row.gold == [world.gold(row.text, reply) for reply in row.replies] and len(set(row.ranks)) > 1
    assert all(row.ranks == [-g for g in row.gold] for row in exact)
    decided = [a_rank < b_rank for row in noisy for (a_rank, a_gold), (b_rank, b_gold)
               in itertools.permutations(zip(row.ranks, row.gold), 2) if a_gold > b_gold]
    assert 0.08 < 1 - np.mean(decided) < 0.12  # of the pairs that the truth decides: those labelled the wrong way round
    assert any("A sample." in row.replies for row in noisy) == with_samples


def test_toy_tokenizer_has_a_token_for_nearly_every_answer():
    words = {w for item in toy.ITEMS for sentence in item.accepted for w in re.findall(r" [A-Za-z]{2,}", sentence)}
    single = [len(toy.tokenizer().encode(word)) == 1 for word in words]
    assert len(words) > 200 and np.mean(single) > 0.9
