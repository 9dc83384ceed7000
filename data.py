"""Rows in, batches out: token ids and masks, ranked pairs, token-budget batches."""
import bisect
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
# Dialogues
#
# Our template, without the spaces: <|system|>text <|user|>text <|assistant|>reply<|endoftext|> <|user|>...

def encode_prompt(tokenizer, messages):
    """Ids of a conversation that awaits the assistant. messages: [{role, content}]."""
    if tokenizer.roles:
        ids, _ = encode_dialogue(tokenizer, messages)
        return ids + [tokenizer.roles["assistant"]]
    messages, hidden = tokenizer.template.hide(messages, tokenizer.special)
    pieces = tokenizer.template.prompt_pieces(messages)
    ids, _ = tokenizer.encode_pieces(pieces, hidden)
    return ids


def encode_dialogue(tokenizer, messages, last_only=False):
    """Ids of a whole conversation, and a mask that is True on what the assistant says, end tokens included.

    last_only: True on the assistant's last turn alone. The ids begin with encode_prompt of the messages
    before that turn. Where a chat template writes earlier turns anew as the conversation goes on, the mask is
    that of last_only.
    """
    if tokenizer.roles:
        ids, mask = by_roles(tokenizer, messages)
    else:
        messages, hidden = tokenizer.template.hide(messages, tokenizer.special)
        pieces = tokenizer.template.dialogue_pieces(messages)
        ids, mask = tokenizer.encode_pieces(pieces, hidden)
    if last_only:
        mask = last_turn(mask)
    return ids, mask


def by_roles(tokenizer, messages):
    """Ids and mask of a whole conversation in our template."""
    ids, mask = [], []
    for message in messages:
        answer = message["role"] == "assistant"
        content = tokenizer.encode(message["content"], "special")
        if answer:
            content = content + [tokenizer.eos]
        # The token of the role comes first; nobody learns to say it.
        ids.append(tokenizer.roles[message["role"]])
        mask.append(False)
        ids.extend(content)
        mask.extend([answer] * len(content))
    return ids, mask


def next_turn(tokenizer, messages):
    """Ids to put behind a sampled reply, its end token included, so that the assistant may go on.

    messages: the conversation, whose last turn, the user's or a tool's, follows that reply. What was sampled
    keeps its ids: encoded from its text it might be other tokens. UserError if the chat template writes
    earlier turns anew as the conversation goes on.
    """
    if tokenizer.roles:
        return encode_prompt(tokenizer, messages[-1:])
    messages, hidden = tokenizer.template.hide(messages, tokenizer.special)
    pieces = tokenizer.template.prompt_pieces(messages)
    require(len(pieces) > 1,
            f"{tokenizer.folder}: its chat template writes earlier turns anew as the conversation goes on, "
            "so the policy can't be trained over several turns (--tool)")
    ids, mask = tokenizer.encode_pieces(pieces, hidden)
    behind = len(mask) - mask[::-1].index(True)  # behind the last reply
    return ids[behind:]


def last_turn(mask):
    """The mask without any True before its last run of them."""
    if True not in mask:
        return mask
    start = len(mask) - mask[::-1].index(True)  # behind the last reply
    while start and mask[start - 1]:
        start -= 1
    return [False] * start + mask[start:]


def encode_text(tokenizer, text):
    """Ids of plain text between document tokens, and a mask that is True on all but the first."""
    ids = [tokenizer.document, *tokenizer.encode(text, "special"), tokenizer.document]
    mask = [False] + [True] * (len(ids) - 1)
    return ids, mask


def describe(tokenizer, ids, mask):
    """One example as text, the part that mask selects set in [[ ]]."""
    text = ""
    for inside, run in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        part = [i for i, _ in run]
        shown = tokenizer.show(*part)
        if inside:
            shown = f"[[{shown}]]"
        text += shown
    return text


# ---------------------------------------------------------------------------------------------------------
# Rows to token ids and masks

class Example(NamedTuple):
    """A reply behind its prompt, ready to train on."""
    ids: list
    # Of bool, True on the tokens that count.
    mask: list


class Group(NamedTuple):
    """A prompt's replies and what is known of their ranks."""
    row: Row
    # Of Example, one for each reply.
    examples: list

    @property
    def longest(self):
        """Tokens of the longest reply with its prompt."""
        return max(len(example.ids) for example in self.examples)


def with_reply(row, reply):
    """The conversation of a row, answered."""
    return row.prompt + [{"role": "assistant", "content": reply}]


