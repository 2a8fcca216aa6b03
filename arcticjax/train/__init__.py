"""Training: `python -m arcticjax.train --config FILE`."""
