"""One pass over rows of mixed depth: sampling, scores and the backends. Devices are told apart here only."""
