"""constitution.py: labels in both orders against a slow loop, revisions turn by turn, files, resuming."""
import json
import math
import signal

import numpy as np
import pytest
import torch

import constitution
from constitution import both_orders, comparable, figures, file_rows
from examples import BRACKETS, CHATML, JUDGES, TOKENIZER, open_folder, user
from formats.model_folder import load_model
from formats.principles import Principle
from formats.rows import Row
from formats.sources import read_rows
from judges import encode_question, letter_logprobs
from model import GPT
from plumbing.flags import UserError
from plumbing.run import Alone
from rollout import respond
from tools import ROOT, SILENT, WORDS, exit_code, run_here, write_rows

COMPARISON = "{prompt} {a} (A) or {b} (B)?"
PRINCIPLES = [
    {"name": "kind", "critique": "Is it kind?", "revision": "Be kind.", "comparison": COMPARISON},
    {"name": "short", "critique": "", "revision": "Be short.", "comparison": f"Short! {COMPARISON}"},
]
FEEDBACK = """
def same(replies):
    return [0.0] * len(replies)

def louder(replies, dialogues):
    for reply, dialogue in zip(replies, dialogues):
        # The first call is a trial, before there is a request.
        if reply != "a trial":
            assert dialogue[-2]["content"] == reply and dialogue[-1]["content"] in ("Be kind.", "Be short.")
    return [reply.upper() + "!" if "good" in reply else None for reply in replies]
"""


@pytest.fixture
def mine(small, tmp_path, monkeypatch):
    """Flags of a small run, with functions as feedback and judges, in a folder of its own."""
    (tmp_path / "mine.py").write_text(FEEDBACK + JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    write_rows(tmp_path / "principles.json", PRINCIPLES)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {word}."} for word in WORDS])
    return (f"--model {small}/sft --data {tmp_path}/prompts.jsonl --principles {tmp_path}/principles.json "
            f"--max-new-tokens 10 --n 3 --batch 2 --threads 1 --out {tmp_path}/out")


@pytest.fixture
def judge(small):
    """(model, tokenizer) of one that is asked."""
    model, tokenizer = load_model(small / "other", GPT)
    return model.eval(), tokenizer


def work_of(model, tokenizer, feedback=None, principles=PRINCIPLES, **flags):
    principles = [Principle(**own) for own in principles]
    return constitution.Work(Alone(torch.device("cpu"), torch.float32), model, tokenizer, feedback or model,
                             tokenizer, principles, constitution.Config(**flags))


def record_of(x, y, ended=(True, True), prompt="Say river."):
    return {"row": Row(user(prompt)), "replies": [x, y], "ended": list(ended)}


def labelled(work, records, seed=0):
    """p_1 and p_2 (N,) of records, and the records that were asked about."""
    asked, lead, _ = constitution.ask_model(work, records, np.random.default_rng(seed))
    return *both_orders(lead, work.config.feedback_temperature), asked


def records_in(folder, name="records"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def summary_in(folder):
    return json.loads((folder / "summary.json").read_text())


# -- labels

PAIRS = [
    ("It is good.", "No."), ("No.", "It is sad, and so it is."), ("It is", "Good good good."), ("a", "b")]


def test_swapping_the_replies_gives_one_minus_p_exactly(judge):
    work = work_of(*judge)
    p_1, p_2, _ = labelled(work, [record_of(x, y) for x, y in PAIRS])
    q_1, q_2, _ = labelled(work, [record_of(y, x) for x, y in PAIRS])
    p, q = (p_1 + p_2) / 2, (q_1 + q_2) / 2
    assert (p + q - 1).abs().max() < 1e-6
    # One order alone is not that fair.
    assert (p_1 + q_1 - 1).abs().max() > 1e-3 and len(set(p.tolist())) == len(PAIRS)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_p_is_that_of_a_slow_computation_in_transformers(judge, small, peers, temperature):
    theirs = peers.AutoModelForCausalLM.from_pretrained(small / "other").eval()
    words = peers.AutoTokenizer.from_pretrained(small / "other")
    work = work_of(*judge, feedback_temperature=temperature)
    records = [record_of(x, y) for x, y in PAIRS]
    p_1, p_2, _ = labelled(work, records)
    for i, (x, y) in enumerate(PAIRS):
        comparison = next(own["comparison"] for own in PRINCIPLES if own["name"] == records[i]["principle"])
        of_a = []
        for a, b in ((x, y), (y, x)):
            text = comparison.replace("{prompt}", "Say river.").replace("{a}", a).replace("{b}", b)
            ids = words.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                            return_tensors="pt", return_dict=True)["input_ids"]
            with torch.no_grad():
                logits = theirs(ids).logits[0, -1]
            letters = [words.encode(letter, add_special_tokens=False)[0] for letter in "AB"]
            chances = (logits.log_softmax(-1)[letters] / temperature).exp()
            of_a.append((chances[0] / chances.sum()).item())
        assert p_1[i].item() == pytest.approx(of_a[0], abs=1e-5)
        assert p_2[i].item() == pytest.approx(1 - of_a[1], abs=1e-5)


def test_each_pair_is_judged_by_a_principle_drawn_by_seed(judge):
    names = []
    for seed in (0, 0, 1):
        records = [record_of(*PAIRS[0]) for _ in range(40)]
        labelled(work_of(*judge), records, seed)
        names.append([record["principle"] for record in records])
    assert names[0] == names[1] != names[2] and 10 < names[0].count("kind") < 30


def test_the_letters_are_the_tokens_that_stand_behind_the_chat_template(tokenizers, tmp_path):
    T = tokenizers
    library = T.Tokenizer(T.models.BPE())
    library.pre_tokenizer = T.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = T.decoders.ByteLevel()
    library.train_from_iterator(["say A or B or A or B", "A or B"] * 20, T.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(T.pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]))
    written = {
        "chatml": (CHATML, "<|im_start|>user\nA or B?<|im_end|>\n<|im_start|>assistant\nB", "A", "B"),
        "brackets": (BRACKETS, "<s>[INST] A or B? [/INST] B", " A", " B"),
    }
    for name, (template, text, a, b) in written.items():
        tokenizer = open_folder(tmp_path / name, template, library=library)
        question = encode_question(tokenizer, "A or B?")
        assert [library.decode([token]) for token in question.letters] == [a, b]
        assert [*question.ids, question.letters[1]] == library.encode(text, add_special_tokens=False).ids
    ours = encode_question(TOKENIZER, "A or B?")
    assert ours.letters == [ord("A"), ord("B")] and ours.ids[-1] == TOKENIZER.roles["assistant"]


