"""The formats people have: rows of files, mixtures and parts of files, and data sets of the hub, to one row type.

One row type serves every stage: a prompt (a conversation that awaits an answer) and its replies, none for
prompts, one for a demonstration, K with ranks for preferences (a chosen/rejected pair is K = 2).
"""
import bisect
import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flags import UserError, require

# ---------------------------------------------------------------------------------------------------------
# Rows and the formats they come in

@dataclass
class Row:
    """A prompt and its replies. ranks: one number per reply, lower is better, equal is a tie; margin: see reward.py."""
    prompt: list  # [{"role": "system" | "user" | "assistant", "content": str}], the last one by the user; [] for plain text
    replies: list = field(default_factory=list)  # of str
    ranks: list = field(default_factory=list)
    margin: float = 0.0
    gold: list = field(default_factory=list)  # true scores of the replies where somebody knows them (synthetic data)
    answer: str = ""  # the result that a reply ought to reach, where it can be checked ("72")
    document: bool = False  # a whole file of running text, which is split by position, not by hash

    @property
    def text(self):
        """The prompt as one string: what it is known by, whatever its replies. Plain text is known by itself."""
        return "\n\n".join(message["content"] for message in self.prompt) or "".join(self.replies[:1])


class BadRow(Exception):
    """A row that is dropped; its text is the reason."""


ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
# Fields that hold a conversation, a prompt, a reply, and a number that is higher for a better reply.
TURNS = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question", "query", "problem")
REPLIES = ("output", "response", "completion")
RATINGS = ("rating", "score")
JUDGED = ("fine-grained_score", "overall_score", *RATINGS)  # such a number, of one of a row's replies
# Prompts that pose a task, and the answer to it, which is a reply as well. One with its working comes first.
TASKS = ("question", "query", "problem")
WORKED = ("solution", "answer", "target")
ANSWERS = ("ground_truth", "answer", "solution", "target")  # what a reply is checked by, the surest first


def first(row, names, default=None):
    """The first of these fields that a row has and that is not null."""
    return next((row[name] for name in names if row.get(name) is not None), default)


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def as_number(value):
    """A number from its text, all that a csv has; anything else as it is."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value):
        return float(value)
    return value


def number_text(x):
    """A number as people write it: a whole one has no decimal point, whatever type its column has."""
    return str(int(x) if isinstance(x, float) and x.is_integer() else x)


def find_result(text):
    """The result of a worked answer: behind the last #### (GSM8K), in the last \\boxed{} (MATH), or all."""
    _, mark, result = text.rpartition("####")
    heading = "\n" in result.strip() or ("\\boxed{" in text and not re.search(r"\d", result))
    if mark and not heading:
        return result.strip().rstrip(".").replace(",", "")
    _, mark, result = text.rpartition("\\boxed{")
    depth = 1
    for i, letter in enumerate(result if mark else ""):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return result[:i].strip()
    return text.strip()


def find_answer(row):
    """The answer of a row that can be checked, as text; "" if it has none."""
    judged = row.get("reward_model")  # as DAPO and verl have it
    values = [judged.get("ground_truth")] if isinstance(judged, dict) else []
    for value in values + [row.get(name) for name in ANSWERS]:
        if is_number(value) and math.isfinite(value):
            return number_text(value)
        if isinstance(value, str) and value.strip():
            return find_result(value)
    return ""


def parse_content(content):
    """The stripped text of a turn: a string, or a list of {"type": "text", "text": str} parts."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise BadRow("a turn with parts that are no text")
        content = "".join(part["text"] for part in content)
    if content is None:
        raise BadRow("a turn without text")
    if not isinstance(content, str):
        raise TypeError("the text of a turn is not a string")
    return content.strip()


def split_exchanges(messages):
    """Messages, those of the kind {human: text, assistant: text} as the two that they are."""
    for message in messages:
        if message.keys() >= {"human", "assistant"}:
            yield from ({"role": role, "content": message[role]} for role in ("human", "assistant"))
        else:
            yield message


def parse_messages(messages):
    """A list of {role or from, content or value} -> turns as `Row` has them, in order: [system], user, assistant, user, ...

    A single turn by the assistant passes too: it is how some files hold a reply.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise TypeError("a conversation is not a list of objects with role and content (or from and value)")
    turns = []
    for message in split_exchanges(messages):
        role = first(message, ("role", "from"))
        if not isinstance(role, str):
            raise TypeError("a message has no role")
        if role.lower() not in ROLES:
            raise BadRow(f"a turn by {role[:20]!r}, who is not system, user or assistant")
        turns.append({"role": ROLES[role.lower()], "content": parse_content(first(message, ("content", "value")))})
    if turns and turns[0] == {"role": "system", "content": ""}:
        turns = turns[1:]
    roles = [turn["role"] for turn in turns]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    if roles not in ((["user", "assistant"] * len(roles))[:len(roles)], ["assistant"]):
        raise BadRow("roles don't alternate")
    return turns


