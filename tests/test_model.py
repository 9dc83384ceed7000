"""model.py against slow, independent computations and against `transformers`."""
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from model import (GPT, Generation, GPTConfig, ScalarModel, generate, last_scores, load_model, sample_token, save_model,
                   token_logprobs, values_before)
from runtime import UserError
from tokenizer import Tokenizer

VOCAB = 261


@pytest.fixture
def tokenizer():
    return Tokenizer("bytes", r"\s+|\S+", {bytes([b]): b for b in range(256)})


def tiny(kind=GPT, seed=0, **changes):
    """A random model, every weight and bias large enough to matter."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "block_size": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 32} | changes
    model = kind(GPTConfig(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


LENGTHS = torch.tensor([9, 5, 12, 7])


@pytest.fixture
def batch():
    """ids and mask (4, 12), right-padded: a plain response, a single token, two stretches, and an empty mask."""
    ids = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 1] = mask[2, 2:4] = mask[2, 7:12] = True
    ids[torch.arange(12) >= LENGTHS[:, None]] = 257
    return ids, mask


def rows_alone(ids):
    """(row number, that row's ids (1, n) without padding)."""
    return [(b, ids[b:b + 1, :n]) for b, n in enumerate(LENGTHS.tolist())]


def brute_force(model, ids, mask, temperature):
    """Log-probabilities and entropies (B, T): all logits of one row at a time, shifted by hand."""
    logprobs, entropy = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for b, row in rows_alone(ids):
        full = (model.logits(model.transformer(row))[0].float() / temperature).log_softmax(-1)  # (n, V)
        for t in range(1, row.shape[1]):
            if mask[b, t]:
                logprobs[b, t] = full[t - 1, ids[b, t]]
                entropy[b, t] = -(full[t - 1].exp() * full[t - 1]).sum()
    return logprobs, entropy


# ---------------------------------------------------------------------------------------------------------
# Log-probabilities

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_forward_equals_brute_force_row_by_row(batch, temperature):
    model, (ids, mask) = tiny(), batch
    logprobs, entropy = model(ids, mask, temperature, with_entropy=True)
    expected, expected_entropy = brute_force(model, ids, mask, temperature)
    torch.testing.assert_close(logprobs, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=2e-5, rtol=0)
    assert not logprobs[~mask].any() and not entropy[~mask].any() and (logprobs[mask] < 0).all()
    plain, nothing = model(ids, mask, temperature)
    assert torch.equal(plain, logprobs) and nothing is None


def test_forward_under_bf16_autocast_returns_fp32_near_the_fp32_result(batch):
    model, (ids, mask) = tiny(), batch
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids, mask, 0.7, with_entropy=True)
        states = model.transformer(ids)
    for value, exact in zip(got, brute_force(model, ids, mask, 0.7)):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact, atol=0.2, rtol=0)
    # what comes after the states loses no more than the rounding of the logits
    full = (states.float() @ model.transformer.wte.weight.T / 0.7).log_softmax(-1)  # (B, T, V)
    expected = full[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]
    torch.testing.assert_close(got[0][:, 1:], expected, atol=0.04, rtol=0)


@pytest.mark.parametrize("at_once", [1 << 25, 5 * VOCAB])
def test_bf16_states_and_weights_are_normalised_in_fp32(monkeypatch, at_once):
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    states, weight, targets = torch.randn(23, 32).bfloat16(), torch.randn(VOCAB, 32).bfloat16(), torch.randint(VOCAB, (23,))
    logprobs, entropy = token_logprobs(states, weight, targets, 1.0, with_entropy=True)
    exact = (states.float() @ weight.float().T).bfloat16().float().log_softmax(-1)  # logits are rounded, what follows is not
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, exact[range(23), targets], atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(entropy, -(exact.exp() * exact).sum(-1), atol=1e-2, rtol=0)


