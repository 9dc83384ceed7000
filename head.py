"""From states and head to log-probabilities of tokens.

The gradient is made by hand, and costs what its products cost, and little memory.

Shapes: N tokens, C width, V vocabulary, V' the same rounded up to 64, n tokens of a chunk.
"""
import torch

LOGITS_AT_ONCE = 1 << 26  # logits held at any time: 256 MiB in fp32
IN_CACHE = 1 << 20  # numbers that a CPU's cache holds, so that several passes over them cost one

# The three ways to the gradient, see `Head`.
AT_ONCE, KEPT, AGAIN = "at once", "kept", "again"


class Head(torch.autograd.Function):
    """States and head to log-probabilities: product, softmax and gradients in one buffer, chunk by chunk.

    The gradient needs q, the softmax of the logits, and gets it the cheapest way there is:
    AT_ONCE  where the sum is asked for, all tokens weigh the same. So the gradient is computed in the forward
             pass, while a chunk's q is at hand, and the backward pass multiplies it with the sum's own.
    KEPT     if the tokens are few enough for one chunk, its q is kept for the backward pass.
    AGAIN    else the backward pass computes q again. That is a fourth product of the matrices' size: one is
             needed for the logits, one for the gradient of the states and one for that of the head.
    In float16 nothing is computed at once: what overflows must shrink with the loss, which is scaled later.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, with_entropy, summed, dtype, learning):
        """states (N, C), weight (V, C), targets (N,) -> logprobs (N,) and entropy (N,) in nats, or None.

        summed: the sum () of the logprobs instead. dtype: of the products. learning: whether a backward pass
        may follow, which PyTorch doesn't tell inside a Function.
        """
        N = len(targets)
        ctx.rows = rows_of_chunks(N, len(weight))
        ctx.dtypes = states.dtype, weight.dtype
        if summed and dtype != torch.float16:
            ctx.way = AT_ONCE
        elif ctx.rows == N:
            ctx.way = KEPT
        else:
            ctx.way = AGAIN

        x, w = states.to(dtype), weight.to(dtype)
        logprobs = x.new_empty(N, dtype=torch.float32)
        entropy = x.new_empty(N, dtype=torch.float32) if with_entropy else None
        gradients = [None, None]
        q = None
        if ctx.way == AT_ONCE and learning:
            gradients = zeros_where_needed((x, w), ctx.needs_input_grad)
        ones = x.new_ones(N, dtype=torch.float32)
        for at, q in chunks_of_softmax(x, w, ctx.rows, targets, logprobs, entropy):
            if ctx.way == AT_ONCE and learning:
                add_head_gradients(gradients, at, q, x, w, targets, logprobs, ones)

        if ctx.way == AT_ONCE:
            ctx.save_for_backward(*gradients)
        else:
            kept = q if ctx.way == KEPT else None
            ctx.save_for_backward(x, w, targets, logprobs, entropy, kept)
        return logprobs.sum() if summed else logprobs, entropy

    @staticmethod
    def backward(ctx, g, h):
        """g, h: gradients of logprobs and entropy, (N,) each. With summed, g is () and h None."""
        if ctx.way == AT_ONCE:
            gradients = [None if d is None else d * g for d in ctx.saved_tensors]
        else:
            x, w, targets, logprobs, entropy, kept = ctx.saved_tensors
            g = g.expand(len(targets))
            gradients = zeros_where_needed((x, w), ctx.needs_input_grad)
            if ctx.way == KEPT:
                chunks = [(slice(None), kept)]
            else:
                chunks = chunks_of_softmax(x, w, ctx.rows, targets)
            for at, q in chunks:
                add_head_gradients(gradients, at, q, x, w, targets, logprobs, g, h, entropy)

        for i, dtype in enumerate(ctx.dtypes):
            if gradients[i] is not None:
                gradients[i] = gradients[i].to(dtype)
        return *gradients, None, None, None, None, None


def ceil_divide(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def rows_of_chunks(N, V):
    """How many of N tokens make a chunk. It has `LOGITS_AT_ONCE` logits at most, and all are of one size."""
    if N == 0:
        return 1
    most = max(1, LOGITS_AT_ONCE // V)
    # Many tokens go in chunks of half the size, as the entropy's gradient takes a second buffer as large.
    if N > 2 * most:
        most = max(1, most // 2)
    chunks = ceil_divide(N, most)
    return ceil_divide(N, chunks)


def zeros_where_needed(tensors, needed):
    """Zeros in fp32 like each tensor that a gradient is needed of, None for the others."""
    return [torch.zeros_like(t, dtype=torch.float32) if need else None for t, need in zip(tensors, needed)]


def float32_products(device):
    """Whether products of bfloat16 or float16 matrices can come out unrounded: on CUDA, from PyTorch 2.8."""
    return device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out")


def block_rows(x):
    """How many rows of x (n, V') are best passed over together: on a CPU, those that fit its cache."""
    if x.device.type != "cpu":
        return len(x)
    return max(1, IN_CACHE // x.shape[1])


def chunks_of_softmax(x, w, rows, targets, logprobs=None, entropy=None):
    """Yield (slice, q = softmax(x[slice] @ w.T) (n, V')) for x (N, C) and w (V, C), all q in the same memory.

    On the way the log-probabilities of targets (N,) are written to logprobs (N,) and the entropies to entropy
    (N,), where given.
    V' is V rounded up to 64, by columns of no probability: products with rows of 50,257 numbers can take 1.4
    times as long as with 50,304. Products of bfloat16 round the logits to it where there are no
    `float32_products`.
    """
    V, device = len(w), x.device
    width = 64 * ceil_divide(V, 64)
    wide = x.dtype != torch.float32 and float32_products(device)
    buffer = x.new_empty(rows, width)
    all_logits = x.new_empty(rows, width, dtype=torch.float32) if wide else buffer
    for start in range(0, len(x), rows):
        part = x[start:start + rows]  # (n, C)
        q, logits = buffer[:len(part)], all_logits[:len(part)]  # (n, V')
        if wide:
            torch.mm(part, w.T, out_dtype=torch.float32, out=logits[:, :V])
        else:
            torch.mm(part, w.T, out=logits[:, :V])
        # Each time anew, as the softmax has been written over them.
        logits[:, V:] = torch.finfo(logits.dtype).min
        block = block_rows(logits)
        for first in range(0, len(part), block):
            last = min(first + block, len(part))
            at = slice(start + first, start + last)
            write_softmax(q[first:last], logits[first:last], at, targets, logprobs, entropy)
        yield slice(start, start + len(q)), q


def write_softmax(out, logits, at, targets, logprobs, entropy):
    """Write the softmax of logits (n, V') to out (n, V'), which may be the same memory.

    at: the slice of the N tokens that the rows are. Their log-probabilities and entropies are written to
    logprobs (N,) and entropy (N,), where not None.
    """
    # Logits in fp32 are not copied here, and the softmax is written over them.
    z = logits.float()  # (n, V')
    if logprobs is None:
        out.copy_(torch.softmax(z, -1, out=z))
        return

    # Relative to the most likely token, whose probability can't underflow: log p = z - top + log p_top.
    # In this order a confident token keeps its digits, which z - (top - log p_top) would lose to the size of
    # the logits.
    top = z.amax(-1)  # (n,)
    below = z.gather(1, targets[at, None]).squeeze(1) - top  # (n,)
    if entropy is not None:
        distances = z - top[:, None]  # (n, V')
    torch.softmax(z, -1, out=z)
    log_top = z.amax(-1).log()  # (n,)
    logprobs[at] = below + log_top
    if entropy is not None:
        entropy[at] = -torch.linalg.vecdot(z, distances) - log_top
    out.copy_(z)


def add_head_gradients(gradients, at, q, x, w, targets, logprobs, g, h=None, entropy=None):
    """Add a chunk's to the gradients [of x (N, C), of w (V, C)], where not None. q (n, V') is overwritten.

    at: the chunk's slice of the N tokens. g, h (N,): gradients of logprobs and entropy. In the logits z,
        d logprob / dz = onehot - q        d entropy / dz = -q (log q + entropy)
    so what is passed down to z is -d, for d = g (q - onehot) + h q (log q + entropy).
    """
    # Without entropy g needn't be in d (n, V'): below it multiplies what has C numbers a row instead of V'.
    if h is None:
        d = overwrite_with_difference(q, at, targets, logprobs)
        scale = -g[at, None]  # (n, 1)
    else:
        d = gradient_with_entropy(q, at, targets, logprobs, g, h, entropy)
        scale = -torch.ones_like(g[at, None])

    V = len(w)
    of_x, of_w = gradients
    if of_x is not None:
        of_x[at] = (d[:, :V] @ w) * scale
    if of_w is not None:
        add_weight_gradient(of_w, d[:, :V], (x[at] * scale).to(x.dtype))


def overwrite_with_difference(q, at, targets, logprobs):
    """q (n, V') becomes q - onehot.

    The target's entry is made of its log-probability: in bfloat16 a confident token's q is 1, 1 - q is 0.
    """
    each = torch.arange(len(q), device=q.device)
    log_p = logprobs[at]  # (n,)
    q[each, targets[at]] = log_p.expm1().to(q.dtype)
    return q


def gradient_with_entropy(q, at, targets, logprobs, g, h, entropy):
    """d (n, V') = g (q - onehot) + h q (log q + entropy), in its own memory. The target's entry: as above."""
    d = torch.empty_like(q)
    g, h, entropy = g[at, None], h[at, None], entropy[at, None]  # (n, 1)
    block = block_rows(q)
    for first in range(0, len(q), block):
        rows = slice(first, first + block)
        p = q[rows].float()
        # (p log p + p entropy) h + p g
        part = torch.xlogy(p, p)
        part.addcmul_(p, entropy[rows]).mul_(h[rows]).addcmul_(p, g[rows])
        d[rows] = part

    each = torch.arange(len(q), device=q.device)
    log_p = logprobs[at, None]  # (n, 1)
    of_target = log_p.exp() * (log_p + entropy) * h + log_p.expm1() * g
    d[each, targets[at]] = of_target.squeeze(1).to(d.dtype)
    return d


def add_weight_gradient(of_w, d, x):
    """of_w (V, C) += d.T @ x, for d (n, V) and x (n, C)."""
    if x.dtype == torch.float32:
        of_w.addmm_(d.T, x)
        return
    # of_w is in fp32 and the product isn't. On a CPU a part of it is added while it is in the cache.
    V, C = of_w.shape
    block = IN_CACHE // C + 1 if x.device.type == "cpu" else V
    for first in range(0, V, block):
        v = slice(first, first + block)
        of_w[v] += d[:, v].T @ x


def token_logprobs(states, weight, targets, temperature=1.0, with_entropy=False, summed=False):
    """Log-probabilities of targets under softmax(states @ weight.T / temperature), in fp32.

    states (N, C), weight (V, C), targets (N,) -> logprobs (N,) and entropy (N,) in nats, or None. If summed,
    the sum () of the logprobs, whose gradient costs less, and None. The logits (N, V) never exist at once,
    unless they are few.
    Under autocast the products are in its dtype. What follows them is in fp32, and so are the logits where
    `float32_products` holds. Elsewhere bfloat16 rounds them: at logits near -100 by up to 0.25.
    """
    with_entropy = with_entropy and not summed
    device = states.device.type
    dtype = weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # The states are divided by the temperature, not the logits. It comes to the same, as the product is
    # linear, but a row of states has C numbers and one of logits V. And autograd divides the gradient, too.
    if temperature != 1:
        states = states / temperature
    with torch.autocast(device, enabled=False):
        return Head.apply(states, weight, targets, with_entropy, summed, dtype, torch.is_grad_enabled())
