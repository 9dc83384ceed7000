"""One row type for every stage, and the formats that people have their rows in.

A row is a prompt (a conversation that awaits an answer) and its replies: none for prompts, one for a
demonstration, K with ranks for preferences (a chosen/rejected pair is K = 2), one or more with rank 0, good,
or 1, bad, for labels. Feedback is preferences and what else people say of replies: that they are as good as
each other, all bad or all good, or how many points each is worth. For process rewards a row has the steps of
one reply instead, and a label for each.
"""
import json
import math
import re
from dataclasses import dataclass, field

# ---------------------------------------------------------------------------------------------------------
# Rows and the formats they come in

@dataclass
class Row:
    """A prompt and its replies."""
    # Turns [{"role": "system" | "user" | "assistant", "content": str}], the last one by the user.
    # [] for plain text.
    prompt: list
    # Of str.
    replies: list = field(default_factory=list)
    # One number per reply: lower is better, equal is a tie.
    ranks: list = field(default_factory=list)
    # By how much the first should win; see reward.py.
    margin: float = 0.0
    # True scores of the replies, one number each, where somebody knows them (synthetic data).
    gold: list = field(default_factory=list)
    # The result that a reply ought to reach, where it can be checked ("72").
    answer: str = ""
    # A whole file of running text, which is split by position, not by hash.
    document: bool = False
    # Of a pair: that the first is the better one; see dpo.py. As feedback: that the better by rank is.
    probability: float = 1.0
    # The part of a benchmark that the row belongs to; "" if none is named.
    subset: str = ""
    # A word on all replies, instead of an order among them: one of VERDICTS, or "".
    verdict: str = ""
    # Of a pair judged on a scale: how far from the middle, a tie, to one end, from 0 to 1.
    strength: float | None = None
    # Of each reply {aim: number}, higher is better, as far as they are known; [] where nobody rated.
    ratings: list = field(default_factory=list)
    # Of str, the steps of one reply, each without the separator behind it.
    steps: list = field(default_factory=list)
    # Of each step -1, 0 or 1: bad, neutral, good; None where nobody says.
    labels: list = field(default_factory=list)
    # Whether the reply ends behind the last of the steps.
    finished: bool = True

    @property
    def text(self):
        """The prompt as one string: what it is known by, whatever its replies.

        Plain text is known by itself.
        """
        prompt = "\n\n".join(message["content"] for message in self.prompt)
        return prompt or "".join(self.replies[:1])


class BadRow(Exception):
    """A row that is dropped; its text is the reason."""


# What files call the roles, in small letters, and what we call them.
ROLES = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant",
}
# Fields that hold a conversation, a prompt, a reply, and a number that is higher for a better reply.
TURNS = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question", "query", "problem")
REPLIES = ("output", "response", "completion")
RATINGS = ("rating", "score")
# What "verdict" may say.
VERDICTS = ("both_bad", "both_good")
# What is wanted where replies are compared.
COMPARED = ("preferences", "feedback")
# Fields that hold such a number in one of a row's several replies.
JUDGED = ("fine-grained_score", "overall_score", *RATINGS)
# Prompts that pose a task, and the answer to it, which is a reply as well. One with its working comes first.
TASKS = ("question", "query", "problem")
WORKED = ("solution", "answer", "target")
# What a reply is checked by, the surest first.
ANSWERS = ("ground_truth", "answer", "solution", "target")


def first(row, names, default=None):
    """The first of these fields that a row has and that is not null."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    return default


def has_prompt(row):
    """Whether a row has a field that holds a prompt or a conversation."""
    return bool(row.keys() & {*PROMPTS, *TURNS})


def is_list_of(kind, value):
    """Whether value is a list whose items are all of one type."""
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def as_number(value):
    """A number from its text, all that a csv has; anything else as it is."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value):
        return float(value)
    return value


def number_text(x):
    """A number as people write it: a whole one has no decimal point, whatever type its column has."""
    if isinstance(x, float) and x.is_integer():
        x = int(x)
    return str(x)


