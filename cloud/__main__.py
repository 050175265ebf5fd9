"""`python -m cloud`: see `cli`."""

from cloud.cli import main

main()
