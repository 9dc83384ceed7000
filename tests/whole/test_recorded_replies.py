"""grpo.py and ppo.py on replies that were sampled elsewhere: the same update, weights, what is logged."""
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import grpo
import ppo
import tools
from data import encode_prompt
from formats.model_folder import load_model
from model import GPT

SCRIPTS = {"grpo": grpo, "ppo": ppo}
# All prompts of a file in one step: then their order matters for nothing.
FLAGS = {
    "grpo": "--rollout-batch 4 --group 2 --overlong keep --advantage none",
    "ppo": "--rollout-batch 8 --minibatches 1 --epochs 1",
}


def record(folder, root, script, *flags, temperature=1.0, heat=1.0):
    """A file of the replies that a run samples in its only step, its flags, and the weights that it ends on.

    Their log-probabilities are computed here, from the whole softmax of a sampler that is heat times as warm
    as is said.
    """
    patch = pytest.MonkeyPatch()
    with patch.context():
        calls = tools.recorded(patch, SCRIPTS[script], "sample")
        prompts = folder / "prompts.jsonl"
        asked = [{"prompt": f"Say {word}.", "answer": word} for word in tools.MORE_WORDS]
        tools.write_rows(prompts, asked[:4 if script == "grpo" else 8])
        words = tools.split([
            f"--model {root}/sft --reward {root}/reward --threads 1 --max-new-tokens 5 --steps 1",
            f"--warmup 0 --temperature {temperature}", FLAGS[script], *flags])
        assert tools.exit_code(script, *words, f"--data {prompts} --out {folder}/sampled") == 0
    (_, batch), = calls["sample"]
    model, tokenizer = load_model(f"{root}/sft", GPT)
    rows = []
    for prompt, ids, mask, length in zip(batch.prompts, batch.ids, batch.mask, batch.sizes):
        with torch.no_grad():
            logits = model.logits(model.transformer(ids[None, :length]))[0] / (temperature * heat)
        logprobs = logits.log_softmax(-1)  # (T, V)
        places = mask.nonzero().flatten().tolist()
        rows.append({"prompt": prompt.row.text, "answer": prompt.row.answer,
                     "reply_ids": [int(ids[t]) for t in places], "temperature": temperature,
                     "logprobs": [float(logprobs[t - 1, ids[t]]) for t in places]})
    file = tools.write_rows(folder / "rollouts.jsonl", rows)
    return file, words, load_file(folder / "sampled/model.safetensors")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("importance", ["none", "token", "reply"])
def test_replies_of_the_policy_itself_give_the_update_of_sampling(script, importance, small, tmp_path):
    file, words, expected = record(tmp_path, small, script, temperature=0.8)
    out = tmp_path / "replayed"
    assert tools.exit_code(script, *words, f"--rollouts {file} --importance {importance} --out {out}") == 0
    found = load_file(out / "model.safetensors")
    before = load_file(f"{small}/sft/model.safetensors")
    assert any((expected[name] - before[name]).abs().max() > 1e-5 for name in expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-6, rtol=1e-4)
    row, = tools.rows_of(out)
    sampled, = tools.rows_of(tmp_path / "sampled")
    assert row["score"] == pytest.approx(sampled["score"], abs=1e-5) and row["length"] == sampled["length"]
    assert row["eos_rate"] == sampled["eos_rate"] < 1
    assert abs(row["mismatch"]) < 1e-5 and row["mismatch_max"] < 1e-4
    assert row["ess"] == pytest.approx(1, abs=1e-4)
    assert "mismatch" not in sampled


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("importance", ["none", "token", "reply"])
def test_how_far_the_sampler_was_is_measured_and_made_up_for(script, importance, small, tmp_path,
                                                             monkeypatch):
    file, words, _ = record(tmp_path, small, script, heat=1.25)
    calls = tools.recorded(monkeypatch, SCRIPTS[script], "policy_loss")
    words.append(f"--rollouts {file} --importance {importance} --importance-limit 1.2 --out {tmp_path}/run")
    assert tools.exit_code(script, *words) == 0
    log_ratios = []
    exact, tokenizer = load_model(f"{small}/sft", GPT)
    for row in map(json.loads, file.read_text().splitlines()):
        ids = encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        whole = torch.tensor(ids + row["reply_ids"])
        logprobs = exact.logits(exact.transformer(whole[None]))[0].log_softmax(-1)
        own = [logprobs[t - 1, whole[t]].item() for t in range(len(ids), len(whole))]
        log_ratios.append([a - b for a, b in zip(own, row["logprobs"])])
    flat = list(itertools.chain(*log_ratios))
    weights = [math.exp(sum(own)) for own in log_ratios]
    row, = tools.rows_of(tmp_path / "run")
    assert row["mismatch"] == pytest.approx(-sum(flat) / len(flat), abs=1e-4)
    assert row["mismatch_max"] == pytest.approx(max(map(abs, flat)), abs=1e-4)
    ess = sum(weights) ** 2 / sum(w * w for w in weights) / len(weights)
    assert row["ess"] == pytest.approx(ess, abs=1e-3) and ess < 0.95

    # What the loss was given for each reply's tokens.
    found = []
    for args, _ in calls["policy_loss"]:
        mask, given = args[3], args[9] if script == "ppo" else args[4] / args[4].max() * 1.2
        found += [own[where].tolist() for own, where in zip(given, mask)]
    expected = []
    for own in log_ratios:
        of_tokens = {"none": [0.0] * len(own), "token": own, "reply": [sum(own)] * len(own)}[importance]
        expected.append([min(math.exp(x), 1.2) for x in of_tokens])
    if importance == "none":
        found = [[x / max(itertools.chain(*found)) for x in own] for own in found]
    flat = [sorted(itertools.chain(*of_replies)) for of_replies in (found, expected)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-3)


