"""Replies of a policy to prompts: prompts of a file, sampling, and cutting replies into forward passes.

Shapes: B replies of this rank, T tokens of the longest, n replies of a pass, W tokens of the longest of them.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import collate, describe, drop_long, encode_prompt, next_turn, pad_rows, with_reply
from formats.rollouts import read_rollouts
from formats.rows import Row
from formats.sources import read_rows, split_by_prompt
from generate import Generation, generate, uniforms
from plumbing.flags import require
from plumbing.ranks import by_length, fill_up

# Flags that no training script has, and what to say to those who give them.
SAMPLED_AS_SCORED = dict.fromkeys(("--top-k", "--top-p", "--min-p"), (
    "training samples from the distribution that it scores, the whole softmax at --temperature; what is left "
    "when unlikely tokens are cut off is another policy, and its gradient is not the one that is computed"))


class Prompt(NamedTuple):
    row: Row
    ids: list  # of a conversation that awaits the assistant


def load_prompts(config, tokenizer, context, say, held_out=False):
    """[Prompt] of --data that fit a context (tokens) with --max-new-tokens behind them.

    held_out: those that --val-fraction holds out, if it is above 0; else those that it leaves.
    """
    rows = read_rows(config.data, "prompts", say, config.part, config.skip_bad)
    train, kept_back = split_by_prompt(rows, config.val_fraction)
    if held_out and config.val_fraction > 0:
        require(kept_back, f"--val-fraction {config.val_fraction} holds out no prompt of {config.data}")
        train = kept_back
    require(train, f"--val-fraction {config.val_fraction} leaves no prompt")
    context = min(config.max_length or context, context)
    require(config.max_new_tokens < context,
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt "
            f"in the context of {context}")
    prompts = [Prompt(row, encode_prompt(tokenizer, row.prompt)) for row in train]
    lengths = [len(prompt.ids) for prompt in prompts]
    prompts = drop_long(prompts, lengths, context - config.max_new_tokens, say)
    shown = describe(tokenizer, prompts[0].ids, [False] * len(prompts[0].ids))
    say(f"{len(prompts)} prompts, for instance\n{shown}")
    return prompts


def load_recorded(config, tokenizer, context, say, per_prompt=1):
    """Replies of --rollouts in place of sampling: prompts [Prompt], and per_prompt replies to each.

    Returns (prompts, replies), where replies[i] is a list of `formats.rollouts.Recorded`. A prompt that has
    several times as many replies comes several times. context: as for `load_prompts`.
    """
    path = config.rollouts
    require(not config.part and not config.skip_bad and config.val_fraction == 0,
            "--part, --skip-bad and --val-fraction are for --data; all of --rollouts is taken")
    recorded = read_rollouts(path, config.temperature)
    by_prompt = {}  # {ids of a prompt and its answer: (Prompt, [Recorded])}
    for own in recorded:
        ids = own.prompt_ids or encode_prompt(tokenizer, own.row.prompt)
        check_recorded(own, ids, tokenizer, min(config.max_length or context, context), config.max_new_tokens)
        _, replies = by_prompt.setdefault((*ids, own.row.answer), (Prompt(own.row, ids), []))
        replies.append(own)
    prompts, groups = [], []
    for prompt, replies in by_prompt.values():
        for start in range(0, len(replies) - per_prompt + 1, per_prompt):
            prompts.append(prompt)
            groups.append(replies[start:start + per_prompt])
    require(prompts, f"{path} has no prompt with {per_prompt} replies (--group)")
    left = len(recorded) - len(prompts) * per_prompt
    more = f"; {left} are left over, as their prompts have too few" if left else ""
    say(f"{path}: {len(recorded)} replies to {len(by_prompt)} prompts, taken {per_prompt} at a time{more}")
    uses = config.steps * config.rollout_batch / len(prompts)
    if uses > 1:
        say(f"each is used {uses:.3g} times in {config.steps} steps: the policy moves away from what sampled "
            "them (watch mismatch and ess)")
    return prompts, groups


def check_recorded(own, prompt_ids, tokenizer, context, max_new_tokens):
    """UserError unless a reply that was sampled elsewhere could have been sampled here."""
    length = len(own.reply_ids)
    require(length <= max_new_tokens,
            f"{own.where}: a reply of {length} tokens, and --max-new-tokens is {max_new_tokens}")
    whole = len(prompt_ids) + length
    require(whole <= context,
            f"{own.where}: prompt and reply have {whole} tokens, and the context is {context}")
    largest = max(*prompt_ids, *own.reply_ids)
    require(largest < tokenizer.n_vocab,
            f"{own.where}: token {largest} is none of the tokenizer's {tokenizer.n_vocab}; was it another "
            "model that sampled?")
    require(not set(own.reply_ids[:-1]) & set(tokenizer.stops),
            f"{own.where}: the reply goes on behind an end token, where a policy stops")


def draw_prompts(run, prompts, order, count):
    """Numbers of this rank's prompts, of the next `count` of all ranks. order: see `data.endless_order`.

    Every rank draws the same prompts, and takes every n-th of them in the order of their length: all have
    equal work.
    """
    drawn = [next(order) for _ in range(count)]
    drawn.sort(key=lambda i: len(prompts[i].ids))
    return drawn[run.rank::run.world_size]


class Pass(NamedTuple):
    """Some replies of a rollout, as one forward pass takes them."""
    rows: torch.Tensor  # (n,) where they are in the rollout
    numbers: list  # the same, on the CPU
    width: int  # W
    counts: bool  # False: a pass that only keeps the ranks in step, and must add nothing
    ids: torch.Tensor  # (n, W)
    where: torch.Tensor  # (n, W) bool, on the CPU: the responses' tokens, which the models are asked for
    mask: torch.Tensor  # (n, W) bool: those that count, none if `counts` is False
    lengths: torch.Tensor  # (n,) on the CPU: tokens of prompt and response

    def of(self, x):
        """This pass's part (n, W) of x (B, T), wherever that is."""
        if x.device == self.rows.device:
            return x[self.rows, :self.width]
        return x[self.numbers, :self.width]


