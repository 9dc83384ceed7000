"""Checkpoint folders in the layout of Hugging Face: `config.json`, `model.safetensors`, the tokenizer's files.

What transformers, vLLM and llama.cpp open goes in, and what is written they open: a language model as the family's
...ForCausalLM, a reward model as its ...ForSequenceClassification with one label. Weights are safetensors, never a
pickle (but see --allow-pickle); they become float32 here. `FAMILIES` lists the dialects; anything else is refused.
"""
import dataclasses
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from formats.families import (
    BUFFERS, FAMILIES, TRANSPOSED, architecture_of, family_of, own_notes, stored_as, to_stored)
from formats.foreign_tokenizer import open_tokenizer
from formats.sources import read_rows, split_by_prompt
from formats.tokenizer import ALL_LETTERS, Tokenizer, train_bpe
from model import GPT, GPTConfig, LoRALinear, ScalarModel, merged_weights
from plumbing.disk import how_to_make, write_json, write_tensors
from plumbing.flags import SCRATCH_FLAGS, UserError, parse_sources, require
from plumbing.hardware import keep_heap
from plumbing.ranks import whole_weights


LEARNED_FROM = 5_000_000  # characters, at most: some seconds of English, a minute of Chinese


def scratch_tokenizer(config):
    """The tokenizer of a model from scratch, as --tokenizer names it. config: a training script's."""
    name = config.tokenizer
    if name == "auto":
        beside = Path(parse_sources(config.data)[0][0]).parent
        name = str(beside) if (beside / "tokenizer.json").is_file() else "gpt2"
    if name == "gpt2":
        return Tokenizer.gpt2()
    if name and Path(name).is_dir():
        return open_tokenizer(name)
    form = re.fullmatch(r"bpe:([0-9]{3,6})", name)
    require(form and 300 <= int(form[1]) <= 200_000,
            f"--tokenizer {name}: write auto, gpt2, a checkpoint's or tokenizer's folder (there is none "
            "of this name), or bpe:N to learn N tokens from --data, N from 300 to 200000")
    if config.resume and (Path(config.out) / "tokenizer.json").is_file():
        return open_tokenizer(config.out)  # what was learned then: with --override the data may be another
    return Tokenizer("bpe", *train_bpe(texts_to_learn(config), int(form[1]), ALL_LETTERS))


def texts_to_learn(config):
    """Prompts and replies of the rows of --data that are trained on; of large files, the start of each."""
    try:
        rows = read_rows(config.data, "demonstrations", lambda text: None, config.part, config.skip_bad)
    except UserError:  # prompts alone
        rows = read_rows(config.data, "prompts", lambda text: None, config.part, config.skip_bad)
    rows, _ = split_by_prompt(rows, config.val_fraction)
    texts = [text for row in rows for text in [*(turn["content"] for turn in row.prompt), *row.replies]]
    share = min(1, LEARNED_FROM / max(1, sum(map(len, texts))))
    return [text[:math.ceil(share * len(text))] for text in texts]


# ---------------------------------------------------------------------------------------------------------
# Writing