@pytest.mark.parametrize("at_once", [1 << 25, 5 * VOCAB, 1])  # one chunk, five, one row each
def test_chunks_change_neither_values_nor_gradients(monkeypatch, at_once):
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    states, weight = torch.randn(23, 32, requires_grad=True), (0.4 * torch.randn(VOCAB, 32)).requires_grad_()
    targets, a, b = torch.randint(VOCAB, (23,)), torch.randn(23), torch.randn(23)
    full = (states @ weight.T / 0.7).log_softmax(-1)  # (N, V)
    expected = full[range(23), targets], -(full.exp() * full).sum(-1)
    got = token_logprobs(states, weight, targets, 0.7, with_entropy=True)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    for use_logprobs, use_entropy in ((1, 0), (0, 1), (1, 1)):
        losses = [(use_logprobs * a * logprobs + use_entropy * b * entropy).sum() for logprobs, entropy in (expected, got)]
        exact, found = (torch.autograd.grad(loss, (states, weight), retain_graph=True) for loss in losses)
        torch.testing.assert_close(found, exact, atol=5e-5, rtol=1e-4)
    alone, nothing = token_logprobs(states, weight, targets, 0.7)
    torch.testing.assert_close(alone, expected[0], atol=2e-5, rtol=0)
    assert nothing is None


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("chunked", [True, False])
def test_all_logits_exist_at_once_only_without_chunks(monkeypatch, chunked):
    n, width = 200, 8
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", 10 * VOCAB if chunked else n * VOCAB)
    states, weight = torch.randn(n, width, requires_grad=True), torch.randn(VOCAB, width, requires_grad=True)
    with LargestTensor() as forward:
        logprobs, entropy = token_logprobs(states, weight, torch.randint(VOCAB, (n,)), with_entropy=True)
    with LargestTensor() as backward:
        (logprobs + entropy).sum().backward()
    assert forward.numel == backward.numel == (10 if chunked else n) * VOCAB


# ---------------------------------------------------------------------------------------------------------
# Masks and padding

def test_an_empty_mask_gives_zeros_and_a_zero_gradient(batch):
    model, critic, (ids, _) = tiny(), tiny(ScalarModel), batch
    nothing = torch.zeros(ids.shape, dtype=torch.bool)
    outputs = *model(ids, nothing, with_entropy=True), values_before(critic(ids), nothing)
    assert all(x.shape == ids.shape and not x.any() for x in outputs)
    sum(x.sum() for x in outputs).backward()
    grads = [p.grad for m in (model, critic) for p in m.parameters() if p.grad is not None]
    assert grads and not any(grad.any() for grad in grads)


def test_padding_changes_nothing_and_a_row_alone_equals_the_row_in_a_batch(batch):
    model, critic, (ids, mask) = tiny(), tiny(ScalarModel), batch

    def outputs(ids, mask, lengths):
        return *model(ids, mask, 0.7, with_entropy=True), values_before(critic(ids), mask), last_scores(critic(ids), lengths)

    padded = outputs(ids, mask, LENGTHS)
    padding = torch.arange(12) >= LENGTHS[:, None]
    other = outputs(torch.where(padding, torch.randint(VOCAB, ids.shape), ids), mask, LENGTHS)
    assert all(torch.equal(x, y) for x, y in zip(padded, other))
    for b, row in rows_alone(ids):
        n = row.shape[1]
        for together, alone in zip(padded, outputs(row, mask[b:b + 1, :n], LENGTHS[b:b + 1])):
            torch.testing.assert_close(together[b, :n] if together.ndim == 2 else together[b], alone[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_heads_equal_full_heads_with_keys_and_values_repeated(batch, bias):
    grouped, full = tiny(n_kv_head=2, bias=bias), tiny(bias=bias)
    weights = grouped.state_dict()
    for name in [n for n in weights if "c_attn" in n]:
        q, k, v = weights[name].split([32, 16, 16])
        k, v = (torch.cat([x[:8], x[:8], x[8:], x[8:]]) for x in (k, v))  # heads 0, 1 share one, and 2, 3
        weights[name] = torch.cat([q, k, v])
    full.load_state_dict(weights)
    for x, y in zip(grouped(*batch, with_entropy=True), full(*batch, with_entropy=True)):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=0)


def test_a_sequence_longer_than_the_context_is_refused():
    model = tiny()
    model(torch.zeros(1, 32, dtype=torch.long), torch.ones(1, 32, dtype=torch.bool))
    with pytest.raises(UserError, match="33 tokens .* context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long), torch.ones(1, 33, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------------
# Generation

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3], [2, 3], [8, 4, 6, 2, 6, 4], [11, 0], [7, 7, 7, 1]]


