"""Parity with peers: the same weights, tokens and scores through our functions and through theirs, in fp32 on
one CPU thread.

    bash run.sh parity      makes the environment, then runs this: a table of largest differences, exit code 1
                            if one is too large

Nothing of theirs is copied or imitated; their own code runs:
    transformers   opens the folders that save_model writes
    TRL, current   DPOTrainer, CPOTrainer (SimPO), ORPOTrainer, KTOTrainer and RewardTrainer, from text to the
                   loss and its gradient; the losses of GRPOTrainer and RLOOTrainer on given replies,
                   advantages and old log-probabilities
    TRL 1.12.0     the last with PPO: PPOTrainer.train() itself, its generation included, for one rollout and
                   two epochs on it. Its local variables are read each time it calls accelerator.backward; our
                   functions get its tokens alone, and for the second epoch its updated weights. It runs in a
                   process of its own: two TRLs can't be imported at once.

Where our default is another, what restores theirs stands beside the quantity. A difference is
|ours - theirs| / max(1, |theirs|), the largest over all elements.

Legend: B rows, T tokens of a row, P of its prompt, R of its reply, V vocabulary.
"""
import copy
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# These are read when the libraries are imported.
os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
# Of their libraries, to each other.
warnings.filterwarnings("ignore", category=FutureWarning)
try:
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
except ModuleNotFoundError as error:
    print(f"error: {error.name} is missing; bash run.sh parity makes the environment for this script",
          file=sys.stderr)
    sys.exit(2)

import dpo
import grpo
import kto
from data import collate, encode_group, encode_prompt, pad_rows, ranked_pairs
from formats.families import TRANSPOSED
from formats.model_folder import load_model, save_model
from formats.rows import Row
from formats.tokenizer import Tokenizer, train_bpe
from model import GPT, GPTConfig, ScalarModel, last_scores, values_before
from plumbing.flags import UserError, require
from ppo import (
    gae, kl_estimate, missing_eos_scores, policy_loss, shaped_rewards, steps_mask, value_loss, whiten)
from reward import ranking_loss

TOLERANCE = 1e-5
PPO_TRL = "1.12.0"
# Where run.sh puts it.
PPO_FOLDER = ROOT / ".venv-parity" / f"trl-{PPO_TRL}"
PEERS = {
    "policy": GPT2LMHeadModel,
    "reference": GPT2LMHeadModel,
    "reward": GPT2ForSequenceClassification,
    "critic": GPT2ForSequenceClassification,
}

TOKENIZER = Tokenizer("bytes", *train_bpe([], 256))
# A prompt, chosen and rejected of unequal length, and a margin.
PAIRS = [
    ("Name a colour.", "red", "I have no idea.", 0.5),
    ("How are you?", "Very well, thanks.", "fine", 0.0),
    ("2 + 2 = ?", "4", "5", 1.25),
    ("Say something that is long.", "They are short.", "No!", -0.25),
]


# ---------------------------------------------------------------------------------------------------------
# The same models on both sides

def make_models(folder):
    """Checkpoint folders of a tiny policy, reference, reward model and critic, written by save_model."""
    config = GPTConfig(TOKENIZER.n_vocab, block_size=128, n_layer=2, n_head=4, n_kv_head=4, n_embd=32)
    for seed, (name, peer) in enumerate(PEERS.items()):
        torch.manual_seed(seed)
        model = GPT(config) if peer is GPT2LMHeadModel else ScalarModel(config)
        with torch.no_grad():
            # Weights as large as trained ones, biases and norms that differ from their start.
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
            # One direction of the last state is always 1: replies end early, but never hold a pad token.
            if isinstance(model, GPT):
                trunk = model.transformer
                trunk.ln_f.weight[0] = 0.0
                trunk.ln_f.bias[0] = 1.0
                trunk.wte.weight[TOKENIZER.eos, 0] = 2.7
                trunk.wte.weight[TOKENIZER.pad, 0] = -50.0
        save_model(folder / name, model, TOKENIZER)


def ours(folder, name):
    """The model of a folder, opened by our code; `theirs` opens it with theirs."""
    kind = GPT if PEERS[name] is GPT2LMHeadModel else ScalarModel
    model, _ = load_model(folder / name, kind)
    return model.eval()


def theirs(folder, name):
    return PEERS[name].from_pretrained(folder / name).eval()


