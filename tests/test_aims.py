"""aims.py: heads of several aims, their weights, the gate, and what a reply's length is allowed to say."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import aims
import tools
import toy
from agreement import midranks, spearman
from aims import (
    Seen, best_ridge, fit, learn_weights, length_share, comparisons_of, aims_loss, ratings_of, ridge,
    spread, standard_of, weights_given)
from data import Example, Group, encode_group, pad_rows
from examples import TOKENIZER, user
from formats.model_folder import load_model, save_model
from formats.rows import Row
from formats.sources import read_rows, unit_hash
from model import GPT, ScalarModel, last_scores, read_at, shifted
from plumbing.flags import UserError
from small_models import ATTENTION, IDS, outputs, tiny_of
from tools import SILENT, TORCHRUN, TOY, command, exit_code, run_here, stopped_in_the_second_step, write_rows

NAN = math.nan


# -- heads

def test_heads_equal_least_squares_with_a_row_more_for_each_weight():
    """Ridge is least squares on [h; sqrt(a) I]; each aim from its own rated replies alone."""
    torch.manual_seed(0)
    states, ratings = torch.randn(40, 6).double(), torch.randn(40, 3).double()
    ratings[:15, 0] = NAN
    ratings[30:, 1] = NAN
    heads = ridge(states, ratings, 2.5)
    for head, x in zip(heads, ratings.T):
        known = ~x.isnan()
        longer = np.vstack([states[known].numpy(), math.sqrt(2.5) * np.eye(6)])
        expected, *_ = np.linalg.lstsq(longer, np.concatenate([x[known].numpy(), np.zeros(6)]), rcond=None)
        np.testing.assert_allclose(head, expected, atol=1e-10)
    # Where nobody rated, nothing is learned.
    assert not ridge(states, torch.full((40, 1), NAN).double(), 1.0).any()


def test_missing_ratings_have_no_loss_and_no_gradient():
    scores = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    loss = aims_loss(scores, torch.tensor([[0.0, NAN], [NAN, 1.0]]), 2)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 4) / 2)
    assert scores.grad.tolist() == [[1, 0], [0, -2]]
    assert aims_loss(scores, torch.full((2, 2), NAN), 2).item() == 0


def replies(states, ratings, prompts=None, lengths=None, pairs=None):
    prompts = torch.zeros(len(states), 1).double() if prompts is None else prompts
    lengths = torch.arange(len(states)).double() if lengths is None else lengths
    return Seen(states, prompts, ratings, lengths, pairs)


def test_the_penalty_is_the_one_that_misses_held_out_ratings_least():
    torch.manual_seed(0)
    w = torch.randn(30, 1).double()
    states, held_out = torch.randn(40, 30).double(), torch.randn(200, 30).double()
    noisy = states @ w + 3 * torch.randn(40, 1)
    train, val = replies(states, noisy), replies(held_out, held_out @ w)
    losses = []
    for alpha in aims.ALPHAS:
        own = ridge(states, noisy, alpha)
        losses.append(((held_out @ own.T - held_out @ w) ** 2).mean().item())
    chosen = best_ridge(train, val, 0)
    assert chosen == aims.ALPHAS[int(np.argmin(losses))] and chosen not in (aims.ALPHAS[0], aims.ALPHAS[-1])
    assert best_ridge(train, val, 0.3) == 0.3
    assert best_ridge(train, None, 0) == best_ridge(train, replies(states, noisy * NAN), 0) == 1


# -- weights

def planted(weights, scale, groups=600, K=3):
    """Scores (N, K) of pairs' replies, and pairs whose labels say how sure scale * weights . scores is."""
    torch.manual_seed(1)
    scores = torch.randn(2 * groups, K).double()
    rewards = scale * (weights * scores).sum(1)
    better = torch.arange(0, 2 * groups, 2)
    right = (rewards[better] - rewards[better + 1]).sigmoid()
    return scores, (better, better + 1, right, torch.full((groups,), 1 / groups).double())


