"""Bugs planted in rollout.py, and the tests that ought to notice them."""

PROMPTS = (
    "whole/test_ppo_control.py::"
    "test_ppo_takes_its_part_of_the_prompts_and_evaluation_those_that_no_stage_has_seen")
DEALT = (
    "whole/test_ppo_control.py::test_ranks_share_prompts_replies_and_minibatches_as_one_process_has_them[2]")

MUTANTS = [
    ("ppo: --part is ignored", PROMPTS,
     'read_rows(config.data, "prompts", say, config.part, config.skip_bad)',
     'read_rows(config.data, "prompts", say)'),
    ("ppo: --val-fraction is ignored", PROMPTS,
     "split_by_prompt(rows, config.val_fraction)",
     "split_by_prompt(rows, config.val_fraction if held_out else 0.0)"),
    ("ranks: the same prompts", DEALT,
     "return drawn[run.rank::run.world_size]",
     "return drawn[:count // run.world_size]"),
    ("ranks: the first one gets the short prompts", DEALT,
     "return drawn[run.rank::run.world_size]",
     "return drawn[run.rank * (count // run.world_size):][:count // run.world_size]"),
    ("ranks: the same uniform numbers", DEALT,
     "by_prompt[run.rank::run.world_size]",
     "by_prompt[:len(prompts)]"),
    ("evaluate: prompts that were trained on", PROMPTS,
     "        train = kept_back\n",
     ""),
]
