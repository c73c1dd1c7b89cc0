"""What an operator runs: `python -m archive_scripts COMMAND`."""
