"""The tests. A regular package, so that another package of this name, installed by some library, is not taken for it."""