def find_result(text):
    """The result of a worked answer: behind the last #### (GSM8K), in the last \\boxed{} (MATH), or all."""
    _, mark, result = text.rpartition("####")
    # Where #### only begins a heading, what follows is no result.
    several_lines = "\n" in result.strip()
    boxed_instead = "\\boxed{" in text and not re.search(r"\d", result)
    if mark and not several_lines and not boxed_instead:
        return result.strip().rstrip(".").replace(",", "")
    _, mark, result = text.rpartition("\\boxed{")
    if mark:
        # The box ends at the bracket that closes it, and there may be others in it.
        depth = 1
        for i, letter in enumerate(result):
            depth += {"{": 1, "}": -1}.get(letter, 0)
            if depth == 0:
                return result[:i].strip()
    return text.strip()


def find_answer(row):
    """The answer of a row that can be checked, as text; "" if it has none."""
    values = [row.get(name) for name in ANSWERS]
    # DAPO and verl have it one level down.
    judged = row.get("reward_model")
    if isinstance(judged, dict):
        values.insert(0, judged.get("ground_truth"))
    for value in values:
        if is_number(value) and math.isfinite(value):
            return number_text(value)
        if isinstance(value, str) and value.strip():
            return find_result(value)
    return ""


def parse_content(content):
    """The stripped text of a turn: a string, or a list of {"type": "text", "text": str} parts."""
    if isinstance(content, list):
        content = "".join(map(text_of_part, content))
    if content is None:
        raise BadRow("a turn without text")
    if not isinstance(content, str):
        raise TypeError("the text of a turn is not a string")
    return content.strip()


def text_of_part(part):
    """The text of a part of a turn; BadRow if it is an image or the like."""
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise BadRow("a turn with parts that are no text")
    return part["text"]


def split_exchanges(messages):
    """Messages, those of the kind {human: text, assistant: text} as the two that they are."""
    for message in messages:
        if message.keys() >= {"human", "assistant"}:
            yield {"role": "human", "content": message["human"]}
            yield {"role": "assistant", "content": message["assistant"]}
        else:
            yield message


def parse_messages(messages):
    """A list of {role or from, content or value} -> turns as `Row` has them.

    They must come in this order: [system], user, assistant, user, ... A single turn by the assistant passes
    too: it is how some files hold a reply.
    """
    if not is_list_of(dict, messages):
        raise TypeError("a conversation is not a list of objects with role and content (or from and value)")
    turns = []
    for message in split_exchanges(messages):
        role = first(message, ("role", "from"))
        if not isinstance(role, str):
            raise TypeError("a message has no role")
        if role.lower() not in ROLES:
            raise BadRow(f"a turn by {role[:20]!r}, who is not system, user or assistant")
        content = parse_content(first(message, ("content", "value")))
        turns.append({"role": ROLES[role.lower()], "content": content})
    if turns and turns[0] == {"role": "system", "content": ""}:
        turns = turns[1:]
    roles = [turn["role"] for turn in turns]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    by_turns = ["user", "assistant"] * len(roles)
    if roles != by_turns[:len(roles)] and roles != ["assistant"]:
        raise BadRow("roles don't alternate")
    return turns


def parse_transcript(text):
    """Turns of an HH-RLHF transcript: each begins with a blank line and 'Human:' or 'Assistant:'."""
    pieces = re.split(r"\n\n(Human|Assistant):", text)
    if pieces[0].strip() or len(pieces) == 1:
        raise BadRow("no transcript with Human: and Assistant: turns")
    messages = []
    for speaker, content in zip(pieces[1::2], pieces[2::2]):
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": content})
    return parse_messages(messages)


def split_reply(turns):
    """(prompt, reply) of a conversation that ends with the assistant."""
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("no reply by the assistant at the end")
    return turns[:-1], turns[-1]["content"]


