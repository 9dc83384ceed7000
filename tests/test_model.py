"""model.py against slow, independent computations: padding, scores, positions, adapters, compiled blocks."""
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from examples import TOKENIZER, VOCAB
from formats.model_folder import load_model, save_model
from generate import generate
from model import (
    GPT, LORA_TARGETS, LoRALinear, ScalarModel, copy_of, last_scores, merged_weights, prepare_training,
    rotary_angles, rotate, shifted, values_before)
from plumbing.flags import UserError
from plumbing.steps import adamw
from small_models import (
    BATCH_LENGTHS, DIALECTS, IDS, LLAMA, NORM_AFTER, OPT, adapted, adapter_flags, close, kinds, outputs,
    rows_alone, tiny, tiny_of)


def outputs_with_gradient(model):
    """As `outputs`, of padding too."""
    return model(IDS) if isinstance(model, ScalarModel) else model.logits(model.transformer(IDS))


# -- masks and padding

@pytest.mark.case(31)
def test_an_empty_mask_gives_zeros_and_a_zero_gradient(batch):
    model, critic, (ids, _) = tiny(), tiny(ScalarModel), batch
    nothing = torch.zeros(ids.shape, dtype=torch.bool)
    outputs = *model(ids, nothing, with_entropy=True), values_before(critic, ids, nothing)
    assert all(x.shape == ids.shape and not x.any() for x in outputs)
    sum(x.sum() for x in outputs).backward()
    grads = [p.grad for m in (model, critic) for p in m.parameters() if p.grad is not None]
    assert grads and not any(grad.any() for grad in grads)


@pytest.mark.case(24)
def test_padding_changes_nothing_and_a_row_alone_equals_the_row_in_a_batch(batch):
    model, critic, (ids, mask) = tiny(), tiny(ScalarModel), batch

    def outputs(ids, mask, lengths):
        values = values_before(critic, ids, mask)
        return *model(ids, mask, 0.7, with_entropy=True), values, last_scores(critic, ids, lengths)

    padded = outputs(ids, mask, BATCH_LENGTHS)
    padding = torch.arange(12) >= BATCH_LENGTHS[:, None]
    other = outputs(torch.where(padding, torch.randint(VOCAB, ids.shape), ids), mask, BATCH_LENGTHS)
    assert all(torch.equal(x, y) for x, y in zip(padded, other))
    for b, row in rows_alone(ids):
        n = row.shape[1]
        for together, alone in zip(padded, outputs(row, mask[b:b + 1, :n], BATCH_LENGTHS[b:b + 1])):
            torch.testing.assert_close(together[b, :n] if together.ndim == 2 else together[b],
                                       alone[0],
                                       atol=2e-5,
                                       rtol=0)


@pytest.mark.case(24)
@pytest.mark.parametrize("seed", range(8))
def test_rows_of_any_lengths_in_any_order_get_what_each_gets_alone(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(2, 32) for _ in range(rng.randint(2, 9))]
    rows = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(seed)) for n in lengths]
    starts = [rng.randint(1, n - 1) for n in lengths]
    model, critic = (tiny(kind, seed, **[{}, LLAMA, OPT, NORM_AFTER][seed % 4])
                     for kind in (GPT, ScalarModel))

    def outputs(chosen):
        """Log-probabilities, values, score of each of the chosen rows, in one batch, padded with anything."""
        ids = torch.randint(VOCAB, (len(chosen), max(lengths[i] for i in chosen)))
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for b, i in enumerate(chosen):
            ids[b, :lengths[i]] = rows[i]
            mask[b, starts[i]:lengths[i]] = True
        with torch.no_grad():
            scores = last_scores(critic, ids, torch.tensor([lengths[i] for i in chosen]))
            found = model(ids, mask)[0], values_before(critic, ids, mask), scores
        return {
            i: torch.cat([found[0][b, mask[b]], found[1][b, mask[b]], found[2][b:b + 1]])
            for b, i in enumerate(chosen)
        }

    alone = {i: outputs([i])[i] for i in range(len(rows))}
    for order in (range(len(rows)), rng.sample(range(len(rows)), len(rows))):
        for i, found in outputs(list(order)).items():
            torch.testing.assert_close(found, alone[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_heads_equal_full_heads_with_keys_and_values_repeated(batch, bias):
    grouped, full = tiny(n_kv_head=2, bias=bias), tiny(bias=bias)
    weights = grouped.state_dict()
    for name in [n for n in weights if "c_attn" in n]:
        q, k, v = weights[name].split([32, 16, 16])
        k, v = (torch.cat([x[:8], x[:8], x[8:], x[8:]]) for x in (k, v))  # heads 0, 1 share one, and 2, 3
        weights[name] = torch.cat([q, k, v])
    full.load_state_dict(weights)
    for x, y in zip(grouped(*batch, with_entropy=True), full(*batch, with_entropy=True)):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=0)


def test_a_sequence_longer_than_the_context_is_refused():
    model = tiny()
    ids, mask = torch.zeros(1, 33, dtype=torch.long), torch.arange(33)[None] > 0
    model(ids[:, :32], mask[:, :32])
    with pytest.raises(UserError, match="33 tokens .* context of 32"):
        model(ids, mask)


# -- scores and values

@pytest.mark.case(24)
@pytest.mark.parametrize("bias", [True, False])
def test_scores_and_values_equal_brute_force_row_by_row(batch, bias):
    model, (ids, mask) = tiny(ScalarModel, bias=bias), batch
    scores, values = last_scores(model, ids, BATCH_LENGTHS), values_before(model, ids, mask)
    expected = torch.zeros(ids.shape)
    for b, row in rows_alone(ids):
        numbers = (model.transformer(row)[0] * model.score.weight[0]).sum(-1)  # (n,)
        torch.testing.assert_close(scores[b], numbers[-1], atol=2e-5, rtol=0)
        for t in range(1, row.shape[1]):
            expected[b, t] = numbers[t - 1] * mask[b, t]
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=0)


