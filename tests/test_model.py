"""model.py against slow, independent computations and against `transformers`."""
import itertools
import math
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model as adapters
import head as head_file
import generate as generate_file

from plumbing.flags import UserError
from model import GPT, GPTConfig, ScalarModel, last_scores, rotary_angles, rotate, shifted, values_before
from generate import Generation, generate, sample_token, uniforms
from head import token_logprobs
from formats.tokenizer import Tokenizer

VOCAB = 261
CPU = torch.device("cpu")


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

@pytest.mark.case(24)
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
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    states, weight, targets = torch.randn(23, 32).bfloat16(), torch.randn(VOCAB, 32).bfloat16(), torch.randint(VOCAB, (23,))
    logprobs, entropy = token_logprobs(states, weight, targets, 1.0, with_entropy=True)
    exact = (states.float() @ weight.float().T).bfloat16().float().log_softmax(-1)  # logits are rounded, what follows is not
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, exact[range(23), targets], atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(entropy, -(exact.exp() * exact).sum(-1), atol=1e-2, rtol=0)


@pytest.mark.parametrize("at_once", [1 << 25, 5 * VOCAB, 1])  # one chunk, five, one row each
def test_chunks_change_neither_values_nor_gradients(monkeypatch, at_once):
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
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
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", 20 * VOCAB if chunked else n * VOCAB)  # of many rows a half at once
    states, weight = torch.randn(n, width, requires_grad=True), torch.randn(VOCAB, width, requires_grad=True)
    with LargestTensor() as forward:
        logprobs, entropy = token_logprobs(states, weight, torch.randint(VOCAB, (n,)), with_entropy=True)
    with LargestTensor() as backward:
        (logprobs + entropy).sum().backward()
    assert forward.numel == backward.numel == (10 if chunked else n) * 320  # VOCAB rounded up to 64


def head_inputs(n, vocabulary=VOCAB, width=32):
    torch.manual_seed(n)
    return torch.randn(n, width), 0.4 * torch.randn(vocabulary, width), torch.randint(vocabulary, (n,)), torch.randn(n), torch.randn(n)


def head_loss(logprobs, entropy, way, a, b):
    """What the gradient is taken of: all log-probabilities weighing the same, or weighted sums of them, of the entropies, of both."""
    return {"sum": lambda: 3 * logprobs.sum(), "logprobs": lambda: (a * logprobs).sum(), "entropy": lambda: (b * entropy).sum(),
            "both": lambda: (a * logprobs + b * entropy).sum()}[way]()


def head_in_float64(states, weight, targets, temperature):
    """Log-probabilities, entropies (N,) and the leaves that they come from: log_softmax of all logits, differentiated by autograd."""
    leaves = states.double().requires_grad_(), weight.double().requires_grad_()
    full = (leaves[0] @ leaves[1].T / temperature).log_softmax(-1)
    return full.gather(1, targets[:, None]).squeeze(1), -(full.exp() * full).sum(-1), leaves


@pytest.mark.parametrize("at_once", [1 << 26, 5 * VOCAB, 1], ids=["kept", "chunks", "rows"])
@pytest.mark.parametrize("way", ["summed", "sum", "logprobs", "entropy", "both"])
@pytest.mark.parametrize("n", [0, 1, 23])
def test_the_heads_gradient_is_that_of_float64_autograd_however_it_is_computed_and_whatever_is_frozen(monkeypatch, n, way, at_once):
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    states, weight, targets, a, b = head_inputs(n)
    logprobs, entropy, leaves = head_in_float64(states, weight, targets, 0.7)
    expected = torch.autograd.grad(head_loss(logprobs, entropy, "sum" if way == "summed" else way, a.double(), b.double()), leaves)
    for trained in ((True, True), (True, False), (False, True)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((states, weight), trained)]
        got, got_entropy = token_logprobs(*leaves, targets, 0.7, with_entropy=way in ("entropy", "both"), summed=way == "summed")
        torch.testing.assert_close(got, logprobs.float().sum() if way == "summed" else logprobs.float(), atol=1e-5 * max(1, n if way == "summed" else 1), rtol=1e-6)
        if got_entropy is not None:
            torch.testing.assert_close(got_entropy, entropy.float(), atol=1e-5, rtol=0)
        (3 * got if way == "summed" else head_loss(got, got_entropy, way, a, b)).backward()
        for leaf, need, exact in zip(leaves, trained, expected):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, exact.float(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1 << 26, 5 * VOCAB], ids=["kept", "chunks"])
def test_a_second_backward_pass_repeats_the_first_or_is_refused(monkeypatch, at_once):
    """The kept softmax is written over by the first: what it leaves must not pass for a gradient."""
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    for summed, with_entropy in ((True, False), (False, True), (False, False)):
        states, weight, targets, a, _ = head_inputs(23)
        logprobs, _ = token_logprobs(states.requires_grad_(), weight.requires_grad_(), targets, 1.0, with_entropy, summed)
        loss = (logprobs * (1 if summed else a)).sum()
        first = torch.autograd.grad(loss, (states, weight), retain_graph=True)
        try:
            second = torch.autograd.grad(loss, (states, weight))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error) and not summed and not with_entropy and at_once == 1 << 26
        else:
            torch.testing.assert_close(second, first, atol=0, rtol=0)


