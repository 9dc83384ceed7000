"""feedback.py: what its files hold, who reads them, the judge by letters, the repair and what is kept of it.

What the rules say of a turn stands in test_reactions.py.
"""
import json

import pytest
import torch

import feedback
import toy
from examples import user
from feedback import LETTERS, cut_turns, kinds_by_judge, letter_logprobs, question_on
from formats.model_folder import load_model, save_model
from formats.sources import read_rows
from model import GPT, GPTConfig
from plumbing.flags import UserError
from reactions import KINDS, exchanges_of, kind_of
from tools import SILENT, WORDS, exit_code, run_here, write_rows

# A reply that the small model often says.
FIRST = "It is good."
NAMES = ("labels", "sft", "pairs")
HH = "\n\nHuman: Say apple.\n\nAssistant: Pear.\n\nHuman: It should be apple.\n\nAssistant:"
SYSTEM = {"role": "system", "content": "Be brief."}


def files_in(folder):
    """{name: rows} of the files that are there."""
    found = {}
    for name in NAMES:
        if (folder / f"{name}.jsonl").exists():
            found[name] = [json.loads(line) for line in open(folder / f"{name}.jsonl")]
    return found


def summary_in(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def talks(tmp_path):
    """A file of single questions to the small model, each with a reply and a reaction: half of them bad."""
    rows = []
    for i, word in enumerate(WORDS * 4):
        reply, reaction = (FIRST, "That is wrong.") if i % 2 else ("No.", "Thanks!")
        rows.append({"messages": user(f"Say {word}.", reply, reaction), "answer": str(i)})
    return write_rows(tmp_path / "talks.jsonl", rows)


# -- files

def test_each_file_holds_what_it_is_for_whatever_format_the_conversations_have(tmp_path, capsys):
    rows = [
        {"messages": [SYSTEM, *user("Say river.", "River.", "Great!", "Yes.", "Name it again.")]},
        {"conversations": [
            {"from": "human", "value": "Say stone."}, {"from": "gpt", "value": "No."},
            {"from": "human", "value": "That is not helpful."}, {"from": "gpt", "value": "Stone."}]},
        {"chosen": f"{HH} Apple.", "rejected": f"{HH} No."},
        {"prompt": "Say window."},
    ]
    for i, row in enumerate(rows):
        write_rows(tmp_path / f"{i}.jsonl", [row])
    data = ",".join(f"{tmp_path}/{i}.jsonl" for i in range(len(rows)))
    out = tmp_path / "out"
    run_here("feedback", f"--data {data} --out {out}")
    river = [SYSTEM, *user("Say river.")]
    assert files_in(out) == {
        "labels": [
            {"prompt": river, "completion": "River.", "label": True, "kind": "praise"},
            {"prompt": "Say stone.", "completion": "No.", "label": False, "kind": "complain"},
            {"prompt": "Say apple.", "completion": "Pear.", "label": False, "kind": "correct"},
        ],
        "sft": [{"prompt": river, "completion": "River."}],
    }
    summary = summary_in(out)
    assert summary["kinds"] == {
        "repeat": 0, "correct": 1, "complain": 1, "clarify": 0, "praise": 1, "none": 1}
    assert (summary["conversations"], summary["bad"], summary["repaired"]) == (4, 2, None)
    assert summary["turns"] == {"user": 8, "assistant": 4} and summary["rows"] == {"labels": 3, "sft": 1}
    assert summary["config"]["data"] == data and summary["config"]["by"] == "rules"
    assert "4 replies with a turn of the user's behind them: 0 repeat, 1 correct" in capsys.readouterr().out
    read = read_rows(f"{out}/labels.jsonl", "labels", SILENT)
    assert [row.prompt for row in read] == [river, user("Say stone."), user("Say apple.")]
    assert [row.ranks for row in read] == [[0], [1], [1]]


def test_every_file_is_read_as_it_is_by_the_scripts_that_it_is_for(small, talks, tmp_path):
    out = tmp_path / "out"
    run_here("feedback", f"--data {talks} --repair {small}/other --max-new-tokens 12 --out {out} --threads 1")
    rows = files_in(out)
    assert len(rows["labels"]) == 24 and 0 < len(rows["pairs"]) <= 12
    assert len(rows["sft"]) == 12 + len(rows["pairs"]) == sum(summary_in(out)["rows"].values()) - 24 \
        - len(rows["pairs"])
    common = f"--model {small}/sft --steps 1 --batch-tokens 500 --val-fraction 0 --threads 1"
    for script, name in (("kto", "labels"), ("sft", "sft"), ("dpo", "pairs"), ("reward", "pairs")):
        run_here(script, common, f"--data {out}/{name}.jsonl --out {tmp_path}/{script}")


# -- repair

@pytest.mark.parametrize("checked", [False, True])
def test_a_repaired_reply_is_kept_that_is_whole_other_and_better_by_the_check(
        checked, small, talks, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("""
def number(replies, answers, prompts, dialogues):
    for prompt, reply, talk in zip(prompts, replies, dialogues):
        assert talk[0]["content"] == prompt and talk[1]["content"] == reply
    # Some first replies are better than half, and some repaired ones no better than they.
    return [0.6 if reply == "It is good." and int(answer) % 3 == 0 else len(reply) % 9 / 8
            for reply, answer in zip(replies, answers)]
""")
    monkeypatch.syspath_prepend(tmp_path)
    batches = []
    right = feedback.sample

    def recorded(*args, **options):
        batches.append(right(*args, **options))
        return batches[-1]

    monkeypatch.setattr(feedback, "sample", recorded)
    flags = "--check mine:number" if checked else ""
    run_here("feedback", f"--data {talks} --repair {small}/sft --max-new-tokens 7 --batch 5 --threads 1",
             f"--out {tmp_path}/out", flags)
    pairs, counts = [], {"same": 0, "cut": 0, "worse": 0}
    number = 0
    for batch in batches:
        for prompt, text, ended in zip(batch.prompts, batch.texts, batch.ended.tolist()):
            # Every second turn is bad.
            number += 2
            assert prompt.row.answer == str(number - 1)
            third = (number - 1) % 3 == 0
            first = 0.6 if third else 2 / 8
            score = 0.6 if text == FIRST and third else len(text) % 9 / 8
            worse = checked and not (score > 0.5 and score > first)
            counts["same"] += text.strip() == FIRST
            counts["cut"] += not ended
            counts["worse"] += worse
            if ended and text.strip() and text.strip() != FIRST and not worse:
                pairs.append({"prompt": prompt.row.text, "chosen": text.strip(), "rejected": FIRST})
    rows = files_in(tmp_path / "out")
    assert number == 24 and rows["pairs"] == pairs != []
    assert counts["same"] and counts["cut"] and (counts["worse"] > 0) == checked
    assert summary_in(tmp_path / "out")["repaired"] == len(pairs)
    repaired = [row for row in rows["sft"] if row["completion"] != "No."]
    assert repaired == [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]


def test_a_check_above_a_half_is_needed_and_above_the_first_reply_too(small, talks, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("""
def low(replies):
    return [0.1 if reply == "It is good." else 0.5 for reply in replies]

def equal(replies):
    return [0.9 for reply in replies]

def wrong(replies):
    return [0.9 if len(replies) == 1 else float("inf") for reply in replies]
""")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("low", "equal"):
        run_here("feedback", f"--data {talks} --repair {small}/sft --max-new-tokens 12 --threads 1",
                 f"--check mine:{name} --out {tmp_path}/{name}")
        assert files_in(tmp_path / name)["pairs"] == [] and summary_in(tmp_path / name)["repaired"] == 0
    with pytest.raises(UserError, match="mine:wrong gave a reply a number that is not finite"):
        run_here("feedback", f"--data {talks} --repair {small}/sft --max-new-tokens 12 --threads 1",
                 f"--check mine:wrong --out {tmp_path}/wrong")


# -- turns

def test_of_a_prompt_the_last_user_turns_are_kept_behind_its_system_turn():
    talk = user("1", "a", "2", "b", "3")
    assert cut_turns(talk, 0) == cut_turns(talk, 3) == cut_turns(talk, 9) == talk
    assert cut_turns(talk, 2) == talk[2:] and cut_turns(talk, 1) == talk[4:]
    assert cut_turns([SYSTEM, *talk], 1) == [SYSTEM, *talk[4:]]
    assert cut_turns([SYSTEM, *talk], 3) == [SYSTEM, *talk]


@pytest.mark.parametrize("turns, warned", [(0, True), (2, True), (1, False)])
def test_a_model_of_single_turns_is_not_given_several_without_a_word(turns, warned, small, tmp_path, capsys):
    talk = user("Say river.", "River.", "Say stone.", "No.", "Say apple.", "Pear.", "No, apple.")
    write_rows(tmp_path / "talks.jsonl", [{"messages": talk}])
    run_here("feedback", f"--data {tmp_path}/talks.jsonl --repair {small}/sft --max-new-tokens 12",
             f"--turns {turns} --out {tmp_path}/out --threads 1")
    said = capsys.readouterr().out
    assert ("knows single turns only, and 1 of 1 prompts have several; --turns 1" in said) == warned
    label, = files_in(tmp_path / "out")["labels"]
    wanted = {0: talk[:5], 2: talk[2:5], 1: "Say apple."}[turns]
    assert (label["prompt"], label["completion"], label["kind"]) == (wanted, "Pear.", "correct")


def test_a_repeat_is_seen_though_the_files_keep_one_turn(tmp_path):
    talk = user("Who wrote Faust?", "Goethe.", "Say stone.", "No.", "Tell me who wrote Faust!")
    write_rows(tmp_path / "talks.jsonl", [{"messages": talk}])
    run_here("feedback", f"--data {tmp_path}/talks.jsonl --turns 1 --out {tmp_path}/out")
    label, = files_in(tmp_path / "out")["labels"]
    assert (label["prompt"], label["kind"]) == ("Say stone.", "repeat")


# -- who decides

@pytest.fixture
def letters(tmp_path):
    """A folder with a model of large random weights, so that its letters differ from prompt to prompt."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(toy.tokenizer().n_vocab, 400, 2, 2, 2, 32))
    for p in model.parameters():
        p.data.normal_()
    save_model(tmp_path / "judge", model, toy.tokenizer())
    return tmp_path / "judge"


def test_the_judge_is_read_by_the_letters_at_its_first_token_as_in_a_slow_loop(letters, talks, tmp_path):
    exchanges = exchanges_of(read_rows(str(talks), "prompts", SILENT))
    exchanges += [exchanges[0]._replace(reaction="So it is. " * k) for k in range(1, 9)]
    exchanges.insert(3, exchanges[0]._replace(reply="It is long. " * 99))
    config = feedback.Config(by=str(letters), threads=1, micro_batch_tokens=900)
    found = kinds_by_judge(exchanges, config)
    model, tokenizer = load_model(letters, GPT)
    expected, slow, prompts = [], [], []
    for exchange in exchanges:
        text = question_on(exchange)[0]["content"]
        assert exchange.reply in text and exchange.reaction in text and exchange.before[-1]["content"] in text
        ids = [tokenizer.roles["user"], *tokenizer.encode(text), tokenizer.roles["assistant"]]
        if len(ids) > 400:
            expected.append("none")
            continue
        with torch.no_grad():
            logits = model.logits(model.transformer(torch.tensor([ids])))[0, -1]
        logprobs = logits.log_softmax(-1)
        own = [logprobs[tokenizer.encode(letter)[0]].item() for letter in LETTERS]
        expected.append((*KINDS, "none")[own.index(max(own))])
        slow.append(own)
        prompts.append(ids)
    assert found == expected and found[3] == "none" and len(prompts) == len(exchanges) - 1
    opened = feedback.open_folder(str(letters), config)
    fast = letter_logprobs(*opened, prompts, config.micro_batch_tokens)
    # Padding changes no more than rounding does, and the prompts differ by more.
    assert torch.allclose(fast, torch.tensor(slow), atol=1e-3) and (fast.std(0) > 0.01).all()


def test_a_judge_makes_files_and_says_which_questions_are_too_long(
        letters, talks, tmp_path, monkeypatch, capsys):
    def praise(alone, model, tokenizer, prompts, budget):
        assert max(map(len, prompts)) <= 400
        return torch.eye(6)[[LETTERS.index("E")] * len(prompts)]

    monkeypatch.setattr(feedback, "letter_logprobs", praise)
    rows = [json.loads(line) for line in open(talks)]
    rows.append({"messages": user("Say it.", "No " * 400, "Thanks!")})
    write_rows(tmp_path / "more.jsonl", rows)
    run_here("feedback", f"--data {tmp_path}/more.jsonl --by {letters} --out {tmp_path}/out --threads 1")
    assert "1 of 25 questions are longer than the judge's context of 400 tokens" in capsys.readouterr().out
    assert summary_in(tmp_path / "out")["kinds"] == dict.fromkeys(KINDS, 0) | {"praise": 24, "none": 1}


def test_a_function_decides_from_replies_and_whole_dialogues(talks, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("""
def kinds(replies, dialogues, answers):
    assert all(talk[-2]["content"] == reply for talk, reply in zip(dialogues, replies))
    names = {"Thanks!": "praise", "That is wrong.": None}
    return [None if answer == "0" else names[talk[-1]["content"]] for talk, answer in zip(dialogues, answers)]

def short(replies):
    return ["praise"]

def other(replies):
    return ["thanks"] * len(replies)

def nothing(replies):
    return [None] * len(replies)
""")
    monkeypatch.syspath_prepend(tmp_path)
    run_here("feedback", f"--data {talks} --by mine:kinds --out {tmp_path}/out")
    assert summary_in(tmp_path / "out")["kinds"] == dict.fromkeys(KINDS, 0) | {"praise": 11, "none": 13}
    for name in ("short", "other"):
        with pytest.raises(UserError, match=f"--by mine:{name} must return a list that has one of repeat"):
            run_here("feedback", f"--data {talks} --by mine:{name} --out {tmp_path}/new")
    with pytest.raises(UserError, match="no turn behind a reply is feedback"):
        run_here("feedback", f"--data {talks} --by mine:nothing --out {tmp_path}/new")


def test_the_rules_are_those_of_reactions(talks, tmp_path):
    run_here("feedback", f"--data {talks} --out {tmp_path}/out")
    exchanges = exchanges_of(read_rows(str(talks), "prompts", SILENT))
    kinds = [kind_of(own.reply, own.reaction, own.earlier) for own in exchanges]
    assert [row["kind"] for row in files_in(tmp_path / "out")["labels"]] == kinds
    assert set(kinds) == {"praise", "complain"}


# -- mistakes

@pytest.mark.parametrize("flags, said", [
    ("--check mine:number", "--check is for replies that --repair gives"),
    ("--out {file}", "is a file; name a folder"),
    ("--out {held}", "already holds labels.jsonl; name another or delete it"),
    ("--data {tmp}/nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--data {tmp}/single.jsonl", "no reply is followed by a turn of the user's"),
    ("--data {tmp}/small_talk.jsonl", "no turn behind a reply is feedback"),
    ("--data {tmp}/bad.jsonl", "bad.jsonl:1 is not valid JSON"),
    ("--by nowhere", "nowhere: no such checkpoint folder"),
    ("--by mine:kinds", "--by mine:kinds can't be imported"),
    ("--repair nowhere", "nowhere: no such checkpoint folder"),
    ("--repair {small}/reward", "holds a reward model, but a language model is needed"),
    ("--repair {small}/sft --check mine:number", "--check mine:number can't be imported"),
    ("--repair {small}/sft --max-new-tokens 64", "leaves no room for a prompt in the context of 64"),
    ("--by {small}/sft", "no question fits into its context of 64 tokens"),
    ("--turns -1", "--turns must be >= 0, got -1"),
    ("--turn 1", "did you mean --turns?"),
])
def test_a_mistake_is_one_clear_line_and_no_file_is_written(flags, said, small, talks, tmp_path, capsys):
    write_rows(tmp_path / "single.jsonl", [{"prompt": "Say river."}])
    write_rows(tmp_path / "small_talk.jsonl", [{"messages": user("Say river.", "River.", "Say stone.")}])
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "labels.jsonl").write_text("")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    flags = flags.format(tmp=tmp_path, small=small, file=talks, held=tmp_path / "held")
    code = exit_code("feedback", f"--data {talks} --out {tmp_path}/out --threads 1", flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and said in error, error
    assert before == {path for path in tmp_path.rglob("*") if path.is_file()}


def test_it_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="feedback.py is one process: leave out torchrun"):
        run_here("feedback", "")


def test_ctrl_c_while_answering_leaves_nothing_and_a_second_try_needs_no_flag(
        small, talks, tmp_path, monkeypatch):
    flags = f"--data {talks} --repair {small}/sft --max-new-tokens 8 --batch 2 --out {tmp_path}/out"
    right = feedback.sample
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*args, **options)

    monkeypatch.setattr(feedback, "sample", interrupted)
    assert exit_code("feedback", flags) == 130
    assert list((tmp_path / "out").iterdir()) == []
    assert exit_code("feedback", flags) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "labels.jsonl", "pairs.jsonl", "sft.jsonl", "summary.json"]
