"""Texts, rows of every format, tokenizers and chat templates that several tests read."""
import itertools
import json
import random

import toy
from formats.foreign_tokenizer import open_tokenizer
from formats.rows import Row
from formats.tokenizer import ALL_LETTERS, CONTROLS, Tokenizer, train_bpe

VOCAB = 261
TOKENIZER = Tokenizer("bytes", r"\s+|\S+", {bytes([b]): b for b in range(256)})
JUDGES = """
def size(replies, **rest):
    return [float(len(reply)) for reply in replies]

def right(replies, answers):
    assert len(replies) == len(answers)
    return [float(answer) for answer in answers]

def wrong(replies):
    return [float("nan") if len(replies) > 1 else 0.0] * len(replies)
"""
GRADERS = """
calls = []

def least(prompts, replies, least=3):
    calls.append(least)
    return [float(len(reply) >= least) for reply in replies]

def by_name(answers, replies):
    calls.append(list(answers))
    return [float(answer in reply) for reply, answer in zip(replies, answers)]

def everything(replies, **texts):
    calls.append(sorted(texts))
    return [0.0] * len(replies)

def perhaps(replies, answers=None):
    calls.append(list(answers))
    return [0.0] * len(replies)
"""


def user(text, *more):
    """Turns as Row has them: user, assistant, user, ..."""
    return [{"role": role, "content": content}
            for role, content in zip(itertools.cycle(("user", "assistant")), (text, *more))]


def system(text):
    return [{"role": "system", "content": text}]


def chat(*contents, names=("user", "assistant"), role="role", content="content"):
    """Turns as a file has them."""
    return [{content: text, role: name} for name, text in zip(itertools.cycle(names), contents)]


def sharegpt(*contents, names=("human", "gpt")):
    return chat(*contents, names=names, role="from", content="value")


ALPACA = {"instruction": " Cube it. ", "input": "4", "output": "64\n"}
DOLLY = {"instruction": "Cube it.", "context": "", "response": "64", "category": "maths"}
HISTORY = {
    "instruction": "And 5?",
    "input": "",
    "output": "125",
    "system": " Be brief.",
    "history": [["Cube 4.", "64"], ["Sure?", "Yes "]],
}
SEEDS = {
    "id": "seed_task_1",
    "name": "cube",
    "instruction": "Cube it.",
    "instances": [{"input": "4", "output": "64"}],
    "is_classification": False,
}
COMPLETION = {"prompt": "Cube 4.", "completion": " 64"}
COMPLETION_TURNS = {
    "prompt": chat("Hi", "Ho", "Cube 4."),
    "completion": [{"role": "assistant", "content": "64"}],
}
ORCA = {"id": "7", "system_prompt": "Be brief.", "question": "Cube 4.", "response": "64"}
MESSAGES = {"messages": system("Be brief.") + chat("Cube 4.", "64 ", "Sure?", " Yes")}
SHAREGPT = {
    "id": "x",
    "system": "Be brief.",
    "conversations": sharegpt("Cube 4.", "64 ", "Sure?", " Yes"),
    "tools": "",
}
SHAREGPT_NAMES = {"conversations": sharegpt("", "Cube 4.", "64", names=("system", "prompter", "chatgpt"))}
PARTS = {
    "messages": [{"role": "user",
                  "content": [{"type": "text", "text": "Cube "}, {"type": "text", "text": "4."}]},
                 {"role": "assistant", "content": "64"}],
}
ASKED = {"messages": system("Be brief.") + chat("Cube 4.", "64", "Sure?")}
POLITE = {
    "output": "It is 64.",
    "rejected": "Obviously 64.",
    "input": "",
    "instruction": "Cube 4.",
    "chosen": "It is 64.",
}
PAIR = {"prompt": "Cube 4.", "chosen": "64", "rejected": "65", "margin": 2}
RM_STATIC = {
    "prompt": "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Cube 4.\n\nAssistant:",
    "response": " 64",
    "chosen": " 64",
    "rejected": " 65",
}
SHAREGPT_PAIR = {"conversations": [{"from": "system", "value": "Be brief."}, *sharegpt("Cube 4.")],
                 "chosen": {"from": "gpt", "value": "64"}, "rejected": {"from": "gpt", "value": "65"}}
