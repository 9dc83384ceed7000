"""Faults that others have had, each as a few lines beside what is right: docs/faults.md explains them.

They are everybody's faults: most are invisible, as the loss falls and the score rises all the same. Every
function below computes one number twice, the way the code named in its docstring does it and the right way,
through this project's own functions where there is one. The repositories' commits stand in docs/faults.md.

    python bench/faults.py        the table: some seconds
"""
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkers  # noqa: E402
import distill  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import reward  # noqa: E402
from model import RMSNorm  # noqa: E402
from plumbing.run import run_script  # noqa: E402


@dataclass
class Config:
    debug: bool = False  # show the traceback of an error


def row(*numbers):
    """Numbers of one reply, (1, T), in float64."""
    return torch.tensor([numbers], dtype=torch.float64)


def counted(*flags):
    """A mask of one reply, (1, T)."""
    return torch.tensor([flags], dtype=torch.bool)


def slope(loss, at):
    """Gradient of a loss in one of its inputs."""
    return torch.autograd.grad(loss, at)[0]


# ---------------------------------------------------------------------------------------------------------
# Where the KL stands. Eight replies of one token, so that every expectation is a sum.

REWARDS = row(0.3, -0.8, 1.4, 0.1, -0.4, 0.9, -1.3, 0.6)
REF_LOGITS = row(0.5, 0.2, -1.0, 1.1, 0.0, -0.3, 0.8, -0.6)
LOGITS = row(1.0, -0.5, -0.2, 0.9, 0.6, -1.2, 0.3, 0.4)  # a policy on its way
BETA = 0.5
STEPS, RATE = 600, 1.0  # of gradient descent


def kl_in_loss(logprobs, ref, kind):
    """Expectation of ppo.py's KL term over tokens drawn from the policy."""
    drawn = logprobs.detach()
    return ppo.kl_loss(logprobs, drawn, ref, counted(*[1] * 8), kind, tokens=1, importance=drawn.exp())


def k1(logprobs, ref):
    return ppo.kl_estimate(logprobs, ref, "k1")


def k3(logprobs, ref):
    return ppo.kl_estimate(logprobs, ref, "k3")


def score_gradient(logprobs, paid):
    """Expectation over drawn tokens of -log pi * what they are paid: REINFORCE."""
    return -(logprobs.detach().exp() * paid.detach() * logprobs).sum()


def objective(logprobs, ref, term):
    """The loss whose expected gradient a method follows. term: 'loss' or 'reward', and an estimator."""
    place, estimate = term
    if place == "loss":
        return score_gradient(logprobs, REWARDS) + BETA * estimate(logprobs, ref)
    return score_gradient(logprobs, REWARDS - BETA * estimate(logprobs, ref))


@functools.cache
def distance_to_the_optimum(*term):
    """Where exact gradient descent ends: its total variation from pi* = ref exp(r / beta) / Z."""
    ref = REF_LOGITS.log_softmax(1)
    best = (ref + REWARDS / BETA).softmax(1)
    logits = REF_LOGITS.clone().requires_grad_()
    for _ in range(STEPS):
        step = slope(objective(logits.log_softmax(1), ref, term), logits)
        with torch.no_grad():
            logits -= RATE * step
    return ((logits.softmax(1) - best).abs().sum() / 2).item()


def k1_in_the_loss():
    """reasoning-from-scratch: the log ratio itself as the term in the loss."""
    ref = REF_LOGITS.log_softmax(1)
    lengths = []
    for kind in ("k1", "k2"):
        logits = LOGITS.clone().requires_grad_()
        lengths.append(slope(kl_in_loss(logits.log_softmax(1), ref, kind), logits).norm().item())
    return lengths


def k3_in_the_loss_without_the_ratio():
    """NeMo-RL and minimind: k3 of the tokens, not weighted with pi / pi_old, whose value is 1."""
    def bare(logprobs, ref):
        drawn = logprobs.detach().exp()
        return (drawn * k3(logprobs, ref)).sum()

    def weighted(logprobs, ref):
        return kl_in_loss(logprobs, ref, "k3")

    return distance_to_the_optimum("loss", bare), distance_to_the_optimum("loss", weighted)


