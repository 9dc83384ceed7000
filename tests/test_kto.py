"""kto.py: loss and KL point against slow ones, which pairs are mismatched, what a run makes of rows."""
import inspect
import json
import math

import pytest
import torch

import dpo
import kto
from data import Example, encode_group, encode_prompt
from examples import TOKENIZER, user
from formats.model_folder import load_model
from formats.rows import Row
from formats.sources import read_rows
from kto import Config, Labelled, kl_point, kto_loss, load_replies, mismatched, mismatched_pairs, say_balance
from model import GPT
from plumbing.flags import UserError
from tools import TORCHRUN, command, exit_code, reply_logprob, rows_of, run_here, write_rows

BETA = 0.7


def config_of(**changes):
    return Config(**{"beta": BETA, "good_weight": 1.5, "bad_weight": 0.8} | changes)


def loss_of(ratios, good, z, config, weight=None):
    weight = torch.full_like(ratios, 1 / len(ratios)) if weight is None else weight
    return kto_loss(ratios, torch.tensor(good), torch.as_tensor(z), weight, config)


# -- the loss

def test_the_loss_starts_at_half_the_mean_weight_with_a_slope_of_a_quarter_of_beta():
    ratios = torch.zeros(4, requires_grad=True)
    loss = loss_of(ratios, [True, False, True, True], 0.0, config_of(good_weight=1.0, bad_weight=1.0))
    assert loss.item() == 0.5
    loss.backward()
    quarter = BETA / 4 / 4
    assert ratios.grad.tolist() == pytest.approx([-quarter, quarter, -quarter, -quarter])
    weighted = loss_of(torch.zeros(4), [True, False, True, True], 0.0, config_of())
    assert weighted.item() == pytest.approx((3 * 1.5 + 0.8) / 4 / 2)


def test_the_loss_and_its_gradient_are_those_of_equation_8():
    """Mean of lambda_y - v(x, y), one reply at a time, in float64."""
    generator = torch.Generator().manual_seed(0)
    ratios = (3 * torch.randn(9, generator=generator, dtype=torch.float64)).requires_grad_()
    good, z, config = [True, False, False, True, True, False, True, False, False], 0.6, config_of()
    total = 0.0
    for ratio, is_good in zip(ratios, good):
        if is_good:
            total = total + 1.5 - 1.5 / (1 + torch.exp(-BETA * (ratio - z)))
        else:
            total = total + 0.8 - 0.8 / (1 + torch.exp(-BETA * (z - ratio)))
    expected, = torch.autograd.grad(total / 9, ratios)
    loss = loss_of(ratios, good, z, config)
    found, = torch.autograd.grad(loss, ratios)
    assert loss.item() == pytest.approx(total.item() / 9, rel=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_no_gradient_goes_through_the_kl_point():
    ratios, z = torch.ones(2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    loss_of(ratios, [True, False], z, config_of()).backward()
    assert z.grad is None and ratios.grad.abs().min() > 0


def test_the_kl_point_is_a_mean_of_at_least_0():
    assert kl_point(torch.tensor([1.0, 3.0, -1.0])).item() == 1
    assert kl_point(torch.tensor([1.0, -3.0])).item() == 0
    assert kl_point(torch.zeros(0)).item() == 0


def test_far_replies_give_finite_losses_and_no_nan():
    ratios = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0], requires_grad=True)
    loss = loss_of(ratios, [True, True, False, False, True], 300.0, config_of())
    loss.backward()
    assert loss.item() == pytest.approx((0 + 1.5 + 0.8 + 0 + 1.5) / 5)
    assert ratios.grad.isfinite().all()


# -- mismatched pairs

def labelled(*prompts, empty=()):
    """Replies [Labelled] to these prompts, of one token but for those that are empty."""
    replies = []
    for number, prompt in enumerate(prompts):
        mask = [False] * len(prompt) + [number not in empty]
        replies.append(Labelled(Row(prompt), Example([*range(len(mask))], mask), True))
    return replies


def test_each_prompt_gets_the_reply_before_it_of_another_prompt():
    """a and A are the same prompt; e has no reply worth a token."""
    replies = labelled("a", "b", "c")
    assert mismatched_pairs([0, 1, 2], replies) == [(0, 2), (1, 0), (2, 1)]
    assert mismatched_pairs([2, 0, 1], replies) == [(2, 1), (0, 2), (1, 0)]
    assert mismatched_pairs([1], replies) == []
    twice = labelled("a", "a", "b", "b", "c")
    assert mismatched_pairs([0, 1, 2, 3, 4], twice) == [(0, 4), (1, 4), (2, 1), (3, 1), (4, 3)]
    assert mismatched_pairs([0, 1], twice) == []
    silent = labelled("a", "b", "c", empty=(1,))
    assert mismatched_pairs([0, 1, 2], silent) == [(0, 2), (2, 0)]
    for number in (2, 3, 5, 8, 17):
        pairs = mismatched_pairs(list(range(number)), labelled(*map(str, range(number))))
        # Each prompt once and each reply once.
        assert sorted(i for i, _ in pairs) == sorted(j for _, j in pairs) == list(range(number))