TURNS_PAIR = {
    "prompt": chat("Cube 4."),
    "chosen": [{"role": "assistant", "content": "64"}],
    "rejected": [{"role": "assistant", "content": "65"}],
}
ULTRA = {
    "prompt": "Cube 4.",
    "prompt_id": "7e",
    "chosen": chat("Cube 4.", "64"),
    "rejected": chat("Cube 4.", "65"),
    "messages": chat("Cube 4.", "64"),
    "score_chosen": 8.0,
    "score_rejected": 3.5,
}
WHOLE_PAIR = {"chosen": system("Be brief.") + chat("Hi", "Ho", "Cube 4.", "64"),
              "rejected": system("Be brief.") + chat("Hi", "Ho", "Cube 4.", "65")}
RANKING = {
    "prompt": "Cube 4.",
    "completions": ["65", " 64", "?", "63"],
    "ranks": [1, 0, 2, 1],
    "gold": [-1, 1, -0.5, -1],
}
HH_START = "\n\nHuman: Who? He said Human: me.\nHuman: and\n\nAssistant: You.\n\nHuman:Why?\n\nAssistant:"
HH = {"chosen": HH_START + " I don’t know.", "rejected": HH_START + " Ask Assistant: him."}
HH_PROMPT = user("Who? He said Human: me.\nHuman: and", "You.", "Why?")
KTO = {"messages": chat("Hi", "Ho", "Cube 4.", "64"), "label": True}
RATED = {"prompt": "Cube 4.", "response": "64", "score": 4.5}
GSM8K = {
    "question": "Weng earns $12 an hour. She babysat 50 minutes. How much is it?",
    "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per minute.\nIt is 5000 x 0.2 = "
              "$<<5000*.2=1000>>1,000.\n#### 1,000.",
}
GSM8K_REPLY = "Weng earns 12/60 = $0.2 per minute.\nIt is 5000 x 0.2 = $1,000.\n#### 1,000."
QUERY = {"query": "Cube 4.", "response": "64", "type": "MATH_Rephrased"}
MATH = {"problem": "Cube 4.", "solution": "4^3 is $\\boxed{\\frac{128}{2}}$, so 64 <<or so>>.",
        "level": "Level 1", "type": "Algebra"}
