"""What every executor stands on: operators, their arguments, the public calls, routing."""
