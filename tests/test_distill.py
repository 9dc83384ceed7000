"""distill.py: divergences and gradients against float64, the objective by enumeration, whole runs."""
import contextlib
import copy
import io
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import distill
import head as head_file
import model as model_file
import rollout
import tools
from bench.optimum import PROMPTS, distance, log_probabilities, optimum, replies_of, write_reference
from data import encode_prompt, pad_rows
from distill import cost_to_go, distillation_loss, divergence
from examples import VOCAB
from formats.model_folder import load_model, save_model
from model import GPT
from plumbing.flags import UserError
from small_models import rows_alone, tiny, tiny_of
from test_head import LargestTensor, Memory
from tools import (
    ALL_AT_ONCE, TOY, command, exit_code, rows_of, run_here, stopped_in_the_second_step)

KINDS = ("reverse", "forward", "js")


def naive(log_p, log_q, kind, beta=0.5):
    """Divergences (...) of the student's p and the teacher's q, from their logarithms (..., V)."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "reverse":
        return (p * (log_p - log_q)).sum(-1)
    if kind == "forward":
        return (q * (log_q - log_p)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)


def pair_inputs(N, vocabulary=VOCAB, size=0.4):
    """States (N, 16) and weight of a student, those of a wider teacher (N, 24)."""
    generator = torch.Generator().manual_seed(N)
    student = torch.randn(N, 16, generator=generator), size * torch.randn(vocabulary, 16, generator=generator)
    teacher = torch.randn(N, 24, generator=generator), size * torch.randn(vocabulary, 24, generator=generator)
    return *student, *teacher


def in_float64(inputs, kind, beta, temperature, factor):
    """Divergences (N,), and the gradients of factor times their sum in the student's states and weight."""
    states, weight, teacher_states, teacher_weight = (t.double() for t in inputs)
    leaves = states.requires_grad_(), weight.requires_grad_()
    log_p = (states @ weight.T / temperature).log_softmax(-1)
    log_q = (teacher_states @ teacher_weight.T / temperature).log_softmax(-1)
    each = naive(log_p, log_q, kind, beta)
    return each.detach(), torch.autograd.grad(factor * each.sum(), leaves)


# -- the divergence and its gradient

@pytest.mark.parametrize("at_once", [1 << 26, 10 * VOCAB, 1], ids=["one chunk", "chunks", "rows"])
@pytest.mark.parametrize("kind, beta", [
    ("reverse", 0.5), ("forward", 0.5), ("js", 0.5), ("js", 0.1), ("js", 0.9)])
@pytest.mark.parametrize("N, temperature", [(0, 1.0), (1, 0.7), (23, 1.0), (23, 0.7)])
def test_values_and_gradients_are_those_of_float64_autograd_whatever_is_frozen(
        N, temperature, kind, beta, at_once, monkeypatch):
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", at_once)
    inputs = pair_inputs(N)
    expected, exact = in_float64(inputs, kind, beta, temperature, 3 / max(1, N))
    for trained in ((True, True), (True, False), (False, True)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(inputs, (*trained, True, True))]
        total, each = divergence(*leaves, kind, beta, temperature)
        torch.testing.assert_close(each, expected.float(), atol=1e-5, rtol=0)
        torch.testing.assert_close(total, expected.sum().float(), atol=1e-5 * max(1, N), rtol=0)
        assert not each.requires_grad
        (3 / max(1, N) * total).backward()
        for leaf, need, gradient in zip(leaves, trained, exact):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, gradient.float(), atol=1e-5, rtol=0)
        # The teacher has no gradient, even where one could be asked for.
        assert leaves[2].grad is None and leaves[3].grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama3", "opt-350m"])