def encode_group(tokenizer, row):
    """[Example] for every reply of a row: prompt and reply, mask True on the reply alone."""
    examples = []
    for reply in row.replies:
        talk = with_reply(row, reply)
        ids, mask = encode_dialogue(tokenizer, talk, last_only=True)
        examples.append(Example(ids, mask))
    return examples


def end_to_end(groups):
    """[Example] of some groups [[Example]]."""
    examples = []
    for group in groups:
        examples += group
    return examples


# Steps of a reply, for process rewards. A step ends with the token that holds the last character of the
# separator behind it, and the reply's last step with the reply's last token, its end token if it has one. A
# token may hold the start of the next step as well ("; " where the separator is ";"): it ends a step all the
# same, and what is read there has seen that much of the next.

def step_offsets(text, separator):
    """Where the steps of a text end that others follow: the offsets behind their separators.

    A part of nothing but blanks is no step, and the last step goes on to the text's end.
    """
    parts = text.split(separator)
    filled = [number for number, part in enumerate(parts) if part.strip()]
    ends = list(itertools.accumulate(len(part) + len(separator) for part in parts))
    return [ends[number] for number in filled[:-1]]


def tokens_that_hold(tokenizer, ids, text, offsets):
    """Numbers of the tokens that hold the last character before each offset of the text that ids say.

    It is the first token with which what has been said begins with that part of the text. None if the ids say
    another text.
    """
    if not tokenizer.decode(ids).startswith(text[:max(offsets, default=0)]):
        return None
    numbers = []
    for offset in offsets:
        def said(count):
            return tokenizer.decode(ids[:count + 1]).startswith(text[:offset])
        numbers.append(bisect.bisect_left(range(len(ids)), True, key=said))
    return numbers


def step_ends(tokenizer, ids, separator):
    """Numbers of the tokens of a reply, its end token among them, with which its steps end.

    They ascend, and the last is the reply's last token, whether it ended or was cut off. [] for no tokens.
    """
    if not ids:
        return []
    text = tokenizer.decode(ids)
    numbers = tokens_that_hold(tokenizer, ids, text, step_offsets(text, separator))
    # Two steps may end in one token.
    return sorted({*numbers, len(ids) - 1})


def encode_demonstration(tokenizer, row):
    """Example of a demonstration: mask True on every assistant turn, or on all of a plain text."""
    if not row.prompt:
        ids, mask = encode_text(tokenizer, row.replies[0])
    else:
        ids, mask = encode_dialogue(tokenizer, with_reply(row, row.replies[0]))
    return Example(ids, mask)


def encode_demonstrations(tokenizer, rows, limit, say=print):
    """[Example] of demonstrations, at most limit tokens each.

    Longer conversations are dropped, longer plain texts cut.
    """
    examples = [encode_demonstration(tokenizer, row) for row in rows if row.prompt]
    if examples:
        lengths = [len(example.ids) for example in examples]
        examples = drop_long(examples, lengths, limit, say)
    texts = [encode_demonstration(tokenizer, row) for row in rows if not row.prompt]
    require(not texts or limit > 1, f"a context of {limit} tokens is too short for plain text")
    pieces = []
    for text in texts:
        pieces += cut_text(text, limit)
    if len(pieces) > len(texts):
        say(f"cut {len(texts)} plain texts into {len(pieces)} pieces of at most {limit} tokens")
    return examples + pieces


def cut_text(text, limit):
    """The Example of a plain text in pieces of at most limit tokens.

    A piece after the first begins with the last token of the one before, unmasked, so that every token counts
    once.
    """
    pieces = []
    for start in range(0, len(text.ids) - 1, limit - 1):
        ids = text.ids[start:start + limit]
        mask = [False] + text.mask[start + 1:start + limit]
        pieces.append(Example(ids, mask))
    return pieces


def context_of(config, model):
    """Longest sequence that a run takes, tokens: --max-length, or all of the model's context."""
    context = model.config.block_size
    return min(config.max_length or context, context)


def decided_pairs(ranks):
    """[(better, worse)]: positions of all pairs that these ranks decide. Tied ones make no pair."""
    pairs = []
    for i, a in enumerate(ranks):
        for j, b in enumerate(ranks):
            if a < b:
                pairs.append((i, j))
    return pairs


def tied_pairs(ranks):
    """[(i, j)]: positions of all pairs of equal rank, each once."""
    places = range(len(ranks))
    return [(i, j) for i in places for j in places if i < j and ranks[i] == ranks[j]]