def test_weights_that_were_planted_are_found_again_within_5_percent():
    weights = torch.tensor([0.6, 0.1, 0.3]).double()
    scores, pairs = planted(weights, 2.0)
    gate, scale = learn_weights(scores, torch.randn(1200, 4).double(), pairs, aims.Config(), False)
    found = gate(torch.randn(5, 4).double()).softmax(-1)
    np.testing.assert_allclose(found, weights.expand(5, 3), rtol=0.05)
    assert scale == pytest.approx(2.0, rel=0.05)


def test_a_gate_finds_the_weights_of_each_kind_of_prompt_whatever_the_size_of_its_states():
    kinds = torch.arange(600).repeat_interleave(2) % 2
    planted_for = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).double()
    scores, pairs = planted(planted_for[kinds], 3.0)
    prompts = torch.stack([0.001 * kinds, 100.0 - 40 * kinds, torch.zeros(1200)], 1).double()
    gate, scale = learn_weights(scores, prompts, pairs, aims.Config(gate_width=16, gate_lr=0.01), True)
    np.testing.assert_allclose(gate(prompts[:2]).softmax(-1)[0], planted_for[0], rtol=0.05)
    np.testing.assert_allclose(gate(prompts[2:4]).softmax(-1)[0], planted_for[1], rtol=0.05)
    assert scale == pytest.approx(3.0, rel=0.05) and gate[0].weight.dtype == torch.float64


@pytest.mark.parametrize("text, names, numbers", [
    ("equal", ["a", "b", "c"], [1, 1, 1]),
    ("b=0.5,a=-2", ["b", "a"], [0.5, -2]),
    ("a=1,c=0", ["a"], [1]),
    ("learned", ["a", "b", "c"], None),
    ("gate", ["a", "b", "c"], None),
])
def test_weights_are_words_or_named_numbers(text, names, numbers):
    found, weights = weights_given(text, ["a", "b", "c"])
    assert list(found) == names and (weights if numbers is None else weights.tolist()) == numbers


@pytest.mark.parametrize("text, said", [
    ("a", "'a' is not an aim, an equals sign and a number"),
    ("a=x", "'a=x' is not an aim"),
    ("a=nan", "'a=nan' is not an aim"),
    ("d=1", "no reply is rated by 'd', only by a, b"),
    ("a=0", "leaves no aim"),
    ("a=1,", "'' is not an aim"),
])
def test_weights_that_say_nothing_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        weights_given(text, ["a", "b"])


# -- length

def test_rank_correlation_equals_counting():
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.integers(0, 6, 30), rng.integers(0, 9, 30).astype(float)
        ranks = [np.array([(z < one).sum() + ((z == one).sum() - 1) / 2 for one in z]) for z in (x, y)]
        np.testing.assert_array_equal(midranks(x), ranks[0])
        assert spearman(x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman(np.ones(4), np.arange(4)) == 0 and spearman(np.arange(4), np.exp(np.arange(4))) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_taken_away_leaves_no_rank_correlation_with_length(sign):
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 2000).astype(float)
    quality = rng.normal(size=2000)
    predicted = (lengths - lengths.mean()) / lengths.std() + 0.1 * rng.normal(size=2000)
    rewards = quality + sign * 0.8 * predicted
    c = length_share(rewards, predicted, lengths)
    assert abs(spearman(rewards - c * predicted, lengths)) < 0.005 and c == pytest.approx(sign * 0.8, rel=0.1)
    assert np.corrcoef(rewards - c * predicted, quality)[0, 1] > 0.99


def test_where_length_is_the_same_or_cannot_be_told_nothing_is_taken_away():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=50)
    assert length_share(rewards, rng.normal(size=50), np.ones(50)) == 0
    assert length_share(rewards, np.zeros(50), rewards) == 0


# -- the whole fit

