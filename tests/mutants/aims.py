"""Bugs planted in aims.py, and the tests that ought to notice them."""

RIDGE = "test_aims.py::test_heads_equal_least_squares_with_a_row_more_for_each_weight"
MISSING = "test_aims.py::test_missing_ratings_have_no_loss_and_no_gradient"
ALPHA = "test_aims.py::test_the_penalty_is_the_one_that_misses_held_out_ratings_least"
PLANTED = "test_aims.py::test_weights_that_were_planted_are_found_again_within_5_percent"
GATE = "test_aims.py::test_a_gate_finds_the_weights_of_each_kind_of_prompt_whatever_the_size_of_its_states"
LENGTH = "test_aims.py::test_what_is_taken_away_leaves_no_rank_correlation_with_length"
NUMBER = "test_aims.py::test_the_number_is_the_weighted_sum_of_the_aims_less_the_share_of_length"
ROWS = "test_aims.py::test_ratings_and_pairs_are_those_of_the_rows"
FOLDER = "test_aims.py::test_the_folders_score_is_what_was_fitted_and_its_demonstrations_are_zero"
STEP = "test_aims.py::test_the_first_step_starts_from_the_closed_form_however_it_is_cut_and_on_two_ranks"
ZERO = "test_aims.py::test_an_aim_of_weight_zero_changes_nothing"

MUTANTS = [
    ("aims: missing ratings are zeros in the closed form", RIDGE,
     "        known = ~x.isnan()\n        h = states[known]\n",
     "        x = x.nan_to_num()\n        known = ~x.isnan()\n        h = states[known]\n"),
    ("aims: the penalty is squared", RIDGE,
     "h.T @ h + alpha * torch.eye", "h.T @ h + alpha**2 * torch.eye"),
    ("aims: missing ratings are rated the mean", MISSING,
     "return (known * (scores - ratings.nan_to_num())).square().sum() / count",
     "return (scores - ratings.nan_to_num()).square().sum() / count"),
    ("aims: the loss is not divided by the ratings there are", MISSING,
     ".square().sum() / count", ".square().mean()"),
    ("aims: the penalty is chosen on training replies", ALPHA,
     "scores = val.states @ ridge(train.states, train.ratings, one).T\n"
     "        losses[one] = float(aims_loss(scores, val.ratings, count))",
     "scores = train.states @ ridge(train.states, train.ratings, one).T\n"
     "        losses[one] = float(aims_loss(scores, train.ratings, count))"),
    ("aims: a label's probability does not count", PLANTED,
     "-(weight * (right * F.logsigmoid(gap) + (1 - right) * F.logsigmoid(-gap))).sum()",
     "-(weight * F.logsigmoid(gap)).sum()"),
    ("aims: the worse reply is preferred", PLANTED,
     "    gap = rewards[better] - rewards[worse]", "    gap = rewards[worse] - rewards[better]"),
    ("aims: the scale is not learned", PLANTED,
     "stages = [(WEIGHTS_LR, [log_scale, gate[2].bias])]", "stages = [(WEIGHTS_LR, [gate[2].bias])]"),
    ("aims: weights that add up to nothing in particular", PLANTED,
     "rewards = log_scale.exp() * (gate(inputs).softmax(-1) * aims)",
     "rewards = log_scale.exp() * (gate(inputs).sigmoid() * aims)"),
    ("aims: the gate keeps to the states' sizes", GATE,
     "        gate[0].weight /= size\n", "        pass\n"),
    ("aims: the gate's first layer is not learned", GATE,
     "[log_scale, *gate.parameters()]", "[log_scale, *gate[2].parameters()]"),
    ("aims: more of length is added", LENGTH,
     "spearman(rewards - c * predicted, lengths)", "spearman(rewards + c * predicted, lengths)"),
    ("aims: only one sign of length is taken off", LENGTH,
     "    sign = math.copysign(1.0, left(0.0))", "    sign = 1.0"),
    ("aims: the share of length is not subtracted", NUMBER,
     "Fitted(heads - share * of_length, gate)", "Fitted(heads, gate)"),
    ("aims: the scale is left out", NUMBER,
     "    heads = scale * heads\n", "    heads = 1.0 * heads\n"),
    ("aims: given weights are not used", NUMBER,
     "gate, heads = None, (given @ heads)[None]", "gate, heads = None, heads.mean(0)[None]"),
    ("aims: comparisons of rows weigh by their pairs", ROWS,
     "row.probability, 1 / len(found))", "row.probability, 1.0)"),
    ("aims: verdicts compare", ROWS,
     "if len(examples) > 1 and not row.verdict else []", "if len(examples) > 1 else [(0, 0)]"),
    ("aims: ratings are in points", STEP,
     "return (ratings_of(groups, self.aims) - self.mean) / self.deviation",
     "return ratings_of(groups, self.aims) - self.mean"),
    ("aims: the trunk's heads start anywhere", STEP,
     '        write_weight(model, "score.weight", heads)\n', "        pass\n"),
    ("aims: zero is not the demonstrations", FOLDER,
     "return shifted(weights, zero) if shifts else weights", "return weights"),
    ("aims: an aim of weight zero is learned as well", ZERO,
     "        if float(number) != 0:\n            weights[name] = float(number)",
     "        weights[name] = float(number)"),
    ("aims: a gate reads the reply's last token", FOLDER,
     "return torch.cat([states[place.to(ids.device)].float() for place in places], 1)",
     "return torch.cat([states[places[0].to(ids.device)].float() for place in places], 1)"),
]
