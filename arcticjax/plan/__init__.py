"""Planning: `python -m arcticjax.plan --config FILE --topology v5e:16x16`."""