def slow_greedy(model, prompt, number):
    """The likeliest tokens, a full forward pass over everything for each."""
    ids = list(prompt)
    for _ in range(number):
        ids.append(int(model.logits(model.transformer(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt):]


def until_end(tokens, eos):
    return tokens[:tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("options", [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "bias": False}, {"bias": False}])
def test_cached_batched_greedy_equals_each_row_alone_without_a_cache(options):
    number, model = 16, tiny(vocab_size=12, seed=3, **options)
    slow = [slow_greedy(model, prompt, number) for prompt in PROMPTS]
    # the end token that makes rows end, and leave the cache, at the most different steps
    eos = max(range(12), key=lambda token: len({len(until_end(tokens, token)) for tokens in slow}))
    expected = [until_end(tokens, eos) for tokens in slow]
    assert len({len(tokens) for tokens in expected}) >= 4 and sum(eos in tokens for tokens in slow) >= 4
    for sampling in ({"temperature": 0}, {"top_k": 1}):
        out = generate(model, PROMPTS, number, SimpleNamespace(eos=eos, pad=0), **sampling)
        assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == expected
        assert [ids[:len(p)].tolist() for ids, p in zip(out.ids, PROMPTS)] == PROMPTS
        assert out.ended.tolist() == [tokens[-1] == eos for tokens in expected]
    for prompt, tokens in zip(PROMPTS, expected):
        alone = generate(model, [prompt], number, SimpleNamespace(eos=eos, pad=0), temperature=0)
        assert alone.ids.tolist() == [prompt + tokens]


class Countdown(torch.nn.Module):
    """Stands in for GPT: after token n it says n - 1, down to 0, the end token. batches: rows of each pass."""

    def __init__(self):
        super().__init__()
        self.config, self.batches = GPTConfig(64, 64, 1, 1, 1, 1), []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def transformer(self, ids, cache, positions=None, upto=None):
        self.batches.append(len(ids))
        return ids[..., None].float()  # (B, T, 1)

    def logits(self, states):
        return F.one_hot((states[:, 0].long() - 1).clamp(min=0), 64) * 1e4


STARTS = [(1,), (1, 1, 1), (9,), (8, 20), (1, 2, 3, 8, 9, 20), (20, 3, 8, 2, 1, 1, 2, 30, 7, 4), (5, 5, 5, 5)]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, where generate asks less often who has ended")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_ids_mask_lengths_and_ended_where_the_answer_is_known(device):
    for limit, starts in itertools.product([1, 3, 8, 11], STARTS):
        model = Countdown().to(device)
        prompts = [[50 + i] * (i * 3 % 5) + [n] for i, n in enumerate(starts)]
        out = generate(model, prompts, limit, SimpleNamespace(eos=0, pad=63))
        replies = [list(range(n - 1, -1, -1))[:limit] for n in starts]  # the end token comes n-th, unless the limit is first
        longest = max(len(p) + len(r) for p, r in zip(prompts, replies))
        rest = [longest - len(p) - len(r) for p, r in zip(prompts, replies)]
        assert out.ids.tolist() == [p + r + [63] * n for p, r, n in zip(prompts, replies, rest)]
        assert out.mask.tolist() == [[0] * len(p) + [1] * len(r) + [0] * n for p, r, n in zip(prompts, replies, rest)]
        assert out.lengths.tolist() == [len(p) + len(r) for p, r in zip(prompts, replies)]
        assert out.ended.tolist() == [n <= limit for n in starts]
        if device == "cpu":
            assert len(model.batches) == max(map(len, replies))  # stops with the last row
            for step, rows in enumerate(model.batches):  # rows that have ended leave the batch when they are half of it
                assert rows < 2 * sum(n > step for n in starts)


def test_texts_are_the_responses_without_control_tokens(tokenizer):
    out = SimpleNamespace(ids=torch.tensor([[259, 65, 260, 66, 67, 256], [65, 260, 256, 257, 257, 257]]),
                          mask=torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]]).bool())
    assert Generation.texts(out, tokenizer) == ["BC", ""]


def test_a_seed_repeats_the_sample_and_another_seed_does_not():
    model, end = tiny(), SimpleNamespace(eos=256, pad=257)
    a, b, c = (generate(model, PROMPTS, 12, end, generator=torch.Generator().manual_seed(seed)).ids for seed in (1, 1, 2))
    assert torch.equal(a, b) and a.tolist() != c.tolist()


