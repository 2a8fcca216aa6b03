"""A spec as Kubernetes objects: a JobSet, and the queue it waits in.

Facts from the types of kubernetes-sigs/jobset (api/jobset/v1alpha2) and kubernetes-sigs/kueue
(apis/kueue/v1beta2), and from batch/v1.
"""

from __future__ import annotations

from typing import Any

from launch.exit_codes import RESTART
from launch.gke.spec import TPU_KINDS, GkeSpec

_JOB = "workers"
_PORT = 8476
_MOUNT = "/mnt/arcticjax"
_SPOT = "cloud.google.com/gke-spot"


def jobset(spec: GkeSpec) -> dict[str, Any]:
    """The JobSet of a run: one job for each TPU slice, one pod for each node.

    A process that ends with a code that comes again fails its job by podFailurePolicy, and that
    fails the JobSet. Any other failed pod fails its job by backoffLimit, and all jobs are made
    anew, together: a run needs all of its processes.
    """
    metadata: dict[str, Any] = {"name": spec.name, "namespace": spec.namespace}
    if spec.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": spec.queue}
    if spec.tpu is not None:
        # A slice is a node pool: no two jobs share one.
        metadata["annotations"] = {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": spec.max_restarts,
                "rules": [
                    {
                        "name": "comesAgain",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": _JOB,
                    "replicas": spec.groups,
                    "template": {
                        "spec": {
                            "parallelism": spec.nodes,
                            "completions": spec.nodes,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "FailJob",
                                        "onExitCodes": {
                                            "containerName": "run",
                                            "operator": "NotIn",
                                            "values": sorted(RESTART),
                                        },
                                    }
                                ]
                            },
                            "template": {"spec": _pod(spec)},
                        }
                    },
                }
            ],
        },
    }


def queue(spec: GkeSpec) -> list[dict[str, Any]]:
    """Kueue's objects for one flavor of nodes, with room for this run; made once, by an
    administrator."""
    assert spec.queue is not None
    flavor = f"{spec.queue}-flavor"
    # A queue admits only pods of which it covers everything that they ask for.
    quota = [
        {"name": name, "nominalQuota": quantity}
        for name, quantity in _requests(spec, pods=spec.nodes * spec.groups).items()
    ]
    return [
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "ResourceFlavor",
            "metadata": {"name": flavor},
            "spec": {"nodeLabels": _selector(spec)},
        },
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "ClusterQueue",
            "metadata": {"name": spec.queue},
            "spec": {
                "namespaceSelector": {},
                "queueingStrategy": "BestEffortFIFO",
                "resourceGroups": [
                    {
                        "coveredResources": [one["name"] for one in quota],
                        "flavors": [{"name": flavor, "resources": quota}],
                    }
                ],
            },
        },
        {
            "apiVersion": "kueue.x-k8s.io/v1beta2",
            "kind": "LocalQueue",
            "metadata": {"name": spec.queue, "namespace": spec.namespace},
            "spec": {"clusterQueue": spec.queue},
        },
    ]


def _pod(spec: GkeSpec) -> dict[str, Any]:
    # Kubernetes replaces $(NAME) in arguments; $$ stands for a dollar.
    words = [word.replace("$", "$$") for word in spec.process]
    resources = _requests(spec)
    container: dict[str, Any] = {
        "name": "run",
        "image": spec.image,
        # The run is process 1 of its container: SIGTERM reaches it itself.
        "command": words,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],  # noqa: S108
    }
    environment = _cluster(spec)
    if environment:
        container["env"] = environment
    if spec.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": spec.secret}}]
    pod: dict[str, Any] = {
        # As podFailurePolicy demands.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": spec.grace_seconds,
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if spec.volume_claim is not None:
        container["volumeMounts"].append({"name": "shared-disk", "mountPath": _MOUNT})
        claim = {"claimName": spec.volume_claim}
        pod["volumes"].append({"name": "shared-disk", "persistentVolumeClaim": claim})
    if spec.service_account is not None:
        pod["serviceAccountName"] = spec.service_account
    selector = _selector(spec)
    if selector:
        pod["nodeSelector"] = selector
    tolerations = []
    if spec.spot:
        tolerations.append(
            {"key": _SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    if spec.gpu is not None:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if spec.tpu is not None:
        tolerations.append({"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        pod["tolerations"] = tolerations
    return pod


def _requests(spec: GkeSpec, pods: int = 1) -> dict[str, str]:
    """What so many pods take of their nodes."""
    if spec.tpu is not None:
        return {"google.com/tpu": str(pods * spec.tpu.chips)}
    if spec.gpu is not None:
        return {"nvidia.com/gpu": str(pods * spec.gpu.per_node)}
    assert spec.cpu is not None
    return {"cpu": str(pods * spec.cpu.cores), "memory": f"{pods * spec.cpu.memory_gib}Gi"}


def _selector(spec: GkeSpec) -> dict[str, str]:
    labels = {}
    if spec.tpu is not None:
        labels["cloud.google.com/gke-tpu-accelerator"] = TPU_KINDS[spec.tpu.kind].label
        labels["cloud.google.com/gke-tpu-topology"] = spec.tpu.topology
    if spec.gpu is not None:
        labels["cloud.google.com/gke-accelerator"] = spec.gpu.accelerator
    if spec.spot:
        labels[_SPOT] = "true"
    return labels


def _cluster(spec: GkeSpec) -> list[dict[str, Any]]:
    """How processes find each other. On TPUs GKE itself says so to jax: TPU_WORKER_HOSTNAMES, and
    MEGASCALE_* for several slices."""
    if spec.tpu is not None or spec.nodes == 1:
        return []
    # As JobSet names pods: <jobset>-<job>-<job index>-<pod index>.<jobset>.
    coordinator = f"{spec.name}-{_JOB}-0-0.{spec.name}:{_PORT}"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "ARCTICJAX_COORDINATOR", "value": coordinator},
        {"name": "ARCTICJAX_PROCESSES", "value": str(spec.nodes)},
        {
            "name": "ARCTICJAX_PROCESS",
            "valueFrom": {"fieldRef": {"fieldPath": index}},
        },
    ]