def test_all_weights_of_models_with_tied_and_untied_heads_have_autograds_gradient(name, kind, batch):
    student, teacher = tiny_of(name=name), tiny_of(name="smollm2", seed=1)
    assert student.config.tied == (name != "llama3")
    ids, mask = batch
    config = SimpleNamespace(divergence=kind, js_beta=0.3, temperature=0.7, credit="none")
    taught = teacher(ids, mask, read=lambda *outputs: outputs)
    loss, sums = student(ids, mask, read=lambda *outputs: distillation_loss(*outputs, taught, mask, config))
    loss.backward()
    found = {key: p.grad for key, p in student.named_parameters()}
    student.zero_grad()

    exact_student, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    expected = 0
    for b, row in rows_alone(ids):
        with torch.no_grad():
            log_q = (exact_teacher.logits(exact_teacher.transformer(row))[0] / 0.7).log_softmax(-1)
        log_p = (exact_student.logits(exact_student.transformer(row))[0] / 0.7).log_softmax(-1)
        for t in range(1, row.shape[1]):
            if mask[b, t]:
                expected = expected + naive(log_p[t - 1], log_q[t - 1], kind, 0.3)
    expected.backward()
    assert loss.item() == sums["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    for key, p in exact_student.named_parameters():
        size = max(1, p.grad.abs().max().item())
        torch.testing.assert_close(found[key].double(), p.grad, atol=2e-5 * size, rtol=0, msg=key)


def test_the_ends_of_the_generalised_js_are_the_forward_and_the_reverse_kl():
    inputs = pair_inputs(23, size=0.1)

    def found(kind, beta, scale):
        leaves = [t.clone().requires_grad_() for t in inputs[:2]]
        total, each = divergence(*leaves, *inputs[2:], kind, beta)
        return each * scale, *(gradient * scale for gradient in torch.autograd.grad(total, leaves))

    b = 1e-3
    for kind, ends in (("forward", (b, 1 / b)), ("reverse", (1 - b, 1 / b))):
        for end, exact in zip(found("js", *ends), found(kind, 0.5, 1)):
            assert (end - exact).norm() < 0.01 * exact.norm()
    # They differ by more than that, and js with its models in each other's places is that of 1 - b.
    far = pair_inputs(23)
    forward, reverse = (divergence(*far, kind)[1] for kind in ("forward", "reverse"))
    assert (forward - reverse).norm() > 0.1 * forward.norm()
    swapped = divergence(*inputs[2:], *inputs[:2], "js", 0.3)[1]
    torch.testing.assert_close(swapped, divergence(*inputs, "js", 0.7)[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence_and_no_gradient(kind):
    states, weight, _, _ = pair_inputs(23)
    states.requires_grad_()
    total, each = divergence(states, weight, states.detach().clone(), weight.clone(), kind)
    total.backward()
    assert each.abs().max() < 1e-6 and states.grad.abs().max() < 1e-6


def test_probabilities_that_underflow_cost_what_they_do():
    """Logits 300 apart: the teacher's probability is e^-300, which float32 has not."""
    states, teacher = torch.tensor([[1.0]]), torch.tensor([[-1.0]])
    weight = torch.tensor([[150.0], [-150.0], [-1e4], [0.0]])
    for kind in KINDS:
        leaves = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
        total, each = divergence(*leaves, teacher, weight, kind, 0.3)
        found = torch.autograd.grad(total, leaves)
        assert each.isfinite().all() and all(gradient.isfinite().all() for gradient in found)
        if kind == "js":
            # All that can be told apart is told apart, and costs the entropy of b.
            assert each.item() == pytest.approx(-0.3 * math.log(0.3) - 0.7 * math.log(0.7), rel=1e-5)
            continue
        exact, gradients = in_float64((states, weight, teacher, weight), kind, 0.3, 1.0, 1.0)
        assert each.item() == pytest.approx(exact.item(), rel=1e-6) and each.item() > 150
        torch.testing.assert_close(found, tuple(g.float() for g in gradients), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(300, 340), (340, 300)])
def test_of_vocabularies_that_are_filled_up_differently_the_tokens_count_that_both_have(sizes, kind):
    states, weight, teacher_states, teacher_weight = pair_inputs(23, 340)
    leaf = weight[:sizes[0]].clone().requires_grad_()
    total, each = divergence(states, leaf, teacher_states, teacher_weight[:sizes[1]], kind)
    common = states, weight[:300], teacher_states, teacher_weight[:300]
    expected, (_, gradient) = in_float64(common, kind, 0.5, 1.0, 1.0)
    torch.testing.assert_close(each, expected.float(), atol=1e-5, rtol=0)
    total.backward()
    torch.testing.assert_close(leaf.grad[:300], gradient.float(), atol=3e-5, rtol=0)
    assert leaf.grad.shape == leaf.shape and not leaf.grad[300:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_and_fp16_products_are_rounded_and_nothing_else(kind):
    inputs = pair_inputs(200)
    exact, exact_gradients = in_float64(inputs, kind, 0.5, 1.0, 1.0)
    for dtype, bound in ((torch.bfloat16, 0.06), (torch.float16, 0.01)):
        leaves = [t.clone().requires_grad_() for t in inputs[:2]]
        with torch.autocast("cpu", dtype):
            total, each = divergence(*leaves, *inputs[2:], kind)
        total.backward()
        assert total.dtype == each.dtype == torch.float32
        assert (each - exact).norm() < bound * exact.norm()
        for leaf, gradient in zip(leaves, exact_gradients):
            assert leaf.grad.dtype == torch.float32
            assert (leaf.grad - gradient).norm() < bound * gradient.norm()


def test_a_float16_gradient_that_overflows_shrinks_with_the_loss():
    """A row adds up 4,096 states of 30, more than float16 holds; divided by their number it does not."""
    states, weight = torch.full((4096, 8), 30.0).half(), torch.zeros(64, 8).half().requires_grad_()
    teacher = torch.zeros(64, 8).half()
    teacher[0] = 1
    for scale, finite in ((1.0, False), (1 / 4096, True)):
        total, _ = divergence(states, weight, states, teacher, "forward")
        gradient, = torch.autograd.grad(total * scale, weight)
        assert gradient.isfinite().all() == finite


def test_a_divergence_without_a_branch_is_an_error():
    with pytest.raises(ValueError, match="unknown divergence sideways"):
        divergence(*pair_inputs(2), "sideways")


# -- memory

def test_a_divergence_takes_a_fraction_of_the_memory_of_one_models_logits(monkeypatch):
    """Beyond the gradients, as a share of the fp32 logits of one model. Measured: 0.14; autograd of the
    formula takes 8.0."""
    N, V = 2048, 50257
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", 1 << 24)
    states, _, teacher_states, _ = pair_inputs(N, 8)
    generator = torch.Generator().manual_seed(0)
    weight, teacher_weight = (0.4 * torch.randn(V, width, generator=generator) for width in (16, 24))
    leaves = states.requires_grad_(), weight.requires_grad_()
    with Memory(*leaves, teacher_states, teacher_weight) as memory:
        total, each = divergence(*leaves, teacher_states, teacher_weight, "js")
        total.backward()
    gradients = 4 * (states.numel() + weight.numel())
    assert gradients <= memory.now < gradients + 1e6
    assert memory.peak - gradients < 0.2 * 4 * N * V, (memory.peak - gradients) / (4 * N * V)


def test_no_more_logits_exist_at_once_than_a_chunk_has(monkeypatch):
    N = 200
    monkeypatch.setattr(head_file, "LOGITS_AT_ONCE", 40 * VOCAB)
    states, weight, *teacher = pair_inputs(N)
    with LargestTensor() as largest:
        divergence(states.requires_grad_(), weight.requires_grad_(), *teacher, "js")[0].backward()
    # Two buffers of ten rows: of many tokens half at once. VOCAB is rounded up to 64.
    assert largest.numel == 2 * 10 * 320


def test_no_gradient_is_computed_where_nobody_wants_it():
    states, weight, *teacher = pair_inputs(23)
    size = 4 * weight.numel()
    with torch.no_grad(), Memory(states, weight, *teacher) as memory:
        divergence(states.requires_grad_(), weight.requires_grad_(), *teacher, "reverse")
    assert memory.sizes and size not in memory.sizes


# -- masks at their edges

def loss_of(student, teacher, ids, mask, **changes):
    """Loss and sums of a pass through both models."""
    plain = {"divergence": "reverse", "js_beta": 0.5, "temperature": 1.0, "credit": "none", "baseline": 0.0}
    config = SimpleNamespace(**plain | changes)
    with torch.no_grad():
        taught = teacher(ids, mask, read=lambda *outputs: outputs)

    def read(*outputs):
        return distillation_loss(*outputs, taught, mask, config, config.baseline)

    return student(ids, mask, read=read)


@pytest.mark.case(24)
@pytest.mark.parametrize("changes", [
    {"divergence": "reverse"}, {"divergence": "js", "credit": "future"}, {"divergence": "nll"}], ids=str)
def test_padding_and_empty_replies_add_nothing_and_one_token_adds_its_own(changes, batch):
    student, teacher = tiny(), tiny_of(seed=1)
    ids, mask = batch
    whole, _ = loss_of(student, teacher, ids, mask, **changes)
    alone = 0.0
    for b, row in rows_alone(ids):
        if mask[b].any():
            alone += loss_of(student, teacher, row, mask[b:b + 1, :row.shape[1]], **changes)[0].item()
    assert whole.item() == pytest.approx(alone, rel=1e-5)
    other = torch.where(torch.arange(ids.shape[1]) >= torch.tensor([9, 2, 12, 1])[:, None], 7, ids)
    padded, _ = loss_of(student, teacher, other, mask, **changes)
    assert padded.item() == pytest.approx(whole.item(), rel=1e-5)
    # Row 1 has a single token; row 3 none.
    single, _ = loss_of(student, teacher, ids[1:2], mask[1:2], **changes)
    nothing, sums = loss_of(student, teacher, ids[3:], mask[3:], **changes)
    assert single.item() > 0 and nothing.item() == 0 and all(value == 0 for value in sums.values())
    nothing.backward()
    assert not any(p.grad.any() for p in student.parameters() if p.grad is not None)


def test_nll_is_the_log_probability_of_the_tokens_and_asks_no_teacher(batch):
    student, (ids, mask) = tiny(), batch
    config = SimpleNamespace(divergence="nll", temperature=0.7, credit="none")
    loss, sums = student(ids, mask, read=lambda *outputs: distillation_loss(*outputs, None, mask, config))
    logprobs, _ = student(ids, mask, 0.7)
    assert loss.item() == sums["loss"].item() == pytest.approx(-logprobs.sum().item(), rel=1e-6)


def test_the_cost_to_go_of_a_token_is_what_comes_after_it():
    divergences = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0], [0.0, 5.0, 0.0, 0.0, 0.0], [0.0] * 5])
    assert cost_to_go(divergences)[0].tolist() == [6, 5, 3, 0, 0]
    assert cost_to_go(divergences)[1].tolist() == [5, 0, 0, 0, 0] and not cost_to_go(divergences)[2].any()


