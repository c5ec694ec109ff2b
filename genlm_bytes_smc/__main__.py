"""`python -m genlm_bytes_smc`: the command line."""

import sys

from genlm_bytes_smc.cli import main

sys.exit(main())
