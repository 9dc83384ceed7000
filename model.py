"""A GPT in plain PyTorch: the transformer in its dialects, its two heads, low-rank adapters.

Shapes: B batch, T sequence, C width, V vocabulary, H heads, D head width, N selected tokens.
Sequences are right-padded, positions count from 0 and attention is causal, so padding can't reach a token.
"""
import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from head import token_logprobs
from plumbing.flags import require


@dataclass
class GPTConfig:
    """Shape and kind of a transformer. The defaults are GPT-2's; formats/families.py has those of others."""
    vocab_size: int
    block_size: int = 1024  # longest sequence, tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12  # key/value heads: n_head, or a divisor of it (grouped-query attention)
    n_embd: int = 768
    head_dim: int = 0  # width of a head; 0: n_embd / n_head
    n_inner: int = 0  # width inside the MLP; 0: 4 n_embd
    # Width of the token embedding; 0: n_embd. Where it differs, there are projections to n_embd and back.
    embed_dim: int = 0
    norm: str = "layernorm"  # or rmsnorm
    norm_eps: float = 1e-5
    norm_after: bool = False  # norms behind attention and MLP (and none at the end) instead of before them
    qk_norm: bool = False  # an RMSNorm on every head's query and key
    position: str = "learned"  # or rotary
    position_offset: int = 0  # rows of the learned positions that come before position 0
    rope_theta: float = 10000.0  # base of the rotary wavelengths
    # ("linear", factor) or ("llama3", factor, low_freq_factor, high_freq_factor, original context).
    rope_scaling: tuple = ()
    mlp: str = "gelu"  # or relu, swiglu
    bias: bool = True  # of linear layers and norms
    qkv_bias: bool | None = None  # of query, key and value; None: as bias
    tied: bool = True  # the head is the token embedding
    dropout: float = 0.0
    # Numbers of a scalar model for each position: 3 of a process reward model, with a gate one of each aim.
    labels: int = 1
    gate: int = 0  # width inside the gate that weighs a reward model's aims by the prompt; 0: there is none
    # The config.json that it was read from, which save_model writes back.
    header: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for name, choices in {"norm": NORMS, "position": POSITIONS, "mlp": MLPS}.items():
            kind = getattr(self, name)
            require(kind in choices,
                    f"model config: {name} '{kind}' is not supported, only {', '.join(choices)}")
        # Sizes that are derived from others may be 0 here.
        self.check_sizes("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", least=1)
        self.check_sizes("head_dim", "n_inner", "embed_dim", "position_offset", least=0)
        require(self.n_layer <= 4096, f"model config: {self.n_layer} layers are too many")
        require(self.head_dim or self.n_embd % self.n_head == 0,
                f"model config: width {self.n_embd} is not divisible by {self.n_head} heads")
        require(self.n_head % self.n_kv_head == 0,
                f"model config: {self.n_head} heads are not divisible by {self.n_kv_head} key/value heads")

        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        self.embed_dim = self.embed_dim or self.n_embd
        if self.qkv_bias is None:
            self.qkv_bias = self.bias

        require(self.position == "learned" or self.head_dim % 2 == 0,
                f"model config: rotary positions need an even head width, not {self.head_dim}")
        for number in (self.norm_eps, self.rope_theta, *self.rope_scaling[1:]):
            require(isinstance(number, (int, float)) and 0 < number < 1e15,
                    f"model config: a number is out of range in {self}")
        for switch in (self.norm_after, self.qk_norm, self.bias, self.qkv_bias, self.tied):
            require(isinstance(switch, bool), f"model config: a switch is neither true nor false in {self}")

    def check_sizes(self, *names, least):
        for name in names:
            size = getattr(self, name)
            require(type(size) is int and least <= size <= 1 << 20,
                    f"model config: a size is out of range in {self}")


