"""`python -m bridge_stg`: the command line."""

from .cli import main

main()
