"""Rows in, batches out: token ids and masks, ranked pairs, token-budget batches."""
import itertools
import math
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch

from formats.rows import Row
from formats.sources import read_rows, split_by_prompt
from plumbing.flags import require
from plumbing.ranks import micro_batches


# ---------------------------------------------------------------------------------------------------------
# Dialogues. Our template: <|system|>text <|user|>text <|assistant|>reply<|endoftext|> <|user|>... (no spaces between)

def encode_prompt(tokenizer, messages):
    """Ids of a conversation that awaits the assistant. messages: [{role, content}]."""
    if tokenizer.roles:
        return encode_dialogue(tokenizer, messages)[0] + [tokenizer.roles["assistant"]]
    messages, hidden = tokenizer.template.hide(messages, tokenizer.special)
    return tokenizer.encode_pieces(tokenizer.template.prompt_pieces(messages), hidden)[0]


def encode_dialogue(tokenizer, messages, last_only=False):
    """Ids of a whole conversation, and a mask that is True on what the assistant says, end tokens included.

    last_only: True on the assistant's last turn alone. The ids begin with encode_prompt of the messages before that turn. Where
    a chat template writes earlier turns anew as the conversation goes on, the mask is that of last_only.
    """
    if tokenizer.roles:
        ids, mask = [], []
        for message in messages:
            answer = message["role"] == "assistant"
            content = tokenizer.encode(message["content"], "special") + [tokenizer.eos] * answer
            ids += [tokenizer.roles[message["role"]], *content]
            mask += [False, *[answer] * len(content)]
    else:
        messages, hidden = tokenizer.template.hide(messages, tokenizer.special)
        ids, mask = tokenizer.encode_pieces(tokenizer.template.dialogue_pieces(messages), hidden)
    if last_only and True in mask:
        start = len(mask) - mask[::-1].index(True)  # behind the last reply
        while start and mask[start - 1]:
            start -= 1
        mask = [m and i >= start for i, m in enumerate(mask)]
    return ids, mask


def encode_text(tokenizer, text):
    """Ids of plain text between document tokens, and a mask that is True on all but the first."""
    ids = [tokenizer.document, *tokenizer.encode(text, "special"), tokenizer.document]
    return ids, [False] + [True] * (len(ids) - 1)


def describe(tokenizer, ids, mask):
    """One example as text, the part that mask selects set in [[ ]]."""
    text = ""
    for inside, run in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        shown = tokenizer.show(*(i for i, _ in run))
        text += f"[[{shown}]]" if inside else shown
    return text

# ---------------------------------------------------------------------------------------------------------
# Rows to token ids and masks

class Example(NamedTuple):
    """A reply behind its prompt, ready to train on."""
    ids: list
    mask: list  # of bool, True on the tokens that count


class Group(NamedTuple):
    """A prompt's replies and what is known of their ranks."""
    row: Row
    examples: list  # of Example, one for each reply

    @property
    def longest(self):
        """Tokens of the longest reply with its prompt."""
        return max(len(example.ids) for example in self.examples)


def encode_group(tokenizer, row):
    """[Example] for every reply of a row: prompt and reply, mask True on the reply alone."""
    examples = []
    for reply in row.replies:
        talk = row.prompt + [{"role": "assistant", "content": reply}]
        examples.append(Example(*encode_dialogue(tokenizer, talk, last_only=True)))
    return examples


def encode_demonstration(tokenizer, row):
    """Example of a demonstration: mask True on every assistant turn of a conversation, on all of a plain text."""
    if not row.prompt:
        return Example(*encode_text(tokenizer, row.replies[0]))
    talk = row.prompt + [{"role": "assistant", "content": row.replies[0]}]
    return Example(*encode_dialogue(tokenizer, talk))