def k3_in_the_reward():
    """TRL's PPOTrainer with kl_estimator k3: what is right as a number to log is paid as a reward."""
    return distance_to_the_optimum("reward", k3), distance_to_the_optimum("reward", k1)


def k1_of_the_wrong_sign():
    """rlhf-book: kl1 is log ref - log pi, and what is taken off the reward is beta times that."""
    def turned(logprobs, ref):
        return -k1(logprobs, ref)

    return distance_to_the_optimum("reward", turned), distance_to_the_optimum("reward", k1)


def k3_of_the_ratio_upside_down():
    """rlhf-book: kl3 takes pi / ref where Schulman's has ref / pi, for tokens drawn from pi."""
    logprobs, ref = LOGITS.log_softmax(1), REF_LOGITS.log_softmax(1)
    drawn = logprobs.exp()
    turned = torch.expm1(logprobs - ref) - (logprobs - ref)
    return (drawn * turned).sum().item(), (drawn * grpo.kl_estimate(logprobs, ref, "k3")).sum().item()


# ---------------------------------------------------------------------------------------------------------
# Sampling. A vocabulary of 1,000 tokens whose probability falls as one over their rank.

RANKS = torch.arange(1, 1001, dtype=torch.float64)
POLICY = -RANKS.log()[None]  # logits
STEEPER = -1.5 * RANKS.log()[None]  # those of a reference that the policy has become more varied than


def truncated(logits, temperature, top_p, top_k):
    """The law that a sampler draws from: logits (1, V), the largest first -> probabilities (1, V)."""
    logits = logits / temperature
    logits[:, top_k:] = -math.inf
    probabilities = logits.softmax(1)
    before = probabilities.cumsum(1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0.0)
    return kept / kept.sum()


def sampled_otherwise(temperature, top_p, top_k):
    """Total variation between the law that is sampled from and the one that is scored."""
    scored = POLICY.softmax(1)
    gaps = []
    for law in (truncated(POLICY, temperature, top_p, top_k), truncated(POLICY, 1.0, 1.0, 1000)):
        gaps.append(((law - scored).abs().sum() / 2).item())
    return gaps


def sampled_sharply():
    """rlhf-book: temperature .6, top-p .95, top-k 20; all of the softmax at temperature 1 when scoring."""
    return sampled_otherwise(0.6, 0.95, 20)


def sampled_sharply_by_default():
    """minimind: temperature .8 in its trainers, and its generate cuts at top-p .85, top-k 50 unless told."""
    return sampled_otherwise(0.8, 0.85, 50)


def sampled_from_fifty():
    """nanochat: top-k 50 at temperature 1."""
    return sampled_otherwise(1.0, 1.0, 50)


def kl_that_is_negative():
    """The mean of log pi - log ref over such samples (those of rlhf-book), which is called a KL."""
    log_ratio = grpo.kl_estimate(POLICY.log_softmax(1), STEEPER.log_softmax(1), "k1")
    means = []
    for law in (truncated(POLICY, 0.6, 0.95, 20), POLICY.softmax(1)):
        means.append((law * log_ratio).sum().item())
    return means


# ---------------------------------------------------------------------------------------------------------
# The loss of the policy

def clip_turned_round():
    """reasoning-from-scratch: for A < 0 the larger of A * ratio and A * clipped ratio, not the smaller."""
    log_ratio = torch.tensor([[math.log(1.5)]], dtype=torch.float64, requires_grad=True)
    advantage = row(-1.0)
    ratio = log_ratio.exp()
    turned = -torch.maximum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2)).sum()
    right, _ = ppo.policy_loss(log_ratio, row(0.0), advantage, counted(1), clip=0.2, tokens=1)
    return slope(turned, log_ratio).item(), slope(right, log_ratio).item()


def gradient_of_zero():
    """mlx-lm-lora: by default the log ratio was a tensor of zeros, whose exponential hangs on nothing."""
    logprobs = row(-1.2).requires_grad_()
    advantage = row(1.0)
    constant = -(advantage * torch.zeros_like(logprobs).exp()).sum() + 0 * logprobs.sum()
    weights = grpo.token_weights(torch.tensor([1]), "token", replies=1, tokens=1, limit=1)
    right, _ = grpo.policy_loss(
        logprobs, logprobs.detach(), advantage, counted(1), weights, "clip", "token", 0.2, 0.2)
    return slope(constant, logprobs).item(), slope(right, logprobs).item()


