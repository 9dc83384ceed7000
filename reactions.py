"""What a user's turn says of the reply before it: English rules, for feedback.py.

A turn is cut into sentences, of which the first three are looked at: what follows is often pasted. A sentence
shows a kind by one of its patterns, or by a verdict on the reply ("that is helpful"), which a negation turns
round; and a turn shows a repeat by the words that it shares with an earlier turn of the user's. The gravest
of the kinds counts. A new question, small talk, and words about other things have none.
"""
import re
from typing import NamedTuple


class Exchange(NamedTuple):
    """A reply and the user's turn that follows it."""
    before: list  # turns up to the one that the reply answers
    reply: str
    reaction: str
    answer: str  # that of the conversation's row

    @property
    def earlier(self):
        """The user's turns before the reply, [str]."""
        return [turn["content"] for turn in self.before if turn["role"] == "user"]

    @property
    def dialogue(self):
        """All turns up to the reaction."""
        reply = {"role": "assistant", "content": self.reply}
        return self.before + [reply, {"role": "user", "content": self.reaction}]


def exchanges_of(rows):
    """[Exchange] of all replies in conversations (Row) that a user's turn follows."""
    found = []
    for row in rows:
        for i, turn in enumerate(row.prompt):
            if turn["role"] == "assistant":
                # Turns alternate, and the last one is the user's.
                reaction = row.prompt[i + 1]["content"]
                found.append(Exchange(row.prompt[:i], turn["content"], reaction, row.answer))
    return found


# ---------------------------------------------------------------------------------------------------------
# The patterns

# What is longer than this, in characters, is no sentence that somebody says of a reply.
LONGEST = 300
KINDS = ("repeat", "correct", "complain", "clarify", "praise")

# All patterns are for one sentence in small letters. ABOUT is how it speaks of the reply.
ABOUT = (r"\b(?:that|this|it|(?:your|the|that|this) (?:\w+ ){0,2}(?:answer|reply|response|code|output|result|"
         r"explanation|solution|example|list|summary|translation|number|date|name|link))")
IS = r"(?:'s| is| was| are| looks| seems| sounds)"
GOOD = ("right|correct|true|accurate|good|great|perfect|excellent|helpful|useful|clear|better|nice|lovely|"
        "brilliant|awesome|amazing|fantastic|wonderful|impressive|exactly|precisely|spot on|enough|working")
BAD = ("wrong|incorrect|false|untrue|inaccurate|mistaken|bad|poor|terrible|awful|horrible|useless|unhelpful|"
       "nonsense|rubbish|garbage|misleading|outdated|incomplete|irrelevant|broken|off topic|"
       "too (?:long|short|vague|general|complicated|wordy)")
