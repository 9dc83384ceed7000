"""agreement.py: every measure of a reward model against a slow count, and what is said and drawn of it."""
import itertools
import json
import math

import numpy as np
import pytest
import torch

import agreement as agreement_file
import evaluate
import model
import tools
from agreement import agreement, best_of_n, binned, described, difference, draw, language_baselines
from data import encode_group, ranking_accuracy
from formats.model_folder import load_model
from formats.rows import Row
from formats.sources import read_rows
from plumbing import run as runtime
from plumbing.flags import UserError
from tools import SILENT, reply_logprob, run_here, without, write_rows


def ask(text):
    return [{"role": "user", "content": text}]


# -- rankings

def test_held_out_accuracy_bayes_accuracy_and_calibration_are_counted_right():
    rows = [
        Row([], ["aa", "b"], [0, 1], gold=[1, -1]),
        Row([], ["cc", "d"], [0, 1], gold=[-1, 1]),
        Row([], ["e", "f"], [0, 1], gold=[1, 1]),
    ]
    result = agreement(np.array([2.0, 0.0, 3.0, 0.0, 1.0, 1.0]), rows)
    assert result["accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert result["bayes_accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert sum(b["pairs"] for b in result["calibration"]) == 3
    top = result["calibration"][-1]
    assert top["predicted"] == pytest.approx(1 / (1 + math.exp(-3))) and top["observed"] == 1
    swapped = [Row([], r.replies, [1, 0]) for r in rows]
    result = agreement(np.array([2.0, 0.0, 3.0, 0.0, 1.0, 1.0]), swapped)
    assert result["accuracy"] == pytest.approx(0.5 / 3)


def test_length_alone_takes_the_longer_or_the_shorter_reply_whichever_is_more_often_right():
    for replies, rule in ((["aa", "b"], "longer"), (["a", "bb"], "shorter")):
        rows = [Row([], replies, [0, 1]), Row([], replies, [0, 1]), Row([], replies, [1, 0])]
        result = agreement(np.arange(6.0), rows)
        assert result["length_accuracy"] == pytest.approx(2 / 3) and result["length_rule"] == rule


def test_correlation_with_length_is_that_of_score_and_characters():
    rows = [Row([], ["a", "aaa"], [0, 1]), Row([], ["aaaaa", "a"], [0, 1])]
    scores = np.array([0.0, 2.0, 3.0, 1.0])
    expected = np.corrcoef(scores, [1, 3, 5, 1])[0, 1]
    assert agreement(scores, rows)["length_correlation"] == pytest.approx(expected)
    assert agreement(np.zeros(4), rows)["length_correlation"] == 0


def test_rewardbench_rows_are_read_as_they_are_and_counted_by_subset(tmp_path):
    bench = {"chosen": "yes", "chosen_model": "a", "rejected": "no", "rejected_model": "b"}
    sources = [bench | {"prompt": f"Q {i}", "subset": name, "id": i}
               for i, name in enumerate(["alpacaeval-easy"] * 3 + ["refusals"] * 2)]
    rows = read_rows(write_rows(tmp_path / "bench.jsonl", sources), "feedback", SILENT)
    scores = np.array([1.0, 0, 1, 0, 0, 1, 0, 1, 0.5, 0.5])
    result = agreement(scores, rows)
    found = {name: (part["accuracy"], part["pairs"]) for name, part in result["subsets"].items()}
    assert found == {"alpacaeval-easy": (pytest.approx(2 / 3), 3), "refusals": (0.25, 2)}
    easy = ranking_accuracy(scores[:6], rows[:3])
    assert result["subsets"]["alpacaeval-easy"]["accuracy_interval"] == pytest.approx(easy[1:])
    assert any(line.startswith("subset refusals: 0.250 (") for line in described(result))


def test_accuracy_is_split_by_margin_and_by_how_sure_the_label_is():
    rows = [Row(ask(str(i)), ["a", "b"], [0, 1], margin=margin, probability=sure)
            for i, (margin, sure) in enumerate([(0, 0.6), (1, 0.6), (1, 1.0), (0, 1.0)])]
    result = agreement(np.array([1.0, 0, 0, 1, 1, 0, 1, 0]), rows)
    by_margin = {name: (part["accuracy"], part["pairs"]) for name, part in result["by_margin"].items()}
    assert by_margin == {"0": (1, 2), "1": (0.5, 2)}
    assert {name: part["accuracy"] for name, part in result["by_probability"].items()} == {"0.6": 0.5, "1": 1}
    # Of many numbers the quarters, each in one of them.
    names = binned(list(range(101)))
    assert [names.count(names[i]) for i in (0, 25, 50, 75)] == [25, 25, 25, 26]
    assert names[24] != names[25] and names[100] == names[75] == "75 to 100"


def test_what_no_row_has_is_left_out():
    result = agreement(np.array([1.0, 0.0]), [Row([], ["a", "b"], [0, 1])])
    absent = {"subsets", "by_margin", "by_probability", "bayes_accuracy", "best_of_n", "tie_gap",
              "rating_correlation", "verdict_accuracy", "logprob_accuracy"}
    assert not absent & result.keys()
    assert agreement(np.array([1.0, 0.5]), [Row([], ["a", "b"], [0, 0])]) == {"tie_gap": 0.5}


# -- is it only length?

def test_the_difference_of_two_accuracies_has_an_interval_over_prompts():
    """Slowly: rows of one prompt are summed first."""
    prompts = ["p", "p", "p", "q", "r", "r"]
    rows = [Row(ask(prompt), ["a", "b"], [0, 1]) for prompt in prompts]
    ours = np.array([1.0, 0, 1, 0, 0, 1, 1, 0, 0.5, 0.5, 1, 0])
    others = np.array([0.0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1])
    gain = np.array([1, 0, 0, 0, -0.5, 1])
    mean = gain.mean()
    sums = [sum(x - mean for x, name in zip(gain, prompts) if name == prompt) for prompt in "pqr"]
    variance = sum(x**2 for x in sums) / 6**2 * 3 / 2
    half = 1.96 * math.sqrt(variance)
    assert difference(ours, others, rows) == pytest.approx((mean, mean - half, mean + half))


def rows_by_length(right, wrong):
    """Rows about prompts of their own in which the longer reply is the better, and others."""
    longer = [Row(ask(f"r{i}"), ["aaa", "b"], [0, 1]) for i in range(right)]
    return longer + [Row(ask(f"w{i}"), ["a", "bbb"], [0, 1]) for i in range(wrong)]


def test_a_model_that_does_not_beat_the_longer_reply_is_told_so_in_one_line():
    rows = rows_by_length(14, 6)
    lengths = np.array([len(reply) for row in rows for reply in row.replies], float)
    told = [line for line in described(agreement(lengths, rows)) if line.startswith("warning")]
    assert len(told) == 1 and "does not beat taking the longer reply: accuracy 0.700 to 0.700" in told[0]
    perfect = np.array([1.0, 0.0] * 20)
    assert not any("warning" in line for line in described(agreement(perfect, rows)))
    # One prompt more is no proof.
    better = lengths.copy()
    better[28:30] = 1, 0
    told = [line for line in described(agreement(better, rows)) if line.startswith("warning")]
    assert len(told) == 1
    assert "is not shown to beat taking the longer reply: accuracy 0.750 to 0.700" in told[0]
    shorter = [Row(row.prompt, row.replies[::-1], [0, 1]) for row in rows]
    assert "the shorter reply" in described(agreement(np.zeros(40), shorter))[1]


# -- best of n, ties, ratings, verdicts

def test_best_of_n_is_the_mean_over_all_choices_of_n():
    rng = np.random.default_rng(0)
    rows = [Row([], ["a"] * k, [0, 1, *[2] * (k - 2)], gold=rng.normal(size=k).tolist()) for k in (4, 5, 4)]
    scores = rng.normal(size=13)
    curve = best_of_n(scores, rows)
    assert [one["n"] for one in curve] == [1, 2, 3, 4]
    for one in curve:
        picked, best, start = [], [], 0
        for row in rows:
            own = scores[start:start + len(row.replies)]
            choices = [*itertools.combinations(range(len(own)), one["n"])]
            picked.append(np.mean([row.gold[max(choice, key=lambda i: own[i])] for choice in choices]))
            best.append(np.mean([max(row.gold[i] for i in choice) for choice in choices]))
            start += len(own)
        assert (one["gold"], one["best"]) == pytest.approx((np.mean(picked), np.mean(best)))
    assert curve[0]["gold"] == pytest.approx(curve[0]["best"])


def test_ties_ratings_and_verdicts_have_measures_of_their_own():
    rows = [
        Row([], ["a", "b", "c"], [0, 1, 1]),
        Row([], ["a", "b"], [0, 0], verdict="both_good"),
        Row([], ["a", "b"], [0, 0], verdict="both_bad"),
        Row([], ["a", "b"], [-4, -1], ratings=[{"rating": 4}, {"rating": 1, "honest": 9}]),
        Row([], ["a"], [-2], ratings=[{"rating": 2}]),
    ]
    scores = np.array([3.0, 1.0, 0.25, 2.0, 0.5, 0.5, -1.0, 5.0, 1.0, 3.0])
    result = agreement(scores, rows)
    assert result["tie_gap"] == 0.75
    # Four comparisons of a good reply with a bad one: three are right, one is a tie.
    assert result["verdict_accuracy"] == pytest.approx(3.5 / 4)
    assert result["rating_correlation"] == pytest.approx(np.corrcoef([5, 1, 3], [4, 1, 2])[0, 1])
    assert result["accuracy"] == 1 and result["pairs"] == 3


# -- the language model's own preference

def test_log_probability_and_that_per_token_rank_replies_as_one_at_a_time(small):
    language_model, tokenizer = load_model(small / "sft", model.GPT)
    rows = read_rows(f"{small}/rankings.json", "feedback", SILENT)
    groups = [encode_group(tokenizer, row) for row in rows]
    alone = runtime.Alone(torch.device("cpu"), torch.float32)
    found = language_baselines(alone, language_model, groups, 60, tokenizer.pad)
    slow, tokens = [], []
    with torch.no_grad():
        for ids, mask in itertools.chain(*groups):
            slow.append(reply_logprob(language_model, torch.tensor(ids), torch.tensor(mask)).item())
            tokens.append(sum(mask))
    assert found["logprob"] == pytest.approx(slow, abs=1e-4)
    assert found["logprob_per_token"] == pytest.approx(np.array(slow) / tokens, abs=1e-4)
    result = agreement(np.array(slow), rows, found)
    assert result["logprob_accuracy"] == pytest.approx(result["accuracy"])
    expected = ranking_accuracy(np.array(slow) / tokens, rows)[0]
    assert result["logprob_per_token_accuracy"] == pytest.approx(expected)
    assert language_baselines(alone, language_model, [], 60, tokenizer.pad) == {}


def test_log_probabilities_of_rows_that_rank_nothing_are_left_out():
    rows = [Row(ask("q"), ["a", "b"], [0, 0]), Row(ask("p"), ["a", "b"], [0, 1])]
    result = agreement(np.array([1.0, 2.0, 3.0, 4.0]), rows, {"logprob": np.array([1.0, 2.0, 4.0, 3.0])})
    assert (result["accuracy"], result["logprob_accuracy"]) == (0, 1)


# -- the picture

def test_a_picture_is_drawn_and_without_matplotlib_a_line_says_that_it_is_not(tmp_path, monkeypatch):
    rows = rows_by_length(3, 2)
    for i, row in enumerate(rows):
        row.gold, row.subset = [1.0, 0.0], f"part {i % 2}"
    result, said = agreement(np.arange(10.0), rows), []
    pytest.importorskip("matplotlib")
    draw(result, tmp_path / "evaluation.png", said.append)
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000 and said == []
    without(monkeypatch, "matplotlib")
    draw(result, tmp_path / "other.png", said.append)
    assert len(said) == 1 and "other.png is not drawn: the pictures need matplotlib" in said[0]
    assert not (tmp_path / "other.png").exists()
    draw({"tie_gap": 0.1}, tmp_path / "other.png", said.append)  # nothing to draw
    assert len(said) == 1


# -- whole runs

def test_a_run_tells_writes_and_draws_how_far_its_model_agrees(small, tmp_path, capsys):
    run_here("reward", f"--model {small}/sft --data {small}/rankings.json --val-data {small}/rankings.json",
             f"--steps 1 --threads 1 --out {tmp_path}/run")
    said = capsys.readouterr().out
    assert "held-out accuracy " in said and "by log-probability" in said and "per token" in said
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    wanted = {"accuracy_interval", "logprob_accuracy", "over_length", "calibration", "by_margin"}
    assert wanted <= result.keys()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "run" / "evaluation.png").is_file()