def parse_prompt(row):
    """Turns up to the user's last, from one of PROMPTS; else from one of TURNS."""
    prompt = first(row, PROMPTS)
    if prompt is None:
        return parse_messages(first(row, TURNS))
    if isinstance(prompt, list):
        return parse_messages(prompt)
    extra = first(row, ("input", "context"), "")
    history = row.get("history", [])
    if not isinstance(prompt, str) or not isinstance(extra, str):
        raise TypeError("the prompt is not a string")
    if not is_list_of(list, history) or any(len(turn) != 2 for turn in history):
        raise TypeError("history is not a list of [question, answer]")
    if prompt.startswith("\n\nHuman:") and prompt.rstrip().endswith("\n\nAssistant:"):
        # The transcript's last turn is the assistant's, and empty.
        return parse_transcript(prompt)[:-1]
    messages = []
    for question, answer in history:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    paragraphs = [text.strip() for text in (prompt, extra) if text.strip()]
    messages.append({"role": "user", "content": "\n\n".join(paragraphs)})
    return parse_messages(messages)


def parse_reply(value, prompt):
    """(prompt, reply) from what a row calls a reply.

    value: the reply's text, a message, or a list of messages, the prompt's among them perhaps. Where the row
    has no prompt (None) it is a whole conversation, as text an HH-RLHF transcript.
    """
    if isinstance(value, str):
        if prompt is None:
            return split_reply(parse_transcript(value))
        return prompt, value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise TypeError("a reply is missing or not a string")
    whole, reply = split_reply(parse_messages(value))
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
        raise TypeError("the answer is the number of a choice; write the choices into the prompt, "
                        "and the answer out")
    if is_number(reply):
        reply = number_text(reply)
    if not isinstance(reply, str):
        raise TypeError("the answer is neither text nor a number")
    if "####" in reply:
        reply = re.sub(r"<<[^<>]*>>", "", reply)
    return Row(parse_prompt(row), [reply], [0])


def parse_single(row, want):
    """A prompt, or a conversation, with one reply.

    The reply may be labelled (true, false) or rated (higher is better).
    """
    label = row.get("label")
    if want == "demonstrations" and label is False:
        raise BadRow("label false")
    talk = first(row, TURNS)
    if talk is None:
        prompt = parse_prompt(row)
        if want == "prompts":
            return Row(prompt)
        prompt, reply = parse_reply(first(row, REPLIES), prompt)
    else:
        turns = parse_messages(talk)
        awaits_answer = not turns or turns[-1]["role"] != "assistant"
        if want == "prompts" and awaits_answer:
            return Row(turns)
        prompt, reply = split_reply(turns)
    if want == "prompts":
        return Row(prompt)
    return Row(prompt, [reply], [rank_of(label, first(row, RATINGS))])


def rank_of(label, rating):
    """The rank of a reply, lower is better, from its label or else its rating; 0 if it has neither."""
    if isinstance(label, bool):
        return 0 if label else 1
    if is_number(rating):
        return -rating
    return 0


def parse_pair(row, want):
    """A prompt with chosen and rejected replies, or both as whole conversations that share the prompt."""
    given = parse_prompt(row) if has_prompt(row) else None
    prompt, chosen = parse_reply(row["chosen"], given)
    other, rejected = parse_reply(row["rejected"], given)
    if prompt != other:
        raise BadRow("prompts differ")
    # Some files name a demonstration beside the pair.
    reply = first(row, REPLIES)
    if want == "demonstrations" and isinstance(reply, str):
        return Row(prompt, [reply], [0])
    return Row(prompt, [chosen, rejected], [0, 1])