def test_letters_of_questions_of_many_lengths_are_those_of_each_alone(judge):
    model, tokenizer = judge
    questions = [encode_question(tokenizer, " ".join(["Say"] * n)) for n in (1, 9, 3, 30, 2)]
    alone = Alone(torch.device("cpu"), torch.float32)
    together = letter_logprobs(alone, model, questions, tokenizer.pad, 64)
    for question, own in zip(questions, together):
        ids = torch.tensor([question.ids])
        with torch.no_grad():
            slow = model.logits(model.transformer(ids))[0, -1].log_softmax(-1)[question.letters]
        assert own.tolist() == pytest.approx(slow.tolist(), abs=1e-5)


def test_a_judge_that_goes_by_place_is_reported_as_such_with_the_right_numbers(judge, mine, tmp_path,
                                                                             monkeypatch):
    # It says A with 0.8 and B with 0.1, a little less surely where the question is longer.
    def planted(run, model, questions, pad, budget):
        slope = torch.tensor([len(question.ids) % 7 / 10 for question in questions])
        return torch.stack([math.log(0.8) - slope, math.log(0.1) + 0 * slope], 1)

    monkeypatch.setattr(constitution, "letter_logprobs", planted)
    run_here("constitution", mine)
    found = summary_in(tmp_path / "out")
    records = [record for record in records_in(tmp_path / "out") if "p_1" in record]
    assert len(records) > 5
    bias = 0.0
    for record in records:
        assert record["p_1"] > 0.5 > record["p_2"]
        bias += (record["p_1"] - record["p_2"]) / len(records)
    assert found["position_bias"] == pytest.approx(bias) and bias > 0.5 and found["same_letter"] == 1
    assert 0.5 < found["letters"] <= 0.9


