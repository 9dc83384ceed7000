"""Bugs planted in plumbing/steps.py, and the tests that ought to notice them."""

OPTIMISER_STEP = (
    "plumbing/test_steps.py::"
    "test_an_optimizer_step_clips_the_norm_of_all_gradients_and_clears_them_and_takes_none_that_is_not_"
    "finite")

MUTANTS = [
    ("learning rate: the first step has none",
     "plumbing/test_steps.py::test_learning_rates_warm_up_and_follow_their_schedule",
     "return peak * (step + 1) / warmup",
     "return peak * step / warmup"),
    ("weight decay: of embeddings and norms too",
     "plumbing/test_steps.py::test_weight_decay_is_of_matrices_but_not_of_embeddings",
     'if p.ndim < 2 or name.endswith(("wte.weight", "wpe.weight")):',
     "if False:"),
    ("ranks: the factor that DDP's average takes away",
     "whole/test_trainers.py::test_two_ranks_train_as_one_does[sft-ddp]",
     "scale(loss * self.world_size)",
     "scale(loss)"),
    ("step: gradients aren't cleared", OPTIMISER_STEP,
     "        optimizer.zero_grad(set_to_none=True)\n",
     ""),
    ("step: gradients aren't clipped", OPTIMISER_STEP,
     "clip_grads_with_norm_(parameters, max_grad_norm, norm)",
     "clip_grads_with_norm_(parameters, math.inf, norm)"),
    ("step: taken although a gradient is not finite", OPTIMISER_STEP,
     "optimizer.found_inf = bad.float()",
     "optimizer.found_inf = torch.zeros(())"),
    ("skipped: one more than was allowed",
     "whole/test_trainers.py::"
     "test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_the_second_time_if_one_may_be_skipped",
     "if counts and self.counted > limit:",
     "if counts and self.counted > limit + 1:"),
    ("float16: an overflow counts though the scale is lowered",
     "faults/test_numbers.py::"
     "test_in_float16_a_gradient_that_overflows_once_is_reported_lowers_the_scale_and_is_not_counted",
     "if attempt.scaler.is_enabled() and scale >= 1:",
     "if False:"),
    ("float16: what overflows at any scale is never counted",
     "faults/test_numbers.py::test_in_float16_what_overflows_whatever_the_scale_ends_the_run",
     "if attempt.scaler.is_enabled() and scale >= 1:",
     "if attempt.scaler.is_enabled():"),
    ("float16: a spike is stepped on",
     "faults/test_numbers.py::test_in_float16_a_spike_of_the_gradient_is_skipped_and_leaves_the_scale",
     "optimizer.found_inf = bad.float()",
     "optimizer.found_inf = (~norm.isfinite()).float() if scaler.is_enabled() else bad.float()"),
    ("signal: a run stops amid PPO's update",
     "whole/test_ppo_control.py::"
     "test_resuming_with_everything_that_has_a_state_equals_never_stopping_bit_for_bit[updating]",
     "        self.clean = False\n        scaler = self.scalers[optimizer]\n",
     "        scaler = self.scalers[optimizer]\n"),
]
