"""head.py: log-probabilities, entropies and gradients against brute force and float64, and their memory."""
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import head as head_file
from examples import VOCAB
from head import token_logprobs
from small_models import rows_alone, tiny


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


# -- log-probabilities

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
    states = torch.randn(23, 32).bfloat16()
    weight = torch.randn(VOCAB, 32).bfloat16()
    targets = torch.randint(VOCAB, (23,))
    logprobs, entropy = token_logprobs(states, weight, targets, 1.0, with_entropy=True)
    # Logits are rounded, what follows is not.
    exact = (states.float() @ weight.float().T).bfloat16().float().log_softmax(-1)
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
        losses = [(use_logprobs * a * logprobs + use_entropy * b * entropy).sum()
                  for logprobs, entropy in (expected, got)]
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
    # Of many rows a half at once.
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", 20 * VOCAB if chunked else n * VOCAB)
    states, weight = torch.randn(n, width, requires_grad=True), torch.randn(VOCAB, width, requires_grad=True)
    with LargestTensor() as forward:
        logprobs, entropy = token_logprobs(states, weight, torch.randint(VOCAB, (n,)), with_entropy=True)
    with LargestTensor() as backward:
        (logprobs + entropy).sum().backward()
    assert forward.numel == backward.numel == (10 if chunked else n) * 320  # VOCAB rounded up to 64


# -- the gradient

def head_inputs(n, vocabulary=VOCAB, width=32):
    torch.manual_seed(n)
    states = torch.randn(n, width)
    weight = 0.4 * torch.randn(vocabulary, width)
    targets = torch.randint(vocabulary, (n,))
    return states, weight, targets, torch.randn(n), torch.randn(n)


def head_loss(logprobs, entropy, way, a, b):
    """What the gradient is of: the sum of all log-probabilities, or weighted ones, of entropies, of both."""
    if way == "sum":
        return 3 * logprobs.sum()
    if way == "logprobs":
        return (a * logprobs).sum()
    if way == "entropy":
        return (b * entropy).sum()
    assert way == "both"
    return (a * logprobs + b * entropy).sum()


def head_in_float64(states, weight, targets, temperature):
    """Log-probabilities, entropies (N,) by log_softmax of all logits, and the leaves they come from."""
    leaves = states.double().requires_grad_(), weight.double().requires_grad_()
    full = (leaves[0] @ leaves[1].T / temperature).log_softmax(-1)
    return full.gather(1, targets[:, None]).squeeze(1), -(full.exp() * full).sum(-1), leaves


@pytest.mark.parametrize("at_once", [1 << 26, 5 * VOCAB, 1], ids=["kept", "chunks", "rows"])
@pytest.mark.parametrize("way", ["summed", "sum", "logprobs", "entropy", "both"])
@pytest.mark.parametrize("n", [0, 1, 23])
def test_the_heads_gradient_is_that_of_float64_autograd_however_it_is_computed_and_whatever_is_frozen(
        monkeypatch, n, way, at_once):
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    states, weight, targets, a, b = head_inputs(n)
    logprobs, entropy, leaves = head_in_float64(states, weight, targets, 0.7)
    loss = head_loss(logprobs, entropy, "sum" if way == "summed" else way, a.double(), b.double())
    expected = torch.autograd.grad(loss, leaves)
    for trained in ((True, True), (True, False), (False, True)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((states, weight), trained)]
        got, got_entropy = token_logprobs(*leaves,
                                          targets,
                                          0.7,
                                          with_entropy=way in ("entropy", "both"),
                                          summed=way == "summed")
        torch.testing.assert_close(got,
                                   logprobs.float().sum() if way == "summed" else logprobs.float(),
                                   atol=1e-5 * max(1, n if way == "summed" else 1),
                                   rtol=1e-6)
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
        logprobs, _ = token_logprobs(states.requires_grad_(), weight.requires_grad_(), targets, 1.0,
                                     with_entropy, summed)
        loss = (logprobs * (1 if summed else a)).sum()
        first = torch.autograd.grad(loss, (states, weight), retain_graph=True)
        try:
            second = torch.autograd.grad(loss, (states, weight))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            assert not summed
            assert not with_entropy
            assert at_once == 1 << 26
        else:
            torch.testing.assert_close(second, first, atol=0, rtol=0)