@pytest.mark.parametrize("at_once", [1 << 26, 5 * VOCAB], ids=["kept", "chunks"])
@pytest.mark.parametrize("way", ["summed", "logprobs", "both"])
def test_the_head_in_bf16_keeps_its_bounds_of_values_and_gradients_in_fp32(monkeypatch, way, at_once):
    """The bounds are about three times what was measured: log-probabilities (of -8 to -30) are off by up to 0.055 and their mean
    by 0.0009, entropies by 0.033, gradients by 1.4 % of the largest, 2 % with entropies."""
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    states, weight, targets, a, b = head_inputs(200)
    results = []
    for reduced in (False, True):
        leaves = [t.clone().requires_grad_() for t in (states, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            got, entropy = token_logprobs(*leaves, targets, 0.7, with_entropy=way == "both", summed=way == "summed")
        (got if way == "summed" else head_loss(got, entropy, way, a, b)).backward()
        assert got.dtype == torch.float32 and all(leaf.grad.dtype == torch.float32 for leaf in leaves)
        results.append((got / len(targets) if way == "summed" else got, *(leaf.grad for leaf in leaves), *([entropy] if way == "both" else [])))
    torch.testing.assert_close(results[1][0], results[0][0], atol=0.003 if way == "summed" else 0.16, rtol=0)
    for exact, found in zip(results[0][1:3], results[1][1:3]):
        assert (found - exact).abs().max() < (0.06 if way == "both" else 0.03) * exact.abs().max()
    if way == "both":
        torch.testing.assert_close(results[1][3], results[0][3], atol=0.1, rtol=0)


def confident(p, N=64, V=320, C=64):
    """States (N, C), weight (V, C) and targets (N,) whose probability is p, to one in a hundred of 1 - p."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.1 * torch.randn(V, C, generator=generator)
    targets = torch.randperm(V, generator=generator)[:N]
    states = weight[targets] + 0.03 * torch.randn(N, C, generator=generator)
    logits = states.double() @ weight.double().T
    low, high = torch.zeros(N, 1).double(), torch.full((N, 1), 1000.0).double()
    for _ in range(60):  # the factor of the states that gives it
        middle = (low + high) / 2
        enough = (logits * middle).softmax(1).gather(1, targets[:, None]) > p
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return (states * high).float(), weight, targets


@pytest.mark.parametrize("at_once", [1 << 26, 5 * 320], ids=["kept", "chunks"])
@pytest.mark.parametrize("way", ["summed", "logprobs", "both"])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.994, 0.9995, 0.99994, 0.99999])
def test_the_bf16_gradient_of_a_confident_token_is_as_good_as_autocasts(monkeypatch, p, way, at_once):
    """Measured: 0.4 to 1.0 of autocast's error; with the softmax rounded before 1 is subtracted, 4 at 0.994 and 20 at 0.99994."""
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    states, weight, targets = confident(p)
    b = torch.randn(len(targets), generator=torch.Generator().manual_seed(4))

    def gradient(leaf, logprobs, entropy):
        loss = logprobs.sum() + (0.1 * b * entropy).sum() if way == "both" else logprobs.sum()
        return torch.autograd.grad(loss, leaf)[0].double()

    logprobs, entropy, leaves = head_in_float64(states.bfloat16(), weight.bfloat16(), targets, 1.0)
    exact = gradient(leaves[0], logprobs, entropy)
    leaf = states.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        full = F.linear(leaf, weight).float().log_softmax(-1)
        peer = gradient(leaf, full.gather(1, targets[:, None]), -(full.exp() * full).sum(-1))
        logprobs, entropy = token_logprobs(leaf, weight, targets, 1.0, way == "both", summed=way == "summed")
    ours = gradient(leaf, logprobs, entropy)
    errors = [((got - exact).norm(dim=1) / exact.norm(dim=1)).mean().item() for got in (ours, peer)]
    assert errors[0] < 1.5 * errors[1] and errors[0] < 0.1, errors


def test_log_probabilities_of_confident_tokens_keep_their_digits():
    """log p = -1e-6 beside logits of 300: as a difference of such numbers it would be a multiple of 3e-5."""
    states = torch.tensor([[1.0]])
    weight = torch.tensor([[300.0], [300 - 13.8], [100.0]])
    logprobs, entropy = token_logprobs(states, weight, torch.tensor([0]), with_entropy=True)
    full = (states.double() @ weight.double().T).log_softmax(-1)
    assert logprobs.item() == pytest.approx(full[0, 0].item(), rel=0.07)
    assert entropy.item() == pytest.approx(-(full.exp() * full).sum().item(), rel=0.07)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e2, 2e4, 1e6])
def test_columns_that_fill_up_have_no_probability_however_low_the_logits(size, dtype):
    """60 of 64 columns are none of the vocabulary; logits of -size must not fall below theirs."""
    states, weight = torch.tensor([[1.0, 0.5]], dtype=dtype), torch.tensor([[-size, 0.0], [-size, 1.0], [-size, 2.0], [-size, -3.0]], dtype=dtype)
    logprobs, entropy = token_logprobs(states, weight, torch.tensor([2]), 0.5, with_entropy=True)
    logits = ((states / 0.5) @ weight.T).double()
    full = logits.log_softmax(-1)
    assert logprobs.item() == pytest.approx(full[0, 2].item(), abs=1e-5)
    assert entropy.item() == pytest.approx(-(full.exp() * full).sum().item(), abs=1e-5)


