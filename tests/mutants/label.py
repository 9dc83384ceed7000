"""Bugs planted in label.py, and the tests that ought to notice them."""

ORDER = "test_label.py::test_replies_change_places_by_item_and_person_and_are_turned_round_the_second_time"
AGAIN = "test_label.py::test_each_item_is_asked_once_and_a_share_again_later"
LEAD = "test_label.py::test_a_place_on_a_scale_is_a_lead_of_the_left_one"
ROWS = "test_label.py::test_votes_become_rows_that_mean_what_was_said"
TABLES = "test_label.py::test_agreement_of_known_tables"
SUMMARY = "test_label.py::test_a_summary_counts_by_hand"
OWN = "test_label.py::test_answers_are_kept_in_the_items_own_order"
TWICE = "test_label.py::test_a_vote_sent_twice_is_one_and_another_on_the_same_item_is_refused"
FULL = "test_label.py::test_a_second_writer_is_refused_and_a_full_disk_leaves_the_file_as_it_was"

MUTANTS = [
    ("label: replies always stand as the file has them", ORDER,
     "return order[::-1] if repeat else order", "return sorted(order)"),
    ("label: a repeat is not turned round", ORDER,
     "return order[::-1] if repeat else order", "return order"),
    ("label: everybody sees the same places", ORDER,
     "key=lambda i: hashed(seed, annotator, item.id, i))", "key=lambda i: hashed(seed, item.id, i))"),
    ("label: repeats come at once", AGAIN,
     "again.append(order[place - GAP - 1])", "again.append(order[place - 1])"),
    ("label: the scale counts from the other end", LEAD,
     "return (points + 1 - 2 * vote[\"value\"]) / (points - 1)",
     "return (2 * vote[\"value\"] - points - 1) / (points - 1)"),
    ("label: who stood left is forgotten", LEAD,
     "return {(0, 1): lead if vote[\"shown\"][0] == 0 else -lead}", "return {(0, 1): lead}"),
    ("label: the exported scale is turned round", ROWS,
     "value = points + 1 - vote[\"value\"]", "value = vote[\"value\"]"),
    ("label: repeats are exported", ROWS,
     "if repeat or vote.get(\"skipped\") or item not in by_id:",
     "if vote.get(\"skipped\") or item not in by_id:"),
    ("label: both bad is good", ROWS,
     "\"label\": verdict == \"both_good\"}", "\"label\": verdict == \"both_bad\"}"),
    ("label: kappa without chance", TABLES,
     "float((np.trace(table) - expected) / (1 - expected))", "float(np.trace(table))"),
    ("label: alpha takes numbers for names", TABLES,
     "distance = (upto[:, None] - upto) ** 2", "distance = (upto[:, None] != upto) * 1.0"),
    ("label: alpha counts those who answer alone", TABLES,
     "units = [unit for unit in units if len(unit) > 1]", "units = [unit for unit in units if unit]"),
    ("label: ties are losses", SUMMARY,
     "rate = (counts[1] + counts[0] / 2) / of", "rate = counts[1] / of"),
    ("label: the second model's wins are the first's", SUMMARY,
     "            i, j, sign = j, i, -sign\n", "            i, j = j, i\n"),
    ("label: the longer one loses", SUMMARY,
     "longer[(letters > 0) == (sign > 0)] += 1", "longer[(letters < 0) == (sign > 0)] += 1"),
    ("label: repeats are counted as votes", SUMMARY,
     "                same.update(category(first[unit]) == category(units[unit]) for unit in both)\n"
     "                continue\n",
     "                same.update(category(first[unit]) == category(units[unit]) for unit in both)\n"),
    ("label: answers stay as they stood on the page", OWN,
     "        own[at] = answer\n", "        own[answers.index(answer)] = answer\n"),
    ("label: a vote sent twice counts twice", TWICE,
     "        if vote_id not in self.votes.by_id:\n            item, repeat = self.entry_of(body)",
     "        if True:\n            item, repeat = self.entry_of(body)"),
    ("label: an item may have two votes", TWICE,
     "            if (item.id, repeat) in self.votes.live():", "            if False:"),
    ("label: a failed write leaves half a line", FULL,
     "            self.file.truncate(size)\n            raise", "            raise"),
    ("label: a torn line stays", "test_label.py::test_a_torn_last_line_is_set_aside_and_a_damaged_one_stops",
     "            self.file.truncate(whole)\n", ""),
    ("label: an undone vote stands",
     "test_label.py::test_what_was_appended_is_read_again_and_an_undo_takes_back",
     "if \"undoes\" not in record and record[\"id\"] not in undone:", "if \"undoes\" not in record:"),
]
