"""Bugs planted in judges.py, and the tests that ought to notice them."""

MUTANTS = [
    ("reward function: what it gets goes by the number of its parameters",
     "test_judges.py::test_a_reward_function_gets_what_its_parameters_name_whatever_their_number",
     "self.function(**arguments)",
     "self.function(*[prompts, replies, answers][:len(inspect.signature(self.function).parameters)])"),
    ("reward function: answers that nobody has",
     "whole/test_ppo_rewards.py::"
     "test_a_function_that_wants_answers_and_gets_none_stops_the_run_and_one_that_gets_some_is_told",
     "require(known, f",
     "require(True, f"),
    ("tool: a text is a list of letters",
     "test_judges.py::test_a_tool_returns_a_turn_or_none_for_each_reply_and_anything_else_names_it",
     "isinstance(turns, (list, tuple)) and ",
     "turns and "),
    ("tool: numbers are turns",
     "test_judges.py::test_a_tool_returns_a_turn_or_none_for_each_reply_and_anything_else_names_it",
     "isinstance(turn, (str, type(None)))",
     "True"),
    ("letters: those of a text that begins with them",
     "test_constitution.py::test_the_letters_are_the_tokens_that_stand_behind_the_chat_template",
     "[ids[at] for ids in answered]",
     '[tokenizer.encode(letter)[0] for letter in "AB"]'),
    ("letters: read behind the padding",
     "test_constitution.py::test_letters_of_questions_of_many_lengths_are_those_of_each_alone",
     "ids.shape[1] + sizes - 1",
     "ids.shape[1] + ids.shape[1] - 1"),
]
