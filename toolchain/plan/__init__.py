"""Model x Format x Policy x Target x Gpu -> Plan, before any GPU minute is spent.

See README.md of this room.
"""

from __future__ import annotations

from toolchain.plan.choices import Choices, Override
from toolchain.plan.planner import PlanRefused, make_plan, require_clean
from toolchain.plan.policy import POLICIES, Policy, PolicyOptions, default_policy, get_policy
from toolchain.plan.types import SOURCE_DTYPE, Assignment, Calibration, Estimates, Plan, Serving

__all__ = [
    "POLICIES",
    "SOURCE_DTYPE",
    "Assignment",
    "Calibration",
    "Choices",
    "Estimates",
    "Override",
    "Plan",
    "PlanRefused",
    "Policy",
    "PolicyOptions",
    "Serving",
    "default_policy",
    "get_policy",
    "make_plan",
    "require_clean",
]
