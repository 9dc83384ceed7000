"""Does the test suite notice? Small bugs, each of a kind that RLHF code has had, put one at a time into a copy of the repository.

A mutant is one replacement in one file. It is killed when a test fails that passes without it: the test that it names, or else any of
the whole suite. Two are tried at a time, each in a copy of its own; the repository itself is never touched.

    python tests/mutants.py            all of them: about 40 minutes on 2 busy cores
    python tests/mutants.py NAME...    those with these names, or with these words in them
    python tests/mutants.py --list     their names; like every run, exit code 1 if a replacement no longer fits its file
"""
import argparse
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("*.py", "*.md", "*.sh", "*.txt", "LICENSE", "bench", "docs", "recipes", "tests")  # what the tests need
LIMIT, SUITE_LIMIT = 300, 1200  # seconds, after which a mutant hangs


class Mutant(NamedTuple):
    name: str
    file: str
    test: str  # that ought to kill it: a file of tests/, or one test in it
    old: str  # occurs once in the file
    new: str


TEMPLATE = "test_tokenizer.py::test_template_written_out_by_hand_masks_replies_and_their_end_tokens_only"
DIALOGUE = "test_tokenizer.py::test_a_dialogue_is_its_prompt_and_its_reply_end_to_end"
CONTENT = "test_tokenizer.py::test_no_content_ever_becomes_a_special_token"
MASKS = "test_tokenizer.py::test_masks_are_what_the_assistant_says"
CHOSEN = "test_tokenizer.py::test_eos_stops_pad_and_document_are_chosen"
FORMATS = "test_data.py::test_every_format_is_recognised_and_read_as_the_right_row"
LABELS = "test_data.py::test_labels_and_ratings_become_a_ranking_of_each_prompt"
ANSWERS = "test_data.py::test_a_prompt_of_every_format_brings_its_answer"
DOCUMENT = "test_data.py::test_of_a_document_the_end_is_held_out_whatever_its_hash"
TABLES = "test_data.py::test_csv_rows_are_those_of_json"
NAIVE = "test_tokenizer.py::test_train_bpe_equals_the_naive_algorithm_on_texts_full_of_repeats"
PARTS = "test_data.py::test_parts_are_disjoint_cover_everything_and_know_nothing_of_the_held_out_prompts"
MIXTURES = "test_data.py::test_a_mixture_has_its_shares_repeats_no_row_and_is_the_same_every_time"
PIECES = "test_data.py::test_plain_text_is_cut_into_pieces_that_count_every_token_once"
PAIRS = "test_data.py::test_ranked_pairs_equal_a_slow_loop_and_each_row_weighs_one"
ORDER = "test_data.py::test_endless_order_is_one_permutation_after_another_and_resumes"
NO_PASS_WAITS = "test_second_device.py::test_no_pass_waits_for_the_device"
ROUNDED = "faults/test_ranks.py::test_shards_gathered_in_bfloat16_train_and_generate_as_if_the_weights_were_rounded"
BRUTE_FORCE = "test_model.py::test_forward_equals_brute_force_row_by_row"
GREEDY = "test_model.py::test_cached_batched_greedy_equals_each_row_alone_without_a_cache"
ROTARY = "test_model.py::test_rotary_positions_turn_pairs_by_the_published_angles_and_scores_depend_on_distance_alone"
SCALING = "test_model.py::test_context_scaling_stretches_all_wavelengths_or_only_those_longer_than_the_context"
KNOWN = "test_model.py::test_ids_mask_lengths_and_ended_where_the_answer_is_known"
FREQUENCIES = "test_model.py::test_sample_frequencies_equal_the_truncated_softmax"
HEAD = "test_model.py::test_the_heads_gradient_is_that_of_float64_autograd_however_it_is_computed_and_whatever_is_frozen"
SOME = "test_model.py::test_some_states_scores_and_gradients_equal_those_among_all"
FEW_ROWS = "test_model.py::test_replies_are_the_same_however_few_rows_are_decoded_at_once"
OWN_NUMBERS = "test_model.py::test_a_reply_depends_on_its_prompt_and_its_own_uniform_numbers_alone"
CHI_SQUARE = "test_model.py::test_samples_pass_a_chi_square_test_in_one_group_of_tokens_and_in_several"
HEADS = "test_model.py::test_scores_and_values_equal_brute_force_row_by_row"
PEER = "test_checkpoint.py::test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write"
REFUSED = "test_checkpoint.py::test_a_foreign_or_damaged_folder_is_refused_in_one_line"
NEW_ROWS = "test_checkpoint.py::test_added_tokens_get_rows_and_nothing_else_changes"
TRAINED = "test_lora.py::test_only_adapters_and_a_scalar_head_are_trained_and_each_of_them_is"
PEFT = "test_lora.py::test_a_peft_folder_by_pefts_formula_is_the_model_in_transformers_and_here"
PROMPTS = "test_ppo.py::test_ppo_takes_its_part_of_the_prompts_and_evaluation_those_that_no_stage_has_seen"
RESUME = "test_lora.py::test_dpo_with_adapters_resumes_against_the_reference_that_it_began_with"
FORMULA = "test_runs.py::test_a_step_follows_the_formula_taken_one_reply_at_a_time"
NO_EXAMPLES = "test_runs.py::test_a_rank_that_gets_no_examples_adds_nothing"
EVALUATION = "test_runs.py::test_evaluation_equals_one_reply_at_a_time_and_counts_wins_against_the_first_model"
EACH_REPLY = "test_runs.py::test_ppo_trains_on_each_reply_once_an_epoch_and_logs_and_adapts_to_the_kl_of_whole_replies"
TOGETHER = "test_runs.py::test_two_ranks_train_as_one_does[ppo-ddp]"
TOGETHER_SFT = "test_runs.py::test_two_ranks_train_as_one_does[sft-ddp]"
OPTIMISER_STEP = "test_runs.py::test_an_optimizer_step_clips_the_norm_of_all_gradients_and_clears_them_and_takes_none_that_is_not_finite"
OPTIMUM = "test_optimum.py::test_what_the_bugs_are_given_suffices_without_one"
OPTIMUM_OF_KL = "test_optimum.py::test_of_the_kl_estimators_those_reach_it_whose_gradient_is_right[--kl k2 --kl-in loss --whiten none-True]"
LOSSES = "test_losses.py"
INTERVAL = "test_losses.py::test_the_interval_of_an_accuracy_is_over_prompts_and_does_not_collapse"
UNKNOWN_CHOICE = "test_losses.py::test_a_choice_that_has_no_branch_is_an_error_and_nothing_else_instead"
BUDGET = "test_data.py::test_no_piece_and_no_batch_of_prompts_with_many_and_few_replies_is_beyond_the_budget"
CONFIDENT = "test_model.py::test_the_bf16_gradient_of_a_confident_token_is_as_good_as_autocasts"
HALF_ONCE = "faults/test_numbers.py::test_in_float16_a_gradient_that_overflows_once_is_reported_lowers_the_scale_and_is_not_counted"
OBJECTIVE = "test_ppo.py::test_the_policy_follows_the_gradient_of_the_objective_written_out"
CRITIC = "test_ppo.py::test_the_critic_follows_the_gradient_of_the_value_loss_written_out"
ADVANTAGES = "test_ppo.py::test_advantages_are_whitened_over_the_rollout_and_then_clipped"
KL_TERM = "test_ppo.py::test_the_kl_term_stands_where_it_is_told_and_a_wrong_gradient_is_warned_of"
KL_LOSS = "test_ppo.py::test_gradient_of_each_kl_estimator_in_the_loss_by_enumeration"
POLICY_LOSSES = "test_ppo.py::test_policy_losses_equal_a_loop_over_tokens_whatever_padding_holds"
PPO_RESUME = "test_ppo.py::test_resuming_with_everything_that_has_a_state_equals_never_stopping_bit_for_bit[updating]"
SFT_RESUME = "test_runs.py::test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit[sft]"
FALL_BACK = "test_runs.py::test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_refused_if_there_is_none"
SPLIT = "test_data.py::test_ranks_get_every_example_once_and_as_many_pieces_each_however_few_there_are"
DEALT = "test_ppo.py::test_ranks_share_prompts_replies_and_minibatches_as_one_process_has_them[2]"
VARIANCE = "test_ppo.py::test_variance_is_that_of_all_tokens_of_all_ranks"
SEEDS = "test_runs.py::test_every_step_and_rank_draws_from_a_seed_of_its_own_and_the_generator_from_one_of_the_step"
PPO_RANKS = "test_ppo.py::test_two_ranks_agree_on_weights_averages_moments_and_when_to_stop"
WARMUP = "test_ppo.py::test_critic_warmup_trains_the_critic_alone_for_its_rollouts"
BETA = "test_ppo.py::test_beta_adapts_to_the_kl_of_each_rollout_and_is_used_in_the_next"
MODEL_CHANGED = "test_runs.py::test_resume_notices_any_change_of_what_a_model_folder_is_opened_from_and_of_nothing_else"
DATA_CHANGED = "test_runs.py::test_resume_notices_a_file_that_has_changed_however_it_is_named"
DATED = "test_runs.py::test_a_run_resumed_another_day_writes_the_date_of_its_beginning"
SLIM = "faults/test_checkpoints.py::test_a_finished_run_without_checkpoints_is_complete_and_stays"
UNHEARD = "test_runs.py::test_a_script_whose_output_nobody_reads_ends_quietly_and_writes_whole_files"
MISTAKES = "test_runs.py::test_a_mistake_ends_in_one_line_and_exit_code_2"
FORGETS = "test_runs.py::test_chat_forgets_what_a_model_of_single_questions_cannot_follow_and_says_so_once"
NORMALISED = "test_ppo.py::test_scores_are_scaled_or_standardised_by_the_moments_and_then_clipped"

