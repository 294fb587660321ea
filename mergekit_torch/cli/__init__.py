"""The ``mkrs`` command."""
