"""Rows in, batches out: the formats people have, preference groups, token-budget batches.

One row type serves every stage: a prompt (a conversation that awaits an answer) and its replies, none for
prompts, one for a demonstration, K with ranks for preferences (a chosen/rejected pair is K = 2).
"""
import gzip
import hashlib
import itertools
import json
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from runtime import UserError, require
from tokenizer import describe, encode_prompt, encode_reply

# ---------------------------------------------------------------------------------------------------------
# Rows and the formats they come in

@dataclass
class Row:
    """A prompt and its replies. ranks: one number per reply, lower is better, equal is a tie; margin: see reward.py."""
    prompt: list  # [{"role": "system" | "user" | "assistant", "content": str}], the last one by the user
    replies: list = field(default_factory=list)  # of str
    ranks: list = field(default_factory=list)
    margin: float = 0.0
    gold: list = field(default_factory=list)  # true scores of the replies where somebody knows them (synthetic data)

    @property
    def text(self):
        """The prompt as one string: what it is known by, whatever its replies."""
        return "\n\n".join(message["content"] for message in self.prompt)


class BadRow(Exception):
    """A row that is dropped; its text is the reason."""


def parse_transcript(text):
    """An HH-RLHF transcript, turns after blank-line 'Human:' / 'Assistant:' -> (prompt messages, last reply)."""
    if not isinstance(text, str):
        raise TypeError("chosen or rejected is not a string")
    pieces = re.split(r"\n\n(Human|Assistant):", text)
    roles = ["user" if role == "Human" else "assistant" for role in pieces[1::2]]
    if pieces[0].strip() or not roles or roles[-1] != "assistant":
        raise BadRow("transcript doesn't end with the assistant")
    if roles != (["user", "assistant"] * len(roles))[:len(roles)]:
        raise BadRow("roles don't alternate")
    messages = [{"role": role, "content": content.strip()} for role, content in zip(roles, pieces[2::2])]
    return messages[:-1], messages[-1]["content"]


def parse_pair(row):
    """(prompt messages, chosen, rejected) of an HH-RLHF row."""
    (prompt, chosen), (other, rejected) = parse_transcript(row["chosen"]), parse_transcript(row["rejected"])
    if prompt != other:
        raise BadRow("prompts differ")
    return prompt, chosen, rejected


def recognise(row):
    """Name of a row's format, from its keys, or None."""
    keys = {key for key, value in row.items() if value is not None}
    pair = {"chosen", "rejected"} <= keys
    if {"prompt", "completions", "ranks"} <= keys:
        return "ranking"
    if keys & {"instruction", "prompt"}:
        return "pair" if pair else "instruction" if keys & {"output", "response"} else "prompt"
    return "transcripts" if pair else None


def parse(row, form, want):
    """A Row of kind want ('demonstrations', 'preferences', 'prompts') from a JSON object of a known format.

    Raises BadRow with the reason if it has to be dropped, KeyError or TypeError if it is not of this format.
    """
    if form == "transcripts":
        prompt, chosen, rejected = parse_pair(row)
        replies, ranks = [chosen, rejected], [0, 1]
    else:
        text = row["prompt"] if row.get("instruction") is None else row["instruction"]
        extra = row.get("input") or row.get("context") or ""
        if not (isinstance(text, str) and isinstance(extra, str)):
            raise TypeError("the prompt is not a string")
        prompt = [{"role": "user", "content": "\n\n".join(t.strip() for t in (text, extra) if t.strip())}]
        answer = next((row[k] for k in ("output", "response") if row.get(k) is not None), None)
        if form == "ranking":
            replies, ranks = row["completions"], row["ranks"]
            if not (isinstance(replies, list) and isinstance(ranks, list)):
                raise TypeError("completions and ranks are not lists")
            if len(replies) != len(ranks) or len(replies) < 2:
                raise BadRow("completions and ranks don't match, or fewer than two")
        elif want == "demonstrations" and answer is not None:
            replies, ranks = [answer], [0]
        elif form == "pair":
            replies, ranks = [row["chosen"], row["rejected"]], [0, 1]
        else:
            replies, ranks = [answer], [0]
    if want == "prompts":
        replies, ranks = [], []
    elif want == "demonstrations":
        replies, ranks = [replies[min(range(len(ranks)), key=ranks.__getitem__)]], [0]
    if not all(isinstance(reply, str) for reply in replies):
        raise TypeError("a reply is missing or not a string")
    margin, truth = row.get("margin", 0.0), row.get("gold") or []
    if not isinstance(truth, list) or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in [*ranks, *truth, margin]):
        raise TypeError("a rank, a gold score or the margin is not a finite number")
    replies = [reply.strip() for reply in replies]
    if not prompt or not prompt[-1]["content"]:
        raise BadRow("empty prompt")
    if not all(replies):
        raise BadRow("empty reply")
    if want == "preferences":
        if len(set(replies)) < len(replies) and len(replies) == 2:
            raise BadRow("chosen equals rejected")
        if len(set(ranks)) < 2:
            raise BadRow("all replies tied")
    if want != "preferences" or len(truth) != len(replies):
        truth = []
    return Row(prompt, replies, list(ranks), float(margin), truth)


