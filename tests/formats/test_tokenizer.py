"""formats/tokenizer.py against a naive algorithm, and its folder against `transformers`."""
import json
import random
import re
import time

import pytest
import regex
import tiktoken

import toy
from data import encode_dialogue, encode_prompt
from examples import MADE, ODD_TEXTS, random_texts
from formats.foreign_tokenizer import open_tokenizer
from formats.tokenizer import ALL_LETTERS, CONTROLS, ENGLISH, Tokenizer, train_bpe
from plumbing.disk import TOKENIZER_FILES
from plumbing.flags import UserError
from tools import without


# -- texts and ids

@pytest.mark.case(22)
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


@pytest.mark.case(28)
def test_gpt2_without_cache_or_network_says_what_to_do(monkeypatch):
    def offline(name):
        raise OSError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.gpt2()


def slow_merge(parts, pair):
    out, merged = [], False
    for part in parts:
        if out and (out[-1], part) == pair and not merged:
            # What was just merged can't be the left half of the same pair.
            out[-1], merged = out[-1] + part, True
        else:
            out, merged = out + [part], False
    return out


def slow_bpe(texts, n_vocab, pattern):
    """Byte-pair encoding, straight from its definition: count all pairs of the whole text anew for every
    merge."""
    corpus = [[bytes([b]) for b in piece.encode()] for text in texts for piece in regex.findall(pattern,
                                                                                                text)]
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


@pytest.mark.parametrize("pattern", [ENGLISH, ALL_LETTERS])
@pytest.mark.parametrize("texts, n_vocab", [
    (["low lower lowest, new newer newest; wide wider widest 10 100 1000"] * 2, 290),
    (["the then cat car cab can cap" + 9 * " the", "the"], 275),  # how often a word comes counts
    # Overlaps, several bytes a letter, and more room than pairs.
    (["aaaaaaa aaa aaaaa abababab", "日本 日本語 naïve"], 300),
])
def test_train_bpe_equals_the_naive_algorithm_and_repeats(texts, n_vocab, pattern):
    _, ranks = train_bpe(texts, n_vocab, pattern)
    vocabulary, merges = slow_bpe(texts, n_vocab, pattern)
    assert list(ranks.items()) == [(token, i) for i, token in enumerate(vocabulary)]
    assert (pattern, ranks) == train_bpe(texts, n_vocab, pattern)
    tokenizer = Tokenizer("t", pattern, ranks)
    for text in texts + ["the lowest newt waa", "aaaa ba 本語"]:
        expected = []
        for piece in regex.findall(pattern, text):
            parts = [bytes([b]) for b in piece.encode()]
            for pair in merges:
                parts = slow_merge(parts, pair)
            expected += [ranks[part] for part in parts]
        assert tokenizer.encode(text) == expected


@pytest.mark.parametrize("seed", range(40))
def test_train_bpe_equals_the_naive_algorithm_on_texts_full_of_repeats(seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices("aab c日" if seed % 2 else "ab", k=rng.randrange(40))) for _ in range(5)]
    vocabulary, _ = slow_bpe(texts, 300, ENGLISH)
    assert train_bpe(texts, 300)[1] == {token: i for i, token in enumerate(vocabulary)}


def test_a_vocabulary_is_learned_in_seconds():
    rng = random.Random(0)
    letters = [chr(0x4E00 + i) for i in range(900)]
    texts = ["，".join("".join(rng.choices(letters, k=8)) for _ in range(10)) for _ in range(900)]
    start = time.process_time()  # 1 second; to count all pairs anew for each token takes minutes
    _, ranks = train_bpe([*texts, "a" * 200_000], 3000, ALL_LETTERS)  # one piece may be as long as a file
    assert len(ranks) == 3000 and time.process_time() - start < 20


# -- its folder

