"""Bugs planted in sft.py, and the tests that ought to notice them."""

FORMULA = "whole/test_trainers.py::test_a_step_follows_the_formula_taken_one_reply_at_a_time[sft]"
CONVERSATIONS = "test_sft.py::test_sft_notes_conversations_and_leaves_open_what_models_of_others_have_seen"

MUTANTS = [
    ("sft: prompts and padding in the mean", FORMULA,
     "sum(sum(train[i].mask) for i in batch)",
     "sum(len(train[i].mask) for i in batch)"),
    ("sft: a mean for each micro-batch", FORMULA,
     "-logprob * counts / tokens",
     "-logprob * counts / mask.sum()"),
    ("sft: an optimiser step for each micro-batch", FORMULA,
     "run.backward(piece_loss, optimizer)\n",
     "run.backward(piece_loss, optimizer), optimizer.step(), optimizer.zero_grad()\n"),
    ("sft: held-out loss over padding too", "test_sft.py::test_the_held_out_loss_is_a_mean_over_reply_tokens",
     "sum(sum(example.mask) for example in examples)",
     "len(examples) * max(len(example.ids) for example in examples)"),
    ("sft: a rank without examples counts the first twice",
     "whole/test_trainers.py::test_a_rank_that_gets_no_examples_adds_nothing[sft-lost0]",
     "-logprob * counts / tokens",
     "-logprob / tokens"),
    ("sft: --part is ignored",
     "whole/test_trainers.py::test_training_takes_its_part_of_a_file_and_holds_prompts_out[sft]",
     "read_rows(config.data, kind, run.say, config.part, config.skip_bad)",
     "read_rows(config.data, kind, run.say)"),
    ("sft: a conversation that was trained on is not noted", CONVERSATIONS,
     'any(message["role"] == "assistant" for',
     'any(message["role"] == "nobody" for'),
    ("sft: what others' models know is taken to be known", CONVERSATIONS,
     'if config.model != "scratch" and not knows_single_turns(model.config):',
     "if False:"),
]
