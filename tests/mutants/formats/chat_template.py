"""Bugs planted in formats/chat_template.py, and the tests that ought to notice them."""

MASKS = "formats/test_chat_template.py::test_masks_are_what_the_assistant_says"

MUTANTS = [
    ("chat template: contents aren't hidden from the split at special tokens",
     "formats/test_chat_template.py::test_no_content_ever_becomes_a_special_token",
     'special.sub(lambda found: stand_ins[found[0]], message["content"])',
     'message["content"]'),
    ("chat template: what begins a reply in its mask", MASKS,
     "before = self.render(messages[:i], True)",
     "before = self.render(messages[:i], False)"),
    ("chat template: what stands behind the end token in the mask", MASKS,
     "return turn[:turn.index(self.ending) + len(self.ending)]",
     "return turn"),
]
