"""Bugs planted in plumbing/flags.py, and the tests that ought to notice them."""

MUTANTS = [
    ("flags: --epochs drops --steps",
     "whole/test_commands.py::test_a_mistake_ends_in_one_line_and_exit_code_2",
     'if given.get("epochs") and config_class.epochs == 0 and "steps" in given:',
     "if False:"),
    ("flags: ppo's --epochs exclude --steps too",
     "whole/test_commands.py::test_of_ppos_flags_steps_and_epochs_go_together",
     'if given.get("epochs") and config_class.epochs == 0 and',
     'if given.get("epochs") and'),
    ("help: the common flags first", "whole/test_commands.py::test_help_begins_with_the_flags_of_the_script",
     "group = own if field.name in config_class.__annotations__ else common",
     "group = common if field.name in config_class.__annotations__ else own"),
    ("a sampler that is not scored is an unknown flag like any other",
     "whole/test_recorded_replies.py::test_training_has_no_sampler_that_is_not_scored_and_says_why",
     'argument.split("=")[0] in refused',
     'argument in refused'),
]