def test_the_scalar_head_runs_in_fp32_under_autocast(batch):
    model, (ids, _) = tiny(ScalarModel), batch
    with torch.autocast("cpu", torch.bfloat16):
        scores, states = model(ids), model.transformer(ids)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, (states.float() * model.score.weight[0]).sum(-1), atol=1e-5, rtol=0)


def test_a_fresh_head_has_the_stated_spread_and_the_trunk_is_a_copy():
    for bias in (True, False):
        model = tiny(n_embd=512, n_layer=1, vocab_size=8, bias=bias)
        scalar = ScalarModel.from_trunk(model)
        head = scalar.score.weight.detach()
        assert head.shape == (1, 512)
        assert head.std().item() == pytest.approx(1 / math.sqrt(513), rel=0.1)
        assert abs(head.mean().item()) < 4 / 513
        assert all(
            torch.equal(scalar.transformer.state_dict()[k], v)
            for k, v in model.transformer.state_dict().items())
        before = model.transformer.wte.weight.clone()
        with torch.no_grad():
            for p in scalar.parameters():
                p.zero_()
        assert torch.equal(model.transformer.wte.weight, before)


@pytest.mark.parametrize("options", [{}, {"bias": False}, OPT | {"embed_dim": 16}])
@pytest.mark.parametrize("amount", [1.5, -0.25])
def test_shift_lowers_every_score_by_the_amount(batch, options, amount):
    model, (ids, _) = tiny(ScalarModel, **options), batch
    before, weights = model(ids), {name: p.detach().clone() for name, p in model.state_dict().items()}
    assert model.can_shift
    lower = shifted(weights, amount)
    # Those that are given stay as they are.
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in weights.items())
    model.load_state_dict(lower)
    torch.testing.assert_close(before - model(ids), torch.full(ids.shape, amount), atol=1e-5, rtol=0)
    model.load_state_dict(shifted(lower, torch.tensor(-amount)))
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [LLAMA, OPT | {"norm_after": True}])
def test_a_model_whose_last_norm_has_no_bias_says_that_it_cant_be_shifted(options):
    assert not tiny(ScalarModel, **options).can_shift and tiny(ScalarModel).can_shift


# -- some positions alone

