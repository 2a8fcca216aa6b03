"""Which implementation of attention a device runs: what it can, and what was measured fastest.

`attention_times.json` holds what `python -m benchmarks.attention --write` measured, one entry for
each device kind, head size, row length and dtype. What was not measured goes by what is nearest: a
device of the same kind, else of the same platform; then the head size, then the row length. A
platform or dtype without any entry gets `xla`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from arcticjax.errors import ConfigError
from arcticjax.models.attention import SPLASH_NO_WINDOW, Implementation

TABLE = Path(__file__).with_name("attention_times.json")
KEY = ("platform", "device_kind", "head_size", "row_length", "dtype")
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "looped", "cudnn", "packed", "splash")


def refusal(
    implementation: Implementation,
    *,
    platform: str,
    dtype: str,
    head_size: int,
    row_length: int,
    windowed: bool = False,
) -> str | None:
    """Why an implementation cannot run so, or None.

    platform: cpu, gpu or tpu. windowed: some layers attend within windows. Sources: jax's
    check_is_flash_attention
    (jax/_src/cudnn/fused_attention_stablehlo.py: head size, even rows with a mask in training),
    NUM_LANES in its splash_attention_kernel.py, and cuDNN's need of bfloat16 or float16. Splash
    takes float32 but multiplies it as bfloat16, so that is refused, too.
    """
    if implementation in ("xla", "looped"):
        return None
    if implementation == "splash" and windowed:
        return SPLASH_NO_WINDOW
    needed = {"cudnn": "gpu", "packed": "gpu", "splash": "tpu"}[implementation]
    if platform != needed:
        return f"it runs on {needed}, the devices are {platform}"
    if dtype != "bfloat16":
        return f"it computes in bfloat16, train.precision is {dtype}"
    if implementation == "cudnn":
        if head_size % 8 or head_size > 128:
            return f"it takes heads of a multiple of 8 up to 128, the model's have {head_size}"
        if row_length % 2:
            return f"it takes rows of even length; data.row_length is {row_length}"
    elif implementation == "packed":
        if head_size not in (16, 32, 64, 128):
            return f"it takes heads of 16, 32, 64 or 128, the model's have {head_size}"
        if row_length % 64:
            return (
                f"it takes rows of a multiple of 64 tokens, these have {row_length} "
                f"(data.row_length: {-(-row_length // 64) * 64} would do)"
            )
    elif row_length % 128:
        return (
            f"it takes rows of a multiple of 128 tokens, these have {row_length} "
            f"(data.row_length: {-(-row_length // 128) * 128} would do)"
        )
    return None


def choose(
    wanted: Literal["auto"] | Implementation,
    *,
    device: Any,
    dtype: str,
    head_size: int,
    row_length: int,
    windowed: bool = False,
    table: Path = TABLE,
) -> Implementation:
    """The implementation to use on devices like `device`; `auto` takes the fastest by the table's
    nearest entry, `xla` where it has none. Raises ConfigError where `wanted` cannot run."""
    shape: Any = {"dtype": dtype, "head_size": head_size, "row_length": row_length}
    if wanted != "auto":
        reason = refusal(wanted, platform=device.platform, windowed=windowed, **shape)
        if reason is not None:
            raise ConfigError(
                f"train.attention: {wanted} cannot be used: {reason}; set train.attention to xla "
                "or auto"
            )
        return wanted
    found = nearest(measured(table), device, **shape)
    chosen: Implementation = "xla"
    for one in IMPLEMENTATIONS:
        reason = refusal(one, platform=device.platform, windowed=windowed, **shape)
        if one in found and reason is None and found[one] < found[chosen]:
            chosen = one
    return chosen


def nearest(
    times: Mapping[tuple[Any, ...], dict[str, float]],
    device: Any,
    *,
    dtype: str,
    head_size: int,
    row_length: int,
) -> dict[str, float]:
    """Milliseconds of the nearest entry, of the device's platform and the same dtype; empty where
    there is none."""

    def distance(key: tuple[Any, ...]) -> tuple[Any, ...]:
        _, kind, head, row, _ = key
        return (
            kind != device.device_kind,
            abs(math.log(head / head_size)),
            abs(math.log(row / row_length)),
        )

    alike = [key for key in times if (key[0], key[-1]) == (device.platform, dtype)]
    return times[min(alike, key=distance)] if alike else {}


def measured(table: Path = TABLE) -> dict[tuple[Any, ...], dict[str, float]]:
    """Milliseconds by implementation, for each key in the order of `KEY`."""
    return {
        tuple(entry[name] for name in KEY): entry["milliseconds"]
        for entry in json.loads(table.read_text())
    }