@pytest.mark.parametrize("wide, bound", [(True, 0.002), (False, 0.5)])
def test_logits_near_minus_100_are_rounded_only_where_the_product_cant_come_out_in_fp32(monkeypatch, wide, bound):
    """CUDA's product of bfloat16 matrices can; here a kernel for the CPU stands for it."""
    torch.manual_seed(0)
    states, weight, targets = torch.randn(50, 32), 0.4 * torch.randn(VOCAB, 32), torch.randint(VOCAB, (50,))
    states[:, 0], weight[:, 0] = 100, -1
    states, weight = states.bfloat16(), weight.bfloat16()
    expected, _, leaves = head_in_float64(states, weight, targets, 1.0)
    exact = torch.autograd.grad(expected.sum(), leaves)
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("mm.dtype_out", lambda a, b, out_dtype, out: torch.mm(a.float(), b.float(), out=out), "CPU")
    monkeypatch.setattr(head_file, "float32_products", lambda device: wide)
    leaves = states.requires_grad_(), weight.requires_grad_()
    logprobs, _ = token_logprobs(*leaves, targets)
    error = (logprobs - expected).abs().max()
    assert error < bound and (wide or error > 0.05)
    found = torch.autograd.grad(token_logprobs(*leaves, targets, summed=True)[0], leaves)
    for got, right in zip(found, exact):
        assert (got - right).norm() < (0.02 if wide else 0.2) * right.norm()
    kernels._destroy()


def test_a_float16_gradient_that_overflows_shrinks_with_the_loss():
    """The target's row adds up 4,096 states of 30, more than float16 holds; divided by their number it does not."""
    states, weight, targets = torch.full((4096, 8), 30.0).half(), torch.zeros(64, 8).half().requires_grad_(), torch.zeros(4096, dtype=torch.long)
    for scale, finite in ((1.0, False), (1 / 4096, True)):
        total, _ = token_logprobs(states, weight, targets, summed=True)
        gradient, = torch.autograd.grad(total * scale, weight)
        assert gradient.isfinite().all() == finite


