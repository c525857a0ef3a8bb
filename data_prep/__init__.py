"""Raw videos -> a checked data set that is fast to read. Run as `python -m data_prep VERB`; cli.py has the verbs."""
