"""Runs of ppo.py: scores of several rewards and users' functions, missing end tokens, normalisation."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ppo
import rollout as rollout_file
import tools
from data import pad_rows
from examples import GRADERS
from formats.model_folder import load_model, save_model
from formats.tokenizer import Tokenizer
from generate import Generation
from model import GPT, GPTConfig, ScalarModel
from plumbing.flags import UserError
from tools import PPO_RUN, TOY, network, rollout_of, rows_of, run_here, same_tensors, train


# -- several rewards

def scores_by_hand(folder, rollout):
    """Each reply alone, without padding, through a reward model."""
    scorer = network(ScalarModel, folder)
    with torch.no_grad():
        return torch.stack(
            [scorer(ids[:length][None])[0, -1] for ids, length in zip(rollout.ids, rollout.lengths)])


def test_the_score_is_the_weighted_sum_of_reward_models_and_functions(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine",
                        SimpleNamespace(length=lambda prompts, replies: [len(reply) for reply in replies]))
    run = train(
        root,
        tmp_path / "run",
        reward="--reward {root}/reward {root}/other --reward-fn mine:length --reward-weights 0.5 -2 3")
    for number, row in enumerate(run.rows):
        rollout = rollout_of(run, number)
        texts = rollout.texts(load_model(root / "sft", GPT)[1])
        parts = [
            scores_by_hand(root / "reward", rollout),
            scores_by_hand(root / "other", rollout),
            torch.tensor([float(len(text)) for text in texts]),
        ]
        expected = 0.5 * parts[0] - 2 * parts[1] + 3 * parts[2]
        torch.testing.assert_close(run.calls["missing_eos_scores"][number].scores,
                                   expected,
                                   rtol=1e-4,
                                   atol=1e-4)
        logged = [row["score_reward"], row["score_other"], row["score_mine:length"]]
        assert logged == pytest.approx([part.mean().item() for part in parts], rel=1e-4)
        assert row["score"] == pytest.approx(expected.mean().item(), rel=1e-4)
    # The critic starts as the first of them.
    assert same_tensors(run.start["critic"], network(ScalarModel, root / "reward").state_dict())


def test_rewards_weigh_1_each_unless_told(root, tmp_path, default):
    both = train(root, tmp_path / "both", "--steps 1", reward="--reward {root}/reward {root}/other")
    expected = sum(scores_by_hand(root / name, rollout_of(both)) for name in ("reward", "other"))
    torch.testing.assert_close(both.calls["missing_eos_scores"][0].scores, expected, rtol=1e-4, atol=1e-4)
    assert not any(
        name.startswith("score_") and not name.endswith(("_share", "_per_second"))
        for name in default.rows[0])


@pytest.mark.case(12)
@pytest.mark.parametrize("block_size, pattern, said", [
    (64, r"\S+|\s+", "--reward {}/odd has another tokenizer than --model {}/sft"),
    (12, None, "every row is longer than the 2 tokens that the context leaves for it"),
    (10, None, "--max-new-tokens 10 leaves no room for a prompt in the context of 10"),
])
def test_a_reward_model_that_reads_other_tokens_or_fewer_of_them_is_refused(block_size, pattern, said, root,
                                                                            tmp_path):
    tokenizer = load_model(root / "reward", ScalarModel)[1]
    other = Tokenizer("odd", pattern or tokenizer.pattern, tokenizer.ranks)
    save_model(tmp_path / "odd", ScalarModel(GPTConfig(other.n_vocab, block_size, 1, 2, 2, 32)), other)
    with pytest.raises(UserError, match=said.format(tmp_path, root)):
        train(root, tmp_path / "run", reward=f"--reward {{root}}/reward {tmp_path}/odd")
    assert not (tmp_path / "run").exists()


def test_the_reward_model_of_the_default_is_guarded_like_one_that_is_named(root, tmp_path, monkeypatch):
    (tmp_path / "runs" / "reward").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "runs" / "reward" / file).write_bytes((root / "reward" / file).read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="would delete the --reward"):
        train(root, Path("runs/reward"), "--overwrite", reward="")
    train(root, tmp_path / "run", "--steps 1", reward="")
    (tmp_path / "runs" / "reward" / "model.safetensors").write_bytes(
        (root / "other" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="since the run in .* began, what --reward names has changed; "):
        train(root, tmp_path / "run", "--steps 1 --resume", reward="")


def test_reward_weights_must_be_finite(root, tmp_path):
    for number in ("nan", "inf"):
        with pytest.raises((UserError, SystemExit)):
            train(root, tmp_path / "run", f"--reward-weights {number}")
        assert not (tmp_path / "run").exists()


# -- users' functions

def test_a_reward_function_gets_prompts_and_replies_as_text_in_order(root, tmp_path, monkeypatch):
    """It is found from the working directory; its numbers are the scores."""
    (tmp_path / "brevity_of_mine.py").write_text(
        "calls = []\n\ndef score(prompts, replies):\n    calls.append((prompts, replies))\n"
        "    return [i / 7 for i in range(len(replies))]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run = train(root, tmp_path / "run", reward="--reward-fn brevity_of_mine:score")
    trial, *calls = sys.modules.pop("brevity_of_mine").calls
    assert len(trial[0]) == len(trial[1]) == 1 and len(calls) == 2
    _, tokenizer = load_model(root / "sft", GPT)
    for number, (prompts, replies) in enumerate(calls):
        rollout = rollout_of(run, number)
        assert type(prompts) is type(replies) is list and len(prompts) == 16 and len(set(prompts)) > 4
        for i, (ids, mask) in enumerate(zip(rollout.ids, rollout.mask)):
            assert prompts[i] == tokenizer.decode(ids[:mask.nonzero()[0]].tolist())
            assert replies[i] == tokenizer.decode(ids[mask].tolist())
        expected = pytest.approx([i / 7 for i in range(16)])
        assert run.calls["missing_eos_scores"][number].scores.tolist() == expected


def test_a_reward_function_of_three_parameters_gets_the_answers_of_its_rows(root, tmp_path, monkeypatch):
    """Rows with a checkable result: a question, and an answer that ends in #### and the result."""
    (tmp_path / "questions.json").write_text(
        json.dumps(
            [{"question": f"How many are {n}?", "answer": f"{n} it is #### {n},000"} for n in range(20)]))
    (tmp_path / "checks_of_mine.py").write_text(
        "calls = []\n\ndef score(prompts, replies, answers):\n    calls.append((prompts, answers))\n"
        "    return [float(answer in reply) for reply, answer in zip(replies, answers)]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    train(root,
          tmp_path / "run",
          f"--data {tmp_path}/questions.json",
          reward="--reward-fn checks_of_mine:score")
    trial, *calls = sys.modules.pop("checks_of_mine").calls
    assert len(trial[1]) == 1 and len(calls) == 2
    assert all(
        answers == [prompt.split()[-1][:-1] + "000" for prompt in prompts] for prompts, answers in calls)


