"""A GPT in plain PyTorch: the transformer, its language-model and scalar heads, generation, checkpoint folders.

Shapes: B batch, T sequence, C width, V vocabulary, H heads, D head width, N selected tokens.
Sequences are right-padded, positions count from 0 and attention is causal, so padding can't reach a real token.
"""
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch.utils.checkpoint import checkpoint

from data import pad_rows
from runtime import SCRATCH_FLAGS, UserError, require, write_atomically, write_json
from tokenizer import Tokenizer, encode_prompt


@dataclass
class GPTConfig:
    """Shape and kind of a transformer. The kinds have one choice each so far: those of GPT-2."""
    vocab_size: int
    block_size: int = 1024  # longest sequence, tokens
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 12  # key/value heads: n_head, or a divisor of it (grouped-query attention)
    n_embd: int = 768
    norm: str = "layernorm"
    position: str = "learned"
    mlp: str = "gelu"
    bias: bool = True  # of linear layers and norms
    dropout: float = 0.0

    def __post_init__(self):
        for field, choices in {"norm": NORMS, "position": POSITIONS, "mlp": MLPS}.items():
            kind = getattr(self, field)
            require(kind in choices, f"model config: {field} '{kind}' is not supported, only {', '.join(choices)}")
        sizes = (self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_kv_head, self.n_embd)
        require(all(isinstance(n, int) and 0 < n <= 1 << 20 for n in sizes), f"model config: a size is out of range in {self}")
        require(self.n_layer <= 4096, f"model config: {self.n_layer} layers are too many")
        require(self.n_embd % self.n_head == 0, f"model config: width {self.n_embd} is not divisible by {self.n_head} heads")
        require(self.n_head % self.n_kv_head == 0, f"model config: {self.n_head} heads are not divisible by {self.n_kv_head} key/value heads")


class KVCache:
    """Keys and values of all layers, preallocated for `length` positions; row b decodes at its own position."""

    def __init__(self, config, batch, length, device, dtype):
        shape = (config.n_layer, 2, batch, config.n_kv_head, length, config.n_embd // config.n_head)
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


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.n_kv_head, config.dropout
        self.head_dim = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, (config.n_head + 2 * config.n_kv_head) * self.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, layer, cache=None, positions=None, upto=None):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)
        grouped = self.n_kv_head != self.n_head
        if positions is None:  # a whole sequence: training, scoring, prefill
            if cache is not None:
                cache.prefill(layer, k, v)
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
        else:  # one new token per row
            k, v, visible = cache.extend(layer, k, v, positions, upto)
            y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=visible, enable_gqa=grouped)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class GeluMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2 uses the tanh form
        return F.dropout(x, self.dropout, self.training)


NORMS = {"layernorm": lambda config: nn.LayerNorm(config.n_embd, bias=config.bias)}
POSITIONS = {"learned": lambda config: nn.Embedding(config.block_size, config.n_embd)}
MLPS = {"gelu": GeluMLP}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = NORMS[config.norm](config), Attention(config)
        self.ln_2, self.mlp = NORMS[config.norm](config), MLPS[config.mlp](config)

    def forward(self, x, *attention):
        x = x + self.attn(self.ln_1(x), *attention)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The trunk: token ids to hidden states. Parameter names are those of GPT-2 in `transformers`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = POSITIONS[config.position](config)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = NORMS[config.norm](config)
        for name, p in self.named_parameters():  # GPT-2's initialisation
            if p.ndim > 1:  # projections into the residual stream shrink with depth
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, cache=None, positions=None, upto=None):
        """ids (B, T) to hidden states (B, T, C). With positions (B,): one token per row, appended to the cache."""
        T, limit = ids.shape[1], self.config.block_size
        require(T <= limit, f"a sequence of {T} tokens is longer than the model's context of {limit}")
        at = torch.arange(T, device=ids.device) if positions is None else positions[:, None]
        x = self.wte(ids) + self.wpe(at)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.h):
            x = block(x, layer, cache, positions, upto)
        return self.ln_f(x)


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
    """A language model; its head is the token embedding (tied), so it adds no weight to the trunk."""
    architecture = "GPT2LMHeadModel"

    def __init__(self, config):
        super().__init__()
        self.config, self.transformer = config, Transformer(config)

    def forward(self, ids, mask, temperature=1.0, with_entropy=False):
        """Per-token log-probabilities of the tokens that mask selects, each given all tokens before it.

        ids (B, T); mask (B, T) bool, True for tokens to score (never the first of a row).
        Returns logprobs (B, T) fp32, zero outside the mask, and the entropy of the distribution that each
        token was drawn from, likewise (or None). No logits are computed outside the mask.
        """
        index = token_index(mask).to(ids.device, non_blocking=True)
        states = states_before(self.transformer(ids), index)
        logprobs, entropy = token_logprobs(states, self.transformer.wte.weight, ids.flatten()[index], temperature, with_entropy)
        return unpack(logprobs, mask, index), unpack(entropy, mask, index) if with_entropy else None

    def logits(self, states):
        """Logits (..., V) of hidden states (..., C)."""
        return F.linear(states, self.transformer.wte.weight)


