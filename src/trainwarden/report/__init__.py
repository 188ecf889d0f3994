"""What a person sees: the console during a run, the summary at its end, the list and pages of past runs."""