@pytest.mark.parametrize("weights", ["equal", "learned", "gate"])
def test_the_number_is_the_weighted_sum_of_the_aims_less_the_share_of_length(weights):
    torch.manual_seed(0)
    states, prompts = torch.randn(60, 5).double(), torch.randn(30, 5).double().repeat_interleave(2, 0)
    ratings = states @ torch.randn(5, 2).double() + 0.1 * torch.randn(60, 2)
    lengths = (20 + 5 * states[:, 0] + torch.rand(60)).round()
    better = torch.arange(0, 60, 2)
    pairs = better, better + 1, torch.ones(30).double(), torch.full((30,), 1 / 30).double()
    train = replies(states, ratings, prompts, lengths, pairs)
    given = torch.ones(2).double() if weights == "equal" else None
    flags = aims.Config(weights=weights, ridge=0.5, length="remove", fit_steps=50, gate_width=4, gate_lr=0.01)
    fitted, told = fit(flags, train, train, None, given)
    heads = ridge(states, ratings, 0.5)
    gate, scale = None, 1.0
    own = torch.ones(60, 2).double()
    if given is None:
        gate, scale = learn_weights(states @ heads.T, prompts, pairs, flags, weights == "gate")
        own = gate(prompts).softmax(-1)
    of_length = ridge(states, ((lengths - lengths.mean()) / lengths.std())[:, None], 0.5)
    expected = scale * (own * (states @ heads.T)).sum(1) - told["length_share"] * (states @ of_length.T)[:, 0]
    torch.testing.assert_close(fitted.rewards(train), expected)
    assert (fitted.width, len(fitted.heads)) == ((4, 2) if weights == "gate" else (0, 1))
    assert abs(spearman(fitted.rewards(train).numpy(), lengths.numpy())) < 0.01
    plain, of_plain = fit(dataclasses.replace(flags, length="keep"), train, train, None, given)
    torch.testing.assert_close(plain.rewards(train), told["before"].rewards(train))
    assert of_plain["length_share"] == 0
    assert abs(spearman(plain.rewards(train).numpy(), lengths.numpy())) > 0.02


def test_ratings_and_pairs_are_those_of_the_rows():
    def group(ranks, ratings, **more):
        row = Row([], ["x"] * len(ranks), ranks, ratings=ratings, **more)
        return Group(row, [Example([1], [True])] * len(ranks))

    groups = [group([0], [{"a": 3}]), group([1, 0, 1], [{"b": 1}, {}, {"a": 2, "b": 5}]), group([0, 0], []),
              group([0, 1], [], probability=0.8), group([0, 0], [], verdict="both_bad")]
    expected = [[3, NAN], [NAN, 1], [NAN, NAN], [2, 5], *[[NAN, NAN]] * 6]
    found = ratings_of(groups, ["a", "b"])
    torch.testing.assert_close(found, torch.tensor(expected).double(), equal_nan=True)
    better, worse, right, weight = comparisons_of(groups)
    assert better.tolist() == [2, 2, 6] and worse.tolist() == [1, 3, 7] and right.tolist() == [1, 1, 0.8]
    assert weight.tolist() == [0.25, 0.25, 0.5]
    mean, deviation = standard_of(ratings_of(groups, ["a", "b"]))
    assert mean.tolist() == [2.5, 3] and deviation.tolist() == [0.5, 2]
    assert standard_of(torch.tensor([[1.0], [1.0], [NAN]]))[1].tolist() == [1]
    assert len(spread(groups, 4)) == 2 and spread(groups, 100) == groups and spread([], 4) == []


# -- the model and its folder

def gated(name="gpt2", seed=0):
    torch.manual_seed(seed)
    return ScalarModel.from_trunk(tiny_of(GPT, name, seed), labels=3, gate=5).eval()


def batch_of(sizes):
    """ids (B, T), lengths (B,), mask (B, T) of rows (tokens of the prompt, of the reply)."""
    torch.manual_seed(2)
    rows = [torch.randint(0, 200, (a + b,)).tolist() for a, b in sizes]
    ids, lengths = pad_rows(rows, 0)
    mask, _ = pad_rows([[False] * a + [True] * b for a, b in sizes], False)
    return ids, lengths, mask


