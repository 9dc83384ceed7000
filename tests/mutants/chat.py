"""Bugs planted in chat.py, and the tests that ought to notice them."""

FORGETS = "test_chat.py::test_chat_forgets_what_a_model_of_single_questions_cannot_follow_and_says_so_once"

MUTANTS = [
    ("chat: a model of single questions is shown a conversation", FORGETS,
     'config.history == "auto" and knows_single_turns(self.model.config)',
     "False"),
    ("chat: says each time that it forgets", FORGETS,
     "                    self.told = True\n",
     ""),
]