@pytest.mark.parametrize("at_once", [1 << 26, 1], ids=["kept", "rows"])
def test_probabilities_that_underflow_have_the_right_logarithm_and_finite_gradients(monkeypatch, at_once):
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    states, weight = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 0.0]]), torch.tensor([[100.0, 1.0], [-100.0, 2.0], [-100.0, 3.0], [99.0, -1.0]])
    targets = torch.tensor([1, 0, 2])  # 200 below the largest logit, and one among equals
    logprobs, entropy, leaves = head_in_float64(states, weight, targets, 1.0)
    expected = torch.autograd.grad((logprobs + 2 * entropy).sum(), leaves)
    leaves = states.requires_grad_(), weight.requires_grad_()
    got, got_entropy = token_logprobs(*leaves, targets, with_entropy=True)
    assert got[0].item() == pytest.approx(-200 - math.log1p(math.exp(-1)), abs=2e-5)
    torch.testing.assert_close((got, got_entropy), (logprobs.float(), entropy.float()), atol=2e-5, rtol=0)
    found = torch.autograd.grad((got + 2 * got_entropy).sum(), leaves)
    torch.testing.assert_close(found, tuple(x.float() for x in expected), atol=2e-4, rtol=1e-5)
    alone, _ = token_logprobs(*leaves, targets)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(alone.sum(), leaves))


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, while they live; peak is the most at any time, sizes are those of each."""

    def __init__(self, *known):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, []
        self.known = {t.untyped_storage()._cdata for t in known}

    def freed(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.known:
                storage = t.untyped_storage()
                self.known.add(storage._cdata)
                self.sizes.append(storage.nbytes())
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
                self.peak = max(self.peak, self.now)
        return out


@pytest.mark.parametrize("way, tokens, most", [("summed", 8192, 0.1), ("logprobs", 8192, 0.1), ("both", 8192, 0.25)])
def test_the_head_takes_a_fraction_of_the_memory_of_all_logits(way, tokens, most):
    """Autograd of log_softmax takes three times the logits' fp32 memory (five times with entropies) beyond inputs and gradients;
    measured at 8,192 tokens: 0.077 times (0.157)."""
    N, V, C = tokens, 50257, 32
    states, weight, targets, a, b = head_inputs(N, V, C)
    with Memory(states.requires_grad_(), weight.requires_grad_(), targets, a, b) as memory:
        got, entropy = token_logprobs(states, weight, targets, with_entropy=way == "both", summed=way == "summed")
        (got if way == "summed" else head_loss(got, entropy, way, a, b)).backward()
    gradients = 4 * (states.numel() + weight.numel())
    assert gradients <= memory.now < gradients + 1e6
    assert memory.peak - gradients < most * 4 * N * V


@pytest.mark.parametrize("summed", [True, False])
def test_no_gradient_of_the_head_is_computed_where_nobody_wants_it(summed):
    states, weight, targets, _, _ = head_inputs(23)
    size = 4 * weight.numel()
    with torch.no_grad(), Memory(states, weight) as memory:
        token_logprobs(states.requires_grad_(), weight.requires_grad_(), targets, summed=summed)
    assert memory.sizes and size not in memory.sizes
    for trained in (False, True):
        with Memory(states, weight) as memory:
            token_logprobs(states, weight.requires_grad_(trained), targets, summed=summed)[0].sum().backward()
        assert (size in memory.sizes) == trained


# ---------------------------------------------------------------------------------------------------------
# Masks and padding

@pytest.mark.case(31)
def test_an_empty_mask_gives_zeros_and_a_zero_gradient(batch):
    model, critic, (ids, _) = tiny(), tiny(ScalarModel), batch
    nothing = torch.zeros(ids.shape, dtype=torch.bool)
    outputs = *model(ids, nothing, with_entropy=True), values_before(critic, ids, nothing)
    assert all(x.shape == ids.shape and not x.any() for x in outputs)
    sum(x.sum() for x in outputs).backward()
    grads = [p.grad for m in (model, critic) for p in m.parameters() if p.grad is not None]
    assert grads and not any(grad.any() for grad in grads)


@pytest.mark.case(24)
def test_padding_changes_nothing_and_a_row_alone_equals_the_row_in_a_batch(batch):
    model, critic, (ids, mask) = tiny(), tiny(ScalarModel), batch

    def outputs(ids, mask, lengths):
        return *model(ids, mask, 0.7, with_entropy=True), values_before(critic, ids, mask), last_scores(critic, ids, lengths)

    padded = outputs(ids, mask, LENGTHS)
    padding = torch.arange(12) >= LENGTHS[:, None]
    other = outputs(torch.where(padding, torch.randint(VOCAB, ids.shape), ids), mask, LENGTHS)
    assert all(torch.equal(x, y) for x, y in zip(padded, other))
    for b, row in rows_alone(ids):
        n = row.shape[1]
        for together, alone in zip(padded, outputs(row, mask[b:b + 1, :n], LENGTHS[b:b + 1])):
            torch.testing.assert_close(together[b, :n] if together.ndim == 2 else together[b], alone[0], atol=2e-5, rtol=0)


@pytest.mark.case(24)
@pytest.mark.parametrize("seed", range(8))
def test_rows_of_any_lengths_in_any_order_get_what_each_gets_alone(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(2, 32) for _ in range(rng.randint(2, 9))]
    rows = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed)) for n in lengths]
    starts = [rng.randint(1, n - 1) for n in lengths]
    model, critic = (tiny(kind, seed, **[{}, LLAMA, OPT, NORM_AFTER][seed % 4]) for kind in (GPT, ScalarModel))

    def outputs(chosen):
        """Log-probabilities, values and score of each of the chosen rows, in one batch, padded with anything."""
        ids = torch.randint(VOCAB, (len(chosen), max(lengths[i] for i in chosen)))
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for b, i in enumerate(chosen):
            ids[b, :lengths[i]] = rows[i]
            mask[b, starts[i]:lengths[i]] = True
        with torch.no_grad():
            found = model(ids, mask)[0], values_before(critic, ids, mask), last_scores(critic, ids, torch.tensor([lengths[i] for i in chosen]))
        return {i: torch.cat([found[0][b, mask[b]], found[1][b, mask[b]], found[2][b:b + 1]]) for b, i in enumerate(chosen)}

    alone = {i: outputs([i])[i] for i in range(len(rows))}
    for order in (range(len(rows)), rng.sample(range(len(rows)), len(rows))):
        for i, found in outputs(list(order)).items():
            torch.testing.assert_close(found, alone[i], atol=1e-5, rtol=0)


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
    ids, mask = torch.zeros(1, 33, dtype=torch.long), torch.arange(33)[None] > 0
    model(ids[:, :32], mask[:, :32])
    with pytest.raises(UserError, match="33 tokens .* context of 32"):
        model(ids, mask)


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
NORM_AFTER = OPT | {"norm_after": True, "embed_dim": 16}
DIALECTS = [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "bias": False}, {"bias": False}, LLAMA, OPT, NORM_AFTER,
            LLAMA | {"tied": False, "qk_norm": True, "head_dim": 10, "qkv_bias": True, "rope_scaling": ("llama3", 8.0, 1.0, 4.0, 16.0)}]


@pytest.mark.case(24)
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


class Countdown(GPT):
    """After token n it says n - 1, down to 0, the end token. passes: (whether over prompts, ids) of each pass of its trunk."""

    def __init__(self):
        super().__init__(GPTConfig(64, 64, 1, 1, 1, 64, tied=False))
        with torch.no_grad():
            for p in self.transformer.h.parameters():
                p.zero_()  # the block adds nothing
            self.transformer.wpe.weight.zero_()
            self.transformer.wte.weight.copy_(torch.eye(64))
            self.lm_head.weight.copy_(1e4 * torch.eye(64).roll(1, 1))  # token n - 1 looks at n
            self.lm_head.weight[0, 0] = 1e4
        self.passes = []
        self.transformer.register_forward_pre_hook(lambda _, args: self.passes.append((args[1].positions is None, args[0].tolist())))

    def decoded(self):
        """The tokens that went into each step of decoding, one per row; a row that is done says 0."""
        return [[n for n, in ids] for prompts, ids in self.passes if not prompts]


STARTS = [(1,), (1, 1, 1), (9,), (8, 20), (1, 2, 3, 8, 9, 20), (20, 3, 8, 2, 1, 1, 2, 30, 7, 4), (5, 5, 5, 5)]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, where generate asks less often who has ended")


@pytest.mark.case(23)
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
            steps = model.decoded()
            assert len(steps) == max(map(len, replies))  # stops with the last row
            for step, rows in enumerate(steps):  # rows that are done leave the batch when they are a quarter of it
                assert 3 * len(rows) < 4 * sum(len(reply) > step for reply in replies)


@pytest.mark.parametrize("options", DIALECTS)
def test_replies_are_the_same_however_few_rows_are_decoded_at_once(options):
    number, model = 10, tiny(vocab_size=12, seed=3, **options)
    prompts = [*PROMPTS, [1], [5, 9, 2, 6, 5, 3, 5], [4], [1], [2, 3]]
    slow = {tuple(prompt): slow_greedy(model, prompt, number) for prompt in prompts}
    eos = max(range(12), key=lambda token: len({len(until_end(tokens, token)) for tokens in slow.values()}))
    expected = [until_end(slow[tuple(prompt)], eos) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) >= 4
    together = generate(model, prompts, number, ends(eos, 0), temperature=0)
    for rows in (1, 2, 3, 4, 5, 8, 12, 13, 99):
        out = generate(model, prompts, number, ends(eos, 0), temperature=0, rows=rows)
        assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == expected
        assert all(torch.equal(x, y) for x, y in zip(out, together))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 10, 40])
def test_a_waiting_prompt_takes_the_place_of_a_reply_that_is_done_and_nothing_is_decoded_after_the_last(rows, device):
    starts = torch.randint(1, 20, (30,), generator=torch.Generator().manual_seed(rows)).tolist()
    model = Countdown().to(device)
    out = generate(model, [[20 + i] * (i % 4 + 1) + [n] for i, n in enumerate(starts)], 20, ends(0, 63), rows=rows)  # no two are equal
    assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == [list(range(n - 1, -1, -1)) for n in starts]
    assert out.ended.all() and out.lengths.tolist() == [i % 4 + 2 + n for i, n in enumerate(starts)]
    if device == "cpu":
        admitted, waiting = 0, []  # of each step: how many prompts wait
        for prompts, ids in model.passes:
            if prompts:
                admitted += len(ids)
            else:
                waiting.append(30 - admitted)
        steps = model.decoded()
        for step, left in zip(steps, waiting):
            assert len(step) == min(rows, 30) if left else len(step) <= rows
            assert 4 * step.count(0) < len(step)  # those that are done and still there
        assert admitted == 30 and sum(n > 0 for step in steps for n in step) == sum(starts)


def test_equal_prompts_are_passed_over_once_and_get_samples_of_their_own():
    model = Countdown()
    out = generate(model, [[9], [50, 4], [9], [9], [50, 4], [3]], 12, ends(0, 63))
    assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == [list(range(n - 1, -1, -1)) for n in (9, 4, 9, 9, 4, 3)]
    over_prompts = [ids for prompts, ids in model.passes if prompts]
    assert over_prompts == [[[9, 63], [50, 4], [3, 63]]]
    model = tiny()
    out = generate(model, [[3, 1, 4]] * 8 + [[2]] * 8, 6, ends(VOCAB, 0), generator=torch.Generator().manual_seed(0), rows=5)
    replies = [tuple(ids[mask].tolist()) for ids, mask in zip(out.ids, out.mask)]
    assert len(set(replies[:8])) == 8 and len(set(replies[8:])) == 8


@pytest.mark.parametrize("rows", [0, 300])
def test_samples_of_rows_that_wait_follow_the_model_too(rows):
    """As below: minus the mean log-probability of samples is their mean entropy, whichever row they came from."""
    model, n, generator = tiny(vocab_size=12), 2000, torch.Generator().manual_seed(0)
    prompts = [[3, 1, 4], [2], [5, 6]] * (n // 3)
    out = generate(model, prompts, 6, ends(7, 0), generator=generator, rows=rows)
    with torch.no_grad():
        logprobs, entropy = model(out.ids, out.mask, with_entropy=True)
    difference = (logprobs + entropy)[out.mask]
    assert len(set(out.lengths.tolist())) >= 6 and difference.mean().abs() < 4 * difference.std() / math.sqrt(len(difference))


class Decoded:
    """While it lasts, remembers the log-probabilities (n, V) that tokens are drawn from, one per step."""

    def __init__(self, patch):
        self.steps = []
        patch.setattr(generate_file, "sample_token", self.sample)

    def sample(self, logits, *options):
        self.steps.append(logits.log_softmax(-1))
        return sample_token(logits, *options)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.35)])
@pytest.mark.parametrize("options", [{}, LLAMA, OPT, NORM_AFTER])
def test_decoding_computes_the_log_probabilities_of_training(monkeypatch, options, dtype, bound):
    """At every token of the vocabulary, along sampled replies. Measured: up to 9e-6 apart, in bfloat16 0.12, a third of the bound."""
    model, number = tiny(seed=5, block_size=64, n_layer=3, **options), 40
    with monkeypatch.context() as patch, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        decoded = Decoded(patch)
        out = generate(model, PROMPTS, number, ends(VOCAB, 0), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            full = model.logits(model.transformer(out.ids)).float().log_softmax(-1)  # (B, T, V)
    assert len(decoded.steps) == number
    found = torch.stack(decoded.steps, 1)  # (B, number, V)
    for b, prompt in enumerate(PROMPTS):
        assert (found[b] - full[b, len(prompt) - 1:len(prompt) - 1 + number]).abs().max() < bound


@pytest.mark.parametrize("options", [{}, LLAMA, NORM_AFTER])
@pytest.mark.parametrize("reduced", [False, True])
def test_decoding_with_adapters_is_decoding_with_the_merged_weights(options, reduced):
    merged = tiny(seed=2, **options)
    model = tiny(seed=2, **options)
    adapters.add_lora(model, 4, 8, 0.1, "all")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p += 0.3 * torch.randn_like(p)
    plain = [generate(network, PROMPTS, 12, ends(VOCAB, 0), temperature=0).ids for network in (merged, model)]
    merged.load_state_dict(adapters.merged_weights(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        a, b = (generate(network, PROMPTS, 12, ends(VOCAB, 0), temperature=0, rows=3).ids for network in (merged, model))
    assert torch.equal(a, b) and not torch.equal(*plain)
    if not reduced:
        assert [ids[len(p):len(p) + 12].tolist() for ids, p in zip(b, PROMPTS)] == [slow_greedy(model, p, 12) for p in PROMPTS]


@pytest.mark.parametrize("lora", [False, True])
def test_generation_leaves_the_model_as_it_was_even_when_it_fails(monkeypatch, batch, lora):
    model = tiny()
    if lora:
        adapters.add_lora(model, 2, 4, 0.0, "attention")
    before, weights = model(*batch)[0], {name: t.clone() for name, t in model.state_dict().items()}
    inside = []

    def fail(*_):
        inside.extend("forward" in vars(module) for module in model.transformer.modules() if isinstance(module, torch.nn.Linear))
        raise KeyboardInterrupt

    generate(model, PROMPTS, 4, ends(VOCAB, 0))
    monkeypatch.setattr(generate_file, "sample_token", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, 4, ends(VOCAB, 0))
    assert len(inside) == 8 and all(inside)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.state_dict().keys() == weights.keys() and all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(*batch)[0], before)


def test_texts_are_the_responses_without_control_tokens(tokenizer):
    out = SimpleNamespace(ids=torch.tensor([[259, 65, 260, 66, 67, 256], [65, 260, 256, 257, 257, 257]]),
                          mask=torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]]).bool())
    assert Generation.texts(out, tokenizer) == ["BC", ""]


def test_a_seed_repeats_the_sample_and_another_seed_does_not():
    model, end = tiny(), ends(256, 257)
    a, b, c = (generate(model, PROMPTS, 12, end, generator=torch.Generator().manual_seed(seed)).ids for seed in (1, 1, 2))
    assert torch.equal(a, b) and a.tolist() != c.tolist()


def slow_samples(model, prompts, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """What the uniform numbers (B, tokens, 2) draw, each reply alone and without a cache; no token ends it."""
    replies = []
    for prompt, numbers in zip(prompts, uniform):
        ids = list(prompt)
        for number in numbers:
            with torch.no_grad():
                logits = model.logits(model.transformer(torch.tensor([ids])))[:, -1]
            ids.append(int(sample_token(logits, temperature, top_k, top_p, number[None])))
        replies.append(ids[len(prompt):])
    return replies


@pytest.mark.case(24)
@pytest.mark.parametrize("options, sampling", [*[(options, {}) for options in DIALECTS], ({}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9})])
def test_a_reply_depends_on_its_prompt_and_its_own_uniform_numbers_alone(options, sampling):
    """Not on what else is in the batch, in which order, on how many rows are decoded at once, on a cache, or on when those before it end."""
    number, model = 10, tiny(vocab_size=12, seed=3, **options)
    prompts = [*PROMPTS, [1], [3, 1, 4]]  # two of them twice
    uniform = uniforms(len(prompts), number, torch.Generator().manual_seed(4), CPU)
    slow = slow_samples(model, prompts, uniform, **sampling)
    eos = max(range(12), key=lambda token: len({len(until_end(tokens, token)) for tokens in slow}))
    expected = [until_end(tokens, eos) for tokens in slow]
    assert len({len(reply) for reply in expected}) >= 4 and slow[1] != slow[8] and slow[0] != slow[9]
    for order in (range(10), range(9, -1, -1), [3], [8, 1], [4, 0, 9, 7, 2]):
        for rows in (0, 1, 2, 3):
            order = list(order)
            out = generate(model, [prompts[i] for i in order], number, ends(eos, 0), rows=rows, uniform=uniform[order], **sampling)
            assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == [expected[i] for i in order]


def test_a_generator_stands_for_the_uniform_numbers_that_it_draws():
    model, uniform = tiny(vocab_size=12), uniforms(len(PROMPTS), 9, torch.Generator().manual_seed(6), CPU)
    drawn, given = (generate(model, PROMPTS, 9, ends(7, 0), **how).ids for how in ({"generator": torch.Generator().manual_seed(6)}, {"uniform": uniform}))
    assert torch.equal(drawn, given)


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_generation_leaves_it_at_the_tokens_that_are_there_when_it_is_interrupted(rows, tokens):
    model, asked = tiny(vocab_size=12), []

    def interrupted():
        asked.append(1)
        return len(asked) > tokens

    whole, cut = (generate(model, PROMPTS, 12, ends(12, 0), generator=torch.Generator().manual_seed(0), rows=rows, interrupted=ask)
                  for ask in (lambda: False, interrupted))
    assert len(asked) == tokens + 1 and not cut.ended.any() and cut.lengths.max() == cut.ids.shape[1]
    for b, prompt in enumerate(PROMPTS):  # a row for each, or the first ones alone have one
        reply = cut.ids[b][cut.mask[b]].tolist()
        assert reply == whole.ids[b][whole.mask[b]].tolist()[:tokens if rows == 0 or b < rows else 0] and cut.lengths[b] == len(prompt) + len(reply)


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


def sample(logits, temperature, top_k, top_p, generator):
    """Tokens (B,) for logits (B, V), with numbers of a generator."""
    return sample_token(logits, temperature, top_k, top_p, uniforms(1, len(logits), generator, CPU)[0])


def truncated(probs, top_k, top_p):
    """Slow: walk down the tokens in order of probability, stop after top_k or once what remains of them has top_p."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[:top_k or None]
    total, kept, reached = sum(probs[i] for i in order), [], 0.0
    for i in order:
        if reached < top_p:
            kept.append(i)
            reached += probs[i] / total
    kept, total = set(kept), sum(probs[j] for j in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.7, 3, 1.0), (1.0, 0, 0.8),
                                                        (0.8, 6, 0.7), (1.0, 50, 0.01)])
