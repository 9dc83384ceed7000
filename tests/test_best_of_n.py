"""best_of_n.py: the law of what it selects, by enumeration; its files, rounds and battles."""
import itertools
import json
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

import best_of_n
import dpo
from bench.optimum import PROMPTS, entry, log_probabilities, replies_of, texts_of, write_reference
from best_of_n import Samples, kl_bound, rows_to_write, same_for_the_same, select
from data import decided_pairs
from dpo import Pairs, Replies, preference_loss
from examples import JUDGES, user
from formats.rows import Row
from formats.sources import read_rows
from plumbing.flags import UserError
from tools import WORDS, exit_code, rows_of, run_here, write_rows


# -- the law of the best, through the shipped selection

def law(probabilities, scores, n, usable=None):
    """Probabilities (K,) of the replies that are selected from n draws, by going through all n-tuples."""
    K = len(scores)
    tuples = np.array(list(itertools.product(range(K), repeat=n)))  # (K^n, n)
    may = np.ones(K, bool) if usable is None else usable
    kept = select(scores[tuples], may[tuples], "best", 0.0, None)
    weight = probabilities[tuples].prod(1)[kept.any(1)]
    return np.bincount(tuples[kept], weight, minlength=K)


def known_law(probabilities, scores, n):
    """The same by F(r)^n, equal scores sharing as in the reference."""
    result = np.zeros(len(scores))
    for r in np.unique(scores):
        tied = scores == r
        up_to, below = probabilities[scores <= r].sum(), probabilities[scores < r].sum()
        result[tied] = (up_to**n - below**n) * probabilities[tied] / probabilities[tied].sum()
    return result


def kl(p, q):
    inside = p > 0
    return float((p[inside] * np.log(p[inside] / q[inside])).sum())


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """{length: [(reference (K,), scores (K,), texts, ended)] of each prompt}, where all are listed."""
    found = {}
    for length in (1, 2):
        folder = tmp_path_factory.mktemp(f"listed{length}")
        model, tokenizer = write_reference(folder, length)
        replies = replies_of(tokenizer, length)
        texts = [tokenizer.decode(y) for y in replies]
        ended = np.array([y[-1] == tokenizer.eos for y in replies])
        probabilities = log_probabilities(model, tokenizer, replies).exp().numpy()
        found[length] = []
        for prompt, own in zip(PROMPTS, probabilities):
            scores = np.array([entry(prompt, text) for text in texts])
            found[length].append((own / own.sum(), scores, texts, ended))
        found[length, "folder"] = folder
    return found


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_best_of_n_follows_the_law_f_to_the_n_and_equal_rewards_share_as_in_the_reference(n, task):
    for reference, scores, texts, _ in task[2]:
        # Control tokens have no text, so that many replies score the same; rounded, still more do.
        for rewards in (scores, np.round(scores)):
            assert len(np.unique(rewards)) < len(rewards)
            found = law(reference, rewards, n)
            assert np.abs(found - known_law(reference, rewards, n)).sum() / 2 < 1e-9
            for r in np.unique(rewards):
                F = reference[rewards <= r].sum()
                assert found[rewards <= r].sum() == pytest.approx(F**n, abs=1e-9)


def test_k_exact_rounds_of_distilling_the_best_of_n_are_the_best_of_n_to_the_k(task):
    for reference, scores, *_ in task[1]:
        twice = law(law(reference, scores, 2), scores, 2)
        assert np.abs(twice - law(reference, scores, 4)).sum() / 2 < 1e-9
        thrice = law(twice, scores, 2)
        assert np.abs(thrice - known_law(reference, scores, 8)).sum() / 2 < 1e-9
        assert np.abs(thrice - twice).sum() / 2 > 0.01


def test_the_kl_is_at_most_its_bound_and_equals_it_where_no_two_replies_score_the_same(task):
    assert kl_bound(1) == 0 and kl_bound(16) == pytest.approx(math.log(16) - 15 / 16)
    for reference, scores, *_ in task[2]:
        for n in (2, 3):
            assert 0 < kl(law(reference, scores, n), reference) < kl_bound(n)
    many = np.full(200_000, 1 / 200_000)
    for n in (2, 4, 16):
        top = np.arange(1, len(many) + 1) / len(many)
        best = top**n - (top - many) ** n
        assert kl(best, many) == pytest.approx(kl_bound(n), abs=1e-3)


