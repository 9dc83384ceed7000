"""From states and head to log-probabilities of tokens, with the gradient by hand: it costs what the products cost, and little memory.

Shapes: N tokens, C width, V vocabulary, n tokens of a chunk.
"""
import torch

LOGITS_AT_ONCE = 1 << 26  # logits held at any time: 256 MiB in fp32
IN_CACHE = 1 << 20  # numbers that a CPU's cache holds, so that several passes over them cost one


class Head(torch.autograd.Function):
    """States and head to log-probabilities: product, softmax and their gradients in one buffer, a chunk of rows at a time.

    The gradient needs q, the softmax, and gets it the cheapest way there is. summed: all tokens weigh the same, so it is
    computed at once, while q is at hand. Few tokens: q is kept. Else the logits are computed again, a fourth product.
    """

    @staticmethod
    def forward(ctx, states, weight, targets, with_entropy, summed, dtype, learning):
        """states (N, C), weight (V, C), targets (N,) -> logprobs (N,), or their sum (); entropy (N,) in nats, or None.

        dtype: of the products; learning: whether a backward pass may follow (inside a Function PyTorch doesn't tell).
        """
        N, most = len(targets), max(1, LOGITS_AT_ONCE // len(weight))
        if N > 2 * most:
            most = max(1, most // 2)
        rows = -(-N // -(-N // most)) if N > 0 else 1  # chunks of equal size
        x, w, q = states.to(dtype), weight.to(dtype), None
        logprobs, entropy = (x.new_empty(N, dtype=torch.float32) for _ in range(2))
        gradients = [torch.zeros_like(t, dtype=torch.float32) if summed and learning and need else None for t, need in zip((x, w), ctx.needs_input_grad)]
        for at, q in chunks_of_softmax(x, w, rows, targets, logprobs, entropy if with_entropy else None):
            if summed and learning:
                add_head_gradients(gradients, at, q, x, w, targets, x.new_ones(N, dtype=torch.float32))
        ctx.rows, ctx.dtypes = rows, (states.dtype, weight.dtype)
        ctx.save_for_backward(*gradients if summed else (x, w, targets, entropy, q if rows == N else None))
        return logprobs.sum() if summed else logprobs, entropy if with_entropy else None

    @staticmethod
    def backward(ctx, g, h):
        """g, h: gradients of logprobs and entropy, (N,) each; summed: g ()."""
        if len(ctx.saved_tensors) == 2:
            gradients = [None if d is None else d * g for d in ctx.saved_tensors]
        else:
            x, w, targets, entropy, kept = ctx.saved_tensors
            gradients = [torch.zeros_like(t, dtype=torch.float32) if need else None for t, need in zip((x, w), ctx.needs_input_grad)]
            for at, q in chunks_of_softmax(x, w, ctx.rows, targets) if kept is None else [(slice(None), kept)]:
                add_head_gradients(gradients, at, q, x, w, targets, g, h, entropy)
        return *(None if d is None else d.to(dtype) for d, dtype in zip(gradients, ctx.dtypes)), None, None, None, None, None


def chunks_of_softmax(x, w, rows, targets, logprobs=None, entropy=None):
    """Yield (slice, q = softmax(x[slice] @ w.T) (n, V')) for x (N, C) and w (V, C), all in the same memory.

    On the way write the log-probabilities of the targets (N,) and the entropies to logprobs and entropy (N,), if given.
    V' is V rounded up to 64, by columns of no probability: products with rows of 50,257 numbers can take 1.4 times as
    long as with 50,304.
    """
    V, width = len(w), -(-len(w) // 64) * 64
    buffer = x.new_empty(rows, width)
    block = max(1, IN_CACHE // width) if x.device.type == "cpu" else rows
    for start in range(0, len(x), rows):
        q = buffer[:len(x) - start]
        torch.mm(x[start:start + rows], w.T, out=q[:, :V])
        q[:, V:] = -1e4
        for part, first in zip(q.split(block), range(start, len(x), block)):
            at = slice(first, first + len(part))
            z = part.float()  # (n, V'); for fp32 this is q itself, and the softmax is written over it
            if logprobs is None:
                part.copy_(torch.softmax(z, -1, out=z))
                continue
            top, logits = z.amax(-1), z.gather(1, targets[at, None]).squeeze(1)  # (n,)
            copy = z.clone() if entropy is not None else None
            torch.softmax(z, -1, out=z)
            normaliser = top - z.amax(-1).log()  # from the most likely token, whose probability can't underflow
            logprobs[at] = logits - normaliser
            if entropy is not None:
                entropy[at] = normaliser - torch.linalg.vecdot(z, copy)
            part.copy_(z)
        yield slice(start, start + len(q)), q


def add_head_gradients(gradients, at, q, x, w, targets, g, h=None, entropy=None):
    """Add a chunk's to the gradients [of x (N, C), of w (V, C)], where not None. q (n, V') is overwritten.

    g, h (N,): gradients of logprobs and entropy. d logprob / d logits = onehot - q;  d entropy / d logits = -q (log q + entropy).
    """
    each, scale = torch.arange(len(q), device=x.device), -g[at, None]
    if h is None:  # g multiplies what is narrow below, not all of q
        q[each, targets[at]] -= 1
    else:
        scale, d = -torch.ones_like(scale), torch.empty_like(q)
        block = max(1, IN_CACHE // q.shape[1]) if x.device.type == "cpu" else len(q)
        for part, out, entropies, of_entropy, of_logprob in zip(*(t.split(block) for t in (q, d, entropy[at, None], h[at, None], g[at, None]))):
            z = part.float()
            out.copy_(torch.xlogy(z, z).addcmul_(z, entropies).mul_(of_entropy).addcmul_(z, of_logprob))
        d[each, targets[at]] -= g[at].to(d.dtype)
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


def token_logprobs(states, weight, targets, temperature=1.0, with_entropy=False, summed=False):
    """Log-probabilities of targets under softmax(states @ weight.T / temperature), in fp32.

    states (N, C), weight (V, C), targets (N,) -> logprobs (N,) and entropy (N,) in nats, or None; with summed, the sum ()
    of the logprobs and None, whose gradient costs less. The logits (N, V) never exist at once unless they are few.
    """
    with_entropy, device = with_entropy and not summed, states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if temperature != 1:
        states = states / temperature
    with torch.autocast(device, enabled=False):
        return Head.apply(states, weight, targets, with_entropy, summed, dtype, torch.is_grad_enabled())
