"""formats/families.py: every family of models against `transformers`."""
import json

import pytest
import torch

from examples import TOKENIZER
from formats.families import FAMILIES
from formats.model_folder import load_model, save_model
from generate import generate
from model import GPT, ScalarModel, shifted
from plumbing.flags import UserError
from small_models import (
    MODELS, ROWS, auto, close, edit_weights, header, made_by, open_with, outputs, peer_outputs, tiny_of)


def greedy(peer, row, number):
    ids = peer.generate(row,
                        attention_mask=torch.ones_like(row),
                        max_new_tokens=number,
                        do_sample=False,
                        num_beams=1)
    return ids[0].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write(
        name, peers, tmp_path):
    peer = made_by(peers, name, GPT, tmp_path / "theirs")
    model, _ = load_model(tmp_path / "theirs", GPT)
    assert {p.dtype for p in model.state_dict().values()} == {torch.float32}
    expected = peer_outputs(peer, GPT)
    assert expected.std() > 0.1
    close(outputs(model), expected)
    with torch.no_grad():
        for row in [*ROWS, torch.randint(256, (1, model.config.block_size))]:
            close(model.logits(model.transformer(row)), peer(row).logits)
    prompts = [row for row in ROWS if row.shape[1] + 32 <= model.config.block_size]
    texts = generate(model, [row[0].tolist() for row in prompts], 32, TOKENIZER, temperature=0)
    texts = [ids[:n].tolist() for ids, n in zip(texts.ids, texts.lengths)]
    save_model(tmp_path / "ours", model, TOKENIZER)
    again = open_with(auto(peers, GPT), tmp_path / "ours")
    close(peer_outputs(again, GPT), expected)
    assert (again.config.eos_token_id, again.config.pad_token_id) == (TOKENIZER.eos, TOKENIZER.pad)
    for row, text in zip(prompts, texts):
        assert greedy(peer, row, len(text) - row.shape[1]) == text == greedy(again, row, 32)


@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_transformers_and_so_do_those_of_the_folder_we_write(name, peers, tmp_path):
    peer = made_by(peers, name, ScalarModel, tmp_path / "theirs")
    model, _ = load_model(tmp_path / "theirs", ScalarModel)
    expected = peer_outputs(peer, ScalarModel)
    close(outputs(model), expected)
    assert model.can_shift == (name in ("gpt2", "gpt2-n_inner", "opt"))
    save_model(tmp_path / "ours",
               model,
               TOKENIZER,
               change=lambda weights: shifted(weights, 0.7) if model.can_shift else weights)
    close(peer_outputs(open_with(auto(peers, ScalarModel), tmp_path / "ours"), ScalarModel),
          expected - 0.7 * model.can_shift)
    close(outputs(model), expected)  # what is written is changed, not the model


def test_a_sequence_beyond_the_sliding_window_is_refused():
    model = tiny_of(name="mistral-window")
    assert model.config.block_size == 50
    with pytest.raises(UserError, match="51 tokens .* context of 50"):
        model.transformer(torch.zeros(1, 51, dtype=torch.long))
    assert tiny_of(name="qwen2", sliding_window=20, use_sliding_window=False).config.block_size == 64
    assert tiny_of(name="qwen2", sliding_window=20, use_sliding_window=True).config.block_size == 20


@pytest.mark.parametrize("name", ["llama2", "llama3", "linear", "qwen2.5-tied"])
def test_config_json_may_be_of_transformers_5_or_before(name, tmp_path):
    written = MODELS[name]
    theta, scaling = written.get("rope_theta", 10000.0), written.get("rope_scaling", {"rope_type": "default"})
    plain = {key: value for key, value in written.items() if not key.startswith("rope_")}
    before = {"rope_theta": theta, "torch_dtype": "float32"
              } | ({"rope_scaling": None} if "rope_scaling" not in written else {
                  "rope_scaling": {
                      "type" if key == "rope_type" and name == "linear" else key: value
                      for key, value in scaling.items()
                  }
              })
    after = {"rope_parameters": scaling | {"rope_theta": theta}, "dtype": "float32"}
    results = []
    for style in (before, after):
        save_model(tmp_path / "model", tiny_of(name=name), TOKENIZER)
        path = tmp_path / "model" / "config.json"
        path.write_text(
            json.dumps(plain | style | {"architectures": json.loads(path.read_text())["architectures"]}))
        results.append(outputs(load_model(tmp_path / "model", GPT)[0]))
        save_model(tmp_path / "again", load_model(tmp_path / "model", GPT)[0], TOKENIZER)
        assert torch.equal(outputs(load_model(tmp_path / "again", GPT)[0]), results[-1])
        assert "dtype" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert torch.equal(*results)


def test_what_config_json_leaves_out_is_as_transformers_has_it():
    gpt2, llama, opt = (tiny_of(name=name).config for name in ("gpt2", "qwen2", "opt"))
    assert (gpt2.tied, gpt2.n_inner, gpt2.norm_eps) == (True, 128, 1e-5)
    assert (llama.tied, llama.rope_theta, llama.rope_scaling, llama.head_dim) == (False, 10000.0, (), 8)
    assert (opt.tied, opt.norm_after, opt.embed_dim) == (True, False, 32)
    del (written := header("llama"))["num_key_value_heads"]
    assert FAMILIES["llama"].config(written)["n_kv_head"] == 4


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_old_folders_leave_out_the_trunks_name_and_hold_buffers(name, tmp_path):
    model = tiny_of(name=name)
    save_model(tmp_path, model, TOKENIZER)
    edit_weights(
        lambda tensors: [tensors.update({key.split(".", 1)[1]: tensors.pop(key)}) for key in list(tensors)])(
                                             tmp_path)
    edit_weights(lambda tensors: tensors.update({
        "h.0.attn.bias": torch.ones(1, 1, 64, 64), "lm_head.weight": tensors.get("wte.weight", torch.ones(1)).
        clone()
    }))(tmp_path)
    assert torch.equal(outputs(load_model(tmp_path, GPT)[0]), outputs(model))