def ranked_pairs(rows):
    """All pairs that the ranks of some rows decide, for their replies laid end to end.

    Returns better, worse (P,): positions of the replies; weight (P,): 1 / number of pairs of the row;
    margin (P,). Tied replies make no pair.
    """
    pairs = []
    start = 0  # where the row's replies begin
    for row in rows:
        found = decided_pairs(row.ranks)
        for i, j in found:
            pairs.append((start + i, start + j, 1 / len(found), row.margin))
        start += len(row.ranks)
    better, worse, weight, margin = zip(*pairs)
    return torch.tensor(better), torch.tensor(worse), torch.tensor(weight), torch.tensor(margin)


def ratings_of(row):
    """The ratings of a row's replies that have no other aim; None for a reply without."""
    return [known.get("rating") for known in row.ratings]


def is_rated(row):
    """Whether any of a row's replies has a rating."""
    return any(x is not None for x in ratings_of(row))


def mean_and_deviation(groups):
    """Of all ratings in some groups [Group]: (0, 1) without any, and deviation 1 where all are the same."""
    numbers = [x for group in groups for x in ratings_of(group.row) if x is not None]
    if not numbers:
        return 0.0, 1.0
    return float(np.mean(numbers)), float(np.std(numbers)) or 1.0


def useless(row, config):
    """Why reward.py learns nothing from a row, "" if it does. config: its ties and ratings."""
    if row.verdict or (config.ratings == "regress" and is_rated(row)):
        return ""
    if len(row.replies) == 1:
        return "no second rating of the same prompt to compare with"
    if len(set(row.ranks)) == 1 and config.ties == "drop":
        return "all replies tied"
    return ""


class Targets(NamedTuple):
    """What reward.py learns from rows, whose replies lie end to end: tuples of tensors (P,), weights last.

    The weights of a row add up to 1, whatever it says. at, better, ...: positions of replies.
    """
    pairs: tuple  # better, worse, margin, right, weight
    ties: tuple  # one, other, weight: for Rao-Kupper alone, soft ties are pairs
    verdicts: tuple  # at, sign, weight
    ratings: tuple  # at, rating, weight
    best: tuple  # at, weight: the first in rank

    def times(self, numerator, denominator):
        """With all weights times a fraction."""
        return Targets(*((*rest, weight * numerator / denominator) for *rest, weight in self))

    def to(self, device):
        return Targets(*(tuple(t.to(device, non_blocking=True) for t in part) for part in self))


def targets_of(rows, config, standard=(0.0, 1.0)):
    """`Targets` of some rows, on the CPU.

    config: reward.py's ties, ratings, scale and scale_margin; standard: mean and deviation of all ratings.
    """
    found = Targets([], [], [], [], [])
    start = 0  # where the row's replies begin
    for row in rows:
        places = range(start, start + len(row.replies))
        start += len(row.replies)
        if row.verdict:
            sign = 1.0 if row.verdict == "both_good" else -1.0
            found.verdicts.extend((at, sign, 1 / len(places)) for at in places)
        elif config.ratings == "regress" and is_rated(row):
            known = [(at, x) for at, x in zip(places, ratings_of(row)) if x is not None]
            mean, deviation = standard
            found.ratings.extend((at, (x - mean) / deviation, 1 / len(known)) for at, x in known)
        else:
            add_ranking(found, row, places, config)
    kinds = ("iifff", "iif", "iff", "iff", "if")
    return Targets(*(as_columns(part, kind) for part, kind in zip(found, kinds)))


def add_ranking(found, row, places, config):
    """Put a row's pairs, ties and best replies into `Targets` of lists. places: positions of its replies."""
    decided = decided_pairs(row.ranks)
    tied = [] if config.ties == "drop" else tied_pairs(row.ranks)
    share = 1 / (len(decided) + len(tied))
    margin, right = row.margin, row.probability
    if row.strength is not None and config.scale == "margin":
        margin, right = margin + config.scale_margin * row.strength, 1.0
    found.pairs.extend((places[i], places[j], margin, right, share) for i, j in decided)
    if config.ties == "soft":
        found.pairs.extend((places[i], places[j], 0.0, 0.5, share) for i, j in tied)
    else:
        found.ties.extend((places[i], places[j], share) for i, j in tied)
    top = [at for at, rank in zip(places, row.ranks) if rank == min(row.ranks)]
    found.best.extend((at, 1 / len(top)) for at in top)