def parse_ranking(row, want):
    """A prompt with K replies and their ranks, lower is better; or with a scale or verdict in their place."""
    replies = row["completions"]
    ranks = row.get("ranks")
    if ranks is None and isinstance(replies, list):
        # A scale says how much better the first is; a verdict ranks none before another.
        ranks = [0] * len(replies) if "verdict" in row else list(range(len(replies)))
    elif "scale" in row:
        raise TypeError("scale and ranks both say which reply is the better one")
    if not isinstance(replies, list) or not isinstance(ranks, list):
        raise TypeError("completions and ranks are not lists")
    if want == "scored":
        # Ranks are those within a prompt; scores can be compared with those of others.
        ranks = scores_as_ranks(row, ranks)
    if len(replies) != len(ranks) or len(replies) < (1 if want == "replies" else 2):
        raise BadRow("completions and ranks don't match, or fewer than two")
    return Row(parse_prompt(row), replies, ranks)


def scores_as_ranks(row, ranks):
    """The negatives of a ranking's scores, or else of its gold scores; the ranks if it has neither."""
    scores = first(row, ("scores", "gold"))
    if scores is None:
        return ranks
    if not isinstance(scores, list) or not all(map(is_number, scores)):
        raise TypeError("scores is not a list of numbers")
    return [-score for score in scores]


def find_scale(row, replies):
    """Probability that the first of two replies is the better one, by a row's scale; None if it has none.

    {"value": v, "points": n}: 1 is the second by far, n the first by far, the middle a tie.
    """
    scale = row.get("scale")
    if scale is None:
        return None
    numbers = [scale.get(name) for name in ("value", "points")] if isinstance(scale, dict) else [None]
    if not all(is_number(x) and math.isfinite(x) for x in numbers):
        raise TypeError('the scale is not {"value": number, "points": number}')
    value, points = numbers
    if not (points >= 2 and 1 <= value <= points):
        raise TypeError(f"value {value:g} is not on a scale from 1 to {points:g}, of 2 points or more")
    if len(replies) != 2 or "probability" in row:
        raise TypeError("a scale compares two replies, and leaves no room for a probability")
    return (value - 1) / (points - 1)


def likelier_first(ranks, probability):
    """(ranks, probability) of a pair whose first is right with a probability, so that it is above 1/2.

    One of 1/2 makes a tie.
    """
    if probability == 0.5:
        return [0, 0], 1.0
    if probability < 0.5:
        return ranks[::-1], 1 - probability
    return ranks, probability


def find_verdict(row, want):
    """A row's verdict on all of its replies, "" if it has none. BadRow where only an order is of use."""
    verdict = row.get("verdict", "")
    known = isinstance(verdict, str) and verdict in VERDICTS
    if verdict != "" and not known and want in COMPARED:
        raise TypeError(f"the verdict is neither {' nor '.join(VERDICTS)}")
    if known and want not in ("feedback", "replies", "prompts"):
        raise BadRow("a verdict on all replies, which compares none")
    return verdict if known else ""


def find_ratings(row, form):
    """[{aim: number}] of a rated reply, or of a ranking's replies; [] if nobody rated them.

    An aim without a name is called rating.
    """
    if form == "rated replies":
        found = [row.get("ratings", first(row, RATINGS))]
    elif form == "rankings":
        found = first(row, ("ratings", "scores"), [])
    else:
        return []
    if not isinstance(found, list):
        raise TypeError("ratings is not a list, of one object or number for each reply")
    ratings = []
    for given in found:
        named = given if isinstance(given, dict) else {"rating": given}
        known = {aim: number for aim, number in named.items() if number is not None}
        if not all(is_number(x) and math.isfinite(x) for x in known.values()):
            raise TypeError("a rating is not a finite number")
        ratings.append(known)
    return ratings if any(ratings) else []


def step_label(label):
    """A step's label in a file as -1, 0, 1 or None."""
    if isinstance(label, bool):
        return 1 if label else -1
    if label is None or is_number(label) and label in (-1, 0, 1):
        return label if label is None else int(label)
    raise TypeError("a label of a step is none of -1, 0 and 1 (bad, neutral, good), true, false and null")