def parse_transcript(text):
    """Turns of an HH-RLHF transcript: each begins with a blank line and 'Human:' or 'Assistant:'."""
    pieces = re.split(r"\n\n(Human|Assistant):", text)
    if pieces[0].strip() or len(pieces) == 1:
        raise BadRow("no transcript with Human: and Assistant: turns")
    return parse_messages([{"role": {"Human": "user"}.get(role, "assistant"), "content": content}
                           for role, content in zip(pieces[1::2], pieces[2::2])])


def split_reply(turns):
    """(prompt, reply) of a conversation that ends with the assistant."""
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("no reply by the assistant at the end")
    return turns[:-1], turns[-1]["content"]


def parse_prompt(row):
    """Turns up to the user's last, from one of PROMPTS; else from one of TURNS."""
    prompt = first(row, PROMPTS)
    if prompt is None or isinstance(prompt, list):
        return parse_messages(first(row, TURNS) if prompt is None else prompt)
    extra, history = first(row, ("input", "context"), ""), row.get("history", [])
    if not (isinstance(prompt, str) and isinstance(extra, str)):
        raise TypeError("the prompt is not a string")
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise TypeError("history is not a list of [question, answer]")
    if prompt.startswith("\n\nHuman:") and prompt.rstrip().endswith("\n\nAssistant:"):
        return parse_transcript(prompt)[:-1]
    prompt = "\n\n".join(text.strip() for text in (prompt, extra) if text.strip())
    contents = [text for turn in history for text in turn] + [prompt]
    return parse_messages([{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), contents)])


def parse_reply(value, prompt):
    """(prompt, reply) from what a row calls a reply: its text, a message, or a list of messages, the prompt's among them perhaps.

    Where the row has no prompt (None) it is a whole conversation, as text an HH-RLHF transcript.
    """
    if isinstance(value, str):
        return (prompt, value) if prompt is not None else split_reply(parse_transcript(value))
    if not isinstance(value, (dict, list)):
        raise TypeError("a reply is missing or not a string")
    turns = parse_messages([value] if isinstance(value, dict) else value)
    whole, reply = split_reply(turns)
    if prompt and whole and prompt[-1] not in whole:
        raise BadRow("prompts differ")
    return whole or prompt, reply


def parse_plain(row, want):
    """Text to go on reading, no prompt."""
    if not isinstance(row["text"], str):
        raise TypeError("text is not a string")
    return Row([], [row["text"]], [0])


def parse_question(row, want):
    """A task and its worked answer. GSM8K's answers lose their <<48/2=24>> marks."""
    if want == "prompts":
        return Row(parse_prompt(row))
    reply = first(row, WORKED)
    if is_number(reply) and row.keys() & {"choices", "options"}:
        raise TypeError("the answer is the number of a choice; write the choices into the prompt, and the answer out")
    if is_number(reply):
        reply = number_text(reply)
    if not isinstance(reply, str):
        raise TypeError("the answer is neither text nor a number")
    if "####" in reply:
        reply = re.sub(r"<<[^<>]*>>", "", reply)
    return Row(parse_prompt(row), [reply], [0])


def parse_single(row, want):
    """A prompt, or a conversation, with one reply, labelled (true, false) or rated (higher is better) perhaps."""
    label, rating, talk = row.get("label"), first(row, RATINGS), first(row, TURNS)
    if want == "demonstrations" and label is False:
        raise BadRow("label false")
    turns = parse_prompt(row) if talk is None else parse_messages(talk)
    if want == "prompts":
        answered = talk is not None and turns and turns[-1]["role"] == "assistant"
        return Row(turns[:-1] if answered else turns)
    prompt, reply = parse_reply(first(row, REPLIES), turns) if talk is None else split_reply(turns)
    return Row(prompt, [reply], [1 - label if isinstance(label, bool) else -rating if is_number(rating) else 0])


