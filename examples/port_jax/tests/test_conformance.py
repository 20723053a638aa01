from moe_ref.conformance.suite import *  # noqa: D100, F403