def test_sample_frequencies_equal_the_truncated_softmax(temperature, top_k, top_p):
    n, logits = 20000, 1.5 * torch.randn(2, 12, generator=torch.Generator().manual_seed(4))
    tokens = sample(logits.repeat(n, 1), temperature, top_k, top_p, torch.Generator().manual_seed(0)).view(n, 2)
    for column in (0, 1):
        weights = [math.exp(x / temperature) for x in logits[column].tolist()]
        expected = torch.tensor(truncated([w / sum(weights) for w in weights], top_k, top_p))
        found = tokens[:, column].bincount(minlength=12) / n
        assert (found[expected == 0] == 0).all()
        assert (found - expected).abs().sum() / 2 < 0.015
    assert torch.equal(sample_token(logits, 0, top_k, top_p, None), logits.argmax(-1))


def chi_square(counts, expected):
    """Pearson's statistic of counts against expected ones as a standard normal number (Wilson & Hilferty 1931); cells below 5 in one."""
    few = expected < 5
    counts, expected = (torch.cat([x[~few], x[few].sum()[None]]).double() for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    k = len(counts) - 1
    return (((((counts - expected) ** 2 / expected).sum() / k) ** (1 / 3) - 1 + 2 / (9 * k)) / math.sqrt(2 / (9 * k))).item()


@pytest.mark.parametrize("vocabulary", [12, 256, 257, 1000])
@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 9, 1.0), (1.3, 0, 0.9), (0.8, 200, 0.8)])
def test_samples_pass_a_chi_square_test_in_one_group_of_tokens_and_in_several(vocabulary, temperature, top_k, top_p):
    n, generator = 40000, torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(vocabulary, generator=generator)
    tokens = torch.cat([sample(logits.expand(n // 8, -1), temperature, top_k, top_p, generator) for _ in range(8)])
    probs = torch.tensor(truncated((logits.double() / temperature).softmax(-1).tolist(), top_k, top_p))
    counts = tokens.bincount(minlength=vocabulary)
    assert len(counts) == vocabulary and not counts[probs == 0].any()
    assert abs(chi_square(counts, n * probs)) < 3.5
    assert abs(chi_square(counts, n * (probs + probs.roll(1)) / 2)) > 10  # it would notice


def test_a_token_of_probability_zero_is_never_drawn():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        logits = torch.randn(10000, 1000, generator=generator)
        assert torch.equal(sample(logits, 1.0, 1, 1.0, generator), logits.argmax(-1))


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 1000])
def test_the_smallest_and_the_largest_random_number_draw_tokens_that_can_be_drawn(vocabulary):
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    allowed[1::2] = True
    logits = torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(0)).masked_fill(~allowed, -math.inf)
    for number, token in ((0.0, 1), (1 - 2.0**-53, allowed.nonzero().max().item())):
        assert sample_token(logits, 1.0, 0, 1.0, torch.full((50, 2), number, dtype=torch.double)).tolist() == [token] * 50


def test_a_draw_takes_the_group_from_one_number_and_the_token_in_it_from_the_other():
    """Where all of 1000 tokens are as likely, what the two numbers draw can be written down: three groups of 256 and one of 232."""
    numbers = uniforms(1, 500, torch.Generator().manual_seed(7), CPU)[0]  # (500, 2)
    expected = [256 * group + int(b * min(256, 1000 - 256 * group)) for a, b in numbers.tolist() for group in [int(a * 1000 / 256)]]
    assert sample_token(torch.zeros(500, 1000), 1.0, 0, 1.0, numbers).tolist() == expected and len(set(expected)) > 350


def test_the_uniform_numbers_are_uniform_repeat_by_seed_and_are_two_per_token():
    numbers = uniforms(50, 40, torch.Generator().manual_seed(1), CPU)
    assert numbers.shape == (50, 40, 2) and numbers.dtype == torch.float64 and 0 <= numbers.min() and numbers.max() < 1
    assert abs(chi_square((numbers * 20).long().flatten().bincount(minlength=20), torch.full((20,), 200.0))) < 3.5
    assert torch.equal(numbers, uniforms(50, 40, torch.Generator().manual_seed(1), CPU))
    assert not torch.equal(numbers, uniforms(50, 40, torch.Generator().manual_seed(2), CPU))


def test_rows_of_a_sample_are_independent_and_so_are_group_and_token():
    """Two rows of equal logits: the pairs of their tokens are as frequent as the product says."""
    n, generator = 40000, torch.Generator().manual_seed(3)
    logits = torch.full((512,), -math.inf)
    logits[[3, 200, 300, 511]] = torch.tensor([0.0, 1.0, 0.5, -0.5])
    a, b = sample(logits.expand(2 * n, -1), 1.0, 0, 1.0, generator).view(n, 2).T
    assert abs(chi_square((512 * a + b).bincount(minlength=512 * 512), n * torch.outer(*[logits.softmax(-1)] * 2).flatten())) < 3.5


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

@pytest.mark.case(24)
@pytest.mark.parametrize("bias", [True, False])
def test_scores_and_values_equal_brute_force_row_by_row(batch, bias):
    model, (ids, mask) = tiny(ScalarModel, bias=bias), batch
    scores, values = last_scores(model, ids, LENGTHS), values_before(model, ids, mask)
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
    before, weights = model(ids), {name: p.detach().clone() for name, p in model.state_dict().items()}
    assert model.can_shift
    lower = shifted(weights, amount)
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in weights.items())  # those that are given stay as they are
    model.load_state_dict(lower)
    torch.testing.assert_close(before - model(ids), torch.full(ids.shape, amount), atol=1e-5, rtol=0)
    model.load_state_dict(shifted(lower, torch.tensor(-amount)))
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [LLAMA, OPT | {"norm_after": True}])
def test_a_model_whose_last_norm_has_no_bias_says_that_it_cant_be_shifted(options):
    assert not tiny(ScalarModel, **options).can_shift and tiny(ScalarModel).can_shift


