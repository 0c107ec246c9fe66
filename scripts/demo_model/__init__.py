"""Parts of ``scripts/make_demo_model.py``, imported by that script only."""
