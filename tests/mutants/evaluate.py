"""Bugs planted in evaluate.py, and the tests that ought to notice them."""

EVALUATION = (
    "test_evaluate.py::test_evaluation_equals_one_reply_at_a_time_and_counts_wins_against_the_first_model")

MUTANTS = [
    ("evaluate: the KL's direction", EVALUATION,
     "kl[part.rows] = (logprobs - ref_logprobs).sum(1)",
     "kl[part.rows] = (ref_logprobs - logprobs).sum(1)"),
    ("evaluate: the KL at temperature 1", EVALUATION,
     "logprobs = model(part.ids, part.where, config.temperature)[0]",
     "logprobs = model(part.ids, part.where, 1.0)[0]"),
    ("evaluate: wins and losses swapped", EVALUATION,
     'return {"wins": wins, "ties": ties, "losses": losses,',
     'return {"wins": losses, "ties": ties, "losses": wins,'),
    ("evaluate: each model against the one before", EVALUATION,
     "        replies[folder] = []\n",
     "        replies[folder] = []\n        baseline = compared\n"),
    ("evaluate: a sum without weights",
     "test_evaluate.py::test_evaluation_scores_by_a_weighted_sum_and_names_all_of_it",
     'columns["score"] = weights @ source_scores',
     'columns["score"] = source_scores.sum(0)'),
    ("evaluate: a KL of replies that are no samples",
     "test_evaluate.py::test_evaluation_at_temperature_0_has_no_kl",
     "float(np.mean(kl)) if config.temperature > 0 else None",
     "float(np.mean(kl))"),
]
