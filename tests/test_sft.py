"""sft.py: what its held-out loss is a mean of, what a model's folder says of the conversations it was trained
on, and where learning from quality ends, by enumeration."""
import contextlib
import copy
import io
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import model
import sft
from bench.optimum import write_reference
from data import Example, encode_group, encode_prompt
from formats.model_folder import load_model
from formats.rows import Row
from formats.sources import read_rows
from generate import sample_token
from plumbing import run as runtime
from plumbing.flags import UserError
from tools import (
    ALL_AT_ONCE, TORCHRUN, command, exit_code, metrics, reply_logprob, rows_of, run_here, same_tensors,
    stopped_in_the_second_step, write_rows)


def test_the_held_out_loss_is_a_mean_over_reply_tokens(small):
    network, tokenizer = load_model(small / "sft", model.GPT)
    examples = [
        encode_group(tokenizer, row)[0]
        for row in read_rows(small / "demonstrations.json", "demonstrations", str)
    ]
    run = object.__new__(runtime.Run)
    run.rank = 0
    run.world_size = 1
    run.device = torch.device("cpu")
    run.dtype = torch.float32
    run.step = 0
    run.clean = False
    with torch.no_grad():
        expected = -sum(
            reply_logprob(network.eval(), torch.tensor(ids), torch.tensor(mask))
            for ids, mask in examples) / sum(sum(mask) for _, mask in examples)
    for budget in (80, 100_000):
        loss = sft.validation_loss(run, network, examples, SimpleNamespace(micro_batch_tokens=budget),
                                   tokenizer.pad)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sft_notes_conversations_and_leaves_open_what_models_of_others_have_seen(small, talk, tmp_path):
    texts = zip(["user", "assistant"] * 2, ("Hi.", "Yes?", "Say apple.", "Apple."))
    turns = [{"role": role, "content": text} for role, text in texts]
    (tmp_path / "talks.json").write_text(json.dumps([{"messages": turns}] * 4))
    folder = shutil.copytree(small / "sft", tmp_path / "foreign")
    header = json.loads((folder / "config.json").read_text())
    assert header["barerlhf"].pop("single_turn") is True
    (folder / "config.json").write_text(json.dumps(header))
    single, several = small / "demonstrations.json", tmp_path / "talks.json"
    starts = {"more": (small / "sft", single), "talks": (small / "sft", several), "others": (folder, single)}
    noted = {}
    for name, (start, data) in starts.items():
        run_here("sft", f"{ALL_AT_ONCE} --model {start} --data {data} --steps 1 --out {tmp_path}/{name}")
        noted[name] = json.loads((tmp_path / name / "config.json").read_text())["barerlhf"].get("single_turn")
    assert noted == {"more": True, "talks": False, "others": None}
    assert talk(f"--model {tmp_path}/talks") == talk(f"--model {tmp_path}/others") == [1, 3, 5]


# -- learning from quality, by enumeration: ref says ten replies with known probabilities, in fifths

