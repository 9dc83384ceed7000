"""Bugs planted in plumbing/hardware.py, and the tests that ought to notice them."""

MUTANTS = [
    ("dtype: bfloat16 on a CPU for narrow models too",
     "plumbing/test_hardware.py::"
     "test_auto_is_bfloat16_on_a_cpu_that_multiplies_in_it_and_for_wide_models_alone",
     "if amx and width >= 256",
     "if amx"),
]
