"""From states and head to log-probabilities of tokens, with the gradient by hand: it costs what the products cost, and little memory.

Shapes: N tokens, C width, V vocabulary, V' the same rounded up to 64, n tokens of a chunk.
"""
import torch

LOGITS_AT_ONCE = 1 << 26  # logits held at any time: 256 MiB in fp32
IN_CACHE = 1 << 20  # numbers that a CPU's cache holds, so that several passes over them cost one


class Head(torch.autograd.Function):
    """States and head to log-probabilities: product, softmax and their gradients in one buffer, a chunk of rows at a time.

    The gradient needs q, the softmax, and gets it the cheapest way there is:
    at once   summed: all tokens weigh the same, so the gradient is computed while q is at hand
    kept      few tokens: q stays
    again     else the logits are computed again, a fourth product
    In float16 nothing is computed at once: what overflows must shrink with the loss, which is scaled later.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, with_entropy, summed, dtype, learning):
        """states (N, C), weight (V, C), targets (N,) -> logprobs (N,), or their sum (); entropy (N,) in nats, or None.

        dtype: of the products; learning: whether a backward pass may follow (inside a Function PyTorch doesn't tell).
        """
        N = len(targets)
        most = max(1, LOGITS_AT_ONCE // len(weight))
        if N > 2 * most:
            most = max(1, most // 2)
        # Chunks of equal size.
        rows = -(-N // -(-N // most)) if N > 0 else 1
        x, w, q = states.to(dtype), weight.to(dtype), None
        logprobs, entropy = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
        ctx.at_once = summed and dtype != torch.float16
        gradients = [None, None]
        if ctx.at_once and learning:
            gradients = zeros_where_needed((x, w), ctx.needs_input_grad)
        ones = x.new_ones(N, dtype=torch.float32)
        for at, q in chunks_of_softmax(x, w, rows, targets, logprobs, entropy if with_entropy else None):
            if ctx.at_once and learning:
                add_head_gradients(gradients, at, q, x, w, targets, logprobs, ones)
        ctx.rows, ctx.dtypes = rows, (states.dtype, weight.dtype)
        kept = q if rows == N else None
        ctx.save_for_backward(*gradients if ctx.at_once else (x, w, targets, logprobs, entropy, kept))
        return logprobs.sum() if summed else logprobs, entropy if with_entropy else None

    @staticmethod
    def backward(ctx, g, h):
        """g, h: gradients of logprobs and entropy, (N,) each; summed: g ()."""
        if ctx.at_once:
            gradients = [None if d is None else d * g for d in ctx.saved_tensors]
        else:
            x, w, targets, logprobs, entropy, kept = ctx.saved_tensors
            g = g.expand(len(targets))
            gradients = zeros_where_needed((x, w), ctx.needs_input_grad)
            chunks = chunks_of_softmax(x, w, ctx.rows, targets) if kept is None else [(slice(None), kept)]
            for at, q in chunks:
                add_head_gradients(gradients, at, q, x, w, targets, logprobs, g, h, entropy)
        of_states, of_weight = (None if d is None else d.to(dtype) for d, dtype in zip(gradients, ctx.dtypes))
        return of_states, of_weight, None, None, None, None, None


def zeros_where_needed(tensors, needed):
    """Zeros in fp32 like each tensor that a gradient is needed of, None for the others."""
    return [torch.zeros_like(t, dtype=torch.float32) if need else None for t, need in zip(tensors, needed)]


def float32_products(device):
    """Whether products of bfloat16 or float16 matrices can come out unrounded: on CUDA, from PyTorch 2.8."""
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")


def chunks_of_softmax(x, w, rows, targets, logprobs=None, entropy=None):
    """Yield (slice, q = softmax(x[slice] @ w.T) (n, V')) for x (N, C) and w (V, C), all in the same memory.

    On the way write the log-probabilities of the targets (N,) and the entropies to logprobs and entropy (N,), if given.
    V' is V rounded up to 64, by columns of no probability: products with rows of 50,257 numbers can take 1.4 times as
    long as with 50,304. Products of bfloat16 round the logits to it where `float32_products` can't be had.
    """
    V, width, device = len(w), -(-len(w) // 64) * 64, x.device
    wide = x.dtype != torch.float32 and float32_products(device)
    buffer = x.new_empty(rows, width)
    all_logits = x.new_empty(rows, width, dtype=torch.float32) if wide else buffer
    for start in range(0, len(x), rows):
        q, logits = buffer[:len(x) - start], all_logits[:len(x) - start]  # (n, V')
        if wide:
            torch.mm(x[start:start + rows], w.T, out_dtype=torch.float32, out=logits[:, :V])
        else:
            torch.mm(x[start:start + rows], w.T, out=logits[:, :V])
        logits[:, V:] = torch.finfo(logits.dtype).min
        block = block_rows(logits)
        for out, part, first in zip(q.split(block), logits.split(block), range(start, len(x), block)):
            at = slice(first, first + len(part))
            # For fp32 these are the logits themselves, and the softmax is written over them.
            z = part.float()  # (n, V')
            if logprobs is None:
                out.copy_(torch.softmax(z, -1, out=z))
                continue
            # Relative to the most likely token, whose probability can't underflow: log p = z - top + log p_top.
            # In this order a confident token keeps its digits, which z - (top - log p_top) would lose to the
            # size of the logits.
            top = z.amax(-1)  # (n,)
            below = z.gather(1, targets[at, None]).squeeze(1) - top  # (n,)
            distances = z - top[:, None] if entropy is not None else None
            torch.softmax(z, -1, out=z)
            log_top = z.amax(-1).log()  # (n,)
            logprobs[at] = below + log_top
            if entropy is not None:
                entropy[at] = -torch.linalg.vecdot(z, distances) - log_top
            out.copy_(z)
        yield slice(start, start + len(q)), q


def add_head_gradients(gradients, at, q, x, w, targets, logprobs, g, h=None, entropy=None):
    """Add a chunk's to the gradients [of x (N, C), of w (V, C)], where not None. q (n, V') is overwritten.

    g, h (N,): gradients of logprobs and entropy. d logprob / d logits = onehot - q;  d entropy / d logits = -q (log q + entropy).
    The target's entry comes from its log-probability: in bfloat16 q of a confident token is 1, and 1 - q nothing.
    """
    each, scale = torch.arange(len(q), device=x.device), -g[at, None]
    log_p = logprobs[at]  # (n,)
    if h is None:  # g multiplies what is narrow below, not all of q
        q[each, targets[at]] = log_p.expm1().to(q.dtype)
    else:
        scale, d = -torch.ones_like(scale), torch.empty_like(q)
        columns = (t.split(block_rows(q)) for t in (q, d, entropy[at, None], h[at, None], g[at, None]))
        for part, out, entropies, of_entropy, of_logprob in zip(*columns):
            z = part.float()
            out.copy_(torch.xlogy(z, z).addcmul_(z, entropies).mul_(of_entropy).addcmul_(z, of_logprob))
        of_target = log_p.exp() * (log_p + entropy[at]) * h[at] + log_p.expm1() * g[at]
        d[each, targets[at]] = of_target.to(d.dtype)
        q = d
    V, C = w.shape
    of_x, of_w = gradients
    if of_x is not None:
        of_x[at] = (q[:, :V] @ w) * scale
    if of_w is not None:
        x = (x[at] * scale).to(x.dtype)
        block = V if x.dtype == torch.float32 or x.device.type != "cpu" else IN_CACHE // C + 1
        for v in (slice(v, v + block) for v in range(0, V, block)):
            if x.dtype == torch.float32:
                of_w[v].addmm_(q[:, :V].T, x)
            else:
                of_w[v] += q[:, :V][:, v].T @ x


def block_rows(x):
    """How many rows of x (n, V') are best passed over together."""
    return max(1, IN_CACHE // x.shape[1]) if x.device.type == "cpu" else len(x)


def token_logprobs(states, weight, targets, temperature=1.0, with_entropy=False, summed=False):
    """Log-probabilities of targets under softmax(states @ weight.T / temperature), in fp32.

    Under autocast the products are in its dtype; what follows them is in fp32, and so are the logits themselves
    where `float32_products` holds (elsewhere bfloat16 rounds them: at logits near -100 by up to 0.25).
    states (N, C), weight (V, C), targets (N,) -> logprobs (N,) and entropy (N,) in nats, or None; with summed, the sum ()
    of the logprobs and None, whose gradient costs less. The logits (N, V) never exist at once unless they are few.
    """
    with_entropy, device = with_entropy and not summed, states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if temperature != 1:
        states = states / temperature
    with torch.autocast(device, enabled=False):
        return Head.apply(states, weight, targets, with_entropy, summed, dtype, torch.is_grad_enabled())
