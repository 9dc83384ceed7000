"""Checkpoint folders as Hugging Face has them: `config.json`, `model.safetensors`, the tokenizer's files.

What transformers, vLLM and llama.cpp open goes in, and what is written they open: a language model as the
family's ...ForCausalLM, a reward model as its ...ForSequenceClassification with one label. So is a process
reward model, with the labels bad, neutral and good: that class reads it at a sequence's last token alone,
which is where the last step ends; what ends the others stands in config.json, under `barerlhf`. Weights are
safetensors, never a pickle (but see --allow-pickle); they become float32 here. `FAMILIES` lists the dialects;
anything else is refused.
"""
import dataclasses
import math
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

from formats.errors import json_object
from formats.families import (
    BUFFERS, FAMILIES, TRANSPOSED, aims_of, architecture_of, family_of, own_notes, scalar_fields, stored_as,
    to_stored)
from formats.foreign_tokenizer import open_tokenizer
from formats.sources import read_rows, split_by_prompt
from formats.tokenizer import ALL_LETTERS, Tokenizer, train_bpe
from model import GPT, GPTConfig, LoRALinear, ScalarModel, merged_weights
from plumbing.disk import how_to_make, write_json, write_tensors
from plumbing.flags import SCRATCH_FLAGS, UserError, parse_sources, require
from plumbing.hardware import keep_heap
from plumbing.ranks import whole_weights


# A vocabulary is learned from so many characters at most. It takes some seconds of English, a minute of
# Chinese.
LEARNED_FROM = 5_000_000


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
        # What was learned then: with --override the data may be another.
        return open_tokenizer(config.out)
    pattern, ranks = train_bpe(texts_to_learn(config), int(form[1]), ALL_LETTERS)
    return Tokenizer("bpe", pattern, ranks)


def texts_to_learn(config):
    """Prompts and replies of the rows of --data that are trained on; of large files, the start of each."""
    def silent(text):
        pass

    try:
        rows = read_rows(config.data, "demonstrations", silent, config.part, config.skip_bad)
    except UserError:
        # They may be prompts alone.
        rows = read_rows(config.data, "prompts", silent, config.part, config.skip_bad)
    rows, _ = split_by_prompt(rows, config.val_fraction)
    texts = []
    for row in rows:
        texts += [turn["content"] for turn in row.prompt]
        texts += row.replies
    total = sum(map(len, texts))
    share = min(1, LEARNED_FROM / max(1, total))
    return [text[:math.ceil(share * len(text))] for text in texts]


# ---------------------------------------------------------------------------------------------------------
# Writing

def save_model(folder, model, tokenizer, flags=None, change=lambda weights: weights, *, config=None, **notes):
    """Write a checkpoint folder, each file atomically.

    model: GPT or ScalarModel (not in DDP); its adapters are merged. flags: a run's, for --save-dtype and
    --lora-save (which may ask for a PEFT folder with the adapters alone). change: from {name: weight} to what
    is written; config: of the model that this is, where it is another than the one at hand. notes: what
    config.json is to say that is ours alone: single_turn, see `knows_single_turns`; step_separator, see
    `step_separator_of`; aims and gate, see `scalar_fields`. What isn't named, or None, stays as it was.

    Under torchrun all ranks call, and rank 0 writes. Raises UserError if a weight is not finite; nothing is
    written then.
    """
    config = config or model.config
    folder = Path(folder)
    dtype = flags.save_dtype if flags else "float32"
    whole = whole_weights(model)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    weights = change(merged_weights(model, whole))
    for name, weight in weights.items():
        require(weight.isfinite().all(),
                f"{name} is not finite, so {folder} was not written; lower the learning rate, "
                "or look at the data")
    folder.mkdir(parents=True, exist_ok=True)
    if flags and flags.lora_save == "adapter":
        save_adapter(folder, model, whole, tokenizer, flags.model)
        return
    kind = GPT if isinstance(model, GPT) else ScalarModel
    header = make_header(config, kind, tokenizer, dtype, notes)
    check_header(header, config)
    rounded = {}
    for name, weight in weights.items():
        rounded[name] = weight.to("cpu", getattr(torch, dtype))
    stored = to_stored(rounded, config)
    tokenizer.save(folder)
    write_json(folder / "config.json", header)
    # The weights come last: where they are, the rest is.
    write_tensors(folder / "model.safetensors", stored, {"format": "pt"})


