"""A GPT in plain PyTorch: the transformer in its dialects, its heads, generation.

Shapes: B batch, T sequence, C width, V vocabulary, H heads, D head width, N selected tokens.
Sequences are right-padded, positions count from 0 and attention is causal, so padding can't reach a real token.
"""
import contextlib
import copy
import itertools
import math
import platform
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import pad_rows
from head import float32_products, token_logprobs
from flags import require
from tokenizer import encode_prompt


@dataclass
class GPTConfig:
    """Shape and kind of a transformer. The defaults are those of GPT-2; `checkpoint.py` has those of the other families."""
    vocab_size: int
    block_size: int = 1024  # longest sequence, tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12  # key/value heads: n_head, or a divisor of it (grouped-query attention)
    n_embd: int = 768
    head_dim: int = 0  # width of a head; 0: n_embd / n_head
    n_inner: int = 0  # width inside the MLP; 0: 4 n_embd
    embed_dim: int = 0  # width of the token embedding, projected from and to n_embd where it differs; 0: n_embd
    norm: str = "layernorm"  # or rmsnorm
    norm_eps: float = 1e-5
    norm_after: bool = False  # norms behind attention and MLP (and none at the end) instead of before them
    qk_norm: bool = False  # an RMSNorm on every head's query and key
    position: str = "learned"  # or rotary
    position_offset: int = 0  # rows of the learned positions that come before position 0
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    rope_scaling: tuple = ()  # ("linear", factor) or ("llama3", factor, low_freq_factor, high_freq_factor, original context)
    mlp: str = "gelu"  # or relu, swiglu
    bias: bool = True  # of linear layers and norms
    qkv_bias: bool | None = None  # of query, key and value; None: as bias
    tied: bool = True  # the head is the token embedding
    dropout: float = 0.0
    header: dict = field(default_factory=dict, repr=False)  # config.json that it was read from, which save_model writes back

    def __post_init__(self):
        for name, choices in {"norm": NORMS, "position": POSITIONS, "mlp": MLPS}.items():
            kind = getattr(self, name)
            require(kind in choices, f"model config: {name} '{kind}' is not supported, only {', '.join(choices)}")
        sizes = (self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_kv_head, self.n_embd)
        derived = (self.head_dim, self.n_inner, self.embed_dim, self.position_offset)
        require(all(type(n) is int for n in sizes + derived) and all(0 < n <= 1 << 20 for n in sizes)
                and all(0 <= n <= 1 << 20 for n in derived), f"model config: a size is out of range in {self}")
        require(self.n_layer <= 4096, f"model config: {self.n_layer} layers are too many")
        require(self.head_dim or self.n_embd % self.n_head == 0, f"model config: width {self.n_embd} is not divisible by {self.n_head} heads")
        require(self.n_head % self.n_kv_head == 0, f"model config: {self.n_head} heads are not divisible by {self.n_kv_head} key/value heads")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner, self.embed_dim = self.n_inner or 4 * self.n_embd, self.embed_dim or self.n_embd
        self.qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        require(self.position == "learned" or self.head_dim % 2 == 0, f"model config: rotary positions need an even head width, not {self.head_dim}")
        numbers = (self.norm_eps, self.rope_theta, *self.rope_scaling[1:])
        require(all(isinstance(x, (int, float)) and 0 < x < 1e15 for x in numbers), f"model config: a number is out of range in {self}")
        require(all(isinstance(flag, bool) for flag in (self.norm_after, self.qk_norm, self.bias, self.qkv_bias, self.tied)),
                f"model config: a switch is neither true nor false in {self}")


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