# Of each reply: how often it stands among 100, and its score.
POOL = {
    "a": (15, 5.0), "bc": (5, 4.8),
    "b": (10, 3.2), "ab": (10, 3.1),
    "c": (20, 2.0),
    "ba": (5, 1.5), "aa": (5, 1.4), "cb": (10, 1.3),
    "cc": (12, 0.2), "ac": (8, -0.1),
}
FIFTHS = (("a", "bc"), ("b", "ab"), ("c",), ("ba", "aa", "cb"), ("cc", "ac"))
CHANCES = torch.tensor([count / 100 for count, _ in POOL.values()], dtype=torch.float64)
SCORES = torch.tensor([score for _, score in POOL.values()], dtype=torch.float64)
WHOLE = "--threads 1 --val-fraction 0 --batch-tokens 100000 --warmup 5 --log-every 1000 --weight-decay 0"


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A folder with ref, a model that says each reply of POOL as often as it stands there, and with the pool
    as rated replies, as a ranking with scores and as demonstrations."""
    folder = tmp_path_factory.mktemp("pool")
    write_reference(folder / "random", 5)
    said = [text for text, (count, _) in POOL.items() for _ in range(count)]
    scores = [POOL[text][1] for text in said]
    write_rows(folder / "demonstrations.jsonl", [{"instruction": "a", "output": text} for text in said])
    write_rows(folder / "rated.jsonl", [
        {"prompt": "a", "completion": text, "score": score} for text, score in zip(said, scores)])
    places = [sum(other > score for other in scores) for score in scores]
    write_rows(folder / "ranked.jsonl",
               [{"prompt": "a", "completions": said, "ranks": places, "scores": scores}])
    train(f"--model {folder}/random --data {folder}/demonstrations.jsonl --steps 200 --lr 0.01",
          folder / "ref")
    off = enumerated(load_model(folder / "ref", model.GPT)).exp() - CHANCES
    assert off.abs().sum() < 0.01
    return folder


def train(flags, out):
    with contextlib.redirect_stdout(io.StringIO()):
        run_here("sft", f"{WHOLE} {flags} --out {out}")
    return load_model(out, model.GPT)


def enumerated(opened, label=()):
    """log pi(y|x) of the replies of POOL (10,), behind a label, a list of ids."""
    network, tokenizer = opened
    network = copy.deepcopy(network).double().eval()
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "a"}])
    result = []
    for text in POOL:
        reply = tokenizer.encode(text) + [tokenizer.eos]
        ids = torch.tensor([[*prompt, *label, *reply]])
        with torch.no_grad():
            logprobs = network.logits(network.transformer(ids)).log_softmax(-1)[0, -len(reply) - 1:-1]
        result.append(logprobs[torch.arange(len(reply)), torch.tensor(reply)].sum())
    return torch.stack(result)


def part_of(logprobs, texts):
    """The probability that a policy gives to some of POOL's replies."""
    return sum(p for text, p in zip(POOL, logprobs.exp().tolist()) if text in texts)


def kl_of(logprobs, ref_logprobs):
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum().item()


@pytest.mark.parametrize("kind", ["tokens", "words --words caa cab cac cba"])
def test_the_best_of_five_quantiles_is_the_reference_restricted_to_its_best_fifth(
        kind, pool, tmp_path, monkeypatch):
    """KL log 5, mean reward that of the best fifth; and each other quantile's label stands for its own."""
    trained = []
    right = sft.save_model

    def save(folder, network, *rest, **notes):
        trained.append(copy.deepcopy(network))
        right(folder, network, *rest, **notes)

    monkeypatch.setattr(sft, "save_model", save)
    policy = train(f"--model {pool}/ref --data {pool}/rated.jsonl --quality {kind} --kl-coef 0 --steps 300 "
                   "--lr 0.01", tmp_path / "run")
    ref = load_model(pool / "ref", model.GPT)
    best = enumerated(policy)
    assert kl_of(best, enumerated(ref)) == pytest.approx(math.log(5), rel=0.02)
    restricted = CHANCES * torch.tensor([text in FIFTHS[0] for text in POOL])
    assert (best.exp() - restricted / restricted.sum()).abs().sum() < 0.02
    reward = (best.exp() @ SCORES).item()
    assert reward == pytest.approx((restricted @ SCORES / restricted.sum()).item(), rel=0.02)
    assert reward > 2 * (CHANCES @ SCORES).item()

    tokenizer = policy[1]
    if kind == "tokens":
        labels = [[], *([tokenizer.n_vocab + k] for k in range(4))]
    else:
        labels = [[], *map(tokenizer.encode, ("caa", "cab", "cac", "cba"))]
    for label, fifth in zip(labels, FIFTHS):
        # Words that are much alike are slow to be told apart by a model of one layer.
        bound = 0.97 if kind == "tokens" else 0.5
        assert part_of(enumerated((trained[-1], tokenizer), label), fifth) > bound


