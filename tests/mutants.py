"""Does the test suite notice? Small bugs, each of a kind that RLHF code has had, put one at a time into a copy of the repository.

A mutant is one replacement in one file. It is killed when a test fails that passes without it: first the tests that ought to kill it,
and only if they all pass the whole suite. Two run at a time, each in a copy of its own; the repository itself is never touched.

    python tests/mutants.py            all of them: MINUTES on 2 cores
    python tests/mutants.py NAME...    these alone
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
    old: str  # occurs once in the file
    new: str
    tests: tuple  # of tests/, quickest first: these ought to kill it


def mutant(name, file, old, new, *tests):
    return Mutant(name, file, old, new, tests)


TEMPLATE = "test_data.py::test_template_written_out_by_hand_masks_replies_and_their_end_tokens_only"
DIALOGUE = "test_data.py::test_a_dialogue_is_its_prompt_and_its_reply_end_to_end"
PAIRS = "test_data.py::test_ranked_pairs_equal_a_slow_loop_and_each_row_weighs_one"
ORDER = "test_data.py::test_endless_order_is_one_permutation_after_another_and_resumes"
BRUTE_FORCE = "test_model.py::test_forward_equals_brute_force_row_by_row"
GREEDY = "test_model.py::test_cached_batched_greedy_equals_each_row_alone_without_a_cache"
KNOWN = "test_model.py::test_ids_mask_lengths_and_ended_where_the_answer_is_known"
FREQUENCIES = "test_model.py::test_sample_frequencies_equal_the_truncated_softmax"
HEADS = "test_model.py::test_scores_and_values_equal_brute_force_row_by_row"
MICRO_BATCHES = "test_runs.py::test_micro_batches_change_neither_loss_nor_gradient_nor_metrics"
TWO_RANKS = "test_runs.py::test_two_ranks_train_as_one_does"
RESUME = "test_runs.py::test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit"
ROW_BY_ROW = "test_runs.py::test_ppo_feeds_its_losses_what_one_row_at_a_time_gives"
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
    mutant("template: end token out of the mask", "data.py",
           "mask += [answer] * len(content)", "mask += [answer] * (len(content) - 1) + [False]", TEMPLATE),
    mutant("template: no end token", "data.py",
           "return tokenizer.encode(text) + [tokenizer.eos]", "return tokenizer.encode(text)", TEMPLATE),
    mutant("template: the prompt's tokens in the loss", "data.py",
           "mask += [answer] * len(content)", "mask += [True] * len(content)", TEMPLATE),
    mutant("template: control tokens taken from the text", "data.py",
           "self.encoding.encode_ordinary(text)", "self.encoding.encode(text, allowed_special='all')", TEMPLATE),
    mutant("reply mask: one token early", "data.py",
           "[False] * len(prompt) + [True] * len(reply)", "[False] * (len(prompt) - 1) + [True] * len(reply) + [False]", DIALOGUE),
    mutant("reply mask: without its first token", "data.py",
           "[False] * len(prompt) + [True] * len(reply)", "[False] * (len(prompt) + 1) + [True] * (len(reply) - 1)", DIALOGUE),
    mutant("transcripts: chosen and rejected swapped", "data.py",
           "replies, ranks = [chosen, rejected], [0, 1]", "replies, ranks = [chosen, rejected], [1, 0]",
           "test_data.py::test_every_format_is_recognised_and_read_as_the_right_row"),
    mutant("demonstrations: the worst of the ranked replies", "data.py",
           "replies[min(range(len(ranks)), key=ranks.__getitem__)]", "replies[max(range(len(ranks)), key=ranks.__getitem__)]",
           "test_data.py::test_every_format_is_recognised_and_read_as_the_right_row"),
    mutant("pairs: ties count", "data.py", "for j, b in enumerate(row.ranks) if a < b]", "for j, b in enumerate(row.ranks) if a <= b and i != j]", PAIRS),
    mutant("pairs: the higher rank is better", "data.py", "for j, b in enumerate(row.ranks) if a < b]", "for j, b in enumerate(row.ranks) if a > b]", PAIRS),
    mutant("pairs: a row of more replies weighs more", "data.py", "start + j, 1 / len(found), row.margin", "start + j, 1.0, row.margin", PAIRS),
    mutant("pairs: ... or less, divided by its replies", "data.py", "start + j, 1 / len(found), row.margin", "start + j, 1 / len(row.ranks), row.margin", PAIRS),
    mutant("split: by row, not by prompt", "data.py",
           "hashlib.sha256(row.text.encode(", "hashlib.sha256((row.text + row.replies[0]).encode(",
           "test_data.py::test_split_keeps_a_prompt_on_one_side_whatever_the_order"),
    mutant("prompt order: the same in every epoch", "data.py",
           "np.random.default_rng([seed, epoch]).permutation(n)[start % n:]", "np.random.default_rng([seed, 0]).permutation(n)[start % n:]", ORDER),
    mutant("prompt order: a resumed run skips in every epoch", "data.py",
           ".permutation(n)[start % n:])\n        start = 0\n", ".permutation(n)[start % n:])\n", ORDER),
    mutant("batch order: a resumed run begins its epoch anew", "data.py",
           "start = max(0, start - len(batches))", "start = 0", "test_data.py::test_endless_batches_resume_where_they_were"),
    mutant("padding on the left", "data.py",
           "padded[i, :len(row)] =", "padded[i, padded.shape[1] - len(row):] =", "test_data.py::test_collate_pads_on_the_right_with_mask_false"),

    # -- model.py: log-probabilities, heads, sampling
    mutant("log-probabilities: of the token itself, not from its predecessor", "model.py",
           "return states.flatten(0, 1)[index - 1]", "return states.flatten(0, 1)[index]", BRUTE_FORCE),
    mutant("log-probabilities: times the temperature", "model.py",
           "F.linear(states, weight).float() / temperature", "F.linear(states, weight).float() * temperature", BRUTE_FORCE),
    mutant("log-probabilities: softmax in the logits' precision", "model.py",
           "F.linear(states, weight).float() / temperature", "F.linear(states, weight) / temperature",
           "test_model.py::test_bf16_states_and_weights_are_normalised_in_fp32"),
    mutant("entropy: of the logits, not the log-probabilities", "model.py",
           "return logprobs, normaliser - ((logits", "return logprobs, -((logits", BRUTE_FORCE),
    mutant("attention: dropout outside training", "model.py",
           "dropout = self.dropout if self.training else 0.0", "dropout = self.dropout",
           "test_model.py::test_generation_runs_without_dropout_and_restores_the_mode"),
    mutant("attention: sees the future", "model.py", "is_causal=True", "is_causal=False", BRUTE_FORCE, GREEDY),
    mutant("score: one token before the end", "model.py", "per_position.gather(1, lengths[:, None] - 1)", "per_position.gather(1, lengths[:, None] - 2)", HEADS),
    mutant("score: at the padded last position", "model.py",
           "return per_position.gather(1, lengths[:, None] - 1).squeeze(1)", "return per_position[:, -1]", HEADS),
    mutant("values: after the token", "model.py",
           "unpack(states_before(per_position.unsqueeze(-1), index).squeeze(-1), mask, index)", "unpack(per_position.flatten()[index], mask, index)", HEADS),
    mutant("reward model: shifted the wrong way", "model.py", "self.transformer.ln_f.bias -= amount", "self.transformer.ln_f.bias += amount",
           "test_model.py::test_shift_lowers_every_score_by_the_amount"),
    mutant("reward model: shares its trunk with the language model", "model.py",
           "scalar.transformer.load_state_dict(model.transformer.state_dict(), strict=model.config.bias)", "scalar.transformer = model.transformer",
           "test_model.py::test_a_fresh_head_has_the_stated_spread_and_the_trunk_is_a_copy"),
    mutant("sampling: times the temperature", "model.py", "logits = logits / temperature\n", "logits = logits * temperature\n", FREQUENCIES),
    mutant("sampling: top-p without the token that reaches it", "model.py",
           "drop = ordered.cumsum(-1) - ordered >= top_p", "drop = ordered.cumsum(-1) > top_p", FREQUENCIES),
    mutant("sampling: top-p with one token too many", "model.py",
           "drop = ordered.cumsum(-1) - ordered >= top_p", "drop = ordered.cumsum(-1) - 2 * ordered >= top_p", FREQUENCIES),
    mutant("generate: with dropout", "model.py", "was_training = model.training\n    model.eval()\n", "was_training = model.training\n",
           "test_model.py::test_generation_runs_without_dropout_and_restores_the_mode"),
    mutant("generate: end token out of the mask", "model.py", "(slots < lengths[:, None])", "(slots < (lengths - ended.long())[:, None])", KNOWN),
    mutant("generate: the prompt's last token in the mask", "model.py", "slots >= prompt_lengths[:, None]", "slots >= prompt_lengths[:, None] - 1", KNOWN),
    mutant("generate: cache position one late", "model.py", "cache, at - 1, P + step + 1)", "cache, at, P + step + 2)", GREEDY),
    mutant("generate: a cached token can't see itself", "model.py", "self.slots[:upto] <= positions[:, None]", "self.slots[:upto] < positions[:, None]", GREEDY),
    mutant("generate: a row that has ended goes on", "model.py", "done = done | (token == tokenizer.eos)", "done = token == tokenizer.eos", GREEDY),

    # -- sft.py
    mutant("sft: prompts and padding in the mean", "sft.py",
           "sum(sum(train[i][1]) for i in batch)", "sum(len(train[i][1]) for i in batch)",
           "test_runs.py::test_the_first_losses_of_sft_reward_and_dpo_are_the_formulas_of_one_row_at_a_time"),
    mutant("sft: a mean for each micro-batch", "sft.py",
           "-logprobs.sum() * weight / tokens", "-logprobs.sum() * weight / mask.sum()", MICRO_BATCHES + "[sft]"),
    mutant("sft: an optimiser step for each micro-batch", "sft.py",
           "run.backward(piece_loss, optimizer)\n", "run.backward(piece_loss, optimizer), optimizer.step(), optimizer.zero_grad()\n", MICRO_BATCHES + "[sft]"),
    mutant("sft: held-out loss over padding too", "sft.py", "mask.sum().to(run.device)]", "torch.tensor(mask.numel())]", MICRO_BATCHES + "[sft]"),
    mutant("sft: a rank without examples counts the first twice", "sft.py", "-logprobs.sum() * weight / tokens", "-logprobs.sum() / tokens",
           "test_runs.py::test_a_rank_without_examples_adds_nothing"),

    # -- reward.py
    mutant("ranking loss: margin's sign", "reward.py", "F.logsigmoid(gap - margin)", "F.logsigmoid(gap + margin)", LOSSES),
    mutant("ranking loss: gap's sign", "reward.py", "gap = scores[better] - scores[worse]  # (P,)", "gap = scores[worse] - scores[better]  # (P,)", LOSSES),
    mutant("ranking loss: a mean over pairs", "reward.py", "return (weight * -F.logsigmoid(gap - margin)).sum()", "return -F.logsigmoid(gap - margin).mean()", LOSSES),
    mutant("ranking loss: log of a sigmoid that underflows", "reward.py", "weight * -F.logsigmoid(gap - margin)", "weight * -torch.sigmoid(gap - margin).log()", LOSSES),
    mutant("reward model: a mean for each micro-batch", "reward.py", "weight * share / len(batch), margin", "weight * share / len(piece), margin", MICRO_BATCHES + "[reward]"),
    mutant("reward model: demonstrations don't score 0", "reward.py", "shifted.shift(float(scores.mean()))", "shifted.shift(-float(scores.mean()))",
           "test_runs.py::test_reward_model_scores_demonstrations_zero_on_average"),
    mutant("reward model: accuracy counts ties as right", "reward.py",
           "np.average((gap > 0) + 0.5 * (gap == 0), weights=weight)", "np.average(gap >= 0, weights=weight)", LOSSES),

    # -- dpo.py
    mutant("dpo: the reference's sign", "dpo.py", "preference_loss(logprobs - reference_sums, better", "preference_loss(logprobs + reference_sums, better",
           "test_runs.py::test_the_first_losses_of_sft_reward_and_dpo_are_the_formulas_of_one_row_at_a_time"),
    mutant("dpo: no reference", "dpo.py", "preference_loss(logprobs - reference_sums, better", "preference_loss(logprobs, better",
           "test_runs.py::test_the_first_losses_of_sft_reward_and_dpo_are_the_formulas_of_one_row_at_a_time"),
    mutant("dpo: beta forgotten on one side", "dpo.py", "label_smoothing * F.logsigmoid(-h)", "label_smoothing * F.logsigmoid(-gap)", LOSSES),
    mutant("dpo: label smoothing of the wrong side", "dpo.py", "label_smoothing * F.logsigmoid(-h)", "label_smoothing * F.logsigmoid(h)", LOSSES),
    mutant("ipo: beta forgotten", "dpo.py", "(gap - 1 / (2 * beta)).square()", "(gap - 1 / 2).square()", LOSSES),
    mutant("dpo: a mean over tokens, of the policy alone", "dpo.py",
           "logprobs = policy(ids, mask)[0].sum(1)", "logprobs = policy(ids, mask)[0].sum(1) / mask.sum(1)",
           "test_runs.py::test_the_first_losses_of_sft_reward_and_dpo_are_the_formulas_of_one_row_at_a_time"),
    mutant("dpo: the reference is the policy that a resumed run loads", "dpo.py",
           "copy.deepcopy(model).to(run.device).requires_grad_(False)", "model.to(run.device)", RESUME + "[dpo]"),
    mutant("dpo: reference log-probabilities in another order", "dpo.py",
           "sums[torch.tensor(piece).to(run.device, non_blocking=True)] = model", "sums[torch.tensor(sorted(piece)).to(run.device, non_blocking=True)] = model",
           "test_runs.py::test_the_first_losses_of_sft_reward_and_dpo_are_the_formulas_of_one_row_at_a_time"),

    # -- ppo.py: scores
    mutant("missing end token: the other replies are judged", "ppo.py",
           "torch.where(ended, scores, cut_off)", "torch.where(ended, cut_off, scores)", "test_ppo.py::test_a_missing_end_token_is_judged_by_its_rule_and_replies_that_ended_keep_their_score"),
    mutant("missing end token: no penalty", "ppo.py",
           '{"floor": lowest - penalty,', '{"floor": lowest,', "test_ppo.py::test_a_missing_end_token_is_judged_by_its_rule_and_replies_that_ended_keep_their_score"),
    mutant("missing end token: after normalisation", "ppo.py",
           "        judged = judge_missing_eos(scores, ended, config.missing_eos, config.missing_eos_penalty, run.all_min(scores.min()))\n"
           '        if config.reward_norm != "none":\n'
           "            moments = update_moments(moments, judged, run.all_sum)\n"
           "        judged = normalise_scores(judged, moments, config.reward_norm, config.reward_clip)\n",
           '        if config.reward_norm != "none":\n'
           "            moments = update_moments(moments, scores, run.all_sum)\n"
           "        judged = normalise_scores(scores, moments, config.reward_norm, config.reward_clip)\n"
           "        judged = judge_missing_eos(judged, ended, config.missing_eos, config.missing_eos_penalty, run.all_min(judged.min()))\n",
           "test_ppo.py::test_the_missing_end_token_is_judged_before_scores_are_normalised"),
    mutant("missing end token: each rank has a lowest score of its own", "ppo.py", "run.all_min(scores.min())", "scores.min()", PPO_RANKS),
    mutant("reward norm: scale subtracts the mean too", "ppo.py", '(mean if kind == "standard" else 0.0)', "mean", NORMALISED),
    mutant("reward norm: clipped before it", "ppo.py",
           '    if kind != "none":\n        count, mean, squares = moments\n',
           '    scores = scores.clamp(-clip, clip) if clip > 0 else scores\n    if kind != "none":\n        count, mean, squares = moments\n', NORMALISED),
    mutant("reward norm: ranks with moments of their own", "ppo.py",
           "moments = update_moments(moments, judged, run.all_sum)", "moments = update_moments(moments, judged)", PPO_RANKS),
    mutant("running moments: without the shift of the mean", "ppo.py",
           "old_squares + squares + shift**2 * seen * count / n", "old_squares + squares", "test_ppo.py::test_running_moments_are_those_of_the_whole_stream_however_it_is_cut"),
    mutant("rewards: weights forgotten", "ppo.py", "scores = weights @ parts", "scores = parts.sum(0)", "test_ppo.py::test_the_score_is_the_weighted_sum_of_reward_models_and_functions"),

    # -- ppo.py: the KL term, where the score lands
    mutant("KL: the reward's sign", "ppo.py", "torch.where(steps, -kl_coef * kl, 0.0)", "torch.where(steps, kl_coef * kl, 0.0)", LOSSES),
    mutant("KL: the wrong direction", "ppo.py", "    log_ratio = logprobs - ref_logprobs\n", "    log_ratio = ref_logprobs - logprobs\n", LOSSES),
    mutant("k3: the ratio the wrong way round", "ppo.py", "torch.expm1(-log_ratio) + log_ratio\n", "torch.expm1(log_ratio) - log_ratio\n", LOSSES),
    mutant("k2: not halved", "ppo.py", "return log_ratio.square() / 2", "return log_ratio.square()", KL_LOSS),
    mutant("KL: in the reward and in the loss", "ppo.py", 'kl_coef if config.kl_in == "reward" else 0.0', "kl_coef", KL_TERM),
    mutant("KL: on padding too", "ppo.py", "rewards = torch.where(steps, -kl_coef * kl, 0.0)", "rewards = -kl_coef * kl", LOSSES),
    mutant("score: at the first token", "ppo.py", "last = (steps * torch.arange(1, T + 1, device=steps.device)).argmax(1)", "last = steps.long().argmax(1)", LOSSES),
    mutant("score: one token later", "ppo.py", "rewards.scatter_add(1, last[:, None],", "rewards.scatter_add(1, (last[:, None] + 1).clamp(max=T - 1),", LOSSES),
    mutant("score: at every token", "ppo.py",
           "return rewards.scatter_add(1, last[:, None], torch.where(steps.any(1), scores, 0.0)[:, None])", "return rewards + steps * scores[:, None]", LOSSES),
    mutant("score one later: one earlier", "ppo.py", "mask | F.pad(mask, (1, 0))[:, :-1]", "mask | F.pad(mask, (0, 1))[:, 1:]",
           "test_ppo.py::test_the_step_after_the_last_token_exists_where_the_row_has_room"),

    # -- ppo.py: advantages
    mutant("gae: no mask", "ppo.py",
           "next_advantage = torch.where(steps[:, t], delta + gamma * lam * next_advantage, 0.0)", "next_advantage = delta + gamma * lam * next_advantage", LOSSES),
    mutant("gae: bootstraps from padding", "ppo.py", "next_value = torch.where(steps[:, t], values[:, t], 0.0)", "next_value = values[:, t]", LOSSES),
    mutant("gae: gamma forgotten in the sum", "ppo.py", "delta + gamma * lam * next_advantage", "delta + lam * next_advantage", LOSSES),
    mutant("gae: the value's sign", "ppo.py", "gamma * next_value - values[:, t]", "gamma * next_value + values[:, t]", LOSSES),
    mutant("returns: from whitened advantages", "ppo.py",
           "            advantages = whiten(advantages, mask, run.all_sum, config.whiten)\n",
           "            advantages = whiten(advantages, mask, run.all_sum, config.whiten)\n            returns = advantages + old_values\n", ADVANTAGES),
    mutant("whiten: mean over padding", "ppo.py", "all_sum(torch.stack([x.sum(), mask.sum().to(x.dtype)]))", "all_sum(torch.stack([x.sum(), x.new_tensor(x.numel())]))", LOSSES),
    mutant("whiten: padding not zero", "ppo.py", "centred = torch.where(mask, x - mean, 0.0)", "centred = x - mean", LOSSES),
    mutant("whiten: ranks with means of their own", "ppo.py",
           "total, count = all_sum(torch.stack([x.sum(), mask.sum().to(x.dtype)]))", "total, count = torch.stack([x.sum(), mask.sum().to(x.dtype)])",
           "test_ppo.py::test_whitening_divides_by_the_variance_it_names_over_all_ranks"),
    mutant("whiten: the run forgets the other ranks", "ppo.py",
           "whiten(advantages, mask, run.all_sum, config.whiten)", "whiten(advantages, mask, variance=config.whiten)",
           "test_ppo.py::test_two_ranks_follow_the_gradient_of_their_replies_together"),
    mutant("whiten: the sample's variance", "ppo.py", 'count if variance == "population" else count - 1', "count - 1", LOSSES),
    mutant("advantages: clipped before they are whitened", "ppo.py",
           '        if config.whiten != "none":\n'
           "            advantages = whiten(advantages, mask, run.all_sum, config.whiten)\n"
           "        if config.advantage_clip > 0:\n"
           "            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)\n",
           "        if config.advantage_clip > 0:\n"
           "            advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)\n"
           '        if config.whiten != "none":\n'
           "            advantages = whiten(advantages, mask, run.all_sum, config.whiten)\n", ADVANTAGES),

    # -- ppo.py: log-probabilities
    mutant("temperature: forgotten in sampling", "ppo.py", "config.temperature, generator=generator)", "generator=generator)",
           "test_runs.py::test_ppo_feeds_its_losses_what_one_row_at_a_time_gives"),
    mutant("temperature: forgotten in the old log-probabilities", "ppo.py",
           "policy_model(part, part_mask, config.temperature, with_entropy=True)", "policy_model(part, part_mask, with_entropy=True)", OBJECTIVE),
    mutant("temperature: forgotten in the reference's", "ppo.py", "reference(part, part_mask, config.temperature)", "reference(part, part_mask)", OBJECTIVE),
    mutant("temperature: forgotten in the new ones", "ppo.py",
           "policy(part, host_mask[piece, :T], config.temperature, with_entropy", "policy(part, host_mask[piece, :T], with_entropy", OBJECTIVE),
    mutant("old log-probabilities: from a half-precision pass, as a sampler's", "ppo.py",
           "with torch.no_grad(), run.autocast():\n            for piece", "with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):\n            for piece", OBJECTIVE),
    mutant("old log-probabilities: computed anew after every update", "ppo.py",
           "policy_loss(logprobs, old, advantages[rows, :T]", "policy_loss(logprobs, logprobs.detach(), advantages[rows, :T]", OBJECTIVE),
    mutant("reference: shares the policy's weights", "ppo.py",
           "reference = copy.deepcopy(policy_model).to(run.device).requires_grad_(False).eval()", "reference = policy_model.to(run.device)", OBJECTIVE),
    mutant("dropout: on in the update", "ppo.py", "    policy.eval(), critic.eval()  # no dropout",
           "    policy.train(), [setattr(m, 'dropout', 0.1) for m in policy.modules() if hasattr(m, 'dropout')]  # no dropout", OBJECTIVE),

    # -- ppo.py: losses
    mutant("clip: the minimum of two losses", "ppo.py", "loss = torch.maximum(-advantages * ratio,", "loss = torch.minimum(-advantages * ratio,", LOSSES),
    mutant("clip: on one side", "ppo.py", "ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)", LOSSES),
    mutant("clip: the clipped ratio alone", "ppo.py",
           "loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))", "loss = -advantages * ratio.clamp(1 - clip, 1 + clip)", LOSSES),
    mutant("ratio: the wrong way round", "ppo.py", "log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20)\n",
           "log_ratio = torch.where(mask, old_logprobs - logprobs, 0.0).clamp(-20, 20)\n", LOSSES),
    mutant("dual clip: of good tokens", "ppo.py", "torch.where(advantages < 0, torch.minimum(loss", "torch.where(advantages > 0, torch.minimum(loss", POLICY_LOSSES),
    mutant("penalty: its sign", "ppo.py", "-advantages * ratio + penalty_coef * kl", "-advantages * ratio - penalty_coef * kl", POLICY_LOSSES),
    mutant("penalty: KL(new || old)", "ppo.py", "kl = torch.expm1(log_ratio) - log_ratio  #", "kl = torch.expm1(-log_ratio) + log_ratio  #", POLICY_LOSSES),
    mutant("policy loss: padding counts", "ppo.py", "return (loss * mask).sum() / tokens, {k:", "return loss.sum() / tokens, {k:", LOSSES),
    mutant("KL loss: without the ratio", "ppo.py", '"k2": ratio.detach(), "k3": ratio}', '"k2": 1.0, "k3": 1.0}', KL_LOSS),
    mutant("KL loss: k3's ratio is a constant", "ppo.py", '"k3": ratio}', '"k3": ratio.detach()}', KL_LOSS),
    mutant("KL loss: k2's ratio has a gradient", "ppo.py", '"k2": ratio.detach()', '"k2": ratio', KL_LOSS),
    mutant("KL loss: its sign", "ppo.py", 'objective + kl_coef * losses["kl_loss"]', 'objective - kl_coef * losses["kl_loss"]', OBJECTIVE),
    mutant("entropy bonus: its sign", "ppo.py", "objective - config.entropy_coef * H.sum()", "objective + config.entropy_coef * H.sum()", OBJECTIVE),
    mutant("value loss: held near the return", "ppo.py",
           "held = old_values + (values - old_values).clamp(-clip, clip)", "held = returns + (values - returns).clamp(-clip, clip)", LOSSES),
    mutant("value loss: the better of the two", "ppo.py", "losses = torch.maximum(losses, (held - returns).square())", "losses = torch.minimum(losses, (held - returns).square())", LOSSES),
    mutant("value loss: not on the step after the last token", "ppo.py", "returns[rows, :T], steps[rows, :T], config.value_clip", "returns[rows, :T], part_mask, config.value_clip", CRITIC),
    mutant("mean: prompts and padding in the count", "ppo.py", "torch.stack([host_mask[picked].sum(), host_steps", "torch.stack([torch.tensor(host_mask[picked].numel()), host_steps", OBJECTIVE),
    mutant("mean: of each micro-batch", "ppo.py", "advantages[rows, :T], part_mask, config.clip, tokens,", "advantages[rows, :T], part_mask, config.clip, part_mask.sum(),", OBJECTIVE),
    mutant("mean: ranks divide by their own tokens", "ppo.py",
           "tokens, value_tokens = run.all_sum(torch.stack([host_mask[picked].sum(), host_steps[picked].sum()]).to(run.device))",
           "tokens, value_tokens = torch.stack([host_mask[picked].sum(), host_steps[picked].sum()]).to(run.device)",
           "test_ppo.py::test_two_ranks_follow_the_gradient_of_their_replies_together"),

    # -- ppo.py: the update and its control
    mutant("minibatches: the first one again and again", "ppo.py",
           "batches = [shuffled[i::config.minibatches] for", "batches = [shuffled[::config.minibatches] for", OBJECTIVE, "test_ppo.py"),
    mutant("ptx: a step of its own", "ppo.py", "run.backward(ptx_loss, policy_optimizer)\n",
           "run.backward(ptx_loss, policy_optimizer), run.optimizer_step(policy_optimizer, lr, config.max_grad_norm)\n",
           "test_ppo.py::test_ptx_adds_its_gradient_before_the_one_step_of_each_minibatch"),
    mutant("ptx: its sign", "ppo.py", "ptx_loss = -policy(part, part_mask)[0].sum()", "ptx_loss = policy(part, part_mask)[0].sum()", OBJECTIVE),
    mutant("ema: the wrong direction", "ppo.py", "list(policy_model.parameters()), 1 - config.ema)", "list(policy_model.parameters()), config.ema)",
           "test_ppo.py::test_the_average_is_the_recursion_over_every_step_of_the_policy"),
    mutant("critic warm-up: trains the policy", "ppo.py", "train_policy = step >= config.critic_warmup", "train_policy = True", WARMUP),
    mutant("critic warm-up: one rollout too long", "ppo.py", "train_policy = step >= config.critic_warmup", "train_policy = step > config.critic_warmup", WARMUP),
    mutant("critic: the policy's learning rate", "ppo.py", "run.optimizer_step(critic_optimizer, critic_lr,", "run.optimizer_step(critic_optimizer, lr,",
           "test_ppo.py::test_each_network_has_a_learning_rate_and_a_schedule_of_its_own"),
    mutant("adaptive KL: inverted", "ppo.py", "error = min(max(kl / target - 1, -0.2), 0.2)", "error = min(max(1 - kl / target, -0.2), 0.2)", LOSSES),
    mutant("adaptive KL: on the KL per token", "ppo.py", 'adapt_kl_coef(kl_coef, means["kl"], config.kl_target', 'adapt_kl_coef(kl_coef, means["kl"] / means["length"], config.kl_target', BETA),
    mutant("adaptive KL: counts rollouts, not replies", "ppo.py", "config.kl_target, config.rollout_batch, config.kl_horizon)", "config.kl_target, 1, config.kl_horizon)", BETA),
    mutant("adaptive penalty: inverted", "ppo.py", "(2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0)",
           "(0.5 if kl > 1.5 * target else 2.0 if kl < target / 1.5 else 1.0)", "test_ppo.py::test_the_penalty_doubles_halves_or_stays"),
    mutant("KL stop: leaves its gradient to the next rollout", "ppo.py", "policy_optimizer.zero_grad(), critic_optimizer.zero_grad()\n", "pass\n",
           "test_ppo.py::test_after_a_stopped_update_the_next_rollout_starts_with_clean_gradients"),
    mutant("metrics: KL per token", "ppo.py", '"kl": log_ratio.sum(1).mean()', '"kl": log_ratio[mask].mean()', "test_ppo.py::test_the_kl_is_logged_in_nats_per_reply", "test_ppo.py"),
    mutant("ranks: the same prompts", "ppo.py", "for _ in range(config.rollout_batch)][run.rank::run.world_size]", "for _ in range(config.rollout_batch)][:share]",
           "test_ppo.py::test_two_ranks_follow_the_gradient_of_their_replies_together"),
    mutant("resume: forgets beta", "ppo.py", '{"kl_coef": kl_coef, "penalty_coef": penalty_coef, "moments"', '{"penalty_coef": penalty_coef, "moments"', PPO_RESUME),
    mutant("resume: forgets the penalty", "ppo.py", '{"kl_coef": kl_coef, "penalty_coef": penalty_coef, "moments"', '{"kl_coef": kl_coef, "moments"', PPO_RESUME),
    mutant("resume: forgets the running moments", "ppo.py", '"penalty_coef": penalty_coef, "moments": moments}', '"penalty_coef": penalty_coef}', PPO_RESUME),
    mutant("resume: from the first prompt", "ppo.py", "endless_order(len(prompts), config.seed, first * config.rollout_batch)", "endless_order(len(prompts), config.seed)", PPO_RESUME),

    # -- evaluate.py, toy.py
    mutant("evaluate: the KL's direction", "evaluate.py",
           "(model(ids, part_mask, temperature)[0] - reference(ids, part_mask, temperature)[0])", "(reference(ids, part_mask, temperature)[0] - model(ids, part_mask, temperature)[0])",
           "test_runs.py::test_evaluation_equals_one_reply_at_a_time"),
    mutant("evaluate: the KL at temperature 1", "evaluate.py", "temperature = config.temperature or 1.0", "temperature = 1.0", "test_runs.py::test_evaluation_equals_one_reply_at_a_time"),
    mutant("evaluate: wins and losses swapped", "evaluate.py",
           'return {"wins": wins, "ties": ties, "losses": losses,', 'return {"wins": losses, "ties": ties, "losses": wins,', LOSSES),
    mutant("evaluate: each model against the one before", "evaluate.py",
           "        if not results:  # the first model is the one to beat\n            baseline = judged\n        result =",
           "        if not results:\n            baseline = judged\n        previous, baseline = baseline, judged\n        result =", "test_runs.py::test_wins_are_counted_against_the_first_model"),
    mutant("judge: the best mark counts", "toy.py", "return min(judge(item, reply, ended))", "return max(judge(item, reply, ended))", "test_data.py::test_judge_on_replies_of_every_sort"),
    mutant("annotator: ranks the wrong way round", "toy.py", "[-s for s in seen]", "[s for s in seen]", "test_data.py::test_preferences_rank_by_gold_but_for_the_noise"),
    mutant("annotator: half as wrong as stated", "toy.py", "rng.random() < 2 * noise", "rng.random() < noise", "test_data.py::test_preferences_rank_by_gold_but_for_the_noise"),
    mutant("world: held-out wordings are trained on", "toy.py", 'self.texts["heldout" if i in away else "train"].append(text)',
           'self.texts["train"].append(text), self.texts["heldout"].append(text) if i in away else None', "test_data.py::test_world_splits_by_wording_and_repeats_by_seed"),

    # -- runtime.py: steps, ranks, resuming
    mutant("ranks: the factor that DDP's average takes away", "runtime.py", "scale(loss * self.world_size)", "scale(loss)", TWO_RANKS + "[sft]"),
    mutant("ranks: gradients exchanged at the first micro-batch", "runtime.py",
           "module.require_backward_grad_sync = i == len(pieces) - 1", "module.require_backward_grad_sync = i == 0", TWO_RANKS + "[sft]"),
    mutant("ranks: draw the same noise", "runtime.py", "* 1_009 + self.rank", "* 1_009", "test_runs.py::test_every_step_and_rank_draws_from_a_seed_of_its_own"),
    mutant("step: gradients aren't cleared", "runtime.py", "        optimizer.zero_grad(set_to_none=True)\n", "",
           "test_runs.py::test_an_optimizer_step_clips_the_norm_of_all_gradients_and_clears_them"),
    mutant("step: gradients aren't clipped", "runtime.py", 'for p in g["params"]], max_grad_norm)', 'for p in g["params"]], math.inf)',
           "test_runs.py::test_an_optimizer_step_clips_the_norm_of_all_gradients_and_clears_them"),
    mutant("learning rate: the first step has none", "runtime.py", "return peak * (step + 1) / warmup", "return peak * step / warmup",
           "test_ppo.py::test_learning_rates_warm_up_and_follow_their_schedule"),
    mutant("weight decay: of embeddings and norms too", "runtime.py",
           '(keep if p.ndim < 2 or name.endswith(("wte.weight", "wpe.weight")) else decay).append(p)', "decay.append(p)",
           "test_runs.py::test_weight_decay_is_of_matrices_alone"),
    mutant("resume: forgets the optimiser's state", "runtime.py", 'optimizer.load_state_dict({"state": saved,', 'optimizer.load_state_dict({"state": {},', PPO_RESUME, RESUME + "[sft]"),
]


# ---------------------------------------------------------------------------------------------------------

lock, running, stopping = threading.Lock(), set(), threading.Event()


def misfits():
    """What is wrong with the list: a replacement that doesn't fit its file, or no Python after it, or a name that comes twice."""
    for m in MUTANTS:
        source = (ROOT / m.file).read_text("utf-8")
        if source.count(m.old) != 1:
            yield f"{m.name}: its text occurs {source.count(m.old)} times in {m.file}, not once: {m.old!r}"
        else:
            compile(source.replace(m.old, m.new), f"{m.file} with '{m.name}'", "exec")
        if sum(other.name == m.name for other in MUTANTS) > 1:
            yield f"{m.name}: two have this name"


