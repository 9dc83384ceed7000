"""No file can run code: what the source may not say, and pickles that try."""
import io
import os
import pickle
import re
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp

from plumbing import checkpoints
import tools
import toy
from formats.model_folder import load_model, save_model
from plumbing.flags import UserError
from model import GPT, GPTConfig

FORBIDDEN = re.compile(
    r"import pickle|pickle\.|torch\.(save|jit)\b|torch\.load\((?!.*weights_only=True)|weights_only=False|"
    r"(?<![\w.])(eval|exec)\(|"
    r"trust_remote_code|shell\s*=\s*True|np\.load|allow_pickle=True|yaml\.load|marshal|os\.system")
# The class that refuses, and the error it may meet.
ALLOWED = {"plumbing/checkpoints.py": ["import pickle", "pickle.", "pickle."]}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.case(10)
def test_the_source_unpickles_and_executes_nothing():
    found = {name: [m[0] for m in FORBIDDEN.finditer(text)] for name, text in tools.sources().items()}
    assert len(found) > 15 and {name: hits for name, hits in found.items() if hits} == ALLOWED


def zipped(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return file.getvalue()


@pytest.mark.case(10)
@pytest.mark.parametrize("wrap", [bytes, zipped])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_is_refused_under_any_name(wrap, protocol, tmp_path):
    trace, folder = tmp_path / "trace", tmp_path / "model"
    save_model(folder, GPT(GPTConfig(toy.tokenizer().n_vocab, 16, 1, 1, 1, 8)), toy.tokenizer())
    evil = wrap(pickle.dumps(Touch(trace), protocol))
    (folder / "model.safetensors").write_bytes(evil)
    with pytest.raises(UserError, match="model.safetensors is refused: it is a pickle"):
        load_model(folder, GPT)
    for name in ("model.pt", "model.bin", "weights.safetensors"):
        (tmp_path / name).write_bytes(evil)
        with pytest.raises(UserError,
                           match=f"{name} is a file, and a model is a folder .* this one is a pickle"):
            load_model(tmp_path / name, GPT)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(evil)
    with pytest.raises(UserError, match="add --allow-pickle if you trust"):
        load_model(folder, GPT)
    with pytest.raises(UserError, match="is refused: it is no plain pickle of tensors"):
        load_model(folder, GPT, allow_pickle=True)
    assert not trace.exists()


def test_a_header_of_any_length_is_no_pickle(tmp_path):
    from formats.model_folder import is_pickle
    from safetensors.torch import save_file
    for size in (0x280, 0x380, 0x4B50):  # whose first bytes are those of a pickle, or of a zip archive
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"pad": ""})
        length = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
        header = (tmp_path / "x.safetensors").read_bytes()[8:8 + length].rstrip()
        (tmp_path / "x.safetensors").write_bytes(size.to_bytes(8, "little") + header.ljust(size) + bytes(4))
        assert not is_pickle(tmp_path / "x.safetensors")


@pytest.mark.case(10)
def test_the_index_of_shards_may_hold_nothing_but_an_index(tmp_path):
    tensors = {"x": torch.arange(6.0)}
    dcp.save(tensors, checkpoint_id=tmp_path / "shards")
    read = {"x": torch.zeros(6)}
    checkpoints.load_shards(read, tmp_path / "shards")
    assert read["x"].equal(tensors["x"])
    for protocol in (0, 2, 4):
        (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "trace"), protocol))
        with pytest.raises(OSError, match="its index asks for (posix|nt|os).mkdir"):
            checkpoints.load_shards(read, tmp_path / "shards")
    dotted = b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93."
    (tmp_path / "shards" / ".metadata").write_bytes(dotted)
    with pytest.raises(OSError, match="filesystem.os.system"):
        checkpoints.load_shards(read, tmp_path / "shards")
    assert not (tmp_path / "trace").exists()