WANTED = {
    "a few": lambda ids: torch.tensor([0, 3, 12, 24, 25, 30, 31]),  # of three rows of four
    "all but the first": lambda ids: (torch.arange(12) > 0).expand(ids.shape).flatten().nonzero().squeeze(1),
    "real ones": lambda ids: (torch.arange(12) < BATCH_LENGTHS[:, None]).flatten().nonzero().squeeze(1),
    "each last": lambda ids: torch.arange(len(ids)) * 12 + BATCH_LENGTHS - 1,
    "one": lambda ids: torch.tensor([47]),
    "none": lambda ids: torch.tensor([], dtype=torch.long)
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("options", [
    {},
    LLAMA,
    NORM_AFTER,
    {"n_layer": 1},
], ids=["gpt2", "llama", "norm_after", "one layer"])
@pytest.mark.parametrize("wanted", WANTED)
def test_some_states_scores_and_gradients_equal_those_among_all(batch, options, wanted, recompute):
    ids = batch[0]
    index = WANTED[wanted](ids)
    for kind in (GPT, ScalarModel):
        model = tiny(kind, **options)
        model.transformer.checkpoint_activations = recompute
        run = model.transformer if kind is GPT else model
        everything, some = run(ids).flatten(0, 1)[index], run(ids, index=index)
        torch.testing.assert_close(some, everything, atol=2e-5, rtol=1e-5)
        weights = torch.randn(some.shape, generator=torch.Generator().manual_seed(2))
        expected, found = (torch.autograd.grad((x * weights).sum(), list(run.parameters()), allow_unused=True)
                           for x in (everything, some))
        assert sum(g is not None for g in found) > 5 or wanted == "none"
        for exact, grad in zip(expected, found):
            torch.testing.assert_close(torch.zeros(()) if grad is None else grad,
                                       torch.zeros(()) if grad is None else exact,
                                       atol=2e-5,
                                       rtol=1e-4)


@pytest.mark.parametrize("options", [{}, LLAMA, NORM_AFTER])
def test_log_probabilities_scores_and_values_of_some_tokens_equal_those_of_all(batch, options):
    """Their gradients too, which the tests row by row don't look at."""
    (ids, mask), (model, critic) = batch, (tiny(kind, **options) for kind in (GPT, ScalarModel))
    g = torch.randn(ids.shape, generator=torch.Generator().manual_seed(2))
    full = model.logits(model.transformer(ids))[:, :-1].log_softmax(-1)
    full = full.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
    numbers = critic(ids)
    pairs = [
        (model, model(ids, mask)[0] * g, F.pad(full, (1, 0)) * mask * g),
        (model, model(ids, mask, summed=True)[0], (full * mask[:, 1:]).sum()),
        (critic, values_before(critic, ids, mask) * g, F.pad(numbers[:, :-1], (1, 0)) * mask * g),
        (critic, last_scores(critic, ids, BATCH_LENGTHS) * g[0, :4],
         numbers[range(4), BATCH_LENGTHS - 1] * g[0, :4]),
    ]
    for network, found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        found, expected = (torch.autograd.grad(x.sum(), list(network.parameters()), retain_graph=True)
                           for x in (found, expected))
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, LLAMA, NORM_AFTER])
def test_the_last_block_computes_the_positions_that_are_wanted_and_no_block_the_padding(batch, options):
    model, (ids, mask), seen = tiny(**options), batch, []
    for block in model.transformer.h:
        block.mlp.register_forward_hook(lambda _, args, out: seen.append(args[0].numel() // 32))
    model(ids, mask)
    # Up to the last token's predecessor.
    inside = sum(row.nonzero().max().item() for row in mask if row.any())
    assert seen == [inside, int(mask.sum())]


# -- rotary positions

def test_rotary_positions_turn_pairs_by_the_published_angles_and_scores_depend_on_distance_alone():
    config = tiny(**LLAMA, rope_theta=100.0).config  # heads of width 8
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    angles = rotary_angles(config, torch.arange(30))
    turned = rotate(q.expand(1, 1, 30, 8), *angles)[0, 0]  # (T, D)
    for i in range(4):  # eq. 34, pairs (i, i + D/2)
        a, b, angle = q[..., i].item(), q[..., i + 4].item(), 7 * 100.0 ** (-2 * i / 8)
        expected = (a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle))
        assert (turned[7, i].item(), turned[7, i + 4].item()) == pytest.approx(expected, abs=1e-5)
    scores = turned @ rotate(k.expand(1, 1, 30, 8), *angles)[0, 0].T  # (T, T)
    for distance in range(-5, 6):
        assert scores.diagonal(distance).std() < 1e-5
    one = rotate(q, *(x[7:8] for x in angles))
    assert torch.allclose(one[0, 0, 0], turned[7])
    assert torch.allclose(one, rotate(q, *rotary_angles(config, torch.tensor([[[7]]]))[:2]))


@pytest.mark.parametrize("scaling", [("linear", 4.0), ("llama3", 4.0, 1.0, 2.0, 64.0)])
def test_context_scaling_stretches_all_wavelengths_or_only_those_longer_than_the_context(scaling):
    options, at = LLAMA | {"rope_theta": 1e4}, torch.tensor([1.0])
    # Of small angles, (D/2,).
    plain, scaled = (rotary_angles(tiny(**options, rope_scaling=s).config, at)[1][0, :4].asin()
                     for s in ((), scaling))
    wavelengths = 2 * math.pi / torch.tensor([1e4 ** (-2 * i / 8) for i in range(4)])  # 6, 63, 628, 6283
    kept = wavelengths < 32 if scaling[0] == "llama3" else wavelengths < 0
    assert torch.allclose(scaled[kept], plain[kept])
    assert torch.allclose(scaled[wavelengths > 64], plain[wavelengths > 64] / 4, rtol=1e-4)
    # 2 turns to 1 within the context: from kept to stretched.
    between = (wavelengths > 32) & (wavelengths < 64)
    if scaling[0] != "linear":
        assert (plain[between] / 4 < scaled[between]).all()
        assert (scaled[between] < plain[between]).all()
        assert between.any()


# -- switches of training: recomputed activations, compiled blocks

@pytest.mark.parametrize("options", [{}, LLAMA, {"dropout": 0.3}])
def test_recomputed_activations_change_neither_loss_nor_gradients(batch, options):
    model, (ids, mask) = tiny(**options).train(), batch
    calls, results = [], []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.transformer.checkpoint_activations in (False, True):
        calls.clear()
        torch.manual_seed(0)
        loss = -model(ids, mask)[0].sum()
        forward = len(calls)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
        assert (forward, len(calls)) == (2, 4 if model.transformer.checkpoint_activations else 2)
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-6)
    calls.clear()
    with torch.no_grad():
        model(ids, mask)
    assert len(calls) == 2


