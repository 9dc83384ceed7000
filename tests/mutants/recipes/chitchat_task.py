"""Bugs planted in recipes/chitchat_task.py, and the tests that ought to notice them."""

TURNS = "test_real_rows.py::test_what_one_sends_in_a_row_is_a_turn_and_the_first_to_write_is_the_user"
TWO = "test_real_rows.py::test_whom_nobody_answered_has_no_dialogue_and_neither_have_three"
REPLY = "test_real_rows.py::test_a_rated_dialogue_ends_with_the_assistant_and_begins_with_the_user"
FILES = "test_real_rows.py::test_files_hold_ratings_by_aim_and_alone_and_the_talks_whole"

MUTANTS = [
    ("chitchat: a blank text is a turn", TURNS,
     "        if not text:\n            continue\n",
     ""),
    ("chitchat: each text is a turn", TURNS,
     'if turns and turns[-1]["role"] == role:',
     "if False:"),
    ("chitchat: the first to write is the assistant", TURNS,
     '("user", "assistant", None)',
     '("assistant", "user", None)'),
    ("chitchat: who is alone has a dialogue", TWO,
     "return turns if len(names) == 2 else []",
     "return turns if len(names) <= 2 else []"),
    ("chitchat: three have a dialogue", TWO,
     "return turns if len(names) == 2 else []",
     "return turns if len(names) >= 2 else []"),
    ("chitchat: the user has the last word", REPLY,
     "        turns = turns[:-1]\n",
     "        pass\n"),
    ("chitchat: the beginning of a dialogue is kept", REPLY,
     "return turns[-most:]",
     "return turns[:most or None]"),
    ("chitchat: an odd number of turns begins with the assistant", REPLY,
     "most -= most % 2",
     "pass"),
    ("chitchat: every scale is the same one", FILES,
     '"ratings": {"rating": ratings[aim]}',
     '"ratings": {"rating": ratings["witty"]}'),
    ("chitchat: talks are those that are rated", FILES,
     "        if len(turns) > 2:\n",
     '        if len(turns) > 2 and dialogue.get("ratings"):\n'),
    ("chitchat: talks are cut", FILES,
     'files["talks"].append({"messages": turns})',
     'files["talks"].append({"messages": up_to_a_reply(turns, most)})'),
]
