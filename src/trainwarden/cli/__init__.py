"""The ``warden`` command: parses arguments, calls the rooms above, prints what they return."""
