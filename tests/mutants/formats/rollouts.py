"""Bugs planted in formats/rollouts.py, and the tests that ought to notice them."""

MUTANTS = [
    ("the sampler's temperature is not looked at",
     "formats/test_rollouts.py::test_what_was_sampled_otherwise_is_refused",
     "math.isclose(given, temperature, rel_tol=1e-6)",
     "given > 0"),
    ("a cut sampler is taken",
     "formats/test_rollouts.py::test_what_was_sampled_otherwise_is_refused",
     "is_number(given) and given in harmless",
     "is_number(given)"),
    ("as many logprobs as there happen to be",
     "formats/test_rollouts.py::test_a_row_that_is_damaged_is_named",
     "require(len(logprobs) == tokens,",
     "require(len(logprobs) <= tokens,"),
    ("probabilities are taken for their logarithms",
     "formats/test_rollouts.py::test_a_row_that_is_damaged_is_named",
     "require(max(logprobs) <= ROUNDING,",
     "require(max(logprobs) <= 1,"),
]