def parse_pair(row, want):
    """A prompt with chosen and rejected replies, or both as whole conversations that share the prompt."""
    given = parse_prompt(row) if row.keys() & {*PROMPTS, *TURNS} else None
    (prompt, chosen), (other, rejected) = (parse_reply(row[name], given) for name in ("chosen", "rejected"))
    if prompt != other:
        raise BadRow("prompts differ")
    reply = first(row, REPLIES)  # some files name a demonstration beside the pair
    return Row(prompt, [reply], [0]) if want == "demonstrations" and isinstance(reply, str) else Row(prompt, [chosen, rejected], [0, 1])


def parse_ranking(row, want):
    """A prompt with K replies and their ranks, lower is better."""
    replies, ranks = row["completions"], row["ranks"]
    if not (isinstance(replies, list) and isinstance(ranks, list)):
        raise TypeError("completions and ranks are not lists")
    if len(replies) != len(ranks) or len(replies) < 2:
        raise BadRow("completions and ranks don't match, or fewer than two")
    return Row(parse_prompt(row), replies, ranks)


FORMATS = {  # name: what parses it, and what it is good for
    "instructions": (parse_single, ("demonstrations", "prompts")),
    "prompts": (parse_single, ("prompts",)),
    "questions": (parse_question, ("demonstrations", "prompts")),
    "conversations": (parse_single, ("demonstrations", "prompts")),
    "labelled replies": (parse_single, ("demonstrations", "preferences", "prompts")),
    "rated replies": (parse_single, ("demonstrations", "preferences", "prompts")),
    "preferences": (parse_pair, ("demonstrations", "preferences", "prompts")),
    "transcripts": (parse_pair, ("demonstrations", "preferences", "prompts")),
    "rankings": (parse_ranking, ("demonstrations", "preferences", "prompts")),
    "plain text": (parse_plain, ("demonstrations",)),
}
NEEDED = {
    "demonstrations": "a prompt and a reply (instruction and output, prompt and completion, question and answer, messages) or text",
    "preferences": "a prompt, chosen and rejected (or completions and ranks, or a reply with a label, true or false, or a rating)",
    "prompts": "a prompt (prompt, instruction, question, query, problem or messages)",
}
# By what was wanted: fields of known data sets that have it under other names, and what to do about them.
REFUSED = {
    "demonstrations": {
        ("prompt", "answer"): "to train on the answer, rename it to completion",
        ("prompt", "solution"): "to train on the solution, rename it to completion",
    },
    "preferences": {
        ("response_0", "response_1", "better_response_id"):
            "PKU-SafeRLHF: make the better response chosen and the other one rejected",
        ("response_j", "response_k"):
            "stack-exchange-paired: rename response_j to chosen and response_k to rejected",
        ("conversation_a", "conversation_b", "winner"):
            "Chatbot Arena: make the winner's conversation chosen and the other one rejected, without ties",
        ("answer_0", "answer_1", "score_0", "score_1"):
            "WebGPT: make the answer of the higher score chosen, the other rejected, question its full_text",
        ("response", "helpfulness"): "HelpSteer: rename helpfulness to rating",
    },
    "prompts": {},
}


def advice(row, want):
    """What to do about a row of a known data set that can't be used as it is; "" for any other."""
    known = [text for fields, text in REFUSED[want].items() if row.keys() >= {*fields}]
    return f" ({known[0]})" if known else ""


def translate(row):
    """A row of SHP or UltraFeedback, or of input and a reply, in the terms above; any other as it is."""
    has = row.keys()
    if has >= {"history", "human_ref_A", "human_ref_B", "labels"}:
        if row["labels"] not in (0, 1):
            raise TypeError("labels is neither 1, for A, nor 0, for B")
        better, worse = ("human_ref_A", "human_ref_B") if row["labels"] else ("human_ref_B", "human_ref_A")
        return {"prompt": row["history"], "chosen": row[better], "rejected": row[worse]}
    replies = row.get("completions")
    if "ranks" not in has and isinstance(replies, list) and all(isinstance(reply, dict) for reply in replies):
        scored = [(first(reply, REPLIES), as_number(first(reply, JUDGED))) for reply in replies]
        scored = [(reply, score) for reply, score in scored if is_number(score)]
        if scored:
            texts, ranks = [reply for reply, _ in scored], [-score for _, score in scored]
            row = row | {"completions": texts, "ranks": ranks}
    asks = has & {*PROMPTS, *TURNS}
    if "input" in has and not asks and has & {*REPLIES, *ANSWERS, "chosen", "completions"}:
        row = {name: value for name, value in row.items() if name != "input"} | {"question": row["input"]}
    return row


