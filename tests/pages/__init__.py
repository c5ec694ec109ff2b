"""Pages in a real browser; `make test-pages` installs one and runs them."""
