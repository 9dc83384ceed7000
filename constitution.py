"""Feedback from models, by written principles: critique, revision and labels (Constitutional AI, RLAIF).

    python constitution.py --model runs/sft --feedback runs/judge --out runs/labels
    python constitution.py --stage revise --model runs/sft --data runs/toy/prompts.jsonl --out runs/revised

revise (Bai et al. 2022, section 3): the policy answers a prompt. --feedback is asked to criticise the reply
by a principle, then to rewrite it, in --revisions rounds, for each of which a principle is drawn.

    sft.jsonl      the last revision, for sft.py                          prompt, completion
    pairs.jsonl    it against the first reply, for dpo.py and reward.py   prompt, chosen, rejected

label (their section 4.1; Lee et al. 2023): the policy says two replies, x and y, and --feedback is asked
which of A and B is better, by a principle. With t the --feedback-temperature,

    P(A) = sigma((log P("A") - log P("B")) / t)        of the next token behind the question
    p_1 = P(A), where A is x and B is y     p_2 = 1 - P(A), where A is y and B is x
    p(x is better) = (p_1 + p_2) / 2        both orders (Lee et al., section 2.1), so that y has 1 - p

    pairs.jsonl    prompt, chosen, rejected, probability: p of the chosen one, a soft label for dpo.py and
                   reward.py. At exactly 0.5 there is no row

summary.json says how much goes by place: position_bias, the mean of p_1 - p_2 (0: nothing, 1: the judge
always says A, -1: B); same_letter, the share of pairs with one letter in both orders; letters, the mean
probability of "A" or "B" at all, which is far below 1 where the judge would rather say something else.

--feedback is a checkpoint folder, whose tokenizer may be another; the policy itself, if it is left out (there
is no second model in memory then); or a Python function, given the lists that those of --reward-fn are given.
It scores replies, and p is sigma of the difference over t; or, to revise, it returns a text or None for each:
the request is the last turn of its dialogues. Replies that were cut off or are blank are in no file, and no
revisions: the reply before stays, as where a conversation is too long for the model that is asked.

What differs from Bai et al.: requests are turns of a chat, without examples, and earlier rounds are gone; no
reasons are written before a letter, so p is not clamped; no people's labels of helpfulness are mixed in.

recipes/constitution.sh, the embedded task without a person's label: gold 0.17, 0.15, 0.09 of three seeds, and
0.48, 0.47, 0.44 after DPO on a judge's labels (2026-11-28, one thread of an Intel Xeon). What else came out:
docs/constitution.md.
"""
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import with_reply
from formats.model_folder import load_model
from formats.principles import fill, read_principles
from formats.rows import Row
from judges import (
    Function, Tool, check_functions, encode_question, judge_texts, letter_logprobs, load_functions)
from model import GPT
from plumbing.disk import digest, model_digest
from plumbing.flags import Count, Fraction, Natural, NonNegative, Positive, Seed, parse_sources, require
from plumbing.hardware import pick_device, pick_dtype
from plumbing.parts import Parts
from plumbing.run import Alone, run_script
from rollout import load_prompts, respond, sample


@dataclass
class Config:
    # label: say which of two replies is better; revise: write a better one
    stage: Literal["label", "revise"] = "label"
    model: str = "runs/sft"  # checkpoint folder of the policy, which answers the prompts
    # who judges or revises: a checkpoint folder, or a Python function module:function; without it the policy
    feedback: str = ""
    # JSON file of objects with name, critique (may be ""), revision, comparison (with {prompt}, {a} and {b})
    principles: str = "recipes/principles.json"
    # files whose prompts are used: a.jsonl, or a mixture a.jsonl:0.8,b.parquet:0.2, or hf:org/name:split
    data: str = "runs/toy/prompts.jsonl"
    # functions whose numbers are measured and shown under their names, and decide nothing
    judge: list[str] = field(default_factory=list)
    out: str = "runs/constitution"  # folder for the files
    n: Count = 4  # pairs of replies to each prompt; with --stage revise replies
    revisions: Count = 2  # rounds of critique and revision
    resume: bool = False  # go on with what is in --out (or begin it, if there is none)
    val_fraction: Fraction = 0.0  # of a file: leave out the prompts that training with this one holds out
    part: str = ""  # of a file: one part of it, as in training (2/4/4:3)
    skip_bad: bool = False  # leave out rows of --data that can't be read, at most one in a hundred
    # leave out prompts longer than this less --max-new-tokens, tokens; 0: the policy's context
    max_length: Natural = 0
    max_new_tokens: Count = 40  # longest reply, critique or revision, tokens
    temperature: Positive = 1.0  # of sampling the policy's replies
    # t of the formulas; with --stage revise that of sampling critiques and revisions, 0: the likeliest token
    feedback_temperature: NonNegative = 1.0
    batch: Count = 32  # prompts at once, and in each of the parts that --resume keeps
    micro_batch_tokens: Count = 16384  # tokens per pass of questions
    seed: Seed = 0  # seed of what is sampled, and of the principles that are drawn
    # auto takes the first of cuda, mps, cpu that works
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    allow_pickle: bool = False
    debug: bool = False  # show the traceback of an error