def read_objects(path):
    """Yield (where, JSON object) of a .json array, .jsonl or .jsonl.gz file; UserError names file and line."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such file")
    require(path.name.endswith((".json", ".jsonl", ".jsonl.gz")), f"{path}: only .json, .jsonl and .jsonl.gz are read")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            text = f.read().decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8 text") from None
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{getattr(error, 'lineno', 1)} is not valid JSON: {getattr(error, 'msg', error)}") from None
        require(isinstance(rows, list), f"{path} holds no array of rows at its top")
        places = ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))
    else:
        def lines():
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    try:
                        yield f"{path}:{number}", json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{path}:{number} is not valid JSON: {error}") from None
        places = lines()
    for where, row in places:
        require(isinstance(row, dict), f"{where} is not a JSON object with named fields")
        yield where, row


def read_rows(path, want, say=print):
    """Rows of kind want ('demonstrations', 'preferences', 'prompts') from a file; says what it found and dropped."""
    rows, formats, dropped = [], Counter(), Counter()
    needed = {"demonstrations": "a prompt and a reply (output, response, chosen)", "preferences": "a prompt, chosen and rejected", "prompts": "a prompt"}
    for where, row in read_objects(path):
        form = recognise(row)
        keys = ", ".join(list(row)[:8])
        require(form and not (want == "preferences" and form in ("instruction", "prompt"))
                and not (want == "demonstrations" and form == "prompt"),
                f"{where} doesn't hold {needed[want]}; its fields are {keys or 'none'}")
        formats[form] += 1
        try:
            rows.append(parse(row, form, want))
        except BadRow as reason:
            dropped[str(reason)] += 1
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{where}: {error} (read as {form}; its fields are {keys})") from None
    say(f"{path}: {sum(formats.values())} rows ({', '.join(formats) or 'no format'}), {len(rows)} kept as {want}"
        + "".join(f"; dropped {n}: {reason}" for reason, n in dropped.items()))
    require(rows, f"{path} holds no usable row")
    return rows


def split_by_prompt(rows, fraction):
    """(training, held-out) rows: a prompt is held out by its hash, so the same prompt is never on both sides."""
    def held_out(row):
        return int.from_bytes(hashlib.sha256(row.text.encode("utf-8", "surrogatepass")).digest()[:4], "big") < fraction * 2**32
    return [r for r in rows if not held_out(r)], [r for r in rows if held_out(r)]


def encode_group(tokenizer, row):
    """[(ids, mask)] for every reply of a row: prompt and reply, mask True on the reply alone."""
    prompt = encode_prompt(tokenizer, row.prompt)
    replies = [encode_reply(tokenizer, reply) for reply in row.replies]
    return [(prompt + reply, [False] * len(prompt) + [True] * len(reply)) for reply in replies]


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
        import toy  # which builds on this file
        world = toy.World(config.seed)
        rows, heldout = world.preferences("train", 24000), world.preferences("heldout", 2000)
    else:
        rows, heldout = read_rows(config.data, "preferences", say), []
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
    """Lists of numbers -> (B, T) right-padded tensor and lengths (B,), on device."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.full((len(rows), int(lengths.max())), fill)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = torch.as_tensor(row)
    return padded.to(device, non_blocking=True), lengths.to(device, non_blocking=True)


def collate(examples, pad, device):
    """Examples [(ids, mask)] -> ids (B, T) on device, mask (B, T) bool on the CPU (see token_index), lengths (B,) on device."""
    ids, lengths = pad_rows([ids for ids, _ in examples], pad, device)
    return ids, pad_rows([mask for _, mask in examples], False)[0], lengths
