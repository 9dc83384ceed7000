"""From prompts to replies: the cache of keys and values, sampling, stopping.

Shapes: B prompts, P tokens of the longest of them, T tokens, V vocabulary, C width, H heads, H_kv key/value
heads, D head width; n rows of the cache, each of which decodes one prompt at the moment.
"""
import contextlib
import itertools
import math
import platform
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import pad_rows
from head import float32_products
from plumbing.flags import require

GROUP = 256  # tokens in a group, see `sample_token`


# ---------------------------------------------------------------------------------------------------------
# The cache

class KVCache:
    """Keys and values of all layers for the rows that are being decoded, preallocated.

    Each row is at its own position. Before each forward pass, `prefill` or `step` says what it is over.
    """

    def __init__(self, config, rows, length, device, dtype):
        shape = (config.n_layer, 2, rows, config.n_kv_head, length, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.slots = torch.arange(length, device=device)
        # Which layer `attend` is called by; the transformer sets it.
        self.layer = 0

    def prefill(self, rows, source):
        """The next forward pass is over whole prompts (M, T), from position 0.

        Row rows[i] of the cache gets the keys and values of prompt source[i]; rows and source are (m,).
        Several rows may have the same prompt, so m can be more than M.
        """
        self.rows = rows
        self.source = source
        self.positions = None

    def step(self, positions, upto):
        """The next forward pass is over one token per row (n, 1), at positions (n,), all below upto."""
        self.rows = torch.arange(len(positions), device=positions.device)
        self.positions = positions
        self.upto = upto
        visible = self.slots[:upto] <= positions[:, None]  # (n, upto)
        self.visible = visible[:, None, None]  # (n, 1, 1, upto)

    def keep(self, rows):
        """Forget all rows but these (m,), which become rows 0 to m - 1."""
        self.kv = self.kv[:, :, rows]

    def attend(self, q, k, v):
        """Store k and v, attend with q to all that a query may see.

        q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, H, T, D); B and T are those of `prefill` or `step`.
        """
        keys, values = self.kv[self.layer]  # (n, H_kv, length, D)
        grouped = q.shape[1] != k.shape[1]

        if self.positions is None:
            # Padding is stored too. A row's tokens overwrite it one by one, each before any query can see it.
            T = k.shape[2]
            keys[self.rows, :, :T] = k[self.source].to(keys.dtype)  # (m, H_kv, T, D)
            values[self.rows, :, :T] = v[self.source].to(values.dtype)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        keys[self.rows, :, self.positions] = k[:, :, 0].to(keys.dtype)  # (n, H_kv, D)
        values[self.rows, :, self.positions] = v[:, :, 0].to(values.dtype)
        keys = keys[:, :, :self.upto]  # (n, H_kv, upto, D)
        values = values[:, :, :self.upto]
        q = q.to(keys.dtype)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.visible, enable_gqa=grouped)


# ---------------------------------------------------------------------------------------------------------
# Sampling

def uniforms(rows, tokens, generator, device):
    """The numbers (rows, tokens, 2), uniform in [0, 1), that `generate` turns into tokens.

    A token takes two, because it is drawn in two steps: a group of tokens, then one in it (`sample_token`).
    """
    return torch.rand(rows, tokens, 2, dtype=widest_float(device), device=device, generator=generator)


