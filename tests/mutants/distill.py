"""Bugs planted in distill.py, and the tests that ought to notice them."""

VALUES = "test_distill.py::test_values_and_gradients_are_those_of_float64_autograd_whatever_is_frozen"
WEIGHTS = (
    "test_distill.py::test_all_weights_of_models_with_tied_and_untied_heads_have_autograds_gradient")
ENDS = "test_distill.py::test_the_ends_of_the_generalised_js_are_the_forward_and_the_reverse_kl"
UNDERFLOW = "test_distill.py::test_probabilities_that_underflow_cost_what_they_do"
VOCABULARIES = (
    "test_distill.py::test_of_vocabularies_that_are_filled_up_differently_the_tokens_count_that_both_have")
FLOAT16 = "test_distill.py::test_a_float16_gradient_that_overflows_shrinks_with_the_loss"
MEMORY = "test_distill.py::test_a_divergence_takes_a_fraction_of_the_memory_of_one_models_logits"
UNWANTED = "test_distill.py::test_no_gradient_is_computed_where_nobody_wants_it"
UNKNOWN = "test_distill.py::test_a_divergence_without_a_branch_is_an_error"
EDGES = "test_distill.py::test_padding_and_empty_replies_add_nothing_and_one_token_adds_its_own"
TO_GO = "test_distill.py::test_the_cost_to_go_of_a_token_is_what_comes_after_it"
ENUMERATED = (
    "test_distill.py::test_credit_for_the_future_makes_the_expected_gradient_that_of_the_expected_sum")
BASELINE = "test_distill.py::test_the_baseline_is_the_mean_cost_to_go_of_the_step_before"
FORMULA = "test_distill.py::test_a_step_follows_the_formula_taken_one_reply_at_a_time"
FILLED = (
    "test_distill.py::test_micro_batches_and_passes_that_keep_ranks_in_step_change_nothing")
WHOSE = "test_distill.py::test_whose_replies_are_trained_on_and_what_becomes_of_the_teacher"
RESUMED = (
    "test_distill.py::"
    "test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit[--credit future]")
TOGETHER = "test_distill.py::test_two_ranks_train_as_one_does[--credit future-ddp]"
REFUSED = "test_distill.py::test_what_cant_be_done_is_said_in_one_line"
TOKENIZERS = (
    "test_distill.py::"
    "test_a_teacher_is_refused_that_has_another_tokenizer_would_be_deleted_or_has_changed")
JUDGED = "test_distill.py::test_judges_are_logged_and_change_nothing_and_samples_are_printed"

