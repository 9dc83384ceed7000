"""A run's checkpoints: whole or absent whatever happens meanwhile, and checked when they are read.

    OUT/checkpoints/step_000200/
        config.json, model.safetensors,    the model: a folder that --model takes
        tokenizer.json, ...
        training.safetensors               weights and optimiser (shards/ of a run with --parallel fsdp)
        state.json                         step, settings, versions, all else that resuming needs
        manifest.json                      size and SHA-256 of every file
    OUT/checkpoints/latest.json            which one is the latest, which came before it, which is the best
    OUT/config.json, ...                   the latest model once more (as hard links, which take no room)

A checkpoint is written under another name and flushed to the disk, then renamed, then latest.json is
replaced, then what that no longer names is deleted. A kill or a power cut at any moment leaves the old
checkpoint or the new one.
"""
import json
import math
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
from plumbing.steps import parameters_of

# Of the layout above.
VERSION = 1
# What a checkpoint holds that is no part of the model.
TRAINING = ("training.safetensors", "shards", "state.json", "manifest.json")
NAME = re.compile(r"step_\d{6,}")


def step_of(name):
    """The step in a checkpoint's name: 200 of step_000200."""
    return int(name.removeprefix("step_"))


def find_damage(folder):
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
    """{name: tensor} of all that training changes, sharded where the model is.

    modules, optimizers: {name: object}. To fill these tensors in place is to restore the training.
    """
    tensors = {}
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            tensors[f"{name}/{key}"] = tensor
    for name, optimizer in optimizers.items():
        for i, p in enumerate(parameters_of(optimizer)):
            # Before its first step AdamW has no state; this is the one that it begins with.
            if p not in optimizer.state:
                optimizer.state[p] = {
                    "step": torch.zeros((), device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p)}
            for key, tensor in optimizer.state[p].items():
                tensors[f"{name}/{i}/{key}"] = tensor
    return tensors


def bytes_needed(modules, optimizers):
    """About how many bytes a checkpoint takes."""
    weights, trained = 0, 0
    for module in modules.values():
        weights += sum(p.numel() for p in module.parameters())
    for optimizer in optimizers.values():
        trained += sum(p.numel() for p in parameters_of(optimizer))
    # Weights are saved twice in float32, for training and as a model; AdamW has two moments of each.
    return 8 * weights + 8 * trained


def save_shards(tensors, folder):
    """Write {name: tensor}, sharded over the ranks, each rank its own shards."""
    import torch.distributed.checkpoint as dcp
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        # PyTorch raises it on all ranks if it happens on one.
        raise OSError(error) from None


# {module: names in it}: all that PyTorch's index of shards is made of.
INDEX = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "torch": ("Size", "float32", "bfloat16", "float16", "float64", "int64")}


class Index(pickle.Unpickler):
    """Reads the index of shards, a pickle, only if all that it asks for holds mere numbers and names."""

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


def load_into(tensors, folder):
    """Read a checkpoint's training state into tensors, in place.

    tensors: {name: tensor} of the same names and shapes; each may be sharded or not.
    """
    if (folder / "shards").is_dir():
        return load_shards(tensors, folder / "shards")
    with safe_open(folder / "training.safetensors", "pt") as f:
        # Names that only one of the two has.
        odd = sorted(set(f.keys()) ^ tensors.keys())
        require(not odd, f"{folder}/training.safetensors and this run don't hold the same tensors "
                         f"({', '.join(odd[:3])})")
        for name, tensor in tensors.items():
            saved = f.get_tensor(name)
            require(saved.shape == tensor.shape,
                    f"{folder}: {name} has shape {tuple(saved.shape)}, here it has {tuple(tensor.shape)}")
            if hasattr(tensor, "device_mesh"):
                from torch.distributed.tensor import distribute_tensor
                saved = distribute_tensor(saved.to(tensor.device), tensor.device_mesh, tensor.placements)
            tensor.copy_(saved)


