"""One row type for every stage, and the formats that people have their rows in.

A row is a prompt (a conversation that awaits an answer) and its replies: none for prompts, one for a demonstration, K with
ranks for preferences (a chosen/rejected pair is K = 2).
"""
import itertools
import json
import math
import re
from dataclasses import dataclass, field

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