class Work(NamedTuple):
    """What every part of the work needs."""
    alone: Alone
    model: GPT
    tokenizer: object
    feedback: object  # a GPT, or a `judges.Function`
    feedback_tokenizer: object
    principles: list
    config: Config


# ---------------------------------------------------------------------------------------------------------
# Labels

def both_orders(lead, temperature):
    """p_1, p_2 (N,) from lead (N, 2) of A over B, in nats, where the first reply is A and where it is B."""
    lead = lead.double() / temperature
    return torch.sigmoid(lead[:, 0]), torch.sigmoid(-lead[:, 1])


def ask_model(work, records, rng):
    """(records that a model has room for, lead (N, 2) of its letters, their probability together (N,))."""
    judged, questions = [], []
    for record in records:
        principle = work.principles[rng.integers(len(work.principles))]
        x, y = record["replies"]
        texts = [fill(principle.comparison, record["row"], a, b) for a, b in ((x, y), (y, x))]
        own = [encode_question(work.feedback_tokenizer, text) for text in texts]
        if max(len(question.ids) for question in own) <= work.feedback.config.block_size:
            record["principle"] = principle.name
            judged.append(record)
            questions += own
    logprobs = letter_logprobs(
        work.alone, work.feedback, questions, work.feedback_tokenizer.pad, work.config.micro_batch_tokens)
    logprobs = logprobs.reshape(len(judged), 2, 2)  # of pair, order, letter
    return judged, logprobs[..., 0] - logprobs[..., 1], logprobs.exp().sum(2).mean(1)


def ask_function(work, records, rng):
    """The same of a function that scores each reply: no place is first, and a letter is always said."""
    rows = [record["row"] for record in records for _ in "xy"]
    replies = [reply for record in records for reply in record["replies"]]
    scores = torch.tensor(judge_texts(work.feedback, rows, replies, [True] * len(rows))).view(-1, 2)
    lead = scores[:, 0] - scores[:, 1]
    return records, torch.stack([lead, -lead], 1), torch.ones(len(records))


def label_part(work, prompts, generator, rng):
    """Records of --n pairs of replies to each [Prompt]; p_1, p_2, letters of those that are labelled."""
    records = sample_records(work, prompts, 2, generator)
    pairs = [record for record in records if comparable(record)]
    if pairs:
        ask = ask_function if isinstance(work.feedback, Function) else ask_model
        judged, lead, letters = ask(work, pairs, rng)
        p_1, p_2 = both_orders(lead, work.config.feedback_temperature)
        for record, *numbers in zip(judged, p_1.tolist(), p_2.tolist(), letters.tolist()):
            record |= zip(("p_1", "p_2", "letters"), numbers)
    return records


# ---------------------------------------------------------------------------------------------------------
# Revisions

