"""sft.py: what its held-out loss is a mean of, and what a model's folder says of the conversations it was
trained on."""
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import model
import sft
from data import encode_group
from formats.model_folder import load_model
from formats.sources import read_rows
from plumbing import run as runtime
from tools import ALL_AT_ONCE, reply_logprob, run_here


def test_the_held_out_loss_is_a_mean_over_reply_tokens(small):
    network, tokenizer = load_model(small / "sft", model.GPT)
    examples = [
        encode_group(tokenizer, row)[0]
        for row in read_rows(small / "demonstrations.json", "demonstrations", str)
    ]
    run = object.__new__(runtime.Run)
    run.rank = 0
    run.world_size = 1
    run.device = torch.device("cpu")
    run.dtype = torch.float32
    run.step = 0
    run.clean = False
    with torch.no_grad():
        expected = -sum(
            reply_logprob(network.eval(), torch.tensor(ids), torch.tensor(mask))
            for ids, mask in examples) / sum(sum(mask) for _, mask in examples)
    for budget in (80, 100_000):
        loss = sft.validation_loss(run, network, examples, SimpleNamespace(micro_batch_tokens=budget),
                                   tokenizer.pad)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sft_notes_conversations_and_leaves_open_what_models_of_others_have_seen(small, talk, tmp_path):
    texts = zip(["user", "assistant"] * 2, ("Hi.", "Yes?", "Say apple.", "Apple."))
    turns = [{"role": role, "content": text} for role, text in texts]
    (tmp_path / "talks.json").write_text(json.dumps([{"messages": turns}] * 4))
    folder = shutil.copytree(small / "sft", tmp_path / "foreign")
    header = json.loads((folder / "config.json").read_text())
    assert header["barerlhf"].pop("single_turn") is True
    (folder / "config.json").write_text(json.dumps(header))
    single, several = small / "demonstrations.json", tmp_path / "talks.json"
    starts = {"more": (small / "sft", single), "talks": (small / "sft", several), "others": (folder, single)}
    noted = {}
    for name, (start, data) in starts.items():
        run_here("sft", f"{ALL_AT_ONCE} --model {start} --data {data} --steps 1 --out {tmp_path}/{name}")
        noted[name] = json.loads((tmp_path / name / "config.json").read_text())["barerlhf"].get("single_turn")
    assert noted == {"more": True, "talks": False, "others": None}
    assert talk(f"--model {tmp_path}/talks") == talk(f"--model {tmp_path}/others") == [1, 3, 5]
