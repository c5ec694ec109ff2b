"""`python -m benchmarks` is `python -m benchmarks.beam`."""

from benchmarks.beam import main

if __name__ == "__main__":
    main()
