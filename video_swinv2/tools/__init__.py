"""Is this machine fit (`doctor`), and does the whole path work on it (`demo`)?"""
