"""Bugs planted in plumbing/ranks.py, and the tests that ought to notice them."""

SPLIT = (
    "plumbing/test_sharing_out.py::"
    "test_ranks_get_every_example_once_and_as_many_pieces_each_however_few_there_are")

MUTANTS = [
    ("budget: prompts count, not their replies",
     "test_data.py::test_no_piece_and_no_batch_of_prompts_with_many_and_few_replies_is_beyond_the_budget",
     "longest, height = max(longest, lengths[i]), height + own",
     "longest, height = max(longest, lengths[i]), height + 1"),
    ("split: what fills a rank up counts", SPLIT,
     "[(list(spare), 0.0)]",
     "[(list(spare), 1.0)]"),
    ("split: ranks make as many passes as they need", SPLIT,
     "most = max(len(passes) for passes in passes_of_rank)",
     "most = len(passes_of_rank[self.rank])"),
    ("split: all examples to all ranks", SPLIT,
     "share = examples[rank::self.world_size]",
     "share = examples"),
    ("ranks: sums stay apart", "whole/test_trainers.py::test_two_ranks_train_as_one_does[sft-ddp]",
     "return self._all(tensor, dist.ReduceOp.SUM)",
     "return tensor"),
    ("shards: gathered in float32 whatever the products are",
     "faults/test_ranks.py::"
     "test_shards_gathered_in_bfloat16_train_and_generate_as_if_the_weights_were_rounded",
     "products = None if self.dtype == torch.float32 else self.dtype",
     "products = None"),
    ("shards: a PyTorch that adds up wrongly isn't refused",
     "faults/test_ranks.py::test_a_pytorch_whose_shards_add_up_wrongly_on_a_cpu_is_refused",
     'require(hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),',
     "require(FSDPModule,"),
]
