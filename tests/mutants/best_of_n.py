"""Bugs planted in best_of_n.py, and the tests that ought to notice them."""

LAW = (
    "test_best_of_n.py::test_the_best_of_n_follows_the_law_f_to_the_n_"
    "and_equal_rewards_share_as_in_the_reference")
WHOLE = "test_best_of_n.py::test_the_whole_script_selects_by_that_law_and_never_what_was_cut_off_or_is_blank"
BOUND = (
    "test_best_of_n.py::test_the_kl_is_at_most_its_bound_and_equals_it_where_no_two_replies_score_the_same")
SIZES = "test_best_of_n.py::test_each_selection_has_the_size_that_it_promises"
CONTROL = "test_best_of_n.py::test_the_random_control_does_not_look_at_the_score"
EQUALS = "test_best_of_n.py::test_the_best_is_the_first_of_equals_and_a_battle_is_lost_only_to_a_better_reply"
FILES = "test_best_of_n.py::test_files_hold_the_best_all_ranks_with_ties_and_the_best_against_the_worst"
BATTLES = ("test_best_of_n.py::test_a_lost_battle_gives_the_winners_reply_and_the_pair_of_both_"
           "and_all_battles_are_ranked")
SAME = "test_best_of_n.py::test_the_same_reply_has_one_score_within_its_group"
NO_NUMBER = "test_best_of_n.py::test_a_score_that_is_no_number_is_one_clear_line_and_nothing_is_written"
GROUPS = "test_best_of_n.py::test_every_group_consists_of_the_replies_to_its_own_prompt_and_of_all_of_them"
ROUNDS = "test_best_of_n.py::test_two_rounds_train_measure_and_resume"
QUALITY = ROUNDS + "[--train quality-False]"
CTRL_C = "test_best_of_n.py::test_ctrl_c_reaches_the_script_once_and_is_waited_for"

MUTANTS = [
    ("best of n: the worst", LAW,
     "winner = np.where(usable, scores, -np.inf).argmax(1)",
     "winner = np.where(usable, -scores, -np.inf).argmax(1)"),
    ("best of n: the last of equals", EQUALS,
     "winner = np.where(usable, scores, -np.inf).argmax(1)",
     "winner = scores.shape[1] - 1 - np.where(usable, scores, -np.inf)[:, ::-1].argmax(1)"),
    ("best of n: none where the best may not be kept", SIZES,
     "winner = np.where(usable, scores, -np.inf).argmax(1)",
     "winner = scores.argmax(1)"),
    ("best of n: the bound without its second term", BOUND,
     "math.log(n) - (n - 1) / n",
     "math.log(n)"),
    ("best of n: a control that prefers high scores", CONTROL,
     "scores = rng.random(scores.shape)",
     "scores = scores + rng.random(scores.shape)"),
    ("best of n: the top share of the prompts", SIZES,
     "count = round(share * usable.sum())",
     "count = round(share * len(scores))"),
    ("best of n: the top share is the lowest", SIZES,
     "order = np.argsort(-np.where(usable, scores, -np.inf)",
     "order = np.argsort(np.where(usable, scores, np.inf)"),
    ("best of n: what was cut off is selected", WHOLE,
     "batch.ended.cpu() & ~blank",
     "~blank"),
    ("best of n: what is blank is selected", WHOLE,
     "batch.ended.cpu() & ~blank",
     "batch.ended.cpu()"),
    ("best of n: ranks the wrong way round", FILES,
     "(own[some][:, None] < own[some])",
     "(own[some][:, None] > own[some])"),
    ("best of n: pairs of equal scores", FILES,
     "own[high] > own[low]",
     "own[high] >= own[low]"),
    ("best of n: the same reply with two scores", SAME,
     "own[i] = first.setdefault(reply, own[i])",
     "first.setdefault(reply, own[i])"),
    ("best of n: a reply has the score of the same text that was cut off", SAME,
     "for i, reply in enumerate(zip(*replies)):",
     "for i, reply in enumerate(replies[0]):"),
    ("best of n: a score that is no number", NO_NUMBER,
     "require(values.isfinite().all(), f",
     "require(True, f"),
    ("best of n: replies of several prompts in a group", GROUPS,
     "values.reshape(-1, columns)",
     "values.reshape(columns, -1).T"),
    ("arena: the policy's own reply wins", EQUALS,
     "kept[:, 0] = False",
     "kept[:, 0] = kept[:, 0]"),
    ("arena: the loser of a pair is the worst of all", BATTLES,
     "worst = np.zeros_like(best)",
     "pass"),
    ("rounds: every one begins with the first model", ROUNDS,
     'policy = str(folder / "model")',
     "policy = config.model"),
    ("rounds: every one draws the same numbers", ROUNDS,
     "seed = (config.seed * 1009 + number) % 1_000_001",
     "seed = config.seed"),
    ("rounds: the bound of one round", ROUNDS,
     "kl_bound(config.n**rounds)",
     "kl_bound(config.n)"),
    ("rounds: the fixed reference is reset", ROUNDS,
     'given += ["--reference", config.model]',
     "pass"),
    ("rounds: DPO learns the selected replies", ROUNDS,
     '"dpo": "pairs.jsonl"',
     '"dpo": "sft.jsonl"'),
    ("quality: the pool is the last round's", QUALITY,
     'data = ",".join(str(out / f"round_{k}" / file) for k in range(1, number + 1))',
     "pass"),
    ("quality: the reference is the last round's model", QUALITY,
     'if config.reference == "fixed" or quality:',
     'if config.reference == "fixed":'),
    ("quality: a row lacks its scores",
     "test_best_of_n.py::test_files_hold_the_best_all_ranks_with_ties_and_the_best_against_the_worst",
     '"scores": own[some].tolist()',
     '"scores": ranks'),
    ("rounds: a script is killed on Ctrl-C", CTRL_C,
     "process.send_signal(signal.SIGINT)",
     "process.kill()"),
    ("rounds: a script that fails is passed over",
     "test_best_of_n.py::test_a_script_that_fails_ends_the_rounds_with_its_exit_code_and_its_words",
     "        sys.exit(code)\n",
     "        pass\n"),
    ("search: the worst continuation goes on",
     "test_process.py::test_a_search_by_steps_goes_on_from_the_best_continuation",
     "scores.view(-1, config.n).argmax(1)",
     "scores.view(-1, config.n).argmin(1)"),
    ("search: whole replies are compared",
     "test_process.py::test_a_search_by_steps_goes_on_from_the_best_continuation",
     "candidates.append(reply[:end + 1])",
     "candidates.append(reply)"),
    ("search: it begins anew in every round",
     "test_process.py::test_a_search_by_steps_goes_on_from_the_best_continuation",
     "questions += [asked[i].ids + kept[i]] * config.n",
     "questions += [asked[i].ids] * config.n"),
]