MUTANTS = [
    # -- tokenizer.py, chat_template.py: ids and masks of dialogues
    Mutant("template: end token out of the mask", "data.py", TEMPLATE,
           "mask.extend([answer] * len(content))",
           "mask.extend([answer] * (len(content) - 1) + [False])"),
    Mutant("template: no end token", "data.py", TEMPLATE,
           "content = content + [tokenizer.eos]",
           "content = content + []"),
    Mutant("template: the prompt's tokens in the loss", "data.py", TEMPLATE,
           "mask.extend([answer] * len(content))",
           "mask.extend([True] * len(content))"),
    Mutant("template: control tokens taken from the text", "formats/tokenizer.py", TEMPLATE,
           "self.encoding.encode_ordinary(text)",
           "self.encoding.encode(text, allowed_special='all')"),
    Mutant("reply mask: one token early", "data.py", DIALOGUE,
           "mask.append(False)\n        ids.extend(content)\n        mask.extend([answer] * len(content))",
           "ids.extend(content)\n        mask.extend([answer] * len(content))\n        mask.append(False)"),
    Mutant("reply mask: without its first token", "data.py", DIALOGUE,
           "mask.extend([answer] * len(content))",
           "mask.extend([False] + [answer] * (len(content) - 1))"),
    Mutant("special tokens: a model may spell them", "formats/foreign_tokenizer.py", "test_tokenizer.py::test_a_model_that_would_spell_a_special_token_is_kept_from_it",
           "if self.leaky.search(text):",
           "if False:"),
    Mutant("special tokens: all are spelled letter by letter in a text", "formats/foreign_tokenizer.py",
           "test_tokenizer.py::test_a_special_token_in_a_text_is_merged_as_other_text_is",
           "self.engine.encode_special_tokens = True",
           "self.engine.encode_special_tokens = False"),
    Mutant("chat template: contents aren't hidden from the split at special tokens", "formats/chat_template.py", CONTENT,
           'special.sub(lambda found: stand_ins[found[0]], message["content"])',
           'message["content"]'),
    Mutant("chat template: end token out of the mask", "formats/foreign_tokenizer.py", MASKS,
           "mask += [reply] * (len(ids) - start)",
           "mask += [reply and i != self.eos for i in ids[start:]]"),
    Mutant("chat template: what begins a reply in its mask", "formats/chat_template.py", MASKS,
           "before = self.render(messages[:i], True)",
           "before = self.render(messages[:i], False)"),
    Mutant("chat template: what stands behind the end token in the mask", "formats/chat_template.py", MASKS,
           "return turn[:turn.index(self.ending) + len(self.ending)]",
           "return turn"),
    Mutant("special tokens: the end token pads", "formats/foreign_tokenizer.py", CHOSEN,
           "return pads[0] if pads else CONTROLS[1]",
           "return self.engine.id_to_token(self.eos)"),
    Mutant("special tokens: replies end with one of them alone", "formats/foreign_tokenizer.py", CHOSEN,
           "self.stops = tuple(dict.fromkeys([eos, *endings]))",
           "self.stops = (eos,)"),
    Mutant("special tokens: those added aren't counted", "formats/foreign_tokenizer.py", CHOSEN,
           "self.added = self.n_vocab - size",
           "self.added = 0"),

    # -- formats.py: rows of files, parts, mixtures
    Mutant("preferences: chosen and rejected swapped", "formats/rows.py", FORMATS,
           "Row(prompt, [chosen, rejected], [0, 1])",
           "Row(prompt, [chosen, rejected], [1, 0])"),
    Mutant("demonstrations: the worst of the ranked replies", "formats/rows.py", FORMATS,
           "best = ranks.index(min(ranks))",
           "best = ranks.index(max(ranks))"),
    Mutant("demonstrations: replies that are labelled bad", "formats/rows.py", LABELS,
           'if want == "demonstrations" and label is False:',
           "if False:"),
    Mutant("ratings: the lower is better", "formats/rows.py", LABELS,
           "return -rating",
           "return rating"),
    Mutant("preferences: their prompts may differ", "formats/rows.py", "test_data.py::test_each_defect_of_a_row_has_its_reason",
           "    if prompt != other:\n",
           "    if False:\n"),
    Mutant("answers: their commas stay", "formats/rows.py", "test_data.py::test_an_answer_can_be_checked_however_it_is_written",
           '.rstrip(".").replace(",", "")',
           '.rstrip(".")'),
    Mutant("prompts: without the history", "formats/rows.py", FORMATS,
           "for question, answer in history:",
           "for question, answer in []:"),
    Mutant("prompts: without the system field", "formats/rows.py", FORMATS,
           'prompt = [{"role": "system", "content": system.strip()}] + prompt',
           "pass"),
    Mutant("split: by row, not by prompt", "formats/sources.py", "test_data.py::test_split_keeps_a_prompt_on_one_side_whatever_the_order",
           "unit_hash(row.text) < fraction",
           "unit_hash(row.text + row.replies[0]) < fraction"),
    Mutant("parts: by the hash of the split", "formats/sources.py", PARTS,
           'unit_hash(row.text, "part ")',
           "unit_hash(row.text)"),
    Mutant("parts: counted from 0", "formats/sources.py", PARTS,
           "bisect.bisect(ends[1:], place) + 1 == number",
           "bisect.bisect(ends[1:], place) == number"),
    Mutant("mixture: repeats rows", "formats/sources.py", MIXTURES,
           "np.random.default_rng(i).permutation(len(rows))[:count]",
           "np.random.default_rng(i).integers(len(rows), size=count)"),

    # -- formats.py, tokenizer.py: answers, documents, tables, foreign data sets, learned vocabularies
    Mutant("answers: those without a mark are lost", "formats/rows.py", ANSWERS,
           "                return result[:i].strip()\n    return text.strip()",
           "                return result[:i].strip()\n    return \"\""),
    Mutant("answers: the longer one is checked", "formats/rows.py", ANSWERS,
           '("ground_truth", "answer", "solution", "target")',
           '("solution", "answer", "ground_truth", "target")'),
    Mutant("answers: not that of a reward_model", "formats/rows.py", ANSWERS,
           "if isinstance(judged, dict):",
           "if False:"),
    Mutant("documents: a hash decides on all of one", "formats/sources.py", DOCUMENT,
           "if row.document:\n            train +=",
           "if False:\n            train +="),
    Mutant("documents: their held-out end is trained on", "formats/sources.py", DOCUMENT,
           "train += piece_of(row, 0, 1 - fraction)",
           "train += [row]"),
    Mutant("documents: cut where the share ends, amid a line", "formats/sources.py", DOCUMENT,
           "            return place\n    return wanted",
           "            return wanted\n    return wanted"),
    Mutant("csv: labels and ratings stay text", "formats/sources.py", TABLES,
           "return known.get(text.strip().lower(), as_number(text))",
           "return text"),
    Mutant("csv: the process keeps the longer limit", "formats/sources.py",
           "test_data.py::test_a_csv_as_other_programs_write_it",
           "        csv.field_size_limit(limit)\n",
           "        pass\n"),
    Mutant("csv: a quote that is never closed takes the rest", "formats/sources.py",
           "test_data.py::test_a_file_that_cannot_be_read_is_named_with_the_place",
           "delimiter=delimiter, strict=True)",
           "delimiter=delimiter)"),
    Mutant("SHP: the other reply is preferred", "formats/rows.py", FORMATS,
           'if row["labels"]:',
           'if not row["labels"]:'),
    Mutant("UltraFeedback: the lower score is better", "formats/rows.py", FORMATS,
           "ranks.append(-score)",
           "ranks.append(score)"),
    Mutant("encodings: whatever decodes is called GBK", "formats/sources.py",
           "test_data.py::test_a_file_in_another_encoding_is_told_how_to_convert_it",
           "len(common) > 0.9 * len(foreign)",
           "foreign"),
    Mutant("bpe: how often a word comes is forgotten", "formats/tokenizer.py", NAIVE,
           "times.extend([count] * (len(letters) + 1))",
           "times.extend([1] * (len(letters) + 1))"),
    Mutant("bpe: a pair that lost a place keeps its count", "formats/tokenizer.py", NAIVE,
           "counts[right, ids[following]] -= count",
           "counts[right, ids[following]] -= 0"),
    Mutant("bpe: overlapping pairs are merged from the right", "formats/tokenizer.py", NAIVE,
           "sorted(places.pop((left, right)))",
           "sorted(places.pop((left, right)), reverse=True)"),
    Mutant("bpe: learned from held-out rows too", "formats/model_folder.py",
           "test_tokenizer.py::test_a_vocabulary_is_learned_from_the_rows_that_are_trained_on",
           "    rows, _ = split_by_prompt(rows, config.val_fraction)\n",
           ""),
    Mutant("bpe: a resumed run learns another vocabulary", "formats/model_folder.py",
           "test_tokenizer.py::test_a_learned_vocabulary_is_the_runs_own_to_the_end",
           "if config.resume and (Path",
           "if False and (Path"),

    # -- data.py: masks, pairs, orders
    Mutant("preferences: the mask has earlier replies too", "data.py",
           "test_data.py::test_masks_select_the_replies_of_every_format",
           "talk, last_only=True)",
           "talk)"),
    Mutant("plain text: loses a token where it is cut", "data.py", PIECES,
           "range(0, len(text.ids) - 1, limit - 1):",
           "range(0, len(text.ids) - 1, limit):"),
    Mutant("plain text: counts a token twice where it is cut", "data.py", PIECES,
           "[False] + text.mask[start + 1:start + limit]",
           "text.mask[start:start + limit]"),
    Mutant("preferences: --part is ignored", "data.py", "test_data.py::test_preference_groups_take_the_part_and_hold_prompts_out",
           'read_rows(config.data, "preferences", say, config.part, config.skip_bad)',
           'read_rows(config.data, "preferences", say)'),
    Mutant("accuracy: ties count as right", "data.py", LOSSES,
           "right = above + 0.5 * tied",
           "right = above + 1.0 * tied"),
    Mutant("accuracy: rows of one prompt are trials of their own", "data.py", INTERVAL,
           "number.setdefault(row.text, len(number))",
           "number.setdefault(len(number), len(number))"),
    Mutant("accuracy: an interval that collapses where all prompts agree", "data.py", INTERVAL,
           "return float(accuracy), *wilson(accuracy, trials)",
           "return float(accuracy), accuracy - 1.96 * variance**0.5, accuracy + 1.96 * variance**0.5"),
    Mutant("budget: prompts count, not their replies", "plumbing/ranks.py", BUDGET,
           "longest, height = max(longest, lengths[i]), height + own",
           "longest, height = max(longest, lengths[i]), height + 1"),
    Mutant("budget: batches of an epoch don't know the replies", "data.py", BUDGET,
           "micro_batches(by_length, lengths, budget, rows)",
           "micro_batches(by_length, lengths, budget)"),
    Mutant("pairs: ties count", "data.py", PAIRS,
           "if a < b:",
           "if a <= b and i != j:"),
    Mutant("pairs: the higher rank is better", "data.py", PAIRS,
           "if a < b:",
           "if a > b:"),
    Mutant("pairs: a row of more replies weighs more", "data.py", PAIRS,
           "start + j, 1 / len(found), row.margin",
           "start + j, 1.0, row.margin"),
    Mutant("pairs: ... or less, divided by its replies", "data.py", PAIRS,
           "start + j, 1 / len(found), row.margin",
           "start + j, 1 / len(row.ranks), row.margin"),
    Mutant("prompt order: the same in every epoch", "data.py", ORDER,
           "np.random.default_rng([seed, epoch]).permutation(n)",
           "np.random.default_rng([seed, 0]).permutation(n)"),
    Mutant("prompt order: a resumed run skips in every epoch", "data.py", ORDER,
           "yield int(i)\n        start = 0\n",
           "yield int(i)\n"),
    Mutant("batch order: a resumed run begins its epoch anew", "data.py", "test_data.py::test_endless_batches_resume_where_they_were",
           "start = max(0, start - len(batches))",
           "start = 0"),
    Mutant("padding on the left", "data.py", "test_data.py::test_collate_pads_on_the_right_with_mask_false",
           "padded[i, :len(row)] =",
           "padded[i, padded.shape[1] - len(row):] ="),

    # -- model.py: log-probabilities, heads, sampling
    Mutant("log-probabilities: of the token itself, not from its predecessor", "model.py", BRUTE_FORCE,
           "return index - 1",
           "return index"),
    Mutant("log-probabilities: times the temperature", "head.py", BRUTE_FORCE,
           "states = states / temperature",
           "states = states * temperature"),
    Mutant("log-probabilities: softmax in the logits' precision", "head.py", "test_model.py::test_bf16_states_and_weights_are_normalised_in_fp32",
           "z = logits.float()  # (n, V')",
           "z = logits  # (n, V')"),
    Mutant("entropy: of the logits, not the log-probabilities", "head.py", BRUTE_FORCE,
           "entropy[at] = -torch.linalg.vecdot(z, distances) - log_top",
           "entropy[at] = -torch.linalg.vecdot(z, distances)"),
    Mutant("attention: dropout outside training", "model.py", "test_model.py::test_generation_runs_without_dropout_and_restores_the_mode",
           "dropout = self.dropout if self.training else 0.0",
           "dropout = self.dropout"),
    Mutant("attention: sees the future", "model.py", BRUTE_FORCE,
           "is_causal=True, dropout_p=dropout",
           "is_causal=False, dropout_p=dropout"),
    Mutant("score: one token before the end", "model.py", HEADS,
           "ids.shape[1] + lengths - 1",
           "ids.shape[1] + lengths - 2"),
    Mutant("score: at the padded last position", "model.py", HEADS,
           "torch.arange(len(ids)) * ids.shape[1] + lengths - 1",
           "torch.arange(1, len(ids) + 1) * ids.shape[1] - 1"),
    Mutant("values: after the token", "model.py", HEADS,
           "values = model(ids, predicting(at))",
           "values = model(ids, at)"),
    Mutant("reward model: shifted the wrong way", "model.py", "test_model.py::test_shift_lowers_every_score_by_the_amount",
           "weights[bias] - amount * w",
           "weights[bias] + amount * w"),
    Mutant("reward model: shares its trunk with the language model", "model.py",
           "test_model.py::test_a_fresh_head_has_the_stated_spread_and_the_trunk_is_a_copy",
           "scalar.transformer = copy_of(model.transformer, share)",
           "scalar.transformer = copy_of(model.transformer, True)"),
    Mutant("sampling: times the temperature", "generate.py", FREQUENCIES,
           "logits = logits / temperature\n",
           "logits = logits * temperature\n"),
    Mutant("sampling: top-p without the token that reaches it", "generate.py", FREQUENCIES,
           "drop = ordered.cumsum(-1) - ordered >= top_p",
           "drop = ordered.cumsum(-1) > top_p"),
    Mutant("sampling: top-p with one token too many", "generate.py", FREQUENCIES,
           "drop = ordered.cumsum(-1) - ordered >= top_p",
           "drop = ordered.cumsum(-1) - 2 * ordered >= top_p"),
    Mutant("generate: with dropout", "generate.py", "test_model.py::test_generation_runs_without_dropout_and_restores_the_mode",
           "    model.eval()\n    try:\n",
           "    try:\n"),
    Mutant("generate: end token out of the mask", "generate.py", KNOWN,
           "slots < self.lengths[:, None]",
           "slots < (self.lengths - self.stopped.long())[:, None]"),
    Mutant("generate: the prompt's last token in the mask", "generate.py", KNOWN,
           "slots >= self.prompt_lengths[:, None]",
           "slots >= self.prompt_lengths[:, None] - 1"),
    Mutant("generate: cache position one late", "generate.py", GREEDY,
           "cache.step(at - 1, upto)",
           "cache.step(at.clamp(max=self.width - 1), min(upto + 1, self.width))"),
    Mutant("generate: a cached token can't see itself", "generate.py", GREEDY,
           "self.slots[:upto] <= positions[:, None]",
           "self.slots[:upto] < positions[:, None]"),
    Mutant("generate: a row that has ended goes on", "generate.py", GREEDY,
           "done = done | stop | full",
           "done = stop | full"),
    Mutant("generate: replies end with one token alone", "generate.py", "test_model.py::test_a_reply_ends_with_whichever_of_the_stops_comes_first",
           "torch.tensor(tokenizer.stops, device=device)",
           "torch.tensor([tokenizer.eos], device=device)"),

    Mutant("generate: a reply takes the numbers of its place in the cache", "generate.py", OWN_NUMBERS,
           "uniform[live, number]",
           "uniform[torch.arange(len(live)), number]"),
    Mutant("generate: the numbers go by the sequence's length", "generate.py", OWN_NUMBERS,
           "(at - self.prompt_lengths[live]).clamp",
           "(at - int(self.prompt_lengths.min())).clamp"),
    Mutant("generate: goes on when it is interrupted", "generate.py", "test_model.py::test_generation_leaves_it_at_the_tokens_that_are_there_when_it_is_interrupted",
           "            if interrupted():\n                break\n",
           "            interrupted()\n"),
    Mutant("draw: the token in a group by the group's number", "generate.py",
           "test_model.py::test_a_draw_takes_the_group_from_one_number_and_the_token_in_it_from_the_other",
           "group], uniform[:, 1:])",
           "group], uniform[:, :1])"),

    # -- model.py: the head's gradient by hand
    Mutant("head: the columns that fill up are set once for all chunks", "head.py", HEAD,
           "        logits[:, V:] = torch.finfo(logits.dtype).min\n",
           "        logits[:, V:] = 0 if start else torch.finfo(logits.dtype).min\n"),
    Mutant("head: the columns that fill up are at -10,000", "head.py",
           "test_model.py::test_columns_that_fill_up_have_no_probability_however_low_the_logits",
           "torch.finfo(logits.dtype).min", "-1e4"),
    Mutant("head: 1 is subtracted from what bfloat16 has rounded", "head.py", CONFIDENT,
           "q[each, targets[at]] = log_p.expm1().to(q.dtype)",
           "q[each, targets[at]] -= 1"),
    Mutant("head: 1 is subtracted from what bfloat16 has rounded, with entropies", "head.py", CONFIDENT,
           "d[each, targets[at]] = of_target.squeeze(1).to(d.dtype)",
           "d[each, targets[at]] -= g.squeeze(1).to(d.dtype)"),
    Mutant("head: a confident token's logarithm is a difference of logits", "head.py",
           "test_model.py::test_log_probabilities_of_confident_tokens_keep_their_digits",
           "logprobs[at] = below + log_top",
           "logprobs[at] = (below + top) - (top - log_top)"),
    Mutant("head: float16's gradient is made before the loss is scaled", "head.py",
           "test_model.py::test_a_float16_gradient_that_overflows_shrinks_with_the_loss",
           "if summed and dtype != torch.float16:",
           "if summed:"),
    Mutant("head: logits are rounded where they needn't be", "head.py",
           "test_model.py::test_logits_near_minus_100_are_rounded_only_where_the_product_cant_come_out_in_fp32",
           "wide = x.dtype != torch.float32 and float32_products(device)",
           "wide = False"),
    Mutant("head: the gradient isn't divided by the temperature", "head.py", HEAD,
           "states = states / temperature",
           "states = states + (states / temperature - states).detach()"),
    Mutant("head: the gradient is divided by the temperature twice", "head.py", HEAD,
           "states = states / temperature",
           "states = states / temperature**2 + (states / temperature - states / temperature**2).detach()"),
    Mutant("head: the sign of the entropy's gradient", "head.py", HEAD,
           ".mul_(h[rows])",
           ".mul_(-h[rows])"),
    Mutant("head: the entropy's gradient without the entropy", "head.py", HEAD,
           ".addcmul_(p, entropy[rows])",
           ""),
    Mutant("head: the weight's gradient is that of the last chunk", "head.py", HEAD,
           "of_w.addmm_(d.T, x)",
           "of_w.addmm_(d.T, x, beta=0)"),
    Mutant("head: the weight's gradient is that of the last chunk, in bfloat16", "head.py",
           "test_model.py::test_the_head_in_bf16_keeps_its_bounds_of_values_and_gradients_in_fp32",
           "of_w[v] += d[:, v]",
           "of_w[v] = d[:, v]"),
    Mutant("head: a sum's gradient without what it is multiplied with", "head.py", HEAD,
           "None if d is None else d * g for d",
           "None if d is None else d for d"),
    Mutant("head: the logarithm of a probability that underflows", "head.py",
           "test_model.py::test_probabilities_that_underflow_have_the_right_logarithm_and_finite_gradients",
           "logprobs[at] = below + log_top",
           "logprobs[at] = z.gather(1, targets[at, None]).squeeze(1).log()"),

    # -- model.py: some positions alone
    Mutant("positions: the last block takes the next ones", "model.py", SOME,
           "torch.searchsorted(inside, index)",
           "torch.searchsorted(inside, index, right=True).clamp(max=len(inside) - 1)"),
    Mutant("positions: rows laid end to end are one sequence", "model.py", SOME,
           "inner.inside % T  # (M,)",
           "torch.arange(len(inner.inside), device=ids.device) % T  # (M,)"),
    Mutant("positions: without padding, but a row's keys in the next row's places", "model.py", SOME,
           "index_copy(0, inside, heads)",
           "index_copy(0, torch.arange(len(inside), device=heads.device), heads)"),

    # -- model.py: drawing, decoding some rows at once
    Mutant("draw: the random number isn't scaled to the sum", "generate.py", CHI_SQUARE,
           "uniform * sums[:, -1:]",
           "uniform"),
    Mutant("draw: the group times how many there are", "generate.py", CHI_SQUARE,
           "token = GROUP * group +",
           "token = groups.shape[1] * group +"),
    Mutant("draw: tokens of probability zero", "generate.py", "test_model.py::test_the_smallest_and_the_largest_random_number_draw_tokens_that_can_be_drawn",
           "target, right=True)",
           "target)"),
    Mutant("generate: a cached token sees the next place", "generate.py", "test_model.py::test_decoding_computes_the_log_probabilities_of_training",
           "self.slots[:upto] <= positions[:, None]",
           "self.slots[:upto] <= positions[:, None] + 1"),
    Mutant("generate: a prompt's keys and values go to the first rows", "generate.py", FEW_ROWS,
           "cache.prefill(rows, source)",
           "cache.prefill(torch.arange(len(new), device=free.device), source)"),
    Mutant("generate: a row that takes a waiting prompt stays done", "generate.py", FEW_ROWS,
           "done[rows] = False",
           "done[rows] &= self.admitted > 0"),
    Mutant("generate: waiting prompts are forgotten", "generate.py", FEW_ROWS,
           "min(self.admitted + len(free), len(self.prompts))",
           "min(self.admitted + len(free), len(self.live))"),
    Mutant("generate: equal prompts are passed over each", "generate.py", "test_model.py::test_equal_prompts_are_passed_over_once_and_get_samples_of_their_own",
           "cache.prefill(rows, source)\n        padded, lengths = pad_rows(list(place), ",
           "cache.prefill(rows, torch.arange(len(new)))\n        padded, lengths = pad_rows([self.prompts[i] for i in new], "),
    Mutant("generate: of equal prompts the first one's keys and values alone arrive", "generate.py",
           "test_model.py::test_equal_prompts_are_passed_over_once_and_get_samples_of_their_own",
           "place.setdefault(prompt, len(place))",
           "place.setdefault(prompt, i)"),
    Mutant("generate: rows leave with the keys and values of others", "generate.py", GREEDY,
           "cache.keep(left)",
           "cache.keep(torch.arange(len(left), device=left.device))"),
    Mutant("generate: adapters are left out", "generate.py", "test_model.py::test_decoding_with_adapters_is_decoding_with_the_merged_weights",
           'if hasattr(linear, "merged"):',
           "if False:"),
    Mutant("generate: a failure leaves the weights for decoding in place", "generate.py",
           "test_model.py::test_generation_leaves_the_model_as_it_was_even_when_it_fails",
           "    finally:\n        model.train(was_training)\n",
           "    except GeneratorExit:\n        raise\n    else:\n        model.train(was_training)\n"),

    # -- model.py: the dialects, activations computed again
    Mutant("rotary: turns the wrong way", "model.py", ROTARY,
           "torch.cat([-b, a], -1)",
           "torch.cat([b, -a], -1)"),
    Mutant("rotary: neighbours share an angle, halves are turned", "model.py", ROTARY,
           ".repeat(*[1] * positions.ndim, 2)",
           ".repeat_interleave(2, -1)"),
    Mutant("rotary: a decoded token stands one later", "model.py", GREEDY,
           "turns = at[:, None]",
           "turns = at[:, None] + 1"),
    Mutant("rotary: llama3's smooth part inverted", "model.py", SCALING,
           "(1 - keep) * stretched + keep * frequencies",
           "keep * stretched + (1 - keep) * frequencies"),
    Mutant("rotary: wavelengths divided by the factor", "model.py", SCALING,
           "stretched = frequencies / factor",
           "stretched = frequencies * factor"),
    Mutant("RMSNorm: eps forgotten", "model.py", "test_model.py::test_every_norm_has_the_eps_of_the_config",
           "RMSNorm(config.n_embd, config.norm_eps)",
           "RMSNorm(config.n_embd)"),
    Mutant("grouped heads: they take turns at keys and values", "model.py", "test_model.py::test_grouped_heads_equal_full_heads_with_keys_and_values_repeated",
           "(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)",
           "(q, *(x.repeat(1, self.n_head // self.n_kv_head, 1, 1) for x in (k, v)), is_causal=True, dropout_p=dropout)"),
    Mutant("grouped heads: keys first", "model.py", "test_model.py::test_grouped_heads_equal_full_heads_with_keys_and_values_repeated",
           "q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)",
           "k, q, v = heads.split([self.n_kv_head, self.n_head, self.n_kv_head], dim=1)"),
    Mutant("swiglu: gate and up swapped", "model.py", PEER + "[llama2]",
           "gate, x = x.chunk(2, -1)",
           "x, gate = x.chunk(2, -1)"),
    Mutant("Qwen3: no norms on query and key", "model.py", PEER + "[qwen3]",
           "            q = self.q_norm(q).to(v.dtype)\n            k = self.k_norm(k).to(v.dtype)\n",
           "            pass\n"),
    Mutant("OPT: two positions early", "model.py", PEER + "[opt]",
           "self.wpe(at + self.config.position_offset)",
           "self.wpe(at)"),
    Mutant("OPT-350M: norms before the blocks", "model.py", PEER + "[opt-350m]",
           "        if self.norm_after:\n",
           "        if False:\n"),
    Mutant("activations: kept in spite of the switch", "model.py", "test_model.py::test_recomputed_activations_change_neither_loss_nor_gradients",
           "if self.checkpoint_activations and torch.is_grad_enabled():",
           "if False:"),

    # -- adapters.py
    Mutant("activations: the switch set on the wrong module", "model.py", "test_model.py::test_prepare_switches_the_recomputation_of_activations_on",
           "model.transformer.checkpoint_activations = flags.checkpoint_activations",
           "model.checkpoint_activations = flags.checkpoint_activations"),
    Mutant("adapters: the critic's head is the reward model's", "model.py", "test_lora.py::test_a_twin_that_shares_is_the_base_whatever_adapters_the_original_gets",
           "model.score.weight = nn.Parameter(model.score.weight.detach().clone())",
           "model.score.requires_grad_(True)"),
    Mutant("lora: alpha isn't divided by the rank", "model.py", "test_lora.py::test_an_adapter_is_its_formula",
           "self.scale = alpha / rank",
           "self.scale = alpha"),
    Mutant("lora: dropout outside training", "model.py", "test_lora.py::test_dropout_is_of_the_adapters_inputs_and_while_training_only",
           "dropped = F.dropout(x, self.dropout, self.training)",
           "dropped = F.dropout(x, self.dropout)"),
    Mutant("lora: the base is trained too", "model.py", TRAINED,
           "    model.requires_grad_(False)\n    if isinstance(model, ScalarModel):\n",
           "    if isinstance(model, ScalarModel):\n"),
    Mutant("lora: the scalar head is frozen", "model.py", TRAINED,
           "model.score.weight = nn.Parameter(model.score.weight.detach().clone())",
           "model.score.weight = nn.Parameter(model.score.weight.detach().clone(), requires_grad=False)"),
    Mutant("lora: A begins at zero like B", "model.py", TRAINED,
           "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
           "nn.init.zeros_(self.lora_A)"),
    Mutant("lora: merged without its scale", "model.py", "test_lora.py::test_merged_weights_compute_what_the_adapters_do_and_leave_them_alone",
           "weight + self.scale * lora_B @ lora_A",
           "weight + lora_B @ lora_A"),

    # -- checkpoint.py
    Mutant("checkpoint: rows of query, key and value", "formats/families.py", PEER + "[llama3]",
           "return [queries, keys, keys]",
           "return [keys, keys, queries]"),
    Mutant("checkpoint: OPT's query and key swapped", "formats/families.py", PEER + "[opt]",
           '        "model.decoder.layers.{}.self_attn.q_proj",\n        "model.decoder.layers.{}.self_attn.k_proj",\n',
           '        "model.decoder.layers.{}.self_attn.k_proj",\n        "model.decoder.layers.{}.self_attn.q_proj",\n'),
    Mutant("checkpoint: a square matrix isn't transposed", "formats/families.py", PEER + "[gpt2]",
           'TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")',
           'TRANSPOSED = ("c_attn.weight", "mlp.c_proj.weight", "c_fc.weight")'),
    Mutant("checkpoint: Llamas are tied unless they say", "formats/families.py", REFUSED,
           'tied=h.get("tie_word_embeddings", False),',
           'tied=h.get("tie_word_embeddings", True),'),
    Mutant("checkpoint: the sliding window is ignored", "formats/families.py", "test_checkpoint.py::test_a_sequence_beyond_the_sliding_window_is_refused",
           'context = min(context, h["sliding_window"])',
           "pass"),
    Mutant("checkpoint: transformers 5's rope_theta is ignored", "formats/families.py", "test_checkpoint.py::test_config_json_may_be_of_transformers_5_or_before",
           'rope.get("rope_theta", h.get("rope_theta", 10000.0))',
           'h.get("rope_theta", 10000.0)'),
    Mutant("checkpoint: weights without a place are left out", "formats/model_folder.py", REFUSED,
           "    require(not extra, ",
           "    require(True, "),
    Mutant("checkpoint: any architecture of a family will do", "formats/model_folder.py", REFUSED,
           "architecture = (header.get(\"architectures\") or [None])[0]\n",
           "architecture = next(iter(kinds))\n"),
    Mutant("checkpoint: pickles without --allow-pickle", "formats/model_folder.py", "test_checkpoint.py::test_a_plain_pickle_is_opened_only_when_allowed",
           'require("pickle" not in files.values() or allow_pickle,',
           "require(True,"),
    Mutant("checkpoint: pickles may run code", "formats/model_folder.py", "test_checkpoint.py::test_a_hostile_or_odd_pickle_is_refused_and_runs_nothing",
           "weights_only=True, mmap=True",
           "weights_only=False, mmap=True"),
    Mutant("new tokens: their rows are zero", "formats/model_folder.py", NEW_ROWS,
           "rows = known.mean(0) + 0.1 * known.std(0) * noise",
           "rows = torch.zeros_like(noise)"),
    Mutant("new tokens: no rows in the head", "formats/model_folder.py", NEW_ROWS,
           "for module in heads:",
           "for module in heads[:1]:"),
    Mutant("peft: every part on the first rows of its matrix", "formats/model_folder.py", PEFT,
           "start += rows or 0",
           "start += 0"),
    Mutant("peft: loaded without the scale", "formats/model_folder.py", PEFT,
           "part += alpha / rank * B @ A",
           "part += B @ A"),

    # -- sft.py
    Mutant("sft: prompts and padding in the mean", "sft.py", FORMULA + "[sft]",
           "sum(sum(train[i].mask) for i in batch)",
           "sum(len(train[i].mask) for i in batch)"),
    Mutant("sft: a mean for each micro-batch", "sft.py", FORMULA + "[sft]",
           "-logprob * counts / tokens",
           "-logprob * counts / mask.sum()"),
    Mutant("sft: an optimiser step for each micro-batch", "sft.py", FORMULA + "[sft]",
           "run.backward(piece_loss, optimizer)\n",
           "run.backward(piece_loss, optimizer), optimizer.step(), optimizer.zero_grad()\n"),
    Mutant("sft: held-out loss over padding too", "sft.py",
           "test_runs.py::test_the_held_out_loss_is_a_mean_over_reply_tokens",
           "sum(sum(example.mask) for example in examples)",
           "len(examples) * max(len(example.ids) for example in examples)"),
    Mutant("sft: a rank without examples counts the first twice", "sft.py", NO_EXAMPLES + "[sft-lost0]",
           "-logprob * counts / tokens",
           "-logprob / tokens"),
    Mutant("sft: --part is ignored", "sft.py", "test_runs.py::test_training_takes_its_part_of_a_file_and_holds_prompts_out[sft]",
           'read_rows(config.data, "demonstrations", run.say, config.part, config.skip_bad)',
           'read_rows(config.data, "demonstrations", run.say)'),

    # -- reward.py
    Mutant("ranking loss: margin's sign", "reward.py", LOSSES,
           "F.logsigmoid(gap - margin)",
           "F.logsigmoid(gap + margin)"),
    Mutant("ranking loss: gap's sign", "reward.py", LOSSES,
           "gap = scores[better] - scores[worse]  # (P,)",
           "gap = scores[worse] - scores[better]  # (P,)"),
    Mutant("ranking loss: a mean over pairs", "reward.py", LOSSES,
           "loss = (weight * -F.logsigmoid(gap - margin)).sum()",
           "loss = -F.logsigmoid(gap - margin).mean()"),
    Mutant("ranking loss: log of a sigmoid that underflows", "reward.py", LOSSES,
           "weight * -F.logsigmoid(gap - margin)",
           "weight * -torch.sigmoid(gap - margin).log()"),
    Mutant("reward model: a mean for each micro-batch", "reward.py", FORMULA + "[reward]",
           "weight = weight * counts / len(batch)",
           "weight = weight * counts / len(piece)"),
    Mutant("reward model: a rank without examples counts the first twice", "reward.py",
           NO_EXAMPLES + "[reward-lost1]",
           "weight = weight * counts / len(batch)",
           "weight = weight / len(batch)"),
    Mutant("reward model: demonstrations don't score 0", "reward.py", "test_runs.py::test_reward_model_scores_demonstrations_zero_on_average",
           "amount=float(scores.mean())",
           "amount=-float(scores.mean())"),
    Mutant("reward model: length alone takes the longer reply", "reward.py",
           "test_losses.py::test_length_alone_takes_the_longer_or_the_shorter_reply_whichever_is_"
           "more_often_right",
           "max(by_length, 1 - by_length)",
           "by_length"),

    # -- dpo.py
    Mutant("dpo: the reference's sign", "dpo.py", FORMULA + "[dpo]",
           "log_ratios = logprobs - reference_sums",
           "log_ratios = logprobs + reference_sums"),
    Mutant("dpo: no reference", "dpo.py", FORMULA + "[dpo]",
           "log_ratios = logprobs - reference_sums",
           "log_ratios = logprobs"),
    Mutant("dpo: beta forgotten on one side", "dpo.py", LOSSES,
           "label_smoothing * F.logsigmoid(-h)",
           "label_smoothing * F.logsigmoid(-gap)"),
    Mutant("dpo: label smoothing of the wrong side", "dpo.py", LOSSES,
           "label_smoothing * F.logsigmoid(-h)",
           "label_smoothing * F.logsigmoid(h)"),
    Mutant("ipo: beta forgotten", "dpo.py", LOSSES,
           "(gap - 1 / (2 * beta)).square()",
           "(gap - 1 / 2).square()"),
    Mutant("dpo: a mean over tokens, of the policy alone", "dpo.py", FORMULA + "[dpo]",
           "logprobs = policy(ids, mask)[0].sum(1)",
           "logprobs = policy(ids, mask)[0].sum(1) / mask.sum(1)"),
    Mutant("dpo: the reference is the policy that a resumed run loads", "dpo.py", RESUME,
           "reference = frozen_reference(model, config)",
           "reference = model"),
    Mutant("dpo: the reference gets the adapters", "dpo.py", RESUME,
           "    prepare_training(model, config)\n",
           "    prepare_training(model, config)\n    reference = copy_of(model, shared)\n"),
    Mutant("dpo: a rank without examples counts the first twice", "dpo.py", NO_EXAMPLES + "[dpo-lost2]",
           "weight = weight * counts / len(batch)",
           "weight = weight / len(batch)"),
    Mutant("dpo: reference log-probabilities in another order", "data.py", FORMULA + "[dpo]",
           "rows = torch.tensor(piece).to(",
           "rows = torch.tensor(sorted(piece)).to("),

    # -- ppo.py: prompts, scores
    Mutant("ppo: --part is ignored", "rollout.py", PROMPTS,
           'read_rows(config.data, "prompts", say, config.part, config.skip_bad)',
           'read_rows(config.data, "prompts", say)'),
    Mutant("ppo: --val-fraction is ignored", "rollout.py", PROMPTS,
           "split_by_prompt(rows, config.val_fraction)",
           "split_by_prompt(rows, config.val_fraction if held_out else 0.0)"),
    Mutant("missing end token: the other replies are judged", "ppo.py",
           "test_ppo.py::test_a_missing_end_token_is_judged_by_its_rule_and_replies_that_ended_keep_"
           "their_score",
           "torch.where(ended, scores, cut_off)",
           "torch.where(ended, cut_off, scores)"),
    Mutant("missing end token: no penalty", "ppo.py",
           "test_ppo.py::test_a_missing_end_token_is_judged_by_its_rule_and_replies_that_ended_keep_"
           "their_score",
           "cut_off = lowest - penalty",
           "cut_off = lowest"),
    Mutant("missing end token: after normalisation", "ppo.py",
           "test_ppo.py::test_the_missing_end_token_is_judged_before_scores_are_normalised",
           "        adjusted = missing_eos_scores(scores, batch.ended, config.missing_eos, "
           "config.missing_eos_penalty,\n                                      lowest)\n"
           '        if config.reward_norm != "none":\n'
           "            moments = update_moments(moments, adjusted, run.all_sum)\n"
           "        adjusted = normalise_scores(adjusted, moments, config.reward_norm, "
           "config.reward_clip)\n",
           '        if config.reward_norm != "none":\n'
           "            moments = update_moments(moments, scores, run.all_sum)\n"
           "        adjusted = normalise_scores(scores, moments, config.reward_norm, config.reward_clip)\n"
           "        adjusted = missing_eos_scores(adjusted, batch.ended, config.missing_eos, "
           "config.missing_eos_penalty,\n                                      lowest)\n"),
    Mutant("missing end token: each rank has a lowest score of its own", "ppo.py", TOGETHER,
           "run.all_min(scores.min())",
           "scores.min()"),
    Mutant("reward norm: scale subtracts the mean too", "ppo.py", NORMALISED,
           '(mean if kind == "standard" else 0.0)',
           "mean"),
    Mutant("reward norm: clipped before it", "ppo.py", NORMALISED,
           '    if kind != "none":\n        count, mean, squares = moments\n',
           '    scores = scores.clamp(-clip, clip) if clip > 0 else scores\n    if kind != "none":\n        count, mean, squares = moments\n'),
    Mutant("reward norm: ranks with moments of their own", "ppo.py", PPO_RANKS,
           "moments = update_moments(moments, adjusted, run.all_sum)",
           "moments = update_moments(moments, adjusted)"),
    Mutant("running moments: without the shift of the mean", "ppo.py",
           "test_ppo.py::test_running_moments_are_those_of_the_whole_stream_however_it_is_cut",
           "old_squares + squares + shift**2 * seen * count / n",
           "old_squares + squares"),
    Mutant("rewards: weights forgotten", "ppo.py",
           "test_ppo.py::test_the_score_is_the_weighted_sum_of_reward_models_and_functions",
           "scores = weights @ source_scores",
           "scores = source_scores.sum(0)"),

    # -- ppo.py: the KL term, where the score lands
    Mutant("KL: the reward's sign", "ppo.py", LOSSES,
           "torch.where(steps, -kl_coef * kl, 0.0)",
           "torch.where(steps, kl_coef * kl, 0.0)"),
    Mutant("KL: the wrong direction", "ppo.py", LOSSES,
           "    log_ratio = logprobs - ref_logprobs\n",
           "    log_ratio = ref_logprobs - logprobs\n"),
    Mutant("k3: the ratio the wrong way round", "ppo.py", LOSSES,
           "torch.expm1(-log_ratio) + log_ratio\n",
           "torch.expm1(log_ratio) - log_ratio\n"),
    Mutant("k2: not halved", "ppo.py", KL_LOSS,
           "return log_ratio.square() / 2",
           "return log_ratio.square()"),
    Mutant("KL: in the reward and in the loss", "ppo.py", KL_TERM,
           '{"reward": state["kl_coef"], "loss": 0.0}[config.kl_in]',
           'state["kl_coef"]'),
    Mutant("KL: on padding too", "ppo.py", LOSSES,
           "rewards = torch.where(steps, -kl_coef * kl, 0.0)",
           "rewards = -kl_coef * kl"),
    Mutant("score: at the first token", "ppo.py", LOSSES,
           "last = (steps * torch.arange(1, T + 1, device=steps.device)).argmax(1)",
           "last = steps.long().argmax(1)"),
    Mutant("score: one token later", "ppo.py", LOSSES,
           "rewards.scatter_add(1, last[:, None],",
           "rewards.scatter_add(1, (last[:, None] + 1).clamp(max=T - 1),"),
    Mutant("score: at every token", "ppo.py", LOSSES,
           "return rewards.scatter_add(1, last[:, None], torch.where(steps.any(1), scores, 0.0)[:, None])",
           "return rewards + steps * scores[:, None]"),
    Mutant("score one later: one earlier", "ppo.py", "test_ppo.py::test_the_step_after_the_last_token_exists_for_all_but_the_longest_replies",
           "F.pad(mask, (1, 0))[:, :-1]",
           "F.pad(mask, (0, 1))[:, 1:]"),

    # -- ppo.py: advantages
    Mutant("gae: no mask", "ppo.py", LOSSES,
           "next_advantage = torch.where(steps[:, t], delta + gamma * lam * next_advantage, 0.0)",
           "next_advantage = delta + gamma * lam * next_advantage"),
    Mutant("gae: bootstraps from padding", "ppo.py", LOSSES,
           "next_value = torch.where(steps[:, t], values[:, t], 0.0)",
           "next_value = values[:, t]"),
    Mutant("gae: gamma forgotten in the sum", "ppo.py", LOSSES,
           "delta + gamma * lam * next_advantage",
           "delta + lam * next_advantage"),
    Mutant("gae: the value's sign", "ppo.py", LOSSES,
           "gamma * next_value - values[:, t]",
           "gamma * next_value + values[:, t]"),
    Mutant("returns: from whitened advantages", "ppo.py", ADVANTAGES,
           "            advantages = whiten(advantages, batch.mask, run.all_sum, config.whiten)\n",
           "            advantages = whiten(advantages, batch.mask, run.all_sum, config.whiten)\n"
           "            returns = advantages + old.values\n"),
    Mutant("whiten: mean over padding", "ppo.py", LOSSES,
           "all_sum(torch.stack([x.sum(), mask.sum().to(x.dtype)]))",
           "all_sum(torch.stack([x.sum(), x.new_tensor(x.numel())]))"),
    Mutant("whiten: padding not zero", "ppo.py", LOSSES,
           "centred = torch.where(mask, x - mean, 0.0)",
           "centred = x - mean"),
    Mutant("whiten: ranks with means of their own", "ppo.py", "test_ppo.py::test_whitening_divides_by_the_variance_it_names_over_all_ranks",
           "total, count = all_sum(torch.stack([x.sum(), mask.sum().to(x.dtype)]))",
           "total, count = torch.stack([x.sum(), mask.sum().to(x.dtype)])"),
    Mutant("whiten: the run forgets the other ranks", "ppo.py", TOGETHER,
           "whiten(advantages, batch.mask, run.all_sum, config.whiten)",
           "whiten(advantages, batch.mask, variance=config.whiten)"),
    Mutant("whiten: the sample's variance", "ppo.py", LOSSES,
           'if variance == "sample":',
           "if True:"),
    Mutant("advantages: clipped before they are whitened", "ppo.py", ADVANTAGES,
           '        if config.whiten != "none":\n'
           "            advantages = whiten(advantages, batch.mask, run.all_sum, config.whiten)\n"
           "        if config.advantage_clip > 0:\n"
           "            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)\n",
           "        if config.advantage_clip > 0:\n"
           "            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)\n"
           '        if config.whiten != "none":\n'
           "            advantages = whiten(advantages, batch.mask, run.all_sum, config.whiten)\n"),

    # -- ppo.py: log-probabilities
    Mutant("temperature: forgotten in sampling", "ppo.py",
           "test_runs.py::test_ppo_samples_at_its_temperature",
           "config.temperature, generator, config.rollout_rows",
           "1.0, generator, config.rollout_rows"),
    Mutant("temperature: forgotten in the old log-probabilities", "ppo.py", OBJECTIVE,
           "models.policy_model(part.ids, part.where, temperature, with_entropy",
           "models.policy_model(part.ids, part.where, with_entropy"),
    Mutant("temperature: forgotten in the reference's", "ppo.py", OBJECTIVE,
           "reference(part.ids.to(reference.device), part.where, temperature)",
           "reference(part.ids.to(reference.device), part.where)"),
    Mutant("temperature: forgotten in the new ones", "ppo.py", OBJECTIVE,
           "models.policy(part.ids, part.where, config.temperature,",
           "models.policy(part.ids, part.where,"),
    Mutant("old log-probabilities: from a half-precision pass, as a sampler's", "ppo.py", OBJECTIVE,
           "with run.autocast():\n"
           "            logprobs, entropy = models.policy_model(",
           "with torch.autocast(run.device.type, torch.bfloat16):\n"
           "            logprobs, entropy = models.policy_model("),
    Mutant("old log-probabilities: computed anew after every update", "ppo.py", OBJECTIVE,
           "logprobs, old_logprobs, part.of(advantages)",
           "logprobs, logprobs.detach(), part.of(advantages)"),
    Mutant("reference: shares the policy's weights", "ppo.py", OPTIMUM,
           "    prepare_training(critic_model, config)\n",
           "    prepare_training(critic_model, config)\n    reference = policy_model\n"),
    Mutant("reference: gets the policy's adapters", "ppo.py",
           "test_lora.py::test_a_reference_that_is_the_model_without_its_adapters_equals_one_of_its_own[ppo]",
           "    prepare_training(critic_model, config)\n",
           "    prepare_training(critic_model, config)\n    reference = copy_of(policy_model, shares)\n"),
    Mutant("adapters: a frozen model's own head stays behind", "ppo.py",
           "test_lora.py::test_with_adapters_every_frozen_model_goes_to_the_device_with_its_head",
           "            model.to(run.device)\n            continue\n",
           "            continue\n"),
    Mutant("dropout: on in the update", "ppo.py", OBJECTIVE,
           "    models.policy.eval()\n",
           "    models.policy.train()\n"
           "    [setattr(m, 'dropout', 0.1) for m in models.policy.modules() if hasattr(m, 'dropout')]\n"),

    # -- ppo.py: losses
    Mutant("clip: the minimum of two losses", "ppo.py", LOSSES,
           "loss = torch.maximum(-advantages * ratio,",
           "loss = torch.minimum(-advantages * ratio,"),
    Mutant("clip: on one side", "ppo.py", LOSSES,
           "ratio.clamp(1 - clip, 1 + clip)",
           "ratio.clamp(max=1 + clip)"),
    Mutant("clip: the clipped ratio alone", "ppo.py", LOSSES,
           "loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))",
           "loss = -advantages * ratio.clamp(1 - clip, 1 + clip)"),
    Mutant("ratio: the wrong way round", "ppo.py", LOSSES,
           "log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20)\n",
           "log_ratio = torch.where(mask, old_logprobs - logprobs, 0.0).clamp(-20, 20)\n"),
    Mutant("dual clip: of good tokens", "ppo.py", POLICY_LOSSES,
           "torch.where(advantages < 0, torch.minimum(loss",
           "torch.where(advantages > 0, torch.minimum(loss"),
    Mutant("penalty: its sign", "ppo.py", POLICY_LOSSES,
           "-advantages * ratio + penalty_coef * kl",
           "-advantages * ratio - penalty_coef * kl"),
    Mutant("penalty: KL(new || old)", "ppo.py", POLICY_LOSSES,
           "kl = torch.expm1(log_ratio) - log_ratio  #",
           "kl = torch.expm1(-log_ratio) + log_ratio  #"),
    Mutant("policy loss: padding counts", "ppo.py", LOSSES,
           "return (loss * mask).sum() / tokens, {k:",
           "return loss.sum() / tokens, {k:"),
    Mutant("KL loss: without the ratio", "ppo.py", KL_LOSS,
           '"k2": ratio.detach(), "k3": ratio}',
           '"k2": 1.0, "k3": 1.0}'),
    Mutant("KL loss: k3's ratio is a constant", "ppo.py", KL_LOSS,
           '"k3": ratio}',
           '"k3": ratio.detach()}'),
    Mutant("KL loss: k2's ratio has a gradient", "ppo.py", KL_LOSS,
           '"k2": ratio.detach()',
           '"k2": ratio'),
    Mutant("KL loss: its sign", "ppo.py", OPTIMUM_OF_KL,
           'objective + coefs["kl_coef"] * kl',
           'objective - coefs["kl_coef"] * kl'),
    Mutant("entropy bonus: its sign", "ppo.py", OBJECTIVE,
           "objective - config.entropy_coef * (entropy",
           "objective + config.entropy_coef * (entropy"),
    Mutant("value loss: held near the return", "ppo.py", LOSSES,
           "held = old_values + (values - old_values).clamp(-clip, clip)",
           "held = returns + (values - returns).clamp(-clip, clip)"),
    Mutant("value loss: the better of the two", "ppo.py", LOSSES,
           "losses = torch.maximum(losses, (held - returns).square())",
           "losses = torch.minimum(losses, (held - returns).square())"),
    Mutant("value loss: not on the step after the last token", "ppo.py", CRITIC,
           "part.of(returns), part_steps,",
           "part.of(returns), part.mask,"),
    Mutant("mean: prompts and padding in the count", "ppo.py", OBJECTIVE,
           "torch.stack([batch.host_mask[picked].sum(), batch.host_steps",
           "torch.stack([torch.tensor(batch.host_mask[picked].numel()), batch.host_steps"),
    Mutant("mean: of each micro-batch", "ppo.py", OBJECTIVE,
           "part.of(advantages), part.mask, config.clip, tokens,",
           "part.of(advantages), part.mask, config.clip, part.mask.sum(),"),
    Mutant("mean: ranks divide by their own tokens", "ppo.py", TOGETHER,
           "tokens, value_tokens = run.all_sum(own.to(run.device, non_blocking=True))",
           "tokens, value_tokens = own"),

    # -- ppo.py: the update and its control
    Mutant("minibatches: the first one again and again", "ppo.py", EACH_REPLY,
           "order = drawn.argsort(1)",
           "order = 0 * drawn.argsort(1)"),
    Mutant("minibatches: the same ones in every epoch", "ppo.py", DEALT,
           "order = drawn.argsort(1)",
           "order = drawn[:1].expand(epochs, -1, -1).argsort(1)"),
    Mutant("minibatches: other ones with more ranks", "ppo.py", DEALT,
           "own = order[:, run.rank::run.world_size]",
           "own = order[:, :lanes]"),
    Mutant("minibatches: ranks shuffle on their own", "ppo.py", DEALT,
           "all_lanes, generator=generator, device",
           "all_lanes, device"),
    Mutant("minibatches: not mixed at all", "ppo.py", DEALT,
           "order = drawn.argsort(1)",
           "order = drawn.cumsum(1).argsort(1)"),
    Mutant("ppo: --rollout-rows is ignored", "ppo.py",
           "test_runs.py::test_ppo_decodes_no_more_rows_at_once_than_it_is_told_and_says_what_share_"
           "of_the_time_each_part_took",
           "generator, config.rollout_rows, room=room",
           "generator, room=room"),
    Mutant("ptx: a step of its own", "ppo.py",
           "test_ppo.py::test_ptx_adds_its_gradient_before_the_one_step_of_each_minibatch",
           "            ptx_pass(run, config, models, demonstrations, demonstrations.drawn[number], "
           "totals)\n",
           "            ptx_pass(run, config, models, demonstrations, demonstrations.drawn[number], "
           "totals)\n"
           "            run.optimizer_step(models.policy_optimizer, lr, config.max_grad_norm, [])\n"),
    Mutant("ptx: its sign", "ppo.py", OBJECTIVE,
           "loss = -logprob * weight * config.ptx_coef",
           "loss = logprob * weight * config.ptx_coef"),
    Mutant("ptx: a rank without demonstrations counts the first twice", "ppo.py", NO_EXAMPLES + "[ppo-lost3]",
           "loss = -logprob * weight * config.ptx_coef",
           "loss = -logprob * config.ptx_coef"),
    Mutant("ema: the wrong direction", "ppo.py",
           "test_ppo.py::test_the_average_is_the_recursion_over_every_step_of_the_policy",
           "1 - config.ema)",
           "config.ema)"),
    Mutant("critic warm-up: trains the policy", "ppo.py", WARMUP,
           "train_policy = step >= warm",
           "train_policy = True"),
    Mutant("critic warm-up: one rollout too long", "ppo.py", WARMUP,
           "train_policy = step >= warm",
           "train_policy = step > warm"),
    Mutant("critic: the policy's learning rate", "ppo.py",
           "test_ppo.py::test_each_network_has_a_learning_rate_and_a_schedule_of_its_own",
           "run.optimizer_step(models.critic_optimizer, critic_lr,",
           "run.optimizer_step(models.critic_optimizer, lr,"),
    Mutant("adaptive KL: inverted", "ppo.py", LOSSES,
           "error = min(max(kl / target - 1, -0.2), 0.2)",
           "error = min(max(1 - kl / target, -0.2), 0.2)"),
    Mutant("adaptive KL: on the KL per token", "ppo.py", EACH_REPLY,
           'adapt_kl_coef(state["kl_coef"], row["kl"], config.kl_target',
           'adapt_kl_coef(state["kl_coef"], row["kl"] / row["length"], config.kl_target'),
    Mutant("adaptive KL: counts rollouts, not replies", "ppo.py", BETA,
           "                                             config.rollout_batch, config.kl_horizon)",
           "                                             1, config.kl_horizon)"),
    Mutant("adaptive penalty: inverted", "ppo.py", "test_ppo.py::test_the_penalty_doubles_halves_or_stays",
           "        return 2.0 * penalty_coef\n    if kl < target / 1.5:\n        return 0.5 * penalty_coef\n",
           "        return 0.5 * penalty_coef\n    if kl < target / 1.5:\n        return 2.0 * penalty_coef\n"),
    Mutant("KL stop: leaves its gradient to the next rollout", "ppo.py",
           "test_ppo.py::test_after_a_stopped_update_the_next_rollout_starts_with_clean_gradients",
           "            models.policy_optimizer.zero_grad()\n"
           "            models.critic_optimizer.zero_grad()\n",
           ""),
    Mutant("metrics: KL per token", "ppo.py", EACH_REPLY,
           '"kl": log_ratio.sum(1).mean()',
           '"kl": log_ratio[mask].mean()'),
    Mutant("ranks: the same prompts", "rollout.py", DEALT,
           "return drawn[run.rank::run.world_size]",
           "return drawn[:count // run.world_size]"),
    Mutant("ranks: the first one gets the short prompts", "rollout.py", DEALT,
           "return drawn[run.rank::run.world_size]",
           "return drawn[run.rank * (count // run.world_size):][:count // run.world_size]"),
    Mutant("ranks: the same uniform numbers", "rollout.py", DEALT,
           "by_prompt[run.rank::run.world_size]",
           "by_prompt[:len(prompts)]"),
    Mutant("explained variance: ranks with one of their own", "ppo.py", TOGETHER,
           "explained_variance(old.values, returns, steps, run.all_sum)",
           "explained_variance(old.values, returns, steps)"),
    Mutant("explained variance: all of returns that don't vary", "ppo.py",
           "test_ppo.py::test_nothing_is_explained_of_returns_that_do_not_vary",
           "torch.where(spread > ROUNDING**2 * size, share, 0.0)",
           "torch.where(spread > ROUNDING**2 * size, share, 1.0)"),
    Mutant("scores: the rounding of their mean is a deviation", "ppo.py",
           "test_ppo.py::test_equal_scores_whose_mean_is_inexact_in_fp32_are_not_blown_up_either",
           "if deviation <= ROUNDING * abs(mean):",
           "if deviation == 0:"),
    Mutant("where the score lands: each rank has a longest reply of its own", "ppo.py",
           "faults/test_equivalence.py::test_gradients_of_uneven_rows_are_the_same_in_one_pass_row_by_row_on_two_ranks_and_in_shards[many]",
           "longest = all_max(length.max())",
           "longest = length.max()"),
    Mutant("choices: an unknown KL estimator is k3", "ppo.py", UNKNOWN_CHOICE,
           'if kind == "k3":', "if True:"),
    Mutant("choices: an unknown policy loss is the clipped one", "ppo.py", UNKNOWN_CHOICE,
           'elif kind != "clip":', "elif False:"),
    Mutant("choices: an unknown loss is the hinge", "dpo.py", UNKNOWN_CHOICE,
           'elif kind == "hinge":', "elif True:"),
    Mutant("reward function: what it gets goes by the number of its parameters", "judges.py",
           "test_ppo.py::test_a_reward_function_gets_what_its_parameters_name_whatever_their_number",
           "self.function(**arguments)",
           "self.function(*[prompts, replies, answers][:len(inspect.signature(self.function).parameters)])"),
    Mutant("reward function: answers that nobody has", "judges.py",
           "test_ppo.py::test_a_function_that_wants_answers_and_gets_none_stops_the_run_and_one_that_gets_some_is_told",
           "require(known, f", "require(True, f"),
    Mutant("variance: ranks with means of their own", "ppo.py", VARIANCE,
           "count, total = all_sum(torch.stack([mask.sum(), (x * mask).sum()]))",
           "count, total = all_sum(mask.sum()), (x * mask).sum() * all_sum(mask.sum()) / mask.sum()"),
    Mutant("variance: the padding's too", "ppo.py", VARIANCE,
           "return all_sum(((x - total / count).square() * mask).sum()) / count",
           "return all_sum((x - total / count).square().sum()) / count"),
    Mutant("resume: forgets beta", "ppo.py", PPO_RESUME,
           "    state |= fresh | state\n",
           '    state |= fresh | state | {"kl_coef": config.kl_coef}\n'),
    Mutant("resume: forgets the penalty", "ppo.py", PPO_RESUME,
           "    state |= fresh | state\n",
           '    state |= fresh | state | {"penalty_coef": config.penalty_coef}\n'),
    Mutant("resume: forgets the running moments", "ppo.py", PPO_RESUME,
           '        state["moments"] = moments\n',
           ""),
    Mutant("resume: from the first prompt", "ppo.py", PPO_RESUME,
           "endless_order(len(prompts), config.seed, first * config.rollout_batch)",
           "endless_order(len(prompts), config.seed)"),

    # -- evaluate.py, toy.py
    Mutant("evaluate: the KL's direction", "evaluate.py", EVALUATION,
           "kl[part.rows] = (logprobs - ref_logprobs).sum(1)",
           "kl[part.rows] = (ref_logprobs - logprobs).sum(1)"),
    Mutant("evaluate: the KL at temperature 1", "evaluate.py", EVALUATION,
           "logprobs = model(part.ids, part.where, config.temperature)[0]",
           "logprobs = model(part.ids, part.where, 1.0)[0]"),
    Mutant("evaluate: wins and losses swapped", "evaluate.py", EVALUATION,
           'return {"wins": wins, "ties": ties, "losses": losses,',
           'return {"wins": losses, "ties": ties, "losses": wins,'),
    Mutant("evaluate: each model against the one before", "evaluate.py", EVALUATION,
           "        replies[folder] = []\n",
           "        replies[folder] = []\n"
           "        baseline = compared\n"),
    Mutant("evaluate: prompts that were trained on", "rollout.py", PROMPTS,
           "        train = kept_back\n",
           ""),
    Mutant("judge: the best mark counts", "toy.py", "test_data.py::test_judge_on_replies_of_every_sort",
           "return min(judge(item, reply, ended))",
           "return max(judge(item, reply, ended))"),
    Mutant("annotator: ranks the wrong way round", "toy.py", "test_data.py::test_preferences_rank_by_gold_but_for_the_noise",
           "[-score for score in seen]",
           "[score for score in seen]"),
    Mutant("annotator: half as wrong as stated", "toy.py", "test_data.py::test_preferences_rank_by_gold_but_for_the_noise",
           "rng.random() < 2 * noise",
           "rng.random() < noise"),
    Mutant("world: held-out wordings are trained on", "toy.py",
           "test_data.py::test_world_splits_by_wording_and_repeats_by_seed",
           "                self.texts[split].append(text)\n",
           '                for name in {"train", split}:\n'
           "                    self.texts[name].append(text)\n"),

    # -- optim.py, hardware.py
    Mutant("learning rate: the first step has none", "plumbing/steps.py", "test_ppo.py::test_learning_rates_warm_up_and_follow_their_schedule",
           "return peak * (step + 1) / warmup",
           "return peak * step / warmup"),
    Mutant("weight decay: of embeddings and norms too", "plumbing/steps.py", "test_runs.py::test_weight_decay_is_of_matrices_but_not_of_embeddings",
           'if p.ndim < 2 or name.endswith(("wte.weight", "wpe.weight")):',
           "if False:"),
    Mutant("dtype: bfloat16 on a CPU for narrow models too", "plumbing/hardware.py", "test_runs.py::test_auto_is_bfloat16_on_a_cpu_that_multiplies_in_it_and_for_wide_models_alone",
           "if amx and width >= 256",
           "if amx"),
    Mutant("dtype: that of the narrowest model", "plumbing/run.py", "test_runs.py::test_a_run_settles_on_the_precision_that_its_widest_model_wants",
           "widest = max(",
           "widest = 0 * max("),

    # -- ranks.py
    Mutant("split: what fills a rank up counts", "plumbing/ranks.py", SPLIT,
           "[(list(spare), 0.0)]",
           "[(list(spare), 1.0)]"),
    Mutant("split: ranks make as many passes as they need", "plumbing/ranks.py", SPLIT,
           "most = max(len(passes) for passes in passes_of_rank)",
           "most = len(passes_of_rank[self.rank])"),
    Mutant("split: all examples to all ranks", "plumbing/ranks.py", SPLIT,
           "share = examples[rank::self.world_size]",
           "share = examples"),
    Mutant("ranks: sums stay apart", "plumbing/ranks.py", TOGETHER_SFT,
           "return self._all(tensor, dist.ReduceOp.SUM)",
           "return tensor"),

    # -- runtime.py: steps, signals
    Mutant("ranks: the factor that DDP's average takes away", "plumbing/steps.py", TOGETHER_SFT,
           "scale(loss * self.world_size)",
           "scale(loss)"),
    Mutant("ranks: gradients exchanged at the first micro-batch", "plumbing/run.py", TOGETHER_SFT,
           "not more and i == len(pieces) - 1",
           "not more and i == 0"),
    Mutant("ranks: draw the same noise", "plumbing/run.py", SEEDS,
           "torch.manual_seed(seed + 1 + self.rank)",
           "torch.manual_seed(seed + 1)"),
    Mutant("ranks: draw apart what they should draw together", "plumbing/run.py", SEEDS,
           "torch.Generator(self.device).manual_seed(seed)",
           "torch.Generator(self.device).manual_seed(seed + self.rank)"),
    Mutant("step: gradients aren't cleared", "plumbing/steps.py", OPTIMISER_STEP,
           "        optimizer.zero_grad(set_to_none=True)\n",
           ""),
    Mutant("step: gradients aren't clipped", "plumbing/steps.py", OPTIMISER_STEP,
           "clip_grads_with_norm_(parameters, max_grad_norm, norm)",
           "clip_grads_with_norm_(parameters, math.inf, norm)"),
    Mutant("step: taken although a gradient is not finite", "plumbing/steps.py", OPTIMISER_STEP,
           "optimizer.found_inf = bad.float()",
           "optimizer.found_inf = torch.zeros(())"),
    Mutant("skipped: one more than was allowed", "plumbing/steps.py",
           "test_runs.py::test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_the_second_time_if_one_may_be_skipped",
           "if counts and self.counted > limit:",
           "if counts and self.counted > limit + 1:"),
    Mutant("float16: an overflow counts though the scale is lowered", "plumbing/steps.py", HALF_ONCE,
           "if attempt.scaler.is_enabled() and scale >= 1:",
           "if False:"),
    Mutant("float16: what overflows at any scale is never counted", "plumbing/steps.py",
           "faults/test_numbers.py::test_in_float16_what_overflows_whatever_the_scale_ends_the_run",
           "if attempt.scaler.is_enabled() and scale >= 1:",
           "if attempt.scaler.is_enabled():"),
    Mutant("float16: a spike is stepped on", "plumbing/steps.py",
           "faults/test_numbers.py::test_in_float16_a_spike_of_the_gradient_is_skipped_and_leaves_the_scale",
           "optimizer.found_inf = bad.float()",
           "optimizer.found_inf = (~norm.isfinite()).float() if scaler.is_enabled() else bad.float()"),
    Mutant("signal: a run stops amid PPO's update", "plumbing/steps.py", PPO_RESUME,
           "        self.clean = False\n        scaler = self.scalers[optimizer]\n",
           "        scaler = self.scalers[optimizer]\n"),
    Mutant("signal: a run stops without saving", "plumbing/run.py", PPO_RESUME,
           "        if self.clean and self.any_rank(self.asked_to_stop()):\n            self._save(last=True)\n",
           "        if self.clean and self.any_rank(self.asked_to_stop()):\n"),

    # -- runtime.py, saving.py, metrics.py: resuming
    Mutant("resume: from the step after", "plumbing/run.py", PPO_RESUME,
           '        self.step = state["step"]\n',
           '        self.step = state["step"] + 1\n'),
    Mutant("resume: forgets what the script keeps", "plumbing/run.py", PPO_RESUME,
           '        self.state.update(state["extra"])\n',
           ""),
    Mutant("resume: whatever has changed", "plumbing/run.py", "test_ppo.py::test_resume_refuses_when_a_later_reward_or_the_demonstrations_have_changed",
           "require(not changed or self.config.override,",
           "require(True,"),
    Mutant("resume: forgets the optimiser's state", "plumbing/checkpoints.py", PPO_RESUME,
           "            tensor.copy_(saved)\n",
           '            tensor.copy_(saved) if "optimizer" not in name else None\n'),
    Mutant("checkpoint: is not compared with its manifest", "plumbing/checkpoints.py", FALL_BACK,
           "            problem = find_damage(self.root / name)\n",
           '            problem = ""\n'),
    Mutant("checkpoint: the one before is deleted", "plumbing/checkpoints.py", FALL_BACK,
           " | self._previous(older, step)",
           ""),
    Mutant("metrics: rows after the checkpoint stay", "plumbing/metrics.py", SFT_RESUME,
           'if row["step"] < step or at_checkpoint:',
           "if True:"),

    # -- what a run is built on, what it says, and what is said of it
    Mutant("resume: a model folder is its weights", "plumbing/disk.py", MODEL_CHANGED,
           "if file.name in CHECKPOINT_FILES or file.name.endswith(WEIGHTS):",
           "if file.name.endswith(WEIGHTS):"),
    Mutant("resume: a mixture's files are as they are spelled", "plumbing/run.py",
           DATA_CHANGED + "[{a}:5e-1, {b}:+.5]",
           "paths = [path for path, _ in parse_sources(spec)]",
           "paths = spec.split(\",\")"),
    Mutant("resume: today's date", "plumbing/run.py", DATED + "[nothing]",
           "        if self.config.resume:\n            states = ",
           "        if False:\n            states = "),
    Mutant("resume: the date is run.json's alone", "plumbing/run.py", DATED + "[run.json]",
           "for name in self.checkpoints.all()]\n            states.append",
           "for name in []]\n            states.append"),
    Mutant("resume: a finished run without checkpoints begins anew", "plumbing/run.py", SLIM,
           "        if not model:\n            return None\n",
           "        return None\n"),
    Mutant("resume: a model that may not be finished is trained over", "plumbing/run.py",
           "faults/test_checkpoints.py::test_a_model_of_a_run_without_checkpoints_that_may_not_be_finished_stays",
           "        require(done or not model,\n",
           "        require(True,\n"),
    Mutant("resume: a finished run has as many steps as are asked for", "plumbing/run.py", SLIM,
           "        require(done == total,\n",
           "        require(True,\n"),
    Mutant("resume: back to fewer steps", "plumbing/run.py",
           "faults/test_checkpoints.py::test_a_run_cannot_be_taken_back_to_fewer_steps_than_it_has_taken",
           'require(state["step"] <= total,',
           "require(True,"),
    Mutant("overwrite: a finished run's word outlives its model", "plumbing/disk.py",
           "faults/test_checkpoints.py::test_overwrite_deletes_the_word_that_a_run_is_finished_before_its_model",
           'RUN_FILES = ("run.json", *CHECKPOINT_FILES, ',
           'RUN_FILES = (*CHECKPOINT_FILES, "run.json", '),
    Mutant("console: a letter that it lacks ends the run", "plumbing/run.py",
           "test_runs.py::test_no_letter_that_a_console_lacks_ends_a_script[gbk]",
           'stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")',
           "pass"),
    Mutant("console: nobody who reads on is an error", "plumbing/run.py", UNHEARD + "[False]",
           "    atexit.register(flush_output)\n",
           ""),
    Mutant("console: a reader who leaves gets a traceback", "plumbing/run.py", UNHEARD + "[True]",
           "            sys.exit(128 + signal.SIGPIPE)\n",
           "            pass\n"),
    Mutant("log: an old value beside a new step", "plumbing/run.py",
           "test_runs.py::test_a_line_of_the_log_has_no_old_value_beside_a_new_step",
           "if measured != step:",
           "if False:"),
    Mutant("boards: missed when the folder has been made", "plumbing/run.py", MISTAKES,
           "            check_boards(config)\n",
           "            pass\n"),
    Mutant("flags: --epochs drops --steps", "plumbing/flags.py", MISTAKES,
           'if given.get("epochs") and config_class.epochs == 0 and "steps" in given:',
           "if False:"),
    Mutant("flags: ppo's --epochs exclude --steps too", "plumbing/flags.py",
           "test_runs.py::test_of_ppos_flags_steps_and_epochs_go_together",
           'if given.get("epochs") and config_class.epochs == 0 and',
           'if given.get("epochs") and'),
    Mutant("help: the common flags first", "plumbing/flags.py",
           "test_runs.py::test_help_begins_with_the_flags_of_the_script",
           "group = own if field.name in config_class.__annotations__ else common",
           "group = common if field.name in config_class.__annotations__ else own"),
    Mutant("evaluate: a sum without weights", "evaluate.py",
           "test_runs.py::test_evaluation_scores_by_a_weighted_sum_and_names_all_of_it",
           'columns["score"] = weights @ source_scores',
           'columns["score"] = source_scores.sum(0)'),
    Mutant("evaluate: a KL of replies that are no samples", "evaluate.py",
           "test_runs.py::test_evaluation_at_temperature_0_has_no_kl",
           "float(np.mean(kl)) if config.temperature > 0 else None",
           "float(np.mean(kl))"),
    Mutant("chat: a model of single questions is shown a conversation", "chat.py", FORGETS,
           'config.history == "auto" and knows_single_turns(self.model.config)',
           "False"),
    Mutant("chat: says each time that it forgets", "chat.py", FORGETS,
           "                    said = True\n",
           ""),
    Mutant("sft: a conversation that was trained on is not noted", "sft.py",
           "test_runs.py::test_sft_notes_conversations_and_leaves_open_what_models_of_others_have_seen",
           'any(message["role"] == "assistant" for',
           'any(message["role"] == "nobody" for'),
    Mutant("sft: what others' models know is taken to be known", "sft.py",
           "test_runs.py::test_sft_notes_conversations_and_leaves_open_what_models_of_others_have_seen",
           'if config.model != "scratch" and not knows_single_turns(model.config):',
           "if False:"),
    Mutant("report: forgets how long the demo took", "report.py",
           "test_runs.py::test_a_report_made_again_keeps_the_time_and_a_demos_curves_are_another_picture",
           'if not seconds and (demo / "summary.json").exists():',
           "if False:"),
    Mutant("checkpoint: no word of how to make the folder", "formats/model_folder.py",
           "test_checkpoint.py::test_a_folder_that_is_not_there_comes_with_the_command_that_makes_it",
           'f"{name}: no such checkpoint folder{how_to_make(folder)}"',
           'f"{name}: no such checkpoint folder"'),

    # -- a second device, shards in a GPU's precision
    Mutant("device: a pass waits for the copy of its positions", "model.py", NO_PASS_WAITS,
           "        at = at.to(ids.device, non_blocking=True)\n",
           "        at = at.to(ids.device)\n"),
    Mutant("device: the critic's passes ask the device where the mask is", "model.py", NO_PASS_WAITS,
           "    at = token_index(mask)  # (N,)\n    values",
           "    at = token_index(mask.to(ids.device, non_blocking=True)).cpu()\n    values"),
    Mutant("device: rotary wavelengths on the CPU", "model.py",
           "test_second_device.py::test_every_family_goes_through_ppo_and_its_numbers_are_those_of_the_cpu",
           "torch.arange(0, D, 2, device=positions.device)",
           "torch.arange(0, D, 2)"),
    Mutant("device: the numbers that draw tokens come from the CPU's generator", "plumbing/run.py",
           "test_second_device.py::test_a_run_goes_through_and_its_numbers_are_those_of_the_cpu",
           "return torch.Generator(self.device)",
           "return torch.Generator()"),
    Mutant("shards: norms round the residual stream", "model.py", ROUNDED,
           "wide = torch.promote_types(x.dtype, weight.dtype)",
           "wide = weight.dtype"),
    Mutant("shards: norms take weights in another precision", "model.py", ROUNDED,
           "return x.to(wide), weight.to(wide), bias",
           "return x, weight, bias"),
    Mutant("shards: gathered in float32 whatever the products are", "plumbing/ranks.py", ROUNDED,
           "products = None if self.dtype == torch.float32 else self.dtype",
           "products = None"),
    Mutant("shards: a PyTorch that adds up wrongly isn't refused", "plumbing/ranks.py",
           "faults/test_ranks.py::test_a_pytorch_whose_shards_add_up_wrongly_on_a_cpu_is_refused",
           'require(hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),',
           "require(FSDPModule,"),
]