# What a scalar model's numbers are called, by how many it has; with a gate they are called as its aims.
LABELS = {1: ("LABEL_0",), 3: ("bad", "neutral", "good")}


def make_header(config, kind, tokenizer, dtype, notes):
    """What config.json says, a dict: what it said before, or GPT-2's fields for a model from scratch.

    kind: GPT or ScalarModel; dtype: of the weights as written, a name; notes: see `save_model`.
    """
    header = dict(config.header) or gpt2_header(config, tokenizer)
    header |= {
        "architectures": [architecture_of(family_of(config), kind)],
        "vocab_size": config.vocab_size,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "torch_dtype": dtype,
    }
    # transformers 5 calls torch_dtype so, and it may be another than what is written now.
    header.pop("dtype", None)
    notes = own_notes(header) | {name: value for name, value in notes.items() if value is not None}
    if notes:
        header["barerlhf"] = notes
    if kind is ScalarModel:
        names = aims_of(header) or LABELS[config.labels]
        header["id2label"] = {str(number): name for number, name in enumerate(names)}
        header["label2id"] = {name: number for number, name in enumerate(names)}
    return header


def gpt2_header(config, tokenizer):
    """GPT-2's config.json for a model from scratch."""
    return {
        "model_type": "gpt2",
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": True,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": tokenizer.eos,
        "barerlhf": {"bias": config.bias},
    }


def check_header(header, config):
    """UserError unless a config.json is read as the config that it is written for."""
    family = family_of(config)
    fields = FAMILIES[family].config(header)
    read = GPTConfig(**fields, **scalar_fields(header), dropout=config.dropout, header=config.header)
    require(read == config,
            f"a checkpoint folder of the family {family} can't hold this model: "
            f"it would be read as {read}, but is {config}")


def save_adapter(folder, model, weights, tokenizer, base):
    """Write a PEFT folder: adapter_config.json, adapter_model.safetensors, the tokenizer.

    weights: the model's, see `whole_weights`; base: the name of the model that the adapters are of.
    """
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    tensors = {}
    targets = set()  # the modules' names within a layer
    for name in adapters:
        names = stored_as(f"{name}.weight", model.config)
        A = weights[f"{name}.lora_A"]  # (rank, in)
        B = weights[f"{name}.lora_B"]  # (out, rank)
        parts = [B]
        if len(names) > 1:
            parts = B.split([rows for _, rows in names])
        for (theirs, _), part in zip(names, parts):
            theirs = theirs.removesuffix(".weight")
            _, within_layer = re.split(r"\.\d+\.", theirs)
            targets.add(within_layer)
            tensors[f"{PEFT_ROOT}{theirs}.lora_A.weight"] = A
            tensors[f"{PEFT_ROOT}{theirs}.lora_B.weight"] = part
    scalar = isinstance(model, ScalarModel)
    if scalar:
        tensors[PEFT_HEAD] = weights["score.weight"]
    # All adapters have the same settings.
    one = next(iter(adapters.values()))
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": one.rank,
        "lora_alpha": one.scale * one.rank,
        "lora_dropout": one.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": family_of(model.config) == "gpt2",
        "modules_to_save": ["score"] if scalar else None,
        "inference_mode": True,
    })
    tokenizer.save(folder)
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


# ---------------------------------------------------------------------------------------------------------
# Reading

