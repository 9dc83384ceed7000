"""Bugs planted in formats/foreign_tokenizer.py, and the tests that ought to notice them."""

CHOSEN = "formats/test_foreign_tokenizer.py::test_eos_stops_pad_and_document_are_chosen"

MUTANTS = [
    ("special tokens: a model may spell them",
     "formats/test_foreign_tokenizer.py::test_a_model_that_would_spell_a_special_token_is_kept_from_it",
     "if self.leaky.search(text):",
     "if False:"),
    ("special tokens: all are spelled letter by letter in a text",
     "formats/test_foreign_tokenizer.py::test_a_special_token_in_a_text_is_merged_as_other_text_is",
     "self.engine.encode_special_tokens = True",
     "self.engine.encode_special_tokens = False"),
    ("chat template: end token out of the mask",
     "formats/test_chat_template.py::test_masks_are_what_the_assistant_says",
     "mask += [reply] * (len(ids) - start)",
     "mask += [reply and i != self.eos for i in ids[start:]]"),
    ("special tokens: the end token pads", CHOSEN,
     "return pads[0] if pads else CONTROLS[1]",
     "return self.engine.id_to_token(self.eos)"),
    ("special tokens: replies end with one of them alone", CHOSEN,
     "self.stops = tuple(dict.fromkeys([eos, *endings]))",
     "self.stops = (eos,)"),
    ("special tokens: those added aren't counted", CHOSEN,
     "self.added = self.n_vocab - size",
     "self.added = 0"),
]