# ---------------------------------------------------------------------------------------------------------

lock, running, stopping = threading.Lock(), set(), threading.Event()


def misfits():
    """What is wrong with the list: a replacement that doesn't fit its file or leaves no Python, a name that comes twice, a test that is gone."""
    names = [m.name for m in MUTANTS]
    for m in MUTANTS:
        source, (tests, _, test) = (ROOT / m.file).read_text("utf-8"), m.test.partition("::")
        if test and f"\ndef {test.split('[')[0]}(" not in (ROOT / "tests" / tests).read_text("utf-8"):
            yield f"{m.name}: there is no {m.test}"
        if source.count(m.old) != 1:
            yield f"{m.name}: its text occurs {source.count(m.old)} times in {m.file}, not once: {m.old!r}"
        elif names.count(m.name) > 1:
            yield f"{m.name}: the name of two"
        else:
            compile(source.replace(m.old, m.new), f"{m.file} with '{m.name}'", "exec")


def copy_repository(folder):
    """A copy of what the tests need in folder/repository, and a folder for their temporary files beside it."""
    (folder / "repository").mkdir(parents=True)
    (folder / "tmp").mkdir()
    rooms = {file.parent for file in ROOT.glob("*/__init__.py")}
    for path in sorted(rooms | {path for pattern in COPIED for path in ROOT.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, folder / "repository" / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / "repository")


def end(process):
    """End a pytest and what it started; gently at first, so that a torchrun takes its workers along."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            for _ in range(50):
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def pytest(folder, tests, limit):
    """Run tests of a copy up to the first that fails. Returns (exit code, that test, output); code None: ran past the limit."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp/pytest"]
    words += [f"tests/{test}" for test in tests]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TMPDIR": f"{folder}/tmp", "COLUMNS": "200",
                    "PYTHONDONTWRITEBYTECODE": "1"}  # of a file that changes twice in a second the bytecode of the first would be used
    with open(folder / "output", "w+", encoding="utf-8", errors="replace") as output:
        with lock:
            if stopping.is_set():
                raise KeyboardInterrupt
            process = subprocess.Popen(words, cwd=folder / "repository", env=environment, stdout=output, stderr=output, start_new_session=True)
            running.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            code = None
        running.discard(process)
        output.seek(0)
        text = output.read()
    found = re.search(r"^(?:FAILED|ERROR) tests/(.+?::.+?)(?: - .*)?$", text, re.M)
    return code, found[1] if found else None, text