def read_json(path):
    """The JSON object, a dict, in a file of a checkpoint folder."""
    require(path.is_file(), f"{path.parent} is not a checkpoint folder: {path.name} is missing")
    require(path.stat().st_size < 1 << 26, f"{path} is too large to be what it is called")
    return json_object(path.read_bytes(), path)


def is_pickle(path):
    """Whether a file, whatever its name, begins like a pickle or like PyTorch's archive of pickles."""
    with open(path, "rb") as f:
        start = f.read(9)
    is_archive = start[:4] == b"PK\x03\x04"
    begins_like_pickle = start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5"
    # Safetensors begin with a length of 8 bytes, which may look like that, and then a bracket.
    is_safetensors = start[8:] == b"{"
    return is_archive or begins_like_pickle and not is_safetensors


def fetch(name, allow_pickle=False):
    """The folder that --model names: itself, or a hub name (org/model), fetched through huggingface_hub."""
    folder = Path(name)
    if folder.is_file():
        hint = ""
        if is_pickle(folder):
            hint = ("; this one is a pickle, which can run code when it is opened: "
                    "have whoever made it write safetensors")
        raise UserError(f"{name} is a file, and a model is a folder with config.json and model.safetensors"
                        f"{hint}")
    may_be_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))
    # Our own runs go to runs/.
    means_folder = folder.is_dir() or folder.parent.is_dir() or folder.parts[0] == "runs"
    if means_folder or not may_be_hub_name:
        require(folder.is_dir(), f"{name}: no such checkpoint folder{how_to_make(folder)}")
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such checkpoint folder here; to fetch it from the Hugging Face hub: "
                        "pip install -r requirements-hf.txt") from None
    wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
    if allow_pickle:
        wanted.append("pytorch_model*.bin")
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    # Not found, no network, not allowed: the library has a class for each.
    except Exception as error:
        lines = str(error).splitlines()
        reason = lines[0] if lines else ""
        raise UserError(f"{name}: no such checkpoint folder here, and it could not be fetched from the hub "
                        f"({type(error).__name__}: {reason})") from None


class Weights:
    """The tensors of a folder by name, read when asked for.

    They come from one file or from the shards that an index lists.
    """

    def __init__(self, folder, stem="model", allow_pickle=False):
        files = weight_files(folder, stem)
        self.path = folder / next(iter(files), f"{stem}.safetensors")
        require(files, f"{folder} is not a checkpoint folder: {stem}.safetensors is missing")
        require("pickle" not in files.values() or allow_pickle,
                f"{self.path} is a pickle, which can run code when it is opened; add --allow-pickle if you "
                "trust where it came from, or convert it to safetensors")
        self.where = {}  # {a tensor's name: the open file, or the dict, that has it}
        for name, kind in files.items():
            path = folder / name
            require(path.is_file(), f"{folder} lacks {name}, which its index names")
            opened = load_pickle(path) if kind == "pickle" else open_safetensors(path)
            for key in opened.keys():
                self.where[key] = opened

    def names(self):
        return set(self.where)

    def get(self, name):
        """The tensor of this name, in float32."""
        require(name in self.where, f"{self.path} lacks {name}")
        opened = self.where[name]
        tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        require(tensor.is_floating_point(),
                f"{self.path}: {name} is {dtype}; quantised weights are not supported")
        return tensor.to(torch.float32)


def weight_files(folder, stem):
    """{name: "safetensors" or "pickle"} of the files that hold a folder's weights; {} if there are none."""
    for name, kind in ((f"{stem}.safetensors", "safetensors"), ("pytorch_model.bin", "pickle")):
        if (folder / name).is_file():
            return {name: kind}
        index = folder / f"{name}.index.json"
        shards = listed_shards(index) if index.is_file() else []
        if shards:
            return {shard: kind for shard in shards}
    return {}


