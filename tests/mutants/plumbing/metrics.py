"""Bugs planted in plumbing/metrics.py, and the tests that ought to notice them."""

MUTANTS = [
    ("metrics: rows after the checkpoint stay",
     "whole/test_resume.py::test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit[sft]",
     'if row["step"] < step or at_checkpoint:',
     "if True:"),
]