MUTANTS = [
    # -- the divergence and its gradient
    ("reverse KL the wrong way round", VALUES,
     "slopes = log_p - log_q",
     "slopes = log_q - log_p"),
    ("reverse KL: the gradient lacks its mean", VALUES,
     "torch.mul(p, slopes - values[:, None], out=log_p)",
     "torch.mul(p, slopes, out=log_p)"),
    ("forward KL weighed by the student", VALUES,
     "values = torch.linalg.vecdot(q, log_q - log_p)",
     "values = torch.linalg.vecdot(p, log_q - log_p)"),
    ("forward KL: ascent", VALUES,
     "torch.sub(p, q, out=log_p)",
     "torch.sub(q, p, out=log_p)"),
    ("js: the mixture the wrong way round", ENDS,
     "log_q + math.log(beta), log_p + math.log1p(-beta)",
     "log_q + math.log1p(-beta), log_p + math.log(beta)"),
    ("js: the two halves weigh the wrong way round", ENDS,
     "values = beta * of_teacher + (1 - beta) * of_student",
     "values = (1 - beta) * of_teacher + beta * of_student"),
    ("js: the gradient lacks its weight", VALUES,
     "torch.mul(p, (1 - beta) * (slopes - of_student[:, None]), out=log_p)",
     "torch.mul(p, slopes - of_student[:, None], out=log_p)"),
    ("a logarithm of the softmax that underflows", UNDERFLOW,
     "torch.log_softmax(out, -1, out=out)",
     "torch.softmax(out, -1, out=out).log_()"),
    ("columns that fill up have a probability", VALUES,
     "out[:, V:] = LEAST",
     "out[:, V:] = 0"),
    ("a word without a branch is js", UNKNOWN,
     'elif kind == "js":',
     "elif kind:"),
    ("each chunk's gradient of the states in the first chunk's place", VALUES,
     "of_x[at] = d @ w.to(exact)",
     "of_x[:len(d)] = d @ w.to(exact)"),
    ("each block's divergence in the first block's place", VALUES,
     "each[at][part] =",
     "each[part] ="),
    ("the sum's own gradient is forgotten", VALUES,
     "(gradient * g).to(dtype)",
     "gradient.to(dtype)"),
    ("temperature of the student alone", VALUES,
     "states, teacher_states = states / temperature, teacher_states / temperature",
     "states = states / temperature"),
    ("float16 gradients overflow before they are scaled", FLOAT16,
     "exact = torch.float32 if dtype == torch.float16 else dtype",
     "exact = dtype"),
    ("all logits of both models at once", MEMORY,
     "rows, width = rows_of_chunks(N, 2 * V), 64 * ceil_divide(V, 64)",
     "rows, width = max(1, N), 64 * ceil_divide(V, 64)"),
    ("gradients that nobody wants", UNWANTED,
     "        if learning:\n            gradients = zeros",
     "        if True:\n            gradients = zeros"),
    ("tokens that the teacher lacks", VOCABULARIES,
     "    if len(weight) > V:\n        weight = weight[:V]\n",
     ""),
    ("tokens that the student lacks", VOCABULARIES,
     "teacher_states, teacher_weight[:V], kind",
     "teacher_states, teacher_weight, kind"),
    # -- the loss
    ("cost to go counts the token's own divergence", TO_GO,
     "cumsum(1).flip(1) - divergences",
     "cumsum(1).flip(1)"),
    ("cost so far instead of cost to go", TO_GO,
     "divergences.flip(1).cumsum(1).flip(1) - divergences",
     "divergences.cumsum(1) - divergences"),
    ("credit for the future: ascent", ENUMERATED,
     "((costs - baseline) * logprobs).sum()",
     "((baseline - costs) * logprobs).sum()"),
    ("nll: likely tokens cost", EDGES,
     'return -logprob, {"loss"',
     'return logprob, {"loss"'),
    ("logged: the mean of each pass", WEIGHTS,
     'sums = {"loss": loss.detach()}',
     'sums = {"loss": each.mean()}'),
    # -- a step
    ("tokens of this rank alone", TOGETHER,
     "tokens = run.all_sum(batch.mask.sum())",
     "tokens = batch.mask.sum()"),
    ("mean over replies", FORMULA,
     "tokens = run.all_sum(batch.mask.sum())",
     "tokens = run.all_sum(torch.tensor(len(batch.texts)))"),
    ("a pass that keeps the ranks in step trains", FILLED,
     "run.backward(loss * part.counts / tokens",
     "run.backward(loss / tokens"),
    ("a pass that keeps the ranks in step is logged", FILLED,
     "value * part.counts / tokens",
     "value / tokens"),
    ("the teacher is the student", WHOSE,
     "teacher = run.parallel(teacher.requires_grad_(False).eval())",
     "teacher = student"),
    ("the teacher samples for the student", WHOSE,
     "pair.student if own else pair.teacher",
     "pair.teacher if own else pair.student"),
    ("mixed the wrong way round", WHOSE,
     ".item() < config.mix_share",
     ".item() > config.mix_share"),
    ("the baseline is lost on resume", RESUMED,
     'state |= {"drawn": 0, "cost": 0.0} | state',
     'state |= {"drawn": 0} | state | {"cost": 0.0}'),
    ("no baseline", BASELINE,
     'state["cost"] = means.get("cost", 0.0)',
     'state["cost"] = 0.0'),
    ("prompts begin anew on resume", RESUMED,
     'endless_order(len(prompts), config.seed, state["drawn"])',
     "endless_order(len(prompts), config.seed)"),
    ("sampled at another temperature", FORMULA,
     "config.max_new_tokens, config.temperature, generator",
     "config.max_new_tokens, 1.0, generator"),
    ("nll on the student's own replies", REFUSED,
     'config.divergence != "nll" or config.on == "teacher"',
     'config.divergence != "nll" or config.on != "policy"'),
    ("credit for replies of the teacher", REFUSED,
     'config.credit == "none" or config.on == "policy"',
     'config.credit == "none" or config.on != "mix"'),
    ("any tokenizer will do", TOKENIZERS,
     "require(other.same_as(tokenizer),",
     "require(other.n_vocab,"),
    ("judges are not logged", JUDGED,
     "metrics |= {name: numbers.mean() for name, numbers in judged.items()}",
     "pass"),
]