# -- the objective, by enumeration: a task whose replies can all be listed (bench/optimum.py)

@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a reference and a teacher that is pi* = ref exp(r / beta) / Z; tokenizer, replies, pi*.

    Whether a GPT can be pi* exactly is open, so one is fitted to it by the exact gradient of KL(pi* ||
    teacher) over all replies. It ends within 0.002 of it, a tenth of what the student may be off.
    """
    folder = tmp_path_factory.mktemp("task")
    reference, tokenizer = write_reference(folder / "reference", 2)
    replies = replies_of(tokenizer, 2)
    best = optimum(reference, tokenizer, replies, beta=0.5)
    teacher = copy.deepcopy(reference).double()
    minimise(lambda: -(best * whole_logprobs(teacher, tokenizer, replies)).sum(), teacher.parameters())
    teacher.float()
    save_model(folder / "teacher", teacher, tokenizer)
    tools.write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    assert distance(teacher, tokenizer, replies, best) < 0.002
    assert distance(reference, tokenizer, replies, best) > 0.3
    return folder, tokenizer, replies, best


def minimise(loss, parameters):
    """Change parameters until loss() is the least near by."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=400, history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def listed(tokenizer, replies):
    """(ids (N, T), mask (N, T)) of all replies to each prompt."""
    found = []
    for text in PROMPTS:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
        ids, lengths = pad_rows([prompt + reply for reply in replies], tokenizer.pad)
        inside = torch.arange(ids.shape[1])
        found.append((ids, (inside >= len(prompt)) & (inside < lengths[:, None])))
    return found


