"""Several processes that train as one: agreeing, sharing examples out, DDP and FSDP.

Every decision that steers the program comes from a value that all ranks agreed on, and every rank makes as many forward passes: else one
would wait for ever for what another doesn't send.
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
    """The processes of a run. Attributes: rank, world_size, main (bool: rank 0, which alone writes); a subclass sets device, dtype and step."""

    def __init__(self):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, self.mesh, self.arrivals, self.timeout = self.rank == 0, None, 0, 0.0

    def join(self, sharded, timeout):
        """Meet the other ranks, if there are any; wait for one at most timeout seconds. sharded: `parallel` means FSDP."""
        if sharded and self.device.type == "cpu":
            from torch.distributed.fsdp import FSDPModule
            require(hasattr(FSDPModule, "set_force_sum_reduction_for_comms"),
                    f"--parallel fsdp on a CPU needs PyTorch 2.8 or newer, this is {torch.__version__}; "
                    "use --parallel ddp")
        if self.world_size == 1 and not sharded:
            return
        store = next(dist.rendezvous("env://", self.rank, self.world_size))[0] if self.world_size > 1 else dist.HashStore()
        self.store, self.timeout, wait = dist.PrefixStore("run", store), timeout, timedelta(seconds=timeout)
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank, world_size=self.world_size, timeout=wait)
        self.control = dist.new_group(backend="gloo", timeout=wait)  # to agree over without waiting for a GPU
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
        except Exception:  # the process that holds the store is gone, too
            arrivals = [0] * self.world_size
        behind = ", ".join(str(rank) for rank, count in enumerate(arrivals) if count < max(arrivals)) or "unknown"
        return (f"rank {self.rank} has lost the others in step {self.step + 1} (--rank-timeout {self.timeout:g} s); "
                f"the rank that died or stalled: {behind}. --resume goes on from the last checkpoint")

    # -- sharing out

    def split(self, examples, lengths, budget, rows=None):
        """This rank's part of examples, the same list on all ranks, cut into forward passes of at most budget padded tokens: [(examples, weight)].
        lengths, rows: see `data.token_batches`.

        Every rank gets as many. One that has fewer takes the first example again with weight 0.0, which must multiply what the pass
        adds to any sum; else the weight is 1.0.
        """
        parts = [by_length(examples[rank::self.world_size], lengths, budget, rows) for rank in range(self.world_size)]
        return fill_up(parts[self.rank], max(map(len, parts)), examples[:1])

    def parallel(self, module):
        """The module on the device: in DDP if there are several ranks and it is trained; with --parallel fsdp cut in shards (it is the same object then).

        FSDP2 gathers a block's weights when it is computed, in the precision of its products, and adds gradients up in float32.
        """
        if self.mesh is None:
            module = module.to(self.device)
            trained = any(p.requires_grad for p in module.parameters())
            return torch.nn.parallel.DistributedDataParallel(module) if self.world_size > 1 and trained else module  # without device_ids: inputs are where they should be
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # half a second and 45 MB, for --parallel fsdp alone
        products = None if self.dtype == torch.float32 else self.dtype
        # What comes into a block stays as it is: the residual stream is float32.
        policy = MixedPrecisionPolicy(products, torch.float32, cast_forward_inputs=False)
        # It would matter if somebody wrote to that view.
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
        """While it lasts, every rank has all of the module's weights: to generate with, as FSDP would gather each block for each token."""
        shards = [part for part in module.modules() if hasattr(part, "unshard")]
        for part in shards:
            part.unshard()
        yield
        for part in shards:
            part.reshard()


def fill_up(pieces, count, spare):
    """Pieces of a rank with their weight, count of them: see `Ranks.split`."""
    return [(piece, 1.0) for piece in pieces] + [(list(spare), 0.0)] * (count - len(pieces))


def whole_weights(model):
    """{name: tensor} of a model. Of one in shards: whole tensors on the CPU of rank 0, nothing on the others; all of them must call."""
    weights = model.state_dict()
    if type(next(iter(weights.values()))) is torch.Tensor:
        return weights
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def micro_batches(examples, lengths, budget, rows=None):
    """Cut examples, in their order, into pieces of at most budget padded tokens (at least one example each).

    lengths, rows: see `token_batches`. A piece is padded to its longest row, all rows of its examples.
    """
    pieces, longest, height = [], 0, 0
    for i in examples:
        own = 1 if rows is None else rows[i]
        longest, height = max(longest, lengths[i]), height + own
        if not pieces or longest * height > budget:
            pieces.append([])
            longest, height = lengths[i], own
        pieces[-1].append(int(i))
    return pieces


def by_length(examples, lengths, budget, rows=None):
    """micro_batches of examples sorted by length: the least padding; no order of pieces can change a summed loss."""
    return micro_batches(sorted(examples, key=lambda i: (lengths[i], i)), lengths, budget, rows)