@pytest.mark.parametrize("options, temperature", [({}, 1.0), ({"temperature": 0.7}, 0.7)])
def test_samples_follow_the_model_at_the_temperature_that_they_are_scored_at(options, temperature):
    """At every step the mean log-probability that GPT.forward gives to samples is minus the mean entropy."""
    model, n, generator = tiny(vocab_size=12), 4000, torch.Generator().manual_seed(0)
    out = generate(model, [[3, 1, 4]] * n, 3, SimpleNamespace(eos=12, pad=0), generator=generator, **options)
    with torch.no_grad():
        logprobs, entropy = model(out.ids, out.mask, temperature, with_entropy=True)
        elsewhere, _ = model(out.ids, out.mask, 1.7 - temperature)
    difference = (logprobs + entropy)[:, 3:]  # (n, 3), of mean zero
    assert (difference.mean(0).abs() < 4 * difference.std(0) / math.sqrt(n)).all()
    assert ((elsewhere + entropy)[:, 3:].mean(0).abs() > 0.05).any()


def truncated(probs, top_k, top_p):
    """Slow: walk down the tokens in order of probability, stop after top_k or once what remains of them has top_p."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[:top_k or None]
    total, kept, reached = sum(probs[i] for i in order), [], 0.0
    for i in order:
        if reached < top_p:
            kept.append(i)
            reached += probs[i] / total
    return [probs[i] / sum(probs[j] for j in kept) if i in kept else 0.0 for i in range(len(probs))]


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 3, 1.0), (1.0, 0, 0.8),
                                                        (0.8, 6, 0.7), (1.0, 50, 0.01)])
def test_sample_frequencies_equal_the_truncated_softmax(temperature, top_k, top_p):
    n, logits = 20000, 1.5 * torch.randn(2, 12, generator=torch.Generator().manual_seed(4))
    tokens = sample_token(logits.repeat(n, 1), temperature, top_k, top_p, torch.Generator().manual_seed(0)).view(n, 2)
    for column in (0, 1):
        weights = [math.exp(x / temperature) for x in logits[column].tolist()]
        expected = torch.tensor(truncated([w / sum(weights) for w in weights], top_k, top_p))
        found = tokens[:, column].bincount(minlength=12) / n
        assert (found[expected == 0] == 0).all()
        assert (found - expected).abs().sum() / 2 < 0.015
    assert torch.equal(sample_token(logits, 0, top_k, top_p, None), logits.argmax(-1))


@pytest.mark.parametrize("training", [True, False])
def test_generation_runs_without_dropout_and_restores_the_mode(training):
    model = tiny(dropout=0.5).train(training)
    end = SimpleNamespace(eos=256, pad=257)
    out = generate(model, [[1, 2, 3]], 8, end, temperature=0)
    assert model.training == training and all(m.training == training for m in model.modules())
    assert until_end(slow_greedy(model.eval(), [1, 2, 3], 8), 256) == out.ids[0, 3:].tolist()


def test_generation_fills_the_context_to_the_last_place_and_refuses_one_more():
    model, end = tiny(), SimpleNamespace(eos=VOCAB, pad=0)
    out = generate(model, [[1] * 20, [2]], 12, end, temperature=0)
    assert out.lengths.tolist() == [32, 13]
    with pytest.raises(UserError, match="20 tokens and 13 new ones don't fit .* 32"):
        generate(model, [[1] * 20, [2]], 13, end)


def test_greedy_under_bf16_autocast_equals_full_passes_under_autocast():
    model, number = tiny(seed=1), 8
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(model, PROMPTS, number, SimpleNamespace(eos=VOCAB, pad=0), temperature=0)
        slow = [slow_greedy(model, prompt, number) for prompt in PROMPTS]
    same = [out.ids[b, len(p):len(p) + number].tolist() == slow[b] for b, p in enumerate(PROMPTS)]
    assert sum(same) >= len(PROMPTS) - 2  # near ties may fall either way


# ---------------------------------------------------------------------------------------------------------
# Scores and values

@pytest.mark.parametrize("bias", [True, False])
def test_scores_and_values_equal_brute_force_row_by_row(batch, bias):
    model, (ids, mask) = tiny(ScalarModel, bias=bias), batch
    per_position = model(ids)
    scores, values = last_scores(per_position, LENGTHS), values_before(per_position, mask)
    expected = torch.zeros(ids.shape)
    for b, row in rows_alone(ids):
        numbers = (model.transformer(row)[0] * model.score.weight[0]).sum(-1)  # (n,)
        torch.testing.assert_close(scores[b], numbers[-1], atol=2e-5, rtol=0)
        for t in range(1, row.shape[1]):
            expected[b, t] = numbers[t - 1] * mask[b, t]
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=0)


def test_the_scalar_head_runs_in_fp32_under_autocast(batch):
    model, (ids, _) = tiny(ScalarModel), batch
    with torch.autocast("cpu", torch.bfloat16):
        scores, states = model(ids), model.transformer(ids)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, (states.float() * model.score.weight[0]).sum(-1), atol=1e-5, rtol=0)


def test_a_fresh_head_has_the_stated_spread_and_the_trunk_is_a_copy():
    for bias in (True, False):
        model = tiny(n_embd=512, n_layer=1, vocab_size=8, bias=bias)
        scalar = ScalarModel.from_trunk(model)
        head = scalar.score.weight.detach()
        assert head.shape == (1, 512)
        assert head.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1) and abs(head.mean().item()) < 4 / 513
        assert all(torch.equal(scalar.transformer.state_dict()[k], v) for k, v in model.transformer.state_dict().items())
        before = model.transformer.wte.weight.clone()
        with torch.no_grad():
            for p in scalar.parameters():
                p.zero_()
        assert torch.equal(model.transformer.wte.weight, before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("amount", [1.5, -0.25])
def test_shift_lowers_every_score_by_the_amount(batch, bias, amount):
    model, (ids, _) = tiny(ScalarModel, bias=bias), batch
    before = model(ids)
    model.shift(amount)
    torch.testing.assert_close(before - model(ids), torch.full(ids.shape, amount), atol=1e-5, rtol=0)
    model.shift(torch.tensor(-amount))
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------
# Checkpoint folders

@pytest.mark.parametrize("kind", [GPT, ScalarModel])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_folder_gives_the_same_bits_back(tmp_path, tokenizer, batch, kind, bias):
    model = tiny(kind, bias=bias)
    if kind is ScalarModel:
        model.shift(0.7)
    save_model(tmp_path / "a" / "b", model, tokenizer)
    again, other_tokenizer = load_model(tmp_path / "a" / "b", kind, dropout=0.1)
    assert again.config == GPTConfig(**vars(model.config) | {"dropout": 0.1})
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert other_tokenizer.ranks == tokenizer.ranks and other_tokenizer.pattern == tokenizer.pattern
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["bpe.json", "config.json", "model.safetensors"]


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers", reason="the peer that checkpoint folders are compared with")


def open_with(peer, folder):
    """The peer's model, having checked that it found all weights that it wanted and wanted all that it found."""
    model, info = peer.from_pretrained(folder, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("bias", [True, False])
def test_transformers_opens_a_language_model_with_equal_logits(tmp_path, tokenizer, transformers, batch, bias):
    model, (ids, _) = tiny(bias=bias), batch
    save_model(tmp_path, model, tokenizer)
    peer = open_with(transformers.GPT2LMHeadModel, tmp_path)
    whole_context = torch.randint(VOCAB, (1, 32))
    for row in [row for _, row in rows_alone(ids)] + [whole_context]:
        torch.testing.assert_close(model.logits(model.transformer(row)), peer(row).logits, atol=5e-5, rtol=1e-5)
    assert peer.config.eos_token_id == tokenizer.eos and peer.config.pad_token_id == tokenizer.pad
    prompt = torch.tensor([PROMPTS[2]])
    assert peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[0].tolist() \
        == generate(model, PROMPTS[2:3], 8, tokenizer, temperature=0).ids[0].tolist()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_transformers_opens_a_reward_model_with_equal_scores(tmp_path, tokenizer, transformers, batch, bias, shift):
    model, (ids, _) = tiny(ScalarModel, bias=bias), batch
    unshifted = last_scores(model(ids), LENGTHS)
    model.shift(shift)
    save_model(tmp_path, model, tokenizer)
    peer = open_with(transformers.GPT2ForSequenceClassification, tmp_path)
    attention = (torch.arange(12) < LENGTHS[:, None]).long()
    scores = peer(ids, attention_mask=attention).logits.squeeze(-1)  # (B,)
    torch.testing.assert_close(last_scores(model(ids), LENGTHS), scores, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(unshifted - shift, scores, atol=5e-5, rtol=1e-5)


def test_weights_are_safetensors_and_no_script_can_run_code_from_a_file(tmp_path, tokenizer):
    save_model(tmp_path, tiny(), tokenizer)
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + size])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert max(tensor["data_offsets"][1] for tensor in header.values()) == len(raw) - 8 - size
    forbidden = re.compile(r"pickle|torch\.(save|load)\b|(?<![\w.])(eval|exec)\(|trust_remote_code|shell\s*=\s*True")
    sources = list(Path(model_file.__file__).parent.glob("*.py"))
    found = [f"{p.name}: {m[0]}" for p in sources for m in forbidden.finditer(p.read_text("utf-8"))]
    assert len(sources) > 5 and found == []


