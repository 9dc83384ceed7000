"""generate.py: replies against slow decoding, row by row; samples against the distribution they are of."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import generate as generate_file
import model as model_file
from examples import VOCAB
from generate import Generation, generate, sample_token, uniforms
from model import GPT, GPTConfig
from plumbing.flags import UserError
from small_models import DIALECTS, LLAMA, NORM_AFTER, OPT, tiny

CPU = torch.device("cpu")


# -- replies

PROMPTS = [
    [3, 1, 4],
    [1],
    [5, 9, 2, 6, 5, 3, 5],
    [8, 9, 7, 9, 3],
    [2, 3],
    [8, 4, 6, 2, 6, 4],
    [11, 0],
    [7, 7, 7, 1],
]


def slow_greedy(model, prompt, number):
    """The likeliest tokens, a full forward pass over everything for each."""
    ids = list(prompt)
    for _ in range(number):
        ids.append(int(model.logits(model.transformer(torch.tensor([ids])))[0, -1].argmax()))
    return ids[len(prompt):]


def ends(eos, pad):
    """Stands in for a tokenizer whose replies end with eos."""
    return SimpleNamespace(eos=eos, stops=(eos,), pad=pad)


def until_end(tokens, eos):
    return tokens[:tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.case(24)
@pytest.mark.parametrize("options", DIALECTS)
def test_cached_batched_greedy_equals_each_row_alone_without_a_cache(options):
    number, model = 16, tiny(vocab_size=12, seed=3, **options)
    slow = [slow_greedy(model, prompt, number) for prompt in PROMPTS]
    # the end token that makes rows end, and leave the cache, at the most different steps
    eos = max(range(12), key=lambda token: len({len(until_end(tokens, token)) for tokens in slow}))
    expected = [until_end(tokens, eos) for tokens in slow]
    assert len({len(tokens) for tokens in expected}) >= 4 and sum(eos in tokens for tokens in slow) >= 3
    for sampling in ({"temperature": 0}, {"top_k": 1}):
        out = generate(model, PROMPTS, number, ends(eos, 0), **sampling)
        assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == expected
        assert [ids[:len(p)].tolist() for ids, p in zip(out.ids, PROMPTS)] == PROMPTS
        assert out.ended.tolist() == [tokens[-1] == eos for tokens in expected]
    for prompt, tokens in zip(PROMPTS, expected):
        alone = generate(model, [prompt], number, ends(eos, 0), temperature=0)
        assert alone.ids.tolist() == [prompt + tokens]


def test_each_prompt_may_have_a_limit_of_its_own_and_is_decoded_as_if_it_were_alone():
    """Where the longest prompt and the longest response would not fit the context together."""
    model = tiny(vocab_size=12, seed=3, block_size=20)
    limits = [20 - len(prompt) if i % 3 else 1 + i for i, prompt in enumerate(PROMPTS)]
    assert max(map(len, PROMPTS)) + max(limits) > 20
    uniform = uniforms(len(PROMPTS), 20, torch.Generator().manual_seed(0), CPU)
    for rows in (0, 3):
        out = generate(model, PROMPTS, limits, ends(5, 0), rows=rows, uniform=uniform)
        for i, (prompt, limit) in enumerate(zip(PROMPTS, limits)):
            alone = generate(model, [prompt], limit, ends(5, 0), uniform=uniform[i:i + 1])
            assert out.ids[i, :out.lengths[i]].tolist() == alone.ids[0].tolist()
            assert out.mask[i].sum() == alone.mask.sum() <= limit and out.ended[i] == alone.ended[0]
    assert out.ended.any() and not out.ended.all()
    with pytest.raises(UserError, match="a prompt of 7 tokens and 14 new ones don't fit"):
        generate(model, PROMPTS, [14] * len(PROMPTS), ends(5, 0))


class Countdown(GPT):
    """After token n it says n - 1, down to 0, the end token.

    passes: (whether over prompts, ids) of each pass of its trunk.
    """

    def __init__(self):
        super().__init__(GPTConfig(64, 64, 1, 1, 1, 64, tied=False))
        with torch.no_grad():
            for p in self.transformer.h.parameters():
                p.zero_()  # the block adds nothing
            self.transformer.wpe.weight.zero_()
            self.transformer.wte.weight.copy_(torch.eye(64))
            self.lm_head.weight.copy_(1e4 * torch.eye(64).roll(1, 1))  # token n - 1 looks at n
            self.lm_head.weight[0, 0] = 1e4
        self.passes = []
        self.transformer.register_forward_pre_hook(lambda _, args: self.passes.append(
            (args[1].positions is None, args[0].tolist())))

    def decoded(self):
        """The tokens that went into each step of decoding, one per row; a row that is done says 0."""
        return [[n for n, in ids] for prompts, ids in self.passes if not prompts]


STARTS = [(1,), (1, 1, 1), (9,), (8, 20), (1, 2, 3, 8, 9, 20), (20, 3, 8, 2, 1, 1, 2, 30, 7, 4), (5, 5, 5, 5)]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(),
                            reason="no GPU, where generate asks less often who has ended")


@pytest.mark.case(23)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_ids_mask_lengths_and_ended_where_the_answer_is_known(device):
    for limit, starts in itertools.product([1, 3, 8, 11], STARTS):
        model = Countdown().to(device)
        prompts = [[50 + i] * (i * 3 % 5) + [n] for i, n in enumerate(starts)]
        out = generate(model, prompts, limit, ends(0, 63))
        # The end token comes n-th, unless the limit is first.
        replies = [list(range(n - 1, -1, -1))[:limit] for n in starts]
        longest = max(len(p) + len(r) for p, r in zip(prompts, replies))
        rest = [longest - len(p) - len(r) for p, r in zip(prompts, replies)]
        assert out.ids.tolist() == [p + r + [63] * n for p, r, n in zip(prompts, replies, rest)]
        expected = [[0] * len(p) + [1] * len(r) + [0] * n for p, r, n in zip(prompts, replies, rest)]
        assert out.mask.tolist() == expected
        assert out.lengths.tolist() == [len(p) + len(r) for p, r in zip(prompts, replies)]
        assert out.ended.tolist() == [n <= limit for n in starts]
        if device == "cpu":
            steps = model.decoded()
            assert len(steps) == max(map(len, replies))  # stops with the last row
            # Rows that are done leave the batch when they are a quarter of it.
            for step, rows in enumerate(steps):
                assert 3 * len(rows) < 4 * sum(len(reply) > step for reply in replies)


@pytest.mark.parametrize("options", DIALECTS)
def test_replies_are_the_same_however_few_rows_are_decoded_at_once(options):
    number, model = 10, tiny(vocab_size=12, seed=3, **options)
    prompts = [*PROMPTS, [1], [5, 9, 2, 6, 5, 3, 5], [4], [1], [2, 3]]
    slow = {tuple(prompt): slow_greedy(model, prompt, number) for prompt in prompts}
    eos = max(range(12), key=lambda token: len({len(until_end(tokens, token)) for tokens in slow.values()}))
    expected = [until_end(slow[tuple(prompt)], eos) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) >= 4
    together = generate(model, prompts, number, ends(eos, 0), temperature=0)
    for rows in (1, 2, 3, 4, 5, 8, 12, 13, 99):
        out = generate(model, prompts, number, ends(eos, 0), temperature=0, rows=rows)
        assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == expected
        assert all(torch.equal(x, y) for x, y in zip(out, together))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 10, 40])
def test_a_waiting_prompt_takes_the_place_of_a_reply_that_is_done_and_nothing_is_decoded_after_the_last(
        rows, device):
    starts = torch.randint(1, 20, (30,), generator=torch.Generator().manual_seed(rows)).tolist()
    model = Countdown().to(device)
    # No two are equal.
    prompts = [[20 + i] * (i % 4 + 1) + [n] for i, n in enumerate(starts)]
    out = generate(model, prompts, 20, ends(0, 63), rows=rows)
    expected = [list(range(n - 1, -1, -1)) for n in starts]
    assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == expected
    assert out.ended.all() and out.lengths.tolist() == [i % 4 + 2 + n for i, n in enumerate(starts)]
    if device == "cpu":
        admitted, waiting = 0, []  # of each step: how many prompts wait
        for prompts, ids in model.passes:
            if prompts:
                admitted += len(ids)
            else:
                waiting.append(30 - admitted)
        steps = model.decoded()
        for step, left in zip(steps, waiting):
            assert len(step) == min(rows, 30) if left else len(step) <= rows
            assert 4 * step.count(0) < len(step)  # those that are done and still there
        assert admitted == 30 and sum(n > 0 for step in steps for n in step) == sum(starts)


def test_equal_prompts_are_passed_over_once_and_get_samples_of_their_own():
    model = Countdown()
    out = generate(model, [[9], [50, 4], [9], [9], [50, 4], [3]], 12, ends(0, 63))
    expected = [list(range(n - 1, -1, -1)) for n in (9, 4, 9, 9, 4, 3)]
    assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == expected
    over_prompts = [ids for prompts, ids in model.passes if prompts]
    assert over_prompts == [[[9, 63], [50, 4], [3, 63]]]
    model = tiny()
    generator = torch.Generator().manual_seed(0)
    out = generate(model, [[3, 1, 4]] * 8 + [[2]] * 8, 6, ends(VOCAB, 0), generator=generator, rows=5)
    replies = [tuple(ids[mask].tolist()) for ids, mask in zip(out.ids, out.mask)]
    assert len(set(replies[:8])) == 8 and len(set(replies[8:])) == 8


@pytest.mark.case(23)
@pytest.mark.parametrize("stops", [(0,), (3, 0), (0, 3), (1, 5, 3)])
def test_a_reply_ends_with_whichever_of_the_stops_comes_first(stops):
    tokenizer = SimpleNamespace(eos=stops[0], stops=stops, pad=63)
    out = generate(Countdown(), [[9], [50, 4], [20]], 18, tokenizer)
    replies = [list(range(n - 1, max(stop for stop in stops if stop < n) - 1, -1))[:18] for n in (9, 4, 20)]
    assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == replies
    assert out.ended.tolist() == [reply[-1] in stops for reply in replies]


class Decoded:
    """While it lasts, remembers the log-probabilities (n, V) that tokens are drawn from, one per step."""

    def __init__(self, patch):
        self.steps = []
        patch.setattr(generate_file, "sample_token", self.sample)

    def sample(self, logits, *options):
        self.steps.append(logits.log_softmax(-1))
        return sample_token(logits, *options)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.35)])
@pytest.mark.parametrize("options", [{}, LLAMA, OPT, NORM_AFTER])
def test_decoding_computes_the_log_probabilities_of_training(monkeypatch, options, dtype, bound):
    """At every token of the vocabulary, along sampled replies.

    Measured: up to 9e-6 apart, in bfloat16 0.12, a third of the bound.
    """
    model, number = tiny(seed=5, block_size=64, n_layer=3, **options), 40
    with monkeypatch.context() as patch, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        decoded = Decoded(patch)
        out = generate(model, PROMPTS, number, ends(VOCAB, 0), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            full = model.logits(model.transformer(out.ids)).float().log_softmax(-1)  # (B, T, V)
    assert len(decoded.steps) == number
    found = torch.stack(decoded.steps, 1)  # (B, number, V)
    for b, prompt in enumerate(PROMPTS):
        assert (found[b] - full[b, len(prompt) - 1:len(prompt) - 1 + number]).abs().max() < bound


@pytest.mark.parametrize("options", [{}, LLAMA, NORM_AFTER])
@pytest.mark.parametrize("reduced", [False, True])
def test_decoding_with_adapters_is_decoding_with_the_merged_weights(options, reduced):
    merged = tiny(seed=2, **options)
    model = tiny(seed=2, **options)
    model_file.add_lora(model, 4, 8, 0.1, "all")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p += 0.3 * torch.randn_like(p)
    plain = [generate(network, PROMPTS, 12, ends(VOCAB, 0), temperature=0).ids for network in (merged, model)]
    merged.load_state_dict(model_file.merged_weights(model))
    with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
        a, b = (generate(network, PROMPTS, 12, ends(VOCAB, 0), temperature=0, rows=3).ids
                for network in (merged, model))
    assert torch.equal(a, b) and not torch.equal(*plain)
    if not reduced:
        assert [ids[len(p):len(p) + 12].tolist() for ids, p in zip(b, PROMPTS)] == [
            slow_greedy(model, p, 12) for p in PROMPTS
        ]


@pytest.mark.parametrize("lora", [False, True])
def test_generation_leaves_the_model_as_it_was_even_when_it_fails(monkeypatch, batch, lora):
    model = tiny()
    if lora:
        model_file.add_lora(model, 2, 4, 0.0, "attention")
    before, weights = model(*batch)[0], {name: t.clone() for name, t in model.state_dict().items()}
    inside = []

    def fail(*_):
        inside.extend("forward" in vars(module)
                      for module in model.transformer.modules()
                      if isinstance(module, torch.nn.Linear))
        raise KeyboardInterrupt

    generate(model, PROMPTS, 4, ends(VOCAB, 0))
    monkeypatch.setattr(generate_file, "sample_token", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS, 4, ends(VOCAB, 0))
    assert len(inside) == 8 and all(inside)
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(*batch)[0], before)


def test_texts_are_the_responses_without_control_tokens(tokenizer):
    out = SimpleNamespace(ids=torch.tensor([[259, 65, 260, 66, 67, 256], [65, 260, 256, 257, 257, 257]]),
                          mask=torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]]).bool())
    assert Generation.texts(out, tokenizer) == ["BC", ""]


@pytest.mark.parametrize("training", [True, False])
def test_generation_runs_without_dropout_and_restores_the_mode(training):
    model = tiny(dropout=0.5).train(training)
    end = ends(256, 257)
    out = generate(model, [[1, 2, 3]], 8, end, temperature=0)
    assert model.training == training and all(m.training == training for m in model.modules())
    assert until_end(slow_greedy(model.eval(), [1, 2, 3], 8), 256) == out.ids[0, 3:].tolist()


def test_generation_fills_the_context_to_the_last_place_and_refuses_one_more():
    model, end = tiny(), ends(VOCAB, 0)
    out = generate(model, [[1] * 20, [2]], 12, end, temperature=0)
    assert out.lengths.tolist() == [32, 13]
    with pytest.raises(UserError, match="20 tokens and 13 new ones don't fit .* 32"):
        generate(model, [[1] * 20, [2]], 13, end)


def test_greedy_under_bf16_autocast_equals_full_passes_under_autocast():
    model, number = tiny(seed=1), 8
    with torch.autocast("cpu", torch.bfloat16):
        out = generate(model, PROMPTS, number, ends(VOCAB, 0), temperature=0)
        slow = [slow_greedy(model, prompt, number) for prompt in PROMPTS]
    same = [out.ids[b, len(p):len(p) + number].tolist() == slow[b] for b, p in enumerate(PROMPTS)]
    assert sum(same) >= len(PROMPTS) - 2  # near ties may fall either way


# -- samples

@pytest.mark.parametrize("rows", [0, 300])
def test_samples_of_rows_that_wait_follow_the_model_too(rows):
    """As below: minus the mean log-probability of samples is their mean entropy, whichever row they came
    from."""
    model, n, generator = tiny(vocab_size=12), 2000, torch.Generator().manual_seed(0)
    prompts = [[3, 1, 4], [2], [5, 6]] * (n // 3)
    out = generate(model, prompts, 6, ends(7, 0), generator=generator, rows=rows)
    with torch.no_grad():
        logprobs, entropy = model(out.ids, out.mask, with_entropy=True)
    difference = (logprobs + entropy)[out.mask]
    assert len(set(out.lengths.tolist())) >= 6
    assert difference.mean().abs() < 4 * difference.std() / math.sqrt(len(difference))


def test_a_seed_repeats_the_sample_and_another_seed_does_not():
    model, end = tiny(), ends(256, 257)
    a, b, c = (generate(model, PROMPTS, 12, end, generator=torch.Generator().manual_seed(seed)).ids
               for seed in (1, 1, 2))
    assert torch.equal(a, b) and a.tolist() != c.tolist()


def slow_samples(model, prompts, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """What the uniform numbers (B, tokens, 2) draw, each reply alone, without a cache; no token ends it."""
    replies = []
    for prompt, numbers in zip(prompts, uniform):
        ids = list(prompt)
        for number in numbers:
            with torch.no_grad():
                logits = model.logits(model.transformer(torch.tensor([ids])))[:, -1]
            ids.append(int(sample_token(logits, temperature, top_k, top_p, number[None])))
        replies.append(ids[len(prompt):])
    return replies


@pytest.mark.case(24)
@pytest.mark.parametrize("options, sampling", [
    *[(options, {}) for options in DIALECTS],
    ({}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}),
])
def test_a_reply_depends_on_its_prompt_and_its_own_uniform_numbers_alone(options, sampling):
    """Not on what else is in the batch, in which order, on how many rows are decoded at once, on a cache, or
    on when those before it end."""
    number, model = 10, tiny(vocab_size=12, seed=3, **options)
    prompts = [*PROMPTS, [1], [3, 1, 4]]  # two of them twice
    uniform = uniforms(len(prompts), number, torch.Generator().manual_seed(4), CPU)
    slow = slow_samples(model, prompts, uniform, **sampling)
    eos = max(range(12), key=lambda token: len({len(until_end(tokens, token)) for tokens in slow}))
    expected = [until_end(tokens, eos) for tokens in slow]
    assert len({len(reply) for reply in expected}) >= 4 and slow[1] != slow[8] and slow[0] != slow[9]
    for order in (range(10), range(9, -1, -1), [3], [8, 1], [4, 0, 9, 7, 2]):
        for rows in (0, 1, 2, 3):
            order = list(order)
            chosen = [prompts[i] for i in order]
            out = generate(model, chosen, number, ends(eos, 0), rows=rows, uniform=uniform[order], **sampling)
            wanted = [expected[i] for i in order]
            assert [ids[mask].tolist() for ids, mask in zip(out.ids, out.mask)] == wanted


def test_a_generator_stands_for_the_uniform_numbers_that_it_draws():
    model, uniform = tiny(vocab_size=12), uniforms(len(PROMPTS), 9, torch.Generator().manual_seed(6), CPU)
    drawn, given = (generate(model, PROMPTS, 9, ends(7, 0), **how).ids
                    for how in ({"generator": torch.Generator().manual_seed(6)}, {"uniform": uniform}))
    assert torch.equal(drawn, given)


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_generation_leaves_it_at_the_tokens_that_are_there_when_it_is_interrupted(rows, tokens):
    model, asked = tiny(vocab_size=12), []

    def interrupted():
        asked.append(1)
        return len(asked) > tokens

    def replies(ask):
        generator = torch.Generator().manual_seed(0)
        return generate(model, PROMPTS, 12, ends(12, 0), generator=generator, rows=rows, interrupted=ask)

    whole, cut = replies(lambda: False), replies(interrupted)
    assert len(asked) == tokens + 1 and not cut.ended.any() and cut.lengths.max() == cut.ids.shape[1]
    for b, prompt in enumerate(PROMPTS):  # a row for each, or the first ones alone have one
        reply = cut.ids[b][cut.mask[b]].tolist()
        assert reply == whole.ids[b][whole.mask[b]].tolist()[:tokens if rows == 0 or b < rows else 0]
        assert cut.lengths[b] == len(prompt) + len(reply)


@pytest.mark.parametrize("options, temperature", [({}, 1.0), ({"temperature": 0.7}, 0.7)])
def test_samples_follow_the_model_at_the_temperature_that_they_are_scored_at(options, temperature):
    """At every step the mean log-probability that GPT.forward gives to samples is minus the mean entropy."""
    model, n, generator = tiny(vocab_size=12), 4000, torch.Generator().manual_seed(0)
    out = generate(model, [[3, 1, 4]] * n, 3, ends(12, 0), generator=generator, **options)
    with torch.no_grad():
        logprobs, entropy = model(out.ids, out.mask, temperature, with_entropy=True)
        elsewhere, _ = model(out.ids, out.mask, 1.7 - temperature)
    difference = (logprobs + entropy)[:, 3:]  # (n, 3), of mean zero
    assert (difference.mean(0).abs() < 4 * difference.std(0) / math.sqrt(n)).all()
    assert ((elsewhere + entropy)[:, 3:].mean(0).abs() > 0.05).any()


def sample(logits, temperature, top_k, top_p, generator):
    """Tokens (B,) for logits (B, V), with numbers of a generator."""
    return sample_token(logits, temperature, top_k, top_p, uniforms(1, len(logits), generator, CPU)[0])


def truncated(probs, top_k, top_p):
    """Slow: walk down the tokens in order of probability, stop after top_k or once what remains of them has
    top_p."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[:top_k or None]
    total, kept, reached = sum(probs[i] for i in order), [], 0.0
    for i in order:
        if reached < top_p:
            kept.append(i)
            reached += probs[i] / total
    kept, total = set(kept), sum(probs[j] for j in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (1.7, 3, 1.0),
    (1.0, 0, 0.8),
    (0.8, 6, 0.7),
    (1.0, 50, 0.01),
])
def test_sample_frequencies_equal_the_truncated_softmax(temperature, top_k, top_p):
    n, logits = 20000, 1.5 * torch.randn(2, 12, generator=torch.Generator().manual_seed(4))
    tokens = sample(logits.repeat(n, 1), temperature, top_k, top_p,
                    torch.Generator().manual_seed(0)).view(n, 2)
    for column in (0, 1):
        weights = [math.exp(x / temperature) for x in logits[column].tolist()]
        expected = torch.tensor(truncated([w / sum(weights) for w in weights], top_k, top_p))
        found = tokens[:, column].bincount(minlength=12) / n
        assert (found[expected == 0] == 0).all()
        assert (found - expected).abs().sum() / 2 < 0.015
    assert torch.equal(sample_token(logits, 0, top_k, top_p, None), logits.argmax(-1))


