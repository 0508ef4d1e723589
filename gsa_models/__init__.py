"""The mathematics alone: global self-attention, the networks made of it, their names and their cost."""

from gsa_models.attention import GlobalSelfAttention
from gsa_models.cost import PAPER_TABLE, Cost, model_cost
from gsa_models.zoo import create_model, list_models, parse_components, parse_placement

__all__ = [
    "PAPER_TABLE",
    "Cost",
    "GlobalSelfAttention",
    "create_model",
    "list_models",
    "model_cost",
    "parse_components",
    "parse_placement",
]
