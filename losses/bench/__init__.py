"""Time and memory of the losses against a hand-written torch loss: `python -m losses.bench --help`."""
