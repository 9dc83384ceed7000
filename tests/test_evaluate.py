"""evaluate.py: its numbers against one reply at a time; what other judges, temperatures and files change."""
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

import evaluate
import model
import rollout as rollout_file
from formats.model_folder import load_model
from formats.sources import read_rows, split_by_prompt
from plumbing import run as runtime
from plumbing.flags import UserError
from tools import recorded, reply_logprob, run_here


def test_evaluation_equals_one_reply_at_a_time_and_counts_wins_against_the_first_model(
        small, tmp_path, monkeypatch):
    rollouts = recorded(monkeypatch, rollout_file, "generate")["generate"]
    folders = [str(small / "sft"), str(small / "other"), shutil.copytree(small / "sft", tmp_path / "sft")]
    folders = [str(folder) for folder in folders]
    (tmp_path / "prompts.json").write_text(json.dumps(json.loads((small / "prompts.json").read_text()) * 4))
    run_here(
        "evaluate",
        f"--models {' '.join(folders)} --data {tmp_path}/prompts.json --reward {small}/reward --temperature "
        f"0.7 --max-new-tokens 10 "
        f"--micro-batch-tokens 80 --threads 1 --out {tmp_path}/evaluation.json")
    results = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    reference = load_model(small / "sft", model.GPT)[0]
    scorer = load_model(small / "reward", model.ScalarModel)[0]
    baseline = None
    for folder, (_, rollout) in zip(folders, rollouts):
        policy, result = load_model(folder, model.GPT)[0], results[folder]
        with torch.no_grad():
            rows = [(ids[:length], mask[:length])
                    for ids, mask, length in zip(rollout.ids, rollout.mask, rollout.lengths)]
            kl = [(reply_logprob(policy, *row, 0.7) - reply_logprob(reference, *row, 0.7)).item()
                  for row in rows]
            scores = torch.stack([scorer(ids[None])[0, -1] for ids, _ in rows])
        baseline = scores if baseline is None else baseline
        wins, losses = ((sign * (scores - baseline) > 1e-4).float().mean().item() for sign in (1, -1))
        assert result["kl"] == pytest.approx(sum(kl) / 24, abs=1e-4)
        assert result["score"] == pytest.approx(scores.mean().item(), abs=1e-4)
        expected = pytest.approx((wins, losses, wins + (1 - wins - losses) / 2))
        assert (result["wins"], result["losses"], result["win_rate"]) == expected
    assert results[folders[1]]["kl"] > 0.01 and results[folders[1]]["wins"] != results[folders[1]]["losses"]


def test_evaluation_scores_by_a_weighted_sum_and_names_all_of_it(small, judged, tmp_path, capsys):
    results, replies = judged(f"--reward {small}/reward --reward-fn mine:right mine:size "
                              "--reward-weights 2 10 0.5")
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in lines[1:]] == ["a/sft", "b/sft", "other"]
    named = ["score", "standard_error", "score_reward", "score_mine:right", "score_mine:size"]
    assert lines[0].split()[:5] == named
    assert len({len(line) for line in lines}) == 1
    for folder, result in results.items():
        parts = result["scores"]
        assert parts["mine:right"] == 2.5  # the mean of 0 to 5
        assert parts["mine:size"] == pytest.approx(sum(len(row["reply"]) for row in replies[folder]) / 6)
        assert result["score"] == pytest.approx(2 * parts["reward"] + 25 + parts["mine:size"] / 2, rel=1e-4)
        assert result["score"] == pytest.approx(sum(row["score"] for row in replies[folder]) / 6, rel=1e-4)
    assert results[str(tmp_path / "b" / "sft")]["ties"] == 1


def test_evaluation_refuses_functions_without_their_answers_and_scores_that_are_no_numbers(small, judged):
    only, _ = judged("--reward-fn mine:right")
    assert all(result["score"] == 2.5 and "scores" not in result for result in only.values())
    with pytest.raises(UserError, match="mine:wrong gave a reply of .*a/sft a score that is not finite"):
        judged("--reward-fn mine:wrong")
    with pytest.raises(UserError, match="wants answers, and no row has one"):
        judged(f"--reward-fn mine:right --data {small}/prompts.json")


def test_evaluation_at_temperature_0_has_no_kl(judged, capsys):
    results, _ = judged("--reward-fn mine:right --temperature 0")
    assert all(result["kl"] is None for result in results.values())
    head, *lines = capsys.readouterr().out.splitlines()[-4:]
    end = head.index("kl") + 2
    assert all(line[end - 10:end].strip() == "" and line[end:].strip() for line in lines)


