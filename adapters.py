"""Low-rank adapters: train a few rows beside matrices that stay as they are (LoRA, Hu et al. 2021)."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ScalarModel


class LoRALinear(nn.Linear):
    """x W^T + b + (alpha / rank) dropout(x) A^T B^T with W and b frozen (Hu et al. 2021, eq. 3). B starts at zero."""

    def __init__(self, linear, rank, alpha, dropout):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.rank, self.scale, self.dropout = linear.weight, linear.bias, rank, alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=self.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (..., rank)
        return super().forward(x) + self.scale * F.linear(low, self.lora_B)

    def merge(self, weight, lora_A, lora_B):
        """(out, in): W + scale B A."""
        return (weight + self.scale * lora_B @ lora_A).detach()

    def merged(self):
        return self.merge(self.weight, self.lora_A, self.lora_B)


LORA_TARGETS = {"attention": ("attn.c_attn", "attn.c_proj"), "mlp": ("mlp.c_fc", "mlp.c_proj"),
                "all": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def add_lora(model, rank, alpha, dropout, targets):
    """Freeze the model but for a scalar head, and put adapters on the matrices of every block that `targets` names (see LORA_TARGETS).

    Query, key and value are one matrix here, so they share A; each has rows of B of its own. Works in place.
    """
    model.requires_grad_(False)
    if isinstance(model, ScalarModel):  # a head of its own: what this model was made from as a `twin` keeps the old one
        model.score.weight = nn.Parameter(model.score.weight.detach().clone())
    for block in model.transformer.h:
        for target in LORA_TARGETS[targets]:
            part, name = target.split(".")
            setattr(getattr(block, part), name, LoRALinear(getattr(getattr(block, part), name), rank, alpha, dropout))


def prepare(model, flags):
    """What --lora-rank, --checkpoint-activations and --compile ask for, done to a model that is about to be trained."""
    model.transformer.checkpoint_activations = flags.checkpoint_activations
    if flags.lora_rank > 0:
        torch.manual_seed(flags.seed)
        add_lora(model, flags.lora_rank, flags.lora_alpha, flags.lora_dropout, flags.lora_targets)
    if flags.compile:
        for block in model.transformer.h:  # alike, so that they share what is compiled; dynamic: for any number of rows and tokens
            block.compile(dynamic=True)


def whole_weights(model):
    """{name: tensor} of a model. Of one in shards: whole tensors on the CPU of rank 0, nothing on the others; all of them must call."""
    weights = model.state_dict()
    if type(next(iter(weights.values()))) is torch.Tensor:
        return weights
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@torch.no_grad()
def merged_weights(model, weights=None):
    """{name: tensor} of a model as its adapters, if it has any, make it: W + (alpha / rank) B A, and no adapter left. weights: see `whole_weights`."""
    weights = dict(weights or model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            weights[name + ".weight"] = module.merge(*(weights[f"{name}.{part}"] for part in ("weight", "lora_A", "lora_B")))
    return {name: p.detach() for name, p in weights.items() if ".lora_" not in name}