# A verdict on the reply, and one that is a whole sentence or begins it ("not helpful", "what a poor reply").
VERDICTS = [
    re.compile(rf"{ABOUT}{IS}(?:n't)?(?: \w+){{0,3}}? (?:(?P<good>{GOOD})|(?P<bad>{BAD}))\b"),
    re.compile(r"^(?:(?:not|no|very|so|really|quite|much|all|just|what a|how|yes|oh|okay|ok|wow),? ?)*"
               rf"(?:(?P<good>{GOOD})|(?P<bad>{BAD}))"
               r"(?:\W*$| (?:job|work|answer|reply|response|explanation|point|idea|one|stuff|thanks))"),
    re.compile(r"^(?P<good>great|perfect|excellent|brilliant|awesome|amazing|fantastic|wonderful)[,!]"),
]
NOT = re.compile(r"\b(?:not|no|never|hardly|nothing|cannot)\b|n't\b")
# No negations, whatever they look like.
NO_NEGATION = re.compile(r"\bnot (?:only|just) |\bno (?:doubt|problem|worries)\b\W*")
# What people begin with before they thank.
HABIT = r"(?:(?:ok|okay|oh|ah|well|yes|yeah|great|perfect|lovely|many|cool|wow|i see|got it|good)\W+)*"
PATTERNS = {
    "correct": [
        rf"{ABOUT} (?:should|ought to|must)(?:'ve| have)? (?:be|been|say|read)\b",
        r"\bthe (?:right|correct|actual|real|true) (?:\w+ )?(?:is|was|would be|would have been)\b",
        r"\bactually,? (?:it|that|he|she|they|there|the \w+)(?:'s| is| was| are| were)\b",
        r"\b(?:it|that|he|she)(?:'s| is| was) actually (?!quite|very|really|not|pretty|a )",
        r"\bi (?:meant|asked for|was (?:asking|looking) (?:for|about))\b",
        r"\byou (?:should|could|ought to) have (?:said|written|used|mentioned|answered|given|put)\b",
        r"^(?:it|that)(?:'s| is| was) [\w ]+, not \w+",
        rf"^no\W+(?:it|that|this|he|she|they)(?:'s| is| was| are) (?!\w*n't|not|no |the same|{GOOD}|{BAD})",
        r"^no\W+(?!thank|problem|worr|need|idea|way|that|this|it|i\b|you\b|one\b|more\b|not\b|but\b)"
        r"[\w']+(?: [\w']+){0,3}\W*$",
        r"^(?:is|was|are|were|should)n't (?:it|that|he|she|they|the \w+)\b",
    ],
    "complain": [
        r"^(?:no|nope|wrong|incorrect|false)\W*$|^(?:wrong|incorrect)\b",
        r"\byou(?:'ve| have)? (?:\w+ )?(?:forgot|missed|misunderstood|ignored|skipped|left out)\b",
        r"\byou(?:'ve| have)? (?:\w+ )?(?:made|got) .*(?:mistake|error|wrong)",
        r"\byou(?:'re| are| were) (?:\w+ )?(?:wrong|mistaken|incorrect|lying|not )",
        r"\byou (?:did|do|have|are|were)(?:n't| not)\b(?! need| have to)",
        rf"{ABOUT} (?:still )?(?:does|did|do)(?:n't| not) (?:\w+ )?(?:work|help|make|answer|run|solve)\b",
        r"\bmakes no sense\b|\bof no (?:use|help)\b|\bthanks for nothing\b",
        r"\bnot what i\b|\bisn't what i\b|\bcan(?:'t|not| not) be (?:right|true|correct|it)\b",
        r"\bi (?:don't|do not) think (?:so|that|it|you)\b",
    ],
    "repeat": [
        r"^(?:again|once more|in other words|i repeat|let me (?:rephrase|repeat|ask again|try again))\b",
        r"^(?:try again|same question|my question (?:is|was)|as i (?:said|asked))\b",
        r"\bi (?:already |just |did )?(?:asked|told) (?:you|if|whether|what|how|why|who|where|when)\b",
    ],
    "clarify": [
        r"\bwhat (?:do|does|did|is) (?:you|that|this|it) (?:mean|supposed to mean)",
        r"\b(?:can|could|would|will) you (?:please |also )?(?:elaborate|clarify|be more|expand|specify|"
        r"give (?:me )?(?:more|an example|some more|further)|go into|say (?:a little |a bit )?more)\b",
        r"\bexplain(?: that| this| it| what you| how| why| further| more| in (?:more|simpler)|"
        r" your| the (?:first|second|third|last|next) \w+)\b|\bexplain\W*$",
        r"^(?:please )?(?:elaborate|clarify|tell me more|more details?|be more)\b",
        r"\bi (?:don't|do not|didn't|can't) (?:quite |really )?(?:understand|get it|get that|follow)",
        r"\bi(?:'m| am) (?:still |a bit )?(?:confused|lost)\b|\b(?:unclear|not clear)\b",
        r"^(?:but |and |so )?(?:why|how come|how so|which one|what else|such as|for example|where|when|huh|"
        r"meaning|based on what|says who|any sources?|are you sure|is that (?:all|true|right|correct))\W*\?",
        r"^(?:so |do |did )?you mean\b.*\?|\bwhat is your source\b|\bhow do you know\b",
    ],
    "praise": [
        rf"^{HABIT}(?:thanks|thank you|thx|cheers)\b(?! (?:letter|note|card|email|in advance|for nothing))",
        r"\b(?:that|this|it) (?:really |just |totally )?(?:helps|helped|works|worked|solved it)\b",
        r"\bi (?:really |absolutely )?(?:like|love|appreciate) (?:it|this|that|your|the (?:answer|way))\b",
        r"\byou(?:'re| are) (?:right|great|amazing|awesome|the best|so |very |a (?:genius|star|lifesaver))",
        r"\bcan(?:'t|not) thank you enough\b|\bwell done\b|\b(?:good|great|nice) job\b",
    ],
}
PATTERNS = {kind: [re.compile(pattern) for pattern in own] for kind, own in PATTERNS.items()}
# Of several kinds in one turn the first of these counts.
GRAVEST = ("correct", "complain", "repeat", "clarify", "praise")