@pytest.mark.parametrize("options", DIALECTS)
def test_every_norm_has_the_eps_of_the_config(options):
    norms = [
        m for m in tiny(norm_eps=0.01, **options).modules()
        if isinstance(m, (torch.nn.LayerNorm, torch.nn.RMSNorm))
    ]
    assert len(norms) >= 4 and {m.eps for m in norms} == {0.01}


@pytest.mark.parametrize("kind", [GPT, ScalarModel])
def test_prepare_switches_the_recomputation_of_activations_on(batch, kind):
    model, calls = tiny(kind), []
    model_file.prepare_training(model, SimpleNamespace(checkpoint_activations=True,
                                                       lora_rank=0,
                                                       compile=False))
    model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.transformer(batch[0]).sum().backward()
    assert len(calls) == 2


def test_compiled_blocks_compute_the_same_and_are_not_compiled_again_for_other_lengths(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    # Without a C++ compiler.
    counter, compile_module = CompileCounterWithBackend("aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda module, **options: compile_module(module, backend=counter, **options))
    plain, model, compiled = tiny(n_layer=3), tiny(n_layer=3), []
    model_file.prepare_training(model, SimpleNamespace(checkpoint_activations=False,
                                                       lora_rank=0,
                                                       compile=True))
    # Without padding and with it.
    for lengths in ([9, 9, 9], [20, 20], [12, 3, 5, 4], [31, 2], [7, 30, 11, 3, 3], [32] * 4):
        T = max(lengths)
        ids = torch.randint(256, (len(lengths), T), generator=torch.Generator().manual_seed(T))
        mask = torch.arange(T) < torch.tensor(lengths)[:, None]
        mask[:, 0] = False
        outputs = [one(ids, mask, summed=True)[0] for one in (plain, model)]
        gradients = [
            torch.autograd.grad(out, list(one.parameters())) for out, one in zip(outputs, (plain, model))
        ]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=0)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
        compiled.append(counter.frame_count)
    # Inner and last block, all positions or some.
    assert 0 < compiled[0] and compiled[2] == compiled[-1] <= 4, compiled
    before = counter.frame_count
    prompts = [[5, 6, 7], [8]]
    same = [
        generate(one, prompts, 8, SimpleNamespace(pad=257, stops=[-1]), temperature=0).ids
        for one in (plain, model)
    ]
    assert torch.equal(*same) and counter.frame_count == before  # decoding goes on uncompiled


# -- adapters against the base

@kinds
def test_new_adapters_and_adapters_that_count_zero_times_are_the_base_bit_for_bit(kind, name):
    base = outputs(tiny_of(kind, name))
    assert torch.equal(outputs(adapted(kind, name, fresh=True)), base)
    assert torch.equal(outputs(adapted(kind, name, lora_alpha=0.0)), base)
    assert (outputs(adapted(kind, name)) - base).abs().max() > 0.01


@kinds
def test_only_adapters_and_a_scalar_head_are_trained_and_each_of_them_is(kind, name):
    model = adapted(kind, name)
    outputs_with_gradient(model).square().mean().backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {
        key
        for key, _ in model.named_parameters()
        if re.search(r"\.h\.\d\.(attn|mlp)\.(c_attn|c_proj|c_fc)\.lora_[AB]$", key) or key == "score.weight"
    }
    assert trained == expected == {key for key, p in model.named_parameters() if p.requires_grad}
    assert len(expected) == 2 * 4 * 2 + (kind is ScalarModel)
    assert sum(len(group["params"]) for group in adamw(model, 0.1, 0.1).param_groups) == len(expected)


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_the_matrices_that_targets_name_get_an_adapter(targets):
    model = adapted(lora_targets=targets)
    found = {
        name.split(".", 3)[-1]
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }
    assert found == {"attention": {"attn.c_attn", "attn.c_proj"}, "mlp": {"mlp.c_fc", "mlp.c_proj"},
                     "all": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}}[targets]


