"""Bugs planted in formats/sources.py, and the tests that ought to notice them."""

PARTS = (
    "formats/test_sources.py::"
    "test_parts_are_disjoint_cover_everything_and_know_nothing_of_the_held_out_prompts")
DOCUMENT = "formats/test_sources.py::test_of_a_document_the_end_is_held_out_whatever_its_hash"

MUTANTS = [
    ("split: by row, not by prompt",
     "formats/test_sources.py::test_split_keeps_a_prompt_on_one_side_whatever_the_order",
     "unit_hash(row.text) < fraction",
     "unit_hash(row.text + row.replies[0]) < fraction"),
    ("parts: by the hash of the split", PARTS,
     'unit_hash(row.text, "part ")',
     "unit_hash(row.text)"),
    ("parts: counted from 0", PARTS,
     "bisect.bisect(ends[1:], place) + 1 == number",
     "bisect.bisect(ends[1:], place) == number"),
    ("mixture: repeats rows",
     "formats/test_sources.py::test_a_mixture_has_its_shares_repeats_no_row_and_is_the_same_every_time",
     "np.random.default_rng(i).permutation(len(rows))[:count]",
     "np.random.default_rng(i).integers(len(rows), size=count)"),
    ("documents: a hash decides on all of one", DOCUMENT,
     "if row.document:\n            train +=",
     "if False:\n            train +="),
    ("documents: their held-out end is trained on", DOCUMENT,
     "train += piece_of(row, 0, 1 - fraction)",
     "train += [row]"),
    ("documents: cut where the share ends, amid a line", DOCUMENT,
     "            return place\n    return wanted",
     "            return wanted\n    return wanted"),
    ("csv: labels and ratings stay text", "formats/test_sources.py::test_csv_rows_are_those_of_json",
     "return known.get(text.strip().lower(), as_number(text))",
     "return text"),
    ("csv: the process keeps the longer limit",
     "formats/test_sources.py::test_a_csv_as_other_programs_write_it",
     "        csv.field_size_limit(limit)\n",
     "        pass\n"),
    ("csv: a quote that is never closed takes the rest",
     "formats/test_sources.py::test_a_file_that_cannot_be_read_is_named_with_the_place",
     "delimiter=delimiter, strict=True)",
     "delimiter=delimiter)"),
    ("encodings: whatever decodes is called GBK",
     "formats/test_sources.py::test_a_file_in_another_encoding_is_told_how_to_convert_it",
     "len(common) > 0.9 * len(foreign)",
     "foreign"),
]
