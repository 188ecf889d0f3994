"""The cases of memory_prediction.py: what is trained, how it is run for real, and what others published."""
