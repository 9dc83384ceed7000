"""From prompts to replies: the cache of keys and values, sampling, stopping.

Shapes: B prompts, T tokens, V vocabulary, H heads, D head width, n rows that are decoded at the moment.
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


class KVCache:
    """Keys and values of all layers for the rows that are being decoded, preallocated; each row is at its own position."""

    def __init__(self, config, rows, length, device, dtype):
        shape = (config.n_layer, 2, rows, config.n_kv_head, length, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.slots, self.layer = torch.arange(length, device=device), 0  # layer: which one `attend` is called by

    def prefill(self, rows, source):
        """The next forward pass is over whole prompts: prompt source[i] goes to row rows[i]."""
        self.rows, self.source, self.positions = rows, source, None

    def step(self, positions, upto):
        """The next forward pass is over one token per row, at positions (n,), all below upto."""
        self.rows, self.positions, self.upto = torch.arange(len(positions), device=positions.device), positions, upto
        self.visible = (self.slots[:upto] <= positions[:, None])[:, None, None]  # (n, 1, 1, upto)

    def keep(self, rows):
        """Forget all rows but these (n,)."""
        self.kv = self.kv[:, :, rows]

    def attend(self, q, k, v):
        """Store k and v (B, H_kv, T, D), attend with q (B, H, T, D) to all that a query may see -> (B, H, T, D)."""
        keys, values = self.kv[self.layer]  # (rows, H_kv, length, D)
        grouped = q.shape[1] != k.shape[1]
        if self.positions is None:
            keys[self.rows, :, :k.shape[2]], values[self.rows, :, :v.shape[2]] = (x[self.source].to(keys.dtype) for x in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        keys[self.rows, :, self.positions], values[self.rows, :, self.positions] = (x[:, :, 0].to(keys.dtype) for x in (k, v))
        return F.scaled_dot_product_attention(q.to(keys.dtype), keys[:, :, :self.upto], values[:, :, :self.upto], attn_mask=self.visible, enable_gqa=grouped)


# ---------------------------------------------------------------------------------------------------------
# Generation

class Generation(NamedTuple):
    ids: torch.Tensor  # (B, T) prompt, response, padding
    mask: torch.Tensor  # (B, T) bool, True on the response, its end token included
    lengths: torch.Tensor  # (B,) tokens of prompt and response
    ended: torch.Tensor  # (B,) bool, the response ends in the end token

    def texts(self, tokenizer):
        """The responses as text."""
        return [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(self.ids.cpu(), self.mask.cpu())]


def uniforms(rows, tokens, generator, device):
    """The numbers (rows, tokens, 2), uniform in [0, 1), that `generate` turns into tokens."""
    return torch.rand(rows, tokens, 2, dtype=wide(device), device=device, generator=generator)


def wide(device):
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def sample_token(logits, temperature, top_k, top_p, uniform):
    """Draw one token per row of logits (B, V) fp32 with two uniform numbers each (B, 2). Temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:  # keep the fewest tokens whose probability reaches top_p
        ordered, order = logits.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(drop.gather(-1, order.argsort(-1)), -math.inf)
    # first a group of tokens, then one in it: less to add up than over the whole vocabulary
    groups = F.pad(logits.softmax(-1), (0, -logits.shape[-1] % 256)).unflatten(-1, (-1, 256))  # (B, V / 256, 256)
    group = draw(groups.sum(-1), uniform[:, :1])  # (B,)
    token = 256 * group + draw(groups[torch.arange(len(logits), device=logits.device), group], uniform[:, 1:])
    return token.clamp(max=logits.shape[-1] - 1)  # for NaN: the last group is not full


def draw(weights, uniform):
    """Draw one index per row of weights (B, n), in proportion to them: where a uniform number (B, 1) falls among their running sums.

    It takes one random number per row; torch.multinomial takes one per weight (26 times as long on a CPU, and a GPU waits for it).
    """
    sums = weights.to(wide(weights.device)).cumsum(-1)
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).squeeze(1).clamp(max=weights.shape[1] - 1)  # NaN draws the last


