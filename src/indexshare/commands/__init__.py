"""Groups of subcommands; `cli.py` names them, and each is imported only when it runs."""
