"""A run's checkpoints: whole or absent whatever happens meanwhile, and checked when they are read.

    OUT/checkpoints/step_000200/    config.json, model.safetensors, tokenizer.json, ...    the model: a folder that --model takes
                                    training.safetensors, or shards/ of a run with --parallel fsdp    weights, optimiser
                                    state.json       step, settings, versions, all else that resuming needs
                                    manifest.json    size and SHA-256 of every file
    OUT/checkpoints/latest.json     which one is the latest, which came before it, which is the best
    OUT/config.json, ...            the latest model once more (as hard links, which take no room)

A checkpoint is written under another name and flushed to the disk, then renamed, then latest.json is replaced, then what that no
longer names is deleted. A kill or a power cut at any moment leaves the old checkpoint or the new one.
"""
import json
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import torch
from safetensors import safe_open

from plumbing.disk import flush, sha256, write_json
from plumbing.flags import require

VERSION = 1  # of the layout above
TRAINING = ("training.safetensors", "state.json", "manifest.json")  # files of a checkpoint that are no part of the model
NAME = re.compile(r"step_\d{6,}")


def damage(folder):
    """What is wrong with a checkpoint, in some words; "" if every file is as it was written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        if manifest["version"] != VERSION:
            return f"version {manifest['version']} of its layout is not known here, only {VERSION}"
        for name, entry in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, should have {entry['bytes']:,}"
            if sha256(path) != entry["sha256"]:
                return f"{name} has changed since it was written (SHA-256)"
        json.loads((folder / "state.json").read_bytes())
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json or state.json is damaged"
    return ""


def training_state(modules, optimizers):
    """{name: tensor} of all that training changes, sharded where the model is; to fill them in place is to restore it. Both arguments: {name: object}."""
    tensors = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if p not in optimizer.state:  # as AdamW begins
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            tensors |= {f"{name}/{i}/{k}": v for k, v in optimizer.state[p].items()}
    return tensors


def room(modules, optimizers):
    """About how many bytes a checkpoint takes: weights in float32, for training and as a model, and AdamW's two moments."""
    weights = sum(p.numel() for module in modules.values() for p in module.parameters())
    return 8 * weights + 8 * sum(p.numel() for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"])


def save_shards(tensors, folder):
    """Write {name: tensor}, sharded over the ranks, each rank its own shards."""
    import torch.distributed.checkpoint as dcp
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:  # on all ranks
        raise OSError(error) from None


INDEX = {  # all that PyTorch's index of shards is made of
    "torch.distributed.checkpoint.metadata": ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                                              "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",), "torch.serialization": ("_get_layout",), "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",), "torch": ("Size", "float32", "bfloat16", "float16", "float64", "int64")}


class Index(pickle.Unpickler):
    """Reads the index of shards, a pickle, only if nothing in it could do more than hold numbers and names."""

    def find_class(self, module, name):
        if name not in INDEX.get(module, ()):
            raise OSError(f"its index asks for {module}.{name}, which no index of ours does")
        return super().find_class(module, name)


def load_shards(tensors, folder):
    """Read what `save_shards` wrote, on as many ranks or others, in place."""
    import torch.distributed.checkpoint as dcp
    try:
        with open(folder / ".metadata", "rb") as f:
            Index(f).load()
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
        dcp.load(tensors, checkpoint_id=folder)
    except (dcp.api.CheckpointException, pickle.UnpicklingError) as error:
        raise OSError(error) from None


