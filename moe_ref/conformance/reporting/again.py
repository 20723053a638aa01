"""All names that a failure's call has: ``from moe_ref.conformance.reporting.again import *``."""

from executors import get
from moe_ref.conformance.citizen import check_citizen
from moe_ref.conformance.judgement.checks import check_problem, check_repeatable
from moe_ref.conformance.judgement.errors import check_errors, check_undeclared_weights
from moe_ref.conformance.judgement.exact import check_exact
from moe_ref.conformance.judgement.exact_decode import check_every_code
from moe_ref.conformance.judgement.invariance import check_batch_invariance
from moe_ref.conformance.judgement.laws import check_law
from moe_ref.conformance.judgement.ranges import check_range
from moe_ref.conformance.judgement.second_derivatives import check_second_derivatives
from moe_ref.conformance.problems.problem import Problem
from moe_ref.conformance.reporting.saved import check_saved
from moe_ref.conformance.vectors.judging import check_vector
from moe_ref.conformance.vectors.reading import read_folder
from moe_ref.types import MoEConfig

__all__ = [
    "MoEConfig",
    "Problem",
    "check_batch_invariance",
    "check_citizen",
    "check_errors",
    "check_every_code",
    "check_exact",
    "check_law",
    "check_problem",
    "check_range",
    "check_repeatable",
    "check_saved",
    "check_second_derivatives",
    "check_undeclared_weights",
    "check_vector",
    "get",
    "read_folder",
]