@pytest.mark.parametrize("make", MADE)
def test_our_folder_reopens_as_the_same_without_the_library(tmp_path, monkeypatch, make):
    without(monkeypatch, "tokenizers", "jinja2")
    before = MADE[make]()
    before.save(tmp_path / "new")
    after = open_tokenizer(tmp_path / "new")
    assert type(after) is Tokenizer and after.same_as(before) and before.same_as(after)
    assert list(after.ranks.items()) == sorted(before.ranks.items(), key=lambda item: item[1])
    for name in ("name", "pattern", "eos", "pad", "stops", "document", "roles", "added", "n_vocab", "files"):
        assert getattr(after, name) == getattr(before, name)
    assert set(before.files) <= set(TOKENIZER_FILES)
    assert {p.name for p in (tmp_path / "new").iterdir()} == set(before.files)
    (tmp_path / "new" / "tokenizer_config.json").unlink()
    assert open_tokenizer(tmp_path / "new").same_as(before)


def test_tokenizers_differ_by_pattern_and_ranks(tokenizer):
    assert not tokenizer.same_as(Tokenizer("bytes", r"[\s\S]", tokenizer.ranks))
    assert not tokenizer.same_as(Tokenizer("bytes", tokenizer.pattern, tokenizer.ranks | {b"ab": 256}))
    assert tokenizer.same_as(Tokenizer("other name", tokenizer.pattern, tokenizer.ranks))


@pytest.mark.parametrize("make", MADE)
def test_transformers_opens_our_folder_and_gives_the_same_ids(tmp_path, transformers, make):
    ours = MADE[make]()
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (ours.eos, ours.pad, ours.n_vocab)
    texts = ODD_TEXTS + list(CONTROLS) + random_texts(100) + [
        " ".join(" \n\t\r\x0b\u3000\xa0") * 2, "aaaa aaa  a"
    ]
    if make == "gaps":
        texts = ["abc", "ab", "aabcc", "abc\nabc  cab", "abcabc"]
    for text in texts:
        assert theirs(text, split_special_tokens=True)["input_ids"] == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    if make != "gaps":
        talk = [
            {"role": "system", "content": "Be brief. "},
            {"role": "user", "content": " Hé\n"},
            {"role": "assistant", "content": "\nHo"},
            {"role": "user", "content": "2?"},
            {"role": "assistant", "content": "Yes"},
        ]
        for n in range(1, 6):
            assert theirs.apply_chat_template(talk[:n])["input_ids"] == encode_dialogue(ours, talk[:n])[0]
            assert theirs.apply_chat_template(talk[:n],
                                              add_generation_prompt=True)["input_ids"] == encode_prompt(
                                                  ours, talk[:n])
        ids = encode_dialogue(ours, talk)[0]
        assert theirs.decode(ids, skip_special_tokens=True) == "".join(turn["content"] for turn in talk)


def changed(where, value):
    def change(saved):
        *path, last = where
        for key in path:
            saved = saved[key]
        saved[last] = value
    return change


@pytest.mark.case(11)
@pytest.mark.parametrize("change", [
    changed(["model", "vocab", "!"], 1),
    changed(["model", "vocab", "!"], "0"),
    changed(["model", "vocab", "!"], True),
    changed(["model", "vocab", "!"], 0.5),
    lambda saved: saved["model"]["vocab"].update({"日": saved["model"]["vocab"].pop("!")}),
    changed(["model", "merges"], ["a b"]),
    changed(["model", "merges"], [1]),
    changed(["model", "merges"], None),
    changed(["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], "("),
    changed(["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], 7),
])
def test_a_damaged_tokenizer_of_ours_is_named_in_one_line(tmp_path, tokenizers, change):
    MADE["trained"]().save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    change(saved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="tokenizer.json") as error:
        open_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100000], ids=range(6))
def test_a_file_that_is_no_json_object_is_named(tmp_path, name, raw):
    MADE["bytes"]().save(tmp_path)
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=re.escape(name) + " is damaged"):
        open_tokenizer(tmp_path)


def test_a_cut_off_file_is_named(tmp_path):
    MADE["bytes"]().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        open_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_so(tmp_path, tokenizers):
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        open_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="merges.txt is missing"):
        open_tokenizer(tmp_path)
