"""The parts of the web page: how it looks, what it answers, what it tells of a run."""