NUMINA = MATH | {"answer": "64", "source": "olympiads"}
AIME = {"id": 60, "problem": "Cube 4.", "answer": 64}
INPUT_OUTPUT = {"input": " Cube 4.", "output": "64"}
INPUT_TARGET = {"input": "Cube 4.", "target": "(B)"}
DAPO = {"data_source": "math_dapo", "prompt": chat("Cube 4."), "ability": "MATH",
        "reward_model": {"ground_truth": "64", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a"}}
CONVERSATION = {"conversation": chat("Hi", "Ho", "Cube 4.", "64", names=("human", "assistant"))}
EXCHANGES = {"conversation_id": "1",
             "conversation": [{"human": "Hi", "assistant": "Ho"}, {"human": "Cube 4.", "assistant": "64"}]}
RAW_ULTRA = {"source": "x", "instruction": "Cube 4.", "models": ["a", "b", "c", "d"], "completions": [
    {"model": "a", "response": "65", "fine-grained_score": 2.5, "overall_score": 9,
     "annotations": {"honesty": {"Rating": "2"}}},
    {"model": "b", "response": "64", "fine-grained_score": 4.75, "overall_score": 7},
    {"model": "c", "response": "?", "fine-grained_score": None, "overall_score": "1.5"},
    {"model": "d", "response": "unjudged"}]}
SHP = {"post_id": "q", "domain": "maths", "history": "Cube 4.", "human_ref_A": "64", "human_ref_B": "65",
       "labels": 1, "score_A": 9, "seconds_difference": 7.5}
INPUT_PAIR = {"system": "Be brief.", "input": "Cube 4.", "chosen": "64", "rejected": "65",
              "generations": ["64", "65"], "rating": [9, 8]}
TEXT = {"text": " A whole\ndocument. ", "meta": {"url": "x"}}
SHORT, BRIEF = user("Cube 4."), system("Be brief.")
TWO = ["64", "65"], [0, 1]
STEPS = {"prompt": "Cube 4.", "steps": ["4*4=16", "16*4=65", "so 65"], "labels": [1, -1]}
SEVERAL = {"prompt": "Cube 4.", "completions": ["64", "16"]}
CASES = [  # want, a row of a file, its format, the Row
    ("replies", SEVERAL, "several replies", Row(user("Cube 4."), ["64", "16"], [0, 1])),
    ("prompts", SEVERAL, "several replies", Row(user("Cube 4."))),
    ("steps", STEPS, "labelled steps", Row(SHORT, steps=STEPS["steps"], labels=[1, -1, None])),
    ("prompts", STEPS, "labelled steps", Row(SHORT)),
    ("demonstrations", ALPACA, "instructions", Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", DOLLY, "instructions", Row(user("Cube it."), ["64"], [0])),
    ("demonstrations", DOLLY | {"context": "4"}, "instructions", Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", ALPACA | {"text": "Below is an instruction ..."}, "instructions",
     Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", HISTORY, "instructions",
     Row(BRIEF + user("Cube 4.", "64", "Sure?", "Yes", "And 5?"), ["125"], [0])),
    ("demonstrations", SEEDS, "instructions", Row(user("Cube it.\n\n4"), ["64"], [0])),
    ("demonstrations", COMPLETION, "instructions", Row(SHORT, ["64"], [0])),
    ("demonstrations", COMPLETION_TURNS, "instructions", Row(user("Hi", "Ho", "Cube 4."), ["64"], [0])),
    ("demonstrations", {"prompt": "Cube 4.", "response": "64"}, "instructions", Row(SHORT, ["64"], [0])),
    ("demonstrations", ORCA, "instructions", Row(BRIEF + SHORT, ["64"], [0])),
    ("demonstrations", MESSAGES, "conversations", Row(BRIEF + user("Cube 4.", "64", "Sure?"), ["Yes"], [0])),
    ("demonstrations", MESSAGES | {"prompt": "Cube 4.", "label": 1, "score": "A"}, "conversations",
     Row(BRIEF + user("Cube 4.", "64", "Sure?"), ["Yes"], [0])),
    ("demonstrations", SHAREGPT, "conversations", Row(BRIEF + user("Cube 4.", "64", "Sure?"), ["Yes"], [0])),
    ("demonstrations", MESSAGES | {"system": "Other."}, "conversations",
     Row(BRIEF + user("Cube 4.", "64", "Sure?"), ["Yes"], [0])),
    ("demonstrations", SHAREGPT_NAMES, "conversations", Row(SHORT, ["64"], [0])),
    ("demonstrations", PARTS, "conversations", Row(SHORT, ["64"], [0])),
    ("demonstrations", POLITE | {"output": "Other."}, "preferences", Row(SHORT, ["Other."], [0])),
    ("demonstrations", PAIR, "preferences", Row(SHORT, ["64"], [0], 2.0)),
    ("demonstrations", RM_STATIC | {"response": " 66"}, "preferences",
     Row(user("Hi", "Ho", "Cube 4."), ["66"], [0])),
    ("demonstrations", RANKING, "rankings", Row(SHORT, ["64"], [0])),
    ("demonstrations", HH, "transcripts", Row(HH_PROMPT, ["I don’t know."], [0])),
    ("demonstrations", KTO, "labelled replies", Row(user("Hi", "Ho", "Cube 4."), ["64"], [0])),
    ("demonstrations", COMPLETION | {"label": True}, "labelled replies", Row(SHORT, ["64"], [0])),
    ("demonstrations", RATED, "rated replies", Row(SHORT, ["64"], [0])),
    ("demonstrations", GSM8K, "questions", Row(user(GSM8K["question"]), [GSM8K_REPLY], [0], answer="1000")),
    ("demonstrations", {"question": "Why?", "answer": "So: 5 <<6 and 3>>2."}, "questions",
     Row(user("Why?"), ["So: 5 <<6 and 3>>2."], [0], answer="So: 5 <<6 and 3>>2.")),
    ("demonstrations", QUERY, "instructions", Row(SHORT, ["64"], [0])),
    ("demonstrations", MATH, "questions", Row(SHORT, [MATH["solution"]], [0], answer="\\frac{128}{2}")),
    ("demonstrations", NUMINA, "questions", Row(SHORT, [MATH["solution"]], [0], answer="64")),
    ("demonstrations", NUMINA | {"messages": chat("Cube 4.", "It is 64.")}, "conversations",
     Row(SHORT, ["It is 64."], [0], answer="64")),
    ("demonstrations", AIME, "questions", Row(SHORT, ["64"], [0], answer="64")),
    ("demonstrations", INPUT_OUTPUT, "instructions", Row(SHORT, ["64"], [0])),
    ("demonstrations", INPUT_OUTPUT | {"context": "Sums."}, "instructions",
     Row(user("Cube 4.\n\nSums."), ["64"], [0])),
    ("demonstrations", INPUT_TARGET, "questions", Row(SHORT, ["(B)"], [0], answer="(B)")),
    ("demonstrations", CONVERSATION, "conversations", Row(user("Hi", "Ho", "Cube 4."), ["64"], [0])),
    ("demonstrations", EXCHANGES, "conversations", Row(user("Hi", "Ho", "Cube 4."), ["64"], [0])),
    ("demonstrations", RAW_ULTRA, "rankings", Row(SHORT, ["64"], [0])),
    ("demonstrations", SHP | {"labels": 0}, "preferences", Row(SHORT, ["65"], [0])),
    ("demonstrations", TEXT, "plain text", Row([], [" A whole\ndocument. "], [0])),
    ("preferences", POLITE, "preferences", Row(SHORT, ["It is 64.", "Obviously 64."], [0, 1])),
    ("preferences", PAIR, "preferences", Row(SHORT, *TWO, 2.0)),
    ("preferences", PAIR | {"system": "Be brief."}, "preferences", Row(BRIEF + SHORT, *TWO, 2.0)),
    ("preferences", RM_STATIC, "preferences", Row(user("Hi", "Ho", "Cube 4."), *TWO)),
    ("preferences", SHAREGPT_PAIR, "preferences", Row(BRIEF + SHORT, *TWO)),
    ("preferences", TURNS_PAIR, "preferences", Row(SHORT, *TWO)),
    ("preferences", ULTRA, "preferences", Row(SHORT, *TWO)),
    ("preferences", RAW_ULTRA, "rankings", Row(SHORT, ["65", "64", "?"], [-2.5, -4.75, -1.5])),
    ("preferences", SHP, "preferences", Row(SHORT, *TWO)),
    ("preferences", SHP | {"labels": 0}, "preferences", Row(SHORT, ["65", "64"], [0, 1])),
    ("preferences", INPUT_PAIR, "preferences", Row(BRIEF + SHORT, *TWO)),
    ("preferences", WHOLE_PAIR, "preferences", Row(BRIEF + user("Hi", "Ho", "Cube 4."), *TWO)),
    ("preferences", WHOLE_PAIR | {"prompt": "Cube 4."}, "preferences",
     Row(BRIEF + user("Hi", "Ho", "Cube 4."), *TWO)),
    ("preferences", RANKING, "rankings",
     Row(SHORT, ["65", "64", "?", "63"], [1, 0, 2, 1], 0.0, [-1, 1, -0.5, -1])),
    ("preferences", HH, "transcripts", Row(HH_PROMPT, ["I don’t know.", "Ask Assistant: him."], [0, 1])),
    ("prompts", {"prompt": "Cube 4.", "chosen": None}, "prompts", Row(SHORT)),
    ("prompts", {"prompt": chat("Cube 4.")}, "prompts", Row(SHORT)),
    ("prompts", {"instruction": "Cube it.", "input": "4"}, "prompts", Row(user("Cube it.\n\n4"))),
    ("prompts", ALPACA, "instructions", Row(user("Cube it.\n\n4"))),
    ("prompts", MESSAGES, "conversations", Row(BRIEF + user("Cube 4.", "64", "Sure?"))),
    ("prompts", ASKED, "conversations", Row(BRIEF + user("Cube 4.", "64", "Sure?"))),
    ("prompts", SEEDS, "instructions", Row(user("Cube it.\n\n4"))),
    ("prompts", RANKING, "rankings", Row(SHORT)),
    ("prompts", HH, "transcripts", Row(HH_PROMPT)),
    ("prompts", SHAREGPT_PAIR, "preferences", Row(BRIEF + SHORT)),
    ("prompts", KTO | {"label": False}, "labelled replies", Row(user("Hi", "Ho", "Cube 4."))),
    ("prompts", GSM8K, "questions", Row(user(GSM8K["question"]), answer="1000")),
    ("prompts", DAPO, "prompts", Row(SHORT, answer="64")),
    ("prompts", MATH, "questions", Row(SHORT, answer="\\frac{128}{2}")),
    ("prompts", INPUT_TARGET, "questions", Row(SHORT, answer="(B)")),
    ("prompts", {"input": "Cube 4.", "ground_truth": 64}, "prompts", Row(SHORT, answer="64")),
    ("prompts", RAW_ULTRA, "rankings", Row(SHORT)),
    ("prompts", SHP, "preferences", Row(SHORT)),
]
ODD_TEXTS = [
    "", " ", "a", "\n\n \t\r\n", "e\u0301", "naïve café", "日本語、中文。", "👩‍👩‍👧‍👦 🏳️‍🌈", "\u202eright to left",
    "\x00\x1c\x7f", "a  b   c ", "$1,234.56 isn't 2e-3", "Human: a\n\nHuman: b", "[[ ]] \\n",
]


def random_texts(number, seed=0):
    """Strings in which pieces of control tokens, ordinary words and odd characters meet at random."""
    rng = random.Random(seed)
    pieces = [*CONTROLS, "<|", "|>", "<", "|", "endoftext", " ", "\n", "é", "🙂", "word"]
    return ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(number)]


CORPUS = [
    "The quick brown fox jumps over the lazy dog. It isn't 1234 dogs, it's 12.",
    "Wer reitet so spät durch Nacht und Wind?", "system user assistant", "日本語の文",
    "def f(x):\n    return x ** 2\n"
] * 4
MADE = {
    "bytes": lambda: Tokenizer("bytes", r"\s+|\S+", {bytes([b]): b for b in range(256)}),
    "trained": lambda: Tokenizer(
        "trained", *train_bpe(ODD_TEXTS * 3 + list(CONTROLS) * 9 + ["low lower lowest newer"] * 9, 420)),
    "toy": toy.tokenizer,
    "learned": lambda: Tokenizer("bpe", *train_bpe(ODD_TEXTS * 3 + CORPUS + [*CONTROLS] * 9, 450, ALL_LETTERS)
                                 ),
    # No merge makes abc.
    "gaps": lambda: Tokenizer("gaps", r"[\s\S]+", {b"a": 0, b"b": 1, b"c": 2, b"abc": 3, b" ": 4, b"\n": 5})
}
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|head|>' ~ m.role ~ '<|/head|>\n\n' ~ (m.content | trim) ~ '<|eot|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}")
BRACKETS = """{%- if messages[0].role == 'system' -%}
    {%- set start = '<<' + messages[0].content + '>>\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}
    {%- set start = '' -%}{%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('turns must alternate') }}
    {%- endif -%}
    {%- if m.role == 'user' -%}
        {{ bos_token + '[INST] ' + (start if loop.first else '') + m.content + ' [/INST]' }}
    {%- else -%}{{ ' ' + m.content + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<s>", "</s>"]
BOS_EOS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wer reitet so spät?"},
    {"role": "assistant", "content": "The fox."},
    {"role": "user", "content": "  1234 dogs?\n"},
    {"role": "assistant", "content": "No,\n it's 12. 日本"},
]


def foreign_folder(folder, template=None, special=SPECIAL, words=BOS_EOS, library=None, **files):
    """A checkpoint folder's tokenizer: byte-level BPE trained on CORPUS, or library."""
    import tokenizers as T
    if library is None:
        library = T.Tokenizer(T.models.BPE())
        library.pre_tokenizer = T.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = T.decoders.ByteLevel()
        library.train_from_iterator(
            CORPUS,
            T.trainers.BpeTrainer(vocab_size=400,
                                  special_tokens=special,
                                  initial_alphabet=sorted(T.pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False))
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(library.to_str())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **words
              } | ({"chat_template": template} if template else {})
    for name, value in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def open_folder(folder, template=None, **options):
    return open_tokenizer(foreign_folder(folder, template, **options))


def replies(tokenizer, ids, mask):
    """What the mask selects, as one text for each run of it."""
    found, run = [], []
    for i, m in [*zip(ids, mask), (0, False)]:
        if m:
            run.append(i)
        elif run:
            assert run[-1] == tokenizer.eos
            found, run = found + [tokenizer.decode(run)], []
    return found
