"""A GPT in plain PyTorch: the transformer in its dialects, its heads, low-rank adapters, generation.

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

from data import pad_rows
from runtime import require
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
        require(all(isinstance(n, int) for n in sizes + derived) and all(0 < n <= 1 << 20 for n in sizes)
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
    """Keys and values of all layers, preallocated for `length` positions; row b decodes at its own position."""

    def __init__(self, config, batch, length, device, dtype):
        shape = (config.n_layer, 2, batch, config.n_kv_head, length, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = torch.arange(batch, device=device)
        self.slots = torch.arange(length, device=device)

    def prefill(self, layer, k, v):
        """Store the keys and values of positions 0..T-1, each (B, H_kv, T, D)."""
        self.kv[layer, 0, :, :, :k.shape[2]] = k
        self.kv[layer, 1, :, :, :v.shape[2]] = v

    def keep(self, rows):
        """Forget all rows but these (n,)."""
        self.kv = self.kv[:, :, rows]
        self.rows = self.rows[:len(rows)]

    def extend(self, layer, k, v, positions, upto):
        """Store one position per row; return keys, values (B, H_kv, upto, D) and which of them each row may see."""
        self.kv[layer, 0, self.rows, :, positions] = k[:, :, 0].to(self.kv.dtype)
        self.kv[layer, 1, self.rows, :, positions] = v[:, :, 0].to(self.kv.dtype)
        visible = self.slots[:upto] <= positions[:, None]  # (B, upto)
        return self.kv[layer, 0, :, :, :upto], self.kv[layer, 1, :, :, :upto], visible[:, None, None]


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
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None for _ in range(2))

    def forward(self, x, layer, angles=None, cache=None, positions=None, upto=None):
        """x (B, T, C) -> (B, T, C). angles: see `rotary_angles`; cache, positions (B,), upto: see `Transformer.forward`."""
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        if self.q_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        grouped = self.n_kv_head != self.n_head
        if positions is None:  # a whole sequence: training, scoring, prefill
            if cache is not None:
                cache.prefill(layer, k, v)
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
        else:  # one new token per row
            k, v, visible = cache.extend(layer, k, v, positions, upto)
            y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=visible, enable_gqa=grouped)
        y = y.transpose(1, 2).reshape(B, T, -1)
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


MLPS = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "swiglu": swiglu}  # GPT-2 uses the tanh form
NORMS = {"layernorm": lambda config: nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
         "rmsnorm": lambda config: nn.RMSNorm(config.n_embd, config.norm_eps)}
POSITIONS = {"learned": lambda config: nn.Embedding(config.block_size + config.position_offset, config.n_embd),
             "rotary": lambda config: None}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_after = config.norm_after
        self.ln_1, self.attn = NORMS[config.norm](config), Attention(config)
        self.ln_2, self.mlp = NORMS[config.norm](config), MLP(config)

    def forward(self, x, *attention):
        if self.norm_after:
            x = self.ln_1(x + self.attn(x, *attention))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x), *attention)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The trunk: token ids to hidden states. Parameters are named as in GPT-2, whatever the family."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # keep each block's input alone, and compute the block again in the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.embed_dim)
        self.wpe = POSITIONS[config.position](config)
        narrow = config.embed_dim != config.n_embd
        self.project_in = nn.Linear(config.embed_dim, config.n_embd, bias=False) if narrow else None
        self.project_out = nn.Linear(config.n_embd, config.embed_dim, bias=False) if narrow else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = None if config.norm_after else NORMS[config.norm](config)
        for name, p in self.named_parameters():  # GPT-2's initialisation
            if p.ndim > 1:  # projections into the residual stream shrink with depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, cache=None, positions=None, upto=None):
        """ids (B, T) to hidden states (B, T, C). With positions (B,): one token per row, appended to the cache."""
        T, limit = ids.shape[1], self.config.block_size
        require(T <= limit, f"a sequence of {T} tokens is longer than the model's context of {limit}")
        at = torch.arange(T, device=ids.device) if positions is None else positions[:, None]  # (T,) or (B, 1)
        x, angles = self.wte(ids), None
        if self.project_in is not None:
            x = self.project_in(x)
        if self.wpe is not None:
            x = x + self.wpe(at + self.config.position_offset)
        else:
            angles = rotary_angles(self.config, at if positions is None else at[:, None])  # (T, D) or (B, 1, 1, D)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, layer, angles, use_reentrant=False)
            else:
                x = block(x, layer, angles, cache, positions, upto)
        if self.ln_f is not None:
            x = self.ln_f(x)
        return x if self.project_out is None else self.project_out(x)


def states_before(states, index):
    """Rows of states (B, T, C) that predict the tokens at flat positions index (N,): each token's predecessor.

    The project's only shift-by-one. A sequence's first token has no predecessor and must not be asked for.
    """
    return states.flatten(0, 1)[index - 1]  # (N, C)


def token_index(mask):
    """Flat positions (N,) of the True cells of a (B, T) mask. A mask on the CPU costs no wait for the GPU."""
    return mask.flatten().nonzero().squeeze(1)


LOGITS_AT_ONCE = 1 << 25  # fp32 logits held at any time: 128 MiB


def token_logprobs(states, weight, targets, temperature=1.0, with_entropy=False):
    """Log-probabilities of targets under softmax(states @ weight.T / temperature), in fp32.

    states (N, C), weight (V, C), targets (N,) -> logprobs (N,) and entropy (N,) in nats, or None.
    Runs in chunks whose logits are computed again in the backward pass, so that (N, V) never exists at once.
    """
    def chunk_logprobs(states, weight, targets):
        logits = F.linear(states, weight).float() / temperature  # (chunk, V)
        normaliser = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser
        if not with_entropy:
            return logprobs, None
        return logprobs, normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)

    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    if len(targets) <= rows:
        return chunk_logprobs(states, weight, targets)
    chunks = [checkpoint(chunk_logprobs, s, weight, t, use_reentrant=False, preserve_rng_state=False)
              for s, t in zip(states.split(rows), targets.split(rows))]
    logprobs, entropies = zip(*chunks)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


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

    def forward(self, ids, mask, temperature=1.0, with_entropy=False):
        """Per-token log-probabilities of the tokens that mask selects, each given all tokens before it.

        ids (B, T); mask (B, T) bool, True for tokens to score (never the first of a row).
        Returns logprobs (B, T) fp32, zero outside the mask, and the entropy of the distribution that each
        token was drawn from, likewise (or None). No logits are computed outside the mask.
        """
        index = token_index(mask).to(ids.device, non_blocking=True)
        states = states_before(self.transformer(ids), index)
        logprobs, entropy = token_logprobs(states, self.head_weight, ids.flatten()[index], temperature, with_entropy)
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
        if isinstance(self.transformer.ln_f, nn.LayerNorm) and self.transformer.ln_f.bias is None:  # `shift` needs one
            self.transformer.ln_f.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.score = nn.Linear(config.embed_dim, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.embed_dim + 1))  # Stiennon et al. 2020

    @classmethod
    def from_trunk(cls, model, share=False):
        """A scalar model on a copy of another model's trunk, with a fresh head. share: as in `twin`."""
        scalar = cls(model.config)
        bias = getattr(scalar.transformer.ln_f, "bias", None)
        scalar.transformer = twin(model.transformer, share)
        if bias is not None and scalar.transformer.ln_f.bias is None:
            scalar.transformer.ln_f.bias = bias
        return scalar.to(model.transformer.wte.weight.device)

    @property
    def device(self):
        return self.score.weight.device

    def forward(self, ids):
        """ids (B, T) -> one number per position (B, T), fp32."""
        states = self.transformer(ids).float()
        with torch.autocast(ids.device.type, enabled=False):
            return F.linear(states, self.score.weight.float()).squeeze(-1)

    @property
    def can_shift(self):
        """Whether there is a bias for `shift`: not in families with an RMSNorm, nor in OPT-350M."""
        return isinstance(self.transformer.ln_f, nn.LayerNorm)

    @torch.no_grad()
    def shift(self, amount):
        """Lower every score by amount, in the weights, so that whoever opens the folder gets the shifted score.

        The final norm's bias b becomes b - amount * w / |w|^2 for the head w: only w . b changes, by -amount.
        """
        w = self.score.weight[0]
        if self.transformer.project_out is not None:
            w = w @ self.transformer.project_out.weight
        self.transformer.ln_f.bias = nn.Parameter(self.transformer.ln_f.bias - amount * w / w.square().sum())


