"""Several processes that train as one: agreeing, sharing examples out, DDP and FSDP.

Every decision that steers the program comes from a value that all ranks agreed on, and every rank makes as
many forward passes: else one would wait for ever for what another doesn't send.
"""
import contextlib
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from plumbing.flags import require


def local(tensor):
    """The part of a tensor that this rank has: all of it unless it is sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Ranks:
    """The processes of a run.

    Attributes: rank, world_size, main (bool: rank 0, which alone writes), mesh (None unless weights are
    sharded). A subclass sets device, dtype and step.
    """

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.mesh = None
        # How often this rank has come to a place where it may wait for others.
        self.arrivals = 0
        self.timeout = 0.0

    def join(self, sharded, timeout):
        """Meet the other ranks, if there are any; wait for one at most timeout seconds.

        sharded: `parallel` means FSDP.
        """
        if sharded and self.device.type == "cpu":
            from torch.distributed.fsdp import FSDPModule
            require(hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),
                    f"--parallel fsdp on a CPU needs PyTorch 2.8 or newer, this is {torch.__version__}; "
                    "use --parallel ddp")
        if self.world_size == 1 and not sharded:
            return
        if self.world_size > 1:
            store = next(dist.rendezvous("env://", self.rank, self.world_size))[0]
        else:
            store = dist.HashStore()
        self.store = dist.PrefixStore("run", store)
        self.timeout = timeout
        wait = timedelta(seconds=timeout)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=wait)
        # A second group on the CPU: the ranks can agree over it without waiting for a GPU.
        self.control = dist.new_group(backend="gloo", timeout=wait)
        self._arrive()
        if sharded:
            self.mesh = dist.init_device_mesh(self.device.type, (self.world_size,))

    # -- agreeing

    def _all(self, tensor, how):
        if self.world_size > 1:
            self._arrive()
            dist.all_reduce(tensor, how)
        return tensor

    def all_sum(self, tensor):
        """Sum of a tensor over all ranks."""
        return self._all(tensor, dist.ReduceOp.SUM)

    def all_min(self, tensor):
        """Minimum of a tensor over all ranks."""
        return self._all(tensor, dist.ReduceOp.MIN)

    def all_max(self, tensor):
        """Maximum of a tensor over all ranks."""
        return self._all(tensor, dist.ReduceOp.MAX)

    def any_rank(self, flag):
        """Whether flag holds on any rank; all of them must ask."""
        if self.world_size == 1:
            return flag
        self._arrive()
        seen = torch.tensor(float(flag))
        dist.all_reduce(seen, dist.ReduceOp.MAX, self.control)
        return bool(seen)

    def _arrive(self):
        """Leave word of how far this rank has come, for `blame`."""
        if self.world_size > 1:
            self.arrivals += 1
            self.store.set(f"arrivals{self.rank}", str(self.arrivals))

    def blame(self):
        """What to say when the ranks have lost each other: which of them are behind."""
        try:
            arrivals = [int(self.store.get(f"arrivals{rank}")) for rank in range(self.world_size)]
        except Exception:
            # The process that holds the store is gone, too.
            arrivals = [0] * self.world_size
        behind = [str(rank) for rank, count in enumerate(arrivals) if count < max(arrivals)]
        return (f"rank {self.rank} has lost the others in step {self.step + 1} "
                f"(--rank-timeout {self.timeout:g} s); "
                f"the rank that died or stalled: {', '.join(behind) or 'unknown'}. "
                "--resume goes on from the last checkpoint")

    # -- sharing out

    def split(self, examples, lengths, budget, rows=None):
        """This rank's part of examples, cut into forward passes of at most budget padded tokens.

        examples: the same list on all ranks. lengths, rows: see `data.token_batches`.
        Returns [(examples, weight)]; every rank gets as many. One that has fewer takes the first example
        again with weight 0.0, which must multiply what the pass adds to any sum; else the weight is 1.0.
        """
        passes_of_rank = []
        for rank in range(self.world_size):
            share = examples[rank::self.world_size]
            passes_of_rank.append(by_length(share, lengths, budget, rows))
        most = max(len(passes) for passes in passes_of_rank)
        return fill_up(passes_of_rank[self.rank], most, examples[:1])

    def parallel(self, module):
        """The module on the device: in DDP if several ranks train it, in shards with --parallel fsdp."""
        if self.mesh is not None:
            return self._shard(module)
        module = module.to(self.device)
        trained = any(p.requires_grad for p in module.parameters())
        if self.world_size > 1 and trained:
            # Without device_ids, as the inputs are on the right device already.
            return torch.nn.parallel.DistributedDataParallel(module)
        return module

    def _shard(self, module):
        """The module, the same object, with its weights cut in shards, one for each rank.

        FSDP2 gathers a block's weights when it is computed, in the precision of its products, and adds
        gradients up in float32.
        """
        # Imported here, as it takes half a second and 45 MB that only --parallel fsdp needs.
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        products = None if self.dtype == torch.float32 else self.dtype
        # What comes into a block stays as it is: the residual stream is float32.
        policy = MixedPrecisionPolicy(products, torch.float32, cast_forward_inputs=False)
        # This warning would matter if somebody wrote to that view; nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        for block in module.transformer.h:
            fully_shard(block, mesh=self.mesh, mp_policy=policy)
        fully_shard(module, mesh=self.mesh, reshard_after_forward=False)
        if self.device.type == "cpu":
            # What Gloo calls an average is a sum in some versions of PyTorch, so it is asked for the sum.
            for part in (*module.transformer.h, module):
                part.set_force_sum_reduction_for_comms(True)
        return module

    @contextlib.contextmanager
    def gathered(self, module):
        """While it lasts, every rank has all of the module's weights.

        For generating: FSDP would gather each block again for each token.
        """
        shards = [part for part in module.modules() if hasattr(part, "unshard")]
        for part in shards:
            part.unshard()
        yield
        for part in shards:
            part.reshard()


@torch.no_grad()
def write_weight(module, name, value):
    """Write a value into a module's parameter, into each rank's part of it where the module is in shards."""
    if hasattr(module, "reshard"):
        # What a forward pass gathered would be out of date.
        module.reshard()
    parameter = module.get_parameter(name)
    value = value.to(parameter.device, parameter.dtype)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def fill_up(pieces, count, spare):
    """Pieces of a rank with their weight, count of them: see `Ranks.split`."""
    weighted = [(piece, 1.0) for piece in pieces]
    missing = count - len(pieces)
    return weighted + [(list(spare), 0.0)] * missing


def whole_weights(model):
    """{name: tensor} of a model.

    Of one in shards: whole tensors on the CPU of rank 0, nothing on the others; all of them must call.
    """
    weights = model.state_dict()
    first = next(iter(weights.values()))
    if type(first) is torch.Tensor:
        return weights
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def micro_batches(examples, lengths, budget, rows=None):
    """Cut examples, in their order, into pieces of at most budget padded tokens (at least one example each).

    lengths, rows: see `token_batches`. A piece is padded to its longest row, all rows of its examples.
    """
    pieces = []
    # Of the piece that is being filled, if this example is added to it: its longest row, and how many rows.
    longest, height = 0, 0
    for i in examples:
        # How many rows this example adds: a prompt may come with several replies.
        own = 1 if rows is None else rows[i]
        longest, height = max(longest, lengths[i]), height + own
        if not pieces or longest * height > budget:
            pieces.append([])
            longest, height = lengths[i], own
        pieces[-1].append(int(i))
    return pieces


def by_length(examples, lengths, budget, rows=None):
    """micro_batches of examples sorted by length, for the least padding.

    The loss is a sum over all of them, which no order of the pieces can change.
    """
    in_order = sorted(examples, key=lambda i: (lengths[i], i))
    return micro_batches(in_order, lengths, budget, rows)