def recognise(row):
    """Name of a row's format, from its fields (none of them null), or None."""
    has = row.keys()
    asks = has & {*PROMPTS, *TURNS}
    if asks and {"completions", "ranks"} <= has:
        return "rankings"
    if {"chosen", "rejected"} <= has:
        return "preferences" if asks or isinstance(row["chosen"], (list, dict)) else "transcripts"
    if not asks:
        return "plain text" if "text" in has else None
    if has & {*REPLIES, *TURNS}:
        if isinstance(row.get("label"), bool):
            return "labelled replies"
        if is_number(first(row, RATINGS)):
            return "rated replies"
        return "conversations" if has & {*TURNS} else "instructions"
    return "questions" if has & {*TASKS} and has & {*WORKED} else "prompts"


def parse(row, form, want):
    """A checked Row of kind want ('demonstrations', 'preferences', 'prompts') from an object of a known format, nulls left out.

    Raises BadRow with the reason if it has to be dropped, TypeError if it is not of this format.
    """
    parsed = FORMATS[form][0](row, want)
    prompt, replies, ranks = parsed.prompt, parsed.replies, parsed.ranks
    system = first(row, ("system", "system_prompt"), "")
    if not isinstance(system, str):
        raise TypeError("the system field is not a string")
    if system.strip() and prompt and prompt[0]["role"] != "system":  # a system turn of the conversation itself wins
        prompt = [{"role": "system", "content": system.strip()}] + prompt
    if want == "prompts":
        replies, ranks = [], []
    answer = find_answer(row)
    margin, truth = row.get("margin", 0.0), row.get("gold", [])
    if not isinstance(truth, list) or not all(is_number(x) and math.isfinite(x) for x in [*ranks, *truth, margin]):
        raise TypeError("a rank, a gold score or the margin is not a finite number")
    if want == "demonstrations" and len(replies) > 1:
        replies, ranks = [replies[min(range(len(ranks)), key=ranks.__getitem__)]], [0]
    if not all(isinstance(reply, str) for reply in replies):
        raise TypeError("a reply is missing or not a string")
    if not all(reply.strip() for reply in replies):
        raise BadRow("empty reply")
    if form != "plain text":
        replies = [reply.strip() for reply in replies]
        if not prompt or not prompt[-1]["content"]:
            raise BadRow("empty prompt")
        if prompt[-1]["role"] != "user":
            raise BadRow("the prompt doesn't end with the user")
        if not all(turn["content"] for turn in prompt):
            raise BadRow("empty turn")
    texts = [*replies, answer, *(turn["content"] for turn in prompt)]
    if any(re.search(r"[\0\ud800-\udfff]", text) for text in texts):
        raise BadRow("a NUL character or half a surrogate pair, which is no text")
    if len(replies) > 1 and len(set(replies)) == 1:
        raise BadRow("chosen equals rejected")
    if len(replies) > 1 and len(set(ranks)) == 1:
        raise BadRow("all replies tied")
    truth = truth if want == "preferences" and len(truth) == len(replies) else []
    return Row(prompt, replies, ranks, float(margin), truth, answer)


def expand(row):
    """A self-instruct row (instances: a list of input and output) as one instruction row each; any other as it is."""
    instances = row.get("instances")
    if instances is None or "instruction" not in row:
        return [row]
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances):
        raise TypeError("instances is not a list of objects with input and output")
    return [{"instruction": row["instruction"]} | instance for instance in instances] or [row]


def merge(rows, want, dropped):
    """Rows of one rated reply each -> a ranking per prompt (preferences) or its best reply (demonstrations).

    Of equal replies to a prompt the first counts. Adds to dropped, by reason, the rows that go.
    """
    groups, merged = {}, []
    for row in rows:
        groups.setdefault(json.dumps(row.prompt), []).append(row)
    for group in groups.values():
        if want == "demonstrations":
            best = min(group, key=lambda row: row.ranks[0])
            best.ranks = [0]
            merged.append(best)
            dropped["rated no higher than another reply to the same prompt"] += len(group) - 1
            continue
        ranks = {}
        for row in group:
            ranks.setdefault(row.replies[0], row.ranks[0])
        dropped["the same reply to the same prompt again"] += len(group) - len(ranks)
        if len(set(ranks.values())) > 1:
            merged.append(Row(group[0].prompt, list(ranks), list(ranks.values())))
        else:
            dropped["no second rating of the same prompt to compare with"] += len(ranks)
    return merged


