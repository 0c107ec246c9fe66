"""The rooms of ``scripts/make_demo_model.py``: one noun each, imported by that script only."""