def rotary_angles(config, positions):
    """cos and sin (..., D) of the angles by which rotary positions turn a head at positions (...).

    Su et al. 2021, eq. 34. Both halves of D hold the same angles: pairs are (i, i + D/2), as in the published
    weights. Long-context scaling stretches the wavelengths: all of them (linear, Chen et al. 2023), or the
    long ones (llama3, Dubey et al. 2024).
    """
    D = config.head_dim
    exponents = torch.arange(0, D, 2, device=positions.device).float() / D  # (D/2,)
    frequencies = 1.0 / config.rope_theta ** exponents
    if config.rope_scaling:
        kind, factor, *rest = config.rope_scaling
        stretched = frequencies / factor
        if kind == "llama3":
            low, high, context = rest
            # Within the context that the model was trained on first.
            turns = context * frequencies / (2 * math.pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            stretched = (1 - keep) * stretched + keep * frequencies
        frequencies = stretched
    angles = positions[..., None].float() * frequencies  # (..., D/2)
    angles = angles.repeat(*[1] * positions.ndim, 2)  # (..., D)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the heads of x (B, H, T, D) by the angles of their positions, (T, D) or (B, 1, 1, D)."""
    a, b = x.chunk(2, -1)  # (B, H, T, D/2)
    turned = torch.cat([-b, a], -1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = config.head_dim
        self.dropout = config.dropout
        # Query, key and value of all heads are one matrix.
        heads = config.n_head + 2 * config.n_kv_head
        self.c_attn = nn.Linear(config.n_embd, heads * self.head_dim, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * self.head_dim, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x, layout, angles=None, cache=None):
        """x (B, T, C) or (M, C) -> the same, or (N, C).

        layout: see `Layout`. angles: see `rotary_angles`. cache: see `Transformer.forward`.
        """
        B, T, inside, wanted = layout[:4]
        heads = self.c_attn(x)  # (B, T, (H + 2 H_kv) D), or (M, ...)
        if inside is not None:
            # Attention alone needs the rows of the batch, with zeros for padding.
            heads = heads.new_zeros(B * T, heads.shape[-1]).index_copy(0, inside, heads)
        heads = heads.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.q_norm is not None:
            q = self.q_norm(q).to(v.dtype)
            k = self.k_norm(k).to(v.dtype)
        if angles is not None:
            q = rotate(q, *angles)
            k = rotate(k, *angles)
        if cache is not None:
            y = cache.attend(q, k, v)  # (B, H, T, D)
        else:
            dropout = self.dropout if self.training else 0.0
            grouped = self.n_kv_head != self.n_head
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H D)
        y = self.c_proj(select(y, wanted))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    """act(x W) V; swiglu: (silu(x G) * x W) V (Shazeer 2020), G and W in one matrix."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.dropout = config.dropout
        matrices = 2 if config.mlp == "swiglu" else 1
        self.c_fc = nn.Linear(config.n_embd, config.n_inner * matrices, bias=config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        """x (..., C) -> (..., C)."""
        act = MLPS[self.kind]
        x = self.c_proj(act(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


def swiglu(x):
    """x G and x W side by side (..., 2 n_inner) -> silu(x G) * x W (..., n_inner)."""
    gate, x = x.chunk(2, -1)
    return F.silu(gate) * x


def embedding(rows, width):
    """nn.Embedding, which on the meta device doesn't draw.

    That would import a tenth of PyTorch (70 MB, a second).
    """
    weight = torch.empty(rows, width)
    if weight.is_meta:
        return nn.Embedding.from_pretrained(weight, freeze=False)
    return nn.Embedding(rows, width)


def as_wide(x, weight, bias=None):
    """All three in the widest of their precisions, as a norm wants them.

    x may be the residual stream, and the weights gathered in the precision of the products (--parallel fsdp).
    Or x is a head's query or key, in the precision of the products, and the weights are not.
    """
    wide = torch.promote_types(x.dtype, weight.dtype)
    if bias is not None:
        bias = bias.to(wide)
    return x.to(wide), weight.to(wide), bias


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        x, weight, bias = as_wide(x, self.weight, self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        x, weight, _ = as_wide(x, self.weight)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


# What the words of a config stand for. GPT-2's gelu is the tanh form.
MLPS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "swiglu": swiglu,
}
NORMS = {
    "layernorm": lambda config: LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
    "rmsnorm": lambda config: RMSNorm(config.n_embd, config.norm_eps),
}
POSITIONS = {
    "learned": lambda config: embedding(config.block_size + config.position_offset, config.n_embd),
    "rotary": lambda config: None,
}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_after = config.norm_after
        norm = NORMS[config.norm]
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x, layout, *attention):
        """x (B, T, C) or (M, C) -> the same, or (N, C): see `Layout`."""
        if self.norm_after:
            x = self.ln_1(select(x, layout.kept) + self.attn(x, layout, *attention))
            return self.ln_2(x + self.mlp(x))
        x = select(x, layout.kept) + self.attn(self.ln_1(x), layout, *attention)
        return x + self.mlp(self.ln_2(x))


class Layout(NamedTuple):
    """Which positions of a batch (B, T) a block computes.

    All of them (None), or those inside alone, laid end to end: then nothing is multiplied for padding, which
    exists in attention only. The last block drops what nobody wants.
    """
    B: int
    T: int
    # (M,) flat positions of the block's input.
    inside: torch.Tensor | None = None
    # (N,) flat positions of its output; None: all of (B, T).
    wanted: torch.Tensor | None = None
    # (N,) where the output's positions are in the input; None: they are the same.
    kept: torch.Tensor | None = None


def select(x, index):
    """Rows index of x (..., C), flat -> (N, C); x itself for None."""
    if index is None:
        return x
    return x.reshape(-1, x.shape[-1]).index_select(0, index)


def layouts(B, T, index, device):
    """(Layout of all blocks but the last, Layout of the last) for states at flat positions index (N,).

    index: on the CPU and ascending, or None for all positions.
    """
    everything = Layout(B, T)
    if index is None:
        return everything, everything

    # Attention is causal, so what lies behind a row's last wanted position can't reach any wanted one.
    row, place = index // T, index % T  # (N,)
    last = torch.full((B,), -1).scatter_reduce(0, row, place, "amax")  # (B,)
    reaches = torch.arange(T) <= last[:, None]  # (B, T)
    inside = reaches.flatten().nonzero().squeeze(1)  # (M,)

    if len(inside) > 0.97 * B * T:
        # To move rows to attention and back takes as long as to compute a few for nothing.
        index = index.to(device, non_blocking=True)
        return everything, Layout(B, T, None, index, index)

    kept = torch.searchsorted(inside, index)  # (N,)
    inside = inside.to(device, non_blocking=True)
    index = index.to(device, non_blocking=True)
    kept = kept.to(device, non_blocking=True)
    return Layout(B, T, inside, inside), Layout(B, T, inside, index, kept)


class Transformer(nn.Module):
    """The trunk: token ids to hidden states. Parameters are named as in GPT-2, whatever the family."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # True: keep each block's input alone, and compute the block again in the backward pass.
        self.checkpoint_activations = False
        self.wte = embedding(config.vocab_size, config.embed_dim)
        self.wpe = POSITIONS[config.position](config)
        narrow = config.embed_dim != config.n_embd
        self.project_in = nn.Linear(config.embed_dim, config.n_embd, bias=False) if narrow else None
        self.project_out = nn.Linear(config.n_embd, config.embed_dim, bias=False) if narrow else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = None if config.norm_after else NORMS[config.norm](config)
        self.initialise()

    def initialise(self):
        """As GPT-2: normal matrices, smaller with depth if they end in the residual stream; zero biases."""
        for name, p in self.named_parameters():
            # On the meta device there is nothing to draw: weights that exist already are about to come.
            if p.is_meta:
                continue
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, cache=None, index=None):
        """ids (B, T) to hidden states (B, T, C), or to those at flat positions index (N,) alone (N, C).

        index: on the CPU, ascending, each once. With it nothing is computed for padding: see `Layout`.
        cache: keys and values go there. After its `step`, T is 1 and the cache holds what came before.
        """
        B, T = ids.shape
        limit = self.config.block_size
        require(T <= limit, f"a sequence of {T} tokens is longer than the model's context of {limit}")
        inner, outer = layouts(B, T, index, ids.device)

        # Where each token stands: at its place in the batch, or in decoding at its row's own position.
        if cache is None or cache.positions is None:
            at = torch.arange(T, device=ids.device)  # (T,)
            turns = at  # (T,)
        else:
            at = cache.positions[:, None]  # (B, 1)
            turns = at[:, None]  # (B, 1, 1)
        if inner.inside is not None:
            ids = ids.flatten()[inner.inside]  # (M,)
            at = inner.inside % T  # (M,)

        x = self.wte(ids)  # (B, T, C) or (M, C)
        if self.project_in is not None:
            x = self.project_in(x)
        angles = None
        if self.wpe is not None:
            x = x + self.wpe(at + self.config.position_offset)
        else:
            # For attention, which has all of (B, T) whatever is inside: (T, D) or (B, 1, 1, D).
            angles = rotary_angles(self.config, turns)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            layout = outer if layer + 1 == len(self.h) else inner
            if cache is not None:
                cache.layer = layer
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, layout, angles, use_reentrant=False)
            elif cache is None:
                x = block(x, layout, angles)
            else:
                # The plain function, not what --compile made of it.
                x = block.forward(x, layout, angles, cache)

        if self.ln_f is not None:
            x = self.ln_f(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return x


def predicting(index):
    """Flat positions (N,) of the tokens before those at index (N,).

    There a token is predicted, and the state before it is valued.

    The project's only shift-by-one. A sequence's first token has no predecessor and must not be asked for.
    """
    return index - 1


def read_at(*positions):
    """(index, [place]) of flat positions, some tensors (n,) on the CPU that may share some of them.

    index: as `Transformer.forward` takes it, ascending and each once; place (n,): where in it a tensor's are.
    """
    index, place = torch.cat(positions).unique(return_inverse=True)
    return index, place.split([len(part) for part in positions])


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
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = None
        if not config.tied:
            self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)

    @property
    def head_weight(self):
        """(V, C)"""
        if self.lm_head is None:
            return self.transformer.wte.weight
        return self.lm_head.weight

    def forward(self, ids, mask, temperature=1.0, with_entropy=False, summed=False, read=None):
        """Per-token log-probabilities of the tokens that mask selects, each given all tokens before it.

        ids (B, T); mask (B, T) bool, on the CPU (see `token_index`), True for what to score, never a row's
        first token. Returns logprobs (B, T) fp32 (`token_logprobs` says of which logits), zero outside the
        mask, and likewise the entropy of the distribution that each token was drawn from (or None). No
        logits are computed outside the mask.
        summed: the sum () of the logprobs instead, which is cheaper to differentiate, and None.
        read(states (N, C), head (V, C), targets (N,)): computed and returned instead of all that.
        """
        at = token_index(mask)  # (N,)
        states = self.transformer(ids, index=predicting(at))  # (N, C)
        at = at.to(ids.device, non_blocking=True)
        targets = ids.flatten()[at]  # (N,)
        if read is not None:
            return read(states, self.head_weight, targets)
        logprobs, entropy = token_logprobs(states, self.head_weight, targets,
                                           temperature, with_entropy, summed)
        if summed:
            return logprobs, None
        if with_entropy:
            entropy = unpack(entropy, mask, at)
        return unpack(logprobs, mask, at), entropy

    @property
    def device(self):
        return self.head_weight.device

    def logits(self, states):
        """Logits (..., V) of hidden states (..., C)."""
        return F.linear(states, self.head_weight)


