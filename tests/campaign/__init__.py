"""Random problems, their statuses held against extended precision: ``python -m tests.campaign``."""
