"""Bugs planted in reward.py, and the tests that ought to notice them."""

LOSSES = "test_reward.py"

MUTANTS = [
    ("ranking loss: margin's sign", LOSSES,
     "F.logsigmoid(gap - margin)",
     "F.logsigmoid(gap + margin)"),
    ("ranking loss: gap's sign", LOSSES,
     "gap = scores[better] - scores[worse]  # (P,)",
     "gap = scores[worse] - scores[better]  # (P,)"),
    ("ranking loss: a mean over pairs", LOSSES,
     "loss = (weight * -F.logsigmoid(gap - margin)).sum()",
     "loss = -F.logsigmoid(gap - margin).mean()"),
    ("ranking loss: log of a sigmoid that underflows", LOSSES,
     "weight * -F.logsigmoid(gap - margin)",
     "weight * -torch.sigmoid(gap - margin).log()"),
    ("reward model: a mean for each micro-batch",
     "whole/test_trainers.py::test_a_step_follows_the_formula_taken_one_reply_at_a_time[reward]",
     "weight = weight * counts / len(batch)",
     "weight = weight * counts / len(piece)"),
    ("reward model: a rank without examples counts the first twice",
     "whole/test_trainers.py::test_a_rank_that_gets_no_examples_adds_nothing[reward-lost1]",
     "weight = weight * counts / len(batch)",
     "weight = weight / len(batch)"),
    ("reward model: demonstrations don't score 0",
     "test_reward.py::test_reward_model_scores_demonstrations_zero_on_average",
     "amount=float(scores.mean())",
     "amount=-float(scores.mean())"),
    ("reward model: length alone takes the longer reply",
     "test_reward.py::test_length_alone_takes_the_longer_or_the_shorter_reply_whichever_is_more_often_right",
     "max(by_length, 1 - by_length)",
     "by_length"),
]