@dataclass
class Rollout:
    """Replies of this rank.

    What the CPU needs to know of them lies there too, so that nothing waits for the device. Where a tool
    answers in between (see `converse`), a response is all that follows the prompt, and the mask is True on
    what the policy sampled of it, end tokens included: it has gaps.
    """
    prompts: list  # of Prompt, one for each reply
    texts: list  # of str, the replies; of several turns the last
    ids: torch.Tensor  # (B, T) prompt, response, padding
    mask: torch.Tensor  # (B, T) bool, True on the response, its end token included
    ended: torch.Tensor  # (B,) bool, the response ends in the end token
    host_mask: torch.Tensor  # mask on the CPU
    host_lengths: torch.Tensor  # (B,) tokens of prompt and response, on the CPU
    sizes: list  # of int: tokens of each reply that a forward pass must take
    # Positions that get a reward and a value, here and on the CPU: the response, or as `count_steps` says.
    steps: torch.Tensor  # (B, T) bool
    host_steps: torch.Tensor
    # Log-probabilities (B, T) by the engine that sampled, 0 outside the response; None if that was ours.
    sampler_logprobs: torch.Tensor | None = None
    # Of each conversation the turns behind its prompt, [{role, content}]; None where nothing answers.
    turns: list | None = None

    @property
    def dialogues(self):
        """The whole conversations, each a list of {role, content}."""
        if self.turns is None:
            return [with_reply(prompt.row, text) for prompt, text in zip(self.prompts, self.texts)]
        return [prompt.row.prompt + turns for prompt, turns in zip(self.prompts, self.turns)]

    def room_taken(self):
        """How many of --max-new-tokens each reply takes (B,), the turns of a tool included."""
        before = torch.tensor([len(prompt.ids) for prompt in self.prompts])  # (B,)
        return (self.host_lengths - before).to(self.ids.device, non_blocking=True)

    def count_steps(self, steps):
        """Have steps (B, T) for steps, which hold the response and perhaps one position behind it."""
        self.steps, self.host_steps = steps, steps.cpu()
        behind = self.host_steps.sum(1) - self.host_mask.sum(1)  # (B,)
        self.sizes = (self.host_lengths + behind).tolist()

    def mismatch(self, run, logprobs):
        """How far the engine that sampled is from the policy, whose logprobs (B, T) these are.

        Returns {mismatch: mean of log sampler / policy, nats per token (an estimate of the KL between them);
        mismatch_max: the largest amount; ess: the effective sample size of replies weighted by policy /
        sampler, as a share of their number}, all over all ranks.
        """
        log_ratio = torch.where(self.mask, logprobs - self.sampler_logprobs, 0.0)  # (B, T)
        of_replies = log_ratio.sum(1)  # (B,)
        # Their largest is taken off, as only proportions count.
        weights = (of_replies - run.all_max(of_replies.max())).exp()
        sums = [log_ratio.sum(), self.mask.sum(), weights.sum(), weights.square().sum()]
        total, tokens, first, second = run.all_sum(torch.stack(sums)).tolist()
        return {
            "mismatch": -total / tokens,
            "mismatch_max": run.all_max(log_ratio.abs().max()).item(),
            "ess": first**2 / second / (len(weights) * run.world_size),
        }

    def plan(self, run, selections, budget):
        """Lists of this rank's replies, each cut into passes of at most budget padded tokens.

        There are as many passes on every rank. Returns [[(numbers of replies, weight)]]; a weight of 0.0
        marks a pass that only keeps the ranks in step.
        """
        pieces = [by_length(numbers, self.sizes, budget) for numbers in selections]
        counts = torch.tensor([len(own) for own in pieces], device=run.device)
        counts = run.all_max(counts).tolist()
        plan = []
        for own, count, numbers in zip(pieces, counts, selections):
            plan.append(fill_up(own, count, numbers[:1] or [0]))
        return plan

    def passes(self, run, plan, *modules):
        """Yield a `Pass` for each entry of a plan; DDP exchanges the gradients of modules on the last one."""
        for numbers, weight in run.passes(plan, *modules):
            rows = torch.tensor(numbers).to(run.device, non_blocking=True)
            width = max(self.sizes[i] for i in numbers)
            mask = self.mask[rows, :width]
            if weight == 0:
                mask = torch.zeros_like(mask)
            yield Pass(
                rows=rows,
                numbers=numbers,
                width=width,
                counts=weight > 0,
                ids=self.ids[rows, :width],
                where=self.host_mask[numbers, :width],
                mask=mask,
                lengths=self.host_lengths[numbers],
            )

    def show(self, run, scores=None, number=3):
        """Print a few of the replies, with their scores (B,) if there are any."""
        for i in range(0, len(self.texts), max(1, len(self.texts) // number))[:number]:
            prompt = self.prompts[i].row.text
            said = [self.texts[i]]
            if self.turns is not None:
                said = [turn["content"] for turn in self.turns[i]]
            scored = "" if scores is None else f" (score {scores[i]:.2f})"
            run.say(f"  sample: {' -> '.join(map(repr, [prompt, *said]))}{scored}")


def join(rollouts):
    """Several rollouts of one policy as one, in their order."""
    widest = max(batch.ids.shape[1] for batch in rollouts)
    fields = {}
    for name in Rollout.__dataclass_fields__:
        parts = [getattr(batch, name) for batch in rollouts]
        if parts[0] is None:
            fields[name] = None
        elif isinstance(parts[0], list):
            fields[name] = sum(parts, [])
        elif parts[0].ndim == 1:
            fields[name] = torch.cat(parts)
        else:
            # Padding has the mask False, so it may be any token.
            fields[name] = torch.cat([F.pad(part, (0, widest - part.shape[1])) for part in parts])
    return Rollout(**fields)


# ---------------------------------------------------------------------------------------------------------
# Sampling

class Talk:
    """A conversation behind a prompt while it grows: turns of the policy, and of a tool between them.

    Attributes: number, which of this rank's replies it is; prompt; ids and mask, so far; turns
    [{role, content}] behind the prompt; room, tokens that may still come; ended, whether the policy's last
    turn ended by itself, and there was room for what follows it.
    """

    def __init__(self, number, prompt, room):
        self.number, self.prompt, self.room = number, prompt, room
        self.ids = list(prompt.ids)
        self.mask = [False] * len(prompt.ids)
        self.turns = []
        self.ended = False

    @property
    def messages(self):
        return self.prompt.row.prompt + self.turns

    def add(self, role, text, ids):
        """Put a turn behind the others. Its tokens count if they are the policy's, as it sampled them."""
        self.turns.append({"role": role, "content": text})
        self.ids += ids
        self.mask += [role == "assistant"] * len(ids)
        self.room -= len(ids)


def ask_tool(tool, tokenizer, talks):
    """Have a tool answer the last turns of some conversations; returns those that go on."""
    if not talks:
        return []
    rows = [talk.prompt.row for talk in talks]
    answers = tool([row.text for row in rows], [talk.turns[-1]["content"] for talk in talks],
                   [row.answer for row in rows], [True] * len(talks), [talk.messages for talk in talks])
    going = []
    for talk, answer in zip(talks, answers):
        if answer is None:
            continue
        ids = next_turn(tokenizer, [*talk.messages, {"role": "user", "content": answer}])
        # One token at least must be left for the policy. Else it was cut off, though its own turn has an end.
        talk.ended = len(ids) < talk.room
        if talk.ended:
            talk.add("user", answer, ids)
            going.append(talk)
    return going


def converse(run, tokenizer, prompts, max_new_tokens, tool, replies_to):
    """Conversations of several turns behind prompts [Prompt]: (Generation, turns of each as `Talk` has them).

    replies_to(questions, limits, numbers): the Generation that samples the next turn of some of them. The
    ids of what was sampled are kept as they are, and those of the tool's turns put behind them. All turns of
    a conversation together have max_new_tokens at most.
    """
    talks = [Talk(number, prompt, max_new_tokens) for number, prompt in enumerate(prompts)]
    going = talks
    for turn in range(tool.turns):
        if turn > 0:
            going = ask_tool(tool, tokenizer, [talk for talk in going if talk.ended])
        # All ranks sample equally often, as they draw the same numbers and may gather weights for it.
        if not run.any_rank(bool(going)):
            break
        questions = [talk.ids for talk in going]
        got = replies_to(questions, [talk.room for talk in going], [talk.number for talk in going])
        if not going:
            continue
        sampled = zip(going, got.ids.tolist(), got.lengths.tolist(), got.ended.tolist())
        for talk, ids, length, ended in sampled:
            reply = ids[len(talk.ids):length]
            talk.add("assistant", tokenizer.decode(reply), reply)
            talk.ended = ended
    ids, mask, lengths = collate([(talk.ids, talk.mask) for talk in talks], tokenizer.pad, run.device)
    ended = torch.tensor([talk.ended for talk in talks], device=run.device)
    return Generation(ids, mask.to(run.device), lengths, ended), [talk.turns for talk in talks]


def sample(run, model, tokenizer, prompts, max_new_tokens, temperature, generator,
           rows=0, per_prompt=1, room=0, tool=None):
    """Sample per_prompt replies to each of this rank's prompts [Prompt]; those to one prompt are neighbours.

    generator draws the same on all ranks, and the random numbers belong to the prompts and turns, so that
    replies don't depend on the number of ranks. rows: decoded at once, see `generate`; room: free columns
    behind the longest reply; tool: a `judges.Tool` that answers replies, or None.
    """
    repeated = []
    for prompt in prompts:
        repeated += [prompt] * per_prompt

    def replies_to(questions, limit, numbers=slice(None)):
        """The Generation that answers questions (lists of ids); numbers: which of this rank's replies."""
        uniform = uniforms(len(repeated) * run.world_size, max_new_tokens, generator, run.device)
        by_prompt = uniform.view(len(prompts) * run.world_size, per_prompt, *uniform.shape[1:])
        uniform = by_prompt[run.rank::run.world_size].flatten(0, 1)  # (B, tokens, 2)
        run.doing = f"step {run.step + 1}, sampling {rows or len(questions)} replies at once"
        got = None
        with run.gathered(model), run.autocast():
            # There may be none, where other ranks have some.
            if questions:
                got = generate(model, questions, limit, tokenizer, temperature,
                               rows=rows, uniform=uniform[numbers], interrupted=run.asked_to_stop)
        run.safe_point()
        return got

    if tool is None:
        got, turns = replies_to([prompt.ids for prompt in repeated], max_new_tokens), None
        texts = got.texts(tokenizer)
    else:
        got, turns = converse(run, tokenizer, repeated, max_new_tokens, tool, replies_to)
        texts = [own[-1]["content"] for own in turns]
    ids = got.ids
    mask = got.mask
    if room:
        ids = F.pad(ids, (0, room), value=tokenizer.pad)
        mask = F.pad(mask, (0, room))
    lengths = got.lengths.cpu()
    host_mask = mask.cpu()
    return Rollout(
        prompts=repeated,
        texts=texts,
        ids=ids,
        mask=mask,
        ended=got.ended,
        host_mask=host_mask,
        host_lengths=lengths,
        sizes=lengths.tolist(),
        steps=mask,
        host_steps=host_mask,
        turns=turns,
    )


def respond(run, model, tokenizer, talks, max_new_tokens, temperature, generator):
    """[(text, ended)] of a model's replies to conversations; ("", False) where one leaves it no room."""
    said = [("", False)] * len(talks)
    encoded = [encode_prompt(tokenizer, talk) for talk in talks]
    room = model.config.block_size - max_new_tokens
    fitting = [i for i, ids in enumerate(encoded) if len(ids) <= room]
    if fitting:
        prompts = [Prompt(Row(talks[i]), encoded[i]) for i in fitting]
        batch = sample(run, model, tokenizer, prompts, max_new_tokens, temperature, generator)
        for i, text, ended in zip(fitting, batch.texts, batch.ended.tolist()):
            said[i] = text, ended
    return said


def replay(run, tokenizer, prompts, replies, room=0):
    """The Rollout of replies that were sampled elsewhere: to each of this rank's prompts [Prompt] its list of
    Recorded. room: free columns behind the longest.
    """
    repeated, rows, marks, logprobs = [], [], [], []
    for prompt, group in zip(prompts, replies):
        for own in group:
            before = len(prompt.ids)
            repeated.append(prompt)
            rows.append(prompt.ids + own.reply_ids)
            marks.append([False] * before + [True] * len(own.reply_ids))
            logprobs.append([0.0] * before + own.logprobs)
    ids, lengths = pad_rows(rows, tokenizer.pad, run.device)  # (B, T), (B,)
    host_mask, _ = pad_rows(marks, False)  # (B, T)
    sampler_logprobs, _ = pad_rows(logprobs, 0.0, run.device)  # (B, T)
    ended = [row[-1] in tokenizer.stops for row in rows]
    host_mask = F.pad(host_mask, (0, room))
    mask = host_mask.to(run.device)
    return Rollout(
        prompts=repeated,
        texts=[tokenizer.decode(own.reply_ids) for group in replies for own in group],
        ids=F.pad(ids, (0, room), value=tokenizer.pad),
        mask=mask,
        ended=torch.tensor(ended, device=run.device),
        host_mask=host_mask,
        host_lengths=lengths,
        sizes=lengths.tolist(),
        steps=mask,
        host_steps=host_mask,
        sampler_logprobs=F.pad(sampler_logprobs, (0, room)),
    )


def show_samples(run, model, tokenizer, rows, max_new_tokens, generator, number=3):
    """Print replies to the prompts of a few rows, evenly spread."""
    rows = rows[::max(1, len(rows) // number)][:number]
    prompts = []
    for row in rows:
        ids = encode_prompt(tokenizer, row.prompt)
        if len(ids) + max_new_tokens <= model.config.block_size:
            prompts.append(Prompt(row, ids))
    if not prompts:
        return
    questions = [prompt.ids for prompt in prompts]
    with run.gathered(model), run.autocast():
        got = generate(model, questions, max_new_tokens, tokenizer,
                       generator=generator, interrupted=run.asked_to_stop)
        texts = got.texts(tokenizer)
    run.safe_point()
    for prompt, text in zip(prompts, texts):
        question = prompt.row.prompt[-1]["content"]
        run.say(f"  sample: {question[-200:]!r} -> {text!r}")
