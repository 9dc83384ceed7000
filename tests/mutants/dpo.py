"""Bugs planted in dpo.py, and the tests that ought to notice them."""

FORMULA = "whole/test_trainers.py::test_a_step_follows_the_formula_taken_one_reply_at_a_time[dpo]"
LOSSES = "test_dpo.py"
RESUME = "whole/test_adapter_runs.py::test_dpo_with_adapters_resumes_against_the_reference_that_it_began_with"

MUTANTS = [
    ("dpo: the reference's sign", FORMULA,
     "log_ratios = logprobs - reference_sums",
     "log_ratios = logprobs + reference_sums"),
    ("dpo: no reference", FORMULA,
     "log_ratios = logprobs - reference_sums",
     "log_ratios = logprobs"),
    ("dpo: beta forgotten on one side", LOSSES,
     "label_smoothing * F.logsigmoid(-h)",
     "label_smoothing * F.logsigmoid(-gap)"),
    ("dpo: label smoothing of the wrong side", LOSSES,
     "label_smoothing * F.logsigmoid(-h)",
     "label_smoothing * F.logsigmoid(h)"),
    ("ipo: beta forgotten", LOSSES,
     "(gap - 1 / (2 * beta)).square()",
     "(gap - 1 / 2).square()"),
    ("dpo: a mean over tokens, of the policy alone", FORMULA,
     "logprobs = policy(ids, mask)[0].sum(1)",
     "logprobs = policy(ids, mask)[0].sum(1) / mask.sum(1)"),
    ("dpo: the reference is the policy that a resumed run loads", RESUME,
     "reference = frozen_reference(model, config)",
     "reference = model"),
    ("dpo: the reference gets the adapters", RESUME,
     "    prepare_training(model, config)\n",
     "    prepare_training(model, config)\n    reference = copy_of(model, shared)\n"),
    ("dpo: --reference is passed over",
     "test_dpo.py::test_dpo_refers_to_the_model_that_it_starts_from_or_to_that_of_reference",
     "    if config.reference:\n",
     "    if False:\n"),
    ("dpo: a rank without examples counts the first twice",
     "whole/test_trainers.py::test_a_rank_that_gets_no_examples_adds_nothing[dpo-lost2]",
     "weight = weight * counts / len(batch)",
     "weight = weight / len(batch)"),
    ("choices: an unknown loss is the hinge",
     "test_ppo.py::test_a_choice_that_has_no_branch_is_an_error_and_nothing_else_instead",
     'elif kind == "hinge":',
     "elif True:"),
]