def widest_float(device):
    """float64, but on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def sample_token(logits, temperature, top_k, top_p, uniform):
    """Draw one token per row of logits (B, V) fp32, with two uniform numbers each (B, 2) -> (B,).

    Temperature 0 takes the largest. top_k and top_p draw among the likeliest tokens alone; 0 and 1 among all.
    """
    if temperature == 0:
        return logits.argmax(-1)
    V = logits.shape[-1]
    if temperature != 1:
        logits = logits / temperature

    if 0 < top_k < V:
        least = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        # Keep the fewest tokens whose probability reaches top_p: those before which it is not reached yet.
        ordered, order = logits.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        drop = drop.gather(-1, order.argsort(-1))
        logits = logits.masked_fill(drop, -math.inf)

    # First a group of tokens is drawn, then one in it: less to add up than over the whole vocabulary.
    probabilities = logits.softmax(-1)
    probabilities = F.pad(probabilities, (0, -V % GROUP))
    groups = probabilities.unflatten(-1, (-1, GROUP))  # (B, V / 256, 256)
    each = torch.arange(len(logits), device=logits.device)
    group = draw(groups.sum(-1), uniform[:, :1])  # (B,)
    within = draw(groups[each, group], uniform[:, 1:])  # (B,)
    token = GROUP * group + within
    # The last group may not be full. Only NaN draws what fills it up.
    return token.clamp(max=V - 1)


def draw(weights, uniform):
    """Draw one index per row of weights (B, n), in proportion to them, by uniform numbers (B, 1) -> (B,).

    It is where the number falls among the running sums. So one random number per row is enough. With
    torch.multinomial it is one per weight, 26 times as long on a CPU, and the CPU waits for a GPU.
    """
    sums = weights.to(widest_float(weights.device)).cumsum(-1)
    target = uniform * sums[:, -1:]  # (B, 1)
    index = torch.searchsorted(sums, target, right=True).squeeze(1)
    # With NaN among the weights the search ends behind the last.
    return index.clamp(max=weights.shape[1] - 1)


# ---------------------------------------------------------------------------------------------------------
# The weights

def has_onednn_products(device, dtype):
    """Whether oneDNN can multiply with a matrix that it has laid out for itself."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def multiplier(weight, bias, dtype, rows):
    """The function x (..., in) -> x W^T + b (..., out), for copies of W (out, in) and b (out,) or None.

    It is made for few rows: a product then takes the time of reading the matrix. On x86 CPUs oneDNN lays it
    out in the order of reading, which takes a half to a quarter of the time of `F.linear`.
    """
    weight = weight.detach().to(dtype)
    if bias is not None:
        bias = bias.detach().to(dtype)
    if has_onednn_products(weight.device, dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")
    return lambda x: F.linear(x.to(dtype), weight, bias)


def whole_weight(linear):
    """The matrix (out, in) of a linear layer, with its adapter if it has one."""
    if hasattr(linear, "merged"):
        return linear.merged()
    return linear.weight


def head_multiplier(weight, dtype, rows):
    """The function states (n, C) -> logits (n, V), for a copy of the head's weight (V, C)."""
    if dtype == torch.float32 or not float32_products(weight.device):
        return multiplier(weight, None, dtype, rows)
    # On this device the logits that are scored are not rounded (see head.py), and samples must come from the
    # distribution that scores them.
    weight = weight.detach().to(dtype)
    return lambda x: torch.mm(x.to(dtype), weight.T, out_dtype=torch.float32)


@contextlib.contextmanager
def decoding_weights(model, dtype, rows):
    """While it lasts, a model doesn't drop out, and its matrices are copies made for decoding so many rows.

    The copies have one dtype, and adapters are merged into them. Yields the head as a function: states (n, C)
    to logits (n, V), in dtype or in fp32.
    """
    linears = [module for module in model.transformer.modules() if isinstance(module, nn.Linear)]
    was_training = model.training
    model.eval()
    try:
        # The largest matrix is copied before the others: so the heap has a hole of its size at the next call.
        head = head_multiplier(model.head_weight, dtype, rows)
        for module in linears:
            module.forward = multiplier(whole_weight(module), module.bias, dtype, rows)
        yield head
    finally:
        model.train(was_training)
        for module in linears:
            vars(module).pop("forward", None)


# ---------------------------------------------------------------------------------------------------------
# Generation

class Generation(NamedTuple):
    ids: torch.Tensor  # (B, T) prompt, response, padding
    mask: torch.Tensor  # (B, T) bool, True on the response, its end token included
    lengths: torch.Tensor  # (B,) tokens of prompt and response
    ended: torch.Tensor  # (B,) bool, the response ends in the end token

    def texts(self, tokenizer):
        """The responses as text."""
        pairs = zip(self.ids.cpu(), self.mask.cpu())
        return [tokenizer.decode(ids[mask].tolist()) for ids, mask in pairs]


class Replies:
    """The replies to B prompts while they grow, and which of them each of the n rows of a cache decodes.

    A reply goes through three verbs: `admit` gives its prompt a row, `decode_one` adds a token to it, and
    `retire` drops its row. If a prompt waits when a reply is done, `admit` gives it the row instead.
    """

    def __init__(self, prompts, limits, width, tokenizer, rows, uniform, device):
        """limits: tokens of each response, at most; width: of the longest prompt with its response."""
        prompt_ids, prompt_lengths = pad_rows(prompts, tokenizer.pad, device)  # (B, P), (B,)
        B, P = prompt_ids.shape
        self.prompts = prompts
        self.pad = tokenizer.pad
        self.stops = torch.tensor(tokenizer.stops, device=device)
        self.width = width
        self.uniform = uniform  # (B, longest response, 2)

        # Of each prompt: its ids and those of its response; tokens of the prompt, of both so far, of both at
        # most; whether an end token has come.
        self.ids = torch.full((B, width), tokenizer.pad, device=device)  # (B, width)
        self.ids[:, :P] = prompt_ids
        # In one piece, as each copy to a device may be a wait.
        ends = prompt_lengths + torch.tensor(limits)
        self.prompt_lengths, self.ends = torch.stack([prompt_lengths, ends]).to(device)  # (B,) each
        self.lengths = self.prompt_lengths.clone()  # (B,)
        self.stopped = torch.zeros(B, dtype=torch.bool, device=device)  # (B,)

        # Of each row of the cache: the prompt that it belongs to; whether there is nothing to decode, or no
        # more. At first that is so of all, and `admit` may have them.
        self.live = torch.arange(rows, device=device)  # (n,)
        self.done = torch.ones_like(self.live, dtype=torch.bool)  # (n,)
        # How many prompts have got a row so far; the others wait.
        self.admitted = 0

    def make_room(self, model, cache):
        """If a quarter of the rows is done, they go to prompts that wait, or leave. False: none is left."""
        free = self.done.nonzero().squeeze(1)  # (f,)
        if 4 * len(free) < len(self.done):
            return True
        taken = self.admit(model, cache, free)
        if taken < len(free):
            self.retire(cache)
        return len(self.done) > 0

    def admit(self, model, cache, free):
        """Give free rows (f,) to the next prompts that wait, and fill them. Returns how many are taken."""
        end = min(self.admitted + len(free), len(self.prompts))
        new = range(self.admitted, end)
        if len(new) == 0:
            return 0
        rows = free[:len(new)]  # (m,)

        # Equal prompts share the pass over them. place: {prompt: its number among the M different ones}.
        place, source = {}, []
        for i in new:
            prompt = tuple(self.prompts[i])
            source.append(place.setdefault(prompt, len(place)))
        source = torch.tensor(source, device=free.device)  # (m,)
        cache.prefill(rows, source)
        padded, lengths = pad_rows(list(place), self.pad, free.device)  # (M, T), (M,)
        # The pass is for the cache alone. It must return some states, and one of each prompt is the fewest.
        M, T = padded.shape
        last = torch.arange(M) * T + lengths - 1  # (M,) flat positions
        model.transformer(padded, cache, last)

        self.live[rows] = torch.tensor(new, device=free.device)
        self.done[rows] = False
        self.admitted = end
        return len(new)

    def decode_one(self, model, head, cache, upto, sampling):
        """One more token for each row that is not done; all tokens so far are below position upto.

        sampling: (temperature, top_k, top_p). Nothing here waits for a GPU, so rows that are done are
        computed like the others, and what comes of it is thrown away.
        """
        live, done = self.live, self.done  # (n,)
        at = self.lengths[live]  # (n,) where the next token goes

        # Of a row that was just admitted, the prompt's last token goes in once more, because the pass over
        # the prompts computed no logits.
        cache.step(at - 1, upto)
        newest = self.ids[live, at - 1]  # (n,)
        states = model.transformer(newest[:, None], cache)  # (n, 1, C)

        # Of the numbers of its response, the new token takes the pair in its own place.
        number = (at - self.prompt_lengths[live]).clamp(max=self.uniform.shape[1] - 1)  # (n,)
        uniform = self.uniform[live, number]  # (n, 2)
        token = sample_token(head(states[:, 0]).float(), *sampling, uniform)  # (n,)

        # A row that is done writes what is there already; if it is full, to its last place.
        place = at.clamp(max=self.width - 1)
        there = self.ids[live, place]
        self.ids[live, place] = torch.where(done, there, token)
        self.lengths[live] = at + ~done

        stop = (token[:, None] == self.stops).any(1) & ~done
        full = self.lengths[live] >= self.ends[live]
        self.stopped[live] |= stop
        self.done = done | stop | full

    def retire(self, cache):
        """Drop the rows that are done, here and in the cache."""
        left = (~self.done).nonzero().squeeze(1)  # (m,)
        self.live = self.live[left]
        self.done = self.done[left]
        if len(left) > 0:
            cache.keep(left)

    def longest(self):
        """Tokens of the longest prompt and response that a row decodes. Waits for the device."""
        return int(self.lengths[self.live].max())

    def result(self):
        """The replies as they are, as a Generation."""
        T = int(self.lengths.max())
        slots = torch.arange(T, device=self.lengths.device)
        behind_prompt = slots >= self.prompt_lengths[:, None]  # (B, T)
        before_end = slots < self.lengths[:, None]  # (B, T)
        mask = behind_prompt & before_end
        return Generation(self.ids[:, :T], mask, self.lengths, self.stopped)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, tokenizer, temperature=1.0, top_k=0, top_p=1.0, generator=None,
             rows=0, uniform=None, interrupted=lambda: False, watch=None):
    """Sample one response per prompt. Returns a Generation.

    prompts: non-empty lists of ids; equal ones share the pass over them. A response begins right behind its
    own prompt, and ends with the end token or after max_new_tokens, a number or one for each.
    rows: how many are decoded at once (0: all). The other prompts wait until enough of those have ended.
    uniform: see `uniforms`; drawn with generator if there is none. So a response depends on its own numbers,
    not on what else is in the batch.
    interrupted: asked before each token; once it says True, the responses are returned as they are then.
    watch: called with the `Replies` after each token.
    Raises UserError when prompt and response don't fit the model's context.
    """
    device = model.device
    B, context = len(prompts), model.config.block_size
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * B
    P, limit = max(zip(map(len, prompts), limits), key=sum)
    width = P + limit
    require(width <= context,
            f"a prompt of {P} tokens and {limit} new ones don't fit the model's context "
            f"of {context}; shorten the prompt or lower --max-new-tokens")
    dtype = model.head_weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    rows = min(rows or B, B)
    if uniform is None:
        uniform = uniforms(B, max(limits), generator, device)
    replies = Replies(prompts, limits, width, tokenizer, rows, uniform, device)
    # To ask a GPU which rows are done is to wait for it, so it is asked after every few tokens only.
    check_every = 1 if device.type == "cpu" else 8

    with torch.autocast(device.type, enabled=False), decoding_weights(model, dtype, rows) as head:
        # CPUs attend to one query in float32 five times as fast as in bfloat16.
        cache_dtype = torch.float32 if device.type == "cpu" else dtype
        cache = KVCache(model.config, rows, width, device, cache_dtype)
        for step in itertools.count():
            if interrupted():
                break
            since_check = step % check_every
            if since_check == 0:
                if not replies.make_room(model, cache):
                    break
                longest = replies.longest()
            # Since the rows were asked, each may have grown by a token a step.
            upto = min(longest + since_check, width)
            replies.decode_one(model, head, cache, upto, (temperature, top_k, top_p))
            if watch is not None:
                watch(replies)
    return replies.result()