def test_an_adapter_is_its_formula():
    linear = torch.nn.Linear(5, 7)
    torch.manual_seed(0)
    layer, x = LoRALinear(linear, rank=2, alpha=3.0, dropout=0.0), torch.randn(4, 5)
    assert layer.lora_A.shape == (2, 5)
    assert layer.lora_B.shape == (7, 2)
    assert not layer.lora_B.any()
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(5)
    layer.lora_B.data.normal_()
    assert layer.weight is linear.weight and layer.bias is linear.bias
    torch.testing.assert_close(layer(x), linear(x) + 3.0 / 2 * (layer.lora_B @ layer.lora_A @ x.T).T)


def test_dropout_is_of_the_adapters_inputs_and_while_training_only():
    model, base = adapted(lora_dropout=0.5), outputs(tiny_of())
    assert torch.equal(outputs(model), outputs(adapted()))

    def training(model):
        return model.train().logits(model.transformer(IDS)).detach()

    assert not torch.equal(training(model), training(model))
    silent = adapted(lora_dropout=0.5, lora_alpha=0.0)
    assert torch.equal(training(silent), training(silent)) and torch.equal(outputs(silent), base)


def test_new_adapters_come_from_the_seed_alone():
    a, b, c = (adapted(fresh=True, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(9)
    assert all(torch.equal(p, b.state_dict()[key]) for key, p in a.state_dict().items())
    assert not torch.equal(a.transformer.h[0].attn.c_attn.lora_A, c.transformer.h[0].attn.c_attn.lora_A)


# -- copies that share their weights

def storages(module):
    return {p.data_ptr() for p in module.parameters()}


@kinds
def test_a_twin_that_shares_is_the_base_whatever_adapters_the_original_gets(kind, name):
    model = tiny_of(kind, name)
    base, shared, apart = outputs(model), copy_of(model, share=True), copy_of(model)
    assert storages(shared) == storages(model) and not storages(apart) & storages(model)
    shared.requires_grad_(False)
    prepare_training(model, adapter_flags())
    with torch.no_grad():
        for p in model.parameters():  # a training step may change whatever it trains, a scalar head too
            if p.requires_grad:
                p.normal_()
    assert not torch.equal(outputs(model), base)
    assert torch.equal(outputs(shared), base)
    assert torch.equal(outputs(apart), base)
    assert storages(shared.transformer) < storages(model)


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_a_scalar_model_may_share_its_trunk(name):
    model = tiny_of(name=name)
    shared, apart = (ScalarModel.from_trunk(model, share) for share in (True, False))
    assert storages(model.transformer) < storages(shared) and not storages(apart) & storages(model)
    prepare_training(shared, adapter_flags())
    assert not any(".lora_" in key for key in model.state_dict())
    before, lower = outputs(shared), copy_of(shared)
    assert shared.can_shift == (name == "gpt2")
    if shared.can_shift:
        lower.load_state_dict(shifted(shared.state_dict(), 1.0))
    assert torch.equal(outputs(shared), before)
    assert torch.allclose(outputs(lower), before - float(name == "gpt2"), atol=1e-5)


# -- merged adapters

@kinds
def test_merged_weights_compute_what_the_adapters_do_and_leave_them_alone(kind, name, tmp_path):
    model = adapted(kind, name)
    before = outputs(model)
    save_model(tmp_path, model, TOKENIZER, adapter_flags())
    again, _ = load_model(tmp_path, kind)
    close(outputs(again), before, 1e-5)
    assert torch.equal(outputs(model), before)
    expected = tiny_of(kind, name).state_dict().keys()
    assert merged_weights(model).keys() == again.state_dict().keys() == expected