def parse_steps(row, want):
    """A prompt, the steps of one reply, and their labels, which may stop before the steps do.

    A label is -1, 0 or 1, or true or false; null is none.
    """
    steps, labels, finished = row["steps"], row["labels"], row.get("finished", True)
    if not is_list_of(str, steps) or not isinstance(labels, list) or not isinstance(finished, bool):
        raise TypeError("steps is not a list of texts, labels no list, or finished neither true nor false")
    if len(labels) > len(steps):
        raise TypeError(f"{len(labels)} labels for {len(steps)} steps")
    known = [step_label(label) for label in labels]
    known += [None] * (len(steps) - len(known))
    if want == "prompts":
        return Row(parse_prompt(row))
    if not all(step.strip() for step in steps):
        raise BadRow("an empty step")
    if all(label is None for label in known):
        raise BadRow("no step has a label")
    return Row(parse_prompt(row), steps=steps, labels=known, finished=finished)


# Of each format: what parses it, and what it is good for.
FORMATS = {
    "instructions": (parse_single, ("demonstrations", "replies", "prompts")),
    "several replies": (parse_ranking, ("replies", "prompts")),
    "prompts": (parse_single, ("prompts",)),
    "questions": (parse_question, ("demonstrations", "replies", "prompts")),
    "conversations": (parse_single, ("demonstrations", "replies", "prompts")),
    "labelled replies":
        (parse_single, ("demonstrations", *COMPARED, "labels", "scored", "replies", "prompts")),
    "rated replies": (parse_single, ("demonstrations", *COMPARED, "scored", "replies", "prompts")),
    "preferences": (parse_pair, ("demonstrations", *COMPARED, "labels", "scored", "replies", "prompts")),
    "transcripts": (parse_pair, ("demonstrations", *COMPARED, "labels", "scored", "replies", "prompts")),
    "rankings": (parse_ranking, ("demonstrations", *COMPARED, "labels", "scored", "replies", "prompts")),
    "labelled steps": (parse_steps, ("steps", "prompts")),
    "plain text": (parse_plain, ("demonstrations",)),
}
NEEDED = {
    "demonstrations":
        "a prompt and a reply (instruction and output, prompt and completion, question and answer, messages) "
        "or text",
    "preferences":
        "a prompt, chosen and rejected (or completions and ranks, or a reply with a label, true or false, "
        "or a rating)",
    "labels":
        "a prompt and a reply with a label, true or false (or chosen and rejected, or completions and ranks)",
    "scored":
        "a prompt with replies of different quality: completions and ranks (or scores), chosen and rejected, "
        "or a reply with a label, true or false, or a rating",
    "feedback":
        "a prompt, chosen and rejected (or completions and ranks, a scale or a verdict, or a reply with a "
        "label, true or false, or a rating)",
    "replies":
        "a prompt and one or more replies (completions, chosen and rejected, or one reply)",
    "steps":
        "a prompt, the steps of a reply and their labels (steps and labels, or PRM800K's question and label)",
    "prompts":
        "a prompt (prompt, instruction, question, query, problem or messages)",
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
            "Chatbot Arena: make the winner's conversation chosen and the other one rejected; reward.py also "
            "learns from ties, as completions with ranks 0 and 0, and from those with verdict both_bad",
        ("answer_0", "answer_1", "score_0", "score_1"):
            "WebGPT: make the answer of the higher score chosen, the other rejected, question its full_text",
        ("response", "helpfulness"): "HelpSteer: rename helpfulness to rating",
    },
    "labels": {},
    "replies": {},
    "scored": {},
    "steps": {},
    "prompts": {},
}
REFUSED["feedback"] = REFUSED["preferences"]


def advice(row, want):
    """What to do about a row of a known data set that can't be used as it is; "" for any other."""
    for fields, text in REFUSED[want].items():
        if row.keys() >= {*fields}:
            return f" ({text})"
    return ""