def revise(work, rows, replies, drawn, generator):
    """[(critique, revision)] of replies to rows by a principle each, "" where there is none."""
    def said(dialogues):
        return respond(work.alone, work.feedback, work.feedback_tokenizer, dialogues,
                       work.config.max_new_tokens, work.config.feedback_temperature, generator)

    talks = [with_reply(row, reply) for row, reply in zip(rows, replies)]
    critiques = [""] * len(rows)
    by_model = not isinstance(work.feedback, Tool)
    if by_model:
        criticised = [i for i, principle in enumerate(drawn) if principle.critique.strip()]
        dialogues = [talks[i] + [{"role": "user", "content": drawn[i].critique}] for i in criticised]
        for i, dialogue, (text, _) in zip(criticised, dialogues, said(dialogues)):
            # One that was cut off has been said all the same; without a critique its request is taken back.
            if text.strip():
                critiques[i] = text
                talks[i] = with_reply(Row(dialogue), text)
    dialogues = [talk + [{"role": "user", "content": own.revision}] for talk, own in zip(talks, drawn)]
    if by_model:
        revisions = [text if ended else "" for text, ended in said(dialogues)]
    else:
        prompts, answers = [row.text for row in rows], [row.answer for row in rows]
        revisions = work.feedback(prompts, replies, answers, [True] * len(rows), dialogues)
    return list(zip(critiques, revisions))


def revise_part(work, prompts, generator, rng):
    """Records of --n replies to each [Prompt], and of what becomes of them: one more reply in each round."""
    records = sample_records(work, prompts, 1, generator)
    for record in records:
        record |= {"principles": [], "critiques": []}
    rows = [record["row"] for record in records]
    for _ in range(work.config.revisions):
        drawn = [work.principles[i] for i in rng.integers(len(work.principles), size=len(rows))]
        last = [record["replies"][-1] for record in records]
        said = revise(work, rows, last, drawn, generator)
        for record, principle, (critique, revision) in zip(records, drawn, said):
            taken = bool(revision and revision.strip())
            record["principles"].append(principle.name)
            record["critiques"].append(critique)
            record["replies"].append(revision if taken else record["replies"][-1])
            record["ended"].append(taken or record["ended"][-1])
    return records


def sample_records(work, prompts, size, generator):
    """[{row, replies, ended}]: --n groups of so many replies to each [Prompt]."""
    config = work.config
    batch = sample(work.alone, work.model, work.tokenizer, prompts, config.max_new_tokens, config.temperature,
                   generator, per_prompt=config.n * size)
    ended = batch.ended.tolist()
    records = []
    for i in range(0, len(ended), size):
        own = slice(i, i + size)
        records.append({"row": batch.prompts[i].row, "replies": batch.texts[own], "ended": ended[own]})
    return records


def usable(record, i):
    """Whether reply i of a record may stand in a file: readers put an end token behind it."""
    return record["ended"][i] and bool(record["replies"][i].strip())


def comparable(record):
    """Whether the first and the last reply of a record are usable, and two, as readers see them."""
    first, last = record["replies"][0].strip(), record["replies"][-1].strip()
    return usable(record, 0) and usable(record, -1) and first != last


def complete(records, judges):
    """Put each judge's numbers into records, one for each reply, and the prompt in place of its Row."""
    size = len(records[0]["replies"])
    rows = [record.pop("row") for record in records]
    repeated = [row for row in rows for _ in range(size)]
    replies, ended = (sum([record[name] for record in records], []) for name in ("replies", "ended"))
    for function in judges:
        numbers = np.reshape(judge_texts(function, repeated, replies, ended), (-1, size))
        for record, own in zip(records, numbers.tolist()):
            record[f"judge_{function.name}"] = own
    # As the readers take it: text, or turns where there are several.
    for record, row in zip(records, rows):
        record["prompt"] = row.text if len(row.prompt) == 1 else row.prompt


def file_rows(records, stage):
    """{name of a file: its rows}."""
    pairs, demonstrations = [], []
    for record in records:
        first, last = record["replies"][0], record["replies"][-1]
        row = {"prompt": record["prompt"]}
        if stage == "revise" and usable(record, -1):
            demonstrations.append(row | {"completion": last})
            if comparable(record):
                pairs.append(row | {"chosen": last, "rejected": first})
        p = (record.get("p_1", 0.5) + record.get("p_2", 0.5)) / 2
        if p != 0.5:
            chosen, rejected = (first, last) if p > 0.5 else (last, first)
            pairs.append(row | {"chosen": chosen, "rejected": rejected, "probability": max(p, 1 - p)})
    files = {"records": records, "pairs": pairs}
    return files | {"sft": demonstrations} if stage == "revise" else files