def listed_shards(index):
    """The names of the files that an index lists, all of them in its own folder."""
    file_of = read_json(index).get("weight_map")  # {a tensor's name: a file's}
    damaged = f"{index} is damaged (weight_map)"
    require(isinstance(file_of, dict), damaged)
    for file in file_of.values():
        require(isinstance(file, str) and re.fullmatch(r"[\w.-]+", file), damaged)
    return sorted(set(file_of.values()))


def open_safetensors(path):
    require(not is_pickle(path),
            f"{path} is refused: it is a pickle, which can run code when it is opened, under another name")
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error})") from None


def load_pickle(path):
    """{name: tensor} of a pytorch_model.bin, by the unpickler that builds tensors alone.

    Before torch 2.10 even that could run code (CVE-2026-24747).
    """
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    require((int(major), int(minor)) >= (2, 10), f"{path}: --allow-pickle needs torch 2.10 or newer")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise TypeError
    # A hostile or damaged pickle fails in any way.
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"{path} is refused: it is no plain pickle of tensors ({kind})") from None
    return tensors


def read_config(folder, dropout=0.0):
    """(GPTConfig, kind of model: GPT or ScalarModel) from a folder's config.json.

    UserError says why if it is not supported.
    """
    path = folder / "config.json"
    header = read_json(path)
    family = header.get("model_type")
    require(isinstance(family, str) and family in FAMILIES,
            f"{path}: models of type '{family}' are not supported, only {', '.join(FAMILIES)}")
    require(not header.get("quantization_config"),
            f"{path}: quantised checkpoints are not supported; use the original one")
    kinds = {architecture_of(family, kind): kind for kind in (GPT, ScalarModel)}
    try:
        architecture = (header.get("architectures") or [None])[0]
        require(architecture in kinds,
                f"the architecture '{architecture}' is not supported, only {' and '.join(kinds)}")
        fields = FAMILIES[family].config(header)
        config = GPTConfig(**fields, **scalar_fields(header), dropout=dropout, header=header)
        return config, kinds[architecture]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged or incomplete ({type(error).__name__}: {error})") from None


@torch.no_grad()
def load_model(name, kind, dropout=0.0, allow_pickle=False, labels=1):
    """Open a checkpoint folder or hub name as kind GPT or ScalarModel, that with so many labels.

    A reward model with a gate has one label too: what it makes of its aims.

    Returns (model, tokenizer); UserError says what is wrong.
    """
    folder = fetch(name, allow_pickle)
    if (folder / "adapter_config.json").is_file():
        require(labels == 1, f"{folder} holds adapters, and a process reward model is a whole folder")
        return load_adapter(folder, kind, dropout, allow_pickle)
    config, found = read_config(folder, dropout)
    words = {(GPT, 1): "a language model", (ScalarModel, 1): "a reward model",
             (ScalarModel, 3): "a process reward model"}
    there, wanted = (found, 1 if config.gate else config.labels), (kind, labels)
    require(there == wanted, f"{folder} holds {words[there]}, but {words[wanted]} is needed here")
    stored = Weights(folder, allow_pickle=allow_pickle)
    tokenizer = open_tokenizer(folder)
    # On meta a model takes no memory: the sizes are believed only once the weights agree.
    with torch.device("meta"):
        model = kind(config)
    weights = read_weights(stored, model)
    model.load_state_dict(weights, assign=True)
    grow_vocabulary(folder, model, tokenizer)
    # What reading took is given back before the heap is kept as it is.
    del stored, weights
    keep_heap()
    return model, tokenizer