def test_a_mismatched_pair_is_that_prompt_with_that_reply_cut_to_the_context():
    one = Row(user("Say so."), ["So it is."])
    two = Row(user("Say no, will you?"), ["No."])
    (asked,), (other,) = (encode_group(TOKENIZER, row) for row in (one, two))
    found = mismatched(asked, other, 1000)
    expected, = encode_group(TOKENIZER, Row(one.prompt, two.replies))
    assert found == expected
    start = len(encode_prompt(TOKENIZER, one.prompt))
    cut = mismatched(asked, other, start + 2)
    assert cut.ids == expected.ids[:start + 2] and cut.mask == [False] * start + [True] * 2


# -- rows

def test_labels_are_read_of_labelled_replies_pairs_and_the_ends_of_rankings(tmp_path):
    rows = [{"prompt": "Hi", "completion": "Ho.", "label": True},
            {"prompt": "Hi", "completion": "Go.", "label": False},
            {"prompt": "Hey", "chosen": "Ho.", "rejected": "No."},
            {"prompt": "He", "completions": ["a", "b", "c", "d"], "ranks": [3, 1, 2, 1]},
            {"prompt": "He", "completions": ["a", "b"], "ranks": [1, 1]}]
    said = []
    found = read_rows(write_rows(tmp_path / "rows.jsonl", rows), "labels", said.append)
    assert [(row.replies, row.ranks) for row in found] == [
        (["Ho."], [0]), (["Go."], [1]), (["Ho.", "No."], [0, 1]), (["a", "b", "d"], [1, 0, 0])]
    assert "all replies tied" in said[0]
    (tmp_path / "rows.csv").write_text("prompt,completion,label\nHi,Ho.,true\nHi,Go.,false\n")
    assert [row.ranks for row in read_rows(tmp_path / "rows.csv", "labels", str)] == [[0], [1]]
    replies, held_out = load_replies(
        Config(data=str(tmp_path / "rows.jsonl"), val_fraction=0.0), TOKENIZER, 64, str)
    assert [reply.good for reply in replies] == [True, False, True, False, False, True, True]
    assert held_out == []


@pytest.mark.parametrize("row, said", [
    ({"prompt": "Hi", "completion": "Ho.", "score": 3}, "a prompt and a reply with a label, true or false"),
    ({"prompt": "Hi", "completion": "Ho."}, "a prompt and a reply with a label, true or false"),
    ({"prompt": "Hi"}, "a prompt and a reply with a label, true or false"),
    ({"prompt": "Hi", "completion": 3, "label": True}, "a reply is missing or not a string")])