def figures(records, judges):
    """What summary.json says: see above, and how often a judge agrees where its two numbers differ."""
    # Of the first replies, the second ones (or the first revisions), ...
    fine = [[usable(record, i) for i in range(len(record["replies"]))] for record in records]
    result = {"usable": np.mean(fine, 0).tolist()}
    for name in judges:
        result[name] = np.mean([record[f"judge_{name}"] for record in records], 0).tolist()
    labelled = [record for record in records if "p_1" in record]
    if not labelled:
        return result
    p_1, p_2, letters = np.array([[own["p_1"], own["p_2"], own["letters"]] for own in labelled]).T
    p = (p_1 + p_2) / 2
    result |= {
        "labelled": len(labelled) / len(records),
        "confidence": float(np.maximum(p, 1 - p).mean()),
        "position_bias": float((p_1 - p_2).mean()),
        "same_letter": float(np.mean((p_1 - 0.5) * (p_2 - 0.5) < 0)),
        "letters": float(letters.mean()),
    }
    for name in judges:
        lead = np.subtract(*np.transpose([record[f"judge_{name}"] for record in labelled]))
        decided = (lead != 0) & (p != 0.5)
        if decided.any():
            result[f"agreement_{name}"] = float(np.mean((lead > 0)[decided] == (p > 0.5)[decided]))
    return result


def main(config):
    require(os.environ.get("WORLD_SIZE", "1") == "1", "constitution.py is one process: leave out torchrun")
    revises = config.stage == "revise"
    require(revises or config.feedback_temperature > 0, "--feedback-temperature 0 is for --stage revise")
    require(revises or config.revisions == Config().revisions, "--revisions is for --stage revise")
    inputs = {name: [model_digest(getattr(config, name))] for name in ("model", "feedback")}
    inputs |= {"data": [digest(file for file, _ in parse_sources(config.data))],
               "principles": [digest([config.principles])]}
    parts = Parts(config, inputs)
    if parts.done:
        print(f"{config.out}: this is done")
        return
    # SIGTERM is as Ctrl-C: nothing is left half-written.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if config.threads:
        torch.set_num_threads(config.threads)
    principles = read_principles(config.principles)
    judges = load_functions("--judge", config.judge)
    model, tokenizer = load_model(config.model, GPT, allow_pickle=config.allow_pickle)
    feedback, feedback_tokenizer = model, tokenizer
    if ":" in config.feedback and not Path(config.feedback).exists():
        feedback = (Tool if revises else Function)("--feedback", config.feedback)
    elif config.feedback:
        feedback, feedback_tokenizer = load_model(config.feedback, GPT, allow_pickle=config.allow_pickle)
    device = pick_device(config.device)
    alone = Alone(device, pick_dtype(config.dtype, device, model.config.n_embd))
    functions = [own for own in (*judges, feedback) if isinstance(own, Function)]
    for network in {model, feedback} - {*functions}:
        network.to(device).eval()
    prompts = load_prompts(config, tokenizer, model.config.block_size, alone.say)
    check_functions(functions, [prompt.row for prompt in prompts], alone.say)
    work = Work(alone, model, tokenizer, feedback, feedback_tokenizer, principles, config)

    def make(start):
        """Records of the prompts from a number on. What is drawn depends on it and on --seed alone."""
        generator = torch.Generator(device).manual_seed(config.seed * 1_000_003 + start)
        rng = np.random.default_rng([config.seed, start])
        some = prompts[start:start + config.batch]
        records = (revise_part if revises else label_part)(work, some, generator, rng)
        complete(records, judges)
        return records

    records = []
    for start in tqdm(range(0, len(prompts), config.batch), desc=config.stage, disable=None):
        records += parts.get(start, lambda: make(start))
    files = file_rows(records, config.stage)
    require(files["pairs"] or revises, "no pair has a label: all are equal, blank, cut off, or too long")
    summary = figures(records, [function.name for function in judges])
    parts.finish(files, summary | {"rows": {name: len(rows) for name, rows in files.items()}})
    for name, number in summary.items():
        print(f"{name:>20}  {np.round(number, 3)}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