def translate(row):
    """A row of SHP or UltraFeedback, or of input and a reply, in the terms above; any other as it is."""
    has = row.keys()
    if has >= {"history", "human_ref_A", "human_ref_B", "labels"}:
        return translate_shp(row)
    if "ranks" not in has and is_list_of(dict, row.get("completions")):
        row = row | rank_completions(row["completions"])
    # TRL's name for steps.
    if "ranks" not in has and "labels" in has and is_list_of(str, row.get("completions")):
        row = row | {"steps": row["completions"]}
    # A field input beside a prompt adds to it; alone, with a reply, it is the prompt.
    has_reply = has & {*REPLIES, *ANSWERS, "chosen", "completions"}
    if "input" in has and has_reply and not has_prompt(row):
        row = row | {"question": row["input"]}
        del row["input"]
    return row


def translate_shp(row):
    """A row of SHP as a pair."""
    a, b = row["human_ref_A"], row["human_ref_B"]
    if row["labels"] not in (0, 1):
        raise TypeError("labels is neither 1, for A, nor 0, for B")
    if row["labels"]:
        chosen, rejected = a, b
    else:
        chosen, rejected = b, a
    return {"prompt": row["history"], "chosen": chosen, "rejected": rejected}


def rank_completions(completions):
    """Fields completions, ranks and scores from UltraFeedback's list of objects, each a reply and its scores.

    No fields if none has a score.
    """
    texts, scores = [], []
    for completion in completions:
        score = as_number(first(completion, JUDGED))
        if is_number(score):
            texts.append(first(completion, REPLIES))
            scores.append(score)
    ranks = [-score for score in scores]
    return {"completions": texts, "ranks": ranks, "scores": scores} if texts else {}


def recognise(row):
    """Name of a row's format, from its fields (none of them null), or None."""
    has = row.keys()
    asks = has_prompt(row)
    if asks and "completions" in has and has & {"ranks", "scale", "verdict"}:
        return "rankings"
    if asks and {"steps", "labels"} <= has:
        return "labelled steps"
    if asks and is_list_of(str, row.get("completions")):
        return "several replies"
    if {"chosen", "rejected"} <= has:
        has_messages = isinstance(row["chosen"], (list, dict))
        return "preferences" if asks or has_messages else "transcripts"
    if not asks:
        return "plain text" if "text" in has else None
    if has & {*REPLIES, *TURNS}:
        if isinstance(row.get("label"), bool):
            return "labelled replies"
        if is_number(first(row, RATINGS)) or isinstance(row.get("ratings"), dict):
            return "rated replies"
        return "conversations" if has & {*TURNS} else "instructions"
    return "questions" if has & {*TASKS} and has & {*WORKED} else "prompts"


def parse(row, form, want):
    """A checked Row of a kind from an object of a known format.

    row: the object without its nulls; form: its format, of `FORMATS`; want: "demonstrations", "preferences",
    "feedback" (as preferences, but also ties, verdicts and ratings), "labels", "scored" (as preferences, but
    replies need not differ, and ranks are negative scores if it has some), "replies" (whatever is said of
    them), "steps" or "prompts". Raises
    BadRow with the reason if it has to be dropped, TypeError if it is not of this format.
    """
    parser, _ = FORMATS[form]
    parsed = parser(row, want)
    prompt = add_system(parsed.prompt, row)
    replies, ranks = parsed.replies, parsed.ranks
    if want == "prompts":
        replies, ranks = [], []
    answer = find_answer(row)
    margin = row.get("margin", 0.0)
    gold = row.get("gold", [])
    verdict = find_verdict(row, want)
    scale = find_scale(row, parsed.replies)
    probability = row.get("probability", 1.0) if scale is None else scale
    check_numbers(ranks, gold, margin, probability)
    if want in COMPARED and len(replies) > 2 and probability != 1:
        raise TypeError("a probability is that of a pair, and there are more than two replies")
    if len(ranks) == 2 and (want == "feedback" or (scale is not None and want != "preferences")):
        ranks, probability = likelier_first(ranks, probability)
    if want == "demonstrations" and len(replies) > 1:
        best = ranks.index(min(ranks))
        replies, ranks = [replies[best]], [0]
    if not is_list_of(str, replies):
        raise TypeError("a reply is missing or not a string")
    if not all(reply.strip() for reply in replies):
        raise BadRow("empty reply")
    # Of running text even the blanks at its ends count.
    if form != "plain text":
        replies = [reply.strip() for reply in replies]
        check_prompt(prompt)
    check_texts([*replies, *parsed.steps, answer])
    check_texts(turn["content"] for turn in prompt)
    compared = len(replies) > 1 and want not in ("scored", "replies")
    if compared and len(set(replies)) == 1:
        raise BadRow("chosen equals rejected")
    if compared and len(set(ranks)) == 1 and want != "feedback":
        raise BadRow("all replies tied")
    if want == "labels" and len(replies) > 1:
        replies, ranks = first_and_last(replies, ranks)
    if want not in COMPARED or len(gold) != len(replies):
        gold = []
    made = Row(prompt, replies, ranks, float(margin), gold, answer, probability=float(probability),
               steps=parsed.steps, labels=parsed.labels, finished=parsed.finished)
    return with_feedback(made, row, form, verdict, scale) if want == "feedback" else made


