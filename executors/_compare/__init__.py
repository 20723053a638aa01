"""All executors on one layer: judged, timed, measured, reported."""