class ScalarModel(nn.Module):
    """A trunk with one number per position: a reward model, or a critic; or several (config.labels).

    A reward model is read at the last token, a critic before each token. A process reward model has the
    logits of bad, neutral and good, and is read at the last token of each step. With a gate (config.gate) the
    numbers are those of several aims, and the reward is their mean by weights that depend on the prompt.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.complete()

    def complete(self):
        """Give the trunk what makes a scalar model of it: a fresh head, and the bias that `shift` needs."""
        norm, width = self.transformer.ln_f, self.config.embed_dim
        if self.can_shift and norm.bias is None:
            norm.bias = nn.Parameter(torch.zeros(self.config.n_embd))
        self.score = nn.Linear(width, self.config.labels, bias=False)
        if not self.score.weight.is_meta:
            # Stiennon et al. 2020.
            nn.init.normal_(self.score.weight, std=1 / math.sqrt(width + 1))
        self.gate = None
        if self.config.gate:
            inside = self.config.gate
            last = nn.Linear(inside, self.config.labels)
            self.gate = nn.Sequential(nn.Linear(width, inside), nn.ReLU(), last)

    @classmethod
    def from_trunk(cls, model, share=False, labels=1, gate=0):
        """A scalar model on a copy of another model's trunk, with a fresh head. share: as in `copy_of`."""
        # The trunk is there already, so none is drawn.
        with torch.device("meta"):
            scalar = cls(dataclasses.replace(model.config, labels=labels, gate=gate))
        scalar.transformer = copy_of(model.transformer, share)
        scalar.complete()
        return scalar.to(model.transformer.wte.weight.device)

    @property
    def device(self):
        return self.score.weight.device

    def forward(self, ids, index=None, read=None):
        """ids (B, T) -> one number per position (B, T), or per flat position in index (N,), fp32.

        Of several labels (B, T, labels) or (N, labels). index: see `Transformer.forward`.
        read(states (N, C), head (labels, C), embedding (V, C)): computed and returned instead.
        """
        states = self.transformer(ids, index=index)
        if read is not None:
            return read(states, self.score.weight, self.transformer.wte.weight)
        states = states.float()
        with torch.autocast(ids.device.type, enabled=False):
            return F.linear(states, self.score.weight.float()).squeeze(-1)

    def gated(self, states, prompts):
        """Rewards (B,) of states (B, C) of replies' and prompts' last tokens, by the gate.

        Wang et al. 2024 (ArmoRM), eq. 4.
        """
        with torch.autocast(states.device.type, enabled=False):
            aims = F.linear(states.float(), self.score.weight.float())  # (B, aims)
            weights = self.gate(prompts.float()).softmax(-1)  # (B, aims)
        return (weights * aims).sum(-1)

    @property
    def can_shift(self):
        """Whether there is a bias for `shifted`: not in families with an RMSNorm, nor in OPT-350M."""
        return isinstance(self.transformer.ln_f, nn.LayerNorm)


