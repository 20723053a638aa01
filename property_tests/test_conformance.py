from moe_ref.conformance.suite import *  # noqa: F403