def fill(tensors, folder):
    """Read a checkpoint's training state into tensors {name: tensor} of the same names and shapes, in place; each may be sharded or not."""
    if (folder / "shards").is_dir():
        return load_shards(tensors, folder / "shards")
    with safe_open(folder / "training.safetensors", "pt") as f:
        odd = set(f.keys()) ^ tensors.keys()
        require(not odd, f"{folder}/training.safetensors and this run don't hold the same tensors ({', '.join(sorted(odd)[:3])})")
        for name, tensor in tensors.items():
            saved = f.get_tensor(name)
            require(saved.shape == tensor.shape, f"{folder}: {name} has shape {tuple(saved.shape)}, here it has {tuple(tensor.shape)}")
            if hasattr(tensor, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor
                saved = distribute_tensor(saved.to(tensor.device), tensor.device_mesh, tensor.placements)
            tensor.copy_(saved)


class Checkpoints:
    """The checkpoints of one output folder. Only one process at a time may write."""

    def __init__(self, out):
        self.out, self.root, self.damaged = Path(out), Path(out) / "checkpoints", set()

    def all(self):
        """Names of all complete checkpoints, damaged or not, newest first."""
        return sorted((path.name for path in self.ours() if path.name[0] != "."), key=lambda name: int(name[5:]), reverse=True)

    def pointer(self):
        """latest.json, as far as it can be read: {latest, previous, best, best_value}."""
        try:
            named = json.loads((self.root / "latest.json").read_bytes())
            return {key: value for key, value in named.items() if (isinstance(value, float) if key == "best_value" else NAME.fullmatch(value))}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def ours(self):
        """Folders of checkpoints, complete or not."""
        paths = self.root.iterdir() if self.root.is_dir() else []
        return [path for path in paths if NAME.fullmatch(path.name.removeprefix(".writing-").removeprefix(".old-"))]

    def newest(self, say):
        """The newest whole checkpoint (folder, state), or (None, None) where there is none at all; says which are damaged."""
        for path in self.ours():  # a kill between the two renames of `publish`
            if path.name.startswith(".old-") and not (self.root / path.name[5:]).exists():
                os.rename(path, self.root / path.name[5:])
        named = self.pointer()
        names = list(dict.fromkeys([named[key] for key in ("latest", "previous", "best") if key in named] + self.all()))
        for name in names:
            problem = damage(self.root / name)
            if not problem:
                return self.root / name, json.loads((self.root / name / "state.json").read_bytes())
            say(f"warning: {self.root / name} is damaged ({problem}); looking for the one before")
            self.damaged.add(name)
        require(not names, f"--resume: no checkpoint in {self.root} is whole; --overwrite begins anew")
        return None, None

    def begin(self, step):
        """An empty folder to write a checkpoint to."""
        folder = self.writing(step)
        self.discard(folder)
        folder.mkdir(parents=True)
        return folder

    def writing(self, step):
        return self.root / f".writing-step_{step:06d}"

    def discard(self, folder):
        """Delete a folder of ours, but follow no link."""
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)

    def clear(self):
        """Delete all checkpoints."""
        for path in self.ours():
            self.discard(path)
        (self.root / "latest.json").unlink(missing_ok=True)

    def publish(self, step, value=None):
        """Make what was written the latest checkpoint; the best one too, if value is higher than that one's. Delete the others but one."""
        folder, name = self.writing(step), f"step_{step:06d}"
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        write_json(folder / "manifest.json", {"version": VERSION, "files": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}})
        for path in [*folder.rglob("*"), folder]:
            flush(path)
        self.discard(self.root / f".old-{name}")
        if (self.root / name).is_dir():  # left by a kill before latest.json was replaced, damaged, or saved before its evaluation
            os.rename(self.root / name, self.root / f".old-{name}")
        os.rename(folder, self.root / name)
        flush(self.root)

        older = {key: other for key, other in self.pointer().items()
                 if key == "best_value" or (int(other[5:]) < step and other not in self.damaged and (self.root / other).is_dir())}
        keep = {"latest": name}
        before = [older[key] for key in ("latest", "previous") if key in older]
        before += [other for other in self.all() if int(other[5:]) < step and other not in self.damaged]  # where latest.json has been lost
        if before:
            keep["previous"] = before[0]
        if value is not None and not ("best" in older and older.get("best_value", -float("inf")) >= value):
            keep |= {"best": name, "best_value": value}
        elif "best" in older:
            keep |= {key: older[key] for key in ("best", "best_value") if key in older}
        write_json(self.root / "latest.json", keep)
        flush(self.root)
        self.link(self.root / name)
        for path in self.ours():
            if path.name not in keep.values():
                self.discard(path)

    def link(self, folder):
        """Have OUT show the model of a checkpoint."""
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            target, temporary = self.out / name, self.out / f"{name}.tmp"
            if path.is_dir() or name.parts[0] in (*TRAINING, "shards") or (target.exists() and target.samefile(path)):
                continue
            target.parent.mkdir(exist_ok=True)
            temporary.unlink(missing_ok=True)
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
            os.replace(temporary, target)
