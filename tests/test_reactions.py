"""reactions.py: what a user's turn says of the reply before it, by a table that was written by hand."""
import time

import pytest

from examples import user
from formats.rows import Row
from reactions import KINDS, content_words, exchanges_of, is_repeat, kind_of, sentences_of

ASKED = "What is the capital of Australia?"
REPLY = "The capital of Australia is Sydney."
# Of each kind what shows it, and traps: words of one kind that say another, or nothing of the reply.
TABLE = [
    ("praise", "Thanks!"),
    ("praise", "Thank you so much, that helped."),
    ("praise", "Ok thanks"),
    ("praise", "Perfect."),
    ("praise", "Great, now I can go on."),
    ("praise", "That is very helpful."),
    ("praise", "You're right, I had forgotten."),
    ("praise", "I love it!"),
    ("praise", "Good job"),
    ("praise", "Not bad!"),
    ("praise", "That's not bad at all."),
    ("praise", "I can't thank you enough."),
    ("praise", "That is not only correct but clear."),
    ("praise", "No doubt that is right."),
    ("praise", "Exactly."),
    ("complain", "That's wrong."),
    ("complain", "This is incorrect."),
    ("complain", "Not helpful."),
    ("complain", "That is not helpful"),
    ("complain", "That wasn’t very helpful."),
    ("complain", "It doesn't work."),
    ("complain", "You didn't answer me."),
    ("complain", "You forgot the second part."),
    ("complain", "That makes no sense."),
    ("complain", "Thanks for nothing."),
    ("complain", "Thanks, but that is not right."),
    ("complain", "Your last answer is too long."),
    ("complain", "No."),
    ("complain", "I don't think so"),
    ("complain", "What a terrible reply."),
    ("complain", "This is no good."),
    ("complain", "You made a mistake in the second line."),
    ("correct", "It should be Canberra."),
    ("correct", "No, it's Canberra."),
    ("correct", "No, Canberra."),
    ("correct", "Actually, it is Canberra."),
    ("correct", "The right answer is Canberra."),
    ("correct", "I meant Austria."),
    ("correct", "You should have said Canberra."),
    ("correct", "Wrong! It's Canberra, not Sydney."),
    ("correct", "Isn't it Canberra?"),
    ("clarify", "What do you mean?"),
    ("clarify", "Can you explain that?"),
    ("clarify", "Could you please elaborate?"),
    ("clarify", "I don't understand."),
    ("clarify", "Why?"),
    ("clarify", "Are you sure?"),
    ("clarify", "Thanks, but could you give me more details?"),
    ("clarify", "You mean the state?"),
    ("repeat", "What is the capital of Australia?"),
    ("repeat", "Name Australia's capital"),
    ("repeat", "Tell me which city is the capital of Australia, please."),
    ("repeat", "I asked you what the capital is."),
    ("repeat", "Let me rephrase."),
    ("repeat", "Thank you. But once again: what is the capital of Australia?"),
    ("none", "No thanks."),
    ("none", "No, thank you."),
    ("none", "What is the capital of Austria?"),
    ("none", "How do I say thank you in French?"),
    ("none", "Write a thank you letter to my boss."),
    ("none", "Thanks in advance."),
    ("none", "Is it good for dogs?"),
    ("none", "Do you think that is right?"),
    ("none", "What is wrong with my car?"),
    ("none", "Why is the sky blue?"),
    ("none", "Correct the following text: he go home."),
    ("none", "Explain photosynthesis."),
    ("none", "Tell me about the great wall of China."),
    ("none", "Okay."),
    ("none", "Yes"),
    ("none", "I live in Perth."),
    ("none", "How many people live there?"),
    ("none", "是的。"),
    ("none", "?"),
]


@pytest.mark.parametrize("kind, text", TABLE)
def test_a_turn_is_of_the_kind_that_a_reader_sees_in_it(kind, text):
    assert kind_of(REPLY, text, [ASKED]) == kind
    assert kind_of(REPLY, text.upper(), [ASKED]) == kind


def test_the_table_has_sixty_turns_and_all_kinds():
    assert len(TABLE) >= 60 and {kind for kind, _ in TABLE} == {*KINDS, "none"}


