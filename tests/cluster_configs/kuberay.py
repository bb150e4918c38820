"""JSON schemas of KubeRay's RayCluster and RayJob (ray.io/v1, KubeRay 1.7), for the fields that the manifests use.

Written from the reference of the types; a field that is not here is refused, so that a mistyped one is found.
"""

from __future__ import annotations

from typing import Any


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
FLAG = {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTP]i?)?$"}
QUANTITIES = {"type": "object", "minProperties": 1, "additionalProperties": QUANTITY}
RESOURCES = closed(["requests", "limits"], requests=QUANTITIES, limits=QUANTITIES)

CONTAINER = closed(
    ["name", "image", "resources"],
    name=TEXT,
    image=TEXT,
    env=several(closed(["name"], name=TEXT, value={"type": "string"})),
    ports=several(closed(["containerPort"], containerPort={**COUNT, "minimum": 1, "maximum": 65535}, name=TEXT)),
    resources=RESOURCES,
    volumeMounts=several(closed(["name", "mountPath"], name=TEXT, mountPath=TEXT, readOnly=FLAG)),
    securityContext=closed([], allowPrivilegeEscalation=FLAG, capabilities=closed([], drop=several(TEXT))),
)
POD = closed(
    ["containers"],
    containers=several(CONTAINER),
    serviceAccountName=TEXT,
    nodeSelector=TEXTS,
    tolerations=several(
        closed(
            [], key=TEXT, operator={"enum": ["Exists", "Equal"]}, value=TEXT,
            effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        )
    ),
    terminationGracePeriodSeconds=COUNT,
    securityContext=closed([], runAsNonRoot=FLAG, runAsUser=COUNT, fsGroup=COUNT),
    volumes=several(
        closed(
            ["name"],
            name=TEXT,
            configMap=closed(["name"], name=TEXT),
            persistentVolumeClaim=closed(["claimName"], claimName=TEXT),
        )
    ),
)  # fmt: skip
TEMPLATE = closed(["spec"], metadata={"type": "object"}, spec=POD)

HEAD = closed(
    ["template"],
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    rayStartParams=TEXTS,
    resources=QUANTITIES,
    labels=TEXTS,
    template=TEMPLATE,
)
WORKERS = closed(
    ["groupName", "template"],
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    priority={"type": "integer"},
    rayStartParams=TEXTS,
    resources=QUANTITIES,
    labels=TEXTS,
    template=TEMPLATE,
)
CLUSTER = closed(
    ["headGroupSpec"],
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(
        [],
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=RESOURCES,
    ),
    authOptions=closed([], mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    headGroupSpec=HEAD,
    workerGroupSpecs=several(WORKERS),
)
JOB = closed(
    ["entrypoint", "rayClusterSpec"],
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypoint=TEXT,
    backoffLimit=COUNT,
    activeDeadlineSeconds={**COUNT, "minimum": 1},
    preRunningDeadlineSeconds={**COUNT, "minimum": 1},
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER,
)


def manifest(kind: str, spec: dict[str, Any], version: str = "ray.io/v1") -> dict[str, Any]:
    name = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?$"}
    metadata = closed(["name"], name=name, namespace=TEXT, labels=TEXTS)
    properties = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec}
    return closed(list(properties), **properties)


CLAIM = closed(
    ["accessModes", "resources"],
    accessModes=several({"enum": ["ReadWriteOnce", "ReadWriteMany"]}),
    storageClassName=TEXT,
    resources=closed(["requests"], requests=closed(["storage"], storage=QUANTITY)),
)
SCHEMAS = {
    "RayCluster": manifest("RayCluster", CLUSTER),
    "RayJob": manifest("RayJob", JOB),
    "PersistentVolumeClaim": manifest("PersistentVolumeClaim", CLAIM, version="v1"),
}