def test_the_tie_to_the_reference_mixes_it_in_at_each_token(pool, tmp_path):
    """pi = (p + a ref) / (1 + a) where p has been, p being ref restricted; here of the first token."""
    a = 0.5
    opened = train(f"--model {pool}/ref --data {pool}/rated.jsonl --quality tokens --kl-coef {a} --steps 300 "
                   "--lr 0.01", tmp_path / "run")
    ref = load_model(pool / "ref", model.GPT)
    first = []
    for network, tokenizer in (opened, ref):
        ids = torch.tensor([encode_prompt(tokenizer, [{"role": "user", "content": "a"}])])
        with torch.no_grad():
            first.append(network.eval().logits(network.transformer(ids))[0, -1].softmax(-1))
    restricted = torch.zeros(len(first[0]))
    for text, chance in (("a", 0.75), ("b", 0.25)):
        restricted[tokenizer.encode(text)[0]] = chance
    expected = (restricted + a * first[1]) / (1 + a)
    assert (first[0] - expected).abs().sum() < 0.01
    assert (first[0] - restricted).abs().sum() > 0.2


@pytest.mark.parametrize("file", ["rated", "ranked"])
def test_weighted_replies_lead_to_the_optimum_of_rlhf(file, pool, tmp_path):
    """pi* = ref exp(r / b) / Z."""
    b = 1.5
    policy = train(f"--model {pool}/ref --data {pool}/{file}.jsonl --quality weights --weight-beta {b} "
                   "--steps 200 --lr 0.01", tmp_path / "run")
    best = CHANCES * (SCORES / b).exp()
    best /= best.sum()
    logprobs = enumerated(policy)
    assert (logprobs.exp() - best).abs().sum() < 0.02
    assert kl_of(logprobs, enumerated(load_model(pool / "ref", model.GPT))) == pytest.approx(
        (best * (best / CHANCES).log()).sum().item(), rel=0.02)


# -- its parts

@pytest.mark.parametrize("ranks, K, expected", [
    ([3, 1, 2, 0], 4, [3, 1, 2, 0]),
    (range(10), 5, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
    # Fewer replies than quantiles: each has one of its own, and the best has the first.
    ([0.5, -2.0], 5, [2, 0]),
    ([7], 5, [0]),
    # A tie across a border stays together, on the side of its middle.
    ([0, 1, 1, 1, 2, 3], 2, [0, 0, 0, 0, 1, 1]),
    ([0, 1, 2, 2, 2, 3], 2, [0, 0, 1, 1, 1, 1]),
    # Two ranks, as of pairs: whatever K, the better ones are the best quantile.
    ([0, 1] * 10, 5, [0, 2] * 10),
    ([1] * 9 + [0], 3, [1] * 9 + [0]),
    ([0] * 9 + [1], 3, [0] * 9 + [1]),
    ([5, 5, 5], 3, [0, 0, 0]),
])
def test_quantiles_of_scores_with_ties_and_with_few_replies(ranks, K, expected):
    assert sft.quantiles_of(list(ranks), K).tolist() == expected


def test_weights_have_mean_one_and_the_ratios_of_the_exponentials():
    weights = sft.weights_of([-1.0, 0.5, 2.0], 0.5)
    assert weights.mean().item() == pytest.approx(1)
    assert (weights[0] / weights[1]).item() == pytest.approx(math.exp(1.5 / 0.5))
    assert sft.weights_of([-1e6, 0.0], 1.0).tolist() == [2, 0]
    assert sft.weights_of([3.0] * 4, 1.0).tolist() == [1] * 4


def test_the_divergence_from_the_reference_and_its_gradient_are_those_of_its_definition(monkeypatch):
    torch.manual_seed(0)
    states, head = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    ref_states, ref_head = torch.randn(5, 6), torch.randn(11, 6)
    log_p = (states.double() @ head.double().T).log_softmax(-1)
    log_ref = (ref_states.double() @ ref_head.double().T).log_softmax(-1)
    expected = (log_ref.exp() * (log_ref - log_p)).sum()
    gradients = torch.autograd.grad(expected, (states, head))
    for rows in (2, 5):
        monkeypatch.setattr(sft, "rows_of_chunks", lambda N, V: rows)
        kl = sft.kl_from_reference(states, head, ref_states, ref_head)
        assert kl.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, other in zip(torch.autograd.grad(kl, (states, head)), gradients):
            torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["tokens", "words"])