# ---------------------------------------------------------------------------------------------------------
# Some positions alone

WANTED = {"a few": lambda ids: torch.tensor([0, 3, 12, 24, 25, 30, 31]),  # of three rows of four
          "all but the first": lambda ids: (torch.arange(12) > 0).expand(ids.shape).flatten().nonzero().squeeze(1),
          "real ones": lambda ids: (torch.arange(12) < LENGTHS[:, None]).flatten().nonzero().squeeze(1),
          "each last": lambda ids: torch.arange(len(ids)) * 12 + LENGTHS - 1,
          "one": lambda ids: torch.tensor([47]), "none": lambda ids: torch.tensor([], dtype=torch.long)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", [{}, LLAMA, NORM_AFTER, {"n_layer": 1}], ids=["gpt2", "llama", "norm_after", "one layer"])
@pytest.mark.parametrize("wanted", WANTED)
def test_some_states_scores_and_gradients_equal_those_among_all(batch, options, wanted, recompute):
    ids = batch[0]
    index = WANTED[wanted](ids)
    for kind in (GPT, ScalarModel):
        model = tiny(kind, **options)
        model.transformer.checkpoint_activations = recompute
        run = model.transformer if kind is GPT else model
        everything, some = run(ids).flatten(0, 1)[index], run(ids, index=index)
        torch.testing.assert_close(some, everything, atol=2e-5, rtol=1e-5)
        weights = torch.randn(some.shape, generator=torch.Generator().manual_seed(2))
        expected, found = (torch.autograd.grad((x * weights).sum(), list(run.parameters()), allow_unused=True) for x in (everything, some))
        assert sum(g is not None for g in found) > 5 or wanted == "none"
        for exact, grad in zip(expected, found):
            torch.testing.assert_close(torch.zeros(()) if grad is None else grad, torch.zeros(()) if grad is None else exact, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, LLAMA, NORM_AFTER])