def with_feedback(made, row, form, verdict, scale):
    """A Row that was made from an object, and in it what else the object says of the replies."""
    if isinstance(row.get("subset"), str):
        made.subset = row["subset"]
    if verdict:
        made.verdict, made.ranks = verdict, [0] * len(made.replies)
    if scale is not None:
        made.strength = abs(2 * scale - 1)
    made.ratings = find_ratings(row, form)
    if made.ratings and len(made.ratings) != len(made.replies):
        raise TypeError("ratings or scores are not one for each reply")
    return made


def first_and_last(replies, ranks):
    """Replies and labels (0 good, 1 bad) of a ranking: the first in rank, and the last; no others."""
    ends = min(ranks), max(ranks)
    kept = [(reply, ends.index(rank)) for reply, rank in zip(replies, ranks) if rank in ends]
    return [reply for reply, _ in kept], [label for _, label in kept]


def add_system(prompt, row):
    """A prompt's turns, before them one with the row's system field, unless the conversation has its own."""
    system = first(row, ("system", "system_prompt"), "")
    if not isinstance(system, str):
        raise TypeError("the system field is not a string")
    if system.strip() and prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system.strip()}] + prompt
    return prompt


def check_numbers(ranks, gold, margin, probability):
    """TypeError unless the ranks, gold scores, margin and probability of a row are such numbers."""
    if not (is_number(probability) and 0 <= probability <= 1):
        raise TypeError("the probability is not a number between 0 and 1")
    if isinstance(gold, list):
        numbers = [*ranks, *gold, margin]
        if all(is_number(x) and math.isfinite(x) for x in numbers):
            return
    raise TypeError("a rank, a gold score or the margin is not a finite number")


def check_prompt(prompt):
    """BadRow unless a prompt's turns all say something, and the user speaks last."""
    if not prompt or not prompt[-1]["content"]:
        raise BadRow("empty prompt")
    if prompt[-1]["role"] != "user":
        raise BadRow("the prompt doesn't end with the user")
    if not all(turn["content"] for turn in prompt):
        raise BadRow("empty turn")


def check_texts(texts):
    """BadRow if one of these strings is not what every tokenizer and file takes for text."""
    for text in texts:
        if re.search(r"[\0\ud800-\udfff]", text):
            raise BadRow("a NUL character or half a surrogate pair, which is no text")


def expand(row, want):
    """The instruction rows of a self-instruct row, or the replies in steps of one of PRM800K, in our fields;
    of any other a list of it alone.

    instances: a list of objects with input and output, all for one instruction.
    """
    question, label = row.get("question"), row.get("label")
    if isinstance(question, dict) and isinstance(label, dict) and "problem" in question:
        replies = list(prm800k_replies(question, label))
        return replies[:1] if want == "prompts" else replies
    instances = row.get("instances")
    if instances is None or instances == [] or "instruction" not in row:
        return [row]
    if not is_list_of(dict, instances):
        raise TypeError("instances is not a list of objects with input and output")
    return [{"instruction": row["instruction"]} | instance for instance in instances]