def in_our_layout(name, tensor):
    """A weight or gradient of theirs, turned where GPT-2 stores it the other way round."""
    return tensor.T if name.endswith(TRANSPOSED) else tensor


def gradients(model, peer):
    """All gradients of our model, and of the peer's parameters of the same names, each as one vector."""
    found = {name: p.grad for name, p in peer.named_parameters()}
    mine, other = [], []
    for name, p in model.named_parameters():
        mine.append(p.grad.flatten())
        other.append(in_our_layout(name, found[name]).flatten())
    return torch.cat(mine), torch.cat(other)


def their_tokenizer():
    """A tokenizer of theirs with our ids.

    The text "<65><66>" is tokens 65 and 66, so that no tokenization can differ.
    """
    vocabulary = {f"<{i}>": i for i in range(TOKENIZER.n_vocab)}
    pad = f"<{TOKENIZER.pad}>"
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=pad))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("<[0-9]+>"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"<{TOKENIZER.eos}>", pad_token=pad,
                                   padding_side="left")


class Table:
    """Rows (quantity, peer, largest difference), added one comparison at a time."""

    def __init__(self, peer):
        self.peer = peer
        self.rows = []

    def add(self, quantity, mine, other):
        mine = torch.as_tensor(mine).detach().float()
        other = torch.as_tensor(other).detach().float()
        assert mine.shape == other.shape, f"{quantity}: shapes {tuple(mine.shape)} and {tuple(other.shape)}"
        difference = ((mine - other).abs() / other.abs().clamp(min=1)).max().item()
        self.rows.append((quantity, self.peer, difference))


# ---------------------------------------------------------------------------------------------------------
# transformers

def transformers_rows(folder):
    table = Table(f"transformers {transformers.__version__}")
    # Of a whole reply every token but the first is predicted.
    examples = [(ids, [False] + [True] * (len(ids) - 1)) for ids, _ in encoded(pair_rows())]
    ids, mask, lengths = collate(examples, TOKENIZER.pad, "cpu")  # (B, T)
    attention = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, T)
    with torch.no_grad():
        model = ours(folder, "policy")
        peer = theirs(folder, "policy")
        logits = peer(input_ids=ids, attention_mask=attention.long()).logits  # (B, T, V)
        table.add("logits", model.logits(model.transformer(ids))[attention], logits[attention])
        predicted = logits[:, :-1].log_softmax(-1)  # (B, T - 1, V)
        found = predicted.gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T - 1)
        table.add("log-probabilities per token", model(ids, mask)[0][:, 1:], found * mask[:, 1:])
        mine = last_scores(ours(folder, "reward"), ids, lengths)  # (B,)
        other = theirs(folder, "reward")(input_ids=ids, attention_mask=attention.long()).logits.squeeze(-1)
        table.add("scores of the reward model", mine, other)
    return table.rows


# ---------------------------------------------------------------------------------------------------------
# DPO and the reward model: the current TRL

def pair_rows():
    rows = []
    for prompt, chosen, rejected, margin in PAIRS:
        rows.append(Row([{"role": "user", "content": prompt}], [chosen, rejected], [0, 1], margin))
    return rows


def encoded(rows):
    """[(ids, mask)] of all replies: for each row the chosen one, then the rejected one."""
    return [example for row in rows for example in encode_group(TOKENIZER, row)]


def as_text(ids):
    """What their tokenizer turns into these ids."""
    return "".join(f"<{i}>" for i in ids)


def pair_dataset(rows):
    """The rows as text that their tokenizer turns into our ids."""
    columns = {"prompt": [], "chosen": [], "rejected": [], "margin": [row.margin for row in rows]}
    for row in rows:
        prompt = encode_prompt(TOKENIZER, row.prompt)
        columns["prompt"].append(as_text(prompt))
        for name, (ids, _) in zip(("chosen", "rejected"), encode_group(TOKENIZER, row)):
            columns[name].append(as_text(ids[len(prompt):]))
    return datasets.Dataset.from_dict(columns)