def whole_logprobs(network, tokenizer, replies):
    """log pi(y|x) of whole replies (prompts, replies), with its gradient."""
    sums = []
    for ids, mask in listed(tokenizer, replies):
        logprobs = network.logits(network.transformer(ids)).log_softmax(-1)[:, :-1]
        chosen = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
        sums.append((chosen * mask[:, 1:]).sum(1))
    return torch.stack(sums)


@pytest.mark.parametrize("kind", KINDS)
def test_credit_for_the_future_makes_the_expected_gradient_that_of_the_expected_sum(kind, task):
    """Without it, it is another. Of reverse the sum is KL(pi(y|x) || teacher(y|x)) of whole replies.

    A baseline changes no expectation."""
    folder, tokenizer, replies, _ = task
    student, teacher = (load_model(folder / name, GPT)[0].eval() for name in ("reference", "teacher"))
    parameters = list(student.parameters())

    # As defined: the mean over all replies of the naive sums, differentiated through the probabilities too.
    objective, whole_kl = 0.0, 0.0
    logprobs = whole_logprobs(student, tokenizer, replies)  # (prompts, replies)
    for of_prompt, (ids, mask) in zip(logprobs, listed(tokenizer, replies)):
        log_p = student.logits(student.transformer(ids)).log_softmax(-1)[:, :-1]
        log_q = teacher.logits(teacher.transformer(ids)).log_softmax(-1)[:, :-1].detach()
        sums = (naive(log_p, log_q, kind) * mask[:, 1:]).sum(1)  # (replies,)
        objective = objective + of_prompt.exp() @ sums
    exact = torch.autograd.grad(objective, parameters, retain_graph=True)
    if kind == "reverse":
        other = whole_logprobs(teacher, tokenizer, replies).detach()
        whole_kl = (logprobs.exp() * (logprobs - other)).sum()
        assert whole_kl.item() == pytest.approx(objective.item(), rel=1e-4)
        of_kl = torch.autograd.grad(whole_kl, parameters, retain_graph=True)
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(of_kl, exact))

    # As shipped: each reply's gradient as often as it is sampled.
    def expected(credit, baseline=0.0):
        total = [torch.zeros_like(p) for p in parameters]
        for of_prompt, (ids, mask) in zip(logprobs.detach().exp(), listed(tokenizer, replies)):
            for chance, row, inside in zip(of_prompt, ids, mask):
                loss, _ = loss_of(student, teacher, row[None], inside[None], divergence=kind, credit=credit,
                                  baseline=baseline)
                for mean, gradient in zip(total, torch.autograd.grad(chance * loss, parameters)):
                    mean += gradient
        return total

    size = max(gradient.abs().max().item() for gradient in exact)
    for baseline in (0.0, 0.7):
        worst = max((a - b).abs().max().item() for a, b in zip(expected("future", baseline), exact))
        assert worst < 3e-6 * max(1, size), (worst, size)
    assert max((a - b).abs().max().item() for a, b in zip(expected("none"), exact)) > 0.01 * size


