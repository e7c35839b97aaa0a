"""`python -m igpt` and `torchrun -m igpt`: the same as `igpt`."""

import sys

from igpt.cli import main

sys.exit(main())