def read_weights(stored, model):
    """{name: tensor} of a model's parameters from a folder's `Weights`.

    UserError if a shape or a name doesn't fit.
    """
    config = model.config
    unread = stored.names()
    weights = {}
    for ours, p in model.state_dict().items():
        parts = []
        for theirs, _ in stored_as(ours, config):
            theirs = name_in(stored, theirs)
            unread.discard(theirs)
            parts.append(stored.get(theirs))
        turned = family_of(config) == "gpt2" and ours.endswith(TRANSPOSED)
        shape = stacked_shape(parts)
        if turned:
            shape = shape[::-1]
        require(shape == p.shape,
                f"{stored.path}: {ours} has shape {shape}, config.json says {tuple(p.shape)}")
        if turned:
            parts = [part.T for part in parts]
        weights[ours] = torch.cat(parts).contiguous()
    extra = sorted(name for name in unread if not may_be_left_out(name, config))
    require(not extra, f"{stored.path} holds weights that a model of this config.json has no place for: "
                       f"{', '.join(extra[:3])}")
    return weights


def name_in(stored, name):
    """What a folder calls a tensor: GPT-2 and old OPT folders leave out the trunk's name, the first word."""
    bare = name.split(".", 1)[1]
    require({name, bare} & stored.names(), f"{stored.path} lacks {name}")
    return name if name in stored.names() else bare


def stacked_shape(parts):
    """The shape of tensors that stand one below the other, if all have the columns of the first."""
    shape = list(parts[0].shape)
    if shape:
        shape[0] = sum(part.shape[0] for part in parts)
    return tuple(shape)


def may_be_left_out(name, config):
    """Whether a stored tensor that has no place in our model may be left unread."""
    if name.endswith(BUFFERS):
        return True
    if name == "lm_head.weight" and config.tied:
        return True
    # They are zero: GPT-2 has no others where our own note says that there are none.
    return family_of(config) == "gpt2" and not config.bias and name.endswith("bias")


def grow_vocabulary(folder, model, tokenizer):
    """Give the tokens that were added to a tokenizer rows in embedding and head.

    Each is the mean of all rows, and a little noise: a mean row leaves the other tokens' probabilities nearly
    as they are (Hewitt 2021).
    """
    config = model.config
    new = range(tokenizer.n_vocab - tokenizer.added, tokenizer.n_vocab)
    require(new.start <= config.vocab_size,
            f"{folder}: the tokenizer has {new.start} tokens, the model {config.vocab_size}")
    if len(new) == 0:
        return
    generator = torch.Generator().manual_seed(0)
    heads = [model.transformer.wte]
    # A reward model has no head, and that of a tied model is the embedding.
    if getattr(model, "lm_head", None) is not None:
        heads.append(model.lm_head)
    for module in heads:
        known = module.weight[:new.start]  # (V, C)
        noise = torch.randn(len(new), known.shape[1], generator=generator)
        rows = known.mean(0) + 0.1 * known.std(0) * noise
        # What lies behind the new tokens' places is padding of the matrix, and stays.
        padding = module.weight[new.stop:]
        module.weight = nn.Parameter(torch.cat([known, rows, padding]))
    size = len(model.transformer.wte.weight)
    model.config = dataclasses.replace(config, vocab_size=size)
    model.transformer.config = model.config


# ---------------------------------------------------------------------------------------------------------
# Adapters

# What begins the names in a PEFT file, and what the head of a reward model is called there.
PEFT_ROOT = "base_model.model."
PEFT_HEAD = "base_model.model.score.weight"