@pytest.mark.parametrize("name", ["gpt2", "llama3", "opt-350m"])
def test_a_gate_weighs_the_aims_by_the_prompts_last_token_one_row_at_a_time(name):
    model = gated(name)
    sizes = [(3, 4), (5, 1), (2, 9), (6, 0)]
    ids, lengths, mask = batch_of(sizes)
    with torch.no_grad():
        scores = last_scores(model, ids, lengths, mask)
        for (a, b), row, score in zip(sizes, ids, scores):
            states = model.transformer(row[None, :a + b])[0]
            weights = model.gate(states[a - 1]).softmax(-1)
            expected = sum(weights[j] * (model.score.weight[j] @ states[-1]) for j in range(3))
            torch.testing.assert_close(score, expected, atol=1e-5, rtol=0)


def test_positions_that_are_shared_are_read_once():
    index, (one, other) = read_at(torch.tensor([7, 3]), torch.tensor([3, 5]))
    assert index.tolist() == [3, 5, 7] and index[one].tolist() == [7, 3] and index[other].tolist() == [3, 5]


def test_every_score_of_a_gated_model_is_lower_by_the_amount_and_the_gate_weighs_as_before():
    model = gated()
    ids, lengths, mask = batch_of([(3, 4), (5, 2)])
    with torch.no_grad():
        before = last_scores(model, ids, lengths, mask)
        model.load_state_dict(shifted(model.state_dict(), 1.5))
        after = last_scores(model, ids, lengths, mask)
    torch.testing.assert_close(after, before - 1.5, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "opt"])