def test_a_reward_function_that_fails_later_ends_in_one_line_and_saves_nothing(root, tmp_path, monkeypatch):
    def moody(prompts, replies):
        return [1.0] if len(replies) == 1 else 1 / 0

    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(moody=moody))
    with pytest.raises(UserError, match="mine:moody failed .ZeroDivisionError: division by zero."):
        train(root, tmp_path / "run", reward="--reward {root}/reward --reward-fn mine:moody")
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("name, answers, said", [
    ("by_name", 0, "--reward-fn graders:by_name wants answers, and no row has one"),
    ("perhaps", 0, ""),
    ("by_name", 3, "warning: 13 of 16 prompts have no answer; "),
])
def test_a_function_that_wants_answers_and_gets_none_stops_the_run_and_one_that_gets_some_is_told(
        name, answers, said, root, tmp_path, monkeypatch, capsys):
    (tmp_path / "graders.py").write_text(GRADERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [{"prompt": f"Say {i}."} | ({"answer": str(i)} if i >= 16 - answers else {}) for i in range(16)]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    data = f"--data {tmp_path}/prompts.json"
    words = f"--steps 1 --reward-fn graders:{name} --out {tmp_path}/run"
    code = tools.exit_code("ppo", PPO_RUN.format(root=root), data, words)
    calls = sys.modules.pop("graders").calls
    # The trial before the run is of a prompt that has an answer, if there is one.
    assert calls[:1] == ([["13"]] if answers else [[""]] if code == 0 else [])
    captured = capsys.readouterr()
    assert code == (2 if "wants" in said else 0) and said in captured.out + captured.err
    assert (tmp_path / "run").exists() == (code == 0)


def test_a_reward_function_may_return_what_a_network_computed(root, tmp_path, monkeypatch):
    weight = torch.ones((), requires_grad=True)
    monkeypatch.setitem(
        sys.modules, "mine",
        SimpleNamespace(
            learned=lambda prompts, replies: weight * torch.tensor([float(len(r)) for r in replies])))
    train(root, tmp_path / "run", reward="--reward-fn mine:learned")
    assert weight.grad is None


# -- missing end tokens, normalisation, where the score lands

@pytest.mark.parametrize("rule", ["floor", "replace", "subtract"])
def test_the_missing_end_token_is_judged_before_scores_are_normalised(rule, root, tmp_path):
    run = train(root, tmp_path / "run",
                f"--missing-eos {rule} --missing-eos-penalty 0.7 --reward-norm standard --steps 1")
    rollout = rollout_of(run)
    scores = scores_by_hand(root / "reward", rollout)
    cut_off = {"floor": scores.min() - 0.7, "replace": torch.tensor(-0.7), "subtract": scores - 0.7}[rule]
    judged = torch.where(rollout.ended, scores, cut_off)
    assert not rollout.ended.all()
    torch.testing.assert_close(run.calls["normalise_scores"][0].scores, judged, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.calls["shaped_rewards"][0].scores, (judged - judged.mean()) / judged.std(),
                               rtol=1e-3,
                               atol=1e-3)
    # What is logged is the reward model's own.
    assert run.rows[0]["score"] == pytest.approx(scores.mean().item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["none", "scale", "standard"])
def test_scores_are_normalised_by_the_moments_of_all_rollouts_so_far(kind, root, tmp_path):
    run = train(root, tmp_path / "run", f"--reward-norm {kind} --steps 3")
    judged = [call.scores for call in run.calls["normalise_scores"]]
    for number, call in enumerate(run.calls["shaped_rewards"]):
        seen = torch.cat(judged[:number + 1])
        expected = {
            "none": judged[number], "scale": judged[number] / seen.std(),
            "standard": (judged[number] - seen.mean()) / seen.std()
        }[kind]
        torch.testing.assert_close(call.scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags", ["--reward-clip 0.5", "--reward-clip 0.8 --reward-norm scale"])
def test_scores_are_clipped_after_they_are_normalised(flags, root, tmp_path):
    clip = float(flags.split()[1])
    run = train(root, tmp_path / "run", flags, "--steps 1")
    call = run.calls["normalise_scores"][0]
    scores = call.scores / call.scores.std() if "scale" in flags else call.scores
    assert scores.abs().max() > clip and scores.abs().min() < clip
    torch.testing.assert_close(run.calls["shaped_rewards"][0].scores,
                               scores.clamp(-clip, clip),
                               rtol=1e-4,
                               atol=1e-4)


@pytest.mark.parametrize("written", [False, True])
def test_the_score_counts_one_position_later_for_all_but_the_longest_replies(written, root, tmp_path,
                                                                             monkeypatch):
    """Replies as they are sampled; or written so that one of those that aren't the longest ends, behind a
    long prompt, in the last column."""
    def generate(policy, prompts, max_new_tokens, tokenizer, *options, **more):
        ids, lengths = pad_rows(
            [prompt + prompt[1:4 + (len(prompt) < max(map(len, prompts)))] for prompt in prompts],
            tokenizer.pad)
        at = torch.arange(ids.shape[1])
        mask = (at >= torch.tensor([len(prompt) for prompt in prompts])[:, None]) & (at < lengths[:, None])
        return Generation(ids, mask, lengths, torch.ones(len(prompts), dtype=torch.bool))

    if written:
        monkeypatch.setattr(rollout_file, "generate", generate)
    run = train(root, tmp_path / "run", "--reward-at next --steps 1 --minibatches 1 --micro-batch-tokens 60")
    rollout, advantages, critic = rollout_of(run), run.calls["gae"][0], network(ScalarModel, root / "reward")
    size, width = rollout.mask.sum(1), advantages.steps.shape[1]
    later = size < size.max()
    assert later.any()
    assert not later.all()
    assert not written or (rollout.lengths[later] == rollout.ids.shape[1]).any()
    for b, length in enumerate(rollout.lengths.tolist()):
        inside, last = rollout.mask[b].nonzero().flatten().tolist(), length - 1 + int(later[b])
        assert advantages.steps[b].nonzero().flatten().tolist() == sorted({*inside, last})
        with torch.no_grad():
            heads = critic(rollout.ids[b, :length][None])[0]
        # The state after the last token.
        assert advantages.values[b, last].item() == pytest.approx(heads[last - 1].item(), abs=1e-4)
        expected = torch.zeros(width).index_fill(0, torch.tensor(last),
                                                 run.calls["shaped_rewards"][0].scores[b].item())
        torch.testing.assert_close(advantages.rewards[b], expected)  # policy and reference agree: no KL yet
    whitened = run.calls["whiten"][0].mask
    assert torch.equal(whitened[:, :rollout.mask.shape[1]], rollout.mask) and whitened.sum() == size.sum()
    for name, counted in (("policy_loss", size.sum()), ("value_loss", advantages.steps.sum())):
        calls = [call for call in run.calls[name] if call.minibatch == 0]
        assert sum((call.mask if name == "policy_loss" else call.steps).sum() for call in calls) == counted
        assert {call.tokens.item() for call in calls} == {counted.item()}


@pytest.mark.case(23)
def test_replies_cut_off_before_their_end_never_earn_more_than_any_that_ended(chain, tmp_path, monkeypatch):
    seen = []
    original = ppo.shaped_rewards
    monkeypatch.setattr(ppo, "shaped_rewards",
                        lambda scores, *rest: seen.append(scores.clone()) or original(scores, *rest))
    root = chain[0]
    run_here(
        "ppo",
        f"--data {TOY}/prompts.jsonl --model {root}/sft --reward {root}/reward --threads 1 --steps 1 "
        f"--rollout-batch 32 --max-new-tokens 8 --out {tmp_path}/run"
    )
    share_ended = rows_of(tmp_path / "run")[0]["eos_rate"]
    assert share_ended < 1  # a three-step policy rarely ends
    ordered = seen[0].sort().values
    cut_off = round(32 * (1 - share_ended))
    assert (ordered[:cut_off] == ordered[0]).all()
    if cut_off < 32:
        assert ordered[cut_off] >= ordered[0] + 1 - 1e-5
