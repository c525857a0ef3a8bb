"""The tests: a regular package, so that another one of this name, installed by some library, is not taken for it."""