# ---------------------------------------------------------------------------------------------------------
# The kind of a reaction

# Words that are in any question, and say nothing of what it asks for.
ASKING = frozenset("""a an the of to in on at for from with and or is are was were be been do does did can
    could would will you your me my i it its this that there what which who when where why how please tell
    name give show write say need want know help called mean word answer question again once so but ok s t ll
    re ve""".split())


def sentences_of(text):
    """Sentences of a text in small letters, with the marks at their ends, but for long ones."""
    text = text.lower().replace("’", "'")
    parts = [part.strip() for part in re.findall(r"[^.!?\n]+[.!?]*", text)]
    return [part for part in parts if 0 < len(part) <= LONGEST]


def verdict_of(sentence):
    """praise or complain, if a sentence says that a reply is good, or not; None if it says nothing of it."""
    for pattern in VERDICTS:
        found = pattern.search(sentence)
        if found:
            # "not bad" is praise, as "not good" is none.
            is_good = bool(found["good"]) != bool(NOT.search(found[0]))
            return "praise" if is_good else "complain"
    return None


def kinds_in(sentence):
    """The kinds whose patterns a sentence shows. A question is no verdict: "Is that right?"."""
    sentence = NO_NEGATION.sub("", sentence)
    kinds = set()
    for kind, patterns in PATTERNS.items():
        if any(pattern.search(sentence) for pattern in patterns):
            kinds.add(kind)
    if sentence.endswith("?"):
        # "Isn't it Berlin?" says what would have been right all the same.
        says = re.match(r"\w+n't\b", sentence)
        return kinds & {"repeat", "clarify", "correct" if says else "repeat"}
    if "praise" in kinds and NOT.search(sentence) and "thank" not in sentence:
        # "I don't like it."
        kinds = kinds - {"praise"} | {"complain"}
    verdict = verdict_of(sentence)
    if verdict:
        kinds.add(verdict)
    return kinds


def content_words(text):
    """What a text is about: its words but for those of ASKING, without a plural's s."""
    words = set()
    for word in re.findall(r"\w+", text.lower().replace("’", "'")):
        if len(word) > 3:
            word = word.removesuffix("s")
        if word not in ASKING:
            words.add(word)
    return words


def is_repeat(text, earlier):
    """Whether a text, or a sentence of it, asks for what an earlier turn of the user's did.

    That is, two thirds of the content words that the two have are in both.
    """
    asked = content_words(earlier)
    for part in (text, *sentences_of(text)):
        words = content_words(part)
        if asked and len(asked & words) >= len(asked | words) * 2 / 3:
            return True
    return False


def kind_of(reply, reaction, earlier):
    """One of KINDS, or "none", for what a user says (reaction) behind a reply.

    earlier: [str], the user's turns before the reply.
    """
    kinds = set()
    for sentence in sentences_of(reaction)[:3]:
        # Who was asked something says no to that.
        if reply.rstrip().endswith("?"):
            sentence = re.sub(r"^no(?:pe)?\b\W*", "", sentence)
        kinds |= kinds_in(sentence)
    if any(is_repeat(reaction, turn) for turn in earlier):
        kinds.add("repeat")
    for kind in GRAVEST:
        if kind in kinds:
            return kind
    return "none"