@pytest.mark.parametrize("at_once", [1 << 26, 5 * VOCAB], ids=["kept", "chunks"])
@pytest.mark.parametrize("way", ["summed", "logprobs", "both"])
def test_the_head_in_bf16_keeps_its_bounds_of_values_and_gradients_in_fp32(monkeypatch, way, at_once):
    """The bounds are about three times what was measured: log-probabilities (of -8 to -30) are off by up to
    0.055 and their mean by 0.0009, entropies by 0.033, gradients by 1.4 % of the largest, 2 % with entropies.
    """
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    states, weight, targets, a, b = head_inputs(200)
    results = []
    for reduced in (False, True):
        leaves = [t.clone().requires_grad_() for t in (states, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            got, entropy = token_logprobs(*leaves,
                                          targets,
                                          0.7,
                                          with_entropy=way == "both",
                                          summed=way == "summed")
        (got if way == "summed" else head_loss(got, entropy, way, a, b)).backward()
        assert got.dtype == torch.float32 and all(leaf.grad.dtype == torch.float32 for leaf in leaves)
        results.append((got / len(targets) if way == "summed" else got, *(leaf.grad for leaf in leaves),
                        *([entropy] if way == "both" else [])))
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
    """Measured: 0.4 to 1.0 of autocast's error; with the softmax rounded before 1 is subtracted, 4 at 0.994
    and 20 at 0.99994."""
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
    states = torch.tensor([[1.0, 0.5]], dtype=dtype)
    weight = torch.tensor([[-size, 0.0], [-size, 1.0], [-size, 2.0], [-size, -3.0]], dtype=dtype)
    logprobs, entropy = token_logprobs(states, weight, torch.tensor([2]), 0.5, with_entropy=True)
    logits = ((states / 0.5) @ weight.T).double()
    full = logits.log_softmax(-1)
    assert logprobs.item() == pytest.approx(full[0, 2].item(), abs=1e-5)
    assert entropy.item() == pytest.approx(-(full.exp() * full).sum().item(), abs=1e-5)


@pytest.mark.parametrize("wide, bound", [(True, 0.002), (False, 0.5)])
def test_logits_near_minus_100_are_rounded_only_where_the_product_cant_come_out_in_fp32(
        monkeypatch, wide, bound):
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
    """The target's row adds up 4,096 states of 30, more than float16 holds; divided by their number it does
    not."""
    states = torch.full((4096, 8), 30.0).half()
    weight = torch.zeros(64, 8).half().requires_grad_()
    targets = torch.zeros(4096, dtype=torch.long)
    for scale, finite in ((1.0, False), (1 / 4096, True)):
        total, _ = token_logprobs(states, weight, targets, summed=True)
        gradient, = torch.autograd.grad(total * scale, weight)
        assert gradient.isfinite().all() == finite


@pytest.mark.parametrize("at_once", [1 << 26, 1], ids=["kept", "rows"])
def test_probabilities_that_underflow_have_the_right_logarithm_and_finite_gradients(monkeypatch, at_once):
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    states = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 0.0]])
    weight = torch.tensor([[100.0, 1.0], [-100.0, 2.0], [-100.0, 3.0], [99.0, -1.0]])
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


# -- memory and work

class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that operations return, while they live; peak is the most at any time,
    sizes are those of each."""

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


@pytest.mark.parametrize("way, tokens, most", [
    ("summed", 8192, 0.1),
    ("logprobs", 8192, 0.1),
    ("both", 8192, 0.25),
])
def test_the_head_takes_a_fraction_of_the_memory_of_all_logits(way, tokens, most):
    """Autograd of log_softmax takes three times the logits' fp32 memory (five times with entropies) beyond
    inputs and gradients; measured at 8,192 tokens: 0.077 times (0.157)."""
    N, V, C = tokens, 50257, 32
    states, weight, targets, a, b = head_inputs(N, V, C)
    with Memory(states.requires_grad_(), weight.requires_grad_(), targets, a, b) as memory:
        got, entropy = token_logprobs(states,
                                      weight,
                                      targets,
                                      with_entropy=way == "both",
                                      summed=way == "summed")
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