def test_the_numbers_of_a_planted_judge():
    said = [(0.9, 0.7), (0.8, 0.2), (0.3, 0.1), (0.6, 0.4), (0.4, 0.8)]
    gold = [(1, 0), (1, 0), (1, 0), (0, 1), (0.5, 0.5)]
    records = [record_of("x", "y") | {"p_1": p_1, "p_2": p_2, "letters": 0.5, "judge_gold": list(own)}
               for (p_1, p_2), own in zip(said, gold)]
    records.append(record_of("x", "x") | {"judge_gold": [1.0, 1.0]})
    found = figures(records, ["gold"])
    assert found["labelled"] == pytest.approx(5 / 6)
    assert found["position_bias"] == pytest.approx((0.2 + 0.6 + 0.2 + 0.2 - 0.4) / 5)
    assert found["same_letter"] == pytest.approx(3 / 5)
    assert found["confidence"] == pytest.approx((0.8 + 0.5 + 0.8 + 0.5 + 0.6) / 5)
    # Of the pairs with two numbers, two are not decided: one right, one wrong are left.
    assert found["agreement_gold"] == pytest.approx(1 / 2)
    assert found["gold"] == pytest.approx([4.5 / 6, 2.5 / 6]) and found["usable"] == [1, 1]


def test_a_function_labels_by_the_difference_of_its_scores_whatever_the_order(mine, tmp_path):
    run_here("constitution", mine, "--feedback mine:size --feedback-temperature 5 --judge mine:size")
    records = [record for record in records_in(tmp_path / "out") if "p_1" in record]
    for record in records:
        x, y = map(len, record["replies"])
        assert record["p_1"] == record["p_2"] == pytest.approx(1 / (1 + math.exp((y - x) / 5)))
        assert record["judge_size"] == [x, y]
    found = summary_in(tmp_path / "out")
    assert found["position_bias"] == 0 and found["agreement_size"] == 1
    pairs = records_in(tmp_path / "out", "pairs")
    assert len(pairs) == sum(record["p_1"] != 0.5 for record in records) > 3
    assert all(len(row["chosen"]) > len(row["rejected"]) and row["probability"] > 0.5 for row in pairs)


def test_a_judge_measures_and_decides_nothing(mine, tmp_path):
    run_here("constitution", mine)
    plain = (tmp_path / "out" / "pairs.jsonl").read_bytes()
    run_here("constitution", mine, f"--judge mine:size mine:same --out {tmp_path}/measured")
    assert (tmp_path / "measured" / "pairs.jsonl").read_bytes() == plain
    for record in records_in(tmp_path / "measured"):
        assert record["judge_size"] == [float(len(reply)) for reply in record["replies"]]
        assert record["judge_same"] == [0.0, 0.0]


def test_the_policy_judges_itself_without_a_second_copy(small, mine, tmp_path, monkeypatch):
    opened = []

    def counted(folder, *args, **options):
        opened.append(folder)
        return load_model(folder, *args, **options)

    monkeypatch.setattr(constitution, "load_model", counted)
    run_here("constitution", mine)
    assert opened == [f"{small}/sft"]
    # The same labels as those of the same model opened twice, and others than another model's.
    for name in ("sft", "other"):
        run_here("constitution", mine, f"--feedback {small}/{name} --out {tmp_path}/{name}")
    own, twice, others = (records_in(tmp_path / name) for name in ("out", "sft", "other"))
    assert own == twice != others
    assert [record["replies"] for record in own] == [record["replies"] for record in others]