TASK_RUN = "--max-new-tokens 2 --log-every 1000 --sample-every 100000 --threads 1"
ENOUGH = "--rollout-batch 64 --steps 200 --lr 3e-3 --lr-schedule linear --warmup 5"


def end(task, out, flags=""):
    """Total variation to pi* at the end of a run of distill.py from the reference."""
    folder, tokenizer, replies, best = task
    with contextlib.redirect_stdout(io.StringIO()):
        run_here("distill", f"--model {folder}/reference --teacher {folder}/teacher --out {out}",
                 f"--data {folder}/prompts.jsonl {TASK_RUN} {ENOUGH} {flags}")
    return distance(load_model(out, GPT)[0], tokenizer, replies, best)


@pytest.mark.parametrize("flags, bound", [
    ("", 0.02), ("--divergence forward", 0.02), ("--divergence js", 0.02), ("--credit future", 0.02),
    ("--on teacher --divergence forward", 0.02), ("--on mix --divergence js --js-beta 0.1", 0.02),
    ("--on teacher --divergence nll --rollout-batch 512", 0.05)])
def test_a_student_of_the_optimal_policy_reaches_the_optimum(flags, bound, task, tmp_path):
    """Where whole distributions are compared no noise is left at the end; nll keeps that of the tokens."""
    assert end(task, tmp_path / "run", flags) < bound


# -- bugs, planted: none may reach the optimum with what suffices without it

def student_and_teacher_swapped(monkeypatch):
    right = distill.overwrite_with_gradient

    def swapped(log_p, log_q, *rest):
        values = right(log_q, log_p, *rest)
        log_p.copy_(log_q)
        return values

    monkeypatch.setattr(distill, "overwrite_with_gradient", swapped)


def mask_one_token_early(monkeypatch):
    right = rollout.generate

    def generate(*args, **options):
        got = right(*args, **options)
        return got._replace(mask=torch.cat([got.mask[:, 1:], torch.zeros_like(got.mask[:, :1])], 1))

    monkeypatch.setattr(rollout, "generate", generate)


def end_token_out_of_the_mask(monkeypatch):
    right = rollout.generate

    def generate(*args, **options):
        got = right(*args, **options)
        last = torch.arange(got.ids.shape[1]) == got.lengths[:, None] - 1
        return got._replace(mask=got.mask & ~last)

    monkeypatch.setattr(rollout, "generate", generate)


