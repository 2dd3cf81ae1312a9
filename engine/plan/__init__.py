"""The plan: from headers, request, ceilings and device facts to placements and predicted peaks; needs no torch."""

from .budget import Budget, Choices, parse_size, size_text
from .choose import Ceilings
from .extractor import ExtractorPlan, plan_extraction
from .facts import DeviceFacts
from .jobs import JobFacts, foresee
from .make import Plan, make_plan
from .model import ModelFacts
from .phases import PhasePlan
from .placement import Blocks
from .vl import Extraction, ExtractorFacts

__all__ = [
    "Blocks",
    "Budget",
    "Ceilings",
    "Choices",
    "DeviceFacts",
    "Extraction",
    "ExtractorFacts",
    "ExtractorPlan",
    "JobFacts",
    "ModelFacts",
    "PhasePlan",
    "Plan",
    "foresee",
    "make_plan",
    "parse_size",
    "plan_extraction",
    "size_text",
]
