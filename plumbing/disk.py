"""Files that are whole or absent, what they hash to, and which ones a model, a tokenizer and a run have."""
import hashlib
import json
import os
import re
from pathlib import Path

from safetensors.torch import save_file

from plumbing.flags import UserError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "added_tokens.json", "tokenizer.model", "generation_config.json")
CHECKPOINT_FILES = (
    "config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES)
EMA_FILES = tuple(f"ema/{name}" for name in CHECKPOINT_FILES)
# What a run writes. --overwrite deletes run.json first, which says that the model is that of a finished run.
RUN_FILES = (
    "run.json", *CHECKPOINT_FILES, *EMA_FILES, "metrics.jsonl", "skipped.jsonl", "evaluation.json",
    "evaluation.png")
# How the names of files with weights end, or of lists of such files.
WEIGHTS = (".safetensors", ".bin", ".index.json")


def flush(path):
    """Have the disk hold what a file or folder holds now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path, data):
    """Write bytes to path so that a crash leaves either the old file or the new one, never a part."""
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(data)
    flush(temporary)
    os.replace(temporary, path)


def write_json(path, value):
    """Write value as indented JSON, atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode("utf-8", "replace"))


def write_tensors(path, tensors, metadata):
    """Write {name: tensor} as safetensors, atomically.

    The bytes come straight from the tensors' memory; tensors that are not on the CPU are copied there first.
    """
    seen, host = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # The format has no tensors that share memory, so the second of two gets memory of its own.
        if tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        host[name] = tensor
    temporary = Path(f"{path}.tmp")
    save_file(host, temporary, metadata)
    # Who may open the folder may read the file; safetensors lets its owner alone read it.
    temporary.chmod(temporary.parent.stat().st_mode & 0o666)
    flush(temporary)
    os.replace(temporary, path)


def folder_of(path):
    """The folder that a file is to be written to, made if need be; UserError if it can't be."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} can't be written: {error.strerror}") from None
    return Path(path).parent


def how_to_make(path):
    """The command that makes what the flags' defaults or the README name, behind a semicolon.

    "" for anything else.
    """
    path = Path(path).as_posix()
    if path.startswith("runs/demo/"):
        return "; bash run.sh makes it"
    if path.startswith("runs/toy/"):
        return "; python toy.py writes it"
    if path.startswith("runs/sums/"):
        return "; python sums.py writes it"
    if path.startswith("runs/preferences/"):
        return "; python toy.py --model runs/sft writes it"
    if path.startswith("runs/steps/"):
        return "; python sums.py --steps-of runs/sft --out runs/steps writes it"
    found = re.fullmatch("runs/(sft|reward|process|ppo|dpo)", path)
    return f"; python {found[1]}.py --out {path} makes one" if found else ""


def sha256(path):
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def digest(paths):
    """{path: SHA-256} of those paths that are files; what else flags may name (a hub's data set) has none."""
    return {str(path): sha256(path) for path in paths if Path(path).is_file()}


def digest_by_name(files):
    """`digest` of the files of one folder, by their names alone: the folder may be moved."""
    return {Path(path).name: value for path, value in digest(files).items()}


def tokenizer_digest(name):
    """{name: SHA-256} of the files that a folder's tokenizer is opened from; {} for what is no folder."""
    folder = Path(name)
    if not folder.is_dir():
        return {}
    return digest_by_name([folder / file for file in TOKENIZER_FILES])


def model_digest(name):
    """{name: SHA-256} of the files that a model folder is opened from; {} for what is no folder."""
    folder = Path(name)
    if not folder.is_dir():
        return {}
    files = []
    for file in sorted(folder.iterdir()):
        if file.name in CHECKPOINT_FILES or file.name.endswith(WEIGHTS):
            files.append(file)
    return digest_by_name(files)