def chi_square(counts, expected):
    """Pearson's statistic of counts against expected ones as a standard normal number (Wilson & Hilferty
    1931); cells below 5 in one."""
    few = expected < 5
    counts, expected = (torch.cat([x[~few], x[few].sum()[None]]).double() for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    k = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (((statistic / k) ** (1 / 3) - 1 + 2 / (9 * k)) / math.sqrt(2 / (9 * k))).item()


@pytest.mark.parametrize("vocabulary", [12, 256, 257, 1000])
@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.0, 9, 1.0),
    (1.3, 0, 0.9),
    (0.8, 200, 0.8),
])
def test_samples_pass_a_chi_square_test_in_one_group_of_tokens_and_in_several(
        vocabulary, temperature, top_k, top_p):
    n, generator = 40000, torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(vocabulary, generator=generator)
    tokens = torch.cat(
        [sample(logits.expand(n // 8, -1), temperature, top_k, top_p, generator) for _ in range(8)])
    probs = torch.tensor(truncated((logits.double() / temperature).softmax(-1).tolist(), top_k, top_p))
    counts = tokens.bincount(minlength=vocabulary)
    assert len(counts) == vocabulary and not counts[probs == 0].any()
    assert abs(chi_square(counts, n * probs)) < 3.5
    assert abs(chi_square(counts, n * (probs + probs.roll(1)) / 2)) > 10  # it would notice


def test_a_token_of_probability_zero_is_never_drawn():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        logits = torch.randn(10000, 1000, generator=generator)
        assert torch.equal(sample(logits, 1.0, 1, 1.0, generator), logits.argmax(-1))


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 1000])
def test_the_smallest_and_the_largest_random_number_draw_tokens_that_can_be_drawn(vocabulary):
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    allowed[1::2] = True
    logits = torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(0))
    logits = logits.masked_fill(~allowed, -math.inf)
    for number, token in ((0.0, 1), (1 - 2.0**-53, allowed.nonzero().max().item())):
        numbers = torch.full((50, 2), number, dtype=torch.double)
        assert sample_token(logits, 1.0, 0, 1.0, numbers).tolist() == [token] * 50


def test_a_draw_takes_the_group_from_one_number_and_the_token_in_it_from_the_other():
    """Where all of 1000 tokens are as likely, what the two numbers draw can be written down: three groups of
    256 and one of 232."""
    numbers = uniforms(1, 500, torch.Generator().manual_seed(7), CPU)[0]  # (500, 2)
    expected = [
        256 * group + int(b * min(256, 1000 - 256 * group))
        for a, b in numbers.tolist()
        for group in [int(a * 1000 / 256)]
    ]
    assert sample_token(torch.zeros(500, 1000), 1.0, 0, 1.0, numbers).tolist() == expected
    assert len(set(expected)) > 350


def test_the_uniform_numbers_are_uniform_repeat_by_seed_and_are_two_per_token():
    numbers = uniforms(50, 40, torch.Generator().manual_seed(1), CPU)
    assert numbers.shape == (50, 40, 2)
    assert numbers.dtype == torch.float64
    assert 0 <= numbers.min()
    assert numbers.max() < 1
    counts = (numbers * 20).long().flatten().bincount(minlength=20)
    assert abs(chi_square(counts, torch.full((20,), 200.0))) < 3.5
    assert torch.equal(numbers, uniforms(50, 40, torch.Generator().manual_seed(1), CPU))
    assert not torch.equal(numbers, uniforms(50, 40, torch.Generator().manual_seed(2), CPU))


def test_rows_of_a_sample_are_independent_and_so_are_group_and_token():
    """Two rows of equal logits: the pairs of their tokens are as frequent as the product says."""
    n, generator = 40000, torch.Generator().manual_seed(3)
    logits = torch.full((512,), -math.inf)
    logits[[3, 200, 300, 511]] = torch.tensor([0.0, 1.0, 0.5, -0.5])
    a, b = sample(logits.expand(2 * n, -1), 1.0, 0, 1.0, generator).view(n, 2).T
    counts = (512 * a + b).bincount(minlength=512 * 512)
    expected = n * torch.outer(*[logits.softmax(-1)] * 2).flatten()
    assert abs(chi_square(counts, expected)) < 3.5