def shifted(weights, amount):
    """Weights {name: tensor} of a ScalarModel with every score lower by amount.

    So whoever opens the folder gets the shifted score. The final norm's bias b (C,) becomes
    b - amount * w / |w|^2 for the head w (C,): only w . b changes, by -amount. Of a model with a gate that
    goes for every aim's w, and so for their mean, however it is weighed; the gate goes on weighing as before.
    """
    bias = "transformer.ln_f.bias"
    w = weights["score.weight"]  # (aims, C), or of the embedding's width where that differs
    if "transformer.project_out.weight" in weights:
        w = w @ weights["transformer.project_out.weight"]  # (aims, C)
    step = -amount * torch.linalg.pinv(w.double()).sum(1).to(w.dtype)  # (C,): -amount w / |w|^2 of a single w
    moved = {bias: weights[bias] + step}
    if "gate.0.bias" in weights:
        # It reads the prompt's state, which has moved as well.
        moved["gate.0.bias"] = weights["gate.0.bias"] - weights["gate.0.weight"] @ step
    return weights | moved


def last_positions(ids, lengths, mask):
    """Flat positions (B,) of the last tokens of rows and of their prompts, on the CPU.

    ids (B, T), lengths (B,); mask (B, T): the replies' tokens. A row without any is all prompt.
    """
    begin = torch.arange(len(ids)) * ids.shape[1]  # (B,)
    prompts = torch.where(mask.any(1), mask.int().argmax(1), lengths)  # (B,) tokens
    return begin + lengths - 1, begin + prompts - 1


