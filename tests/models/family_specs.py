"""A tiny encoder of every family beside BERT, and transformers' model of the same weights."""

from typing import Any

import torch
import transformers

from arcticjax.models.hf_mapping import from_hf_state
from arcticjax.models.spec import ModelSpec, Rotary, Window

_SIZES: dict[str, Any] = dict(
    vocab_size=120, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48
)

SPECS = {
    "xlm-roberta": ModelSpec(
        family="xlm-roberta", pad_token_id=1, type_vocab_size=1, max_positions=64, **_SIZES
    ),
    # texts of more than 24 tokens are past the trained positions
    "nomic_bert": ModelSpec(
        family="nomic_bert",
        max_positions=64,
        rotary=Rotary(1000.0, factor=2.0, trained_positions=24),
        **_SIZES,
    ),
    "gte": ModelSpec(
        family="gte",
        type_vocab_size=1,
        max_positions=64,
        rotary=Rotary(160_000.0, divisor=8 ** (2 / 8)),
        **_SIZES,
    ),
    # layers 0 and 2 are global, layer 1 sees five tokens to each side
    "modernbert": ModelSpec(
        family="modernbert",
        type_vocab_size=0,
        max_positions=64,
        layer_norm_epsilon=1e-5,
        rotary=Rotary(160_000.0),
        window=Window(reach=5, every=2, theta=10_000.0),
        **_SIZES,
    ),
}


def torch_model(spec: ModelSpec, seed: int = 0, deviation: float = 0.15) -> torch.nn.Module:
    """A model whose every parameter matters: fresh ones have zero biases and unit scales."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**(spec.to_hf() | {"attn_implementation": "eager"}))
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(deviation * noise)
            assert parameter.requires_grad, name
    return model


def state_of(model: torch.nn.Module) -> dict:
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def from_torch(spec: ModelSpec, model: torch.nn.Module) -> dict:
    return from_hf_state(spec, state_of(model))
