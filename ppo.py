"""PPO on a reward model: raise the score of sampled replies without leaving the reference policy too far behind.

    maximise  E_{x, y ~ pi}[ s(x, y) - beta * log(pi(y|x) / ref(y|x)) ]          (InstructGPT, eq. 2 without the ptx term)

Four models: policy (trained, from SFT), reference (the same weights, frozen), reward model (frozen), critic (trained,
from the reward model). One step of the script:

    1. rollout     sample a reply to each prompt, at the temperature that all log-probabilities are taken at
    2. score       reward model; log-probabilities of policy and reference; values of the critic
    3. rewards     r_t = -beta * kl_t, plus the score at the last token
    4. advantages  generalised advantage estimation, whitened over the batch
    5. update      some epochs of clipped policy and value losses on minibatches
    6. KL control, log, save

Token t of the response is action t; everything below is aligned with tokens, (B, T), zero outside the response:

    prompt | a    b    c  <eos>         logprobs[t] = log pi(token t | tokens before t)
           | r    r    r  r + score     values[t]   = V(tokens before t)

The estimators of the KL divergence, with lr = log pi(a) - log ref(a) for a drawn from pi (Schulman 2020):
    k1 = lr            unbiased; in the reward its policy gradient is the gradient of KL(pi || ref). The default.
    k2 = lr^2 / 2      biased as a value, and in the reward its gradient is biased too.
    k3 = e^-lr - 1 + lr  unbiased with less variance, hence the number to log; but in the reward its policy gradient is
                       grad KL(pi || ref) - grad KL(ref || pi), which vanishes near ref and pushes rare tokens further
                       down: nothing holds the policy. Both are there to be compared, with a warning.
Left out: PPO-ptx, reward and advantage clipping, a KL term in the loss, a trunk shared by policy and critic.
What differs from others: TRL puts the score one token later when a reply is shorter than the longest, averages
micro-batches of unequal length, and shares one optimiser between policy and critic.

    python ppo.py --model runs/sft --reward runs/reward --out runs/ppo      the toy task: gold score 0.1 to 0.9 in 1.5 minutes on 2 cores
    torchrun --nproc_per_node 8 ppo.py --data prompts.jsonl --model sft --reward rm --rollout-batch 512

Legend: B replies on this rank, T tokens, V vocabulary.
"""
import copy
import time
from dataclasses import dataclass
from typing import Literal

import torch

import toy
from data import by_length, describe, drop_long, encode_prompt, endless_order, read_rows
from model import GPT, ScalarModel, generate, last_scores, load_model, open_model, save_model, values_before
from runtime import (Count, Fraction, NonNegative, Positive, Run, RunConfig, adamw, cosine_lr, require,
                     run_script)


@dataclass
class Config(RunConfig):
    data: str = "toy"  # toy, or a .json, .jsonl or .jsonl.gz file whose prompts are used
    model: str = "runs/sft"  # checkpoint folder of the policy to start from, which is also the reference; or scratch
    reward: str = "runs/reward"  # checkpoint folder of the reward model
    out: str = "runs/ppo"  # folder for the checkpoint and metrics.jsonl
    steps: Count = 80  # rollouts, each followed by an update
    rollout_batch: Count = 256  # prompts per rollout over all ranks
    max_new_tokens: Count = 40  # longest reply, tokens
    temperature: Positive = 1.0  # of sampling; all log-probabilities are taken at it
    epochs: Count = 2  # passes over each rollout
    minibatches: Count = 4  # optimiser steps per pass
    micro_batch_tokens: Count = 8192  # tokens per forward pass on one rank, at most; lower it when memory is short
    lr: Positive = 1e-3  # peak learning rate of the policy; falls to a tenth on a cosine
    critic_lr: Positive = 1e-3  # peak learning rate of the critic, same schedule
    warmup: Count = 5  # rollouts of linear warm-up
    max_grad_norm: Positive = 1.0  # gradients of policy and of critic are scaled down to this norm
    gamma: Fraction = 1.0  # discount per token
    lam: Fraction = 0.95  # GAE's lambda: 0 trusts the critic, 1 the sampled return
    clip: Positive = 0.2  # the probability ratio counts within 1 - clip and 1 + clip
    value_clip: Positive = 2.0  # values count within this distance of the old ones, in units of the score
    entropy_coef: NonNegative = 0.0  # weight of the entropy bonus, per nat
    whiten: bool = True  # advantages to mean 0 and variance 1 over the whole rollout
    kl: Literal["k1", "k2", "k3"] = "k1"  # estimator of the KL term in the reward
    kl_coef: NonNegative = 0.1  # beta, score per nat
    kl_target: NonNegative = 0.0  # adapt beta so that the KL per reply (nats) stays near this; 0 keeps beta
    kl_horizon: Positive = 10000.0  # replies over which beta may change by a fifth (Ziegler et al. 2019)
    missing_eos_penalty: NonNegative = 1.0  # a reply cut off before its end token gets the rollout's lowest score less this
    sample_every: Count = 20  # rollouts between printed samples


RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}  # largest |log ratio| that rounding explains


def kl_estimate(logprobs, ref_logprobs, kind):
    """Per-token estimate of KL(pi || ref) from tokens drawn from pi, in nats: kind k1, k2 or k3, any shape."""
    log_ratio = logprobs - ref_logprobs
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return torch.expm1(-log_ratio) + log_ratio


def shaped_rewards(scores, kl, mask, kl_coef):
    """r_t = -kl_coef * kl_t on the response, plus the score at its last token (the end token, if there is one).

    scores (B,), kl (B, T), mask (B, T) -> (B, T), zero outside the mask. A row with an empty mask gets nothing.
    """
    T = mask.shape[1]
    last = (mask * torch.arange(1, T + 1, device=mask.device)).argmax(1)  # (B,)
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    return rewards.scatter_add(1, last[:, None], torch.where(mask.any(1), scores, 0.0)[:, None])


def gae(rewards, values, mask, gamma, lam):
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, values, mask (B, T); the response is one run of True. The value after the last token is 0, for replies
    that were cut off too. delta_t = r_t + gamma V_t+1 - V_t;  A_t = delta_t + gamma lam A_t+1;  return = A + V.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = next_advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x, mask, all_sum=lambda t: t):
    """Shift and scale x (B, T) to mean 0 and population variance 1 over the mask of all ranks; zero elsewhere."""
    x = torch.where(mask, x, 0.0)
    total, count = all_sum(torch.stack([x.sum(), mask.sum().to(x.dtype)]))
    mean = total / count.clamp(min=1)
    centred = torch.where(mask, x - mean, 0.0)
    variance = all_sum(centred.square().sum()) / count.clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip, tokens):
    """Clipped surrogate (Schulman et al. 2017, eq. 7) as a sum over the mask divided by tokens.

    logprobs, old_logprobs, advantages, mask (B, T); tokens: response tokens of the whole minibatch. Returns (scalar,
    {clip_fraction, approx_kl}), each divided likewise; approx_kl is k3 of KL(old || new).
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20)
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    with torch.no_grad():
        clipped = (ratio - 1).abs() > clip
        stats = {"clip_fraction": clipped, "approx_kl": torch.expm1(log_ratio) - log_ratio}
    return (loss * mask).sum() / tokens, {k: (v * mask).sum() / tokens for k, v in stats.items()}


def value_loss(values, old_values, returns, mask, clip, tokens):
    """Half the squared error, the worse of the value and of the value held within clip of the old one.

    values, old_values, returns, mask (B, T) -> (sum over the mask / tokens, {value_clip_fraction}).
    """
    held = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (held - returns).square()
    stats = {"value_clip_fraction": (((values - old_values).abs() > clip) & mask).sum() / tokens}
    return 0.5 * (torch.maximum(plain, clipped) * mask).sum() / tokens, stats


def adapt_kl_coef(kl_coef, kl, target, replies, horizon):
    """Proportional control of beta (Ziegler et al. 2019, section 2.2); kl: mean over replies of the sum over tokens."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * replies / horizon)