def test_the_whole_script_selects_by_that_law_and_never_what_was_cut_off_or_is_blank(task, tmp_path):
    rows = [{"prompt": PROMPTS[0]}] * 4000
    write_rows(tmp_path / "prompts.jsonl", rows)
    run_here("best_of_n", f"--model {task[2, 'folder']} --data {tmp_path}/prompts.jsonl --n 3 --threads 1",
             f"--reward-fn bench.optimum:reward --max-new-tokens 2 --batch 1000 --out {tmp_path}/out")
    reference, scores, texts, ended = task[2][0]
    usable = ended & np.array([bool(text.strip()) for text in texts])
    exact = law(reference, scores, 3, usable)
    share = exact.sum()
    expected = {}
    for text, p in zip(texts, exact / share):
        expected[text] = expected.get(text, 0) + p
    found = [row["completion"] for row in map(json.loads, open(tmp_path / "out" / "sft.jsonl"))]
    assert len(found) / 4000 == pytest.approx(share, abs=0.04)
    far = sum(abs(found.count(text) / len(found) - p) for text, p in expected.items()) / 2
    assert far < 0.03 and set(found) <= set(np.array(texts)[usable])


# -- iterative DPO, by exact minimisation over all pairs

def exact_dpo(policy, reference, rewards, beta):
    """Log-probabilities (K,) that minimise dpo.py's loss on the policy's own pairs, labelled by chance.

    All pairs of replies, each as often as the policy draws it, and labelled with sigma(r_w - r_l).
    """
    K = len(rewards)
    better, worse = (~torch.eye(K, dtype=torch.bool)).nonzero().T
    weight = (policy[better] + policy[worse]).exp() * torch.sigmoid(rewards[better] - rewards[worse])
    weight = weight / weight.sum()
    # All labels are right, no margins, and no SFT term that would ask for the best replies.
    pairs = Pairs(better, worse, weight, 0.0, 1.0, 0.0, None, None)
    logits = policy.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=2000, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-10, tolerance_change=1e-14)

    def loss():
        optimizer.zero_grad()
        replies = Replies(logits.log_softmax(0), torch.ones(K), reference)
        value, _ = preference_loss(replies, pairs, dpo.Config(beta=beta))
        value.backward()
        return value

    optimizer.step(loss)
    return logits.detach().log_softmax(0)


def test_rounds_of_dpo_against_a_fixed_reference_reach_the_optimum_and_k_resets_its_kth_power(task, tmp_path):
    model, tokenizer = write_reference(tmp_path / "reference", 2)
    replies = texts_of(tokenizer, 2)
    beta = 2.0
    for prompt, first in zip(PROMPTS, log_probabilities(model, tokenizer, replies).log_softmax(1)):
        rewards = torch.tensor([entry(prompt, tokenizer.decode(y)) for y in replies], dtype=torch.float64)
        fixed = reset = first
        for k in (1, 2, 3):
            fixed = exact_dpo(fixed, first, rewards, beta)
            reset = exact_dpo(reset, reset, rewards, beta)
            for policy, power in ((fixed, 1), (reset, k)):
                wanted = (first + power * rewards / beta).softmax(0)
                assert (policy.exp() - wanted).abs().sum() / 2 < 0.02, (k, power)
        assert (fixed.exp() - reset.exp()).abs().sum() / 2 > 0.1


# -- what is selected

def test_each_selection_has_the_size_that_it_promises():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 8))
    usable = rng.random((50, 8)) < 0.8
    usable[7] = False
    counts = {kind: select(scores, usable, kind, 0.25, rng).sum(1) for kind in ("best", "top", "random")}
    answered = usable.any(1)
    assert (counts["best"] == answered).all() and (counts["random"] == answered).all()
    assert counts["top"].sum() == round(0.25 * usable.sum())
    top = select(scores, usable, "top", 0.25, rng)
    assert scores[top].min() >= scores[usable & ~top].max() and not (top & ~usable).any()
    assert select(scores, usable, "top", 1e-9, rng).sum() == 1
    assert (select(scores, usable, "top", 1.0, rng) == usable).all()
    with pytest.raises(ValueError, match="unknown selection worst"):
        select(scores, usable, "worst", 0.25, rng)


def test_the_random_control_does_not_look_at_the_score():
    scores = np.tile(np.arange(4.0), (40_000, 1))
    usable = np.ones_like(scores, bool)
    usable[:20_000, 3] = False
    kept = select(scores, usable, "random", 0.0, np.random.default_rng(0))
    assert np.abs(kept[:20_000].mean(0) - [1 / 3, 1 / 3, 1 / 3, 0]).max() < 0.02
    assert np.abs(kept[20_000:].mean(0) - 1 / 4).max() < 0.02