class ScalarModel(nn.Module):
    """A trunk with one number per position: a reward model (read at the last token) or a critic (before each token)."""
    architecture = "GPT2ForSequenceClassification"

    def __init__(self, config):
        super().__init__()
        self.config, self.transformer = config, Transformer(config)
        if self.transformer.ln_f.bias is None:  # `shift` needs one
            self.transformer.ln_f.bias = nn.Parameter(torch.zeros(config.n_embd))
        self.score = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd + 1))  # Stiennon et al. 2020

    @classmethod
    def from_trunk(cls, model):
        """A scalar model on a copy of another model's trunk, with a fresh head."""
        scalar = cls(model.config)
        scalar.transformer.load_state_dict(model.transformer.state_dict(), strict=model.config.bias)
        return scalar.to(next(model.parameters()).device)

    def forward(self, ids):
        """ids (B, T) -> one number per position (B, T), fp32."""
        states = self.transformer(ids).float()
        with torch.autocast(ids.device.type, enabled=False):
            return F.linear(states, self.score.weight.float()).squeeze(-1)

    @torch.no_grad()
    def shift(self, amount):
        """Lower every score by amount, in the weights, so that whoever opens the folder gets the shifted score.

        The final norm's bias b becomes b - amount * w / |w|^2 for the head w: only w . b changes, by -amount.
        """
        w = self.score.weight[0]
        self.transformer.ln_f.bias -= amount * w / w.square().sum()


def last_scores(per_position, lengths):
    """Values (B, T) read at each row's last token -> (B,). lengths (B,) counts prompt and response."""
    return per_position.gather(1, lengths[:, None] - 1).squeeze(1)


def values_before(per_position, mask):
    """A critic's values (B, T) as (B, T) aligned with tokens: V(state before token t) where mask, zero elsewhere."""
    index = token_index(mask).to(per_position.device, non_blocking=True)
    return unpack(states_before(per_position.unsqueeze(-1), index).squeeze(-1), mask, index)


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
    check_every = 1 if device.type == "cpu" else 8  # asking a GPU which rows have ended waits for it
    for step in range(max_new_tokens):
        token = sample_token(model.logits(states).float(), temperature, top_k, top_p, generator)
        ids[live, at] = torch.where(done, tokenizer.pad, token)
        at = at + ~done
        done = done | (token == tokenizer.eos)
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


# ---------------------------------------------------------------------------------------------------------
# Checkpoint folders: config.json, model.safetensors, bpe.json, in the layout that `transformers` opens as GPT-2

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2 stores these as (in, out)


