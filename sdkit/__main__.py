"""`python -m sdkit` is `sdkit`."""

from sdkit.cli import main

main()
