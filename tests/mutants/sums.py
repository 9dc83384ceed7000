"""Bugs for sums.py: rows (name, test that ought to kill it, old, new)."""
STEPS = "test_sums.py::test_a_step_is_right_that_follows_from_the_one_before"
SHARES = "test_sums.py::test_the_share_of_right_steps_counts_what_is_missing_and_what_is_too_much"
RIGHT = "test_sums.py::test_a_reply_is_right_that_ends_in_so_and_the_answer"
SPLITS = "test_sums.py::test_held_out_sums_are_never_trained_on_and_none_comes_twice"
ANSWERS = "test_sums.py::test_answers_reach_functions_with_prompts_and_demonstrations_alike"
SHARES_WRONG = "test_sums.py::test_the_stated_shares_of_demonstrations_have_a_wrong_step_and_leave_some_out"

MUTANTS = [
    ("sums: a partial sum leaves its range", "test_sums.py::test_answers_are_the_sums_and_no_partial_sum_leaves_its_range",
     "0 <= total + term <= LARGEST]", "0 <= total + term]"),
    ("sums: the answer is that without the first term", "test_sums.py::test_answers_are_the_sums_and_no_partial_sum_leaves_its_range",
     '"answer": str(sum(terms))', '"answer": str(sum(terms[1:]))'),
    ("sums: held-out ones are trained on", SPLITS, '"train": sums[config.heldout_sums:]}', '"train": sums[:config.sums]}'),
    ("sums: the same one may come twice", SPLITS, "drawn[tuple(terms)] = terms", "drawn[len(drawn)] = terms"),
    ("sums: demonstrations lose their answers", ANSWERS,
     'demonstrations.append(asked | {"completion": reply})', 'demonstrations.append({"prompt": asked["prompt"], "completion": reply})'),
    ("sums: a wrong step in as many as are to be right", SHARES_WRONG, "rng.random() < config.wrong,", "rng.random() >= config.wrong,"),
    ("sums: no wrong step is carried on", SHARES_WRONG, "total = stated if carried else total + term", "total = total + term"),
    ("sums: the hasty leave nothing out", SHARES_WRONG, "rng.integers(1, len(terms) - 1) if hasty", "rng.integers(1, len(terms)) if hasty"),
    ("sums: any so counts", RIGHT, '({WHOLE})$"', '({WHOLE})"'),
    ("sums: a reply that begins with the answer is right", RIGHT, "end[1] == answer)", "end[1][0] == answer[:1])"),
    ("steps: wrong ones are right if they follow", STEPS, " and value_of(begin) == value_of(end)", ""),
    ("steps: any first number will do", STEPS, "fine = begin in ways and whole", "fine = whole"),
    ("steps: what is forgotten is no way to go on", STEPS,
     'ways = (f"{stated}{term:+d}", f"{true}{term:+d}")', 'ways = (f"{stated}{term:+d}",)'),
    ("steps: what is carried on is no way to go on", STEPS,
     'ways = (f"{stated}{term:+d}", f"{true}{term:+d}")', 'ways = (f"{true}{term:+d}",)'),
    ("steps: so may come again", STEPS, "fine = number == len(terms) and step in", "fine = step in"),
    ("steps: missing ones are not counted", SHARES, "max(len(checked), len(terms_of(prompt)))", "len(checked)"),
    ("steps: those that are too many are not counted", SHARES, "max(len(checked), len(terms_of(prompt)))", "len(terms_of(prompt))"),
    ("sums: the files don't depend on the seed", "test_sums.py::test_files_repeat_by_seed_and_other_seeds_differ",
     "np.random.default_rng([config.seed, 1])", "np.random.default_rng([0, 1])"),
    ("sums: numbers are cut into digits", "test_sums.py::test_every_number_and_what_stands_between_them_is_a_token",
     'PIECES = r"[0-9]+|[^0-9]+"', 'PIECES = r"[0-9]|[^0-9]+"'),
    ("sums: draws for ever", "test_sums.py::test_what_cannot_be_written_is_refused_before_anything_is",
     "for _ in range(20 * wanted):", "while True:"),
]
