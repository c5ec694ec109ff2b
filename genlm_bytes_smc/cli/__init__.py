"""The command line, `genlm-bytes-smc`. Each command imports what it needs when it runs."""

from genlm_bytes_smc.cli.app import app, main

__all__ = ["app", "main"]
