"""The parts of train_demo_heads.py: what the heads are trained on, and how."""