def test_evaluate_measures_reward_models_on_any_preference_file(small, tmp_path, capsys):
    """Each alone, and all together; no model is asked for replies."""
    run_here("reward", f"{tools.ALL_AT_ONCE} --model {small}/sft --data {small}/rankings.json --seed 1",
             f"--steps 1 --out {tmp_path}/second")
    capsys.readouterr()
    run_here("evaluate", f"--reward {small}/reward {tmp_path}/second --reward-combine min --threads 1",
             f"--preferences {small}/rankings.json --models {small}/sft --out {tmp_path}/found.json")
    found = json.loads((tmp_path / "found.json").read_text())["agreement"]
    assert [*found] == ["reward", "second", "min"]
    rows = read_rows(f"{small}/rankings.json", "feedback", SILENT)
    scores = []
    for folder in (small / "reward", tmp_path / "second"):
        scorer, tokenizer = load_model(folder, model.ScalarModel)
        with torch.no_grad():
            scores.append([scorer(torch.tensor([ids]))[0, -1].item()
                           for row in rows for ids, _ in encode_group(tokenizer, row)])
    for name, own in zip(found, (*scores, np.minimum(*scores))):
        expected = agreement(np.array(own), rows)
        assert found[name]["accuracy"] == pytest.approx(expected["accuracy"])
        assert found[name]["length_correlation"] == pytest.approx(expected["length_correlation"], abs=1e-3)
        assert "logprob_accuracy" in found[name]
    assert capsys.readouterr().out.count("held-out accuracy") == 3
    run_here("evaluate", f"--reward {small}/reward --preferences {small}/rankings.json --threads 1")
    assert "log-probability" not in capsys.readouterr().out


def test_evaluate_says_what_preferences_have_no_use_for(small, tmp_path):
    words = f"--preferences {small}/rankings.json --threads 1"
    for flags, said in (("", "--preferences measures reward models: name one"),
                        (f"--reward {small}/reward --judge toy:gold", "leave out --reward-fn and --judge"),
                        (f"--reward {small}/reward --reward-combine min", "and there are 1")):
        with pytest.raises(UserError, match=said):
            run_here("evaluate", words, flags)
    with pytest.raises(UserError, match="no such file"):
        run_here("evaluate", f"--reward {small}/reward --preferences {tmp_path}/none.jsonl")
    assert evaluate.agreement is agreement_file.agreement
