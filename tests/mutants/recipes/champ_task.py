"""Bugs planted in recipes/champ_task.py, and the tests that ought to notice them."""

LINES = "test_real_rows.py::test_lines_are_good_up_to_the_one_in_which_the_marked_part_begins"
FIRST = "test_real_rows.py::test_the_first_wrong_step_is_the_one_least_likely_good"
ENDS = "test_real_rows.py::test_probabilities_are_those_at_the_ends_of_all_steps"
HELD_OUT = "test_real_rows.py::test_the_measure_is_of_held_out_wrong_solutions"

MUTANTS = [
    ("champ: blank lines are steps", LINES,
     "if line.strip():",
     "if True:"),
    ("champ: blanks before what is marked are marked", LINES,
     "start += len(text[start:]) - len(text[start:].lstrip())",
     "pass"),
    ("champ: the line that is wrong is good", LINES,
     "end <= start:",
     "at <= start:"),
    ("champ: what follows an error is wrong too", LINES,
     "elif at <= start:",
     "else:"),
    ("champ: a newline has no width", LINES,
     "at = end + 1",
     "at = end"),
    ("champ: the likeliest step is the wrong one", FIRST,
     "own.argmin()",
     "own.argmax()"),
    ("champ: chance is one of two", FIRST,
     "sum(1 / len(own) for own in good)",
     "sum(1 / 2 for own in good)"),
    ("champ: the labelled steps alone are asked about", ENDS,
     "row.labels = [1] * len(row.steps)",
     "pass"),
    ("champ: the probability is that of neutral", ENDS,
     "softmax(1)[:, 2]",
     "softmax(1)[:, 1]"),
    ("champ: training rows are measured", HELD_OUT,
     "config.val_fraction)[1]",
     "1 - config.val_fraction)[1]"),
]