def test_resume_and_two_ranks_give_the_same_bits(small, tmp_path):
    file, _, _ = record(tmp_path, small, "grpo")
    words = f"--rollouts {file} --rollout-batch 2 --group 2 --overlong keep --steps 4 --save-every 1"
    assert tools.here("grpo", small, words, f"--out {tmp_path}/whole") == 0
    with tools.stopped_in_the_second_step():
        plan = tools.PLAN["grpo"].format(root=small)
        tools.run_here("grpo", plan, "--threads 1", words, f"--out {tmp_path}/cut")
    assert tools.here("grpo", small, words, f"--resume --out {tmp_path}/cut") == 0
    assert tools.same(tmp_path / "whole", tmp_path / "cut")
    tools.run("grpo", small, words, f"--out {tmp_path}/ranks", launcher=tools.TORCHRUN)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "ranks"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)
    rows = zip(tools.rows_of(tmp_path / "whole"), tools.rows_of(tmp_path / "ranks"))
    for a, b in rows:
        for name in ("mismatch", "mismatch_max", "ess", "score"):
            assert a[name] == pytest.approx(b[name], abs=1e-3)


def test_what_transformers_samples_as_the_readme_has_it_is_scored_alike(small, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    code, = (block for block in tools.readme_blocks("python") if "reply_ids" in block)
    asked = [{"prompt": f"Say {word}.", "answer": word} for word in tools.WORDS]
    tools.write_rows(tmp_path / "prompts.jsonl", asked)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sft").symlink_to(f"{small}/sft")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(code, {})
    rows = [json.loads(line) for line in open("replies.jsonl")]
    assert len(rows) == 8 * len(tools.WORDS) and len({len(row["reply_ids"]) for row in rows}) > 2
    words = ("--rollouts replies.jsonl --rollout-batch 6 --group 8 --overlong keep --max-new-tokens 40 "
             "--steps 1")
    assert tools.here("grpo", small, words, "--out run") == 0
    row, = tools.rows_of("run")
    assert abs(row["mismatch"]) < 1e-4 and row["mismatch_max"] < 1e-3 and row["ess"] > 0.999
    assert 0 < row["eos_rate"] and row["length"] == sum(len(row["reply_ids"]) for row in rows) / len(rows)


# -- weights

def double(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("script", SCRIPTS)
def test_weighted_replies_of_a_sampler_have_the_gradient_of_the_policys_own(script):
    """Replies of two tokens out of three, the second one's odds depending on the first, listed one by one."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    other = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    scores = torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def logprobs_of(table, a, b):
        rows = table.log_softmax(-1)
        return torch.stack([rows[0, a], rows[1 + a, b]])[None]  # (1, 2)

    def expected(kind):
        """Gradient of the loss, its mean over the sampler's replies."""
        total, mask = 0.0, torch.ones(1, 2, dtype=torch.bool)
        for a, b in itertools.product(range(3), repeat=2):
            own, sampler = logprobs_of(logits, a, b), logprobs_of(other, a, b)
            weights = SCRIPTS[script].importance_weights(own.detach(), sampler, mask, kind, math.inf)
            if script == "grpo":
                advantages = scores[a, b].view(1, 1)
                loss, _ = grpo.policy_loss(own, own.detach(), advantages, mask, weights, "reinforce", "token",
                                           0.2, 0.2)
            else:
                advantages = scores[a, b].expand(1, 2)
                loss, _ = ppo.policy_loss(own, own.detach(), advantages, mask, 0.2, 1, importance=weights)
            total = total + sampler.sum().exp() * loss
        return torch.autograd.grad(total, logits)[0]

    value = sum(logprobs_of(logits, a, b).sum().exp() * scores[a, b]
                for a, b in itertools.product(range(3), repeat=2))
    true = -torch.autograd.grad(value, logits)[0]
    torch.testing.assert_close(expected("reply"), true)
    # Each token alone is wrong by what came before it, and unweighted ones by far more.
    off = {kind: (expected(kind) - true).norm() for kind in ("token", "none")}
    assert 0.01 < off["token"] < off["none"]


def test_weights_are_bounded_and_those_of_one_script_are_the_others():
    logprobs = double([[-1.0, -0.2, -3.0], [-50.0, -0.1, 0.0]])
    sampler = double([[-1.5, -2.2, -1.0], [-0.1, -40.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    for kind in ("none", "token", "reply"):
        found = grpo.importance_weights(logprobs, sampler, mask, kind, 2.0)
        assert found.equal(ppo.importance_weights(logprobs, sampler, mask, kind, 2.0))
        assert found.max() <= 2 + 1e-12
    tokens = grpo.importance_weights(logprobs, sampler, mask, "token", 2.0)
    torch.testing.assert_close(tokens[0], double([math.exp(0.5), 2.0, 1.0]))
    replies = grpo.importance_weights(logprobs, sampler, mask, "reply", 20.0)
    torch.testing.assert_close(replies, double([[math.exp(2.5)] * 3, [math.exp(-10)] * 3]))
    with pytest.raises(ValueError, match="unknown importance"):
        grpo.importance_weights(logprobs, sampler, mask, "both", 2.0)


@pytest.mark.parametrize("kind", ["clip", "penalty"])
def test_every_term_of_a_token_counts_its_weight_in_ppo(kind):
    generator = torch.Generator().manual_seed(0)
    old, step, advantages, ref = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)
    mask, weights = torch.tensor([[1, 1, 0], [1, 1, 1]]) > 0, torch.rand(2, 3, generator=generator).double()
    loss, _ = ppo.policy_loss(old + 0.3 * step, old, advantages, mask, 0.2, 5, kind, 3.0, 0.7, weights)
    kl = ppo.kl_loss(old + 0.3 * step, old, ref, mask, "k3", 5, weights)
    policy, term = 0.0, 0.0
    for b, t in mask.nonzero().tolist():
        place = torch.zeros_like(mask)
        place[b, t] = True
        own, _ = ppo.policy_loss(old + 0.3 * step, old, advantages, place, 0.2, 5, kind, 3.0, 0.7)
        policy += own * weights[b, t]
        term += ppo.kl_loss(old + 0.3 * step, old, ref, place, "k3", 5) * weights[b, t]
    torch.testing.assert_close(loss, policy)
    torch.testing.assert_close(kl, term)


# -- what is said

REPLY = {"prompt": "Say river.", "reply_ids": [40, 41], "logprobs": [-1.0, -1.0]}


@pytest.mark.parametrize("change, flags, said", [
    ({}, "--group 2", "has no prompt with 2 replies (--group)"),
    ({"reply_ids": [40] * 13, "logprobs": [-1] * 13}, "",
     "rollouts.jsonl:1: a reply of 13 tokens, and --max-new-tokens is 12"),
    ({"prompt_ids": [5] * 63}, "", ":1: prompt and reply have 65 tokens, and the context is 64"),
    ({"reply_ids": [40, 99999]}, "", ": token 99999 is none of the tokenizer's"),
    ({}, "--val-fraction 0.1", "--part, --skip-bad and --val-fraction are for --data"),
    ({}, "--importance-limit 0", "--importance-limit must be > 0"),
])
def test_what_cannot_be_replayed_is_refused(change, flags, said, small, tmp_path, capsys):
    file = tools.write_rows(tmp_path / "rollouts.jsonl", [REPLY | change])
    words = f"--steps 1 --rollouts {file} --group 1 --advantage none {flags} --out {tmp_path}/run"
    assert tools.here("grpo", small, words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_reply_that_goes_on_behind_its_end_is_refused(small, tmp_path, capsys):
    _, tokenizer = load_model(f"{small}/sft", GPT)
    rows = [REPLY | {"reply_ids": [tokenizer.eos, 40]}]
    file = tools.write_rows(tmp_path / "rollouts.jsonl", rows)
    words = f"--steps 1 --rollouts {file} --group 1 --advantage none --out {tmp_path}/run"
    assert tools.here("grpo", small, words) == 2
    assert "the reply goes on behind an end token, where a policy stops" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["ppo", "grpo", "distill"])
@pytest.mark.parametrize("flag", ["--top-k 50", "--top-p=0.9", "--min-p 0.1"])
def test_training_has_no_sampler_that_is_not_scored_and_says_why(script, flag, capsys):
    assert tools.exit_code(script, flag) == 2
    assert "training samples from the distribution that it scores" in capsys.readouterr().err


def test_importance_is_for_recorded_replies(small, tmp_path, capsys):
    for script in SCRIPTS:
        assert tools.here(script, small, f"--importance token --out {tmp_path}/run") == 2
        assert "--importance is for --rollouts" in capsys.readouterr().err