def rotary_angles(config, positions):
    """cos and sin (..., D) of the angles by which rotary positions (Su et al. 2021, eq. 34) turn a head at positions (...).

    Both halves of D hold the same angles (pairs are (i, i + D/2), as in the published weights). Long-context scaling
    stretches the wavelengths: all of them (linear, Chen et al. 2023), or the long ones (llama3, Dubey et al. 2024).
    """
    D = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, device=positions.device).float() / D)  # (D/2,)
    if config.rope_scaling:
        kind, factor, *rest = config.rope_scaling
        stretched = frequencies / factor
        if kind == "llama3":
            low, high, context = rest
            turns = context * frequencies / (2 * math.pi)  # within the context that the model was trained on first
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            stretched = (1 - keep) * stretched + keep * frequencies
        frequencies = stretched
    angles = (positions[..., None].float() * frequencies).repeat(*[1] * positions.ndim, 2)  # (..., D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the heads of x (B, H, T, D) by the angles of their positions, (T, D) or (B, 1, 1, D)."""
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.dropout = config.n_head, config.n_kv_head, config.head_dim, config.dropout
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.head_dim, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x, layout, angles=None, cache=None):
        """x (B, T, C) or (M, C) -> the same, or (N, C); layout: see `Layout`; angles: see `rotary_angles`; cache: see `Transformer.forward`."""
        B, T, inside, wanted = layout[:4]
        heads = self.c_attn(x)
        if inside is not None:
            heads = heads.new_zeros(B * T, heads.shape[-1]).index_copy(0, inside, heads)
        heads = heads.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            y = cache.attend(q, k, v)
        else:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=self.n_kv_head != self.n_head)
        y = select(y.transpose(1, 2).reshape(B, T, -1), wanted)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """act(x W) V; swiglu: (silu(x G) * x W) V (Shazeer 2020), G and W in one matrix."""

    def __init__(self, config):
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.n_inner * (2 if config.mlp == "swiglu" else 1), bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        return F.dropout(self.c_proj(MLPS[self.kind](self.c_fc(x))), self.dropout, self.training)


def swiglu(x):
    gate, x = x.chunk(2, -1)
    return F.silu(gate) * x


def embedding(rows, width):
    """nn.Embedding, which on the meta device doesn't draw: that would import a tenth of PyTorch (70 MB, a second)."""
    weight = torch.empty(rows, width)
    return nn.Embedding.from_pretrained(weight, freeze=False) if weight.is_meta else nn.Embedding(rows, width)


def as_wide(x, weight, bias=None):
    """All three in the widest of their precisions, as a norm wants them.

    x may be the residual stream, and the weights gathered in the precision of the products (--parallel fsdp); or x
    is a head's query or key, in the precision of the products, and the weights are not.
    """
    wide = torch.promote_types(x.dtype, weight.dtype)
    return x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        x, weight, bias = as_wide(x, self.weight, self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        x, weight, _ = as_wide(x, self.weight)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


MLPS = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "swiglu": swiglu}  # GPT-2 uses the tanh form
NORMS = {"layernorm": lambda config: LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
         "rmsnorm": lambda config: RMSNorm(config.n_embd, config.norm_eps)}
POSITIONS = {"learned": lambda config: embedding(config.block_size + config.position_offset, config.n_embd),
             "rotary": lambda config: None}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_after = config.norm_after
        self.ln_1, self.attn = NORMS[config.norm](config), Attention(config)
        self.ln_2, self.mlp = NORMS[config.norm](config), MLP(config)

    def forward(self, x, layout, *attention):
        if self.norm_after:
            x = self.ln_1(select(x, layout.kept) + self.attn(x, layout, *attention))
            return self.ln_2(x + self.mlp(x))
        x = select(x, layout.kept) + self.attn(self.ln_1(x), layout, *attention)
        return x + self.mlp(self.ln_2(x))


class Layout(NamedTuple):
    """Which positions of a batch (B, T) a block computes. All of them (None), or those inside alone, laid end to end: then
    nothing is multiplied for padding, which exists in attention only. The last block drops what nobody wants."""
    B: int
    T: int
    inside: torch.Tensor | None = None  # (M,) flat positions of the block's input
    wanted: torch.Tensor | None = None  # (N,) flat positions of its output; None: all of (B, T)
    kept: torch.Tensor | None = None  # (N,) where the output's positions are in the input; None: they are the same


def select(x, index):
    """Rows index of x (..., C), flat -> (N, C); x itself for None."""
    return x if index is None else x.reshape(-1, x.shape[-1]).index_select(0, index)