def test_log_probabilities_scores_and_values_of_some_tokens_equal_those_of_all(batch, options):
    """Their gradients too, which the tests row by row don't look at."""
    (ids, mask), (model, critic) = batch, (tiny(kind, **options) for kind in (GPT, ScalarModel))
    g = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2))
    full = model.logits(model.transformer(ids))[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
    numbers = critic(ids)
    pairs = [(model, model(ids, mask)[0] * g, F.pad(full, (1, 0)) * mask * g), (model, model(ids, mask, summed=True)[0], (full * mask[:, 1:]).sum()),
             (critic, values_before(critic, ids, mask) * g, F.pad(numbers[:, :-1], (1, 0)) * mask * g),
             (critic, last_scores(critic, ids, LENGTHS) * g[0, :4], numbers[range(4), LENGTHS - 1] * g[0, :4])]
    for network, found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        found, expected = (torch.autograd.grad(x.sum(), list(network.parameters()), retain_graph=True) for x in (found, expected))
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, LLAMA, NORM_AFTER])
def test_the_last_block_computes_the_positions_that_are_wanted_and_no_block_the_padding(batch, options):
    model, (ids, mask), seen = tiny(**options), batch, []
    for block in model.transformer.h:
        block.mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].numel() // 32))
    model(ids, mask)
    inside = sum(row.nonzero().max().item() for row in mask if row.any())  # up to the last token's predecessor
    assert seen == [inside, int(mask.sum())]


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

