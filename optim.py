"""AdamW and the learning rate's schedule."""
import math

import torch


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