def test_rows_without_labels_are_refused_in_one_line(row, said, small, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    capsys.readouterr()
    assert exit_code("kto", f"--model {small}/sft --data {path} --out {tmp_path}/run") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_weights_of_good_and_bad_replies_are_compared():
    good, bad = (Labelled(Row([]), Example([], []), kind) for kind in (True, False))
    for replies, changes, said in (
            ([good, bad], {}, ""),
            ([good] * 3 + [bad] * 2, {}, ""),
            ([good] + [bad] * 3, {}, "weigh 0.333 times as much as bad ones; --good-weight 3 makes that 1"),
            ([good] + [bad] * 3, {"good_weight": 3.0}, ""),
            ([good] * 4 + [bad], {"bad_weight": 2.0}, "weigh 2 times as much as bad ones; --good-weight 0.5"),
            ([bad] * 2, {}, "all replies have the same label")):
        heard = []
        say_balance(replies, Config(**changes), heard.append)
        assert heard[0] == f"{replies.count(good)} good and {replies.count(bad)} bad replies"
        assert (said in heard[1]) if said else len(heard) == 1


def test_what_stands_in_dpo_too_is_the_same():
    for name in ("reply_logprobs", "open_reference"):
        assert inspect.getsource(getattr(kto, name)) == inspect.getsource(getattr(dpo, name))


# -- whole runs

@pytest.fixture
def rows(tmp_path):
    """Seven labelled replies, to six prompts."""
    talk = [("Say so.", "So.", True), ("Say so.", "It is sad.", False), ("Say please.", "No.", False),
            ("Say.", "It is good.", True), ("Go on, then.", "It is good, so it is.", True),
            ("And?", "I", False), ("Why?", "It is so.", True)]
    return write_rows(tmp_path / "rows.jsonl",
                      [dict(zip(("prompt", "completion", "label"), one)) for one in talk])


def test_loss_and_kl_point_of_a_step_are_those_of_replies_by_themselves(small, rows, tmp_path):
    """The batch of seven in passes of one or two; the mismatched pairs are found in kto.py's own order."""
    words = (f"--model {small}/other --reference {small}/sft --data {rows} --val-fraction 0 --steps 1 "
             f"--batch-tokens 10000 --threads 1 --beta {BETA} --good-weight 1.5 --bad-weight 0.8")
    run_here("kto", words, f"--micro-batch-tokens 40 --out {tmp_path}/run")
    found, = rows_of(tmp_path / "run")
    talk = [json.loads(line) for line in rows.read_text().splitlines()]
    policy, tokenizer = load_model(small / "other", GPT)
    reference, _ = load_model(small / "sft", GPT)

    @torch.no_grad()
    def ratio(prompt, reply):
        (ids, mask), = encode_group(tokenizer, Row(user(prompt), [reply]))
        tokens = torch.tensor(ids), torch.tensor(mask)
        return (reply_logprob(policy, *tokens) - reply_logprob(reference, *tokens)).item()

    order = batch_of(rows, tokenizer)
    mismatch = []
    for place, i in enumerate(order):
        before = next(order[place - back] for back in range(1, 7)
                      if talk[order[place - back]]["prompt"] != talk[i]["prompt"])
        mismatch.append(ratio(talk[i]["prompt"], talk[before]["completion"]))
    z = max(0, sum(mismatch) / 7)
    loss, good = 0.0, []
    for row in talk:
        r = ratio(row["prompt"], row["completion"])
        if row["label"]:
            loss += 1.5 * (1 - 1 / (1 + math.exp(-BETA * (r - z)))) / 7
            good.append(BETA * r)
        else:
            loss += 0.8 * (1 - 1 / (1 + math.exp(-BETA * (z - r)))) / 7
    assert z > 0.01 and found["kl"] == pytest.approx(z, rel=1e-4, abs=1e-5)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["good_reward"] == pytest.approx(sum(good) / 4, rel=1e-3, abs=1e-5)


def batch_of(path, tokenizer):
    """The numbers of a file's replies in the order of a step that takes all of them."""
    replies, _ = load_replies(Config(data=str(path), val_fraction=0.0), tokenizer, 64, str)
    costs = [len(reply.example.ids) for reply in replies]
    return next(kto.endless_batches(costs, 10000, 0))


def test_two_ranks_and_small_passes_have_the_kl_point_of_one(small, rows, tmp_path):
    """Seven replies: one rank has a pass less."""
    words = (f"--model {small}/other --reference {small}/sft --data {rows} --val-data {rows} --steps 1 "
             f"--batch-tokens 10000 --threads 1 --max-new-tokens 4")
    two = command("kto", words, f"--micro-batch-tokens 20 --out {tmp_path}/two", launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr[-2000:]
    for name, budget in (("one", 10000), ("many", 20)):
        run_here("kto", words, f"--micro-batch-tokens {budget} --out {tmp_path}/{name}")
    one, many, both = (rows_of(tmp_path / name) for name in ("one", "many", "two"))
    assert one[1]["kl"] > 0.01
    for other in (many, both):
        for key in ("kl", "loss", "good_reward", "bad_logprob"):
            assert other[1][key] == pytest.approx(one[1][key], rel=1e-6, abs=1e-6)
        for key in ("val_loss", "val_kl", "val_margin"):
            assert other[0][key] == pytest.approx(one[0][key], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("label, sign", [(True, 1), (False, -1)])
def test_good_replies_alone_become_likelier_and_bad_ones_alone_less_likely(label, sign, small, tmp_path,
                                                                            capsys):
    rows = [{"prompt": f"Say {word}.", "completion": "It is so.", "label": label} for word in ("a", "b", "c")]
    run_here("kto", f"--model {small}/sft --data {write_rows(tmp_path / 'rows.jsonl', rows)} --threads 1",
             f"--val-fraction 0 --steps 4 --lr 0.003 --warmup 1 --out {tmp_path}/run")
    assert "warning: all replies have the same label" in capsys.readouterr().out
    found = rows_of(tmp_path / "run")
    name = "good_logprob" if label else "bad_logprob"
    assert sign * (found[-1][name] - found[0][name]) > 0.1
    assert found[0]["loss"] == pytest.approx(0.5, abs=1e-5) and found[0]["kl"] == pytest.approx(0, abs=1e-4)


def test_a_reference_with_another_tokenizer_is_refused(small, rows, tmp_path):
    from bench.optimum import write_reference
    write_reference(tmp_path / "foreign", 2)
    with pytest.raises(UserError, match="foreign has another tokenizer than --model"):
        run_here("kto", f"--model {small}/sft --reference {tmp_path}/foreign --data {rows}",
                 f"--out {tmp_path}/run")