def teacher_that_moves(monkeypatch):
    """At every step it goes a fifth of the way to the student."""
    right = distill.load_pair

    def load_pair(*args):
        pair, tokenizer = right(*args)
        step = pair.optimizer.step

        def follow(*rest):
            step(*rest)
            with torch.no_grad():
                for p, other in zip(pair.teacher.parameters(), pair.student.parameters()):
                    p.lerp_(other, 0.2)

        pair.optimizer.step = follow
        return pair, tokenizer

    monkeypatch.setattr(distill, "load_pair", load_pair)


def temperature_of_one_alone(monkeypatch):
    right = distill.divergence
    monkeypatch.setattr(distill, "divergence", lambda states, weight, teacher_states, *rest: right(
        states, weight, teacher_states / 1.5, *rest))


def states_one_token_late(monkeypatch):
    """The student's state at the token itself, which knows it already; the teacher's before it."""
    right = model_file.predicting
    monkeypatch.setattr(model_file, "predicting", lambda index: right(index) + torch.is_grad_enabled())


BUGS = (student_and_teacher_swapped, mask_one_token_early, end_token_out_of_the_mask, teacher_that_moves,
        temperature_of_one_alone, states_one_token_late)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_with_a_bug_the_student_does_not_reach_the_optimum(bug, task, monkeypatch, tmp_path):
    bug(monkeypatch)
    assert end(task, tmp_path / "run") > 0.05


@pytest.mark.parametrize("flags, reaches", [
    ("--divergence reverse --credit future", True), ("--divergence forward --credit future", False)])
def test_which_way_round_matters_to_a_student_that_cant_be_the_teacher(flags, reaches, task, tmp_path):
    """A student with one free number per token, whatever came before: the reverse divergence with credit for
    the future ends at the least KL of whole replies, the other way round elsewhere."""
    folder, tokenizer, replies, _ = task
    teacher = load_model(folder / "teacher", GPT)[0]
    target = log_probabilities(teacher, tokenizer, replies)

    student, _ = load_model(folder / "reference", GPT)
    forget(student)
    save_model(tmp_path / "poor", student, tokenizer)

    def kl(network):
        logprobs = whole_logprobs(network, tokenizer, replies)
        return (logprobs.exp() * (logprobs - target)).sum() / len(PROMPTS)

    # The least that such a student can have, by the exact gradient.
    least = copy.deepcopy(student)
    minimise(lambda: kl(least), [least.transformer.ln_f.bias])
    lowest = kl(least).item()
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "prepare_training", lambda network, config: forget(network))
        run_here("distill", f"--model {tmp_path}/poor --teacher {folder}/teacher --out {tmp_path}/run",
                 f"--data {folder}/prompts.jsonl {TASK_RUN} --rollout-batch 512 --steps 100",
                 f"--lr 3e-2 --warmup 5 {flags}")
    found = load_model(tmp_path / "run", GPT)[0]
    assert lowest > 0.05
    excess = kl(found).item() - lowest
    assert excess < 0.01 if reaches else excess > 0.03


def forget(network):
    """Leave a model nothing to tell contexts apart by, and one vector to train: the bias of its last norm."""
    network.requires_grad_(False)
    network.transformer.ln_f.weight.zero_()
    network.transformer.ln_f.bias.requires_grad_(True)


# -- whole runs

@pytest.fixture(scope="module")
def pair(small, tmp_path_factory):
    """Flags of a run of a small student with a larger teacher whose replies sometimes end."""
    root = tmp_path_factory.mktemp("pair")
    with tools.quietly():
        run_here("sft", f"--layers 2 --heads 2 --width 48 --block-size 64 {ALL_AT_ONCE} --tokenizer {TOY}",
                 f"--data {small}/demonstrations.json --steps 30 --lr 0.02 --seed 1 --out {root}/teacher")
    return (f"--model {small}/sft --teacher {root}/teacher --data {small}/prompts.json --threads 1 "
            "--warmup 1 --rollout-batch 8 --max-new-tokens 10 --steps 4 --lr 0.01 --sample-every 2")