def last_scores(model, ids, lengths, mask=None):
    """A reward model's scores (B,) of ids (B, T), read at each row's last token.

    lengths (B,), on the CPU, counts prompt and response. mask (B, T), on the CPU: the replies' tokens, for a
    model with a gate, which reads the prompt's last token as well.
    """
    last = torch.arange(len(ids)) * ids.shape[1] + lengths - 1  # (B,) flat positions
    # What training wraps a model in has no gate.
    if getattr(model, "gate", None) is None:
        return model(ids, last)
    index, places = read_at(*last_positions(ids, lengths, mask))

    def read(states, head, embedding):
        return model.gated(*(states[place.to(ids.device)] for place in places))

    return model(ids, index, read)


def last_scores_and_logprobs(model, ids, lengths, mask, rows, head=None):
    """As `last_scores`, and from the same pass log-probabilities per token (Q,) of the replies in some rows.

    mask (B, T), on the CPU: the replies' tokens, False on a row's first; rows (Q,) on the CPU; head: (V, C),
    the trunk's own token embedding if None.
    """
    B, T = ids.shape
    read_mask = torch.zeros_like(mask)
    read_mask[rows] = mask[rows]
    at = token_index(read_mask)  # (N,)
    last = torch.arange(B) * T + lengths - 1  # (B,)
    index, places = read_at(last, predicting(at))
    of_scores, of_tokens = (place.to(ids.device, non_blocking=True) for place in places)  # (B,), (N,)
    at = at.to(ids.device, non_blocking=True)

    def read(states, score, embedding):
        with torch.autocast(ids.device.type, enabled=False):
            scores = F.linear(states[of_scores].float(), score.float()).squeeze(-1)
        weight = embedding if head is None else head
        logprobs, _ = token_logprobs(states[of_tokens], weight, ids.flatten()[at])
        return scores, logprobs

    scores, logprobs = model(ids, index, read)
    sums = unpack(logprobs, read_mask, at).sum(1)  # (B,)
    means = sums / mask.sum(1).to(ids.device, non_blocking=True)  # (B,)
    return scores, means[rows.to(ids.device, non_blocking=True)]