def test_a_step_is_that_of_the_formula_and_labels_are_not_learned_but_stand_before_the_reply(
        kind, small, tmp_path, monkeypatch):
    """The first step's loss, one reply at a time: log pi behind the label, KL from ref without it."""
    seen = []
    right = sft.encode_scored

    def encode(*args):
        seen.append(right(*args))
        return seen[-1]

    monkeypatch.setattr(sft, "encode_scored", encode)
    words = "--words Bad: Worse:" if kind == "words" else "--quantiles 3"
    run_here("sft", f"{ALL_AT_ONCE} --model {small}/other --reference {small}/sft --kl-coef 0.3 --steps 1",
             f"--data {small}/rankings.json --quality {kind} {words} --micro-batch-tokens 80",
             f"--out {tmp_path}/run")
    network, tokenizer = load_model(small / "other", model.GPT)
    reference, _ = load_model(small / "sft", model.GPT)
    if kind == "tokens":
        network.transformer.wte = sft.QualityTokens(network.transformer.wte, 2)
    rows = read_rows(small / "rankings.json", "scored", str)
    quantiles = iter(sft.quantiles_of([rank for row in rows for rank in row.ranks], 3))
    size = len(network.head_weight)
    labels = {
        "tokens": [[], [size], [size + 1]],
        "words": [[], tokenizer.encode("Bad:"), tokenizer.encode("Worse:")],
    }[kind]
    train, plain, weights = seen[0]
    assert weights is None
    examples, objective, total_kl, tokens = [], 0.0, 0.0, 0
    for row in rows:
        prompt = encode_prompt(tokenizer, row.prompt)
        for reply in row.replies:
            label = labels[next(quantiles)]
            said = tokenizer.encode(reply) + [tokenizer.eos]
            examples.append(prompt + label + said)
            log_p = behind(network, prompt + label, said)
            log_ref = behind(reference, prompt, said)
            objective += log_p[torch.arange(len(said)), said].sum()
            total_kl += (log_ref.exp() * (log_ref - log_p)).sum()
            tokens += len(said)
    assert [example.ids for example in train] == examples
    assert [sum(example.mask) for example in train] == [sum(example.mask) for example in plain]
    row, = rows_of(tmp_path / "run")
    assert row["kl"] == pytest.approx((total_kl / tokens).item(), rel=1e-4) and row["kl"] > 0.001
    expected = (-(objective - 0.3 * total_kl) / tokens).item()
    assert row["loss"] == pytest.approx(expected, rel=1e-4)


def behind(network, ids, said):
    """Log-probabilities (len(said), V) of what comes at each place of said, behind ids."""
    with torch.no_grad():
        states = network.eval().transformer(torch.tensor([[*ids, *said]]))
        return network.logits(states)[0, len(ids) - 1:-1].log_softmax(-1)


def test_a_label_stands_before_the_last_reply_of_a_conversation():
    example = sft.with_label(Example([1, 2, 3, 4, 5], [False, False, False, True, True]), [8, 9])
    assert example == ([1, 2, 3, 8, 9, 4, 5], [False] * 5 + [True] * 2)


def test_the_quantiles_are_those_of_the_pool_and_not_of_each_prompt(small):
    _, tokenizer = load_model(small / "sft", model.GPT)
    rows = [Row([{"role": "user", "content": text}], ["a", "b"], ranks)
            for text, ranks in (("Hard.", [-1.0, -2.0]), ("Easy.", [-5.0, -4.0]))]
    config = SimpleNamespace(quality="tokens")
    train, plain, _ = sft.encode_scored(config, tokenizer, rows, [[], [7]], 50, str)
    assert [7 in example.ids for example in train] == [True, True, False, False]
    assert train[2:] == plain[2:] == encode_group(tokenizer, rows[1])


def test_what_is_saved_has_the_tokenizer_and_the_shape_of_what_it_was_made_from(small, tmp_path):
    run_here("sft", f"{ALL_AT_ONCE} --model {small}/sft --data {small}/rankings.json --quality tokens",
             f"--steps 2 --out {tmp_path}/run")
    before, after = ((small / "sft"), tmp_path / "run")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (before / name).read_text() == (after / name).read_text()
    one, other = (load_model(folder, model.GPT)[0].state_dict() for folder in (before, after))
    assert {name: w.shape for name, w in one.items()} == {name: w.shape for name, w in other.items()}
    run_here("evaluate", f"--models {small}/sft {after} --reward {small}/reward --data {small}/prompts.json",
             f"--max-new-tokens 4 --threads 1 --out {tmp_path}/evaluation.json")
    result = json.loads((tmp_path / "evaluation.json").read_text())["results"][str(after)]
    assert result["kl"] != 0


