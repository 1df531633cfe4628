"""`python -m atedm` is `atedm`."""

from atedm.cli import main

main()
