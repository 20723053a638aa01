"""The pieces of `train_tiny.py`: a small gpt-oss model, its training, and the judgement of executors by losses."""