def test_the_best_is_the_first_of_equals_and_a_battle_is_lost_only_to_a_better_reply():
    scores = np.array([[1.0, 2.0, 2.0], [3.0, 3.0, 1.0], [0.0, 5.0, 7.0], [1.0, 9.0, 0.0]])
    usable = np.array([[True] * 3, [True] * 3, [False, True, False], [True, False, True]])
    best = select(scores, usable, "best", 0.0, None)
    assert best.nonzero()[1].tolist() == [1, 0, 1, 0]
    battles = select(scores, usable, "battles", 0.0, None)
    assert list(zip(*battles.nonzero())) == [(0, 1), (2, 1)]


# -- files

def samples_of(texts, scores, usable=None, prompts=None):
    texts = np.array(texts, dtype=object)
    scores = np.array(scores, dtype=float)
    rows = [Row(prompt) for prompt in prompts or [user(f"Say {word}.") for word in WORDS[:len(texts)]]]
    usable = np.ones(scores.shape, bool) if usable is None else np.array(usable)
    return Samples(rows, texts, usable, {"score": scores})


def files_of(samples, arena=False):
    kind = "battles" if arena else "best"
    chosen = select(samples.numbers["score"], samples.usable, kind, 0.0, None)
    return rows_to_write(samples, chosen, arena)


def test_files_hold_the_best_all_ranks_with_ties_and_the_best_against_the_worst():
    files = files_of(samples_of([["a", "b", "c", "d"], ["e", "f", "g", "h"]], [[1, 3, 2, 1], [5, 5, 5, 5]]))
    assert files["sft"] == [{"prompt": "Say river.", "completion": "b"},
                            {"prompt": "Say stone.", "completion": "e"}]
    assert files["pairs"] == [{"prompt": "Say river.", "chosen": "b", "rejected": "a"}]
    assert [row["ranks"] for row in files["rankings"]] == [[2, 0, 1, 2], [0, 0, 0, 0]]
    assert files["rankings"][0]["completions"] == ["a", "b", "c", "d"]
    assert [row["scores"] for row in files["rankings"]] == [[1, 3, 2, 1], [5, 5, 5, 5]]


def test_what_may_not_stand_in_a_file_is_in_none():
    usable = [[True, False, True], [False, False, False], [False, True, False]]
    samples = samples_of([["a", "b", "c"]] * 3, [[1, 3, 2]] * 3, usable)
    files = files_of(samples)
    assert [row["completion"] for row in files["sft"]] == ["c", "b"]
    assert files["rankings"] == [{"prompt": "Say river.", "completions": ["a", "c"], "ranks": [1, 0],
                                  "scores": [1.0, 2.0]}]
    assert files["pairs"] == [{"prompt": "Say river.", "chosen": "c", "rejected": "a"}]


def test_one_reply_and_one_prompt_give_a_row_to_train_on_and_nothing_to_compare():
    files = files_of(samples_of([["a"]], [[1]]))
    assert files == {"sft": [{"prompt": "Say river.", "completion": "a"}], "rankings": [], "pairs": []}


def test_a_lost_battle_gives_the_winners_reply_and_the_pair_of_both_and_all_battles_are_ranked():
    # The policy comes first: it loses to the second rival, wins, draws, and was cut off.
    samples = samples_of([["p", "a", "b"]] * 4, [[2, 1, 3], [4, 2, 3], [4, 4, 3], [9, 1, 2]],
                         [[True] * 3, [True] * 3, [True] * 3, [False, True, True]])
    files = files_of(samples, arena=True)
    assert [(row["prompt"], row["completion"]) for row in files["sft"]] == [("Say river.", "b"),
                                                                              ("Say window.", "b")]
    assert files["pairs"] == [{"prompt": "Say river.", "chosen": "b", "rejected": "p"}]
    assert [row["ranks"] for row in files["rankings"]] == [[1, 2, 0], [0, 2, 1], [0, 0, 2], [1, 0]]


def test_the_same_reply_has_one_score_within_its_group():
    texts = np.array([["a", "b", "a"], ["a", "b", "c"]], dtype=object)
    scores = np.array([[1.0, 2.0, 1.0 + 1e-6], [1.5, 2.0, 1.5]])
    usable = np.ones((2, 3), bool)
    assert same_for_the_same(texts, usable, scores).tolist() == [[1.0, 2.0, 1.0], [1.5, 2.0, 1.5]]
    assert scores[0, 2] != 1.0
    # A text that was cut off is another reply than the same one with its end token.
    usable[0, 0] = False
    assert same_for_the_same(texts, usable, scores).tolist() == scores.tolist()


