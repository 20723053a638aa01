"""What expert parallelism costs on many devices: bytes, balance, memory and least times, on paper and by simulation."""