def test_adapters_learn_from_quality_tokens_too(small, tmp_path):
    run_here("sft", f"{ALL_AT_ONCE} --model {small}/sft --data {small}/rankings.json --quality tokens",
             f"--lora-rank 4 --lora-save adapter --steps 2 --out {tmp_path}/run")
    load_model(tmp_path / "run", model.GPT)


LEARNING = "--quality tokens --quantiles 3 --kl-coef 0.3 --batch-tokens 150 --lr 0.01 --threads 1 --warmup 1"


def test_learning_from_quality_resumes_bit_for_bit_and_two_ranks_do_as_one(small, tmp_path):
    words = (f"{LEARNING} --model {small}/sft --data {small}/rankings.json --val-fraction 0.3 "
             "--eval-every 2")
    run_here("sft", f"{words} --steps 4 --save-every 2 --out {tmp_path}/one")
    with stopped_in_the_second_step():
        run_here("sft", f"{words} --steps 4 --save-every 2 --out {tmp_path}/again")
    run_here("sft", f"{words} --steps 4 --save-every 2 --out {tmp_path}/again --resume")
    assert metrics(tmp_path / "again") == metrics(tmp_path / "one")
    assert same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("one", "again")))
    two = command("sft", f"{words} --steps 4 --micro-batch-tokens 60 --out {tmp_path}/two", launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


# -- what it reads and what it refuses

def test_scored_rows_are_rankings_ratings_labels_and_pairs_with_scores_before_ranks(tmp_path):
    ranked = {"prompt": "Hi", "completions": ["a", "b"], "ranks": [0, 1]}
    rows = [
        ranked,
        ranked | {"gold": [0.5, 0.25]},
        ranked | {"gold": [0.5, 0.25], "scores": [3, -1.5]},
        ranked | {"ranks": [0, 0]},
        {"prompt": "Hi", "chosen": "a", "rejected": "b"},
        {"prompt": "Hi", "completion": "a", "rating": 4},
        {"prompt": "Hi", "completion": "a", "label": False},
    ]
    found = read_rows(write_rows(tmp_path / "rows.jsonl", rows), "scored", str)
    assert [row.ranks for row in found] == [[0, 1], [-0.5, -0.25], [-3, 1.5], [0, 0], [0, 1], [-4], [1]]
    for bad in ({"scores": [1]}, {"scores": ["a", "b"]}, {"scores": 1}, {"scores": [1, True]}):
        with pytest.raises(UserError):
            read_rows(write_rows(tmp_path / "bad.jsonl", [ranked | bad]), "scored", str)


@pytest.mark.parametrize("flags, reason", [
    ("--quantiles 4", "--quantiles is for --quality tokens, not best"),
    ("--quality words --quantiles 4", "--quantiles is for --quality tokens, not words"),
    ("--quality tokens --words Bad", "--words is for --quality words, not tokens"),
    ("--quality tokens --weight-beta 2", "--weight-beta is for --quality weights, not tokens"),
    ("--quality weights --kl-coef 0", "--kl-coef is for --quality tokens and words, not weights"),
    ("--reference {small}/sft", "--reference is for --quality tokens and words, not best"),
    ("--quality words --words ' '", "--words: one of them is blank"),
    ("--quality tokens --quantiles 1", "--quantiles"),
    ("--quality tokens --model scratch", "--model scratch is no reference"),
    ("--quality tokens --data {small}/demonstrations.json", "doesn't hold a prompt with replies of differ"),
    ("--quality tokens --data {tmp}/one.jsonl", "all 1 replies have the same score"),
    ("--quality weights --data {tmp}/same.jsonl", "all 2 replies have the same score"),
    ("--quality words --data {tmp}/none.jsonl", "none.jsonl"),
])
def test_what_does_not_go_together_is_said_in_a_line(flags, reason, small, tmp_path, capsys):
    one = {"prompt": "Hi", "completion": "a", "rating": 4}
    write_rows(tmp_path / "one.jsonl", [one])
    write_rows(tmp_path / "same.jsonl", [one, one | {"completion": "b"}])
    (tmp_path / "none.jsonl").write_text("")
    flags = flags.format(small=small, tmp=tmp_path)
    code = exit_code("sft", f"{ALL_AT_ONCE} --model {small}/sft --data {small}/rankings.json --steps 1",
                     f"{flags} --out {tmp_path}/run")
    said = capsys.readouterr().err.strip()
    assert code == 2 and reason in said and "\n" not in said.removeprefix("error: ")


# -- judges, and the checkpoint that they choose

MINE = """
import json

def size(replies):
    return [float(len(reply)) for reply in replies]

# What the trial is told, then each validation: the second step's replies are the best.
SAID = [0.0, 0.1, 0.3, 0.9, 0.5, 0.2]
calls = []

def scripted(replies):
    calls.append(1)
    return [SAID[len(calls) - 1]] * len(replies)

def reverse(replies):
    return [-SAID[len(calls) - 1]] * len(replies)

def known(replies, answers):
    return [float(answer in reply) for reply, answer in zip(replies, answers)]

def broken(replies):
    return 1 / 0

def nan(replies):
    return [float("nan")] * len(replies)

def val_loss(replies):
    return [0.0] * len(replies)
"""
ASKED = ("Stone?", "Say pencil.", "Say river, please.", "Say apple.", "A garden?", "Window.", "Say hello.")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with functions of a user, and with held-out rows: seven prompts, one of them twice."""
    (tmp_path / "mine.py").write_text(MINE)
    prompts = [*ASKED[:2], ASKED[0], *ASKED[2:]]
    write_rows(tmp_path / "held_out.jsonl",
               [{"prompt": prompt, "completion": "It is good."} for prompt in prompts])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judging(small, mine, flags="", data="demonstrations"):
    """Flags of a run with judges, but for its --out."""
    return (f"--model {small}/other --data {small}/{data}.json --val-data {mine}/held_out.jsonl --threads 1 "
            f"--batch-tokens 200 --lr 0.01 --warmup 1 --max-new-tokens 9 --eval-every 1 {flags}")


def pointer(folder):
    return json.loads((folder / "checkpoints" / "latest.json").read_text())


def test_the_best_checkpoint_is_that_of_the_first_judge_and_not_of_the_validation_loss(small, mine):
    words = judging(small, mine, "--steps 4 --save-every 1 --judge mine:scripted mine:reverse")
    run_here("sft", f"{words} --out {mine}/run")
    rows = [row for row in rows_of(mine / "run") if "val_loss" in row]
    # The first call was the trial.
    assert [row["scripted"] for row in rows] == pytest.approx([0.1, 0.3, 0.9, 0.5, 0.2])
    assert [row["reverse"] for row in rows] == pytest.approx([-0.1, -0.3, -0.9, -0.5, -0.2])
    saved = rows[1:]
    liked = max(saved, key=lambda row: row["scripted"])
    assert pointer(mine / "run")["best"] == f"step_{liked['step']:06d}" == "step_000002"
    assert pointer(mine / "run")["best_value"] == pytest.approx(0.9)
    assert min(saved, key=lambda row: row["val_loss"])["step"] != liked["step"]
    assert (mine / "run" / "checkpoints" / "step_000002" / "model.safetensors").exists()
    run_here("sft", f"{judging(small, mine, '--steps 4 --save-every 1')} --out {mine}/without")
    assert same_tensors(*(load_file(mine / name / "model.safetensors") for name in ("run", "without")))


@pytest.mark.parametrize("kind", ["", "--lora-rank 4 --lr 0.05", "--quality tokens --kl-coef 0"])
def test_a_judge_is_given_replies_that_a_slow_loop_samples_too(kind, small, mine):
    """A token at a time, by a whole pass over prompt and reply, with the model that was saved."""
    data = "rankings" if "quality" in kind else "demonstrations"
    run_here("sft", judging(small, mine, f"{kind} --steps 3 --judge mine:size", data), f"--out {mine}/run")
    network, tokenizer = load_model(mine / "run", model.GPT)
    network.eval()
    # As `Run.seed_step` has it, of step 3 with seed 0.
    generator = torch.Generator().manual_seed(3 * 1_009)
    uniform = torch.rand(len(ASKED), 9, 2, dtype=torch.float64, generator=generator)
    sizes = []
    for prompt, own in zip(ASKED, uniform):
        ids = encode_prompt(tokenizer, [{"role": "user", "content": prompt}])
        reply = []
        for pair in own:
            with torch.no_grad():
                logits = network.logits(network.transformer(torch.tensor([ids + reply])))[0, -1:]
            reply.append(sample_token(logits, 1.0, 0, 1.0, pair[None]).item())
            if reply[-1] in tokenizer.stops:
                break
        sizes.append(len(tokenizer.decode(reply)))
    assert len(set(sizes)) > 2
    assert rows_of(mine / "run")[-1]["size"] == pytest.approx(sum(sizes) / len(ASKED))


def test_judges_say_the_same_on_two_ranks_and_after_a_stop(small, mine):
    words = judging(small, mine, "--steps 4 --save-every 1 --judge mine:size")
    run_here("sft", f"{words} --out {mine}/one")
    with stopped_in_the_second_step():
        run_here("sft", f"{words} --out {mine}/again")
    run_here("sft", f"{words} --out {mine}/again --resume")
    assert metrics(mine / "again") == metrics(mine / "one")
    assert pointer(mine / "again") == pointer(mine / "one")
    two = command("sft", f"{words} --micro-batch-tokens 60 --out {mine}/two", launcher=TORCHRUN, cwd=mine)
    assert two.returncode == 0, two.stderr[-2000:]
    for one, other in zip(metrics(mine / "one"), metrics(mine / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert len({row["size"] for row in rows_of(mine / "one") if "size" in row}) > 1


def test_judges_are_asked_about_held_out_prompts_evenly_spread_that_leave_room_for_a_reply(small):
    _, tokenizer = load_model(small / "sft", model.GPT)
    texts = [f"Say {word}." for word in "abcdefghij"]
    rows = [Row([{"role": "user", "content": text}], ["b"], [0]) for text in texts]
    long = Row([{"role": "user", "content": "long " * 20}], ["b"], [0])
    plain_text = Row([], ["b"], [0])

    def asked(count, rows):
        config = SimpleNamespace(judge_prompts=count, max_new_tokens=8)
        prompts = sft.prompts_to_judge(config, tokenizer, rows, 24, str)
        assert [prompt.ids for prompt in prompts] == [
            encode_prompt(tokenizer, prompt.row.prompt) for prompt in prompts]
        return [prompt.row.text for prompt in prompts]

    assert asked(100, [plain_text, *rows, long, *rows]) == texts
    assert asked(5, rows) == texts[::2]
    assert asked(1, rows) == texts[:1]
    with pytest.raises(UserError, match="--judge is asked about replies to held-out prompts"):
        asked(5, [plain_text])


@pytest.mark.parametrize("flags, reason", [
    ("--val-data '' --val-fraction 0 --judge mine:size", "there are none: name --val-data"),
    ("--judge mine:nobody", "--judge mine:nobody can't be imported"),
    ("--judge mine:broken", "--judge mine:broken failed (ZeroDivisionError"),
    ("--judge mine:size mine:nan", "--judge mine:nan must return one finite number for each reply"),
    ("--judge mine:known", "--judge mine:known wants answers, and no row has one"),
    ("--judge mine:val_loss", "the logs have another number named val_loss; rename the function"),
    ("--judge mine:size --judge-prompts 0", "--judge-prompts"),
    ("--judge toy:gold", "the judge knows the questions of the embedded task alone"),
])
def test_a_bad_judge_is_said_in_a_line_before_training(flags, reason, small, mine, capsys):
    code = exit_code("sft", judging(small, mine, f"--steps 1 {flags}"), f"--out {mine}/run")
    said = capsys.readouterr().err.strip()
    assert code == 2 and reason in said and "\n" not in said.removeprefix("error: ")
    assert not (mine / "run" / "metrics.jsonl").exists()
