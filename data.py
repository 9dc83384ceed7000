"""Rows in, batches out: token ids and masks, ranked pairs, token-budget batches."""
import itertools
import math

import numpy as np
import torch

from formats import read_rows, split_by_prompt
from flags import require
from tokenizer import describe, encode_dialogue, encode_text

# ---------------------------------------------------------------------------------------------------------
# Rows to token ids and masks

def encode_group(tokenizer, row):
    """[(ids, mask)] for every reply of a row: prompt and reply, mask True on the reply alone."""
    return [encode_dialogue(tokenizer, row.prompt + [{"role": "assistant", "content": reply}], last_only=True) for reply in row.replies]


def encode_demonstration(tokenizer, row):
    """(ids, mask) of a demonstration: mask True on every assistant turn of a conversation, on all of a plain text."""
    if not row.prompt:
        return encode_text(tokenizer, row.replies[0])
    return encode_dialogue(tokenizer, row.prompt + [{"role": "assistant", "content": row.replies[0]}])


def encode_demonstrations(tokenizer, rows, limit, say=print):
    """[(ids, mask)] of demonstrations, at most limit tokens each: longer conversations are dropped, plain texts cut.

    A piece after the first begins with the last token of the one before, unmasked, so that every token counts once.
    """
    examples = [encode_demonstration(tokenizer, row) for row in rows if row.prompt]
    if examples:
        examples = drop_long(examples, [len(ids) for ids, _ in examples], limit, say)
    texts = [encode_demonstration(tokenizer, row) for row in rows if not row.prompt]
    require(not texts or limit > 1, f"a context of {limit} tokens is too short for plain text")
    pieces = [(ids[i:i + limit], [False] + mask[i + 1:i + limit]) for ids, mask in texts for i in range(0, len(ids) - 1, limit - 1)]
    if len(pieces) > len(texts):
        say(f"cut {len(texts)} plain texts into {len(pieces)} pieces of at most {limit} tokens")
    return examples + pieces


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

    Returns (accuracy, half the width of its 95 % interval); every prompt weighs the same, and they are what the interval is over.
    """
    better, worse, weight, _ = (t.numpy() for t in ranked_pairs(rows))
    right = weight * ((values[better] > values[worse]) + 0.5 * (values[better] == values[worse]))
    prompt = np.repeat(np.arange(len(rows)), [len(row.replies) for row in rows])[better]  # (P,)
    per_prompt = np.bincount(prompt, right, len(rows))
    return float(per_prompt.mean()), float(1.96 * per_prompt.std() / math.sqrt(len(rows)))


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
    """(training, held-out) lists of (Row, [(ids, mask) of each reply]) from --data, --val-data and --val-fraction."""
    if config.data == "toy":
        require(not config.part, "--part is for files, not for the toy task")
        import toy  # which builds on this file
        world = toy.World(config.seed)
        rows, heldout = world.preferences("train", 24000), world.preferences("heldout", 2000)
    else:
        rows, heldout = read_rows(config.data, "preferences", say, config.part, config.skip_bad), []
    if config.val_data:
        heldout = read_rows(config.val_data, "preferences", say)
    elif config.data != "toy":
        rows, heldout = split_by_prompt(rows, config.val_fraction)

    def encode(rows):
        groups = [(row, encode_group(tokenizer, row)) for row in rows]
        return drop_long(groups, [max(len(ids) for ids, _ in group) for _, group in groups], limit, say) if rows else []

    train, val = encode(rows), encode(heldout)
    require(train, f"--val-fraction {config.val_fraction} leaves nothing to train on")
    ids, mask = train[0][1][0]
    say(f"{len(train)} prompts to train on and {len(val)} held out, for instance, the reply in [[ ]],\n{describe(tokenizer, ids, mask)}")
    return train, val


# ---------------------------------------------------------------------------------------------------------
# Batches

WINDOW = 16  # batches' worth of examples that are sorted by length together


def token_batches(lengths, budget, seed, epoch):
    """One epoch of batches: lists of example numbers, each example once, rows * longest <= budget tokens.

    Examples of like length share a batch (sorted within windows of a random order), so little is padding. A pure
    function of its arguments: resuming needs the epoch and the batch's number, nothing more. An example longer
    than the budget makes a batch of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths = np.asarray(lengths)
    order = rng.permutation(len(lengths))
    window = max(1, WINDOW * budget // int(lengths.mean()))
    batches = []
    for start in range(0, len(order), window):
        part = order[start:start + window]
        batches += micro_batches(part[np.argsort(lengths[part], kind="stable")], lengths, budget)
    return [batches[i] for i in rng.permutation(len(batches))]


def count_steps(config, lengths):
    """--steps, or as many batches as --epochs passes over examples of these lengths make."""
    return sum(len(token_batches(lengths, config.batch_tokens, config.seed, epoch)) for epoch in range(config.epochs)) or config.steps


def endless_batches(lengths, budget, seed, start=0):
    """Batches of epoch after epoch, from batch number `start` on: what an optimiser step trains on depends on its number alone."""
    for epoch in itertools.count():
        batches = token_batches(lengths, budget, seed, epoch)
        yield from batches[start:]
        start = max(0, start - len(batches))


def endless_order(n, seed, start=0):
    """Example numbers 0..n-1 in one random order after another, from place `start` on."""
    for epoch in itertools.count(start // n):
        yield from (int(i) for i in np.random.default_rng([seed, epoch]).permutation(n)[start % n:])
        start = 0


def micro_batches(examples, lengths, budget):
    """Cut examples, in their order, into pieces of at most budget padded tokens (at least one example each)."""
    pieces, longest = [], 0
    for i in examples:
        longest = max(longest, lengths[i])
        if not pieces or longest * (len(pieces[-1]) + 1) > budget:
            pieces.append([])
            longest = lengths[i]
        pieces[-1].append(int(i))
    return pieces


def by_length(examples, lengths, budget):
    """micro_batches of examples sorted by length: the least padding; no order of pieces can change a summed loss."""
    return micro_batches(sorted(examples, key=lambda i: (lengths[i], i)), lengths, budget)


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
