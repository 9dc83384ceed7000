"""bench/rewards.py: what it counts of ties and accuracies, and which replies and trunks it scores."""
import math

import numpy as np
import pytest
import torch

import model
from bench import rewards
from data import encode_group, ranking_accuracy
from formats.model_folder import load_model
from formats.rows import Row
from tools import run_here


def ask(text):
    return [{"role": "user", "content": text}]


ROWS = [Row(ask("p"), ["a", "b", "c"], [0, 1, 1]), Row(ask("q"), ["a", "b"], [1, 0])]


def test_tied_replies_are_counted_and_their_distance_is_a_share_of_that_of_others():
    scores = np.array([3.0, 1.0, 0.0, 2.0, 4.0])
    # One tie, at a distance of 1; three decided pairs at 2, 3 and 2.
    assert rewards.tied_share(ROWS) == pytest.approx(1 / 4)
    assert rewards.tie_ratio(scores, ROWS) == pytest.approx(1 / (7 / 3))
    assert rewards.tie_ratio(-scores, ROWS) == pytest.approx(1 / (7 / 3))


def test_the_gain_of_seeds_is_a_mean_and_its_interval_narrows_with_them():
    rng = np.random.default_rng(0)
    rows = [Row(ask(str(i)), ["a", "b"], [0, 1]) for i in range(50)]
    scores, others = rng.normal(size=(2, 100))
    gain, variance = rewards.accuracy_gain(scores, others, rows)
    assert gain == pytest.approx(ranking_accuracy(scores, rows)[0] - ranking_accuracy(others, rows)[0])
    right = (scores[::2] > scores[1::2]) - 1.0 * (others[::2] > others[1::2])
    assert variance == pytest.approx(right.var(ddof=1) / 50)
    assert rewards.over_seeds([(0.1, 0.0025)]) == "+0.100 ± 0.098"
    assert rewards.over_seeds([(0.1, 0.0025), (-0.2, 0.0075)]) == "-0.050 ± 0.098"


def test_the_best_of_16_by_one_model_is_compared_with_that_by_another_prompt_by_prompt():
    rng = np.random.default_rng(0)
    gold, scores, others = rng.normal(size=(3, 5, 32))
    gain, variance = rewards.gold_gain(gold, scores, others)
    # Slowly: the chance that a reply is chosen of 16, from its place among the 32.
    chance = np.array([math.comb(place, 15) / math.comb(32, 16) for place in range(32)])
    each = [gold[i][np.argsort(scores[i])] @ chance - gold[i][np.argsort(others[i])] @ chance
            for i in range(5)]
    assert (gain, variance) == (pytest.approx(np.mean(each)), pytest.approx(np.var(each, ddof=1) / 5))


def test_the_scores_of_several_models_are_combined_as_ppo_would():
    scores = np.array([[[1.0, 2.0]], [[3.0, 2.0]]])  # (2 models, 1 prompt, 2 replies)
    expected = {"mean": [[2, 2]], "min": [[1, 2]], "pessimistic, 1 deviation": [[1, 2]],
                "pessimistic, 2 deviations": [[0, 2]]}
    for name, (flags, _) in rewards.ENSEMBLES.items():
        assert rewards.together(scores, flags).tolist() == expected[name]


def test_a_reply_that_never_ended_is_scored_without_the_end_token(small):
    _, tokenizer = load_model(small / "sft", model.GPT)
    ended, = rewards.encode(tokenizer, "Say hello.", "Hello.", True)
    cut, = rewards.encode(tokenizer, "Say hello.", "Hello.", False)
    assert (cut.ids, cut.mask) == (ended.ids[:-1], ended.mask[:-1])
    assert ended.ids[-1] not in cut.ids


def test_a_reward_models_trunk_is_measured_as_it_was_trained_without_the_shift_of_its_zero(small, tmp_path):
    """Training that changes nothing leaves the language model's own probabilities."""
    run_here("reward", f"--model {small}/sft --data {small}/rankings.json --val-data {small}/rankings.json",
             f"--steps 1 --lr 1e-30 --threads 1 --out {tmp_path}/run")
    before, tokenizer = load_model(small / "sft", model.GPT)
    after, _ = rewards.language_model_of(tmp_path / "run", small / "sft")
    example, = encode_group(tokenizer, Row(ask("Say hello."), ["Hello."], [0]))
    ids, mask = torch.tensor([example.ids]), torch.tensor([example.mask])
    as_saved, _ = load_model(tmp_path / "run", model.ScalarModel)
    saved = model.GPT(before.config)
    saved.transformer = as_saved.transformer
    with torch.no_grad():
        expected = before(ids, mask)[0]
        torch.testing.assert_close(after(ids, mask)[0], expected, rtol=0, atol=3e-6)
        assert (saved.eval()(ids, mask)[0] - expected).abs().max() > 3e-5