@pytest.mark.parametrize("earlier, text, repeats", [
    ("How do I boil an egg?", "How do I boil an egg", True),
    ("How do I boil an egg?", "Please tell me how eggs are boiled", False),
    ("How do I boil an egg?", "Boil an egg: how?", True),
    ("List three fruits", "Name three fruits, please", True),
    ("List three fruits", "List three vegetables", False),
    ("Write a poem about the sea at night", "Write a poem about the sea at dawn", False),
    ("Write a poem about the sea at night", "A poem about the night sea, please!", True),
    ("What is 1 + 2?", "What is 1 + 3?", False),
    ("What is 1 + 2?", "How much is 2 + 1?", True),
    ("What does a cow say?", "What does a dog say?", False),
    ("Why?", "Why?", False),
    ("Is this it?", "", False),
    ("Wo liegt Köln?", "Wo liegt denn Köln?", True),
])
def test_a_repeat_shares_two_thirds_of_what_is_asked_for(earlier, text, repeats):
    assert is_repeat(text, earlier) == repeats


def test_a_repeat_is_found_in_one_sentence_of_several_and_of_any_earlier_turn():
    earlier = ["Who wrote Faust?", "When was he born?"]
    assert kind_of("In 1749.", "Hm. Let us go back. Who was it that wrote Faust?", earlier) == "repeat"
    assert kind_of("In 1749.", "When did he die?", earlier) == "none"
    assert content_words("Which dogs' names aren't there? 12 DOGS") == {"dog", "aren", "12"}


def test_no_to_a_question_is_an_answer_and_no_reaction():
    offer = "It is Sydney. Would you like a map?"
    assert kind_of(offer, "No.", [ASKED]) == kind_of(offer, "No, Canberra.", [ASKED]) == "none"
    assert kind_of(offer, "No, that is wrong.", [ASKED]) == "complain"
    assert kind_of(REPLY, "No.", [ASKED]) == "complain"


def test_what_stands_behind_three_sentences_or_is_a_long_one_is_no_verdict():
    pasted = "Here is my text. It is old. I wrote it."
    assert kind_of(REPLY, f"{pasted} That is wrong.", [ASKED]) == "none"
    assert kind_of(REPLY, "That is wrong. " + pasted, [ASKED]) == "complain"
    assert kind_of(REPLY, "that is wrong " + "and so on " * 40, [ASKED]) == "none"
    assert sentences_of("One. Two!  \n\nThree?\n") == ["one.", "two!", "three?"]


def test_the_gravest_kind_of_several_counts():
    assert kind_of(REPLY, "Thanks. Why?", [ASKED]) == "clarify"
    assert kind_of(REPLY, "Why? " + ASKED, [ASKED]) == "repeat"
    assert kind_of(REPLY, "That is wrong. " + ASKED, [ASKED]) == "complain"
    assert kind_of(REPLY, "That is wrong. It should be Canberra.", [ASKED]) == "correct"


def test_no_text_takes_long():
    for text in ("not " * 20000, "that is " * 20000, "no, " * 20000 + "?", "a" * 200000, "ok " * 24 + "x"):
        began = time.process_time()
        kind_of(text, text, [text])
        assert time.process_time() - began < 2


def test_every_reply_that_a_turn_follows_is_an_exchange_with_all_turns_before_it():
    talk = user("One?", "1.", "Two?", "2.", "Thanks.")
    rows = [Row([{"role": "system", "content": "Count."}, *talk], answer="7"), Row(user("Alone."))]
    first, second = exchanges_of(rows)
    assert (first.reply, first.reaction, first.answer) == ("1.", "Two?", "7")
    assert first.before == rows[0].prompt[:2] and first.earlier == ["One?"]
    assert (second.reply, second.reaction, second.earlier) == ("2.", "Thanks.", ["One?", "Two?"])
    assert second.before + [{"role": "assistant", "content": "2."}] == rows[0].prompt[:5]
    assert first.dialogue == rows[0].prompt[:4] and second.dialogue == rows[0].prompt