def test_transformers_opens_a_gated_folder_as_a_classifier_of_the_aims(name, peers, tmp_path):
    model = gated(name)
    save_model(tmp_path, model, TOKENIZER, aims=["kind", "true", "short"], gate=5)
    again, _ = load_model(tmp_path, ScalarModel)
    assert tools.same_tensors(again.state_dict(), model.state_dict())
    peer, info = peers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == {"gate"} and not info["missing_keys"]
    assert peer.config.id2label == {0: "kind", 1: "true", 2: "short"}
    with torch.no_grad():
        theirs = peer.eval()(IDS, attention_mask=ATTENTION).logits
    model.gate = None
    torch.testing.assert_close(outputs(model), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("notes, said", [
    ({"aims": "kind", "gate": 5}, "aims is not a list of names"),
    ({"aims": ["kind", ""], "gate": 5}, "aims is not a list of names"),
    ({"aims": ["kind", "true", "short"]}, "gate is not its width"),
    ({"aims": ["kind", "true", "short"], "gate": True}, "gate is not its width"),
    ({"aims": ["kind", "true"], "gate": 5}, "score.weight has shape"),
    ({"aims": ["kind", "true", "short"], "gate": 6}, "gate.0.weight has shape"),
    ({}, "score.weight has shape"),
])
def test_a_damaged_note_of_a_gate_is_one_line(notes, said, tmp_path):
    save_model(tmp_path, gated(), TOKENIZER, aims=["kind", "true", "short"], gate=5)
    file = tmp_path / "config.json"
    header = json.loads(file.read_text())
    header["barerlhf"] = {"bias": True} | notes
    file.write_text(json.dumps(header))
    with pytest.raises(UserError, match=said):
        load_model(tmp_path, ScalarModel)


def test_a_gated_model_is_no_language_model_and_no_process_reward_model(tmp_path):
    save_model(tmp_path, gated(), TOKENIZER, aims=["kind", "true", "short"], gate=5)
    for kind, labels, wanted in ((GPT, 1, "a language model"), (ScalarModel, 3, "a process reward model")):
        with pytest.raises(UserError, match=f"holds a reward model, but {wanted} is needed here"):
            load_model(tmp_path, kind, labels=labels)


# -- whole runs

@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a policy of one layer, and rated rankings of the embedded task."""
    root = tmp_path_factory.mktemp("aims")
    with tools.signal_handlers_kept():
        run_here("sft", f"{tools.TINY_RUN} --data {TOY}/demonstrations.jsonl --val-fraction 0 --steps 20 "
                 f"--batch-tokens 1000 --lr 0.01 --warmup 5 --out {root}/sft")
        world = toy.World(0)
        for split, groups in (("train", 60), ("heldout", 30)):
            (root / f"{split}.jsonl").write_text(toy.lines(world.preferences(split, groups, aims=True)))
    return root


FLAGS = ("--model {root}/sft --data {root}/train.jsonl --val-data {root}/heldout.jsonl --batch-tokens 1000 "
         "--eval-every 2 --fit-steps 20 --gate-width 4 --threads 1 --warmup 1")


def scores_of(folder, rows):
    """A folder's scores of the replies of some rows, one at a time."""
    model, tokenizer = load_model(folder, ScalarModel)
    scores = []
    for row in rows:
        for example in encode_group(tokenizer, row):
            ids, mask = torch.tensor([example.ids]), torch.tensor([example.mask])
            with torch.no_grad():
                scores.append(last_scores(model, ids, torch.tensor([len(example.ids)]), mask).item())
    return torch.tensor(scores)


@pytest.mark.parametrize("flags", ["", "--weights gate --length remove --gate-lr 0.1", "--weights learned",
                                   "--weights honest=1,helpful=0.5 --steps 0"])
def test_the_folders_score_is_what_was_fitted_and_its_demonstrations_are_zero(
        flags, task, tmp_path, monkeypatch):
    calls = tools.recorded(monkeypatch, aims, "fit", "look_at")
    run_here("aims", FLAGS.format(root=task), f"--steps 3 {flags} --out {tmp_path}/run")
    fitted, _ = calls["fit"][-1][1]
    rows = read_rows(task / "heldout.jsonl", "feedback", SILENT)
    looks = reversed(calls["look_at"])
    args, held_out = next(call for call in looks if len(call[1].ratings) == 4 * len(rows))
    example = args[-1][0].examples[0]
    with torch.no_grad():
        states = args[1].eval().transformer(torch.tensor([example.ids]))[0]  # (T, C)
    begins = example.mask.index(True)
    torch.testing.assert_close(held_out.prompts[0].float(), states[begins - 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(held_out.states[0].float(), states[-1], atol=1e-5, rtol=0)
    scores = scores_of(tmp_path / "run", rows)
    expected = fitted.rewards(held_out)
    difference = scores - expected
    assert difference.std() < 1e-4 * expected.std()
    trained = read_rows(task / "train.jsonl", "feedback", SILENT)
    if "--steps 0" not in flags:
        trained = [row for row in trained if unit_hash(row.text, "fit") >= 0.25]
    best = [Row(row.prompt, [row.replies[int(np.argmin(row.ranks))]], [0]) for row in trained]
    assert scores_of(tmp_path / "run", best).mean().item() == pytest.approx(0, abs=1e-3 * scores.std().item())
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["length_spearman"] == pytest.approx(spearman(expected.numpy(), held_out.lengths.numpy()))
    assert set(found["aims"]) == set(weights_given(flags.split()[1] if "=" in flags else "gate",
                                                   sorted(toy.AIMS))[0])
    header = json.loads((tmp_path / "run" / "config.json").read_text())
    assert header.get("barerlhf", {}).get("aims") == (sorted(toy.AIMS) if "gate" in flags else None)
    assert (tmp_path / "run" / "evaluation.png").exists()


def test_an_aim_of_weight_zero_changes_nothing(task, tmp_path):
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    for row in rows:
        for known in row["ratings"]:
            known["harmless"] = -7.0
    write_rows(tmp_path / "other.jsonl", rows)
    for name, data in (("one", task / "train.jsonl"), ("two", tmp_path / "other.jsonl")):
        run_here("aims", FLAGS.format(root=task), f"--data {data} --weights honest=1,helpful=2,harmless=0",
                 f"--steps 2 --out {tmp_path}/{name}")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert tools.same_tensors(one, two)


def test_the_first_step_starts_from_the_closed_form_however_it_is_cut_and_on_two_ranks(task, tmp_path):
    """Losses of two steps, by passes of one row or all, on one rank or two, in shards: within 1e-5."""
    words = FLAGS.format(root=task) + " --steps 2 --lr 0.003 --weights gate --ridge 2"
    for name, budget in (("one", 100_000), ("many", 30)):
        run_here("aims", words, f"--micro-batch-tokens {budget} --out {tmp_path}/{name}")
    for name, how in (("two", ""), ("shards", "--parallel fsdp")):
        flags = f"--micro-batch-tokens 60 {how} --out {tmp_path}/{name}"
        done = command("aims", words, flags, launcher=TORCHRUN)
        assert done.returncode == 0, done.stderr[-2000:]
    one, *others = (tools.metrics(tmp_path / name) for name in ("one", "many", "two", "shards"))
    for other in others:
        for row, expected in zip(other, one, strict=True):
            assert row == pytest.approx(expected, rel=2e-5, abs=1e-6)
    # By the formula, one reply at a time: the heads of frozen states.
    trunk, tokenizer = load_model(task / "sft", GPT)
    states, marks = [], []
    for file in ("train", "heldout"):
        rows = read_rows(task / f"{file}.jsonl", "feedback", SILENT)
        examples = [example for row in rows for example in encode_group(tokenizer, row)]
        with torch.no_grad():
            found = [trunk.transformer(torch.tensor([example.ids]))[0, -1] for example in examples]
        states.append(torch.stack(found).double())
        marks.append(torch.tensor([[known.get(aim, NAN) for aim in sorted(toy.AIMS)]
                                   for row in rows for known in row.ratings]).double())
    mean, deviation = standard_of(marks[0])
    # The rows that the trunk is not trained on.
    rows = read_rows(task / "train.jsonl", "feedback", SILENT)
    kept = torch.tensor([unit_hash(row.text, "fit") < 0.25 for row in rows]).repeat_interleave(4)
    assert 20 < kept.sum() < 120
    heads = ridge(states[0][kept], ((marks[0] - mean) / deviation)[kept], 2.0)
    missed = (states[1] @ heads.T - (marks[1] - mean) / deviation).square()
    assert one[0]["val_loss"] == pytest.approx(missed.nanmean().item(), rel=1e-4)


def test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit(task, tmp_path):
    words = FLAGS.format(root=task) + " --steps 4 --weights gate --length remove"
    run_here("aims", words, f"--out {tmp_path}/whole")
    with stopped_in_the_second_step():
        run_here("aims", words, f"--out {tmp_path}/parts")
    run_here("aims", words, f"--out {tmp_path}/parts --resume")
    for file in ("model.safetensors", "config.json", "evaluation.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert tools.same(tmp_path / "parts", tmp_path / "whole")


def test_adapters_and_bfloat16_train_and_the_folder_is_whole(task, tmp_path):
    words = FLAGS.format(root=task) + " --steps 2 --lr 0.003 --weights gate"
    for name, own in (("lora", "--lora-rank 2"), ("half", "--dtype bfloat16")):
        run_here("aims", words, own, f"--out {tmp_path}/{name}")
        weights = load_file(tmp_path / name / "model.safetensors")
        assert weights["score.weight"].shape == (3, 32) and not any("lora" in key for key in weights)
        assert weights["gate.0.weight"].shape == (4, 32)


def test_weights_are_learned_from_a_file_of_preferences_where_the_rated_rows_compare_nothing(task, tmp_path):
    singles = []
    for row in map(json.loads, (task / "train.jsonl").read_text().splitlines()):
        for reply, known in zip(row["completions"], row["ratings"]):
            if known:
                prompt = f"{row['prompt']} {len(singles)}"
                singles.append({"prompt": prompt, "completion": reply, "ratings": known})
    write_rows(tmp_path / "singles.jsonl", singles)
    words = FLAGS.format(root=task).replace("--val-data {root}/heldout.jsonl".format(root=task), "")
    words += f" --data {tmp_path}/singles.jsonl --steps 1 --weights learned"
    run_here("aims", words, f"--preferences {TOY}/preferences.jsonl --out {tmp_path}/run")
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert sum(one["weight"] for one in found["aims"].values()) == pytest.approx(1, abs=1e-5)
    assert 0 < found["accuracy"] < 1 and found["aims"]["honest"]["ratings"] > 0
    assert exit_code("aims", words, f"--out {tmp_path}/none") == 2


@pytest.mark.parametrize("flags, said", [
    ("--weights nice=1", "no reply is rated by 'nice', only by harmless, helpful, honest"),
    ("--lora-rank 2 --lora-save adapter", "has no place for a gate"),
    ("--data {toy}/preferences.jsonl", "holds no usable row"),
    ("--weights learned --data {root}/unranked.jsonl", "learns from preferences, and --data ranks no"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(flags, said, task, tmp_path, capsys):
    rows = [{"prompt": f"{i}?", "completion": "x", "ratings": {"a": i}} for i in range(9)]
    write_rows(task / "unranked.jsonl", rows)
    words = FLAGS.format(root=task) + " " + flags.format(root=task, toy=TOY)
    assert exit_code("aims", words, f"--steps 1 --out {tmp_path}/run") == 2
    shown = capsys.readouterr()
    assert said in shown.err + shown.out and "Traceback" not in shown.err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_gated_reward_model_judges_a_rollout_as_one_reply_at_a_time(task, tmp_path):
    run_here("aims", FLAGS.format(root=task), f"--steps 1 --weights gate --out {tmp_path}/run")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in toy.World(0).texts["heldout"][:8]])
    run_here("best_of_n", f"--model {task}/sft --data {tmp_path}/prompts.jsonl --reward {tmp_path}/run --n 2 "
             f"--max-new-tokens 8 --threads 1 --out {tmp_path}/best")
    rows = [json.loads(line) for line in (tmp_path / "best" / "rankings.jsonl").read_text().splitlines()]
    expected = scores_of(tmp_path / "run", [Row(user(row["prompt"]), row["completions"]) for row in rows])
    found = torch.tensor([score for row in rows for score in row["scores"]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# -- the embedded task

def test_a_hurried_reader_leaves_out_a_third_of_the_marks_and_draws_a_share_of_the_others():
    item = next(item for item in toy.ITEMS if item.family == "capital")
    reply = f"{item.accepted[0]} You fool."
    truth = dict(zip(toy.AIMS, toy.judge(item, reply)))
    rng = np.random.default_rng(0)
    marks = [toy.rated(item, reply, 0.1, rng) for _ in range(2000)]
    known = [(aim, mark) for one in marks for aim, mark in one.items()]
    assert len(known) / 6000 == pytest.approx(2 / 3, abs=0.02)
    wrong = np.mean([mark != truth[aim] for aim, mark in known])
    assert wrong == pytest.approx(0.2 * 3 / 4, abs=0.02)
    assert all(one == {aim: truth[aim] for aim in one}
               for one in (toy.rated(item, reply, 0, rng) for _ in range(20)))


def test_rankings_with_marks_are_those_without_and_marks_beside_them():
    world = toy.World(3)
    plain, marked = (world.preferences("train", 20, aims=aims) for aims in (False, True))
    assert [(row.replies, row.ranks) for row in plain] == [(row.replies, row.ranks) for row in marked]
    assert not any(row.ratings for row in plain) and all(len(row.ratings) == 4 for row in marked)