def main(config):
    run = Run(config)
    require(config.rollout_batch % run.world_size == 0, f"--rollout-batch {config.rollout_batch} is not divisible by {run.world_size} ranks")
    share = config.rollout_batch // run.world_size  # prompts per rollout on this rank
    require(share % config.minibatches == 0, f"a rank's {share} prompts are not divisible into --minibatches {config.minibatches}")
    require(config.kl_target == 0 or config.kl_coef > 0, "--kl-target needs a --kl-coef above 0 to start from")
    require(config.kl_target == 0 or config.rollout_batch <= config.kl_horizon, "--kl-horizon must be at least --rollout-batch")
    if config.kl != "k1" and config.kl_coef > 0:
        run.say(f"warning: --kl {config.kl} in the reward has the wrong gradient (see the top of ppo.py); k1 has the right one")

    # the four models
    policy_model, tokenizer = open_model(config, GPT)
    reference = copy.deepcopy(policy_model).to(run.device).requires_grad_(False).eval()
    reward, reward_tokenizer = load_model(config.reward, ScalarModel)
    require(reward_tokenizer.ranks == tokenizer.ranks, f"--reward {config.reward} has another tokenizer than --model {config.model}")
    critic_model = copy.deepcopy(reward)
    reward = reward.to(run.device).requires_grad_(False).eval()
    policy, critic = run.parallel(policy_model), run.parallel(critic_model)
    policy_optimizer, critic_optimizer = (adamw(m, lr, eps=1e-5) for m, lr in ((policy_model, config.lr), (critic_model, config.critic_lr)))

    # prompts
    world = toy.World(config.seed) if config.data == "toy" else None
    rows = world.prompts("train") if world else read_rows(config.data, "prompts", run.say)
    prompts = [(row, encode_prompt(tokenizer, row.prompt)) for row in rows]
    context = min(policy_model.config.block_size, reward.config.block_size)
    require(config.max_new_tokens < context, f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in the context of {context}")
    prompts = drop_long(prompts, [len(ids) for _, ids in prompts], context - config.max_new_tokens, run.say)
    run.say(f"{len(prompts)} prompts, for instance\n{describe(tokenizer, prompts[0][1], [False] * len(prompts[0][1]))}")

    modules, optimizers = {"policy": policy_model, "critic": critic_model}, {"policy_optimizer": policy_optimizer, "critic_optimizer": critic_optimizer}
    first, extra = run.begin(modules, optimizers)
    kl_coef = extra.get("kl_coef", config.kl_coef)
    order = endless_order(len(prompts), config.seed, first * config.rollout_batch)
    policy.eval(), critic.eval()  # no dropout: the ratio to the old policy must be 1 where nothing has changed

    for step in run.steps(first, config.steps):
        generator = run.seed_step(step)
        began = time.perf_counter()

        # 1. rollout
        chosen = [next(order) for _ in range(config.rollout_batch)][run.rank::run.world_size]
        with run.autocast():
            rollout = generate(policy_model, [prompts[i][1] for i in chosen], config.max_new_tokens, tokenizer,
                               config.temperature, generator=generator)
        ids, mask, lengths, ended = rollout  # (B, T), (B, T), (B,), (B,)
        size = lengths.tolist()
        host_mask = mask.cpu()  # see token_index

        # 2. score: what the losses call old is computed here, by the forward pass that trains, not by the sampler
        old_logprobs, ref_logprobs, old_values, entropy = (torch.zeros(ids.shape, device=run.device) for _ in range(4))  # (B, T)
        scores = torch.zeros(share, device=run.device)  # (B,)
        with torch.no_grad(), run.autocast():
            for piece in by_length(range(share), size, config.micro_batch_tokens):
                rows, T = torch.tensor(piece).to(run.device, non_blocking=True), max(size[i] for i in piece)
                part, part_mask = ids[rows, :T], host_mask[piece, :T]
                old_logprobs[rows, :T], entropy[rows, :T] = policy_model(part, part_mask, config.temperature, with_entropy=True)
                ref_logprobs[rows, :T], _ = reference(part, part_mask, config.temperature)
                old_values[rows, :T] = values_before(critic_model(part), part_mask)
                scores[rows] = last_scores(reward(part), lengths[rows])
        # a reward model has not seen replies without an end: whatever it says of one, ending must never be worse
        judged = torch.where(ended, scores, run.all_min(scores.min()) - config.missing_eos_penalty)

        # 3. rewards
        rewards = shaped_rewards(judged, kl_estimate(old_logprobs, ref_logprobs, config.kl), mask, kl_coef)

        # 4. advantages
        advantages, returns = gae(rewards, old_values, mask, config.gamma, config.lam)
        explained = 1 - (returns - old_values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-8)
        if config.whiten:
            advantages = whiten(advantages, mask, run.all_sum)
        rollout_seconds, began = time.perf_counter() - began, time.perf_counter()

        # 5. update
        totals, off_by = {}, torch.zeros((), device=run.device)
        lr, critic_lr = (cosine_lr(step, config.steps, config.warmup, peak) for peak in (config.lr, config.critic_lr))
        for epoch in range(config.epochs):
            shuffled = torch.randperm(share).tolist()
            for minibatch in range(config.minibatches):
                picked = shuffled[minibatch::config.minibatches]
                tokens = run.all_sum(host_mask[picked].sum().to(run.device))  # of the whole minibatch: short replies weigh by their tokens
                for piece in run.micro_batches(by_length(picked, size, config.micro_batch_tokens), policy, critic):
                    rows, T = torch.tensor(piece).to(run.device, non_blocking=True), max(size[i] for i in piece)
                    part, part_mask, old = ids[rows, :T], mask[rows, :T], old_logprobs[rows, :T]
                    with run.autocast():
                        logprobs, H = policy(part, host_mask[piece, :T], config.temperature, with_entropy=config.entropy_coef > 0)
                        values = values_before(critic(part), host_mask[piece, :T])
                    pg_loss, stats = policy_loss(logprobs, old, advantages[rows, :T], part_mask, config.clip, tokens)
                    vf_loss, value_stats = value_loss(values, old_values[rows, :T], returns[rows, :T], part_mask, config.value_clip, tokens)
                    bonus = config.entropy_coef * H.sum() / tokens if config.entropy_coef > 0 else 0.0
                    if epoch == minibatch == 0:  # nothing has been updated yet, so the ratio to the old policy must be 1
                        off_by = torch.maximum(off_by, (logprobs.detach() - old).abs().max())
                    run.backward(pg_loss - bonus, policy_optimizer)
                    run.backward(vf_loss, critic_optimizer)
                    for name, value in {"policy_loss": pg_loss, "value_loss": vf_loss, **stats, **value_stats}.items():
                        totals[name] = totals.get(name, 0) + value.detach() / (config.epochs * config.minibatches)
                grad_norm = run.optimizer_step(policy_optimizer, lr, config.max_grad_norm)
                critic_grad_norm = run.optimizer_step(critic_optimizer, critic_lr, config.max_grad_norm)

        # 6. KL control, log, save
        log_ratio = old_logprobs - ref_logprobs  # (B, T)
        all_tokens = run.all_sum(mask.sum())
        replies = {  # means over the replies; entropy and value are means over their tokens
            "score": scores.mean(), "kl": log_ratio.sum(1).mean(), "length": mask.sum(1).float().mean(), "eos_rate": ended.float().mean(),
            "kl_k3": kl_estimate(old_logprobs, ref_logprobs, "k3").sum(1).mean(), "reward": rewards.sum(1).mean(), "explained_variance": explained,
            "entropy": entropy.sum() / all_tokens * run.world_size, "value": old_values.sum() / all_tokens * run.world_size}
        texts = rollout.texts(tokenizer)
        if world:
            gold = [world.gold(prompts[i][0].text, text, end) for i, text, end in zip(chosen, texts, ended.tolist())]
            replies["gold"] = torch.tensor(gold, device=run.device).mean()
        names, values = zip(*replies.items())
        means = dict(zip(names, (run.all_sum(torch.stack(values)) / run.world_size).tolist()))
        names, values = zip(*totals.items())
        means |= dict(zip(names, run.all_sum(torch.stack(values)).tolist()))
        update_seconds = time.perf_counter() - began
        tokens, off_by = all_tokens.item(), -run.all_min(-off_by)  # the largest of all ranks
        if off_by > RATIO_TOLERANCE[run.dtype]:
            run.say(f"warning: step {step + 1}: log-probabilities of an unchanged policy moved by {off_by:.2g}; the ratio should be 1")
        if run.time_to_log(step):
            run.log(step, means | {"kl_coef": kl_coef, "lr": lr, "grad_norm": grad_norm, "critic_grad_norm": critic_grad_norm,
                                   "ratio_error": off_by, "rollout_tokens_per_second": tokens / rollout_seconds,
                                   "update_tokens_per_second": tokens * config.epochs / update_seconds},
                    show=("score", "gold", "kl", "entropy", "length", "eos_rate", "clip_fraction", "explained_variance"))
        if (step + 1) % config.sample_every == 0 or step + 1 == config.steps:
            for i in range(min(3, share)):
                run.say(f"  sample: {prompts[chosen[i]][0].text!r} -> {texts[i]!r} (score {scores[i]:.2f})")
        if config.kl_target > 0:
            kl_coef = adapt_kl_coef(kl_coef, means["kl"], config.kl_target, config.rollout_batch, config.kl_horizon)
        if run.time_to_save(step):
            if run.main:
                save_model(run.out, policy_model, tokenizer)
            run.save(step, modules, optimizers, {"kl_coef": kl_coef})  # last: where it is, the checkpoint is


if __name__ == "__main__":
    run_script(main, Config, __doc__)