def encode_demonstrations(tokenizer, rows, limit, say=print):
    """[Example] of demonstrations, at most limit tokens each: longer conversations are dropped, plain texts cut.

    A piece after the first begins with the last token of the one before, unmasked, so that every token counts once.
    """
    examples = [encode_demonstration(tokenizer, row) for row in rows if row.prompt]
    if examples:
        examples = drop_long(examples, [len(example.ids) for example in examples], limit, say)
    texts = [encode_demonstration(tokenizer, row) for row in rows if not row.prompt]
    require(not texts or limit > 1, f"a context of {limit} tokens is too short for plain text")
    pieces = []
    for ids, mask in texts:
        for start in range(0, len(ids) - 1, limit - 1):
            pieces.append(Example(ids[start:start + limit], [False] + mask[start + 1:start + limit]))
    if len(pieces) > len(texts):
        say(f"cut {len(texts)} plain texts into {len(pieces)} pieces of at most {limit} tokens")
    return examples + pieces


def context_of(config, model):
    """Longest sequence that a run takes, tokens: --max-length, or all of the model's context."""
    return min(config.max_length or model.config.block_size, model.config.block_size)


def ranked_pairs(rows):
    """All pairs that the ranks of some rows decide, for their replies laid end to end.

    Returns better, worse (P,): positions of the replies; weight (P,): 1 / number of pairs of the row; margin (P,).
    Tied replies make no pair.
    """
    pairs, start = [], 0
    for row in rows:
        found = [(i, j) for i, a in enumerate(row.ranks) for j, b in enumerate(row.ranks) if a < b]
        pairs += [(start + i, start + j, 1 / len(found), row.margin) for i, j in found]
        start += len(row.ranks)
    better, worse, weight, margin = zip(*pairs)
    return torch.tensor(better), torch.tensor(worse), torch.tensor(weight), torch.tensor(margin)


def ranking_accuracy(values, rows):
    """Share of the ranked pairs of some rows that values (N,), for their replies laid end to end, order right; ties count half.

    Every row weighs the same. Returns (accuracy, lower and upper end of its 95 % interval). Rows of one prompt are
    no independent trials, so the interval is Wilson's (1927) for as many trials as would spread the mean as the
    prompts do (effective sample size; Korn and Graubard 1998): never more than there are pairs, so it doesn't
    collapse where all prompts agree.
    """
    better, worse, _, _ = (t.numpy() for t in ranked_pairs(rows))
    right = (values[better] > values[worse]) + 0.5 * (values[better] == values[worse])  # (P,)
    row_of_reply = np.repeat(np.arange(len(rows)), [len(row.replies) for row in rows])  # (N,)
    row_of_pair = row_of_reply[better]  # (P,)
    per_row = np.bincount(row_of_pair, right, len(rows)) / np.bincount(row_of_pair, minlength=len(rows))
    accuracy = per_row.mean()
    number = {}
    prompt_of_row = np.array([number.setdefault(row.text, len(number)) for row in rows])
    prompts = len(number)
    off = np.bincount(prompt_of_row, per_row - accuracy)  # (prompts,)
    variance = (off**2).sum() / len(rows) ** 2 * prompts / max(1, prompts - 1)  # of the mean
    trials = prompts if accuracy in (0, 1) or prompts == 1 else len(better)
    if variance > 0:
        trials = min(trials, accuracy * (1 - accuracy) / variance)
    return float(accuracy), *wilson(accuracy, trials)


def wilson(share, trials, z=1.96):
    """Ends of the interval that holds the probability behind a share of trials, 95 times of 100 (Wilson 1927)."""
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def drop_long(rows, lengths, limit, say=print):
    """Rows whose length (tokens) is at most limit, what the context leaves for them; says how many were dropped.

    UserError when none is left.
    """
    kept = [row for row, length in zip(rows, lengths) if length <= limit]
    if len(kept) < len(rows):
        say(f"dropped {len(rows) - len(kept)} of {len(rows)} rows: longer than the {limit} tokens that the context leaves for them (the longest has {max(lengths)})")
    require(kept, f"every row is longer than the {limit} tokens that the context leaves for it; use a model with a larger one (--block-size for scratch)")
    return kept