def check(tests, copies):
    """None if tests pass without a mutant, else pytest's output."""
    folder = copies.get()
    try:
        code, _, text = pytest(folder, tests, SUITE_LIMIT)
    finally:
        copies.put(folder)
    return None if code == 0 else text


def attempt(m, copies):
    """(killed, by which test or why not, seconds) of a mutant."""
    folder, began = copies.get(), time.time()
    file = folder / "repository" / m.file
    source = file.read_text("utf-8")
    try:
        file.write_text(source.replace(m.old, m.new), "utf-8")
        code, by, text = pytest(folder, [m.test], LIMIT)
        named = code != 0
        if not named:
            code, by, text = pytest(folder, [""], SUITE_LIMIT)
        killed = code in (1, None)
        if code == 0:
            by = "survived the whole suite"
        elif code is None:
            by = "hangs"
        elif code != 1 or by is None:  # nothing failed, nothing could be run: the mutant is not what it is meant to be
            killed, by = False, f"pytest ended with exit code {code}:\n{text[-2000:]}"
        elif not named:  # this test has not been seen to pass without the mutant
            file.write_text(source, "utf-8")
            killed = pytest(folder, [by], SUITE_LIMIT)[0] == 0
            by += " (it names another)" if killed else " fails without it too"
    finally:
        file.write_text(source, "utf-8")
        copies.put(folder)
    return killed, by, time.time() - began


