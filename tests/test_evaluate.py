"""evaluate.py: its numbers against one reply at a time; what other judges, temperatures and files change."""
import json
import shutil

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
    assert lines[0].split()[:4] == ["score", "score_reward", "score_mine:right", "score_mine:size"]
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