def files_of(folder):
    """{name: content} of a folder's files."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


WAYS = ("--credit future", "--on mix --divergence js --micro-batch-tokens 40",
        "--on teacher --divergence nll --lora-rank 4")


@pytest.mark.parametrize("way", WAYS)
def test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit(way, pair, tmp_path):
    with tools.quietly():
        run_here("distill", pair, way, f"--out {tmp_path}/whole")
        with stopped_in_the_second_step():
            run_here("distill", pair, way, f"--out {tmp_path}/parts")
        assert tools.latest(tmp_path / "parts").name == "step_000002"
        run_here("distill", pair, way, f"--out {tmp_path}/parts --resume")
    assert tools.same(tmp_path / "parts", tmp_path / "whole") and len(rows_of(tmp_path / "whole")) == 4


@pytest.mark.case(25)
@pytest.mark.parametrize("way, parallel", [
    ("--credit future", "ddp"), pytest.param("--divergence js", "fsdp", marks=pytest.mark.long),
    pytest.param("--on teacher --divergence nll", "ddp", marks=pytest.mark.long),
    pytest.param("--on mix", "fsdp", marks=pytest.mark.long)])
def test_two_ranks_train_as_one_does(way, parallel, pair, tmp_path):
    flags = f"{pair} {way} --micro-batch-tokens 40 --parallel {parallel} --out {tmp_path}/two"
    two = command("distill", flags, launcher=tools.TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    with tools.quietly():
        run_here("distill", pair, way, f"--out {tmp_path}/one")
    for one, other in zip(tools.metrics(tmp_path / "one"), tools.metrics(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.case(25)
def test_micro_batches_and_passes_that_keep_ranks_in_step_change_nothing(pair, tmp_path, monkeypatch):
    with tools.quietly():
        for budget in (1, 10_000):
            cut = f"--micro-batch-tokens {budget} --out {tmp_path}/{budget}"
            run_here("distill", pair, "--credit future", cut)
        right = rollout.Rollout.plan
        monkeypatch.setattr(rollout.Rollout, "plan", lambda *args: [[*right(*args)[0], ([0, 1], 0.0)]])
        run_here("distill", pair, f"--credit future --out {tmp_path}/filled")
    for name in ("1", "filled"):
        for one, other in zip(tools.metrics(tmp_path / name), tools.metrics(tmp_path / "10000"), strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_a_step_follows_the_formula_taken_one_reply_at_a_time(pair, small, tmp_path, monkeypatch):
    """Loss and gradient of the first step, its replies from the student."""
    gradients, steps = {}, distill.Run.optimizer_step

    def optimizer_step(self, *args):
        if not gradients:
            gradients.update({key: p.grad.clone() for key, p in self.modules["policy"].named_parameters()})
        return steps(self, *args)

    samples = tools.recorded(monkeypatch, distill, "sample")["sample"]
    monkeypatch.setattr(distill.Run, "optimizer_step", optimizer_step)
    with tools.quietly():
        run_here("distill", pair, f"--temperature 0.8 --steps 1 --micro-batch-tokens 60 --out {tmp_path}/run")
    student, teacher = (load_model(folder, GPT)[0].eval() for folder in (small / "sft", pair.split()[3]))
    total, (arguments, batch) = 0.0, samples[0]
    # Sampled at the temperature that is scored.
    assert arguments[5] == 0.8
    for row, inside in zip(batch.ids, batch.mask):
        log_p = (student.logits(student.transformer(row[None]))[0] / 0.8).log_softmax(-1)  # (T, V)
        log_q = (teacher.logits(teacher.transformer(row[None]))[0] / 0.8).log_softmax(-1).detach()
        for t in inside.nonzero().flatten().tolist():
            total = total + naive(log_p[t - 1], log_q[t - 1], "reverse")
    loss = total / batch.mask.sum()
    loss.backward()
    row, = rows_of(tmp_path / "run")
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["loss_per_reply"] == pytest.approx(total.item() / 8, rel=1e-4)
    assert row["length"] == pytest.approx(batch.mask.sum().item() / 8)
    assert row["eos_rate"] == batch.ended.float().mean()
    for key, p in student.named_parameters():
        torch.testing.assert_close(gradients[key], p.grad, rtol=1e-3, atol=1e-5, msg=key)


def test_the_baseline_is_the_mean_cost_to_go_of_the_step_before(pair, tmp_path, monkeypatch):
    calls = tools.recorded(monkeypatch, distill, "distillation_loss")["distillation_loss"]
    with tools.quietly():
        run_here("distill", pair, f"--credit future --out {tmp_path}/run")
    costs = [row["cost"] for row in rows_of(tmp_path / "run")]
    baselines = [arguments[6] for arguments, _ in calls]
    assert baselines == [0.0, *costs[:-1]] and all(cost > 0 for cost in costs)


def test_whose_replies_are_trained_on_and_what_becomes_of_the_teacher(pair, small, tmp_path, monkeypatch):
    teacher = pair.split()[3]
    sampled = tools.recorded(monkeypatch, distill, "sample")["sample"]
    loaded = tools.recorded(monkeypatch, distill, "load_pair")["load_pair"]
    before = files_of(teacher)
    seen = {}
    for way in ("policy", "teacher", "mix", "mix --mix-share 0", "mix --mix-share 1"):
        sampled.clear()
        out = tmp_path / way.replace(" ", "")
        with tools.quietly():
            run_here("distill", pair, f"--on {way} --divergence forward --steps 6 --out {out}")
        found, _ = loaded[-1][1]
        seen[way] = [arguments[1] is found.student for arguments, _ in sampled]
        if way.startswith("mix"):
            assert [row["student_samples"] for row in rows_of(out)] == [float(own) for own in seen[way]]
        assert tools.same_tensors(load_model(teacher, GPT)[0].state_dict(), found.teacher.state_dict())
    assert seen["policy"] == seen["mix --mix-share 1"] == [True] * 6
    assert seen["teacher"] == seen["mix --mix-share 0"] == [False] * 6
    assert 0 < sum(seen["mix"]) < 6
    assert files_of(teacher) == before


def test_judges_are_logged_and_change_nothing_and_samples_are_printed(pair, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def brevity(replies):\n    return [-len(text) for text in replies]\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, way in (("without", ""), ("judged", "--judge mine:brevity")):
        run_here("distill", pair, way, f"--out {tmp_path}/{name}")
    said = capsys.readouterr().out
    assert all(row["brevity"] < 0 for row in rows_of(tmp_path / "judged"))
    assert "brevity" not in rows_of(tmp_path / "without")[0]
    without, judged = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "judged"))
    assert tools.same_tensors(without, judged)
    assert said.count("  sample: 'Say ") >= 8 and "(score" not in said and "student: " in said


def test_the_teachers_distribution_comes_nearer_with_adapters_too(pair, tmp_path):
    for way in ("", "--lora-rank 8 --lora-alpha 16"):
        with tools.quietly():
            run_here("distill", pair, way, f"--steps 30 --rollout-batch 16 --out {tmp_path}/run --overwrite")
        losses = [row["loss"] for row in rows_of(tmp_path / "run")]
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.case(30)
@pytest.mark.parametrize("flags, said", [
    ("--divergence nll", "nll on the student's own replies teaches nothing: --on teacher, not policy"),
    ("--divergence nll --on mix", "nll on the student's own replies teaches nothing: --on teacher, not mix"),
    ("--credit future --on teacher", "is for replies that the student samples: --on policy, not teacher"),
    ("--js-beta 1", "--js-beta must be > 0 and < 1, got 1.0"),
    ("--teacher nowhere", "nowhere"),
    ("--teacher {root}/reward", "holds a reward model, but a language model is needed here"),
    ("--max-new-tokens 64", "leaves no room for a prompt in the context of 64"),
    ("--judge mine:loss", "can't be imported"),
    ("--diverge js", "unknown argument --diverge; did you mean --divergence?")])
def test_what_cant_be_done_is_said_in_one_line(flags, said, pair, small, tmp_path, capsys):
    capsys.readouterr()
    assert exit_code("distill", pair, flags.format(root=small), f"--out {tmp_path}/run") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_teacher_is_refused_that_has_another_tokenizer_would_be_deleted_or_has_changed(pair, small, task,
                                                                                         tmp_path):
    with pytest.raises(UserError, match="--teacher .* has another tokenizer than --model"):
        run_here("distill", pair, f"--teacher {task[0]}/teacher --out {tmp_path}/run")
    folder = shutil.copytree(small / "other", tmp_path / "taught")
    with pytest.raises(UserError, match="--overwrite would delete the --teacher"):
        run_here("distill", pair, f"--teacher {folder} --out {folder} --overwrite")
    with tools.quietly():
        run_here("distill", pair, f"--teacher {folder} --steps 1 --out {tmp_path}/run")
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="what --teacher names has changed"):
        run_here("distill", pair, f"--teacher {folder} --steps 1 --out {tmp_path}/run --resume")
