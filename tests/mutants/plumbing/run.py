"""Bugs planted in plumbing/run.py, and the tests that ought to notice them."""

SEEDS = (
    "plumbing/test_run.py::"
    "test_every_step_and_rank_draws_from_a_seed_of_its_own_and_the_generator_from_one_of_the_step")
PPO_RESUME = (
    "whole/test_ppo_control.py::"
    "test_resuming_with_everything_that_has_a_state_equals_never_stopping_bit_for_bit[updating]")
SLIM = "faults/test_checkpoints.py::test_a_finished_run_without_checkpoints_is_complete_and_stays"

MUTANTS = [
    ("dtype: that of the narrowest model",
     "plumbing/test_hardware.py::test_a_run_settles_on_the_precision_that_its_widest_model_wants",
     "widest = max(",
     "widest = 0 * max("),

    # -- steps, signals
    ("ranks: gradients exchanged at the first micro-batch",
     "whole/test_trainers.py::test_two_ranks_train_as_one_does[sft-ddp]",
     "not more and i == len(pieces) - 1",
     "not more and i == 0"),
    ("ranks: draw the same noise", SEEDS,
     "torch.manual_seed(seed + 1 + self.rank)",
     "torch.manual_seed(seed + 1)"),
    ("ranks: draw apart what they should draw together", SEEDS,
     "torch.Generator(self.device).manual_seed(seed)",
     "torch.Generator(self.device).manual_seed(seed + self.rank)"),
    ("signal: a run stops without saving", PPO_RESUME,
     "        if self.clean and self.any_rank(self.asked_to_stop()):\n            self._save(last=True)\n",
     "        if self.clean and self.any_rank(self.asked_to_stop()):\n"),

    # -- resuming
    ("resume: from the step after", PPO_RESUME,
     '        self.step = state["step"]\n',
     '        self.step = state["step"] + 1\n'),
    ("resume: forgets what the script keeps", PPO_RESUME,
     '        self.state.update(state["extra"])\n',
     ""),
    ("resume: whatever has changed",
     "whole/test_ppo_control.py::test_resume_refuses_when_a_later_reward_or_the_demonstrations_have_changed",
     "require(not changed or self.config.override,",
     "require(True,"),

    # -- what a run is built on, what it says, and what is said of it
    ("resume: a mixture's files are as they are spelled",
     "whole/test_resume.py::"
     "test_resume_notices_a_file_that_has_changed_however_it_is_named[{a}:5e-1, {b}:+.5]",
     "paths = [path for path, _ in parse_sources(spec)]",
     'paths = spec.split(",")'),
    ("resume: today's date",
     "whole/test_resume.py::test_a_run_resumed_another_day_writes_the_date_of_its_beginning[nothing]",
     "        if self.config.resume:\n            states = ",
     "        if False:\n            states = "),
    ("resume: the date is run.json's alone",
     "whole/test_resume.py::test_a_run_resumed_another_day_writes_the_date_of_its_beginning[run.json]",
     "for name in self.checkpoints.all()]\n            states.append",
     "for name in []]\n            states.append"),
    ("resume: a finished run without checkpoints begins anew", SLIM,
     "        if not model:\n            return None\n",
     "        return None\n"),
    ("resume: a model that may not be finished is trained over",
     "faults/test_checkpoints.py::test_a_model_of_a_run_without_checkpoints_that_may_not_be_finished_stays",
     "        require(done or not model,\n",
     "        require(True,\n"),
    ("resume: a finished run has as many steps as are asked for", SLIM,
     "        require(done == total,\n",
     "        require(True,\n"),
    ("resume: back to fewer steps",
     "faults/test_checkpoints.py::test_a_run_cannot_be_taken_back_to_fewer_steps_than_it_has_taken",
     'require(state["step"] <= total,',
     "require(True,"),
    ("console: a letter that it lacks ends the run",
     "whole/test_output.py::test_no_letter_that_a_console_lacks_ends_a_script[gbk]",
     'stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")',
     "pass"),
    ("console: nobody who reads on is an error",
     "whole/test_output.py::"
     "test_a_script_whose_output_nobody_reads_ends_quietly_and_writes_whole_files[False]",
     "    atexit.register(flush_output)\n",
     ""),
    ("console: a reader who leaves gets a traceback",
     "whole/test_output.py::"
     "test_a_script_whose_output_nobody_reads_ends_quietly_and_writes_whole_files[True]",
     "            sys.exit(128 + signal.SIGPIPE)\n",
     "            pass\n"),
    ("log: an old value beside a new step",
     "plumbing/test_metrics.py::test_a_line_of_the_log_has_no_old_value_beside_a_new_step",
     "if measured != step:",
     "if False:"),
    ("boards: missed when the folder has been made",
     "whole/test_commands.py::test_a_mistake_ends_in_one_line_and_exit_code_2",
     "            check_boards(config)\n",
     "            pass\n"),

    # -- a second device, shards in a GPU's precision
    ("device: the numbers that draw tokens come from the CPU's generator",
     "whole/test_second_device.py::test_a_run_goes_through_and_its_numbers_are_those_of_the_cpu",
     "return torch.Generator(self.device)",
     "return torch.Generator()"),
]