@contextlib.contextmanager
def decoding_weights(model, dtype, rows):
    """While it lasts, a model doesn't drop out, and its matrices are copies made for decoding: of one dtype, adapters merged. Yields the head as a function.

    A decoding step multiplies each matrix with a few rows, so its time is that of reading the matrix. On x86 CPUs oneDNN
    lays it out in the order of reading, which takes a half to a quarter of the time of `F.linear`.
    """
    onednn = (model.device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
              and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())))

    def multiplier(weight, bias=None):
        weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        if onednn:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")
        return lambda x: F.linear(x.to(dtype), weight, bias)

    linears, was_training = [module for module in model.transformer.modules() if isinstance(module, nn.Linear)], model.training
    model.eval()
    try:
        head = multiplier(model.head_weight)  # first, as the largest: the heap then has room for it again at the next call
        if dtype != torch.float32 and float32_products(model.device):
            # The logits that are scored are not rounded either, and the sampler must be what is scored.
            weight = model.head_weight.detach().to(dtype)
            head = lambda x: torch.mm(x.to(dtype), weight.T, out_dtype=torch.float32)
        for module in linears:
            module.forward = multiplier(module.merged() if hasattr(module, "merged") else module.weight, module.bias)
        yield head
    finally:
        model.train(was_training)
        for module in linears:
            vars(module).pop("forward", None)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, tokenizer, temperature=1.0, top_k=0, top_p=1.0, generator=None, rows=0, uniform=None, interrupted=lambda: False):
    """Sample one response per prompt.

    prompts: non-empty lists of ids; equal ones share the pass over them. Each row decodes at its own position right behind
    its prompt and ends with the end token or after max_new_tokens. At most `rows` are decoded at once (0: all); the
    other prompts wait until enough of those have ended. uniform: see `uniforms`; drawn with generator if there is none, so
    that a response depends on its own numbers, not on what else is in the batch. interrupted: asked before each token whether to
    leave it at that. Returns a Generation. Raises UserError when prompt and response don't fit the model's context.
    """
    device = model.device
    prompt_ids, prompt_lengths = pad_rows(prompts, tokenizer.pad, device)  # (B, P), (B,)
    prompt_lengths = prompt_lengths.to(device)
    B, P = prompt_ids.shape
    limit, last = model.config.block_size, P + max_new_tokens
    require(last <= limit, f"a prompt of {P} tokens and {max_new_tokens} new ones don't fit the model's context "
                           f"of {limit}; shorten the prompt or lower --max-new-tokens")
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.head_weight.dtype
    rows = min(rows or B, B)
    ids = torch.full((B, last), tokenizer.pad, device=device)
    ids[:, :P] = prompt_ids
    lengths, stopped = prompt_lengths.clone(), torch.zeros(B, dtype=torch.bool, device=device)  # (B,)
    ends, stops = prompt_lengths + max_new_tokens, torch.tensor(tokenizer.stops, device=device)
    live = torch.arange(rows, device=device)  # (n,) the prompt that each row of the cache belongs to
    done = torch.ones_like(live, dtype=torch.bool)  # (n,) nothing is to be decoded there, or no more
    admitted, check_every = 0, 1 if device.type == "cpu" else 8  # asking a GPU which rows are done waits for it
    uniform = uniforms(B, max_new_tokens, generator, device) if uniform is None else uniform

    with torch.autocast(device.type, enabled=False), decoding_weights(model, dtype, rows) as head:
        # CPUs attend to one query in float32 five times as fast as in bfloat16
        cache = KVCache(model.config, rows, last, device, torch.float32 if device.type == "cpu" else dtype)
        for step in itertools.count():
            if interrupted():
                break
            if step % check_every == 0:
                free = done.nonzero().squeeze(1)
                if 4 * len(free) >= len(live):
                    # rows that are done make room for prompts that wait, or leave
                    new = range(admitted, min(admitted + len(free), B))
                    if new:
                        first = {}  # {prompt: its place among the different ones}
                        source = torch.tensor([first.setdefault(tuple(prompts[i]), len(first)) for i in new], device=device)
                        cache.prefill(free[:len(new)], source)
                        padded, sizes = pad_rows(list(first), tokenizer.pad, device)
                        model.transformer(padded, cache, torch.arange(len(sizes)) * padded.shape[1] + sizes - 1)
                        live[free[:len(new)]] = torch.tensor(new, device=device)
                        done[free[:len(new)]] = False
                        admitted = new.stop
                    if len(new) < len(free):
                        left = (~done).nonzero().squeeze(1)
                        if len(left) == 0:
                            break
                        live, done = live[left], done[left]
                        cache.keep(left)
                reach = int(lengths[live].max())
            # each row's last token once more if it has just been admitted: its prompt's pass asked for no logits
            at = lengths[live]  # (n,)
            cache.step(at - 1, min(reach + step % check_every, last))
            states = model.transformer(ids[live, at - 1][:, None], cache)[:, 0]  # (n, C)
            token = sample_token(head(states).float(), temperature, top_k, top_p, uniform[live, (at - prompt_lengths[live]).clamp(max=max_new_tokens - 1)])
            ids[live, at.clamp(max=last - 1)] = torch.where(done, ids[live, at.clamp(max=last - 1)], token)
            lengths[live] = at + ~done
            stop = ~done & (token[:, None] == stops).any(1)
            stopped[live] |= stop
            done = done | stop | (lengths[live] >= ends[live])
    T = int(lengths.max())
    slots = torch.arange(T, device=device)
    mask = (slots >= prompt_lengths[:, None]) & (slots < lengths[:, None])
    return Generation(ids[:, :T], mask, lengths, stopped)
