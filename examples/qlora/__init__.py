"""The parts of examples/qlora_finetune.py."""