def run(mutants):
    """Exit code: 0 if every mutant is killed."""
    began, survivors = time.time(), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as top, ThreadPoolExecutor(2) as pool:
        try:
            copies = queue.Queue()
            for name in ("a", "b"):
                copy_repository(Path(top, name))
                copies.put(Path(top, name))
            tests = {}  # of each file, those named
            for m in mutants:
                tests.setdefault(m.test.split("::")[0], {})[m.test] = None
            for job in as_completed([pool.submit(check, named, copies) for named in tests.values()]):
                if job.result() is not None:
                    raise SystemExit(f"{job.result()}\nwithout a mutant a test fails: that it fails with one would mean nothing")
            print(f"without a mutant, the tests that are to kill them pass ({time.time() - began:.0f} s)", flush=True)
            jobs = {pool.submit(attempt, m, copies): m for m in mutants}
            for job in tqdm(as_completed(jobs), total=len(jobs), leave=False, disable=None):
                m, (killed, by, seconds) = jobs[job], job.result()
                survivors += [] if killed else [m]
                tqdm.write(f"{'killed' if killed else 'SURVIVED'} | {m.name} | {m.file} | {by} | {seconds:.1f} s")
                sys.stdout.flush()
        except BaseException:  # Ctrl-C too
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            with lock:
                for process in list(running):
                    end(process)
            raise
    for m in survivors:
        print(f"survivor: {m.name} ({m.file})")
    print(f"killed {len(mutants) - len(survivors)} of {len(mutants)} ({(time.time() - began) / 60:.1f} minutes)")
    return 1 if survivors else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant's name, or a part of several")
    parser.add_argument("--list", action="store_true", help="list them")
    args = parser.parse_args()
    problems = list(misfits())
    problems += [f"{name}: no such mutant; --list shows their names" for name in args.names if not any(name in m.name for m in MUTANTS)]
    chosen = [m for m in MUTANTS if not args.names or any(name in m.name for name in args.names)]
    if args.list:
        print("\n".join(f"{m.file:12} {m.name}" for m in chosen))
    if problems:
        sys.exit("\n".join(problems))
    if not args.list:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleans up as after Ctrl-C
        try:
            sys.exit(run(chosen))
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