def end_token_outside_the_mask():
    """nanochat and minimind's train_agent.py: the end token that was sampled is dropped from the reply."""
    slopes = []
    for mask in (counted(1, 1, 1, 0), counted(1, 1, 1, 1)):
        logprobs = row(-0.5, -0.9, -0.3, -1.6).requires_grad_()
        weights = grpo.token_weights(mask.sum(1), "token", replies=1, tokens=mask.sum(), limit=4)
        loss, _ = grpo.policy_loss(
            logprobs, logprobs.detach(), row(1.0), mask, weights, "clip", "token", 0.2, 0.2)
        slopes.append(slope(loss, logprobs)[0, -1].item())
    return slopes


def clamp_that_is_not_there():
    """OpenRLHF, seq-mask-tis: the comment has each token's weight clamped, the code does not."""
    log_ratio = row(3.0, -0.5, -0.5, -0.5)  # policy / sampler of four tokens
    low, high = 0.5, 5.0  # its default
    of_reply = log_ratio.mean().exp()
    unclamped = ((low <= of_reply <= high) * log_ratio.exp()).max().item()
    mask = counted(1, 1, 1, 1)
    weights = grpo.importance_weights(log_ratio, torch.zeros_like(log_ratio), mask, "token", high)
    return unclamped, weights.max().item()


def equal_scores_that_differ():
    """OpenRLHF (rlhf-book alike): (r - mean) / (deviation + 1e-9), of eight rewards of .7 in float32."""
    scores = torch.full((1, 8), 0.7)
    total = torch.tensor(0.0)
    for score in scores[0]:
        total = total + score
    apart = (scores - total / 8).double()  # one unit in the last place
    deviation = (apart.square().sum() / 7).sqrt()
    theirs = (apart / (deviation + 1e-9)).abs().max().item()
    return theirs, grpo.group_advantages(scores, "deviation").abs().max().item()


# ---------------------------------------------------------------------------------------------------------
# What a sum is divided by

def critic_loss_of_each_pass():
    """verl: each of four passes divides by its own tokens, and their gradients are added up."""
    values = torch.zeros(8, 3, dtype=torch.float64, requires_grad=True)
    returns = torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)
    steps = torch.ones(8, 3, dtype=torch.bool)

    def size(passes, tokens):
        total = 0.0
        for rows in torch.arange(8).chunk(passes):
            own = values[rows]
            loss, _ = ppo.value_loss(own, own.detach(), returns[rows], steps[rows], 0, tokens)
            total = total + loss
        return slope(total, values).norm()

    whole = size(1, 24)
    return (size(4, 6) / whole).item(), (size(4, 24) / whole).item()


def means_of_passes():
    """nanochat, TRL's PPOTrainer: the mean over each pass's tokens, averaged over the passes."""
    lengths = torch.tensor([1, 1, 4, 4])  # the first two replies are one pass, the others another
    own = [grpo.token_weights(part, "token", 4, part.sum(), 4) / 2 for part in lengths.chunk(2)]
    whole = grpo.token_weights(lengths, "token", 4, lengths.sum(), 4)
    return (own[0][0] / own[1][0]).item(), (whole[0] / whole[2]).item()


def labels_that_were_edited():
    """RRHF: masking writes over the labels, so that the length read from them is the padded width."""
    logprobs = row(-1.0, -1.0, -1.0, 0.0, 0.0, 0.0)
    weights = grpo.token_weights(torch.tensor([3]), "reply", replies=1, tokens=3, limit=6)
    return (logprobs.sum() / logprobs.shape[1]).item(), (logprobs * weights).sum().item()


