"""The fields of JobSet and Kueue objects that may stand in a manifest, by hand.

Made from the Go types (kubernetes-sigs/jobset api/jobset/v1alpha2, kubernetes-sigs/kueue
apis/kueue/v1beta2), with what their comments and markers demand. A cluster would silently drop an
unknown field.
"""

from __future__ import annotations

import re
from typing import Any

# A dict: an object with these fields, `!` marking one that must be there; a list of one: a list of
# that; a type; a pattern; a tuple: one of these values; None: checked elsewhere.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_QUANTITY = (int, str)
_METADATA = {"name!": _NAME, "namespace": _NAME, "labels": None, "annotations": None}
_ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob",
            "RestartJobAndIgnoreMaxRestarts")  # fmt: skip
# Reasons of a failed Job's condition: batch/v1, JobReason*.
_REASONS = ("PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded",
            "MaxFailedIndexesExceeded", "FailedIndexes")  # fmt: skip

FIELDS: dict[str, Any] = {
    "JobSet": {
        "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
        "kind!": ("JobSet",),
        "metadata!": _METADATA,
        "spec!": {
            "suspend": bool,
            "network": {
                "enableDNSHostnames": bool,
                "subdomain": _NAME,
                "publishNotReadyAddresses": bool,
            },
            "failurePolicy": {
                "maxRestarts": int,
                "restartStrategy": ("Recreate", "BlockingRecreate"),
                "rules": [
                    {
                        "name!": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
                        "action!": _ACTIONS,
                        "onJobFailureReasons": [_REASONS],
                        "targetReplicatedJobs": [_NAME],
                    }
                ],
            },
            "replicatedJobs!": [
                {
                    "name!": _NAME,
                    "replicas": int,
                    # A Job's; see test_gke.py.
                    "template!": {"metadata": _METADATA, "spec!": None},
                }
            ],
        },
    },
    "ResourceFlavor": {
        "apiVersion!": ("kueue.x-k8s.io/v1beta2",),
        "kind!": ("ResourceFlavor",),
        "metadata!": {"name!": _NAME},
        "spec!": {"nodeLabels": None},
    },
    "ClusterQueue": {
        "apiVersion!": ("kueue.x-k8s.io/v1beta2",),
        "kind!": ("ClusterQueue",),
        "metadata!": {"name!": _NAME},
        "spec!": {
            "namespaceSelector!": None,
            "queueingStrategy": ("StrictFIFO", "BestEffortFIFO"),
            "resourceGroups!": [
                {
                    "coveredResources!": [str],
                    "flavors!": [
                        {
                            "name!": _NAME,
                            "resources!": [{"name!": str, "nominalQuota!": _QUANTITY}],
                        }
                    ],
                }
            ],
        },
    },
    "LocalQueue": {
        "apiVersion!": ("kueue.x-k8s.io/v1beta2",),
        "kind!": ("LocalQueue",),
        "metadata!": {"name!": _NAME, "namespace!": _NAME},
        "spec!": {"clusterQueue!": _NAME},
    },
}


def problems(value: dict[str, Any]) -> list[str]:
    """What is wrong with an object, each with its path."""
    return _problems(value, FIELDS[value["kind"]], value["kind"])


def _problems(value: Any, wanted: Any, path: str) -> list[str]:
    if wanted is None:
        return []
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return [f"{path}: no object"]
        fields = {name.rstrip("!"): inner for name, inner in wanted.items()}
        found = [f"{path}.{name}: unknown" for name in value if name not in fields]
        found += [
            f"{path}.{name[:-1]}: missing"
            for name in wanted
            if name.endswith("!") and name[:-1] not in value
        ]
        for name, inner in fields.items():
            if name in value:
                found += _problems(value[name], inner, f"{path}.{name}")
        return found
    if isinstance(wanted, list):
        if not isinstance(value, list) or not value:
            return [f"{path}: no list, or an empty one"]
        return [one for item in value for one in _problems(item, wanted[0], f"{path}[]")]
    if isinstance(wanted, re.Pattern):
        good = isinstance(value, str) and wanted.fullmatch(value)
    elif isinstance(wanted, tuple) and isinstance(wanted[0], str):
        good = value in wanted
    else:
        good = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    return [] if good else [f"{path}: {value!r}"]