def edit_config(**changes):
    def damage(folder):
        header = json.loads((folder / "config.json").read_text())
        header["barerlhf"] |= changes
        (folder / "config.json").write_text(json.dumps(header))
    return damage


def edit_weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return damage


def rewrite(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize("damage, message", [
    (lambda folder: folder.rename(folder.with_name("elsewhere")), r"no such checkpoint folder"),
    (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
    (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
    (lambda folder: (folder / "bpe.json").unlink(), r"bpe\.json is missing"),
    (rewrite("config.json", lambda raw: raw[:-20]), r"config\.json is damaged"),
    (rewrite("config.json", lambda raw: b"\xff" + raw), r"config\.json is damaged"),
    (rewrite("config.json", lambda raw: b"[]"), r"config\.json is damaged"),
    (rewrite("config.json", lambda raw: b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'),
     r"config\.json is damaged or foreign .*barerlhf"),
    (edit_config(heads=4), r"config\.json is damaged .*heads"),
    (rewrite("bpe.json", lambda raw: raw[:-20]), r"bpe\.json is damaged"),
    (rewrite("model.safetensors", lambda raw: raw[:-20]), r"model\.safetensors is damaged"),
    (rewrite("model.safetensors", lambda raw: raw[:20]), r"model\.safetensors is damaged"),
    (rewrite("model.safetensors", lambda raw: b""), r"model\.safetensors is damaged"),
    (rewrite("model.safetensors", lambda raw: b"\x80\x04" + raw), r"model\.safetensors is damaged"),
    (edit_weights(lambda tensors: tensors.pop("transformer.h.1.attn.c_attn.bias")),
     r"model\.safetensors lacks transformer\.h\.1\.attn\.c_attn\.bias"),
    (edit_weights(lambda tensors: tensors.update({"transformer.ln_f.weight": torch.ones(31)})),
     r"model\.safetensors: transformer\.ln_f\.weight .*\(31,\).*\(32,\)"),
    (edit_config(block_size=33), r"model\.safetensors: transformer\.wpe\.weight .*\(32, 32\).*\(33, 32\)"),
    (edit_config(vocab_size=260), r"model\.safetensors: transformer\.wte\.weight .*\(261, 32\).*\(260, 32\)"),
    (rewrite("bpe.json", lambda raw: raw.replace(b'"/w=="', b'"/w==", "YWI="')), r"tokenizer has 262 tokens, the model 261"),
    (edit_config(norm="rmsnorm"), r"norm 'rmsnorm' is not supported, only layernorm"),
    (edit_config(position="rotary"), r"position 'rotary' is not supported"),
    (edit_config(mlp="swiglu"), r"mlp 'swiglu' is not supported"),
    (edit_config(n_head=3, n_kv_head=3), r"width 32 is not divisible by 3 heads"),
    (edit_config(n_kv_head=3), r"4 heads are not divisible by 3 key/value heads"),
    (edit_config(n_layer=10**9), r"out of range .*n_layer=1000000000"),
    (edit_config(n_embd=-32), r"out of range .*n_embd=-32"),
    (edit_config(vocab_size="many"), r"out of range .*vocab_size='many'"),
    (edit_config(block_size=32.0), r"out of range .*block_size=32\.0"),
    (edit_config(n_embd=1 << 20, vocab_size=1 << 20), r"model\.safetensors|config\.json|out of range"),  # 4 TiB, if made
])
def test_a_damaged_checkpoint_folder_is_refused_by_name(tmp_path, tokenizer, damage, message):
    folder = tmp_path / "model"
    save_model(folder, tiny(), tokenizer)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_model(folder, GPT)


@pytest.mark.parametrize("saved, asked, message", [
    (GPT, ScalarModel, "holds a language model, but a reward model is needed"),
    (ScalarModel, GPT, "holds a reward model, but a language model is needed"),
])
def test_a_folder_of_the_other_kind_is_refused(tmp_path, tokenizer, saved, asked, message):
    save_model(tmp_path, tiny(saved), tokenizer)
    with pytest.raises(UserError, match=f"{tmp_path} {message}"):
        load_model(tmp_path, asked)


def test_grouped_heads_cannot_be_saved_in_a_layout_that_has_none(tmp_path, tokenizer):
    with pytest.raises(UserError, match="grouped"):
        save_model(tmp_path, tiny(n_kv_head=2), tokenizer)