@pytest.mark.case(23)
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
    adapters.prepare_training(model, SimpleNamespace(checkpoint_activations=True, lora_rank=0, compile=False))
    model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.transformer(batch[0]).sum().backward()
    assert len(calls) == 2


def test_compiled_blocks_compute_the_same_and_are_not_compiled_again_for_other_lengths(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    counter, compile_module = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile  # without a C++ compiler
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compile_module(module, backend=counter, **options))
    plain, model, compiled = tiny(n_layer=3), tiny(n_layer=3), []
    adapters.prepare_training(model, SimpleNamespace(checkpoint_activations=False, lora_rank=0, compile=True))
    for lengths in ([9, 9, 9], [20, 20], [12, 3, 5, 4], [31, 2], [7, 30, 11, 3, 3], [32] * 4):  # without padding and with it
        T = max(lengths)
        ids = torch.randint(256, (len(lengths), T), generator=torch.Generator().manual_seed(T))
        mask = torch.arange(T) < torch.tensor(lengths)[:, None]
        mask[:, 0] = False
        outputs = [one(ids, mask, summed=True)[0] for one in (plain, model)]
        gradients = [torch.autograd.grad(out, list(one.parameters())) for out, one in zip(outputs, (plain, model))]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=0)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
        compiled.append(counter.frame_count)
    assert 0 < compiled[0] and compiled[2] == compiled[-1] <= 4, compiled  # inner and last block, all positions or some
    before = counter.frame_count
    prompts = [[5, 6, 7], [8]]
    same = [generate(one, prompts, 8, SimpleNamespace(pad=257, stops=[-1]), temperature=0).ids for one in (plain, model)]
    assert torch.equal(*same) and counter.frame_count == before  # decoding goes on uncompiled