def one_prediction_too_many():
    """ORPO: the mask is attention less prompt, shifted; it keeps the prediction behind the last token."""
    attention = row(1, 1, 1, 1, 1, 0, 0)  # two tokens of prompt, three of the reply, padding
    prompt = row(1, 1, 0, 0, 0, 0, 0)
    predicted = row(-3.0, -0.2, -0.4, -0.6, -9.0, -9.0)  # log-probability of the next token
    theirs = attention[:, :-1] - prompt[:, 1:]
    right = (attention - prompt)[:, 1:]
    means = []
    for mask in (theirs, right):
        weights = grpo.token_weights(mask.sum(1), "reply", replies=1, tokens=1, limit=7)
        means.append((predicted * mask * weights).sum().item())
    return means


def metrics_over_padding():
    """summarize_from_feedback_details: the clip fraction is taken again, over all positions."""
    moved = row(0.4, 0.0, 0.4, 0.0, *[0.0] * 12)  # log ratios: four tokens, then padding
    mask = counted(*[1] * 4, *[0] * 12)
    everywhere = ((moved.exp() - 1).abs() > 0.2).double().mean().item()
    _, stats = ppo.policy_loss(moved, torch.zeros_like(moved), row(1.0), mask, clip=0.2, tokens=4)
    return everywhere, stats["clip_fraction"].item()


def kl_of_the_last_batch():
    """align-anything, KTO: the loop over batches keeps the last one's KL. (The numbers are its thread's.)"""
    batches = [2.0, 8.0, 4.0, 6.0]
    moments = [0, 0.0, 0.0]
    for kl in batches:
        last = kl
        moments = ppo.update_moments(moments, torch.tensor([kl], dtype=torch.float64))
    return last, moments[1]


# ---------------------------------------------------------------------------------------------------------
# The reward and the critic

def score_one_position_late():
    """TRL's PPOTrainer, DeepSpeed-Chat: the score lands behind the end token, where a value is read too."""
    mask = counted(1, 1, 1, 0, 0).expand(2, 5).clone()
    mask[1, 3] = True  # a longer reply, so that there is room behind the first
    values = row(0.5, 0.5, 0.5, -1.0, 0.0).expand(2, 5)
    scores = torch.ones(2, dtype=torch.float64)
    of_end_token = []
    for place in ("next", "eos"):
        steps = ppo.steps_mask(mask, place)
        rewards = ppo.shaped_rewards(scores, torch.zeros_like(values), steps, 0.0)
        advantages, _ = ppo.gae(rewards, torch.where(steps, values, 0.0), steps, gamma=1.0, lam=0.95)
        of_end_token.append(advantages[0, 2].item())
    return of_end_token


def last_norm_twice():
    """minimind: the critic normalises states that the trunk has normalised already."""
    states = torch.linspace(-2, 3, 16)
    norm = RMSNorm(16, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.4, 2.0, 16))  # training leaves no weights of one
    head = torch.linspace(1.0, 0.2, 16)
    with torch.no_grad():
        once = norm(states)
        return (norm(once) @ head).item(), (once @ head).item()


def loss_that_saturates():
    """MOSS-RLHF: -log(sigmoid(gap) + 1e-5), for a pair whose order is very wrong."""
    gap = torch.tensor(-15.0, dtype=torch.float64, requires_grad=True)
    bounded = -torch.log(torch.sigmoid(gap) + 1e-5)
    scores = torch.tensor([-15.0, 0.0], dtype=torch.float64, requires_grad=True)
    first, second = torch.tensor([0]), torch.tensor([1])
    one = torch.ones(1, dtype=torch.float64)
    right, _ = reward.ranking_loss(scores, first, second, one, 0 * one)
    return slope(bounded, gap).item(), slope(right, scores)[0].item()


