"""Wrong invocations of every command: generated from the commands, run in forked processes, and
judged.

samples.py     valid inputs of every kind, made once by the commands themselves
damage.py      generic damage to a file of each format
cases.py       the invocations: wrong flags, wrong paths, damaged files, odd environments
execution.py   one invocation in a process of its own: limits, exit code, what it printed and what
it left behind
"""
