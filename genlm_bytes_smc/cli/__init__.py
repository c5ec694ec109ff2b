"""The command line, `genlm-bytes-smc`: options, one module for related commands, and output.

Nothing in the library imports it. A command checks its options, calls the library and prints; what
users of the library may want too belongs there. `app` and `options` are imported for a help page,
so they import neither numpy nor torch; the other modules are imported when their command runs.
"""

from genlm_bytes_smc.cli.app import app, main

__all__ = ["app", "main"]
