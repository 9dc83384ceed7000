"""chat.py: answers from a pipe, several models at once, and models that know single questions alone."""
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import chat
import tools
from data import encode_dialogue, encode_prompt
from formats.families import knows_single_turns
from formats.model_folder import load_model, read_config
from formats.sources import read_rows
from generate import generate
from model import ScalarModel, last_scores
from plumbing.flags import UserError
from plumbing.web import Refused
from tools import command


def test_chat_answers_from_a_pipe_with_one_model_and_with_two(chain):
    root = chain[0]
    one = command("chat",
                  f"--model {root}/sft --max-new-tokens 5",
                  input="What is 1 + 2?\n\n/quit\nnot read\n")
    assert one.returncode == 0 and len(one.stdout.splitlines()) <= 2, one.stderr
    two = command("chat",
                  f"--compare {root}/sft {root}/ppo --max-new-tokens 5 --system Hello",
                  input="What is 1 + 2?\n")
    assert two.returncode == 0 and "sft: " in two.stdout and "ppo: " in two.stdout
    full = command("chat", f"--model {root}/sft --max-new-tokens 5", input="What is 1 + 2? " * 20 + "\n")
    assert full.returncode == 0 and "don't fit the model's context" in full.stdout


def test_chat_forgets_what_a_model_of_single_questions_cannot_follow_and_says_so_once(chain, talk, capsys):
    root, notice = chain[0], "was trained on single questions, so it forgets"
    for stage in ("sft", "ppo", "dpo"):  # what sft.py has written, the other stages keep
        assert talk(f"--model {root}/{stage}") == [1, 1, 1]
        assert capsys.readouterr().out.count(f"({stage} {notice}") == 1
    for flags, expected in (("--history keep", [1, 3, 5]), ("--history forget", [1, 1, 1])):
        assert talk(f"--model {root}/sft {flags}") == expected
        assert notice not in capsys.readouterr().out
    assert talk(f"--model {root}/sft --system Hi") == [2, 2, 2]
    assert knows_single_turns(read_config(root / "reward")[0])


def test_chat_names_two_models_by_what_tells_them_apart(judged, tmp_path):
    flags = f"--compare {tmp_path}/a/sft {tmp_path}/b/sft --max-new-tokens 4"
    both = command("chat", flags, input="What is 1 + 2?\n")
    assert both.returncode == 0 and "a/sft: " in both.stdout and "b/sft: " in both.stdout


@pytest.fixture
def chat_of(small, tmp_path):
    """chat_of(flags) -> a `Chat` of two models, that keeps its rows in tmp_path."""
    def make(*flags):
        words = tools.split([f"--compare {small}/sft {small}/other --out {tmp_path}/kept --max-new-tokens 6",
                             "--temperature 2 --history keep", *flags])
        return chat.Chat(tools.parse_flags(chat.Config, "", words))
    return make