def trainer_settings(folder):
    return {
        "output_dir": str(folder / "trainer"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def their_loss(trainer):
    """A trainer's loss on its whole dataset as one batch, its gradient left in trainer.model."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss


class Preference(NamedTuple):
    """What TRL calls a loss, the settings that make it here, and what is to say about it."""
    loss_type: str
    ours: dict
    note: str = ""


DPO_CASES = (
    Preference("sigmoid", {"loss": "dpo"}),
    Preference("hinge", {"loss": "hinge"}),
    Preference("ipo", {"loss": "ipo"}, ", log-ratios / tokens of the reply"),
    # AOT sorts what it compares within a batch: on one pair it is cDPO.
    Preference("aot", {"loss": "dpo", "label_smoothing": 0.1}, ", label smoothing 0.1"),
    Preference("robust", {"loss": "robust", "label_smoothing": 0.1}),
    Preference("sigmoid sft", {"loss": "dpo", "sft_coef": 1.0}, " (RPO), mean over all tokens"),
)


def by_tokens(pairs, lengths):
    """Pairs whose SFT term is a mean over all tokens of the best replies, as theirs."""
    tokens = lengths[pairs.best]
    return pairs._replace(best_weight=tokens / tokens.sum())


def dpo_rows(folder):
    from trl import DPOConfig, DPOTrainer
    table = Table(f"TRL {trl.__version__}")
    reference = ours(folder, "reference")
    for case in DPO_CASES:
        rows = pair_rows()
        if case.loss_type == "aot":
            rows = rows[:1]
        config = dpo.Config(beta=0.3, **case.ours)
        args = DPOConfig(**trainer_settings(folder), loss_type=case.loss_type.split(), beta=config.beta,
                         label_smoothing=config.label_smoothing)
        trainer = DPOTrainer(
            theirs(folder, "policy"), theirs(folder, "reference"), args, train_dataset=pair_dataset(rows),
            processing_class=their_tokenizer())
        other = their_loss(trainer)

        model = ours(folder, "policy")
        ids, mask, _ = collate(encoded(rows), TOKENIZER.pad, "cpu")  # (B, T)
        lengths = mask.sum(1).float()  # (B,)
        with torch.no_grad():
            ref_logprobs = reference(ids, mask)[0].sum(1)  # (B,)
        replies = dpo.Replies(model(ids, mask)[0].sum(1), lengths, ref_logprobs)
        if case.loss_type == "ipo":
            replies = dpo.Replies(replies.logprobs / lengths, lengths, ref_logprobs / lengths)
        pairs = by_tokens(dpo.pairs_of(rows, config).times(1, len(rows)), lengths)
        mine, metrics = dpo.preference_loss(replies, pairs, config)
        mine.backward()

        table.add(f"DPO loss, {case.loss_type}{case.note}", mine, other)
        table.add(f"DPO gradient, {case.loss_type}", *gradients(model, trainer.model))
        if case.loss_type == "sigmoid":
            margin = trainer._metrics["train"]["rewards/margins"][-1]
            table.add("margin of implicit rewards", metrics["margin"], margin)
    return table.rows


def no_reference_rows(folder):
    """SimPO and ORPO. Their trainers make a batch of texts, and their loss of that."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    table = Table(f"TRL {trl.__version__}")
    rows = pair_rows()
    lengths = {"max_length": 128}
    simpo = CPOConfig(**trainer_settings(folder), **lengths, loss_type="simpo", beta=2.0, simpo_gamma=0.7,
                      cpo_alpha=0.0, remove_unused_columns=False)
    orpo = ORPOConfig(**trainer_settings(folder), **lengths, beta=0.1, remove_unused_columns=False)
    cases = (
        ("SimPO", CPOTrainer, simpo, dpo.Config(loss="simpo", beta=2.0, gamma=0.7)),
        ("ORPO", ORPOTrainer, orpo, dpo.Config(loss="orpo", beta=0.1)),
    )
    for name, kind, args, config in cases:
        data = pair_dataset(rows).remove_columns("margin")
        trainer = kind(theirs(folder, "policy"), args, train_dataset=data, processing_class=their_tokenizer())
        batch = trainer.data_collator(list(trainer.train_dataset))
        other, _ = trainer.get_batch_loss_metrics(trainer.model.train(), batch)
        other.backward()

        model = ours(folder, "policy")
        examples = encoded(rows)
        ids, mask, _ = collate(examples, TOKENIZER.pad, "cpu")  # (B, T)
        tokens = mask.sum(1).float()  # (B,)
        logprobs = model(ids, mask)[0].sum(1)  # (B,)
        pairs = dpo.pairs_of(rows, config).times(1, len(rows))
        mine, metrics = dpo.preference_loss(dpo.Replies(logprobs, tokens), pairs, config)
        if name == "ORPO":
            # Their SFT term is over the tokens of the prompts as well, all but the first.
            examples = [(ids, [False] + [True] * (len(ids) - 1)) for ids, _ in examples[::2]]
            ids, mask, _ = collate(examples, TOKENIZER.pad, "cpu")
            mine = mine - metrics["sft_loss"] - model(ids, mask)[0].sum() / mask.sum()
        mine.backward()
        note = ", the SFT term over prompts too" if name == "ORPO" else ""
        table.add(f"{name} loss{note}", mine, other)
        table.add(f"{name} gradient", *gradients(model, trainer.model))
    return table.rows


def kto_rows(folder):
    """KTO on eight single replies, whose mismatched pairs are the same: each prompt with the reply before.

    Twice, the second time with the models in each other's places, as one of the two has a KL point of 0.
    """
    from trl import KTOConfig, KTOTrainer
    table = Table(f"TRL {trl.__version__}")
    config = kto.Config(beta=0.3, good_weight=1.5, bad_weight=0.8)
    replies = []
    for good in (True, False):
        for row in pair_rows():
            text = row.replies[0 if good else 1]
            single = Row(row.prompt, [text], [int(not good)])
            replies += [kto.Labelled(single, example, good) for example in encode_group(TOKENIZER, single)]
    prompts = [encode_prompt(TOKENIZER, reply.row.prompt) for reply in replies]
    completions = [reply.example.ids[len(prompt):] for reply, prompt in zip(replies, prompts)]
    good = torch.tensor([reply.good for reply in replies])
    pairs = kto.mismatched_pairs(range(len(replies)), replies)
    batches = []
    for examples in ([reply.example for reply in replies],
                     [kto.mismatched(replies[i].example, replies[j].example, 128) for i, j in pairs]):
        ids, mask, _ = collate(examples, TOKENIZER.pad, "cpu")  # (B, T)
        batches.append((ids, mask))

    points = []
    for policy, reference in (("policy", "reference"), ("reference", "policy")):
        args = KTOConfig(**trainer_settings(folder), beta=config.beta, desirable_weight=1.5,
                         undesirable_weight=0.8, per_device_train_batch_size=len(replies), max_length=128)
        data = datasets.Dataset.from_dict({
            "prompt": [as_text(prompt) for prompt in prompts],
            "completion": [as_text(completion) for completion in completions],
            "label": good.tolist()})
        trainer = KTOTrainer(theirs(folder, policy), theirs(folder, reference), args, train_dataset=data,
                             processing_class=their_tokenizer())
        other = their_loss(trainer)

        model, fixed = ours(folder, policy), ours(folder, reference)
        ratios = []  # of the replies, then of the mismatched pairs
        for ids, mask in batches:
            with torch.no_grad():
                ref_logprobs = fixed(ids, mask)[0].sum(1)  # (B,)
            ratios.append(model(ids, mask)[0].sum(1) - ref_logprobs)
        z = kto.kl_point(ratios[1].detach())
        weight = torch.full((len(replies),), 1 / len(replies))
        mine = kto.kto_loss(ratios[0], good, z, weight, config)
        mine.backward()

        points.append(z.item())
        table.add(f"KTO's KL point, {z.item():.3g}", z, trainer._metrics["train"]["kl"][-1])
        table.add("KTO loss", mine, other)
        table.add("KTO gradient", *gradients(model, trainer.model))
    require(max(points) > 0.1, "KTO's KL point is 0 in both comparisons, so it is not compared")
    return table.rows


def reward_rows(folder):
    from trl import RewardConfig, RewardTrainer
    table = Table(f"TRL {trl.__version__}")
    rows = pair_rows()
    args = RewardConfig(**trainer_settings(folder))
    trainer = RewardTrainer(theirs(folder, "reward"), args, train_dataset=pair_dataset(rows),
                            processing_class=their_tokenizer())
    other = their_loss(trainer)

    model = ours(folder, "reward")
    ids, _, lengths = collate(encoded(rows), TOKENIZER.pad, "cpu")  # (B, T)
    better, worse, weight, margin = ranked_pairs(rows)
    scores = last_scores(model, ids, lengths)  # (B,)
    mine, _ = ranking_loss(scores, better, worse, weight / len(rows), margin)
    mine.backward()

    table.add("reward model's loss, with margins", mine, other)
    table.add("reward model's gradient", *gradients(model, trainer.model))
    return table.rows


# ---------------------------------------------------------------------------------------------------------
# GRPO and its kin: the current TRL

class Case(NamedTuple):
    """A loss of theirs, the flags that make it here, and what ours is to be multiplied with."""
    loss_type: str
    ratio: str  # their importance_sampling_level
    loss: str
    our_ratio: str
    average: str
    factor: float = 1.0
    beta: float = 0.0


LIMIT = 24  # their max_completion_length, our --max-new-tokens
# Theirs is the sum over a reply's tokens, ours that over LIMIT.
GRPO_CASES = (
    Case("grpo", "token", "clip", "token", "reply"),
    Case("grpo", "token", "clip", "token", "reply", beta=0.3),
    Case("grpo", "sequence", "clip", "mean", "reply"),
    Case("bnpo", "token", "clip", "token", "token"),
    Case("dr_grpo", "token", "clip", "token", "constant"),
    Case("dapo", "token", "clip", "token", "token", beta=0.3),
    Case("cispo", "token", "cispo", "token", "token"),
    Case("sapo", "token", "soft", "token", "reply"),
    Case("luspo", "sequence", "clip", "mean", "constant", factor=LIMIT),
)
LOW, HIGH = 0.1, 0.15


class Replies:
    """The replies of PAIRS with advantages, and log-probabilities of before an update.

    All behind one prompt: theirs are padded on the left, and their loss counts positions from the padding.
    """

    def __init__(self, folder):
        rows = [dataclasses.replace(row, prompt=pair_rows()[0].prompt) for row in pair_rows()]
        examples = encoded(rows)
        self.ids, self.mask, _ = collate(examples, TOKENIZER.pad, "cpu")  # (B, T)
        prompts, replies = [], []
        for ids, mask in examples:
            start = mask.index(True)
            prompts.append(ids[:start])
            replies.append(ids[start:])
        self.lengths = torch.tensor([len(reply) for reply in replies])
        self.starts = torch.tensor([len(prompt) for prompt in prompts])
        generator = torch.Generator().manual_seed(0)
        self.advantages = torch.randn(len(replies), generator=generator)
        with torch.no_grad():
            now, _ = ours(folder, "policy")(self.ids, self.mask)  # (B, T)
            self.ref_logprobs, _ = ours(folder, "reference")(self.ids, self.mask)
        noise = torch.randn(now.shape, generator=generator)
        self.old_logprobs = torch.where(self.mask, now + 0.2 * noise, 0.0)
        self.prompt_ids = torch.tensor(prompts)
        self.reply_ids, _ = pad_rows(replies, TOKENIZER.pad)  # (B, R)
        self.reply_mask = torch.arange(self.reply_ids.shape[1]) < self.lengths[:, None]  # (B, R)

    def of_replies(self, x):
        """x (B, T) in their columns (B, R), zero behind a reply."""
        columns = self.starts[:, None] + torch.arange(self.reply_ids.shape[1])  # (B, R)
        return torch.where(self.reply_mask, x.gather(1, columns.clamp(max=x.shape[1] - 1)), 0.0)

    def inputs(self):
        """What their _compute_loss takes."""
        old = self.of_replies(self.old_logprobs)
        return {
            "prompt_ids": self.prompt_ids, "prompt_mask": torch.ones_like(self.prompt_ids),
            "completion_ids": self.reply_ids, "completion_mask": self.reply_mask.long(),
            "advantages": self.advantages, "old_per_token_logps": old, "old_logps": old.sum(1),
            "ref_per_token_logps": self.of_replies(self.ref_logprobs),
            "num_items_in_batch": self.reply_mask.sum()}


def group_trainer(kind, arguments, folder, **options):
    """A GRPOTrainer or RLOOTrainer on the policy, as far as its loss needs one."""
    args = arguments(**trainer_settings(folder), num_generations=2, max_completion_length=LIMIT,
                     per_device_train_batch_size=8, **options)
    prompts = datasets.Dataset.from_dict({"prompt": ["<65>"] * 8})
    trainer = kind(theirs(folder, "policy"), lambda completions, **_: [0.0] * len(completions), args=args,
                   train_dataset=prompts, processing_class=their_tokenizer())
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def our_group_loss(policy, replies, loss, ratio, average, high, beta):
    logprobs, _ = policy(replies.ids, replies.mask)  # (B, T)
    weights = grpo.token_weights(replies.lengths, average, len(replies.lengths), replies.mask.sum(), LIMIT)
    total, _ = grpo.policy_loss(logprobs, replies.old_logprobs, replies.advantages[:, None], replies.mask,
                                weights, loss, ratio, 1.0 if loss == "cispo" else LOW, high)
    if beta > 0:
        total = total + beta * grpo.kl_loss(
            logprobs, replies.old_logprobs, replies.ref_logprobs, replies.mask, "k3", weights)
    return total


def grpo_rows(folder):
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    table = Table(f"TRL {trl.__version__}")
    replies = Replies(folder)
    for case in GRPO_CASES:
        # Their cispo holds the ratio below epsilon_high, ours below 1 + --clip-high.
        high = 0.1 if case.loss_type == "cispo" else HIGH
        theirs_high = 1 + high if case.loss_type == "cispo" else high
        trainer = group_trainer(
            GRPOTrainer, GRPOConfig, folder, loss_type=case.loss_type, beta=case.beta, epsilon=LOW,
            epsilon_high=theirs_high, importance_sampling_level=case.ratio, use_bias_correction_kl=True)
        other = trainer._compute_loss(trainer.model, replies.inputs())
        other.backward()
        policy = ours(folder, "policy")
        mine = case.factor * our_group_loss(policy, replies, case.loss, case.our_ratio, case.average, high,
                                            case.beta)
        mine.backward()
        note = f"{case.loss_type}, {case.ratio}" + (", KL in the loss" if case.beta else "")
        table.add(f"GRPO loss, {note}", mine, other)
        table.add(f"GRPO gradient, {note}", *gradients(policy, trainer.model))

    trainer = group_trainer(RLOOTrainer, RLOOConfig, folder, beta=0.0, epsilon=LOW, epsilon_high=HIGH)
    other = trainer._compute_loss(trainer.model, replies.inputs())
    other.backward()
    policy = ours(folder, "policy")
    mine = our_group_loss(policy, replies, "clip", "product", "reply", HIGH, 0.0)
    mine.backward()
    table.add("RLOO loss (--ratio product --average reply)", mine, other)
    table.add("RLOO gradient", *gradients(policy, trainer.model))
    return table.rows


# ---------------------------------------------------------------------------------------------------------
# PPO: TRL 1.12.0

def snapshot(model):
    """A copy of a model with its gradients."""
    copied = copy.deepcopy(model)
    for p, original in zip(copied.parameters(), model.parameters()):
        p.grad = original.grad.clone()
    return copied


class Epoch(NamedTuple):
    """What is seen of an epoch of their trainer, between its losses and its optimiser's step."""
    variables: dict  # the local variables of its train()
    policy: torch.nn.Module  # with their gradients
    critic: torch.nn.Module


def run_trl_ppo(folder, kl):
    """One rollout and two epochs of their trainer: (its settings, [Epoch])."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    # Of several lengths: they pad on the left.
    prompts = [encode_prompt(TOKENIZER, row.prompt) for row in pair_rows() for _ in range(4)]
    args = PPOConfig(
        **trainer_settings(folder), total_episodes=len(prompts), per_device_train_batch_size=len(prompts),
        num_ppo_epochs=2, response_length=8, stop_token="eos", missing_eos_penalty=1.0, kl_estimator=kl,
        kl_coef=0.2, gamma=0.97, learning_rate=6e-4, num_sample_generations=0, seed=0, cliprange_value=0.8)
    trainer = PPOTrainer(
        args, their_tokenizer(), theirs(folder, "policy"), theirs(folder, "reference"),
        theirs(folder, "reward"), datasets.Dataset.from_dict({"input_ids": prompts}),
        theirs(folder, "critic"))
    backward = trainer.accelerator.backward
    epochs = []

    def watched(loss, **kwargs):
        # Of train(), which calls this between its losses and its optimiser's step.
        variables = dict(inspect.currentframe().f_back.f_locals)
        backward(loss, **kwargs)
        epochs.append(Epoch(variables, snapshot(trainer.policy_model), snapshot(trainer.value_model)))

    trainer.accelerator.backward = watched
    trainer.train()
    return args, epochs


class Rollout:
    """Their tokens in our layout.

    Theirs are (B, P + R), padded on the left, ours (B, T), padded on the right; models' outputs are cut to
    the replies (B, R).
    """

    def __init__(self, tokens, prompt_width):
        prompts = [row[row != TOKENIZER.pad].tolist() for row in tokens[:, :prompt_width]]
        replies = [up_to_eos(reply) for reply in tokens[:, prompt_width:].tolist()]
        R = tokens.shape[1] - prompt_width
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
        lengths = torch.tensor([len(reply) for reply in replies])
        self.ended = torch.tensor([reply[-1] == TOKENIZER.eos for reply in replies])
        end_token_alone = (self.ended & (lengths == 1)).any()
        cut_off = (~self.ended & (lengths == R)).any()
        require(end_token_alone and cut_off and len(set(lengths.tolist())) >= 4,
                "TRL's rollout lacks a reply of the end token alone, one that is cut off, "
                "or replies of four lengths; another seed may have them")
        rows = []
        for prompt, reply in zip(prompts, replies):
            rows.append(prompt + reply + [TOKENIZER.pad] * (R - len(reply)))
        self.ids, _ = pad_rows(rows, TOKENIZER.pad)  # (B, T)
        self.columns = prompt_lengths[:, None] + torch.arange(R)  # (B, R): where the replies stand in (B, T)
        self.ends = prompt_lengths + lengths  # (B,)
        self.mask = torch.arange(R) < lengths[:, None]  # (B, R)
        # As ppo.py has it.
        self.row_steps = steps_mask(self.in_rows(self.mask), "next")  # (B, T)
        self.steps = self.row_steps.gather(1, self.columns)  # (B, R)

    def in_rows(self, mask):
        """A mask of replies (B, R) as one of rows (B, T)."""
        return torch.zeros(self.ids.shape, dtype=torch.bool).scatter(1, self.columns, mask)

    def logprobs(self, policy, temperature):
        logprobs, _ = policy(self.ids, self.in_rows(self.mask), temperature)  # (B, T)
        return logprobs.gather(1, self.columns)

    def values(self, critic):
        return values_before(critic, self.ids, self.row_steps).gather(1, self.columns)


def up_to_eos(reply):
    """A reply (list of ids) without what stands behind its end token."""
    if TOKENIZER.eos in reply:
        return reply[:reply.index(TOKENIZER.eos) + 1]
    return reply


class Made(NamedTuple):
    """What ppo.py makes of a rollout, (B, R) but for the scores."""
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    old_values: torch.Tensor
    scores: torch.Tensor  # (B,) after --missing-eos
    rewards: torch.Tensor
    returns: torch.Tensor
    advantages: torch.Tensor  # whitened


def make(rollout, models, args, kl):
    """Steps 2 to 4 of ppo.py on their tokens, with their settings; returns `Made`."""
    steps = rollout.steps
    with torch.no_grad():
        old_logprobs = rollout.logprobs(models["policy"], args.temperature)
        ref_logprobs = rollout.logprobs(models["reference"], args.temperature)
        old_values = rollout.values(models["critic"])
        scores = last_scores(models["reward"], rollout.ids, rollout.ends)
    scores = missing_eos_scores(scores, rollout.ended, "subtract", args.missing_eos_penalty, scores.min())
    rewards = shaped_rewards(scores, kl_estimate(old_logprobs, ref_logprobs, kl), steps, args.kl_coef)
    advantages, returns = gae(rewards, old_values, steps, args.gamma, args.lam)
    whitened = whiten(advantages, rollout.mask, variance="sample")
    return Made(old_logprobs, ref_logprobs, old_values, scores, rewards, returns, whitened)


def ppo_rows(folder):
    """Steps 2 to 5 of ppo.py, given their tokens and, for the second epoch, their updated weights."""
    require(trl.__version__ == PPO_TRL,
            f"PPO is compared with TRL {PPO_TRL}, found {trl.__version__}; use bash run.sh parity")
    table = Table(f"TRL {PPO_TRL}")
    models = {name: ours(folder, name) for name in PEERS}

    args, epochs = run_trl_ppo(folder, "k3")
    there = epochs[0].variables
    rollout = Rollout(there["query_responses"], there["context_length"])
    table.add("rewards, k3", make(rollout, models, args, "k3").rewards, there["rewards"])

    args, epochs = run_trl_ppo(folder, "k1")
    there = epochs[0].variables
    rollout = Rollout(there["query_responses"], there["context_length"])
    made = make(rollout, models, args, "k1")
    their_logprobs = there["logprobs"].where(rollout.mask, 0.0)
    their_ref_logprobs = there["ref_logprobs"].where(rollout.mask, 0.0)
    table.add("old log-probabilities", made.old_logprobs, their_logprobs)
    table.add("reference's log-probabilities", made.ref_logprobs, their_ref_logprobs)
    table.add("values", made.old_values, there["values"])
    table.add("scores (--missing-eos subtract)", made.scores, there["scores"])
    table.add("rewards, k1 (--reward-at next)", made.rewards, there["rewards"])
    table.add("returns", made.returns, there["returns"])
    table.add("advantages (--whiten sample)", made.advantages, there["advantages"])
    for number, epoch in enumerate(epochs):
        compare_epoch(table, number, epoch, rollout, made, models, args)
    return table.rows


def compare_epoch(table, number, epoch, rollout, made, models, args):
    """Step 5 of ppo.py with the weights that they have in an epoch, 0 or 1."""
    policy, critic = models["policy"], models["critic"]
    mask, steps = rollout.mask, rollout.steps
    there = epoch.variables
    for model, peer in ((policy, epoch.policy), (critic, epoch.critic)):
        state = peer.state_dict()
        model.load_state_dict({name: in_our_layout(name, state[name]) for name in model.state_dict()})
        model.zero_grad()
    logprobs = rollout.logprobs(policy, args.temperature)
    values = rollout.values(critic)
    pg_loss, stats = policy_loss(
        logprobs, made.old_logprobs, made.advantages, mask, args.cliprange, mask.sum())
    vf_loss, value_stats = value_loss(
        values, made.old_values, made.returns, steps, args.cliprange_value, steps.sum())
    (pg_loss + args.vf_coef * vf_loss).backward()
    when = f"epoch {number + 1}, "
    if number == 1:
        clipped = stats["clip_fraction"].item(), value_stats["value_clip_fraction"].item()
        require(all(0.1 < share < 0.9 for share in clipped),
                f"the update clips {clipped} of ratios and values, too few or too many to compare")
        # Undoes their shuffling.
        order = torch.as_tensor(there["micro_batch_inds"]).argsort()
        their_logprobs = there["new_logprobs"][order].where(mask, 0.0)
        table.add(when + "log-probabilities after their update", logprobs, their_logprobs)
        table.add(when + "values after their update", values, there["vpred"][order])
    table.add(when + "policy loss", pg_loss, there["pg_loss"])
    table.add(when + "value loss", vf_loss, there["vf_loss"])
    table.add(when + "gradient of the policy", *gradients(policy, epoch.policy))
    table.add(when + "gradient of the critic (times vf_coef)", *gradients(critic, epoch.critic))


# ---------------------------------------------------------------------------------------------------------

def ppo_in_its_own_process(folder):
    """ppo_rows under TRL 1.12.0, which can't be imported beside the current one."""
    environment = os.environ | {"PYTHONPATH": str(PPO_FOLDER)}
    words = [sys.executable, __file__, "ppo", str(folder)]
    done = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL)
    require(done.returncode == 0, f"the comparison with TRL {PPO_TRL} failed, see above")
    return json.loads((folder / "ppo.json").read_text())


def main(words):
    torch.set_num_threads(1)
    if words:
        # ppo FOLDER: the part that runs in a process of its own. Its stdout is full of their metrics.
        folder = Path(words[1])
        (folder / "ppo.json").write_text(json.dumps(ppo_rows(folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        rows = transformers_rows(folder)
        rows += ppo_in_its_own_process(folder)
        rows += dpo_rows(folder)
        rows += no_reference_rows(folder)
        rows += kto_rows(folder)
        rows += reward_rows(folder)
        rows += grpo_rows(folder)
    width = max(len(quantity) for quantity, _, _ in rows)
    print(f"{'quantity':{width}} | {'peer':19} | largest difference | tolerance | ok")
    beyond = 0
    for quantity, peer, difference in rows:
        # NaN is beyond, too.
        ok = difference <= TOLERANCE
        beyond += not ok
        print(f"{quantity:{width}} | {peer:19} | {difference:18.1e} | {TOLERANCE:9.0e} | "
              f"{'yes' if ok else 'NO'}")
    print(f"{len(rows)} quantities, {beyond or 'none'} beyond tolerance")
    sys.exit(beyond > 0)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