class Checkpoints:
    """The checkpoints of one output folder. Only one process at a time may write."""

    def __init__(self, out):
        self.out = Path(out)
        self.root = self.out / "checkpoints"
        # Names of those that `newest` has found damaged.
        self.damaged = set()

    def all(self):
        """Names of all complete checkpoints, damaged or not, newest first."""
        complete = [path.name for path in self.checkpoint_folders() if path.name[0] != "."]
        return sorted(complete, key=step_of, reverse=True)

    def pointer(self):
        """latest.json, as far as it can be read: {latest, previous, best, best_value}."""
        try:
            found = {}
            for key, value in json.loads((self.root / "latest.json").read_bytes()).items():
                readable = isinstance(value, float) if key == "best_value" else NAME.fullmatch(value)
                if readable:
                    found[key] = value
            return found
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def checkpoint_folders(self):
        """Folders of checkpoints, complete or not."""
        if not self.root.is_dir():
            return []
        found = []
        for path in self.root.iterdir():
            name = path.name.removeprefix(".writing-").removeprefix(".old-")
            if NAME.fullmatch(name):
                found.append(path)
        return found

    def newest(self, say):
        """The newest whole checkpoint (folder, state), or (None, None) where there is none at all.

        Says which are damaged.
        """
        # A kill between the two renames of `publish` leaves a checkpoint under its .old- name alone.
        for path in self.checkpoint_folders():
            name = path.name.removeprefix(".old-")
            if name != path.name and not (self.root / name).exists():
                os.rename(path, self.root / name)

        named = self.pointer()
        names = [named[key] for key in ("latest", "previous", "best") if key in named]
        names += self.all()
        # Each name once, in this order.
        for name in dict.fromkeys(names):
            problem = find_damage(self.root / name)
            if not problem:
                state = json.loads((self.root / name / "state.json").read_bytes())
                return self.root / name, state
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
        for path in self.checkpoint_folders():
            self.discard(path)
        (self.root / "latest.json").unlink(missing_ok=True)

    def publish(self, step, value=None):
        """Make what was written the latest checkpoint, and the best too if value is higher than that one's.

        Of the others, the one before and the best stay; the rest is deleted.
        """
        folder = self.writing(step)
        name = f"step_{step:06d}"
        write_json(folder / "manifest.json", {"version": VERSION, "files": contents(folder)})
        for path in [*folder.rglob("*"), folder]:
            flush(path)

        # One of this step may be there: left by a kill before latest.json was replaced, or damaged, or saved
        # before its evaluation.
        self.discard(self.root / f".old-{name}")
        if (self.root / name).is_dir():
            os.rename(self.root / name, self.root / f".old-{name}")
        os.rename(folder, self.root / name)
        flush(self.root)

        older = self._older(step)
        keep = {"latest": name} | self._previous(older, step) | best_of(older, name, value)
        write_json(self.root / "latest.json", keep)
        flush(self.root)
        self.link(self.root / name)
        for path in self.checkpoint_folders():
            if path.name not in keep.values():
                self.discard(path)

    def _is_older(self, name, step):
        """Whether a checkpoint is of an earlier step, and not known to be damaged."""
        return step_of(name) < step and name not in self.damaged

    def _older(self, step):
        """What latest.json says of checkpoints that are older than a step and still there."""
        older = {}
        for key, value in self.pointer().items():
            if key == "best_value":
                older[key] = value
            elif self._is_older(value, step) and (self.root / value).is_dir():
                older[key] = value
        return older

    def _previous(self, older, step):
        """{"previous": the checkpoint before this step}, or {} if there is none."""
        for key in ("latest", "previous"):
            if key in older:
                return {"previous": older[key]}
        # Where latest.json has been lost, the folders tell.
        for name in self.all():
            if self._is_older(name, step):
                return {"previous": name}
        return {}

    def link(self, folder):
        """Have OUT show the model of a checkpoint."""
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_dir() or name.parts[0] in TRAINING:
                continue
            target = self.out / name
            if target.exists() and target.samefile(path):
                continue
            temporary = self.out / f"{name}.tmp"
            target.parent.mkdir(exist_ok=True)
            temporary.unlink(missing_ok=True)
            try:
                os.link(path, temporary)
            except OSError:
                # A file system without hard links.
                shutil.copyfile(path, temporary)
            os.replace(temporary, target)


def contents(folder):
    """{file: its size and SHA-256} of all files in a folder and below."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files


def best_of(older, name, value):
    """What latest.json is to say of the best checkpoint, now that there is one more.

    older: what it says of older ones. value: of the new one, None if it was not measured; the older one stays
    the best if both are equal.
    """
    if "best" in older:
        old_value = older.get("best_value", -math.inf)
        if value is None or old_value >= value:
            return {key: older[key] for key in ("best", "best_value") if key in older}
    if value is None:
        return {}
    return {"best": name, "best_value": value}