# ---------------------------------------------------------------------------------------------------------
# Files, mixtures of files, parts

LONGEST = 2**24  # bytes or characters of one row; a longer one is a file of another kind


def unique_fields(pairs):
    """A JSON object as a dict; ValueError if a field comes twice, as only the last would count."""
    row = dict(pairs)
    if len(row) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the field {name[:40]!r} comes twice in one object")
    return row


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=unique_fields, parse_constant=refuse_constant)


def guess_encoding(raw):
    """GBK or UTF-16, where bytes look like it; else ""."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    try:
        foreign = [letter.encode("gb18030") for letter in raw.decode("gb18030") if not letter.isascii()]
    except UnicodeDecodeError:
        return ""
    # Chinese text is made of the 3,755 characters in daily use, which begin with bytes from B0 to D7, and of
    # punctuation from A1 to A3. What other encodings have there seldom decodes, or to rare characters.
    # Korean alone decodes to common ones, all of them up to C8.
    daily = {*range(0xA1, 0xA4), *range(0xB0, 0xD8)}
    common = [code for code in foreign if code[0] in daily and code[1] >= 0xA1]
    return "GBK" if len(common) > 0.9 * len(foreign) and max(common) > b"\xc9" else ""


def decode_text(raw, path, line=1):
    """UTF-8 bytes, which begin at a line of a file, as text, without a byte order mark."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        newlines = error.object[:error.start].count(b"\n")
        encoding = guess_encoding(raw)
        guess = f"it looks like {encoding}; " if encoding else ""
        raise UserError(f"{path}:{line + newlines} is not UTF-8 text; {guess}convert it: "
                        f"iconv -f {encoding or 'ITS_ENCODING'} -t UTF-8 FILE > NEW") from None


def decode_json(text, at, path, line, where):
    """(value, end) of the JSON value that starts at a place of a text, whose own first line has this number in the file."""
    try:
        value, end = DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1} is not valid JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    require(end - at <= LONGEST, f"{where} is longer than {LONGEST >> 20} million characters")
    return value, end