# What is read of adapter_config.json alone: other values of these fields are refused.
PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def load_adapter(folder, kind, dropout, allow_pickle):
    """Open a PEFT folder: its base model with the adapters merged. Returns (model, tokenizer)."""
    base, rank, alpha = read_adapter_config(folder, kind)
    require(not (fetch(base, allow_pickle) / "adapter_config.json").is_file(),
            f"{folder} is an adapter of {base}, which is an adapter itself; "
            "only those of a whole model are supported")
    model, tokenizer = load_model(base, GPT, dropout, allow_pickle)
    stored = Weights(folder, "adapter_model")
    unread = stored.names()
    if kind is ScalarModel:
        model = ScalarModel.from_trunk(model, share=True)
        require(PEFT_HEAD in unread, f"{stored.path} lacks {PEFT_HEAD}, the head")
        model.score.weight.copy_(stored.get(PEFT_HEAD))
        unread.discard(PEFT_HEAD)
    for module, (ours, part) in places_of_adapters(model).items():
        A_name = f"{module}.lora_A.weight"
        B_name = f"{module}.lora_B.weight"
        if A_name not in unread:
            continue
        A = stored.get(A_name)  # (rank, in)
        B = stored.get(B_name)  # (out, rank)
        require(A.shape == (rank, part.shape[1]) and B.shape == (part.shape[0], rank),
                f"{stored.path}: the adapter of {ours} has a wrong shape")
        part += alpha / rank * B @ A
        unread -= {A_name, B_name}
    require(not unread, f"{stored.path} holds weights that {base} has no place for: "
                        f"{', '.join(sorted(unread)[:3])}")
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = open_tokenizer(folder)
    vocabulary = model.config.vocab_size
    require(tokenizer.n_vocab <= vocabulary,
            f"{folder}: the tokenizer has {tokenizer.n_vocab} tokens, {base} {vocabulary}")
    return model, tokenizer


def read_adapter_config(folder, kind):
    """(base model's name, rank, alpha) of a folder's adapters; UserError if they are not for this kind."""
    path = f"{folder}/adapter_config.json"
    header = read_json(folder / "adapter_config.json")
    for name, value in PLAIN_LORA.items():
        require(header.get(name, value) in (value, None), f"{path}: {name} is not supported")
    task = header.get("task_type")
    wanted = "CAUSAL_LM" if kind is GPT else "SEQ_CLS"
    require(task == wanted, f"{folder} holds an adapter for {task}, but one for {wanted} is needed here")
    base = header.get("base_model_name_or_path")
    rank = header.get("r")
    alpha = header.get("lora_alpha")
    require(isinstance(base, str), f"{path} is damaged")
    require(isinstance(rank, int) and rank > 0, f"{path} is damaged")
    require(isinstance(alpha, (int, float)) and abs(alpha) < 1e15, f"{path} is damaged")
    return base, rank, alpha


def places_of_adapters(model):
    """{a module's name in a PEFT file: (our parameter's name, the rows of it that the module is, a view)}."""
    places = {}
    for ours, weight in model.state_dict().items():
        # The head is stored whole, with no adapter.
        if ours == "score.weight":
            continue
        start = 0
        for theirs, rows in stored_as(ours, model.config):
            part = weight if rows is None else weight[start:start + rows]
            places[PEFT_ROOT + theirs.removesuffix(".weight")] = ours, part
            start += rows or 0
    return places


# ---------------------------------------------------------------------------------------------------------
# What a script's --model names

def open_model(config, kind, dropout=0.0):
    """The model that a script's --model names: a checkpoint folder, a hub name, or `scratch` for a new one.

    kind: GPT or ScalarModel. Returns (model, tokenizer).
    """
    if config.model == "scratch":
        return new_model(config, kind, dropout)
    for flag in SCRATCH_FLAGS:
        require(getattr(config, flag) == getattr(type(config), flag),
                f"--{flag.replace('_', '-')} is for --model scratch; {config.model} has its own")
    model, tokenizer = load_model(config.model, kind, dropout, config.allow_pickle)
    require(tokenizer.added == 0 or config.lora_save == "merged",
            f"the tokenizer of {config.model} lacks control tokens, which take new rows in the embedding, "
            "and an adapter can't hold those; use --lora-save merged")
    return model, tokenizer


def new_model(config, kind, dropout):
    """(model, tokenizer) of --model scratch, with weights drawn by --seed."""
    tokenizer = scratch_tokenizer(config)
    torch.manual_seed(config.seed)
    architecture = GPTConfig(
        vocab_size=tokenizer.n_vocab,
        block_size=config.block_size,
        n_layer=config.layers,
        n_head=config.heads,
        n_kv_head=config.heads,
        n_embd=config.width,
        dropout=dropout,
    )
    return kind(architecture), tokenizer
