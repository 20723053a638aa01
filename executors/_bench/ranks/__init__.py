"""``bench --ranks``: expert parallelism on processes of this machine, against transformers' and against one process."""