def as_columns(rows, kinds):
    """Tuples as a tensor for each place in them: kinds has i for integers, f for fp32."""
    dtypes = {"i": torch.int64, "f": torch.float32}
    columns = zip(*rows) if rows else [()] * len(kinds)
    return tuple(torch.tensor(column, dtype=dtypes[kind]) for column, kind in zip(columns, kinds))


def ranking_accuracy(values, rows):
    """Share of the ranked pairs of some rows that values (N,) order right, for their replies laid end to end.

    Ties count half, and every row weighs the same. Returns (accuracy, lower and upper end of its 95 %
    interval). Rows of one prompt are no independent trials, so the interval is Wilson's (1927) for as many
    trials as would spread the mean as the prompts do (effective sample size; Korn and Graubard 1998): never
    more than there are pairs, so it doesn't collapse where all prompts agree.
    """
    per_row, pairs = right_shares(values, rows)
    accuracy = per_row.mean()
    variance, prompts = variance_of_mean(per_row, rows)

    # One prompt, or prompts that are all right or all wrong, show no variance from which to count trials.
    trials = pairs
    if accuracy in (0, 1) or prompts == 1:
        trials = prompts
    if variance > 0:
        trials = min(trials, accuracy * (1 - accuracy) / variance)
    return float(accuracy), *wilson(accuracy, trials)


def right_shares(values, rows):
    """Share of each row's ranked pairs that values (N,) order right (rows,), ties half; how many pairs."""
    better, worse, _, _ = ranked_pairs(rows)
    better = better.numpy()  # (P,)
    worse = worse.numpy()  # (P,)
    above = values[better] > values[worse]
    tied = values[better] == values[worse]
    right = above + 0.5 * tied  # (P,)

    # From pairs to rows: the share of each row's pairs that are right.
    replies = [len(row.replies) for row in rows]
    row_of_reply = np.repeat(np.arange(len(rows)), replies)  # (N,)
    row_of_pair = row_of_reply[better]  # (P,)
    pairs_of_row = np.bincount(row_of_pair, minlength=len(rows))  # (rows,)
    return np.bincount(row_of_pair, right, len(rows)) / pairs_of_row, len(better)


def variance_of_mean(per_row, rows):
    """Variance of the mean of numbers (rows,) where prompts are drawn, not rows; and how many prompts.

    It comes from how far the rows of each prompt together lie off the mean.
    """
    number = {}
    prompt_of_row = []
    for row in rows:
        prompt_of_row.append(number.setdefault(row.text, len(number)))
    prompts = len(number)
    off = np.bincount(prompt_of_row, per_row - per_row.mean())  # (prompts,)
    spread = (off**2).sum() / len(rows) ** 2
    return spread * prompts / max(1, prompts - 1), prompts


def wilson(share, trials, z=1.96):
    """Ends of the interval that holds the probability behind a share of trials, 95 times of 100.

    Wilson 1927.
    """
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    root = math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    half = z / scale * root
    low = max(0.0, centre - half)
    high = min(1.0, centre + half)
    return float(low), float(high)


def drop_long(rows, lengths, limit, say=print):
    """Rows whose length (tokens) is at most limit, what the context leaves for them.

    Says how many were dropped. UserError when none is left.
    """
    kept = [row for row, length in zip(rows, lengths) if length <= limit]
    dropped = len(rows) - len(kept)
    if dropped:
        say(f"dropped {dropped} of {len(rows)} rows: longer than the {limit} tokens that the context leaves "
            f"for them (the longest has {max(lengths)})")
    require(kept, f"every row is longer than the {limit} tokens that the context leaves for it; use a model "
                  "with a larger one (--block-size for scratch)")
    return kept


def preference_groups(config, tokenizer, limit, say, want="preferences", useless=None):
    """(training, held-out) lists of Group from --data, --val-data and --val-fraction.

    want: "preferences" or "feedback"; useless: see `read_source`.
    """
    rows = read_rows(config.data, want, say, config.part, config.skip_bad, useless)
    if config.val_data:
        held_out = read_rows(config.val_data, want, say, useless=useless)
    else:
        rows, held_out = split_by_prompt(rows, config.val_fraction, say)
    require(rows, f"--val-fraction {config.val_fraction} leaves nothing to train on")
    train = encode_groups(tokenizer, rows, limit, say)
    val = encode_groups(tokenizer, held_out, limit, say)
    first = train[0].examples[0]
    shown = describe(tokenizer, first.ids, first.mask)
    say(f"{len(train)} prompts to train on and {len(val)} held out, for instance, the reply in [[ ]],\n"
        f"{shown}")
    return train, val