def copy_repository(folder):
    """A copy of what the tests need in folder/repository, and a folder for temporary files beside it."""
    (folder / "repository").mkdir(parents=True)
    (folder / "tmp").mkdir()
    for path in sorted(path for pattern in COPIED for path in ROOT.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, folder / "repository" / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / "repository")


def end(process):
    """End a pytest and what it started; at first gently, as torchrun then takes its workers along."""
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
    """Run tests in a copy up to the first that fails. Returns (exit code, that test, output); code None: ran past the limit."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp' / 'pytest'}", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TMPDIR": str(folder / "tmp"), "COLUMNS": "200",
                                "PYTHONDONTWRITEBYTECODE": "1"}  # a file that changes twice in a second would be taken for the one compiled before
    environment = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    with open(folder / "output", "w+", encoding="utf-8", errors="replace") as output:
        with lock:
            if stopping.is_set():
                raise KeyboardInterrupt
            process = subprocess.Popen(words, cwd=folder / "repository", env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            running.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            code = None
        running.discard(process)
        output.seek(0)
        text = output.read()
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+::\S+)", text, re.M)
    return code, found[1] if found else None, text


def located(tests):
    return [f"tests/{test}" for test in tests]


def passes(tests, copies):
    """None if the tests pass without a mutant, else the output."""
    folder = copies.get()
    try:
        code, _, text = pytest(folder, located(tests), SUITE_LIMIT)
    finally:
        copies.put(folder)
    return None if code == 0 else text


def attempt(m, copies):
    """(killed, by which test or why not, seconds) of a mutant in one of the copies."""
    folder, began = copies.get(), time.time()
    file = folder / "repository" / m.file
    source = file.read_text("utf-8")
    try:
        file.write_text(source.replace(m.old, m.new), "utf-8")
        code, test, text = pytest(folder, located(m.tests), LIMIT)
        expected = code != 0
        if code == 0:
            code, test, text = pytest(folder, ["tests"], SUITE_LIMIT)
        file.write_text(source, "utf-8")
        if code is None:
            killed, by = True, "hangs"
        elif code == 0:
            killed, by = False, "survived the whole suite"
        elif code != 1 or test is None:  # no failed test, but none that could be run: the mutant, or the name of a test, is not as intended
            killed, by = False, f"pytest ended with exit code {code}:\n{text[-2000:]}"
        elif expected:
            killed, by = True, test
        else:
            killed = pytest(folder, located([test]), LIMIT)[0] == 0
            by = f"{test}, which its list of tests lacks" if killed else f"{test} fails without it too"
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
            by_file = {}
            for test in dict.fromkeys(test for m in mutants for test in m.tests):
                by_file.setdefault(test.split("::")[0], []).append(test)
            for failure in pool.map(lambda tests: passes(tests, copies), by_file.values()):
                if failure is not None:
                    print(failure)
                    print("tests fail without a mutant: no failure could mean anything")
                    return 1
            print(f"without a mutant the tests named below pass ({time.time() - began:.0f} s)")
            jobs = {pool.submit(attempt, m, copies): m for m in mutants}
            for job in tqdm(as_completed(jobs), total=len(jobs), disable=None, leave=False):
                m, (killed, by, seconds) = jobs[job], job.result()
                survivors += [] if killed else [m]
                tqdm.write(f"{'killed  ' if killed else 'SURVIVED'}  {m.name}  |  {m.file}  |  {by}  |  {seconds:.1f} s")
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
    print(f"killed {len(mutants) - len(survivors)} of {len(mutants)} in {(time.time() - began) / 60:.1f} minutes")
    return 1 if survivors else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants; all by default")
    parser.add_argument("--list", action="store_true", help="list them")
    args = parser.parse_args()
    problems = list(misfits())
    unknown = set(args.names) - {m.name for m in MUTANTS}
    problems += [f"{name}: no such mutant; --list shows their names" for name in sorted(unknown)]
    if args.list:
        for m in MUTANTS:
            print(f"{m.file:12} {m.name}")
    if problems:
        sys.exit("\n".join(problems))
    if not args.list:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # through the same cleaning up as Ctrl-C
        try:
            sys.exit(run([m for m in MUTANTS if not args.names or m.name in args.names]))
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