def kept(tmp_path, name):
    text = (tmp_path / "kept" / f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_pieces_of_a_reply_are_the_reply_and_it_is_what_generate_gives(chat_of):
    one = chat_of("--seed 3")
    for talker in one.talkers:
        pieces = []
        found = one.answer(talker, "Say river.", pieces.append)
        assert "".join(pieces) == found["reply"] and talker.messages[-1]["content"] == found["reply"]
    generator = torch.Generator().manual_seed(3)
    for talker in one.talkers:
        prompt = encode_prompt(talker.tokenizer, talker.messages[:-1])
        expected = generate(talker.model, [prompt], 6, talker.tokenizer, 2.0, generator=generator)
        assert expected.texts(talker.tokenizer) == [talker.messages[-1]["content"]]


def test_letters_of_several_bytes_come_whole(chat_of, monkeypatch):
    one = chat_of()
    talker = one.talkers[0]
    texts = iter(["a", "a\ufffd", "a\ufffd\ufffd", "a尼", "a尼b", "a尼b"])

    class Growing:
        ended = [True]

        def result(self):
            return self

        def texts(self, tokenizer):
            return [next(texts)]

    def generated(*args, watch, **options):
        for _ in range(5):
            watch(Growing())
        return Growing()

    monkeypatch.setattr(chat, "generate", generated)
    pieces = []
    one.answer(talker, "x", pieces.append)
    assert [piece for piece in pieces if piece] == ["a", "尼", "b"]


def test_scores_are_those_of_the_reward_model(chat_of, small):
    one = chat_of(f"--reward {small}/reward")
    found = one.answer(one.talkers[0], "Say river.")
    model, tokenizer = load_model(small / "reward", ScalarModel)
    ids, _ = encode_dialogue(tokenizer, one.talkers[0].messages, last_only=True)
    with torch.no_grad():
        expected = last_scores(model, torch.tensor([ids]), torch.tensor([len(ids)]))
    assert found["scores"] == {"reward": pytest.approx(expected.item(), abs=1e-5)}


def test_what_is_thought_of_replies_is_kept_as_rows_that_train(chat_of, tmp_path, small):
    one = chat_of()
    for talker in one.talkers:
        one.answer(talker, "Say river.")
    replies = [talker.messages[-1]["content"] for talker in one.talkers]
    assert replies[0] != replies[1]
    assert "labels.jsonl" in one.command("/good") and one.command("/bad 2")
    assert one.command("/best 2") and one.command("/save")
    assert [(row["messages"][-1]["content"], row["label"]) for row in kept(tmp_path, "labels")] == [
        (replies[0], True), (replies[1], False)]
    row, = kept(tmp_path, "preferences")
    assert (row["completions"], row["ranks"]) == (replies, [1, 0]) and row["models"][0].endswith("sft")
    # Both go on from the better one.
    assert [talker.messages[-1]["content"] for talker in one.talkers] == [replies[1]] * 2
    assert len(kept(tmp_path, "conversations")) == 2
    wanted = {"labels": "labels", "preferences": "preferences", "conversations": "demonstrations"}
    for name, want in wanted.items():
        assert read_rows(tmp_path / "kept" / f"{name}.jsonl", want, tools.SILENT)
    with pytest.raises(UserError, match="all of them say the same"):
        one.command("/best 1")


@pytest.mark.parametrize("line, said", [
    ("/good", "sft has said nothing yet"), ("/good 3", "there is no model 3, only 1 to 2"),
    ("/save", "there is no conversation yet"), ("/nothing", "there is no /nothing"),
    ("/set top_p 0", "0 is no value"), ("/set top_k 1.5", "1.5 is no value"),
    ("/set heat 1", "/set takes one of"), ("/set temperature nan", "nan is no value"),
    ("/set temperature", "/set takes one of"),
])
def test_a_wrong_command_is_one_line(line, said, chat_of):
    one = chat_of()
    with pytest.raises(UserError, match=said):
        one.command(line)
    assert one.settings["top_p"] == 1 and one.settings["top_k"] == 0


def test_settings_change_what_is_sampled_and_a_seed_repeats_it(chat_of):
    one = chat_of()
    talker = one.talkers[0]

    def reply():
        talker.begin()
        return one.answer(talker, "Say river.")["reply"]

    assert "temperature 2" in one.command("/set")
    one.command("/set seed 5")
    first = [reply() for _ in range(3)]
    one.command("/set seed 5")
    assert [reply() for _ in range(3)] == first
    one.command("/set temperature 0")
    assert len({reply() for _ in range(3)}) == 1
    one.command("/set max-new-tokens 1")
    assert len(talker.tokenizer.encode(reply())) <= 1


def test_the_page_gets_pieces_and_then_the_whole_of_each_models_reply(chat_of):
    one = chat_of()
    routes = chat.routes(one)
    assert routes["/begin"]({})["models"] == ["sft", "other"]
    happened = list(routes["/say"]({"line": "Say river."}))
    for number, talker in enumerate(one.talkers):
        *pieces, whole = [what for what in happened if what["model"] == number]
        assert "".join(what["piece"] for what in pieces) == whole["reply"] == talker.messages[-1]["content"]
    assert routes["/command"]({"line": "/new"})["messages"] == [[], []]
    failed = list(routes["/say"]({"line": "Say river. " * 60}))
    assert "don't fit the model's context" in failed[0]["error"]
    for body in ({}, {"line": 3}, {"line": "  "}):
        with pytest.raises(Refused):
            routes["/say"](body)
    with pytest.raises(Refused):
        routes["/command"]({"line": "new"})


def test_a_page_that_is_closed_while_a_reply_grows_leaves_it_whole(chat_of):
    one = chat_of()
    happening = chat.routes(one)["/say"]({"line": "Say river."})
    first = next(happening)
    happening.close()
    assert first["model"] == 0 and one.talkers[0].has_reply() and not one.talkers[1].has_past()


def test_the_page_is_served_and_ends_with_ctrl_c(small, tmp_path):
    words = tools.split([f"--model {small}/sft --web --port 0 --no-browser --out {tmp_path}/kept",
                         "--threads 1 --max-new-tokens 6"])
    process = subprocess.Popen([sys.executable, "-u", tools.ROOT / "chat.py", *words],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=tools.ENVIRONMENT, start_new_session=True)
    address = next(line for line in process.stdout if line.startswith("http"))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0 and "token=" in address
    wrong = command("chat", f"--model {small}/sft --port 7")
    assert wrong.returncode == 2 and "--host and --port are for --web" in wrong.stderr