def encode_groups(tokenizer, rows, limit, say):
    """[Group] of preferences, without those that have a reply of more than limit tokens with its prompt."""
    if not rows:
        return []
    groups = []
    for row in rows:
        groups.append(Group(row, encode_group(tokenizer, row)))
    lengths = [group.longest for group in groups]
    return drop_long(groups, lengths, limit, say)


# ---------------------------------------------------------------------------------------------------------
# Batches

WINDOW = 16  # batches' worth of examples that are sorted by length together


def token_batches(lengths, budget, seed, epoch, rows=None):
    """One epoch of batches: lists of example numbers, each example once, rows * longest <= budget tokens.

    lengths: tokens of each example, of its longest row where it has several; rows: how many it has (None:
    one). Examples of like length share a batch (sorted within windows of a random order), so little is
    padding. A pure function of its arguments: resuming needs the epoch and the batch's number, nothing more.
    An example longer than the budget makes a batch of its own.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths = np.asarray(lengths)  # (N,)
    if rows is None:
        rows = np.ones(len(lengths), int)
    rows = np.asarray(rows)  # (N,)
    order = rng.permutation(len(lengths))
    tokens = int((lengths * rows).mean())  # of an example
    window = max(1, WINDOW * budget // tokens)  # examples
    batches = []
    for start in range(0, len(order), window):
        part = order[start:start + window]
        by_length = part[np.argsort(lengths[part], kind="stable")]
        batches += micro_batches(by_length, lengths, budget, rows)
    # Short and long batches take turns.
    shuffled = rng.permutation(len(batches))
    return [batches[i] for i in shuffled]


def count_steps(config, lengths, rows=None):
    """--steps, or as many as there are batches in --epochs passes. lengths, rows: see `token_batches`."""
    batches = 0
    for epoch in range(config.epochs):
        of_epoch = token_batches(lengths, config.batch_tokens, config.seed, epoch, rows)
        batches += len(of_epoch)
    return batches or config.steps


def endless_batches(lengths, budget, seed, start=0, rows=None):
    """Batches of epoch after epoch, from batch number `start` on.

    What an optimiser step trains on depends on its number alone.
    """
    for epoch in itertools.count():
        batches = token_batches(lengths, budget, seed, epoch, rows)
        yield from batches[start:]
        start = max(0, start - len(batches))


def endless_order(n, seed, start=0):
    """Example numbers 0..n-1 in one random order after another, from place `start` on."""
    for epoch in itertools.count(start // n):
        order = np.random.default_rng([seed, epoch]).permutation(n)
        for i in order[start % n:]:
            yield int(i)
        start = 0


def pad_rows(rows, fill, device=None):
    """Lists of numbers -> (B, T) right-padded tensor on device, and lengths (B,) on the CPU."""
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    longest = int(lengths.max())
    # Pinned memory is copied while the CPU goes on.
    pinned = device is not None and torch.device(device).type == "cuda"
    padded = torch.full((len(rows), longest), fill, pin_memory=pinned)  # (B, T)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = torch.as_tensor(row)
    return padded.to(device, non_blocking=True), lengths


def collate(examples, pad, device):
    """Examples [(ids, mask)] -> ids (B, T) on device, mask (B, T) bool and lengths (B,) on the CPU.

    The mask stays there for token_index.
    """
    all_ids = [ids for ids, _ in examples]
    all_masks = [mask for _, mask in examples]
    ids, lengths = pad_rows(all_ids, pad, device)
    mask, _ = pad_rows(all_masks, False)
    return ids, mask, lengths


@torch.no_grad()
def per_example(run, model, examples, budget, pad, read, width=()):
    """A number of each example (N,), fp32, on the CPU, the same on every rank.

    read(ids, mask, lengths) -> (n,): from what `collate` makes of some examples. The model doesn't drop out
    meanwhile. width: () or, of so many numbers of each, (width,), which gives (N, width) from (n, width).
    """
    numbers = torch.zeros(len(examples), *width, device=run.device)
    lengths = [len(example.ids) for example in examples]
    was_training = model.training
    model.eval()
    pieces = run.split(range(len(examples)), lengths, budget)
    for piece, weight in run.passes(pieces):
        part = [examples[i] for i in piece]
        rows = torch.tensor(piece).to(run.device, non_blocking=True)
        with run.autocast():
            ids, mask, lengths_of_part = collate(part, pad, run.device)
            # Weight 0 where the pass only keeps this rank in step with the others.
            numbers[rows] += weight * read(ids, mask, lengths_of_part)
    model.train(was_training)
    return run.all_sum(numbers).cpu()