def layouts(B, T, index, device):
    """(Layout of all blocks but the last, of the last) for states at flat positions index (N,), on the CPU and ascending, or None: at all."""
    if index is None:
        return Layout(B, T), Layout(B, T)
    last = torch.full((B,), -1).scatter_reduce(0, index // T, index % T, "amax")  # what is behind a row's last wanted position
    inside = (torch.arange(T) <= last[:, None]).flatten().nonzero().squeeze(1)  # can't reach any
    if len(inside) > 0.97 * B * T:  # moving rows to attention and back takes as long as computing a few for nothing
        index = index.to(device, non_blocking=True)
        return Layout(B, T), Layout(B, T, None, index, index)
    inside, index, kept = (t.to(device, non_blocking=True) for t in (inside, index, torch.searchsorted(inside, index)))
    return Layout(B, T, inside, inside), Layout(B, T, inside, index, kept)


class Transformer(nn.Module):
    """The trunk: token ids to hidden states. Parameters are named as in GPT-2, whatever the family."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep each block's input alone, and compute the block again in the backward pass
        self.wte = embedding(config.vocab_size, config.embed_dim)
        self.wpe = POSITIONS[config.position](config)
        narrow = config.embed_dim != config.n_embd
        self.project_in = nn.Linear(config.embed_dim, config.n_embd, bias=False) if narrow else None
        self.project_out = nn.Linear(config.n_embd, config.embed_dim, bias=False) if narrow else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = None if config.norm_after else NORMS[config.norm](config)
        for name, p in self.named_parameters():  # GPT-2's initialisation
            if p.is_meta:  # it is about to get its weights; see `embedding`
                continue
            if p.ndim > 1:  # projections into the residual stream shrink with depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, cache=None, index=None):
        """ids (B, T) to hidden states (B, T, C), or to those at flat positions index (N,) alone (N, C), which costs less: see `Layout`.

        index: on the CPU, ascending, each once. cache: keys and values go there; after its `step`, T is 1 and the cache
        holds what came before.
        """
        (B, T), limit = ids.shape, self.config.block_size
        require(T <= limit, f"a sequence of {T} tokens is longer than the model's context of {limit}")
        positions = None if cache is None else cache.positions
        at = torch.arange(T, device=ids.device) if positions is None else positions[:, None]  # (T,) or (B, 1)
        inner, outer = layouts(B, T, index, ids.device)
        if inner.inside is not None:
            ids, at = ids.flatten()[inner.inside], inner.inside % T  # (M,)
        x, angles = self.wte(ids), None  # (B, T, C) or (M, C)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.wpe is not None:
            x = x + self.wpe(at + self.config.position_offset)
        else:
            angles = rotary_angles(self.config, torch.arange(T, device=ids.device) if positions is None else at[:, None])  # (T, D) or (B, 1, 1, D)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            layout = outer if layer + 1 == len(self.h) else inner
            if cache is not None:
                cache.layer = layer
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, angles, use_reentrant=False)
            elif cache is None:
                x = block(x, layout, angles)
            else:  # not what --compile made of it
                x = block.forward(x, layout, angles, cache)
        if self.ln_f is not None:
            x = self.ln_f(x)
        return x if self.project_out is None else self.project_out(x)


def before(index):
    """Flat positions (N,) of the tokens before those at index (N,): where a token is predicted, and its state valued.

    The project's only shift-by-one. A sequence's first token has no predecessor and must not be asked for.
    """
    return index - 1


def token_index(mask):
    """Flat positions (N,) of the True cells of a (B, T) mask. A mask on the CPU costs no wait for the GPU."""
    return mask.flatten().nonzero().squeeze(1)


def unpack(values, mask, index):
    """Put values (N,) back to where mask (B, T) is True; zero elsewhere."""
    return values.new_zeros(mask.numel()).index_copy(0, index, values).view(mask.shape)


class GPT(nn.Module):
    """A language model; where the head is the token embedding (tied), it adds no weight to the trunk."""

    def __init__(self, config):
        super().__init__()
        self.config, self.transformer = config, Transformer(config)
        self.lm_head = None if config.tied else nn.Linear(config.embed_dim, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        """(V, C)"""
        return self.transformer.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids, mask, temperature=1.0, with_entropy=False, summed=False):
        """Per-token log-probabilities of the tokens that mask selects, each given all tokens before it.

        ids (B, T); mask (B, T) bool, on the CPU (see `token_index`), True for tokens to score (never the first of a row).
        Returns logprobs (B, T) fp32 (`token_logprobs` says of which logits), zero outside the mask, and the entropy
        of the distribution that each token was drawn from, likewise (or None). No logits are computed outside the
        mask. With summed: the sum () of the logprobs, which is cheaper to differentiate, and None.
        """
        at = token_index(mask)
        states, index = self.transformer(ids, index=before(at)), at.to(ids.device, non_blocking=True)  # (N, C), (N,)
        logprobs, entropy = token_logprobs(states, self.head_weight, ids.flatten()[index], temperature, with_entropy, summed)
        if summed:
            return logprobs, None
        return unpack(logprobs, mask, index), unpack(entropy, mask, index) if with_entropy else None

    @property
    def device(self):
        return self.head_weight.device

    def logits(self, states):
        """Logits (..., V) of hidden states (..., C)."""
        return F.linear(states, self.head_weight)


class ScalarModel(nn.Module):
    """A trunk with one number per position: a reward model (read at the last token) or a critic (before each token)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.transformer = config, Transformer(config)
        self.complete()

    def complete(self):
        """Give the trunk what makes a scalar model of it: a fresh head, and the bias that `shift` needs."""
        if isinstance(self.transformer.ln_f, nn.LayerNorm) and self.transformer.ln_f.bias is None:
            self.transformer.ln_f.bias = nn.Parameter(torch.zeros(self.config.n_embd))
        self.score = nn.Linear(self.config.embed_dim, 1, bias=False)
        if not self.score.weight.is_meta:
            nn.init.normal_(self.score.weight, std=1 / math.sqrt(self.config.embed_dim + 1))  # Stiennon et al. 2020

    @classmethod
    def from_trunk(cls, model, share=False):
        """A scalar model on a copy of another model's trunk, with a fresh head. share: as in `twin`."""
        with torch.device("meta"):  # the trunk is there already
            scalar = cls(model.config)
        scalar.transformer = twin(model.transformer, share)
        scalar.complete()
        return scalar.to(model.transformer.wte.weight.device)

    @property
    def device(self):
        return self.score.weight.device

    def forward(self, ids, index=None):
        """ids (B, T) -> one number per position (B, T), or per flat position in index (N,), fp32. index: see `Transformer.forward`."""
        states = self.transformer(ids, index=index).float()
        with torch.autocast(ids.device.type, enabled=False):
            return F.linear(states, self.score.weight.float()).squeeze(-1)

    @property
    def can_shift(self):
        """Whether there is a bias for `shifted`: not in families with an RMSNorm, nor in OPT-350M."""
        return isinstance(self.transformer.ln_f, nn.LayerNorm)


def shifted(weights, amount):
    """Weights {name: tensor} of a ScalarModel with every score lower by amount, so that whoever opens the folder gets the shifted score.

    The final norm's bias b becomes b - amount * w / |w|^2 for the head w: only w . b changes, by -amount.
    """
    w, bias = weights["score.weight"][0], "transformer.ln_f.bias"
    if "transformer.project_out.weight" in weights:
        w = w @ weights["transformer.project_out.weight"]
    return weights | {bias: weights[bias] - amount * w / w.square().sum()}


def last_scores(model, ids, lengths):
    """A reward model's scores (B,) of ids (B, T), read at each row's last token. lengths (B,), on the CPU, counts prompt and response."""
    return model(ids, torch.arange(len(ids)) * ids.shape[1] + lengths - 1)


def values_before(model, ids, mask):
    """A critic's values (B, T) aligned with tokens: V(state before token t) where mask (B, T) is True, zero elsewhere."""
    at = token_index(mask)
    return unpack(model(ids, before(at)), mask, at.to(ids.device, non_blocking=True))


def twin(module, share=False):
    """A copy of a module; with share its parameters are the very tensors of the original, and take no memory."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()} if share else {})


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


def show_samples(run, model, tokenizer, rows, max_new_tokens, generator, number=3):
    """Print replies to the prompts of a few rows, evenly spread."""
    rows = rows[::max(1, len(rows) // number)][:number]
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    fitting = [(row, ids) for row, ids in zip(rows, prompts) if len(ids) + max_new_tokens <= model.config.block_size]
    if fitting:
        with run.gathered(model), run.autocast():
            texts = generate(model, [ids for _, ids in fitting], max_new_tokens, tokenizer, generator=generator, interrupted=run.asked_to_stop).texts(tokenizer)
        run.safe_point()
        for (row, _), text in zip(fitting, texts):
            run.say(f"  sample: {row.prompt[-1]['content'][-200:]!r} -> {text!r}")
