"""AdamW, the learning rate's schedule, and steps that are not taken because a number is not finite."""
import contextlib
import json
import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from plumbing.ranks import Ranks, local


def scheduled_lr(step, steps, warmup, peak, schedule="cosine"):
    """Learning rate of a step (counted from 0).

    A linear warm-up, and then by schedule: cosine to a tenth of peak, linear to 0, or constant.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "constant":
        return peak
    raise ValueError(f"unknown schedule {schedule}")


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW; matrices decay, but not norms, biases and embeddings (which are 1-D or named w?e)."""
    decay, keep = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or name.endswith(("wte.weight", "wpe.weight")):
            keep.append(p)
        else:
            decay.append(p)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    # PyTorch has a fused AdamW for these devices.
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def parameters_of(optimizer):
    """All parameters that an optimiser steps, in its order."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


class Attempt(NamedTuple):
    """An optimiser step that may not have been taken.

    bad: () bool, it was not. norms: (P,) of the gradients of the P parameters. batch: the examples' numbers.
    """
    bad: torch.Tensor
    norms: torch.Tensor
    parameters: list
    batch: list
    scaler: torch.amp.GradScaler


class Steps(Ranks):
    """The optimiser steps of a run. A subclass sets config, optimizers, parameter_names, state, out, step.

    Attributes: clean (bool: nothing that is saved has changed since the step began); problem (str: why the
    run must end, if it must).
    """

    def __init__(self):
        super().__init__()
        self.scalers = {}
        self.attempts = []
        self.problem = ""
        self.clean = False
        # How many steps were not taken, and how many of those --max-skipped counts.
        self.skipped = 0
        self.counted = 0

    def _scaler(self, optimizer):
        """The optimiser's gradient scaler; it does nothing unless products are in float16."""
        if optimizer not in self.scalers:
            half = self.dtype == torch.float16
            self.scalers[optimizer] = torch.amp.GradScaler(self.device.type, enabled=half)
        return self.scalers[optimizer]

    def backward(self, loss, optimizer):
        """Accumulate gradients of a loss that is divided by the GLOBAL count.

        DDP and FSDP average over the ranks where a sum is wanted, so multiply back.
        """
        self._arrive()
        self._scaler(optimizer).scale(loss * self.world_size).backward()

    def optimizer_step(self, optimizer, lr, max_grad_norm, batch):
        """Clip the gradients' global norm, step at lr, clear gradients. Returns the norm before clipping, ().

        A norm that is not finite steps nothing (decided on the device, without waiting for it);
        `_report_skipped` then reports batch, the examples' numbers.
        """
        self.clean = False
        scaler = self.scalers[optimizer]
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parameters = [p for p in parameters_of(optimizer) if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))  # (P,)
        if hasattr(norms, "full_tensor"):
            norms = norms.full_tensor()
        norm = norms.norm()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)

        bad = ~norm.isfinite()
        if self.config.skip_sigma > 0:
            bad = bad | self._spikes(optimizer, norm)
        self.attempts.append(Attempt(bad, norms, parameters, batch, scaler))
        # A fused optimiser reads found_inf on the device, and changes nothing where it is 1.
        if optimizer.defaults["fused"]:
            optimizer.found_inf = bad.float()
            optimizer.step()
        elif not bad:
            optimizer.step()
        # This lowers the loss scale if `unscale_` met what is not finite, whatever `bad` says.
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _spikes(self, optimizer, norm):
        """Whether a gradient norm is a spike, as a () bool on its device.

        It is one if it lies more than --skip-sigma deviations above the mean of the optimiser's last 100.
        """
        name = next(name for name, other in self.optimizers.items() if other is optimizer)
        norms = self.state.setdefault("norms", {}).setdefault(name, [])
        last = torch.tensor(norms)
        value = norm.item()
        spikes = len(last) >= 20 and value > last.mean() + self.config.skip_sigma * last.std()
        if math.isfinite(value) and not spikes:
            self.state["norms"][name] = [*norms, value][-100:]
        return torch.tensor(bool(spikes)).to(norm.device, non_blocking=True)

    def finite(self, what, values, batch):
        """Whether values (B,) are finite on all ranks.

        If not, the examples whose values are not are reported, and the step counts as skipped.
        """
        bad = ~values.isfinite()
        if not self.any_rank(bool(bad.any())):
            return True
        culprits = [i for i, is_bad in zip(batch, bad.tolist()) if is_bad]
        self._report(f"{what} is not finite", culprits, counts=True, show=bool(culprits))
        return False

    def _report_skipped(self):
        """Report the optimiser steps since the last look that were not taken."""
        attempts, self.attempts = self.attempts, []
        if not attempts:
            return
        # One wait for the device, however many attempts there are.
        bad = torch.stack([attempt.bad for attempt in attempts]).tolist()
        for attempt, was_bad in zip(attempts, bad):
            if was_bad:
                why, counts = self._culprit(attempt)
                self._report(why, attempt.batch, counts, self.main)

    def _culprit(self, attempt):
        """(why a step was not taken, whether --max-skipped counts it).

        All ranks call, as each may have shards.
        """
        broken = torch.stack([~local(p).isfinite().all() for p in self.parameter_names]).float()
        broken = self.all_max(broken).tolist()
        for name, is_broken in zip(self.parameter_names.values(), broken):
            if is_broken:
                return f"the weight {name} is not finite", True

        infinite = (~attempt.norms.isfinite()).nonzero()
        if len(infinite) == 0:
            sigma = self.config.skip_sigma
            why = f"the gradient's norm is more than --skip-sigma {sigma:g} deviations above the last ones"
            return why, False

        parameter = attempt.parameters[infinite[0].item()]
        name = self.parameter_names[parameter]
        scale = attempt.scaler.get_scale()
        # The loss is scaled up until something overflows, and then down again.
        if attempt.scaler.is_enabled() and scale >= 1:
            why = f"the gradient of {name} overflowed float16; the loss is scaled by {scale:g} from now on"
            return why, False
        return f"the gradient of {name} is not finite", True

    def _report(self, why, batch, counts, show):
        """Say that a batch changed nothing; end the run if that happened too often.

        counts: --max-skipped counts it. show: this rank says it.
        """
        self.skipped += 1
        self.counted += counts
        if show:
            shown = ", ".join(map(str, batch[:8]))
            if len(batch) > 8:
                shown += ", ..."
            row = {"step": self.step + 1, "why": why, "examples": list(batch)}
            # A full disk, or nobody who reads, must not end the run.
            with contextlib.suppress(OSError):
                tqdm.write(f"warning: step {self.step + 1}: {why}; "
                           f"this batch changed nothing (examples {shown}; all are in skipped.jsonl). "
                           f"Skipped so far: {self.skipped}")
            with contextlib.suppress(OSError), open(self.out / "skipped.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
        limit = self.config.max_skipped
        if counts and self.counted > limit:
            self.problem = (f"step {self.step + 1}: {why}, and more than --max-skipped {limit} batches were "
                            "skipped; lower the learning rate, or look at the data")