def test_every_file_is_read_as_it_is_by_the_script_that_it_is_for(small, tmp_path):
    asked = [
        user("Say river.", "No.", "Why?"),
        [{"role": "system", "content": "Be brief."}, *user("Say stone.")],
        *[user(f"Say {word}.") for word in WORDS[2:]],
    ]
    data = [{"messages": turns} for turns in asked]
    write_rows(tmp_path / "prompts.jsonl", data)
    run_here("best_of_n",
             f"--model {small}/sft --reward {small}/reward --data {tmp_path}/prompts.jsonl --n 6",
             f"--max-new-tokens 12 --batch 4 --threads 1 --out {tmp_path}/out")
    out = tmp_path / "out"
    kinds = {"sft": "demonstrations", "pairs": "preferences", "rankings": "preferences"}
    rows = {name: read_rows(f"{out}/{name}.jsonl", kind, str) for name, kind in kinds.items()}
    assert [row.prompt for row in rows["sft"]] == asked
    for demonstration in rows["sft"]:
        ranking = next(row for row in rows["rankings"] if row.prompt == demonstration.prompt)
        assert ranking.ranks[ranking.replies.index(demonstration.replies[0])] == 0
        assert decided_pairs(ranking.ranks)
    for pair in rows["pairs"]:
        ranking = next(row for row in rows["rankings"] if row.prompt == pair.prompt)
        ranks = [ranking.ranks[ranking.replies.index(reply)] for reply in pair.replies]
        assert ranks == [0, max(ranking.ranks)]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rows"] == {name: len(found) for name, found in rows.items()}
    assert summary["all"]["score"] < summary["selected"]["score"]
    common = f"--model {small}/sft --steps 1 --batch-tokens 500 --val-fraction 0 --threads 1"
    for script, name in (("sft", "sft"), ("dpo", "pairs"), ("reward", "rankings")):
        run_here(script, common, f"--data {out}/{name}.jsonl --out {tmp_path}/{script}")


# -- whole runs

