"""Bugs planted in constitution.py, and the tests that ought to notice them."""

SWAP = "test_constitution.py::test_swapping_the_replies_gives_one_minus_p_exactly"
SLOW = "test_constitution.py::test_p_is_that_of_a_slow_computation_in_transformers"
FUNCTION = "test_constitution.py::test_a_function_labels_by_the_difference_of_its_scores_whatever_the_order"
NO_FILE = "test_constitution.py::test_equal_blank_and_cut_off_replies_and_ties_are_in_no_file"
NUMBERS = "test_constitution.py::test_the_numbers_of_a_planted_judge"
TOO_LONG = "test_constitution.py::test_a_pair_that_is_too_long_for_the_judge_gets_no_label_and_stops_nobody"
ROUND = ("test_constitution.py::"
         "test_a_round_asks_for_a_critique_then_for_a_revision_and_the_next_begins_with_that")
BLANK = ("test_constitution.py::"
         "test_without_a_critique_request_or_with_a_blank_critique_the_revision_is_asked_for_at_once")
CUT_OFF = "test_constitution.py::test_a_critique_that_was_cut_off_counts_and_such_a_revision_does_not"
MENDED = "test_constitution.py::test_what_was_cut_off_or_blank_may_be_mended_and_then_stands_in_no_pair"
DRAWN = "test_constitution.py::test_each_pair_is_judged_by_a_principle_drawn_by_seed"
SAMPLED = "test_constitution.py::test_what_is_sampled_depends_on_the_seed_and_the_part_alone"
SELF = "test_constitution.py::test_the_policy_judges_itself_without_a_second_copy"

MUTANTS = [
    ("labels: one order alone", SWAP,
     "torch.sigmoid(-lead[:, 1])",
     "torch.sigmoid(lead[:, 0])"),
    ("labels: the second order the wrong way round", SLOW,
     "torch.sigmoid(-lead[:, 1])",
     "torch.sigmoid(lead[:, 1])"),
    ("labels: the temperature multiplies", SLOW,
     "lead.double() / temperature",
     "lead.double() * temperature"),
    ("labels: both orders are the first", SWAP,
     "for a, b in ((x, y), (y, x))",
     "for a, b in ((x, y), (x, y))"),
    ("labels: the first principle for all", DRAWN,
     "principle = work.principles[rng.integers(len(work.principles))]",
     "principle = work.principles[0]"),
    ("labels: a question longer than the context", TOO_LONG,
     "for question in own) <= work.feedback.config.block_size:",
     "for question in own) <= 10**9:"),
    ("labels: the worse reply is chosen", FUNCTION,
     "(first, last) if p > 0.5 else (last, first)",
     "(last, first) if p > 0.5 else (first, last)"),
    ("labels: the probability of the first reply", NO_FILE,
     "max(p, 1 - p)}",
     "p}"),
    ("labels: a tie has a chosen reply", NO_FILE,
     "        if p != 0.5:\n",
     "        if 'p_1' in record:\n"),
    ("labels: what was cut off or is blank is compared", NO_FILE,
     "usable(record, 0) and usable(record, -1) and first != last",
     "first != last"),
    ("labels: equal replies are compared", NO_FILE,
     "usable(record, -1) and first != last",
     "usable(record, -1)"),
    ("labels: a function's scores are halved by the order", FUNCTION,
     "torch.stack([lead, -lead], 1)",
     "torch.stack([lead, lead], 1)"),
    ("labels: the position bias is the mean label", NUMBERS,
     "(p_1 - p_2).mean()",
     "(p_1 + p_2 - 1).mean()"),
    ("labels: the same letter is the same verdict", NUMBERS,
     "(p_1 - 0.5) * (p_2 - 0.5) < 0",
     "(p_1 - 0.5) * (p_2 - 0.5) > 0"),
    ("labels: ties count as disagreement", NUMBERS,
     "decided = (lead != 0) & (p != 0.5)",
     "decided = lead == lead"),
    ("revisions: the critique is forgotten", ROUND,
     "talks[i] = with_reply(Row(dialogue), text)",
     "pass"),
    ("revisions: each round begins with the first reply", ROUND,
     'last = [record["replies"][-1] for record in records]',
     'last = [record["replies"][0] for record in records]'),
    ("revisions: a blank critique is a turn", BLANK,
     "            if text.strip():\n",
     "            if True:\n"),
    ("revisions: one that was cut off is taken", CUT_OFF,
     'text if ended else ""',
     "text"),
    ("revisions: a blank one is taken", MENDED,
     "taken = bool(revision and revision.strip())",
     "taken = revision is not None"),
    ("revisions: a mended reply counts as cut off", MENDED,
     'record["ended"].append(taken or record["ended"][-1])',
     'record["ended"].append(record["ended"][-1])'),
    ("revisions: the first reply is chosen", MENDED,
     '{"chosen": last, "rejected": first}',
     '{"chosen": first, "rejected": last}'),
    ("records: a judge's number of another reply", FUNCTION,
     "np.reshape(judge_texts(function, repeated, replies, ended), (-1, size))",
     "np.reshape(judge_texts(function, repeated, replies, ended), (size, -1)).T"),
    ("records: every part draws the same", SAMPLED,
     "config.seed * 1_000_003 + start",
     "config.seed * 1_000_003"),
    ("feedback: the policy is opened twice", SELF,
     "    elif config.feedback:\n        feedback, feedback_tokenizer = load_model(config.feedback,",
     "    else:\n        feedback, feedback_tokenizer = load_model(config.feedback or config.model,"),
]
