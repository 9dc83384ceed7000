"""formats/sources.py: files of every kind, damaged ones, several at once, mixtures, parts and what is held
out."""
import contextlib
import csv
import gzip
import io
import itertools
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples import (
    ALPACA, ASKED, COMPLETION, DAPO, DOLLY, GSM8K, HH, HH_START, HISTORY, KTO, MESSAGES, ORCA, PAIR,
    RANKING, RATED, RM_STATIC, SHAREGPT, SHAREGPT_PAIR, SHP, TURNS_PAIR, ULTRA, WHOLE_PAIR, chat, sharegpt,
    system, user)
from formats import sources as sources_file
from formats.rows import Row
from plumbing.flags import UserError
from tools import SILENT, dropped, write_rows


# -- files

@pytest.mark.case(18)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.json.gz"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_rows_are_the_same_in_every_kind_of_file(tmp_path, name, bom, newline):
    sources = [ALPACA, ALPACA | {"output": "a\u2028b\u0085c"}, ALPACA | {"output": "日本"}]
    if ".jsonl" not in name:
        text = "\n" + json.dumps(sources, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "\n" + "\n\n  \n".join(json.dumps(source, ensure_ascii=False) for source in sources) + "\n\n"
    raw = bom + text.replace("\n", newline).encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    rows = sources_file.read_rows(tmp_path / name, "demonstrations", SILENT)
    assert [row.replies for row in rows] == [["64"], ["a\u2028b\u0085c"], ["日本"]]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfFirst:\r\n  Speak.\n\n\xe2\x80\x99Tis\n")
    assert sources_file.read_rows(tmp_path / "a.txt", "demonstrations", SILENT) == [
        Row([], ["First:\n  Speak.\n\n’Tis\n"], [0], document=True)]


def as_csv(path, rows):
    """A .csv or .tsv file by Python's own writer: what is no text as JSON, what is missing as nothing."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with io.StringIO(newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.name.endswith(".tsv") else ",")
        writer.writerow(names)
        for row in rows:
            cells = [row.get(name, "") for name in names]
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
        raw = file.getvalue().encode()
    path.write_bytes(gzip.compress(raw) if path.name.endswith("gz") else raw)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
@pytest.mark.parametrize("want, sources", [
    ("demonstrations", [ALPACA, ALPACA | {"output": 'He said "x, y"\tand\nleft. 日本', "input": ""}]),
    ("demonstrations", [MESSAGES, SHAREGPT]),
    ("preferences", [PAIR, PAIR | {"margin": 0.5}]), ("preferences", [RANKING]),
    ("preferences", [SHP, SHP | {"labels": 0}]),
    ("preferences", [COMPLETION | {"label": True}, COMPLETION | {"completion": "65", "label": False}]),
    ("preferences", [RATED, RATED | {"response": "65", "score": -1e-3}]), ("prompts", [GSM8K]),
    ("prompts", [DAPO | {"prompt": "Cube 4."}]),
], ids=str)
def test_csv_rows_are_those_of_json(tmp_path, name, want, sources):
    rows = sources_file.read_rows(as_csv(tmp_path / name, sources), want, SILENT)
    assert rows == sources_file.read_rows(write_rows(tmp_path / "a.jsonl", sources), want, SILENT)


def test_a_csv_as_other_programs_write_it(tmp_path):
    limit = csv.field_size_limit()
    lines = ['\ufeff"", prompt ,completion,label', '0,"Cube', '4.",64,TRUE', "", '1,A cube 6" wide,65,False',
             "2,Cube 5.,,true", "3,Cube 6.,216,", ""]
    (tmp_path / "a.csv").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    said = []
    assert sources_file.read_rows(tmp_path / "a.csv", "demonstrations", said.append) == [
        Row(user("Cube\n4."), ["64"], [0]), Row(user("Cube 6."), ["216"], [0])]
    assert dropped(said[0]) == {"label false": 1, "empty reply": 1}
    long = {"prompt": "x", "completion": "a" * 200_000}  # more than the csv module reads unless it is told to
    row, = sources_file.read_rows(as_csv(tmp_path / "b.csv", [long]), "demonstrations", SILENT)
    assert row.replies == [long["completion"]]
    assert csv.field_size_limit() == limit
    with pytest.raises(UserError, match="a.csv:1 is no header"):
        (tmp_path / "a.csv").write_text("x\n", encoding="utf-8")
        sources_file.read_rows(tmp_path / "a.csv", "demonstrations", SILENT)
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("text, encoding, guess", [
    ("把这句话翻译成英文：你好，世界。", "gbk", "GBK"), ("请把这个句子翻译成英文，不要翻译别的。é", "gb18030", "GBK"),
    ("Cube 4.", "utf-16", "UTF-16"),
    ("les élèves très motivés, où ?", "latin-1", ""), ("Grüße, größer, süß", "latin-1", ""),
    ("Привет, мир", "cp1251", ""),
    ("Привет, мир", "koi8-r", ""), ("日本語の文章です", "shift-jis", ""), ("これはひらがなです", "euc-jp", ""),
    ("翻譯這個句子", "big5", ""),
    ("한국어 문장을 번역해 주세요.", "euc-kr", ""),
])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_file_in_another_encoding_is_told_how_to_convert_it(tmp_path, name, text, encoding, guess):
    row = json.dumps({"prompt": text, "completion": "x"}, ensure_ascii=False)
    wholes = {"a.txt": text, "a.csv": f"prompt,completion\n{text},x\n", "a.jsonl": row, "a.json": f"[{row}]"}
    (tmp_path / name).write_bytes(wholes[name].encode(encoding))
    with pytest.raises(UserError, match=r":\d+ is not UTF-8 text; ") as error:
        sources_file.read_rows(tmp_path / name, "demonstrations", SILENT)
    assert str(error.value).endswith(f"convert it: iconv -f {guess or 'ITS_ENCODING'} -t UTF-8 FILE > NEW")
    assert (f"; it looks like {guess};" if guess else "text; convert it") in str(error.value)


def test_a_folder_is_said_to_be_one_with_the_files_that_could_be_named(tmp_path):
    with pytest.raises(UserError, match=r" is a folder; it holds no file that is read \(\.json, "):
        sources_file.read_rows(tmp_path, "demonstrations", SILENT)
    (tmp_path / "part").mkdir()
    for name in ("b.jsonl", "a.csv", "notes.md", "part/c.parquet"):
        (tmp_path / name).write_text("")
    for spec in (f"{tmp_path}", f"{tmp_path}/", f"{tmp_path}:0.5"):
        with pytest.raises(UserError, match=" is a folder; name a file in it, or several .*: ") as error:
            sources_file.read_rows(spec, "demonstrations", SILENT)
        assert str(error.value).endswith(f"{tmp_path}/a.csv, {tmp_path}/b.jsonl, {tmp_path}/part/c.parquet")
    for i in range(4):
        (tmp_path / f"d{i}.json").write_text("")
    with pytest.raises(UserError, match=r"/d1\.json, .*/d2\.json and 2 more$"):
        sources_file.read_rows(tmp_path, "demonstrations", SILENT)


def test_parquet_rows_are_those_of_json(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    # More than a batch.
    other = {"chosen": chat("Hi", "日本"), "rejected": chat("Hi", "Ho"), "prompt": "Hi"}
    sources = [ULTRA, ULTRA | other] * 700
    parquet.write_table(pyarrow.Table.from_pylist(sources), tmp_path / "a.parquet")
    rows = sources_file.read_rows(tmp_path / "a.parquet", "preferences", SILENT)
    assert rows == sources_file.read_rows(write_rows(tmp_path / "a.jsonl", sources), "preferences", SILENT)
    assert len(rows) == len(sources)
    mixed = [ALPACA, MESSAGES, COMPLETION]
    absent = dict.fromkeys([name for row in mixed for name in row])  # null in a table
    parquet.write_table(pyarrow.Table.from_pylist([absent | row for row in mixed]), tmp_path / "b.parquet")
    rows = sources_file.read_rows(tmp_path / "b.parquet", "demonstrations", SILENT)
    assert [row.replies for row in rows] == [["64"], ["Yes"], ["64"]]
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="c.parquet can't be read"):
        sources_file.read_rows(tmp_path / "c.parquet", "preferences", SILENT)


@pytest.mark.parametrize("spec, expected", [
    ("hf:org/name", ("org/name", None, "train")),
    ("hf:org/name:test", ("org/name", None, "test")),
    ("hf:org/name/main:train[:10]", ("org/name", "main", "train[:10]")),
    ("hf:org/name/main", ("org/name", "main", "train")),
])
def test_a_data_set_of_the_hub_comes_through_datasets(monkeypatch, spec, expected):
    asked = []

    def load_dataset(name, config=None, split=None):
        asked.append((name, config, split))
        if name == "org/gone":
            raise ConnectionError("no\nnetwork " + "x" * 999)
        return [ALPACA, DOLLY]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert [row.replies for row in sources_file.read_rows(spec, "demonstrations", SILENT)] == [["64"], ["64"]]
    assert asked == [expected]
    with pytest.raises(UserError, match=r"hf:org/name.*, row 1 doesn't hold a prompt, chosen and rejected"):
        sources_file.read_rows(spec, "preferences", SILENT)
    with pytest.raises(UserError,
                       match=r"hf:org/gone can't be loaded \(ConnectionError: no network x{189}\)$"):
        sources_file.read_rows("hf:org/gone", "demonstrations", SILENT)
    with pytest.raises(UserError, match=r"hf:name: write hf:org/name"):
        sources_file.read_rows("hf:name", "demonstrations", SILENT)
    # With weights.
    assert len(sources_file.read_rows(f"{spec}:0.25,hf:org/other:train:.25", "demonstrations", SILENT)) == 4


@pytest.mark.parametrize("name, package", [("rows.parquet", "pyarrow"), ("hf:org/name", "datasets")])
def test_without_an_optional_library_the_message_names_it(tmp_path, monkeypatch, name, package):
    for module in [package, *(module for module in sys.modules if module.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, module, None)  # which makes the import fail
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=f"{name} needs {package}: pip install -r requirements-hf.txt"):
        sources_file.read_rows(name if ":" in name else tmp_path / name, "demonstrations", SILENT)


@pytest.mark.case(18)
def test_rows_that_cannot_be_read_are_left_out_if_asked_to_and_at_most_one_in_a_hundred(tmp_path):
    good = [json.dumps({"prompt": f"p{i}", "completion": f"r{i}"}).encode() for i in range(297)]
    ill = [b'{"prompt": "a", "completion"', b'{"prompt": "a", "completion": "\xff"}', b"[1]"]
    path, said = tmp_path / "rows.jsonl", []
    path.write_bytes(b"\n".join([*good[:16], ill[0], *good[16:200], ill[1], b"", *good[200:], ill[2]])
                     + b"\n")
    rows = sources_file.read_rows(path, "demonstrations", said.append, skip_bad=True)
    assert [row.replies[0] for row in rows] == [f"r{i}" for i in range(297)]
    assert said[0].startswith(
        f"warning: {path}: left out 3 of 300 rows; the first is {path}:17 is not valid JSON")
    with pytest.raises(UserError, match=r"rows.jsonl:17 is not valid JSON"):
        sources_file.read_rows(path, "demonstrations", SILENT)
    path.write_bytes(b"\n".join([*good[:296], *ill]))
    message = (r"3 of 299 rows can't be read, and --skip-bad leaves out one in a hundred at most; "
               r"the first is .*:297 is not valid")
    with pytest.raises(UserError, match=message):
        sources_file.read_rows(path, "demonstrations", SILENT, skip_bad=True)


@pytest.mark.case(18)
def test_a_line_that_is_too_long_is_left_out_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_file, "LONGEST", 100)
    lines = [json.dumps({"prompt": f"p{i}", "completion": "r"}) for i in range(99)]
    (tmp_path / "rows.jsonl").write_text("\n".join(
        [*lines[:50], json.dumps({"prompt": "p", "completion": 1000 * "r"}), *lines[50:]]))
    rows = sources_file.read_rows(tmp_path / "rows.jsonl", "demonstrations", SILENT, skip_bad=True)
    assert [row.text for row in rows] == [f"p{i}" for i in range(99)]


# -- rows that cannot be used, and damage

@pytest.mark.case(19)
def test_unusable_rows_are_dropped_counted_and_said(tmp_path):
    turn = "\n\nHuman: Hi\n\nAssistant: Yes"
    sources = [
        HH,
        {"chosen": turn, "rejected": "\n\nHuman: Ho\n\nAssistant: No"},
        ULTRA | {"prompt": "Cube 5."},
        ULTRA | {"rejected": chat("Cube 5.", "1")},
        {"chosen": turn, "rejected": "\n\nHuman: Hi\n\nAssistant: "},
        {"chosen": turn, "rejected": turn + "\n"},
        {"chosen": turn + "\n\nAssistant: No", "rejected": turn},
        WHOLE_PAIR | {"chosen": chat("Hi", "Ho") + system("x")},
        {"chosen": "\n\nAssistant: No", "rejected": "\n\nAssistant: Yes"},
        PAIR | {"prompt": " "},
        SHAREGPT_PAIR | {"conversations": []},
        {"chosen": turn + "\n\nHuman: Bye", "rejected": turn},
        WHOLE_PAIR | {"chosen": []},
        {"chosen": "Say" + turn, "rejected": turn},
        {"chosen": "x", "rejected": turn},
        WHOLE_PAIR | {"chosen": chat("Hi", "", "Ho", "a"), "rejected": chat("Hi", "", "Ho", "b")},
        TURNS_PAIR | {"prompt": chat("Cube 4.", "64")},
        RANKING | {"ranks": [1, 1, 1, 1]},
        RANKING | {"ranks": [1]},
        RANKING | {"completions": ["a"], "ranks": [1]},
        RANKING | {"completions": ["a", "", "b", "c"]},
        RANKING | {"completions": ["a", "a", "b", "c"], "gold": None},
    ]
    said = []
    rows = sources_file.read_rows(write_rows(tmp_path / "rows.jsonl", sources), "preferences", said.append)
    assert [row.replies[0] for row in rows] == ["I don’t know.", "a"]
    assert len(said) == 1
    assert f"{len(sources)} rows (transcripts, preferences, rankings), 2 kept as preferences" in said[0]
    assert said[0].endswith("; ...")  # the rarest reasons


@pytest.mark.case(19)
@pytest.mark.parametrize("want, source, reason", [
    ("preferences", {"chosen": HH["chosen"], "rejected": "\n\nHuman: Ho\n\nAssistant: No"}, "prompts differ"),
    ("preferences", ULTRA | {"prompt": "Cube 5."}, "prompts differ"),
    ("preferences", ULTRA | {"rejected": chat("Cube 5.", "1")}, "prompts differ"),
    ("preferences", {"chosen": HH_START, "rejected": HH["rejected"]}, "empty reply"),
    ("demonstrations", ALPACA | {"output": " \n"}, "empty reply"),
    ("demonstrations", {"text": "\n"}, "empty reply"),
    ("preferences", HH | {"rejected": HH["chosen"] + "\n"}, "chosen equals rejected"),
    ("preferences", RANKING | {"ranks": [1, 1, 1, 1]}, "all replies tied"),
    ("preferences", RANKING | {"ranks": [1]}, "completions and ranks don't match, or fewer than two"),
    ("preferences", RANKING | {"completions": ["a"], "ranks": [1]},
     "completions and ranks don't match, or fewer than two"),
    ("preferences", HH | {"chosen": HH["chosen"] + "\n\nAssistant: No"}, "roles don't alternate"),
    ("preferences", HH | {"chosen": HH["chosen"] + "\n\nHuman: No\n\nHuman: No"}, "roles don't alternate"),
    ("demonstrations", {"messages": chat("Hi", "Ho") + system("x") + chat("Hi", "Ho")},
     "roles don't alternate"),
    ("demonstrations", {"conversations": sharegpt("64", "Sure?", "Yes", names=("gpt", "human"))},
     "roles don't alternate"),
    ("demonstrations", {"conversations": sharegpt("Hi", "x", "64", names=("human", "observation", "gpt"))},
     "a turn by 'observation', who is not system, user or assistant"),
    ("demonstrations", {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
     "a turn with parts that are no text"),
    ("demonstrations", {"messages": chat("Hi") + [{"role": "assistant", "content": None, "tool_calls": []}]},
     "a turn without text"),
    ("demonstrations", ASKED, "no reply by the assistant at the end"),
    ("demonstrations", {"messages": []}, "no reply by the assistant at the end"),
    ("preferences", HH | {"chosen": HH["chosen"] + "\n\nHuman: Bye"}, "no reply by the assistant at the end"),
    ("preferences", HH | {"rejected": "Say" + HH["rejected"]},
     "no transcript with Human: and Assistant: turns"),
    ("preferences", {"chosen": "a", "rejected": "b"}, "no transcript with Human: and Assistant: turns"),
    ("demonstrations", {"messages": chat("64", names=["assistant"])}, "empty prompt"),
    ("preferences", PAIR | {"prompt": " "}, "empty prompt"),
    ("preferences", SHAREGPT_PAIR | {"conversations": []}, "empty prompt"),
    ("prompts", {"prompt": []}, "empty prompt"),
    ("prompts", {"prompt": chat("Cube 4.", "64")}, "the prompt doesn't end with the user"),
    ("prompts", {"messages": system("Be brief.")}, "the prompt doesn't end with the user"),
    ("demonstrations", {"messages": chat("Hi", "", "Ho", "64")}, "empty turn"),
    ("demonstrations", COMPLETION | {"label": False}, "label false"),
    ("demonstrations", ALPACA | {"output": "\ud83d half"},
     "a NUL character or half a surrogate pair, which is no text"),
    ("prompts", {"messages": system("\udc00") + chat("Hi")},
     "a NUL character or half a surrogate pair, which is no text"),
    ("demonstrations", {"text": "a\0b"}, "a NUL character or half a surrogate pair, which is no text"),
])
def test_each_defect_of_a_row_has_its_reason(tmp_path, want, source, reason):
    good = {"demonstrations": ALPACA, "preferences": PAIR, "prompts": {"prompt": "x"}}[want]
    said = []
    path = write_rows(tmp_path / "rows.jsonl", [good, source, source])
    assert len(sources_file.read_rows(path, want, said.append)) == 1
    assert "3 rows (" in said[0] and dropped(said[0]) == {reason: 2}


GOOD = json.dumps(PAIR).encode()
ZIPPED = gzip.compress(GOOD, mtime=0)


@pytest.mark.case(18, 21)
@pytest.mark.parametrize("name, raw, want, message", [
    ("a.jsonl", GOOD + b"\n\n{bad\n", "preferences", r":3 is not valid JSON: .* \(column 2\)"),
    ("a.jsonl", b"\n".join([GOOD] * 16 + [GOOD[:-1], GOOD]), "preferences", r":17 is not valid JSON"),
    ("a.jsonl", GOOD + GOOD, "preferences", r":1 is not valid JSON: something follows"),
    ("a.jsonl", GOOD + b'\n{"prompt": "raw \0 NUL"}', "preferences", r":2 is not valid JSON"),
    ("a.jsonl", GOOD + b"\n\0\0\n", "preferences", r":2 is not valid JSON"),
    ("a.json", b"[\n" + GOOD + b",\n{bad\n]", "preferences", r":3 is not valid JSON"),
    ("a.json", b"[" + GOOD + b",\n\n]", "preferences", r":3 is not valid JSON"),
    ("a.json", b"[" + GOOD + b"\n" + GOOD + b"]", "preferences",
     r", row 1 is not valid JSON: neither a comma nor \]"),
    ("a.json", b"[" + GOOD, "preferences", r", row 1 is not valid JSON: neither a comma nor \]"),
    ("a.json", b"[", "preferences", r":1 is not valid JSON"),
    ("a.json", b"[" + GOOD + b"] x", "preferences", r" is not valid JSON: something follows the array"),
    ("a.jsonl", GOOD + b'\n{"prompt": "x", "chosen": "a", "rejected": "b", "chosen": "c"}', "preferences",
     r":2 is not valid JSON: the field 'chosen' comes twice"),
    ("a.json", b"[" + GOOD + b', {"messages": [{"role": "user", "role": "user"}]}]', "prompts",
     r", row 2 is not valid JSON: the field 'role' comes twice"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", "b"], "ranks": [NaN, 1]}', "preferences",
     r":1 is not valid JSON: NaN is no JSON number"),
    ("a.json", b'[{"prompt": "x", "score": -Infinity}]', "prompts",
     r", row 1 is not valid JSON: -Infinity is no JSON number"),
    ("a.jsonl", GOOD + b'\n{"prompt": ' + b"[" * 200000, "preferences", r":2 is nested too deeply"),
    ("a.json", b'[{"prompt": ' + b'{"a":' * 200000, "preferences", r", row 1 is nested too deeply"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", "b"], "ranks": [1e999, 1]}', "preferences",
     r":1: a rank, a gold score or the margin is not"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", "b"], "ranks": [1' + b"0" * 400 + b", 1]}",
     "preferences", r":1: "),
    ("a.jsonl", b"\xef\xbb\xbf" + GOOD + b"\n\xff", "preferences", r":2 is not UTF-8"),
    ("a.jsonl", GOOD + b"\n" + GOOD + b'\n{"prompt": "\xe9"}', "preferences", r":3 is not UTF-8"),
    ("a.json", b"[\n" + GOOD + b',\n{"prompt": "\xe9"}]', "preferences", r":3 is not UTF-8"),
    ("a.txt", b"First\nSecond \xe9", "demonstrations", r":2 is not UTF-8"),
    ("a.jsonl", GOOD.decode().encode("utf-16"), "preferences", r":1 is not UTF-8"),
    ("a.json", b"", "preferences", r" holds no array of rows"),
    ("a.txt", b"", "demonstrations", r" holds no usable row"),
    ("a.jsonl", b" \n\n", "preferences", r" holds no usable row"),
    ("a.json", b"[ ]\n", "prompts", r" holds no usable row"),
    ("a.json", GOOD, "preferences", r" holds no array of rows at its top; .* name it .jsonl"),
    ("a.jsonl", GOOD + b"\n7", "preferences", r":2 is not a JSON object"),
    ("a.json", b"[" + GOOD + b", []]", "preferences", r", row 2 is not a JSON object"),
    ("a.json", b"[" + GOOD + b', {"question": "x", "answer": "y"}]', "preferences",
     r", row 2 doesn't hold .* chosen and rejected .*; its fields are question, answer"),
    ("a.jsonl", b"{}", "prompts", r":1 doesn't hold a prompt .*; its fields are none"),
    ("a.jsonl", b'{"a\\n\\ud800' + b"b" * 99 + b'": 1}', "prompts",
     r":1 doesn't hold a prompt .*; its fields are a\\n\\ud800b{37}$"),
    ("a.jsonl", json.dumps(ALPACA).encode(), "preferences",
     r":1 doesn't hold .* chosen and rejected .*; its fields are instruction, input, output"),
    ("a.jsonl", b'{"prompt": "x"}', "demonstrations", r":1 doesn't hold a prompt and a reply"),
    ("a.jsonl", b'{"text": "x"}', "prompts", r":1 doesn't hold a prompt "),
    ("a.jsonl", GOOD + b'\n{"prompt": 5, "chosen": "a", "rejected": "b"}', "preferences",
     r":2: the prompt is not a string"),
    ("a.jsonl", b'{"prompt": "x", "chosen": ["a"], "rejected": "b"}', "preferences",
     r":1: a conversation is not a list of objects"),
    ("a.jsonl", b'{"prompt": "x", "chosen": 5, "rejected": "b"}', "preferences",
     r":1: a reply is missing or not a string"),
    ("a.jsonl", b'{"instruction": "x", "output": 5}', "demonstrations",
     r":1: a reply is missing or not a string .read as instructions"),
    ("a.jsonl", b'{"chosen": 5, "rejected": "b"}', "preferences", r":1: a reply is missing or not a string"),
    ("a.jsonl", b'{"messages": [{"speaker": "user", "content": "x"}]}', "prompts",
     r":1: a message has no role"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": 5}]}', "prompts",
     r":1: the text of a turn is not a string"),
    ("a.jsonl", b'{"messages": "x"}', "prompts", r":1: a conversation is not a list of objects"),
    ("a.jsonl", b'{"prompt": "x", "system": 5}', "prompts", r":1: the system field is not a string"),
    ("a.jsonl", b'{"prompt": "x", "history": ["a"]}', "prompts", r":1: history is not a list"),
    ("a.jsonl", b'{"instruction": "x", "instances": ["a"]}', "demonstrations",
     r":1: instances is not a list of objects"),
    ("a.jsonl", b'{"question": "x", "answer": ["5"]}', "demonstrations",
     r":1: the answer is neither text nor a number"),
    ("a.jsonl", b'{"text": ["x"]}', "demonstrations", r":1: text is not a string"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", "b"], "ranks": ["1", "2"]}', "preferences",
     r":1: a rank, a gold score or the margin is not"),
    ("a.jsonl", b'{"prompt": "x", "completions": ["a", 5], "ranks": [1, 2]}', "preferences",
     r":1: a reply is missing or not a string"),
    ("a.jsonl", b'{"prompt": "x", "completions": "ab", "ranks": [0, 1]}', "preferences", r":1: "),
    ("a.jsonl", GOOD.replace(b"2}", b'"2"}'), "preferences",
     r":1: a rank, a gold score or the margin is not a finite number"),
    ("a.xlsx", GOOD, "preferences", r": only \.json, .* are read"),
    ("a.jsonl", json.dumps(SHP | {"labels": 2}).encode(), "preferences",
     r":1: labels is neither 1, for A, nor 0, for B"),
    ("a.jsonl", b'{"prompt": "x", "answer": "5"}', "demonstrations",
     r":1 doesn't hold .* \(to train on the answer, rename it to completion\)$"),
    ("a.jsonl", b'{"prompt": "x", "response_0": "a", "response_1": "b", "better_response_id": 0}',
     "preferences", r":1 .* \(PKU-SafeRLHF: make the"),
    ("a.jsonl", b'{"question": "x", "response_j": "a", "response_k": "b"}', "preferences",
     r":1 .* rename response_j to chosen"),
    ("a.jsonl", b'{"conversation_a": [], "conversation_b": [], "winner": "tie"}', "preferences",
     r":1 .* \(Chatbot Arena: "),
    ("a.jsonl", b'{"prompt": "x", "response": "a", "helpfulness": 4}', "preferences",
     r":1 .* \(HelpSteer: rename helpfulness to rating"),
    ("a.csv", b"prompt,completion\nx,a,b\n", "demonstrations", r":2 has 3 columns, the header has 2"),
    ("a.csv", b'prompt,completion\n"x\ny",a\nz\n', "demonstrations", r":4 has 1 columns, the header has 2"),
    ("a.csv", b"Cube 4.,64\nCube 5.,125\n", "demonstrations",
     r":1 is no header: .* this one has Cube 4\., 64"),
    ("a.csv", b"prompt,completion\nx,a\n\ny,\0\n", "demonstrations", r":4 holds a NUL character"),
    ("a.csv", b'prompt,completion\nx,a\ny,"b\nz,c\n', "demonstrations",
     r":3 is not a valid row: a quote that opens in this row is never closed"),
    ("a.tsv", b'prompt\tcompletion\n"So" he\tb\n', "demonstrations",
     r":2 is not a valid row: '\t' expected after '\"'"),
    ("a.csv", b"prompt,completion,prompt\nx,a,b\n", "demonstrations",
     r":1 names the column 'prompt' 2 times"),
    ("a.csv", b"", "demonstrations", r" holds no usable row"),
    ("a.csv", b"prompt,completion\n", "demonstrations", r" holds no usable row"),
    ("a.csv", b"prompt,completion\nx,caf\xe9 y\n", "demonstrations",
     r":2 is not UTF-8 text; convert it: iconv -f ITS_ENCODING -t UTF-8 FILE > NEW"),
    ("a.csv", b"prompt,completions,ranks\nx,a b,0 1\n", "preferences",
     r":2: completions and ranks are not lists"),
    ("a.csv.gz", b"prompt,completion\n", "demonstrations", r" can't be read"),
    ("a.jsonl.gz", GOOD, "preferences", r" can't be read"),
    ("a.jsonl.gz", ZIPPED[:-9], "preferences", r" can't be read"),
    ("a.jsonl.gz", ZIPPED[:10] + b"\xff" * 50, "preferences", r" can't be read"),
    ("missing.json", None, "preferences", r": no such file"),
], ids=lambda value: "" if isinstance(value, bytes) else None)
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path, name, raw, want, message):
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=re.escape(name) + message):
        sources_file.read_rows(tmp_path / name, want, SILENT)


@pytest.mark.case(18)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.txt", "a.csv"])
def test_a_file_with_random_damage_gives_rows_or_is_named_in_one_line(tmp_path, name, record_property):
    sources = [ALPACA, MESSAGES, PAIR, RM_STATIC, RANKING, HH, KTO, RATED, GSM8K, SHAREGPT, HISTORY, ORCA]
    write_rows(tmp_path / ("whole.json" if name == "a.json" else "whole.jsonl"), sources)
    if name == "a.csv":
        as_csv(tmp_path / "whole.jsonl",
               [ALPACA, ALPACA | {"output": "6,\n4"}, ALPACA | {"output": '"64"'}] * 9)
    whole = next(tmp_path.glob("whole.*")).read_bytes()
    path, refused, tries = tmp_path / name, 0, 200
    for seed in range(tries):
        rng = random.Random(seed)
        raw, at = bytearray(whole), rng.randrange(len(whole))
        written = rng.choice([
            b"\0", b"\xff\xfe", b"NaN", b"-1e999", b"\"", b"{", b"]", b",", b"\n", b"\r\n", b"\\ud800",
            "\u2028".encode(), b"<|endoftext|>", b"null"
        ])
        raw[at:at + rng.choice([0, 0, 1, 30, 500])] = rng.choice(
            [b"", written, raw[at:at + 40],
             bytes(rng.randrange(256) for _ in range(5))])
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        if name.endswith("gz") and seed % 2:
            path.write_bytes(path.read_bytes()[:rng.randrange(len(path.read_bytes()))])
        for want in ("demonstrations", "preferences", "prompts"):
            try:
                rows = sources_file.read_rows(path, want, SILENT)
            except UserError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                # Text that can be encoded.
                assert rows and all(turn["content"].encode() for row in rows for turn in row.prompt)
                assert all(reply.strip() and reply.encode() for row in rows for reply in row.replies)
    record_property("tries", tries), record_property("survived", tries)
    assert refused > tries / 4


@pytest.mark.case(18)
@pytest.mark.parametrize("name, where", [("a.jsonl", ":2"), ("a.json", ", row 2")])
def test_a_row_of_endless_length_is_refused(tmp_path, monkeypatch, name, where):
    monkeypatch.setattr(sources_file, "LONGEST", 2**20)
    write_rows(tmp_path / name, [PAIR, PAIR | {"chosen": "x" * (2**20 - 100)}])
    assert len(sources_file.read_rows(tmp_path / name, "preferences", SILENT)) == 2
    write_rows(tmp_path / name, [PAIR, PAIR | {"chosen": "x" * 2**20}])
    with pytest.raises(UserError, match=f"{name}{where} is longer than 1 "):
        sources_file.read_rows(tmp_path / name, "preferences", SILENT)


@pytest.mark.case(18)
def test_hostile_text_is_parsed_in_linear_time(tmp_path):
    for unit in ("\n\nHuman:", "\n\nAssistant:", "<<", "<<1", "####", "\n\n\n", ">>", "#### 1,"):
        text = unit * (2**20 // len(unit))
        for row in ({"chosen": text, "rejected": text}, {"question": text, "answer": text},
                    RM_STATIC | {"prompt": text + "\n\nAssistant:"}, ALPACA | {"input": text}):
            # In seconds, or in years.
            rows = sources_file.read_rows(write_rows(tmp_path / "a.jsonl", [{"prompt": "x"}, row]), "prompts",
                                          SILENT)
            assert rows[0].text == "x" and len(rows) <= 2


# -- several files, mixtures, parts

def questions(name, n):
    return [{"prompt": f"{name} {i}"} for i in range(n)]


def test_several_files_are_read_one_after_the_other_whatever_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a.jsonl", "b, c.json", "d:1.jsonl", "e.jsonl:2,f.jsonl"]
    for name in names:
        write_rows(Path(name), questions(name, 3))
    for name in names:
        expected = [f"{name} {i}" for i in range(3)]
        assert [row.text for row in sources_file.read_rows(name, "prompts", SILENT)] == expected
        assert len(sources_file.read_rows(f"{name}:2", "prompts", SILENT)) == 3
    for chosen in itertools.permutations(names):
        expected = [f"{name} {i}" for name in chosen for i in range(3)]
        assert [row.text for row in sources_file.read_rows(", ".join(chosen), "prompts", SILENT)] == expected
    for spec, message in [("a.jsonl,a.jsonl", "names a.jsonl twice"), ("a.jsonl,", "names nothing"),
                          ("", "names nothing"), ("a.jsonl:1,d:1.jsonl", "give every file a weight"),
                          ("a.jsonl:0", "a weight must be > 0"), ("a.jsonl:-1", "a weight must"),
                          ("a.jsonl:nan", "a weight must"), ("a.jsonl:inf", "a weight must"),
                          ("a.jsonl:x", "a.jsonl:x: no such file")]:
        with pytest.raises(UserError, match=message):
            sources_file.read_rows(spec, "prompts", SILENT)


@pytest.mark.parametrize("sizes, weights, expected", [
    ((100, 100), (0.8, 0.2), (100, 25)),
    ((100, 100), (4, 1), (100, 25)),
    ((100, 10), (0.5, 0.5), (10, 10)),
    ((30, 7, 50), (3, 0.7, 5), (30, 7, 50)),
    ((30, 3, 50), (0.1, 0.1, 0.2), (3, 3, 6)),
    ((9, ), (0.3, ), (9, )),
    ((100, 100), (1, 3), (33, 100)),
])
def test_a_mixture_has_its_shares_repeats_no_row_and_is_the_same_every_time(tmp_path, sizes, weights,
                                                                            expected):
    paths = [write_rows(tmp_path / f"{i}.jsonl", questions(i, n)) for i, n in enumerate(sizes)]
    spec, said = ",".join(f"{path}:{weight}" for path, weight in zip(paths, weights)), []
    texts = [row.text for row in sources_file.read_rows(spec, "prompts", said.append)]
    assert tuple(sum(text.startswith(f"{i} ") for text in texts) for i in range(len(sizes))) == expected
    assert len(set(texts)) == len(texts)
    assert texts == [row.text for row in sources_file.read_rows(spec, "prompts", SILENT)]
    assert f"mixture of {sum(expected)} rows: {expected[0]} of {paths[0]}" in said[-1]
    chosen = [int(text.split()[1]) for text in texts if text.startswith("0 ")]
    # They are not the first rows.
    assert chosen == sorted(chosen) and (len(chosen) > sizes[0] / 2 or max(chosen) > sizes[0] / 2)


def test_a_share_of_less_than_a_row_is_refused(tmp_path):
    a, b = (write_rows(tmp_path / name, questions(name, 5)) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(UserError, match=r"the share of .*b.jsonl is less than a row"):
        sources_file.read_rows(f"{a}:0.9,{b}:0.1", "prompts", SILENT)


def test_parts_are_disjoint_cover_everything_and_know_nothing_of_the_held_out_prompts(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", questions("a", 4000) + questions("a", 500))
    parts = [[row.text for row in sources_file.read_rows(path, "prompts", SILENT, f"2/4/4:{i}")]
             for i in (1, 2, 3)]
    expected = sorted(row["prompt"] for row in questions("a", 4000) + questions("a", 500))
    assert sorted(sum(parts, [])) == expected
    assert not set(parts[0]) & set(parts[1])
    assert not set(parts[1]) & set(parts[2])
    assert not set(parts[0]) & set(parts[2])
    for part, share in zip(parts, (0.2, 0.4, 0.4)):
        assert len(set(part)) / 4000 == pytest.approx(share, abs=4 * (share * (1 - share) / 4000) ** 0.5)
        held_out = sources_file.split_by_prompt([Row(user(text)) for text in set(part)], 0.1)[1]
        assert len(held_out) / len(set(part)) == pytest.approx(0.1, abs=4 * (0.09 / len(set(part))) ** 0.5)
    assert len(sources_file.read_rows(path, "prompts", SILENT, "1:1")) == 4500
    assert [row.text for row in sources_file.read_rows(path, "prompts", SILENT, "0.5/1/1.:3")] == parts[2]
    texts = write_rows(tmp_path / "text.jsonl", [{"text": f"document {i}"} for i in range(400)])
    rows = [sources_file.read_rows(texts, "demonstrations", SILENT, f"1/1:{i}") for i in (1, 2)]
    assert 150 < len(rows[0]) < 250 and len(rows[0]) + len(rows[1]) == 400  # plain text goes by itself
    train, heldout = sources_file.split_by_prompt(rows[0] + rows[1], 0.5)
    assert 150 < len(train) < 250 and len(train) + len(heldout) == 400


@pytest.mark.parametrize("part", [
    "2/4/4", "2/4/4:0", "2/4/4:4", ":1", "a/b:1", "2//4:1", "2/0:1", "0:1", "-1/2:1", "nan/1:1", "1/1:1.5",
    "1/1:",
])
def test_a_malformed_part_is_shown_the_form(tmp_path, part):
    path = write_rows(tmp_path / "a.jsonl", questions("a", 3))
    with pytest.raises(UserError,
                       match="write the shares of the stages and the number of this one, as in 2/4/4:1"):
        sources_file.read_rows(path, "prompts", SILENT, part)


def test_a_part_of_a_mixture_keeps_its_shares(tmp_path):
    a, b = (write_rows(tmp_path / name, questions(name, 1000)) for name in ("a.jsonl", "b.jsonl"))
    parts = [[row.text for row in sources_file.read_rows(f"{a}:3,{b}:1", "prompts", SILENT, f"1/1:{i}")]
             for i in (1, 2)]
    for part in parts:
        expected = pytest.approx(3 * sum("b" in text[:1] for text in part), abs=3)
        assert sum("a" in text[:1] for text in part) == expected
    assert not set(parts[0]) & set(parts[1])
    with pytest.raises(UserError, match="has no row in part"):
        for i in (1, 2):  # a single prompt is in one of them
            sources_file.read_rows(write_rows(tmp_path / "c.jsonl", questions("c", 1)), "prompts", SILENT,
                                   f"1/1:{i}")


# -- what is held out

def test_split_keeps_a_prompt_on_one_side_whatever_the_order():
    rows = [Row(user(f"question {i % 3000}"), [str(i)]) for i in range(4000)]
    train, heldout = sources_file.split_by_prompt(rows, 0.1)
    assert sorted(int(row.replies[0]) for row in train + heldout) == list(range(4000))
    assert not {row.text for row in train} & {row.text for row in heldout}
    assert 0.08 < len({row.text for row in heldout}) / 3000 < 0.12  # 3.6 standard deviations
    assert sources_file.split_by_prompt(rows[::-1], 0.1) == (train[::-1], heldout[::-1])
    assert sources_file.split_by_prompt(rows, 0.0) == (rows, [])
    assert sources_file.split_by_prompt(rows, 1.0) == ([], rows)


@pytest.mark.parametrize("text, fraction, place", [
    ("a\n\nbb\n\nccc\n\n", 0.25, 7), ("aaaa bb. " * 50 + "\n\n" + "c" * 23, 0.05, 452),
    ("one two three four", 0.3, 14),
    ("把这句话翻译成英文", 0.34, 6), ("ab", 0.01, 1), ("ab", 0.99, 1), ("a b\n\n\n\n\n\n\n", 0.1, 2),
    ("line\n" * 100, 0.05, 475),
    ("line\n" * 5 + "\n" + "line\n" * 95, 0.05, 476),  # the blank line is too far away
])
def test_of_a_document_the_end_is_held_out_whatever_its_hash(text, fraction, place):
    document = Row([], [text], [0], document=True)
    train, held_out = sources_file.split_by_prompt([document], fraction)
    assert (train, held_out) == ([Row([], [text[:place]], [0], document=True)],
                                 [Row([], [text[place:]], [0], document=True)])
    assert sources_file.split_by_prompt([document], 0.0) == ([document], [])
    assert sources_file.split_by_prompt([document], 1.0) == ([], [document])
    rows = [Row([], [text], [0]), Row(user("a"), ["b"], [0])]  # of other files, go by their hash
    alone = sources_file.split_by_prompt(rows, fraction)
    together = sources_file.split_by_prompt([document, *rows], fraction)
    assert together == (train + alone[0], held_out + alone[1])


def test_a_documents_parts_and_its_held_out_ends_are_all_of_it_once(tmp_path):
    rng = random.Random(0)
    for size in [2, 3, 10, 100, 5000] * 4:
        text = "".join(rng.choice(["word", " ", ". ", "\n", "\n\n", "日本"]) for _ in range(size)) + "."
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        pieces = []
        for part in ("2/4/4:1", "2/4/4:2", "2/4/4:3"):
            with contextlib.suppress(UserError):  # a short text has no room for three
                row, = sources_file.read_rows(tmp_path / "a.txt", "demonstrations", SILENT, part)
                pieces += [side.text for rows in sources_file.split_by_prompt([row], 0.2) for side in rows]
        assert "".join("".join(pieces).split()) == "".join(text.split())  # blank pieces are left out
        if size == 5000:
            shares = [len(piece) / len(text) for piece in pieces]
            assert shares == pytest.approx([0.16, 0.04, 0.32, 0.08, 0.32, 0.08], abs=0.02)


def test_nothing_held_out_is_said_with_the_flag_that_changes_it():
    rows, said = [Row(user(f"question {i}"), ["a"]) for i in range(6)], []
    assert sources_file.split_by_prompt(rows, 1e-6, said.append) == (rows, [])
    assert len(said) == 1 and "warning: --val-fraction 1e-06 holds out none of these 6 rows" in said[0]
    assert "a larger --val-fraction" in said[0]
    sources_file.split_by_prompt([Row([], ["a"], [0], document=True)], 0.5, said.append)  # which can't be cut
    assert len(said) == 2
    for fraction in (0.0, 0.5, 1.0):
        assert len(sources_file.split_by_prompt(rows, fraction, said.append)[0] + rows) > 5 and len(said) == 2
