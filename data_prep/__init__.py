"""Raw clips in, a checked and quickly read data set out. Run as `python -m data_prep VERB`."""