@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Flags of a small run with functions as judges, in a folder of its own."""
    (tmp_path / "mine.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {word}."} for word in WORDS])
    return f"--data {tmp_path}/prompts.jsonl --max-new-tokens 10 --n 4 --threads 1"


def test_a_score_that_is_no_number_is_one_clear_line_and_nothing_is_written(small, mine, tmp_path, capsys):
    flags = f"--model {small}/sft {mine} --out {tmp_path}/out"
    assert exit_code("best_of_n", flags, "--reward-fn mine:wrong") == 2
    assert capsys.readouterr().err.endswith("error: mine:wrong gave a reply a score that is not finite\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_while_sampling_leaves_nothing_and_a_second_try_needs_no_flag(small, mine, tmp_path,
                                                                             monkeypatch):
    flags = f"--model {small}/sft {mine} --out {tmp_path}/out --reward-fn mine:size --batch 2"
    right = best_of_n.sample
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(*args, **options)

    monkeypatch.setattr(best_of_n, "sample", interrupted)
    assert exit_code("best_of_n", flags) == 130
    assert list((tmp_path / "out").iterdir()) == []
    assert exit_code("best_of_n", flags) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pairs.jsonl", "rankings.jsonl", "sft.jsonl", "summary.json"]


def test_samples_that_are_there_are_kept_and_other_settings_are_refused(small, mine, tmp_path, capsys):
    flags = f"--model {small}/sft {mine} --out {tmp_path}/out --reward-fn mine:size"
    run_here("best_of_n", flags)
    before = (tmp_path / "out" / "sft.jsonl").stat().st_mtime_ns
    with pytest.raises(UserError, match="already holds samples: add --resume"):
        run_here("best_of_n", flags)
    with pytest.raises(UserError, match="--n was 4, is now 5"):
        run_here("best_of_n", flags, "--n 5 --resume")
    with pytest.raises(UserError, match="what --model names has changed|--model was"):
        run_here("best_of_n", flags, f"--model {small}/other --resume")
    run_here("best_of_n", flags, "--resume")
    assert "this is done" in capsys.readouterr().out
    assert (tmp_path / "out" / "sft.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("flags, said", [
    ("", "name what to score with"),
    ("--reward-fn mine:size --train-flags '--lr 1'", "--train-flags is for --rounds"),
    ("--reward-fn mine:size --rounds 1 --train-flags '--lr=1 --out=x'", "--train-flags: --out is what"),
    ("--reward-fn mine:size --rounds 1 --reference fixed", "--reference fixed is for --train dpo"),
    ("--reward-fn mine:size --arena x --select top", "--arena has a selection of its own"),
    ("--reward-fn mine:size --out {file}", "is a file; name a folder"),
    ("--reward-fn mine:size --max-new-tokens 1", "every reply is blank or beyond --max-new-tokens 1")])
def test_flags_that_do_not_go_together_are_refused(flags, said, small, mine, tmp_path):
    flags = flags.format(file=tmp_path / "mine.py")
    with pytest.raises(UserError, match=said):
        run_here("best_of_n", f"--model {small}/sft {mine} --out {tmp_path}/out", flags)


def test_the_arena_lets_the_policy_meet_others_and_says_to_whom_it_loses(small, mine, tmp_path):
    out = tmp_path / "out"
    run_here("best_of_n", f"--model {small}/sft {mine} --out {out} --reward-fn mine:size --judge mine:size",
             f"--arena {small}/other {small}/sft/../sft")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["groups"] == len(WORDS) * 4 and summary["kl_bound"] is None
    rankings = [json.loads(line) for line in open(out / "rankings.jsonl")]
    assert max(len(row["completions"]) for row in rankings) == 3
    for row in map(json.loads, open(out / "pairs.jsonl")):
        assert len(row["chosen"]) > len(row["rejected"])
    assert summary["rows"]["sft"] >= summary["rows"]["pairs"] > 0
    assert len(summary["lost_to"]) == 2 and 0 < max(summary["lost_to"].values()) < 1
    assert summary["selected"]["score"] > summary["all"]["score"] == summary["all"]["size"]


@pytest.mark.parametrize("arena", [False, True])
def test_every_group_consists_of_the_replies_to_its_own_prompt_and_of_all_of_them(
        arena, small, mine, tmp_path, monkeypatch):
    right = best_of_n.sample
    batches = []

    def recorded(*args, **options):
        batches.append(right(*args, **options))
        return batches[-1]

    monkeypatch.setattr(best_of_n, "sample", recorded)
    monkeypatch.setattr(best_of_n, "write_json", lambda *args: None)
    found = recorded_calls(monkeypatch)
    rivals = f"--arena {small}/other {small}/sft" if arena else ""
    run_here("best_of_n", f"--model {small}/sft {mine} --out {tmp_path}/out --reward-fn mine:size --batch 4",
             rivals)
    samples, = found
    models = 3 if arena else 1
    said = {}  # {prompt: [its replies by each model]}
    for i, batch in enumerate(batches):
        for prompt, text in zip(batch.prompts, batch.texts):
            by_model = said.setdefault(prompt.row.text, [[] for _ in range(models)])
            by_model[i % models].append(text)
    expected = []
    for prompt, by_model in said.items():
        groups = zip(*by_model) if arena else by_model
        expected += [(prompt, list(group)) for group in groups]
    assert [(row.text, list(texts)) for row, texts in zip(samples.rows, samples.texts)] == expected
    lengths = np.vectorize(len)(samples.texts)
    assert samples.texts.shape == ((24, 3) if arena else (6, 4))
    assert (samples.numbers["score"] == lengths).all()


def recorded_calls(monkeypatch):
    """The Samples that best_of_n.py makes files of from now on."""
    right = best_of_n.rows_to_write
    found = []

    def call(samples, *args):
        found.append(samples)
        return right(samples, *args)

    monkeypatch.setattr(best_of_n, "rows_to_write", call)
    return found


# -- rounds

@pytest.fixture
def called(monkeypatch):
    """The scripts run in this process; what they were told: [(script, words)]."""
    calls = []

    def call(script, *words):
        calls.append((script, [str(word) for word in words]))
        run_here(script.removesuffix(".py"), *map(str, words))

    monkeypatch.setattr(best_of_n, "call", call)
    return calls


def told(words, flag):
    return words[words.index(flag) + 1] if flag in words else None


@pytest.mark.parametrize("flags, bounded", [
    ("--train sft", True), ("--train dpo", False), ("--train dpo --reference fixed", False),
    ("--train quality", False)])
def test_two_rounds_train_measure_and_resume(flags, bounded, small, mine, tmp_path, called, capsys):
    out = tmp_path / "out"
    flags = (f"--model {small}/sft {mine} --reward-fn mine:size --judge mine:right --out {out} {flags} "
             "--train-flags '--steps 3 --batch-tokens 400 --val-fraction 0 --lr 0.002'")
    rows = [{"question": f"Say {word}.", "answer": f"So.\n#### {i}"} for i, word in enumerate(WORDS)]
    write_rows(tmp_path / "prompts.jsonl", rows)
    run_here("best_of_n", flags, "--rounds 2")
    script = "dpo.py" if "dpo" in flags else "sft.py"
    assert [name for name, _ in called] == ["evaluate.py"] + ["best_of_n.py", script, "evaluate.py"] * 2
    policies = [f"{small}/sft", f"{out}/round_1/model", f"{out}/round_2/model"]
    sampled = [words for name, words in called if name == "best_of_n.py"]
    trained = [words for name, words in called if name == script]
    assert [told(words, "--model") for words in sampled] == policies[:2]
    assert [told(words, "--model") for words in trained] == policies[:2]
    assert [told(words, "--out") for words in trained] == policies[1:]
    quality = "quality" in flags
    wanted = policies[0] if "fixed" in flags or quality else None
    assert [told(words, "--reference") for words in trained] == [wanted] * 2
    file = "pairs.jsonl" if "dpo" in flags else "sft.jsonl"
    files = [f"{out}/round_{k}/{file}" for k in (1, 2)]
    if quality:
        pool = [f"{out}/round_{k}/rankings.jsonl" for k in (1, 2)]
        files = [pool[0], ",".join(pool)]
    assert [told(words, "--data") for words in trained] == files
    assert [told(words, "--quality") for words in trained] == ["tokens" if quality else None] * 2
    seeds = {told(words, "--seed") for words in sampled}
    assert len(seeds) == 2 and seeds != {"0"}

    rows = rows_of(out)
    assert [row["round"] for row in rows] == [0, 1, 2]
    for k, row in enumerate(rows):
        result = json.loads((out / f"round_{k}" / "evaluation.json").read_text())["results"][policies[k]]
        assert all(row[name] == result[name] for name in ("score", "right", "kl", "length"))
        assert row["kl_bound"] == (pytest.approx(kl_bound(4**k)) if bounded else None)
    assert rows[0]["kl"] == 0 and 0 not in (rows[1]["kl"], rows[2]["kl"])
    assert capsys.readouterr().out.splitlines()[-4].split()[:3] == ["round", "right", "score"]

    # A round that is done is not done again, and one more follows.
    before = (out / "round_2" / "model" / "model.safetensors").stat().st_mtime_ns
    called.clear()
    run_here("best_of_n", flags, "--rounds 3 --resume")
    assert [name for name, _ in called].count("evaluate.py") == 1
    assert (out / "round_2" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert rows_of(out)[:3] == rows and len(rows_of(out)) == 4
    with pytest.raises(UserError, match="--n was 4, is now 5"):
        run_here("best_of_n", flags, "--rounds 3 --n 5 --resume")


def test_a_script_that_fails_ends_the_rounds_with_its_exit_code_and_its_words(tmp_path, monkeypatch, capfd):
    (tmp_path / "child.py").write_text("import sys\nprint('told', *sys.argv[1:])\nsys.exit(int(sys.argv[1]))")
    monkeypatch.setattr(best_of_n, "ROOT", tmp_path)
    best_of_n.call("child.py", 0, "--fine")
    with pytest.raises(SystemExit) as ended:
        best_of_n.call("child.py", 2)
    assert ended.value.code == 2 and "told 0 --fine" in capfd.readouterr().out


def test_ctrl_c_reaches_the_script_once_and_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "child.py").write_text(
        "import pathlib, signal, sys, time\nseen = []\n"
        "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
        "here = pathlib.Path(sys.argv[1])\nhere.write_text('ready')\nend = time.time() + 60\n"
        "while not seen and time.time() < end: time.sleep(0.01)\n"
        "time.sleep(0.3)\nhere.write_text(f'saved after {len(seen)}')\n")
    monkeypatch.setattr(best_of_n, "ROOT", tmp_path)
    # A shell's background jobs are started with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        while not (tmp_path / "state").exists() or not (tmp_path / "state").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        best_of_n.call("child.py", tmp_path / "state")
    thread.join()
    assert (tmp_path / "state").read_text() == "saved after 1"