def last_scores(per_position, lengths):
    """Values (B, T) read at each row's last token -> (B,). lengths (B,) counts prompt and response."""
    return per_position.gather(1, lengths[:, None] - 1).squeeze(1)


def values_before(per_position, mask):
    """A critic's values (B, T) as (B, T) aligned with tokens: V(state before token t) where mask, zero elsewhere."""
    index = token_index(mask).to(per_position.device, non_blocking=True)
    return unpack(states_before(per_position.unsqueeze(-1), index).squeeze(-1), mask, index)


# ---------------------------------------------------------------------------------------------------------
# Copies that share their weights, and low-rank adapters

def twin(module, share=False):
    """A copy of a module; with share its parameters are the very tensors of the original, and take no memory."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()} if share else {})


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
    """What --lora-rank and --checkpoint-activations ask for, done to a model that is about to be trained."""
    model.transformer.checkpoint_activations = flags.checkpoint_activations
    if flags.lora_rank > 0:
        torch.manual_seed(flags.seed)
        add_lora(model, flags.lora_rank, flags.lora_alpha, flags.lora_dropout, flags.lora_targets)


@torch.no_grad()
def merged_weights(model):
    """{name: tensor} of a model as its adapters, if it has any, make it: W + (alpha / rank) B A, and no adapter left."""
    weights = {name: p.detach() for name, p in model.state_dict().items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weights[name + ".weight"] = (module.weight + module.scale * module.lora_B @ module.lora_A).detach()
    return weights


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


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draw one token per row of logits (B, V) fp32. Temperature 0 takes the largest."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:  # keep the fewest tokens whose probability reaches top_p
        ordered, order = logits.softmax(-1).sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p
        logits = logits.masked_fill(drop.gather(-1, order.argsort(-1)), -math.inf)
    # argmax(p / Exp(1)) draws from p without the wait for the GPU that torch.multinomial has
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, tokenizer, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Sample one response per prompt.

    prompts: non-empty lists of ids. Each row decodes at its own position right behind its prompt and ends with
    the end token or after max_new_tokens; generation stops when every row has ended. Returns a Generation.
    Raises UserError when prompt and response don't fit the model's context.
    """
    device = next(model.parameters()).device
    prompt_ids, lengths = pad_rows(prompts, tokenizer.pad, device)  # (B, P), (B,)
    B, P = prompt_ids.shape
    limit = model.config.block_size
    require(P + max_new_tokens <= limit, f"a prompt of {P} tokens and {max_new_tokens} new ones don't fit the model's context "
                                         f"of {limit}; shorten the prompt or lower --max-new-tokens")
    was_training = model.training
    model.eval()
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else next(model.parameters()).dtype
    cache = KVCache(model.config, B, P + max_new_tokens, device, dtype)
    ids = torch.full((B, P + max_new_tokens), tokenizer.pad, device=device)
    ids[:, :P] = prompt_ids
    states = model.transformer(prompt_ids, cache)[cache.rows, lengths - 1]  # (B, C)
    prompt_lengths, ended = lengths.clone(), torch.zeros(B, dtype=torch.bool, device=device)
    live, at, done = cache.rows, lengths, ended  # (n,) of the rows in the cache: which, next position, ended
    stops = torch.tensor(tokenizer.stops, device=device)
    check_every = 1 if device.type == "cpu" else 8  # asking a GPU which rows have ended waits for it
    for step in range(max_new_tokens):
        token = sample_token(model.logits(states).float(), temperature, top_k, top_p, generator)
        ids[live, at] = torch.where(done, tokenizer.pad, token)
        at = at + ~done
        done = done | (token[:, None] == stops).any(1)
        last = step + 1 == max_new_tokens
        if last or step % check_every == 0:
            left = (~done).nonzero().squeeze(1)
            if last or 2 * len(left) <= len(live):
                lengths, ended = lengths.index_copy(0, live, at), ended.index_copy(0, live, done)
                if last or len(left) == 0:
                    break
                live, at, done = live[left], at[left], done[left]  # go on with the unfinished rows alone
                cache.keep(left)
        # a row that has ended, but is still in the cache, repeats its last token for nobody
        states = model.transformer(ids[live, at - 1][:, None], cache, at - 1, P + step + 1)[:, 0]
    model.train(was_training)
    T = int(lengths.max())
    slots = torch.arange(T, device=device)
    mask = (slots >= prompt_lengths[:, None]) & (slots < lengths[:, None])
    return Generation(ids[:, :T], mask, lengths, ended)


def show_samples(run, model, tokenizer, rows, max_new_tokens, generator, number=3):
    """Print replies to the prompts of a few rows, evenly spread."""
    rows = rows[::max(1, len(rows) // number)][:number]
    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    fitting = [(row, ids) for row, ids in zip(rows, prompts) if len(ids) + max_new_tokens <= model.config.block_size]
    if fitting:
        with run.autocast():
            texts = generate(model, [ids for _, ids in fitting], max_new_tokens, tokenizer, generator=generator).texts(tokenizer)
        for (row, _), text in zip(fitting, texts):
            run.say(f"  sample: {row.prompt[-1]['content'][-200:]!r} -> {text!r}")