def preference_groups(config, tokenizer, limit, say):
    """(training, held-out) lists of Group from --data, --val-data and --val-fraction."""
    rows = read_rows(config.data, "preferences", say, config.part, config.skip_bad)
    if config.val_data:
        held_out = read_rows(config.val_data, "preferences", say)
    else:
        rows, held_out = split_by_prompt(rows, config.val_fraction, say)
    require(rows, f"--val-fraction {config.val_fraction} leaves nothing to train on")

    def encode(rows):
        groups = [Group(row, encode_group(tokenizer, row)) for row in rows]
        return drop_long(groups, [group.longest for group in groups], limit, say) if groups else []

    train, val = encode(rows), encode(held_out)
    shown = describe(tokenizer, *train[0].examples[0])
    say(f"{len(train)} prompts to train on and {len(val)} held out, for instance, the reply in [[ ]],\n{shown}")
    return train, val


# ---------------------------------------------------------------------------------------------------------
# Batches

WINDOW = 16  # batches' worth of examples that are sorted by length together


def token_batches(lengths, budget, seed, epoch, rows=None):
    """One epoch of batches: lists of example numbers, each example once, rows * longest <= budget tokens.

    lengths: tokens of each example, of its longest row where it has several; rows: how many it has (None: one).
    Examples of like length share a batch (sorted within windows of a random order), so little is padding. A pure
    function of its arguments: resuming needs the epoch and the batch's number, nothing more. An example longer
    than the budget makes a batch of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths, rows = np.asarray(lengths), np.ones(len(lengths), int) if rows is None else np.asarray(rows)
    order = rng.permutation(len(lengths))
    window = max(1, WINDOW * budget // int((lengths * rows).mean()))
    batches = []
    for start in range(0, len(order), window):
        part = order[start:start + window]
        batches += micro_batches(part[np.argsort(lengths[part], kind="stable")], lengths, budget, rows)
    return [batches[i] for i in rng.permutation(len(batches))]


def count_steps(config, lengths, rows=None):
    """--steps, or as many as there are batches in --epochs passes. lengths, rows: see `token_batches`."""
    batches = 0
    for epoch in range(config.epochs):
        batches += len(token_batches(lengths, config.batch_tokens, config.seed, epoch, rows))
    return batches or config.steps


def endless_batches(lengths, budget, seed, start=0, rows=None):
    """Batches of epoch after epoch, from batch number `start` on: what an optimiser step trains on depends on its number alone."""
    for epoch in itertools.count():
        batches = token_batches(lengths, budget, seed, epoch, rows)
        yield from batches[start:]
        start = max(0, start - len(batches))


def endless_order(n, seed, start=0):
    """Example numbers 0..n-1 in one random order after another, from place `start` on."""
    for epoch in itertools.count(start // n):
        yield from (int(i) for i in np.random.default_rng([seed, epoch]).permutation(n)[start % n:])
        start = 0


def pad_rows(rows, fill, device=None):
    """Lists of numbers -> (B, T) right-padded tensor on device, and lengths (B,) on the CPU."""
    lengths, pinned = torch.tensor([len(row) for row in rows]), device is not None and torch.device(device).type == "cuda"
    padded = torch.full((len(rows), int(lengths.max())), fill, pin_memory=pinned)  # pinned memory is copied while the CPU goes on
    for i, row in enumerate(rows):
        padded[i, :len(row)] = torch.as_tensor(row)
    return padded.to(device, non_blocking=True), lengths


def collate(examples, pad, device):
    """Examples [(ids, mask)] -> ids (B, T) on device, mask (B, T) bool and lengths (B,) on the CPU (see token_index)."""
    ids, lengths = pad_rows([ids for ids, _ in examples], pad, device)
    return ids, pad_rows([mask for _, mask in examples], False)[0], lengths


@torch.no_grad()
def per_example(run, model, examples, budget, pad, read):
    """A number of each example (N,), fp32, on the CPU, the same on every rank.

    read(ids, mask, lengths) -> (n,): from what `collate` makes of some examples. The model doesn't drop out meanwhile.
    """
    numbers = torch.zeros(len(examples), device=run.device)
    lengths = [len(example.ids) for example in examples]
    was_training = model.training
    model.eval()
    for piece, weight in run.passes(run.split(range(len(examples)), lengths, budget)):
        rows = torch.tensor(piece).to(run.device, non_blocking=True)
        with run.autocast():
            numbers[rows] += weight * read(*collate([examples[i] for i in piece], pad, run.device))
    model.train(was_training)
    return run.all_sum(numbers).cpu()