def test_evaluation_takes_part_of_a_file_and_leaves_out_what_cannot_be_read(judged, tmp_path, capsys):
    rows = [json.dumps({"prompt": f"Cube {i}."}) for i in range(150)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{"]) + "\n")
    flags = f"--data {tmp_path}/rows.jsonl --reward-fn mine:size"
    with pytest.raises(UserError, match="rows.jsonl:151 is not valid JSON"):
        judged(flags)
    results, _ = judged(f"{flags} --skip-bad --part 1/2:2 --val-fraction 0.5")
    kept = split_by_prompt(read_rows(tmp_path / "rows.jsonl", "prompts", str, "1/2:2", True), 0.5)[1]
    assert {result["prompts"] for result in results.values()} == {len(kept)} and 20 < len(kept) < 80


def test_evaluation_is_one_process(chain, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        runtime.run_script(evaluate.main, evaluate.Config, "", ["--models", f"{chain[0]}/sft"])
    assert stopped.value.code == 2
    assert "one process, not 2: start it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_right_reply(samples):
    table = np.array(list(itertools.product([False, True], repeat=samples)))
    for k in range(1, samples + 1):
        for rights in (table, *table[:, None]):
            chosen = [
                any(own[i] for i in places) for own in rights
                for places in itertools.combinations(range(samples), k)
            ]
            assert evaluate.pass_at(rights, k) == pytest.approx(np.mean(chosen), abs=1e-12)


def test_pass_at_k_is_unbiased_whatever_the_number_of_samples():
    p, k = 0.3, 2
    for samples in (2, 3, 6):
        outcomes = np.array(list(itertools.product([False, True], repeat=samples)))
        probability = np.where(outcomes, p, 1 - p).prod(1)
        estimates = np.array([evaluate.pass_at(own[None], k) for own in outcomes])
        assert probability @ estimates == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


PARITY = "def even(replies):\n    return [float(len(reply) % 2 == 0) for reply in replies]\n"


@pytest.fixture
def sampled(small, tmp_path, monkeypatch):
    """Evaluate two models by whether replies are of even length: sampled(flags) -> (results, replies)."""
    (tmp_path / "mine.py").write_text(PARITY)
    monkeypatch.syspath_prepend(tmp_path)

    def evaluation(flags):
        run_here(
            "evaluate",
            f"--models {small}/sft {small}/other --data {small}/prompts.json --judge mine:even "
            f"--max-new-tokens 10 "
            f"--threads 1 --out {tmp_path}/results.json {flags}")
        found = json.loads((tmp_path / "results.json").read_text())
        return list(found["results"].values()), list(found["replies"].values())

    return evaluation


def test_several_samples_are_counted_by_prompt(sampled, small, capsys):
    results, replies = sampled("--samples 5 --pass-k 1 3 5")
    head, *lines = capsys.readouterr().out.splitlines()[-4:]
    assert "6 prompts, 5 replies to each" in head
    assert lines[0].split()[:6] == ["even", "standard_error", "pass@1", "pass@3", "pass@5", "wins"]
    for line, result in zip(lines[1:], results):
        assert line.split()[1:3] == [f"{result[name]:.3f}" for name in ("even", "standard_error")]
    prompts = [row["prompt"] for row in json.loads((small / "prompts.json").read_text())]
    means = []
    for result, rows in zip(results, replies):
        assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(5)]
        assert len({row["reply"] for row in rows[:5]}) > 1
        right = np.array([len(row["reply"]) % 2 == 0 for row in rows]).reshape(6, 5)
        assert [row["score"] for row in rows] == right.flatten().tolist()
        means.append(right.mean(1))
        assert result["prompts"] == 6 and result["even"] == pytest.approx(right.mean()) == result["pass@1"]
        for k in (3, 5):
            assert result[f"pass@{k}"] == pytest.approx(evaluate.pass_at(right, k))
        assert result["standard_error"] == pytest.approx(means[-1].std() / 6 ** 0.5)
    wins, losses = (means[1] > means[0]).mean(), (means[1] < means[0]).mean()
    assert 0 < wins + losses and (results[1]["wins"], results[1]["losses"]) == pytest.approx((wins, losses))


def test_replies_are_the_same_however_many_prompts_are_asked_at_once(sampled):
    together, apart = sampled("--samples 4")[1], sampled("--samples 4 --batch 9")[1]
    assert together == apart


def test_one_sample_is_what_it_was_before_there_were_several(sampled, monkeypatch):
    given = recorded(monkeypatch, rollout_file, "uniforms")["uniforms"]
    results, replies = sampled("")
    assert not any(name.startswith("pass@") for name in results[0])
    assert [len(rows) for rows in replies] == [6, 6]
    # The random numbers of one draw for all prompts.
    generator = torch.Generator("cpu").manual_seed(0)
    expected = torch.rand(6, 10, 2, dtype=torch.float64, generator=generator)
    assert len(given) == 2 and all(torch.equal(numbers, expected) for _, numbers in given)
    assert sampled("--samples 1 --pass-k 1")[1] == replies
    even = [row["score"] for row in replies[0]]
    assert results[0]["standard_error"] == float(np.std(np.float32(even)) / 6 ** 0.5)


def test_a_score_decides_who_is_right_where_there_is_no_judge(small, tmp_path, monkeypatch):
    (tmp_path / "mine.py"
     ).write_text("def half(replies):\n    return [0.5 + 0.1 * (i % 3 == 0) for i in range(len(replies))]\n")
    monkeypatch.syspath_prepend(tmp_path)
    run_here(
        "evaluate",
        f"--models {small}/sft --data {small}/prompts.json --reward-fn mine:half --max-new-tokens 4 "
        f"--threads 1 "
        f"--samples 3 --pass-k 1 --out {tmp_path}/results.json")
    result, = json.loads((tmp_path / "results.json").read_text())["results"].values()
    assert result["pass@1"] == pytest.approx(1 / 3)  # 0.5 itself is not above a half


@pytest.mark.parametrize("flags, message", [
    ("--samples 4 --pass-k 1 5", "--pass-k 5 .* --samples, of which there are 4"),
    ("--samples 4 --pass-k 0", "--pass-k 0 must be 1 or more"),
    ("--samples 300", "--batch is 256"),
    ("--samples 2 --temperature 0", "all the same at --temperature 0"),
])
def test_samples_that_make_no_sense_are_refused_before_a_model_is_loaded(flags, message, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", None)
    with pytest.raises(UserError, match=message):
        run_here("evaluate", f"--models nowhere --judge toy:gold {flags}")
