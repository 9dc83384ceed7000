"""Does the test suite notice? Small bugs, each of a kind that RLHF code has had, put one at a time into a copy of the repository.

A mutant is one replacement in one file. It is killed when a test fails that passes without it: the test that it names, or else any of
the whole suite. Two are tried at a time, each in a copy of its own; the repository itself is never touched.

    python tests/mutants.py            all of them: 13 minutes on 2 busy cores
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
COPIED = ("*.py", "*.md", "*.sh", "*.txt", "LICENSE", "bench", "docs", "tests")  # what the tests need
LIMIT, SUITE_LIMIT = 300, 1200  # seconds, after which a mutant hangs


class Mutant(NamedTuple):
    name: str
    file: str
    test: str  # that ought to kill it: a file of tests/, or one test in it
    old: str  # occurs once in the file
    new: str


TEMPLATE = "test_data.py::test_template_written_out_by_hand_masks_replies_and_their_end_tokens_only"
DIALOGUE = "test_data.py::test_a_dialogue_is_its_prompt_and_its_reply_end_to_end"
PAIRS = "test_data.py::test_ranked_pairs_equal_a_slow_loop_and_each_row_weighs_one"
ORDER = "test_data.py::test_endless_order_is_one_permutation_after_another_and_resumes"
BRUTE_FORCE = "test_model.py::test_forward_equals_brute_force_row_by_row"
GREEDY = "test_model.py::test_cached_batched_greedy_equals_each_row_alone_without_a_cache"
KNOWN = "test_model.py::test_ids_mask_lengths_and_ended_where_the_answer_is_known"
FREQUENCIES = "test_model.py::test_sample_frequencies_equal_the_truncated_softmax"
HEADS = "test_model.py::test_scores_and_values_equal_brute_force_row_by_row"
RESUME = "test_runs.py::test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit"
FORMULA = "test_runs.py::test_a_step_follows_the_formula_taken_one_reply_at_a_time"
NO_EXAMPLES = "test_runs.py::test_a_rank_that_gets_no_examples_adds_nothing"
EVALUATION = "test_runs.py::test_evaluation_equals_one_reply_at_a_time_and_counts_wins_against_the_first_model"
EACH_REPLY = "test_runs.py::test_ppo_trains_on_each_reply_once_an_epoch_and_logs_and_adapts_to_the_kl_of_whole_replies"
TOGETHER = "test_runs.py::test_two_ranks_of_ppo_take_the_step_of_one_that_has_all_their_replies"
OPTIMISER_STEP = "test_runs.py::test_an_optimizer_step_clips_the_norm_of_all_gradients_and_clears_them"
OPTIMUM = "test_optimum.py::test_what_the_bugs_are_given_suffices_without_one"
OPTIMUM_OF_KL = "test_optimum.py::test_of_the_kl_estimators_those_reach_it_whose_gradient_is_right[--kl k2 --kl-in loss --whiten none-True]"
LOSSES = "test_losses.py"
OBJECTIVE = "test_ppo.py::test_the_policy_follows_the_gradient_of_the_objective_written_out"
CRITIC = "test_ppo.py::test_the_critic_follows_the_gradient_of_the_value_loss_written_out"
ADVANTAGES = "test_ppo.py::test_advantages_are_whitened_over_the_rollout_and_then_clipped"
KL_TERM = "test_ppo.py::test_the_kl_term_stands_where_it_is_told_and_a_wrong_gradient_is_warned_of"
KL_LOSS = "test_ppo.py::test_gradient_of_each_kl_estimator_in_the_loss_by_enumeration"
POLICY_LOSSES = "test_ppo.py::test_policy_losses_equal_a_loop_over_tokens_whatever_padding_holds"
PPO_RESUME = "test_ppo.py::test_resuming_with_everything_that_has_a_state_equals_never_stopping_bit_for_bit"
PPO_RANKS = "test_ppo.py::test_two_ranks_agree_on_weights_averages_moments_and_when_to_stop"
WARMUP = "test_ppo.py::test_critic_warmup_trains_the_critic_alone_for_its_rollouts"
BETA = "test_ppo.py::test_beta_adapts_to_the_kl_of_each_rollout_and_is_used_in_the_next"
NORMALISED = "test_ppo.py::test_scores_are_scaled_or_standardised_by_the_moments_and_then_clipped"

MUTANTS = [
    # -- data.py: masks, pairs, splits, orders
    Mutant("template: end token out of the mask", "data.py", TEMPLATE,
           "mask += [answer] * len(content)",
           "mask += [answer] * (len(content) - 1) + [False]"),
    Mutant("template: no end token", "data.py", TEMPLATE,
           "return tokenizer.encode(text) + [tokenizer.eos]",
           "return tokenizer.encode(text)"),
    Mutant("template: the prompt's tokens in the loss", "data.py", TEMPLATE,
           "mask += [answer] * len(content)",
           "mask += [True] * len(content)"),
    Mutant("template: control tokens taken from the text", "data.py", TEMPLATE,
           "self.encoding.encode_ordinary(text)",
           "self.encoding.encode(text, allowed_special='all')"),
    Mutant("reply mask: one token early", "data.py", DIALOGUE,
           "[False] * len(prompt) + [True] * len(reply)",
           "[False] * (len(prompt) - 1) + [True] * len(reply) + [False]"),
    Mutant("reply mask: without its first token", "data.py", DIALOGUE,
           "[False] * len(prompt) + [True] * len(reply)",
           "[False] * (len(prompt) + 1) + [True] * (len(reply) - 1)"),
    Mutant("transcripts: chosen and rejected swapped", "data.py", "test_data.py::test_every_format_is_recognised_and_read_as_the_right_row",
           "replies, ranks = [chosen, rejected], [0, 1]",
           "replies, ranks = [chosen, rejected], [1, 0]"),
    Mutant("demonstrations: the worst of the ranked replies", "data.py", "test_data.py::test_every_format_is_recognised_and_read_as_the_right_row",
           "replies[min(range(len(ranks)), key=ranks.__getitem__)]",
           "replies[max(range(len(ranks)), key=ranks.__getitem__)]"),
    Mutant("pairs: ties count", "data.py", PAIRS,
           "for j, b in enumerate(row.ranks) if a < b]",
           "for j, b in enumerate(row.ranks) if a <= b and i != j]"),
    Mutant("pairs: the higher rank is better", "data.py", PAIRS,
           "for j, b in enumerate(row.ranks) if a < b]",
           "for j, b in enumerate(row.ranks) if a > b]"),
    Mutant("pairs: a row of more replies weighs more", "data.py", PAIRS,
           "start + j, 1 / len(found), row.margin",
           "start + j, 1.0, row.margin"),
    Mutant("pairs: ... or less, divided by its replies", "data.py", PAIRS,
           "start + j, 1 / len(found), row.margin",
           "start + j, 1 / len(row.ranks), row.margin"),
    Mutant("split: by row, not by prompt", "data.py", "test_data.py::test_split_keeps_a_prompt_on_one_side_whatever_the_order",
           "hashlib.sha256(row.text.encode(",
           "hashlib.sha256((row.text + row.replies[0]).encode("),
    Mutant("prompt order: the same in every epoch", "data.py", ORDER,
           "np.random.default_rng([seed, epoch]).permutation(n)[start % n:]",
           "np.random.default_rng([seed, 0]).permutation(n)[start % n:]"),
    Mutant("prompt order: a resumed run skips in every epoch", "data.py", ORDER,
           ".permutation(n)[start % n:])\n        start = 0\n",
           ".permutation(n)[start % n:])\n"),
    Mutant("batch order: a resumed run begins its epoch anew", "data.py", "test_data.py::test_endless_batches_resume_where_they_were",
           "start = max(0, start - len(batches))",
           "start = 0"),
    Mutant("padding on the left", "data.py", "test_data.py::test_collate_pads_on_the_right_with_mask_false",
           "padded[i, :len(row)] =",
           "padded[i, padded.shape[1] - len(row):] ="),

    # -- model.py: log-probabilities, heads, sampling
    Mutant("log-probabilities: of the token itself, not from its predecessor", "model.py", BRUTE_FORCE,
           "return states.flatten(0, 1)[index - 1]",
           "return states.flatten(0, 1)[index]"),
    Mutant("log-probabilities: times the temperature", "model.py", BRUTE_FORCE,
           "F.linear(states, weight).float() / temperature",
           "F.linear(states, weight).float() * temperature"),
    Mutant("log-probabilities: softmax in the logits' precision", "model.py", "test_model.py::test_bf16_states_and_weights_are_normalised_in_fp32",
           "F.linear(states, weight).float() / temperature",
           "F.linear(states, weight) / temperature"),
    Mutant("entropy: of the logits, not the log-probabilities", "model.py", BRUTE_FORCE,
           "return logprobs, normaliser - ((logits",
           "return logprobs, -((logits"),
    Mutant("attention: dropout outside training", "model.py", "test_model.py::test_generation_runs_without_dropout_and_restores_the_mode",
           "dropout = self.dropout if self.training else 0.0",
           "dropout = self.dropout"),
    Mutant("attention: sees the future", "model.py", BRUTE_FORCE,
           "is_causal=True",
           "is_causal=False"),
    Mutant("score: one token before the end", "model.py", HEADS,
           "per_position.gather(1, lengths[:, None] - 1)",
           "per_position.gather(1, lengths[:, None] - 2)"),
    Mutant("score: at the padded last position", "model.py", HEADS,
           "return per_position.gather(1, lengths[:, None] - 1).squeeze(1)",
           "return per_position[:, -1]"),
    Mutant("values: after the token", "model.py", HEADS,
           "unpack(states_before(per_position.unsqueeze(-1), index).squeeze(-1), mask, index)",
           "unpack(per_position.flatten()[index], mask, index)"),
    Mutant("reward model: shifted the wrong way", "model.py", "test_model.py::test_shift_lowers_every_score_by_the_amount",
           "self.transformer.ln_f.bias -= amount",
           "self.transformer.ln_f.bias += amount"),
    Mutant("reward model: shares its trunk with the language model", "model.py",
           "test_model.py::test_a_fresh_head_has_the_stated_spread_and_the_trunk_is_a_copy",
           "scalar.transformer.load_state_dict(model.transformer.state_dict(), strict=model.config.bias)",
           "scalar.transformer = model.transformer"),
    Mutant("sampling: times the temperature", "model.py", FREQUENCIES,
           "logits = logits / temperature\n",
           "logits = logits * temperature\n"),
    Mutant("sampling: top-p without the token that reaches it", "model.py", FREQUENCIES,
           "drop = ordered.cumsum(-1) - ordered >= top_p",
           "drop = ordered.cumsum(-1) > top_p"),
    Mutant("sampling: top-p with one token too many", "model.py", FREQUENCIES,
           "drop = ordered.cumsum(-1) - ordered >= top_p",
           "drop = ordered.cumsum(-1) - 2 * ordered >= top_p"),
    Mutant("generate: with dropout", "model.py", "test_model.py::test_generation_runs_without_dropout_and_restores_the_mode",
           "was_training = model.training\n    model.eval()\n",
           "was_training = model.training\n"),
    Mutant("generate: end token out of the mask", "model.py", KNOWN,
           "(slots < lengths[:, None])",
           "(slots < (lengths - ended.long())[:, None])"),
    Mutant("generate: the prompt's last token in the mask", "model.py", KNOWN,
           "slots >= prompt_lengths[:, None]",
           "slots >= prompt_lengths[:, None] - 1"),
    Mutant("generate: cache position one late", "model.py", GREEDY,
           "cache, at - 1, P + step + 1)",
           "cache, at, P + step + 2)"),
    Mutant("generate: a cached token can't see itself", "model.py", GREEDY,
           "self.slots[:upto] <= positions[:, None]",
           "self.slots[:upto] < positions[:, None]"),
    Mutant("generate: a row that has ended goes on", "model.py", GREEDY,
           "done = done | (token == tokenizer.eos)",
           "done = token == tokenizer.eos"),

    # -- sft.py
    Mutant("sft: prompts and padding in the mean", "sft.py", FORMULA + "[sft]",
           "sum(sum(train[i][1]) for i in batch)",
           "sum(len(train[i][1]) for i in batch)"),
    Mutant("sft: a mean for each micro-batch", "sft.py", FORMULA + "[sft]",
           "-logprobs.sum() * weight / tokens",
           "-logprobs.sum() * weight / mask.sum()"),
    Mutant("sft: an optimiser step for each micro-batch", "sft.py", FORMULA + "[sft]",
           "run.backward(piece_loss, optimizer)\n",
           "run.backward(piece_loss, optimizer), optimizer.step(), optimizer.zero_grad()\n"),
    Mutant("sft: held-out loss over padding too", "sft.py", "test_runs.py::test_the_held_out_loss_is_a_mean_over_reply_tokens",
           "mask.sum().to(run.device)]",
           "torch.tensor(mask.numel())]"),
    Mutant("sft: a rank without examples counts the first twice", "sft.py", NO_EXAMPLES + "[sft-lost0]",
           "-logprobs.sum() * weight / tokens",
           "-logprobs.sum() / tokens"),

    # -- reward.py
    Mutant("ranking loss: margin's sign", "reward.py", LOSSES,
           "F.logsigmoid(gap - margin)",
           "F.logsigmoid(gap + margin)"),
    Mutant("ranking loss: gap's sign", "reward.py", LOSSES,
           "gap = scores[better] - scores[worse]  # (P,)",
           "gap = scores[worse] - scores[better]  # (P,)"),
    Mutant("ranking loss: a mean over pairs", "reward.py", LOSSES,
           "return (weight * -F.logsigmoid(gap - margin)).sum()",
           "return -F.logsigmoid(gap - margin).mean()"),
    Mutant("ranking loss: log of a sigmoid that underflows", "reward.py", LOSSES,
           "weight * -F.logsigmoid(gap - margin)",
           "weight * -torch.sigmoid(gap - margin).log()"),
    Mutant("reward model: a mean for each micro-batch", "reward.py", FORMULA + "[reward]",
           "weight * share / len(batch), margin",
           "weight * share / len(piece), margin"),
    Mutant("reward model: a rank without examples counts the first twice", "reward.py", NO_EXAMPLES + "[reward-lost1]",
           "weight * share / len(batch), margin",
           "weight / len(batch), margin"),
    Mutant("reward model: demonstrations don't score 0", "reward.py", "test_runs.py::test_reward_model_scores_demonstrations_zero_on_average",
           "shifted.shift(float(scores.mean()))",
           "shifted.shift(-float(scores.mean()))"),
    Mutant("reward model: accuracy counts ties as right", "reward.py", LOSSES,
           "np.average((gap > 0) + 0.5 * (gap == 0), weights=weight)",
           "np.average(gap >= 0, weights=weight)"),

    # -- dpo.py
    Mutant("dpo: the reference's sign", "dpo.py", FORMULA + "[dpo]",
           "preference_loss(logprobs - reference_sums, better",
           "preference_loss(logprobs + reference_sums, better"),
    Mutant("dpo: no reference", "dpo.py", FORMULA + "[dpo]",
           "preference_loss(logprobs - reference_sums, better",
           "preference_loss(logprobs, better"),
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
    Mutant("dpo: the reference is the policy that a resumed run loads", "dpo.py", RESUME + "[dpo]",
           "copy.deepcopy(model).to(run.device).requires_grad_(False)",
           "model.to(run.device)"),
    Mutant("dpo: a rank without examples counts the first twice", "dpo.py", NO_EXAMPLES + "[dpo-lost2]",
           "weight = weight * share / len(batch)",
           "weight = weight / len(batch)"),
    Mutant("dpo: reference log-probabilities in another order", "dpo.py", FORMULA + "[dpo]",
           "sums[torch.tensor(piece).to(run.device, non_blocking=True)] = model",
           "sums[torch.tensor(sorted(piece)).to(run.device, non_blocking=True)] = model"),

    # -- ppo.py: scores
    Mutant("missing end token: the other replies are judged", "ppo.py",
           "test_ppo.py::test_a_missing_end_token_is_judged_by_its_rule_and_replies_that_ended_keep_their_score",
           "torch.where(ended, scores, cut_off)",
           "torch.where(ended, cut_off, scores)"),
    Mutant("missing end token: no penalty", "ppo.py",
           "test_ppo.py::test_a_missing_end_token_is_judged_by_its_rule_and_replies_that_ended_keep_their_score",
           '{"floor": lowest - penalty,',
           '{"floor": lowest,'),
    Mutant("missing end token: after normalisation", "ppo.py", "test_ppo.py::test_the_missing_end_token_is_judged_before_scores_are_normalised",
           "        judged = judge_missing_eos(scores, ended, config.missing_eos, config.missing_eos_penalty, run.all_min(scores.min()))\n"
           '        if config.reward_norm != "none":\n'
           "            moments = update_moments(moments, judged, run.all_sum)\n"
           "        judged = normalise_scores(judged, moments, config.reward_norm, config.reward_clip)\n",
           '        if config.reward_norm != "none":\n'
           "            moments = update_moments(moments, scores, run.all_sum)\n"
           "        judged = normalise_scores(scores, moments, config.reward_norm, config.reward_clip)\n"
           "        judged = judge_missing_eos(judged, ended, config.missing_eos, config.missing_eos_penalty, run.all_min(judged.min()))\n"),
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
           "moments = update_moments(moments, judged, run.all_sum)",
           "moments = update_moments(moments, judged)"),
    Mutant("running moments: without the shift of the mean", "ppo.py",
           "test_ppo.py::test_running_moments_are_those_of_the_whole_stream_however_it_is_cut",
           "old_squares + squares + shift**2 * seen * count / n",
           "old_squares + squares"),
    Mutant("rewards: weights forgotten", "ppo.py", "test_ppo.py::test_the_score_is_the_weighted_sum_of_reward_models_and_functions",
           "scores = weights @ parts",
           "scores = parts.sum(0)"),

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
           'kl_coef if config.kl_in == "reward" else 0.0',
           "kl_coef"),
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
           "            advantages = whiten(advantages, mask, run.all_sum, config.whiten)\n",
           "            advantages = whiten(advantages, mask, run.all_sum, config.whiten)\n            returns = advantages + old_values\n"),
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
           "whiten(advantages, mask, run.all_sum, config.whiten)",
           "whiten(advantages, mask, variance=config.whiten)"),
    Mutant("whiten: the sample's variance", "ppo.py", LOSSES,
           'count if variance == "population" else count - 1',
           "count - 1"),
    Mutant("advantages: clipped before they are whitened", "ppo.py", ADVANTAGES,
           '        if config.whiten != "none":\n'
           "            advantages = whiten(advantages, mask, run.all_sum, config.whiten)\n"
           "        if config.advantage_clip > 0:\n"
           "            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)\n",
           "        if config.advantage_clip > 0:\n"
           "            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)\n"
           '        if config.whiten != "none":\n'
           "            advantages = whiten(advantages, mask, run.all_sum, config.whiten)\n"),

    # -- ppo.py: log-probabilities
    Mutant("temperature: forgotten in sampling", "ppo.py", "test_runs.py::test_ppo_samples_at_its_temperature",
           "config.temperature, generator=generator)",
           "generator=generator)"),
    Mutant("temperature: forgotten in the old log-probabilities", "ppo.py", OBJECTIVE,
           "policy_model(part, part_mask, config.temperature, with_entropy=True)",
           "policy_model(part, part_mask, with_entropy=True)"),
    Mutant("temperature: forgotten in the reference's", "ppo.py", OBJECTIVE,
           "reference(part, part_mask, config.temperature)",
           "reference(part, part_mask)"),
    Mutant("temperature: forgotten in the new ones", "ppo.py", OBJECTIVE,
           "policy(part, host_mask[piece, :T], config.temperature, with_entropy",
           "policy(part, host_mask[piece, :T], with_entropy"),
    Mutant("old log-probabilities: from a half-precision pass, as a sampler's", "ppo.py", OBJECTIVE,
           "with torch.no_grad(), run.autocast():\n            for piece",
           "with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):\n            for piece"),
    Mutant("old log-probabilities: computed anew after every update", "ppo.py", OBJECTIVE,
           "policy_loss(logprobs, old, advantages[rows, :T]",
           "policy_loss(logprobs, logprobs.detach(), advantages[rows, :T]"),
    Mutant("reference: shares the policy's weights", "ppo.py", OPTIMUM,
           "reference = copy.deepcopy(policy_model).to(run.device).requires_grad_(False).eval()",
           "reference = policy_model.to(run.device)"),
    Mutant("dropout: on in the update", "ppo.py", OBJECTIVE,
           "    policy.eval(), critic.eval()  # no dropout",
           "    policy.train(), [setattr(m, 'dropout', 0.1) for m in policy.modules() if hasattr(m, 'dropout')]  # no dropout"),

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
           'objective + kl_coef * losses["kl_loss"]',
           'objective - kl_coef * losses["kl_loss"]'),
    Mutant("entropy bonus: its sign", "ppo.py", OBJECTIVE,
           "objective - config.entropy_coef * H.sum()",
           "objective + config.entropy_coef * H.sum()"),
    Mutant("value loss: held near the return", "ppo.py", LOSSES,
           "held = old_values + (values - old_values).clamp(-clip, clip)",
           "held = returns + (values - returns).clamp(-clip, clip)"),
    Mutant("value loss: the better of the two", "ppo.py", LOSSES,
           "losses = torch.maximum(losses, (held - returns).square())",
           "losses = torch.minimum(losses, (held - returns).square())"),
    Mutant("value loss: not on the step after the last token", "ppo.py", CRITIC,
           "returns[rows, :T], steps[rows, :T], config.value_clip",
           "returns[rows, :T], part_mask, config.value_clip"),
    Mutant("mean: prompts and padding in the count", "ppo.py", OBJECTIVE,
           "torch.stack([host_mask[picked].sum(), host_steps",
           "torch.stack([torch.tensor(host_mask[picked].numel()), host_steps"),
    Mutant("mean: of each micro-batch", "ppo.py", OBJECTIVE,
           "advantages[rows, :T], part_mask, config.clip, tokens,",
           "advantages[rows, :T], part_mask, config.clip, part_mask.sum(),"),
    Mutant("mean: ranks divide by their own tokens", "ppo.py", TOGETHER,
           "tokens, value_tokens = run.all_sum(torch.stack([host_mask[picked].sum(), host_steps[picked].sum()]).to(run.device))",
           "tokens, value_tokens = torch.stack([host_mask[picked].sum(), host_steps[picked].sum()]).to(run.device)"),

    # -- ppo.py: the update and its control
    Mutant("minibatches: the first one again and again", "ppo.py", EACH_REPLY,
           "batches = [shuffled[i::config.minibatches] for",
           "batches = [shuffled[::config.minibatches] for"),
    Mutant("ptx: a step of its own", "ppo.py", "test_ppo.py::test_ptx_adds_its_gradient_before_the_one_step_of_each_minibatch",
           "run.backward(ptx_loss, policy_optimizer)\n",
           "run.backward(ptx_loss, policy_optimizer), run.optimizer_step(policy_optimizer, lr, config.max_grad_norm)\n"),
    Mutant("ptx: its sign", "ppo.py", OBJECTIVE,
           "ptx_loss = -policy(part, part_mask)[0].sum()",
           "ptx_loss = policy(part, part_mask)[0].sum()"),
    Mutant("ptx: a rank without demonstrations counts the first twice", "ppo.py", NO_EXAMPLES + "[ppo-lost3]",
           "config.ptx_coef * weight / sum(",
           "config.ptx_coef / sum("),
    Mutant("ema: the wrong direction", "ppo.py", "test_ppo.py::test_the_average_is_the_recursion_over_every_step_of_the_policy",
           "list(policy_model.parameters()), 1 - config.ema)",
           "list(policy_model.parameters()), config.ema)"),
    Mutant("critic warm-up: trains the policy", "ppo.py", WARMUP,
           "train_policy = step >= config.critic_warmup",
           "train_policy = True"),
    Mutant("critic warm-up: one rollout too long", "ppo.py", WARMUP,
           "train_policy = step >= config.critic_warmup",
           "train_policy = step > config.critic_warmup"),
    Mutant("critic: the policy's learning rate", "ppo.py", "test_ppo.py::test_each_network_has_a_learning_rate_and_a_schedule_of_its_own",
           "run.optimizer_step(critic_optimizer, critic_lr,",
           "run.optimizer_step(critic_optimizer, lr,"),
    Mutant("adaptive KL: inverted", "ppo.py", LOSSES,
           "error = min(max(kl / target - 1, -0.2), 0.2)",
           "error = min(max(1 - kl / target, -0.2), 0.2)"),
    Mutant("adaptive KL: on the KL per token", "ppo.py", EACH_REPLY,
           'adapt_kl_coef(kl_coef, means["kl"], config.kl_target',
           'adapt_kl_coef(kl_coef, means["kl"] / means["length"], config.kl_target'),
    Mutant("adaptive KL: counts rollouts, not replies", "ppo.py", BETA,
           "config.kl_target, config.rollout_batch, config.kl_horizon)",
           "config.kl_target, 1, config.kl_horizon)"),
    Mutant("adaptive penalty: inverted", "ppo.py", "test_ppo.py::test_the_penalty_doubles_halves_or_stays",
           "(2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0)",
           "(0.5 if kl > 1.5 * target else 2.0 if kl < target / 1.5 else 1.0)"),
    Mutant("KL stop: leaves its gradient to the next rollout", "ppo.py",
           "test_ppo.py::test_after_a_stopped_update_the_next_rollout_starts_with_clean_gradients",
           "policy_optimizer.zero_grad(), critic_optimizer.zero_grad()\n",
           "pass\n"),
    Mutant("metrics: KL per token", "ppo.py", EACH_REPLY,
           '"kl": log_ratio.sum(1).mean()',
           '"kl": log_ratio[mask].mean()'),
    Mutant("ranks: the same prompts", "ppo.py", TOGETHER,
           "for _ in range(config.rollout_batch)][run.rank::run.world_size]",
           "for _ in range(config.rollout_batch)][:share]"),
    Mutant("resume: forgets beta", "ppo.py", PPO_RESUME,
           '{"kl_coef": kl_coef, "penalty_coef": penalty_coef, "moments"',
           '{"penalty_coef": penalty_coef, "moments"'),
    Mutant("resume: forgets the penalty", "ppo.py", PPO_RESUME,
           '{"kl_coef": kl_coef, "penalty_coef": penalty_coef, "moments"',
           '{"kl_coef": kl_coef, "moments"'),
    Mutant("resume: forgets the running moments", "ppo.py", PPO_RESUME,
           '"penalty_coef": penalty_coef, "moments": moments}',
           '"penalty_coef": penalty_coef}'),
    Mutant("resume: from the first prompt", "ppo.py", PPO_RESUME,
           "endless_order(len(prompts), config.seed, first * config.rollout_batch)",
           "endless_order(len(prompts), config.seed)"),

    # -- evaluate.py, toy.py
    Mutant("evaluate: the KL's direction", "evaluate.py", EVALUATION,
           "(model(ids, part_mask, temperature)[0] - reference(ids, part_mask, temperature)[0])",
           "(reference(ids, part_mask, temperature)[0] - model(ids, part_mask, temperature)[0])"),
    Mutant("evaluate: the KL at temperature 1", "evaluate.py", EVALUATION,
           "temperature = config.temperature or 1.0",
           "temperature = 1.0"),
    Mutant("evaluate: wins and losses swapped", "evaluate.py", EVALUATION,
           'return {"wins": wins, "ties": ties, "losses": losses,',
           'return {"wins": losses, "ties": ties, "losses": wins,'),
    Mutant("evaluate: each model against the one before", "evaluate.py", EVALUATION,
           "        if not results:  # the first model is the one to beat\n            baseline = judged\n        result =",
           "        if not results:\n            baseline = judged\n        previous, baseline = baseline, judged\n        result ="),
    Mutant("judge: the best mark counts", "toy.py", "test_data.py::test_judge_on_replies_of_every_sort",
           "return min(judge(item, reply, ended))",
           "return max(judge(item, reply, ended))"),
    Mutant("annotator: ranks the wrong way round", "toy.py", "test_data.py::test_preferences_rank_by_gold_but_for_the_noise",
           "[-s for s in seen]",
           "[s for s in seen]"),
    Mutant("annotator: half as wrong as stated", "toy.py", "test_data.py::test_preferences_rank_by_gold_but_for_the_noise",
           "rng.random() < 2 * noise",
           "rng.random() < noise"),
    Mutant("world: held-out wordings are trained on", "toy.py", "test_data.py::test_world_splits_by_wording_and_repeats_by_seed",
           'self.texts["heldout" if i in away else "train"].append(text)',
           'self.texts["train"].append(text), self.texts["heldout"].append(text) if i in away else None'),

    # -- runtime.py: steps, ranks, resuming
    Mutant("ranks: the factor that DDP's average takes away", "runtime.py", TOGETHER,
           "scale(loss * self.world_size)",
           "scale(loss)"),
    Mutant("ranks: gradients exchanged at the first micro-batch", "runtime.py", TOGETHER,
           "module.require_backward_grad_sync = i == len(pieces) - 1",
           "module.require_backward_grad_sync = i == 0"),
    Mutant("ranks: draw the same noise", "runtime.py", "test_runs.py::test_every_step_and_rank_draws_from_a_seed_of_its_own",
           "* 1_009 + self.rank",
           "* 1_009"),
    Mutant("step: gradients aren't cleared", "runtime.py", OPTIMISER_STEP,
           "        optimizer.zero_grad(set_to_none=True)\n",
           ""),
    Mutant("step: gradients aren't clipped", "runtime.py", OPTIMISER_STEP,
           'for p in g["params"]], max_grad_norm)',
           'for p in g["params"]], math.inf)'),
    Mutant("learning rate: the first step has none", "runtime.py", "test_ppo.py::test_learning_rates_warm_up_and_follow_their_schedule",
           "return peak * (step + 1) / warmup",
           "return peak * step / warmup"),
    Mutant("weight decay: of embeddings and norms too", "runtime.py", "test_runs.py::test_weight_decay_is_of_matrices_but_not_of_embeddings",
           '(keep if p.ndim < 2 or name.endswith(("wte.weight", "wpe.weight")) else decay).append(p)',
           "decay.append(p)"),
    Mutant("resume: forgets the optimiser's state", "runtime.py", PPO_RESUME,
           'optimizer.load_state_dict({"state": saved,',
           'optimizer.load_state_dict({"state": {},'),
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
    for path in [path for pattern in COPIED for path in ROOT.glob(pattern)]:
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
