"""What other people use, as contenders of the benchmark."""
