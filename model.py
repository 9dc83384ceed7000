"""A GPT in plain PyTorch: the transformer in its dialects, its two heads, low-rank adapters.

Shapes: B batch, T sequence, C width, V vocabulary, H heads, D head width, N selected tokens.
Sequences are right-padded, positions count from 0 and attention is causal, so padding can't reach a real token.
"""
import copy
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


def shares_frozen(config):
    """Whether models share the weights that adapters leave frozen. (Shards have one owner, so there each is whole.)"""
    return config.lora_rank > 0 and config.parallel == "ddp"


def frozen_reference(policy, config):
    """The policy as it is now, never to be trained: a copy or, with adapters, the policy's own weights.

    So it must be made before `prepare` gives the policy its adapters, which the reference then lacks.
    """
    return twin(policy, shares_frozen(config)).requires_grad_(False)


class LoRALinear(nn.Linear):
    """x W^T + b + (alpha / rank) dropout(x) A^T B^T with W and b frozen (Hu et al. 2021, eq. 3). B starts at zero."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.rank, self.scale, self.dropout = linear.weight, linear.bias, rank, alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (..., rank)
        return super().forward(x) + self.scale * F.linear(low, self.lora_B)

    def merge(self, weight, lora_A, lora_B):
        """(out, in): W + scale B A."""
        return (weight + self.scale * lora_B @ lora_A).detach()

    def merged(self):
        return self.merge(self.weight, self.lora_A, self.lora_B)


LORA_TARGETS = {"attention": ("attn.c_attn", "attn.c_proj"), "mlp": ("mlp.c_fc", "mlp.c_proj"),
                "all": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def add_lora(model, rank, alpha, dropout, targets):
    """Freeze the model but for a scalar head, and put adapters on the matrices of every block that `targets` names (see LORA_TARGETS).

    Query, key and value are one matrix here, so they share A; each has rows of B of its own. Works in place.
    """
    model.requires_grad_(False)
    if isinstance(model, ScalarModel):  # a head of its own: what this model was made from as a `twin` keeps the old one
        model.score.weight = nn.Parameter(model.score.weight.detach().clone())
    for block in model.transformer.h:
        for target in LORA_TARGETS[targets]:
            part, name = target.split(".")
            setattr(getattr(block, part), name, LoRALinear(getattr(getattr(block, part), name), rank, alpha, dropout))


def prepare(model, flags):
    """What --lora-rank, --checkpoint-activations and --compile ask for, done to a model that is about to be trained."""
    model.transformer.checkpoint_activations = flags.checkpoint_activations
    if flags.lora_rank > 0:
        torch.manual_seed(flags.seed)
        add_lora(model, flags.lora_rank, flags.lora_alpha, flags.lora_dropout, flags.lora_targets)
    if flags.compile:
        for block in model.transformer.h:  # alike, so that they share what is compiled; dynamic: for any number of rows and tokens
            block.compile(dynamic=True)


@torch.no_grad()
def merged_weights(model, weights=None):
    """{name: tensor} of a model as its adapters, if it has any, make it: W + (alpha / rank) B A, and no adapter left. weights: see `whole_weights`."""
    weights = dict(weights or model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weights[name + ".weight"] = module.merge(*(weights[f"{name}.{part}"] for part in ("weight", "lora_A", "lora_B")))
    return {name: p.detach() for name, p in weights.items() if ".lora_" not in name}