def padding_that_is_ranked():
    """DeepSpeed-Chat: -log sigmoid at every position up to the longer reply's end, their mean."""
    # The chosen reply ends after three tokens, the rejected one after six. The last token's score is used.
    chosen = row(0.0, 0.0, 2.0, -1.0, -1.0, -1.0).requires_grad_()
    rejected = row(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    everywhere = slope(-torch.nn.functional.logsigmoid(chosen - rejected).mean(), chosen).abs()
    ends = torch.cat([chosen[0, 2:3], rejected[0, 5:]])
    first, second = torch.tensor([0]), torch.tensor([1])
    one = torch.ones(1, dtype=torch.float64)
    loss, _ = reward.ranking_loss(ends, first, second, one, 0 * one)
    at_the_end = slope(loss, chosen).abs()
    shares = []
    for gradient in (everywhere, at_the_end):
        shares.append((gradient[0, 3:].sum() / gradient.sum()).item())
    return shares


# ---------------------------------------------------------------------------------------------------------
# Numbers that end, and text that doesn't

def logarithm_of_zero():
    """TDPO: the logarithm of a softmax, which has become 0, in KL(ref || pi)."""
    policy = torch.tensor([[1.0, 0.0]])
    ref = torch.tensor([[0.0, -120.0]])
    p = ref.softmax(1)
    theirs = (p * (p.log() - policy.log_softmax(1))).sum()
    right, _ = distill.divergence(policy, torch.eye(2), ref, torch.eye(2), "forward")
    return theirs.item(), right.item()


def arithmetic_without_end():
    """GRPO-Zero, nano-aha-moment: what passes a list of letters is given to Python, and ** passes."""
    digits = 87**76 * math.log10(95)  # of 95**87**76
    return f"{digits:.0e} digits".replace("e+", "e"), str(checkers.value_of("95**87**76"))


# The order of docs/faults.md. What the number is, and the function that gives it, theirs and the right one.
FAULTS = {
    "clip turned round": ("gradient of a bad reply 1.5 times likelier", clip_turned_round),
    "k1 in the loss": ("length of the KL's gradient", k1_in_the_loss),
    "k3 in the loss without the ratio": ("distance to the optimum", k3_in_the_loss_without_the_ratio),
    "k3 in the reward": ("distance to the optimum", k3_in_the_reward),
    "k1 of the wrong sign": ("distance to the optimum", k1_of_the_wrong_sign),
    "k3 of the ratio upside down": ("what it says the KL is", k3_of_the_ratio_upside_down),
    "sampled with T .6, top-p .95, top-k 20": ("distance of sampled to scored law", sampled_sharply),
    "sampled with T .8, top-p .85, top-k 50": (
        "distance of sampled to scored law", sampled_sharply_by_default),
    "sampled with top-k 50": ("distance of sampled to scored law", sampled_from_fifty),
    "a KL below zero": ("mean of log pi - log ref", kl_that_is_negative),
    "policy gradient of zero": ("gradient of a good token", gradient_of_zero),
    "end token outside the mask": ("gradient of the end token", end_token_outside_the_mask),
    "clamp that is not there": ("largest weight of a token", clamp_that_is_not_there),
    "equal scores that differ": ("advantage of each", equal_scores_that_differ),
    "critic's loss per pass": ("its gradient in 4 passes, over that in one", critic_loss_of_each_pass),
    "means of passes averaged": ("weight of a token of the short pass", means_of_passes),
    "labels edited in place": ("mean log-probability of a token", labels_that_were_edited),
    "one prediction too many": ("mean log-probability of a token", one_prediction_too_many),
    "metrics over padding": ("clip fraction", metrics_over_padding),
    "KL of the last batch": ("mean of 2, 8, 4, 6", kl_of_the_last_batch),
    "score one position late": ("advantage of the end token", score_one_position_late),
    "last norm twice": ("value of a state", last_norm_twice),
    "loss that saturates": ("gradient of a pair that is very wrong", loss_that_saturates),
    "padding that is ranked": ("share of the gradient on padding", padding_that_is_ranked),
    "logarithm of zero": ("KL of the reference to the policy", logarithm_of_zero),
    "arithmetic without end": ("worth of `95**87**76`", arithmetic_without_end),
}


def shown(number):
    """A number as the table has it: three decimals, and 0 without a sign."""
    if isinstance(number, str):
        return number
    return f"{round(number, 3) + 0.0:.3f}"


def table():
    """[(fault, what the number is, theirs, right)], as text."""
    rows = []
    for name, (what, compute) in FAULTS.items():
        theirs, right = compute()
        rows.append((name, what, shown(theirs), shown(right)))
    return rows


def main(config):
    print("| fault | number | theirs | right |")
    print("|---|---|---|---|")
    for cells in table():
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