def prm800k_replies(question, label):
    """Yield rows with steps and labels for a row of PRM800K: the reply that was labelled, then its branches.

    Each step has completions [{text, rating}] and the number of the one that the reply goes on with
    (chosen_completion), or what a person wrote in place of all of them (human_completion), which has no
    rating and counts as good; where it has neither, labelling ended with the first completion. Each other
    completion is a branch: a row in which that last step alone has a label, as those before it have theirs in
    the first row. Steps that are the beginning of what was sampled (pre_generated_steps) go on as that does.
    A problem that was reported as broken has no labels.
    """
    if not is_list_of(dict, label.get("steps")):
        raise TypeError("label.steps is not a list of objects")
    reply, ratings = [], []
    found = []  # (steps, labels) of the branches
    for step in label["steps"]:
        candidates = step.get("completions") or []
        human = step.get("human_completion")
        chosen = step.get("chosen_completion")
        if not is_list_of(dict, candidates):
            raise TypeError("the completions of a step are not a list of objects")
        ended = chosen is None and human is None
        if ended:
            chosen = 0
        for number, candidate in enumerate(candidates):
            if number != chosen:
                unlabelled = [None] * len(reply)
                found.append((reply + [candidate.get("text")], unlabelled + [candidate.get("rating")]))
        if chosen is None:
            text, rating = human.get("text") if isinstance(human, dict) else human, 1
        elif chosen in range(len(candidates)):
            text, rating = candidates[chosen].get("text"), candidates[chosen].get("rating")
        elif ended:
            break
        else:
            raise TypeError(f"chosen_completion {chosen!r} of {len(candidates)}")
        reply, ratings = reply + [text], ratings + [rating]
        if ended:
            break
    sampled = question.get("pre_generated_steps") or []
    for steps, labels in [(reply, ratings), *found]:
        if steps == sampled[:len(steps)]:
            steps = sampled
        yield {
            "problem": question["problem"],
            "answer": question.get("ground_truth_answer"),
            "steps": steps,
            "labels": [] if label.get("finish_reason") == "bad_problem" else labels,
            # Its replies end with their answer, below a heading.
            "finished": bool(steps) and "# Answer" in str(steps[-1]),
        }


def merge(rows, want, dropped):
    """Rows of one rated reply each -> a ranking per prompt (preferences) or its best reply (demonstrations).

    Of equal replies to a prompt the first counts. As feedback ratings stay what they are, and so do prompts
    with one alone. Adds to dropped, by reason, the rows that go.
    """
    groups = {}  # {prompt: its rows}
    for row in rows:
        groups.setdefault(json.dumps(row.prompt), []).append(row)
    merged = []
    for group in groups.values():
        if want == "demonstrations":
            best = min(group, key=lambda row: row.ranks[0])
            best.ranks = [0]
            merged.append(best)
            dropped["rated no higher than another reply to the same prompt"] += len(group) - 1
            continue
        ranks, ratings = {}, {}  # {reply: its rank}, and of those that have them its ratings
        for row in group:
            ranks.setdefault(row.replies[0], row.ranks[0])
            if row.ratings:
                ratings.setdefault(row.replies[0], row.ratings[0])
        dropped["the same reply to the same prompt again"] += len(group) - len(ranks)
        if len(set(ranks.values())) > 1 or ratings:
            rated = [ratings.get(reply, {}) for reply in ranks] if ratings else []
            merged.append(Row(group[0].prompt, list(ranks), list(ranks.values()), ratings=rated))
        else:
            dropped["no second rating of the same prompt to compare with"] += len(ranks)
    return merged