def save_model(folder, model, tokenizer, flags=None, change=lambda weights: weights, single_turn=None):
    """Write a checkpoint folder, each file atomically. model: GPT or ScalarModel (not in DDP), its adapters merged.

    flags: a run's, for --save-dtype and --lora-save (which may ask for a PEFT folder with the adapters alone). change: from
    {name: weight} to what is written. single_turn: see `knows_single_turns`; None: as it was. Under torchrun
    all ranks call, and rank 0 writes. Raises UserError if a weight is not finite; nothing is written then.
    """
    config, folder, dtype = model.config, Path(folder), flags.save_dtype if flags else "float32"
    kind = GPT if isinstance(model, GPT) else ScalarModel
    whole = whole_weights(model)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    weights = change(merged_weights(model, whole))
    for name, p in weights.items():
        require(p.isfinite().all(), f"{name} is not finite, so {folder} was not written; lower the learning rate, or look at the data")
    folder.mkdir(parents=True, exist_ok=True)
    if flags and flags.lora_save == "adapter":
        return save_adapter(folder, model, whole, tokenizer, flags.model)
    header = dict(config.header) or {
        "model_type": "gpt2", "n_positions": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": "gelu_new", "layer_norm_epsilon": config.norm_eps, "tie_word_embeddings": True,
        "attn_pdrop": config.dropout, "embd_pdrop": config.dropout, "resid_pdrop": config.dropout, "bos_token_id": tokenizer.eos,
        "barerlhf": {"bias": config.bias}}
    header |= {"architectures": [architecture_of(family_of(config), kind)], "vocab_size": config.vocab_size,
               "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad, "torch_dtype": dtype}
    header.pop("dtype", None)  # as transformers 5 calls it
    if single_turn is not None:
        header["barerlhf"] = own_notes(header) | {"single_turn": single_turn}
    read = GPTConfig(**FAMILIES[family_of(config)].config(header), dropout=config.dropout, header=config.header)
    require(read == config, f"a checkpoint folder of the family {family_of(config)} can't hold this model: it would be read as {read}, but is {config}")
    if kind is ScalarModel:
        header |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # one label: a score
    stored = to_stored({name: p.to("cpu", getattr(torch, dtype)) for name, p in weights.items()}, config)
    tokenizer.save(folder)
    write_json(folder / "config.json", header)
    write_tensors(folder / "model.safetensors", stored, {"format": "pt"})  # last: where it is, the rest is


def save_adapter(folder, model, weights, tokenizer, base):
    """Write a PEFT folder: adapter_config.json, adapter_model.safetensors, the tokenizer. weights: the model's, see `whole_weights`."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    tensors, targets = {}, set()
    for name, module in adapters.items():
        names = stored_as(name + ".weight", model.config)
        A, B = weights[name + ".lora_A"], weights[name + ".lora_B"]
        rows = [B] if len(names) == 1 else B.split([n for _, n in names])
        for (theirs, _), B in zip(names, rows):
            theirs = theirs.removesuffix(".weight")
            targets.add(re.split(r"\.\d+\.", theirs)[1])
            tensors |= {f"base_model.model.{theirs}.lora_A.weight": A, f"base_model.model.{theirs}.lora_B.weight": B}
    scalar, one = isinstance(model, ScalarModel), next(iter(adapters.values()))
    if scalar:
        tensors["base_model.model.score.weight"] = weights["score.weight"]
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM", "base_model_name_or_path": base, "r": one.rank,
        "lora_alpha": one.scale * one.rank, "lora_dropout": one.dropout, "target_modules": sorted(targets), "bias": "none",
        "fan_in_fan_out": family_of(model.config) == "gpt2", "modules_to_save": ["score"] if scalar else None, "inference_mode": True})
    tokenizer.save(folder)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


# ---------------------------------------------------------------------------------------------------------
# Reading

def read_json(path):
    """A JSON object from a file of a checkpoint folder."""
    require(path.is_file(), f"{path.parent} is not a checkpoint folder: {path.name} is missing")
    require(path.stat().st_size < 1 << 26, f"{path} is too large to be what it is called")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})") from None
    require(isinstance(value, dict), f"{path} is damaged (it holds no object)")
    return value


def is_pickle(path):
    """Whether a file begins like a pickle, or like the archive of pickles that PyTorch writes, whatever it is called."""
    with open(path, "rb") as f:
        start = f.read(9)
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and start[8:] != b"{")  # the latter is safetensors'


def fetch(name, allow_pickle=False):
    """The folder that --model names: itself, or a hub name (org/model), fetched through huggingface_hub."""
    folder = Path(name)
    require(not folder.is_file(), f"{name} is a file, and a model is a folder with config.json and model.safetensors" + (
        "; this one is a pickle, which can run code when it is opened: have whoever made it write safetensors" if folder.is_file() and is_pickle(folder) else ""))
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or folder.parent.is_dir() or folder.parts[0] == "runs":  # where our own runs go
        require(folder.is_dir(), f"{name}: no such checkpoint folder{how_to_make(folder)}")
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such checkpoint folder here; to fetch it from the Hugging Face hub: pip install -r requirements-hf.txt") from None
    wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"] + (["pytorch_model*.bin"] if allow_pickle else [])
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # not found, no network, not allowed: the library has a class for each
        raise UserError(f"{name}: no such checkpoint folder here, and it could not be fetched from the hub "
                        f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from None


class Weights:
    """The tensors of a folder by name, read when asked for, from one file or the shards that an index lists."""

    def __init__(self, folder, stem="model", allow_pickle=False):
        self.where, files = {}, {}
        for name, kind in ((f"{stem}.safetensors", "safetensors"), ("pytorch_model.bin", "pickle")):
            if (folder / name).is_file():
                files = {name: kind}
            elif (folder / f"{name}.index.json").is_file():
                shards = read_json(folder / f"{name}.index.json").get("weight_map")
                require(isinstance(shards, dict) and all(isinstance(f, str) and re.fullmatch(r"[\w.-]+", f) for f in shards.values()),
                        f"{folder / name}.index.json is damaged (weight_map)")
                files = {shard: kind for shard in sorted(set(shards.values()))}
            if files:
                break
        self.path = folder / next(iter(files), f"{stem}.safetensors")
        require(files, f"{folder} is not a checkpoint folder: {stem}.safetensors is missing")
        require("pickle" not in files.values() or allow_pickle,
                f"{self.path} is a pickle, which can run code when it is opened; add --allow-pickle if you trust where it came from, or convert it to safetensors")
        for name, kind in files.items():
            path = folder / name
            require(path.is_file(), f"{folder} lacks {name}, which its index names")
            require(kind == "pickle" or not is_pickle(path), f"{path} is refused: it is a pickle, which can run code when it is opened, under another name")
            try:
                opened = safe_open(path, "pt") if kind == "safetensors" else load_pickle(path)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error})") from None
            self.where |= {key: opened for key in opened.keys()}

    def names(self):
        return set(self.where)

    def get(self, name):
        require(name in self.where, f"{self.path} lacks {name}")
        opened = self.where[name]
        tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        require(tensor.is_floating_point(), f"{self.path}: {name} is {str(tensor.dtype)[6:]}; quantised weights are not supported")
        return tensor.to(torch.float32)


def load_pickle(path):
    """Tensors of a pytorch_model.bin, by the unpickler that builds tensors alone. Before torch 2.10 even that could run code (CVE-2026-24747)."""
    require(tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10), f"{path}: --allow-pickle needs torch 2.10 or newer")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise TypeError
    except Exception as error:  # a hostile or damaged pickle fails in any way
        raise UserError(f"{path} is refused: it is no plain pickle of tensors ({type(error).__name__})") from None
    return tensors


def read_config(folder, dropout=0.0):
    """(GPTConfig, kind of model: GPT or ScalarModel) from a folder's config.json. UserError says why if it is not supported."""
    path = folder / "config.json"
    header = read_json(path)
    family = header.get("model_type")
    require(isinstance(family, str) and family in FAMILIES, f"{path}: models of type '{family}' are not supported, only {', '.join(FAMILIES)}")
    require(not header.get("quantization_config"), f"{path}: quantised checkpoints are not supported; use the original one")
    kinds = {architecture_of(family, kind): kind for kind in (GPT, ScalarModel)}
    try:
        architecture = (header.get("architectures") or [None])[0]
        require(architecture in kinds, f"the architecture '{architecture}' is not supported, only {' and '.join(kinds)}")
        return GPTConfig(**FAMILIES[family].config(header), dropout=dropout, header=header), kinds[architecture]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged or incomplete ({type(error).__name__}: {error})") from None


@torch.no_grad()
def load_model(name, kind, dropout=0.0, allow_pickle=False):
    """Open a checkpoint folder or hub name as kind GPT or ScalarModel. Returns (model, tokenizer); UserError says what is wrong."""
    folder = fetch(name, allow_pickle)
    if (folder / "adapter_config.json").is_file():
        return load_adapter(folder, kind, dropout, allow_pickle)
    config, found = read_config(folder, dropout)
    words = {GPT: "a language model", ScalarModel: "a reward model"}
    require(found is kind, f"{folder} holds {words[found]}, but {words[kind]} is needed here")
    stored, tokenizer = Weights(folder, allow_pickle=allow_pickle), open_tokenizer(folder)
    with torch.device("meta"):  # takes no memory: the sizes are believed only once the weights agree
        model = kind(config)
    unread, weights = stored.names(), {}
    for ours, p in model.state_dict().items():
        parts = []
        for theirs, _ in stored_as(ours, config):
            bare = theirs.split(".", 1)[1]  # GPT-2 and old OPT folders leave out the trunk's name
            require({theirs, bare} & stored.names(), f"{stored.path} lacks {theirs}")
            theirs = theirs if theirs in stored.names() else bare
            unread.discard(theirs)
            parts.append(stored.get(theirs))
        turned = family_of(config) == "gpt2" and ours.endswith(TRANSPOSED)
        shape = tuple(sum(part.shape[0] for part in parts) if i == 0 else n for i, n in enumerate(parts[0].shape))
        shape = shape[::-1] if turned else shape
        require(shape == p.shape, f"{stored.path}: {ours} has shape {shape}, config.json says {tuple(p.shape)}")
        weights[ours] = torch.cat([part.T if turned else part for part in parts]).contiguous()
    extra = sorted(name for name in unread if not name.endswith(BUFFERS) and not (name == "lm_head.weight" and config.tied)
                   and not (family_of(config) == "gpt2" and not config.bias and name.endswith("bias")))
    require(not extra, f"{stored.path} holds weights that a model of this config.json has no place for: {', '.join(extra[:3])}")
    model.load_state_dict(weights, assign=True)
    grow_vocabulary(folder, model, tokenizer)
    del stored, weights
    keep_heap()  # what reading took is given back first
    return model, tokenizer


def grow_vocabulary(folder, model, tokenizer):
    """Give the tokens that were added to a tokenizer rows in embedding and head: the mean of all rows, and a little noise."""
    config, new = model.config, range(tokenizer.n_vocab - tokenizer.added, tokenizer.n_vocab)
    require(new.start <= config.vocab_size, f"{folder}: the tokenizer has {new.start} tokens, the model {config.vocab_size}")
    if len(new) == 0:
        return
    generator = torch.Generator().manual_seed(0)
    heads = [model.transformer.wte] + ([model.lm_head] if getattr(model, "lm_head", None) is not None else [])
    for module in heads:  # a mean row leaves the other tokens' probabilities nearly as they are (Hewitt 2021)
        known = module.weight[:new.start]
        rows = known.mean(0) + 0.1 * known.std(0) * torch.randn(len(new), known.shape[1], generator=generator)
        module.weight = nn.Parameter(torch.cat([known, rows, module.weight[new.stop:]]))
    model.config = model.transformer.config = dataclasses.replace(config, vocab_size=len(model.transformer.wte.weight))


def load_adapter(folder, kind, dropout, allow_pickle):
    """Open a PEFT folder: its base model with the adapters merged."""
    h = read_json(folder / "adapter_config.json")
    plain = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    odd = [name for name, value in plain.items() if h.get(name, value) not in (value, None)]
    require(not odd, f"{folder}/adapter_config.json: {odd[0] if odd else ''} is not supported")
    wanted = "CAUSAL_LM" if kind is GPT else "SEQ_CLS"
    require(h.get("task_type") == wanted, f"{folder} holds an adapter for {h.get('task_type')}, but one for {wanted} is needed here")
    base, rank, alpha = h.get("base_model_name_or_path"), h.get("r"), h.get("lora_alpha")
    require(isinstance(base, str) and isinstance(rank, int) and rank > 0 and isinstance(alpha, (int, float)) and abs(alpha) < 1e15,
            f"{folder}/adapter_config.json is damaged")
    require(not (fetch(base, allow_pickle) / "adapter_config.json").is_file(),
            f"{folder} is an adapter of {base}, which is an adapter itself; only those of a whole model are supported")
    model, tokenizer = load_model(base, GPT, dropout, allow_pickle)
    if kind is ScalarModel:
        model = ScalarModel.from_trunk(model, share=True)
    stored = Weights(folder, "adapter_model")
    unread = stored.names()
    require(kind is GPT or "base_model.model.score.weight" in unread, f"{stored.path} lacks base_model.model.score.weight, the head")
    weights = model.state_dict()
    for ours, p in weights.items():
        start = 0
        for theirs, rows in stored_as(ours, model.config):
            name = "base_model.model." + theirs.removesuffix(".weight")
            if ours == "score.weight" and f"{name}.weight" in unread:
                p.copy_(stored.get(f"{name}.weight"))
                unread.discard(f"{name}.weight")
            elif f"{name}.lora_A.weight" in unread:
                part = p[start:start + rows] if rows else p
                A, B = stored.get(f"{name}.lora_A.weight"), stored.get(f"{name}.lora_B.weight")
                require(A.shape == (rank, part.shape[1]) and B.shape == (part.shape[0], rank), f"{stored.path}: the adapter of {ours} has a wrong shape")
                part += alpha / rank * B @ A
                unread -= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
            start += rows or 0
    require(not unread, f"{stored.path} holds weights that {base} has no place for: {', '.join(sorted(unread)[:3])}")
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = open_tokenizer(folder)
    require(tokenizer.n_vocab <= model.config.vocab_size, f"{folder}: the tokenizer has {tokenizer.n_vocab} tokens, {base} {model.config.vocab_size}")
    return model, tokenizer


def open_model(config, kind, dropout=0.0):
    """The model that a script's --model names: a checkpoint folder, a hub name, or `scratch` for a new one. Returns (model, tokenizer)."""
    if config.model != "scratch":
        for flag in SCRATCH_FLAGS:
            require(getattr(config, flag) == getattr(type(config), flag), f"--{flag.replace('_', '-')} is for --model scratch; {config.model} has its own")
        model, tokenizer = load_model(config.model, kind, dropout, config.allow_pickle)
        require(tokenizer.added == 0 or config.lora_save == "merged", f"the tokenizer of {config.model} lacks control tokens, which take new rows in the "
                "embedding, and an adapter can't hold those; use --lora-save merged")
        return model, tokenizer
    tokenizer = scratch_tokenizer(config)
    torch.manual_seed(config.seed)
    return kind(GPTConfig(tokenizer.n_vocab, config.block_size, config.layers, config.heads, config.heads, config.width,
                          dropout=dropout)), tokenizer
