"""Bugs planted in plumbing/checkpoints.py, and the tests that ought to notice them."""

FALL_BACK = (
    "whole/test_resume.py::"
    "test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_refused_if_there_is_none")

MUTANTS = [
    ("resume: forgets the optimiser's state",
     "whole/test_ppo_control.py::"
     "test_resuming_with_everything_that_has_a_state_equals_never_stopping_bit_for_bit[updating]",
     "            tensor.copy_(saved)\n",
     '            tensor.copy_(saved) if "optimizer" not in name else None\n'),
    ("checkpoint: is not compared with its manifest", FALL_BACK,
     "            problem = find_damage(self.root / name)\n",
     '            problem = ""\n'),
    ("checkpoint: the one before is deleted", FALL_BACK,
     " | self._previous(older, step)",
     ""),
]