def values_before(model, ids, mask):
    """A critic's values (B, T) aligned with tokens.

    V(state before token t) where mask (B, T), on the CPU, is True; zero elsewhere.
    """
    at = token_index(mask)  # (N,)
    values = model(ids, predicting(at))  # (N,)
    return unpack(values, mask, at.to(ids.device, non_blocking=True))


def copy_of(module, share=False):
    """A copy of a module. With share its parameters are the original's very tensors, and take no memory."""
    # What deepcopy finds under its id in this table it takes for a copy that was made already.
    copies = {}
    if share:
        copies = {id(p): p for p in module.parameters()}
    return copy.deepcopy(module, copies)


def shares_frozen(config):
    """Whether models share the weights that adapters leave frozen.

    (Shards have one owner, so there each is whole.)
    """
    return config.lora_rank > 0 and config.parallel == "ddp"


def frozen_reference(policy, config):
    """The policy as it is now, never to be trained: a copy or, with adapters, the policy's own weights.

    So it must be made before `prepare_training` gives the policy its adapters, which the reference then
    lacks.
    """
    return copy_of(policy, shares_frozen(config)).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------
# Low-rank adapters (LoRA), and what else a model gets before it is trained

class LoRALinear(nn.Linear):
    """x W^T + b + (alpha / rank) dropout(x) A^T B^T with W and b frozen (Hu et al. 2021, eq. 3).

    W (out, in), A (rank, in), B (out, rank). B starts at zero.
    """

    def __init__(self, linear, rank, alpha, dropout):
        has_bias, device = linear.bias is not None, linear.weight.device
        super().__init__(linear.in_features, linear.out_features, has_bias, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.rank = rank
        self.scale = alpha / rank
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        dropped = F.dropout(x, self.dropout, self.training)
        low = F.linear(dropped, self.lora_A)  # (..., rank)
        return super().forward(x) + self.scale * F.linear(low, self.lora_B)

    def merge(self, weight, lora_A, lora_B):
        """(out, in): W + scale B A."""
        return (weight + self.scale * lora_B @ lora_A).detach()

    def merged(self):
        return self.merge(self.weight, self.lora_A, self.lora_B)


# The matrices of a block that --lora-targets stands for.
LORA_TARGETS = {
    "attention": ("attn.c_attn", "attn.c_proj"),
    "mlp": ("mlp.c_fc", "mlp.c_proj"),
    "all": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}


def add_lora(model, rank, alpha, dropout, targets):
    """Freeze the model but for a scalar head, and put adapters on matrices of every block. Works in place.

    targets: a key of LORA_TARGETS. Query, key and value are one matrix here, so they share A; each has its
    own rows of B.
    """
    model.requires_grad_(False)
    if isinstance(model, ScalarModel):
        # A head of its own: what this model was made from as a `copy_of` keeps the old one.
        model.score.weight = nn.Parameter(model.score.weight.detach().clone())
    for block in model.transformer.h:
        for target in LORA_TARGETS[targets]:
            part, name = target.split(".")
            owner = getattr(block, part)
            linear = getattr(owner, name)
            setattr(owner, name, LoRALinear(linear, rank, alpha, dropout))


def prepare_training(model, flags):
    """What --lora-rank, --checkpoint-activations and --compile ask for, done to a model before training."""
    model.transformer.checkpoint_activations = flags.checkpoint_activations
    if flags.lora_rank > 0:
        torch.manual_seed(flags.seed)
        add_lora(model, flags.lora_rank, flags.lora_alpha, flags.lora_dropout, flags.lora_targets)
    if flags.compile:
        # Blocks are alike, so they share what is compiled. dynamic: it serves any number of rows and tokens.
        for block in model.transformer.h:
            block.compile(dynamic=True)


@torch.no_grad()
def merged_weights(model, weights=None):
    """{name: tensor} of a model as its adapters, if any, make it: W + (alpha / rank) B A, no adapter left.

    weights: see `whole_weights`.
    """
    weights = dict(weights or model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weight = weights[f"{name}.weight"]
            lora_A, lora_B = weights[f"{name}.lora_A"], weights[f"{name}.lora_B"]
            weights[f"{name}.weight"] = module.merge(weight, lora_A, lora_B)
    return {name: p.detach() for name, p in weights.items() if ".lora_" not in name}
