"""formats/foreign_tokenizer.py against `transformers`, on small tokenizers made here: special tokens, spaces,
damage."""
import json
import re

import pytest

from data import encode_dialogue, encode_prompt, encode_text
from examples import (
    BOS_EOS, BRACKETS, CHATML, CORPUS, HEADERS, MADE, ODD_TEXTS, SPECIAL, TALK, foreign_folder,
    open_folder, random_texts, replies)
from formats.chat_template import own_template
from formats.foreign_tokenizer import open_tokenizer
from plumbing.disk import TOKENIZER_FILES
from plumbing.flags import UserError
from tools import without


@pytest.mark.case(28)
@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_a_missing_package_is_named_with_how_to_get_it(tmp_path, tokenizers, monkeypatch, package):
    foreign_folder(tmp_path, CHATML)
    without(monkeypatch, package)
    with pytest.raises(UserError, match=f"{package}.* pip install -r requirements-hf.txt"):
        open_tokenizer(tmp_path)


# -- the choice of tokens, and what is added

@pytest.mark.case(23)
@pytest.mark.parametrize("template, special, words, generation, eos, stops, pad, document", [
    (CHATML, SPECIAL, BOS_EOS, None, "<|im_end|>", ["<|im_end|>", "</s>"], "<|head|>", "<|endoftext|>"),
    (CHATML, SPECIAL,
     {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "unk_token": "<|endoftext|>",
      "pad_token": "<|im_end|>"}, None,
     "<|im_end|>", ["<|im_end|>"], "<|endoftext|>", "<|endoftext|>"),  # as SmolLM2
    (HEADERS, SPECIAL,
     {"eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}, "bos_token": "<s>"}, [2, 7],
     "<|eot|>", ["<|eot|>", "</s>", "<|im_end|>"], "<|im_start|>", "<|endoftext|>"),
    (None, SPECIAL, BOS_EOS, None, "</s>", ["</s>"], "<|im_start|>", "<|endoftext|>"),
    (None, ["<s>", "</s>", "[PAD]"], BOS_EOS, None, "</s>", ["</s>"], "[PAD]", "<s>"),
    (None, ["<s>", "</s>", "<unk>", "<x>"], BOS_EOS | {"unk_token": "<unk>"}, None, "</s>", ["</s>"], "<unk>",
     "<s>"),
    (None, ["</s>"], {"eos_token": "</s>"}, None, "</s>", ["</s>"], "<|pad|>", "</s>"),
    # A pad that ends replies.
    (None, ["<s>", "</s>", "[PAD]"], BOS_EOS | {"pad_token": "[PAD]"}, [1, 2], "</s>", ["</s>", "[PAD]"],
     "<|pad|>", "<s>"),
    (None, ["</s>"], {}, 0, "</s>", ["</s>"], "<|pad|>", "</s>"),
    (None, ["<|endoftext|>"],
     {key: "<|endoftext|>" for key in ("bos_token", "eos_token", "unk_token", "pad_token")}, None,
     "<|endoftext|>", ["<|endoftext|>"], "<|pad|>", "<|endoftext|>"),  # as GPT-2
])
def test_eos_stops_pad_and_document_are_chosen(tmp_path, tokenizers, transformers, template, special, words,
                                               generation, eos, stops, pad, document):
    files = {} if generation is None else {"generation_config": {"eos_token_id": generation}}
    ours = open_folder(tmp_path / "a", template, special=special, words=words, **files)
    assert [ours.show(i) for i in (ours.eos, ours.pad, ours.document)] == [eos, pad, document]
    assert [ours.show(i) for i in ours.stops] == stops and ours.pad not in ours.stops
    size = len(json.loads((tmp_path / "a/tokenizer.json").read_text())["model"]["vocab"])
    assert ours.added == (0 if template else 3) + (pad == "<|pad|>") and ours.n_vocab == size + ours.added
    assert ours.decode([ours.eos, ours.pad, *ours.encode("fox"), ours.n_vocab, -1, 10 ** 12]) == "fox"
    assert encode_text(ours, "fox")[0] == [ours.document, *ours.encode("fox"), ours.document]
    ours.save(tmp_path / "b")
    again = open_tokenizer(tmp_path / "b")
    assert again.same_as(ours) and ours.same_as(again) and again.added == 0 and again.n_vocab == ours.n_vocab
    expected = (ours.eos, ours.stops, ours.pad, ours.document, ours.roles)
    assert (again.eos, again.stops, again.pad, again.document, again.roles) == expected
    assert again.files == ours.files and {p.name for p in (tmp_path / "b").iterdir()} <= set(TOKENIZER_FILES)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert len(theirs) == ours.n_vocab and theirs.pad_token_id == ours.pad
    expected = ours.encode("a </s> fox<|pad|>")
    assert theirs("a </s> fox<|pad|>", split_special_tokens=True)["input_ids"] == expected
    prompt = theirs.apply_chat_template(TALK[:4], add_generation_prompt=True)["input_ids"]
    assert prompt == encode_prompt(ours, TALK[:4])
    if not template:
        assert theirs.chat_template == own_template(eos)
        assert theirs.apply_chat_template(TALK)["input_ids"] == encode_dialogue(ours, TALK)[0]


def test_a_folder_without_an_end_token_is_refused(tmp_path, tokenizers):
    foreign_folder(tmp_path,
                   words={},
                   special=["<x>"],
                   generation_config={"eos_token_id": 10 ** 9},
                   config={"eos_token_id": None})
    with pytest.raises(UserError, match="names no token that ends a reply"):
        open_tokenizer(tmp_path)


def test_an_end_token_that_is_no_special_token_becomes_one(tmp_path, tokenizers):
    library = open_tokenizer(foreign_folder(tmp_path / "a")).engine
    library.add_tokens(["<end>"])
    ours = open_folder(tmp_path / "b", library=library, words={"eos_token": "<end>"})
    assert ours.eos not in ours.encode("an <end>") and ours.decode([ours.eos]) == ""
    ours.save(tmp_path / "c")
    assert open_tokenizer(tmp_path / "c").same_as(ours)


@pytest.mark.parametrize("make", ["gpt2", "opt"])
def test_vocab_and_merges_alone_are_opened_as_gpt2s(tmp_path, tokenizers, transformers, make):
    special = ["<|endoftext|>"] if make == "gpt2" else ["<s>", "<pad>", "</s>", "<unk>"]
    words = dict.fromkeys(["bos_token", "eos_token", "unk_token"], special[0] if make == "gpt2" else "</s>")
    source = json.loads(
        (foreign_folder(tmp_path / "a", special=special) / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(source["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(merge) + "\n"
                                                                   for merge in source["merges"]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer"} | (words if make == "gpt2" else {})))
    if make == "opt":
        token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
        (folder / "special_tokens_map.json").write_text(
            json.dumps({key: {"content": word, **token}
                        for key, word in words.items()} | {"pad_token": "<pad>"}))
    ours = open_tokenizer(folder)
    assert ours.added == (4 if make == "gpt2" else 3)
    assert ours.show(ours.pad) == ("<|pad|>" if make == "gpt2" else "<pad>")
    ours.save(tmp_path / "c")
    again = open_tokenizer(tmp_path / "c")
    assert again.same_as(ours) and again.added == 0 and again.roles == ours.roles
    for place in (folder, tmp_path / "c"):
        theirs = transformers.GPT2Tokenizer.from_pretrained(place)
        for text in ODD_TEXTS + special + random_texts(30) + CORPUS[:5]:
            expected = ours.encode(text)
            assert theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"] == expected
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")
    assert len(theirs) == ours.n_vocab and (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos, ours.pad)
    assert theirs.apply_chat_template(TALK)["input_ids"] == encode_dialogue(ours, TALK)[0]


def spaced(tokenizers, scheme):
    """A sentencepiece-like BPE, which puts a space before every text, or before the first alone."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    library.train_from_iterator(
        [text.replace(" ", "▁") for text in CORPUS],
        tokenizers.trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)],
            show_progress=False))
    state = json.loads(library.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if not token["content"].startswith("<0x")
    ]
    steps = [{"type": "Prepend", "prepend": "▁"}] * (scheme == "legacy") + [{
        "type": "Replace", "pattern": {"String": " "}, "content": "▁"
    }]
    if scheme == "first":
        state["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    else:
        state["normalizer"] = {"type": "Sequence", "normalizers": steps}
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                     {"type": "ByteFallback"}, {"type": "Fuse"},
                     {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    return tokenizers.Tokenizer.from_str(json.dumps(state))


@pytest.mark.parametrize("scheme", ["first", "legacy", "never"])
def test_spaces_before_text_are_put_where_transformers_puts_them(tmp_path, tokenizers, transformers, scheme):
    ours = open_folder(tmp_path,
                       BRACKETS,
                       library=spaced(tokenizers, scheme),
                       words=BOS_EOS | {"unk_token": "<unk>"})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ["The fox", " fox", "日本 é", "a\nb", ""]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False,
                                           split_special_tokens=True)["input_ids"]
    for n in (2, 3, 4, 5):
        ids = encode_dialogue(ours, TALK[:n])[0]
        assert ids == theirs.apply_chat_template(TALK[:n])["input_ids"]
    assert replies(ours, *encode_dialogue(ours, TALK))[0].strip() == "The fox."


@pytest.mark.parametrize("eos", ["</s>", "<|b|>"])
def test_tokens_that_swallow_the_space_beside_them_do_so(tmp_path, tokenizers, transformers, eos):
    library = open_folder(tmp_path / "a").engine
    library.add_special_tokens([
        tokenizers.AddedToken("<|a|>", rstrip=True, special=True),
        tokenizers.AddedToken("<|b|>", lstrip=True, special=True)
    ])
    template = ("{% for m in messages %}{{ m.role + '<|a|>\n' + m.content + ' <|b|>\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ 'assistant<|a|>\n' }}{% endif %}")
    ours = open_folder(tmp_path / "b",
                       template,
                       library=library,
                       words={"bos_token": "<s>", "eos_token": eos})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    ids = encode_dialogue(ours, TALK)[0]
    assert ids + ours.encode("\n") == theirs.apply_chat_template(TALK)["input_ids"]
    prompt = encode_prompt(ours, TALK[:4])
    expected = theirs.apply_chat_template(TALK[:4], add_generation_prompt=True)["input_ids"]
    assert prompt == expected == ids[:len(prompt)]


@pytest.mark.case(22)
def test_a_model_that_would_spell_a_special_token_is_kept_from_it(tmp_path, tokenizers):
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        *((letter, -5.0) for letter in "</s>abcdefghijklmnopqrstuvwxyz \n"),
    ]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(list(dict(pieces).items()), unk_id=0))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.decoder = tokenizers.decoders.Fuse()
    ours = open_folder(tmp_path, library=library)
    assert len(ours.encode("a</s>b<s>")) == 9 and ours.eos not in ours.encode("a</s>b")
    assert "".join(map(ours.show, ours.encode("a</s>b"))) == "a</s>b"


@pytest.mark.case(22)
def test_a_special_token_in_a_text_is_merged_as_other_text_is(tmp_path, tokenizers, transformers):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.train_from_iterator(
        CORPUS + ["<p>a</p>"] * 20,
        tokenizers.trainers.BpeTrainer(vocab_size=400,
                                       special_tokens=SPECIAL,
                                       initial_alphabet=sorted(
                                           tokenizers.pre_tokenizers.ByteLevel.alphabet()),
                                       show_progress=False))
    ours = open_folder(tmp_path, library=library)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a</s>b", "</s>", "x</s></s>"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False,
                                           split_special_tokens=True)["input_ids"]
        assert len(ours.encode(text)) < len(text)


@pytest.mark.case(11)
@pytest.mark.parametrize("name, text", [
    ("tokenizer.json", "{}"),
    ("tokenizer.json", '{"model": 7}'),
    ("tokenizer.json",
     '{"model": {"type": "BPE", "continuing_subword_prefix": "#", "vocab": {"é": 0}, "merges": ["é é"]}}'),
    ("tokenizer.json", "\ud83d"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"99999": {"content": "<new>"}}}'),
    ("special_tokens_map.json", "[]"),
    ("generation_config.json", "x"),
    ("config.json", "x"),
    ("added_tokens.json", '{"a": "b"}'),
])
def test_damaged_files_of_another_project_are_named(tmp_path, tokenizers, name, text):
    foreign_folder(tmp_path)
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=re.escape(str(tmp_path))) as error:
        open_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    MADE["bytes"]().save(tmp_path)
    monkeypatch.setattr("formats.foreign_tokenizer.FILE_LIMIT", 100)
    with pytest.raises(UserError, match="tokenizer.json is too large"):
        open_tokenizer(tmp_path)


def test_saving_copies_every_file_as_it_was_where_nothing_changed(tmp_path, tokenizers):
    words = {"eos_token": "<|im_end|>", "bos_token": "<s>", "pad_token": "<|head|>"}
    foreign_folder(tmp_path / "a",
                   CHATML,
                   words=words,
                   special_tokens_map=words,
                   generation_config={"eos_token_id": 2, "pad_token_id": 3, "top_p": 0.9})
    (tmp_path / "a/tokenizer.model").write_bytes(b"\x00\xff")
    open_tokenizer(tmp_path / "a").save(tmp_path / "b")
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert a == b