def read_lines(file, path):
    """Rows of JSON Lines, one line in memory at a time; of a line that holds none, the UserError."""
    for number in itertools.count(1):
        raw = file.readline(LONGEST + 1)
        if not raw:
            return
        where = f"{path}:{number}"
        try:
            while len(raw) > LONGEST and (rest := file.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass  # to the end of the line
            require(len(raw) <= LONGEST, f"{where} is longer than {LONGEST >> 20} MB: is there one object per line?")
            text = decode_text(raw, path, number).strip()
            if not text:
                continue
            row, end = decode_json(text, 0, path, number, where)
            require(end == len(text), f"{where} is not valid JSON: something follows the first value")
        except UserError as error:
            row = error
        yield where, row


def read_array(file, path):
    """Rows of a JSON array, decoded one by one."""
    text = decode_text(file.read(), path)
    step = re.compile(r"\s*([\[,\]])\s*")
    mark = step.match(text)
    require(mark and mark[1] == "[", f"{path} holds no array of rows at its top; if every line is an object, name it .jsonl")
    number, at, mark = 0, mark.end(), step.match(text, mark.end())
    while not (mark and mark[1] == "]"):
        number += 1
        where = f"{path}, row {number}"
        row, at = decode_json(text, at, path, 1, where)
        yield where, row
        mark = step.match(text, at)
        require(mark and mark[1] != "[", f"{where} is not valid JSON: neither a comma nor ] follows it")
        at = mark.end()
    require(mark.end() == len(text), f"{path} is not valid JSON: something follows the array")


def read_document(file, path):
    """A .txt file as one row of plain text."""
    yield str(path), {"text": decode_text(file.read(), path).replace("\r\n", "\n")}


# Columns of a csv that hold numbers (or true and false), and those that hold lists or objects, as JSON.
NUMBERS = {*RATINGS, "label", "labels", "margin"}
LISTS = {*TURNS, "completions", "ranks", "gold", "instances", "history", "reward_model"}
# Columns that hold text, or messages as JSON.
TALKS = {*PROMPTS, *REPLIES, "chosen", "rejected"}
# A first line without any of these names no columns.
COLUMNS = {*PROMPTS, *REPLIES, *TURNS, *WORKED, "input", "chosen", "rejected", "text", "human_ref_A"}


def parse_cell(name, text):
    """What a cell of a csv's column holds: text, but for the columns that are never text."""
    if name in NUMBERS:
        known = {"true": True, "false": False, "": None}
        return known.get(text.strip().lower(), as_number(text))
    if name in LISTS and not text.strip():
        return None
    if (name in LISTS and text.strip()[0] in "[{") or (name in TALKS and re.match(r"\s*(\[\s*)?\{", text)):
        try:
            return DECODER.decode(text)
        except (ValueError, RecursionError):
            return text  # which is refused where the list is used
    return text


def read_table(file, path):
    """Rows of a .csv or .tsv file, whose first line names the columns."""
    text = decode_text(file.read(), path).replace("\r\n", "\n")
    line = text.count("\n", 0, max(text.find("\0"), 0)) + 1
    require("\0" not in text, f"{path}:{line} holds a NUL character, which is no text")
    delimiter = "\t" if path.endswith(".tsv") else ","
    cells = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = None
    limit = csv.field_size_limit(LONGEST)  # of the whole process, so it is put back
    try:
        while True:
            where = f"{path}:{cells.line_num + 1}"
            try:
                row = next(cells, None)
            except csv.Error as error:
                open_quote = "unexpected end of data" in str(error)
                reason = "a quote that opens in this row is never closed" if open_quote else error
                raise UserError(f"{where} is not a valid row: {reason}") from None
            if row is None:
                return
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                check_header(header, where)
            elif len(row) != len(header):
                yield where, UserError(f"{where} has {len(row)} columns, the header has {len(header)}")
            else:
                yield where, {name: parse_cell(name, text) for name, text in zip(header, row) if name}
    finally:
        csv.field_size_limit(limit)


def check_header(names, where):
    """UserError unless the first line of a csv names columns that are known here, each once."""
    shown = ", ".join(repr(name[:40])[1:-1] for name in names[:8])
    require(COLUMNS & set(names),
            f"{where} is no header: the first line must name the columns (prompt, completion, chosen, ...), "
            f"and this one has {shown}")
    for name, n in Counter(filter(None, names)).items():
        require(n == 1, f"{where} names the column {name[:40]!r} {n} times")


def one_line(error):
    """A library's message, which may be a page long."""
    return " ".join(str(error).split())[:200]


def read_parquet(file, path):
    """Rows of a .parquet file, a batch in memory at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install -r requirements-hf.txt") from None
    try:
        number = itertools.count(1)
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                yield f"{path}, row {next(number)}", row
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path} can't be read: {one_line(error)}") from None


def read_hub(spec):
    """Rows of a data set on the Hugging Face hub, or in the cache of its library: hf:org/name/config:split."""
    parts = re.fullmatch(r"hf:([^/:]+/[^/:]+)(?:/([^/:]+))?(?::(.+))?", spec)
    require(parts, f"{spec}: write hf:org/name, hf:org/name:split or hf:org/name/config:split")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{spec} needs datasets: pip install -r requirements-hf.txt") from None
    try:
        rows = datasets.load_dataset(parts[1], parts[2], split=parts[3] or "train")
    except Exception as error:  # network, names, splits, formats: anything may come up
        raise UserError(f"{spec} can't be loaded ({type(error).__name__}: {one_line(error)})") from None
    for number, row in enumerate(rows, 1):
        yield f"{spec}, row {number}", row


READERS = {".json": read_array, ".json.gz": read_array, ".jsonl": read_lines, ".jsonl.gz": read_lines, ".txt": read_document,
           ".csv": read_table, ".csv.gz": read_table, ".tsv": read_table, ".parquet": read_parquet}


def files_to_name(folder):
    """What to name in place of a folder: the files in it, or one level below, that are read."""
    files = [*Path(folder).glob("*"), *Path(folder).glob("*/*")]
    found = sorted(path for path in files if path.name.endswith(tuple(READERS)))
    if not found:
        return f"it holds no file that is read ({', '.join(READERS)})"
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"name a file in it, or several with commas: {', '.join(map(str, found[:5]))}{more}"


def read_objects(path):
    """Yield (where, dict) for every row of a file or of an hf: data set, or a UserError, which names file and line, in place of a dict."""
    if path.startswith("hf:") and not os.path.isfile(path):
        yield from read_hub(path)
        return
    require(not os.path.isdir(path), f"{path} is a folder; {files_to_name(path)}")
    require(os.path.isfile(path), f"{path}: no such file")
    reader = next((reader for ending, reader in READERS.items() if path.endswith(ending)), None)
    require(reader, f"{path}: only {', '.join(READERS)} are read")
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            for where, row in reader(file, path):
                yield where, row if isinstance(row, (dict, UserError)) else UserError(f"{where} is not a JSON object with named fields")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def describe_singles(rated):
    """What rows with one labelled or rated reply each are, and lack, where no prompt has two that differ."""
    good = sum(row.ranks[0] == 0 for row in rated)
    bad = sum(row.ranks[0] == 1 for row in rated)
    labelled = good + bad == len(rated)
    kind = f"with good or bad labels ({good} true, {bad} false)" if labelled else "with ratings"
    return (f"{len(rated)} single replies {kind}, and no prompt with two that are labelled or rated "
            "differently; preferences compare replies to the same prompt: give each prompt a chosen and a "
            "rejected reply, or a row for each of its replies; sft.py can train on the good ones")


def read_source(path, want, say, skip_bad=False):
    """Rows of kind want from one file or hf: data set; says what it found and dropped. skip_bad: up to one row in a hundred may be unreadable."""
    rows, rated, formats, dropped, bad = [], [], Counter(), Counter(), []
    for number, (where, found) in enumerate(read_objects(path), 1):
        form, fields = "no known format", "none"
        try:
            if isinstance(found, UserError):
                raise found
            fields = ", ".join(repr(name[:40])[1:-1] for name in list(found)[:8]) or "none"
            for row in expand({name: value for name, value in found.items() if value is not None}):
                row = translate(row)
                form = recognise(row)
                require(form and want in FORMATS[form][1],
                        f"{where} doesn't hold {NEEDED[want]}; its fields are {fields}{advice(row, want)}")
                formats[form] += 1
                try:
                    to_merge = form == "rated replies" and want != "prompts" or form == "labelled replies" and want == "preferences"
                    (rated if to_merge else rows).append(parse(row, form, want))
                except BadRow as reason:
                    dropped[str(reason)] += 1
        except (TypeError, OverflowError, UserError) as error:
            bad.append(error if isinstance(error, UserError) else UserError(f"{where}: {error} (read as {form}; its fields are {fields})"))
            if not skip_bad:
                raise bad[0] from None
    if bad:
        require(100 * len(bad) <= number, f"{path}: {len(bad)} of {number} rows can't be read, and --skip-bad leaves out one in a hundred at most; the first is {bad[0]}")
        say(f"warning: {path}: left out {len(bad)} of {number} rows; the first is {bad[0]}")
    rows += merge(rated, want, dropped)
    reasons = [f"; dropped {n}: {reason}" for reason, n in dropped.most_common() if n]
    say(f"{path}: {sum(formats.values())} rows ({', '.join(formats) or 'no format'}), {len(rows)} kept as {want}"
        + (", one for all replies to a prompt" if rated else "") + "".join(reasons[:8]) + ("; ..." if len(reasons) > 8 else ""))
    require(rows or not rated, f"{path} holds {describe_singles(rated)}")
    require(rows, f"{path} holds no usable row")
    for row in rows:
        row.document = path.endswith(".txt")
    return rows


def parse_sources(spec):
    """[(path, weight or None)] of a.jsonl, of several with commas, or of a mixture a.jsonl:0.8,b.json:0.2."""
    sources, pieces = [], spec.split(",")
    while pieces:
        for n in range(len(pieces), 0, -1):  # a file may have commas and colons in its name: the longest name that exists
            path, weight = ",".join(pieces[:n]).strip(), None
            if not os.path.isfile(path):
                try:
                    path, weight = path.rpartition(":")[0], float(path.rpartition(":")[2])
                except ValueError:
                    path, weight = ",".join(pieces[:n]).strip(), None
            if os.path.isfile(path):
                break
        sources.append((path, weight))
        pieces = pieces[n:]
    weights = [weight for _, weight in sources]
    require(weights.count(None) in (0, len(weights)), f"{spec}: give every file a weight (a.jsonl:0.8,b.jsonl:0.2), or none")
    require(all(weight is None or 0 < weight < math.inf for weight in weights), f"{spec}: a weight must be > 0")
    for path, n in Counter(path for path, _ in sources).items():
        require(path and n == 1, f"{spec} names {path or 'nothing'} {'twice' if path else 'between two commas'}")
    return sources


def unit_hash(text, salt=""):
    """A number in [0, 1) that depends on a text alone, and looks drawn at random."""
    return int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:4], "big") / 2**32


def cut_place(text, share):
    """Where to cut a text in two, so that about this share of it comes first. What comes last is never blank.

    It is the nearest blank line, unless that changes the smaller piece by more than half; else the end of a
    line, a space, or anywhere.
    """
    end = len(text.rstrip())
    wanted = max(1, min(round(share * end), end - 1))
    for mark in ("\n\n", "\n", " "):
        marks = (text.rfind(mark, 0, wanted + len(mark)), text.find(mark, wanted, end))
        places = [at + len(mark) for at in marks if at >= 0 and at + len(mark) < end]
        place = min(places, key=lambda at: abs(at - wanted), default=0)
        if abs(place - wanted) <= min(wanted, end - wanted) / 2:
            return place
    return wanted


def piece_of(document, start, end):
    """The part of a document between two shares of its length, as a list of one row; [] if it is blank."""
    text = document.text
    start = cut_place(text, start) if 0 < start < 1 else round(start) * len(text)
    end = cut_place(text, end) if 0 < end < 1 else round(end) * len(text)
    piece = text[start:end]
    return [replace(document, replies=[piece])] if piece.strip() else []


def split_by_prompt(rows, fraction, say=None):
    """(training, held-out) rows: a prompt is held out by its hash, so the same prompt is never on both sides.

    Of a document it is the last share of the text. say: to say it with, if nothing is held out.
    """
    train, held_out = [], []
    for row in rows:
        if row.document:
            train += piece_of(row, 0, 1 - fraction)
            held_out += piece_of(row, 1 - fraction, 1)
        else:
            (held_out if unit_hash(row.text) < fraction else train).append(row)
    if say and fraction and train and not held_out:
        say(f"warning: --val-fraction {fraction} holds out none of these {len(rows)} rows (a hash of its "
            "prompt decides on each), so nothing is measured on held-out rows; a larger --val-fraction holds "
            "out some")
    return train, held_out


def take_part(rows, part):
    """Rows of one part of a split such as 2/4/4:1: shares of the stages, then this stage's number, from 1.

    A prompt's part goes by a hash of its own, so that every part has the same share of the prompts of
    `split_by_prompt`; a document is cut, one part behind the other.
    """
    form = re.fullmatch(r"((?:\d+\.?\d*/)*\d+\.?\d*):(\d+)", part)
    shares = [float(share) for share in form[1].split("/")] if form else []
    require(form and min(shares) > 0 and 1 <= int(form[2]) <= len(shares),
            f"--part {part}: write the shares of the stages and the number of this one, as in 2/4/4:1")
    number, ends = int(form[2]), [0.0, *itertools.accumulate(shares)]
    kept = []
    for row in rows:
        if row.document:
            kept += piece_of(row, ends[number - 1] / ends[-1], ends[number] / ends[-1])
        elif bisect.bisect(ends[1:], unit_hash(row.text, "part ") * ends[-1]) + 1 == number:
            kept.append(row)
    return kept


def read_rows(spec, want, say=print, part="", skip_bad=False):
    """Rows of kind want ('demonstrations', 'preferences', 'prompts') from what --data names: see `parse_sources`.

    part: see `take_part`; skip_bad: see `read_source`. Of a mixture come as many rows as its weights allow when no row is repeated.
    """
    sources, found = parse_sources(str(spec)), []
    for path, _ in sources:
        rows = read_source(path, want, say, skip_bad)
        if part:
            kept = take_part(rows, part)
            say(f"{path}: {len(kept)} of {len(rows)} rows are in part {part}")
            require(kept, f"{path} has no row in part {part}")
            rows = kept
        found.append(rows)
    if sources[0][1] is not None:
        total = sum(weight for _, weight in sources)
        shares = [weight / total for _, weight in sources]
        size = min(len(rows) / share for rows, share in zip(found, shares))
        for i, (rows, share) in enumerate(zip(found, shares)):
            count = int(size * share + 1e-6)  # which rounding must not lower
            require(count, f"{spec}: the share of {sources[i][0]} is less than a row")
            found[i] = [rows[j] for j in sorted(np.random.default_rng(i).permutation(len(rows))[:count])]  # the same ones every time
        say(f"mixture of {sum(map(len, found))} rows: " + ", ".join(f"{len(rows)} of {path}" for rows, (path, _) in zip(found, sources)))
    return [row for rows in found for row in rows]