def save_model(folder, model, tokenizer):
    """Write a checkpoint folder, each file atomically. model: GPT or ScalarModel (unwrapped)."""
    config, folder = model.config, Path(folder)
    require(config.n_kv_head == config.n_head, "GPT-2's checkpoint layout has no grouped key/value heads")
    tensors = {}
    for name, p in model.state_dict().items():
        p = p.float().cpu()
        require(p.isfinite().all(), f"{name} is not finite, so {folder} was not written; lower the learning rate, or look at the data")
        tensors[name] = p.T.contiguous() if name.endswith(TRANSPOSED) else p
        bias_name = name.replace("weight", "bias")
        if ("c_" in name or "ln_" in name) and name.endswith("weight") and bias_name not in model.state_dict():
            tensors[bias_name] = torch.zeros(p.shape[0])  # GPT-2 always has biases
    header = {"model_type": "gpt2", "architectures": [model.architecture], "vocab_size": config.vocab_size,
              "n_positions": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
              "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
              "attn_pdrop": config.dropout, "embd_pdrop": config.dropout, "resid_pdrop": config.dropout,
              "bos_token_id": tokenizer.eos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad,
              "barerlhf": dataclasses.asdict(config)}
    if isinstance(model, ScalarModel):
        header |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # one label: a score
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", header)
    write_atomically(folder / "model.safetensors", safetensors_bytes(tensors, {"format": "pt"}))
    tokenizer.save(folder / "bpe.json")


def load_model(folder, kind, dropout=0.0):
    """Open a checkpoint folder as kind GPT or ScalarModel. Returns (model, tokenizer); UserError says what is wrong."""
    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: no such checkpoint folder")
    for name in ("config.json", "model.safetensors", "bpe.json"):
        require((folder / name).is_file(), f"{folder} is not a checkpoint folder of this project: {name} is missing")
    try:
        header = json.loads((folder / "config.json").read_text())
        architecture, config = header["architectures"][0], GPTConfig(**header["barerlhf"] | {"dropout": dropout})
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{folder}/config.json is damaged or foreign ({type(error).__name__}: {error})") from None
    words = {"GPT2LMHeadModel": "a language model", "GPT2ForSequenceClassification": "a reward model"}
    require(architecture == kind.architecture, f"{folder} holds {words.get(architecture, architecture)}, but {words[kind.architecture]} is needed here")
    try:
        tensors = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/model.safetensors is damaged ({error})") from None
    with torch.device("meta"):  # takes no memory: the sizes are believed only once the weights agree
        model = kind(config)
    weights = {}
    for name, p in model.state_dict().items():
        require(name in tensors, f"{folder}/model.safetensors lacks {name}")
        found = tensors[name].T if name.endswith(TRANSPOSED) else tensors[name]
        require(found.shape == p.shape, f"{folder}/model.safetensors: {name} has shape {tuple(found.shape)}, config.json says {tuple(p.shape)}")
        weights[name] = found.contiguous()
    model.to_empty(device="cpu").load_state_dict(weights)
    tokenizer = Tokenizer.load(folder / "bpe.json")
    require(tokenizer.n_vocab == config.vocab_size, f"{folder}: the tokenizer has {tokenizer.n_vocab} tokens, the model {config.vocab_size}")
    return model, tokenizer


def open_model(config, kind, dropout=0.0):
    """The model that a script's --model names: a checkpoint folder, or `scratch` for a new one. Returns (model, tokenizer)."""
    if config.model != "scratch":
        for flag in SCRATCH_FLAGS:
            require(getattr(config, flag) == getattr(type(config), flag), f"--{flag.replace('_', '-')} is for --model scratch; {config.model} has its own")
        return load_model(config.model, kind, dropout)
    name = config.tokenizer if config.tokenizer != "auto" else "toy" if config.data == "toy" else "gpt2"
    tokenizer = Tokenizer.named(name)
    torch.manual_seed(config.seed)
    return kind(GPTConfig(tokenizer.n_vocab, config.block_size, config.layers, config.heads, config.heads, config.width,
                          dropout=dropout)), tokenizer
