"""arcticjax: train Arctic-Embed text embedding models in JAX."""
