"""model.py against slow, independent computations and against `transformers`."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_file
from model import GPT, Generation, GPTConfig, ScalarModel, generate, last_scores, rotary_angles, rotate, sample_token, token_logprobs, values_before
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


def ends(eos, pad):
    """Stands in for a tokenizer whose replies end with eos."""
    return SimpleNamespace(eos=eos, stops=(eos,), pad=pad)


def until_end(tokens, eos):
    return tokens[:tokens.index(eos) + 1] if eos in tokens else tokens


LLAMA = {"norm": "rmsnorm", "position": "rotary", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "n_inner": 48}
OPT = {"mlp": "relu", "position_offset": 2, "n_inner": 48}
DIALECTS = [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "bias": False}, {"bias": False}, LLAMA, OPT, OPT | {"norm_after": True, "embed_dim": 16},
            LLAMA | {"tied": False, "qk_norm": True, "head_dim": 10, "qkv_bias": True, "rope_scaling": ("llama3", 8.0, 1.0, 4.0, 16.0)}]


@pytest.mark.parametrize("options", DIALECTS)
def test_cached_batched_greedy_equals_each_row_alone_without_a_cache(options):
    number, model = 16, tiny(vocab_size=12, seed=3, **options)
    slow = [slow_greedy(model, prompt, number) for prompt in PROMPTS]
    # the end token that makes rows end, and leave the cache, at the most different steps
    eos = max(range(12), key=lambda token: len({len(until_end(tokens, token)) for tokens in slow}))
    expected = [until_end(tokens, eos) for tokens in slow]
    assert len({len(tokens) for tokens in expected}) >= 4 and sum(eos in tokens for tokens in slow) >= 3
    for sampling in ({"temperature": 0}, {"top_k": 1}):
        out = generate(model, PROMPTS, number, ends(eos, 0), **sampling)
        assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == expected
        assert [ids[:len(p)].tolist() for ids, p in zip(out.ids, PROMPTS)] == PROMPTS
        assert out.ended.tolist() == [tokens[-1] == eos for tokens in expected]
    for prompt, tokens in zip(PROMPTS, expected):
        alone = generate(model, [prompt], number, ends(eos, 0), temperature=0)
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
        out = generate(model, prompts, limit, ends(0, 63))
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
    model, end = tiny(), ends(256, 257)
    a, b, c = (generate(model, PROMPTS, 12, end, generator=torch.Generator().manual_seed(seed)).ids for seed in (1, 1, 2))
    assert torch.equal(a, b) and a.tolist() != c.tolist()


@pytest.mark.parametrize("options, temperature", [({}, 1.0), ({"temperature": 0.7}, 0.7)])
def test_samples_follow_the_model_at_the_temperature_that_they_are_scored_at(options, temperature):
    """At every step the mean log-probability that GPT.forward gives to samples is minus the mean entropy."""
    model, n, generator = tiny(vocab_size=12), 4000, torch.Generator().manual_seed(0)
    out = generate(model, [[3, 1, 4]] * n, 3, ends(12, 0), generator=generator, **options)
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
    end = ends(256, 257)
    out = generate(model, [[1, 2, 3]], 8, end, temperature=0)
    assert model.training == training and all(m.training == training for m in model.modules())
    assert until_end(slow_greedy(model.eval(), [1, 2, 3], 8), 256) == out.ids[0, 3:].tolist()


def test_generation_fills_the_context_to_the_last_place_and_refuses_one_more():
    model, end = tiny(), ends(VOCAB, 0)
    out = generate(model, [[1] * 20, [2]], 12, end, temperature=0)
    assert out.lengths.tolist() == [32, 13]
    with pytest.raises(UserError, match="20 tokens and 13 new ones don't fit .* 32"):
        generate(model, [[1] * 20, [2]], 13, end)


def test_greedy_under_bf16_autocast_equals_full_passes_under_autocast():
    model, number = tiny(seed=1), 8
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(model, PROMPTS, number, ends(VOCAB, 0), temperature=0)
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


@pytest.mark.parametrize("options", [{}, {"bias": False}, OPT | {"embed_dim": 16}])
@pytest.mark.parametrize("amount", [1.5, -0.25])
def test_shift_lowers_every_score_by_the_amount(batch, options, amount):
    model, (ids, _) = tiny(ScalarModel, **options), batch
    before = model(ids)
    assert model.can_shift
    model.shift(amount)
    torch.testing.assert_close(before - model(ids), torch.full(ids.shape, amount), atol=1e-5, rtol=0)
    model.shift(torch.tensor(-amount))
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [LLAMA, OPT | {"norm_after": True}])
def test_a_model_whose_last_norm_has_no_bias_says_that_it_cant_be_shifted(options):
    assert not tiny(ScalarModel, **options).can_shift and tiny(ScalarModel).can_shift


# ---------------------------------------------------------------------------------------------------------
# Rotary positions

def test_rotary_positions_turn_pairs_by_the_published_angles_and_scores_depend_on_distance_alone():
    config = tiny(**LLAMA, rope_theta=100.0).config  # heads of width 8
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    angles = rotary_angles(config, torch.arange(30))
    turned = rotate(q.expand(1, 1, 30, 8), *angles)[0, 0]  # (T, D)
    for i in range(4):  # eq. 34, pairs (i, i + D/2)
        a, b, angle = q[..., i].item(), q[..., i + 4].item(), 7 * 100.0 ** (-2 * i / 8)
        expected = (a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle))
        assert (turned[7, i].item(), turned[7, i + 4].item()) == pytest.approx(expected, abs=1e-5)
    scores = turned @ rotate(k.expand(1, 1, 30, 8), *angles)[0, 0].T  # (T, T)
    for distance in range(-5, 6):
        assert scores.diagonal(distance).std() < 1e-5
    one = rotate(q, *(x[7:8] for x in angles))
    assert torch.allclose(one[0, 0, 0], turned[7]) and torch.allclose(one, rotate(q, *rotary_angles(config, torch.tensor([[[7]]]))[:2]))


@pytest.mark.parametrize("scaling", [("linear", 4.0), ("llama3", 4.0, 1.0, 2.0, 64.0)])
def test_context_scaling_stretches_all_wavelengths_or_only_those_longer_than_the_context(scaling):
    options, at = LLAMA | {"rope_theta": 1e4}, torch.tensor([1.0])
    plain, scaled = (rotary_angles(tiny(**options, rope_scaling=s).config, at)[1][0, :4].asin() for s in ((), scaling))  # (D/2,), small angles
    wavelengths = 2 * math.pi / torch.tensor([1e4 ** (-2 * i / 8) for i in range(4)])  # 6, 63, 628, 6283
    kept = wavelengths < 32 if scaling[0] == "llama3" else wavelengths < 0
    assert torch.allclose(scaled[kept], plain[kept]) and torch.allclose(scaled[wavelengths > 64], plain[wavelengths > 64] / 4, rtol=1e-4)
    between = (wavelengths > 32) & (wavelengths < 64)  # 2 turns to 1 within the context: from kept to stretched
    assert (scaling[0] == "linear") or (plain[between] / 4 < scaled[between]).all() and (scaled[between] < plain[between]).all() and between.any()


# ---------------------------------------------------------------------------------------------------------
# Activations computed again instead of kept

@pytest.mark.parametrize("options", [{}, LLAMA, {"dropout": 0.3}])
def test_recomputed_activations_change_neither_loss_nor_gradients(batch, options):
    model, (ids, mask) = tiny(**options).train(), batch
    calls, results = [], []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.transformer.checkpoint_activations in (False, True):
        calls.clear()
        torch.manual_seed(0)
        loss = -model(ids, mask)[0].sum()
        forward = len(calls)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
        assert (forward, len(calls)) == (2, 4 if model.transformer.checkpoint_activations else 2)
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-6)
    calls.clear()
    with torch.no_grad():
        model(ids, mask)
    assert len(calls) == 2


# ---------------------------------------------------------------------------------------------------------
# What the mutants found untested

@pytest.mark.parametrize("stops", [(0,), (3, 0), (0, 3), (1, 5, 3)])
def test_a_reply_ends_with_whichever_of_the_stops_comes_first(stops):
    tokenizer = SimpleNamespace(eos=stops[0], stops=stops, pad=63)
    out = generate(Countdown(), [[9], [50, 4], [20]], 18, tokenizer)
    replies = [list(range(n - 1, max(stop for stop in stops if stop < n) - 1, -1))[:18] for n in (9, 4, 20)]
    assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == replies
    assert out.ended.tolist() == [reply[-1] in stops for reply in replies]


@pytest.mark.parametrize("options", DIALECTS)
def test_every_norm_has_the_eps_of_the_config(options):
    norms = [m for m in tiny(norm_eps=0.01, **options).modules() if isinstance(m, (torch.nn.LayerNorm, torch.nn.RMSNorm))]
    assert len(norms) >= 4 and {m.eps for m in norms} == {0.01}


@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_prepare_switches_the_recomputation_of_activations_on(batch, kind):
    model, calls = tiny(kind), []
    model_file.prepare(model, SimpleNamespace(checkpoint_activations=True, lora_rank=0))
    model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.transformer(batch[0]).sum().backward()
    assert len(calls) == 2
