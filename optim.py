"""AdamW, the learning rate's schedule, and steps that are not taken because a number is not finite."""
import contextlib
import json
import math

import torch
from tqdm import tqdm

from ranks import Ranks, local


def scheduled_lr(step, steps, warmup, peak, schedule="cosine"):
    """Learning rate of a step (from 0): linear warm-up, then cosine to a tenth of peak, linear to 0, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1 - progress) if schedule == "linear" else peak


def adamw(model, lr, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """AdamW; matrices decay, but not norms, biases and embeddings (which are 1-D or named w?e)."""
    decay, keep = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (keep if p.ndim < 2 or name.endswith(("wte.weight", "wpe.weight")) else decay).append(p)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


class Optimizing(Ranks):
    """The optimiser steps of a run. A subclass sets config, optimizers, parameter_names, state, out, step.

    Attributes: clean (bool: nothing that is saved has changed since the step began); problem (str: why the run must end, if it must).
    """

    def __init__(self):
        super().__init__()
        self.scalers, self.attempts, self.skipped, self.spikes, self.problem, self.clean = {}, [], 0, 0, "", False

    def _scaler(self, optimizer):
        """The optimiser's gradient scaler; it does nothing unless products are in float16."""
        if optimizer not in self.scalers:
            self.scalers[optimizer] = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        return self.scalers[optimizer]

    def backward(self, loss, optimizer):
        """Accumulate gradients of a loss that is divided by the GLOBAL count: DDP and FSDP average over ranks, so multiply back."""
        self._arrive()
        self._scaler(optimizer).scale(loss * self.world_size).backward()

    def optimizer_step(self, optimizer, lr, max_grad_norm, batch):
        """Clip the gradients' global norm, step at lr, clear gradients. Returns the norm before clipping (a tensor).

        A norm that is not finite steps nothing (decided on the device, without waiting for it); `_look` then reports batch, the examples' numbers.
        """
        self.clean = False
        scaler = self.scalers[optimizer]
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = lr
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([p.grad for p in parameters]))  # (P,)
        norms = norms.full_tensor() if hasattr(norms, "full_tensor") else norms
        norm = norms.norm()
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        bad = ~norm.isfinite()
        if self.config.skip_sigma > 0:
            bad = bad | self._spikes(optimizer, norm)
        if not scaler.is_enabled():  # float16's scaler skips by itself, and lowers the scale
            self.attempts.append((bad, norms, parameters, batch))
            if optimizer.defaults["fused"]:
                optimizer.found_inf = bad.float()
        if optimizer.defaults["fused"] or not bad:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _spikes(self, optimizer, norm):
        """Whether a gradient norm is more than --skip-sigma deviations above the mean of the optimiser's last 100."""
        name = next(name for name, other in self.optimizers.items() if other is optimizer)
        norms = self.state.setdefault("norms", {}).setdefault(name, [])
        last, value = torch.tensor(norms), norm.item()
        spikes = len(last) >= 20 and value > last.mean() + self.config.skip_sigma * last.std()
        if math.isfinite(value) and not spikes:
            self.state["norms"][name] = [*norms, value][-100:]
        return torch.tensor(bool(spikes), device=norm.device)

    def finite(self, what, values, batch):
        """Whether values (B,) are finite on all ranks; if not, the examples whose values are not are reported, and the step counts as skipped."""
        bad = ~values.isfinite()
        if not self.any_rank(bool(bad.any())):
            return True
        self._report(what, [i for i, b in zip(batch, bad.tolist()) if b], bool(bad.any()))
        return False

    def _look(self):
        """Report the optimiser steps since the last look that were not taken."""
        attempts, self.attempts = self.attempts, []
        if attempts:
            for skipped, (_, norms, parameters, batch) in zip(torch.stack([bad for bad, *_ in attempts]).tolist(), attempts):
                if skipped:
                    bad = self.all_max(torch.stack([~local(p).isfinite().all() for p in self.parameter_names]).float())  # each rank may see its shards alone
                    broken = [name for name, found in zip(self.parameter_names.values(), bad.tolist()) if found]
                    odd = (~norms.isfinite()).nonzero()
                    gradient = self.parameter_names[parameters[odd[0].item()]] if len(odd) else ""
                    self._report(f"the weight {broken[0]}" if broken else f"the gradient of {gradient}" if gradient else "", batch, self.main)

    def _report(self, what, batch, show):
        self.skipped, self.spikes = self.skipped + bool(what), self.spikes + (not what)
        limit = self.config.max_skipped
        text = f"{what} is not finite" if what else f"the gradient's norm is more than --skip-sigma {self.config.skip_sigma:g} deviations above the last ones"
        shown = ", ".join(map(str, batch[:8])) + (", ..." if len(batch) > 8 else "")
        if show:
            tqdm.write(f"warning: step {self.step + 1}: {text}; this batch changed nothing (examples {shown}; all are in skipped.jsonl). Skipped so far: {self.skipped + self.spikes}")
            with contextlib.suppress(OSError), open(self.out / "skipped.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": self.step + 1, "why": text, "examples": list(batch)}) + "\n")
        if self.skipped > limit and what:
            self.problem = f"step {self.step + 1}: {text}, and more than --max-skipped {limit} batches were skipped; lower the learning rate, or look at the data"