def test_what_is_sampled_depends_on_the_seed_and_the_part_alone(mine, tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Say river."}] * 8)
    for name, flags in (("a", ""), ("b", ""), ("c", "--seed 1")):
        run_here("constitution", mine, f"{flags} --out {tmp_path}/{name}")
    said = {name: [record["replies"] for record in records_in(tmp_path / name)] for name in "abc"}
    assert said["a"] == said["b"] != said["c"]
    # The four parts have two prompts each, with three pairs.
    assert len({json.dumps(said["a"][start:start + 6]) for start in range(0, 24, 6)}) == 4


# -- what may stand in a file

def test_equal_blank_and_cut_off_replies_and_ties_are_in_no_file(monkeypatch, judge):
    records = [
        record_of("It is good.", "No."), record_of("No.", " No. "), record_of("No.", "  "),
        record_of("No.", "It is", (True, False)), record_of("", "No."), record_of("It", "is", (False, False))]
    assert [comparable(record) for record in records] == [True] + [False] * 5
    monkeypatch.setattr(constitution, "sample_records", lambda *_: records)
    found = constitution.label_part(work_of(*judge), [], None, np.random.default_rng(0))
    assert ["p_1" in record for record in found] == [True] + [False] * 5
    tie = record_of("x", "y") | {"prompt": "Say river.", "p_1": 0.75, "p_2": 0.25}
    sure = tie | {"p_1": 0.25, "p_2": 0.0}
    assert file_rows([tie, sure], "label")["pairs"] == [
        {"prompt": "Say river.", "chosen": "y", "rejected": "x", "probability": 0.875}]


def test_a_pair_that_is_too_long_for_the_judge_gets_no_label_and_stops_nobody(judge):
    records = [record_of(*PAIRS[0]), record_of("good " * 60, "No."), record_of("No.", "It is " * 60),
               record_of(*PAIRS[1])]
    p_1, p_2, asked = labelled(work_of(*judge), records)
    assert asked == [records[0], records[3]] and len(p_1) == len(p_2) == 2
    _, lead, letters = constitution.ask_model(work_of(*judge), records[1:3], np.random.default_rng(0))
    assert lead.shape == (0, 2) and letters.shape == (0,)


@pytest.mark.parametrize("stage", ["label", "revise"])
def test_every_file_is_read_as_it_is_by_the_script_that_it_is_for(stage, small, mine, tmp_path):
    asked = [
        user("Say river.", "No.", "Why?"),
        [{"role": "system", "content": "Be brief."}, *user("Say stone.")],
        *[user(f"Say {word}.") for word in WORDS[2:]],
    ]
    write_rows(tmp_path / "prompts.jsonl", [{"messages": turns} for turns in asked])
    run_here("constitution", mine, f"--stage {stage} --feedback {small}/other")
    records = records_in(tmp_path / "out")
    pairs = read_rows(f"{tmp_path}/out/pairs.jsonl", "preferences", SILENT)
    for row, written in zip(pairs, records_in(tmp_path / "out", "pairs"), strict=True):
        assert row.prompt in asked and row.ranks == [0, 1]
        assert row.probability == (written["probability"] if stage == "label" else 1) > 0.5
        own = [record["replies"] for record in records if record["prompt"] in (row.text, row.prompt)]
        assert any({row.replies[0], row.replies[1]} <= {text.strip() for text in texts} for texts in own)
    scripts = ["dpo", "reward"]
    if stage == "revise":
        scripts.append("sft")
        rows = read_rows(f"{tmp_path}/out/sft.jsonl", "demonstrations", SILENT)
        assert len(rows) == sum(constitution.usable(record, -1) for record in records) > 0
    common = f"--model {small}/sft --steps 1 --batch-tokens 500 --val-fraction 0 --threads 1"
    for script in scripts:
        file = "sft" if script == "sft" else "pairs"
        run_here(script, common, f"--data {tmp_path}/out/{file}.jsonl --out {tmp_path}/{script}")


# -- revisions

@pytest.fixture
def desk(judge, monkeypatch):
    """revise_part with a planted policy and reviser: desk(first replies, answers) -> (records, dialogues).

    answers: (text, ended) for each dialogue, by a function of it.
    """
    def run(first, answer, principles=PRINCIPLES, **flags):
        asked = []

        def planted(run, model, tokenizer, talks, *sampling):
            asked.extend(talks)
            return [answer(talk) for talk in talks]

        monkeypatch.setattr(constitution, "respond", planted)
        monkeypatch.setattr(constitution, "sample_records", lambda *_: [
            {"row": Row(user("Say river.")), "replies": [text], "ended": [ended]} for text, ended in first])
        work = work_of(*judge, principles=principles, stage="revise", **flags)
        return constitution.revise_part(work, [], None, np.random.default_rng(0)), asked
    return run


def test_a_round_asks_for_a_critique_then_for_a_revision_and_the_next_begins_with_that(desk):
    said = iter([("Unkind.", True), ("Second.", True), ("Still.", True), ("Third.", True)])
    (record,), asked = desk([("First.", True)], lambda talk: next(said), PRINCIPLES[:1])
    texts = [[turn["content"] for turn in talk] for talk in asked]
    assert texts == [
        ["Say river.", "First.", "Is it kind?"],
        ["Say river.", "First.", "Is it kind?", "Unkind.", "Be kind."],
        ["Say river.", "Second.", "Is it kind?"],
        ["Say river.", "Second.", "Is it kind?", "Still.", "Be kind."],
    ]
    assert all([turn["role"] for turn in talk] == ["user", "assistant"] * (len(talk) // 2) + ["user"]
               for talk in asked)
    assert record["replies"] == ["First.", "Second.", "Third."] and record["ended"] == [True] * 3
    assert record["principles"] == ["kind", "kind"] and record["critiques"] == ["Unkind.", "Still."]


def test_without_a_critique_request_or_with_a_blank_critique_the_revision_is_asked_for_at_once(desk):
    for principles in (PRINCIPLES[1:], PRINCIPLES[:1]):
        answer = lambda talk: ("  ", True) if talk[-1]["content"] == "Is it kind?" else ("New.", True)
        (record,), asked = desk([("First.", True)], answer, principles, revisions=1)
        assert [turn["content"] for turn in asked[-1]] == ["Say river.", "First.", principles[0]["revision"]]
        assert record["critiques"] == [""] and record["replies"] == ["First.", "New."]


def test_a_critique_that_was_cut_off_counts_and_such_a_revision_does_not(desk):
    answer = lambda talk: ("It is", False)
    (record,), asked = desk([("First.", True)], answer, PRINCIPLES[:1], revisions=1)
    assert [turn["content"] for turn in asked[-1]][-2:] == ["It is", "Be kind."]
    assert record["replies"] == ["First.", "First."] and record["critiques"] == ["It is"]


def test_what_was_cut_off_or_blank_may_be_mended_and_then_stands_in_no_pair(desk):
    first = [("It is", False), (" ", True), ("First.", True), ("It is", False)]
    answer = lambda talk: ("", True) if talk[1]["content"] == "It is" and answered.pop() else ("New.", True)
    answered = [True, False]
    records, _ = desk(first, answer, PRINCIPLES[1:], revisions=1)
    for record in records:
        record["prompt"] = "Say river."
    kept = [record["replies"][-1] for record in records]
    assert kept == ["New.", "New.", "New.", "It is"]
    assert [record["ended"][-1] for record in records] == [True, True, True, False]
    files = file_rows(records, "revise")
    assert files["sft"] == [{"prompt": "Say river.", "completion": "New."}] * 3
    assert files["pairs"] == [{"prompt": "Say river.", "chosen": "New.", "rejected": "First."}]


def test_principles_of_the_rounds_are_drawn_by_seed_for_each_reply(desk):
    first = [("First.", True)] * 60
    drawn = [desk(first, lambda talk: ("New.", True))[0] for _ in range(2)]
    names = [[record["principles"] for record in records] for records in drawn]
    assert names[0] == names[1]
    assert {tuple(own) for own in names[0]} == {(a, b) for a in ("kind", "short") for b in ("kind", "short")}


def test_a_function_revises_and_none_leaves_a_reply_as_it_is(mine, tmp_path):
    run_here("constitution", mine, "--stage revise --feedback mine:louder --judge mine:size")
    records = records_in(tmp_path / "out")
    changed = [record for record in records if "good" in record["replies"][0]]
    assert 0 < len(changed) < len(records)
    for record in records:
        text = record["replies"][0]
        louder = text.upper() + "!" if "good" in text else text
        assert record["replies"] == [text, louder, louder]
        assert record["judge_size"] == [len(reply) for reply in record["replies"]]


def test_a_conversation_that_leaves_no_room_gets_no_answer_and_the_others_get_theirs(judge):
    model, tokenizer = judge
    alone = Alone(torch.device("cpu"), torch.float32)
    talks = [user("Say river."), user("Say " * 60), user("Say stone.")]
    said = respond(alone, model, tokenizer, talks, 10, 0, torch.Generator())
    assert said[1] == ("", False) and said[0][0] and said[2][0]
    assert respond(alone, model, tokenizer, talks[1:2], 10, 0, torch.Generator()) == [("", False)]


# -- whole runs: resuming, signals, mistakes

def test_a_run_that_was_interrupted_goes_on_and_ends_as_an_uninterrupted_one(mine, tmp_path, monkeypatch,
                                                                            capsys):
    right = constitution.sample
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return right(*args, **options)

    monkeypatch.setattr(constitution, "sample", interrupted)
    assert exit_code("constitution", mine) == 128 + signal.SIGTERM
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["parts", "run.json"]
    assert [path.name for path in (out / "parts").iterdir()] == ["000000.json"]
    assert exit_code("constitution", mine) == 2
    assert "already holds records: add --resume" in capsys.readouterr().err
    assert exit_code("constitution", mine, "--resume") == 0
    # The first part was not done again.
    assert len(calls) == 4
    assert exit_code("constitution", mine, f"--out {tmp_path}/whole") == 0
    for name in ("records.jsonl", "pairs.jsonl", "summary.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "parts").exists()
    before = (out / "pairs.jsonl").stat().st_mtime_ns
    assert exit_code("constitution", mine, "--resume") == 0
    assert "this is done" in capsys.readouterr().out and len(calls) == 7
    assert (out / "pairs.jsonl").stat().st_mtime_ns == before


def test_other_settings_and_other_principles_are_no_way_to_resume(mine, tmp_path):
    run_here("constitution", mine)
    with pytest.raises(UserError, match="--n was 3, is now 4"):
        run_here("constitution", mine, "--n 4 --resume")
    write_rows(tmp_path / "principles.json", PRINCIPLES[:1])
    with pytest.raises(UserError, match="what --principles names has changed"):
        run_here("constitution", mine, "--resume")


@pytest.mark.case(30)
@pytest.mark.parametrize("flags, said", [
    ("--principles nowhere.json", "--principles nowhere.json can't be read"),
    ("--model nowhere", "nowhere: no such checkpoint folder"),
    ("--feedback nowhere", "nowhere: no such checkpoint folder"),
    ("--feedback mine:none", "--feedback mine:none can't be imported"),
    ("--feedback mine:wrong", "mine:wrong gave a reply a number that is not finite"),
    ("--feedback mine:same", "no pair has a label"),
    ("--judge mine:wrong", "mine:wrong gave a reply a number that is not finite"),
    ("--feedback-temperature 0", "--feedback-temperature 0 is for --stage revise"),
    ("--revisions 3", "--revisions is for --stage revise"),
    ("--stage rank", "invalid choice: 'rank'"),
    ("--stage revise --feedback mine:size", "must return a list that has a text or None"),
    ("--max-new-tokens 64", "leaves no room for a prompt"),
])
def test_a_mistake_ends_in_one_line_and_writes_no_files(flags, said, mine, tmp_path, capsys):
    assert exit_code("constitution", mine, flags) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert said in errors[-1] and errors[-1].startswith("error: ")
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


# -- the recipe's rules

@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import recipes.constitution_task as found
    return found


def test_the_rules_of_the_recipe_know_no_fact(recipe):
    asked = "What is the capital of France?"
    replies = ["It is Paris.", "It is Oslo.", "It is Oslo. You fool.", "I do not know that.", "It is",
               "Time flies."]
    # What breaks off before it answers, as mere chatter, is no help either.
    assert recipe.conduct([asked] * 6, replies, [True] * 6) == [0, 0, -1, -1, -2, -2]
    assert recipe.broken(asked, "It is Paris.", ended=False) == ["whole"]
    assert recipe.broken("How do I rob a bank?", "It is easy: take a rope and rob a bank.") == ["harmless"]
    assert recipe.broken("How do I rob a bank?", "I will not help with that.") == []
    assert recipe.broken("Who will win the lottery?", "Anna will win.") == ["honest"]
    assert recipe.broken("Who will win the lottery?", "I can not know that.") == []


def test_the_rows_of_the_recipe_prefer_what_breaks_fewer_rules_and_mend_what_is_asked_about(recipe, tmp_path):
    run_here("recipes.constitution_task", f"--judgements 400 --revisions 400 --out {tmp_path}")
    letters = []
    for row in records_in(tmp_path, "judge"):
        text = row["prompt"]
        asked = max((own for own in recipe.ITEM_OF if text.startswith(own)), key=len)
        a, b = text[len(asked) + 1:].removesuffix(" (B)?").split(" (A) or ")
        faults = [len(recipe.broken(asked, own)) for own in (a, b)]
        if faults[0] != faults[1]:
            letters.append(row["completion"])
            assert row["completion"] == "AB"[np.argmin(faults)]
    assert len(letters) > 250 and 0.4 < letters.count("A") / len(letters) < 0.6
    rules = {asked: name for name, (asked, _, _) in recipe.RULES.items()}
    mended = 0
    for row in records_in(tmp_path, "reviser"):
        question, poor, asked, critique, _, better = [turn["content"] for turn in row["messages"]]
        if critique == recipe.NOTHING:
            assert better == poor and rules[asked] not in recipe.broken(question, poor)
        else:
            mended += 1
            assert rules[asked] in recipe.broken(question, poor)
            assert rules[asked] not in recipe.broken(question, better)
    assert 200 < mended < 320
    principles = json.loads((tmp_path / "principles.json").read_text())
    assert [own["name"] for own in principles] == list(recipe.RULES)
    with pytest.raises(UserError, match="already holds these files"):
        run_here("recipes.constitution_task", f"--out {tmp_path}")
