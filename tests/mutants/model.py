"""Bugs planted in model.py, and the tests that ought to notice them."""

BRUTE_FORCE = "test_head.py::test_forward_equals_brute_force_row_by_row"
HEADS = "test_model.py::test_scores_and_values_equal_brute_force_row_by_row"
SOME = "test_model.py::test_some_states_scores_and_gradients_equal_those_among_all"
ROTARY = (
    "test_model.py::"
    "test_rotary_positions_turn_pairs_by_the_published_angles_and_scores_depend_on_distance_alone")
SCALING = (
    "test_model.py::test_context_scaling_stretches_all_wavelengths_or_only_those_longer_than_the_context")
GROUPED = "test_model.py::test_grouped_heads_equal_full_heads_with_keys_and_values_repeated"
TRAINED = "test_model.py::test_only_adapters_and_a_scalar_head_are_trained_and_each_of_them_is"
NO_PASS_WAITS = "whole/test_second_device.py::test_no_pass_waits_for_the_device"
ROUNDED = (
    "faults/test_ranks.py::"
    "test_shards_gathered_in_bfloat16_train_and_generate_as_if_the_weights_were_rounded")

MUTANTS = [
    # -- log-probabilities, heads, sampling
    ("log-probabilities: of the token itself, not from its predecessor", BRUTE_FORCE,
     "return index - 1",
     "return index"),
    ("attention: dropout outside training",
     "test_generate.py::test_generation_runs_without_dropout_and_restores_the_mode",
     "dropout = self.dropout if self.training else 0.0",
     "dropout = self.dropout"),
    ("attention: sees the future", BRUTE_FORCE,
     "is_causal=True, dropout_p=dropout",
     "is_causal=False, dropout_p=dropout"),
    ("score: one token before the end", HEADS,
     "ids.shape[1] + lengths - 1",
     "ids.shape[1] + lengths - 2"),
    ("score: at the padded last position", HEADS,
     "torch.arange(len(ids)) * ids.shape[1] + lengths - 1",
     "torch.arange(1, len(ids) + 1) * ids.shape[1] - 1"),
    ("values: after the token", HEADS,
     "values = model(ids, predicting(at))",
     "values = model(ids, at)"),
    ("reward model: shifted the wrong way", "test_model.py::test_shift_lowers_every_score_by_the_amount",
     "weights[bias] - amount * w",
     "weights[bias] + amount * w"),
    ("reward model: shares its trunk with the language model",
     "test_model.py::test_a_fresh_head_has_the_stated_spread_and_the_trunk_is_a_copy",
     "scalar.transformer = copy_of(model.transformer, share)",
     "scalar.transformer = copy_of(model.transformer, True)"),

    # -- some positions alone
    ("positions: the last block takes the next ones", SOME,
     "torch.searchsorted(inside, index)",
     "torch.searchsorted(inside, index, right=True).clamp(max=len(inside) - 1)"),
    ("positions: rows laid end to end are one sequence", SOME,
     "inner.inside % T  # (M,)",
     "torch.arange(len(inner.inside), device=ids.device) % T  # (M,)"),
    ("positions: without padding, but a row's keys in the next row's places", SOME,
     "index_copy(0, inside, heads)",
     "index_copy(0, torch.arange(len(inside), device=heads.device), heads)"),

    # -- the dialects, activations computed again
    ("rotary: turns the wrong way", ROTARY,
     "torch.cat([-b, a], -1)",
     "torch.cat([b, -a], -1)"),
    ("rotary: neighbours share an angle, halves are turned", ROTARY,
     ".repeat(*[1] * positions.ndim, 2)",
     ".repeat_interleave(2, -1)"),
    ("rotary: a decoded token stands one later",
     "test_generate.py::test_cached_batched_greedy_equals_each_row_alone_without_a_cache",
     "turns = at[:, None]",
     "turns = at[:, None] + 1"),
    ("rotary: llama3's smooth part inverted", SCALING,
     "(1 - keep) * stretched + keep * frequencies",
     "keep * stretched + (1 - keep) * frequencies"),
    ("rotary: wavelengths divided by the factor", SCALING,
     "stretched = frequencies / factor",
     "stretched = frequencies * factor"),
    ("RMSNorm: eps forgotten", "test_model.py::test_every_norm_has_the_eps_of_the_config",
     "RMSNorm(config.n_embd, config.norm_eps)",
     "RMSNorm(config.n_embd)"),
    ("grouped heads: they take turns at keys and values", GROUPED,
     "(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)",
     "(q, *(x.repeat(1, self.n_head // self.n_kv_head, 1, 1) for x in (k, v)), is_causal=True, "
     "dropout_p=dropout)"),
    ("grouped heads: keys first", GROUPED,
     "q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=1)",
     "k, q, v = heads.split([self.n_kv_head, self.n_head, self.n_kv_head], dim=1)"),
    ("swiglu: gate and up swapped",
     "formats/test_families.py::"
     "test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write[llama2]",
     "gate, x = x.chunk(2, -1)",
     "x, gate = x.chunk(2, -1)"),
    ("Qwen3: no norms on query and key",
     "formats/test_families.py::"
     "test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write[qwen3]",
     "            q = self.q_norm(q).to(v.dtype)\n            k = self.k_norm(k).to(v.dtype)\n",
     "            pass\n"),
    ("OPT: two positions early",
     "formats/test_families.py::"
     "test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write[opt]",
     "self.wpe(at + self.config.position_offset)",
     "self.wpe(at)"),
    ("OPT-350M: norms before the blocks",
     "formats/test_families.py::"
     "test_logits_and_greedy_text_equal_transformers_and_so_do_those_of_the_folder_we_write[opt-350m]",
     "        if self.norm_after:\n",
     "        if False:\n"),
    ("activations: kept in spite of the switch",
     "test_model.py::test_recomputed_activations_change_neither_loss_nor_gradients",
     "if self.checkpoint_activations and torch.is_grad_enabled():",
     "if False:"),

    # -- adapters
    ("activations: the switch set on the wrong module",
     "test_model.py::test_prepare_switches_the_recomputation_of_activations_on",
     "model.transformer.checkpoint_activations = flags.checkpoint_activations",
     "model.checkpoint_activations = flags.checkpoint_activations"),
    ("adapters: the critic's head is the reward model's",
     "test_model.py::test_a_twin_that_shares_is_the_base_whatever_adapters_the_original_gets",
     "model.score.weight = nn.Parameter(model.score.weight.detach().clone())",
     "model.score.requires_grad_(True)"),
    ("lora: alpha isn't divided by the rank", "test_model.py::test_an_adapter_is_its_formula",
     "self.scale = alpha / rank",
     "self.scale = alpha"),
    ("lora: dropout outside training",
     "test_model.py::test_dropout_is_of_the_adapters_inputs_and_while_training_only",
     "dropped = F.dropout(x, self.dropout, self.training)",
     "dropped = F.dropout(x, self.dropout)"),
    ("lora: the base is trained too", TRAINED,
     "    model.requires_grad_(False)\n    if isinstance(model, ScalarModel):\n",
     "    if isinstance(model, ScalarModel):\n"),
    ("lora: the scalar head is frozen", TRAINED,
     "model.score.weight = nn.Parameter(model.score.weight.detach().clone())",
     "model.score.weight = nn.Parameter(model.score.weight.detach().clone(), requires_grad=False)"),
    ("lora: A begins at zero like B", TRAINED,
     "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
     "nn.init.zeros_(self.lora_A)"),
    ("lora: merged without its scale",
     "test_model.py::test_merged_weights_compute_what_the_adapters_do_and_leave_them_alone",
     "weight + self.scale * lora_B @ lora_A",
     "weight + lora_B @ lora_A"),

    # -- a second device, shards in a GPU's precision
    ("device: a pass waits for the copy of its positions", NO_PASS_WAITS,
     "        at = at.to(ids.device, non_blocking=True)\n",
     "        at = at.to(ids.device)\n"),
    ("device: the critic's passes ask the device where the mask is", NO_PASS_WAITS,
     "    at = token_index(mask)  # (N,)\n    values",
     "    at = token_index(mask.to(ids.device, non_blocking=True)).cpu()\n    values"),
    ("device: rotary wavelengths on the CPU",
     "whole/test_second_device.py::test_every_family_goes_through_ppo_and_its_numbers_are_those_of_the_cpu",
     "torch.arange(0, D, 2, device=positions.device)",
     "torch.arange(0, D, 2)"),
    ("shards: norms round the residual stream", ROUNDED,
     "wide = torch.promote_types(x.dtype, weight.dtype)",
     "wide = weight.dtype"),
    ("shards: norms take weights in another precision", ROUNDED,
     "return x.to(wide), weight.to(wide), bias",
     "return x, weight, bias"),
]
